"""From JSON lines to batches, against GPT-2's published tokenizer, the paper's data and plain
loops."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import random
import re
import shutil
import tracemalloc
import zipfile
from collections import Counter
from functools import partial

import numpy as np
import pytest
import tiktoken
import torch
from helpers import error_of, tiny_tokenizer, write_rows

from data.models.tokenizer import (
    END_OF_TEXT,
    check_same_vocabulary,
    load_tokenizer,
    tokenizer_files,
)
from data.sets import rows as rows_module
from data.sets.demo import TOKENIZER_DIR
from data.sets.rows import (
    Example,
    Row,
    corpus_format,
    encode_request,
    encode_training_rows,
    epoch_order,
    fill_template,
    iter_texts,
    make_batch,
    micro_batches,
    packed_examples,
    read_jsonl,
    read_rows,
    read_texts,
)
from sample import pad

CPU = torch.device("cpu")
EOS = 50256  # GPT-2's end-of-text
UNUSUAL_TEXTS = [
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


def short_id(text):
    return ascii(text)[:30]


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_bytes(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.fixture(scope="module")
def gpt2(shared):
    """GPT-2's tokenizer as OpenAI publishes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "gpt2-bpe" / "tiktoken-cache"))
        return tiktoken.get_encoding("gpt2")


@pytest.fixture(scope="module")
def tokenizer(shared, tmp_path_factory):
    """The tokenizer that we read from the same vocabulary, under Hugging Face's file names."""
    directory = tmp_path_factory.mktemp("gpt2")
    shutil.copy(shared / "gpt2-bpe" / "encoder.json", directory / "vocab.json")
    shutil.copy(shared / "gpt2-bpe" / "vocab.bpe", directory / "merges.txt")
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def dolly(shared):
    """The paper's data, which has each row's request as `prompt`."""
    path = shared / "data" / "dolly"
    return {split: jsonl(path / f"{split}.jsonl") for split in ("train", "dev", "valid")}


# ---- the tokenizer -----------------------------------------------------------------------------


def test_tokens_of_dolly_dev_are_the_published_ones(tokenizer, gpt2, dolly):
    fields = ("instruction", "input", "output", "prompt")
    texts = [row[field] for row in dolly["dev"] for field in fields]
    assert len(texts) == 4000
    assert len(set(texts)) > 2500
    assert tokenizer.encode_ordinary_batch(texts) == gpt2.encode_ordinary_batch(texts)


@pytest.mark.parametrize("text", UNUSUAL_TEXTS, ids=short_id)
def test_tokens_of_unusual_texts_are_the_published_ones_and_decode_to_the_text(
    tokenizer, gpt2, text
):
    tokens = tokenizer.encode_ordinary(text)
    assert tokens == gpt2.encode_ordinary(text)
    # Half a surrogate pair becomes a replacement character.
    valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(tokens) == valid
    assert tokenizer.eot_token not in tokens


def test_vocabulary_is_the_published_one(tokenizer, gpt2):
    assert tokenizer.n_vocab == gpt2.n_vocab == 50257
    assert tokenizer.eot_token == gpt2.eot_token == EOS
    for i in range(50257):
        assert tokenizer.decode_single_token_bytes(i) == gpt2.decode_single_token_bytes(i)
    assert tokenizer.decode([EOS]) == END_OF_TEXT
    check_same_vocabulary("a", "b", tokenizer, gpt2)


def test_tokenizer_files_are_the_published_files(gpt2, shared):
    vocab, merges = tokenizer_files(gpt2)
    published = (shared / "gpt2-bpe" / "encoder.json").read_text(encoding="utf-8")
    assert json.loads(vocab) == json.loads(published)
    assert merges == (shared / "gpt2-bpe" / "vocab.bpe").read_text(encoding="utf-8")


def write_tokenizer(directory, vocab, merges):
    directory.mkdir(exist_ok=True)
    (directory / "vocab.json").write_text(vocab, encoding="utf-8", newline="")
    (directory / "merges.txt").write_text(merges, encoding="utf-8", newline="")
    return directory


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_written_files_read_back_as_the_same_tokenizer_here_and_by_hugging_face(tmp_path, name):
    tokenizers = pytest.importorskip("tokenizers")
    text = "Below is an instruction that describes a task, naïvely 大きさ\r\n  the past of “sees”"
    written = tiny_tokenizer() if name == "tiny" else load_tokenizer(TOKENIZER_DIR)
    write_tokenizer(tmp_path, *tokenizer_files(written))
    read = load_tokenizer(tmp_path)
    files = [str(tmp_path / file) for file in ("vocab.json", "merges.txt")]
    theirs = tokenizers.ByteLevelBPETokenizer.from_file(*files)
    tokens = written.encode_ordinary(text)
    assert tokens == read.encode_ordinary(text) == theirs.encode(text).ids
    assert written.n_vocab == read.n_vocab == theirs.get_vocab_size()
    assert theirs.token_to_id(END_OF_TEXT) == read.eot_token
    assert tokenizer_files(read) == tokenizer_files(written)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: "\n".join(lines),
        lambda lines: "\r\n".join(["#version: 0.2", *lines, ""]),
        lambda lines: "\n".join(["#version: 0.2", *lines, "", "", ""]),
    ],
    ids=["no version and no last newline", "CRLF", "blank lines at the end"],
)
def test_line_ends_and_the_version_line_do_not_matter(tmp_path, change):
    vocab, merges = tokenizer_files(tiny_tokenizer())
    text = change(merges.split("\n")[1:-1])
    read = load_tokenizer(write_tokenizer(tmp_path, vocab, text))
    assert tokenizer_files(read) == (vocab, merges)


