"""Time and memory of one PromptKD iteration, against the released recipe and the machine's limits.

    python tests/bench.py --size S M D     one table per size: sampling, prompt step, student step
                                           and peak memory (also L, on a GPU)
    python tests/bench.py --sampling       tokens/s of sampling alone, at GPT-2's base shape
    python tests/bench.py --evaluation     time to evaluate Dolly's test rows
    python tests/bench.py --scaling        time and memory against batch, length and vocabulary
    python tests/bench.py --size S --pairs 20 --old DIR    this checkout against the one in DIR
    python tests/bench.py --size D --micro-batches 1024 2048    micro-batches of so many tokens
                                           against micro-batches of 8 rows

The recipe is a plain re-statement. The limits are a roofline bound: the operations and bytes that a
step needs at least, at the rates that this machine reaches.

All sides have the same weights and rows, and do all the work of sampling. Only the outcome of
sampling is forced, so that all sides generate the same responses. Each side is a process of its
own: this project's with its own settings for threads and memory, the others with PyTorch's
defaults. The sides take turns, so that one waits while another works.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from subprocess import PIPE, Popen
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ENVIRONMENT = dict(os.environ)  # of the sides: the imports below configure this process's threads

if "--stock" in sys.argv:  # a side that keeps the defaults of libgomp and glibc
    sys.modules["data.process.threads"] = ModuleType("data.process.threads")

import data.process.threads  # noqa: F401  (before torch)

import numpy as np
import torch
from recipe import (
    force_responses,
    hf_logits,
    hf_sample,
    plain_sample,
    recipe_step,
    to_hf,
    token_table,
)
from roofline import PROMPT_LENGTH, bound_seconds, count_work, machine_rates

import train
from data.models.sampling import decode_response, sample_all
from data.models.tokenizer import load_tokenizer
from data.process import dist
from data.process.command_line import run_command_line
from data.process.errors import InputError
from data.process.files import write_atomic
from data.runs import runs
from data.runs.methods import METHODS, Settings
from data.runs.optim import adamw, set_learning_rate
from data.runs.options import add_precision_option, number_in_range, parse_shape
from data.runs.report import format_table, save_plot
from data.sets.rows import (
    MAX_NEW_TOKENS,
    Example,
    encode_request,
    encode_training_rows,
    make_batch,
    micro_batches,
    read_rows,
)
from evaluate import evaluate, rouge_l
from model import GPT, precision
from prompt import freeze

# 64 rows of Dolly for where the data set is missing: tokens of request + response, the latter cut
# at 256. They were drawn so that their means and quantiles are those of all rows, which have 71.3
# and 68.9 tokens on average.
DOLLY_ROWS = """
    37+6 43+83 49+38 41+15 48+13 178+36 89+18 169+10 40+7 177+10 86+46 42+90 34+79 44+29 41+122
    37+56 56+178 48+99 50+6 42+20 40+34 44+53 39+12 244+43 167+2 67+32 111+176 40+256 41+256 45+12
    45+33 46+96 62+106 38+29 174+60 192+126 55+147 40+54 46+55 36+97 40+94 35+43 36+256 37+10
    45+256 38+11 36+128 217+10 41+30 35+66 222+115 39+85 39+8 36+66 66+27 59+29 38+74 53+33 45+253
    136+90 38+9 126+4 118+70 40+51
