"""Models by name."""

import os
from dataclasses import dataclass

import torch

from data import dist
from data.cli import InputError
from data.dist import print0
from data.hub import find_model_dir
from data.paper import PRESETS, PUBLISHED
from data.runs import read_record, run_kind, run_labels
from data.tokenizer import load_tokenizer
from model import GPT, load, read_config


def find_model(name):
    """The directory and the tokenizer of a model by its name (see `data.hub.find_model_dir`).

    Weights are not read. Raises InputError if the tokenizer does not fit the model.
    """
    directory = dist.run_on_rank0(find_model_dir, str(name))
    config, tokenizer = read_config(directory), load_tokenizer(directory)
    if config.vocab_size != tokenizer.n_vocab:
        sizes = f"the model has {config.vocab_size} tokens and its tokenizer {tokenizer.n_vocab}"
        raise InputError(f"{directory}: {sizes}; put the model's vocab.json and merges.txt there")
    return directory, tokenizer


def load_model(name, device, dropout=None):
    """A model by its name, on the device and in evaluation mode, with its tokenizer."""
    directory, tokenizer = find_model(name)
    return load(directory, dropout).to(device).eval(), tokenizer


@dataclass(frozen=True)
class Model:
    """A model to evaluate."""

    name: str  # as load_model takes it
    size: int  # parameters
    kind: str  # of a run: teacher, init, sft, promptkd, ...; "" if the model is not a run
    paper: str | None  # its row in the paper's Table 1, as "promptkd base", if it has one
    record: dict  # a run's run.json


def table_sort_key(kind, size):
    """Teachers first, then students by size and method, then models that are not runs."""
    if not kind:
        return (2, 0, 0)
    # An unknown kind comes last.
    return (0 if kind == "teacher" else 1, size, [*PRESETS, kind].index(kind))


def open_models(names):
    """Models by name, {label: Model}, in a table's order. Directories without a model are skipped.

    Raises InputError if no model is left.
    """
    found, models = [], {}
    for name in names:
        if os.path.isdir(name) and not (find_model_dir(name) / "config.json").is_file():
            print0(f"{name}: has no model (neither best/ nor config.json), left out")
        else:
            found.append(name)
    if not found:
        fix = "name a run with best/, or a checkpoint directory with config.json"
        raise InputError(f"none of the directories has a model; {fix}")
    for label, name in zip(run_labels(found), found):
        with torch.device("meta"):
            size = GPT(read_config(dist.run_on_rank0(find_model_dir, name))).n_parameters()
        record = read_record(name)
        kind = run_kind(record) if record else ""
        models[label] = Model(name, size, kind, record.get("paper", PUBLISHED.get(name)), record)
    return dict(sorted(models.items(), key=lambda item: table_sort_key(item[1].kind, item[1].size)))
