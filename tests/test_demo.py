"""The demo's data: its tasks, its data sets and its tokenizer."""

import functools
import json
import random

import make_demo_bpe
import pytest

from data import demo
from data.demo import (
    NEW_PAIRS,
    NEW_WORDS,
    PAIRS,
    TASKS,
    TOKENIZER_DIR,
    UNSEEN_WORDINGS,
    make_preamble,
    write_demo,
)
from data.rows import fill_template
from data.tokenizer import load_tokenizer

TRAINING_SETS = ["train", "dev", "test"]
HELD_OUT_SETS = ["wording/test", "words/test", "longer/test", "combined/test"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The objects of each file that write_demo writes, by name."""
    directory = tmp_path_factory.mktemp("world")
    write_demo(directory)
    return {
        name: [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]
        for name in [*TRAINING_SETS, *HELD_OUT_SETS, "pretrain"]
    }


def text_of(row):
    return row["input"] or row["instruction"].split(": ")[1]


def texts_of(world, names):
    return [text_of(row) for name in names for row in world[name]]


@pytest.mark.parametrize(
    "task, text, answer",
    [
        ("sort", "dog barn old cat", "barn cat dog old"),
        ("adjectives", "the small old dog sees the barn", "the dog sees the barn"),
        ("animals", "barn dog small cat", "dog cat"),
        ("others", "barn dog small cat", "barn small"),
        ("opposite", "the small dog sees the wet barn", "the big dog sees the dry barn"),
        ("past", "the dog finds the barn", "the dog found the barn"),
        (
            "correct",
            "what is the colour no wait the size of the small barn",
            "what is the size of the small barn",
        ),
        (
            "correct",
            "what is the size of the small barn i mean the dog",
            "what is the size of the dog",
        ),
    ],
)
def test_each_task_does_what_its_name_says(task, text, answer):
    assert TASKS[task](text.split()) == answer.split()


def test_no_text_is_in_two_sets(world):
    texts = texts_of(world, [*TRAINING_SETS, *HELD_OUT_SETS])
    assert len(texts) == len(set(texts))
    pretrained = set()
    for item in world["pretrain"]:
        lines = item["text"].split("\n")
        pretrained.add(lines[0])  # of a copy or a lesson
        if "### Response:" in lines:
            pretrained.add(lines[lines.index("### Response:") - 2].split(": ")[-1])
    assert len(pretrained) > 10_000
    assert pretrained.isdisjoint(texts)


@pytest.mark.parametrize("name", [*TRAINING_SETS, *HELD_OUT_SETS])
def test_rows_have_their_fields_and_some_have_no_input(world, name):
    for row in world[name]:
        assert set(row) == {"instruction", "input", "output"}
        assert row["instruction"] and row["output"]
    without_input = sum(row["input"] == "" for row in world[name])
    assert 0.1 < without_input / len(world[name]) < 0.5


@pytest.mark.parametrize("name", ["train", "test", "longer/test", "words/test"])
def test_answers_to_corrections_are_shorter(world, name):
    for row in world[name]:
        if row["output"].endswith("?"):
            assert row["output"].count("the") < text_of(row).count("the")


def test_held_out_wordings_occur_in_their_set_only(world):
    unseen = "/".join(UNSEEN_WORDINGS.values()).split("/")
    others = [
        item.get("text", item.get("instruction")).lower()
        for name in world
        if name != "wording/test"
        for item in world[name]
    ]
    assert not any(wording in text for text in others for wording in unseen)
    for row in world["wording/test"]:
        assert any(wording in row["instruction"].lower() for wording in unseen)


def test_new_words_occur_in_pretraining_and_in_every_row_of_their_set(world):
    new = {word for words in NEW_WORDS for word in words}
    for text in texts_of(world, TRAINING_SETS):
        assert new.isdisjoint(text.split())
    for text in texts_of(world, ["words/test"]):
        assert new & set(text.replace("?", "").split())
    texts = [item["text"].replace(".", " ") for item in world["pretrain"]]
    assert new <= {word for text in texts for word in text.split()}


def test_longer_texts_are_longer(world):
    def mean_length(name):
        return sum(len(text_of(row).split()) for row in world[name]) / len(world[name])

    assert mean_length("longer/test") > 1.5 * mean_length("test")


def test_combined_tasks_are_unseen_pairs(world):
    assert set(PAIRS).isdisjoint(NEW_PAIRS)
    assert all(" and then " in row["instruction"] for row in world["combined/test"])


def test_preambles_resemble_the_prompt_and_precede_most_requests(world):
    rng = random.Random(0)
    assert "Suppose you are a student." in {make_preamble(rng) for _ in range(2000)}
    starts = [item["text"].find("Below is an instruction") for item in world["pretrain"]]
    with_preamble = sum(start > 0 for start in starts)
    assert with_preamble > starts.count(0) > 0


def test_files_depend_on_the_seed_only(tmp_path, monkeypatch):
    few_documents = functools.partial(demo.make_documents, count=500)
    monkeypatch.setattr(demo, "make_documents", few_documents)
    for name, seed in [("a", 10), ("b", 10), ("c", 11)]:
        write_demo(tmp_path / name, seed)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.jsonl")]
    assert len(files) == 8
    for file in files:
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c


def test_stored_tokenizer_is_what_training_gives(world, tmp_path, monkeypatch):
    documents = [item["text"] for item in world["pretrain"]]
    monkeypatch.setattr(make_demo_bpe, "make_documents", {10: (documents, set())}.__getitem__)
    make_demo_bpe.write_tokenizer(tmp_path)
    for name in ["vocab.json", "merges.txt"]:
        assert (tmp_path / name).read_bytes() == (TOKENIZER_DIR / name).read_bytes()


@pytest.mark.parametrize(
    "name, max_length",
    [("train", 128), ("dev", 128), ("test", 128), ("longer/test", 160), ("wording/test", 128)],
)
def test_rows_are_short_in_tokens_and_decode_to_themselves(world, name, max_length):
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    assert 800 <= tokenizer.n_vocab <= 1000
    for row in world[name]:
        text = fill_template(row["instruction"], row["input"]) + row["output"]
        tokens = tokenizer.encode(text)
        assert len(tokens) < max_length
        assert tokenizer.decode(tokens) == text


def test_tokenizer_can_encode_any_text():
    tokenizer, text = load_tokenizer(TOKENIZER_DIR), "Größe 大きさ \n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
