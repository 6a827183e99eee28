"""On a GPU: optimizer steps and sampling against the CPU, logits with an offset, and every stage as
a command on one rank over NCCL. Without a GPU everything is skipped.

docs/gpu.md explains how to run this on a machine with a GPU and without a network.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    METHODS_WITH_STEPS,
    ROOT,
    soft_prompt,
    tiny_model,
    tiny_tokenizer,
    torchrun,
    write_checkpoint,
    write_rows,
)
from safetensors.torch import load_file

import losses
import sample
import train
from data.models import sampling
from data.process import dist
from data.runs.methods import METHODS
from data.sets.rows import MAX_REQUEST, Example
from losses import aligned_logits
from model import Config, head_logits, precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
CPU = torch.device("cpu")
V = tiny_tokenizer().n_vocab
# Heads of size 64 as in GPT-2, so that attention uses the same kernels.
STUDENT = Config(n_layer=2, n_embd=128, n_head=2, vocab_size=V, n_positions=512, dropout=0.0)
TEACHER = Config(n_layer=3, n_embd=192, n_head=3, vocab_size=V, n_positions=512, dropout=0.0)
# Tokens of request and response. The longest row exceeds 128, the block of a fused attention.
LENGTHS = [(5, 40), (150, 3), (20, 12), (9, 90), (60, 7), (33, 0), (2, 25), (12, 1)]


@contextmanager
def matmul_precision(name):
    """Float32 products keep their inputs if "highest"; "high", as in the commands, is TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- One optimizer step of each method ---


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The directories of a student and a teacher, and a file of plain text for MiniLLM."""
    directory = tmp_path_factory.mktemp("models")
    for name, config in {"student": STUDENT, "teacher": TEACHER}.items():
        write_checkpoint(directory / name, config, tiny_tokenizer())
    text = directory / "text.txt"
    text.write_text("\n\n".join(f"A task that describes response {n}." for n in range(60)))
    return SimpleNamespace(student=directory / "student", teacher=directory / "teacher", text=text)


def make_examples():
    rng = np.random.default_rng(1)
    return [
        Example(i, rng.integers(0, V, m).tolist(), rng.integers(0, V, n).tolist())
        for i, (m, n) in enumerate(LENGTHS)
    ]


def make_run(method, device, dtype, models):
    """A Run on a device, made as a stage makes it."""
    teacher = str(models.teacher) if METHODS[method].needs_teacher else None
    values = {"teacher": teacher, "max_new_tokens": 24, **METHODS[method].option_defaults()}
    if method == "promptkd":
        values["prompt_lr"] = 1e-3
    if method == "minillm":
        values |= {"rollout_size": 8, "lm_data": str(models.text), "block_size": 32}
    settings = train.Settings(
        method=method,
        student=str(models.student),
        data="none",
        global_batch_size=8,
        lr=1e-3,
        epochs=1,
        schedule="constant",
        dropout=0.0,
        dtype=dtype,
        **values,
    )
    steps = {"total_steps": 10, "global_batch_size": 8}
    return train.build(settings, steps, tiny_tokenizer(), 480, device)


@dataclass
class Step:
    """The result of a step: metrics, clipped gradients, new weights, and the sampled responses."""

    metrics: dict
    gradients: dict  # {"student" or "prompt": a tensor for each parameter}
    weights: dict
    responses: list


def take_step(method, device, dtype, models, responses=None, examples=None):
    """One step of a new Run. responses: used in place of sampled ones."""
    run, sample_all = make_run(method, device, dtype, models), train.sample_all
    gradients, sampled = {}, []

    def record_gradients(name, optimizer):
        def hook(optimizer, arguments, options):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            gradients[name] = [p.grad.detach().cpu().double() for p in parameters]

        optimizer.register_step_pre_hook(hook)

    def record_responses(*args, **kwargs):
        result = (responses, None) if responses else sample_all(*args, **kwargs)
        sampled.append(result[0])
        return result

    record_gradients("student", run.optimizer)
    if run.P is not None:
        record_gradients("prompt", run.prompt_optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "sample_all", record_responses)
        metrics = train.train_step(run, examples or make_examples(), 0)
    weights = {name: w.detach().cpu().double() for name, w in run.student.named_parameters()}
    if run.P is not None:
        weights["P"] = run.P.detach().cpu().double()
    return Step(metrics, gradients, weights, sampled[0] if sampled else None)


def losses_of(step):
    names = ("loss", "lm_loss", "prompt_loss", "prompt_kd", "prompt_reg", "kl_prompted_bare")
    return {name: step.metrics[name] for name in names if name in step.metrics}


@pytest.mark.parametrize("method", METHODS_WITH_STEPS)
def test_a_float32_step_gives_the_losses_gradients_and_update_of_the_cpu(method, models):
    """Tolerances: sums in another order have a relative error of about 1e-6, which the backward
    pass amplifies; a product in TF32 would have 5e-4, a wrong formula far more. AdamW's first
    update is lr times the sign of the gradient, so the few entries whose gradient is only rounding
    error may have the opposite update."""
    with matmul_precision("highest"):
        on_gpu = take_step(method, GPU, "float32", models)
        on_cpu = take_step(method, CPU, "float32", models)
    distances = []
    for name, expected in on_cpu.gradients.items():
        total_norm = torch.cat([g.flatten() for g in expected]).norm()
        for gradient, g in zip(on_gpu.gradients[name], expected, strict=True):
            distances.append(float((gradient - g).norm() / (g.norm() + 1e-3 * total_norm)))
    lr = on_cpu.metrics["lr"]
    differs = [(on_gpu.weights[name] - w).abs() > 0.01 * lr for name, w in on_cpu.weights.items()]
    share = float(torch.cat([x.flatten() for x in differs]).double().mean())
    print({"method": method, "gradients": max(distances), "updates that differ": share})

    assert on_gpu.responses == on_cpu.responses
    assert on_gpu.metrics["response_tokens"] == on_cpu.metrics["response_tokens"]
    assert losses_of(on_gpu) == pytest.approx(losses_of(on_cpu), rel=1e-4)
    assert on_gpu.metrics["grad_norm"] == pytest.approx(on_cpu.metrics["grad_norm"], rel=1e-4)
    assert on_gpu.gradients.keys() == on_cpu.gradients.keys()
    assert max(distances) < 1e-4
    assert share < 0.02


@pytest.mark.parametrize("method", METHODS_WITH_STEPS)
def test_a_bfloat16_step_is_close_to_the_float32_step_of_the_cpu(method, models):
    """Both use the responses that the CPU sampled, because in bfloat16 some would differ."""
    with matmul_precision("highest"):
        on_cpu = take_step(method, CPU, "float32", models)
    with matmul_precision("high"):
        on_gpu = take_step(method, GPU, "bfloat16", models, on_cpu.responses)
    cosines = {}
    for name, expected in on_cpu.gradients.items():
        gradient = torch.cat([g.flatten() for g in on_gpu.gradients[name]])
        expected = torch.cat([g.flatten() for g in expected])
        cosines[name] = float(F.cosine_similarity(gradient, expected, dim=0))
    errors = {name: on_gpu.metrics[name] / loss - 1 for name, loss in losses_of(on_cpu).items()}
    print({"method": method, "cosines": cosines, "relative errors of losses": errors})
    assert losses_of(on_gpu) == pytest.approx(losses_of(on_cpu), rel=0.01)
    assert cosines.keys() == on_gpu.gradients.keys()
    assert min(cosines.values()) >= 0.99
    assert max(cosines.values()) < 1 - 1e-9  # the blocks did multiply in bfloat16


@pytest.mark.parametrize("method", [method for method in METHODS_WITH_STEPS if method != "minillm"])
def test_a_global_batch_without_response_tokens_has_loss_and_gradients_of_zero(method, models):
    """Products and sums over no rows. MiniLLM samples at least one token."""
    responses = [[] for _ in LENGTHS]
    examples = [replace(e, response=[]) for e in make_examples()]
    step = take_step(method, GPU, "bfloat16", models, responses, examples)
    assert set(losses_of(step).values()) == {0.0}
    for gradients in step.gradients.values():
        assert all(float(g.abs().max()) == 0 for g in gradients)


# --- Logits ---


@pytest.mark.parametrize("logits_of", [head_logits, aligned_logits])
def test_logits_with_an_offset_are_float32_products_inside_autocast(logits_of):
    """With an offset of -112, where bfloat16 numbers are 0.5 apart. It comes from column 0, whose
    values are exact in TF32. TF32 keeps 10 bits of all other values, so that the relative error of
    a product is at most 2**-9."""
    width, vocab = 768, 5003
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, width, generator=rng)
    head = 4 / width**0.5 * torch.randn(vocab, width, generator=rng)
    hidden[:, 0], head[:, 0] = 16.0, -7.0
    exact = hidden.double() @ head.double().T  # (N, V)
    bound = 2.0**-9 * (hidden[:, 1:].abs().double() @ head[:, 1:].abs().double().T) + 0.01

    with matmul_precision("high"), torch.no_grad(), precision(GPU, "bfloat16"):
        logits = logits_of(hidden.to(GPU), head.to(GPU))[:, :vocab]
    assert logits.dtype == torch.float32

    def within_bounds(logits):
        error = (logits.cpu().double() - exact).abs()
        print(
            {"by": logits_of.__name__, "largest": float(error.max()), "mean": float(error.mean())}
        )
        return bool((error <= bound).all()) and float(error.mean()) < 0.02

    assert within_bounds(logits)
    assert not within_bounds(logits.bfloat16())  # as from a head in bfloat16


# --- Sampling ---

SAMPLING_KWARGS = {
    "plain": {},
    "no_repeat_ngram": {"no_repeat_ngram": 2},
    "prompt": {"P": soft_prompt(5, STUDENT.n_embd)},
    "mixture": {"teacher_mix": (TEACHER, 0.2)},
    "top_k and top_p": {"top_k": 30, "top_p": 0.9, "temperature": 0.8},
    "greedy": {"greedy": True},
    "greedy, no_repeat_ngram": {"greedy": True, "no_repeat_ngram": 2},
}


def kwargs_on(device, kwargs):
    kwargs = dict(kwargs)
    if "P" in kwargs:
        kwargs["P"] = kwargs["P"].to(device)
    if "teacher_mix" in kwargs:
        config, alpha = kwargs["teacher_mix"]
        kwargs["teacher_mix"] = tiny_model(config).to(device), alpha
    return kwargs


@pytest.mark.parametrize("kwargs", SAMPLING_KWARGS.values(), ids=SAMPLING_KWARGS)
def test_sampling_gives_the_tokens_of_the_cpu(kwargs):
    """On a few fixed rows: rounding could change a token, but hardly ever does."""
    rng = np.random.default_rng(2)
    requests = [rng.integers(0, V, n).tolist() for n in (1, 40, 3, 17, 60, 2, 9, 25, 5, 33)]
    keys = [(10, "gpu", n) for n in range(len(requests))]

    def respond(device, eos_token_id):
        model, on_device = tiny_model(STUDENT).to(device), kwargs_on(device, kwargs)
        with matmul_precision("highest"):
            return sampling.sample_all(
                model, requests, keys, eos_token_id, max_new_tokens=24, **on_device
            )

    # As end-of-text the token of most rows, so that rows finish soon and leave the batch.
    unfinished, _ = respond(CPU, -1)
    n_rows = [sum(token in response[:15] for response in unfinished) for token in range(V)]
    eos_token_id = int(np.argmax(n_rows))
    expected, expected_log_probs = respond(CPU, eos_token_id)
    responses, log_probs = respond(GPU, eos_token_id)
    assert sum(len(response) < 16 for response in expected) >= 3
    assert responses == expected
    for values, expected_values in zip(log_probs, expected_log_probs, strict=True):
        assert values == pytest.approx(expected_values, abs=1e-3)


def count_synchronizations(function, *args):
    """How often a function makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(w.message) for w in caught)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"no_repeat_ngram": 6}, {"top_k": 20, "top_p": 0.9}, SAMPLING_KWARGS["mixture"]],
)
def test_sampling_synchronizes_only_at_its_checks(kwargs):
    """One check for finished rows per interval, and none after the last token."""
    model, on_gpu = tiny_model(STUDENT).to(GPU), kwargs_on(GPU, kwargs)
    requests = [[3, 1, 4], [1, 5, 9, 2, 6], list(range(50))]
    interval = sample.check_interval(GPU)

    def sample_tokens(max_new_tokens):
        uniforms = np.stack([sample.row_uniforms(max_new_tokens, n) for n in range(len(requests))])
        responses, _ = sample.sample(model, requests, uniforms, -1, max_new_tokens, **on_gpu)
        assert [len(response) for response in responses] == [max_new_tokens] * len(requests)

    sample_tokens(interval)  # a first call may load kernels
    counts = [count_synchronizations(sample_tokens, n * interval) for n in (1, 2, 8)]
    per_check = counts[1] - counts[0]
    print({"kwargs": list(kwargs), "synchronizations of 1, 2 and 8 intervals": counts})
    assert 1 <= per_check <= 2
    assert counts[2] - counts[0] == 7 * per_check


