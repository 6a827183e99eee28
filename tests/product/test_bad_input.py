"""Everything that a user can get wrong. Each case ends with one line that names the problem and the
fix, and exit status 2: no traceback, no training, and every file is still there unchanged."""

import errno
import gzip
import json
import os
import pickle
import re
import resource
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch
from helpers import (
    ROOT,
    Short,
    after_device,
    fork_ranks,
    soft_prompt,
    stored_weights,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    wait_for,
    write_checkpoint,
    write_rows,
)
from safetensors.torch import load_file, save_file
from tiktoken_ext.openai_public import r50k_pat_str

import evaluate
import exposure_bias
import train
from data.models import sampling
from data.models.checkpoint import save
from data.models.hub import download
from data.models.tokenizer import END_OF_TEXT
from data.process import command_line, files
from data.process.command_line import run_command_line
from data.process.errors import InputError
from data.process.files import write_atomic
from data.runs.options import parse_shape
from data.runs.runs import RUN_FORMAT, base_label
from data.sets import prepare
from data.sets.rows import read_rows

PROGRAMS = {
    "train.py": train,
    "evaluate.py": evaluate,
    "sample.py": sampling,
    "exposure_bias.py": exposure_bias,
    "data.prepare": prepare,
}
CONFIG = replace(talker_config(), n_positions=400)
ROW = {"instruction": "Write a word.", "input": "", "output": "task"}
NAN, INF = float("nan"), float("inf")
# Commands that are right except that there is no such data
NOWHERE = {
    "train.py": "train.py --teacher teacher --student student --data nowhere",
    "evaluate.py": "evaluate.py student --data nowhere",
    "sample.py": "sample.py student --file nowhere.jsonl",
    "exposure_bias.py": "exposure_bias.py --teacher teacher --students student --data nowhere",
}
SFT = "train.py --method sft --student student --data data"


# ---- the world: models, data, a finished run ---------------------------------------------------


def make_tokenizer(name, tokens):
    ranks = {token: number for number, token in enumerate(tokens)}
    special_tokens = {END_OF_TEXT: len(tokens)}
    return tiktoken.Encoding(
        name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special_tokens
    )


def another_tokenizer():
    """As many tokens as tiny_tokenizer has, in another order."""
    n_tokens = tiny_tokenizer().n_vocab - 1
    tokens = [tiny_tokenizer().decode_single_token_bytes(n) for n in range(n_tokens)]
    tokens.insert(256, tokens.pop(tokens.index(b" i")))
    return make_tokenizer("other", tokens)


def small_tokenizer():
    """The 256 bytes and end-of-text alone."""
    tokens = [tiny_tokenizer().decode_single_token_bytes(n) for n in range(256)]
    return make_tokenizer("small", tokens)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    write_checkpoint(directory / "student", CONFIG, tiny_tokenizer())
    write_checkpoint(directory / "teacher", replace(CONFIG, n_embd=16), tiny_tokenizer())
    write_checkpoint(directory / "other", CONFIG, another_tokenizer())
    write_checkpoint(directory / "small", replace(CONFIG, vocab_size=257), small_tokenizer())
    rows = [ROW | {"instruction": f"Write word {n}."} for n in range(4)]
    for name in ("train", "dev", "test"):
        write_rows(directory / "data" / f"{name}.jsonl", rows)
    write_rows(directory / "corpus.jsonl", [{"text": "a task that describes a task " * 300}])
    run = directory / "sft-student-s10"
    shutil.copytree(directory / "student", run / "best")
    shutil.copytree(directory / "student", run / "kept" / "step-000002")
    write_rows(run / "metrics.jsonl", [{"step": 1, "memory_resident_gb": 1.5}])
    record = {
        "format": RUN_FORMAT,
        "name": run.name,
        "paper": None,
        "settings": {"student": "student", "data": "data", "reg_weight": None},
        "parameters": 1000,
        "best_step": 4,
        "hours": 0.5,
        "complete": True,
    }
    (run / "run.json").write_text(json.dumps(record))
    return directory


