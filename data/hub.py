"""Finding a model by its name: a directory, the Hugging Face cache, or a download."""

import http.client
import os
import re
import time
import urllib.request
from pathlib import Path

import torch
from tqdm import tqdm

from data.cli import InputError

OFFICIAL_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def hub_url(repository, file):
    """The address of a file on the Hugging Face hub, or on the mirror that HF_ENDPOINT names."""
    return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{repository}/resolve/main/{file}"


def download(url, path, attempts=3):
    """Download `url` to `path`, which is whole or absent: the bytes go to a temporary name first and are counted.

    A transfer that breaks off is started over. Returns False where the server has no such file (404); raises InputError
    where it can't be had.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        for attempt in range(1, attempts + 1):
            try:
                _fetch(url, partial)
                os.replace(partial, path)
                return True
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return False
                problem = f"the server answers {error.code} {error.reason}"
                if error.code in (401, 403):  # the hub's answer to an unknown name, too
                    raise InputError(
                        f"{url}: {problem}: nothing public has this name; check it"
                    ) from error
            except (
                urllib.error.URLError,
                http.client.HTTPException,
                ConnectionError,
                TimeoutError,
                EOFError,
                ValueError,
            ) as error:
                problem = str(getattr(error, "reason", error))
            except OSError as error:
                error.filename = error.filename or str(path)
                raise
            if attempt < attempts:
                time.sleep(attempt)
    finally:
        partial.unlink(missing_ok=True)
    raise InputError(
        f"{url}: download failed {attempts} times ({problem}); check the network, or set HF_ENDPOINT to a mirror"
    )


def _fetch(url, partial):
    with urllib.request.urlopen(url, timeout=60) as response, open(partial, "wb") as file:
        size = response.headers.get("Content-Length")
        with tqdm(
            total=size and int(size),
            unit="B",
            unit_scale=True,
            desc=url.rsplit("/", 1)[-1],
            disable=None,
        ) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
        if size is not None and file.tell() != int(size):
            raise EOFError(f"cut off after {file.tell():,} of {int(size):,} bytes")
        file.flush()
        os.fsync(file.fileno())


def find_model_dir(name):
    """The directory of a model's files: `name` is a directory (of a checkpoint, or of a run that has a `best/`), one of
    OFFICIAL_MODELS, or a hub id `owner/name`, which is taken from the Hugging Face cache or downloaded once.

    Under torchrun call it on one rank and let the others wait (ranks.on_first).
    """
    directory = Path(name)
    if os.path.isdir(name):
        return directory / "best" if (directory / "best").is_dir() else directory
    repository = f"openai-community/{name}" if name in OFFICIAL_MODELS else name
    if not HUB_ID.fullmatch(repository) or ".." in repository:
        raise InputError(
            f"model {name!r}: no such directory; give a checkpoint directory, one of {', '.join(OFFICIAL_MODELS)}, or a hub id owner/name"
        )
    return _in_hub_cache(repository) or _downloaded(repository, name)


def _in_hub_cache(repository):
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    for folder in (
        "models--" + repository.replace("/", "--"),
        "models--" + repository.removeprefix("openai-community/"),
    ):
        main = cache / folder / "refs" / "main"
        if main.is_file() and re.fullmatch(
            r"\w+", revision := main.read_text(errors="replace").strip()
        ):
            snapshot = cache / folder / "snapshots" / revision
            if (snapshot / "config.json").is_file() and any(
                (snapshot / w).is_file() for w in ("model.safetensors", "pytorch_model.bin")
            ):
                return snapshot
    return None


def _downloaded(repository, name):
    directory = Path(torch.hub.get_dir()) / "promptkd" / repository
    if (directory / "config.json").is_file():  # comes last: then everything is here
        return directory
    if not any(
        (directory / w).is_file() or download(hub_url(repository, w), directory / w)
        for w in ("model.safetensors", "pytorch_model.bin")
    ):
        raise InputError(
            f"model {name!r}: no such directory, and {hub_url(repository, 'model.safetensors')} does not exist; check the name"
        )
    for file in ("vocab.json", "merges.txt"):  # where they are absent, the tokenizer is GPT-2's
        (directory / file).is_file() or download(hub_url(repository, file), directory / file)
    if not download(hub_url(repository, "config.json"), directory / "config.json"):
        raise InputError(
            f"model {name!r}: {hub_url(repository, 'config.json')} does not exist; it is no Hugging Face model"
        )
    return directory
