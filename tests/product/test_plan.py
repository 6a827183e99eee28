"""`train.py --plan`: what it prints is what is trained, and it downloads and writes nothing."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from helpers import fork_ranks, interrupted_in_step, wait_for, write_checkpoint, write_rows
from test_train import (  # noqa: F401
    STUDENT,
    TOKENIZER,
    demo_texts,
    files,
    hub,
    main,
    record,
    student,
    teacher,
    world,
)

import data.sets.prepare
import train
from data.process.errors import InputError
from data.runs.methods import METHODS
from data.runs.names import recorded_name
from data.sets import demo

SHAPE = "1x16x2"
OWN_OPTIONS = {"pretrain": f"--shape {SHAPE}", "minillm": "--lm-data TEXTS"}


def options_of(method, student, teacher):
    """The options of a small run with all of a method's stages."""
    declared = METHODS[method]
    options = f"--method {method} --data demo --steps 1 --dev-rows 2 --train-rows 32"
    options += f" {OWN_OPTIONS.get(method, '')}".replace("TEXTS", str(demo_texts()[0]))
    options += f" --student {student}" if declared.start != "shape" else ""
    options += f" --teacher {teacher}" if declared.needs_teacher else ""
    return options.split()


def read_plan(text):
    """What --plan prints, {directory: {"status", "lines", "settings"}}."""
    found = {}
    for block in re.split(r"\n(?=\d+\. )", text)[1:]:
        first, *lines = block.splitlines()
        directory, status = re.fullmatch(r"\d+\. (.*) \(.*?\): (.*)", first).groups()
        printed = [re.fullmatch(r" {5}(\w+) = (.*)", line) for line in lines]
        settings = {match[1]: json.loads(match[2]) for match in printed if match}
        found[directory] = {"status": status, "lines": lines, "settings": settings}
    return found


def plan_of(out, *options):
    return read_plan(main(out, *options, "--plan"))


def line_of(stage, start):
    [line] = [line for line in stage["lines"] if line.startswith(f"   {start}")]
    return line.strip()


@pytest.fixture
def no_table(monkeypatch):
    monkeypatch.setattr(train, "show_demo", lambda models, device, dtype: None)


@pytest.fixture
def no_download(tmp_path, monkeypatch):
    """A data directory that does not exist, and a hub that can't be asked."""

    def download(url, path):
        raise AssertionError(f"{url} is downloaded")

    monkeypatch.setattr("data.models.hub.download", download)
    monkeypatch.setattr("data.sets.prepare.download", download)
    monkeypatch.setattr(
        "data.models.tokenizer.tiktoken.get_encoding", lambda name: download(name, None)
    )
    monkeypatch.setattr(data.sets.prepare, "DATA_DIR", tmp_path / "prepared")


@pytest.fixture
def nothing_is_written(tmp_path, no_download):
    """The test fails if a file or directory is made below tmp_path."""
    before = set(tmp_path.rglob("*"))
    yield
    assert set(tmp_path.rglob("*")) == before


# ---- training carries out the plan ---------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_training_has_the_settings_of_the_plan(tmp_path, student, teacher, no_table, method):
    """Of every stage, in this order. Names are in run.json as it has them, relative to --out."""
    out, options = tmp_path / "out", options_of(method, student, teacher)
    planned = plan_of(out, *options)
    assert not out.exists()
    assert {stage["status"] for stage in planned.values()} == {"from scratch"}
    printed = main(out, *options)
    begun = re.findall(rf"^({re.escape(str(out))}/\S+): ", printed, re.M)
    assert list(dict.fromkeys(begun)) == list(planned)
    assert set(map(str, out.iterdir())) == set(planned)
    for directory, stage in planned.items():
        found = record(Path(directory))["settings"]
        named = {"data", "student", "teacher", "responses", "lm_data"} & found.keys()
        settings = stage["settings"]
        settings |= {field: recorded_name(settings[field], out) for field in named}
        assert settings == found
        if found["method"] != "responses":
            steps = record(Path(directory))["total_steps"]
            assert re.match(rf"steps: {steps:,}( of|$)", line_of(stage, "steps: "))

    before = files(tmp_path)
    again = plan_of(out, *options)
    assert {stage["status"] for stage in again.values()} == {"complete, skipped"}
    assert [stage["settings"].keys() for stage in again.values()] == [
        stage["settings"].keys() for stage in planned.values()
    ]
    assert files(tmp_path) == before


