"""The tokenizer of a checkpoint directory, as a tiktoken.Encoding."""

import functools
import json
import os
import re
from itertools import zip_longest
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from data.process.errors import InputError
from data.process.files import check_lfs_pointer, read_json, write_atomic

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50_257
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES += ("vocab.json", "merges.txt", "added_tokens.json")
# Names of tokenizer files of any kind, also of those that can't be read.
ANY_TOKENIZER_FILE = re.compile(
    r"(tokenizer|vocab|merges|encoder\.json|(added|special)_tokens|s\w*piece).*|.*\.(spm|tiktoken)"
)
HINT = "fetch tokenizer.json, or vocab.json and merges.txt, again"

# GPT-2 writes each byte as one printable character, in the order of the first 256 token ids.
_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
_REST = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_ENCODER = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_REST)}
BYTE_DECODER = {character: byte for byte, character in BYTE_ENCODER.items()}
SPECIAL_TOKEN = re.compile(r"[<\[].+[>\]]")  # as <pad> and [PAD], which need no merge


def load_tokenizer(directory=None):
    """The tokenizer of a directory (see `read_tokenizer`)."""
    return read_tokenizer(directory)[0]


def list_tokenizer_files(directory):
    """The names of a directory's tokenizer files. A model without any has GPT-2's own tokenizer."""
    return sorted(filter(ANY_TOKENIZER_FILE.fullmatch, os.listdir(directory)))


def read_tokenizer(directory=None):
    """The tokenizer of a directory and the names of the added tokens that it is read without: those
    after the last of the bytes, the merges and end-of-text.

    Reads `tokenizer.json`, else `vocab.json` and `merges.txt`. Without a tokenizer file of any kind
    it is GPT-2's own. Raises InputError if a tiktoken.Encoding can't represent it, or if GPT-2's
    can't be downloaded.
    """
    names = list_tokenizer_files(directory) if directory else []
    if not names:
        try:
            return tiktoken.get_encoding("gpt2"), []
        except Exception as error:  # tiktoken lets its HTTP client's errors through
            problem = f"tokenizer 'gpt2': can't be downloaded ({type(error).__name__})"
            fix = "set TIKTOKEN_CACHE_DIR to a directory that has it"
            if "SSL" in type(error).__name__:
                fix += ", or REQUESTS_CA_BUNDLE to the certificates of your network"
            raise InputError(f"{problem}; {fix}") from error
    paths = {name: Path(directory) / name for name in names}
    if path := paths.get("tokenizer_config.json"):
        config = read_json(path, HINT)
        for field in ("add_prefix_space", "add_bos_token", "add_eos_token"):
            if config.get(field):
                fix = "use a model that was trained without it"
                raise InputError(f"{path}: {field} is {config[field]!r}; {fix}")
    if path := paths.get("tokenizer.json"):
        return _build(path, *_read_tokenizer_json(path))
    if "vocab.json" in paths or "merges.txt" in paths:
        path, added = Path(directory) / "vocab.json", paths.get("added_tokens.json")
        vocab, added = read_json(path, HINT), read_json(added, HINT) if added else {}
        return _build(path, vocab, added, _read_merges(path.with_name("merges.txt")))
    fix = "put the model's tokenizer.json there, or its vocab.json and merges.txt"
    raise InputError(f"{directory}: can't read a tokenizer from {', '.join(names)}; {fix}")


def _read_merges(path):
    """The pairs of tokens in merges.txt."""
    try:
        check_lfs_pointer(path)
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({error}); {HINT}") from error
    lines = [line for line in lines if line.strip() and not line.startswith("#version")]
    return [tuple(line.partition(" ")[::2]) for line in lines]


def _read_tokenizer_json(path):
    """The ids of tokens, the ids of added tokens, and the pairs of tokens that are merged."""
    content = read_json(path, HINT)
    try:
        if differences := _differences_from_gpt2(content):
            found = (f"{field} {json.dumps(value)[:200]}" for field, value in differences.items())
            fix = "only a byte-level BPE like GPT-2's can be read"
            raise InputError(f"{path}: has {', '.join(found)}; {fix}")
        vocab, merges = {**content["model"]["vocab"]}, content["model"]["merges"]
        added = {str(t["content"]): t["id"] for t in content.get("added_tokens") or []}
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        return vocab, added, [(str(left), str(right)) for left, right in pairs]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"is not a file of the tokenizers library ({type(error).__name__}: {error})"
        raise InputError(f"{path}: {problem}; {HINT}") from error


def _differences_from_gpt2(content):
    """What in a tokenizer.json encodes a text otherwise than GPT-2's byte-level BPE, by field."""

    def steps(name, plural):
        part = content.get(name) or {plural: []}
        return part.get(plural, [part])

    fields = "type dropout continuing_subword_prefix end_of_word_suffix byte_fallback ignore_merges"
    found = {f"model.{field}": content["model"].get(field) for field in fields.split()}
    found = {field: value for field, value in found.items() if value not in ("BPE", "", 0, None)}
    words = steps("pre_tokenizer", "pretokenizers")
    words = [(p["type"], p.get("add_prefix_space"), p.get("use_regex", True)) for p in words]
    processors = [p for p in steps("post_processor", "processors") if p["type"] != "ByteLevel"]
    same = {
        "normalizer": not steps("normalizer", "normalizers"),
        "pre_tokenizer": words == [("ByteLevel", False, True)],
        "post_processor": not any(p.get("special_tokens", True) for p in processors),
    }
    return found | {name: content.get(name) for name in same if not same[name]}


