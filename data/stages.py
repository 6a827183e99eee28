"""The data of a stage, and the checks before and during it."""

import math
from pathlib import Path

from data import dist
from data.cli import InputError
from data.demo import TOKENIZER_DIR
from data.dist import print0
from data.hub import find_model_dir
from data.models import find_model
from data.prepare import find_data_dir
from data.rows import (
    Example,
    encode_training_rows,
    epoch_order,
    packed_blocks,
    read_rows,
    read_texts,
)
from data.tokenizer import load_tokenizer, same_vocabulary


def data_files(s):
    """The files that a stage trains and validates on, and for pre-training the one of its texts, where there is one."""
    directory = dist.run_on_rank0(find_data_dir, s.data)
    texts = (
        [directory / "pretrain.jsonl"]
        if s.method == "pretrain" and (directory / "pretrain.jsonl").is_file()
        else []
    )
    return [Path(s.responses or directory) / "train.jsonl", directory / "dev.jsonl", *texts]


def load_data(s):
    """A stage's tokenizer, validation rows, and a function that gives an epoch's training examples in their order."""
    path, dev_path, *texts = data_files(s)
    rows, dev_rows = read_rows(path, s.max_train_rows), read_rows(dev_path, s.max_dev_rows)
    if s.method == "pretrain":
        tokenizer = load_tokenizer(TOKENIZER_DIR if s.data == "demo" else None)
        if texts:
            documents = [
                [*tokenizer.encode_ordinary(text), tokenizer.eot_token]
                for text in read_texts(texts[0], s.max_train_rows)
            ]
        else:
            documents = [e.request + e.response for e in encode_training_rows(rows, tokenizer)]

        def epoch_examples(epoch):
            return packed_examples(documents, s, epoch)
    else:
        tokenizer = load_tokenizer(dist.run_on_rank0(find_model_dir, s.student))
        examples = encode_training_rows(rows, tokenizer)
        if len(examples) < len(rows):
            print0(
                f"{path}: {len(rows) - len(examples)} of {len(rows)} rows have a request over the limit and are left out"
            )

        def epoch_examples(epoch):
            return [examples[i] for i in epoch_order(len(examples), s.seed, epoch)]

    return tokenizer, dev_rows, epoch_examples


def packed_examples(documents, s, epoch=0):
    """Token lists as rows of `block` tokens to predict, all but the first."""
    return [
        Example(i, block[:1], block[1:])
        for i, block in enumerate(packed_blocks(documents, s.block_size, s.seed, epoch).tolist())
    ]


def read_lm_blocks(s, tokenizer, n_rows):
    """Blocks of the plain text of MiniLLM's last term: `n_rows`, or all that it gives."""
    documents, n_tokens = [], 0
    for text in read_texts(s.lm_data):
        documents.append([*tokenizer.encode_ordinary(text), tokenizer.eot_token])
        n_tokens += len(documents[-1])
        if n_tokens > n_rows * s.block_size:
            break
    if n_tokens <= s.block_size:
        raise InputError(
            f"{s.lm_data}: has {n_tokens} tokens, and a block is of {s.block_size}; give a longer text"
        )
    return packed_examples(documents, s)


def check_positions(run, examples):
    """Raise InputError where a row is longer than a model can read."""
    longest = max(len(e.request) + len(e.response) for e in [*examples, *(run.text or [])]) + (
        0 if run.P is None else len(run.P)
    )
    for name, model in (("student", run.student), ("teacher", run.teacher)):
        if model is not None and longest > model.config.n_positions:
            raise InputError(
                f"the {name} has {model.config.n_positions} positions and the longest row takes {longest}; take a model with more"
            )


def check_finite(directory, line):
    """Raise InputError where a step's losses or norms are not finite: before anything of it is saved."""
    bad = {
        name: value
        for name, value in line.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    if bad:
        phase, rates = (
            ("prompt", "--prompt-lr or --lr")
            if any("prompt" in name for name in bad)
            else ("student", "--lr")
        )
        what = ", ".join(f"{name} {value}" for name, value in bad.items())
        raise InputError(
            f"{directory}: {what} at step {line['step']}, {phase} phase; the training has diverged: lower {rates}"
        )


def check_later_inputs(args, home, teacher, student):
    """Raise InputError where an input of a later stage is wrong, before the earlier ones take their hours.

    home: the data's directory. teacher, student: names of models, None where the demo makes its own.
    """
    read_rows(home / "dev.jsonl", args.dev_rows)
    if args.lm_data is not None:
        dist.run_on_rank0(lambda: len(read_texts(args.lm_data)))
    tokenizers = [find_model(name)[1] for name in (teacher, student) if name]
    if tokenizers and not same_vocabulary(tokenizers[0], tokenizers[-1]):
        raise InputError(
            f"teacher {teacher} and student {student} have different tokenizers; a KL over the vocabulary needs one for both"
        )
