"""On a GPU: the optimizer steps and sampling against the CPU's, the logits under an offset, and
every stage as a command on one rank over NCCL. All of it skips where there is no GPU.

docs/gpu.md says how to run this on a machine with a GPU and without a network.
"""

import json
import math
import os
import re
import signal
import socket
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
from helpers import ROOT, soft_prompt, tiny_model, tiny_tokenizer, write_checkpoint
from safetensors.torch import load_file

import sample
import train
from data.rows import MAX_REQUEST, Example
from model import Config, head_logits, precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
CPU = torch.device("cpu")
V = tiny_tokenizer().n_vocab
# Heads of 64, as GPT-2's, so that attention takes the kernels that GPT-2 takes.
STUDENT = Config(n_layer=2, n_embd=128, n_head=2, vocab_size=V, n_positions=512, dropout=0.0)
TEACHER = Config(n_layer=3, n_embd=192, n_head=3, vocab_size=V, n_positions=512, dropout=0.0)
# Tokens of request and response. The longest row is over 128, the block of a fused attention.
LENGTHS = [(5, 40), (150, 3), (20, 12), (9, 90), (60, 7), (33, 0), (2, 25), (12, 1)]


@contextmanager
def matmul_precision(name):
    """Of float32 products: "highest" keeps float32 inputs, "high", which the commands set on a GPU,
    rounds them to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- one optimizer step of each method -----------------------------------------------------------

METHODS = ["sft", "kd", "minillm", "gkd", "promptkd"]  # pretrain's step is sft's, seqkd's is kd's


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The directories of a student and a teacher, and a file of plain text for MiniLLM."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in {"student": STUDENT, "teacher": TEACHER}.items():
        write_checkpoint(folder / name, config, tiny_tokenizer())
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"A task that describes response {n}." for n in range(60)))
    return SimpleNamespace(student=folder / "student", teacher=folder / "teacher", text=text)


def make_examples():
    rng = np.random.default_rng(1)
    return [
        Example(i, rng.integers(0, V, m).tolist(), rng.integers(0, V, n).tolist())
        for i, (m, n) in enumerate(LENGTHS)
    ]


def make_run(method, device, dtype, models):
    """A Run on a device, made as a stage makes it."""
    values = {"teacher": None if method == "sft" else str(models.teacher), "max_new_tokens": 24}
    if method == "promptkd":
        values |= train.PROMPT | {"prompt_lr": 1e-3}
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
    return train.build(settings, 10, 8, tiny_tokenizer(), 3, device)


@dataclass
class Step:
    """What a step gave: metrics, clipped gradients, new weights, and the responses sampled."""

    metrics: dict
    gradients: dict  # {"student" or "prompt": a tensor for each parameter}
    weights: dict
    responses: list


def take_step(method, device, dtype, models, responses=None, examples=None):
    """One step of a new Run. responses: to be taken instead of sampling them."""
    run = make_run(method, device, dtype, models)
    gradients = {}
    sampled = []
    sample_all = train.sample_all

    def record_gradients(name, optimizer):
        def hook(optimizer, arguments, options):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            gradients[name] = [p.grad.detach().cpu().double() for p in parameters]

        optimizer.register_step_pre_hook(hook)

    def record_responses(*arguments, **options):
        given = (responses, None) if responses else sample_all(*arguments, **options)
        sampled.append(given[0])
        return given

    record_gradients("student", run.optimizer)
    if run.P is not None:
        record_gradients("prompt", run.prompt_optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "sample_all", record_responses)
        metrics = train.step(run, examples or make_examples(), 0)
    weights = {name: w.detach().cpu().double() for name, w in run.student.named_parameters()}
    if run.P is not None:
        weights["P"] = run.P.detach().cpu().double()
    return Step(metrics, gradients, weights, sampled[0] if sampled else None)


def losses_of(step):
    names = ("loss", "lm_loss", "prompt_loss", "prompt_kd", "prompt_reg", "kl_prompted_bare")
    return {name: step.metrics[name] for name in names if name in step.metrics}


@pytest.mark.parametrize("method", METHODS)
def test_a_float32_step_gives_the_losses_gradients_and_update_of_the_cpu(method, models):
    """Tolerances: sums in another order differ by about 1e-6 of themselves, which a backward pass
    through these layers enlarges; a product in TF32 would be off by 5e-4, a wrong formula by far
    more. AdamW's first update is lr times the gradient's sign, whatever the gradient's size, so
    the few entries where the gradient is rounding alone may go the other way."""
    with matmul_precision("highest"):
        on_gpu = take_step(method, GPU, "float32", models)
        on_cpu = take_step(method, CPU, "float32", models)
    distances = []
    for of, wanted in on_cpu.gradients.items():
        total_norm = torch.cat([g.flatten() for g in wanted]).norm()
        for got, g in zip(on_gpu.gradients[of], wanted, strict=True):
            distances.append(float((got - g).norm() / (g.norm() + 1e-3 * total_norm)))
    lr = on_cpu.metrics["lr"]
    off = [(on_gpu.weights[name] - w).abs() > 0.01 * lr for name, w in on_cpu.weights.items()]
    share_off = float(torch.cat([x.flatten() for x in off]).double().mean())
    print({"method": method, "gradients": max(distances), "updates that differ": share_off})

    assert on_gpu.responses == on_cpu.responses  # the uniforms are the same
    assert on_gpu.metrics["response_tokens"] == on_cpu.metrics["response_tokens"]
    assert losses_of(on_gpu) == pytest.approx(losses_of(on_cpu), rel=1e-4)
    assert on_gpu.metrics["grad_norm"] == pytest.approx(on_cpu.metrics["grad_norm"], rel=1e-4)
    assert on_gpu.gradients.keys() == on_cpu.gradients.keys()
    assert max(distances) < 1e-4
    assert share_off < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_a_bfloat16_step_is_near_the_float32_step_of_the_cpu(method, models):
    """The responses are those that the CPU sampled: in bfloat16 some would be others."""
    with matmul_precision("highest"):
        on_cpu = take_step(method, CPU, "float32", models)
    with matmul_precision("high"):
        on_gpu = take_step(method, GPU, "bfloat16", models, on_cpu.responses)
    cosines = {}
    for of, wanted in on_cpu.gradients.items():
        got = torch.cat([g.flatten() for g in on_gpu.gradients[of]])
        wanted = torch.cat([g.flatten() for g in wanted])
        cosines[of] = float(F.cosine_similarity(got, wanted, dim=0))
    off = {name: on_gpu.metrics[name] / loss - 1 for name, loss in losses_of(on_cpu).items()}
    print({"method": method, "cosines": cosines, "losses off by": off})
    assert losses_of(on_gpu) == pytest.approx(losses_of(on_cpu), rel=0.01)
    assert cosines.keys() == on_gpu.gradients.keys()
    assert min(cosines.values()) >= 0.99
    assert max(cosines.values()) < 1 - 1e-9  # the blocks did multiply in bfloat16


@pytest.mark.parametrize("method", [method for method in METHODS if method != "minillm"])
def test_a_window_without_any_response_token_has_loss_and_gradients_of_zero(method, models):
    """Products and sums of no rows. MiniLLM samples a token at least."""
    none = [[] for _ in LENGTHS]
    examples = [replace(e, response=[]) for e in make_examples()]
    step = take_step(method, GPU, "bfloat16", models, none, examples)
    assert set(losses_of(step).values()) == {0.0}
    for gradients in step.gradients.values():
        assert all(float(g.abs().max()) == 0 for g in gradients)


# ---- logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_logits_under_an_offset_are_float32_products_inside_autocast(padded):
    """An offset of -112, where bfloat16 numbers are 0.5 apart. It is the product of column 0, whose
    factors TF32 holds exactly. TF32 keeps 10 bits of each other factor, so that a product is off by
    2**-9 of itself at most."""
    width, vocab = 768, 5003
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, width, generator=rng)
    head = 4 / width**0.5 * torch.randn(vocab, width, generator=rng)
    hidden[:, 0], head[:, 0] = 16.0, -7.0
    exact = hidden.double() @ head.double().T  # (N, V)
    bound = 2.0**-9 * (hidden[:, 1:].abs().double() @ head[:, 1:].abs().double().T) + 0.01

    with matmul_precision("high"), torch.no_grad(), precision(GPU, "bfloat16"):
        logits = head_logits(hidden.to(GPU), head.to(GPU), padded=padded)[:, :vocab]
    assert logits.dtype == torch.float32

    def within(logits):
        error = (logits.cpu().double() - exact).abs()
        print({"padded": padded, "largest": float(error.max()), "mean": float(error.mean())})
        return bool((error <= bound).all()) and float(error.mean()) < 0.02

    assert within(logits)
    assert not within(logits.bfloat16())  # what a head in bfloat16 would give


# ---- sampling ------------------------------------------------------------------------------------

HOW = {
    "plain": {},
    "no_repeat_ngram": {"no_repeat_ngram": 2},
    "with a prompt": {"P": soft_prompt(5, STUDENT.n_embd)},
    "mixed": {"teacher_mix": (TEACHER, 0.2)},
    "top_k and top_p": {"top_k": 30, "top_p": 0.9, "temperature": 0.8},
    "greedy": {"greedy": True},
    "greedy, no_repeat": {"greedy": True, "no_repeat_ngram": 2},
}


def options_on(device, how):
    options = dict(how)
    if "P" in how:
        options["P"] = how["P"].to(device)
    if "teacher_mix" in how:
        options["teacher_mix"] = tiny_model(TEACHER).to(device), how["teacher_mix"][1]
    return options


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_sampling_gives_the_tokens_of_the_cpu(how):
    """Few rows, always the same: rounding can flip a token, but hardly ever does."""
    rng = np.random.default_rng(2)
    requests = [rng.integers(0, V, n).tolist() for n in (1, 40, 3, 17, 60, 2, 9, 25, 5, 33)]
    keys = [(10, "gpu", n) for n in range(len(requests))]

    def respond(device, eos):
        model = tiny_model(STUDENT).to(device)
        options = options_on(device, how)
        with matmul_precision("highest"):
            return sample.sample_all(model, requests, keys, eos, max_new_tokens=24, **options)

    endless, _ = respond(CPU, -1)
    rows_with = [sum(token in response[:15] for response in endless) for token in range(V)]
    eos = int(np.argmax(rows_with))  # so that rows end soon, and are dropped from the batch
    wanted, wanted_log_probs = respond(CPU, eos)
    got, log_probs = respond(GPU, eos)
    assert sum(len(response) < 16 for response in wanted) >= 3
    assert got == wanted
    for values, wanted_values in zip(log_probs, wanted_log_probs, strict=True):
        assert values == pytest.approx(wanted_values, abs=1e-3)


def count_synchronizations(function):
    """How often a function makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(w.message) for w in caught)