def test_a_synchronization_is_counted():
    x = torch.ones(3, device=GPU)
    assert count_synchronizations(torch.add, x, 1) == 0
    assert count_synchronizations(float, x.sum()) >= 1


def logits_with_impossible_tokens(rng, n_rows, vocab_size=50_257):
    """Logits (B, V) of which many are -inf: scattered, and in runs at both ends."""
    logits = 3 * torch.randn(n_rows, vocab_size, generator=rng)
    logits[torch.rand(n_rows, vocab_size, generator=rng) < 0.3] = -torch.inf
    logits[:, :1500] = -torch.inf
    logits[:, -1500:] = -torch.inf
    return logits.to(GPU)


@pytest.mark.parametrize("n_rows", [1, 7, 512])
def test_no_impossible_token_is_sampled(n_rows):
    rng = torch.Generator().manual_seed(n_rows)
    logits = logits_with_impossible_tokens(rng, n_rows)
    cdf = logits.double().softmax(-1).cumsum(-1)
    for number in [0.0, 1 - 2.0**-24, *torch.rand(20, generator=rng).tolist()]:
        # The same number for all rows, then another one for each.
        for u in (torch.full((n_rows,), number), torch.rand(n_rows, generator=rng)):
            u = u.to(GPU)
            tokens, log_probs = sample.sample_next_token(logits, u)
            assert torch.isfinite(log_probs).all()
            assert torch.isfinite(logits.gather(1, tokens[:, None])).all()
            # u is in the token's part of the CDF, up to the rounding errors of 50,257 sums.
            end = cdf.gather(1, tokens[:, None])[:, 0]
            assert (u <= end + 2e-5).all()
            assert (u >= end - log_probs.exp() - 2e-5).all()


