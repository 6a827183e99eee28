"""Preparing the public data sets: from files at hand, and from a server on loopback in the place of the hub."""

import json
import shutil
from collections import Counter

import pytest
from helpers import Cut, Short, error_of, files_below, run_command, write_rows

from data import prepare as prepare_module
from data.prepare import PUBLIC_SETS, find_data_dir, main, prepare
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
    return [
        {"instruction": f"{name} {i}", "prompt": "unused", "input": "", "output": f"answer {i}"}
        for i in range(n)
    ]


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
    (folder / "raw.jsonl").write_bytes(
        (dolly / "dev.jsonl").read_bytes() + (dolly / "train.jsonl").read_bytes()
    )
    shutil.copy(dolly / "valid.jsonl", folder / "valid.jsonl")
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The place of prepared sets, empty."""
    monkeypatch.setattr(prepare_module, "HOME", tmp_path / "home")
    return tmp_path / "home"


# ---- from files at hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["its folder", "the folder above", "MiniLLM's files"])
def test_dolly_is_the_paper_s_split_with_minillm_s_valid_as_test(
    dolly, minillm_folder, tmp_path, layout
):
    source = {
        "its folder": dolly,
        "the folder above": dolly.parent,
        "MiniLLM's files": minillm_folder,
    }[layout]
    said = prepare("dolly", source, tmp_path / "out")
    assert PAPER in said and "NOT" not in said and "paper's" not in said
    assert files_below(tmp_path / "out") == SPLITS
    for split, published, count in [
        ("train", "train", 11435),
        ("dev", "dev", 1000),
        ("test", "valid", 500),
    ]:
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
        (tmp_path / "in" / f"{name}.jsonl").write_bytes(
            b"".join(kept[:-1] if name == "dev" else kept)
        )
    said = prepare("dolly", tmp_path / "in", tmp_path / "out")
    assert "11,435 train, 999 dev, 500 test" in said and f"paper's experiments have {PAPER}" in said


def test_the_raw_release_is_split_apart_and_called_not_the_paper_s(raw_release, tmp_path):
    said = [
        prepare("dolly", source, tmp_path / str(n))
        for n, source in enumerate([raw_release.parent, raw_release.parent.parent / "raw"])
    ]
    assert "13,511 train, 1,000 dev, 500 test" in said[0] and "NOT the paper's split" in said[0]
    assert all(
        (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
        for name in SPLITS
    )
    published = [
        (row["instruction"], row["context"], row["response"]) for row in objects(raw_release)
    ]
    made = {name: fields(objects(tmp_path / "0" / name)) for name in SPLITS}
    assert (
        Counter(sum(made.values(), [])) == Counter(published) and len(published) == 15011
    )  # every row in one split, none twice
    order = {row: place for place, row in enumerate(published)}
    places = [
        sum(order[row] for row in rows) / len(rows) / len(published) for rows in made.values()
    ]
    assert all(
        abs(place - 0.5) < 0.06 for place in places
    )  # each split is drawn from the whole file


def test_the_raw_release_is_found_in_a_folder_of_folders_where_nothing_better_is(
    raw_release, tmp_path
):
    (tmp_path / "in" / "raw").mkdir(parents=True)
    shutil.copy(raw_release, tmp_path / "in" / "raw")
    assert "NOT the paper's split" in prepare("dolly", tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "x", "response": "y"},
        {"instruction": "x", "context": None, "response": "y"},
        {"instruction": "x", "context": "", "response": ["y"]},
    ],
)
def test_a_wrong_field_in_the_raw_release_is_named_with_file_and_line(tmp_path, row):
    good = {"instruction": "a", "context": "", "response": "b", "category": "open_qa"}
    path = write_rows(tmp_path / "in" / "databricks-dolly-15k.jsonl", [good] * 1600 + [row])
    assert error_of(prepare, "dolly", tmp_path / "in", tmp_path / "out").startswith(
        f"{path}, line 1601: "
    )
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
    assert [row.references for row in read_rows(tmp_path / "out/test.jsonl")] == [
        ("one", "two", "one"),
        ("one",),
        ("one",),
    ]
    assert [row.input for row in read_rows(tmp_path / "out/test.jsonl")] == ["", "", "d"]


def test_unusual_characters_survive(tmp_path):
    texts = [
        "大きさ 👍🏽",
        "a\u2028b\x85c",
        'tab\t"quote" \\ back',
        "\r\n",
        "half \ud83d a pair",
        "\0",
    ]
    write_rows(
        tmp_path / "in" / "valid.jsonl",
        [{"instruction": text, "input": text, "output": text} for text in texts],
    )
    write_rows(tmp_path / "in" / "raw.jsonl", small_rows(1001))
    prepare("dolly", tmp_path / "in", tmp_path / "out")
    assert [
        (row.instruction, row.input, row.references)
        for row in read_rows(tmp_path / "out/test.jsonl")
    ] == [(text, text, (text,)) for text in texts]


@pytest.mark.parametrize(
    "present", [(), ("raw",), ("valid",), ("train", "dev"), ("train", "valid")]
)
def test_missing_files_are_one_line_and_nothing_is_written(tmp_path, present):
    (tmp_path / "in").mkdir()
    for name in present:
        write_rows(tmp_path / "in" / f"{name}.jsonl", small_rows(3))
    message = error_of(prepare, "dolly", tmp_path / "in", tmp_path / "out")
    assert (
        str(tmp_path / "in") in message
        and "raw.jsonl" in message
        and "databricks-dolly-15k.jsonl" in message
    )
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
        write_rows(
            tmp_path / "in" / f"{split}.jsonl",
            small_rows(5, split) + [{"instruction": 5}] * (split == name),
        )
    message = error_of(prepare, "dolly", tmp_path / "in", tmp_path / "out")
    assert f"{name}.jsonl, line 6: 'instruction'" in message
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


# ---- the sets that are for testing alone --------------------------------------------------------------------------------------

TEST_SETS = {
    "self_inst": ("self-inst", ""),
    "vicuna": ("Vicuna", ""),
    "sinst": ("sinst", "11_/"),
    "uinst": ("uinst", "11_/"),
}  # the hub's names


def instructions(path):
    return [row["instruction"] for row in objects(path)]


@pytest.mark.parametrize(
    "name, folder, count", [("self_inst", "self-inst", 242), ("vicuna", "vicuna", 80)]
)
@pytest.mark.parametrize("above", [False, True])
def test_the_real_sets_have_the_paper_s_rows(shared, tmp_path, name, folder, count, above):
    source = shared / "data" / ("" if above else folder)
    assert prepare(name, source, tmp_path / "out") == f"{tmp_path / 'out'}: {count} test rows"
    assert files_below(tmp_path / "out") == ["test.jsonl"]
    published = objects(shared / "data" / folder / "valid.jsonl")
    assert fields(objects(tmp_path / "out" / "test.jsonl")) == [
        (row["instruction"], row.get("input") or "", row["output"]) for row in published
    ]
    assert len(read_rows(tmp_path / "out" / "test.jsonl")) == len(published) == count


@pytest.mark.parametrize("name", TEST_SETS)
@pytest.mark.parametrize("file", ["valid.jsonl", "test.jsonl"])
@pytest.mark.parametrize(
    "layout", ["its folder", "our name", "the hub's name", "the hub's folders", "the hub's folder"]
)
def test_a_test_set_is_found_in_every_layout(tmp_path, name, file, layout):
    hub, inner = TEST_SETS[name]
    place = {
        "its folder": "",
        "our name": f"{name}/",
        "the hub's name": f"{hub}/",
        "the hub's folders": f"{hub}/{inner}",
        "the hub's folder": inner,
    }[layout]
    write_rows(tmp_path / "in" / f"{place}{file}", small_rows(3, "right"))
    said = prepare(name, tmp_path / "in", tmp_path / "out")
    assert (
        said
        == f"{tmp_path / 'out'}: 3 test rows; the paper's experiments have {PUBLIC_SETS[name][2]['test']:,} test"
    )
    assert files_below(tmp_path / "out") == ["test.jsonl"] and instructions(
        tmp_path / "out" / "test.jsonl"
    ) == ["right 0", "right 1", "right 2"]


def test_a_set_s_own_folder_goes_before_a_file_that_may_be_another_set_s(tmp_path):
    write_rows(tmp_path / "in" / "valid.jsonl", small_rows(1, "another"))
    for name, folder in [
        ("self_inst", "self-inst"),
        ("vicuna", "vicuna"),
        ("sinst", "sinst/11_"),
        ("uinst", "uinst/11_"),
    ]:
        write_rows(tmp_path / "in" / folder / "valid.jsonl", small_rows(1, name))
        prepare(name, tmp_path / "in", tmp_path / name)
        assert instructions(tmp_path / name / "test.jsonl") == [f"{name} 0"]


@pytest.mark.parametrize("name", ["sinst", "uinst"])
def test_the_long_references_go_before_all_of_them(tmp_path, name):
    write_rows(tmp_path / "in" / name / "valid.jsonl", small_rows(1, "all"))
    write_rows(tmp_path / "in" / name / "0_2" / "valid.jsonl", small_rows(1, "short"))
    write_rows(tmp_path / "in" / name / "11_" / "valid.jsonl", small_rows(1, "long"))
    prepare(name, tmp_path / "in", tmp_path / "out")
    assert instructions(tmp_path / "out" / "test.jsonl") == ["long 0"]


@pytest.mark.parametrize("name", TEST_SETS)
@pytest.mark.parametrize("beside", ["train.jsonl", "raw.jsonl"])
def test_dolly_s_folder_is_not_taken_for_another_set(tmp_path, name, beside):
    for file in ("valid.jsonl", beside):
        write_rows(tmp_path / "in" / file, small_rows(3))
    message = error_of(prepare, name, tmp_path / "in", tmp_path / "out")
    assert (
        message.startswith(f"{tmp_path / 'in'}: has no ")
        and name in message
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize(
    "count, said",
    [
        (23_916, "10,000 test rows, the first of 23,916"),
        (23_915, "10,000 test rows, the first of 23,915; the paper's file has 23,916"),
        (10_001, "10,000 test rows, the first of 10,001; the paper's file has 23,916"),
        (10_000, "10,000 test rows"),
        (9_999, "9,999 test rows; the paper's experiments have 10,000 test"),
    ],
)
def test_unni_is_cut_to_its_first_10_000_rows(tmp_path, count, said):
    write_rows(tmp_path / "in" / "uinst" / "11_" / "valid.jsonl", small_rows(count))
    assert prepare("uinst", tmp_path / "in", tmp_path / "out") == f"{tmp_path / 'out'}: {said}"
    assert instructions(tmp_path / "out" / "test.jsonl") == [
        f"row {i}" for i in range(min(count, 10_000))
    ]


def test_the_other_sets_are_never_cut(tmp_path):
    for name, count in [("self_inst", 243), ("vicuna", 81), ("sinst", 1_695)]:
        write_rows(tmp_path / "in" / name / "valid.jsonl", small_rows(count))
        assert f"{count:,} test rows; the paper's experiments have {count - 1:,} test" in prepare(
            name, tmp_path / "in", tmp_path / name
        )
        assert len(objects(tmp_path / name / "test.jsonl")) == count
    write_rows(tmp_path / "in" / "sinst" / "valid.jsonl", small_rows(1_694))
    assert prepare("sinst", tmp_path / "in", tmp_path / "sinst").endswith(": 1,694 test rows")


def test_all_references_of_a_test_set_are_kept(tmp_path):
    rows = [
        {"instruction": "a", "input": "b", "output": ["one", "two"]},
        {"instruction": "c", "output": ["one"]},
        {"instruction": "d", "output": ""},
    ]
    write_rows(tmp_path / "in" / "sinst" / "11_" / "valid.jsonl", rows)
    prepare("sinst", tmp_path / "in", tmp_path / "out")
    assert fields(objects(tmp_path / "out" / "test.jsonl")) == [
        ("a", "b", ["one", "two"]),
        ("c", "", "one"),
        ("d", "", ""),
    ]
    assert [row.references for row in read_rows(tmp_path / "out" / "test.jsonl")] == [
        ("one", "two"),
        ("one",),
        ("",),
    ]


@pytest.mark.parametrize("name", TEST_SETS)
def test_a_source_without_the_set_is_one_line(tmp_path, name):
    for source in (tmp_path / "none", write_rows(tmp_path / "file", small_rows(1)), tmp_path):
        message = error_of(prepare, name, source, tmp_path / "out")
        assert (
            message.startswith(f"{source}: has no {TEST_SETS[name][1]}valid.jsonl")
            and name in message
        )
    assert files_below(tmp_path) == ["file"]


def test_a_wrong_row_of_a_test_set_is_one_line_and_the_old_file_stays(tmp_path):
    path = write_rows(tmp_path / "in" / "valid.jsonl", small_rows(3, "old"))
    prepare("vicuna", tmp_path / "in", tmp_path / "out")
    write_rows(path, [*small_rows(3, "new"), {"instruction": "x", "output": []}])
    assert error_of(prepare, "vicuna", tmp_path / "in", tmp_path / "out").startswith(
        f"{path}, line 4: 'output'"
    )
    assert path.is_file() and instructions(tmp_path / "out" / "test.jsonl") == [
        "old 0",
        "old 1",
        "old 2",
    ]


# ---- from the network ------------------------------------------------------------------------------------------------------

HUB = "/datasets/MiniLLM/dolly/resolve/main/"  # data sets stand below datasets/ on the hub


def write_table(server, raw=None, valid=None):
    """Serve MiniLLM's two files: those given, or small ones. Returns the server's answers, to be changed."""

    def encode(rows):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    server.answers = {
        HUB + "raw.jsonl": raw or encode(small_rows(1003, "raw")),
        HUB + "valid.jsonl": valid or encode(small_rows(2, "valid")),
    }
    return server.answers


def test_dolly_from_the_network_is_the_paper_s_split(server, minillm_folder, dolly, tmp_path):
    write_table(
        server,
        (minillm_folder / "raw.jsonl").read_bytes(),
        (minillm_folder / "valid.jsonl").read_bytes(),
    )
    assert PAPER in prepare("dolly", target=tmp_path / "out")
    for split, published in [("train", "train"), ("dev", "dev"), ("test", "valid")]:
        assert fields(objects(tmp_path / "out" / f"{split}.jsonl")) == fields(
            objects(dolly / f"{published}.jsonl")
        )
    assert sorted(server.asked) == [HUB + "raw.jsonl", HUB + "valid.jsonl"]


def test_what_is_downloaded_is_not_downloaded_again(server, tmp_path):
    write_table(server)
    said = prepare("dolly", target=tmp_path)
    assert "3 train, 1,000 dev, 2 test" in said and f"paper's experiments have {PAPER}" in said
    assert prepare("dolly", target=tmp_path) == said and len(server.asked) == 2


@pytest.mark.parametrize("file", ["raw.jsonl", "valid.jsonl"])
def test_a_download_that_is_cut_off_is_one_line_and_goes_on_the_next_time(server, tmp_path, file):
    answers = write_table(server)
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
    write_table(server)[HUB + file] = status
    message = error_of(prepare, "dolly", None, tmp_path)
    assert f"{server.url}{HUB}{file}" in message and what in message
    assert not [name for name in files_below(tmp_path) if name != "download/raw.jsonl"]


def test_a_page_in_the_place_of_the_data_is_one_line(server, tmp_path):
    write_table(server, raw=b"<html>\n<body>Please log in.</body>\n")
    assert "raw.jsonl, line 1: is not JSON" in error_of(prepare, "dolly", None, tmp_path)
    assert files_below(tmp_path) == []  # the page is not read again the next time


@pytest.fixture(params=TEST_SETS)
def test_set(request):
    """A test set's name, its path on the hub, and where the download lies below its directory."""
    hub, inner = TEST_SETS[request.param]
    return (
        request.param,
        f"/datasets/MiniLLM/{hub}/resolve/main/{inner}valid.jsonl",
        f"download/{inner}valid.jsonl",
    )


