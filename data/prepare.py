"""Prepare the public data sets: python -m data.prepare dolly self_inst vicuna sinst uinst [--source DIR]. Each becomes a directory
`data/<set>/` of JSON lines with `instruction`, `input` and `output` (a text, or a list of reference texts)."""

import argparse
import json
import os
import random
import shutil
from pathlib import Path

from data import demo
from data.cli import InputError, run_command_line, write_atomic
from data.hub import download, hub_url
from data.rows import Row, read_jsonl, read_rows

HOME = Path(__file__).parent


# set: repository on the Hugging Face hub, its files, and how many rows the paper's experiments have
PUBLIC_SETS = {
    "dolly": (
        "MiniLLM/dolly",
        ("raw.jsonl", "valid.jsonl"),
        {"train": 11_435, "dev": 1_000, "test": 500},
    ),
    "self_inst": ("MiniLLM/self-inst", ("valid.jsonl",), {"test": 242}),
    "vicuna": ("MiniLLM/Vicuna", ("valid.jsonl",), {"test": 80}),
    "sinst": (
        "MiniLLM/sinst",
        ("11_/valid.jsonl",),
        {"test": 1_694},
    ),  # 11_: references of 11 words or more
    "uinst": ("MiniLLM/uinst", ("11_/valid.jsonl",), {"test": 10_000}),
}


RAW_DOLLY = "databricks-dolly-15k.jsonl"  # the raw release, whose split is not the paper's


DEV_ROWS, TEST_ROWS = 1_000, 500


UNNI_FILE_ROWS = 23_916  # of which the experiments take the first 10,000