def test_tokens_have_the_frequencies_of_the_distribution():
    """With evenly spaced uniforms, up to one sample. Cumulative sums show that no range of tokens
    gets too many."""
    rng = torch.Generator().manual_seed(3)
    logits = logits_with_impossible_tokens(rng, 1)
    n = 4096
    evenly_spaced = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = [
        sample.sample_next_token(logits.expand(512, -1), u.float().to(GPU))[0]
        for u in evenly_spaced[torch.randperm(n, generator=rng)].split(512)
    ]
    counts = torch.bincount(torch.cat(tokens), minlength=logits.shape[-1]).double()
    expected = n * logits[0].double().softmax(-1)
    assert (counts.cumsum(0) - expected.cumsum(0)).abs().max() < 1.5
    assert counts[expected == 0].sum() == 0


def test_the_batch_size_depends_on_the_total_memory_and_not_on_the_free_memory():
    model = tiny_model(STUDENT).to(GPU)
    free, total = torch.cuda.mem_get_info()
    before = sampling.sampling_batch_size([model], 10**12, 24, "bfloat16")
    occupied = torch.empty(free // 2, dtype=torch.uint8, device=GPU)
    assert torch.cuda.mem_get_info()[0] < 0.6 * free
    assert sampling.sampling_batch_size([model], 10**12, 24, "bfloat16") == before
    del occupied
    torch.cuda.empty_cache()
    # The keys and values of a row, of two bytes each.
    row_bytes = 2 * 2 * STUDENT.n_layer * STUDENT.n_embd * (MAX_REQUEST + 24)
    assert before == pytest.approx(sampling.CACHE_SHARE * total / row_bytes, rel=0.05)


# --- A bfloat16 decode ---

REQUESTS = [[3, 1, 4, 1, 5], [9, 2], list(range(3, 60)), [7, 7, 7]]


def decode_in_bfloat16(model, n_new):
    """Greedy responses with a cache, and the logits (n_new, B, V) of each of their tokens."""
    logits, step = [], sample.Decoder.step

    def recording_step(decoder, *args, **kwargs):
        logits.append(step(decoder, *args, **kwargs))
        return logits[-1].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample.Decoder, "step", recording_step)
        responses, _ = sample.sample(model, REQUESTS, None, -1, n_new, dtype="bfloat16")
    return responses, torch.stack(logits).cpu()


