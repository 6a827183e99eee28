"""Rows of text to batches of tokens: the tokenizer, the template, JSON lines, and padding by length."""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str

from data.files import InputError

END = "<|endoftext|>"
MAX_LENGTH = 512  # tokens of a training row: request, response and end-of-text
MAX_REQUEST = 256  # tokens of a request


# ---- the tokenizer: a tiktoken.Encoding ------------------------------------------------------------------------------------


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
        raise InputError(f"{directory}: vocab.json and merges.txt can't be read ({error}); fetch them again") from error
    tokens, sound = dict.fromkeys(LETTER_OF_BYTE.values()), True
    for line in lines:
        if line.strip() and not line.startswith("#version"):
            left, _, right = line.partition(" ")
            sound &= left in tokens and right in tokens and left + right not in tokens
            tokens[left + right] = None
    # tiktoken merges in the order of token numbers, so these must be GPT-2's: bytes, merges in order, end-of-text.
    if not sound or vocab != {token: number for number, token in enumerate([*tokens, END])}:
        raise InputError(f"{vocab_path}: is not GPT-2's byte-level BPE numbered as in {merges_path.name} with {END} last; fetch both again")
    ranks = {bytes(BYTE_OF_LETTER[letter] for letter in token): number for number, token in enumerate(tokens)}
    return tiktoken.Encoding(str(directory), pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def same_tokens(tokenizer, other):
    """Whether two tokenizers number the same tokens alike, so that a KL over their vocabularies has a meaning."""
    of_both = [[t.decode_single_token_bytes(i) for i in range(t.n_vocab)] for t in (tokenizer, other)]
    return of_both[0] == of_both[1]


@functools.lru_cache(maxsize=4)
def tokenizer_files(tokenizer):
    """The text of `vocab.json` and of `merges.txt` for a tokenizer, as Hugging Face reads them."""
    tokens = [tokenizer.decode_single_token_bytes(number) for number in range(tokenizer.n_vocab - 1)]
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
    vocab = {"".join(LETTER_OF_BYTE[byte] for byte in token): number for token, number in rank.items()} | {END: len(rank)}
    return json.dumps(vocab, ensure_ascii=False), "\n".join(["#version: 0.2", *merges, ""])


# ---- rows ------------------------------------------------------------------------------------------------------------------


def fill_template(instruction, input=""):
    """The request that a model sees (the template of Alpaca, as in the paper's data): one header with an input, one without."""
    if input:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


def read_jsonl(path):
    """The objects of a JSON-lines file, in order. Raises InputError with file and line where one is not an object in UTF-8."""
    path, objects = Path(path), []
    if not path.is_file():
        raise InputError(f"{path}: {'is a directory; a file is wanted' if path.is_dir() else 'no such file'}")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # a byte-order mark is fine
                value = json.loads(text) if text.strip() else None
            except UnicodeDecodeError as error:
                raise InputError(f"{path}, line {number}: is not UTF-8; convert the file to UTF-8") from error
            except ValueError as error:
                raise InputError(f"{path}, line {number}: is not JSON ({error}); one object a line is wanted") from error
            except RecursionError as error:
                raise InputError(f"{path}, line {number}: is nested too deeply; one flat object a line is wanted") from error
            if not isinstance(value, dict):
                raise InputError(f"{path}, line {number}: is {'empty' if value is None else 'no JSON object'}; one object a line is wanted")
            objects.append(value)
    if not objects:
        raise InputError(f"{path}: has no rows")
    return objects


def read_texts(path, limit=None):
    """The documents of a text corpus: the field `text` of JSON lines; or, of a file that is not named .jsonl, what blank lines separate."""
    if Path(path).suffix != ".jsonl" and Path(path).is_file():
        try:
            return [text for text in re.split(r"\n\s*\n", Path(path).read_text(encoding="utf-8-sig")) if text.strip()][:limit]
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: is not UTF-8; convert the file to UTF-8") from error
    texts = [value.get("text") for value in read_jsonl(path)[:limit]]
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise InputError(f"{path}, line {number}: 'text' must be a text, not {json.dumps(text)[:40]}")
    return texts


def is_text_list(value):
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


@dataclass(frozen=True)
class Row:
    """One row of a data set. `index` is its place in the file; its random numbers hang on that."""

    index: int
    instruction: str
    input: str
    references: tuple  # of str; training uses the first
    ids: tuple | None = None  # the response's own tokens, where they were sampled (SeqKD)


def read_rows(path, limit=None, needs_output=True):
    """The rows of a data file, the first `limit` of them. Raises InputError with file and line where a field is wrong."""
    rows = []
    for index, value in enumerate(read_jsonl(path)):
        where = f"{path}, line {index + 1}"
        instruction, input, output, ids = value.get("instruction"), value.get("input"), value.get("output"), value.get("ids")
        if not isinstance(instruction, str):
            raise InputError(f"{where}: 'instruction' must be a text, not {json.dumps(instruction)[:40]}")
        if not isinstance(input, str | None):
            raise InputError(f"{where}: 'input' must be a text or absent, not {json.dumps(input)[:40]}")
        if isinstance(output, str):
            output = [output]
        elif output is None and not needs_output:
            output = []
        elif not is_text_list(output):
            raise InputError(f"{where}: 'output' must be a text or a list of texts, not {json.dumps(output)[:40]}")
        if ids is not None and not (isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)):
            raise InputError(f"{where}: 'ids' must be a list of token numbers, not {json.dumps(ids)[:40]}")
        rows.append(Row(index, instruction, input or "", tuple(output), None if ids is None else tuple(ids)))
    return rows[:limit]


