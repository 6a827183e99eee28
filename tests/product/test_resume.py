"""Runs that are killed, stopped by a signal or restarted by torchrun; damaged states, changed data,
losses that are not finite, and very little data. See also the interruptions in test_train.py."""

import itertools
import json
import math
import os
import shutil
import signal

import pytest
import torch
import torture
from helpers import (
    METHODS_WITH_STEPS,
    ROOT,
    Interrupted,
    error_of,
    fork_ranks,
    interrupted_in_step,
    run_command,
    torchrun,
    wait_for,
    write_rows,
)
from test_train import (  # noqa: F401
    CPU,
    TOKENIZER,
    files,
    hub,
    metrics,
    minillm_settings,
    no_validation,
    plan,
    promptkd_settings,
    record,
    settings,
    student,
    teacher,
    world,
)

import data.sets.prepare
import train
from data.models import prompts
from data.models.checkpoint import load
from data.models.prompts import load_prompt
from data.process.errors import InputError
from data.runs import report, runs
from data.runs.methods import METHODS
from data.sets.rows import fill_template

# Fields of a line of metrics that depend on the clock and the machine
VARYING = ("tokens_per_second", "seconds", "memory_resident_gb")


def outcome(directory):
    """The content of every file below a directory, without what depends on the clock."""
    contents = {}
    for path in directory.rglob("*"):
        content = path.read_bytes() if path.is_file() else None
        if path.name == "run.json":
            content = without(json.loads(content), ["hours"])
        elif path.name == "metrics.jsonl":
            content = [without(json.loads(line), VARYING) for line in content.splitlines()]
        contents[str(path.relative_to(directory))] = content
    return contents


def without(fields, names):
    return {name: value for name, value in fields.items() if name not in names}


