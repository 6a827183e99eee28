"""Precision: logits with a large common offset, the GPU's form of the products on a CPU, bfloat16
in every method and command, and sampling that suits a GPU.

A GPU rounds the inputs of a float32 product to TF32. `TF32` does that to the products of a CPU.
"""

import functools
import json
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    PROMPT,
    call_command,
    interrupted_in_step,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    write_checkpoint,
    write_rows,
)
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import exposure_bias
import losses
import model
import sample
import train
from data.models import sampling
from data.process import dist
from data.process.errors import InputError
from data.runs.methods import METHODS, Settings
from data.runs.optim import adamw, set_learning_rate
from data.sets.rows import Example, micro_batches
from model import GPT, Config, head_logits, precision
from prompt import freeze, response_hidden

CPU = torch.device("cpu")
OFFSET = -112.0


class TF32(TorchDispatchMode):
    """Float32 products round their inputs to 10 bits of mantissa, as a GPU's tensor cores do."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.removeprefix("aten::")
        if name in ("mm", "addmm", "addmm_", "bmm"):
            first = 1 if "addmm" in name else 0
            rounded = [self.rounded(x) for x in arguments[first : first + 2]]
            arguments = (*arguments[:first], *rounded, *arguments[first + 2 :])
        return function(*arguments, **(options or {}))

    @staticmethod
    def rounded(x):
        if x.dtype != torch.float32:
            return x
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def test_tf32_keeps_ten_bits():
    with TF32():
        product = torch.tensor([[1 + 2**-10, 1 + 2**-12]]) @ torch.eye(2)
    assert product.tolist() == [[1 + 2**-10, 1.0]]


@contextmanager
def as_on_gpu():
    """Within it, the core computes as on a GPU, because tensors are not said to be on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cpu", False)
        yield


@pytest.fixture
def gpu_form():
    with as_on_gpu():
        yield


def bfloat16_head(hidden, head):
    """What autocast would do to the head, an error that the tests must be able to detect."""
    return F.linear(hidden.bfloat16(), head.bfloat16()).float()


@pytest.fixture
def bfloat16_form(monkeypatch):
    monkeypatch.setattr(model, "head_logits", bfloat16_head)
    monkeypatch.setattr(losses, "aligned_logits", bfloat16_head)


# --- Logits with an offset ---


@pytest.mark.parametrize("logits_of", [head_logits, losses.aligned_logits])
@pytest.mark.parametrize("form", [nullcontext, as_on_gpu])
def test_logits_are_float32_products_inside_autocast(form, logits_of):
    hidden, head = torch.randn(5, 64), torch.randn(100, 64)
    with precision(CPU, "bfloat16"), form():
        logits = logits_of(hidden, head)
    assert logits.dtype == torch.float32
    assert (logits[:, :100] - hidden @ head.T).abs().max() < 1e-4


@pytest.mark.parametrize("autocast", ["float32", "bfloat16"])
def test_logits_of_bfloat16_tensors_are_float32_products(autocast):
    hidden, head = torch.randn(5, 64).bfloat16(), torch.randn(100, 64).bfloat16()
    with precision(CPU, autocast):
        logits = head_logits(hidden, head)
    assert logits.dtype == torch.float32
    assert (logits - hidden.float() @ head.float().T).abs().max() < 1e-4


def make_examples(response_lengths, seed=2):
    """Examples of random tokens below 999, the end-of-text."""
    rng = np.random.default_rng(seed)
    return [
        Example(i, rng.integers(0, 999, 3 + 2 * i).tolist(), rng.integers(0, 999, n).tolist())
        for i, n in enumerate(response_lengths)
    ]


def make_model_with_offset(seed, offset):
    """A GPT whose logits all have an offset.

    Dimension 0 of every embedding, which is also the head, is -7. The last LayerNorm puts a
    constant into dimension 0, and the head multiplies it by -7. Both numbers are exact in bfloat16.
    """
    gpt = GPT(Config(2, 64, 4, 1000, 128, dropout=0.0)).init_weights(seed)
    with torch.no_grad():
        gpt.wte.weight[:, 0] = -7.0
        gpt.ln_f.weight.mul_(2)  # so that distributions are not flat
        gpt.ln_f.weight[0] = 0.0
        gpt.ln_f.bias[0] = offset / -7.0
    return gpt.eval()


