"""Prepare public data sets, each as JSON lines in data/<set>/, or in $PROMPTKD_DATA_DIR/<set>/.

python -m data.prepare dolly self_inst vicuna sinst uinst [--source DIR]
"""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from data.models.hub import download, hub_url
from data.process.command_line import ArgumentParser
from data.process.dist import print_once
from data.process.errors import InputError
from data.process.files import check_output_dir, write_atomic
from data.runs.paper import PAPER_SETS
from data.sets import demo
from data.sets.rows import Row, read_jsonl, read_rows, text_field, to_jsonl

DATA_DIR = Path(__file__).parent.parent
RAW_DOLLY = "databricks-dolly-15k"  # the original release; its split is not the paper's
PRETRAINING_FILE = "pretrain.jsonl"
WAY_OUT = "set the variable PROMPTKD_DATA_DIR to a writable directory"


@dataclass(frozen=True)
class PublicSet:
    """A data set that is downloaded from the hub."""

    repository: str
    files: dict  # {split: its file there}; JSON lines as of `--data DIR`
    paper_rows: dict = field(default_factory=dict)  # {split: rows in the paper's experiments}
    license: str | None = None  # as the hub spells it, if it is known

    @property
    def splits(self):
        return list(self.paper_rows or self.files)


def paper_test_set(name, repository, file="valid.jsonl"):
    return PublicSet(repository, {"test": file}, {"test": PAPER_SETS[name]})


# MiniLLM calls the paper's test rows valid.jsonl. Its raw.jsonl of Dolly starts with the dev rows.
# 11_ has the rows with references of 11 words or more.
PUBLIC_SETS = {
    "dolly": PublicSet(
        "MiniLLM/dolly",
        files={"train": "raw.jsonl", "test": "valid.jsonl"},
        # Of the released files, after their filter of lengths. The paper writes 14,000 and 500.
        paper_rows={"train": 11_435, "dev": 1_000, "test": PAPER_SETS["dolly"]},
        license="cc-by-sa-3.0",
    ),
    "self_inst": paper_test_set("self_inst", "MiniLLM/self-inst"),
    "vicuna": paper_test_set("vicuna", "MiniLLM/Vicuna"),
    "sinst": paper_test_set("sinst", "MiniLLM/sinst", "11_/valid.jsonl"),
    "uinst": paper_test_set("uinst", "MiniLLM/uinst", "11_/valid.jsonl"),
}
NAMED_SETS = (*PUBLIC_SETS, "demo")


def prepared_dir(name):
    """The directory of a set that `prepare` writes: data/<set>/, or below PROMPTKD_DATA_DIR."""
    value = os.path.expandvars(os.environ.get("PROMPTKD_DATA_DIR", ""))
    return Path(os.path.expanduser(value) or DATA_DIR) / name


def prepare(name, source=None, target=None):
    """Write the files of a set to `target` (default: `prepared_dir`). Returns a line for the user.
    source: a directory with the set's files, laid out as `_read_dolly` or `_read_set` says; None
    for the hub. If one is missing or malformed, raises InputError and writes nothing."""
    target, public_set = Path(target or prepared_dir(name)), PUBLIC_SETS[name]
    check_output_dir(target, "data", WAY_OUT)
    directory = target / "download" if source is None else Path(source)
    downloaded = _download(name, directory) if source is None else []
    try:
        splits, note = (_read_dolly if name == "dolly" else _read_set)(name, directory)
    except InputError as error:
        if not downloaded:
            raise
        for path in downloaded:  # and no file that the user has put there
            path.unlink()
        raise InputError(f"{error}; the download is removed, so try again") from error
    if empty := [split for split in public_set.splits if not splits[split]]:
        raise InputError(f"{directory}: leaves no rows for {empty[0]}; check its files")
    # The training rows come last: a set that has them is complete.
    for split in sorted(public_set.splits, key=lambda split: split == "train"):
        values = []
        for row in splits[split]:
            output = row.references[0] if len(row.references) == 1 else row.references
            values.append({"instruction": row.instruction, "input": row.input, "output": output})
        write_atomic(target / f"{split}.jsonl", to_jsonl(values))

    def format_counts(counts):
        return ", ".join(f"{count:,} {split}" for split, count in counts.items())

    counts = {split: len(rows) for split, rows in splits.items()}
    expected = public_set.paper_rows or counts
    if counts != expected and not note:
        note = f"; the paper's experiments have {format_counts(expected)}"
    return f"{target}: {format_counts(counts)} rows{note}"


def _download(name, directory):
    """Download the files of a set that are not in `directory` yet. Returns their paths."""
    public_set = PUBLIC_SETS[name]
    missing = [file for file in public_set.files.values() if not (directory / file).is_file()]
    for file in missing:
        url = hub_url(f"datasets/{public_set.repository}", file)
        if not download(url, directory / file):
            raise InputError(f"{url} does not exist; give the files yourself with --source DIR")
    return [directory / file for file in missing]