@pytest.fixture(autouse=True)
def isolated(world, online, tmp_path, monkeypatch):
    """The world as the current directory, no network, no other models or data, no training, and no
    plots, which take long."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr("data.models.hub.time.sleep", lambda seconds: None)
    monkeypatch.setattr(prepare, "DATA_DIR", tmp_path / "home")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    monkeypatch.setattr("data.runs.report.save_plot", lambda path, draw: "no plot")
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("training has started"))


def offline(name):
    raise ConnectionError("no network")


@pytest.fixture
def bad(world, tmp_path, monkeypatch):
    """A copy of the data for a test to break, as `bad/` in the current directory."""
    home = tmp_path / "here"
    shutil.copytree(world / "data", home / "bad")
    for name in ("student", "teacher", "other", "small", "data", "corpus.jsonl", "sft-student-s10"):
        (home / name).symlink_to(world / name)
    write_rows(home / "bad" / "score.jsonl", [{"text": "a task"}] * 4)
    shutil.copy(world / "sft-student-s10" / "run.json", home / "bad")
    monkeypatch.chdir(home)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tiny_tokenizer())
    return home / "bad"


@pytest.fixture
def broken(world, bad):
    """A copy of the student for a test to break, as `broken/`."""
    return Path(shutil.copytree(world / "student", bad.parent / "broken")).relative_to(bad.parent)


@pytest.fixture
def run(world, bad):
    """A copy of the finished run for a test to break, as `run/`."""
    source = world / "sft-student-s10"
    return Path(shutil.copytree(source, bad.parent / "run")).relative_to(bad.parent)


def run_program(command, *options, **placeholders):
    """Run a command line in this process, with more options and with placeholders filled in."""
    arguments = [placeholders.get(word, word) for word in shlex.split(command)]
    program, *arguments = [str(argument) for argument in [*arguments, *options]]
    run_command_line(lambda: PROGRAMS[program].main(arguments))


@pytest.fixture
def refused(world, tmp_path, capsys):
    """A function that runs a command which must fail. It returns the error line, after the checks
    that all cases share."""

    def run(command, *options, **placeholders):
        before = snapshot(world, tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_program(command, *options, **placeholders)
        line = error_line(exit.value.code, capsys.readouterr().err)
        assert snapshot(world, tmp_path) == before
        return line

    return run


def snapshot(*directories):
    """The files below directories, {path: (content, time of the last change)}."""
    found = {}
    for parent, below, names in (entry for top in directories for entry in os.walk(top)):
        for path in (os.path.join(parent, name) for name in [*below, *names]):
            if os.path.islink(path):
                found[path] = os.readlink(path)
            elif os.path.isfile(path):
                found[path] = Path(path).read_bytes(), os.stat(path).st_mtime_ns
            elif not os.path.isdir(path):
                found[path] = "not a regular file"
    return found


def error_line(status, stderr):
    """The only error line on standard error; before it, data.prepare prints its usage."""
    assert status == 2
    *usage, line = after_device(stderr).splitlines()
    assert re.match(r"error: \S|[\w. -]+: error: \S", line) and "Traceback" not in stderr
    if usage:
        assert usage[0].startswith("usage: ")
        assert all(other.startswith(" ") for other in usage[1:])
    return line


def has(line, *parts):
    for part in parts:
        assert str(part) in line, f"{part!r} is not in {line!r}"


# ---- numbers -----------------------------------------------------------------------------------

# program, option, type, lowest, highest; ">" for a float that must be above the lowest
NUMBERS = [
    ("train.py", "--seed", int, 0, 2**32),
    ("train.py", "--prompt-length", int, 1, 512),
    ("train.py", "--reg", float, 0, 1e6),
    ("train.py", "--lr", ">", 0, 10),
    ("train.py", "--prompt-lr", ">", 0, 10),
    ("train.py", "--epochs", int, 1, 10**9),
    ("train.py", "--steps", int, 1, 10**9),
    ("train.py", "--global-batch", int, 1, 10**9),
    ("train.py", "--dropout", float, 0, 0.99),
    ("train.py", "--keep", int, 0, 10**6),
    ("train.py", "--micro-batch-tokens", int, 1, 10**9),
    ("train.py", "--train-rows", int, 1, 10**9),
    ("train.py", "--dev-rows", int, 1, 10**9),
    ("evaluate.py", "--seeds", int, 0, 2**32),
    ("evaluate.py", "--rows", int, 1, 10**9),
    ("evaluate.py", "--no-repeat-ngram", int, 0, 100),
    ("evaluate.py", "--batch", int, 1, 10**6),
    ("evaluate.py", "--samples", int, 1, 10**6),
    ("evaluate.py", "--max-new", int, 1, 100_000),
    ("evaluate.py", "--temperature", ">", 0, 100),
    ("evaluate.py", "--top-k", int, 0, 10**6),
    ("evaluate.py", "--top-p", ">", 0, 1),
    ("sample.py", "--seed", int, 0, 2**32),
    ("sample.py", "--no-repeat-ngram", int, 0, 100),
    ("sample.py", "--max-new", int, 1, 100_000),
    ("sample.py", "--temperature", ">", 0, 100),
    ("sample.py", "--top-k", int, 0, 10**6),
    ("sample.py", "--top-p", ">", 0, 1),
    ("exposure_bias.py", "--rows", int, 1, 10**6),
    ("exposure_bias.py", "--steps", int, 1, 256),
    ("exposure_bias.py", "--samples", int, 1, 10**6),
    ("exposure_bias.py", "--seed", int, 0, 2**32),
    ("exposure_bias.py", "--batch", int, 1, 10**6),
    ("exposure_bias.py", "--micro-batch-tokens", int, 1, 10**6),
]


@pytest.mark.parametrize("program, option, kind, low, high", NUMBERS)
def test_a_number_that_is_malformed_or_out_of_range(refused, program, option, kind, low, high):
    step = 1 if kind is int else 1e-3
    texts = [str(low if kind == ">" else low - step), str(high + step)]
    texts += ["x", "", "nan", "inf", "-inf", *(["1.5", "1e3"] if kind is int else ["0,5"])]
    for text in texts:
        has(refused(NOWHERE[program], option, text), option)


@pytest.mark.parametrize("program, option, kind, low, high", NUMBERS)
def test_a_number_at_the_limits_is_accepted(refused, program, option, kind, low, high):
    if option not in ("--prompt-lr", "--prompt-length", "--reg"):
        for number in (1e-30 if kind == ">" else low, high):
            has(refused(NOWHERE[program], option, number), "nowhere")


def test_a_number_that_is_out_of_range_is_reported_with_its_range(refused):
    line = refused("train.py", "--lr", "11\n")
    has(line, "--lr", "must be above 0 and at most 10, not '11\\n'")
    has(refused("sample.py x --top-k many"), "--top-k", "whole number", "many")


def test_under_torchrun_rank_0_reports_wrong_options_first(monkeypatch, capsys):
    """The others wait until it has exited; a rank that is still there reports one line too."""
    delays = []
    monkeypatch.setattr(command_line.time, "sleep", delays.append)
    for rank in range(2):
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(files.os, "_exit", sys.exit)  # which several ranks end with
        with pytest.raises(SystemExit) as exit:
            run_program("train.py --lr 0")
        assert exit.value.code == 2 and len(delays) == rank
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: argument --lr: must be above 0")


# ---- options -----------------------------------------------------------------------------------

PRETRAIN = "train.py --method pretrain --shape 2x64x4"
# command: parts of the error line, separated by "|"
OPTIONS = {
    "train.py --method sgd": "--method|invalid choice: 'sgd'|promptkd",
    "train.py --method ''": "--method|choose from",
    "train.py --method": "--method|expected one argument",
    "train.py --prompt-init words": "--prompt-init|'words'|random",
    "train.py --prompt-kl both": "--prompt-kl|'both'|forward",
    "train.py --reg-kl KL": "--reg-kl|'KL'|forward",
    "train.py --learning-rate 1": "unrecognized arguments: --learning-rate",
    "train.py gpt2": "unrecognized arguments: gpt2",
    "train.py --prompt x": "unrecognized arguments: --prompt x",
    "train.py --lr --epochs 1": "--lr|expected one argument",
    "train.py --shape 6x256x8": "--shape has no effect|leave it out",
    "train.py --method pretrain": "needs --shape|6x256x8",
    f"{PRETRAIN} --student student": "--student has no effect|leave it out",
    f"{PRETRAIN} --teacher teacher": "--teacher has no effect|leave it out",
    "train.py --method sft --teacher teacher": "--teacher has no effect|leave it out",
    "train.py --method sft --sft-teacher teacher": "--sft-teacher has no effect|leave it out",
    "train.py --teacher teacher --sft-teacher teacher": "--teacher has no effect|leave it out",
    "train.py --init student --student student": "--student has no effect|leave it out",
    "train.py --method kd --init student": "--init has no effect|leave it out",
    "train.py --lm-data corpus.jsonl": "--lm-data has no effect|leave it out",
    "train.py --method gkd --prompt-text Hello": "--prompt-text has no effect|leave it out",
    "train.py --method gkd --prompt-length 3": "--prompt-length has no effect|leave it out",
    "train.py --method minillm --prompt-init random": "--prompt-init has no effect|leave it out",
    "train.py --method kd --prompt-lr 1": "--prompt-lr has no effect|leave it out",
    "train.py --method sft --reg 0": "--reg has no effect|leave it out",
    "train.py --method seqkd --reg-kl forward": "--reg-kl has no effect|leave it out",
    "train.py --method seqkd --prompt-kl forward": "--prompt-kl has no effect|leave it out",
    "train.py --prompt-text ''": "--prompt-text is empty|leave it out",
    "train.py --student ''": "--student is empty|leave it out",
    "train.py --data ''": "--data is empty|leave it out",
    "train.py --out ''": "--out is empty|leave it out",
    "train.py --shape ''": "--shape is empty|leave it out",
    "train.py --lm-data ''": "--lm-data is empty|leave it out",
    "evaluate.py": "name at least one run or model|evaluate.py gpt2",
    "evaluate.py --score a.jsonl": "--score RESPONSES.jsonl goes with --references TEST.jsonl",
    "evaluate.py --references a.jsonl": "--score RESPONSES.jsonl goes with --references TEST.jsonl",
    "evaluate.py --score '' --references a.jsonl": "--score RESPONSES.jsonl goes with",
    "evaluate.py student --score a.jsonl --references b.jsonl": "without models",
    "evaluate.py student --by a b c": "--by a: no run named has this field",
    "evaluate.py student --data data --by reg_weight": "--by reg_weight|there are no runs",
    "evaluate.py sft-student-s10 --data data --by size": "--by size|best_step|reg_weight",
    "evaluate.py student --seeds": "--seeds|expected at least one argument",
    "evaluate.py student --data": "--data|expected at least one argument",
    "evaluate.py student --seeds 10 ten": "--seeds|'ten'",
    "evaluate.py --cost data": "none of the directories has a run.json|name runs",
    "evaluate.py --cost nowhere": "none of the directories has a run.json|name runs",
    "evaluate.py data --data data": "none of the directories has a model|name a run",
    "evaluate.py ''": "model ''|no such directory|hub id owner/name",
    "evaluate.py student --data data --max-new 390": "exceed the model's 400 positions|shorten",
    "evaluate.py student --speed": "unrecognized arguments: --speed",
    "sample.py": "required: model",
    "sample.py student": "give either --instruction TEXT|--file FILE",
    "sample.py student --instruction a --file data/test.jsonl": "give either --instruction TEXT",
    "sample.py student --file data/test.jsonl --input a": "--instruction|--input, or --file",
    "sample.py student --file ''": "is a directory|not a file",
    "sample.py student --instruction a --max-new 100000": "exceed the model's 400 positions",
    "sample.py student --instruction a --prompt nowhere": "nowhere: no such file|best/prompt.",
    "sample.py student more --instruction a": "unrecognized arguments: more",
    "exposure_bias.py": "required: --teacher",
    "exposure_bias.py --teacher teacher": "name --students RUN|MODEL|--along RUN",
    "exposure_bias.py --teacher teacher --students": "--students|expected at least one argument",
    "exposure_bias.py --teacher teacher --along student --data data": (
        "student/run.json|train.py --keep 20"
    ),
    "exposure_bias.py --teacher teacher --along nowhere --data data": (
        "nowhere/run.json|train.py --keep 20"
    ),
    "exposure_bias.py --teacher student --students student --data data --steps 2": (
        "the teacher's own|leave it out"
    ),
    "data.prepare": "required: SET",
    "data.prepare demo": "'demo'|choose from|dolly",
    "data.prepare ../dolly": "'../dolly'|choose from|dolly",
    "data.prepare dolly ''": "''|choose from",
    "data.prepare dolly --source": "--source|expected one argument",
    "data.prepare dolly --source nowhere": "nowhere|has neither raw.jsonl|name their folder",
    "data.prepare dolly --source corpus.jsonl": "corpus.jsonl|has neither raw.jsonl|name their",
    "data.prepare vicuna --source corpus.jsonl": "corpus.jsonl|has no valid.jsonl|name their",
    "data.prepare vicuna --source ''": "has no valid.jsonl|name their folder",
    "data.prepare uinst --source student": "student|has no 11_/valid.jsonl|name their folder",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_options_that_are_wrong_or_exclude_each_other(refused, command):
    has(refused(command), *OPTIONS[command].split("|"))


SHAPES = [
    *("6 6x256 6x256x8x1 axbxc 0x256x8 6x0x8 6x256x0 6x-256x8 6x250x8 6X256X8 6,256,8").split(),
    *("1e1x256x8 6.0x256x8 999999999x4x1 1x999999999x1 1000x100000x1 ../../x").split(),
    *("1001x4x1 1x28868x1").split(),  # just above the limits
    "9" * 5000 + "x4x1",
    "6x256x8\n\n7",
    "\x00",
]


def test_malformed_shapes(refused):
    for shape in SHAPES:
        line = refused("train.py --method pretrain --data data --shape", shape)
        has(line, "--shape", "6x256x8")


@pytest.mark.parametrize("sizes", [(1000, 4, 1), (1, 28867, 1), (1, 1, 1)])
def test_the_largest_and_the_smallest_shape(sizes):
    config = parse_shape("x".join(map(str, sizes)))
    assert (config.n_layer, config.n_embd, config.n_head) == sizes


def test_text_that_is_not_utf_8_is_accepted_as_a_prompt_and_as_an_instruction(refused, capsys):
    """An argument that is not UTF-8 reaches Python as lone surrogates."""
    text = os.fsdecode(b"caf\xe9")
    has(refused(NOWHERE["train.py"], "--prompt-text", text), "nowhere")
    with pytest.raises(pytest.fail.Exception, match="training has started"):
        run_program(READERS["init"], "--prompt-text", text, "--out", "out", MODEL="student")
    shutil.rmtree("out")
    capsys.readouterr()
    run_program("sample.py student --max-new 2 --instruction", text)
    assert after_device(capsys.readouterr().err) == ""


# ---- JSON lines --------------------------------------------------------------------------------

SCORE = "evaluate.py --score bad/score.jsonl --references bad/test.jsonl"
MINILLM = "train.py --method minillm --sft-teacher teacher --init student --data data --lm-data"
# The data file that is wrong, and the command that reads it
PLACES = {
    "train": ("bad/train.jsonl", "train.py --method sft --student student --data bad"),
    "dev": ("bad/dev.jsonl", "train.py --method sft --student student --data bad"),
    "evaluate": ("bad/test.jsonl", "evaluate.py student --data bad"),
    "exposure": (
        "bad/test.jsonl",
        "exposure_bias.py --teacher teacher --students student --data bad",
    ),
    "sample": ("bad/test.jsonl", "sample.py student --file bad/test.jsonl"),
    "score": ("bad/score.jsonl", SCORE),
    "references": ("bad/test.jsonl", SCORE),
    "corpus": ("bad/corpus.jsonl", f"{MINILLM} bad/corpus.jsonl"),
    "corpus, before the stages": (
        "bad/corpus.jsonl",
        "train.py --method minillm --teacher teacher --student student --data data "
        "--lm-data bad/corpus.jsonl",
    ),
    "pretrain": ("bad/pretrain.jsonl", "train.py --method pretrain --shape 1x8x1 --data bad"),
    "prepare": ("bad/valid.jsonl", "data.prepare vicuna --source bad"),
    "prepare dolly": ("bad/raw.jsonl", "data.prepare dolly --source bad"),
    "prepare raw dolly": ("bad/databricks-dolly-15k.jsonl", "data.prepare dolly --source bad"),
    "cost": ("bad/metrics.jsonl", "evaluate.py --cost bad --out bad/out"),
}


def put(place, content):
    """Write the data file of a place: bytes, or a function of its path. Returns its path and the
    command that reads it."""
    path, command = Path(PLACES[place][0]), PLACES[place][1]
    if place.startswith("prepare"):
        # With train.jsonl, the directory would be a data set that is prepared already.
        Path("bad/train.jsonl").unlink(missing_ok=True)
    if place == "prepare dolly":
        shutil.copy("bad/test.jsonl", "bad/valid.jsonl")
    path.unlink(missing_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    return path, command


def as_line(row):
    return json.dumps(row).encode() + b"\n"


GOOD = as_line(ROW | {"text": "a", "context": "", "response": ""})
NOT_JSON = ["is not JSON", "expected one object per line"]
NO_OBJECT = ["is not a JSON object", "expected one object per line"]
NOT_UTF8 = ["UTF-8", "convert"]
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
LINES = {  # the content, the line that is wrong, and parts of the message
    "empty file": (b"", None, ["has no rows"]),
    "cut off": (GOOD + GOOD[:30], 2, NOT_JSON),
    "an array": (GOOD + b"[1, 2]\n", 2, NO_OBJECT),
    "a string": (b'"instruction"\n', 1, NO_OBJECT),
    "a number": (GOOD * 2 + b"17\n", 3, NO_OBJECT),
    "null": (b"null\n", 1, NO_OBJECT),
    "NaN alone": (b"NaN\n", 1, NO_OBJECT),
    "blank lines": (b"\n \r\n\n", None, ["has no rows"]),
    "after blank lines": (b"\n" + GOOD + b" \r\n17\n" + GOOD, 4, NO_OBJECT),
    "not UTF-8": (GOOD + GOOD.replace(b"word", b"caf\xe9"), 2, NOT_UTF8),
    "UTF-16": (GOOD.decode().encode("utf-16"), None, ["is UTF-16", *NOT_UTF8]),
    "compressed": (gzip.compress(GOOD), None, ["is compressed", "gzip"]),
    "git-lfs": (LFS_POINTER, None, ["is a git-lfs pointer", "git lfs pull"]),
    "zeros": (GOOD + bytes(100) + b"\n", 2, NOT_JSON),
    "single quotes": (GOOD + b"{'instruction': 'a'}\n", 2, NOT_JSON),
    "a trailing comma": (b'{"instruction": "a",}\n', 1, NOT_JSON),
    "two objects": (GOOD.strip() + GOOD, 1, NOT_JSON),
    "an object over lines": (b'{\n"instruction": "a"\n', 1, NOT_JSON),
    "a web page": (b"<!DOCTYPE html>\n<html></html>\n", 1, NOT_JSON),
    "nested": (GOOD + b'{"a": ' + b"[" * 200_000 + b"\n", 2, NOT_JSON),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}\n", 1, NOT_JSON),
    "ten megabytes cut off": (b'{"instruction": "' + b"a" * 10_000_000, 1, NOT_JSON),
}


@pytest.mark.parametrize("place", PLACES)
def test_malformed_json_lines(refused, bad, place):
    for what, (content, number, parts) in LINES.items():
        if place == "cost" and what == "empty file":
            continue  # a run that was stopped before its first step has an empty metrics.jsonl
        path, command = put(place, content)
        line = refused(command)
        has(line, path if number is None else f"{path}, line {number}: ", *parts)
        assert len(line) < 300


def missing(path):
    pass


def dangling(path):
    path.symlink_to("nowhere")


def loop(path):
    path.symlink_to(path.name)


NO_FILES = {
    "missing": missing,
    "a directory": Path.mkdir,
    "a dangling link": dangling,
    "a link to itself": loop,
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("what", NO_FILES)
@pytest.mark.parametrize("place", [p for p in PLACES if not p.startswith(("pre", "cost"))])
def test_a_data_file_that_is_not_a_file(refused, bad, place, what):
    path, command = put(place, NO_FILES[what])
    has(refused(command), path, "is a directory" if what == "a directory" else "no such file")


@pytest.mark.parametrize("what", NO_FILES)
@pytest.mark.parametrize("place", [p for p in PLACES if p.startswith("prepare")])
def test_a_source_file_that_is_not_a_file(refused, bad, place, what):
    _, command = put(place, NO_FILES[what])
    Path("bad/test.jsonl").unlink()
    has(refused(command), "bad")


FIELDS = {  # the field, its values (... if it is absent), and the places that read it
    "instruction": (
        (..., None, 5, ["a"], {"a": 1}, True, NAN, INF),
        ("train", "dev", "evaluate", "exposure", "sample", "prepare"),
    ),
    "input": (
        (5, ["a"], {"a": 1}, False),
        ("train", "dev", "evaluate", "exposure", "sample", "prepare dolly"),
    ),
    "output": (
        (..., None, 5, [], [None], ["a", 5], {"a": 1}),
        ("train", "dev", "evaluate", "prepare", "references"),
    ),
    "ids": (("1 2", 5, [1.5], [-1], [None], [True], ["1"], [[1]], {}, NAN), ("train", "dev")),
    "text": (
        (..., None, 5, ["a"], {"a": 1}),
        ("score", "corpus", "pretrain", "corpus, before the stages"),
    ),
    "response": ((..., None, 5, ["a"]), ("prepare raw dolly",)),
    "context": ((..., None, 5), ("prepare raw dolly",)),
}


@pytest.mark.parametrize(
    "field, place", [(field, place) for field, (_, places) in FIELDS.items() for place in places]
)
def test_a_field_of_the_wrong_type(refused, bad, field, place):
    for value in FIELDS[field][0]:
        row = json.loads(GOOD) | {field: value}
        row = {name: v for name, v in row.items() if v is not ...}
        path, command = put(place, GOOD + as_line(row))
        has(refused(command), f"{path}, line 2: ", f"'{field}'", "must be")


@pytest.mark.parametrize("place", ["train", "dev"])
@pytest.mark.parametrize("token", [CONFIG.vocab_size, 10**30])
def test_tokens_beyond_the_vocabulary(refused, bad, place, token):
    path, command = put(place, GOOD + as_line(ROW | {"ids": [1, token]}))
    line = refused(command)
    has(line, f"{path}, line 2: 'ids' has a token beyond the tokenizer's {CONFIG.vocab_size}")
    has(line, "leave 'ids' out")


@pytest.mark.parametrize("count", [1, 3, 5])
def test_different_numbers_of_responses_and_references(refused, bad, count):
    _, command = put("score", GOOD * count)
    has(refused(command), f"{count} responses for 4 rows of references", "row by row")


@pytest.mark.parametrize(
    "place, parts",
    [
        ("train", ["train.jsonl", "give more or shorter rows"]),
        ("dev", ["dev.jsonl", "give shorter ones"]),
    ],
)
def test_rows_of_ten_megabytes_are_over_the_limit(refused, bad, place, parts):
    row = ROW | {"instruction": "a task that describes " * 450_000}
    _, command = put(place, as_line(row))
    has(refused(command), *parts)


def test_a_corpus_that_is_not_text_or_too_short(refused, bad):
    path, contents = Path("bad/corpus.txt"), {"longer": [b"", b"\n\n \n", b"a task"]}
    for part, texts in (contents | {"UTF-8": [b"\xff\xfe"]}).items():
        for text in texts:
            path.write_bytes(text)
            has(refused(MINILLM, path), path, part)
    path.write_bytes(json.dumps([{"text": "a task"}] * 9, indent=2).encode())
    has(refused(MINILLM, path), f"{path}, line 1: ", *NOT_JSON)
    path.unlink()
    has(refused(MINILLM, path), path, "no such file")


def test_blank_lines_are_skipped(bad, capsys):
    """In a file of responses and in a file of references."""
    run_program(SCORE)
    expected = capsys.readouterr().out
    for place in ("score", "references"):
        lines = Path(PLACES[place][0]).read_bytes().splitlines(keepends=True)
        put(place, b"\r\n" + b" \n\n".join(lines) + b"\n\t\n")
        run_program(SCORE)
        assert capsys.readouterr().out == expected


def test_unusual_but_well_formed_lines_are_accepted(bad, capsys):
    """A byte-order mark, CRLF, a field twice (the last one counts), NaN in an unused field, and ten
    megabytes."""
    lines = [
        b'\xef\xbb\xbf{"instruction": "first", "instruction": "Write."}\r\n',
        b'{"instruction": "Write.", "score": NaN, "other": [Infinity, {"a": null}]}\r\n',
        json.dumps({"instruction": "Write.", "input": "a task that describes " * 450_000}).encode(),
    ]
    assert len(lines[2]) > 9_900_000
    path, command = put("sample", b"".join(lines))
    assert [row.instruction for row in read_rows(path, needs_output=False)] == ["Write."] * 3
    run_program(command, "--greedy", "--max-new", "2", "--json")
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 3
    assert after_device(output.err).startswith("1 of 3 requests were shortened to fit")


# ---- checkpoints -------------------------------------------------------------------------------

SAMPLE = "sample.py MODEL --instruction Write."
# Commands that read the model in the place of MODEL
READERS = {
    "student": "train.py --method sft --student MODEL --data data",
    "teacher": "train.py --teacher MODEL --student student --data data",
    "sft-teacher": "train.py --sft-teacher MODEL --init student --data data",
    "init": "train.py --sft-teacher teacher --init MODEL --data data",
    "evaluate": "evaluate.py MODEL --data data --out out",
    "exposure teacher": (
        "exposure_bias.py --teacher MODEL --students student --data data --out out"
    ),
    "exposure student": (
        "exposure_bias.py --teacher teacher --students MODEL --data data --out out"
    ),
}
# The same for models that are read only after the teacher's stage
LATER_READERS = {
    "student, after the teacher": "train.py --teacher teacher --student MODEL --data data",
    "init, after the teacher": "train.py --teacher teacher --init MODEL --data data",
}


def change_json(path, **values):
    """Set fields of a JSON file, or remove those given as `...`."""
    fields = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


@pytest.mark.parametrize("field", ["n_layer", "n_embd", "n_head", "vocab_size", "n_positions"])
def test_a_wrong_size_in_config_json(refused, broken, field):
    for value in (..., None, 0, -1, 1.5, 2.0, "2", True, [2], {}, 10**7, 10**30, NAN, INF):
        change_json(broken / "config.json", **{field: value})
        parts = f"'{field}'", "must be an integer"
        has(refused(SAMPLE, MODEL=broken), "broken/config.json", *parts)


@pytest.mark.parametrize(
    "field, value, part",
    [
        ("model_type", "llama", "GPT-2 has 'gpt2'"),
        ("model_type", None, "GPT-2 has 'gpt2'"),
        ("model_type", 2, "GPT-2 has 'gpt2'"),
        ("activation_function", "relu", "GPT-2 has 'gelu_new'"),
        ("layer_norm_epsilon", 1e-6, "GPT-2 has 1e-05"),
        ("layer_norm_epsilon", "1e-5", "GPT-2 has"),
        ("layer_norm_epsilon", NAN, "GPT-2 has"),
        ("tie_word_embeddings", False, "GPT-2 has True"),
        ("scale_attn_weights", False, "GPT-2 has True"),
        ("scale_attn_by_inverse_layer_idx", True, "GPT-2 has False"),
        ("add_cross_attention", True, "GPT-2 has False"),
        ("n_inner", 7, "GPT-2 has 128"),
        ("n_inner", "128", "GPT-2 has 128"),
        ("resid_pdrop", 1, "from 0 to below 1"),
        ("resid_pdrop", -0.1, "from 0 to below 1"),
        ("resid_pdrop", "0.1", "a rate"),
        ("resid_pdrop", None, "a rate"),
        ("resid_pdrop", [0.1], "a rate"),
        ("resid_pdrop", NAN, "a rate"),
        ("n_head", 5, "can't be divided"),
    ],
)
def test_a_field_of_config_json_that_differs_from_gpt2(refused, broken, field, value, part):
    change_json(broken / "config.json", **{field: value})
    has(refused(SAMPLE, MODEL=broken), "broken/config.json", field, part)


@pytest.mark.parametrize(
    "field, value, part",
    [
        ("n_layer", 3, "'h.2.ln_1.weight' is missing"),
        ("n_layer", 1, "the model's own config.json"),
        ("n_layer", 100, "is missing"),
        ("n_embd", 64, "does not fit config.json"),
        ("n_embd", 10**6, "does not fit config.json"),
        ("n_positions", 10**6, "does not fit config.json"),
        ("vocab_size", 10**6, "put the model's vocab.json and merges.txt"),
        ("vocab_size", CONFIG.vocab_size + 1, "does not fit config.json"),
        ("vocab_size", CONFIG.vocab_size - 1, "put the model's vocab.json and merges.txt"),
    ],
)
def test_sizes_that_differ_from_the_weights(refused, broken, field, value, part):
    change_json(broken / "config.json", **{field: value})
    path = broken if "vocab.json" in part else broken / "model.safetensors"
    has(refused(SAMPLE, MODEL=broken), path, part)


CONFIG_FILES = {
    "empty": b"",
    "cut off": b'{"n_layer": 2, "n_em',
    "an array": b"[1]",
    "a string": b'"gpt2"',
    "null": b"null",
    "not UTF-8": b'{"a": "\xff"}',
    "zeros": bytes(50),
    "nested": b"[" * 200_000,
    "a web page": b"<!DOCTYPE html>",
    "a number of 5,000 digits": b'{"n_layer": ' + b"9" * 5000 + b"}",
    "a directory": Path.mkdir,
    "missing": missing,
    "a dangling link": dangling,
    "a link to itself": loop,
}


def test_a_malformed_config_json(refused, broken):
    path = broken / "config.json"
    for what, content in CONFIG_FILES.items():
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        absent = what in ("missing", "a dangling link", "a link to itself")
        fix = "a checkpoint directory has config.json" if absent else "fetch it again"
        has(refused(SAMPLE, MODEL=broken), "broken/config.json", fix)


def edit_tensors(path, change):
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def safetensors(entries, data=b"\0" * 8, length=None):
    """A safetensors file with this header and, if given, this wrong length of it."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ONE = {"wte.weight": entry()}
