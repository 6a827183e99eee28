"""AdamW with its states sharded over gloo ranks: the bits of plain AdamW, states that any number of
ranks can resume, and what each rank holds."""

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch._dynamo  # as the first optimizer does: here once, and not in every rank
from helpers import Interrupted, fork_ranks, free_port, stop_in_step, wait_for
from memory import fake_ranks
from pretended_gpu import GPU, pretended_gpu
from test_resume import no_plots, outcome, without  # noqa: F401
from test_train import (  # noqa: F401
    CPU,
    TOKENIZER,
    few_steps,
    promptkd_settings,
    settings,
    student,
    teacher,
    world,
)
from torch.distributed.optim import ZeroRedundancyOptimizer

import train
from data.process import dist
from data.runs import stages, states
from data.runs.optim import (
    adamw,
    clip_and_step,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)

MICRO_BATCH_TOKENS = 300  # two or three rows: several micro-batches per step, also on four ranks
N_STEPS, STOP_STEP = 5, 3


def on_ranks(n, directory, function):
    """Call a function on n ranks, 1 without a launcher. Returns the results in order of ranks."""
    directory.mkdir(parents=True, exist_ok=True)

    def on_each_rank():
        dist.init_process()
        torch.save(function(), directory / f"{dist.rank()}.pt")
        dist.shutdown()

    statuses = wait_for(fork_ranks(on_each_rank, n, directory / "log"), 120)
    logs = [directory / f"log{rank}" for rank in range(n)]
    assert statuses == [0] * n, "".join(map(Path.read_text, logs))
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(n)]


def held_states(optimizer):
    """The states that this rank holds, {number of the parameter: {name: tensor}}, and how many are
    held besides by the wrapper that shards them."""
    is_sharded = isinstance(optimizer, ZeroRedundancyOptimizer)
    held = optimizer.optim.state if is_sharded else optimizer.state
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {i: dict(held[p]) for i, p in enumerate(parameters) if p in held}
    return states, len(optimizer.state) if is_sharded else 0


def check_same(a, b, path="state"):
    """The same types, keys, shapes, dtypes and bits."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            check_same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            check_same(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


# ---- training runs -------------------------------------------------------------------------------


def stage_settings(method, student, teacher, **values):
    values |= {"global_batch_size": 12, "steps": N_STEPS, "lr": 0.01}
    values |= {"eval_interval": 3, "max_dev_rows": 2}
    if method == "promptkd":
        return promptkd_settings(student, teacher, **values)
    return settings(method=method, student=str(student), **values)


def train_stage(out, s, stop_step=None):
    """Train or resume a stage that saves its state after every step, and keep copies of all states.
    stop_step: the step t in which it is interrupted. Returns the steps and states that were loaded.
    """
    write_state, load_state, loaded = states.write_state, train.load_state, []

    def copying(path, state):
        write_state(path, state)
        (out / "states").mkdir(exist_ok=True)
        shutil.copy(path, out / "states")

    def watching(run, directory):
        progress = load_state(run, directory)
        held, n_others = held_states(run.optimizer)
        copies = {i: {k: v.clone() for k, v in values.items()} for i, values in held.items()}
        loaded.append((progress["step"], copies, n_others))
        return progress

    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, s.method, stop_step)
        patch.setattr(states, "write_state", copying)
        patch.setattr(train, "load_state", watching)
        try:
            train.run_stage("stage", s, out, MICRO_BATCH_TOKENS, CPU, save_every=1)
        except Interrupted:
            assert stop_step is not None
    return loaded


def read_states(out):
    """The copies of a run's states by step, without the hours."""
    states = {}
    for path in (out / "states").iterdir():
        state = torch.load(path, weights_only=True)
        state["progress"] = without(state["progress"], ["hours"])
        states[state["progress"]["step"]] = state
    return states


