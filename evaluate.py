"""ROUGE-L of models and runs on data sets (the paper's Table 1 and Figure 1; Tables 3 and 5 and Figure 4 by a run's settings; Table 6),
what the runs cost (Table 2), and ROUGE-L of responses made elsewhere."""

import argparse
import hashlib
import json
import math
import os
import statistics
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data import ranks  # before torch: data/__init__.py says why

import torch
from rouge_score.rouge_scorer import RougeScorer
from tqdm import tqdm

from data.files import InputError, check_out, command, model_directory, parse_arguments, pyplot, write_atomic
from data.prepare import PUBLIC_SETS, data_directory
from data.ranks import say
from data.rows import is_text_list, read_jsonl, read_rows, request_tokens
from model import GPT, CheckpointError, read_config
from sample import MAX_NEW, add_decoding_options, add_precision_option, in_range, load_model, rows_at_once, sample_all, to_text

BANNED_NGRAM = 6  # the published numbers on the five public sets were sampled under this ban (the paper does not say so)
DEMO_SETS = ("test", "wording", "words", "longer", "combined")  # what `demo` stands for: its test set, and four unlike the training data
KINDS = ("init", "sft", "kd", "seqkd", "minillm", "gkd", "promptkd")  # the table's order within one size of student
UNFINISHED = " (unfinished)"  # behind the label of a run that is not complete

# ---- the paper's figures ------------------------------------------------------------------------------------------------------

PAPER_SETS = {"dolly": 500, "self_inst": 242, "vicuna": 80, "sinst": 1_694, "uinst": 10_000}  # and their rows
# Table 1: ROUGE-L on these sets, by kind of run and size of student
PAPER_SCORES = {
    "teacher": {"xl": (27.3, 14.5, 16.2, 27.1, 31.6)},
    "sft": {"base": (22.9, 10.2, 14.5, 16.3, 18.5), "medium": (25.1, 12.9, 15.9, 23.7, 27.4), "large": (24.9, 13.4, 15.8, 24.0, 27.6)},
    "kd": {"base": (22.6, 11.0, 15.1, 18.0, 20.1), "medium": (25.1, 13.0, 15.6, 24.5, 27.7), "large": (25.7, 13.7, 15.9, 24.0, 27.7)},
    "seqkd": {"base": (23.3, 10.3, 14.7, 16.6, 19.2), "medium": (25.3, 12.7, 16.0, 23.8, 27.5), "large": (25.2, 13.3, 15.8, 24.0, 27.4)},
    "minillm": {"base": (24.2, 12.7, 16.9, 25.1, 26.2), "medium": (26.3, 14.8, 17.9, 26.4, 31.2), "large": (26.2, 15.8, 16.9, 28.5, 33.5)},
    "gkd": {"base": (24.8, 11.1, 17.7, 20.7, 23.2), "medium": (26.9, 14.8, 17.8, 26.6, 30.9), "large": (26.9, 14.1, 17.1, 25.4, 29.6)},
    "promptkd": {"base": (25.6, 13.1, 16.8, 26.8, 28.9), "medium": (27.3, 15.0, 17.6, 27.1, 32.6), "large": (26.9, 16.4, 17.8, 29.5, 34.8)},
}
# The authors' own students
PUBLISHED = {f"gmkim/GPT-2-{n}M-distilled-PromptKD-Dolly-v1.0": f"promptkd {size}" for n, size in ((120, "base"), (340, "medium"), (760, "large"))}
COSTS = {"memory_allocated_gb": "allocated, GB", "memory_reserved_gb": "reserved, GB", "hours": "hours", "memory_resident_gb": "resident, GB"}
# Table 2: GPT-2 XL to base on 8 RTX 3090, by kind of run: GB allocated, GB reserved, hours
PAPER_COSTS = {
    "sft": (2.36, 2.75, 0.43), "kd": (5.91, 6.45, 0.85), "seqkd": (5.91, 6.45, 0.86),
    "minillm": (12.63, 21.45, 7.59), "gkd": (6.23, 6.93, 8.48), "promptkd": (13.47, 14.40, 9.78),
}  # fmt: skip

# ---- scores -------------------------------------------------------------------------------------------------------------------


