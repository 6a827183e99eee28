"""Sampling for many requests: batches that fit in memory, ranks, files, and sample.py's command."""

import json
import sys

import numpy as np
import torch
from tqdm import tqdm

from data.models.checkpoint import read_config
from data.models.copies import check_same_files
from data.models.hub import model_hash
from data.models.named import find_model, load_model
from data.models.prompts import load_prompt, prompt_metadata, prompt_path
from data.process import dist
from data.process.command_line import ArgumentParser, number_in_range
from data.process.errors import InputError
from data.process.files import name_errors
from data.process.packed import packed_weights
from data.runs.options import add_decoding_options, add_precision_option
from data.sets.rows import (
    MAX_NEW_TOKENS,
    MAX_REQUEST,
    Row,
    count_complete_lines,
    encode_request,
    encode_training_rows,
    read_rows,
)
from model import KVCache
from sample import row_uniforms, sample

CPU_BATCH_SIZE = 64  # more rows at once are not faster on a CPU
# The share of a GPU's memory that the key-value caches may take: while a model is trained, next to
# weights, gradients and the states of AdamW; and where there are weights only.
CACHE_SHARE, CACHE_SHARE_ALONE = 0.1, 0.4


def sample_all(
    model,
    requests,
    rng_keys,
    eos_token_id,
    max_new_tokens=MAX_NEW_TOKENS,
    batch_size=None,
    cache_share=CACHE_SHARE,
    greedy=False,
    label=None,
    **sampling_kwargs,
):
    """`sample` for any number of requests, in batches of similar length.

    rng_keys: the requests' keys for `row_uniforms`. batch_size: by default what fits in the share
    `cache_share` of a GPU's memory. label: of a progress bar, if not None. Returns responses and
    log-probabilities in the order of the requests. Raises InputError if one may exceed the model's
    positions.
    """
    if not requests:
        return [], []
    P, teacher_mix = (sampling_kwargs.get(name) for name in ("P", "teacher_mix"))
    models = [model] if teacher_mix is None else [model, teacher_mix[0]]
    dtype = sampling_kwargs.get("dtype", "float32")
    longest = max(map(len, requests)) + (0 if P is None else len(P))
    check_positions(models, longest, max_new_tokens)
    if batch_size is None:
        n = len(requests)
        batch_size = sampling_batch_size(
            models, n, max_new_tokens, dtype, max_request=longest, share=cache_share
        )
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i]))
    responses, log_probs = [None] * len(requests), [None] * len(requests)
    disable = None if label and dist.rank() == 0 else True  # None: shown on a terminal only
    bar = tqdm(total=len(requests), desc=label, unit="row", leave=False, disable=disable)
    with bar, packed_weights(models, dtype):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            xs, u = [requests[i] for i in batch], None
            if not greedy:
                u = np.stack([row_uniforms(max_new_tokens, *rng_keys[i]) for i in batch])
            results = sample(model, xs, u, eos_token_id, max_new_tokens, **sampling_kwargs)
            for i, response, log_p in zip(batch, *results):
                responses[i], log_probs[i] = response, log_p
            bar.update(len(batch))
    return responses, log_probs


def check_positions(models, longest, max_new_tokens):
    """Raise InputError if a request, with a soft prompt, and its response may exceed the positions
    of a model. longest: tokens of the longest one."""
    n_positions = min(model.config.n_positions for model in models)
    if longest + max_new_tokens - 1 > n_positions:  # the last new token is never read
        problem = f"{longest} tokens of prompt and request and {max_new_tokens} new ones exceed"
        fix = "use a shorter request, fewer new tokens, or a model with more"
        raise InputError(f"{problem} the model's {n_positions} positions; {fix}")


def check_requests(name, rows, max_new_tokens, option, prompt_length=0):
    """Raise InputError if a model has too few positions for a request and its response.

    name: of the model. option: that which sets max_new_tokens. prompt_length: of a soft prompt.
    """
    directory, tokenizer, _ = find_model(name)
    n_positions = read_config(directory).n_positions
    if n_positions >= MAX_REQUEST + prompt_length + max_new_tokens - 1:
        return
    lengths = [len(encode_request(row, tokenizer)[0]) for row in rows]
    most = n_positions + 1 - max(lengths) - prompt_length  # new tokens; the last is never read
    if most < max_new_tokens:
        location = rows[lengths.index(max(lengths))].location
        prompt = f" with a prompt of {prompt_length}" if prompt_length else ""
        problem = f"{location} has a request of {max(lengths)} tokens{prompt}, and {max_new_tokens}"
        fix = f"lower {option} to {most}" if most > 0 else "shorten it or leave it out"
        found = f"{problem} new ones exceed the {n_positions} positions of {name}"
        raise InputError(f"{found}; {fix}, or use a model with more")


