"""Runs that commit e4fde81 made, in golden/runs-e4fde81: they resume, evaluate and open as before.

The folder is an --out with its data in it (`words`) and two pre-trained models: those of
helpers.write_checkpoint with 2x8x2 and 1x4x1 layers, width and heads, 352 positions and
tiny_tokenizer, after 120 and 50 steps of `--method sft --lr 0.02` on four copies of the rows of
words/train.jsonl. In this folder, with the programs of e4fde81:

    TRAIN="python train.py --teacher tiny-8 --student tiny-4 --data words --out . --global-batch 4"
    $TRAIN --lr 0.2 --prompt-lr 0.1 --steps 6 --keep 2      # PROMPTKD
    $TRAIN --lr 0.2 --steps 10 --method minillm             # MINILLM
    python evaluate.py init-* MINILLM PROMPTKD --data words --seeds 10 --out evaluation
    python exposure_bias.py --teacher teacher-* --along PROMPTKD --data words --steps 8 \\
        --out exposure_bias         # and with --students init-* PROMPTKD
    python prompt.py PROMPTKD

`unfinished` has both runs as the same commands left them when they were interrupted: PROMPTKD by
SIGKILL after step 3, with the state of step 2, and MINILLM by SIGTERM after step 4 of the 8 of a
rollout. `evaluate.py unfinished/PROMPTKD` wrote evaluation/unfinished. Plots and sampled responses
are left out.

The tests use command lines and files only, so that they hold however the code is arranged. Numbers
are compared with a tolerance, not bit by bit: a KL that is computed in another order of operations
is rounded differently.
"""

import json
import runpy
import shutil
import sys

import pytest
import torch
from helpers import ROOT, files_below
from safetensors.torch import load_file

import evaluate
import exposure_bias
import train

OLD = ROOT / "tests" / "golden" / "runs-e4fde81"
TEACHER, INIT = "teacher-tiny-8-words", "init-tiny-4-words"
PROMPTKD = "promptkd-tiny-4-words-lr0.2-promptlr0.1-steps6-globalbatch4-s10"
MINILLM = "minillm-tiny-4-words-lr0.2-steps10-globalbatch4-s10"
OPTIONS = {
    PROMPTKD: "--lr 0.2 --prompt-lr 0.1 --steps 6 --keep 2",
    MINILLM: "--lr 0.2 --steps 10 --method minillm",
}
SAVED_STEP = {PROMPTKD: 2, MINILLM: 4}  # from which the unfinished run resumes
both_runs = pytest.mark.parametrize("run", OPTIONS, ids=["promptkd", "minillm"])
TOLERANCE = 1e-5  # rounding makes 1e-6, and the resumed steps change the weights by 1e-3 and more


@pytest.fixture
def out(tmp_path):
    """A copy of the runs, in another place than where they were made."""
    return shutil.copytree(OLD, tmp_path / "out")


def train_again(out, run):
    """Give the command line of a run again."""
    models = ["--teacher", f"{out}/tiny-8", "--student", f"{out}/tiny-4"]
    options = ["--data", f"{out}/words", "--out", str(out), "--global-batch", "4"]
    train.main(models + options + OPTIONS[run].split())


