"""The commands of docs/reference.md with which the demo makes every table and figure."""

import glob
import json
import re
import shlex

import make_demo_models
import pytest
from helpers import ROOT, write_checkpoint
from test_style import code_blocks
from test_train import STUDENT, TEACHER, TOKENIZER, no_demo_table, steps_seen, world  # noqa: F401

import evaluate
import exposure_bias
import train
from data.runs import plan

PROGRAMS = {"train.py": train, "evaluate.py": evaluate, "exposure_bias.py": exposure_bias}


@pytest.fixture
def small_demo(tmp_path, monkeypatch, steps_seen, no_demo_table):  # noqa: F811
    """Models of the demo's names, one step that changes nothing, and the same response to all."""
    for name, config in (("TEACHER", TEACHER), ("STUDENT", STUDENT)):
        directory = tmp_path / "models" / getattr(plan, name).rpartition("/")[2]
        write_checkpoint(directory, config, TOKENIZER)
        monkeypatch.setattr(plan, name, str(directory))
    monkeypatch.setattr(
        evaluate, "sample_all", lambda model, x, *_, **kwargs: ([[5]] * len(x), None)
    )
    monkeypatch.setattr(exposure_bias, "MAX_STEPS", 4)
    monkeypatch.setattr("data.runs.report.save_plot", lambda path, draw: "no plot")
    monkeypatch.chdir(tmp_path)


def test_the_demos_commands_make_every_table_and_figure(tmp_path, small_demo):
    """Each run that a command names exists, and a table by settings has more than one group."""
    blocks = code_blocks(ROOT / "docs" / "reference.md", "")
    [block] = [block for block in blocks if "python train.py --epochs 1 --keep 20" in block]
    by_fields = []
    for line in block.splitlines():
        _, program, *words = shlex.split(line)
        arguments = [path for word in words for path in (sorted(glob.glob(word)) or [word])]
        PROGRAMS[program].main(arguments)
        if "--by" in words:
            [table] = (tmp_path / "out" / "evaluation").glob("table-by-*.json")
            by_fields.append(json.loads(table.read_text()))
            table.unlink()
    assert [len(table["groups"]) for table in by_fields] == [2, 2, 2]
    out = tmp_path / "out"
    tables = ["evaluation/table1.md", "evaluation/table2.md", "evaluation/table6.md"]
    assert all((out / name).is_file() for name in tables)
    for figure, key, n in (("figure_3a", "students", 3), ("figure_3b", "runs", 1)):
        content = json.loads((out / "exposure_bias" / f"{figure}.json").read_text())
        assert len(content[key]) == n


def test_the_demos_other_commands_train_and_make_what_they_name(tmp_path, small_demo, monkeypatch):
    """Those of its section: other methods, evaluation, and the pre-training of its models."""
    monkeypatch.setattr(make_demo_models, "MODELS_DIR", tmp_path / "made")
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    text = text.partition("\n## The demo\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^python (.*)$|`python ([^`]*)`", text, re.M)
    commands = [shlex.split(line or inline) for line, inline in commands]
    assert " ".join(words[0] for words in commands) == (
        "train.py train.py evaluate.py train.py train.py train.py -m"
    )
    for program, *words in commands[:-1]:
        arguments = [path for word in words for path in (sorted(glob.glob(word)) or [word])]
        PROGRAMS[program].main(arguments)
    assert commands[-1] == ["-m", "tests.make_demo_models"]
    make_demo_models.main([])
    shapes = {words[words.index("--shape") + 1] for words in commands[3:6]}
    assert {path.name for path in (tmp_path / "made").iterdir()} == shapes
    scores = json.loads((tmp_path / "out" / "evaluation" / "table1.json").read_text())["scores"]
    assert {"gkd-1x96x4-demo-s10", "promptkd-1x96x4-demo-s10"} <= set(scores)