@pytest.mark.parametrize(
    "how", [{}, {"no_repeat_ngram": 6}, {"top_k": 20, "top_p": 0.9}, HOW["mixed"]]
)
def test_sampling_synchronizes_at_its_looks_alone(how):
    """One look at which rows have ended, every LOOK_EVERY tokens and not behind the last."""
    model = tiny_model(STUDENT).to(GPU)
    options = options_on(GPU, how)
    requests = [[3, 1, 4], [1, 5, 9, 2, 6], list(range(50))]
    every = sample.CHECK_INTERVAL["cuda"]

    def draw_tokens(max_new_tokens):
        uniforms = np.stack([sample.row_uniforms(max_new_tokens, n) for n in range(len(requests))])
        responses, _ = sample.sample(model, requests, uniforms, -1, max_new_tokens, **options)
        assert [len(response) for response in responses] == [max_new_tokens] * len(requests)

    draw_tokens(every)  # a first call may load kernels
    counts = [count_synchronizations(lambda n=n: draw_tokens(n * every)) for n in (1, 2, 8)]
    a_look = counts[1] - counts[0]
    print({"how": list(how), "synchronizations of 1, 2 and 8 times LOOK_EVERY tokens": counts})
    assert 1 <= a_look <= 2
    assert counts[2] - counts[0] == 7 * a_look


