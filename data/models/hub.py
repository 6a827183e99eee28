"""Finding a model by name (a directory, the Hugging Face cache, a download), its files, its hash.

The environment variables mean what they mean to Hugging Face's own library, huggingface_hub.
"""

import hashlib
import http.client
import os
import re
import ssl
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from data.models.tokenizer import TOKENIZER_FILES
from data.models.transfer import fetch, open_partial, requested_wait, resumable_size
from data.process import dist
from data.process.errors import InputError
from data.process.files import atomic_path, read_json

OFFICIAL_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json")  # the first that exists
WEIGHTS_FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
NETWORK_ERRORS += (EOFError, ValueError)  # cut off; a wrong address
TRUE = ("1", "ON", "YES", "TRUE")  # values of the hub library's variables
MAX_WAIT = 1800  # seconds in all, for a server that is asked too often
NO_ACCESS = "check the name; if it is private or gated, set HF_TOKEN to a token that may read it"


def weights_files(directory):
    """The paths of a model's weights, [] if it has none. Sharded weights: the index, the shards.
    Raises InputError if the index is damaged or a shard is missing."""
    paths = [Path(directory) / file for file in WEIGHTS_FILES]
    files = list(filter(Path.is_file, paths))[:1]
    files += [path.with_name(name) for path in files for name in _shard_names(path)]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file, but {files[0].name} names it; fetch it again")
    return files


def _shard_names(path):
    """The names of the shards in an index, [] for a file that is not an index."""
    if path.suffix != ".json":
        return []
    weight_map = read_json(path, "fetch it again").get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    # A path could lead out of the directory.
    if not names or not all(map(re.compile(r"[\w.-]+\.(safetensors|bin)").fullmatch, names)):
        raise InputError(f"{path}: its 'weight_map' must name files beside it; fetch it again")
    return sorted(names)


