"""Exposure bias: the paper's equations 5 to 11, after Arora et al. (2022), and its Figure 3.

At test time a student q continues its own text, and its errors can accumulate. p is the teacher:
fine-tuned, fixed, without a soft prompt. For l generation steps:

    R(l)         sum over t <= l of the mean KL(p || q) at step t, on responses sampled from q
    ε(l)         1/l times the same sum, on responses sampled from p
    ExAccErr(l)  (R(l) - l ε(l)) / (l ε(l)) × 100 %, the excess accumulated error

l ε(l) is what q would accumulate if it always continued the teacher's text. Negative values are
legitimate. The mean at a step is over the responses that have not ended before it.

    python exposure_bias.py --teacher MODEL --students RUN|MODEL... --data dolly    # Figure 3a
    python exposure_bias.py --teacher MODEL --along RUN... --data dolly             # Figure 3b
"""

import os.path
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # before others' `data`, `evaluate`

import data.process.threads  # noqa: F401  (must precede torch: it sets how threads wait)

from pathlib import Path

import numpy as np
import torch

from data.models.copies import check_same_files
from data.models.named import check_weights, find_model, load_model
from data.models.sampling import CACHE_SHARE_ALONE, check_requests, sample_all
from data.models.tokenizer import check_same_vocabulary
from data.process import command_line, dist, errors, files
from data.process.command_line import number_in_range
from data.process.dist import print0
from data.process.errors import InputError
from data.runs.names import unique_labels
from data.runs.options import add_precision_option
from data.runs.report import MIN_ALIVE, last_reliable_step, write_figure
from data.runs.runs import checkpoints
from data.sets.prepare import find_data_dir
from data.sets.rows import MAX_NEW_TOKENS, Example, encode_request, micro_batches, read_rows
from losses import kl
from model import precision

MAX_STEPS = 150  # of Figure 3a: one Dolly reference in six is longer
REPORT_STEP = 50  # l of Figure 3b
BOOTSTRAP_SAMPLES = 1000


@torch.no_grad()
def kl_by_step(p, q, requests, responses, micro_batch_tokens=4096, dtype="float32"):
    """KL(p || q) at each token of each response, exact over the vocabulary, in nats: lists.
    requests, responses: lists of token ids, one of each per response."""
    device = p.wte.weight.device
    examples = [Example(i, x, y) for i, (x, y) in enumerate(zip(requests, responses))]
    results = [None] * len(examples)
    for batch in micro_batches(examples, micro_batch_tokens, device):
        positions = batch.response_positions
        with precision(device, dtype):
            p_logits = p.logits(p(batch.ids, output_positions=positions))  # (N, V)
            q_logits = q.logits(q(batch.ids, output_positions=positions))  # (N, V)
        kl_tokens = kl(p_logits, q_logits).cpu()  # (N,), response after response
        lengths = [len(e.response) for e in batch.examples]
        for e, kl_steps in zip(batch.examples, kl_tokens.split(lengths)):
            results[e.index] = kl_steps.tolist()
    return results


def sum_by_step(kl_steps):
    """For each request and step, the sum of the KL and the number of responses that are alive.

    kl_steps[x] has the responses to request x, each as the KL at its steps. A response is alive at
    a step if it has a token there. Returns two arrays (X, L), L the length of the longest response.
    """
    L = max(len(response) for responses in kl_steps for response in responses)
    sums, alive = np.zeros((2, len(kl_steps), L))
    for x, responses in enumerate(kl_steps):
        for response in responses:
            sums[x, : len(response)] += response
            alive[x, : len(response)] += 1
    return sums, alive


def excess_accumulated_error(kl_q, kl_p, weights=None):
    """R(l), ε(l) and ExAccErr(l) in %, for l = 1 ... L: the steps at which both kinds are alive.

    kl_q, kl_p: KL on the student's and on the teacher's responses, as `sum_by_step` takes them.
    weights: (..., X), how often a request counts, with all its responses. Returns three arrays
    (..., L); NaN where no response that counts is alive.
    """
    q_sums, q_alive = sum_by_step(kl_q)
    p_sums, p_alive = sum_by_step(kl_p)
    L = min(q_sums.shape[1], p_sums.shape[1])
    weights = np.ones(len(kl_q)) if weights is None else weights

    def accumulate_means(sums, alive):
        return (weights @ sums[:, :L] / (weights @ alive[:, :L])).cumsum(-1)  # (..., L)

    with np.errstate(divide="ignore", invalid="ignore"):
        R = accumulate_means(q_sums, q_alive)
        l_epsilon = accumulate_means(p_sums, p_alive)  # l ε(l)
        return R, l_epsilon / np.arange(1, L + 1), 100 * (R - l_epsilon) / l_epsilon


