"""ROUGE-L of responses, of models, and of a file; the table; and the same scores on any number of ranks."""

import json
import math
import re
import socket
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ROOT,
    after_device,
    run_command,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    write_checkpoint,
    write_rows,
)
from safetensors.torch import load_file, save_file

from data.cli import InputError, run_command_line
from data.paper import PAPER_SCORES
from data.report import format_score, format_table, legend, plot_bars, table
from data.rows import fill_template, read_rows
from data.runs import unique_labels
from evaluate import (
    add_averages,
    best_and_ties,
    evaluate,
    evaluate_models,
    main,
    mean_rouge_l,
    open_sets,
    rouge_l,
)
from sample import decode_response, row_uniforms, sample


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Pictures take long: they are drawn in the tests that ask for them alone."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("data.report.pyplot", lambda: None)


@pytest.fixture
def pictures():
    pytest.importorskip("matplotlib")


# ---- ROUGE-L -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response, references, score",
    [
        (
            "the cat sat on the mat",
            ["the cat is on the mat"],
            100 * 5 / 6,
        ),  # 5 words in common, of 6 and 6
        ("a b c d", ["a c"], 100 * 2 / 3),  # precision 1/2, recall 1
        ("a c", ["a b c d"], 100 * 2 / 3),
        ("d c b a", ["a b c d"], 25),  # in common and in order: one word
        ("a x b x c", ["a b c y"], 100 * 2 * 0.6 * 0.75 / 1.35),
        ("the the the", ["the"], 50),
        ("Hello, WORLD!", ["hello world"], 100),
        ("running dogs jumped", ["run dog jump"], 100),  # stems
        ("a b c d", ["x y z", "a c", "b d e f"], 100 * 2 / 3),  # the best of several
        ("a c", ["x", "a c"], 100),
        ("a c", ["a c", "x"], 100),
        ("one two", ["three four"], 0),
        ("", ["three four"], 0),
        ("one", [""], 0),
    ],
)
def test_rouge_l_of_fixed_pairs(response, references, score):
    assert rouge_l([response], [references]) == [pytest.approx(score)]


def common(a, b):
    """The length of the longest common subsequence."""
    if not a or not b:
        return 0
    return common(a[1:], b[1:]) + 1 if a[0] == b[0] else max(common(a[1:], b), common(a, b[1:]))


def test_rouge_l_equals_the_f_measure_of_the_longest_common_subsequence():
    rng = np.random.default_rng(0)
    texts, references, scores = [], [], []
    for _ in range(40):
        text, *several = [
            rng.choice(["a", "b", "c", "d"], size).tolist() for size in rng.integers(1, 8, 3)
        ]
        texts.append(" ".join(text))
        references.append([" ".join(words) for words in several])
        scores.append(
            max(200 * common(text, words) / (len(text) + len(words)) for words in several)
        )
    assert rouge_l(texts, references) == pytest.approx(scores)
    assert mean_rouge_l([{"rouge_l": score} for score in scores]) == pytest.approx(sum(scores) / 40)


@pytest.mark.parametrize("n_responses, n_references", [(1, 2), (2, 1), (0, 1)])
def test_lists_of_unequal_length_are_an_error(n_responses, n_references):
    with pytest.raises(InputError, match=f"{n_responses} responses for {n_references} rows"):
        rouge_l(["a"] * n_responses, [["a"]] * n_references)


# ---- the table ---------------------------------------------------------------------------------------------------------------


