"""Exposure bias of students: the paper's equations 5 to 11, after Arora et al. (2022), and its Figure 3.

R(l)          sum over the generation steps t ≤ l of the mean KL(p || q) at t, on responses sampled from the student q
ε(l)          1 / l times the same sum, on responses sampled from the teacher p
ExAccErr(l)   (R(l) - l ε(l)) / (l ε(l)) × 100 %: what the student loses, beyond its error at p's responses, by going on from its own

p is the fine-tuned teacher, fixed, without a prompt. The mean at a step is over the responses that are still alive there, so the curves
of two students are of different responses, the later the more. Negative values are legitimate.

python exposure_bias.py --teacher MODEL --students RUN|MODEL... --data dolly    ExAccErr over generation steps (Figure 3a)
python exposure_bias.py --teacher MODEL --along RUN... --data dolly             ExAccErr at l = 50 along training (Figure 3b)
"""

import argparse
import csv
import io
import json
from pathlib import Path

from data import ranks  # before torch: data/__init__.py says why

import numpy as np
import torch
from tqdm import tqdm

from data.files import InputError, check_out, command, parse_arguments, pyplot, write_atomic
from data.prepare import data_directory
from data.ranks import say
from data.rows import Example, make_batch, read_rows, request_tokens, same_tokens
from losses import kl
from model import CheckpointError, precision
from sample import MAX_NEW, add_precision_option, find_model, in_range, load_model, sample_all

STEPS = 150  # of Figure 3a: as long as one Dolly reference in six
AT = 50  # l of Figure 3b
ENOUGH = 0.1  # share of the responses alive below which Figure 3a is dotted, and which Figure 3b keeps to
BOOTSTRAP = 1000  # resamples behind a band, which holds 95 % of them

# ---- the measure -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def step_kl(p, q, requests, responses, micro_batch=8, dtype="float32"):
    """KL(p || q) at each generation step, exact over the vocabulary, in nats: for each response (a token list) a list as long, the
    first token's step first. p, q: models of one vocabulary. dtype: "float32" or "bfloat16", of the models' blocks."""
    device, result = p.wte.weight.device, [None] * len(requests)
    examples = [Example(i, request, response) for i, (request, response) in enumerate(zip(requests, responses))]
    examples.sort(key=lambda e: -len(e.request) - len(e.response))  # little padding; what doesn't fit in memory shows at once
    starts = range(0, len(examples), micro_batch)
    for start in tqdm(starts, desc="scoring", leave=False, disable=True if ranks.rank() else None):
        chunk = examples[start : start + micro_batch]
        batch = make_batch(chunk, device)
        with precision(device, dtype):
            p_logits, q_logits = (m.logits(m(batch.ids, where=batch.where)) for m in (p, q))  # (N, V), at response tokens only
        for e, values in zip(chunk, kl(p_logits, q_logits).cpu().split([len(e.response) for e in chunk])):
            result[e.index] = values.tolist()
    return result


def tally(kl_steps):
    """What the means are made of: the sum of the KL, and the number of responses alive, for each request and step, (X, L) and (X, L).

    kl_steps: for each of X requests its responses, for each of these the KL at its steps. L: the longest's steps.
    """
    steps = max(len(response) for responses in kl_steps for response in responses)
    sums, alive = np.zeros((2, len(kl_steps), steps))
    for x, responses in enumerate(kl_steps):
        for response in responses:
            sums[x, : len(response)] += response
            alive[x, : len(response)] += 1
    return sums, alive


def exposure(kl_student, kl_teacher, weights=None):
    """R(l), ε(l) and ExAccErr(l) in %, for l = 1 ... L, the last step at which a response of each kind is alive: (L,), (L,), (L,).

    kl_student, kl_teacher: as `tally` takes them, on responses sampled from the student and from the teacher, the requests in one order.
    weights (..., X): how often each request counts, with all of its responses of both kinds; the results are (..., L) then, NaN from
    the first step at which no response counts.
    """
    (q_sums, q_alive), (p_sums, p_alive) = tally(kl_student), tally(kl_teacher)
    L = min(q_sums.shape[1], p_sums.shape[1])
    weights = np.ones(len(kl_student)) if weights is None else weights
    with np.errstate(divide="ignore", invalid="ignore"):
        R = (weights @ q_sums[:, :L] / (weights @ q_alive[:, :L])).cumsum(-1)  # (..., L)
        l_epsilon = (weights @ p_sums[:, :L] / (weights @ p_alive[:, :L])).cumsum(-1)
        return R, l_epsilon / np.arange(1, L + 1), 100 * (R - l_epsilon) / l_epsilon


