"""Exposure bias: the sums against NumPy and numbers worked out by hand, the KL against an independent GPT-2, and the command."""

import csv
import json
import socket
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    after_device,
    error_of,
    files_below,
    run_command,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    write_checkpoint,
    write_rows,
)
from reference import as_arrays, gpt2_logits, token_kl
from safetensors.torch import load_file, save_file

import exposure_bias
from data import report
from data.cli import InputError, run_command_line
from data.demo import TOKENIZER_DIR
from data.report import last_reliable_step, plot_steps, plot_training
from data.rows import fill_template
from data.runs import checkpoints, short_names
from data.tokenizer import load_tokenizer
from exposure_bias import accumulated_error, curve, group, main, step_kl
from model import load
from sample import row_uniforms, sample

COLUMNS = ["l", "R", "epsilon", "ex_acc_err", "low", "high", "alive_student", "alive_teacher"]

# ---- the sums ----------------------------------------------------------------------------------------------------------------

# Two requests; the student gave three responses and the teacher three, two to the first request. The means over the responses alive:
STUDENT = [[[1, 2], [3]], [[5, 4, 6]]]  # 3, 3, 6
TEACHER = [[[1], [2, 2, 2, 2]], [[3, 1]]]  # 2, 1.5, 2, and 2 where no student's response is alive


def padded(responses):
    """Responses (lists of lists) as an array (responses, steps), NaN where they have ended."""
    array = np.full((len(responses), max(map(len, responses))), np.nan)
    for row, response in zip(array, responses):
        row[: len(response)] = response
    return array


def by_hand(student, teacher):
    """R, ε and ExAccErr of flat lists of responses, from the definition, a step at a time."""
    student, teacher = padded(student), padded(teacher)
    results, R, total = [], 0, 0
    for l in range(1, min(student.shape[1], teacher.shape[1]) + 1):
        R += np.nanmean(student[:, l - 1])
        total += np.nanmean(teacher[:, l - 1])
        epsilon = total / l
        results.append((R, epsilon, (R - l * epsilon) / (l * epsilon) * 100))
    return np.array(results).T


def made_up(seed, requests=7, samples=3, steps=9):
    """KL of responses of 1 to `steps` tokens, by request."""
    rng = np.random.default_rng(seed)
    return [
        [rng.exponential(size=rng.integers(1, steps + 1)).tolist() for _ in range(samples)]
        for _ in range(requests)
    ]


def flat(by_request):
    return [response for responses in by_request for response in responses]


def test_the_sums_are_those_worked_out_by_hand():
    R, epsilon, error = accumulated_error(STUDENT, TEACHER)
    assert R == pytest.approx([3, 6, 12])
    assert epsilon == pytest.approx([2, 3.5 / 2, 5.5 / 3])
    assert error == pytest.approx([50, 250 / 3.5, 650 / 5.5])


@pytest.mark.parametrize("seed", range(5))
def test_the_sums_are_the_definition_s(seed):
    student, teacher = made_up(seed), made_up(seed + 100, steps=6 + 2 * seed)
    assert np.array(accumulated_error(student, teacher)) == pytest.approx(
        by_hand(flat(student), flat(teacher))
    )


def test_the_error_may_be_negative():
    assert accumulated_error([[[1.0, 0.5]]], [[[1.0, 2.0]]])[2] == pytest.approx([0, -50])


def test_rows_that_have_ended_do_not_count():
    """A mean over all rows, the ended ones as zeros, would fall with the rows alive."""
    R, epsilon, error = accumulated_error([[[2.0] * 4, [2.0]]], [[[1.0] * 4, [1.0] * 3]])
    assert (R.tolist(), epsilon.tolist(), error.tolist()) == ([2, 4, 6, 8], [1] * 4, [100] * 4)


