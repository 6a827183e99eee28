"""Text files -> Row -> the template's request -> Example in token ids -> padded Batch."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data.process.errors import InputError
from data.process.files import check_lfs_pointer, write_atomic
from sample import pad

MAX_REQUEST = 256  # tokens of a request
MAX_NEW_TOKENS = 256  # tokens of a sampled response
MAX_LENGTH = 512  # tokens of a training row: request, response and end-of-text
MAX_SPACES = 900_000  # in a row. At a million tiktoken panics, with an error that is no Exception.

# How files that hold no UTF-8 text begin, and what to do with them
COMPRESSED = rb"\x1f\x8b|\x28\xb5\x2f\xfd|BZh[1-9]1AY|\xfd7zXZ|PK\x03\x04"
NOT_TEXT = {
    COMPRESSED: "is compressed (with gzip, zstd, bzip2, xz or zip); decompress it",
    rb"PAR1": "is a Parquet file; write its rows as JSON, one object per line",
    rb"\xff\xfe|\xfe\xff|[^\n]*\0": "is UTF-16 or no text at all; convert it to UTF-8",
}
# A brace or bracket, and after it what prose does not have there: a quote, or the line's end
JSON_START = re.compile(r'\s*(\{\s*("|$)|\[\s*([{"]|$))')


def open_text(path):
    """Open a file in bytes; also what the shell gives in place of one: "-", /dev/stdin, <(COMMAND).
    Raises InputError if there is none, or if its first bytes show that it holds no UTF-8 text."""
    source = Path("/dev/stdin" if str(path) == "-" else path)
    if source.parts[:2] != ("/", "dev"):
        if not source.is_file():
            problem = "is a directory, not a file" if source.is_dir() else "no such file"
            raise InputError(f"{path}: {problem}")
        check_lfs_pointer(source)
    file = source.open("rb")
    start = file.peek(64)  # what comes through a pipe can be read only once
    for signature, problem in NOT_TEXT.items():
        if re.match(signature, start):
            raise InputError(f"{path}: {problem}")
    return file


def check_text_file(path):
    """Return a path as a Path. Raises InputError if `open_text` does."""
    open_text(path).close()
    return Path(path)


def read_jsonl(path):
    """All of `iter_jsonl`, as a list."""
    return list(iter_jsonl(path))


def iter_jsonl(path):
    """Yield the objects of a JSON-lines file, each with its location: ("PATH, line N", object).

    Blank lines are skipped and counted, so that N is the file's own number. Raises InputError with
    file and line if a line is not an object, and if there is none.
    """
    is_empty = True
    with open_text(path) as file:  # in bytes, so that a line that is not UTF-8 has its number
        for number, line in enumerate(file, start=1):
            location = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{location}: is not UTF-8; convert the file to UTF-8") from error
            if text.strip():
                yield location, _parse_object(text, location)
                is_empty = False
    if is_empty:
        raise InputError(f"{path}: has no rows")


def to_jsonl(objects):
    return "".join(json.dumps(value) + "\n" for value in objects)


def _parse_object(text, location):
    problem = "is not a JSON object"
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON ({error})"
    raise InputError(f"{location}: {problem}; expected one object per line")


def check_field(valid, location, field, value, expected):
    if not valid:
        raise InputError(f"{location}: '{field}' must be {expected}, not {json.dumps(value)[:40]}")


def text_field(value, field, location):
    text = value.get(field)
    check_field(isinstance(text, str), location, field, text, "a string")
    return text


def check_spaces(text, location):
    """Raise InputError if a text has more white space in a row than tiktoken can take."""
    is_long = len(text) > MAX_SPACES
    if is_long and max(map(len, re.findall(r"\s+", text)), default=0) > MAX_SPACES:
        problem = f"has more than {MAX_SPACES:,} spaces or line ends in a row"
        raise InputError(f"{location}: {problem}, too many for the tokenizer; shorten them")


def references_field(value, location, required=True):
    """The references of an object, a tuple: its `output`, which is a string or a list of them."""
    output = value.get("output")
    texts = [output] if isinstance(output, str) else output
    valid = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
    valid = valid or (output is None and not required)
    check_field(valid, location, "output", output, "a string or a list of strings")
    return tuple(texts or ())


def corpus_format(path):
    """How a corpus is stored: "JSON lines" if its first line that is not blank begins as JSON, or
    its name ends so; else "plain text". JSON of another layout, such as one array of objects,
    counts as JSON lines as well: `read_jsonl` refuses it, and it is never taken for prose."""
    path = check_text_file(path)
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        line = next((line for line in file if line.strip()), "")
    has_name = path.suffix.lower() in (".jsonl", ".ndjson", ".json")
    return "JSON lines" if has_name or JSON_START.match(line) else "plain text"


def read_texts(path, limit=None):
    """The first texts of `iter_texts`. The others are checked."""
    return [text for i, text in enumerate(iter_texts(path)) if limit is None or i < limit]


def iter_texts(path):
    """Yield the texts of a corpus: the field `text` of JSON lines, or what blank lines separate in
    plain text (see `corpus_format`). Reads no more of the file than is asked for."""
    if corpus_format(path) == "JSON lines":
        for location, value in iter_jsonl(path):
            text = text_field(value, "text", location)
            check_spaces(text, location)
            yield text
        return
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, text in _split_at_blank_lines(file):
                if text.strip():
                    check_spaces(text, f"{path}, text from line {number} on")
                    yield text
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8; convert the file to UTF-8") from error


def _split_at_blank_lines(lines):
    """Yield the items of re.split(r"\\n\\s*\\n", text), each with the number of its first line.
    lines: of the text, with their ends."""
    part, start, after_blank = [], 1, False
    for number, line in enumerate(lines, start=1):
        is_blank = line.isspace() and line.endswith("\n")
        if is_blank and (part or after_blank):
            yield start, "".join(part)[:-1]
            part, start, after_blank = [], number + 1, True
        else:  # also a blank line at the start of the file
            part.append(line)
            after_blank = False
    yield start, "".join(part)


@dataclass(frozen=True)
class Row:
    """One row of a data set."""

    index: int  # position among the file's rows, part of the seed of the row's random numbers
    instruction: str
    input: str  # may be empty
    references: tuple  # of str; training uses the first
    ids: tuple | None = None  # the tokens of a sampled response (SeqKD)
    # File and line, for messages. Not in repr, which tells whether kept responses fit the rows.
    location: str = field(default="data", repr=False, compare=False)


def read_rows(path, limit=None, needs_output=True, sampled=False):
    """The first `limit` rows of a file. Raises InputError if a field of any row is malformed.

    sampled: whether it has responses that SeqKD's teacher sampled, with their tokens in `ids`. In
    a user's own rows a field of that name means something else, and is ignored as all others are.
    """
    rows = []
    for index, (location, value) in enumerate(read_jsonl(path)):
        instruction = text_field(value, "instruction", location)
        input, ids = value.get("input"), value.get("ids") if sampled else None
        check_field(isinstance(input, str | None), location, "input", input, "a string or absent")
        references = references_field(value, location, needs_output)
        for text in (instruction, input or "", *references):
            check_spaces(text, location)
        if ids is not None:
            valid = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
            check_field(valid, location, "ids", ids, "a list of token ids")
            ids = tuple(ids)
        rows.append(Row(index, instruction, input or "", references, ids, location))
    return rows[:limit]


def fill_template(instruction, input=""):
    """The request that a model sees: Alpaca's template, as in the paper's data."""
    context = ", paired with an input that provides further context" if input else ""
    input_section = f"### Input:\n{input}\n\n" if input else ""
    return (
        f"Below is an instruction that describes a task{context}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{input_section}### Response:\n"
    )


@dataclass(frozen=True)
class Example:
    """A row in token ids. Request and response are encoded apart. Together, a merge could cross the
    border, and the request would have other tokens than the one that is sampled from."""

    index: int
    request: list
    response: list  # ends with end-of-text unless it is cut off; [] if there is none yet
    # MiniLLM's rollout: (log q(y_t), w_t, R_t) per response token, under the q that sampled it
    scores: list | None = None


def encode_training_rows(rows, tokenizer):
    """Examples of at most MAX_LENGTH tokens. Rows with a request over MAX_REQUEST are dropped."""
    examples = []
    for row in rows:
        request = tokenizer.encode_ordinary(fill_template(row.instruction, row.input))
        if len(request) > MAX_REQUEST:
            continue
        response = row.ids
        if response is None:
            response = [*tokenizer.encode_ordinary(row.references[0]), tokenizer.eot_token]
        elif max(response, default=0) >= tokenizer.n_vocab:
            problem = f"has a token beyond the tokenizer's {tokenizer.n_vocab}; leave 'ids' out"
            raise InputError(f"{row.location}: 'ids' {problem}")
        examples.append(Example(row.index, request, list(response[: MAX_LENGTH - len(request)])))
    return examples


def encode_request(row, tokenizer):
    """A row's request in token ids, and whether it was shortened to MAX_REQUEST tokens: at the end
    of the input, then of the instruction, so that the response header stays."""
    instruction, input = row.instruction, row.input
    request = tokenizer.encode_ordinary(fill_template(instruction, input))
    shortened = len(request) > MAX_REQUEST
    # The shortened text may encode to more tokens than were kept, so try until it fits.
    while len(request) > MAX_REQUEST and (instruction or input):
        tokens = tokenizer.encode_ordinary(input or instruction)
        n_kept = max(0, len(tokens) - (len(request) - MAX_REQUEST))
        kept = tokenizer.decode(tokens[:n_kept], errors="ignore")
        instruction, input = (instruction, kept) if input else (kept, "")
        request = tokenizer.encode_ordinary(fill_template(instruction, input))
    return request, shortened


@dataclass(frozen=True)
class Batch:
    """B examples, right-padded: every row starts at position 0, and causal attention keeps tokens
    from seeing the padding after them. Padding is told from the lengths, never from the ids: GPT-2
    has no padding token, and end-of-text is also the last token of a response."""

    examples: list
    ids: torch.Tensor  # (B, T) request + response
    response_positions: tuple  # rows (N,) and positions (N,) of the logits of the N response tokens
    targets: torch.Tensor  # (N,) the response tokens


def make_batch(examples, device):
    ids, lengths = pad([[*e.request, *e.response] for e in examples], device)  # (B, T), (B,)
    starts = torch.tensor([len(e.request) for e in examples], device=device)  # (B,)
    positions = torch.arange(ids.shape[1], device=device)  # (T,)
    is_response = (positions >= starts[:, None]) & (positions < lengths[:, None])  # (B, T)
    rows, columns = is_response.nonzero(as_tuple=True)  # (N,), (N,)
    # The logits at position t predict token t + 1, so those of a token are one to its left.
    return Batch(examples, ids, (rows, columns - 1), ids[rows, columns])


def micro_batches(examples, max_tokens, device, prompt_length=0):
    """Batches of at most `max_tokens` positions, or of one example. Padding counts, and so does a
    soft prompt before each row. Sorted by length for little padding, the longest first to fail
    early."""

    def n_positions(e):
        return prompt_length + len(e.request) + len(e.response)

    ordered, batches = sorted(examples, key=n_positions, reverse=True), []
    while ordered:
        n_rows = max(1, max_tokens // n_positions(ordered[0]))
        batches.append(make_batch(ordered[:n_rows], device))
        ordered = ordered[n_rows:]
    return batches


def epoch_order(n, seed, epoch):
    """A permutation of n rows that depends only on seed and epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def packed_examples(documents, block_size, seed, epoch=0):
    """Documents (lists of token ids), joined in random order and cut into examples: one token, and
    `block_size` more to predict. They overlap by one token, so every token is predicted once."""
    order = epoch_order(len(documents), seed, epoch)
    stream = [token for i in order for token in documents[i]]
    starts = range(0, len(stream) - block_size, block_size)
    blocks = [stream[start : start + block_size + 1] for start in starts]
    return [Example(i, block[:1], block[1:]) for i, block in enumerate(blocks)]


def count_complete_lines(path):
    """The number of lines in a file that is being written; creates it, cuts off a partial line."""
    content = path.read_bytes() if path.is_file() else b""
    # Written again, because not every file system can truncate a file.
    write_atomic(path, content[: content.rfind(b"\n") + 1])
    return content.count(b"\n")
