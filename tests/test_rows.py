"""Rows of text to batches of tokens, against GPT-2's published tokenizer, the paper's data and plain loops."""

import json
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import tiktoken
import torch
from helpers import tiny_tokenizer

from data import tokenizer as tokenizer_module
from data.cli import InputError
from data.demo import TOKENIZER_DIR
from data.rows import (
    Example,
    Row,
    encode_request,
    encode_training_rows,
    epoch_order,
    fill_template,
    make_batch,
    micro_batches,
    packed_blocks,
    pad,
    read_jsonl,
    read_rows,
    read_texts,
)
from data.tokenizer import END, load_tokenizer, tokenizer_files

CPU = torch.device("cpu")
HEADER = "### Response:\n"
NASTY = [
    "",
    " ",
    "\n",
    "\r\n",
    "a\r\nb\r\n",
    "  two  spaces  ",
    "\t\ttabs",
    "naïve café Größe",
    "日本語のテキスト、大きさ。",
    "中文字符测试",
    "한국어",
    "العربية",
    "👍🏽👨‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301\u0327",
    "\u2028\u2029\x85",
    "\0\x01\x7f\x80\xa0\xad",
    "\ufeffmark",
    "'s 'LL don't I'VE",
    "1234567890 3.14159",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "<|endoftext|><|endoftext|>",
    "<|im_start|>",
    "!!!???...---===",
    "x" * 3000,
    "\ud800",
    "a\udc00b",
    "\ud83d and no more",
    "ﷺ𝕬\U0010ffff",
    "### Response:\n",
    "\n\n\n \n",
]


def error_of(function, *arguments, **options):
    """The message of the InputError that a call must raise; it must be one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 400
    return message


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def gpt2(shared):
    """GPT-2's tokenizer as OpenAI publishes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "gpt2-bpe" / "tiktoken-cache"))
        return tiktoken.get_encoding("gpt2")


@pytest.fixture(scope="module")
def gpt2_directory(shared, tmp_path_factory):
    """The same vocabulary under Hugging Face's file names."""
    directory = tmp_path_factory.mktemp("gpt2")
    shutil.copy(shared / "gpt2-bpe" / "encoder.json", directory / "vocab.json")
    shutil.copy(shared / "gpt2-bpe" / "vocab.bpe", directory / "merges.txt")
    return directory


@pytest.fixture(scope="module")
def tokenizer(gpt2_directory):
    return load_tokenizer(gpt2_directory)


@pytest.fixture(scope="module")
def dolly(shared):
    return {
        split: jsonl(shared / "data" / "dolly" / f"{split}.jsonl")
        for split in ("train", "dev", "valid")
    }


# ---- the tokenizer ---------------------------------------------------------------------------------------------------------


def test_vocab_and_merges_give_the_published_tokens_on_all_of_dolly_dev(tokenizer, gpt2, dolly):
    texts = [
        row[field] for row in dolly["dev"] for field in ("instruction", "input", "output", "prompt")
    ]
    assert len(texts) == 4000 and len(set(texts)) > 2500
    assert tokenizer.encode_ordinary_batch(texts) == gpt2.encode_ordinary_batch(texts)


@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text)[:30])
def test_nasty_texts_give_the_published_tokens_and_come_back(tokenizer, gpt2, text):
    tokens = tokenizer.encode_ordinary(text)
    assert tokens == gpt2.encode_ordinary(text)
    assert tokenizer.decode(tokens) == text.encode("utf-16", "surrogatepass").decode(
        "utf-16", "replace"
    )
    assert tokenizer.eot_token not in tokens


def test_the_vocabulary_is_the_published_one(tokenizer, gpt2):
    assert (
        tokenizer.n_vocab == gpt2.n_vocab == 50257
        and tokenizer.eot_token == gpt2.eot_token == 50256
    )
    assert all(
        tokenizer.decode_single_token_bytes(n) == gpt2.decode_single_token_bytes(n)
        for n in range(50257)
    )
    assert tokenizer.decode([50256]) == END


def test_the_paper_s_prompt_text_is_seven_tokens(tokenizer):
    tokens = tokenizer.encode_ordinary("Suppose you are a student.")
    assert [tokenizer.decode([token]) for token in tokens] == [
        "Supp",
        "ose",
        " you",
        " are",
        " a",
        " student",
        ".",
    ]


def test_tokenizer_files_are_the_published_files(tokenizer, gpt2, shared):
    for each in (tokenizer, gpt2):
        vocab, merges = tokenizer_files(each)
        assert json.loads(vocab) == json.loads(
            (shared / "gpt2-bpe" / "encoder.json").read_text(encoding="utf-8")
        )
        assert merges == (shared / "gpt2-bpe" / "vocab.bpe").read_text(encoding="utf-8")


