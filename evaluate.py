"""ROUGE-L of models on data sets, over sampling seeds, and what their training cost.

python evaluate.py RUN|MODEL...                # Table 1 and Figure 1
python evaluate.py RUN... --by FIELD           # and Tables 3 and 5, Figure 4
python evaluate.py RUN|MODEL... --samples N    # and Table 6
python evaluate.py RUN... --cost               # Table 2
"""

import os.path
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # before others' `data`, `evaluate`

import data.process.threads  # noqa: F401  (must precede torch: it sets how threads wait)

import hashlib
import itertools
import json
import statistics
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize
from tqdm import tqdm

from data.models.copies import check_same_files
from data.models.hub import file_hash, model_hash
from data.models.named import check_weights, load_model, open_models, own_sets, table_sort_key
from data.models.sampling import (
    CACHE_SHARE,
    CACHE_SHARE_ALONE,
    check_requests,
    common_batch_size,
    decode_response,
    sample_all,
)
from data.process import command_line, dist, errors, files
from data.process.command_line import number_in_range
from data.process.dist import print0
from data.process.errors import InputError
from data.process.files import read_json, write_atomic
from data.runs import paper, report
from data.runs.methods import DEFAULTS, METHODS
from data.runs.names import UNFINISHED, run_kind, run_labels, unique_labels
from data.runs.options import add_decoding_options, add_precision_option
from data.runs.runs import read_record, run_dir
from data.sets.prepare import NAMED_SETS, PUBLIC_SETS, find_data_dir
from data.sets.rows import (
    encode_request,
    read_jsonl,
    read_rows,
    references_field,
    text_field,
    to_jsonl,
)


# ---- ROUGE-L ---------------------------------------------------------------------------------
def rouge_l(responses, references):
    """ROUGE-L of each response: rouge-score's F-measure with the stemmer, × 100.

    references: for each response a list of texts, of which the best match counts. Raises InputError
    if there are not as many responses as lists of references.
    """
    if len(responses) != len(references):
        found = f"{len(responses)} responses for {len(references)} rows of references"
        raise InputError(f"{found}; they must match row by row")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        100 * max(scorer.score(text, response)["rougeL"].fmeasure for text in texts)
        for response, texts in zip(responses, references)
    ]


def print_unscorable(label, references):
    """Print how many of a data set's rows ROUGE-L can't score, if there are any."""
    if n := sum(not any(tokenize(text, None) for text in texts) for texts in references):
        problem = f"{n} of {len(references)} rows have no reference that ROUGE-L can score"
        print0(f"{label}: {problem} (it drops all but a-z and 0-9); they score 0")


def mean_rouge_l(results):
    return statistics.fmean(result["rouge_l"] for result in results)


def evaluate(model, tokenizer, rows, rng_key, bar=None, batch_size=None, **sampling_kwargs):
    """Sample a response to each row, on all ranks together, and score it by ROUGE-L.

    rng_key: the key of a row's random numbers without its index, as (seed, "evaluate", set).
    bar: a progress bar of rows. batch_size: default: what memory holds while a model is trained.
    sampling_kwargs: of `sample_all`, max_new_tokens and dtype among them. Returns, on every rank
    and for every row in order, {"index", "text", "rouge_l", "shortened": whether the request was
    cut to fit}.
    """
    model.eval()
    n_ranks, results = dist.world_size(), []
    if batch_size is None:
        limits = {name: sampling_kwargs[name] for name in ("max_new_tokens", "dtype")}
        batch_size = common_batch_size(model, len(rows), share=CACHE_SHARE, **limits)
    # Rows of similar length have little padding. Ranks get whole batches: on CPUs a row is then in
    # the same batch, and is rounded in the same way, on any number of ranks.
    rows = sorted(rows, key=lambda row: -len(row.instruction + row.input))
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    options = sampling_kwargs | {"batch_size": batch_size}
    for i, batch in enumerate(dist.shard(batches)):
        requests, shortened = zip(*(encode_request(row, tokenizer) for row in batch))
        keys = [(*rng_key, row.index) for row in batch]
        responses, _ = sample_all(model, requests, keys, tokenizer.eot_token, **options)
        texts = [decode_response(response, tokenizer) for response in responses]
        scores = rouge_l(texts, [row.references for row in batch])
        for row, text, score, cut in zip(batch, texts, scores, shortened):
            results.append({"index": row.index, "text": text, "rouge_l": score, "shortened": cut})
        if bar is not None:
            bar.update(sum(map(len, batches[i * n_ranks : (i + 1) * n_ranks])))  # of all ranks
    return sorted(dist.all_gather_list(results), key=lambda result: result["index"])


