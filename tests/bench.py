"""How long an iteration of PromptKD takes and how much memory, against a plain re-statement of the released recipe and against the floor
that the machine sets. Run by hand:

python tests/bench.py --size S M D          a table a size: sampling, prompt step, student step, peak memory (L as well, on a GPU)
python tests/bench.py --sampling            tokens/s of sampling alone, at GPT-2's base shape
python tests/bench.py --evaluation          the time to evaluate Dolly's test rows
python tests/bench.py --scaling             time and memory of a step against batch, length and vocabulary, as a picture

All sides have the same weights and rows, and do the whole work of sampling; only its outcome is forced, so that all of them say the
same. Each side is a process of its own, with this project's settings where it is ours and with PyTorch's own where it is not. They take
turns: a side waits while another works.
"""

import argparse
import importlib.util
import json
import os
import re
import resource
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from subprocess import PIPE, Popen
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data.threads

# A process of another side keeps the defaults of libgomp (ours are handed down) and of glibc: its
# thresholds adapt only while nobody sets them. The imports below would set both.
if "--stock" in sys.argv:
    os.environ["GOMP_SPINCOUNT"] = "300000"
    data.threads.configure_threads = lambda: None

import numpy as np
import torch

import sample
import train
from data import dist
from data.cli import InputError, run_command_line, write_atomic
from data.report import format_table, pyplot
from data.rows import Example, encode_request, encode_training_rows, pad, read_rows
from data.tokenizer import load_tokenizer
from evaluate import evaluate, rouge_l
from model import GPT, TRANSPOSED, KVCache, precision
from prompt import freeze, teacher_hidden

BASE, MEDIUM, XL = "12x768x12", "24x1024x16", "48x1600x25"
# 64 rows of Dolly, tokens of request and response, the latter cut at 256. Drawn so that means and quantiles are those of all rows
# (71.3 and 68.9 tokens on average), they stand for Dolly where it is not at hand.
DOLLY_LENGTHS = (
    (37, 6),
    (43, 83),
    (49, 38),
    (41, 15),
    (48, 13),
    (178, 36),
    (89, 18),
    (169, 10),
    (40, 7),
    (177, 10),
    (86, 46),
    (42, 90),
    (34, 79),
    (44, 29),
    (41, 122),
    (37, 56),
    (56, 178),
    (48, 99),
    (50, 6),
    (42, 20),
    (40, 34),
    (44, 53),
    (39, 12),
    (244, 43),
    (167, 2),
    (67, 32),
    (111, 176),
    (40, 256),
    (41, 256),
    (45, 12),
    (45, 33),
    (46, 96),
    (62, 106),
    (38, 29),
    (174, 60),
    (192, 126),
    (55, 147),
    (40, 54),
    (46, 55),
    (36, 97),
    (40, 94),
    (35, 43),
    (36, 256),
    (37, 10),
    (45, 256),
    (38, 11),
    (36, 128),
    (217, 10),
    (41, 30),
    (35, 66),
    (222, 115),
    (39, 85),
    (39, 8),
    (36, 66),
    (66, 27),
    (59, 29),
    (38, 74),
    (53, 33),
    (45, 253),
    (136, 90),
    (38, 9),
    (126, 4),
    (118, 70),
    (40, 51),
)

# request and max_new_tokens are the limits in tokens. Rows are as long as that; with `lengths` as these say, in turn; with a source they are Dolly's.
SMALL = {
    "student": "4x128x4",
    "teacher": "6x256x8",
    "rows": 8,
    "request": 64,
    "max_new_tokens": 64,
    "vocab": 50257,
    "dropout": 0.1,
    "dtype": "float32",
}
CASES = {
    "XS": SMALL
    | {
        "student": "1x32x2",
        "teacher": "2x48x3",
        "rows": 4,
        "request": 12,
        "max_new_tokens": 12,
        "vocab": 500,
    },  # for the tests
    "S": SMALL,
    "M": SMALL
    | {"student": BASE, "teacher": MEDIUM, "rows": 4, "request": 48, "max_new_tokens": 48},
    "D": SMALL | {"rows": 32, "request": 256, "max_new_tokens": 256, "source": None},
    "L": SMALL
    | {
        "student": BASE,
        "teacher": XL,
        "rows": 256,
        "request": 256,
        "max_new_tokens": 256,
        "lengths": DOLLY_LENGTHS,
    },
}
RECIPE_SHARE = {
    "L": 16
}  # the recipe is timed on this fraction of the rows, and the seconds multiplied: it would take minutes
PAPER_STEPS = 20 * 44  # of PromptKD, GPT-2 base: 20 epochs of 44 windows of 256 rows
PHASES = ("sampling", "prompt", "student")
PROMPT_LENGTH = 7
AXES = {
    "rows": (8, 16, 32, 64),
    "tokens a row": (128, 256, 384, 512),
    "vocab": (5_000, 10_000, 25_000, 50_257),
}  # of --scaling, around S
TOO_LONG = 60  # seconds: --scaling leaves a step of the recipe out that would take longer


