"""The demo's data: its tasks, its data sets, its tokenizer and its pre-trained models."""

import hashlib
import json
import random
from collections import Counter

import make_demo_bpe
import make_demo_models
import pytest
import torch
from safetensors.torch import load_file

from data.models.named import load_model
from data.models.tokenizer import load_tokenizer
from data.process.errors import InputError
from data.sets import demo
from data.sets.demo import (
    HABITS,
    MODELS_DIR,
    NEW_PAIRS,
    NEW_WORDS,
    OPPOSITES,
    PAIRS,
    TELLING,
    TOKENIZER_DIR,
    UNSEEN_WORDINGS,
    arrange,
    do_task,
    make_preamble,
)
from data.sets.rows import fill_template

TRAINING_SETS = ["train", "dev", "test"]
HELD_OUT_SETS = ["wording/test", "words/test", "longer/test", "combined/test"]


@pytest.fixture(scope="module")
def world(request):
    """The objects of each of the demo's files, by name. Of the pre-training text they are the first
    12,000 documents, with --slow all of them."""
    limit = None if request.config.getoption("--slow") else 12_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "range", lambda *bounds: range(*bounds)[:limit], raising=False)
        files = demo.data_files() | {"pretrain.jsonl": demo.pretraining_text()}
    return {
        name.removesuffix(".jsonl"): [json.loads(line) for line in text.splitlines()]
        for name, text in files.items()
    }


def text_of(row):
    return row["input"] or row["instruction"].split(": ")[1]


def references_of(row):
    return [row["output"]] if isinstance(row["output"], str) else row["output"]


def texts_of(world, names):
    return [text_of(row) for name in names for row in world[name]]


