"""The options of the command lines, and their checks."""

import argparse

from data import dist
from data.cli import ArgumentParser, InputError
from data.paper import PROMPT
from data.rows import MAX_NEW_TOKENS
from model import Config

# The options that take precedence over a value of the method's preset: {option: field of Settings}
_OPTIONS = "lr prompt_lr epochs steps global_batch dropout lm_data".split()
_OPTIONS += "prompt_text prompt_length prompt_init reg prompt_kl reg_kl".split()
OVERRIDES = {option: option for option in _OPTIONS}
OVERRIDES |= {"global_batch": "global_batch_size", "reg": "reg_weight"}
PROMPT_OPTIONS = tuple(name for name in OVERRIDES if name.startswith(("prompt", "reg")))


def number_in_range(kind, low, high, low_open=False):
    """An argparse type: an int or float from `low` (above it, if low_open) to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (low_open and value == low):
            least = "above" if low_open else "at least"
            expected = f"{least} {low} and at most {high}"
            raise argparse.ArgumentTypeError(f"must be {expected}, not {text!r}")
        return value

    # argparse's own message uses the name.
    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def add_precision_option(parser, default="bfloat16 on a GPU that has it, else float32"):
    help = f"of the matrix products in the blocks; logits are float32 (default: {default})"
    parser.add_argument("--dtype", choices=dist.DTYPES, help=help)


def add_decoding_options(parser):
    option = parser.add_argument
    help = f"maximum number of tokens of a response (default {MAX_NEW_TOKENS})"
    length = number_in_range(int, 1, 100_000)
    option("--max-new", dest="max_new_tokens", type=length, default=MAX_NEW_TOKENS, help=help)
    option("--temperature", type=number_in_range(float, 0, 100, low_open=True), default=1.0)
    help = "sample from the K most likely tokens (0: all)"
    option("--top-k", type=number_in_range(int, 0, 10**6), default=0, help=help)
    help = "sample from the most likely tokens with this total probability"
    option("--top-p", type=number_in_range(float, 0, 1, low_open=True), default=1.0, help=help)
    option("--greedy", action="store_true", help="take the most likely token each time")
    help = "no N-gram twice in request and response (default: off; in evaluate.py 6 on public sets)"
    option("--no-repeat-ngram", type=number_in_range(int, 0, 100), metavar="N", help=help)


def parse_train_args(argv, methods):
    """The command line of train.py. methods: the values of --method."""
    parser = ArgumentParser(
        prog="train.py",
        allow_abbrev=False,  # an old --micro-batch 8 would be 8 tokens
        description="Train a student by PromptKD or a method that the paper compares it with, and "
        "the stages that it needs. Without options: the demo. MODEL: gpt2, a directory, a hub id.",
    )
    positive, rate = number_in_range(int, 1, 10**9), number_in_range(float, 0, 10, low_open=True)
    directions = ("reverse", "forward")

    option = parser.add_argument
    option("--method", choices=sorted(methods), default="promptkd")
    option("--student", metavar="MODEL", help="pre-trained student (default: the demo's)")
    option("--teacher", metavar="MODEL", help="pre-trained teacher (default gpt2-xl)")
    option("--sft-teacher", metavar="MODEL", help="a fine-tuned teacher; its stage is skipped")
    option("--init", metavar="MODEL", help="a fine-tuned student; its stage is skipped")
    help = "dolly, demo, or a directory with train.jsonl and dev.jsonl (default: dolly with a model"
    option("--data", metavar="SET|DIR", help=f"{help} given, else demo)")
    option("--out", default="out", metavar="DIR", help="directory of the runs (default out)")
    option("--seed", type=number_in_range(int, 0, 2**32), default=10)
    option("--shape", metavar="LxWxH", help="for pretrain: layers, width, heads, as 6x256x8")
    option("--lm-data", metavar="FILE", help="for minillm: plain text, or JSON lines with 'text'")
    option("--prompt-text", metavar="TEXT", help=f"default: {PROMPT['prompt_text']!r}")
    help = "tokens of the soft prompt (default: those of the text)"
    option("--prompt-length", type=number_in_range(int, 1, 512), metavar="N", help=help)
    option("--prompt-init", choices=("text", "padding", "random"))
    option("--reg", type=number_in_range(float, 0, 1e6), help="weight of equation 2 (default 1)")
    option("--prompt-kl", choices=directions, help="direction of equation 1 (default reverse)")
    option("--reg-kl", choices=directions, help="direction of equation 2 (default reverse)")

    option = parser.add_argument_group("instead of the method's preset").add_argument
    option("--lr", type=rate)
    option("--prompt-lr", type=rate)
    option("--epochs", type=positive)
    option("--steps", type=positive, help="optimizer steps, instead of whole epochs")
    option("--global-batch", type=positive, metavar="ROWS")
    option("--dropout", type=number_in_range(float, 0, 0.99))
    help = "keep N evenly spaced checkpoints of the method's run (Figure 3b)"
    option("--keep", type=number_in_range(int, 0, 10**6), default=0, metavar="N", help=help)

    every_stage = parser.add_argument_group("for every stage")
    option = every_stage.add_argument
    help = "tokens of a forward pass of one rank, with padding and prompt, at least one row"
    help += " (default 2048; 1024 for a student over a billion parameters)"
    option("--micro-batch-tokens", type=positive, metavar="N", help=help)
    option("--train-rows", type=positive, metavar="N", help="only the first N training rows")
    help = "steps between saved states, besides those at validations"
    option("--save-every", type=positive, metavar="STEPS", help=help)
    option("--dev-rows", type=positive, metavar="N", help="only the first N validation rows")
    add_precision_option(every_stage)
    return parser.parse_args(argv)


def check_options(args, method):
    """Set the defaults that depend on other options. Raises InputError if an option is empty or has
    no effect. method: of train.METHODS."""
    for name, value in vars(args).items():
        if value == "":
            raise InputError(f"--{name.replace('_', '-')} is empty; give a value or leave it out")
    starts = {"shape": "shape", "pretrained": "student", "init": "init" if args.init else "student"}
    used = {*method.options, starts[method.start]}
    if method.needs_teacher:
        used.add("sft_teacher" if args.sft_teacher else "teacher")
    for name in ("shape", "init", "student", "sft_teacher", "teacher", "lm_data", *PROMPT_OPTIONS):
        if getattr(args, name) is not None and name not in used:
            problem = f"has no effect here (method {args.method})"
            raise InputError(f"--{name.replace('_', '-')} {problem}; leave it out")
    if method.start == "shape":
        parse_shape(args.shape)
    has_model = args.student or args.teacher or args.init or args.sft_teacher
    args.data = args.data or ("dolly" if has_model else "demo")


def parse_shape(shape, vocab_size=1, dropout=0.0):
    """The Config of a shape such as "6x256x8": layers, width, heads. Raises InputError if it is
    None, not a shape, or too large."""
    try:
        n_layer, n_embd, n_head = (int(n) for n in (shape or "").split("x"))
        is_valid = min(n_layer, n_embd, n_head) > 0 and n_embd % n_head == 0
        is_valid = is_valid and n_layer <= 1000 and 12 * n_layer * n_embd**2 <= 10**10
    except ValueError:
        is_valid = False
    if not is_valid:
        expected = "LAYERSxWIDTHxHEADS, as in 6x256x8: the heads divide the width, and there are"
        limits = "at most 1,000 layers and 10 billion parameters"
        raise InputError(f"--method pretrain needs --shape {expected} {limits}")
    return Config(n_layer, n_embd, n_head, vocab_size, dropout=dropout)
