"""ROUGE-L of models and runs on data sets (the paper's Table 1 and Figure 1), what the runs cost (Table 2), and ROUGE-L of responses made elsewhere."""

import argparse
import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data import ranks  # before torch: data/__init__.py says why

import torch
from rouge_score.rouge_scorer import RougeScorer

from data.files import InputError, command, model_directory, pyplot, write_atomic
from data.prepare import PUBLIC_SETS, data_directory
from data.rows import is_text_list, read_jsonl, read_rows, request_tokens
from model import GPT, CheckpointError, read_config
from sample import MAX_NEW, add_decoding_options, in_range, load_model, sample_all, to_text

BANNED_NGRAM = 6  # the published numbers on the five public sets were sampled under this ban (the paper does not say so)
DEMO_SETS = ("test", "wording", "words", "longer", "combined")  # what `demo` stands for: its test set, and four unlike the training data
KINDS = ("init", "sft", "kd", "seqkd", "minillm", "gkd", "promptkd")  # the table's order within one size of student

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
PUBLISHED = {
    "gmkim/GPT-2-120M-distilled-PromptKD-Dolly-v1.0": "promptkd base",
    "gmkim/GPT-2-340M-distilled-PromptKD-Dolly-v1.0": "promptkd medium",
    "gmkim/GPT-2-760M-distilled-PromptKD-Dolly-v1.0": "promptkd large",
}
# Table 2: GPT-2 XL to base on 8 RTX 3090, by kind of run: GB allocated, GB reserved, hours
PAPER_COSTS = {
    "sft": (2.36, 2.75, 0.43),
    "kd": (5.91, 6.45, 0.85),
    "seqkd": (5.91, 6.45, 0.86),
    "minillm": (12.63, 21.45, 7.59),
    "gkd": (6.23, 6.93, 8.48),
    "promptkd": (13.47, 14.40, 9.78),
}

# ---- scores -------------------------------------------------------------------------------------------------------------------


def rouge_l(responses, references):
    """ROUGE-L of each response: rouge-score's F-measure with the stemmer, the best over its references, × 100.

    responses: texts; references: for each a list of texts. Raises InputError where the two differ in length.
    """
    if len(responses) != len(references):
        raise InputError(f"{len(responses)} responses for {len(references)} rows of references; they must go row by row")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [100 * max(scorer.score(r, text)["rougeL"].fmeasure for r in refs) for text, refs in zip(responses, references)]


def evaluate(model, tokenizer, rows, key, label=None, **how):
    """A model's responses to rows and their ROUGE-L, sampled and scored by all ranks together, each a part.

    key: what the random numbers hang on before the row's index, as (seed, "evaluate", set). Returns for every row, in order,
    on every rank: {"index", "text", "rouge_l", "shortened": whether its request was cut to fit}.
    """
    mine = rows[ranks.rank() :: ranks.world()]
    requests = [request_tokens(row, tokenizer) for row in mine]
    model.eval()
    responses, _ = sample_all(model, [tokens for tokens, _ in requests], [(*key, row.index) for row in mine], tokenizer.eot_token, label=label, **how)
    texts = [to_text(response, tokenizer) for response in responses]
    scores = rouge_l(texts, [row.references for row in mine])
    results = [
        {"index": row.index, "text": text, "rouge_l": score, "shortened": cut} for row, text, score, (_, cut) in zip(mine, texts, scores, requests)
    ]
    return sorted(ranks.gather(results), key=lambda result: result["index"])


def mean_rouge_l(results):
    return statistics.fmean(result["rouge_l"] for result in results)


def evaluate_models(models, sets, seeds, device, columns=None, **how):
    """Mean ROUGE-L of every model in every column: {model: {column: [a score for each seed]}}.

    models: {label: name of a model}. sets: {label: rows}. columns: {column: (set, n of the n-grams that may not repeat)};
    None: a column a set, without a ban.
    """
    scores = {}
    for label, name in models.items():
        model, tokenizer = load_model(name, device)
        for column, (set_name, ban) in (columns or {name: (name, 0) for name in sets}).items():
            for seed in seeds:
                key = (seed, "evaluate", set_name.rsplit("/")[-1])
                results = evaluate(model, tokenizer, sets[set_name], key, f"{label} on {column}", no_repeat=ban, **how)
                scores.setdefault(label, {}).setdefault(column, []).append(mean_rouge_l(results))
                cut = sum(result["shortened"] for result in results)
                if cut and seed == seeds[0]:
                    say(f"{label} on {column}: {cut} of {len(results)} requests were shortened to fit")
    return scores


