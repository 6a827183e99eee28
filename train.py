"""PromptKD (Kim, Jang and Yang, Findings of EMNLP 2024): Algorithm 1, the methods it is compared with, the stages before them, and the
loop around them.

python train.py                                        the demo: offline, CPU or GPU, minutes
torchrun --nproc_per_node=8 train.py --student gpt2    the paper's main result, every stage of it
"""

import argparse
import hashlib
import json
import math
import os
import pickle
import platform
import resource
import shutil
import signal
import sys
import time
import zipfile
import zlib
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

from data import ranks  # before torch: data/__init__.py says why

import torch
from torch.nn.parallel import DistributedDataParallel

from data.demo import TOKENIZER_DIR
from data.files import OFFICIAL_MODELS, InputError, check_out, command, model_directory, parse_arguments, pyplot, write_atomic
from data.prepare import data_directory
from data.ranks import say
from data.rows import (Example, epoch_order, load_tokenizer, micro_batches, packed_blocks, read_rows, read_texts, same_tokens, tokenizer_files,
    training_examples)  # fmt: skip
from evaluate import evaluate, evaluate_models, lay_out, mean_rouge_l, open_sets, read_record, table, with_averages
from losses import (cross_entropy, importance_weight, kd_loss, kl, minillm_loss, minillm_returns, prompt_loss, student_loss, sum_over_tokens,
    token_log_probs, whiten)  # fmt: skip
from model import GPT, CheckpointError, Config, precision, read_config, save
from prompt import freeze, initial_prompt, save_prompt, teacher_hidden
from sample import MAX_NEW, add_precision_option, find_model, in_range, load_model, sample_all, sample_to_file

# ---- presets: the paper's Appendix A, read with the released scripts ----------------------------------------------------------

SIZES = {"base": 124e6, "medium": 355e6, "large": 774e6, "xl": 1_558e6}  # GPT-2's parameter counts


@dataclass(frozen=True)
class Settings:
    """All that decides a stage's result. The global batch is the preset's; ranks and micro-batches divide it."""

    method: str
    student: str  # the model that is trained, by name; for pretrain its shape
    data: str
    global_batch: int
    lr: float
    epochs: int
    schedule: str = "cosine"  # to 1e-7, or "constant"
    warmup: int = 0  # steps
    beta2: float = 0.999  # AdamW's
    weight_decay: float = 1e-2  # AdamW's; not on biases and LayerNorm
    teacher: str | None = None
    seed: int = 10
    dtype: str = "float32"  # of the products in the models' blocks, or "bfloat16"
    best_by: str = "rouge_l"  # or "loss"
    steps: int | None = None  # optimizer steps; None: what the epochs come to, most_steps at most
    most_steps: int | None = None
    validate_every: int | None = None  # steps; None: once an epoch
    dropout: float = 0.1  # of the student's training forward
    train_rows: int | None = None
    dev_rows: int | None = None
    max_new: int = MAX_NEW
    block: int = 512  # tokens of a packed row of plain text
    responses: str | None = None  # seqkd: the data directory with the teacher's responses
    rollout_rows: int | None = None  # minillm: rows sampled at once; None: the global batch
    inner_epochs: int = 1  # minillm: over each rollout
    lm_data: str | None = None  # minillm: a corpus of plain text
    prompt_lr: float | None = None  # promptkd, from here on
    prompt_text: str | None = None
    prompt_length: int | None = None  # None: the text's own tokens
    prompt_init: str | None = None
    reg: float | None = None
    prompt_kl: str | None = None
    reg_kl: str | None = None


#            size: (global batch, learning rate, epochs)
PRESETS = {
    "sft": {"base": (32, 5e-4, 20), "medium": (32, 1e-4, 20), "large": (32, 1e-4, 10), "xl": (32, 5e-5, 10)},
    "init": {"base": (32, 5e-4, 3), "medium": (32, 1e-4, 3), "large": (32, 1e-4, 3), "xl": (32, 5e-5, 3)},
    "minillm": {"base": (256, 5e-6, 10), "medium": (64, 5e-6, 10), "large": (64, 5e-6, 10), "xl": (64, 5e-6, 10)},
    "promptkd": {"base": (256, 5e-5, 20), "medium": (64, 1e-5, 20), "large": (64, 5e-6, 15), "xl": (64, 5e-6, 15)},
}
PRESETS |= {"teacher": PRESETS["sft"], "kd": PRESETS["sft"], "seqkd": PRESETS["sft"], "gkd": PRESETS["promptkd"]}  # GKD's was never released
PRETRAIN = {"global_batch": 32, "lr": 1e-3, "epochs": 3, "warmup": 50, "beta2": 0.95, "best_by": "loss", "dropout": 0.0}
PROMPT = {"prompt_text": "Suppose you are a student.", "prompt_init": "text", "reg": 1.0, "prompt_kl": "reverse", "reg_kl": "reverse"}
ON_POLICY = {"schedule": "constant", "warmup": 100}
MINILLM = {"rollout_rows": 256, "inner_epochs": 4, "beta2": 0.95, "weight_decay": 1e-6, "dropout": 0.0, "most_steps": 5000, "validate_every": 100}
BESIDE = {
    "init": {"best_by": "loss"},
    "minillm": ON_POLICY | MINILLM,
    "gkd": ON_POLICY,
    "promptkd": ON_POLICY | PROMPT,
}  # beside the three of PRESETS

# The demo's models and presets: a few million parameters, rows of a few dozen words.
DEMO_TEACHER, DEMO_STUDENT = "3x128x4", "2x64x4"
DEMO_PRETRAIN = PRETRAIN | {"global_batch": 8, "lr": 2e-3, "epochs": 1, "warmup": 100, "block": 128}
DEMO_SFT = {"global_batch": 16, "lr": 2e-3, "epochs": 10, "warmup": 20, "dropout": 0.0, "max_new": 40}
DEMO_GKD = {"global_batch": 64, "lr": 2e-3, "epochs": 4, "schedule": "constant", "warmup": 20, "dropout": 0.0, "max_new": 40}
DEMO = {
    DEMO_TEACHER: DEMO_PRETRAIN,
    DEMO_STUDENT: DEMO_PRETRAIN,
    "teacher": DEMO_SFT | {"lr": 1e-3, "epochs": 5},
    "init": DEMO_SFT | {"epochs": 3, "best_by": "loss"},
    "sft": DEMO_SFT,
    "kd": DEMO_SFT,
    "seqkd": DEMO_SFT,
    "minillm": DEMO_GKD | MINILLM | {"lr": 1e-3, "epochs": 2, "validate_every": None, "block": 128},
    "gkd": DEMO_GKD,
    "promptkd": DEMO_GKD | PROMPT | {"prompt_lr": 1e-4},
}