def write_files(directory, vocab, merges):
    directory.mkdir(exist_ok=True)
    (directory / "vocab.json").write_text(vocab, encoding="utf-8", newline="")
    (directory / "merges.txt").write_text(merges, encoding="utf-8", newline="")
    return directory


def test_written_files_read_back_as_the_same_tokenizer_here_and_elsewhere(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    text = "Below is an instruction that describes a task, naïvely 大きさ\r\n  the past of “sees”"
    for n, made in enumerate([tiny_tokenizer(), load_tokenizer(TOKENIZER_DIR)]):
        directory = write_files(tmp_path / str(n), *tokenizer_files(made))
        read = load_tokenizer(directory)
        theirs = tokenizers.ByteLevelBPETokenizer.from_file(
            str(directory / "vocab.json"), str(directory / "merges.txt")
        )
        assert made.encode_ordinary(text) == read.encode_ordinary(text) == theirs.encode(text).ids
        assert (
            read.n_vocab == made.n_vocab == theirs.get_vocab_size()
            and theirs.token_to_id(END) == read.eot_token
        )
        assert tokenizer_files(read) == tokenizer_files(made)


def test_crlf_and_a_missing_version_line_and_last_newline_are_fine(tmp_path):
    vocab, merges = tokenizer_files(tiny_tokenizer())
    lines = merges.split("\n")[1:-1]
    for n, text in enumerate(
        ["\n".join(lines), "\r\n".join(["#version: 0.2", *lines, ""]), merges + "\n\n"]
    ):
        assert tokenizer_files(load_tokenizer(write_files(tmp_path / str(n), vocab, text))) == (
            vocab,
            merges,
        )


def broken_pairs():
    """Pairs of files that can't be a GPT-2 tokenizer."""
    vocab, merges = tokenizer_files(tiny_tokenizer())
    numbers, lines = json.loads(vocab), merges.split("\n")
    swapped = numbers | {"Ġi": numbers["Ġa"], "Ġa": numbers["Ġi"]}
    without_end = {token: number for token, number in numbers.items() if token != END}
    yield "two numbers swapped", json.dumps(swapped), merges
    yield "a merge left out", vocab, "\n".join(lines[:5] + lines[6:])
    yield "two merges swapped", vocab, "\n".join([*lines[:3], lines[4], lines[3], *lines[5:]])
    yield "a merge too many", vocab, merges + "q z\n"
    yield "a token too many", json.dumps(numbers | {"qz": len(numbers)}), merges
    yield "no end-of-text", json.dumps(without_end), merges
    yield (
        "end-of-text first",
        json.dumps({END: 0} | {token: number + 1 for token, number in without_end.items()}),
        merges,
    )
    yield (
        "a letter that stands for no byte",
        json.dumps(without_end | {"€a": len(without_end), END: len(numbers)}),
        merges + "€ a\n",
    )
    yield (
        "the same merge twice",
        json.dumps(without_end | {"Ġa": len(without_end), END: len(numbers)}),
        merges + "Ġ a\n",
    )
    yield (
        "a merge of parts that are no tokens",
        json.dumps(without_end | {"qzqz": len(without_end), END: len(numbers)}),
        merges + "qz qz\n",
    )
    yield "a list", "[]", merges
    yield "no JSON", vocab[:-20], merges
    yield (
        "numbers as text",
        json.dumps({token: str(number) for token, number in numbers.items()}),
        merges,
    )
    yield "nested", "[" * 100_000, merges


def test_files_that_contradict_each_other_are_refused(tmp_path):
    accepted = []
    for what, vocab, merges in broken_pairs():
        try:
            load_tokenizer(write_files(tmp_path / what, vocab, merges))
            accepted.append(what)
        except InputError as error:
            assert "vocab.json" in str(error) and "\n" not in str(error)
        except Exception as error:
            accepted.append(f"{what}: {type(error).__name__}")
    assert accepted == []


def test_missing_merges_and_files_that_are_not_utf8_are_refused(tmp_path):
    vocab, merges = tokenizer_files(tiny_tokenizer())
    write_files(tmp_path, vocab, merges)
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\n\xff\xfe a\n")
    assert "merges.txt" in error_of(load_tokenizer, tmp_path)
    (tmp_path / "merges.txt").unlink()
    assert "merges.txt" in error_of(load_tokenizer, tmp_path)


def test_without_files_the_tokenizer_is_gpt2_s(gpt2, tmp_path):
    assert load_tokenizer() is gpt2 and load_tokenizer(tmp_path) is gpt2


def test_a_gpt2_tokenizer_that_can_t_be_downloaded_is_one_line(monkeypatch):
    def fail(name):
        raise ConnectionError("a long\nstory")

    monkeypatch.setattr(tokenizer_module.tiktoken, "get_encoding", fail)
    assert "TIKTOKEN_CACHE_DIR" in error_of(load_tokenizer)


# ---- the template ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, count",
    [
        ("dolly/train", 11435),
        ("dolly/dev", 1000),
        ("dolly/valid", 500),
        ("self-inst/valid", 242),
        ("vicuna/valid", 80),
    ],
)
def test_the_template_gives_the_prompt_of_every_published_row(shared, file, count):
    published = jsonl(shared / "data" / f"{file}.jsonl")
    read = read_rows(shared / "data" / f"{file}.jsonl")
    assert len(published) == len(read) == count
    assert [fill_template(row.instruction, row.input) for row in read] == [
        row["prompt"] for row in published
    ]


