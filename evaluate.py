"""ROUGE-L of models and runs on data sets (the paper's Table 1 and Figure 1; Tables 3 and 5 and Figure 4 by a run's settings; Table 6),
what the runs cost (Table 2), and ROUGE-L of responses made elsewhere."""

from data.threads import configure_threads

configure_threads()  # before torch is imported

import argparse
import hashlib
import json
import math
import os
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from rouge_score.rouge_scorer import RougeScorer
from tqdm import tqdm

from data import dist
from data.cli import InputError, check_output_dir, parse_arguments, run_command_line, write_atomic
from data.dist import print0
from data.hub import find_model_dir
from data.models import load_model
from data.options import add_decoding_options, add_precision_option, number_in_range
from data.paper import (
    BANNED_NGRAM,
    COSTS,
    DEMO_SETS,
    PAPER_COSTS,
    PAPER_SCORES,
    PAPER_SETS,
    PUBLISHED,
)
from data.prepare import PUBLIC_SETS, find_data_dir
from data.report import figure_1, format_score, legend, plot_bars, std, table, write_table
from data.rows import MAX_NEW_TOKENS, encode_request, is_text_list, read_jsonl, read_rows
from data.runs import UNFINISHED, kind_of, read_record, run_label, unique_labels
from model import GPT, read_config
from sample import decode_response, sample_all, sampling_batch_size

KINDS = (
    "init",
    "sft",
    "kd",
    "seqkd",
    "minillm",
    "gkd",
    "promptkd",
)  # the table's order within one size of student


# ---- scores -------------------------------------------------------------------------------------------------------------------
def rouge_l(responses, references):
    """ROUGE-L of each response: rouge-score's F-measure with the stemmer, the best over its references, × 100.

    responses: texts; references: for each a list of texts. Raises InputError where the two differ in length.
    """
    if len(responses) != len(references):
        raise InputError(
            f"{len(responses)} responses for {len(references)} rows of references; they must go row by row"
        )
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        100 * max(scorer.score(r, text)["rougeL"].fmeasure for r in refs)
        for text, refs in zip(responses, references)
    ]


def evaluate(
    model,
    tokenizer,
    rows,
    key,
    label=None,
    batch_size=None,
    max_new_tokens=MAX_NEW_TOKENS,
    dtype="float32",
    **sampling_kwargs,
):
    """A model's responses to rows and their ROUGE-L, sampled and scored by all ranks together, each a part.

    key: what the random numbers hang on before the row's index, as (seed, "evaluate", set). Returns for every row, in order,
    on every rank: {"index", "text", "rouge_l", "shortened": whether its request was cut to fit}.
    """
    model.eval()
    ordered, results = sorted(rows, key=lambda row: -len(row.instruction + row.input)), []
    batch_size = batch_size or sampling_batch_size(
        [model], -(-len(rows) // dist.world_size()), max_new_tokens, dtype
    )
    # Ranks share whole batches, so that on CPUs a row meets the same others, and the same rounding, on any number of ranks.
    batches = dist.shard([ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)])
    if label:
        batches = tqdm(
            batches,
            desc=label,
            unit="batch",
            leave=False,
            disable=None if dist.rank() == 0 else True,
        )
    for batch in batches:
        requests, shortened = zip(*(encode_request(row, tokenizer) for row in batch))
        keys = [(*key, row.index) for row in batch]
        responses, _ = sample_all(
            model,
            requests,
            keys,
            tokenizer.eot_token,
            max_new_tokens,
            batch_size,
            dtype=dtype,
            **sampling_kwargs,
        )
        texts = [decode_response(response, tokenizer) for response in responses]
        scores = rouge_l(texts, [row.references for row in batch])
        results += [
            {"index": row.index, "text": t, "rouge_l": score, "shortened": cut}
            for row, t, score, cut in zip(batch, texts, scores, shortened)
        ]
    return sorted(dist.all_gather_list(results), key=lambda result: result["index"])


def mean_rouge_l(results):
    return statistics.fmean(result["rouge_l"] for result in results)


