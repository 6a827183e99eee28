"""One declaration per method: how it is called, where its student starts, its options and presets.

Everything of a method is here, except for its step, which is in `train.STEPS`. The command line,
its checks, the settings and names of runs, and the order of tables are derived from it.
"""

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace

from data.process.command_line import number_in_range
from data.sets.rows import MAX_NEW_TOKENS

# GPT-2's parameter counts
SIZES = {"base": 124_000_000, "medium": 355_000_000, "large": 774_000_000, "xl": 1_558_000_000}


@dataclass(frozen=True)
class Settings:
    """Everything that determines a stage's result. The global batch size belongs to the preset;
    ranks and micro-batches divide it. A new field needs a default: older runs count as having it.
    """

    method: str
    student: str  # the model that is trained, by name; for pretrain its shape
    data: str
    global_batch_size: int
    lr: float
    epochs: int
    schedule: str = "cosine"  # down to 1e-7; or "constant"
    warmup_steps: int = 0
    beta2: float = 0.999  # AdamW's
    weight_decay: float = 1e-2  # AdamW's; not on biases and LayerNorm
    teacher: str | None = None
    seed: int = 10
    dtype: str = "float32"  # of the matrix products in the models' blocks; or "bfloat16"
    metric_for_best: str = "rouge_l"  # or "loss"
    steps: int | None = None  # optimizer steps; None: from epochs, at most max_steps
    max_steps: int | None = None
    eval_interval: int | None = None  # in steps; None: once per epoch
    dropout: float = 0.1  # in the student's training forward
    max_train_rows: int | None = None
    max_dev_rows: int | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    block_size: int = 512  # tokens of a packed row of plain text
    responses: str | None = None  # seqkd: the data directory with the teacher's responses
    rollout_size: int | None = None  # minillm: rows sampled at once; None: the global batch size
    inner_epochs: int = 1  # minillm: over each rollout
    lm_data: str | None = None  # minillm: a file of plain text
    prompt_lr: float | None = None  # promptkd, like all that follow
    prompt_text: str | None = None
    prompt_length: int | None = None  # None: as many tokens as prompt_text has
    prompt_init: str | None = None
    reg_weight: float | None = None
    prompt_kl: str | None = None
    reg_kl: str | None = None


@dataclass(frozen=True, kw_only=True)
class ResponseSettings:
    """Everything that determines the teacher's responses that SeqKD trains on."""

    method: str = "responses"
    student: str  # the model that they are sampled from: the fine-tuned teacher
    data: str
    max_train_rows: int | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int = 10
    dtype: str = "float32"


# What a run counts as having if its run.json lacks a field, because it is older than the field.
DEFAULTS = {f.name: f.default for f in fields(Settings) if f.default is not MISSING}


@dataclass(frozen=True)
class Option:
    """An option of the command line that sets a field of a method's Settings."""

    flag: str  # as "--prompt-lr"
    field: str  # of Settings
    type: Callable = str
    choices: tuple | None = None
    default: object = None  # None: that of the method's preset, or of Settings
    help: str = ""
    metavar: str | None = None  # "FILE": a file whose content counts, not its name

    @property
    def name(self):
        """Of the attribute that argparse sets."""
        return self.flag.removeprefix("--").replace("-", "_")


@dataclass(frozen=True)
class Method:
    """A method, or a stage that methods share. Settings are dictionaries, {field: value}."""

    label: str  # in tables
    start: str  # the student starts from a "shape" (random), "pretrained", or fine-tuned ("init")
    needs_teacher: bool
    presets: dict  # settings by size of GPT-2, a key of SIZES
    demo: dict  # settings of the demo, for every size
    settings: dict = field(default_factory=dict)  # outside the demo, for every size
    options: tuple = ()  # of the command line, besides those that all methods have
    teacher_responses: bool = False  # trains on responses that are sampled from the teacher

    def option_defaults(self):
        return {o.field: o.default for o in self.options if o.default is not None}


def nearest_size(n_parameters):
    """The size of GPT-2 whose presets a model gets: the nearest in parameter count."""
    return min(SIZES, key=lambda size: abs(math.log(n_parameters / SIZES[size])))


