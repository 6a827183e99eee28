"""Preparing the public data sets, from files and from a local server in place of the hub."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    Cut,
    Short,
    error_of,
    files_below,
    talker_config,
    tiny_tokenizer,
    write_checkpoint,
    write_rows,
)

from data.process.dist import print_once
from data.runs.paper import PAPER_SETS
from data.sets import prepare as prepare_module
from data.sets.prepare import (
    NAMED_SETS,
    PUBLIC_SETS,
    PublicSet,
    find_data_dir,
    find_local_data,
    main,
    prepare,
)
from data.sets.rows import read_rows

SPLITS = ["dev.jsonl", "test.jsonl", "train.jsonl"]
PAPER = "11,435 train, 1,000 dev, 500 test"

# A test set's name on the hub, and the directory of its file there.
TEST_SETS = {
    "self_inst": ("self-inst", ""),
    "vicuna": ("Vicuna", ""),
    "sinst": ("sinst", "11_/"),
    "uinst": ("uinst", "11_/"),
}


def objects(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def fields(rows):
    return [(row["instruction"], row.get("input") or "", row["output"]) for row in rows]


def instructions(path):
    return [row["instruction"] for row in objects(path)]


def small_rows(n, name="row"):
    return [
        {"instruction": f"{name} {i}", "prompt": "unused", "input": "", "output": f"answer {i}"}
        for i in range(n)
    ]


def encode_rows(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def dolly(shared):
    return shared / "data" / "dolly"


@pytest.fixture(scope="module")
def raw_release(shared):
    return shared / "data" / "raw" / "databricks-dolly-15k.jsonl"


@pytest.fixture(scope="module")
def minillm_dir(dolly, tmp_path_factory):
    """MiniLLM's layout with the same rows: the first 1,000 of raw.jsonl are dev."""
    directory = tmp_path_factory.mktemp("minillm")
    train_and_dev = [(dolly / f"{split}.jsonl").read_bytes() for split in ("dev", "train")]
    (directory / "raw.jsonl").write_bytes(b"".join(train_and_dev))
    shutil.copy(dolly / "valid.jsonl", directory / "valid.jsonl")
    return directory


@pytest.fixture(scope="module")
def prepared_dolly(dolly, tmp_path_factory):
    """Dolly as it must be prepared: {file: content}."""
    directory = tmp_path_factory.mktemp("prepared")
    message = prepare("dolly", dolly, directory)
    assert PAPER in message and "NOT" not in message and "paper's" not in message
    return {file: (directory / file).read_bytes() for file in files_below(directory)}


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """The directory of prepared sets, which does not exist yet."""
    monkeypatch.setattr(prepare_module, "DATA_DIR", tmp_path / "data")
    return tmp_path / "data"


# ---- from files --------------------------------------------------------------------------------


def test_dolly_has_the_paper_s_rows_and_minillm_s_valid_as_test(dolly, prepared_dolly, tmp_path):
    assert sorted(prepared_dolly) == SPLITS
    published = {"train": ("train", 11435), "dev": ("dev", 1000), "test": ("valid", 500)}
    for split, (file, count) in published.items():
        path = tmp_path / f"{split}.jsonl"
        path.write_bytes(prepared_dolly[path.name])
        rows = objects(path)
        assert len(rows) == len(read_rows(path)) == count
        assert fields(rows) == fields(objects(dolly / f"{file}.jsonl"))
        assert set(rows[0]) == {"instruction", "input", "output"}


@pytest.mark.parametrize("layout", ["the directory above", "MiniLLM's files"])
def test_dolly_is_the_same_in_other_layouts(dolly, minillm_dir, prepared_dolly, tmp_path, layout):
    source = dolly.parent if layout == "the directory above" else minillm_dir
    message = prepare("dolly", source, tmp_path)
    assert PAPER in message and "NOT" not in message and "paper's" not in message
    assert {file: (tmp_path / file).read_bytes() for file in files_below(tmp_path)} == (
        prepared_dolly
    )


def test_ready_splits_take_precedence_over_a_raw_file(tmp_path):
    for name, count in [("train", 3), ("dev", 2), ("valid", 1), ("raw", 1005)]:
        write_rows(tmp_path / "in" / f"{name}.jsonl", small_rows(count, name))
    assert "3 train, 2 dev, 1 test" in prepare("dolly", tmp_path / "in", tmp_path / "out")
    assert instructions(tmp_path / "out" / "train.jsonl")[0] == "train 0"


