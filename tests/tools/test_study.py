"""The miniature's study: its statistics and tables on made-up results, the pages against the
results that are there, the patches of the released code, and the runner with two steps per run."""

import contextlib
import json
import math
import random
import re
import statistics
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import error_of, write_checkpoint, write_rows
from test_algorithm import in_float64, make_examples, make_run  # noqa: F401

import data.sets.prepare
import losses
import train
from data.models.named import load_model
from data.models.prompts import load_prompt
from data.models.tokenizer import load_tokenizer
from data.process.files import read_json
from data.runs import report
from data.runs.optim import clip_and_step
from data.runs.paper import DEMO_SETS
from data.sets import demo
from data.sets.demo import TOKENIZER_DIR, make_rows
from data.sets.rows import Example, encode_request, micro_batches
from losses import kl
from model import Config, head_logits
from prompt import prepend, response_hidden
from tests.study import measure, miniature, plots, released, results
from tests.study import report as study
from tests.study.miniature import GRID, GRID_SEED, PROMPT_GRID, STUDENTS, VARIANTS, Experiment
from tests.study.results import LARGE, SMALL

CPU = torch.device("cpu")

# ---- made-up results -----------------------------------------------------------------------------


def made_up_curve(rng, level):
    """A curve of exposure bias over 20 steps, of which 15 are reliable."""
    error = [level * l / 20 + rng.gauss(0, 1) for l in range(1, 21)]
    alive = [600] * 10 + [100] * 5 + [30] * 5
    epsilon = 0.5 + rng.random()
    return {
        "R": [l * epsilon * (1 + e / 100) for l, e in enumerate(error, start=1)],
        "epsilon": [epsilon] * 20,
        "ex_acc_err": error,
        "alive_student": alive,
        "alive_teacher": alive,
        "ex_acc_err_without_first": [value + 1 for value in error[1:]],
    }


def made_up_effect(rng, has_prompt, progress):
    names = ["kl p q", "kl q p", "loss p", "loss q"]
    names += ["kl p_P q", "kl q p_P", "kl p_P p", "loss p_P"] if has_prompt else []
    means = {name: 1.5 - progress + rng.random() / 10 for name in names}
    counts = {"alphabet": 10 + int(20 * progress), "text": 30, "other": 6, "wrong": 3}
    return {
        "rouge_l": {"teacher": 90 - 5 * has_prompt + rng.random() * progress, "student": 70},
        "references": means,
        "student's responses": {name: 2 * value for name, value in means.items()},
        "lists": {"teacher": counts, "student": {**counts, "wrong": 20}},
    }


def made_up_result(experiment):
    """What `miniature.compute` could have written for an experiment."""
    rng, variant = random.Random(experiment.name), VARIANTS.get(experiment.variant)
    method = variant.method if variant else "sft"
    rank = list(results.NAMES).index(method) + 6 * (experiment.student != SMALL)
    has_prompt, from_init = method == "promptkd", method in ("minillm", "gkd", "promptkd")
    steps = [n * 75 for n in range(not has_prompt, 6)] if from_init else list(range(500, 3001, 500))
    scores = [50 + 3 * rank + 10 * (1 - math.exp(-i)) + rng.random() for i in range(len(steps))]
    validation = {"step": steps, "loss": scores, "rouge_l": scores}
    if has_prompt:
        validation |= {"bare_loss": [0.5] + [None] * 5, "prompted_loss": [0.502, *scores[1:]]}
    size = 64 if from_init else 16
    result = {"student": experiment.student, "variant": experiment.variant, "seed": experiment.seed}
    settings = {"global_batch_size": size, "schedule": "cosine", "warmup_steps": 20, "lr": 0.002}
    settings |= {"prompt_lr": 0.001} if has_prompt else {"prompt_lr": None}
    result |= {"settings": settings, "parameters": 90_000, "hours": 0.1}
    result |= {"steps": 1500 if method == "init" else steps[-1], "best_step": steps[-2]}
    result |= {"seconds": 400.0}
    result |= {"seconds_per_step": 0.5 + rng.random(), "memory_resident_gb": 0.7}
    result["validation"] = validation
    if experiment.lr is None:

        def score(n):
            return {name: [60 + rank + rng.gauss(0, 1) for _ in range(n)] for name in DEMO_SETS}

        result["rouge_l"] = {"sampled": score(3), "greedy": score(1), "banned": score(1)}
        scores = {kind: [60 + rank + rng.gauss(0, 1)] * 3 for kind in measure.KINDS}
        result["kinds"] = {kind: {"rows": 9, "scores": values} for kind, values in scores.items()}
        result["exposure"] = made_up_curve(rng, 20 - 2 * rank)
        names = ("all requests", "ban", "all three")
        result["exposure_released"] = {name: [rng.gauss(0, 9)] * 19 for name in names}
        result["effect"] = made_up_effect(rng, has_prompt, 1)
    if experiment.lr is None and variant and variant.keep:
        result["along"] = [
            {"step": step, "effect": made_up_effect(rng, has_prompt, step / 375)}
            | ({"exposure": made_up_curve(rng, 20 - step / 25)} if step else {})
            for step in range(0, 376, 75)
        ]
    if experiment.lr is None and experiment.variant == "promptkd":
        result["effect_on"] = {name: made_up_effect(rng, True, 1) for name in ("init", "gkd")}
    return result


@pytest.fixture(scope="module")
def full():
    """A result for every experiment, {name: JSON}."""
    found = {}
    for _ in range(3):  # the grids, the prompt's grid, and what is beyond it
        for experiment in study.all_experiments(found):
            found.setdefault(experiment.name, made_up_result(experiment))
    return found


@pytest.fixture(scope="module")
def blocks(full):
    return study.make_blocks(full)


def rows_of(table):
    """The rows of a Markdown table, {first cell: other cells}."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    return {label: others for label, *others in cells}


def score_of(result, column, way="sampled"):
    sets = DEMO_SETS if column == "average" else [column]
    return np.mean([np.mean(result["rouge_l"][way][name]) for name in sets])


def scores_of(found, student, variant, column, way="sampled", seeds=miniature.SEEDS):
    names = [f"{student}/{variant}-s{seed}" for seed in seeds]
    return np.array([score_of(found[name], column, way) for name in names])


def interval_cell(values, digits=1):
    """The cell of a mean with its interval, by NumPy and the quantile of five values."""
    mean, half = values.mean(), 2.776 * values.std(ddof=1) / 5**0.5
    cell = f"{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"
    return f"**{cell}**" if abs(mean) > half else cell


# ---- statistics and tables -----------------------------------------------------------------------


def test_quantiles_are_those_of_students_t():
    """The density of Student's t, integrated up to each quantile, is 0.975."""
    for n, quantile in results.T_QUANTILE.items():
        nu = n - 1
        constant = math.gamma((nu + 1) / 2) / (math.sqrt(nu * math.pi) * math.gamma(nu / 2))
        x = np.linspace(0, quantile, 200_001)
        density = constant * (1 + x**2 / nu) ** (-(nu + 1) / 2)
        assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=2e-5)
    assert list(results.T_QUANTILE) == list(range(2, 11))


@pytest.mark.parametrize("size, student", [("small", SMALL), ("large", LARGE)])
@pytest.mark.parametrize("way, prefix", [("sampled", ""), ("greedy", "greedy-")])
def test_table_1_has_means_and_deviations_over_seeds(full, blocks, size, student, way, prefix):
    name = f"{prefix}{size}" if prefix else f"table1-{size}"
    rows = rows_of(blocks[name])
    assert rows["ROUGE-L"] == [*DEMO_SETS, "average"]
    for variant, label in results.NAMES.items():
        for column, cell in zip(rows["ROUGE-L"], rows[label], strict=True):
            scores = scores_of(full, student, variant, column, way)
            assert cell == f"{scores.mean():.1f} ± {scores.std(ddof=1):.1f}"
    teacher = full["3x128x4/teacher-s10"]
    assert rows["teacher"] == [f"{score_of(teacher, c, way):.1f}" for c in rows["ROUGE-L"]]


