"""A run that can't be lost: killed, stopped by a signal, restarted by torchrun, with damaged states, changed data, numbers that are not
finite, and data that is hardly any. What test_train.py has of interruptions is not repeated here."""

import itertools
import json
import math
import os
import signal
import socket

import pytest
import torch
from helpers import ROOT, run_command, write_rows
from test_train import (  # noqa: F401  (fixtures)
    CPU,
    TOKENIZER,
    Interrupted,
    files,
    hub,
    main,
    metrics,
    minillm_settings,
    no_validation,
    plan,
    promptkd_settings,
    record,
    settings,
    stop_in_a_step,
    student,
    teacher,
    world,
)

import data.prepare
import prompt
import train
from data import dist, report, runs
from data.cli import InputError
from data.rows import fill_template
from model import load
from prompt import load_prompt

UNLIKE = (
    "tokens_per_second",
    "seconds",
    "memory_resident_gb",
)  # of a metrics line: hang on the clock and the machine


def outcome(directory):
    """Every file below a directory, less what hangs on the clock and the machine."""
    found = {}
    for path in directory.rglob("*"):
        content = path.read_bytes() if path.is_file() else None
        if path.name == "run.json":
            content = {
                name: value for name, value in json.loads(content).items() if name != "hours"
            }
        elif path.name == "metrics.jsonl":
            content = [
                {name: value for name, value in json.loads(line).items() if name not in UNLIKE}
                for line in content.splitlines()
            ]
        found[str(path.relative_to(directory))] = content
    return found


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Drawing takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot_curves", lambda directory: "no picture")
        yield


# ---- killed ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n_ranks, steps, kills",
    [
        (1, 8, 4),
        pytest.param(1, 80, 25, marks=pytest.mark.slow),
        pytest.param(2, 60, 25, marks=pytest.mark.slow),
    ],
)
def test_torture_a_run_of_every_stage_that_is_killed_at_random_ends_with_the_same_bits(
    tmp_path, n_ranks, steps, kills
):
    how = ("--steps", steps, "--kills", kills, "--ranks", n_ranks)
    done = run_command(
        "tests/torture.py", data.prepare.HOME, tmp_path, *how, timeout=3000, PYTHONPATH=str(ROOT)
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    killed = found["kills"]
    print(
        f"{n_ranks} ranks, {found['seconds']:.0f} s, {len(killed)} kills, {sum(kill['saving'] for kill in killed)} of them while saving: {killed}"
    )
    assert len(killed) == kills
    if kills > 20:
        assert {kill["stage"] for kill in killed} == set(found["stages"])
        assert sum(kill["saving"] for kill in killed) >= 8
    whole, resumed = outcome(tmp_path / "whole" / "out"), outcome(tmp_path / "killed" / "out")
    assert resumed.keys() == whole.keys()  # no half file is left, and no state
    assert [path for path in whole if resumed[path] != whole[path]] == []
    assert len([path for path in whole if path.endswith("best/model.safetensors")]) == 7


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, student, teacher):  # noqa: F811
    """A stage of six steps, validated behind every other one."""
    out = tmp_path_factory.mktemp("whole")
    train.run_stage("stage", six_steps(student, teacher), out, 5, CPU, keep=2)
    return outcome(out / "stage")


def six_steps(student, teacher):  # noqa: F811
    return promptkd_settings(
        student, teacher, steps=6, dropout=0.2, max_dev_rows=4, eval_interval=2
    )


def interrupted(out, s, at=5, **how):
    """The same stage, cut short in step t = `at`."""

    def stopping(run, examples, t):
        if t == at:
            raise Interrupted
        return step(run, examples, t)

    step = train.STEPS[s.method]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setitem(train.STEPS, s.method, stopping)
        train.run_stage("stage", s, out, 5, CPU, keep=2, **how)
    return out / "stage"


def names(directory):
    return sorted(path.name for path in (directory / "state").iterdir())


def gone_on_with(out, s, capsys):
    """Go on with a stage. Returns what it said and its outcome."""
    capsys.readouterr()
    train.run_stage("stage", s, out, 5, CPU, keep=2)
    return capsys.readouterr().out, outcome(out / "stage")


