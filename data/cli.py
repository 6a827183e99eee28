"""What every command needs: one-line errors, the command line, atomic writes."""

import argparse
import errno
import io
import json
import os
import re
import secrets
import signal
import sys
import threading
import time
import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch


class InputError(Exception):
    """The user's input is wrong. The message is one line: what is wrong, and how to fix it."""


# The signals that end a run: from the keyboard, by `kill`, from a terminal that closes, and what
# clusters send some time before they end a job. Windows has the first two only.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


def is_launched():
    """Whether torchrun or another launcher started this process as one of several ranks. What it
    set may be wrong: see `dist.check_launcher`."""
    is_one_of_several = os.environ.get("WORLD_SIZE", "").strip() not in ("", "1")
    return is_one_of_several or torch.distributed.is_torchelastic_launched()


class ArgumentParser(argparse.ArgumentParser):
    """Reports a mistake in one line, and by one of several ranks (see `run_command_line`)."""

    def error(self, message):
        raise InputError(f"{message}; see --help")


def number_in_range(kind, low, high, low_open=False):
    """An argparse type: an int or float from `low` (above it, if low_open) to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (low_open and value == low):
            least = "above" if low_open else "at least"
            expected = f"{least} {low} and at most {high}"
            raise argparse.ArgumentTypeError(f"must be {expected}, not {text!r}")
        return value

    # argparse's own message uses the name.
    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def run_command_line(main):
    """Run a command. An InputError or OSError ends it with one line and exit status 2; a signal of
    STOP_SIGNALS ends it with one line and exit status 128 + signal."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    sys.stdout, sys.stderr = _open_stream(sys.stdout), _open_stream(sys.stderr)
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
        # One write, so that lines of several ranks don't mix.
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        status = 2
    except KeyboardInterrupt as error:
        sys.stderr.write("interrupted\n")
        status = 128 + (error.args or (signal.SIGINT,))[0]
    except SystemExit as error:
        status = error.code
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = None  # or Python flushes again at exit and prints a second error
    if launched:
        # Don't wait for a peer, nor for gloo's threads, whose destruction can abort the process.
        os._exit(status or 0)
    if status:
        sys.exit(status)


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
    """A terminal or a pipe. Once nobody reads it any more, what is written to it is dropped."""

    def write(self, content):
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            return len(content)


def _open_stream(stream):
    """Standard output or error in a form that outlives its reader. A notebook's stays as it is."""
    if stream is None:  # closed before the start
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    # A model's text may contain characters that the terminal can't show.
    stream.reconfigure(errors="backslashreplace")
    if os.name != "posix" or stream.seekable():
        return stream
    buffer = io.BufferedWriter(_Output(os.dup(stream.fileno()), "w"))
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)


# How errors for lack of memory read: of Python, C and C++, PyTorch, CUDA's libraries, oneDNN.
OUT_OF_MEMORY = re.compile(
    r"MemoryError|out of memory|not enough memory|(can't|cannot|could not) allocate|bad_alloc"
    r"|_ALLOC_FAILED|failed to map segment|could not create a (memory( object)?|primitive)$",
    re.IGNORECASE,
)


@contextmanager
def explain_out_of_memory(location, fix):
    """Turn an error for lack of memory, of a CPU or a GPU, into an InputError. The innermost of
    several contexts reports it. location: what needed the memory. fix: what to lower."""

    def is_out_of_memory(error):
        text = getattr(error, "strerror", None) or error  # an OSError without its file's name
        found = OUT_OF_MEMORY.search(f"{type(error).__name__}: {text}")
        return found and not isinstance(error, InputError)

    try:
        yield
    except Exception as error:
        # An error for lack of memory may be the reason for another one, as in reading a file.
        reason = error
        while reason is not None and not is_out_of_memory(reason):
            reason = reason.__cause__ if reason.__suppress_context__ else reason.__context__
        if reason is None:
            raise
        # The frames hold the tensors that took the memory. The message needs a little of it.
        traceback.clear_frames(reason.__traceback__)
        raise InputError(f"{location}: out of memory; {fix}") from None


def check_output_dir(path, option="--out", fix="choose another"):
    """Raise InputError if `path` can't be created or written to, before hours of work are lost."""
    existing = next(p for p in (Path(path), *Path(path).absolute().parents) if os.path.lexists(p))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{option} {path}: {existing} is not a writable directory; {fix}")


@contextmanager
def atomic_path(path):
    """Yield a temporary path next to `path`. The file written there replaces `path` if the block
    ends without an error and is removed otherwise. `path` never holds partial content."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "exists and is not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            try:
                os.fsync(file.fileno())
            except OSError as error:
                # Some network file systems have no fsync. Other errors: the data may be lost.
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                    raise
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and not error.filename:  # as with "No space left on device"
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path, content):
    """Write text or bytes to `path` atomically (see `atomic_path`)."""
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def check_lfs_pointer(path):
    """Raise InputError if git-lfs has left a pointer in a file's place."""
    start = b"version https://git-lfs.github.com/spec/"
    with open(path, "rb") as file:
        is_pointer = file.read(len(start)) == start
    if is_pointer:
        raise InputError(f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull`")


def read_json(path, hint):
    """Read a file with a JSON object. hint: how to fix it, for the InputError if that fails."""
    try:
        check_lfs_pointer(path)
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: can't be read as JSON ({error}); {hint}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a JSON object; {hint}")
    return content