def rouge_l(responses, references):
    """ROUGE-L of each response: rouge-score's F-measure with the stemmer, the best over its references, × 100.

    responses: texts; references: for each a list of texts. Raises InputError where the two differ in length.
    """
    if len(responses) != len(references):
        raise InputError(f"{len(responses)} responses for {len(references)} rows of references; they must go row by row")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [100 * max(scorer.score(r, text)["rougeL"].fmeasure for r in refs) for text, refs in zip(responses, references)]


def evaluate(model, tokenizer, rows, key, label=None, at_once=None, max_new=MAX_NEW, dtype="float32", **how):
    """A model's responses to rows and their ROUGE-L, sampled and scored by all ranks together, each a part.

    key: what the random numbers hang on before the row's index, as (seed, "evaluate", set). Returns for every row, in order,
    on every rank: {"index", "text", "rouge_l", "shortened": whether its request was cut to fit}.
    """
    model.eval()
    ordered, results = sorted(rows, key=lambda row: -len(row.instruction + row.input)), []
    at_once = at_once or rows_at_once([model], -(-len(rows) // ranks.world()), max_new, dtype)
    # Ranks share whole batches, so that on CPUs a row meets the same others, and the same rounding, on any number of ranks.
    batches = ranks.share([ordered[i : i + at_once] for i in range(0, len(ordered), at_once)])
    if label:
        batches = tqdm(batches, desc=label, unit="batch", leave=False, disable=None if ranks.rank() == 0 else True)
    for batch in batches:
        requests, shortened = zip(*(request_tokens(row, tokenizer) for row in batch))
        keys = [(*key, row.index) for row in batch]
        responses, _ = sample_all(model, requests, keys, tokenizer.eot_token, max_new, at_once, dtype=dtype, **how)
        texts = [to_text(response, tokenizer) for response in responses]
        scores = rouge_l(texts, [row.references for row in batch])
        results += [
            {"index": row.index, "text": t, "rouge_l": score, "shortened": cut} for row, t, score, cut in zip(batch, texts, scores, shortened)
        ]
    return sorted(ranks.gather(results), key=lambda result: result["index"])


def mean_rouge_l(results):
    return statistics.fmean(result["rouge_l"] for result in results)


def evaluate_models(models, sets, seeds, device, columns=None, keep=None, at_once=None, **decoding):
    """Mean ROUGE-L of every model in every column: {model: {column: [a score for each seed]}}.

    models: {label: name of a model}. sets: {label: rows}. columns: {column: (set, n of the n-grams that may not repeat)};
    None: a column a set, without a ban. keep: a directory where the responses are kept; those that lie there already, made from
    the same model, rows, seed and decoding, are not sampled again. None: nothing is written.
    """
    columns = columns or {name: (name, 0) for name in sets}
    hashes = {label: ranks.on_first(weights_hash, name) for label, name in models.items()} if keep else {}
    row_hashes = {name: hashlib.sha256(repr(rows).encode()).hexdigest() for name, rows in sets.items()}
    done, missing = {}, {}  # (label, column, seed): their summary, or what the responses are to be made from
    for job in ((label, column, seed) for label in models for column in columns for seed in seeds):
        label, (name, ban), seed = job[0], columns[job[1]], job[2]
        made_from = dict(weights=hashes.get(label), rows=len(sets[name]), data=row_hashes[name], seed=seed, no_repeat_ngram=ban, **decoding)
        done[job] = ranks.on_first(kept_summary, response_path(keep, label, name, seed, ban), made_from) if keep else None
        if done[job] is None:
            missing[job] = made_from

    loaded, how = None, {"max_new": MAX_NEW, "dtype": "float32"} | decoding
    n_rows = sum(made_from["rows"] for made_from in missing.values())
    with tqdm(total=n_rows, unit="row", disable=None if missing and ranks.rank() == 0 else True) as bar:
        for (label, column, seed), made_from in missing.items():
            if loaded != label:
                model, tokenizer = load_model(models[label], device)
                loaded = label
            (name, ban), results = columns[column], []
            bar.set_description(f"{label} on {column}, seed {seed}")
            rows = sorted(sets[name], key=lambda row: -len(row.instruction + row.input))  # of like length together
            portion = ranks.world() * (at_once or rows_at_once([model], len(rows), how["max_new"], how["dtype"]))
            for part in (rows[i : i + portion] for i in range(0, len(rows), portion)):
                results += evaluate(model, tokenizer, part, (seed, "evaluate", name.rsplit("/")[-1]), at_once=at_once, no_repeat=ban, **how)
                bar.update(len(part))
            results.sort(key=lambda result: result["index"])
            done[label, column, seed] = summary(results)
            if keep:
                ranks.on_first(keep_results, response_path(keep, label, name, seed, ban), results, made_from)
    for (label, column, seed), (_, shortened) in done.items():
        if shortened and seed == seeds[0]:
            say(f"{label} on {column}: {shortened} of {len(sets[columns[column][0]])} requests were shortened to fit")
    return {label: {column: [done[label, column, seed][0] for seed in seeds] for column in columns} for label in models}


def summary(results):
    return mean_rouge_l(results), sum(result["shortened"] for result in results)


def response_path(keep, label, set_name, seed, ban):
    """Where a model's responses are kept: one JSON object a line, of which --score reads `text`."""
    label = label.removesuffix(UNFINISHED).strip("/")
    return Path(keep) / label / f"{set_name.strip('/')}-s{seed}{f'-ngram{ban}' if ban else ''}.jsonl"


def weights_hash(name):
    """SHA-256 of a model's weights file; "" where there is none, which loading will tell."""
    for path in (model_directory(str(name)) / file for file in ("model.safetensors", "pytorch_model.bin")):
        if path.is_file():
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
            return digest.hexdigest()
    return ""


def keep_results(path, results, made_from):
    """Write responses, and beside them what they were made from, with their own hash: a pair that does not belong together shows."""
    text = "".join(json.dumps(result) + "\n" for result in results)
    write_atomic(path, text)
    write_atomic(path.with_suffix(".json"), json.dumps(made_from | {"responses": hashlib.sha256(text.encode()).hexdigest()}, indent=1) + "\n")


def kept_summary(path, made_from):
    """The summary of responses kept in a file; None where there are none, or others than these, which is said."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = {}
    wanted = made_from | {"responses": hashlib.sha256(path.read_bytes()).hexdigest()}
    if found == wanted:
        return summary(read_jsonl(path))
    others = [name for name, value in wanted.items() if not isinstance(found, dict) or found.get(name) != value]
    say(f"{path}: was made from other {', '.join(others)}; made anew")
    return None


# ---- models and sets by their names -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model to evaluate: a run of ours, or another."""

    name: str  # as load_model reads it
    size: int  # parameters
    kind: str = ""  # of a run: teacher, init, sft, promptkd, ...
    paper: str | None = None  # what it is in the paper, as "promptkd base", if it is anything there
    record: dict | None = None  # a run's run.json


def read_record(directory):
    """The run.json of a directory, None where there is none."""
    path = Path(directory) / "run.json"
    if not os.path.isfile(path):
        return None
    fields = {"name": str, "settings": dict, "paper": str | None, "parameters": int | None, "hours": float | int | None}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is damaged ({error}); remove {directory} and train it again") from error
    for field, kind in fields.items():
        if not isinstance(record, dict) or not isinstance(record.get(field), kind):
            raise InputError(f"{path}: is no run's record ('{field}' is wrong); remove {directory} and train it again")
    return {field: value for field, value in record.items() if value is not None}


def kind_of(record):
    return record["name"].split("-")[0]


def label_of(label, record):
    return label if "hours" in record else label + UNFINISHED


def table_order(kind, size):
    """Teachers first, then students by size, the kinds of one size in the order of KINDS; last what is no run of ours."""
    return (kind != "teacher") + (kind == ""), size if kind else 0, KINDS.index(kind) if kind in KINDS else len(KINDS)


def open_models(names):
    """The models of these names, {label: Model}, in the table's order. A directory without a model is left out, and said."""
    found = []
    for name in names:
        if os.path.isdir(name) and not any((Path(name) / file).is_file() for file in ("best/config.json", "config.json")):
            say(f"{name}: has no model (neither best/ nor config.json), left out")
        else:
            found.append(name)
    if not found:
        raise InputError("none of the directories has a model; name a run with best/, or a checkpoint directory with config.json")
    models = {}
    for label, name in zip(named_once(found), found):
        with torch.device("meta"):
            size = GPT(read_config(ranks.on_first(model_directory, name))).n_parameters()
        record = read_record(name)
        if record is None:
            models[label] = Model(name, size, paper=PUBLISHED.get(name))
        else:
            models[label_of(label, record)] = Model(name, size, kind_of(record), record.get("paper"), record)
    return dict(sorted(models.items(), key=lambda item: table_order(item[1].kind, item[1].size)))


def open_sets(names, limit=None):
    """The test rows of data sets, {label: rows}, the first `limit` of each. names: public sets, directories, or demo for all of its sets."""
    paths = {}
    for label, name in zip(named_once(names), names):
        home = ranks.on_first(data_directory, name)
        found = {part: home / ("" if part == "test" else part) for part in DEMO_SETS} if name == "demo" else {label: home}
        for label, path in found.items():
            if paths.setdefault(label, path).resolve() != path.resolve():
                raise InputError(f"--data: two sets are called {label!r}; evaluate them one after the other")
    return {label: read_rows(path / "test.jsonl", limit) for label, path in paths.items()}


# ---- the tables ---------------------------------------------------------------------------------------------------------------


def spread(scores):
    """The standard deviation of the sample; of a single score None."""
    return statistics.stdev(scores) if len(scores) > 1 else None


def format_score(scores):
    """Mean and, for several seeds, spread."""
    return f"{statistics.fmean(scores):.1f}" + (f" ± {spread(scores):.1f}" if len(scores) > 1 else "")


def with_averages(scores, averages=None):
    """Scores as evaluate_models gives them, with columns of averages behind: seed by seed the mean over the columns.

    averages: {name: columns}; None: one over all.
    """
    extended = {}
    for label, by_column in scores.items():
        extended[label] = dict(by_column)
        for name, columns in (averages or {"average": list(by_column)}).items():
            extended[label][name] = [statistics.fmean(of_a_seed) for of_a_seed in zip(*(by_column[column] for column in columns))]
    return extended


def paper_figures(model, columns, sets, averages):
    """The paper's figures for a model, {column: ROUGE-L}, where a column was evaluated as in the paper: all rows, 6-grams banned.

    columns: {column: (set, n of the banned n-grams)}, of public sets alone.
    """
    kind, _, size = (model.paper or "").partition(" ")
    published = dict(zip(PAPER_SETS, PAPER_SCORES.get(kind, {}).get(size, ())))
    as_there = {column: name for column, (name, ban) in columns.items() if ban == BANNED_NGRAM and len(sets[name]) == PAPER_SETS.get(name)}
    figures = {column: published[name] for column, name in as_there.items() if name in published}
    means = {name: statistics.fmean(figures[column] for column in of) for name, of in averages.items() if figures.keys() >= set(of)}
    return figures | means


def leaders(scores, sizes):
    """The best of each size in each column, and those not worse than it by more than the spread of the difference: {column: labels}.

    scores: {label: {column: [a score a seed]}}. sizes: {label: parameters} of those to compare. With one seed there are none.
    """
    found = {}
    for column in next(iter(scores.values())):
        for size in dict.fromkeys(sizes.values()):
            rivals = {label: scores[label][column] for label in sizes if sizes[label] == size}
            best = max(rivals.values(), key=statistics.fmean)
            if len(rivals) > 1 and len(best) > 1:
                near = [label for label, s in rivals.items() if statistics.fmean(best) - statistics.fmean(s) <= math.hypot(spread(s), spread(best))]
                found.setdefault(column, []).extend(near)
    return found


def differs(scores, figure):
    """Whether a figure of the paper's lies outside our spread around our mean."""
    return len(scores) > 1 and abs(statistics.fmean(scores) - figure) > spread(scores)


def table(scores, figures=None, best=None):
    """Cells of a table with a row for each model and a column for each of its scores.

    scores: {label: {column: [a score a seed]}}. figures: the paper's, {label: {column: figure}}. best: {column: labels to be marked}.
    """
    figures, best = figures or {}, best or {}
    lines = [["ROUGE-L"], *([label] for label in scores)]
    for name in next(iter(scores.values())):
        numbers, marks = [name], [""]
        for label, by_column in scores.items():
            figure = figures.get(label, {}).get(name)
            numbers.append(format_score(by_column[name]))
            marks.append("" if name not in best else " *" if label in best[name] else "  ")
            if figure is not None:
                marks[-1] += f" ({figure:.1f}{' ≠' if differs(by_column[name], figure) else ''})"
        width = max(map(len, marks))
        for line, number, mark in zip(lines, numbers, marks):
            line.append(number + mark.ljust(width))
    return lines


def lay_out(lines, markdown=False):
    """Lines of cells, the first with the columns' names, as aligned text or as a table in Markdown."""
    if markdown:
        rule = [":--", *["--:"] * (len(lines[0]) - 1)]
        return "\n".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |" for line in [lines[0], rule, *lines[1:]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *(c.rjust(width) for c, width in zip(line[1:], widths[1:]))]).rstrip() for line in lines)


def legend(scores, figures, best):
    """What the marks in a table mean, a line each, as far as there are any."""
    lines = ["*: the best of its size in the column, or not worse by more than the spread of the difference, √(s₁² + s₂²)"] if best else []
    if any(figures.values()):
        far = any(differs(scores[label][name], figure) for label, by_column in figures.items() for name, figure in by_column.items())
        lines.append("in brackets: the paper's figure" + ("; ≠: ours differs from it by more than our spread" if far else ""))
    return lines


def publish(out, stem, title, cells, notes, content):
    """Print a table, and write it as Markdown and JSON."""
    print(lay_out(cells), *notes, sep="\n")
    write_atomic(out / f"{stem}.md", "\n\n".join([f"### {title}", lay_out(cells, markdown=True), *notes]) + "\n")
    write_atomic(out / f"{stem}.json", json.dumps(content, indent=1) + "\n")
    print(f"also in {out / stem}.md and .json")


def draw_bars(path, bars, lines, title, xlabel):
    """Grouped bars. bars: {(group, series): scores}, as high as their mean, with the spread as error bar. lines: {label: height}.

    Returns the path, or why there is no picture.
    """
    plot = pyplot()
    if plot is None or not bars:
        return "no picture without " + ("matplotlib" if bars else "a student")
    groups, several = (list(dict.fromkeys(key[i] for key in bars)) for i in (0, 1))
    there = {group: [series for series in several if (group, series) in bars] for group in groups}
    width = 0.8 / max(map(len, there.values()))
    n_columns = 4 if max(map(len, several)) < 20 else 2  # of the legend
    height = 4 + 0.25 * math.ceil((len(several) + len(lines)) / n_columns)
    figure, axes = plot.subplots(figsize=(min(14, 5 + 0.5 * len(bars)), height), layout="constrained")
    for color, series in enumerate(several):
        mine = [group for group in groups if series in there[group]]
        x = [groups.index(group) + (there[group].index(series) - (len(there[group]) - 1) / 2) * width for group in mine]
        heights, errors = ([f(bars[group, series]) or 0 for group in mine] for f in (statistics.fmean, spread))
        drawn = axes.bar(x, heights, 0.9 * width, yerr=errors if any(errors) else None, capsize=3, label=series, color=f"C{color % 10}")
        axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    for label, height in lines.items():
        axes.axhline(height, linestyle="--", linewidth=1, color="black", label=label)
    axes.set_xticks(range(len(groups)), groups)
    axes.set(title=textwrap.fill(title, 72), xlabel=xlabel, ylabel="ROUGE-L")
    axes.margins(y=0.1)
    figure.legend(loc="outside lower center", ncols=n_columns)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plot.close(figure)
    return str(path)


def figure_1(path, averages, models, title):
    """A bar for each student, beside those of its size, and the teachers as dashed lines. averages: {label: [a score a seed]}."""
    sizes = {label: f"{m.size / 1e6:,.0f} M" if m.size >= 1e7 else f"{m.size / 1e3:,.0f} thousand" for label, m in models.items()}
    known = Counter((sizes[label], model.kind) for label, model in models.items())
    bars, lines = {}, {}
    for label, model in models.items():
        if model.kind == "teacher":
            lines[f"teacher, {sizes[label]}"] = statistics.fmean(averages[label])
        elif model.kind != "pretrain":
            alone = model.kind and known[sizes[label], model.kind] == 1
            bars[sizes[label], model.kind if alone else label] = averages[label]
    return draw_bars(path, bars, lines, title, "parameters of the student")


def table_2(names, out):
    """What runs took, printed and written: the peak of the memory in their metrics.jsonl, and hours. No model is run."""
    runs = {}
    for label, name in zip(named_once(names), names):
        record, metrics = read_record(name), Path(name) / "metrics.jsonl"
        if record is None:
            say(f"{name}: has no run.json, left out")
            continue
        lines = read_jsonl(metrics) if metrics.is_file() and metrics.stat().st_size else []
        values = {field: [line[field] for line in lines if isinstance(line.get(field), float | int)] for field in COSTS}
        values["hours"] = [record["hours"]] if "hours" in record else []
        size = record.get("parameters", 0)
        of_paper = PAPER_COSTS.get(kind_of(record), ()) if (record.get("paper") or "").endswith(" base") else ()
        runs[label_of(label, record)] = table_order(kind_of(record), size), {f: max(v) for f, v in values.items() if v}, dict(zip(COSTS, of_paper))
    if not runs:
        raise InputError("none of the directories has a run.json; name runs, as in: evaluate.py --cost out/*/")
    fields = [field for field in COSTS if any(field in peaks for _, peaks, _ in runs.values())]
    cells, content = [["cost", *(COSTS[field] for field in fields)]], {}
    for label, (_, peaks, paper) in sorted(runs.items(), key=lambda item: item[1][0]):
        content[label] = {"measured": peaks, "paper": paper}
        beside = {field: f" ({paper[field]:.2f})" if field in paper else "" for field in fields}
        cells.append([label, *(f"{peaks[field]:.2f}{beside[field]}" if field in peaks else "-" for field in fields)])
    notes = ["memory: the peak on one rank; in brackets, where a run is one of the paper's: its figure"]
    publish(out, "table2", "Table 2: memory and time", cells, notes, {"costs": content})


def group_runs(models, fields):
    """The runs among models by their values of some fields: {values: labels}. A field is looked up in run.json's settings, then in itself."""
    runs = {label: model.record for label, model in models.items() if model.record}
    known = {field for record in runs.values() for field in (*record, *record["settings"])} - {"settings"}
    groups = {}
    for field in fields:
        if field not in known:
            raise InputError(f"--by {field}: no run named has this field; there are {', '.join(sorted(known)) or 'no runs'}")
    for label, record in runs.items():
        found = record | {field: value for field, value in record["settings"].items() if value is not None}
        values = tuple(v if isinstance(v, str | int | float | None) else json.dumps(v) for v in map(found.get, fields))
        if any(value is not None for value in values):
            groups.setdefault(values, []).append(label)
        else:
            say(f"{label}: has no {' or '.join(fields)}, left out of the groups")
    return dict(sorted(groups.items(), key=lambda item: [(v is None, isinstance(v, str), 0 if v is None else v) for v in item[0]]))


def table_by(out, fields, groups, averages, title):
    """Averages of groups of runs, the scores of a group's runs pooled, as a table and as bars. averages: {label: [a score a seed]}."""
    pooled = {tuple("-" if v is None else str(v) for v in values): [s for label in runs for s in averages[label]] for values, runs in groups.items()}
    cells = [[*fields, "runs", "ROUGE-L"], *([*key, str(len(runs)), format_score(s)] for (key, s), runs in zip(pooled.items(), groups.values()))]
    stem, content = f"by-{'-'.join(fields)}", [{"values": key, "runs": runs, "scores": s} for (key, s), runs in zip(pooled.items(), groups.values())]
    publish(
        out,
        f"table-{stem}",
        title,
        cells,
        ["the scores of a group's runs are pooled: mean ± standard deviation over runs and seeds"],
        {"fields": fields, "groups": content},
    )
    bars = {(key[0], " ".join([*fields[1:], *key[1:]]) or "average"): s for key, s in pooled.items()}
    print(draw_bars(out / f"figure-{stem}.png", bars, {}, title, fields[0]))


def table_6(out, n, set_name, rows, files):
    """Print and write n requests of a set, spread evenly, with the reference and each model's response. files: {label: kept responses}."""
    texts = {label: {line["index"]: line["text"] for line in read_jsonl(path)} for label, path in files.items()}
    page = [f"### Table 6: requests of {set_name} and the responses to them"]
    for row in (rows[i * len(rows) // min(n, len(rows))] for i in range(min(n, len(rows)))):
        parts = {"instruction": row.instruction, "input": row.input, "reference": row.references[0]}
        page.append(f"#### {set_name}, row {row.index + 1}")
        for name, text in (parts | {label: of_rows[row.index] for label, of_rows in texts.items()}).items():
            if text or name != "input":
                lines = [textwrap.fill(line, 120) for line in text.splitlines()]
                page.append(f"{name}:\n\n{textwrap.indent(chr(10).join(lines), '    ')}")
    text = "\n\n".join(page) + "\n"
    write_atomic(out / "table6.md", text)
    print(f"\n{text}\nalso in {out / 'table6.md'}")


# ---- the command --------------------------------------------------------------------------------------------------------------


def score_file(responses_path, references_path):
    """ROUGE-L, row by row, of responses made elsewhere (JSON lines, the text in `text`) against a data file's `output`."""
    texts, references = [], []
    for number, value in enumerate(read_jsonl(responses_path), start=1):
        if not isinstance(value.get("text"), str):
            raise InputError(f"{responses_path}, line {number}: 'text' must be a text, not {json.dumps(value.get('text'))[:40]}")
        texts.append(value["text"])
    for number, value in enumerate(read_jsonl(references_path), start=1):
        output = [value["output"]] if isinstance(value.get("output"), str) else value.get("output")
        if not is_text_list(output):
            raise InputError(f"{references_path}, line {number}: 'output' must be a text or a list of texts, not {json.dumps(output)[:40]}")
        references.append(output)
    return rouge_l(texts, references)


def named_once(labels):
    """The labels, each made unlike the others by as many parent folders as it takes. labels: paths or names."""
    parts = [Path(label).resolve().parts if os.path.exists(label) else (label,) for label in labels]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description="ROUGE-L of models and runs on data sets, over seeds; what runs cost; or ROUGE-L of a file of responses."
    )
    parser.add_argument("models", nargs="*", metavar="RUN|MODEL", help="run or checkpoint directories, official names, hub ids owner/name")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SET|DIR",
        help=f"{', '.join(PUBLIC_SETS)}, demo (its five sets), or directories with test.jsonl (default: demo for its runs, else the public sets)",
    )
    parser.add_argument("--seeds", nargs="+", type=in_range(int, 0, 2**32), default=[10, 20, 30, 40, 50])
    parser.add_argument("--rows", type=in_range(int, 1, 10**9), help="only the first N rows of each set")
    parser.add_argument(
        "--no-repeat-ngram",
        nargs="+",
        type=in_range(int, 0, 100),
        metavar="N",
        help=f"no N-gram twice in request and response; several: a column each (default: {BANNED_NGRAM} on public sets, as published; else 0)",
    )
    parser.add_argument("--batch", type=in_range(int, 1, 10**6), help="rows sampled at once (default: 64 on a CPU, what memory holds on a GPU)")
    parser.add_argument("--out", default="out/evaluation", metavar="DIR", help="where tables and pictures go (default out/evaluation)")
    parser.add_argument("--samples", type=in_range(int, 1, 10**6), metavar="N", help="Table 6: N requests of the first set with all responses")
    parser.add_argument("--by", nargs="+", metavar="FIELD", help="also group the runs by one or two fields of their run.json, as in --by reg")
    parser.add_argument("--cost", action="store_true", help="Table 2: memory and hours of runs, from what they noted; runs no model")
    parser.add_argument("--score", metavar="RESPONSES", help="score these responses (JSON lines with 'text') instead of a model's")
    parser.add_argument("--references", metavar="TEST", help="with --score: the data file (JSON lines with 'output') that they respond to")
    parser.add_argument("--json", metavar="FILE", help="with --score: where the scores go too")
    add_decoding_options(parser)
    add_precision_option(parser)
    args = parse_arguments(parser, argv)
    if args.score or args.references:
        if not (args.score and args.references) or args.models:
            raise InputError("--score RESPONSES.jsonl goes with --references TEST.jsonl, and without models")
        scores = score_file(args.score, args.references)
        print(f"ROUGE-L {statistics.fmean(scores):.4f} over {len(scores)} rows")
        if args.json:
            write_atomic(args.json, json.dumps({"rouge_l": statistics.fmean(scores), "rows": scores}) + "\n")
        return
    if args.json:
        raise InputError("--json goes with --score; for models say --out DIR, and table1.json lies there")
    if not args.models:
        raise InputError("name at least one run or model, as in: evaluate.py gpt2 --data dolly")
    if len(args.by or []) > 2:
        raise InputError(f"--by takes one or two fields, not {len(args.by)}")
    check_out(args.out)
    device, args.dtype = ranks.start(args.dtype)
    if args.cost:
        ranks.on_first(table_2, args.models, Path(args.out))
    else:
        table_1(args, device)
    ranks.stop()


def table_1(args, device):
    """Evaluate the models; print and write Table 1, draw Figure 1, and what else was asked for."""
    out, models, seeds = Path(args.out), open_models(args.models), list(dict.fromkeys(args.seeds))
    groups = group_runs(models, args.by) if args.by else {}
    demo = {model.record["settings"].get("data") == "demo" for model in models.values() if model.record} == {True}
    names = args.data or (["demo"] if demo else list(PUBLIC_SETS))
    sets = open_sets(names, args.rows)
    public = [label for label in sets if label in PUBLIC_SETS and label in names]
    asked = list(dict.fromkeys(args.no_repeat_ngram or []))
    columns, averages = {}, {}  # {column: (set, n of the banned n-grams)}, {average: columns}
    for label in sets:
        for ban in asked or [BANNED_NGRAM if label in public else 0]:
            suffix = "" if len(asked) < 2 else f", ban {ban}" if ban else ", no ban"
            columns[label + suffix] = label, ban
            averages.setdefault("average" + suffix, []).append(label + suffix)
    decoding = {name: getattr(args, name) for name in ("max_new", "temperature", "top_k", "top_p", "greedy")}
    as_published = decoding == {"max_new": MAX_NEW, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "greedy": False}
    decoding["dtype"] = args.dtype
    keep = out / "responses"
    scores = evaluate_models({label: m.name for label, m in models.items()}, sets, seeds, device, columns, keep, args.batch, **decoding)
    if ranks.rank() > 0:
        return

    shown, figures = with_averages(scores, averages), {}
    if as_published:
        published = {column: (name, ban) for column, (name, ban) in columns.items() if name in public}
        figures = {label: paper_figures(model, published, sets, averages) for label, model in models.items()}
    best = leaders(shown, {label: model.size for label, model in models.items() if model.kind not in ("teacher", "pretrain")})
    bans = {column: ban for column, (_, ban) in columns.items()}
    note = f"seeds {' '.join(map(str, seeds))}; repeated n-grams banned: " + ", ".join(f"{column} {ban or 'no'}" for column, ban in bans.items())
    files = {
        label: {column: [str(response_path(keep, label, name, seed, ban)) for seed in seeds] for column, (name, ban) in columns.items()}
        for label in models
    }
    content = {
        "scores": scores,
        "settings": {name: getattr(args, name) for name in ("data", "rows", "no_repeat_ngram", "batch")} | {"seeds": seeds, **decoding},
        "no_repeat_ngram": bans,
        "averages": {label: {name: by_column[name] for name in averages} for label, by_column in shown.items()},
        "models": {label: {"name": model.name, "kind": model.kind, "parameters": model.size} for label, model in models.items()},
        "paper": figures,
        "best": best,
        "responses": files,
    }
    title = "Table 1: ROUGE-L, mean ± standard deviation over seeds"
    publish(out, "table1", title, table(shown, figures, best), [*legend(shown, figures, best), note], content)
    average, averaged = next(iter(averages.items()))
    of_models, over = {label: by_column[average] for label, by_column in shown.items()}, f"average over {', '.join(averaged)}"
    print(figure_1(out / "figure1.png", of_models, models, f"Figure 1: {over}"))
    if args.by:
        table_by(out, args.by, groups, of_models, f"ROUGE-L by {' and '.join(args.by)}, {over}")
    if args.samples:
        name, rows = next(iter(sets.items()))
        table_6(out, args.samples, name, rows, {label: next(iter(by_column.values()))[0] for label, by_column in files.items()})


if __name__ == "__main__":
    command(main, CheckpointError)