@dataclass(frozen=True)
class Example:
    """A row in tokens. Request and response are encoded apart, so that no merge crosses the border."""

    index: int
    request: list
    response: list  # with end-of-text where the response has ended; [] where there is none yet


def training_examples(rows, tokenizer, max_length=MAX_LENGTH, max_request=MAX_REQUEST):
    """Examples of the rows whose request is within `max_request` tokens (the others are dropped), cut at `max_length`."""
    examples = []
    for row in rows:
        request = tokenizer.encode_ordinary(fill_template(row.instruction, row.input))
        if len(request) > max_request:
            continue
        if row.ids is not None:
            if max(row.ids, default=0) >= tokenizer.n_vocab:
                raise InputError(f"data, row {row.index + 1}: 'ids' has a token beyond the tokenizer's {tokenizer.n_vocab}; leave 'ids' out")
            response = list(row.ids)
        else:
            response = [*tokenizer.encode_ordinary(row.references[0]), tokenizer.eot_token]
        examples.append(Example(row.index, request, response[: max_length - len(request)]))
    return examples


def request_tokens(row, tokenizer, max_request=MAX_REQUEST):
    """A row's request in tokens. One over the limit is shortened at the end of its input, then of its instruction, so
    that the response header stays. Returns the tokens and whether it was shortened."""
    instruction, input = row.instruction, row.input
    request = tokenizer.encode_ordinary(fill_template(instruction, input))
    shortened = len(request) > max_request
    while len(request) > max_request and (instruction or input):
        tokens = tokenizer.encode_ordinary(input or instruction)
        kept = tokenizer.decode(tokens[: max(0, len(tokens) - (len(request) - max_request))], errors="ignore")
        instruction, input = (instruction, kept) if input else (kept, "")
        request = tokenizer.encode_ordinary(fill_template(instruction, input))
    return request, shortened


# ---- batches ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Rows of request + response, right-padded. Padding is told from the lengths, never from the tokens: GPT-2 pads with
    end-of-text, which is also a response's last token."""

    examples: list  # the B rows, in order
    ids: torch.Tensor  # (B, T)
    where: tuple  # two (N,) tensors, row and position: the logits there predict the N response tokens
    targets: torch.Tensor  # (N,) the response tokens


def pad(lists, device, fill=0):
    """Token lists as one right-padded tensor (B, T) and their lengths (B,)."""
    lengths = torch.tensor([len(tokens) for tokens in lists])
    ids = torch.full((len(lists), int(lengths.max())), fill)
    for row, tokens in zip(ids, lists):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids.to(device), lengths.to(device)


def make_batch(examples, device):
    """A Batch of examples, padded to the longest."""
    ids, lengths = pad([[*e.request, *e.response] for e in examples], device)  # (B, T), (B,)
    starts = torch.tensor([len(e.request) for e in examples], device=device)  # (B,)
    position = torch.arange(ids.shape[1], device=device)  # (T,)
    is_response = (position >= starts[:, None]) & (position < lengths[:, None])  # (B, T)
    row, place = is_response.nonzero(as_tuple=True)
    return Batch(examples, ids, (row, place - 1), ids[row, place])


def micro_batches(examples, size, device):
    """Batches of at most `size` examples each, sorted by length so that little is padding; the longest first, so that
    memory that doesn't suffice shows at once."""
    ordered = sorted(examples, key=lambda e: len(e.request) + len(e.response), reverse=True)
    return [make_batch(ordered[i : i + size], device) for i in range(0, len(ordered), size)]


def epoch_order(n, seed, epoch):
    """The order of n rows in an epoch: a permutation that depends on seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def packed_blocks(documents, block, seed, epoch):
    """Token lists (each with its end-of-text) joined in a random order and cut into blocks (M, block + 1); the last token
    of a block is the first of the next, so that every token is predicted once."""
    stream = np.concatenate([documents[i] for i in epoch_order(len(documents), seed, epoch)])
    count = (len(stream) - 1) // block
    starts = np.arange(count)[:, None] * block
    return torch.from_numpy(stream[starts + np.arange(block + 1)].astype(np.int64))
