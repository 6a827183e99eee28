"""The worked examples of docs/reference.md, all in one copy of the project: they are put where the
reference says, and the tests of style and of all methods are run there."""

import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, Server
from test_style import code_blocks

REFERENCE = ROOT / "docs" / "reference.md"
STEP, STEPS_ENTRY, METHODS_ENTRY, PUBLIC_SETS_ENTRY = code_blocks(REFERENCE, "python")
[SKEWED_KL] = code_blocks(REFERENCE, "diff")
STEPS_COMMENT = (
    "# The steps of data.runs.methods.METHODS: (run, this rank's examples, t) -> metrics"
)
# Of the tests that are parametrised over methods, those that take seconds
TESTS = "style methods plan precision train resume algorithm".split()


@pytest.fixture
def project(tmp_path):
    """A copy of the project without its data and history, but what is big as links."""
    copy = tmp_path / "project"
    ignored = shutil.ignore_patterns("__pycache__", "out", "demo_models", "golden")
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".toml", ".md"):
            shutil.copy(path, copy)
    for name in ("data", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    shutil.rmtree(copy / "data" / "demo", ignore_errors=True)
    for name in ("docs", ".ci", "LICENSE", "data/demo_models", "tests/golden"):
        if (ROOT / name).exists():
            (copy / name).symlink_to(ROOT / name)
    return copy


def insert(path, before, text, after=None):
    """Put text before a line of a file: the first one like that after a line like `after`."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    start = 0 if after is None else lines.index(f"{after}\n")
    place = lines.index(f"{before}\n", start)
    path.write_text("".join([*lines[:place], text, *lines[place:]]), encoding="utf-8")


def run(project, *command, **kwargs):
    return subprocess.run(command, cwd=project, capture_output=True, text=True, **kwargs)


def test_the_places_of_the_examples_are_said():
    text = REFERENCE.read_text(encoding="utf-8")
    for place in ("before `STEPS`:", "In `STEPS`:", "In `METHODS` of [data/runs/methods.py]"):
        assert place in text
    files = re.findall(r"^\+\+\+ b/(.*)$", SKEWED_KL, re.M)
    assert files == ["data/runs/methods.py", "losses.py", "train.py"]
    assert len(re.findall(r"^\+(?!\+\+ b/)", SKEWED_KL, re.M)) <= 20


@pytest.fixture
def extended(project):
    """The project with the new methods, the new option and the new data set of the reference."""
    process = run(project, "git", "apply", input=SKEWED_KL)
    assert process.returncode == 0, process.stderr
    train, sets = project / "train.py", project / "data" / "sets" / "prepare.py"
    insert(train, STEPS_COMMENT, f"{STEP}\n\n")
    insert(train, "}", STEPS_ENTRY, after="STEPS = {")
    insert(project / "data" / "runs" / "methods.py", "}", METHODS_ENTRY, after="METHODS = {")
    insert(sets, "}", PUBLIC_SETS_ENTRY, after="PUBLIC_SETS = {")
    for command in (["check"], ["format", "--check"]) if shutil.which("ruff") else ():
        process = run(project, "ruff", *command, ".")
        assert process.returncode == 0, process.stdout
    return project


def test_what_is_added_passes_the_tests_of_all_methods(extended):
    """And those of style: the tests are not changed."""
    files = [path for name in TESTS for path in extended.glob(f"tests/*/test_{name}.py")]
    # An option does not change how a run is interrupted, and ranks and restarts take longest.
    chosen = "test_style or fkl and not (ranks or interrupted)"
    chosen += " or skewkd and (methods or plan or precision)"
    options = ("-q", "-x", "-p", "no:cacheprovider", "-k", chosen)
    process = run(extended, sys.executable, "-m", "pytest", *files, *options, timeout=300)
    assert process.returncode == 0, process.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", process.stdout)[1]) > 150


# The option changes the loss, the name and the help. The data set is downloaded, read by --data,
# and evaluated without the paper's ban.
SCRIPT = """
import torch
import evaluate, losses, train
from data.runs.methods import DEFAULTS, METHODS
from data.runs.names import override_suffix
from data.sets import prepare

p, q = torch.randn(2, 5, 11, dtype=torch.float64)
for skew in (0.1, 0.9):
    mixture = skew * p.softmax(-1) + (1 - skew) * q.softmax(-1)
    expected = (p.softmax(-1) * (p.log_softmax(-1) - mixture.log())).sum(-1)
    assert (losses.skewed_kl(q, p, skew) - expected).abs().max() < 1e-5
[option] = METHODS["skewkd"].options
assert override_suffix(option, 0.25) == "-skew0.25" and DEFAULTS["skew"] is None
for name, method in METHODS.items():
    assert method.option_defaults().get("skew") == (0.1 if name == "skewkd" else None)

prepare.main(["haiku"])
[column] = evaluate.open_columns(["haiku"]).values()
assert (len(column.rows), column.ban, column.as_in_paper) == (2, 0, False)
directory = prepare.find_data_dir("haiku")
print(sorted(path.name for path in directory.glob("*.jsonl")))
train.main(["--method", "gkd", "--skew", "0.3"])
"""


def test_the_new_option_and_the_new_data_set_do_what_the_reference_says(
    extended, online, monkeypatch
):
    server = Server()
    row = b'{"instruction": "say one", "output": "one"}\n'
    for file in ("train.jsonl", "dev.jsonl", "eval/test.jsonl"):
        n = 2 if file == "eval/test.jsonl" else 5
        server.answers[f"/datasets/owner/haiku/resolve/main/{file}"] = n * row
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    process = run(extended, sys.executable, "-c", SCRIPT)
    server.close()
    error = "data.process.errors.InputError: --skew has no effect here (method gkd); leave it out"
    assert process.stderr.splitlines()[-1] == error, process.stderr
    counts, files = process.stdout.splitlines()
    assert counts.endswith("data/haiku: 5 train, 5 dev, 2 test rows")
    assert files == "['dev.jsonl', 'test.jsonl', 'train.jsonl']"
