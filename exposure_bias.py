"""Exposure bias of students: the paper's equations 5 to 11, after Arora et al. (2022), and its Figure 3.

R(l)          sum over the generation steps t ≤ l of the mean KL(p || q) at t, on responses sampled from the student q
ε(l)          1 / l times the same sum, on responses sampled from the teacher p
ExAccErr(l)   (R(l) - l ε(l)) / (l ε(l)) × 100 %: what the student loses, beyond its error at p's responses, by going on from its own

p is the fine-tuned teacher, fixed, without a prompt. The mean at a step is over the responses that are still alive there, so the curves
of two students are of different responses, the later the more. Negative values are legitimate.

python exposure_bias.py --teacher MODEL --students RUN|MODEL... --data dolly    ExAccErr over generation steps (Figure 3a)
python exposure_bias.py --teacher MODEL --along RUN... --data dolly             ExAccErr at l = 50 along training (Figure 3b)
"""

from data.threads import configure_threads

configure_threads()  # before torch is imported

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import dist
from data.cli import InputError, check_output_dir, parse_arguments, run_command_line
from data.dist import print0
from data.models import find_model, load_model
from data.options import add_precision_option, number_in_range
from data.prepare import find_data_dir
from data.report import MIN_ALIVE, last_reliable_step, plot_steps, plot_training, write_figure
from data.rows import MAX_NEW_TOKENS, Example, encode_request, make_batch, read_rows
from data.runs import checkpoints, short_names
from data.tokenizer import same_vocabulary
from losses import kl
from model import precision
from sample import sample_all

STEPS = 150  # of Figure 3a: as long as one Dolly reference in six


REPORT_STEP = 50  # l of Figure 3b


BOOTSTRAP = 1000  # resamples behind a band, which holds 95 % of them


# ---- the measure -------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def step_kl(p, q, requests, responses, micro_batch_size=8, dtype="float32"):
    """KL(p || q) at each generation step, exact over the vocabulary, in nats: for each response (a token list) a list as long, the
    first token's step first. p, q: models of one vocabulary. dtype: "float32" or "bfloat16", of the models' blocks."""
    device, result = p.wte.weight.device, [None] * len(requests)
    examples = [
        Example(i, request, response)
        for i, (request, response) in enumerate(zip(requests, responses))
    ]
    examples.sort(
        key=lambda e: -len(e.request) - len(e.response)
    )  # little padding; what doesn't fit in memory shows at once
    starts = range(0, len(examples), micro_batch_size)
    for start in tqdm(starts, desc="scoring", leave=False, disable=True if dist.rank() else None):
        chunk = examples[start : start + micro_batch_size]
        batch = make_batch(chunk, device)
        with precision(device, dtype):
            p_logits, q_logits = (
                m.logits(m(batch.ids, output_positions=batch.response_positions)) for m in (p, q)
            )  # (N, V), at response tokens only
        for e, values in zip(
            chunk, kl(p_logits, q_logits).cpu().split([len(e.response) for e in chunk])
        ):
            result[e.index] = values.tolist()
    return result


def sum_by_step(kl_steps):
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


def accumulated_error(kl_student, kl_teacher, weights=None):
    """R(l), ε(l) and ExAccErr(l) in %, for l = 1 ... L, the last step at which a response of each kind is alive: (L,), (L,), (L,).

    kl_student, kl_teacher: as `tally` takes them, on responses sampled from the student and from the teacher, the requests in one order.
    weights (..., X): how often each request counts, with all of its responses of both kinds; the results are (..., L) then, NaN from
    the first step at which no response counts.
    """
    (q_sums, q_alive), (p_sums, p_alive) = sum_by_step(kl_student), sum_by_step(kl_teacher)
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
    R, epsilon, error = accumulated_error(kl_student, kl_teacher)
    if not (epsilon > 0).all():
        raise InputError(
            f"{label}: its distribution is the teacher's own, so there is no error to accumulate; leave it out"
        )
    X = len(kl_student)
    weights = np.random.default_rng(seed).multinomial(X, np.full(X, 1 / X), BOOTSTRAP)  # (B, X)
    low, high = np.nanpercentile(
        accumulated_error(kl_student, kl_teacher, weights)[2], [2.5, 97.5], axis=0
    )
    alive = [sum_by_step(kind)[1].sum(0)[: len(R)].astype(int) for kind in (kl_student, kl_teacher)]
    names = ("l", "R", "epsilon", "ex_acc_err", "low", "high", "alive_student", "alive_teacher")
    return {
        name: values.tolist()
        for name, values in zip(
            names, (np.arange(1, len(R) + 1), R, epsilon, error, low, high, *alive)
        )
    }


def group(results):
    """Results (row index, a student's response's KL, a teacher's response's KL), of all ranks: the KL of either kind, by request."""
    by_request = {}
    for index, on_student, on_teacher in sorted(results, key=lambda result: result[0]):
        for kind, values in zip(by_request.setdefault(index, ([], [])), (on_student, on_teacher)):
            kind.append(values)
    return zip(*by_request.values())


def print_point(label, columns, n):
    """Print a curve's point number n, from 0."""
    error, low, high, l, alive = (
        columns[name][n] for name in ("ex_acc_err", "low", "high", "l", "alive_student")
    )
    print0(
        f"{label}: ExAccErr {error:+.1f} % (95 %: {low:+.1f} to {high:+.1f}) at l = {l}, where {alive:,} responses are alive"
    )