def test_the_curve_stops_where_no_response_is_alive():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for student, teacher in [(STUDENT, TEACHER), (TEACHER, STUDENT)]:
            columns = curve(student, teacher, 10, "x")
            assert (
                list(columns) == COLUMNS
                and {len(values) for values in columns.values()} == {3}
                and columns["l"] == [1, 2, 3]
            )
            assert np.isfinite(
                np.array([*columns.values()])
            ).all()  # also the band: some resamples have no response at step 3
    assert columns["alive_student"] == [3, 2, 1] and columns["alive_teacher"] == [3, 2, 1]


def test_weights_count_a_request_with_all_its_responses():
    for weights in ([1, 1], [2, 0], [0, 1], [3, 1]):
        resampled = [
            [kind[x] for x in (0, 1) for _ in range(weights[x])] for kind in (STUDENT, TEACHER)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results = np.array(accumulated_error(STUDENT, TEACHER, np.array(weights)))
        wanted = by_hand(*map(flat, resampled))
        assert results[:, : wanted.shape[1]] == pytest.approx(wanted)
        assert np.isnan(results[2, wanted.shape[1] :]).all()
    many = accumulated_error(STUDENT, TEACHER, np.array([[1, 1], [3, 1]]))[2]
    assert many.shape == (2, 3) and many[0] == pytest.approx(accumulated_error(STUDENT, TEACHER)[2])


# ---- the band ----------------------------------------------------------------------------------------------------------------


def test_the_band_is_a_bootstrap_s_over_requests():
    student, teacher = made_up(1, requests=20), made_up(2, requests=20)
    columns, rng, errors = curve(student, teacher, 10, "x"), np.random.default_rng(0), []
    for _ in range(1000):  # an own bootstrap, of draws instead of weights
        drawn = rng.integers(0, 20, 20)
        errors.append(
            by_hand([y for x in drawn for y in student[x]], [y for x in drawn for y in teacher[x]])[
                2, :6
            ]
        )
    low, high = np.percentile(errors, [2.5, 97.5], axis=0)
    width = high - low
    assert np.abs(np.array(columns["low"][:6]) - low).max() < 0.25 * width.min()
    assert np.abs(np.array(columns["high"][:6]) - high).max() < 0.25 * width.min()
    assert (np.array(columns["low"]) < columns["ex_acc_err"]).all() and (
        np.array(columns["high"]) > columns["ex_acc_err"]
    ).all()


def test_r_and_epsilon_of_a_request_stay_together():
    """The student loses a tenth at every request, however different these are: drawn together, there is no doubt about it."""
    teacher = [[[10.0**x] * 4] for x in range(6)]
    student = [[[1.1 * value for value in responses[0]]] for responses in teacher]
    columns = curve(student, teacher, 10, "x")
    assert [*columns["low"], *columns["high"]] == pytest.approx([10] * 8)


def test_the_responses_of_a_request_stay_together():
    """Every request has the same three responses, however different these are: drawn together, there is no doubt about the mean."""
    columns = curve([[[1.0], [10.0], [100.0]]] * 6, [[[2.0], [3.0], [50.0]]] * 6, 10, "x")
    assert [columns["low"][0], columns["high"][0]] == pytest.approx([100 * (111 / 55 - 1)] * 2)


def test_the_band_is_the_seed_s():
    student, teacher = made_up(1), made_up(2)
    assert curve(student, teacher, 10, "x") == curve(student, teacher, 10, "x")
    assert curve(student, teacher, 10, "x")["low"] != curve(student, teacher, 11, "x")["low"]


def test_the_teacher_has_no_exposure_bias_against_itself():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error_of(curve, [[[0.0, 0.0]]], [[[0.0]]], 10, "out/copy").startswith(
            "out/copy: its distribution is the teacher's own"
        )


def test_a_curve_is_readable_while_a_tenth_of_both_kinds_is_alive():
    columns = {"alive_student": [40, 30, 4, 3, 0], "alive_teacher": [40, 40, 40, 40, 40]}
    assert (
        last_reliable_step(columns) == 3
        and last_reliable_step(
            {"alive_student": columns["alive_teacher"], "alive_teacher": columns["alive_student"]}
        )
        == 3
    )
    assert last_reliable_step({"alive_student": [5], "alive_teacher": [5]}) == 1


def test_responses_are_grouped_by_request_whatever_the_rank_they_come_from():
    student, teacher = group(
        [
            (0, [1], [10]),
            (0, [2], [20]),
            (2, [3], [30]),
            (2, [4], [40]),
            (1, [5], [50]),
            (1, [6], [60]),
        ]
    )
    assert student == ([[1], [2]], [[5], [6]], [[3], [4]]) and teacher == (
        [[10], [20]],
        [[50], [60]],
        [[30], [40]],
    )


# ---- the KL at each step -----------------------------------------------------------------------------------------------------

SMALL = replace(TINY, n_layer=1, n_embd=16)  # the student's sizes
END = TINY.vocab_size - 1
REQUESTS = [[5, 17, 60, 3], [8], [41, 8, 22, 1, 9, 30, 2], [8], [50, 4]]
RESPONSES = [
    [7, 7, 31],
    [3, END],
    [END],
    [12, 9, 4, 4, 58, 6, END],
    [END, 2],
]  # an end-of-text inside is a token like any other


def numpy_kl(p, q, n_head, request, response):
    """KL(p || q) at each token of a response: p and q are weights, as arrays."""
    p_logits, q_logits = (gpt2_logits(w, n_head, request + response) for w in (p, q))
    return [
        token_kl(p_logits[len(request) + t - 1], q_logits[len(request) + t - 1])
        for t in range(len(response))
    ]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two tiny models, and their weights as arrays."""
    home = tmp_path_factory.mktemp("pair")
    arrays = [
        as_arrays(load_file(write_checkpoint(home / name, config) / "model.safetensors"))
        for name, config in [("p", TINY), ("q", SMALL)]
    ]
    return tiny_model(TINY), tiny_model(SMALL), *arrays


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_the_kl_of_each_token_is_an_independent_gpt2_s_from_the_first_on(pair, micro_batch_size):
    p, q, p_arrays, q_arrays = pair
    results = step_kl(p, q, REQUESTS, RESPONSES, micro_batch_size)
    assert [len(values) for values in results] == [len(response) for response in RESPONSES]
    for request, response, values in zip(REQUESTS, RESPONSES, results):
        assert values == pytest.approx(numpy_kl(p_arrays, q_arrays, 4, request, response), abs=1e-5)


def test_the_kl_is_the_forward_one(pair):
    p, q, p_arrays, q_arrays = pair
    assert step_kl(p, q, REQUESTS[:1], RESPONSES[:1])[0] != pytest.approx(
        numpy_kl(q_arrays, p_arrays, 4, REQUESTS[0], RESPONSES[0]), rel=0.05
    )


def test_the_first_token_s_step_does_not_hang_on_the_response(pair):
    first, second = step_kl(*pair[:2], [REQUESTS[0]] * 2, [[7, 7, 31], [9, 2, 31]])
    assert first[0] == pytest.approx(second[0], abs=1e-6) and abs(first[1] - second[1]) > 1e-3


def test_the_kl_of_a_model_to_itself_is_zero(pair):
    assert all(
        value == pytest.approx(0, abs=1e-6)
        for values in step_kl(pair[0], pair[0], REQUESTS, RESPONSES)
        for value in values
    )


def test_no_responses_give_no_kl(pair):
    assert step_kl(*pair[:2], [], []) == []  # a rank without requests


# ---- checkpoints along training ----------------------------------------------------------------------------------------------


def make_run(directory, best, steps, record=None):
    (directory / "best").mkdir(parents=True)
    (directory / "run.json").write_text(
        json.dumps({"best_step": best, "total_steps": 880}) if record is None else record
    )
    for step in steps:
        (directory / "kept" / f"step-{step:06d}").mkdir(parents=True)
    return directory


def test_the_ten_checkpoints_nearest_to_tenths_of_the_best_step_are_taken(tmp_path):
    run = make_run(tmp_path / "run", 800, range(44, 881, 44))  # --keep 20 of 880 steps
    found = checkpoints(run)
    assert list(found) == [88, 176, 220, 308, 396, 484, 572, 660, 704, 800]
    assert found[88] == run / "kept" / "step-000088" and found[800] == run / "best"


def test_a_best_checkpoint_far_from_the_end_leaves_fewer(tmp_path):
    assert list(checkpoints(make_run(tmp_path / "a", 88, range(44, 881, 44)))) == [44, 88]
    assert checkpoints(make_run(tmp_path / "b", 88, [88, 176]))[88] == tmp_path / "b" / "best"
    assert list(checkpoints(make_run(tmp_path / "c", 10, [50, 100]))) == [10]


def test_other_folders_among_the_kept_are_left_alone(tmp_path):
    run = make_run(tmp_path / "run", 100, [10, 50])
    for name in ("step-", "step-x", "step-000020.partial", ".step-000030"):
        (run / "kept" / name).mkdir()
    assert list(checkpoints(run)) == [10, 50, 100]


@pytest.mark.parametrize(
    "record",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        '{"best_step": null}',
        '{"best_step": "5"}',
        '{"best_step": 0}',
        '{"best_step": true}',
    ],
)
def test_a_run_without_its_best_step_is_one_line(tmp_path, record):
    message = error_of(checkpoints, make_run(tmp_path / "run", 0, [1], record))
    assert (
        message.startswith(f"{tmp_path / 'run' / 'run.json'}: has no 'best_step'")
        and "--keep 20" in message
    )


def test_a_run_without_kept_checkpoints_is_one_line(tmp_path):
    assert error_of(checkpoints, make_run(tmp_path / "run", 5, [])).startswith(
        f"{tmp_path / 'run' / 'kept'}: has no checkpoints"
    )
    assert error_of(checkpoints, tmp_path / "none").startswith(
        f"{tmp_path / 'none' / 'run.json'}: "
    )


def test_students_are_called_by_the_last_part_of_their_name_where_that_tells_them_apart():
    assert short_names(["out/a-s10/", "out/b/best", "gpt2", "owner/c"]) == {
        "out/a-s10/": "a-s10",
        "out/b/best": "b",
        "gpt2": "gpt2",
        "owner/c": "c",
    }
    assert short_names(["x/run", "y/run", "y/other"]) == {
        name: name for name in ["x/run", "y/run", "y/other"]
    }
    assert short_names(["x/run", "x/run"]) == {"x/run": "x/run"}
    assert short_names(["."]) == {".": "."}


# ---- the command -------------------------------------------------------------------------------------------------------------

ROWS = [
    {"instruction": "Write a task." * (n + 1), "input": "describes" * (n % 2)} for n in range(5)
]
SAMPLES, STEPS = 2, 7
WHAT = ["--samples", SAMPLES, "--steps", STEPS]


def write_talker(directory, scale, **sizes):
    """A tiny model whose responses end, now and then, within a few tokens: its end-of-text has an embedding of this scale."""
    config = replace(talker_config(), **sizes)
    path = write_checkpoint(directory, config, tiny_tokenizer()) / "model.safetensors"
    weights = load_file(path)
    weights["wte.weight"] *= 0.5  # a flatter distribution
    weights["wte.weight"][tiny_tokenizer().eot_token] *= scale
    save_file(weights, path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, a student, a run with kept checkpoints, and a data set."""
    home = tmp_path_factory.mktemp("world")
    write_talker(home / "teacher", 8)
    write_talker(home / "student", -3, n_layer=1)
    write_rows(home / "set" / "test.jsonl", ROWS)
    make_run(home / "run", 9, [])
    for folder, scale in [("best", -2), ("kept/step-03", -5), ("kept/step-06", -4)]:
        write_talker(home / "run" / folder, scale, n_layer=1)
    return home


def run(world, capsys, *arguments, out="out", students=("student",), along=()):
    """The command. Returns what it writes and what it prints."""
    names = [
        flag
        for flag in [
            ("--students", *(world / s for s in students)),
            ("--along", *(world / r for r in along)),
        ]
        if len(flag) > 1
    ]
    main(
        [
            str(a)
            for a in [
                "--teacher",
                world / "teacher",
                *[part for flag in names for part in flag],
                "--data",
                world / "set",
                *WHAT,
                *arguments,
                "--out",
                world / out,
            ]
        ]
    )
    figures = {}
    for path in sorted((world / out).glob("*.json")):
        with open(path.with_suffix(".csv"), newline="") as file:
            figures[path.stem] = json.loads(path.read_text()), list(csv.DictReader(file))
    return figures, capsys.readouterr().out


def responses_alone(directory, role, steps=STEPS, seed=10):
    """What a model says to each row, each response sampled alone: by request."""
    model, tokenizer = load(directory).eval(), tiny_tokenizer()
    requests = [
        tokenizer.encode_ordinary(fill_template(row["instruction"], row["input"])) for row in ROWS
    ]
    return [
        [
            (
                request,
                sample(
                    model,
                    [request],
                    row_uniforms(steps, seed, "exposure", role, n, index)[None],
                    tokenizer.eot_token,
                    steps,
                )[0][0],
            )
            for n in range(SAMPLES)
        ]
        for index, request in enumerate(requests)
    ]


def test_the_curve_is_an_independent_computation_s(world, capsys):
    """From the weights on: NumPy's GPT-2 on the responses, each alone, and the sums from the definition."""
    figures, _ = run(world, capsys)
    arrays = [
        as_arrays(load_file(world / name / "model.safetensors")) for name in ("teacher", "student")
    ]
    kl = {}
    for role in ("teacher", "student"):
        pairs = flat(responses_alone(world / role, role))
        kl[role] = [
            numpy_kl(*arrays, talker_config().n_head, request, response)
            for request, response in pairs
        ]
    R, epsilon, error = by_hand(kl["student"], kl["teacher"])
    columns = figures["figure_3a"][0]["students"]["student"]
    assert columns["l"] == list(range(1, len(R) + 1)) and list(columns) == COLUMNS
    assert columns["R"] == pytest.approx(R, rel=1e-4) and columns["epsilon"] == pytest.approx(
        epsilon, rel=1e-4
    )
    assert columns["ex_acc_err"] == pytest.approx(error, rel=1e-3, abs=0.01) and error[
        0
    ] == pytest.approx(0, abs=1e-6)
    for role in ("student", "teacher"):
        lengths = [len(values) for values in kl[role]]
        assert columns[f"alive_{role}"] == [
            sum(length >= l for length in lengths) for l in columns["l"]
        ]
        assert len(set(lengths)) > 2  # or the test would not see responses end


def test_the_csv_and_the_json_say_the_same_and_the_settings_are_kept(world, capsys):
    figures, out = run(world, capsys, students=("student", "run"))
    content, lines = figures["figure_3a"]
    assert list(content["students"]) == ["student", "run"] and list(lines[0]) == [
        "student",
        *COLUMNS,
    ]
    for label, columns in content["students"].items():
        of_label = [line for line in lines if line["student"] == label]
        assert {name: [float(line[name]) for line in of_label] for name in COLUMNS} == columns
    settings = content["settings"]
    assert (
        settings["requests"] == 5
        and settings["samples"] == SAMPLES
        and settings["seed"] == 10
        and settings["steps"] == STEPS
    )
    assert settings["teacher"] == str(world / "teacher") and settings["students"] == [
        str(world / "student"),
        str(world / "run"),
    ]
    l = last_reliable_step(content["students"]["student"])
    assert (
        out.startswith(
            f"student: ExAccErr {content['students']['student']['ex_acc_err'][l - 1]:+.1f} % (95 %: "
        )
        and f"at l = {l}, " in out
    )
    assert "figure_3a.csv" in out.splitlines()[-1] and set(figures) == {"figure_3a"}


def test_fewer_steps_are_the_first_of_more(world, capsys):
    more, fewer = (
        run(world, capsys, "--steps", steps)[0]["figure_3a"][0]["students"]["student"]
        for steps in (STEPS, 3)
    )
    for name in COLUMNS:
        assert fewer[name] == pytest.approx(more[name][:3], rel=1e-4, abs=0.01)


def test_seed_rows_and_samples_are_obeyed(world, capsys):
    plain = run(world, capsys)[0]["figure_3a"][0]["students"]["student"]
    assert plain["alive_student"][0] == plain["alive_teacher"][0] == 5 * SAMPLES
    other = run(world, capsys, "--seed", 11)[0]["figure_3a"][0]["students"]["student"]
    assert other["R"][1] != pytest.approx(plain["R"][1], rel=1e-3) and other["epsilon"][
        1
    ] != pytest.approx(plain["epsilon"][1], rel=1e-3)
    few, content = run(world, capsys, "--rows", 2, "--samples", 4)[0]["figure_3a"][::-1]
    assert few[0]["alive_student"] == "8" and content["settings"]["requests"] == 2
    batches = run(world, capsys, "--batch", 3, "--micro-batch", 2)[0]["figure_3a"][0]["students"][
        "student"
    ]
    for name in COLUMNS:
        assert batches[name] == pytest.approx(plain[name], rel=1e-4, abs=0.01)


def test_sampling_is_plain_the_teacher_s_is_done_once_and_its_random_numbers_are_its_own(
    world, capsys, monkeypatch
):
    calls, sample_all = [], exposure_bias.sample_all

    def watched(model, requests, keys, end, max_new_tokens, batch_size, **how):
        calls.append((keys, max_new_tokens, how))
        return sample_all(model, requests, keys, end, max_new_tokens, batch_size, **how)

    monkeypatch.setattr(exposure_bias, "sample_all", watched)
    run(world, capsys, students=("student", "run"), along=("run",))
    assert [max_new_tokens for _, max_new_tokens, _ in calls] == [
        STEPS
    ] * 6  # teacher, two students, three checkpoints
    assert all(set(how) == {"label", "dtype"} for *_, how in calls)  # no ban, no temperature
    teacher, *students = (keys for keys, *_ in calls)
    assert all(keys == students[0] for keys in students)  # what is drawn is comparable
    assert (
        not set(teacher) & set(students[0])
        and len(set(teacher)) == len(set(students[0])) == 5 * SAMPLES
    )
    drawn = {row_uniforms(1, *key).item() for key in teacher + students[0]}
    assert len(drawn) == 2 * 5 * SAMPLES


# ---- along training ----------------------------------------------------------------------------------------------------------


def test_the_points_along_training_are_those_of_the_checkpoints_curves(world, capsys):
    figures, out = run(world, capsys, students=(), along=("run",))
    assert set(figures) >= {"figure_3b"}
    content, lines = figures["figure_3b"]
    columns = content["runs"]["run"]
    assert list(columns) == ["step", "percent", *COLUMNS] and list(lines[0]) == ["run", *columns]
    assert columns["step"] == [3, 6, 9] and columns["percent"] == pytest.approx(
        [100 / 3, 200 / 3, 100]
    )
    assert [line["run"] for line in lines] == ["run"] * 3 and [
        float(line["R"]) for line in lines
    ] == columns["R"]
    students = ("run/kept/step-03", "run/kept/step-06", "run")
    curves = list(
        run(world, capsys, students=students, out="curves")[0]["figure_3a"][0]["students"].values()
    )
    l = min(map(last_reliable_step, curves))
    assert columns["l"] == [l] * 3 and (f"at l = {l}, not {STEPS}" in out) == (l < STEPS)
    for name in COLUMNS:
        assert columns[name] == pytest.approx(
            [points[name][l - 1] for points in curves], rel=1e-4, abs=0.01
        )
    assert sum(line.startswith("run, step ") for line in out.splitlines()) == 3


def test_along_training_l_is_50_at_most(world, capsys, monkeypatch):
    monkeypatch.setattr(exposure_bias, "REPORT_STEP", 2)
    figures, out = run(world, capsys, along=("run",), out="both")
    assert figures["figure_3b"][0]["runs"]["run"]["l"] == [2] * 3 and "not 2" not in out
    assert figures["figure_3a"][0]["students"]["student"]["l"][-1] > 2
    assert (
        files_below(world / "both")
        == [f"figure_3{n}.{kind}" for n in "ab" for kind in ("csv", "json", "png")]
        or report.pyplot() is None
    )


# ---- ranks -------------------------------------------------------------------------------------------------------------------


def test_two_ranks_give_the_curve_of_one(world, capsys):
    wanted = run(world, capsys, out="one")[0]["figure_3a"][0]["students"]["student"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launcher = [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master_port={free.getsockname()[1]}",
        ]
    arguments = [
        "--teacher",
        world / "teacher",
        "--students",
        world / "student",
        "--data",
        world / "set",
        *WHAT,
        "--out",
        world / "two",
    ]
    done = run_command(*launcher, "exposure_bias.py", *arguments)
    assert done.returncode == 0, done.stderr
    columns = json.loads((world / "two" / "figure_3a.json").read_text())["students"]["student"]
    for name in COLUMNS:
        assert columns[name] == pytest.approx(wanted[name], rel=1e-4, abs=0.01)
    assert done.stdout.count("ExAccErr") == 1


# ---- pictures ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pyplot():
    pytest.importorskip("matplotlib")
    pyplot = report.pyplot()
    yield pyplot
    pyplot.close("all")


def zero_lines(axes):
    return [line for line in axes.lines if set(np.ravel(line.get_ydata())) == {0}]


def test_figure_3a_has_a_line_a_student_a_band_a_zero_line_and_the_responses_alive(pyplot):
    series = {
        "first": curve(made_up(1, 30), made_up(2, 30), 10, "x"),
        "second": curve(made_up(3, 30, steps=5), made_up(2, 30), 10, "x"),
    }
    top, bottom = plot_steps(pyplot, series, "dolly").axes
    assert top.get_legend_handles_labels()[1] == [
        "first",
        "second",
    ] and bottom.get_legend_handles_labels()[1] == ["teacher's"]
    assert (
        "%" in top.get_ylabel()
        and "step" in bottom.get_xlabel()
        and "alive" in bottom.get_ylabel()
        and "dolly" in top.get_title()
    )
    assert zero_lines(top) and len(top.collections) == 2
    first, second = (
        next(line for line in top.lines if line.get_label() == label) for label in series
    )
    n = last_reliable_step(series["first"])
    assert (
        list(first.get_xdata()) == list(range(1, n + 1))
        and list(first.get_ydata()) == series["first"]["ex_acc_err"][:n]
    )
    assert first.get_color() != second.get_color()
    assert [list(line.get_ydata()) for line in bottom.lines] == [
        series["first"]["alive_student"],
        series["second"]["alive_student"],
        series["first"]["alive_teacher"],
    ]


def test_figure_3b_has_a_line_a_run_over_the_percent_of_the_best_step(pyplot):
    columns = {
        "percent": [10.0, 50.0, 100.0],
        "l": [50] * 3,
        "ex_acc_err": [9.0, 5.0, -1.0],
        "low": [8.0, 4.0, -2.0],
        "high": [10.0, 6.0, 0.5],
    }
    [axes] = plot_training(pyplot, {"promptkd": columns, "gkd": columns}, "dolly").axes
    assert (
        axes.get_legend_handles_labels()[1] == ["promptkd", "gkd"]
        and zero_lines(axes)
        and len(axes.collections) == 2
    )
    assert "l = 50" in axes.get_ylabel() and "%" in axes.get_ylabel() and "%" in axes.get_xlabel()
    line = next(line for line in axes.lines if line.get_label() == "gkd")
    assert (
        list(line.get_xdata()) == columns["percent"]
        and list(line.get_ydata()) == columns["ex_acc_err"]
    )


def test_without_matplotlib_the_tables_are_written_and_it_is_said(world, capsys, monkeypatch):
    monkeypatch.setattr(report, "pyplot", lambda: None)
    _, out = run(world, capsys, out="plain")
    assert (
        files_below(world / "plain") == ["figure_3a.csv", "figure_3a.json"]
        and "no picture without matplotlib" in out
    )


# ---- what can be wrong -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(world):
    """Models that do not go with the teacher."""
    write_checkpoint(
        world / "of another tokenizer",
        replace(talker_config(), vocab_size=load_tokenizer(TOKENIZER_DIR).n_vocab),
        load_tokenizer(TOKENIZER_DIR),
    )
    (world / "empty").mkdir()
    make_run(world / "not kept", 9, [])
    write_rows(world / "wrong" / "test.jsonl", [{"instruction": 5}])
    return world


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--students"),
        (["--students", "none"], "model 'none': no such directory"),
        (["--students", "empty"], "config.json: no such file"),
        (["--students", "student", "of another tokenizer"], "different tokenizers"),
        (["--students", "student", "--data", "nowhere"], "'nowhere': no such directory"),
        (["--students", "student", "--data", "empty"], "test.jsonl: no such file"),
        (["--students", "student", "--data", "wrong"], "test.jsonl, line 1: 'instruction'"),
        (["--students", "student", "--steps", "256"], "exceed the model's 288 positions"),
        (["--students", "teacher"], "teacher: its distribution is the teacher's own"),
        (["--along", "student"], "run.json: has no 'best_step'"),
        (["--along", "not kept"], "has no checkpoints"),
        (["--students", "student", "--teacher", "none"], "model 'none': no such directory"),
    ],
)
def test_a_wrong_command_is_one_line_of_error_and_writes_nothing(
    broken, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(broken)
    given = [
        "--teacher",
        "teacher",
        "--data",
        "set",
        "--samples",
        "1",
        "--rows",
        "2",
        "--out",
        "never",
    ]
    given += [] if "--steps" in arguments else ["--steps", "3"]
    with pytest.raises(SystemExit) as left:
        run_command_line(lambda: main([*given, *arguments]))
    error = after_device(capsys.readouterr().err)
    assert (
        left.value.code == 2
        and error.startswith("error: ")
        and error.count("\n") == 1
        and words in error
    )
    assert not (broken / "never").exists()


def test_a_student_that_can_t_be_used_is_said_before_anything_is_sampled(broken, monkeypatch):
    monkeypatch.setattr(
        exposure_bias, "sample_all", lambda *arguments, **how: pytest.fail("sampled")
    )
    for student in ("none", "empty", "of another tokenizer"):
        with pytest.raises((InputError)):
            main(
                [
                    "--teacher",
                    str(broken / "teacher"),
                    "--students",
                    str(broken / "student"),
                    str(broken / student),
                    "--data",
                    str(broken / "set"),
                ]
            )


@pytest.mark.parametrize(
    "option",
    [
        ["--steps", "0"],
        ["--steps", "257"],
        ["--samples", "0"],
        ["--rows", "0"],
        ["--seed", "-1"],
        ["--students"],
    ],
)
def test_an_option_out_of_range_is_the_parser_s_error(capsys, option):
    with pytest.raises(SystemExit) as left:
        main(["--teacher", "x", "--students", "y", *option])
    assert left.value.code == 2 and option[0] in capsys.readouterr().err


def test_requests_that_were_shortened_are_counted(world, capsys, monkeypatch):
    write_rows(
        world / "long" / "test.jsonl",
        [{"instruction": "Write.", "input": "many " * 200}, {"instruction": "Write."}],
    )
    _, out = run(
        world, capsys, "--data", world / "long", "--samples", 1, "--steps", 2, out="long-out"
    )
    assert out.startswith("1 of 2 requests were shortened to fit\n")


def test_the_command_ends_with_status_2_and_one_line(world):
    done = run_command(
        "exposure_bias.py",
        "--teacher",
        world / "teacher",
        "--students",
        world / "none",
        "--data",
        world / "set",
    )
    err = after_device(done.stderr)
    assert (
        done.returncode == 2
        and done.stdout == ""
        and err.startswith("error: ")
        and err.count("\n") == 1
    )
    assert torch.is_grad_enabled()
