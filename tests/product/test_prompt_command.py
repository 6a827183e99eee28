"""`python prompt.py RUN`: every number against a direct computation, the files, and the errors."""

import json
import re
import runpy
import shutil
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    after_device,
    error_of,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    write_checkpoint,
    write_rows,
)

from data.models.hub import file_hash, model_hash
from data.models.prompts import save_prompt
from data.runs import report
from data.runs.methods import Settings
from data.runs.report import plot_responses
from data.runs.runs import RUN_FORMAT
from data.runs.tuned_prompt import describe_vectors, main
from data.sets.rows import fill_template
from prompt import initial_prompt, prepend
from sample import row_uniforms, sample

TOKENIZER = tiny_tokenizer()
STUDENT_CONFIG = replace(talker_config(), n_layer=1, n_embd=16)
TEACHER, STUDENT = tiny_model(talker_config()), tiny_model(STUDENT_CONFIG)
WTE = TEACHER.wte.weight.detach()
EOS = TOKENIZER.eot_token
TEXT = "Write a task."
TEXT_TOKENS = TOKENIZER.encode_ordinary(TEXT)
ROWS = [
    {"instruction": "Write a response.", "output": " Write"},
    {"instruction": "Describe it.", "input": "a task", "output": ["a task\n that", "other"]},
    {"instruction": "Context?", "output": " provides further context"},
    {"instruction": "many " * 200, "output": "its request is over the limit"},
    {"instruction": "Not one of the run's rows.", "output": "beyond max_dev_rows"},
]
N_ROWS, N_USED, MAX_NEW, SEED = 4, 3, 50, 7
MOVED = torch.linspace(0.1, 2.0, len(TEXT_TOKENS))
SETTINGS = {"method": "promptkd", "student": "init", "teacher": "teacher", "data": "set"}
SETTINGS |= {"global_batch_size": 8, "lr": 0.1, "epochs": 1, "seed": SEED, "max_dev_rows": N_ROWS}
SETTINGS |= {"max_new_tokens": MAX_NEW, "prompt_text": TEXT, "prompt_init": "text"}


def displaced(P_0):
    """Each vector moved by its part of MOVED of its length, in a random direction."""
    directions = torch.randn(P_0.shape, generator=torch.Generator().manual_seed(1))
    directions /= directions.norm(dim=1, keepdim=True)
    return P_0 + MOVED[: len(P_0), None] * P_0.norm(dim=1, keepdim=True) * directions


P = displaced(WTE[TEXT_TOKENS])