def curve(kl_student, kl_teacher, seed, label):
    """The curve of the student called `label` as columns, {name: a number for each l}: what `exposure` gives, the 95 % band of ExAccErr from a bootstrap
    over requests (each with all of its responses, so that R and ε stay together), and the responses alive.

    Raises InputError where ε is 0: student and teacher are one, and ExAccErr has no value.
    """
    R, epsilon, error = exposure(kl_student, kl_teacher)
    if not (epsilon > 0).all():
        raise InputError(f"{label}: its distribution is the teacher's own, so there is no error to accumulate; leave it out")
    X = len(kl_student)
    weights = np.random.default_rng(seed).multinomial(X, np.full(X, 1 / X), BOOTSTRAP)  # (B, X)
    low, high = np.nanpercentile(exposure(kl_student, kl_teacher, weights)[2], [2.5, 97.5], axis=0)
    alive = [tally(kind)[1].sum(0)[: len(R)].astype(int) for kind in (kl_student, kl_teacher)]
    names = ("l", "R", "epsilon", "ex_acc_err", "low", "high", "alive_student", "alive_teacher")
    return {name: values.tolist() for name, values in zip(names, (np.arange(1, len(R) + 1), R, epsilon, error, low, high, *alive))}


def readable(columns):
    """The last l of a curve at which enough responses of each kind are alive."""
    alive = np.minimum(columns["alive_student"], columns["alive_teacher"])
    return int((alive >= ENOUGH * alive[0]).sum())  # they only ever become fewer


# ---- models and checkpoints --------------------------------------------------------------------------------------------------


def checkpoints(run):
    """The checkpoints of a run for Figure 3b, {optimizer step: directory} in order: of those kept and the best one, the nearest to each
    tenth of the best one's step, which is the last. Raises InputError where the run has none."""
    record = Path(run) / "run.json"
    try:
        best = json.loads(record.read_text(encoding="utf-8"))["best_step"]
        sound = type(best) is int and best > 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise InputError(f"{record}: has no 'best_step'; give the directory of a complete run of train.py --keep 20")
    kept = {int(path.name[5:]): path for path in Path(run).glob("kept/step-*") if path.name[5:].isdecimal()}
    if not kept:
        raise InputError(f"{Path(run) / 'kept'}: has no checkpoints; train the run with --keep 20")
    kept[best] = Path(run) / "best"
    nearest = {min(kept, key=lambda step: (abs(step - best * tenth / 10), step)) for tenth in range(1, 11)}
    return {step: kept[step] for step in sorted(nearest)}


def short_names(names):
    """{name: label} for pictures and tables: the last part of each name, or all of it where these are not unique."""
    labels = [Path(name).parent.name if Path(name).name == "best" else Path(name).name for name in names]
    return dict(zip(names, labels if len(set(labels)) == len(labels) and all(labels) else names))


def group(results):
    """Results (row index, a student's response's KL, a teacher's response's KL), of all ranks: the KL of either kind, by request."""
    by_request = {}
    for index, on_student, on_teacher in sorted(results, key=lambda result: result[0]):
        for kind, values in zip(by_request.setdefault(index, ([], [])), (on_student, on_teacher)):
            kind.append(values)
    return zip(*by_request.values())


# ---- tables and pictures -----------------------------------------------------------------------------------------------------