def test_the_template_takes_its_texts_as_they_are():
    assert fill_template("{input} %s", "{instruction}").endswith(
        "### Instruction:\n{input} %s\n\n### Input:\n{instruction}\n\n" + HEADER
    )
    assert "Input" not in fill_template("x", "") and "further context" not in fill_template("x")


# ---- JSON lines ------------------------------------------------------------------------------------------------------------

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}


def write_bytes(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n',
        b'{"a": 1}\r\n{"a": 2}\r\n',
        b'{"a": 1}\n{"a": 2}',
        b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}',
        b' \t{"a": 1} \n  {"a" :2}\n',
    ],
)
def test_byte_order_mark_crlf_and_a_missing_last_newline_are_fine(tmp_path, content):
    assert read_jsonl(write_bytes(tmp_path / "x", content)) == [{"a": 1}, {"a": 2}]


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    assert read_jsonl(
        write_bytes(tmp_path / "x", json.dumps({"a": text}, ensure_ascii=False) + "\n")
    ) == [{"a": text}]
    path = write_bytes(
        tmp_path / "y", '{"instruction": "a\u2028b\u2029c\x85d", "output": "x"}\n' * 2
    )
    assert [row.instruction for row in read_rows(path)] == ["a\u2028b\u2029c\x85d"] * 2


@pytest.mark.parametrize(
    "line, what",
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b"[1, 2]", "no JSON object"),
        (b'"text"', "no JSON object"),
        (b"17", "no JSON object"),
        (b"null", "empty"),
        (b"true", "no JSON object"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": "\xff"}', "UTF-8"),
        ('{"a": "é"}'.encode("latin-1"), "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1}{"a": 2}', "not JSON"),
        (b'{"a": "tab\there"}', "not JSON"),
        (b"[" * 100_000, "nested"),
        (b'{"a": ' * 100_000, "nested"),
        (b'\xef\xbb\xbf{"a": 1}', "JSON"),
        (b'{"a": 1' + b"0" * 10_000 + b"}", "not JSON"),
        (b"\0", "not JSON"),
    ],
)
def test_a_line_that_is_no_object_is_named_with_file_and_line(tmp_path, line, what):
    path = write_bytes(tmp_path / "rows.jsonl", b'{"a": 1}\n{"a": 2}\n' + line + b'\n{"a": 4}\n')
    message = error_of(read_jsonl, path)
    assert message.startswith(f"{path}, line 3: ") and what in message


def test_a_last_line_that_was_cut_off_is_named(tmp_path):
    path = write_bytes(tmp_path / "x", (json.dumps(GOOD) + "\n") * 4 + json.dumps(GOOD)[:-9])
    assert f"{path}, line 5: " in error_of(read_rows, path)
    write_bytes(
        path, (json.dumps(GOOD | {"output": "é"}, ensure_ascii=False) + "\n").encode()[:-4]
    )  # in the middle of a character
    assert f"{path}, line 1: " in error_of(read_rows, path)


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n", b"\n\n"])
def test_a_file_without_rows_is_named(tmp_path, content):
    assert str(tmp_path / "x") in error_of(read_rows, write_bytes(tmp_path / "x", content))


def test_a_file_that_is_not_there_or_is_a_folder_is_named(tmp_path):
    assert str(tmp_path / "none.jsonl") in error_of(read_rows, tmp_path / "none.jsonl")
    assert str(tmp_path) in error_of(read_rows, tmp_path)


