"""Presets, stages, and what a run leaves. A run is skipped if it is complete, resumed if it was
interrupted, and refused if it was made with other settings.

The data is a demo of a few dozen rows in a temporary directory. The models have one layer.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import random
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    METHODS_WITH_STEPS,
    PROMPT,
    Interrupted,
    fork_ranks,
    hf_config,
    interrupted_in_step,
    stop_in_step,
    tiny_model,
    wait_for,
    write_checkpoint,
    write_rows,
)
from safetensors import safe_open

import data.sets.prepare
import evaluate
import train
from data.models.checkpoint import load, save
from data.models.hub import find_model_dir
from data.models.prompts import load_prompt
from data.models.tokenizer import load_tokenizer
from data.process import dist
from data.process.errors import InputError
from data.runs import plan as planning
from data.runs import report, runs, stages, validation
from data.runs.methods import METHODS, options_of_methods, preset
from data.runs.names import base_label
from data.runs.optim import MAX_GRAD_NORM, learning_rate
from data.runs.options import parse_train_args
from data.runs.paper import DEMO_SETS
from data.runs.report import plot_curves
from data.sets import demo
from data.sets.demo import TOKENIZER_DIR, make_document, make_rows
from data.sets.rows import fill_template, read_rows
from model import Config
from prompt import prepend
from sample import row_uniforms, sample

CPU = torch.device("cpu")
TOKENIZER = load_tokenizer(TOKENIZER_DIR)
STUDENT = Config(n_layer=1, n_embd=16, n_head=2, vocab_size=TOKENIZER.n_vocab, n_positions=512)
TEACHER = Config(n_layer=1, n_embd=24, n_head=3, vocab_size=TOKENIZER.n_vocab, n_positions=512)
# Metrics that depend on the clock and the machine
UNLIKE = ("tokens_per_second", "seconds", "memory_resident_gb")


def write_world(directory):
    rng, used = random.Random(2), set()
    counts = {"train": 36, "dev": 8, "test": 3, **{f"{name}/test": 3 for name in DEMO_SETS[1:]}}
    for name, count in counts.items():
        write_rows(directory / f"{name}.jsonl", make_rows(rng, count, used))
    documents = [{"text": make_document(rng, used)} for _ in range(60)]
    write_rows(directory / "pretrain.jsonl", documents)
    (directory / "version.txt").write_text(demo.VERSION)
    return directory


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """For all tests here, `--data demo` is a small demo in a temporary directory, and there are no
    plots, which take longer than these runs."""
    data_dir = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.sets.prepare, "DATA_DIR", data_dir)
        patch.setattr(report, "plot_curves", lambda directory: "no plot")
        yield write_world(data_dir / "demo")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "small", STUDENT, TOKENIZER)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "wide", TEACHER, TOKENIZER)


def change_weights(directory):
    """Add to one weight of a checkpoint."""
    model = load(directory)
    model.wte.weight.data[0, 0] += 1
    save(model, directory)


def demo_rows(name):
    return read_rows(data.sets.prepare.DATA_DIR / "demo" / f"{name}.jsonl")


def demo_texts():
    path = data.sets.prepare.DATA_DIR / "demo" / "pretrain.jsonl"
    return path, [json.loads(line)["text"] for line in path.read_text().splitlines()]


def settings(**values):
    default = {"method": "sft", "student": "small", "data": "demo", "global_batch_size": 16}
    default |= {"lr": 1e-3, "epochs": 1, "schedule": "constant", "max_new_tokens": 8}
    return train.Settings(**{**default, **values})


def minillm_settings(student, teacher, **values):
    """Without --lm-data: rollouts of 16 rows with four steps each."""
    default = {"method": "minillm", "student": str(student), "teacher": str(teacher)}
    default |= {"rollout_size": 16, "global_batch_size": 8, "inner_epochs": 2, "dropout": 0.0}
    return settings(**{**default, **values})


def promptkd_settings(student, teacher, **values):
    default = {"method": "promptkd", "student": str(student), "teacher": str(teacher)}
    default |= {"prompt_lr": 0.05, "lr": 0.01, **PROMPT}
    return settings(**{**default, **values})


def pretrain_settings(**values):
    default = {"method": "pretrain", "student": "1x16x2", "metric_for_best": "loss"}
    return settings(**{**default, **values})


def run_stage(out, s, name="stage", micro_batch_tokens=600, **kwargs):
    """Train a stage and return its directory."""
    train.run_stage(name, s, out, micro_batch_tokens, CPU, **kwargs)
    return out / name


def few_steps(global_batch_size):
    return {"total_steps": 10, "global_batch_size": global_batch_size}


def main(out, *options):
    """train.main in this process. Returns what it printed."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        train.main([*map(str, options), "--out", str(out)])
    return stdout.getvalue()


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def steps_of(directory):
    """The metrics of optimizer steps, without the validation before the first one."""
    return [line for line in metrics(directory) if line["step"]]


def validated_steps(directory):
    return [line["step"] for line in metrics(directory) if "val_loss" in line]


def record(directory):
    return json.loads((directory / "run.json").read_text())


def files(directory):
    """All files below a directory: {path: (content, time of the last change)}."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {p.relative_to(directory): (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}


@pytest.fixture
def steps_seen(monkeypatch):
    """Replaces all steps by one that trains nothing. A list of each step's examples."""
    seen = []

    def step(run, examples, t):
        seen.append(examples)
        run.seconds["student"] = 1.0
        return {"loss": 0.0, "grad_norm": 0.0, "response_tokens": 1}

    for method in train.STEPS:
        monkeypatch.setitem(train.STEPS, method, step)
    return seen


@pytest.fixture
def no_validation(monkeypatch):
    values = {"val_loss": 1.0, "val_rouge_l": 1.0}
    monkeypatch.setattr(train, "validate", lambda run, rows, examples, sampled_rouge_l: values)


@pytest.fixture
def no_demo_table(monkeypatch):
    monkeypatch.setattr(train, "show_demo", lambda models, device, dtype: None)


# ---- presets: the table of the paper's Appendix A, at 8 GPUs -----------------------------------

SHAPES = {
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}

# stage, model: global batch size, learning rate, schedule, warm-up, epochs
APPENDIX_A = {
    ("sft", "gpt2"): (32, 5e-4, "cosine", 0, 20),
    ("sft", "gpt2-medium"): (32, 1e-4, "cosine", 0, 20),
    ("sft", "gpt2-large"): (32, 1e-4, "cosine", 0, 10),
    ("sft", "gpt2-xl"): (32, 5e-5, "cosine", 0, 10),
    ("teacher", "gpt2-xl"): (32, 5e-5, "cosine", 0, 10),
    ("init", "gpt2"): (32, 5e-4, "cosine", 0, 3),
    ("init", "gpt2-medium"): (32, 1e-4, "cosine", 0, 3),
    ("init", "gpt2-large"): (32, 1e-4, "cosine", 0, 3),
    ("kd", "gpt2"): (32, 5e-4, "cosine", 0, 20),
    ("kd", "gpt2-medium"): (32, 1e-4, "cosine", 0, 20),
    ("kd", "gpt2-large"): (32, 1e-4, "cosine", 0, 10),
    ("seqkd", "gpt2"): (32, 5e-4, "cosine", 0, 20),
    ("seqkd", "gpt2-medium"): (32, 1e-4, "cosine", 0, 20),
    ("seqkd", "gpt2-large"): (32, 1e-4, "cosine", 0, 10),
    ("minillm", "gpt2"): (256, 5e-6, "constant", 100, 10),
    ("minillm", "gpt2-medium"): (64, 5e-6, "constant", 100, 10),
    ("minillm", "gpt2-large"): (64, 5e-6, "constant", 100, 10),
    ("gkd", "gpt2"): (256, 5e-5, "constant", 100, 20),
    ("gkd", "gpt2-medium"): (64, 1e-5, "constant", 100, 20),
    ("gkd", "gpt2-large"): (64, 5e-6, "constant", 100, 15),
    ("promptkd", "gpt2"): (256, 5e-5, "constant", 100, 20),
    ("promptkd", "gpt2-medium"): (64, 1e-5, "constant", 100, 20),
    ("promptkd", "gpt2-large"): (64, 5e-6, "constant", 100, 15),
}