@pytest.mark.parametrize(
    "save_every, at, saved",
    [(None, 5, [2, 4]), (1, 5, [4, 5]), (3, 5, [3, 4]), (5, 5, [4, 5]), (3, 3, [2, 3])],
)
def test_the_newest_two_states_are_kept_of_those_at_validations_and_every_so_many_steps(
    tmp_path,
    student,
    teacher,
    uninterrupted,
    capsys,
    save_every,
    at,
    saved,  # noqa: F811
):
    s = six_steps(student, teacher)
    directory = interrupted(tmp_path, s, at, save_every=save_every)
    assert names(directory) == [f"step-{step:06d}.pt" for step in saved]
    said, ended = gone_on_with(tmp_path, s, capsys)
    assert f"going on behind step {saved[-1]}\n" in said and ended == uninterrupted


def test_save_every_goes_to_every_stage(plan):  # noqa: F811
    assert [stage.save_every for stage in plan("--student", "gpt2", "--save-every", "7")] == [
        7,
        7,
        7,
    ]
    assert {stage.save_every for stage in plan("--student", "gpt2")} == {None}


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_bit, cut, empty])
def test_a_damaged_newest_state_falls_back_to_the_one_before_and_says_so(
    tmp_path, student, teacher, uninterrupted, capsys, damage
):  # noqa: F811
    s = six_steps(student, teacher)
    damage(interrupted(tmp_path, s) / "state" / "step-000004.pt")
    said, ended = gone_on_with(tmp_path, s, capsys)
    assert (
        "stage/state/step-000004.pt: is damaged; going on from the state before it\n" in said
        and said.count("is damaged") == 1
    )
    assert "going on behind step 2\n" in said and ended == uninterrupted


def test_where_no_state_is_readable_the_stage_starts_anew_and_says_so(
    tmp_path, student, teacher, uninterrupted, capsys
):  # noqa: F811
    s = six_steps(student, teacher)
    directory = interrupted(tmp_path, s)
    for path in (directory / "state").iterdir():
        flip_a_bit(path)
    interrupted(tmp_path, s, at=3)  # which the old states must not push out
    assert "step-000002.pt: is damaged; this stage starts anew\n" in capsys.readouterr().out
    assert [name for name in names(directory) if name.endswith(".pt")] == ["step-000002.pt"]
    said, ended = gone_on_with(tmp_path, s, capsys)
    assert "going on behind step 2\n" in said and ended == uninterrupted


def test_a_best_checkpoint_that_was_cut_short_behind_its_state_is_written_again(
    tmp_path, student, teacher, uninterrupted, capsys
):  # noqa: F811
    """The student's weights of one step beside the prompt of another would be a checkpoint that never was."""
    s, save_prompt, calls = six_steps(student, teacher), prompt.save_prompt, []

    def stopping(P, directory):
        calls.append(directory)
        if directory.name == "best" and len(calls) > 1:
            raise Interrupted
        save_prompt(P, directory)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(runs, "save_prompt", stopping)
        patch.setattr(
            train,
            "validate",
            lambda run, rows, examples: {
                "val_loss": 1.0,
                "val_rouge_l": float(len(calls)),
                "val_prompted_loss": 1.0,
            },
        )
        train.run_stage("stage", s, tmp_path, 5, CPU)
    assert names(tmp_path / "stage") == ["step-000002.pt", "step-000004.pt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train,
            "validate",
            lambda run, rows, examples: {
                "val_loss": 9.0,
                "val_rouge_l": 0.0,
                "val_prompted_loss": 1.0,
            },
        )
        interrupted(tmp_path, s)
    state = torch.load(tmp_path / "stage" / "state" / "step-000004.pt", weights_only=True)
    assert state["done"]["best_step"] == 4
    assert torch.equal(load(tmp_path / "stage" / "best").wte.weight, state["student"]["wte.weight"])
    assert torch.equal(load_prompt(tmp_path / "stage" / "best", 24), state["P"])


def test_hours_add_up(tmp_path, student, no_validation):  # noqa: F811
    s = settings(student=str(student), steps=6)
    interrupted(tmp_path, s, save_every=1)
    before = torch.load(tmp_path / "stage" / "state" / "step-000005.pt", weights_only=True)["done"][
        "hours"
    ]
    clock = itertools.count(0, 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.time, "perf_counter", lambda: float(next(clock)))
        train.run_stage("stage", s, tmp_path, 5, CPU)
    assert before > 0 and record(tmp_path / "stage")["hours"] > before + 1000 / 3600