@pytest.fixture(scope="module", autouse=True)
def no_plots():
    """Plotting takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot_curves", lambda directory: "no plot")
        yield


# ---- killed runs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n_ranks, steps, kills, extra",
    [
        (1, 4, 2, ["--promptkd-only"]),
        (2, 4, 2, ["--promptkd-only"]),
        pytest.param(1, 80, 25, [], marks=pytest.mark.slow),
        pytest.param(2, 60, 25, [], marks=pytest.mark.slow),
    ],
    ids=["1 rank", "2 ranks", "1 rank, every stage", "2 ranks, every stage"],
)
def test_torture_a_run_killed_at_random_ends_with_the_same_bits(
    tmp_path, n_ranks, steps, kills, extra
):
    options = ("--steps", steps, "--kills", kills, "--ranks", n_ranks, *extra)
    command = [str(part) for part in (data.sets.prepare.DATA_DIR, tmp_path, *options)]
    statuses = wait_for(fork_ranks(lambda: torture.main(command), 1, tmp_path / "log"), 3000)
    log = (tmp_path / "log0").read_text()
    assert statuses == [0], log
    result = json.loads(log)
    killed = result["kills"]
    n_saving = sum(kill["saving"] for kill in killed)
    print(f"{n_ranks} ranks, {result['seconds']:.0f} s, {n_saving} kills while saving: {killed}")
    assert len(killed) == kills
    if kills > 20:
        assert {kill["stage"] for kill in killed} == set(result["stages"]) and n_saving >= 8
    whole, resumed = outcome(tmp_path / "whole" / "out"), outcome(tmp_path / "killed" / "out")
    assert resumed.keys() == whole.keys()  # no temporary file is left, and no state
    assert [path for path in whole if resumed[path] != whole[path]] == []
    n_trained = sum(not stage.startswith("responses") for stage in result["stages"])
    assert len([path for path in whole if path.endswith("best/model.safetensors")]) == n_trained


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, student, teacher):
    """The outcome of a stage of six steps, validated after every second one."""
    out = tmp_path_factory.mktemp("whole")
    train.run_stage("stage", six_steps(student, teacher), out, 380, CPU, keep=2)
    return outcome(out / "stage")


def six_steps(student, teacher):
    return promptkd_settings(
        student, teacher, steps=6, dropout=0.2, max_dev_rows=4, eval_interval=2
    )


def settings_of(method, student, teacher, **values):
    """The settings of any method on the tiny models."""
    if method == "promptkd":
        return promptkd_settings(student, teacher, **values)
    if method == "minillm":
        return minillm_settings(student, teacher, **values)
    teacher = str(teacher) if METHODS[method].needs_teacher else None
    values = METHODS[method].option_defaults() | values
    return settings(method=method, student=str(student), teacher=teacher, **values)


def interrupt(out, s, stop_step=5, **kwargs):
    """Train the stage and interrupt it in step t = `stop_step`. Returns its directory."""
    with interrupted_in_step(s.method, stop_step):
        train.run_stage("stage", s, out, 380, CPU, keep=2, **kwargs)
    return out / "stage"


def state_names(directory):
    return sorted(path.name for path in (directory / "state").glob("*.*"))


def resume(out, s, capsys):
    """Resume a stage. Returns its output and its outcome."""
    capsys.readouterr()
    train.run_stage("stage", s, out, 380, CPU, keep=2)
    return capsys.readouterr().out, outcome(out / "stage")


@pytest.mark.parametrize(
    "save_every, stop_step, saved_steps",
    [(None, 5, [2, 4]), (1, 5, [4, 5]), (3, 3, [2, 3])],
)
def test_the_two_newest_states_are_kept(
    tmp_path,
    student,
    teacher,
    uninterrupted,
    capsys,
    save_every,
    stop_step,
    saved_steps,
):
    s = six_steps(student, teacher)
    directory = interrupt(tmp_path, s, stop_step, save_every=save_every)
    assert state_names(directory) == [f"step-{step:06d}.pt" for step in saved_steps]
    output, resumed = resume(tmp_path, s, capsys)
    assert f"resuming after step {saved_steps[-1]}\n" in output and resumed == uninterrupted


def test_save_every_goes_to_every_stage(plan):
    stages = plan("--student", "gpt2", "--save-every", "7")
    assert [stage.save_every for stage in stages] == [7, 7, 7]
    assert {stage.save_every for stage in plan("--student", "gpt2")} == {None}


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_bit, empty])
def test_a_damaged_newest_state_is_reported_and_the_one_before_is_used(
    tmp_path, student, teacher, uninterrupted, capsys, damage
):
    s = six_steps(student, teacher)
    damage(interrupt(tmp_path, s) / "state" / "step-000004.pt")
    output, resumed = resume(tmp_path, s, capsys)
    assert "stage/state/step-000004.pt: is damaged; trying an older one\n" in output
    assert output.count("is damaged") == 1
    assert "resuming after step 2\n" in output and resumed == uninterrupted


def test_if_every_state_is_damaged_the_stage_starts_from_scratch(
    tmp_path, student, teacher, uninterrupted, capsys
):
    s = six_steps(student, teacher)
    directory = interrupt(tmp_path, s)
    for path in (directory / "state").iterdir():
        flip_a_bit(path)
    # The state of step 2 must not be removed in favour of the damaged ones of steps 2 and 4.
    interrupt(tmp_path, s, stop_step=3)
    output = capsys.readouterr().out
    assert "step-000002.pt: is damaged; this stage starts from scratch\n" in output
    assert [name for name in state_names(directory) if name.endswith(".pt")] == ["step-000002.pt"]
    output, resumed = resume(tmp_path, s, capsys)
    assert "resuming after step 2\n" in output and resumed == uninterrupted


def test_a_best_checkpoint_interrupted_after_its_state_was_saved_is_written_again(
    tmp_path, student, teacher, uninterrupted, capsys
):
    """Otherwise it would hold the student's weights of one step and the prompt of another."""
    s, save_prompt, calls = six_steps(student, teacher), prompts.save_prompt, []

    def validation(rouge_l):
        return {"val_loss": 1.0, "val_rouge_l": rouge_l, "val_prompted_loss": 1.0}

    def stopping(P, directory, *teacher):
        calls.append(directory)
        if directory.name == "best" and len(calls) > 1:
            raise Interrupted
        save_prompt(P, directory, *teacher)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(runs, "save_prompt", stopping)
        patch.setattr(train, "validate", lambda *_: validation(rouge_l=float(len(calls))))
        train.run_stage("stage", s, tmp_path, 380, CPU)
    assert state_names(tmp_path / "stage") == ["step-000002.pt", "step-000004.pt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "validate", lambda *_: validation(rouge_l=0.0))
        interrupt(tmp_path, s)
    state = torch.load(tmp_path / "stage" / "state" / "step-000004.pt", weights_only=True)
    assert state["progress"]["best_step"] == 4
    assert torch.equal(load(tmp_path / "stage" / "best").wte.weight, state["student"]["wte.weight"])
    assert torch.equal(load_prompt(tmp_path / "stage" / "best", 24), state["P"])


def test_hours_of_all_attempts_are_added(tmp_path, student, no_validation):
    s = settings(student=str(student), steps=6)
    interrupt(tmp_path, s, save_every=1)
    state = torch.load(tmp_path / "stage" / "state" / "step-000005.pt", weights_only=True)
    hours_before = state["progress"]["hours"]
    clock = itertools.count(0, 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.time, "perf_counter", lambda: float(next(clock)))
        train.run_stage("stage", s, tmp_path, 380, CPU)
    assert hours_before > 0
    assert record(tmp_path / "stage")["hours"] > hours_before + 1000 / 3600


# ---- signals and restarts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, phase, saved_step", [(signal.SIGTERM, "step", 3), (signal.SIGINT, "validation", 4)]
)
def test_a_signal_ends_the_run_after_its_step_with_the_state_saved(
    tmp_path, student, teacher, uninterrupted, capsys, number, phase, saved_step
):
    s, steps = six_steps(student, teacher), []
    step, validate = train.STEPS["promptkd"], train.validate

    def signal_in_step(run, examples, t):
        steps.append(t)
        if phase == "step" and t == 2:
            os.kill(os.getpid(), number)
        return step(run, examples, t)

    def signal_in_validation(run, rows, examples, sampled_rouge_l):
        if phase == "validation" and steps[-1:] == [3]:
            os.kill(os.getpid(), number)
        return validate(run, rows, examples, sampled_rouge_l)

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setitem(train.STEPS, "promptkd", signal_in_step)
        patch.setattr(train, "validate", signal_in_validation)
        train.run_stage("stage", s, tmp_path, 380, CPU, keep=2)
    assert exit.value.code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    stopped = f"stage: stopped by {number.name}, saved at step {saved_step}; the same command "
    assert stopped in capsys.readouterr().out
    output, resumed = resume(tmp_path, s, capsys)
    assert f"resuming after step {saved_step}\n" in output and resumed == uninterrupted


