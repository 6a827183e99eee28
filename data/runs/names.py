"""The names of runs, and what models and data sets are called in tables."""

import os
import zlib
from pathlib import Path

from data.runs.runs import read_record, run_dir
from data.sets.prepare import NAMED_SETS

UNFINISHED = " (unfinished)"  # appended to the label of a run that is not complete
OUR_LABELS = ("average", "reference")  # in tables, besides models and data sets


def recorded_name(name, out):
    """How run.json names a model or a data set: inside --out relative to it, else as given."""
    if not name or not os.path.exists(name):
        return name
    path, out = run_dir(name), Path(out).resolve()
    if not path.is_relative_to(out):
        return name
    inside = path.relative_to(out).as_posix()
    return f"./{inside}" if inside in NAMED_SETS else inside


def public_name(name):
    """How a model or file is named to others: what is on this machine by ./ and its last part."""
    is_path = name and name not in NAMED_SETS and (os.path.isabs(name) or os.path.exists(name))
    return f"./{run_dir(name).name}" if is_path else name


def base_label(model):
    """The short name of the model that a run starts from, for naming stages: gpt2-xl for gpt2-xl
    itself and for every stage (pretrain, init, teacher) that was trained from it."""
    record, name = read_record(model), run_dir(model).name
    is_base = record and run_kind(record) in ("pretrain", "init", "teacher")
    return record.get("base", name) if is_base else name


def override_suffix(option, value):
    """What an override adds to a run's name: -lr0.001. A file adds its name without the suffix, any
    other text its checksum. option: of data.runs.methods."""
    if option.metavar == "FILE":
        value = Path(value).stem
    elif isinstance(value, float):
        value = f"{value:g}"
    elif isinstance(value, str) and not option.choices:
        value = f"{zlib.crc32(value.encode('utf-8', 'surrogatepass')):08x}"
    return f"-{option.name.replace('_', '')}{value}"


def unique_labels(names, ours=()):
    """A short label for each model or data set: its directory's name, with as many parent
    directories as it takes to tell it from the others. ours: names that never are a directory's."""
    is_path = [name not in ours and os.path.exists(name) for name in names]
    parts = [run_dir(name).parts if p else (name,) for name, p in zip(names, is_path)]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    labels = []
    for p in parts:
        label = "/".join(p[-depth:])
        labels.append("/".join(p[-depth - 1 :]) if label in OUR_LABELS else label)
    return [printable(label) for label in labels]


def printable(name):
    """A name on one line of valid text. A file's name may have newlines, and bytes that are not
    UTF-8, which Python reads as lone surrogates."""
    return " ".join(name.splitlines()).encode("utf-8", "backslashreplace").decode()


def run_labels(names):
    """Labels of models as in `unique_labels`, with a mark on runs that are not complete."""
    records = [read_record(name) if os.path.exists(name) else {} for name in names]
    marks = [UNFINISHED if record and not record.get("complete") else "" for record in records]
    return [label + mark for label, mark in zip(unique_labels(names), marks)]


def run_kind(record):
    """The kind of stage that a run is: "teacher", "init", "promptkd", ..."""
    return record["name"].split("-")[0]
