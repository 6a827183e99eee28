"""Data-parallel ranks: two processes over gloo, and one alone."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, fork_ranks, run_command, torchrun, wait_for

from data.models.hub import find_model_dir
from data.models.tokenizer import TOKENIZER_FILES
from data.process import command_line, dist
from data.process.errors import InputError

# ---- two ranks ---------------------------------------------------------------------------------


def refuse():
    raise InputError("rows.jsonl, line 3: is empty")


def error_on_rank0(function):
    try:
        dist.run_on_rank0(function)
    except InputError as error:
        return str(error)


def use_everything(directory):
    """Call every function of dist, and write what it returns to `directory`/RANK.json."""

    def record_call(value):
        with open(directory / f"called by {os.environ['RANK']}", "a") as file:
            file.write("x")
        return value

    torch.set_num_threads(16)
    device, _ = dist.init_process()
    assert dist.init_process()[0] == device
    rank = dist.rank()
    lists = [[f"{rank}a"], [f"{rank}a", f"{rank}b", f"{rank}c"]]
    tensor = torch.tensor([1.5, -2.0]) * (rank + 1)
    small = torch.tensor([2.0**-60 * rank], dtype=torch.float64)
    sent = torch.tensor([0.5, 0.25]) + rank
    dist.send_to_rank0(sent, 1)
    results = {
        "rank": [rank, dist.world_size(), device.type],
        "threads": torch.get_num_threads(),
        "shard": dist.shard(list("abcde")),
        "gathered": [
            dist.all_gather_list(lists[rank]),
            dist.all_gather_list([[], [7]][rank]),
            dist.all_gather_list([]),
        ],
        "in place": dist.all_reduce_sum(tensor) is tensor,
        "sums": [
            tensor.tolist(),
            dist.all_reduce_sum(torch.tensor(3 + rank)).item(),
            dist.all_reduce_sum(small).item(),
        ],
        "sent": sent.tolist(),
        "on rank 0": dist.run_on_rank0(record_call, {"a": [rank, None]}),
        "nothing": dist.run_on_rank0(record_call, None),
        "errors": [error_on_rank0(refuse), error_on_rank0((directory / "no such file").read_text)],
        "model": str(dist.run_on_rank0(find_model_dir, "a/b")),
    }
    (directory / f"{rank}.json").write_text(json.dumps(results))
    dist.shutdown()


def test_two_ranks_gather_reduce_and_read_files_once(server, tmp_path, monkeypatch):
    server.serve("a/b", model_safetensors=b"w" * 1000, config_json=b"{}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    processes = fork_ranks(lambda: use_everything(tmp_path), 2, tmp_path / "log")
    assert wait_for(processes, 60) == [0, 0], (tmp_path / "log0").read_text()
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [result["rank"] for result in results] == [[0, 2, "cpu"], [1, 2, "cpu"]]
    assert [result["shard"] for result in results] == [["a", "c", "e"], ["b", "d"]]
    for result in results:
        assert result["gathered"] == [["0a", "1a", "1b", "1c"], [7], []]  # in the order of ranks
        assert result["sums"] == [[4.5, -6.0], 7, 2.0**-60] and result["in place"]
        assert result["sent"] == [1.5, 1.25]  # rank 1's
        assert result["on rank 0"] == {"a": [0, None]}  # rank 0's arguments
        assert result["nothing"] is None
        assert result["errors"][0] == "rows.jsonl, line 3: is empty"
        assert "no such file" in result["errors"][1]
        assert result["model"] == str(tmp_path / "hub/promptkd/a/b")
        assert 1 <= result["threads"] <= max(1, os.cpu_count() // 2)  # the ranks share the cores
    assert (tmp_path / "called by 0").read_text() == "xx"
    assert not (tmp_path / "called by 1").exists()
    requested = sorted(path.rsplit("/", 1)[-1] for path in server.asked)
    assert requested == sorted(["config.json", "model.safetensors", *TOKENIZER_FILES])


def fail_before_init():
    refuse()


def fail_on_rank0():
    dist.init_process()
    dist.run_on_rank0(refuse)


def end_rank(seconds):
    """In place of time.sleep: what torchrun does while a rank delays its error."""
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("command", [fail_before_init, fail_on_rank0])
def test_rank_0_reports_an_error_of_all_ranks_first(tmp_path, monkeypatch, command):
    """The others delay the same line, and torchrun ends them before they print it."""
    monkeypatch.setattr(command_line, "time", SimpleNamespace(sleep=end_rank))
    assert wait_for(fork_ranks(command, 2, tmp_path / "log"), 60) == [2, -signal.SIGTERM]
    lines = (tmp_path / "log0").read_text().splitlines()
    assert [line for line in lines if not line.startswith(("device: ", "warning: "))] == [
        "error: rows.jsonl, line 3: is empty"
    ]
    assert (tmp_path / "log1").read_text() == ""


SCRIPT = """
import sys
from data.process import command_line, dist, errors, files