RESTARTED = """
import json, os, pathlib, signal, sys
import data.sets.prepare, train
from data.process import dist
from data.process.command_line import run_command_line

data.sets.prepare.DATA_DIR, out = pathlib.Path(sys.argv[1]), sys.argv[2]
options = json.loads(sys.argv[3])
attempt, step = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), train.STEPS["promptkd"]
train.show_demo = lambda models, device, dtype: None
train.stages.report.plot_curves = lambda directory: "no plot"
dist.shutdown = lambda: None  # the ranks stay together for the next command


def failing_step(run, examples, t):
    if dist.rank() == 1 and (attempt, t) == (0, 3):
        os._exit(7)
    if dist.rank() == 1 and (attempt, t) == (1, 4):
        os.kill(os.getpid(), signal.SIGTERM)
    return step(run, examples, t)


def main():
    train.STEPS["promptkd"] = failing_step
    train.main([*options, "--out", f"{out}/stopped"])
    train.STEPS["promptkd"] = step
    train.main([*options, "--out", f"{out}/whole"])


run_command_line(main)
"""


@pytest.mark.slow
def test_torchrun_restarts_a_run_after_a_rank_died_or_was_terminated(tmp_path, student, teacher):
    """In the first attempt a rank dies, in the second it gets SIGTERM, the third completes."""
    (tmp_path / "script.py").write_text(RESTARTED)
    options = ["--data", "demo", "--init", str(student), "--sft-teacher", str(teacher)]
    options += "--steps 6 --global-batch 16 --dev-rows 4 --lr 0.01 --dropout 0.2".split()
    arguments = (tmp_path / "script.py", data.sets.prepare.DATA_DIR, tmp_path, json.dumps(options))
    process = run_command(
        *torchrun(2, "--max-restarts=2"), *arguments, PYTHONPATH=str(ROOT), timeout=240
    )
    assert process.returncode == 0, process.stderr
    for error in ("failed (exitcode: 7) local_rank: 1", "failed (exitcode: 143)"):
        assert error in process.stderr
    # From the last validation; then stopped on both ranks, though only one got the signal
    assert process.stdout.count("resuming after step 2\n") == 1
    assert process.stdout.count("stopped by SIGTERM, saved at step 5; the same command ") == 1
    assert process.stdout.count("resuming after step 5\n") == 1
    whole, stopped = outcome(tmp_path / "whole"), outcome(tmp_path / "stopped")
    assert whole == stopped and len(whole) > 5