def write_run(directory, P, record=(), **settings):
    """A complete PromptKD run, without what only training needs."""
    write_checkpoint(directory / "best", STUDENT_CONFIG, TOKENIZER)
    if P is not None:
        save_prompt(P, directory / "best")
    settings = asdict(Settings(**SETTINGS | settings))
    content = {"format": RUN_FORMAT, "name": directory.name, "settings": settings}
    content |= {"complete": True, **dict(record)}
    (directory / "run.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A directory of runs, with the teacher and the data in it: run.json names them relative to
    it."""
    out = tmp_path_factory.mktemp("out")
    write_checkpoint(out / "teacher", talker_config(), TOKENIZER)
    write_rows(out / "set" / "dev.jsonl", ROWS)
    return out


@pytest.fixture(scope="module")
def run(out):
    return write_run(out / "promptkd-tiny-s7", P)


@pytest.fixture(scope="module")
def content(run):
    return inspect(run)


def inspect(directory, has_plot=False):
    """Run the command and return the content of its prompt.json. A plot takes longer than it."""
    with pytest.MonkeyPatch.context() as patch:
        if not has_plot:
            patch.setattr(report, "plot_responses", lambda path, responses: "no plot")
        main([str(directory)])
    return json.loads((directory / "prompt.json").read_text())


def reference_tokens(row):
    """A row's request and response in tokens."""
    request = TOKENIZER.encode_ordinary(fill_template(row["instruction"], row.get("input", "")))
    output = row["output"] if isinstance(row["output"], str) else row["output"][0]
    return request, [*TOKENIZER.encode_ordinary(output), EOS]


@torch.no_grad()
def log_softmax_of(model, request, response, P=None):
    """The log-probabilities (N, V) at the tokens of one response: a full softmax in float64."""
    ids, prompt_length = torch.tensor([request + response]), 0 if P is None else len(P)
    hidden = model(ids if P is None else prepend(P, model, ids))[0]
    start = prompt_length + len(request) - 1
    logits = hidden[start : start + len(response)].double() @ model.wte.weight.double().T
    return logits.log_softmax(-1)


def three_models(request, response, P=P):
    """The log-probabilities of p, p_P and q, (N, V) each."""
    pairs = (TEACHER, None), (TEACHER, P), (STUDENT, None)
    return [log_softmax_of(model, request, response, prompt) for model, prompt in pairs]


# ---- the vectors -------------------------------------------------------------------------------


def test_each_vector_has_the_token_that_it_began_as(content):
    texts = [vector["began_as"] for vector in content["vectors"]]
    assert texts == [repr(TOKENIZER.decode([token])) for token in TEXT_TOKENS]
    assert repr(" a") in texts


def test_distances_are_those_that_the_vectors_were_moved_by(content):
    moved = [vector["moved"] for vector in content["vectors"]]
    assert moved == pytest.approx(MOVED.tolist(), rel=1e-4)


def test_cosines_and_nearest_tokens_equal_numpys(content):
    vectors, wte = P.double().numpy(), WTE.double().numpy()
    for vector, token, row in zip(vectors, TEXT_TOKENS, content["vectors"], strict=True):
        cosines = wte @ vector / np.linalg.norm(wte, axis=1) / np.linalg.norm(vector)
        assert row["cosine"] == pytest.approx(cosines[token], abs=1e-5)
        order = np.argsort(-cosines)[:5]
        texts, values = zip(*row["nearest"], strict=True)
        assert list(texts) == [repr(TOKENIZER.decode([token])) for token in order]
        assert list(values) == pytest.approx(cosines[order].tolist(), abs=1e-5)


def test_nearest_does_not_depend_on_length():
    """A vector ten times as long as an embedding, and one a tenth as long, are nearest to it."""
    P_0 = WTE[[3, 3]]
    moved, cosine, cosines, nearest = describe_vectors(
        WTE[[9, 9]] * torch.tensor([[10], [0.1]]), P_0, WTE
    )
    assert [tokens[0] for tokens in nearest] == [9, 9]
    assert [values[0] for values in cosines] == pytest.approx([1, 1], abs=1e-5)
    assert cosine[0] == pytest.approx(cosine[1], abs=1e-5)
    assert moved[0] > 5 * moved[1]


def test_vectors_of_zeros_have_no_direction():
    wte = torch.cat([torch.zeros(1, WTE.shape[1]), WTE[1:]])
    P, P_0 = wte[[9, 9, 0]], wte[[9, 0, 0]]
    moved, cosine, cosines, nearest = describe_vectors(P, P_0, wte)
    assert moved == [0, None, None] and cosine == pytest.approx([1, 0, 0])
    assert [tokens[0] for tokens in nearest[:2]] == [9, 9]
    assert cosines[2] == [0] * 5


@pytest.mark.parametrize(
    "init, length, texts",
    [
        ("padding", 3, ["<|endoftext|>"] * 3),
        ("text", 7, [TOKENIZER.decode([(TEXT_TOKENS * 2)[i]]) for i in range(7)]),
        ("random", 3, [None] * 3),
    ],
)
def test_every_initialisation_is_measured_from_its_own_start(out, init, length, texts):
    P_0 = initial_prompt(WTE, init, length, TEXT_TOKENS, EOS, SEED)
    run = write_run(out / f"{init}-{length}", displaced(P_0), prompt_init=init)
    vectors = inspect(run)["vectors"]
    assert [v["began_as"] for v in vectors] == [
        "-" if text is None else repr(text) for text in texts
    ]
    assert [v["moved"] for v in vectors] == pytest.approx(MOVED[:length].tolist(), rel=1e-4)


# ---- the means over the references ---------------------------------------------------------------


def test_means_on_the_references_equal_a_full_softmax(content):
    sums, n_tokens = np.zeros(6), 0
    for row in ROWS[:N_USED]:  # the next is over the limit, the one after it beyond max_dev_rows
        request, response = reference_tokens(row)
        p, p_P, q = three_models(request, response)
        pairs = (p, q), (p_P, q), (p_P, p)
        sums[:3] += [(a.exp() * (a - b)).sum().item() for a, b in pairs]
        at_tokens = range(len(response)), response
        sums[3:] -= [log_probs[at_tokens].sum().item() for log_probs in (p, p_P, q)]
        n_tokens += len(response)
    names = ["KL(p || q)", "KL(p_P || q)", "KL(p_P || p)", "loss of p", "loss of p_P", "loss of q"]
    assert list(content["references"]) == names
    assert list(content["references"].values()) == pytest.approx(sums / n_tokens, rel=1e-4)
    assert len(set(np.round(sums / n_tokens, 2))) == 6  # or one might stand for another


# ---- the response --------------------------------------------------------------------------------


def sampled_response(row, number):
    request, _ = reference_tokens(row)
    uniforms = row_uniforms(MAX_NEW, SEED, "prompt", number)[None]
    [response], [log_probs] = sample(STUDENT, [request], uniforms, EOS, MAX_NEW)
    return request, response, log_probs


@pytest.mark.parametrize(
    "data, rows",
    [
        ("set", {1: ROWS[0], 2: ROWS[1], 3: ROWS[2]}),
        ("over-the-limit-first", {2: ROWS[2], 3: ROWS[0], 4: ROWS[1]}),
        ("two", {1: ROWS[0], 2: ROWS[1]}),
    ],
)
def test_responses_are_the_students_to_the_first_three_rows_that_the_run_has(out, data, rows):
    over_the_limit = ROWS[3]
    write_rows(out / "over-the-limit-first" / "dev.jsonl", [over_the_limit, ROWS[2], *ROWS[:3]])
    write_rows(out / "two" / "dev.jsonl", ROWS[:2])
    responses = inspect(write_run(out / f"on-{data}", P, data=data))["responses"]
    assert [found["row"] for found in responses] == list(rows)
    for found in responses:
        check_response(found, rows[found["row"]])


def check_response(found, row):
    request, response, log_probs = sampled_response(row, found["row"])
    assert found["tokens"] == [repr(TOKENIZER.decode([token])) for token in response]
    at_tokens = range(len(response)), response
    expected = [z[at_tokens].exp().tolist() for z in three_models(request, response)]
    labels = ["bare teacher", "prompted teacher", "student"]
    assert list(found["probabilities"]) == labels
    for label, values in zip(labels, expected):
        assert found["probabilities"][label] == pytest.approx(values, rel=1e-3)
    student = found["probabilities"]["student"]
    assert student == pytest.approx(np.exp(log_probs).tolist(), rel=1e-3)


def test_all_of_it_is_printed(run, capsys):
    content = inspect(run)
    printed = capsys.readouterr().out
    for vector in content["vectors"]:
        [line] = [line for line in printed.splitlines() if line.startswith(vector["began_as"])]
        assert f"{vector['moved']:.3f}" in line and f"{vector['cosine']:.3f}" in line
        assert all(f"{text} {cosine:.2f}" in line for text, cosine in vector["nearest"])
    columns = ["began as", "moved", "cosine", *(f"nearest {n}" for n in (1, 2, 3, 4, 5))]
    [header] = [line for line in printed.splitlines() if line.startswith("began as")]
    assert re.split("  +", header.strip()) == columns
    for name, value in content["references"].items():
        assert any(name in line and f"{value:.3f}" in line for line in printed.splitlines())
    assert f"{run / 'prompt.json'}" in printed.splitlines()[-1]


# ---- the plot ------------------------------------------------------------------------------------


def test_plot_is_a_png(run):
    if find_spec("matplotlib") is None:
        pytest.skip("needs matplotlib")
    inspect(run, has_plot=True)
    assert (run / "prompt.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_plot_has_every_token_with_a_bar_per_model_in_panels_of_40_tokens(run, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    figure = figures.Figure()
    monkeypatch.setattr("data.runs.report.save_plot", lambda path, draw: draw(figure))
    tokens = [repr(f" t{i}") for i in range(95)]
    probabilities = {"first": np.linspace(0, 1, 95).tolist(), "second": [0.5] * 95}
    long = {"row": 3, "tokens": tokens, "probabilities": probabilities}
    short = {"row": 7, "tokens": tokens[:2], "probabilities": {"first": [1, 0], "second": [0, 1]}}
    plot_responses(run / "plot.png", [long, short])
    assert figure.get_suptitle() == f"{run.name}: responses of the student"
    parts = ["row 3", "row 3, from token 41 on", "row 3, from token 81 on", "row 7"]
    assert [axes.get_title() for axes in figure.axes] == [f"validation {part}" for part in parts]
    shown = [label.get_text() for axes in figure.axes for label in axes.get_xticklabels()]
    assert shown == [*tokens, *tokens[:2]]
    heights = [[[bar.get_height() for bar in bars] for bars in a.containers] for a in figure.axes]
    assert heights[2] == [values[80:] for values in probabilities.values()]
    assert heights[3] == [[1, 0], [0, 1]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(probabilities)
    assert {axes.get_ylim() for axes in figure.axes} == {(0, 1)}
    places = [bar.get_x() for bars in figure.axes[3].containers for bar in bars]
    assert sorted(places) == [places[i] for i in (0, 2, 1, 3)]  # those of a token side by side


def test_without_matplotlib_the_numbers_are_written(out, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = write_run(out / "no-plot", P)
    assert inspect(run, has_plot=True)["vectors"]
    assert not (run / "prompt.png").exists()
    assert "no plot (ModuleNotFoundError" in capsys.readouterr().out


# ---- the command and its errors ------------------------------------------------------------------


def test_runs_as_a_script(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prompt.py", str(run / "best")])
    runpy.run_path(str(ROOT / "prompt.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert after_device(printed.err) == ""
    assert "also in " in printed.out


def test_directory_that_is_no_complete_promptkd_run_is_an_error(out):
    expected = "is not a complete run of train.py --method promptkd"
    other = write_run(out / "gkd", P, method="gkd")
    unfinished = write_run(out / "unfinished", P, record={"complete": False})
    for directory in (out / "none", out / "teacher", other, unfinished):
        assert error_of(main, [str(directory)]) == f"{directory}: {expected}"


def test_run_of_another_version_is_an_error(out):
    old = write_run(out / "old", P, record={"format": RUN_FORMAT - 1})
    assert "another version of this project" in error_of(main, [str(old)])


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"teacher": "gone"}, "model 'gone': no such directory"),
        ({"teacher": "/nowhere/teacher"}, "model '/nowhere/teacher': no such directory"),
        ({"data": "gone"}, "data 'gone': no such directory"),
        ({"data": "teacher"}, "dev.jsonl: no such file"),
    ],
)
def test_input_that_is_gone_is_an_error_and_writes_nothing(out, settings, expected):
    name, value = next(iter(settings.items()))
    run = write_run(out / f"without-{name}-{value.strip('/').replace('/', '-')}", P, **settings)
    assert expected in error_of(main, [str(run)])
    assert not (run / "prompt.json").exists()


def test_a_teacher_or_rows_that_were_replaced_are_an_error(out, tmp_path, capsys):
    copied = shutil.copytree(out, tmp_path / "out")
    inputs = {"teacher": model_hash(copied / "teacher")}
    inputs["dev.jsonl"] = file_hash(copied / "set" / "dev.jsonl")
    run = write_run(copied / "run", P, record={"inputs": inputs})
    inspect(run)
    assert "warning" not in capsys.readouterr().out
    for name, path in (("dev.jsonl", "set/dev.jsonl"), ("teacher", "teacher/config.json")):
        content = (copied / path).read_bytes()
        (copied / path).write_bytes(content + b" \n")
        source = {"dev.jsonl": "set", "teacher": "teacher"}[name]
        problem = f"{name} ({source}) is not what it was made with: its content has changed"
        fix = "put back what it was, or train the run again"
        assert error_of(main, [str(run)]) == f"{run}: {problem}; {fix}"
        (copied / path).write_bytes(content)


def test_a_run_without_the_hash_of_its_teacher_is_warned_of(run, capsys):
    inspect(run)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    problem = "its run.json does not have the hash of its"
    assert sorted(warnings) == [f"warning: {run}: {problem} {x}" for x in ("dev.jsonl", "teacher")]


def test_prompt_that_is_missing_or_of_another_teacher_is_an_error(out):
    run = write_run(out / "no-prompt", None)
    assert "prompt.safetensors: no such file" in error_of(main, [str(run)])
    save_prompt(torch.ones(3, 48), run / "best")
    assert "is 48 wide and the model 32" in error_of(main, [str(run)])


def test_models_given_from_elsewhere_are_found_where_they_were(out, tmp_path, content):
    run = write_run(tmp_path / "run", P, teacher=str(out / "teacher"), data=str(out / "set"))
    assert inspect(run)["references"] == content["references"]
