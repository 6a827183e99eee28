"""Exposure bias: the sums against the definition, the KL against an independent GPT-2, and the
command."""

import json
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    error_of,
    files_below,
    fork_ranks,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    wait_for,
    write_checkpoint,
    write_rows,
)
from reference import as_arrays, gpt2_logits, token_kl
from safetensors.torch import load_file, save_file

import exposure_bias
from data.models.checkpoint import load
from data.runs import report
from data.runs.names import unique_labels
from data.runs.report import last_reliable_step
from data.runs.runs import RUN_FORMAT, checkpoints
from data.sets.rows import fill_template
from exposure_bias import excess_accumulated_error, exposure_curve, kl_by_step, main
from sample import row_uniforms, sample

COLUMNS = ["l", "R", "epsilon", "ex_acc_err", "low", "high", "alive_student", "alive_teacher"]


# ---- the sums ----------------------------------------------------------------------------------

# KL at each step of the responses to two requests, on the student's and on the teacher's. The means
# over the responses that are alive are 3, 3, 6, and 2, 1.5, 2, 2.
STUDENT = [[[1, 2], [3]], [[5, 4, 6]]]
TEACHER = [[[1], [2, 2, 2, 2]], [[3, 1]]]


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pad_with_nan(responses):
    """Responses (lists of KL) as an array (responses, steps), NaN after their end."""
    array = np.full((len(responses), max(map(len, responses))), np.nan)
    for row, response in zip(array, responses):
        row[: len(response)] = response
    return array


def definition(student, teacher):
    """R, ε and ExAccErr (3, L) of flat lists of responses, step by step."""
    student, teacher = pad_with_nan(student), pad_with_nan(teacher)
    results, R, l_epsilon = [], 0, 0
    for l in range(1, min(student.shape[1], teacher.shape[1]) + 1):
        R += np.nanmean(student[:, l - 1])
        l_epsilon += np.nanmean(teacher[:, l - 1])
        epsilon = l_epsilon / l
        results.append((R, epsilon, (R - l * epsilon) / (l * epsilon) * 100))
    return np.array(results).T


def random_kl(seed, requests=7, samples=3, steps=9):
    """KL by request, response and step, for responses of 1 to `steps` tokens."""
    rng = np.random.default_rng(seed)
    return [
        [rng.exponential(size=rng.integers(1, steps + 1)).tolist() for _ in range(samples)]
        for _ in range(requests)
    ]


def flatten(by_request):
    return [response for responses in by_request for response in responses]


@pytest.mark.parametrize(
    "student, teacher, R, epsilon, error",
    [
        (STUDENT, TEACHER, [3, 6, 12], [2, 3.5 / 2, 5.5 / 3], [50, 250 / 3.5, 650 / 5.5]),
        # The error can be negative.
        ([[[1.0, 0.5]]], [[[1.0, 2.0]]], [1, 1.5], [1, 1.5], [0, -50]),
        # A mean over all responses, with zeros after their end, would fall.
        ([[[2] * 4, [2]]], [[[1] * 4, [1] * 3]], [2, 4, 6, 8], [1] * 4, [100] * 4),
    ],
)
def test_sums_equal_those_worked_out_by_hand(student, teacher, R, epsilon, error):
    results = excess_accumulated_error(student, teacher)
    for result, expected in zip(results, (R, epsilon, error), strict=True):
        assert result == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_sums_equal_the_definition(seed):
    student, teacher = random_kl(seed), random_kl(seed + 100, steps=6 + 2 * seed)
    results = np.array(excess_accumulated_error(student, teacher))
    assert results == pytest.approx(definition(flatten(student), flatten(teacher)))


