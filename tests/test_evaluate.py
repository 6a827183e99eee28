"""ROUGE-L of responses, of models, and of a file; the table; and the same scores on any number of ranks."""

import json
import socket
import statistics

import numpy as np
import pytest

from data.files import InputError, command
from data.rows import fill_template, read_rows
from evaluate import evaluate, format_score, main, mean_rouge_l, named_once, rouge_l, table
from helpers import ROOT, run_command, talker_config, tiny_model, tiny_tokenizer, write_checkpoint, write_rows
from model import CheckpointError
from sample import row_uniforms, sample, to_text

# ---- ROUGE-L -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("response, references, score", [
    ("the cat sat on the mat", ["the cat is on the mat"], 100 * 5 / 6),  # 5 words in common, of 6 and 6
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
])  # fmt: skip
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
        text, *several = [rng.choice(["a", "b", "c", "d"], size).tolist() for size in rng.integers(1, 8, 3)]
        texts.append(" ".join(text))
        references.append([" ".join(words) for words in several])
        scores.append(max(200 * common(text, words) / (len(text) + len(words)) for words in several))
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
    scores = {"teacher": {"near": [50.0, 52.0], "far": [20.0, 30.0]}, "init-of-a-student": {"near": [9.0, 9.0], "far": [1.0, 2.0]}}
    assert table(scores).splitlines() == [
        "ROUGE-L                  near         far     average",
        "teacher            51.0 ± 1.4  25.0 ± 7.1  38.0 ± 4.2",  # the averages of the two seeds are 35 and 41
        "init-of-a-student   9.0 ± 0.0   1.5 ± 0.7   5.2 ± 0.4",
    ]
    assert table({"a": {"near": [50.0]}}).splitlines() == ["ROUGE-L  near  average", "a        50.0     50.0"]


def test_labels_take_as_many_folders_as_tell_them_apart(tmp_path):
    for name in ["x/run", "y/run", "y/other", "gpt2"]:
        (tmp_path / name).mkdir(parents=True)
    x, y, other, gpt2 = (str(tmp_path / name) for name in ["x/run", "y/run", "y/other", "gpt2"])
    assert named_once([x, other]) == ["run", "other"]
    assert named_once([x, f"{y}/", other]) == ["x/run", "y/run", "y/other"]
    assert named_once(["gpt2", "owner/name"]) == ["gpt2", "owner/name"]
    assert named_once(["gpt2", gpt2]) == ["gpt2", f"{tmp_path.name}/gpt2"]
    assert named_once([x, x]) == ["run", "run"]


# ---- models ------------------------------------------------------------------------------------------------------------------

WHAT = ["--max-new", 20, "--seeds", 10, 20]


def said(row, set_name, seed, max_new=20):
    """What the tiny model says to a row, sampled alone."""
    tokenizer = tiny_tokenizer()
    request = tokenizer.encode_ordinary(fill_template(row["instruction"], row.get("input", "")))
    [response], _ = sample(tiny_model(talker_config()), [request], row_uniforms(max_new, seed, "evaluate", set_name, row["index"])[None], tokenizer.eot_token, max_new)
    return to_text(response, tokenizer)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, and two sets whose references are parts of what it says under seed 10 (else every score would be 0)."""
    home = tmp_path_factory.mktemp("world")
    write_checkpoint(home / "model", talker_config(), tiny_tokenizer())
    for name, size in [("near", 5), ("far", 1)]:
        rows = [{"index": n, "instruction": "Write a task." * (n + 1), "input": "describes" * (n % 2)} for n in range(size)]
        for row in rows:
            words = said(row, name, 10).split()
            row["output"] = [" ".join(words[: (len(words) + 1) // 2]), "none of it"]
        write_rows(home / name / "test.jsonl", rows)
    return home


def run(world, capsys, *arguments, models=("model",), sets=("near", "far")):
    """The JSON file and the output of the command."""
    main([str(a) for a in [*(world / name for name in models), "--data", *(world / name for name in sets), *arguments, "--json", world / "scores.json"]])
    return json.loads((world / "scores.json").read_text()), capsys.readouterr().out


def test_evaluate_gives_each_rows_own_text_and_score(world):
    rows, data = read_rows(world / "near" / "test.jsonl"), [json.loads(line) for line in open(world / "near" / "test.jsonl")]
    for chosen in [rows, rows[:0:-2]]:  # rows keep their random numbers, whichever of them are asked for
        results = evaluate(tiny_model(talker_config()), tiny_tokenizer(), chosen, (10, "evaluate", "near"), max_new=20, at_once=2)
        assert [result["index"] for result in results] == sorted(row.index for row in chosen)
        for result in results:
            row = data[result["index"]]
            assert result["text"] == said(row, "near", 10) and not result["shortened"]
            assert result["rouge_l"] == rouge_l([result["text"]], [row["output"]])[0]
    assert 20 < mean_rouge_l(results) < 100


def test_the_json_file_has_the_score_of_each_seed_and_the_settings(world, capsys):
    content, _ = run(world, capsys, *WHAT, "--batch", 2)
    assert content.keys() == {"scores", "settings", "no_repeat_ngram"} and content["scores"].keys() == {"model"}
    for name in ["near", "far"]:
        rows = [json.loads(line) for line in open(world / name / "test.jsonl")]
        means = [statistics.fmean(rouge_l([said(row, name, seed) for row in rows], [row["output"] for row in rows])) for seed in (10, 20)]
        assert content["scores"]["model"][name] == pytest.approx(means)
        assert means[0] > means[1] + 5
    assert content["no_repeat_ngram"] == {"near": 0, "far": 0}
    assert content["settings"] | {"seeds": [10, 20], "max_new": 20, "batch": 2, "greedy": False, "temperature": 1.0, "rows": None} == content["settings"]


def test_the_output_is_the_table_with_its_seeds_and_ban(world, capsys):
    content, out = run(world, capsys, *WHAT)
    assert out.splitlines() == [
        *table(content["scores"]).splitlines(), "seeds 10 20; repeated n-grams banned: near no, far no", f"also in {world / 'scores.json'}",
    ]  # fmt: skip


def test_the_same_seeds_give_the_same_scores_and_others_do_not(world, capsys):
    scores = run(world, capsys, *WHAT)[0]["scores"]["model"]
    assert run(world, capsys, *WHAT, "--batch", 1)[0]["scores"]["model"] == scores
    assert run(world, capsys, "--max-new", 20, "--seeds", 20, 30)[0]["scores"]["model"]["near"][0] == scores["near"][1]
    assert len({run(world, capsys, "--max-new", 20, "--seeds", seed)[0]["scores"]["model"]["near"][0] for seed in [10, 11, 12]}) == 3


# What each of two ranks runs: evaluate() itself, and then the command.
RANK = """
import json, sys
from data import ranks
from data.files import command
from data.rows import read_rows
from evaluate import evaluate, main
from sample import load_model

