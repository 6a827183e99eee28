"""Sampling of one batch with a key-value cache: mixture, filters, bans, random numbers.
`python sample.py MODEL` lets a model respond."""

if __name__ == "__main__":
    import os.path
    import sys

    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # before another `data`
    import data.process.threads  # noqa: F401  (must precede torch: it sets how threads wait)

import zlib

import numpy as np
import torch

from model import KVCache, precision
from prompt import prepend


@torch.no_grad()
def sample(
    model,
    requests,
    uniforms,
    eos_token_id,
    max_new_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    no_repeat_ngram=None,
    P=None,
    teacher_mix=None,
    dtype="float32",
):
    """Responses y ~ q(· | x) of a model q to B requests of any lengths, decoded together.

    requests: lists of token ids. uniforms: random numbers (B, max_new_tokens) from `row_uniforms`,
    or None for greedy decoding. no_repeat_ngram: n of the n-grams that may not repeat, 0 or None
    for no ban. P: a soft prompt (prompt_length, C) before every request; not together with
    teacher_mix. teacher_mix: (teacher, α), to sample each token from the mixture
    (1 - α) q(· | x, y_<t) + α p(· | x, y_<t) (MiniLLM, section 2.2). dtype: as in `precision`.
    Returns B token lists, with eos_token_id at the end of those that finished, and B lists of
    log-probabilities (see `sample_next_token`). Makes no collective calls, and changes no mode:
    call model.eval() before. Raises ValueError if a row may exceed the model's positions.
    """
    if P is not None and teacher_mix is not None:
        raise ValueError("a soft prompt P can't be combined with teacher_mix")
    device, prompt_length = model.wte.weight.device, 0 if P is None else len(P)
    ids, lengths = pad(requests, device)  # (B, T), (B,)
    decoder = Decoder(model, teacher_mix, prompt_length + lengths, max_new_tokens, dtype)
    text = torch.nn.functional.pad(ids, (0, max_new_tokens))  # (B, T + max_new_tokens)
    log_probs = torch.zeros(len(ids), max_new_tokens, device=device)
    finished = torch.zeros(len(ids), dtype=torch.bool, device=device)
    uniforms = None if uniforms is None else torch.as_tensor(uniforms, device=device)
    rows = torch.arange(len(ids), device=device)  # (b,), those still in the batch
    with precision(device, dtype):  # of the blocks; logits are float32
        logits = decoder.prefill(ids if P is None else prepend(P, model, ids))  # (b, V)
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
            # A finished row may continue until it is dropped; cut_responses removes the rest.
            if (i + 1) % check_interval(device) == 0:
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


def pad(lists, device, fill=0):
    """Lists of token ids as a right-padded tensor (B, T), and their lengths (B,)."""
    lengths = torch.tensor([len(tokens) for tokens in lists])
    ids = torch.full((len(lists), int(lengths.max())), fill)
    for row, tokens in zip(ids, lists):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids.to(device), lengths.to(device)


def check_interval(device):
    """Tokens between two checks for finished rows. On a GPU each check makes the host wait."""
    return 1 if device.type == "cpu" else 8


def sample_next_token(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """One token per row by inverse transform sampling, or the most likely one if u is None.

    logits (B, V), u (B,) in [0, 1) -> tokens (B,) and their log-probabilities (B,) under the
    distribution that they were drawn from: after temperature, filters, bans and mixture.
    """
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
        if not logits.is_cpu:
            cdf = make_monotonic(cdf, probs)
        # Rounding may leave the last sum below 1. Scaling u < 1 by it never points past the last
        # possible token; only the NaN of a diverged model needs the clamp.
        tokens = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, probs.gather(-1, tokens[:, None]).squeeze(-1).log()


def make_monotonic(cdf, probs):
    """The CDF (B, V) of probs (B, V), corrected where a GPU's rounding broke it.

    A GPU sums in parallel, so neighboring sums round differently: the CDF may decrease, or increase
    at a token of probability 0, which could then be drawn.
    """
    return cdf.masked_fill(probs == 0, 0).cummax(-1).values


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
            tokens = f"{longest} tokens of prompt and request and {max_new_tokens} new ones"
            raise ValueError(f"{tokens} exceed the model's {n_positions} positions")
        size = (len(lengths), max_seq_len)
        dtype = torch.bfloat16 if dtype == "bfloat16" else model.wte.weight.dtype
        self.caches = [KVCache(m.config, *size, lengths.device, dtype) for m in self.models]

    def prefill(self, inputs):
        """Logits (B, V) of the first new tokens. inputs: right-padded requests, ids (B, T), or
        embeddings (B, prompt_length + T, C) with a soft prompt before them."""
        # The logits at the last token of a request predict the next one.
        last = (torch.arange(len(inputs), device=inputs.device), self.lengths - 1)
        logits = self.step(inputs, output_positions=last)
        # Padding follows short requests in the cache. From here each row writes over it.
        for cache in self.caches:
            cache.set_lengths(self.lengths)
        return logits

    def step(self, inputs, output_positions=None):
        """Logits (b, V) of each row's next token. inputs: new tokens (b, 1); or see prefill."""
        logits = []  # (b, V) each
        for model, cache in zip(self.models, self.caches):
            hidden = model(inputs, cache=cache, output_positions=output_positions)
            logits.append(model.logits(hidden.view(len(inputs), -1)))  # (b, 1, C) or (b, C)
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


if __name__ == "__main__":
    from data.models.sampling import main
    from data.process.command_line import run_command_line

    run_command_line(main)
