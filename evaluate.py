"""ROUGE-L of models and runs on data sets (the paper's Table 1), and of responses made elsewhere."""

import argparse
import json
import statistics
from pathlib import Path

from data import ranks  # before torch: data/__init__.py says why

from rouge_score.rouge_scorer import RougeScorer

from data.files import InputError, command, write_atomic
from data.prepare import PUBLIC_SETS, data_directory
from data.rows import is_text_list, read_jsonl, read_rows, request_tokens
from model import CheckpointError
from sample import add_decoding_options, in_range, load_model, sample_all, to_text

BANNED_NGRAM = 6  # the published numbers on the five public sets were sampled under this ban (the paper does not say so)


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


def evaluate_models(models, sets, seeds, device, no_repeat=0, **how):
    """Mean ROUGE-L of every model on every set: {model: {set: [a score for each seed]}}.

    models: {label: name of a model}. sets: {label: rows}. no_repeat: as sample's, a number or {set: number}.
    """
    scores = {}
    for label, name in models.items():
        model, tokenizer = load_model(name, device)
        for set_name, rows in sets.items():
            ban = no_repeat[set_name] if isinstance(no_repeat, dict) else no_repeat
            for seed in seeds:
                results = evaluate(
                    model, tokenizer, rows, (seed, "evaluate", set_name.rsplit("/")[-1]), f"{label} on {set_name}", no_repeat=ban, **how
                )
                scores.setdefault(label, {}).setdefault(set_name, []).append(mean_rouge_l(results))
                cut = sum(result["shortened"] for result in results)
                if cut and seed == seeds[0]:
                    say(f"{label} on {set_name}: {cut} of {len(rows)} requests were shortened to fit")
    return scores


def say(*words):
    """Print on rank 0."""
    if ranks.rank() == 0:
        print(*words, flush=True)


def format_score(scores):
    """Mean and, for several seeds, spread (standard deviation of the sample)."""
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.1f}{spread}"


def table(scores):
    """Scores as evaluate_models gives them, as lines of text: a row for each model, a column for each set, and the mean of the columns."""
    sets = list(next(iter(scores.values())))
    lines = [["ROUGE-L", *sets, "average"]]
    for label, by_set in scores.items():
        average = [statistics.fmean(seed_scores) for seed_scores in zip(*by_set.values())]
        lines.append([label, *(format_score(by_set[name]) for name in sets), format_score(average)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]) for line in lines)


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
        prog="evaluate.py", description="ROUGE-L of models and runs on data sets, over seeds; or of a file of responses."
    )
    parser.add_argument("models", nargs="*", metavar="RUN|MODEL", help="run or checkpoint directories, official names, hub ids owner/name")
    parser.add_argument("--data", nargs="+", default=["dolly"], metavar="SET|DIR", help=f"{', '.join(PUBLIC_SETS)}, or directories with test.jsonl")
    parser.add_argument("--seeds", nargs="+", type=in_range(int, 0, 2**32), default=[10, 20, 30, 40, 50])
    parser.add_argument("--rows", type=in_range(int, 1, 10**9), help="only the first N rows of each set")
    parser.add_argument(
        "--no-repeat-ngram",
        type=in_range(int, 0, 100),
        metavar="N",
        help=f"no N-gram twice in request and response (default: {BANNED_NGRAM} on the five public sets, as in the published numbers; else 0, off)",
    )
    parser.add_argument("--batch", type=in_range(int, 1, 10**6), default=64, help="rows sampled at once (default 64)")
    parser.add_argument("--json", metavar="FILE", help="where the scores go too (default out/evaluation.json; with --score nowhere)")
    parser.add_argument("--score", metavar="RESPONSES", help="score these responses (JSON lines with 'text') instead of a model's")
    parser.add_argument("--references", metavar="TEST", help="with --score: the data file (JSON lines with 'output') that they respond to")
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
    if not args.models:
        raise InputError("name at least one run or model, as in: evaluate.py gpt2 --data dolly")

    device = ranks.start()
    paths = [ranks.on_first(data_directory, name) / "test.jsonl" for name in args.data]
    labels = named_once(args.data)
    sets = dict(zip(labels, (read_rows(path, args.rows) for path in paths)))
    ban = {label: BANNED_NGRAM if name in PUBLIC_SETS else 0 for label, name in zip(labels, args.data)}
    if args.no_repeat_ngram is not None:
        ban = dict.fromkeys(ban, args.no_repeat_ngram)
    scores = evaluate_models(
        dict(zip(named_once(args.models), args.models)), sets, args.seeds, device, ban,
        max_new=args.max_new, at_once=args.batch, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, greedy=args.greedy,
    )  # fmt: skip
    if ranks.rank() == 0:
        print(table(scores))
        print(f"seeds {' '.join(map(str, args.seeds))}; repeated n-grams banned: " + ", ".join(f"{name} {n or 'no'}" for name, n in ban.items()))
        settings = {name: value for name, value in vars(args).items() if name not in ("models", "score", "references", "json")}
        path = args.json or "out/evaluation.json"
        write_atomic(path, json.dumps({"scores": scores, "settings": settings, "no_repeat_ngram": ban}, indent=1) + "\n")
        print(f"also in {path}")
    ranks.stop()


if __name__ == "__main__":
    command(main, CheckpointError)