def test_it_says_where_a_stage_would_resume(tmp_path, student, no_table):
    options = f"--method sft --data demo --student {student} --steps 6 --save-every 2".split()
    options += ["--dev-rows", "2"]
    with interrupted_in_step("sft", 5):
        main(tmp_path, *options)
    before = files(tmp_path)
    [(directory, stage)] = plan_of(tmp_path, *options).items()
    assert stage["status"] == "resumes after step 4"
    assert files(tmp_path) == before

    # A damaged state counts as in training, but it is not renamed.
    [old, newest] = sorted((Path(directory) / "state").glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    [stage] = plan_of(tmp_path, *options).values()
    assert stage["status"] == f"resumes after step {int(old.stem[5:])}"
    assert newest.exists()
    old.unlink()
    newest.unlink()
    [stage] = plan_of(tmp_path, *options).values()
    assert stage["status"] == "from scratch, no state was saved"


def test_a_stage_that_would_be_refused_is_named_after_the_whole_plan(
    tmp_path,
    student,
    no_table,
):
    options = f"--method sft --data demo --student {student} --steps 1".split()
    main(tmp_path, *options, "--dev-rows", "2")
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), pytest.raises(InputError, match="max_dev_rows 2, not"):
        train.main([*options, "--dev-rows", "3", "--plan", "--out", str(tmp_path)])
    [stage] = read_plan(stdout.getvalue()).values()
    assert stage["status"] == "refused, see below"
    assert stage["settings"]["max_dev_rows"] == 3


def test_several_ranks_print_one_plan(tmp_path, student, teacher):
    options = options_of("promptkd", student, teacher)

    def on_each_rank():
        train.main([*options, "--plan", "--out", str(tmp_path / "out")])

    log = tmp_path / "log-"
    assert wait_for(fork_ranks(on_each_rank, 2, log), 120) == [0, 0]
    printed = [Path(f"{log}{rank}").read_text() for rank in (0, 1)]
    assert len(read_plan(printed[0])) == 3
    assert read_plan(printed[0]) == read_plan(main(tmp_path / "out", *options, "--plan"))
    assert read_plan(printed[1]) == {}
    assert not (tmp_path / "out").exists()


# ---- inputs, steps, disk -------------------------------------------------------------------------


def test_the_demo_before_its_data_is_there(tmp_path, nothing_is_written):
    planned = plan_of(tmp_path / "out")
    assert list(planned) == [
        f"{tmp_path}/out/teacher-3x128x4-demo",
        f"{tmp_path}/out/init-1x96x4-demo",
        f"{tmp_path}/out/promptkd-1x96x4-demo-s10",
    ]
    teacher_stage, _, own = planned.values()
    assert line_of(own, "data demo: ").endswith(f"would be written to {tmp_path}/prepared/demo")
    assert line_of(own, "steps: ") == "steps: not known before the data is here"
    assert line_of(own, "student ").endswith("/init-1x96x4-demo: made by stage 2")
    assert line_of(own, "teacher ").endswith("/teacher-3x128x4-demo: made by stage 1")
    assert f"student {demo.TEACHER}: here, {demo.TEACHER}" in line_of(teacher_stage, "student ")
    assert own["settings"]["prompt_lr"] == 3e-3