def exact_results(batch, offset):
    """KL(q || p), log-probabilities and the student's gradient in float64."""
    q, p = (make_model_with_offset(seed, offset).double() for seed in (1, 2))
    log_q, log_p = (
        (m(batch.ids, output_positions=batch.response_positions) @ m.wte.weight.T).log_softmax(-1)
        for m in (q, p)
    )
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    kl.mean().backward()
    log_probs = log_q.gather(1, batch.targets[:, None])[:, 0]
    return kl.detach(), log_probs.detach(), gradient_of(q)


def results_in(batch, offset, dtype):
    """The same by the product's code, with the blocks in `dtype`."""
    q, p = (make_model_with_offset(seed, offset) for seed in (1, 2))
    with precision(CPU, dtype):
        student, teacher = response_hidden(q, batch), response_hidden(freeze(p, dtype), batch)
        kl = losses.kl(q.logits(student[0]), p.logits(teacher[0])).detach()
        log_probs = losses.token_log_probs(*student, batch.targets)
        loss = losses.sum_over_tokens(losses.student_loss, student, teacher) / len(kl)
    loss.backward()
    return kl.double(), log_probs.double(), gradient_of(q)


def gradient_of(student):
    gradients = [w.grad.flatten() for w in student.parameters() if w.grad is not None]
    return torch.cat(gradients).double()


def model_errors(offset, dtype):
    """Errors against float64 of the KL, the log-probabilities and the student's gradient."""
    [batch] = micro_batches(make_examples((9, 3, 12, 30, 7, 20, 40, 11)), 440, CPU)
    kl, log_probs, gradient = results_in(batch, offset, dtype)
    exact_kl, exact_log_probs, exact_gradient = exact_results(batch, offset)
    return {
        "KL": float((kl - exact_kl).abs().mean()),
        "log-probability": float((log_probs - exact_log_probs).abs().mean()),
        "gradient": float((gradient - exact_gradient).norm() / exact_gradient.norm()),
    }


