"""Commands that run out of memory, of a CPU (under a limit of the address space) and of a GPU."""

import errno
import json
import os
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    error_of,
    fork_ranks,
    run_command,
    talker_config,
    tiny_tokenizer,
    wait_for,
    write_checkpoint,
    write_rows,
)

import train
from data.process import dist
from data.process.command_line import run_command_line
from data.process.errors import InputError, explain_out_of_memory
from data.runs.states import find_newest_state, write_state
from data.sets.rows import epoch_order

GPU_ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB"
CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 98828288 bytes. Error code 12 (Cannot allocate memory)"
)

# ---- which errors ------------------------------------------------------------------------------


class SafetensorError(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(GPU_ERROR),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"),
        RuntimeError(CPU_ERROR),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a memory object"),
        RuntimeError("could not create a primitive"),
        RuntimeError("unable to mmap 7 bytes from file <a.safetensors>: Cannot allocate memory"),
        SafetensorError("I/O error: Cannot allocate memory (os error 12)"),
        ImportError("_lsprof.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
        MemoryError("Unable to allocate 7.45 GiB for an array"),
    ],
)
def test_an_error_for_lack_of_memory_becomes_one_line(error):
    def fail():
        with explain_out_of_memory("students of p on dolly", "lower --batch"):
            raise error

    assert error_of(fail) == "students of p on dolly: out of memory; lower --batch"


