"""The options of the command lines, and their checks."""

import shlex

from data.process import dist
from data.process.command_line import ArgumentParser, number_in_range
from data.process.errors import InputError
from data.runs.methods import METHODS, POSITIVE, PRESET_OPTIONS, file_fields, options_of_methods
from data.runs.names import public_name
from data.sets.rows import MAX_NEW_TOKENS
from model import Config


def add_precision_option(parser, default="bfloat16 on a GPU that has it, else float32"):
    help = f"of the matrix products in the blocks; logits are float32 (default: {default})"
    parser.add_argument("--dtype", choices=dist.DTYPES, help=help)


def add_decoding_options(parser):
    option = parser.add_argument
    help = f"maximum number of tokens of a response (default {MAX_NEW_TOKENS})"
    length = number_in_range(int, 1, 100_000)
    option("--max-new", dest="max_new_tokens", type=length, default=MAX_NEW_TOKENS, help=help)
    # Below these limits float32 has no numbers for the result.
    greedy = "; --greedy takes the most likely tokens"
    option("--temperature", type=number_in_range(float, 1e-4, 100, advice=greedy), default=1.0)
    help = "sample from the K most likely tokens (0: all)"
    option("--top-k", type=number_in_range(int, 0, 10**6), default=0, help=help)
    help = "sample from the most likely tokens with this total probability"
    option("--top-p", type=number_in_range(float, 1e-6, 1), default=1.0, help=help)
    option("--greedy", action="store_true", help="take the most likely token each time")
    help = "no N-gram twice in request and response (default: off; in evaluate.py 6 on public sets)"
    option("--no-repeat-ngram", type=number_in_range(int, 0, 100), metavar="N", help=help)


def add_method_option(parser, option, help):
    """Add an option of data.runs.methods to a parser. Its default is added to the help."""
    if option.default is not None:
        default = f"{option.default:g}" if isinstance(option.default, float) else option.default
        help = f"{help} (default: {default})".lstrip()
    kwargs = {"choices": option.choices, "help": help or None, "metavar": option.metavar}
    parser.add_argument(option.flag, type=option.type, **kwargs)


def parse_train_args(argv):
    """The command line of train.py."""
    parser = ArgumentParser(
        prog="train.py",
        allow_abbrev=False,  # an old --micro-batch 8 would be 8 tokens
        description="Train a student by PromptKD or a method that the paper compares it with, and "
        "the stages that it needs. Without options: the demo. MODEL: gpt2, a directory, a hub id.",
    )
    option = parser.add_argument
    option("--method", choices=sorted(METHODS), default="promptkd")
    option("--student", metavar="MODEL", help="pre-trained student (default: the demo's)")
    option("--teacher", metavar="MODEL", help="pre-trained teacher (default gpt2-xl)")
    option("--sft-teacher", metavar="MODEL", help="a fine-tuned teacher; its stage is skipped")
    option("--init", metavar="MODEL", help="a fine-tuned student; its stage is skipped")
    help = "dolly, demo, or a directory with train.jsonl and dev.jsonl (default: dolly with a model"
    option("--data", metavar="SET|DIR", help=f"{help} given, else demo)")
    option("--out", default="out", metavar="DIR", help="directory of the runs (default out)")
    option("--seed", type=number_in_range(int, 0, 2**32), default=10)
    option("--shape", metavar="LxWxH", help="for pretrain: layers, width, heads, as 6x256x8")
    help = "print what would be run, with all settings; downloads and writes nothing"
    option("--plan", action="store_true", help=help)

    group = parser.add_argument_group("of single methods")
    for method_option, names in options_of_methods().items():
        help = f"{', '.join(names)}: {method_option.help}"
        add_method_option(group, method_option, help)

    group = parser.add_argument_group("instead of the method's preset")
    for preset_option in PRESET_OPTIONS:
        add_method_option(group, preset_option, preset_option.help)
    help = "keep N evenly spaced checkpoints of the method's run (Figure 3b)"
    keep = number_in_range(int, 0, 10**6)
    group.add_argument("--keep", type=keep, metavar="N", help=help)

    every_stage = parser.add_argument_group("for every stage")
    option = every_stage.add_argument
    help = "tokens of a forward pass of one rank, with padding and prompt, at least one row"
    help += " (default 2048; 1024 for a student over a billion parameters)"
    option("--micro-batch-tokens", type=POSITIVE, metavar="N", help=help)
    option("--train-rows", type=POSITIVE, metavar="N", help="only the first N training rows")
    help = "steps between saved states, besides those at validations"
    option("--save-every", type=POSITIVE, metavar="STEPS", help=help)
    option("--dev-rows", type=POSITIVE, metavar="N", help="only the first N validation rows")
    add_precision_option(every_stage)
    return parser.parse_args(argv)


def check_options(args):
    """Set the defaults of train.py that depend on other options. Raises InputError if an option is
    empty or has no effect."""
    for name, value in vars(args).items():
        if value == "":
            raise InputError(f"--{name.replace('_', '-')} is empty; give a value or leave it out")
    method = METHODS[args.method]
    starts = {"shape": "shape", "pretrained": "student", "init": "init" if args.init else "student"}
    used = {starts[method.start], *(option.name for option in method.options)}
    if method.needs_teacher:
        used.add("sft_teacher" if args.sft_teacher else "teacher")
    models = ("shape", "init", "student", "sft_teacher", "teacher")
    for name in (*models, *(option.name for option in options_of_methods())):
        if getattr(args, name) is not None and name not in used:
            problem = f"has no effect here (method {args.method})"
            raise InputError(f"--{name.replace('_', '-')} {problem}; leave it out")
    prompt_is_of_text = args.prompt_init in (None, "text") or args.prompt_length is None
    for name, cause, has_effect in (
        ("epochs", "--steps", args.steps is None),
        ("reg_kl", "--reg 0", args.reg != 0),
        ("prompt_text", f"--prompt-init {args.prompt_init} --prompt-length", prompt_is_of_text),
    ):
        if getattr(args, name) is not None and not has_effect:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} has no effect with {cause}; leave it out")
    if method.start == "shape":
        parse_shape(args.shape)
    has_model = args.student or args.teacher or args.init or args.sft_teacher
    args.data = args.data or ("dolly" if has_model else "demo")


def command_line(args):
    """The command line of train.py that gives these options, for others to repeat: without --out,
    and with each file's `public_name`."""
    words = ["train.py"]
    for name, value in vars(args).items():
        if name in ("student", "teacher", "sft_teacher", "init", "data", *file_fields()):
            value = public_name(value)
        if name not in ("out", "plan") and value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


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