def test_without_files_the_tokenizer_is_gpt2_s(gpt2, tmp_path):
    assert load_tokenizer() is gpt2
    assert load_tokenizer(tmp_path) is gpt2


# ---- the template ------------------------------------------------------------------------------


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
def test_template_gives_the_prompt_of_every_published_row(shared, file, count):
    path = shared / "data" / f"{file}.jsonl"
    prompts = [row["prompt"] for row in jsonl(path)]
    assert len(prompts) == count
    assert [fill_template(row.instruction, row.input) for row in read_rows(path)] == prompts


def test_template_inserts_texts_unchanged():
    expected = "### Instruction:\n{input} %s\n\n### Input:\n{instruction}\n\n### Response:\n"
    assert fill_template("{input} %s", "{instruction}").endswith(expected)
    assert "Input" not in fill_template("x", "")
    assert "further context" not in fill_template("x")


# ---- JSON lines --------------------------------------------------------------------------------

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}
BOM = b"\xef\xbb\xbf"


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
def test_byte_order_mark_crlf_and_a_missing_last_newline_do_not_matter(tmp_path, content):
    path = write_bytes(tmp_path / "x", content)
    assert read_jsonl(path) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 2", {"a": 2})]


@pytest.mark.parametrize(
    "content",
    [
        b'\n{"a": 1}\n \t\n{"a": 2}\n\n',
        b'\r\n{"a": 1}\r\n\r\n{"a": 2}',
        b'\xef\xbb\xbf\n{"a": 1}\n\x0b\x0c\n{"a": 2}\n   ',
        '\u00a0\n{"a": 1}\n\u3000\u2028\n{"a": 2}\n\r\n'.encode(),
    ],
)
def test_blank_lines_are_skipped_and_counted(tmp_path, content):
    path = write_bytes(tmp_path / "x", content)
    assert read_jsonl(path) == [(f"{path}, line 2", {"a": 1}), (f"{path}, line 4", {"a": 2})]
    message = error_of(read_jsonl, write_bytes(path, content.replace(b"2}", b"2")))
    assert message.startswith(f"{path}, line 4: is not JSON")


def test_rows_are_the_same_with_blank_lines(tmp_path):
    """A row's index is part of the seed of its random numbers."""
    lines = [json.dumps(GOOD | {"input": str(i)}) for i in range(3)]
    plain = write_bytes(tmp_path / "plain", "\n".join(lines))
    spaced = write_bytes(tmp_path / "spaced", "\n\n" + "\n \r\n\n".join(lines))
    assert read_rows(plain) == read_rows(spaced)
    # The hash of kept responses is taken of it.
    assert repr(read_rows(plain)) == repr(read_rows(spaced))
    wrong = spaced.read_text().replace('"3"', "3")
    message = error_of(read_rows, write_bytes(spaced, wrong))
    assert message.startswith(f"{spaced}, line 3: 'output' must be")


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    line = json.dumps({"a": text}, ensure_ascii=False) + "\n"
    assert read_jsonl(write_bytes(tmp_path / "x", line))[0][1] == {"a": text}
    lines = '{"instruction": "a\u2028b\u2029c\x85d", "output": "x"}\n' * 2
    rows = read_rows(write_bytes(tmp_path / "y", lines))
    assert [row.instruction for row in rows] == ["a\u2028b\u2029c\x85d"] * 2


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n", b"\n \r\n", BOM + b"\n"])
def test_file_without_rows_is_an_error(tmp_path, content):
    path = write_bytes(tmp_path / "x", content)
    assert error_of(read_rows, path) == f"{path}: has no rows"


def test_line_of_ten_megabytes_is_read(tmp_path):
    text = "long " * 2_000_000
    path = write_rows(tmp_path / "x", [GOOD | {"output": text}])
    assert read_rows(path)[0].references == (text,)
    message = error_of(read_rows, write_rows(path, [GOOD | {"output": {"x": text}}]))
    assert "line 1" in message and len(message) < 400


