"""JSON lines to rows, examples and batches."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.cli import InputError

MAX_NEW_TOKENS = 256  # tokens of a response, whatever the request's length


MAX_LENGTH = 512  # tokens of a training row: request, response and end-of-text


MAX_REQUEST = 256  # tokens of a request


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
        raise InputError(
            f"{path}: {'is a directory; a file is wanted' if path.is_dir() else 'no such file'}"
        )
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode(
                    "utf-8-sig" if number == 1 else "utf-8"
                )  # a byte-order mark is fine
                value = json.loads(text) if text.strip() else None
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}, line {number}: is not UTF-8; convert the file to UTF-8"
                ) from error
            except ValueError as error:
                raise InputError(
                    f"{path}, line {number}: is not JSON ({error}); one object a line is wanted"
                ) from error
            except RecursionError as error:
                raise InputError(
                    f"{path}, line {number}: is nested too deeply; one flat object a line is wanted"
                ) from error
            if not isinstance(value, dict):
                raise InputError(
                    f"{path}, line {number}: is {'empty' if value is None else 'no JSON object'}; one object a line is wanted"
                )
            objects.append(value)
    if not objects:
        raise InputError(f"{path}: has no rows")
    return objects


def read_texts(path, limit=None):
    """The documents of a text corpus: the field `text` of JSON lines; or, of a file that is not named .jsonl, what blank lines separate."""
    if Path(path).suffix != ".jsonl" and Path(path).is_file():
        try:
            return [
                text
                for text in re.split(r"\n\s*\n", Path(path).read_text(encoding="utf-8-sig"))
                if text.strip()
            ][:limit]
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: is not UTF-8; convert the file to UTF-8") from error
    texts = [value.get("text") for value in read_jsonl(path)[:limit]]
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise InputError(
                f"{path}, line {number}: 'text' must be a text, not {json.dumps(text)[:40]}"
            )
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
        location = f"{path}, line {index + 1}"
        instruction, input, output, ids = (
            value.get("instruction"),
            value.get("input"),
            value.get("output"),
            value.get("ids"),
        )
        if not isinstance(instruction, str):
            raise InputError(
                f"{location}: 'instruction' must be a text, not {json.dumps(instruction)[:40]}"
            )
        if not isinstance(input, str | None):
            raise InputError(
                f"{location}: 'input' must be a text or absent, not {json.dumps(input)[:40]}"
            )
        if isinstance(output, str):
            output = [output]
        elif output is None and not needs_output:
            output = []
        elif not is_text_list(output):
            raise InputError(
                f"{location}: 'output' must be a text or a list of texts, not {json.dumps(output)[:40]}"
            )
        if ids is not None and not (
            isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)
        ):
            raise InputError(
                f"{location}: 'ids' must be a list of token numbers, not {json.dumps(ids)[:40]}"
            )
        rows.append(
            Row(index, instruction, input or "", tuple(output), None if ids is None else tuple(ids))
        )
    return rows[:limit]


@dataclass(frozen=True)
class Example:
    """A row in tokens. Request and response are encoded apart, so that no merge crosses the border."""

    index: int
    request: list
    response: list  # with end-of-text where the response has ended; [] where there is none yet


@dataclass(frozen=True)
class RolloutRow(Example):
    """A row of MiniLLM's rollout: (log q(y_t), w_t, R_t) for each of its response's tokens, under the q that sampled it."""

    tokens: list


def encode_training_rows(rows, tokenizer, max_length=MAX_LENGTH, max_request=MAX_REQUEST):
    """Examples of the rows whose request is within `max_request` tokens (the others are dropped), cut at `max_length`."""
    examples = []
    for row in rows:
        request = tokenizer.encode_ordinary(fill_template(row.instruction, row.input))
        if len(request) > max_request:
            continue
        if row.ids is not None:
            if max(row.ids, default=0) >= tokenizer.n_vocab:
                raise InputError(
                    f"data, row {row.index + 1}: 'ids' has a token beyond the tokenizer's {tokenizer.n_vocab}; leave 'ids' out"
                )
            response = list(row.ids)
        else:
            response = [*tokenizer.encode_ordinary(row.references[0]), tokenizer.eot_token]
        examples.append(Example(row.index, request, response[: max_length - len(request)]))
    return examples


def encode_request(row, tokenizer, max_request=MAX_REQUEST):
    """A row's request in tokens. One over the limit is shortened at the end of its input, then of its instruction, so
    that the response header stays. Returns the tokens and whether it was shortened."""
    instruction, input = row.instruction, row.input
    request = tokenizer.encode_ordinary(fill_template(instruction, input))
    shortened = len(request) > max_request
    while len(request) > max_request and (instruction or input):
        tokens = tokenizer.encode_ordinary(input or instruction)
        kept = tokenizer.decode(
            tokens[: max(0, len(tokens) - (len(request) - max_request))], errors="ignore"
        )
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
    response_positions: (
        tuple  # two (N,) tensors, row and position: the logits there predict the N response tokens
    )
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


def packed_blocks(documents, block_size, seed, epoch):
    """Token lists (each with its end-of-text) joined in a random order and cut into blocks (M, block + 1); the last token
    of a block is the first of the next, so that every token is predicted once."""
    stream = np.concatenate([documents[i] for i in epoch_order(len(documents), seed, epoch)])
    count = (len(stream) - 1) // block_size
    starts = np.arange(count)[:, None] * block_size
    return torch.from_numpy(stream[starts + np.arange(block_size + 1)].astype(np.int64))
