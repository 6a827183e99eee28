"""ROUGE-L, the evaluation of models, its tables and plots, and kept responses."""

import contextlib
import functools
import io
import json
import math
import re
import shutil
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    error_of,
    fork_ranks,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    wait_for,
    write_checkpoint,
    write_rows,
)
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import evaluate as evaluate_module
from data.models.named import load_model, open_models, own_sets
from data.models.sampling import decode_response
from data.process import dist
from data.process.command_line import run_command_line
from data.process.errors import InputError
from data.runs.names import unique_labels
from data.runs.paper import DEMO_SETS, PAPER_SCORES, PAPER_SETS
from data.runs.report import (
    format_score,
    format_table,
    plot_bars,
    plot_curves,
    save_plot,
    score_table,
)
from data.runs.runs import RUN_FORMAT
from data.sets.prepare import PUBLIC_SETS, PublicSet
from data.sets.rows import fill_template, read_rows
from evaluate import (
    Column,
    add_average,
    evaluate,
    evaluate_models,
    main,
    mean_rouge_l,
    open_columns,
    print_unscorable,
    rouge_l,
)
from sample import row_uniforms, sample


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Plots take long. Only the tests that use the fixture `plots` draw them."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("data.runs.report.save_plot", lambda path, draw: "no plot")


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib")