def test_rows_have_their_fields_and_their_position_in_the_file(tmp_path):
    objects = [
        GOOD,
        {"instruction": "x", "output": ["a", "b", "a"]},
        {"instruction": "x", "input": None, "output": "", "topic": 5, "prompt": [1]},
        {"instruction": "x", "input": "", "output": "y", "ids": [3, 0, 7]},
    ]
    path = write_rows(tmp_path / "x", objects)
    expected = [
        Row(0, "Add.", "1 2", ("3",)),
        Row(1, "x", "", ("a", "b", "a")),
        Row(2, "x", "", ("",)),
        Row(3, "x", "", ("y",)),
    ]
    assert read_rows(path) == expected
    assert read_rows(path, limit=2) == expected[:2]
    assert read_rows(path, limit=99) == expected
    # Rows after the limit are checked as well.
    write_rows(path, [GOOD, GOOD, GOOD | {"input": 5}])
    assert error_of(read_rows, path, 1).startswith(f"{path}, line 3: 'input' must be ")


@pytest.mark.parametrize("value", ["two\nlines" * 50, {"deep": "x" * 1000}], ids=short_id)
def test_wrong_value_is_shown_in_short_and_on_one_line(tmp_path, value):
    path = write_rows(tmp_path / "x", [GOOD | {"input": [value]}])
    assert len(error_of(read_rows, path).removeprefix(str(path))) < 120


def test_ids_are_tokens_in_sampled_responses_only(tmp_path):
    """A user's rows may have a database's ids, of any type."""
    for ids in ([3, 0, 7], 5, "a7", [-1], None):
        path = write_rows(tmp_path / "x", [GOOD | {"ids": ids}])
        assert read_rows(path)[0].ids is None
    assert read_rows(write_rows(path, [GOOD | {"ids": [3, 0, 7]}]), sampled=True)[0].ids == (
        3,
        0,
        7,
    )
    for ids in (5, "1 2", {}, [1.0], ["1"], [None], [True], [-1], [1, 2, -3]):
        write_rows(path, [GOOD, GOOD | {"ids": ids}])
        message = error_of(partial(read_rows, sampled=True), path)
        assert message.startswith(f"{path}, line 2: 'ids' must be a list of token ids, not ")


def test_sampled_tokens_of_another_vocabulary_are_an_error():
    tokenizer = tiny_tokenizer()
    good = Row(0, "x", "", ("y",), (tokenizer.n_vocab - 1,))
    bad = Row(6, "x", "", ("y",), (1, tokenizer.n_vocab, 1), "train.jsonl, line 7")
    assert encode_one(good, tokenizer).response == [tokenizer.n_vocab - 1]
    message = error_of(encode_training_rows, [good, bad], tokenizer)
    expected = f"'ids' has a token beyond the tokenizer's {tokenizer.n_vocab}; leave 'ids' out"
    assert message == f"train.jsonl, line 7: {expected}"


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path, tokenizer):
    path = write_bytes(tmp_path / "x", '{"instruction": "a\\ud800b", "output": "\\udfff"}\n')
    [example] = encode_training_rows(read_rows(path), tokenizer)
    assert tokenizer.decode(example.request).count("a\ufffdb") == 1
    assert tokenizer.decode(example.response[:-1]) == "\ufffd"


def test_nesting_that_json_can_just_read_is_an_error_of_one_line(tmp_path):
    for depth in [*range(700, 1000, 7), 2000, 5000]:
        value = "[" * depth + "]" * depth
        path = write_bytes(tmp_path / "x", f'{{"instruction": "x", "output": {value}}}\n')
        assert "line 1" in error_of(read_rows, path)


def test_rows_may_lack_an_output_where_none_is_needed(tmp_path):
    path = write_rows(tmp_path / "x", [{"instruction": "x"}, {"instruction": "y", "output": "z"}])
    assert [row.references for row in read_rows(path, needs_output=False)] == [(), ("z",)]
    for output in (5, []):
        write_rows(path, [{"instruction": "x", "output": output}])
        assert "'output'" in error_of(read_rows, path, None, False)


# ---- text corpora ------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [b"", BOM, b"\n \r\n"])
@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.JSONL", "c4-train.00000-of-01024.json", "x.ndjson", "x.txt", "x"]
)
def test_texts_of_json_lines_are_their_field_text(tmp_path, name, start):
    """Blank lines inside a text do not end it. A text can be empty. The name does not matter."""
    texts = ["one", "two\n\nof two paragraphs", "", "größer 大"]
    lines = [json.dumps({"text": text, "url": 5}, ensure_ascii=False) + "\n" for text in texts]
    path = write_bytes(tmp_path / name, start + "\r\n".join(lines).encode())
    assert corpus_format(path) == "JSON lines"
    assert read_texts(path) == texts
    assert read_texts(str(path), limit=2) == texts[:2]
    assert read_texts(path, limit=99) == texts


@pytest.mark.parametrize(
    "content",
    [
        "one\n\ntwo\nof two lines\n\ngrößer {大",
        "one\r\n\r\ntwo\r\nof two lines\r\n\r\ngrößer {大",
        "\n\none\n\n\n\ntwo\nof two lines\n\n \n\ngrößer {大\n\n",
    ],
)
@pytest.mark.parametrize("name", ["corpus.txt", "corpus"])
@pytest.mark.parametrize("start", [b"", BOM])
def test_documents_of_a_text_file_are_separated_by_blank_lines(tmp_path, content, name, start):
    path = write_bytes(tmp_path / name, start + content.encode())
    assert corpus_format(str(path)) == "plain text"
    assert read_texts(path) == ["one", "two\nof two lines", "größer {大"]
    assert read_texts(path, limit=2) == ["one", "two\nof two lines"]


