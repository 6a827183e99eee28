"""The benchmark itself: the re-stated recipe and train.py's step agree where they should, sampling
is forced but does all its work, the roofline bound is the one counted by hand, and every measure of
bench.py runs at a tiny size."""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import bench
import pytest
import recipe
import roofline
import torch
from helpers import after_device, talker_config, tiny_model, tiny_tokenizer, write_rows
from recipe import force_responses, recipe_step, token_table

import sample
import train
from data.models import sampling
from data.process.errors import InputError
from data.sets.rows import Example

CPU = torch.device("cpu")
TINY = bench.CASES["XS"] | {"vocab": 61, "dropout": 0.0}
LIMIT, EOS = TINY["max_new_tokens"], TINY["vocab"] - 1
UNEQUAL = [
    Example(7, [3, 1, 4], [1, 5, EOS]),
    Example(2, [9, 2, 6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2]),
    Example(4, [6], [EOS]),
]
WITH_PHASES = (*bench.PHASES, "whole")


@pytest.fixture(autouse=True)
def restore_threads():
    """bench.main sets the number of torch's threads."""
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)


def forced_to(examples):
    responses = {e.index: e.response for e in examples}
    return force_responses(responses, LIMIT, EOS, CPU)


def iterate(monkeypatch, step, examples, *convert):
    """Run one iteration on a new run.

    Returns the losses, the gradients that were stepped on, {"prompt": [...], "student": [...]}, and
    the run.
    """
    run = bench.make_run(TINY, CPU, *convert)
    gradients = {}
    clip_and_step = train.clip_and_step

    def recording_step(optimizer):
        name = "prompt" if optimizer is run.prompt_optimizer else "student"
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients[name] = [p.grad.clone() for p in parameters if p.grad is not None]
        return clip_and_step(optimizer)

    with monkeypatch.context() as patch, forced_to(examples):
        patch.setattr(train, "clip_and_step", recording_step)
        losses = step(run, examples, 3)
    return losses, gradients, run


def recipe_of(*functions):
    """recipe_step as a step of train.py."""

    def step(run, examples, t):
        return recipe_step(run, TINY, examples, t, *functions)

    return step


def check_losses(losses, expected, names=("loss",)):
    for name in names:
        assert losses[name] == pytest.approx(float(expected[name]), abs=1e-4), name
        assert losses[name] > 0.01, name


def check_gradients(gradients, expected):
    for name in ("prompt", "student"):
        assert len(gradients[name]) == len(expected[name]) > 0
        assert max(grad.abs().max() for grad in expected[name]) > 1e-3
        for grad, expected_grad in zip(gradients[name], expected[name]):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-5)


def test_recipe_and_train_agree_on_one_pair_of_rows_of_equal_length(monkeypatch):
    examples = bench.make_examples(TINY | {"rows": 2})
    losses, gradients, recipe_run = iterate(monkeypatch, recipe_of(), examples)
    expected, expected_gradients, our_run = iterate(monkeypatch, train.promptkd_step, examples)
    check_losses(losses, expected, ("loss", "prompt_loss"))
    check_gradients(gradients, expected_gradients)
    for run in (recipe_run, our_run):
        assert all(run.seconds[phase] > 0 for phase in bench.PHASES)


def test_recipe_averages_micro_batches_and_updates_once(monkeypatch):
    """Without a learning rate: otherwise the first pair distils from the earlier prompt."""

    def set_to_zero(optimizer, lr):
        for group in optimizer.param_groups:
            group["lr"] = 0.0

    examples = bench.make_examples(TINY)
    monkeypatch.setattr(bench, "set_learning_rate", set_to_zero)
    losses, gradients, _ = iterate(monkeypatch, recipe_of(), examples)
    expected, expected_gradients, _ = iterate(monkeypatch, train.promptkd_step, examples)
    check_losses(losses, expected)
    check_gradients(gradients, expected_gradients)


def test_recipe_pads_pairs_to_the_limits_and_averages_over_their_tokens(monkeypatch):
    shapes = []

    def logits(model, ids, mask, P=None):
        shapes.append(ids.shape)
        return recipe.plain_logits(model, ids, mask, P)

    losses, gradients, _ = iterate(monkeypatch, recipe_of(logits), UNEQUAL[:2])
    expected, expected_gradients, _ = iterate(monkeypatch, train.promptkd_step, UNEQUAL[:2])
    check_losses(losses, expected)
    check_gradients(gradients, expected_gradients)
    # Student, bare teacher and prompted teacher; then prompted teacher and student
    assert shapes == [(2, 24)] * 5