# ---- signals -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["step", "validation"])
def test_a_signal_ends_the_run_behind_its_step_with_the_state_saved(
    tmp_path, student, teacher, uninterrupted, capsys, number, where
):  # noqa: F811
    s, step, validate, validations = (
        six_steps(student, teacher),
        train.STEPS["promptkd"],
        train.validate,
        [],
    )

    def signalled(run, examples, t):
        if where == "step" and t == 2:
            os.kill(os.getpid(), number)
        return step(run, examples, t)

    def validating(run, rows, examples):
        validations.append(rows)
        if (
            where == "validation" and len(validations) == 3
        ):  # before the first step, behind the second and the fourth
            os.kill(os.getpid(), number)
        return validate(run, rows, examples)

    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setitem(train.STEPS, "promptkd", signalled)
        patch.setattr(train, "validate", validating)
        train.run_stage("stage", s, tmp_path, 5, CPU, keep=2)
    assert (
        left.value.code == 128 + number
        and [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    )
    at = 3 if where == "step" else 4
    assert (
        f"stage: stopped by {number.name}, saved at step {at}; the same command goes on from there\n"
        in capsys.readouterr().out
    )
    said, ended = gone_on_with(tmp_path, s, capsys)
    assert f"going on behind step {at}\n" in said and ended == uninterrupted


def test_a_signal_behind_the_last_boundary_takes_its_usual_effect():
    with pytest.raises(KeyboardInterrupt), dist.defer_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals == [signal.SIGINT]
    with pytest.raises(ValueError, match="an error of its own"), dist.defer_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("an error of its own")


TERMINATED = """
import os, signal, sys
from pathlib import Path
from data import cli

def main():
    real = os.fsync
    def fsync(handle):
        os.kill(os.getpid(), signal.SIGTERM)
        real(handle)
    os.fsync = fsync
    cli.write_atomic(Path(sys.argv[1]) / "file", "text")

cli.run_command_line(main)
"""


def test_sigterm_anywhere_else_ends_a_command_at_once_with_one_line_and_no_half_file(tmp_path):
    done = run_command("-c", TERMINATED, tmp_path, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stderr) == (143, "interrupted\n") and list(
        tmp_path.iterdir()
    ) == []


RESTARTED = """
import json, os, pathlib, signal, sys
import data.prepare, train
from data import dist
from data.cli import run_command_line as command

data.prepare.HOME, out, options = pathlib.Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
attempt, step = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), train.STEPS["promptkd"]
train.show_demo, train.plot_curves = lambda models, device, dtype: None, lambda directory: "no picture"
dist.shutdown = lambda: None  # the ranks stay together for the next command


def hooked(run, examples, t):
    if dist.rank() == 1 and (attempt, t) == (0, 3):
        os._exit(7)
    if dist.rank() == 1 and (attempt, t) == (1, 4):
        os.kill(os.getpid(), signal.SIGTERM)
    return step(run, examples, t)


def main():
    train.STEPS["promptkd"] = hooked
    train.main([*options, "--out", f"{out}/stopped"])
    train.STEPS["promptkd"] = step
    train.main([*options, "--out", f"{out}/whole"])


command(main)
"""


def test_torchrun_restarts_a_run_whose_rank_died_or_was_told_to_stop(tmp_path, student, teacher):  # noqa: F811
    """In the first attempt a rank dies, in the second one rank alone gets SIGTERM, the third goes to the end."""
    (tmp_path / "script.py").write_text(RESTARTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    how = (
        "--data",
        "demo",
        "--init",
        student,
        "--sft-teacher",
        teacher,
        "--steps",
        6,
        "--global-batch",
        16,
        "--dev-rows",
        4,
        "--lr",
        0.01,
        "--dropout",
        0.2,
    )
    launch = (
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--max-restarts=2",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
    )
    arguments = (
        tmp_path / "script.py",
        data.prepare.HOME,
        tmp_path,
        json.dumps([str(option) for option in how]),
    )
    done = run_command(*launch, *arguments, PYTHONPATH=str(ROOT), timeout=240)
    assert done.returncode == 0, done.stderr
    assert (
        "failed (exitcode: 7) local_rank: 1" in done.stderr
        and "failed (exitcode: 143)" in done.stderr
    )
    assert done.stdout.count("going on behind step 2\n") == 1  # from the last validation
    assert (
        done.stdout.count(
            "stopped by SIGTERM, saved at step 5; the same command goes on from there\n"
        )
        == 1
    )  # both ranks, by one's word
    assert done.stdout.count("going on behind step 5\n") == 1
    whole, stopped = outcome(tmp_path / "whole"), outcome(tmp_path / "stopped")
    assert whole == stopped and len(whole) > 5


@pytest.mark.parametrize("limit", [0, 5000])
def test_a_state_that_does_not_fit_on_the_disk_is_one_line_and_the_one_before_stays(
    tmp_path, student, teacher, uninterrupted, capsys, limit
):  # noqa: F811
    s, torch_save = six_steps(student, teacher), torch.save

    class Full:
        def __init__(self, file):
            self.file, self.left = file, limit

        def write(self, content):
            self.left -= len(content)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(content)

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(InputError, match=r"No space left on device") as stopped,
    ):
        patch.setattr(
            torch,
            "save",
            lambda state, file: torch_save(
                state, Full(file) if state["done"]["step"] == 4 else file
            ),
        )
        train.run_stage("stage", s, tmp_path, 5, CPU, keep=2)
    assert "\n" not in str(stopped.value) and names(tmp_path / "stage") == ["step-000002.pt"]
    said, ended = gone_on_with(tmp_path, s, capsys)
    assert "going on behind step 2\n" in said and ended == uninterrupted


# ---- changed data ------------------------------------------------------------------------------------------------------------------------


def copy_of_the_world(directory):
    for path in (data.prepare.HOME / "demo").glob("*.jsonl"):
        write_rows(
            directory / path.name, [json.loads(line) for line in path.read_text().splitlines()]
        )
    return directory


@pytest.mark.parametrize("name", ["train.jsonl", "dev.jsonl", "pretrain.jsonl"])
@pytest.mark.parametrize("complete", [False, True])
def test_data_that_has_changed_is_refused_by_name_and_nothing_is_touched(
    tmp_path, monkeypatch, no_validation, name, complete
):  # noqa: F811
    mine = copy_of_the_world(tmp_path / "demo")
    monkeypatch.setattr(data.prepare, "HOME", tmp_path)
    s = settings(
        method="pretrain",
        student="1x16x2",
        metric_for_best="loss",
        block_size=32,
        steps=2,
        global_batch_size=4,
    )
    if complete:
        train.run_stage("stage", s, tmp_path / "out", 8, CPU)
    else:
        interrupted(tmp_path / "out", s, at=1)
    lines = (mine / name).read_text().splitlines(keepends=True)
    (mine / name).write_text("".join(lines[1:]))
    before = files(tmp_path / "out")
    with pytest.raises(
        InputError,
        match=rf"out/stage: {name} of demo has changed since it was made; choose another --out, or remove it$",
    ):
        train.run_stage("stage", s, tmp_path / "out", 8, CPU)
    assert files(tmp_path / "out") == before
    (mine / name).write_text("".join(lines))
    train.run_stage("stage", s, tmp_path / "out", 8, CPU)


def test_a_record_of_before_data_was_hashed_is_accepted(tmp_path, student, no_validation, capsys):  # noqa: F811
    s = settings(student=str(student), steps=2)
    interrupted(tmp_path, s, at=1, save_every=1)
    older = record(tmp_path / "stage")
    assert set(older.pop("files")) == {"train.jsonl", "dev.jsonl"}
    (tmp_path / "stage" / "run.json").write_text(json.dumps(older))
    assert "going on behind step 1\n" in gone_on_with(tmp_path, s, capsys)[0]


def test_a_state_that_a_cut_short_end_left_behind_is_removed(
    tmp_path, student, no_validation, monkeypatch, capsys
):  # noqa: F811
    s = settings(student=str(student), steps=2)
    train.run_stage("stage", s, tmp_path, 8, CPU)
    (tmp_path / "stage" / "state").mkdir()
    (tmp_path / "stage" / "state" / "step-000002.pt").write_bytes(b"")
    train.run_stage("stage", s, tmp_path, 8, CPU)
    assert (
        "complete, skipped" in capsys.readouterr().out
        and not (tmp_path / "stage" / "state").exists()
    )


# ---- numbers that are not finite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, spoiled, message",
    [
        (
            "sft",
            {"loss": math.nan},
            "loss nan at step 4, student phase; the training has diverged: lower --lr",
        ),
        (
            "sft",
            {"grad_norm": math.inf},
            "grad_norm inf at step 4, student phase; the training has diverged: lower --lr",
        ),
        (
            "promptkd",
            {"prompt_loss": math.nan},
            "prompt_loss nan at step 4, prompt phase; the training has diverged: lower --prompt-lr or --lr",
        ),
        (
            "promptkd",
            {"prompt_kd": math.inf},
            "prompt_kd inf at step 4, prompt phase; the training has diverged: lower --prompt-lr or --lr",
        ),
        (
            "promptkd",
            {"prompt_grad_norm": math.nan, "loss": math.nan},
            "loss nan, prompt_grad_norm nan at step 4, prompt phase; the training has diverged: lower --prompt-lr or --lr",
        ),
        (
            "sft",
            {"val_loss": math.nan},
            "val_loss nan at step 4, student phase; the training has diverged: lower --lr",
        ),
    ],
)
def test_a_number_that_is_not_finite_stops_the_run_and_the_last_good_state_stays(
    tmp_path, student, teacher, monkeypatch, method, spoiled, message
):  # noqa: F811
    s = (
        six_steps(student, teacher)
        if method == "promptkd"
        else settings(student=str(student), steps=6, max_dev_rows=2, eval_interval=2)
    )
    step, validate, seen = train.STEPS[method], train.validate, []

    def spoiling(run, examples, t):
        seen.append(t)
        values = step(run, examples, t)
        if t != 3:
            return values
        run.student.wte.weight.data.fill_(math.nan)  # whatever is saved now is spoiled
        return values | {
            name: value for name, value in spoiled.items() if not name.startswith("val")
        }

    def validating(run, rows, examples):
        if seen[-1:] == [3]:
            return {"val_loss": 1.0, "val_rouge_l": 99.0, **spoiled}
        return validate(run, rows, examples)

    monkeypatch.setitem(train.STEPS, method, spoiling)
    monkeypatch.setattr(train, "validate", validating)
    with pytest.raises(InputError) as stopped:
        train.run_stage("stage", s, tmp_path, 5, CPU, save_every=1)
    assert str(stopped.value) == f"{tmp_path / 'stage'}: {message}" and seen[-1] == 3
    directory = tmp_path / "stage"
    assert "hours" not in record(directory) and names(directory) == [
        "step-000002.pt",
        "step-000003.pt",
    ]
    assert [line["step"] for line in metrics(directory)][-1] == 3
    for weights in (
        load(directory / "best").state_dict(),
        torch.load(directory / "state" / "step-000003.pt", weights_only=True)["student"],
    ):
        assert all(torch.isfinite(w).all() for w in weights.values())