OVERLAP = ONE | {"wpe.weight": entry(offsets=(4, 12))}
DAMAGED = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "zeros": b"\0" * 100,
    "a web page": b"<!DOCTYPE html><html>not found</html>",
    "an LFS pointer": LFS_POINTER,
    "a header beyond the file": safetensors(ONE, length=10**6),
    "a header beyond all memory": safetensors(ONE, length=2**63),
    "a header that is not JSON": safetensors(b"{]"),
    "a header that is not UTF-8": safetensors(b'{"\xff": 1}'),
    "a header of another type": safetensors({"wte.weight": 5}),
    "a header that is an array": safetensors([1]),
    "a nested header": safetensors(b'{"a":' * 100_000),
    "overlapping offsets": safetensors(OVERLAP, b"\0" * 12),
    "offsets beyond the file": safetensors({"wte.weight": entry(offsets=(0, 800))}),
    "reversed offsets": safetensors({"wte.weight": entry(offsets=(8, 0))}),
    "negative offsets": safetensors({"wte.weight": entry(offsets=(-8, 0))}),
    "a hole": safetensors({"wte.weight": entry(offsets=(4, 12))}, b"\0" * 12),
    "a shape that differs from its bytes": safetensors({"wte.weight": entry((3,))}),
    "a shape beyond all memory": safetensors({"wte.weight": entry((2**40, 2**40))}),
    "a negative shape": safetensors({"wte.weight": entry((-2,))}),
    "an unknown dtype": safetensors({"wte.weight": entry(dtype="F33")}),
    "trailing bytes": safetensors(ONE, b"\0" * 9),
    "a duplicate name": safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
}


