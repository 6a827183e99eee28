"""One-line errors, atomic writes, downloads and finding a model by its name. The network is a server on loopback."""

import json
import os
import socket
import stat
import threading

import pytest
import torch
from helpers import (
    Cut,
    CutChunks,
    error_of,
    files_below,
    run_command,
    talker_config,
    tiny_model,
    tiny_tokenizer,
)

import model
from data import cli, hub
from data.cli import InputError, run_command_line, write_atomic
from data.hub import download, find_model_dir, hub_url
from data.models import load_model
from data.tokenizer import tokenizer_files


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of downloaded models, empty, beside an empty Hugging Face cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path / "torch" / "hub" / "promptkd"


# ---- command ---------------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from data.cli import InputError
from data.cli import run_command_line as command
class Expected(Exception): pass
def main():
    print("begun")
    raise eval(sys.argv[1])
command(main, Expected)
"""


@pytest.mark.parametrize(
    "error, line",
    [
        ("InputError('rows.jsonl, line 3: is empty')", "error: rows.jsonl, line 3: is empty"),
        (
            "FileNotFoundError(2, 'No such file or directory', 'x.txt')",
            "error: [Errno 2] No such file or directory: 'x.txt'",
        ),
        ("Expected('two\\n  lines')", "error: two lines"),
    ],
)
def test_an_expected_error_ends_a_command_with_one_line_and_status_2(error, line):
    done = run_command("-c", PROGRAM, error)
    assert (done.returncode, done.stdout, done.stderr) == (2, "begun\n", line + "\n")


def test_a_bug_in_a_command_shows_its_traceback():
    done = run_command("-c", PROGRAM, "ZeroDivisionError('a bug')")
    assert (
        done.returncode == 1
        and "Traceback" in done.stderr
        and "ZeroDivisionError: a bug" in done.stderr
    )
    assert "error:" not in done.stderr


def test_command_lets_other_exceptions_and_success_through():
    with pytest.raises(KeyError):
        run_command_line(lambda: {}["x"])
    assert run_command_line(lambda: None) is None


def test_an_interrupted_command_says_so_without_a_traceback(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        run_command_line(main)
    assert left.value.code == 130 and capsys.readouterr().err == "interrupted\n"


# ---- write_atomic ----------------------------------------------------------------------------------------------------------


def test_write_atomic_writes_text_and_bytes_and_makes_the_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomic(path, "Größe\r\n大\n")
    assert path.read_bytes() == "Größe\r\n大\n".encode()
    write_atomic(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    write_atomic(path, "")
    assert path.read_bytes() == b"" and files_below(tmp_path) == ["a/b/file.txt"]


@pytest.mark.parametrize(
    "step, error",
    [
        ("fsync", OSError(28, "No space left on device")),
        ("replace", PermissionError(13, "no")),
        ("fsync", KeyboardInterrupt()),
    ],
)
def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(
    tmp_path, monkeypatch, step, error
):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(cli.os, step, fail)
    with pytest.raises(type(error)):
        write_atomic(path, "new" * 1000)
    with pytest.raises(type(error)):
        write_atomic(tmp_path / "another.txt", "new")
    assert path.read_text() == "old" and files_below(tmp_path) == ["file.txt"]


def test_a_folder_in_the_place_of_the_file_is_an_os_error_and_stays(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomic(tmp_path / "x", "text")
    assert (tmp_path / "x" / "y").is_dir() and files_below(tmp_path) == []


def test_a_reader_sees_the_old_or_the_new_content_whole(tmp_path):
    path, contents, seen = tmp_path / "file", [letter * 300_000 for letter in ("a", "b")], set()
    write_atomic(path, contents[0])
    stop = threading.Event()

    def read():
        while not stop.is_set():
            seen.add(path.read_text() if path.is_file() else "no file")

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(60):
        write_atomic(path, contents[n % 2])
    stop.set()
    reader.join()
    assert not reader.is_alive() and seen and seen <= set(contents)


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "file", "text")
        assert os.umask(mask) == mask  # and the process keeps it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


# ---- download --------------------------------------------------------------------------------------------------------------

BODY = bytes(range(256)) * 10_000  # 2.5 MB: more than one block


def test_a_whole_file_is_downloaded_and_its_folder_made(server, tmp_path):
    server.answers["/file"] = BODY
    assert download(f"{server.url}/file", tmp_path / "new" / "file") is True
    assert (tmp_path / "new" / "file").read_bytes() == BODY
    assert files_below(tmp_path) == ["new/file"] and server.asked == ["/file"]


@pytest.mark.parametrize("first", [Cut(BODY), CutChunks(BODY), 500, 503])
def test_a_transfer_that_breaks_off_is_started_over(server, tmp_path, first):
    server.answers["/file"] = [first, BODY]
    assert download(f"{server.url}/file", tmp_path / "file") is True
    assert (tmp_path / "file").read_bytes() == BODY
    assert files_below(tmp_path) == ["file"] and server.asked == ["/file"] * 2


@pytest.mark.parametrize(
    "answer, what",
    [
        (Cut(BODY), "cut off after 1,280,000 of 2,560,000 bytes"),
        (CutChunks(BODY), ""),
        (500, "500"),
        (503, "503"),
    ],
)
def test_a_transfer_that_always_fails_is_one_line_and_leaves_no_file(
    server, tmp_path, answer, what
):
    server.answers["/file"] = answer
    message = error_of(download, f"{server.url}/file", tmp_path / "file")
    assert f"{server.url}/file" in message and what in message and "HF_ENDPOINT" in message
    assert files_below(tmp_path) == [] and len(server.asked) == 3


def test_a_failed_download_leaves_the_old_file_alone(server, tmp_path):
    (tmp_path / "file").write_text("old")
    server.answers["/file"] = Cut(BODY)
    error_of(download, f"{server.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old" and files_below(tmp_path) == ["file"]


def test_a_missing_file_is_false_at_once(server, tmp_path):
    assert download(f"{server.url}/nothing", tmp_path / "file") is False
    assert files_below(tmp_path) == [] and server.asked == ["/nothing"]


def test_no_server_at_all_is_one_line(tmp_path, monkeypatch):
    naps = []
    monkeypatch.setattr(hub.time, "sleep", naps.append)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as closed:  # bound and not listening: the port answers nobody
        closed.bind(("127.0.0.1", 0))
        message = error_of(
            download, f"http://127.0.0.1:{closed.getsockname()[1]}/file", tmp_path / "file"
        )
    assert "refused" in message and "network" in message
    assert (
        files_below(tmp_path) == [] and len(naps) == 2 and min(naps) > 0
    )  # it waits between attempts


def test_a_server_that_does_not_speak_http_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            for _ in range(3):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(
            InputError, match="download failed"
        ):  # it quotes the server, and `command` makes that one line
            download(f"http://127.0.0.1:{listener.getsockname()[1]}/file", tmp_path / "file")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    "endpoint", ["", "hub.example", "http://127.0.0.1:port", "htp://127.0.0.1", "http://a b"]
)
def test_a_wrong_address_in_HF_ENDPOINT_is_one_line(tmp_path, monkeypatch, endpoint):
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    error_of(download, hub_url("gpt2", "config.json"), tmp_path / "file")
    assert files_below(tmp_path) == []


def test_an_interrupt_leaves_no_half_file(server, tmp_path, monkeypatch):
    server.answers["/file"] = BODY

    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(f"{server.url}/file", tmp_path / "file")
    assert files_below(tmp_path) == [] and len(server.asked) == 1


def test_hub_url_is_the_hub_s_or_the_mirror_s(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert (
        hub_url("openai-community/gpt2", "config.json")
        == "https://huggingface.co/openai-community/gpt2/resolve/main/config.json"
    )
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror:8080/")
    assert hub_url("a/b", "f") == "http://mirror:8080/a/b/resolve/main/f"


# ---- model_directory -------------------------------------------------------------------------------------------------------


def test_a_directory_is_itself_and_a_run_is_its_best_checkpoint(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "run" / "best").mkdir(parents=True)
    assert find_model_dir(str(tmp_path / "plain")) == tmp_path / "plain"
    assert find_model_dir(str(tmp_path / "run")) == tmp_path / "run" / "best"
    assert find_model_dir(str(tmp_path / "run" / "best")) == tmp_path / "run" / "best"


@pytest.mark.parametrize(
    "name, repository",
    [
        ("gpt2", "openai-community/gpt2"),
        ("gpt2-medium", "openai-community/gpt2-medium"),
        ("gpt2-large", "openai-community/gpt2-large"),
        ("gpt2-xl", "openai-community/gpt2-xl"),
        ("MiniLLM/teacher-gpt2-1.5B", "MiniLLM/teacher-gpt2-1.5B"),
        ("a/b", "a/b"),
    ],
)
def test_official_names_and_hub_ids_are_downloaded_once(server, cache, name, repository):
    server.serve(
        repository,
        model_safetensors=b"weights",
        config_json=b"{}",
        vocab_json=b"vocab",
        merges_txt=b"merges",
    )
    directory = find_model_dir(name)
    assert directory == cache / repository
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        "model.safetensors": b"weights",
        "config.json": b"{}",
        "vocab.json": b"vocab",
        "merges.txt": b"merges",
    }
    asked = len(server.asked)
    assert asked == 4 and find_model_dir(name) == directory and len(server.asked) == asked


def test_without_safetensors_the_older_weights_are_taken(server, cache):
    server.serve("a/b", pytorch_model_bin=b"old weights", config_json=b"{}")
    directory = find_model_dir("a/b")
    assert files_below(directory) == ["config.json", "pytorch_model.bin"]
    assert (directory / "pytorch_model.bin").read_bytes() == b"old weights"
    asked = len(server.asked)
    assert find_model_dir("a/b") == directory and len(server.asked) == asked


def test_with_safetensors_the_older_weights_are_not_asked_for(server, cache):
    server.serve(
        "a/b", model_safetensors=b"weights", pytorch_model_bin=b"old weights", config_json=b"{}"
    )
    assert "pytorch_model.bin" not in files_below(find_model_dir("a/b"))
    assert not any("pytorch_model" in path for path in server.asked)


@pytest.mark.parametrize("broken", ["model_safetensors", "vocab_json", "config_json"])
def test_an_interrupted_download_goes_on_to_a_complete_one(server, cache, broken):
    contents = {
        "model_safetensors": b"weights" * 1000,
        "config_json": b"{ }",
        "vocab_json": b"vocab",
        "merges_txt": b"merges",
    }
    server.serve("a/b", **contents | {broken: Cut(contents[broken])})
    error_of(find_model_dir, "a/b")
    assert not (cache / "a/b/config.json").exists()
    whole = {f"a/b/{name.replace('_', '.')}": content for name, content in contents.items()}
    left = files_below(cache)
    assert all((cache / path).read_bytes() == whole[path] for path in left)

    server.serve("a/b", **contents)
    server.asked.clear()
    assert find_model_dir("a/b") == cache / "a/b"
    assert {path: (cache / path).read_bytes() for path in files_below(cache)} == whole
    assert {path.rsplit("/", 1)[-1] for path in server.asked} == {
        path.rsplit("/", 1)[-1] for path in whole if path not in left
    }, "whole files are fetched again"


@pytest.mark.parametrize(
    "contents, what",
    [
        ({}, "does not exist"),
        ({"config_json": b"{}"}, "model.safetensors"),
        ({"model_safetensors": b"w"}, "config.json"),
    ],
)
def test_a_repository_that_is_no_model_is_one_line_that_names_it(server, cache, contents, what):
    server.serve("some/thing", **contents)
    message = error_of(find_model_dir, "some/thing")
    assert "'some/thing'" in message and what in message
    assert not (cache / "some/thing/config.json").exists()


@pytest.mark.parametrize("status", [401, 403])
def test_a_repository_that_the_hub_hides_is_said_to_be_missing_or_private(server, cache, status):
    """The hub answers 401 for a repository that doesn't exist, and 403 for one that wants an agreement."""
    for file in ("model.safetensors", "pytorch_model.bin", "config.json"):
        server.answers[f"/some/thing/resolve/main/{file}"] = status
    message = error_of(find_model_dir, "some/thing")
    assert "check the network" not in message and len(server.asked) <= 2


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../x",
        "a/../b",
        "../../a/b",
        "a/..",
        "/etc/nowhere",
        "/a",
        "a/b/c",
        "a\\b",
        "..\\x",
        "C:\\models",
        "https://huggingface.co/a/b",
        "a/b?x=1",
        "a/b#x",
        "a/b%2f..",
        "a/b\n",
        "a b/c",
        "a/.b",
        ".a/b",
        "a//b",
        "a/",
        "a..b/c",
        "a/b..",
        "é/b",
        "~/x",
        "gpt3",
        "gpt2 ",
        "no-such-run",
        "x" * 200,
        "a\0b",
    ],
)
def test_a_name_that_is_neither_a_directory_nor_a_hub_id_is_one_line(
    server, cache, tmp_path, monkeypatch, name
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    message = error_of(find_model_dir, name)
    assert "gpt2-xl" in message and "owner/name" in message
    assert server.asked == [] and files_below(tmp_path) == []


def test_a_mistyped_path_that_looks_like_a_hub_id_is_said_to_be_no_directory_either(server, cache):
    assert "directory" in error_of(find_model_dir, "out/init-gpt3")


def hub_cache(home, folder, revision="0123abc", **contents):
    snapshot = home / folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (home / folder / "refs").mkdir()
    (home / folder / "refs" / "main").write_text(revision + "\n")
    for name in contents:
        stem, _, ending = name.rpartition("_")
        (snapshot / f"{stem}.{ending}").write_text(contents[name])
    return snapshot


@pytest.mark.parametrize(
    "name, folder",
    [
        ("gpt2", "models--openai-community--gpt2"),
        ("gpt2", "models--gpt2"),
        ("MiniLLM/SFT-gpt2-120M", "models--MiniLLM--SFT-gpt2-120M"),
    ],
)
@pytest.mark.parametrize("weights", ["model_safetensors", "pytorch_model_bin"])
def test_an_existing_hugging_face_cache_is_used_without_a_network(
    server, cache, tmp_path, name, folder, weights
):
    snapshot = hub_cache(tmp_path / "hf" / "hub", folder, config_json="{}", **{weights: "w"})
    (snapshot.parent / "another").mkdir()  # an older revision
    assert find_model_dir(name) == snapshot
    assert server.asked == [] and not cache.exists()


def test_HF_HUB_CACHE_comes_before_HF_HOME(server, cache, tmp_path, monkeypatch):
    hub_cache(tmp_path / "hf" / "hub", "models--a--b", config_json="{}", model_safetensors="w")
    snapshot = hub_cache(
        tmp_path / "elsewhere", "models--a--b", config_json="{}", model_safetensors="w"
    )
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert find_model_dir("a/b") == snapshot and server.asked == []


@pytest.mark.parametrize(
    "contents", [{"config_json": "{}"}, {"model_safetensors": "w"}, {"tokenizer_json": "{}"}]
)
def test_an_incomplete_hugging_face_cache_is_passed_over(server, cache, tmp_path, contents):
    hub_cache(tmp_path / "hf" / "hub", "models--a--b", **contents)
    server.serve("a/b", model_safetensors=b"weights", config_json=b"{}")
    assert find_model_dir("a/b") == cache / "a/b"


# ---- from the network to a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_downloaded_model_is_the_one_that_was_published(server, cache, tmp_path, weights):
    published, tokenizer = tiny_model(talker_config()), tiny_tokenizer()
    model.save(published, tmp_path / "published")
    if weights == "pytorch_model.bin":
        torch.save(
            model.load_file(tmp_path / "published" / "model.safetensors"),
            tmp_path / "published" / weights,
        )
        (tmp_path / "published" / "model.safetensors").unlink()
    for name, text in zip(("vocab.json", "merges.txt"), tokenizer_files(tokenizer)):
        (tmp_path / "published" / name).write_text(text, encoding="utf-8")
    for path in (tmp_path / "published").iterdir():
        server.answers[f"/someone/tiny/resolve/main/{path.name}"] = [
            Cut(path.read_bytes()),
            path.read_bytes(),
        ]  # each is cut off once

    loaded, read_tokenizer = load_model("someone/tiny", torch.device("cpu"))
    text = "Write a response that completes the request, 大きさ."
    ids = read_tokenizer.encode_ordinary(text)
    assert ids == tokenizer.encode_ordinary(text) and read_tokenizer.decode(ids) == text
    with torch.no_grad():
        wanted, got = (m.logits(m(torch.tensor([ids]))) for m in (published, loaded))
    assert torch.equal(wanted, got) and not loaded.training
    assert files_below(cache / "someone/tiny") == files_below(tmp_path / "published")

    asked = len(server.asked)
    load_model("someone/tiny", torch.device("cpu"))
    assert len(server.asked) == asked


def test_a_downloaded_model_without_its_tokenizer_is_one_line(
    server, cache, tmp_path, shared, monkeypatch
):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "gpt2-bpe" / "tiktoken-cache"))
    model.save(tiny_model(), tmp_path / "published")
    for path in (tmp_path / "published").iterdir():
        server.answers[f"/someone/tiny/resolve/main/{path.name}"] = path.read_bytes()
    message = error_of(load_model, "someone/tiny", torch.device("cpu"))
    assert "61" in message and "50257" in message and "vocab.json" in message


def test_a_published_model_that_is_damaged_is_a_checkpoint_error(server, cache):
    server.serve(
        "a/b", model_safetensors=b"no tensors", config_json=json.dumps({"n_layer": 1}).encode()
    )
    with pytest.raises(model.InputError):
        load_model("a/b", torch.device("cpu"))
