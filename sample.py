"""Sampling from a model: a whole batch of ragged requests in one call, with the KV cache; and a command to talk to a checkpoint."""

import argparse
import json
import os
import sys
import zlib

from data import ranks  # before torch: data/__init__.py says why

import numpy as np
import torch
from tqdm import tqdm

from data.files import InputError, command, model_directory, parse_arguments
from data.rows import MAX_REQUEST, Row, load_tokenizer, pad, read_rows, request_tokens, training_examples
from model import CheckpointError, KVCache, load, packed_weights, precision, read_config
from prompt import load_prompt

MAX_NEW = 256  # tokens of a response, whatever the request's length
CPU_ROWS = 64  # sampled at once on a CPU, where more rows gain nothing
CACHE_SHARE = 0.1  # of a GPU's memory for the key-value cache of the rows sampled at once, beside weights, gradients and AdamW's states
LOOK_EVERY = {"cpu": 1, "cuda": 8}  # tokens between two looks at which rows have ended: a GPU has to be waited for


def find_model(name):
    """The directory of a model by its name (data.files.model_directory says which there are), and its tokenizer. Its weights are not read yet."""
    directory = ranks.on_first(model_directory, str(name))
    config, tokenizer = read_config(directory), load_tokenizer(directory)
    if config.vocab_size != tokenizer.n_vocab:
        raise InputError(
            f"{directory}: the model has {config.vocab_size} tokens and its tokenizer {tokenizer.n_vocab}; put the model's vocab.json and merges.txt there"
        )
    return directory, tokenizer


def load_model(name, device, dropout=None):
    """A model by its name, on the device, with its tokenizer."""
    directory, tokenizer = find_model(name)
    return load(directory, dropout).to(device).eval(), tokenizer


def row_uniforms(n_tokens, *key):
    """The uniform numbers in [0, 1) that draw one row's tokens, one each. They belong to the row: key is (seed, stage, step or
    set, row index), so ranks, batch sizes and resuming can't change what is drawn."""
    entropy = [part if isinstance(part, int) else zlib.crc32(part.encode()) for part in key]
    return np.random.default_rng(entropy).random(n_tokens, dtype=np.float32)


def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0, parallel_sums=None):
    """One token a row by inverse CDF, or the likeliest where u is None.

    parallel_sums: whether cumulative sums are made in parallel; None: on a GPU they are.
    logits (B, V), u (B,) -> tokens (B,) and their log-probabilities (B,) under the distribution that they were drawn from.
    """
    parallel_sums = logits.is_cuda if parallel_sums is None else parallel_sums
    logits = logits.float()
    if u is not None and temperature != 1.0:
        logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        outside = (probs.cumsum(-1) - probs >= top_p).scatter(-1, order, probs.cumsum(-1) - probs >= top_p)  # the mass before it suffices
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
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # of a model that has diverged, whose loss will tell
    return tokens, probs.gather(-1, tokens[:, None]).squeeze(-1).log()


def ban_repeats(logits, text, lengths, n):
    """Put -inf in logits (B, V) at every token that would complete an n-gram which the row's text already holds.

    text: the tokens (B, K) of request and response so far, of which the row's first `lengths` (B,) count.
    """
    starts = torch.arange(max(0, text.shape[1] - n + 1), device=text.device)  # (S,) of the n-grams
    repeated = starts + n <= lengths[:, None]  # (B, S)
    for i in range(n - 1):
        now = text.gather(1, (lengths[:, None] - n + 1 + i).clamp(min=0))  # (B, 1): the i-th of the row's last n - 1 tokens
        repeated = repeated & (text[:, i : i + len(starts)] == now)
    most = torch.full_like(repeated, torch.inf, dtype=logits.dtype).masked_fill(repeated, -torch.inf)
    logits.scatter_reduce_(1, text[:, n - 1 :], most, "amin")


