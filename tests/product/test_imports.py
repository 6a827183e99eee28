"""Commands find our own modules, also where others have the same names."""

import os
import runpy
import sys

import pytest
from helpers import ROOT, fork_ranks, wait_for

COMMANDS = ["train.py", "evaluate.py", "exposure_bias.py", "sample.py", "prompt.py"]
COMMANDS += ["data/prepare.py"]


def forget_our_modules():
    """Let imports be those of a new process, in which Python has not put our directory first, as
    with PYTHONSAFEPATH."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {"data"}
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path not in ("", str(ROOT))]


@pytest.fixture
def others(tmp_path):
    """A directory with modules called like ours, such as `evaluate`, which is on PyPI, too."""
    for name in ("data", "evaluate", "losses", "model", "options", "prompt"):
        (tmp_path / "others" / name).mkdir(parents=True)
        (tmp_path / "others" / name / "__init__.py").write_text(f"raise ImportError({name!r})")
    return tmp_path / "others"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_our_own_modules(tmp_path, others, command):
    def run():
        forget_our_modules()
        sys.path.insert(0, str(others))
        os.chdir(others)
        sys.argv = [command, "--help"]
        runpy.run_path(str(ROOT / command), run_name="__main__")

    [status] = wait_for(fork_ranks(run, 1, tmp_path / "log"), 60)
    assert status == 0 and (tmp_path / "log0").read_text().startswith("usage: "), tmp_path


def test_no_other_package_called_tests_hides_ours(tmp_path, others):
    """As many projects install one. `python -m` puts the current directory first."""
    (others / "tests").mkdir()
    (others / "tests" / "__init__.py").touch()

    def run():
        forget_our_modules()
        sys.path[:0] = [str(ROOT), str(others)]
        sys.argv = ["", "--help"]
        runpy.run_module("tests.make_demo_models", run_name="__main__")

    [status] = wait_for(fork_ranks(run, 1, tmp_path / "log"), 60)
    assert status == 0 and (tmp_path / "log0").read_text().startswith("usage: "), tmp_path


def test_train_imports_our_own_modules_in_a_notebook_of_another_project(tmp_path, others):
    def run():
        forget_our_modules()
        sys.path[:0] = [str(others)]
        sys.path.append(str(ROOT))
        import train

        print(train.show_demo.__module__, train.losses.__file__)

    [status] = wait_for(fork_ranks(run, 1, tmp_path / "log"), 60)
    assert status == 0
    assert (tmp_path / "log0").read_text() == f"evaluate {ROOT / 'losses.py'}\n"
