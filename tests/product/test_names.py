"""Names that are unusual: bytes that are not UTF-8, `$`, `_`, a newline, letters that a font lacks.
And texts with half a surrogate pair, which JSON can hold."""

import importlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ROOT,
    run_command,
    soft_prompt,
    talker_config,
    tiny_tokenizer,
    write_checkpoint,
    write_rows,
)

from data.models.prompts import load_prompt, save_prompt
from data.runs import report
from data.runs.names import unique_labels
from data.runs.report import format_table, plot_bars, plot_curves, save_plot
from data.runs.runs import read_record
from data.sets.prepare import find_data_dir
from sample import row_uniforms

LATIN_1 = os.fsdecode(b"mod\xe9le")  # a lone surrogate
NAMES = [
    *("$ $x a$_$b $$$ {} a_b{ _hidden \\$ \\frac ^ % #1 <b> a|b & ~").split(),
    *("模型 😀 עברית").split(),
    *["two\nlines", "\ttab", "a\x00b", "\x1b[31m", LATIN_1, "\ud83d", "x" * 400],
]


# ---- random numbers ----------------------------------------------------------------------------


def test_random_numbers_of_a_row_with_any_name():
    """Those of ordinary names are as they always were."""
    first = [row_uniforms(2, 10, "evaluate", name, 3)[0] for name in ("dolly", "模型", LATIN_1)]
    expected = np.float32([0.48015374, 0.26178575])
    assert np.array_equal(first[:2], expected)
    assert len({float(u) for u in first}) == 3


