"""A run's directory: run.json, metrics.jsonl and checkpoints."""

import gc
import json
import math
import os
import platform
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch

try:
    import fcntl
    import resource
except ImportError:  # on Windows
    fcntl = resource = None

from data.models.checkpoint import save, save_generation_config
from data.models.prompts import save_prompt
from data.models.tokenizer import save_tokenizer
from data.process import dist
from data.process.dist import print0
from data.process.errors import InputError
from data.process.files import name_errors, read_json, write_atomic
from data.runs.methods import DEFAULTS, file_fields

RUN_FORMAT = 3  # of run.json and the files beside it; raise it when their meaning changes
# The fields of run.json that are read. An optional one may be null or missing.
RECORD_FIELDS = {"name": str, "settings": dict, "inputs": dict | None, "versions": dict | None}
RECORD_FIELDS |= {"base": str | None, "paper": str | None, "command": str | None}
RECORD_FIELDS |= {"hours": float | int | None, "complete": bool | None, "keep": int | None}
RECORD_FIELDS |= {"parameters": int | None, "later_versions": list | None}
LOCATIONS = {"data", "responses"}  # settings that say where inputs are, besides `file_fields`
# Never to remove it: another program may have written it.
WAY_OUT = "choose another --out, or move it elsewhere"


def run_dir(model):
    """The directory of the run that a model belongs to: `best/` is inside it."""
    path = Path(model).resolve()
    return path.parent if path.name == "best" else path


def read_record(model):
    """The run.json of a run, {} for any other model. model: a run's directory or its `best/`.
    Raises InputError if the file is damaged or of another version of this project."""
    directory = run_dir(model)
    path, move = directory / "run.json", f"move {directory} elsewhere"
    fix = f"{move} and train it again, or only this file if another program wrote it"
    if not path.is_file():
        return {}
    record = read_json(path, fix)
    if "format" not in record and not record.keys() >= {"name", "settings"}:
        problem = "was not made by this project"
        raise InputError(f"{path}: {problem}; move it out of {directory} to use the model there")
    if record.get("format") != RUN_FORMAT:
        problem = "was made by another version of this project"
        raise InputError(f"{path}: {problem}; choose another --out, or {move}")
    for field, kind in RECORD_FIELDS.items():
        if not isinstance(record.get(field), kind):
            raise InputError(f"{path}: field '{field}' is wrong; {fix}")
    return {field: value for field, value in record.items() if value is not None}


@contextmanager
def open_run(directory, description, inputs):
    """Open a stage's run on all ranks. Yields its record: what run.json holds or, if the stage is
    new, what it will hold. No other process can open the run meanwhile, unless it is complete.

    description: the stage's name, settings and so on. inputs: the SHA-256 of all that it reads,
    {name: hash}. Raises InputError if run.json has other settings, if an input has changed, or if
    another process holds the run.
    """
    is_complete = dist.run_on_rank0(read_record, directory).get("complete")
    with nullcontext() if is_complete else _lock(directory):
        yield dist.run_on_rank0(_check_run, directory, description, inputs)


def _check_run(directory, description, inputs):
    record = read_record(directory)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if not record:
        return {"format": RUN_FORMAT, **description, "inputs": inputs, "versions": versions}
    check_settings(directory, record, description["settings"], set(inputs))
    check_inputs(directory, record, inputs, WAY_OUT)
    later = record.get("later_versions", [])
    if record.get("complete"):
        shutil.rmtree(directory / "state", ignore_errors=True)  # if finish_run was interrupted
    elif versions not in [record.get("versions"), *later]:
        record["later_versions"] = [*later, versions]
    return description | record


def check_inputs(directory, record, inputs, fix):
    """Raise InputError if a run was made with other inputs. inputs: {name: SHA-256}."""
    for name, value in inputs.items():
        if record.get("inputs", {}).get(name) != value:
            source = record["settings"].get(name) or record["settings"]["data"]
            problem = f"{name} ({source}) is not what it was made with"
            raise InputError(f"{directory}: {problem}: its content has changed; {fix}")


def check_settings(directory, record, settings, inputs):
    """Raise InputError if a run was made with other settings. A field that its record lacks,
    because the run is older, has its default.

    inputs: fields whose content is compared elsewhere, and not their name: a directory has many
    spellings, and --out may be moved.
    """
    compared = set(settings) - LOCATIONS - file_fields() - inputs
    for name, value in settings.items():
        found = record["settings"].get(name, DEFAULTS.get(name))
        if name in compared and found != value:
            fix = WAY_OUT
            if name == "dtype" and found in dist.DTYPES:
                fix = f"give --dtype {found}, {fix}"
            raise InputError(f"{directory}: was made with {name} {found!r}, not {value!r}; {fix}")


@contextmanager
def _lock(directory):
    """Keep other processes out of a run. The system releases the lock of a process that dies."""
    path, locks = directory / "state" / "lock", []

    def acquire():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            lock = open(path, "ab+", buffering=0)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().decode() or "another process"
            fix = "wait for it to end, or choose another --out"
            raise InputError(f"{directory}: {holder} is working on it; {fix}") from error
        except OSError as error:  # the file system has no locks
            fix = "start no second process with this --out"
            print0(f"warning: {path}: can't be locked ({error.strerror or error}); {fix}")
            return
        locks.append(lock)
        with suppress(OSError):  # the file system may be full
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}".encode())

    try:
        dist.run_on_rank0(acquire)
        yield
    finally:
        for lock in locks:
            # Remove the lock, and the directories if the run left nothing in them.
            for remove in (path.unlink, path.parent.rmdir, directory.rmdir):
                with suppress(OSError):
                    remove()
            lock.close()