def write_figure(stem, first, series, settings, draw):
    """Write a figure as `stem`.csv, .json and, with matplotlib, .png. Returns a line that says where they lie.

    series: {label: columns of equal length by name}; first: what the labels are called in the CSV.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([first, *next(iter(series.values()))])
    for label, columns in series.items():
        lines.writerows([label, *values] for values in zip(*columns.values()))
    write_atomic(f"{stem}.csv", text.getvalue())
    write_atomic(f"{stem}.json", json.dumps({"settings": settings, f"{first}s": series}) + "\n")
    if pyplot() is None:
        return f"also in {stem}.csv and .json; no picture without matplotlib"
    what = f"{Path(settings['data']).name}: {settings['requests']} requests × {settings['samples']} samples; bands: 95 %, bootstrap over requests"
    figure = draw(pyplot(), series, what)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    pyplot().close(figure)
    write_atomic(f"{stem}.png", picture.getvalue())
    return f"also in {stem}.csv, .json and .png"


def draw_band(axes, x, columns, color):
    """The band of ExAccErr, and the line at zero."""
    axes.fill_between(x, columns["low"], columns["high"], color=color, alpha=0.15, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.8)


def draw_steps(pyplot, series, what):
    """Figure 3a: ExAccErr over generation steps, and below it the responses alive."""
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, height_ratios=(3, 1), figsize=(7, 6), layout="constrained")
    for label, columns in series.items():
        l, error, n = columns["l"], columns["ex_acc_err"], readable(columns)
        [line] = top.plot(l[:n], error[:n], label=label)
        top.plot(l[n - 1 :], error[n - 1 :], color=line.get_color(), linestyle=":")
        draw_band(top, l, columns, line.get_color())
        bottom.plot(l, columns["alive_student"], color=line.get_color())
    longest = max(series.values(), key=lambda columns: len(columns["l"]))
    bottom.plot(longest["l"], longest["alive_teacher"], color="black", linestyle="--", label="teacher's")
    top.set(ylabel="ExAccErr (%)", title=f"Exposure bias over generation steps\n{what}")
    bottom.set(xlabel=f"generation step l (tokens); dotted: fewer than {100 * ENOUGH:.0f} % alive", ylabel="responses alive", ylim=(0, None))
    for axes in (top, bottom):
        axes.legend()
    return figure


def draw_training(pyplot, series, what):
    """Figure 3b: ExAccErr along training."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for label, columns in series.items():
        [line] = axes.plot(columns["percent"], columns["ex_acc_err"], label=label, marker="o")
        draw_band(axes, columns["percent"], columns, line.get_color())
    l = next(iter(series.values()))["l"][0]  # the same everywhere
    axes.set(xlabel="optimizer step (% of the best checkpoint's)", ylabel=f"ExAccErr at l = {l} (%)", title=f"Exposure bias along training\n{what}")
    axes.legend()
    return figure


def say_point(label, columns, n):
    """Print a curve's point number n, from 0."""
    error, low, high, l, alive = (columns[name][n] for name in ("ex_acc_err", "low", "high", "l", "alive_student"))
    say(f"{label}: ExAccErr {error:+.1f} % (95 %: {low:+.1f} to {high:+.1f}) at l = {l}, where {alive:,} responses are alive")


