"""Every method and command on a pretended GPU (pretended_gpu.py): no operation mixes tensors of two
devices, and the results are those of the CPU but for rounding."""

import inspect
import json
from dataclasses import replace

import pytest
import torch
from helpers import (
    interrupted_in_step,
    talker_config,
    tiny_tokenizer,
    write_checkpoint,
    write_rows,
)
from pretended_gpu import GPU, pretended_gpu

import evaluate
import exposure_bias
import sample
import train
from data.models import sampling
from data.runs import report, stages, tuned_prompt
from data.runs.methods import METHODS, ResponseSettings, Settings, preset
from data.sets import rows
from model import KVCache

CPU = torch.device("cpu")
# Rows of a cache that a tenth of the card holds: several batches in a rollout
SMALL_CARD = 10 * 5 * KVCache.row_bytes(talker_config(), rows.MAX_REQUEST + 6, "float32")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two models, the data of all methods, and the responses of the teacher."""
    directory = tmp_path_factory.mktemp("world")
    tokenizer, config = tiny_tokenizer(), talker_config()
    write_checkpoint(directory / "student", config, tokenizer)
    write_checkpoint(directory / "teacher", replace(config, n_layer=3, n_embd=48), tokenizer)
    words = "a describes further input context task".split()
    for name, n in {"train": 12, "dev": 4, "test": 3, "responses/train": 8}.items():
        found = [{"instruction": f"{words[i % 6]} " * i, "output": words[i % 5]} for i in range(n)]
        write_rows(directory / f"{name}.jsonl", found)
    write_rows(directory / "pretrain.jsonl", [{"text": " ".join(words * 9)}] * 9)
    (directory / "text.txt").write_text(" ".join(words * 200))
    return directory


def few_steps(method, world):
    """The Settings of two short steps of a method, with its demo's preset."""
    values = preset(method, "demo") | {"steps": 2, "warmup_steps": 0, "global_batch_size": 4}
    values |= {"max_new_tokens": 6, "eval_interval": 1, "metric_for_best": "rouge_l"}
    if METHODS[method].needs_teacher:
        values["teacher"] = str(world / "teacher")
    if method == "minillm":
        values |= {"rollout_size": 8, "lm_data": str(world / "text.txt"), "block_size": 32}
    if method == "seqkd":
        values["responses"] = str(world / "responses")
    if method == "pretrain":
        values |= {"block_size": 32, "metric_for_best": "loss"}
    student = "1x16x2" if method == "pretrain" else str(world / "student")
    return Settings(method, student, str(world), **values)