def sampled_tokens(offset, dtype):
    rng = np.random.default_rng(3)
    requests = [rng.integers(0, 999, rng.integers(3, 20)).tolist() for _ in range(40)]
    keys = [(10, "offset", n) for n in range(len(requests))]
    return sampling.sample_all(
        make_model_with_offset(1, offset), requests, keys, 999, 12, dtype=dtype
    )[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_offset_in_one_dimension_costs_no_precision(gpu_form, dtype):
    with TF32():
        plain, shifted = (model_errors(offset, dtype) for offset in (0.0, OFFSET))
        tokens = [sampled_tokens(offset, dtype) for offset in (0.0, OFFSET)]
    print({"dtype": dtype, "plain": plain, "shifted": shifted})
    for kind, error in shifted.items():
        assert error <= 1.5 * plain[kind], kind
    assert tokens[0] == tokens[1]


def test_a_bfloat16_head_fails_with_an_offset(bfloat16_form):
    """The test above can fail."""
    plain, shifted = (model_errors(offset, "bfloat16") for offset in (0.0, OFFSET))
    print({"bfloat16 head": True, "plain": plain, "shifted": shifted})
    assert any(error > 1.5 * plain[kind] for kind, error in shifted.items())
    assert sampled_tokens(0.0, "bfloat16") != sampled_tokens(OFFSET, "bfloat16")


def gpt2_sized_logits(offset, n_tokens=16, width=768, vocab_size=50_257):
    """Hidden states (N, C) and heads (V, C) of student and teacher.

    Their logits have a standard deviation of about 4 (an entropy of 4 nats) and the given offset,
    which is spread over all dimensions.
    """
    rng = torch.Generator().manual_seed(7)
    direction = torch.randint(0, 2, (width,), generator=rng) * 2.0 - 1  # (C,)

    def orthogonal(x):
        """The part of x (..., C) that is orthogonal to the direction, which has the offset."""
        return x - (x @ direction / width)[..., None] * direction

    h_p = orthogonal(torch.randn(n_tokens, width, generator=rng))
    h_q = orthogonal(h_p + 0.3 * torch.randn(n_tokens, width, generator=rng))
    w_p = orthogonal(4 / width**0.5 * torch.randn(vocab_size, width, generator=rng))
    w_q = orthogonal(w_p + 0.3 / width**0.5 * torch.randn(vocab_size, width, generator=rng))
    shift = offset / width * direction
    return h_q + direction, w_q + shift, h_p + direction, w_p + shift


@functools.lru_cache(maxsize=1)
def gpt2_sized_case(offset):
    """Hidden states and heads, and the exact results: KL, probabilities, gradients."""
    h_q, w_q, h_p, w_p = gpt2_sized_logits(offset)
    log_q = (h_q.double() @ w_q.double().T).log_softmax(-1)  # (N, V)
    log_p = (h_p.double() @ w_p.double().T).log_softmax(-1)
    probs = log_q.exp()
    kl = (probs * (log_q - log_p)).sum(-1)  # (N,)
    d_logits = probs * (log_q - log_p - kl[:, None])
    d_hidden, d_head = d_logits @ w_q.double(), (d_logits.T @ h_q.double()).float()
    return (h_q, w_q, h_p, w_p), kl, probs, d_hidden, d_head


def gpt2_sized_errors(offset, head_logits):
    (h_q, w_q, h_p, w_p), kl64, probs64, d_hidden, d_head = gpt2_sized_case(offset)
    hidden, head = h_q.clone().requires_grad_(), w_q.clone().requires_grad_()

    def loss_and_error(q, p, exact):
        kl = losses.student_loss(q, p)
        return torch.stack([kl, (kl - exact).abs().float()])

    with precision(CPU, "bfloat16"):
        student, teacher = (hidden, head), (h_p, w_p)
        total, kl_error = losses.sum_over_tokens(loss_and_error, student, teacher, exact=kl64)
        with torch.no_grad():
            logits = head_logits(hidden, head).float()
    total.backward()
    total_variation = (logits.double().softmax(-1) - probs64).abs().sum(-1).mean() / 2
    return {
        "KL": float(kl_error.detach()) / len(h_q),
        "d_hidden": float((hidden.grad.double() - d_hidden).norm() / d_hidden.norm()),
        "d_head": float((head.grad - d_head).norm() / d_head.norm()),
        "total variation": float(total_variation),
        "greedy tokens that differ": float(
            (logits.argmax(-1) != probs64.argmax(-1)).float().mean()
        ),
    }


def within_bounds(errors):
    """Two distributions can give the same token in all but a share of the samples that is their
    total variation. With inverse transform sampling from the same numbers it is more, with and
    without an offset: a CDF over 50,257 tokens sums up the rounding errors of all."""
    return (
        errors["KL"] <= 0.001
        and max(errors["d_hidden"], errors["d_head"]) <= 0.02
        and max(errors["total variation"], errors["greedy tokens that differ"]) <= 0.01
    )


def test_an_offset_in_all_dimensions_costs_little_precision(gpu_form):
    """With GPT-2's width and vocabulary."""
    with TF32():
        errors = gpt2_sized_errors(OFFSET, head_logits)
    print({"offset": OFFSET, **errors})
    assert within_bounds(errors)


def test_a_bfloat16_head_fails_with_an_offset_in_all_dimensions(bfloat16_form):
    errors = gpt2_sized_errors(OFFSET, bfloat16_head)
    print({"bfloat16 head": True, "offset": OFFSET, **errors})
    assert not within_bounds(errors)


# --- bfloat16 in every method ---


def make_run(method, dtype):
    """A Run of small models with a vocabulary of 1,000, before its first step."""
    values = METHODS[method].option_defaults()
    s = Settings(method, "", "", 8, lr=1e-3, epochs=1, dtype=dtype, max_new_tokens=12, **values)
    student = GPT(Config(2, 64, 4, 1000, 128, dropout=0.0)).init_weights(0)
    teacher = GPT(Config(3, 96, 4, 1000, 128, dropout=0.0)).init_weights(1)
    run = train.Run(
        settings=s,
        total_steps=10,
        global_batch_size=8,
        micro_batch_tokens=120,
        device=CPU,
        tokenizer=SimpleNamespace(eot_token=999),
        student=student,
        ddp_student=student,
        optimizer=adamw(student.parameters(), s),
        teacher=freeze(teacher, dtype),
    )
    set_learning_rate(run.optimizer, 1e-3)
    if method == "minillm":
        run.lm_blocks = make_examples((6,) * 5, seed=6)
    if method == "promptkd":
        run.P = teacher.wte.weight[:7].detach().clone().requires_grad_()
        run.prompt_optimizer = adamw([run.P], s)
        set_learning_rate(run.prompt_optimizer, 1e-3)
    return run


def step_and_gradients(method, dtype):
    """The losses of a step on given responses, and the gradients of student and prompt."""
    run, gradients, clip_and_step = make_run(method, dtype), {}, train.clip_and_step

    def record_gradient(optimizer):
        name = "prompt" if optimizer is run.prompt_optimizer else "student"
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients[name] = torch.cat([p.grad.flatten() for p in parameters]).clone()
        return clip_and_step(optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "clip_and_step", record_gradient)
        patch.setattr(train, "rollout", lambda run, examples, t, teacher_mix=None: examples)
        examples = make_examples((9, 3, 12, 30, 7, 20, 11, 5))
        values = train.STEPS[method](run, examples, 0)
    return {name: float(value) for name, value in values.items() if "loss" in name}, gradients


@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_bfloat16_is_close_to_the_step_in_float32(method):
    values, gradients = step_and_gradients(method, "bfloat16")
    expected, expected_gradients = step_and_gradients(method, "float32")
    assert values == pytest.approx(expected, rel=0.01)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient, expected_gradients[name], dim=0) >= 0.99, name
        assert not torch.equal(gradient, expected_gradients[name])