def test_recipe_on_transformers_gives_the_same_losses(monkeypatch):
    pytest.importorskip("transformers")
    expected, _, _ = iterate(monkeypatch, recipe_of(), UNEQUAL)
    step = recipe_of(recipe.hf_logits, recipe.hf_sample)
    losses, _, run = iterate(monkeypatch, step, UNEQUAL, recipe.to_hf)
    assert losses == pytest.approx(expected, abs=1e-4)
    assert "transformers" in type(run.student).__module__


def plain_sample(model, examples):
    forced = token_table([e.response for e in examples], LIMIT, EOS, CPU)
    return recipe.plain_sample(model, [e.request for e in examples], forced, LIMIT, EOS)


def test_both_samplers_return_the_forced_responses_and_do_all_the_work(monkeypatch):
    model, shapes = bench.make_model(TINY, "student").eval(), []
    sample_next_token, multinomial = sample.sample_next_token, torch.multinomial

    def recording_next_token(logits, *args, **kwargs):
        shapes.append(tuple(logits.shape))
        return sample_next_token(logits, *args, **kwargs)

    def recording_multinomial(probs, n):
        shapes.append(tuple(probs.shape))
        return multinomial(probs, n)

    monkeypatch.setattr(sample, "sample_next_token", recording_next_token)
    monkeypatch.setattr(torch, "multinomial", recording_multinomial)
    requests, expected = [e.request for e in UNEQUAL], [e.response for e in UNEQUAL]
    with forced_to(UNEQUAL):
        keys = [(10, "rollout", 0, e.index) for e in UNEQUAL]
        assert sampling.sample_all(model, requests, keys, EOS, LIMIT)[0] == expected
    assert len(shapes) == 12
    assert shapes[0] == (3, 61)
    assert {n_tokens for _, n_tokens in shapes} == {61}
    shapes.clear()
    assert plain_sample(model, UNEQUAL) == expected
    assert shapes == [(3, 61)] * 12  # no row is dropped
    shapes.clear()
    assert plain_sample(model, UNEQUAL[::2]) == expected[::2]
    assert len(shapes) == 3  # until both rows have finished
    monkeypatch.undo()
    assert sample.sample_next_token is sample_next_token
    assert sampling.row_uniforms is sample.row_uniforms


def test_plain_sampling_has_the_distributions_of_forwards_without_a_cache(monkeypatch):
    model, probs = bench.make_model(TINY, "student").eval(), []
    multinomial = torch.multinomial

    def recording_multinomial(p, n):
        probs.append(p)
        return multinomial(p, n)

    monkeypatch.setattr(torch, "multinomial", recording_multinomial)
    plain_sample(model, UNEQUAL[:2])
    for row, e in enumerate(UNEQUAL[:2]):
        for t in range(len(e.response)):
            hidden = model(torch.tensor([e.request + e.response[:t]]))
            expected = model.logits(hidden)[0, -1].softmax(-1)
            torch.testing.assert_close(probs[t][row], expected, rtol=1e-4, atol=1e-6)


def test_forced_uniforms_of_a_large_evaluation_identify_their_tokens():
    responses = {index: [(index * 7 + t) % 50_000 for t in range(256)] for index in range(500)}
    with force_responses(responses, 256, 50_256, CPU):
        rows = [sampling.row_uniforms(256, 10, "evaluate", "dolly", index) for index in responses]
        u = torch.stack([torch.from_numpy(row) for row in rows])
        for t in (0, 1, 128, 255):
            tokens, _ = sample.sample_next_token(torch.zeros(500, 3), u[:, t])
            assert tokens.tolist() == [response[t] for response in responses.values()]


# ---- the roofline bound --------------------------------------------------------------------------