"""
DOLLY_LENGTHS = [[int(n) for n in row.split("+")] for row in DOLLY_ROWS.split()]


def make_case(student, teacher, rows, request, max_new_tokens, vocab=50257, **values):
    """The sizes of a step. request, max_new_tokens: limits in tokens, and the length of all rows.

    values: "lengths", which the rows have instead; or "source", the folder with Dolly.
    Later perhaps "micro_batch_tokens", or "micro_batch_rows" for micro-batches of so many rows.
    """
    models = {"student": student, "teacher": teacher, "dropout": 0.1, "dtype": "float32"}
    sizes = {"rows": rows, "request": request, "max_new_tokens": max_new_tokens, "vocab": vocab}
    return models | sizes | values


BASE, MEDIUM, XL = "12x768x12", "24x1024x16", "48x1600x25"
CASES = {
    "XS": make_case("1x32x2", "2x48x3", 4, 12, 12, vocab=500),  # for the tests
    "S": make_case("4x128x4", "6x256x8", 8, 64, 64),
    "M": make_case(BASE, MEDIUM, 4, 48, 48),
    "D": make_case("4x128x4", "6x256x8", 32, 256, 256, source=None),
    "L": make_case(BASE, XL, 256, 256, 256, lengths=DOLLY_LENGTHS),
}
# The recipe would take minutes: it is timed on one of so many rows, and its seconds multiplied.
RECIPE_FRACTION = {"L": 16}
PAPER_STEPS = 20 * 44  # of PromptKD for GPT-2 base: 20 epochs of 44 global batches of 256 rows
PHASES = ("sampling", "prompt", "student")
MICRO_BATCH_TOKENS = 2048  # the default of train.py for students of up to a billion parameters
# The axes of --scaling, around S
AXES = {
    "rows": (8, 16, 32, 64),
    "tokens per row": (128, 256, 384, 512),
    "vocab": (5_000, 10_000, 25_000, 50_257),
}
MAX_SECONDS = 60  # --scaling leaves out steps of the recipe that would take longer
MIN_PAIRS = 6  # fewer values have no 95 % interval of the median


def find_file(source, *names):
    """The first of these files that the folder has. None stands for data/dolly."""
    folder = Path(source or ROOT / "data" / "dolly")
    for path in (folder / name for name in names):
        if path.is_file():
            return path
    raise InputError(
        f"{folder / names[0]}: no such file; run python -m data.prepare dolly, or give a folder "
        "that has it with --source"
    )


def make_examples(case, t=0):
    """The rows of a case, with the responses that sampling is forced to generate.

    With a source, the responses are Dolly's, cut at the limit. Otherwise all tokens are random, and
    a response below the limit ends with end-of-text. With lengths, each repeat t draws its own, as
    in training: what is built for a shape is then paid for in every repeat, not in the first alone.
    """
    n, limit, eos_token_id = case["rows"], case["max_new_tokens"], case["vocab"] - 1
    if "source" in case:
        path = find_file(case["source"], "train.jsonl")
        examples = encode_training_rows(read_rows(path, 2 * n), load_tokenizer())[:n]
        if len(examples) < n:
            raise InputError(f"{path}: only {len(examples)} rows fit, not {n}; give a longer file")
        return [replace(e, response=e.response[:limit]) for e in examples]

    rng = np.random.default_rng((10, t))
    lengths = np.array(case.get("lengths") or [(case["request"], limit)])
    examples = []
    for i, (n_request, n_response) in enumerate(rng.choice(lengths, n).tolist()):
        tokens = rng.integers(0, eos_token_id, n_request + n_response).tolist()
        if n_response < limit:
            tokens[-1] = eos_token_id
        examples.append(Example(i, tokens[:n_request], tokens[n_request:]))
    return examples


# ---- the sides -----------------------------------------------------------------------------------


def make_model(case, role):
    return GPT(parse_shape(case[role], case["vocab"], case["dropout"])).init_weights(10)


def make_run(case, device, convert=lambda model: model):
    """The train.Run of a case, as train.py builds it. convert: applied to both models."""
    settings = Settings(
        method="promptkd",
        student=case["student"],
        data="none",
        global_batch_size=case["rows"],
        lr=1e-5,
        epochs=1,
        max_new_tokens=case["max_new_tokens"],
        dtype=case["dtype"],
        **METHODS["promptkd"].option_defaults(),
    )
    teacher = freeze(make_model(case, "teacher").to(device), case["dtype"])
    student = convert(make_model(case, "student").to(device))
    P = teacher.wte.weight[:PROMPT_LENGTH].detach().float().clone().requires_grad_()
    run = train.Run(
        settings=settings,
        total_steps=1000,
        global_batch_size=case["rows"],
        micro_batch_tokens=case.get("micro_batch_tokens", MICRO_BATCH_TOKENS),
        device=device,
        tokenizer=SimpleNamespace(eot_token=case["vocab"] - 1),
        student=student,
        ddp_student=student,
        optimizer=adamw(student.parameters(), settings),
        teacher=convert(teacher),
        P=P,
        prompt_optimizer=adamw([P], settings),
    )
    set_learning_rate(run.optimizer, settings.lr)
    set_learning_rate(run.prompt_optimizer, settings.lr)
    return run


def recording_micro_batches(shapes, n_rows=None):
    """`rows.micro_batches`, which also writes the batches' rows and columns into a list.

    n_rows: the rows of a batch, whatever their lengths; by default the tokens are bounded.
    """

    def make(examples, max_tokens, device, prompt_length=0):
        if n_rows is None:
            batches = micro_batches(examples, max_tokens, device, prompt_length)
        else:
            ordered = sorted(examples, key=lambda e: -len(e.request) - len(e.response))
            starts = range(0, len(ordered), n_rows)
            batches = [make_batch(ordered[i : i + n_rows], device) for i in starts]
        shapes[:] = [list(batch.ids.shape) for batch in batches]
        return batches

    return make


def make_step(name, case, device):
    """One iteration on n of the case's rows, as a function of n and t.

    It returns {"losses": by name, "seconds": by phase and of the whole, "micro_batches": their
    rows and columns}.
    """
    shared, shapes = make_examples(case), []
    run = make_run(case, device, *([to_hf] if name == "transformers" else []))
    make_micro_batches = recording_micro_batches(shapes, case.get("micro_batch_rows"))

    def iteration(examples, t):
        if name == "ours":
            return train.promptkd_step(run, examples, t)
        if name == "ours, gkd":
            return train.gkd_step(run, examples, t)
        if name == "transformers":
            return recipe_step(run, case, examples, t, hf_logits, hf_sample)
        return recipe_step(run, case, examples, t)

    def step(n, t):
        examples = make_examples(case, t)[:n] if "lengths" in case else shared[:n]
        responses = {e.index: e.response for e in examples}
        start = time.perf_counter()
        run.seconds, run.phase_start = {}, start
        forced = force_responses(responses, case["max_new_tokens"], case["vocab"] - 1, device)
        with forced, patch.object(train, "micro_batches", make_micro_batches):
            losses = {name: float(loss) for name, loss in iteration(examples, t).items()}
        seconds = {phase: run.seconds.get(phase, 0.0) for phase in PHASES}
        seconds["whole"] = run.phase_start - start
        return {"losses": losses, "seconds": seconds, "micro_batches": list(shapes)}

    return step


def make_sampling(name, case, device):
    """Sample responses to n of the case's rows in one batch, as a function of n and t."""
    model = make_model(case, "student").to(device).eval()
    if name == "transformers":
        model = to_hf(model)
    examples = make_examples(case)
    eos_token_id, limit = case["vocab"] - 1, case["max_new_tokens"]
    dtype = case["dtype"]

    def generate(examples, t):
        requests = [e.request for e in examples]
        if name == "ours":
            keys = [(10, "rollout", t, e.index) for e in examples]
            sizes = eos_token_id, limit
            return sample_all(model, requests, keys, *sizes, dtype=dtype)[0]
        sampler = hf_sample if name == "transformers" else plain_sample
        forced = token_table([e.response for e in examples], limit, eos_token_id, device)
        return sampler(model, requests, forced, case["request"], eos_token_id)

    def sampling(n, t):
        responses = {e.index: e.response for e in examples[:n]}
        start = time.perf_counter()
        with force_responses(responses, limit, eos_token_id, device), precision(device, dtype):
            result = generate(examples[:n], t)
        seconds = time.perf_counter() - start
        assert result == [*responses.values()], "the responses are not the forced ones"
        return {"seconds": {"whole": seconds}}

    return sampling