def main():
    dist.init_process()
    if sys.argv[1] == "an error on rank 1":
        if dist.rank() == 1:
            raise errors.InputError("rows.jsonl, line 3: is empty")
        dist.all_gather_list([])
    else:
        dist.run_on_rank0(lambda: 1 / 0)
    print("continued", flush=True)

command_line.time.sleep = lambda seconds: None
command_line.run_command_line(main)
"""


@pytest.mark.parametrize(
    "case, line",
    [
        ("an error on rank 1", "error: rows.jsonl, line 3: is empty"),
        pytest.param(
            "a bug on rank 0", "ZeroDivisionError: division by zero", marks=pytest.mark.slow
        ),
    ],
)
def test_torchrun_ends_the_other_rank_after_the_error(tmp_path, case, line):
    (tmp_path / "script.py").write_text(SCRIPT)
    start = time.monotonic()
    process = run_command(*torchrun(2), tmp_path / "script.py", case, PYTHONPATH=str(ROOT))
    assert process.returncode == 1 and "continued" not in process.stdout
    before, _, after = process.stderr.partition(line)
    assert after and line not in after
    assert "failed (exitcode" not in before and "ChildFailedError" in after
    assert ("Traceback" in before) == line.startswith("ZeroDivisionError")
    assert time.monotonic() - start < 60  # rank 0 does not wait for the peer that is gone


# ---- one rank alone ----------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun_nothing_communicates(alone):
    threads = torch.get_num_threads()
    assert dist.init_process() == (torch.device("cpu"), "float32")
    assert torch.get_num_threads() == threads and not torch.distributed.is_initialized()
    assert (dist.rank(), dist.world_size()) == (0, 1)
    tensor = torch.tensor([1.0, 2.0])
    assert dist.all_reduce_sum(tensor) is tensor and tensor.tolist() == [1.0, 2.0]
    assert dist.shard(["a", "b"]) == ["a", "b"]
    assert dist.all_gather_list(["a", "b"]) == ["a", "b"] and dist.all_gather_list([]) == []
    assert dist.run_on_rank0(lambda *arguments: arguments, 1, "b") == (1, "b")
    assert dist.shutdown() is None


def test_run_on_rank0_raises_its_function_s_errors(alone):
    with pytest.raises(InputError, match="^rows.jsonl, line 3: is empty$"):
        dist.run_on_rank0(refuse)
    with pytest.raises(InputError, match="No such file.*missing"):
        dist.run_on_rank0(Path("missing").read_text)
    with pytest.raises(ZeroDivisionError):
        dist.run_on_rank0(lambda: 1 / 0)


def test_deferred_signals_are_announced_once_and_take_effect_after_the_block(alone, capsys):
    with pytest.raises(KeyboardInterrupt), dist.defer_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals == [signal.SIGINT] * 2
    stopping = "stopping after this step; once more, after ten seconds, ends at once\n"
    assert capsys.readouterr() == ("", stopping)


def test_an_error_in_the_block_replaces_deferred_signals():
    with pytest.raises(ValueError, match="an error of its own"), dist.defer_signals():
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("an error of its own")


@pytest.mark.parametrize(
    "cores, local_ranks, threads_before, threads_after",
    [(16, 8, 16, 2), (2, 2, 2, 1), (2, 8, 2, 1), (16, 2, 1, 1), (None, 2, 4, 1), (64, 2, 8, 8)],
)
def test_the_threads_of_all_ranks_fit_the_cores(
    alone, monkeypatch, cores, local_ranks, threads_before, threads_after
):
    threads = [threads_before]
    monkeypatch.setattr(dist, "world_size", lambda: local_ranks)
    monkeypatch.setattr(dist, "all_gather_list", lambda items: items * local_ranks)
    monkeypatch.setattr(dist.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    dist.init_process()
    assert threads[-1] == threads_after