def test_a_bfloat16_decode_has_the_logits_of_forwards_without_a_cache():
    """bfloat16 has 8 bits: two ways to compute a logit differ by about 1 % of the logits' spread.
    So a greedy token is the most likely one of the forward, or nearly so."""
    model, n_new = tiny_model(STUDENT).to(GPU), 40
    with matmul_precision("high"):
        responses, logits = decode_in_bfloat16(model, n_new)
        errors, margins = [], []
        for row, (x, y) in enumerate(zip(REQUESTS, responses, strict=True)):
            with torch.no_grad(), precision(GPU, "bfloat16"):
                hidden = model(torch.tensor([x + y], device=GPU))
            expected = model.logits(hidden)[0, len(x) - 1 : -1].cpu()  # (n_new, V)
            errors.append((logits[:, row] - expected).std() / expected.std())
            chosen = expected.gather(1, torch.tensor(y)[:, None])[:, 0]
            margins.append((expected.max(dim=1).values - chosen).max() / expected.std())
    print({"errors": [float(e) for e in errors], "margins": [float(m) for m in margins]})
    assert max(errors) < 0.02
    assert max(margins) < 0.1


def test_no_kernel_of_a_bfloat16_decode_is_cudnns():
    """It would build a plan for every length, which takes longer than the whole decode."""
    dist.init_process()
    model = tiny_model(STUDENT).to(GPU)
    decode_in_bfloat16(model, 4)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        decode_in_bfloat16(model, 16)
    names = {event.key for event in profile.key_averages()}
    attention = [name for name in names if "attention" in name or "fmha" in name]
    print(attention)
    assert attention
    assert not [name for name in names if "cudnn" in name.lower()]


