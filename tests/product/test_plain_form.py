"""Whole stages trained twice, with the fast forms and with plain ones. Losses, gradient norms,
responses and weights must be equal.

The fast forms are the losses, computed block by block with gradients on the spot; packed weights;
and sampling of a ragged batch with a KV cache, which drops finished rows. The plain forms are
written out here without regard for speed or memory.
"""

from contextlib import nullcontext

import pytest
import torch
from helpers import write_checkpoint
from safetensors.torch import load_file
from test_train import CPU, TOKENIZER, UNLIKE, metrics, world  # noqa: F401  (a fixture)

import data.sets.prepare
import train
from data.runs.methods import METHODS, preset
from model import Config

V = TOKENIZER.n_vocab


def plain_sum_over_tokens(loss_fn, trained, *others, **per_token):
    with torch.no_grad():
        other_logits = [hidden @ head.T for hidden, head in others]  # (N, V) each
    hidden, head = trained
    return loss_fn(hidden @ head.T, *other_logits, **per_token).sum(-1)


@torch.no_grad()
def plain_token_log_probs(hidden, head, tokens):
    return (hidden @ head.T).log_softmax(-1)[torch.arange(len(tokens)), tokens]


def plain_kl(a_logits, b_logits):
    log_ratio = a_logits.log_softmax(-1) - b_logits.log_softmax(-1)
    return (a_logits.softmax(-1) * log_ratio).sum(-1)


def plain_prompt_loss(p_prompted, q, p_bare, lam, reg_weight, prompt_kl, reg_kl):
    """Both KLs are reverse, as in the demo."""
    L_kd, L_reg = plain_kl(p_prompted, q), plain_kl(p_prompted, p_bare)
    return torch.stack([L_kd + reg_weight * lam * L_reg, L_kd, L_reg, L_reg])


def next_probs(model, ids):
    """The distribution (V,) of the next token."""
    return model.logits(model(torch.tensor([ids])))[0, -1].softmax(-1)


@torch.no_grad()
def plain_sample(model, requests, uniforms, eos, max_new_tokens, teacher_mix=None, dtype="float32"):
    """Row by row, with a forward pass over the whole row for each token."""
    responses, log_probs = [], []
    for request, u in zip(requests, uniforms, strict=True):
        response, log_p = [], []
        while len(response) < max_new_tokens and eos not in response:
            probs = next_probs(model, request + response)
            if teacher_mix is not None:
                teacher, alpha = teacher_mix
                probs = (1 - alpha) * probs + alpha * next_probs(teacher, request + response)
            cdf = probs.cumsum(0)
            token = int((cdf > u[len(response)] * cdf[-1]).nonzero()[0])
            response.append(token)
            log_p.append(float(probs[token].log()))
        responses.append(response)
        log_probs.append(log_p)
    return responses, log_probs


def use_plain_forms(patch):
    patch.setattr("train.sum_over_tokens", plain_sum_over_tokens)
    patch.setattr("losses.token_log_probs", plain_token_log_probs)
    patch.setattr("data.runs.validation.token_log_probs", plain_token_log_probs)
    patch.setattr("losses.prompt_loss", plain_prompt_loss)
    patch.setattr("losses.kl", plain_kl)
    patch.setattr("data.models.sampling.sample", plain_sample)
    patch.setattr("data.models.sampling.packed_weights", lambda models, dtype: nullcontext())
    fast_forms = ("losses._SumOverTokens", "losses.aligned_logits")
    for name in (*fast_forms, "sample.KVCache", "data.process.packed.packed_linear"):
        patch.setattr(name, None)  # so that any use of it fails


def use_small_blocks(patch):
    """Chunks of at most 30 tokens and blocks of 8: a micro-batch has several of both, as with a
    large vocabulary."""
    patch.setattr("losses.CPU_CHUNK_BYTES", 30 * 4 * V)
    patch.setattr("losses.CPU_BLOCK_BYTES", 8 * 4 * V)


def train_stage(out, name, method, micro_batch_tokens=300, **values):
    """Train a small stage with the demo's preset and return its directory. It is validated at the
    end only, so that its best weights are its last."""
    small = {
        "data": "demo",
        "global_batch_size": 8,
        "steps": 4,
        "eval_interval": 100,
        "warmup_steps": 4,
        "dropout": 0.0,
        "max_dev_rows": 4,
        "max_new_tokens": 16,
    }
    settings = {"method": method, **preset(method, "demo"), **small, **values}
    train.run_stage(name, train.Settings(**settings), out, micro_batch_tokens, CPU)
    return out / name


@pytest.fixture(scope="module")
def student_and_teacher(tmp_path_factory, world):  # noqa: F811
    """Models that have learned how long responses are, so that rows end at different tokens. The
    teacher is just wide enough for its weights to be packed."""
    out = tmp_path_factory.mktemp("models")
    configs = {"student": Config(2, 32, 4, V), "teacher": Config(1, 384, 6, V)}
    directories = []
    for name, config in configs.items():
        start = str(write_checkpoint(out / "start" / name, config, TOKENIZER))
        how = {"student": start, "steps": 30, "metric_for_best": "loss"}
        directories.append(str(train_stage(out, name, "sft", **how)))
    return directories


def trained_weights(directory):
    """The weights of student and prompt by name, without the biases of keys: these change no
    attention weight, so their gradient is rounding only, which AdamW scales up to full steps."""
    weights = {}
    for path in (directory / "best").glob("*.safetensors"):
        weights |= load_file(path)
    for name, w in weights.items():
        if name.endswith("c_attn.bias"):
            queries, keys, values = w.chunk(3)
            weights[name] = torch.cat([queries, values])
    return weights


@pytest.mark.parametrize("method", [method for method in METHODS if method != "seqkd"])
def test_fast_forms_train_like_plain_ones(tmp_path, student_and_teacher, method):
    """The fast forms in micro-batches, the plain ones on the whole batch at once."""
    student, teacher = student_and_teacher
    values = {"student": "2x32x4" if method == "pretrain" else student}
    if METHODS[method].needs_teacher:
        values["teacher"] = teacher
    if method == "promptkd":
        values["prompt_lr"] = 2e-3  # so that the prompt moves as far as the student
    if method == "minillm":  # two rollouts of four steps
        text = str(data.sets.prepare.DATA_DIR / "demo" / "pretrain.jsonl")
        values |= {"rollout_size": 8, "global_batch_size": 4, "inner_epochs": 2, "lm_data": text}
        values["steps"] = 8
    with pytest.MonkeyPatch.context() as patch:
        use_small_blocks(patch)
        fast = train_stage(tmp_path, "fast", method, **values)
    with pytest.MonkeyPatch.context() as patch:
        use_plain_forms(patch)
        plain = train_stage(tmp_path, "plain", method, micro_batch_tokens=10_000, **values)

    # Ten times the rounding that was observed: 2e-6 of a loss or norm, and 6e-6 in the weights, as
    # AdamW scales it up.
    for a, b in zip(metrics(fast), metrics(plain), strict=True):
        assert a.get("response_tokens") == b.get("response_tokens")
        a, b = ({k: v for k, v in line.items() if k not in UNLIKE} for line in (a, b))
        assert a == pytest.approx(b, rel=2e-5, abs=1e-8)
    weights, expected = trained_weights(fast), trained_weights(plain)
    assert weights.keys() == expected.keys()
    for name, w in weights.items():
        assert w.allclose(expected[name], rtol=0, atol=6e-5), name