def test_count_of_one_row_by_hand():
    """Student of 1 layer of width 2, teacher of 1 layer of width 3, a vocabulary of 5; one row of
    2 + 3 tokens, of which 4 are read."""
    case = {"student": "1x2x1", "teacher": "1x3x1", "vocab": 5}
    work = roofline.count_work(case, [Example(0, [1, 2], [1, 2, 3])])
    first = 24 * 4 * 2 + 2 * 2 * 2 * 3 + 2 * 2 * 5  # body, attention, head
    q = 24 * 4 * 4 + 2 * 2 * 4 * 5 + 3 * 2 * 2 * 5
    p = 24 * 9 * 4 + 2 * 3 * 4 * 5 + 3 * 2 * 3 * 5
    prompted = 24 * 9 * 11 + 2 * 3 * 11 * 12 + 3 * 2 * 3 * 5
    w_q, w_p = 12 * 4 + 10, 12 * 9 + 15
    assert work["sampling"] == [(first, 4 * w_q), (q - first, 4 * (2 * w_q + 2 * 2 * (2 + 3)))]
    assert work["prompt"] == [(q + p + 2 * prompted, 4 * (w_q + 3 * w_p))]
    assert work["student"] == [(3 * q + prompted, 4 * (3 * w_q + w_p)), (0, 28 * w_q)]


def test_bound_is_the_slower_of_operations_and_bytes_of_each_part():
    seconds = roofline.bound_seconds({"a": [(10, 10), (10, 400)], "b": [(0, 20)]}, (5, 20))
    assert seconds == {"a": 2 + 20, "b": 1, "whole": 23}


def bound_of(case):
    work = roofline.count_work(case, bench.make_examples(case))
    return roofline.bound_seconds(work, (187e9, 33e9))


@pytest.mark.parametrize("size, expected", [("S", 0.76), ("M", 8.39)])
def test_bound_at_known_rates(size, expected):
    assert bound_of(bench.CASES[size])["whole"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("axis", bench.AXES)
def test_bound_is_positive_and_grows_along_every_axis(axis):
    bounds = [bound_of(bench.case_at(bench.CASES["S"], axis, value)) for value in bench.AXES[axis]]
    for phase in bench.PHASES:
        assert bounds[0][phase] > 0
        assert all(a[phase] < b[phase] for a, b in pairwise(bounds)), phase
    ratio = bounds[-1]["prompt"] / bounds[0]["prompt"]
    assert ratio == pytest.approx(8, rel=1e-6) if axis == "rows" else ratio > 1.5


# ---- one process per side ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_side_in_a_process_answers_with_losses_seconds_of_all_phases_and_memory(capfd):
    with bench.start_processes({"ours": bench.job_command("step", "ours", TINY, 1)}) as processes:
        initial_memory = bench.ask(processes, "ours")
        first, second = bench.ask(processes, "ours", 2, 0), bench.ask(processes, "ours", 4, 1)
    assert 0.05 < initial_memory["resident"] <= first["memory"]["resident"] < 4
    assert set(first["seconds"]) == set(WITH_PHASES)
    assert min(first["seconds"].values()) > 0
    assert second["losses"] != first["losses"]
    assert second["memory"]["resident"] >= first["memory"]["resident"]
    assert processes["ours"].returncode == 0
    assert capfd.readouterr().err == ""  # not even the line about the device


def test_processes_are_killed_when_their_context_raises():
    commands = dict.fromkeys(("recipe", "ours"), ["sleep", "60"])
    with pytest.raises(ZeroDivisionError), bench.start_processes(commands) as processes:
        assert all(process.poll() is None for process in processes.values())
        raise ZeroDivisionError
    assert [process.returncode for process in processes.values()] == [-9, -9]


def test_a_process_that_dies_between_two_steps_is_named_and_its_errors_are_printed(capsys):
    script = "echo 'device: CPU' >&2; echo 'no memory' >&2; echo '{}'; exec sleep 60"
    message = r"^ours: its process failed \(exit status -9\); is memory short\?$"
    with (
        pytest.raises(InputError, match=message),
        bench.start_processes({"ours": ["sh", "-c", script]}) as processes,
    ):
        assert bench.ask(processes, "ours") == {}
        processes["ours"].kill()
        processes["ours"].wait()
        bench.ask(processes, "ours", 2, 0)
    assert capsys.readouterr().err == "no memory\n"


def test_a_process_that_dies_ends_the_bench_with_one_line(monkeypatch, capsys, tmp_path):
    dies = tmp_path / "python"
    dies.write_text("#!/bin/sh\nkill -9 $$\n")
    dies.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dies))
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **kwargs: None, raising=False)
    monkeypatch.setattr(bench, "machine_rates", lambda device, dtype: (1e9, 1e9))
    with pytest.raises(SystemExit) as ended:
        bench.run_command_line(lambda: bench.main(["--size", "XS", "--threads", "1"]))
    error = after_device(capsys.readouterr().err)
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert error.startswith("error: recipe: ")
    assert "(exit status -9)" in error