@pytest.mark.parametrize("method", ["sft", "gkd", "promptkd", "minillm"])
def test_a_learning_rate_far_too_high_ends_with_one_line(tmp_path, student, teacher, method):  # noqa: F811
    how = {"steps": 4, "max_dev_rows": 2, "lr": 1e30, "eval_interval": 1}
    s = {
        "sft": settings(student=str(student), **how),
        "gkd": settings(method="gkd", student=str(student), teacher=str(teacher), **how),
        "promptkd": promptkd_settings(student, teacher, **how),
        "minillm": minillm_settings(student, teacher, **how),
    }[method]
    with pytest.raises(InputError, match="the training has diverged"):
        train.run_stage("stage", s, tmp_path, 8, CPU)


# ---- hardly any data -----------------------------------------------------------------------------------------------------------------------

ROWS = [
    {"instruction": f"say {word}", "output": word} for word in "one two three four five".split()
]
LONG = {"instruction": "repeat", "input": "a long story " * 150, "output": "a long story"}


def stage_on(directory, method, student, teacher, rows, validation, **how):  # noqa: F811
    """A stage on these rows. Returns its metrics, all of which are finite."""
    write_rows(directory / "mine" / "train.jsonl", rows)
    write_rows(directory / "mine" / "dev.jsonl", validation)
    makers = {"promptkd": promptkd_settings, "minillm": minillm_settings}
    usual = {
        "data": str(directory / "mine"),
        "global_batch_size": 2,
        "epochs": 2,
        "max_new_tokens": 8,
    } | how
    if method in makers:
        s = makers[method](student, teacher, **usual)
    else:
        s = settings(
            method=method,
            student=str(student),
            teacher=None if method == "sft" else str(teacher),
            **usual,
        )
    train.run_stage("stage", s, directory, 2, CPU)
    assert (
        "hours" in record(directory / "stage")
        and (directory / "stage" / "best" / "model.safetensors").is_file()
    )
    lines = metrics(directory / "stage")
    assert all(
        math.isfinite(value)
        for line in lines
        for value in line.values()
        if isinstance(value, float)
    )
    return [line for line in lines if line["step"]]


