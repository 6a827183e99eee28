"""Sampling from a model: a whole batch of ragged requests in one call, with the KV cache; and a command to talk to a checkpoint."""

from data.threads import configure_threads

configure_threads()  # before torch is imported

import argparse
import json
import os
import sys
import zlib

import numpy as np
import torch
from tqdm import tqdm

from data import dist
from data.cli import InputError, parse_arguments, run_command_line
from data.models import load_model
from data.options import add_decoding_options, add_precision_option, number_in_range
from data.rows import (
    MAX_NEW_TOKENS,
    MAX_REQUEST,
    Row,
    encode_request,
    encode_training_rows,
    pad,
    read_rows,
)
from model import KVCache, packed_weights, precision
from prompt import load_prompt

CPU_BATCH_SIZE = 64  # sampled at once on a CPU, where more rows gain nothing


# Of a GPU's memory for the key-value cache of the rows sampled at once, beside weights, gradients and
# AdamW's states
CACHE_SHARE = 0.1


CHECK_INTERVAL = {
    "cpu": 1,
    "cuda": 8,
}  # tokens between two looks at which rows have ended: a GPU has to be waited for


def row_uniforms(n_tokens, *key):
    """The uniform numbers in [0, 1) that draw one row's tokens, one each. They belong to the row: key is (seed, stage, step or
    set, row index), so ranks, batch sizes and resuming can't change what is drawn."""
    entropy = [part if isinstance(part, int) else zlib.crc32(part.encode()) for part in key]
    return np.random.default_rng(entropy).random(n_tokens, dtype=np.float32)


def sample_next_token(logits, u, temperature=1.0, top_k=0, top_p=1.0, parallel_sums=None):
    """One token a row by inverse CDF, or the likeliest where u is None.

    parallel_sums: whether cumulative sums are made in parallel; None: on a GPU they are.
    logits (B, V), u (B,) -> tokens (B,) and their log-probabilities (B,) under the distribution that they were drawn from.
    """
    parallel_sums = logits.is_cuda if parallel_sums is None else parallel_sums
    logits = logits.float()
    if u is not None and temperature != 1.0:
        logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(
            logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf
        )
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        outside = (probs.cumsum(-1) - probs >= top_p).scatter(
            -1, order, probs.cumsum(-1) - probs >= top_p
        )  # the mass before it suffices
        logits = logits.masked_fill(outside, -torch.inf)
    probs = logits.softmax(-1)  # (B, V)
    if u is None:
        tokens = probs.argmax(-1)
    else:
        # Scaled by the last cumulative value: u < 1, so rounding can't point past the vocabulary, nor at a word without probability.
        cdf = probs.cumsum(-1)
        if parallel_sums:  # their rounding may let the sum fall, or rise at a token of probability 0, which would then be drawn
            cdf = cdf.masked_fill(probs == 0, 0).cummax(-1).values
        tokens = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(-1)
        tokens = tokens.clamp(
            max=logits.shape[-1] - 1
        )  # of a model that has diverged, whose loss will tell
    return tokens, probs.gather(-1, tokens[:, None]).squeeze(-1).log()


def ban_repeated_ngrams(logits, text, lengths, n):
    """Put -inf in logits (B, V) at every token that would complete an n-gram which the row's text already holds.

    text: the tokens (B, K) of request and response so far, of which the row's first `lengths` (B,) count.
    """
    starts = torch.arange(max(0, text.shape[1] - n + 1), device=text.device)  # (S,) of the n-grams
    repeated = starts + n <= lengths[:, None]  # (B, S)
    for i in range(n - 1):
        now = text.gather(
            1, (lengths[:, None] - n + 1 + i).clamp(min=0)
        )  # (B, 1): the i-th of the row's last n - 1 tokens
        repeated = repeated & (text[:, i : i + len(starts)] == now)
    most = torch.full_like(repeated, torch.inf, dtype=logits.dtype).masked_fill(
        repeated, -torch.inf
    )
    logits.scatter_reduce_(1, text[:, n - 1 :], most, "amin")