# ---- the measures --------------------------------------------------------------------------------


def run_main(monkeypatch, capsys, take_turns, *argv):
    """bench.main with another take_turns. Returns what it printed, and its lines in words."""
    monkeypatch.setattr(bench, "machine_rates", lambda device, dtype: (1e9, 1e9))
    monkeypatch.setattr(bench, "take_turns", take_turns)
    bench.main([*argv, "--threads", "1"])
    printed = capsys.readouterr().out
    return printed, [line.split() for line in printed.splitlines() if line]


def job_of(command):
    return json.loads(command[command.index("--job") + 1])


def turns_in_this_process(commands, n_rows, repeats):
    """take_turns without processes: starting one takes seconds."""
    initial_memory = dict.fromkeys(n_rows, bench.peak_memory(CPU))
    answers = {}
    for name, command in commands.items():
        job = job_of(command)
        side = bench.WORK[job["work"]](job["name"], job["case"], CPU)
        results = [side(n_rows[name], t) for t in range(repeats)]
        answers[name] = [result | {"memory": bench.peak_memory(CPU)} for result in results]
    return answers, initial_memory


def fake_turns(commands, n_rows, repeats):
    """Numbers that identify the job."""
    answers = {}
    for name, command in commands.items():
        job = job_of(command)
        assert job["work"] == "step"
        assert command[command.index("--threads") + 1] == "1"
        assert ("--stock" in command) == (job["name"] in ("recipe", "transformers"))
        size = job["case"]["rows"] * job["case"]["vocab"]
        seconds = {"recipe": 3, "transformers": 5}.get(job["name"], 1) * size / 1000
        answer = {"seconds": dict.fromkeys(WITH_PHASES, seconds), "memory": {"resident": 1 + size}}
        answers[name] = [answer] * repeats
    return answers, dict.fromkeys(n_rows, {"resident": 0.25})


def test_size_prints_a_table_with_every_phase(monkeypatch, capsys):
    options = ("--size", "XS", "--repeats", "2")
    _, lines = run_main(monkeypatch, capsys, turns_in_this_process, *options)
    assert lines[0][0] == "cpu"
    assert "torch" in lines[0]
    assert lines[0][lines[0].index("threads,") - 1] == "1"
    table = {line[0]: line for line in lines}
    case = bench.CASES["XS"]
    work = roofline.count_work(case, bench.make_examples(case))
    bound = roofline.bound_seconds(work, (1e9, 1e9))
    for phase in WITH_PHASES:
        ratio, seconds, to_bound, share = table[phase][-4:]
        assert seconds == f"{bound[phase]:.2f}"
        assert min(float(to_bound), float(ratio), float(share.removesuffix("%"))) > 0
    assert 0.05 < float(table["peak"][3]) < 4


def test_the_first_repeat_is_printed_beside_the_median(monkeypatch, capsys):
    """What is built for a shape is paid for there, and a median hides it."""

    def turns(*arguments):
        answers, initial_memory = fake_turns(*arguments)
        first = answers["ours"][0]
        slow = {phase: 100 + seconds for phase, seconds in first["seconds"].items()}
        answers["ours"][0] = first | {"seconds": slow}
        return answers, initial_memory

    printed, _ = run_main(monkeypatch, capsys, turns, "--size", "XS", "--repeats", "3")
    assert "2.00 (2.00-102.00), first 102.00" in printed


def test_rows_with_lengths_of_their_own_differ_by_repeat():
    case = TINY | {"rows": 9, "lengths": [[3, 4], [9, 2], [5, 12], [7, 1]]}
    lengths = [
        [(len(e.request), len(e.response)) for e in bench.make_examples(case, t)] for t in (0, 1, 0)
    ]
    assert lengths[0] == lengths[2] != lengths[1]
    assert all([m, n] in case["lengths"] for m, n in lengths[0])
    step = bench.make_step("ours", case, CPU)
    shapes = [step(9, t)["micro_batches"] for t in (0, 1, 0)]
    assert shapes[0] == shapes[2] != shapes[1]