def test_a_line_of_ten_megabytes_is_read(tmp_path):
    path = write_bytes(tmp_path / "x", json.dumps(GOOD | {"output": "long " * 2_000_000}) + "\n")
    assert len(read_rows(path)[0].references[0]) == 10_000_000
    message = error_of(
        read_rows,
        write_bytes(path, json.dumps(GOOD | {"output": {"x": "long " * 2_000_000}}) + "\n"),
    )
    assert "line 1" in message


def test_rows_have_their_fields_and_their_place_in_the_file(tmp_path):
    objects = [
        GOOD,
        {"instruction": "x", "output": ["a", "b", "a"]},
        {"instruction": "x", "input": None, "output": "", "topic": 5, "prompt": [1]},
        {"instruction": "x", "input": "", "output": "y", "ids": [3, 0, 7]},
    ]
    path = write_bytes(tmp_path / "x", "".join(json.dumps(value) + "\n" for value in objects))
    wanted = [
        Row(0, "Add.", "1 2", ("3",)),
        Row(1, "x", "", ("a", "b", "a")),
        Row(2, "x", "", ("",)),
        Row(3, "x", "", ("y",), (3, 0, 7)),
    ]
    assert read_rows(path) == wanted
    assert read_rows(path, limit=2) == wanted[:2] and read_rows(path, limit=99) == wanted


@pytest.mark.parametrize(
    "field, value",
    [
        *(("instruction", value) for value in (None, 5, 1.5, True, [], ["x"], {}, "absent")),
        *(("input", value) for value in (0, 5, False, [], ["x"], {})),
        *(
            ("output", value)
            for value in (
                None,
                5,
                0,
                True,
                [],
                {},
                {"text": "x"},
                ["x", 5],
                ["x", None],
                [["x"]],
                "absent",
            )
        ),
        *(
            ("ids", value)
            for value in (5, "1 2", {}, [1.0], ["1"], [None], [True], [-1], [[1]], [1, 2, -3])
        ),
    ],
)
def test_a_field_of_a_wrong_type_is_named_with_file_and_line(tmp_path, field, value):
    bad = {key: text for key, text in (GOOD | {field: value}).items() if text != "absent"}
    path = write_bytes(
        tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in [GOOD, GOOD, bad, GOOD])
    )
    message = error_of(read_rows, path)
    assert message.startswith(f"{path}, line 3: '{field}'")
    assert (
        error_of(read_rows, path, limit=1) == message
    )  # rows that are left out are checked as well


def test_a_wrong_field_s_value_is_shown_in_short_and_on_one_line(tmp_path):
    for value in ["two\nlines" * 50, {"deep": "x" * 1000}]:
        path = write_bytes(tmp_path / "x", json.dumps(GOOD | {"ids": [value]}) + "\n")
        assert len(error_of(read_rows, path).removeprefix(str(path))) < 120


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path, tokenizer):
    path = write_bytes(tmp_path / "x", '{"instruction": "a\\ud800b", "output": "\\udfff"}\n')
    example = encode_training_rows(read_rows(path), tokenizer)[0]
    assert (
        tokenizer.decode(example.request).count("a\ufffdb") == 1
        and tokenizer.decode(example.response[:-1]) == "\ufffd"
    )


def test_nesting_that_json_can_just_read_still_gives_one_line(tmp_path):
    for depth in [*range(700, 1000, 7), 2000, 5000]:
        path = write_bytes(
            tmp_path / "x", '{"instruction": "x", "output": ' + "[" * depth + "]" * depth + "}\n"
        )
        assert "line 1" in error_of(read_rows, path)


def test_rows_without_output_are_fine_where_none_is_needed(tmp_path):
    path = write_bytes(
        tmp_path / "x", '{"instruction": "x"}\n{"instruction": "y", "output": "z"}\n'
    )
    assert [row.references for row in read_rows(path, needs_output=False)] == [(), ("z",)]
    write_bytes(path, '{"instruction": "x", "output": 5}\n')
    assert "'output'" in error_of(read_rows, path, needs_output=False)


# ---- text corpora -----------------------------------------------------------------------------------------------------------

BOM = b"\xef\xbb\xbf"


def test_the_texts_of_json_lines_are_their_field_text(tmp_path):
    """Blank lines inside a text do not end it, and an empty one is one."""
    texts = ["one", "two\n\nof two paragraphs", "", "größer 大"]
    content = "".join(
        json.dumps({"text": text, "url": 5}, ensure_ascii=False) + "\n" for text in texts
    )
    for mark in (b"", BOM):
        assert read_texts(write_bytes(tmp_path / "x.jsonl", mark + content.encode())) == texts
    assert (
        read_texts(str(tmp_path / "x.jsonl"), limit=2) == texts[:2]
        and read_texts(tmp_path / "x.jsonl", limit=99) == texts
    )


