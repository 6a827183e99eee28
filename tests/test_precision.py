"""Precision: logits that stay right under a large common offset, the GPU's form of the product on a
CPU, bfloat16 as a setting of every method and command, and sampling that suits a GPU.

A GPU rounds the inputs of a float32 product to TF32. `TF32` does that to the products of a CPU.
"""

import functools
import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import run_command, talker_config, tiny_model, tiny_tokenizer, write_checkpoint
from test_algorithm import make_examples
from test_train import (  # noqa: F401  (fixtures among them)
    Interrupted,
    built,
    main,
    minillm_validates_within_a_rollout,
    options_for,
    outcome,
    stop_in_a_step,
    student,
    teacher,
    world,
)
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import exposure_bias
import losses
import model
import sample
import train
from data import dist
from data.cli import InputError
from data.rows import micro_batches
from model import GPT, Config, head_logits, precision
from prompt import freeze, teacher_hidden

CPU = torch.device("cpu")
OFFSET = -112.0


class TF32(TorchDispatchMode):
    """Float32 products round their inputs to 10 bits of mantissa, as a GPU's tensor cores do."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        names = ("mm", "addmm", "addmm_", "bmm")
        if function._schema.name.removeprefix("aten::") in names:
            first = 1 if "addmm" in function._schema.name else 0
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


# ---- logits under an offset ------------------------------------------------------------------------


def bfloat16_head(hidden, head, padded=False):
    """What autocast makes of the head: the fault that the tests below must tell."""
    return F.linear(hidden.bfloat16(), head.bfloat16()).float()


FORMS = {
    "gpu": functools.partial(head_logits, on_gpu=True),
    "cpu": head_logits,
    "bfloat16": bfloat16_head,
}


@pytest.fixture
def use_form(monkeypatch):
    def use(name):
        for module in (model, losses):
            monkeypatch.setattr(module, "head_logits", FORMS[name])

    return use


def test_logits_are_float32_products_inside_autocast(use_form):
    hidden = torch.randn(5, 64)
    head = torch.randn(100, 64)
    for on_gpu in (False, True):
        for padded in (False, True):
            with precision(CPU, "bfloat16"):
                logits = head_logits(hidden, head, padded, on_gpu)
            assert logits.dtype == torch.float32
            assert (logits[:, :100] - hidden @ head.T).abs().max() < 1e-4


def make_model_with_offset(seed, offset):
    """A GPT whose logits all have an offset. Dimension 0 of the residual stream is -7 at every token;
    the last LayerNorm puts a constant in its place, which the head, tied to the embedding, multiplies
    by -7. Both numbers are exact in bfloat16. Without offset the constant is 0."""
    gpt = GPT(Config(2, 64, 4, 1000, 128, dropout=0.0)).initialise(seed)
    with torch.no_grad():
        gpt.wte.weight[:, 0] = -7.0
        gpt.ln_f.weight.mul_(2)  # so that distributions are not flat
        gpt.ln_f.weight[0] = 0.0
        gpt.ln_f.bias[0] = offset / -7.0
    return gpt.eval()


def model_errors(offset, dtype):
    """Errors against float64 of KL(q || p), of log-probabilities and of the student's gradient, and
    what is sampled, where blocks multiply in `dtype`."""
    [batch] = micro_batches(make_examples((9, 3, 12, 30, 7, 20, 40, 11)), 8, CPU)
    found = {}
    for name, of in (("float64", torch.float64), (dtype, torch.float32)):
        q = make_model_with_offset(1, offset).to(of)
        p = make_model_with_offset(2, offset).to(of)
        if name == "float64":
            q_logits, p_logits = (
                m(batch.ids, output_positions=batch.response_positions) @ m.wte.weight.T
                for m in (q, p)
            )
            log_q, log_p = q_logits.log_softmax(-1), p_logits.log_softmax(-1)
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
            log_probs = log_q.gather(1, batch.targets[:, None])[:, 0]
            kl.mean().backward()
        else:
            with precision(CPU, dtype):
                p = freeze(p, dtype)
                target = (
                    teacher_hidden(p, batch.ids, None, batch.response_positions),
                    p.wte.weight,
                )
                hidden = q(batch.ids, output_positions=batch.response_positions)
                kl = losses.kl(q.logits(hidden), p.logits(target[0])).detach()
                log_probs = losses.token_log_probs(hidden, q.wte.weight, batch.targets)

                def loss_fn(i, q_logits, p_logits):
                    return losses.student_loss(q_logits, p_logits)

                loss = losses.sum_over_tokens(loss_fn, hidden, q.wte.weight, target) / len(kl)
            loss.backward()
        gradient = torch.cat(
            [w.grad.flatten().double() for w in q.parameters() if w.grad is not None]
        )
        found[name] = SimpleNamespace(
            kl=kl.double(), log_probs=log_probs.double(), gradient=gradient
        )
    wanted, got = found["float64"], found[dtype]
    return {
        "KL": float((got.kl.detach() - wanted.kl.detach()).abs().mean()),
        "log-probability": float((got.log_probs - wanted.log_probs.detach()).abs().mean()),
        "gradient": float((got.gradient - wanted.gradient).norm() / wanted.gradient.norm()),
    }


def sampled_tokens(offset, dtype):
    rng = np.random.default_rng(3)
    requests = [rng.integers(0, 999, rng.integers(3, 20)).tolist() for _ in range(40)]
    keys = [(10, "offset", n) for n in range(len(requests))]
    q = make_model_with_offset(1, offset)
    return sample.sample_all(q, requests, keys, 999, 12, dtype=dtype)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_offset_of_its_own_dimension_costs_no_precision(use_form, dtype):
    use_form("gpu")
    with TF32():
        plain = model_errors(0.0, dtype)
        shifted = model_errors(OFFSET, dtype)
        tokens = [sampled_tokens(offset, dtype) for offset in (0.0, OFFSET)]
    print({"dtype": dtype, "plain": plain, "shifted": shifted})
    for kind, error in shifted.items():
        assert error <= 1.5 * plain[kind], kind
    assert tokens[0] == tokens[1]


def test_a_bfloat16_head_fails_under_an_offset(use_form):
    """The tests above are able to fail."""
    use_form("bfloat16")
    plain = model_errors(0.0, "bfloat16")
    shifted = model_errors(OFFSET, "bfloat16")
    print({"bfloat16 head": True, "plain": plain, "shifted": shifted})
    assert any(error > 1.5 * plain[kind] for kind, error in shifted.items())
    assert sampled_tokens(0.0, "bfloat16") != sampled_tokens(OFFSET, "bfloat16")


def gpt2_sized_logits(offset, n_tokens=256, width=768, vocab=50_257):
    """Hidden states (N, C) and heads (V, C) of student and teacher whose logits have a standard
    deviation of about 4 (an entropy of 4 nats) and the given offset, spread over all dimensions."""
    rng = torch.Generator().manual_seed(7)
    direction = torch.randint(0, 2, (width,), generator=rng) * 2.0 - 1  # (C,)

    def across(x):
        """What of x (..., C) has nothing of the direction, so that the offset alone does."""
        return x - (x @ direction / width)[..., None] * direction

    h_p = across(torch.randn(n_tokens, width, generator=rng))
    h_q = across(h_p + 0.3 * torch.randn(n_tokens, width, generator=rng))
    w_p = across(4 / width**0.5 * torch.randn(vocab, width, generator=rng))
    w_q = across(w_p + 0.3 / width**0.5 * torch.randn(vocab, width, generator=rng))
    shift = offset / width * direction
    return h_q + direction, w_q + shift, h_p + direction, w_p + shift


def spread_errors(form, offset):
    h_q, w_q, h_p, w_p = gpt2_sized_logits(offset)
    u = torch.from_numpy(np.random.default_rng(8).random(len(h_q), dtype=np.float32))
    with torch.no_grad():
        q64 = h_q.double() @ w_q.double().T  # (N, V)
        p64 = h_p.double() @ w_p.double().T
        log_q, log_p = q64.log_softmax(-1), p64.log_softmax(-1)
        kl64 = (log_q.exp() * (log_q - log_p)).sum(-1)  # (N,)
        d_logits = log_q.exp() * (log_q - log_p - kl64[:, None])
        d_hidden, d_head = d_logits @ w_q.double(), d_logits.T @ h_q.double()
        probs64 = log_q.exp()
        tokens64 = torch.searchsorted(probs64.cumsum(-1), u[:, None].double())[:, 0]
        greedy64 = q64.argmax(-1)
        del log_q, log_p, d_logits, q64, p64

    hidden, head = h_q.requires_grad_(), w_q.requires_grad_()

    def loss_fn(i, q_logits, p_logits):
        kl = losses.student_loss(q_logits, p_logits)
        return torch.stack([kl, (kl - kl64[i]).abs().float()])

    with precision(CPU, "bfloat16"):
        total, kl_error = losses.sum_over_tokens(loss_fn, hidden, head, (h_p, w_p))
        with torch.no_grad():
            logits = form(hidden, head).float()
    total.backward()
    tokens = sample.sample_next_token(logits, u)[0]
    distance = (logits.double().softmax(-1) - probs64).abs().sum(-1).mean() / 2  # total variation
    return {
        "KL": float(kl_error.detach()) / len(h_q),
        "d_hidden": float((hidden.grad.double() - d_hidden).norm() / d_hidden.norm()),
        "d_head": float((head.grad.double() - d_head).norm() / d_head.norm()),
        "drawn alike": float(1 - distance),
        "drawn alike from the same u": float((tokens == tokens64).float().mean()),
        "greedy alike": float((logits.argmax(-1) == greedy64).float().mean()),
    }


def within(errors):
    """Whether errors are in bounds. Two distributions say the same token in a share of the draws that
    is 1 minus their total variation, if they are drawn from jointly as well as can be. From the same
    u it is less, with and without an offset: a CDF over 50,257 tokens sums up the rounding of all."""
    alike = min(errors["drawn alike"], errors["greedy alike"])
    return (
        errors["KL"] <= 0.001
        and max(errors["d_hidden"], errors["d_head"]) <= 0.02
        and alike >= 0.99
    )


@pytest.mark.parametrize("offset", [0.0, OFFSET])
def test_an_offset_spread_over_the_width_costs_little_precision(use_form, offset):
    """At GPT-2's width and vocabulary."""
    use_form("gpu")
    with TF32():
        errors = spread_errors(FORMS["gpu"], offset)
    print({"offset": offset, **errors})
    assert within(errors)


