"""Reading and writing the files of tensors in a checkpoint directory."""

import json
import os
from pathlib import Path

import safetensors.torch
import torch

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