def _read_dolly(name, source):
    """Rows by split, and a note, from ready splits, MiniLLM's files or the original release.
    MiniLLM calls the paper's test set valid.jsonl. Its raw.jsonl starts with the 1,000 dev rows."""
    for directory in (source, source / name, source / "raw"):
        paths = {path.stem: path for path in directory.glob("*.jsonl")}
        if {"train", "dev", "valid"} <= set(paths):
            train, dev, test = (read_rows(paths[stem]) for stem in ("train", "dev", "valid"))
            return {"train": train, "dev": dev, "test": test}, ""
        if {"raw", "valid"} <= set(paths):
            rows, test = read_rows(paths["raw"]), read_rows(paths["valid"])
            return {"train": rows[1000:], "dev": rows[:1000], "test": test}, ""
        if RAW_DOLLY in paths:
            rows = []
            for i, (location, value) in enumerate(read_jsonl(paths[RAW_DOLLY])):
                fields = ("instruction", "context", "response")
                instruction, context, response = (text_field(value, f, location) for f in fields)
                rows.append(Row(i, instruction, context, (response,)))
            random.Random(10).shuffle(rows)
            splits = {"train": rows[1500:], "dev": rows[:1000], "test": rows[1000:1500]}
            return splits, "; NOT the paper's split"
    missing = "neither raw.jsonl and valid.jsonl, nor train.jsonl, dev.jsonl and valid.jsonl"
    raise InputError(f"{source}: has {missing}, nor {RAW_DOLLY}.jsonl; name their folder")


def _read_set(name, source):
    """Rows by split, and a note. The file of a split is called as on the hub or by the split. It is
    in `source`, or in a directory there with the set's name here or on the hub."""
    public_set, splits = PUBLIC_SETS[name], {}
    directories = [source / name, source / public_set.repository.split("/")[1]]
    # The valid.jsonl next to one of these is Dolly's, not that of a set that has only test rows.
    beside_dolly = any((source / file).is_file() for file in ("train.jsonl", "raw.jsonl"))
    if "train" in public_set.files or not beside_dolly:
        directories.append(source)
    for split, file in public_set.files.items():
        files = [file, file.replace("valid", split), Path(file).name, f"{split}.jsonl"]
        paths = [directory / file for directory in directories for file in files]
        path = next(filter(Path.is_file, paths), None)
        if path is None:
            missing = f"has no {file} or {split}.jsonl of {name}"
            raise InputError(f"{source}: {missing}; name their folder")
        splits[split] = read_rows(path)
    limit = public_set.paper_rows.get("test")
    if name == "uinst" and len(splits["test"]) > limit:  # MiniLLM's file has 23,916
        return {"test": splits["test"][:limit]}, f", the first of {len(splits['test']):,}"
    return splits, ""


def _write_demo(directory):
    """Write the demo's sets."""
    check_output_dir(directory, "data", WAY_OUT)
    (directory / PRETRAINING_FILE).unlink(missing_ok=True)
    # The version's file is written last.
    for name, text in (demo.data_files() | {"version.txt": demo.VERSION}).items():
        write_atomic(directory / name, text)


def write_pretraining_text(directory):
    """Write the demo's pre-training text if it is missing. It takes ten seconds and 76 MB."""
    if not (directory / PRETRAINING_FILE).is_file():
        check_output_dir(directory, "data", WAY_OUT)
        write_atomic(directory / PRETRAINING_FILE, demo.pretraining_text())


def find_local_data(name):
    """The directory of a data set, as `find_data_dir`, and whether it is ready: one of PUBLIC_SETS
    or "demo" may have to be prepared first. Writes and downloads nothing."""
    hides_folder = name in NAMED_SETS and os.path.isdir(name)
    if hides_folder and Path(name).resolve() != prepared_dir(name).resolve():
        problem = f"the set of this project is taken, not the folder {name} here"
        print_once(f"warning: data {name!r}: {problem}; for the folder give ./{name}")
    if name == "demo":
        version = prepared_dir(name) / "version.txt"  # that of another version of the demo is old
        is_ready = version.is_file() and version.read_text(encoding="utf-8") == demo.VERSION
        return prepared_dir(name), is_ready
    if name in PUBLIC_SETS:
        directory, splits = prepared_dir(name), PUBLIC_SETS[name].splits
        return directory, all((directory / f"{split}.jsonl").is_file() for split in splits)
    if not os.path.isdir(name):
        expected = f"train.jsonl, dev.jsonl and test.jsonl, or one of {', '.join(NAMED_SETS)}"
        raise InputError(f"data {name!r}: no such directory; give one with {expected}")
    return Path(name), True


def find_data_dir(name):
    """The directory of a data set: `name` itself, or that of one of PUBLIC_SETS or "demo", which is
    prepared first if need be. Under torchrun, call this through `dist.run_on_rank0`."""
    directory, is_ready = find_local_data(name)
    if name == "demo" and not is_ready:
        _write_demo(directory)
    elif not is_ready:
        print(prepare(name), flush=True)
    return directory


def main(argv=None):
    description = f"Prepare data sets in data/ or $PROMPTKD_DATA_DIR: {', '.join(PUBLIC_SETS)}."
    parser = ArgumentParser("python -m data.prepare", description=description)
    parser.add_argument("sets", nargs="+", choices=PUBLIC_SETS, metavar="SET")
    parser.add_argument("--source", metavar="DIR", help="read the files here, not from the hub")
    args = parser.parse_args(argv)
    for name in args.sets:
        print(prepare(name, args.source))
