"""Whole stages trained twice, by the fast forms and by plain ones: losses, gradient norms, responses and weights must be the same.

Fast are the losses, a block of tokens at a time with gradients made on the spot; packed weights; and the sampling of a
ragged batch with a KV cache, which drops rows as they end. The plain forms are written out here, with no thought of speed or memory.
"""

import pytest
import torch
from helpers import write_checkpoint
from safetensors.torch import load_file
from test_train import CPU, TOKENIZER, metrics, world  # noqa: F401  (a fixture)

import data.prepare
import losses
import train
from model import Config

UNLIKE = (
    "tokens_per_second",
    "seconds",
    "memory_resident_gb",
)  # of a metrics line: hang on the clock and the machine
V = TOKENIZER.n_vocab


# ---- the plain forms ------------------------------------------------------------------------------------------------------------------


def plain_sum_over_tokens(loss_fn, hidden, head, *targets):
    with torch.no_grad():
        of_targets = [h @ w.T for h, w in targets]  # (N, V) each
    return loss_fn(slice(0, len(hidden)), hidden @ head.T, *of_targets).sum(-1)


@torch.no_grad()
def plain_token_log_probs(hidden, head, tokens):
    return (hidden @ head.T).log_softmax(-1)[torch.arange(len(tokens)), tokens]


def plain_kls(first, *others):
    log_p = first.log_softmax(-1)
    return torch.stack(
        [(log_p.exp() * (log_p - other.log_softmax(-1))).sum(-1) for other in others]
    )


def plain_prompt_loss(p_prompted, q, p_bare, lam, reg_weight, *directions):
    """Both KLs are reverse, as in the demo."""
    L_kd, L_reg = losses.kl(p_prompted, q), losses.kl(p_prompted, p_bare)
    return L_kd + reg_weight * lam * L_reg, L_kd, L_reg


def next_probs(model, ids):
    """The distribution (V,) of the token behind these."""
    return model.logits(model(torch.tensor([ids])))[0, -1].softmax(-1)


@torch.no_grad()
def plain_sample(model, requests, uniforms, end, max_new_tokens, teacher_mix=None, dtype="float32"):
    """One row after the other, and all of the row anew for each token."""
    responses, log_probs = [], []
    for request, u in zip(requests, uniforms):
        response, log_p = [], []
        while len(response) < max_new_tokens and end not in response:
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
    patch.setattr("train.token_log_probs", plain_token_log_probs)
    patch.setattr("train.prompt_loss", plain_prompt_loss)
    patch.setattr("losses.kls", plain_kls)
    patch.setattr("sample.sample", plain_sample)
    for name in (
        "losses._SumOverTokens",
        "losses._KL",
        "losses.head_logits",
        "sample.KVCache",
        "sample.packed_weights",
    ):
        patch.setattr(name, None)  # whatever still came to a fast form would fail


def use_small_blocks(patch):
    """A chunk is 30 tokens at most and a block 8, so that a micro-batch takes several of both, as with a large vocabulary."""
    patch.setitem(losses.CHUNK_BYTES, "cpu", 30 * 4 * V)
    patch.setitem(losses.BLOCK_BYTES, "cpu", 8 * 4 * V)


# ---- both on the demo's data ------------------------------------------------------------------------------------------------------------


def train_stage(out, name, method, micro_batch_size=4, **values):
    """A stage with the demo's preset, made small; validated at the end alone, so that its best weights are its last. Returns its directory."""
    preset = train.DEMO[train.DEMO_STUDENT if method == "pretrain" else method]
    small = {
        "data": "demo",
        "global_batch_size": 8,
        "steps": 8,
        "eval_interval": 100,
        "warmup_steps": 8,
        "dropout": 0.0,
        "max_dev_rows": 4,
        "max_new_tokens": 16,
    }
    train.run_stage(
        name,
        train.Settings(**{"method": method, **preset, **small, **values}),
        out,
        micro_batch_size,
        CPU,
    )
    return out / name


@pytest.fixture(scope="module")
def student_and_teacher(tmp_path_factory, world):
    """Models that have learnt how long responses are, so that rows end at different tokens. The teacher is just wide enough for its
    weights to be packed."""
    out, directories = tmp_path_factory.mktemp("models"), []
    for name, config in {"student": Config(2, 32, 4, V), "teacher": Config(1, 384, 6, V)}.items():
        start = write_checkpoint(out / "start" / name, config, TOKENIZER)
        directories.append(
            str(train_stage(out, name, "sft", student=str(start), steps=30, metric_for_best="loss"))
        )
    return directories


def trained_weights(directory):
    """All weights of student and prompt by name, but the keys' biases: these change no attention weight, so their gradient is rounding
    alone, which AdamW scales up to full steps."""
    weights = {}
    for path in (directory / "best").glob("*.safetensors"):
        weights |= load_file(path)
    for name, w in weights.items():
        if name.endswith("c_attn.bias"):
            queries, keys, values = w.chunk(3)
            weights[name] = torch.cat([queries, values])
    return weights


@pytest.mark.parametrize("method", ["pretrain", "sft", "kd", "promptkd", "gkd", "minillm"])
def test_fast_forms_train_as_plain_ones_do(tmp_path, student_and_teacher, method):
    """In micro-batches by the fast forms, the whole batch at once by the plain ones."""
    student, teacher = student_and_teacher
    text = str(data.prepare.HOME / "demo" / "pretrain.jsonl")
    values = {
        "pretrain": {"student": "2x32x4"},
        "sft": {"student": student},
        "kd": {"student": student, "teacher": teacher},
        "promptkd": {
            "student": student,
            "teacher": teacher,
            "prompt_lr": 2e-3,
        },  # as far as the student moves
        "gkd": {"student": student, "teacher": teacher},
        "minillm": {
            "student": student,
            "teacher": teacher,
            "rollout_size": 16,
            "inner_epochs": 2,
            "lm_data": text,
        },  # two rollouts of four steps
    }[method]
    with pytest.MonkeyPatch.context() as patch:
        use_small_blocks(patch)
        fast = train_stage(tmp_path, "fast", method, **values)
    with pytest.MonkeyPatch.context() as patch:
        use_plain_forms(patch)
        plain = train_stage(tmp_path, "plain", method, micro_batch_size=16, **values)

    # Ten times what rounding was seen to make: 2e-6 of a loss or norm; in the weights 6e-6, as AdamW scales up what is rounded.
    for a, b in zip(metrics(fast), metrics(plain), strict=True):
        assert a.get("response_tokens") == b.get("response_tokens")
        assert {k: v for k, v in a.items() if k not in UNLIKE} == pytest.approx(
            {k: v for k, v in b.items() if k not in UNLIKE}, rel=2e-5, abs=1e-8
        )
    found, wanted = trained_weights(fast), trained_weights(plain)
    assert found.keys() == wanted.keys()
    for name, w in found.items():
        assert w.allclose(wanted[name], rtol=0, atol=6e-5), name