@pytest.mark.parametrize("content", ["", "\n\n\n", BOM])
def test_empty_text_file_has_no_texts(tmp_path, content):
    assert read_texts(write_bytes(tmp_path / "x.txt", content)) == []


def test_text_file_that_is_not_utf8_is_an_error(tmp_path):
    for name, text in (("x.txt", "größer"), ("x", "{größer}")):
        path = write_bytes(tmp_path / name, text.encode("latin-1"))
        assert error_of(read_texts, path) == f"{path}: is not UTF-8; convert the file to UTF-8"
    path = write_bytes(tmp_path / "x.txt", b"a tar archive\0\0\0")
    assert "no text at all" in error_of(read_texts, path)


@pytest.mark.parametrize(
    "content",
    [
        "{curly} braces",
        "[Illustration]\n\nChapter 1",
        "[1] A reference",
        "[[A link]] in a wiki",
        "{{A template}}",
        '"a string"\n',
        "17\n18\n",
        'Objects follow.\n{"text": "a"}\n',
        "[" * 100_000,
    ],
    ids=short_id,
)
def test_plain_text_that_resembles_json_is_plain_text(tmp_path, content):
    path = write_bytes(tmp_path / "x.txt", content)
    assert corpus_format(path) == "plain text"
    assert "\n\n".join(read_texts(path)) == content


OBJECTS = [{"text": "one"}, {"text": "two"}]
OTHER_JSON = {
    "an array on one line": json.dumps(OBJECTS),
    "an array with an object per line": '[\n{"text": "one"},\n{"text": "two"}\n]\n',
    "an array whose first object shares its line": '[{"text": "one"},\n{"text": "two"}]',
    "an array that is cut off": '[\n  {"text": "one"},\n  {"te',
    "a pretty array": json.dumps(OBJECTS, indent=2),
    "an array of strings": '["one",\n"two"]',
    "a pretty object": json.dumps({"data": OBJECTS}, indent=2),
    "an object over two lines": '{"text":\n"one"}',
    "pretty objects one after another": "\n".join(json.dumps(o, indent=2) for o in OBJECTS),
    "after blank lines and a mark": "\ufeff\n \n" + json.dumps(OBJECTS, indent=2),
}


@pytest.mark.parametrize("name", ["x.json", "x.txt", "x", "x.JSONL"])
@pytest.mark.parametrize("what", OTHER_JSON)
def test_json_of_another_layout_is_never_read_as_text(tmp_path, what, name):
    path = write_bytes(tmp_path / name, OTHER_JSON[what])
    line = 3 if what == "after blank lines and a mark" else 1
    message = error_of(read_texts, path)
    assert message.startswith(f"{path}, line {line}: is not ")
    assert message.endswith("; expected one object per line")


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSON", "x.NdJson"])
@pytest.mark.parametrize("text", ["prose", '"a string"', "{'text': 'a'}", '["a"] x', "0\n1"])
def test_text_in_a_file_with_the_name_of_json_is_an_error(tmp_path, name, text):
    message = error_of(read_texts, write_bytes(tmp_path / name, "\n" + text))
    assert message.startswith(f"{tmp_path / name}, line 2: ")
    assert message.endswith("; expected one object per line")


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"text": "a"} {"text": "b"}', "is not JSON"),
        ('{"text": "a"},', "is not JSON"),
        ('["a"]', "is not a JSON object"),
        ("prose", "is not JSON"),
        ('{"content": "a"}', "'text' must be a string, not null"),
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_every_line_of_json_lines_must_be_an_object_with_text(tmp_path, line, problem, number):
    lines = ['{"text": "a"}'] * 3
    lines[number] = line
    path = write_bytes(tmp_path / "corpus", "\n\n".join(lines))
    assert error_of(read_texts, path).startswith(f"{path}, line {2 * number + 1}: {problem}")


CONTENT = b'{"instruction": "x", "text": "a", "output": "a"}\n' * 3
ARCHIVE = io.BytesIO()
with zipfile.ZipFile(ARCHIVE, "w") as archive:
    archive.writestr("x.jsonl", CONTENT)