def test_size_compares_with_the_recipe_and_with_transformers(monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: "found")
    printed, lines = run_main(monkeypatch, capsys, fake_turns, "--size", "XS", "--hf")
    table = {line[0]: line for line in lines}
    assert "recipe / ours  transformers / ours  bound, s" in printed
    for phase in WITH_PHASES:
        assert table[phase][-5:-3] == ["3.00", "5.00"]
    assert table["peak"][3] == "2001.00"
    assert table["peak"][-2:] == ["1.00", "1.00"]


def test_scaling_writes_a_plot_and_leaves_out_what_takes_too_long(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "MAX_SECONDS", 500)
    path = tmp_path / "made" / "scaling.png"
    printed, _ = run_main(monkeypatch, capsys, fake_turns, "--scaling", "--out", str(path))
    points = json.loads(path.with_suffix(".json").read_text())["points"]
    seconds = {(point["axis"], point["value"], point["side"]): point["seconds"] for point in points}
    for axis, values in bench.AXES.items():
        for value in values:
            rows = value if axis == "rows" else 8
            vocab = value if axis == "vocab" else 50_257
            assert seconds[axis, value, "ours"] == rows * vocab / 1000
    assert ("rows", 8, "recipe") in seconds
    assert ("rows", 16, "recipe") not in seconds
    assert "left out" in printed
    plt = pytest.importorskip("matplotlib.pyplot")
    assert plt.imread(path).shape[0] > 300


def test_sampling_is_timed_on_every_side(monkeypatch, capsys):
    monkeypatch.setattr(bench, "take_turns", turns_in_this_process)
    args = SimpleNamespace(repeats=1, threads=1, dtype="float32", hf=False)
    bench.show_sampling(args, (1e9, 1e9), TINY)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "8", "32"]
    assert all(float(row[-2]) > 0 for row in rows)


def test_evaluation_gives_the_scores_of_the_references_on_both_sides(monkeypatch, capsys, tmp_path):
    model = tiny_model(replace(talker_config(), n_positions=288))
    rows = []
    for i in range(11):
        references = ["the task" + " or so" * (i % 3), "an other"]
        rows.append({"instruction": "name " + "a" * (i % 5), "output": references})
    write_rows(tmp_path / "test.jsonl", rows)
    monkeypatch.setattr(bench, "make_model", lambda case, role: model)
    monkeypatch.setattr(bench, "load_tokenizer", tiny_tokenizer)
    monkeypatch.setattr(bench, "MAX_NEW_TOKENS", 24)
    options = ("--evaluation", "--source", str(tmp_path), "--repeats", "2")
    printed, lines = run_main(monkeypatch, capsys, turns_in_this_process, *options)
    assert "evaluation of 11 Dolly rows" in printed
    table = [line[-1] for line in lines if line[0] in ("batches", "ours")]
    assert table[:2] == ["100.00", "100.00"]
    assert float(lines[-1][-1]) > 0


def test_pairs_print_the_ratio_to_another_checkout(monkeypatch, capsys, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "bench.py").touch()
    seconds = {"new": [1, 2, 3, 4, 5, 6], "old": [2, 2, 2, 2, 2, 2]}

    def turns(commands, n_rows, repeats):
        assert repeats == 6
        assert n_rows == {"new": 4, "old": 4}
        assert commands["new"][1] == bench.__file__
        assert commands["old"][1] == str(tmp_path / "tests" / "bench.py")
        case = job_of(commands["old"])["case"]
        assert case["max_new"] == case["max_new_tokens"] == 12  # the former is its older name
        answers = {}
        for name in commands:
            answers[name] = [{"seconds": dict.fromkeys(WITH_PHASES, s)} for s in seconds[name]]
        return answers, {}

    options = ("--size", "XS", "--pairs", "6", "--old", str(tmp_path))
    _, lines = run_main(monkeypatch, capsys, turns, *options)
    table = {line[0]: line[1:] for line in lines}
    for phase in WITH_PHASES:
        assert table[phase] == ["3.50", "2.00", "1.750", "0.500", "to", "3.000"]