def make_evaluation(name, case, device):
    """Sample and score responses to n of Dolly's test rows, as a function of n and t.

    Each response ends where the row's first reference does. This project's side is
    evaluate.evaluate; the other runs batches of 8 until all rows of a batch have finished. Returns
    {"seconds": of the whole, "rouge_l": the mean}.
    """
    model = make_model(case, "student").to(device).eval()
    tokenizer = load_tokenizer()
    rows = read_rows(find_file(case["source"], "test.jsonl", "valid.jsonl"), case["rows"])
    eos_token_id, limit = tokenizer.eot_token, case["max_new_tokens"]
    dtype = case["dtype"]
    responses = {}
    for row in rows:
        reference = tokenizer.encode_ordinary(row.references[0])
        responses[row.index] = [*reference, eos_token_id][:limit]

    def in_batches_of_8(rows):
        texts = []
        for batch in (rows[i : i + 8] for i in range(0, len(rows), 8)):
            requests = [encode_request(row, tokenizer)[0] for row in batch]
            wanted = [responses[row.index] for row in batch]
            forced = token_table(wanted, limit, eos_token_id, device)
            longest = max(len(request) for request in requests)
            with precision(device, dtype):
                sampled = plain_sample(model, requests, forced, longest, eos_token_id)
            texts += [decode_response(response, tokenizer) for response in sampled]
        return rouge_l(texts, [row.references for row in rows])

    def by_evaluate(rows):
        key = (10, "evaluate", "dolly")
        results = evaluate(model, tokenizer, rows, key, max_new_tokens=limit, dtype=dtype)
        return [result["rouge_l"] for result in results]

    def evaluation(n, t):
        start = time.perf_counter()
        with force_responses(responses, limit, eos_token_id, device):
            scores = by_evaluate(rows[:n]) if name == "ours" else in_batches_of_8(rows[:n])
        return {"seconds": {"whole": time.perf_counter() - start}, "rouge_l": fmean(scores)}

    return evaluation