def write_config(directory, n_layer, n_embd, n_head, vocab_size=50257):
    directory.mkdir(parents=True, exist_ok=True)
    config = hf_config(Config(n_layer, n_embd, n_head, vocab_size))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_hub(directory, repository, shape):
    """A model in a Hugging Face cache, without its weights."""
    folder = directory / "hub" / f"models--{repository.replace('/', '--')}"
    (write_config(folder / "snapshots" / "abc", *shape) / "model.safetensors").touch()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face cache with the configurations of the four official models but no weights:
    enough for planning stages."""
    for name, shape in SHAPES.items():
        write_hub(tmp_path, f"openai-community/{name}", shape)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    gpt2 = SimpleNamespace(n_vocab=50257)  # of which only the size counts here
    monkeypatch.setattr("data.models.tokenizer.tiktoken.get_encoding", lambda name: gpt2)


def model_preset(stage, model):
    size = planning.preset_size(stage, planning.named_model(model), is_demo=False)
    return preset(stage, size)


def preset_settings(stage, model):
    method = "sft" if stage in ("teacher", "init") else stage
    return train.Settings(method=method, student=model, data="dolly", **model_preset(stage, model))


@pytest.mark.parametrize("stage, model", APPENDIX_A)
def test_preset_is_that_of_the_paper(hub, capsys, stage, model):
    s = preset_settings(stage, model)
    found = (s.global_batch_size, s.lr, s.schedule, s.warmup_steps, s.epochs)
    assert found == APPENDIX_A[stage, model]
    assert (s.max_new_tokens, s.seed, s.steps) == (256, 10, None)
    assert s.metric_for_best == ("loss" if stage == "init" else "rouge_l")
    minillm_fields = (s.rollout_size, s.inner_epochs, s.max_steps, s.eval_interval, s.lm_data)
    optimizer_fields = (s.beta2, s.weight_decay, s.dropout)
    if stage == "minillm":
        assert minillm_fields == (256, 4, 5000, 100, None)
        assert optimizer_fields == (0.95, 1e-6, 0.0)
    else:
        assert minillm_fields == (None, 1, None, None, None)
        assert optimizer_fields == (0.999, 1e-2, 0.1)
    prompt_fields = (s.prompt_text, s.prompt_init, s.prompt_length)
    directions = (s.reg_weight, s.prompt_kl, s.reg_kl)
    if stage == "promptkd":
        assert (s.prompt_lr, *prompt_fields) == (s.lr, "Suppose you are a student.", "text", None)
        assert directions == (1.0, "reverse", "reverse")
    else:
        assert {s.prompt_lr, *prompt_fields, *directions} == {None}
    assert capsys.readouterr().out == ""  # nothing to explain for an official size


def test_minillms_optimizer_is_as_released_and_there_is_no_prompt(student, teacher):
    s = minillm_settings(student, teacher, beta2=0.95, weight_decay=1e-6)
    run = train.build(s, few_steps(8), TOKENIZER, 600, CPU)
    assert {group["betas"] for group in run.optimizer.param_groups} == {(0.9, 0.95)}
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [1e-6, 0.0]
    assert run.P is None
    assert run.lm_blocks is None
    assert not any(w.requires_grad for w in run.teacher.parameters())


@pytest.mark.parametrize(
    "stage, model, n_steps",
    [
        # of Dolly's 11,435 rows: 357 batches of 32, 178 of 64, 44 of 256, and 44 rollouts of 256
        ("kd", "gpt2", 357 * 20),
        ("seqkd", "gpt2-large", 357 * 10),
        ("gkd", "gpt2", 44 * 20),
        ("gkd", "gpt2-medium", 178 * 20),
        ("gkd", "gpt2-large", 178 * 15),
        ("minillm", "gpt2", 44 * 4 * 10),
        ("minillm", "gpt2-medium", 5000),
        ("minillm", "gpt2-large", 5000),  # 44 * 16 * 10 = 7,040 are over the maximum
        ("promptkd", "gpt2", 44 * 20),
    ],
)
def test_steps_of_a_preset_on_dolly(hub, stage, model, n_steps):
    s = preset_settings(stage, model)
    plan = stages.plan_steps(s, 11_435)
    assert (plan["total_steps"], plan["global_batch_size"]) == (n_steps, s.global_batch_size)


def test_a_stage_has_the_papers_optimizers_for_student_and_prompt(student, teacher):
    run = train.build(promptkd_settings(student, teacher), few_steps(16), TOKENIZER, 600, CPU)
    for optimizer, parameters in (
        (run.optimizer, list(run.student.parameters())),
        (run.prompt_optimizer, [run.P]),
    ):
        assert isinstance(optimizer, torch.optim.AdamW)
        groups = optimizer.param_groups
        assert {group["betas"] for group in groups} == {(0.9, 0.999)}
        assert groups[0]["weight_decay"] == 1e-2
        assert {id(w) for g in groups for w in g["params"]} == {id(w) for w in parameters}
    assert MAX_GRAD_NORM == 1.0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_is_the_students_only_and_the_teacher_is_frozen(student, teacher, dropout):
    s = promptkd_settings(student, teacher, dropout=dropout)
    run = train.build(s, few_steps(16), TOKENIZER, 600, CPU)
    modules = [module for module in run.student.modules() if isinstance(module, torch.nn.Dropout)]
    assert {module.p for module in modules} == {dropout}
    assert {block.attn.dropout for block in run.student.h} == {dropout}
    assert not any(module.training for module in run.teacher.modules())
    assert not any(w.requires_grad for w in run.teacher.parameters())
    assert all(w.requires_grad for w in [run.P, *run.student.parameters()])


@pytest.mark.parametrize(
    "init, length", [("text", None), ("text", 3), ("text", 11), ("padding", 4), ("random", 5)]
)
def test_prompt_is_initialized_from_the_teachers_embeddings(student, teacher, init, length):
    s = promptkd_settings(student, teacher, prompt_init=init, prompt_length=length)
    run = train.build(s, few_steps(16), TOKENIZER, 600, CPU)
    tokens = TOKENIZER.encode("Suppose you are a student.")
    n = length or len(tokens)
    assert run.P.shape == (n, 24)
    if init == "random":
        assert 0.5 < run.P.std() < 1.5
        return
    source = tokens if init == "text" else [TOKENIZER.eot_token]
    expected = [source[i % len(source)] for i in range(n)]
    assert torch.equal(run.P.detach(), run.teacher.wte.weight[expected])


@pytest.mark.parametrize(
    "shape, size, official",
    [
        ((2, 64, 2), "base", "gpt2"),
        ((12, 896, 14), "base", "gpt2"),
        ((20, 1024, 16), "medium", "gpt2-medium"),
        ((40, 1280, 20), "large", "gpt2-large"),
        ((44, 1600, 25), "xl", "gpt2-xl"),
    ],
)
def test_another_size_has_the_preset_nearest_in_parameter_count_and_this_is_printed(
    tmp_path, capsys, hub, shape, size, official
):
    values = model_preset("sft", str(write_config(tmp_path / "other", *shape)))
    printed = capsys.readouterr().out
    assert values == model_preset("sft", official)
    assert re.search(rf"other has [\d,]+ parameters.* GPT-2 {size}\n", printed)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].start == "init"])
def test_a_student_as_large_as_the_teacher_has_the_preset_of_the_largest_of_the_paper(hub, method):
    assert model_preset(method, "gpt2-xl") == model_preset(method, "gpt2-large")


def test_pre_training_has_one_preset_for_every_size(hub):
    for model in SHAPES:
        s = preset_settings("pretrain", model)
        found = (s.global_batch_size, s.lr, s.schedule, s.warmup_steps, s.epochs)
        assert found == (32, 1e-3, "cosine", 50, 3)
        assert (s.beta2, s.dropout, s.metric_for_best) == (0.95, 0.0, "loss")


@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_cosine_falls_from_the_peak_to_1e_7(warmup_steps):
    rates = [learning_rate(5e-4, step, 100, "cosine", warmup_steps) for step in range(101)]
    assert rates[warmup_steps] == pytest.approx(5e-4)
    assert rates[(100 + warmup_steps) // 2] == pytest.approx((5e-4 + 1e-7) / 2)
    assert rates[100] == pytest.approx(1e-7)
    assert all(a > b for a, b in zip(rates[warmup_steps:], rates[warmup_steps + 1 :], strict=False))


def test_warm_up_is_linear_from_above_0_and_the_rate_constant_after_it():
    rates = [learning_rate(1e-5, step, 1000, "constant", 100) for step in range(1000)]
    assert rates[:100] == pytest.approx([1e-5 * (step + 1) / 100 for step in range(100)])
    assert set(rates[100:]) == {1e-5}


# ---- which stages are run, and under which names -----------------------------------------------


@pytest.fixture
def plan(hub, tmp_path, monkeypatch):
    """A function that calls train.main without training, and returns the stages: name, settings,
    paper and so on. Each leaves its record and a configuration."""
    monkeypatch.chdir(tmp_path)
    planned = []

    def run_stage(name, s, out, micro_batch_tokens, device, paper, keep, save_every, command):
        fields = {"micro_batch_tokens": micro_batch_tokens, "keep": keep}
        fields["save_every"] = save_every
        planned.append(SimpleNamespace(name=name, settings=s, paper=paper, **fields))
        best = tmp_path / out / name / "best"
        if s.method == "pretrain":
            write_config(best, *map(int, s.student.split("x")))
        else:
            config = (find_model_dir(s.student) / "config.json").read_bytes()
            best.mkdir(parents=True, exist_ok=True)
            (best / "config.json").write_bytes(config)
        found = {"format": runs.RUN_FORMAT, "name": name, "paper": paper, "complete": True}
        found["base"] = base_label(s.student)
        (best.parent / "run.json").write_text(json.dumps({**found, "settings": asdict(s)}))
        return f"{out}/{name}"

    def sample_responses(directory, s, device):
        planned.append(SimpleNamespace(name=directory.name, settings=s, paper=None))
        return str(directory)

    monkeypatch.setattr(train, "run_stage", run_stage)
    monkeypatch.setattr(stages, "sample_responses", sample_responses)
    monkeypatch.setattr(train, "show_demo", lambda models, device, dtype: None)
    monkeypatch.setattr(stages, "fetch_inputs", lambda args, teacher, student: None)
    monkeypatch.setattr(train, "check_plan", lambda planned, out: None)

    def plan(*options):
        planned.clear()
        train.main(" ".join(options).split())
        return list(planned)

    return plan


def names(planned):
    return [stage.name for stage in planned]


def kinds(planned):
    return [stage.name.split("-")[0] for stage in planned]


# Options, and the stages that they run, by name: fields of their settings
TEACHER_STAGE = {"teacher-gpt2-xl": {"method": "sft", "student": "gpt2-xl", "lr": 5e-5}}
INIT_STAGE = {"init-gpt2": {"method": "sft", "student": "gpt2", "metric_for_best": "loss"}}
FROM_INIT = {"student": "out/init-gpt2", "teacher": "out/teacher-gpt2-xl", "data": "dolly"}
PRETRAINED = {"student": "gpt2", "teacher": "out/teacher-gpt2-xl", "responses": None}
RESPONSES = {"student": "out/teacher-gpt2-xl", "max_new_tokens": 256, "seed": 10}
MINE = {"data": "mine", "max_train_rows": 9}
PLANS = {
    "--student gpt2": TEACHER_STAGE
    | INIT_STAGE
    | {"promptkd-gpt2-s10": FROM_INIT | {"method": "promptkd", "global_batch_size": 256}},
    "--method gkd --student gpt2": TEACHER_STAGE | INIT_STAGE | {"gkd-gpt2-s10": FROM_INIT},
    "--method minillm --student gpt2 --lm-data texts/owt.jsonl": TEACHER_STAGE
    | INIT_STAGE
    | {"minillm-gpt2-lmdataowt-s10": FROM_INIT | {"lm_data": "texts/owt.jsonl"}},
    "--method sft --student gpt2-medium": {
        "sft-gpt2-medium-s10": {"method": "sft", "epochs": 20, "metric_for_best": "rouge_l"}
    },
    "--method kd --student gpt2": TEACHER_STAGE | {"kd-gpt2-s10": PRETRAINED | {"method": "kd"}},
    "--method seqkd --student gpt2": TEACHER_STAGE
    | {"responses-gpt2-xl": RESPONSES | {"method": "responses", "max_train_rows": None}}
    | {"seqkd-gpt2-s10": PRETRAINED | {"responses": "out/responses-gpt2-xl"}},
    "--method pretrain --shape 3x48x4 --data mine": {
        "pretrain-3x48x4-mine": {"method": "pretrain", "student": "3x48x4", "data": "mine"}
    },
    "--student gpt2 --data mine --train-rows 9": {
        "teacher-gpt2-xl-mine-9rows": MINE,
        "init-gpt2-mine-9rows": MINE,
        "promptkd-gpt2-mine-9rows-s10": MINE,
    },
    "": {
        "teacher-3x128x4-demo": {"student": demo.TEACHER, "data": "demo"},
        "init-1x96x4-demo": {"student": demo.STUDENT, "data": "demo"},
        "promptkd-1x96x4-demo-s10": {
            "student": "out/init-1x96x4-demo",
            "teacher": "out/teacher-3x128x4-demo",
        },
    },
}


@pytest.mark.parametrize("options", PLANS)
def test_a_command_runs_its_stages_with_their_settings(plan, tmp_path, options):
    (tmp_path / "mine").mkdir()
    planned = plan(options)
    assert names(planned) == list(PLANS[options])
    for stage, fields in zip(planned, PLANS[options].values()):
        assert {name: getattr(stage.settings, name) for name in fields} == fields


def test_a_run_is_named_by_the_model_that_its_student_started_from(plan, tmp_path):
    (tmp_path / "mine").mkdir()
    plan("--student gpt2 --data mine --train-rows 9")
    models = "--sft-teacher out/teacher-gpt2-xl-mine-9rows --init out/init-gpt2-mine-9rows/best"
    assert names(plan(f"{models} --data mine")) == ["promptkd-gpt2-mine-s10"]


def test_models_that_are_already_fine_tuned_skip_their_stages(plan, tmp_path):
    write_config(tmp_path / "mine", *SHAPES["gpt2-large"])
    assert kinds(plan("--sft-teacher gpt2-xl --student gpt2")) == ["init", "promptkd"]
    assert kinds(plan("--teacher gpt2-large --init mine")) == ["teacher", "promptkd"]
    (alone,) = plan("--sft-teacher gpt2-xl --init mine")
    assert alone.name == "promptkd-mine-s10"
    assert alone.settings.lr == 5e-6  # the preset of GPT-2 large
    assert (alone.settings.student, alone.settings.teacher) == ("mine", "gpt2-xl")


def test_seeds_and_students_share_the_teachers_responses_but_other_rows_or_data_do_not(
    plan, tmp_path
):
    (tmp_path / "mine").mkdir()
    usual = plan("--method seqkd --student gpt2")[1]
    assert plan("--method seqkd --student gpt2-large --seed 11 --lr 0.1")[1] == usual
    other = plan("--method seqkd --student gpt2 --data mine --train-rows 9")
    assert names(other) == [
        "teacher-gpt2-xl-mine-9rows",
        "responses-gpt2-xl-mine-9rows",
        "seqkd-gpt2-mine-9rows-s10",
    ]
    assert (other[1].settings.data, other[1].settings.max_train_rows) == ("mine", 9)


@pytest.mark.parametrize(
    "method, expected",
    [
        ("sft", ["sft"]),
        ("kd", ["teacher", "kd"]),
        ("seqkd", ["teacher", "responses", "seqkd"]),
        ("minillm", ["teacher", "init", "minillm"]),
        ("gkd", ["teacher", "init", "gkd"]),
    ],
)
def test_every_method_runs_the_demo_and_shares_its_stages_with_promptkd(plan, method, expected):
    planned, promptkd = plan(f"--method {method}"), plan()
    assert kinds(planned) == expected
    for stage, kind in zip(planned, expected):
        assert stage in promptkd or kind in ("responses", method)
    assert planned[-1].settings.max_new_tokens == 40
    assert planned[-1].name == f"{method}-1x96x4-demo-s10"
    if method == "seqkd":
        assert planned[1].name == "responses-3x128x4-demo"
        assert planned[1].settings.max_new_tokens == 40


@pytest.mark.parametrize(
    "options, papers",
    [
        ("--student gpt2", ["teacher xl", "init base", "promptkd base"]),
        (
            "--student gpt2-medium --seed 11 --micro-batch-tokens 1000",
            ["teacher xl", "init medium", "promptkd medium"],
        ),
        ("--method sft --student gpt2-large", ["sft large"]),
        ("--method kd --student gpt2", ["teacher xl", "kd base"]),
        ("--method seqkd --student gpt2-large", ["teacher xl", None, "seqkd large"]),
        ("--method gkd --student gpt2-medium", ["teacher xl", "init medium", "gkd medium"]),
        # The paper's MiniLLM had plain text.
        ("--method minillm --student gpt2", ["teacher xl", "init base", None]),
        (
            "--method minillm --student gpt2 --lm-data owt.jsonl",
            ["teacher xl", "init base", "minillm base"],
        ),
        (
            "--method minillm --student gpt2 --lm-data owt.jsonl --lr 1e-5",
            ["teacher xl", "init base", None],
        ),
        ("--student gpt2 --data mine", [None, None, None]),
        ("--student gpt2 --train-rows 100", [None, None, None]),
        ("--student gpt2 --dev-rows 100", [None, None, None]),
        ("--student gpt2 --reg 0", ["teacher xl", "init base", None]),
        ("--student gpt2 --steps 9", ["teacher xl", "init base", None]),
        ("--student gpt2 --teacher gpt2-large", ["teacher large", "init base", None]),
        ("--student gpt2 --sft-teacher gpt2-xl", ["init base", None]),
        ("--method seqkd --student gpt2 --sft-teacher gpt2-xl", [None, None]),
        ("--init gpt2", ["teacher xl", None]),  # not fine-tuned
        ("--student mine", ["teacher xl", None, None]),
        ("--method pretrain --shape 12x768x12 --data dolly", [None]),
        ("", [None] * 3),
    ],
)
def test_a_stage_is_the_papers_only_with_its_models_data_and_settings(
    plan, tmp_path, options, papers
):
    write_config(tmp_path / "mine", *SHAPES["gpt2"])  # a model, and data
    assert [stage.paper for stage in plan(options)] == papers


@pytest.mark.parametrize(
    "options, paper",
    [
        ("--sft-teacher out/teacher-gpt2-xl --init out/init-gpt2", "promptkd base"),
        (
            "--method gkd --sft-teacher out/teacher-gpt2-xl/best --init out/init-gpt2/best",
            "gkd base",
        ),
        ("--method kd --sft-teacher out/teacher-gpt2-xl --student gpt2", "kd base"),
        ("--sft-teacher out/init-gpt2 --init out/init-gpt2", None),
        ("--sft-teacher out/teacher-gpt2-xl --init out/promptkd-gpt2-s10", None),
        # These start from pre-trained students.
        *(
            (f"--method {method} --student out/init-gpt2", None)
            for method in ("sft", "kd", "seqkd")
        ),
    ],
)
def test_runs_of_the_paper_are_recognized_as_models(plan, options, paper):
    plan("--student gpt2")
    assert plan(options)[-1].paper == paper


def test_a_run_whose_name_no_file_may_have_is_refused_before_the_first_stage(plan, tmp_path):
    """The teacher's name fits, that of the method with its options does not."""
    data_dir = tmp_path / ("d" * 225)
    data_dir.mkdir()
    with pytest.raises(
        InputError, match=r"name promptkd-gpt2-d+\.\.\. has \d+ bytes, and a file's"
    ):
        plan(f"--student gpt2 --data {data_dir.name} --lr 0.0001 --epochs 12")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["out/init-gpt2", "out/init-gpt2/best"])