@pytest.mark.parametrize(
    "content",
    [
        "one\n\ntwo\nof two lines\n\ngrößer {大",
        "one\r\n\r\ntwo\r\nof two lines\r\n\r\ngrößer {大",
        "\n\none\n\n\n\ntwo\nof two lines\n\n \n\ngrößer {大\n\n",
    ],
)
@pytest.mark.parametrize("name", ["corpus.txt", "corpus"])
def test_the_documents_of_a_text_file_are_separated_by_blank_lines(tmp_path, content, name):
    for mark in (b"", BOM):
        path = write_bytes(tmp_path / name, mark + content.encode())
        assert read_texts(path) == ["one", "two\nof two lines", "größer {大"]
        assert read_texts(path, limit=2) == ["one", "two\nof two lines"]


def test_a_text_file_of_nothing_has_no_texts(tmp_path):
    for content in ("", "\n\n\n", BOM):
        assert read_texts(write_bytes(tmp_path / "x.txt", content)) == []


@pytest.mark.parametrize("value", [None, 5, True, ["one"], {"text": "one"}, "absent"])
def test_a_text_that_is_none_is_named_with_file_and_line(tmp_path, value):
    bad = {} if value == "absent" else {"text": value}
    path = write_bytes(
        tmp_path / "x.jsonl",
        "".join(
            json.dumps(line) + "\n" for line in [{"text": "a"}, {"text": "b"}, bad, {"text": "c"}]
        ),
    )
    assert error_of(read_texts, path).startswith(
        f"{path}, line 3: 'text' must be a text, not {'null' if value == 'absent' else json.dumps(value)}"
    )


@pytest.mark.parametrize(
    "content, where",
    [
        (b'{"text": "a"}\n{"text": "\xff"}\n', ", line 2"),
        (b'{"text": "a"}\n{"text": \n', ", line 2"),
        (b"", ""),
    ],
)
def test_a_corpus_of_json_lines_that_cannot_be_read_is_named(tmp_path, content, where):
    path = write_bytes(tmp_path / "x.jsonl", content)
    assert error_of(read_texts, path).startswith(f"{path}{where}: ")


def test_a_text_file_that_is_not_utf8_is_named(tmp_path):
    path = write_bytes(tmp_path / "x.txt", "größer".encode("latin-1"))
    assert error_of(read_texts, path) == f"{path}: is not UTF-8; convert the file to UTF-8"


# ---- training examples -----------------------------------------------------------------------------------------------------


def test_request_and_response_are_encoded_apart(tokenizer):
    row = Row(0, "Say nothing.", "", ("\n\nfirst line",))
    example = encode_training_rows([row], tokenizer)[0]
    joined = tokenizer.encode_ordinary(fill_template("Say nothing.") + "\n\nfirst line")
    assert example.request[-1] == example.response[0] == tokenizer.encode_ordinary("\n")[0]
    assert [*example.request, *example.response] == [
        *tokenizer.encode_ordinary(fill_template("Say nothing.")),
        *tokenizer.encode_ordinary("\n\nfirst line"),
        50256,
    ]
    assert (
        len(joined) < len(example.request) + len(example.response) - 1
    )  # encoded together, a merge would cross the border


def test_special_token_text_in_a_row_is_ordinary_text(tokenizer):
    example = encode_training_rows(
        [Row(0, "What is <|endoftext|>?", END, (f"{END} ends a text{END}",))], tokenizer
    )[0]
    assert (
        50256 not in example.request
        and example.response.count(50256) == 1
        and example.response[-1] == 50256
    )
    assert tokenizer.decode(example.response[:-1]) == f"{END} ends a text{END}"


def test_dolly_s_training_rows_are_cut_at_512_and_none_is_dropped(tokenizer, gpt2, shared, dolly):
    rows = read_rows(shared / "data" / "dolly" / "train.jsonl")
    examples = encode_training_rows(rows, tokenizer)
    requests = gpt2.encode_ordinary_batch([row["prompt"] for row in dolly["train"]])
    responses = [
        [*tokens, 50256]
        for tokens in gpt2.encode_ordinary_batch([row["output"] for row in dolly["train"]])
    ]
    assert [example.index for example in examples] == list(range(11435))
    assert [example.request for example in examples] == requests
    assert [example.response for example in examples] == [
        response[: 512 - len(request)] for request, response in zip(requests, responses)
    ]
    cut = [len(request) + len(response) > 512 for request, response in zip(requests, responses)]
    assert sum(cut) == 198
    assert [
        example.response[-1] != 50256 for example in examples
    ] == cut  # a response that is cut off has no end-of-text
    assert (
        max(len(e.request) + len(e.response) for e in examples) == 512
        and max(len(e.request) for e in examples) == 256
    )
    assert (
        round(np.mean([len(request) for request in requests])) == 71
        and round(np.mean([len(response) for response in responses])) == 80
    )