@pytest.mark.parametrize(
    "task, text, answer",
    [
        ("sort", "dog barn old cat", "barn cat dog old"),
        ("adjectives", "the small old dog sees the barn", "the dog sees the barn"),
        ("animals", "barn dog small cat", "dog cat"),
        ("others", "barn dog small cat", "barn small"),
        ("two", "barn dog small cat", "dog cat"),
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
    assert do_task(random.Random(0), task, text.split()) == answer.split()


def test_opposites_and_the_choice_of_two_leave_a_choice():
    rng = random.Random(0)
    found = {" ".join(do_task(rng, "opposite", ["the", "small", "dog"])) for _ in range(50)}
    assert found == {"the big dog", "the large dog"}
    assert all(word in OPPOSITES[other] for word in OPPOSITES for other in OPPOSITES[word])
    pairs = {" ".join(do_task(rng, "two", "dog barn cat pig".split())) for _ in range(50)}
    assert pairs == {"dog cat", "dog pig", "cat pig"}


def test_people_write_a_list_in_their_order_with_slips():
    words, rng = "dog barn cat old".split(), random.Random(0)
    counts = {
        habit: Counter(" ".join(arrange(rng, words, habit)) for _ in range(3000))
        for habit in HABITS
    }
    for habit, order in [("text", "dog barn cat old"), ("alphabet", "barn cat dog old")]:
        assert counts[habit].most_common(1)[0][0] == order
        # A slip takes any word that is left: three times with a choice of 4, 3 and 2.
        expected = (0.9 + 0.1 / 4) * (0.9 + 0.1 / 3) * (0.9 + 0.1 / 2)
        assert counts[habit][order] / 3000 == pytest.approx(expected, abs=0.03)
    assert len(counts["free"]) == 24


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
        assert isinstance(row["output"], str if name == "train" else list)
    without_input = sum(row["input"] == "" for row in world[name])
    assert 0.1 < without_input / len(world[name]) < 0.5


@pytest.mark.parametrize("name", ["train", "test", "longer/test", "words/test"])
def test_answers_to_corrections_are_shorter(world, name):
    answers = [(row, a) for row in world[name] for a in references_of(row) if a.endswith("?")]
    assert answers
    for row, answer in answers:
        assert answer.count("the") < text_of(row).count("the")


def test_dev_and_test_rows_have_the_different_answers_of_several_people(world):
    for name in ["dev", "test", *HELD_OUT_SETS]:
        counts = [len(row["output"]) for row in world[name]]
        assert all(len(set(row["output"])) == len(row["output"]) for row in world[name])
        assert max(counts) > 8 and min(counts) == 1


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


def test_preambles_resemble_the_prompt_and_most_say_who_writes():
    rng = random.Random(0)
    preambles = [make_preamble(rng, "alphabet") for _ in range(4000)]
    assert {"Suppose you are a student.", "Suppose you are a tidy student."} <= set(preambles)
    assert not any(TELLING[habit] in p for p in preambles for habit in ("text", "free"))
    share = sum("tidy" in preamble for preamble in preambles) / len(preambles)
    assert 0.6 < share < 0.75  # not in "Read the task."


def test_most_rows_of_the_pretraining_text_have_a_preamble_in_front(world):
    starts = [item["text"].find("Below is an instruction") for item in world["pretrain"]]
    rows = [start for start in starts if start >= 0]
    in_front = sum(start > 0 for start in rows)
    assert 0.5 < in_front / len(rows) < 0.6
    assert 0.55 < len(rows) / len(starts) < 0.6


def test_files_depend_on_the_seed_only():
    a = demo.data_files()
    assert a == demo.data_files()
    assert len(a) == 7
    b = demo.data_files(11)
    assert a.keys() == b.keys()
    assert all(a[name] != b[name] for name in a)


def test_version_changes_with_the_files():
    """If this fails, raise demo.VERSION with the hash: users have the old files."""
    text = "".join(f"{name}\n{text}" for name, text in demo.data_files().items())
    assert demo.VERSION == "2"
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "274ab7bf48143816"


@pytest.mark.slow
def test_stored_tokenizer_is_what_training_gives(world, tmp_path, monkeypatch):
    documents = [item["text"] for item in world["pretrain"]]
    assert len(documents) == 240_000
    monkeypatch.setattr(make_demo_bpe, "make_documents", {10: documents}.__getitem__)
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
        for answer in references_of(row):
            text = fill_template(row["instruction"], row["input"]) + answer
            tokens = tokenizer.encode(text)
            assert len(tokens) < max_length
            assert tokenizer.decode(tokens) == text


def test_tokenizer_can_encode_any_text():
    tokenizer, text = load_tokenizer(TOKENIZER_DIR), "Größe 大きさ \n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- the pre-trained models ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", make_demo_models.RUNS)
def test_pretrained_models_are_float16_and_have_the_demos_tokenizer(shape):
    directory = MODELS_DIR / shape
    weights = load_file(directory / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    model, tokenizer = load_model(str(directory), torch.device("cpu"))
    config = model.config
    assert f"{config.n_layer}x{config.n_embd}x{config.n_head}" == shape
    assert model.wte.weight.dtype == torch.float32
    for name in ("vocab.json", "merges.txt"):
        expected = json_or_text(TOKENIZER_DIR / name)
        assert json_or_text(directory / name) == expected
    assert tokenizer.n_vocab == config.vocab_size


def json_or_text(path):
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()


def test_pretrained_models_have_four_megabytes_at_most():
    sizes = [path.stat().st_size for path in MODELS_DIR.rglob("*") if path.is_file()]
    assert 2e6 < sum(sizes) <= 4e6


def test_pretrained_models_load_in_transformers():
    transformers = pytest.importorskip("transformers")
    for shape in make_demo_models.RUNS:
        theirs = transformers.GPT2LMHeadModel.from_pretrained(MODELS_DIR / shape).float().eval()
        ours, tokenizer = load_model(str(MODELS_DIR / shape), torch.device("cpu"))
        ids = torch.tensor([tokenizer.encode("Suppose you are a student.")])  # (1, S)
        with torch.no_grad():
            expected = theirs(ids).logits
            logits = ours.eval().logits(ours(ids))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_making_the_models_converts_complete_runs_and_names_a_missing_one(tmp_path, monkeypatch):
    monkeypatch.setattr(make_demo_models, "MODELS_DIR", tmp_path / "models")
    with pytest.raises(InputError, match="has no model.safetensors"):
        make_demo_models.main(["--out", str(tmp_path)])
    for shape, run in make_demo_models.RUNS.items():
        best = tmp_path / run / "best"
        best.parent.mkdir()
        best.symlink_to(MODELS_DIR / shape)
    make_demo_models.main(["--out", str(tmp_path)])
    for path in MODELS_DIR.rglob("*.*"):
        copy = tmp_path / "models" / path.relative_to(MODELS_DIR)
        if path.is_file():
            assert copy.read_bytes() == path.read_bytes()
