"""The tokenizer of a checkpoint directory, as a tiktoken.Encoding."""

import functools
import json
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from data.cli import InputError

END = "<|endoftext|>"


def _byte_letters():
    """GPT-2's printable stand-in for each byte, in the order of the first 256 tokens."""
    printable = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(rest)}


LETTER_OF_BYTE = _byte_letters()


BYTE_OF_LETTER = {letter: byte for byte, letter in LETTER_OF_BYTE.items()}


def load_tokenizer(directory=None):
    """The tokenizer of a checkpoint directory with `vocab.json` and `merges.txt`; GPT-2's own where there are none.

    Raises InputError where the two files contradict each other, or GPT-2's can't be downloaded.
    """
    if directory is None or not (Path(directory) / "vocab.json").is_file():
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken lets its HTTP client's errors through
            raise InputError(
                f"tokenizer 'gpt2': can't be downloaded ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that holds it"
            ) from error
    vocab_path, merges_path = Path(directory) / "vocab.json", Path(directory) / "merges.txt"
    try:
        vocab = json.loads(vocab_path.read_text(encoding="utf-8"))
        lines = merges_path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{directory}: vocab.json and merges.txt can't be read ({error}); fetch them again"
        ) from error
    tokens, sound = dict.fromkeys(LETTER_OF_BYTE.values()), True
    for line in lines:
        if line.strip() and not line.startswith("#version"):
            left, _, right = line.partition(" ")
            sound &= left in tokens and right in tokens and left + right not in tokens
            tokens[left + right] = None
    # tiktoken merges in the order of token numbers, so these must be GPT-2's: bytes, merges in order, end-of-text.
    if not sound or vocab != {token: number for number, token in enumerate([*tokens, END])}:
        raise InputError(
            f"{vocab_path}: is not GPT-2's byte-level BPE numbered as in {merges_path.name} with {END} last; fetch both again"
        )
    ranks = {
        bytes(BYTE_OF_LETTER[letter] for letter in token): number
        for number, token in enumerate(tokens)
    }
    return tiktoken.Encoding(
        str(directory),
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END: len(ranks)},
    )


def same_vocabulary(tokenizer, other):
    """Whether two tokenizers number the same tokens alike, so that a KL over their vocabularies has a meaning."""
    of_both = [
        [t.decode_single_token_bytes(i) for i in range(t.n_vocab)] for t in (tokenizer, other)
    ]
    return of_both[0] == of_both[1]


@functools.lru_cache(maxsize=4)
def tokenizer_files(tokenizer):
    """The text of `vocab.json` and of `merges.txt` for a tokenizer, as Hugging Face reads them."""
    tokens = [
        tokenizer.decode_single_token_bytes(number) for number in range(tokenizer.n_vocab - 1)
    ]
    rank = {token: number for number, token in enumerate(tokens)}
    merges = []
    for token in tokens[256:]:
        # What the token was merged from: merge its bytes with the merges before its own, until two parts are left.
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [rank.get(a + b, len(rank)) for a, b in zip(parts, parts[1:])]
            first = min(range(len(pairs)), key=pairs.__getitem__)
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        merges.append(" ".join("".join(LETTER_OF_BYTE[byte] for byte in part) for part in parts))
    vocab = {
        "".join(LETTER_OF_BYTE[byte] for byte in token): number for token, number in rank.items()
    } | {END: len(rank)}
    return json.dumps(vocab, ensure_ascii=False), "\n".join(["#version: 0.2", *merges, ""])