def sampled_rouge_l(model, tokenizer, rows, rng_key, label, **sampling_kwargs):
    """The mean ROUGE-L of a response to each row (see `evaluate`). label: of a progress bar."""
    with progress_bar(len(rows), label) as bar:
        return mean_rouge_l(evaluate(model, tokenizer, rows, rng_key, bar, **sampling_kwargs))


def progress_bar(n_rows, label=None):
    """A bar on rank 0's terminal."""
    disable = True if dist.rank() else None
    return tqdm(total=n_rows, desc=label, unit="row", leave=False, disable=disable)


# ---- the columns of Table 1 ------------------------------------------------------------------
@dataclass(frozen=True)
class Column:
    """A column of Table 1: the test rows of a data set, and how they are evaluated."""

    rows: list
    ban: int = 0  # no n-gram of this length may repeat; 0: no ban
    as_in_paper: bool = False


def open_columns(names, limit=None, ban=None):
    """The columns of data sets, {label of the set: Column}.

    names: public sets, directories, or "demo" for the demo's five sets. limit: only so many rows of
    each. ban: the length of the n-grams to ban, 0 for no ban; None: as in the paper. Raises
    InputError if two different sets have the same label.
    """
    paths, columns = {}, {}
    for label, name in zip(unique_labels(names, ours=NAMED_SETS), names):
        data_dir = dist.run_on_rank0(find_data_dir, name)
        found = {label: data_dir}
        if name == "demo":
            found = {part: data_dir / ("" if part == "test" else part) for part in paper.DEMO_SETS}
        for part, path in found.items():
            if paths.setdefault(part, path).resolve() != path.resolve():
                raise InputError(f"--data: two sets are called {part!r}; evaluate them separately")
    check_same_files(path / "test.jsonl" for path in paths.values())
    for name, path in paths.items():
        rows = read_rows(path / "test.jsonl", limit)
        print_unscorable(name, [row.references for row in rows])
        is_papers = name in paper.PAPER_SETS and name in names  # not a directory of that name
        paper_ban = paper.BANNED_NGRAM if is_papers else 0
        n = paper_ban if ban is None else ban
        all_rows = is_papers and len(rows) == paper.PAPER_SETS[name]
        columns[name] = Column(rows, n, all_rows and n == paper_ban)
    return columns


# ---- kept responses: on disk, with all that they depend on -----------------------------------
def write_kept(path, provenance, results):
    """Keep responses and, in a .json beside them, their provenance and their hash."""
    write_atomic(path, to_jsonl(results))
    provenance = provenance | {"responses": file_hash(path)}
    write_atomic(path.with_suffix(".json"), json.dumps(provenance, indent=1) + "\n")


def read_kept(path, provenance):
    """The responses that are kept in a file; None if there are none with this provenance."""
    if not path.is_file():
        return None
    provenance = provenance | {"responses": file_hash(path)}
    found = {}
    with suppress(InputError):
        found = read_json(path.with_suffix(".json"), "")
    changed = [name for name in provenance | found if found.get(name) != provenance.get(name)]
    if not changed:
        return [result for _, result in read_jsonl(path)]
    # print would write into the progress bar.
    tqdm.write(f"{path}: made with different {', '.join(changed)}; sampling again")
    return None