def test_a_score_is_a_mean_and_for_several_seeds_a_spread():
    assert format_score([41.26]) == "41.3"
    assert format_score([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert format_score([20.0, 23.0]) == "21.5 ± 2.1"


def test_the_table_has_a_row_a_model_a_column_a_set_and_the_average_over_sets():
    scores = {
        "teacher": {"near": [50.0, 52.0], "far": [20.0, 30.0]},
        "init-of-a-student": {"near": [9.0, 9.0], "far": [1.0, 2.0]},
    }
    assert (
        format_table(table(add_averages(scores))).splitlines()
        == [
            "ROUGE-L                  near         far     average",
            "teacher            51.0 ± 1.4  25.0 ± 7.1  38.0 ± 4.2",  # the averages of the two seeds are 35 and 41
            "init-of-a-student   9.0 ± 0.0   1.5 ± 0.7   5.2 ± 0.4",
        ]
    )
    assert format_table(table(add_averages({"a": {"near": [50.0]}}))).splitlines() == [
        "ROUGE-L  near  average",
        "a        50.0     50.0",
    ]


def test_the_best_of_a_size_and_those_within_the_spread_of_the_difference_lead():
    scores = {
        "a": [10.0, 12.0],
        "b": [8.0, 10.0],
        "c": [8.0, 9.0],
        "d": [30.0, 30.0],
        "alone": [50.0, 51.0],
        "teacher": [60.0, 61.0],
    }
    sizes = {"a": 1, "b": 1, "c": 1, "d": 2, "e": 2, "alone": 3}
    scores |= {"e": [29.9, 29.9]}
    # a and b have 11 and 9, their spreads are √2 each and that of the difference 2: not worse by more. c: 2.5 > √(2 + 1/2) = 1.58.
    assert best_and_ties({label: {"near": s} for label, s in scores.items()}, sizes) == {
        "near": ["a", "b", "d"]
    }
    assert best_and_ties({label: {"near": s[:1]} for label, s in scores.items()}, sizes) == {}


def test_marks_stand_beside_the_numbers_and_the_legend_tells_what_they_mean():
    scores = {
        "a": {"near": [10.0, 12.0], "far": [1.0, 2.0]},
        "longer": {"near": [8.0, 9.0], "far": [1.0, 2.0]},
    }
    figures = {
        "a": {"near": 12.5},
        "longer": {"near": 9.2},
    }  # 1.5 off with a spread of 1.41, and 0.7 with 0.71
    best = {"near": ["a"]}
    assert format_table(table(scores, figures, best)).splitlines() == [
        "ROUGE-L        near                   far",
        "a        11.0 ± 1.4 * (12.5 ≠)  1.5 ± 0.7",
        "longer    8.5 ± 0.7   (9.2)     1.5 ± 0.7",
    ]
    assert format_table(table(scores, figures, best), markdown=True).splitlines() == [
        "| ROUGE-L | near | far |",
        "| :-- | --: | --: |",
        "| a | 11.0 ± 1.4 * (12.5 ≠) | 1.5 ± 0.7 |",
        "| longer | 8.5 ± 0.7   (9.2) | 1.5 ± 0.7 |",
    ]
    assert [line.split(":")[0] for line in legend(scores, figures, best)] == ["*", "in brackets"]
    assert (
        "≠" in legend(scores, figures, best)[1]
        and "≠" not in legend(scores, {"longer": {"near": 9.2}}, best)[1]
    )
    one_seed = {"a": {"near": [10.0]}}
    assert (
        format_table(table(one_seed, {"a": {"near": 12.5}})).splitlines()[1]
        == "a        10.0 (12.5)"
        and legend(one_seed, {}, {}) == []
    )


def test_labels_take_as_many_folders_as_tell_them_apart(tmp_path):
    for name in ["x/run", "y/run", "y/other", "gpt2"]:
        (tmp_path / name).mkdir(parents=True)
    x, y, other, gpt2 = (str(tmp_path / name) for name in ["x/run", "y/run", "y/other", "gpt2"])
    assert unique_labels([x, other]) == ["run", "other"]
    assert unique_labels([x, f"{y}/", other]) == ["x/run", "y/run", "y/other"]
    assert unique_labels(["gpt2", "owner/name"]) == ["gpt2", "owner/name"]
    assert unique_labels(["gpt2", gpt2]) == ["gpt2", f"{tmp_path.name}/gpt2"]
    assert unique_labels([x, x]) == ["run", "run"]


# ---- models ------------------------------------------------------------------------------------------------------------------

WHAT = ["--max-new", 20, "--seeds", 10, 20]


def said(row, set_name, seed, max_new_tokens=20):
    """What the tiny model says to a row, sampled alone."""
    tokenizer = tiny_tokenizer()
    request = tokenizer.encode_ordinary(fill_template(row["instruction"], row.get("input", "")))
    [response], _ = sample(
        tiny_model(talker_config()),
        [request],
        row_uniforms(max_new_tokens, seed, "evaluate", set_name, row["index"])[None],
        tokenizer.eot_token,
        max_new_tokens,
    )
    return decode_response(response, tokenizer)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, and two sets whose references are parts of what it says under seed 10 (else every score would be 0)."""
    home = tmp_path_factory.mktemp("world")
    write_checkpoint(home / "model", talker_config(), tiny_tokenizer())
    for name, size in [("near", 5), ("far", 1)]:
        rows = [
            {"index": n, "instruction": "Write a task." * (n + 1), "input": "describes" * (n % 2)}
            for n in range(size)
        ]
        for row in rows:
            words = said(row, name, 10).split()
            row["output"] = [" ".join(words[: (len(words) + 1) // 2]), "none of it"]
        write_rows(home / name / "test.jsonl", rows)
    return home


def run(world, capsys, *arguments, models=("model",), sets=("near", "far")):
    """The JSON file and the output of the command, whose directory is new each time."""
    out = world / f"out-{len(list(world.glob('out-*')))}"
    main(
        [
            str(a)
            for a in [
                *(world / name for name in models),
                "--data",
                *(world / name for name in sets),
                *arguments,
                "--out",
                out,
            ]
        ]
    )
    return json.loads((out / "table1.json").read_text()), capsys.readouterr().out


def test_evaluate_gives_each_rows_own_text_and_score(world):
    rows, data = (
        read_rows(world / "near" / "test.jsonl"),
        [json.loads(line) for line in open(world / "near" / "test.jsonl")],
    )
    for chosen in [
        rows,
        rows[:0:-2],
    ]:  # rows keep their random numbers, whichever of them are asked for
        results = evaluate(
            tiny_model(talker_config()),
            tiny_tokenizer(),
            chosen,
            (10, "evaluate", "near"),
            max_new_tokens=20,
            batch_size=2,
        )
        assert [result["index"] for result in results] == sorted(row.index for row in chosen)
        for result in results:
            row = data[result["index"]]
            assert result["text"] == said(row, "near", 10) and not result["shortened"]
            assert result["rouge_l"] == rouge_l([result["text"]], [row["output"]])[0]
    assert 20 < mean_rouge_l(results) < 100


def test_the_json_file_has_the_score_of_each_seed_and_the_settings(world, capsys):
    content, _ = run(world, capsys, *WHAT, "--batch", 2)
    assert content.keys() >= {"scores", "settings", "no_repeat_ngram"} and content[
        "scores"
    ].keys() == {"model"}
    for name in ["near", "far"]:
        rows = [json.loads(line) for line in open(world / name / "test.jsonl")]
        means = [
            statistics.fmean(
                rouge_l([said(row, name, seed) for row in rows], [row["output"] for row in rows])
            )
            for seed in (10, 20)
        ]
        assert content["scores"]["model"][name] == pytest.approx(means)
        assert means[0] > means[1] + 5
    assert content["averages"]["model"]["average"] == pytest.approx(
        [sum(pair) / 2 for pair in zip(*content["scores"]["model"].values())]
    )
    assert content["no_repeat_ngram"] == {"near": 0, "far": 0}
    assert content["models"] == {
        "model": {
            "name": str(world / "model"),
            "kind": "",
            "parameters": tiny_model(talker_config()).n_parameters(),
        }
    }
    assert (
        content["settings"]
        | {
            "seeds": [10, 20],
            "max_new_tokens": 20,
            "batch": 2,
            "greedy": False,
            "temperature": 1.0,
            "rows": None,
        }
        == content["settings"]
    )


def test_the_output_is_the_table_with_its_seeds_and_ban_and_lies_in_markdown_too(world, capsys):
    content, out = run(world, capsys, *WHAT)
    text, note, also, _ = out.rsplit("\n", 4)[:4]
    cells = table(add_averages(content["scores"]))
    assert (
        text == format_table(cells)
        and note == "seeds 10 20; repeated n-grams banned: near no, far no"
    )
    page = next(path for path in world.glob("out-*/table1.md") if str(path) in also).read_text()
    assert (
        page
        == "\n\n".join(
            [
                "### Table 1: ROUGE-L, mean ± standard deviation over seeds",
                format_table(cells, markdown=True),
                note,
            ]
        )
        + "\n"
    )


def test_the_same_seeds_give_the_same_scores_and_others_do_not(world, capsys):
    scores = run(world, capsys, *WHAT)[0]["scores"]["model"]
    assert run(world, capsys, *WHAT, "--batch", 1)[0]["scores"]["model"] == scores
    assert (
        run(world, capsys, "--max-new", 20, "--seeds", 20, 30)[0]["scores"]["model"]["near"][0]
        == scores["near"][1]
    )
    assert (
        len(
            {
                run(world, capsys, "--max-new", 20, "--seeds", seed)[0]["scores"]["model"]["near"][
                    0
                ]
                for seed in [10, 11, 12]
            }
        )
        == 3
    )


# What each of two ranks runs: evaluate() itself, and then the command.
RANK = """
import json, sys
from data import dist
from data.cli import run_command_line as command
from data.rows import read_rows
from evaluate import evaluate, main
from data.models import load_model

home, *arguments = sys.argv[1:]
model, tokenizer = load_model(f"{home}/model", dist.init_process()[0])
results = evaluate(model, tokenizer, read_rows(f"{home}/near/test.jsonl"), (10, "evaluate", "near"), max_new_tokens=20)
with open(f"{home}/rank-{dist.rank()}-of-{dist.world_size()}.json", "w") as file:
    json.dump(results, file)
command(lambda: main(arguments))
"""


def test_two_ranks_give_the_results_of_one(world, capsys):
    scores = run(world, capsys, *WHAT)[0][
        "scores"
    ]  # 5 rows are shared out unequally, and of the other set one rank has none
    rows = read_rows(world / "near" / "test.jsonl")
    results = evaluate(
        tiny_model(talker_config()),
        tiny_tokenizer(),
        rows,
        (10, "evaluate", "near"),
        max_new_tokens=20,
    )
    (world / "rank.py").write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launcher = [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master_port={free.getsockname()[1]}",
        ]
    arguments = [
        world / "model",
        "--data",
        world / "near",
        world / "far",
        *WHAT,
        "--out",
        world / "two",
    ]
    done = run_command(*launcher, world / "rank.py", world, *arguments, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert json.loads((world / f"rank-{rank}-of-2.json").read_text()) == results
    assert json.loads((world / "two" / "table1.json").read_text())["scores"] == scores
    assert (
        done.stdout.count("ROUGE-L") == 1
        and format_table(table(add_averages(scores))) in done.stdout
    )


def test_a_set_draws_the_same_beside_another_of_its_name(world, capsys):
    alone = run(world, capsys, *WHAT, sets=["near"])[0]["scores"]["model"]["near"]
    write_rows(world / "other" / "near" / "test.jsonl", [{"instruction": "Write.", "output": "a"}])
    scores = run(world, capsys, *WHAT, sets=["near", "other/near"])[0]["scores"]["model"]
    assert (
        list(scores) == [f"{world.name}/near", "other/near"]
        and scores[f"{world.name}/near"] == alone
    )


def test_decoding_options_and_rows_reach_the_sampling(world, capsys):
    plain = run(world, capsys, *WHAT, sets=["near"])[0]["scores"]["model"]["near"]
    for option in [
        ["--greedy"],
        ["--temperature", 3],
        ["--top-k", 2],
        ["--top-p", 0.3],
        ["--no-repeat-ngram", 1],
        ["--rows", 2],
    ]:
        content, out = run(world, capsys, *WHAT, *option, sets=["near"])
        assert content["scores"]["model"]["near"] != plain
        if option == ["--greedy"]:
            assert len(set(content["scores"]["model"]["near"])) == 1
        if option == ["--no-repeat-ngram", 1]:
            assert content["no_repeat_ngram"] == {"near": 1} and "banned: near 1" in out


def test_the_ban_of_6_grams_is_on_for_a_public_set_alone(world, capsys, monkeypatch):
    monkeypatch.setattr(
        "evaluate.find_data_dir", lambda name: world / "near" if name == "dolly" else world / "far"
    )
    seen = {}
    monkeypatch.setattr(
        "evaluate.sample_all",
        lambda m, requests, keys, *rest, no_repeat_ngram, **how: (
            seen.update({keys[0][2]: no_repeat_ngram}) or ([rest[:1]] * len(keys), None)
        ),
    )
    main(
        [
            str(world / "model"),
            "--data",
            "dolly",
            str(world / "far"),
            "--seeds",
            "10",
            "--out",
            str(world / "ban"),
        ]
    )
    assert (
        seen
        == {"dolly": 6, "far": 0}
        == json.loads((world / "ban" / "table1.json").read_text())["no_repeat_ngram"]
    )
    assert "banned: dolly 6, far no" in capsys.readouterr().out
    main(
        [
            str(world / "model"),
            "--data",
            "dolly",
            "dolly",
            str(world / "far"),
            "--seeds",
            "10",
            "--out",
            str(world / "twice"),
        ]
    )
    assert json.loads((world / "twice" / "table1.json").read_text())["no_repeat_ngram"] == {
        "dolly": 6,
        "far": 0,
    }


def test_shortened_requests_are_counted(world, capsys):
    rows = [
        {"instruction": "Write.", "input": "many " * 200, "output": "a"},
        {"instruction": "Write.", "output": "a"},
    ]
    write_rows(world / "long" / "test.jsonl", rows)
    _, out = run(world, capsys, *WHAT, sets=["long"])
    assert (
        out.startswith("model on long: 1 of 2 requests were shortened to fit\n")
        and out.count("shortened") == 1
    )


def test_models_of_the_same_name_are_told_apart(world, capsys):
    for folder in ["x/run", "y/run"]:
        write_checkpoint(world / folder / "best", talker_config(), tiny_tokenizer())
    content, out = run(world, capsys, *WHAT, models=["x/run", "y/run", "model"], sets=["far"])
    assert list(content["scores"]) == ["x/run", "y/run", f"{world.name}/model"]
    assert len({str(scores) for scores in content["scores"].values()}) == 1 and all(
        f"\n{label} " in out for label in content["scores"]
    )


# ---- runs: the order, what is left out, the paper's figures ------------------------------------------------------------------


def make_run(home, name, model=True, config=None, hours=0.5, paper=None, metrics=(), **settings):
    """A run's directory, the model being the tiny one."""
    directory = home / name
    directory.mkdir(parents=True)
    record = (
        {"name": name, "settings": {"data": "dolly", **settings}}
        | ({"hours": hours} if hours else {})
        | ({"paper": paper} if paper else {})
    )
    (directory / "run.json").write_text(json.dumps(record))
    if model:
        write_checkpoint(directory / "best", config or talker_config(), tiny_tokenizer())
    if metrics:
        write_rows(directory / "metrics.jsonl", metrics)
    return directory


def fixed_scores(monkeypatch, scores):
    """Put {label: {set: scores}} in place of an evaluation."""

    def evaluate_models(models, sets, seeds, device, columns, *how, **more):
        return {
            label: {
                column: scores[label][name][: len(seeds)] for column, (name, _) in columns.items()
            }
            for label in models
        }

    monkeypatch.setattr("evaluate.evaluate_models", evaluate_models)


def test_rows_are_teacher_then_by_size_and_method_then_other_models(
    world, tmp_path, capsys, monkeypatch
):
    small = replace(talker_config(), n_layer=1)
    names = [
        "promptkd-a-s10",
        "gkd-a-s10",
        "pretrain-a",
        "kd-a-s10",
        "sft-a-s10",
        "init-a",
        "seqkd-a-s10",
        "minillm-a-s10",
    ]
    made = [make_run(tmp_path, name) for name in names] + [
        make_run(tmp_path, "promptkd-b-s10", config=small),
        make_run(tmp_path, "teacher-c", config=replace(small, n_layer=3)),
    ]
    plain = write_checkpoint(tmp_path / "plain", small, tiny_tokenizer())
    unfinished = make_run(tmp_path, "sft-b-s10", config=small, hours=None)
    make_run(tmp_path, "responses-c", model=False), (tmp_path / "evaluation").mkdir()
    fixed_scores(monkeypatch, defaultdict(lambda: {"far": [1.0]}))
    main(
        [
            str(path)
            for path in [
                plain,
                *made,
                unfinished,
                tmp_path / "responses-c",
                tmp_path / "evaluation",
                "--data",
                world / "far",
                "--out",
                tmp_path / "out",
            ]
        ]
    )
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [
        f"{tmp_path / name}: has no model (neither best/ nor config.json), left out"
        for name in ("responses-c", "evaluation")
    ]
    rows = [line.rsplit(None, 2)[0] for line in out[3:15]]
    of_a = [
        f"{kind}-a" + ("-s10" if kind not in ("init", "pretrain") else "")
        for kind in ("init", "sft", "kd", "seqkd", "minillm", "gkd", "promptkd", "pretrain")
    ]
    assert rows == ["teacher-c", "sft-b-s10 (unfinished)", "promptkd-b-s10", *of_a, "plain"]
    with pytest.raises(InputError, match="none of the directories has a model"):
        main([str(tmp_path / "responses-c"), "--data", str(world / "far")])


TABLE_1 = {"dolly": 25.9, "self_inst": 13.1, "vicuna": 16.8, "sinst": 26.8, "uinst": 28.9}


@pytest.fixture
def public(monkeypatch, tmp_path):
    """The five public sets, of as many rows as the paper's, each its own row many times."""
    for name, size in {
        "dolly": 500,
        "self_inst": 242,
        "vicuna": 80,
        "sinst": 1694,
        "uinst": 10_000,
    }.items():
        write_rows(
            tmp_path / "data" / name / "test.jsonl",
            [{"instruction": "Write.", "output": "a"}] * size,
        )
    monkeypatch.setattr("evaluate.PUBLIC_SETS", dict.fromkeys(TABLE_1))
    monkeypatch.setattr(
        "evaluate.find_data_dir",
        lambda name: tmp_path / "data" / name if name in TABLE_1 else Path(name),
    )


def paper_of(
    tmp_path,
    monkeypatch,
    *options,
    paper="promptkd base",
    name="promptkd-gpt2-s10",
    seeds=2,
    as_public=True,
):
    """The paper's figures, and the table, of a run that has TABLE_1's scores, ± 0.14."""
    run = tmp_path / name if (tmp_path / name).exists() else make_run(tmp_path, name, paper=paper)
    fixed_scores(
        monkeypatch,
        defaultdict(lambda: {name: [score - 0.1, score + 0.1] for name, score in TABLE_1.items()}),
    )
    sets = [name if as_public else str(tmp_path / "data" / name) for name in TABLE_1]
    main(
        [
            str(run),
            "--data",
            *sets,
            "--seeds",
            *["10", "20"][:seeds],
            "--out",
            str(tmp_path / "out"),
            *map(str, options),
        ]
    )
    return next(
        iter(json.loads((tmp_path / "out" / "table1.json").read_text())["paper"].values()), {}
    )


def test_the_papers_figures_stand_beside_a_preset_run_evaluated_as_there(
    tmp_path, monkeypatch, capsys, public
):
    figures = paper_of(tmp_path, monkeypatch)
    assert figures == pytest.approx(
        {
            "dolly": 25.6,
            "self_inst": 13.1,
            "vicuna": 16.8,
            "sinst": 26.8,
            "uinst": 28.9,
            "average": 111.2 / 5,
        }
    )
    row = capsys.readouterr().out.splitlines()[1].split("  ")
    assert row == [
        "promptkd-gpt2-s10",
        "25.9 ± 0.1 (25.6 ≠)",
        "13.1 ± 0.1 (13.1)",
        "16.8 ± 0.1 (16.8)",
        "26.8 ± 0.1 (26.8)",
        "28.9 ± 0.1 (28.9)",
        "22.3 ± 0.1 (22.2)",
    ]
    capsys.readouterr()
    assert paper_of(tmp_path, monkeypatch, "--no-repeat-ngram", 6) == figures
    for option in [
        ["--rows", 79],
        ["--no-repeat-ngram", 0],
        ["--greedy"],
        ["--temperature", 0.9],
        ["--max-new", 128],
        ["--top-k", 5],
        ["--top-p", 0.9],
    ]:
        assert paper_of(tmp_path, monkeypatch, *option) == {}
    assert paper_of(tmp_path, monkeypatch, as_public=False) == {}
    assert paper_of(tmp_path, monkeypatch, "--rows", 80) == {"vicuna": 16.8}  # all of them


@pytest.mark.parametrize(
    "name, paper, dolly",
    [
        ("promptkd-gpt2-lr0.1-s10", None, None),
        ("teacher-gpt2-xl", "teacher xl", 27.3),
        ("init-gpt2", "init base", None),
        ("sft-gpt2-large-s10", "sft large", 24.9),
        ("kd-gpt2-medium-s10", "kd medium", 25.1),
        ("seqkd-gpt2-s10", "seqkd base", 23.3),
        ("minillm-gpt2-s10", "minillm base", 24.2),
        ("gkd-gpt2-large-s10", "gkd large", 26.9),
    ],
)
def test_each_kind_of_run_has_its_own_figures(
    tmp_path, monkeypatch, capsys, public, name, paper, dolly
):
    assert paper_of(tmp_path, monkeypatch, name=name, paper=paper).get("dolly") == dolly


def test_the_authors_students_have_their_figures_by_hub_id(tmp_path, monkeypatch, capsys, public):
    plain = write_checkpoint(tmp_path / "plain", talker_config())
    monkeypatch.setattr("evaluate.find_model_dir", lambda name: plain)
    fixed_scores(monkeypatch, defaultdict(lambda: {"dolly": [27.0, 27.1]}))
    ids = [f"gmkim/GPT-2-{size}-distilled-PromptKD-Dolly-v1.0" for size in ("120M", "340M", "760M")]
    main([*ids, "owner/other", "--data", "dolly", "--out", str(tmp_path / "out")])
    figures = json.loads((tmp_path / "out" / "table1.json").read_text())["paper"]
    assert [figures[name].get("dolly") for name in [*ids, "owner/other"]] == [
        25.6,
        27.3,
        26.9,
        None,
    ]


def test_the_papers_averages_are_those_of_its_figure_1_and_table_3():
    averages = {
        (kind, size): sum(row) / 5
        for kind, sizes in PAPER_SCORES.items()
        for size, row in sizes.items()
    }
    assert len(averages) == 19
    for key, value in {
        ("promptkd", "base"): 22.25,
        ("promptkd", "medium"): 23.92,
        ("promptkd", "large"): 25.08,
    }.items():
        assert averages[key] == pytest.approx(
            value, abs=0.02
        )  # the paper's own, from unrounded scores


def test_sets_default_to_the_demos_for_its_runs_and_else_to_the_public_ones(
    tmp_path, monkeypatch, capsys
):
    for name in ["test", "wording", "words", "longer", "combined"]:
        write_rows(
            tmp_path / "demo" / ("" if name == "test" else name) / "test.jsonl",
            [{"instruction": name, "output": "a"}],
        )
    write_rows(tmp_path / "dolly" / "test.jsonl", [{"instruction": "dolly", "output": "a"}])
    monkeypatch.setattr("evaluate.PUBLIC_SETS", {"dolly": None})
    monkeypatch.setattr("evaluate.find_data_dir", lambda name: tmp_path / name)
    fixed_scores(monkeypatch, defaultdict(lambda: defaultdict(lambda: [1.0])))
    a, b = (make_run(tmp_path, f"sft-{data}-s10", data=data) for data in ("demo", "dolly"))
    plain = write_checkpoint(tmp_path / "plain", talker_config(), tiny_tokenizer())
    for models, sets in [
        ([a], ["test", "wording", "words", "longer", "combined"]),
        ([a, plain], ["test", "wording", "words", "longer", "combined"]),
        ([a, b], ["dolly"]),
        ([plain], ["dolly"]),
    ]:
        main([*map(str, models), "--out", str(tmp_path / "out")])
        assert (
            list(
                next(
                    iter(
                        json.loads((tmp_path / "out" / "table1.json").read_text())[
                            "scores"
                        ].values()
                    )
                )
            )
            == sets
        )
    assert {name: rows[0].instruction for name, rows in open_sets(["demo"]).items()} == {
        name: name for name in ["test", "wording", "words", "longer", "combined"]
    }
    write_rows(
        tmp_path / "other" / "words" / "test.jsonl", [{"instruction": "others", "output": "a"}]
    )
    with pytest.raises(InputError, match="two sets are called 'words'"):
        open_sets(["demo", str(tmp_path / "other" / "words")])


def test_the_demos_table_leaves_no_files(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = {"near": read_rows(world / "near" / "test.jsonl")}
    scores = evaluate_models({"one": world / "model"}, sets, [10], "cpu", max_new_tokens=20)
    assert scores == {
        "one": {
            "near": [
                mean_rouge_l(
                    evaluate(
                        tiny_model(talker_config()),
                        tiny_tokenizer(),
                        sets["near"],
                        (10, "evaluate", "near"),
                        max_new_tokens=20,
                    )
                )
            ]
        }
    }
    assert not list(tmp_path.iterdir())


# ---- kept responses ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sampled(monkeypatch):
    """The (seed, set, row) of what has been sampled."""
    import evaluate as module

    seen, real = [], module.sample_all
    monkeypatch.setattr(
        "evaluate.sample_all",
        lambda model, requests, keys, *rest, **how: (
            seen.extend(keys) or real(model, requests, keys, *rest, **how)
        ),
    )
    return seen


def again(
    world, tmp_path, capsys, *arguments, seeds=(10, 20), sets=("near", "far"), models=("model",)
):
    main(
        [
            str(a)
            for a in [
                *(world / name for name in models),
                "--data",
                *(world / name for name in sets),
                "--max-new",
                20,
                "--seeds",
                *seeds,
                *arguments,
                "--out",
                tmp_path / "out",
            ]
        ]
    )
    return json.loads((tmp_path / "out" / "table1.json").read_text()), capsys.readouterr().out


def test_responses_are_kept_and_can_be_scored_again(world, tmp_path, capsys):
    content, _ = again(world, tmp_path, capsys)
    kept = tmp_path / "out" / "responses" / "model"
    assert content["responses"]["model"] == {
        name: [str(kept / f"{name}-s{seed}.jsonl") for seed in (10, 20)] for name in ("near", "far")
    }
    for name in ["near", "far"]:
        rows = [json.loads(line) for line in open(world / name / "test.jsonl")]
        for seed, score in zip((10, 20), content["scores"]["model"][name]):
            lines = [json.loads(line) for line in open(kept / f"{name}-s{seed}.jsonl")]
            assert [line["text"] for line in lines] == [said(row, name, seed) for row in rows] and [
                line["index"] for line in lines
            ] == list(range(len(rows)))
            assert lines[0].keys() == {"index", "text", "rouge_l", "shortened"}
            main(
                [
                    "--score",
                    str(kept / f"{name}-s{seed}.jsonl"),
                    "--references",
                    str(world / name / "test.jsonl"),
                ]
            )
            assert capsys.readouterr().out == f"ROUGE-L {score:.4f} over {len(rows)} rows\n"
    assert len(list(kept.iterdir())) == 8 and not list(kept.glob(".*"))


def test_what_is_kept_is_not_sampled_again_and_the_model_not_loaded(
    world, tmp_path, capsys, sampled, monkeypatch
):
    first, _ = again(world, tmp_path, capsys, seeds=[10])
    assert len(sampled) == 6
    sampled.clear()
    second, out = again(world, tmp_path, capsys)
    assert {key[0] for key in sampled} == {20} and len(sampled) == 6 and "made anew" not in out
    assert (
        second["scores"]["model"] == run(world, capsys, *WHAT)[0]["scores"]["model"]
        and second["scores"]["model"]["near"][0] == first["scores"]["model"]["near"][0]
    )
    monkeypatch.setattr("evaluate.load_model", None)
    assert again(world, tmp_path, capsys, "--batch", 1)[0]["scores"] == second["scores"]
    (tmp_path / "out" / "responses" / "model" / "near-s20.jsonl").unlink()
    with pytest.raises(TypeError):
        again(world, tmp_path, capsys)


@pytest.mark.parametrize(
    "change, words",
    [
        ("weights", "weights"),
        ("a row", "data"),
        ("a response", "responses"),
        ("no record", "weights, rows, data"),
        ("a damaged record", "weights, rows"),
        ("--max-new", "max_new_tokens"),
        ("--temperature", "temperature"),
        ("--top-k", "top_k"),
        ("--top-p", "top_p"),
        ("--greedy", "greedy"),
        ("--rows", "rows, data"),
    ],
)
def test_what_was_made_from_something_else_is_made_anew(
    world, tmp_path, capsys, sampled, change, words
):
    write_checkpoint(tmp_path / "model", talker_config(), tiny_tokenizer())
    write_rows(
        tmp_path / "near" / "test.jsonl",
        [json.loads(line) for line in open(world / "near" / "test.jsonl")],
    )
    before = again(tmp_path, tmp_path, capsys, seeds=[10], sets=["near"])[0]
    kept, sampled[:] = tmp_path / "out" / "responses" / "model" / "near-s10.jsonl", []
    if change == "weights":
        state = load_file(tmp_path / "model" / "model.safetensors")
        save_file(
            state | {"wpe.weight": 2 * state["wpe.weight"]},
            tmp_path / "model" / "model.safetensors",
        )
    elif change == "a row":
        path = tmp_path / "near" / "test.jsonl"
        path.write_text(path.read_text().replace("none of it", "all of it"))
    elif change == "a response":
        kept.write_text(kept.read_text().replace('"text": "', '"text": "x'))
    elif change == "no record":
        kept.with_suffix(".json").unlink()
    elif change == "a damaged record":
        kept.with_suffix(".json").write_text("{")
    option = {
        "--max-new": [19],
        "--temperature": [2],
        "--top-k": [3],
        "--top-p": [0.5],
        "--greedy": [],
        "--rows": [2],
    }.get(change)
    after, out = again(
        tmp_path,
        tmp_path,
        capsys,
        *([change, *option] if option is not None else []),
        seeds=[10],
        sets=["near"],
    )
    assert (
        len(sampled) == (2 if change == "--rows" else 5)
        and out.startswith(f"{kept}: was made from other {words}")
        and out.count("made anew") == 1
    )
    assert (after["scores"] == before["scores"]) == (
        change in ("a row", "a response", "no record", "a damaged record")
    )
    assert (
        "made anew"
        not in again(
            tmp_path,
            tmp_path,
            capsys,
            *([change, *option] if option is not None else []),
            seeds=[10],
            sets=["near"],
        )[1]
    )


def test_shortened_requests_are_counted_of_kept_responses_too(world, tmp_path, capsys):
    write_rows(
        tmp_path / "long" / "test.jsonl",
        [
            {"instruction": "Write.", "input": "many " * 200, "output": "a"},
            {"instruction": "Write.", "output": "a"},
        ],
    )
    outputs = [again(world, tmp_path, capsys, sets=[tmp_path / "long"])[1] for _ in range(2)]
    assert outputs[0] == outputs[1] and outputs[0].startswith(
        "model on long: 1 of 2 requests were shortened to fit\n"
    )


def test_several_bans_are_columns_beside_each_other(world, tmp_path, capsys):
    content, out = again(world, tmp_path, capsys, "--no-repeat-ngram", 1, 0)
    columns = ["near, ban 1", "near, no ban", "far, ban 1", "far, no ban"]
    scores = content["scores"]["model"]
    assert list(scores) == columns and content["no_repeat_ngram"] == dict(
        zip(columns, [1, 0, 1, 0])
    )
    for ban, suffix in [(1, ", ban 1"), (0, ", no ban")]:
        alone = run(world, capsys, *WHAT, "--no-repeat-ngram", ban)[0]["scores"]["model"]
        assert {name: scores[name + suffix] for name in ("near", "far")} == alone
        assert (
            content["averages"]["model"]["average" + suffix]
            == add_averages({"a": alone})["a"]["average"]
        )
    assert scores[columns[0]] != scores[columns[1]]
    assert [Path(paths[0]).name for paths in content["responses"]["model"].values()] == [
        "near-s10-ngram1.jsonl",
        "near-s10.jsonl",
        "far-s10-ngram1.jsonl",
        "far-s10.jsonl",
    ]
    assert [cell.strip() for cell in re.split("  +", out.splitlines()[0])] == [
        "ROUGE-L",
        *columns,
        "average, ban 1",
        "average, no ban",
    ]


def test_one_bar_shows_the_rows_of_the_whole_evaluation(world, tmp_path, capsys, monkeypatch):
    totals, steps = [], []

    class Bar:
        def __init__(self, total, disable, **how):
            totals.append((total, disable))

        __enter__, __exit__ = (lambda self: self), (lambda self, *error: None)
        set_description, update = (lambda self, text: None), (lambda self, n: steps.append(n))

    monkeypatch.setattr("evaluate.tqdm", Bar)
    again(world, tmp_path, capsys, "--batch", 2)
    assert totals == [(12, None)] and steps == [2, 2, 1, 2, 2, 1, 1, 1]


def test_samples_shows_requests_spread_over_the_set_with_all_responses(world, tmp_path, capsys):
    write_checkpoint(
        tmp_path / "other" / "model", replace(talker_config(), n_layer=1), tiny_tokenizer()
    )
    _, out = again(
        world, tmp_path, capsys, "--samples", 2, models=["model", tmp_path / "other" / "model"]
    )
    page = (tmp_path / "out" / "table6.md").read_text()
    assert page in out
    sections = page.split("#### ")[1:]
    assert [section.splitlines()[0] for section in sections] == [
        "near, row 1",
        "near, row 3",
    ]  # of 5
    rows = read_rows(world / "near" / "test.jsonl")
    for section, row in zip(sections, [rows[0], rows[2]]):
        found = {
            name: " ".join(text.split())
            for name, text in re.findall(
                r"^(\S[^\n]*):\n\n((?:    [^\n]*\n|\n)*)", section + "\n", re.MULTILINE
            )
        }
        others = [
            json.loads(line)["text"]
            for line in open(tmp_path / "out" / "responses" / "other" / "model" / "near-s10.jsonl")
        ]
        wanted = {
            "instruction": row.instruction,
            "reference": row.references[0],
            f"{world.name}/model": said(vars(row), "near", 10),
            "other/model": others[row.index],
        }
        assert found == {name: " ".join(text.split()) for name, text in wanted.items()}
    again(world, tmp_path, capsys, "--samples", 99)
    assert (tmp_path / "out" / "table6.md").read_text().count(
        "#### "
    ) == 5 and "input:\n\n    describes" in (tmp_path / "out" / "table6.md").read_text()


# ---- groups of runs ----------------------------------------------------------------------------------------------------------


def by(tmp_path, monkeypatch, *fields):
    """The groups that --by makes of five runs, whose averages over two seeds are n and n + 2."""
    runs = {
        "promptkd-a-s10": {"reg_weight": 1.0, "prompt_init": "text", "seed": 10},
        "promptkd-a-s20": {"reg_weight": 1.0, "prompt_init": "text", "seed": 20},
        "promptkd-a-reg0-s10": {"reg_weight": 0.0, "prompt_init": "text", "seed": 10},
        "promptkd-a-promptinitrandom-s10": {"reg_weight": 1.0, "prompt_init": "random", "seed": 10},
        "sft-a-s10": {"reg_weight": None, "prompt_init": None, "seed": 10},
    }
    for name, settings in runs.items():
        (tmp_path / name).exists() or make_run(tmp_path, name, **settings)
    write_rows(tmp_path / "near" / "test.jsonl", [{"instruction": "a", "output": "a"}])
    fixed_scores(
        monkeypatch, {name: {"near": [n, n + 2.0]} for n, name in enumerate(runs, start=1)}
    )
    main(
        [
            *(str(tmp_path / name) for name in runs),
            "--data",
            str(tmp_path / "near"),
            "--seeds",
            "10",
            "20",
            "--out",
            str(tmp_path / "out"),
            "--by",
            *fields,
        ]
    )
    return json.loads((tmp_path / "out" / f"table-by-{'-'.join(fields)}.json").read_text())[
        "groups"
    ]


def test_by_a_field_pools_the_runs_of_a_value(tmp_path, monkeypatch, capsys, pictures):
    groups = by(tmp_path, monkeypatch, "reg_weight")
    assert groups == [
        {"values": ["0.0"], "runs": ["promptkd-a-reg0-s10"], "scores": [3, 5]},
        {
            "values": ["1.0"],
            "runs": ["promptkd-a-s10", "promptkd-a-s20", "promptkd-a-promptinitrandom-s10"],
            "scores": [1, 3, 2, 4, 4, 6],
        },
    ]
    out = capsys.readouterr().out
    assert out.startswith("sft-a-s10: has no reg_weight, left out of the groups\n")
    table = (
        "reg_weight  runs    ROUGE-L\n0.0            1  4.0 ± 1.4\n1.0            3  3.3 ± 1.8\n"
    )
    assert (
        table in out
        and "| 1.0 | 3 | 3.3 ± 1.8 |" in (tmp_path / "out" / "table-by-reg_weight.md").read_text()
    )
    assert (tmp_path / "out" / "figure-by-reg_weight.png").read_bytes().startswith(b"\x89PNG")


def test_by_two_fields_has_a_bar_for_each_pair(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(
        "evaluate.plot_bars", lambda path, bars, *rest: drawn.append(bars) or str(path)
    )
    by(tmp_path, monkeypatch, "reg_weight", "prompt_init")
    assert drawn[-1] == {
        ("0.0", "prompt_init text"): [3, 5],
        ("1.0", "prompt_init random"): [4, 6],
        ("1.0", "prompt_init text"): [1, 3, 2, 4],
    }
    assert str(tmp_path / "out" / "figure-by-reg_weight-prompt_init.png") in capsys.readouterr().out
    assert [group["values"] for group in by(tmp_path, monkeypatch, "name")] == sorted(
        [name]
        for name in [
            "promptkd-a-s10",
            "promptkd-a-s20",
            "promptkd-a-reg0-s10",
            "promptkd-a-promptinitrandom-s10",
            "sft-a-s10",
        ]
    )


def test_an_unknown_field_lists_those_there_are(tmp_path, monkeypatch):
    with pytest.raises(
        InputError,
        match="--by rag: no run named has this field; there are data, hours, name, prompt_init, reg_weight, seed",
    ):
        by(tmp_path, monkeypatch, "rag")


# ---- pictures ----------------------------------------------------------------------------------------------------------------


def test_figure_1_has_a_bar_a_method_and_size_with_its_spread_and_the_teacher_as_a_line(
    tmp_path, monkeypatch, capsys, pictures
):
    from matplotlib.figure import Figure

    drawn, small = [], replace(talker_config(), n_layer=1)
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: drawn.append(figure))
    names = {
        "teacher-c": None,
        "pretrain-a": None,
        "kd-a-s10": None,
        "gkd-a-s10": None,
        "gkd-b-s10": small,
        "gkd-b-lr1-s10": small,
    }
    runs = [make_run(tmp_path, name, config=config) for name, config in names.items()]
    write_rows(tmp_path / "near" / "test.jsonl", [{"instruction": "a", "output": "a"}])
    scores = {name: {"near": [n, n + 2.0 * n]} for n, name in enumerate(names, start=1)}
    fixed_scores(monkeypatch, scores)
    main([*map(str, runs), "--data", str(tmp_path / "near"), "--out", str(tmp_path / "out")])
    [axes] = drawn[0].axes
    bars = [container for container in axes.containers if hasattr(container, "patches")]
    assert {bar.get_label(): [patch.get_height() for patch in bar.patches] for bar in bars} == {
        "gkd-b-s10": [10],
        "gkd-b-lr1-s10": [12],
        "kd": [6],
        "gkd": [8],
    }
    for bar, n in zip(sorted(bars, key=lambda bar: bar.patches[0].get_height()), [3, 4, 5, 6]):
        [[(_, low), (_, high)]] = bar.errorbar.lines[2][0].get_segments()
        assert high - low == pytest.approx(2 * n * math.sqrt(2))
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        f"{n / 1e3:.0f} thousand"
        for n in (tiny_model(small).n_parameters(), tiny_model(talker_config()).n_parameters())
    ]
    [line] = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert list(line.get_ydata()) == [2, 2] and line.get_label().startswith("teacher")
    assert (
        axes.get_ylabel() == "ROUGE-L"
        and axes.get_xlabel()
        and "near" in axes.get_title()
        and drawn[0].legends
    )


def test_without_matplotlib_everything_else_works(world, capsys, monkeypatch, pictures):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, out = run(world, capsys, *WHAT)
    assert "no picture without matplotlib" in out and not list(
        world.glob(f"out-{len(list(world.glob('out-*'))) - 1}/*.png")
    )
    assert (
        plot_bars(world / "none.png", {("a", "b"): [1.0]}, {}, "t", "x")
        == "no picture without matplotlib"
    )


# ---- Table 2 -----------------------------------------------------------------------------------------------------------------


def costs(tmp_path, *names):
    main(["--cost", *(str(tmp_path / name) for name in names), "--out", str(tmp_path / "out")])
    return json.loads((tmp_path / "out" / "table2.json").read_text())["costs"]


def test_table_2_has_each_runs_peak_and_hours_and_the_papers_beside_preset_runs_of_base(
    tmp_path, capsys
):
    gpu = [
        {"step": n, "memory_allocated_gb": a, "memory_reserved_gb": a + 1}
        for n, a in enumerate([3.0, 6.0, 5.0])
    ]
    make_run(
        tmp_path,
        "gkd-gpt2-s10",
        model=False,
        hours=8.0,
        paper="gkd base",
        metrics=[{"step": 0}, *gpu],
    )
    make_run(
        tmp_path, "gkd-gpt2-large-s10", model=False, hours=None, paper="gkd large", metrics=gpu[:1]
    )
    make_run(
        tmp_path,
        "sft-tiny-s10",
        model=False,
        hours=0.25,
        metrics=[{"step": 1, "memory_resident_gb": 1.5}, {"step": 2, "memory_resident_gb": 1.4}],
    )
    make_run(tmp_path, "responses-gpt2-xl", model=False, hours=0.125)
    (tmp_path / "empty").mkdir()
    made = costs(
        tmp_path, "gkd-gpt2-s10", "gkd-gpt2-large-s10", "sft-tiny-s10", "responses-gpt2-xl", "empty"
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'empty'}: has no run.json, left out"
    assert [line.split() for line in lines[1:6]] == [
        ["cost", "allocated,", "GB", "reserved,", "GB", "hours", "resident,", "GB"],
        ["sft-tiny-s10", "-", "-", "0.25", "1.50"],
        ["gkd-gpt2-s10", "6.00", "(6.23)", "7.00", "(6.93)", "8.00", "(8.48)", "-"],
        ["gkd-gpt2-large-s10", "(unfinished)", "3.00", "4.00", "-", "-"],
        ["responses-gpt2-xl", "-", "-", "0.12", "-"],
    ]
    assert (
        "in brackets" in lines[6]
        and "| gkd-gpt2-s10 | 6.00 (6.23) | 7.00 (6.93) | 8.00 (8.48) | - |"
        in (tmp_path / "out" / "table2.md").read_text()
    )
    assert made["gkd-gpt2-s10"] == {
        "measured": {"memory_allocated_gb": 6.0, "memory_reserved_gb": 7.0, "hours": 8.0},
        "paper": {"memory_allocated_gb": 6.23, "memory_reserved_gb": 6.93, "hours": 8.48},
    }
    costs(tmp_path, "responses-gpt2-xl")  # only what there is
    assert capsys.readouterr().out.splitlines()[0].split() == ["cost", "hours"]
    with pytest.raises(InputError, match="none of the directories has a run.json"):
        costs(tmp_path, "empty")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"name": 3, "settings": {}}',
        '{"name": "a"}',
        '{"name": "a", "settings": {}, "hours": "long"}',
    ],
)
def test_a_damaged_record_is_one_line_of_error(tmp_path, text):
    make_run(tmp_path, "sft-a-s10")
    (tmp_path / "sft-a-s10" / "run.json").write_text(text)
    for option in [["--cost"], []]:
        with pytest.raises(InputError, match="sft-a-s10/run.json: is "):
            main(
                [
                    str(tmp_path / "sft-a-s10"),
                    *option,
                    "--data",
                    str(tmp_path),
                    "--out",
                    str(tmp_path / "out"),
                ]
            )