def test_wrong_count_is_reported(tmp_path):
    for name, count in [("train", 3), ("dev", 2), ("valid", 1)]:
        write_rows(tmp_path / "in" / f"{name}.jsonl", small_rows(count, name))
    message = prepare("dolly", tmp_path / "in", tmp_path / "out")
    assert message.endswith(f"3 train, 2 dev, 1 test rows; the paper's experiments have {PAPER}")


def test_raw_release_is_split_at_random_and_called_not_the_paper_s(raw_release, tmp_path):
    message = prepare("dolly", raw_release.parent, tmp_path)
    assert "13,511 train, 1,000 dev, 500 test" in message and "NOT the paper's split" in message
    published = [
        tuple(row[f] for f in ("instruction", "context", "response"))
        for row in objects(raw_release)
    ]
    splits = [fields(objects(tmp_path / name)) for name in SPLITS]
    # Every row is in one split.
    assert len(published) == 15011
    assert Counter(sum(splits, [])) == Counter(published)
    # Each split is drawn from the whole file.
    position = {row: i / len(published) for i, row in enumerate(published)}
    for split in splits:
        assert abs(sum(position[row] for row in split) / len(split) - 0.5) < 0.06


@pytest.fixture
def small_raw_release(tmp_path):
    rows = [
        {"instruction": f"row {i}", "context": "", "response": "b", "category": "open_qa"}
        for i in range(1600)
    ]
    return write_rows(tmp_path / "in" / "raw" / "databricks-dolly-15k.jsonl", rows)


def test_raw_release_is_found_in_its_directory_and_split_the_same(small_raw_release, tmp_path):
    for name, source in [("a", small_raw_release.parent), ("b", small_raw_release.parent.parent)]:
        assert "NOT the paper's split" in prepare("dolly", source, tmp_path / name)
    for name in SPLITS:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("name, file", [("dolly", "valid.jsonl"), ("sinst", "11_/valid.jsonl")])
def test_all_references_of_a_row_are_kept(tmp_path, name, file):
    rows = [
        {"instruction": "a", "output": ["one", "two", "one"]},
        {"instruction": "b", "input": None, "output": ["one"]},
        {"instruction": "c", "input": "d", "output": "one"},
        {"instruction": "d", "output": ""},
    ]
    write_rows(tmp_path / "in" / file, rows)
    if name == "dolly":
        write_rows(tmp_path / "in" / "raw.jsonl", small_rows(1001))
    prepare(name, tmp_path / "in", tmp_path / "out")
    assert fields(objects(tmp_path / "out" / "test.jsonl")) == [
        ("a", "", ["one", "two", "one"]),
        ("b", "", "one"),
        ("c", "d", "one"),
        ("d", "", ""),
    ]
    references = [row.references for row in read_rows(tmp_path / "out" / "test.jsonl")]
    assert references == [("one", "two", "one"), ("one",), ("one",), ("",)]


def test_unusual_characters_are_kept(tmp_path):
    texts = [
        "大きさ 👍🏽",
        "a\u2028b\x85c",
        'tab\t"quote" \\ back',
        "\r\n",
        "half \ud83d a pair",
        "\0",
    ]
    rows = [{"instruction": text, "input": text, "output": text} for text in texts]
    write_rows(tmp_path / "in" / "valid.jsonl", rows)
    prepare("vicuna", tmp_path / "in", tmp_path / "out")
    prepared = read_rows(tmp_path / "out" / "test.jsonl")
    assert [(row.instruction, row.input, row.references) for row in prepared] == [
        (text, text, (text,)) for text in texts
    ]


@pytest.mark.parametrize("count", [1, 1000])
def test_raw_file_that_leaves_no_training_rows_is_an_error(tmp_path, count):
    write_rows(tmp_path / "in" / "valid.jsonl", small_rows(3))
    write_rows(tmp_path / "in" / "raw.jsonl", small_rows(count))
    message = error_of(prepare, "dolly", tmp_path / "in", tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'in'}: leaves no rows for train")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["train", "dev", "valid"])
