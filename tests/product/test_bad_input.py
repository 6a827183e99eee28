"""Everything that a user can get wrong. Each case ends with one line that names the problem and the
fix, and exit status 2: no traceback, no training, and every file is still there unchanged."""

import ast
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
import sys
from contextlib import suppress
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
    hf_config,
    soft_prompt,
    stored_weights,
    talker_config,
    tiny_tokenizer,
    wait_for,
    write_checkpoint,
    write_rows,
)
from safetensors.torch import save_file
from tiktoken_ext.openai_public import r50k_pat_str

import evaluate
import exposure_bias
import train
from data.models import sampling
from data.models.checkpoint import FIXED
from data.models.tokenizer import END_OF_TEXT, tokenizer_files
from data.process import command_line, files
from data.process.command_line import run_command_line
from data.runs.methods import METHODS, options_of_methods
from data.runs.options import parse_shape
from data.runs.runs import RUN_FORMAT
from data.sets import prepare
from data.sets.rows import MAX_SPACES

PROGRAMS = {
    "train.py": train,
    "evaluate.py": evaluate,
    "sample.py": sampling,
    "exposure_bias.py": exposure_bias,
    "data.prepare": prepare,
}
CONFIG = replace(talker_config(), n_positions=400)
WEIGHTS = stored_weights(CONFIG)
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
SAMPLE = "sample.py MODEL --instruction Write."
EXPOSURE = "exposure_bias.py --teacher teacher --students student --data"
SCORE = "evaluate.py --score bad/score.jsonl --references bad/test.jsonl"
# Commands that read the model in the place of MODEL, and then those that read it after a stage
READERS = {
    "student": "train.py --method sft --student MODEL --data data",
    "teacher": "train.py --teacher MODEL --student student --data data",
    "sft-teacher": "train.py --sft-teacher MODEL --init student --data data",
    "init": "train.py --sft-teacher teacher --init MODEL --data data",
    "evaluate": "evaluate.py MODEL --data data --rows 1 --out out",
    "exposure teacher": "exposure_bias.py --teacher MODEL --students student --data data",
    "exposure student": "exposure_bias.py --teacher teacher --students MODEL --data data "
    "--rows 1 --steps 2 --samples 1",
}
LATER_READERS = {
    "student, after the teacher": "train.py --teacher teacher --student MODEL --data data",
    "init, after the teacher": "train.py --teacher teacher --init MODEL --data data",
}


# ---- the world: models, data, a finished run ---------------------------------------------------


def make_tokenizer(name, tokens):
    ranks = {token: number for number, token in enumerate(tokens)}
    special_tokens = {END_OF_TEXT: len(tokens)}
    return tiktoken.Encoding(
        name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special_tokens
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizer()
    tokens = [tokenizer.decode_single_token_bytes(n) for n in range(tokenizer.n_vocab - 1)]
    small = make_tokenizer("small", tokens[:256])
    tokens.insert(256, tokens.pop(tokens.index(b" i")))
    other = make_tokenizer("other", tokens)  # as many tokens, in another order
    write_checkpoint(directory / "student", CONFIG, tokenizer)
    write_checkpoint(directory / "teacher", replace(CONFIG, n_embd=16), tokenizer)
    write_checkpoint(directory / "other", CONFIG, other)
    write_checkpoint(directory / "small", replace(CONFIG, vocab_size=257), small)
    for name in ("train", "dev", "test"):
        rows = [ROW | {"instruction": f"Write word {n}."} for n in range(4)]
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
    """The world, and parts of it for a test to break: data in `bad/`, a model in `broken/`, a run
    in `run/`. No network, no other models or data, no training, and no plots, which take long."""
    home = tmp_path / "here"
    for name, source in {"bad": "data", "broken": "student", "run": "sft-student-s10"}.items():
        shutil.copytree(world / source, home / name, copy_function=os.symlink)
    for path in world.iterdir():
        (home / path.name).symlink_to(path)
    write_rows(home / "bad" / "score.jsonl", [{"text": "a task"}] * 4)
    (home / "bad" / "run.json").symlink_to(world / "sft-student-s10" / "run.json")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr("data.models.hub.time.sleep", lambda seconds: None)
    monkeypatch.setattr(prepare, "DATA_DIR", tmp_path / "home")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tiny_tokenizer())
    monkeypatch.setattr("data.runs.report.save_plot", lambda path, draw: "no plot")
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("training has started"))


def put(path, content):
    """Replace a file by bytes, tensors, or what a function makes at its path."""
    path = Path(path)
    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        save_file(content, path)
    else:
        content(path)


def change_json(path, **values):
    """Set fields of a JSON file, or remove those given as `...`."""
    fields = json.loads(Path(path).read_text()) | values
    fields = {name: value for name, value in fields.items() if value is not ...}
    put(path, json.dumps(fields).encode())


def missing(path):
    pass


def dangling(path):
    path.symlink_to("nowhere")


def loop(path):
    path.symlink_to(path.name)


def run_program(command, *options, **placeholders):
    """Run a command line in this process, with more options and with placeholders filled in."""
    arguments = [placeholders.get(word, word) for word in shlex.split(command)]
    program, *arguments = [str(argument) for argument in [*arguments, *options]]
    run_command_line(lambda: PROGRAMS[program].main(arguments))