def metrics_of(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    clock = ("seconds", "tokens_per_second", "memory_resident_gb")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def on_both(function, *arguments):
    """A function's result on the CPU and on the pretended GPU; the device is its last argument."""
    on_cpu = function(*arguments, CPU)
    with pretended_gpu(SMALL_CARD):
        return on_cpu, function(*arguments, GPU)


def train_stage(method, world, out, device, name="run"):
    train.run_stage(name, few_steps(method, world), out / device.type, 300, device)
    return out / device.type / name


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(report, "plot_curves", lambda directory: "no plot")
    monkeypatch.setattr(stages, "load_tokenizer", lambda directory: tiny_tokenizer())


@pytest.mark.parametrize("method", METHODS)
def test_a_stage_has_the_numbers_of_the_cpu(world, tmp_path, method):
    """Loading, two steps of several micro-batches, sampling, validation and checkpoints."""
    expected, found = map(metrics_of, on_both(train_stage, method, world, tmp_path))
    assert len(found) == len(expected) > 0
    for line, expected_line in zip(found, expected):
        assert line == pytest.approx(expected_line, rel=1e-3, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*to a meta parameter")  # which has values here
def test_a_killed_stage_resumes(world, tmp_path):
    """The weights and the states of both optimizers are moved to the device."""
    with pretended_gpu(SMALL_CARD):
        whole = train_stage("promptkd", world, tmp_path, GPU, "whole")
        with interrupted_in_step("promptkd", 1):
            train_stage("promptkd", world, tmp_path, GPU, "killed")
        assert (tmp_path / "meta" / "killed" / "state").is_dir()
        killed = train_stage("promptkd", world, tmp_path, GPU, "killed")
    for name in ("model.safetensors", "prompt.safetensors"):
        assert (whole / "best" / name).read_bytes() == (killed / "best" / name).read_bytes()
    assert metrics_of(whole) == metrics_of(killed)


def test_the_responses_of_seqkd_are_those_of_the_cpu(world, tmp_path):
    s = ResponseSettings(student=str(world / "teacher"), data=str(world), max_new_tokens=6)

    def respond(device):
        directory = tmp_path / device.type
        stages.sample_responses(directory, s, device)
        return (directory / "train.jsonl").read_text()

    expected, found = on_both(respond)
    assert found == expected


# ---- commands ------------------------------------------------------------------------------------


def test_sample_py_has_the_tokens_of_the_cpu(world, capsys):
    """With a soft prompt, filters and a ban."""
    file = world / "test.jsonl"
    options = ["--file", str(file), "--json", "--max-new", "8", "--top-k", "30", "--top-p", "0.9"]
    options += ["--no-repeat-ngram", "2", "--dtype", "float32"]

    def respond(device):
        sampling.main([str(world / "student"), *options])
        return [json.loads(line)["ids"] for line in capsys.readouterr().out.splitlines()]

    expected, found = on_both(respond)
    assert len(found) == 3
    assert found == expected


def test_evaluate_py_and_exposure_bias_py_have_the_scores_of_the_cpu(world, tmp_path):
    models = ["--teacher", str(world / "teacher"), "--students", str(world / "student")]
    short = ["--data", str(world), "--dtype", "float32", "--out"]

    def measure(device):
        out = tmp_path / device.type
        evaluate.main([str(world / "student"), "--seeds", "10", "--max-new", "6", *short, str(out)])
        exposure_bias.main([*models, "--samples", "2", "--steps", "6", *short, str(out)])
        [responses] = out.glob("responses/**/*.jsonl")
        texts = [json.loads(line)["text"] for line in responses.read_text().splitlines()[1:]]
        curve = json.loads((out / "figure_3a.json").read_text())["students"]["student"]
        return texts, curve

    (expected_texts, expected_curve), (texts, curve) = on_both(measure)
    assert texts == expected_texts
    for name, values in expected_curve.items():
        assert curve[name] == pytest.approx(values, rel=1e-3, abs=1e-4), name


def test_prompt_py_has_the_measures_of_the_cpu(world, tmp_path):
    train_stage("promptkd", world, tmp_path, CPU)
    directory = tmp_path / "cpu" / "run"

    def show(device):
        tuned_prompt.main([str(directory)])
        return json.loads((directory / "prompt.json").read_text())

    expected, found = on_both(show)
    assert found["references"] == pytest.approx(expected["references"], rel=1e-4)
    assert found["response"]["tokens"] == expected["response"]["tokens"]


# ---- the pretended GPU itself --------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, moved, left",
    [
        (sample.pad, "ids.to(device)", "ids"),
        (
            rows.make_batch,
            "torch.arange(ids.shape[1], device=device)",
            "torch.arange(ids.shape[1])",
        ),
        (train.build, "P.to(device)", "P"),
    ],
    ids=["sample.py", "data", "train.py"],
)
def test_a_tensor_that_was_left_on_the_cpu_is_noticed(
    world, tmp_path, monkeypatch, function, moved, left
):
    source, module = inspect.getsource(function), inspect.getmodule(function)
    assert source.count(moved) == 1, f"{function.__name__} has no `{moved}` any more"
    monkeypatch.setattr(module, function.__name__, function)  # restored after the test
    exec(source.replace(moved, left), vars(module))
    with pretended_gpu(), pytest.raises(RuntimeError, match="on the same device"):
        train_stage("promptkd", world, tmp_path, GPU)
