"""Forced sampling, and a plain re-statement of the released recipe, for bench.py.

The recipe works on two rows at a time, padded to the limits, with logits at all positions. It runs
on this project's GPT-2 or on Hugging Face's.
"""

import time
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import sample
import train
from data.models import sampling
from model import TRANSPOSED, KVCache, precision
from prompt import prepend
from sample import pad


def token_table(responses, max_new_tokens, eos_token_id, device):
    """Responses as one tensor (B, max_new_tokens), padded with end-of-text."""
    rows = [[*row, *[eos_token_id] * (max_new_tokens - len(row))] for row in responses]
    return pad(rows, device)[0]


@contextmanager
def force_responses(responses, max_new_tokens, eos_token_id, device):
    """Let `sample_all` do all its work, but generate these responses, {row index: tokens}.

    The uniform numbers of a row are replaced by numbers that are unique to row and step, so that
    they identify the token to return.
    """
    tokens = token_table(responses.values(), max_new_tokens, eos_token_id, device).flatten()
    slots = {index: i for i, index in enumerate(responses)}
    sample_next_token = sample.sample_next_token

    def row_uniforms(n_tokens, *key):
        positions = slots[key[-1]] * max_new_tokens + np.arange(n_tokens)
        return ((positions + 0.5) / len(tokens)).astype(np.float32)

    def forced_next_token(logits, u, *args, **kwargs):
        _, log_probs = sample_next_token(logits, u, *args, **kwargs)
        return tokens[(u * len(tokens)).long()], log_probs

    uniforms = patch.object(sampling, "row_uniforms", row_uniforms)
    with uniforms, patch.object(sample, "sample_next_token", forced_next_token):
        yield


def cut_after_eos(rows, eos_token_id):
    """Token lists, each cut after its first end-of-text."""
    return [row[: row.index(eos_token_id) + 1] if eos_token_id in row else row for row in rows]


@torch.no_grad()
def plain_sample(model, requests, forced, max_request, eos_token_id):
    """Sample with torch.multinomial until the last row has finished, and drop none before.

    requests: B token lists, padded to max_request. forced: (B, max_new_tokens), the tokens that
    replace the sampled ones. Returns B token lists.
    """
    B, max_new_tokens = forced.shape
    device = forced.device
    ids, lengths = pad(requests, device)
    ids = F.pad(ids, (0, max_request - ids.shape[1]))  # (B, max_request)
    dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
    cache = KVCache(model.config, B, max_request + max_new_tokens, device, dtype)
    hidden = model(ids, cache=cache)[torch.arange(B, device=device), lengths - 1]  # (B, C)
    cache.set_lengths(lengths)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        torch.multinomial(model.logits(hidden).float().softmax(-1), 1)
        finished |= forced[:, t] == eos_token_id
        if t + 1 == max_new_tokens or finished.all():
            break
        hidden = model(forced[:, t, None], cache=cache)[:, 0]
    return cut_after_eos(forced[:, : t + 1].tolist(), eos_token_id)


def plain_logits(model, ids, mask, P=None):
    """Logits (B, T, V) at all positions of ids (B, T); in bfloat16 inside autocast.

    mask (B, T) is not needed: the padding is on the right, where causal attention never looks.
    """
    hidden = model(ids) if P is None else model(prepend(P, model, ids))[:, len(P) :]  # (B, T, C)
    return F.linear(hidden, model.head)


def plain_kl(first, second, is_response):
    """KL(first || second) of logits (B, T, V), in float32; the mean over is_response (B, T)."""
    log_first = first.float().log_softmax(-1)
    log_second = second.float().log_softmax(-1)
    kl = (log_first.exp() * (log_first - log_second)).sum(-1)  # (B, T)
    return (kl * is_response).sum() / is_response.sum()