def write_record(directory, record):
    write_atomic(Path(directory) / "run.json", json.dumps(record, indent=1) + "\n")


def finish_run(directory, record):
    """Mark a run as complete, and remove its state and the remains of interrupted writes."""
    for path in directory.rglob(".*.*"):
        written = path.with_name(path.name[1:].rpartition(".")[0])  # see files.atomic_path
        if written.is_file():
            path.unlink()
    write_record(directory, record | {"complete": True})
    shutil.rmtree(directory / "state", ignore_errors=True)


class MetricsLog:
    """Appends to metrics.jsonl. Lines after the step from which a run resumes are removed, and
    those that a loss of power has damaged: the run itself does not need them."""

    def __init__(self, path, start_step):
        self.path = path
        if dist.rank() == 0:
            content = path.read_bytes() if start_step and path.is_file() else b""
            *lines, _ = content.decode("utf-8", "replace").split("\n")  # the last may be cut short
            steps = [(line, line_step(line)) for line in lines]
            kept = [line for line, step in steps if step is not None and step <= start_step]
            if n := sum(step is None for _, step in steps):
                print0(f"{path}: {n} of {len(steps)} lines can't be read and are dropped")
            write_atomic(path, "".join(f"{line}\n" for line in kept))

    def write(self, metrics):
        if dist.rank() == 0:
            with name_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")


def line_step(line):
    """The step of a line of metrics.jsonl, None if the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def format_metrics(metrics):
    """The metrics that a person follows, in one line."""
    labels = {"loss": "loss", "lm_loss": "LM loss", "prompt_kd": "L_kd", "prompt_reg": "L_reg"}
    labels |= {"kl_prompted_bare": "KL(prompted||bare)"}
    labels |= {"val_loss": "val loss", "val_rouge_l": "val ROUGE-L"}
    labels |= {"val_bare_loss": "teacher's val loss bare", "val_prompted_loss": "prompted"}
    digits = {"val_rouge_l": 1}
    shown = [name for name in labels if name in metrics]
    return "  ".join(f"{labels[name]} {metrics[name]:.{digits.get(name, 3)}f}" for name in shown)


def format_time(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class Clock:
    """The hours of a stage, over all processes that worked on it, and the lines that tell a person
    how far it is."""

    def __init__(self, progress, total_steps):
        self.first_step, self.hours_before = progress["step"], progress["hours"]
        self.total_steps, self.start = total_steps, time.perf_counter()
        self.last_report = -math.inf

    def update(self, progress, step):
        """Write a step that is complete, and the hours so far, into `progress`."""
        self.step, self.elapsed = step, time.perf_counter() - self.start  # seconds
        progress |= {"step": step, "hours": self.hours_before + self.elapsed / 3600}

    def is_report_due(self):
        return time.perf_counter() - self.last_report > 5

    def report(self, metrics):
        """Print the step, its metrics, and the time left."""
        self.last_report = time.perf_counter()
        seconds_per_step = self.elapsed / (self.step - self.first_step)
        left = format_time(seconds_per_step * (self.total_steps - self.step))
        speed = f"{metrics['tokens_per_second']:,.0f} tokens/s  {left} left"
        print0(f"step {self.step:,}/{self.total_steps:,}  {format_metrics(metrics)}  {speed}")


def peak_memory(device):
    """Peak memory in GB: allocated and reserved on a GPU (as in Table 2), resident on a CPU.
    {} on a CPU under Windows, which does not say."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"memory_allocated_gb": allocated / 1e9, "memory_reserved_gb": reserved / 1e9}
    if resource is None:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return {"memory_resident_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def reset_peak_memory(device):
    """Let the peak memory be that of what follows."""
    if device.type == "cuda":
        gc.collect()  # an optimizer's first step may leave a cycle of references to its parameters
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def save_checkpoint(run, directory):
    """Save the student, its tokenizer and, in PromptKD, the soft prompt as a Hugging Face model."""

    def write():
        (directory / "README.md").unlink(missing_ok=True)  # the card of the weights before
        save(run.student, directory, run.tokenizer.eot_token)
        save_generation_config(directory, run.tokenizer.eot_token, run.settings.max_new_tokens)
        save_tokenizer(run.tokenizer, directory, run.student.config.n_positions)
        if run.P is not None:
            save_prompt(run.P, directory, run.teacher_name, run.teacher_hash)

    dist.run_on_rank0(write)


def checkpoints(run):
    """The checkpoints of a run for Figure 3b, {optimizer step: directory} in order: the nearest one
    to each tenth of the best checkpoint's step, up to the best one itself.

    Raises InputError if the run is not complete or has no checkpoints.
    """
    run = Path(run)
    best_step = read_record(run).get("best_step")
    if type(best_step) is not int or best_step <= 0:
        fix = "give the directory of a complete run of train.py --keep 20"
        raise InputError(f"{run / 'run.json'}: has no 'best_step'; {fix}")
    paths = [path for path in run.glob("kept/step-*") if path.name[5:].isdecimal()]
    if not paths:
        fix = f"move {run} elsewhere and train it again with --keep 20"
        raise InputError(f"{run / 'kept'}: has no checkpoints; {fix}")
    by_step = {int(path.name[5:]): path for path in paths} | {best_step: run / "best"}
    steps = sorted(by_step)
    nearest = {min(steps, key=lambda s: abs(s - best_step * n / 10)) for n in range(1, 11)}
    if len(nearest) < 10:
        print(f"{run}: checkpoints up to its best step: {len(nearest)}, not 10", flush=True)
    return {step: by_step[step] for step in sorted(nearest)}