CLIP, LEAST_LR = 1.0, 1e-7
TEACHER_SHARE = 0.2  # α of MiniLLM's mixed sampling


def preset(kind, name):
    """The paper's preset of a stage for a model: that of the GPT-2 nearest in parameter count."""
    with torch.device("meta"):
        n_parameters = GPT(read_config(ranks.on_first(model_directory, name))).n_parameters()
    size = min(SIZES, key=lambda size: abs(math.log(n_parameters / SIZES[size])))
    if abs(n_parameters / SIZES[size] - 1) > 0.05:
        say(f"{name} has {n_parameters:,} parameters; its {kind} stage takes the preset of GPT-2 {size}")
    global_batch, lr, epochs = PRESETS[kind][size]
    values = {"global_batch": global_batch, "lr": lr, "epochs": epochs, **BESIDE.get(kind, {})}
    return values | {"prompt_lr": lr} if kind == "promptkd" else values


def learning_rate(peak, step, total, schedule, warmup):
    """The rate at a step from 0: a linear warm-up, then constant, or a cosine down to 1e-7."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return LEAST_LR + (peak - LEAST_LR) * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


# ---- a run, and one step of each method ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a step works on: the student q with parameters θ, the frozen teacher p, the soft prompt P."""

    settings: Settings
    total: int  # T, optimizer steps
    global_batch: int  # rows of an optimizer step, over all ranks
    micro_batch: int
    device: torch.device
    tokenizer: object
    student: torch.nn.Module  # bare, for sampling and targets
    wrapped: torch.nn.Module  # the same under DDP, for the passes with gradients
    optimizer: torch.optim.Optimizer
    teacher: torch.nn.Module | None = None
    P: torch.Tensor | None = None
    prompt_optimizer: torch.optim.Optimizer | None = None
    rollout_steps: int = 1  # optimizer steps on each rollout
    rollout: list | None = None  # MiniLLM's rows, of all ranks
    text: list | None = None  # MiniLLM's plain text, in blocks
    clock: dict | None = None  # seconds by phase


@torch.no_grad()
def target(model, batch, P=None):
    """What a model as it stands, behind the prompt P if there is one, says of the response tokens, without gradient or dropout: the
    hidden states (N, C) that predict them, and its head (V, C)."""
    return teacher_hidden(model.eval(), batch.ids, P, batch.where), model.wte.weight


def window(run, examples):
    """The global batch as this rank's micro-batches, and the number of response tokens in all of it, over all ranks.

    The window, not the micro-batch, is what the losses are averaged over.
    """
    batches = micro_batches(examples, run.micro_batch, run.device)
    n_tokens = ranks.add_up(torch.tensor(sum(len(b.targets) for b in batches), device=run.device))
    return batches, max(1, int(n_tokens))


def backward(run, loss_of, batches, n_tokens):
    """Student gradients of the sum of per-token losses over the window, divided by its number of tokens.

    loss_of: batch -> the loss and the targets that it compares with, as sum_over_tokens takes them. Ranks exchange gradients at the last
    micro-batch only; DDP averages them over the ranks, which is undone. Returns the loss, over all ranks.
    """
    total = torch.zeros((), device=run.device)
    for batch in batches:
        last = batch is batches[-1]
        with nullcontext() if last or run.wrapped is run.student else run.wrapped.no_sync():
            with precision(run.device, run.settings.dtype):
                hidden = run.wrapped(batch.ids, where=batch.where)  # (N, C): only what predicts a response token meets the head
                loss, *targets = loss_of(batch)
                loss = sum_over_tokens(loss, hidden, run.student.wte.weight, *targets) / n_tokens
            (loss * ranks.world()).backward()
        total += loss.detach()
    return ranks.add_up(total)


def update(optimizer):
    """Clip the gradients at norm 1, step, and clear them. Returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def phase(run, name):
    """Seconds since the last phase ended go to this one."""
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    now = time.perf_counter()
    run.clock[name] = now - run.clock.pop("since")
    run.clock["since"] = now


def train_student(run, **terms):
    """One update of the student on the sum of the terms, each (loss_of, batches, n_tokens) for `backward`. Gradient to θ only."""
    run.student.train()
    losses = {name: backward(run, *term) for name, term in terms.items()}
    norm = update(run.optimizer)
    phase(run, "student")
    return {**losses, "grad_norm": norm, "response_tokens": terms["loss"][2]}


def rollout(run, examples, t, mix=None):
    """Responses y ~ q_θ(y | x) to the requests of the whole window at once; no gradient. The student does not change inside a window."""
    run.student.eval()
    keys = [(run.settings.seed, "rollout", t, e.index) for e in examples]
    requests, s = [e.request for e in examples], run.settings
    responses, _ = sample_all(run.student, requests, keys, run.tokenizer.eot_token, s.max_new, mix=mix, dtype=s.dtype)
    phase(run, "sampling")
    return [replace(e, response=y) for e, y in zip(examples, responses)]


def promptkd_step(run, examples, t):
    """Algorithm 1 of PromptKD, one iteration t of T. The equation numbers are the paper's."""
    s, q, p = run.settings, run.student, run.teacher
    batches, n_tokens = window(run, rollout(run, examples, t))  # y ~ q_θ(y | x)
    lam = 1 - t / run.total  # λ, from exactly 1 towards 0

    # Prompt tuning: a student-friendly teacher. Gradient to P only.
    sums = torch.zeros(4, device=run.device)
    for b in batches:
        with precision(run.device, s.dtype):
            h_pP = teacher_hidden(p, b.ids, run.P, b.where)  # of p(y | P, x)

            def L_P(i, pP_logits, q_logits, p_logits):
                losses = prompt_loss(pP_logits, q_logits, p_logits, lam, s.reg, s.prompt_kl, s.reg_kl)  # (1), (2), (3)
                drift = losses[2] if s.reg_kl == "reverse" else kl(pP_logits, p_logits)  # KL(p(y | P, x) || p(y | x))
                return torch.stack([*losses, drift])

            L = sum_over_tokens(L_P, h_pP, p.wte.weight, target(q, b), target(p, b)) / n_tokens  # q(y | x), p(y | x)
        L[0].backward()
        sums += L.detach()
    ranks.add_up(run.P.grad)
    prompt_norm = update(run.prompt_optimizer)
    phase(run, "prompt")

    # Distillation from the teacher behind the prompt just updated. Gradient to θ only.
    def L_theta(b):
        return lambda i, q_logits, pP_logits: student_loss(q_logits, pP_logits), target(p, b, run.P)  # (4)

    values = train_student(run, loss=(L_theta, batches, n_tokens))
    prompt_losses = dict(zip(("prompt_loss", "prompt_kd", "prompt_reg", "kl_prompted_bare"), ranks.add_up(sums)))
    return {**values, **prompt_losses, "prompt_grad_norm": prompt_norm, "lambda": lam}