@pytest.fixture(scope="module")
def trained(tmp_path_factory, student, teacher):
    """PromptKD on three ranks, by kind: "sharded", "plain", and "stopped" and resumed."""
    directory = tmp_path_factory.mktemp("three ranks")

    def plain_adamw(parameters, s, sharded=False):
        return adamw(parameters, s)

    def train_all():
        s = stage_settings("promptkd", student, teacher, dropout=0.2)
        train_stage(directory / "sharded", s)
        train_stage(directory / "stopped", s, stop_step=STOP_STEP)
        train_stage(directory / "stopped", s)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "adamw", plain_adamw)
            train_stage(directory / "plain", s)

    on_ranks(3, directory, train_all)
    return directory


@pytest.mark.parametrize("kind", ["sharded", "stopped"])
def test_sharded_states_give_the_bits_of_plain_adamw(trained, kind):
    """Also if the run was stopped and resumed: metrics, best/, and every state that was saved."""
    run, plain = trained / kind, trained / "plain"
    expected = outcome(plain / "stage")
    assert {"metrics.jsonl", "run.json", "best/model.safetensors"} <= expected.keys()
    assert outcome(run / "stage") == expected
    saved = read_states(plain)
    assert saved.keys() == set(range(1, N_STEPS + 1))
    check_same(read_states(run), saved)


# ---- another number of ranks ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, student):
    """The states of a run of one rank. Dropout would depend on the number of ranks."""
    out = tmp_path_factory.mktemp("unbroken")
    train_stage(out, stage_settings("sft", student, None, dropout=0.0))
    return read_states(out)


def close(a, b, name):
    compared = torch.ones_like(a, dtype=torch.bool)
    if name.endswith("c_attn.bias"):
        # Biases of keys change no attention weight. Their gradient is rounding only, which AdamW
        # scales up to full steps.
        compared[len(a) // 3 : 2 * len(a) // 3] = False
    return torch.allclose(a[compared], b[compared], rtol=0, atol=1e-5)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (4, 2)])
def test_a_state_is_resumed_by_another_number_of_ranks(tmp_path, student, unbroken, before, after):
    s, out = stage_settings("sft", student, None, dropout=0.0), tmp_path / "out"
    on_ranks(before, tmp_path / "before", lambda: train_stage(out, s, stop_step=STOP_STEP))
    saved = read_states(out)[STOP_STEP]["optimizer"]["state"]
    results = on_ranks(after, tmp_path / "after", lambda: train_stage(out, s))
    loaded = {}
    for [(step, held, n_others)] in results:
        assert (step, n_others) == (STOP_STEP, 0)
        assert held and not held.keys() & loaded.keys()  # each state has one owner
        loaded |= held
    check_same(loaded, saved)
    last, expected = read_states(out)[N_STEPS], unbroken[N_STEPS]
    start = unbroken[STOP_STEP]["student"]
    for name, w in last["student"].items():
        assert close(w, expected["student"][name], name), name
        assert not close(w, start[name], name), name  # the tolerance is below what training changes


# ---- what each rank holds ------------------------------------------------------------------------


def build_and_step(student, n_steps=3):
    """A run of SFT after some steps. Yields it before the first step and after each of them."""
    s = stage_settings("sft", student, None)
    run = train.build(s, few_steps(12), TOKENIZER, MICRO_BATCH_TOKENS, CPU)
    yield run
    examples = stages.load_data(s).epoch_examples(0)
    for t in range(n_steps):
        train.train_step(run, dist.shard(examples[12 * t : 12 * (t + 1)]), t)
        yield run


def test_each_rank_holds_the_states_of_its_part(tmp_path, student):
    def take_steps():
        *_, run = build_and_step(student)
        return held_states(run.optimizer)

    results = on_ranks(3, tmp_path, take_steps)
    numbers = [i for held, _ in results for i in held]
    n_parameters = len(list(train.load_model(student, CPU)[0].parameters()))
    assert sorted(numbers) == list(range(n_parameters))
    for held, n_others in results:
        assert held and n_others == 0
        for values in held.values():
            assert values.keys() == {"step", "exp_avg", "exp_avg_sq"} and values["step"] == 3