@pytest.mark.parametrize("size, student", [("small", SMALL), ("large", LARGE)])
@pytest.mark.parametrize("way, prefix", [("sampled", ""), ("greedy", "greedy-")])
def test_differences_are_paired_over_seeds(full, blocks, size, student, way, prefix):
    rows = rows_of(blocks[f"{prefix}differences-{size}"])
    for variant in ("init", "sft", "kd", "seqkd", "minillm", "gkd"):
        for column, cell in zip(rows["PromptKD minus"], rows[results.NAMES[variant]], strict=True):
            ours, theirs = (
                scores_of(full, student, name, column, way) for name in ("promptkd", variant)
            )
            assert cell == interval_cell(ours - theirs)


def test_a_difference_is_of_the_seeds_that_both_have(full):
    found = {name: r for name, r in full.items() if name != f"{SMALL}/gkd-s2"}
    del found[f"{SMALL}/promptkd-s5"]
    pairs = [scores_of(full, SMALL, m, "test", seeds=(1, 3, 4)) for m in ("promptkd", "gkd")]
    difference = pairs[0] - pairs[1]
    mean, half = difference.mean(), 4.303 * difference.std(ddof=1) / 3**0.5
    cell = rows_of(study.differences_table(found, SMALL))["GKD"][0]
    expected = f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"
    assert cell.replace("**", "") == f"{expected} (n = 3)"
    assert rows_of(study.table_1(found, SMALL))["GKD"][0].endswith("(n = 4)")


def test_a_single_seed_has_neither_deviation_nor_interval(full):
    names = [f"{SMALL}/{method}-s1" for method in ("gkd", "promptkd")]
    found = {name: full[name] for name in names}
    gkd, ours = (score_of(full[name], "test") for name in names)
    assert rows_of(study.table_1(found, SMALL))["GKD"][0] == f"{gkd:.1f} (n = 1)"
    cell = rows_of(study.differences_table(found, SMALL))["GKD"][0]
    assert cell == f"{ours - gkd:+.1f} (n = 1)"


def test_without_results_every_number_reads_not_run():
    empty = study.make_blocks({})
    for name, block in empty.items():
        if not block.startswith("|"):
            assert block == "not run", name
            continue
        _, _, *lines = block.splitlines()
        start = 2 if name == "claims" else 1  # after the label, and what the paper reports
        cells = [c.strip() for line in lines for c in line.strip("|").split("|")[start:]]
        labels = (
            r"SFT|KD|SeqKD|MiniLLM|GKD|PromptKD|the prompt|–|(?:[\d.]+: not run(?:, )?)+|not run"
        )
        assert [cell for cell in cells if not re.fullmatch(labels, cell)] == [], name
        assert any("not run" in cell for cell in cells), name


def test_grid_chooses_as_the_runner_does(full, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(miniature, "RESULTS", tmp_path)
    for name, result in full.items():
        if "/grid/" in name:
            path = tmp_path / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result))
    lines = [line.split(" | ") for line in blocks["grid"].splitlines()[2:]]
    chosen = {(line[0].strip("| "), line[1]): line[3].split(",")[0] for line in lines}
    for student in STUDENTS:
        for method in GRID:
            rates = miniature.learning_rates(Experiment(student, method, 1))
            assert chosen[student, results.NAMES[method]] == f"{rates['lr']:g}"
        rates = miniature.learning_rates(Experiment(student, "promptkd", 1))
        assert chosen[student, "the prompt"] == f"{rates['prompt_lr']:g}"


def test_one_rate_beyond_the_edge_of_a_grid_is_tried(full, blocks):
    grid = [Experiment(SMALL, "gkd", GRID_SEED, lr) for lr in (1e-3, 2e-3, 4e-3, 8e-3)]
    rates = [miniature.beyond_grid(grid, best, "lr") for best in grid]
    assert [rate and rate.lr for rate in rates] == [5e-4, None, None, 0.016]
    prompts = [Experiment(SMALL, "promptkd", GRID_SEED, 2e-3, rate) for rate in PROMPT_GRID]
    beyond = miniature.beyond_grid(prompts, prompts[-1], "prompt_lr")
    assert beyond == Experiment(SMALL, "promptkd", GRID_SEED, 2e-3, 9e-3)
    lines = [line.strip("| ").split(" | ") for line in blocks["grid"].splitlines()[2:]]
    for _, _, rates, chosen, cell in lines:
        assert ("at the edge" in chosen) == (cell != "–")
        assert cell.split(": ")[0] not in rates
    assert any(cell != "–" for *_, cell in lines)
    student, label, *_, cell = next(line for line in lines if line[-1] != "–" and line[1] != "KD")
    rate, score = cell.split(": ")
    method = {name: method for method, name in results.NAMES.items()} | {"the prompt": "promptkd"}
    names = [
        name
        for name in full
        if name.startswith(f"{student}/grid/{method[label]}-") and f"lr{rate}" in name
    ]
    scores = [max(full[name]["validation"]["rouge_l"]) for name in names]
    assert score in [f"{s:.1f}" for s in scores]


def test_grid_without_one_experiment_has_no_choice(full):
    middle = f"{GRID['gkd'][1]:g}"
    found = {name: r for name, r in full.items() if f"gkd-lr{middle}" not in name}
    line = next(x for x in study.grid_table(found).splitlines() if f"| {SMALL} | GKD" in x)
    assert f", {middle}: not run, " in line
    assert line.endswith("| not run | – |")


def test_variants_are_compared_with_promptkd(full, blocks):
    for name, rows in (("table3", study.TABLE_3), ("table5", study.TABLE_5)):
        for label, variant in rows.items():
            cells = rows_of(blocks[name])[label]
            scores = scores_of(full, SMALL, variant, "average")
            assert cells[1] == f"{scores.mean():.1f} ± {scores.std(ddof=1):.1f}"
            if variant != "promptkd":
                difference = scores - scores_of(full, SMALL, "promptkd", "average")
                assert cells[3] == interval_cell(difference)
    ours, plain = (
        scores_of(full, SMALL, variant, "average") for variant in ("random-12", "promptkd")
    )
    assert rows_of(blocks["figure4-table"])["random, 12"][3] == interval_cell(ours - plain)
    assert len(rows_of(blocks["figure4-table"])) == 2 + 9
    rows = rows_of(blocks["figure4-text"])
    for length, text in (("2", "text-2"), ("6", "promptkd"), ("12", "text-12")):
        for i, init in enumerate(("padding", "random")):
            ours, other = (
                scores_of(full, SMALL, variant, "average") for variant in (text, f"{init}-{length}")
            )
            assert rows[length][i] == interval_cell(ours - other)


def test_variants_say_what_the_prompt_of_the_best_checkpoint_does_to_the_teacher(full, blocks):
    effects = [full[f"{SMALL}/reg0-s{seed}"]["effect"] for seed in miniature.SEEDS]
    rises = [e["references"]["loss p_P"] - e["references"]["loss p"] for e in effects]
    scores = [e["rouge_l"]["teacher"] for e in effects]
    *_, rise, score, best_step = rows_of(blocks["table3"])["L_kd alone"]
    assert rise == f"{np.mean(rises):.3f} ± {np.std(rises, ddof=1):.3f}"
    assert score == f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}"
    assert best_step == "300"
    assert rows_of(blocks["controls"])["GKD"][4:] == ["–", "–", "–", "300"]


