"""Soft prompts in files: `prompt.safetensors` of a checkpoint, and adapters of PEFT."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from data.models.tensors import load_tensors, save_tensors
from data.process.errors import InputError
from data.process.files import read_json, write_atomic

PROMPT_FILE, ADAPTER_FILE = "prompt.safetensors", "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_KIND = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}  # a soft prompt
ADAPTER_KIND |= {"num_transformer_submodules": 1}
HINT = f"a PromptKD run keeps its prompt in best/{PROMPT_FILE}"


def describe_prompt(teacher, teacher_hash):
    """What a soft prompt's file says of itself, {name: text}: the name and the hash (see
    `hub.model_hash`) of the teacher that it is tuned for, None if they are not known."""
    metadata = {"kind": "soft prompt: embeddings in front of the request"}
    if teacher_hash is not None:
        name = teacher.encode("utf-8", "backslashreplace").decode()  # it may have lone surrogates
        metadata |= {"teacher": name, "teacher_sha256": teacher_hash}
    return metadata


def save_prompt(P, directory, teacher=None, teacher_hash=None):
    """Write P (prompt_length, C) to PROMPT_FILE in a checkpoint directory, with its teacher (see
    `describe_prompt`)."""
    tensors = {"prompt": P.detach().float().cpu().contiguous()}
    save_tensors(tensors, Path(directory) / PROMPT_FILE, describe_prompt(teacher, teacher_hash))


def save_adapter(P, directory, config, teacher, teacher_hash):
    """Write P (prompt_length, C) as a prompt-tuning adapter, which PEFT opens.

    config: the teacher's. teacher: its name for others, from which PEFT can load it if it is a hub
    id. teacher_hash: as in `describe_prompt`. Raises InputError if there is an adapter already.
    """
    directory = Path(directory)
    if (directory / ADAPTER_CONFIG).exists() or (directory / ADAPTER_FILE).exists():
        raise InputError(f"--peft {directory}: has an adapter already; choose another directory")
    values = ADAPTER_KIND | {
        "auto_mapping": None,
        "base_model_name_or_path": teacher,
        "inference_mode": True,
        "num_attention_heads": config.n_head,
        "num_layers": config.n_layer,
        "num_virtual_tokens": len(P),
        "prompt_tuning_init": "RANDOM",  # of a new one; PEFT asks for a tokenizer with "TEXT"
        "prompt_tuning_init_text": None,
        "revision": None,
        "token_dim": config.n_embd,
        "tokenizer_name_or_path": None,
    }
    tensors = {"prompt_embeddings": P.detach().float().cpu().contiguous()}
    save_tensors(tensors, directory / ADAPTER_FILE, describe_prompt(teacher, teacher_hash))
    write_atomic(directory / ADAPTER_CONFIG, json.dumps(values, indent=2) + "\n")


def prompt_path(path):
    """Where a soft prompt is: in a file, or in a directory in PROMPT_FILE or a PEFT adapter's file.
    Raises InputError if the adapter is not one of prompt tuning."""
    path = Path(path)
    if path.name == ADAPTER_FILE and (path.parent / ADAPTER_CONFIG).exists():
        path = path.parent
    if not path.is_dir():
        return path
    if (path / PROMPT_FILE).exists() or not (path / ADAPTER_CONFIG).exists():
        return path / PROMPT_FILE
    config = path / ADAPTER_CONFIG
    values = read_json(config, "save the adapter again")
    for field, value in ADAPTER_KIND.items():
        found = values.get(field)
        if found != value and (found is not None or field == "peft_type"):
            problem = f"'{field}' is {found!r}, and only {value!r} is a soft prompt here"
            raise InputError(f"{config}: {problem}")
    if not (path / ADAPTER_FILE).exists() and (path / "adapter_model.bin").exists():
        fix = "save it with safe_serialization=True"
        raise InputError(f"{path / 'adapter_model.bin'}: is a pickle, which is not read; {fix}")
    return path / ADAPTER_FILE


def prompt_metadata(path):
    """What a readable file of a soft prompt says of itself (see `describe_prompt`). An adapter of
    PEFT's own has the name of its base model as `teacher`, and no hash."""
    path, metadata = prompt_path(path), {}
    config = path.with_name(ADAPTER_CONFIG)
    if path.name == ADAPTER_FILE and config.exists():
        base = read_json(config, "save the adapter again").get("base_model_name_or_path")
        metadata = {"teacher": base} if base else {}
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        return metadata | json.loads(file.read(n)).get("__metadata__", {})


def load_prompt(path, width):
    """Read a soft prompt, float32 (prompt_length, C), from its `prompt_path`. width: the C of the
    model that it will be prepended to. Raises InputError if it does not fit or the file can't be
    read."""
    path = prompt_path(path)
    try:
        tensors = load_tensors(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {HINT}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: is truncated or damaged ({error}); {HINT}") from error
    name = "prompt_embeddings" if path.name == ADAPTER_FILE else "prompt"
    P = tensors.get(name)
    is_matrix = P is not None and P.ndim == 2 and len(P) > 0 and P.is_floating_point()
    if not is_matrix or not torch.isfinite(P).all():
        problem = f"has no finite floating-point tensor '{name}' of two dimensions"
        raise InputError(f"{path}: {problem}; {HINT}")
    if P.shape[1] != width:
        problem = f"tensor '{name}' is {P.shape[1]} wide and the model {width}"
        raise InputError(f"{path}: {problem}; use the teacher that it was tuned for")
    return P.float()