def say(*words, **how):
    """Print on rank 0."""
    if ranks.rank() == 0:
        print(*words, flush=True, **how)


# ---- models and sets by their names -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model to evaluate: a run of ours, or another."""

    name: str  # as load_model reads it
    size: int  # parameters
    record: dict | None = None  # a run's run.json

    @property
    def kind(self):
        return "" if self.record is None else self.record["name"].split("-")[0]

    @property
    def paper(self):
        """What it is in the paper, as "promptkd base", if it is anything there."""
        return PUBLISHED.get(self.name) if self.record is None else self.record.get("paper")


def read_record(directory):
    """The run.json of a directory, None where there is none."""
    path = Path(directory) / "run.json"
    if not path.is_file():
        return None
    fields = {"name": str, "settings": dict, "paper": str | None, "parameters": int | None, "hours": float | int | None}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is damaged ({error}); remove {directory} and train it again") from error
    for field, kind in fields.items():
        if not isinstance(record, dict) or not isinstance(record.get(field), kind):
            raise InputError(f"{path}: is no run's record ('{field}' is wrong); remove {directory} and train it again")
    return record


def table_order(kind, size):
    """Teachers first, then students by size, the kinds of one size in the order of KINDS; last what is no run of ours."""
    return (kind != "teacher") + (kind == ""), size if kind else 0, KINDS.index(kind) if kind in KINDS else len(KINDS)


def open_models(names):
    """The models of these names, {label: Model}, in the table's order. A directory without a model is left out, and said."""
    found = []
    for name in names:
        if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in ("best/config.json", "config.json")):
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
        models[label + (" (unfinished)" if record and "hours" not in record else "")] = Model(name, size, record)
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
    return {
        label: by_column
        | {
            name: [statistics.fmean(of_a_seed) for of_a_seed in zip(*(by_column[column] for column in columns))]
            for name, columns in (averages or {"average": list(by_column)}).items()
        }
        for label, by_column in scores.items()
    }


def paper_figures(model, columns, sets, averages):
    """The paper's figures for a model, {column: ROUGE-L}, where a column was evaluated as in the paper: all rows, 6-grams banned.

    columns: {column: (set, n of the banned n-grams)}, of public sets alone.
    """
    kind, size = (model.paper or " ").split(" ", 1)
    published = dict(zip(PAPER_SETS, PAPER_SCORES.get(kind, {}).get(size, ())))
    as_there = {column: name for column, (name, ban) in columns.items() if ban == BANNED_NGRAM and len(sets[name]) == PAPER_SETS[name]}
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


def table(scores, figures=None, best=None, markdown=False):
    """A row for each model and a column for each of its scores, as text.

    scores: {label: {column: [a score a seed]}}. figures: the paper's, {label: {column: figure}}. best: {column: labels to be marked}.
    """
    figures, best = figures or {}, best or {}
    names = list(next(iter(scores.values())))
    lines = [["ROUGE-L"], *([label] for label in scores)]
    for name in names:
        cells = []
        for label, by_column in scores.items():
            number, marks, figure = format_score(by_column[name]), "", figures.get(label, {}).get(name)
            if name in best and not markdown:
                marks = " *" if label in best[name] else "  "
            elif label in best.get(name, ()):
                number = f"**{number}**"
            if figure is not None:
                marks += f" ({figure:.1f}{' ≠' if differs(by_column[name], figure) else ''})"
            cells.append((number, marks))
        width = 0 if markdown else max(len(marks) for _, marks in cells)
        for line, (number, marks) in zip(lines, [(name, ""), *cells]):
            line.append(number + marks.ljust(width))
    return lay_out(lines, markdown)


def lay_out(lines, markdown=False):
    """Lines of cells, the first with the columns' names, as aligned text or as a table in Markdown."""
    if markdown:
        rule = [":--", *["--:"] * (len(lines[0]) - 1)]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [lines[0], rule, *lines[1:]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *(c.rjust(width) for c, width in zip(line[1:], widths[1:]))]).rstrip() for line in lines)


