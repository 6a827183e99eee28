"""What `train.py --plan` prints: the stages of a plan, their inputs, steps and disk space."""

import json
import shutil
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from data.models.hub import download_dir, find_local_model, hub_repository, weights_files
from data.models.tokenizer import list_tokenizer_files, load_tokenizer
from data.process.errors import InputError
from data.runs import stages
from data.runs.runs import check_settings, read_record
from data.runs.states import newest_step
from data.sets.demo import TOKENIZER_DIR
from data.sets.prepare import PRETRAINING_FILE, PUBLIC_SETS, find_local_data
from data.sets.rows import check_text_file, encode_training_rows, read_rows

# Bytes of model.safetensors on the hub
DOWNLOADS = {"gpt2": 0.55e9, "gpt2-medium": 1.52e9, "gpt2-large": 3.25e9, "gpt2-xl": 6.43e9}
STATE_BYTES = 12  # per parameter: float32 weights and AdamW's two moments
MODEL_BYTES = 4  # per parameter: float32 weights
PRETRAINING_BYTES = 76e6  # of the demo's text


def print_plan(args, planned):
    """Print the stages of `data.runs.plan.plan_stages`. Reads what is here, writes nothing. Raises
    InputError at the end if one would be refused.

    args: of train.py. Under torchrun, call it with dist.run_on_rank0.
    """
    problems, made, left, peak, is_known = [], {}, 0, 0, True
    for number, stage in enumerate(planned, start=1):
        status, problem = stage_status(stage)
        problems += [problem] if problem else []
        print(f"\n{number}. {stage.directory} ({stage.label}): {status}")
        for field, name in stage.inputs.items():
            print(f"   {field} {name}: {describe_input(stage, field, name, made)}")
        if status != "complete, skipped":
            print(f"   steps: {describe_steps(stage)}")
            print(f"   disk: {describe_disk(stage)}")
            needed, kept = disk_bytes(stage)
            peak, left = max(peak, left + needed), left + kept
            is_known = is_known and stage.student.n_parameters is not None
        print_settings(stage)
        made[str(stage.directory)] = number
    folder = next(p for p in (Path(args.out), *Path(args.out).absolute().parents) if p.exists())
    free, more = shutil.disk_usage(folder).free, "" if is_known else ", and what is not known"
    print(f"\ndisk in {args.out}: up to {format_bytes(peak)}{more}; {format_bytes(free)} are free")
    print("Nothing was downloaded or written. Without --plan the same is run.", flush=True)
    if problems:
        raise InputError(problems[0])


def print_settings(stage):
    if stage.settings is None:
        unknown = f"not known before {stage.student.origin} is downloaded: the preset is that of"
        print(f"   settings: {unknown} the GPT-2 nearest in size")
        return
    print("   settings:")
    for field, value in asdict(stage.settings).items():
        print(f"     {field} = {json.dumps(value, ensure_ascii=False)}")


def format_bytes(n):
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"


def stage_status(stage):
    """Whether a stage is complete or where it starts; and why it would be refused, or None. Its
    settings are compared here, the contents of its inputs only when it is run."""
    record = read_record(stage.directory)
    if not record:
        return "from scratch", None
    if stage.settings is not None:
        named = {"student", "teacher"} & set(stage.inputs)
        try:
            check_settings(stage.directory, record, asdict(stage.settings), named)
        except InputError as error:
            return "refused, see below", str(error)
    if record.get("complete"):
        return "complete, skipped", None
    if stage.kind == "responses":
        return "continues with the responses that are missing", None
    step = newest_step(stage.directory)
    return f"resumes after step {step:,}" if step else "from scratch, no state was saved", None


def describe_input(stage, field, name, made):
    """Whether an input is here, else where it comes from. made: {directory: number} of the stages
    before this one."""
    if name in made:
        return f"made by stage {made[name]}"
    if field == "data":
        return describe_data(name, with_text=stage.kind == "pretrain")
    if field in ("student", "teacher"):
        return describe_model(name)
    return f"here, {format_bytes(check_text_file(name).stat().st_size)}"


