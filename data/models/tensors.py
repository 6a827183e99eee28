"""Reading and writing the files of tensors in a checkpoint directory."""

import json
import os
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from data.models.hub import weights_files
from data.process.errors import InputError
from data.process.files import atomic_path, check_lfs_pointer


def read_tensor_files(directory):
    """Yield the path and the tensors by name of each file of a directory's weights. Raises
    InputError if there are none or a file is damaged."""
    paths = [path for path in weights_files(directory) if path.suffix != ".json"]  # no index
    if not paths:
        layout = "a checkpoint directory has config.json and model.safetensors"
        raise InputError(f"{Path(directory) / 'model.safetensors'}: no such file; {layout}")
    for path in paths:
        yield path, read_tensor_file(path)


def read_tensor_file(path):
    """The tensors of a safetensors file or a pickle by name."""
    check_lfs_pointer(path)
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        problem = f"is truncated, damaged or not a file of tensors ({type(error).__name__})"
        raise InputError(f"{path}: {problem}; fetch it again") from error
    has_names = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not has_names or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InputError(f"{path}: must hold a dictionary of tensors, GPT-2's weights by name")
    return state


def load_tensors(path):
    """The tensors of a safetensors file by name, as safetensors.torch.load_file, which takes only
    paths in UTF-8."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return safetensors.torch.load(path.read_bytes())
    return safetensors.torch.load_file(path)


def save_tensors(tensors, path, metadata=None):
    """Write float32 tensors to a safetensors file atomically. Raises OSError, as for a full disk.
    metadata: strings by name, which the file also holds.

    safetensors' own save_file gives the same bytes, but asks more of a file system.
    """
    header = {"__metadata__": {"format": "pt"} | (metadata or {})}
    tensors, end = sorted(tensors.items()), 0
    for name, tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the first tensor starts at a multiple of 8
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            file.write(tensor.numpy())


def save_prompt(P, directory, teacher=None, teacher_hash=None):
    """Write P (prompt_length, C) to `prompt.safetensors` in a checkpoint directory, with the name
    and the hash (see `hub.model_hash`) of the teacher that it is tuned for."""
    metadata = {"kind": "soft prompt: embeddings in front of the request"}
    if teacher_hash is not None:
        name = teacher.encode("utf-8", "backslashreplace").decode()  # it may have lone surrogates
        metadata |= {"teacher": name, "teacher_sha256": teacher_hash}
    tensor = P.detach().float().cpu().contiguous()
    save_tensors({"prompt": tensor}, Path(directory) / "prompt.safetensors", metadata)


def prompt_path(path):
    """Where a soft prompt is: in a file, or in `prompt.safetensors` of a directory."""
    path = Path(path)
    return path / "prompt.safetensors" if path.is_dir() else path


def prompt_metadata(path):
    """What a readable file of a soft prompt says of itself: strings by name (see `save_prompt`)."""
    with open(prompt_path(path), "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(n)).get("__metadata__", {})


def load_prompt(path, width):
    """Read a soft prompt, float32 (prompt_length, C), from its `prompt_path`. width: the C of the
    model that it will be prepended to. Raises InputError if it does not fit or the file can't be
    read."""
    path = prompt_path(path)
    hint = "a PromptKD run keeps its prompt in best/prompt.safetensors"
    try:
        P = load_tensors(path).get("prompt")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {hint}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: is truncated or damaged ({error}); {hint}") from error
    is_matrix = P is not None and P.ndim == 2 and len(P) > 0 and P.is_floating_point()
    if not is_matrix or not torch.isfinite(P).all():
        problem = "has no finite floating-point tensor 'prompt' of two dimensions"
        raise InputError(f"{path}: {problem}; {hint}")
    if P.shape[1] != width:
        problem = f"tensor 'prompt' is {P.shape[1]} wide and the model {width}"
        raise InputError(f"{path}: {problem}; use the teacher that it was tuned for")
    return P.float()
