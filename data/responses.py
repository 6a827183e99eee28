"""The responses of an evaluation, kept on disk with all that they depend on."""

import hashlib
import json

from tqdm import tqdm

from data.cli import InputError, read_json, write_atomic
from data.hub import WEIGHTS_FILES, find_model_dir
from data.rows import read_jsonl
from data.runs import UNFINISHED


def response_path(response_dir, label, set_name, seed, ban):
    """The file of a model's responses, one JSON object per line, that --score can read."""
    label = label.removesuffix(UNFINISHED).strip("/")
    suffix = f"-ngram{ban}" if ban else ""
    return response_dir / label / f"{set_name.strip('/')}-s{seed}{suffix}.jsonl"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def weights_hash(model):
    """SHA-256 of a model's weights file; "" if there is no single file."""
    for name in WEIGHTS_FILES:
        path = find_model_dir(str(model)) / name
        if path.is_file():
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


def write_kept(path, provenance, results):
    """Keep responses, if `path` is not None; in a .json beside them, provenance and their hash."""
    if path is None:
        return
    text = "".join(json.dumps(result) + "\n" for result in results)
    provenance = provenance | {"responses": sha256(text.encode())}
    write_atomic(path, text)
    write_atomic(path.with_suffix(".json"), json.dumps(provenance, indent=1) + "\n")


def read_kept(path, provenance):
    """The responses that are kept in a file; None if there are none with this provenance."""
    if path is None or not path.is_file():
        return None
    provenance = provenance | {"responses": sha256(path.read_bytes())}
    try:
        found = read_json(path.with_suffix(".json"), "")
    except InputError:
        found = None
    found = found if isinstance(found, dict) else {}
    changed = [name for name in provenance | found if found.get(name) != provenance.get(name)]
    if not changed:
        return read_jsonl(path)
    # print would write into the progress bar.
    tqdm.write(f"{path}: made with different {', '.join(changed)}; sampling again")
    return None
