"""The yardstick itself: the re-stated recipe and train.py's step agree where they should, sampling is forced but done in full, the floor
is the one counted by hand, and every measure of bench.py runs at a tiny size."""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import bench
import pytest
import torch
from helpers import after_device, run_command, talker_config, tiny_model, tiny_tokenizer

import sample
import train
from data.cli import InputError
from data.rows import Example
from prompt import freeze

CPU = torch.device("cpu")
TINY = bench.CASES["XS"] | {"vocab": 61, "dropout": 0.0}
END = TINY["vocab"] - 1
UNEQUAL = [
    Example(7, [3, 1, 4], [1, 5, END]),
    Example(2, [9, 2, 6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2]),
    Example(4, [6], [END]),
]


@pytest.fixture(autouse=True)
def threads():
    """bench.main sets torch's threads."""
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)


def said_by(examples, case=TINY):
    return bench.forced(
        {e.index: e.response for e in examples}, case["max_new_tokens"], case["vocab"] - 1, CPU
    )


def gradients(monkeypatch, case, examples, steps, *convert):
    """The losses of one iteration, and the gradients that prompt and student were updated on, {"prompt": [...], "student": [...]}."""
    run, grads, update = (
        bench.make_run(case, CPU, freeze(bench.make_model(case, "teacher")), *convert),
        {},
        train.clip_and_step,
    )

    def recording_update(optimizer):
        name = "prompt" if optimizer is run.prompt_optimizer else "student"
        grads[name] = [
            p.grad.clone()
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        return update(optimizer)

    run.clock = {"since": 0.0}
    with monkeypatch.context() as patch, said_by(examples, case):
        patch.setattr(train, "clip_and_step", recording_update)
        losses = steps(run, examples, 3)
    return losses, grads, run


def recipe(case=TINY, *functions):
    return lambda run, examples, t: bench.recipe_step(run, case, examples, t, *functions)


def check_gradients(grads, wanted):
    for name in ("prompt", "student"):
        assert (
            len(grads[name]) == len(wanted[name]) > 0
            and max(w.abs().max() for w in wanted[name]) > 1e-3
        )
        for grad, want in zip(grads[name], wanted[name]):
            torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-5)


def test_recipe_and_train_agree_on_a_window_of_one_pair_of_rows_of_one_length(monkeypatch):
    examples = bench.make_examples(TINY | {"rows": 2})
    losses, grads, run = gradients(monkeypatch, TINY, examples, recipe())
    ours, wanted, our_run = gradients(monkeypatch, TINY, examples, train.promptkd_step)
    assert losses["loss"] == pytest.approx(float(ours["loss"]), abs=1e-4) and losses["loss"] > 0.01
    assert (
        losses["prompt_loss"] == pytest.approx(float(ours["prompt_loss"]), abs=1e-4)
        and losses["prompt_loss"] > 0.01
    )
    check_gradients(grads, wanted)
    for a_run in (run, our_run):
        assert set(bench.PHASES) <= set(a_run.clock) and all(
            a_run.clock[phase] > 0 for phase in bench.PHASES
        )


def test_recipe_averages_micro_batches_and_updates_once(monkeypatch):
    """Four rows of one length, at a rate of zero: otherwise the first pair distils from the prompt of before, and differs from ours."""
    examples = bench.make_examples(TINY)
    monkeypatch.setattr(
        train,
        "set_learning_rate",
        lambda optimizer, lr: [group.update(lr=0.0) for group in optimizer.param_groups],
    )
    losses, grads, _ = gradients(monkeypatch, TINY, examples, recipe())
    ours, wanted, _ = gradients(monkeypatch, TINY, examples, train.promptkd_step)
    assert losses["loss"] == pytest.approx(float(ours["loss"]), abs=1e-4)
    check_gradients(grads, wanted)