# ---- rows whose responses are given -------------------------------------------------------------------------------------------


def find_file(source, *names):
    """The first of these files that the folder has, data/dolly where source is None."""
    folder = Path(source or ROOT / "data" / "dolly")
    for path in (folder / name for name in names):
        if path.is_file():
            return path
    raise InputError(
        f"{folder / names[0]}: no such file; run python -m data.prepare dolly, or name a folder that has it with --source"
    )


def make_examples(case):
    """The rows of a case. `response` is what sampling will be made to give: random tokens up to the limit without end-of-text; of given
    lengths, with end-of-text below the limit; or Dolly's reference, cut at the limit."""
    n = case["rows"]
    if "lengths" in case:
        rng, examples, max_new_tokens, end = (
            np.random.default_rng(10),
            [],
            case["max_new_tokens"],
            case["vocab"] - 1,
        )
        for i in range(n):
            request, response = case["lengths"][i % len(case["lengths"])]
            tokens = rng.integers(0, end, request + response).tolist()
            examples.append(
                Example(
                    i,
                    tokens[:request],
                    tokens[request:] if response == max_new_tokens else [*tokens[request:-1], end],
                )
            )
        return examples
    if "source" not in case:
        tokens = (
            np.random.default_rng(10)
            .integers(0, case["vocab"] - 1, (n, case["request"] + case["max_new_tokens"]))
            .tolist()
        )
        return [
            Example(i, row[: case["request"]], row[case["request"] :])
            for i, row in enumerate(tokens)
        ]
    path = find_file(case["source"], "train.jsonl")
    examples = encode_training_rows(read_rows(path, 2 * n), load_tokenizer())[:n]
    if len(examples) < n:
        raise InputError(
            f"{path}: has {len(examples)} rows that fit and {n} are wanted; give a longer file"
        )
    return [replace(e, response=e.response[: case["max_new_tokens"]]) for e in examples]


def token_table(responses, max_new_tokens, end, device):
    """Responses as one tensor (B, max_new_tokens): what each row says at each step, end-of-text behind its end."""
    return pad(
        [[*response, *[end] * (max_new_tokens - len(response))] for response in responses], device
    )[0]


@contextmanager
def forced(responses, max_new_tokens, end, device):
    """Sampling (sample.sample and all that calls it) does its work in full, but rows say these responses, {row index: tokens}.

    A row's uniform numbers are replaced by ones that are unique to row and step, so that they tell which token is to be said.
    """
    said, slots = (
        token_table(responses.values(), max_new_tokens, end, device).flatten(),
        {index: i for i, index in enumerate(responses)},
    )
    sample_next_token = sample.sample_next_token

    def uniforms(n_tokens, *key):
        return ((slots[key[-1]] * max_new_tokens + np.arange(n_tokens) + 0.5) / len(said)).astype(
            np.float32
        )

    def forced_draw(logits, u, *rest, **how):
        _, *others = sample_next_token(logits, u, *rest, **how)
        return said[(u * len(said)).long()], *others

    with (
        patch.object(sample, "row_uniforms", uniforms),
        patch.object(sample, "sample_next_token", forced_draw),
    ):
        yield


def until_end(rows, end):
    """Token lists, each cut behind its first end-of-text."""
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


# ---- the released recipe, re-stated: two rows at a time, padded to the limits, logits everywhere ----------------------------------


@torch.no_grad()
def plain_sample(model, requests, said, limit, end):
    """Responses to requests padded to `limit`: torch.multinomial at each step, until the last row has ended; none is dropped before.

    said: (B, max_new_tokens), what takes the place of what was drawn.
    """
    B, max_new_tokens = said.shape
    ids, lengths = pad(requests, said.device)
    ids = torch.nn.functional.pad(ids, (0, limit - ids.shape[1]))  # (B, limit)
    dtype = torch.bfloat16 if torch.is_autocast_enabled(said.device.type) else torch.float32
    cache = KVCache(model.config, B, limit + max_new_tokens, said.device, dtype)
    hidden = model(ids, cache=cache)[torch.arange(B, device=said.device), lengths - 1]  # (B, C)
    cache.set_lengths(lengths)
    ended = torch.zeros(B, dtype=torch.bool, device=said.device)
    for t in range(max_new_tokens):
        torch.multinomial(model.logits(hidden).float().softmax(-1), 1)
        ended |= said[:, t] == end
        if t + 1 == max_new_tokens or ended.all():
            break
        hidden = model(said[:, t, None], cache=cache)[:, 0]
    return until_end(said[:, : t + 1].tolist(), end)


def plain_logits(model, ids, real, P=None):
    """Logits (B, T, V) at every position of ids (B, T). Padding (not `real`, (B, T)) is on the right: causal attention doesn't see it."""
    return torch.nn.functional.linear(
        teacher_hidden(model, ids, P), model.wte.weight
    )  # on a GPU in bfloat16