WORK = {"step": make_step, "sampling": make_sampling, "evaluation": make_evaluation}


# ---- one process per side ------------------------------------------------------------------------


def peak_memory(device):
    """Peak memory so far in GB: resident on a CPU, allocated and reserved on a GPU."""
    peaks = {name.split("_")[1]: gb for name, gb in runs.peak_memory(device).items()}
    status = Path("/proc/self/status")
    if "resident" in peaks and status.is_file():
        # On Linux, getrusage's number would start from that of the parent process.
        peaks["resident"] = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e9
    return peaks


def do_job(work, name, case, device):
    """Run one side in this process. Every answer is a line of JSON on standard output.

    The first is the memory before any work. Then each line of standard input, [number of rows, t],
    is answered with the result of that work.
    """
    side = WORK[work](name, case, device)
    print(json.dumps(peak_memory(device)), flush=True)
    for line in sys.stdin:
        answer = side(*json.loads(line))
        print(json.dumps(answer | {"memory": peak_memory(device)}), flush=True)


def job_command(work, name, case, threads, script=__file__):
    """The command line of a side. script: this file, or that of another checkout."""
    job = json.dumps({"work": work, "name": name, "case": case})
    options = ("--job", job, "--threads", str(threads), "--dtype", case["dtype"])
    stock = () if name.startswith("ours") else ("--stock",)
    return sys.executable, str(script), *options, *stock


@contextmanager
def start_processes(commands):
    """Start the sides, {name: command}, and yield their processes by name.

    They end with the context, and are killed where it raises. Their errors are printed then.
    """
    processes, errors = {}, {}
    try:
        for name, command in commands.items():
            errors[name] = tempfile.TemporaryFile("w+")
            # In a session of its own, where Ctrl-C does not reach it
            processes[name] = Popen(
                command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=errors[name],
                text=True,
                start_new_session=True,
                env=ENVIRONMENT,
            )
        yield processes
    except BaseException:
        for process in processes.values():
            process.kill()
        raise
    finally:
        for name, process in processes.items():
            process.communicate()  # closes its standard input and waits
            print_errors(errors[name])


def print_errors(file):
    """Print what a side wrote on standard error, without the lines about the device."""
    with file:
        file.seek(0)
        for line in file:
            if not line.startswith(("device: ", "warning: this PyTorch is built for GPUs")):
                sys.stderr.write(line)


def ask(processes, name, *request):
    """Send a side [number of rows, t], and return its answer. Without a request: its first one."""
    # The process may be dead. Then it does not answer.
    with suppress(BrokenPipeError):
        if request:
            print(json.dumps(request), file=processes[name].stdin, flush=True)
    if answer := processes[name].stdout.readline():
        return json.loads(answer)
    status = processes[name].wait()
    raise InputError(f"{name}: its process failed (exit status {status}); is memory short?")