def test_the_end_of_text_is_kept_exactly_where_it_fits():
    tokenizer = tiny_tokenizer()
    request = len(tokenizer.encode_ordinary(fill_template("x")))
    response = tokenizer.encode_ordinary("zqzqz")
    row = Row(0, "x", "", ("zqzqz",))
    assert len(response) == 5
    for room, wanted in [
        (7, [*response, tokenizer.eot_token]),
        (6, [*response, tokenizer.eot_token]),
        (5, response),
        (4, response[:4]),
        (0, []),
    ]:
        assert (
            encode_training_rows([row], tokenizer, max_length=request + room)[0].response == wanted
        )
    assert encode_training_rows([Row(0, "x", "", ("",))], tokenizer)[0].response == [
        tokenizer.eot_token
    ]


def test_rows_whose_request_is_over_the_limit_are_dropped():
    tokenizer = tiny_tokenizer()
    rows = [Row(n, "z" * n, "", ("y",)) for n in range(40)]
    lengths = [len(tokenizer.encode_ordinary(fill_template(row.instruction))) for row in rows]
    assert lengths == list(range(lengths[0], lengths[0] + 40))
    examples = encode_training_rows(rows, tokenizer, max_request=lengths[20])
    assert [example.index for example in examples] == list(
        range(21)
    )  # a request of just the limit stays


def test_sampled_tokens_are_preferred_to_their_text_and_stay_as_they_are():
    tokenizer = tiny_tokenizer()
    end = tokenizer.eot_token
    single = [tokenizer.encode_ordinary(letter)[0] for letter in " instruction"]
    assert len(tokenizer.encode_ordinary(" instruction")) < len(
        single
    )  # encoded again, it would have other tokens
    for ids in [single, [*single, end], [end], [], [end, 5, end]]:
        assert (
            encode_training_rows([Row(0, "x", "", (" instruction",), tuple(ids))], tokenizer)[
                0
            ].response
            == ids
        )
    request = len(tokenizer.encode_ordinary(fill_template("x")))
    cut = encode_training_rows(
        [Row(0, "x", "", ("",), (*single, end))], tokenizer, max_length=request + 4
    )[0]
    assert cut.response == single[:4]


def test_sampled_tokens_of_another_vocabulary_are_refused():
    tokenizer = tiny_tokenizer()
    good, bad = (
        Row(0, "x", "", ("y",), (tokenizer.n_vocab - 1,)),
        Row(6, "x", "", ("y",), (1, tokenizer.n_vocab, 1)),
    )
    assert encode_training_rows([good], tokenizer)[0].response == [tokenizer.n_vocab - 1]
    message = error_of(encode_training_rows, [good, bad], tokenizer)
    assert "row 7" in message and "'ids'" in message and str(tokenizer.n_vocab) in message


# ---- requests --------------------------------------------------------------------------------------------------------------

PROSE = "The quick brown fox, aged 12, doesn't jump; it “thinks” — naïvely.\n\nAnd then? "
TEXTS = [
    PROSE * 40,
    "word " * 900,
    "大きさを比べる。" * 90,
    "👍🏽👨‍👩‍👧‍👦" * 80,
    "é" * 900,
    "x" * 4000,
    "\n" * 900,
    " " * 2000,
    END * 200,
]


def test_a_request_within_the_limit_is_left_alone(tokenizer, dolly):
    for row in dolly["valid"]:
        assert encode_request(Row(0, row["instruction"], row["input"], ()), tokenizer) == (
            tokenizer.encode_ordinary(row["prompt"]),
            False,
        )


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[:20])
@pytest.mark.parametrize("limit", [60, 100, 256])
def test_a_long_input_is_shortened_at_its_end_and_the_header_stays(tokenizer, text, limit):
    tokens, shortened = encode_request(Row(0, "Sum this up.", text, ()), tokenizer, limit)
    request = tokenizer.decode(tokens, errors="strict")
    before, after = fill_template("Sum this up.", "\0").split("\0")
    assert shortened and request.startswith(before) and request.endswith(after)
    kept = request[len(before) : -len(after)]
    assert text.startswith(kept) and kept
    assert tokens == tokenizer.encode_ordinary(fill_template("Sum this up.", kept))
    assert (
        limit - 12 <= len(tokens) <= limit
    )  # as much as fits, but for a character of many tokens, or a run of one letter


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[:20])
def test_a_long_instruction_is_shortened_where_there_is_no_input(tokenizer, text):
    tokens, shortened = encode_request(Row(0, text, "", ()), tokenizer)
    request = tokenizer.decode(tokens, errors="strict")
    before, after = fill_template("\0").split("\0")
    assert shortened and request.startswith(before) and request.endswith(after)
    kept = request[len(before) : -len(after)]
    assert text.startswith(kept) and 244 <= len(tokens) <= 256