def test_a_damaged_safetensors_file(refused, broken):
    parts = {"a duplicate name": "tensor 'a' is not part", "an LFS pointer": "`git lfs pull`"}
    for what, content in DAMAGED.items():
        (broken / "model.safetensors").write_bytes(content)
        part = parts.get(what, "fetch it again")
        has(refused(SAMPLE, MODEL=broken), "broken/model.safetensors", part)


def test_a_truncated_safetensors_file(refused, broken):
    path = broken / "model.safetensors"
    content = path.read_bytes()
    for share in (0.999, 0.5, 0.1, 0.001):
        path.write_bytes(content[: int(share * len(content))])
        has(refused(SAMPLE, MODEL=broken), path, "truncated", "fetch it again")


def with_tensor(name, value):
    """A change that sets a tensor, or replaces it by a function of it."""

    def change(tensors):
        tensors[name] = value if isinstance(value, torch.Tensor) else value(tensors[name])

    return change


def with_last_value(value):
    def change(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return change


def without_attention(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != ATTENTION}


def only_another_tensor(tensors):
    return {"a": torch.zeros(1)}


ATTENTION, GAIN, HEAD = "h.1.attn.c_attn.weight", "h.0.ln_1.weight", "lm_head.weight"
VOCAB = CONFIG.vocab_size
OTHER_MODEL = "the model's own config.json"
NOT_FINITE = "not finite|damaged or its training diverged"
WRONG_SHAPE = "does not fit config.json"
WRONG_DTYPE = "weights must be floating-point"
UNTIED = f"{HEAD}|differs from 'wte.weight'"
TENSORS = {  # the change, and parts of the message
    "one missing": (without_attention, f"{ATTENTION}|is missing|fetch the weights again"),
    "none": (only_another_tensor, f"'a'|{OTHER_MODEL}"),
    "a layer more": (with_tensor("h.2.ln_1.weight", torch.zeros(32)), f"h.2.ln_1|{OTHER_MODEL}"),
    "an unknown one": (with_tensor("gate.weight", torch.zeros(2, 32)), f"gate|{OTHER_MODEL}"),
    "a classifier's": (
        with_tensor("score.weight", torch.zeros(2, 32)),
        "score|language model alone",
    ),
    "NaN": (with_tensor(ATTENTION, with_last_value(NAN)), f"{ATTENTION}|{NOT_FINITE}"),
    "inf": (with_tensor(GAIN, with_last_value(INF)), f"{GAIN}|{NOT_FINITE}"),
    "transposed": (with_tensor(ATTENTION, torch.t), f"{ATTENTION}|(96, 32)|{WRONG_SHAPE}"),
    "too long": (with_tensor(GAIN, torch.zeros(33)), f"{GAIN}|(33,)|{WRONG_SHAPE}"),
    "a dimension more": (with_tensor(GAIN, torch.zeros(1, 32)), f"{GAIN}|(1, 32)|{WRONG_SHAPE}"),
    "a scalar": (with_tensor(GAIN, torch.tensor(1.0)), f"{GAIN}|()|{WRONG_SHAPE}"),
    "no element": (with_tensor(ATTENTION, torch.zeros(0)), f"{ATTENTION}|(0,)|{WRONG_SHAPE}"),
    "integers": (with_tensor(GAIN, torch.Tensor.long), f"{GAIN}|int64|{WRONG_DTYPE}"),
    "booleans": (with_tensor(GAIN, torch.Tensor.bool), f"{GAIN}|bool|{WRONG_DTYPE}"),
    "complex": (with_tensor(GAIN, torch.Tensor.cfloat), f"{GAIN}|complex64|{WRONG_DTYPE}"),
    "another head": (with_tensor(HEAD, torch.zeros(VOCAB, 32)), UNTIED),
    "a head of another size": (with_tensor(HEAD, torch.zeros(3, 32)), f"{HEAD}|{WRONG_SHAPE}"),
}


@pytest.mark.parametrize("what", TENSORS)
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_wrong_tensors(refused, broken, form, what):
    change, parts = TENSORS[what]
    edit_tensors(broken / "model.safetensors", change)
    if form == "pytorch_model.bin":
        torch.save(load_file(broken / "model.safetensors"), broken / form)
        (broken / "model.safetensors").unlink()
    has(refused(SAMPLE, MODEL=broken), broken / form, *parts.split("|"))


class Executes:
    """A pickle that makes a directory when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def huge(dtype=torch.float32):
    """A weight that stores one number and has 10^12."""
    return torch.zeros(1, dtype=dtype).expand(10**6, 10**6)


EXECUTED = Executes("executed")  # in the current directory
WEIGHTS = stored_weights(CONFIG)
# What pytorch_model.bin holds: bytes, or what torch.save is given
PICKLES = {
    "garbage": b"garbage",
    "empty": b"",
    "code in a bare pickle": pickle.dumps(EXECUTED),
    "code": {"wte.weight": EXECUTED},
    "code in the old format": {"wte.weight": EXECUTED},
    "truncated": WEIGHTS,
    "a whole module": torch.nn.Linear(2, 2),
    "a list": [torch.zeros(1)],
    "a tensor": torch.zeros(1),
    "numbers": {"wte.weight": 1.0},
    "a name that is not a string": {1: torch.zeros(1)},
    "a training state": {"model": {"wte.weight": torch.zeros(1)}},
    "a tensor beyond all memory": WEIGHTS | {"wte.weight": huge()},
    "a half tensor beyond all memory": WEIGHTS | {"wte.weight": huge(torch.half)},
    "a head beyond all memory": WEIGHTS | {"lm_head.weight": huge(torch.half)},
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle_that_is_damaged_or_executes_code(refused, broken, what):
    (broken / "model.safetensors").unlink()
    path, content = broken / "pytorch_model.bin", PICKLES[what]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=what != "code in the old format")
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    line = refused(SAMPLE, MODEL=broken)
    has(line, "broken/pytorch_model.bin")
    fixes = "fetch it again|weights by name|does not fit config.json|differs from 'wte.weight'"
    assert any(fix in line for fix in fixes.split("|")), line
    assert not Path("executed").exists()


def test_the_pickle_that_executes_code_would_do_so(bad):
    torch.save({"wte.weight": EXECUTED}, "x.bin")
    torch.load("x.bin", weights_only=False)
    assert Path("executed").is_dir()


@pytest.mark.parametrize("what", ["missing", "a directory", "a dangling link", "a link to itself"])
def test_weights_that_are_not_a_file(refused, broken, what):
    path = broken / "model.safetensors"
    path.unlink()
    NO_FILES[what](path)
    fix = "a checkpoint directory has config.json and model.safetensors"
    has(refused(SAMPLE, MODEL=broken), path, "no such file", fix)


@pytest.mark.parametrize("reader", READERS | LATER_READERS)
@pytest.mark.parametrize("what", ["config", "tokenizer", "nothing"])
def test_a_damaged_model_is_found_before_anything_is_trained(refused, broken, reader, what):
    if what == "config":
        change_json(broken / "config.json", n_layer="two")
        parts = ["broken/config.json"]
    elif what == "tokenizer":
        (broken / "merges.txt").write_text("#version: 0.2\na b c\n")
        parts = ["broken/vocab.json"]
    else:
        shutil.rmtree(broken)
        broken.mkdir()
        parts = ["broken/config.json: no such file"]
        if reader == "evaluate":
            parts = ["none of the directories has a model", "name a run"]
    has(refused((READERS | LATER_READERS)[reader], MODEL=broken), *parts)


@pytest.mark.parametrize("reader", READERS)
def test_damaged_weights_of_any_model(refused, broken, reader):
    edit_tensors(broken / "model.safetensors", with_tensor(GAIN, with_last_value(NAN)))
    fewer = {"evaluate": "--rows 1", "exposure student": "--rows 1 --steps 2 --samples 1"}
    line = refused(f"{READERS[reader]} {fewer.get(reader, '')}", MODEL=broken)
    has(line, "broken/model.safetensors", GAIN, "not finite")


# ---- tokenizers --------------------------------------------------------------------------------


def change_vocab(function):
    def change(directory):
        vocab = json.loads((directory / "vocab.json").read_text())
        (directory / "vocab.json").write_text(json.dumps(function(vocab)))

    return change


def change_merges(function):
    def change(directory):
        lines = (directory / "merges.txt").read_text().splitlines()
        (directory / "merges.txt").write_text("\n".join(function(lines)) + "\n")

    return change


def write(name, content):
    def change(directory):
        (directory / name).unlink()
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
        else:
            content(directory / name)

    return change


TOKENIZERS = {
    "vocab.json cut off": write("vocab.json", b'{"!": 0, '),
    "vocab.json empty": write("vocab.json", b""),
    "vocab.json an array": change_vocab(list),
    "vocab.json null": write("vocab.json", b"null"),
    "vocab.json not UTF-8": write("vocab.json", b"\xff"),
    "vocab.json nested": write("vocab.json", b"[" * 200_000),
    "a token missing": change_vocab(lambda v: {t: n for t, n in v.items() if n != 100}),
    "an extra token": change_vocab(lambda v: v | {"more": len(v)}),
    "end-of-text missing": change_vocab(lambda v: {t: v[t] for t in v if t != END_OF_TEXT}),
    "two tokens with one number": change_vocab(lambda v: v | {"!": 1}),
    "numbers as strings": change_vocab(lambda v: {t: str(n) for t, n in v.items()}),
    "numbers as lists": change_vocab(lambda v: {t: [n] for t, n in v.items()}),
    "a negative number": change_vocab(lambda v: v | {"!": -1}),
    "merges.txt missing": write("merges.txt", missing),
    "merges.txt a directory": write("merges.txt", Path.mkdir),
    "merges.txt a dangling link": write("merges.txt", dangling),
    "merges.txt empty": change_merges(lambda lines: []),
    "merges.txt not UTF-8": write("merges.txt", b"\xff\xfe"),
    "a merge missing": change_merges(lambda lines: lines[:-1]),
    "a merge twice": change_merges(lambda lines: [*lines, lines[-1]]),
    "merges in another order": change_merges(lambda lines: [lines[0], *reversed(lines[1:])]),
    "a merge of one part": change_merges(lambda lines: [*lines[:-1], "a"]),
    "a merge of unknown tokens": change_merges(lambda lines: [*lines[:-1], "Zq xx"]),
    "a web page": write("merges.txt", b"<!DOCTYPE html>\n<html></html>\n"),
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_tokenizer_whose_files_are_damaged_or_inconsistent(refused, broken, what):
    TOKENIZERS[what](broken)
    has(refused(SAMPLE, MODEL=broken), "broken", "vocab.json", "merges.txt", "again")


@pytest.mark.parametrize("what", ["missing", "a directory", "a dangling link"])
def test_a_model_without_a_tokenizer_and_without_a_network(refused, broken, monkeypatch, what):
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    for name in ("vocab.json", "merges.txt"):
        (broken / name).unlink()
    NO_FILES[what](broken / "vocab.json")
    line = refused(SAMPLE, MODEL=broken)
    if what == "missing":
        has(line, "tokenizer 'gpt2': can't be downloaded", "TIKTOKEN_CACHE_DIR")
    else:
        has(line, "broken/vocab.json: can't be read", "vocab.json and merges.txt, again")


@pytest.mark.parametrize("reader", ["sample", *READERS])
def test_a_model_with_fewer_tokens_than_its_tokenizer(refused, broken, reader):
    change_json(broken / "config.json", vocab_size=CONFIG.vocab_size - 1)
    line = refused(READERS.get(reader, SAMPLE), MODEL=broken)
    has(line, f"has {CONFIG.vocab_size - 1} tokens and its tokenizer {CONFIG.vocab_size}")


# Commands that compare the tokenizers of TEACHER and the student
TWO_MODELS = {
    "kd": "train.py --method kd --sft-teacher TEACHER --student student --data data",
    "kd, before the stages": (
        "train.py --method kd --teacher TEACHER --student student --data data"
    ),
    "gkd": "train.py --method gkd --sft-teacher TEACHER --init student --data data",
    "minillm": "train.py --method minillm --sft-teacher TEACHER --init student --data data",
    "seqkd": "train.py --method seqkd --sft-teacher TEACHER --student student --data data",
    "promptkd": "train.py --sft-teacher TEACHER --init student --data data",
    "promptkd, before the stages": "train.py --teacher TEACHER --student student --data data",
    "exposure": "exposure_bias.py --teacher TEACHER --students student --data data",
    "exposure, the second": (
        "exposure_bias.py --teacher student --students teacher TEACHER --data data"
    ),
}


@pytest.mark.parametrize("command", TWO_MODELS.values(), ids=TWO_MODELS)
@pytest.mark.parametrize("teacher", ["other", "small"])
def test_teacher_and_student_with_different_tokenizers(refused, bad, command, teacher):
    line = refused(command, TEACHER=teacher)
    has(line, teacher, "student", "have different tokenizers", "needs one for both")


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_a_model_with_too_few_positions(refused, world, tmp_path, model):
    short = write_checkpoint(tmp_path / "short", replace(CONFIG, n_positions=40), tiny_tokenizer())
    models = {"T": "teacher", "S": "student"} | {model[0].upper(): short}
    line = refused("train.py --sft-teacher T --init S --data data", **models)
    has(line, f"the {model} has 40 positions", "use a model with more")


# ---- soft prompts ------------------------------------------------------------------------------

NO_PROMPT = "no finite floating-point tensor 'prompt'|PromptKD run"
DAMAGED_PROMPT = "truncated|PromptKD run"
NO_FILE = "no such file|PromptKD run"
TOO_LONG = "exceed the model's 400 positions|shorten"
PROMPTS = {  # the tensors of the file, its bytes, or a function of its path; parts of the message
    "another width": ({"prompt": soft_prompt(3, 48)}, "48 wide and the model 32|use the teacher"),
    "another name": ({"P": soft_prompt(3)}, NO_PROMPT),
    "no tensor": ({}, NO_PROMPT),
    "integers": ({"prompt": torch.ones(3, 32, dtype=torch.long)}, NO_PROMPT),
    "complex": ({"prompt": torch.ones(3, 32, dtype=torch.complex64)}, NO_PROMPT),
    "one dimension": ({"prompt": torch.ones(32)}, NO_PROMPT),
    "three dimensions": ({"prompt": torch.ones(1, 3, 32)}, NO_PROMPT),
    "no row": ({"prompt": torch.ones(0, 32)}, NO_PROMPT),
    "NaN": ({"prompt": torch.full((3, 32), NAN)}, NO_PROMPT),
    "too long": ({"prompt": torch.ones(500, 32)}, TOO_LONG),
    "truncated": ({"prompt": soft_prompt(3)}, DAMAGED_PROMPT),
    "empty": (b"", DAMAGED_PROMPT),
    "a pickle": (lambda path: torch.save({"prompt": soft_prompt(3)}, path), DAMAGED_PROMPT),
    "missing": (missing, NO_FILE),
    "a dangling link": (dangling, NO_FILE),
    "a directory": (Path.mkdir, f"prompt.safetensors/prompt.safetensors: {NO_FILE}"),
}


@pytest.mark.parametrize("what", PROMPTS)
def test_a_soft_prompt_that_does_not_fit(refused, bad, what):
    (content, parts), path = PROMPTS[what], bad / "prompt.safetensors"
    if isinstance(content, dict):
        save_file(content, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    line = refused("sample.py student --instruction Write. --prompt", path)
    has(line, *parts.split("|"), *([] if what == "too long" else [path]))


# ---- runs --------------------------------------------------------------------------------------

RUN_READERS = {
    "evaluate": "evaluate.py run --data data",
    "cost": "evaluate.py --cost run",
    "init": "train.py --sft-teacher teacher --init run --data data",
    "init best": "train.py --sft-teacher teacher --init run/best --data data",
    "sft-teacher": "train.py --sft-teacher run --init student --data data",
    "along": "exposure_bias.py --teacher teacher --along run --data data",
}
UNREADABLE = "run.json: can't be read as JSON|train it again"
NOT_AN_OBJECT = "run.json: must be a JSON object|train it again"
OTHER_VERSION = "run.json: was made by another version of this project; choose another --out"
NOT_A_RECORD = {
    "empty": (b"", UNREADABLE),
    "cut off": (b'{"settings"', UNREADABLE),
    "not UTF-8": (b'{"a": "\xff"}', UNREADABLE),
    "nested": (b"[" * 200_000, UNREADABLE),
    "an array": (b"[]", NOT_AN_OBJECT),
    "null": (b"null", NOT_AN_OBJECT),
    "no field": (b"{}", OTHER_VERSION),
    "settings null": (b'{"settings": null}', OTHER_VERSION),
    "settings an array": (b'{"settings": []}', OTHER_VERSION),
    "another format": (b'{"format": 1, "name": "sft-a-s10", "settings": {}}', OTHER_VERSION),
}


@pytest.mark.parametrize("command", RUN_READERS.values(), ids=RUN_READERS)
def test_a_damaged_run_json(refused, run, command):
    for content, parts in NOT_A_RECORD.values():
        (run / "run.json").write_bytes(content)
        has(refused(command), "run/run.json", *parts.split("|"))


WRONG_FIELDS = [
    *[("name", value) for value in (..., None, 5)],
    *[("settings", value) for value in (..., [], "x", None)],
    *[("paper", value) for value in (5, ["sft"])],
    *[("parameters", value) for value in ("many", 1.5)],
    *[("hours", value) for value in ("long", [1])],
    *[("complete", value) for value in ("yes", 1)],
    *[("inputs", value) for value in ("train.jsonl", [])],
]


@pytest.mark.parametrize("reader", ["evaluate", "cost", "init", "along"])
def test_a_field_of_run_json_of_the_wrong_type(refused, run, reader):
    original = (run / "run.json").read_text()
    for field, value in WRONG_FIELDS:
        (run / "run.json").write_text(original)
        change_json(run / "run.json", **{field: value})
        line = refused(RUN_READERS[reader])
        has(line, "run/run.json", f"'{field}' is wrong", "train it again")


@pytest.mark.parametrize("kind", ["init", "pretrain", "teacher"])
def test_a_run_is_named_after_the_model_that_it_started_from(bad, run, kind):
    change_json(run / "run.json", name=f"{kind}-student", base="gpt2")
    assert base_label("run") == base_label("run/best") == "gpt2"
    change_json(run / "run.json", name="sft-student")
    assert base_label("run") == "run"


@pytest.mark.parametrize(
    "values",
    [{"paper": "sft"}, {"paper": ""}, {"hours": None}, {"parameters": None}, {"hours": NAN}],
)
def test_strange_but_harmless_values_in_run_json(run, bad, capsys, values):
    change_json(run / "run.json", **values)
    few = "--data data --seeds 10 --rows 1 --max-new 2 --greedy"
    for options in (few, "--cost"):
        run_program(f"evaluate.py run sft-student-s10 --out out {options}")


def test_a_run_without_a_best_step(refused, run):
    for value in (..., None, 0, -4, 1.5, "4", True, [4]):
        change_json(run / "run.json", best_step=value)
        has(refused(RUN_READERS["along"]), "run/run.json", "'best_step'", "train.py --keep 20")


def test_a_run_without_checkpoints_along_the_way(refused, run):
    shutil.rmtree(run / "kept")
    has(refused(RUN_READERS["along"]), "run/kept", "--keep 20")
    (run / "kept" / "step-000002").mkdir(parents=True)
    has(refused(RUN_READERS["along"]), "run/kept/step-000002/config.json", "no such file")
    (run / "kept" / "step-x").mkdir()
    (run / "kept" / "step-000002").rmdir()
    has(refused(RUN_READERS["along"]), "run/kept", "--keep 20")


@pytest.fixture
def finished(bad):
    """The run.json of a run of SFT in out/ that counts as complete."""
    with pytest.raises(pytest.fail.Exception, match="training has started"):
        run_program(SFT, "--micro-batch-tokens", 200)
    [path] = Path("out").glob("*/run.json")
    change_json(path, hours=0.5, complete=True, parameters=1000)
    run_program(SFT, "--micro-batch-tokens", 200)  # it is skipped now
    return path


@pytest.mark.parametrize(
    "field, value, part",
    [
        ("lr", 0.5, "lr 0.5"),
        ("seed", 11, "seed 11"),
        ("epochs", None, "epochs None"),
        ("global_batch_size", "32", "global_batch_size '32'"),
        ("epochs", ..., "epochs None"),
    ],
)
def test_an_output_directory_of_other_settings(refused, finished, field, value, part):
    settings = json.loads(finished.read_text())["settings"] | {field: value}
    settings = {name: v for name, v in settings.items() if v is not ...}
    change_json(finished, settings=settings)
    has(refused(SFT), finished.parent, "was made with", part, "choose another --out")


@pytest.mark.parametrize("what", NOT_A_RECORD)
def test_an_output_directory_whose_run_json_is_damaged(refused, finished, what):
    content, parts = NOT_A_RECORD[what]
    finished.write_bytes(content)
    has(refused(SFT), finished, f"remove {finished.parent.resolve()}", *parts.split("|"))


@pytest.mark.parametrize("what", ["garbage", "truncated", "another model's", "code", "a list"])
def test_a_damaged_state_is_one_line_or_the_stage_starts_from_scratch(finished, capsys, what):
    change_json(finished, complete=...)
    path = finished.parent / "state" / "state.pt"
    path.parent.mkdir()
    progress = {"step": 1, "best": None, "best_step": None, "hours": 0.0}
    state = {"progress": progress, "student": {"a": torch.zeros(1)}, "optimizer": {}}
    torch.save({"code": EXECUTED, "a list": [1]}.get(what, state), path)
    if what == "garbage":
        path.write_bytes(b"garbage")
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if what in ("garbage", "truncated"):
        with pytest.raises(pytest.fail.Exception, match="training has started"):
            run_program(SFT, "--micro-batch-tokens", 200)
        assert "is damaged; this stage starts from scratch" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit) as exit:
            run_program(SFT, "--micro-batch-tokens", 200)
        line = error_line(exit.value.code, capsys.readouterr().err)
        has(line, path, "is not a state of this run", f"remove {path.parent}")
    assert not Path("executed").exists()


def test_damaged_responses_are_sampled_again(bad, capsys):
    def evaluate_again():
        run_program("evaluate.py student --data data --seeds 10 --rows 1 --max-new 2 --out out")
        assert "Traceback" not in capsys.readouterr().err
        return json.loads(Path("out/table1.json").read_text())["scores"]

    scores, path = evaluate_again(), Path("out/responses/student/data-s10.jsonl")
    contents = {file: file.read_bytes() for file in (path, path.with_suffix(".json"))}
    for file, content in contents.items():
        for damage in (b"", b"\xff", b"null", b"[" * 200_000, content[:-3]):
            file.write_bytes(damage)
            assert evaluate_again() == scores
            assert {file: file.read_bytes() for file in contents} == contents


# ---- names -------------------------------------------------------------------------------------

NAMES = [
    *("../x ../../etc/x a/../../b owner/.. owner/. ../owner ./owner/x owner/name/more").split(),
    *(
        "owner//name /owner/name owner/ / owner\\name ~/x ~root/x owner/name?x=1 owner/name#x"
    ).split(),
    *("owner/%2e%2e file:///etc http://127.0.0.1/x - . .. gpt3 GPT2 gpt2/ öwner/name").split(),
    *("owner/..name.. openai-community/../gpt2 ./student/config.json").split(),
    *[
        "owner/na me",
        "owner/name\n",
        "owner/na\x00me",
        "\x00",
        "gpt2 ",
        "a" * 300,
        "a/" + "b" * 300,
    ],
]


@pytest.mark.parametrize(
    "reader",
    ["sample", "evaluate", "student", "init, after the teacher", "sft-teacher", "exposure student"],
)
def test_malformed_names_of_models_reach_no_server_and_no_file(refused, bad, server, reader):
    commands = READERS | LATER_READERS | {"sample": SAMPLE}
    for name in NAMES:
        line = refused(commands[reader], MODEL=name)
        if os.path.isdir(name):
            assert "config.json: no such file" in line or "has a model" in line
        else:
            has(line, "model", "no such directory", "hub id owner/name")
    assert not server.asked


@pytest.mark.parametrize("program", ["train.py", "evaluate.py", "exposure_bias.py"])
def test_malformed_names_of_data_sets(refused, bad, program):
    names = ["../x", "/etc/nowhere", "a/../../b", "dolly/../../x", "dolly/", "Dolly", "", " "]
    names += ["nowhere\n", "a\x00b", "a" * 300, "x" * 5000, "data/test.jsonl"]
    for name in names:
        parts = ["data", "no such directory", "give one with train.jsonl"]
        if (program, name) == ("train.py", ""):
            parts = ["--data is empty"]
        has(refused(NOWHERE[program].replace("nowhere", "DATA"), DATA=name), *parts)


def test_validation_rows_are_read_before_a_teacher_is_sampled(refused, bad, monkeypatch):
    monkeypatch.setattr(
        "data.models.sampling.sample", lambda *_, **__: pytest.fail("sampling has started")
    )
    (bad / "dev.jsonl").unlink()
    command = "train.py --method seqkd --sft-teacher teacher --student student --data bad"
    has(refused(command), "bad/dev.jsonl: no such file")


@pytest.mark.parametrize("reader", ["sft-teacher", "init", "teacher", "student, after the teacher"])
def test_a_missing_model_is_reported_before_any_stage(refused, bad, reader):
    line = refused((READERS | LATER_READERS)[reader], MODEL="no/where/x")
    has(line, "model 'no/where/x': no such directory", "give a checkpoint directory")


@pytest.mark.parametrize(
    "revision", [b"../../../outside", b"/etc", b"..", b"", b"a/b", b"\xff\xfe", b"x\n"]
)
def test_a_hub_cache_whose_revision_is_elsewhere_is_skipped(refused, world, tmp_path, revision):
    cache = tmp_path / "hf" / "hub" / "models--owner--name"
    for directory in (tmp_path / "hf" / "outside", cache / "snapshots" / "a" / "b"):
        shutil.copytree(world / "student", directory)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_bytes(revision)
    shutil.copytree(world / "student", cache / "outside")
    for name in ("config.json", "model.safetensors"):
        for directory in (cache, cache / "snapshots"):
            shutil.copy(world / "student" / name, directory)
    line = refused("sample.py owner/name --instruction a")
    has(line, "owner/name", "download failed", "check the network")


# ---- the network -------------------------------------------------------------------------------

HTML = b"<!DOCTYPE html><html>Sign in</html>"
MODEL_FILES = {"config.json", "model.safetensors", "vocab.json", "merges.txt"}


@pytest.mark.parametrize(
    "file, answer, parts",
    [
        ("config_json", 404, "config.json does not exist|check the name"),
        ("model_safetensors", 404, "model.safetensors does not exist|check the name"),
        ("model_safetensors", 401, "401|check the name|set HF_TOKEN"),
        ("config_json", 500, "config.json: download failed 3 times|500|check the network"),
        ("vocab_json", 503, "vocab.json: download failed 3 times|503|check the network"),
        ("config_json", HTML, "config.json|can't be read|fetch it again"),
        ("model_safetensors", HTML, "model.safetensors|damaged|fetch it again"),
        ("vocab_json", HTML, "vocab.json|vocab.json and merges.txt, again"),
        ("merges_txt", HTML, "merges.txt|vocab.json and merges.txt, again"),
        ("merges_txt", 404, "vocab.json|vocab.json and merges.txt, again"),
        ("config_json", b"", "config.json|can't be read|fetch it again"),
        ("model_safetensors", b"", "model.safetensors|damaged|fetch it again"),
        ("model_safetensors", Short(b"x" * 1000), "model.safetensors|damaged|fetch it again"),
    ],
)
@pytest.mark.parametrize("command", [SAMPLE, READERS["student"]])
def test_wrong_answers_of_the_hub(world, tmp_path, server, capsys, command, file, answer, parts):
    answers = {
        name.replace(".", "_"): (world / "student" / name).read_bytes() for name in MODEL_FILES
    }
    server.serve("owner/name", **(answers | {file: answer}))
    with pytest.raises(SystemExit) as exit:
        run_program(command, MODEL="owner/name")
    has(error_line(exit.value.code, capsys.readouterr().err), *parts.split("|"))
    directory = tmp_path / "torch" / "hub" / "promptkd" / "owner" / "name"
    downloaded = [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]
    # No partial file, and none anywhere else
    assert {path.name for path in downloaded} <= MODEL_FILES
    assert all(path.parent == directory for path in downloaded)


@pytest.mark.parametrize(
    "answer, parts",
    [
        (404, ["does not exist", "--source DIR"]),
        (500, ["download failed 3 times", "check the network"]),
        (403, ["403", "check the name", "set HF_TOKEN"]),
        (HTML, ["valid.jsonl, line 1: is not JSON", "the download is removed"]),
        (b"", ["valid.jsonl: has no rows", "the download is removed"]),
        (Short(GOOD), ["valid.jsonl, line 1: is not JSON", "the download is removed"]),
    ],
)
@pytest.mark.parametrize(
    "command", ["data.prepare vicuna", "evaluate.py student --data vicuna"], ids=str.split
)
def test_wrong_answers_of_the_hub_for_a_data_set(refused, server, answer, parts, command):
    server.answers["/datasets/MiniLLM/Vicuna/resolve/main/valid.jsonl"] = answer
    has(refused(command), "valid.jsonl", *parts)


@pytest.mark.parametrize(
    "command, file",
    [
        ("data.prepare sinst", "11_/valid.jsonl"),
        ("train.py --student student", "dolly/resolve/main/raw.jsonl"),
    ],
)
def test_a_data_set_without_a_network(refused, command, file):
    has(refused(command), file, "download failed 3 times", "check the network")


# ---- where results are written -----------------------------------------------------------------

WRITERS = {
    "train": SFT,
    "train, before the stages": "train.py --teacher teacher --student student --data data",
    "evaluate": "evaluate.py student --data data",
    "cost": "evaluate.py sft-student-s10 --cost",
    "exposure": "exposure_bias.py --teacher teacher --students student --data data",
}
NOT_WRITABLE = {
    "a file": "corpus.jsonl",
    "below a file": "corpus.jsonl/x/y",
    "a dangling link": "bad/link",
    "below a dangling link": "bad/link/x",
    "a link to itself": "bad/loop",
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("what", NOT_WRITABLE)
def test_an_impossible_output_directory_is_reported_at_once(
    refused, bad, monkeypatch, writer, what
):
    dangling(bad / "link")
    loop(bad / "loop")
    monkeypatch.setattr(
        "data.models.sampling.sample", lambda *_, **__: pytest.fail("sampling has started")
    )
    out = NOT_WRITABLE[what]
    line = refused(WRITERS[writer], "--out", out)
    has(line, f"--out {out}: ", "is not a writable directory", "choose another")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("writer", WRITERS)
def test_an_output_directory_without_permission(refused, bad, writer):
    (bad / "mine").mkdir(mode=0o555)
    line = refused(WRITERS[writer], "--out", "bad/mine/out")
    has(line, "--out bad/mine/out", "is not a writable directory", "choose another")


def test_an_output_directory_without_permission_for_root_too(refused, bad, monkeypatch):
    """The same with the system's answer replaced, since root has every permission."""
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    line = refused(WRITERS["evaluate"], "--out", "bad/mine/out")
    has(line, "--out bad/mine/out", "is not a writable directory", "choose another")


SMALL = "--steps 2 --samples 1 --out out"
# The command, and what its error line names
FULL = {
    "evaluate": ("evaluate.py student --data data --seeds 10 --max-new 2 --out out", "out"),
    "cost": ("evaluate.py sft-student-s10 --cost --out out", "out"),
    "prepare": ("data.prepare vicuna --source bad", "test.jsonl"),
    "exposure": (f"{WRITERS['exposure']} {SMALL}", "out"),
    "train": (SFT, "out"),
}


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def file_size_limit(size):
    """Limits the size of files, as a quota does. Not for longer than the block: what pytest prints
    may go to a file, too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("command, name", FULL.values(), ids=FULL)
def test_a_full_disk(refused, bad, monkeypatch, command, name):
    if command.startswith("data.prepare"):
        (bad / "train.jsonl").unlink()  # as in `put`
    monkeypatch.setattr(files.os, "fsync", full)
    has(refused(command), "No space left on device", name)


@pytest.mark.parametrize("command, name", FULL.values(), ids=FULL)
def test_a_file_that_the_system_does_not_let_grow(refused, bad, command, name):
    if command.startswith("data.prepare"):
        (bad / "train.jsonl").unlink()  # as in `put`
    with file_size_limit(0):
        line = refused(command)
    has(line, "File too large", name)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["a directory", "a pipe"])
def test_an_impossible_file_of_results(refused, bad, make):
    """A pipe is not replaced by a file."""
    make(bad / "table2.md")
    has(refused("evaluate.py sft-student-s10 --cost --out bad"), "bad/table2.md")


@pytest.mark.parametrize("limit, name", [(1000, "model.safetensors"), (100, "config.json")])
def test_a_checkpoint_that_does_not_fit_on_the_disk(tmp_path, monkeypatch, limit, name):
    if name == "config.json":
        monkeypatch.setattr("data.models.checkpoint.save_tensors", lambda *_: None)
    with file_size_limit(limit), pytest.raises((OSError, InputError), match=name):
        save(tiny_model(), tmp_path)
    assert snapshot(tmp_path) == {}


def test_a_download_on_a_full_disk_leaves_no_partial_file(server, tmp_path, monkeypatch):
    server.answers["/x"] = b"content"
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*x"):
        download(f"{server.url}/x", tmp_path / "d" / "x")
    assert list((tmp_path / "d").iterdir()) == []


def test_an_existing_file_survives_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomic(path, "old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*x'"):
        write_atomic(path, "new")
    assert snapshot(tmp_path).keys() == {str(path)} and path.read_text() == "old"


# ---- the programs as such ----------------------------------------------------------------------

BY_NAME = [
    (f"{SFT} --lr 0", "--lr|must be above 0"),
    ("train.py --method sft --student student --data bad", "bad/train.jsonl, line 2|is not JSON"),
    ("sample.py broken --instruction a", "broken/pytorch_model.bin|fetch it again"),
    (f"{SCORE} student", "without models"),
    (
        "exposure_bias.py --teacher other --students student --data data",
        "have different tokenizers",
    ),
    ("data.prepare vicuna --source nowhere", "nowhere: has no valid.jsonl"),
]


@pytest.mark.parametrize("command, parts", BY_NAME)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package")
def test_a_program_ends_with_status_2_and_one_line(
    world, bad, broken, tmp_path, monkeypatch, capsys, command, parts
):
    """Each program as Python runs it by name."""
    (bad / "train.jsonl").write_bytes(GOOD + GOOD[:30])
    (broken / "model.safetensors").unlink()
    torch.save({"wte.weight": EXECUTED}, broken / "pytorch_model.bin")
    before = snapshot(world, tmp_path)
    program, *options = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [program, *options])
    with pytest.raises(SystemExit) as exit:
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")
    has(error_line(exit.value.code, capsys.readouterr().err), *parts.split("|"))
    assert snapshot(world, tmp_path) == before and not Path("executed").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_standard_output_on_a_full_disk(bad):
    """In a process of its own: Python must not complain again when it exits."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    program, *options = shlex.split(SCORE)
    with open("/dev/full", "w") as disk:
        process = subprocess.run(
            [sys.executable, ROOT / program, *options],
            env=environment,
            stdout=disk,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    has(error_line(process.returncode, process.stderr), "No space left on device")


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root to mount a file system"
)
def test_a_disk_that_is_really_full(bad):
    """A file system of eight kilobytes, in a mount namespace that ends with the process."""
    small = bad.parent / "small disk"
    small.mkdir()
    program, *options = shlex.split(f"evaluate.py sft-student-s10 --cost --out '{small}'")
    command = [sys.executable, str(ROOT / program), *options]
    script = (
        f'mount -t tmpfs -o size=8k none "{small}" && head -c 8192 /dev/zero > "{small}/other"; '
        f'"$@"; s=$?; ls -A "{small}"; exit $s'
    )
    process = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "unshare:" in process.stderr or "mount:" in process.stderr:
        pytest.skip("file systems can't be mounted here")
    has(error_line(process.returncode, process.stderr), "No space left on device", "table2")
    assert process.stdout.splitlines()[-1] == "other"


def test_of_two_ranks_one_prints_the_line(bad, tmp_path, monkeypatch):
    (bad / "train.jsonl").write_bytes(GOOD + GOOD[:30])
    before = snapshot(bad.parent)

    def end_rank(seconds):
        """What torchrun does while rank 1 delays its line."""
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(command_line, "time", SimpleNamespace(sleep=end_rank))
    command = "train.py --method sft --student student --data bad"
    processes = fork_ranks(lambda: train.main(command.split()[1:]), 2, tmp_path / "log")
    assert wait_for(processes, 60) == [2, -signal.SIGTERM]
    output = (tmp_path / "log0").read_text()
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    has(line, "bad/train.jsonl, line 2: is not JSON")
    assert "Traceback" not in output and (tmp_path / "log1").read_text() == ""
    assert snapshot(bad.parent) == before