def test_a_run_that_is_not_complete_is_taken_with_a_warning(plan, tmp_path, capsys, model):
    plan("--student gpt2")
    options = f"--sft-teacher out/teacher-gpt2-xl --init {model}"
    path = tmp_path / "out" / "init-gpt2" / "run.json"
    found = json.loads(path.read_text())
    for complete in (True, False):
        path.write_text(json.dumps(found | {"complete": complete}))
        dist.print_once.cache_clear()
        capsys.readouterr()
        plan(options)
        warning = f"warning: {model}: its training is not complete; "
        assert capsys.readouterr().err.count(warning) == (not complete)


def test_a_run_from_the_published_teacher_and_init_is_the_papers(monkeypatch):
    """The released scripts start from these models of MiniLLM."""
    models = "--sft-teacher MiniLLM/teacher-gpt2-1.5B --init MiniLLM/init-gpt2-120M".split()
    monkeypatch.setattr(planning, "known_parameters", lambda name: 124_439_808)
    args = parse_train_args(["--data", "dolly", *models])
    [stage] = planning.plan_stages(args, "float32")
    assert (stage.directory.name, stage.paper) == ("promptkd-init-gpt2-120M-s10", "promptkd base")


@pytest.mark.parametrize(
    "option, value, field, expected, name",
    [
        ("--lr", "1e-4", "lr", 1e-4, "lr0.0001-s10"),
        ("--prompt-lr", "0.001", "prompt_lr", 1e-3, "promptlr0.001-s10"),
        ("--epochs", "7", "epochs", 7, "epochs7-s10"),
        ("--steps", "9", "steps", 9, "steps9-s10"),
        ("--global-batch", "64", "global_batch_size", 64, "globalbatch64-s10"),
        ("--dropout", "0", "dropout", 0.0, "dropout0-s10"),
        ("--prompt-length", "5", "prompt_length", 5, "promptlength5-s10"),
        ("--prompt-init", "random", "prompt_init", "random", "promptinitrandom-s10"),
        ("--reg", "0", "reg_weight", 0.0, "reg0-s10"),
        ("--reg", "2.5", "reg_weight", 2.5, "reg2.5-s10"),
        ("--prompt-kl", "forward", "prompt_kl", "forward", "promptklforward-s10"),
        ("--reg-kl", "forward", "reg_kl", "forward", "regklforward-s10"),
        ("--seed", "11", "seed", 11, "s11"),
        ("--prompt-text", "Explain.", "prompt_text", "Explain.", "prompttext6f0c310e-s10"),
    ],
)
def test_an_override_changes_only_the_methods_own_stage_and_its_name(
    plan, option, value, field, expected, name
):
    usual, planned = plan("--student gpt2"), plan(f"--student gpt2 {option} {value}")
    assert planned[:2] == usual[:2]  # ablations and seeds share teacher and init
    assert getattr(usual[2].settings, field) != expected
    assert planned[2].settings == replace(usual[2].settings, **{field: expected})
    assert planned[2].name == f"promptkd-gpt2-{name}"