def gkd_step(run, examples, t):
    """GKD (Agarwal et al. 2024) as the paper runs it: PromptKD without the prompt."""
    p = run.teacher
    batches, n_tokens = window(run, rollout(run, examples, t))  # y ~ q_θ(y | x)

    def L_theta(b):
        return lambda i, q_logits, p_logits: student_loss(q_logits, p_logits), target(p, b)  # KL(q(y | x) || p(y | x))

    return train_student(run, loss=(L_theta, batches, n_tokens))


def sft_step(run, examples, t):
    """Cross-entropy on the rows' own responses. Pre-training is the same, on packed rows."""

    def L_theta(b):
        return [lambda i, q_logits: cross_entropy(q_logits, b.targets[i])]

    return train_student(run, loss=(L_theta, *window(run, examples)))


def against_teacher(run):
    """KD's loss, for `backward`."""

    def L_theta(b):
        return lambda i, q_logits, p_logits: kd_loss(q_logits, p_logits, b.targets[i]), target(run.teacher, b)

    return L_theta


def kd_step(run, examples, t):
    """KD (Hinton et al. 2015), cross-entropy and forward KL to the teacher on the rows' own responses. SeqKD (Kim and Rush 2016) is the
    same on responses that the teacher gave."""
    return train_student(run, loss=(against_teacher(run), *window(run, examples)))


@dataclass(frozen=True)
class Sampled(Example):
    """A row of MiniLLM's rollout: (log q(y_t), w_t, R_t) for each of its response's tokens, under the q that sampled it."""

    tokens: list


def minillm_step(run, examples, t):
    """MiniLLM (Gu et al. 2024): several optimizer steps on each rollout, by policy gradient and the exact KL of the single step; and
    KD's loss on plain text, where there is some."""
    s, n = run.settings, run.global_batch
    if t % run.rollout_steps == 0:
        run.rollout = minillm_rollout(run, examples, t)
    inner_epoch, k = divmod(t, len(run.rollout) // n)
    order = epoch_order(len(run.rollout), s.seed, inner_epoch)
    rows = [run.rollout[i] for i in order[k * n : (k + 1) * n]]

    def L_theta(b):
        tokens = torch.tensor([v for e in b.examples for v in e.tokens], dtype=torch.float64, device=run.device).float().view(-1, 3)

        return lambda i, q_logits, p_logits: minillm_loss(q_logits, p_logits, b.targets[i], *tokens[i].T), target(run.teacher, b)

    terms = {"loss": (L_theta, *window(run, ranks.share(rows)))}
    if run.text:
        blocks = [run.text[(t * n + i) % len(run.text)] for i in range(n)]
        terms["lm_loss"] = (against_teacher(run), *window(run, ranks.share(blocks)))
    return train_student(run, **terms)


@torch.no_grad()
def minillm_rollout(run, examples, t):
    """Responses from student and teacher mixed, token by token, to these requests of all ranks, scored. Sampled once for all inner epochs."""
    rows = []
    for b in micro_batches(rollout(run, examples, t, mix=(run.teacher, TEACHER_SHARE)), run.micro_batch, run.device):
        with precision(run.device, run.settings.dtype):
            log_q, log_p = (token_log_probs(*target(model, b), b.targets).cpu() for model in (run.student, run.teacher))
        lengths = [len(e.response) for e in b.examples]
        rows += zip(b.examples, log_q.split(lengths), log_p.split(lengths))
    examples, log_q, log_p = zip(*sorted(ranks.gather(rows), key=lambda row: row[0].index))  # of all ranks
    R = whiten(torch.cat([minillm_returns(of_p, of_q) for of_p, of_q in zip(log_p, log_q)]))  # (M,), over the M tokens of all rows
    w = importance_weight(torch.cat(log_p), torch.cat(log_q), TEACHER_SHARE)
    tokens = torch.stack([torch.cat(log_q), w, R], dim=1).split([len(e.response) for e in examples])
    phase(run, "scoring")
    return [Sampled(e.index, e.request, e.response, of_row.tolist()) for e, of_row in zip(examples, tokens)]


FROM_INIT = ("minillm", "gkd", "promptkd")  # the others start from the pre-trained student
STEPS = {"pretrain": sft_step, "sft": sft_step, "kd": kd_step, "seqkd": kd_step, "minillm": minillm_step, "gkd": gkd_step, "promptkd": promptkd_step}


# ---- validation ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validation_loss(run, model, examples, P=None):
    """Cross-entropy of a model (behind the prompt P) over the response tokens of examples, without dropout, over all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    for b in micro_batches(ranks.share(examples), run.micro_batch, run.device):
        with precision(run.device, run.settings.dtype):
            sums[0] -= token_log_probs(*target(model, b, P), b.targets).sum()
        sums[1] += len(b.targets)
    loss, n_tokens = ranks.add_up(sums).tolist()
    return loss / max(1, n_tokens)


def validate(run, rows, examples):
    """The student's loss on the validation rows, ROUGE-L of its responses, sampled with the same random numbers every time, and the
    loss of the prompted teacher."""
    values = {"val_loss": validation_loss(run, run.student, examples)}
    if run.settings.best_by == "rouge_l" and math.isfinite(values["val_loss"]):  # what has diverged can't be sampled from
        s = run.settings
        how = {"label": "validation", "max_new": s.max_new, "dtype": s.dtype}
        values["val_rouge_l"] = mean_rouge_l(evaluate(run.student, run.tokenizer, rows, (s.seed, "validate"), **how))
    if run.P is not None:
        values["val_prompted_loss"] = validation_loss(run, run.teacher, examples, run.P)
    return values


# ---- a stage: its data, its models, the loop, and what it leaves behind ---------------------------------------------------------


def data_files(s):
    """The files that a stage trains and validates on, and for pre-training the one of its texts, where there is one."""
    directory = ranks.on_first(data_directory, s.data)
    texts = [directory / "pretrain.jsonl"] if s.method == "pretrain" and (directory / "pretrain.jsonl").is_file() else []
    return [Path(s.responses or directory) / "train.jsonl", directory / "dev.jsonl", *texts]


def open_data(s):
    """A stage's tokenizer, validation rows, and a function that gives an epoch's training examples in their order."""
    path, dev_path, *texts = data_files(s)
    rows, dev_rows = read_rows(path, s.train_rows), read_rows(dev_path, s.dev_rows)
    if s.method == "pretrain":
        tokenizer = load_tokenizer(TOKENIZER_DIR if s.data == "demo" else None)
        if texts:
            documents = [[*tokenizer.encode_ordinary(text), tokenizer.eot_token] for text in read_texts(texts[0], s.train_rows)]
        else:
            documents = [e.request + e.response for e in training_examples(rows, tokenizer)]

        def epoch_examples(epoch):
            return packed_examples(documents, s, epoch)
    else:
        tokenizer = load_tokenizer(ranks.on_first(model_directory, s.student))
        examples = training_examples(rows, tokenizer)
        if len(examples) < len(rows):
            say(f"{path}: {len(rows) - len(examples)} of {len(rows)} rows have a request over the limit and are left out")

        def epoch_examples(epoch):
            return [examples[i] for i in epoch_order(len(examples), s.seed, epoch)]

    return tokenizer, dev_rows, epoch_examples


def packed_examples(documents, s, epoch=0):
    """Token lists as rows of `block` tokens to predict, all but the first."""
    return [Example(i, block[:1], block[1:]) for i, block in enumerate(packed_blocks(documents, s.block, s.seed, epoch).tolist())]


def open_text(s, tokenizer, n_rows):
    """Blocks of the plain text of MiniLLM's last term: `n_rows`, or all that it gives."""
    documents, n_tokens = [], 0
    for text in read_texts(s.lm_data):
        documents.append([*tokenizer.encode_ordinary(text), tokenizer.eot_token])
        n_tokens += len(documents[-1])
        if n_tokens > n_rows * s.block:
            break
    if n_tokens <= s.block:
        raise InputError(f"{s.lm_data}: has {n_tokens} tokens, and a block is of {s.block}; give a longer text")
    return packed_examples(documents, s)


def build(s, total, global_batch, tokenizer, micro_batch, device):
    """The Run of a stage: models, prompt and optimizers, before the first step."""
    if s.method == "pretrain":
        student = GPT(config_of_shape(s.student, tokenizer.n_vocab, s.dropout)).initialise(s.seed).to(device)
    else:
        student, _ = load_model(s.student, device, s.dropout)
    wrapped = student
    if torch.distributed.is_initialized():
        wrapped = DistributedDataParallel(student, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
        # DDP lays its buckets anew behind its first pass, and the order in which more than two ranks' gradients are summed hangs on them:
        # a pass for nothing, so that a run that goes on sums as one that was never stopped.
        wrapped(torch.zeros(1, 1, dtype=torch.long, device=device)).sum().backward()
        student.zero_grad(set_to_none=True)
    run = Run(s, total, global_batch, micro_batch, device, tokenizer, student, wrapped, adamw(student.parameters(), s))
    if s.teacher is not None:
        teacher, teacher_tokenizer = load_model(s.teacher, device)
        if not same_tokens(teacher_tokenizer, tokenizer):
            raise InputError(f"teacher {s.teacher} and student {s.student} have different tokenizers; a KL over the vocabulary needs one for both")
        run.teacher = freeze(teacher, s.dtype)
    if s.method == "promptkd":
        text = tokenizer.encode_ordinary(s.prompt_text)
        if not text:
            raise InputError("--prompt-text is empty; give a sentence")
        P = initial_prompt(run.teacher.wte.weight, s.prompt_init, s.prompt_length or len(text), text, tokenizer.eot_token, s.seed)
        run.P = P.to(device).requires_grad_()
        run.prompt_optimizer = adamw([run.P], s)
    if s.lm_data is not None:
        run.text = open_text(s, tokenizer, total * global_batch)
    return run


def adamw(parameters, s):
    """AdamW with weight decay on matrices, not on biases and LayerNorm."""
    parameters = list(parameters)
    groups = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, s.beta2), weight_decay=s.weight_decay, fused=True)