def prepare(name, source=None, target=None):
    """Write the files of a set to `target` (data/<set>/), from files at hand in `source` or from the network.

    source: the folder of the set's files, or a folder that has theirs under the set's name or the hub's. Dolly is MiniLLM's raw.jsonl and
    valid.jsonl, or a split made already (train.jsonl, dev.jsonl and valid.jsonl), or the raw release databricks-dolly-15k.jsonl. Any
    other set is valid.jsonl or test.jsonl, perhaps in a folder 11_ as on the hub.
    Returns a line that says what was made. Raises InputError where a file can't be had or a row is wrong; nothing is written then.
    """
    target, wanted = Path(target or HOME / name), PUBLIC_SETS[name][2]
    splits, note = (
        _download(name, target / "download") if source is None else _read(name, Path(source))
    )
    for split in wanted:
        if not splits[split]:
            raise InputError(f"{source}: leaves no rows for {split}; check its files")
    for split in reversed(wanted):  # training rows last: then the set is whole
        lines = [
            {
                "instruction": r.instruction,
                "input": r.input,
                "output": r.references[0] if len(r.references) == 1 else r.references,
            }
            for r in splits[split]
        ]
        write_atomic(target / f"{split}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    counts = {split: len(rows) for split, rows in splits.items()}
    if counts != wanted and not note:
        note = f"; the paper's experiments have {_listed(wanted)}"
    return f"{target}: {_listed(counts)} rows{note}"


def _download(name, folder):
    """A set from the hub, by way of `folder`, which keeps the files: what `_read` gives."""
    repository, files, _ = PUBLIC_SETS[name]
    for file in files:
        url = hub_url(f"datasets/{repository}", file)
        if not (folder / file).is_file() and not download(url, folder / file):
            raise InputError(f"{url} does not exist; give the files yourself with --source DIR")
    try:
        return _read(name, folder)
    except InputError as error:
        shutil.rmtree(folder)
        raise InputError(f"{error}; the download is removed, so try again") from error


def _read(name, source):
    """A set's rows by split, and what is to be said about them."""
    return _read_dolly(source) if name == "dolly" else _read_test_set(name, source)


def _read_dolly(source):
    for folder in (source, source / "dolly", source / "raw"):
        there = {path.name for path in folder.glob("*.jsonl")}
        if there >= {"train.jsonl", "dev.jsonl", "valid.jsonl"}:
            return {
                split: read_rows(folder / f"{file}.jsonl")
                for split, file in (("train", "train"), ("dev", "dev"), ("test", "valid"))
            }, ""
        if there >= {"raw.jsonl", "valid.jsonl"}:
            rows = read_rows(folder / "raw.jsonl")
            return {
                "train": rows[DEV_ROWS:],
                "dev": rows[:DEV_ROWS],
                "test": read_rows(folder / "valid.jsonl"),
            }, ""
        if RAW_DOLLY in there:
            return _split_raw(
                folder / RAW_DOLLY
            ), "; NOT the paper's split, but one of the raw release"
    raise InputError(
        f"{source}: has neither raw.jsonl and valid.jsonl, nor train.jsonl, dev.jsonl and valid.jsonl, nor {RAW_DOLLY}; name their folder"
    )


def _read_test_set(name, source):
    repository, (file,), wanted = PUBLIC_SETS[name]
    folders = [source / name, source / repository.split("/")[1], source]
    if any((source / of_dolly).is_file() for of_dolly in ("train.jsonl", "raw.jsonl")):
        folders.pop()  # its valid.jsonl is Dolly's
    paths = [
        folder / place
        for folder in folders
        for place in (file, file.replace("valid", "test"), "valid.jsonl", "test.jsonl")
    ]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise InputError(
            f"{source}: has no {file}, valid.jsonl or test.jsonl of {name}, nor a folder {name} with one; name their folder"
        )
    rows = read_rows(path)
    if name != "uinst" or len(rows) <= wanted["test"]:
        return {"test": rows}, ""
    note = "" if len(rows) == UNNI_FILE_ROWS else f"; the paper's file has {UNNI_FILE_ROWS:,}"
    return {"test": rows[: wanted["test"]]}, f", the first of {len(rows):,}{note}"


def _listed(counts):
    return ", ".join(f"{count:,} {split}" for split, count in counts.items())


def _split_raw(path):
    """The raw release (instruction, context, response, category), split by a seeded shuffle."""
    rows = []
    for index, value in enumerate(read_jsonl(path)):
        texts = [value.get(field) for field in ("instruction", "context", "response")]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"{path}, line {index + 1}: 'instruction', 'context' and 'response' must be texts"
            )
        rows.append(Row(index, texts[0], texts[1], (texts[2],)))
    random.Random(10).shuffle(rows)
    held_out = DEV_ROWS + TEST_ROWS
    return {"train": rows[held_out:], "dev": rows[:DEV_ROWS], "test": rows[DEV_ROWS:held_out]}


def find_data_dir(name):
    """The directory of a data set: one of PUBLIC_SETS or "demo", prepared if it is not there yet, or a directory.

    Under torchrun call it on one rank and let the others wait (ranks.on_first).
    """
    if name == "demo":
        if not (HOME / "demo" / "pretrain.jsonl").is_file():
            demo.write_demo(HOME / "demo")
        return HOME / "demo"
    if name in PUBLIC_SETS:
        if not all((HOME / name / f"{split}.jsonl").is_file() for split in PUBLIC_SETS[name][2]):
            print(prepare(name), flush=True)
        return HOME / name
    if not os.path.isdir(name):
        raise InputError(
            f"data {name!r}: no such directory; give one with train.jsonl, dev.jsonl and test.jsonl, or one of {', '.join(PUBLIC_SETS)}, demo"
        )
    return Path(name)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", description="Prepare public data sets under data/."
    )
    parser.add_argument(
        "sets", nargs="+", choices=list(PUBLIC_SETS), metavar="SET", help=", ".join(PUBLIC_SETS)
    )
    parser.add_argument(
        "--source", metavar="DIR", help="a folder with the files, instead of the network"
    )
    args = parser.parse_args(argv)
    for name in args.sets:
        print(prepare(name, args.source))


if __name__ == "__main__":
    run_command_line(main)