@pytest.mark.parametrize(
    "error",
    [
        InputError("out of memory.jsonl, line 3: is empty"),
        OSError(errno.ENOSPC, "No space left on device"),
        FileNotFoundError(errno.ENOENT, "No such file", "out of memory.txt"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("could not create a primitive descriptor for a matmul primitive"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        KeyError("memory"),
        KeyboardInterrupt(),
        SystemExit(143),
    ],
)
def test_any_other_error_is_unchanged(error):
    with pytest.raises(type(error)) as caught, explain_out_of_memory("x", "y"):
        raise error
    assert caught.value is error


def test_the_reason_of_an_error_counts_and_the_innermost_context_reports():
    def read():
        try:
            raise MemoryError
        except MemoryError as error:
            raise InputError("model.safetensors: is damaged; fetch it again") from error

    def fail():
        with explain_out_of_memory("outer", "fix"), explain_out_of_memory("inner", "lower it"):
            dist.run_on_rank0(read)

    assert error_of(fail) == "inner: out of memory; lower it"


def test_tensors_in_the_frames_of_the_error_are_freed_before_the_message_is_made():
    class Held:
        pass

    def use():
        held = Held()
        kept.append(weakref.ref(held))
        raise MemoryError

    kept = []
    with pytest.raises(InputError), explain_out_of_memory("x", "y"):
        use()
    assert kept[0]() is None


def test_what_no_context_explains_is_one_line_that_names_the_command(monkeypatch, capsys):
    def main():
        raise torch.OutOfMemoryError(GPU_ERROR)

    monkeypatch.setattr(sys, "argv", ["/somewhere/sample.py"])
    with pytest.raises(SystemExit) as exit:
        run_command_line(main)
    assert exit.value.code == 2
    line = "error: sample.py: out of memory; use a smaller model or more memory\n"
    assert capsys.readouterr() == ("", line)


# ---- states ------------------------------------------------------------------------------------


def test_a_state_is_not_taken_for_damaged_for_lack_of_memory(tmp_path, monkeypatch):
    def fail(file):
        raise MemoryError

    path = tmp_path / "state" / "step-000004.pt"
    path.parent.mkdir()
    write_state(path, {"step": 4})
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("data.runs.states.zipfile.ZipFile.testzip", fail)
        find_newest_state(tmp_path)
    assert find_newest_state(tmp_path) == path


def test_a_state_that_is_not_written_for_lack_of_memory_is_not_a_full_disk(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError(CPU_ERROR)

    def write():
        with explain_out_of_memory("out/x", "use less"):
            dist.run_on_rank0(write_state, tmp_path / "state.pt", {})

    monkeypatch.setattr(torch, "save", fail)
    assert error_of(write) == "out/x: out of memory; use less"


# ---- ranks -------------------------------------------------------------------------------------


def test_of_two_ranks_the_one_that_runs_out_of_memory_reports_it_and_both_end(
    tmp_path, monkeypatch
):
    def sft_step(run, examples, t):
        if t == 1 and dist.rank() == 1:
            raise torch.OutOfMemoryError(GPU_ERROR)
        return step(run, examples, t)

    step = train.sft_step
    monkeypatch.setattr("data.process.command_line.time.sleep", lambda seconds: None)
    monkeypatch.setitem(train.STEPS, "sft", sft_step)
    write_checkpoint(tmp_path / "model", talker_config(), tiny_tokenizer())
    row = {"instruction": "Write a task.", "output": "a task"}
    for name in ("train", "dev"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", [row] * 4)
    command = ["--method", "sft", "--student", tmp_path / "model", "--data", tmp_path / "data"]
    command += ["--global-batch", 2, "--micro-batch-tokens", 300, "--save-every", 1]
    command += ["--out", tmp_path]
    ranks = fork_ranks(lambda: train.main(list(map(str, command))), 2, tmp_path / "log")
    of_rank_0, of_rank_1 = wait_for(ranks, timeout=60)
    assert of_rank_0 != 0 and of_rank_1 == 2
    run = tmp_path / "sft-model-data-globalbatch2-s10"
    [line] = (tmp_path / "log1").read_text().splitlines()
    assert line.startswith(f"error: {run}: micro-batches of 300 tokens: out of memory; ")
    assert find_newest_state(run).name == "step-000001.pt"


# ---- commands under a limit of the address space ------------------------------------------------

MEGABYTES = 250  # of memory besides what the imported modules take
# The modules whose `main` is the body of a command
MODULES = {name: name for name in ("train", "evaluate", "exposure_bias")}
MODULES["sample"] = "data.models.sampling"


def run_limited(directory, commands):
    """Run commands, each in a fork of this process, which has imported what they need.

    commands: {name: [command, arguments...]}. Returns {name: [status, what is printed]}.
    """
    import resource

    import torch._dynamo  # noqa: F401 (otherwise imported later, which takes memory)

    import exposure_bias  # noqa: F401

    def main(name, *arguments):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEGABYTES * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.modules[MODULES[name]].main(arguments)

    sys.modules["matplotlib.figure"] = None  # no plots, which take memory as well
    results = {}
    for name, command in commands.items():
        sys.argv = [f"{command[0]}.py"]
        [status] = wait_for(fork_ranks(partial(main, *command), 1, directory / name), timeout=120)
        results[name] = [status, (directory / f"{name}0").read_text()]
    return results


def write_world(directory):
    """Models, of which one is too large, and data whose third optimizer step has the long rows."""
    for name, n_layer, n_embd in [("small", 4, 128), ("model", 4, 256), ("large", 12, 512)]:
        config = replace(talker_config(), n_layer=n_layer, n_embd=n_embd, n_positions=512)
        write_checkpoint(directory / name, config, tiny_tokenizer())
    rows = [{"instruction": "Write a task.", "output": "a task"} for _ in range(32)]
    write_rows(directory / "data" / "dev.jsonl", rows[:1])
    for index in epoch_order(32, seed=10, epoch=0)[16:24]:
        rows[index]["output"] = "a task that describes " * 200
    write_rows(directory / "data" / "train.jsonl", rows)
    row = {"instruction": "Write a task that" + " describes" * 150, "output": "a task"}
    return write_rows(directory / "requests" / "test.jsonl", [row] * 64)


TRAIN = ("train", "--method", "sft", "--steps", 3, "--global-batch", 8, "--save-every", 1)
RUN = "out/sft-small-data-steps3-globalbatch8-s10"


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """The directory and, by name, the status and the lines of commands with little memory."""
    if sys.platform != "linux":
        pytest.skip("needs a limit of the address space")
    directory = tmp_path_factory.mktemp("limited")
    requests = write_world(directory)
    model, large, sets = directory / "model", directory / "large", directory / "requests"
    training = [*TRAIN, "--student", directory / "small", "--data", directory / "data"]
    training += ["--out", directory / "out"]
    evaluation = ["evaluate", model, "--data", sets, "--seeds", 10, "--max-new", 2]
    evaluation += ["--out", directory / "evaluation"]
    exposure = ["exposure_bias", "--teacher", model, "--students", model, "--data", sets]
    exposure += ["--samples", 1, "--steps", 2, "--out", directory / "exposure"]
    commands = {
        "train": [*training, "--micro-batch-tokens", 4096],
        "train with less": [*training, "--micro-batch-tokens", 512],
        "evaluate": evaluation,
        "load": ["sample", large, "--instruction", "Write.", "--max-new", 1],
        "sample": ["sample", model, "--file", requests, "--max-new", 2],
        "exposure_bias": exposure,
    }
    commands = {name: list(map(str, command)) for name, command in commands.items()}
    # One arena: the C library reserves 64 MiB for each more.
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {"PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"}
    process = run_command(__file__, directory, json.dumps(commands), **environment)
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout)
    return directory, {name: (status, log.splitlines()) for name, (status, log) in results.items()}


@pytest.mark.parametrize(
    "name, location, fix",
    [
        (
            "train",
            "{directory}/" + f"{RUN}: micro-batches of 4,096 tokens",
            "run the same command with a lower --micro-batch-tokens; what was saved is resumed",
        ),
        ("evaluate", "model on requests", "run evaluate.py with a lower --batch"),
        ("load", "loading {directory}/large", "use a smaller model"),
        ("sample", "sample.py", "use a smaller model or more memory"),
        ("exposure_bias", "students of {directory}/model on {directory}/requests", "lower --batch"),
    ],
)
def test_a_command_that_runs_out_of_memory_says_what_to_lower(limited, name, location, fix):
    directory, results = limited
    status, lines = results[name]
    assert status == 2, lines
    location = location.format(directory=directory)
    assert lines[-1].startswith(f"error: {location}: out of memory; {fix}")
    assert not any("Traceback" in line for line in lines)


def test_with_less_in_memory_the_same_command_goes_on_from_what_is_saved(limited):
    directory, results = limited
    _, lines = results["train"]
    assert "lower --micro-batch-tokens" in lines[-1] and "resume" in lines[-1]
    status, lines = results["train with less"]
    assert status == 0 and any("resuming after step 2" in line for line in lines), lines
    record = json.loads((directory / RUN / "run.json").read_text())
    assert record["complete"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run_limited(Path(sys.argv[1]), json.loads(sys.argv[2]))))