def test_rows_and_micro_batch_tokens_apply_to_every_stage_and_keep_to_the_last(plan):
    options = "--train-rows 100 --dev-rows 20 --micro-batch-tokens 300 --keep 20"
    planned = plan(f"--student gpt2 {options}")
    assert [stage.keep for stage in planned] == [0, 0, 20]
    for stage in planned:
        s = stage.settings
        assert (s.max_train_rows, s.max_dev_rows, stage.micro_batch_tokens) == (100, 20, 300)
        assert "100rows" in stage.name  # another number of rows is another stage
    assert {stage.micro_batch_tokens for stage in plan("--student gpt2")} == {None}


@pytest.mark.parametrize(
    "stage, student, n_tokens",
    [
        ("teacher", "gpt2-xl", 1024),
        ("kd", "gpt2-large", 2048),
        ("promptkd", "gpt2", 2048),
        ("promptkd", "gpt2-xl", 1024),
    ],
)
def test_default_micro_batch_tokens_depend_on_the_students_size(hub, stage, student, n_tokens):
    assert stages.default_micro_batch_tokens(preset_settings(stage, student)) == n_tokens


def test_a_stage_without_a_number_of_tokens_has_the_default(tmp_path, student, monkeypatch):
    """Also a pre-training, whose student is a shape and no model."""
    seen, build = [], train.build

    def recording_build(*arguments):
        seen.append(build(*arguments))
        return seen[-1]

    monkeypatch.setattr(train, "build", recording_build)
    for s in (settings(student=str(student)), pretrain_settings(block_size=32)):
        s = replace(s, steps=1, max_dev_rows=2, metric_for_best="loss")
        run_stage(tmp_path, s, name=s.method, micro_batch_tokens=None)
    assert [run.micro_batch_tokens for run in seen] == [2048, 2048]


# ---- options -----------------------------------------------------------------------------------

SHAPE = "--shape 1x16x2"


def some_value(option):
    """A value that an option of data.runs.methods takes."""
    candidates = option.choices or ("1", "0.5", "x")
    for text in candidates:
        with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
            option.type(text)
            return text
    raise AssertionError(f"{option.flag}: add a value that it takes to `some_value`")


@pytest.mark.parametrize("method", METHODS)
def test_each_method_refuses_the_options_that_it_does_not_use_and_takes_the_others(plan, method):
    """The options of models, and those that only some methods have."""
    declared = METHODS[method]
    takes = {SHAPE: declared.start == "shape"}
    takes |= {f"{model} gpt2": declared.needs_teacher for model in ("--teacher", "--sft-teacher")}
    takes |= {"--student gpt2": declared.start != "shape", "--init gpt2": declared.start == "init"}
    for option in options_of_methods():
        takes[f"{option.flag} {some_value(option)}"] = option in declared.options
    required = f"--method {method}" + (f" {SHAPE}" if method == "pretrain" else "")
    for option, is_taken in takes.items():
        if is_taken:
            assert plan(f"{required} {option}")
            continue
        error = rf"^{option.split()[0]} has no effect here \(method {method}\)"
        with pytest.raises(InputError, match=error):
            plan(f"{required} {option}")


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].needs_teacher])
def test_a_model_is_refused_if_another_option_replaces_it(plan, method):
    with pytest.raises(InputError, match="--teacher has no effect"):
        plan(f"--method {method} --teacher gpt2-large --sft-teacher gpt2-xl")
    if METHODS[method].start == "init":
        with pytest.raises(InputError, match="--student has no effect"):
            plan(f"--method {method} --student gpt2 --init gpt2")


# ---- a whole run -------------------------------------------------------------------------------

PRETRAIN = "--method pretrain --shape 1x16x2 --data demo --steps 3 --train-rows 32 --dev-rows"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Pre-training, and a PromptKD run of two steps with its result as teacher and as student. With
    plots."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot_curves", plot_curves)
        first = main(out, *PRETRAIN.split(), 8)
        (model,) = out.iterdir()
        options = f"--data demo --teacher {model} --student {model} --steps 2 --dev-rows 8".split()
        second = main(out, *options)
    return SimpleNamespace(out=out, options=options, printed=(first, second))


def stage_directory(whole, kind):
    (directory,) = whole.out.glob(f"{kind}-*")
    return directory


def best_model(whole, kind):
    return load(stage_directory(whole, kind) / "best").eval()