def plain_kl(first, second, is_response):
    """KL(first || second) everywhere, in float32: (B, T, V), (B, T, V); its mean where is_response (B, T)."""
    log_first, log_second = first.float().log_softmax(-1), second.float().log_softmax(-1)
    kl = (log_first.exp() * (log_first - log_second)).sum(-1)  # (B, T)
    return (kl * is_response).sum() / is_response.sum()


def recipe_step(run, case, examples, t, logits=plain_logits, sampler=plain_sample):
    """An iteration as released: gradients are accumulated over micro-batches of two rows, each sampled, scored for the prompt and scored
    for the student before the next. Prompt and student are updated at the last one, so the others distil from the prompt of before.

    logits and sampler: those of this project's GPT-2, or Hugging Face's. Returns the mean losses of the micro-batches.
    """
    q, p, end, lam = run.student, run.teacher, case["vocab"] - 1, 1 - t / run.total_steps
    pairs = [examples[i : i + 2] for i in range(0, len(examples), 2)]
    losses = {"prompt_loss": 0.0, "loss": 0.0}
    for pair in pairs:
        with precision(run.device, run.settings.dtype):
            q.eval()
            said = token_table([e.response for e in pair], case["max_new_tokens"], end, run.device)
            responses = sampler(q, [e.request for e in pair], said, case["request"], end)
            lap(run, "sampling")
            ids, real, is_response = padded(
                [replace(e, response=y) for e, y in zip(pair, responses)], case, run.device
            )

            L_P = recipe_prompt_loss(q, p, run.P, ids, real, is_response, lam, logits) / len(pairs)
            L_P.backward()
            if pair is pairs[-1]:
                train.clip_and_step(run.prompt_optimizer)
            lap(run, "prompt")

            with torch.no_grad():
                target = logits(p, ids, real, run.P)
            L_theta = plain_kl(logits(q.train(), ids, real), target, is_response) / len(pairs)
            L_theta.backward()
            if pair is pairs[-1]:
                train.clip_and_step(run.optimizer)
            losses = {
                "prompt_loss": losses["prompt_loss"] + L_P.item(),
                "loss": losses["loss"] + L_theta.item(),
            }
            del target, L_P, L_theta
            lap(run, "student")
    return losses


def recipe_prompt_loss(q, p, P, ids, real, is_response, lam, logits):
    """Equations 1 to 3 with logits at every position."""
    with torch.no_grad():
        q_logits, p_logits = logits(q, ids, real), logits(p, ids, real)
    pP_logits = logits(p, ids, real, P)
    return plain_kl(pP_logits, q_logits, is_response) + lam * plain_kl(
        pP_logits, p_logits, is_response
    )


def padded(examples, case, device):
    """Rows of request + response, right-padded to both limits: tokens, which of them are real, and which positions predict a response
    token; all (B, request + max_new_tokens)."""
    T = case["request"] + case["max_new_tokens"]
    ids, lengths = pad(
        [
            [*e.request, *e.response, *[0] * (T - len(e.request) - len(e.response))]
            for e in examples
        ],
        device,
    )
    starts = torch.tensor([[len(e.request) - 1] for e in examples], device=device)
    lengths = torch.tensor([[len(e.request) + len(e.response)] for e in examples], device=device)
    position = torch.arange(T, device=device)
    return ids, (position < lengths).long(), (position >= starts) & (position < lengths - 1)


def lap(run, name):
    """Seconds since the last lap are added to this phase's."""
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    now = time.perf_counter()
    run.clock[name] = run.clock.get(name, 0.0) + now - run.clock.pop("since")
    run.clock["since"] = now


# ---- the same on Hugging Face's GPT-2 -----------------------------------------------------------------------------------------------


def to_hf(model):
    """transformers' GPT-2 with the weights of ours."""
    from transformers import GPT2Config, GPT2LMHeadModel

    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    sizes, rates = (
        {name: getattr(model.config, name) for name in names},
        dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.config.dropout),
    )
    hf = GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=None, eos_token_id=None))
    hf.transformer.load_state_dict(
        {name: w.T if name.endswith(TRANSPOSED) else w for name, w in model.state_dict().items()}
    )
    return (
        hf.to(model.h[0].attn.c_attn.weight)
        .train(model.training)
        .requires_grad_(model.wte.weight.requires_grad)
    )


def hf_logits(model, ids, real, P=None):
    """plain_logits of transformers' GPT-2. The prompt goes in as embeddings, as peft's prompt tuning does it."""
    x = model.transformer.wte(ids)
    if P is not None:
        x = torch.cat([P.to(x.dtype).expand(len(ids), -1, -1), x], dim=1)
        real = torch.nn.functional.pad(real, (len(P), 0), value=1)
    logits = model(inputs_embeds=x, attention_mask=real, use_cache=False).logits
    return logits if P is None else logits[:, len(P) :]