def evaluate_models(
    models, sets, seeds, device, columns=None, keep=None, batch_size=None, **decoding
):
    """Mean ROUGE-L of every model in every column: {model: {column: [a score for each seed]}}.

    models: {label: name of a model}. sets: {label: rows}. columns: {column: (set, n of the n-grams that may not repeat)};
    None: a column a set, without a ban. keep: a directory where the responses are kept; those that lie there already, made from
    the same model, rows, seed and decoding, are not sampled again. None: nothing is written.
    """
    columns = columns or {name: (name, 0) for name in sets}
    hashes = (
        {label: dist.run_on_rank0(weights_hash, name) for label, name in models.items()}
        if keep
        else {}
    )
    row_hashes = {
        name: hashlib.sha256(repr(rows).encode()).hexdigest() for name, rows in sets.items()
    }
    done, missing = (
        {},
        {},
    )  # (label, column, seed): their summary, or what the responses are to be made from
    for job in ((label, column, seed) for label in models for column in columns for seed in seeds):
        label, (name, ban), seed = job[0], columns[job[1]], job[2]
        provenance = dict(
            weights=hashes.get(label),
            rows=len(sets[name]),
            data=row_hashes[name],
            seed=seed,
            no_repeat_ngram=ban,
            **decoding,
        )
        done[job] = (
            dist.run_on_rank0(
                read_kept_summary, response_path(keep, label, name, seed, ban), provenance
            )
            if keep
            else None
        )
        if done[job] is None:
            missing[job] = provenance

    loaded, sampling_kwargs = (
        None,
        {"max_new_tokens": MAX_NEW_TOKENS, "dtype": "float32"} | decoding,
    )
    n_rows = sum(provenance["rows"] for provenance in missing.values())
    with tqdm(
        total=n_rows, unit="row", disable=None if missing and dist.rank() == 0 else True
    ) as bar:
        for (label, column, seed), provenance in missing.items():
            if loaded != label:
                model, tokenizer = load_model(models[label], device)
                loaded = label
            (name, ban), results = columns[column], []
            bar.set_description(f"{label} on {column}, seed {seed}")
            rows = sorted(
                sets[name], key=lambda row: -len(row.instruction + row.input)
            )  # of like length together
            portion = dist.world_size() * (
                batch_size
                or sampling_batch_size(
                    [model], len(rows), sampling_kwargs["max_new_tokens"], sampling_kwargs["dtype"]
                )
            )
            for part in (rows[i : i + portion] for i in range(0, len(rows), portion)):
                results += evaluate(
                    model,
                    tokenizer,
                    part,
                    (seed, "evaluate", name.rsplit("/")[-1]),
                    batch_size=batch_size,
                    no_repeat_ngram=ban,
                    **sampling_kwargs,
                )
                bar.update(len(part))
            results.sort(key=lambda result: result["index"])
            done[label, column, seed] = summary(results)
            if keep:
                dist.run_on_rank0(
                    write_kept_results,
                    response_path(keep, label, name, seed, ban),
                    results,
                    provenance,
                )
    for (label, column, seed), (_, shortened) in done.items():
        if shortened and seed == seeds[0]:
            print0(
                f"{label} on {column}: {shortened} of {len(sets[columns[column][0]])} requests were shortened to fit"
            )
    return {
        label: {column: [done[label, column, seed][0] for seed in seeds] for column in columns}
        for label in models
    }


def summary(results):
    return mean_rouge_l(results), sum(result["shortened"] for result in results)


def response_path(keep, label, set_name, seed, ban):
    """Where a model's responses are kept: one JSON object a line, of which --score reads `text`."""
    label = label.removesuffix(UNFINISHED).strip("/")
    return (
        Path(keep) / label / f"{set_name.strip('/')}-s{seed}{f'-ngram{ban}' if ban else ''}.jsonl"
    )


def weights_hash(name):
    """SHA-256 of a model's weights file; "" where there is none, which loading will tell."""
    for path in (
        find_model_dir(str(name)) / file for file in ("model.safetensors", "pytorch_model.bin")
    ):
        if path.is_file():
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
            return digest.hexdigest()
    return ""


def write_kept_results(path, results, provenance):
    """Write responses, and beside them what they were made from, with their own hash: a pair that does not belong together shows."""
    text = "".join(json.dumps(result) + "\n" for result in results)
    write_atomic(path, text)
    write_atomic(
        path.with_suffix(".json"),
        json.dumps(provenance | {"responses": hashlib.sha256(text.encode()).hexdigest()}, indent=1)
        + "\n",
    )