def preset(kind, size):
    """The settings that a stage has by default. kind: a key of STAGES or METHODS. size: a key of
    SIZES, or "demo"."""
    method = (STAGES | METHODS)[kind]
    own = method.demo if size == "demo" else method.presets[size] | method.settings
    return method.option_defaults() | own


def options_of_methods():
    """The options that only some methods have, {option: the names of these methods}."""
    found = {}
    for name, method in METHODS.items():
        for option in method.options:
            found.setdefault(option, []).append(name)
    return found


def file_fields():
    """The settings that name a file."""
    return {option.field for option in options_of_methods() if option.metavar == "FILE"}


def find_overrides(method, args):
    """The options given for a method's own stage, {option: value}, in the order in which a run's
    name has them. args: of the command line."""
    options = [*PRESET_OPTIONS, *METHODS[method].options]
    given = {o: getattr(args, o.name) for o in options if getattr(args, o.name) is not None}
    # Learning rates first, then as declared: older runs are named so.
    return {option: given[option] for option in sorted(given, key=lambda o: o.type is not RATE)}


RATE = number_in_range(float, 0, 10, low_open=True)
POSITIVE = number_in_range(int, 1, 10**9)
KL_DIRECTIONS = ("reverse", "forward")

# The options that every method has, for its own stage
PRESET_OPTIONS = (
    Option("--lr", "lr", RATE),
    Option("--epochs", "epochs", POSITIVE),
    Option("--steps", "steps", POSITIVE, help="optimizer steps, instead of whole epochs"),
    Option("--global-batch", "global_batch_size", POSITIVE, metavar="ROWS"),
    Option("--dropout", "dropout", number_in_range(float, 0, 0.99)),
)

# Batch sizes and learning rates of PromptKD are those of Appendix A. That the batches are per card,
# of eight, and all other settings are from the released scripts; GKD has those of PromptKD.
ON_POLICY = {"schedule": "constant", "warmup_steps": 100}

# The demo: models of at most a million parameters, rows of a few dozen words. The rates are those
# that the grid of docs/miniature.md chose for the demo's student.
DEMO_SFT = {
    "global_batch_size": 16,
    "lr": 4e-3,
    "epochs": 6,
    "warmup_steps": 20,
    "dropout": 0.0,
    "max_new_tokens": 40,
}
DEMO_ON_POLICY = {
    "global_batch_size": 64,
    "lr": 1e-3,
    "epochs": 3,
    "schedule": "constant",
    "warmup_steps": 20,
    "dropout": 0.0,
    "max_new_tokens": 40,
}

SFT = Method(
    label="SFT",
    start="pretrained",
    needs_teacher=False,
    presets={
        "base": {"global_batch_size": 32, "lr": 5e-4, "epochs": 20},
        "medium": {"global_batch_size": 32, "lr": 1e-4, "epochs": 20},
        "large": {"global_batch_size": 32, "lr": 1e-4, "epochs": 10},
        "xl": {"global_batch_size": 32, "lr": 5e-5, "epochs": 10},
    },
    demo=DEMO_SFT,
)
GKD = Method(
    label="GKD",
    start="init",
    needs_teacher=True,
    presets={  # PromptKD's: the paper's script for GKD was not released
        "base": {"global_batch_size": 256, "lr": 5e-5, "epochs": 20},
        "medium": {"global_batch_size": 64, "lr": 1e-5, "epochs": 20},
        "large": {"global_batch_size": 64, "lr": 5e-6, "epochs": 15},
        "xl": {"global_batch_size": 64, "lr": 5e-6, "epochs": 15},
    },
    settings=ON_POLICY,
    demo=DEMO_ON_POLICY,
)

# The stages that methods share, in the order of tables. Both are supervised fine-tuning.
STAGES = {
    "teacher": replace(SFT, label="teacher", demo=DEMO_SFT | {"lr": 3e-4, "epochs": 1}),
    "init": replace(
        SFT,
        label="student's init",
        presets={size: values | {"epochs": 3} for size, values in SFT.presets.items()},
        settings={"metric_for_best": "loss"},
        demo=DEMO_SFT | {"epochs": 3, "metric_for_best": "loss"},
    ),
}