def test_a_bfloat16_head_fails_under_an_offset_spread_over_the_width(use_form):
    use_form("bfloat16")
    errors = spread_errors(bfloat16_head, OFFSET)
    print({"bfloat16 head": True, "offset": OFFSET, **errors})
    assert not within(errors)


# ---- bfloat16 as a setting of every method ---------------------------------------------------------


def make_run(method, dtype):
    """A Run of small models with a vocabulary of 1,000, before its first step."""
    values = {"rollout_size": 8, "inner_epochs": 1} if method == "minillm" else {}
    values |= train.PROMPT if method == "promptkd" else {}
    s = train.Settings(
        method, "tiny", "none", 8, lr=1e-3, epochs=1, dtype=dtype, max_new_tokens=12, **values
    )
    student, teacher = (
        GPT(Config(n_layer, n_embd, 4, 1000, 128, dropout=0.0)).initialise(seed)
        for seed, (n_layer, n_embd) in enumerate([(2, 64), (3, 96)])
    )
    P = None
    if method == "promptkd":
        P = teacher.wte.weight[:7].detach().clone().requires_grad_()
    run = train.Run(
        settings=s,
        total_steps=10,
        global_batch_size=8,
        micro_batch_size=3,
        device=CPU,
        tokenizer=SimpleNamespace(eot_token=999),
        student=student,
        ddp_student=student,
        optimizer=train.adamw(student.parameters(), s),
        teacher=freeze(teacher, dtype),
        P=P,
        prompt_optimizer=None if P is None else train.adamw([P], s),
        clock={"since": 0.0},
        text=make_examples((6,) * 5, seed=6) if method == "minillm" else None,
    )
    train.set_learning_rate(run.optimizer, 1e-3)
    if P is not None:
        train.set_learning_rate(run.prompt_optimizer, 1e-3)
    return run