def text_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_test_set_comes_from_the_network_once(server, tmp_path, test_set):
    name, path, kept = test_set
    server.answers[path] = text_of(small_rows(PUBLIC_SETS[name][2]["test"]))
    assert prepare(name, target=tmp_path).endswith(f"{PUBLIC_SETS[name][2]['test']:,} test rows")
    assert files_below(tmp_path) == [kept, "test.jsonl"]
    (tmp_path / "test.jsonl").unlink()
    prepare(name, target=tmp_path)
    assert server.asked == [path] and fields(objects(tmp_path / "test.jsonl")) == fields(
        small_rows(PUBLIC_SETS[name][2]["test"])
    )


@pytest.mark.parametrize(
    "answer, what",
    [
        (Cut(text_of(small_rows(100))), "cut off"),
        (404, "does not exist"),
        (503, "503"),
        (403, "403"),
    ],
)
def test_a_test_set_that_can_t_be_had_is_one_line_and_no_file(
    server, tmp_path, test_set, answer, what
):
    name, path, _ = test_set
    server.answers[path] = answer
    message = error_of(prepare, name, None, tmp_path)
    assert f"{server.url}{path}" in message and what in message and files_below(tmp_path) == []


def test_no_network_is_one_line_and_no_file(server, tmp_path, test_set):
    server.close()
    message = error_of(prepare, test_set[0], None, tmp_path)
    assert (
        f"{server.url}{test_set[1]}" in message
        and "refused" in message
        and "network" in message
        and files_below(tmp_path) == []
    )


