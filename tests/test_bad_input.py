"""Everything that a person can get wrong. Each case ends with one line that names the thing and the mend, and exit status 2; no traceback, no
training, and every file that was there is still there as it was, and no other."""

import errno
import gzip
import json
import os
import pickle
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiktoken
import torch
from helpers import (
    ROOT,
    Short,
    after_device,
    soft_prompt,
    stored_weights,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    write_checkpoint,
    write_rows,
)
from safetensors.torch import load_file, save_file
from tiktoken_ext.openai_public import r50k_pat_str

import evaluate
import exposure_bias
import sample
import train
from data import prepare
from data.cli import InputError, run_command_line, write_atomic
from data.hub import download
from data.rows import read_rows
from data.tokenizer import END
from model import save

PROGRAMS = {
    "train.py": train,
    "evaluate.py": evaluate,
    "sample.py": sample,
    "exposure_bias.py": exposure_bias,
    "data.prepare": prepare,
}
CONFIG = replace(talker_config(), n_positions=400)
ROW = {"instruction": "Write a word.", "input": "", "output": "task"}


# ---- what there is: two models, data, a finished run -------------------------------------------------------------------------------


def another_tokenizer():
    """As many tokens as tiny_tokenizer has, with other numbers."""
    tokens = [
        tiny_tokenizer().decode_single_token_bytes(n) for n in range(tiny_tokenizer().n_vocab - 1)
    ]
    tokens.insert(256, tokens.pop(tokens.index(b" i")))
    return tiktoken.Encoding(
        "other",
        pat_str=r50k_pat_str,
        mergeable_ranks={t: n for n, t in enumerate(tokens)},
        special_tokens={END: len(tokens)},
    )


