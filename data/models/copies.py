"""Ranks on several hosts: all must read the same data and models, and find what rank 0 writes."""

import os
import socket
import tempfile
from pathlib import Path

from data.models.hub import file_hash, find_model_dir, model_files
from data.process import dist
from data.process.errors import InputError


def check_same_files(files, models=()):
    """Raise InputError, on every rank, if ranks would read different content: where each host, or
    each working directory, has copies of its own.

    files: paths, also of files that do not exist. models: names, as `find_model_dir` takes them.
    Ranks that see the very same files need no hashes. Else one rank of each host makes them.
    """
    if dist.world_size() == 1:
        return
    directories = dist.run_on_rank0(lambda: {name: find_model_dir(name) for name in models})
    paths = [*map(Path, files)]
    for name in models:
        paths += _files_of(directories.get(name, Path(name)))
    view = socket.gethostname(), {str(path): _identity(path) for path in paths}
    views = dist.all_gather_list([view])
    if views.count(view) == len(views):
        return
    copies = None
    if views.index(view) == dist.rank():
        names = dict.fromkeys(name for _, identities in views for name in identities)
        copies = {name: _find_copy(name) for name in names}
    by_host = [found for found in dist.all_gather_list([copies]) if found is not None]
    for name, (location, content) in by_host[0].items():
        others = [found[name][0] for found in by_host if found[name][1] != content]
        if others:
            found = ", ".join([location, *others])
            raise InputError(f"{name}: the ranks' copies differ: {found}; give all the same file")


def _files_of(directory):
    """The files of a model; those that have names of their own, if its weights are incomplete."""
    try:
        return model_files(directory)
    except InputError:  # reported where the model is loaded, unless the ranks' copies differ
        return [directory / "config.json"]


def _identity(path):
    """What tells a file of this host from others and from its later content, None without one."""
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _find_copy(name):
    """Where this rank finds a file, and its hash, None if it can't be read."""
    location = f"{socket.gethostname()}:{os.path.abspath(name)}"
    if not os.path.isfile(name):
        return f"{location} (no such file)", None
    try:
        return location, file_hash(name)
    except OSError as error:
        return f"{location} ({error.strerror})", None


def check_shared_out(path):
    """Raise InputError, on every rank, unless all see the directory of --out that rank 0 sees. It
    may not exist yet."""
    if dist.world_size() == 1:
        return
    folders = [Path(path), *Path(path).absolute().parents]

    def write_file():
        n = next(n for n, folder in enumerate(folders) if folder.is_dir())
        descriptor, file = tempfile.mkstemp(prefix=".shared-", dir=folders[n])
        os.close(descriptor)
        return n, os.path.basename(file)

    n, name = dist.run_on_rank0(write_file)
    file = folders[n] / name
    location = f"{socket.gethostname()}:{os.path.abspath(path)}"
    found = dist.all_gather_list([(location, file.exists())])
    if dist.rank() == 0:
        file.unlink()
    if others := [location for location, is_shared in found if not is_shared]:
        problem = f"{found[0][0]} is not {', '.join(dict.fromkeys(others))}"
        fix = "give a directory that all ranks share, because later stages read it"
        raise InputError(f"--out {path}: {problem}; {fix}")
