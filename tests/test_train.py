"""Presets, stages and what a run leaves behind: skipped when complete, gone on with when interrupted, refused when made otherwise.

The data is a demo world of a few dozen rows in a temporary folder, the models have one layer.
"""

import contextlib
import io
import json
import math
import random
import re
import socket
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    after_device,
    hf_config,
    run_command,
    tiny_model,
    tiny_tokenizer,
    write_checkpoint,
    write_rows,
)

import data.prepare
import train
from data import dist, report
from data.cli import InputError, run_command_line
from data.demo import TOKENIZER_DIR, make_document, make_rows
from data.hub import find_model_dir
from data.paper import DEMO_SETS
from data.rows import Example, fill_template, read_rows
from data.tokenizer import load_tokenizer
from model import Config, load
from prompt import load_prompt
from sample import row_uniforms, sample

CPU = torch.device("cpu")
TOKENIZER = load_tokenizer(TOKENIZER_DIR)
STUDENT = Config(n_layer=1, n_embd=16, n_head=2, vocab_size=TOKENIZER.n_vocab, n_positions=512)
TEACHER = Config(n_layer=1, n_embd=24, n_head=3, vocab_size=TOKENIZER.n_vocab, n_positions=512)


def write_world(directory):
    rng, used = random.Random(1), set()
    for name, count in {
        "train": 36,
        "dev": 8,
        "test": 3,
        **{f"{name}/test": 3 for name in DEMO_SETS[1:]},
    }.items():
        write_rows(directory / f"{name}.jsonl", make_rows(rng, count, used))
    write_rows(
        directory / "pretrain.jsonl", [{"text": make_document(rng, used)} for _ in range(60)]
    )
    return directory


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """`--data demo` is a small world in a temporary folder for all tests here."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.prepare, "HOME", home)
        yield write_world(home / "demo")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "small", STUDENT, TOKENIZER)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "wide", TEACHER, TOKENIZER)


def settings(**values):
    usual = {
        "method": "sft",
        "student": "small",
        "data": "demo",
        "global_batch_size": 16,
        "lr": 1e-3,
        "epochs": 1,
        "schedule": "constant",
        "max_new_tokens": 8,
    }
    return train.Settings(**{**usual, **values})


def minillm_settings(student, teacher, **values):
    """Without --lm-data: rollouts of 16 rows, on which there are four steps."""
    how = {"rollout_size": 16, "global_batch_size": 8, "inner_epochs": 2, "dropout": 0.0}
    return settings(
        **{"method": "minillm", "student": str(student), "teacher": str(teacher), **how, **values}
    )


def promptkd_settings(student, teacher, **values):
    return settings(
        **{
            "method": "promptkd",
            "student": str(student),
            "teacher": str(teacher),
            "prompt_lr": 0.05,
            "lr": 0.01,
            **train.PROMPT,
            **values,
        }
    )


def main(out, *options):
    """train.main in this process. Returns what it said."""
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        train.main([*map(str, options), "--out", str(out)])
    return screen.getvalue()


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def record(directory):
    return json.loads((directory / "run.json").read_text())


def files(directory):
    """All files below a directory: {path: (content, time of the last change)}."""
    return {
        path.relative_to(directory): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def steps_seen(monkeypatch):
    """Steps that train nothing: a list of each step's examples."""
    seen = []

    def step(run, examples, t):
        seen.append(examples)
        run.clock["student"] = 1.0
        return {"loss": 0.0, "grad_norm": 0.0, "response_tokens": 1}

    for method in train.STEPS:
        monkeypatch.setitem(train.STEPS, method, step)
    return seen


@pytest.fixture
def no_validation(monkeypatch):
    monkeypatch.setattr(
        train, "validate", lambda run, rows, examples: {"val_loss": 1.0, "val_rouge_l": 1.0}
    )


# ---- presets: the table of the paper's Appendix A, at 8 GPUs ------------------------------------------------------------------------

SHAPES = {
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}

APPENDIX_A = [
    # stage, model, global batch, learning rate, schedule, epochs, best by
    ("sft", "gpt2", 32, 5e-4, "cosine", 20, "rouge_l"),
    ("sft", "gpt2-medium", 32, 1e-4, "cosine", 20, "rouge_l"),
    ("sft", "gpt2-large", 32, 1e-4, "cosine", 10, "rouge_l"),
    ("sft", "gpt2-xl", 32, 5e-5, "cosine", 10, "rouge_l"),
    ("teacher", "gpt2-xl", 32, 5e-5, "cosine", 10, "rouge_l"),
    ("init", "gpt2", 32, 5e-4, "cosine", 3, "loss"),
    ("init", "gpt2-medium", 32, 1e-4, "cosine", 3, "loss"),
    ("init", "gpt2-large", 32, 1e-4, "cosine", 3, "loss"),
    ("promptkd", "gpt2", 256, 5e-5, "constant", 20, "rouge_l"),
    ("promptkd", "gpt2-medium", 64, 1e-5, "constant", 20, "rouge_l"),
    ("promptkd", "gpt2-large", 64, 5e-6, "constant", 15, "rouge_l"),
]


def write_config(directory, n_layer, n_embd, n_head, vocab_size=50257):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(
        json.dumps(hf_config(Config(n_layer, n_embd, n_head, vocab_size)))
    )
    return directory


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face cache with the four official models' configurations and no weights: enough to plan the stages."""
    for name, shape in SHAPES.items():
        folder = tmp_path / "hub" / f"models--openai-community--{name}"
        (write_config(folder / "snapshots" / "abc", *shape) / "model.safetensors").touch()
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


@pytest.mark.parametrize(
    "stage, model, global_batch_size, lr, schedule, epochs, metric_for_best", APPENDIX_A
)
def test_preset_is_that_of_the_paper(
    hub, capsys, stage, model, global_batch_size, lr, schedule, epochs, metric_for_best
):
    values = train.preset(stage, model)
    s = train.Settings(
        **{
            "method": "promptkd" if stage == "promptkd" else "sft",
            "student": model,
            "data": "dolly",
            **values,
        }
    )
    assert (s.global_batch_size, s.lr, s.schedule, s.epochs, s.metric_for_best) == (
        global_batch_size,
        lr,
        schedule,
        epochs,
        metric_for_best,
    )
    assert (s.max_new_tokens, s.dropout, s.seed, s.steps) == (256, 0.1, 10, None)
    if stage == "promptkd":
        assert (s.warmup_steps, s.prompt_lr, s.prompt_text, s.prompt_init, s.prompt_length) == (
            100,
            lr,
            "Suppose you are a student.",
            "text",
            None,
        )
        assert (s.reg_weight, s.prompt_kl, s.reg_kl) == (1.0, "reverse", "reverse")
    else:
        assert s.warmup_steps == 0 and s.prompt_lr is s.reg_weight is None
    assert capsys.readouterr().out == ""  # nothing to explain for an official size


COMPARED = [
    # method, model, global batch, learning rate, schedule, warm-up, epochs
    ("kd", "gpt2", 32, 5e-4, "cosine", 0, 20),
    ("kd", "gpt2-medium", 32, 1e-4, "cosine", 0, 20),
    ("kd", "gpt2-large", 32, 1e-4, "cosine", 0, 10),
    ("seqkd", "gpt2", 32, 5e-4, "cosine", 0, 20),
    ("seqkd", "gpt2-medium", 32, 1e-4, "cosine", 0, 20),
    ("seqkd", "gpt2-large", 32, 1e-4, "cosine", 0, 10),
    ("minillm", "gpt2", 256, 5e-6, "constant", 100, 10),
    ("minillm", "gpt2-medium", 64, 5e-6, "constant", 100, 10),
    ("minillm", "gpt2-large", 64, 5e-6, "constant", 100, 10),
    ("gkd", "gpt2", 256, 5e-5, "constant", 100, 20),
    ("gkd", "gpt2-medium", 64, 1e-5, "constant", 100, 20),
    ("gkd", "gpt2-large", 64, 5e-6, "constant", 100, 15),
]


@pytest.mark.parametrize(
    "method, model, global_batch_size, lr, schedule, warmup_steps, epochs", COMPARED
)
def test_preset_of_a_method_that_promptkd_is_compared_with(
    hub, capsys, method, model, global_batch_size, lr, schedule, warmup_steps, epochs
):
    s = train.Settings(
        **{"method": method, "student": model, "data": "dolly", **train.preset(method, model)}
    )
    assert (s.global_batch_size, s.lr, s.schedule, s.warmup_steps, s.epochs) == (
        global_batch_size,
        lr,
        schedule,
        warmup_steps,
        epochs,
    )
    assert (s.max_new_tokens, s.metric_for_best, s.seed, s.steps) == (256, "rouge_l", 10, None)
    if method == "minillm":
        assert (s.beta2, s.weight_decay, s.dropout) == (0.95, 1e-6, 0.0)
        assert (s.rollout_size, s.inner_epochs, s.max_steps, s.eval_interval, s.lm_data) == (
            256,
            4,
            5000,
            100,
            None,
        )
    else:
        assert (s.beta2, s.weight_decay, s.dropout) == (0.999, 1e-2, 0.1)
        assert (s.rollout_size, s.inner_epochs, s.max_steps, s.eval_interval) == (
            None,
            1,
            None,
            None,
        )
    assert s.prompt_lr is s.prompt_text is s.reg_weight is None and capsys.readouterr().out == ""


def test_minillms_optimizer_is_as_released_and_there_is_no_prompt(student, teacher):
    run = train.build(
        minillm_settings(student, teacher, beta2=0.95, weight_decay=1e-6), 10, 8, TOKENIZER, 8, CPU
    )
    assert {group["betas"] for group in run.optimizer.param_groups} == {(0.9, 0.95)}
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [1e-6, 0.0]
    assert (
        run.P is None
        and run.text is None
        and not any(w.requires_grad for w in run.teacher.parameters())
    )


@pytest.mark.parametrize(
    "stage, model, steps",
    [
        # of Dolly's 11,435 rows: 357 batches of 32, 178 of 64, 44 of 256, and 44 rollouts of 256
        ("kd", "gpt2", 357 * 20),
        ("seqkd", "gpt2-large", 357 * 10),
        ("gkd", "gpt2", 44 * 20),
        ("gkd", "gpt2-medium", 178 * 20),
        ("gkd", "gpt2-large", 178 * 15),
        ("minillm", "gpt2", 44 * 4 * 10),
        ("minillm", "gpt2-medium", 5000),
        ("minillm", "gpt2-large", 5000),  # 44 * 16 * 10 = 7,040 are over the cap
        ("promptkd", "gpt2", 44 * 20),
    ],
)
def test_steps_of_a_preset_run_on_dolly(hub, tmp_path, monkeypatch, stage, model, steps):
    dev_rows, totals = read_rows(data.prepare.HOME / "demo" / "dev.jsonl"), []
    examples = [Example(i, [1], [2]) for i in range(11_435)]
    monkeypatch.setattr(train, "data_files", lambda s: [])
    monkeypatch.setattr(train, "load_data", lambda s: (TOKENIZER, dev_rows, lambda epoch: examples))

    def build(s, total, global_batch_size, *rest):
        totals.append((total, global_batch_size))
        raise Interrupted

    monkeypatch.setattr(train, "build", build)
    s = train.Settings(
        **{"method": stage, "student": model, "data": "dolly", **train.preset(stage, model)}
    )
    with pytest.raises(Interrupted):
        train.run_stage("stage", s, tmp_path, 8, CPU)
    assert totals == [(steps, s.global_batch_size)]