def small_tokenizer():
    """The 256 bytes and end-of-text alone."""
    tokens = [tiny_tokenizer().decode_single_token_bytes(n) for n in range(256)]
    return tiktoken.Encoding(
        "small",
        pat_str=r50k_pat_str,
        mergeable_ranks={t: n for n, t in enumerate(tokens)},
        special_tokens={END: 256},
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_checkpoint(folder / "student", CONFIG, tiny_tokenizer())
    write_checkpoint(folder / "teacher", replace(CONFIG, n_embd=16), tiny_tokenizer())
    write_checkpoint(folder / "other", CONFIG, another_tokenizer())
    write_checkpoint(folder / "small", replace(CONFIG, vocab_size=257), small_tokenizer())
    for name in ("train", "dev", "test"):
        write_rows(
            folder / "data" / f"{name}.jsonl",
            [ROW | {"instruction": f"Write word {n}."} for n in range(4)],
        )
    write_rows(folder / "corpus.jsonl", [{"text": "a task that describes a task " * 300}])
    run = folder / "sft-student-s10"
    shutil.copytree(folder / "student", run / "best")
    shutil.copytree(folder / "student", run / "kept" / "step-000002")
    write_rows(run / "metrics.jsonl", [{"step": 1, "memory_resident_gb": 1.5}])
    record = {
        "name": run.name,
        "paper": None,
        "settings": {"student": "student", "data": "data", "reg_weight": None},
        "parameters": 1000,
    }
    (run / "run.json").write_text(json.dumps(record | {"best_step": 4, "hours": 0.5}))
    return folder


@pytest.fixture(autouse=True)
def alone(world, tmp_path, monkeypatch):
    """The world as the current folder, no network, no models or data at hand but its own, no training, and no pictures, which take long."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr("data.hub.time.sleep", lambda seconds: None)
    monkeypatch.setattr(prepare, "HOME", tmp_path / "home")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    monkeypatch.setattr("data.report.pyplot", lambda: None)
    monkeypatch.setattr(train, "step", lambda *_: pytest.fail("training has begun"))


def offline(name):
    raise ConnectionError("no network")


def snapshot(*folders):
    """What lies below folders: of each file its content and the time of its last change. Folders without a file in them don't count."""
    found = {}
    for parent, below, files in (entry for folder in folders for entry in os.walk(folder)):
        for path in (os.path.join(parent, name) for name in [*below, *files]):
            if os.path.islink(path):
                found[path] = os.readlink(path)
            elif os.path.isfile(path):
                found[path] = Path(path).read_bytes(), os.stat(path).st_mtime_ns
            elif not os.path.isdir(path):
                found[path] = "no plain file"
    return found


@pytest.fixture
def refused(world, tmp_path, capsys):
    """A function that runs a command, as `refused("train.py", options...)`, and returns its error line, after all checks that every case shares."""

    def run(program, *arguments):
        before = snapshot(world, tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run_command_line(
                lambda: PROGRAMS[program].main([str(a) for a in arguments]), InputError
            )
        line = the_line(left.value.code, capsys.readouterr().err)
        assert snapshot(world, tmp_path) == before
        return line

    return run


def the_line(status, said):
    """The one line of error on a screen, which argparse puts its usage before."""
    assert status == 2
    *usage, line = after_device(said).splitlines()
    assert re.match(r"error: \S|[\w. -]+: error: \S", line) and "Traceback" not in said
    assert not usage or (
        usage[0].startswith("usage: ") and all(other.startswith(" ") for other in usage[1:])
    )
    return line


def has(line, *words):
    for word in words:
        assert str(word) in line, f"{word!r} is not in {line!r}"


SFT = ("--method", "sft", "--student", "student")
# Commands that are right but for their data, of which there is none
NOWHERE = {
    "train.py": ("--teacher", "teacher", "--student", "student", "--data", "nowhere"),
    "evaluate.py": ("student", "--data", "nowhere"),
    "sample.py": ("student", "--file", "nowhere.jsonl"),
    "exposure_bias.py": ("--teacher", "teacher", "--students", "student", "--data", "nowhere"),
}

# ---- numbers -----------------------------------------------------------------------------------------------------------------------

# command, option, kind, least, most; ">" where the least is just not allowed
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
    ("train.py", "--micro-batch", int, 1, 10**9),
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
    ("exposure_bias.py", "--micro-batch", int, 1, 10**6),
]


@pytest.mark.parametrize("program, option, kind, least, most", NUMBERS)
def test_a_number_that_is_none_or_out_of_range(refused, program, option, kind, least, most):
    step = 1 if kind is int else 1e-3
    beyond = [least if kind == ">" else least - step, most + step]
    for text in [
        *map(str, beyond),
        "x",
        "",
        "nan",
        "inf",
        "-inf",
        *(["1.5", "1e3"] if kind is int else ["0,5"]),
    ]:
        has(refused(program, *NOWHERE[program], option, text), option)


@pytest.mark.parametrize("program, option, kind, least, most", NUMBERS)
def test_a_number_at_its_limit_is_taken(refused, program, option, kind, least, most):
    idle = {"--prompt-lr", "--prompt-length", "--reg"}
    for number in (1e-30 if kind == ">" else least, most):
        assert option in idle or "nowhere" in refused(
            program, *NOWHERE[program], option, str(number)
        )


def test_a_number_that_is_out_of_range_is_said_with_its_range(refused):
    has(refused("train.py", "--lr", "11\n"), "--lr", "must be above 0 and at most 10, not '11\\n'")
    has(refused("sample.py", "x", "--top-k", "many"), "--top-k", "whole number", "many")


def test_under_torchrun_the_first_rank_alone_says_what_is_wrong_with_the_options(
    monkeypatch, capsys
):
    """The others wait until it has left; one that is still there speaks too, in one line."""
    waited = []
    monkeypatch.setattr("data.hub.time.sleep", waited.append)
    for rank, lines in ((0, "usage: "), (1, "error: argument --lr: must be above 0")):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as left:
            run_command_line(lambda: train.main(["--lr", "0"]))
        assert (
            left.value.code == 2
            and capsys.readouterr().err.startswith(lines)
            and len(waited) == rank
        )


# ---- options -----------------------------------------------------------------------------------------------------------------------

OPTIONS = [
    ("train.py", ["--method", "sgd"], ["--method", "invalid choice: 'sgd'", "promptkd"]),
    ("train.py", ["--method", ""], ["--method", "choose from"]),
    ("train.py", ["--method"], ["--method", "expected one argument"]),
    ("train.py", ["--prompt-init", "words"], ["--prompt-init", "'words'", "random"]),
    ("train.py", ["--prompt-kl", "both"], ["--prompt-kl", "'both'", "forward"]),
    ("train.py", ["--reg-kl", "KL"], ["--reg-kl", "'KL'", "forward"]),
    ("train.py", ["--learning-rate", "1"], ["unrecognized arguments: --learning-rate"]),
    ("train.py", ["gpt2"], ["unrecognized arguments: gpt2"]),
    ("train.py", ["--prompt", "x"], ["ambiguous option: --prompt"]),
    ("train.py", ["--lr", "--epochs", "1"], ["--lr", "expected one argument"]),
    ("train.py", ["--shape", "6x256x8"], ["--shape has no effect", "leave it out"]),
    ("train.py", ["--method", "pretrain"], ["needs --shape", "6x256x8"]),
    (
        "train.py",
        ["--method", "pretrain", "--shape", "2x64x4", "--student", "student"],
        ["--student has no effect", "leave it out"],
    ),
    (
        "train.py",
        ["--method", "pretrain", "--shape", "2x64x4", "--teacher", "teacher"],
        ["--teacher has no effect", "leave it out"],
    ),
    (
        "train.py",
        ["--method", "sft", "--teacher", "teacher"],
        ["--teacher has no effect", "leave it out"],
    ),
    (
        "train.py",
        ["--method", "sft", "--sft-teacher", "teacher"],
        ["--sft-teacher has no effect", "leave it out"],
    ),
    (
        "train.py",
        ["--teacher", "teacher", "--sft-teacher", "teacher"],
        ["--teacher has no effect", "leave it out"],
    ),
    (
        "train.py",
        ["--init", "student", "--student", "student"],
        ["--student has no effect", "leave it out"],
    ),
    ("train.py", ["--method", "kd", "--init", "student"], ["--init has no effect", "leave it out"]),
    ("train.py", ["--lm-data", "corpus.jsonl"], ["--lm-data has no effect", "leave it out"]),
    (
        "train.py",
        ["--method", "gkd", "--prompt-text", "Hello"],
        ["--prompt-text has no effect", "leave it out"],
    ),
    (
        "train.py",
        ["--method", "gkd", "--prompt-length", "3"],
        ["--prompt-length has no effect", "leave it out"],
    ),
    (
        "train.py",
        ["--method", "minillm", "--prompt-init", "random"],
        ["--prompt-init has no effect", "leave it out"],
    ),
    (
        "train.py",
        ["--method", "kd", "--prompt-lr", "1"],
        ["--prompt-lr has no effect", "leave it out"],
    ),
    ("train.py", ["--method", "sft", "--reg", "0"], ["--reg has no effect", "leave it out"]),
    (
        "train.py",
        ["--method", "seqkd", "--reg-kl", "forward"],
        ["--reg-kl has no effect", "leave it out"],
    ),
    (
        "train.py",
        ["--method", "seqkd", "--prompt-kl", "forward"],
        ["--prompt-kl has no effect", "leave it out"],
    ),
    *(
        ("train.py", [option, ""], [f"{option} is empty", "leave it out"])
        for option in ("--prompt-text", "--student", "--data", "--out", "--shape", "--lm-data")
    ),
    ("evaluate.py", [], ["name at least one run or model", "evaluate.py gpt2"]),
    ("evaluate.py", ["student", "--json", "x.json"], ["--json goes with --score", "--out DIR"]),
    (
        "evaluate.py",
        ["--score", "a.jsonl"],
        ["--score RESPONSES.jsonl goes with --references TEST.jsonl"],
    ),
    (
        "evaluate.py",
        ["--references", "a.jsonl"],
        ["--score RESPONSES.jsonl goes with --references TEST.jsonl"],
    ),
    (
        "evaluate.py",
        ["--score", "", "--references", "a.jsonl"],
        ["--score RESPONSES.jsonl goes with"],
    ),
    (
        "evaluate.py",
        ["student", "--score", "a.jsonl", "--references", "b.jsonl"],
        ["without models"],
    ),
    ("evaluate.py", ["student", "--by", "a", "b", "c"], ["--by takes one or two fields, not 3"]),
    (
        "evaluate.py",
        ["student", "--data", "data", "--by", "reg_weight"],
        ["--by reg_weight", "there are no runs"],
    ),
    (
        "evaluate.py",
        ["sft-student-s10", "--data", "data", "--by", "size"],
        ["--by size", "there are", "best_step", "reg_weight"],
    ),
    ("evaluate.py", ["student", "--seeds"], ["--seeds", "expected at least one argument"]),
    ("evaluate.py", ["student", "--data"], ["--data", "expected at least one argument"]),
    ("evaluate.py", ["student", "--seeds", "10", "ten"], ["--seeds", "'ten'"]),
    ("evaluate.py", ["--cost", "data"], ["none of the directories has a run.json", "name runs"]),
    ("evaluate.py", ["--cost", "nowhere"], ["none of the directories has a run.json", "name runs"]),
    (
        "evaluate.py",
        ["data", "--data", "data"],
        ["none of the directories has a model", "name a run"],
    ),
    ("evaluate.py", [""], ["model ''", "no such directory", "hub id owner/name"]),
    (
        "evaluate.py",
        ["student", "--data", "data", "--max-new", "390"],
        ["exceed the model's 400 positions", "shorten"],
    ),
    ("evaluate.py", ["student", "--speed"], ["unrecognized arguments: --speed"]),
    ("sample.py", [], ["required: model"]),
    ("sample.py", ["student"], ["give either --instruction TEXT or --file FILE"]),
    (
        "sample.py",
        ["student", "--instruction", "a", "--file", "data/test.jsonl"],
        ["give either --instruction TEXT or --file FILE"],
    ),
    (
        "sample.py",
        ["student", "--file", "data/test.jsonl", "--input", "a"],
        ["--input goes with --instruction", "--file"],
    ),
    ("sample.py", ["student", "--file", ""], ["is a directory", "a file is wanted"]),
    (
        "sample.py",
        ["student", "--instruction", "a", "--max-new", "100000"],
        ["exceed the model's 400 positions", "shorten"],
    ),
    (
        "sample.py",
        ["student", "--instruction", "a", "--prompt", "nowhere"],
        ["nowhere: no such file", "best/prompt.safetensors"],
    ),
    ("sample.py", ["student", "more", "--instruction", "a"], ["unrecognized arguments: more"]),
    ("exposure_bias.py", [], ["required: --teacher"]),
    ("exposure_bias.py", ["--teacher", "teacher"], ["name --students RUN|MODEL", "--along RUN"]),
    (
        "exposure_bias.py",
        ["--teacher", "teacher", "--students"],
        ["--students", "expected at least one argument"],
    ),
    (
        "exposure_bias.py",
        ["--teacher", "teacher", "--along", "student", "--data", "data"],
        ["student/run.json", "train.py --keep 20"],
    ),
    (
        "exposure_bias.py",
        ["--teacher", "teacher", "--along", "nowhere", "--data", "data"],
        ["nowhere/run.json", "train.py --keep 20"],
    ),
    (
        "exposure_bias.py",
        ["--teacher", "student", "--students", "student", "--data", "data", "--steps", "2"],
        ["the teacher's own", "leave it out"],
    ),
    ("data.prepare", [], ["required: SET"]),
    ("data.prepare", ["demo"], ["'demo'", "choose from", "dolly"]),
    ("data.prepare", ["../dolly"], ["'../dolly'", "choose from", "dolly"]),
    ("data.prepare", ["dolly", ""], ["''", "choose from"]),
    ("data.prepare", ["dolly", "--source"], ["--source", "expected one argument"]),
    (
        "data.prepare",
        ["dolly", "--source", "nowhere"],
        ["nowhere", "has neither raw.jsonl", "name their folder"],
    ),
    (
        "data.prepare",
        ["dolly", "--source", "corpus.jsonl"],
        ["corpus.jsonl", "has neither raw.jsonl", "name their folder"],
    ),
    (
        "data.prepare",
        ["vicuna", "--source", "corpus.jsonl"],
        ["corpus.jsonl", "has no valid.jsonl", "name their folder"],
    ),
    ("data.prepare", ["vicuna", "--source", ""], ["has no valid.jsonl", "name their folder"]),
    (
        "data.prepare",
        ["uinst", "--source", "student"],
        ["student", "has no 11_/valid.jsonl", "name their folder"],
    ),
]


@pytest.mark.parametrize(
    "program, options, words",
    OPTIONS,
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else value,
)
def test_options_that_are_wrong_or_exclude_each_other(refused, program, options, words):
    has(refused(program, *options), *words)


SHAPES = [
    "6",
    "6x256",
    "6x256x8x1",
    "axbxc",
    "0x256x8",
    "6x0x8",
    "6x256x0",
    "6x-256x8",
    "6x250x8",
    "6X256X8",
    "6,256,8",
    "1e1x256x8",
    "6.0x256x8",
    "999999999x4x1",
    "1x999999999x1",
    "1000x100000x1",
    "9" * 5000 + "x4x1",
    "../../x",
    "6x256x8\n\n7",
    "\x00",
]


def test_shapes_that_are_none(refused):
    for shape in SHAPES:
        has(
            refused("train.py", "--method", "pretrain", "--data", "data", "--shape", shape),
            "--shape",
            "6x256x8",
        )


def test_a_text_of_bytes_that_are_no_text_is_taken_as_a_prompt_and_as_an_instruction(
    refused, capsys
):
    """An argument that is not UTF-8 reaches Python as lone surrogates."""
    text = os.fsdecode(b"caf\xe9")
    has(
        refused("train.py", *NOWHERE["train.py"][:4], "--data", "nowhere", "--prompt-text", text),
        "nowhere",
    )
    with pytest.raises(pytest.fail.Exception, match="training has begun"):
        train.main(
            [
                "--sft-teacher",
                "teacher",
                "--init",
                "student",
                "--data",
                "data",
                "--prompt-text",
                text,
                "--out",
                "out",
            ]
        )
    shutil.rmtree("out")
    capsys.readouterr()
    run_command_line(lambda: sample.main(["student", "--instruction", text, "--max-new", "2"]))
    assert after_device(capsys.readouterr().err) == ""


# ---- JSON lines --------------------------------------------------------------------------------------------------------------------

# where: the command and, of the data files below `bad/`, the one that is wrong
PLACES = {
    "train": ("bad/train.jsonl", ["train.py", *SFT, "--data", "bad"]),
    "dev": ("bad/dev.jsonl", ["train.py", *SFT, "--data", "bad"]),
    "evaluate": ("bad/test.jsonl", ["evaluate.py", "student", "--data", "bad"]),
    "exposure": (
        "bad/test.jsonl",
        ["exposure_bias.py", "--teacher", "teacher", "--students", "student", "--data", "bad"],
    ),
    "sample": ("bad/test.jsonl", ["sample.py", "student", "--file", "bad/test.jsonl"]),
    "score": (
        "bad/score.jsonl",
        [
            "evaluate.py",
            "--score",
            "bad/score.jsonl",
            "--references",
            "bad/test.jsonl",
            "--json",
            "bad/s.json",
        ],
    ),
    "references": (
        "bad/test.jsonl",
        [
            "evaluate.py",
            "--score",
            "bad/score.jsonl",
            "--references",
            "bad/test.jsonl",
            "--json",
            "bad/s.json",
        ],
    ),
    "corpus": (
        "bad/corpus.jsonl",
        [
            "train.py",
            "--method",
            "minillm",
            "--sft-teacher",
            "teacher",
            "--init",
            "student",
            "--data",
            "data",
            "--lm-data",
            "bad/corpus.jsonl",
        ],
    ),
    "corpus, before the stages": (
        "bad/corpus.jsonl",
        [
            "train.py",
            "--method",
            "minillm",
            "--teacher",
            "teacher",
            "--student",
            "student",
            "--data",
            "data",
            "--lm-data",
            "bad/corpus.jsonl",
        ],
    ),
    "pretrain": (
        "bad/pretrain.jsonl",
        ["train.py", "--method", "pretrain", "--shape", "1x8x1", "--data", "bad"],
    ),
    "prepare": ("bad/valid.jsonl", ["data.prepare", "vicuna", "--source", "bad"]),
    "prepare dolly": ("bad/raw.jsonl", ["data.prepare", "dolly", "--source", "bad"]),
    "prepare raw dolly": (
        "bad/databricks-dolly-15k.jsonl",
        ["data.prepare", "dolly", "--source", "bad"],
    ),
    "cost": ("bad/metrics.jsonl", ["evaluate.py", "--cost", "bad", "--out", "bad/out"]),
}


@pytest.fixture
def bad(world, tmp_path, monkeypatch):
    """A copy of the data, in which a test may put what is wrong, as `bad/` in the current folder."""
    home = tmp_path / "here"
    shutil.copytree(world / "data", home / "bad")
    for name in ("student", "teacher", "other", "small", "data", "corpus.jsonl", "sft-student-s10"):
        (home / name).symlink_to(world / name)
    write_rows(home / "bad" / "score.jsonl", [{"text": "a task"}] * 4)
    shutil.copy(world / "sft-student-s10" / "run.json", home / "bad")
    monkeypatch.chdir(home)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tiny_tokenizer())
    return home / "bad"


