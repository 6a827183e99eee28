"""A run with every stage in it, killed by SIGKILL at random moments and started again each time, until it is complete.

python tests/torture.py HOME FOLDER --steps N --kills K --ranks R     (test_resume.py writes HOME, a demo world, and compares the folders)

Writes FOLDER/whole/out, never killed, and FOLDER/killed/out. Prints JSON: seconds of the whole run, and each kill's stage, step and kind.
Every attempt is forked from this process, which has imported everything and trained nothing: that saves the seconds of a start.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import data.prepare
import train
from data import dist, report
from data.cli import run_command_line

STAGES = (
    "pretrain-1x24x2-demo teacher-1x24x2-demo pretrain-1x16x2-demo responses-1x24x2-demo seqkd-1x16x2-demo-s10 init-1x16x2-demo "
    "minillm-1x16x2-demo-lmdatapretrain-s10 promptkd-1x16x2-demo-s10"
).split()


def plan(home, steps):
    """The command lines of the run. Every stage has `steps` steps, dropout, and states between the validations."""
    train.DEMO_TEACHER, train.DEMO_STUDENT = "1x24x2", "1x16x2"
    for kind, values in train.DEMO.copy().items():
        small = {
            "steps": steps,
            "global_batch_size": 8,
            "eval_interval": 4,
            "max_new_tokens": 8,
            "block_size": 32,
            "dropout": 0.1,
            "warmup_steps": 2,
        }
        small |= {"rollout_size": 16, "inner_epochs": 2} if kind == "minillm" else {}
        train.DEMO[{"3x128x4": "1x24x2", "2x64x4": "1x16x2"}.get(kind, kind)] = values | small
    train.show_demo, report.plot_curves = (
        lambda models, device, dtype: None,
        lambda directory: "no picture",
    )
    dist.shutdown = lambda: None  # the ranks stay together for the next command
    data.prepare.HOME = home
    how = [
        "--data",
        "demo",
        "--out",
        "out",
        "--save-every",
        "3",
        "--micro-batch",
        "5",
        "--dev-rows",
        "4",
        "--keep",
        "3",
    ]
    text = ["--lm-data", str(home / "demo" / "pretrain.jsonl")]
    return [
        ["--method", "seqkd", *how],
        ["--method", "minillm", *text, *how],
        ["--method", "promptkd", *how],
    ]


def start(commands, world, armed=None):
    """Fork the ranks of one attempt. Returns their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    processes = []
    for rank in range(world):
        if (process := os.fork()) == 0:
            log = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(log, 1), os.dup2(log, 2)
            if world > 1:
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(world),
                }
                os.environ |= {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_RUN_ID": "torture",
                }
            if armed and rank == 0:
                die_while_saving(*armed)
            status = 1
            try:
                run_command_line(lambda: [train.main(options) for options in commands])
                status = 0
            finally:
                sys.stdout.flush()
                if status:
                    sys.excepthook(*sys.exc_info())
                os._exit(status)
        processes.append(process)
    return processes


def die_while_saving(stage, n):
    """The n-th time that something is written, flushed or renamed once a stage has begun, this process is killed before it is done."""
    count = [0]

    def watched(function):
        def call(*arguments, **options):
            count[0] += (Path("out") / stage / "run.json").is_file()
            if count[0] == n:
                if function is torch_save:
                    arguments[1].write(b"PK\x03\x04, and not the rest of it")
                    arguments[1].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    torch_save = torch.save
    os.replace, os.fsync, torch.save = watched(os.replace), watched(os.fsync), watched(torch.save)


def record_of(stage):
    path = Path("out") / stage / "run.json"
    return json.loads(path.read_text()) if path.is_file() else None


def begun(stage):
    """When a stage was last begun or gone on with, which writes its record; None where it never was."""
    path = Path("out") / stage / "run.json"
    return path.stat().st_mtime_ns if path.is_file() else None


def ended(processes, within):
    """Wait for processes to end. Returns their statuses, or fails where they take longer than so many seconds (of waiting, not of the
    clock: a machine may be put to sleep)."""
    statuses = {}
    for _ in range(within * 200):
        for process in processes:
            if process not in statuses and (result := os.waitpid(process, os.WNOHANG))[0]:
                statuses[process] = os.waitstatus_to_exitcode(result[1])
        if len(statuses) == len(processes):
            return [statuses[process] for process in processes]
        time.sleep(0.005)
    for process in processes:
        process in statuses or os.kill(process, signal.SIGKILL)
    raise TimeoutError(f"an attempt still ran after {within} seconds")


def where():
    """The stage and step that a run has come to."""
    stage = next((stage for stage in STAGES if "hours" not in (record_of(stage) or {})), None)
    metrics = Path("out") / str(stage) / "metrics.jsonl"
    return stage, metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def torture(commands, kills, world, rng, seconds):
    """Start, kill, start again: about three kills a stage, none of which lets it come far. seconds: what each stage takes. Returns the kills."""
    done = []
    for i in range(kills):
        stage, saving = STAGES[i * len(STAGES) // kills], i % 3 == 2
        before = begun(stage)
        processes = start(commands, world, (stage, rng.randint(1, 15)) if saving else None)
        if not saving:
            while begun(stage) == before and "hours" not in (record_of(stage) or {}):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, seconds[stage] / 4))
            alone = world > 1 and rng.random() < 0.5
            for process in [rng.choice(processes)] if alone else processes:
                os.kill(process, signal.SIGKILL)
        if -signal.SIGKILL in ended(processes, 60):
            stage, step = where()
            done.append({"stage": stage, "step": step, "saving": saving})
    statuses = ended(start(commands, world), 600)
    assert set(statuses) == {0}, statuses
    return done


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--ranks", type=int)
    args = parser.parse_args()
    commands = plan(args.home.resolve(), args.steps)
    for name in ("whole", "killed"):
        (args.folder / name).mkdir(parents=True)
    os.chdir(args.folder / "whole")
    start_of_whole = time.monotonic()
    assert set(ended(start(commands, args.ranks), 600)) == {0}
    whole = time.monotonic() - start_of_whole
    seconds = {stage: 3600 * record_of(stage)["hours"] for stage in STAGES}
    os.chdir("../killed")
    kills = torture(commands, args.kills, args.ranks, random.Random(args.kills), seconds)
    print(json.dumps({"seconds": whole, "stages": seconds, "kills": kills}))


if __name__ == "__main__":
    main()