def test_the_count_of_synchronizations_sees_one():
    x = torch.ones(3, device=GPU)
    assert count_synchronizations(lambda: x + 1) == 0
    assert count_synchronizations(lambda: float(x.sum())) >= 1


def impossible_tokens(rng, n_rows, vocab=50_257):
    """Logits (B, V) in which many tokens are impossible: scattered, and in runs at both ends."""
    logits = 3 * torch.randn(n_rows, vocab, generator=rng)
    logits[torch.rand(n_rows, vocab, generator=rng) < 0.3] = -torch.inf
    logits[:, :1500] = -torch.inf
    logits[:, -1500:] = -torch.inf
    return logits.to(GPU)


@pytest.mark.parametrize("n_rows", [1, 7, 512])
def test_no_impossible_token_is_drawn(n_rows):
    rng = torch.Generator().manual_seed(n_rows)
    logits = impossible_tokens(rng, n_rows)
    cdf = logits.double().softmax(-1).cumsum(-1)
    for u in [0.0, 1 - 2.0**-24, *torch.rand(20, generator=rng).tolist()]:
        # the same for all rows, and then another for each
        for each in (torch.full((n_rows,), u), torch.rand(n_rows, generator=rng)):
            each = each.to(GPU)
            tokens, log_probs = sample.sample_next_token(logits, each)
            assert torch.isfinite(log_probs).all()
            assert torch.isfinite(logits.gather(1, tokens[:, None])).all()
            # A token's part of the CDF holds u, but for the rounding of 50,257 sums
            after = cdf.gather(1, tokens[:, None])[:, 0]
            assert (each <= after + 2e-5).all()
            assert (each >= after - log_probs.exp() - 2e-5).all()


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """Of evenly spaced uniforms each token gets its share, to within one draw; so does every range
    of tokens, which the sums from the first token on show."""
    rng = torch.Generator().manual_seed(3)
    logits = impossible_tokens(rng, 1)
    n = 4096
    evenly = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = [
        sample.sample_next_token(logits.expand(512, -1), u.float().to(GPU))[0]
        for u in evenly[torch.randperm(n, generator=rng)].split(512)
    ]
    counts = torch.bincount(torch.cat(tokens), minlength=logits.shape[-1]).double()
    wanted = n * logits[0].double().softmax(-1)
    assert (counts.cumsum(0) - wanted.cumsum(0)).abs().max() < 1.5
    assert counts[wanted == 0].sum() == 0