def test_malformed_row_leaves_the_old_set(tmp_path, name):
    splits = ("train", "dev", "valid")
    for split in splits:
        write_rows(tmp_path / "in" / f"{split}.jsonl", small_rows(3, split))
    prepare("dolly", tmp_path / "in", tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for split in splits:
        bad = [{"instruction": 5}] if split == name else []
        write_rows(tmp_path / "in" / f"{split}.jsonl", small_rows(5, split) + bad)
    message = error_of(prepare, "dolly", tmp_path / "in", tmp_path / "out")
    assert f"{name}.jsonl, line 6: 'instruction'" in message
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


# ---- the sets for testing only -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name, directory, count", [("self_inst", "self-inst", 242), ("vicuna", "vicuna", 80)]
)
@pytest.mark.parametrize("source", ["its directory", "the directory above"])
def test_published_sets_have_the_paper_s_rows(shared, tmp_path, name, directory, count, source):
    path = shared / "data" / directory
    message = prepare(name, path if source == "its directory" else path.parent, tmp_path)
    assert message == f"{tmp_path}: {count} test rows"
    assert files_below(tmp_path) == ["test.jsonl"]
    rows = objects(tmp_path / "test.jsonl")
    assert fields(rows) == fields(objects(path / "valid.jsonl"))
    assert len(rows) == len(read_rows(tmp_path / "test.jsonl")) == count


@pytest.mark.parametrize("name", TEST_SETS)
@pytest.mark.parametrize("file", ["valid.jsonl", "test.jsonl"])
@pytest.mark.parametrize(
    "layout",
    ["its directory", "our name", "the hub's name", "the hub's tree", "the hub's directory"],
)
def test_test_set_is_found_in_every_layout(tmp_path, name, file, layout):
    hub_name, hub_dir = TEST_SETS[name]
    directory = {
        "its directory": "",
        "our name": f"{name}/",
        "the hub's name": f"{hub_name}/",
        "the hub's tree": f"{hub_name}/{hub_dir}",
        "the hub's directory": hub_dir,
    }[layout]
    write_rows(tmp_path / "in" / f"{directory}{file}", small_rows(3, "right"))
    message = prepare(name, tmp_path / "in", tmp_path / "out")
    expected = f"the paper's experiments have {PUBLIC_SETS[name].paper_rows['test']:,} test"
    assert message == f"{tmp_path / 'out'}: 3 test rows; {expected}"
    assert files_below(tmp_path / "out") == ["test.jsonl"]
    assert instructions(tmp_path / "out" / "test.jsonl") == ["right 0", "right 1", "right 2"]


@pytest.mark.parametrize(
    "name, directory",
    [
        ("self_inst", "self-inst"),
        ("vicuna", "vicuna"),
        ("sinst", "sinst/11_"),
        ("uinst", "uinst/11_"),
    ],
)
def test_directory_of_a_set_takes_precedence_over_a_file_of_perhaps_another(
    tmp_path, name, directory
):
    write_rows(tmp_path / "in" / "valid.jsonl", small_rows(1, "another"))
    write_rows(tmp_path / "in" / directory / "valid.jsonl", small_rows(1, name))
    prepare(name, tmp_path / "in", tmp_path / "out")
    assert instructions(tmp_path / "out" / "test.jsonl") == [f"{name} 0"]


@pytest.mark.parametrize("name", ["sinst", "uinst"])
def test_long_references_take_precedence(tmp_path, name):
    for directory, kind in [("", "all"), ("0_2", "short"), ("11_", "long")]:
        write_rows(tmp_path / "in" / name / directory / "valid.jsonl", small_rows(1, kind))
    prepare(name, tmp_path / "in", tmp_path / "out")
    assert instructions(tmp_path / "out" / "test.jsonl") == ["long 0"]


@pytest.mark.parametrize("name", TEST_SETS)
@pytest.mark.parametrize("other_file", ["train.jsonl", "raw.jsonl"])
def test_dolly_s_directory_is_not_taken_for_another_set(tmp_path, name, other_file):
    for file in ("valid.jsonl", other_file):
        write_rows(tmp_path / "in" / file, small_rows(3))
    message = error_of(prepare, name, tmp_path / "in", tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'in'}: has no ") and name in message
    assert not (tmp_path / "out").exists()


def test_uinst_is_the_first_10_000_of_minillm_s_23_916_rows(tmp_path):
    write_rows(tmp_path / "in" / "valid.jsonl", small_rows(23_916))
    message = prepare("uinst", tmp_path / "in", tmp_path / "out")
    assert message == f"{tmp_path / 'out'}: 10,000 test rows, the first of 23,916"
    expected = [f"row {i}" for i in range(10_000)]
    assert instructions(tmp_path / "out" / "test.jsonl") == expected