def describe_data(name, with_text):
    directory, is_ready = find_local_data(name)
    if is_ready:
        for split in ("train", "dev"):
            check_text_file(directory / f"{split}.jsonl")
        text = f"here, {directory}"
    elif name == "demo":
        text = f"would be written to {directory}"
    else:
        repository = PUBLIC_SETS[name].repository
        text = f"would be downloaded from the hub's datasets/{repository} to {directory}"
    path = directory / PRETRAINING_FILE
    if name == "demo" and with_text and not path.is_file():
        text += f"; {path} would be written, {format_bytes(PRETRAINING_BYTES)}"
    return text


def describe_model(name):
    directory, _ = find_local_model(name)
    if directory is not None:
        size = sum(path.stat().st_size for path in weights_files(directory))
        return f"here, {directory}, {format_bytes(size)}"
    repository = hub_repository(name)
    size = DOWNLOADS.get(repository.removeprefix("openai-community/"))
    size = format_bytes(size) if size else "of a size that is not known before"
    return f"would be downloaded from the hub to {download_dir(repository)}, {size}"


def describe_steps(stage):
    """The number of optimizer steps, as far as the data and its tokenizer are here."""
    s = stage.settings
    if s is None:
        return f"not known before {stage.student.origin} is downloaded"
    if stage.kind == "responses":
        return "none, the teacher is only sampled from"
    n, is_exact = count_examples(stage)
    if n is None:
        return f"{s.steps:,}" if s.steps else "not known before the data is here"
    steps = stages.plan_steps(s, n)
    kind = "blocks" if s.method == "pretrain" else "training rows"
    text = f"{steps['total_steps']:,} of {steps['global_batch_size']:,} rows; {n:,} {kind}"
    if steps["warmup_steps"] < s.warmup_steps:
        text += f"; warm-up of {steps['warmup_steps']:,} steps in place of {s.warmup_steps:,}"
    return text if is_exact else f"{text}, less those whose request is over the limit of tokens"


def count_examples(stage):
    """The number of a stage's training examples, None if it is not known yet, and whether it is
    exact: without the model's tokenizer, rows whose request is too long are counted too."""
    s = stage.settings
    directory, is_ready = find_local_data(s.data)
    train_path = Path(s.responses or directory) / "train.jsonl"
    if not is_ready or (s.responses and not train_path.is_file()):
        return None, False
    if s.method == "pretrain":
        text_path = directory / PRETRAINING_FILE
        # GPT-2's own tokenizer, which other data needs, may have to be downloaded.
        if s.data != "demo" or not text_path.is_file():
            return None, False
        tokenizer = load_tokenizer(TOKENIZER_DIR)
        return len(stages.read_examples(s, tokenizer, train_path, text_path)(0)), True
    model_dir, _ = find_local_model(stage.student.origin)
    if model_dir is None or not list_tokenizer_files(model_dir):
        return len(read_rows(train_path, s.max_train_rows)), False
    return count_training_rows(train_path, s.max_train_rows, model_dir), True


@lru_cache
def count_training_rows(path, limit, tokenizer_dir):
    rows = read_rows(path, limit)
    return len(encode_training_rows(rows, load_tokenizer(tokenizer_dir)))


def disk_bytes(stage):
    """The bytes that a stage needs at most, and that it leaves, without what is small: logs,
    prompts and texts. 0 if the model's size is not known."""
    n = stage.student.n_parameters or 0
    if stage.kind == "responses":
        return 0, 0
    left = (1 + stage.keep) * MODEL_BYTES * n
    # A third state, and a second best checkpoint, are written before an old one is removed.
    return 3 * STATE_BYTES * n + MODEL_BYTES * n + left, left


def describe_disk(stage):
    n, (needed, left) = stage.student.n_parameters, disk_bytes(stage)
    if stage.kind == "responses":
        return "little, the text of the responses"
    if n is None:
        return f"not known before {stage.student.origin} is downloaded"
    state, model = format_bytes(STATE_BYTES * n), format_bytes(MODEL_BYTES * n)
    kept = f" and {stage.keep} in kept/" if stage.keep else ""
    parts = f"3 states of {state}; checkpoints of {model}, 2 for best/{kept}"
    return f"up to {format_bytes(needed)} ({parts}), {format_bytes(left)} in the end"