def test_controls_are_compared_with_gkd_too(full):
    found = deepcopy(full)
    for seed, hours in zip(miniature.SEEDS, (0.1, 0.2, 0.25, 0.3, 9.0)):
        found[f"{SMALL}/gkd-equal-time-s{seed}"]["hours"] = hours
    rows = rows_of(study.controls_table(found))
    fixed, gkd = (scores_of(full, SMALL, name, "test") for name in ("fixed-tuned", "gkd"))
    assert rows["fixed prompt, tuned before"][0] == interval_cell(fixed - gkd)
    # A fixed prompt is tuned in vain, so its time says nothing.
    assert rows["fixed prompt, tuned before"][2:] == ["–", "–"]
    assert rows["GKD"] == ["–", "–", "6.0", "1.0"]
    # The medians' ratio.
    assert rows["GKD, 3.2 times the steps"][2:] == ["15.0", "2.5"]
    without_gkd = {name: r for name, r in found.items() if "/gkd-s" not in name}
    assert rows_of(study.controls_table(without_gkd))["PromptKD"][2:] == ["6.0", "not run"]


def test_models_table_says_what_the_untuned_prompt_does_to_the_teacher(full, blocks):
    bare = [full[f"{SMALL}/gkd-s{seed}"]["effect"] for seed in miniature.SEEDS]
    scores = [effect["rouge_l"]["teacher"] for effect in bare]
    *losses, score, prompted = rows_of(blocks["models"])["teacher"][1:]
    assert losses == ["0.5000", "0.5020"]
    assert score == f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}"
    assert prompted == "85.0"  # of the first point along training


def test_what_no_seed_changes_has_no_deviation():
    assert results.format_mean(dict.fromkeys(miniature.SEEDS, 2.5)) == "2.5"
    assert results.format_mean({1: 2.5, 2: 2.5}) == "2.5 (n = 2)"
    assert results.format_mean({1: 2.5, 2: 3.5}) == "3.0 ± 0.7 (n = 2)"


def test_differences_of_the_released_code(full, blocks):
    rows = rows_of(blocks["released"])
    for label, pair in study.RELEASED.items():
        a, b = (scores_of(full, SMALL, variant, "combined") for variant in pair)
        assert rows[label][4] == interval_cell(a - b)
    assert {a for a, _ in study.RELEASED.values()} == set(miniature.GROUPS["released"])

    rows = rows_of(blocks["late-init"])
    scores = {name: scores_of(full, SMALL, v, "test") for name, v in study.LATE_INIT.items()}
    for name, values in scores.items():
        assert rows[name][0] == f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"
    assert rows["PromptKD minus GKD"][0] == interval_cell(scores["PromptKD"] - scores["GKD"])

    rows, without_first, effects = rows_of(blocks["released-measures"]), [], []
    for seed in miniature.SEEDS:
        result = full[f"{SMALL}/kd-s{seed}"]
        # Steps 2 to 15: the made-up curve without the first token has the same values plus 1.
        without_first.append(result["exposure"]["ex_acc_err"][14] + 1)
        scores = result["rouge_l"]
        effects.append(scores["banned"]["test"][0] - scores["sampled"]["test"][0])
    assert rows[""][0] == "ExAccErr(15), %"
    expected = f"{np.mean(without_first):.1f} ± {np.std(without_first, ddof=1):.1f}"
    assert rows["KD"][1] == expected
    assert rows["KD"][2] == interval_cell(np.array(effects))


def test_exposure_bias_as_released_is_compared_with_0_and_by_size(full, blocks):
    rows = rows_of(blocks["released-exposure"])
    by_method = {
        method: np.array(
            [full[f"{SMALL}/{method}-s{n}"]["exposure_released"]["ban"][0] for n in miniature.SEEDS]
        )
        for method in ("gkd", "promptkd")
    }
    assert rows["GKD"][2] == interval_cell(by_method["gkd"])
    falls = abs(by_method["gkd"]) - abs(by_method["promptkd"])
    assert rows["fall of the size from GKD to PromptKD"][2] == interval_cell(falls)


def test_exposure_bias_is_compared_at_the_last_step_reliable_for_all(full):
    found = deepcopy(full)
    found[f"{LARGE}/gkd-s3"]["exposure"]["alive_student"][12:] = [59] * 8
    rows = rows_of(study.exposure_table(found))
    assert rows[""][0] == f"{SMALL}: ExAccErr(15), %"
    heads = ["ExAccErr(12), %", "R(12) / 12", "ε(12)"]
    assert rows[""][3:] == [f"{LARGE}: {head}" for head in heads]
    curves = [found[f"{LARGE}/kd-s{seed}"]["exposure"] for seed in miniature.SEEDS]
    values = [
        np.array([curve[name][11] for curve in curves]) for name in ("ex_acc_err", "R", "epsilon")
    ]
    assert rows["KD"][3] == interval_cell(values[0])
    cells = [f"{v.mean():.2f} ± {v.std(ddof=1):.2f}" for v in (values[1] / 12, values[2])]
    assert rows["KD"][4:] == cells


def test_a_sharp_teacher_is_compared_for_both_students(full, blocks):
    rows = rows_of(blocks["sharp"])
    for column, student in ((1, SMALL), (4, LARGE)):
        ours, gkd = (
            scores_of(full, student, variant, "average", "greedy")
            for variant in ("promptkd", "gkd-sharp")
        )
        label = "PromptKD minus temperature 0.5"
        assert rows[label][column] == interval_cell(ours - gkd)


def test_kinds_of_rows_are_compared_apart(full, blocks):
    rows = rows_of(blocks["kinds-small"])
    assert rows["ROUGE-L on test"] == [f"{kind} (9 rows)" for kind in measure.KINDS]
    ours, gkd = (
        np.array([full[f"{SMALL}/{m}-s{s}"]["kinds"][kind]["scores"][0] for s in miniature.SEEDS])
        for kind in measure.KINDS[2:]
        for m in ("promptkd", "gkd")
    )
    assert rows["GKD"][2] == f"{gkd.mean():.1f} ± {gkd.std(ddof=1):.1f}"
    assert rows["PromptKD minus GKD"][2] == interval_cell(ours - gkd)
    assert "GKD, teacher at temperature 0.5" in rows


def test_friendliness_is_before_and_after_training(full, blocks):
    rows = rows_of(blocks["friendliness-large"])
    runs = [full[f"{LARGE}/promptkd-s{seed}"]["along"] for seed in miniature.SEEDS]
    last = [run[-1]["effect"]["student's responses"] for run in runs]
    values = np.array([means["kl p_P q"] for means in last])
    cell = f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
    assert rows["KL(p_P ‖ q)"][3] == cell
    closer = values - np.array([means["kl p q"] for means in last])
    assert rows["KL(p_P ‖ q) - KL(p ‖ q)"][3] == interval_cell(closer, 3)
    first = np.array([run[0]["effect"]["references"]["loss p"] for run in runs])
    assert rows["loss of p"][0] == f"{first.mean():.3f} ± {first.std(ddof=1):.3f}"
    own = np.array([means["kl q p_P"] for means in last])
    assert rows["KL(q ‖ p_P)"][3] == f"{own.mean():.3f} ± {own.std(ddof=1):.3f}"


def test_friendliness_for_others_is_of_the_students_that_were_not_trained_with_the_prompt(
    full, blocks
):
    rows = rows_of(blocks["friendliness-others-small"])
    assert rows[""][0] == "init, first references"
    assert rows[""][3] == "GKD, student's responses"
    runs = [full[f"{SMALL}/promptkd-s{seed}"]["effect_on"] for seed in miniature.SEEDS]
    for column, other, on in ((0, "init", "references"), (3, "gkd", "student's responses")):
        bare, prompted = (
            np.array([run[other][on][name] for run in runs]) for name in ("kl p q", "kl p_P q")
        )
        cell = f"{prompted.mean():.3f} ± {prompted.std(ddof=1):.3f}"
        assert rows["KL(p_P ‖ q)"][column] == cell
        assert rows["KL(p_P ‖ q) - KL(p ‖ q)"][column] == interval_cell(prompted - bare, 3)


