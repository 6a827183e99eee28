"""Signals that end a run, terminals that close and pipes that nobody reads any more."""

import fcntl
import os
import pty
import signal
import sys
import termios
import threading
import time
from contextlib import suppress

import pytest
import torch.distributed.run
from helpers import files_below, fork_ranks, free_port, wait_for
from test_resume import no_plots, outcome, resume, six_steps, uninterrupted  # noqa: F401
from test_train import CPU, student, teacher, world  # noqa: F401
from torch.distributed.launcher.api import LaunchConfig

import evaluate
import train
from data.process import dist
from data.process.command_line import STOP_SIGNALS, run_command_line
from data.process.errors import InputError
from data.process.files import write_atomic

PAUSED, GO = "paused", "go"  # files by which a run and its test wait for each other
STOPPING = "stopping after this step; once more, after ten seconds, ends at once\n"


def pause(directory):
    """Wait, in the run, until the test lets it continue."""
    (directory / PAUSED).touch()
    while not (directory / GO).exists():
        time.sleep(0.005)


def wait_until(condition):
    for _ in range(12_000):
        if condition():
            return
        time.sleep(0.005)
    raise TimeoutError


def wait_for_file(path):
    wait_until(path.exists)


def train_with_a_pause(out, s, phase, device=CPU):
    """Train the stage. The last rank pauses in the third step, or in the validation after the
    fourth."""
    step, rouge_l, scored = train.STEPS[s.method], evaluate.rouge_l, []

    def pausing_step(run, examples, t):
        if phase == "step" and t == 2 and dist.rank() == dist.world_size() - 1:
            pause(out)
        return step(run, examples, t)

    def pausing_rouge_l(*arguments):
        scored.append(arguments)
        if phase == "validation" and len(scored) == 3:
            pause(out)
        return rouge_l(*arguments)

    train.STEPS[s.method], evaluate.rouge_l = pausing_step, pausing_rouge_l
    train.run_stage("stage", s, out, 380, device, keep=2)


def fork_on_terminal(function, controlling=True):
    """Fork a process on a new terminal. Returns its id and the terminal's other end, a descriptor.

    controlling: whether the terminal sends SIGHUP to the process when it closes.
    """
    process, terminal = pty.fork()
    if process == 0:
        status = 1
        try:
            if not controlling:
                previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which comes now, too
                fcntl.ioctl(0, termios.TIOCNOTTY)
                signal.signal(signal.SIGHUP, previous)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            function()
            status = 0
        except SystemExit as exit:
            status = exit.code
        finally:
            os._exit(status)
    return process, terminal


def read_all(descriptor):
    """Read what a process shows on its terminal, so that it never waits for room."""
    with suppress(OSError):
        while os.read(descriptor, 4096):
            pass


def saved_steps(directory):
    return sorted(int(path.stem[5:]) for path in (directory / "state").glob("*.pt"))