def sampling_batch_size(models, n_rows, max_new_tokens, dtype, request=MAX_REQUEST, memory=None):
    """How many of n rows are sampled at once: on a CPU CPU_ROWS; on a GPU all of them, as far as the key-value cache takes no more than
    CACHE_SHARE of its memory. That is its total memory, not what is free: so a run that goes on samples in the same batches.

    request: tokens of the longest. memory: bytes in all, None: of the device, if it is a GPU.
    """
    if memory is None:
        device = models[0].wte.weight.device
        if device.type == "cpu":
            return CPU_BATCH_SIZE
        memory = torch.cuda.get_device_properties(device).total_memory
    row_bytes = sum(
        KVCache.row_bytes(model.config, request + max_new_tokens, dtype) for model in models
    )
    return max(1, min(n_rows, int(CACHE_SHARE * memory) // row_bytes))


@torch.no_grad()
def sample(
    model,
    requests,
    uniforms,
    eos_token_id,
    max_new_tokens=MAX_NEW_TOKENS,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    no_repeat_ngram=0,
    P=None,
    teacher_mix=None,
    dtype="float32",
):
    """Responses to a batch of ragged requests, y ~ q(· | x), decoded together, each row at its own position.

    requests: B token lists. uniforms: (B, max_new_tokens) from row_uniforms, or None for greedy decoding. eos_token_id: the end-of-text token.
    no_repeat: n of the n-grams that may not repeat, 0 for none. P: a soft prompt (P, C) in front.
    mix: (teacher, α): each token is drawn from (1 - α) q(· | x, y_<t) + α p(· | x, y_<t) instead (MiniLLM, section 2.2).
    dtype: "float32" or "bfloat16", of the models' blocks and their keys and values.
    Returns B token lists (with `eos_token_id` where a response has ended within max_new_tokens) and B lists of their log-probabilities.
    Rows that have ended are dropped from the batch; when none is left, it stops. Makes no collective call, and waits for the device at
    every LOOK_EVERY-th token only.
    """
    device = model.wte.weight.device
    models, shares = (
        ([model], [1.0])
        if teacher_mix is None
        else ([model, teacher_mix[0]], [1 - teacher_mix[1], teacher_mix[1]])
    )
    ids, lengths = pad(requests, device)  # (B, T), (B,)
    last, lengths = (
        lengths - 1,
        lengths + (0 if P is None else len(P)),
    )  # a request's last token, and its length behind the prompt
    max_seq_len = int(lengths.max()) + max_new_tokens
    if max_seq_len > (n_positions := min(m.config.n_positions for m in models)):
        raise InputError(
            f"a request of {int(lengths.max())} tokens and {max_new_tokens} new ones exceed the model's {n_positions} positions; shorten them"
        )
    B = len(requests)
    caches = [
        KVCache(
            m.config,
            B,
            max_seq_len,
            device,
            torch.bfloat16 if dtype == "bfloat16" else m.wte.weight.dtype,
        )
        for m in models
    ]
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    log_probs = torch.zeros(B, max_new_tokens, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    rows = torch.arange(B, device=device)  # the row in each slot of the batch
    u = None if uniforms is None else torch.as_tensor(uniforms, device=device)
    text = (
        torch.nn.functional.pad(ids, (0, max_new_tokens)) if no_repeat_ngram else None
    )  # (B, T + max_new_tokens), of which `written` tokens (B,) count
    written = last + 1

    with precision(device, dtype), packed_weights(*models):
        hidden = [
            m(ids, prefix=P, cache=cache, output_positions=(rows, last))
            for m, cache in zip(models, caches)
        ]  # (B, C) each
        for cache in caches:
            cache.set_lengths(lengths)
        for t in range(max_new_tokens):
            logits = [m.logits(h) for m, h in zip(models, hidden)]  # (slots, V) each
            logits = (
                logits[0]
                if teacher_mix is None
                else sum(share * z.softmax(-1) for share, z in zip(shares, logits)).log()
            )
            if no_repeat_ngram:
                ban_repeated_ngrams(logits, text[rows], written[rows] + t, no_repeat_ngram)
            tokens[rows, t], log_probs[rows, t] = token, _ = sample_next_token(
                logits, None if u is None else u[rows, t], temperature, top_k, top_p
            )
            finished[rows] |= token == eos_token_id
            if t + 1 == max_new_tokens:
                break
            if no_repeat_ngram:
                text[rows, written[rows] + t] = token
            if (t + 1) % CHECK_INTERVAL[device.type] == 0:
                alive = (~finished[rows]).nonzero().squeeze(-1)
                if len(alive) == 0:
                    break
                if len(alive) <= 0.75 * len(rows):  # a smaller batch pays for moving the cache
                    rows, token = rows[alive], token[alive]
                    for cache in caches:
                        cache.select_rows(alive)
            hidden = [
                m(token[:, None], cache=cache)[:, 0] for m, cache in zip(models, caches)
            ]  # (slots, C) each
    return _until_end(tokens.tolist(), log_probs.tolist(), eos_token_id, t + 1)


def _until_end(tokens, log_probs, eos_token_id, n_drawn):
    """Cut each row behind its first `end`."""
    lengths = [
        row.index(eos_token_id) + 1 if eos_token_id in row[:n_drawn] else n_drawn for row in tokens
    ]
    return [row[:n] for row, n in zip(tokens, lengths)], [
        row[:n] for row, n in zip(log_probs, lengths)
    ]


def sample_all(
    model,
    requests,
    rng_keys,
    eos_token_id,
    max_new_tokens=MAX_NEW_TOKENS,
    batch_size=None,
    greedy=False,
    label=None,
    teacher_mix=None,
    dtype="float32",
    **sampling_kwargs,
):
    """`sample` over any number of requests, those of like length together.

    at_once: how many rows; None: as rows_at_once says. keys: for each request the key of its random numbers (row_uniforms). label: shows a progress bar under this name.
    Returns the responses and their log-probabilities, in the order of the requests.
    """
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i]))
    if batch_size is None:
        longest = max(map(len, requests), default=0) + (
            0 if sampling_kwargs.get("P") is None else len(sampling_kwargs["P"])
        )
        models = [model] if teacher_mix is None else [model, teacher_mix[0]]
        batch_size = sampling_batch_size(models, len(requests), max_new_tokens, dtype, longest)
    responses, log_probs = [None] * len(requests), [None] * len(requests)
    with tqdm(
        total=len(requests),
        desc=label,
        unit="row",
        leave=False,
        disable=None if label and dist.rank() == 0 else True,
    ) as bar:
        for chunk in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            uniforms = (
                None
                if greedy
                else np.stack([row_uniforms(max_new_tokens, *rng_keys[i]) for i in chunk])
            )
            for i, response, log_p in zip(
                chunk,
                *sample(
                    model,
                    [requests[i] for i in chunk],
                    uniforms,
                    eos_token_id,
                    max_new_tokens,
                    teacher_mix=teacher_mix,
                    dtype=dtype,
                    **sampling_kwargs,
                ),
            ):
                responses[i], log_probs[i] = response, log_p
            bar.update(len(chunk))
    return responses, log_probs


