"""The demo world: its tasks, its data sets, and the tokenizer that ships with it."""

import json
import random

import pytest

from data.demo import (
    NEW_WORDS,
    PAIRS,
    TASKS,
    TOKENIZER_DIR,
    UNSEEN,
    UNSEEN_PAIRS,
    WORDINGS,
    make_preamble,
    write_demo,
    write_tokenizer,
)
from data.rows import fill_template
from data.tokenizer import load_tokenizer

HELD_OUT = ["wording/test", "words/test", "longer/test", "combined/test"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    write_demo(directory)
    return {name: read(directory, name) for name in ["train", "dev", "test", "pretrain", *HELD_OUT]}


def read(directory, name):
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def text_of(row):
    return row["input"] or row["instruction"].split(": ")[1]


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
    texts = [text_of(row) for name in world if name != "pretrain" for row in world[name]]
    assert len(texts) == len(set(texts))
    asked = {
        item["text"].split("\n")[0] for item in world["pretrain"]
    }  # what a copy or a lesson is about
    asked |= {
        text.split("### Response:")[0].split("\n")[-3].split(": ")[-1]
        for item in world["pretrain"]
        if "###" in (text := item["text"])
    }
    assert len(asked) > 10_000
    assert not asked & {
        text_of(row) for name in ["train", "dev", "test", *HELD_OUT] for row in world[name]
    }


def test_rows_have_text_and_answer_and_both_template_headers(world):
    for name in ["train", "dev", "test", *HELD_OUT]:
        assert all(
            row["instruction"] and row["output"] and set(row) == {"instruction", "input", "output"}
            for row in world[name]
        )
        assert 0.1 < sum(row["input"] == "" for row in world[name]) / len(world[name]) < 0.5


def test_no_slip_is_left_in_an_answer(world):
    for name in ["train", "test", "longer/test", "words/test"]:
        for row in world[name]:
            if row["output"].endswith("?"):
                assert row["output"].count("the") < text_of(row).count("the")


def test_held_out_wordings_are_asked_nowhere_else(world):
    unseen = [wording for kinds in WORDINGS.values() for wording in kinds[UNSEEN] or []]
    elsewhere = [
        item.get("text", item.get("instruction")).lower()
        for name in world
        if name != "wording/test"
        for item in world[name]
    ]
    assert not any(wording in text for text in elsewhere for wording in unseen)
    assert all(
        any(wording in row["instruction"].lower() for wording in unseen)
        for row in world["wording/test"]
    )


def test_new_words_are_in_no_training_row_and_in_every_row_of_their_set(world):
    new = {word for words in NEW_WORDS for word in words}
    assert not any(
        new & set(text_of(row).split()) for name in ["train", "dev", "test"] for row in world[name]
    )
    assert all(new & set(text_of(row).replace("?", "").split()) for row in world["words/test"])
    seen_in_pretraining = {
        word for item in world["pretrain"] for word in item["text"].replace(".", " ").split()
    }
    assert new <= seen_in_pretraining


def test_longer_texts_are_longer_and_combinations_are_unseen(world):
    def mean_words(name):
        return sum(len(text_of(row).split()) for row in world[name]) / len(world[name])

    assert mean_words("longer/test") > 1.5 * mean_words("test")
    assert not set(PAIRS) & set(UNSEEN_PAIRS)
    assert all(" and then " in row["instruction"] for row in world["combined/test"])


def test_preambles_are_like_the_prompt_and_stand_before_many_requests(world):
    rng = random.Random(0)
    assert "Suppose you are a student." in {make_preamble(rng) for _ in range(2000)}
    behind = [item["text"].find("Below is an instruction") for item in world["pretrain"]]
    assert sum(place > 0 for place in behind) > sum(place == 0 for place in behind) > 0


def test_the_same_seed_writes_the_same_files_and_another_does_not(tmp_path):
    for folder, seed in [("a", 10), ("b", 10), ("c", 11)]:
        write_demo(tmp_path / folder, seed)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.jsonl"))
    assert len(files) == 8
    for file in files:
        content = (tmp_path / "a" / file).read_bytes()
        assert (
            content == (tmp_path / "b" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()
        )


def test_the_shipped_tokenizer_is_what_training_gives(tmp_path):
    write_tokenizer(tmp_path)
    for name in ["vocab.json", "merges.txt"]:
        assert (tmp_path / name).read_bytes() == (TOKENIZER_DIR / name).read_bytes()


def test_the_tokenizer_reads_the_world_in_few_tokens(world):
    tokenizer = load_tokenizer(TOKENIZER_DIR)
    assert 800 <= tokenizer.n_vocab <= 1000
    for name, most in [
        ("train", 128),
        ("dev", 128),
        ("test", 128),
        ("longer/test", 160),
        ("wording/test", 128),
    ]:
        for row in world[name]:
            request = fill_template(row["instruction"], row["input"])
            tokens = tokenizer.encode(request + row["output"])
            assert len(tokens) < most and tokenizer.decode(tokens) == request + row["output"]
    assert tokenizer.decode(tokenizer.encode("Größe 大きさ \n")) == "Größe 大きさ \n"