# ---- many models, data sets and seeds --------------------------------------------------------
def evaluate_models(
    models, columns, seeds, device, response_dir=None, batch_size=None, **sampling_kwargs
):
    """Mean ROUGE-L of every model in every column, {model: {column: [score per seed]}}, and in the
    same form the files of the responses.

    models: {label: name of a model}. columns: {label: Column}. response_dir: if given, responses
    are kept there, in files that --score can read, and used again if their provenance is the same.
    """
    scores = {label: {column: [] for column in columns} for label in models}
    paths = {label: {column: [] for column in columns} for label in models}
    data = {name: hashlib.sha256(repr(c.rows).encode()).hexdigest() for name, c in columns.items()}
    fix = "run evaluate.py with a lower --batch, or use a smaller model"
    limits = {name: sampling_kwargs[name] for name in ("max_new_tokens", "dtype")}
    limits["share"] = CACHE_SHARE_ALONE  # nothing is trained
    n_rows = len(models) * len(seeds) * sum(len(c.rows) for c in columns.values())
    with progress_bar(n_rows) as bar:
        for label, name in models.items():
            model = None  # loaded when responses are missing
            model_id = dist.run_on_rank0(model_hash, name) if response_dir else None
            directory = response_dir and response_dir / label.removesuffix(UNFINISHED).strip("/")
            for (column, c), seed in itertools.product(columns.items(), seeds):
                kwargs = {"no_repeat_ngram": c.ban} | sampling_kwargs
                provenance = {"model": model_id, "data": data[column], "seed": seed} | kwargs
                path = directory and directory / f"{column.strip('/')}-s{seed}.jsonl"
                results = dist.run_on_rank0(read_kept, path, provenance) if path else None
                if results is not None:
                    bar.total -= len(c.rows)
                else:
                    if model is None:
                        model, tokenizer = load_model(name, device)
                    bar.set_description(f"{label} on {column}, seed {seed}")
                    key = (seed, "evaluate", column.rsplit("/")[-1])
                    with errors.explain_out_of_memory(f"{label} on {column}", fix):
                        size = batch_size or common_batch_size(model, len(c.rows), **limits)
                        results = evaluate(model, tokenizer, c.rows, key, bar, size, **kwargs)
                    if path:
                        dist.run_on_rank0(write_kept, path, provenance, results)
                scores[label][column].append(mean_rouge_l(results))
                paths[label][column].append(path)
                n = sum(result["shortened"] for result in results)
                if n and seed == seeds[0] and dist.rank() == 0:
                    requests = f"{n} of {len(c.rows)} requests"
                    bar.write(f"{label} on {column}: {requests} were shortened to fit")
    return scores, paths


def add_average(scores):
    """Add the average over all columns, for each seed, to `scores` of evaluate_models."""
    for by_column in scores.values():
        by_column["average"] = [statistics.fmean(of_seed) for of_seed in zip(*by_column.values())]


def show_demo(models, device, dtype):
    """Print the demo's table: models on the test set and on the sets unlike the training data."""
    sampling = {"max_new_tokens": METHODS["promptkd"].demo["max_new_tokens"], "dtype": dtype}
    columns = open_columns(["demo"])
    scores, _ = evaluate_models(models, columns, [10, 20, 30], device, **sampling)
    add_average(scores)
    print0(f"\n{report.format_table(report.score_table(scores))}")
    print0("Mean ± standard deviation over three sampling seeds. The sets after `test` have")
    print0("wordings, words, lengths and combinations of tasks that no training row has.")