KINDS = ["pretrain", "teacher", "init", "promptkd"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_leaves_its_record_metrics_and_best_checkpoint_and_no_state(whole, kind):
    directory = stage_directory(whole, kind)
    found = record(directory)
    s = train.Settings(**found["settings"])
    assert found["name"] == directory.name
    assert s.method == ("sft" if kind in ("teacher", "init") else kind)
    assert (s.data, s.seed) == ("demo", 10)
    assert found["versions"]["torch"] == torch.__version__
    assert found["hours"] > 0
    assert found["paper"] is None
    model = load(directory / "best")
    c = model.config
    assert found["parameters"] == model.n_parameters()
    assert (c.n_layer, c.n_embd, c.n_head) == (1, 16, 2)
    text = "the small dog"
    assert load_tokenizer(directory / "best").encode(text) == TOKENIZER.encode(text)
    lines = steps_of(directory)
    assert [line["step"] for line in lines] == list(range(1, found["total_steps"] + 1))
    metric, best = ("val_rouge_l", max) if s.metric_for_best == "rouge_l" else ("val_loss", min)
    assert found["best"] == best(line[metric] for line in lines if "val_loss" in line)
    assert found["best"] == lines[found["best_step"] - 1][metric]
    assert not list(directory.glob("state/*"))
    assert not list(directory.rglob(".*"))


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_have_losses_rates_speed_seconds_by_phase_and_memory(whole, kind):
    lines = steps_of(stage_directory(whole, kind))
    expected = {"step", "epoch", "lr", "loss", "grad_norm", "response_tokens", *UNLIKE}
    phases = {"student"}
    if kind == "promptkd":
        expected |= {"prompt_lr", "prompt_loss", "prompt_kd", "prompt_reg", "kl_prompted_bare"}
        expected |= {"prompt_grad_norm", "lambda"}
        phases = {"sampling", "prompt", "student"}
    for line in lines:
        assert expected <= set(line)
        assert set(line["seconds"]) == phases
        assert all(seconds >= 0 for seconds in line["seconds"].values())
        assert all(math.isfinite(value) for value in line.values() if not isinstance(value, dict))
        assert line["loss"] > 0
        assert line["memory_resident_gb"] > 0.01
    assert "val_loss" in lines[-1]
    assert ("val_rouge_l" in lines[-1]) == (kind in ("teacher", "promptkd"))


@pytest.mark.parametrize("kind", KINDS)
def test_rates_in_the_metrics_are_those_of_the_schedule(whole, kind):
    directory = stage_directory(whole, kind)
    s, n = train.Settings(**record(directory)["settings"]), record(directory)["total_steps"]
    lines = steps_of(directory)
    warmup_steps = min(1, s.warmup_steps)  # of two steps in all
    for name in ("lr", "prompt_lr") if kind == "promptkd" else ("lr",):
        schedule = (n, s.schedule, warmup_steps)
        expected = [learning_rate(getattr(s, name), t, *schedule) for t in range(n)]
        assert [line[name] for line in lines] == expected
    if kind == "promptkd":
        assert [line["lambda"] for line in lines] == [1.0, 0.5]


def test_promptkd_starts_from_the_stages_before_it_and_saves_its_prompt(whole):
    directory = stage_directory(whole, "promptkd")
    s = record(directory)["settings"]
    assert s["teacher"] == stage_directory(whole, "teacher").name
    assert s["student"] == stage_directory(whole, "init").name
    prompt = load_prompt(directory / "best", 16)
    tokens = TOKENIZER.encode("Suppose you are a student.")
    before = best_model(whole, "teacher").wte.weight[tokens]
    assert prompt.shape == before.shape
    assert 0 < (prompt - before).abs().max() < 0.01  # tuned by two small steps
    assert not list(whole.out.glob("[!p]*/best/prompt.safetensors"))


def test_the_prompts_file_names_its_teacher(whole):
    """In a form that the safetensors library reads."""
    directory = stage_directory(whole, "promptkd")
    with safe_open(directory / "best" / "prompt.safetensors", "pt") as file:
        found = file.metadata()
    assert found == {
        "format": "pt",
        "kind": "soft prompt: embeddings in front of the request",
        "teacher": stage_directory(whole, "teacher").name,
        "teacher_sha256": record(directory)["inputs"]["teacher"],
    }


def test_harm_of_the_prompt_is_recorded_at_step_0(whole):
    before = metrics(stage_directory(whole, "promptkd"))[0]
    assert before["step"] == 0
    assert "val_rouge_l" in before
    rows = demo_rows("dev")
    init, teacher = best_model(whole, "init"), best_model(whole, "teacher")
    prompt = teacher.wte.weight[TOKENIZER.encode("Suppose you are a student.")]
    assert before["val_loss"] == pytest.approx(plain_loss(init, rows), rel=1e-5)
    assert before["val_bare_loss"] == pytest.approx(plain_loss(teacher, rows), rel=1e-5)
    expected = plain_loss(teacher, rows, prompt)
    assert before["val_prompted_loss"] == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def plain_loss(model, rows, prompt=None):
    """Nats per response token, computed row by row."""
    total = count = 0
    for row in rows:
        request = TOKENIZER.encode(fill_template(row.instruction, row.input))
        response = [*TOKENIZER.encode(row.references[0]), TOKENIZER.eot_token]
        ids = torch.tensor([request + response])
        hidden = model(ids if prompt is None else prepend(prompt, model, ids))
        log_probs = model.logits(hidden)[0].log_softmax(-1)
        start = len(log_probs) - len(response) - 1
        total -= sum(float(log_probs[start + i, token]) for i, token in enumerate(response))
        count += len(response)
    return total / count


def test_output_has_the_size_of_the_prompt_the_table_and_the_plot(whole):
    n = len(TOKENIZER.encode("Suppose you are a student."))
    n_teacher = best_model(whole, "teacher").n_parameters()
    printed = whole.printed[1]
    share = f"{100 * 16 * n / n_teacher:.4f} % of the teacher's {n_teacher:,} parameters"
    assert f"prompt: {n} × 16 = {16 * n:,} numbers, {share}" in printed
    assert re.search(r"step 2/2 .*val ROUGE-L [\d.]+ .*0:00:00 left", printed)
    assert re.search(r"\n(teacher|student's init|promptkd) +[\d.]+ ± [\d.]+", printed)
    assert str(stage_directory(whole, "promptkd") / "curves.png") in printed


def test_every_stage_plots_its_curves(whole):
    pytest.importorskip("matplotlib")
    for kind in KINDS:
        assert (stage_directory(whole, kind) / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_skips_every_complete_stage_and_changes_no_file(whole, no_demo_table):
    before = files(whole.out)
    printed = main(whole.out, *PRETRAIN.split(), 8), main(whole.out, *whole.options)
    assert files(whole.out) == before
    assert [text.count("complete, skipped") for text in printed] == [1, 3]


def test_other_settings_under_the_same_name_are_refused_by_name_and_nothing_is_changed(whole):
    before = files(whole.out)
    error = r"pretrain-1x16x2-demo.*: was made with max_dev_rows 8, not 4; "
    with pytest.raises(InputError, match=error):
        main(whole.out, *PRETRAIN.split(), 4)
    assert files(whole.out) == before


@pytest.mark.parametrize(
    "keep, steps", [(0, []), (2, [3, 6]), (4, [2, 3, 5, 6]), (99, [1, 2, 3, 4, 5, 6])]
)
def test_kept_checkpoints_are_evenly_spaced_and_the_last_step_is_one(
    tmp_path, student, no_validation, keep, steps
):
    s = settings(student=str(student), steps=6)
    directory = run_stage(tmp_path, s, micro_batch_tokens=1200, keep=keep)
    kept = sorted((directory / "kept").glob("*"))
    assert [path.name for path in kept] == [f"step-{step:06d}" for step in steps]
    if keep:
        first, last = (load(path).state_dict() for path in (kept[0], kept[-1]))
        assert any(not torch.equal(first[name], last[name]) for name in first)
        expected = {"config.json", "generation_config.json", "model.safetensors"}
        expected |= {"merges.txt", "tokenizer_config.json", "vocab.json"}
        assert {path.name for path in kept[0].iterdir()} == expected
    assert (directory / "kept").exists() == (keep > 0)


# ---- interrupted and resumed -------------------------------------------------------------------


def stop_in_a_step(patch, method):
    stop_in_step(patch, method, 3)


def stop_before_a_state(patch, method):
    save_state = train.save_state

    def stopping(run, directory, progress):
        if progress["step"] == 4:
            raise Interrupted
        save_state(run, directory, progress)

    patch.setattr(train, "save_state", stopping)


def stop_while_a_state_is_written(patch, method):
    saved, torch_save = [], torch.save

    def stopping(state, file):
        saved.append(file)
        if len(saved) == 2:
            file.write(b"half of it")
            raise Interrupted
        torch_save(state, file)

    patch.setattr(torch, "save", stopping)


def stop_while_metrics_are_written(patch, method):
    write = runs.MetricsLog.write

    def stopping(self, values):
        if values["step"] == 3:
            with open(self.path, "a") as file:
                file.write(json.dumps(values)[:30])
            raise Interrupted
        write(self, values)

    patch.setattr(runs.MetricsLog, "write", stopping)


def stop_before_the_end(patch, method):
    def stopping(*arguments):
        raise Interrupted

    patch.setattr(stages, "finish_run", stopping)


def options_for(method, student, teacher):
    """36 rows, 16 per step: two steps per epoch, so validations after steps 2, 4 and 6."""
    options = f"--method {method} --data demo --steps 6 --global-batch 16 --dropout 0.2 "
    options += "--micro-batch-tokens 380 --lr 0.01 --dev-rows 4"
    if method == "minillm":
        options += f" --global-batch 8 --lm-data {demo_texts()[0]}"
    if method == "promptkd":
        options += " --prompt-lr 0.01"
    options += f" {'--init' if METHODS[method].start == 'init' else '--student'} {student}"
    if METHODS[method].needs_teacher:
        options += f" --sft-teacher {teacher}"
    return options.split()


def outcome(directory, run):
    """Everything that must not depend on interruptions."""
    lines = [{k: v for k, v in line.items() if k not in UNLIKE} for line in metrics(directory)]
    best = {path.name: path.read_bytes() for path in (directory / "best").iterdir()}
    final = {name: w.clone() for name, w in run.student.state_dict().items()}
    if run.P is not None:
        final["P"] = run.P.detach().clone()
    found = {name: value for name, value in record(directory).items() if name != "hours"}
    return SimpleNamespace(lines=lines, best=best, final=final, record=found)


@pytest.fixture
def built(monkeypatch, no_demo_table):
    """The Runs that are built, in order."""
    built, build = [], train.build

    def recording_build(*arguments):
        built.append(build(*arguments))
        return built[-1]

    monkeypatch.setattr(train, "build", recording_build)
    return built


@pytest.fixture(scope="module")
def uninterrupted():
    """The outcome of each method without interruption."""
    return {}


@pytest.fixture
def minillm_validates_within_a_rollout(monkeypatch):
    """Rollouts of 16 rows with four steps each, and a state after every second step."""
    values = {"rollout_size": 16, "inner_epochs": 2, "eval_interval": 2}
    values |= {"block_size": 32, "max_new_tokens": 12}
    minillm = METHODS["minillm"]
    monkeypatch.setitem(METHODS, "minillm", replace(minillm, demo=minillm.demo | values))


@pytest.mark.parametrize(
    "method, stop",
    [
        *((method, stop_in_a_step) for method in METHODS_WITH_STEPS),
        ("promptkd", stop_before_a_state),
        ("promptkd", stop_while_metrics_are_written),
        ("minillm", stop_while_a_state_is_written),
        ("minillm", stop_before_the_end),
    ],
)
@pytest.mark.usefixtures("minillm_validates_within_a_rollout")
def test_an_interrupted_stage_resumes_from_its_last_state_and_ends_with_the_same_bits(
    tmp_path, student, teacher, built, uninterrupted, method, stop
):
    options = options_for(method, student, teacher)
    if method not in uninterrupted:
        main(tmp_path / "whole", *options)
        (directory,) = (tmp_path / "whole").iterdir()
        uninterrupted[method] = outcome(directory, built[-1])
    expected = uninterrupted[method]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop(patch, method)
        main(tmp_path / "out", *options)
    (directory,) = (tmp_path / "out").iterdir()
    assert "complete" not in record(directory)
    printed = main(tmp_path / "out", *options)
    assert f"resuming after step {6 if stop is stop_before_the_end else 2}" in printed
    found = outcome(directory, built[-1])
    assert found.lines == expected.lines
    first = 0 if method == "promptkd" else 1
    assert [line["step"] for line in found.lines] == list(range(first, 7))
    assert found.best == expected.best
    assert found.record == expected.record
    assert set(found.final) == set(expected.final)
    for name, w in expected.final.items():
        assert torch.equal(found.final[name], w), name
    assert not list(directory.rglob("*.partial"))
    assert not list(directory.glob("state/*.pt"))


def test_runs_with_another_seed_end_with_other_weights(tmp_path, student, teacher, built):
    """So that equal bits above mean something."""
    for seed in (10, 11):
        main(tmp_path, *options_for("sft", student, teacher), "--steps", 2, "--seed", seed)
    first, second = (run.student.wte.weight for run in built)
    assert not torch.equal(first, second)


def test_a_truncated_metrics_line_with_a_closing_brace_does_not_prevent_resuming(tmp_path, student):
    s = settings(student=str(student), epochs=2, max_dev_rows=2)
    with interrupted_in_step("sft", 3):
        run_stage(tmp_path, s)
    path = tmp_path / "stage" / "metrics.jsonl"
    line = path.read_text().splitlines()[-1]
    path.write_text(path.read_text() + line[: line.index("}") + 1])
    assert [line["step"] for line in metrics(run_stage(tmp_path, s))] == [1, 2, 3, 4]


# ---- the training rows -------------------------------------------------------------------------


def test_an_epoch_has_whole_batches_of_rows_in_an_order_of_its_own(
    tmp_path, student, steps_seen, no_validation
):
    directory = run_stage(tmp_path, settings(student=str(student), epochs=3))
    assert record(directory)["total_steps"] == len(steps_seen) == 3 * (36 // 16)
    epochs = [[e.index for batch in steps_seen[i : i + 2] for e in batch] for i in (0, 2, 4)]
    for order in epochs:
        assert len(order) == len(set(order)) == 32
        assert set(order) <= set(range(36))
    assert len({tuple(order) for order in epochs}) == 3
    assert sorted(epochs[0]) != epochs[0]
    assert [line["epoch"] for line in metrics(directory)] == [0.5, 1, 1.5, 2, 2.5, 3]


def test_more_steps_than_the_epochs_have_repeat_the_data(
    tmp_path, student, steps_seen, no_validation
):
    directory = run_stage(tmp_path, settings(student=str(student), epochs=1, steps=5))
    assert [len(batch) for batch in steps_seen] == [16] * 5
    assert validated_steps(directory) == [2, 4, 5]  # after every epoch and the last step


def test_a_batch_is_not_larger_than_the_training_set(tmp_path, student, steps_seen, no_validation):
    run_stage(tmp_path, settings(student=str(student), max_train_rows=10))
    assert [sorted(e.index for e in batch) for batch in steps_seen] == [list(range(10))]


def test_a_row_whose_request_is_over_the_limit_is_left_out_and_counted(
    tmp_path, capsys, student, steps_seen, no_validation
):
    rows = [{"instruction": f"say {word}", "output": word} for word in "one two three four".split()]
    rows[2]["input"] = "a long story " * 150
    for name in ("train", "dev"):
        write_rows(tmp_path / "mine" / f"{name}.jsonl", rows)
    run_stage(tmp_path, settings(student=str(student), data=str(tmp_path / "mine")))
    assert sorted(e.index for e in steps_seen[0]) == [0, 1, 3]
    message = "train.jsonl: 1 of 4 rows have a request over the limit and are left out"
    assert message in capsys.readouterr().out


def test_a_response_is_the_rows_first_reference_and_end_of_text(
    tmp_path, student, steps_seen, no_validation
):
    run_stage(tmp_path, settings(student=str(student), global_batch_size=36))
    rows = demo_rows("train")
    for e in steps_seen[0]:
        row = rows[e.index]
        assert TOKENIZER.decode(e.request) == fill_template(row.instruction, row.input)
        assert TOKENIZER.decode(e.response) == row.references[0] + "<|endoftext|>"


@pytest.mark.parametrize(
    "steps, usual, warmup_steps",
    [(20, 100, 2), (5, 100, 1), (99, 100, 9), (100, 100, 100), (200, 100, 100), (20, 0, 0)],
)
def test_a_run_shorter_than_its_warm_up_takes_a_tenth_of_its_steps_for_it_and_says_so(
    tmp_path, capsys, student, steps_seen, no_validation, steps, usual, warmup_steps
):
    s = settings(student=str(student), steps=steps, warmup_steps=usual, schedule="constant")
    directory = run_stage(tmp_path, s)
    rates = [s.lr * (t + 1) / warmup_steps for t in range(warmup_steps)]
    assert [line["lr"] for line in steps_of(directory)] == rates + [s.lr] * (steps - warmup_steps)
    assert record(directory)["settings"]["warmup_steps"] == usual
    line = f"warm-up of {warmup_steps} steps: its usual {usual} steps are more than the run has\n"
    assert (line in capsys.readouterr().out) == (steps < usual)


@pytest.mark.parametrize(
    "rollout_size, global_batch_size, inner_epochs, steps_each, n_rollouts",
    [
        # Optimizer steps per rollout, and rollouts per epoch of 36 rows
        (12, 4, 2, 6, 3),
        (16, 8, 1, 2, 2),
        (16, 5, 3, 9, 2),  # 16 rows have three batches of 5
        (256, 16, 4, 8, 1),  # there are fewer rows: all of them
        (256, 256, 4, 4, 1),
        (8, 16, 2, 2, 2),  # never fewer than a batch
        (None, 16, 1, 1, 2),
    ],
)
def test_minillm_takes_several_steps_on_the_rows_of_each_rollout(
    tmp_path,
    student,
    teacher,
    steps_seen,
    no_validation,
    rollout_size,
    global_batch_size,
    inner_epochs,
    steps_each,
    n_rollouts,
):
    sizes = {"rollout_size": rollout_size, "global_batch_size": global_batch_size}
    s = minillm_settings(student, teacher, **sizes, inner_epochs=inner_epochs, epochs=2)
    directory = run_stage(tmp_path, s)
    n_steps = 2 * steps_each * n_rollouts
    assert record(directory)["total_steps"] == len(steps_seen) == n_steps
    rows = [[e.index for e in batch] for batch in steps_seen]
    assert all(rows[t] == rows[t - t % steps_each] for t in range(n_steps))
    rollouts = rows[::steps_each]
    epochs = [sum(rollouts[:n_rollouts], []), sum(rollouts[n_rollouts:], [])]
    size = min(36, max(rollout_size or 0, global_batch_size))
    for order in epochs:
        assert len(order) == len(set(order)) == n_rollouts * size
    assert epochs[0] != epochs[1]
    expected = [(t + 1) / (steps_each * n_rollouts) for t in range(n_steps)]
    assert [line["epoch"] for line in metrics(directory)] == pytest.approx(expected)


def test_max_steps_limits_the_epochs_but_not_steps_and_eval_interval_is_in_steps(
    tmp_path, student, teacher, steps_seen, no_validation
):
    # 8 steps per epoch
    s = minillm_settings(student, teacher, epochs=10, max_steps=11, eval_interval=3)
    assert validated_steps(run_stage(tmp_path, s)) == [3, 6, 9, 11]
    assert len(steps_seen) == 11
    run_stage(tmp_path, replace(s, steps=13), "more")
    assert len(steps_seen) == 11 + 13


def test_minillm_logs_both_losses_and_samples_and_scores_once_per_rollout(
    tmp_path, student, teacher
):
    values = {"steps": 6, "block_size": 32, "max_dev_rows": 2, "metric_for_best": "loss"}
    s = minillm_settings(student, teacher, lm_data=str(demo_texts()[0]), **values)
    lines = metrics(run_stage(tmp_path, s))
    phases = [set(line["seconds"]) for line in lines]
    first_of_rollout = {"sampling", "scoring", "student"}
    assert phases == [first_of_rollout if t in (0, 4) else {"student"} for t in range(6)]
    for line in lines:
        assert math.isfinite(line["loss"])
        assert line["lm_loss"] > 0.5
        assert line["response_tokens"] > 8
    directory = run_stage(tmp_path, replace(s, lm_data=None, steps=1), "without")
    assert "lm_loss" not in metrics(directory)[0]


# ---- SeqKD -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seqkd(tmp_path_factory, student, teacher):
    """SeqKD from sampling the teacher to the end, two steps on all 36 rows: the examples of its
    steps and of its validation."""
    options = f"--method seqkd --data demo --student {student} --sft-teacher {teacher} --steps 2"
    options = f"{options} --global-batch 18 --dev-rows 4".split()
    out, steps, validated = tmp_path_factory.mktemp("seqkd"), [], []
    step, validate = train.STEPS["seqkd"], train.validate

    def recording_step(run, examples, t):
        steps.append(examples)
        return step(run, examples, t)

    def recording_validate(run, rows, examples, sampled_rouge_l):
        validated.append((rows, examples))
        return validate(run, rows, examples, sampled_rouge_l)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.STEPS, "seqkd", recording_step)
        patch.setattr(train, "validate", recording_validate)
        patch.setattr(train, "show_demo", lambda models, device, dtype: None)
        main(out, *options)
    responses = out / "responses-wide-demo"
    trained = out / "seqkd-small-demo-steps2-globalbatch18-s10"
    found = {"out": out, "responses": responses, "trained": trained}
    return SimpleNamespace(**found, options=options, steps=steps, validated=validated)


@pytest.fixture(scope="module")
def teacher_responses():
    """The teacher's response to each training request: {index: (request, response)}."""
    rows, eos = demo_rows("train"), TOKENIZER.eot_token
    requests = [TOKENIZER.encode(fill_template(row.instruction, row.input)) for row in rows]
    uniforms = np.stack([row_uniforms(40, 10, "responses", row.index) for row in rows])
    responses, _ = sample(tiny_model(TEACHER), requests, uniforms, eos, 40)
    pairs = zip(requests, responses, strict=True)
    return {row.index: pair for row, pair in zip(rows, pairs, strict=True)}


def test_seqkd_trains_on_exactly_the_tokens_that_the_teacher_sampled(seqkd, teacher_responses):
    seen = {e.index: (e.request, e.response) for batch in seqkd.steps for e in batch}
    assert seen == teacher_responses
    assert [len(batch) for batch in seqkd.steps] == [18, 18]
    truth = {row.index: row.references[0] for row in demo_rows("train")}
    for index, (_, response) in teacher_responses.items():
        assert not TOKENIZER.decode(response).startswith(truth[index])
    n_tokens = sum(line["response_tokens"] for line in metrics(seqkd.trained))
    assert n_tokens == sum(len(response) for _, response in teacher_responses.values())


def test_seqkd_adds_no_end_of_text_to_a_response_that_was_cut_off(seqkd):
    responses, eos = [e.response for batch in seqkd.steps for e in batch], TOKENIZER.eot_token
    cut_off = [response for response in responses if len(response) == 40 and eos not in response]
    finished = [r for r in responses if r[-1] == eos and eos not in r[:-1]]
    assert len(cut_off) > 10
    assert finished
    assert len(cut_off) + len(finished) == len(responses)


def test_seqkd_validates_on_the_rows_own_outputs(seqkd):
    dev_rows = demo_rows("dev")[:4]
    ((rows, examples),) = seqkd.validated
    assert rows == dev_rows
    expected = [row.references[0] + "<|endoftext|>" for row in dev_rows]
    assert [TOKENIZER.decode(e.response) for e in examples] == expected


def test_seqkds_responses_have_a_record(seqkd, student, teacher, teacher_responses):
    assert {path.name for path in seqkd.responses.iterdir()} == {"run.json", "train.jsonl"}
    rows = read_rows(seqkd.responses / "train.jsonl")
    for row, original in zip(rows, demo_rows("train"), strict=True):
        text = TOKENIZER.decode(teacher_responses[row.index][1]).removesuffix("<|endoftext|>")
        assert (row.instruction, row.input) == (original.instruction, original.input)
        assert row.references == (text,)
    assert {path.name for path in seqkd.out.iterdir()} == {seqkd.responses.name, seqkd.trained.name}
    found = record(seqkd.responses)
    assert found["hours"] > 0
    assert found["settings"]["student"] == str(teacher)
    assert found["settings"]["method"] == "responses"
    s = train.Settings(**record(seqkd.trained)["settings"])
    assert (s.responses, s.data) == (seqkd.responses.name, "demo")
    assert (s.teacher, s.student) == (str(teacher), str(student))


def test_seqkds_responses_are_sampled_once_for_all_its_runs(seqkd, built, monkeypatch):
    monkeypatch.setattr(stages, "sample_to_file", lambda *_: pytest.fail("sampled again"))
    before = files(seqkd.responses)
    printed = main(seqkd.out, *seqkd.options, "--seed", 11)
    assert f"{seqkd.responses}: complete, skipped" in printed
    assert len(list(seqkd.out.glob("seqkd-*-s1[01]/best"))) == 2
    assert main(seqkd.out, *seqkd.options).count("complete, skipped") == 2
    assert files(seqkd.responses) == before
    shutil.rmtree(seqkd.out / seqkd.trained.name.replace("-s10", "-s11"))


def test_seqkds_sampling_resumes_after_an_interruption(tmp_path, seqkd, built):
    def stopping(model, tokenizer, rows, key, path, *arguments):
        lines = (seqkd.responses / "train.jsonl").read_text().splitlines(keepends=True)
        path.with_name("train.jsonl.partial").write_text("".join(lines[:7]) + lines[7][:50])
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(stages, "sample_to_file", stopping)
        main(tmp_path, *seqkd.options)
    responses = tmp_path / "responses-wide-demo"
    assert "complete" not in record(responses)
    assert not (responses / "train.jsonl").exists()
    main(tmp_path, *seqkd.options)
    content = (responses / "train.jsonl").read_bytes()
    assert content == (seqkd.responses / "train.jsonl").read_bytes()
    best = tmp_path / seqkd.trained.name / "best"
    for name in ("model.safetensors", "config.json"):
        assert (best / name).read_bytes() == (seqkd.trained / "best" / name).read_bytes()


def test_the_responses_of_another_teacher_under_the_same_name_are_refused(tmp_path, seqkd):
    other = write_checkpoint(tmp_path / "wide", TEACHER, TOKENIZER)
    before = files(seqkd.out)
    change_weights(other)
    with pytest.raises(InputError, match="responses-wide-demo: student .* its content has changed"):
        main(seqkd.out, *seqkd.options, "--sft-teacher", other)
    assert files(seqkd.out) == before


# ---- MiniLLM's plain text ----------------------------------------------------------------------


def read_lm_blocks(path, block_size, n_rows=10):
    s = settings(method="minillm", lm_data=str(path), block_size=block_size)
    return stages.read_lm_blocks(s, TOKENIZER, n_rows)


@pytest.mark.parametrize("n_rows", [1, 3, 1000])
def test_plain_text_is_packed_in_blocks_of_as_many_documents_as_are_needed(n_rows):
    path, documents = demo_texts()
    blocks = read_lm_blocks(path, 32, n_rows)
    pieces = TOKENIZER.decode(packed_text([blocks], 32)).split("<|endoftext|>")
    lengths = [len(TOKENIZER.encode(text)) + 1 for text in documents]
    needed = next((n for n in range(1, 61) if sum(lengths[:n]) > n_rows * 32), 60)
    assert set(pieces[:-1]) <= set(documents[:needed])
    assert any(text.startswith(pieces[-1]) for text in documents[:needed])
    assert len(blocks) == (sum(lengths[:needed]) - 1) // 32 >= min(n_rows, 60)


def test_the_shortest_plain_text_is_one_block_and_the_token_before_it(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("the small dog sees")
    tokens = [*TOKENIZER.encode("the small dog sees"), TOKENIZER.eot_token]
    n = len(tokens)
    (block,) = read_lm_blocks(path, n - 1)
    assert [*block.request, *block.response] == tokens
    with pytest.raises(InputError, match=rf"corpus.txt: has {n} tokens, and a block has {n}; "):
        read_lm_blocks(path, n)


def test_every_rank_reads_only_what_is_needed_of_plain_text(tmp_path, capsys):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "the small dog sees"}\n' * 9 + "can't be read\n")
    assert len(read_lm_blocks(path, 4, n_rows=2)) >= 2
    assert "/corpus.jsonl: its first 2 documents are trained on" in capsys.readouterr().out
    with pytest.raises(InputError, match="corpus.jsonl, line 10: is not JSON"):
        read_lm_blocks(path, 4, n_rows=1000)


# ---- pre-training ------------------------------------------------------------------------------


def packed_text(steps, block_size):
    """The tokens of an epoch's blocks. Each must start with the last token of the one before it."""
    examples = [e for batch in steps for e in batch]
    assert all(len(e.request) == 1 and len(e.response) == block_size for e in examples)
    for i in range(1, len(examples)):
        assert examples[i].request[0] == examples[i - 1].response[-1]
    return [examples[0].request[0], *(token for e in examples for token in e.response)]


def test_pretraining_predicts_every_token_of_the_packed_texts_once(
    tmp_path, steps_seen, no_validation
):
    run_stage(tmp_path, pretrain_settings(global_batch_size=4, block_size=32, epochs=2))
    _, documents = demo_texts()
    n_tokens = sum(len(TOKENIZER.encode(text)) + 1 for text in documents)
    half = len(steps_seen) // 2
    orders = []
    for epoch in (steps_seen[:half], steps_seen[half:]):
        tokens = packed_text(epoch, 32)
        # All but an incomplete block and an incomplete batch of blocks
        assert n_tokens - 4 * 32 - 33 < len(tokens) <= n_tokens
        texts = TOKENIZER.decode(tokens).split("<|endoftext|>")
        assert set(texts[:-1]) <= set(documents)
        assert any(text.startswith(texts[-1]) for text in documents)
        assert len(set(texts)) == len(texts)
        orders.append(texts)
    assert orders[0] != orders[1]


def test_pretraining_on_a_set_without_texts_packs_its_rows_in_gpt2s_tokens(
    tmp_path, shared, monkeypatch, steps_seen, no_validation
):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "gpt2-bpe" / "tiktoken-cache"))
    words = "one two three four five".split()
    rows = [{"instruction": f"say {word}", "input": "", "output": word} for word in words]
    for name in ("train", "dev"):
        write_rows(tmp_path / "mine" / f"{name}.jsonl", rows)
    sizes = {"block_size": 16, "global_batch_size": 100, "max_train_rows": 4}
    s = pretrain_settings(student="1x8x2", data=str(tmp_path / "mine"), **sizes)
    directory = run_stage(tmp_path, s)
    pieces = load_tokenizer().decode(packed_text(steps_seen, 16)).split("<|endoftext|>")
    assert set(pieces[:-1]) < {fill_template(f"say {word}") + word for word in words[:4]}
    assert len(pieces) == 4
    assert load(directory / "best").config.vocab_size == 50257


