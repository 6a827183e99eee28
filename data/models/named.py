"""Models by name: their files, tokenizers and sizes."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.models.checkpoint import load, read_config
from data.models.copies import check_same_files
from data.models.hub import OFFICIAL_MODELS, find_local_model, find_model_dir
from data.models.tokenizer import (
    GPT2_VOCAB_SIZE,
    list_tokenizer_files,
    load_tokenizer,
    read_tokenizer,
)
from data.process import dist
from data.process.dist import print0
from data.process.errors import InputError, explain_out_of_memory
from data.runs.methods import METHODS, SIZES, STAGES
from data.runs.names import run_kind, run_labels
from data.runs.paper import PUBLISHED
from data.runs.runs import read_record, run_dir
from data.sets.prepare import NAMED_SETS, PUBLIC_SETS
from model import GPT

MAX_PADDING = 1024  # rows after the tokenizer's tokens; with more, it is another model's


def find_model(name):
    """The directory and the tokenizer of a model by its name (see `hub.find_model_dir`), and what
    its embedding has after the tokenizer's tokens, a list of strings. Weights are not read. Raises
    InputError if the tokenizer does not fit the model."""
    directory = dist.run_on_rank0(find_model_dir, str(name))
    n_rows = read_config(directory).vocab_size
    tokenizer, added_tokens = read_tokenizer(directory)
    n_padding = n_rows - tokenizer.n_vocab - len(added_tokens)
    if n_rows < tokenizer.n_vocab or n_padding > MAX_PADDING:
        sizes = f"the model has {n_rows} tokens and its tokenizer {tokenizer.n_vocab}"
        fix = "put the model's vocab.json and merges.txt, or its tokenizer.json, there"
        raise InputError(f"{directory}: {sizes}; {fix}")
    dropped = [f"added token {token!r}" for token in added_tokens]
    if n_padding > 0:
        dropped.append(f"{n_padding:,} rows of padding")
    return directory, tokenizer, dropped


def load_model(name, device, dropout=None):
    """A model by its name, on the device and in evaluation mode, with its tokenizer. Embedding rows
    after the tokenizer's tokens are dropped and reported."""
    directory, tokenizer, dropped = find_model(name)
    with explain_out_of_memory(f"loading {name}", "use a smaller model, or free some memory"):
        model = load(directory, dropout, tokenizer.n_vocab, device).eval()
    if dropped:
        rows = f"embedding rows after the tokenizer's {tokenizer.n_vocab:,} tokens are dropped"
        dist.print_once(f"{directory}: {rows}: {', '.join(dropped)}")
    return model, tokenizer


def check_weights(name):
    """Raise InputError if the weights of a model can't be loaded. One rank loads them, on the CPU,
    and keeps nothing."""
    directory, tokenizer, _ = find_model(name)

    def check():
        load(directory, vocab_size=tokenizer.n_vocab)

    dist.run_on_rank0(check)


def count_parameters(name):
    """The number of parameters of a model by its name, as it is loaded."""
    directory, tokenizer, _ = find_model(name)
    return config_parameters(replace(read_config(directory), vocab_size=tokenizer.n_vocab))


def config_parameters(config):
    """The number of parameters of a GPT with a Config, without making one."""
    with torch.device("meta"):
        return GPT(config).n_parameters()


def known_parameters(name):
    """The number of parameters of a model by its name, without a download: that of the paper's
    tables for an official model that is not here yet, None for any other. One rank may call it."""
    directory, _ = find_local_model(name)
    if directory is None:
        sizes = dict(zip(OFFICIAL_MODELS, SIZES.values()))
        return sizes.get(name.removeprefix("openai-community/"))
    config, n_vocab = read_config(directory), GPT2_VOCAB_SIZE
    if list_tokenizer_files(directory):
        n_vocab = load_tokenizer(directory).n_vocab
    return config_parameters(replace(config, vocab_size=min(config.vocab_size, n_vocab)))


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
    return (0 if kind == "teacher" else 1, size, [*STAGES, *METHODS, kind].index(kind))


def open_models(names):
    """Models by name, {label: Model}, in a table's order. Directories without a model are skipped.
    Raises InputError if no model is left."""
    found, models = [], {}
    for name in names:
        if dist.run_on_rank0(_has_no_model, name):
            print0(f"{name}: has no model (neither best/ nor config.json), left out")
        else:
            found.append(name)
    if not found:
        raise InputError("none of the directories has a model; name a run, or a checkpoint")
    check_same_files([], found)
    for label, name in zip(dist.run_on_rank0(run_labels, found), found):
        size, record = count_parameters(name), dist.run_on_rank0(read_record, name)
        kind = run_kind(record) if record else ""
        models[label] = Model(name, size, kind, record.get("paper", PUBLISHED.get(name)), record)
    return dict(sorted(models.items(), key=lambda item: table_sort_key(item[1].kind, item[1].size)))


def _has_no_model(name):
    return os.path.isdir(name) and not (find_model_dir(name) / "config.json").is_file()


def resolve_input(directory, name):
    """The name from here of a model or data set that `directory`, a run, has recorded: a path is
    relative to the folder of the run."""
    path = directory.parent / name
    is_path = path.exists() and name not in NAMED_SETS
    return str(path) if is_path else name


def own_sets(models):
    """The data set that all runs among models were trained on, a list of one name, if it can be
    evaluated on: the demo's, or the user's own with a test.jsonl. Else an empty list."""
    runs = [(model.name, model.record["settings"]) for model in models.values() if model.record]
    sets = {resolve_input(run_dir(name), settings["data"]) for name, settings in runs}
    if len(sets) == 1 and not sets & {*PUBLIC_SETS}:
        [name] = sets
        if name == "demo" or (Path(name) / "test.jsonl").is_file():
            return [name]
    return []