def test_orders_of_lists_are_shares_of_the_right_ones(full):
    found = deepcopy(full)
    for seed in miniature.SEEDS:
        counts = {"alphabet": 10 + seed, "text": 10 - seed, "other": 5, "wrong": 75}
        found[f"{SMALL}/promptkd-s{seed}"]["effect"]["lists"]["teacher"] = counts
        none_right = {"alphabet": 0, "text": 0, "other": 0, "wrong": 9}
        found[f"{SMALL}/sft-s{seed}"]["effect"]["lists"]["student"] = none_right
    rows = rows_of(study.lists_table(found, SMALL))
    # Of 25 right ones, 10 + seed are by the alphabet: 52 % in the mean.
    expected = ["52.0 ± 6.3", "28.0 ± 6.3", "20.0", "75.0"]
    assert rows["teacher with the tuned prompt"][:4] == expected
    assert rows["SFT, the student"] == ["–", "–", "–", "100.0", "70.0"]


def test_costs_are_medians_and_hours_are_of_all_results(full, blocks):
    rows = rows_of(blocks["table2"])
    seconds = [full[f"{SMALL}/kd-s{seed}"]["seconds_per_step"] for seed in miniature.SEEDS]
    assert rows["KD"] == [f"{statistics.median(seconds):.3f}", "6.0", "0.70"]
    # Each took 400 s, of which 360 s were training; those of the inits come on top.
    inits = [name for name in full if "/init-s" in name or "/late-init-s" in name]
    assert len(inits) == 15
    hours = (400 * len(full) + 360 * len(inits)) / 3600
    start = f"{len(full)} of {len(full)} results are there. They took {hours:.1f} core-hours"
    assert blocks["cost"].startswith(start)
    fewer = {name: r for name, r in full.items() if not re.search(r"/gkd-s\d", name)}
    assert study.total_cost(fewer).startswith(f"{len(full) - 10} of {len(full)} results")


# ---- pages and plots -----------------------------------------------------------------------------

PAGE = """Before <!-- study: one -->
old
lines
<!-- end -->
between
<!-- study: two -->
<!-- end -->
after
"""


def test_blocks_are_replaced_and_the_text_around_them_stays():
    filled = study.fill_blocks(PAGE, {"one": "| 1 |", "two": "| 2 |"})
    expected = PAGE.replace("old\nlines\n", "| 1 |\n").replace("two -->\n", "two -->\n| 2 |\n")
    assert filled == expected
    assert study.fill_blocks(filled, {"one": "| 1 |", "two": "| 2 |"}) == filled


def test_a_block_with_a_wrong_name_or_without_an_end_is_refused():
    assert "no block 'two'" in error_of(study.fill_blocks, PAGE, {"one": ""})
    blocks = {"one": "", "two": ""}
    open_end = PAGE.replace("<!-- end -->\nafter", "after")
    assert "no `<!-- end -->`" in error_of(study.fill_blocks, open_end, blocks)
    open_start = PAGE.replace("<!-- end -->\nbetween", "between")
    assert "no `<!-- end -->`" in error_of(study.fill_blocks, open_start, blocks)


def test_pages_have_the_numbers_of_the_results():
    """A table that is older than docs/results fails here: `python -m tests.study.report`."""
    if not miniature.RESULTS.is_dir():
        pytest.skip("there are no results")
    blocks = study.make_blocks(results.load_results())
    for page in study.PAGES:
        text = page.read_text(encoding="utf-8")
        assert study.fill_blocks(text, blocks) == text, page.name


def test_the_miniatures_page_has_every_block_but_those_of_the_readme():
    names = re.findall("<!-- study: (.*) -->", (study.DOCS / "miniature.md").read_text())
    assert sorted(names) == sorted(set(study.make_blocks({})) - {"demo-table", "picture"})


@pytest.mark.slow
def test_plots_are_drawn_from_all_results(full, tmp_path):
    for name, plot in plots.PLOTS.items():
        assert plot.has_data(full) and not plot.has_data({})
        assert plot.draw(full, tmp_path / name) == tmp_path / name / plot.file
        assert (tmp_path / name / plot.file).read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_one_seed_has_no_bands_and_no_curve_where_it_would_begin_at_an_unknown_row(
    full, tmp_path
):
    one = {name: result for name, result in full.items() if name.endswith("-s1")}
    without_inits = {name: r for name, r in one.items() if "/init-s" not in name}
    for found in (one, without_inits):
        assert plots.PLOTS["picture"].draw(found, tmp_path).is_file()


def test_a_page_never_links_a_plot_that_could_not_be_drawn(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- study: picture -->\nnot run\n<!-- end -->\n")

    def fail(figure, results):
        raise ValueError("no curve")

    plot = replace(plots.PLOTS["picture"], drawing=fail, has_data=lambda results: True)
    monkeypatch.setattr(plots, "PLOTS", {"picture": plot})
    monkeypatch.setattr(study, "PAGES", (page,))
    monkeypatch.setattr(study, "DOCS", tmp_path)
    assert "miniature.png: no plot (ValueError: no curve)" in error_of(study.main, [])
    assert "not run" in page.read_text()


# ---- the patches of the released code ------------------------------------------------------------

TWENTY = make_examples((3, 1, 9, 4, 2, 7, 5, 12, 1, 1, 2, 1, 3, 2, 1, 2, 11, 6, 8, 10))
GROUPS_OF_8 = (TWENTY[:8], TWENTY[8:16], TWENTY[16:])
N_TOKENS = sum(len(e.response) for e in TWENTY)


def of_rows():
    """The micro-batches of the patches, and nothing else."""
    return patch.object(train, "micro_batches", released.micro_batches_of_rows)


def step_under(context, run, examples):
    """One step of PromptKD on the examples' own responses, in a context. Returns its metrics and
    the gradients of the updates, by name."""
    gradients = {}

    def recording_step(optimizer):
        if optimizer is run.prompt_optimizer:
            gradients["P"] = run.P.grad.clone()
        else:
            gradients.update((n, w.grad.clone()) for n, w in run.student.named_parameters())
        return clip_and_step(optimizer)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "rollout", lambda run, examples, t: examples)
        monkeypatch.setattr(train, "clip_and_step", recording_step)
        with context():
            metrics = train.promptkd_step(run, examples, 0)
    return {name: float(value) for name, value in metrics.items()}, gradients


def response_logits(model, example, P=None):
    """The logits (N, V) of the example's response tokens."""
    ids = torch.tensor([example.request + example.response])
    prompt_length = 0 if P is None else len(P)
    hidden = model(ids if P is None else prepend(P, model, ids))
    return model.logits(hidden)[0, prompt_length + len(example.request) - 1 : -1]


def direct_prompt_gradient(run, terms):
    """The gradient of L_P before the first step, where λ = 1, row by row. terms: (example, weight
    of each of its tokens). Returns L_P too."""
    P = run.P.detach().clone().requires_grad_()
    loss = 0.0
    for e, weight in terms:
        p_prompted = response_logits(run.teacher, e, P)
        with torch.no_grad():
            q, p = response_logits(run.student.eval(), e), response_logits(run.teacher, e)
        loss = loss + weight * (kl(p_prompted, q) + kl(p_prompted, p)).sum()
    loss.backward()
    return P.grad, loss.item()