def test_initial_weights_of_pretraining_depend_on_the_seed(tmp_path, steps_seen, no_validation):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        directory = run_stage(tmp_path, pretrain_settings(seed=seed, steps=1), name)
        weights.append(load(directory / "best").wte.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_rows_limit_the_texts_of_pretraining(tmp_path, steps_seen, no_validation):
    run_stage(tmp_path, pretrain_settings(block_size=32, max_train_rows=3, global_batch_size=1))
    n_tokens = sum(len(TOKENIZER.encode(text)) + 1 for text in demo_texts()[1][:3])
    assert len(steps_seen) == (n_tokens - 1) // 32


# ---- validation and the best checkpoint --------------------------------------------------------


def test_validation_has_the_same_random_numbers_each_time(tmp_path, student, monkeypatch):
    """After steps that change no weight, all validations of a seed give the same texts."""
    seen, evaluate_rows = [], evaluate.evaluate

    def recording_evaluate(*arguments, **kwargs):
        results = evaluate_rows(*arguments, **kwargs)
        seen.append([row["text"] for row in results])
        return results

    def step(run, examples, t):
        torch.rand(t + 1)
        run.seconds["student"] = 1.0
        return {"loss": 0.0, "grad_norm": 0.0, "response_tokens": 1}

    monkeypatch.setattr(evaluate, "evaluate", recording_evaluate)
    monkeypatch.setitem(train.STEPS, "sft", step)
    for name, seed in (("a", 10), ("b", 11)):
        s = settings(student=str(student), epochs=3, seed=seed)
        lines = [line for line in metrics(run_stage(tmp_path, s, name)) if "val_loss" in line]
        assert len(lines) == 3
        assert len({(line["val_loss"], line["val_rouge_l"]) for line in lines}) == 1
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4] == seen[5]
    assert len(seen[0]) == 8
    assert len(set(seen[0])) > 4  # rows have random numbers of their own


