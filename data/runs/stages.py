"""What a stage trains on, and the checks before and during it."""

import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from data.models.copies import check_same_files
from data.models.hub import file_hash, find_model_dir, model_hash
from data.models.named import count_parameters, find_model, load_model
from data.models.sampling import sample_to_file
from data.models.tokenizer import check_same_vocabulary, load_tokenizer
from data.process import dist
from data.process.dist import print0
from data.process.errors import InputError, explain_out_of_memory
from data.runs import report, runs
from data.runs.card import write_card
from data.runs.methods import file_fields
from data.runs.names import base_label, recorded_name
from data.runs.runs import LOCATIONS, finish_run, format_time
from data.sets.demo import TOKENIZER_DIR
from data.sets.prepare import PRETRAINING_FILE, find_data_dir, write_pretraining_text
from data.sets.rows import (
    corpus_format,
    encode_training_rows,
    epoch_order,
    iter_texts,
    packed_examples,
    read_rows,
    read_texts,
)
from prompt import freeze


def plan_steps(s, n_examples):
    """How epochs of n examples are divided into optimizer steps: fields of train.Run."""
    global_batch_size = min(s.global_batch_size, n_examples)
    if global_batch_size < dist.world_size():
        problem = f"can't be divided among {dist.world_size()} ranks"
        fix = "start fewer, or raise --global-batch"
        raise InputError(f"a global batch of {global_batch_size} rows {problem}; {fix}")
    rollout_size = min(max(global_batch_size, s.rollout_size or 0), n_examples)
    rollout_steps = s.inner_epochs * (rollout_size // global_batch_size)
    steps_per_epoch = n_examples // rollout_size * rollout_steps
    steps = {"steps_per_epoch": steps_per_epoch, "rollout_steps": rollout_steps}
    steps["total_steps"] = s.steps or min(steps_per_epoch * s.epochs, s.max_steps or math.inf)
    # A run that is shorter than its warm-up would end far below the rate that was asked for.
    is_short = steps["total_steps"] < s.warmup_steps
    steps["warmup_steps"] = max(1, steps["total_steps"] // 10) if is_short else s.warmup_steps
    return steps | {"global_batch_size": global_batch_size, "rollout_size": rollout_size}


def print_stage(run, directory, n_examples, start_step):
    resuming = f", resuming after step {start_step:,}" if start_step else ""
    print0(
        f"\n{directory}: {run.settings.method}, {run.student.n_parameters():,} parameters, "
        f"{n_examples:,} rows, {run.total_steps:,} steps of {run.global_batch_size}{resuming}"
    )
    if run.warmup_steps < run.settings.warmup_steps:
        usual = f"its usual {run.settings.warmup_steps:,} steps are more than the run has"
        print0(f"warm-up of {run.warmup_steps:,} steps: {usual}")
    if run.P is not None:
        n, n_teacher = run.P.numel(), run.teacher.n_parameters()
        share = f"{100 * n / n_teacher:.4f} % of the teacher's {n_teacher:,} parameters"
        print0(f"prompt: {len(run.P)} × {run.P.shape[1]} = {n:,} numbers, {share}")


@dataclass
class StageData:
    """What a stage trains and validates on."""

    tokenizer: object  # a tiktoken.Encoding
    dev_rows: list
    dev_examples: list  # dev_rows in tokens
    epoch_examples: Callable  # epoch number -> its training examples in their order


def data_files(s):
    """The paths of a stage's training rows, validation rows and, for pretrain, texts."""
    directory = dist.run_on_rank0(find_data_dir, s.data)
    files = [Path(s.responses or directory) / "train.jsonl", directory / "dev.jsonl"]
    texts = directory / PRETRAINING_FILE
    if s.method == "pretrain" and s.data == "demo":
        dist.run_on_rank0(write_pretraining_text, directory)
    return [*files, texts] if s.method == "pretrain" and texts.is_file() else files


def open_stage(directory, settings, files, paper=None, command=None):
    """Open a stage's run (see `runs.open_run`). settings: a dict. files: the paths of its data
    files. paper: which of the paper's runs it is. command: the command line that it is part of."""

    def hash_inputs():
        hashes = {path.name: file_hash(path) for path in files if path.is_file()}
        for field in file_fields():
            if settings.get(field):
                hashes[field] = file_hash(settings[field])
        fields = () if settings["method"] == "pretrain" else ("student", "teacher")
        models = {field: settings[field] for field in fields if settings.get(field)}
        return hashes | {field: model_hash(model) for field, model in models.items()}

    inputs = dist.run_on_rank0(hash_inputs)
    recorded = dict(settings)
    for field in (LOCATIONS | file_fields() | set(inputs)) & set(settings):
        recorded[field] = recorded_name(settings[field], directory.parent)
    description = {"name": directory.name, "base": base_label(settings["student"])}
    description |= {"paper": paper, "settings": recorded, "command": command}
    return runs.open_run(directory, description, inputs)


def load_data(s):
    """The StageData for Settings `s`. Raises InputError if nothing is left to train on."""
    train_path, dev_path, *text_paths = data_files(s)
    dev_rows = read_rows(dev_path, s.max_dev_rows)
    if s.method == "pretrain":
        tokenizer = load_tokenizer(TOKENIZER_DIR if s.data == "demo" else None)
    else:
        tokenizer = load_tokenizer(dist.run_on_rank0(find_model_dir, s.student))
    dev_examples = encode_training_rows(dev_rows, tokenizer)
    text_path = text_paths[0] if text_paths else None
    epoch_examples = read_examples(s, tokenizer, train_path, text_path)
    if not epoch_examples(0):
        problem = "train.jsonl is too little to train on; give more or shorter rows"
        raise InputError(f"data {s.data}: {problem}")
    if not dev_examples:
        problem = "every validation row's request is over the limit; give shorter ones in dev.jsonl"
        raise InputError(f"data {s.data}: {problem}")
    return StageData(tokenizer, dev_rows, dev_examples, epoch_examples)


def read_examples(s, tokenizer, train_path, text_path=None):
    """A function from an epoch's number to its training examples in their order. text_path: a
    corpus, for pretrain in place of the rows."""
    rows = read_rows(train_path, s.max_train_rows, sampled=s.responses is not None)
    examples = [] if text_path else encode_training_rows(rows, tokenizer)
    documents = [e.request + e.response for e in examples]
    if text_path:
        documents = encode_texts(read_corpus(text_path, s.max_train_rows), tokenizer)
    if s.method != "pretrain" and len(examples) < len(rows):
        dropped = f"{len(rows) - len(examples)} of {len(rows)} rows"
        print0(f"{train_path}: {dropped} have a request over the limit and are left out")

    @lru_cache(maxsize=1)  # the loop asks at every step
    def epoch_examples(epoch):
        if s.method == "pretrain":
            return packed_examples(documents, s.block_size, s.seed, epoch)
        return [examples[i] for i in epoch_order(len(examples), s.seed, epoch)]

    return epoch_examples


def read_corpus(path, limit=None):
    """The first texts of a corpus. Reports how many there are and how they were read."""
    texts = read_texts(path, limit)
    print_corpus(path, len(texts))
    return texts


def print_corpus(path, n):
    print0(f"{path}: {n:,} documents, read as {corpus_format(path)}")


def encode_texts(texts, tokenizer):
    return [[*tokenizer.encode_ordinary(text), tokenizer.eot_token] for text in texts]


def read_lm_blocks(s, tokenizer, n_rows):
    """Blocks of MiniLLM's plain text: at least `n_rows`, or as many as the text gives."""
    documents, n_tokens = [], 0
    # Every rank reads only what it needs: `fetch_inputs` has checked all of the corpus.
    for text in iter_texts(s.lm_data):
        documents += encode_texts([text], tokenizer)
        n_tokens += len(documents[-1])
        if n_tokens > n_rows * s.block_size:
            break
    if n_tokens <= s.block_size:
        problem = f"has {n_tokens} tokens, and a block has {s.block_size}; give a longer text"
        raise InputError(f"{s.lm_data}: {problem}")
    print0(f"{s.lm_data}: its first {len(documents):,} documents are trained on")
    return packed_examples(documents, s.block_size, s.seed)


def check_positions(run, examples):
    """Raise InputError if a row is longer than a model can read."""
    # A row's last token is only predicted.
    longest = max((len(e.request) + len(e.response) - 1 for e in examples), default=0)
    prompt_length = 0 if run.P is None else len(run.P)
    needs = {"student": (run.student, longest), "teacher": (run.teacher, longest + prompt_length)}
    for name, (model, needed) in needs.items():
        if model is not None and needed > model.config.n_positions:
            found = f"the {name} has {model.config.n_positions} positions"
            raise InputError(f"{found} and the longest row needs {needed}; use a model with more")


def check_finite(directory, metrics):
    """Raise InputError if a loss or norm of a step is not finite, before the step is saved."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    bad = ", ".join(f"{name} {x}" for name, x in numbers.items() if not math.isfinite(x))
    if bad:
        options = "--prompt-lr or --lr" if "prompt" in bad else "--lr"
        found = f"{bad} at step {metrics['step']}"
        raise InputError(f"{directory}: {found}; the training has diverged: lower {options}")


def stop(directory, step, stop_signal):
    """End the process after a signal, with the state of this step saved."""
    name = signal.Signals(stop_signal).name
    print0(f"{directory}: stopped by {name}, saved at step {step:,}; the same command resumes it")
    sys.exit(128 + stop_signal)


def default_micro_batch_tokens(s):
    """What leaves each stage with a GPT-2 XL teacher below 22 GB (see tests/memory.py)."""
    is_xl = s.method != "pretrain" and count_parameters(s.student) > 1e9
    return 1024 if is_xl else 2048


def explain_memory(directory, micro_batch_tokens):
    """A context in which a lack of memory is reported as an InputError that says what to lower."""
    fix = "run the same command with a lower --micro-batch-tokens; what was saved is resumed"
    location = f"{directory}: micro-batches of {micro_batch_tokens:,} tokens"
    return explain_out_of_memory(location, fix)


def finish_stage(run, directory, record, progress):
    """Complete a stage, and draw its curves."""
    record |= {"parameters": run.student.n_parameters(), "total_steps": run.total_steps}
    record |= {"ranks": dist.world_size(), "device": run.device.type, "hours": progress["hours"]}
    if run.P is not None:
        record["prompt_length"] = len(run.P)
    record |= {"best": abs(progress["best"][0]), "best_step": progress["best_step"]}
    dist.run_on_rank0(write_card, directory, run.settings, record)
    dist.run_on_rank0(finish_run, directory, record)
    plot = dist.run_on_rank0(report.plot_curves, directory)  # last: drawing may fail
    took = format_time(3600 * record["hours"])
    best = f"{run.settings.metric_for_best} {record['best']:.2f}"
    print0(f"{directory}: done in {took}, best {best}; {plot}")


def fetch_inputs(args, teacher, student):
    """Download or write what a command needs and is not here. Raises InputError if a later stage
    would fail, before the earlier ones take their hours. teacher, student: names of models, or
    None."""
    data_dir = dist.run_on_rank0(find_data_dir, args.data)  # before a model is downloaded
    files = [data_dir / name for name in ("train.jsonl", "dev.jsonl", PRETRAINING_FILE)]
    check_same_files(files if args.lm_data is None else [*files, args.lm_data])
    if student is None:
        return
    read_rows(data_dir / "dev.jsonl", args.dev_rows)
    if args.lm_data is not None:
        n = dist.run_on_rank0(lambda: sum(1 for _ in iter_texts(args.lm_data)))
        print_corpus(args.lm_data, n)
    check_same_files([], [name for name in (teacher, student) if name])
    tokenizers = [find_model(name)[1] for name in (teacher, student) if name]
    if teacher is not None:
        check_same_vocabulary(teacher, student, *tokenizers)


def sample_responses(directory, s, device):
    """Sample a teacher's responses to the training requests, once for all runs of SeqKD. Returns
    the directory, whose train.jsonl has them. s: a ResponseSettings."""
    source = dist.run_on_rank0(find_data_dir, s.data) / "train.jsonl"
    path, start = directory / "train.jsonl", time.perf_counter()
    opened = open_stage(directory, asdict(s), [source])
    fix = "use a smaller teacher or more memory; what was sampled is kept"
    with opened as record, explain_out_of_memory(directory, fix):
        if record.get("complete"):
            print0(f"{directory}: complete, skipped")
            return str(directory)
        model, tokenizer = load_model(s.student, device)
        rows = read_rows(source, s.max_train_rows)
        dist.run_on_rank0(runs.write_record, directory, record)
        print0(f"\n{directory}: sampling the responses of {s.student} to {len(rows):,} requests")
        if not dist.run_on_rank0(path.is_file):
            model, key = freeze(model, s.dtype), (s.seed, "responses")
            sample_to_file(model, tokenizer, rows, key, path, s.max_new_tokens, s.dtype)
        record["hours"] = (time.perf_counter() - start) / 3600
        dist.run_on_rank0(finish_run, directory, record)
    return str(directory)
