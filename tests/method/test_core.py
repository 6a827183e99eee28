"""model.py, losses.py, prompt.py and sample.py stand alone: copied into an empty folder they make a
step of PromptKD, and importing them changes nothing in the process."""

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

import train
from data.runs.optim import set_learning_rate

CORE = ("model.py", "losses.py", "prompt.py", "sample.py")
LR = 1e-3


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
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(packages)
    command = [sys.executable, "-S", "-c", SCRIPT]
    kwargs = {"capture_output": True, "text": True}
    result = subprocess.run(command, cwd=folder, env=environment, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_copy_of_the_core_changes_nothing_in_the_process_and_makes_the_step_of_train(
    torch_and_numpy, tmp_path, monkeypatch
):
    case = bench.CASES["XS"] | {"dropout": 0.0, "lengths": [(5, 4), (3, 12), (7, 1), (2, 9)]}
    cpu, limit, eos_token_id = torch.device("cpu"), case["max_new_tokens"], case["vocab"] - 1
    run, examples, t = bench.make_run(case, cpu), bench.make_examples(case), 250
    run.micro_batch_tokens = 40  # several micro-batches
    for optimizer in (run.optimizer, run.prompt_optimizer):
        set_learning_rate(optimizer, LR)
    content = {"lam": 1 - t / run.total_steps, "lr": LR, "P": run.P.detach().clone()}
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
    alone = torch.load(tmp_path / "result.pt", weights_only=True)

    gradients = {}  # before they are clipped
    clip_and_step = train.clip_and_step

    def keep_gradients(optimizer):
        if optimizer is run.prompt_optimizer:
            gradients["P"] = run.P.grad.clone()
        else:
            named = run.student.named_parameters()
            gradients["q"] = {name: parameter.grad.clone() for name, parameter in named}
        return clip_and_step(optimizer)

    monkeypatch.setattr(train, "clip_and_step", keep_gradients)
    responses = {e.index: e.response for e in examples}
    with force_responses(responses, limit, eos_token_id, cpu):
        metrics = train.promptkd_step(run, [replace(e, response=[]) for e in examples], t)

    names = ("prompt_loss", "prompt_kd", "prompt_reg", "kl_prompted_bare")
    ours = torch.stack([metrics[name] for name in names])
    torch.testing.assert_close(alone["prompt_losses"], ours, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alone["loss"], metrics["loss"], rtol=1e-6, atol=1e-6)
    assert alone["q"].keys() == gradients["q"].keys()
    for ours, theirs in ((gradients["P"], alone["P"]), (gradients["q"], alone["q"])):
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)
    assert float(gradients["P"].abs().max()) > 1e-3  # not all 0 to 1e-6