@pytest.mark.parametrize(
    "metric_for_best, scores, best",
    [
        # of two with equal ROUGE-L the one with the lower loss
        ("rouge_l", [(2.0, 3.0), (1.5, 9.0), (1.0, 9.0), (0.5, 4.0)], 2),
        ("rouge_l", [(2.0, 3.0), (1.0, 9.0), (1.5, 9.0), (0.5, 4.0)], 1),
        ("rouge_l", [(2.0, 0.0), (1.0, 0.0), (1.5, 0.0), (1.0, 0.0)], 1),  # the first of equals
        ("loss", [(2.0, 3.0), (1.5, 9.0), (1.0, 1.0), (1.7, 4.0)], 2),
    ],
)
def test_best_checkpoint_is_the_best_by_rouge_l_or_by_loss(
    tmp_path, student, monkeypatch, metric_for_best, scores, best
):
    weights = []

    def validate(run, rows, examples, sampled_rouge_l):
        weights.append(run.student.wte.weight.detach().clone())
        return dict(zip(("val_loss", "val_rouge_l"), scores[len(weights) - 1], strict=True))

    monkeypatch.setattr(train, "validate", validate)
    s = settings(student=str(student), epochs=4, metric_for_best=metric_for_best, lr=0.01)
    directory = run_stage(tmp_path, s)
    saved = load(directory / "best").wte.weight
    assert [torch.equal(saved, w) for w in weights] == [n == best for n in range(4)]
    assert record(directory)["best"] == scores[best][1 if metric_for_best == "rouge_l" else 0]
    assert record(directory)["best_step"] == 2 * (best + 1)  # two steps per epoch