def take_turns(commands, n_rows, repeats):
    """Run every side `repeats` times. commands, n_rows: the command and number of rows by side.

    Returns the answers, {side: one per repeat}, and the memory before any work, {side: GB by kind}.
    Every other repeat has the opposite order of sides.
    """
    answers = {name: [] for name in n_rows}
    initial_memory = {}
    with start_processes(commands) as processes:
        for name, n in n_rows.items():
            initial_memory[name] = ask(processes, name)
            ask(processes, name, min(2, n), 0)  # the first work of a process is slower
        for t in range(repeats):
            names = list(n_rows) if t % 2 == 0 else list(reversed(n_rows))
            for name in names:
                answers[name].append(ask(processes, name, n_rows[name], t))
    return answers, initial_memory


def run_sides(work, n_rows, case, args):
    """`take_turns` of sides of this checkout. n_rows: the number of the case's rows by side."""
    commands = {name: job_command(work, name, case, args.threads) for name in n_rows}
    return take_turns(commands, n_rows, args.repeats)


def seconds_of(answers, phase="whole"):
    return [answer["seconds"][phase] for answer in answers]


# ---- what is printed -----------------------------------------------------------------------------


def with_range(values, digits=2):
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def case_of_size(size, args):
    case = CASES[size] | {"dtype": args.dtype}
    return case | {"source": args.source} if "source" in case else case


