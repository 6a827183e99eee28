"""Ranks that have copies of their own: each host, or each working directory, its own files."""

import json
import os
from pathlib import Path

import pytest
from helpers import files_below, fork_ranks, wait_for, write_checkpoint, write_rows
from test_resume import no_plots  # noqa: F401
from test_train import STUDENT, TEACHER, TOKENIZER, demo_rows, world  # noqa: F401

import evaluate
import exposure_bias
import train
from data.models import copies, sampling
from data.models.copies import check_same_files, check_shared_out
from data.process import dist
from data.process.errors import InputError

HOST = dist.socket.gethostname()
FIX = "make them equal"


def on_ranks(tmp_path, directories, function):
    """Call a function on one rank per directory, with that as its working directory. Returns what
    each rank's call returns."""

    def command():
        rank = int(os.environ["RANK"])
        os.chdir(directories[rank])
        dist.init_process()
        (tmp_path / f"{rank}.json").write_text(json.dumps(function()))
        dist.shutdown()

    n = len(directories)
    assert wait_for(fork_ranks(command, n, tmp_path / "log"), 60) == [0] * n
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(n)]


def message_of(function, *arguments):
    """The message of the InputError that a call raises, None if it raises none."""
    try:
        function(*arguments)
    except InputError as error:
        return str(error)


@pytest.fixture
def nodes(tmp_path):
    """The working directories of two nodes, each with its own copies of models and data."""
    for node in (tmp_path / "a", tmp_path / "b"):
        write_checkpoint(node / "student", STUDENT, TOKENIZER)
        write_checkpoint(node / "teacher", TEACHER, TOKENIZER)
        for split in ("train", "dev", "test"):
            rows = demo_rows("train" if split == "train" else "dev")
            values = [{"instruction": r.instruction, "output": r.references[0]} for r in rows]
            write_rows(node / "my" / f"{split}.jsonl", values)
    return tmp_path / "a", tmp_path / "b"


def differ(name, nodes, missing=False):
    """The message about two nodes with different copies, of which the second may be missing."""
    first, second = (f"{HOST}:{node / name}" for node in nodes)
    second += " (No such file or directory)" if missing else ""
    return f"{name}: the ranks' copies differ: {first}, {second}; {FIX}"


def test_a_difference_is_reported_with_the_file_and_the_hosts(tmp_path, nodes):
    a, b = nodes
    for name in ("equal", "other"):
        (a / name).write_text("a")
    (b / "equal").write_text("a")
    (b / "other").write_text("b")
    (a / "missing").write_text("a")
    models = {}
    for file in ("config.json", "model.safetensors", "vocab.json", "merges.txt"):
        models[file] = f"model with another {file}"
        for node in nodes:
            write_checkpoint(node / models[file], STUDENT, TOKENIZER)
        with open(b / models[file] / file, "a") as changed:
            changed.write(" ")

    def compare():
        found = [message_of(check_same_files, ["equal", name]) for name in ("other", "missing")]
        found += [message_of(check_same_files, [], [name]) for name in models.values()]
        same = message_of(check_same_files, ["equal", "nowhere"], ["student"])
        return [same, *found]

    expected = [None, differ("other", nodes), differ("missing", nodes, missing=True)]
    expected += [differ(f"{name}/{file}", nodes) for file, name in models.items()]
    assert on_ranks(tmp_path, nodes, compare) == [expected] * 2


def test_copies_are_hashed_by_one_rank_each_and_shared_files_by_none(tmp_path, nodes):
    hashed, file_hash = [], copies.file_hash

    def compare():
        copies.socket.gethostname = lambda: f"host {dist.rank()}"  # with a file system in common
        copies.file_hash = lambda path: hashed.append(path) or file_hash(path)
        check_same_files(["my/train.jsonl"], ["student"])
        return hashed

    a, b = nodes
    model = [f"student/{name}" for name in ("config.json", "model.safetensors")]
    files = ["my/train.jsonl", *model, "student/vocab.json", "student/merges.txt"]
    assert on_ranks(tmp_path, [a, b, b], compare) == [files, files, []]
    assert on_ranks(tmp_path, [a, a], compare) == [[], []]


COMMANDS = {
    "my/train.jsonl": (train, "--method sft --student student --data my --steps 1"),
    "my/dev.jsonl": (train, "--method gkd --init student --sft-teacher teacher --data my"),
    "teacher/config.json": (train, "--init student --sft-teacher teacher --data my"),
    "student/config.json": (train, "--method sft --student student --data my"),
    "my/test.jsonl": (evaluate, "student --data my --max-new 8"),
    "student/vocab.json": (evaluate, "student --data my --max-new 8"),
    "my/test.jsonl ": (exposure_bias, "--teacher teacher --students student --data my"),
    "teacher/merges.txt": (exposure_bias, "--teacher teacher --students student --data my"),
    "student/merges.txt": (sampling, "student --instruction x"),
}


def test_commands_refuse_other_copies_before_they_use_them(tmp_path, nodes):
    """A file with one line less would leave one rank waiting for the other."""

    def run_all():
        found = {}
        for name, (command, arguments) in COMMANDS.items():
            path = Path(name.strip())
            content = path.read_bytes()
            if dist.rank() == 1:
                lines = content.splitlines(keepends=True)
                path.write_bytes(b"".join(lines[:-1]) or content + b" ")
            out = [] if command is sampling else ["--out", str(tmp_path / "out")]
            found[name] = message_of(command.main, [*arguments.split(), *out])
            path.write_bytes(content)
        return found

    expected = {name: differ(name.strip(), nodes) for name in COMMANDS}
    assert on_ranks(tmp_path, nodes, run_all) == [expected] * 2
    assert not (tmp_path / "out").exists()


def test_stages_that_read_each_other_need_a_directory_that_all_ranks_share(tmp_path, nodes):
    shared = tmp_path / "not" / "there"

    def run_all():
        arguments = "--method gkd --student student --sft-teacher teacher --data my --out".split()
        return [message_of(train.main, [*arguments, "out"]), message_of(check_shared_out, shared)]

    before = files_below(tmp_path)
    problem = f"{HOST}:{nodes[0]}/out is not {HOST}:{nodes[1]}/out"
    fix = "give a directory that all ranks share, because later stages read it"
    expected = [f"--out out: {problem}; {fix}", None]
    assert on_ranks(tmp_path, nodes, run_all) == [expected] * 2
    assert set(files_below(tmp_path)) - set(before) == {"log0", "log1", "0.json", "1.json"}


def test_equal_copies_are_trained_on(tmp_path, nodes):
    arguments = COMMANDS["my/train.jsonl"][1].split()
    on_ranks(tmp_path, nodes, lambda: train.main([*arguments, "--out", str(tmp_path / "out")]))
    [record] = (tmp_path / "out").glob("*/run.json")
    assert json.loads(record.read_text())["complete"]