@pytest.mark.parametrize(
    "count, expected",
    [
        (24, "10 test rows, the first of 24"),
        (11, "10 test rows, the first of 11"),
        (10, "10 test rows"),
        (9, "9 test rows; the paper's experiments have 10 test"),
    ],
)
def test_uinst_file_of_another_length_is_reported(tmp_path, monkeypatch, count, expected):
    small = replace(PUBLIC_SETS["uinst"], paper_rows={"test": 10})
    monkeypatch.setitem(PUBLIC_SETS, "uinst", small)
    write_rows(tmp_path / "in" / "valid.jsonl", small_rows(count))
    assert prepare("uinst", tmp_path / "in", tmp_path / "out") == f"{tmp_path / 'out'}: {expected}"
    rows = instructions(tmp_path / "out" / "test.jsonl")
    assert rows == [f"row {i}" for i in range(min(count, 10))]


@pytest.mark.parametrize("name, count", [("self_inst", 242), ("vicuna", 80), ("sinst", 1_694)])
def test_other_sets_are_never_cut(tmp_path, name, count):
    path = write_rows(tmp_path / "in" / name / "valid.jsonl", small_rows(count + 1))
    message = prepare(name, tmp_path / "in", tmp_path / "out")
    assert f"{count + 1:,} test rows; the paper's experiments have {count:,} test" in message
    assert len(objects(tmp_path / "out" / "test.jsonl")) == count + 1
    write_rows(path, small_rows(count))
    assert prepare(name, tmp_path / "in", tmp_path / "out").endswith(f": {count:,} test rows")


@pytest.mark.parametrize("name", TEST_SETS)
def test_source_without_the_set_is_an_error(tmp_path, name):
    for source in (tmp_path / "none", write_rows(tmp_path / "file", small_rows(1)), tmp_path):
        message = error_of(prepare, name, source, tmp_path / "out")
        assert message.startswith(f"{source}: has no {TEST_SETS[name][1]}valid.jsonl")
        assert name in message
    assert files_below(tmp_path) == ["file"]


def test_malformed_row_of_a_test_set_leaves_the_old_file(tmp_path):
    path = write_rows(tmp_path / "in" / "valid.jsonl", small_rows(3, "old"))
    prepare("vicuna", tmp_path / "in", tmp_path / "out")
    write_rows(path, [*small_rows(3, "new"), {"instruction": "x", "output": []}])
    message = error_of(prepare, "vicuna", tmp_path / "in", tmp_path / "out")
    assert message.startswith(f"{path}, line 4: 'output'")
    assert path.is_file()
    assert instructions(tmp_path / "out" / "test.jsonl") == ["old 0", "old 1", "old 2"]


# ---- from the network --------------------------------------------------------------------------

HUB = "/datasets/MiniLLM/dolly/resolve/main/"  # data sets are under datasets/ on the hub
VICUNA = "/datasets/MiniLLM/Vicuna/resolve/main/valid.jsonl"


def serve_dolly(server, raw=None, valid=None):
    """Serve MiniLLM's two files, by default small ones. Returns the server's answers."""
    server.answers = {
        HUB + "raw.jsonl": raw or encode_rows(small_rows(1003, "raw")),
        HUB + "valid.jsonl": valid or encode_rows(small_rows(2, "valid")),
    }
    return server.answers


@pytest.fixture(params=TEST_SETS)
def test_set(request):
    """A test set's name, its path on the hub, and the path of the download in its directory."""
    hub_name, hub_dir = TEST_SETS[request.param]
    path = f"/datasets/MiniLLM/{hub_name}/resolve/main/{hub_dir}valid.jsonl"
    return request.param, path, f"download/{hub_dir}valid.jsonl"


def test_dolly_from_the_network_has_the_paper_s_rows(server, minillm_dir, prepared_dolly, tmp_path):
    serve_dolly(
        server, *((minillm_dir / f"{name}.jsonl").read_bytes() for name in ("raw", "valid"))
    )
    assert PAPER in prepare("dolly", target=tmp_path)
    assert {file: (tmp_path / file).read_bytes() for file in SPLITS} == prepared_dolly
    assert sorted(server.asked) == [HUB + "raw.jsonl", HUB + "valid.jsonl"]


def test_downloaded_file_is_not_downloaded_again(server, tmp_path):
    serve_dolly(server)
    message = prepare("dolly", target=tmp_path)
    assert "3 train, 1,000 dev, 2 test" in message
    assert f"paper's experiments have {PAPER}" in message
    assert prepare("dolly", target=tmp_path) == message
    assert len(server.asked) == 2


