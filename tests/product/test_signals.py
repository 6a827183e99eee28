"""Signals that end a run, terminals that close and pipes that nobody reads any more."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from dataclasses import asdict
from functools import partial

import pytest
from helpers import ROOT, files_below, fork_ranks, torchrun, wait_for
from test_resume import no_plots, outcome, resume, six_steps, uninterrupted  # noqa: F401
from test_train import CPU, student, teacher, world  # noqa: F401
from torch.distributed.launcher.api import LaunchConfig

import data.sets.prepare
import evaluate
import train
from data.process import dist
from data.process.command_line import run_command_line
from data.process.errors import InputError
from data.process.files import write_atomic

PAUSED, GO = "paused", "go"  # files by which a run and its test wait for each other


def pause(directory):
    """Wait, in the run, until the test lets it continue."""
    (directory / PAUSED).touch()
    while not (directory / GO).exists():
        time.sleep(0.005)


def wait_for_file(path):
    for _ in range(12_000):
        if path.exists():
            return
        time.sleep(0.005)
    raise TimeoutError(path)


def train_with_a_pause(out, s, phase):
    """Train the stage. Pause in its third step, or in the validation after its fourth."""
    step, rouge_l, scored = train.STEPS[s.method], evaluate.rouge_l, []

    def pausing_step(run, examples, t):
        if phase == "step" and t == 2:
            pause(out)
        return step(run, examples, t)

    def pausing_rouge_l(*arguments):
        scored.append(arguments)
        if phase == "validation" and len(scored) == 3:
            pause(out)
        return rouge_l(*arguments)

    train.STEPS[s.method], evaluate.rouge_l = pausing_step, pausing_rouge_l
    run_command_line(lambda: train.run_stage("stage", s, out, 380, CPU, keep=2))


def fork_on_terminal(function, controlling=True):
    """Fork a process on a new terminal. Returns its id and the terminal's other end, a descriptor.

    controlling: whether the terminal sends SIGHUP to the process when it closes.
    """
    ours, theirs = pty.openpty()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(ours)
            os.setsid()
            if controlling:
                fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
            for descriptor in (0, 1, 2):
                os.dup2(theirs, descriptor)
            os.close(theirs)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            function()
            status = 0
        except SystemExit as exit:
            status = exit.code
        finally:
            os._exit(status)
    os.close(theirs)
    return process, ours


def read_in_background(descriptor):
    """Read what a process shows on its terminal, so that it never waits for room."""

    def read():
        try:
            while os.read(descriptor, 4096):
                pass
        except OSError:
            return

    threading.Thread(target=read, daemon=True).start()


def saved_steps(directory):
    return sorted(int(path.stem[5:]) for path in (directory / "state").glob("*.pt"))


# ---- terminals that close ----------------------------------------------------------------------


@pytest.mark.parametrize("phase, step", [("step", 3), ("validation", 4)])
def test_when_the_terminal_closes_the_state_is_saved_and_the_run_resumes(
    tmp_path, student, teacher, uninterrupted, capsys, phase, step
):
    s = six_steps(student, teacher)
    process, terminal = fork_on_terminal(lambda: train_with_a_pause(tmp_path, s, phase))
    wait_for_file(tmp_path / PAUSED)
    os.close(terminal)
    (tmp_path / GO).touch()
    assert wait_for([process], 60) == [128 + signal.SIGHUP]
    assert saved_steps(tmp_path / "stage")[-1] == step
    output, resumed = resume(tmp_path, s, capsys)
    assert f"resuming after step {step}\n" in output and resumed == uninterrupted


@pytest.mark.parametrize("phase", ["step", "validation"])
@pytest.mark.parametrize("how", ["disowned", "nohup"])
def test_a_run_goes_on_without_its_terminal(tmp_path, student, teacher, uninterrupted, how, phase):
    """A disowned process gets no SIGHUP, and nohup lets it be ignored. Every print fails."""

    def run():
        if how == "nohup":
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        train_with_a_pause(tmp_path, six_steps(student, teacher), phase)

    process, terminal = fork_on_terminal(run, controlling=how == "nohup")
    wait_for_file(tmp_path / PAUSED)
    os.close(terminal)
    (tmp_path / GO).touch()
    assert wait_for([process], 60) == [0]
    assert outcome(tmp_path / "stage") == uninterrupted


def test_a_closed_terminal_ends_other_commands_without_a_traceback(tmp_path):
    """With the status of SIGHUP where it comes, and with success where it doesn't."""

    def command():
        pause(tmp_path)
        print("a result")
        evaluate.tqdm.write("a note")
        with evaluate.tqdm(total=2, file=sys.stderr) as bar:
            bar.update(2)
        write_atomic(tmp_path / "result", "the result")

    for controlling, status, files in ((True, 129, []), (False, 0, ["result"])):
        process, terminal = fork_on_terminal(lambda: run_command_line(command), controlling)
        wait_for_file(tmp_path / PAUSED)
        os.close(terminal)
        (tmp_path / GO).touch()
        assert wait_for([process], 60) == [status]
        for name in (PAUSED, GO):
            (tmp_path / name).unlink()
        assert files_below(tmp_path) == files


def test_a_terminal_shows_the_same_as_before(tmp_path):
    def command():
        print("Größe\ud800 大")
        print("to standard error", file=sys.stderr)

    def run():
        sys.stdout.reconfigure(encoding="utf-8")
        run_command_line(command)

    process, terminal = fork_on_terminal(run)
    assert wait_for([process], 60) == [0]
    assert os.read(terminal, 1000).decode() == "Größe\\ud800 大\r\nto standard error\r\n"
    os.close(terminal)