def test_a_frozen_teacher_in_bfloat16_equals_autocast_of_a_float32_one():
    p = tiny_model()
    ids = torch.arange(40)[None]
    with precision(CPU, "bfloat16"):
        expected = p(ids)
        hidden = freeze(p, "bfloat16")(ids)
    assert torch.equal(hidden, expected)
    assert hidden.dtype == p.wte.weight.dtype == p.h[0].ln_1.weight.dtype == torch.float32
    assert p.h[0].attn.c_attn.weight.dtype == p.h[1].mlp["c_proj"].bias.dtype == torch.bfloat16


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_log_probabilities_of_sampling_in_bfloat16_equal_those_of_a_forward_pass(alpha):
    q, p = make_model_with_offset(1, 0.0), freeze(make_model_with_offset(2, 0.0), "bfloat16")
    teacher_mix = (p, alpha) if alpha else None
    requests = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]]
    keys = [(10, "test", n) for n in range(3)]
    responses, log_probs = sampling.sample_all(
        q, requests, keys, 999, 16, teacher_mix=teacher_mix, dtype="bfloat16"
    )
    for request, response, log_p in zip(requests, responses, log_probs, strict=True):
        ids = torch.tensor([request + response])
        with torch.no_grad(), precision(CPU, "bfloat16"):
            q_probs, p_probs = (m.logits(m(ids))[0].softmax(-1) for m in (q, p))  # (T, V)
        mixture = (1 - alpha) * q_probs + alpha * p_probs
        positions = torch.arange(len(request) - 1, ids.shape[1] - 1)
        expected = mixture[positions, torch.tensor(response)].log()
        assert (torch.tensor(log_p) - expected).abs().max() < 0.05