# ---- responses made elsewhere ------------------------------------------------------------------------------------------------

TEXTS = [{"text": "a b c d", "ids": [1]}, {"text": "running"}, {"text": ""}]
OUTPUTS = [
    {"output": ["x", "a c"]},
    {"output": "run", "instruction": "no matter"},
    {"output": "nothing"},
]


def score(tmp_path, texts, outputs):
    responses, references = (
        write_rows(tmp_path / "responses.jsonl", texts),
        write_rows(tmp_path / "test.jsonl", outputs),
    )
    run_command_line(
        lambda: main(
            [
                "--score",
                str(responses),
                "--references",
                str(references),
                "--json",
                str(tmp_path / "out" / "s.json"),
            ]
        ),
        InputError,
    )


def test_a_file_of_responses_is_scored_row_by_row(tmp_path, capsys):
    score(tmp_path, TEXTS, OUTPUTS)
    assert capsys.readouterr().out == "ROUGE-L 55.5556 over 3 rows\n"
    content = json.loads((tmp_path / "out" / "s.json").read_text())
    assert content["rows"] == pytest.approx([200 / 3, 100, 0]) and content[
        "rouge_l"
    ] == pytest.approx(500 / 9)


def test_scoring_a_file_writes_nothing_unasked(tmp_path, monkeypatch):
    write_rows(tmp_path / "responses.jsonl", TEXTS), write_rows(tmp_path / "test.jsonl", OUTPUTS)
    monkeypatch.chdir(tmp_path)
    main(["--score", "responses.jsonl", "--references", "test.jsonl"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["responses.jsonl", "test.jsonl"]


@pytest.mark.parametrize(
    "texts, outputs, words",
    [
        (TEXTS[:2], OUTPUTS, "2 responses for 3 rows"),
        (TEXTS, OUTPUTS[:2], "3 responses for 2 rows"),
        ([*TEXTS[:2], {"txt": "a"}], OUTPUTS, "responses.jsonl, line 3: 'text'"),
        ([{"text": ["a"]}, *TEXTS[1:]], OUTPUTS, "responses.jsonl, line 1: 'text'"),
        (TEXTS, [*OUTPUTS[:1], {"output": []}, OUTPUTS[2]], "test.jsonl, line 2: 'output'"),
        (TEXTS, [*OUTPUTS[:1], {"output": ["a", 3]}, OUTPUTS[2]], "test.jsonl, line 2: 'output'"),
        (TEXTS, [*OUTPUTS[:2], {"instruction": "a"}], "test.jsonl, line 3: 'output'"),
        ([], OUTPUTS, "responses.jsonl: has no rows"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line_of_error(tmp_path, capsys, texts, outputs, words):
    with pytest.raises(SystemExit) as exit:
        score(tmp_path, texts, outputs)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and not (tmp_path / "out").exists()
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "name at least one"),
        (["--score", "a.jsonl"], "--references"),
        (["--references", "a.jsonl"], "--references"),
        (["model", "--score", "a.jsonl", "--references", "b.jsonl"], "without models"),
        (["--score", "none.jsonl", "--references", "b.jsonl"], "none.jsonl: no such file"),
        (["model", "--data", "nowhere"], "'nowhere': no such directory"),
        (["model", "--data", "model"], "test.jsonl: no such file"),
        (["nonsense", "--data", "near"], "'nonsense': no such directory"),
        (["near", "--data", "near"], "none of the directories has a model"),
        (["model", "--json", "s.json"], "--json goes with --score"),
        (["model", "--data", "near", "--by", "a", "b", "c"], "one or two fields, not 3"),
        (
            ["model", "--data", "near", "--by", "reg_weight"],
            "--by reg_weight: no run named has this field; there are no runs",
        ),
        (["model", "--data", "near", "--max-new", "280"], "exceed the model's 288 positions"),
    ],
)
def test_a_wrong_command_is_one_line_of_error(world, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit) as exit:
        run_command_line(lambda: main([*arguments, "--out", "never"]))
    err = after_device(capsys.readouterr().err)
    assert (
        exit.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err
    )
    assert not (world / "never").exists()


def test_a_wrong_command_ends_the_process_with_status_2(world):
    done = run_command("evaluate.py", world / "model", "--data", world / "model")
    err = after_device(done.stderr)
    assert (
        done.returncode == 2
        and done.stdout == ""
        and err.startswith("error: ")
        and err.count("\n") == 1
    )
