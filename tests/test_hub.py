"""Downloads and finding a model by name. The network is a server on loopback."""

import json
import os
import socket
import threading

import pytest
import torch
from helpers import (
    Cut,
    CutChunks,
    error_of,
    files_below,
    talker_config,
    tiny_model,
    tiny_tokenizer,
)

import model
from data import hub
from data.cli import InputError
from data.hub import download, find_model_dir, hub_url
from data.models import load_model
from data.tokenizer import tokenizer_files

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The directory of downloaded models, empty, next to an empty Hugging Face cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path / "torch" / "hub" / "promptkd"


# ---- download ----------------------------------------------------------------------------------

BODY = bytes(range(256)) * 10_000  # 2.5 MB, read in several blocks


def test_a_file_is_downloaded_and_its_directory_created(server, tmp_path):
    server.answers["/file"] = BODY
    assert download(f"{server.url}/file", tmp_path / "new" / "file") is True
    assert (tmp_path / "new" / "file").read_bytes() == BODY
    assert files_below(tmp_path) == ["new/file"] and server.asked == ["/file"]


@pytest.mark.parametrize("first_answer", [Cut(BODY), CutChunks(BODY), 500, 503])
def test_a_transfer_that_breaks_off_is_restarted(server, tmp_path, first_answer):
    server.answers["/file"] = [first_answer, BODY]
    assert download(f"{server.url}/file", tmp_path / "file") is True
    assert (tmp_path / "file").read_bytes() == BODY
    assert files_below(tmp_path) == ["file"] and server.asked == ["/file"] * 2


@pytest.mark.parametrize(
    "answer, problem",
    [
        (Cut(BODY), "cut off after 1,280,000 of 2,560,000 bytes"),
        (CutChunks(BODY), ""),
        (500, "500"),
        (503, "503"),
    ],
)
def test_a_transfer_that_always_fails_is_one_line_and_leaves_no_file(
    server, tmp_path, answer, problem
):
    server.answers["/file"] = answer
    message = error_of(download, f"{server.url}/file", tmp_path / "file")
    assert f"{server.url}/file" in message and problem in message and "HF_ENDPOINT" in message
    assert files_below(tmp_path) == [] and len(server.asked) == 3


