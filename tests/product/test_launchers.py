"""Launchers: torchrun and others, wrong variables, ranks that are missing, too few GPUs."""

import os
import signal
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from helpers import error_of, fork_ranks, free_port, wait_for
from test_resume import no_plots, outcome, six_steps  # noqa: F401
from test_train import CPU, student, teacher, world  # noqa: F401

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
POD = "WORLD_SIZE=4 RANK=1 MASTER_ADDR=job-master-0 MASTER_PORT=23456"


# Of which launcher, and the variable by which there are several processes
ALONE = {
    **{f"{name}=4": name for name in dist.PROCESS_COUNTS},
    SRUN: "SLURM_STEP_NUM_TASKS",
    f"{SRUN} SLURM_MPI_TYPE=pmi2 PMI_SIZE=4 PMI_RANK=2": "SLURM_STEP_NUM_TASKS",
    f"{SBATCH} {OPEN_MPI}": "OMPI_COMM_WORLD_SIZE",
    # Some clouds set these for the one process that calls mpirun.
    f"{OPEN_MPI} WORLD_SIZE=1 RANK=0 MASTER_ADDR=10.0.0.1": "OMPI_COMM_WORLD_SIZE",
}
NO_RANK = [
    *("WORLD_SIZE=4", "WORLD_SIZE=4 RANK=0", "WORLD_SIZE=4 RANK=0 MASTER_ADDR="),
    *("WORLD_SIZE=4 MASTER_ADDR=10.0.0.1", "RANK=1 MASTER_ADDR=10.0.0.1", "WORLD_SIZE=1 RANK=1"),
    *(f"{POD} RANK={value}" for value in ("node3", "-1", "1.0", "4")),
    *(f"{POD} WORLD_SIZE={value}" for value in ("0", "four", "1")),
]
COMMANDS = {
    train: "--method sft --student student --out out",
    evaluate: "student --data demo --out out",
    sampling: "student --instruction hello",
    exposure_bias: "--teacher teacher --students student --data demo --out out",
}


@pytest.mark.parametrize("variables", [*ALONE, *NO_RANK])
def test_processes_that_can_t_join_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, variables
):
    monkeypatch.chdir(tmp_path)
    set_variables(monkeypatch, variables)
    if variables in ALONE:
        fix = f"{dist.LAUNCH_FIX}, or unset {ALONE[variables]} if there is only one"
        line = f"{ALONE[variables]} is 4: each of these processes would run alone; {fix}"
    else:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
        found = ", ".join(f"{name} {os.environ.get(name, '')!r}" for name in names)
        fix = f"set all three, with RANK from 0 to WORLD_SIZE - 1, or {dist.LAUNCH_FIX}"
        line = f"RANK is{found[4:]}: they don't make this process a rank; {fix}"
    for command, arguments in COMMANDS.items():
        assert error_of(command.main, arguments.split()) == line
    assert "torchrun" in line and capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variables", [SRUN, f"{POD} RANK=4"])
def test_a_refused_process_prints_one_line_and_exits_with_status_2(
    tmp_path, monkeypatch, variables
):
    set_variables(monkeypatch, variables)
    monkeypatch.setattr(command_line.time, "sleep", lambda seconds: None)
    assert wait_for(fork_ranks(lambda: train.main([]), 1, tmp_path / "log"), 60) == [2]
    [line] = (tmp_path / "log0").read_text().splitlines()
    assert line == f"error: {error_of(check_launcher)}"


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