# ---- the command -------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="exposure_bias.py", description="Exposure bias of students (ExAccErr): over generation steps, and along training."
    )
    positive = in_range(int, 1, 10**6)
    parser.add_argument("--teacher", required=True, metavar="MODEL", help="the fine-tuned teacher: a run, a checkpoint directory or a hub id")
    parser.add_argument("--students", nargs="+", default=[], metavar="RUN|MODEL", help="a curve each over generation steps (Figure 3a)")
    parser.add_argument(
        "--along", nargs="+", default=[], metavar="RUN", help=f"runs of train.py --keep 20: ExAccErr at l = {AT} along training (Figure 3b)"
    )
    parser.add_argument("--data", default="dolly", metavar="SET|DIR", help="whose test.jsonl has the requests (default dolly)")
    parser.add_argument("--rows", type=positive, metavar="N", help="only the first N requests")
    parser.add_argument("--steps", type=in_range(int, 1, MAX_NEW), default=STEPS, metavar="L", help=f"tokens of a response at most (default {STEPS})")
    parser.add_argument("--samples", type=positive, default=3, metavar="N", help="responses to a request, of each model (default 3)")
    parser.add_argument("--seed", type=in_range(int, 0, 2**32), default=10)
    parser.add_argument("--batch", type=positive, help="responses sampled at once (default: 64 on a CPU, what memory holds on a GPU)")
    parser.add_argument("--micro-batch", type=positive, default=8, help="responses scored at once on one rank (default 8)")
    parser.add_argument("--out", default="out/exposure_bias", metavar="DIR", help="where tables and pictures go (default out/exposure_bias)")
    add_precision_option(parser, "float32")
    args = parse_arguments(parser, argv)
    if not args.students and not args.along:
        raise InputError("name --students RUN|MODEL... for curves over generation steps, or --along RUN... for one along training")
    check_out(args.out)

    device, args.dtype = ranks.start(args.dtype or "float32")
    rows = read_rows(ranks.on_first(data_directory, args.data) / "test.jsonl", args.rows, needs_output=False)
    along = {run: ranks.on_first(checkpoints, run) for run in args.along}
    p, tokenizer = load_model(args.teacher, device)
    for name in [*args.students, *(directory for of_run in along.values() for directory in of_run.values())]:  # before anything takes long
        if not same_tokens(find_model(name)[1], tokenizer):
            raise InputError(f"teacher {args.teacher} and student {name} have different tokenizers; a KL over the vocabulary needs one for both")
    tokens = {row.index: request_tokens(row, tokenizer) for row in rows}
    if cut := sum(shortened for _, shortened in tokens.values()):
        say(f"{cut} of {len(rows)} requests were shortened to fit")
    mine = [row.index for row in ranks.share(rows) for _ in range(args.samples)]  # this rank's part
    requests = [tokens[index][0] for index in mine]

    def respond(model, role, steps, label):
        """Plain samples. The random numbers of teacher and student are never the same; those of all students are, which helps to compare them."""
        keys = [(args.seed, "exposure", role, n % args.samples, index) for n, index in enumerate(mine)]
        return sample_all(model, requests, keys, tokenizer.eot_token, steps, args.batch, label=label, dtype=args.dtype)[0]

    def measure(name, label, steps):
        """The curve of a student, all ranks together."""
        q, _ = load_model(name, device)
        y_q = respond(q, "student", steps, label)
        kl_q, kl_p = (step_kl(p, q, requests, y, args.micro_batch, args.dtype) for y in (y_q, [y[:steps] for y in y_p]))
        return curve(*group(ranks.gather(list(zip(mine, kl_q, kl_p)))), args.seed, label)

    at = min(AT, args.steps)
    y_p = respond(p, "teacher", args.steps if args.students else at, f"teacher {args.teacher}")
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "batch", "micro_batch")} | {"requests": len(rows)}
    if args.students:
        series = {}
        for name, label in short_names(args.students).items():
            series[label] = measure(name, label, args.steps)
            say_point(label, series[label], min(at, readable(series[label])) - 1)
        say(ranks.on_first(write_figure, Path(args.out) / "figure_3a", "student", series, settings, draw_steps))
    if args.along:
        curves = {run: [measure(directory, f"{run}, step {step}", at) for step, directory in of_run.items()] for run, of_run in along.items()}
        l = min(readable(columns) for of_run in curves.values() for columns in of_run)
        if l < at:
            say(f"at l = {l}, not {at}: beyond it fewer than {100 * ENOUGH:.0f} % of the responses are alive at some checkpoint")
        series = {}
        for run, label in short_names(args.along).items():
            steps = [*along[run]]
            of_training = {"step": steps, "percent": [100 * step / steps[-1] for step in steps]}
            series[label] = of_training | {name: [columns[name][l - 1] for columns in curves[run]] for name in curves[run][0]}
            for n, step in enumerate(steps):
                say_point(f"{label}, step {step:,}", series[label], n)
        say(ranks.on_first(write_figure, Path(args.out) / "figure_3b", "run", series, settings, draw_training))
    ranks.stop()


if __name__ == "__main__":
    command(main, CheckpointError)