def test_the_papers_main_result_before_anything_is_there(tmp_path, monkeypatch, nothing_is_written):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nowhere"))
    printed = main(tmp_path / "out", "--student", "gpt2", "--keep", 20, "--plan")
    planned = read_plan(printed)
    teacher_stage, init, own = planned.values()
    home = f"{tmp_path}/nowhere/hub/promptkd/openai-community"
    expected = f"would be downloaded from the hub to {home}/gpt2-xl, 6.43 GB"
    assert line_of(teacher_stage, "student ") == f"student gpt2-xl: {expected}"
    assert line_of(init, "student ").endswith(f"{home}/gpt2, 550 MB")
    assert "would be downloaded from the hub's datasets/MiniLLM/dolly" in line_of(own, "data ")
    # Three states of 12 bytes for each of 1,558 million parameters, and two checkpoints of 4 bytes
    assert line_of(teacher_stage, "disk: ").startswith("disk: up to 68.6 GB (3 states of 18.7 GB;")
    assert line_of(own, "disk: ") == (
        "disk: up to 15.4 GB (3 states of 1.49 GB; checkpoints of 496 MB, 2 for best/ "
        "and 20 in kept/), 10.4 GB in the end"
    )
    assert re.search(rf"^disk in {tmp_path}/out: up to 68.6 GB; .* are free$", printed, re.M)
    assert teacher_stage["settings"]["lr"] == 5e-5
    assert {name: own["settings"][name] for name in ("lr", "prompt_lr", "global_batch_size")} == {
        "lr": 5e-5,
        "prompt_lr": 5e-5,
        "global_batch_size": 256,
    }


def test_the_plan_before_a_download_is_the_plan_after_it(tmp_path, monkeypatch, hub):
    options = ("--student", "gpt2-medium", "--method", "gkd")
    monkeypatch.setattr(data.sets.prepare, "DATA_DIR", tmp_path / "prepared")
    after = {name: stage["settings"] for name, stage in plan_of("out", *options).items()}
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nowhere"))
    before = {name: stage["settings"] for name, stage in plan_of("out", *options).items()}
    assert before == after and len(before) == 3


def test_what_can_not_be_known_of_another_hub_id_is_said(tmp_path, monkeypatch, nothing_is_written):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nowhere"))
    printed = main(tmp_path, "--student", "owner/name", "--lr", "0.5", "--plan")
    _, init, own = read_plan(printed).values()
    unknown = "not known before owner/name is downloaded"
    for stage in (init, own):
        assert stage["settings"] == {}
        assert line_of(stage, "steps: ") == f"steps: {unknown}"
        assert line_of(stage, "disk: ") == f"disk: {unknown}"
        nearest = "the preset is that of the GPT-2 nearest in size"
        assert line_of(stage, "settings: ") == f"settings: {unknown}: {nearest}"
    assert line_of(init, "student ").endswith("owner/name, of a size that is not known before")
    assert "promptkd-name-lr0.5-s10 (PromptKD): from scratch" in printed
    assert "GB, and what is not known; " in printed
    # In the demo the preset does not depend on the size.
    own = list(plan_of(tmp_path, "--student", "owner/name", "--data", "demo").values())[-1]
    assert own["settings"]["lr"] == 1e-3


def test_steps_without_the_tokenizer_count_all_rows(tmp_path, no_download):
    """GPT-2's own tokenizer is not asked for, because it might be downloaded."""
    rows = [{"instruction": "say one", "output": "one"}] * 7
    rows.append({"instruction": "x " * 600, "output": "one"})
    for name in ("train", "dev"):
        write_rows(tmp_path / "mine" / f"{name}.jsonl", rows)
    write_checkpoint(tmp_path / "plain", STUDENT)
    options = f"--method sft --data {tmp_path}/mine --global-batch 2 --epochs 3 --student".split()
    [stage] = plan_of(tmp_path / "out", *options, tmp_path / "plain").values()
    limit = "less those whose request is over the limit of tokens"
    assert line_of(stage, "steps: ") == f"steps: 12 of 2 rows; 8 training rows, {limit}"
    write_checkpoint(tmp_path / "plain", STUDENT, TOKENIZER)
    [stage] = plan_of(tmp_path / "out", *options, tmp_path / "plain").values()
    assert line_of(stage, "steps: ") == "steps: 9 of 2 rows; 7 training rows"
    teacher = write_checkpoint(tmp_path / "teacher", STUDENT, TOKENIZER)
    gkd = [*options, tmp_path / "plain", "--method", "gkd", "--sft-teacher", teacher]
    [_, stage] = plan_of(tmp_path / "out", *gkd).values()
    expected = "steps: 9 of 2 rows; 7 training rows; warm-up of 1 steps in place of 100"
    assert line_of(stage, "steps: ") == expected
    (tmp_path / "mine" / "dev.jsonl").unlink()
    with pytest.raises(InputError, match="dev.jsonl: no such file"):
        plan_of(tmp_path / "out", *options, tmp_path / "plain")