def rows_at_once(models, n_rows, max_new, dtype, request=MAX_REQUEST, memory=None):
    """How many of n rows are sampled at once: on a CPU CPU_ROWS; on a GPU all of them, as far as the key-value cache takes no more than
    CACHE_SHARE of its memory. That is its total memory, not what is free: so a run that goes on samples in the same batches.

    request: tokens of the longest. memory: bytes in all, None: of the device, if it is a GPU.
    """
    if memory is None:
        device = models[0].wte.weight.device
        if device.type == "cpu":
            return CPU_ROWS
        memory = torch.cuda.get_device_properties(device).total_memory
    row_bytes = sum(KVCache.row_bytes(model.config, request + max_new, dtype) for model in models)
    return max(1, min(n_rows, int(CACHE_SHARE * memory) // row_bytes))


@torch.no_grad()
def sample(
    model, requests, uniforms, end, max_new=MAX_NEW, temperature=1.0, top_k=0, top_p=1.0, no_repeat=0, P=None, mix=None, dtype="float32"
):
    """Responses to a batch of ragged requests, y ~ q(· | x), decoded together, each row at its own position.

    requests: B token lists. uniforms: (B, max_new) from row_uniforms, or None for greedy decoding. end: the end-of-text token.
    no_repeat: n of the n-grams that may not repeat, 0 for none. P: a soft prompt (P, C) in front.
    mix: (teacher, α): each token is drawn from (1 - α) q(· | x, y_<t) + α p(· | x, y_<t) instead (MiniLLM, section 2.2).
    dtype: "float32" or "bfloat16", of the models' blocks and their keys and values.
    Returns B token lists (with `end` where a response has ended within max_new tokens) and B lists of their log-probabilities.
    Rows that have ended are dropped from the batch; when none is left, it stops. Makes no collective call, and waits for the device at
    every LOOK_EVERY-th token only.
    """
    device = model.wte.weight.device
    models, shares = ([model], [1.0]) if mix is None else ([model, mix[0]], [1 - mix[1], mix[1]])
    ids, lengths = pad(requests, device)  # (B, T), (B,)
    last, lengths = lengths - 1, lengths + (0 if P is None else len(P))  # a request's last token, and its length behind the prompt
    capacity = int(lengths.max()) + max_new
    if capacity > (n_positions := min(m.config.n_positions for m in models)):
        raise InputError(f"a request of {int(lengths.max())} tokens and {max_new} new ones exceed the model's {n_positions} positions; shorten them")
    B = len(requests)
    caches = [KVCache(m.config, B, capacity, device, torch.bfloat16 if dtype == "bfloat16" else m.wte.weight.dtype) for m in models]
    tokens = torch.zeros(B, max_new, dtype=torch.long, device=device)
    log_probs = torch.zeros(B, max_new, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    rows = torch.arange(B, device=device)  # the row in each slot of the batch
    u = None if uniforms is None else torch.as_tensor(uniforms, device=device)
    text = torch.nn.functional.pad(ids, (0, max_new)) if no_repeat else None  # (B, T + max_new), of which `written` tokens (B,) count
    written = last + 1

    with precision(device, dtype), packed_weights(*models):
        hidden = [m(ids, prefix=P, cache=cache, where=(rows, last)) for m, cache in zip(models, caches)]  # (B, C) each
        for cache in caches:
            cache.set_lengths(lengths)
        for t in range(max_new):
            logits = [m.logits(h) for m, h in zip(models, hidden)]  # (slots, V) each
            logits = logits[0] if mix is None else sum(share * z.softmax(-1) for share, z in zip(shares, logits)).log()
            if no_repeat:
                ban_repeats(logits, text[rows], written[rows] + t, no_repeat)
            tokens[rows, t], log_probs[rows, t] = token, _ = draw(logits, None if u is None else u[rows, t], temperature, top_k, top_p)
            ended[rows] |= token == end
            if t + 1 == max_new:
                break
            if no_repeat:
                text[rows, written[rows] + t] = token
            if (t + 1) % LOOK_EVERY[device.type] == 0:
                alive = (~ended[rows]).nonzero().squeeze(-1)
                if len(alive) == 0:
                    break
                if len(alive) <= 0.75 * len(rows):  # a smaller batch pays for moving the cache
                    rows, token = rows[alive], token[alive]
                    for cache in caches:
                        cache.keep(alive)
            hidden = [m(token[:, None], cache=cache)[:, 0] for m, cache in zip(models, caches)]  # (slots, C) each
    return _until_end(tokens.tolist(), log_probs.tolist(), end, t + 1)


def _until_end(tokens, log_probs, end, n_drawn):
    """Cut each row behind its first `end`."""
    lengths = [row.index(end) + 1 if end in row[:n_drawn] else n_drawn for row in tokens]
    return [row[:n] for row, n in zip(tokens, lengths)], [row[:n] for row, n in zip(log_probs, lengths)]


def sample_all(model, requests, keys, end, max_new=MAX_NEW, at_once=None, greedy=False, label=None, mix=None, dtype="float32", **how):
    """`sample` over any number of requests, those of like length together.

    at_once: how many rows; None: as rows_at_once says. keys: for each request the key of its random numbers (row_uniforms). label: shows a progress bar under this name.
    Returns the responses and their log-probabilities, in the order of the requests.
    """
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i]))
    if at_once is None:
        longest = max(map(len, requests), default=0) + (0 if how.get("P") is None else len(how["P"]))
        models = [model] if mix is None else [model, mix[0]]
        at_once = rows_at_once(models, len(requests), max_new, dtype, longest)
    responses, log_probs = [None] * len(requests), [None] * len(requests)
    with tqdm(total=len(requests), desc=label, unit="row", leave=False, disable=None if label and ranks.rank() == 0 else True) as bar:
        for chunk in (order[i : i + at_once] for i in range(0, len(order), at_once)):
            uniforms = None if greedy else np.stack([row_uniforms(max_new, *keys[i]) for i in chunk])
            for i, response, log_p in zip(chunk, *sample(model, [requests[i] for i in chunk], uniforms, end, max_new, mix=mix, dtype=dtype, **how)):
                responses[i], log_probs[i] = response, log_p
            bar.update(len(chunk))
    return responses, log_probs


