"""What every command needs: one-line errors, the command line, atomic writes."""

import errno
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch


class InputError(Exception):
    """Something that the user gave is wrong. The message is one line: what it is, and the mend."""


def run_command_line(main):
    """Run a command. An InputError or OSError ends it with one line and exit status 2; SIGINT and
    SIGTERM end it with one line and 128 + signal."""
    sys.stdout.reconfigure(
        errors="backslashreplace"
    )  # a model's text may hold what the terminal can't show
    status, launched = 0, torch.distributed.is_torchelastic_launched()
    # Clean up on the way out. Not under torchrun: what waits for a peer would never come to Python's handler.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL if launched else _interrupt)
    try:
        main()
        sys.stdout.flush()  # it may be a file on a full disk
    except (InputError, OSError) as error:
        # Under torchrun all ranks tend to fail alike: rank 0 speaks and leaves first, which ends the others. One that is still here after
        # a while has an error of its own.
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(5)
        print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        status = 128 + (error.args or (signal.SIGINT,))[0]
    except SystemExit as leaving:
        status = leaving.code
    finally:
        signal.signal(signal.SIGTERM, before)
    if launched:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(
            status or 0
        )  # never wait for a peer; and gloo's threads, taken down at the interpreter's end, abort the process at times
    if status:
        try:
            sys.stdout.flush()
        except OSError:
            sys.stdout = None  # or Python would try again, and complain, at its end
        sys.exit(status)


def _interrupt(number, frame):
    raise KeyboardInterrupt(number)


def parse_arguments(parser, argv):
    """The parser's answer to the command line. Under torchrun rank 0 alone says what is wrong with it: see `command`."""

    def refuse(message):
        raise InputError(message)

    if int(os.environ.get("RANK", 0)) > 0:
        parser.error = refuse
    return parser.parse_args(argv)


def check_output_dir(path):
    """Raise InputError where no directory can be made at `path` or nothing written in it, before hours of work end with that."""
    there = next(p for p in (Path(path), *Path(path).absolute().parents) if os.path.lexists(p))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(
            f"--out {path}: {there} is no directory that can be written to; choose another"
        )


@contextmanager
def atomic_path(path):
    """Give a temporary path beside `path`. What is written there takes the place of `path` when the
    block ends without an error, and is removed otherwise: `path` holds the whole of the old or the
    whole of the new content at any moment.

    Raises OSError where `path` is a directory, or can't be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "is no plain file, and is not replaced by one", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(name, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # that the disk is full comes without a name
        raise
    finally:
        Path(name).unlink(missing_ok=True)


def write_atomic(path, content):
    """Write text or bytes to `path`, all of it or nothing (see `atomic_path`)."""
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def read_json(path, hint):
    """The value in a JSON file. Raises InputError with the file and a hint where it can't be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: can't be read as JSON ({error}); {hint}") from error


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