# ---- plots and tables --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_is_drawn(tmp_path, monkeypatch, recwarn, name):
    """As it is: a dollar sign begins no formula."""
    [label], texts = unique_labels([name]), []

    def save_and_look(path, draw):
        from matplotlib.text import Text

        def look(figure):
            draw(figure)
            texts.extend(text for text in figure.findobj(Text) if text.get_text())

        return save_plot(path, look)

    monkeypatch.setattr("data.runs.report.save_plot", save_and_look)
    path = tmp_path / "bars.png"
    bars = {label: [1.0], "other": [2.0, 3.0]}
    assert plot_bars(path, bars, {label: 2.5}, label) == str(path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert not any(text.get_parse_math() for text in texts)
    shown = {text.get_text().strip() for text in texts}
    if name.isprintable() and len(name) < 70:
        assert name in shown  # in the title and in the legend
    assert format_table([["name"], [label]]).count("\n") == 1
    assert not recwarn.list


@pytest.mark.parametrize("n_bars", [1, 30])
def test_bars_lie_one_below_the_other(tmp_path, n_bars):
    """The more there are, the higher the plot is, at the same width of 8 inches."""
    bars = {f"run {n}": [float(n)] for n in range(n_bars)}
    plot_bars(tmp_path / "bars.png", bars, {}, "title")
    size = struct.unpack(">II", (tmp_path / "bars.png").read_bytes()[16:24])
    assert size == (1200, 150 * (1.5 + 0.3 * n_bars))


def test_name_that_begins_with_an_underscore_is_in_the_legend(tmp_path, monkeypatch):
    def save_plot(path, draw):
        draw(figure)
        return str(path)

    figure = pytest.importorskip("matplotlib.figure").Figure()
    monkeypatch.setattr(report, "save_plot", save_plot)
    settings = {"requests": 1, "samples": 1, "data": "x"}
    names = unique_labels(["_x", "y", LATIN_1, "a\nb"])
    columns = dict.fromkeys(("percent", "ex_acc_err", "low", "high"), [1])
    series = dict.fromkeys(names, columns)
    line = report.write_figure(tmp_path / "f", "student", series, settings, "percent", "", "")
    assert line == f"also in {tmp_path}/f.json; {tmp_path}/f.png"
    labels = [text.get_text().strip() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["_x", "y", "mod\\udce9le", "a b"]
    assert list(json.loads((tmp_path / "f.json").read_text("utf-8"))["students"]) == names


@pytest.mark.parametrize("error", ["ImportError", "AttributeError", "RuntimeError", "OSError"])
@pytest.mark.parametrize("module", ["__init__", "figure"])
def test_matplotlib_that_fails_on_import(tmp_path, monkeypatch, error, module):
    (tmp_path / "matplotlib").mkdir()
    for file in {"__init__", module}:
        text = f"raise {error}('two\\nlines')" if file == module else ""
        (tmp_path / "matplotlib" / f"{file}.py").write_text(text)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    write_rows(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    assert plot_curves(tmp_path) == f"no plot ({error}: two lines)"
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        del sys.modules[name]


@pytest.mark.slow
def test_plot_where_matplotlib_has_no_directory_for_its_own_files(tmp_path):
    """And where settings ask for LaTeX and for PDF, and the back end is a notebook's."""
    (tmp_path / "file").write_text("")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.format: pdf\n")
    code = "import sys; from data.runs.report import plot_bars; print(plot_bars(sys.argv[1], "
    code += "{'a_$': [1.0]}, {}, 'x_^'))"
    places = {"MPLCONFIGDIR": str(tmp_path / "file" / "x"), "HOME": str(tmp_path / "file")}
    places["MATPLOTLIBRC"] = str(tmp_path / "matplotlibrc")
    places["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    process = run_command("-c", code, tmp_path / "x.png", **places)
    assert process.stdout == f"{tmp_path / 'x.png'}\n", process.stderr
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_plot_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "a.png").mkdir()
    for path in (tmp_path / "file" / "x.png", tmp_path / "a.png"):
        line = plot_bars(path, {"a": [1.0]}, {}, "title")
        assert line.startswith("no plot (") and "\n" not in line and len(line) < 300


# ---- the commands ------------------------------------------------------------------------------

# Commands one after another in one process, by module; sample.py's is in data.models.sampling
SCRIPT = """
import importlib, json, sys
sys.path.insert(0, sys.argv.pop(1))
from data.process import command_line
for command in json.loads(sys.stdin.read()):
    program, *arguments = [sys.argv[part] if isinstance(part, int) else part for part in command]
    try:
        command_line.run_command_line(lambda: importlib.import_module(program).main(arguments))
    except SystemExit as error:
        print(program, "ends with", error.code)
"""
DATA = os.fsdecode("d_a$_$\nt模".encode() + b"\xe9")
ROWS = [
    {"instruction": f"\ud83d {i}", "input": "\udce9" * (i % 2), "output": ["task \ud83d", "\udfff"]}
    for i in range(4)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the commands leave and print: the directory, and the finished process."""
    home = tmp_path_factory.mktemp("names") / LATIN_1
    config = replace(talker_config(), n_positions=512)
    write_checkpoint(home / LATIN_1, config, tiny_tokenizer())
    write_checkpoint(home / f"t{LATIN_1}", replace(config, n_embd=16), tiny_tokenizer())
    for split in ("train", "dev", "test"):
        write_rows(home / DATA / f"{split}.jsonl", ROWS)
    write_rows(home / f"c{LATIN_1}", [{"text": "a task \ud83d that " * 300}])
    run = f"out/sft-{LATIN_1}-{DATA}-steps2-s10"
    # Commands name these by number: JSON would not give them to the process as bytes.
    arguments = [LATIN_1, f"t{LATIN_1}", DATA, run, f"c{LATIN_1}", f"{DATA}/test.jsonl"]
    student, teacher, data, run, corpus, test = range(1, 7)
    training = ["--data", data, "--out", "out"]
    tables = ["--data", data, "--seeds", "1", "2", "--max-new", "2", "--out", "tables"]
    bias = ["exposure_bias", "--teacher", teacher, "--data", data, "--out", "bias"]
    bias += ["--steps", "2", "--samples", "1"]
    minillm = ["--method", "minillm", "--sft-teacher", teacher, "--init", student]
    commands = [
        [
            "train",
            "--method",
            "sft",
            "--student",
            student,
            *training,
            "--steps",
            "2",
            "--keep",
            "2",
        ],
        ["train", *minillm, "--lm-data", corpus, *training, "--steps", "1", "--global-batch", "4"],
        ["evaluate", run, student, *tables, "--samples", "2", "--by", "data"],
        ["evaluate", run, "--cost", "--out", "tables"],
        ["data.models.sampling", run, "--file", test, "--max-new", "2"],
        ["data.models.sampling", run, "--file", test, "--max-new", "2", "--json"],
        [*bias, "--students", student, run],
        [*bias, "--along", run],
    ]
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, ROOT, *map(os.fsencode, arguments)],
        cwd=home,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        input=json.dumps(commands),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    return home, process


def test_commands_accept_any_names_and_any_texts(results):
    home, process = results
    assert "Traceback" not in process.stderr and "ends with" not in process.stdout, process.stderr
    assert "no plot" not in process.stdout
    files = [path for path in home.rglob("*") if path.is_file()]
    plots = [path.name for path in files if path.suffix == ".png"]
    assert sorted(plots) == ["curves.png"] * 2 + [
        *("figure-by-data.png", "figure1.png", "figure_3a.png", "figure_3b.png")
    ]
    for path in files:
        if path.suffix in (".md", ".csv", ".json", ".jsonl"):
            path.read_text(encoding="utf-8")  # does not raise


def test_tables_name_them_on_one_line(results):
    home, _ = results
    table = (home / "tables" / "table1.md").read_text(encoding="utf-8").splitlines()
    assert r"| ROUGE-L | d_a$_$ t模\udce9 | average |" in table
    assert any(line.startswith(r"| mod\udce9le | ") for line in table)
    samples = (home / "tables" / "table6.md").read_text(encoding="utf-8")
    assert "instruction:\n\n    \\ud83d 0\n\n" in samples


def test_json_holds_them_as_they_are(results):
    home, process = results
    record = read_record(home / "out" / f"sft-{LATIN_1}-{DATA}-steps2-s10")
    assert Path(record["settings"]["data"]).name == DATA and record["complete"]
    sampled = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    assert [row["instruction"] for row in sampled] == [row["instruction"] for row in ROWS]
    assert [row["input"] for row in sampled] == [row["input"] for row in ROWS]


def test_soft_prompt_in_a_directory_of_any_name(tmp_path):
    P = soft_prompt(3)
    save_prompt(P, tmp_path / LATIN_1)
    assert load_prompt(tmp_path / LATIN_1, P.shape[1]).equal(P)


def test_missing_directory_of_any_name_is_reported(results):
    with pytest.raises(Exception, match="no such directory"):
        find_data_dir(LATIN_1)
