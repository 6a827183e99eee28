"""Launchers: torchrun and others, wrong variables, ranks that are missing, too few GPUs."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta

import pytest
import torch
from helpers import (
    ROOT,
    after_device,
    error_of,
    fork_ranks,
    free_port,
    run_command,
    torchrun,
    wait_for,
)
from test_resume import no_plots, outcome, six_steps  # noqa: F401
from test_train import CPU, student, teacher, world  # noqa: F401

import data.sets.prepare
import evaluate
import exposure_bias
import train
from data.models import sampling
from data.process import command_line, dist
from data.process.command_line import is_launched
from data.process.dist import check_launcher, place_rank

VARIABLES = (
    *("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", *dist.PROCESS_COUNTS),
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Only a test sets these variables, and standard input is no terminal."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist.os, "isatty", lambda descriptor: False)


def set_variables(monkeypatch, text):
    for name, value in (word.split("=") for word in text.split()):
        monkeypatch.setenv(name, value)


# ---- what launchers set ------------------------------------------------------------------------

SRUN = """SLURM_JOB_ID=51 SLURM_NTASKS=4 SLURM_NPROCS=4 SLURM_STEP_ID=0 SLURM_STEPID=0
SLURM_STEP_NUM_NODES=1 SLURM_STEP_NUM_TASKS=4 SLURM_STEP_TASKS_PER_NODE=4 SLURM_TASK_PID=7041
SLURM_SRUN_COMM_HOST=10.0.0.1 SLURM_STEP_LAUNCHER_PORT=41771 SLURM_GTIDS=0,1,2,3 SLURM_PROCID=2
SLURM_LOCALID=2 SLURM_NODEID=0"""
SBATCH = """SLURM_JOB_ID=51 SLURM_NTASKS=4 SLURM_NPROCS=4 SLURM_NTASKS_PER_NODE=4 SLURM_GTIDS=0
SLURM_TASKS_PER_NODE=4 SLURM_JOB_NUM_NODES=1 SLURM_TASK_PID=7041 SLURM_PROCID=0 SLURM_LOCALID=0"""
SALLOC = f"""{SBATCH} SLURM_STEP_ID=4294967290 SLURM_STEPID=4294967290 SLURM_PTY_PORT=34889
SLURM_PTY_WIN_COL=236 SLURM_PTY_WIN_ROW=64 SLURM_MPI_TYPE=pmix SLURM_STEP_NUM_TASKS"""
OPEN_MPI = """OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=4
OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_NODE_RANK=1 OMPI_UNIVERSE_SIZE=4 PMIX_RANK=1
PMIX_NAMESPACE=prterun-vm-7041@1"""
MPICH = "PMI_RANK=1 PMI_SIZE=4 PMI_FD=9 MPI_LOCALNRANKS=4 MPI_LOCALRANKID=1"
MVAPICH = "MV2_COMM_WORLD_SIZE=4 MV2_COMM_WORLD_RANK=1 MV2_COMM_WORLD_LOCAL_SIZE=4"
POD = "WORLD_SIZE=4 RANK=1 MASTER_ADDR=job-master-0 MASTER_PORT=23456"


def alone(name):
    fix = f"{dist.LAUNCH_FIX}, or unset {name} if there is only one"
    return f"{name} is 4: each of these processes would run alone; {fix}"


def not_a_rank(rank="", size="", address=""):
    found = f"RANK is {rank!r}, WORLD_SIZE {size!r}, MASTER_ADDR {address!r}"
    fix = f"set all three, with RANK from 0 to WORLD_SIZE - 1, or {dist.LAUNCH_FIX}"
    return f"{found}: they don't make this process a rank; {fix}"


REFUSED = {
    SRUN: alone("SLURM_STEP_NUM_TASKS"),
    f"{SRUN} SLURM_MPI_TYPE=pmi2 PMI_SIZE=4 PMI_RANK=2": alone("SLURM_STEP_NUM_TASKS"),
    OPEN_MPI: alone("OMPI_COMM_WORLD_SIZE"),
    f"{SBATCH} {OPEN_MPI}": alone("OMPI_COMM_WORLD_SIZE"),
    MPICH: alone("PMI_SIZE"),
    MVAPICH: alone("MV2_COMM_WORLD_SIZE"),
    "JSM_NAMESPACE_SIZE=4 JSM_NAMESPACE_RANK=0": alone("JSM_NAMESPACE_SIZE"),
    # Some clouds set these for the one process that calls mpirun.
    f"{OPEN_MPI} WORLD_SIZE=1 RANK=0 MASTER_ADDR=10.0.0.1": alone("OMPI_COMM_WORLD_SIZE"),
    "WORLD_SIZE=4": not_a_rank(size="4"),
    "WORLD_SIZE=4 RANK=0": not_a_rank("0", "4"),
    "WORLD_SIZE=4 RANK=0 MASTER_ADDR=": not_a_rank("0", "4"),
    "WORLD_SIZE=4 MASTER_ADDR=10.0.0.1": not_a_rank("", "4", "10.0.0.1"),
    "RANK=1 MASTER_ADDR=10.0.0.1": not_a_rank("1", "", "10.0.0.1"),
    "WORLD_SIZE=1 RANK=1": not_a_rank("1", "1"),
}
for value in ("node3", "-1", "1.0", "4"):
    REFUSED[f"{POD} RANK={value}"] = not_a_rank(value, "4", "job-master-0")
for value in ("0", "four", "1"):
    REFUSED[f"{POD} WORLD_SIZE={value}"] = not_a_rank("1", value, "job-master-0")
COMMANDS = {
    train: "--method sft --student student --out out",
    evaluate: "student --data demo --out out",
    sampling: "student --instruction hello",
    exposure_bias: "--teacher teacher --students student --data demo --out out",
}


@pytest.mark.parametrize("variables, line", REFUSED.items())
def test_processes_that_can_t_join_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, variables, line
):
    monkeypatch.chdir(tmp_path)
    set_variables(monkeypatch, variables)
    for command, arguments in COMMANDS.items():
        assert error_of(command.main, arguments.split()) == line
    assert "torchrun" in line and capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def train_here(directory):
    train.main(["--out", str(directory / "out")])


@pytest.mark.parametrize("variables", REFUSED)
def test_a_refused_process_prints_one_line_and_exits_with_status_2(
    tmp_path, monkeypatch, variables
):
    set_variables(monkeypatch, variables)
    monkeypatch.setattr(command_line.time, "sleep", lambda seconds: None)
    assert wait_for(fork_ranks(lambda: train_here(tmp_path), 1, tmp_path / "log"), 60) == [2]
    [line] = (tmp_path / "log0").read_text().splitlines()
    assert line == f"error: {REFUSED[variables]}"
    assert not (tmp_path / "out").exists()


def test_train_py_in_a_step_of_several_tasks(tmp_path):
    variables = dict(word.split("=") for word in SRUN.split())
    process = run_command("train.py", "--out", tmp_path / "out", **variables)
    assert process.returncode == 2 and process.stdout == "" and not list(tmp_path.iterdir())
    assert process.stderr == f"error: {REFUSED[SRUN]}\n"


@pytest.mark.parametrize(
    "variables",
    [
        "",
        SBATCH,
        f"{SALLOC}=1",
        f"{SALLOC}=4",
        f"{SALLOC}=4 PMI_SIZE=4",
        SRUN.replace("SLURM_STEP_NUM_TASKS=4", "SLURM_STEP_NUM_TASKS=1"),
        "OMPI_COMM_WORLD_SIZE=1 OMPI_COMM_WORLD_RANK=0 PMI_SIZE=1",
        "WORLD_SIZE=1 RANK=0 LOCAL_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500",
        # Kubernetes sets the last one for a service called "master".
        "WORLD_SIZE=1 MASTER_PORT=tcp://10.3.2.1:29500",
        "RANK= WORLD_SIZE= MASTER_ADDR=",
        "RANK=0",
        "LOCAL_RANK=3 LOCAL_WORLD_SIZE=4",
    ],
)
def test_one_process_runs_alone(monkeypatch, variables):
    set_variables(monkeypatch, variables)
    assert dist.init_process() == (torch.device("cpu"), "float32")
    assert not is_launched()
    assert (dist.rank(), dist.world_size()) == (0, 1) and not torch.distributed.is_initialized()


def test_a_shell_inside_a_step_of_several_tasks_starts_one_process(monkeypatch):
    """srun --ntasks=4 --pty bash: what a person starts from there has the terminal."""
    set_variables(monkeypatch, SRUN)
    monkeypatch.setattr(dist.os, "isatty", lambda descriptor: descriptor == 0)
    assert check_launcher() is None
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "SLURM_STEP_NUM_TASKS is 4" in error_of(check_launcher)


def test_under_torchrun_its_own_variables_decide(monkeypatch):
    """srun torchrun: one task per node, and each starts that node's ranks."""
    variables = "TORCHELASTIC_RUN_ID=none RANK=1 WORLD_SIZE=4 MASTER_ADDR=node1 MASTER_PORT=29500"
    set_variables(monkeypatch, f"{SRUN} {variables}")
    assert is_launched() and check_launcher() is None
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun --nproc_per_node=1
    assert is_launched()


