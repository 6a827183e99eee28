"""Checkpoint directories: Hugging Face's config.json and weights to a `model.GPT`, and back."""

import json
from dataclasses import asdict
from pathlib import Path

from data.models.hub import weights_files
from data.models.tensors import read_tensor_files, save_tensors
from data.process.errors import InputError
from data.process.files import read_json, write_atomic
from model import Config, convert_stored, from_state, to_stored

# The sizes that config.json must have, with their limits.
MAX_SIZES = {"n_layer": 1_000, "n_embd": 10**6, "n_head": 10**6}
MAX_SIZES |= {"vocab_size": 10**6, "n_positions": 10**6}
# What GPT-2 fixes and the model relies on.
FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def check(condition, subject, problem):
    if not condition:
        raise InputError(f"{subject} {problem}")


def load(directory, dropout=None, vocab_size=None, device="cpu"):
    """The model of a Hugging Face GPT-2 directory, float32, loaded tensor by tensor.

    Reads config.json and the weights: one file or shards with an index, safetensors or pickles, in
    the forms that `model.convert_stored` knows. dropout: replaces the configuration's own.
    vocab_size: how many rows of the token embedding to keep; by default all. Raises InputError with
    the file and the tensor.
    """
    config, state = read_config(directory, dropout), {}
    for path, tensors in read_tensor_files(directory):
        try:
            converted = convert_stored(tensors, config, vocab_size, device)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
        if twice := [name for name in converted if name in state]:
            problem = f"tensor '{twice[0]}' is stored twice; keep one tensor for '{twice[0]}'"
            raise InputError(f"{path}: {problem}")
        state |= converted
    try:
        return from_state(state, config)
    except ValueError as error:
        # The first file is the index, if there are shards.
        raise InputError(f"{weights_files(directory)[0]}: {error}") from error


def read_config(directory, dropout=None):
    """The Config of a checkpoint directory. Raises InputError for a field that is not GPT-2's."""
    path = Path(directory) / "config.json"
    layout = "a checkpoint directory has config.json and model.safetensors"
    check(path.exists(), f"{path}:", f"no such file; {layout}")
    values = read_json(path, "fetch it again")
    for name, limit in MAX_SIZES.items():
        size = values.get(name)
        valid = type(size) is int and 1 <= size <= limit
        problem = f"must be an integer from 1 to {limit:,}, not {size!r}"
        check(valid, f"{path}: field '{name}'", problem)
    C, H = values["n_embd"], values["n_head"]
    check(C % H == 0, f"{path}:", f"n_embd {C} can't be divided among n_head {H}")
    for name, value in (FIXED | {"n_inner": 4 * C}).items():
        found = values.get(name, value)
        valid = found == value or (name == "n_inner" and found is None)
        check(valid, f"{path}: field '{name}'", f"is {found!r}; GPT-2 has {value!r}")
    rate = values.get("resid_pdrop", 0.1) if dropout is None else dropout
    valid = isinstance(rate, int | float) and 0 <= rate < 1
    check(valid, f"{path}: field 'resid_pdrop'", f"must be a rate from 0 to below 1, not {rate!r}")
    return Config(**{name: values[name] for name in MAX_SIZES}, dropout=rate)


def save(model, directory, eos_token_id=None):
    """Write model.safetensors and config.json as Hugging Face does, each atomically.

    eos_token_id: the id of the tokenizer's end-of-text; by default the last one.
    """
    save_tensors(to_stored(model), Path(directory) / "model.safetensors")
    sizes = asdict(model.config)
    dropout = sizes.pop("dropout")
    eos_token_id = sizes["vocab_size"] - 1 if eos_token_id is None else eos_token_id
    values = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        **sizes,
        "n_ctx": sizes["n_positions"],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), eos_token_id),
    }
    write_atomic(Path(directory) / "config.json", json.dumps(values, indent=2) + "\n")


def save_generation_config(directory, eos_token_id, max_new_tokens):
    """Write generation_config.json, from which Hugging Face's `generate` takes its defaults: plain
    sampling until end-of-text, as `sample.sample` does."""
    values = {
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eos_token_id),
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,  # all tokens; without it the 50 most likely
        "top_p": 1.0,
        "max_new_tokens": max_new_tokens,
    }
    path = Path(directory) / "generation_config.json"
    write_atomic(path, json.dumps(values, indent=2) + "\n")