def direct_student_gradients(run, terms):
    """The gradients of the student's loss, row by row, and the loss itself. terms: (example,
    prompt, weight of each of its tokens)."""
    student, loss = deepcopy(run.student), 0.0
    for e, P, weight in terms:
        p = response_logits(run.teacher, e, P).detach()
        loss = loss + weight * kl(response_logits(student, e), p).sum()
    loss.backward()
    return {name: w.grad for name, w in student.named_parameters()}, loss.item()


def check_student(gradients, expected):
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=0, atol=1e-10), name


@pytest.mark.parametrize("name", ["stale-prompt", "micro-batch-means"])
def test_with_a_single_micro_batch_a_patch_changes_no_bit(name):
    results_of = []
    for context in (of_rows, released.PATCHES[name]):
        run = make_run(torch.float32)
        results_of.append((*step_under(context, run, TWENTY[:8]), run.P.detach()))
    (metrics, gradients, P), (patched_metrics, patched_gradients, patched_P) = results_of
    assert patched_metrics == metrics
    assert torch.equal(patched_P, P)
    assert set(patched_gradients) == set(gradients)
    for key in gradients:
        assert torch.equal(patched_gradients[key], gradients[key]), key


def test_stale_prompt_is_that_of_the_step_before_for_all_micro_batches_but_the_last(in_float64):
    run, before = make_run(), make_run()
    metrics, gradients = step_under(released.stale_prompt, run, TWENTY)
    P_gradient, _ = direct_prompt_gradient(before, [(e, 1 / N_TOKENS) for e in TWENTY])
    assert torch.allclose(gradients["P"], P_gradient, rtol=0, atol=1e-10)
    stale = [(e, before.P, 1 / N_TOKENS) for e in TWENTY[:16]]
    fresh = [(e, run.P, 1 / N_TOKENS) for e in TWENTY[16:]]
    expected, loss = direct_student_gradients(before, stale + fresh)
    check_student(gradients, expected)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    # The prompt has moved so far that the fresh one would be noticed.
    unlike, _ = direct_student_gradients(before, [(e, run.P, 1 / N_TOKENS) for e in TWENTY])
    name = "wte.weight"
    assert (unlike[name] - expected[name]).abs().max() > 1e-6


def test_micro_batch_means_are_averaged_over_micro_batches(in_float64):
    run, before = make_run(), make_run()
    metrics, gradients = step_under(released.micro_batch_means, run, TWENTY)
    weights = [1 / sum(len(e.response) for e in group) / 3 for group in GROUPS_OF_8]
    terms = [(e, weight) for group, weight in zip(GROUPS_OF_8, weights) for e in group]
    P_gradient, prompt_loss = direct_prompt_gradient(before, terms)
    assert torch.allclose(gradients["P"], P_gradient, rtol=0, atol=1e-10)
    expected, loss = direct_student_gradients(before, [(e, run.P, weight) for e, weight in terms])
    check_student(gradients, expected)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["prompt_loss"] == pytest.approx(prompt_loss, rel=1e-6)
    assert len(set(weights)) == 3


def test_teacher_dropout_is_on_in_the_pass_that_gives_the_prompt_its_gradient_only(in_float64):
    run, before = make_run(micro_batch_tokens=10_000), make_run()
    torch.manual_seed(7)
    _, gradients = step_under(released.teacher_dropout, run, TWENTY)

    # The same batch and the same random numbers, in a teacher made with dropout.
    [batch] = micro_batches(TWENTY, 10_000, CPU, len(before.P))
    teacher = make_run(teacher_dropout=0.1).teacher.train()
    P = before.P.detach().clone().requires_grad_()
    torch.manual_seed(7)
    p_prompted = head_logits(*response_hidden(teacher, batch, P))
    with torch.no_grad():
        q, p = (
            head_logits(*response_hidden(model, batch))
            for model in (before.student.eval(), before.teacher)
        )
    (kl(p_prompted, q) + kl(p_prompted, p)).sum().div(N_TOKENS).backward()
    assert torch.allclose(gradients["P"], P.grad, rtol=0, atol=1e-10)
    without, _ = direct_prompt_gradient(before, [(e, 1 / N_TOKENS) for e in TWENTY])
    assert (without - P.grad).abs().max() > 1e-4

    # The student's teacher has none.
    terms = [(e, run.P, 1 / N_TOKENS) for e in TWENTY]
    check_student(gradients, direct_student_gradients(before, terms)[0])
    assert not run.teacher.training


def test_patches_end_with_their_context():
    names = ["micro_batches", "clip_and_step", "split_global_batch", "response_hidden"]
    names.append("sum_over_tokens")
    before = [getattr(train, name) for name in names]
    for context in released.PATCHES.values():
        with context():
            assert [getattr(train, name) for name in names] != before
        assert [getattr(train, name) for name in names] == before


# ---- the runner, with two steps per run ----------------------------------------------------------

TOKENIZER = load_tokenizer(TOKENIZER_DIR)
WIDTHS = {miniature.TEACHER: 24, SMALL: 16}  # of models with one layer, under the real names


def write_world(directory):
    rng, used = random.Random(1), set()
    write_rows(directory / "train.jsonl", make_rows(rng, 40, used))
    for name in ("dev", *(f"{name}/test" for name in DEMO_SETS[1:])):
        write_rows(directory / f"{name}.jsonl", make_rows(rng, 5, used, people=3))
    write_rows(directory / "test.jsonl", make_rows(rng, 12, used, people=3))  # of all kinds
    (directory / "version.txt").write_text(demo.VERSION)


# All of Table 1, and one of each kind: other settings, another init, a tuned prompt, a patch.
TRAINED = {*miniature.GROUPS["table1"], "reg0", "late-init", "fixed-tuned"}
TRAINED |= {"stale-prompt"}
LENGTHS = ("steps", "epochs", "eval_interval")


def in_two_steps(variant):
    """A Variant whose changes don't say how long it is trained."""
    changes = tuple(change for change in variant.changes if change[0] not in LENGTHS)
    return replace(variant, changes=changes, students=(SMALL,))