# The values of --method, in the order of tables
METHODS = {
    "sft": SFT,
    "kd": replace(SFT, label="KD", needs_teacher=True),
    "seqkd": replace(SFT, label="SeqKD", needs_teacher=True, teacher_responses=True),
    "minillm": Method(
        label="MiniLLM",
        start="init",
        needs_teacher=True,
        options=(
            Option(
                "--lm-data", "lm_data", metavar="FILE", help="plain text, or JSON lines with 'text'"
            ),
        ),
        presets={
            "base": {"global_batch_size": 256, "lr": 5e-6, "epochs": 10},
            "medium": {"global_batch_size": 64, "lr": 5e-6, "epochs": 10},
            "large": {"global_batch_size": 64, "lr": 5e-6, "epochs": 10},
            "xl": {"global_batch_size": 64, "lr": 5e-6, "epochs": 10},
        },
        settings={
            **ON_POLICY,
            "rollout_size": 256,
            "inner_epochs": 4,
            "max_steps": 5000,
            "eval_interval": 100,
            "beta2": 0.95,
            "weight_decay": 1e-6,
            "dropout": 0.0,
        },
        demo={
            **DEMO_ON_POLICY,
            "lr": 5e-4,
            "epochs": 1,
            "rollout_size": 256,
            "inner_epochs": 4,
            "max_steps": 375,
            "beta2": 0.95,
            "weight_decay": 1e-6,
            "block_size": 128,
        },
    ),
    "gkd": GKD,
    "promptkd": Method(
        label="PromptKD",
        start="init",
        needs_teacher=True,
        options=(
            Option("--prompt-lr", "prompt_lr", RATE, help="peak learning rate of the prompt"),
            Option(
                "--prompt-text",
                "prompt_text",
                metavar="TEXT",
                default="Suppose you are a student.",
                help="the prompt starts from its embeddings",
            ),
            Option(
                "--prompt-length",
                "prompt_length",
                number_in_range(int, 1, 512),
                metavar="N",
                help="tokens of the soft prompt (default: those of the text)",
            ),
            Option(
                "--prompt-init",
                "prompt_init",
                choices=("text", "padding", "random"),
                default="text",
                help="what the prompt starts from",
            ),
            Option(
                "--reg",
                "reg_weight",
                number_in_range(float, 0, 1e6),
                default=1.0,
                help="weight of equation 2",
            ),
            Option(
                "--prompt-kl",
                "prompt_kl",
                choices=KL_DIRECTIONS,
                default="reverse",
                help="direction of equation 1",
            ),
            Option(
                "--reg-kl",
                "reg_kl",
                choices=KL_DIRECTIONS,
                default="reverse",
                help="direction of equation 2",
            ),
        ),
        presets={
            "base": {"global_batch_size": 256, "lr": 5e-5, "prompt_lr": 5e-5, "epochs": 20},
            "medium": {"global_batch_size": 64, "lr": 1e-5, "prompt_lr": 1e-5, "epochs": 20},
            "large": {"global_batch_size": 64, "lr": 5e-6, "prompt_lr": 5e-6, "epochs": 15},
            "xl": {"global_batch_size": 64, "lr": 5e-6, "prompt_lr": 5e-6, "epochs": 15},
        },
        settings={"schedule": "constant", "warmup_steps": 100},
        demo=DEMO_ON_POLICY | {"prompt_lr": 3e-3},
    ),
    "pretrain": Method(
        label="pre-training",
        start="shape",
        needs_teacher=False,
        presets=dict.fromkeys(SIZES, {"global_batch_size": 32, "lr": 1e-3, "epochs": 3}),
        settings={"warmup_steps": 50, "beta2": 0.95, "dropout": 0.0, "metric_for_best": "loss"},
        demo={
            "global_batch_size": 8,
            "lr": 2e-3,
            "epochs": 1,
            "warmup_steps": 100,
            "beta2": 0.95,
            "dropout": 0.0,
            "metric_for_best": "loss",
            "block_size": 128,
        },
    ),
}