# ---- ROUGE-L -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response, references, score",
    [
        # 5 words in common, of 6 and 6
        ("the cat sat on the mat", ["the cat is on the mat"], 100 * 5 / 6),
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


def longest_common_subsequence(a, b):
    """Its length."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return longest_common_subsequence(a[1:], b[1:]) + 1
    return max(longest_common_subsequence(a[1:], b), longest_common_subsequence(a, b[1:]))


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    rng = np.random.default_rng(0)
    texts, references, scores = [], [], []
    for _ in range(40):
        sizes = rng.integers(1, 8, 3)
        text, *several = [rng.choice(["a", "b", "c", "d"], size).tolist() for size in sizes]
        texts.append(" ".join(text))
        references.append([" ".join(words) for words in several])
        lengths = [longest_common_subsequence(text, words) for words in several]
        totals = [len(text) + len(words) for words in several]
        scores.append(max(200 * n / total for n, total in zip(lengths, totals)))
    assert rouge_l(texts, references) == pytest.approx(scores)
    assert mean_rouge_l([{"rouge_l": score} for score in scores]) == pytest.approx(sum(scores) / 40)


@pytest.mark.parametrize("n_responses, n_references", [(1, 2), (2, 1), (0, 1)])
def test_lists_of_different_lengths_are_an_error(n_responses, n_references):
    with pytest.raises(InputError, match=f"{n_responses} responses for {n_references} rows"):
        rouge_l(["a"] * n_responses, [["a"]] * n_references)


CHINESE, RUSSIAN, THAI = "今天天气很好", "Сегодня хорошая погода", "วันนี้อากาศดี"


@pytest.mark.parametrize(
    "references, scorable",
    [
        (["a"], True),
        (["7"], True),
        (["... B!"], True),
        ([CHINESE, "weather"], True),
        ([f"{RUSSIAN} 2024"], True),
        (["naïve"], True),
        ([CHINESE], False),
        ([RUSSIAN, THAI], False),
        (["😀"], False),
        (["?!... —"], False),
        (["٣"], False),  # a digit, but not one of 0-9
        ([""], False),
        ([" \n"], False),
    ],
)
def test_rows_without_a_letter_or_digit_that_rouge_l_reads_are_counted(
    references, scorable, capsys
):
    print_unscorable("set", [references])
    assert ("set: 1 of 1 rows have no reference" in capsys.readouterr().out) == (not scorable)
    # The definition: not even the reference itself gets a score.
    assert (max(rouge_l([text], [references])[0] for text in references) > 0) == scorable


# ---- the table ---------------------------------------------------------------------------------


def test_a_score_is_a_mean_with_the_standard_deviation_of_several_seeds():
    assert format_score([41.26]) == "41.3"
    assert format_score([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert format_score([20.0, 23.0]) == "21.5 ± 2.1"


def test_the_table_has_a_row_per_model_a_column_per_set_and_the_average():
    scores = {
        "teacher": {"near": [50.0, 52.0], "far": [20.0, 30.0]},  # the averages are 35 and 41
        "init-of-a-student": {"near": [9.0, 9.0], "far": [1.0, 2.0]},
    }
    add_average(scores)
    assert format_table(score_table(scores)).splitlines() == [
        "ROUGE-L                  near         far     average",
        "teacher            51.0 ± 1.4  25.0 ± 7.1  38.0 ± 4.2",
        "init-of-a-student   9.0 ± 0.0   1.5 ± 0.7   5.2 ± 0.4",
    ]
    scores = {"a": {"near": [50.0]}}
    add_average(scores)
    assert format_table(score_table(scores)).splitlines() == [
        "ROUGE-L  near  average",
        "a        50.0     50.0",
    ]


def test_the_papers_scores_are_in_brackets():
    scores = {
        "a": {"near": [10.0, 12.0], "far": [1.0, 2.0]},
        "longer": {"near": [8.0, 9.0], "far": [1.0, 2.0]},
    }
    table = score_table(scores, {"a": {"near": 12.5}, "other": {"far": 3.0}})
    assert format_table(table).splitlines() == [
        "ROUGE-L               near        far",
        "a        11.0 ± 1.4 (12.5)  1.5 ± 0.7",
        "longer           8.5 ± 0.7  1.5 ± 0.7",
    ]
    assert format_table(table, markdown=True).splitlines() == [
        "| ROUGE-L | near | far |",
        "| :-- | --: | --: |",
        "| a | 11.0 ± 1.4 (12.5) | 1.5 ± 0.7 |",
        "| longer | 8.5 ± 0.7 | 1.5 ± 0.7 |",
    ]


def test_labels_have_as_many_directories_as_make_them_unique(tmp_path):
    for name in ["x/run", "y/run", "y/other", "gpt2"]:
        (tmp_path / name).mkdir(parents=True)
    x, y, other, gpt2 = (str(tmp_path / name) for name in ["x/run", "y/run", "y/other", "gpt2"])
    assert unique_labels([x, other]) == ["run", "other"]
    assert unique_labels([x, f"{y}/", other]) == ["x/run", "y/run", "y/other"]
    assert unique_labels(["gpt2", "owner/name"]) == ["gpt2", "owner/name"]
    assert unique_labels(["gpt2", gpt2]) == ["gpt2", f"{tmp_path.name}/gpt2"]
    assert unique_labels([x, x]) == ["run", "run"]


def test_a_set_of_ours_keeps_its_name_beside_folders_called_like_it(tmp_path, monkeypatch, world):
    """And with it the paper's ban and numbers."""
    monkeypatch.setattr("data.sets.prepare.DATA_DIR", tmp_path / "data")
    for name in ("data/vicuna", "here/vicuna", "here/x/vicuna"):
        shutil.copytree(world / "near", tmp_path / name)
    monkeypatch.chdir(tmp_path / "here")
    for others in (["x/vicuna"], ["./vicuna"], ["x/vicuna", "./vicuna"]):
        columns = open_columns(["vicuna", *others])
        bans = {label: column.ban for label, column in columns.items()}
        assert len(bans) == 1 + len(others)
        assert bans.pop("vicuna") == 6 and set(bans.values()) == {0}


@pytest.mark.parametrize("name", ["average", "reference"])
def test_names_of_our_own_columns_and_rows_are_kept_apart(tmp_path, world, name):
    """A data set called `average` does not overwrite its own score with the average, and a model
    called `reference` does not take the place of the references."""
    for source, target in (("near", tmp_path / "a" / name), ("model", tmp_path / "m" / name)):
        shutil.copytree(world / source, target)
    sets, model = [tmp_path / "a" / name, world / "far"], tmp_path / "m" / name
    out = tmp_path / "out"
    options = ["--seeds", 10, "--max-new", 5, "--samples", 1, "--out", out]
    call(model, "--data", *sets, *options)
    [scores] = table_1(out)["scores"].values()
    assert list(scores) == [f"a/{name}", "far", "average"]
    assert scores["average"] == [(scores[f"a/{name}"][0] + scores["far"][0]) / 2]
    assert list(table_1(out)["scores"]) == [f"m/{name}"]
    text = (out / "table6.md").read_text()
    assert f"m/{name}" in text and "reference" in text.replace(f"m/{name}", "")


# ---- models ------------------------------------------------------------------------------------


@functools.cache
def talker():
    return tiny_model(talker_config())


@functools.cache
def respond(instruction, input, index, set_name, seed):
    """The tiny model's response to a row, sampled alone."""
    tokenizer = tiny_tokenizer()
    request = tokenizer.encode_ordinary(fill_template(instruction, input))
    uniforms = row_uniforms(20, seed, "evaluate", set_name, index)[None]
    [response], _ = sample(talker(), [request], uniforms, tokenizer.eot_token, 20)
    return decode_response(response, tokenizer)


def responses_to(rows, set_name, seed):
    return [respond(row.instruction, row.input, row.index, set_name, seed) for row in rows]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model and two sets. The references are parts of the model's responses under seed 10:
    otherwise every score would be 0."""
    directory = tmp_path_factory.mktemp("world")
    write_checkpoint(directory / "model", talker_config(), tiny_tokenizer())
    for name, size in [("near", 5), ("far", 1)]:
        rows = []
        for n in range(size):
            instruction, input = "Write a task." * (n + 1), "describes" * (n % 2)
            words = respond(instruction, input, n, name, 10).split()
            references = [" ".join(words[: (len(words) + 1) // 2]), "none of it"]
            rows.append({"instruction": instruction, "input": input, "output": references})
        write_rows(directory / name / "test.jsonl", rows)
    return directory


@pytest.fixture(scope="module")
def near(world):
    return read_rows(world / "near" / "test.jsonl")


def call(*arguments):
    """Call the command. Returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([str(argument) for argument in arguments])
    return printed.getvalue()


def table_1(out):
    return json.loads((out / "table1.json").read_text())


def run(world, out, *options, models=("model",), sets=("near", "far"), seeds=(10, 20)):
    """Evaluate models of `world`. Returns the content of table1.json and what is printed."""
    models, sets = [world / name for name in models], [world / name for name in sets]
    options = ["--max-new", 20, "--seeds", *seeds, *options, "--out", out]
    printed = call(*models, "--data", *sets, *options)
    return table_1(out), printed


def table_of(content):
    """Table 1 of the content of table1.json."""
    return score_table(content["scores"], content["paper"])


def scores_of(*arguments, **options):
    """The scores of the first model that `run` evaluates, without the average."""
    scores = next(iter(run(*arguments, **options)[0]["scores"].values()))
    return {column: scores[column] for column in scores if column != "average"}


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """`run` without options: its directory, table1.json and what is printed."""
    out = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.runs.report.save_plot", lambda path, draw: "no plot")
        return out, *run(world, out)


def evaluate_near(rows, **options):
    model, tokenizer = talker(), tiny_tokenizer()
    options = {"max_new_tokens": 20, "dtype": "float32"} | options
    return evaluate(model, tokenizer, rows, (10, "evaluate", "near"), **options)


def test_evaluate_gives_each_row_its_own_response_and_score(near):
    # A row keeps its random numbers, whichever other rows there are.
    for rows in [near, near[:0:-2]]:
        results = evaluate_near(rows, batch_size=2)
        assert [result["index"] for result in results] == sorted(row.index for row in rows)
        for result in results:
            row = near[result["index"]]
            [text] = responses_to([row], "near", 10)
            [score] = rouge_l([text], [row.references])
            assert result == {**result, "text": text, "rouge_l": score, "shortened": False}
    assert 20 < mean_rouge_l(results) < 100


def test_the_json_file_has_the_score_of_each_seed_and_the_settings(world, tmp_path):
    content, _ = run(world, tmp_path, "--batch", 2)
    assert content["scores"].keys() == {"model"}
    for name in ["near", "far"]:
        rows = read_rows(world / name / "test.jsonl")
        references = [row.references for row in rows]
        means = [
            statistics.fmean(rouge_l(responses_to(rows, name, seed), references))
            for seed in (10, 20)
        ]
        assert content["scores"]["model"][name] == pytest.approx(means)
        assert means[0] > means[1] + 5
    near, far, average = content["scores"]["model"].values()
    assert average == pytest.approx([sum(pair) / 2 for pair in zip(near, far)])
    assert content["no_repeat_ngram"] == {"near": 0, "far": 0}
    settings = {"models": [str(world / "model")], "seeds": [10, 20], "max_new_tokens": 20}
    settings |= {"batch": 2, "greedy": False, "temperature": 1.0, "rows": None}
    assert content["settings"] == content["settings"] | settings


def test_the_table_is_printed_and_written_as_markdown_with_its_seeds_and_ban(plain):
    out, content, printed = plain
    text, note, also, _ = printed.rsplit("\n", 4)[:4]
    table = table_of(content)
    assert text == format_table(table)
    assert note == "seeds 10 20; repeated n-grams banned: near no, far no"
    assert str(out / "table1.md") in also
    title = "### Table 1: ROUGE-L, mean ± standard deviation over seeds"
    page = "\n\n".join([title, format_table(table, markdown=True), note]) + "\n"
    assert (out / "table1.md").read_text() == page


def test_equal_seeds_give_equal_scores_and_different_seeds_do_not(world, tmp_path, plain):
    scores = plain[1]["scores"]["model"]
    assert scores_of(world, tmp_path / "a", "--batch", 1).items() <= scores.items()
    assert scores_of(world, tmp_path / "b", seeds=[20, 30])["near"][0] == scores["near"][1]
    assert len(set(scores_of(world, tmp_path / "c", seeds=[10, 11, 12])["near"])) == 3


def test_two_ranks_give_the_results_of_one(world, tmp_path, near, plain):
    """5 rows are shared out unequally, and of the other set one rank has none."""
    results, (_, content, _) = evaluate_near(near), plain
    sets = ["--data", world / "near", world / "far"]
    options = ["--max-new", 20, "--seeds", 10, 20, "--out", tmp_path / "two"]
    arguments = [str(argument) for argument in (world / "model", *sets, *options)]

    def on_each_rank():
        model, tokenizer = load_model(world / "model", dist.init_process()[0])
        key, options = (10, "evaluate", "near"), {"max_new_tokens": 20, "dtype": "float32"}
        own = evaluate(model, tokenizer, near, key, **options)
        (tmp_path / f"{dist.rank()}.json").write_text(json.dumps(own))
        main(arguments)

    ranks = fork_ranks(on_each_rank, 2, tmp_path / "log")
    statuses = wait_for(ranks, timeout=120)
    printed = "".join((tmp_path / f"log{rank}").read_text() for rank in range(2))
    assert statuses == [0, 0], printed
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == results
    assert table_1(tmp_path / "two")["scores"] == content["scores"]
    assert printed.count("ROUGE-L") == 1
    assert format_table(table_of(content)) in printed


def test_a_set_has_the_same_samples_next_to_another_of_its_name(world, tmp_path, plain):
    write_rows(world / "other" / "near" / "test.jsonl", [{"instruction": "Write.", "output": "a"}])
    scores = scores_of(world, tmp_path, sets=["near", "other/near"])
    assert list(scores) == [f"{world.name}/near", "other/near"]
    assert scores[f"{world.name}/near"] == plain[1]["scores"]["model"]["near"]


@pytest.mark.parametrize(
    "option",
    [
        ["--greedy"],
        ["--temperature", 3],
        ["--top-k", 2],
        ["--top-p", 0.3],
        ["--no-repeat-ngram", 1],
        ["--rows", 2],
    ],
)
def test_an_option_changes_the_samples(world, tmp_path, plain, option):
    content, printed = run(world, tmp_path, *option, sets=["near"])
    scores = content["scores"]["model"]["near"]
    assert scores != plain[1]["scores"]["model"]["near"]
    if option == ["--greedy"]:
        assert len(set(scores)) == 1
    if option == ["--no-repeat-ngram", 1]:
        assert content["no_repeat_ngram"] == {"near": 1}
        assert "banned: near 1" in printed


@pytest.mark.parametrize("public", [["dolly"], ["dolly", "dolly"]])
def test_6_grams_are_banned_on_public_sets_only(world, tmp_path, monkeypatch, public):
    def find_data_dir(name):
        return world / "near" if name == "dolly" else world / "far"

    def sample_all(model, requests, keys, *rest, no_repeat_ngram, **kwargs):
        bans[keys[0][2]] = no_repeat_ngram
        return [rest[:1]] * len(keys), None

    bans = {}
    monkeypatch.setattr("evaluate.find_data_dir", find_data_dir)
    monkeypatch.setattr("evaluate.sample_all", sample_all)
    options = ["--seeds", 10, "--out", tmp_path]
    printed = call(world / "model", "--data", *public, world / "far", *options)
    assert bans == table_1(tmp_path)["no_repeat_ngram"] == {"dolly": 6, "far": 0}
    assert "banned: dolly 6, far no" in printed


def test_a_public_set_that_the_paper_does_not_know_is_evaluated_as_any_data(
    tmp_path, monkeypatch, world
):
    """Without the ban, and not as in the paper."""
    monkeypatch.setitem(PUBLIC_SETS, "haiku", PublicSet("owner/haiku", {"test": "test.jsonl"}))
    monkeypatch.setattr("data.sets.prepare.DATA_DIR", tmp_path / "data")
    shutil.copytree(world / "near", tmp_path / "data" / "haiku")
    [column] = open_columns(["haiku"]).values()
    assert (column.ban, column.as_in_paper) == (0, False)
    out = tmp_path / "out"
    printed = call(world / "model", "--data", "haiku", "--seeds", 10, "--out", out, "--max-new", 20)
    assert table_1(out)["no_repeat_ngram"] == {"haiku": 0}
    assert "banned: haiku no" in printed


def test_runs_are_evaluated_on_the_data_that_they_share(tmp_path, world):
    """If it is the user's own and has a test set; the demo's runs on the demo."""
    near, far = str(world / "near"), str(world / "far")
    write_rows(tmp_path / "out" / "responses-x" / "train.jsonl", [{}])
    inside = write_rows(tmp_path / "out" / "own" / "test.jsonl", [{}]).parent
    cases = [
        ([near], [near]),
        ([near, near], [near]),
        (["own"], [str(inside)]),
        (["demo", "demo"], ["demo"]),
        (["dolly"], []),
        ([near, far], []),
        ([near, "dolly"], []),
        (["responses-x"], []),
        (["gone"], []),
        ([], []),
    ]
    for number, (data, expected) in enumerate(cases):
        parent = tmp_path / "out"
        runs = [make_run(parent, f"sft-{number}-{i}", data=name) for i, name in enumerate(data)]
        assert own_sets(open_models([world / "model", *runs])) == expected
    options = ["--seeds", 10, "--max-new", 2, "--out", tmp_path / "tables"]
    assert "ROUGE-L  near" in call(tmp_path / "out" / "sft-0-0", *options)


def test_shortened_requests_are_counted_of_kept_responses_too(world, tmp_path):
    rows = [{"input": "many " * 200}, {}]
    rows = [{"instruction": "Write.", "output": "a", **row} for row in rows]
    write_rows(tmp_path / "long" / "test.jsonl", rows)
    first, second = (run(world, tmp_path / "out", sets=[tmp_path / "long"])[1] for _ in range(2))
    assert first == second
    assert first.startswith("model on long: 1 of 2 requests were shortened to fit\n")
    assert first.count("were shortened") == 1


def test_rows_that_rouge_l_can_not_score_are_counted_once_per_set(world, tmp_path, plain):
    rows = [{"instruction": "Write.", "output": text} for text in (CHINESE, "a", [RUSSIAN, "!"])]
    path = write_rows(tmp_path / "mixed" / "test.jsonl", rows)
    options = {"sets": ["near", tmp_path / "mixed"]}
    content, printed = run(world, tmp_path / "out", models=["model", "model/"], **options)
    note = "2 of 3 rows have no reference that ROUGE-L can score (it drops all but a-z and 0-9)"
    assert printed.splitlines()[0] == f"mixed: {note}; they score 0"
    assert printed.count("can score") == 1
    assert content.keys() == plain[1].keys()
    responses = write_rows(tmp_path / "responses.jsonl", [{"text": CHINESE}] * 3)
    printed = call("--score", responses, "--references", path)
    assert printed == f"{path}: {note}; they score 0\nROUGE-L 0.0000 over 3 rows\n"


def test_a_lack_of_memory_is_one_line_that_names_model_set_and_option(world, tmp_path, monkeypatch):
    def fail(*arguments, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("evaluate.sample_all", fail)
    fix = "run evaluate.py with a lower --batch, or use a smaller model"
    assert error_of(run, world, tmp_path) == f"model on near: out of memory; {fix}"


def test_models_of_one_name_have_different_labels(world, tmp_path):
    for name in ["x/run", "y/run"]:
        write_checkpoint(world / name / "best", talker_config(), tiny_tokenizer())
    models = ["x/run", "y/run", "model"]
    content, printed = run(world, tmp_path, models=models, sets=["far"])
    assert list(content["scores"]) == ["x/run", "y/run", f"{world.name}/model"]
    assert len({str(scores) for scores in content["scores"].values()}) == 1
    assert all(f"\n{label} " in printed for label in content["scores"])


# ---- runs: their order, what is left out, the paper's scores -------------------------------------


def make_run(
    parent,
    name,
    model=True,
    config=None,
    complete=True,
    hours=0.5,
    paper=None,
    metrics=(),
    **settings,
):
    """A run's directory with the tiny model."""
    directory = parent / name
    directory.mkdir(parents=True)
    record = {"format": RUN_FORMAT, "name": name, "settings": {"data": "dolly", **settings}}
    if complete:
        record |= {"hours": hours, "complete": True}
    if paper:
        record["paper"] = paper
    (directory / "run.json").write_text(json.dumps(record))
    if model:
        write_checkpoint(directory / "best", config or talker_config(), tiny_tokenizer())
    if metrics:
        write_rows(directory / "metrics.jsonl", metrics)
    return directory


@pytest.fixture
def fixed_scores(monkeypatch):
    """A function that sets the scores {label: {set: scores}} of the models, which do not run."""

    def fix(scores):
        def evaluate_models(models, columns, seeds, *args, **kwargs):
            of_columns = {
                label: {name: scores[label][name][: len(seeds)] for name in columns}
                for label in models
            }
            return of_columns, {}

        monkeypatch.setattr("evaluate.evaluate_models", evaluate_models)

    return fix


def one_row_set(directory, name="near"):
    write_rows(directory / name / "test.jsonl", [{"instruction": "a", "output": "a"}])
    return directory / name


def test_rows_are_ordered_by_size_and_method_with_teachers_first(tmp_path, fixed_scores):
    small = replace(talker_config(), n_layer=1)
    kinds = ("init", "sft", "kd", "seqkd", "minillm", "gkd", "promptkd", "pretrain")
    of_a = [f"{kind}-a" if kind in ("init", "pretrain") else f"{kind}-a-s10" for kind in kinds]
    shuffled = [of_a[i] for i in (6, 5, 7, 2, 1, 0, 3, 4)]
    models = [
        write_checkpoint(tmp_path / "plain", small, tiny_tokenizer()),
        *(make_run(tmp_path, name) for name in shuffled),
        make_run(tmp_path, "promptkd-b-s10", config=small),
        make_run(tmp_path, "teacher-c", config=replace(small, n_layer=3)),
        make_run(tmp_path, "sft-b-s10", config=small, complete=False),
        make_run(tmp_path, "responses-c", model=False),
        tmp_path / "evaluation",
    ]
    (tmp_path / "evaluation").mkdir()
    data = one_row_set(tmp_path)
    fixed_scores(defaultdict(lambda: {"near": [1.0]}))
    printed = call(*models, "--data", data, "--out", tmp_path / "out").splitlines()
    assert printed[:2] == [
        f"{path}: has no model (neither best/ nor config.json), left out" for path in models[-2:]
    ]
    labels = [line.rsplit(None, 2)[0] for line in printed[3:15]]
    assert labels == ["teacher-c", "sft-b-s10 (unfinished)", "promptkd-b-s10", *of_a, "plain"]
    with pytest.raises(InputError, match="none of the directories has a model"):
        call(tmp_path / "responses-c", "--data", data)


TABLE_1 = {"dolly": 25.9, "self_inst": 13.1, "vicuna": 16.8, "sinst": 26.8, "uinst": 28.9}
N_ROWS = {"dolly": 5, "self_inst": 4, "vicuna": 2, "sinst": 6, "uinst": 7}


@pytest.fixture
def public(monkeypatch, tmp_path):
    """The five public sets, small, as if the paper's were of the same sizes."""
    for name, n_rows in N_ROWS.items():
        row = {"instruction": "Write.", "output": "a"}
        write_rows(tmp_path / "data" / name / "test.jsonl", [row] * n_rows)

    def find_data_dir(name):
        return tmp_path / "data" / name if name in N_ROWS else Path(name)

    monkeypatch.setattr("data.runs.paper.PAPER_SETS", N_ROWS)
    monkeypatch.setattr("evaluate.find_data_dir", find_data_dir)


@pytest.fixture
def reported_for(tmp_path, fixed_scores, public):
    """A function that evaluates a run whose scores are TABLE_1's ± 0.1. Returns the paper's scores
    for it and what is printed."""

    def evaluate_run(*options, paper="promptkd base", name="promptkd-gpt2-s10", sets=N_ROWS):
        if not (tmp_path / name).exists():
            make_run(tmp_path, name, paper=paper)
        scores = {column: [score - 0.1, score + 0.1] for column, score in TABLE_1.items()}
        fixed_scores({name: scores})
        options = ["--seeds", 10, 20, "--out", tmp_path / "out", *options]
        printed = call(tmp_path / name, "--data", *sets, *options)
        return table_1(tmp_path / "out")["paper"].get(name, {}), printed

    return evaluate_run


def test_the_papers_scores_are_next_to_a_run_evaluated_as_in_the_paper(reported_for):
    reported, printed = reported_for()
    assert reported == pytest.approx(TABLE_1 | {"dolly": 25.6, "average": 111.2 / 5})
    assert printed.splitlines()[1].split("  ") == [
        "promptkd-gpt2-s10",
        "25.9 ± 0.1 (25.6)",
        "13.1 ± 0.1 (13.1)",
        "16.8 ± 0.1 (16.8)",
        "26.8 ± 0.1 (26.8)",
        "28.9 ± 0.1 (28.9)",
        "22.3 ± 0.1 (22.2)",
    ]
    assert reported_for("--no-repeat-ngram", 6)[0] == reported
    assert reported_for("--rows", 2)[0] == {"vicuna": 16.8}  # all of its rows


@pytest.mark.parametrize(
    "option",
    [
        ["--rows", 1],
        ["--no-repeat-ngram", 0],
        ["--greedy"],
        ["--temperature", 0.9],
        ["--max-new", 128],
        ["--top-k", 5],
        ["--top-p", 0.9],
    ],
)
def test_the_papers_scores_are_not_next_to_another_evaluation(reported_for, option):
    assert reported_for(*option)[0] == {}


def test_the_papers_scores_are_not_next_to_other_sets_of_the_same_names(reported_for, tmp_path):
    assert reported_for(sets=[tmp_path / "data" / name for name in N_ROWS])[0] == {}


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
def test_each_kind_of_run_has_its_own_scores(reported_for, name, paper, dolly):
    assert reported_for(name=name, paper=paper)[0].get("dolly") == dolly


def test_published_students_have_their_scores_by_hub_id(
    tmp_path, monkeypatch, fixed_scores, public
):
    checkpoint = write_checkpoint(tmp_path / "plain", talker_config(), tiny_tokenizer())
    monkeypatch.setattr("data.models.named.find_model_dir", lambda name: checkpoint)
    fixed_scores(defaultdict(lambda: {"dolly": [27.0, 27.1]}))
    ids = [f"gmkim/GPT-2-{size}-distilled-PromptKD-Dolly-v1.0" for size in ("120M", "340M", "760M")]
    ids += ["MiniLLM/KD-gpt2-120M", "MiniLLM/SFT-gpt2-760M", "owner/other"]
    call(*ids, "--data", "dolly", "--out", tmp_path / "out")
    reported = table_1(tmp_path / "out")["paper"]
    assert [reported[name].get("dolly") for name in ids] == [25.6, 27.3, 26.9, 22.6, 24.9, None]


def test_the_papers_averages_are_those_of_its_figure_1_and_table_3():
    assert PAPER_SETS == {
        "dolly": 500,
        "self_inst": 242,
        "vicuna": 80,
        "sinst": 1694,
        "uinst": 10_000,
    }
    averages = {row: sum(scores) / 5 for row, scores in PAPER_SCORES.items()}
    assert len(averages) == 19
    # The paper's own averages are of unrounded scores.
    assert averages["promptkd base"] == pytest.approx(22.25, abs=0.02)
    assert averages["promptkd medium"] == pytest.approx(23.92, abs=0.02)
    assert averages["promptkd large"] == pytest.approx(25.08, abs=0.02)


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The demo's five sets and dolly, each with its name as instruction."""
    names = {name: "demo" if name == "test" else f"demo/{name}" for name in DEMO_SETS}
    for name, directory in {**names, "dolly": "dolly"}.items():
        path = tmp_path / directory / "test.jsonl"
        write_rows(path, [{"instruction": name, "output": "a"}])
    monkeypatch.setattr("data.runs.paper.PAPER_SETS", {"dolly": 500})
    monkeypatch.setattr("evaluate.find_data_dir", lambda name: tmp_path / name)


def test_sets_default_to_the_demos_for_its_runs_and_else_to_the_public_ones(
    tmp_path, fixed_scores, demo
):
    fixed_scores(defaultdict(lambda: defaultdict(lambda: [1.0])))
    a, b = (make_run(tmp_path, f"sft-{data}-s10", data=data) for data in ("demo", "dolly"))
    plain = write_checkpoint(tmp_path / "plain", talker_config(), tiny_tokenizer())
    demo_sets = ["test", "wording", "words", "longer", "combined"]
    for models, sets in [
        ([a], demo_sets),
        ([a, plain], demo_sets),
        ([a, b], ["dolly"]),
        ([plain], ["dolly"]),
    ]:
        call(*models, "--out", tmp_path / "out")
        for scores in table_1(tmp_path / "out")["scores"].values():
            assert list(scores) == [*sets, "average"]


def test_demo_names_five_sets_and_no_others_may_have_their_names(tmp_path, demo):
    columns = open_columns(["demo"])
    instructions = {name: column.rows[0].instruction for name, column in columns.items()}
    assert instructions == {name: name for name in DEMO_SETS}
    other = one_row_set(tmp_path / "other", "words")
    with pytest.raises(InputError, match="two sets are called 'words'"):
        open_columns(["demo", str(other)])


def test_evaluate_models_writes_no_files_by_default(world, tmp_path, near, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"max_new_tokens": 20, "dtype": "float32"}
    columns = {"near": Column(near)}
    scores, paths = evaluate_models({"one": world / "model"}, columns, [10], "cpu", **options)
    assert scores == {"one": {"near": [mean_rouge_l(evaluate_near(near))]}}
    assert paths == {"one": {"near": [None]}}
    assert not list(tmp_path.iterdir())


# ---- kept responses ----------------------------------------------------------------------------


@pytest.fixture
def sampled(monkeypatch):
    """The (seed, "evaluate", set, row) of all responses that are sampled."""
    keys, real = [], evaluate_module.sample_all

    def sample_all(model, requests, rng_keys, *args, **kwargs):
        keys.extend(rng_keys)
        return real(model, requests, rng_keys, *args, **kwargs)

    monkeypatch.setattr("evaluate.sample_all", sample_all)
    return keys


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_responses_are_kept_and_can_be_scored_again(world, plain):
    out, content, _ = plain
    kept = out / "responses" / "model"
    for name in ["near", "far"]:
        data = world / name / "test.jsonl"
        rows = read_rows(data)
        paths = [kept / f"{name}-s{seed}.jsonl" for seed in (10, 20)]
        assert content["responses"]["model"][name] == [str(path) for path in paths]
        for seed, path, score in zip((10, 20), paths, content["scores"]["model"][name]):
            lines = read_lines(path)
            assert [line["text"] for line in lines] == responses_to(rows, name, seed)
            assert [line["index"] for line in lines] == list(range(len(rows)))
            assert lines[0].keys() == {"index", "text", "rouge_l", "shortened"}
            printed = call("--score", path, "--references", data)
            assert printed == f"ROUGE-L {score:.4f} over {len(rows)} rows\n"
    assert len(list(kept.iterdir())) == 8
    assert not list(kept.glob(".*"))


def test_kept_responses_are_neither_sampled_again_nor_is_the_model_loaded(
    world, tmp_path, sampled, plain, monkeypatch
):
    first, _ = run(world, tmp_path, seeds=[10])
    assert len(sampled) == 6
    sampled.clear()
    second, printed = run(world, tmp_path)
    assert {key[0] for key in sampled} == {20}
    assert len(sampled) == 6
    assert "sampling again" not in printed
    assert second["scores"] == plain[1]["scores"]
    assert second["scores"]["model"]["near"][0] == first["scores"]["model"]["near"][0]
    monkeypatch.setattr("evaluate.load_model", None)
    assert run(world, tmp_path, "--batch", 1)[0]["scores"] == second["scores"]
    (tmp_path / "responses" / "model" / "near-s20.jsonl").unlink()
    with pytest.raises(TypeError):
        run(world, tmp_path)


def change_weights(directory, kept):
    path = directory / "model" / "model.safetensors"
    state = load_file(path)
    save_file(state | {"wpe.weight": 2 * state["wpe.weight"]}, path)


def change_tokenizer(directory, kept):
    path = directory / "model" / "vocab.json"
    path.write_text(path.read_text() + "\n")


def change_config(directory, kept):
    path = directory / "model" / "config.json"
    path.write_text(path.read_text() + "\n")


def change_row(directory, kept):
    path = directory / "near" / "test.jsonl"
    path.write_text(path.read_text().replace("none of it", "all of it"))


def change_response(directory, kept):
    kept.write_text(kept.read_text().replace('"text": "', '"text": "x'))


def remove_provenance(directory, kept):
    kept.with_suffix(".json").unlink()


def damage_provenance(directory, kept):
    kept.with_suffix(".json").write_text("{")


@pytest.mark.parametrize(
    "change, changed",
    [
        (change_weights, "model"),
        (change_tokenizer, "model"),
        (change_config, "model"),
        (change_row, "data"),
        (change_response, "responses"),
        (remove_provenance, "model, data"),
        (damage_provenance, "model, data"),
        (["--max-new", 19], "max_new_tokens"),
        (["--temperature", 2], "temperature"),
        (["--top-k", 3], "top_k"),
        (["--top-p", 0.5], "top_p"),
        (["--greedy"], "greedy"),
        (["--no-repeat-ngram", 1], "no_repeat_ngram"),
        (["--rows", 2], "data"),
    ],
)
def test_responses_of_another_provenance_are_sampled_again(
    world, tmp_path, sampled, change, changed
):
    write_checkpoint(tmp_path / "model", talker_config(), tiny_tokenizer())
    write_rows(tmp_path / "near" / "test.jsonl", read_lines(world / "near" / "test.jsonl"))
    out, what = tmp_path / "out", {"seeds": [10], "sets": ["near"]}
    before, _ = run(tmp_path, out, **what)
    sampled.clear()
    kept, options = out / "responses" / "model" / "near-s10.jsonl", []
    if callable(change):
        change(tmp_path, kept)
    else:
        options = change
    after, printed = run(tmp_path, out, *options, **what)
    assert len(sampled) == (2 if "--rows" in options else 5)
    assert printed.startswith(f"{kept}: made with different {changed}")
    assert printed.count("sampling again") == 1
    same_scores = callable(change) and change is not change_weights
    assert (after["scores"] == before["scores"]) == same_scores
    assert "sampling again" not in run(tmp_path, out, *options, **what)[1]


def test_one_progress_bar_counts_the_rows_of_the_whole_evaluation(world, tmp_path, monkeypatch):
    bars, steps = [], []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            if "total" in kwargs:
                bars.append((kwargs["total"], kwargs["disable"]))
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n):
            steps.append(n)

    monkeypatch.setattr("evaluate.tqdm", Bar)
    run(world, tmp_path, "--batch", 2)
    assert bars == [(12, None)]
    assert steps == [2, 2, 1, 2, 2, 1, 1, 1]


def test_samples_shows_requests_spread_over_the_set_with_all_responses(world, tmp_path, near):
    out, other = tmp_path / "out", tmp_path / "other" / "model"
    write_checkpoint(other, replace(talker_config(), n_layer=1), tiny_tokenizer())
    _, printed = run(world, out, "--samples", 2, models=["model", other])
    page = (out / "table6.md").read_text()
    assert page in printed
    sections = page.split("#### ")[1:]
    assert [section.splitlines()[0] for section in sections] == ["near, row 1", "near, row 3"]
    responses = read_lines(out / "responses" / "other" / "model" / "near-s10.jsonl")
    for section, row in zip(sections, [near[0], near[2]]):
        part = r"^(\S[^\n]*):\n\n((?:    [^\n]*\n|\n)*)"
        parts = re.findall(part, section + "\n", re.MULTILINE)
        expected = {
            "instruction": row.instruction,
            "reference": row.references[0],
            f"{world.name}/model": responses_to([row], "near", 10)[0],
            "other/model": responses[row.index]["text"],
        }
        found = {name: text.split() for name, text in parts}
        assert found == {name: text.split() for name, text in expected.items()}
    run(world, out, "--samples", 99)
    page = (out / "table6.md").read_text()
    assert page.count("#### ") == 5
    assert "input:\n\n    describes" in page


# ---- groups of runs ----------------------------------------------------------------------------

GROUPED = {
    "promptkd-a-s10": {"reg_weight": 1.0, "prompt_init": "text", "seed": 10},
    "promptkd-a-s20": {"reg_weight": 1.0, "prompt_init": "text", "seed": 20},
    "promptkd-a-reg0-s10": {"reg_weight": 0.0, "prompt_init": "text", "seed": 10},
    "promptkd-a-promptinitrandom-s10": {"reg_weight": 1.0, "prompt_init": "random", "seed": 10},
    "sft-a-s10": {"reg_weight": None, "prompt_init": None, "seed": 10},
}


@pytest.fixture
def group_by(tmp_path, fixed_scores):
    """A function that groups five runs, whose averages under two seeds are n and n + 2. Returns
    the groups and what is printed."""
    runs = [make_run(tmp_path, name, **settings) for name, settings in GROUPED.items()]
    data = one_row_set(tmp_path)
    fixed_scores({name: {"near": [n, n + 2.0]} for n, name in enumerate(GROUPED, start=1)})

    def group(*fields):
        options = ["--seeds", 10, 20, "--out", tmp_path / "out", "--by", *fields]
        printed = call(*runs, "--data", data, *options)
        path = tmp_path / "out" / f"table-by-{'-'.join(fields)}.json"
        return json.loads(path.read_text())["groups"], printed

    return group


def test_by_a_field_pools_the_runs_of_a_value(tmp_path, group_by, plots):
    groups, printed = group_by("reg_weight")
    assert groups == [
        {"values": ["0.0"], "runs": ["promptkd-a-reg0-s10"], "scores": [3, 5]},
        {
            "values": ["1.0"],
            "runs": ["promptkd-a-s10", "promptkd-a-s20", "promptkd-a-promptinitrandom-s10"],
            "scores": [1, 3, 2, 4, 4, 6],
        },
        {"values": ["-"], "runs": ["sft-a-s10"], "scores": [5, 7]},
    ]
    lines = ["reg_weight  runs    ROUGE-L", "0.0            1  4.0 ± 1.4"]
    lines += ["1.0            3  3.3 ± 1.8", "-              1  6.0 ± 1.4"]
    assert "\n".join(lines) in printed
    assert "| 1.0 | 3 | 3.3 ± 1.8 |" in (tmp_path / "out" / "table-by-reg_weight.md").read_text()
    assert (tmp_path / "out" / "figure-by-reg_weight.png").read_bytes().startswith(b"\x89PNG")


def test_by_two_fields_has_a_bar_for_each_pair(tmp_path, group_by, monkeypatch):
    plotted = []

    def plot_bars(path, bars, *args):
        plotted.append(bars)
        return str(path)

    monkeypatch.setattr("data.runs.report.plot_bars", plot_bars)
    _, printed = group_by("reg_weight", "prompt_init")
    assert plotted[-1] == {
        "reg_weight 0.0, prompt_init text": [3, 5],
        "reg_weight 1.0, prompt_init random": [4, 6],
        "reg_weight 1.0, prompt_init text": [1, 3, 2, 4],
        "reg_weight -, prompt_init -": [5, 7],
    }
    assert str(tmp_path / "out" / "figure-by-reg_weight-prompt_init.png") in printed
    groups, _ = group_by("name")
    assert [group["values"] for group in groups] == [[name] for name in sorted(GROUPED)]


def test_an_unknown_field_is_an_error_with_those_there_are(group_by):
    fields = "complete, data, format, hours, name, prompt_init, reg_weight, seed"
    for field in ("rag", "settings"):
        message = f"--by {field}: no run named has this field; .* {fields}"
        with pytest.raises(InputError, match=message):
            group_by(field)


# ---- plots -------------------------------------------------------------------------------------


def test_figure_1_has_a_bar_per_method_and_size_and_the_teacher_as_a_line(
    tmp_path, monkeypatch, fixed_scores, plots
):
    from matplotlib.figure import Figure

    drawn, small = [], replace(talker_config(), n_layer=1)
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **kwargs: drawn.append(figure))
    configs = {
        "teacher-c": None,
        "pretrain-a": None,
        "kd-a-s10": None,
        "gkd-a-s10": None,
        "gkd-b-s10": small,
        "gkd-b-lr1-s10": small,
    }
    runs = [make_run(tmp_path, name, config=config) for name, config in configs.items()]
    fixed_scores({name: {"near": [n, n + 2.0 * n]} for n, name in enumerate(configs, start=1)})
    call(*runs, "--data", one_row_set(tmp_path), "--out", tmp_path / "out")
    [axes] = drawn[0].axes
    bars = [container for container in axes.containers if hasattr(container, "patches")]
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    widths = dict(zip(ticks, (bar.patches[0].get_width() for bar in bars), strict=True))
    assert list(widths.items()) == [
        ("gkd-b-s10", 10),
        ("gkd-b-lr1-s10", 12),
        ("kd-a-s10", 6),
        ("gkd-a-s10", 8),
    ]
    for bar, n in zip(bars, [5, 6, 3, 4]):
        [[(low, _), (high, _)]] = bar.errorbar.lines[2][0].get_segments()
        assert high - low == pytest.approx(2 * n * math.sqrt(2))
    [line] = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert list(line.get_xdata()) == [2, 2]
    [legend] = drawn[0].legends
    assert [text.get_text().strip() for text in legend.get_texts()] == ["teacher-c"]
    assert axes.get_xlabel() == "ROUGE-L"
    assert "near" in axes.get_title()