# --- bfloat16 in every command ---


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The directories of a student and a teacher, of a data set, and a file of plain text."""
    directory = tmp_path_factory.mktemp("models")
    small = replace(talker_config(), n_positions=400)
    wide = replace(small, n_embd=48, n_head=3)
    for name, config in {"student": small, "teacher": wide}.items():
        write_checkpoint(directory / name, config, tiny_tokenizer())
    data = directory / "data"
    for name, n_rows in {"train": 16, "dev": 2, "test": 3}.items():
        rows = [{"instruction": f"Write {n}.", "output": f"a task {n}"} for n in range(n_rows)]
        write_rows(data / f"{name}.jsonl", rows)
    text = directory / "text.txt"
    text.write_text("\n\n".join(f"A task that describes response {n}." for n in range(60)))
    return SimpleNamespace(
        student=str(directory / "student"),
        teacher=str(directory / "teacher"),
        data=str(data),
        text=str(text),
    )


def test_an_interrupted_run_in_bfloat16_ends_with_the_same_bits(tmp_path, models):
    s = Settings(
        method="promptkd",
        student=models.student,
        teacher=models.teacher,
        prompt_lr=0.01,
        data=models.data,
        global_batch_size=4,
        lr=0.01,
        epochs=1,
        steps=4,
        eval_interval=2,
        dropout=0.2,
        max_new_tokens=8,
        dtype="bfloat16",
        **PROMPT,
    )
    train.run_stage("run", s, tmp_path / "complete", 220, CPU)
    with interrupted_in_step("promptkd", 3):
        train.run_stage("run", s, tmp_path / "resumed", 220, CPU)
    train.run_stage("run", s, tmp_path / "resumed", 220, CPU)

    complete, resumed = (tmp_path / name / "run" for name in ("complete", "resumed"))
    for path in (complete / "best").iterdir():
        assert path.read_bytes() == (resumed / "best" / path.name).read_bytes()
    assert deterministic_metrics(complete) == deterministic_metrics(resumed)
    assert json.loads((resumed / "run.json").read_text())["settings"]["dtype"] == "bfloat16"


def deterministic_metrics(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    others = ("seconds", "tokens_per_second", "memory_resident_gb")
    return [{k: v for k, v in json.loads(line).items() if k not in others} for line in lines]


def test_a_run_with_another_dtype_is_an_error(tmp_path, capsys, models):
    options = ["--method", "sft", "--student", models.student, "--data", models.data]
    options += ["--steps", "2", "--global-batch", "4", "--out", str(tmp_path)]
    train.main(options)
    message = "dtype 'float32', not 'bfloat16'; give --dtype float32"
    with pytest.raises(InputError, match=message):
        train.main([*options, "--dtype", "bfloat16"])
    capsys.readouterr()
    train.main([*options, "--dtype", "float32"])
    assert "complete, skipped" in capsys.readouterr().out


def test_responses_of_another_dtype_are_not_reused(tmp_path, capsys, models):
    options = [models.student, "--data", models.data, "--rows", "3", "--seeds", "10"]
    options += ["--max-new", "8", "--out", str(tmp_path)]
    evaluate.main(options)
    evaluate.main([*options, "--dtype", "float32"])
    assert "sampling again" not in capsys.readouterr().out
    evaluate.main([*options, "--dtype", "bfloat16"])
    out, err = capsys.readouterr()
    assert "made with different dtype; sampling again" in out
    assert "precision: bfloat16" in err
    assert json.loads((tmp_path / "table1.json").read_text())["settings"]["dtype"] == "bfloat16"


def test_exposure_bias_is_in_float32_unless_another_dtype_is_given(tmp_path, models):
    options = ["--teacher", models.teacher, "--students", models.student, "--data", models.data]
    options += ["--rows", "3", "--steps", "6", "--samples", "1", "--out", str(tmp_path)]
    errors = {}
    for dtype_options in ([], ["--dtype", "bfloat16"]):
        exposure_bias.main([*options, *dtype_options])
        figure = json.loads((tmp_path / "figure_3a.json").read_text())
        errors[figure["settings"]["dtype"]] = figure["students"]["student"]["epsilon"]
    assert set(errors) == {"float32", "bfloat16"}
    assert errors["float32"] != errors["bfloat16"]
    assert errors["bfloat16"] == pytest.approx(errors["float32"], rel=0.1)


def test_a_greedy_command_in_bfloat16(models):
    options = ("--instruction", "a", "--max-new", 8, "--dtype", "bfloat16")
    process = call_command(sampling.main, models.student, *options)
    assert process.returncode == 0
    assert process.stderr.splitlines()[0].endswith("; ranks: 1; precision: bfloat16")


# --- The first line ---


@dataclass
class Cuda:
    """What torch.cuda reports about a machine."""

    gpu: bool
    native_bfloat16: bool = True

    def use(self, patch):
        patch.setattr(torch.cuda, "is_available", lambda: self.gpu)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
        patch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)

        def is_bf16_supported(including_emulation=True):
            return self.native_bfloat16 or including_emulation

        patch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)


@pytest.mark.parametrize(
    "cuda, given, dtype",
    [
        (Cuda(gpu=True), None, "bfloat16"),
        (Cuda(gpu=True), "float32", "float32"),
        (Cuda(gpu=True, native_bfloat16=False), None, "float32"),
        (Cuda(gpu=True, native_bfloat16=False), "bfloat16", "bfloat16"),
        (Cuda(gpu=False), None, "float32"),
        (Cuda(gpu=False), "bfloat16", "bfloat16"),
    ],
)
def test_the_first_line_names_device_ranks_and_dtype(monkeypatch, capsys, cuda, given, dtype):
    cuda.use(monkeypatch)
    device, chosen = dist.init_process(given)
    assert (device.type, chosen) == ("cuda" if cuda.gpu else "cpu", dtype)
    name = "Tesla V100" if cuda.gpu else f"CPU, {torch.get_num_threads()} threads"
    first_line = capsys.readouterr().err.splitlines()[0]
    assert first_line == f"device: {name}; ranks: 1; precision: {dtype}"


def test_a_pytorch_built_for_gpus_without_a_gpu_warns(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    Cuda(gpu=False).use(monkeypatch)
    dist.init_process()
    _, warning = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: this PyTorch is built for GPUs (13.0)")


# --- Sampling that suits a GPU ---


def test_a_cdf_that_is_not_monotone_gives_no_impossible_token(monkeypatch):
    """Sums computed in parallel have different rounding errors, here of up to 1e-5, which is far
    more than a GPU's."""
    rng = np.random.default_rng(4)
    probs = rng.random((64, 5000)) * (rng.random((64, 5000)) < 0.3)  # 70 % are impossible
    probs[:, :50] = probs[:, -50:] = 0.0
    logits = torch.from_numpy(probs / probs.sum(-1, keepdims=True)).log()
    exact_cdf = logits.float().softmax(-1).cumsum(-1)
    noise = torch.from_numpy(rng.uniform(-1e-5, 1e-5, probs.shape)).float()
    cumsum = torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: cumsum(x, dim) + noise)
    n_impossible, error = 0, 0.0
    for number in [0.0, 1 - 2**-24, *rng.random(100)]:
        u = torch.full((64,), float(number))
        _, log_p = sample.sample_next_token(logits, u)
        n_impossible += int(torch.isinf(log_p).sum())
        with as_on_gpu():
            tokens, log_p = sample.sample_next_token(logits, u)
        assert torch.isfinite(log_p).all()
        # u is in the token's part of the exact CDF, up to the noise.
        end = exact_cdf.gather(1, tokens[:, None])[:, 0]
        start = end - log_p.exp()
        error = max(error, float((start - u).max()), float((u - end).max()))
    assert n_impossible > 50  # without the correction
    assert error < 5e-5