# ---- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event, phase, status, saved",
    [
        ("the terminal closes", "step", 128 + signal.SIGHUP, 3),
        ("the terminal closes", "validation", 128 + signal.SIGHUP, 4),
        # A disowned process gets no SIGHUP, and nohup lets it be ignored. Every print fails.
        ("the terminal of a disowned process closes", "step", 0, None),
        ("the terminal closes under nohup", "validation", 0, None),
        # As after Ctrl-C in `python train.py | tee log`, which ends tee as well
        ("the pipe closes", "step", 0, None),
        ("the pipe closes, SIGINT", "step", 128 + signal.SIGINT, 3),
        # Clusters may signal a process and its parent, which passes it on.
        ("SIGUSR1, SIGUSR1", "step", 128 + signal.SIGUSR1, 3),
    ],
)
def test_a_run_saves_its_state_and_resumes_or_goes_on(
    tmp_path, student, teacher, uninterrupted, capsys, event, phase, status, saved
):
    s = six_steps(student, teacher)
    reader, writer = os.pipe()

    def run():
        os.close(reader)
        if "nohup" in event:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if "pipe" in event:
            os.dup2(writer, 1)
            sys.stdout = open(1, "w", closefd=False)
        run_command_line(lambda: train_with_a_pause(tmp_path, s, phase))

    process, terminal = fork_on_terminal(run, controlling="disowned" not in event)
    os.close(writer)
    wait_for_file(tmp_path / PAUSED)
    os.close(reader)
    if "terminal" in event:
        os.close(terminal)
    else:
        threading.Thread(target=read_all, args=[terminal], daemon=True).start()
    for name in event.split(", "):
        if name in STOP_SIGNALS:
            os.kill(process, getattr(signal, name))
    (tmp_path / GO).touch()
    assert wait_for([process], 60) == [status]
    if saved:
        assert saved_steps(tmp_path / "stage")[-1] == saved
        output, _ = resume(tmp_path, s, capsys)
        assert f"resuming after step {saved}\n" in output
    assert outcome(tmp_path / "stage") == uninterrupted


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_torchrun_passes_a_signal_on_and_both_ranks_save(
    tmp_path, monkeypatch, student, teacher, number
):
    """With the options of the reference's command lines. The signal goes to torchrun alone, which
    runs in a fork, and so do its ranks: that saves the seconds of three imports."""
    s = six_steps(student, teacher)

    def train_stage():
        dist.init_process()
        train_with_a_pause(tmp_path, s, "step")
        dist.shutdown()

    def launch():
        options = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
        if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:  # not in PyTorch 2.11
            options.append("--shutdown-timeout=600")
        options += [f"--master_port={free_port()}", "--master_addr=127.0.0.1", "--nproc_per_node=2"]
        torch.distributed.run.main([*options, "--start-method=fork", "--run-path", "script.py"])

    def run_script_path(script):
        run_command_line(train_stage)

    monkeypatch.setattr(torch.distributed.run, "run_script_path", run_script_path)
    [process] = fork_ranks(launch, 1, tmp_path / "log of torchrun ")
    log = tmp_path / "log of torchrun 0"
    wait_for_file(tmp_path / PAUSED)
    os.kill(process, number)
    wait_until(lambda: STOPPING in log.read_text())
    (tmp_path / GO).touch()
    [status] = wait_for([process], 60)
    output = log.read_text()
    stopped = f"stage: stopped by {number.name}, saved at step 3; the same command resumes it"
    assert status != 0 and output.count(stopped) == output.count(STOPPING) == 1, output
    assert saved_steps(tmp_path / "stage")[-1] == 3
    assert wait_for(fork_ranks(train_stage, 2, tmp_path / "log"), 60) == [0, 0]
    assert "resuming after step 3\n" in (tmp_path / "log0").read_text()


def test_a_second_signal_after_ten_seconds_ends_a_rank_whose_peer_is_frozen(tmp_path, monkeypatch):
    """The first waits in a collective, where Python runs no handler."""

    def step():
        dist.init_process()
        with dist.defer_signals():
            dist.all_gather_list([])  # now both defer them
            if dist.rank() == 1:
                (tmp_path / PAUSED).touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            dist.all_gather_list([])

    monkeypatch.setattr(dist, "PATIENCE", dist.PATIENCE / 50)
    waiting, frozen = fork_ranks(step, 2, tmp_path / "log")
    wait_for_file(tmp_path / PAUSED)
    for _ in range(2):  # as from torchrun or a terminal
        os.kill(waiting, signal.SIGINT)
    wait_until(lambda: STOPPING in (tmp_path / "log0").read_text())
    time.sleep(11 / 50)
    os.kill(waiting, signal.SIGTERM)
    assert wait_for([waiting], 60) == [128 + signal.SIGTERM]
    os.kill(frozen, signal.SIGKILL)
    wait_for([frozen], 60)
    ended = "ended by SIGTERM before the step was complete"
    ended += "; the same command resumes from the last saved state\n"
    assert (tmp_path / "log0").read_text().endswith(f"\n{STOPPING}{ended}")


# ---- other commands ----------------------------------------------------------------------------


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


def test_a_terminal_shows_the_same_as_before():
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


# ---- handlers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOP_SIGNALS)
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(name):
    """But for SIGINT, which shells ignore for the background jobs of a script."""
    number, received = getattr(signal, name), []
    previous = signal.signal(number, signal.SIG_IGN)

    def main():
        with dist.defer_signals() as signals:
            signal.raise_signal(number)
            received.extend(signals)
            signals.clear()

    try:
        run_command_line(main)
        assert received == ([number] if name == "SIGINT" else [])
        assert signal.getsignal(number) is signal.SIG_IGN
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