def place(where, content):
    """Put a content in its place: bytes, or a function of the path. Dolly's other files are where its are asked for. Returns path and command."""
    path, arguments = Path(PLACES[where][0]), PLACES[where][1]
    if where.startswith("prepare"):
        Path("bad/train.jsonl").unlink(
            missing_ok=True
        )  # its folder would be one of a split made already, or of Dolly alone
    if where == "prepare dolly":
        shutil.copy("bad/test.jsonl", "bad/valid.jsonl")
    path.unlink(missing_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    return path, arguments


GOOD = json.dumps(ROW | {"text": "a", "context": "", "response": ""}).encode() + b"\n"
NOT_JSON, NO_OBJECT, NOT_UTF8 = (
    ("is not JSON", "one object a line is wanted"),
    ("is no JSON object", "one object a line is wanted"),
    ("UTF-8", "convert"),
)
LINES = {  # the content, the line that is wrong, and what is said
    "nothing in it": (b"", None, ["has no rows"]),
    "cut off": (GOOD + GOOD[:30], 2, NOT_JSON),
    "an array": (GOOD + b"[1, 2]\n", 2, NO_OBJECT),
    "a text": (b'"instruction"\n', 1, NO_OBJECT),
    "a number": (GOOD * 2 + b"17\n", 3, NO_OBJECT),
    "null": (b"null\n", 1, ["is empty", "one object a line is wanted"]),
    "NaN alone": (b"NaN\n", 1, NO_OBJECT),
    "a blank line": (GOOD + b"\n" + GOOD, 2, ["is empty", "one object a line is wanted"]),
    "not UTF-8": (GOOD + GOOD.replace(b"word", b"caf\xe9"), 2, NOT_UTF8),
    "UTF-16": (GOOD.decode().encode("utf-16"), 1, NOT_UTF8),
    "compressed": (gzip.compress(GOOD), 1, NOT_UTF8),
    "zeros": (GOOD + bytes(100) + b"\n", 2, NOT_JSON),
    "single quotes": (GOOD + b"{'instruction': 'a'}\n", 2, NOT_JSON),
    "a comma too many": (b'{"instruction": "a",}\n', 1, NOT_JSON),
    "two objects": (GOOD.strip() + GOOD, 1, NOT_JSON),
    "one object over lines": (b'{\n"instruction": "a"\n}\n', 1, NOT_JSON),
    "a web page": (b"<!DOCTYPE html>\n<html></html>\n", 1, NOT_JSON),
    "nested": (
        GOOD + b'{"a": ' + b"[" * 200_000 + b"\n",
        2,
        ["nested too deeply", "one flat object a line is wanted"],
    ),
    "an endless number": (b'{"a": ' + b"9" * 5000 + b"}\n", 1, NOT_JSON),
    "ten megabytes cut off": (b'{"instruction": "' + b"a" * 10_000_000, 1, NOT_JSON),
}


@pytest.mark.parametrize("where", PLACES)
def test_json_lines_that_are_none(refused, bad, where):
    for what, (content, number, words) in LINES.items():
        if where == "cost" and what == "nothing in it":
            continue  # a run that was stopped before its first step has an empty metrics.jsonl
        path, arguments = place(where, content)
        line = refused(*arguments)
        has(line, path if number is None else f"{path}, line {number}: ", *words)
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


@pytest.mark.parametrize(
    "where", [where for where in PLACES if not where.startswith(("prep", "pretrain", "cost"))]
)
@pytest.mark.parametrize("what", NO_FILES)
def test_a_data_file_that_is_no_file(refused, bad, where, what):
    path, arguments = place(where, NO_FILES[what])
    has(
        refused(*arguments),
        path,
        *(["is a directory"] if what == "a directory" else ["no such file"]),
    )


@pytest.mark.parametrize("what", NO_FILES)
@pytest.mark.parametrize("where", ["prepare", "prepare dolly", "prepare raw dolly"])
def test_a_source_file_that_is_no_file(refused, bad, where, what):
    _, arguments = place(where, NO_FILES[what])
    Path("bad/test.jsonl").unlink()
    has(refused(*arguments), "bad")


FIELDS = {  # the field, its values (... : absent), and the places that read it
    "instruction": (
        (..., None, 5, ["a"], {"a": 1}, True, float("nan"), float("inf")),
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
    "ids": (
        ("1 2", 5, [1.5], [-1], [None], [True], ["1"], [[1]], {}, float("nan")),
        ("train", "dev"),
    ),
    "text": (
        (..., None, 5, ["a"], {"a": 1}),
        ("score", "corpus", "pretrain", "corpus, before the stages"),
    ),
    "response": ((..., None, 5, ["a"]), ("prepare raw dolly",)),
    "context": ((..., None, 5), ("prepare raw dolly",)),
}


@pytest.mark.parametrize(
    "field, where", [(field, where) for field, (_, places) in FIELDS.items() for where in places]
)
def test_a_field_of_a_wrong_kind(refused, bad, field, where):
    for value in FIELDS[field][0]:
        row = json.loads(GOOD) | {field: value}
        path, arguments = place(
            where,
            GOOD
            + (json.dumps({name: v for name, v in row.items() if v is not ...}) + "\n").encode(),
        )
        has(refused(*arguments), f"{path}, line 2: ", f"'{field}'", "must be")


@pytest.mark.parametrize("where", ["train", "dev"])
@pytest.mark.parametrize("token", [CONFIG.vocab_size, 10**30])
def test_tokens_beyond_the_vocabulary(refused, bad, where, token):
    _, arguments = place(where, GOOD + (json.dumps(ROW | {"ids": [1, token]}) + "\n").encode())
    has(
        refused(*arguments),
        "data, row 2: 'ids'",
        f"beyond the tokenizer's {CONFIG.vocab_size}",
        "leave 'ids' out",
    )


@pytest.mark.parametrize("count", [1, 3, 5])
def test_responses_and_references_of_different_number(refused, bad, count):
    _, arguments = place("score", GOOD * count)
    has(refused(*arguments), f"{count} responses for 4 rows of references", "row by row")


@pytest.mark.parametrize(
    "where, words",
    [
        ("train", ["train.jsonl", "give more or shorter rows"]),
        ("dev", ["dev.jsonl", "give shorter ones"]),
    ],
)
def test_rows_of_ten_megabytes_are_over_the_limit(refused, bad, where, words):
    row = ROW | {"instruction": "a task that describes " * 450_000}
    _, arguments = place(where, json.dumps(row).encode())
    has(refused(*arguments), *words)


def test_a_corpus_that_is_no_text_or_too_little(refused, bad):
    arguments = [
        "train.py",
        "--method",
        "minillm",
        "--sft-teacher",
        "teacher",
        "--init",
        "student",
        "--data",
        "data",
        "--lm-data",
        "bad/corpus.txt",
    ]
    for content, words in {
        b"": "longer",
        b"\n\n \n": "longer",
        b"a task": "longer",
        b"\xff\xfe": "UTF-8",
    }.items():
        Path("bad/corpus.txt").write_bytes(content)
        has(refused(*arguments), "bad/corpus.txt", words)
    Path("bad/corpus.txt").unlink()
    has(refused(*arguments), "bad/corpus.txt", "no such file")


def test_unusual_lines_that_are_well_formed_are_taken(bad, capsys):
    """A byte-order mark, CRLF, a field twice (the last one counts), numbers that are none in fields that nobody reads, ten megabytes."""
    lines = [
        b'\xef\xbb\xbf{"instruction": "first", "instruction": "Write."}\r\n',
        b'{"instruction": "Write.", "score": NaN, "other": [Infinity, {"a": null}]}\r\n',
        json.dumps({"instruction": "Write.", "input": "a task that describes " * 450_000}).encode(),
    ]
    assert len(lines[2]) > 9_900_000
    path, (_, *arguments) = place("sample", b"".join(lines))
    assert [row.instruction for row in read_rows(path, needs_output=False)] == ["Write."] * 3
    run_command_line(lambda: sample.main([*arguments, "--greedy", "--max-new", "2", "--json"]))
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 3 and after_device(said.err).startswith(
        "1 of 3 requests were shortened to fit"
    )


# ---- checkpoints -------------------------------------------------------------------------------------------------------------------


def read_by(program, folder):
    """The command of a program that reads the model in a folder."""
    return {
        "sample.py": ["sample.py", folder, "--instruction", "Write."],
        "student": ["train.py", "--method", "sft", "--student", folder, "--data", "data"],
        "teacher": ["train.py", "--teacher", folder, "--student", "student", "--data", "data"],
        "student, behind a teacher's stage": [
            "train.py",
            "--teacher",
            "teacher",
            "--student",
            folder,
            "--data",
            "data",
        ],
        "sft-teacher": ["train.py", "--sft-teacher", folder, "--init", "student", "--data", "data"],
        "init": ["train.py", "--sft-teacher", "teacher", "--init", folder, "--data", "data"],
        "init, behind a teacher's stage": [
            "train.py",
            "--teacher",
            "teacher",
            "--init",
            folder,
            "--data",
            "data",
        ],
        "evaluate.py": ["evaluate.py", folder, "--data", "data", "--out", "out"],
        "exposure teacher": [
            "exposure_bias.py",
            "--teacher",
            folder,
            "--students",
            "student",
            "--data",
            "data",
            "--out",
            "out",
        ],
        "exposure student": [
            "exposure_bias.py",
            "--teacher",
            "teacher",
            "--students",
            folder,
            "--data",
            "data",
            "--out",
            "out",
        ],
    }[program]


READERS = (
    "student",
    "teacher",
    "sft-teacher",
    "init",
    "evaluate.py",
    "exposure teacher",
    "exposure student",
)


@pytest.fixture
def broken(world, bad):
    """A copy of the student, for a test to break, as `broken/`."""
    return Path(shutil.copytree(world / "student", bad.parent / "broken")).relative_to(bad.parent)


def change_json(path, **values):
    """Set fields of a JSON file, or take out those given as `...`."""
    fields = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


SIZES = ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions")


@pytest.mark.parametrize("field", SIZES)
def test_a_size_in_config_json_that_is_none(refused, broken, field):
    for value in (
        ...,
        None,
        0,
        -1,
        1.5,
        2.0,
        "2",
        True,
        [2],
        {},
        10**7,
        10**30,
        float("nan"),
        float("inf"),
    ):
        change_json(broken / "config.json", **{field: value})
        has(
            refused(*read_by("sample.py", broken)),
            "broken/config.json",
            f"'{field}'",
            "is missing" if value is ... else "must be a whole number",
        )


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("model_type", "llama", "GPT-2 has 'gpt2'"),
        ("model_type", None, "GPT-2 has 'gpt2'"),
        ("model_type", 2, "GPT-2 has 'gpt2'"),
        ("activation_function", "relu", "GPT-2 has 'gelu_new'"),
        ("layer_norm_epsilon", 1e-6, "GPT-2 has 1e-05"),
        ("layer_norm_epsilon", "1e-5", "GPT-2 has"),
        ("layer_norm_epsilon", float("nan"), "GPT-2 has"),
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
        ("resid_pdrop", float("nan"), "a rate"),
        ("n_head", 5, "can't be divided"),
    ],
)
def test_a_field_of_config_json_that_is_not_gpt2_s(refused, broken, field, value, words):
    change_json(broken / "config.json", **{field: value})
    has(refused(*read_by("sample.py", broken)), "broken/config.json", field, words)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("n_layer", 3, "'h.2.ln_1.weight' is missing"),
        ("n_layer", 1, "config.json belongs to another model"),
        ("n_layer", 100, "is missing"),
        ("n_embd", 64, "does not fit config.json"),
        ("n_embd", 10**6, "does not fit config.json"),
        ("n_positions", 10**6, "does not fit config.json"),
        ("vocab_size", 10**6, "1000000 tokens and its tokenizer"),
        ("vocab_size", CONFIG.vocab_size + 1, "put the model's vocab.json and merges.txt there"),
    ],
)
def test_sizes_that_are_not_the_weights_own(refused, broken, field, value, words):
    change_json(broken / "config.json", **{field: value})
    has(
        refused(*read_by("sample.py", broken)),
        "broken" if field == "vocab_size" else "broken/model.safetensors",
        words,
    )