def sample_to_file(model, tokenizer, rows, key, path, max_new, dtype="float32", at_once=None):
    """A model's responses to the training rows, of all ranks, as JSON lines that training reads.

    A line holds the sampled tokens too, as `ids`: text does not tell whether a response was cut off at the limit. The row's own output is
    kept as `reference`. A sampling that was interrupted goes on; `path` has its name only when it is whole.
    """
    partial, examples = path.with_name(f"{path.name}.partial"), training_examples(rows, tokenizer)
    at_once = ranks.world() * (at_once or rows_at_once([model], len(examples), max_new, dtype))
    n_done = ranks.on_first(whole_lines, partial)
    with tqdm(total=len(examples), initial=n_done, desc="sampling", unit="row", disable=None if ranks.rank() == 0 else True) as bar:
        for start in range(n_done, len(examples), at_once):
            mine = ranks.share(examples[start : start + at_once])
            keys = [(*key, e.index) for e in mine]
            responses, _ = sample_all(model, [e.request for e in mine], keys, tokenizer.eot_token, max_new, dtype=dtype)
            sampled = sorted(ranks.gather([(e.index, response) for e, response in zip(mine, responses)]))
            if ranks.rank() == 0:
                with open(partial, "a", encoding="utf-8") as file:
                    for index, response in sampled:
                        row = rows[index]
                        line = {"instruction": row.instruction, "input": row.input, "output": to_text(response, tokenizer), "ids": response}
                        file.write(json.dumps(line | {"reference": row.references[0]}) + "\n")
            bar.update(len(sampled))
    ranks.on_first(os.replace, partial, path)


def whole_lines(path):
    """How many lines a file that was being written has. Cuts off a last one that is not whole."""
    path.touch()
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
    return content.count(b"\n")