METHODS = ["sft", "kd", "gkd", "minillm", "promptkd"]


@pytest.mark.parametrize("method", METHODS)
def test_one_row_to_train_on_and_one_to_validate_on_and_a_batch_of_more(
    tmp_path, student, teacher, method
):  # noqa: F811
    lines = stage_on(
        tmp_path,
        method,
        student,
        teacher,
        ROWS[:1],
        ROWS[:1],
        global_batch_size=64,
        rollout_size=128 if method == "minillm" else None,
    )
    assert [line["epoch"] for line in lines] == (
        [0.5, 1.0, 1.5, 2.0] if method == "minillm" else [1.0, 2.0]
    )  # a step a row; MiniLLM's two inner epochs
    if method in ("sft", "kd"):
        assert {line["response_tokens"] for line in lines} == {len(TOKENIZER.encode("one")) + 1}


@pytest.mark.parametrize("method", METHODS)
def test_the_last_batch_of_an_epoch_is_left_out_where_it_is_not_whole(
    tmp_path, student, teacher, method
):  # noqa: F811
    rollouts = {"rollout_size": 4} if method == "minillm" else {}
    lines = stage_on(
        tmp_path, method, student, teacher, [*ROWS, LONG], [LONG, *ROWS], max_dev_rows=2, **rollouts
    )
    assert len(lines) == (
        8 if method == "minillm" else 4
    )  # five rows, LONG's request being over the limit, by two; of four, twice: two steps
    assert [line["step"] for line in lines if "val_loss" in line] == (
        [4, 8] if method == "minillm" else [2, 4]
    )