CONFIG_FILES = {
    "empty": b"",
    "cut off": b'{"n_layer": 2, "n_em',
    "an array": b"[1]",
    "a text": b'"gpt2"',
    "null": b"null",
    "not UTF-8": b'{"a": "\xff"}',
    "zeros": bytes(50),
    "nested": b"[" * 200_000,
    "a web page": b"<!DOCTYPE html>",
    "an endless number": b'{"n_layer": ' + b"9" * 5000 + b"}",
    "a directory": Path.mkdir,
    "missing": missing,
    "a dangling link": dangling,
    "a link to itself": loop,
}


def test_a_config_json_that_is_none(refused, broken):
    path = broken / "config.json"
    for what, content in CONFIG_FILES.items():
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        mend = (
            "a checkpoint directory has config.json"
            if what in ("missing", "a dangling link")
            else "fetch it again"
        )
        has(refused(*read_by("sample.py", broken)), "broken/config.json", mend)


def edit(path, function):
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    tensors = function(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def header(entries, data=b"\0" * 8, length=None):
    """A safetensors file with this header and, if given, a lie about its length."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


DAMAGED = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "zeros": b"\0" * 100,
    "a web page": b"<!DOCTYPE html><html>not found</html>",
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "a header beyond the file": header({"wte.weight": one()}, length=10**6),
    "a header beyond all memory": header({"wte.weight": one()}, length=2**63),
    "a header that is no JSON": header(b"{]"),
    "a header that is not UTF-8": header(b'{"\xff": 1}'),
    "a header of another kind": header({"wte.weight": 5}),
    "a header that is an array": header([1]),
    "a nested header": header(b'{"a":' * 100_000),
    "offsets that overlap": header(
        {"wte.weight": one(), "wpe.weight": one(offsets=(4, 12))}, b"\0" * 12
    ),
    "offsets beyond the file": header({"wte.weight": one(offsets=(0, 800))}),
    "offsets backwards": header({"wte.weight": one(offsets=(8, 0))}),
    "negative offsets": header({"wte.weight": one(offsets=(-8, 0))}),
    "a hole": header({"wte.weight": one(offsets=(4, 12))}, b"\0" * 12),
    "a shape that is not its bytes": header({"wte.weight": one((3,))}),
    "a shape beyond all memory": header({"wte.weight": one((2**40, 2**40))}),
    "a negative shape": header({"wte.weight": one((-2,))}),
    "an unknown type": header({"wte.weight": one(dtype="F33")}),
    "bytes behind the last": header({"wte.weight": one()}, b"\0" * 9),
    "the same name twice": header(b'{"a":%s,"a":%s}' % ((json.dumps(one()).encode(),) * 2)),
}


def test_a_safetensors_file_that_is_damaged(refused, broken):
    for what, content in DAMAGED.items():
        (broken / "model.safetensors").write_bytes(content)
        line = refused(*read_by("sample.py", broken))
        has(
            line,
            "broken/model.safetensors",
            "tensor 'a' is no part" if what == "the same name twice" else "fetch it again",
        )


def test_a_safetensors_file_that_is_cut_short(refused, broken):
    path = broken / "model.safetensors"
    whole = path.read_bytes()
    for share in (0.999, 0.5, 0.1, 0.001):
        path.write_bytes(whole[: int(share * len(whole))])
        has(refused(*read_by("sample.py", broken)), path, "cut short or damaged", "fetch it again")


def with_tensor(name, tensor):
    def change(tensors):
        tensors[name] = tensor if isinstance(tensor, torch.Tensor) else tensor(tensors[name])

    return change


def of_one(value):
    def change(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return change


ATTENTION, GAIN = "h.1.attn.c_attn.weight", "h.0.ln_1.weight"
TENSORS = {
    "one missing": (
        lambda t: {n: v for n, v in t.items() if n != ATTENTION},
        [ATTENTION, "is missing", "fetch the file again"],
    ),
    "none": (lambda t: {"a": torch.zeros(1)}, ["'a'", "config.json belongs to another model"]),
    "one more": (
        with_tensor("h.2.ln_1.weight", torch.zeros(32)),
        ["h.2.ln_1.weight", "config.json belongs to another model"],
    ),
    "a strange one": (
        with_tensor("score.weight", torch.zeros(2, 32)),
        ["score.weight", "config.json belongs to another model"],
    ),
    "NaN": (
        with_tensor(ATTENTION, of_one(float("nan"))),
        [ATTENTION, "not finite", "damaged or its training diverged"],
    ),
    "inf": (
        with_tensor(GAIN, of_one(float("inf"))),
        [GAIN, "not finite", "damaged or its training diverged"],
    ),
    "transposed": (
        with_tensor(ATTENTION, lambda t: t.T),
        [ATTENTION, "(96, 32)", "does not fit config.json"],
    ),
    "too long": (with_tensor(GAIN, torch.zeros(33)), [GAIN, "(33,)", "does not fit config.json"]),
    "a dimension more": (
        with_tensor(GAIN, torch.zeros(1, 32)),
        [GAIN, "(1, 32)", "does not fit config.json"],
    ),
    "a single number": (
        with_tensor(GAIN, torch.tensor(1.0)),
        [GAIN, "()", "does not fit config.json"],
    ),
    "no number": (
        with_tensor(ATTENTION, torch.zeros(0)),
        [ATTENTION, "(0,)", "does not fit config.json"],
    ),
    "whole numbers": (
        with_tensor(GAIN, lambda t: t.long()),
        [GAIN, "int64", "floating-point weights are wanted"],
    ),
    "yes and no": (
        with_tensor(GAIN, lambda t: t > 0),
        [GAIN, "bool", "floating-point weights are wanted"],
    ),
    "complex numbers": (
        with_tensor(GAIN, lambda t: t.to(torch.complex64)),
        [GAIN, "complex64", "floating-point weights are wanted"],
    ),
    "another head": (
        with_tensor("lm_head.weight", torch.zeros(CONFIG.vocab_size, 32)),
        ["lm_head.weight", "differs from 'wte.weight'"],
    ),
    "a head of another size": (
        with_tensor("lm_head.weight", torch.zeros(3, 32)),
        ["lm_head.weight", "differs from 'wte.weight'"],
    ),
}


@pytest.mark.parametrize("what", TENSORS)
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_tensors_that_are_wrong(refused, broken, form, what):
    change, words = TENSORS[what]
    edit(broken / "model.safetensors", change)
    if form == "pytorch_model.bin":
        torch.save(load_file(broken / "model.safetensors"), broken / form)
        (broken / "model.safetensors").unlink()
    has(refused(*read_by("sample.py", broken)), broken / form, *words)


class Executes:
    """A pickle that writes a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def claims_too_much(dtype=torch.float32):
    """A weight of one number that says it has 10^12."""
    return torch.zeros(1, dtype=dtype).expand(10**6, 10**6)


PICKLES = {
    "garbage": lambda path, evil: path.write_bytes(b"garbage"),
    "empty": lambda path, evil: path.write_bytes(b""),
    "cut short": lambda path, evil: (
        torch.save(stored_weights(CONFIG), path),
        path.write_bytes(path.read_bytes()[:-1000]),
    ),
    "code": lambda path, evil: torch.save({"wte.weight": Executes(evil)}, path),
    "code in the old form": lambda path, evil: torch.save(
        {"wte.weight": Executes(evil)}, path, _use_new_zipfile_serialization=False
    ),
    "code in a bare pickle": lambda path, evil: path.write_bytes(pickle.dumps(Executes(evil))),
    "a whole module": lambda path, evil: torch.save(torch.nn.Linear(2, 2), path),
    "a list": lambda path, evil: torch.save([torch.zeros(1)], path),
    "a tensor": lambda path, evil: torch.save(torch.zeros(1), path),
    "numbers": lambda path, evil: torch.save({"wte.weight": 1.0}, path),
    "names that are none": lambda path, evil: torch.save({1: torch.zeros(1)}, path),
    "a training state": lambda path, evil: torch.save(
        {"model": {"wte.weight": torch.zeros(1)}}, path
    ),
    "a sparse tensor": lambda path, evil: torch.save(
        {"wte.weight": torch.eye(3).to_sparse()}, path
    ),
    "a tensor without content": lambda path, evil: torch.save(
        {"wte.weight": torch.zeros(3, device="meta")}, path
    ),
    "a tensor beyond all memory": lambda path, evil: torch.save(
        stored_weights(CONFIG) | {"wte.weight": claims_too_much()}, path
    ),
    "a half tensor beyond all memory": lambda path, evil: torch.save(
        stored_weights(CONFIG) | {"wte.weight": claims_too_much(torch.half)}, path
    ),
    "a head beyond all memory": lambda path, evil: torch.save(
        stored_weights(CONFIG) | {"lm_head.weight": claims_too_much(torch.half)}, path
    ),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle_that_is_damaged_or_executes_code(refused, broken, tmp_path, what):
    (broken / "model.safetensors").unlink()
    PICKLES[what](broken / "pytorch_model.bin", tmp_path / "executed")
    line = refused(*read_by("sample.py", broken))
    has(line, "broken/pytorch_model.bin")
    assert any(
        mend in line
        for mend in (
            "fetch it again",
            "weights by name are wanted",
            "does not fit config.json",
            "differs from 'wte.weight'",
        )
    ), line
    assert not (tmp_path / "executed").exists()


def test_the_pickle_that_executes_code_would_do_so(tmp_path):
    torch.save({"wte.weight": Executes(tmp_path / "executed")}, tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize("what", ["missing", "a directory", "a dangling link", "a link to itself"])
def test_weights_that_are_no_file(refused, broken, what):
    path = broken / "model.safetensors"
    path.unlink()
    NO_FILES[what](path)
    has(
        refused(*read_by("sample.py", broken)),
        path,
        "no such file",
        "a checkpoint directory has config.json and model.safetensors",
    )


@pytest.mark.parametrize(
    "program", [*READERS, "student, behind a teacher's stage", "init, behind a teacher's stage"]
)
@pytest.mark.parametrize("what", ["config", "tokenizer", "nothing"])
def test_a_damaged_model_wherever_one_is_named_before_anything_is_trained(
    refused, broken, program, what
):
    if what == "config":
        change_json(broken / "config.json", n_layer="two")
    elif what == "tokenizer":
        (broken / "merges.txt").write_text("#version: 0.2\na b c\n")
    else:
        shutil.rmtree(broken)
        broken.mkdir()
    line = refused(*read_by(program, broken))
    if program == "evaluate.py" and what == "nothing":
        has(line, "none of the directories has a model", "name a run")
    else:
        has(
            line,
            {
                "config": "broken/config.json",
                "tokenizer": "broken/vocab.json",
                "nothing": "broken/config.json: no such file",
            }[what],
        )


@pytest.mark.parametrize("program", READERS)
def test_damaged_weights_wherever_a_model_is_named(refused, broken, program):
    edit(broken / "model.safetensors", with_tensor(GAIN, of_one(float("nan"))))
    if program in ("evaluate.py", "exposure student"):
        arguments = [*read_by(program, broken), "--rows", "1"] + (
            ["--steps", "2", "--samples", "1"] if program != "evaluate.py" else []
        )
    else:
        arguments = read_by(program, broken)
    has(refused(*arguments), "broken/model.safetensors", GAIN, "not finite")


# ---- tokenizers --------------------------------------------------------------------------------------------------------------------


def change_vocab(function):
    def change(folder):
        vocab = json.loads((folder / "vocab.json").read_text())
        (folder / "vocab.json").write_text(json.dumps(function(vocab)))

    return change


def change_merges(function):
    def change(folder):
        lines = (folder / "merges.txt").read_text().splitlines()
        (folder / "merges.txt").write_text("\n".join(function(lines)) + "\n")

    return change


TOKENIZERS = {
    "vocab.json cut off": lambda f: (f / "vocab.json").write_text('{"!": 0, '),
    "vocab.json empty": lambda f: (f / "vocab.json").write_text(""),
    "vocab.json an array": change_vocab(list),
    "vocab.json null": change_vocab(lambda v: None),
    "vocab.json not UTF-8": lambda f: (f / "vocab.json").write_bytes(b"\xff"),
    "vocab.json nested": lambda f: (f / "vocab.json").write_bytes(b"[" * 200_000),
    "a token missing": change_vocab(lambda v: {t: n for t, n in v.items() if n != 100}),
    "a token more": change_vocab(lambda v: v | {"more": len(v)}),
    "end-of-text missing": change_vocab(lambda v: {t: n for t, n in v.items() if t != END}),
    "end-of-text first": change_vocab(
        lambda v: {t: 0 if t == END else n + 1 for t, n in v.items()}
    ),
    "two tokens of one number": change_vocab(lambda v: v | {"!": 1}),
    "numbers as texts": change_vocab(lambda v: {t: str(n) for t, n in v.items()}),
    "numbers as lists": change_vocab(lambda v: {t: [n] for t, n in v.items()}),
    "a number below 0": change_vocab(lambda v: v | {"!": -1}),
    "merges.txt missing": lambda f: (f / "merges.txt").unlink(),
    "merges.txt a directory": lambda f: ((f / "merges.txt").unlink(), (f / "merges.txt").mkdir()),
    "merges.txt a dangling link": lambda f: (
        (f / "merges.txt").unlink(),
        dangling(f / "merges.txt"),
    ),
    "merges.txt empty": change_merges(lambda lines: []),
    "merges.txt not UTF-8": lambda f: (f / "merges.txt").write_bytes(b"\xff\xfe"),
    "a merge missing": change_merges(lambda lines: lines[:-1]),
    "a merge twice": change_merges(lambda lines: [*lines, lines[-1]]),
    "merges in another order": change_merges(lambda lines: [lines[0], *reversed(lines[1:])]),
    "a merge of one part": change_merges(lambda lines: [*lines[:-1], "a"]),
    "a merge of what is no token": change_merges(lambda lines: [*lines[:-1], "Zq xx"]),
    "a web page": lambda f: (f / "merges.txt").write_text("<!DOCTYPE html>\n<html></html>\n"),
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_tokenizer_whose_files_are_damaged_or_contradict_each_other(refused, broken, what):
    TOKENIZERS[what](broken)
    line = refused(*read_by("sample.py", broken))
    has(line, "broken", "vocab.json", "merges.txt", "again")


@pytest.mark.parametrize("what", ["missing", "a directory", "a dangling link"])
def test_without_a_vocab_json_a_tokenizer_that_cannot_be_downloaded(
    refused, broken, monkeypatch, what
):
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    (broken / "vocab.json").unlink()
    NO_FILES[what](broken / "vocab.json")
    has(
        refused(*read_by("sample.py", broken)),
        "tokenizer 'gpt2': can't be downloaded",
        "TIKTOKEN_CACHE_DIR",
    )


@pytest.mark.parametrize("program", ["sample.py", *READERS])
def test_a_model_and_a_tokenizer_of_different_size(refused, broken, world, program):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(world / "small" / name, broken / name)
    line = refused(*read_by(program, broken))
    if "has 364 tokens and its tokenizer 257".replace(
        "364", str(CONFIG.vocab_size)
    ) not in line.replace("the model has", "has"):
        has(line, "different tokenizers")  # it was held against the other model first


TWO_MODELS = {
    "kd": [
        "train.py",
        "--method",
        "kd",
        "--sft-teacher",
        "TEACHER",
        "--student",
        "student",
        "--data",
        "data",
    ],
    "kd, before the stages": [
        "train.py",
        "--method",
        "kd",
        "--teacher",
        "TEACHER",
        "--student",
        "student",
        "--data",
        "data",
    ],
    "gkd": [
        "train.py",
        "--method",
        "gkd",
        "--sft-teacher",
        "TEACHER",
        "--init",
        "student",
        "--data",
        "data",
    ],
    "minillm": [
        "train.py",
        "--method",
        "minillm",
        "--sft-teacher",
        "TEACHER",
        "--init",
        "student",
        "--data",
        "data",
    ],
    "seqkd": [
        "train.py",
        "--method",
        "seqkd",
        "--sft-teacher",
        "TEACHER",
        "--student",
        "student",
        "--data",
        "data",
    ],
    "promptkd": ["train.py", "--sft-teacher", "TEACHER", "--init", "student", "--data", "data"],
    "promptkd, before the stages": [
        "train.py",
        "--teacher",
        "TEACHER",
        "--student",
        "student",
        "--data",
        "data",
    ],
    "exposure bias": [
        "exposure_bias.py",
        "--teacher",
        "TEACHER",
        "--students",
        "student",
        "--data",
        "data",
    ],
    "exposure bias, the second": [
        "exposure_bias.py",
        "--teacher",
        "student",
        "--students",
        "teacher",
        "TEACHER",
        "--data",
        "data",
    ],
}


@pytest.mark.parametrize("what", TWO_MODELS)
@pytest.mark.parametrize("teacher", ["other", "small"])
def test_teacher_and_student_of_different_tokenizers(refused, bad, what, teacher):
    arguments = [teacher if argument == "TEACHER" else argument for argument in TWO_MODELS[what]]
    has(refused(*arguments), teacher, "student", "have different tokenizers", "needs one for both")


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_model_with_too_few_positions(refused, world, tmp_path, who):
    short = write_checkpoint(tmp_path / "short", replace(CONFIG, n_positions=40), tiny_tokenizer())
    teacher, student = (short, "student") if who == "teacher" else ("teacher", short)
    line = refused("train.py", "--sft-teacher", teacher, "--init", student, "--data", "data")
    has(line, f"the {who} has 40 positions", "take a model with more")


# ---- soft prompts ------------------------------------------------------------------------------------------------------------------

FINITE = ["no finite floating-point tensor 'prompt'", "PromptKD run"]
PROMPTS = {
    "another width": (
        lambda path: save_file({"prompt": soft_prompt(3, 48)}, path),
        ["48 wide and the model 32", "take the teacher"],
    ),
    "another name": (lambda path: save_file({"P": soft_prompt(3)}, path), FINITE),
    "no tensor": (lambda path: save_file({}, path), FINITE),
    "whole numbers": (
        lambda path: save_file({"prompt": torch.ones(3, 32, dtype=torch.long)}, path),
        FINITE,
    ),
    "complex numbers": (
        lambda path: save_file({"prompt": torch.ones(3, 32, dtype=torch.complex64)}, path),
        FINITE,
    ),
    "one dimension": (lambda path: save_file({"prompt": torch.ones(32)}, path), FINITE),
    "three dimensions": (lambda path: save_file({"prompt": torch.ones(1, 3, 32)}, path), FINITE),
    "no row": (lambda path: save_file({"prompt": torch.ones(0, 32)}, path), FINITE),
    "NaN": (lambda path: save_file({"prompt": torch.full((3, 32), float("nan"))}, path), FINITE),
    "too long": (
        lambda path: save_file({"prompt": torch.ones(500, 32)}, path),
        ["exceed the model's 400 positions", "shorten"],
    ),
    "cut short": (
        lambda path: (
            save_file({"prompt": soft_prompt(3)}, path),
            path.write_bytes(path.read_bytes()[:-1]),
        ),
        ["cut short or damaged", "PromptKD run"],
    ),
    "empty": (lambda path: path.write_bytes(b""), ["cut short or damaged", "PromptKD run"]),
    "a pickle": (
        lambda path: torch.save({"prompt": soft_prompt(3)}, path),
        ["cut short or damaged", "PromptKD run"],
    ),
    "missing": (missing, ["no such file", "PromptKD run"]),
    "a dangling link": (dangling, ["no such file", "PromptKD run"]),
    "a directory": (
        Path.mkdir,
        ["prompt.safetensors/prompt.safetensors: no such file", "PromptKD run"],
    ),
}


@pytest.mark.parametrize("what", PROMPTS)
def test_a_soft_prompt_that_does_not_fit(refused, bad, what):
    make, words = PROMPTS[what]
    make(bad / "prompt.safetensors")
    line = refused(
        "sample.py", "student", "--instruction", "Write.", "--prompt", bad / "prompt.safetensors"
    )
    has(line, "" if what == "too long" else bad / "prompt.safetensors", *words)


# ---- runs --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(world, bad):
    """A copy of the finished run, for a test to damage, as `run/`."""
    return Path(shutil.copytree(world / "sft-student-s10", bad.parent / "run")).relative_to(
        bad.parent
    )


RECORD_FILES = {
    "empty": b"",
    "cut off": b'{"name": "sf',
    "an array": b"[]",
    "null": b"null",
    "not UTF-8": b'{"a": "\xff"}',
    "nested": b"[" * 200_000,
}
OF_RUN = {
    "evaluate.py": ["evaluate.py", "run", "--data", "data"],
    "cost": ["evaluate.py", "--cost", "run"],
    "init": ["train.py", "--sft-teacher", "teacher", "--init", "run", "--data", "data"],
    "init best": ["train.py", "--sft-teacher", "teacher", "--init", "run/best", "--data", "data"],
    "sft-teacher": ["train.py", "--sft-teacher", "run", "--init", "student", "--data", "data"],
    "along": ["exposure_bias.py", "--teacher", "teacher", "--along", "run", "--data", "data"],
}


@pytest.mark.parametrize("program", OF_RUN)
def test_a_run_json_that_is_damaged(refused, run, program):
    for content in RECORD_FILES.values():
        (run / "run.json").write_bytes(content)
        has(
            refused(*OF_RUN[program]),
            "run/run.json",
            "complete run" if program == "along" else "train it again",
        )


WRONG_RECORDS = [
    ("name", ...),
    ("name", None),
    ("name", 5),
    ("settings", ...),
    ("settings", []),
    ("settings", "x"),
    ("settings", None),
    ("paper", 5),
    ("paper", ["sft"]),
    ("parameters", "many"),
    ("parameters", 1.5),
    ("hours", "long"),
    ("hours", [1]),
]


@pytest.mark.parametrize("program", ["evaluate.py", "cost", "init"])
def test_a_field_of_run_json_of_a_wrong_kind(refused, run, program):
    sound = (run / "run.json").read_text()
    for field, value in WRONG_RECORDS:
        (run / "run.json").write_text(sound)
        change_json(run / "run.json", **{field: value})
        has(refused(*OF_RUN[program]), "run/run.json", f"'{field}' is wrong", "train it again")


@pytest.mark.parametrize("kind", ["init", "pretrain", "teacher"])
def test_a_run_json_that_does_not_say_what_it_started_from(refused, run, kind):
    for settings in ({}, {"student": None}, {"student": 5}, {"student": ["a"]}):
        change_json(run / "run.json", name=f"{kind}-student", settings=settings)
        has(refused(*OF_RUN["init"]), "run/run.json", "('student')", "train it again")


def test_a_run_that_is_said_to_start_from_itself(bad, run):
    """As where out/init-gpt2 was copied to a folder `gpt2`."""
    change_json(run / "run.json", name="init-run", settings={"student": "run"})
    assert train.base_label("run") == "run" and train.base_label("run/best") == "run"


@pytest.mark.parametrize(
    "values",
    [
        {"paper": "sft"},
        {"paper": ""},
        {"hours": None},
        {"parameters": None},
        {"hours": float("nan")},
    ],
)
def test_strange_values_of_run_json_that_do_no_harm(run, bad, capsys, values):
    change_json(run / "run.json", **values)
    for option in (
        ["--data", "data", "--seeds", "10", "--rows", "1", "--max-new", "2", "--greedy"],
        ["--cost"],
    ):
        run_command_line(
            lambda option=option: evaluate.main(
                ["run", "sft-student-s10", *option, "--out", "out"]
            ),
            InputError,
        )
    shutil.rmtree("out")


def test_a_run_whose_best_step_is_none(refused, run):
    for value in (..., None, 0, -4, 1.5, "4", True, [4]):
        change_json(run / "run.json", best_step=value)
        has(refused(*OF_RUN["along"]), "run/run.json", "'best_step'", "train.py --keep 20")


def test_a_run_without_checkpoints_along_the_way(refused, run):
    shutil.rmtree(run / "kept")
    has(refused(*OF_RUN["along"]), "run/kept", "--keep 20")
    (run / "kept" / "step-000002").mkdir(parents=True)
    has(refused(*OF_RUN["along"]), "run/kept/step-000002/config.json", "no such file")
    (run / "kept" / "step-x").mkdir()
    (run / "kept" / "step-000002").rmdir()
    has(refused(*OF_RUN["along"]), "run/kept", "--keep 20")


@pytest.fixture
def finished(bad, monkeypatch):
    """A finished run of `train.py --method sft --student student --data data` in out/, as far as its run.json goes."""
    arguments = [*SFT, "--data", "data", "--micro-batch", "2"]
    with pytest.raises(pytest.fail.Exception, match="training has begun"):
        train.main(arguments)
    [record] = Path("out").glob("*/run.json")
    record.write_text(
        json.dumps(json.loads(record.read_text()) | {"hours": 0.5, "parameters": 1000})
    )
    train.main(arguments)  # it is skipped now
    return record


@pytest.mark.parametrize(
    "field, value, shown",
    [
        ("lr", 0.5, "lr 0.5"),
        ("data", "other", "data 'other'"),
        ("student", "../student", "student '../student'"),
        ("seed", 11, "seed 11"),
        ("epochs", None, "epochs None"),
        ("global_batch_size", "32", "global_batch_size '32'"),
        ("dropout", ..., "dropout None"),
    ],
)
def test_an_output_directory_of_other_settings(refused, finished, field, value, shown):
    record = json.loads(finished.read_text())
    record["settings"] = {
        name: v for name, v in (record["settings"] | {field: value}).items() if v is not ...
    }
    finished.write_text(json.dumps(record))
    has(
        refused("train.py", *SFT, "--data", "data"),
        finished.parent,
        "was made with",
        shown,
        "choose another --out",
    )


NOT_A_RECORD = {
    "empty": b"",
    "cut off": b'{"settings"',
    "an array": b"[]",
    "no settings": b"{}",
    "not UTF-8": b"\xff",
    "null": b"null",
    "settings null": b'{"settings": null}',
    "settings an array": b'{"settings": []}',
    "nested": b"[" * 200_000,
}


@pytest.mark.parametrize("what", NOT_A_RECORD)
def test_an_output_directory_whose_run_json_is_damaged(refused, finished, what):
    finished.write_bytes(NOT_A_RECORD[what])
    has(refused("train.py", *SFT, "--data", "data"), finished, "is damaged", "remove")


@pytest.mark.parametrize("what", ["garbage", "cut off", "another model's", "code", "a list"])
def test_a_damaged_state_is_one_line_or_the_stage_begins_anew(finished, tmp_path, capsys, what):
    record = json.loads(finished.read_text())
    finished.write_text(
        json.dumps({name: value for name, value in record.items() if name != "hours"})
    )
    path = finished.parent / "state" / "state.pt"
    path.parent.mkdir()
    done = {"step": 1, "best": None, "best_step": None, "hours": 0.0}
    state = {"done": done, "student": {"a": torch.zeros(1)}, "optimizer": {}}
    torch.save({"code": Executes(tmp_path / "executed"), "a list": [1]}.get(what, state), path)
    if what in ("garbage", "cut off"):
        path.write_bytes(b"garbage" if what == "garbage" else path.read_bytes()[:-100])
    with pytest.raises((SystemExit, pytest.fail.Exception)) as left:
        run_command_line(
            lambda: train.main([*SFT, "--data", "data", "--micro-batch", "2"]), InputError
        )
    assert not (tmp_path / "executed").exists()
    if isinstance(left.value, SystemExit):
        has(the_line(left.value.code, capsys.readouterr().err), "state")


def test_kept_responses_that_were_damaged_are_made_anew_and_said(bad, capsys):
    def score(*options):
        run_command_line(
            lambda: evaluate.main(
                [
                    "student",
                    "--data",
                    "data",
                    "--seeds",
                    "10",
                    "--rows",
                    "1",
                    "--max-new",
                    "2",
                    "--out",
                    "out",
                    *options,
                ]
            ),
            InputError,
        )
        assert "Traceback" not in capsys.readouterr().err
        return json.loads(Path("out/table1.json").read_text())["scores"]

    first, kept = score(), Path("out/responses/student/data-s10.jsonl")
    contents = {path: path.read_bytes() for path in (kept, kept.with_suffix(".json"))}
    for path in contents:
        for damage in (b"", b"\xff", b"null", b"[" * 200_000, contents[path][:-3]):
            path.write_bytes(damage)
            assert score() == first
            assert {path: path.read_bytes() for path in contents} == contents


# ---- names -------------------------------------------------------------------------------------------------------------------------

NAMES = [
    "../x",
    "../../etc/x",
    "a/../../b",
    "owner/..",
    "owner/.",
    "../owner",
    "./owner/x",
    "owner/name/more",
    "owner//name",
    "/owner/name",
    "owner/",
    "/",
    "owner/na me",
    "owner/name\n",
    "owner/na\x00me",
    "\x00",
    "owner\\name",
    "~/x",
    "~root/x",
    "owner/name?x=1",
    "owner/name#x",
    "owner/%2e%2e",
    "file:///etc",
    "http://127.0.0.1/x",
    "-",
    ".",
    "..",
    "gpt3",
    "GPT2",
    "gpt2 ",
    "gpt2/",
    "öwner/name",
    "owner/..name..",
    "openai-community/../gpt2",
    "a" * 300,
    "a/" + "b" * 300,
    "./student/config.json",
]
MODELS = {
    "sample.py": ["sample.py", "NAME", "--instruction", "Write."],
    "evaluate.py": ["evaluate.py", "NAME", "--data", "data", "--out", "out"],
    "student": ["train.py", "--method", "sft", "--student", "NAME", "--data", "data"],
    "init": ["train.py", "--teacher", "teacher", "--init", "NAME", "--data", "data"],
    "sft-teacher": ["train.py", "--sft-teacher", "NAME", "--init", "student", "--data", "data"],
    "exposure student": [
        "exposure_bias.py",
        "--teacher",
        "teacher",
        "--students",
        "NAME",
        "--data",
        "data",
    ],
}


@pytest.mark.parametrize("program", MODELS)
def test_names_of_models_that_are_none_ask_no_server_and_lead_nowhere(
    refused, bad, server, program
):
    for name in NAMES:
        line = refused(*[name if argument == "NAME" else argument for argument in MODELS[program]])
        if os.path.isdir(name):
            assert "config.json: no such file" in line or "has a model" in line
        else:
            has(line, "model", "no such directory", "hub id owner/name")
    assert not server.asked


@pytest.mark.parametrize("program", ["train.py", "evaluate.py", "exposure_bias.py"])
def test_names_of_data_sets_that_are_none(refused, bad, program):
    for name in (
        "../x",
        "/etc/nowhere",
        "a/../../b",
        "dolly/../../x",
        "dolly/",
        "Dolly",
        "",
        " ",
        "nowhere\n",
        "a\x00b",
        "a" * 300,
        "x" * 5000,
        "data/test.jsonl",
    ):
        line = refused(program, *NOWHERE[program][:-1], name)
        has(
            line,
            *(
                ["--data is empty"]
                if (program, name) == ("train.py", "")
                else ["data", "no such directory", "give one with train.jsonl"]
            ),
        )


def test_validation_rows_are_read_before_a_teacher_is_asked_for_responses(
    refused, bad, monkeypatch
):
    monkeypatch.setattr("sample.sample", lambda *_, **__: pytest.fail("sampling has begun"))
    (bad / "dev.jsonl").unlink()
    has(
        refused(
            "train.py",
            "--method",
            "seqkd",
            "--sft-teacher",
            "teacher",
            "--student",
            "student",
            "--data",
            "bad",
        ),
        "bad/dev.jsonl: no such file",
    )


@pytest.mark.parametrize("option", ["--sft-teacher", "--init", "--teacher", "--student"])
def test_a_model_that_is_not_there_is_said_before_any_stage(refused, bad, option):
    models = (
        {"--sft-teacher": "teacher", "--init": "student"}
        if option in ("--sft-teacher", "--init")
        else {"--teacher": "teacher", "--student": "student"}
    )
    arguments = [word for pair in (models | {option: "no/where/x"}).items() for word in pair]
    has(
        refused("train.py", *arguments, "--data", "data"),
        "model 'no/where/x': no such directory",
        "give a checkpoint directory",
    )


@pytest.mark.parametrize(
    "revision", ["../../../outside", "/etc", "..", "", "a/b", b"\xff\xfe", "x\n"]
)
def test_a_hub_cache_whose_revision_leads_outside_is_passed_over(
    refused, world, tmp_path, revision
):
    home = tmp_path / "hf" / "hub" / "models--owner--name"
    shutil.copytree(world / "student", tmp_path / "hf" / "outside")
    shutil.copytree(world / "student", home / "snapshots" / "a" / "b")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_bytes(
        revision if isinstance(revision, bytes) else revision.encode()
    )
    shutil.copytree(world / "student", home / "outside")
    for name in ("config.json", "model.safetensors"):
        for folder in (home, home / "snapshots"):
            shutil.copy(world / "student" / name, folder)
    has(
        refused("sample.py", "owner/name", "--instruction", "a"),
        "owner/name",
        "download failed",
        "check the network",
    )


# ---- the network -------------------------------------------------------------------------------------------------------------------

HTML = b"<!DOCTYPE html><html>Sign in</html>"


def serve_model(server, world, **answers):
    names = ("config_json", "model_safetensors", "vocab_json", "merges_txt")
    files = {name: (world / "student" / name.replace("_", ".")).read_bytes() for name in names}
    server.serve("owner/name", **(files | answers))


@pytest.mark.parametrize(
    "answers, words",
    [
        ({"config_json": 404}, ["config.json does not exist", "no Hugging Face model"]),
        ({"model_safetensors": 404}, ["model.safetensors does not exist", "check the name"]),
        ({"model_safetensors": 401}, ["401", "check it"]),
        (
            {"config_json": 500},
            ["config.json: download failed 3 times", "500", "check the network"],
        ),
        ({"vocab_json": 503}, ["vocab.json: download failed 3 times", "503", "check the network"]),
        ({"config_json": HTML}, ["config.json", "can't be read", "fetch it again"]),
        ({"model_safetensors": HTML}, ["model.safetensors", "damaged", "fetch it again"]),
        ({"vocab_json": HTML}, ["vocab.json and merges.txt", "fetch them again"]),
        ({"merges_txt": HTML}, ["vocab.json", "merges.txt", "fetch both again"]),
        ({"merges_txt": 404}, ["vocab.json and merges.txt", "fetch them again"]),
        ({"config_json": b""}, ["config.json", "can't be read", "fetch it again"]),
        ({"model_safetensors": b""}, ["model.safetensors", "damaged", "fetch it again"]),
        (
            {"model_safetensors": Short(b"x" * 1000)},
            ["model.safetensors", "damaged", "fetch it again"],
        ),
    ],
)
@pytest.mark.parametrize("program", ["sample.py", "train.py"])
def test_a_hub_that_answers_wrongly(world, tmp_path, server, capsys, program, answers, words):
    serve_model(server, world, **answers)
    arguments = {
        "sample.py": ["owner/name", "--instruction", "a"],
        "train.py": [*SFT[:3], "owner/name", "--data", "data"],
    }[program]
    with pytest.raises(SystemExit) as left:
        run_command_line(lambda: PROGRAMS[program].main(arguments))
    has(the_line(left.value.code, capsys.readouterr().err), *words)
    folder = tmp_path / "torch" / "hub" / "promptkd" / "owner" / "name"
    assert {path.name for path in folder.iterdir()} <= {
        "config.json",
        "model.safetensors",
        "vocab.json",
        "merges.txt",
    }  # no half file
    assert not list(folder.glob(".*")) and all(
        path.is_relative_to(folder) for path in (tmp_path / "torch").rglob("*") if path.is_file()
    )


@pytest.mark.parametrize(
    "answer, words",
    [
        (404, ["does not exist", "--source DIR"]),
        (500, ["download failed 3 times", "check the network"]),
        (403, ["403", "check it"]),
        (HTML, ["valid.jsonl, line 1: is not JSON", "the download is removed"]),
        (b"", ["valid.jsonl: has no rows", "the download is removed"]),
        (Short(GOOD), ["valid.jsonl, line 1: is not JSON", "the download is removed"]),
    ],
)
@pytest.mark.parametrize(
    "arguments",
    [["data.prepare", "vicuna"], ["evaluate.py", "student", "--data", "vicuna"]],
    ids=["prepare", "evaluate"],
)
def test_a_hub_that_answers_wrongly_for_a_data_set(refused, server, answer, words, arguments):
    server.answers["/datasets/MiniLLM/Vicuna/resolve/main/valid.jsonl"] = answer
    has(refused(*arguments), "valid.jsonl", *words)


def test_a_data_set_without_a_network(refused):
    has(
        refused("data.prepare", "sinst"),
        "11_/valid.jsonl",
        "download failed 3 times",
        "check the network",
    )
    has(
        refused("train.py", "--student", "student"),
        "dolly/resolve/main/raw.jsonl",
        "download failed 3 times",
        "check the network",
    )


# ---- where results go --------------------------------------------------------------------------------------------------------------

WRITERS = {
    "train.py": [*SFT, "--data", "data"],
    "train.py, before the stages": [
        "--teacher",
        "teacher",
        "--student",
        "student",
        "--data",
        "data",
    ],
    "evaluate.py": ["student", "--data", "data"],
    "evaluate.py, cost": ["sft-student-s10", "--cost"],
    "exposure_bias.py": ["--teacher", "teacher", "--students", "student", "--data", "data"],
}
NOT_TO_WRITE_IN = {
    "a file": "corpus.jsonl",
    "below a file": "corpus.jsonl/x/y",
    "a dangling link": "bad/link",
    "below one": "bad/link/x",
    "a link to itself": "bad/loop",
}


@pytest.mark.parametrize("program", WRITERS)
@pytest.mark.parametrize("what", NOT_TO_WRITE_IN)
def test_an_output_directory_that_can_be_none_is_said_at_once(
    refused, bad, monkeypatch, program, what
):
    dangling(bad / "link"), loop(bad / "loop")
    monkeypatch.setattr("sample.sample", lambda *_, **__: pytest.fail("sampling has begun"))
    line = refused(program.split(",")[0], *WRITERS[program], "--out", NOT_TO_WRITE_IN[what])
    has(
        line,
        f"--out {NOT_TO_WRITE_IN[what]}",
        "is no directory that can be written to",
        "choose another",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("program", WRITERS)
def test_an_output_directory_without_permission(refused, bad, program):
    (bad / "mine").mkdir(mode=0o555)
    has(
        refused(program.split(",")[0], *WRITERS[program], "--out", "bad/mine/out"),
        "--out bad/mine/out",
        "can be written to",
        "choose another",
    )


def test_an_output_directory_without_permission_as_anyone(refused, bad, monkeypatch):
    """The same, told by the system's answer: root has every permission."""
    monkeypatch.setattr("data.hub.os.access", lambda path, mode: False)
    has(
        refused("evaluate.py", *WRITERS["evaluate.py"], "--out", "bad/mine/out"),
        "--out bad/mine/out",
        "can be written to",
        "choose another",
    )


def prepare_vicuna(bad):
    (bad / "train.jsonl").unlink()  # as in `place`
    return ["data.prepare", "vicuna", "--source", "bad"]


FULL = {
    "evaluate.py": lambda bad: [
        "evaluate.py",
        "student",
        "--data",
        "data",
        "--seeds",
        "10",
        "--max-new",
        "2",
        "--out",
        "out",
    ],
    "cost": lambda bad: ["evaluate.py", "sft-student-s10", "--cost", "--out", "out"],
    "score": lambda bad: [
        "evaluate.py",
        "--score",
        "bad/score.jsonl",
        "--references",
        "data/test.jsonl",
        "--json",
        "bad/s.json",
    ],
    "data.prepare": prepare_vicuna,
    "exposure_bias.py": lambda bad: [
        "exposure_bias.py",
        "--teacher",
        "teacher",
        "--students",
        "student",
        "--data",
        "data",
        "--steps",
        "2",
        "--samples",
        "1",
        "--out",
        "out",
    ],
    "train.py": lambda bad: ["train.py", *SFT, "--data", "data"],
}


@pytest.mark.parametrize("program", FULL)
def test_a_full_disk(refused, bad, monkeypatch, program):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = FULL[program](bad)
    monkeypatch.setattr("data.hub.os.fsync", full)
    line = refused(*arguments)
    has(
        line,
        "No space left on device",
        {"score": "s.json", "data.prepare": "test.jsonl"}.get(program, "out"),
    )


@pytest.mark.parametrize("program", FULL)
def test_a_file_that_the_system_will_not_let_grow(refused, bad, program):
    """As a quota or a full disk does: a write that fails in the system itself."""
    arguments, limits = FULL[program](bad), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        line = refused(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    has(
        line,
        "File too large",
        {"score": "s.json", "data.prepare": "test.jsonl"}.get(program, "out"),
    )


@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, missing], ids=["a directory", "a pipe", "below a file"]
)
def test_a_file_of_results_that_can_be_none(refused, bad, make):
    """A pipe, as /dev/stdout may be, is not replaced by a file."""
    path = bad / "scores" if make is not missing else bad / "test.jsonl" / "scores"
    make(path)
    has(
        refused(
            "evaluate.py",
            "--score",
            "bad/score.jsonl",
            "--references",
            "bad/test.jsonl",
            "--json",
            path,
        ),
        bad,
    )


def test_weights_that_do_not_fit_on_the_disk(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises((OSError), match="model.safetensors"):
            save(tiny_model(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(tmp_path) == {}


def test_a_config_json_that_does_not_fit_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("model.save_tensors", lambda *_: None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises((OSError), match="config.json"):
            save(tiny_model(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(tmp_path) == {}


def test_a_download_with_a_full_disk_leaves_no_half_file(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    server.answers["/x"] = b"content"
    monkeypatch.setattr("data.hub.os.fsync", full)
    with pytest.raises(OSError, match="No space left on device.*x"):
        download(f"{server.url}/x", tmp_path / "d" / "x")
    assert list((tmp_path / "d").iterdir()) == []


def test_an_existing_file_outlives_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomic(tmp_path / "x", "old")
    monkeypatch.setattr("data.hub.os.fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*x'"):
        write_atomic(tmp_path / "x", "new")
    assert (
        snapshot(tmp_path).keys() == {str(tmp_path / "x")} and (tmp_path / "x").read_text() == "old"
    )


# ---- in processes of their own -------------------------------------------------------------------------------------------------------

PROCESSES = {
    "train.py": (["train.py", *SFT, "--data", "data", "--lr", "0"], ["--lr", "must be above 0"]),
    "train.py, data": (
        ["train.py", *SFT, "--data", "bad"],
        ["bad/train.jsonl, line 2", "is not JSON"],
    ),
    "sample.py": (
        ["sample.py", "broken", "--instruction", "a"],
        ["broken/pytorch_model.bin", "holds more than tensors"],
    ),
    "exposure_bias.py": (
        ["exposure_bias.py", "--teacher", "other", "--students", "student", "--data", "data"],
        ["different tokenizers"],
    ),
    "data.prepare": (
        ["-m", "data.prepare", "vicuna", "--source", "nowhere"],
        ["nowhere: has no valid.jsonl"],
    ),
}


def in_process(home, *arguments, **how):
    """A command as a person starts it, in their own folder, with the project on the path."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "MPLBACKEND": "Agg",
    }
    arguments = [ROOT / a if str(a).endswith(".py") else a for a in arguments]
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=home,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        **how,
    )


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_ends_with_status_2_and_one_line(world, bad, broken, tmp_path, name):
    (bad / "train.jsonl").write_bytes(GOOD + GOOD[:30])
    (broken / "model.safetensors").unlink()
    torch.save({"wte.weight": Executes(tmp_path / "executed")}, broken / "pytorch_model.bin")
    before = snapshot(world, tmp_path)
    arguments, words = PROCESSES[name]
    done = in_process(bad.parent, *arguments, stdout=subprocess.PIPE)
    has(the_line(done.returncode, done.stderr), *words)
    assert snapshot(world, tmp_path) == before and not (tmp_path / "executed").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_screen_that_is_a_full_disk(bad):
    with open("/dev/full", "w") as full:
        done = in_process(
            bad.parent,
            "evaluate.py",
            "--score",
            "bad/score.jsonl",
            "--references",
            "data/test.jsonl",
            stdout=full,
        )
    has(the_line(done.returncode, done.stderr), "No space left on device")


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="a small disk of its own wants root"
)
def test_a_disk_that_is_really_full(bad):
    """A file system of eight kilobytes, in a mount namespace that ends with the process."""
    small = bad.parent / "small disk"
    small.mkdir()
    arguments = [
        ROOT / "evaluate.py",
        "--score",
        "bad/score.jsonl",
        "--references",
        "data/test.jsonl",
        "--json",
        small / "s.json",
    ]
    line = f'mount -t tmpfs -o size=8k none "{small}" && head -c 8192 /dev/zero > "{small}/other"; "$@"; s=$?; ls -A "{small}"; exit $s'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", line, "sh", sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip("file systems can't be mounted here")
    has(the_line(done.returncode, done.stderr), "No space left on device", "s.json")
    assert done.stdout.splitlines()[-1] == "other"


def test_two_ranks_print_the_line_once(bad):
    (bad / "train.jsonl").write_bytes(GOOD + GOOD[:30])
    before = snapshot(bad.parent)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
    ]
    done = in_process(
        bad.parent, *launcher, "train.py", *SFT, "--data", "bad", stdout=subprocess.PIPE
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(said) == 1 and snapshot(bad.parent) == before
    has(said[0], "bad/train.jsonl, line 2: is not JSON")
    mine, of_torchrun = done.stderr.split(said[0])
    assert "Traceback" not in mine and "exitcode  : 2" in of_torchrun