def test_rows_sampled_at_once_hang_on_the_total_memory_of_the_gpu():
    model = tiny_model(STUDENT).to(GPU)
    free, total = torch.cuda.mem_get_info()
    before = sample.sampling_batch_size([model], 10**12, 24, "bfloat16")
    taken = torch.empty(free // 2, dtype=torch.uint8, device=GPU)
    assert torch.cuda.mem_get_info()[0] < 0.6 * free  # so the number would be another
    assert sample.sampling_batch_size([model], 10**12, 24, "bfloat16") == before
    del taken
    torch.cuda.empty_cache()
    # keys and values of a row, of two bytes each
    row_bytes = 2 * 2 * STUDENT.n_layer * STUDENT.n_embd * (MAX_REQUEST + 24)
    assert before == pytest.approx(sample.CACHE_SHARE * total / row_bytes, rel=0.05)


# ---- commands ------------------------------------------------------------------------------------

DEMO = ("--data", "demo", "--train-rows", 64, "--dev-rows", 8)
TIMEOUT = 300  # seconds of a command
LM_DATA = ROOT / "data" / "demo" / "pretrain.jsonl"
STAGES = {
    "promptkd": (),
    "gkd": (),
    "kd": (),
    "minillm": ("--lm-data", LM_DATA),
    "seqkd": (),
    "sft": (),
}
# With deterministic algorithms, a run that is resumed has the bits of one that never stopped.
# Without, the backward pass of a fused attention adds up in an order that the GPU chooses.
DETERMINISTIC = """
import runpy, sys
import torch
torch.use_deterministic_algorithms(True, warn_only=True)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
COLLECTIVES = """
import json, sys
import torch
from data import dist

device, _ = dist.init_process()
found = {"ranks": torch.distributed.get_world_size(), "device": device.type}
for name, x in {"gpu": torch.ones(3, device=device), "cpu": torch.ones(3)}.items():
    torch.distributed.all_reduce(x)
    found[name] = x.tolist()
found["objects"] = [None]
torch.distributed.all_gather_object(found["objects"], {"a": [1, None]})
torch.distributed.broadcast_object_list(found["objects"], src=0)
print(json.dumps(found))
dist.shutdown()
"""


class Command:
    """`python arguments...` in the project's folder, which sees the GPU. What it prints goes to
    files in a folder of its own: nobody has to read them while it runs."""

    def __init__(self, folder, *arguments):
        folder.mkdir()
        self.folder = folder
        environment = {
            **os.environ,
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # for deterministic products
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "PYTHONPATH": str(ROOT),
        }
        with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait(self):
        """Wait for the end. Returns the exit status, negative for a signal."""
        return self.process.wait(TIMEOUT)

    def stop(self):
        """Kill the command and what it started, if any of it still runs."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def stdout(self):
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self):
        return (self.folder / "stderr").read_text()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts a Command. None outlives the tests of this file."""
    commands = []

    def start_command(*arguments):
        folder = tmp_path_factory.mktemp("commands") / "command"
        commands.append(Command(folder, *arguments))
        return commands[-1]

    yield start_command
    for command in commands:
        command.stop()


def torchrun(*arguments):
    """The arguments that run a script on one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ("--master_addr=127.0.0.1", f"--master_port={port}")
    return ("-m", "torch.distributed.run", "--nproc_per_node=1", *address, *arguments)