# ---- pipes whose reader has gone ---------------------------------------------------------------


@pytest.mark.parametrize("number, status", [(None, 0), (signal.SIGINT, 130)])
def test_a_run_whose_output_nobody_reads_any_more_goes_on(
    tmp_path, student, teacher, uninterrupted, capsys, number, status
):
    """As after Ctrl-C in `python train.py | tee log`, which ends tee as well."""
    s = six_steps(student, teacher)
    reader, writer = os.pipe()

    def run():
        os.close(reader)
        os.dup2(writer, 1)
        sys.stdout = open(1, "w", closefd=False)
        train_with_a_pause(tmp_path, s, "step")

    process, terminal = fork_on_terminal(run)
    read_in_background(terminal)
    os.close(writer)
    wait_for_file(tmp_path / PAUSED)
    os.close(reader)
    if number:
        os.kill(process, number)
    (tmp_path / GO).touch()
    assert wait_for([process], 60) == [status]
    if number:
        assert saved_steps(tmp_path / "stage")[-1] == 3
        resume(tmp_path, s, capsys)
    assert outcome(tmp_path / "stage") == uninterrupted


@pytest.mark.parametrize("error, status", [(InputError("wrong"), 2), (KeyboardInterrupt(), 130)])
def test_an_error_that_nobody_reads_ends_a_command_with_its_status(error, status):
    """As after Ctrl-C in `python evaluate.py ... 2>&1 | tee log`."""

    def main():
        raise error

    reader, writer = os.pipe()
    os.close(reader)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "stderr", open(writer, "w", buffering=1))
        run_command_line(main)
    assert exit.value.code == status


# ---- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_in_training_saves_the_state_and_the_run_resumes(
    tmp_path, student, teacher, uninterrupted, capsys, number
):
    s = six_steps(student, teacher)
    process, terminal = fork_on_terminal(lambda: train_with_a_pause(tmp_path, s, "step"))
    read_in_background(terminal)
    wait_for_file(tmp_path / PAUSED)
    os.kill(process, number)
    os.kill(process, number)  # clusters may signal a process and its parent, which passes it on
    (tmp_path / GO).touch()
    assert wait_for([process], 60) == [128 + number]
    os.close(terminal)
    output, resumed = resume(tmp_path, s, capsys)
    assert "resuming after step 3\n" in output and resumed == uninterrupted


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(name):
    number, received = getattr(signal, name), []
    previous = signal.signal(number, signal.SIG_IGN)
    try:

        def main():
            with dist.defer_signals() as signals:
                signal.raise_signal(number)
                received.extend(signals)

        run_command_line(main)
        assert received == [] and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, previous)


def test_where_a_system_lacks_a_signal_the_others_are_handled(monkeypatch):
    for name in ("SIGHUP", "SIGUSR1"):
        monkeypatch.delattr(signal, name)
    with dist.defer_signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.pop() == signal.SIGTERM
    assert run_command_line(lambda: None) is None


def test_in_another_thread_than_the_main_one_commands_run_without_handlers():
    """Python allows handlers in the main thread only; a notebook may run its cells in another."""
    results = []

    def main():
        with dist.defer_signals() as signals:
            results.append(list(signals))

    thread = threading.Thread(target=lambda: results.append(run_command_line(main)))
    thread.start()
    thread.join()
    assert results == [[], None]


SCRIPT = """
import json, pathlib, sys, time
import data.sets.prepare, train
from data.process import dist
from data.process.command_line import run_command_line

data.sets.prepare.DATA_DIR, out = map(pathlib.Path, sys.argv[1:3])
step = train.STEPS["promptkd"]


def pausing_step(run, examples, t):
    if t == 2 and dist.rank() == 1:
        (out / "paused").touch()
        while not (out / "go").exists():
            time.sleep(0.01)
    return step(run, examples, t)


def main():
    device, _ = dist.init_process()
    train.run_stage("stage", train.Settings(**json.loads(sys.argv[3])), out, 380, device, keep=2)


train.STEPS["promptkd"] = pausing_step
run_command_line(main)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_torchrun_passes_a_signal_on_and_both_ranks_save(tmp_path, student, teacher, number):
    """With the options of the reference's command lines. The signal goes to torchrun alone."""
    s = six_steps(student, teacher)

    def train_stage(out):
        dist.init_process()
        train.run_stage("stage", s, out, 380, CPU, keep=2)
        dist.shutdown()

    (tmp_path / "script.py").write_text(SCRIPT)
    options = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:  # not in PyTorch 2.11
        options.append("--shutdown-timeout=600")
    arguments = (
        tmp_path / "script.py",
        data.sets.prepare.DATA_DIR,
        tmp_path,
        json.dumps(asdict(s)),
    )
    process = subprocess.Popen(
        [sys.executable, *torchrun(2, *options), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_file(tmp_path / PAUSED)
    process.send_signal(number)
    time.sleep(0.5)  # torchrun looks at its ranks and signals every 0.1 s
    (tmp_path / GO).touch()
    output, errors = process.communicate(timeout=60)
    stopped = f"stage: stopped by {number.name}, saved at step 3; the same command resumes it"
    assert process.returncode != 0 and output.count(stopped) == 1, errors
    assert saved_steps(tmp_path / "stage")[-1] == 3

    for out in (tmp_path, tmp_path / "whole"):
        ranks = fork_ranks(partial(train_stage, out), 2, tmp_path / f"log of {out.name} ")
        assert wait_for(ranks, 60) == [0, 0]
    [log] = tmp_path.glob("log of test*0")
    assert "resuming after step 3\n" in log.read_text()
    assert outcome(tmp_path / "stage") == outcome(tmp_path / "whole" / "stage")