def test_rows_of_a_pair_are_padded_to_the_limits_and_padding_counts_for_nothing(monkeypatch):
    """The mean over the pair's tokens, whatever their lengths."""
    seen = []

    def logits(model, ids, real, P=None):
        seen.append(ids.shape)
        return bench.plain_logits(model, ids, real, P)

    losses, grads, _ = gradients(monkeypatch, TINY, UNEQUAL[:2], recipe(TINY, logits))
    ours, wanted, _ = gradients(monkeypatch, TINY, UNEQUAL[:2], train.promptkd_step)
    assert losses["loss"] == pytest.approx(float(ours["loss"]), abs=1e-4)
    check_gradients(grads, wanted)
    assert (
        set(seen) == {(2, 24)} and len(seen) == 5
    )  # student and teacher bare, teacher prompted; teacher prompted, student


def test_transformers_side_is_the_recipe_too(monkeypatch):
    pytest.importorskip("transformers")
    losses, _, _ = gradients(monkeypatch, TINY, UNEQUAL, recipe())
    ours, _, run = gradients(
        monkeypatch, TINY, UNEQUAL, recipe(TINY, bench.hf_logits, bench.hf_sample), bench.to_hf
    )
    assert (
        ours == pytest.approx(losses, abs=1e-4) and "transformers" in type(run.student).__module__
    )


def test_both_ways_of_sampling_say_the_given_responses_and_do_all_the_work(monkeypatch):
    model, drawn = bench.make_model(TINY, "student").eval(), []
    sample_next_token, multinomial = sample.sample_next_token, torch.multinomial
    monkeypatch.setattr(
        sample,
        "sample_next_token",
        lambda logits, *rest, **how: (
            drawn.append(logits.shape) or sample_next_token(logits, *rest, **how)
        ),
    )
    monkeypatch.setattr(
        torch, "multinomial", lambda probs, n: drawn.append(probs.shape) or multinomial(probs, n)
    )
    requests, wanted = [e.request for e in UNEQUAL], [e.response for e in UNEQUAL]
    with said_by(UNEQUAL):
        keys = [(10, "rollout", 0, e.index) for e in UNEQUAL]
        assert sample.sample_all(model, requests, keys, END, TINY["max_new_tokens"])[0] == wanted
    assert len(drawn) == 12 and drawn[0] == (3, 61) and all(n_words == 61 for _, n_words in drawn)
    drawn.clear()
    assert (
        bench.plain_sample(model, requests, bench.token_table(wanted, 12, END, CPU), 12, END)
        == wanted
    )
    assert drawn == [(3, 61)] * 12  # none is dropped
    drawn.clear()
    short = UNEQUAL[0], UNEQUAL[2]
    said = bench.token_table([e.response for e in short], 12, END, CPU)
    assert bench.plain_sample(model, [e.request for e in short], said, 12, END) == [
        e.response for e in short
    ]
    assert len(drawn) == 3  # until both have ended
    monkeypatch.undo()
    assert (
        sample.sample_next_token is sample_next_token and sample.row_uniforms.__module__ == "sample"
    )  # nothing stays forced


def test_plain_sampling_reads_what_the_model_reads_without_a_cache(monkeypatch):
    """The distribution drawn from at each step, against a forward of the row so far."""
    model, probs = bench.make_model(TINY, "student").eval(), []
    multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, n: probs.append(p) or multinomial(p, n))
    pair = UNEQUAL[:2]
    bench.plain_sample(
        model,
        [e.request for e in pair],
        bench.token_table([e.response for e in pair], 12, END, CPU),
        12,
        END,
    )
    for row, e in enumerate(pair):
        for t in range(len(e.response)):
            wanted = model.logits(model(torch.tensor([e.request + e.response[:t]])))[0, -1].softmax(
                -1
            )
            torch.testing.assert_close(probs[t][row], wanted, rtol=1e-4, atol=1e-6)


def test_unique_numbers_of_a_large_evaluation_lead_to_the_right_tokens():
    responses = {index: [(index * 7 + t) % 50_000 for t in range(256)] for index in range(500)}
    with bench.forced(responses, 256, 50_256, CPU):
        u = torch.stack(
            [
                torch.from_numpy(sample.row_uniforms(256, 10, "evaluate", "dolly", index))
                for index in responses
            ]
        )
        for t in (0, 1, 128, 255):
            tokens, _ = sample.sample_next_token(torch.zeros(500, 3), u[:, t])
            assert tokens.tolist() == [response[t] for response in responses.values()]


