"""A run belongs to the content of its inputs, whatever they are called, and to one process."""

import errno
import json
import os
import shutil
import signal
import time

import pytest
import torch
from helpers import (
    PROMPT,
    error_of,
    fork_ranks,
    interrupted_in_step,
    wait_for,
    write_checkpoint,
    write_rows,
)
from test_resume import interrupt, settings_of, without
from test_train import (  # noqa: F401
    CPU,
    STUDENT,
    TOKENIZER,
    change_weights,
    main,
    metrics,
    minillm_settings,
    no_demo_table,
    no_validation,
    promptkd_settings,
    record,
    settings,
    student,
    teacher,
    world,
)

import train
from data.models.checkpoint import load
from data.runs import runs
from data.runs.methods import ResponseSettings
from data.runs.names import base_label

CHANGED = "is not what it was made with: its content has changed; choose another --out, or"


def copy_of(model, path):
    shutil.copytree(model, path)
    return path


@pytest.fixture
def models(tmp_path, student, teacher):
    """Copies that a test may change."""
    return copy_of(student, tmp_path / "small"), copy_of(teacher, tmp_path / "wide")


# ---- identity: content and not spelling --------------------------------------------------------


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("changed", ["student", "teacher"])
def test_a_model_that_was_replaced_is_noticed(tmp_path, models, no_validation, changed, complete):
    small, wide = models
    s = settings_of("kd", small, wide, steps=2)
    if complete:
        train.run_stage("stage", s, tmp_path / "out", 1000, CPU)
    else:
        interrupt(tmp_path / "out", s, stop_step=1, save_every=1)
    source = small if changed == "student" else wide
    change_weights(source)
    message = error_of(train.run_stage, "stage", s, tmp_path / "out", 1000, CPU)
    directory = tmp_path / "out" / "stage"
    assert message == f"{directory}: {changed} ({source}) {CHANGED} move it elsewhere"


def test_a_tokenizer_that_was_replaced_is_noticed(tmp_path, models, no_validation):
    small, _ = models
    s = settings(student=str(small), steps=2)
    interrupt(tmp_path / "out", s, stop_step=1, save_every=1)
    vocab = json.loads((small / "vocab.json").read_text())
    (small / "vocab.json").write_text(json.dumps(vocab, indent=1))
    message = error_of(train.run_stage, "stage", s, tmp_path / "out", 1000, CPU)
    assert f"student ({small}) {CHANGED}" in message


def test_a_corpus_that_was_replaced_is_noticed(tmp_path, student, teacher, no_validation):
    corpus = tmp_path / "train.jsonl"  # called like another input
    write_rows(corpus, [{"text": "one two three " * 900}])
    s = minillm_settings(student, teacher, lm_data=str(corpus), steps=2)
    interrupt(tmp_path / "out", s, stop_step=1, save_every=1)
    write_rows(corpus, [{"text": "four five six " * 900}])
    message = error_of(train.run_stage, "stage", s, tmp_path / "out", 1000, CPU)
    assert f"lm_data ({corpus}) {CHANGED}" in message