@pytest.mark.parametrize("file", ["raw.jsonl", "valid.jsonl"])
def test_broken_download_is_an_error_and_is_resumed_the_next_time(server, tmp_path, file):
    answers = serve_dolly(server)
    content = answers[HUB + file]
    answers[HUB + file] = Cut(content)
    message = error_of(prepare, "dolly", None, tmp_path)
    assert file in message and "cut off" in message
    assert files_below(tmp_path) == ([] if file == "raw.jsonl" else ["download/raw.jsonl"])

    answers[HUB + file] = [Cut(content), content]
    server.asked.clear()
    assert "3 train" in prepare("dolly", target=tmp_path)
    assert server.asked.count(HUB + "raw.jsonl") == (2 if file == "raw.jsonl" else 0)
    assert not any(name.endswith(".partial") for name in files_below(tmp_path))


@pytest.mark.parametrize("file", ["raw.jsonl", "valid.jsonl"])
@pytest.mark.parametrize("status, problem", [(404, "does not exist"), (500, "500")])
def test_file_that_the_hub_does_not_send_is_an_error(server, tmp_path, file, status, problem):
    serve_dolly(server)[HUB + file] = status
    message = error_of(prepare, "dolly", None, tmp_path)
    assert f"{server.url}{HUB}{file}" in message and problem in message
    assert set(files_below(tmp_path)) <= {"download/raw.jsonl"}


def test_web_page_in_place_of_the_data_is_an_error(server, tmp_path):
    serve_dolly(server, raw=b"<html>\n<body>Please log in.</body>\n")
    assert "raw.jsonl, line 1: is not JSON" in error_of(prepare, "dolly", None, tmp_path)
    assert files_below(tmp_path) == []  # the page is not read again the next time


def test_test_set_is_downloaded_once(server, tmp_path, test_set):
    name, path, download = test_set
    rows = small_rows(PUBLIC_SETS[name].paper_rows["test"])
    server.answers[path] = encode_rows(rows)
    assert prepare(name, target=tmp_path).endswith(f": {len(rows):,} test rows")
    assert files_below(tmp_path) == [download, "test.jsonl"]
    (tmp_path / "test.jsonl").unlink()
    prepare(name, target=tmp_path)
    assert server.asked == [path]
    assert fields(objects(tmp_path / "test.jsonl")) == fields(rows)


@pytest.mark.parametrize(
    "answer, problem",
    [
        (Cut(encode_rows(small_rows(100))), "cut off"),
        (404, "does not exist"),
        (503, "503"),
        (403, "403"),
    ],
    ids=["cut off", "404", "503", "403"],
)
def test_failed_download_of_a_test_set_is_an_error_and_leaves_no_file(
    server, tmp_path, test_set, answer, problem
):
    name, path, _ = test_set
    server.answers[path] = answer
    message = error_of(prepare, name, None, tmp_path)
    assert f"{server.url}{path}" in message and problem in message
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("name, path", [("vicuna", VICUNA), ("dolly", HUB + "valid.jsonl")])
def test_download_of_the_wrong_size_is_an_error_and_is_not_kept(server, tmp_path, name, path):
    cut_in_a_row = Short(encode_rows([{"instruction": "x" * 50, "output": "y"}]))
    serve_dolly(server)[path] = [cut_in_a_row, encode_rows(small_rows(3))]
    message = error_of(prepare, name, None, tmp_path)
    assert "valid.jsonl, line 1: is not JSON" in message and "try again" in message
    assert files_below(tmp_path) == []
    assert "3 test" in prepare(name, target=tmp_path)


# ---- the directory of a set --------------------------------------------------------------------


def test_directory_is_found_as_it_is(tmp_path, server):
    assert find_data_dir(str(tmp_path)) == tmp_path
    assert server.asked == []


@pytest.mark.parametrize("name", NAMED_SETS)
def test_our_set_is_taken_and_not_a_folder_of_its_name_and_this_is_said(
    data_dir, tmp_path, monkeypatch, capsys, name
):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    print_once.cache_clear()
    assert find_local_data(name) == (data_dir / name, False)
    problem = f"the set of this project is taken, not the folder {name} here"
    expected = f"warning: data {name!r}: {problem}; for the folder give ./{name}\n"
    assert capsys.readouterr().err == expected
    assert find_local_data(f"./{name}") == (Path(name), True)
    (data_dir / name).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(data_dir)
    find_local_data(name)  # it is the same folder
    assert capsys.readouterr().err == ""