def to_text(response, tokenizer):
    """A response's text, without its end-of-text."""
    return tokenizer.decode([token for token in response if token != tokenizer.eot_token])


def in_range(kind, low, high, low_open=False):
    """An argparse type: a number of a kind from `low` (or above it) to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (low_open and value == low):
            raise argparse.ArgumentTypeError(f"must be {'above' if low_open else 'at least'} {low} and at most {high}, not {text!r}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"  # argparse names it in its own message
    return parse


def add_precision_option(parser, default="bfloat16 on a GPU that has it, float32 elsewhere"):
    parser.add_argument("--dtype", choices=ranks.DTYPES, help=f"of the products in the models' blocks; logits are float32 (default: {default})")


def add_decoding_options(parser):
    parser.add_argument(
        "--max-new", type=in_range(int, 1, 100_000), default=MAX_NEW, metavar="N", help=f"tokens of a response at most (default {MAX_NEW})"
    )
    parser.add_argument("--temperature", type=in_range(float, 0, 100, low_open=True), default=1.0)
    parser.add_argument("--top-k", type=in_range(int, 0, 10**6), default=0, help="only the K likeliest tokens (0: all)")
    parser.add_argument(
        "--top-p", type=in_range(float, 0, 1, low_open=True), default=1.0, help="only the likeliest tokens that hold this much probability"
    )
    parser.add_argument("--greedy", action="store_true", help="the likeliest token each time")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="sample.py", description="Let a model respond to an instruction, or to a file of them.")
    parser.add_argument("model", help="a run or checkpoint directory, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a hub id owner/name")
    parser.add_argument("--instruction", help="one instruction")
    parser.add_argument("--input", default="", help="the context that the instruction is about")
    parser.add_argument("--file", help="JSON lines with 'instruction' and perhaps 'input'")
    parser.add_argument("--prompt", metavar="FILE", help="a soft prompt to stand in front: prompt.safetensors or a directory with it")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with the tokens and their log-probabilities")
    parser.add_argument("--seed", type=in_range(int, 0, 2**32), default=10)
    parser.add_argument(
        "--no-repeat-ngram", type=in_range(int, 0, 100), default=0, metavar="N", help="no N-gram twice in request and response (0: off)"
    )
    add_decoding_options(parser)
    add_precision_option(parser)
    args = parse_arguments(parser, argv)
    if (args.instruction is None) == (args.file is None):
        raise InputError("give either --instruction TEXT or --file FILE")
    if args.file is not None and args.input:
        raise InputError("--input goes with --instruction; a row of --file has its own 'input'")

    device, dtype = ranks.start(args.dtype)
    rows = read_rows(args.file, needs_output=False) if args.file is not None else [Row(0, args.instruction, args.input, ())]
    model, tokenizer = load_model(args.model, device)
    P = None if args.prompt is None else load_prompt(args.prompt, model.config.n_embd).to(device)
    requests, shortened = zip(*(request_tokens(row, tokenizer) for row in rows))
    if sum(shortened):
        print(f"{sum(shortened)} of {len(rows)} requests were shortened to fit", file=sys.stderr)
    responses, log_probs = sample_all(
        model, requests, [(args.seed, "sample", row.index) for row in rows], tokenizer.eot_token, args.max_new, greedy=args.greedy,
        label="sampling" if len(rows) > 1 else None, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, no_repeat=args.no_repeat_ngram, P=P, dtype=dtype,
    )  # fmt: skip
    for row, response, log_p in zip(rows, responses, log_probs):
        text = to_text(response, tokenizer)
        if args.json:
            ended = response[-1] == tokenizer.eot_token
            print(json.dumps({"instruction": row.instruction, "input": row.input, "text": text, "ids": response, "log_probs": log_p, "ended": ended}))
        else:
            print(text if len(rows) == 1 else f"### {row.instruction}\n{text}\n")


if __name__ == "__main__":
    command(main, CheckpointError)