def legend(scores, figures, best, mark):
    """What the marks in a table mean, a line each, as far as there are any."""
    lines = (
        [f"{mark}: the best of its size in the column, or not worse than that by more than the spread of the difference, √(s₁² + s₂²)"]
        if best
        else []
    )
    if any(figures.values()):
        far = any(differs(scores[label][name], figure) for label, by_column in figures.items() for name, figure in by_column.items())
        lines.append("in brackets: the paper's figure" + ("; ≠: ours differs from it by more than our spread" if far else ""))
    return lines


def write_markdown(path, title, text, notes):
    write_atomic(path, "\n\n".join([f"### {title}", text, *notes]) + "\n")


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
    figure, axes = plot.subplots(figsize=(min(14, 4 + 0.6 * len(bars)), 4.5), layout="constrained")
    for color, series in enumerate(several):
        mine = [group for group in groups if series in there[group]]
        x = [groups.index(group) + (there[group].index(series) - (len(there[group]) - 1) / 2) * width for group in mine]
        heights, errors = ([f(bars[group, series]) or 0 for group in mine] for f in (statistics.fmean, spread))
        drawn = axes.bar(x, heights, 0.9 * width, yerr=errors if any(errors) else None, capsize=3, label=series, color=f"C{color % 10}")
        axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    for label, height in lines.items():
        axes.axhline(height, linestyle="--", linewidth=1, color="black", label=label)
    axes.set_xticks(range(len(groups)), groups)
    axes.set(title=title, xlabel=xlabel, ylabel="ROUGE-L")
    axes.margins(y=0.1)
    figure.legend(loc="outside right upper")
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
        else:
            alone = model.kind and known[sizes[label], model.kind] == 1
            bars[sizes[label], model.kind if alone else label] = averages[label]
    return draw_bars(path, bars, lines, title, "parameters of the student")


COSTS = {"memory_allocated_gb": "allocated, GB", "memory_reserved_gb": "reserved, GB", "memory_resident_gb": "resident, GB", "hours": "hours"}


def table_2(names, out):
    """What runs took, printed and written: the peak of the memory in their metrics.jsonl, and hours. No model is run."""
    found = {}
    for label, name in zip(named_once(names), names):
        record, metrics = read_record(name), Path(name) / "metrics.jsonl"
        if record is None:
            say(f"{name}: has no run.json, left out")
            continue
        lines = read_jsonl(metrics) if metrics.is_file() and metrics.stat().st_size else []
        peaks = {field: max((line[field] for line in lines if isinstance(line.get(field), float | int)), default=None) for field in COSTS}
        kind, _, size = record.get("paper", "").partition(" ")
        paper = dict(zip(("memory_allocated_gb", "memory_reserved_gb", "hours"), PAPER_COSTS.get(kind, ()) if size == "base" else ()))
        order = table_order(record["name"].split("-")[0], record.get("parameters", 0))
        found[label + ("" if "hours" in record else " (unfinished)")] = (order, peaks | {"hours": record.get("hours")}, paper)
    if not found:
        raise InputError("none of the directories has a run.json; name runs, as in: evaluate.py --cost out/*/")
    found = dict(sorted(found.items(), key=lambda item: item[1][0]))
    fields = [field for field in COSTS if any(values[field] is not None for _, values, _ in found.values())]
    cells = [["cost", *(COSTS[field] for field in fields)]]
    for label, (_, values, paper) in found.items():
        shown = ["-" if values[field] is None else f"{values[field]:.2f}" for field in fields]
        cells.append([label, *(text + (f" ({paper[field]:.2f})" if field in paper and text != "-" else "") for text, field in zip(shown, fields))])
    notes = ["memory: the peak on one rank" + ("; in brackets: the paper's figure" if any(paper for *_, paper in found.values()) else "")]
    say(lay_out(cells), *notes, sep="\n")
    content = {label: {"measured": {field: values[field] for field in fields}, "paper": paper} for label, (_, values, paper) in found.items()}
    write_markdown(out / "table2.md", "Table 2: memory and time", lay_out(cells, markdown=True), notes)
    write_atomic(out / "table2.json", json.dumps({"costs": content}, indent=1) + "\n")
    say(f"also in {out / 'table2.md'}, {out / 'table2.json'}")


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
    parts = [Path(label).resolve().parts if Path(label).exists() else (label,) for label in labels]
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
        help=f"{', '.join(PUBLIC_SETS)}, demo (its five sets), or directories with test.jsonl (default: demo for runs of the demo, else the public sets)",
    )
    parser.add_argument("--seeds", nargs="+", type=in_range(int, 0, 2**32), default=[10, 20, 30, 40, 50])
    parser.add_argument("--rows", type=in_range(int, 1, 10**9), help="only the first N rows of each set")
    parser.add_argument(
        "--no-repeat-ngram",
        type=in_range(int, 0, 100),
        metavar="N",
        help=f"no N-gram twice in request and response (default: {BANNED_NGRAM} on the five public sets, as in the published numbers; else 0, off)",
    )
    parser.add_argument("--batch", type=in_range(int, 1, 10**6), default=64, help="rows sampled at once (default 64)")
    parser.add_argument("--out", default="out/evaluation", metavar="DIR", help="where tables and pictures go (default out/evaluation)")
    parser.add_argument("--cost", action="store_true", help="Table 2: memory and hours of runs, from what they noted; runs no model")
    parser.add_argument("--score", metavar="RESPONSES", help="score these responses (JSON lines with 'text') instead of a model's")
    parser.add_argument("--references", metavar="TEST", help="with --score: the data file (JSON lines with 'output') that they respond to")
    parser.add_argument("--json", metavar="FILE", help="with --score: where the scores go too")
    add_decoding_options(parser)
    args = parser.parse_args(argv)
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
    if args.cost:
        return table_2(args.models, Path(args.out))
    device = ranks.start()
    table_1(args, device)
    ranks.stop()