@dataclass
class Demo:
    """Commands that ran at a small shape, all on the same stages."""

    out: Path
    commands: dict

    def run(self, kind):
        """The directory of the one run of a kind."""
        [directory] = self.out.glob(f"{kind}-*")
        return directory


@pytest.fixture(scope="module")
def demo(start, tmp_path_factory):
    """PromptKD with the stages before it; then, side by side, everything that needs those."""
    folder = tmp_path_factory.mktemp("demo")
    out = folder / "out"

    def train_on_a_rank(method):
        options = ("--method", method, *DEMO, "--steps", 3, *STAGES[method], "--out", out)
        return start(*torchrun("train.py", *options))

    commands = {"promptkd": train_on_a_rank("promptkd")}
    assert commands["promptkd"].wait() == 0, commands["promptkd"].stderr
    found = Demo(out, commands)
    for method in STAGES:
        if method not in commands:
            commands[method] = train_on_a_rank(method)
    script = folder / "collectives.py"
    script.write_text(COLLECTIVES)
    commands["collectives"] = start(*torchrun(script))
    student, teacher = found.run("promptkd"), found.run("teacher")
    says = ("--instruction", "sort: the dog the cat", "--max-new", 8)
    commands["sample"] = start("sample.py", student, *says)
    few = ("--data", "demo", "--rows", 6, "--out")
    commands["evaluate"] = start("evaluate.py", student, "--seeds", 10, *few, folder / "evaluation")
    models = ("--teacher", teacher, "--students", student, "--samples", 1, "--steps", 12)
    commands["exposure_bias"] = start("exposure_bias.py", *models, *few, folder / "exposure")
    for name, command in commands.items():
        assert command.wait() is not None, name
    return found


