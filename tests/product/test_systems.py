"""What other systems lack: Windows' modules, signals and rules for files, a notebook's streams."""

import ast
import io
import json
import os
import re
import runpy
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from helpers import (
    ROOT,
    after_device,
    talker_config,
    tiny_tokenizer,
    write_checkpoint,
    write_rows,
)

from data.process import dist
from data.process.command_line import run_command_line
from data.process.errors import InputError
from data.runs import report

TOKENIZER = tiny_tokenizer()
ROWS = [{"instruction": f"say {word}", "output": word} for word in "one two three four".split()]

# Python imports it when it starts. Files behave as on Windows: only a descriptor that is open for
# writing can be flushed to the disk, and what is open can be neither replaced nor removed. Text
# files have another default encoding than UTF-8, so no file may rely on it.
LIKE_WINDOWS = r"""
import fcntl, os, signal, sys, warnings

get_flags = fcntl.fcntl, fcntl.F_GETFL
for name in ("fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "syslog"):
    sys.modules[name] = None
for name in [name for name in dir(signal) if name.startswith("SIG")]:
    if name not in "SIGINT SIGTERM SIGABRT SIGFPE SIGILL SIGSEGV SIG_DFL SIG_IGN".split():
        delattr(signal, name)
for name in ("fork", "forkpty", "killpg", "setsid", "getuid", "geteuid", "statvfs", "fchmod"):
    delattr(os, name)
modules = r"(data\.|train$|sample$|evaluate$|model$|prompt$|__main__$)"
warnings.filterwarnings("error", category=EncodingWarning, module=modules)
fsync, replace, unlink = os.fsync, os.replace, os.unlink


def fsync_on_windows(descriptor):
    function, command = get_flags
    if function(descriptor, command) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    fsync(descriptor)


def check_closed(path):
    found = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    with open("/proc/self/maps", encoding="utf-8") as maps:
        found += [line.split(maxsplit=5)[-1].strip() for line in maps]
    if os.path.realpath(path) in found:
        raise PermissionError(13, "used by another process", str(path))


def replace_on_windows(source, target):
    check_closed(source)
    check_closed(target)
    replace(source, target)


def unlink_on_windows(path, **kwargs):
    if "dir_fd" not in kwargs:
        check_closed(path)
    unlink(path, **kwargs)


os.fsync, os.replace, os.rename = fsync_on_windows, replace_on_windows, replace_on_windows
os.unlink = os.remove = unlink_on_windows
"""

# A stage that is stopped, damaged and resumed, samples from it, and its evaluation.
SCRIPT = """
import sys
import data.sets.prepare, data.models.sampling, evaluate, exposure_bias, train
from data.process.command_line import run_command_line

step = train.STEPS["sft"]
training = "--method sft --student student --data rows --steps 4 --save-every 1".split()
training += ["--micro-batch-tokens", "200", "--global-batch", "2"]


def stopping_step(run, examples, t):
    if t == 3:
        raise KeyboardInterrupt
    return step(run, examples, t)


train.STEPS["sft"] = stopping_step
try:
    run_command_line(lambda: train.main(training))
except SystemExit as exit:
    print("status", exit.code)
with open("out/sft-student-rows-steps4-globalbatch2-s10/state/step-000003.pt", "r+b") as file:
    file.truncate(1000)
train.STEPS["sft"] = step
train.main(training)
run = "out/sft-student-rows-steps4-globalbatch2-s10"
data.models.sampling.main([run, "--instruction", "say ünö", "--max-new", "4"])
evaluate.main([run, "--data", "rows", "--seeds", "10", "--max-new", "4"])
evaluate.main([run, "--cost"])
"""


@pytest.mark.slow
def test_without_what_windows_lacks_a_stage_trains_resumes_and_is_sampled_from(tmp_path):
    world, site = tmp_path / "world", tmp_path / "site"
    config = replace(talker_config(), n_positions=400)
    write_checkpoint(world / "student", config, TOKENIZER)
    for name in ("train", "dev", "test"):
        write_rows(world / "rows" / f"{name}.jsonl", ROWS)
    site.mkdir()
    (site / "sitecustomize.py").write_text(LIKE_WINDOWS)
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", tmp_path / "script.py"],
        cwd=world,
        env=os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert "status 130\n" in process.stdout
    assert "step-000003.pt: is damaged; trying an older one\n" in process.stdout
    assert "resuming after step 2\n" in process.stdout
    directory = world / "out" / "sft-student-rows-steps4-globalbatch2-s10"
    assert json.loads((directory / "run.json").read_text())["complete"]
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert not any("memory_resident_gb" in line for line in lines)
    assert "hours" in (world / "out" / "evaluation" / "table2.md").read_text()
    for path in (world / "out").rglob("*"):  # names that Windows allows
        assert not re.search(r'[<>:"|?*\\]|[. ]$', path.name), path


def test_every_text_file_is_opened_with_its_encoding():
    """Windows' default is another one than UTF-8."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
            name = ast.unparse(call.func).rpartition(".")[2]
            mode = ast.unparse(call.args[1]) if len(call.args) > 1 else "r"
            opens = ast.unparse(call.func) == "open" and "b" not in mode
            if opens or name in ("read_text", "write_text"):
                found = any(keyword.arg == "encoding" for keyword in call.keywords)
                assert found, f"{path}, line {call.lineno}"


# ---- notebooks ---------------------------------------------------------------------------------


class NotebookStream(io.TextIOBase):
    """What ipykernel sets as sys.stdout and sys.stderr: without a descriptor and `reconfigure`."""

    encoding = "UTF-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)


@pytest.fixture
def notebook(monkeypatch, tmp_path):
    """Run a program in this process, as %run does. Returns its output, errors and exit status."""

    def run(program, *arguments):
        status = 0
        with pytest.MonkeyPatch.context() as patch:
            output, errors = NotebookStream(), NotebookStream()
            patch.setattr(sys, "stdout", output)
            patch.setattr(sys, "stderr", errors)
            patch.setattr(sys, "argv", [program, *map(str, arguments)])
            try:
                runpy.run_path(str(ROOT / program), run_name="__main__")
            except SystemExit as exit:
                status = exit.code
            assert sys.stdout is output and sys.stderr is errors
        return output.text, errors.text, status

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot_curves", lambda directory: "no plot")
    write_checkpoint(tmp_path / "student", replace(talker_config(), n_positions=400), TOKENIZER)
    for name in ("train", "dev"):
        write_rows(tmp_path / "rows" / f"{name}.jsonl", ROWS)
    return run


def test_programs_run_in_a_notebook(notebook):
    arguments = ("student", "--instruction", "say one", "--max-new", 3)
    text, errors, status = notebook("sample.py", *arguments)
    assert text.endswith("\n") and after_device(errors) == "" and status == 0
    results = []
    thread = threading.Thread(target=lambda: results.append(notebook("sample.py", *arguments)))
    thread.start()  # as some notebooks run their cells
    thread.join()
    assert results == [(text, errors, 0)]
    _, errors, status = notebook("sample.py", "missing", "--instruction", "say one")
    assert after_device(errors).startswith("error: model 'missing': ") and status == 2
    training = "--method sft --student student --data rows --steps 1 --global-batch 2".split()
    text, errors, status = notebook("train.py", *training)
    assert "step 1/1" in text and after_device(errors) == "" and status == 0


def test_a_process_without_standard_streams_runs(monkeypatch):
    """Under pythonw, or where they were closed before it started."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    def main():
        print("nowhere")
        dist.init_process()
        raise InputError("an error")

    with pytest.raises(SystemExit) as exit:
        run_command_line(main)
    assert exit.value.code == 2