@contextlib.contextmanager
def small_study(directory):
    """In this context the study has one small student and two steps per run."""
    two_steps = {"steps": 2, "warmup_steps": 0, "max_new_tokens": 6}
    presets = {name: values | two_steps for name, values in miniature.DEMO.items()}
    from_init = {"steps": 2, "eval_interval": 1}
    groups = {
        group: {name: in_two_steps(v) for name, v in variants.items() if name in TRAINED}
        for group, variants in miniature.GROUPS.items()
    }
    values = {
        "RESULTS": directory / "results",
        "OUT": directory / "out",
        "MODELS_DIR": directory / "models",
        "STUDENTS": (SMALL,),
        "PROMPT_WIDTH": WIDTHS[miniature.TEACHER],
        "SEEDS": (1,),
        "DEMO": presets,
        "INIT_BUDGET": from_init,
        "BUDGET": {name: from_init if name in plots.INIT_METHODS else {} for name in GRID},
        "GRID": {name: rates[-2:] for name, rates in GRID.items()},
        "GROUPS": groups,
        "VARIANTS": {name: v for variants in groups.values() for name, v in variants.items()},
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in values.items():
            monkeypatch.setattr(miniature, name, value)
        monkeypatch.setattr(measure, "MAX_NEW_TOKENS", 6)
        monkeypatch.setattr(measure, "SAMPLING_SEEDS", (10, 20))
        monkeypatch.setattr(measure, "SAMPLING", measure.SAMPLING | {"max_new_tokens": 6})
        monkeypatch.setattr(data.sets.prepare, "DATA_DIR", directory / "data")
        monkeypatch.setattr(report, "plot_curves", lambda directory: "no plot")
        yield monkeypatch


@pytest.fixture(scope="module")
def computed_study(tmp_path_factory):
    """All that `miniature.main` computes, in this process: the directory, the calls of its
    functions by name, and those of a second time."""
    directory, calls = tmp_path_factory.mktemp("study"), []
    write_world(directory / "data" / "demo")
    for name, width in WIDTHS.items():
        sizes = {"n_layer": 1, "n_embd": width, "n_head": 2, "n_positions": 512}
        config = Config(vocab_size=TOKENIZER.n_vocab, **sizes)
        write_checkpoint(directory / "models" / name, config, TOKENIZER)

    def call_here(functions, jobs):
        for name, function, *args in functions:
            calls.append((function.__name__, name))
            function(*args)

    with small_study(directory) as monkeypatch:
        monkeypatch.setattr(miniature, "call_all", call_here)
        with contextlib.redirect_stdout(open(directory / "log", "w")):
            miniature.main([])
            first = calls.copy()
            calls.clear()
            miniature.main([])
    return SimpleNamespace(directory=directory, first=first, second=calls)


@pytest.fixture
def tiny_study(computed_study):
    with small_study(computed_study.directory):
        yield computed_study


def numbers(values):
    """All numbers in a JSON, at any depth."""
    if isinstance(values, dict | list):
        children = values.values() if isinstance(values, dict) else values
        return [number for child in children for number in numbers(child)]
    return [values] if isinstance(values, int | float) else []


def grid_results(found):
    return [result for name, result in found.items() if "/grid/" in name]


def test_every_experiment_has_a_result_of_finite_numbers(tiny_study):
    found = results.load_results(tiny_study.directory / "results")
    expected = {f"{SMALL}/{name}-s1" for name in TRAINED} | {f"{miniature.TEACHER}/teacher-s10"}
    assert expected == {name for name in found if "/grid/" not in name}
    # Two rates each, and one beyond the better. The prompt's grid of three shares one of them.
    rates = [(r["settings"]["lr"], r["settings"]["prompt_lr"]) for r in grid_results(found)]
    assert len([rate for _, rate in rates if rate in (None, PROMPT_GRID[1])]) == 3 * len(GRID)
    assert {PROMPT_GRID[0], PROMPT_GRID[2]} <= {rate for _, rate in rates}
    for name, result in found.items():
        assert len(numbers(result)) > 10
        assert all(map(math.isfinite, numbers(result))), name
        assert result["steps"] == 2 and result["seconds_per_step"] > 0
        assert result["validation"]["step"][-1] == 2


def test_a_second_time_nothing_is_computed(tiny_study):
    computed = [name for function, name in tiny_study.first if function == "compute"]
    n_grid = len(list((tiny_study.directory / "results").glob("**/grid/*.json")))
    assert len(computed) == len(set(computed)) == len(TRAINED) + n_grid
    assert tiny_study.second == []


def test_results_say_nothing_of_the_machine(tiny_study):
    for path in (tiny_study.directory / "results").glob("**/*.json"):
        assert str(tiny_study.directory) not in path.read_text(), path


def tiny_result(tiny_study, variant):
    return read_json(tiny_study.directory / "results" / SMALL / f"{variant}-s1.json", "")


def test_checkpoints_along_training_are_measured(tiny_study):
    for variant, pairs in (("gkd", 2), ("promptkd", 5)):
        along = tiny_result(tiny_study, variant)["along"]
        assert [point["step"] for point in along] == [0, 1, 2]
        assert ["exposure" in point for point in along] == [False, True, True]
        means = along[0]["effect"]["references"]
        assert sum(name.startswith("kl") for name in means) == pairs
    assert "along" not in tiny_result(tiny_study, "reg0")


def test_the_tuned_prompt_is_measured_on_students_that_were_not_trained_with_it(tiny_study):
    ours, gkd = (tiny_result(tiny_study, name) for name in ("promptkd", "gkd"))
    assert set(ours["effect_on"]) == {"init", "gkd"}
    students = {"init": gkd["along"][0]["effect"], "gkd": gkd["effect"]}
    for other, effect in ours["effect_on"].items():
        # The prompt is that of PromptKD's best checkpoint, the student is the other.
        assert effect["references"]["loss p_P"] == ours["effect"]["references"]["loss p_P"]
        for name in ("loss q", "kl p q"):
            assert effect["references"][name] == students[other]["references"][name]
        assert effect["rouge_l"]["student"] == students[other]["rouge_l"]["student"]
    losses = {effect["references"]["loss q"] for effect in students.values()}
    assert len(losses | {ours["effect"]["references"]["loss q"]}) == 3


def test_a_tuned_prompt_that_is_fixed_stays_that_of_promptkd(tiny_study):
    fixed, tuned = (tiny_result(tiny_study, name) for name in ("fixed-tuned", "promptkd"))
    assert len(set(fixed["validation"]["prompted_loss"])) == 1
    assert len(set(tuned["validation"]["prompted_loss"])) == 3
    best = [
        tiny_study.directory / "out" / f"{SMALL}-{n}-s1/best" for n in ("promptkd", "fixed-tuned")
    ]
    assert torch.equal(*(load_prompt(path, WIDTHS[miniature.TEACHER]) for path in best))


@pytest.mark.parametrize("name, variant", VARIANTS.items(), ids=VARIANTS)
def test_variants_are_trained_with_their_settings_init_and_patches(name, variant, monkeypatch):
    trained, active = [], []

    def record(run_name, settings, *args, **kwargs):
        trained.append((run_name, settings, list(active)))
        return run_name

    @contextlib.contextmanager
    def patched(patch_name):
        active.append(patch_name)
        yield
        active.pop()

    monkeypatch.setattr(train, "run_stage", record)
    monkeypatch.setattr(miniature, "train_teacher", lambda: "teacher")
    monkeypatch.setattr(miniature, "teacher_responses", lambda: "responses")
    monkeypatch.setattr(miniature, "load_prompt", lambda path, width: torch.ones(1))
    monkeypatch.setattr(miniature, "learning_rates", lambda e: {"lr": 0.5, "prompt_lr": 0.25})
    patches = {patch_name: partial(patched, patch_name) for patch_name in miniature.PATCHES}
    monkeypatch.setattr(miniature, "PATCHES", patches)
    monkeypatch.setattr(miniature, "sharp_teacher", lambda t: patched(f"temperature {t}"))
    best = Experiment(SMALL, "gkd-tuned", GRID_SEED, 0.5, temperature=0.7)
    monkeypatch.setattr(miniature, "temperature_grid_experiments", lambda s: ([], [], best))
    miniature.train_student(Experiment(SMALL, name, 3))
    run_name, settings, patches = trained[-1]
    assert run_name == f"{SMALL}-{name}-s3"
    assert settings.seed == 3
    rates = {"lr": 0.5, "prompt_lr": 0.25} | dict(variant.changes)
    assert {field: getattr(settings, field) for field in rates} == rates
    expected = [variant.patch] if variant.patch else []
    assert patches == (["temperature 0.7"] if variant.has_tuned_temperature else expected)
    runs = [run_name for run_name, _, _ in trained]
    if variant.method in plots.INIT_METHODS:
        assert settings.student == f"{SMALL}-{variant.init}-s3" == runs[0]
    else:
        assert settings.student.endswith(SMALL)
    assert (f"{SMALL}-promptkd-s3" in runs[:-1]) == variant.has_tuned_prompt


def test_a_sharp_teacher_is_the_teacher_at_half_the_temperature():
    q, p = torch.randn(2, 5, 7, dtype=torch.float64)  # (N, V)
    with miniature.sharp_teacher():
        sharp = losses.student_loss(q, p)
    assert torch.allclose(sharp, kl(q, 2 * p))
    assert torch.allclose(losses.student_loss(q, p), kl(q, p))


def test_the_losses_of_the_prompt_have_the_sharper_teacher_with_and_without_prompt():
    p_prompted, q, p = torch.randn(3, 5, 7, dtype=torch.float64)  # (N, V)
    with miniature.sharp_teacher(0.25):
        sharp = losses.prompt_loss(p_prompted, q, p, 0.5)
    assert torch.allclose(sharp, losses.prompt_loss(4 * p_prompted, q, 4 * p, 0.5))


def test_gkds_temperature_is_tuned_after_its_rate(monkeypatch):
    found = {}
    grid = partial(miniature.temperature_grid_experiments, SMALL, score=lambda e: found.get(e.name))
    rates, temperatures, best = grid()
    assert [e.lr for e in rates] == list(GRID["gkd"])
    assert {e.temperature for e in rates} == {0.5} and (temperatures, best) == ([], None)
    found |= {e.name: score for e, score in zip(rates, (60, 62, 61, 50))}
    _, temperatures, best = grid()
    assert [(e.lr, e.temperature) for e in temperatures] == [(2e-3, t) for t in (0.3, 0.5, 0.7)]
    assert temperatures[1] == rates[1] and best is None
    found |= {temperatures[0].name: 63, temperatures[2].name: 61}
    assert grid()[2] == temperatures[0]
    monkeypatch.setattr(miniature, "temperature_grid_experiments", lambda s: grid())
    assert miniature.teacher_temperature(rates[0]) == 0.5
    assert miniature.teacher_temperature(Experiment(SMALL, "promptkd-tuned", 1)) == 0.3
    assert miniature.teacher_temperature(Experiment(SMALL, "promptkd", 1)) is None
    assert miniature.learning_rates(Experiment(SMALL, "gkd-tuned", 1))["lr"] == 2e-3


def test_a_choice_of_the_sharp_teacher_and_gkds_rate_has_the_runs_of_that_control(full):
    found = {name: r for name, r in full.items() if "gkd-tuned" not in name}
    gkd = study.grid_experiments(LARGE, "gkd", partial(study.grid_score, full))[1]
    for temperature, rouge_l in ((0.3, 60), (0.5, 70), (0.7, 60)):
        for lr in GRID["gkd"]:
            e = Experiment(LARGE, "gkd-tuned", GRID_SEED, lr, temperature=temperature)
            found[e.name] = {"validation": {"rouge_l": [rouge_l + (lr == gkd.lr)]}}
    scores = [scores_of(full, LARGE, v, "average") for v in ("promptkd", "gkd-sharp")]
    rows = rows_of(study.tuned_temperature_table(found))
    cells = rows["PromptKD minus GKD, temperature tuned"]
    assert cells[3] == interval_cell(scores[0] - scores[1]) and cells[0] == "not run"
    names = {experiment.name for experiment in study.all_experiments(found)}
    assert f"{SMALL}/gkd-tuned-s1" in names and f"{LARGE}/gkd-tuned-s1" not in names


def test_gkd_with_a_tuned_temperature_is_compared_for_both_students(full, blocks):
    rows = rows_of(blocks["tuned-temperature"])
    label = "PromptKD minus GKD, temperature tuned"
    for column, student in ((1, SMALL), (4, LARGE)):
        best_control = study.control_instead(
            Experiment(student, "gkd-tuned", 1), partial(study.grid_score, full)
        )
        gkd = "gkd-sharp" if best_control else "gkd-tuned"
        scores = [scores_of(full, student, v, "average", "greedy") for v in ("promptkd", gkd)]
        assert rows[label][column] == interval_cell(scores[0] - scores[1])
        chosen = rows_of(blocks["temperature-grid"])[student][2]
        *_, best = miniature.temperature_grid_experiments(student, partial(study.grid_score, full))
        assert chosen == f"{best.lr:g}, {best.temperature:g}"


def test_runs_with_the_same_seed_share_their_init_and_the_chosen_rates(tiny_study):
    gkd, ours = (tiny_result(tiny_study, name)["settings"] for name in ("gkd", "promptkd"))
    assert gkd["student"] == ours["student"] and gkd["seed"] == ours["seed"] == 1
    rates = miniature.learning_rates(Experiment(SMALL, "promptkd", 1))
    assert {name: ours[name] for name in rates} == rates
    assert rates["lr"] in GRID["promptkd"][-2:] and rates["prompt_lr"] in PROMPT_GRID


def test_report_takes_what_the_runner_gives(tiny_study, tmp_path):
    found = results.load_results(tiny_study.directory / "results")
    blocks = study.make_blocks(found)
    rows = rows_of(blocks["table1-small"])
    score = score_of(found[f"{SMALL}/kd-s1"], "average")
    assert rows["KD"][-1] == f"{score:.1f} (n = 1)"
    for name in ("table2", "table3", "exposure"):
        small_only = [line for line in blocks[name].splitlines() if LARGE not in blocks[name]]
        assert [line for line in small_only if "not run" in line] == [], name
    for name, plot in plots.PLOTS.items():
        if LARGE not in plot.alt:
            assert plot.draw(found, tmp_path).is_file(), name


# ---- what is measured ----------------------------------------------------------------------------


def test_means_over_tokens_are_those_of_the_definitions(in_float64):
    run = make_run()
    p, q, P = run.teacher, run.student.eval(), run.P.detach()
    means = measure.means_over_tokens(p, q, P, TWENTY)
    sums = dict.fromkeys(means, 0.0)
    for e in TWENTY:
        logs = {"p": (p, None), "q": (q, None), "p_P": (p, P)}
        with torch.no_grad():
            logs = {
                n: response_logits(m, e, prompt).log_softmax(-1) for n, (m, prompt) in logs.items()
            }
        for name in means:
            kind, a, *b = name.split()
            if kind == "kl":
                sums[name] += (logs[a].exp() * (logs[a] - logs[b[0]])).sum().item()
            else:
                sums[name] -= logs[a][range(len(e.response)), e.response].sum().item()
    assert set(means) == {"kl p q", "kl q p", "kl p_P q", "kl q p_P", "kl p_P p"} | {
        "loss p",
        "loss q",
        "loss p_P",
    }
    for name, value in means.items():
        assert value == pytest.approx(sums[name] / N_TOKENS, rel=1e-6), name
    bare = measure.means_over_tokens(p, q, None, TWENTY)
    assert bare == {name: pytest.approx(means[name], rel=1e-9) for name in means if "P" not in name}


def orders_of(*responses, text="cow bear cat", references):
    """What `measure.count_orders` counts in responses to one row."""
    references = list(references)
    row = SimpleNamespace(instruction="Sort.", input=text, references=references)
    tokens = [TOKENIZER.encode_ordinary(response) for response in responses]
    examples = [Example(i, [], [*y, TOKENIZER.eot_token]) for i, y in enumerate(tokens)]
    return measure.count_orders(examples, [row] * len(examples), TOKENIZER)


def test_lists_are_counted_by_their_order():
    references = ("cow bear cat", "bear cat cow", "cat bear cow")
    orders = ("bear cat cow", "cow bear cat", "cat cow bear", "cow bear", "cow cow bear cat", "hat")
    counts = {"alphabet": 1, "text": 1, "other": 1, "wrong": 3}
    assert orders_of(*orders, references=references) == counts
    nothing = dict.fromkeys(counts, 0)
    # A text in alphabetical order says nothing, even of wrong lists. Nor do rows with a choice of
    # words, without one of orders, or with other words than those of lists.
    in_order = ("bear cat cow", "cow bear cat", "cat bear cow")
    assert orders_of("bear cat cow", "hat", text="bear cat cow", references=in_order) == nothing
    assert orders_of("bear cat", references=("cow bear", "bear cat", "cow cat")) == nothing
    assert orders_of("bear cat cow", references=references[:2]) == nothing
    assert orders_of("the cow", text="the cow", references=("the cow", "cow the", "cow")) == nothing


def test_rows_are_of_a_kind_by_what_their_references_leave_open():
    def kind(*references, text="cow bear cat", instruction="Sort."):
        row = SimpleNamespace(instruction=instruction, input=text, references=list(references))
        return measure.kind_of(row)

    assert kind("bear cat cow") == kind("cow", "cow") == "one answer"
    assert kind("bear cat", "cat bear") == "a list in any order"
    assert kind("in on", "on in", text="", instruction="Sort: on in") == "another choice"
    assert kind("bear cat", "cat bear", text="", instruction="Sort: cat bear") == (
        "a list in any order"
    )
    assert kind("bear cat", "bear cow") == kind("hat cat", "cat hat") == "another choice"


def test_rouge_l_by_kind_is_that_of_table_1(tiny_study):
    for name in (f"{SMALL}/kd-s1", f"{SMALL}/promptkd-s1", f"{miniature.TEACHER}/teacher-s10"):
        result = read_json(tiny_study.directory / "results" / f"{name}.json", "")
        kinds, expected = result["kinds"].values(), result["rouge_l"]["sampled"]["test"]
        assert sum(kind["rows"] for kind in kinds) == 12
        for i, score in enumerate(expected):
            mean = sum(kind["rows"] * kind["scores"][i] for kind in kinds) / 12
            assert mean == pytest.approx(score, abs=1e-2)


def test_rouge_l_on_dev_is_that_of_the_responses_of_teacher_and_student(tiny_study, monkeypatch):
    def respond(model, tokenizer, rows, role, P=None):
        texts = [row.references[0] if role == "teacher" else "zebra" for row in rows]
        pairs = [(encode_request(row, tokenizer)[0], text) for row, text in zip(rows, texts)]
        return [Example(0, x, [*tokenizer.encode(y), tokenizer.eot_token]) for x, y in pairs]

    monkeypatch.setattr(measure, "sample_rows", respond)
    models = tiny_study.directory / "models"
    p, tokenizer = load_model(str(models / miniature.TEACHER), CPU)
    effect = measure.prompt_effect(p, tokenizer, str(models / SMALL))
    assert effect["rouge_l"] == {"teacher": 100, "student": 0}


def test_a_response_that_has_ended_adds_0_to_the_mean_over_all_requests():
    # Two requests with two responses each: R(2) = (1 + 2 + 3 + 2 + 4) / 4, 2 ε(2) = 8 / 4.
    kl_q, kl_p = [[[1], [2, 4]], [[3], [2]]], [[[1, 1], [1, 1]], [[1, 1], [1, 1, 9]]]
    assert measure.over_all_requests(kl_q, kl_p) == pytest.approx([100, 50])


def test_released_exposure_bias_is_added_to_the_results_of_table_1(tiny_study, monkeypatch):
    bans, sample_all = [], measure.sample_all

    def spy(*args, no_repeat_ngram=0, **kwargs):
        bans.append(no_repeat_ngram)
        return sample_all(*args, no_repeat_ngram=no_repeat_ngram, **kwargs)

    monkeypatch.setattr(measure, "sample_all", spy)
    monkeypatch.setattr(measure.exposure_bias, "sample_all", spy)
    paths = (tiny_study.directory / "results" / SMALL).glob("*.json")
    before = {path: read_json(path, "") for path in paths}
    n_calls = []

    def call_here(functions, jobs):
        for _, function, *args in functions:
            n_calls.append(function(*args))

    monkeypatch.setattr(miniature, "call_all", call_here)
    for _ in range(2):  # nothing is left for the second time
        miniature.add_missing_released_exposure(1)
    assert len(n_calls) == len(miniature.GROUPS["table1"])
    assert bans == [0, 0, 6, 6] * len(n_calls)
    for path, result in before.items():
        after = read_json(path, "")
        added = after.pop("exposure_released", None)
        assert after == result
        assert (added is not None) == (result["variant"] in miniature.GROUPS["table1"])
        if added:
            assert set(added) == {"all requests", "ban", "all three"}
            assert added["all requests"][0] == result["exposure"]["ex_acc_err"][0]  # all are alive


def test_numbers_are_rounded_to_five_digits_at_any_depth():
    values = {"a": [1.234567, (2, 0.000123456)], "b": {"c": "text", "d": None}}
    expected = {"a": [1.2346, [2, 0.00012346]], "b": {"c": "text", "d": None}}
    assert measure.rounded(values) == expected


@pytest.mark.slow
def test_experiments_are_called_in_processes_of_their_own(tmp_path, monkeypatch):
    """`call_all` with a function that spawned processes can import."""
    monkeypatch.setattr(miniature, "OUT", tmp_path)
    paths = [tmp_path / name for name in ("a", "b")]
    miniature.call_all([(path.name, path.mkdir) for path in paths], jobs=2)
    assert all(path.is_dir() for path in paths)
    with pytest.raises(FileExistsError):
        miniature.call_all([("again", paths[0].mkdir)], jobs=1)


# ---- the paper's claims --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "intervals, expected",
    [
        ([(2.0, 1.0), (0.5, 0.4)], "holds"),
        ([(-2.0, 1.0), (-0.5, 0.4)], "does not hold"),
        ([(2.0, 1.0), (0.3, 0.4)], "undecided"),
        ([(2.0, 1.0), (-0.5, 0.4)], "undecided"),
        ([(2.0, 1.0), None], "holds with 1 of 2"),
        ([(2.0, None), None], "not run"),
        ([None, None], "not run"),
    ],
)
def test_verdicts_follow_from_the_intervals(intervals, expected):
    assert study.verdict(intervals, 2) == expected