def _build(path, vocab, added, merges):
    ids, bpe = vocab | added, dict.fromkeys([*BYTE_DECODER, *map("".join, merges)])
    if problem := _find_problem(vocab, added, merges, bpe):
        raise InputError(f"{path}: {problem}; {HINT}, or use another tokenizer of GPT-2's kind")
    last = max(ids[token] for token in [*bpe, END_OF_TEXT])
    others = sorted(ids.keys() - bpe, key=ids.get)
    tokenizer = tiktoken.Encoding(
        str(path.parent),
        pat_str=r50k_pat_str,
        mergeable_ranks={bytes(BYTE_DECODER[c] for c in token): ids[token] for token in bpe},
        special_tokens={token: ids[token] for token in others if ids[token] <= last},
    )
    return tokenizer, [token for token in others if ids[token] > last]


def _find_problem(vocab, added, merges, bpe):
    """Why a tiktoken.Encoding can't represent a tokenizer, None if it can. bpe: the tokens of the
    bytes and those that merges make. Each check relies on those before it."""
    ids, items = vocab | added, [*vocab.items(), *added.items()]
    for token, i in items:
        if type(i) is not int:
            return f"token {token!r} has the id {i!r}"
    for token in [*bpe, END_OF_TEXT]:
        if token not in ids:
            return f"has no token {token!r}, which is a byte, end-of-text or made by a merge"
    last = max(ids[token] for token in [*bpe, END_OF_TEXT])
    for next_id, (i, token) in enumerate(sorted({(i, token) for token, i in items})):
        if i != next_id <= last:
            rule = "ids must be 0, 1, 2, ..., one for each token"
            return f"token {token!r} has id {i} where {next_id} should follow; {rule}"
        if token in bpe and (token in added or token == END_OF_TEXT):
            return f"token {token!r} (id {i}) is both an added token and one of the BPE"
        is_dropped = i > last and token in added
        if token not in bpe and not is_dropped and not SPECIAL_TOKEN.fullmatch(token):
            return f"token {token!r} (id {i}) is a word that no merge makes"
    # tiktoken merges any two tokens that make a third, in the order of the ids. The tokenizers
    # library merges the listed pairs, in their order.
    derived = _derive_merges(tuple(sorted(bpe, key=ids.get)))
    for n, pairs in enumerate(zip_longest(merges, derived, fillvalue=["nothing"]), start=1):
        merge, needed = map(" ".join, pairs)
        if merge != needed:
            return f"merge {n} is {merge!r}, but the ids of the tokens need {needed!r} there"
    return None


def check_same_vocabulary(teacher, student, teacher_tokenizer, student_tokenizer):
    """Raise InputError if two models, given by name, do not have the same tokens in one order."""
    tokenizers = teacher_tokenizer, student_tokenizer
    teacher_vocab, student_vocab = (t.decode_tokens_bytes(range(t.n_vocab)) for t in tokenizers)
    if teacher_vocab != student_vocab:
        problem = f"teacher {teacher} and student {student} have different tokenizers"
        raise InputError(f"{problem}; a KL over the vocabulary needs one for both")


@functools.lru_cache(maxsize=4)
def tokenizer_files(tokenizer):
    """The text of a tokenizer's `vocab.json` and `merges.txt`, as Hugging Face reads them."""
    special = {tokenizer.encode_single_token(name): name for name in tokenizer.special_tokens_set}
    tokens = tokenizer.decode_tokens_bytes(range(tokenizer.n_vocab))
    names = ["".join(BYTE_ENCODER[byte] for byte in token) for token in tokens]
    pairs = _derive_merges(tuple(name for i, name in enumerate(names) if i not in special))
    vocab = {special.get(i, name): i for i, name in enumerate(names)}
    merges = [" ".join(pair) for pair in pairs]
    return json.dumps(vocab, ensure_ascii=False), "\n".join(["#version: 0.2", *merges, ""])


def save_tokenizer(tokenizer, directory, n_positions):
    """Write a tokenizer's files as Hugging Face reads them, each atomically. n_positions: those of
    its model."""
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": n_positions,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT),
        "padding_side": "left",  # where `generate` needs it
    }
    vocab, merges = tokenizer_files(tokenizer)
    write_atomic(Path(directory) / "vocab.json", vocab)
    write_atomic(Path(directory) / "merges.txt", merges)
    text = json.dumps(config, indent=2) + "\n"
    write_atomic(Path(directory) / "tokenizer_config.json", text)


@functools.lru_cache(maxsize=4)
def _derive_merges(tokens):
    """The pairs from which tiktoken merges the tokens longer than a byte. tokens: in the order of
    their ids, with a character for each byte."""
    ranks, pairs = {token: i for i, token in enumerate(tokens)}, []
    for token in tokens:
        # Merge the token's bytes, lowest rank first, until only the pair of its own merge is left.
        parts = list(token)
        while len(parts) > 2:
            pair_ranks = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
            i = pair_ranks.index(min(pair_ranks))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2 and ranks.keys() >= set(parts):
            pairs.append(tuple(parts))
    return pairs