def test_a_validation_on_one_row_of_which_the_request_is_over_the_limit_is_refused(
    tmp_path, student, teacher
):  # noqa: F811
    with pytest.raises(InputError, match="every validation row's request is over the limit"):
        stage_on(tmp_path, "sft", student, teacher, ROWS, [LONG, *ROWS], max_dev_rows=1)


@pytest.mark.parametrize("method", ["sft", "kd"])
def test_rows_whose_responses_are_empty_or_at_the_limit(tmp_path, student, teacher, method):  # noqa: F811
    """SeqKD's rows, that have tokens. What there is to learn from is averaged over, nothing is divided by zero."""
    request = len(TOKENIZER.encode(fill_template("say one")))
    rows = [ROWS[0] | {"ids": []}, ROWS[0] | {"ids": [5] * 600}]
    lines = stage_on(tmp_path / "both", method, student, teacher, rows, ROWS[:1])
    assert [line["response_tokens"] for line in lines] == [512 - request] * 2 and lines[0][
        "loss"
    ] > 1
    lines = stage_on(tmp_path / "none", method, student, teacher, [rows[0]] * 2, ROWS[:1])
    assert [(line["response_tokens"], line["loss"], line["grad_norm"]) for line in lines] == [
        (1, 0, 0)
    ] * 2  # no token: counted as 1


@pytest.mark.parametrize("method", ["gkd", "minillm", "promptkd"])
@pytest.mark.parametrize("length", [0, 8])
def test_sampled_responses_that_are_all_empty_or_all_at_the_limit(
    tmp_path, student, teacher, monkeypatch, method, length
):  # noqa: F811
    monkeypatch.setattr(
        train,
        "sample_all",
        lambda model, requests, *arguments, **how: ([[7] * length] * len(requests), None),
    )
    lines = stage_on(
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