def exposure_curve(kl_q, kl_p, seed, label):
    """A student's curve over l = 1 ... L: lists by name.

    `low` to `high` is the 95 % band of a bootstrap that resamples requests. Each request keeps all
    its responses, so that its R and ε stay together. Raises InputError if ε is 0.
    """
    R, epsilon, ex_acc_err = excess_accumulated_error(kl_q, kl_p)
    if not (epsilon > 0).all():
        raise InputError(f"{label}: its distribution is the teacher's own; leave it out")
    X, L = len(kl_q), len(R)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(X, np.full(X, 1 / X), BOOTSTRAP_SAMPLES)  # (B, X)
    _, _, resampled = excess_accumulated_error(kl_q, kl_p, weights)  # (B, L)
    low, high = np.nanpercentile(resampled, [2.5, 97.5], axis=0)
    alive = [sum_by_step(kl_steps)[1].sum(0)[:L].astype(int) for kl_steps in (kl_q, kl_p)]
    names = "l R epsilon ex_acc_err low high alive_student alive_teacher".split()
    columns = np.arange(1, L + 1), R, epsilon, ex_acc_err, low, high, *alive
    return {name: values.tolist() for name, values in zip(names, columns)}


def max_steps(args):
    """The tokens of the longest response that is sampled. Figure 3b needs fewer than 3a."""
    return args.steps if args.students else min(REPORT_STEP, args.steps)


class Teacher:
    """The teacher p with its responses to this rank's requests, to measure students against."""

    def __init__(self, p, tokenizer, rows, args):
        self.p, self.args = p, args
        self.eos_token_id = tokenizer.eot_token
        requests, shortened = zip(*(encode_request(row, tokenizer) for row in rows))
        if any(shortened):
            print0(f"{sum(shortened)} of {len(rows)} requests were shortened to fit")
        self.rows = [row.index for row in dist.shard(rows)]
        self.requests = [x for x in dist.shard(requests) for _ in range(args.samples)]
        self.y_p = self.sample_responses(p, "teacher", max_steps(args), f"teacher {args.teacher}")

    def sample_responses(self, model, role, steps, label):
        """Sample a response to each request from the whole distribution, without any ban."""
        # Teacher and student never share random numbers. All students use the same ones, which
        # makes the difference between two students less noisy.
        args, samples = self.args, range(self.args.samples)
        rng_keys = [(args.seed, "exposure", role, n, row) for row in self.rows for n in samples]
        responses, _ = sample_all(
            model,
            self.requests,
            rng_keys,
            self.eos_token_id,
            max_new_tokens=steps,
            batch_size=args.batch,
            cache_share=CACHE_SHARE_ALONE,
            label=label,
            dtype=args.dtype,
        )
        return responses

    def kl_lists(self, student, label, steps):
        """KL(p || q) by step on the responses of the student q and on those of the teacher p, of
        all ranks: two lists as `sum_by_step` takes them."""
        q, _ = load_model(student, self.p.wte.weight.device)
        args, results = self.args, [self.rows]
        for responses in (self.sample_responses(q, "student", steps, label), self.y_p):
            responses = [response[:steps] for response in responses]
            kl_steps = kl_by_step(
                self.p,
                q,
                self.requests,
                responses,
                micro_batch_tokens=args.micro_batch_tokens,
                dtype=args.dtype,
            )
            starts = range(0, len(kl_steps), args.samples)
            results.append([kl_steps[i : i + args.samples] for i in starts])
        _, kl_q, kl_p = zip(*sorted(dist.all_gather_list(list(zip(*results)))))
        return kl_q, kl_p

    def measure(self, student, label, steps):
        """The curve of a student up to `steps`, from the responses of all ranks."""
        return exposure_curve(*self.kl_lists(student, label, steps), self.args.seed, label)


def print_point(label, columns, l):
    """Print the point of a curve at step l. Returns it, a number by name."""
    point = {name: values[l - 1] for name, values in columns.items()}
    band = f"95 %: {point['low']:+.1f} to {point['high']:+.1f}"
    place = f"l = {l}, where {point['alive_student']:,} responses are alive"
    print0(f"{label}: ExAccErr {point['ex_acc_err']:+.1f} % ({band}) at {place}")
    return point