def set_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def config_of_shape(shape, vocab_size, dropout):
    try:
        n_layer, n_embd, n_head = (int(n) for n in shape.split("x"))
        fits = min(n_layer, n_embd, n_head) > 0 and n_embd % n_head == 0
    except ValueError:
        fits = False
    if not fits:
        raise InputError(f"--shape {shape}: must be LAYERSxWIDTHxHEADS with a width that the heads divide, as in 6x256x8")
    return Config(n_layer, n_embd, n_head, vocab_size, dropout=dropout)


def check_positions(run, examples):
    """Raise InputError where a row is longer than a model can read."""
    longest = max(len(e.request) + len(e.response) for e in [*examples, *(run.text or [])]) + (0 if run.P is None else len(run.P))
    for name, model in (("student", run.student), ("teacher", run.teacher)):
        if model is not None and longest > model.config.n_positions:
            raise InputError(f"the {name} has {model.config.n_positions} positions and the longest row takes {longest}; take a model with more")


def check_prompt(run, dev_rows, dev_examples):
    """Validation before the first step, for the log. Warns of a prompt that harms the teacher: one that does is hardly ever repaired."""
    values = {"step": 0, **validate(run, dev_rows, dev_examples), "val_bare_loss": validation_loss(run, run.teacher, dev_examples)}
    say(f"before: {describe(values)}")
    if (harm := values["val_prompted_loss"] - values["val_bare_loss"]) > 0.1:
        cost = f"the prompt costs the teacher {harm:.2f} nats a token before it is tuned"
        say(f"warning: {cost}, and the student will follow; try another --prompt-text")
    return values


