"""Ranks on several hosts: all must read the same data and models, and find what rank 0 writes."""

import os
import secrets
import socket
from pathlib import Path

from data.models.hub import file_hash, find_model_dir, model_files
from data.process import dist
from data.process.errors import InputError


def check_same_files(files, models=()):
    """Raise InputError, on every rank, if ranks would read different content, as they may where
    each host or each working directory has its own copies.

    files: paths, also of files that don't exist. models: names, as `find_model_dir` takes them.
    Only copies are hashed, and never a file that all ranks share.
    """
    if dist.world_size() == 1:
        return
    directories = dist.run_on_rank0(lambda: {name: find_model_dir(name) for name in models})
    paths = list(files)
    for name in models:
        paths += _files_of(directories[name])
    view = {str(path): _identity(path) for path in paths}
    views = dist.all_gather_list([view])
    names = dict.fromkeys(name for view in views for name in view)
    names = [name for name in names if len({view.get(name) for view in views}) > 1]
    if not names:
        return
    # Ranks with the same view, such as those of one host, read the same files: one hashes them.
    is_first = views.index(view) == dist.rank()
    copies = dist.all_gather_list([list(map(_find_copy, names))] if is_first else [])
    for name, *found in zip(names, *copies):
        location, content = found[0]
        others = [place for place, other in found if other != content]
        if others:
            locations = ", ".join([location, *others])
            raise InputError(f"{name}: the ranks' copies differ: {locations}; make them equal")


def _files_of(directory):
    """The files of a model; only its configuration, if weights are missing."""
    try:
        return model_files(directory)
    except InputError:  # which the loading of the model raises again, unless other ranks have them
        return [directory / "config.json"]


def _identity(path):
    """What tells a file from every copy of it, also on another host; None if there is no file."""
    if not os.path.isfile(path):
        return None
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _find_copy(path):
    """Where this rank finds a file, and its hash, None if it can't be read."""
    location = f"{socket.gethostname()}:{os.path.abspath(path)}"
    try:
        return location, file_hash(path)
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
        name = f".shared-{secrets.token_hex(4)}"
        (folders[n] / name).touch()
        return n, name

    n, name = dist.run_on_rank0(write_file)
    file = folders[n] / name
    location = f"{socket.gethostname()}:{os.path.abspath(path)}"
    locations = dist.all_gather_list([(location, file.exists())])
    if dist.rank() == 0:
        file.unlink()
    others = [location for location, is_shared in locations if not is_shared]
    if others:
        problem = f"{locations[0][0]} is not {', '.join(dict.fromkeys(others))}"
        fix = "give a directory that all ranks share, because later stages read it"
        raise InputError(f"--out {path}: {problem}; {fix}")
