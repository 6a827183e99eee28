"""A run's directory: run.json, metrics.jsonl, names and checkpoints."""

import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from data import dist, report
from data.cli import InputError, write_atomic
from data.rows import MAX_NEW_TOKENS
from data.tokenizer import tokenizer_files
from model import save
from prompt import save_prompt


@dataclass(frozen=True)
class Settings:
    """All that decides a stage's result. The global batch is the preset's; ranks and micro-batches divide it."""

    method: str
    student: str  # the model that is trained, by name; for pretrain its shape
    data: str
    global_batch_size: int
    lr: float
    epochs: int
    schedule: str = "cosine"  # to 1e-7, or "constant"
    warmup_steps: int = 0  # steps
    beta2: float = 0.999  # AdamW's
    weight_decay: float = 1e-2  # AdamW's; not on biases and LayerNorm
    teacher: str | None = None
    seed: int = 10
    dtype: str = "float32"  # of the products in the models' blocks, or "bfloat16"
    metric_for_best: str = "rouge_l"  # or "loss"
    steps: int | None = None  # optimizer steps; None: what the epochs come to, most_steps at most
    max_steps: int | None = None
    eval_interval: int | None = None  # steps; None: once an epoch
    dropout: float = 0.1  # of the student's training forward
    max_train_rows: int | None = None
    max_dev_rows: int | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    block_size: int = 512  # tokens of a packed row of plain text
    responses: str | None = None  # seqkd: the data directory with the teacher's responses
    rollout_size: int | None = None  # minillm: rows sampled at once; None: the global batch
    inner_epochs: int = 1  # minillm: over each rollout
    lm_data: str | None = None  # minillm: a corpus of plain text
    prompt_lr: float | None = None  # promptkd, from here on
    prompt_text: str | None = None
    prompt_length: int | None = None  # None: the text's own tokens
    prompt_init: str | None = None
    reg_weight: float | None = None
    prompt_kl: str | None = None
    reg_kl: str | None = None


def save_checkpoint(run, directory):
    """A Hugging Face directory of the student, with its tokenizer and, in PromptKD, the soft prompt."""
    if dist.rank() == 0:
        save(run.student, directory)
        for file, text in zip(("vocab.json", "merges.txt"), tokenizer_files(run.tokenizer)):
            write_atomic(directory / file, text)
        if run.P is not None:
            save_prompt(run.P, directory)
    dist.barrier()


def open_run(directory, described, files):
    """A stage's run.json, as found, or as it is to begin. Raises InputError where the one found has other settings, or was made from
    data files with another content."""
    described = described | {
        "files": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if path.is_file()
        }
    }
    path = directory / "run.json"
    if not path.is_file():
        return described | {
            "versions": {"python": platform.python_version(), "torch": torch.__version__}
        }
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = dict(record["settings"].items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: is damaged; remove {directory} to start this stage anew"
        ) from error
    for name, value in described["settings"].items():
        if found.get(name) != value:
            fix = (
                f"give --dtype {found[name]}, "
                if name == "dtype" and found.get(name) in dist.DTYPES
                else ""
            )
            raise InputError(
                f"{directory}: was made with {name} {found.get(name)!r}, not {value!r}; {fix}choose another --out, or remove it"
            )
    for name, value in described["files"].items():
        if record.get("files", {}).get(name, value) != value:
            raise InputError(
                f"{directory}: {name} of {found['data']} has changed since it was made; choose another --out, or remove it"
            )
    if "hours" in record:
        shutil.rmtree(directory / "state", ignore_errors=True)  # where `finish` was cut short
    return record


def finish(directory, record):
    """Draw the curves, mark the stage as complete, and drop its state. Returns where the picture lies."""
    picture = report.plot_curves(directory)
    for leftover in directory.rglob(
        ".*.*"
    ):  # `.name.xyz` beside `name`: of a write that was cut short
        if leftover.with_name(leftover.name[1:].rpartition(".")[0]).is_file():
            leftover.unlink()
    write_atomic(directory / "run.json", json.dumps(record, indent=1) + "\n")
    shutil.rmtree(directory / "state", ignore_errors=True)
    return picture