def test_micro_batches_of_tokens_are_compared_with_those_of_rows(monkeypatch, capsys):
    """Ten rows of 12 + 12 tokens, each with 7 positions of a prompt. Dropout is 0, so all sides
    have the same losses."""
    sides = {}

    def turns(*arguments):
        answers, initial_memory = turns_in_this_process(*arguments)
        sides.update(answers)
        return answers, initial_memory

    monkeypatch.setitem(bench.CASES, "XS", TINY | {"rows": 10})
    options = ("--size", "XS", "--micro-batches", "31", "92", "1000", "--repeats", "2")
    _, lines = run_main(monkeypatch, capsys, turns, *options)
    [header] = [line for line in lines if line[0] == "micro-batches"]
    table = lines[lines.index(header) + 1 :]
    table = [line for line in table if line[1:2] in (["rows"], ["tokens"])]
    assert [line[:4] for line in table] == [
        ["8", "rows", "2", "310"],
        ["31", "tokens", "10", "310"],
        ["92", "tokens", "5", "310"],
        ["1,000", "tokens", "1", "310"],
    ]
    assert [answers[0]["micro_batches"] for answers in sides.values()] == [
        [[8, 24], [2, 24]],
        [[1, 24]] * 10,
        [[2, 24]] * 5,
        [[10, 24]],
    ]
    for answers in sides.values():
        for answer, expected in zip(answers, sides["8 rows"]):
            check_losses(answer["losses"], expected["losses"], ("loss", "prompt_loss"))
    ratios = [line[-3] for line in table]
    assert ratios[0] == "1.00"
    assert min(float(ratio) for ratio in ratios) > 0
    assert all(0.05 < float(line[-1]) < 4 for line in table)  # GB


def test_micro_batches_of_rows_start_with_the_longest():
    shapes = []
    [first, second] = bench.recording_micro_batches(shapes, 2)(UNEQUAL, 1, CPU)
    assert [e.index for e in [*first.examples, *second.examples]] == [2, 7, 4]
    assert shapes == [[2, 17], [1, 2]]
    batches = bench.recording_micro_batches(shapes)(UNEQUAL, 30, CPU, 7)
    assert [len(batch.examples) for batch in batches] == [1, 2]
    assert shapes == [[1, 17], [2, 6]]


@pytest.mark.parametrize("n, rank", [(6, 1), (8, 1), (9, 2), (20, 6), (100, 40)])
def test_interval_of_the_median_has_the_known_ranks(n, rank):
    values = [(7 * i) % n + 1 for i in range(n)] if n % 7 else list(range(n, 0, -1))
    assert bench.median_interval(values) == ((n + 1) / 2, rank, n + 1 - rank)


def test_take_turns_alternates_the_order(monkeypatch):
    """A side that always came second would have the caches of the first."""
    asked = []

    def ask(processes, name, *request):
        asked.append((name, *request))
        return {}

    monkeypatch.setattr(bench, "ask", ask)
    monkeypatch.setattr(bench, "start_processes", bench.suppress)
    bench.take_turns({}, {"a": 3, "b": 3}, 3)
    order = [(name, request[1]) for name, *request in asked[4:]]
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]


def test_dolly_rows_have_their_own_lengths_within_the_limits(shared, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "gpt2-bpe" / "tiktoken-cache"))
    examples = bench.make_examples(bench.CASES["D"] | {"source": shared / "data" / "dolly"})
    assert len(examples) == 32
    assert max(len(e.response) for e in examples) == 256
    assert sum(e.response[-1] == 50_256 for e in examples) == 31
    assert len({len(e.request) for e in examples}) > 16
    assert all(50_256 not in e.response[:-1] for e in examples)


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "nothing to measure; give --size S M D"),
        (["--size", "L"], "--size L needs a GPU"),
        (["--size", "S", "--hf"], "--hf needs transformers"),
        (["--size", "S", "--old", "."], "--pairs N, --old DIR and --size S go together"),
        (["--size", "S", "--pairs", "6"], "--pairs N, --old DIR and --size S go together"),
        (["--sampling", "--micro-batches", "100"], "--micro-batches goes with --size"),
        (
            ["--size", "S", "--micro-batches", "9", "--pairs", "6", "--old", "."],
            "--micro-batches goes with --size, and without --old",
        ),
        (["--sampling", "--pairs", "6", "--old", "."], "go together"),
        (["--size", "S", "--pairs", "6", "--old", "docs"], "docs: has no tests/bench.py"),
        (["--size", "D", "--source", "docs"], r"train\.jsonl: no such file; run .*prepare dolly"),
        (["--evaluation", "--source", "docs"], r"test\.jsonl: no such file; run .*prepare dolly"),
    ],
)
def test_wrong_options_and_missing_data_are_refused(monkeypatch, options, message):
    monkeypatch.setattr(bench, "machine_rates", lambda device, dtype: (1e9, 1e9))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=message):
        bench.main([*options, "--threads", "1"])
