"""The tokenizer of a checkpoint directory, as a tiktoken.Encoding."""

import functools
import json
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from data.cli import InputError, read_json

END_OF_TEXT = "<|endoftext|>"

# GPT-2 writes each byte as one printable character, in the order of the first 256 token ids.
_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
_REST = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_ENCODER = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_REST)}
BYTE_DECODER = {character: byte for byte, character in BYTE_ENCODER.items()}


def load_tokenizer(directory=None):
    """The tokenizer of a directory with `vocab.json` and `merges.txt`; without them GPT-2's own.

    Raises InputError if the two files contradict each other or GPT-2's can't be downloaded.
    """
    if directory is None or not (Path(directory) / "vocab.json").is_file():
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken lets its HTTP client's errors through
            problem = f"tokenizer 'gpt2': can't be downloaded ({type(error).__name__})"
            fix = "set TIKTOKEN_CACHE_DIR to a directory that has it"
            raise InputError(f"{problem}; {fix}") from error
    vocab_path, merges_path = Path(directory) / "vocab.json", Path(directory) / "merges.txt"
    hint = "fetch vocab.json and merges.txt again"
    vocab = read_json(vocab_path, hint)
    try:
        lines = merges_path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{merges_path}: can't be read ({error}); {hint}") from error
    # tiktoken merges in the order of the token ids, so these must be in GPT-2's order: the bytes,
    # the merges, end-of-text.
    mismatch = InputError(f"{vocab_path}: is not the byte-level BPE of {merges_path.name}; {hint}")
    token_ids = {character: i for i, character in enumerate(BYTE_DECODER)}
    for line in lines:
        if line.strip() and not line.startswith("#version"):
            left, _, right = line.partition(" ")
            if left not in token_ids or right not in token_ids or left + right in token_ids:
                raise mismatch
            token_ids[left + right] = len(token_ids)
    if vocab != token_ids | {END_OF_TEXT: len(token_ids)}:
        raise mismatch
    return tiktoken.Encoding(
        str(directory),
        pat_str=r50k_pat_str,
        mergeable_ranks={bytes(BYTE_DECODER[c] for c in t): i for t, i in token_ids.items()},
        special_tokens={END_OF_TEXT: len(token_ids)},
    )


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
    tokens = tokenizer.decode_tokens_bytes(range(tokenizer.n_vocab - 1))
    ranks = {token: i for i, token in enumerate(tokens)}
    names = ["".join(BYTE_ENCODER[byte] for byte in token) for token in tokens]
    merges = []
    for token in tokens[256:]:
        # Merge the token's bytes, lowest rank first, until only the pair of its own merge is left.
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pair_ranks = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
            i = pair_ranks.index(min(pair_ranks))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append(" ".join(names[ranks[part]] for part in parts))
    vocab = {name: i for i, name in enumerate([*names, END_OF_TEXT])}
    return json.dumps(vocab, ensure_ascii=False), "\n".join(["#version: 0.2", *merges, ""])