# ---- the floor ------------------------------------------------------------------------------------------------------------------------


def test_count_of_one_row_by_hand():
    """Student 1 layer of width 2, teacher 1 of width 3, 5 words; one row of 2 + 3 tokens, so that 4 are read."""
    case = {"student": "1x2x1", "teacher": "1x3x1", "vocab": 5}
    work = bench.count_work(case, [Example(0, [1, 2], [1, 2, 3])])
    first = 24 * 4 * 2 + 2 * 2 * 2 * 3 + 2 * 2 * 5  # body, attention, head
    q = 24 * 4 * 4 + 2 * 2 * 4 * 5 + 3 * 2 * 2 * 5
    p, prompted = (
        24 * 9 * 4 + 2 * 3 * 4 * 5 + 3 * 2 * 3 * 5,
        24 * 9 * 11 + 2 * 3 * 11 * 12 + 3 * 2 * 3 * 5,
    )
    w_q, w_p = 12 * 4 + 10, 12 * 9 + 15
    assert work["sampling"] == [(first, 4 * w_q), (q - first, 4 * (2 * w_q + 2 * 2 * (2 + 3)))]
    assert work["prompt"] == [(q + p + 2 * prompted, 4 * (w_q + 3 * w_p))]
    assert work["student"] == [(3 * q + prompted, 4 * (3 * w_q + w_p)), (0, 28 * w_q)]


def test_floor_is_the_slower_of_operations_and_bytes_of_each_part():
    seconds = bench.floor_seconds({"a": [(10, 10), (10, 400)], "b": [(0, 20)]}, (5, 20))
    assert seconds == {"a": 2 + 20, "b": 1, "whole": 23}


@pytest.mark.parametrize("size, wanted", [("S", 0.76), ("M", 8.39)])
def test_floor_at_known_rates_is_the_known_one(size, wanted):
    case = bench.CASES[size]
    work = bench.count_work(case, bench.make_examples(case))
    assert bench.floor_seconds(work, (187e9, 33e9))["whole"] == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("axis", bench.AXES)
def test_floor_is_positive_and_grows_along_every_axis(axis):
    floors = []
    for value in bench.AXES[axis]:
        case = bench.scaled(bench.CASES["S"], axis, value)
        floors.append(
            bench.floor_seconds(bench.count_work(case, bench.make_examples(case)), (187e9, 33e9))
        )
    for phase in bench.PHASES:
        assert floors[0][phase] > 0 and all(a[phase] < b[phase] for a, b in pairwise(floors)), phase
    ratio = floors[-1]["prompt"] / floors[0]["prompt"]
    assert ratio == pytest.approx(8, rel=1e-6) if axis == "rows" else ratio > 1.5


# ---- the measures ---------------------------------------------------------------------------------------------------------------------


def fake_turns(work, part, case, threads, repeats):
    """Numbers that tell which job they are of: starting a process takes seconds."""
    assert work == "step" and repeats > 0 and threads == 1
    size = case["rows"] * case["vocab"]
    seconds = {name: {"recipe": 3, "transformers": 5}.get(name, 1) * size / 1000 for name in part}
    answers = {
        name: [
            {
                "seconds": dict.fromkeys((*bench.PHASES, "whole"), seconds[name]),
                "memory": {"resident": 1.0 + size},
            }
        ]
        * repeats
        for name in part
    }
    return answers, dict.fromkeys(part, {"resident": 0.25})