def table_1(args, device):
    """Evaluate the models; print and write Table 1, and draw Figure 1."""
    out, models = Path(args.out), open_models(args.models)
    demo = {model.record["settings"].get("data") == "demo" for model in models.values() if model.record} == {True}
    names = args.data or (["demo"] if demo else list(PUBLIC_SETS))
    sets = open_sets(names, args.rows)
    public = [label for label in sets if label in PUBLIC_SETS and label in names]
    bans = {label: BANNED_NGRAM if label in public else 0 for label in sets}
    if args.no_repeat_ngram is not None:
        bans = dict.fromkeys(bans, args.no_repeat_ngram)
    columns = {label: (label, ban) for label, ban in bans.items()}
    averages = {"average": list(columns)}
    decoding = {name: getattr(args, name) for name in ("max_new", "temperature", "top_k", "top_p", "greedy")}
    scores = evaluate_models(
        {label: model.name for label, model in models.items()}, sets, args.seeds, device, columns, at_once=args.batch, **decoding
    )
    if ranks.rank() > 0:
        return

    shown = with_averages(scores, averages)
    figures = {}
    if decoding == {"max_new": MAX_NEW, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "greedy": False}:
        published = {column: (name, ban) for column, (name, ban) in columns.items() if name in public}
        figures = {label: paper_figures(model, published, sets, averages) for label, model in models.items()}
    best = leaders(shown, {label: model.size for label, model in models.items() if model.kind != "teacher"})
    note = f"seeds {' '.join(map(str, args.seeds))}; repeated n-grams banned: " + ", ".join(f"{c} {ban or 'no'}" for c, (_, ban) in columns.items())
    print(table(shown, figures, best), *legend(shown, figures, best, "*"), note, sep="\n")
    notes = [*legend(shown, figures, best, "bold"), note]
    write_markdown(out / "table1.md", "Table 1: ROUGE-L, mean ± standard deviation over seeds", table(shown, figures, best, markdown=True), notes)
    content = {
        "scores": scores,
        "settings": {name: value for name, value in vars(args).items() if name not in ("models", "score", "references", "json", "cost", "out")},
        "no_repeat_ngram": bans,
        "averages": {label: {name: by_column[name] for name in averages} for label, by_column in shown.items()},
        "models": {label: {"name": model.name, "kind": model.kind, "parameters": model.size} for label, model in models.items()},
        "paper": figures,
        "best": best,
    }
    write_atomic(out / "table1.json", json.dumps(content, indent=1) + "\n")
    average = next(iter(averages))
    picture = figure_1(
        out / "figure1.png",
        {label: by_column[average] for label, by_column in shown.items()},
        models,
        f"Figure 1: average over {', '.join(averages[average])}",
    )
    print(f"also in {out / 'table1.md'}, {out / 'table1.json'}; {picture}")


if __name__ == "__main__":
    command(main, CheckpointError)