def test_rank_0_gathers_the_state_of_plain_adamw(tmp_path, student):
    def take_steps():
        model, _ = train.load_model(student, CPU)
        copy, _ = train.load_model(student, CPU)
        s = stage_settings("sft", student, None)
        sharded, plain = adamw(model.parameters(), s, sharded=True), adamw(copy.parameters(), s)
        generator = torch.Generator().manual_seed(1)
        for t in range(3):
            for p, q in zip(model.parameters(), copy.parameters()):
                p.grad = torch.randn(p.shape, generator=generator)
                q.grad = p.grad.clone()
            for optimizer in (sharded, plain):
                set_learning_rate(optimizer, 0.01 / (t + 1))
                clip_and_step(optimizer)
        return optimizer_state(sharded), plain.state_dict(), held_states(sharded)[0]

    results = on_ranks(3, tmp_path, take_steps)
    for rank, (state, plain, held) in enumerate(results):
        if rank > 0:
            assert 0 < len(held) < len(plain["state"])
            plain["state"] = {i: plain["state"][i] if i in held else None for i in plain["state"]}
        check_same(state, plain)


def test_a_step_sends_one_broadcast_per_rank(student):
    """Not one per parameter: GPT-2 XL has 580."""
    distributed = torch.distributed
    with fake_ranks(2), patch.object(distributed, "broadcast", wraps=distributed.broadcast) as sent:
        model, _ = train.load_model(student, CPU)
        optimizer = adamw(model.parameters(), stage_settings("sft", student, None), sharded=True)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert sent.call_count == 2


def test_the_step_is_loaded_to_the_parameters_device():
    """As fused AdamW needs it. ZeroRedundancyOptimizer leaves it on the CPU."""
    with fake_ranks(2), pretended_gpu():
        shapes = [(3, 4), (4, 5), (5,), (6,)]
        parameters = [torch.nn.Parameter(torch.zeros(shape, device=GPU)) for shape in shapes]
        optimizer = adamw(parameters, SimpleNamespace(beta2=0.9, weight_decay=0.1), sharded=True)
        state = torch.optim.Optimizer.state_dict(optimizer)
        for i, shape in enumerate(shapes):
            moments = {"exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
            state["state"][i] = {"step": torch.tensor(1.0)} | moments
        load_optimizer_state(optimizer, state)
        held, n_others = held_states(optimizer)
        assert held and n_others == 0
        for values in held.values():
            devices = {name: value.device.type for name, value in values.items()}
            assert devices == dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), GPU.type)


# ---- gradients -----------------------------------------------------------------------------------


# As torchrun sets it; fork_ranks gives a single rank none.
SINGLE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
SINGLE_RANK |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "forked"}


def gradient_places(student):
    """The addresses of each gradient after every backward pass and step; whether the gradients are
    zero after every step; and the storages that hold them, {address: bytes}."""
    places, are_zero = {}, []

    def note_address(i, p):
        places.setdefault(i, []).append(p.grad.data_ptr())

    for n, run in enumerate(build_and_step(student)):
        for i, p in enumerate(run.student.parameters()):
            note_address(i, p)
            are_zero.append(not p.grad.any())
            if n == 0:
                p.register_post_accumulate_grad_hook(partial(note_address, i))
    storages = [p.grad.untyped_storage() for p in run.student.parameters()]
    return places, all(are_zero), {s.data_ptr(): s.nbytes() for s in storages}


@pytest.mark.parametrize("n", [1, 2])
def test_under_ddp_gradients_stay_in_the_buckets(tmp_path, student, monkeypatch, n):
    """Also in the micro-batches whose gradients are not averaged yet, and with a single rank."""
    if n == 1:
        for name, value in SINGLE_RANK.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
    n_bytes = 4 * train.load_model(student, CPU)[0].n_parameters()
    for places, are_zero, storages in on_ranks(n, tmp_path, lambda: gradient_places(student)):
        assert are_zero
        assert list(storages.values()) == [n_bytes]  # one bucket, and nothing next to it
        for addresses in places.values():
            assert len(addresses) >= 4 + 3 * 2 and len(set(addresses)) == 1


def test_without_ddp_gradients_are_freed_after_a_step(student):
    runs = build_and_step(student, n_steps=1)
    before, after = ([p.grad for p in run.student.parameters()] for run in runs)
    assert set(before) == set(after) == {None}