# --- Chunks of the loss, and dropout ---


def test_a_loss_in_several_chunks_has_the_gradients_of_a_single_one(monkeypatch):
    """At GPT-2's vocabulary, in float32. The chunks have 134 MB, 667 tokens each."""
    rng = torch.Generator().manual_seed(4)
    n, width, vocab = 1500, 128, 50_257
    hidden, other = (torch.randn(n, width, generator=rng).to(GPU) for _ in range(2))
    head = (0.1 * torch.randn(vocab, width, generator=rng)).to(GPU)

    def loss_and_gradients():
        h, W = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss = losses.sum_over_tokens(losses.student_loss, (h, W), (other, head))
        loss.backward()
        return loss.detach(), h.grad, W.grad

    with matmul_precision("highest"):
        chunked = loss_and_gradients()
        monkeypatch.setattr(losses, "GPU_BYTES", 2**30)
        whole = loss_and_gradients()
    for a, b in zip(chunked, whole, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


def test_dropout_in_attention_follows_the_seed_and_keeps_the_mean():
    model = tiny_model(replace(STUDENT, n_layer=1, dropout=0.2)).to(GPU)
    attention = model.h[0].attn.train()
    x = torch.randn(1, 300, STUDENT.n_embd, generator=torch.Generator().manual_seed(5)).to(GPU)

    def attend(seed):
        torch.manual_seed(seed)
        with torch.no_grad(), precision(GPU, "bfloat16"):
            return attention(x, None, None, None).float()

    first = attend(1)
    assert torch.equal(attend(1), first)
    assert not torch.equal(attend(2), first)
    mean = torch.stack([attend(seed) for seed in range(400)]).mean(0)
    attention.eval()
    exact = attend(0)
    assert float((first - exact).norm() / exact.norm()) > 0.1
    assert float((mean - exact).norm() / exact.norm()) < 0.1


# --- Commands ---

DEMO = ("--data", "demo", "--train-rows", 64, "--dev-rows", 8)
TIMEOUT = 300  # seconds of a command
LM_DATA = ROOT / "docs" / "reference.md"  # any plain text
# The methods after pre-training, with what they need besides the demo's models
STAGES = {method: () for method in METHODS if method != "pretrain"}
STAGES["minillm"] = ("--lm-data", LM_DATA)
# With deterministic algorithms, a resumed run has the bits of one that was never stopped. Without
# them, the backward pass of a fused attention sums in an order that the GPU chooses, if a row has
# more than one block of keys. It ignores a mode that only warns, and `cumsum` in sampling has no
# deterministic form: so the mode is strict in backward passes only.
DETERMINISTIC = """
import runpy, sys
import torch
backward = torch.Tensor.backward

def deterministic_backward(*args, **kwargs):
    torch.use_deterministic_algorithms(True)
    backward(*args, **kwargs)
    torch.use_deterministic_algorithms(True, warn_only=True)

torch.use_deterministic_algorithms(True, warn_only=True)
torch.Tensor.backward = deterministic_backward
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
COLLECTIVES = """
import json, sys
import torch
from data.process import dist

device, _ = dist.init_process()
found = {"ranks": torch.distributed.get_world_size(), "device": device.type}
for name, x in {"gpu": torch.ones(3, device=device), "cpu": torch.ones(3)}.items():
    torch.distributed.all_reduce(x)
    found[name] = x.tolist()
found["objects"] = [None] * found["ranks"]
torch.distributed.all_gather_object(found["objects"], {"a": [1, None]})
torch.distributed.broadcast_object_list(found["objects"], src=0)
print(json.dumps(found))
dist.shutdown()
"""


class Command:
    """`python arguments...` in the project's directory, with the GPU. Its output goes to files in a
    directory of its own, so that nothing has to read it while it runs."""

    def __init__(self, directory, *arguments):
        directory.mkdir()
        self.directory = directory
        environment = {
            **os.environ,
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # for deterministic products
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "PYTHONPATH": str(ROOT),
        }
        with open(directory / "stdout", "w") as out, open(directory / "stderr", "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait(self):
        """The exit status, negative for a signal, when the command has ended."""
        return self.process.wait(TIMEOUT)

    def stop(self):
        """Kill the command and its child processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def stdout(self):
        return (self.directory / "stdout").read_text()

    @property
    def stderr(self):
        return (self.directory / "stderr").read_text()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts a Command. All are stopped after the tests of this file."""
    commands = []

    def start_command(*arguments):
        directory = tmp_path_factory.mktemp("commands") / "command"
        commands.append(Command(directory, *arguments))
        return commands[-1]

    yield start_command
    for command in commands:
        command.stop()


@dataclass
class Demo:
    """Finished commands, all on the same stages."""

    out: Path
    commands: dict

    def run(self, kind):
        """The directory of the only run of a kind."""
        [directory] = self.out.glob(f"{kind}-*")
        return directory


@pytest.fixture(scope="module")
def demo(start, tmp_path_factory):
    """PromptKD with its earlier stages; then, in parallel, all commands that need these."""
    directory = tmp_path_factory.mktemp("demo")
    out = directory / "out"

    def train_on_a_rank(method):
        options = ("--method", method, *DEMO, "--steps", 3, *STAGES[method], "--out", out)
        return start(*torchrun(1, "train.py", *options))

    commands = {"promptkd": train_on_a_rank("promptkd")}
    assert commands["promptkd"].wait() == 0, commands["promptkd"].stderr
    found = Demo(out, commands)
    for method in STAGES:
        if method not in commands:
            commands[method] = train_on_a_rank(method)
    script = directory / "collectives.py"
    script.write_text(COLLECTIVES)
    commands["collectives"] = start(*torchrun(1, script))
    student, teacher = found.run("promptkd"), found.run("teacher")
    instruction = ("--instruction", "sort: the dog the cat", "--max-new", 8)
    commands["sample"] = start("sample.py", student, *instruction)
    few = ("--data", "demo", "--rows", 6, "--out")
    commands["evaluate"] = start(
        "evaluate.py", student, "--seeds", 10, *few, directory / "evaluation"
    )
    models = ("--teacher", teacher, "--students", student, "--samples", 1, "--steps", 12)
    commands["exposure_bias"] = start("exposure_bias.py", *models, *few, directory / "exposure")
    for name, command in commands.items():
        assert command.wait() is not None, name
    return found


def default_dtype():
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def metrics_of(directory):
    """The complete lines of a run's metrics.jsonl so far."""
    path = directory / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize("method", STAGES)
def test_every_method_trains_on_one_rank_over_nccl(demo, method):
    command = demo.commands[method]
    assert command.wait() == 0, command.stderr
    directory = demo.run(method)
    names = {path.name for path in (directory / "best").iterdir()}
    assert {"config.json", "model.safetensors", "vocab.json", "merges.txt"} <= names
    assert ("prompt.safetensors" in names) == (method == "promptkd")
    record = json.loads((directory / "run.json").read_text())
    assert record["hours"] > 0 and not (directory / "state").exists()
    assert (record["device"], record["ranks"]) == (GPU.type, 1)
    assert record["settings"]["dtype"] == default_dtype()
    lines = [line for line in metrics_of(directory) if line["step"]]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert all(math.isfinite(x) for x in line.values() if isinstance(x, float))
        assert line["memory_reserved_gb"] >= line["memory_allocated_gb"] > 0
        assert {"student"} <= line["seconds"].keys()


def test_the_methods_share_the_stages(demo):
    """The first command trains each stage, and the others skip it."""
    sharing = {"teacher": ("kd", "seqkd", "gkd", "minillm"), "init": ("gkd", "minillm")}
    for kind, methods in sharing.items():
        for method in methods:
            assert f"{demo.run(kind)}: complete, skipped\n" in demo.commands[method].stdout


def test_objects_and_tensors_have_their_backends_in_one_group(demo):
    """What ranks exchange, which a run on one rank skips."""
    command = demo.commands["collectives"]
    assert command.wait() == 0, command.stderr
    assert json.loads(command.stdout) == {
        "ranks": 1,
        "device": GPU.type,
        "gpu": [1, 1, 1],
        "cpu": [1, 1, 1],
        "objects": [{"a": [1, None]}],
    }


@pytest.mark.parametrize("name", ["sample", "evaluate", "exposure_bias"])
def test_the_first_line_on_standard_error_names_gpu_ranks_and_precision(demo, name):
    command = demo.commands[name]
    assert command.wait() == 0, command.stderr
    dtype = "float32" if name == "exposure_bias" else default_dtype()
    device = torch.cuda.get_device_name()
    first, *others = command.stderr.splitlines()
    assert first == f"device: {device}; ranks: 1; precision: {dtype}"
    assert not any(line.startswith(("device:", "warning:")) for line in others)
    assert command.stdout


# --- Killed ---

TOTAL_STEPS = 16  # four per epoch


def wait_for_step(command, out, step):
    """Wait until a run of PromptKD has written the metrics of a step."""
    for _ in range(TIMEOUT * 100):
        runs = list(out.glob("promptkd-*"))
        if runs and metrics_of(runs[0]) and metrics_of(runs[0])[-1]["step"] >= step:
            return
        assert command.process.poll() is None, command.stderr
        time.sleep(0.01)
    raise TimeoutError(f"no step {step} within {TIMEOUT} seconds")


@pytest.fixture(scope="module")
def complete_and_killed(start, demo):
    """A run that was never stopped; and one that received SIGTERM, was resumed, received SIGKILL
    and was resumed again. Returns both directories and the three commands of the second run."""

    data = demo.out.parent / "long rows"
    words = "the dog the cat a small bird one old house two green trees " * 8  # 234 tokens
    row = {"input": f"{words} the dog the cat a small bird", "output": "a dog"}
    for name, n in (("train", 64), ("dev", 8), ("test", 1)):
        write_rows(data / f"{name}.jsonl", [row | {"instruction": f"sort {i}"} for i in range(n)])

    def train_deterministically(out):
        options = ("--init", demo.run("init"), "--sft-teacher", demo.run("teacher"))
        options += ("--data", data, "--lr", 0.01)
        options += ("--global-batch", 16, "--steps", TOTAL_STEPS, "--save-every", 2, "--keep", 1)
        return start("-c", DETERMINISTIC, "train.py", *options, "--out", out)

    complete_out, killed_out = demo.out.parent / "complete", demo.out.parent / "killed"
    complete = train_deterministically(complete_out)
    attempts = []
    for number, step in ((signal.SIGTERM, 3), (signal.SIGKILL, 8)):
        attempts.append(train_deterministically(killed_out))
        wait_for_step(attempts[-1], killed_out, step)
        attempts[-1].process.send_signal(number)
        attempts[-1].wait()
    attempts.append(train_deterministically(killed_out))
    for command in (complete, attempts[-1]):
        assert command.wait() == 0, command.stderr
    [complete], [killed] = (list(out.glob("promptkd-*")) for out in (complete_out, killed_out))
    return complete, killed, attempts


def test_sigterm_saves_and_sigkill_does_not_and_both_runs_resume(complete_and_killed):
    _, _, (terminated, killed, last) = complete_and_killed
    assert terminated.wait() == 128 + signal.SIGTERM
    [saved] = re.findall(r"stopped by SIGTERM, saved at step (\d+);", terminated.stdout)
    assert f"resuming after step {saved}\n" in killed.stdout
    assert killed.wait() == -signal.SIGKILL
    [resumed] = re.findall(r"resuming after step (\d+)\n", last.stdout)
    assert int(saved) >= 3 and int(resumed) >= 6


def test_a_killed_run_ends_with_the_weights_of_one_that_never_stopped(complete_and_killed):
    """The same bits, see DETERMINISTIC. If they differ, the message has the distance, relative to
    the distance from the initial weights."""
    complete, killed, _ = complete_and_killed
    init = Path(json.loads((complete / "run.json").read_text())["settings"]["student"]) / "best"
    start = load_file(init / "model.safetensors")
    for name in ("best", f"kept/step-{TOTAL_STEPS:06d}"):
        weights, resumed = (
            load_file(run / name / "model.safetensors") for run in (complete, killed)
        )
        trained = math.sqrt(sum(float((w - start[k]).norm() ** 2) for k, w in weights.items()))
        error = math.sqrt(sum(float((w - resumed[k]).norm() ** 2) for k, w in weights.items()))
        assert trained > 0.1
        assert error == 0, f"{name}: relative error {error / trained}"
        prompts = [
            load_file(run / name / "prompt.safetensors")["prompt"] for run in (complete, killed)
        ]
        assert torch.equal(*prompts), name


def test_a_killed_run_has_the_losses_of_one_that_never_stopped(complete_and_killed):
    complete, killed, _ = complete_and_killed
    others = ("seconds", "tokens_per_second", "memory_allocated_gb", "memory_reserved_gb")
    expected, metrics = (
        [{k: v for k, v in step.items() if k not in others} for step in metrics_of(run)]
        for run in (complete, killed)
    )
    assert [step["step"] for step in expected] == list(range(TOTAL_STEPS + 1))
    assert metrics == expected


# --- Two GPUs ---

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def on_one_and_two(start, demo):
    """PromptKD on one rank; on two; and on two, stopped, then resumed on one. The three
    directories, and the commands of the last run."""

    def train_on(n_ranks, name):
        options = ("--init", demo.run("init"), "--sft-teacher", demo.run("teacher"), *DEMO)
        options += ("--global-batch", 16, "--steps", TOTAL_STEPS, "--save-every", 2, "--keep", 1)
        out = demo.out.parent / name
        return start(*torchrun(n_ranks, "train.py", *options, "--dtype", "float32", "--out", out))

    commands = [train_on(1, "one"), train_on(2, "two"), train_on(2, "moved")]
    wait_for_step(commands[-1], demo.out.parent / "moved", 3)
    commands[-1].process.send_signal(signal.SIGTERM)
    commands[-1].wait()
    commands.append(train_on(1, "moved"))
    for command in (*commands[:2], commands[-1]):
        assert command.wait() == 0, command.stderr
    found = [next((demo.out.parent / n).glob("promptkd-*")) for n in ("one", "two", "moved")]
    return found, commands[2:]


@two_gpus
def test_all_ranks_sum_and_gather(start, tmp_path):
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES)
    command = start(*torchrun(2, script))
    assert command.wait() == 0, command.stderr
    for line in command.stdout.splitlines():
        found = json.loads(line)
        assert (found["ranks"], found["gpu"], found["cpu"]) == (2, [2, 2, 2], [2, 2, 2])
        assert found["objects"] == [{"a": [1, None]}] * 2
    assert len(command.stdout.splitlines()) == 2


@two_gpus
@pytest.mark.parametrize("i", [1, 2], ids=["two ranks", "two ranks, resumed on one"])
def test_a_run_on_two_ranks_has_the_losses_of_a_run_on_one(on_one_and_two, i):
    """Sharded AdamW, its states gathered through the CPU, sums over ranks. Sums in another order
    may change a sampled token, so later steps are compared loosely."""
    runs, (stopped, resumed) = on_one_and_two
    expected, found = metrics_of(runs[0]), metrics_of(runs[i])
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(found, expected):
        for name in ("loss", "prompt_loss", "val_loss"):
            if name in b:
                assert a[name] == pytest.approx(b[name], rel=0.01 if b["step"] < 2 else 0.2), name
    assert stopped.wait() != 0
    assert re.search(r"resuming after step \d+\n", resumed.stdout)
