"""One-line errors, signals, atomic writes and JSON files."""

import errno
import os
import re
import signal
import stat
import sys
import threading
from pathlib import Path

import nltk.downloader
import pytest
from helpers import error_of, files_below, soft_prompt

import evaluate
import exposure_bias
import train
from data.models import hub, sampling
from data.models.tensors import save_tensors
from data.process import files, threads
from data.process.command_line import STOP_SIGNALS, ArgumentParser, run_command_line
from data.process.errors import InputError
from data.process.files import atomic_path, read_json, write_atomic
from data.runs import tuned_prompt
from data.runs.runs import MetricsLog
from data.sets import prepare

# ---- run_command_line --------------------------------------------------------------------------


def test_an_expected_error_ends_a_command_with_one_line_and_status_2(capsys):
    for error, line in {
        InputError("two\n  lines"): "two lines",
        FileNotFoundError(2, "No such file", "x.txt"): "[Errno 2] No such file: 'x.txt'",
    }.items():

        def main(error=error):
            print("started")
            raise error

        with pytest.raises(SystemExit) as exit:
            run_command_line(main)
        assert exit.value.code == 2 and capsys.readouterr() == ("started\n", f"error: {line}\n")


def test_a_home_directory_is_expanded_where_the_shell_leaves_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = ArgumentParser()
    for name in ("--out", "--data", "--instruction"):
        parser.add_argument(name)
    args = parser.parse_args(["--out=~/ev", "--data", "a~b", "--instruction=~ or -?"])
    assert (args.out, args.data, args.instruction) == ("/home/me/ev", "a~b", "~ or -?")


def test_a_user_without_a_home_directory_gets_one(tmp_path, monkeypatch, capsys):
    """As a container's user whose number is not in /etc/passwd. nltk, which rouge-score imports,
    can't be imported without, and caches would be in a folder called `~`."""
    variables = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME")
    for name in ("HOME", "RANK", *variables):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "pwd", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("nltk.data.path", [])
    threads.provide_home()
    home = tmp_path / f"promptkd-{os.getuid()}"
    assert os.environ["HOME"] == str(home)
    assert nltk.downloader.Downloader().download_dir == str(home / "nltk_data")
    for path in (hub.hub_path("hub"), hub.hub_path("token"), hub.download_dir("a/b")):
        assert path.is_relative_to(home)
    problem = f"this user has no home directory, and {home} is taken for it"
    warning = f"warning: {problem}; set HOME to a directory for downloads\n"
    threads.provide_home()  # as a process that this one starts
    assert capsys.readouterr() == ("", warning)


FULL = Path("/dev/full")  # a file on a full disk
FULL_DISK = "[Errno 28] No space left on device"


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_log_on_a_full_disk_is_named(tmp_path, monkeypatch, capsys):
    for text in ("a line\n", "the start of one"):
        monkeypatch.setattr(sys, "stdout", FULL.open("w"))
        with pytest.raises(SystemExit) as exit:
            run_command_line(lambda text=text: sys.stdout.write(text))
        error = f"error: {FULL_DISK}: 'standard output'\n"
        assert exit.value.code == 2 and capsys.readouterr().err == error
    metrics = MetricsLog(tmp_path / "metrics.jsonl", start_step=0)
    metrics.path = FULL
    with pytest.raises(OSError) as caught:
        metrics.write({"step": 1})
    assert str(caught.value) == f"{FULL_DISK}: '{FULL}'"


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_an_error_that_can_not_be_shown_has_its_status(monkeypatch):
    monkeypatch.setattr(sys, "stderr", FULL.open("w", buffering=1))
    with pytest.raises(SystemExit) as exit:
        run_command_line(lambda: read_json("no such file", "fix"))
    assert exit.value.code == 2


UNDERSCORES = {
    train.options.parse_train_args: "--dev_rows=3 --prompt_text=a_b --reg_kl forward --out o_1",
    evaluate.parse_args: "m_1 --max_new=9 --top_k 5 --by reg_weight --no_repeat_ngram=2",
    exposure_bias.parse_args: "--teacher t_1 --students s_1 --micro_batch_tokens=7",
    sampling.parse_args: "m_1 --instruction=--a_b --max_new 9 --top_p=0.5",
}


@pytest.mark.parametrize("parse, underscores", UNDERSCORES.items())
def test_options_may_have_underscores_in_place_of_hyphens(parse, underscores):
    hyphens = re.sub(r"(?<!\S)--\w+", lambda option: option[0].replace("_", "-"), underscores)
    assert hyphens != underscores and "_" in hyphens
    assert vars(parse(underscores.split())) == vars(parse(hyphens.split()))