def run_stage(name, s, out, micro_batch, device, paper=None, keep=0, save_every=None):
    """Train one stage in `out/name`, or go on with it where it stopped, or skip it where it is complete. Returns its directory.

    paper: which of the paper's rows this is, for run.json. keep: how many checkpoints to save, evenly, in `kept/`. save_every: steps
    between states, beside those at validations. SIGTERM or SIGINT, to any rank, ends the process behind the step that it falls in, with
    its state saved and status 128 + signal.
    """
    directory = Path(out) / name
    record = ranks.on_first(open_record, directory, {"name": name, "paper": paper, "settings": asdict(s)}, data_files(s))
    if "hours" in record:
        say(f"{directory}: complete, skipped")
        return str(directory)

    if device.type == "cuda":  # the memory reported is this stage's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    tokenizer, dev_rows, epoch_examples = open_data(s)
    dev_examples, examples = training_examples(dev_rows, tokenizer), epoch_examples(0)
    if not examples:
        raise InputError(f"data {s.data}: train.jsonl is too little to train on; give more or shorter rows")
    if not dev_examples:
        raise InputError(f"data {s.data}: every validation row's request is over the limit; give shorter ones in dev.jsonl")
    global_batch = min(s.global_batch, len(examples))
    if global_batch < ranks.world():
        raise InputError(f"a global batch of {global_batch} rows can't be divided among {ranks.world()} ranks; start fewer, or raise --global-batch")
    rollout_rows = min(max(global_batch, s.rollout_rows or 0), len(examples))
    rollout_steps = s.inner_epochs * (rollout_rows // global_batch)  # optimizer steps on each rollout: 1, but for MiniLLM
    per_epoch = len(examples) // rollout_rows * rollout_steps
    total = s.steps or min(per_epoch * s.epochs, s.most_steps or math.inf)
    run = build(s, total, global_batch, tokenizer, micro_batch, device)
    run.rollout_steps = rollout_steps
    check_positions(run, [*examples, *dev_examples])
    ranks.on_first(write_atomic, directory / "run.json", json.dumps(record, indent=1) + "\n")
    done = load_state(run, directory)
    first, log = done["step"], Log(directory / "metrics.jsonl", done["step"])
    if first and done["best_step"] == first:  # written behind the state, so it may be missing
        save_checkpoint(run, directory / "best")

    record |= {"parameters": run.student.n_parameters(), "total_steps": total, "ranks": ranks.world(), "device": device.type}
    going_on = f", going on behind step {first:,}" if first else ""
    say(f"\n{directory}: {s.method}, {record['parameters']:,} parameters, {len(examples):,} rows, {total:,} steps of {global_batch}{going_on}")
    if run.P is not None:
        record |= {"prompt_length": len(run.P), "prompt_numbers": run.P.numel(), "prompt_share": run.P.numel() / run.teacher.n_parameters()}
        size = f"{len(run.P)} × {run.P.shape[1]} = {run.P.numel():,} numbers"
        say(f"prompt: {size}, {100 * record['prompt_share']:.4f} % of the teacher's {run.teacher.n_parameters():,} parameters")
    if run.P is not None and first == 0:
        log.write(check_prompt(run, dev_rows, dev_examples))

    begin, hours, shown, at = time.perf_counter(), done["hours"], 0.0, 0
    with ranks.signals_noted() as signals:
        for t in range(first, total):
            epoch, k = divmod(t, per_epoch)
            if epoch != at:
                examples, at = epoch_examples(epoch), epoch
            start = k // rollout_steps * rollout_rows
            line = {"step": t + 1, "epoch": (t + 1) / per_epoch, **step(run, ranks.share(examples[start : start + rollout_rows]), t)}
            check_finite(directory, line)
            validating = (t + 1) % (s.validate_every or per_epoch) == 0 or t + 1 == total
            if validating:
                line |= validate(run, dev_rows, dev_examples)
                check_finite(directory, line)
                score = line["val_rouge_l"] if s.best_by == "rouge_l" else -line["val_loss"]
                if done["best"] is None or score > done["best"]:
                    done |= {"best": score, "best_step": t + 1}
            if (t + 1) * keep // total > t * keep // total:
                save_checkpoint(run, directory / "kept" / f"step-{t + 1:06d}")
            log.write(line)
            elapsed = time.perf_counter() - begin
            done |= {"step": t + 1, "hours": hours + elapsed / 3600}
            stop = ranks.largest(max(signals, default=0))
            if validating or stop or (t + 1) % (save_every or total) == 0:
                save_state(run, directory, done)
            if done["best_step"] == t + 1:  # behind the state, from which it can be written again
                save_checkpoint(run, directory / "best")
            if validating or time.perf_counter() - shown > 5:
                shown, left = time.perf_counter(), clock_time(elapsed / (t + 1 - first) * (total - t - 1))
                say(f"step {t + 1:,}/{total:,}  {describe(line)}  {line['tokens_per_second']:,.0f} tokens/s  {left} left")
            if stop:
                say(f"{directory}: stopped by {signal.Signals(stop).name}, saved at step {t + 1:,}; the same command goes on from there")
                sys.exit(128 + stop)

    record |= {"best": abs(done["best"]), "best_step": done["best_step"], "hours": done["hours"]}
    picture = ranks.on_first(finish, directory, record)
    say(f"{directory}: done in {clock_time(3600 * record['hours'])}, best {s.best_by} {record['best']:.2f}; {picture}")
    return str(directory)


def check_finite(directory, line):
    """Raise InputError where a step's losses or norms are not finite: before anything of it is saved."""
    bad = {name: value for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
    if bad:
        phase, rates = ("prompt", "--prompt-lr or --lr") if any("prompt" in name for name in bad) else ("student", "--lr")
        what = ", ".join(f"{name} {value}" for name, value in bad.items())
        raise InputError(f"{directory}: {what} at step {line['step']}, {phase} phase; the training has diverged: lower {rates}")


def step(run, rows, t):
    """One optimizer step on this rank's rows, and what metrics.jsonl says of it."""
    s = run.settings
    torch.manual_seed(zlib.crc32(repr((s.seed, t, ranks.rank())).encode()))  # dropout; nothing to save for going on
    run.clock = {"since": time.perf_counter()}
    values = {"lr": set_rate(run.optimizer, learning_rate(s.lr, t, run.total, s.schedule, s.warmup))}
    if run.P is not None:
        values["prompt_lr"] = set_rate(run.prompt_optimizer, learning_rate(s.prompt_lr, t, run.total, s.schedule, s.warmup))
    values |= {name: float(value) for name, value in STEPS[s.method](run, rows, t).items()}
    del run.clock["since"]
    return values | {"tokens_per_second": values["response_tokens"] / sum(run.clock.values()), "seconds": run.clock, **memory(run.device)}


def sample_responses(name, s, out, device):
    """SeqKD's data: the responses of a teacher to the training requests, sampled once, as a data directory. Returns it.

    s: what they hang on, {"student": the teacher, "data", "train_rows", "max_new", "seed", "dtype"}.
    """
    directory = Path(out) / name
    begin, source = time.perf_counter(), ranks.on_first(data_directory, s["data"])
    described = {"name": name, "settings": {"method": "responses", **s}}
    record = ranks.on_first(open_record, directory, described, [source / "train.jsonl"])
    if "hours" in record:
        say(f"{directory}: complete, skipped")
        return str(directory)
    model, tokenizer = load_model(s["student"], device)
    rows = read_rows(source / "train.jsonl", s["train_rows"])
    ranks.on_first(write_atomic, directory / "run.json", json.dumps(record, indent=1) + "\n")
    say(f"\n{directory}: sampling the responses of {s['student']} to {len(rows):,} requests")
    if not ranks.on_first((directory / "train.jsonl").is_file):
        key, path = (s["seed"], "responses"), directory / "train.jsonl"
        sample_to_file(freeze(model, s["dtype"]), tokenizer, rows, key, path, s["max_new"], s["dtype"])
    if ranks.rank() == 0:
        for file in ("dev.jsonl", "test.jsonl"):
            if (source / file).is_file():
                shutil.copyfile(source / file, directory / file)
        write_atomic(directory / "run.json", json.dumps(record | {"hours": (time.perf_counter() - begin) / 3600}, indent=1) + "\n")
    ranks.barrier()
    return str(directory)


def save_state(run, directory, done):
    """What going on needs, on disk. done: step, best score and its step, and hours so far."""
    state = {"done": done, "student": run.student.state_dict(), "optimizer": run.optimizer.state_dict()}
    if run.P is not None:
        state |= {"P": run.P.detach(), "prompt_optimizer": run.prompt_optimizer.state_dict()}
    if run.rollout is not None:
        state["rollout"] = [astuple(row) for row in run.rollout]
    ranks.on_first(write_state, directory / "state" / f"step-{done['step']:06d}.pt", state)


def write_state(path, state):
    """Write a state, which has its name only when whole. The one before it is kept, older ones go."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except RuntimeError as error:  # torch.save's word for a full disk
        raise InputError(f"{path}: can't be written ({error.__context__ or error}); make room, and the same command goes on") from error
    finally:
        partial.unlink(missing_ok=True)
    for old in states(path.parent)[2:]:
        old.unlink()


def states(directory):
    """The saved states in a directory, the newest first."""
    return sorted(directory.glob("*.pt"), key=lambda path: (len(path.name), path.name), reverse=True)


def newest_state(directory):
    """The newest saved state that is whole, None where there is none. Damaged ones are said and put aside."""
    for path in (found := states(directory / "state")):
        try:
            whole = zipfile.ZipFile(path).testzip() is None  # torch.load does not look at the checksums
        except Exception:  # zipfile has many ways to fail
            whole = False
        if whole:
            return path
        os.replace(path, path.with_suffix(".damaged"))
        say(f"{path}: is damaged; " + ("this stage starts anew" if path == found[-1] else "going on from the state before it"))
    return None


def load_state(run, directory):
    """Take up the newest state. Returns its step, best score and its step, and hours so far."""
    path = ranks.on_first(newest_state, directory)
    if path is None:
        return {"step": 0, "best": None, "best_step": None, "hours": 0.0}
    try:
        state = torch.load(path, map_location=run.device, weights_only=True)
        run.student.load_state_dict(state["student"])
        run.optimizer.load_state_dict(state["optimizer"])
        if run.P is not None:
            run.P.data.copy_(state["P"])
            run.prompt_optimizer.load_state_dict(state["prompt_optimizer"])
        if "rollout" in state:
            run.rollout = [Sampled(*row) for row in state["rollout"]]
        return state["done"]
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: is no state of this run; remove {path.parent} to start this stage anew") from error


def save_checkpoint(run, directory):
    """A Hugging Face directory of the student, with its tokenizer and, in PromptKD, the soft prompt."""
    if ranks.rank() == 0:
        save(run.student, directory)
        for file, text in zip(("vocab.json", "merges.txt"), tokenizer_files(run.tokenizer)):
            write_atomic(directory / file, text)
        if run.P is not None:
            save_prompt(run.P, directory)
    ranks.barrier()


def open_record(directory, described, files):
    """A stage's run.json, as found, or as it is to begin. Raises InputError where the one found has other settings, or was made from
    data files with another content."""
    described = described | {"files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}}
    path = directory / "run.json"
    if not path.is_file():
        return described | {"versions": {"python": platform.python_version(), "torch": torch.__version__}}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = dict(record["settings"].items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: is damaged; remove {directory} to start this stage anew") from error
    for name, value in described["settings"].items():
        if found.get(name) != value:
            fix = f"give --dtype {found[name]}, " if name == "dtype" and found.get(name) in ranks.DTYPES else ""
            raise InputError(f"{directory}: was made with {name} {found.get(name)!r}, not {value!r}; {fix}choose another --out, or remove it")
    for name, value in described["files"].items():
        if record.get("files", {}).get(name, value) != value:
            raise InputError(f"{directory}: {name} of {found['data']} has changed since it was made; choose another --out, or remove it")
    if "hours" in record:
        shutil.rmtree(directory / "state", ignore_errors=True)  # where `finish` was cut short
    return record


def finish(directory, record):
    """Draw the curves, mark the stage as complete, and drop its state. Returns where the picture lies."""
    picture = draw_curves(directory)
    for leftover in directory.rglob(".*.*"):  # `.name.xyz` beside `name`: of a write that was cut short
        if leftover.with_name(leftover.name[1:].rpartition(".")[0]).is_file():
            leftover.unlink()
    write_atomic(directory / "run.json", json.dumps(record, indent=1) + "\n")
    shutil.rmtree(directory / "state", ignore_errors=True)
    return picture


def memory(device):
    """Peak memory in GB: allocated and reserved on a GPU (the paper's Table 2), resident on a CPU."""
    if device.type == "cuda":
        return {"memory_allocated_gb": torch.cuda.max_memory_allocated() / 1e9, "memory_reserved_gb": torch.cuda.max_memory_reserved() / 1e9}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"memory_resident_gb": peak / 1e9}


class Log:
    """metrics.jsonl, cut back to the step that a run goes on from."""

    def __init__(self, path, step):
        self.path = path
        if ranks.rank() == 0:
            lines = path.read_text().splitlines(keepends=True) if path.is_file() and step else []
            write_atomic(path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))

    def write(self, values):
        if ranks.rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")


def describe(values):
    """The values that a person follows, in one line."""
    shown = {"loss": "loss", "lm_loss": "LM loss", "prompt_kd": "L_kd", "prompt_reg": "L_reg", "kl_prompted_bare": "KL(prompted||bare)", "val_loss": "val loss", "val_rouge_l": "val ROUGE-L",
             "val_bare_loss": "teacher's val loss bare", "val_prompted_loss": "prompted"}  # fmt: skip
    return "  ".join(f"{label} {values[name]:.{1 if name == 'val_rouge_l' else 3}f}" for name, label in shown.items() if name in values)


def clock_time(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def draw_curves(directory):
    """curves.png: losses, and validation ROUGE-L, over steps. Says where it lies, or why there is none."""
    plot = pyplot()
    if plot is None:
        return "no picture without matplotlib"
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    figure, (left, right) = plot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    series = {"loss": "loss", "prompt_kd": "prompt: L_kd", "prompt_reg": "prompt: L_reg", "val_loss": "validation loss"}
    for name, label in series.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            left.plot(*zip(*points), label=label, linewidth=1, marker="o" if name == "val_loss" else None)
    left.set(xlabel="optimizer step", ylabel="nats a token", title=directory.name)
    left.legend()
    points = [(line["step"], line["val_rouge_l"]) for line in lines if "val_rouge_l" in line]
    if points:
        right.plot(*zip(*points), marker="o")
    right.set(xlabel="optimizer step", ylabel="ROUGE-L", title="validation" if points else "no validation by ROUGE-L in this stage")
    figure.savefig(directory / "curves.png", dpi=120)
    plot.close(figure)
    return str(directory / "curves.png")


# ---- the command ---------------------------------------------------------------------------------------------------------------


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a student by PromptKD or a method it is compared with, and the stages that it needs; without options, the demo.",
    )
    positive, rate = in_range(int, 1, 10**9), in_range(float, 0, 10, low_open=True)
    parser.add_argument("--method", choices=sorted(STEPS), default="promptkd")
    parser.add_argument(
        "--student", metavar="MODEL", help="pre-trained student: gpt2, gpt2-medium, gpt2-large, a directory or a hub id (default: the demo's)"
    )
    parser.add_argument("--teacher", metavar="MODEL", help="pre-trained teacher (default gpt2-xl)")
    parser.add_argument("--sft-teacher", metavar="MODEL", help="a teacher that is fine-tuned already; its stage is skipped")
    parser.add_argument("--init", metavar="MODEL", help="a student that is fine-tuned already; its stage is skipped")
    parser.add_argument(
        "--data", metavar="SET|DIR", help="dolly, demo, or a directory with train.jsonl and dev.jsonl (default dolly; without a student demo)"
    )
    parser.add_argument("--out", default="out", metavar="DIR", help="where the runs go (default out)")
    parser.add_argument("--seed", type=in_range(int, 0, 2**32), default=10)
    parser.add_argument("--shape", metavar="LxWxH", help="for --method pretrain: layers, width and heads, as 6x256x8")
    parser.add_argument("--lm-data", metavar="FILE", help="for --method minillm: plain text for its last term, JSON lines with 'text' or a text file")
    parser.add_argument("--prompt-text", metavar="TEXT", help=f"default: {PROMPT['prompt_text']!r}")
    parser.add_argument("--prompt-length", type=in_range(int, 1, 512), metavar="N", help="tokens of the soft prompt (default: the text's own)")
    parser.add_argument("--prompt-init", choices=("text", "padding", "random"))
    parser.add_argument("--reg", type=in_range(float, 0, 1e6), help="weight of the regularisation, equation 2 (default 1; 0: off)")
    parser.add_argument("--prompt-kl", choices=("reverse", "forward"), help="direction of equation 1 (default reverse)")
    parser.add_argument("--reg-kl", choices=("reverse", "forward"), help="direction of equation 2 (default reverse)")
    over = parser.add_argument_group("over the preset of the method's stage")
    over.add_argument("--lr", type=rate)
    over.add_argument("--prompt-lr", type=rate)
    over.add_argument("--epochs", type=positive)
    over.add_argument("--steps", type=positive, help="optimizer steps, instead of what the epochs come to")
    over.add_argument("--global-batch", type=positive, metavar="ROWS")
    over.add_argument("--dropout", type=in_range(float, 0, 0.99))
    parser.add_argument(
        "--keep", type=in_range(int, 0, 10**6), default=0, metavar="N", help="save N checkpoints of the method's run, evenly (Figure 3b)"
    )
    every = parser.add_argument_group("for every stage")
    every.add_argument("--micro-batch", type=positive, metavar="ROWS", help="rows of one forward on one rank (default 8; the demo 32)")
    every.add_argument("--train-rows", type=positive, metavar="N", help="only the first N training rows")
    every.add_argument("--save-every", type=positive, metavar="STEPS", help="save the state so often, too (default: at validations alone)")
    every.add_argument("--dev-rows", type=positive, metavar="N", help="only the first N validation rows")
    add_precision_option(every)
    return parse_arguments(parser, argv)


OVERRIDES = ("lr", "prompt_lr", "epochs", "steps", "global_batch", "dropout", "lm_data", "prompt_text", "prompt_length", "prompt_init", "reg",
             "prompt_kl", "reg_kl")  # fmt: skip


def run_directory(name):
    """Where the run lies that a model is of: `best/` belongs to the directory around it."""
    path = Path(name).resolve()
    return path.parent if path.name == "best" else path


def record_of(name):
    """The run.json of a model that is a run of ours, {} of any other."""
    return read_record(run_directory(name)) or {}


def label_of(name):
    """A model's short name, for naming what is made from it: gpt2-xl, or of a stage before, that of the model that it started from."""
    path, record = run_directory(name), record_of(name)
    if record and record["name"].startswith(("pretrain-", "init-", "teacher-")):
        start = record["settings"].get("student")
        if not isinstance(start, str):
            raise InputError(f"{path / 'run.json'}: does not say what model the run started from ('student'); remove {path} and train it again")
        if Path(start).resolve() != path:  # it may: a run of gpt2, copied to a folder `gpt2`
            return label_of(start)
    return path.name


def named(option, value):
    """An override in a run's name, as -lr0.001: short, and without a path's or a sentence's letters."""
    if option == "prompt_text":
        value = f"{zlib.crc32(value.encode('utf-8', 'surrogatepass')):08x}"
    if option == "lm_data":
        value = Path(value).stem
    return f"-{option.replace('_', '')}{value}"


def paper_row(kind, values, given):
    """Which of the paper's rows a stage is: "promptkd base", or None where anything differs from the paper's."""
    start, pre_trained = values["student"], dict(zip(OFFICIAL_MODELS, SIZES))
    if kind in FROM_INIT:
        of, _, size = (record_of(start).get("paper") or "  ").partition(" ")
        as_the_paper = of == "init"
    else:
        size = pre_trained.get(start)
        as_the_paper = size is not None
    as_the_paper &= values["data"] == "dolly" and not (values["train_rows"] or values["dev_rows"])
    as_the_paper &= set(given) == ({"lm_data"} if kind == "minillm" else set())
    as_the_paper &= values["teacher"] is None or record_of(values["teacher"]).get("paper") == "teacher xl"
    return f"{kind} {size}" if as_the_paper else None


def check_idle(args):
    """Raise InputError where an option was given that the method does not use, or one with nothing in it."""
    for name, value in vars(args).items():
        if value == "":
            raise InputError(f"--{name.replace('_', '-')} is empty; give something, or leave it out")
    idle = [name for name in OVERRIDES if name.startswith(("prompt", "reg"))] if args.method != "promptkd" else []
    idle += ["shape"] if args.method != "pretrain" else ["student"]
    idle += ["teacher", "sft_teacher"] if args.method in ("pretrain", "sft") else ["teacher"] if args.sft_teacher else []
    idle += ["init"] if args.method in ("pretrain", "sft", "kd", "seqkd") else ["student"] if args.init else []
    idle += ["lm_data"] if args.method != "minillm" else []
    for name in idle:
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} has no effect here (method {args.method}); leave it out")


