"""Sampling with a key-value cache: `sample` (one batch), `sample_all` (any number of requests),
`sample_to_file`, and a command."""

from data.threads import configure_threads

configure_threads()  # before torch is imported

import json
import sys
import zlib

import numpy as np
import torch
from tqdm import tqdm

from data import dist
from data import rows as data_rows
from data.cli import ArgumentParser, InputError, run_command_line
from data.models import load_model
from data.options import add_decoding_options, add_precision_option, number_in_range
from data.tensors import load_prompt
from model import KVCache, packed_weights, precision

CPU_BATCH_SIZE = 64  # more rows at once are not faster on a CPU
CACHE_SHARE = 0.1  # of a GPU's memory, next to weights, gradients and the states of AdamW
# Tokens between two checks for finished rows. On a GPU each check makes the host wait for it.
CHECK_INTERVAL = {"cpu": 1, "cuda": 8}


@torch.no_grad()
def sample(
    model,
    requests,
    uniforms,
    eos_token_id,
    max_new_tokens=data_rows.MAX_NEW_TOKENS,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    no_repeat_ngram=None,
    P=None,
    teacher_mix=None,
    dtype="float32",
):
    """Responses y ~ q(· | x) to a batch of B requests of any lengths, decoded together.

    uniforms: random numbers (B, max_new_tokens) from `row_uniforms`, or None for greedy decoding.
    no_repeat_ngram: n of the n-grams that may not repeat, 0 or None for no ban. P: a soft prompt
    (prompt_length, C) in front of every request; not together with teacher_mix. teacher_mix:
    (teacher, α), to sample each token from the mixture (1 - α) q(· | x, y_<t) + α p(· | x, y_<t)
    (MiniLLM, section 2.2). dtype: as in `precision`.
    Returns B token lists, with eos_token_id at the end of those that finished, and B lists of
    log-probabilities. Makes no collective calls. Raises InputError if request and response may
    exceed the model's positions.
    """
    device = model.wte.weight.device
    ids, lengths = data_rows.pad(requests, device)  # (B, S), (B,)
    n_prompt = 0 if P is None else len(P)
    decoder = Decoder(model, teacher_mix, n_prompt + lengths, max_new_tokens, dtype)
    text = torch.nn.functional.pad(ids, (0, max_new_tokens))  # (B, S + max_new_tokens)
    log_probs = torch.zeros(len(ids), max_new_tokens, device=device)
    finished = torch.zeros(len(ids), dtype=torch.bool, device=device)
    uniforms = None if uniforms is None else torch.as_tensor(uniforms, device=device)
    rows = torch.arange(len(ids), device=device)  # (b,), those still in the batch
    # dtype: of the blocks; logits are float32. packed_weights: a CPU layout, faster for few rows.
    with precision(device, dtype), packed_weights(*decoder.models):
        logits = decoder.prefill(ids, P, (rows, lengths - 1))  # (b, V)
        for i in range(max_new_tokens):
            ends = lengths[rows] + i  # (b,)
            if no_repeat_ngram:
                ban_repeated_ngrams(logits, text[rows], ends, no_repeat_ngram)
            u = None if uniforms is None else uniforms[rows, i]
            token, log_prob = sample_next_token(logits, u, temperature, top_k, top_p)  # (b,) each
            text[rows, ends] = token
            log_probs[rows, i] = log_prob
            finished[rows] |= token == eos_token_id
            if i + 1 == max_new_tokens:
                break
            # A finished row may go on until it is dropped; cut_responses removes the rest.
            if (i + 1) % CHECK_INTERVAL[device.type] == 0:
                alive = (~finished[rows]).nonzero().squeeze(-1)
                if len(alive) == 0:
                    break
                # Dropping rows copies the cache, which only a clearly smaller batch repays.
                if len(alive) <= 0.75 * len(rows):
                    rows, token = rows[alive], token[alive]
                    for cache in decoder.caches:
                        cache.select_rows(alive)
            logits = decoder.step(token[:, None])
    return cut_responses(text.tolist(), log_probs.tolist(), requests, i + 1, eos_token_id)


def sample_next_token(logits, u, temperature=1.0, top_k=0, top_p=1.0, on_gpu=None):
    """One token per row by inverse transform sampling, or the most likely one if u is None.

    logits (B, V), u (B,) in [0, 1) -> tokens (B,) and their log-probabilities (B,) under the
    distribution that they were drawn from. on_gpu: for tests; by default logits.is_cuda.
    """
    on_gpu = logits.is_cuda if on_gpu is None else on_gpu
    logits = logits.float()
    if u is not None and temperature != 1.0:
        logits = logits / temperature
    if top_k:
        least_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least_kept, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        is_out = probs.cumsum(-1) - probs >= top_p  # the more likely tokens suffice
        logits = logits.masked_fill(is_out.scatter(-1, order, is_out), -torch.inf)
    probs = logits.softmax(-1)  # (B, V)
    if u is None:
        tokens = probs.argmax(-1)
    else:
        cdf = probs.cumsum(-1)
        if on_gpu:
            # A GPU sums in parallel, so neighboring sums round differently: the CDF may decrease,
            # or increase at a token of probability 0, which could then be drawn.
            cdf = cdf.masked_fill(probs == 0, 0).cummax(-1).values
        # Rounding may leave the last sum below 1. Scaling u < 1 by it never points past the last
        # possible token; only the NaN of a diverged model needs the clamp.
        tokens = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, probs.gather(-1, tokens[:, None]).squeeze(-1).log()