NOT_TEXT = {  # the content, and parts of the message
    "gzip": (gzip.compress(CONTENT), "is compressed|gzip|decompress it"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00a", "is compressed|zstd|decompress it"),
    "bzip2": (bz2.compress(CONTENT, 1), "is compressed|bzip2|decompress it"),
    "xz": (lzma.compress(CONTENT), "is compressed|xz|decompress it"),
    "zip": (ARCHIVE.getvalue(), "is compressed|zip|decompress it"),
    "Parquet": (b"PAR1\x15\x04", "is a Parquet file|one object per line"),
    "UTF-16": (CONTENT.decode().encode("utf-16"), "is UTF-16|UTF-8"),
    "big-endian": (b"\xfe\xff" + CONTENT.decode().encode("utf-16-be"), "is UTF-16|UTF-8"),
    "without a mark": (CONTENT.decode().encode("utf-16-le"), "is UTF-16|UTF-8"),
    "big-endian without a mark": (CONTENT.decode().encode("utf-16-be"), "is UTF-16|UTF-8"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is a git-lfs pointer|git lfs pull",
    ),
}


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt"])
@pytest.mark.parametrize("what", NOT_TEXT)
def test_file_that_is_not_text_is_refused_by_name(tmp_path, what, name):
    content, parts = NOT_TEXT[what]
    path = write_bytes(tmp_path / name, content)
    for read in (read_rows, read_texts, read_jsonl, corpus_format):
        message = error_of(read, path)
        assert message.startswith(f"{path}: is ")
        assert all(part in message for part in parts.split("|"))


def test_large_corpus_is_read_once(tmp_path, monkeypatch):
    """Its format is told from its first line."""
    path = write_rows(tmp_path / "c4.json", [{"text": "word " * 200}] * 2000)
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    assert len(read_texts(path)) == 2000
    assert len(parsed) <= 2001


def test_a_corpus_is_read_only_as_far_as_it_is_asked_for(tmp_path):
    """So what can't be read after that is no error."""
    lines = [json.dumps({"text": f"text {n}"}) + "\n" for n in range(5)]
    for name, content in (
        ("x.jsonl", "".join(lines).encode() + b"no JSON\n"),
        ("x.txt", b"text 0\n\ntext 1\n\n" + b"a long line\n\n" * 10_000 + b"no UTF-8: \xff\n"),
    ):
        path = write_bytes(tmp_path / name, content)
        assert list(itertools.islice(iter_texts(path), 2)) == ["text 0", "text 1"]
        error_of(read_texts, path, 2)  # which checks all of it


def test_a_corpus_is_checked_in_little_memory(tmp_path):
    line = json.dumps({"text": "word " * 200}) + "\n"
    for name, text in (("x.jsonl", line), ("x.txt", "word " * 200 + "\n\n")):
        path = write_bytes(tmp_path / name, text * 5_000)  # 5 MB
        tracemalloc.start()
        assert sum(1 for _ in iter_texts(path)) == 5_000
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2e5


def test_plain_text_is_split_at_the_same_places_whether_by_lines_or_at_once(tmp_path):
    rng = random.Random(1)
    pieces = ["a", " b", "\n", "\n", "\r\n", " ", "\t", "\x0b", "\x85"]
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=14))
        path = write_bytes(tmp_path / "x.txt", text)
        expected = re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n"))
        assert read_texts(path) == [part for part in expected if part.strip()]


# ---- training examples -------------------------------------------------------------------------


def request_length(instruction):
    return len(tiny_tokenizer().encode_ordinary(fill_template(instruction)))


def encode_one(row, tokenizer):
    [example] = encode_training_rows([row], tokenizer)
    return example


def test_request_and_response_are_encoded_apart(tokenizer):
    example = encode_one(Row(0, "Say nothing.", "", ("\n\nfirst line",)), tokenizer)
    request, response = fill_template("Say nothing."), "\n\nfirst line"
    assert example.request == tokenizer.encode_ordinary(request)
    assert example.response == [*tokenizer.encode_ordinary(response), EOS]
    # Encoded together, a merge crosses the border.
    assert example.request[-1] == example.response[0] == tokenizer.encode_ordinary("\n")[0]
    together = tokenizer.encode_ordinary(request + response)
    assert len(together) < len(example.request) + len(example.response) - 1


def test_text_of_special_tokens_is_ordinary_text(tokenizer):
    response = f"{END_OF_TEXT} ends a text{END_OF_TEXT}"
    row = Row(0, "What is <|endoftext|>?", END_OF_TEXT, (response,))
    example = encode_one(row, tokenizer)
    assert EOS not in example.request
    assert example.response.count(EOS) == 1
    assert example.response[-1] == EOS
    assert tokenizer.decode(example.response[:-1]) == response


def test_dolly_s_training_rows_are_cut_at_512_tokens_and_none_is_dropped(
    tokenizer, gpt2, shared, dolly
):
    examples = encode_training_rows(read_rows(shared / "data/dolly/train.jsonl"), tokenizer)
    assert [example.index for example in examples] == list(range(11435))
    lengths = np.array([[len(e.request), len(e.response)] for e in examples])
    assert lengths.sum(1).max() == 512
    assert lengths[:, 0].max() == 256
    assert lengths[:, 0].mean().round() == 71
    # A response that is cut has no end-of-text.
    is_cut = [example.response[-1] != EOS for example in examples]
    assert sum(is_cut) == 198
    full_lengths = lengths[:, 1].copy()
    sample = [i for i in range(11435) if i % 10 == 0 or is_cut[i]]
    for i in sample:
        request = gpt2.encode_ordinary(dolly["train"][i]["prompt"])
        response = [*gpt2.encode_ordinary(dolly["train"][i]["output"]), EOS]
        assert examples[i].request == request
        assert examples[i].response == response[: 512 - len(request)]
        assert is_cut[i] == (len(request) + len(response) > 512)
        full_lengths[i] = len(response)
    assert full_lengths.mean().round() == 80