# ---- the command -------------------------------------------------------------------------------------------------------------
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="exposure_bias.py",
        description="Exposure bias of students (ExAccErr): over generation steps, and along training.",
    )
    positive = number_in_range(int, 1, 10**6)
    parser.add_argument(
        "--teacher",
        required=True,
        metavar="MODEL",
        help="the fine-tuned teacher: a run, a checkpoint directory or a hub id",
    )
    parser.add_argument(
        "--students",
        nargs="+",
        default=[],
        metavar="RUN|MODEL",
        help="a curve each over generation steps (Figure 3a)",
    )
    parser.add_argument(
        "--along",
        nargs="+",
        default=[],
        metavar="RUN",
        help=f"runs of train.py --keep 20: ExAccErr at l = {REPORT_STEP} along training (Figure 3b)",
    )
    parser.add_argument(
        "--data",
        default="dolly",
        metavar="SET|DIR",
        help="whose test.jsonl has the requests (default dolly)",
    )
    parser.add_argument("--rows", type=positive, metavar="N", help="only the first N requests")
    parser.add_argument(
        "--steps",
        type=number_in_range(int, 1, MAX_NEW_TOKENS),
        default=STEPS,
        metavar="L",
        help=f"tokens of a response at most (default {STEPS})",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=3,
        metavar="N",
        help="responses to a request, of each model (default 3)",
    )
    parser.add_argument("--seed", type=number_in_range(int, 0, 2**32), default=10)
    parser.add_argument(
        "--batch",
        type=positive,
        help="responses sampled at once (default: 64 on a CPU, what memory holds on a GPU)",
    )
    parser.add_argument(
        "--micro-batch",
        type=positive,
        default=8,
        help="responses scored at once on one rank (default 8)",
    )
    parser.add_argument(
        "--out",
        default="out/exposure_bias",
        metavar="DIR",
        help="where tables and pictures go (default out/exposure_bias)",
    )
    add_precision_option(parser, "float32")
    args = parse_arguments(parser, argv)
    if not args.students and not args.along:
        raise InputError(
            "name --students RUN|MODEL... for curves over generation steps, or --along RUN... for one along training"
        )
    check_output_dir(args.out)

    device, args.dtype = dist.init_process(args.dtype or "float32")
    rows = read_rows(
        dist.run_on_rank0(find_data_dir, args.data) / "test.jsonl", args.rows, needs_output=False
    )
    along = {run: dist.run_on_rank0(checkpoints, run) for run in args.along}
    p, tokenizer = load_model(args.teacher, device)
    for name in [
        *args.students,
        *(directory for of_run in along.values() for directory in of_run.values()),
    ]:  # before anything takes long
        if not same_vocabulary(find_model(name)[1], tokenizer):
            raise InputError(
                f"teacher {args.teacher} and student {name} have different tokenizers; a KL over the vocabulary needs one for both"
            )
    tokens = {row.index: encode_request(row, tokenizer) for row in rows}
    if cut := sum(shortened for _, shortened in tokens.values()):
        print0(f"{cut} of {len(rows)} requests were shortened to fit")
    mine = [row.index for row in dist.shard(rows) for _ in range(args.samples)]  # this rank's part
    requests = [tokens[index][0] for index in mine]

    def respond(model, role, steps, label):
        """Plain samples. The random numbers of teacher and student are never the same; those of all students are, which helps to compare them."""
        keys = [
            (args.seed, "exposure", role, n % args.samples, index) for n, index in enumerate(mine)
        ]
        return sample_all(
            model,
            requests,
            keys,
            tokenizer.eot_token,
            steps,
            args.batch,
            label=label,
            dtype=args.dtype,
        )[0]

    def measure(name, label, steps):
        """The curve of a student, all ranks together."""
        q, _ = load_model(name, device)
        y_q = respond(q, "student", steps, label)
        kl_q, kl_p = (
            step_kl(p, q, requests, y, args.micro_batch, args.dtype)
            for y in (y_q, [y[:steps] for y in y_p])
        )
        return curve(*group(dist.all_gather_list(list(zip(mine, kl_q, kl_p)))), args.seed, label)

    at = min(REPORT_STEP, args.steps)
    y_p = respond(p, "teacher", args.steps if args.students else at, f"teacher {args.teacher}")
    settings = {
        name: value
        for name, value in vars(args).items()
        if name not in ("out", "batch", "micro_batch_size")
    } | {"requests": len(rows)}
    if args.students:
        series = {}
        for name, label in short_names(args.students).items():
            series[label] = measure(name, label, args.steps)
            print_point(label, series[label], min(at, last_reliable_step(series[label])) - 1)
        print0(
            dist.run_on_rank0(
                write_figure, Path(args.out) / "figure_3a", "student", series, settings, plot_steps
            )
        )
    if args.along:
        curves = {
            run: [
                measure(directory, f"{run}, step {step}", at) for step, directory in of_run.items()
            ]
            for run, of_run in along.items()
        }
        l = min(last_reliable_step(columns) for of_run in curves.values() for columns in of_run)
        if l < at:
            print0(
                f"at l = {l}, not {at}: beyond it fewer than {100 * MIN_ALIVE:.0f} % of the responses are alive at some checkpoint"
            )
        series = {}
        for run, label in short_names(args.along).items():
            steps = [*along[run]]
            of_training = {"step": steps, "percent": [100 * step / steps[-1] for step in steps]}
            series[label] = of_training | {
                name: [columns[name][l - 1] for columns in curves[run]] for name in curves[run][0]
            }
            for n, step in enumerate(steps):
                print_point(f"{label}, step {step:,}", series[label], n)
        print0(
            dist.run_on_rank0(
                write_figure, Path(args.out) / "figure_3b", "run", series, settings, plot_training
            )
        )
    dist.shutdown()


if __name__ == "__main__":
    run_command_line(main)