def ban_repeated_ngrams(logits, text, ends, n):
    """Set logits (B, V) to -inf, in place, where a token would repeat an n-gram of the row's text.

    text: tokens (B, K), of which those before `ends` (B,) count.
    """
    starts = torch.arange(max(0, text.shape[1] - n + 1), device=text.device)  # (K - n + 1,)
    repeats = starts + n <= ends[:, None]  # (B, K - n + 1), of the n-grams at starts
    for i in range(n - 1):
        # Compare with the i-th of the row's last n - 1 tokens, (B, 1).
        current = text.gather(1, (ends[:, None] - n + 1 + i).clamp(min=0))
        repeats = repeats & (text[:, i : i + len(starts)] == current)
    limits = torch.where(repeats, -torch.inf, torch.inf).to(logits.dtype)
    # A token may end several n-grams. Any that repeats bans it, hence the minimum.
    logits.scatter_reduce_(1, text[:, n - 1 :], limits, "amin")


class Decoder:
    """Next-token logits of a model, or of its mixture with a teacher, with KV caches."""

    def __init__(self, model, teacher_mix, lengths, max_new_tokens, dtype):
        teacher, self.alpha = teacher_mix or (None, 0.0)
        self.models = [model] if teacher is None else [model, teacher]
        self.lengths = lengths  # (B,), of prompt and request
        longest = int(lengths.max())
        n_positions = min(m.config.n_positions for m in self.models)
        max_seq_len = longest + max_new_tokens - 1  # the last new token is never read
        if max_seq_len > n_positions:
            problem = f"{longest} tokens of prompt and request and {max_new_tokens} new ones exceed"
            raise InputError(f"{problem} the model's {n_positions} positions; shorten them")
        size = (len(lengths), max_seq_len)
        dtype = torch.bfloat16 if dtype == "bfloat16" else model.wte.weight.dtype
        self.caches = [KVCache(m.config, *size, lengths.device, dtype) for m in self.models]

    def prefill(self, ids, P, last):
        """Logits (B, V) of the first new tokens, from requests (B, S) after P (prompt_length, C).
        last: row and position of each request's last token, whose logits predict the next one."""
        logits = self.step(ids, prefix=P, output_positions=last)
        # Padding follows short requests in the cache. From here each row writes over it.
        for cache in self.caches:
            cache.set_lengths(self.lengths)
        return logits

    def step(self, ids, **kwargs):
        """Logits (b, V) of each row's next token. ids: new tokens (b, 1), or requests (prefill)."""
        # (b, 1, C), or (b, C) with output_positions
        hidden = [m(ids, cache=cache, **kwargs) for m, cache in zip(self.models, self.caches)]
        logits = [m.logits(h.view(len(ids), -1)) for m, h in zip(self.models, hidden)]
        if len(logits) == 1:
            return logits[0]
        q, p = (z.softmax(-1) for z in logits)  # (b, V) each
        return ((1 - self.alpha) * q + self.alpha * p).log()


def cut_responses(text, log_probs, requests, n_new, eos_token_id):
    """Responses and log-probabilities as lists, each up to the first end-of-text."""
    responses = [row[len(x) : len(x) + n_new] for row, x in zip(text, requests)]
    lengths = [y.index(eos_token_id) + 1 if eos_token_id in y else n_new for y in responses]
    responses = [y[:n] for y, n in zip(responses, lengths)]
    return responses, [values[:n] for values, n in zip(log_probs, lengths)]


def row_uniforms(n_tokens, *key):
    """The uniform numbers in [0, 1) that select a row's tokens, one per token.

    key: such as (seed, "rollout", step, row index), so the numbers do not depend on ranks,
    batch size or resuming. Samples may differ where another batch size rounds a logit differently.
    """
    seeds = [k if isinstance(k, int) else zlib.crc32(k.encode(errors="surrogatepass")) for k in key]
    return np.random.default_rng(seeds).random(n_tokens, dtype=np.float32)