def sample_to_file(
    model, tokenizer, rows, key, path, max_new_tokens, dtype="float32", batch_size=None
):
    """A model's responses to the training rows, of all ranks, as JSON lines that training reads.

    A line holds the sampled tokens too, as `ids`: text does not tell whether a response was cut off at the limit. The row's own output is
    kept as `reference`. A sampling that was interrupted goes on; `path` has its name only when it is whole.
    """
    partial, examples = (
        path.with_name(f"{path.name}.partial"),
        encode_training_rows(rows, tokenizer),
    )
    batch_size = dist.world_size() * (
        batch_size or sampling_batch_size([model], len(examples), max_new_tokens, dtype)
    )
    n_done = dist.run_on_rank0(count_complete_lines, partial)
    with tqdm(
        total=len(examples),
        initial=n_done,
        desc="sampling",
        unit="row",
        disable=None if dist.rank() == 0 else True,
    ) as bar:
        for start in range(n_done, len(examples), batch_size):
            mine = dist.shard(examples[start : start + batch_size])
            rng_keys = [(*key, e.index) for e in mine]
            responses, _ = sample_all(
                model,
                [e.request for e in mine],
                rng_keys,
                tokenizer.eot_token,
                max_new_tokens,
                dtype=dtype,
            )
            sampled = sorted(
                dist.all_gather_list([(e.index, response) for e, response in zip(mine, responses)])
            )
            if dist.rank() == 0:
                with open(partial, "a", encoding="utf-8") as file:
                    for index, response in sampled:
                        row = rows[index]
                        line = {
                            "instruction": row.instruction,
                            "input": row.input,
                            "output": decode_response(response, tokenizer),
                            "ids": response,
                        }
                        file.write(json.dumps(line | {"reference": row.references[0]}) + "\n")
            bar.update(len(sampled))
    dist.run_on_rank0(os.replace, partial, path)