@pytest.mark.parametrize("room, kept", [(7, 6), (6, 6), (5, 5), (4, 4), (0, 0)])
def test_end_of_text_is_kept_if_it_fits(monkeypatch, room, kept):
    tokenizer = tiny_tokenizer()
    response = [*tokenizer.encode_ordinary("zqzqz"), tokenizer.eot_token]
    assert len(response) == 6
    monkeypatch.setattr(rows_module, "MAX_LENGTH", request_length("x") + room)
    assert encode_one(Row(0, "x", "", ("zqzqz",)), tokenizer).response == response[:kept]


def test_empty_response_is_an_end_of_text():
    tokenizer = tiny_tokenizer()
    assert encode_one(Row(0, "x", "", ("",)), tokenizer).response == [tokenizer.eot_token]


def test_rows_with_a_request_over_the_limit_are_dropped(monkeypatch):
    rows = [Row(n, "z" * n, "", ("y",)) for n in range(40)]
    lengths = [request_length(row.instruction) for row in rows]
    assert lengths == list(range(lengths[0], lengths[0] + 40))
    monkeypatch.setattr(rows_module, "MAX_REQUEST", lengths[20])
    examples = encode_training_rows(rows, tiny_tokenizer())
    assert [example.index for example in examples] == list(range(21))


def test_sampled_tokens_are_used_in_place_of_their_text(monkeypatch):
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eot_token
    # One token per letter; encoded again, the text would have other tokens.
    letters = [tokenizer.encode_ordinary(letter)[0] for letter in " instruction"]
    assert len(tokenizer.encode_ordinary(" instruction")) < len(letters)
    for ids in [letters, [*letters, eos], [eos], [], [eos, 5, eos]]:
        row = Row(0, "x", "", (" instruction",), tuple(ids))
        assert encode_one(row, tokenizer).response == ids
    monkeypatch.setattr(rows_module, "MAX_LENGTH", request_length("x") + 4)
    assert encode_one(Row(0, "x", "", ("",), (*letters, eos)), tokenizer).response == letters[:4]


# ---- requests ----------------------------------------------------------------------------------

PROSE = "The quick brown fox, aged 12, doesn't jump; it “thinks” — naïvely.\n\nAnd then? "
LONG_TEXTS = [
    PROSE * 40,
    "word " * 900,
    "大きさを比べる。" * 90,
    "👍🏽👨‍👩‍👧‍👦" * 80,
    "é" * 900,
    "x" * 4000,
    "\n" * 900,
    " " * 2000,
    END_OF_TEXT * 200,
]


def kept_text(request, *template_fields):
    """What a request has in place of \\0 in the template."""
    before, after = fill_template(*template_fields).split("\0")
    assert request.startswith(before) and request.endswith(after)
    return request[len(before) : -len(after)]


def test_request_within_the_limit_is_unchanged(tokenizer, dolly):
    for published in dolly["valid"]:
        row = Row(0, published["instruction"], published["input"], ())
        expected = tokenizer.encode_ordinary(published["prompt"])
        assert encode_request(row, tokenizer) == (expected, False)


@pytest.mark.parametrize("text", LONG_TEXTS, ids=short_id)
@pytest.mark.parametrize("limit", [60, 100, 256])
def test_long_input_is_shortened_at_its_end(tokenizer, monkeypatch, text, limit):
    monkeypatch.setattr(rows_module, "MAX_REQUEST", limit)
    tokens, shortened = encode_request(Row(0, "Sum this up.", text, ()), tokenizer)
    kept = kept_text(tokenizer.decode(tokens, errors="strict"), "Sum this up.", "\0")
    assert shortened
    assert kept and text.startswith(kept)
    assert tokens == tokenizer.encode_ordinary(fill_template("Sum this up.", kept))
    # As much as fits, except for a character of many tokens or a run of one letter.
    assert limit - 12 <= len(tokens) <= limit


@pytest.mark.parametrize("text", LONG_TEXTS, ids=short_id)
def test_long_instruction_is_shortened_if_there_is_no_input(tokenizer, text):
    tokens, shortened = encode_request(Row(0, text, "", ()), tokenizer)
    assert shortened
    assert text.startswith(kept_text(tokenizer.decode(tokens, errors="strict"), "\0"))
    assert 244 <= len(tokens) <= 256


def test_instruction_is_shortened_only_when_no_input_is_left(tokenizer):
    tokens, shortened = encode_request(Row(0, PROSE * 40, "the context", ()), tokenizer)
    kept = kept_text(tokenizer.decode(tokens), "\0")  # the template without an input
    assert shortened
    assert kept.startswith(PROSE * 8) and "the context" not in kept
    assert 244 <= len(tokens) <= 256


