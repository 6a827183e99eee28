"""Finding a model by name: a directory, the Hugging Face cache, or a download."""

import http.client
import os
import re
import time
import urllib.request
from pathlib import Path

import torch
from tqdm import tqdm

from data.cli import InputError, atomic_path

OFFICIAL_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def hub_url(repository, file):
    """The URL of a file on the Hugging Face hub, or on the mirror that HF_ENDPOINT names."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{endpoint}/{repository}/resolve/main/{file}"


def download(url, path, attempts=3):
    """Download `url` to `path` atomically, from the start again if the transfer breaks off.

    Returns False if the server has no such file (404). Raises InputError if the download fails.
    """
    for attempt in range(attempts):
        if attempt > 0:
            time.sleep(attempt)
        try:
            with atomic_path(path) as temporary:
                _fetch(url, temporary)
            return True
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return False
            problem = f"the server answers {error.code} {error.reason}"
            if error.code in (401, 403):  # also the hub's answer to an unknown name
                raise InputError(f"{url}: {problem}; check the name: it is not public") from error
        except (*NETWORK_ERRORS, EOFError, ValueError) as error:
            problem = getattr(error, "reason", error)
    fix = "check the network, or set HF_ENDPOINT to a mirror"
    raise InputError(f"{url}: download failed {attempts} times ({problem}); {fix}")


def _fetch(url, path):
    with urllib.request.urlopen(url, timeout=60) as response, open(path, "wb") as file:
        length = response.headers.get("Content-Length")
        size = None if length is None else int(length)
        name = url.rsplit("/", 1)[-1]
        with tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
        if size is not None and file.tell() != size:
            raise EOFError(f"cut off after {file.tell():,} of {size:,} bytes")


def find_model_dir(name):
    """The directory of a model's files. `name` is a directory (of a checkpoint, or of a run, which
    has a `best/`), one of OFFICIAL_MODELS, or a hub id `owner/name`, which is taken from the
    Hugging Face cache or downloaded once.

    Under torchrun, call it with dist.run_on_rank0. Raises InputError if there is no such model.
    """
    directory = Path(name)
    if os.path.isdir(name):
        return directory / "best" if (directory / "best").is_dir() else directory
    repository = f"openai-community/{name}" if name in OFFICIAL_MODELS else name
    if not HUB_ID.fullmatch(repository) or ".." in repository:
        names = f"one of {', '.join(OFFICIAL_MODELS)}, or a hub id owner/name"
        raise InputError(f"model {name!r}: no such directory; give a checkpoint directory, {names}")
    return _find_in_cache(repository) or _download_model(repository, name)


def _find_in_cache(repository):
    """The model's snapshot in the Hugging Face cache, None if there is no complete one."""
    hf_home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", hf_home / "hub"))
    for name in (repository, repository.removeprefix("openai-community/")):
        folder = cache / f"models--{name.replace('/', '--')}"
        ref = folder / "refs" / "main"
        revision = ref.read_text(errors="replace").strip() if ref.is_file() else ""
        snapshot = folder / "snapshots" / revision
        has_weights = any(os.path.isfile(snapshot / file) for file in WEIGHTS_FILES)
        # A revision with a path separator would lead out of the cache.
        if re.fullmatch(r"\w+", revision) and has_weights and (snapshot / "config.json").is_file():
            return snapshot
    return None


def _download_model(repository, name):
    directory = Path(torch.hub.get_dir()) / "promptkd" / repository

    def fetch(file):
        path = directory / file
        return path.is_file() or download(hub_url(repository, file), path)

    # config.json is downloaded last: where it is, the model is complete.
    if (directory / "config.json").is_file():
        return directory
    if not any(fetch(file) for file in WEIGHTS_FILES):
        url = hub_url(repository, WEIGHTS_FILES[0])
        problem = f"no such directory, and {url} does not exist; check the name"
        raise InputError(f"model {name!r}: {problem}")
    for file in ("vocab.json", "merges.txt"):
        fetch(file)  # if absent, the tokenizer is GPT-2's
    if not fetch("config.json"):
        url = hub_url(repository, "config.json")
        raise InputError(f"model {name!r}: {url} does not exist; it is not a Hugging Face model")
    return directory