def test_a_stage_gets_the_papers_optimizers_for_student_and_prompt(student, teacher):
    run = train.build(promptkd_settings(student, teacher), 10, 16, TOKENIZER, 8, CPU)
    for optimizer in (run.optimizer, run.prompt_optimizer):
        assert isinstance(optimizer, torch.optim.AdamW)
        assert {group["betas"] for group in optimizer.param_groups} == {
            (0.9, 0.999)
        } and optimizer.param_groups[0]["weight_decay"] == 1e-2
    assert {id(w) for group in run.optimizer.param_groups for w in group["params"]} == {
        id(w) for w in run.student.parameters()
    }
    assert [id(w) for group in run.prompt_optimizer.param_groups for w in group["params"]] == [
        id(run.P)
    ]
    assert train.CLIP == 1.0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_stages_dropout_is_the_students_own_and_the_teacher_is_frozen(student, teacher, dropout):
    run = train.build(
        promptkd_settings(student, teacher, dropout=dropout), 10, 16, TOKENIZER, 8, CPU
    )
    modules = [module for module in run.student.modules() if isinstance(module, torch.nn.Dropout)]
    assert (
        {module.p for module in modules}
        == {dropout}
        == {block.attn.dropout for block in run.student.h}
    )
    assert not any(module.training for module in run.teacher.modules()) and not any(
        w.requires_grad for w in run.teacher.parameters()
    )
    assert all(w.requires_grad for w in [run.P, *run.student.parameters()])


@pytest.mark.parametrize(
    "init, length", [("text", None), ("text", 3), ("text", 11), ("padding", 4), ("random", 5)]
)
def test_a_stages_prompt_is_made_from_the_teachers_embeddings(student, teacher, init, length):
    run = train.build(
        promptkd_settings(student, teacher, prompt_init=init, prompt_length=length),
        10,
        16,
        TOKENIZER,
        8,
        CPU,
    )
    tokens = TOKENIZER.encode("Suppose you are a student.")
    n = length or len(tokens)
    assert run.P.shape == (n, 24)
    if init == "random":
        assert 0.5 < run.P.std() < 1.5
    else:
        wanted = (
            [tokens[i % len(tokens)] for i in range(n)]
            if init == "text"
            else [TOKENIZER.eot_token] * n
        )
        assert torch.equal(run.P.detach(), run.teacher.wte.weight[wanted])


@pytest.mark.parametrize(
    "shape, size",
    [
        ((2, 64, 2), "base"),
        ((12, 896, 14), "base"),
        ((20, 1024, 16), "medium"),
        ((40, 1280, 20), "large"),
        ((44, 1600, 25), "xl"),
    ],
)
def test_another_size_takes_the_preset_nearest_in_parameter_count_and_says_so(
    tmp_path, capsys, hub, shape, size
):
    model = write_config(tmp_path / "other", *shape)
    official = {"base": "gpt2", "medium": "gpt2-medium", "large": "gpt2-large", "xl": "gpt2-xl"}[
        size
    ]
    values = train.preset("sft", str(model))
    said = capsys.readouterr().out
    assert values == train.preset("sft", official)
    assert re.search(rf"other has [\d,]+ parameters.* GPT-2 {size}\n", said)