@pytest.mark.parametrize("over", [1, 2, 3, 10])
def test_request_just_over_the_limit_loses_just_that(tokenizer, monkeypatch, over):
    numbers = "one two three four five six seven eight nine ten eleven twelve".split()
    row = Row(0, "Sum this up.", " ".join(numbers), ())
    full, shortened = encode_request(row, tokenizer)
    assert not shortened
    monkeypatch.setattr(rows_module, "MAX_REQUEST", len(full))
    assert encode_request(row, tokenizer) == (full, False)
    monkeypatch.setattr(rows_module, "MAX_REQUEST", len(full) - over)
    expected = fill_template("Sum this up.", " ".join(numbers[:-over]))
    assert encode_request(row, tokenizer) == (tokenizer.encode_ordinary(expected), True)


def test_random_requests_are_never_over_the_limit(tokenizer, monkeypatch):
    rng = random.Random(0)
    alphabet = [*"abc  \n\r.,12", "é", "大", "👍", "\ud800", " the", "ing", END_OF_TEXT]
    header = tokenizer.encode_ordinary(fill_template("x"))[-4:]
    for _ in range(150):
        instruction = "".join(rng.choices(alphabet, k=rng.randrange(120)))
        input = "".join(rng.choices(alphabet, k=rng.randrange(300)))
        limit = rng.randrange(50, 257)
        monkeypatch.setattr(rows_module, "MAX_REQUEST", limit)
        tokens, shortened = encode_request(Row(0, instruction, input, ()), tokenizer)
        full = tokenizer.encode_ordinary(fill_template(instruction, input))
        assert shortened == (len(full) > limit)
        assert len(tokens) <= limit
        assert tokens[-4:] == header
        assert shortened or tokens == full


# ---- batches -----------------------------------------------------------------------------------


def random_examples(n, seed=0):
    """Examples over ten tokens, so that padding (0) and end-of-text (9) also occur as ordinary
    tokens. Some responses are empty."""
    rng = random.Random(seed)
    return [
        Example(
            i,
            rng.choices(range(10), k=rng.randint(1, 12)),
            rng.choices([0, 0, 5, 9], k=rng.choice([0, 1, 2, 3, 9])),
        )
        for i in range(n)
    ]


def total_length(example):
    return len(example.request) + len(example.response)


def test_pad_fills_on_the_right_and_returns_the_lengths():
    ids, lengths = pad([[1, 2, 3], [], [0]], CPU, fill=7)
    assert ids.tolist() == [[1, 2, 3], [7, 7, 7], [0, 7, 7]]
    assert lengths.tolist() == [3, 0, 1]
    assert ids.dtype == lengths.dtype == torch.int64
    assert pad([[4], [5, 6]], CPU)[0].tolist() == [[4, 0], [5, 6]]


@pytest.mark.parametrize("seed", range(5))
def test_batch_predicts_the_response_tokens_and_nothing_else(seed):
    examples = [*random_examples(8, seed), Example(8, [1, 2], [])]
    batch = make_batch(examples, CPU)
    expected = [
        (row, len(example.request) + n - 1, token)
        for row, example in enumerate(examples)
        for n, token in enumerate(example.response)
    ]
    tensors = *batch.response_positions, batch.targets
    assert list(zip(*(tensor.tolist() for tensor in tensors))) == expected
    T = max(map(total_length, examples))
    padded = [[*e.request, *e.response] + [0] * (T - total_length(e)) for e in examples]
    assert batch.ids.tolist() == padded
    assert {0, 9} <= set(batch.targets.tolist())


def test_padding_is_told_from_lengths_so_that_pad_tokens_in_a_response_count():
    examples = [
        Example(0, [EOS, EOS], [EOS, 0, EOS]),
        Example(1, [0], []),
        Example(2, [0, 0, 0, 0, 0, 0], [0, 0]),
    ]
    batch = make_batch(examples, CPU)
    assert batch.targets.tolist() == [EOS, 0, EOS, 0, 0]
    rows, positions = batch.response_positions
    assert rows.tolist() == [0, 0, 0, 2, 2]
    assert positions.tolist() == [1, 2, 3, 5, 6]


def test_batch_without_any_response_has_no_targets():
    batch = make_batch([Example(0, [1, 2], []), Example(1, [3], [])], CPU)
    assert batch.targets.shape == batch.response_positions[0].shape == (0,)
    assert batch.ids.shape == (2, 2)