def file_hash(path):
    """SHA-256 of a file in hexadecimal. If it takes over a second, a terminal shows a bar."""
    digest, options = hashlib.sha256(), {"delay": 1, "disable": None, "leave": False}
    options |= {"total": os.path.getsize(path), "desc": f"hashing {os.path.basename(path)}"}
    with open(path, "rb") as file, tqdm.wrapattr(file, "read", **options) as reader:
        while block := reader.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def model_hash(name):
    """SHA-256 in hexadecimal of a model by its name: of its `model_files`. Under torchrun, call it
    with dist.run_on_rank0."""
    files = model_files(find_model_dir(name))
    lines = [f"{path.name} {file_hash(path)}\n" for path in files if path.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def model_files(directory):
    """The paths of a model's configuration, weights (see `weights_files`) and tokenizer. A
    tokenizer has some of these files only."""
    tokenizer = [directory / file for file in TOKENIZER_FILES]
    return [directory / "config.json", *weights_files(directory), *tokenizer]


def hub_path(name):
    """The path of "hub", the Hugging Face cache, or of "token", a file."""
    variables = {"hub": ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"), "token": ("HF_TOKEN_PATH",)}
    # The first variable that is set counts, even if it is empty.
    places = dict.fromkeys(variables[name], "") | {"HF_HOME": name}
    found = next((variable for variable in places if variable in os.environ), "XDG_CACHE_HOME")
    path = os.path.expandvars(os.path.expanduser(os.environ.get(found, "~/.cache")))
    return Path(path, places.get(found, f"huggingface/{name}"))


def _find_token():
    """The user's token for the hub, None if there is none."""
    texts = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    with suppress(OSError):  # there is no such file, or it can't be read
        texts.append(hub_path("token").read_text(encoding="utf-8", errors="replace"))
    return next((token for token in ("".join(text.split()) for text in texts) if token), None)


def hub_url(repository, file):
    """The URL of a file on the Hugging Face hub, or on the mirror that HF_ENDPOINT names."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{endpoint}/{repository}/resolve/main/{file}"


def download(url, path):
    """Download a `hub_url` to `path` atomically. A transfer that broke off, also because its
    process was killed, is resumed if the server still has the same file. Returns False if it has no
    such file (404). Raises InputError if the download fails."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if (value := os.environ.get(name, "")).upper() in TRUE:
            problem = f"is not downloaded yet, and {name}={value} forbids that"
            raise InputError(f"{url}: {problem}; unset it, or put the file at {path} yourself")
    failures, waited = 0, 0  # attempts since the last progress; seconds
    with open_partial(Path(path)) as partial:
        while failures < 3:
            time.sleep(failures)
            size = resumable_size(partial)
            try:
                with atomic_path(path) as temporary:
                    fetch(url, partial, _find_token())
                    os.replace(partial, temporary)
                return True
            except NETWORK_ERRORS as error:
                if getattr(error, "code", None) == 404:
                    return False
                problem, wait = _explain(url, error)
            if wait is not None:
                wait = max(wait, waited, 1)  # so that all of it doubles at least
                waited += wait
                if waited > MAX_WAIT:
                    raise InputError(f"{url}: {problem} and asks to wait; try again later")
                print(f"{url}: {problem}; waiting {wait:,} s", file=sys.stderr, flush=True)
                time.sleep(wait)
            else:
                failures = 1 if resumable_size(partial) > size else failures + 1
        fix = "check the network, or set HF_ENDPOINT to a mirror"
        if size := resumable_size(partial):
            fix += f"; the {size:,} bytes that arrived are kept for the next attempt"
    raise InputError(f"{url}: download failed 3 times ({problem}); {fix}")


def _explain(url, error):
    """What went wrong in a transfer, and how many seconds the server asks to wait, None if it does
    not. Raises InputError if another attempt would not help."""
    if not isinstance(error, urllib.error.HTTPError):
        problem = getattr(error, "reason", error)
        if isinstance(problem, ssl.SSLCertVerificationError):
            problem = f"its certificate can't be verified ({problem.verify_message})"
            fix = "set SSL_CERT_FILE to the file with the certificates of your network"
            raise InputError(f"{url}: {problem}; {fix}") from error
        return problem, None
    problem = f"the server answers {error.code} {error.reason}"
    # 401 is also the hub's answer to an unknown name, and to a token that has expired.
    if error.code in (400, 401, 403):
        raise InputError(f"{url}: {problem}; {NO_ACCESS}") from error
    if error.code not in (429, 503):
        return problem, None
    return problem, requested_wait(error.headers)


def find_model_dir(name):
    """The directory of a model's files. `name` is a directory (of a checkpoint, or of a run, which
    has a `best/`), one of OFFICIAL_MODELS, or a hub id `owner/name`, which is taken from the
    Hugging Face cache or downloaded once. Under torchrun, call it with dist.run_on_rank0."""
    directory, problem = find_local_model(name)
    if directory is not None:
        return directory
    repository = hub_repository(name)
    directory = download_dir(repository)
    try:
        _download_model(repository, directory)
    except (InputError, OSError) as error:  # OSError: as for a full disk
        problem = f"no such directory; {problem}; download to TORCH_HOME failed: {error}"
        raise InputError(f"model {name!r}: {problem}") from error
    return directory


def hub_repository(name):
    """The repository `owner/name` of one of OFFICIAL_MODELS or of a hub id."""
    return f"openai-community/{name}" if name in OFFICIAL_MODELS else name


def download_dir(repository):
    """Where a repository is downloaded to if the Hugging Face cache does not have it."""
    return Path(torch.hub.get_dir()) / "promptkd" / repository


def find_local_model(name):
    """The directory of a model's files, as `find_model_dir`, and "", or None and why it has to be
    downloaded first. Downloads and writes nothing."""
    if os.path.isdir(name):
        best = Path(name) / "best"
        directory = best if best.is_dir() else Path(name)
        if name in OFFICIAL_MODELS:
            problem = f"model {name!r}: the folder {name} here hides the official model"
            message = f"{problem}; rename it or give openai-community/{name}"
            if not (directory / "config.json").is_file():
                raise InputError(message)
            dist.print_once(f"warning: {message}")
        return directory, ""
    repository = hub_repository(name)
    if not HUB_ID.fullmatch(repository) or ".." in repository:
        names = f"one of {', '.join(OFFICIAL_MODELS)}, or a hub id owner/name"
        raise InputError(f"model {name!r}: no such directory; give a checkpoint directory, {names}")
    problem = f"the Hugging Face cache {hub_path('hub')} does not have it"
    for snapshot in _snapshots(repository):
        missing = _missing_file(snapshot, repository)
        if missing is None:
            return snapshot, ""
        problem = f"{snapshot} has no {missing}"
    directory = download_dir(repository)
    if (directory / "config.json").is_file():  # it is downloaded last
        return directory, ""
    return None, problem


def _snapshots(repository):
    """Yield where a model's main revision is in the Hugging Face cache, if it is there."""
    for name in (repository, repository.removeprefix("openai-community/")):
        folder = hub_path("hub") / f"models--{name.replace('/', '--')}"
        with suppress(OSError, ValueError):
            revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
            # A revision with a path separator would lead out of the cache.
            if re.fullmatch(r"\w+", revision):
                yield folder / "snapshots" / revision


def _missing_file(snapshot, repository):
    """The name of a file that a snapshot lacks to be a complete model, None if it is one."""
    files = {path.name for path in snapshot.glob("*") if path.is_file()}
    weights = next((file for file in WEIGHTS_FILES if file in files), WEIGHTS_FILES[0])
    needed = ["config.json", weights, *_shard_names(snapshot / weights)]
    # transformers leaves a snapshot without the tokenizer if it loads only the model. GPT-2's would
    # be the wrong one, except for the official models.
    is_official = repository.removeprefix("openai-community/") in OFFICIAL_MODELS
    if not is_official and not files >= {"vocab.json", "merges.txt"}:
        needed.append("tokenizer.json")
    return next((file for file in needed if file not in files), None)


def _download_model(repository, directory):
    """Download what is missing of a model to its directory."""

    def fetch(file):
        path = directory / file
        return path.is_file() or download(hub_url(repository, file), path)

    weights = next((file for file in WEIGHTS_FILES if fetch(file)), WEIGHTS_FILES[0])
    shards = _shard_names(directory / weights)
    for file in (weights, *shards, *TOKENIZER_FILES, "config.json"):
        # A repository without a tokenizer has GPT-2's.
        if not fetch(file) and file not in TOKENIZER_FILES:
            raise InputError(f"{hub_url(repository, file)} does not exist; {NO_ACCESS}")
