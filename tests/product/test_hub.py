"""Downloads, finding a model by name, its files and hashes. The network is a server on loopback."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from http import HTTPStatus

import pytest
import torch
from helpers import (
    TINY,
    Cut,
    CutChunks,
    Redirect,
    Server,
    call_command,
    error_of,
    files_below,
    stored_weights,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    wait_for,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file

from data.models import hub, sampling, transfer
from data.models.checkpoint import save
from data.models.hub import download, file_hash, find_model_dir, hub_url, model_hash, weights_files
from data.models.named import load_model
from data.models.tokenizer import TOKENIZER_FILES, tokenizer_files
from data.process import dist
from data.process.errors import InputError
from data.sets import prepare

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The directory of downloaded models, empty, next to an empty Hugging Face cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
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


@pytest.mark.parametrize("broken", [Cut, CutChunks])
@pytest.mark.parametrize(
    "etags, is_range",
    [
        (['"one"'], True),
        (['"one"', '"two"'], True),  # the server answers with all of it
        (['W/"one"'], False),  # the same meaning, perhaps in other bytes
    ],
)
def test_a_transfer_is_resumed_where_the_etag_is_the_same(
    server, tmp_path, broken, etags, is_range
):
    other = BODY[::-1]
    server.answers["/file"] = [broken(BODY), BODY if len(etags) == 1 else other]
    server.etags["/file"] = list(etags)
    assert download(f"{server.url}/file", tmp_path / "file") is True
    assert (tmp_path / "file").read_bytes() == (BODY if len(etags) == 1 else other)
    assert files_below(tmp_path) == ["file"]
    first, second = server.ranges
    assert first is None and (second is not None) == is_range
    if is_range:  # http.client drops the last part of a chunk that is cut off
        start = int(second.removeprefix("bytes=").removesuffix("-"))
        assert 1_200_000 < start <= 1_280_000 and (broken is CutChunks or start == 1_280_000)


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"two"', "Content-Range": f"bytes 1280000-{len(BODY) - 1}/{len(BODY)}"},
        {"ETag": '"one"', "Content-Range": f"bytes 1280001-{len(BODY) - 1}/{len(BODY)}"},
        {"Content-Range": f"bytes 1280000-{len(BODY) - 1}/{len(BODY)}"},
        {},
    ],
)
def test_a_part_that_does_not_fit_is_never_appended(server, tmp_path, headers):
    server.answers["/file"], server.etags["/file"] = [Cut(BODY), (206, headers), BODY], '"one"'
    assert download(f"{server.url}/file", tmp_path / "file") is True
    assert (tmp_path / "file").read_bytes() == BODY and files_below(tmp_path) == ["file"]
    assert server.ranges == [None, "bytes=1280000-", None]


@pytest.mark.parametrize("share, expected", [(0.5, "bytes=1280000-"), (1, "bytes=2560000-")])
def test_a_transfer_is_resumed_after_its_process_was_killed(
    server, tmp_path, monkeypatch, share, expected
):
    """Also if all of it had arrived."""
    server.answers["/file"], server.etags["/file"] = BODY, '"one"'

    def copy_and_die(response, file, name):
        file.write(response.read(int(share * len(BODY))))
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    process = os.fork()
    if process == 0:
        monkeypatch.setattr(transfer, "_copy", copy_and_die)
        download(f"{server.url}/file", tmp_path / "file")
    assert wait_for([process], timeout=20) == [-signal.SIGKILL]
    assert not (tmp_path / "file").exists()
    assert download(f"{server.url}/file", tmp_path / "file") is True
    assert (tmp_path / "file").read_bytes() == BODY and files_below(tmp_path) == ["file"]
    assert server.ranges == [None, expected]


def test_what_arrived_is_kept_for_the_next_command(server, tmp_path):
    """An attempt with progress counts as the first of three."""
    server.answers["/file"] = [Cut(BODY)] * 4 + [500]
    server.etags["/file"] = '"one"'
    message = error_of(download, f"{server.url}/file", tmp_path / "file")
    assert "(the server answers 500 Internal Server Error)" in message
    assert message.endswith("; the 2,400,000 bytes that arrived are kept for the next attempt")
    assert len(server.asked) == 6
    assert not (tmp_path / "file").exists()
    server.answers["/file"] = BODY
    assert download(f"{server.url}/file", tmp_path / "file") is True
    assert (tmp_path / "file").read_bytes() == BODY and files_below(tmp_path) == ["file"]
    assert server.ranges[-1] == "bytes=2400000-"


def test_two_processes_never_write_to_the_same_file(server, tmp_path):
    server.answers["/file"], server.etags["/file"] = [Cut(BODY), BODY], '"one"'
    with open(tmp_path / ".file.partial", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b"of the other process")
        other.flush()
        assert download(f"{server.url}/file", tmp_path / "file") is True
        assert (tmp_path / ".file.partial").read_bytes() == b"of the other process"
    assert (tmp_path / "file").read_bytes() == BODY
    assert files_below(tmp_path) == [".file.partial", "file"]


def test_without_locks_nothing_is_left_and_an_attempt_is_resumed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "fcntl", None)
    server.answers["/file"], server.etags["/file"] = [Cut(BODY), BODY], '"one"'
    assert download(f"{server.url}/file", tmp_path / "file") is True
    assert (tmp_path / "file").read_bytes() == BODY and files_below(tmp_path) == ["file"]
    assert server.ranges == [None, "bytes=1280000-"]


BUSY = {"Retry-After": "7"}


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    "headers, waits",
    [
        (BUSY, [7]),
        ({"RateLimit": '"resolvers";r=0;t=55'}, [55]),  # the hub's own
        ({"Retry-After": "Fri, 01 Jan 1999 00:00:00 GMT"}, [1]),  # over already
    ],
)
def test_a_server_that_asks_to_wait_is_asked_again_then(
    server, tmp_path, monkeypatch, capsys, status, headers, waits
):
    slept = []
    monkeypatch.setattr(hub.time, "sleep", slept.append)
    server.answers["/file"] = [(status, headers), BODY]
    assert download(f"{server.url}/file", tmp_path / "file") is True
    assert [seconds for seconds in slept if seconds] == waits
    assert f"answers {status} {HTTPStatus(status).phrase}; waiting {waits[0]} s" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("headers, n", [(BUSY, 10), ({"Retry-After": "86400"}, 1)])
def test_a_server_is_not_waited_for_without_end(server, tmp_path, headers, n):
    server.answers["/file"] = (429, headers)
    message = error_of(download, f"{server.url}/file", tmp_path / "file")
    assert "429 Too Many Requests and asks to wait" in message and len(server.asked) == n
    assert files_below(tmp_path) == []


def test_a_certificate_that_is_not_trusted_names_the_variable_and_counts_in_it(
    server, tmp_path, monkeypatch
):
    certificate, key = tmp_path / "network.pem", tmp_path / "key.pem"
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
    server.answers["/file"] = b"content"
    url, path = f"https://{server.url.removeprefix('http://')}/file", tmp_path / "file"
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    problem = "its certificate can't be verified (self-signed certificate)"
    fix = "set SSL_CERT_FILE to the file with the certificates of your network"
    assert error_of(download, url, path) == f"{url}: {problem}; {fix}"
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(certificate))
            assert download(url, path) is True
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(key))
    message = error_of(download, url, path)
    assert message.startswith(f"REQUESTS_CA_BUNDLE={key}: has no certificates that can be read (")


def test_a_failed_download_keeps_the_old_file(server, tmp_path):
    (tmp_path / "file").write_text("old")
    server.answers["/file"] = Cut(BODY)
    error_of(download, f"{server.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old" and files_below(tmp_path) == ["file"]


def test_a_missing_file_is_false_without_a_second_attempt(server, tmp_path):
    assert download(f"{server.url}/nothing", tmp_path / "file") is False
    assert files_below(tmp_path) == [] and server.asked == ["/nothing"]


def test_no_server_at_all_is_one_line(online, tmp_path, monkeypatch):
    delays = []
    monkeypatch.setattr(hub.time, "sleep", delays.append)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as closed:  # bound but not listening
        closed.bind(("127.0.0.1", 0))
        message = error_of(
            download, f"http://127.0.0.1:{closed.getsockname()[1]}/file", tmp_path / "file"
        )
    assert "refused" in message and "network" in message
    assert files_below(tmp_path) == [] and delays == [0, 1, 2]


def test_a_server_that_does_not_speak_http_is_one_line(online, tmp_path, monkeypatch):
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
def test_a_wrong_address_in_HF_ENDPOINT_is_one_line(online, tmp_path, monkeypatch, endpoint):
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "failed" in error_of(download, hub_url("gpt2", "config.json"), tmp_path / "file")
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
    assert {path: (directory / path).read_bytes() for path in files_below(directory)} == {
        "model.safetensors": b"weights",
        "config.json": b"{}",
        "vocab.json": b"vocab",
        "merges.txt": b"merges",
    }
    asked = len(server.asked)
    assert asked == 7 and find_model_dir(name) == directory and len(server.asked) == asked


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
    requested = {path.rsplit("/", 1)[-1] for path in server.asked}
    assert requested - set(TOKENIZER_FILES) == missing - set(TOKENIZER_FILES)
    assert requested >= missing and not requested & {path.removeprefix("a/b/") for path in present}


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


@pytest.mark.parametrize("status", [400, 401, 403])
@pytest.mark.parametrize("token", [None, "hf_secret"])
def test_a_repository_that_the_hub_hides_is_one_line_that_says_what_to_do(
    server, cache, monkeypatch, status, token
):
    """The hub answers 401 for a repository that does not exist, 403 for one behind an agreement."""
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    for file in ("model.safetensors", "pytorch_model.bin", "config.json"):
        server.answers[f"/some/thing/resolve/main/{file}"] = status
    message = error_of(find_model_dir, "some/thing")
    assert f"answers {status}" in message and "'some/thing': no such directory" in message
    fix = "check the name; if it is private or gated, set HF_TOKEN to a token that may read it"
    assert message.endswith(fix) and len(server.asked) == 1 and "secret" not in message


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
        ("openai-community/gpt2", "models--openai-community--gpt2"),
        ("openai-community/gpt2", "models--gpt2"),
        ("MiniLLM/SFT-gpt2-120M", "models--MiniLLM--SFT-gpt2-120M"),
    ],
)
@pytest.mark.parametrize("weights", ["model_safetensors", "pytorch_model_bin"])
@pytest.mark.parametrize("offline", ["0", "1"])
def test_an_existing_hugging_face_cache_is_used_without_a_network(
    server, cache, tmp_path, monkeypatch, name, folder, weights, offline
):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    contents = {"config_json": "{}", "tokenizer_json": "{}", weights: "w"}
    snapshot = write_hub_cache(tmp_path / "hf" / "hub", folder, **contents)
    (snapshot.parent / "another").mkdir()  # an older revision
    assert find_model_dir(name) == snapshot
    assert server.asked == [] and not cache.exists()


WHOLE = {"config_json": "{}", "model_safetensors": "w", "tokenizer_json": "{}"}


@pytest.mark.parametrize("missing", WHOLE)
def test_an_incomplete_hugging_face_cache_is_skipped(server, cache, tmp_path, missing):
    contents = {name: content for name, content in WHOLE.items() if name != missing}
    write_hub_cache(tmp_path / "hf" / "hub", "models--a--b", **contents)
    server.serve("a/b", model_safetensors=b"weights", config_json=b"{}")
    assert find_model_dir("a/b") == cache / "a/b"


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = {"metadata": {}, "weight_map": {"wte": SHARDS[0], "wpe": SHARDS[1], "h": SHARDS[0]}}


@pytest.mark.parametrize("missing", [*SHARDS, "model.safetensors.index.json"])
def test_a_cached_model_in_shards_is_complete_only_with_all_of_them(
    server, cache, tmp_path, missing
):
    contents = {"config_json": "{}", "tokenizer_json": "{}"}
    snapshot = write_hub_cache(tmp_path / "hf" / "hub", "models--a--b", **contents)
    for name in SHARDS:
        (snapshot / name).write_text(name)
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    assert find_model_dir("a/b") == snapshot and server.asked == []
    (snapshot / missing).unlink()
    server.serve("a/b", model_safetensors=b"weights", config_json=b"{}")
    assert find_model_dir("a/b") == cache / "a/b"


@pytest.mark.parametrize(
    "tokenizer, complete",
    [
        (["tokenizer.json"], True),
        (["vocab.json", "merges.txt"], True),
        ([], False),
        (["vocab.json"], False),
        (["tokenizer_config.json"], False),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "a/b"])
def test_a_cached_model_without_its_tokenizer_is_not_complete(
    server, cache, tmp_path, name, tokenizer, complete
):
    """Loading only the model leaves such a snapshot. GPT-2's tokenizer would be the wrong one,
    except for the official models."""
    contents = {"config_json": "{}", "model_safetensors": "w"}
    folder = "models--a--b" if name == "a/b" else "models--openai-community--gpt2"
    snapshot = write_hub_cache(tmp_path / "hf" / "hub", folder, **contents)
    for file in tokenizer:
        (snapshot / file).write_text("{}")
    if complete or name == "gpt2":
        assert find_model_dir(name) == snapshot and server.asked == []
        return
    served = {"model_safetensors": b"w", "config_json": b"{}", "tokenizer_json": b"new"}
    server.serve(name, **served)
    assert (find_model_dir(name) / "tokenizer.json").read_bytes() == b"new"
    assert files_below(cache / name) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_repository_without_a_tokenizer_is_asked_for_it_once(server, cache):
    server.serve("a/b", model_safetensors=b"weights", config_json=b"{}")
    find_model_dir("a/b")
    asked = len(server.asked)
    assert find_model_dir("a/b") == cache / "a/b" and len(server.asked) == asked


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_model_in_shards_is_downloaded(server, cache, suffix):
    name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[suffix]
    shards = [f"{name.split('.')[0]}-0000{n}-of-00002.{suffix}" for n in (1, 2)]
    index = {"weight_map": {"wte.weight": shards[1], "wpe.weight": shards[0], "h": shards[1]}}
    contents = {f"{name}.index.json": json.dumps(index).encode(), "config.json": b"{}"}
    contents |= {shard: shard.encode() for shard in shards}
    for file, content in contents.items():
        server.answers[f"/a/b/resolve/main/{file}"] = content
    server.answers[f"/a/b/resolve/main/{shards[1]}"] = [Cut(b"x" * 100)] * 3 + [b"second"]
    assert shards[1] in error_of(find_model_dir, "a/b")  # interrupted between the shards
    directory = find_model_dir("a/b")
    assert directory == cache / "a/b" and files_below(directory) == sorted(contents)
    expected = [directory / file for file in (f"{name}.index.json", *shards)]
    assert weights_files(directory) == expected and expected[2].read_bytes() == b"second"
    asked = len(server.asked)
    assert find_model_dir("a/b") == directory and len(server.asked) == asked


def test_a_shard_that_the_repository_does_not_have_is_one_line(server, cache):
    server.answers["/a/b/resolve/main/model.safetensors.index.json"] = json.dumps(INDEX).encode()
    message = error_of(find_model_dir, "a/b")
    assert f"{SHARDS[0]} does not exist; check the name" in message


def test_a_place_for_downloads_that_can_t_be_written_to_is_one_line(
    server, cache, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    server.serve("a/b", model_safetensors=b"weights", config_json=b"{}")
    message = error_of(find_model_dir, "a/b")
    assert "Not a directory" in message and "TORCH_HOME" in message


# ---- the folder gpt2 ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["gpt2", "gpt2/best"])
def test_a_model_in_the_folder_gpt2_is_used_and_reported_once(
    tmp_path, monkeypatch, capsys, layout
):
    write_checkpoint(tmp_path / layout)
    monkeypatch.chdir(tmp_path)
    dist.print_once.cache_clear()
    assert [find_model_dir(name) for name in ("gpt2", "gpt2", "./gpt2")] == [hub.Path(layout)] * 3
    assert capsys.readouterr() == (
        "",
        "warning: model 'gpt2': the folder gpt2 here hides the official model; "
        "rename it or give openai-community/gpt2\n",
    )
    dist.print_once.cache_clear()
    monkeypatch.setattr("data.process.dist.rank", lambda: 1)
    assert find_model_dir("gpt2") == hub.Path(layout) and capsys.readouterr().err == ""
    dist.print_once.cache_clear()


def test_a_folder_gpt2_without_a_model_is_one_line(server, cache, tmp_path, monkeypatch):
    (tmp_path / "here" / "gpt2" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert error_of(find_model_dir, "gpt2") == (
        "model 'gpt2': the folder gpt2 here hides the official model; "
        "rename it or give openai-community/gpt2"
    )
    assert server.asked == []
    served = {"model_safetensors": b"w", "config_json": b"{}"}
    server.serve("openai-community/gpt2", **served)
    assert find_model_dir("openai-community/gpt2") == cache / "openai-community/gpt2"


# ---- the files of a model and their hash -------------------------------------------------------


def write_shards(directory, suffix="safetensors"):
    """TINY's weights in two shards with an index."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    weights, names = stored_weights(TINY), [f"{stem}-0000{n}-of-00002.{suffix}" for n in (1, 2)]
    write_checkpoint(directory)
    (directory / "model.safetensors").unlink()
    weight_map = {name: names[i % 2] for i, name in enumerate(weights)}
    for shard in names:
        tensors = {name: weights[name] for name in weights if weight_map[name] == shard}
        write = save_file if suffix == "safetensors" else torch.save
        write(tensors, directory / shard)
    index = directory / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return [index, *(directory / shard for shard in names)]