def test_claims_have_the_differences_and_the_papers_numbers(full, blocks):
    rows = rows_of(blocks["claims"])
    cells = rows["PromptKD is better than GKD: average ROUGE-L"]
    ours, theirs = (scores_of(full, SMALL, m, "average") for m in ("promptkd", "gkd"))
    assert cells[1].strip("*").startswith(f"{(ours - theirs).mean():+.1f} (")
    assert cells[0].startswith("+2.7, +")  # 22.24 and 19.5 in Table 1 of the paper
    l = results.common_step(r["exposure"] for r in results.table1_results(full, LARGE))
    error = [results.measured(full, LARGE, m, results.exposure_at(l)) for m in ("gkd", "promptkd")]
    mean = np.mean([abs(error[0][seed]) - abs(error[1][seed]) for seed in error[0]])
    cells = rows["PromptKD has less exposure bias than GKD: fall of the size of ExAccErr, points"]
    assert cells[2].strip("*").startswith(f"{mean:+.1f} (")


def test_a_negative_exposure_bias_is_not_less_than_none(full):
    """ExAccErr should be near 0: of -30 % and 10 %, the second is the smaller bias."""
    found = deepcopy(full)
    for seed in miniature.SEEDS:
        for variant, error in (("gkd", 10), ("promptkd", -30)):
            for result in (
                found[f"{LARGE}/{variant}-s{seed}"],
                *found[f"{LARGE}/{variant}-s{seed}"]["along"][1:],
            ):
                result["exposure"]["ex_acc_err"] = [error] * 20
    rows = rows_of(study.claims_table(found))
    for claim in (
        "PromptKD has less exposure bias than GKD: fall of the size of ExAccErr, points",
        "and less than GKD after a fifth of the training",
    ):
        assert rows[claim][2].startswith("**-20.0 (")


def test_the_student_is_compared_with_its_teacher(full, blocks):
    cells = rows_of(blocks["claims"])[
        "PromptKD's student is better than its teacher: average ROUGE-L"
    ]
    difference = scores_of(full, SMALL, "promptkd", "average") - score_of(
        full["3x128x4/teacher-s10"], "average"
    )
    assert cells[1] == interval_cell(difference)
    assert cells[0].startswith("-1.1, ")  # 22.24 and 23.34 in Table 1 of the paper