def step_and_gradients(method, dtype):
    """A step on given responses: its losses and, of student and prompt, the gradients."""
    run, gradients, update = make_run(method, dtype), {}, train.clip_and_step

    def recording_update(optimizer):
        of = "prompt" if optimizer is run.prompt_optimizer else "student"
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients[of] = torch.cat([p.grad.flatten() for p in parameters]).clone()
        return update(optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "clip_and_step", recording_update)
        patch.setattr(train, "rollout", lambda run, examples, t, teacher_mix=None: examples)
        values = train.STEPS[method](run, make_examples((9, 3, 12, 30, 7, 20, 11, 5)), 0)
    return {name: float(value) for name, value in values.items()}, gradients


@pytest.mark.parametrize("method", ["pretrain", "sft", "kd", "seqkd", "minillm", "gkd", "promptkd"])
def test_a_step_in_bfloat16_is_near_the_step_in_float32(method):
    values, gradients = step_and_gradients(method, "bfloat16")
    wanted, wanted_gradients = step_and_gradients(method, "float32")
    for name in wanted:
        if "loss" in name:
            assert values[name] == pytest.approx(wanted[name], rel=0.01), name
    assert gradients.keys() == wanted_gradients.keys()
    for of, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient, wanted_gradients[of], dim=0) >= 0.99, of
        assert not torch.equal(gradient, wanted_gradients[of])