def test_sides_in_processes_answer_with_losses_seconds_of_all_phases_and_memory():
    """The process of the recipe and ours give the same losses on a pair of rows of one length."""
    with bench.processes("step", ["recipe", "ours"], TINY, 1) as sides:
        before = {name: bench.ask(sides, name) for name in sides}
        first = {name: bench.ask(sides, name, 2, 0) for name in sides}
        second = bench.ask(sides, "ours", 4, 1)
    for name in sides:
        assert 0.05 < before[name]["resident"] <= first[name]["memory"]["resident"] < 4
        assert (
            set(first[name]["seconds"]) == {*bench.PHASES, "whole"}
            and min(first[name]["seconds"].values()) > 0
        )
        for kind in ("loss", "prompt_loss"):
            assert first[name]["losses"][kind] == pytest.approx(
                first["ours"]["losses"][kind], abs=1e-4
            )
    assert (
        second["losses"] != first["ours"]["losses"]
        and second["memory"]["resident"] >= first["ours"]["memory"]["resident"]
    )
    assert [process.returncode for process in sides.values()] == [0, 0]


def test_processes_are_gone_when_their_body_raises():
    with (
        pytest.raises(ZeroDivisionError),
        bench.processes("step", ["recipe", "ours"], TINY, 1) as sides,
    ):
        assert all(process.poll() is None for process in sides.values())
        raise ZeroDivisionError
    assert [process.returncode for process in sides.values()] == [-9, -9]


def test_a_process_that_dies_between_two_steps_is_named():
    message = r"^ours: .*\(exit status -9\); most likely memory did not suffice$"
    with (
        pytest.raises(InputError, match=message),
        bench.processes("step", ["ours"], TINY, 1) as sides,
    ):
        bench.ask(sides, "ours")
        sides["ours"].kill()
        sides["ours"].wait()
        bench.ask(sides, "ours", 2, 0)


def test_a_process_that_dies_ends_the_bench_with_one_line(monkeypatch, capsys, tmp_path):
    dies = tmp_path / "python"
    dies.write_text("#!/bin/sh\nkill -9 $$\n")
    dies.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dies))
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **how: None, raising=False)
    monkeypatch.setattr(bench, "machine_rates", lambda device, dtype: (1e9, 1e9))
    with pytest.raises(SystemExit) as ended:
        bench.run_command_line(lambda: bench.main(["--size", "XS", "--threads", "1"]))
    said = after_device(capsys.readouterr().err)
    assert (
        ended.value.code == 2
        and said.count("\n") == 1
        and said.startswith("error: recipe: ")
        and "(exit status -9)" in said
    )