@pytest.mark.parametrize(
    "name, file",
    [
        ("vicuna", "/datasets/MiniLLM/Vicuna/resolve/main/valid.jsonl"),
        ("dolly", HUB + "valid.jsonl"),
    ],
)
def test_a_download_of_the_wrong_size_is_one_line_and_is_not_kept(server, tmp_path, name, file):
    write_table(server)[file] = [
        Short(text_of([{"instruction": "x" * 50, "output": "y"}])),
        text_of(small_rows(3)),
    ]
    message = error_of(prepare, name, None, tmp_path)
    assert (
        "valid.jsonl, line 1: is not JSON" in message
        and "try again" in message
        and files_below(tmp_path) == []
    )
    assert "3 test" in prepare(name, target=tmp_path)


# ---- the directory of a set ------------------------------------------------------------------------------------------------


def test_a_directory_is_itself(tmp_path, server):
    assert find_data_dir(str(tmp_path)) == tmp_path and server.asked == []


def test_a_public_set_is_prepared_once(server, home, capsys):
    write_table(server)
    assert find_data_dir("dolly") == home / "dolly"
    assert files_below(home / "dolly") == [
        *SPLITS[:1],
        "download/raw.jsonl",
        "download/valid.jsonl",
        *SPLITS[1:],
    ]
    assert "3 train, 1,000 dev, 2 test" in capsys.readouterr().out
    asked = len(server.asked)
    assert find_data_dir("dolly") == home / "dolly" and len(server.asked) == asked
    assert capsys.readouterr().out == ""