# ---- Table 1 ---------------------------------------------------------------------------------
def table_1(args, device):
    """Evaluate models. Print, write and plot Table 1 and what else is asked for."""
    out, models = Path(args.out), open_models(args.models)
    groups = group_runs(models, args.by) if args.by else {}
    sets = args.data or dist.run_on_rank0(own_sets, models) or paper.PAPER_SETS
    columns = open_columns(sets, args.rows, args.no_repeat_ngram)
    for m in models.values():  # before the first one is evaluated, which takes long
        check_weights(m.name)
        for column in columns.values():
            check_requests(m.name, column.rows, args.max_new_tokens, "--max-new")
    sampling = {name: getattr(args, name) for name in (*paper.PAPER_SAMPLING, "dtype")}
    names, kept = {label: model.name for label, model in models.items()}, out / "responses"
    scores, paths = evaluate_models(
        names, columns, args.seeds, device, response_dir=kept, batch_size=args.batch, **sampling
    )
    if dist.rank() > 0:
        return
    add_average(scores)
    reported, bans = {}, {label: column.ban for label, column in columns.items()}
    if paper.PAPER_SAMPLING.items() <= sampling.items():
        reported = {label: paper.paper_reported(m.paper, columns) for label, m in models.items()}
    content = {"settings": vars(args), "scores": scores, "paper": reported, "responses": paths}
    content["no_repeat_ngram"] = bans
    banned = ", ".join(f"{label} {ban or 'no'}" for label, ban in bans.items())
    notes = [f"seeds {' '.join(map(str, args.seeds))}; repeated n-grams banned: {banned}"]
    if any(reported.values()):
        notes.append("in brackets: the paper's scores")
    table = report.score_table(scores, reported)
    title = "Table 1: ROUGE-L, mean ± standard deviation over seeds"
    report.write_table(out, "table1", title, table, notes, content)

    over = f"average over {', '.join(columns)}"
    means = {label: by_column["average"] for label, by_column in scores.items()}
    bars = {m: means[m] for m in models if models[m].kind not in ("teacher", "pretrain")}
    lines = {m: statistics.fmean(means[m]) for m in models if models[m].kind == "teacher"}
    print(report.plot_bars(out / "figure1.png", bars, lines, f"Figure 1: {over}"))
    if args.by:
        title = f"ROUGE-L by {' and '.join(args.by)}, {over}"
        report.write_group_table(out, args.by, groups, means, title)
    if args.samples:
        name, column = next(iter(columns.items()))
        first = {label: by_column[name][0] for label, by_column in paths.items()}
        report.write_samples(out, args.samples, name, column.rows, first)


# ---- Tables 2, 3 and 5, Figure 4 -------------------------------------------------------------
def table_2(names, out):
    """Print and write Table 2, the peak memory and hours of runs. Runs no model."""
    costs, order = {}, {}
    for label, name in zip(run_labels(names), names):
        record = read_record(name)
        if not record:
            print0(f"{name}: has no run.json, left out")
            continue
        path = run_dir(name) / "metrics.jsonl"
        has_steps = path.is_file() and path.stat().st_size > 0
        steps = [record, *(step for _, step in read_jsonl(path))] if has_steps else [record]
        found = {field: [s[field] for s in steps if field in s] for field in paper.COSTS}
        measured = {field: max(values) for field, values in found.items() if values}
        reported = dict(zip(paper.COSTS, paper.PAPER_COSTS.get(record.get("paper"), ())))
        costs[label] = {"measured": measured, "paper": reported}
        order[label] = table_sort_key(run_kind(record), record.get("parameters", 0))
    if not costs:
        raise InputError("none of the directories has a run.json; name runs, as in: --cost out/*/")
    costs = {label: costs[label] for label in sorted(costs, key=order.get)}
    table = [["cost", *paper.COSTS.values()]]
    for label, run in costs.items():
        ours = {field: f"{value:.2f}" for field, value in run["measured"].items()}
        for field in ours.keys() & run["paper"].keys():
            ours[field] += f" ({run['paper'][field]:.2f})"
        table.append([label, *(ours.get(field, "-") for field in paper.COSTS)])
    notes = [paper.COSTS_NOTE]
    report.write_table(out, "table2", "Table 2: memory and time", table, notes, {"costs": costs})


