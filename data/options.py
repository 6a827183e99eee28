"""The command lines' options and their checks."""

import argparse

from data import dist
from data.cli import InputError, parse_arguments
from data.paper import PROMPT
from data.rows import MAX_NEW_TOKENS
from model import Config


def number_in_range(kind, low, high, low_open=False):
    """An argparse type: a number of a kind from `low` (or above it) to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (low_open and value == low):
            raise argparse.ArgumentTypeError(
                f"must be {'above' if low_open else 'at least'} {low} and at most {high}, not {text!r}"
            )
        return value

    parse.__name__ = (
        "number" if kind is float else "whole number"
    )  # argparse names it in its own message
    return parse


def add_precision_option(parser, default="bfloat16 on a GPU that has it, float32 elsewhere"):
    parser.add_argument(
        "--dtype",
        choices=dist.DTYPES,
        help=f"of the products in the models' blocks; logits are float32 (default: {default})",
    )


def add_decoding_options(parser):
    parser.add_argument(
        "--max-new",
        type=number_in_range(int, 1, 100_000),
        default=MAX_NEW_TOKENS,
        metavar="N",
        help=f"tokens of a response at most (default {MAX_NEW_TOKENS})",
    )
    parser.add_argument(
        "--temperature", type=number_in_range(float, 0, 100, low_open=True), default=1.0
    )
    parser.add_argument(
        "--top-k",
        type=number_in_range(int, 0, 10**6),
        default=0,
        help="only the K likeliest tokens (0: all)",
    )
    parser.add_argument(
        "--top-p",
        type=number_in_range(float, 0, 1, low_open=True),
        default=1.0,
        help="only the likeliest tokens that hold this much probability",
    )
    parser.add_argument("--greedy", action="store_true", help="the likeliest token each time")


def parse_shape(shape, vocab_size, dropout):
    try:
        n_layer, n_embd, n_head = (int(n) for n in shape.split("x"))
        fits = min(n_layer, n_embd, n_head) > 0 and n_embd % n_head == 0
    except ValueError:
        fits = False
    if not fits:
        raise InputError(
            f"--shape {shape}: must be LAYERSxWIDTHxHEADS with a width that the heads divide, as in 6x256x8"
        )
    return Config(n_layer, n_embd, n_head, vocab_size, dropout=dropout)


def parse_train_args(argv, methods):
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a student by PromptKD or a method it is compared with, and the stages that it needs; without options, the demo.",
    )
    positive, rate = number_in_range(int, 1, 10**9), number_in_range(float, 0, 10, low_open=True)
    parser.add_argument("--method", choices=sorted(methods), default="promptkd")
    parser.add_argument(
        "--student",
        metavar="MODEL",
        help="pre-trained student: gpt2, gpt2-medium, gpt2-large, a directory or a hub id (default: the demo's)",
    )
    parser.add_argument("--teacher", metavar="MODEL", help="pre-trained teacher (default gpt2-xl)")
    parser.add_argument(
        "--sft-teacher",
        metavar="MODEL",
        help="a teacher that is fine-tuned already; its stage is skipped",
    )
    parser.add_argument(
        "--init", metavar="MODEL", help="a student that is fine-tuned already; its stage is skipped"
    )
    parser.add_argument(
        "--data",
        metavar="SET|DIR",
        help="dolly, demo, or a directory with train.jsonl and dev.jsonl (default dolly; without a student demo)",
    )
    parser.add_argument(
        "--out", default="out", metavar="DIR", help="where the runs go (default out)"
    )
    parser.add_argument("--seed", type=number_in_range(int, 0, 2**32), default=10)
    parser.add_argument(
        "--shape",
        metavar="LxWxH",
        help="for --method pretrain: layers, width and heads, as 6x256x8",
    )
    parser.add_argument(
        "--lm-data",
        metavar="FILE",
        help="for --method minillm: plain text for its last term, JSON lines with 'text' or a text file",
    )
    parser.add_argument("--prompt-text", metavar="TEXT", help=f"default: {PROMPT['prompt_text']!r}")
    parser.add_argument(
        "--prompt-length",
        type=number_in_range(int, 1, 512),
        metavar="N",
        help="tokens of the soft prompt (default: the text's own)",
    )
    parser.add_argument("--prompt-init", choices=("text", "padding", "random"))
    parser.add_argument(
        "--reg",
        type=number_in_range(float, 0, 1e6),
        help="weight of the regularisation, equation 2 (default 1; 0: off)",
    )
    parser.add_argument(
        "--prompt-kl",
        choices=("reverse", "forward"),
        help="direction of equation 1 (default reverse)",
    )
    parser.add_argument(
        "--reg-kl", choices=("reverse", "forward"), help="direction of equation 2 (default reverse)"
    )
    over = parser.add_argument_group("over the preset of the method's stage")
    over.add_argument("--lr", type=rate)
    over.add_argument("--prompt-lr", type=rate)
    over.add_argument("--epochs", type=positive)
    over.add_argument(
        "--steps", type=positive, help="optimizer steps, instead of what the epochs come to"
    )
    over.add_argument("--global-batch", type=positive, metavar="ROWS")
    over.add_argument("--dropout", type=number_in_range(float, 0, 0.99))
    parser.add_argument(
        "--keep",
        type=number_in_range(int, 0, 10**6),
        default=0,
        metavar="N",
        help="save N checkpoints of the method's run, evenly (Figure 3b)",
    )
    every = parser.add_argument_group("for every stage")
    every.add_argument(
        "--micro-batch",
        type=positive,
        metavar="ROWS",
        help="rows of one forward on one rank (default 8; the demo 32)",
    )
    every.add_argument(
        "--train-rows", type=positive, metavar="N", help="only the first N training rows"
    )
    every.add_argument(
        "--save-every",
        type=positive,
        metavar="STEPS",
        help="save the state so often, too (default: at validations alone)",
    )
    every.add_argument(
        "--dev-rows", type=positive, metavar="N", help="only the first N validation rows"
    )
    add_precision_option(every)
    return parse_arguments(parser, argv)


# Options that take the place of a value of the preset, and the settings that they set
OVERRIDES = {
    "lr": "lr",
    "prompt_lr": "prompt_lr",
    "epochs": "epochs",
    "steps": "steps",
    "global_batch": "global_batch_size",
    "dropout": "dropout",
    "lm_data": "lm_data",
    "prompt_text": "prompt_text",
    "prompt_length": "prompt_length",
    "prompt_init": "prompt_init",
    "reg": "reg_weight",
    "prompt_kl": "prompt_kl",
    "reg_kl": "reg_kl",
}


def check_unused_options(args):
    """Raise InputError where an option was given that the method does not use, or one with nothing in it."""
    for name, value in vars(args).items():
        if value == "":
            raise InputError(
                f"--{name.replace('_', '-')} is empty; give something, or leave it out"
            )
    idle = (
        [name for name in OVERRIDES if name.startswith(("prompt", "reg"))]
        if args.method != "promptkd"
        else []
    )
    idle += ["shape"] if args.method != "pretrain" else ["student"]
    idle += (
        ["teacher", "sft_teacher"]
        if args.method in ("pretrain", "sft")
        else ["teacher"]
        if args.sft_teacher
        else []
    )
    idle += (
        ["init"]
        if args.method in ("pretrain", "sft", "kd", "seqkd")
        else ["student"]
        if args.init
        else []
    )
    idle += ["lm_data"] if args.method != "minillm" else []
    for name in idle:
        if getattr(args, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')} has no effect here (method {args.method}); leave it out"
            )


def check_shape(shape):
    """Raise InputError where --shape is none, or none that memory holds or a checkpoint may have."""
    if shape is None:
        raise InputError(
            "--method pretrain needs --shape LAYERSxWIDTHxHEADS, as in --shape 6x256x8"
        )
    config = parse_shape(shape, 1, 0.0)
    if config.n_layer > 1000 or 12 * config.n_layer * config.n_embd**2 > 10**10:
        raise InputError(
            f"--shape {shape}: is of more than 1,000 layers or 10 billion parameters; give a smaller one, as in 6x256x8"
        )