def test_prompt_in_best_is_that_of_the_best_step(tmp_path, student, teacher, monkeypatch):
    prompts, scores = [], [0.0, 5.0, 7.0, 6.0]

    def validate(run, rows, examples, sampled_rouge_l):
        prompts.append(run.P.detach().clone())
        score = scores[len(prompts) - 1]
        return {"val_loss": 1.0, "val_rouge_l": score, "val_prompted_loss": 1.0}

    monkeypatch.setattr(train, "validate", validate)
    monkeypatch.setattr(validation, "validation_loss", lambda *arguments: 1.0)
    directory = run_stage(tmp_path, promptkd_settings(student, teacher, epochs=3))
    saved = load_prompt(directory / "best", 24)
    assert [torch.equal(saved, prompt) for prompt in prompts] == [False, False, True, False]


@pytest.mark.parametrize("harm, warned", [(0.3, True), (0.05, False), (-0.2, False)])
def test_there_is_a_warning_if_the_prompt_harms_the_teacher_before_it_is_tuned(
    tmp_path, capsys, student, teacher, monkeypatch, harm, warned
):
    def validation_loss(run, model, examples, P=None):
        return 2.0 if P is None else 2.0 + harm

    monkeypatch.setattr(validation, "validation_loss", validation_loss)
    run_stage(tmp_path, promptkd_settings(student, teacher, steps=1, max_dev_rows=2))
    printed = capsys.readouterr().out
    assert ("warning:" in printed) == warned
    if warned:
        assert "warning: the prompt costs the teacher 0.30 nats per token" in printed
        assert printed.index("warning:") < printed.index("step 1/1")


# ---- two ranks, and four -----------------------------------------------------------------------


def uneven_responses(model, requests, rng_keys, eos, max_new_tokens, **kwargs):
    """Every other row has no response, the others are at the limit. With two ranks these are the
    rows of one rank and the rows of the other."""
    places = [i * dist.world_size() + dist.rank() for i in range(len(requests))]
    return [[7] * max_new_tokens if place % 2 == 0 else [] for place in places], None


def run_on_ranks(n, out, options, uneven):
    """train.main with a method's options on `n` ranks, without tables. If `uneven`, it is repeated
    with uneven responses and seed 11. Returns what was printed."""

    def on_each_rank():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "shutdown", lambda: None)  # the ranks run the next command too
            patch.setattr(train, "show_demo", lambda models, device, dtype: None)
            train.main([*options, "--out", str(out)])
            if uneven:
                patch.setattr(train, "sample_all", uneven_responses)
                train.main([*options, "--seed", "11", "--out", str(out)])

    if n == 1:
        return on_each_rank()
    log = out.with_name(f"log-{n}-")
    statuses = wait_for(fork_ranks(on_each_rank, n, log), 240)
    printed = "".join(Path(f"{log}{rank}").read_text() for rank in range(n))
    assert statuses == [0] * n, printed
    return printed


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory, student, teacher):
    """A function from a method to its whole command on one and two ranks: the directory that
    each leaves, and what was printed. A method that starts from the init, and so may sample, is run
    with uneven responses too, PromptKD also on four ranks."""
    common = "--data demo --steps 2 --global-batch 16 --dropout 0 --lr 0.0002 --dev-rows 4"
    common += " --micro-batch-tokens 240"
    starts = {"shape": "--shape 1x16x2", "pretrained": f"--student {student}"}
    starts["init"] = f"--init {student}"
    own_options = {"minillm": f"--lm-data {demo_texts()[0]}"}

    @functools.cache
    def run_method(method):
        declared, directory = METHODS[method], tmp_path_factory.mktemp(method)
        options = f"--method {method} {starts[declared.start]} {own_options.get(method, '')}"
        options += f" --sft-teacher {teacher}" if declared.needs_teacher else ""
        options = f"{options} {common}".split()
        printed = {}
        samples = declared.start == "init"
        for n in (2, 4, 1) if method == "promptkd" else (2, 1):
            printed[n] = run_on_ranks(n, directory / str(n), options, uneven=samples and n < 4)
        return SimpleNamespace(out={n: directory / str(n) for n in (1, 2, 4)}, printed=printed)

    return run_method


@pytest.mark.parametrize(
    "method, n, seed",
    [
        *((method, 2, 10) for method in METHODS),
        *((method, 2, 11) for method in METHODS if METHODS[method].start == "init"),
        ("promptkd", 4, 10),
    ],
)
def test_several_ranks_train_like_one(by_ranks, method, n, seed):
    """The metrics and weights are the same except for rounding, and each file is written once. With
    seed 11 the responses of one rank are empty, and those of the other are at the limit."""

    def directory_of(out):
        directories = [path for path in out.glob(f"{method}-*") if "-s11" in path.name]
        others = [path for path in out.glob(f"{method}-*") if "-s11" not in path.name]
        (directory,) = directories if seed == 11 else others
        return directory

    ran = by_ranks(method)
    several, one = directory_of(ran.out[n]), directory_of(ran.out[1])
    assert several.name == one.name
    assert record(several)["ranks"] == n
    for a, b in zip(metrics(several), metrics(one), strict=True):
        a, b = ({k: v for k, v in line.items() if k not in UNLIKE} for line in (a, b))
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    if seed == 11 and "sampling" in steps_of(one)[0]["seconds"]:
        assert {line["response_tokens"] for line in steps_of(one)} == {8 * 40}  # of 16 rows
    # One rank prints, for each of the commands.
    n_commands = len(list(ran.out[n].glob(f"{method}-*")))
    assert ran.printed[n].count("step 2/2") == n_commands
    weights, expected = (load(directory / "best").state_dict() for directory in (several, one))
    for name, w in weights.items():
        compared = torch.ones_like(w, dtype=torch.bool)
        if name.endswith("c_attn.bias"):
            # Biases of keys change no attention weight. Their gradient is rounding only, which
            # AdamW scales up to full steps.
            compared[len(w) // 3 : 2 * len(w) // 3] = False
        assert w[compared].allclose(expected[name][compared], atol=1e-4), name


def test_two_ranks_sample_seqkds_responses_like_one(by_ranks):
    out = by_ranks("seqkd").out
    several, one = (files(out[n] / "responses-wide-demo") for n in (2, 1))
    names = {"train.jsonl", "run.json"}
    assert {str(path) for path in several} == {str(path) for path in one} == names
    for path, (content, _) in one.items():
        assert path.name == "run.json" or several[path][0] == content


# ---- bad data and failures ---------------------------------------------------------------------


def test_too_little_text_to_pack_is_refused(tmp_path):
    with pytest.raises(InputError, match="too little to train on"):
        run_stage(tmp_path, pretrain_settings(block_size=100_000))


def test_a_stage_that_could_not_start_leaves_no_record_and_can_start_later(tmp_path, student):
    with pytest.raises(InputError, match="nowhere"):
        run_stage(tmp_path, settings(student="nowhere"))
    assert not (tmp_path / "stage" / "run.json").exists()
    run_stage(tmp_path, settings(student=str(student), steps=1, max_dev_rows=2))