@pytest.mark.parametrize("prompt_length", [0, 7])
@pytest.mark.parametrize("max_tokens", [1, 20, 50, 130, 10_000])
def test_micro_batches_have_every_example_once_and_the_longest_come_first(
    max_tokens, prompt_length
):
    examples = [
        Example(i, [100 + i, *e.request], e.response) for i, e in enumerate(random_examples(23))
    ]
    before = list(examples)
    batches = micro_batches(examples, max_tokens, CPU, prompt_length)
    assert examples == before
    order = [int(row[0]) - 100 for batch in batches for row in batch.ids]
    assert sorted(order) == list(range(23))
    lengths = [total_length(examples[i]) for i in order]
    assert lengths == sorted(lengths, reverse=True)
    start = 0
    for batch in batches:
        n_rows, n_columns = batch.ids.shape
        assert n_columns == lengths[start]  # padded to its own longest
        n_positions = prompt_length + n_columns  # of a row
        assert n_rows == 1 or n_rows * n_positions <= max_tokens
        # There is no room for another row.
        assert start + n_rows == 23 or (n_rows + 1) * n_positions > max_tokens
        assert batch.examples == [examples[i] for i in order[start : start + n_rows]]
        assert torch.equal(batch.targets, make_batch(batch.examples, CPU).targets)
        start += n_rows
    assert sum(len(b.targets) for b in batches) == sum(len(e.response) for e in examples)


def test_micro_batches_of_rows_of_known_lengths():
    """Padding and prompt count, and a row that is over the limit is alone."""

    def sizes(max_tokens, prompt_length=0):
        batches = micro_batches(examples, max_tokens, CPU, prompt_length)
        return [len(batch.ids) for batch in batches]

    examples = [Example(i, [1] * n, [2]) for i, n in enumerate((1, 29, 9, 8, 3))]
    # Rows of 30, 10, 9, 4 and 2 tokens: three rows of 10 fit in 30 tokens, the fourth does not.
    assert sizes(30) == [1, 3, 1]
    assert sizes(29) == [1, 2, 2]
    assert sizes(39) == [1, 3, 1]
    assert sizes(40) == [1, 4]
    assert sizes(60) == [2, 3]
    assert sizes(150) == [5]
    assert sizes(1) == [1] * 5
    # With 5 positions before each: rows of 35, 15, 14, 9 and 7
    assert sizes(30, prompt_length=5) == [1, 2, 2]
    assert sizes(59, prompt_length=5) == [1, 3, 1]
    assert sizes(174, prompt_length=5) == [4, 1]
    assert sizes(175, prompt_length=5) == [5]


def test_no_examples_make_no_micro_batches():
    assert micro_batches([], 4, CPU) == []


# ---- the order of rows, and packed text --------------------------------------------------------


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch_only():
    np.random.seed(1)
    order = epoch_order(1000, 10, 0).tolist()
    np.random.seed(2)
    assert epoch_order(1000, 10, 0).tolist() == order
    orders = [tuple(epoch_order(1000, seed, epoch)) for seed in (10, 11) for epoch in range(3)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len(set(orders)) == 6


def test_each_row_is_equally_likely_to_come_first():
    counts = Counter(int(epoch_order(4, 10, epoch)[0]) for epoch in range(4000))
    assert min(counts.values()) > 850  # expected 1000, standard deviation 27


def packed_blocks(*args):
    """The blocks (M, block_size + 1) of packed_examples: the first token and those to predict."""
    examples = packed_examples(*args)
    assert [e.index for e in examples] == list(range(len(examples)))
    assert all(len(e.request) == 1 for e in examples)
    return torch.tensor([[*e.request, *e.response] for e in examples])


@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_packed_blocks_predict_every_token_once(block_size):
    rng, eos = random.Random(3), 0
    documents, n = [], 1
    for _ in range(30):  # every token but the end-of-text is unique
        length = rng.randint(1, 20)
        documents.append([*range(n, n + length), eos])
        n += length
    blocks = packed_blocks(documents, block_size, 10, 2)
    total = sum(map(len, documents))
    assert blocks.dtype == torch.int64
    assert blocks.shape == ((total - 1) // block_size, block_size + 1)
    stream = [*blocks[:, :-1].flatten().tolist(), int(blocks[-1, -1])]
    assert blocks[:, 1:].flatten().tolist() == stream[1:]  # blocks continue each other
    assert total - len(stream) < block_size  # only a shorter tail is left out
    rest, used = list(stream), []
    while rest:  # the stream is whole documents, the last one perhaps cut
        document = next(d for d in documents if d[0] == rest[0])
        assert rest[: len(document)] == document[: len(rest)]
        used.append(document[0])
        rest = rest[len(document) :]
    assert len(used) == len(set(used))
    assert used != sorted(used)


def test_packed_blocks_depend_on_seed_and_epoch():
    documents = [np.array([i, 100 + i, 0]) for i in range(1, 60)]
    blocks = packed_blocks(documents, 10, 10, 0)
    assert torch.equal(blocks, packed_blocks(documents, 10, 10, 0))
    assert not torch.equal(blocks, packed_blocks(documents, 10, 10, 1))
    assert not torch.equal(blocks, packed_blocks(documents, 10, 11, 0))


def test_text_shorter_than_a_block_makes_no_block():
    assert packed_examples([[1, 2, 0]], 3, 10) == []
    assert packed_blocks([[1, 2, 0]], 2, 10, 0).tolist() == [[1, 2, 0]]