def test_public_set_is_prepared_once(server, data_dir, capsys):
    serve_dolly(server)
    assert find_data_dir("dolly") == data_dir / "dolly"
    downloads = ["download/raw.jsonl", "download/valid.jsonl"]
    assert files_below(data_dir / "dolly") == sorted([*SPLITS, *downloads])
    assert "3 train, 1,000 dev, 2 test" in capsys.readouterr().out
    assert find_data_dir("dolly") == data_dir / "dolly"
    assert len(server.asked) == 2
    assert capsys.readouterr().out == ""


def test_test_set_is_prepared_once_and_needs_its_test_rows_only(server, data_dir, capsys):
    server.answers[VICUNA] = encode_rows(small_rows(80))
    for _ in range(2):
        assert find_data_dir("vicuna") == data_dir / "vicuna"
    assert files_below(data_dir) == ["vicuna/download/valid.jsonl", "vicuna/test.jsonl"]
    assert len(server.asked) == 1
    assert capsys.readouterr().out == f"{data_dir / 'vicuna'}: 80 test rows\n"


def test_set_that_lacks_a_split_is_prepared_again(server, data_dir):
    serve_dolly(server)
    find_data_dir("dolly")
    for name in SPLITS:
        content = (data_dir / "dolly" / name).read_bytes()
        (data_dir / "dolly" / name).unlink()
        find_data_dir("dolly")
        assert (data_dir / "dolly" / name).read_bytes() == content


def test_training_rows_are_written_last(data_dir, tmp_path, monkeypatch):
    """So a set is complete if it has them."""
    written = []

    def write_atomic(path, content):
        written.append(path.name)

    monkeypatch.setattr(prepare_module, "write_atomic", write_atomic)
    for name in ("train", "dev", "valid"):
        write_rows(tmp_path / "in" / f"{name}.jsonl", small_rows(3, name))
    prepare("dolly", tmp_path / "in")
    assert sorted(written) == SPLITS
    assert written[-1] == "train.jsonl"


def test_demo_is_written_once_and_again_for_another_version(data_dir, monkeypatch):
    demo, version = data_dir / "demo", prepare_module.demo.VERSION
    written = []

    def data_files():
        written.append(version)
        return {"test.jsonl": "{}\n", "longer/test.jsonl": "[]\n"}

    monkeypatch.setattr(prepare_module.demo, "data_files", data_files)
    for _ in range(2):
        assert find_data_dir("demo") == demo
    assert len(written) == 1
    assert (demo / "longer" / "test.jsonl").read_text() == "[]\n"
    monkeypatch.setattr(prepare_module.demo, "pretraining_text", lambda: "text\n")
    prepare_module.write_pretraining_text(demo)
    assert (demo / "pretrain.jsonl").read_text() == "text\n"
    # A demo of before: without the version's file, with the text next to the sets.
    (demo / "version.txt").unlink()
    find_data_dir("demo")
    assert len(written) == 2
    assert not (demo / "pretrain.jsonl").exists()


def test_pretraining_text_is_written_once(data_dir, monkeypatch):
    monkeypatch.setattr(prepare_module.demo, "pretraining_text", iter(["text\n"]).__next__)
    for _ in range(2):
        prepare_module.write_pretraining_text(data_dir)
    assert (data_dir / "pretrain.jsonl").read_text() == "text\n"


# ---- elsewhere than in data/ -------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, place",
    [
        ("HERE/sets", "sets"),
        ("~/sets", "home/sets"),
        ("$SCRATCH/sets", "scratch/sets"),
        ("${SCRATCH}/my sets", "scratch/my sets"),
        ("relative", "now/relative"),
        ("", "data"),
    ],
)
def test_variable_names_the_directory_of_prepared_sets(
    data_dir, tmp_path, monkeypatch, server, capsys, value, place
):
    (tmp_path / "now").mkdir()
    monkeypatch.chdir(tmp_path / "now")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("PROMPTKD_DATA_DIR", value.replace("HERE", str(tmp_path)))
    server.answers[VICUNA] = encode_rows(small_rows(80))
    found = find_data_dir("vicuna")
    assert found.resolve() == tmp_path / place / "vicuna"
    assert files_below(tmp_path) == [
        f"{place}/vicuna/{name}" for name in ("download/valid.jsonl", "test.jsonl")
    ]
    capsys.readouterr()
    main(["vicuna", "--source", str(found / "download")])
    assert capsys.readouterr().out == f"{found}: 80 test rows\n"
    monkeypatch.delenv("PROMPTKD_DATA_DIR")
    assert find_data_dir(str(tmp_path)) == tmp_path