def test_a_state_that_does_not_fit_on_the_disk_is_one_line_and_the_one_before_is_kept(
    tmp_path, student, teacher, uninterrupted, capsys
):
    s, torch_save = six_steps(student, teacher), torch.save

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 5000

        def write(self, content):
            self.left -= len(content)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(content)

    def save(state, file):
        torch_save(state, Full(file) if state["progress"]["step"] == 4 else file)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError) as stopped:
        patch.setattr(torch, "save", save)
        train.run_stage("stage", s, tmp_path, 380, CPU, keep=2)
    message = str(stopped.value)
    assert "No space left on device" in message and "free some disk space" in message
    assert "\n" not in message and state_names(tmp_path / "stage") == ["step-000002.pt"]
    output, resumed = resume(tmp_path, s, capsys)
    assert "resuming after step 2\n" in output and resumed == uninterrupted


# ---- changed data ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, complete", [("train.jsonl", False), ("dev.jsonl", True), ("pretrain.jsonl", False)]
)
def test_data_that_has_changed_is_refused_by_name_and_no_file_is_changed(
    tmp_path, monkeypatch, no_validation, name, complete
):
    mine = shutil.copytree(data.sets.prepare.DATA_DIR / "demo", tmp_path / "demo")
    monkeypatch.setattr(data.sets.prepare, "DATA_DIR", tmp_path)
    s = settings(
        method="pretrain",
        student="1x16x2",
        metric_for_best="loss",
        block_size=32,
        steps=2,
        global_batch_size=4,
    )
    if complete:
        train.run_stage("stage", s, tmp_path / "out", 600, CPU)
    else:
        interrupt(tmp_path / "out", s, stop_step=1)
    lines = (mine / name).read_text().splitlines(keepends=True)
    (mine / name).write_text("".join(lines[1:]))
    before = files(tmp_path / "out")
    message = error_of(train.run_stage, "stage", s, tmp_path / "out", 600, CPU)
    assert message.endswith(
        f"out/stage: {name} (demo) is not what it was made with: its content has changed; "
        "choose another --out, or move it elsewhere"
    )
    assert files(tmp_path / "out") == before
    (mine / name).write_text("".join(lines))
    train.run_stage("stage", s, tmp_path / "out", 600, CPU)


@pytest.mark.parametrize("format, complete", [(None, False), (2, True), ("3", False)])
def test_a_run_of_another_format_is_refused_and_no_file_is_changed(
    tmp_path, student, no_validation, format, complete
):
    s = settings(student=str(student), steps=2)
    if complete:
        train.run_stage("stage", s, tmp_path, 600, CPU)
    else:
        interrupt(tmp_path, s, stop_step=1, save_every=1)
    run_json = tmp_path / "stage" / "run.json"
    current = record(tmp_path / "stage")
    assert set(current["inputs"]) == {"train.jsonl", "dev.jsonl", "student"}
    assert current["format"] == 3
    other = without(current, ["format"]) | ({} if format is None else {"format": format})
    run_json.write_text(json.dumps(other))
    before = files(tmp_path)
    message = error_of(train.run_stage, "stage", s, tmp_path, 600, CPU)
    assert message == (
        f"{run_json}: was made by another version of this project; choose another --out, or "
        f"move {tmp_path / 'stage'} elsewhere"
    )
    assert files(tmp_path) == before


@pytest.mark.parametrize("damage", [b"\0" * 40, b"\xff\xfe", b"[1]", b'{"step": "x"}'])
def test_a_damaged_line_of_metrics_is_dropped_and_reported_and_the_run_goes_on(
    tmp_path, student, no_validation, capsys, damage
):
    """A loss of power can leave zeros in a file."""
    s = settings(student=str(student), steps=4)
    directory = interrupt(tmp_path, s, stop_step=3, save_every=1)
    path = directory / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, damage, third, b""]))
    train.run_stage("stage", s, tmp_path, 380, CPU)
    assert [line["step"] for line in metrics(directory)] == [1, 3, 4]
    assert f"{path}: 1 of 3 lines can't be read and are dropped\n" in capsys.readouterr().out


def test_a_state_left_by_an_interrupted_end_is_removed(
    tmp_path, student, no_validation, monkeypatch, capsys
):
    s = settings(student=str(student), steps=2)
    train.run_stage("stage", s, tmp_path, 600, CPU)
    (tmp_path / "stage" / "state").mkdir()
    (tmp_path / "stage" / "state" / "step-000002.pt").write_bytes(b"")
    train.run_stage("stage", s, tmp_path, 600, CPU)
    assert "complete, skipped" in capsys.readouterr().out
    assert not (tmp_path / "stage" / "state").exists()