def count_complete_lines(path):
    """How many lines a file that was being written has. Cuts off a last one that is not whole."""
    path.touch()
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
    return content.count(b"\n")


def decode_response(response, tokenizer):
    """A response's text, without its end-of-text."""
    return tokenizer.decode([token for token in response if token != tokenizer.eot_token])


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="sample.py", description="Let a model respond to an instruction, or to a file of them."
    )
    parser.add_argument(
        "model",
        help="a run or checkpoint directory, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a hub id owner/name",
    )
    parser.add_argument("--instruction", help="one instruction")
    parser.add_argument("--input", default="", help="the context that the instruction is about")
    parser.add_argument("--file", help="JSON lines with 'instruction' and perhaps 'input'")
    parser.add_argument(
        "--prompt",
        metavar="FILE",
        help="a soft prompt to stand in front: prompt.safetensors or a directory with it",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a line, with the tokens and their log-probabilities",
    )
    parser.add_argument("--seed", type=number_in_range(int, 0, 2**32), default=10)
    parser.add_argument(
        "--no-repeat-ngram",
        type=number_in_range(int, 0, 100),
        default=0,
        metavar="N",
        help="no N-gram twice in request and response (0: off)",
    )
    add_decoding_options(parser)
    add_precision_option(parser)
    args = parse_arguments(parser, argv)
    if (args.instruction is None) == (args.file is None):
        raise InputError("give either --instruction TEXT or --file FILE")
    if args.file is not None and args.input:
        raise InputError("--input goes with --instruction; a row of --file has its own 'input'")

    device, dtype = dist.init_process(args.dtype)
    rows = (
        read_rows(args.file, needs_output=False)
        if args.file is not None
        else [Row(0, args.instruction, args.input, ())]
    )
    model, tokenizer = load_model(args.model, device)
    P = None if args.prompt is None else load_prompt(args.prompt, model.config.n_embd).to(device)
    requests, shortened = zip(*(encode_request(row, tokenizer) for row in rows))
    if sum(shortened):
        print(f"{sum(shortened)} of {len(rows)} requests were shortened to fit", file=sys.stderr)
    responses, log_probs = sample_all(
        model,
        requests,
        [(args.seed, "sample", row.index) for row in rows],
        tokenizer.eot_token,
        args.max_new,
        greedy=args.greedy,
        label="sampling" if len(rows) > 1 else None,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        no_repeat_ngram=args.no_repeat_ngram,
        P=P,
        dtype=dtype,
    )
    for row, response, log_p in zip(rows, responses, log_probs):
        text = decode_response(response, tokenizer)
        if args.json:
            finished = response[-1] == tokenizer.eot_token
            print(
                json.dumps(
                    {
                        "instruction": row.instruction,
                        "input": row.input,
                        "text": text,
                        "ids": response,
                        "log_probs": log_p,
                        "finished": finished,
                    }
                )
            )
        else:
            print(text if len(rows) == 1 else f"### {row.instruction}\n{text}\n")


if __name__ == "__main__":
    run_command_line(main)