def test_the_instruction_is_shortened_only_when_no_input_is_left(tokenizer):
    tokens, shortened = encode_request(Row(0, PROSE * 40, "the context", ()), tokenizer)
    request = tokenizer.decode(tokens)
    before, after = fill_template("\0").split("\0")  # the template without an input
    assert (
        shortened
        and request.startswith(before + PROSE * 8)
        and request.endswith(after)
        and "the context" not in request
    )
    assert 244 <= len(tokens) <= 256


@pytest.mark.parametrize("over", [1, 2, 3, 10])
def test_a_request_just_over_the_limit_loses_just_that(tokenizer, over):
    row = Row(
        0, "Sum this up.", "one two three four five six seven eight nine ten eleven twelve", ()
    )
    full, shortened = encode_request(row, tokenizer)
    assert not shortened and encode_request(row, tokenizer, len(full)) == (full, False)
    tokens, shortened = encode_request(row, tokenizer, len(full) - over)
    words = row.input.split(" ")[:-over]
    assert shortened and tokens == tokenizer.encode_ordinary(
        fill_template("Sum this up.", " ".join(words))
    )


def test_random_requests_are_never_over_the_limit(tokenizer):
    rng = random.Random(0)
    alphabet = [*"abc  \n\r.,12", "é", "大", "👍", "\ud800", " the", "ing", END]
    for _ in range(150):
        instruction, input = (
            "".join(rng.choices(alphabet, k=rng.randrange(length))) for length in (120, 300)
        )
        limit = rng.randrange(50, 257)
        tokens, shortened = encode_request(Row(0, instruction, input, ()), tokenizer, limit)
        full = tokenizer.encode_ordinary(fill_template(instruction, input))
        assert shortened == (len(full) > limit) and len(tokens) <= limit
        assert tokens[-4:] == tokenizer.encode_ordinary(fill_template("x"))[-4:]
        assert shortened or tokens == full


# ---- batches ---------------------------------------------------------------------------------------------------------------


def random_examples(n, seed=0, end=9):
    """Examples over ten tokens, so that the fill (0) and the end-of-text (9) turn up everywhere; some responses are empty."""
    rng = random.Random(seed)
    return [
        Example(
            i,
            rng.choices(range(10), k=rng.randint(1, 12)),
            rng.choices([0, 0, 5, end], k=rng.choice([0, 1, 2, 3, 9])),
        )
        for i in range(n)
    ]


def test_pad_fills_at_the_right_and_tells_the_lengths():
    ids, lengths = pad([[1, 2, 3], [], [0]], CPU, fill=7)
    assert ids.tolist() == [[1, 2, 3], [7, 7, 7], [0, 7, 7]] and lengths.tolist() == [3, 0, 1]
    assert ids.dtype == lengths.dtype == torch.int64
    assert pad([[4], [5, 6]], CPU)[0].tolist() == [[4, 0], [5, 6]]


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_predicts_the_response_tokens_and_nothing_else(seed):
    examples = [*random_examples(8, seed), Example(8, [1, 2], [])]
    batch = make_batch(examples, CPU)
    wanted = []
    for row, example in enumerate(examples):
        for n, token in enumerate(example.response):
            wanted.append((row, len(example.request) + n - 1, token))
    assert (
        list(
            zip(
                batch.response_positions[0].tolist(),
                batch.response_positions[1].tolist(),
                batch.targets.tolist(),
            )
        )
        == wanted
    )
    width = max(len(e.request) + len(e.response) for e in examples)
    assert batch.ids.tolist() == [
        [*e.request, *e.response] + [0] * (width - len(e.request) - len(e.response))
        for e in examples
    ]
    assert {0, 9} <= {token for _, _, token in wanted}


