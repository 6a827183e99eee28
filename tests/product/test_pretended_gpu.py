"""Every method and command on a pretended GPU (pretended_gpu.py): no operation mixes tensors of two
devices, and the results are those of the CPU but for rounding."""

import gc
import inspect
import json
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    TINY,
    fork_ranks,
    interrupted_in_step,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    wait_for,
    write_checkpoint,
    write_rows,
)
from pretended_gpu import GPU, pretended_gpu
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import exposure_bias
import sample
import train
from data.models import sampling
from data.models.named import load_model
from data.process import dist, threads
from data.runs import report, runs, stages, tuned_prompt
from data.runs.methods import METHODS, ResponseSettings, Settings, preset
from data.sets import rows
from losses import aligned_logits
from model import KVCache

CPU = torch.device("cpu")
# Rows of a cache that a tenth of the card holds: several batches in a rollout
SMALL_CARD = (
    10 * 5 * KVCache.row_bytes(replace(talker_config(), n_layer=1), rows.MAX_REQUEST + 6, "float32")
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two models, the data of all methods, and the responses of the teacher."""
    directory = tmp_path_factory.mktemp("world")
    tokenizer, config = tiny_tokenizer(), replace(talker_config(), n_layer=1)
    write_checkpoint(directory / "student", config, tokenizer)
    write_checkpoint(directory / "teacher", replace(config, n_layer=2, n_embd=48), tokenizer)
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
    for response, of_cpu in zip(found["responses"], expected["responses"], strict=True):
        assert response["tokens"] == of_cpu["tokens"]


# ---- what is done for a GPU ----------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """A card as far as `dist.init_process` asks for it."""
    properties = SimpleNamespace(uuid="GPU-0", total_memory=SMALL_CARD)
    answers = {"is_available": True, "device_count": 1, "get_device_properties": properties}
    answers |= {"is_bf16_supported": True, "get_device_name": "card", "set_device": None}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_cudnn_is_not_used_for_attention(card):
    assert dist.init_process() == (torch.device("cuda", 0), "bfloat16")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_is_in_segments_that_grow_unless_the_user_has_chosen(monkeypatch, name):
    monkeypatch.setattr(threads.sys, "platform", "linux")
    monkeypatch.setattr(threads.os, "environ", {})
    threads.configure_threads()
    assert threads.os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setattr(threads.os, "environ", {name: "max_split_size_mb:64"})
    threads.configure_threads()
    chosen = {k: v for k, v in threads.os.environ.items() if k.endswith("ALLOC_CONF")}
    assert chosen == {name: "max_split_size_mb:64"}


def test_memory_in_a_cycle_of_references_is_free_when_a_stage_begins(monkeypatch):
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    run = SimpleNamespace(weight=torch.zeros(3))
    run.optimizer, weight = SimpleNamespace(run=run), weakref.ref(run.weight)
    gc.disable()
    try:
        del run
        assert weight() is not None
        runs.reset_peak_memory(torch.device("cuda"))
        assert weight() is None
    finally:
        gc.enable()


def test_rows_of_logits_are_aligned():
    """Both products of the backward pass read the logits, and V = 61 is odd."""
    head, hidden = torch.randn(61, 32), torch.randn(5, 32)
    with pretended_gpu():
        logits = aligned_logits(hidden.to(GPU), head.to(GPU))
        assert logits.stride() == (64, 1)
        assert logits.dtype == torch.float32
        assert torch.allclose(logits.cpu()[:, :61], hidden @ head.T, atol=1e-5)


def sample_on_unlike_cards(world, out):
    """A rank's part of a test: the second one has a tenth of the memory. Prints what it has got."""
    dist.init_process()
    with pretended_gpu(SMALL_CARD / 10 ** dist.rank()):
        model, tokenizer = load_model(str(world / "student"), GPU)
        found = rows.read_rows(world / "responses" / "train.jsonl")
        options = {"max_new_tokens": 6, "dtype": "float32"}
        results = evaluate.evaluate(model, tokenizer, found, (10, "evaluate", "x"), **options)
        print(json.dumps([result["index"] for result in results]))
        file = out / "train.jsonl"
        sampling.sample_to_file(model, tokenizer, found, (10, "responses"), file, 6)
    dist.shutdown()


def test_ranks_with_unlike_cards_cut_the_same_batches(world, tmp_path):
    """Else rows are lost or evaluated twice, or ranks wait for each other."""
    command = partial(sample_on_unlike_cards, world, tmp_path)
    assert wait_for(fork_ranks(command, 2, tmp_path / "log"), 60) == [0, 0], tmp_path
    for rank in range(2):
        assert "[0, 1, 2, 3, 4, 5, 6, 7]" in (tmp_path / f"log{rank}").read_text()
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    instructions = [json.loads(line)["instruction"] for line in lines]
    source = (world / "responses" / "train.jsonl").read_text().splitlines()
    assert instructions == [json.loads(line)["instruction"] for line in source]


def test_more_memory_is_for_the_cache_where_nothing_is_trained(world, monkeypatch):
    """Four tenths of the card in place of one, for evaluation and the responses of SeqKD."""
    with pretended_gpu(SMALL_CARD):
        model, _ = load_model(str(world / "student"), GPU)
        sizes = [
            sampling.sampling_batch_size([model], 100, 6, "float32", share=share)
            for share in (sampling.CACHE_SHARE, sampling.CACHE_SHARE_ALONE)
        ]
    assert sizes == [5, 20]


class CountOperations(TorchDispatchMode):
    """Counts the operations of PyTorch that do work: no views."""

    VIEWS = set("view t transpose select slice split unsqueeze lift_fresh".split())

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.overloadpacket.__name__ not in self.VIEWS
        return func(*args, **(kwargs or {}))


def test_a_decoded_token_takes_few_operations():
    """On a GPU each is a launch, which takes longer than the work of a small batch. The mask is
    made once per token: in a layer there are LayerNorms and matrix products (6), the two writes to
    the cache, attention, GELU and the additions of the residual stream (2)."""
    counts = []
    for n_layer in (2, 3):
        model = tiny_model(replace(TINY, n_layer=n_layer))
        decoder = sample.Decoder(model, None, torch.tensor([3, 2]), 8, "float32")
        with torch.no_grad():
            decoder.prefill(torch.tensor([[1, 2, 3], [4, 5, 0]]))
            with CountOperations() as operations:
                decoder.step(torch.tensor([[1], [2]]))
        counts.append(operations.n)
    assert counts[1] - counts[0] == 12
    assert counts[0] <= 38


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