def test_temporary_files_of_interrupted_writes_are_removed_at_the_end(
    tmp_path, student, no_validation
):
    s = settings(student=str(student), steps=2)
    directory = interrupt(tmp_path, s, stop_step=1, save_every=1)
    (directory / "best").mkdir()
    for name in (".run.json.0a1b2c3d", "best/.config.json.0a1b2c3d", "best/.gitignore.txt"):
        (directory / name).write_text("")
    train.run_stage("stage", s, tmp_path, 600, CPU)
    hidden = [path.name for path in directory.rglob(".*")]
    assert hidden == [".gitignore.txt"]  # which no file was written through


# ---- losses that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize(
    "method, spoiled, message",
    [
        ("sft", {"loss": math.nan}, "loss nan at step 4"),
        ("sft", {"grad_norm": math.inf}, "grad_norm inf at step 4"),
        ("promptkd", {"prompt_loss": math.nan}, "prompt_loss nan at step 4"),
        ("promptkd", {"prompt_kd": math.inf}, "prompt_kd inf at step 4"),
        (
            "promptkd",
            {"prompt_grad_norm": math.nan, "loss": math.nan},
            "loss nan, prompt_grad_norm nan at step 4",
        ),
        ("sft", {"val_loss": math.nan}, "val_loss nan at step 4"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_state_is_kept(
    tmp_path, student, teacher, monkeypatch, method, spoiled, message
):
    s = six_steps(student, teacher)
    if method == "sft":
        s = settings(student=str(student), steps=6, max_dev_rows=2, eval_interval=2)
    step, validate, seen = train.STEPS[method], train.validate, []

    def spoiling(run, examples, t):
        seen.append(t)
        values = step(run, examples, t)
        if t != 3:
            return values
        run.student.wte.weight.data.fill_(math.nan)  # whatever is saved now is spoiled
        return values | without(spoiled, ["val_loss"])

    def validating(run, rows, examples, sampled_rouge_l):
        if seen[-1:] == [3]:
            return {"val_loss": 1.0, "val_rouge_l": 99.0, **spoiled}
        return validate(run, rows, examples, sampled_rouge_l)

    monkeypatch.setitem(train.STEPS, method, spoiling)
    monkeypatch.setattr(train, "validate", validating)
    directory = tmp_path / "stage"
    with pytest.raises(InputError) as stopped:
        train.run_stage("stage", s, tmp_path, 380, CPU, save_every=1)
    rates = "--prompt-lr or --lr" if "prompt" in message else "--lr"
    fix = f"the training has diverged: lower {rates}"
    assert str(stopped.value) == f"{directory}: {message}; {fix}" and seen[-1] == 3
    assert "complete" not in record(directory)
    assert state_names(directory) == ["step-000002.pt", "step-000003.pt"]
    assert [line["step"] for line in metrics(directory)][-1] == 3
    state = torch.load(directory / "state" / "step-000003.pt", weights_only=True)
    for weights in (load(directory / "best").state_dict(), state["student"]):
        assert all(torch.isfinite(w).all() for w in weights.values())


@pytest.mark.parametrize("method", ["sft", "gkd", "promptkd", "minillm"])
def test_a_learning_rate_far_too_high_ends_with_one_line(tmp_path, student, teacher, method):
    values = {"steps": 4, "max_dev_rows": 2, "lr": 1e30, "eval_interval": 1}
    s = settings_of(method, student, teacher, **values)
    with pytest.raises(InputError, match="the training has diverged"):
        train.run_stage("stage", s, tmp_path, 600, CPU)


# ---- very little data --------------------------------------------------------------------------

ROWS = [
    {"instruction": f"say {word}", "output": word} for word in "one two three four five".split()
]
LONG = {"instruction": "repeat", "input": "a long story " * 150, "output": "a long story"}


def run_on_rows(directory, method, student, teacher, rows, dev_rows, **values):
    """Train a stage on these rows. Returns its metrics, all of which are finite."""
    write_rows(directory / "mine" / "train.jsonl", rows)
    write_rows(directory / "mine" / "dev.jsonl", dev_rows)
    values = {"data": str(directory / "mine"), "epochs": 2, "max_new_tokens": 8} | values
    s = settings_of(method, student, teacher, **({"global_batch_size": 2} | values))
    train.run_stage("stage", s, directory, 1100, CPU)
    assert record(directory / "stage")["complete"]
    assert (directory / "stage" / "best" / "model.safetensors").is_file()
    lines = metrics(directory / "stage")
    for line in lines:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
    return [line for line in lines if line["step"]]


@pytest.mark.parametrize("method", METHODS_WITH_STEPS)
def test_one_training_row_and_one_validation_row(tmp_path, student, teacher, method):
    lines = run_on_rows(
        tmp_path,
        method,
        student,
        teacher,
        ROWS[:1],
        ROWS[:1],
        global_batch_size=64,
        rollout_size=128 if method == "minillm" else None,
    )
    # A step per row, but MiniLLM has two inner epochs.
    epochs = [0.5, 1.0, 1.5, 2.0] if method == "minillm" else [1.0, 2.0]
    assert [line["epoch"] for line in lines] == epochs
    if method in ("sft", "kd"):
        assert {line["response_tokens"] for line in lines} == {len(TOKENIZER.encode("one")) + 1}


@pytest.mark.parametrize("method", METHODS_WITH_STEPS)
def test_an_incomplete_last_batch_of_an_epoch_is_left_out(tmp_path, student, teacher, method):
    rollouts = {"rollout_size": 4} if method == "minillm" else {}
    lines = run_on_rows(
        tmp_path, method, student, teacher, [*ROWS, LONG], [LONG, *ROWS], max_dev_rows=2, **rollouts
    )
    # Of the six rows LONG's request is over the limit. The other five give two steps per epoch, or
    # for MiniLLM one rollout of four rows, whose two inner epochs have two steps each.
    validated = [4, 8] if method == "minillm" else [2, 4]
    assert len(lines) == validated[-1]
    assert [line["step"] for line in lines if "val_loss" in line] == validated


def test_a_single_validation_row_whose_request_is_over_the_limit_is_refused(
    tmp_path, student, teacher
):
    with pytest.raises(InputError, match="every validation row's request is over the limit"):
        run_on_rows(tmp_path, "sft", student, teacher, ROWS, [LONG, *ROWS], max_dev_rows=1)


def test_sampled_rows_whose_responses_are_empty_or_at_the_limit(tmp_path, student, teacher):
    """SeqKD's: the mean is over all response tokens, and not 0 / 0."""

    def run_on_responses(name, rows):
        directory = tmp_path / name
        write_rows(directory / "responses" / "train.jsonl", rows)
        responses = str(directory / "responses")
        return run_on_rows(
            directory, "seqkd", student, teacher, ROWS, ROWS[:1], responses=responses
        )

    request_length = len(TOKENIZER.encode(fill_template("say one")))
    rows = [ROWS[0] | {"ids": []}, ROWS[0] | {"ids": [5] * 600}]
    lines = run_on_responses("both", rows)
    assert [line["response_tokens"] for line in lines] == [512 - request_length] * 2
    assert lines[0]["loss"] > 1
    lines = run_on_responses("none", [rows[0]] * 2)
    for line in lines:  # without a token, the mean is divided by 1
        assert (line["response_tokens"], line["loss"], line["grad_norm"]) == (1, 0, 0)
    assert len(lines) == 2


def test_a_users_rows_with_a_field_ids_are_trained_on_as_text(tmp_path, student, teacher):
    """They may be a database's ids."""
    plain = run_on_rows(tmp_path / "plain", "sft", student, teacher, ROWS, ROWS[:1])
    with_ids = [row | {"ids": [number]} for number, row in enumerate(ROWS)]
    lines = run_on_rows(tmp_path / "ids", "sft", student, teacher, with_ids, with_ids[:1])
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain]


@pytest.mark.parametrize("method", ["gkd", "minillm", "promptkd"])
@pytest.mark.parametrize("length", [0, 8])
def test_sampled_responses_that_are_all_empty_or_all_at_the_limit(
    tmp_path, student, teacher, monkeypatch, method, length
):
    def sample_all(model, requests, *arguments, **kwargs):
        return [[7] * length] * len(requests), None

    monkeypatch.setattr(train, "sample_all", sample_all)
    lines = run_on_rows(
        tmp_path,
        method,
        student,
        teacher,
        ROWS,
        ROWS[:1],
        steps=2,
        **({"rollout_size": 4} if method == "minillm" else {}),
    )
    assert [line["response_tokens"] for line in lines] == [2 * length or 1] * 2
    assert all((line["loss"] == 0) == (line["grad_norm"] == 0) == (length == 0) for line in lines)