def test_the_same_models_under_another_spelling_are_the_same(
    tmp_path, models, no_validation, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    small, wide = models
    interrupt(tmp_path / "out", settings_of("kd", small, wide, steps=2), stop_step=1, save_every=1)
    os.rename("wide", "renamed")
    os.symlink("renamed", "linked")
    s = settings_of("kd", "./small/", "linked", steps=2)
    train.run_stage("stage", s, "./out", 1000, CPU)
    assert "resuming after step 1" in capsys.readouterr().out
    s = settings_of("kd", "small/../small", "renamed", steps=2)
    train.run_stage("stage", s, tmp_path / "out", 1000, CPU)
    assert "complete, skipped" in capsys.readouterr().out


def test_an_output_directory_can_be_moved_and_its_stages_are_named_relative_to_it(
    tmp_path, student, no_validation, monkeypatch, capsys
):
    """The stages of train.py in one directory, then in the same one under another name."""
    monkeypatch.chdir(tmp_path)
    train.run_stage("teacher-wide", settings(student=str(student), steps=1), "out", 1000, CPU)
    train.run_stage("init-small", settings(student=str(student), steps=1), "out", 1000, CPU)

    def train_from(out):
        models = f"{out}/init-small", f"{out}/teacher-wide/best"
        s = settings_of("kd", *models, steps=2)
        train.run_stage("kd-small", s, out, 1000, CPU)

    train_from("out")
    made_from = record(tmp_path / "out" / "kd-small")["settings"]
    assert (made_from["student"], made_from["teacher"]) == ("init-small", "teacher-wide")
    assert made_from["data"] == "demo"
    shutil.move("out", "elsewhere")
    capsys.readouterr()
    train_from(tmp_path / "elsewhere")
    assert "complete, skipped" in capsys.readouterr().out
    assert base_label("elsewhere/init-small") == student.name
    # A stage that was trained from a stage: `small` is two records away.
    s = settings(student="elsewhere/init-small", steps=1)
    train.run_stage("init-again", s, "elsewhere", 1000, CPU)
    shutil.move("elsewhere", "moved")
    assert base_label("moved/init-again") == student.name


def test_a_shape_is_compared_as_it_is(tmp_path, no_validation):
    values = {"method": "pretrain", "metric_for_best": "loss", "steps": 1}
    train.run_stage("stage", settings(student="1x16x2", **values), tmp_path, 1000, CPU)
    other = settings(student="1x16x4", **values)
    message = error_of(train.run_stage, "stage", other, tmp_path, 1000, CPU)
    assert "was made with student '1x16x2', not '1x16x4'" in message


# ---- the best checkpoint -------------------------------------------------------------------------


def test_where_rouge_l_can_score_nothing_the_lower_loss_decides(tmp_path, student, capsys):
    """ROUGE-L drops all but a-z and 0-9, so a response equal to its reference scores 0."""
    rows = [{"instruction": "说", "output": text} for text in ("你好", "再见", "谢谢")]
    write_rows(tmp_path / "mine" / "train.jsonl", rows)
    write_rows(tmp_path / "mine" / "dev.jsonl", rows)
    values = {"data": str(tmp_path / "mine"), "steps": 4, "eval_interval": 1, "lr": 0.01}
    s = settings(student=str(student), max_new_tokens=4, global_batch_size=2, **values)
    train.run_stage("stage", s, tmp_path, 1000, CPU)
    lines = [line for line in metrics(tmp_path / "stage") if line["step"]]
    val_losses = [line["val_loss"] for line in lines]
    assert {line["val_rouge_l"] for line in lines} == {0}
    assert record(tmp_path / "stage")["best_step"] == 1 + val_losses.index(min(val_losses)) > 1
    assert (
        "validation: 3 of 3 rows have no reference that ROUGE-L can score (it drops all but a-z "
        "and 0-9); they score 0\n" in capsys.readouterr().out
    )


# ---- one process at a time -----------------------------------------------------------------------


def wait_until(condition, seconds=60):
    for _ in range(seconds * 50):
        if condition():
            return
        time.sleep(0.02)
    raise TimeoutError


@pytest.fixture
def command(tmp_path, student):
    """A training run that takes long, and its directory."""
    write_rows(tmp_path / "mine" / "train.jsonl", [{"instruction": "say", "output": "a"}] * 4)
    write_rows(tmp_path / "mine" / "dev.jsonl", [{"instruction": "say", "output": "a"}])
    options = ("--method", "sft", "--student", student, "--data", tmp_path / "mine")
    options += ("--out", tmp_path / "out", "--save-every", 5, "--micro-batch-tokens", 1)
    directory = tmp_path / "out" / f"sft-{student.name}-mine-steps100000-s10"
    return [*map(str, options), "--steps", "100000"], directory


def n_lines(path):
    return path.read_text().count("\n") if path.is_file() else 0


def test_the_same_command_started_twice_is_refused_until_the_first_is_killed(command, tmp_path):
    arguments, directory = command
    log = directory / "metrics.jsonl"
    [first] = fork_ranks(lambda: train.main(arguments), 1, tmp_path / "first")
    try:
        wait_until(lambda: n_lines(log) >= 6)
        assert error_of(train.main, arguments) == (
            f"{directory}: process {first} on {os.uname().nodename} is working on it; "
            "wait for it to end, or choose another --out"
        )
    finally:
        os.kill(first, signal.SIGKILL)
        assert wait_for([first], 60) == [-signal.SIGKILL]
    n = n_lines(log)
    [third] = fork_ranks(lambda: train.main(arguments), 1, tmp_path / "third")
    try:
        wait_until(lambda: n_lines(log) > n + 1)
    finally:
        os.kill(third, signal.SIGTERM)
        assert wait_for([third], 60) == [128 + signal.SIGTERM]
    assert "resuming after step" in (tmp_path / "third0").read_text()
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_a_complete_stage_takes_no_lock(tmp_path, student, no_validation, capsys):
    s = settings(student=str(student), steps=1)
    train.run_stage("stage", s, tmp_path, 1000, CPU)
    assert not (tmp_path / "stage" / "state").exists()
    with runs._lock(tmp_path / "stage"):
        train.run_stage("stage", s, tmp_path, 1000, CPU)
    assert "complete, skipped" in capsys.readouterr().out


def test_a_stage_that_another_process_completed_meanwhile_is_skipped(
    tmp_path, student, no_validation, capsys, monkeypatch
):
    s, lock = settings(student=str(student), steps=1), runs._lock

    def lock_late(directory):
        monkeypatch.setattr(runs, "_lock", lock)
        train.run_stage("stage", s, tmp_path, 1000, CPU)
        return lock(directory)

    monkeypatch.setattr(runs, "_lock", lock_late)
    train.run_stage("stage", s, tmp_path, 1000, CPU)
    assert capsys.readouterr().out.count("complete, skipped") == 1
    assert not (tmp_path / "stage" / "state").exists()


def test_sampling_the_responses_of_a_teacher_takes_the_lock(tmp_path, student, world):
    values = {"data": "demo", "max_train_rows": 2, "max_new_tokens": 4}
    s = ResponseSettings(student=str(student), **values)
    directory = tmp_path / "responses"
    with runs._lock(directory):
        message = error_of(train.stages.sample_responses, directory, s, CPU)
        assert f"process {os.getpid()} on " in message
    train.stages.sample_responses(directory, s, CPU)


@pytest.mark.parametrize("system", ["file system", "Windows"])
def test_without_locks_there_is_a_warning(
    tmp_path, student, no_validation, capsys, monkeypatch, system
):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if system == "Windows":
        monkeypatch.setattr(runs, "fcntl", None)
        reason = "this system has no flock"
    else:
        monkeypatch.setattr(runs.fcntl, "flock", flock)
        reason = os.strerror(errno.ENOLCK)
    train.run_stage("stage", settings(student=str(student), steps=1), tmp_path, 1000, CPU)
    path = tmp_path / "stage" / "state" / "lock"
    assert (
        f"warning: {path}: can't be locked ({reason}); start no second process with this --out\n"
        in capsys.readouterr().out
    )
    assert record(tmp_path / "stage")["complete"]


def test_a_run_names_every_version_of_pytorch_that_worked_on_it(
    tmp_path, student, no_validation, monkeypatch
):
    s, versions = settings(student=str(student), steps=3), []
    for step, torch_version in ((1, "2.11.0"), (2, "2.13.0"), (2, "2.13.0"), (None, "2.11.0")):
        monkeypatch.setattr(torch, "__version__", torch_version)
        if step is None:
            train.run_stage("stage", s, tmp_path, 1000, CPU)
        else:
            interrupt(tmp_path, s, stop_step=step, save_every=1)
        found = record(tmp_path / "stage")
        versions = [found["versions"]["torch"]]
        versions += [version["torch"] for version in found.get("later_versions", [])]
    assert versions == ["2.11.0", "2.13.0"]


# ---- --keep: recorded, never a reason to refuse a run ------------------------------------------


def train_briefly(out, student, *keep):
    """Six steps of SFT, with a state after each. Returns what was printed of --keep."""
    options = f"--method sft --data demo --student {student} --steps 6 --save-every 1"
    printed = main(out, *options.split(), *keep).splitlines()
    return [line for line in printed if "--keep" in line]


def kept_steps(directory):
    return [int(path.name[5:]) for path in sorted(directory.glob("kept/*"))]


@pytest.mark.parametrize(
    "keep, steps, printed",
    [
        ("", [2, 3, 5, 6], "{}: was started with --keep 4 and resumes with it"),
        ("--keep 4", [2, 3, 5, 6], None),
        (
            "--keep 6",
            [2, 3, 4, 5, 6],
            "warning: {}: was started with --keep 4, and from here on --keep 6 counts; "
            "for evenly spaced checkpoints give --keep 4, or move it elsewhere first",
        ),
    ],
)
def test_a_run_resumes_with_its_keep_unless_another_is_given(
    tmp_path, student, no_validation, no_demo_table, keep, steps, printed
):
    with interrupted_in_step("sft", 3):
        train_briefly(tmp_path, student, "--keep", 4)
    [directory] = tmp_path.iterdir()
    expected = [printed.format(directory)] if printed else []
    assert train_briefly(tmp_path, student, *keep.split(), "--plan")[-1:] == expected
    assert train_briefly(tmp_path, student, *keep.split()) == expected
    assert kept_steps(directory) == steps
    assert record(directory)["keep"] == int(keep[-1:] or 4)


@pytest.mark.parametrize("is_older", [False, True], ids=["", "run.json without the field"])
def test_a_complete_run_says_that_it_gets_no_other_checkpoints_and_how_to_get_them(
    tmp_path, student, no_validation, no_demo_table, capsys, is_older
):
    train_briefly(tmp_path / "out", student)
    [directory] = (tmp_path / "out").iterdir()
    if is_older:
        runs.write_record(directory, without(record(directory), ["keep"]))
    assert train_briefly(tmp_path / "out", student) == []
    [line] = train_briefly(tmp_path / "out", student, "--keep", 2)
    problem = "is complete, with the checkpoints of --keep 0, and gets no others"
    fix = "for those of --keep 2, move it elsewhere and give this command again"
    assert line == f"warning: {directory}: {problem}; {fix}"
    message = error_of(runs.checkpoints, directory)
    fix = f"move {directory} elsewhere and train it again with --keep 20"
    assert message == f"{directory / 'kept'}: has no checkpoints; {fix}"

    weights = (directory / "best" / "model.safetensors").read_bytes()
    directory.rename(tmp_path / "elsewhere")
    assert train_briefly(tmp_path / "out", student, "--keep", 2) == []
    assert train_briefly(tmp_path / "out", student, "--keep", 2) == []
    assert kept_steps(directory) == [3, 6]
    assert (directory / "best" / "model.safetensors").read_bytes() == weights
    capsys.readouterr()
    assert list(runs.checkpoints(directory).values()) == [directory / "best"]
    assert f"{directory}: checkpoints up to its best step: 1, not 10" in capsys.readouterr().out


# ---- a model with exactly as many positions as a row needs ---------------------------------------


@pytest.mark.parametrize("method", ["minillm", "promptkd"])
def test_a_model_needs_no_position_for_the_token_that_is_only_predicted(
    tmp_path, monkeypatch, method
):
    """Blocks of plain text have 513 tokens, of which the last one is never read."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one two three " * 900)
    weights = {}
    for n_positions in (512, 1024):
        config = train.replace(STUDENT, n_positions=n_positions)
        model = write_checkpoint(tmp_path / f"model{n_positions}", config, TOKENIZER)
        if method == "minillm":
            s = minillm_settings(model, model, lm_data=str(corpus), steps=2)
        else:
            rows = [{"instruction": "say", "output": "a b c " * 500}] * 4
            write_rows(tmp_path / "mine" / "train.jsonl", rows)
            write_rows(tmp_path / "mine" / "dev.jsonl", rows[:1])
            length = 1  # 512 tokens of a row, of which 511 are read, and one of the prompt
            values = {"steps": 1, "data": str(tmp_path / "mine"), **PROMPT}
            values |= {"prompt_length": length, "max_new_tokens": 4, "max_dev_rows": 1}
            s = promptkd_settings(model, model, **values)
        train.run_stage(f"stage{n_positions}", s, tmp_path, 1000, CPU)
        weights[n_positions] = load(tmp_path / f"stage{n_positions}" / "best").wte.weight
    assert torch.allclose(weights[512], weights[1024], rtol=0, atol=1e-6)


def test_one_position_too_few_is_refused(tmp_path, no_validation):
    config = train.replace(STUDENT, n_positions=511)
    model = write_checkpoint(tmp_path / "model", config, TOKENIZER)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one two three " * 900)
    s = minillm_settings(model, model, lm_data=str(corpus), steps=2)
    message = error_of(train.run_stage, "stage", s, tmp_path, 1000, CPU)
    assert message.startswith("the student has 511 positions and the longest row needs 512;")


def test_a_sampled_response_too_long_for_the_prompted_teacher_is_refused(tmp_path):
    """The student has the positions for request and response, the teacher not also for P."""
    rows = [{"instruction": "say", "output": "a b c"}] * 4
    for split in ("train", "dev"):
        write_rows(tmp_path / "mine" / f"{split}.jsonl", rows)
    student, teacher = (
        write_checkpoint(tmp_path / f"model{n}", train.replace(STUDENT, n_positions=n), TOKENIZER)
        for n in (400, 200)
    )
    values = {"steps": 1, "data": str(tmp_path / "mine"), **PROMPT, "max_new_tokens": 256}
    s = promptkd_settings(student, teacher, **values)
    message = error_of(train.run_stage, "stage", s, tmp_path, 1000, CPU)
    assert message.startswith("the teacher has 200 positions and the longest row needs ")