def recipe_step(run, case, examples, t, logits=plain_logits, sampler=plain_sample):
    """One iteration as released, with gradients accumulated over micro-batches of two rows.

    Each micro-batch is sampled and scored before the next one. Prompt and student are updated at
    the last one, so the others distil from the prompt of the previous iteration.

    logits, sampler: of this project's GPT-2 or of Hugging Face's. Returns the mean losses of the
    micro-batches.
    """
    q, p = run.student, run.teacher
    eos_token_id = case["vocab"] - 1
    lam = 1 - t / run.total_steps
    pairs = [examples[i : i + 2] for i in range(0, len(examples), 2)]
    losses = {"prompt_loss": 0.0, "loss": 0.0}
    for pair in pairs:
        with precision(run.device, run.settings.dtype):
            q.eval()
            wanted = [e.response for e in pair]
            forced = token_table(wanted, case["max_new_tokens"], eos_token_id, run.device)
            requests = [e.request for e in pair]
            responses = sampler(q, requests, forced, case["request"], eos_token_id)
            add_time(run, "sampling")

            rows = [replace(e, response=y) for e, y in zip(pair, responses)]
            ids, mask, is_response = pad_to_limits(rows, case, run.device)
            L_P = recipe_prompt_loss(q, p, run.P, ids, mask, is_response, lam, logits) / len(pairs)
            L_P.backward()
            if pair is pairs[-1]:
                train.clip_and_step(run.prompt_optimizer)
            add_time(run, "prompt")

            with torch.no_grad():
                pP_logits = logits(p, ids, mask, run.P)
            L_theta = plain_kl(logits(q.train(), ids, mask), pP_logits, is_response) / len(pairs)
            L_theta.backward()
            if pair is pairs[-1]:
                train.clip_and_step(run.optimizer)
            losses["prompt_loss"] += L_P.item()
            losses["loss"] += L_theta.item()
            del pP_logits, L_P, L_theta
            add_time(run, "student")
    return losses


def recipe_prompt_loss(q, p, P, ids, mask, is_response, lam, logits):
    """Equations 1 to 3 from logits at all positions."""
    with torch.no_grad():
        q_logits = logits(q, ids, mask)
        p_logits = logits(p, ids, mask)
    pP_logits = logits(p, ids, mask, P)
    L_kd = plain_kl(pP_logits, q_logits, is_response)
    return L_kd + lam * plain_kl(pP_logits, p_logits, is_response)


def pad_to_limits(examples, case, device):
    """Rows of request and response, right-padded to the limits.

    Returns token ids, the attention mask, and whether a position predicts a response token; each
    (B, request + max_new_tokens).
    """
    T = case["request"] + case["max_new_tokens"]
    rows = [[*e.request, *e.response] for e in examples]
    ids, lengths = pad([[*row, *[0] * (T - len(row))] for row in rows], device)
    lengths = torch.tensor([[len(row)] for row in rows], device=device)
    starts = torch.tensor([[len(e.request) - 1] for e in examples], device=device)
    positions = torch.arange(T, device=device)
    is_response = (positions >= starts) & (positions < lengths - 1)
    return ids, (positions < lengths).long(), is_response


def add_time(run, phase):
    """Add the seconds since the last call to a phase."""
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    now = time.perf_counter()
    run.seconds[phase] = run.seconds.get(phase, 0.0) + now - run.phase_start
    run.phase_start = now


# ---- the same on Hugging Face's GPT-2 ------------------------------------------------------------


def to_hf(model):
    """transformers' GPT-2 with the weights of ours."""
    from transformers import GPT2Config, GPT2LMHeadModel

    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    values = {name: getattr(model.config, name) for name in names}
    values |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.config.dropout)
    hf = GPT2LMHeadModel(GPT2Config(**values, bos_token_id=None, eos_token_id=None))
    weights = model.state_dict().items()
    hf.transformer.load_state_dict({k: w.T if k.endswith(TRANSPOSED) else w for k, w in weights})
    hf.to(model.h[0].attn.c_attn.weight)
    return hf.train(model.training).requires_grad_(model.wte.weight.requires_grad)


def hf_logits(model, ids, mask, P=None):
    """`plain_logits` of transformers' GPT-2, with the prompt as embeddings, as in peft."""
    x = model.transformer.wte(ids)
    if P is not None:
        x = torch.cat([P.to(x.dtype).expand(len(ids), -1, -1), x], dim=1)
        mask = F.pad(mask, (len(P), 0), value=1)
    logits = model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits
    return logits if P is None else logits[:, len(P) :]


@torch.no_grad()
def hf_sample(model, requests, forced, max_request, eos_token_id):
    """`plain_sample` by transformers' `generate`, which expects the padding on the left."""
    gaps = [max_request - len(request) for request in requests]
    padded = [[eos_token_id] * gap + request for gap, request in zip(gaps, requests)]
    masks = [[0] * gap + [1] * (max_request - gap) for gap in gaps]

    def force(ids, scores):
        """Make all tokens but the forced one impossible, and sample from that."""
        token = forced[:, ids.shape[1] - max_request, None]
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    ids = model.generate(
        torch.tensor(padded, device=forced.device),
        attention_mask=torch.tensor(masks, device=forced.device),
        logits_processor=[force],
        do_sample=True,
        top_k=0,
        max_new_tokens=forced.shape[1],
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    return cut_after_eos(ids[:, max_request:].tolist(), eos_token_id)