def memory(device):
    """Peak memory in GB: allocated and reserved on a GPU (the paper's Table 2), resident on a CPU."""
    if device.type == "cuda":
        return {
            "memory_allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
            "memory_reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return {"memory_resident_gb": peak / 1e9}


class Log:
    """metrics.jsonl, cut back to the step that a run goes on from."""

    def __init__(self, path, step):
        self.path = path
        if dist.rank() == 0:
            lines = path.read_text().splitlines(keepends=True) if path.is_file() and step else []
            write_atomic(
                path,
                "".join(
                    line
                    for line in lines
                    if line.endswith("\n") and json.loads(line)["step"] <= step
                ),
            )

    def write(self, values):
        if dist.rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")


def describe(values):
    """The values that a person follows, in one line."""
    shown = {
        "loss": "loss",
        "lm_loss": "LM loss",
        "prompt_kd": "L_kd",
        "prompt_reg": "L_reg",
        "kl_prompted_bare": "KL(prompted||bare)",
        "val_loss": "val loss",
        "val_rouge_l": "val ROUGE-L",
        "val_bare_loss": "teacher's val loss bare",
        "val_prompted_loss": "prompted",
    }
    return "  ".join(
        f"{label} {values[name]:.{1 if name == 'val_rouge_l' else 3}f}"
        for name, label in shown.items()
        if name in values
    )


def format_seconds(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def run_directory(name):
    """Where the run lies that a model is of: `best/` belongs to the directory around it."""
    path = Path(name).resolve()
    return path.parent if path.name == "best" else path


def record_of(name):
    """The run.json of a model that is a run of ours, {} of any other."""
    return read_record(run_directory(name)) or {}


def base_label(name):
    """A model's short name, for naming what is made from it: gpt2-xl, or of a stage before, that of the model that it started from."""
    path, record = run_directory(name), record_of(name)
    if record and record["name"].startswith(("pretrain-", "init-", "teacher-")):
        start = record["settings"].get("student")
        if not isinstance(start, str):
            raise InputError(
                f"{path / 'run.json'}: does not say what model the run started from ('student'); remove {path} and train it again"
            )
        if Path(start).resolve() != path:  # it may: a run of gpt2, copied to a folder `gpt2`
            return base_label(start)
    return path.name


def override_suffix(option, value):
    """An override in a run's name, as -lr0.001: short, and without a path's or a sentence's letters."""
    if option == "prompt_text":
        value = f"{zlib.crc32(value.encode('utf-8', 'surrogatepass')):08x}"
    if option == "lm_data":
        value = Path(value).stem
    return f"-{option.replace('_', '')}{value}"


UNFINISHED = " (unfinished)"  # behind the label of a run that is not complete


def read_record(directory):
    """The run.json of a directory, None where there is none."""
    path = Path(directory) / "run.json"
    if not os.path.isfile(path):
        return None
    fields = {
        "name": str,
        "settings": dict,
        "paper": str | None,
        "parameters": int | None,
        "hours": float | int | None,
    }
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: is damaged ({error}); remove {directory} and train it again"
        ) from error
    for field, kind in fields.items():
        if not isinstance(record, dict) or not isinstance(record.get(field), kind):
            raise InputError(
                f"{path}: is no run's record ('{field}' is wrong); remove {directory} and train it again"
            )
    return {field: value for field, value in record.items() if value is not None}


def kind_of(record):
    return record["name"].split("-")[0]


def run_label(label, record):
    return label if "hours" in record else label + UNFINISHED


def unique_labels(labels):
    """The labels, each made unlike the others by as many parent folders as it takes. labels: paths or names."""
    parts = [Path(label).resolve().parts if os.path.exists(label) else (label,) for label in labels]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def checkpoints(run):
    """The checkpoints of a run for Figure 3b, {optimizer step: directory} in order: of those kept and the best one, the nearest to each
    tenth of the best one's step, which is the last. Raises InputError where the run has none."""
    record = Path(run) / "run.json"
    try:
        best = json.loads(record.read_text(encoding="utf-8"))["best_step"]
        sound = type(best) is int and best > 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise InputError(
            f"{record}: has no 'best_step'; give the directory of a complete run of train.py --keep 20"
        )
    kept = {
        int(path.name[5:]): path
        for path in Path(run).glob("kept/step-*")
        if path.name[5:].isdecimal()
    }
    if not kept:
        raise InputError(f"{Path(run) / 'kept'}: has no checkpoints; train the run with --keep 20")
    kept[best] = Path(run) / "best"
    nearest = {
        min(kept, key=lambda step: (abs(step - best * tenth / 10), step)) for tenth in range(1, 11)
    }
    return {step: kept[step] for step in sorted(nearest)}


def short_names(names):
    """{name: label} for pictures and tables: the last part of each name, or all of it where these are not unique."""
    labels = [
        Path(name).parent.name if Path(name).name == "best" else Path(name).name for name in names
    ]
    return dict(zip(names, labels if len(set(labels)) == len(labels) and all(labels) else names))