def show_prompt(run, monkeypatch):
    """`python prompt.py RUN`, in this process. Returns the content of its prompt.json, with one
    response as at that time."""
    monkeypatch.setattr(sys, "argv", ["prompt.py", str(run)])
    runpy.run_path(str(ROOT / "prompt.py"), run_name="__main__")
    content = read_json(run / "prompt.json")
    [response, *_] = content.pop("responses")
    return content | {"response": response}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(run):
    return (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def read_weights(path):
    """The tensors of a file, without the keys' biases. They add the same number to all scores of a
    softmax, so that their gradient is nothing but rounding, which AdamW makes as large as any."""
    weights = load_file(path)
    for name, values in weights.items():
        if name.endswith("c_attn.bias"):  # (3 C,), of queries, keys and values
            values.view(3, -1)[1] = 0
    return weights


def assert_close(found, expected):
    """Compare content of JSON files, numbers with the tolerance."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected):
            assert_close(*pair)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    else:
        assert found == expected


def assert_same_metrics(run, old):
    """Compare the losses and scores of all steps."""
    metrics, expected = (list(map(json.loads, read_lines(path))) for path in (run, old))
    assert [step["step"] for step in metrics] == [step["step"] for step in expected]
    for step, expected_step in zip(metrics, expected):
        names = expected_step.keys() & {"loss", "prompt_loss", "val_loss", "val_rouge_l"}
        assert_close([step.get(name) for name in names], [expected_step[name] for name in names])


# ---- train.py ------------------------------------------------------------------------------------


@both_runs
def test_an_unfinished_run_resumes_and_ends_as_without_the_interruption(
    out, run, capsys, monkeypatch
):
    old, resumed, start = OLD / run, out / run, SAVED_STEP[run]
    shutil.rmtree(resumed)
    (out / "unfinished" / run).rename(resumed)
    saved_lines = [line for line in read_lines(resumed) if json.loads(line)["step"] <= start]
    train_again(out, run)
    assert f"resuming after step {start}" in capsys.readouterr().out
    assert read_lines(resumed)[: len(saved_lines)] == saved_lines
    assert_same_metrics(resumed, old)

    # Neither a state nor a lock is left.
    saved = [name for name in files_below(old) if name.endswith("/config.json")]
    added = {"curves.png", "best/README.md"}
    for file in ("generation_config.json", "tokenizer_config.json"):
        added |= {name.replace("config.json", file) for name in saved}
    assert set(files_below(resumed)) == {*files_below(old), *added} - {"prompt.json"}
    for name in files_below(old):
        if name.endswith(".safetensors"):
            weights, expected = read_weights(resumed / name), read_weights(old / name)
            torch.testing.assert_close(weights, expected, rtol=TOLERANCE, atol=TOLERANCE)
    record, expected = read_json(resumed / "run.json"), read_json(old / "run.json")
    del expected["hours"]
    assert_close({name: record.get(name) for name in expected}, expected)
    assert record["format"] == 3
    assert record["best_step"] > start  # so best/ is of a step of today's code
    if run == PROMPTKD:
        assert_close(show_prompt(resumed, monkeypatch), read_json(old / "prompt.json"))

    # What was made of these runs is still theirs.
    train_again(out, run)
    assert f"{resumed}: complete, skipped" in capsys.readouterr().out


@both_runs
def test_a_complete_run_is_skipped_with_its_stages(out, run, capsys):
    train_again(out, run)
    printed = capsys.readouterr().out
    for name in (TEACHER, INIT, run):
        assert f"{out / name}: complete, skipped" in printed
    assert files_below(out) == files_below(OLD)
    assert all((out / name).read_bytes() == (OLD / name).read_bytes() for name in files_below(OLD))


# ---- evaluate.py, exposure_bias.py, prompt.py ----------------------------------------------------


@pytest.mark.parametrize(
    "runs, table",
    [
        ([INIT, MINILLM, PROMPTKD], "evaluation/table1.json"),
        ([f"unfinished/{PROMPTKD}"], "evaluation/unfinished/table1.json"),
    ],
    ids=["complete", "unfinished"],
)
def test_table_1_has_the_scores_of_that_time(out, tmp_path, runs, table):
    names = [str(out / run) for run in runs]
    options = ["--data", str(out / "words"), "--seeds", "10", "--out", str(tmp_path / "evaluation")]
    evaluate.main([*names, *options])
    scores = read_json(tmp_path / "evaluation" / "table1.json")["scores"]
    assert_close(scores, read_json(OLD / table)["scores"])


def test_table_2_has_the_hours_of_that_time(out, tmp_path):
    names = [str(out / PROMPTKD), str(out / "unfinished" / MINILLM)]
    evaluate.main([*names, "--cost", "--out", str(tmp_path / "evaluation")])
    costs = read_json(tmp_path / "evaluation" / "table2.json")["costs"]
    assert set(costs) == {PROMPTKD, f"{MINILLM} (unfinished)"}
    assert costs[PROMPTKD]["measured"]["hours"] == read_json(OLD / PROMPTKD / "run.json")["hours"]


@pytest.mark.parametrize(
    "students, figure",
    [
        (["--students", INIT, PROMPTKD], "figure_3a"),
        (["--along", PROMPTKD], "figure_3b"),
    ],
    ids=["3a", "3b"],
)
def test_exposure_bias_is_that_of_that_time(out, tmp_path, students, figure):
    option, *runs = students
    names = [option, *(str(out / run) for run in runs)]
    options = ["--data", str(out / "words"), "--steps", "8", "--out", str(tmp_path / "bias")]
    exposure_bias.main(["--teacher", str(out / TEACHER), *names, *options])
    found = read_json(tmp_path / "bias" / f"{figure}.json")
    expected = read_json(OLD / "exposure_bias" / f"{figure}.json")
    del found["settings"], expected["settings"]
    assert_close(found, expected)


def test_prompt_py_opens_a_complete_run(out, monkeypatch):
    run = out / PROMPTKD
    (run / "prompt.json").unlink()
    assert_close(show_prompt(run, monkeypatch), read_json(OLD / PROMPTKD / "prompt.json"))
