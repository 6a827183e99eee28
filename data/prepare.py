"""Prepare the public data sets: python -m data.prepare dolly [--source DIR]. Each becomes a directory `data/<set>/` of JSON lines
with `instruction`, `input` and `output` (a text, or a list of reference texts)."""

import argparse
import json
import random
from pathlib import Path

from data import demo
from data.files import InputError, command, download, hub_url, write_atomic
from data.rows import read_jsonl, read_rows

HOME = Path(__file__).parent

# set: repository on the Hugging Face hub, and how many rows there must be (design of the paper's experiments)
PUBLIC_SETS = {"dolly": ("datasets/MiniLLM/dolly", {"train": 11_435, "dev": 1_000, "test": 500})}
RAW_DOLLY = "databricks-dolly-15k.jsonl"  # the raw release, whose split is not the paper's
DEV_ROWS, TEST_ROWS = 1_000, 500


def prepare(name, source=None, target=None):
    """Write the files of a set to `target` (data/<set>/), from files at hand in `source` or from the network.

    source: a folder with MiniLLM's files (raw.jsonl and valid.jsonl), with a split made already (train.jsonl, dev.jsonl and
    valid.jsonl), or with the raw release databricks-dolly-15k.jsonl; or a folder of such folders.
    Returns a line that says what was made.
    """
    repository, wanted = PUBLIC_SETS[name]
    target = Path(target or HOME / name)
    note = ""
    if source is None:
        source = target / "download"
        for file in ("raw.jsonl", "valid.jsonl"):
            if not (source / file).is_file() and not download(hub_url(repository, file), source / file):
                raise InputError(f"{hub_url(repository, file)} does not exist; give the files yourself with --source DIR")
    folders = [folder for folder in (Path(source), Path(source) / name, Path(source) / "raw") if folder.is_dir()]
    for folder in folders:
        if all((folder / file).is_file() for file in ("train.jsonl", "dev.jsonl", "valid.jsonl")):
            splits = {split: read_rows(folder / file) for split, file in (("train", "train.jsonl"), ("dev", "dev.jsonl"), ("test", "valid.jsonl"))}
            break
        if all((folder / file).is_file() for file in ("raw.jsonl", "valid.jsonl")):
            rows = read_rows(folder / "raw.jsonl")
            splits = {"train": rows[DEV_ROWS:], "dev": rows[:DEV_ROWS], "test": read_rows(folder / "valid.jsonl")}
            break
        if (folder / RAW_DOLLY).is_file():
            splits, note = _split_raw(folder / RAW_DOLLY), "; NOT the paper's split, but one of the raw release"
            break
    else:
        raise InputError(
            f"{source}: has neither raw.jsonl and valid.jsonl, nor train.jsonl, dev.jsonl and valid.jsonl, nor {RAW_DOLLY}; name their folder"
        )
    for split in wanted:
        if not splits[split]:
            raise InputError(f"{folder}: leaves no rows for {split}; check its files")
    for split in ("test", "dev", "train"):  # training rows last: then the set is whole
        lines = [
            {"instruction": r.instruction, "input": r.input, "output": r.references[0] if len(r.references) == 1 else r.references}
            for r in splits[split]
        ]
        write_atomic(target / f"{split}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    counts = {split: len(rows) for split, rows in splits.items()}
    if counts != wanted and not note:
        note = f"; the paper's experiments have {_listed(wanted)}"
    return f"{target}: {_listed(counts)} rows{note}"


def _listed(counts):
    return ", ".join(f"{count:,} {split}" for split, count in counts.items())


def _split_raw(path):
    """The raw release (instruction, context, response, category), split by a seeded shuffle."""
    from data.rows import Row

    rows = []
    for index, value in enumerate(read_jsonl(path)):
        texts = [value.get(field) for field in ("instruction", "context", "response")]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}, line {index + 1}: 'instruction', 'context' and 'response' must be texts")
        rows.append(Row(index, texts[0], texts[1], (texts[2],)))
    random.Random(10).shuffle(rows)
    held_out = DEV_ROWS + TEST_ROWS
    return {"train": rows[held_out:], "dev": rows[:DEV_ROWS], "test": rows[DEV_ROWS:held_out]}


def data_directory(name):
    """The directory of a data set: one of PUBLIC_SETS or "demo", prepared if it is not there yet, or a directory.

    Under torchrun call it on one rank and let the others wait (ranks.on_first).
    """
    if name == "demo":
        if not (HOME / "demo" / "pretrain.jsonl").is_file():
            demo.write_demo(HOME / "demo")
        return HOME / "demo"
    if name in PUBLIC_SETS:
        if not all((HOME / name / f"{split}.jsonl").is_file() for split in PUBLIC_SETS[name][1]):
            print(prepare(name), flush=True)
        return HOME / name
    if not name or not Path(name).is_dir():
        raise InputError(
            f"data {name!r}: no such directory; give one with train.jsonl, dev.jsonl and test.jsonl, or one of {', '.join(PUBLIC_SETS)}, demo"
        )
    return Path(name)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Prepare public data sets under data/.")
    parser.add_argument("sets", nargs="+", choices=list(PUBLIC_SETS), metavar="SET", help=", ".join(PUBLIC_SETS))
    parser.add_argument("--source", metavar="DIR", help="a folder with the files, instead of the network")
    args = parser.parse_args(argv)
    for name in args.sets:
        print(prepare(name, args.source))


if __name__ == "__main__":
    command(main)
