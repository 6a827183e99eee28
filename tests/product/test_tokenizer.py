"""Tokenizers in every file layout and numbering, and models whose embedding has more rows than
their tokenizer has tokens, against transformers."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import (
    TINY,
    call_command,
    error_of,
    greedy_by_transformers,
    stored_weights,
    talker_config,
    tiny_tokenizer,
    transformers_model,
    write_checkpoint,
    write_rows,
)

import train
from data.models import sampling
from data.models.checkpoint import save
from data.models.named import (
    count_parameters,
    find_model,
    known_parameters,
    load_model,
    open_models,
)
from data.models.tokenizer import (
    END_OF_TEXT,
    check_same_vocabulary,
    load_tokenizer,
    read_tokenizer,
    tokenizer_files,
)
from data.sets.demo import TOKENIZER_DIR
from data.sets.rows import fill_template
from model import GPT, Config

CPU = torch.device("cpu")
TEXTS = [
    "Below is an instruction that describes a task.",
    "don't  stop\n\n\tnow 123,456  \n",
    "naïve café — 大きさ 🙂👨‍👩‍👧 e\u0301 \u2028\x85\xa0",
    " leading, trailing \r\n",
    "<|endofte <pad> 'LL I'VE it's",
    "العربية 한국어 ½²٣ x" + 40 * " " + "y",
]


def parts_of(tokenizer, first=(), after_bytes=(), last=(END_OF_TEXT,)):
    """The ids and merges of a tokenizer's tokens, numbered with the given special tokens before
    them, after the bytes and after them."""
    vocab, merges = tokenizer_files(tokenizer)
    names = [name for name in json.loads(vocab) if name != END_OF_TEXT]
    names = [*first, *names[:256], *after_bytes, *names[256:], *last]
    return {name: i for i, name in enumerate(names)}, merges.split("\n")[1:-1]


def write_pair(directory, ids, merges, added=None):
    """vocab.json and merges.txt, perhaps with added_tokens.json."""
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    text = "\n".join(["#version: 0.2", *merges, ""])
    (directory / "merges.txt").write_text(text, encoding="utf-8")
    if added:
        (directory / "added_tokens.json").write_text(json.dumps(added))
    return directory


def added_token(content, i, special=True):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, **flags, "special": special}


def json_content(ids, merges, added=None):
    """What transformers 5 writes as tokenizer.json for GPT-2."""
    added = {END_OF_TEXT: ids[END_OF_TEXT]} if added is None else added
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(token, i) for token, i in added.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [sequence],
            "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {},
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def write_json(directory, content):
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def same_tokenizer(a, b):
    return (
        tokenizer_files(a) == tokenizer_files(b)
        and a.special_tokens_set == b.special_tokens_set
        and [a.encode_ordinary(text) for text in TEXTS]
        == [b.encode_ordinary(text) for text in TEXTS]
    )


# --- tokenizer.json ---


def change_model(**fields):
    def change(content):
        content["model"] |= fields

    return change


def change_part(**parts):
    def change(content):
        content |= parts

    return change


def merges_as_strings(content):
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]


def like_old_versions(content):
    """The official GPT-2's file."""
    merges_as_strings(content)
    for field in ("type", "byte_fallback", "ignore_merges"):
        del content["model"][field]
    del content["pre_tokenizer"]["use_regex"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    content["post_processor"] = byte_level
    content["added_tokens"][0]["normalized"] = True


def in_a_sequence(content):
    for part, plural in (("pre_tokenizer", "pretokenizers"), ("post_processor", "processors")):
        content[part] = {"type": "Sequence", plural: [content[part]]}


def end_only_added(content):
    del content["model"]["vocab"][END_OF_TEXT]


def padded_and_truncated(content):
    content["truncation"] = {
        "direction": "Right",
        "max_length": 5,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }


READABLE = {
    "as transformers 5 writes it": lambda content: None,
    "merges as strings": merges_as_strings,
    "as old versions write it": like_old_versions,
    "parts in sequences": in_a_sequence,
    "end-of-text only among the added tokens": end_only_added,
    "truncation and padding": padded_and_truncated,
    "no post-processor": change_part(post_processor=None),
    "dropout 0": change_model(dropout=0.0),
}


@pytest.mark.parametrize("change", READABLE.values(), ids=READABLE)
def test_a_tokenizer_json_gives_the_tokens_of_the_tokenizers_library(tmp_path, change):
    tokenizers = pytest.importorskip("tokenizers")
    content = json_content(*parts_of(tiny_tokenizer()))
    change(content)
    directory = write_json(tmp_path / "model", content)
    tokenizer = load_tokenizer(directory)
    assert same_tokenizer(tokenizer, tiny_tokenizer())
    theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    theirs.no_truncation()
    for text in TEXTS:
        assert tokenizer.encode_ordinary(text) == theirs.encode(text).ids


def add_prefix_space(content):
    content["pre_tokenizer"]["add_prefix_space"] = True


def no_regex(content):
    content["pre_tokenizer"]["use_regex"] = False


def another_split(content):
    pattern = {"Regex": r"\p{N}{1,3}|\s+"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    byte_level = content["pre_tokenizer"] | {"use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}


def split_numbers(content):
    steps = [{"type": "Digits", "individual_digits": True}, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def bos_first(content):
    special = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    content["post_processor"]["single"].insert(0, special)
    token = {"id": END_OF_TEXT, "ids": [363], "tokens": [END_OF_TEXT]}
    content["post_processor"]["special_tokens"] = {END_OF_TEXT: token}


def renumber(**ids):
    def change(content):
        content["model"]["vocab"] |= ids

    return change


def without_token(token):
    def change(content):
        del content["model"]["vocab"][token]

    return change


def swap_merges(content):
    merges = content["model"]["merges"]
    merges[0], merges[20] = merges[20], merges[0]


def shift(content):
    """The id 300 is left out."""
    for token, i in content["model"]["vocab"].items():
        content["model"]["vocab"][token] = i + (i >= 300)
    content["added_tokens"][0]["id"] += 1


def end_is_another_token(content):
    content["added_tokens"][0]["content"] = "</s>"
    content["model"]["vocab"]["</s>"] = content["model"]["vocab"].pop(END_OF_TEXT)


def unreachable_merge(content):
    """qua = q + ua, but qu comes before ua."""
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    n = vocab.pop(END_OF_TEXT)
    vocab |= {"zq": n, "qj": n + 1, "zqj": n + 2, END_OF_TEXT: n + 3}
    merges += [["z", "q"], ["q", "j"], ["z", "qj"]]
    content["added_tokens"][0]["id"] = n + 3


BYTE_A = 64  # the id of the token "a" in GPT-2's order
REFUSED = {
    "normalizer": (change_part(normalizer={"type": "NFC"}), 'normalizer {"type": "NFC"}'),
    "lowercase": (
        change_part(normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}),
        '"normalizers": [{"type": "Lowercase"}]',
    ),
    "add_prefix_space": (add_prefix_space, '"add_prefix_space": true'),
    "no regex": (no_regex, '"use_regex": false'),
    "another regex": (another_split, '"Split"'),
    "digits": (split_numbers, '"Digits"'),
    "no pre-tokenizer": (change_part(pre_tokenizer=None), "has pre_tokenizer null"),
    "Metaspace": (change_part(pre_tokenizer={"type": "Metaspace"}), '"Metaspace"'),
    "byte_fallback": (change_model(byte_fallback=True), "byte_fallback true"),
    "ignore_merges": (change_model(ignore_merges=True), "ignore_merges true"),
    "dropout": (change_model(dropout=0.1), "dropout 0.1"),
    "prefix": (change_model(continuing_subword_prefix="##"), 'continuing_subword_prefix "##"'),
    "suffix": (change_model(end_of_word_suffix="</w>"), 'end_of_word_suffix "</w>"'),
    "WordPiece": (change_model(type="WordPiece"), 'has model.type "WordPiece"'),
    "Unigram": (change_model(type="Unigram", vocab=[["a", -1.0]]), 'has model.type "Unigram"'),
    "a token before the text": (bos_first, 'post_processor {"type": "TemplateProcessing"'),
    "Roberta": (
        change_part(post_processor={"type": "RobertaProcessing", "sep": ["</s>", 1]}),
        'post_processor {"type": "RobertaProcessing"',
    ),
    "a byte missing": (without_token("a"), "has no token 'a'"),
    "no end-of-text": (end_is_another_token, "no token '<|endoftext|>'"),
    "ids against the merges": (
        swap_merges,
        "merge 1 is 'Ġt h', but the ids of the tokens need 'Ġ B'",
    ),
    "a merge's token missing": (without_token("Ġtask"), "has no token 'Ġtask'"),
    "two ids moved": (renumber(Ġta=257, ĠB=270), "has id 257 where 256 should follow"),
    "a gap": (shift, "has id 301 where 300 should follow"),
    "one id twice": (renumber(a=BYTE_A + 1), "has id 65 where 64 should follow"),
    "negative": (renumber(a=-1), "token 'a' has id -1 where 0 should follow"),
    "an id that is no integer": (renumber(a="64"), "token 'a' has the id '64'"),
    "a word without a merge": (renumber(more=364), "token 'more' (id 364) is a word that no merge"),
    "a merge never used": (unreachable_merge, "is 'z qj', but the ids of the tokens need 'zq j'"),
    "an added token of the BPE": (
        change_part(added_tokens=[added_token("a", BYTE_A)]),
        "token 'a' (id 64) is both",
    ),
    "an end with two ids": (
        change_part(added_tokens=[added_token(END_OF_TEXT, 400)]),
        "token '<|endoftext|>' has id 400 where 364 should follow",
    ),
    "no model": (lambda content: content.pop("model"), "KeyError: 'model'"),
    "a model that is a list": (change_part(model=[]), "not a file of the tokenizers library"),
    "no vocabulary": (lambda content: content["model"].pop("vocab"), "KeyError: 'vocab'"),
    "merges of three": (change_model(merges=["a b c"]), "not a file of the tokenizers library"),
    "merges that are numbers": (change_model(merges=[1, 2]), "not a file of the tokenizers"),
    "an added token without an id": (
        change_part(added_tokens=[{"content": "x"}]),
        "not a file of the tokenizers library",
    ),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_a_tokenizer_json_that_differs_from_gpt2_is_refused_by_name(tmp_path, change, message):
    content = json_content(*parts_of(tiny_tokenizer()))
    change(content)
    line = error_of(load_tokenizer, write_json(tmp_path, content))
    assert line.startswith(f"{tmp_path / 'tokenizer.json'}: ")
    assert message in line


@pytest.mark.parametrize("content", ["", "[]", "null", '{"model": ', "[" * 100_000, "{}"])
def test_a_damaged_tokenizer_json_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    line = error_of(load_tokenizer, tmp_path)
    assert line.startswith(f"{tmp_path / 'tokenizer.json'}: ") and "fetch tokenizer.json" in line


@pytest.mark.parametrize("field", ["add_prefix_space", "add_bos_token"])
@pytest.mark.parametrize("layout", ["pair", "json"])
def test_a_tokenizer_config_that_changes_the_tokens_is_refused(tmp_path, field, layout):
    parts = parts_of(tiny_tokenizer())
    if layout == "pair":
        write_pair(tmp_path, *parts)
    else:
        write_json(tmp_path, json_content(*parts))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({field: False, "tokenizer_class": "GPT2Tokenizer"}))
    assert same_tokenizer(load_tokenizer(tmp_path), tiny_tokenizer())
    path.write_text(json.dumps({field: True}))
    assert error_of(load_tokenizer, tmp_path).startswith(f"{path}: {field} is True")
    path.write_text("[]")
    assert error_of(load_tokenizer, tmp_path).startswith(f"{path}: must be a JSON object")


# --- Which files ---

OTHER_FILES = [
    ["tokenizer.model"],
    ["spiece.model"],
    ["sentencepiece.bpe.model"],
    ["vocab.txt"],
    ["encoder.json", "vocab.bpe"],
    ["tokenizer_config.json"],
    ["added_tokens.json"],
    ["special_tokens_map.json"],
    ["gpt2.tiktoken"],
]


@pytest.mark.parametrize("names", OTHER_FILES, ids=" ".join)
def test_tokenizer_files_of_another_kind_are_refused_by_name(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("{}")
    line = error_of(load_tokenizer, tmp_path)
    assert line.startswith(f"{tmp_path}: can't read a tokenizer from {', '.join(names)}; ")
    assert "tokenizer.json" in line and "vocab.json and merges.txt" in line


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_half_of_a_pair_of_files_is_refused(tmp_path, missing):
    write_pair(tmp_path, *parts_of(tiny_tokenizer()))
    (tmp_path / missing).unlink()
    line = error_of(load_tokenizer, tmp_path)
    assert line.startswith(f"{tmp_path / missing}: can't be read")


def test_a_tokenizer_json_takes_precedence_over_a_pair_of_files(tmp_path):
    """As in transformers."""
    ids, merges = parts_of(tiny_tokenizer())
    write_json(tmp_path, json_content(ids, merges))
    write_pair(tmp_path, {"a": 0}, [])
    assert same_tokenizer(load_tokenizer(tmp_path), tiny_tokenizer())


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_a_git_lfs_pointer_in_place_of_a_tokenizer_file_is_one_line(tmp_path, name):
    ids, merges = parts_of(tiny_tokenizer())
    write_pair(tmp_path, ids, merges)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / name).write_text(pointer)
    fix = "is a git-lfs pointer, not the file itself; run `git lfs pull`"
    assert error_of(load_tokenizer, tmp_path) == f"{tmp_path / name}: {fix}"


# --- Numbering ---


def gpt2_parts(shared):
    ids = json.loads((shared / "gpt2-bpe" / "encoder.json").read_text(encoding="utf-8"))
    text = (shared / "gpt2-bpe" / "vocab.bpe").read_text(encoding="utf-8")
    return ids, text.split("\n")[1:-1]


NUMBERINGS = {
    "end first": {"first": [END_OF_TEXT], "last": []},
    "special tokens first": {"first": ["<s>", "<pad>", "</s>", "<unk>", END_OF_TEXT], "last": []},
    "special tokens in the middle": {
        "first": ["[PAD]"],
        "after_bytes": ["<|user|>", "<|システム|>"],
    },
    "special tokens before the end": {"last": ["<pad>", "<sep>", END_OF_TEXT]},
    "special tokens after the end": {"last": [END_OF_TEXT, "<pad>", "<sep>"]},
    "end first, special tokens last": {"first": [END_OF_TEXT], "last": ["<pad>", "<sep>"]},
}


@pytest.fixture(params=["GPT-2", "demo", *NUMBERINGS])
def parts(request):
    """The ids and merges of a tokenizer."""
    if request.param == "GPT-2":
        return gpt2_parts(request.getfixturevalue("shared"))
    if request.param == "demo":
        return parts_of(load_tokenizer(TOKENIZER_DIR))
    return parts_of(tiny_tokenizer(), **NUMBERINGS[request.param])


@pytest.mark.parametrize("layout", ["pair", "json"])
def test_ids_and_end_survive_loading_and_saving_in_ours_and_in_transformers(
    tmp_path, parts, layout
):
    ids, merges = parts
    special = {token: i for token, i in ids.items() if token[0] in "<[" and len(token) > 2}
    special = {token: i for token, i in special.items() if token[-1] in ">]"}
    first, second = tmp_path / "first", tmp_path / "second"
    if layout == "pair":
        write_pair(first, ids, merges)
    else:
        write_json(first, json_content(ids, merges, special))
    n_dropped = sum(
        i > max(ids[END_OF_TEXT], ids["".join(merges[-1].split())]) for i in ids.values()
    )
    if n_dropped and layout == "pair":
        kept = {token: i for token, i in ids.items() if i < len(ids) - n_dropped}
        write_pair(first, kept, merges, added={t: i for t, i in ids.items() if t not in kept})
    tokenizer, dropped = read_tokenizer(first)
    assert dropped == ["<pad>", "<sep>"][:n_dropped]
    assert tokenizer.eot_token == ids[END_OF_TEXT]
    kept = {token: i for token, i in ids.items() if token not in dropped}
    assert tokenizer.n_vocab == len(kept)

    model = GPT(Config(1, 8, 2, tokenizer.n_vocab, 32, 0.0)).init_weights(0)
    save(model, second, tokenizer.eot_token)
    for name, text in zip(("vocab.json", "merges.txt"), tokenizer_files(tokenizer)):
        (second / name).write_text(text, encoding="utf-8")
    assert json.loads((second / "vocab.json").read_text(encoding="utf-8")) == kept
    config = json.loads((second / "config.json").read_text())
    assert config["bos_token_id"] == config["eos_token_id"] == ids[END_OF_TEXT]
    again, loaded_tokenizer = load_model(second, CPU)
    assert same_tokenizer(loaded_tokenizer, tokenizer)
    assert loaded_tokenizer.eot_token == ids[END_OF_TEXT]
    assert torch.equal(again.wte.weight, model.wte.weight)

    transformers = pytest.importorskip("transformers")
    sources = [first, second]
    if layout == "pair" or n_dropped == 0:
        (first / "config.json").write_text(json.dumps(config))
    else:
        sources = [second]
    for source in sources:
        classes = [transformers.AutoTokenizer, transformers.GPT2Tokenizer]
        if transformers.__version__ < "5" and not (source / "vocab.json").exists():
            classes.pop()  # it reads vocab.json only
        for cls in classes:
            theirs = cls.from_pretrained(source)
            assert theirs.eos_token_id == ids[END_OF_TEXT]
            for text in TEXTS[:4] + TEXTS[5:]:
                tokens = tokenizer.encode_ordinary(text)
                assert theirs.encode(text) == tokens
                assert theirs.decode(tokens, clean_up_tokenization_spaces=False) == text
            assert theirs.convert_tokens_to_ids(list(kept)) == list(kept.values())


def test_end_of_text_with_id_0_ends_a_response_of_the_command(tmp_path, monkeypatch):
    """The directory has only what transformers 5 saves, and there is no network."""
    ids, merges = parts_of(tiny_tokenizer(), first=[END_OF_TEXT], last=[])
    directory = write_json(tmp_path, json_content(ids, merges))
    config = replace(talker_config(), vocab_size=len(ids))
    write_checkpoint(directory, config)
    tokenizer, hf = load_tokenizer(directory), transformers_model(config)
    request = tokenizer.encode_ordinary(fill_template("Write a task.", ""))
    tokens = greedy_by_transformers(hf, request, 20, eos_token_id=0)
    options = ["--instruction", "Write a task.", "--greedy", "--max-new", "20", "--json"]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    process = call_command(sampling.main, directory, *options)
    assert process.returncode == 0, process.stderr
    record = json.loads(process.stdout)
    assert record["ids"] == tokens
    assert record["text"] == tokenizer.decode([token for token in tokens if token != 0])


# --- More rows of the embedding than tokens ---


DROPPED = "embedding rows after the tokenizer's {} tokens are dropped"


def write_model(directory, n_rows, config=TINY):
    """A checkpoint with so many embedding rows."""
    config = replace(config, vocab_size=n_rows, n_positions=400)
    return write_checkpoint(directory, config), config


@pytest.mark.parametrize("n_extra", [0, 1, 21, 1_024])
def test_rows_after_the_tokenizer_s_are_dropped_and_reported_once(tmp_path, capsys, n_extra):
    n = tiny_tokenizer().n_vocab
    directory, config = write_model(tmp_path / "model", n + n_extra)
    write_json(directory, json_content(*parts_of(tiny_tokenizer())))
    model, tokenizer = load_model(directory, CPU)
    assert model.config.vocab_size == len(model.wte.weight) == tokenizer.n_vocab == n
    assert torch.equal(model.wte.weight, stored_weights(config)["wte.weight"][:n])
    assert model.wte.weight.untyped_storage().nbytes() == 4 * model.wte.weight.numel()
    load_model(directory, CPU)
    line = f"{directory}: {DROPPED.format(364)}: {n_extra:,} rows of padding\n"
    assert capsys.readouterr().err == (line if n_extra else "")
    n_parameters = model.n_parameters()
    assert count_parameters(directory) == n_parameters
    assert [m.size for m in open_models([str(directory)]).values()] == [n_parameters]
    assert known_parameters(directory) == n_parameters


@pytest.mark.parametrize("layout", ["pair", "json"])
def test_added_tokens_are_dropped_with_their_rows_and_reported_by_name(tmp_path, capsys, layout):
    ids, merges = parts_of(tiny_tokenizer())
    n = len(ids)
    directory, config = write_model(tmp_path / "model", n + 20)
    added = {"<pad>": n, "hello": n + 1}
    if layout == "pair":
        write_pair(directory, ids, merges, added)
    else:
        write_json(directory, json_content(ids, merges, {END_OF_TEXT: n - 1} | added))
    model, tokenizer = load_model(directory, CPU)
    assert same_tokenizer(tokenizer, tiny_tokenizer())
    assert torch.equal(model.wte.weight, stored_weights(config)["wte.weight"][:n])
    rows = "added token '<pad>', added token 'hello', 18 rows of padding"
    assert capsys.readouterr().err == f"{directory}: {DROPPED.format(364)}: {rows}\n"
    # A model of the same tokens without either is a teacher or student for it.
    other, _ = write_model(tmp_path / "other", n)
    write_pair(other, ids, merges)
    check_same_vocabulary("a", "b", tokenizer, find_model(other)[1])


def test_a_model_without_a_tokenizer_may_be_padded_but_not_be_of_another_one(
    tmp_path, shared, monkeypatch, capsys
):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "gpt2-bpe" / "tiktoken-cache"))
    config = replace(TINY, n_embd=4, n_head=1)
    directory, _ = write_model(tmp_path / "a", 50_304, config)
    assert load_model(directory, CPU)[0].config.vocab_size == 50_257
    line = f"{directory}: {DROPPED.format('50,257')}: 47 rows of padding\n"
    assert capsys.readouterr().err == line
    for n_rows in (50_256, 52_000, 61):
        directory, _ = write_model(tmp_path / "b", n_rows, config)
        line = error_of(find_model, directory)
        assert line.startswith(
            f"{directory}: the model has {n_rows} tokens and its tokenizer 50257"
        )
        assert "vocab.json" in line and "tokenizer.json" in line


@pytest.mark.parametrize("n_rows", [363, 364 + 1_025])
def test_a_tokenizer_of_another_model_is_refused(tmp_path, n_rows):
    directory, _ = write_model(tmp_path, n_rows)
    write_pair(directory, *parts_of(tiny_tokenizer()))
    line = error_of(find_model, directory)
    assert f"{directory}: the model has {n_rows} tokens and its tokenizer 364; put the" in line


# --- Saved again by transformers ---


@pytest.mark.parametrize("place", ["the same directory", "another directory"])
@pytest.mark.parametrize("change", ["nothing", "a pad token"])
def test_a_checkpoint_of_ours_loads_after_transformers_has_saved_it(tmp_path, place, change):
    transformers = pytest.importorskip("transformers")
    ids, merges = parts_of(tiny_tokenizer(), first=[END_OF_TEXT], last=[])
    ours, config = write_model(tmp_path / "best", len(ids))
    write_pair(ours, ids, merges)
    expected, tokenizer = load_model(ours, CPU)
    save(expected, ours, tokenizer.eot_token)
    theirs = ours if place == "the same directory" else tmp_path / "theirs"
    hf = transformers.AutoModelForCausalLM.from_pretrained(ours).eval()
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(ours)
    if change == "a pad token":
        hf_tokenizer.add_special_tokens({"pad_token": "<pad>"})
        hf.resize_token_embeddings(len(hf_tokenizer), mean_resizing=False)
    hf.save_pretrained(theirs)
    hf_tokenizer.save_pretrained(theirs)
    if place == "another directory":
        assert (theirs / "tokenizer.json").exists()
        if transformers.__version__ >= "5":
            assert not (theirs / "vocab.json").exists()
    model, again = load_model(theirs, CPU)
    assert same_tokenizer(again, tokenizer) and again.eot_token == 0
    assert model.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_training_drops_the_rows_of_both_models_and_saves_the_student_without_them(
    tmp_path, monkeypatch
):
    ids, merges = parts_of(tiny_tokenizer(), first=[END_OF_TEXT], last=[])
    n = len(ids)
    teacher, config = write_model(tmp_path / "teacher", n + 20)
    write_pair(teacher, ids, merges)
    student, _ = write_model(tmp_path / "student", n + 1)
    special = {END_OF_TEXT: 0, "<pad>": n}
    write_json(student, json_content(ids, merges, special))
    row = {"instruction": "Write a task.", "output": "task"}
    for name in ("train", "dev"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", [row] * 2)
    options = ["--method", "kd", "--sft-teacher", teacher, "--student", student]
    options += ["--data", tmp_path / "data", "--out", tmp_path / "out", "--steps", "1"]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    process = call_command(train.main, *options)
    assert process.returncode == 0, process.stderr
    for directory, rows in [(teacher, "20 rows of padding"), (student, "added token '<pad>'")]:
        assert process.stderr.count(f"{directory}: {DROPPED.format(n)}: {rows}\n") == 1
    best = next((tmp_path / "out").glob("kd-*")) / "best"
    saved = json.loads((best / "config.json").read_text())
    assert saved["vocab_size"] == n and saved["eos_token_id"] == saved["bos_token_id"] == 0
    assert json.loads((best / "vocab.json").read_text(encoding="utf-8")) == ids
    assert load_model(best, CPU)[0].wte.weight.shape == (n, config.n_embd)