@torch.no_grad()
def hf_sample(model, requests, said, limit, end):
    """plain_sample by transformers' `generate`, which wants the padding on the left."""
    ids = torch.tensor([[end] * (limit - len(r)) + r for r in requests], device=said.device)
    real = torch.tensor(
        [[0] * (limit - len(r)) + [1] * len(r) for r in requests], device=said.device
    )

    def force(so_far, scores):  # all but one impossible, and drawn from like any others
        token = said[:, so_far.shape[1] - limit, None]
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    how = {
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": said.shape[1],
        "eos_token_id": end,
        "pad_token_id": end,
    }
    return until_end(
        model.generate(ids, attention_mask=real, logits_processor=[force], **how)[
            :, limit:
        ].tolist(),
        end,
    )


# ---- the sides, and their time and memory -------------------------------------------------------------------------------------------


def make_model(case, name):
    return GPT(train.parse_shape(case[name], case["vocab"], case["dropout"])).initialise(10)


def make_run(case, device, teacher, convert=lambda model: model):
    """train.Run of a case, as train.build makes it for a user's run, with a student of its own; both models converted."""
    s = train.Settings(
        "promptkd",
        case["student"],
        "none",
        case["rows"],
        lr=1e-5,
        epochs=1,
        max_new_tokens=case["max_new_tokens"],
        dtype=case["dtype"],
        **train.PROMPT,
    )
    student = convert(make_model(case, "student").to(device))
    P = teacher.wte.weight[:PROMPT_LENGTH].detach().float().clone().requires_grad_()
    run = train.Run(
        settings=s,
        total_steps=1000,
        global_batch_size=case["rows"],
        micro_batch_size=8,
        device=device,
        tokenizer=SimpleNamespace(eot_token=case["vocab"] - 1),
        student=student,
        ddp_student=student,
        optimizer=train.adamw([*student.parameters()], s),
        teacher=convert(teacher),
        P=P,
        prompt_optimizer=train.adamw([P], s),
    )
    train.set_learning_rate(run.optimizer, s.lr)
    train.set_learning_rate(run.prompt_optimizer, s.lr)
    return run


def make_step(name, case, device):
    """An iteration on n of the case's rows, as a function of n and t: {"losses": by kind, "seconds": of each phase and of the whole}."""
    teacher, convert = (
        freeze(make_model(case, "teacher").to(device), case["dtype"]),
        [to_hf] if name == "transformers" else [],
    )
    run, examples = make_run(case, device, teacher, *convert), make_examples(case)
    steps = {
        "recipe": lambda examples, t: recipe_step(run, case, examples, t),
        "ours": lambda examples, t: train.promptkd_step(run, examples, t),
        "ours, gkd": lambda examples, t: train.gkd_step(run, examples, t),
        "transformers": lambda examples, t: recipe_step(
            run, case, examples, t, hf_logits, hf_sample
        ),
    }

    def step(n, t):
        begin = time.perf_counter()
        run.clock = {"since": begin}
        with forced(
            {e.index: e.response for e in examples[:n]},
            case["max_new_tokens"],
            case["vocab"] - 1,
            device,
        ):
            losses = {kind: float(loss) for kind, loss in steps[name](examples[:n], t).items()}
        return {
            "losses": losses,
            "seconds": {phase: run.clock.get(phase, 0.0) for phase in PHASES}
            | {"whole": run.clock["since"] - begin},
        }

    return step


def make_sampling(name, case, device):
    """Sampling the responses to n of the case's rows in one batch, as a function of n and t: {"seconds": of the whole}."""
    model, examples = make_model(case, "student").to(device).eval(), make_examples(case)
    model, dtype = to_hf(model) if name == "transformers" else model, case["dtype"]
    end, limit, max_new_tokens = case["vocab"] - 1, case["request"], case["max_new_tokens"]

    def sampling(n, t):
        requests, responses = (
            [e.request for e in examples[:n]],
            {e.index: e.response for e in examples[:n]},
        )
        said, keys = (
            token_table(responses.values(), max_new_tokens, end, device),
            [(10, "rollout", t, index) for index in responses],
        )
        begin = time.perf_counter()
        with forced(responses, max_new_tokens, end, device), precision(device, dtype):
            if name == "ours":
                result = sample.sample_all(model, requests, keys, end, max_new_tokens, dtype=dtype)[
                    0
                ]
            else:
                result = (hf_sample if name == "transformers" else plain_sample)(
                    model, requests, said, limit, end
                )
        assert result == [*responses.values()], "something else was said"
        return {"seconds": {"whole": time.perf_counter() - begin}}

    return sampling