def test_a_frozen_teacher_in_bfloat16_is_what_autocast_makes_of_a_float32_one():
    p = tiny_model()
    ids = torch.arange(40)[None]
    with precision(CPU, "bfloat16"):
        wanted = p(ids)
        got = freeze(p, "bfloat16")(ids)
    assert torch.equal(got, wanted) and got.dtype == torch.float32
    assert p.wte.weight.dtype == p.h[0].ln_1.weight.dtype == torch.float32
    assert p.h[0].attn.c_attn.weight.dtype == p.h[1].mlp["c_proj"].bias.dtype == torch.bfloat16


@pytest.mark.parametrize("with_teacher", [False, True])
def test_sampling_in_bfloat16_gives_the_log_probabilities_of_a_full_forward(with_teacher):
    q = make_model_with_offset(1, 0.0)
    teacher_mix = (
        (freeze(make_model_with_offset(2, 0.0), "bfloat16"), 0.2) if with_teacher else None
    )
    requests = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]]
    keys = [(10, "test", n) for n in range(3)]
    responses, log_probs = sample.sample_all(
        q, requests, keys, 999, 16, teacher_mix=teacher_mix, dtype="bfloat16"
    )
    for request, response, log_p in zip(requests, responses, log_probs):
        ids = torch.tensor([request + response])
        with torch.no_grad(), precision(CPU, "bfloat16"):
            probs = [
                m.logits(m(ids))[0].softmax(-1)
                for m in ([q] if teacher_mix is None else [q, teacher_mix[0]])
            ]
        mixture = probs[0] if teacher_mix is None else 0.8 * probs[0] + 0.2 * probs[1]
        wanted = mixture[
            torch.arange(len(request) - 1, ids.shape[1] - 1), torch.tensor(response)
        ].log()
        assert (torch.tensor(log_p) - wanted).abs().max() < 0.05