def test_a_test_set_is_prepared_once_and_needs_its_test_rows_alone(server, home, capsys):
    server.answers["/datasets/MiniLLM/Vicuna/resolve/main/valid.jsonl"] = text_of(small_rows(80))
    assert [find_data_dir("vicuna"), find_data_dir("vicuna")] == [home / "vicuna"] * 2
    assert files_below(home) == ["vicuna/download/valid.jsonl", "vicuna/test.jsonl"]
    assert (
        len(server.asked) == 1 and capsys.readouterr().out == f"{home / 'vicuna'}: 80 test rows\n"
    )


def test_a_set_that_lacks_a_split_is_prepared_again(server, home):
    write_table(server)
    find_data_dir("dolly")
    for name in SPLITS:
        whole = (home / "dolly" / name).read_bytes()
        (home / "dolly" / name).unlink()
        find_data_dir("dolly")
        assert (home / "dolly" / name).read_bytes() == whole


def test_training_rows_are_written_last_so_that_a_half_prepared_set_shows(
    home, tmp_path, monkeypatch
):
    written = []
    monkeypatch.setattr(
        prepare_module, "write_atomic", lambda path, content: written.append(path.name)
    )
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
    assert [find_data_dir("demo"), find_data_dir("demo")] == [home / "demo"] * 2 and made == [
        home / "demo"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "none",
        "dolly2",
        "Dolly",
        "../dolly",
        "dolly/..",
        "demo/../dolly",
        "/nowhere",
        "a/b/c",
        "self_inst/../../x",
        "https://huggingface.co/datasets/MiniLLM/dolly",
        "a\0b",
    ],
)
def test_a_name_that_is_no_set_and_no_directory_is_one_line_and_makes_nothing(
    server, home, tmp_path, monkeypatch, name
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    message = error_of(find_data_dir, name)
    assert "dolly" in message and "demo" in message
    assert server.asked == [] and files_below(tmp_path) == [] and not home.exists()


# ---- the command -----------------------------------------------------------------------------------------------------------


def test_the_command_prepares_each_set_below_data_and_says_what_it_made(dolly, home, capsys):
    main(["dolly", "--source", str(dolly)])
    assert capsys.readouterr().out == f"{home / 'dolly'}: {PAPER} rows\n"
    assert files_below(home) == [f"dolly/{name}" for name in SPLITS]


def test_the_command_prepares_several_sets_and_stops_at_the_first_that_it_can_t(
    shared, home, capsys
):
    assert error_of(
        main, ["dolly", "self_inst", "vicuna", "sinst", "uinst", "--source", str(shared / "data")]
    ).startswith(f"{shared / 'data'}: has no 11_/valid.jsonl")
    assert capsys.readouterr().out.splitlines() == [
        f"{home / 'dolly'}: {PAPER} rows",
        f"{home / 'self_inst'}: 242 test rows",
        f"{home / 'vicuna'}: 80 test rows",
    ]
    assert files_below(home) == sorted(
        [f"dolly/{name}" for name in SPLITS] + ["self_inst/test.jsonl", "vicuna/test.jsonl"]
    )


@pytest.mark.parametrize(
    "arguments",
    [[], ["none"], ["../dolly"], ["dolly/.."], ["demo"], ["dolly", "none"], ["dolly", "--source"]],
)
def test_the_command_knows_only_the_public_sets(home, capsys, arguments):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    said = capsys.readouterr()
    assert (
        left.value.code == 2
        and said.out == ""
        and said.err.startswith("usage:")
        and not home.exists()
    )


def test_a_source_that_is_not_there_ends_the_command_with_one_line(tmp_path):
    done = run_command("-m", "data.prepare", "dolly", "--source", tmp_path / "none")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'none'}: ") and done.stderr.count("\n") == 1