def read_kept_summary(path, provenance):
    """The summary of responses kept in a file; None where there are none, or others than these, which is said."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = {}
    wanted = provenance | {"responses": hashlib.sha256(path.read_bytes()).hexdigest()}
    if found == wanted:
        return summary(read_jsonl(path))
    others = [
        name
        for name, value in wanted.items()
        if not isinstance(found, dict) or found.get(name) != value
    ]
    print0(f"{path}: was made from other {', '.join(others)}; made anew")
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


def table_sort_key(kind, size):
    """Teachers first, then students by size, the kinds of one size in the order of KINDS; last what is no run of ours."""
    return (
        (kind != "teacher") + (kind == ""),
        size if kind else 0,
        KINDS.index(kind) if kind in KINDS else len(KINDS),
    )


def open_models(names):
    """The models of these names, {label: Model}, in the table's order. A directory without a model is left out, and said."""
    found = []
    for name in names:
        if os.path.isdir(name) and not any(
            (Path(name) / file).is_file() for file in ("best/config.json", "config.json")
        ):
            print0(f"{name}: has no model (neither best/ nor config.json), left out")
        else:
            found.append(name)
    if not found:
        raise InputError(
            "none of the directories has a model; name a run with best/, or a checkpoint directory with config.json"
        )
    models = {}
    for label, name in zip(unique_labels(found), found):
        with torch.device("meta"):
            size = GPT(read_config(dist.run_on_rank0(find_model_dir, name))).n_parameters()
        record = read_record(name)
        if record is None:
            models[label] = Model(name, size, paper=PUBLISHED.get(name))
        else:
            models[run_label(label, record)] = Model(
                name, size, kind_of(record), record.get("paper"), record
            )
    return dict(sorted(models.items(), key=lambda item: table_sort_key(item[1].kind, item[1].size)))


def open_sets(names, limit=None):
    """The test rows of data sets, {label: rows}, the first `limit` of each. names: public sets, directories, or demo for all of its sets."""
    paths = {}
    for label, name in zip(unique_labels(names), names):
        home = dist.run_on_rank0(find_data_dir, name)
        found = (
            {part: home / ("" if part == "test" else part) for part in DEMO_SETS}
            if name == "demo"
            else {label: home}
        )
        for label, path in found.items():
            if paths.setdefault(label, path).resolve() != path.resolve():
                raise InputError(
                    f"--data: two sets are called {label!r}; evaluate them one after the other"
                )
    return {label: read_rows(path / "test.jsonl", limit) for label, path in paths.items()}


def add_averages(scores, averages=None):
    """Scores as evaluate_models gives them, with columns of averages behind: seed by seed the mean over the columns.

    averages: {name: columns}; None: one over all.
    """
    extended = {}
    for label, by_column in scores.items():
        extended[label] = dict(by_column)
        for name, columns in (averages or {"average": list(by_column)}).items():
            extended[label][name] = [
                statistics.fmean(of_a_seed)
                for of_a_seed in zip(*(by_column[column] for column in columns))
            ]
    return extended


def paper_reported(model, columns, sets, averages):
    """The paper's figures for a model, {column: ROUGE-L}, where a column was evaluated as in the paper: all rows, 6-grams banned.

    columns: {column: (set, n of the banned n-grams)}, of public sets alone.
    """
    kind, _, size = (model.paper or "").partition(" ")
    published = dict(zip(PAPER_SETS, PAPER_SCORES.get(kind, {}).get(size, ())))
    as_there = {
        column: name
        for column, (name, ban) in columns.items()
        if ban == BANNED_NGRAM and len(sets[name]) == PAPER_SETS.get(name)
    }
    figures = {column: published[name] for column, name in as_there.items() if name in published}
    means = {
        name: statistics.fmean(figures[column] for column in of)
        for name, of in averages.items()
        if figures.keys() >= set(of)
    }
    return figures | means