def make_evaluation(name, case, device):
    """Sampling and scoring the responses to n of Dolly's test rows, which end where the first reference does, by evaluate.evaluate, or in
    batches of 8 that run until all of a batch have ended; as a function of n and t: {"seconds": of the whole, "rouge_l": the mean}."""
    model, tokenizer, max_new_tokens = (
        make_model(case, "student").to(device).eval(),
        load_tokenizer(),
        case["max_new_tokens"],
    )
    rows, end = (
        read_rows(find_file(case["source"], "test.jsonl", "valid.jsonl"), case["rows"]),
        tokenizer.eot_token,
    )
    key, dtype = (10, "evaluate", "dolly"), case["dtype"]
    responses = {
        row.index: [*tokenizer.encode_ordinary(row.references[0]), end][:max_new_tokens]
        for row in rows
    }

    def in_batches_of_8(rows):
        results = []
        for batch in (rows[i : i + 8] for i in range(0, len(rows), 8)):
            requests = [encode_request(row, tokenizer)[0] for row in batch]
            said = token_table([responses[row.index] for row in batch], max_new_tokens, end, device)
            with precision(device, dtype):
                results += plain_sample(
                    model, requests, said, max(len(request) for request in requests), end
                )
        return rouge_l(
            [sample.decode_response(response, tokenizer) for response in results],
            [row.references for row in rows],
        )

    def evaluation(n, t):
        begin = time.perf_counter()
        with forced(responses, max_new_tokens, end, device):
            if name == "ours":
                scores = [
                    result["rouge_l"]
                    for result in evaluate(
                        model, tokenizer, rows[:n], key, max_new_tokens=max_new_tokens, dtype=dtype
                    )
                ]
            else:
                scores = in_batches_of_8(rows[:n])
        return {"seconds": {"whole": time.perf_counter() - begin}, "rouge_l": fmean(scores)}

    return evaluation


WORK = {"step": make_step, "sampling": make_sampling, "evaluation": make_evaluation}


def peak_memory(device):
    """Peak memory so far, in GB: resident on a CPU; on a GPU allocated and reserved."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.max_memory_allocated() / 1e9,
            "reserved": torch.cuda.max_memory_reserved() / 1e9,
        }
    status = Path("/proc/self/status")
    if (
        status.is_file()
    ):  # getrusage's number would start from that of the process that started this one
        return {"resident": int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e9}
    return {
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    }


def do_job(work, name, case, device):
    """One side in this process. Each answer is a line of JSON: memory before any work; then what a piece of it gave, for each line of
    stdin, [number of rows, t]."""
    side = WORK[work](name, case, device)
    print(json.dumps(peak_memory(device)), flush=True)
    for n, t in map(json.loads, sys.stdin):
        print(json.dumps(side(n, t) | {"memory": peak_memory(device)}), flush=True)


@contextmanager
def processes(work, names, case, threads):
    """A process for each side, {side: process}; each waits for what `ask` asks of it. They end with the context, killed on an error."""
    sides = {}
    try:
        for name in names:
            job, stock = (
                json.dumps({"work": work, "name": name, "case": case}),
                [] if "ours" in name else ["--stock"],
            )
            words = [
                sys.executable,
                __file__,
                "--job",
                job,
                "--threads",
                str(threads),
                "--dtype",
                case["dtype"],
                *stock,
            ]
            sides[name] = Popen(
                words, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True
            )  # Ctrl-C doesn't reach it
        yield sides
    except BaseException:
        for process in sides.values():
            process.kill()
        raise
    finally:
        for process in sides.values():
            process.communicate()  # closes its stdin, and waits


def ask(sides, name, *step):
    """The next answer of a side's process: after its start without a step, then to a step, number of rows and t."""
    with suppress(BrokenPipeError):  # then it is dead, and doesn't answer
        if step:
            print(json.dumps(step), file=sides[name].stdin, flush=True)
    if answer := sides[name].stdout.readline():
        return json.loads(answer)
    raise InputError(
        f"{name}: a step in a process of its own failed (exit status {sides[name].wait()}); most likely memory did not suffice"
    )


def take_turns(work, part, case, threads, repeats):
    """What the sides answer, {side: one answer a repeat}, and their memory before any work, {side: GB by kind}.

    part: {side: how many of the case's rows it works on}.
    """
    answers, before = {name: [] for name in part}, {}
    with processes(work, part, case, threads) as sides:
        for name, n in part.items():
            before[name] = ask(sides, name)
            ask(sides, name, min(2, n), 0)  # the first work of a process is slower
        for t in range(repeats):
            for name, n in part.items():
                answers[name].append(ask(sides, name, n, t))
    return answers, before


def seconds_of(answers, phase="whole"):
    return [answer["seconds"][phase] for answer in answers]


# ---- the floor ------------------------------------------------------------------------------------------------------------------------


def machine_rates(device, dtype):
    """Operations a second of a large matrix product in a dtype, and bytes a second of a large copy, read and written; the best of five."""
    n = 8192 if device.type == "cuda" else 2048
    a, x = torch.randn(n, n, device=device, dtype=dtype), torch.zeros(1 << 26, device=device)
    y = torch.empty_like(x)

    def best(work):
        seconds = []
        for _ in range(6):
            begin = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return min(seconds[1:])

    return 2 * n**3 / best(lambda: a @ a), 2 * x.nbytes / best(lambda: y.copy_(x))


