"""What every command needs: the command line, signals, and streams that outlive their reader."""

import argparse
import errno
import io
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from data.process.errors import InputError, explain_out_of_memory

# The signals that end a run: from the keyboard, by `kill`, from a terminal that closes, and what
# clusters send some time before they end a job. Windows has the first two only.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


def is_launched():
    """Whether torchrun or another launcher started this process as one of several ranks. What it
    set may be wrong: see `dist.check_launcher`."""
    is_one_of_several = os.environ.get("WORLD_SIZE", "").strip() not in ("", "1")
    return is_one_of_several or torch.distributed.is_torchelastic_launched()


LAUNCH_FIX = "start one process per rank with torchrun --nproc_per_node=N"
TEXT_OPTIONS = ("--instruction", "--input", "--prompt-text")


def normalize(argument):
    """An argument of the command line with hyphens in its option's name, as in `--top_k`, and with
    the home directory in `--out=~/x`: a shell expands a `~` at the start of a word only."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    option = option.replace("_", "-")
    if option == "--local-rank":
        problem = "is what deepspeed and torch.distributed.launch add for each process"
        raise InputError(f"{argument} {problem}; {LAUNCH_FIX}, which adds none")
    value = value if option in TEXT_OPTIONS else os.path.expanduser(value)
    return f"{option}{equals}{value}"


class ArgumentParser(argparse.ArgumentParser):
    """Reports a mistake in one line, and by one of several ranks (see `run_command_line`)."""

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_args(list(map(normalize, args)), namespace)

    def error(self, message):
        raise InputError(f"{message}; see --help")


def number_in_range(kind, low, high, low_open=False, advice=""):
    """An argparse type: an int or float from `low` (above it, if low_open) to `high`. advice: ends
    the message about another number."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (low_open and value == low):
            least = "above" if low_open else "at least"
            expected = f"{least} {low} and at most {high}"
            raise argparse.ArgumentTypeError(f"must be {expected}, not {text!r}{advice}")
        return value

    # argparse's own message uses the name.
    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def run_command_line(main):
    """Run a command. An InputError or OSError ends it with one line and exit status 2; a signal of
    STOP_SIGNALS ends it with one line and exit status 128 + signal."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    sys.stdout = _open_stream(sys.stdout, "standard output")
    sys.stderr = _open_stream(sys.stderr, "standard error")
    status, launched = 0, is_launched()
    # The signals raise, so that temporary files are removed. Not under a launcher: a rank that
    # waits for a peer inside a collective would never return to Python and run the handler.
    handler = signal.SIG_DFL if launched else interrupt
    name, fix = Path(sys.argv[0]).name, "use a smaller model or more memory"
    try:
        with handle_signals(handler), explain_out_of_memory(name, fix):
            main()
        sys.stdout.flush()  # raises here if it is a file on a full disk
    except (InputError, OSError) as error:
        # Under torchrun all ranks tend to fail with the same error. Rank 0 reports it and exits
        # first, which ends the others. A rank that is still here later has an error of its own.
        if launched and os.environ.get("RANK", "").strip() not in ("", "0"):
            time.sleep(5)
        _print_error(f"error: {' '.join(str(error).split())}")
        status = 2
    except KeyboardInterrupt as error:
        _print_error("interrupted")
        status = 128 + (error.args or (signal.SIGINT,))[0]
    except SystemExit as error:
        status = error.code
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            setattr(sys, name, None)  # or Python flushes again at exit and reports a second error
    if launched:
        # Don't wait for a peer, nor for gloo's threads, whose destruction can abort the process.
        os._exit(status or 0)
    if status:
        sys.exit(status)


def _print_error(line):
    """Print a line to standard error, if that can be written to."""
    with suppress(OSError):
        sys.stderr.write(f"{line}\n")  # at once, so that lines of several ranks don't mix


@contextmanager
def handle_signals(handler):
    """Handle STOP_SIGNALS in the block. One that is ignored, as nohup does SIGHUP, stays so."""
    # Python allows it in the main thread only. A notebook may run its cells in another one.
    in_main_thread = threading.current_thread() is threading.main_thread()
    with ExitStack() as restore:
        for name in STOP_SIGNALS if in_main_thread else ():
            number = getattr(signal, name, None)
            # Shells ignore SIGINT for the background jobs of a script, where `kill -INT` is meant.
            if number and (name == "SIGINT" or signal.getsignal(number) is not signal.SIG_IGN):
                restore.callback(signal.signal, number, signal.signal(number, handler))
        yield


class _Output(io.FileIO):
    """Standard output or error. Once nobody reads a terminal or a pipe any more, what is written to
    it is dropped. Other errors, such as that of a full disk, name the stream."""

    def __init__(self, descriptor, label):
        super().__init__(descriptor, "w")
        self.label = label

    def write(self, content):
        try:
            return super().write(content)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EPIPE) and not self.seekable():
                return len(content)
            error.filename = self.label
            raise


def _open_stream(stream, label):
    """Standard output or error as an _Output. A notebook's stays as it is."""
    if stream is None:  # closed before the start
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    # A model's text may contain characters that the terminal can't show.
    stream.reconfigure(errors="backslashreplace")
    if os.name != "posix":
        return stream
    try:
        descriptor = os.dup(stream.fileno())
    except io.UnsupportedOperation:  # it is in memory
        return stream
    buffer = io.BufferedWriter(_Output(descriptor, label))
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)