def default_dtype():
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def metrics_of(directory):
    """The whole lines of a run's metrics.jsonl so far."""
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
    """Each stage is trained by the first command and skipped by the others."""
    sharing = {"teacher": ("kd", "seqkd", "gkd", "minillm"), "init": ("gkd", "minillm")}
    for kind, methods in sharing.items():
        for method in methods:
            assert f"{demo.run(kind)}: complete, skipped\n" in demo.commands[method].stdout


def test_objects_and_tensors_have_their_backends_in_one_group(demo):
    """What the ranks exchange, which a run on one rank spares itself."""
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


# ---- killed --------------------------------------------------------------------------------------

TOTAL = 16  # steps, four an epoch


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
def whole_and_killed(start, demo):
    """A run that was never stopped; and one that got SIGTERM, was resumed, got SIGKILL, and was
    resumed. Returns the directories of both, and the three commands of the second."""

    def train_deterministically(out):
        options = ("--init", demo.run("init"), "--sft-teacher", demo.run("teacher"), *DEMO)
        options += ("--global-batch", 16, "--steps", TOTAL, "--save-every", 2, "--keep", 1)
        return start("-c", DETERMINISTIC, "train.py", *options, "--out", out)

    whole_out, killed_out = demo.out.parent / "whole", demo.out.parent / "killed"
    whole = train_deterministically(whole_out)
    attempts = []
    for number, step in ((signal.SIGTERM, 3), (signal.SIGKILL, 8)):
        attempts.append(train_deterministically(killed_out))
        wait_for_step(attempts[-1], killed_out, step)
        attempts[-1].process.send_signal(number)
        attempts[-1].wait()
    attempts.append(train_deterministically(killed_out))
    for command in (whole, attempts[-1]):
        assert command.wait() == 0, command.stderr
    [whole], [killed] = (list(out.glob("promptkd-*")) for out in (whole_out, killed_out))
    return whole, killed, attempts


def test_sigterm_saves_and_sigkill_does_not_and_both_runs_resume(whole_and_killed):
    _, _, (terminated, killed, last) = whole_and_killed
    assert terminated.wait() == 128 + signal.SIGTERM
    [saved] = re.findall(r"stopped by SIGTERM, saved at step (\d+);", terminated.stdout)
    assert f"going on behind step {saved}\n" in killed.stdout
    assert killed.wait() == -signal.SIGKILL
    [resumed] = re.findall(r"going on behind step (\d+)\n", last.stdout)
    assert int(saved) >= 3 and int(resumed) >= 6


def test_a_killed_run_ends_with_the_weights_of_one_that_never_stopped(whole_and_killed):
    """The same bits: see DETERMINISTIC. If a GPU gives others, the message tells how far they are
    apart, as a share of the way that training went."""
    whole, killed, _ = whole_and_killed
    init = Path(json.loads((whole / "run.json").read_text())["settings"]["student"]) / "best"
    start = load_file(init / "model.safetensors")
    for where in ("best", f"kept/step-{TOTAL:06d}"):
        weights, resumed = (load_file(run / where / "model.safetensors") for run in (whole, killed))
        way = math.sqrt(sum(float((w - start[name]).norm() ** 2) for name, w in weights.items()))
        apart = math.sqrt(sum(float((w - resumed[k]).norm() ** 2) for k, w in weights.items()))
        assert way > 0.1
        assert apart == 0, f"{where}: {apart / way} of the way apart"
        prompts = [
            load_file(run / where / "prompt.safetensors")["prompt"] for run in (whole, killed)
        ]
        assert torch.equal(*prompts), where


def test_a_killed_run_has_the_losses_of_one_that_never_stopped(whole_and_killed):
    whole, killed, _ = whole_and_killed
    unlike = ("seconds", "tokens_per_second", "memory_allocated_gb", "memory_reserved_gb")
    found = [
        [{k: v for k, v in line.items() if k not in unlike} for line in metrics_of(run)]
        for run in (whole, killed)
    ]
    assert [line["step"] for line in found[0]] == list(range(TOTAL + 1))
    assert found[1] == found[0]
