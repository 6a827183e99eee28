"""What every command needs: one-line errors, the command line, atomic writes."""

import errno
import json
import os
import secrets
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch


class InputError(Exception):
    """The user's input is wrong. The message is one line: what is wrong, and how to fix it."""


def run_command_line(main):
    """Run a command. An InputError or OSError ends it with one line and exit status 2; SIGINT and
    SIGTERM end it with one line and exit status 128 + signal."""
    # A model's text may contain characters that the terminal can't show.
    sys.stdout.reconfigure(errors="backslashreplace")
    status, launched = 0, torch.distributed.is_torchelastic_launched()
    # SIGTERM raises, so that temporary files are removed. Not under torchrun: a rank that waits for
    # a peer inside a collective would never return to Python and run the handler.
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL if launched else _interrupt)
    try:
        main()
        sys.stdout.flush()  # raises here if it is a file on a full disk
    except (InputError, OSError) as error:
        # Under torchrun all ranks tend to fail with the same error. Rank 0 reports it and exits
        # first, which ends the others. A rank that is still here later has an error of its own.
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(5)
        # One write, so that lines of several ranks don't mix.
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        status = 2
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        status = 128 + (error.args or (signal.SIGINT,))[0]
    except SystemExit as error:
        status = error.code
    finally:
        signal.signal(signal.SIGTERM, previous)
    if launched:
        sys.stdout.flush()
        # Don't wait for a peer, nor for gloo's threads, whose destruction can abort the process.
        os._exit(status or 0)
    if status:
        try:
            sys.stdout.flush()
        except OSError:
            sys.stdout = None  # or Python flushes again at exit and prints a second error
        sys.exit(status)


def _interrupt(number, frame):
    raise KeyboardInterrupt(number)


def parse_arguments(parser, argv):
    """Parse a command line. Under torchrun only rank 0 prints usage errors."""

    def raise_error(message):
        raise InputError(message)

    if int(os.environ.get("RANK", 0)) > 0:
        parser.error = raise_error
    return parser.parse_args(argv)


def check_output_dir(path):
    """Raise InputError if `path` can't be created or written to, before hours of work are lost."""
    existing = next(p for p in (Path(path), *Path(path).absolute().parents) if os.path.lexists(p))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"--out {path}: {existing} is not a writable directory; choose another")


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
            os.fsync(file.fileno())
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
        content = content.encode("utf-8", "surrogatepass")
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def read_json(path, hint):
    """Parse a JSON file. Raises InputError with the file and `hint`, the fix, if that fails."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: can't be read as JSON ({error}); {hint}") from error