def test_a_failed_download_keeps_the_old_file(server, tmp_path):
    (tmp_path / "file").write_text("old")
    server.answers["/file"] = Cut(BODY)
    error_of(download, f"{server.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old" and files_below(tmp_path) == ["file"]


def test_a_missing_file_is_false_without_a_second_attempt(server, tmp_path):
    assert download(f"{server.url}/nothing", tmp_path / "file") is False
    assert files_below(tmp_path) == [] and server.asked == ["/nothing"]


def test_no_server_at_all_is_one_line(tmp_path, monkeypatch):
    delays = []
    monkeypatch.setattr(hub.time, "sleep", delays.append)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as closed:  # bound but not listening
        closed.bind(("127.0.0.1", 0))
        message = error_of(
            download, f"http://127.0.0.1:{closed.getsockname()[1]}/file", tmp_path / "file"
        )
    assert "refused" in message and "network" in message
    assert files_below(tmp_path) == [] and len(delays) == 2 and min(delays) > 0


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
        # The message quotes the server's answer; run_command_line puts it on one line.
        with pytest.raises(InputError, match="download failed"):
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


def test_an_interrupt_leaves_no_partial_file(server, tmp_path, monkeypatch):
    server.answers["/file"] = BODY

    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(f"{server.url}/file", tmp_path / "file")
    assert files_below(tmp_path) == [] and len(server.asked) == 1


def test_urls_are_the_hub_s_or_the_mirror_s(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    url = "https://huggingface.co/openai-community/gpt2/resolve/main/config.json"
    assert hub_url("openai-community/gpt2", "config.json") == url
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror:8080/")
    assert hub_url("a/b", "f") == "http://mirror:8080/a/b/resolve/main/f"


# ---- find_model_dir ----------------------------------------------------------------------------


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


def test_without_safetensors_the_older_format_is_downloaded(server, cache):
    server.serve("a/b", pytorch_model_bin=b"old weights", config_json=b"{}")
    directory = find_model_dir("a/b")
    assert files_below(directory) == ["config.json", "pytorch_model.bin"]
    assert (directory / "pytorch_model.bin").read_bytes() == b"old weights"
    asked = len(server.asked)
    assert find_model_dir("a/b") == directory and len(server.asked) == asked


def test_with_safetensors_the_older_format_is_not_requested(server, cache):
    server.serve(
        "a/b", model_safetensors=b"weights", pytorch_model_bin=b"old weights", config_json=b"{}"
    )
    assert "pytorch_model.bin" not in files_below(find_model_dir("a/b"))
    assert not any("pytorch_model" in path for path in server.asked)


@pytest.mark.parametrize("broken", ["model_safetensors", "vocab_json", "config_json"])
def test_an_interrupted_download_is_completed_the_next_time(server, cache, broken):
    contents = {
        "model_safetensors": b"weights" * 1000,
        "config_json": b"{ }",
        "vocab_json": b"vocab",
        "merges_txt": b"merges",
    }
    server.serve("a/b", **contents | {broken: Cut(contents[broken])})
    error_of(find_model_dir, "a/b")
    assert not (cache / "a/b/config.json").exists()
    complete = {f"a/b/{name.replace('_', '.')}": content for name, content in contents.items()}
    present = files_below(cache)
    assert all((cache / path).read_bytes() == complete[path] for path in present)

    server.serve("a/b", **contents)
    server.asked.clear()
    assert find_model_dir("a/b") == cache / "a/b"
    assert {path: (cache / path).read_bytes() for path in files_below(cache)} == complete
    missing = {path.removeprefix("a/b/") for path in complete if path not in present}
    assert {path.rsplit("/", 1)[-1] for path in server.asked} == missing


@pytest.mark.parametrize(
    "contents, problem",
    [
        ({}, "does not exist"),
        ({"config_json": b"{}"}, "model.safetensors"),
        ({"model_safetensors": b"w"}, "config.json"),
    ],
)
def test_a_repository_without_a_model_is_one_line_with_its_name(server, cache, contents, problem):
    server.serve("some/thing", **contents)
    message = error_of(find_model_dir, "some/thing")
    assert "'some/thing'" in message and problem in message
    assert not (cache / "some/thing/config.json").exists()


@pytest.mark.parametrize("status", [401, 403])
def test_a_repository_that_the_hub_hides_is_reported_as_not_public(server, cache, status):
    """The hub answers 401 for a repository that does not exist, 403 for one behind an agreement."""
    for file in ("model.safetensors", "pytorch_model.bin", "config.json"):
        server.answers[f"/some/thing/resolve/main/{file}"] = status
    message = error_of(find_model_dir, "some/thing")
    assert "it is not public" in message and len(server.asked) == 1


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


def test_a_mistyped_path_that_looks_like_a_hub_id_is_reported_as_no_directory(server, cache):
    assert "no such directory" in error_of(find_model_dir, "out/init-gpt3")


def write_hub_cache(home, folder, **contents):
    """A model in a Hugging Face cache. Returns the directory of its files."""
    revision = "0123abc"
    snapshot = home / folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (home / folder / "refs").mkdir()
    (home / folder / "refs" / "main").write_text(revision + "\n")
    for name, content in contents.items():
        stem, _, suffix = name.rpartition("_")
        (snapshot / f"{stem}.{suffix}").write_text(content)
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
    snapshot = write_hub_cache(tmp_path / "hf" / "hub", folder, config_json="{}", **{weights: "w"})
    (snapshot.parent / "another").mkdir()  # an older revision
    assert find_model_dir(name) == snapshot
    assert server.asked == [] and not cache.exists()


def test_HF_HUB_CACHE_comes_before_HF_HOME(server, cache, tmp_path, monkeypatch):
    write_hub_cache(
        tmp_path / "hf" / "hub", "models--a--b", config_json="{}", model_safetensors="w"
    )
    snapshot = write_hub_cache(
        tmp_path / "elsewhere", "models--a--b", config_json="{}", model_safetensors="w"
    )
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert find_model_dir("a/b") == snapshot and server.asked == []


@pytest.mark.parametrize(
    "contents", [{"config_json": "{}"}, {"model_safetensors": "w"}, {"tokenizer_json": "{}"}]
)
def test_an_incomplete_hugging_face_cache_is_skipped(server, cache, tmp_path, contents):
    write_hub_cache(tmp_path / "hf" / "hub", "models--a--b", **contents)
    server.serve("a/b", model_safetensors=b"weights", config_json=b"{}")
    assert find_model_dir("a/b") == cache / "a/b"


# ---- from the network to a model ---------------------------------------------------------------


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
    # Each file is cut off once.
    for path in (tmp_path / "published").iterdir():
        server.answers[f"/someone/tiny/resolve/main/{path.name}"] = [
            Cut(path.read_bytes()),
            path.read_bytes(),
        ]

    loaded, loaded_tokenizer = load_model("someone/tiny", CPU)
    text = "Write a response that completes the request, 大きさ."
    ids = loaded_tokenizer.encode_ordinary(text)
    assert ids == tokenizer.encode_ordinary(text) and loaded_tokenizer.decode(ids) == text
    with torch.no_grad():
        expected, actual = (m.logits(m(torch.tensor([ids]))) for m in (published, loaded))
    assert torch.equal(expected, actual) and not loaded.training
    assert files_below(cache / "someone/tiny") == files_below(tmp_path / "published")

    asked = len(server.asked)
    load_model("someone/tiny", CPU)
    assert len(server.asked) == asked


def test_a_downloaded_model_without_its_tokenizer_is_one_line(
    server, cache, tmp_path, shared, monkeypatch
):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "gpt2-bpe" / "tiktoken-cache"))
    model.save(tiny_model(), tmp_path / "published")
    for path in (tmp_path / "published").iterdir():
        server.answers[f"/someone/tiny/resolve/main/{path.name}"] = path.read_bytes()
    message = error_of(load_model, "someone/tiny", CPU)
    assert "61" in message and "50257" in message and "vocab.json" in message


def test_a_damaged_published_model_is_one_line(server, cache):
    server.serve(
        "a/b", model_safetensors=b"no tensors", config_json=json.dumps({"n_layer": 1}).encode()
    )
    assert "a/b/config.json" in error_of(load_model, "a/b", CPU)