def sampling_batch_size(
    models, n_rows, max_new_tokens, dtype, max_request=MAX_REQUEST, share=CACHE_SHARE
):
    """How many of n rows to sample at once: on a GPU, as many as fit in a share of its total
    memory. The total, not what is free, so a resumed run has the same batch size and rounding."""
    device = models[0].wte.weight.device
    if device.type == "cpu":
        return CPU_BATCH_SIZE
    memory = torch.cuda.get_device_properties(device).total_memory
    max_seq_len = max_request + max_new_tokens
    row_bytes = sum(KVCache.row_bytes(m.config, max_seq_len, dtype) for m in models)
    return max(1, min(n_rows, int(share * memory) // row_bytes))


def common_batch_size(model, n_rows, max_new_tokens, dtype, share):
    """How many of n rows each rank samples at once: the least of all ranks. Their cards may differ,
    and all have to cut the same batches."""
    rank_rows = -(-n_rows // dist.world_size())
    return dist.least(sampling_batch_size([model], rank_rows, max_new_tokens, dtype, share=share))


def sample_to_file(model, tokenizer, rows, key, path, max_new_tokens, dtype="float32"):
    """Write a model's responses to the training rows as JSON lines, SeqKD's data, by all ranks.

    `ids` has the sampled tokens, because text does not tell whether a response was cut off. An
    interrupted run resumes; `path` exists only when it is complete.
    """
    partial = path.with_name(f"{path.name}.partial")
    examples = encode_training_rows(rows, tokenizer)
    n, eos_token_id = len(examples), tokenizer.eot_token
    rank_size = common_batch_size(model, n, max_new_tokens, dtype, CACHE_SHARE_ALONE)
    batch_size = dist.world_size() * rank_size
    n_done = dist.run_on_rank0(count_complete_lines, partial)
    disable = None if dist.rank() == 0 else True
    with tqdm(total=n, initial=n_done, desc="sampling", unit="row", disable=disable) as bar:
        for start in range(n_done, n, batch_size):
            mine = dist.shard(examples[start : start + batch_size])
            xs, keys = [e.request for e in mine], [(*key, e.index) for e in mine]
            responses, _ = sample_all(
                model, xs, keys, eos_token_id, max_new_tokens, rank_size, dtype=dtype
            )
            sampled = dist.all_gather_list([(e.index, y) for e, y in zip(mine, responses)])
            if dist.rank() == 0:
                with name_errors(partial), open(partial, "a", encoding="utf-8") as file:
                    for index, response in sorted(sampled):
                        row, text = rows[index], decode_response(response, tokenizer)
                        line = {"instruction": row.instruction, "input": row.input, "output": text}
                        line |= {"ids": response, "reference": row.references[0]}
                        file.write(json.dumps(line) + "\n")
            bar.update(len(sampled))
    dist.run_on_rank0(partial.replace, path)


def decode_response(response, tokenizer):
    """The text of a response, without its end-of-text."""
    return tokenizer.decode([token for token in response if token != tokenizer.eot_token])


def warn_of_other_teacher(prompt, model):
    """Print a warning if a soft prompt was tuned for another model, or does not say for which."""
    path, metadata = prompt_path(prompt), prompt_metadata(prompt)
    problem = ""
    if "teacher_sha256" not in metadata:
        problem = "does not say which teacher it was tuned for"
        if teacher := metadata.get("teacher"):
            problem = f"was tuned for {teacher}, but does not say with which weights"
    elif metadata["teacher_sha256"] != model_hash(model):
        teacher = metadata.get("teacher")
        problem = f"was tuned for the teacher {teacher}, and {model} is another model"
    if problem:
        print(f"warning: {path}: {problem}", file=sys.stderr, flush=True)


def parse_args(argv):
    help = "Let a model respond to an instruction, or to a file of them."
    parser = ArgumentParser("sample.py", description=help)
    option = parser.add_argument
    help = "a run or checkpoint directory, an official name such as gpt2-xl, or a hub id owner/name"
    option("model", help=help)
    option("--instruction", help="one instruction")
    option("--input", default="", help="the context of the instruction")
    help = "JSON lines with 'instruction' and optionally 'input'; - is standard input"
    option("--file", help=help)
    option(
        "--prompt",
        metavar="FILE",
        help="a soft prompt: prompt.safetensors or its directory, or a PEFT adapter",
    )
    option("--json", action="store_true", help="JSON lines with tokens and log-probabilities")
    option("--seed", type=number_in_range(int, 0, 2**32), default=10)
    add_decoding_options(parser)
    add_precision_option(parser)
    args = parser.parse_args(argv)
    if (args.instruction is None) == (args.file is None) or (args.file and args.input):
        raise InputError("give either --instruction TEXT, perhaps with --input, or --file FILE")
    return args


def main(argv=None):
    args = parse_args(argv)
    device, dtype = dist.init_process(args.dtype)
    check_same_files([prompt_path(args.prompt)] if args.prompt else [], [args.model])
    rows = [Row(0, args.instruction, args.input, (), location="--instruction")]
    if args.file is not None:
        # On one rank: what comes through a pipe can be read only once.
        rows = dist.run_on_rank0(lambda: read_rows(args.file, needs_output=False))
    model, tokenizer = load_model(args.model, device)
    P = None
    if args.prompt is not None:
        P = load_prompt(args.prompt, model.config.n_embd).to(device)
        dist.run_on_rank0(warn_of_other_teacher, args.prompt, args.model)
    prompt_length = 0 if P is None else len(P)
    check_requests(args.model, rows, args.max_new_tokens, "--max-new", prompt_length)
    requests, shortened = zip(*(encode_request(row, tokenizer) for row in rows))
    if any(shortened) and dist.rank() == 0:
        print(f"{sum(shortened)} of {len(rows)} requests were shortened to fit", file=sys.stderr)
    rng_keys = [(args.seed, "sample", row.index) for row in rows]
    names = ("max_new_tokens", "greedy", "temperature", "top_k", "top_p", "no_repeat_ngram")
    options = {name: getattr(args, name) for name in names}
    options |= {"P": P, "dtype": dtype, "label": "sampling", "cache_share": CACHE_SHARE_ALONE}
    responses, log_probs = sample_all(model, requests, rng_keys, tokenizer.eot_token, **options)
    for row, response, log_p in zip(rows, responses, log_probs):
        text = decode_response(response, tokenizer)
        if args.json:
            record = {"instruction": row.instruction, "input": row.input, "text": text}
            record |= {"ids": response, "log_probs": log_p}
            record["finished"] = response[-1] == tokenizer.eot_token
            dist.print0(json.dumps(record))
        else:
            dist.print0(text if len(rows) == 1 else f"### {row.instruction}\n{text}\n")