home, *arguments = sys.argv[1:]
model, tokenizer = load_model(f"{home}/model", ranks.start())
results = evaluate(model, tokenizer, read_rows(f"{home}/near/test.jsonl"), (10, "evaluate", "near"), max_new=20)
with open(f"{home}/rank-{ranks.rank()}-of-{ranks.world()}.json", "w") as file:
    json.dump(results, file)
command(lambda: main(arguments))
"""


def test_two_ranks_give_the_results_of_one(world, capsys):
    scores = run(world, capsys, *WHAT)[0]["scores"]  # 5 rows are shared out unequally, and of the other set one rank has none
    rows = read_rows(world / "near" / "test.jsonl")
    results = evaluate(tiny_model(talker_config()), tiny_tokenizer(), rows, (10, "evaluate", "near"), max_new=20)
    (world / "rank.py").write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free.getsockname()[1]}"]
    arguments = [world / "model", "--data", world / "near", world / "far", *WHAT, "--json", world / "two.json"]
    done = run_command(*launcher, world / "rank.py", world, *arguments, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert json.loads((world / f"rank-{rank}-of-2.json").read_text()) == results
    assert json.loads((world / "two.json").read_text())["scores"] == scores
    assert done.stdout.count("ROUGE-L") == 1 and table(scores) in done.stdout


def test_a_set_draws_the_same_beside_another_of_its_name(world, capsys):
    alone = run(world, capsys, *WHAT, sets=["near"])[0]["scores"]["model"]["near"]
    write_rows(world / "other" / "near" / "test.jsonl", [{"instruction": "Write.", "output": "a"}])
    scores = run(world, capsys, *WHAT, sets=["near", "other/near"])[0]["scores"]["model"]
    assert list(scores) == [f"{world.name}/near", "other/near"] and scores[f"{world.name}/near"] == alone


def test_decoding_options_and_rows_reach_the_sampling(world, capsys):
    plain = run(world, capsys, *WHAT, sets=["near"])[0]["scores"]["model"]["near"]
    for option in [["--greedy"], ["--temperature", 3], ["--top-k", 2], ["--top-p", 0.3], ["--no-repeat-ngram", 1], ["--rows", 2]]:
        content, out = run(world, capsys, *WHAT, *option, sets=["near"])
        assert content["scores"]["model"]["near"] != plain
        if option == ["--greedy"]:
            assert len(set(content["scores"]["model"]["near"])) == 1
        if option == ["--no-repeat-ngram", 1]:
            assert content["no_repeat_ngram"] == {"near": 1} and "banned: near 1" in out


def test_the_ban_of_6_grams_is_on_for_a_public_set_alone(world, capsys, monkeypatch):
    monkeypatch.setattr("evaluate.data_directory", lambda name: world / "near" if name == "dolly" else world / "far")
    seen = {}
    monkeypatch.setattr("evaluate.sample_all", lambda m, requests, keys, end, no_repeat, **how: seen.update({keys[0][2]: no_repeat}) or ([[end]] * len(keys), None))
    main([str(world / "model"), "--data", "dolly", str(world / "far"), "--seeds", "10", "--json", str(world / "ban.json")])
    assert seen == {"dolly": 6, "far": 0} == json.loads((world / "ban.json").read_text())["no_repeat_ngram"]
    assert "banned: dolly 6, far no" in capsys.readouterr().out
    main([str(world / "model"), "--data", "dolly", "dolly", str(world / "far"), "--seeds", "10", "--json", str(world / "twice.json")])
    assert json.loads((world / "twice.json").read_text())["no_repeat_ngram"] == {"dolly": 6, "far": 0}


def test_shortened_requests_are_counted(world, capsys):
    rows = [{"instruction": "Write.", "input": "many " * 200, "output": "a"}, {"instruction": "Write.", "output": "a"}]
    write_rows(world / "long" / "test.jsonl", rows)
    _, out = run(world, capsys, *WHAT, sets=["long"])
    assert out.startswith("model on long: 1 of 2 requests were shortened to fit\n") and out.count("shortened") == 1


def test_models_of_the_same_name_are_told_apart(world, capsys):
    for folder in ["x/run", "y/run"]:
        write_checkpoint(world / folder / "best", talker_config(), tiny_tokenizer())
    content, out = run(world, capsys, *WHAT, models=["x/run", "y/run", "model"], sets=["far"])
    assert list(content["scores"]) == ["x/run", "y/run", f"{world.name}/model"]
    assert len({str(scores) for scores in content["scores"].values()}) == 1 and len(out.splitlines()) == 6


# ---- responses made elsewhere ------------------------------------------------------------------------------------------------

TEXTS = [{"text": "a b c d", "ids": [1]}, {"text": "running"}, {"text": ""}]
OUTPUTS = [{"output": ["x", "a c"]}, {"output": "run", "instruction": "no matter"}, {"output": "nothing"}]


def score(tmp_path, texts, outputs):
    responses, references = write_rows(tmp_path / "responses.jsonl", texts), write_rows(tmp_path / "test.jsonl", outputs)
    command(lambda: main(["--score", str(responses), "--references", str(references), "--json", str(tmp_path / "out" / "s.json")]), CheckpointError)


def test_a_file_of_responses_is_scored_row_by_row(tmp_path, capsys):
    score(tmp_path, TEXTS, OUTPUTS)
    assert capsys.readouterr().out == "ROUGE-L 55.5556 over 3 rows\n"
    content = json.loads((tmp_path / "out" / "s.json").read_text())
    assert content["rows"] == pytest.approx([200 / 3, 100, 0]) and content["rouge_l"] == pytest.approx(500 / 9)


def test_scoring_a_file_writes_nothing_unasked(tmp_path, monkeypatch):
    write_rows(tmp_path / "responses.jsonl", TEXTS), write_rows(tmp_path / "test.jsonl", OUTPUTS)
    monkeypatch.chdir(tmp_path)
    main(["--score", "responses.jsonl", "--references", "test.jsonl"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["responses.jsonl", "test.jsonl"]


@pytest.mark.parametrize("texts, outputs, words", [
    (TEXTS[:2], OUTPUTS, "2 responses for 3 rows"),
    (TEXTS, OUTPUTS[:2], "3 responses for 2 rows"),
    ([*TEXTS[:2], {"txt": "a"}], OUTPUTS, "responses.jsonl, line 3: 'text'"),
    ([{"text": ["a"]}, *TEXTS[1:]], OUTPUTS, "responses.jsonl, line 1: 'text'"),
    (TEXTS, [*OUTPUTS[:1], {"output": []}, OUTPUTS[2]], "test.jsonl, line 2: 'output'"),
    (TEXTS, [*OUTPUTS[:1], {"output": ["a", 3]}, OUTPUTS[2]], "test.jsonl, line 2: 'output'"),
    (TEXTS, [*OUTPUTS[:2], {"instruction": "a"}], "test.jsonl, line 3: 'output'"),
    ([], OUTPUTS, "responses.jsonl: has no rows"),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_one_line_of_error(tmp_path, capsys, texts, outputs, words):
    with pytest.raises(SystemExit) as exit:
        score(tmp_path, texts, outputs)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and not (tmp_path / "out").exists()
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("arguments, words", [
    ([], "name at least one"),
    (["--score", "a.jsonl"], "--references"),
    (["--references", "a.jsonl"], "--references"),
    (["model", "--score", "a.jsonl", "--references", "b.jsonl"], "without models"),
    (["--score", "none.jsonl", "--references", "b.jsonl"], "none.jsonl: no such file"),
    (["model", "--data", "nowhere"], "'nowhere': no such directory"),
    (["model", "--data", "model"], "test.jsonl: no such file"),
    (["nonsense", "--data", "near"], "'nonsense': no such directory"),
    (["near", "--data", "near"], "config.json: no such file"),
    (["model", "--data", "near", "--max-new", "280"], "exceed the model's 288 positions"),
])  # fmt: skip
def test_a_wrong_command_is_one_line_of_error(world, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit) as exit:
        command(lambda: main([*arguments, "--json", "never.json"]), CheckpointError)
    _, err = capsys.readouterr()
    assert exit.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not (world / "never.json").exists()


def test_a_wrong_command_ends_the_process_with_status_2(world):
    done = run_command("evaluate.py", world / "model", "--data", world / "model")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