@pytest.mark.parametrize("variables", [POD, f"{SRUN} {POD}", f"{OPEN_MPI} {POD}"])
def test_rank_size_and_address_make_a_process_one_of_several(monkeypatch, variables):
    set_variables(monkeypatch, variables)
    assert is_launched() and check_launcher() is None


# ---- joining -----------------------------------------------------------------------------------


def train_stage(out, s):
    dist.init_process()
    train.run_stage("stage", s, out, 380, CPU, keep=2)
    dist.shutdown()


SCRIPT = """
import json, pathlib, sys
import data.sets.prepare, train
from data.process import dist
from data.runs import report
from data.process.command_line import run_command_line


def main():
    dist.init_process()
    s = train.Settings(**json.loads(sys.argv[3]))
    train.run_stage("stage", s, pathlib.Path(sys.argv[2]), 380, dist.torch.device("cpu"), keep=2)
    dist.shutdown()


data.sets.prepare.DATA_DIR = pathlib.Path(sys.argv[1])
report.plot_curves = lambda directory: "no plot"
run_command_line(main)
"""


def start_processes(n_ranks, *arguments):
    """Start plain Python processes with the variables that make them ranks, as pods have them."""
    variables = {"WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "localhost", "CUDA_VISIBLE_DEVICES": ""}
    variables |= {"MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    # PyTorch warns where the machine has no name for an address, as in a container.
    variables["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=os.environ | variables | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n_ranks)
    ]


@pytest.mark.parametrize("n_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_plain_processes_train_together_with_the_same_bits_as_under_torchrun(
    tmp_path, student, teacher, n_ranks
):
    s = six_steps(student, teacher)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "plain").mkdir()
    arguments = (tmp_path / "script.py", data.sets.prepare.DATA_DIR, tmp_path / "plain")
    processes = start_processes(n_ranks, *arguments, json.dumps(asdict(s)))
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * n_ranks, outputs
    assert after_device(outputs[0][1]) == "" and f"ranks: {n_ranks};" in outputs[0][1]
    assert outputs[1:] == [("", "")] * (n_ranks - 1)  # no rank but the first prints
    torchrun_s = fork_ranks(
        lambda: train_stage(tmp_path / "torchrun", s), n_ranks, tmp_path / "log"
    )
    assert wait_for(torchrun_s, 120) == [0] * n_ranks
    plain = outcome(tmp_path / "plain" / "stage")
    assert plain == outcome(tmp_path / "torchrun" / "stage") and len(plain) > 5


def join_in_a_second():
    dist.JOIN_TIMEOUT = timedelta(seconds=1)
    dist.init_process()


@pytest.mark.parametrize("rank, address", [(0, "localhost"), (1, "127.0.0.1")])
def test_a_rank_that_never_comes_is_reported_with_the_address(tmp_path, monkeypatch, rank, address):
    port = free_port()
    variables = f"RANK={rank} WORLD_SIZE=2 MASTER_ADDR={address} MASTER_PORT={port}"
    set_variables(monkeypatch, variables)
    monkeypatch.setattr(command_line.time, "sleep", lambda seconds: None)
    assert wait_for(fork_ranks(join_in_a_second, 1, tmp_path / "log"), 60) == [2]
    [line] = (tmp_path / "log0").read_text().splitlines()
    assert line.startswith(f"error: {address}:{port}: can't join the other ranks (")
    assert line.endswith("); check MASTER_ADDR and MASTER_PORT, and that every rank has started")


def test_an_unknown_host_is_reported_and_the_port_is_29500_by_default(monkeypatch):
    set_variables(monkeypatch, "RANK=1 WORLD_SIZE=2 MASTER_ADDR=no-such-host.invalid MASTER_PORT=")
    monkeypatch.setattr(dist, "JOIN_TIMEOUT", timedelta(seconds=0.1))
    assert error_of(dist.init_process).startswith("no-such-host.invalid:29500: can't join")


@pytest.mark.parametrize("port", ["x", "70000", "tcp://10.3.2.1:29500"])
def test_a_wrong_port_is_reported(monkeypatch, port):
    set_variables(monkeypatch, f"RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT={port}")
    assert error_of(dist.init_process).startswith(f"localhost:{port}: can't join the other ranks (")


def test_two_processes_of_the_same_rank_are_refused(tmp_path, monkeypatch):
    """As where a script exports one RANK for all processes."""
    set_variables(monkeypatch, f"WORLD_SIZE=3 MASTER_ADDR=localhost MASTER_PORT={free_port()}")
    monkeypatch.setattr(command_line.time, "sleep", lambda seconds: None)
    processes = []
    for n, rank in enumerate((0, 1, 1)):
        monkeypatch.setenv("RANK", str(rank))
        processes += fork_ranks(dist.init_process, 1, tmp_path / f"log of {n} ")
    refused, _ = os.wait()  # the others wait for rank 2
    processes.remove(refused)
    for process in processes:
        os.kill(process, signal.SIGKILL)
    assert wait_for(processes, 60) == [-signal.SIGKILL] * 2
    logs = sorted((tmp_path / f"log of {n} 0").read_text() for n in range(3))
    assert logs == ["", "", "error: two processes have RANK 1; give each its own\n"]


# ---- GPUs --------------------------------------------------------------------------------------

GPU_FIX = "start one rank per GPU; check --nproc_per_node and CUDA_VISIBLE_DEVICES"
EIGHT, FOUR, ONE = (tuple(f"GPU-{n}" for n in range(size)) for size in (8, 4, 1))


def on(host, gpus, selected=None):
    return host, selected, gpus


@pytest.mark.parametrize(
    "locations, places",
    [
        ([on("a", ())], [(0, 1)]),
        ([on("a", ONE)], [(0, 1)]),
        ([on("a", ())] * 2 + [on("b", ())], [(0, 2), (1, 2), (0, 1)]),
        ([on("a", FOUR)] * 3, [(0, 3), (1, 3), (2, 3)]),  # fewer ranks than GPUs
        ([on("a", FOUR), on("b", FOUR)] * 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        # Each rank has its own GPU: by CUDA_VISIBLE_DEVICES, or as SLURM binds tasks.
        ([on("a", ("GPU-0",), "0"), on("a", ("GPU-1",), "1")], [(0, 2), (0, 2)]),
        ([on("a", ("GPU-0",), "0"), on("a", ("GPU-1",), "0")], [(0, 2), (0, 2)]),
        # Two containers of one host, each with two ranks
        (
            [on("a", FOUR[:2], "0,1")] * 2 + [on("a", FOUR[2:], "2,3")] * 2,
            [(0, 4), (1, 4), (0, 4), (1, 4)],
        ),
    ],
)
def test_ranks_take_the_gpus_that_they_see_in_turn(locations, places):
    assert [place_rank(rank, locations) for rank in range(len(locations))] == places


@pytest.mark.parametrize(
    "locations, problem",
    [
        ([on("node1", FOUR)] * 8, "node1: 8 ranks need a GPU each, and they see 4"),
        (
            [on("node1", EIGHT)] * 8 + [on("node2", ONE)] * 2,
            "node2: 2 ranks need a GPU each, and they see 1",
        ),
        ([on("node1", ONE), on("node2", ())], "node2: 1 ranks need a GPU each, and they see 0"),
    ],
)
def test_more_ranks_than_gpus_are_refused(locations, problem):
    assert error_of(place_rank, 0, locations) == f"{problem}; {GPU_FIX}"


TOO_MANY = """
import sys, types
import torch
import train
from data.process.command_line import run_command_line

join = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda backend, **kwargs: join("gloo", **kwargs)
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.get_device_properties = lambda n: types.SimpleNamespace(uuid="GPU-0")
run_command_line(lambda: train.main(["--out", sys.argv[1]]))
"""


def too_many_ranks(n_ranks):
    problem = f"{n_ranks} ranks need a GPU each, and they see 1"
    return f"error: {dist.socket.gethostname()}: {problem}; {GPU_FIX}"


@pytest.mark.slow
def test_under_torchrun_more_ranks_than_gpus_end_with_one_line(tmp_path):
    (tmp_path / "script.py").write_text(TOO_MANY)
    arguments = (*torchrun(2), tmp_path / "script.py", tmp_path / "out")
    process = run_command(*arguments, PYTHONPATH=str(ROOT))
    lines = process.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [too_many_ranks(2)]
    assert process.returncode == 1 and "(exitcode: 2)" in process.stderr
    assert "run_command_line" not in process.stderr  # torchrun has a traceback of its own
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_more_ranks_than_gpus_end_without_a_traceback(tmp_path, monkeypatch, n_ranks):
    """With PyTorch made to believe that there is one GPU."""
    monkeypatch.setattr(sys, "argv", ["script.py", str(tmp_path / "out")])
    monkeypatch.setattr(command_line.time, "sleep", lambda seconds: None)
    ranks = fork_ranks(lambda: exec(TOO_MANY, {}), n_ranks, tmp_path / "log")
    assert wait_for(ranks, 60) == [2] * n_ranks
    for rank in range(n_ranks):
        assert (tmp_path / f"log{rank}").read_text() == f"{too_many_ranks(n_ranks)}\n"
    assert not (tmp_path / "out").exists()