def test_without_matplotlib_everything_else_works(world, tmp_path, monkeypatch, plots):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, printed = run(world, tmp_path)
    assert "no plot (ModuleNotFoundError" in printed
    assert not list(tmp_path.glob("*.png"))
    line = plot_bars(tmp_path / "none.png", {"a": [1.0]}, {}, "title")
    assert line.startswith("no plot (ModuleNotFoundError")


def test_an_error_while_drawing_is_one_line(tmp_path, plots):
    def fail(figure):
        raise ValueError("two\nlines")

    assert save_plot(tmp_path / "a.png", fail) == "no plot (ValueError: two lines)"
    assert save_plot(tmp_path, lambda figure: None).startswith("no plot (FileExistsError: ")
    for _ in range(2):  # metrics.jsonl is missing, then damaged
        assert plot_curves(tmp_path).startswith("no plot (InputError: ")
        (tmp_path / "metrics.jsonl").write_text("{")
    assert not list(tmp_path.glob("*.png"))
    nothing_to_compare = plot_bars(tmp_path / "a.png", {}, {"teacher": 1.0}, "title")
    assert nothing_to_compare == str(tmp_path / "a.png")


# ---- Table 2 -----------------------------------------------------------------------------------


def table_2(directory, *names):
    """The costs in table2.json and what is printed."""
    runs = [directory / name for name in names]
    printed = call("--cost", *runs, "--out", directory / "out")
    return json.loads((directory / "out" / "table2.json").read_text())["costs"], printed


