"""A model and its tokenizer by name."""

from data import dist
from data.cli import InputError
from data.hub import find_model_dir
from data.tokenizer import load_tokenizer
from model import load, read_config


def find_model(name):
    """The directory of a model by its name (data.files.model_directory says which there are), and its tokenizer. Its weights are not read yet."""
    directory = dist.run_on_rank0(find_model_dir, str(name))
    config, tokenizer = read_config(directory), load_tokenizer(directory)
    if config.vocab_size != tokenizer.n_vocab:
        raise InputError(
            f"{directory}: the model has {config.vocab_size} tokens and its tokenizer {tokenizer.n_vocab}; put the model's vocab.json and merges.txt there"
        )
    return directory, tokenizer


def load_model(name, device, dropout=None):
    """A model by its name, on the device, with its tokenizer."""
    directory, tokenizer = find_model(name)
    return load(directory, dropout).to(device).eval(), tokenizer