def test_size_prints_a_table_with_every_phase(monkeypatch, capsys):
    monkeypatch.setattr(bench, "machine_rates", lambda device, dtype: (1e9, 1e9))
    bench.main(["--size", "XS", "--repeats", "2", "--threads", "1"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert (
        lines[0][0] == "cpu"
        and "torch" in lines[0]
        and lines[0][lines[0].index("threads,") - 1] == "1"
    )
    table = {line[0]: line for line in lines if line}
    floor = bench.floor_seconds(
        bench.count_work(bench.CASES["XS"], bench.make_examples(bench.CASES["XS"])), (1e9, 1e9)
    )
    for label in ("sampling", "prompt", "student", "whole"):
        ratio, floor_seconds, to_floor, share = table[label][-4:]
        assert floor_seconds == f"{floor[label]:.2f}" and float(to_floor) > 0 and float(ratio) > 0
        assert float(share.removesuffix("%")) > 0
    assert 0.05 < float(table["peak"][3]) < 4


def test_size_compares_with_the_recipe_and_with_transformers(monkeypatch, capsys):
    monkeypatch.setattr(bench, "machine_rates", lambda device, dtype: (1e9, 1e9))
    monkeypatch.setattr(bench, "has_transformers", lambda: True)
    monkeypatch.setattr(bench, "take_turns", fake_turns)
    bench.main(["--size", "XS", "--hf", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split() for line in lines if line}
    assert any("recipe / ours  transformers / ours  floor, s" in line for line in lines)
    assert all(
        table[label][-5:-3] == ["3.00", "5.00"]
        for label in ("sampling", "prompt", "student", "whole")
    )
    assert table["peak"][3] == "2001.00" and table["peak"][-2:] == ["1.00", "1.00"]


def test_scaling_writes_a_picture_and_leaves_out_what_takes_too_long(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "take_turns", fake_turns)
    monkeypatch.setattr(bench, "TOO_LONG", 500)
    path = tmp_path / "made" / "scaling.png"
    bench.main(["--scaling", "--out", str(path), "--threads", "1"])
    said, written = capsys.readouterr().out, json.loads(path.with_suffix(".json").read_text())
    points = {(point["axis"], point["value"], point["side"]): point for point in written["points"]}
    for axis, values in bench.AXES.items():
        for value in values:
            assert (
                points[axis, value, "ours"]["seconds"]
                == bench.scaled(bench.CASES["S"], axis, value)["rows"]
                * (value if axis == "vocab" else 50_257)
                / 1000
            )
    assert (
        ("rows", 8, "recipe") in points
        and ("rows", 16, "recipe") not in points
        and "left out" in said
    )
    plt = pytest.importorskip("matplotlib.pyplot")
    assert plt.imread(path).shape[0] > 300


def test_sampling_is_timed_on_every_side(monkeypatch, capsys):
    monkeypatch.setattr(bench, "has_transformers", lambda: False)
    args = SimpleNamespace(repeats=1, threads=1, dtype="float32")
    bench.show_sampling(args, CPU, (1e9, 1e9), TINY)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "8", "32"] and all(float(row[-2]) > 0 for row in rows)


def test_evaluation_gives_the_scores_of_the_references_both_ways(monkeypatch, capsys, tmp_path):
    """In this process, in place of one for each side."""
    model = tiny_model(replace(talker_config(), n_positions=288))
    rows = [
        {
            "instruction": "name " + "a" * (i % 5),
            "output": ["the task" + " or so" * (i % 3), "an other"],
        }
        for i in range(11)
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(bench, "make_model", lambda case, name: model)
    monkeypatch.setattr(bench, "load_tokenizer", tiny_tokenizer)
    monkeypatch.setattr(sample, "MAX_NEW_TOKENS", 24)

    def turns(work, part, case, threads, repeats):
        sides = {name: bench.WORK[work](name, case, CPU) for name in part}
        return {
            name: [side(part[name], t) for t in range(repeats)] for name, side in sides.items()
        }, {}

    monkeypatch.setattr(bench, "take_turns", turns)
    bench.main(["--evaluation", "--source", str(tmp_path), "--repeats", "2", "--threads", "1"])
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert "evaluation of 11 Dolly rows" in said and [
        line[-1] for line in lines if line[:1] in (["batches"], ["ours"])
    ][:2] == ["100.00", "100.00"]
    assert float(lines[-1][-1]) > 0


def test_dolly_rows_have_their_own_lengths_within_the_limits(shared, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "gpt2-bpe" / "tiktoken-cache"))
    examples = bench.make_examples(bench.CASES["D"] | {"source": shared / "data" / "dolly"})
    ended = [e for e in examples if e.response[-1] == 50_256]
    assert (
        len(examples) == 32 and max(len(e.response) for e in examples) == 256 and len(ended) == 31
    )
    assert len({len(e.request) for e in examples}) > 16 and all(
        50_256 not in e.response[:-1] for e in examples
    )


def test_a_command_without_a_measure_ends_with_one_line():
    done = run_command("tests/bench.py")
    assert (
        done.returncode == 2
        and after_device(done.stderr).count("\n") == 1
        and "nothing to measure; give --size S M D" in done.stderr
    )


def test_the_largest_size_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(bench.dist, "init_process", lambda dtype: (CPU, "float32"))
    with pytest.raises(InputError, match="--size L needs a GPU"):
        bench.main(["--size", "L", "--threads", "1"])


@pytest.mark.parametrize("option", [("--size", "D"), ("--evaluation",)])
def test_missing_data_is_named_with_the_mend(monkeypatch, tmp_path, option):
    monkeypatch.setattr(bench, "machine_rates", lambda device, dtype: (1e9, 1e9))
    with pytest.raises(
        InputError, match=r"(train|test)\.jsonl: no such file; run python -m data\.prepare dolly"
    ):
        bench.main([*option, "--source", str(tmp_path), "--threads", "1"])