def best_and_ties(scores, sizes):
    """The best of each size in each column, and those not worse than it by more than the spread of the difference: {column: labels}.

    scores: {label: {column: [a score a seed]}}. sizes: {label: parameters} of those to compare. With one seed there are none.
    """
    found = {}
    for column in next(iter(scores.values())):
        for size in dict.fromkeys(sizes.values()):
            rivals = {label: scores[label][column] for label in sizes if sizes[label] == size}
            best = max(rivals.values(), key=statistics.fmean)
            if len(rivals) > 1 and len(best) > 1:
                near = [
                    label
                    for label, s in rivals.items()
                    if statistics.fmean(best) - statistics.fmean(s) <= math.hypot(std(s), std(best))
                ]
                found.setdefault(column, []).extend(near)
    return found


def table_2(names, out):
    """What runs took, printed and written: the peak of the memory in their metrics.jsonl, and hours. No model is run."""
    runs = {}
    for label, name in zip(unique_labels(names), names):
        record, metrics = read_record(name), Path(name) / "metrics.jsonl"
        if record is None:
            print0(f"{name}: has no run.json, left out")
            continue
        lines = read_jsonl(metrics) if metrics.is_file() and metrics.stat().st_size else []
        values = {
            field: [line[field] for line in lines if isinstance(line.get(field), float | int)]
            for field in COSTS
        }
        values["hours"] = [record["hours"]] if "hours" in record else []
        size = record.get("parameters", 0)
        of_paper = (
            PAPER_COSTS.get(kind_of(record), ())
            if (record.get("paper") or "").endswith(" base")
            else ()
        )
        runs[run_label(label, record)] = (
            table_sort_key(kind_of(record), size),
            {f: max(v) for f, v in values.items() if v},
            dict(zip(COSTS, of_paper)),
        )
    if not runs:
        raise InputError(
            "none of the directories has a run.json; name runs, as in: evaluate.py --cost out/*/"
        )
    fields = [field for field in COSTS if any(field in peaks for _, peaks, _ in runs.values())]
    cells, content = [["cost", *(COSTS[field] for field in fields)]], {}
    for label, (_, peaks, paper) in sorted(runs.items(), key=lambda item: item[1][0]):
        content[label] = {"measured": peaks, "paper": paper}
        beside = {field: f" ({paper[field]:.2f})" if field in paper else "" for field in fields}
        cells.append(
            [
                label,
                *(
                    f"{peaks[field]:.2f}{beside[field]}" if field in peaks else "-"
                    for field in fields
                ),
            ]
        )
    notes = [
        "memory: the peak on one rank; in brackets, where a run is one of the paper's: its figure"
    ]
    write_table(out, "table2", "Table 2: memory and time", cells, notes, {"costs": content})


def group_runs(models, fields):
    """The runs among models by their values of some fields: {values: labels}. A field is looked up in run.json's settings, then in itself."""
    runs = {label: model.record for label, model in models.items() if model.record}
    known = {field for record in runs.values() for field in (*record, *record["settings"])} - {
        "settings"
    }
    groups = {}
    for field in fields:
        if field not in known:
            raise InputError(
                f"--by {field}: no run named has this field; there are {', '.join(sorted(known)) or 'no runs'}"
            )
    for label, record in runs.items():
        found = record | {
            field: value for field, value in record["settings"].items() if value is not None
        }
        values = tuple(
            v if isinstance(v, str | int | float | None) else json.dumps(v)
            for v in map(found.get, fields)
        )
        if any(value is not None for value in values):
            groups.setdefault(values, []).append(label)
        else:
            print0(f"{label}: has no {' or '.join(fields)}, left out of the groups")
    return dict(
        sorted(
            groups.items(),
            key=lambda item: [
                (v is None, isinstance(v, str), 0 if v is None else v) for v in item[0]
            ],
        )
    )