@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_cosine_falls_from_the_peak_to_1e_7(warmup_steps):
    rates = [train.learning_rate(5e-4, step, 100, "cosine", warmup_steps) for step in range(101)]
    assert rates[warmup_steps] == pytest.approx(5e-4)
    assert rates[(100 + warmup_steps) // 2] == pytest.approx((5e-4 + 1e-7) / 2)
    assert rates[100] == pytest.approx(1e-7)
    assert all(a > b for a, b in zip(rates[warmup_steps:], rates[warmup_steps + 1 :]))


def test_warm_up_is_linear_from_above_0_and_constant_behind_it():
    rates = [train.learning_rate(1e-5, step, 1000, "constant", 100) for step in range(1000)]
    assert rates[:100] == pytest.approx([1e-5 * (step + 1) / 100 for step in range(100)])
    assert set(rates[100:]) == {1e-5}


# ---- which stages are run, and under which names -------------------------------------------------------------------------------------


@pytest.fixture
def plan(hub, tmp_path, monkeypatch):
    """Call train.main without training: gives the stages as (name, Settings, micro-batch). A stage leaves its record and a configuration."""
    monkeypatch.chdir(tmp_path)
    stages = []

    def run_stage(name, s, out, micro_batch_size, device, paper, keep, save_every):
        stages.append(
            SimpleNamespace(
                name=name,
                settings=s,
                micro_batch_size=micro_batch_size,
                paper=paper,
                keep=keep,
                save_every=save_every,
            )
        )
        directory = tmp_path / out / name
        if s.method == "pretrain":
            write_config(directory / "best", *map(int, s.student.split("x")))
        else:
            (directory / "best").mkdir(parents=True, exist_ok=True)
            (directory / "best" / "config.json").write_bytes(
                (find_model_dir(s.student) / "config.json").read_bytes()
            )
        (directory / "run.json").write_text(
            json.dumps({"name": name, "paper": paper, "settings": asdict(s), "hours": 0.1})
        )
        return f"{out}/{name}"

    def sample_responses(name, s, out, device):
        stages.append(SimpleNamespace(name=name, settings=s, paper=None))
        return f"{out}/{name}"

    monkeypatch.setattr(train, "run_stage", run_stage)
    monkeypatch.setattr(train, "sample_responses", sample_responses)
    monkeypatch.setattr(train, "find_data_dir", Path)
    monkeypatch.setattr(train, "check_later_inputs", lambda *_: None)
    monkeypatch.setattr(train, "show_demo", lambda models, device, dtype: None)

    def planned(*options):
        stages.clear()
        train.main(list(options))
        return list(stages)

    return planned


def names(stages):
    return [stage.name for stage in stages]


def test_main_result_runs_teacher_init_and_method(plan):
    teacher, init, method = plan("--student", "gpt2")
    assert names([teacher, init, method]) == ["teacher-gpt2-xl", "init-gpt2", "promptkd-gpt2-s10"]
    assert (
        teacher.settings.method,
        teacher.settings.student,
        teacher.settings.lr,
        teacher.settings.epochs,
    ) == ("sft", "gpt2-xl", 5e-5, 10)
    assert (
        init.settings.method,
        init.settings.student,
        init.settings.epochs,
        init.settings.metric_for_best,
    ) == ("sft", "gpt2", 3, "loss")
    assert (method.settings.method, method.settings.student, method.settings.teacher) == (
        "promptkd",
        "out/init-gpt2",
        "out/teacher-gpt2-xl",
    )
    assert method.settings.global_batch_size == 256
    assert {stage.settings.data for stage in (teacher, init, method)} == {"dolly"}


def test_models_that_are_fine_tuned_already_skip_their_stages(plan, tmp_path):
    write_config(tmp_path / "mine", *SHAPES["gpt2-large"])
    assert [
        stage.split("-")[0]
        for stage in names(plan("--sft-teacher", "gpt2-xl", "--student", "gpt2"))
    ] == ["init", "promptkd"]
    assert [
        stage.split("-")[0] for stage in names(plan("--teacher", "gpt2-large", "--init", "mine"))
    ] == ["teacher", "promptkd"]
    (alone,) = plan("--sft-teacher", "gpt2-xl", "--init", "mine")
    assert (
        alone.name == "promptkd-mine-s10" and alone.settings.lr == 5e-6
    )  # the preset of GPT-2 large
    assert (alone.settings.student, alone.settings.teacher) == ("mine", "gpt2-xl")


def test_without_options_the_demo_runs_with_its_own_sizes_and_presets(plan):
    stages = plan()
    assert [stage.name.split("-")[0] for stage in stages] == [
        "pretrain",
        "teacher",
        "pretrain",
        "init",
        "promptkd",
    ]
    assert {stage.settings.data for stage in stages} == {"demo"} and len(set(names(stages))) == 5
    assert (
        stages[0].settings.student == train.DEMO_TEACHER
        and stages[2].settings.student == train.DEMO_STUDENT
    )
    assert (
        stages[-1].settings.teacher == f"out/{stages[1].name}"
        and stages[-1].settings.student == f"out/{stages[3].name}"
    )


def test_sft_is_one_stage_from_the_pre_trained_model(plan):
    (stage,) = plan("--method", "sft", "--student", "gpt2-medium")
    assert (
        stage.name,
        stage.settings.method,
        stage.settings.epochs,
        stage.settings.metric_for_best,
    ) == (
        "sft-gpt2-medium-s10",
        "sft",
        20,
        "rouge_l",
    )


def test_kd_trains_the_pre_trained_student_against_the_fine_tuned_teacher(plan):
    teacher, kd = plan("--method", "kd", "--student", "gpt2")
    assert names([teacher, kd]) == ["teacher-gpt2-xl", "kd-gpt2-s10"]
    assert (
        kd.settings.method,
        kd.settings.student,
        kd.settings.teacher,
        kd.settings.responses,
    ) == ("kd", "gpt2", "out/teacher-gpt2-xl", None)


def test_seqkd_samples_the_fine_tuned_teacher_and_trains_the_pre_trained_student(plan):
    teacher, responses, seqkd = plan("--method", "seqkd", "--student", "gpt2-medium")
    assert names([teacher, responses, seqkd]) == [
        "teacher-gpt2-xl",
        "responses-gpt2-xl",
        "seqkd-gpt2-medium-s10",
    ]
    assert responses.settings == {
        "student": "out/teacher-gpt2-xl",
        "data": "dolly",
        "max_train_rows": None,
        "max_new_tokens": 256,
        "seed": 10,
        "dtype": "float32",
    }
    s = seqkd.settings
    assert (s.method, s.student, s.teacher, s.data, s.responses) == (
        "seqkd",
        "gpt2-medium",
        "out/teacher-gpt2-xl",
        "dolly",
        "out/responses-gpt2-xl",
    )


def test_seeds_and_students_share_the_teachers_responses_and_other_rows_or_data_do_not(
    plan, tmp_path
):
    (tmp_path / "mine").mkdir()
    usual = plan("--method", "seqkd", "--student", "gpt2")[1]
    assert (
        plan("--method", "seqkd", "--student", "gpt2-large", "--seed", "11", "--lr", "0.1")[1]
        == usual
    )
    other = plan("--method", "seqkd", "--student", "gpt2", "--data", "mine", "--train-rows", "9")
    assert names(other) == [
        "teacher-gpt2-xl-mine-9rows",
        "responses-gpt2-xl-mine-9rows",
        "seqkd-gpt2-mine-9rows-s10",
    ]
    assert other[1].settings["data"] == "mine" and other[1].settings["max_train_rows"] == 9


def test_minillm_and_gkd_start_from_the_init_and_teacher_of_promptkd(plan):
    usual = plan("--student", "gpt2")
    for method in ("minillm", "gkd"):
        stages = plan("--method", method, "--student", "gpt2")
        assert (
            names(stages) == ["teacher-gpt2-xl", "init-gpt2", f"{method}-gpt2-s10"]
            and stages[:2] == usual[:2]
        )
        s = stages[2].settings
        assert (s.method, s.student, s.teacher) == (method, "out/init-gpt2", "out/teacher-gpt2-xl")


def test_minillms_corpus_is_in_its_settings_and_its_name(plan):
    stages = plan("--method", "minillm", "--student", "gpt2", "--lm-data", "texts/owt.jsonl")
    assert stages[:2] == plan("--method", "minillm", "--student", "gpt2")[:2]
    assert (stages[2].name, stages[2].settings.lm_data) == (
        "minillm-gpt2-lmdataowt-s10",
        "texts/owt.jsonl",
    )


@pytest.mark.parametrize(
    "method, stages",
    [
        ("sft", ["pretrain-STUDENT", "sft"]),
        ("kd", ["pretrain-TEACHER", "teacher", "pretrain-STUDENT", "kd"]),
        ("seqkd", ["pretrain-TEACHER", "teacher", "pretrain-STUDENT", "responses", "seqkd"]),
        ("minillm", ["pretrain-TEACHER", "teacher", "pretrain-STUDENT", "init", "minillm"]),
        ("gkd", ["pretrain-TEACHER", "teacher", "pretrain-STUDENT", "init", "gkd"]),
    ],
)
def test_every_method_runs_the_demo_and_shares_its_stages_with_promptkd(plan, method, stages):
    found, promptkd = plan("--method", method), plan()
    sizes = {"pretrain-TEACHER": train.DEMO_TEACHER, "pretrain-STUDENT": train.DEMO_STUDENT}
    for stage, wanted in zip(found, stages, strict=True):
        assert stage.name.startswith(
            f"pretrain-{sizes[wanted]}-demo" if wanted in sizes else f"{wanted}-"
        )
        assert stage in promptkd or wanted in ("responses", method)
    assert (
        found[-1].settings.max_new_tokens == 40
        and found[-1].name == f"{method}-{train.DEMO_STUDENT}-demo-s10"
    )
    if method == "seqkd":
        assert (
            found[3].name == f"responses-{train.DEMO_TEACHER}-demo"
            and found[3].settings["max_new_tokens"] == 40
        )


STUDENT_OF_THE_PAPER = ("--student", "gpt2")


@pytest.mark.parametrize(
    "options, papers",
    [
        (STUDENT_OF_THE_PAPER, ["teacher xl", "init base", "promptkd base"]),
        (
            ("--student", "gpt2-medium", "--seed", "11", "--micro-batch", "2"),
            ["teacher xl", "init medium", "promptkd medium"],
        ),
        (("--method", "sft", "--student", "gpt2-large"), ["sft large"]),
        (("--method", "kd", "--student", "gpt2"), ["teacher xl", "kd base"]),
        (("--method", "seqkd", "--student", "gpt2-large"), ["teacher xl", None, "seqkd large"]),
        (
            ("--method", "gkd", "--student", "gpt2-medium"),
            ["teacher xl", "init medium", "gkd medium"],
        ),
        (
            ("--method", "minillm", "--student", "gpt2"),
            ["teacher xl", "init base", None],
        ),  # the paper's had plain text
        (
            ("--method", "minillm", "--student", "gpt2", "--lm-data", "owt.jsonl"),
            ["teacher xl", "init base", "minillm base"],
        ),
        (
            ("--method", "minillm", "--student", "gpt2", "--lm-data", "owt.jsonl", "--lr", "1e-5"),
            ["teacher xl", "init base", None],
        ),
        ((*STUDENT_OF_THE_PAPER, "--data", "mine"), [None, None, None]),
        ((*STUDENT_OF_THE_PAPER, "--train-rows", "100"), [None, None, None]),
        ((*STUDENT_OF_THE_PAPER, "--dev-rows", "100"), [None, None, None]),
        ((*STUDENT_OF_THE_PAPER, "--reg", "0"), ["teacher xl", "init base", None]),
        ((*STUDENT_OF_THE_PAPER, "--steps", "9"), ["teacher xl", "init base", None]),
        ((*STUDENT_OF_THE_PAPER, "--teacher", "gpt2-large"), ["teacher large", "init base", None]),
        ((*STUDENT_OF_THE_PAPER, "--sft-teacher", "gpt2-xl"), ["init base", None]),
        (("--method", "seqkd", *STUDENT_OF_THE_PAPER, "--sft-teacher", "gpt2-xl"), [None, None]),
        (("--init", "gpt2"), ["teacher xl", None]),  # not fine-tuned
        (("--student", "mine"), ["teacher xl", None, None]),
        (("--method", "pretrain", "--shape", "12x768x12", "--data", "dolly"), [None]),
        ((), [None] * 5),
    ],
)
def test_a_stage_is_the_papers_only_with_its_models_data_and_settings(
    plan, tmp_path, options, papers
):
    write_config(tmp_path / "mine", *SHAPES["gpt2"])  # as model, and as data
    assert [stage.paper for stage in plan(*options)] == papers


def test_runs_of_the_paper_are_known_again_where_they_are_named(plan):
    plan(*STUDENT_OF_THE_PAPER)
    papers = []
    for options in (
        ("--sft-teacher", "out/teacher-gpt2-xl", "--init", "out/init-gpt2"),
        (
            "--method",
            "gkd",
            "--sft-teacher",
            "out/teacher-gpt2-xl/best",
            "--init",
            "out/init-gpt2/best",
        ),
        ("--method", "kd", "--sft-teacher", "out/teacher-gpt2-xl", "--student", "gpt2"),
        ("--sft-teacher", "out/init-gpt2", "--init", "out/init-gpt2"),
        ("--sft-teacher", "out/teacher-gpt2-xl", "--init", "out/promptkd-gpt2-s10"),
    ):
        (stage,) = plan(*options)
        papers.append(stage.paper)
    assert papers == ["promptkd base", "gkd base", "kd base", None, None]


@pytest.mark.parametrize("method", ["sft", "kd", "seqkd"])
def test_a_method_from_pre_trained_students_is_not_the_papers_where_it_starts_from_an_init(
    plan, method
):
    plan(*STUDENT_OF_THE_PAPER)
    assert plan("--method", method, "--student", "out/init-gpt2")[-1].paper is None


def test_pretraining_takes_its_shape_and_data(plan, tmp_path):
    (tmp_path / "texts").mkdir()
    (stage,) = plan("--method", "pretrain", "--shape", "3x48x4", "--data", "texts")
    assert (
        stage.name,
        stage.settings.method,
        stage.settings.student,
        stage.settings.metric_for_best,
    ) == (
        "pretrain-3x48x4-texts",
        "pretrain",
        "3x48x4",
        "loss",
    )


@pytest.mark.parametrize(
    "option, value, field, wanted, in_name",
    [
        ("--lr", "1e-4", "lr", 1e-4, "lr0.0001"),
        ("--prompt-lr", "0.001", "prompt_lr", 1e-3, "promptlr0.001"),
        ("--epochs", "7", "epochs", 7, "epochs7"),
        ("--steps", "9", "steps", 9, "steps9"),
        ("--global-batch", "64", "global_batch_size", 64, "globalbatch64"),
        ("--dropout", "0", "dropout", 0.0, "dropout0"),
        ("--prompt-length", "5", "prompt_length", 5, "promptlength5"),
        ("--prompt-init", "random", "prompt_init", "random", "promptinitrandom"),
        ("--reg", "0", "reg_weight", 0.0, "reg0"),
        ("--prompt-kl", "forward", "prompt_kl", "forward", "promptklforward"),
        ("--reg-kl", "forward", "reg_kl", "forward", "regklforward"),
        ("--seed", "11", "seed", 11, "s11"),
    ],
)
def test_an_override_changes_the_methods_own_stage_and_its_name_alone(
    plan, option, value, field, wanted, in_name
):
    usual, stages = plan("--student", "gpt2"), plan("--student", "gpt2", option, value)
    assert stages[:2] == usual[:2]  # teacher and init are shared between ablations and seeds
    assert getattr(stages[2].settings, field) == wanted != getattr(usual[2].settings, field)
    assert stages[2].settings == replace(usual[2].settings, **{field: wanted})
    assert in_name in stages[2].name.replace(".0-", "-") and stages[2].name != usual[2].name


def test_different_prompt_texts_have_different_names(plan):
    stages = [
        plan("--student", "gpt2", "--prompt-text", text)[2] for text in ("Be brief.", "Be kind.")
    ]
    assert [stage.settings.prompt_text for stage in stages] == ["Be brief.", "Be kind."]
    assert len(set(names(stages))) == 2


def test_rows_and_micro_batch_go_to_every_stage(plan):
    stages = plan(
        "--student", "gpt2", "--train-rows", "100", "--dev-rows", "20", "--micro-batch", "3"
    )
    assert len(stages) == 3
    for stage in stages:
        assert (
            stage.settings.max_train_rows,
            stage.settings.max_dev_rows,
            stage.micro_batch_size,
        ) == (
            100,
            20,
            3,
        )
        assert "100rows" in stage.name  # another amount is another stage


def test_other_data_is_in_the_names_of_all_stages(plan, tmp_path):
    (tmp_path / "mine").mkdir()
    stages = plan("--student", "gpt2", "--data", str(tmp_path / "mine"))
    assert all("-mine" in name for name in names(stages)) and {
        stage.settings.data for stage in stages
    } == {str(tmp_path / "mine")}


# ---- a whole run ---------------------------------------------------------------------------------------------------------------------

PRETRAIN = (
    "--method",
    "pretrain",
    "--shape",
    "1x16x2",
    "--data",
    "demo",
    "--steps",
    3,
    "--train-rows",
    32,
    "--dev-rows",
    8,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Pre-training, and a PromptKD run of two steps with its result as teacher and as student."""
    out = tmp_path_factory.mktemp("out")
    first = main(out, *PRETRAIN)
    (pretrained,) = out.iterdir()
    options = (
        "--data",
        "demo",
        "--teacher",
        pretrained,
        "--student",
        pretrained,
        "--steps",
        2,
        "--dev-rows",
        8,
    )
    second = main(out, *options)
    return SimpleNamespace(out=out, pretrained=pretrained, options=options, screens=(first, second))


def stage_directory(whole, kind):
    (directory,) = whole.out.glob(f"{kind}-*")
    return directory


KINDS = ["pretrain", "teacher", "init", "promptkd"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_leaves_its_record_metrics_and_best_checkpoint_and_no_state(whole, kind):
    directory = stage_directory(whole, kind)
    found = record(directory)
    assert found["name"] == directory.name and found["settings"]["method"] == (
        "sft" if kind in ("teacher", "init") else kind
    )
    assert found["settings"]["data"] == "demo" and found["settings"]["seed"] == 10
    assert found["versions"]["torch"] == torch.__version__ and found["hours"] > 0
    model = load(directory / "best")
    assert found["parameters"] == model.n_parameters() and (
        model.config.n_layer,
        model.config.n_embd,
        model.config.n_head,
    ) == (1, 16, 2)
    assert load_tokenizer(directory / "best").encode("the small dog") == TOKENIZER.encode(
        "the small dog"
    )
    lines = metrics(directory)
    assert [line["step"] for line in lines if line["step"]] == list(
        range(1, found["total_steps"] + 1)
    )
    by_loss = found["settings"]["metric_for_best"] == "loss"
    scores = [
        line["val_loss" if by_loss else "val_rouge_l"]
        for line in lines
        if line["step"] and "val_loss" in line
    ]
    assert found["best"] == (min if by_loss else max)(scores)
    (best,) = (line for line in lines if line["step"] == found["best_step"])
    assert (
        best["val_loss" if by_loss else "val_rouge_l"] == found["best"] and found["paper"] is None
    )
    assert not list(directory.glob("state/*")) and not list(directory.rglob(".*"))


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_have_losses_rates_speed_seconds_by_phase_and_memory(whole, kind):
    lines = [line for line in metrics(stage_directory(whole, kind)) if line["step"]]
    wanted = {
        "step",
        "epoch",
        "lr",
        "loss",
        "grad_norm",
        "response_tokens",
        "tokens_per_second",
        "seconds",
        "memory_resident_gb",
    }
    if kind == "promptkd":
        wanted |= {
            "prompt_lr",
            "prompt_loss",
            "prompt_kd",
            "prompt_reg",
            "kl_prompted_bare",
            "prompt_grad_norm",
            "lambda",
        }
    for line in lines:
        assert wanted <= set(line)
        assert set(line["seconds"]) == (
            {"sampling", "prompt", "student"} if kind == "promptkd" else {"student"}
        )
        assert all(seconds >= 0 for seconds in line["seconds"].values())
        numbers = [value for value in line.values() if not isinstance(value, dict)]
        assert (
            all(math.isfinite(number) for number in numbers)
            and line["loss"] > 0
            and line["memory_resident_gb"] > 0.01
        )
    assert "val_loss" in lines[-1] and ("val_rouge_l" in lines[-1]) == (
        kind in ("teacher", "promptkd")
    )


def test_rates_in_the_metrics_are_those_of_the_schedule(whole):
    for kind in KINDS:
        directory = stage_directory(whole, kind)
        s, total = train.Settings(**record(directory)["settings"]), record(directory)["total_steps"]
        lines = [line for line in metrics(directory) if line["step"]]
        assert [line["lr"] for line in lines] == [
            train.learning_rate(s.lr, t, total, s.schedule, s.warmup_steps) for t in range(total)
        ]
        if kind == "promptkd":
            assert [line["prompt_lr"] for line in lines] == [
                train.learning_rate(s.prompt_lr, t, total, s.schedule, s.warmup_steps)
                for t in range(total)
            ]
            assert [line["lambda"] for line in lines] == [1.0, 0.5]


def test_promptkd_starts_from_the_stages_before_it_and_keeps_its_prompt(whole):
    directory = stage_directory(whole, "promptkd")
    s = record(directory)["settings"]
    assert (s["teacher"], s["student"]) == (
        str(stage_directory(whole, "teacher")),
        str(stage_directory(whole, "init")),
    )
    P = load_prompt(directory / "best", 16)
    text = TOKENIZER.encode("Suppose you are a student.")
    before = load(stage_directory(whole, "teacher") / "best").wte.weight[text]
    assert (
        P.shape == before.shape and 0 < (P - before).abs().max() < 0.01
    )  # the teacher's words, tuned by two small steps
    assert not list(whole.out.glob("[!p]*/best/prompt.safetensors"))


def test_prompts_harm_is_on_record_from_step_0(whole):
    before = metrics(stage_directory(whole, "promptkd"))[0]
    assert before["step"] == 0 and {
        "val_prompted_loss",
        "val_bare_loss",
        "val_loss",
        "val_rouge_l",
    } <= set(before)
    rows = read_rows(data.prepare.HOME / "demo" / "dev.jsonl")
    init, teacher = (
        load(stage_directory(whole, kind) / "best").eval() for kind in ("init", "teacher")
    )
    assert before["val_loss"] == pytest.approx(plain_loss(init, rows), rel=1e-5)
    assert before["val_bare_loss"] == pytest.approx(plain_loss(teacher, rows), rel=1e-5)
    P = teacher.wte.weight[TOKENIZER.encode("Suppose you are a student.")]
    assert before["val_prompted_loss"] == pytest.approx(plain_loss(teacher, rows, P), rel=1e-5)


@torch.no_grad()
def plain_loss(model, rows, P=None):
    """Nats a response token, one row at a time."""
    total = count = 0
    for row in rows:
        request = TOKENIZER.encode(fill_template(row.instruction, row.input))
        response = [*TOKENIZER.encode(row.references[0]), TOKENIZER.eot_token]
        log_probs = model.logits(model(torch.tensor([request + response]), prefix=P))[
            0
        ].log_softmax(-1)
        start = len(log_probs) - len(response) - 1
        total -= sum(float(log_probs[start + i, token]) for i, token in enumerate(response))
        count += len(response)
    return total / count


def test_screen_names_the_prompts_share_the_table_and_the_picture(whole):
    n = len(TOKENIZER.encode("Suppose you are a student."))
    teacher = load(stage_directory(whole, "teacher") / "best").n_parameters()
    screen = whole.screens[1]
    assert (
        f"prompt: {n} × 16 = {16 * n:,} numbers, {100 * 16 * n / teacher:.4f} % of the teacher's {teacher:,} parameters"
        in screen
    )
    assert re.search(r"step 2/2 .*val ROUGE-L [\d.]+ .*0:00:00 left", screen)
    assert re.search(r"\n(teacher|student's init|promptkd) +[\d.]+ ± [\d.]+", screen)
    assert str(stage_directory(whole, "promptkd") / "curves.png") in screen


def test_every_stage_draws_its_curves(whole):
    pytest.importorskip("matplotlib")
    for kind in KINDS:
        assert (stage_directory(whole, kind) / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_skips_every_complete_stage_and_changes_no_file(whole, monkeypatch):
    monkeypatch.setattr(train, "show_demo", lambda models, device, dtype: None)
    before = files(whole.out)
    screens = main(whole.out, *PRETRAIN), main(whole.out, *whole.options)
    assert files(whole.out) == before
    assert screens[0].count("complete, skipped") == 1 and screens[1].count("complete, skipped") == 3


def test_other_settings_under_the_same_name_are_refused_by_name_and_nothing_is_touched(whole):
    before = files(whole.out)
    with pytest.raises(
        InputError, match=r"pretrain-1x16x2-demo.*: was made with max_dev_rows 8, not 4; "
    ):
        main(whole.out, *PRETRAIN[:-1], 4)
    assert files(whole.out) == before


def test_a_damaged_record_is_refused(tmp_path, student):
    directory = tmp_path / "stage"
    directory.mkdir()
    (directory / "run.json").write_text('{"settings": ')
    with pytest.raises(InputError, match="run.json: is damaged"):
        train.run_stage("stage", settings(student=str(student)), tmp_path, 8, CPU)


@pytest.mark.parametrize("keep, steps", [(2, [3, 6]), (4, [2, 3, 5, 6]), (99, [1, 2, 3, 4, 5, 6])])
def test_keep_saves_checkpoints_evenly_and_the_last_step_is_one(
    tmp_path, student, no_validation, keep, steps
):
    train.run_stage("stage", settings(student=str(student), steps=6), tmp_path, 16, CPU, keep=keep)
    kept = sorted((tmp_path / "stage" / "kept").iterdir())
    assert [path.name for path in kept] == [f"step-{step:06d}" for step in steps]
    first, last = (load(path).state_dict() for path in (kept[0], kept[-1]))
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert {path.name for path in kept[0].iterdir()} == {
        "config.json",
        "model.safetensors",
        "vocab.json",
        "merges.txt",
    }


def test_nothing_is_kept_unasked(tmp_path, student, no_validation):
    train.run_stage("stage", settings(student=str(student), steps=2), tmp_path, 16, CPU)
    assert not (tmp_path / "stage" / "kept").exists()


def test_keep_is_for_the_methods_own_run(plan):
    assert [stage.keep for stage in plan("--student", "gpt2", "--keep", "20")] == [0, 0, 20]


# ---- interrupted and gone on with ------------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """Not to be caught by the code, as a kill isn't."""


def stop_in_a_step(patch, method):
    step = train.STEPS[method]

    def stopping(run, examples, t):
        if t == 3:
            raise Interrupted
        return step(run, examples, t)

    patch.setitem(train.STEPS, method, stopping)


def stop_between_best_and_state(patch, method):
    save_state = train.save_state

    def stopping(run, directory, done):
        if done["step"] == 4:
            raise Interrupted
        save_state(run, directory, done)

    patch.setattr(train, "save_state", stopping)


def stop_while_the_state_is_written(patch, method):
    saved, torch_save = [], torch.save

    def stopping(state, file):
        saved.append(file)
        if len(saved) == 2:
            file.write(b"half of it")
            raise Interrupted
        torch_save(state, file)

    patch.setattr(torch, "save", stopping)


def stop_while_metrics_are_written(patch, method):
    write = train.Log.write

    def stopping(self, values):
        if values["step"] == 3:
            with open(self.path, "a") as file:
                file.write(json.dumps(values)[:30])
            raise Interrupted
        write(self, values)

    patch.setattr(train.Log, "write", stopping)


def stop_before_the_end(patch, method):
    def stopping(*arguments):
        raise Interrupted

    patch.setattr(train, "finish", stopping)


def options_for(method, student, teacher):
    """36 rows, 16 a step: two steps an epoch, so validations behind steps 2, 4 and 6."""
    how = (
        "--method",
        method,
        "--data",
        "demo",
        "--steps",
        6,
        "--global-batch",
        16,
        "--dropout",
        0.2,
        "--micro-batch",
        5,
        "--lr",
        0.01,
        "--dev-rows",
        4,
    )
    if method == "minillm":
        how += ("--global-batch", 8, "--lm-data", data.prepare.HOME / "demo" / "pretrain.jsonl")
    how += ("--prompt-lr", 0.01) if method == "promptkd" else ()
    how += ("--student" if method in ("sft", "kd") else "--init", student)
    return how if method == "sft" else (*how, "--sft-teacher", teacher)


def outcome(directory, run):
    """Everything that must not depend on interruptions."""
    unlike = ("tokens_per_second", "seconds", "memory_resident_gb")
    lines = [
        {name: value for name, value in line.items() if name not in unlike}
        for line in metrics(directory)
    ]
    best = {path.name: path.read_bytes() for path in (directory / "best").iterdir()}
    final = {name: w.clone() for name, w in run.student.state_dict().items()} | (
        {} if run.P is None else {"P": run.P.detach().clone()}
    )
    return SimpleNamespace(
        lines=lines,
        best=best,
        final=final,
        record={name: value for name, value in record(directory).items() if name != "hours"},
    )


@pytest.fixture
def built(monkeypatch):
    """The Runs that are built, in order."""
    runs, build = [], train.build
    monkeypatch.setattr(
        train, "build", lambda *arguments: runs.append(build(*arguments)) or runs[-1]
    )
    monkeypatch.setattr(train, "show_demo", lambda models, device, dtype: None)
    return runs


@pytest.fixture(scope="module")
def uninterrupted():
    return {}


@pytest.fixture
def minillm_validates_within_a_rollout(monkeypatch):
    """Four steps on each rollout of 16 rows, and a state saved behind every other one."""
    how = {
        "rollout_size": 16,
        "inner_epochs": 2,
        "eval_interval": 2,
        "block_size": 32,
        "max_new_tokens": 12,
    }
    monkeypatch.setitem(train.DEMO, "minillm", train.DEMO["minillm"] | how)


@pytest.mark.parametrize(
    "method, stop",
    [
        ("sft", stop_in_a_step),
        ("sft", stop_while_the_state_is_written),
        ("sft", stop_before_the_end),
        ("promptkd", stop_in_a_step),
        ("promptkd", stop_between_best_and_state),
        ("promptkd", stop_while_metrics_are_written),
        ("kd", stop_in_a_step),
        ("gkd", stop_between_best_and_state),
        ("minillm", stop_in_a_step),
        ("minillm", stop_while_the_state_is_written),
        ("minillm", stop_before_the_end),
    ],
)
@pytest.mark.usefixtures("minillm_validates_within_a_rollout")
def test_an_interrupted_stage_goes_on_from_its_last_state_and_ends_with_the_same_bits(
    tmp_path, student, teacher, built, uninterrupted, method, stop
):
    options = options_for(method, student, teacher)
    if method not in uninterrupted:
        main(tmp_path / "whole", *options)
        (directory,) = (tmp_path / "whole").iterdir()
        uninterrupted[method] = outcome(directory, built[-1])
    wanted = uninterrupted[method]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop(patch, method)
        main(tmp_path / "out", *options)
    (directory,) = (tmp_path / "out").iterdir()
    assert "hours" not in record(directory)
    screen = main(tmp_path / "out", *options)
    assert f"going on behind step {6 if stop is stop_before_the_end else 2}" in screen
    got = outcome(directory, built[-1])
    assert got.lines == wanted.lines and [line["step"] for line in got.lines] == list(
        range(0 if method == "promptkd" else 1, 7)
    )
    assert got.best == wanted.best
    assert got.record == wanted.record
    assert set(got.final) == set(wanted.final) and all(
        torch.equal(got.final[name], w) for name, w in wanted.final.items()
    )
    assert not list(directory.rglob("*.partial")) and not list(directory.glob("state/*.pt"))


def test_runs_with_another_seed_end_elsewhere(tmp_path, student, teacher, built):
    """So that equal bits above mean something."""
    ends = []
    for seed in (10, 11):
        main(tmp_path, *options_for("sft", student, teacher), "--steps", 2, "--seed", seed)
        ends.append(built[-1].student.wte.weight.detach().clone())
    assert not torch.equal(*ends)


# ---- the training rows -----------------------------------------------------------------------------------------------------------------


def test_an_epoch_takes_whole_batches_of_rows_in_an_order_of_its_own(
    tmp_path, student, steps_seen, no_validation
):
    train.run_stage("stage", settings(student=str(student), epochs=3), tmp_path, 8, CPU)
    assert record(tmp_path / "stage")["total_steps"] == len(steps_seen) == 3 * (36 // 16)
    epochs = [[e.index for batch in steps_seen[i : i + 2] for e in batch] for i in (0, 2, 4)]
    for order in epochs:
        assert len(order) == len(set(order)) == 32 and set(order) <= set(range(36))
    assert len({tuple(order) for order in epochs}) == 3 and sorted(epochs[0]) != epochs[0]
    assert [line["epoch"] for line in metrics(tmp_path / "stage")] == [0.5, 1, 1.5, 2, 2.5, 3]


def test_steps_beyond_the_epochs_go_round_again_and_fewer_stop_early(
    tmp_path, student, steps_seen, no_validation
):
    train.run_stage("more", settings(student=str(student), epochs=1, steps=5), tmp_path, 8, CPU)
    assert len(steps_seen) == 5 and [len(batch) for batch in steps_seen] == [16] * 5
    validated = [line["step"] for line in metrics(tmp_path / "more") if "val_loss" in line]
    assert validated == [2, 4, 5]  # at the end of every epoch, and at the last step


def test_training_rows_can_be_fewer_and_a_batch_is_never_more_than_there_are(
    tmp_path, student, steps_seen, no_validation
):
    train.run_stage("stage", settings(student=str(student), max_train_rows=10), tmp_path, 8, CPU)
    assert [sorted(e.index for e in batch) for batch in steps_seen] == [list(range(10))]


def test_a_row_whose_request_is_over_the_limit_is_left_out_and_counted(
    tmp_path, capsys, student, steps_seen, no_validation
):
    rows = [{"instruction": f"say {word}", "output": word} for word in "one two three four".split()]
    rows[2]["input"] = "a long story " * 150
    for name in ("train", "dev"):
        write_rows(tmp_path / "mine" / f"{name}.jsonl", rows)
    train.run_stage(
        "stage", settings(student=str(student), data=str(tmp_path / "mine")), tmp_path, 8, CPU
    )
    assert sorted(e.index for e in steps_seen[0]) == [0, 1, 3]
    assert (
        "train.jsonl: 1 of 4 rows have a request over the limit and are left out"
        in capsys.readouterr().out
    )


def test_an_examples_response_is_the_rows_first_reference_and_its_end(
    tmp_path, student, steps_seen, no_validation
):
    train.run_stage("stage", settings(student=str(student), global_batch_size=36), tmp_path, 8, CPU)
    rows = read_rows(data.prepare.HOME / "demo" / "train.jsonl")
    for e in steps_seen[0]:
        assert TOKENIZER.decode(e.request) == fill_template(
            rows[e.index].instruction, rows[e.index].input
        )
        assert TOKENIZER.decode(e.response) == rows[e.index].references[0] + "<|endoftext|>"


@pytest.mark.parametrize(
    "rollout_size, global_batch_size, inner_epochs, on_each, rollouts",
    [
        # optimizer steps on each rollout, and rollouts of an epoch, of 36 rows
        (12, 4, 2, 6, 3),
        (16, 8, 1, 2, 2),
        (16, 5, 3, 9, 2),  # of 16 rows three batches of 5
        (256, 16, 4, 8, 1),  # more than there are: all of them
        (256, 256, 4, 4, 1),
        (8, 16, 2, 2, 2),  # never fewer than a batch
        (None, 16, 1, 1, 2),
    ],
)
def test_minillm_takes_several_steps_on_each_rollouts_rows(
    tmp_path,
    student,
    teacher,
    steps_seen,
    no_validation,
    rollout_size,
    global_batch_size,
    inner_epochs,
    on_each,
    rollouts,
):
    s = minillm_settings(
        student,
        teacher,
        rollout_size=rollout_size,
        global_batch_size=global_batch_size,
        inner_epochs=inner_epochs,
        epochs=2,
    )
    train.run_stage("stage", s, tmp_path, 8, CPU)
    assert record(tmp_path / "stage")["total_steps"] == len(steps_seen) == 2 * on_each * rollouts
    rows = [[e.index for e in batch] for batch in steps_seen]
    assert all(rows[t] == rows[t - t % on_each] for t in range(len(rows)))
    epochs = [
        [index for n in range(rollouts) for index in rows[(epoch * rollouts + n) * on_each]]
        for epoch in range(2)
    ]
    for order in epochs:
        assert (
            len(order)
            == len(set(order))
            == rollouts * min(36, max(rollout_size or 0, global_batch_size))
        )
    assert epochs[0] != epochs[1]
    lines = metrics(tmp_path / "stage")
    assert [line["epoch"] for line in lines] == pytest.approx(
        [(t + 1) / (on_each * rollouts) for t in range(len(lines))]
    )


def test_minillms_steps_end_at_the_most_and_it_validates_every_so_many(
    tmp_path, student, teacher, steps_seen, no_validation
):
    s = minillm_settings(
        student, teacher, epochs=10, max_steps=11, eval_interval=3
    )  # 8 steps an epoch
    train.run_stage("stage", s, tmp_path, 8, CPU)
    assert len(steps_seen) == 11
    assert [line["step"] for line in metrics(tmp_path / "stage") if "val_loss" in line] == [
        3,
        6,
        9,
        11,
    ]
    train.run_stage("more", replace(s, steps=13), tmp_path, 8, CPU)
    assert len(steps_seen) == 11 + 13  # as many as are asked for


def test_minillm_logs_both_losses_and_samples_and_scores_once_a_rollout(tmp_path, student, teacher):
    s = minillm_settings(
        student,
        teacher,
        steps=6,
        lm_data=str(data.prepare.HOME / "demo" / "pretrain.jsonl"),
        block_size=32,
        max_dev_rows=2,
        metric_for_best="loss",
    )
    train.run_stage("stage", s, tmp_path, 8, CPU)
    lines = metrics(tmp_path / "stage")
    assert [set(line["seconds"]) for line in lines] == [
        {"sampling", "scoring", "student"} if t in (0, 4) else {"student"} for t in range(6)
    ]
    assert all(math.isfinite(line["loss"]) and line["lm_loss"] > 0.5 for line in lines)
    assert {line["response_tokens"] > 8 for line in lines} == {True}
    train.run_stage("without", replace(s, lm_data=None, steps=1), tmp_path, 8, CPU)
    assert "lm_loss" not in metrics(tmp_path / "without")[0]


# ---- SeqKD -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seqkd(tmp_path_factory, student, teacher):
    """SeqKD from the teacher's sampling to the end, two steps on all the 36 rows: what its steps saw, and what was validated on."""
    options = (
        "--method",
        "seqkd",
        "--data",
        "demo",
        "--student",
        student,
        "--sft-teacher",
        teacher,
        "--steps",
        2,
        "--global-batch",
        18,
        "--dev-rows",
        4,
    )
    found = SimpleNamespace(
        out=tmp_path_factory.mktemp("seqkd"), options=options, steps=[], validated=[]
    )
    step, validate = train.STEPS["seqkd"], train.validate
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            train.STEPS,
            "seqkd",
            lambda run, examples, t: found.steps.append(examples) or step(run, examples, t),
        )
        patch.setattr(
            train,
            "validate",
            lambda run, rows, examples: (
                found.validated.append((rows, examples)) or validate(run, rows, examples)
            ),
        )
        patch.setattr(train, "show_demo", lambda models, device, dtype: None)
        found.screen = main(found.out, *options)
    found.responses, found.trained = (
        found.out / name
        for name in ("responses-wide-demo", "seqkd-small-demo-steps2-globalbatch18-s10")
    )
    return found


@pytest.fixture(scope="module")
def from_the_teacher():
    """What the teacher says to each training request under seed 10: {index: (request, response)}."""
    rows, end = read_rows(data.prepare.HOME / "demo" / "train.jsonl"), TOKENIZER.eot_token
    requests = [TOKENIZER.encode(fill_template(row.instruction, row.input)) for row in rows]
    uniforms = [row_uniforms(40, 10, "responses", index) for index in range(len(rows))]
    responses, _ = sample(tiny_model(TEACHER), requests, np.stack(uniforms), end, 40)
    return {row.index: both for row, both in zip(rows, zip(requests, responses))}


def test_seqkd_trains_on_the_very_tokens_that_the_teacher_sampled(seqkd, from_the_teacher):
    assert {
        e.index: (e.request, e.response) for batch in seqkd.steps for e in batch
    } == from_the_teacher
    assert [len(batch) for batch in seqkd.steps] == [18, 18]
    truth = {
        row.index: row.references[0]
        for row in read_rows(data.prepare.HOME / "demo" / "train.jsonl")
    }
    assert not any(
        TOKENIZER.decode(response).startswith(truth[index])
        for index, (_, response) in from_the_teacher.items()
    )
    tokens = [line["response_tokens"] for line in metrics(seqkd.trained)]
    assert sum(tokens) == sum(len(response) for _, response in from_the_teacher.values())


def test_seqkd_puts_no_end_of_text_behind_a_response_that_was_cut_off(seqkd):
    responses, end = [e.response for batch in seqkd.steps for e in batch], TOKENIZER.eot_token
    cut_off = [response for response in responses if len(response) == 40 and end not in response]
    ended = [response for response in responses if response[-1] == end and end not in response[:-1]]
    assert len(cut_off) > 10 and ended and len(cut_off) + len(ended) == len(responses)


def test_seqkd_validates_on_the_rows_own_outputs(seqkd):
    dev_rows = read_rows(data.prepare.HOME / "demo" / "dev.jsonl")[:4]
    ((rows, examples),) = seqkd.validated
    assert rows == dev_rows
    assert [TOKENIZER.decode(e.response) for e in examples] == [
        row.references[0] + "<|endoftext|>" for row in dev_rows
    ]


def test_seqkds_responses_are_a_data_directory_with_its_record(
    seqkd, student, teacher, from_the_teacher
):
    home = data.prepare.HOME / "demo"
    assert {path.name for path in seqkd.responses.iterdir()} == {
        "train.jsonl",
        "dev.jsonl",
        "test.jsonl",
        "run.json",
    }
    for name in ("dev.jsonl", "test.jsonl"):
        assert (seqkd.responses / name).read_bytes() == (home / name).read_bytes()
    rows, originals = read_rows(seqkd.responses / "train.jsonl"), read_rows(home / "train.jsonl")
    for row, original in zip(rows, originals, strict=True):
        text = TOKENIZER.decode(from_the_teacher[row.index][1]).removesuffix("<|endoftext|>")
        assert (row.instruction, row.input, row.references) == (
            original.instruction,
            original.input,
            (text,),
        )
    assert {path.name for path in seqkd.out.iterdir()} == {seqkd.responses.name, seqkd.trained.name}
    found = record(seqkd.responses)
    assert (
        found["hours"] > 0
        and found["settings"]["student"] == str(teacher)
        and found["settings"]["method"] == "responses"
    )
    s = record(seqkd.trained)["settings"]
    assert (s["responses"], s["teacher"], s["student"], s["data"]) == (
        str(seqkd.responses),
        str(teacher),
        str(student),
        "demo",
    )


def test_seqkds_responses_are_sampled_once_for_all_its_runs(seqkd, built, monkeypatch):
    def never(*arguments):
        raise AssertionError("sampled again")

    monkeypatch.setattr(train, "sample_to_file", never)
    before = files(seqkd.responses)
    screen = main(seqkd.out, *seqkd.options, "--seed", 11)
    assert (
        f"{seqkd.responses}: complete, skipped" in screen
        and len(list(seqkd.out.glob("seqkd-*-s1[01]/best"))) == 2
    )
    assert main(seqkd.out, *seqkd.options).count("complete, skipped") == 2
    assert files(seqkd.responses) == before


def test_seqkds_sampling_goes_on_where_it_was_interrupted(tmp_path, seqkd, built):
    def stopping(model, tokenizer, rows, key, path, *rest):
        lines = (seqkd.responses / "train.jsonl").read_text().splitlines(keepends=True)
        path.with_name("train.jsonl.partial").write_text("".join(lines[:7]) + lines[7][:50])
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(train, "sample_to_file", stopping)
        main(tmp_path, *seqkd.options)
    assert (
        "hours" not in record(tmp_path / "responses-wide-demo")
        and not (tmp_path / "responses-wide-demo" / "train.jsonl").exists()
    )
    main(tmp_path, *seqkd.options)
    for name in ("train.jsonl", "dev.jsonl"):
        assert (tmp_path / "responses-wide-demo" / name).read_bytes() == (
            seqkd.responses / name
        ).read_bytes()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / seqkd.trained.name / "best" / name).read_bytes() == (
            seqkd.trained / "best" / name
        ).read_bytes()


def test_the_responses_of_another_teacher_under_the_same_name_are_refused(tmp_path, seqkd):
    other = write_checkpoint(tmp_path / "wide", TEACHER, TOKENIZER)
    before = files(seqkd.out)
    with pytest.raises(InputError, match="responses-wide-demo: was made with student "):
        main(seqkd.out, *seqkd.options, "--sft-teacher", other)
    assert files(seqkd.out) == before


# ---- MiniLLM's plain text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [1, 3, 1000])
def test_plain_text_is_packed_in_blocks_of_as_many_documents_as_are_needed(n_rows):
    path = data.prepare.HOME / "demo" / "pretrain.jsonl"
    blocks = train.read_lm_blocks(
        settings(method="minillm", lm_data=str(path), block_size=32), TOKENIZER, n_rows
    )
    pieces = TOKENIZER.decode(packed_text([blocks], 32)).split("<|endoftext|>")
    documents = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    lengths = [len(TOKENIZER.encode(text)) + 1 for text in documents]
    needed = next((n for n in range(1, 61) if sum(lengths[:n]) > n_rows * 32), 60)
    assert set(pieces[:-1]) <= set(documents[:needed]) and any(
        text.startswith(pieces[-1]) for text in documents[:needed]
    )
    assert len(blocks) == (sum(lengths[:needed]) - 1) // 32 >= min(n_rows, 60)


def test_the_least_plain_text_is_one_block_and_the_token_before_it(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("the small dog sees")
    n = len(TOKENIZER.encode("the small dog sees")) + 1  # with its end-of-text
    (block,) = train.read_lm_blocks(
        settings(method="minillm", lm_data=str(path), block_size=n - 1), TOKENIZER, 10
    )
    assert [*block.request, *block.response] == [
        *TOKENIZER.encode("the small dog sees"),
        TOKENIZER.eot_token,
    ]
    with pytest.raises(InputError, match=rf"corpus.txt: has {n} tokens, and a block is of {n}; "):
        train.read_lm_blocks(
            settings(method="minillm", lm_data=str(path), block_size=n), TOKENIZER, 10
        )


@pytest.mark.parametrize(
    "name, content, words",
    [
        (
            "short.txt",
            "the small dog",
            "short.txt: has 4 tokens, and a block is of 128; give a longer text",
        ),
        ("empty.txt", "", "empty.txt: has 0 tokens"),
        ("wrong.jsonl", '{"text": "a"}\n{"texts": "b"}\n', "wrong.jsonl, line 2: 'text'"),
        ("none.jsonl", None, "none.jsonl"),
        ("none.txt", None, "none.txt"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_one_line_of_error_and_leaves_no_record(
    tmp_path, capsys, student, teacher, name, content, words
):
    if content is not None:
        (tmp_path / name).write_text(content)
    options = (
        "--method",
        "minillm",
        "--data",
        "demo",
        "--init",
        student,
        "--sft-teacher",
        teacher,
        "--lm-data",
        tmp_path / name,
    )
    with pytest.raises(SystemExit) as stopped:
        run_command_line(
            lambda: train.main([*map(str, options), "--out", str(tmp_path / "out")]),
            InputError,
        )
    err = after_device(capsys.readouterr().err)
    assert (
        stopped.value.code == 2
        and err.startswith("error: ")
        and err.count("\n") == 1
        and words in err
    )
    assert not list(tmp_path.rglob("run.json"))


# ---- pre-training ----------------------------------------------------------------------------------------------------------------------


def packed_text(steps, block):
    """The stream of an epoch's blocks, each of which must start with the token that the block before it ended with."""
    examples = [e for batch in steps for e in batch]
    assert all(len(e.request) == 1 and len(e.response) == block for e in examples)
    for before, behind in zip(examples, examples[1:]):
        assert behind.request[0] == before.response[-1]
    return [examples[0].request[0], *(token for e in examples for token in e.response)]


def test_pretraining_predicts_every_token_of_the_packed_texts_once(
    tmp_path, steps_seen, no_validation
):
    s = settings(
        method="pretrain",
        student="1x16x2",
        global_batch_size=4,
        block_size=32,
        epochs=2,
        metric_for_best="loss",
    )
    train.run_stage("stage", s, tmp_path, 8, CPU)
    documents = [
        json.loads(line)["text"]
        for line in (data.prepare.HOME / "demo" / "pretrain.jsonl").read_text().splitlines()
    ]
    n_tokens = sum(len(TOKENIZER.encode(text)) + 1 for text in documents)
    orders = []
    for half in (steps_seen[: len(steps_seen) // 2], steps_seen[len(steps_seen) // 2 :]):
        stream = packed_text(half, 32)
        assert (
            n_tokens - 4 * 32 - 33 < len(stream) <= n_tokens
        )  # but for less than a block and less than a batch of blocks
        texts = TOKENIZER.decode(stream).split("<|endoftext|>")
        assert set(texts[:-1]) <= set(documents) and any(
            text.startswith(texts[-1]) for text in documents
        )
        assert len(set(texts)) == len(texts)
        orders.append(texts)
    assert orders[0] != orders[1]


def test_pretraining_on_a_set_without_texts_packs_its_rows_in_gpt2s_tokens(
    tmp_path, shared, monkeypatch, steps_seen, no_validation
):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "gpt2-bpe" / "tiktoken-cache"))
    rows = [
        {"instruction": f"say {word}", "input": "", "output": word}
        for word in "one two three four five".split()
    ]
    for name in ("train", "dev"):
        write_rows(tmp_path / "mine" / f"{name}.jsonl", rows)
    s = settings(
        method="pretrain",
        student="1x8x2",
        data=str(tmp_path / "mine"),
        block_size=16,
        global_batch_size=100,
        metric_for_best="loss",
        max_train_rows=4,
    )
    train.run_stage("stage", s, tmp_path, 8, CPU)
    text = load_tokenizer().decode(packed_text(steps_seen, 16))
    pieces = text.split("<|endoftext|>")
    assert (
        set(pieces[:-1]) < {fill_template(row["instruction"]) + row["output"] for row in rows[:4]}
        and len(pieces) == 4
    )
    assert load(tmp_path / "stage" / "best").config.vocab_size == 50257


def test_pretraining_starts_from_an_initialisation_that_hangs_on_the_seed(
    tmp_path, steps_seen, no_validation
):
    models = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.run_stage(
            name,
            settings(
                method="pretrain", student="1x16x2", metric_for_best="loss", seed=seed, steps=1
            ),
            tmp_path,
            8,
            CPU,
        )
        models.append(load(tmp_path / name / "best").wte.weight)
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])


# ---- validation and the best checkpoint ------------------------------------------------------------------------------------------------


def test_validation_draws_the_same_random_numbers_each_time(tmp_path, student, monkeypatch):
    """Steps that change no weight leave all validations alike, word for word; another seed's are others."""
    seen, evaluate = [], train.evaluate

    def recorded(*arguments, **how):
        results = evaluate(*arguments, **how)
        seen.append([row["text"] for row in results])
        return results

    def idle(run, examples, t):
        torch.rand(t + 1)
        run.clock["student"] = 1.0
        return {"loss": 0.0, "grad_norm": 0.0, "response_tokens": 1}

    monkeypatch.setattr(train, "evaluate", recorded)
    monkeypatch.setitem(train.STEPS, "sft", idle)
    for name, seed in (("a", 10), ("b", 11)):
        train.run_stage(name, settings(student=str(student), epochs=3, seed=seed), tmp_path, 8, CPU)
        scores = [
            (line["val_loss"], line["val_rouge_l"])
            for line in metrics(tmp_path / name)
            if "val_loss" in line
        ]
        assert len(scores) == 3 and len(set(scores)) == 1
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4] == seen[5]
    assert (
        len(seen[0]) == 8 and len(set(seen[0])) > 4
    )  # all validation rows, and no two alike by a stuck generator


@pytest.mark.parametrize(
    "metric_for_best, scores, best",
    [
        (
            "rouge_l",
            [(2.0, 3.0), (1.5, 9.0), (1.0, 9.0), (0.5, 4.0)],
            1,
        ),  # of two equal ones the first
        ("loss", [(2.0, 3.0), (1.5, 9.0), (1.0, 1.0), (1.7, 4.0)], 2),
    ],
)
def test_best_checkpoint_is_the_best_by_rouge_l_or_by_loss(
    tmp_path, student, monkeypatch, metric_for_best, scores, best
):
    weights = []

    def validate(run, rows, examples):
        weights.append(run.student.wte.weight.detach().clone())
        return dict(zip(("val_loss", "val_rouge_l"), scores[len(weights) - 1]))

    monkeypatch.setattr(train, "validate", validate)
    train.run_stage(
        "stage",
        settings(student=str(student), epochs=4, metric_for_best=metric_for_best, lr=0.01),
        tmp_path,
        8,
        CPU,
    )
    kept = load(tmp_path / "stage" / "best").wte.weight
    assert [torch.equal(kept, w) for w in weights] == [n == best for n in range(4)]
    assert record(tmp_path / "stage")["best"] == scores[best][metric_for_best == "rouge_l"]
    assert record(tmp_path / "stage")["best_step"] == 2 * (best + 1)  # two steps an epoch


def test_prompt_in_best_is_the_one_of_that_step(tmp_path, student, teacher, monkeypatch):
    prompts = []

    def validate(run, rows, examples):
        prompts.append(run.P.detach().clone())
        return {
            "val_loss": 1.0,
            "val_rouge_l": [0.0, 5.0, 7.0, 6.0][len(prompts) - 1],
            "val_prompted_loss": 1.0,
        }

    monkeypatch.setattr(train, "validate", validate)
    monkeypatch.setattr(train, "validation_loss", lambda *arguments: 1.0)
    train.run_stage("stage", promptkd_settings(student, teacher, epochs=3), tmp_path, 8, CPU)
    kept = load_prompt(tmp_path / "stage" / "best", 24)
    assert [torch.equal(kept, P) for P in prompts] == [False, False, True, False]


@pytest.mark.parametrize("cost, warned", [(0.3, True), (0.05, False), (-0.2, False)])
def test_a_prompt_that_harms_the_teacher_is_warned_of_before_it_is_tuned(
    tmp_path, capsys, student, teacher, monkeypatch, cost, warned
):
    monkeypatch.setattr(
        train,
        "validation_loss",
        lambda run, model, examples, P=None: 2.0 if P is None else 2.0 + cost,
    )
    train.run_stage(
        "stage", promptkd_settings(student, teacher, steps=1, max_dev_rows=2), tmp_path, 16, CPU
    )
    said = capsys.readouterr().out
    assert (
        ("warning: the prompt costs the teacher 0.30 nats" in said) == warned == ("warning" in said)
    )
    if warned:
        assert said.index("warning") < said.index("step 1/1")


# ---- two ranks, and four ----------------------------------------------------------------------------------------------------------------


RANK = """
import data.prepare, json, os, pathlib, sys, test_train, train
from data import dist
from data.cli import run_command_line as command

data.prepare.HOME = pathlib.Path(sys.argv[1])
train.show_demo, train.plot_curves = lambda models, device, dtype: None, lambda directory: "no picture"
dist.shutdown = lambda: None  # the ranks stay together for the next command
sample_all = train.sample_all

def main():
    for options, uneven in json.loads(sys.argv[2]):
        train.sample_all = test_train.uneven_responses if uneven else sample_all
        train.main(options)

command(main)
"""


def uneven_responses(model, requests, keys, end, max_new_tokens, **how):
    """Every other row has no response, the others are at the limit: with two ranks, all of the one and all of the other."""
    places = [i * dist.world_size() + dist.rank() for i in range(len(requests))]
    return [[7] * max_new_tokens if place % 2 == 0 else [] for place in places], None


def launch_ranks(n, home, commands):
    """train.main with each of the options, uneven or not, one after the other under torchrun. Returns what was said."""
    (home / "rank.py").write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = [[[*options, "--out", str(home / str(n))], uneven] for options, uneven in commands]
    done = run_command(
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={n}",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        home / "rank.py",
        data.prepare.HOME,
        json.dumps(commands),
        PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory, student, teacher):
    """Each method's whole command in one process, and under torchrun with two ranks and with four: the folder that each leaves, and what
    was said. The methods that sample are run with uneven responses, too, on two ranks."""
    home = tmp_path_factory.mktemp("ranks")
    how = (
        "--data",
        "demo",
        "--steps",
        3,
        "--global-batch",
        16,
        "--dropout",
        0,
        "--micro-batch",
        3,
        "--lr",
        0.01,
        "--dev-rows",
        4,
    )
    init, start, text = (
        ("--init", student),
        ("--student", student),
        ("--lm-data", data.prepare.HOME / "demo" / "pretrain.jsonl"),
    )
    methods = {
        "pretrain": ("--shape", "1x16x2"),
        "sft": start,
        "kd": start,
        "seqkd": start,
        "minillm": (*init, *text),
        "gkd": init,
        "promptkd": init,
    }
    commands = []
    for method, options in methods.items():
        taught = () if method in ("pretrain", "sft") else ("--sft-teacher", teacher)
        commands.append(([*map(str, ("--method", method, *options, *taught, *how))], False))
    uneven = [([*options, "--seed", "11"], True) for options, _ in commands[-3:]]
    said = {n: launch_ranks(n, home, commands + (uneven if n == 2 else [])) for n in (2, 4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "show_demo", lambda models, device, dtype: None)
        patch.setattr(report, "plot_curves", lambda directory: "no picture")
        for options, _ in commands:
            main(home / "1", *options)
        patch.setattr(train, "sample_all", uneven_responses)
        for options, _ in uneven:
            main(home / "1", *options)
    return SimpleNamespace(out={n: home / str(n) for n in (1, 2, 4)}, said=said)


@pytest.mark.parametrize(
    "method, n, seed",
    [
        *(
            (method, n, 10)
            for method in ("pretrain", "sft", "kd", "seqkd", "minillm", "gkd", "promptkd")
            for n in (2, 4)
        ),
        *((method, 2, 11) for method in ("minillm", "gkd", "promptkd")),
    ],
)
def test_several_ranks_train_as_one_does(by_ranks, method, n, seed):
    """The whole command under torchrun: the same metrics and weights as in one process, bar rounding, and each file written once. Seed 11:
    the responses of the one rank are empty, those of the other at the limit."""
    several, one = (
        next(path for path in out.glob(f"{method}-*") if path.name.endswith("s11") == (seed == 11))
        for out in (by_ranks.out[n], by_ranks.out[1])
    )
    assert several.name == one.name and record(several)["ranks"] == n
    unlike = ("tokens_per_second", "seconds", "memory_resident_gb")
    for a, b in zip(metrics(several), metrics(one), strict=True):
        assert {k: v for k, v in a.items() if k not in unlike} == pytest.approx(
            {k: v for k, v in b.items() if k not in unlike}, rel=1e-3, abs=1e-6
        )
    if seed == 11:
        assert {line["response_tokens"] for line in metrics(one) if line["step"]} == {
            8 * 40
        }  # of 16 rows
    assert by_ranks.said[n].count("step 3/3") == {2: 10, 4: 7}[n]  # of each command one rank speaks
    models = [load(directory / "best").state_dict() for directory in (several, one)]
    for name, w in models[0].items():
        # The keys' biases change no attention weight: their gradient is rounding alone, which AdamW scales up to full steps.
        real = torch.ones_like(w, dtype=torch.bool)
        if name.endswith("c_attn.bias"):
            real[len(w) // 3 : 2 * len(w) // 3] = False
        assert w[real].allclose(models[1][name][real], atol=1e-4), name


@pytest.mark.parametrize("n", [2, 4])
def test_several_ranks_sample_seqkds_responses_as_one_does(by_ranks, n):
    two, one = (files(by_ranks.out[number] / "responses-wide-demo") for number in (n, 1))
    assert (
        {str(path) for path in two}
        == {str(path) for path in one}
        == {"train.jsonl", "dev.jsonl", "test.jsonl", "run.json"}
    )
    for path, (content, _) in one.items():
        assert path.name == "run.json" or two[path][0] == content


# ---- bad input -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error",
    [
        (["--method", "pretrain"], "error: --method pretrain needs --shape"),
        (
            ["--method", "sft", "--data", "nowhere", "--student", "MODEL"],
            "error: data 'nowhere': no such directory",
        ),
    ],
)
def test_a_command_that_cannot_run_ends_with_status_2_and_one_line(
    tmp_path, student, options, error
):
    options = [student if option == "MODEL" else option for option in options]
    done = run_command("train.py", *options, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert (
        after_device(done.stderr).startswith(error) and after_device(done.stderr).count("\n") == 1
    )


@pytest.mark.parametrize(
    "option, value",
    [
        ("--reg", "-1"),
        ("--reg", "nan"),
        ("--epochs", "0"),
        ("--steps", "1.5"),
        ("--lr", "0"),
        ("--lr", "fast"),
        ("--dropout", "1"),
        ("--prompt-length", "0"),
        ("--prompt-init", "zeros"),
        ("--prompt-kl", "both"),
        ("--micro-batch", "0"),
        ("--method", "guess"),
        ("--seed", "-1"),
    ],
)
def test_an_option_out_of_range_is_named_with_status_2(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as stopped:
        main(tmp_path, option, value)
    assert stopped.value.code == 2
    assert option in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", ["6x256", "0x16x2", "1x16x3", "axbxc", "1x-16x-2", "1x16x2x1"])
def test_a_shape_that_is_none_is_refused(tmp_path, shape):
    with pytest.raises(InputError, match=f"--shape {shape}: must be LAYERSxWIDTHxHEADS"):
        main(tmp_path, "--method", "pretrain", "--data", "demo", "--shape", shape)


def test_teacher_and_student_with_different_tokens_are_refused(tmp_path, student):
    other = write_checkpoint(
        tmp_path / "other", replace(STUDENT, vocab_size=tiny_tokenizer().n_vocab), tiny_tokenizer()
    )
    with pytest.raises(InputError, match="different tokenizers"):
        train.run_stage("stage", promptkd_settings(student, other), tmp_path, 8, CPU)


def test_an_empty_prompt_text_is_refused(tmp_path, student, teacher):
    with pytest.raises(InputError, match="--prompt-text is empty"):
        main(
            tmp_path,
            "--data",
            "demo",
            "--init",
            student,
            "--sft-teacher",
            teacher,
            "--prompt-text",
            "",
        )


def test_too_little_text_to_pack_is_refused(tmp_path):
    with pytest.raises(InputError, match="too little to train on"):
        train.run_stage(
            "stage",
            settings(
                method="pretrain", student="1x16x2", block_size=100_000, metric_for_best="loss"
            ),
            tmp_path,
            8,
            CPU,
        )


def test_a_bad_training_row_is_named_and_nothing_is_trained(tmp_path, student, steps_seen):
    write_rows(
        tmp_path / "mine" / "train.jsonl",
        [{"instruction": "say one", "output": "one"}, {"instruction": "say two"}],
    )
    write_rows(tmp_path / "mine" / "dev.jsonl", [{"instruction": "say one", "output": "one"}])
    with pytest.raises(InputError, match=r"train.jsonl, line 2: 'output'"):
        train.run_stage(
            "stage", settings(student=str(student), data=str(tmp_path / "mine")), tmp_path, 8, CPU
        )
    assert steps_seen == []


# ---- mishaps -----------------------------------------------------------------------------------------------------------------------------


def test_a_stage_that_could_not_start_leaves_no_record_to_be_refused_by(tmp_path, student):
    with pytest.raises(InputError, match="nowhere"):
        train.run_stage("stage", settings(student="nowhere"), tmp_path, 8, CPU)
    assert not (tmp_path / "stage" / "run.json").exists()
    train.run_stage(
        "stage", settings(student=str(student), steps=1, max_dev_rows=2), tmp_path, 8, CPU
    )


def test_a_metrics_line_cut_behind_an_inner_brace_does_not_stop_going_on(tmp_path, student):
    s = settings(student=str(student), epochs=2, max_dev_rows=2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_in_a_step(patch, "sft")
        train.run_stage("stage", s, tmp_path, 8, CPU)
    path = tmp_path / "stage" / "metrics.jsonl"
    line = path.read_text().splitlines()[-1]
    path.write_text(path.read_text() + line[: line.index("}") + 1])
    train.run_stage("stage", s, tmp_path, 8, CPU)
    assert [line["step"] for line in metrics(tmp_path / "stage")] == [1, 2, 3, 4]


def test_a_training_that_diverges_is_stopped_and_not_complete(tmp_path, student):
    with pytest.raises(InputError, match="has diverged: lower --lr"):
        train.run_stage(
            "stage",
            settings(
                student=str(student), lr=1e30, epochs=3, max_dev_rows=2, metric_for_best="loss"
            ),
            tmp_path,
            8,
            CPU,
        )
    assert "hours" not in record(tmp_path / "stage")


def test_validation_rows_that_are_all_over_the_limit_are_refused(tmp_path, student):
    write_rows(tmp_path / "mine" / "train.jsonl", [{"instruction": "say one", "output": "one"}])
    write_rows(tmp_path / "mine" / "dev.jsonl", [{"instruction": "x " * 600, "output": "one"}])
    with pytest.raises(InputError, match="every validation row"):
        train.run_stage(
            "stage",
            settings(student=str(student), data=str(tmp_path / "mine"), metric_for_best="loss"),
            tmp_path,
            8,
            CPU,
        )


def test_training_rows_limit_the_texts_of_pretraining(tmp_path, steps_seen, no_validation):
    s = settings(
        method="pretrain",
        student="1x16x2",
        block_size=32,
        metric_for_best="loss",
        max_train_rows=3,
        global_batch_size=1,
    )
    train.run_stage("stage", s, tmp_path, 8, CPU)
    texts = [
        json.loads(line)["text"]
        for line in (data.prepare.HOME / "demo" / "pretrain.jsonl").read_text().splitlines()[:3]
    ]
    assert len(steps_seen) == (sum(len(TOKENIZER.encode(text)) + 1 for text in texts) - 1) // 32


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "sft", "--reg", "0"],
        ["--method", "sft", "--prompt-lr", "1"],
        ["--method", "sft", "--sft-teacher", "gpt2-xl"],
        ["--method", "pretrain", "--shape", "1x16x2", "--student", "gpt2"],
        ["--shape", "1x16x2"],
        ["--teacher", "gpt2", "--sft-teacher", "gpt2-xl"],
        ["--student", "gpt2", "--init", "gpt2"],
    ],
)
def test_an_option_without_effect_is_refused(plan, options):
    with pytest.raises(InputError, match="has no effect"):
        plan(*options)


PROMPT_OPTIONS = (
    ("--prompt-lr", "1"),
    ("--prompt-text", "x"),
    ("--prompt-length", "3"),
    ("--prompt-init", "text"),
    ("--reg", "0"),
    ("--prompt-kl", "forward"),
    ("--reg-kl", "reverse"),
)
WITHOUT_EFFECT = {
    "pretrain": [
        ("--student", "gpt2"),
        ("--teacher", "gpt2"),
        ("--sft-teacher", "gpt2"),
        ("--init", "gpt2"),
        ("--lm-data", "x"),
        *PROMPT_OPTIONS,
    ],
    "sft": [
        ("--shape", "1x16x2"),
        ("--teacher", "gpt2"),
        ("--sft-teacher", "gpt2"),
        ("--init", "gpt2"),
        ("--lm-data", "x"),
        *PROMPT_OPTIONS,
    ],
    "kd": [("--shape", "1x16x2"), ("--init", "gpt2"), ("--lm-data", "x"), *PROMPT_OPTIONS],
    "seqkd": [("--shape", "1x16x2"), ("--init", "gpt2"), ("--lm-data", "x"), *PROMPT_OPTIONS],
    "minillm": [("--shape", "1x16x2"), *PROMPT_OPTIONS],
    "gkd": [("--shape", "1x16x2"), ("--lm-data", "x"), *PROMPT_OPTIONS],
    "promptkd": [("--shape", "1x16x2"), ("--lm-data", "x")],
}


@pytest.mark.parametrize("method", WITHOUT_EFFECT)
def test_each_method_refuses_by_name_what_it_does_not_use_and_takes_the_rest(plan, method):
    others = {
        ("--shape", "1x16x2"),
        ("--init", "gpt2"),
        ("--lm-data", "x"),
        ("--sft-teacher", "gpt2"),
        ("--student", "gpt2"),
        ("--teacher", "gpt2"),
        *PROMPT_OPTIONS,
    }
    how = ("--method", method, *(("--shape", "1x16x2") if method == "pretrain" else ()))
    for option in WITHOUT_EFFECT[method]:
        with pytest.raises(
            InputError, match=rf"^{option[0]} has no effect here \(method {method}\)"
        ):
            plan(*how, *option)
    for option in others - set(WITHOUT_EFFECT[method]):
        assert plan(*how, *option)


def test_what_skips_a_stage_is_refused_beside_what_the_stage_would_need(plan):
    for method in ("kd", "seqkd", "minillm", "gkd", "promptkd"):
        with pytest.raises(InputError, match="--teacher has no effect"):
            plan("--method", method, "--teacher", "gpt2-large", "--sft-teacher", "gpt2-xl")
    for method in ("minillm", "gkd"):
        with pytest.raises(InputError, match="--student has no effect"):
            plan("--method", method, "--student", "gpt2", "--init", "gpt2")


@pytest.mark.parametrize("content", ['{"settings": ', "[1]", '{"settings": 5}'])
def test_a_damaged_record_of_a_model_that_is_named_is_one_line(plan, tmp_path, content):
    write_config(tmp_path / "init-mine", *SHAPES["gpt2"])
    (tmp_path / "init-mine" / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run.json: is (damaged|no run)"):
        plan("--init", "init-mine")


def test_stages_made_here_are_named_by_the_model_they_started_from(plan, tmp_path):
    (tmp_path / "mine").mkdir()
    names_of = [
        stage.name for stage in plan("--student", "gpt2", "--data", "mine", "--train-rows", "9")
    ]
    assert names_of == [
        "teacher-gpt2-xl-mine-9rows",
        "init-gpt2-mine-9rows",
        "promptkd-gpt2-mine-9rows-s10",
    ]
    (again,) = plan(
        "--sft-teacher",
        "out/teacher-gpt2-xl-mine-9rows",
        "--init",
        "out/init-gpt2-mine-9rows/best",
        "--data",
        "mine",
    )
    assert again.name == "promptkd-gpt2-mine-s10"