def test_the_mask_comes_from_lengths_so_that_pad_tokens_in_a_response_count():
    end = 50256
    batch = make_batch(
        [
            Example(0, [end, end], [end, 0, end]),
            Example(1, [0], []),
            Example(2, [0, 0, 0, 0, 0, 0], [0, 0]),
        ],
        CPU,
    )
    assert batch.targets.tolist() == [end, 0, end, 0, 0]
    assert [pair.tolist() for pair in batch.response_positions] == [
        [0, 0, 0, 2, 2],
        [1, 2, 3, 5, 6],
    ]


def test_a_batch_without_any_response_has_no_targets():
    batch = make_batch([Example(0, [1, 2], []), Example(1, [3], [])], CPU)
    assert (
        batch.targets.shape == (0,)
        and batch.response_positions[0].shape == (0,)
        and batch.ids.shape == (2, 2)
    )


@pytest.mark.parametrize("size", [1, 3, 8, 23, 100])
def test_micro_batches_hold_every_example_once_and_the_longest_come_first(size):
    examples = [
        Example(i, [100 + i, *e.request], e.response) for i, e in enumerate(random_examples(23))
    ]
    before = list(examples)
    batches = micro_batches(examples, size, CPU)
    assert len(batches) == -(-23 // size) and [len(b.ids) for b in batches[:-1]] == [size] * (
        len(batches) - 1
    )
    order = [int(row[0]) - 100 for batch in batches for row in batch.ids]
    assert sorted(order) == list(range(23)) and examples == before
    lengths = [len(examples[i].request) + len(examples[i].response) for i in order]
    assert lengths == sorted(lengths, reverse=True)
    for batch, first in zip(batches, range(0, 23, size)):
        assert batch.ids.shape[1] == lengths[first]  # padded to its own longest
        assert torch.equal(
            batch.targets,
            make_batch([examples[i] for i in order[first : first + size]], CPU).targets,
        )
    assert sum(len(b.targets) for b in batches) == sum(len(e.response) for e in examples)


def test_no_examples_make_no_micro_batches():
    assert micro_batches([], 4, CPU) == []


def test_epoch_order_is_a_permutation_that_hangs_on_seed_and_epoch_alone():
    np.random.seed(1)
    first = epoch_order(1000, 10, 0).tolist()
    np.random.seed(2)
    assert epoch_order(1000, 10, 0).tolist() == first
    orders = [tuple(epoch_order(1000, seed, epoch)) for seed in (10, 11) for epoch in range(3)]
    assert all(sorted(order) == list(range(1000)) for order in orders) and len(set(orders)) == 6
    places = Counter(int(epoch_order(4, 10, epoch)[0]) for epoch in range(4000))
    assert (
        min(places.values()) > 850
    )  # each row comes first as often as any other: 1000 expected, spread 27


@pytest.mark.parametrize("block", [1, 7, 16])
def test_packed_blocks_predict_every_token_once(block):
    rng = random.Random(3)
    end, documents, n = 0, [], 1
    for _ in range(30):  # every token its own number, but for the end-of-text
        length = rng.randint(1, 20)
        documents.append([*range(n, n + length), end])
        n += length
    blocks = packed_blocks(documents, block, seed=10, epoch=2)
    total = sum(map(len, documents))
    assert blocks.dtype == torch.int64 and blocks.shape == ((total - 1) // block, block + 1)
    stream = [*blocks[:, :-1].flatten().tolist(), int(blocks[-1, -1])]
    assert (
        blocks[:, 1:].flatten().tolist() == stream[1:]
    )  # each block goes on where the last one ended
    assert total - len(stream) < block  # only a tail shorter than a block is left out
    rest, used = list(stream), []
    while rest:  # the stream is whole documents, the last one perhaps cut off
        document = next(d for d in documents if d[0] == rest[0])
        assert rest[: len(document)] == document[: len(rest)]
        used.append(document[0])
        rest = rest[len(document) :]
    assert len(used) == len(set(used)) and used != sorted(used)


def test_packed_blocks_are_the_same_for_a_seed_and_epoch_and_differ_otherwise():
    documents = [np.array([i, 100 + i, 0]) for i in range(1, 60)]
    first = packed_blocks(documents, 10, 10, 0)
    assert torch.equal(first, packed_blocks(documents, 10, 10, 0))
    assert not torch.equal(first, packed_blocks(documents, 10, 10, 1)) and not torch.equal(
        first, packed_blocks(documents, 10, 11, 0)
    )


def test_text_shorter_than_a_block_makes_no_block():
    assert packed_blocks([[1, 2, 0]], 3, 10, 0).shape == (0, 4)
    assert packed_blocks([[1, 2, 0]], 2, 10, 0).tolist() == [[1, 2, 0]]