@pytest.fixture
def refused(world, tmp_path, capsys):
    """A function that runs a command which must fail, with all these parts in its error line. It
    returns that line, after the checks that all cases share."""

    def run(command, *parts, options=(), **placeholders):
        before = snapshot(world, tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_program(command, *options, **placeholders)
        assert snapshot(world, tmp_path) == before
        return check_line(exit.value.code, capsys.readouterr().err, *parts)

    return run


def snapshot(*directories):
    """The files below directories, {path: (size, time of the last change)}."""
    found = {}
    for parent, below, names in (entry for top in directories for entry in os.walk(top)):
        for path in (os.path.join(parent, name) for name in [*below, *names]):
            if os.path.islink(path):
                found[path] = os.readlink(path)
            elif os.path.isfile(path):
                status = os.stat(path)
                found[path] = status.st_size, status.st_mtime_ns
            elif not os.path.isdir(path):
                found[path] = "not a regular file"
    return found


def check_line(status, stderr, *parts):
    """Check and return the only error line on standard error, with each of some parts; "|"
    separates parts, too. Before the line, data.prepare prints its usage."""
    assert status == 2
    *usage, line = after_device(stderr).splitlines()
    assert re.match(r"error: \S|[\w. -]+: error: \S", line) and "Traceback" not in stderr
    assert all(other.startswith(("usage: ", " ")) for other in usage)
    for part in (part for text in parts for part in str(text).split("|")):
        assert part in line, f"{part!r} is not in {line!r}"
    return line


# ---- numbers -----------------------------------------------------------------------------------

# The programs that have some options, and the lowest and the highest number; floats for options
# that take them. ABOVE: any number above 0.
ABOVE = 1e-30
NUMBERS = [
    ("train.py sample.py exposure_bias.py", "--seed", 0, 2**32),
    ("train.py", "--epochs --steps --global-batch --save-every", 1, 10**9),
    ("train.py", "--micro-batch-tokens --train-rows --dev-rows", 1, 10**9),
    ("train.py", "--prompt-length", 1, 512),
    ("train.py", "--keep", 0, 10**6),
    ("train.py", "--reg", 0.0, 1e6),
    ("train.py", "--dropout", 0.0, 0.99),
    ("train.py", "--lr --prompt-lr", ABOVE, 10),
    ("evaluate.py", "--seeds", 0, 2**32),
    ("evaluate.py", "--rows", 1, 10**9),
    ("evaluate.py", "--batch --samples", 1, 10**6),
    ("exposure_bias.py", "--steps", 1, 256),
    ("exposure_bias.py", "--rows --samples --batch --micro-batch-tokens", 1, 10**6),
    ("evaluate.py sample.py", "--no-repeat-ngram", 0, 100),
    ("evaluate.py sample.py", "--max-new", 1, 100_000),
    ("evaluate.py sample.py", "--top-k", 0, 10**6),
    ("evaluate.py sample.py", "--temperature", 1e-4, 100),
    ("evaluate.py sample.py", "--top-p", 1e-6, 1),
]


@pytest.mark.parametrize("programs, options, low, high", NUMBERS)
def test_numbers_are_accepted_up_to_their_limits_and_no_others(
    refused, programs, options, low, high
):
    step = 1 if isinstance(low, int) else 1e-3
    too_low = 0 if low == ABOVE else low - step
    for program in programs.split():
        for option in options.split():
            for text in (too_low, high + step, "", "1.5" if step == 1 else NAN):
                refused(NOWHERE[program], option, options=(option, text))
            for number in (low, high):
                refused(NOWHERE[program], "nowhere", options=(option, number))


@pytest.mark.parametrize("program", NOWHERE)
def test_every_option_that_takes_a_number_is_tested(monkeypatch, program):
    def compare(parser, argv):
        numbers = [a for a in parser._actions if a.type and "number" in a.type.__name__]
        names = " ".join(options for programs, options, *_ in NUMBERS if program in programs)
        found = {action.option_strings[0] for action in numbers}
        assert found == set(names.split()), "NUMBERS must have each option with its limits"
        raise SystemExit

    monkeypatch.setattr(command_line.ArgumentParser, "parse_args", compare)
    with pytest.raises(SystemExit):
        PROGRAMS[program].main([])


# ---- options -----------------------------------------------------------------------------------

OPTIONS = {
    "train.py --lr '11\n'": "--lr|must be above 0 and at most 10, not '11\\n'",
    "train.py --keep -1": "--keep|must be at least 0 and at most 1000000, not '-1'",
    "sample.py x --temperature 0": "--temperature|must be at least 0.0001|--greedy",
    "sample.py x --top-k many": "--top-k|whole number|many",
    "train.py --method sgd": "--method|invalid choice: 'sgd'|promptkd",
    "train.py --method": "--method|expected one argument",
    "train.py --prompt-init words": "--prompt-init|'words'|random",
    "train.py --learning-rate 1": "unrecognized arguments: --learning-rate",
    "train.py --prompt x": "unrecognized arguments: --prompt x",
    "train.py gpt2": "unrecognized arguments: gpt2",
    "train.py --shape 6x256x8": "--shape has no effect|leave it out",
    "train.py --method pretrain": "needs --shape|6x256x8",
    "train.py --method pretrain --shape 2x64x4 --student student": "--student has no effect",
    "train.py --method pretrain --shape 2x64x4 --teacher teacher": "--teacher has no effect",
    "train.py --method sft --teacher teacher": "--teacher has no effect|leave it out",
    "train.py --method sft --sft-teacher teacher": "--sft-teacher has no effect|leave it out",
    "train.py --teacher teacher --sft-teacher teacher": "--teacher has no effect|leave it out",
    "train.py --init student --student student": "--student has no effect|leave it out",
    "train.py --method kd --init student": "--init has no effect|leave it out",
    "train.py --method sft --reg 0": "--reg has no effect|leave it out",
    "train.py --epochs 7 --steps 2": "--epochs has no effect with --steps; leave it out",
    "train.py --reg 0 --reg-kl forward": "--reg-kl has no effect with --reg 0; leave it out",
    "train.py --prompt-text a --prompt-init random --prompt-length 2": "--prompt-text has no effect"
    " with --prompt-init random --prompt-length; leave it out",
    "evaluate.py": "name at least one run or model|evaluate.py gpt2",
    "evaluate.py --score a.jsonl": "--score RESPONSES.jsonl goes with --references TEST.jsonl",
    "evaluate.py --references a.jsonl": "--score RESPONSES.jsonl goes with --references TEST.jsonl",
    "evaluate.py --score '' --references a.jsonl": "--score RESPONSES.jsonl goes with",
    "evaluate.py student --score a.jsonl --references b.jsonl": "without models",
    "evaluate.py student --by a b c": "--by a: no run named has this field",
    "evaluate.py student --data data --by reg_weight": "--by reg_weight|there are no runs",
    "evaluate.py sft-student-s10 --data data --by size": "--by size|best_step|reg_weight",
    "evaluate.py student --seeds 10 ten": "--seeds|'ten'",
    "evaluate.py --cost data": "none of the directories has a run.json|name runs",
    "evaluate.py data --data data": "none of the directories has a model|name a run",
    "evaluate.py ''": "model ''|no such directory|hub id owner/name",
    "evaluate.py student --data data --max-new 390": "data/test.jsonl, line 1|exceed the 400 "
    "positions of student; lower --max-new to 332, or use a model with more",
    "sample.py student": "give either --instruction TEXT|--file FILE",
    "sample.py student --instruction a --file data/test.jsonl": "give either --instruction TEXT",
    "sample.py student --file data/test.jsonl --input a": "--instruction|--input, or --file",
    "sample.py student --file ''": "is a directory|not a file",
    "sample.py student --instruction a --max-new 100000": "--instruction has|the 400 positions of",
    "sample.py student --instruction a --prompt nowhere": "nowhere: no such file|best/prompt.",
    "exposure_bias.py": "required: --teacher",
    "exposure_bias.py --teacher teacher": "name --students RUN|MODEL|--along RUN",
    "exposure_bias.py --teacher teacher --along student --data data": "student/run.json|--keep 20",
    "exposure_bias.py --teacher student --students student --data data --steps 2": "leave it out",
    "train.py --student student": "resolve/main/raw.jsonl|download failed 3 times|the network",
    "data.prepare sinst": "11_/valid.jsonl|download failed 3 times|check the network",
    "data.prepare": "required: SET",
    "data.prepare demo": "'demo'|choose from|dolly",
    "data.prepare dolly --source corpus.jsonl": "corpus.jsonl|has neither raw.jsonl|name their",
    "data.prepare vicuna --source ''": "has no valid.jsonl|name their folder",
    "data.prepare uinst --source student": "student|has no 11_/valid.jsonl|name their folder",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_options_that_are_wrong_or_exclude_each_other(refused, command):
    refused(command, OPTIONS[command])


@pytest.mark.parametrize("method", METHODS)
def test_an_option_of_other_methods_has_no_effect(refused, method):
    for option in options_of_methods():
        if option not in METHODS[method].options:
            value = option.choices[0] if option.choices else 1
            parts = f"{option.flag} has no effect here (method {method})|leave it out"
            refused(f"train.py --method {method} {option.flag} {value}", parts)


def test_an_empty_option_is_refused(refused):
    for name in "student teacher sft-teacher init data out shape lm-data prompt-text".split():
        refused(f"train.py --{name} ''", f"--{name} is empty|leave it out")


def test_malformed_shapes(refused):
    shapes = "6 6x256 6x256x8x1 axbxc 0x256x8 6x0x8 6x256x0 6x-256x8 6x250x8 6X256X8 6.0x256x8"
    shapes = [*shapes.split(), "999999999x4x1", "1001x4x1", "1x28868x1"]  # the last: just too large
    for shape in [*shapes, "9" * 5000 + "x4x1", "6x256x8\n\n7", "\x00"]:
        refused("train.py --method pretrain --data data --shape", "6x256x8", options=(shape,))
    for sizes in ((1000, 4, 1), (1, 28867, 1), (1, 1, 1)):
        config = parse_shape("x".join(map(str, sizes)))
        assert (config.n_layer, config.n_embd, config.n_head) == sizes


def test_text_that_is_not_utf_8_is_accepted_as_a_prompt_and_as_an_instruction(refused, capsys):
    """An argument that is not UTF-8 reaches Python as lone surrogates."""
    text = os.fsdecode(b"caf\xe9")
    refused(NOWHERE["train.py"], "nowhere", options=("--prompt-text", text))
    with pytest.raises(pytest.fail.Exception, match="training has started"):
        run_program(READERS["init"], "--prompt-text", text, "--out", "out", MODEL="student")
    capsys.readouterr()
    run_program("sample.py student --max-new 2 --instruction", text)
    assert after_device(capsys.readouterr().err) == ""


# ---- JSON lines --------------------------------------------------------------------------------

MINILLM = "train.py --method minillm --sft-teacher teacher --init student --data data --lm-data"
DOLLY = "data.prepare dolly --source bad"
# The data file that is wrong, and the command that reads it
PLACES = {
    "sample": ("bad/test.jsonl", "sample.py student --file bad/test.jsonl"),
    "train": ("bad/train.jsonl", "train.py --method sft --student student --data bad"),
    "dev": ("bad/dev.jsonl", "train.py --method sft --student student --data bad"),
    "dev, before the teacher is sampled": (
        "bad/dev.jsonl",
        "train.py --method seqkd --sft-teacher teacher --student student --data bad",
    ),
    "evaluate": ("bad/test.jsonl", "evaluate.py student --data bad"),
    "exposure": ("bad/test.jsonl", f"{EXPOSURE} bad"),
    "score": ("bad/score.jsonl", SCORE),
    "references": ("bad/test.jsonl", SCORE),
    "corpus": ("bad/corpus.jsonl", f"{MINILLM} bad/corpus.jsonl"),
    "corpus, before the stages": (
        "bad/corpus.jsonl",
        "train.py --method minillm --teacher teacher --student student --data data "
        "--lm-data bad/corpus.jsonl",
    ),
    "pretrain": ("bad/pretrain.jsonl", "train.py --method pretrain --shape 1x8x1 --data bad"),
    "cost": ("bad/metrics.jsonl", "evaluate.py --cost bad --out bad/out"),
    "prepare": ("bad/valid.jsonl", "data.prepare vicuna --source bad"),
    "prepare dolly": ("bad/raw.jsonl", DOLLY),
    "prepare raw dolly": ("bad/databricks-dolly-15k.jsonl", DOLLY),
}


def put_in(place, content):
    """Write the data file of a place. Returns its path and the command that reads it."""
    path, command = PLACES[place]
    if place.startswith("prepare"):
        # With train.jsonl, the directory would be a data set that is prepared already.
        Path("bad/train.jsonl").unlink(missing_ok=True)
    if place == "prepare dolly":
        shutil.copy("bad/test.jsonl", "bad/valid.jsonl")
    put(path, content)
    return path, command


def as_line(row):
    return json.dumps(row).encode() + b"\n"


GOOD = as_line(ROW | {"text": "a", "context": "", "response": ""})
NOT_JSON = "is not JSON|expected one object per line"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
# What the line says after the path, and contents of which it says so
LINES = {
    "has no rows": [b"", b"\n \r\n\n"],
    "is UTF-16|UTF-8|convert": [GOOD.decode().encode("utf-16")],
    "is compressed|gzip": [gzip.compress(GOOD)],
    "is a git-lfs pointer|git lfs pull": [LFS_POINTER],
    ", line 2: |UTF-8|convert": [GOOD + GOOD.replace(b"word", b"caf\xe9")],
    ", line 1: |is not a JSON object|expected one object per line": [b"[1, 2]\n", b"NaN\n"],
    ", line 4: |is not a JSON object": [b"\n" + GOOD + b" \r\n17\n" + GOOD],
    f", line 1: |{NOT_JSON}": [
        b"<!DOCTYPE html>\n<html></html>\n",
        GOOD.strip() + GOOD,
        b'{"a": ' + b"9" * 5000 + b"}\n",
        b'{"instruction": "' + b"a" * 10**7,
    ],
    f", line 2: |{NOT_JSON}": [
        GOOD + GOOD[:30],
        GOOD + bytes(100) + b"\n",
        GOOD + b"{'instruction': 'a'}\n",
        GOOD + b'{"a": ' + b"[" * 200_000 + b"\n",
        GOOD + b'{"a": "tab\there"}\n',
        GOOD + GOOD.replace(b"word", "é".encode())[:-70],
    ],
    ": no such file": [missing, dangling, loop, os.mkfifo],
    ": is a directory": [Path.mkdir],
}


@pytest.mark.parametrize("words", LINES)
def test_malformed_json_lines(refused, words):
    for content in LINES[words]:
        path, command = put_in("sample", content)
        assert len(refused(command, path, words)) < 300


@pytest.mark.parametrize("place", PLACES)
def test_every_command_names_file_and_line(refused, place):
    path, command = put_in(place, GOOD + GOOD[:30])
    refused(command, f"{path}, line 2: |{NOT_JSON}")
    if place != "cost":  # a run that was stopped before its first step has an empty metrics.jsonl
        path, command = put_in(place, b"")
        refused(command, f"{path}: has no rows")
    if not place.startswith(("pre", "cost")):
        path, command = put_in(place, missing)
        refused(command, f"{path}: no such file")


# The places whose texts are tokenized, each with one of their fields
TOKENIZED = {"sample": "instruction", "train": "input", "dev": "output", "evaluate": "input"}
TOKENIZED |= {"exposure": "instruction", "prepare": "output", "pretrain": "text"}
TOKENIZED |= {"corpus": "text", "corpus, before the stages": "text"}


@pytest.mark.parametrize("place", TOKENIZED)
def test_more_white_space_in_a_row_than_the_tokenizer_can_take(refused, place):
    for space in (" ", "\n \u3000\t") if place == "sample" else " ":
        row = json.loads(GOOD) | {TOKENIZED[place]: f"a{space * (10**6 // len(space))}b"}
        path, command = put_in(place, GOOD + as_line(row))
        assert len(refused(command, f"{path}, line 2: has more than 900,000|shorten")) < 300


def test_white_space_in_plain_text_and_as_much_as_the_tokenizer_can_take(refused):
    spaces = b" " * 10**6
    put("bad/corpus.txt", spaces + b"\n\none\n\ntwo\n" + spaces + b"three\n")
    refused(f"{MINILLM} bad/corpus.txt", "corpus.txt, text from line 5 on: has more than 900,000")
    tiny_tokenizer().encode_ordinary(f"a{' ' * (MAX_SPACES + 10)}b")  # with the template's


# A field, its wrong values (... if it is absent), and the places that read it
FIELDS = {
    "instruction": ([..., None, 5, ["a"], {"a": 1}, True, NAN], "train, sample"),
    "input": ([5, ["a"], {"a": 1}, False], "train, sample"),
    "output": ([..., None, 5, [], [None], ["a", 5]], "train, dev, evaluate, prepare, references"),
    "text": ([..., None, 5, ["a"]], "score, corpus, pretrain"),
    "response": ([..., 5], "prepare raw dolly"),
    "context": ([..., 5], "prepare raw dolly"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_wrong_type(refused, field):
    values, places = FIELDS[field]
    for place in places.split(", "):
        for value in values:
            row = json.loads(GOOD) | {field: value}
            row = {name: v for name, v in row.items() if v is not ...}
            path, command = put_in(place, GOOD + as_line(row))
            refused(command, f"{path}, line 2: |'{field}'|must be")


def test_rows_that_do_not_match_or_are_too_long(refused):
    for count in (1, 3, 5):
        _, command = put_in("score", GOOD * count)
        refused(command, f"{count} responses for 4 rows of references|row by row")
    long_row = as_line(ROW | {"instruction": "a task that describes " * 100})
    for place, fix in {"dev": "give shorter ones", "train": "give more or shorter rows"}.items():
        path, command = put_in(place, long_row)
        refused(command, f"{place}.jsonl|{fix}")


def test_a_corpus_that_is_not_text_or_too_short(refused, tmp_path):
    model = write_checkpoint(tmp_path / "m", replace(CONFIG, n_positions=512), tiny_tokenizer())
    command = f"train.py --method minillm --sft-teacher {model} --init {model} --data data"
    path, array = Path("bad/corpus.txt"), json.dumps([{"text": "a task"}] * 9, indent=2).encode()
    contents = {b"": "longer", b"\n\n \n": "longer", b"a task": "longer", b"\xff\xfe": "UTF-8"}
    for content, part in (contents | {array: f", line 1: |{NOT_JSON}"}).items():
        put(path, content)
        refused(f"{command} --lm-data {path}", path, part)
    put(path, missing)
    refused(f"{MINILLM} {path}", path, "no such file")


# ---- checkpoints, tokenizers, soft prompts -----------------------------------------------------


def config(**values):
    return json.dumps(hf_config(CONFIG) | values).encode()


def safetensors(header, data=b"\0" * 8, length=None):
    """A safetensors file with this header and, if given, this wrong length of it."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def weights(name, value):
    """The model's weights, of which one is another, or is added."""
    return WEIGHTS | {name: value.contiguous()}


def last_value(name, value):
    tensor = WEIGHTS[name].clone()
    tensor.view(-1)[-1] = value
    return weights(name, tensor)


def pickled(content, n_cut=0, **kwargs):
    """A function that writes what torch.save makes of this, without the last bytes."""

    def write(path):
        torch.save(content, path, **kwargs)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) - n_cut])

    return write


class Executes:
    """A pickle that makes a directory in the current one when it is read."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def vocab(ids):
    return json.dumps(ids).encode()


def merges(*lines):
    return "\n".join([*lines, ""]).encode()


CODE = {"wte.weight": Executes()}
HUGE = torch.zeros(1, dtype=torch.half).expand(10**6, 10**6)  # stores one number and has 10^12
ATTENTION, GAIN, HEAD = "h.1.attn.c_attn.weight", "h.0.ln_1.weight", "lm_head.weight"
WITHOUT_ATTENTION = {name: tensor for name, tensor in WEIGHTS.items() if name != ATTENTION}
VOCAB_TEXT, MERGES_TEXT = tokenizer_files(tiny_tokenizer())
IDS, (VERSION, *PAIRS) = json.loads(VOCAB_TEXT), MERGES_TEXT.splitlines()
N_TOKENS = CONFIG.vocab_size
HEADER = b'{"wte.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
NO_PROMPT = "no finite floating-point tensor 'prompt'|PromptKD run"
TOKENIZER = "broken|vocab.json|merges.txt|again"
SIZES = ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions")
WRONG_SIZES = (None, 0, -1, 2.0, "2", True, [2], 10**6 + 1, 10**30, NAN, INF)
# {file: {what the line says: contents of the file, of which it says so}}. The line names the file,
# unless another is given.
WRONG_FILES = {
    "broken/config.json": {
        "fetch it again": [b"", b'{"n_layer": 2, ', b"[1]", b"null", b'{"a": "\xff"}', Path.mkdir],
        "can't be read|fetch it again": [b"[" * 200_000, b'{"n_layer": ' + b"9" * 5000 + b"}"],
        "no such file|a checkpoint directory has config.json": [missing, dangling, loop],
        **{
            f"'{name}'|must be an integer": [config(**{name: value}) for value in WRONG_SIZES]
            for name in SIZES
        },
        **{
            f"'{name}'|GPT-2 has {value!r}": [
                config(**{name: wrong}) for wrong in (not value, "other", None, NAN)
            ]
            for name, value in FIXED.items()
        },
        "'n_inner'|GPT-2 has 128": [config(n_inner=7), config(n_inner="128")],
        "'resid_pdrop'|must be a rate from 0 to below 1": [
            config(resid_pdrop=value) for value in (1, -0.1, "0.1", None, [0.1], NAN)
        ],
        "can't be divided": [config(n_head=5)],
        "broken/model.safetensors: |'h.2.ln_1.weight' is missing": [config(n_layer=3)],
        "broken/model.safetensors: |the model's own config.json": [config(n_layer=1)],
        "broken/model.safetensors: |does not fit config.json": [
            *(config(n_embd=64), config(n_embd=10**6), config(n_positions=10**6)),
            config(vocab_size=N_TOKENS + 1),
        ],
        f"broken: |tokens and its tokenizer {N_TOKENS}|put the model's vocab.json and merges.txt": [
            *(config(vocab_size=N_TOKENS - 1), config(vocab_size=10**6)),
        ],
    },
    "broken/model.safetensors": {
        "no such file|a checkpoint directory has config.json": [missing, dangling, Path.mkdir],
        "`git lfs pull`": [LFS_POINTER],
        "truncated, damaged|fetch it again": [
            *(b"", b"\0" * 7, b"<!DOCTYPE html><html>not found</html>"),
            safetensors(HEADER, length=10**6),
            safetensors(HEADER, length=2**63),
            safetensors(HEADER, b"\0" * 7),
            safetensors(b"{]"),
            safetensors(b'{"a":' * 100_000),
            safetensors(HEADER.replace(b"F32", b"F33")),
            safetensors(HEADER.replace(b"[2]", b"[1099511627776, 1099511627776]")),
        ],
        f"{ATTENTION}|is missing|fetch the weights again": [WITHOUT_ATTENTION],
        "the model's own config.json": [
            weights("h.2.ln_1.weight", torch.zeros(32)),
            weights("gate.weight", torch.zeros(2, 32)),
        ],
        "score|language model alone": [weights("score.weight", torch.zeros(2, 32))],
        f"{ATTENTION}|not finite|damaged or its training diverged": [last_value(ATTENTION, NAN)],
        f"{GAIN}|not finite": [last_value(GAIN, INF)],
        f"{ATTENTION}|(96, 32)|does not fit config.json": [
            weights(ATTENTION, WEIGHTS[ATTENTION].T)
        ],
        f"{ATTENTION}|(0,)|does not fit": [weights(ATTENTION, torch.zeros(0))],
        f"{GAIN}|(1, 32)|does not fit": [weights(GAIN, torch.zeros(1, 32))],
        f"{GAIN}|()|does not fit": [weights(GAIN, torch.tensor(1.0))],
        f"{GAIN}|int64|weights must be floating-point": [weights(GAIN, WEIGHTS[GAIN].long())],
        f"{GAIN}|bool|weights must be floating-point": [weights(GAIN, WEIGHTS[GAIN].bool())],
        f"{GAIN}|complex64|weights must be floating": [weights(GAIN, WEIGHTS[GAIN].cfloat())],
        f"{HEAD}|differs from 'wte.weight'": [weights(HEAD, torch.zeros(N_TOKENS, 32))],
        f"{HEAD}|does not fit config.json": [weights(HEAD, torch.zeros(3, 32))],
    },
    "broken/pytorch_model.bin": {
        "truncated, damaged|fetch it again": [
            *(b"garbage", b"", pickle.dumps(Executes()), pickled(WEIGHTS, n_cut=1000)),
            pickled(CODE),
            pickled(CODE, _use_new_zipfile_serialization=False),
            pickled(torch.nn.Linear(2, 2)),
        ],
        "weights by name": [
            pickled([torch.zeros(1)]),
            pickled({"wte.weight": 1.0}),
            pickled({1: torch.zeros(1)}),
            pickled({"model": WEIGHTS}),
        ],
        f"{ATTENTION}|is missing|fetch the weights again": [pickled(WITHOUT_ATTENTION)],
        "wte.weight|does not fit config.json": [pickled(WEIGHTS | {"wte.weight": HUGE})],
        f"{HEAD}|does not fit config.json": [pickled(WEIGHTS | {HEAD: HUGE})],
    },
    "broken/vocab.json": {
        TOKENIZER: [
            *(b'{"!": 0, ', b"", vocab(list(IDS)), b"[" * 200_000, Path.mkdir, dangling),
            vocab({token: n for token, n in IDS.items() if n != 100}),
            vocab({token: n for token, n in IDS.items() if token != END_OF_TEXT}),
            vocab({token: str(n) for token, n in IDS.items()}),
            vocab({token: [n] for token, n in IDS.items()}),
            vocab(IDS | {"more": N_TOKENS}),
            vocab(IDS | {"!": 1}),
            vocab(IDS | {"Ġi": IDS["Ġa"], "Ġa": IDS["Ġi"]}),
            vocab({token: n for token, n in IDS.items() if n < 250} | {"€": 250, END_OF_TEXT: 251}),
            vocab(IDS | {"!": -1}),
        ],
    },
    "broken/merges.txt": {
        TOKENIZER: [
            *(missing, Path.mkdir, b"", b"\xff\xfe", b"<!DOCTYPE html>\n<html></html>\n"),
            merges(VERSION, *PAIRS[:-1]),
            merges(VERSION, *PAIRS, PAIRS[-1]),
            merges(VERSION, *reversed(PAIRS)),
            merges(VERSION, *PAIRS[:3], PAIRS[4], PAIRS[3], *PAIRS[5:]),
            merges(VERSION, *PAIRS[:-1], "a"),
            merges(VERSION, *PAIRS[:-1], "Zq xx"),
        ],
    },
    "bad/prompt.safetensors": {
        "48 wide and the model 32|use the teacher": [{"prompt": soft_prompt(3, 48)}],
        "truncated|PromptKD run": [
            b"",
            pickled({"prompt": soft_prompt(3)}),
            safetensors(HEADER, b""),
        ],
        "no such file|PromptKD run": [missing, dangling],
        "prompt.safetensors/prompt.safetensors: no such file|PromptKD run": [Path.mkdir],
        NO_PROMPT: [
            {"P": soft_prompt(3)},
            {},
            {"prompt": torch.ones(3, 32, dtype=torch.long)},
            {"prompt": torch.ones(3, 32, dtype=torch.complex64)},
            {"prompt": torch.ones(32)},
            {"prompt": torch.ones(1, 3, 32)},
            {"prompt": torch.ones(0, 32)},
            {"prompt": torch.full((3, 32), NAN)},
        ],
    },
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "file, words", [(f, words) for f in WRONG_FILES for words in WRONG_FILES[f]]
)
def test_a_file_of_a_model_that_is_damaged(refused, file, words):
    command = "sample.py broken --instruction Write."
    if file == "bad/prompt.safetensors":
        command = f"sample.py student --instruction Write. --prompt {file}"
    if file == "broken/pytorch_model.bin":
        put("broken/model.safetensors", missing)
    for content in WRONG_FILES[file][words]:
        put(file, content)
        refused(command, "" if words.startswith("broken") else file, words)
        assert not Path("executed").exists()
    if file == "broken/pytorch_model.bin":  # the code would be executed otherwise
        pickled(CODE)(Path("x.bin"))
        torch.load("x.bin", weights_only=False)
        assert Path("executed").is_dir()


@pytest.mark.parametrize("reader", READERS | LATER_READERS)
def test_a_damaged_model_is_found_before_anything_is_trained(refused, reader):
    command = (READERS | LATER_READERS)[reader]
    refused(command, "model 'no/where/x': no such directory", MODEL="no/where/x")
    put("broken/model.safetensors", last_value(GAIN, NAN))
    refused(command, f"broken/model.safetensors|{GAIN}|not finite", MODEL="broken")
    put("broken/merges.txt", b"#version: 0.2\na b c\n")
    refused(command, "broken/vocab.json", MODEL="broken")
    put("broken/config.json", config(n_layer="two"))
    refused(command, "broken/config.json: field 'n_layer'", MODEL="broken")
    put("broken/config.json", missing)
    none = "none of the directories has a model|name a run"
    absent = none if reader == "evaluate" else "broken/config.json: no such file"
    refused(command, absent, MODEL="broken")


def test_a_model_without_a_tokenizer_and_without_a_network(refused, monkeypatch):
    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    for name in ("vocab.json", "merges.txt"):
        put(f"broken/{name}", missing)
    parts = "tokenizer 'gpt2': can't be downloaded|TIKTOKEN_CACHE_DIR"
    refused(SAMPLE, parts, MODEL="broken")


# Commands that compare the tokenizers of TEACHER and the student
DISTILL = "train.py --sft-teacher TEACHER --data data"
TWO_MODELS = [
    f"{DISTILL} --method {name} --{'init' if method.start == 'init' else 'student'} student"
    for name, method in METHODS.items()
    if method.needs_teacher
]
TWO_MODELS += [
    "train.py --method kd --teacher TEACHER --student student --data data",
    "train.py --teacher TEACHER --student student --data data",
    "exposure_bias.py --teacher TEACHER --students student --data data",
    "exposure_bias.py --teacher student --students teacher TEACHER --data data",
]


@pytest.mark.parametrize("command", TWO_MODELS)
def test_teacher_and_student_with_different_tokenizers(refused, command):
    for teacher in ("other", "small"):
        parts = f"{teacher}|student|have different tokenizers|needs one for both"
        refused(command, parts, TEACHER=teacher)


# Commands that need more than 200 positions, and what their messages name
TOO_LONG = {
    "train.py --sft-teacher SHORT --init student": "line 4 needs 348|the stage promptkd-",
    "train.py --teacher teacher --init SHORT": "line 4 needs 324|the stage promptkd-",
    "train.py --teacher teacher --student SHORT": "line 4 needs 324|the stage promptkd-",
    "train.py --teacher SHORT --student student": "dev.jsonl, line 4 needs 324|the stage teacher-",
    "train.py --method gkd --sft-teacher SHORT --init student": "needs 324|the stage gkd-",
    "train.py --method seqkd --sft-teacher SHORT --student student": "324|the stage responses-",
    "train.py --method sft --student SHORT": "dev.jsonl, line 4 needs 324|the stage sft-",
    "train.py --method minillm --sft-teacher teacher --init SHORT --lm-data corpus.jsonl": (
        "a block of corpus.jsonl needs 512; use a model with more"
    ),
    "evaluate.py student SHORT": "line 1 has a request of 69 tokens|lower --max-new to 132, or",
    "exposure_bias.py --teacher teacher --students student SHORT": "lower --steps to 132, or",
    "exposure_bias.py --teacher SHORT --students student": "69 tokens|lower --steps to 132, or",
    "exposure_bias.py --teacher SHORT --along run --steps 140": None,  # l = 50 at most
    "evaluate.py student SHORT --max-new 132": None,
}


@pytest.mark.parametrize("command", TOO_LONG)
def test_a_model_with_too_few_positions_is_found_before_anything_is_trained(
    refused, tmp_path, monkeypatch, command
):
    short = write_checkpoint(tmp_path / "short", replace(CONFIG, n_positions=200), tiny_tokenizer())
    if TOO_LONG[command] is None:
        fail = SimpleNamespace(now=lambda *_, **__: pytest.fail("sampling has started"))
        monkeypatch.setattr(sampling, "sample", fail.now)
        with pytest.raises(pytest.fail.Exception, match="sampling has started"):
            run_program(f"{command} --data data --out out", SHORT=short)
    else:
        line = refused(f"{command} --data data", "200 positions", TOO_LONG[command], SHORT=short)
        assert str(short) in line


@pytest.mark.parametrize(
    "command",
    [
        "train.py --teacher teacher --student MODEL --data bad",
        "train.py --sft-teacher MODEL --init MODEL --data bad --prompt-length 1",
        "evaluate.py student MODEL --data bad --max-new 5",
        "sample.py MODEL --file bad/test.jsonl --max-new 5",
        "exposure_bias.py --teacher MODEL --students student --data bad --steps 5",
    ],
)
def test_a_row_that_is_too_long_for_a_model_is_named(refused, tmp_path, command):
    """By its line. A request that is too long by itself is not helped by an option."""
    long = as_line(ROW | {"instruction": "a task that describes " * 10, "output": "task " * 300})
    for split in ("train", "dev", "test"):
        put(f"bad/{split}.jsonl", GOOD + b"\n" + GOOD + long)
    n = 330 if "train" in command else 90
    model = write_checkpoint(tmp_path / "m", replace(CONFIG, n_positions=n), tiny_tokenizer())
    line = refused(command, ".jsonl, line 4 |shorten|leave|use a model with more", MODEL=model)
    assert "--" not in line


def test_a_prompt_that_is_too_long_is_found_before_anything_is_trained(refused):
    command = "train.py --teacher teacher --student student --data data --prompt-length"
    parts = (
        "teacher: has 400 positions|needs 704|the stage promptkd|give --prompt-length 76 or less"
    )
    refused(command, parts, options=("380",))


@pytest.mark.parametrize("student, teacher", [(324, 348), (400, 348), (324, 400)])
def test_models_with_as_many_positions_as_the_rows_need_are_trained(tmp_path, student, teacher):
    for name, n in {"S": student, "T": teacher}.items():
        config = replace(CONFIG, n_positions=n)
        write_checkpoint(tmp_path / name, config, tiny_tokenizer())
    with pytest.raises(pytest.fail.Exception, match="training has started"):
        run_program(
            "train.py --sft-teacher T --init S --data data", T=tmp_path / "T", S=tmp_path / "S"
        )


# ---- runs --------------------------------------------------------------------------------------

RUN_READERS = {
    "evaluate": "evaluate.py run --data data",
    "cost": "evaluate.py --cost run",
    "init": "train.py --sft-teacher teacher --init run --data data",
    "init best": "train.py --sft-teacher teacher --init run/best --data data",
    "sft-teacher": "train.py --sft-teacher run --init student --data data",
    "along": "exposure_bias.py --teacher teacher --along run --data data",
}
MOVE_IT = "elsewhere and train it again, or only this file"
UNREADABLE = f"run.json: can't be read as JSON|{MOVE_IT}"
NOT_AN_OBJECT = f"run.json: must be a JSON object|{MOVE_IT}"
OTHER_VERSION = "run.json: was made by another version of this project; choose another --out"
NOT_A_RECORD = {
    b"": UNREADABLE,
    b'{"settings"': UNREADABLE,
    b'{"a": "\xff"}': UNREADABLE,
    b"[" * 200_000: UNREADABLE,
    b"[]": NOT_AN_OBJECT,
    b"null": NOT_AN_OBJECT,
    b'{"format": 2, "settings": null}': OTHER_VERSION,
    b'{"format": 1, "name": "sft-a-s10", "settings": {}}': OTHER_VERSION,
}
WRONG_FIELDS = {
    "name": (..., None, 5),
    "settings": (..., [], "x", None),
    "paper": (5, ["sft"]),
    "base": (5, ["gpt2"]),
    "parameters": ("many", 1.5),
    "hours": ("long", [1]),
    "complete": ("yes", 1),
    "inputs": ("train.jsonl", []),
}


def test_a_damaged_run_json(refused):
    original = Path("run/run.json").read_bytes()
    for content, parts in NOT_A_RECORD.items():
        put("run/run.json", content)
        refused(RUN_READERS["cost"], "run/run.json", parts)
    for field, values in WRONG_FIELDS.items():
        for value in values:
            put("run/run.json", original)
            change_json("run/run.json", **{field: value})
            refused(RUN_READERS["cost"], f"run/run.json|'{field}' is wrong|{MOVE_IT}")
    for command in RUN_READERS.values():
        refused(command, "run/run.json|'inputs' is wrong")


@pytest.mark.parametrize(
    "content",
    [b"{}", b'{"model": "mine", "epochs": 3}', b'{"name": "mine"}', b'{"settings": {"lr": 1}}'],
)
def test_the_run_json_of_another_tool_is_not_called_ours(refused, content):
    """The model beside it is the user's."""
    put("run/run.json", content)
    for command in RUN_READERS.values():
        refused(command, "run/run.json: was not made by this project; move it out of")


def test_no_message_advises_to_remove_anything():
    """It may be the user's, and there may be no other copy. To move it does as well."""
    paths = {*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py")}
    for path in paths - {ROOT / "data" / "sets" / "demo.py"}:  # it has tasks such as "remove ..."
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
        for node in nodes:
            if isinstance(node, ast.Constant) and node not in docstrings:
                assert not re.search(r"\b(remove|delete|erase|rm) ", str(node.value))


@pytest.mark.usefixtures("server")
def test_a_file_that_the_user_has_put_in_place_of_a_download_is_kept(refused):
    """As an earlier message advises a user without a network."""
    path = prepare.DATA_DIR / "vicuna" / "download" / "valid.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(GOOD + GOOD[:30])
    for command in ("data.prepare vicuna", "evaluate.py student --data vicuna"):
        refused(command, f"{path}, line 2: |{NOT_JSON}")


def test_strange_but_harmless_values_in_run_json():
    original = Path("run/run.json").read_bytes()
    few = "--data data --seeds 10 --rows 1 --max-new 2 --greedy"
    for field, value in {"paper": "sft", "hours": None, "parameters": None, "base": None}.items():
        put("run/run.json", original)
        change_json("run/run.json", **{field: value})
        for options in (few, "--cost"):
            run_program(f"evaluate.py run sft-student-s10 --out out {options}")


def test_a_run_without_a_best_step_or_checkpoints_along_the_way(refused):
    along = RUN_READERS["along"]
    original = Path("run/run.json").read_bytes()
    for value in (..., None, 0, 1.5, "4", True, [4]):
        change_json("run/run.json", best_step=value)
        refused(along, "run/run.json|'best_step'|train.py --keep 20")
    put("run/run.json", original)
    shutil.rmtree("run/kept")
    refused(along, "run/kept|--keep 20")
    Path("run/kept/step-000002").mkdir(parents=True)
    refused(along, "run/kept/step-000002/config.json|no such file")
    Path("run/kept/step-000002").rename("run/kept/step-x")
    refused(along, "run/kept|--keep 20")


@pytest.fixture
def finished():
    """The run.json of a run of SFT in out/ that counts as complete."""
    with pytest.raises(pytest.fail.Exception, match="training has started"):
        run_program(SFT, "--micro-batch-tokens", 200)
    [path] = Path("out").glob("*/run.json")
    change_json(path, hours=0.5, complete=True, parameters=1000)
    run_program(SFT, "--micro-batch-tokens", 200)  # it is skipped now
    return path


def test_an_output_directory_of_other_settings_or_a_damaged_run_json(refused, finished):
    original = finished.read_bytes()
    settings = json.loads(original)["settings"]
    others = {"lr": 0.5, "seed": 11, "epochs": None, "global_batch_size": "32"}
    for field, value in others.items():
        change_json(finished, settings=settings | {field: value})
        parts = f"was made with {field} {value!r}|choose another --out"
        refused(SFT, finished.parent, parts)
    del settings["epochs"]
    change_json(finished, settings=settings)
    refused(SFT, finished.parent, "was made with epochs None|choose another --out")
    for content, parts in NOT_A_RECORD.items():
        put(finished, content)
        refused(SFT, finished, f"move {finished.parent.resolve()} elsewhere", parts)


@pytest.mark.parametrize("what", ["garbage", "truncated", "another model's", "code", "a list"])
def test_a_damaged_state_is_one_line_or_the_stage_starts_from_scratch(finished, capsys, what):
    change_json(finished, complete=...)
    path = finished.parent / "state" / "state.pt"
    path.parent.mkdir()
    progress = {"step": 1, "best": None, "best_step": None, "hours": 0.0}
    state = {"progress": progress, "student": {"a": torch.zeros(1)}, "optimizer": {}}
    torch.save({"code": Executes(), "a list": [1]}.get(what, state), path)
    if what in ("garbage", "truncated"):
        path.write_bytes(b"garbage" if what == "garbage" else path.read_bytes()[:-100])
        with pytest.raises(pytest.fail.Exception, match="training has started"):
            run_program(SFT)
        assert "is damaged; this stage starts from scratch" in capsys.readouterr().out
    else:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_program(SFT)
        parts = f"is not a state of this run|move {path.parent} elsewhere"
        check_line(exit.value.code, capsys.readouterr().err, path, parts)
    assert not Path("executed").exists()


def test_damaged_responses_are_sampled_again(capsys):
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
    *("owner//name /owner/name owner/ / owner\\name ~/x owner/name?x=1 owner/name#x").split(),
    *("owner/%2e%2e file:///etc http://127.0.0.1/x - . .. gpt3 GPT2 gpt2/ öwner/name").split(),
    *("owner/..name.. openai-community/../gpt2 ./student/config.json").split(),
    *["owner/na me", "owner/name\n", "owner/na\x00me", "\x00", "gpt2 ", "a" * 300],
    "a/" + "b" * 300,
]


def test_malformed_names_of_models_reach_no_server_and_no_file(refused, server):
    for name in NAMES:
        wrong = "config.json: no such file" if os.path.isdir(name) else "hub id owner/name"
        refused(SAMPLE, wrong, MODEL=name)
    for command in (READERS | LATER_READERS).values():
        for name in ("../x", "owner/na\x00me"):
            refused(command, "model|no such directory|hub id owner/name", MODEL=name)
    assert not server.asked


def test_malformed_names_of_data_sets(refused):
    names = ["../x", "/etc/nowhere", "dolly/../../x", "dolly/", "Dolly", " ", "nowhere\n"]
    for name in [*names, "a\x00b", "a" * 300, "x" * 5000, "data/test.jsonl"]:
        parts = "data|no such directory|give one with train.jsonl"
        refused("evaluate.py student --data", parts, options=(name,))
    for program in ("train.py", "exposure_bias.py"):
        refused(NOWHERE[program], "data 'nowhere': no such directory|give one with train.jsonl")


def test_a_hub_cache_whose_revision_is_elsewhere_is_skipped(refused, world, tmp_path):
    cache = tmp_path / "hf" / "hub" / "models--owner--name"
    places = (tmp_path / "hf" / "outside", cache / "outside", cache / "snapshots" / "a" / "b")
    for directory in places:
        shutil.copytree(world / "student", directory)
    (cache / "refs").mkdir()
    for name in ("config.json", "model.safetensors"):
        for directory in (cache, cache / "snapshots"):
            shutil.copy(world / "student" / name, directory)
    for revision in (b"../../../outside", b"/etc", b"..", b"", b"a/b", b"\xff\xfe", b"x\n"):
        (cache / "refs" / "main").write_bytes(revision)
        refused(SAMPLE, "owner/name|download failed|check the network", MODEL="owner/name")


# ---- the network -------------------------------------------------------------------------------

HTML = b"<!DOCTYPE html><html>Sign in</html>"


@pytest.mark.parametrize(
    "file, answer, parts",
    [
        ("model_safetensors", 401, "401|check the name|set HF_TOKEN"),
        ("vocab_json", 503, "vocab.json: download failed 3 times|503|check the network"),
        ("config_json", HTML, "config.json|can't be read|fetch it again"),
        ("vocab_json", HTML, "vocab.json|vocab.json and merges.txt, again"),
        ("merges_txt", 404, "vocab.json|vocab.json and merges.txt, again"),
        ("model_safetensors", Short(b"x" * 1000), "model.safetensors|damaged|fetch it again"),
    ],
)
def test_wrong_answers_of_the_hub(world, tmp_path, server, capsys, file, answer, parts):
    names = ("config.json", "model.safetensors", "vocab.json", "merges.txt")
    answers = {name.replace(".", "_"): (world / "student" / name).read_bytes() for name in names}
    server.serve("owner/name", **(answers | {file: answer}))
    for command in (SAMPLE, READERS["student"]):
        with pytest.raises(SystemExit) as exit:
            run_program(command, MODEL="owner/name")
        check_line(exit.value.code, capsys.readouterr().err, parts)
    directory = tmp_path / "torch" / "hub" / "promptkd" / "owner" / "name"
    downloaded = {path for path in (tmp_path / "torch").rglob("*") if path.is_file()}
    assert downloaded <= {directory / name for name in names}  # no partial file


def test_wrong_answers_of_the_hub_for_a_data_set(refused, server):
    answers = {
        404: "does not exist|--source DIR",
        403: "403|check the name|set HF_TOKEN",
        HTML: "line 1: is not JSON|the download is removed",
        b"": "has no rows|the download is removed",
        Short(GOOD): "line 1: is not JSON|the download is removed",
    }
    for answer, parts in answers.items():
        server.answers["/datasets/MiniLLM/Vicuna/resolve/main/valid.jsonl"] = answer
        for command in ("data.prepare vicuna", "evaluate.py student --data vicuna"):
            refused(command, "valid.jsonl", parts)


# ---- where results are written -----------------------------------------------------------------

WRITERS = {
    "evaluate": "evaluate.py student --data data",
    "train": SFT,
    "train, before the stages": "train.py --teacher teacher --student student --data data",
    "cost": "evaluate.py sft-student-s10 --cost",
    "exposure": f"{EXPOSURE} data",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_an_impossible_output_directory_is_reported_at_once(refused, monkeypatch, writer):
    dangling(Path("bad/link"))
    loop(Path("bad/loop"))
    monkeypatch.setattr(
        "data.models.sampling.sample", lambda *_, **__: pytest.fail("sampling has started")
    )
    for out in ("corpus.jsonl", "corpus.jsonl/x/y", "bad/link", "bad/link/x", "bad/loop"):
        parts = f"--out {out}: |is not a writable directory|choose another"
        refused(WRITERS[writer], parts, options=("--out", out))
    # Root has every permission, so the system's answer is replaced.
    monkeypatch.setattr(files.os, "access", lambda path, mode: mode != os.W_OK)
    parts = "--out bad/mine/out|is not a writable directory|choose another"
    refused(WRITERS[writer], parts, options=("--out", "bad/mine/out"))


# The command, and what its error line names
FULL = {
    "evaluate.py student --data data --seeds 10 --max-new 2 --rows 1 --out out": "out",
    "evaluate.py sft-student-s10 --cost --out out": "out",
    f"{EXPOSURE} data --rows 1 --steps 2 --samples 1 --out out": "out",
    "data.prepare vicuna --source bad": "test.jsonl",
    SFT: "out",
}


@pytest.mark.parametrize("command", FULL)
def test_a_full_disk(refused, monkeypatch, command):
    put("bad/train.jsonl", missing)  # or data.prepare takes bad/ for a data set that is prepared
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as a quota does
    try:
        refused(command, "File too large", FULL[command])
    finally:  # soon, since what pytest prints may go to a file, too
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    refused(command, "No space left on device", FULL[command])


def test_an_impossible_file_of_results(refused):
    """A pipe is not replaced by a file."""
    for content in (Path.mkdir, os.mkfifo):
        put("bad/table2.md", content)
        refused("evaluate.py sft-student-s10 --cost --out bad", "bad/table2.md")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_standard_output_on_a_full_disk(monkeypatch, capsys):
    with suppress(OSError), open("/dev/full", "w") as disk:
        monkeypatch.setattr(sys, "stdout", disk)
        with pytest.raises(SystemExit) as exit:
            run_program(SCORE)
        assert sys.stdout is None  # or Python would flush it at exit, and complain again
    check_line(exit.value.code, capsys.readouterr().err, "No space left on device")


# ---- the programs as such ----------------------------------------------------------------------

BY_NAME = {
    f"{SFT} --lr 0": "--lr|must be above 0",
    "train.py --method sft --student student --data bad": "bad/train.jsonl, line 2|is not JSON",
    "sample.py broken --instruction a": "broken/pytorch_model.bin|fetch it again",
    f"{SCORE} student": "without models",
    "exposure_bias.py --teacher other --students student --data data": "have different tokenizers",
    "data.prepare vicuna --source nowhere": "nowhere: has no valid.jsonl",
}


@pytest.mark.parametrize("command", BY_NAME)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package")
def test_a_program_ends_with_status_2_and_one_line(world, tmp_path, monkeypatch, capsys, command):
    """Each program as Python runs it by name."""
    put("bad/train.jsonl", GOOD + GOOD[:30])
    put("broken/model.safetensors", missing)
    torch.save({"wte.weight": Executes()}, "broken/pytorch_model.bin")
    before = snapshot(world, tmp_path)
    program, *options = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [program, *options])
    with pytest.raises(SystemExit) as exit:
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")
    check_line(exit.value.code, capsys.readouterr().err, BY_NAME[command])
    assert snapshot(world, tmp_path) == before and not Path("executed").exists()


def test_of_two_ranks_one_prints_the_line(tmp_path, monkeypatch):
    put("bad/train.jsonl", GOOD + GOOD[:30])
    before = snapshot(".")

    def end_rank(seconds):
        """What torchrun does while rank 1 delays its line."""
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(command_line, "time", SimpleNamespace(sleep=end_rank))
    command = "train.py --method sft --student student --data bad"
    processes = fork_ranks(lambda: train.main(command.split()[1:]), 2, tmp_path / "log")
    assert wait_for(processes, 60) == [2, -signal.SIGTERM]
    output = (tmp_path / "log0").read_text()
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "bad/train.jsonl, line 2: is not JSON" in line and "Traceback" not in output
    assert (tmp_path / "log1").read_text() == "" and snapshot(".") == before
