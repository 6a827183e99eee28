"""Preparing the public data sets: from files at hand, and from a server on loopback in the place of the hub."""

import json
import shutil
from collections import Counter

import pytest
from helpers import run_command, write_rows
from test_files import Cut, error_of, files_below, server  # noqa: F401  (server is a fixture)

from data import prepare as prepare_module
from data.prepare import data_directory, main, prepare
from data.rows import read_rows

SPLITS = ["dev.jsonl", "test.jsonl", "train.jsonl"]
PAPER = "11,435 train, 1,000 dev, 500 test"


def lines(path):
    return path.read_bytes().splitlines(keepends=True)


def objects(path):
    return [json.loads(line) for line in lines(path)]


def fields(rows):
    return [(row["instruction"], row["input"], row["output"]) for row in rows]


def small_rows(n, name="row"):
    return [{"instruction": f"{name} {i}", "prompt": "unused", "input": "", "output": f"answer {i}"} for i in range(n)]


@pytest.fixture(scope="module")
def dolly(shared):
    return shared / "data" / "dolly"


@pytest.fixture(scope="module")
def raw_release(shared):
    return shared / "data" / "raw" / "databricks-dolly-15k.jsonl"


@pytest.fixture(scope="module")
def minillm_folder(dolly, tmp_path_factory):
    """MiniLLM's layout, made of the same rows: the first 1,000 of raw.jsonl are dev."""
    folder = tmp_path_factory.mktemp("minillm")
    (folder / "raw.jsonl").write_bytes((dolly / "dev.jsonl").read_bytes() + (dolly / "train.jsonl").read_bytes())
    shutil.copy(dolly / "valid.jsonl", folder / "valid.jsonl")
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The place of prepared sets, empty."""
    monkeypatch.setattr(prepare_module, "HOME", tmp_path / "home")
    return tmp_path / "home"


# ---- from files at hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["its folder", "the folder above", "MiniLLM's files"])
def test_dolly_is_the_paper_s_split_with_minillm_s_valid_as_test(dolly, minillm_folder, tmp_path, layout):
    source = {"its folder": dolly, "the folder above": dolly.parent, "MiniLLM's files": minillm_folder}[layout]
    said = prepare("dolly", source, tmp_path / "out")
    assert PAPER in said and "NOT" not in said and "paper's" not in said
    assert files_below(tmp_path / "out") == SPLITS
    for split, published, count in [("train", "train", 11435), ("dev", "dev", 1000), ("test", "valid", 500)]:
        made = objects(tmp_path / "out" / f"{split}.jsonl")
        assert len(made) == count and fields(made) == fields(objects(dolly / f"{published}.jsonl"))
        assert set(made[0]) == {"instruction", "input", "output"}
        assert len(read_rows(tmp_path / "out" / f"{split}.jsonl")) == count


def test_a_split_at_hand_goes_before_a_raw_file_beside_it(tmp_path):
    for name, count in [("train", 3), ("dev", 2), ("valid", 1), ("raw", 1005)]:
        write_rows(tmp_path / "in" / f"{name}.jsonl", small_rows(count, name))
    assert "3 train, 2 dev, 1 test" in prepare("dolly", tmp_path / "in", tmp_path / "out")
    assert objects(tmp_path / "out/train.jsonl")[0]["instruction"] == "train 0"


def test_a_wrong_count_is_said(dolly, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("train", "dev", "valid"):
        kept = lines(dolly / f"{name}.jsonl")
        (tmp_path / "in" / f"{name}.jsonl").write_bytes(b"".join(kept[:-1] if name == "dev" else kept))
    said = prepare("dolly", tmp_path / "in", tmp_path / "out")
    assert "11,435 train, 999 dev, 500 test" in said and f"paper's experiments have {PAPER}" in said


def test_the_raw_release_is_split_apart_and_called_not_the_paper_s(raw_release, tmp_path):
    said = [prepare("dolly", source, tmp_path / str(n)) for n, source in enumerate([raw_release.parent, raw_release.parent.parent / "raw"])]
    assert "13,511 train, 1,000 dev, 500 test" in said[0] and "NOT the paper's split" in said[0]
    assert all((tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes() for name in SPLITS)
    published = [(row["instruction"], row["context"], row["response"]) for row in objects(raw_release)]
    made = {name: fields(objects(tmp_path / "0" / name)) for name in SPLITS}
    assert Counter(sum(made.values(), [])) == Counter(published) and len(published) == 15011  # every row in one split, none twice
    order = {row: place for place, row in enumerate(published)}
    places = [sum(order[row] for row in rows) / len(rows) / len(published) for rows in made.values()]
    assert all(abs(place - 0.5) < 0.06 for place in places)  # each split is drawn from the whole file


def test_the_raw_release_is_found_in_a_folder_of_folders_where_nothing_better_is(raw_release, tmp_path):
    (tmp_path / "in" / "raw").mkdir(parents=True)
    shutil.copy(raw_release, tmp_path / "in" / "raw")
    assert "NOT the paper's split" in prepare("dolly", tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("row", [{"instruction": "x", "response": "y"}, {"instruction": "x", "context": None, "response": "y"}, {"instruction": "x", "context": "", "response": ["y"]}])
def test_a_wrong_field_in_the_raw_release_is_named_with_file_and_line(tmp_path, row):
    good = {"instruction": "a", "context": "", "response": "b", "category": "open_qa"}
    path = write_rows(tmp_path / "in" / "databricks-dolly-15k.jsonl", [good] * 1600 + [row])
    assert error_of(prepare, "dolly", tmp_path / "in", tmp_path / "out").startswith(f"{path}, line 1601: ")
    assert not (tmp_path / "out").exists()


def test_all_references_of_a_row_are_kept(tmp_path):
    rows = [
        {"instruction": "a", "output": ["one", "two", "one"]},
        {"instruction": "b", "input": None, "output": ["one"]},
        {"instruction": "c", "input": "d", "output": "one"},
    ]
    write_rows(tmp_path / "in" / "valid.jsonl", rows)
    write_rows(tmp_path / "in" / "raw.jsonl", small_rows(1001))
    prepare("dolly", tmp_path / "in", tmp_path / "out")
    assert [row.references for row in read_rows(tmp_path / "out/test.jsonl")] == [("one", "two", "one"), ("one",), ("one",)]
    assert [row.input for row in read_rows(tmp_path / "out/test.jsonl")] == ["", "", "d"]


def test_unusual_characters_survive(tmp_path):
    texts = ["大きさ 👍🏽", "a\u2028b\x85c", "tab\t\"quote\" \\ back", "\r\n", "half \ud83d a pair", "\0"]
    write_rows(tmp_path / "in" / "valid.jsonl", [{"instruction": text, "input": text, "output": text} for text in texts])
    write_rows(tmp_path / "in" / "raw.jsonl", small_rows(1001))
    prepare("dolly", tmp_path / "in", tmp_path / "out")
    assert [(row.instruction, row.input, row.references) for row in read_rows(tmp_path / "out/test.jsonl")] == [(text, text, (text,)) for text in texts]


@pytest.mark.parametrize("present", [(), ("raw",), ("valid",), ("train", "dev"), ("train", "valid")])
def test_missing_files_are_one_line_and_nothing_is_written(tmp_path, present):
    (tmp_path / "in").mkdir()
    for name in present:
        write_rows(tmp_path / "in" / f"{name}.jsonl", small_rows(3))
    message = error_of(prepare, "dolly", tmp_path / "in", tmp_path / "out")
    assert str(tmp_path / "in") in message and "raw.jsonl" in message and "databricks-dolly-15k.jsonl" in message
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there_or_is_a_file_is_one_line(tmp_path):
    for source in (tmp_path / "none", write_rows(tmp_path / "file", small_rows(1))):
        assert str(source) in error_of(prepare, "dolly", source, tmp_path / "out")


@pytest.mark.parametrize("count", [1, 1000])
def test_a_raw_file_that_leaves_no_training_rows_is_one_line(tmp_path, count):
    write_rows(tmp_path / "in" / "valid.jsonl", small_rows(3))
    write_rows(tmp_path / "in" / "raw.jsonl", small_rows(count))
    error_of(prepare, "dolly", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["train", "dev", "valid"])
def test_a_bad_row_leaves_the_set_that_was_there(tmp_path, name):
    for split in ("train", "dev", "valid"):
        write_rows(tmp_path / "in" / f"{split}.jsonl", small_rows(3, split))
    prepare("dolly", tmp_path / "in", tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for split in ("train", "dev", "valid"):
        write_rows(tmp_path / "in" / f"{split}.jsonl", small_rows(5, split) + [{"instruction": 5}] * (split == name))
    message = error_of(prepare, "dolly", tmp_path / "in", tmp_path / "out")
    assert f"{name}.jsonl, line 6: 'instruction'" in message
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


# ---- from the network ------------------------------------------------------------------------------------------------------

HUB = "/datasets/MiniLLM/dolly/resolve/main/"  # data sets stand below datasets/ on the hub


def publish(server, raw=None, valid=None):
    """Serve MiniLLM's two files: those given, or small ones. Returns the server's answers, to be changed."""
    def encode(rows):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    server.answers = {HUB + "raw.jsonl": raw or encode(small_rows(1003, "raw")), HUB + "valid.jsonl": valid or encode(small_rows(2, "valid"))}
    return server.answers


def test_dolly_from_the_network_is_the_paper_s_split(server, minillm_folder, dolly, tmp_path):
    publish(server, (minillm_folder / "raw.jsonl").read_bytes(), (minillm_folder / "valid.jsonl").read_bytes())
    assert PAPER in prepare("dolly", target=tmp_path / "out")
    for split, published in [("train", "train"), ("dev", "dev"), ("test", "valid")]:
        assert fields(objects(tmp_path / "out" / f"{split}.jsonl")) == fields(objects(dolly / f"{published}.jsonl"))
    assert sorted(server.asked) == [HUB + "raw.jsonl", HUB + "valid.jsonl"]


def test_what_is_downloaded_is_not_downloaded_again(server, tmp_path):
    publish(server)
    said = prepare("dolly", target=tmp_path)
    assert "3 train, 1,000 dev, 2 test" in said and f"paper's experiments have {PAPER}" in said
    assert prepare("dolly", target=tmp_path) == said and len(server.asked) == 2


@pytest.mark.parametrize("file", ["raw.jsonl", "valid.jsonl"])
def test_a_download_that_is_cut_off_is_one_line_and_goes_on_the_next_time(server, tmp_path, file):
    answers = publish(server)
    whole = answers[HUB + file]
    answers[HUB + file] = Cut(whole)
    message = error_of(prepare, "dolly", None, tmp_path)
    assert file in message and "cut off" in message
    left = files_below(tmp_path)
    assert left == [] if file == "raw.jsonl" else left == ["download/raw.jsonl"]

    answers[HUB + file] = [Cut(whole), whole]
    server.asked.clear()
    assert "3 train" in prepare("dolly", target=tmp_path)
    assert server.asked.count(HUB + "raw.jsonl") == (2 if file == "raw.jsonl" else 0)
    assert not any(name.endswith(".partial") for name in files_below(tmp_path))


@pytest.mark.parametrize("file", ["raw.jsonl", "valid.jsonl"])
@pytest.mark.parametrize("status, what", [(404, "does not exist"), (500, "500")])
def test_a_file_that_the_hub_does_not_give_is_one_line(server, tmp_path, file, status, what):
    publish(server)[HUB + file] = status
    message = error_of(prepare, "dolly", None, tmp_path)
    assert f"{server.url}{HUB}{file}" in message and what in message
    assert not [name for name in files_below(tmp_path) if name != "download/raw.jsonl"]


def test_a_page_in_the_place_of_the_data_is_one_line(server, tmp_path):
    publish(server, raw=b"<html>\n<body>Please log in.</body>\n")
    assert "raw.jsonl, line 1: is not JSON" in error_of(prepare, "dolly", None, tmp_path)
    assert not [name for name in files_below(tmp_path) if name in SPLITS]


# ---- the directory of a set ------------------------------------------------------------------------------------------------


def test_a_directory_is_itself(tmp_path, server):
    assert data_directory(str(tmp_path)) == tmp_path and server.asked == []


def test_a_public_set_is_prepared_once(server, home, capsys):
    publish(server)
    assert data_directory("dolly") == home / "dolly"
    assert files_below(home / "dolly") == [*SPLITS[:1], "download/raw.jsonl", "download/valid.jsonl", *SPLITS[1:]]
    assert "3 train, 1,000 dev, 2 test" in capsys.readouterr().out
    asked = len(server.asked)
    assert data_directory("dolly") == home / "dolly" and len(server.asked) == asked
    assert capsys.readouterr().out == ""


def test_a_set_that_lacks_a_split_is_prepared_again(server, home):
    publish(server)
    data_directory("dolly")
    for name in SPLITS:
        whole = (home / "dolly" / name).read_bytes()
        (home / "dolly" / name).unlink()
        data_directory("dolly")
        assert (home / "dolly" / name).read_bytes() == whole


def test_training_rows_are_written_last_so_that_a_half_prepared_set_shows(home, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(prepare_module, "write_atomic", lambda path, content: written.append(path.name))
    for name in ("train", "dev", "valid"):
        write_rows(tmp_path / "in" / f"{name}.jsonl", small_rows(3, name))
    prepare("dolly", tmp_path / "in")
    assert sorted(written) == SPLITS and written[-1] == "train.jsonl"


def test_the_demo_is_made_when_it_is_not_there(home, monkeypatch):
    made = []

    def write_demo(directory):
        made.append(directory)
        write_rows(directory / "pretrain.jsonl", [{"text": "x"}])

    monkeypatch.setattr(prepare_module.demo, "write_demo", write_demo)
    assert [data_directory("demo"), data_directory("demo")] == [home / "demo"] * 2 and made == [home / "demo"]


@pytest.mark.parametrize("name", [
    "", "none", "dolly2", "Dolly", "../dolly", "dolly/..", "demo/../dolly", "/nowhere", "a/b/c", "self_inst/../../x",
    "https://huggingface.co/datasets/MiniLLM/dolly", "a\0b",
])  # fmt: skip
def test_a_name_that_is_no_set_and_no_directory_is_one_line_and_makes_nothing(server, home, tmp_path, monkeypatch, name):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    message = error_of(data_directory, name)
    assert "dolly" in message and "demo" in message
    assert server.asked == [] and files_below(tmp_path) == [] and not home.exists()


# ---- the command -----------------------------------------------------------------------------------------------------------


def test_the_command_prepares_each_set_below_data_and_says_what_it_made(dolly, home, capsys):
    main(["dolly", "--source", str(dolly)])
    assert capsys.readouterr().out == f"{home / 'dolly'}: {PAPER} rows\n"
    assert files_below(home) == [f"dolly/{name}" for name in SPLITS]


@pytest.mark.parametrize("arguments", [[], ["none"], ["../dolly"], ["dolly/.."], ["demo"], ["dolly", "none"], ["dolly", "--source"]])
def test_the_command_knows_only_the_public_sets(home, capsys, arguments):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    said = capsys.readouterr()
    assert left.value.code == 2 and said.out == "" and said.err.startswith("usage:") and not home.exists()


def test_a_source_that_is_not_there_ends_the_command_with_one_line(tmp_path):
    done = run_command("-m", "data.prepare", "dolly", "--source", tmp_path / "none")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'none'}: ") and done.stderr.count("\n") == 1
