"""model.py, losses.py, prompt.py and sample.py stand alone: copied into an empty folder, with the
last block of docs/walkthrough.md, they are PromptKD. Importing them changes nothing in the process.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import bench
import pytest
import torch
from helpers import ROOT
from recipe import force_responses
from test_style import code_blocks

import train
from data.runs.optim import set_learning_rate

CORE = ("model.py", "losses.py", "prompt.py", "sample.py")
# The last block of the page
LOOP = code_blocks(ROOT / "docs" / "walkthrough.md", "python")[-1]


def brought_by(*names):
    """Distributions of these names and all that they require, {name: distribution}."""
    found, todo = {}, list(names)
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name not in found:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of another system
                found[name] = importlib.metadata.distribution(name)
                requirements = found[name].requires or []
                todo += [re.match(r"[\w.-]+", r)[0] for r in requirements if "extra ==" not in r]
    return found


@pytest.fixture(scope="module")
def torch_and_numpy(tmp_path_factory):
    """A folder with torch and numpy, what they require, and nothing else."""
    folder = tmp_path_factory.mktemp("site-packages")
    for distribution in brought_by("torch", "numpy").values():
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            (folder / name).symlink_to(distribution.locate_file(name))
    assert not (folder / "tqdm").exists()
    return folder


# What importing the core may change in a process; then the step of standalone.py
SCRIPT = """
import json, os, runpy, signal, sys
import numpy, torch

def state():
    signals = [str(signal.getsignal(n)) for n in sorted(signal.valid_signals())]
    options = [torch.get_num_threads(), torch.get_num_interop_threads(), torch.is_grad_enabled()]
    options += [str(torch.get_default_dtype()), torch.get_float32_matmul_precision()]
    options += [int(torch.initial_seed()), torch.backends.mkldnn.enabled, sys.getrecursionlimit()]
    return {"signals": signals, "options": options, "environment": dict(os.environ)}

before, modules = state(), set(sys.modules)
import model, losses, prompt, sample
print(json.dumps([before, state(), sorted(set(sys.modules) - modules)]))
sys.argv[:] = ["standalone.py", "case.pt", "result.pt"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(folder, packages):
    """SCRIPT in a folder with a copy of the core, where only the standard library, torch and numpy
    can be imported. Returns what it prints."""
    for path in (*(ROOT / name for name in CORE), ROOT / "tests" / "standalone.py"):
        shutil.copy(path, folder)
    (folder / "promptkd.py").write_text(LOOP, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(packages)
    command = [sys.executable, "-S", "-c", SCRIPT]
    kwargs = {"capture_output": True, "text": True}
    result = subprocess.run(command, cwd=folder, env=environment, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_loop_is_all_of_it_in_at_most_40_lines():
    assert len(LOOP.splitlines()) <= 40
    modules = set(re.findall(r"^from (\w+) import|^import (\w+)", LOOP, re.M))
    names = {name for pair in modules for name in pair if name}
    assert names <= {"types", "numpy", "torch", "model", "losses", "prompt", "sample"}


# Runs of LOOP: how often it trains on a batch, and its learning rate
RUNS = [
    (1, 1e-3),  # the student's gradient is that after the update of P
    (2, 1e-30),  # λ is 1/2 at the second of two batches, and nothing has changed before
]


def test_a_copy_of_the_core_changes_nothing_in_the_process_and_makes_the_step_of_train(
    torch_and_numpy, tmp_path, monkeypatch
):
    case = bench.CASES["XS"] | {"dropout": 0.0, "lengths": [(5, 4), (3, 12), (7, 1), (2, 9)]}
    cpu, limit, eos_token_id = torch.device("cpu"), case["max_new_tokens"], case["vocab"] - 1
    run, examples = bench.make_run(case, cpu), bench.make_examples(case)
    run.micro_batch_tokens = 40  # several micro-batches
    content = {"runs": RUNS, "P": run.P.detach().clone()}
    content["requests"] = [e.request for e in examples]
    content["responses"] = [e.response for e in examples]
    for role, model in (("student", run.student), ("teacher", run.teacher)):
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        content[role] = {"config": asdict(model.config), "weights": weights}
    torch.save(content, tmp_path / "case.pt")
    before, after, modules = json.loads(run_alone(tmp_path, torch_and_numpy).splitlines()[0])
    assert after == before
    assert {"model", "losses", "prompt", "sample"} <= set(modules)
    assert not any(name.partition(".")[0] == "data" for name in modules)
    gradients = {}  # before they are clipped
    clip_and_step = train.clip_and_step

    def keep_gradients(optimizer):
        is_prompt = optimizer is run.prompt_optimizer
        parameters = [run.P] if is_prompt else run.student.parameters()
        gradients["P" if is_prompt else "q"] = [p.grad.clone() for p in parameters]
        return clip_and_step(optimizer)

    monkeypatch.setattr(train, "clip_and_step", keep_gradients)
    responses = {e.index: e.response for e in examples}
    for (n_batches, lr), alone in zip(RUNS, torch.load(tmp_path / "result.pt"), strict=True):
        run, t = bench.make_run(case, cpu), (n_batches - 1) * run.total_steps // 2
        for optimizer in (run.optimizer, run.prompt_optimizer):
            set_learning_rate(optimizer, lr)
        with force_responses(responses, limit, eos_token_id, cpu):
            train.promptkd_step(run, [replace(e, response=[]) for e in examples], t)
        for name, expected in gradients.items():
            torch.testing.assert_close(alone[name], expected, rtol=1e-6, atol=1e-6)
        assert float(gradients["P"][0].abs().max()) > 1e-3  # not all 0 to 1e-6