def sample_all(
    model,
    requests,
    rng_keys,
    eos_token_id,
    max_new_tokens=data_rows.MAX_NEW_TOKENS,
    batch_size=None,
    greedy=False,
    label=None,
    **sampling_kwargs,
):
    """`sample` for any number of requests, in batches of similar length.

    rng_keys: the requests' keys for `row_uniforms`. label: of a progress bar, if not None. Returns
    responses and log-probabilities in the order of the requests.
    """
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i]))
    if batch_size is None:
        P, teacher_mix = (sampling_kwargs.get(name) for name in ("P", "teacher_mix"))
        longest = max(map(len, requests), default=0) + (0 if P is None else len(P))
        models = [model] if teacher_mix is None else [model, teacher_mix[0]]
        dtype = sampling_kwargs.get("dtype", "float32")
        batch_size = sampling_batch_size(models, len(requests), max_new_tokens, dtype, longest)
    responses, log_probs = [None] * len(requests), [None] * len(requests)
    disable = None if label and dist.rank() == 0 else True  # None: shown on a terminal only
    with tqdm(total=len(requests), desc=label, unit="row", leave=False, disable=disable) as bar:
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


def sampling_batch_size(models, n_rows, max_new_tokens, dtype, max_request=data_rows.MAX_REQUEST):
    """How many of n rows to sample at once: on a GPU, as many as fit in CACHE_SHARE of its total
    memory. The total, not what is free, so a resumed run has the same batch size and rounding."""
    device = models[0].wte.weight.device
    if device.type == "cpu":
        return CPU_BATCH_SIZE
    memory = torch.cuda.get_device_properties(device).total_memory
    max_seq_len = max_request + max_new_tokens
    row_bytes = sum(KVCache.row_bytes(m.config, max_seq_len, dtype) for m in models)
    return max(1, min(n_rows, int(CACHE_SHARE * memory) // row_bytes))


def sample_to_file(model, tokenizer, rows, key, path, max_new_tokens, dtype="float32"):
    """Write a model's responses to the training rows as JSON lines, SeqKD's data, by all ranks.

    `ids` has the sampled tokens, because text does not tell whether a response was cut off. An
    interrupted run resumes; `path` exists only when it is complete.
    """
    partial = path.with_name(f"{path.name}.partial")
    examples = data_rows.encode_training_rows(rows, tokenizer)
    n, eos_token_id = len(examples), tokenizer.eot_token
    batch_size = dist.world_size() * sampling_batch_size([model], n, max_new_tokens, dtype)
    n_done = dist.run_on_rank0(data_rows.count_complete_lines, partial)
    disable = None if dist.rank() == 0 else True
    with tqdm(total=n, initial=n_done, desc="sampling", unit="row", disable=disable) as bar:
        for start in range(n_done, n, batch_size):
            mine = dist.shard(examples[start : start + batch_size])
            xs, keys = [e.request for e in mine], [(*key, e.index) for e in mine]
            responses, _ = sample_all(model, xs, keys, eos_token_id, max_new_tokens, dtype=dtype)
            sampled = dist.all_gather_list([(e.index, y) for e, y in zip(mine, responses)])
            if dist.rank() == 0:
                with open(partial, "a", encoding="utf-8") as file:
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


def parse_args(argv):
    help = "Let a model respond to an instruction, or to a file of them."
    parser = ArgumentParser("sample.py", description=help)
    option = parser.add_argument
    help = "a run or checkpoint directory, an official name such as gpt2-xl, or a hub id owner/name"
    option("model", help=help)
    option("--instruction", help="one instruction")
    option("--input", default="", help="the context of the instruction")
    option("--file", help="JSON lines with 'instruction' and optionally 'input'")
    option("--prompt", metavar="FILE", help="a soft prompt: prompt.safetensors or its directory")
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
    rows = [data_rows.Row(0, args.instruction, args.input, ())]
    if args.file is not None:
        rows = data_rows.read_rows(args.file, needs_output=False)
    model, tokenizer = load_model(args.model, device)
    P = None if args.prompt is None else load_prompt(args.prompt, model.config.n_embd).to(device)
    requests, shortened = zip(*(data_rows.encode_request(row, tokenizer) for row in rows))
    if any(shortened):
        print(f"{sum(shortened)} of {len(rows)} requests were shortened to fit", file=sys.stderr)
    rng_keys = [(args.seed, "sample", row.index) for row in rows]
    names = ("max_new_tokens", "greedy", "temperature", "top_k", "top_p", "no_repeat_ngram")
    options = {name: getattr(args, name) for name in names}
    options |= {"P": P, "dtype": dtype, "label": "sampling"}
    responses, log_probs = sample_all(model, requests, rng_keys, tokenizer.eot_token, **options)
    for row, response, log_p in zip(rows, responses, log_probs):
        text = decode_response(response, tokenizer)
        if args.json:
            record = {"instruction": row.instruction, "input": row.input, "text": text}
            record |= {"ids": response, "log_probs": log_p}
            record["finished"] = response[-1] == tokenizer.eot_token
            print(json.dumps(record))
        else:
            print(text if len(rows) == 1 else f"### {row.instruction}\n{text}\n")


if __name__ == "__main__":
    run_command_line(main)