def group_runs(models, fields):
    """The runs among models by the values of fields: {values: labels}, sorted by values. A field is
    a setting or another field of run.json. Raises InputError if no run has it."""
    groups, known = {}, set()
    for label, m in models.items():
        if m.record:
            fields_of_run = (m.record["settings"] | m.record).items()
            run = {name: value for name, value in fields_of_run if not isinstance(value, dict)}
            known |= run.keys()
            run = DEFAULTS | run  # also of a run that is older than a field
            groups.setdefault(tuple(map(run.get, fields)), []).append(label)
    if unknown := [field for field in fields if field not in known]:
        options = ", ".join(sorted(known)) or "no runs"
        raise InputError(f"--by {unknown[0]}: no run named has this field; there are {options}")

    def sort_key(group):  # what is missing comes last
        return [(value is None, value) for value in group[0]]

    return dict(sorted(groups.items(), key=sort_key))


# ---- the command -----------------------------------------------------------------------------
def print_file_score(args):
    """Print the ROUGE-L of a file of responses."""
    responses = [text_field(row, "text", place) for place, row in read_jsonl(args.score)]
    references = [references_field(row, place) for place, row in read_jsonl(args.references)]
    scores = rouge_l(responses, references)
    print_unscorable(args.references, references)
    print0(f"ROUGE-L {statistics.fmean(scores):.4f} over {len(scores)} rows")


def parse_args(argv):
    """Parse and check the command line. Raises InputError if options do not go together."""
    description = "ROUGE-L of models or of a file of responses; memory and hours of runs."
    parser = command_line.ArgumentParser("evaluate.py", description=description)
    add, positive = parser.add_argument, number_in_range(int, 1, 10**6)
    add("models", nargs="*", metavar="RUN|MODEL", help="directories, official names or hub ids")
    help = f"{', '.join(PUBLIC_SETS)}, demo or directories (default: demo for its runs, their own"
    help += " data where all runs share it, else the paper's five)"
    add("--data", nargs="+", metavar="SET|DIR", help=help)
    add("--seeds", nargs="+", type=number_in_range(int, 0, 2**32), default=[10, 20, 30, 40, 50])
    add("--rows", type=number_in_range(int, 1, 10**9), help="only the first N rows of each set")
    add("--batch", type=positive, help="rows sampled at once (default: what fits; 64 on a CPU)")
    add("--out", default="out/evaluation", metavar="DIR", help="tables and plots go here")
    add("--samples", type=positive, metavar="N", help="Table 6: all responses to N requests")
    add("--by", nargs="+", metavar="FIELD", help="also by settings, as in reg_weight")
    add("--cost", action="store_true", help="Table 2: memory and hours of runs; runs no model")
    help = "score these responses (JSON lines with 'text'); - is standard input"
    add("--score", metavar="RESPONSES", help=help)
    add("--references", metavar="TEST", help="with --score: the data file with their 'output'")
    add_decoding_options(parser)
    add_precision_option(parser)
    args = parser.parse_args(argv)
    if bool(args.score) != bool(args.references) or (args.score and args.models):
        raise InputError("--score RESPONSES.jsonl goes with --references TEST.jsonl without models")
    if args.score:
        return args
    if not args.models:
        raise InputError("name at least one run or model, as in: evaluate.py gpt2 --data dolly")
    files.check_output_dir(args.out)
    args.seeds = list(dict.fromkeys(args.seeds))
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.score:
        print_file_score(args)
        return
    device, args.dtype = dist.init_process(args.dtype)
    if args.cost:
        dist.run_on_rank0(table_2, args.models, Path(args.out))
    else:
        table_1(args, device)
    dist.shutdown()


if __name__ == "__main__":
    command_line.run_command_line(main)