def count_work(case, examples, width=4):
    """The least work of each phase of an iteration, whatever the code does: {phase: [(operations, bytes) of each part]}; parts can't overlap.

    A forward of a model of n layers, width C, over rows of T tokens (the last token of a row is predicted, not read):
        body   2 · 12 n C² T  in matrices,  2 n C T (T + 1)  in causal attention, summed over rows
        head   2 · C V  a token that is predicted
    backward to activations alone as much again, to weights too twice as much. The prompt makes the teacher's rows P longer. Each of these
    reads all weights once. width: bytes of a weight as it is multiplied.
        sampling   the student's forward of the requests, which predicts the first token; then the rest, where each of the max(response) - 1
                   steps reads all weights, and every row's keys and values so far
        prompt     1 forward of the student, 1 of the bare teacher, forward and backward to activations of the prompted one
        student    1 forward of the prompted teacher, forward and full backward of the student; then AdamW, 4 numbers of a weight read and 3 written
    """
    V, requests = case["vocab"], [len(e.request) for e in examples]
    n_tokens, whole = (
        sum(len(e.response) for e in examples),
        [len(e.request) + len(e.response) - 1 for e in examples],
    )
    n_q, C_q = (int(n) for n in case["student"].split("x")[:2])
    n_p, C_p = (int(n) for n in case["teacher"].split("x")[:2])

    def forward(n, C, rows, predicted):
        return (
            sum(24 * n * C**2 * T + 2 * n * C * T * (T + 1) for T in rows) + 2 * C * V * predicted
        )

    first, q = forward(n_q, C_q, requests, len(examples)), forward(n_q, C_q, whole, n_tokens)
    p, prompted = (
        forward(n_p, C_p, whole, n_tokens),
        forward(n_p, C_p, [T + PROMPT_LENGTH for T in whole], n_tokens),
    )
    w_q, w_p = 12 * n_q * C_q**2 + C_q * V, 12 * n_p * C_p**2 + C_p * V
    read = w_q * (max(len(e.response) for e in examples) - 1) + 2 * n_q * C_q * sum(
        sum(range(x, T)) for x, T in zip(requests, whole)
    )
    return {
        "sampling": [(first, width * w_q), (q - first, width * read)],
        "prompt": [(q + p + 2 * prompted, width * (w_q + 3 * w_p))],
        "student": [(3 * q + prompted, width * (3 * w_q + w_p)), (0, 7 * 4 * w_q)],
    }


def floor_seconds(work, rates):
    """Seconds of each phase, and of all together: for each part operations or bytes at the machine's rates, whichever takes longer."""
    seconds = {
        phase: sum(max(count / rate for count, rate in zip(part, rates)) for part in parts)
        for phase, parts in work.items()
    }
    return seconds | {"whole": sum(seconds.values())}


# ---- what is printed ------------------------------------------------------------------------------------------------------------------


def has_transformers():
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: that side is left out")
        return False
    return True


