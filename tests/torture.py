"""A run of every stage, killed by SIGKILL at random moments and started again until it is complete.

python tests/torture.py DATA_DIR OUT --steps N --kills K --ranks R [--promptkd-only]

test_resume.py writes DATA_DIR, a small demo data set, and compares OUT/whole/out, which is never
killed, with OUT/killed/out. Prints JSON: the seconds of the whole run and of its stages, and the
stage, step and kind of each kill. Every attempt is forked from this process, which has imported
everything and trained nothing: that saves the seconds of starting Python.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from helpers import fork_ranks, wait_for  # noqa: E402

import data.sets.prepare  # noqa: E402
import train  # noqa: E402
from data.process import dist  # noqa: E402
from data.runs import report  # noqa: E402
from data.runs.methods import METHODS, STAGES  # noqa: E402

RUNS = [
    "pretrain-1x24x2-demo",
    "pretrain-1x16x2-demo",
    "teacher-1x24x2-demo",
    "responses-1x24x2-demo",
    "seqkd-1x16x2-demo-s10",
    "init-1x16x2-demo",
    "minillm-1x16x2-demo-lmdatapretrain-s10",
    "promptkd-1x16x2-demo-s10",
]


def plan_commands(data_dir, steps, promptkd_only=False):
    """The command lines of the run. Every stage has `steps` steps, dropout, and states between the
    validations. promptkd_only: PromptKD and its stages, on one pre-trained model."""
    small = {
        "steps": steps,
        "global_batch_size": 8,
        "eval_interval": 4,
        "max_new_tokens": 8,
        "block_size": 32,
        "dropout": 0.1,
        "warmup_steps": 2,
    }
    for declared in (STAGES, METHODS):
        for kind, method in declared.copy().items():
            rollouts = {"rollout_size": 16, "inner_epochs": 2} if kind == "minillm" else {}
            declared[kind] = replace(method, demo=method.demo | small | rollouts)
    train.show_demo = lambda models, device, dtype: None
    report.plot_curves = lambda directory: "no plot"
    dist.shutdown = lambda: None  # the ranks stay together for the next command
    data.sets.prepare.DATA_DIR = data_dir
    options = ["--data", "demo", "--out", "out", "--keep", "3", "--save-every", "3"]
    options += ["--micro-batch-tokens", "240", "--dev-rows", "4"]
    text = ["--lm-data", str(data_dir / "demo" / "pretrain.jsonl")]
    pretrain = ["--method", "pretrain", *options]
    student = "out/pretrain-1x16x2-demo"
    if promptkd_only:
        RUNS[:] = [RUNS[1], RUNS[7]]
        return [
            [*pretrain, "--shape", "1x16x2"],
            ["--method", "promptkd", *options, "--sft-teacher", student, "--init", student],
        ]
    options += ["--teacher", "out/pretrain-1x24x2-demo", "--student", student]
    return [
        [*pretrain, "--shape", "1x24x2"],
        [*pretrain, "--shape", "1x16x2"],
        ["--method", "seqkd", *options],
        ["--method", "minillm", *text, *options],
        ["--method", "promptkd", *options],
    ]


def start(commands, n_ranks, stage=None, n_writes=None):
    """Fork the ranks of one attempt. If a stage is given, rank 0 is killed at that stage's n-th
    write. Returns the process ids."""

    def run_commands():
        if stage is not None and int(os.environ.get("RANK", 0)) == 0:
            die_while_saving(stage, n_writes)
        for options in commands:
            train.main(options)

    return fork_ranks(run_commands, n_ranks, "log")


def die_while_saving(stage, n_writes):
    """Kill this process before the n-th time that something is saved, flushed or renamed after a
    stage has started. If it is a state, part of it has been written."""
    count = 0
    torch_save = torch.save

    def watched(function):
        def call(*arguments, **kwargs):
            nonlocal count
            count += (Path("out") / stage / "run.json").is_file()
            if count == n_writes:
                if function is torch_save:
                    arguments[1].write(b"PK\x03\x04, and not the rest of it")
                    arguments[1].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **kwargs)

        return call

    os.replace = watched(os.replace)
    os.fsync = watched(os.fsync)
    torch.save = watched(torch_save)


def read_record(stage):
    path = Path("out") / stage / "run.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def start_time(stage):
    """When a stage was last started or resumed, which writes its record; None if it never was."""
    path = Path("out") / stage / "run.json"
    return path.stat().st_mtime_ns if path.is_file() else None


def current_step():
    """The first stage that is not complete, and the lines in its metrics."""
    stage = next((stage for stage in RUNS if "complete" not in read_record(stage)), None)
    metrics = Path("out") / str(stage) / "metrics.jsonl"
    return stage, metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def kill_repeatedly(commands, n_kills, n_ranks, rng, seconds):
    """Start the run and kill it, over and over, then let it complete. The kills are spread over the
    stages, two of three at a random time and the third while something is saved.

    seconds: how long each stage takes. Returns the kills.
    """
    kills = []
    for i in range(n_kills):
        stage, saving = RUNS[i * len(RUNS) // n_kills], i % 3 == 2
        started = start_time(stage)
        if saving:
            processes = start(commands, n_ranks, stage, rng.randint(1, 15))
        else:
            processes = start(commands, n_ranks)
            while start_time(stage) == started and "complete" not in read_record(stage):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, seconds[stage] / 4))
            one_rank = n_ranks > 1 and rng.random() < 0.5
            for process in [rng.choice(processes)] if one_rank else processes:
                os.kill(process, signal.SIGKILL)
        if -signal.SIGKILL in wait_for(processes, 60):
            stage, step = current_step()
            kills.append({"stage": stage, "step": step, "saving": saving})
    statuses = wait_for(start(commands, n_ranks), 600)
    assert set(statuses) == {0}, statuses
    return kills


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--promptkd-only", action="store_true")
    args = parser.parse_args(argv)
    commands = plan_commands(args.data_dir.resolve(), args.steps, args.promptkd_only)
    for name in ("whole", "killed"):
        (args.out / name).mkdir(parents=True)
    os.chdir(args.out / "whole")
    start_of_whole = time.monotonic()
    statuses = wait_for(start(commands, args.ranks), 600)
    assert set(statuses) == {0}, Path("log0").read_text()
    whole = time.monotonic() - start_of_whole
    seconds = {stage: 3600 * read_record(stage)["hours"] for stage in RUNS}
    os.chdir("../killed")
    kills = kill_repeatedly(commands, args.kills, args.ranks, random.Random(args.kills), seconds)
    print(json.dumps({"seconds": whole, "stages": seconds, "kills": kills}))


if __name__ == "__main__":
    main()