@pytest.mark.parametrize("kwargs", [{}, {"top_k": 50}, {"top_p": 0.9}, {"temperature": 0.5}])
def test_the_correction_changes_no_bit_of_a_monotone_cdf(kwargs):
    logits = 4 * torch.randn(32, 3000)
    logits[:, ::7] = -torch.inf
    u = torch.rand(32)
    tokens, log_p = sample.sample_next_token(logits, u, **kwargs)
    with as_on_gpu():
        corrected_tokens, corrected_log_p = sample.sample_next_token(logits, u, **kwargs)
    assert torch.equal(tokens, corrected_tokens)
    assert torch.equal(log_p, corrected_log_p)


@pytest.mark.parametrize(
    "models, dtype, memory, expected",
    [
        # One row of GPT-2: 2 × 12 layers × 768 × 512 tokens × 2 bytes = 18.9 MB; of XL 157.3 MB.
        (["small"], "bfloat16", 80e9, 256),
        (["small"], "bfloat16", 24e9, 127),
        (["small"], "float32", 24e9, 63),
        (["small", "xl"], "bfloat16", 80e9, 45),
        (["xl"], "bfloat16", 1e8, 1),
    ],
)
def test_the_batch_size_depends_only_on_the_total_memory(
    monkeypatch, models, dtype, memory, expected
):
    configs = {"small": Config(12, 768, 12, 100), "xl": Config(48, 1600, 25, 100)}
    with torch.device("meta"):
        models = [GPT(configs[name]) for name in models]
    properties = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert sampling.sampling_batch_size(models, 256, 256, dtype) == expected