def test_set_directory_that_can_not_be_written_is_an_error_with_the_way_out(
    data_dir, tmp_path, server, monkeypatch
):
    server.answers[VICUNA] = encode_rows(small_rows(80))
    write_rows(tmp_path / "in" / "valid.jsonl", small_rows(3))
    for name in ("demo", "vicuna"):
        (data_dir / name).parent.mkdir(exist_ok=True)
        (data_dir / name).write_text("a file in its place")
    messages = [error_of(find_data_dir, name) for name in ("demo", "vicuna")]
    messages.append(error_of(main, ["vicuna", "--source", str(tmp_path / "in")]))
    for message, name in zip(messages, ("demo", "vicuna", "vicuna")):
        assert message.startswith(f"data {data_dir / name}: ") and "is not a writable" in message
        assert message.endswith("set the variable PROMPTKD_DATA_DIR to a writable directory")


@pytest.fixture
def checkout(tmp_path):
    """A copy of the project, with one prepared set."""
    shutil.copytree(ROOT / "data", tmp_path / "checkout" / "data")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path / "checkout")
    for name in ("demo", *PUBLIC_SETS):
        shutil.rmtree(tmp_path / "checkout" / "data" / name, ignore_errors=True)
    write_rows(tmp_path / "checkout" / "data" / "vicuna" / "test.jsonl", small_rows(3))
    return tmp_path / "checkout"