def test_weights_files_in_transformers_order_of_preference(tmp_path):
    assert weights_files(tmp_path) == []
    sharded = write_shards(tmp_path, "bin")
    assert weights_files(str(tmp_path)) == sharded
    (tmp_path / "pytorch_model.bin").touch()
    assert weights_files(tmp_path) == [tmp_path / "pytorch_model.bin"]
    sharded = write_shards(tmp_path)
    assert weights_files(tmp_path) == sharded
    (tmp_path / "model.safetensors").touch()
    assert weights_files(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "<html>",
        "[]",
        "null",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["x.safetensors"]}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": "/etc/x.safetensors"}}',
        '{"weight_map": {"a": "..\\\\x.safetensors"}}',
        '{"weight_map": {"a": "C:x.safetensors"}}',
        '{"weight_map": {"a": "config.json"}}',
        '{"weight_map": {"a": "x.safetensors\\n"}}',
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    ],
)
def test_a_damaged_index_is_one_line(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json: " in error_of(weights_files, tmp_path)


def test_a_missing_shard_is_one_line(tmp_path):
    index, _, second = write_shards(tmp_path)
    second.unlink()
    expected = f"{second}: no such file, but {index.name} names it; fetch it again"
    assert error_of(weights_files, tmp_path) == expected


def test_file_hash_is_sha256_and_follows_every_change(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(BODY)
    assert file_hash(path) == hashlib.sha256(BODY).hexdigest()
    new = tmp_path / "new"
    new.write_bytes(BODY[::-1])
    os.utime(new, ns=(0, path.stat().st_mtime_ns))  # only its content differs
    new.replace(path)
    assert file_hash(path) == hashlib.sha256(BODY[::-1]).hexdigest()


def test_model_hash_is_of_the_content_not_of_the_place(tmp_path):
    index, *shards = write_shards(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    (tmp_path / "a" / "README.md").write_text("not part of the model")
    expected = model_hash(str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "run" / "best")
    (tmp_path / "run" / "best" / "README.md").unlink()
    assert model_hash(str(tmp_path / "run")) == expected
    hashes = {expected}
    for path in (index, *shards, tmp_path / "a/config.json", tmp_path / "a/tokenizer.json"):
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        hashes.add(model_hash(str(tmp_path / "a")))
        path.write_bytes(content)
    assert len(hashes) == 6 and model_hash(str(tmp_path / "a")) == expected
    (tmp_path / "a" / "vocab.json").write_text("{}")
    assert model_hash(str(tmp_path / "a")) not in hashes


# ---- HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE ---------------------------------------------------


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("value", ["1", "ON", "yes", "True"])
def test_offline_no_request_is_made(server, cache, tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    server.serve("a/b", **{name: content.encode() for name, content in WHOLE.items()})
    server.answers["/file"] = BODY
    message = error_of(find_model_dir, "a/b")
    assert message.startswith(f"model 'a/b': no such directory; the Hugging Face cache {tmp_path}")
    assert f"is not downloaded yet, and {name}={value} forbids that; unset it" in message
    message = error_of(download, f"{server.url}/file", tmp_path / "file")
    assert f"{name}={value} forbids" in message and f"put the file at {tmp_path}/file" in message
    assert server.asked == [] and files_below(tmp_path) == []


@pytest.mark.parametrize(
    "values",
    [
        {"HF_HUB_OFFLINE": "0"},
        {"HF_HUB_OFFLINE": ""},
        {"HF_HUB_OFFLINE": "no"},
        {"TRANSFORMERS_OFFLINE": "off"},
    ],
)
def test_other_values_allow_downloads(server, cache, monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    server.serve("a/b", **{name: content.encode() for name, content in WHOLE.items()})
    assert find_model_dir("a/b") == cache / "a/b"


@pytest.mark.parametrize("missing", WHOLE)
def test_offline_the_missing_part_of_a_cached_model_is_named(
    server, cache, tmp_path, monkeypatch, missing
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    contents = {name: content for name, content in WHOLE.items() if name != missing}
    snapshot = write_hub_cache(tmp_path / "hf" / "hub", "models--a--b", **contents)
    message = error_of(find_model_dir, "a/b")
    assert f"{snapshot} has no {missing.replace('_', '.')}; " in message
    assert "HF_HUB_OFFLINE=1 forbids" in message
    assert server.asked == []


def test_offline_a_downloaded_model_works(server, cache, monkeypatch):
    server.serve("a/b", **{name: content.encode() for name, content in WHOLE.items()})
    find_model_dir("a/b")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.asked.clear()
    assert find_model_dir("a/b") == cache / "a/b" and server.asked == []


def test_offline_a_command_ends_with_one_line(server, cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = call_command(sampling.main, "a/b", "--instruction", "x")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: model 'a/b': ") and "HF_HUB_OFFLINE=1 forbids" in last
    assert server.asked == []


def test_offline_a_data_set_is_one_line(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "vicuna" / "download" / "valid.jsonl"
    message = error_of(prepare.prepare, "vicuna", None, tmp_path / "vicuna")
    assert f"HF_HUB_OFFLINE=1 forbids that; unset it, or put the file at {path}" in message
    assert server.asked == []
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"instruction": "a", "output": "b"}))
    assert "1 test" in prepare.prepare("vicuna", None, tmp_path / "vicuna") and server.asked == []


# ---- the token ---------------------------------------------------------------------------------


@pytest.fixture
def token_file(tmp_path, monkeypatch):
    """The token file of the Hugging Face home, which does not exist yet."""
    monkeypatch.delenv("HF_TOKEN_PATH")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home" / "token"


def sent_tokens(server, tmp_path):
    server.authorizations.clear()
    assert download(f"{server.url}/file", tmp_path / "file")
    return server.authorizations


def test_the_token_is_found_in_the_hub_library_s_order(server, token_file, tmp_path, monkeypatch):
    server.answers["/file"] = BODY
    assert sent_tokens(server, tmp_path) == [None]
    token_file.write_text(" hf_file\r\n")
    assert sent_tokens(server, tmp_path) == ["Bearer hf_file"]
    (tmp_path / "other").write_text("hf_other")
    monkeypatch.setenv("ELSEWHERE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN_PATH", "$ELSEWHERE/other")
    assert sent_tokens(server, tmp_path) == ["Bearer hf_other"]
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_older\n")
    assert sent_tokens(server, tmp_path) == ["Bearer hf_older"]
    monkeypatch.setenv("HF_TOKEN", "\thf_new ")
    assert sent_tokens(server, tmp_path) == ["Bearer hf_new"]
    monkeypatch.setenv("HF_TOKEN", " ")
    assert sent_tokens(server, tmp_path) == ["Bearer hf_older"]


def test_the_token_is_sent_with_every_request_for_a_model(server, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.serve("a/b", **{name: content.encode() for name, content in WHOLE.items()})
    find_model_dir("a/b")
    assert len(server.asked) > 3 and set(server.authorizations) == {"Bearer hf_secret"}


def test_the_token_is_sent_for_a_data_set(server, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    row = json.dumps({"instruction": "a", "output": "b"}).encode()
    server.answers["/datasets/MiniLLM/Vicuna/resolve/main/valid.jsonl"] = row
    prepare.prepare("vicuna", target=tmp_path / "vicuna")
    assert server.authorizations == ["Bearer hf_secret"]


def test_the_token_is_not_sent_to_another_host(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    other = Server()
    server.answers |= {"/file": Redirect(f"{other.url}/elsewhere"), "/back": BODY}
    other.answers["/elsewhere"] = Redirect("/near")
    other.answers["/near"] = Redirect(f"{server.url}/back")
    assert download(f"{server.url}/file", tmp_path / "file")
    assert other.asked == ["/elsewhere", "/near"] and other.authorizations == [None, None]
    # A host that was led back to has not been asked for by the user.
    assert server.asked == ["/file", "/back"] and server.authorizations == [
        "Bearer hf_secret",
        None,
    ]
    assert (tmp_path / "file").read_bytes() == BODY
    other.close()


def test_another_name_of_the_same_host_is_another_host(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    port = server.url.rsplit(":", 1)[1]
    server.answers |= {"/file": Redirect(f"http://localhost:{port}/near"), "/near": BODY}
    assert download(f"{server.url}/file", tmp_path / "file")
    assert server.authorizations == ["Bearer hf_secret", None]


@pytest.mark.parametrize("absolute", [False, True])
def test_the_token_is_sent_again_to_the_same_host(server, tmp_path, monkeypatch, absolute):
    """As for a repository that was renamed."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    target = f"{server.url}/new" if absolute else "/new"
    server.answers |= {"/file": Redirect(target), "/new": BODY}
    assert download(f"{server.url}/file", tmp_path / "file")
    assert server.asked == ["/file", "/new"] and server.authorizations == ["Bearer hf_secret"] * 2


@pytest.mark.parametrize("token", ["hf_sécret", "hf_sec\x7fret", "hf_sec\0ret", "hf_“secret”"])
def test_a_wrong_token_is_one_line_without_the_token(server, cache, token_file, token):
    """The hub answers 401 to an unknown or expired token, even if it is for a public model."""
    token_file.write_text(token, encoding="utf-8")
    server.answers["/openai-community/gpt2/resolve/main/model.safetensors"] = 401
    message = error_of(find_model_dir, "gpt2")
    assert "'gpt2'" in message and "answers 401" in message and "set HF_TOKEN" in message
    assert "hf_s" not in message and server.authorizations[0].startswith("Bearer hf_")


# ---- where the cache is ------------------------------------------------------------------------

CACHE_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
LOCATIONS = [
    {},
    {"XDG_CACHE_HOME": "/x"},
    {"XDG_CACHE_HOME": "~/x"},
    {"XDG_CACHE_HOME": "$BASE/x"},
    {"XDG_CACHE_HOME": ""},
    {"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"},
    {"HF_HOME": "~/h"},
    {"HF_HOME": "$BASE/h"},
    {"HF_HOME": "$NOT_SET/h"},
    {"HF_HOME": ""},
    {"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/h"},
    {"HUGGINGFACE_HUB_CACHE": "~/old"},
    {"HUGGINGFACE_HUB_CACHE": ""},
    {"HF_HUB_CACHE": "/new", "HUGGINGFACE_HUB_CACHE": "/old"},
    {"HF_HUB_CACHE": "~/${BASE}/new"},
    {"HF_HUB_CACHE": "relative"},
    {"HF_HUB_CACHE": "", "HF_HOME": "/h"},
]


def test_the_cache_and_the_token_lie_where_the_hub_library_has_them(monkeypatch):
    pytest.importorskip("huggingface_hub")
    script = """
import json, os, runpy, sys
from importlib.util import find_spec
path = find_spec("huggingface_hub").submodule_search_locations[0] + "/constants.py"
for values in json.load(sys.stdin):
    for name in %r:
        os.environ.pop(name, None)
    os.environ.update(values)
    constants = runpy.run_path(path)
    print(json.dumps([constants["HF_HUB_CACHE"], constants["HF_TOKEN_PATH"]]))
"""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("BASE", "/base")
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    output = subprocess.run(
        [sys.executable, "-c", script % (CACHE_VARIABLES,)],
        input=json.dumps(LOCATIONS),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for values, line in zip(LOCATIONS, output.splitlines(), strict=True):
        with monkeypatch.context() as patch:
            for name in CACHE_VARIABLES:
                patch.delenv(name, raising=False)
            for name, value in values.items():
                patch.setenv(name, value)
            cache, token = json.loads(line)
            assert hub.hub_path("hub") == hub.Path(cache), values
            assert hub.hub_path("token") == hub.Path(token), values


@pytest.mark.parametrize("name", CACHE_VARIABLES)
@pytest.mark.parametrize("form", ["{base}/x", "~/x", "$BASE/x"])
def test_an_existing_cache_is_found_by_each_variable(
    server, cache, tmp_path, monkeypatch, name, form
):
    for variable in CACHE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BASE", str(tmp_path))
    monkeypatch.setenv(name, form.format(base=tmp_path))
    below = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}.get(name, "")
    snapshot = write_hub_cache(tmp_path / "x" / below, "models--a--b", **WHOLE)
    assert find_model_dir("a/b") == snapshot and server.asked == []


# ---- from the network to a model ---------------------------------------------------------------


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_downloaded_model_is_the_one_that_was_published(server, cache, tmp_path, weights):
    published, tokenizer = tiny_model(talker_config()), tiny_tokenizer()
    save(published, tmp_path / "published")
    if weights == "pytorch_model.bin":
        torch.save(
            load_file(tmp_path / "published" / "model.safetensors"),
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


@pytest.mark.parametrize("place", ["hub", "cache"])
def test_a_model_that_transformers_saved_in_shards_is_the_same(
    server, cache, tmp_path, monkeypatch, place
):
    """Its tokenizer is tokenizer.json alone, as transformers 5 saves it."""
    transformers = pytest.importorskip("transformers")
    expected, tokenizer = tiny_model(talker_config()), tiny_tokenizer()
    save(expected, tmp_path / "ours")
    for name, text in zip(("vocab.json", "merges.txt"), tokenizer_files(tokenizer)):
        (tmp_path / "ours" / name).write_text(text, encoding="utf-8")
    snapshot = write_hub_cache(tmp_path / "hf" / "hub", "models--someone--tiny")
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    hf.save_pretrained(snapshot, max_shard_size="60KB")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(snapshot)
    files = {path.name for path in snapshot.iterdir()}
    if "vocab.json" in files:
        pytest.skip("this is not transformers 5")
    assert "model.safetensors" not in files and len(weights_files(snapshot)) > 3
    if place == "hub":
        for path in snapshot.iterdir():
            server.answers[f"/someone/tiny/resolve/main/{path.name}"] = path.read_bytes()
        shutil.rmtree(tmp_path / "hf" / "hub")
    loaded, loaded_tokenizer = load_model("someone/tiny", CPU)
    assert cache.exists() == (place == "hub") == bool(server.asked)
    assert tokenizer_files(loaded_tokenizer) == tokenizer_files(tokenizer)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_downloaded_model_without_its_tokenizer_is_one_line(
    server, cache, tmp_path, shared, monkeypatch
):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "gpt2-bpe" / "tiktoken-cache"))
    save(tiny_model(), tmp_path / "published")
    for path in (tmp_path / "published").iterdir():
        server.answers[f"/someone/tiny/resolve/main/{path.name}"] = path.read_bytes()
    message = error_of(load_model, "someone/tiny", CPU)
    assert "61" in message and "50257" in message and "vocab.json" in message