def check_inputs(args, home, teacher, student):
    """Raise InputError or CheckpointError where an input of a later stage is wrong, before the earlier ones take their hours.

    home: the data's directory. teacher, student: names of models, None where the demo makes its own.
    """
    read_rows(home / "dev.jsonl", args.dev_rows)
    if args.lm_data is not None:
        ranks.on_first(lambda: len(read_texts(args.lm_data)))
    tokenizers = [find_model(name)[1] for name in (teacher, student) if name]
    if tokenizers and not same_tokens(tokenizers[0], tokenizers[-1]):
        raise InputError(f"teacher {teacher} and student {student} have different tokenizers; a KL over the vocabulary needs one for both")


def check_shape(shape):
    """Raise InputError where --shape is none, or none that memory holds or a checkpoint may have."""
    if shape is None:
        raise InputError("--method pretrain needs --shape LAYERSxWIDTHxHEADS, as in --shape 6x256x8")
    config = config_of_shape(shape, 1, 0.0)
    if config.n_layer > 1000 or 12 * config.n_layer * config.n_embd**2 > 10**10:
        raise InputError(f"--shape {shape}: is of more than 1,000 layers or 10 billion parameters; give a smaller one, as in 6x256x8")


def main(argv=None):
    args = parse(argv)
    check_out(args.out)
    (device, dtype), started = ranks.start(args.dtype), time.perf_counter()
    check_idle(args)
    if args.method == "pretrain":
        check_shape(args.shape)
    data = args.data or ("dolly" if args.student or args.teacher or args.init or args.sft_teacher else "demo")
    demo = data == "demo"
    data_label = ("" if data == "dolly" else f"-{Path(data).name}") + (f"-{args.train_rows}rows" if args.train_rows else "")
    given = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    home = ranks.on_first(data_directory, data)  # before any model is downloaded

    def stage(kind, model, teacher=None, responses=None):
        """Run one stage on a model: its preset, under the options given if it is the method's own."""
        name, own = f"{kind}-{label_of(model)}{data_label}", given if kind == args.method else {}
        if kind == "pretrain":
            values = DEMO.get(model, PRETRAIN) if demo else PRETRAIN
        else:
            values = DEMO[kind] if demo else preset(kind, model)
        if kind == args.method:
            values |= {"seed": args.seed}
            name += "".join(named(option, value) for option, value in own.items())
            name += f"-s{args.seed}" if kind != "pretrain" or args.seed != 10 else ""
        values = {"method": "sft" if kind in ("teacher", "init") else kind, "student": model, "teacher": teacher, "data": data,
                  "responses": responses, "dtype": dtype, "train_rows": args.train_rows, "dev_rows": args.dev_rows, **values, **own}  # fmt: skip
        keep, micro_batch = args.keep if kind == args.method else 0, args.micro_batch or (32 if demo else 8)
        return run_stage(name, Settings(**values), args.out, micro_batch, device, paper_row(kind, values, own), keep, args.save_every)

    if args.method == "pretrain":
        stage("pretrain", args.shape)
    else:
        from_init = args.method in FROM_INIT
        teacher = None if args.method == "sft" else args.sft_teacher or args.teacher or (None if demo else "gpt2-xl")
        student = args.init or args.student or (None if demo else "gpt2")
        responses = None
        check_inputs(args, home, teacher, student)
        if args.method != "sft":
            teacher = args.sft_teacher or stage("teacher", teacher or stage("pretrain", DEMO_TEACHER))
        student = student or stage("pretrain", DEMO_STUDENT)
        if from_init and not args.init:
            student = stage("init", student)
        if args.method == "seqkd":
            s = {
                "student": teacher,
                "data": data,
                "train_rows": args.train_rows,
                "max_new": DEMO["seqkd"]["max_new"] if demo else MAX_NEW,
                "seed": 10,
                "dtype": dtype,
            }
            responses = sample_responses(f"responses-{label_of(teacher)}{data_label}", s, args.out, device)
        trained = stage(args.method, student, teacher, responses)
        if demo:
            models = {"teacher": teacher, "student's init": student if from_init else None, args.method: trained}
            show_demo({label: model for label, model in models.items() if model}, device, dtype)
            say(f"Curves: {Path(trained) / 'curves.png'}. All of it took {clock_time(time.perf_counter() - started)}.")
    ranks.stop()


def show_demo(models, device, dtype):
    """The demo's table: models on the test set and on the sets unlike what they were trained on."""
    scores = evaluate_models(models, open_sets(["demo"]), [10, 20, 30], device, max_new=DEMO["promptkd"]["max_new"], dtype=dtype)
    say("\n" + lay_out(table(with_averages(scores))))
    say("Mean ± standard deviation over three sampling seeds. The sets behind `test` have wordings, words, lengths and combinations of tasks")
    say("that no fine-tuning row has. Both models were pre-trained on packed text in which many rows stand behind sentences like")
    say(f"{PROMPT['prompt_text']!r}, so that the prompt, before it is tuned, costs the teacher little.")


if __name__ == "__main__":
    command(main, CheckpointError)