@pytest.mark.parametrize("option", ["--local_rank=0", "--local-rank=3", "--local_rank 1"])
def test_what_other_launchers_add_is_refused_with_the_launcher_to_use(option):
    fix = "start one process per rank with torchrun --nproc_per_node=N, which adds none"
    problem = "is what deepspeed and torch.distributed.launch add for each process"
    for command in (train, evaluate, exposure_bias, sampling, tuned_prompt, prepare):
        line = error_of(command.main, [*option.split(), "gpt2"])
        assert line == f"{option.split()[0]} {problem}; {fix}"


def test_other_exceptions_and_success_pass_through(capsys):
    with pytest.raises(ZeroDivisionError):
        run_command_line(lambda: 1 / 0)
    assert run_command_line(lambda: None) is None and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", STOP_SIGNALS)
def test_a_signal_ends_a_command_with_one_line_and_leaves_no_partial_file(
    tmp_path, monkeypatch, capsys, name
):
    number = getattr(signal, name)
    monkeypatch.setattr(files.os, "fsync", lambda handle: signal.raise_signal(number))
    previous = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit:
        run_command_line(lambda: write_atomic(tmp_path / "file", "text"))
    assert exit.value.code == 128 + number and capsys.readouterr().err == "interrupted\n"
    assert files_below(tmp_path) == [] and signal.getsignal(number) is previous


# ---- atomic_path and write_atomic --------------------------------------------------------------


def test_write_atomic_writes_text_and_bytes_and_creates_directories(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomic(path, "Größe\r\n大\n")
    assert path.read_bytes() == "Größe\r\n大\n".encode()
    write_atomic(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    write_atomic(path, "")
    assert path.read_bytes() == b"" and files_below(tmp_path) == ["a/b/file.txt"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, None])
def test_a_failed_write_keeps_the_old_content_and_leaves_no_temporary_file(
    tmp_path, monkeypatch, function, number
):
    error = OSError(number, "the data may be lost") if number else KeyboardInterrupt()

    def fail(*arguments):
        raise error

    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    monkeypatch.setattr(files.os, function, fail)
    for target in (path, tmp_path / "another.txt"):
        with pytest.raises(type(error)):
            write_atomic(target, "new" * 1000)
    assert path.read_text() == "old" and files_below(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_fsync_is_written_to(tmp_path, monkeypatch, number):
    def fsync(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fsync)
    write_atomic(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_an_error_of_the_system_names_the_file(tmp_path):
    for error, message in {
        OSError(28, "No space left"): f"[Errno 28] No space left: '{tmp_path / 'file'}'",
        FileNotFoundError(2, "No such file", "other"): "[Errno 2] No such file: 'other'",
        TimeoutError("timed out"): "timed out",
    }.items():
        with pytest.raises(OSError) as caught, atomic_path(tmp_path / "file"):
            raise error
        assert str(caught.value) == message


def test_a_directory_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    with pytest.raises(OSError, match="is not a regular file"):
        write_atomic(tmp_path / "x", "text")
    assert (tmp_path / "x" / "y").is_dir() and files_below(tmp_path) == []


def test_a_reader_sees_the_whole_old_or_the_whole_new_content(tmp_path):
    path, contents, seen = tmp_path / "file", ["a" * 300_000, "b" * 300_000], set()
    write_atomic(path, contents[0])
    stop = threading.Event()

    def read():
        while not stop.is_set():
            seen.add(path.read_text() if path.is_file() else "no file")

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(20):
        write_atomic(path, contents[n % 2])
    stop.set()
    reader.join()
    assert seen and seen <= set(contents)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    """Of checkpoints, too: safetensors' own save_file keeps them from other users since version
    0.8."""
    previous = os.umask(umask)
    try:
        write_atomic(tmp_path / "file", "text")
        save_tensors({"prompt": soft_prompt(3)}, tmp_path / "tensors")
        assert os.umask(umask) == umask  # unchanged in the process
    finally:
        os.umask(previous)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"file": mode, "tensors": mode}


# ---- read_json ---------------------------------------------------------------------------------


def test_a_file_that_is_not_json_is_one_line_with_the_file_and_the_fix(tmp_path):
    path = tmp_path / "file.json"
    for content in (None, b"", b'{"a": ', b"\xff", b"[" * 200_000):
        if content is not None:
            path.write_bytes(content)
        message = error_of(read_json, path, "fetch it again")
        assert message.startswith(f"{path}: can't be read as JSON (")
        assert message.endswith("); fetch it again")
    write_atomic(path, '{"Größe": [1, null]}')
    assert read_json(path, "") == {"Größe": [1, None]}