def write_figure_3a(teacher, students, settings, out):
    """ExAccErr of each student, {label: model}, over generation steps."""
    series = {}
    for label, student in students.items():
        series[label] = teacher.measure(student, label, teacher.args.steps)
        print_point(label, series[label], min(REPORT_STEP, last_reliable_step(series[label])))
    title = "Exposure bias over generation steps"
    xlabel = f"generation step l, while at least {100 * MIN_ALIVE:.0f} % of the responses are alive"
    print0(dist.run_on_rank0(write_figure, out, "student", series, settings, "l", title, xlabel))


def write_figure_3b(teacher, runs, settings, out):
    """ExAccErr along training, {label: {optimizer step: checkpoint}}, at the last l <= 50 that is
    reliable for every checkpoint."""
    max_l, curves, series = min(REPORT_STEP, teacher.args.steps), {}, {}
    for run, kept in runs.items():
        for step, student in kept.items():
            curves[run, step] = teacher.measure(student, f"{run}, step {step:,}", max_l)
    l = min(map(last_reliable_step, curves.values()))
    if l < max_l:
        print0(f"at l = {l}, not {max_l}: too few responses are alive beyond it at some checkpoint")
    for (run, step), columns in curves.items():
        point = {"step": step, "percent": 100 * step / max(runs[run])}
        point |= print_point(f"{run}, step {step:,}", columns, l)
        for name, value in point.items():
            series.setdefault(run, {}).setdefault(name, []).append(value)
    title = f"Exposure bias along training, at generation step l = {l}"
    xlabel = "optimizer step (% of the best one)"
    print0(dist.run_on_rank0(write_figure, out, "run", series, settings, "percent", title, xlabel))


def parse_args(argv):
    help = "Exposure bias of students (ExAccErr): over generation steps and along training."
    parser = command_line.ArgumentParser("exposure_bias.py", description=help, allow_abbrev=False)
    positive, length = number_in_range(int, 1, 10**6), number_in_range(int, 1, MAX_NEW_TOKENS)
    add = parser.add_argument
    add("--teacher", required=True, metavar="MODEL", help="fine-tuned: run, directory or hub id")
    add("--students", nargs="+", default=[], metavar="RUN|MODEL", help="for Figure 3a")
    add("--along", nargs="+", default=[], metavar="RUN", help="for Figure 3b: with --keep 20")
    add("--data", default="dolly", metavar="SET|DIR", help="its test.jsonl (default dolly)")
    add("--rows", type=positive, metavar="N", help="only the first N requests")
    add("--steps", type=length, default=MAX_STEPS, metavar="L", help="maximum length, in tokens")
    add("--samples", type=positive, default=3, metavar="N", help="responses each (default 3)")
    add("--seed", type=number_in_range(int, 0, 2**32), default=10)
    add("--batch", type=positive, help="responses sampled at once (default: what memory holds)")
    help = "tokens scored at once, with padding (default 4096)"
    add("--micro-batch-tokens", type=positive, default=4096, metavar="N", help=help)
    add("--out", default="out/exposure_bias", metavar="DIR", help="tables and plots go here")
    add_precision_option(parser, "float32")
    args = parser.parse_args(argv)
    if not args.students and not args.along:
        raise InputError("name --students RUN|MODEL... for Figure 3a, or --along RUN... for 3b")
    return args


def main(argv=None):
    args = parse_args(argv)
    files.check_output_dir(args.out)
    device, args.dtype = dist.init_process(args.dtype or "float32")
    path = dist.run_on_rank0(find_data_dir, args.data) / "test.jsonl"
    kept = [dist.run_on_rank0(checkpoints, run) for run in args.along]
    models = [*args.students, *(checkpoint for steps in kept for checkpoint in steps.values())]
    check_same_files([path], [args.teacher, *models])
    rows = read_rows(path, args.rows, needs_output=False)
    students = dict(zip(unique_labels(args.students), args.students))
    runs = dict(zip(unique_labels(args.along), kept))
    p, tokenizer = load_model(args.teacher, device)
    # Check every model before anything is sampled, which can take hours.
    for student in models:
        check_same_vocabulary(args.teacher, student, tokenizer, find_model(student)[1])
        check_weights(student)
    for model in [args.teacher, *models]:
        check_requests(model, rows, max_steps(args), "--steps")
    settings = vars(args) | {"requests": len(rows)}
    fix = "lower --batch or --micro-batch-tokens, or use smaller models"
    with errors.explain_out_of_memory(f"students of {args.teacher} on {args.data}", fix):
        teacher = Teacher(p, tokenizer, rows, args)
        if students:
            write_figure_3a(teacher, students, settings, Path(args.out) / "figure_3a")
        if runs:
            write_figure_3b(teacher, runs, settings, Path(args.out) / "figure_3b")
    dist.shutdown()


if __name__ == "__main__":
    command_line.run_command_line(main)