@pytest.mark.parametrize("student, teacher", [(STUDENT, TEACHER), (TEACHER, STUDENT)])
def test_curve_stops_where_no_response_is_alive(no_warnings, student, teacher):
    columns = exposure_curve(student, teacher, 10, "x")
    assert list(columns) == COLUMNS
    assert {len(values) for values in columns.values()} == {3}
    assert columns["l"] == [1, 2, 3]
    # The band too, although some resamples have no response at step 3.
    assert np.isfinite(np.array([*columns.values()])).all()
    assert columns["alive_student"] == columns["alive_teacher"] == [3, 2, 1]


@pytest.mark.parametrize("weights", [[1, 1], [2, 0], [0, 1], [3, 1]])
def test_weights_count_a_request_with_all_its_responses(no_warnings, weights):
    resampled = [
        [kind[x] for x in (0, 1) for _ in range(weights[x])] for kind in (STUDENT, TEACHER)
    ]
    results = np.array(excess_accumulated_error(STUDENT, TEACHER, np.array(weights)))
    expected = definition(*map(flatten, resampled))
    L = expected.shape[1]
    assert results[:, :L] == pytest.approx(expected)
    assert np.isnan(results[2, L:]).all()


def test_weights_can_have_more_dimensions():
    _, _, expected = excess_accumulated_error(STUDENT, TEACHER)
    _, _, errors = excess_accumulated_error(STUDENT, TEACHER, np.array([[1, 1], [3, 1]]))
    assert errors.shape == (2, 3)
    assert errors[0] == pytest.approx(expected)


# ---- the bootstrap -----------------------------------------------------------------------------


def test_band_is_that_of_a_bootstrap_over_requests():
    student, teacher = random_kl(1, requests=20), random_kl(2, requests=20)
    columns = exposure_curve(student, teacher, 10, "x")
    rng, errors = np.random.default_rng(0), []
    for _ in range(1000):  # with draws in place of weights
        drawn = rng.integers(0, 20, 20)
        resampled = [[y for x in drawn for y in kind[x]] for kind in (student, teacher)]
        errors.append(definition(*resampled)[2, :6])
    low, high = np.percentile(errors, [2.5, 97.5], axis=0)
    width = high - low
    assert np.abs(np.array(columns["low"][:6]) - low).max() < 0.25 * width.min()
    assert np.abs(np.array(columns["high"][:6]) - high).max() < 0.25 * width.min()
    assert (np.array(columns["low"]) < columns["ex_acc_err"]).all()
    assert (np.array(columns["high"]) > columns["ex_acc_err"]).all()


def test_R_and_epsilon_of_a_request_stay_together():
    """The student's excess is a tenth at each of six very different requests: no uncertainty."""
    teacher = [[[10.0**x] * 4] for x in range(6)]
    student = [[[1.1 * value for value in responses[0]]] for responses in teacher]
    columns = exposure_curve(student, teacher, 10, "x")
    assert [*columns["low"], *columns["high"]] == pytest.approx([10] * 8)


def test_responses_to_a_request_stay_together():
    """All requests have the same three, very different responses: no uncertainty."""
    student, teacher = [[[1.0], [10.0], [100.0]]] * 6, [[[2.0], [3.0], [50.0]]] * 6
    columns = exposure_curve(student, teacher, 10, "x")
    assert [columns["low"][0], columns["high"][0]] == pytest.approx([100 * (111 / 55 - 1)] * 2)


def test_band_depends_on_the_seed_only():
    student, teacher = random_kl(1), random_kl(2)
    columns = exposure_curve(student, teacher, 10, "x")
    assert exposure_curve(student, teacher, 10, "x") == columns
    assert exposure_curve(student, teacher, 11, "x")["low"] != columns["low"]


def test_teacher_as_its_own_student_is_an_error(no_warnings):
    message = error_of(exposure_curve, [[[0.0, 0.0]]], [[[0.0]]], 10, "out/copy")
    assert message.startswith("out/copy: its distribution is the teacher's own")