@pytest.mark.parametrize("n_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_plain_processes_train_together_with_the_same_bits_as_under_torchrun(
    tmp_path, monkeypatch, student, teacher, n_ranks
):
    """The variables are those of pods."""
    s = replace(six_steps(student, teacher), steps=2)
    under_torchrun = fork_ranks(
        lambda: train_stage(tmp_path / "torchrun", s), n_ranks, tmp_path / "log"
    )
    assert wait_for(under_torchrun, 120) == [0] * n_ranks
    address = f"MASTER_ADDR=localhost MASTER_PORT={free_port()} TORCH_CPP_LOG_LEVEL=ERROR"
    set_variables(monkeypatch, f"WORLD_SIZE={n_ranks} {address}")
    processes = []
    for rank in range(n_ranks):
        monkeypatch.setenv("RANK", str(rank))
        log = tmp_path / f"log of plain {rank} "
        processes += fork_ranks(lambda: train_stage(tmp_path / "plain", s), 1, log)
    assert wait_for(processes, 120) == [0] * n_ranks
    plain = outcome(tmp_path / "plain" / "stage")
    assert plain == outcome(tmp_path / "torchrun" / "stage") and len(plain) > 5
    first, *others = ((tmp_path / f"log of plain {n} 0").read_text() for n in range(n_ranks))
    assert f"ranks: {n_ranks};" in first and "step 2/2" in first
    assert others == [""] * (n_ranks - 1)  # no rank but the first prints


@pytest.mark.parametrize(
    "variables, address",
    [
        ("RANK=0 MASTER_ADDR=localhost MASTER_PORT=PORT", "localhost:PORT"),  # no other rank comes
        ("RANK=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=PORT", "127.0.0.1:PORT"),
        ("RANK=1 MASTER_ADDR=no-such-host.invalid MASTER_PORT=", "no-such-host.invalid:29500"),
        ("RANK=1 MASTER_ADDR=localhost MASTER_PORT=x", "localhost:x"),
        ("RANK=1 MASTER_ADDR=localhost MASTER_PORT=70000", "localhost:70000"),
        ("RANK=1 MASTER_ADDR=localhost MASTER_PORT=tcp://10.3.2.1:2", "localhost:tcp://10.3.2.1:2"),
    ],
)
def test_ranks_that_can_t_be_joined_are_reported_with_the_address(monkeypatch, variables, address):
    port = str(free_port())
    set_variables(monkeypatch, f"WORLD_SIZE=2 {variables.replace('PORT=PORT', f'PORT={port}')}")
    monkeypatch.setattr(dist, "JOIN_TIMEOUT", timedelta(seconds=0.1))
    line = error_of(dist.init_process)
    assert line.startswith(f"{address.replace('PORT', port)}: can't join the other ranks (")
    assert line.endswith("); check MASTER_ADDR and MASTER_PORT, and that every rank has started")


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
        ([on("a", FOUR)] * 8, "a: 8 ranks need a GPU each, and they see 4"),
        ([on("a", EIGHT)] * 8 + [on("b", ONE)] * 2, "b: 2 ranks need a GPU each, and they see 1"),
        ([on("a", ONE), on("b", ())], "b: 1 ranks need a GPU each, and they see 0"),
    ],
)
def test_more_ranks_than_gpus_are_refused(locations, problem):
    assert error_of(place_rank, 0, locations) == f"{problem}; {GPU_FIX}"


def test_more_ranks_than_gpus_end_without_a_traceback(tmp_path, monkeypatch):
    """With PyTorch made to believe that there is one GPU."""
    join, gpu = torch.distributed.init_process_group, SimpleNamespace(uuid="GPU-0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **kwargs: join("gloo", **kwargs)
    )
    monkeypatch.setattr(command_line.time, "sleep", lambda seconds: None)
    arguments = ["--out", str(tmp_path / "out")]
    ranks = fork_ranks(lambda: train.main(arguments), 2, tmp_path / "log")
    assert wait_for(ranks, 60) == [2, 2]
    problem = f"2 ranks need a GPU each, and they see 1; {GPU_FIX}"
    for rank in range(2):
        line = f"error: {dist.socket.gethostname()}: {problem}\n"
        assert (tmp_path / f"log{rank}").read_text() == line
    assert not (tmp_path / "out").exists()