def table_by(out, fields, groups, averages, title):
    """Averages of groups of runs, the scores of a group's runs pooled, as a table and as bars. averages: {label: [a score a seed]}."""
    pooled = {
        tuple("-" if v is None else str(v) for v in values): [
            s for label in runs for s in averages[label]
        ]
        for values, runs in groups.items()
    }
    cells = [
        [*fields, "runs", "ROUGE-L"],
        *(
            [*key, str(len(runs)), format_score(s)]
            for (key, s), runs in zip(pooled.items(), groups.values())
        ),
    ]
    stem, content = (
        f"by-{'-'.join(fields)}",
        [
            {"values": key, "runs": runs, "scores": s}
            for (key, s), runs in zip(pooled.items(), groups.values())
        ],
    )
    write_table(
        out,
        f"table-{stem}",
        title,
        cells,
        ["the scores of a group's runs are pooled: mean ± standard deviation over runs and seeds"],
        {"fields": fields, "groups": content},
    )
    bars = {
        (key[0], " ".join([*fields[1:], *key[1:]]) or "average"): s for key, s in pooled.items()
    }
    print(plot_bars(out / f"figure-{stem}.png", bars, {}, title, fields[0]))


def table_6(out, n, set_name, rows, files):
    """Print and write n requests of a set, spread evenly, with the reference and each model's response. files: {label: kept responses}."""
    texts = {
        label: {line["index"]: line["text"] for line in read_jsonl(path)}
        for label, path in files.items()
    }
    page = [f"### Table 6: requests of {set_name} and the responses to them"]
    for row in (rows[i * len(rows) // min(n, len(rows))] for i in range(min(n, len(rows)))):
        parts = {"instruction": row.instruction, "input": row.input, "reference": row.references[0]}
        page.append(f"#### {set_name}, row {row.index + 1}")
        for name, text in (
            parts | {label: of_rows[row.index] for label, of_rows in texts.items()}
        ).items():
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
            raise InputError(
                f"{responses_path}, line {number}: 'text' must be a text, not {json.dumps(value.get('text'))[:40]}"
            )
        texts.append(value["text"])
    for number, value in enumerate(read_jsonl(references_path), start=1):
        output = [value["output"]] if isinstance(value.get("output"), str) else value.get("output")
        if not is_text_list(output):
            raise InputError(
                f"{references_path}, line {number}: 'output' must be a text or a list of texts, not {json.dumps(output)[:40]}"
            )
        references.append(output)
    return rouge_l(texts, references)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="ROUGE-L of models and runs on data sets, over seeds; what runs cost; or ROUGE-L of a file of responses.",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="RUN|MODEL",
        help="run or checkpoint directories, official names, hub ids owner/name",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SET|DIR",
        help=f"{', '.join(PUBLIC_SETS)}, demo (its five sets), or directories with test.jsonl (default: demo for its runs, else the public sets)",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=number_in_range(int, 0, 2**32), default=[10, 20, 30, 40, 50]
    )
    parser.add_argument(
        "--rows", type=number_in_range(int, 1, 10**9), help="only the first N rows of each set"
    )
    parser.add_argument(
        "--no-repeat-ngram",
        nargs="+",
        type=number_in_range(int, 0, 100),
        metavar="N",
        help=f"no N-gram twice in request and response; several: a column each (default: {BANNED_NGRAM} on public sets, as published; else 0)",
    )
    parser.add_argument(
        "--batch",
        type=number_in_range(int, 1, 10**6),
        help="rows sampled at once (default: 64 on a CPU, what memory holds on a GPU)",
    )
    parser.add_argument(
        "--out",
        default="out/evaluation",
        metavar="DIR",
        help="where tables and pictures go (default out/evaluation)",
    )
    parser.add_argument(
        "--samples",
        type=number_in_range(int, 1, 10**6),
        metavar="N",
        help="Table 6: N requests of the first set with all responses",
    )
    parser.add_argument(
        "--by",
        nargs="+",
        metavar="FIELD",
        help="also group the runs by one or two fields of their run.json, as in --by reg",
    )
    parser.add_argument(
        "--cost",
        action="store_true",
        help="Table 2: memory and hours of runs, from what they noted; runs no model",
    )
    parser.add_argument(
        "--score",
        metavar="RESPONSES",
        help="score these responses (JSON lines with 'text') instead of a model's",
    )
    parser.add_argument(
        "--references",
        metavar="TEST",
        help="with --score: the data file (JSON lines with 'output') that they respond to",
    )
    parser.add_argument("--json", metavar="FILE", help="with --score: where the scores go too")
    add_decoding_options(parser)
    add_precision_option(parser)
    args = parse_arguments(parser, argv)
    if args.score or args.references:
        if not (args.score and args.references) or args.models:
            raise InputError(
                "--score RESPONSES.jsonl goes with --references TEST.jsonl, and without models"
            )
        scores = score_file(args.score, args.references)
        print(f"ROUGE-L {statistics.fmean(scores):.4f} over {len(scores)} rows")
        if args.json:
            write_atomic(
                args.json, json.dumps({"rouge_l": statistics.fmean(scores), "rows": scores}) + "\n"
            )
        return
    if args.json:
        raise InputError(
            "--json goes with --score; for models say --out DIR, and table1.json lies there"
        )
    if not args.models:
        raise InputError("name at least one run or model, as in: evaluate.py gpt2 --data dolly")
    if len(args.by or []) > 2:
        raise InputError(f"--by takes one or two fields, not {len(args.by)}")
    check_output_dir(args.out)
    device, args.dtype = dist.init_process(args.dtype)
    if args.cost:
        dist.run_on_rank0(table_2, args.models, Path(args.out))
    else:
        table_1(args, device)
    dist.shutdown()


def table_1(args, device):
    """Evaluate the models; print and write Table 1, draw Figure 1, and what else was asked for."""
    out, models, seeds = Path(args.out), open_models(args.models), list(dict.fromkeys(args.seeds))
    groups = group_runs(models, args.by) if args.by else {}
    demo = {
        model.record["settings"].get("data") == "demo" for model in models.values() if model.record
    } == {True}
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
    decoding = {
        "max_new_tokens": args.max_new,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "greedy": args.greedy,
    }
    as_published = decoding == {
        "max_new_tokens": MAX_NEW_TOKENS,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "greedy": False,
    }
    decoding["dtype"] = args.dtype
    keep = out / "responses"
    scores = evaluate_models(
        {label: m.name for label, m in models.items()},
        sets,
        seeds,
        device,
        columns,
        keep,
        args.batch,
        **decoding,
    )
    if dist.rank() > 0:
        return

    shown, figures = add_averages(scores, averages), {}
    if as_published:
        published = {
            column: (name, ban) for column, (name, ban) in columns.items() if name in public
        }
        figures = {
            label: paper_reported(model, published, sets, averages)
            for label, model in models.items()
        }
    best = best_and_ties(
        shown,
        {
            label: model.size
            for label, model in models.items()
            if model.kind not in ("teacher", "pretrain")
        },
    )
    bans = {column: ban for column, (_, ban) in columns.items()}
    note = f"seeds {' '.join(map(str, seeds))}; repeated n-grams banned: " + ", ".join(
        f"{column} {ban or 'no'}" for column, ban in bans.items()
    )
    files = {
        label: {
            column: [str(response_path(keep, label, name, seed, ban)) for seed in seeds]
            for column, (name, ban) in columns.items()
        }
        for label in models
    }
    content = {
        "scores": scores,
        "settings": {
            name: getattr(args, name) for name in ("data", "rows", "no_repeat_ngram", "batch")
        }
        | {"seeds": seeds, **decoding},
        "no_repeat_ngram": bans,
        "averages": {
            label: {name: by_column[name] for name in averages}
            for label, by_column in shown.items()
        },
        "models": {
            label: {"name": model.name, "kind": model.kind, "parameters": model.size}
            for label, model in models.items()
        },
        "paper": figures,
        "best": best,
        "responses": files,
    }
    title = "Table 1: ROUGE-L, mean ± standard deviation over seeds"
    write_table(
        out,
        "table1",
        title,
        table(shown, figures, best),
        [*legend(shown, figures, best), note],
        content,
    )
    average, averaged = next(iter(averages.items()))
    of_models, over = (
        {label: by_column[average] for label, by_column in shown.items()},
        f"average over {', '.join(averaged)}",
    )
    print(figure_1(out / "figure1.png", of_models, models, f"Figure 1: {over}"))
    if args.by:
        table_by(out, args.by, groups, of_models, f"ROUGE-L by {' and '.join(args.by)}, {over}")
    if args.samples:
        name, rows = next(iter(sets.items()))
        table_6(
            out,
            args.samples,
            name,
            rows,
            {label: next(iter(by_column.values()))[0] for label, by_column in files.items()},
        )


if __name__ == "__main__":
    run_command_line(main)