def show_size(size, args, rates):
    """Print the table of one size."""
    case, fraction = case_of_size(size, args), RECIPE_FRACTION.get(size, 1)
    examples = make_examples(case)
    n_tokens = sum(len(e.response) for e in examples)
    n_all = n_tokens + sum(len(e.request) for e in examples)
    print(f"\n{size}: student {case['student']}, teacher {case['teacher']}, {len(examples)} rows")
    print(f"{n_all:,} tokens, {n_tokens:,} of them of responses", flush=True)
    others = ["recipe", "transformers"] if args.hf else ["recipe"]
    names = ["recipe", "ours", "ours, gkd", *others[1:]]
    scale = {name: fraction if name in others else 1 for name in names}
    n_rows = {name: case["rows"] // scale[name] for name in names}
    answers, initial_memory = run_sides("step", n_rows, case, args)

    work = count_work(case, examples, getattr(torch, args.dtype).itemsize)
    bound = bound_seconds(work, rates)
    operations = {phase: sum(n for n, _ in parts) for phase, parts in work.items()}
    operations["whole"] = sum(operations.values())
    header = [""]
    for name in names:
        header += [f"{name}, s", "tokens/s"]
    header += [*(f"{name} / ours" for name in others), "bound, s", "ours / bound", "share of peak"]
    lines = [header]
    for phase in (*PHASES, "whole"):
        seconds = {n: [scale[n] * s for s in seconds_of(answers[n], phase)] for n in names}
        ours = median(seconds["ours"])
        cells = [phase if phase == "sampling" else f"{phase} step"]
        for name in names:
            rate = f"{n_tokens / median(seconds[name]):,.0f}" if any(seconds[name]) else "-"
            first = f"{with_range(seconds[name])}, first {seconds[name][0]:.2f}"
            cells += [first if any(seconds[name]) else "-", rate]
        cells += [f"{median(seconds[name]) / ours:.2f}" for name in others]
        cells += [f"{bound[phase]:.2f}", f"{ours / bound[phase]:.2f}"]
        lines.append([*cells, f"{100 * operations[phase] / ours / rates[0]:.0f}%"])
    print(format_table(lines + memory_lines(answers, initial_memory, others)))
    if "lengths" in case:
        print("Each repeat has rows of other lengths. Tokens and bound are those of the first.")
    if fraction > 1:
        print(f"The recipe's seconds are {fraction} times those of {n_rows['recipe']} rows.")
    if size == "L":
        hours = PAPER_STEPS * ours / 3600
        print(f"The paper's {PAPER_STEPS} steps take {hours:.2f} hours, without validation.")


def memory_lines(answers, initial_memory, others):
    """The lines of peak memory, one per kind, below those of the phases."""
    lines = []
    for kind in initial_memory["ours"]:
        cells = [f"peak {kind}, GB"]
        peaks = {name: of_side[-1]["memory"][kind] for name, of_side in answers.items()}
        for name, peak in peaks.items():
            cells += [f"{peak:.2f} (at start {initial_memory[name][kind]:.2f})", ""]
        cells += [f"{peaks[name] / peaks['ours']:.2f}" for name in others]
        lines.append([*cells, "", "", ""])
    return lines


def median_interval(values):
    """The median of at least MIN_PAIRS values, and the ends of its 95 % interval.

    The interval is made of order statistics, so it assumes nothing of the distribution: the number
    of values below the true median is binomial, with probability 1/2.
    """
    n, ordered = len(values), sorted(values)
    below, k = 1, 0  # `below` of 2^n outcomes have at most k values below the median
    while 2 * below <= 0.05 * 2**n:
        k += 1
        below += math.comb(n, k)
    return median(ordered), ordered[k - 1], ordered[n - k]


def show_pairs(size, args):
    """Time a step of this checkout and of the one in args.old in turn; print the ratios."""
    script = Path(args.old) / "tests" / "bench.py"
    if not script.is_file():
        raise InputError(f"--old {args.old}: has no tests/bench.py; give another checkout")
    case = case_of_size(size, args)
    old_case = case | {"max_new": case["max_new_tokens"]}  # its name in older checkouts
    commands = {
        "new": job_command("step", "ours", case, args.threads),
        "old": job_command("step", "ours", old_case, args.threads, script),
    }
    answers, _ = take_turns(commands, dict.fromkeys(commands, case["rows"]), args.pairs)
    lines = [["", "new, s", "old, s", "new / old", "95 % interval"]]
    for phase in (*PHASES, "whole"):
        new, old = (seconds_of(answers[name], phase) for name in commands)
        ratio, low, high = median_interval([a / b for a, b in zip(new, old)])
        interval = f"{low:.3f} to {high:.3f}"
        lines.append([phase, f"{median(new):.2f}", f"{median(old):.2f}", f"{ratio:.3f}", interval])
    print(f"\n{size}: {args.pairs} pairs of steps of this checkout and of {args.old}; medians")
    print(format_table(lines))


def show_micro_batches(size, args):
    """Time a step with micro-batches of 8 rows and of at most so many tokens in turn.

    Print the seconds, and the median and range of the ratios to 8 rows.
    """
    case = case_of_size(size, args)
    values = {"8 rows": {"micro_batch_rows": 8}}
    values |= {f"{n:,} tokens": {"micro_batch_tokens": n} for n in args.micro_batches}
    commands = {
        name: job_command("step", "ours", case | chosen, args.threads)
        for name, chosen in values.items()
    }
    answers, _ = take_turns(commands, dict.fromkeys(commands, case["rows"]), args.repeats)
    [kind] = [kind for kind in answers["8 rows"][-1]["memory"] if kind != "reserved"]
    header = ["micro-batches of", "number", "positions", "prompt, s", "student, s", "whole, s"]
    lines = [[*header, "8 rows / this", f"peak {kind}, GB"]]
    whole_of_8 = seconds_of(answers["8 rows"])
    for name, of_side in answers.items():
        shapes = of_side[-1]["micro_batches"]
        n_positions = sum(n_rows * (PROMPT_LENGTH + n_columns) for n_rows, n_columns in shapes)
        cells = [name, f"{len(shapes)}", f"{n_positions:,}"]
        cells += [with_range(seconds_of(of_side, phase)) for phase in (*PHASES[1:], "whole")]
        cells.append(with_range([a / b for a, b in zip(whole_of_8, seconds_of(of_side))]))
        lines.append([*cells, f"{of_side[-1]['memory'][kind]:.2f}"])
    print(f"\n{size}: student {case['student']}, teacher {case['teacher']}, {case['rows']} rows")
    print(format_table(lines))


def show_sampling(args, rates, case=CASES["M"] | {"request": 64, "max_new_tokens": 64}):
    """Print tokens/s of sampling; every side samples all rows in one batch."""
    names = ["plain", "ours", *(["transformers"] if args.hf else [])]
    lines = [["rows", *names, "ours / best other", "at the bound"]]
    for n in (1, 8, 32):
        case = case | {"rows": n, "dtype": args.dtype}
        answers, _ = run_sides("sampling", dict.fromkeys(names, n), case, args)
        n_tokens = n * case["max_new_tokens"]
        rates_of = {name: [n_tokens / s for s in seconds_of(answers[name])] for name in names}
        best_other = max(median(rates_of[name]) for name in names if name != "ours")
        work = count_work(case, make_examples(case), getattr(torch, args.dtype).itemsize)
        cells = [f"{n:,}", *(with_range(values, 0) for values in rates_of.values())]
        cells.append(f"{median(rates_of['ours']) / best_other:.2f}")
        lines.append([*cells, f"{n_tokens / bound_seconds(work, rates)['sampling']:,.0f}"])
    lengths = f"{case['request']} + {case['max_new_tokens']} tokens"
    print(f"\nsampling, tokens/s: {case['student']}, {lengths}")
    print(format_table(lines))


def show_evaluation(args):
    """Print the time to evaluate Dolly's test rows with the student of S."""
    n = len(read_rows(find_file(args.source, "test.jsonl", "valid.jsonl"), args.rows))
    case = CASES["S"] | {"rows": n, "source": args.source, "dtype": args.dtype}
    case["max_new_tokens"] = MAX_NEW_TOKENS
    answers, _ = run_sides("evaluation", {"batches of 8": n, "ours": n}, case, args)
    print(f"\nevaluation of {n} Dolly rows, {case['student']}, sampling and scoring")
    lines = [["", "seconds", "ROUGE-L"]]
    for name, of_side in answers.items():
        lines.append([name, with_range(seconds_of(of_side)), f"{of_side[-1]['rouge_l']:.2f}"])
    print(format_table(lines))
    ratio = median(seconds_of(answers["batches of 8"])) / median(seconds_of(answers["ours"]))
    print(f"batches of 8 / ours: {ratio:.2f}")


def case_at(case, axis, value):
    """A case at another point of an axis. Half of a row's tokens are its request."""
    if axis == "tokens per row":
        return case | {"request": value // 2, "max_new_tokens": value // 2}
    return case | {axis: value}


def show_scaling(args):
    """Measure steps along the axes; print them, write them as JSON, and plot them."""
    base = CASES["S"] | {"dtype": args.dtype}
    points = []

    @functools.cache  # the base case is on every axis
    def measure(command, n):
        answers, initial_memory = take_turns({"side": command}, {"side": n}, 2)
        last = answers["side"][-1]
        seconds, memory = last["seconds"]["whole"], last["memory"]
        return {"seconds": seconds, "memory": memory, "before": initial_memory["side"]}

    for axis, name in [(axis, name) for axis in AXES for name in ("ours", "recipe")]:
        seconds_per_unit = 0.0  # at the point before on this axis
        for value in AXES[axis]:
            if name == "recipe" and seconds_per_unit * value > MAX_SECONDS:
                print(f"recipe at {value:,} {axis}: left out, would take over {MAX_SECONDS} s")
                break
            case = case_at(base, axis, value)
            point = measure(job_command("step", name, case, args.threads), case["rows"])
            points.append({"axis": axis, "value": value, "side": name, **point})
            seconds_per_unit = point["seconds"] / value
            memory = ", ".join(f"{gb:.2f} GB {kind}" for kind, gb in point["memory"].items())
            print(f"{name} at {value:,} {axis}: {point['seconds']:.2f} s, {memory}", flush=True)
    path = Path(args.out).with_suffix(".json")
    content = {"base": base, "threads": args.threads, "points": points}
    write_atomic(path, json.dumps(content, indent=1) + "\n")
    print(f"{path}; {plot_scaling(points, base, args.out)}")


def plot_scaling(points, base, path):
    """Plot seconds above memory, one column per axis. Returns the path, or why there is no plot."""

    def draw(figure):
        figure.set_size_inches(4 * len(AXES), 6)
        panels = figure.subplots(2, len(AXES), sharey="row")
        kind = next(iter(points[0]["memory"]))
        labels = {"vocab": "tokens in the vocabulary", "rows": "rows in the batch"}
        for (top, bottom), axis in zip(panels.T, AXES):
            for name, style in (("recipe", "s--"), ("ours", "o-")):
                own = [point for point in points if point["axis"] == axis and point["side"] == name]
                x = [point["value"] for point in own]
                top.plot(x, [point["seconds"] for point in own], style, label=name)
                bottom.plot(x, [point["memory"][kind] for point in own], style, label=name)
            bottom.set_xlabel(labels.get(axis, axis))
            ticks = [f"{value / 1000:.0f}k" if value >= 1000 else value for value in AXES[axis]]
            for panel in (top, bottom):
                panel.set_xticks(AXES[axis], ticks)
                panel.grid(alpha=0.3)
        # Last, because it fixes the upper limit too, which the panels of a row share
        for row in panels:
            row[0].set_ylim(bottom=0)
        panels[0, 0].set_ylabel("seconds per step")
        panels[1, 0].set_ylabel(f"peak memory, {kind}, GB")
        panels[0, 0].legend()
        models = f"student {base['student']}, teacher {base['teacher']}"
        sizes = f"{base['rows']} rows of {base['request'] + base['max_new_tokens']} tokens"
        figure.suptitle(
            f"One step of PromptKD: {models}; else {sizes}, {base['vocab']:,} in vocabulary"
        )

    return save_plot(path, draw)


# ---- the command line ----------------------------------------------------------------------------


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="Time and memory of an iteration of PromptKD, against the released recipe.",
    )
    add, count = parser.add_argument, number_in_range(int, 1, 100_000)
    add("--size", nargs="+", choices=CASES, default=[], help="sizes of a step; L needs a GPU")
    add("--sampling", action="store_true", help="tokens/s of sampling at GPT-2's base shape")
    add("--evaluation", action="store_true", help="time to evaluate Dolly's test rows")
    add("--scaling", action="store_true", help="time and memory along three axes, with a plot")
    add("--repeats", type=count, default=3, help="runs of each side (default 3)")
    add("--threads", type=count, default=os.cpu_count(), help="CPU threads (default: all cores)")
    add("--source", metavar="DIR", help="folder with train.jsonl, test.jsonl (data/dolly)")
    add("--rows", type=count, default=500, help="rows of --evaluation (default 500)")
    add("--hf", action="store_true", help="also run the recipe on transformers' GPT-2")
    add("--out", default="docs/scaling.png", help="plot of --scaling, with JSON next to it")
    add("--old", metavar="DIR", help="another checkout, timed against this one by --pairs")
    help = "time steps with micro-batches of at most so many tokens, against 8 rows"
    add("--micro-batches", type=count, nargs="+", metavar="TOKENS", help=help)
    add("--pairs", type=number_in_range(int, MIN_PAIRS, 1000), help="pairs of steps for --old")
    # One side in this process, and whether it keeps PyTorch's defaults: see job_command
    add("--job", help=argparse.SUPPRESS)
    add("--stock", action="store_true", help=argparse.SUPPRESS)
    add_precision_option(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device, args.dtype = dist.init_process(args.dtype)
    if args.job:
        do_job(**json.loads(args.job), device=device)
        return
    if not (args.size or args.sampling or args.evaluation or args.scaling):
        options = "--size S M D, --sampling, --evaluation or --scaling"
        raise InputError(f"nothing to measure; give {options}")
    if (args.pairs is None) != (args.old is None) or (args.old and not args.size):
        raise InputError("--pairs N, --old DIR and --size S go together; give all three")
    if args.micro_batches and (args.old or not args.size):
        raise InputError("--micro-batches goes with --size, and without --old; give only these")
    if args.hf and importlib.util.find_spec("transformers") is None:
        raise InputError("--hf needs transformers; run pip install transformers")
    if "L" in args.size and device.type != "cuda":
        raise InputError("--size L needs a GPU; leave it out")
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"cpu with {os.cpu_count()} cores"
    versions = f"{args.threads} threads, torch {torch.__version__}, {args.dtype}"
    print(f"{name}, {versions}, medians of {args.pairs or args.repeats} (least-most)")
    if args.old:
        for size in args.size:
            show_pairs(size, args)
        return
    if args.micro_batches:
        for size in args.size:
            show_micro_batches(size, args)
        return
    if args.size or args.sampling:
        rates = machine_rates(device, getattr(torch, args.dtype))
        product, copy = (f"{rate / 1e9:,.0f}" for rate in rates)
        print(f"measured: a large matrix product {product} GFLOP/s, a large copy {copy} GB/s")
    for size in args.size:
        show_size(size, args, rates)
    if args.sampling:
        show_sampling(args, rates)
    if args.evaluation:
        show_evaluation(args)
    if args.scaling:
        show_scaling(args)


if __name__ == "__main__":
    run_command_line(main)