@pytest.mark.parametrize(
    "student, teacher, expected",
    [
        ([40, 30, 4, 3, 0], [40] * 5, 3),
        ([40] * 5, [40, 30, 4, 3, 0], 3),
        ([5], [5], 1),
    ],
)
def test_curve_is_reliable_while_a_tenth_of_both_kinds_is_alive(student, teacher, expected):
    assert last_reliable_step({"alive_student": student, "alive_teacher": teacher}) == expected


# ---- the KL at each step -----------------------------------------------------------------------

STUDENT_CONFIG = replace(TINY, n_layer=1, n_embd=16)
EOS = TINY.vocab_size - 1
REQUESTS = [[5, 17, 60, 3], [8], [41, 8, 22, 1, 9, 30, 2], [8], [50, 4]]
# An end-of-text within a response is a token like any other.
RESPONSES = [[7, 7, 31], [3, EOS], [EOS], [12, 9, 4, 4, 58, 6, EOS], [EOS, 2]]


def numpy_kl(p, q, n_head, request, response):
    """KL(p || q) at each token of a response. p and q are weights, as arrays."""
    p_logits, q_logits = (gpt2_logits(w, n_head, request + response) for w in (p, q))
    start = len(request) - 1
    return [token_kl(p_logits[start + t], q_logits[start + t]) for t in range(len(response))]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two tiny models, and their weights as arrays."""
    directory = tmp_path_factory.mktemp("pair")
    arrays = [
        as_arrays(load_file(write_checkpoint(directory / name, config) / "model.safetensors"))
        for name, config in [("p", TINY), ("q", STUDENT_CONFIG)]
    ]
    return tiny_model(TINY), tiny_model(STUDENT_CONFIG), *arrays


@pytest.mark.parametrize("micro_batch_tokens", [1, 16, 4096])
def test_kl_of_each_token_equals_an_independent_gpt2(pair, micro_batch_tokens):
    p, q, p_arrays, q_arrays = pair
    results = kl_by_step(p, q, REQUESTS, RESPONSES, micro_batch_tokens)
    assert [len(kl_steps) for kl_steps in results] == [len(response) for response in RESPONSES]
    for request, response, kl_steps in zip(REQUESTS, RESPONSES, results):
        expected = numpy_kl(p_arrays, q_arrays, 4, request, response)
        assert kl_steps == pytest.approx(expected, abs=1e-5)


def test_kl_is_forward(pair):
    p, q, p_arrays, q_arrays = pair
    reverse = numpy_kl(q_arrays, p_arrays, 4, REQUESTS[0], RESPONSES[0])
    assert kl_by_step(p, q, REQUESTS[:1], RESPONSES[:1])[0] != pytest.approx(reverse, rel=0.05)


def test_kl_at_the_first_token_does_not_depend_on_the_response(pair):
    first, second = kl_by_step(*pair[:2], [REQUESTS[0]] * 2, [[7, 7, 31], [9, 2, 31]])
    assert first[0] == pytest.approx(second[0], abs=1e-6)
    assert abs(first[1] - second[1]) > 1e-3


def test_kl_of_a_model_to_itself_is_zero(pair):
    for kl_steps in kl_by_step(pair[0], pair[0], REQUESTS, RESPONSES):
        assert kl_steps == pytest.approx([0] * len(kl_steps), abs=1e-6)


def test_rank_without_requests_has_no_kl(pair):
    assert kl_by_step(*pair[:2], [], []) == []


# ---- checkpoints along training ----------------------------------------------------------------

RECORD = {"format": RUN_FORMAT, "name": "run", "settings": {}, "complete": True}


def make_run(directory, steps, record):
    """A run with empty directories in place of checkpoints. record: a dict, or the file's text."""
    (directory / "best").mkdir(parents=True)
    text = record if isinstance(record, str) else json.dumps(record)
    (directory / "run.json").write_text(text)
    for step in steps:
        (directory / "kept" / f"step-{step:06d}").mkdir(parents=True)
    return directory


