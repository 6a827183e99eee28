"""Data-parallel ranks: two processes under torchrun over gloo, and one alone."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_command

from data import dist
from data.cli import InputError

SCRIPT = """
import json, os, sys, time
from pathlib import Path

import torch

from data import dist
from data.cli import InputError
from data.cli import run_command_line as command
from data.hub import find_model_dir as model_directory

folder, what = Path(sys.argv[1]), sys.argv[2]


def called(value):
    with open(folder / f"called by {os.environ['RANK']}", "a") as file:
        file.write("x")
    return value


def refuse():
    raise InputError("rows.jsonl, line 3: is empty")


def missing():
    open(folder / "no such file")


def caught(function):
    try:
        dist.run_on_rank0(function)
    except InputError as error:
        return str(error)


def everything():
    torch.set_num_threads(16)
    device, _ = dist.init_process()
    assert dist.init_process()[0] == device
    me = dist.rank()
    said = {"rank": me, "world": dist.world_size(), "device": device.type, "threads": torch.get_num_threads()}
    said["gathered"] = [dist.all_gather_list([[f"{me}a"], [f"{me}a", f"{me}b", f"{me}c"]][me]), dist.all_gather_list([[], [7]][me]), dist.all_gather_list([])]
    tensor = torch.tensor([1.5, -2.0]) * (me + 1)
    said["in place"] = dist.all_reduce_sum(tensor) is tensor
    said["sums"] = [tensor.tolist(), dist.all_reduce_sum(torch.tensor(3 + me)).item(), dist.all_reduce_sum(torch.tensor([2.0**-60 * me], dtype=torch.float64)).item()]
    said["on first"] = dist.run_on_rank0(called, {"a": [me, None]})
    said["nothing"] = dist.run_on_rank0(called, None)
    said["errors"] = [caught(refuse), caught(missing)]
    said["model"] = str(dist.run_on_rank0(model_directory, "a/b"))
    if me == 1:
        time.sleep(0.5)
    said["before"] = time.time()
    dist.barrier()
    said["after"] = time.time()
    (folder / f"{me}.json").write_text(json.dumps(said))
    dist.shutdown()


def main():
    if what == "everything":
        everything()
    elif what == "before they meet":
        refuse()
    elif what == "on the first":
        dist.init_process()
        dist.run_on_rank0(refuse)
    elif what == "on the second alone":
        dist.init_process()
        if dist.rank() == 1:
            refuse()
        dist.barrier()
    elif what == "a bug on the first":
        dist.init_process()
        dist.run_on_rank0(lambda: 1 / 0)
    print("went on", flush=True)


command(main)
"""


def torchrun(folder, what, **environment):
    """Run the script on two ranks. Returns the finished run and its seconds."""
    (folder / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    options = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
    ]
    done = run_command(
        *options,
        folder / "script.py",
        folder,
        what,
        PYTHONPATH=str(ROOT),
        no_proxy="127.0.0.1",
        **environment,
    )
    return done, time.monotonic() - begun


def test_two_ranks_agree_on_what_they_gather_add_up_and_read(server, tmp_path):
    server.serve("a/b", model_safetensors=b"w" * 1000, config_json=b"{}")
    done, _ = torchrun(
        tmp_path,
        "everything",
        HF_ENDPOINT=server.url,
        TORCH_HOME=str(tmp_path),
        HF_HOME=str(tmp_path / "hf"),
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [(said["rank"], said["world"], said["device"]) for said in (first, second)] == [
        (0, 2, "cpu"),
        (1, 2, "cpu"),
    ]
    for said in (first, second):
        assert said["gathered"] == [["0a", "1a", "1b", "1c"], [7], []]  # in the order of ranks
        assert said["sums"] == [[4.5, -6.0], 7, 2.0**-60] and said["in place"]
        assert (
            said["on first"] == {"a": [0, None]} and said["nothing"] is None
        )  # rank 0's arguments
        assert (
            said["errors"][0] == "rows.jsonl, line 3: is empty"
            and "no such file" in said["errors"][1]
        )
        assert said["model"] == str(tmp_path / "hub/promptkd/a/b")
        assert 1 <= said["threads"] <= max(1, os.cpu_count() // 2)  # the ranks share the cores
    assert (tmp_path / "called by 0").read_text() == "xx" and not (
        tmp_path / "called by 1"
    ).exists()
    assert sorted(path.rsplit("/", 1)[-1] for path in server.asked) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "vocab.json",
    ]  # once, not twice
    assert first["after"] >= second["before"] > first["before"]  # the barrier made rank 0 wait


@pytest.mark.parametrize("where", ["before they meet", "on the first", "on the second alone"])
def test_an_input_error_ends_all_ranks_with_one_line_before_torchrun_s_own(tmp_path, where):
    done, seconds = torchrun(tmp_path, where)
    assert done.returncode == 1 and "went on" not in done.stdout
    lines = done.stderr.split("\n")
    errors = [n for n, line in enumerate(lines) if line.startswith("error:")]
    assert [lines[n] for n in errors] == ["error: rows.jsonl, line 3: is empty"]
    torchruns = [
        n
        for n, line in enumerate(lines)
        if "failed (exitcode" in line or "ChildFailedError" in line
    ]
    assert torchruns and errors[0] < min(torchruns)
    assert (
        "InputError" not in done.stderr and seconds < 60
    )  # no traceback of ours, and nobody waits for a peer that is gone


@pytest.mark.slow
def test_a_bug_on_the_first_rank_ends_the_others_with_its_traceback(tmp_path):
    done, seconds = torchrun(tmp_path, "a bug on the first")
    assert (
        done.returncode == 1
        and "ZeroDivisionError" in done.stderr
        and "went on" not in done.stdout
        and seconds < 60
    )


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_torchrun_everything_is_the_identity(alone):
    threads = torch.get_num_threads()
    assert (
        dist.init_process() == (torch.device("cpu"), "float32")
        and torch.get_num_threads() == threads
    )
    assert not torch.distributed.is_initialized() and (dist.rank(), dist.world_size()) == (0, 1)
    items, tensor = ["a", "b"], torch.tensor([1.0, 2.0])
    assert dist.all_gather_list(items) == ["a", "b"] and dist.all_gather_list([]) == []
    assert dist.all_reduce_sum(tensor) is tensor and tensor.tolist() == [1.0, 2.0]
    assert dist.run_on_rank0(lambda *arguments: arguments, 1, "b") == (1, "b")
    assert dist.barrier() is None and dist.shutdown() is None


def test_alone_on_first_raises_what_it_meets(alone):
    def refuse(error):
        raise error

    with pytest.raises(InputError, match="^one line$"):
        dist.run_on_rank0(refuse, InputError("one line"))
    with pytest.raises(InputError, match="No such file.*missing"):
        dist.run_on_rank0(Path("missing").read_text)
    with pytest.raises(ZeroDivisionError):
        dist.run_on_rank0(refuse, ZeroDivisionError())


@pytest.mark.parametrize(
    "cores, local_ranks, had, wanted",
    [(16, 8, 16, 2), (2, 2, 2, 1), (2, 8, 2, 1), (16, 2, 1, 1), (None, 2, 4, 1), (64, 2, 8, 8)],
)
def test_the_threads_of_all_ranks_fit_the_cores(
    alone, monkeypatch, cores, local_ranks, had, wanted
):
    threads = [had]
    monkeypatch.setattr(dist, "world_size", lambda: local_ranks)
    monkeypatch.setattr(dist.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    dist.init_process()
    assert threads[-1] == wanted