def test_table_2_has_each_runs_peak_memory_and_hours_next_to_the_papers(tmp_path):
    gpu = [
        {"step": step, "memory_allocated_gb": gb, "memory_reserved_gb": gb + 1}
        for step, gb in enumerate([3.0, 6.0, 5.0])
    ]
    cpu = [{"step": 1, "memory_resident_gb": 1.5}, {"step": 2, "memory_resident_gb": 1.4}]
    for name, options in {
        "gkd-gpt2-s10": {"hours": 8.0, "paper": "gkd base", "metrics": [{"step": 0}, *gpu]},
        "gkd-gpt2-large-s10": {"complete": False, "paper": "gkd large", "metrics": gpu[:1]},
        "sft-tiny-s10": {"hours": 0.25, "metrics": cpu},
        "responses-gpt2-xl": {"hours": 0.125},
    }.items():
        make_run(tmp_path, name, model=False, **options)
    (tmp_path / "empty").mkdir()
    names = ["gkd-gpt2-s10", "gkd-gpt2-large-s10", "sft-tiny-s10", "responses-gpt2-xl", "empty"]
    costs, printed = table_2(tmp_path, *names)
    lines = printed.splitlines()
    assert lines[0] == f"{tmp_path / 'empty'}: has no run.json, left out"
    assert [line.split() for line in lines[1:6]] == [
        ["cost", "allocated,", "GB", "reserved,", "GB", "hours", "resident,", "GB"],
        ["sft-tiny-s10", "-", "-", "0.25", "1.50"],
        ["gkd-gpt2-s10", "6.00", "(6.23)", "7.00", "(6.93)", "8.00", "(8.48)", "-"],
        ["gkd-gpt2-large-s10", "(unfinished)", "3.00", "4.00", "-", "-"],
        ["responses-gpt2-xl", "-", "-", "0.12", "-"],
    ]
    assert "in brackets" in lines[6]
    row = "| gkd-gpt2-s10 | 6.00 (6.23) | 7.00 (6.93) | 8.00 (8.48) | - |"
    assert row in (tmp_path / "out" / "table2.md").read_text()
    assert costs["gkd-gpt2-s10"] == {
        "measured": {"memory_allocated_gb": 6.0, "memory_reserved_gb": 7.0, "hours": 8.0},
        "paper": {"memory_allocated_gb": 6.23, "memory_reserved_gb": 6.93, "hours": 8.48},
    }
    with pytest.raises(InputError, match="none of the directories has a run.json"):
        table_2(tmp_path, "empty")


# ---- responses from elsewhere ------------------------------------------------------------------

TEXTS = [{"text": "a b c d", "ids": [1]}, {"text": "running"}, {"text": ""}]
OUTPUTS = [
    {"output": ["x", "a c"]},
    {"output": "run", "instruction": "ignored"},
    {"output": "nothing"},
]


def score(directory, texts, outputs):
    responses = write_rows(directory / "responses.jsonl", texts)
    references = write_rows(directory / "test.jsonl", outputs)
    options = ["--score", responses, "--references", references]
    run_command_line(lambda: main([str(option) for option in options]))


def test_a_file_of_responses_is_scored(tmp_path, capsys):
    score(tmp_path, TEXTS, OUTPUTS)
    assert capsys.readouterr().out == f"ROUGE-L {500 / 9:.4f} over 3 rows\n"  # 200 / 3, 100 and 0


def test_scoring_a_file_writes_nothing(tmp_path, monkeypatch):
    write_rows(tmp_path / "responses.jsonl", TEXTS)
    write_rows(tmp_path / "test.jsonl", OUTPUTS)
    monkeypatch.chdir(tmp_path)
    call("--score", "responses.jsonl", "--references", "test.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["responses.jsonl", "test.jsonl"]