@pytest.mark.parametrize("method", ["sft", "minillm", "promptkd"])
@pytest.mark.usefixtures("minillm_validates_within_a_rollout")
def test_a_killed_run_in_bfloat16_ends_with_the_same_bits(
    tmp_path, student, teacher, built, method
):
    options = (*options_for(method, student, teacher), "--dtype", "bfloat16")
    main(tmp_path / "whole", *options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_in_a_step(patch, method)
        main(tmp_path / "killed", *options)
    main(tmp_path / "killed", *options)
    [whole], [killed] = (
        list((tmp_path / name).glob(f"{method}-*")) for name in ("whole", "killed")
    )
    a, b = outcome(whole, built[0]), outcome(killed, built[-1])
    assert a.best == b.best and a.lines == b.lines and a.record["settings"]["dtype"] == "bfloat16"


def test_a_run_of_another_precision_is_refused_by_name(tmp_path, student):
    options = options_for("sft", student, None)
    main(tmp_path, *options, "--steps", 2)
    with pytest.raises(
        InputError, match="was made with dtype 'float32', not 'bfloat16'; give --dtype float32"
    ):
        main(tmp_path, *options, "--steps", 2, "--dtype", "bfloat16")
    assert "complete, skipped" in main(tmp_path, *options, "--steps", 2, "--dtype", "float32")


def test_responses_of_another_precision_are_not_reused(tmp_path, world, student, capsys):  # noqa: F811
    options = [str(student), "--data", str(world), "--rows", "3", "--seeds", "10", "--max-new", "8"]
    options += ["--out", str(tmp_path)]
    evaluate.main(options)
    evaluate.main([*options, "--dtype", "float32"])
    assert "made from other" not in capsys.readouterr().out
    evaluate.main([*options, "--dtype", "bfloat16"])
    said = capsys.readouterr()
    assert "was made from other dtype" in said.out and "precision: bfloat16" in said.err
    assert json.loads((tmp_path / "table1.json").read_text())["settings"]["dtype"] == "bfloat16"


def test_exposure_bias_is_in_float32_unless_another_precision_is_given(
    tmp_path, world, student, teacher, capsys
):  # noqa: F811
    options = ["--teacher", str(teacher), "--students", str(student), "--data", str(world)]
    options += ["--rows", "3", "--steps", "6", "--samples", "1", "--out", str(tmp_path)]
    errors = {}
    for given in ([], ["--dtype", "bfloat16"]):
        exposure_bias.main([*options, *given])
        figure = json.loads((tmp_path / "figure_3a.json").read_text())
        errors[figure["settings"]["dtype"]] = figure["students"]["small"]["epsilon"]
    assert set(errors) == {"float32", "bfloat16"}
    assert errors["float32"] != errors["bfloat16"] == pytest.approx(errors["float32"], rel=0.1)


def test_a_greedy_command_in_bfloat16(tmp_path):
    directory = write_checkpoint(tmp_path / "talker", talker_config(), tiny_tokenizer())
    done = run_command(
        "sample.py", directory, "--instruction", "a", "--max-new", 8, "--dtype", "bfloat16"
    )
    assert done.returncode == 0 and done.stderr.splitlines()[0].endswith(
        "; ranks: 1; precision: bfloat16"
    )


# ---- the first line --------------------------------------------------------------------------------


@dataclass
class Cuda:
    """What torch.cuda says of a machine."""

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
def test_the_first_line_names_device_ranks_and_precision(monkeypatch, capsys, cuda, given, dtype):
    cuda.use(monkeypatch)
    device, chosen = dist.init_process(given)
    assert (device.type, chosen) == ("cuda" if cuda.gpu else "cpu", dtype)
    name = "Tesla V100" if cuda.gpu else f"CPU, {torch.get_num_threads()} threads"
    assert (
        capsys.readouterr().err.splitlines()[0] == f"device: {name}; ranks: 1; precision: {dtype}"
    )


def test_a_pytorch_built_for_gpus_that_finds_none_warns(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    Cuda(gpu=False).use(monkeypatch)
    dist.init_process()
    _, warning = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: this PyTorch is built for GPUs (13.0) but can use none")


# ---- sampling that suits a GPU ---------------------------------------------------------------------


def test_a_cumulative_sum_that_is_not_monotone_draws_no_impossible_token(monkeypatch):
    """Summed in parallel, neighbours take different paths through the tree of sums, and their rounding
    differs: here by up to 1e-5, far more than a GPU's."""
    rng = np.random.default_rng(4)
    probs = rng.random((64, 5000)) * (rng.random((64, 5000)) < 0.3)  # 70 % are impossible
    probs[:, :50] = probs[:, -50:] = 0.0
    logits = torch.from_numpy(
        np.log(
            probs / probs.sum(-1, keepdims=True), where=probs > 0, out=np.full_like(probs, -np.inf)
        )
    )
    noise = torch.from_numpy(rng.uniform(-1e-5, 1e-5, probs.shape)).float()
    cumsum = torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: cumsum(x, dim) + noise)
    impossible, least, greatest = 0, 0, 0
    for u in [0.0, 1 - 2**-24, *rng.random(200)]:
        u = torch.full((64,), float(u))
        tokens, log_p = sample.sample_next_token(logits, u, parallel_sums=True)
        assert torch.isfinite(log_p).all()
        impossible += int(
            torch.isinf(sample.sample_next_token(logits, u, parallel_sums=False)[1]).sum()
        )
        # The token that an exact sum would give is at most as far away as the noise reaches
        exact = cumsum(logits.float().softmax(-1), -1)
        at = exact.gather(1, tokens[:, None])[:, 0]
        before = at - log_p.exp()
        least = max(least, float((before - u).max()))
        greatest = max(greatest, float((u - at).max()))
    assert impossible > 100  # the sum is bad enough to tell
    assert max(least, greatest) < 5e-5


def test_parallel_sums_change_no_bit_where_the_sum_is_monotone():
    logits = 4 * torch.randn(32, 3000)
    logits[:, ::7] = -torch.inf
    u = torch.rand(32)
    for how in ({}, {"top_k": 50}, {"top_p": 0.9}, {"temperature": 0.5}):
        plain = sample.sample_next_token(logits, u, parallel_sums=False, **how)
        assert all(
            torch.equal(a, b)
            for a, b in zip(plain, sample.sample_next_token(logits, u, parallel_sums=True, **how))
        )


def test_rows_sampled_at_once_hang_on_the_memory_of_the_device_alone():
    small = GPT(Config(12, 768, 12, 100))
    with torch.device("meta"):
        large = GPT(Config(48, 1600, 25, 100))
    assert sample.sampling_batch_size([small], 256, 256, "float32") == sample.CPU_BATCH_SIZE
    # a row of GPT-2: 2 × 12 layers × 768 × 512 tokens × 2 bytes = 18.9 MB; of XL 157.3 MB
    assert sample.sampling_batch_size([small], 256, 256, "bfloat16", memory=80e9) == 256
    assert sample.sampling_batch_size([small], 256, 256, "bfloat16", memory=24e9) == 127
    assert sample.sampling_batch_size([small], 256, 256, "float32", memory=24e9) == 63
    assert sample.sampling_batch_size([small, large], 256, 256, "bfloat16", memory=80e9) == 45
    assert sample.sampling_batch_size([large], 256, 256, "bfloat16", memory=1e8) == 1
    assert sample.sampling_batch_size([small], 256, 256, "bfloat16", request=0, memory=80e9) == 256


def test_all_requests_are_sampled_in_batches_of_that_many_rows(monkeypatch):
    batches = []
    monkeypatch.setattr(
        sample, "sampling_batch_size", lambda models, n_rows, max_new_tokens, dtype, request: 7
    )

    def seen(model, requests, *rest, **how):
        batches.append(len(requests))
        return [[0]] * len(requests), [[0.0]] * len(requests)

    monkeypatch.setattr(sample, "sample", seen)
    sample.sample_all(tiny_model(), [[1, 2]] * 17, [(0, n) for n in range(17)], 60, 4)
    assert batches == [7, 7, 3]


class Waits(TorchDispatchMode):
    """Counts the operations for which a program would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::item"):
            self.count += 1
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("how", [{}, {"no_repeat_ngram": 3}, {"top_p": 0.9, "top_k": 20}])
def test_sampling_waits_for_the_device_only_where_it_looks(monkeypatch, how):
    monkeypatch.setitem(sample.CHECK_INTERVAL, "cpu", 8)
    monkeypatch.setattr(torch.Tensor, "tolist", counted(torch.Tensor.tolist, lists := []))
    model, requests = tiny_model(), [[3, 1, 4], [1, 5]]
    counts = {}
    for max_new_tokens in (8, 16, 40):
        uniforms = np.stack([sample.row_uniforms(max_new_tokens, n) for n in range(2)])
        lists.clear()
        with Waits() as waits:
            sample.sample(model, requests, uniforms, -1, max_new_tokens, **how)
        counts[max_new_tokens] = waits.count + len(lists)
    assert counts[16] - counts[8] == 1 and counts[40] - counts[8] == 4


def counted(function, calls):
    def call(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return call


def test_looking_seldom_gives_the_same_responses(monkeypatch):
    model = tiny_model()
    requests = [[n, n + 1, n + 2] for n in range(12)]
    uniforms = np.stack([sample.row_uniforms(30, n) for n in range(12)])
    often = sample.sample(model, requests, uniforms, 7, 30, no_repeat_ngram=2)
    monkeypatch.setitem(sample.CHECK_INTERVAL, "cpu", 8)
    seldom = sample.sample(model, requests, uniforms, 7, 30, no_repeat_ngram=2)
    assert seldom[0] == often[0]
    assert any(response[-1] == 7 for response in often[0])