def with_spread(values, digits=2):
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def show_size(size, args, device, rates):
    """The table of one size."""
    case, share = CASES[size] | {"dtype": args.dtype}, RECIPE_SHARE.get(size, 1)
    if "source" in case:
        case = case | {"source": args.source}
    others = ["recipe", *(["transformers"] if args.hf and has_transformers() else [])]
    names = ["recipe", "ours", "ours, gkd", *others[1:]]
    examples = make_examples(case)
    n_tokens, length = (
        sum(len(e.response) for e in examples),
        sum(len(e.request) + len(e.response) for e in examples),
    )
    models = f"student {case['student']}, teacher {case['teacher']}"
    print(
        f"\n{size}: {models}, {len(examples)} rows, {length:,} tokens, {n_tokens:,} of them of responses",
        flush=True,
    )
    part = {name: case["rows"] // (share if name in others else 1) for name in names}
    answers, before = take_turns("step", part, case, args.threads, args.repeats)
    work = count_work(case, examples, getattr(torch, args.dtype).itemsize)
    floor, operations = (
        floor_seconds(work, rates),
        {phase: sum(count for count, _ in parts) for phase, parts in work.items()},
    )
    operations["whole"] = sum(operations.values())

    columns = [
        *(f"{name} / ours" for name in others),
        "floor, s",
        "ours / floor",
        "share of the peak",
    ]
    lines = [["", *(x for name in names for x in (f"{name}, s", "tokens/s")), *columns]]
    for phase in (*PHASES, "whole"):
        cells, times = (
            [],
            {
                name: [case["rows"] / part[name] * s for s in seconds_of(answers[name], phase)]
                for name in names
            },
        )
        for name, seconds in times.items():
            cells += (
                [with_spread(seconds), f"{n_tokens / median(seconds):,.0f}"]
                if any(seconds)
                else ["-", "-"]
            )
        label = phase if phase == "sampling" else f"{phase} step"
        ours = median(times["ours"])
        ratios = [f"{median(times[name]) / ours:.2f}" for name in others]
        share_of_peak = f"{100 * operations[phase] / ours / rates[0]:.0f}%"
        lines.append(
            [
                label,
                *cells,
                *ratios,
                f"{floor[phase]:.2f}",
                f"{ours / floor[phase]:.2f}",
                share_of_peak,
            ]
        )
    for kind in before["ours"]:
        peaks = {name: answers[name][-1]["memory"][kind] for name in names}
        cells = [
            cell
            for name in names
            for cell in (f"{peaks[name]:.2f} (before {before[name][kind]:.2f})", "")
        ]
        lines.append(
            [
                f"peak {kind}, GB",
                *cells,
                *(f"{peaks[name] / peaks['ours']:.2f}" for name in others),
                "",
                "",
                "",
            ]
        )
    print(format_table(lines))
    if share > 1:
        print(f"The recipe's seconds are {share} times those of {len(examples) // share} rows.")
    if size == "L":
        print(
            f"The paper's {PAPER_STEPS} steps at this rate: {PAPER_STEPS * ours / 3600:.2f} hours, without validation."
        )


def show_sampling(args, device, rates, case=CASES["M"] | {"request": 64, "max_new_tokens": 64}):
    """Tokens/s of sampling at the base shape, all rows in one batch on every side."""
    names, lines = ["plain", "ours", *(["transformers"] if has_transformers() else [])], []
    case = case | {"dtype": args.dtype}
    for n in (1, 8, 32):
        answers, _ = take_turns(
            "sampling", dict.fromkeys(names, n), case | {"rows": n}, args.threads, args.repeats
        )
        n_tokens, work = (
            n * case["max_new_tokens"],
            count_work(
                case, make_examples(case | {"rows": n}), getattr(torch, args.dtype).itemsize
            ),
        )
        rate = {name: [n_tokens / s for s in seconds_of(answers[name])] for name in names}
        gain = median(rate["ours"]) / max(
            median(values) for name, values in rate.items() if name != "ours"
        )
        at_best = n_tokens / floor_seconds(work, rates)["sampling"]
        lines.append(
            [
                f"{n:,}",
                *(with_spread(values, 0) for values in rate.values()),
                f"{gain:.2f}",
                f"{at_best:,.0f}",
            ]
        )
    print(
        f"\nsampling, tokens/s: {case['student']}, {case['request']} + {case['max_new_tokens']} tokens"
    )
    print(format_table([["rows", *names, "ours / best other", "at the floor"], *lines]))


def show_evaluation(args):
    """Time to evaluate Dolly's test rows at S's student."""
    n_rows = len(read_rows(find_file(args.source, "test.jsonl", "valid.jsonl"), args.rows))
    case = CASES["S"] | {
        "rows": n_rows,
        "max_new_tokens": sample.MAX_NEW_TOKENS,
        "source": args.source,
        "dtype": args.dtype,
    }
    answers, _ = take_turns(
        "evaluation",
        dict.fromkeys(["batches of 8", "ours"], n_rows),
        case,
        args.threads,
        args.repeats,
    )
    print(f"\nevaluation of {n_rows} Dolly rows, {case['student']}, sampling and scoring")
    lines = [
        [name, with_spread(seconds_of(of_side)), f"{of_side[-1]['rouge_l']:.2f}"]
        for name, of_side in answers.items()
    ]
    print(format_table([["", "seconds", "ROUGE-L"], *lines]))
    print(
        f"batches of 8 / ours: {median(seconds_of(answers['batches of 8'])) / median(seconds_of(answers['ours'])):.2f}"
    )


def scaled(case, axis, value):
    """A case at another point of an axis. A row's tokens are half request, half response."""
    return case | (
        {"request": value // 2, "max_new_tokens": value // 2}
        if axis == "tokens a row"
        else {axis: value}
    )


def show_scaling(args, base=CASES["S"]):
    """Time and peak memory of a step against batch, length and vocabulary, written as JSON and as a picture."""
    base = base | {"dtype": args.dtype}
    points, measured = [], {}
    for axis, values in AXES.items():
        for name in ("ours", "recipe"):
            before = None  # the point before on this axis
            for value in values:
                case = scaled(base, axis, value)
                if (
                    before
                    and name == "recipe"
                    and before["seconds"] * value / before["value"] > TOO_LONG
                ):
                    print(f"recipe at {value:,} {axis}: left out, would take over {TOO_LONG} s")
                    break
                key = json.dumps([name, case])
                if key not in measured:
                    answers, memory = take_turns(
                        "step", {name: case["rows"]}, case, args.threads, 2
                    )
                    measured[key] = {
                        "seconds": seconds_of(answers[name])[-1],
                        "memory": answers[name][-1]["memory"],
                        "before": memory[name],
                    }
                before = {"axis": axis, "value": value, "side": name, **measured[key]}
                points.append(before)
                print(
                    f"{name} at {value:,} {axis}: {before['seconds']:.2f} s, {describe_memory(before['memory'])}",
                    flush=True,
                )
    write_atomic(
        Path(args.out).with_suffix(".json"),
        json.dumps({"base": base, "threads": args.threads, "points": points}, indent=1) + "\n",
    )
    print(
        f"{Path(args.out).with_suffix('.json')}; "
        + (draw_scaling(points, base, args.out) or "no picture: matplotlib is not installed")
    )


def describe_memory(memory):
    return ", ".join(f"{gb:.2f} GB {kind}" for kind, gb in memory.items())


def draw_scaling(points, base, path):
    """Two lines of panels, seconds and memory, one panel an axis. Returns the path, or None where matplotlib is not installed."""
    if (plt := pyplot()) is None:
        return None
    figure, panels = plt.subplots(
        2, len(AXES), figsize=(4 * len(AXES), 6), sharey="row", layout="constrained"
    )
    kind = next(iter(points[0]["memory"]))
    for column, axis in zip(panels.T, AXES):
        for name, style in (("recipe", "s--"), ("ours", "o-")):
            own = [point for point in points if point["axis"] == axis and point["side"] == name]
            column[0].plot(
                [point["value"] for point in own],
                [point["seconds"] for point in own],
                style,
                label=name,
            )
            column[1].plot(
                [point["value"] for point in own],
                [point["memory"][kind] for point in own],
                style,
                label=name,
            )
        column[1].set_xlabel(
            {"vocab": "words in the vocabulary", "rows": "rows in the batch"}.get(axis, axis)
        )
        for panel in column:
            panel.set_xticks(
                AXES[axis],
                [f"{value / 1000:.0f}k" if value >= 1000 else value for value in AXES[axis]],
            )
            panel.grid(alpha=0.3)
    for line in panels:  # at last: it fixes the top, which the panels of a line share
        line[0].set_ylim(bottom=0)
    panels[0, 0].set_ylabel("seconds a step")
    panels[1, 0].set_ylabel(f"peak memory, {kind}, GB")
    panels[0, 0].legend()
    length = base["request"] + base["max_new_tokens"]
    models = f"student {base['student']}, teacher {base['teacher']}"
    figure.suptitle(
        f"One step of PromptKD: {models}; where not varied {base['rows']} rows of {length} tokens, {base['vocab']:,} words"
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return str(path)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="Time and memory of PromptKD's iteration, against the released recipe's and the floor.",
    )
    parser.add_argument(
        "--size",
        nargs="+",
        choices=list(CASES),
        default=[],
        metavar="SIZE",
        help="S, M, D; L on a GPU",
    )
    parser.add_argument(
        "--sampling", action="store_true", help="tokens/s of sampling at GPT-2's base shape"
    )
    parser.add_argument(
        "--evaluation", action="store_true", help="time to evaluate Dolly's test rows"
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="time and memory against batch, length and vocabulary",
    )
    parser.add_argument(
        "--repeats",
        type=sample.number_in_range(int, 1, 1000),
        default=3,
        help="runs of each side (default 3)",
    )
    parser.add_argument(
        "--threads",
        type=sample.number_in_range(int, 1, 1000),
        default=os.cpu_count(),
        help="of the CPU (default: one a core)",
    )
    parser.add_argument(
        "--source",
        metavar="DIR",
        help="a folder with Dolly's train.jsonl and test.jsonl (default data/dolly)",
    )
    parser.add_argument(
        "--rows",
        type=sample.number_in_range(int, 1, 100_000),
        default=500,
        help="of --evaluation (default 500)",
    )
    parser.add_argument(
        "--hf", action="store_true", help="the recipe on transformers' GPT-2 as well"
    )
    parser.add_argument(
        "--out",
        default="docs/scaling.png",
        help="the picture of --scaling; JSON is put beside it (default docs/scaling.png)",
    )
    parser.add_argument(
        "--job", help=argparse.SUPPRESS
    )  # one side in this process: what `processes` starts
    parser.add_argument(
        "--stock", action="store_true", help=argparse.SUPPRESS
    )  # read where data is imported
    sample.add_precision_option(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device, args.dtype = dist.init_process(args.dtype)
    if args.job:
        return do_job(**json.loads(args.job), device=device)
    if not (args.size or args.sampling or args.evaluation or args.scaling):
        raise InputError(
            "nothing to measure; give --size S M D, --sampling, --evaluation or --scaling"
        )
    if "L" in args.size and device.type != "cuda":
        raise InputError("--size L needs a GPU; leave it out")
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"cpu with {os.cpu_count()} cores"
    )
    print(
        f"{name}, {args.threads} threads, torch {torch.__version__}, {args.dtype}, medians of {args.repeats} (least-most)"
    )
    if args.hf:
        print("TRL's GKDTrainer is left out: there is no side for it here")
    if args.size or args.sampling:
        rates = machine_rates(device, getattr(torch, args.dtype))
        print(
            f"measured: a large matrix product {rates[0] / 1e9:,.0f} GFLOP/s, a large copy {rates[1] / 1e9:,.0f} GB/s"
        )
    for size in args.size:
        show_size(size, args, device, rates)
    if args.sampling:
        show_sampling(args, device, rates)
    if args.evaluation:
        show_evaluation(args)
    if args.scaling:
        show_scaling(args)


if __name__ == "__main__":
    run_command_line(main)
