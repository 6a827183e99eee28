"""Files that are written atomically, output directories, and JSON."""

import errno
import json
import os
import secrets
from contextlib import contextmanager
from pathlib import Path

from data.process.errors import InputError


def check_output_dir(path, option="--out", fix="choose another"):
    """Raise InputError if `path` can't be created or written to, before hours of work are lost."""
    existing = next(p for p in (Path(path), *Path(path).absolute().parents) if os.path.lexists(p))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{option} {path}: {existing} is not a writable directory; {fix}")


@contextmanager
def name_errors(path):
    """Let the system's errors name the file, which that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


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
        with name_errors(path):
            yield temporary
            with open(temporary, "rb+") as file:
                try:
                    os.fsync(file.fileno())
                except OSError as error:
                    # Some network file systems have no fsync. Other errors: the data may be lost.
                    if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                        raise
            os.replace(temporary, path)
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