@pytest.mark.parametrize(
    "best_step, kept, expected",
    [
        # --keep 20 of 880 steps: the nearest to each tenth of the best step
        (800, range(44, 881, 44), [88, 176, 220, 308, 396, 484, 572, 660, 704, 800]),
        (88, range(44, 881, 44), [44, 88]),  # the best is far from the end
        (88, [88, 176], [88]),
        (10, [50, 100], [10]),
    ],
)
def test_checkpoints_are_those_nearest_to_tenths_of_the_best_step(
    tmp_path, best_step, kept, expected
):
    run = make_run(tmp_path / "run", kept, RECORD | {"best_step": best_step})
    found = checkpoints(run)
    assert list(found) == expected
    for step in expected[:-1]:
        assert found[step] == run / "kept" / f"step-{step:06d}"
    assert found[best_step] == run / "best"


def test_other_directories_in_kept_are_ignored(tmp_path):
    run = make_run(tmp_path / "run", [10, 50], RECORD | {"best_step": 100})
    for name in ("step-", "step-x", "step-000020.partial", ".step-000030"):
        (run / "kept" / name).mkdir()
    assert list(checkpoints(run)) == [10, 50, 100]


def test_students_are_labelled_by_directory_and_hub_models_by_their_whole_name(
    tmp_path, monkeypatch
):
    for name in ("out/a-s10", "out/b/best", "x/run", "y/run", "y/other"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = ["out/a-s10/", "out/b/best", "gpt2", "owner/c"]
    assert unique_labels(names) == ["a-s10", "b", "gpt2", "owner/c"]
    assert unique_labels(["x/run", "y/run", "y/other"]) == ["x/run", "y/run", "y/other"]
    assert unique_labels(["x/run", "x/run"]) == ["run", "run"]
    assert unique_labels(["."]) == [tmp_path.name]


# ---- the command -------------------------------------------------------------------------------

ROWS = [
    {"instruction": "Write a task." * (n + 1), "input": "describes" * (n % 2)} for n in range(5)
]
SAMPLES, STEPS = 2, 7


def write_talker(directory, scale, **sizes):
    """A tiny model whose responses sometimes end within a few tokens: the embedding of end-of-text
    is multiplied by `scale`."""
    config = replace(talker_config(), **sizes)
    path = write_checkpoint(directory, config, tiny_tokenizer()) / "model.safetensors"
    weights = load_file(path)
    weights["wte.weight"] *= 0.5  # a flatter distribution
    weights["wte.weight"][tiny_tokenizer().eot_token] *= scale
    save_file(weights, path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, a student, a run with kept checkpoints, and a data set."""
    world = tmp_path_factory.mktemp("world")
    write_talker(world / "teacher", 8)
    write_talker(world / "student", -3, n_layer=1)
    write_rows(world / "set" / "test.jsonl", ROWS)
    make_run(world / "run", [], RECORD | {"best_step": 9})
    for name, scale in [("best", -2), ("kept/step-03", -5), ("kept/step-06", -4)]:
        write_talker(world / "run" / name, scale, n_layer=1)
    return world


def command_line(world, *options, out, students=("student",), along=()):
    arguments = ["--teacher", world / "teacher", "--data", world / "set"]
    arguments += ["--samples", SAMPLES, "--steps", STEPS, *options, "--out", world / out]
    if students:
        arguments += ["--students", *(world / name for name in students)]
    if along:
        arguments += ["--along", *(world / name for name in along)]
    return [str(argument) for argument in arguments]


def run(world, capsys, *options, out="out", **models):
    """Run the command. Returns {figure: content of its JSON} and the output."""
    main(command_line(world, *options, out=out, **models))
    paths = sorted((world / out).glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}, capsys.readouterr().out


def run_student(world, capsys, *options):
    """Run the command for the student. Returns its curve."""
    return run(world, capsys, *options)[0]["figure_3a"]["students"]["student"]


@pytest.fixture(scope="module")
def plain_curve(world):
    """The curve of the student with the default options."""
    main(command_line(world, out="plain_curve"))
    content = json.loads((world / "plain_curve" / "figure_3a.json").read_text())
    return content["students"]["student"]


def assert_same_curve(columns, expected):
    for name in COLUMNS:
        assert columns[name] == pytest.approx(expected[name], rel=1e-4, abs=0.01)


def sample_one_by_one(directory, role):
    """A model's (request, response) pairs in the order of the rows, each sampled alone."""
    model, tokenizer = load(directory).eval(), tiny_tokenizer()
    pairs = []
    for index, row in enumerate(ROWS):
        request = tokenizer.encode_ordinary(fill_template(row["instruction"], row["input"]))
        for n in range(SAMPLES):
            uniforms = row_uniforms(STEPS, 10, "exposure", role, n, index)[None]
            [response], _ = sample(model, [request], uniforms, tokenizer.eot_token, STEPS)
            pairs.append((request, response))
    return pairs


def test_curve_equals_an_independent_computation(world, plain_curve):
    """NumPy's GPT-2 on responses that are sampled one by one, and the definition of the sums."""
    arrays = [
        as_arrays(load_file(world / name / "model.safetensors")) for name in ("teacher", "student")
    ]
    kl, n_head = {}, talker_config().n_head
    for role in ("teacher", "student"):
        pairs = sample_one_by_one(world / role, role)
        kl[role] = [numpy_kl(*arrays, n_head, *pair) for pair in pairs]
    R, epsilon, error = definition(kl["student"], kl["teacher"])
    columns = plain_curve
    assert list(columns) == COLUMNS
    assert columns["l"] == list(range(1, len(R) + 1))
    assert columns["R"] == pytest.approx(R, rel=1e-4)
    assert columns["epsilon"] == pytest.approx(epsilon, rel=1e-4)
    assert columns["ex_acc_err"] == pytest.approx(error, rel=1e-3, abs=0.01)
    assert error[0] == pytest.approx(0, abs=1e-6)
    for role in ("student", "teacher"):
        lengths = [len(kl_steps) for kl_steps in kl[role]]
        alive = [sum(length >= l for length in lengths) for l in columns["l"]]
        assert columns[f"alive_{role}"] == alive
        assert len(set(lengths)) > 2  # responses end at different steps


def test_the_json_file_has_the_curves_and_the_settings(world, capsys):
    figures, out = run(world, capsys, students=("student", "run"))
    content = figures["figure_3a"]
    assert set(figures) == {"figure_3a"}
    assert list(content["students"]) == ["student", "run"]
    assert content["settings"] == {
        "teacher": str(world / "teacher"),
        "students": [str(world / "student"), str(world / "run")],
        "along": [],
        "data": str(world / "set"),
        "rows": None,
        "steps": STEPS,
        "samples": SAMPLES,
        "seed": 10,
        "batch": None,
        "micro_batch_tokens": 4096,
        "dtype": "float32",
        "out": str(world / "out"),
        "requests": 5,
    }
    columns = content["students"]["student"]
    l = last_reliable_step(columns)
    start = f"student: ExAccErr {columns['ex_acc_err'][l - 1]:+.1f} % (95 %: "
    assert out.startswith(start) and f"at l = {l}, " in out
    assert "figure_3a.json" in out.splitlines()[-1]


def test_fewer_steps_are_the_first_of_more(world, capsys, plain_curve):
    fewer = run_student(world, capsys, "--steps", 3)
    assert_same_curve(fewer, {name: values[:3] for name, values in plain_curve.items()})


def test_batch_sizes_do_not_change_the_curve(world, capsys, plain_curve):
    curve = run_student(world, capsys, "--batch", 3, "--micro-batch-tokens", 250)
    assert_same_curve(curve, plain_curve)


def test_seed_changes_the_responses_of_both_models(world, capsys, plain_curve):
    other = run_student(world, capsys, "--seed", 11)
    for name in ("R", "epsilon"):
        assert other[name][1] != pytest.approx(plain_curve[name][1], rel=1e-3)


def test_rows_and_samples_set_the_number_of_responses(world, capsys, plain_curve):
    assert plain_curve["alive_student"][0] == plain_curve["alive_teacher"][0] == 5 * SAMPLES
    figures, _ = run(world, capsys, "--rows", 2, "--samples", 4)
    assert figures["figure_3a"]["students"]["student"]["alive_student"][0] == 8
    assert figures["figure_3a"]["settings"]["requests"] == 2


def test_sampling_is_plain_and_the_teacher_is_sampled_from_once_with_its_own_random_numbers(
    world, capsys, monkeypatch
):
    calls, sample_all = [], exposure_bias.sample_all

    def recording_sample_all(model, requests, rng_keys, eos, max_new_tokens, batch_size, **kwargs):
        calls.append((rng_keys, max_new_tokens, kwargs))
        return sample_all(model, requests, rng_keys, eos, max_new_tokens, batch_size, **kwargs)

    monkeypatch.setattr(exposure_bias, "sample_all", recording_sample_all)
    run(world, capsys, students=("student", "run"), along=("run",))
    # The teacher, two students, three checkpoints.
    assert [max_new_tokens for _, max_new_tokens, _ in calls] == [STEPS] * 6
    for *_, kwargs in calls:
        assert set(kwargs) == {"label", "dtype", "cache_share"}  # no ban, no temperature
    teacher, *students = (rng_keys for rng_keys, *_ in calls)
    assert all(rng_keys == students[0] for rng_keys in students)
    assert len({*teacher, *students[0]}) == 2 * 5 * SAMPLES
    assert len({row_uniforms(1, *key).item() for key in teacher + students[0]}) == 2 * 5 * SAMPLES


def test_shortened_requests_are_counted(world, capsys):
    rows = [{"instruction": "Write.", "input": "many " * 200}, {"instruction": "Write."}]
    write_rows(world / "long" / "test.jsonl", rows)
    _, out = run(world, capsys, "--data", world / "long", "--samples", 1, "--steps", 2, out="short")
    assert out.startswith("1 of 2 requests were shortened to fit\n")


def test_points_along_training_are_those_of_the_checkpoints_curves(world, capsys):
    figures, out = run(world, capsys, students=(), along=("run",), out="along")
    assert set(figures) == {"figure_3b"}
    columns = figures["figure_3b"]["runs"]["run"]
    assert list(columns) == ["step", "percent", *COLUMNS]
    assert columns["step"] == [3, 6, 9]
    assert columns["percent"] == pytest.approx([100 / 3, 200 / 3, 100])
    students = ("run/kept/step-03", "run/kept/step-06", "run")
    figures, _ = run(world, capsys, students=students, out="curves")
    curves = list(figures["figure_3a"]["students"].values())
    l = min(map(last_reliable_step, curves))
    assert columns["l"] == [l] * 3
    assert (f"at l = {l}, not {STEPS}" in out) == (l < STEPS)
    assert_same_curve(columns, {name: [c[name][l - 1] for c in curves] for name in COLUMNS})
    assert sum(line.startswith("run, step ") for line in out.splitlines()) == 3


def test_l_along_training_is_at_most_the_report_step(world, capsys, monkeypatch):
    monkeypatch.setattr(exposure_bias, "REPORT_STEP", 2)
    figures, out = run(world, capsys, along=("run",), out="both")
    assert figures["figure_3b"]["runs"]["run"]["l"] == [2] * 3
    assert "not 2" not in out
    assert figures["figure_3a"]["students"]["student"]["l"][-1] > 2
    kinds = ("json", "png") if find_spec("matplotlib") else ("json",)
    assert files_below(world / "both") == [f"figure_3{x}.{kind}" for x in "ab" for kind in kinds]


def test_two_ranks_give_the_curve_of_one(world, tmp_path, plain_curve):
    arguments = command_line(world, out="two")
    ranks = fork_ranks(lambda: main(arguments), 2, tmp_path / "log")
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    assert wait_for(ranks, timeout=120) == [0, 0], "".join(log.read_text() for log in logs)
    content = json.loads((world / "two" / "figure_3a.json").read_text())
    assert_same_curve(content["students"]["student"], plain_curve)
    assert sum(log.read_text().count("ExAccErr") for log in logs) == 1


# ---- plots -------------------------------------------------------------------------------------


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """A function that writes a figure. Returns what is drawn on its axes."""
    figure = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    monkeypatch.setattr(report, "save_plot", lambda path, draw: draw(figure))
    settings = {"requests": 5, "samples": 2, "data": "dolly"}

    def draw(series, x):
        report.write_figure(tmp_path / "figure", "student", series, settings, x, "title", "x label")
        [axes] = figure.axes
        assert "title" in axes.get_title() and "dolly: 5 requests × 2" in axes.get_title()
        assert axes.get_xlabel() == "x label" and "%" in axes.get_ylabel()
        labels = [label.strip() for label in axes.get_legend_handles_labels()[1]]
        *lines, zero_line = axes.lines
        assert labels == list(series) and set(zero_line.get_ydata()) == {0}
        assert len({line.get_color() for line in lines}) == len(series)
        bands = [path.get_paths()[0].vertices for path in axes.collections]
        return lines, bands

    return draw


def test_figure_3a_has_a_line_per_student_up_to_its_last_reliable_step_and_bands(draw):
    one_long = [[[1.0] * 12]]
    series = {
        "first": exposure_curve(random_kl(1) + one_long, random_kl(2) + one_long, 10, "x"),
        "_second": exposure_curve(random_kl(3, steps=5), random_kl(2), 10, "x"),
    }
    lengths = [last_reliable_step(columns) for columns in series.values()]
    assert lengths[0] < len(series["first"]["l"]) == 12 and lengths[1] == 5
    for line, band, n, columns in zip(*draw(series, "l"), lengths, series.values(), strict=True):
        assert list(line.get_xdata()) == list(range(1, n + 1))
        assert list(line.get_ydata()) == columns["ex_acc_err"][:n]
        assert band[:, 0].max() == n
        assert band[:, 1].max() == pytest.approx(max(columns["high"][:n]))
        assert band[:, 1].min() == pytest.approx(min(columns["low"][:n]))


def test_figure_3b_has_a_line_per_run_over_the_percent_of_the_best_step(draw):
    columns = {
        "percent": [10.0, 50.0, 100.0],
        "l": [50] * 3,
        "ex_acc_err": [9.0, 5.0, -1.0],
        "low": [8.0, 4.0, -2.0],
        "high": [10.0, 6.0, 0.5],
        "alive_student": [100, 1, 1],  # of three checkpoints, all of them reliable
        "alive_teacher": [100, 1, 1],
    }
    for line in draw({"promptkd": columns, "gkd": columns}, "percent")[0]:
        assert list(line.get_xdata()) == columns["percent"]
        assert list(line.get_ydata()) == columns["ex_acc_err"]


def test_without_matplotlib_the_tables_are_written(world, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, out = run(world, capsys, "--rows", 2, "--steps", 3, out="tables")
    assert files_below(world / "tables") == ["figure_3a.json"]
    assert "no plot (ModuleNotFoundError" in out


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["sample_all", "kl_by_step"])
def test_a_lack_of_memory_is_one_line_that_names_the_options(world, monkeypatch, function):
    def fail(*arguments, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(exposure_bias, function, fail)
    arguments = command_line(world, "--rows", 1, "--samples", 1, "--steps", 2, out="never")
    location = f"students of {world / 'teacher'} on {world / 'set'}"
    fix = "lower --batch or --micro-batch-tokens, or use smaller models"
    assert error_of(main, arguments) == f"{location}: out of memory; {fix}"