def read_only(directory, command):
    """A command in whose view a directory is read-only, also for root."""
    if os.geteuid():
        for path in (directory, *directory.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
        return command
    if not shutil.which("unshare"):
        pytest.skip("root may write everywhere")
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", mount, str(directory), *command]


# Commands one after another, each with its exit status; then with the variable
SCRIPT = """
import importlib, json, os, sys
sys.path.insert(0, sys.argv[1])
from data.process import command_line
from data.sets import demo
demo.make_documents = lambda seed: ["one two three " * 20] * 500  # 240,000 take ten seconds
for line in json.loads(sys.argv[2]):
    program, *arguments = line.split()
    if program == "set":
        os.environ["PROMPTKD_DATA_DIR"] = arguments[0]
        continue
    try:
        command_line.run_command_line(lambda: importlib.import_module(program).main(arguments))
        print(program, 0)
    except SystemExit as error:
        print(program, error.code)
"""


@pytest.mark.slow
def test_commands_in_a_read_only_checkout(checkout, tmp_path):
    """Sets that lie in data/ are found. Others go where PROMPTKD_DATA_DIR says."""
    for name, width in (("model", 32), ("student", 16)):
        config = replace(talker_config(), n_embd=width)
        write_checkpoint(tmp_path / name, config, tiny_tokenizer())
    write_rows(tmp_path / "in" / "valid.jsonl", small_rows(3))
    pretrain = "train --method pretrain --shape 1x8x1 --steps 1 --dev-rows 1 --data demo --out out"
    prepare_set = "data.prepare self_inst --source in"
    demo_evaluation = "evaluate out/pretrain-1x8x1-demo-steps1 --data demo --out out/evaluation"
    bias = "exposure_bias --teacher model --students student --data demo --out out"
    bias = f"{bias} --rows 1 --samples 1 --steps 1"
    commands = [
        "evaluate model --data vicuna --rows 1 --seeds 1 --max-new 1 --out out/evaluation",
        pretrain,
        prepare_set,
        bias,
        "set sets",
        pretrain,
        prepare_set,
        f"{demo_evaluation} --rows 1 --seeds 1 --max-new 1",
        bias,
        "data.models.sampling model --file sets/self_inst/test.jsonl --max-new 1",
    ]
    command = [sys.executable, "-c", SCRIPT, str(checkout), json.dumps(commands)]
    process = subprocess.run(
        read_only(checkout, command),
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "unshare:" in process.stderr or "mount:" in process.stderr:
        pytest.skip("file systems can't be mounted here")
    statuses = re.findall(r"^[\w.]+ \d+$", process.stdout, re.MULTILINE)
    names = ("evaluate", "train", "data.prepare", "exposure_bias")
    expected = [f"{name} {0 if name == 'evaluate' else 2}" for name in names]
    later = ("train", "data.prepare", "evaluate", "exposure_bias", "data.models.sampling")
    assert statuses == expected + [f"{name} 0" for name in later], process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and "Traceback" not in process.stderr
    for line, name in zip(errors, ("demo", "self_inst", "demo")):
        directory = checkout / "data"
        assert line.startswith(f"error: data {directory / name}: {directory} is not a writable dir")
        assert line.endswith("set the variable PROMPTKD_DATA_DIR to a writable directory")


# ---- the command -------------------------------------------------------------------------------


def test_command_prepares_a_set_under_data(dolly, data_dir, capsys):
    main(["dolly", "--source", str(dolly)])
    assert capsys.readouterr().out == f"{data_dir / 'dolly'}: {PAPER} rows\n"
    assert files_below(data_dir) == [f"dolly/{name}" for name in SPLITS]


def test_command_prepares_several_sets_and_stops_at_the_first_error(shared, data_dir, capsys):
    source = shared / "data"
    message = error_of(main, ["vicuna", "self_inst", "sinst", "uinst", "--source", str(source)])
    assert message.startswith(f"{source}: has no 11_/valid.jsonl")
    assert capsys.readouterr().out.splitlines() == [
        f"{data_dir / 'vicuna'}: 80 test rows",
        f"{data_dir / 'self_inst'}: 242 test rows",
    ]
    assert files_below(data_dir) == ["self_inst/test.jsonl", "vicuna/test.jsonl"]


# ---- a set that the paper does not know ----------------------------------------------------------

HAIKU = PublicSet("owner/haiku", {"train": "train.jsonl", "dev": "d/dev.jsonl", "test": "t.jsonl"})
HAIKU_URL = "/datasets/owner/haiku/resolve/main/"


@pytest.fixture
def haiku(monkeypatch):
    """A new entry with three splits, and one with test rows alone; neither has row counts."""
    monkeypatch.setitem(PUBLIC_SETS, "haiku", HAIKU)
    monkeypatch.setitem(PUBLIC_SETS, "tanka", replace(HAIKU, files={"test": "valid.jsonl"}))


def test_a_new_set_is_downloaded_prepared_and_found(haiku, server, data_dir, capsys):
    for n, file in enumerate(HAIKU.files.values(), start=3):
        server.answers[HAIKU_URL + file] = encode_rows(small_rows(n, file))
    server.answers[f"{HAIKU_URL}valid.jsonl"] = encode_rows(small_rows(2))
    main(["haiku", "tanka"])
    rows = "3 train, 4 dev, 5 test rows"
    assert capsys.readouterr().out == f"{data_dir}/haiku: {rows}\n{data_dir}/tanka: 2 test rows\n"
    assert find_data_dir("haiku") == data_dir / "haiku"
    assert find_data_dir("tanka") == data_dir / "tanka"
    assert instructions(data_dir / "haiku" / "dev.jsonl")[0] == "d/dev.jsonl 0"
    assert len(server.asked) == 4
    (data_dir / "haiku" / "dev.jsonl").unlink()
    assert "3 train, 4 dev, 5 test" in prepare("haiku")
    assert instructions(data_dir / "haiku" / "dev.jsonl")[0] == "d/dev.jsonl 0"


def test_a_new_set_is_read_from_files(haiku, tmp_path, data_dir):
    for n, name in enumerate(("train", "dev", "t"), start=3):
        write_rows(tmp_path / "in" / f"{name}.jsonl", small_rows(n))
    assert "3 train, 4 dev, 5 test rows" in prepare("haiku", tmp_path / "in")
    (tmp_path / "in" / "dev.jsonl").unlink()
    message = error_of(prepare, "haiku", tmp_path / "in")
    assert message.endswith("has no d/dev.jsonl or dev.jsonl of haiku; name their folder")


def test_row_counts_of_a_set_are_the_papers(haiku):
    counts = {name: public_set.paper_rows for name, public_set in PUBLIC_SETS.items()}
    assert counts.pop("dolly") == {"train": 11_435, "dev": 1_000, "test": PAPER_SETS["dolly"]}
    assert counts.pop("haiku") == counts.pop("tanka") == {}
    assert counts == {name: {"test": n} for name, n in PAPER_SETS.items() if name != "dolly"}