def test_the_batch_size_has_no_limit_from_requests_of_no_tokens_and_is_fixed_on_a_cpu(monkeypatch):
    properties = SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with torch.device("meta"):
        gpt = GPT(Config(12, 768, 12, 100))
    assert sampling.sampling_batch_size([gpt], 256, 256, "bfloat16", max_request=0) == 256
    n_rows = sampling.sampling_batch_size([tiny_model()], 9, 9, "float32")
    assert n_rows == sampling.CPU_BATCH_SIZE


def test_all_requests_are_sampled_in_batches_of_that_size(monkeypatch):
    batches = []

    def record_batch(model, requests, *args, **kwargs):
        batches.append(len(requests))
        return [[0]] * len(requests), [[0.0]] * len(requests)

    monkeypatch.setattr(sampling, "sampling_batch_size", lambda *args, **limits: 7)
    monkeypatch.setattr(sampling, "sample", record_batch)
    sampling.sample_all(tiny_model(), [[1, 2]] * 17, [(0, n) for n in range(17)], 60, 4)
    assert batches == [7, 7, 3]


class CountWaits(TorchDispatchMode):
    """Counts the operations for which a program would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::item"):
            self.count += 1
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("kwargs", [{}, {"no_repeat_ngram": 3}, {"top_p": 0.9, "top_k": 20}])
def test_sampling_waits_for_the_device_only_at_its_checks(monkeypatch, kwargs):
    monkeypatch.setattr(sample, "check_interval", lambda device: 8)
    gpt, requests, counts = tiny_model(), [[3, 1, 4], [1, 5]], {}
    tolist = torch.Tensor.tolist

    for max_new_tokens in (8, 16, 40):
        uniforms = np.stack([sample.row_uniforms(max_new_tokens, n) for n in range(2)])
        with CountWaits() as waits, monkeypatch.context() as patch:

            def counted_tolist(x, waits=waits):
                waits.count += 1
                return tolist(x)

            patch.setattr(torch.Tensor, "tolist", counted_tolist)
            sample.sample(gpt, requests, uniforms, -1, max_new_tokens, **kwargs)
        counts[max_new_tokens] = waits.count
    assert counts[16] - counts[8] == 1
    assert counts[40] - counts[8] == 4


def test_finished_rows_are_looked_for_at_each_token_on_a_cpu_and_rarely_elsewhere():
    intervals = {name: sample.check_interval(torch.device(name)) for name in ("cpu", "cuda", "mps")}
    assert intervals == {"cpu": 1, "cuda": 8, "mps": 8}


def test_rare_checks_give_the_same_responses(monkeypatch):
    requests = [[n, n + 1, n + 2] for n in range(12)]
    uniforms = np.stack([sample.row_uniforms(30, n) for n in range(12)])
    arguments = (tiny_model(), requests, uniforms, 7, 30)
    expected, _ = sample.sample(*arguments, no_repeat_ngram=2)
    monkeypatch.setattr(sample, "check_interval", lambda device: 8)
    assert sample.sample(*arguments, no_repeat_ngram=2)[0] == expected
    assert any(response[-1] == 7 for response in expected)
