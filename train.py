"""PromptKD (Kim, Jang and Yang, Findings of EMNLP 2024): Algorithm 1, the methods it is compared with, the stages before them, and the
loop around them.

python train.py                                        the demo: offline, CPU or GPU, minutes
torchrun --nproc_per_node=8 train.py --student gpt2    the paper's main result, every stage of it
"""

from data.threads import configure_threads

configure_threads()  # before torch is imported

import json
import math
import shutil
import signal
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from data import dist
from data.cli import InputError, check_output_dir, run_command_line, write_atomic
from data.dist import print0
from data.models import load_model
from data.options import OVERRIDES, check_shape, check_unused_options, parse_shape, parse_train_args
from data.paper import (
    DEMO,
    DEMO_STUDENT,
    DEMO_TEACHER,
    FROM_INIT,
    PRETRAIN,
    PROMPT,
    paper_row,
    preset,
)
from data.prepare import find_data_dir
from data.report import format_table, table
from data.rows import (
    MAX_NEW_TOKENS,
    RolloutRow,
    encode_training_rows,
    epoch_order,
    micro_batches,
    read_rows,
)
from data.runs import (
    Log,
    Settings,
    base_label,
    describe,
    finish,
    format_seconds,
    memory,
    open_run,
    override_suffix,
    save_checkpoint,
)
from data.stages import (
    check_finite,
    check_later_inputs,
    check_positions,
    data_files,
    load_data,
    read_lm_blocks,
)
from data.states import load_state, save_state
from data.tokenizer import same_vocabulary
from evaluate import add_averages, evaluate, evaluate_models, mean_rouge_l, open_sets
from losses import (
    cross_entropy,
    importance_weight,
    kd_loss,
    kl,
    minillm_loss,
    minillm_returns,
    prompt_loss,
    student_loss,
    sum_over_tokens,
    token_log_probs,
    whiten,
)
from model import GPT, precision
from prompt import freeze, initial_prompt, teacher_hidden
from sample import sample_all, sample_to_file

CLIP, LEAST_LR = 1.0, 1e-7


TEACHER_SHARE = 0.2  # α of MiniLLM's mixed sampling


def learning_rate(peak, step, total_steps, schedule, warmup_steps):
    """The rate at a step from 0: a linear warm-up, then constant, or a cosine down to 1e-7."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    return (
        LEAST_LR
        + (peak - LEAST_LR)
        * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))
        / 2
    )


# ---- a run, and one step of each method ---------------------------------------------------------------------------------------
@dataclass
class Run:
    """What a step works on: the student q with parameters θ, the frozen teacher p, the soft prompt P."""

    settings: Settings
    total_steps: int  # T, optimizer steps
    global_batch_size: int  # rows of an optimizer step, over all ranks
    micro_batch_size: int
    device: torch.device
    tokenizer: object
    student: torch.nn.Module  # bare, for sampling and targets
    ddp_student: torch.nn.Module  # the same under DDP, for the passes with gradients
    optimizer: torch.optim.Optimizer
    teacher: torch.nn.Module | None = None
    P: torch.Tensor | None = None
    prompt_optimizer: torch.optim.Optimizer | None = None
    rollout_steps: int = 1  # optimizer steps on each rollout
    rollout: list | None = None  # MiniLLM's rows, of all ranks
    text: list | None = None  # MiniLLM's plain text, in blocks
    clock: dict | None = None  # seconds by phase


@torch.no_grad()
def response_hidden(model, batch, P=None):
    """What a model as it stands, behind the prompt P if there is one, says of the response tokens, without gradient or dropout: the
    hidden states (N, C) that predict them, and its head (V, C)."""
    return teacher_hidden(model.eval(), batch.ids, P, batch.response_positions), model.wte.weight


def split_global_batch(run, examples):
    """The global batch as this rank's micro-batches, and the number of response tokens in all of it, over all ranks.

    The window, not the micro-batch, is what the losses are averaged over.
    """
    batches = micro_batches(examples, run.micro_batch_size, run.device)
    n_tokens = dist.all_reduce_sum(
        torch.tensor(sum(len(b.targets) for b in batches), device=run.device)
    )
    return batches, max(1, int(n_tokens))


def backward(run, loss_fn, batches, n_tokens):
    """Student gradients of the sum of per-token losses over the window, divided by its number of tokens.

    loss_of: batch -> the loss and the targets that it compares with, as sum_over_tokens takes them. Ranks exchange gradients at the last
    micro-batch only; DDP averages them over the ranks, which is undone. Returns the loss, over all ranks.
    """
    total = torch.zeros((), device=run.device)
    for batch in batches:
        last = batch is batches[-1]
        with nullcontext() if last or run.ddp_student is run.student else run.ddp_student.no_sync():
            with precision(run.device, run.settings.dtype):
                hidden = run.ddp_student(
                    batch.ids, output_positions=batch.response_positions
                )  # (N, C): only what predicts a response token meets the head
                loss, *targets = loss_fn(batch)
                loss = sum_over_tokens(loss, hidden, run.student.wte.weight, *targets) / n_tokens
            (loss * dist.world_size()).backward()
        total += loss.detach()
    return dist.all_reduce_sum(total)


def clip_and_step(optimizer):
    """Clip the gradients at norm 1, step, and clear them. Returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], CLIP
    )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def record_time(run, name):
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
    norm = clip_and_step(run.optimizer)
    record_time(run, "student")
    return {**losses, "grad_norm": norm, "response_tokens": terms["loss"][2]}


def rollout(run, examples, t, teacher_mix=None):
    """Responses y ~ q_θ(y | x) to the requests of the whole window at once; no gradient. The student does not change inside a window."""
    run.student.eval()
    keys = [(run.settings.seed, "rollout", t, e.index) for e in examples]
    requests, s = [e.request for e in examples], run.settings
    responses, _ = sample_all(
        run.student,
        requests,
        keys,
        run.tokenizer.eot_token,
        s.max_new_tokens,
        teacher_mix=teacher_mix,
        dtype=s.dtype,
    )
    record_time(run, "sampling")
    return [replace(e, response=y) for e, y in zip(examples, responses)]


def promptkd_step(run, examples, t):
    """Algorithm 1 of PromptKD, one iteration t of T. The equation numbers are the paper's."""
    s, q, p = run.settings, run.student, run.teacher
    batches, n_tokens = split_global_batch(run, rollout(run, examples, t))  # y ~ q_θ(y | x)
    lam = 1 - t / run.total_steps  # λ, from exactly 1 towards 0

    # Prompt tuning: a student-friendly teacher. Gradient to P only.
    sums = torch.zeros(4, device=run.device)
    for b in batches:
        with precision(run.device, s.dtype):
            h_pP = teacher_hidden(p, b.ids, run.P, b.response_positions)  # of p(y | P, x)

            def L_P(i, pP_logits, q_logits, p_logits):
                losses = prompt_loss(
                    pP_logits, q_logits, p_logits, lam, s.reg_weight, s.prompt_kl, s.reg_kl
                )  # (1), (2), (3)
                drift = (
                    losses[2] if s.reg_kl == "reverse" else kl(pP_logits, p_logits)
                )  # KL(p(y | P, x) || p(y | x))
                return torch.stack([*losses, drift])

            L = (
                sum_over_tokens(
                    L_P, h_pP, p.wte.weight, response_hidden(q, b), response_hidden(p, b)
                )
                / n_tokens
            )  # q(y | x), p(y | x)
        L[0].backward()
        sums += L.detach()
    dist.all_reduce_sum(run.P.grad)
    prompt_norm = clip_and_step(run.prompt_optimizer)
    record_time(run, "prompt")

    # Distillation from the teacher behind the prompt just updated. Gradient to θ only.
    def L_theta(b):
        return lambda i, q_logits, pP_logits: student_loss(q_logits, pP_logits), response_hidden(
            p, b, run.P
        )  # (4)

    values = train_student(run, loss=(L_theta, batches, n_tokens))
    prompt_losses = dict(
        zip(
            ("prompt_loss", "prompt_kd", "prompt_reg", "kl_prompted_bare"),
            dist.all_reduce_sum(sums),
        )
    )
    return {**values, **prompt_losses, "prompt_grad_norm": prompt_norm, "lambda": lam}


def gkd_step(run, examples, t):
    """GKD (Agarwal et al. 2024) as the paper runs it: PromptKD without the prompt."""
    p = run.teacher
    batches, n_tokens = split_global_batch(run, rollout(run, examples, t))  # y ~ q_θ(y | x)

    def L_theta(b):
        return lambda i, q_logits, p_logits: student_loss(q_logits, p_logits), response_hidden(
            p, b
        )  # KL(q(y | x) || p(y | x))

    return train_student(run, loss=(L_theta, batches, n_tokens))


def sft_step(run, examples, t):
    """Cross-entropy on the rows' own responses. Pre-training is the same, on packed rows."""

    def L_theta(b):
        return [lambda i, q_logits: cross_entropy(q_logits, b.targets[i])]

    return train_student(run, loss=(L_theta, *split_global_batch(run, examples)))


def kd_loss_fn(run):
    """KD's loss, for `backward`."""

    def L_theta(b):
        return lambda i, q_logits, p_logits: kd_loss(
            q_logits, p_logits, b.targets[i]
        ), response_hidden(run.teacher, b)

    return L_theta


def kd_step(run, examples, t):
    """KD (Hinton et al. 2015), cross-entropy and forward KL to the teacher on the rows' own responses. SeqKD (Kim and Rush 2016) is the
    same on responses that the teacher gave."""
    return train_student(run, loss=(kd_loss_fn(run), *split_global_batch(run, examples)))


def minillm_step(run, examples, t):
    """MiniLLM (Gu et al. 2024): several optimizer steps on each rollout, by policy gradient and the exact KL of the single step; and
    KD's loss on plain text, where there is some."""
    s, n = run.settings, run.global_batch_size
    if t % run.rollout_steps == 0:
        run.rollout = minillm_rollout(run, examples, t)
    inner_epoch, k = divmod(t, len(run.rollout) // n)
    order = epoch_order(len(run.rollout), s.seed, inner_epoch)
    rows = [run.rollout[i] for i in order[k * n : (k + 1) * n]]

    def L_theta(b):
        tokens = (
            torch.tensor(
                [v for e in b.examples for v in e.tokens], dtype=torch.float64, device=run.device
            )
            .float()
            .view(-1, 3)
        )

        return lambda i, q_logits, p_logits: minillm_loss(
            q_logits, p_logits, b.targets[i], *tokens[i].T
        ), response_hidden(run.teacher, b)

    terms = {"loss": (L_theta, *split_global_batch(run, dist.shard(rows)))}
    if run.text:
        blocks = [run.text[(t * n + i) % len(run.text)] for i in range(n)]
        terms["lm_loss"] = (kd_loss_fn(run), *split_global_batch(run, dist.shard(blocks)))
    return train_student(run, **terms)


@torch.no_grad()
def minillm_rollout(run, examples, t):
    """Responses from student and teacher mixed, token by token, to these requests of all ranks, scored. Sampled once for all inner epochs."""
    rows = []
    for b in micro_batches(
        rollout(run, examples, t, teacher_mix=(run.teacher, TEACHER_SHARE)),
        run.micro_batch_size,
        run.device,
    ):
        with precision(run.device, run.settings.dtype):
            log_q, log_p = (
                token_log_probs(*response_hidden(model, b), b.targets).cpu()
                for model in (run.student, run.teacher)
            )
        lengths = [len(e.response) for e in b.examples]
        rows += zip(b.examples, log_q.split(lengths), log_p.split(lengths))
    examples, log_q, log_p = zip(
        *sorted(dist.all_gather_list(rows), key=lambda row: row[0].index)
    )  # of all ranks
    R = whiten(
        torch.cat([minillm_returns(of_p, of_q) for of_p, of_q in zip(log_p, log_q)])
    )  # (M,), over the M tokens of all rows
    w = importance_weight(torch.cat(log_p), torch.cat(log_q), TEACHER_SHARE)
    tokens = torch.stack([torch.cat(log_q), w, R], dim=1).split([len(e.response) for e in examples])
    record_time(run, "scoring")
    return [
        RolloutRow(e.index, e.request, e.response, of_row.tolist())
        for e, of_row in zip(examples, tokens)
    ]


STEPS = {
    "pretrain": sft_step,
    "sft": sft_step,
    "kd": kd_step,
    "seqkd": kd_step,
    "minillm": minillm_step,
    "gkd": gkd_step,
    "promptkd": promptkd_step,
}


# ---- validation ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def validation_loss(run, model, examples, P=None):
    """Cross-entropy of a model (behind the prompt P) over the response tokens of examples, without dropout, over all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    for b in micro_batches(dist.shard(examples), run.micro_batch_size, run.device):
        with precision(run.device, run.settings.dtype):
            sums[0] -= token_log_probs(*response_hidden(model, b, P), b.targets).sum()
        sums[1] += len(b.targets)
    loss, n_tokens = dist.all_reduce_sum(sums).tolist()
    return loss / max(1, n_tokens)


def validate(run, rows, examples):
    """The student's loss on the validation rows, ROUGE-L of its responses, sampled with the same random numbers every time, and the
    loss of the prompted teacher."""
    values = {"val_loss": validation_loss(run, run.student, examples)}
    if run.settings.metric_for_best == "rouge_l" and math.isfinite(
        values["val_loss"]
    ):  # what has diverged can't be sampled from
        s = run.settings
        how = {"label": "validation", "max_new_tokens": s.max_new_tokens, "dtype": s.dtype}
        values["val_rouge_l"] = mean_rouge_l(
            evaluate(run.student, run.tokenizer, rows, (s.seed, "validate"), **how)
        )
    if run.P is not None:
        values["val_prompted_loss"] = validation_loss(run, run.teacher, examples, run.P)
    return values


def build(s, total_steps, global_batch_size, tokenizer, micro_batch_size, device):
    """The Run of a stage: models, prompt and optimizers, before the first step."""
    if s.method == "pretrain":
        student = (
            GPT(parse_shape(s.student, tokenizer.n_vocab, s.dropout)).initialise(s.seed).to(device)
        )
    else:
        student, _ = load_model(s.student, device, s.dropout)
    ddp_student = student
    if torch.distributed.is_initialized():
        ddp_student = DistributedDataParallel(
            student,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        # DDP lays its buckets anew behind its first pass, and the order in which more than two ranks' gradients are summed hangs on them:
        # a pass for nothing, so that a run that goes on sums as one that was never stopped.
        ddp_student(torch.zeros(1, 1, dtype=torch.long, device=device)).sum().backward()
        student.zero_grad(set_to_none=True)
    run = Run(
        s,
        total_steps,
        global_batch_size,
        micro_batch_size,
        device,
        tokenizer,
        student,
        ddp_student,
        adamw(student.parameters(), s),
    )
    if s.teacher is not None:
        teacher, teacher_tokenizer = load_model(s.teacher, device)
        if not same_vocabulary(teacher_tokenizer, tokenizer):
            raise InputError(
                f"teacher {s.teacher} and student {s.student} have different tokenizers; a KL over the vocabulary needs one for both"
            )
        run.teacher = freeze(teacher, s.dtype)
    if s.method == "promptkd":
        text = tokenizer.encode_ordinary(s.prompt_text)
        if not text:
            raise InputError("--prompt-text is empty; give a sentence")
        P = initial_prompt(
            run.teacher.wte.weight,
            s.prompt_init,
            s.prompt_length or len(text),
            text,
            tokenizer.eot_token,
            s.seed,
        )
        run.P = P.to(device).requires_grad_()
        run.prompt_optimizer = adamw([run.P], s)
    if s.lm_data is not None:
        run.text = read_lm_blocks(s, tokenizer, total_steps * global_batch_size)
    return run


def adamw(parameters, s):
    """AdamW with weight decay on matrices, not on biases and LayerNorm."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(0.9, s.beta2),
        weight_decay=s.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def check_prompt(run, dev_rows, dev_examples):
    """Validation before the first step, for the log. Warns of a prompt that harms the teacher: one that does is hardly ever repaired."""
    values = {
        "step": 0,
        **validate(run, dev_rows, dev_examples),
        "val_bare_loss": validation_loss(run, run.teacher, dev_examples),
    }
    print0(f"before: {describe(values)}")
    if (harm := values["val_prompted_loss"] - values["val_bare_loss"]) > 0.1:
        cost = f"the prompt costs the teacher {harm:.2f} nats a token before it is tuned"
        print0(f"warning: {cost}, and the student will follow; try another --prompt-text")
    return values


def run_stage(name, s, out, micro_batch_size, device, paper=None, keep=0, save_every=None):
    """Train one stage in `out/name`, or go on with it where it stopped, or skip it where it is complete. Returns its directory.

    paper: which of the paper's rows this is, for run.json. keep: how many checkpoints to save, evenly, in `kept/`. save_every: steps
    between states, beside those at validations. SIGTERM or SIGINT, to any rank, ends the process behind the step that it falls in, with
    its state saved and status 128 + signal.
    """
    directory = Path(out) / name
    record = dist.run_on_rank0(
        open_run, directory, {"name": name, "paper": paper, "settings": asdict(s)}, data_files(s)
    )
    if "hours" in record:
        print0(f"{directory}: complete, skipped")
        return str(directory)

    if device.type == "cuda":  # the memory reported is this stage's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    tokenizer, dev_rows, epoch_examples = load_data(s)
    dev_examples, examples = encode_training_rows(dev_rows, tokenizer), epoch_examples(0)
    if not examples:
        raise InputError(
            f"data {s.data}: train.jsonl is too little to train on; give more or shorter rows"
        )
    if not dev_examples:
        raise InputError(
            f"data {s.data}: every validation row's request is over the limit; give shorter ones in dev.jsonl"
        )
    global_batch_size = min(s.global_batch_size, len(examples))
    if global_batch_size < dist.world_size():
        raise InputError(
            f"a global batch of {global_batch_size} rows can't be divided among {dist.world_size()} ranks; start fewer, or raise --global-batch"
        )
    rollout_size = min(max(global_batch_size, s.rollout_size or 0), len(examples))
    rollout_steps = s.inner_epochs * (
        rollout_size // global_batch_size
    )  # optimizer steps on each rollout: 1, but for MiniLLM
    per_epoch = len(examples) // rollout_size * rollout_steps
    total_steps = s.steps or min(per_epoch * s.epochs, s.max_steps or math.inf)
    run = build(s, total_steps, global_batch_size, tokenizer, micro_batch_size, device)
    run.rollout_steps = rollout_steps
    check_positions(run, [*examples, *dev_examples])
    dist.run_on_rank0(write_atomic, directory / "run.json", json.dumps(record, indent=1) + "\n")
    done = load_state(run, directory)
    first, log = done["step"], Log(directory / "metrics.jsonl", done["step"])
    if first and done["best_step"] == first:  # written behind the state, so it may be missing
        save_checkpoint(run, directory / "best")

    record |= {
        "parameters": run.student.n_parameters(),
        "total_steps": total_steps,
        "ranks": dist.world_size(),
        "device": device.type,
    }
    going_on = f", going on behind step {first:,}" if first else ""
    print0(
        f"\n{directory}: {s.method}, {record['parameters']:,} parameters, {len(examples):,} rows, {total_steps:,} steps of {global_batch_size}{going_on}"
    )
    if run.P is not None:
        record |= {
            "prompt_length": len(run.P),
            "prompt_numbers": run.P.numel(),
            "prompt_share": run.P.numel() / run.teacher.n_parameters(),
        }
        size = f"{len(run.P)} × {run.P.shape[1]} = {run.P.numel():,} numbers"
        print0(
            f"prompt: {size}, {100 * record['prompt_share']:.4f} % of the teacher's {run.teacher.n_parameters():,} parameters"
        )
    if run.P is not None and first == 0:
        log.write(check_prompt(run, dev_rows, dev_examples))

    begin, hours, shown, at = time.perf_counter(), done["hours"], 0.0, 0
    with dist.defer_signals() as signals:
        for t in range(first, total_steps):
            epoch, k = divmod(t, per_epoch)
            if epoch != at:
                examples, at = epoch_examples(epoch), epoch
            start = k // rollout_steps * rollout_size
            line = {
                "step": t + 1,
                "epoch": (t + 1) / per_epoch,
                **step(run, dist.shard(examples[start : start + rollout_size]), t),
            }
            check_finite(directory, line)
            validating = (t + 1) % (s.eval_interval or per_epoch) == 0 or t + 1 == total_steps
            if validating:
                line |= validate(run, dev_rows, dev_examples)
                check_finite(directory, line)
                score = line["val_rouge_l"] if s.metric_for_best == "rouge_l" else -line["val_loss"]
                if done["best"] is None or score > done["best"]:
                    done |= {"best": score, "best_step": t + 1}
            if (t + 1) * keep // total_steps > t * keep // total_steps:
                save_checkpoint(run, directory / "kept" / f"step-{t + 1:06d}")
            log.write(line)
            elapsed = time.perf_counter() - begin
            done |= {"step": t + 1, "hours": hours + elapsed / 3600}
            stop = dist.all_reduce_max(max(signals, default=0))
            if validating or stop or (t + 1) % (save_every or total_steps) == 0:
                save_state(run, directory, done)
            if done["best_step"] == t + 1:  # behind the state, from which it can be written again
                save_checkpoint(run, directory / "best")
            if validating or time.perf_counter() - shown > 5:
                shown, left = (
                    time.perf_counter(),
                    format_seconds(elapsed / (t + 1 - first) * (total_steps - t - 1)),
                )
                print0(
                    f"step {t + 1:,}/{total_steps:,}  {describe(line)}  {line['tokens_per_second']:,.0f} tokens/s  {left} left"
                )
            if stop:
                print0(
                    f"{directory}: stopped by {signal.Signals(stop).name}, saved at step {t + 1:,}; the same command goes on from there"
                )
                sys.exit(128 + stop)

    record |= {"best": abs(done["best"]), "best_step": done["best_step"], "hours": done["hours"]}
    picture = dist.run_on_rank0(finish, directory, record)
    print0(
        f"{directory}: done in {format_seconds(3600 * record['hours'])}, best {s.metric_for_best} {record['best']:.2f}; {picture}"
    )
    return str(directory)


def step(run, rows, t):
    """One optimizer step on this rank's rows, and what metrics.jsonl says of it."""
    s = run.settings
    torch.manual_seed(
        zlib.crc32(repr((s.seed, t, dist.rank())).encode())
    )  # dropout; nothing to save for going on
    run.clock = {"since": time.perf_counter()}
    values = {
        "lr": set_learning_rate(
            run.optimizer, learning_rate(s.lr, t, run.total_steps, s.schedule, s.warmup_steps)
        )
    }
    if run.P is not None:
        values["prompt_lr"] = set_learning_rate(
            run.prompt_optimizer,
            learning_rate(s.prompt_lr, t, run.total_steps, s.schedule, s.warmup_steps),
        )
    values |= {name: float(value) for name, value in STEPS[s.method](run, rows, t).items()}
    del run.clock["since"]
    return values | {
        "tokens_per_second": values["response_tokens"] / sum(run.clock.values()),
        "seconds": run.clock,
        **memory(run.device),
    }


def sample_responses(name, s, out, device):
    """SeqKD's data: the responses of a teacher to the training requests, sampled once, as a data directory. Returns it.

    s: what they hang on, {"student": the teacher, "data", "max_train_rows", "max_new_tokens", "seed", "dtype"}.
    """
    directory = Path(out) / name
    begin, source = time.perf_counter(), dist.run_on_rank0(find_data_dir, s["data"])
    described = {"name": name, "settings": {"method": "responses", **s}}
    record = dist.run_on_rank0(open_run, directory, described, [source / "train.jsonl"])
    if "hours" in record:
        print0(f"{directory}: complete, skipped")
        return str(directory)
    model, tokenizer = load_model(s["student"], device)
    rows = read_rows(source / "train.jsonl", s["max_train_rows"])
    dist.run_on_rank0(write_atomic, directory / "run.json", json.dumps(record, indent=1) + "\n")
    print0(f"\n{directory}: sampling the responses of {s['student']} to {len(rows):,} requests")
    if not dist.run_on_rank0((directory / "train.jsonl").is_file):
        key, path = (s["seed"], "responses"), directory / "train.jsonl"
        sample_to_file(
            freeze(model, s["dtype"]), tokenizer, rows, key, path, s["max_new_tokens"], s["dtype"]
        )
    if dist.rank() == 0:
        for file in ("dev.jsonl", "test.jsonl"):
            if (source / file).is_file():
                shutil.copyfile(source / file, directory / file)
        write_atomic(
            directory / "run.json",
            json.dumps(record | {"hours": (time.perf_counter() - begin) / 3600}, indent=1) + "\n",
        )
    dist.barrier()
    return str(directory)


def main(argv=None):
    args = parse_train_args(argv, STEPS)
    check_output_dir(args.out)
    (device, dtype), started = dist.init_process(args.dtype), time.perf_counter()
    check_unused_options(args)
    if args.method == "pretrain":
        check_shape(args.shape)
    data = args.data or (
        "dolly" if args.student or args.teacher or args.init or args.sft_teacher else "demo"
    )
    demo = data == "demo"
    data_label = ("" if data == "dolly" else f"-{Path(data).name}") + (
        f"-{args.train_rows}rows" if args.train_rows else ""
    )
    overrides = {
        option: getattr(args, option) for option in OVERRIDES if getattr(args, option) is not None
    }
    home = dist.run_on_rank0(find_data_dir, data)  # before any model is downloaded

    def stage(kind, model, teacher=None, responses=None):
        """Run one stage on a model: its preset, under the options given if it is the method's own."""
        name, own = (
            f"{kind}-{base_label(model)}{data_label}",
            overrides if kind == args.method else {},
        )
        if kind == "pretrain":
            values = DEMO.get(model, PRETRAIN) if demo else PRETRAIN
        else:
            values = DEMO[kind] if demo else preset(kind, model)
        if kind == args.method:
            values |= {"seed": args.seed}
            name += "".join(override_suffix(option, value) for option, value in own.items())
            name += f"-s{args.seed}" if kind != "pretrain" or args.seed != 10 else ""
        values = {
            "method": "sft" if kind in ("teacher", "init") else kind,
            "student": model,
            "teacher": teacher,
            "data": data,
            "responses": responses,
            "dtype": dtype,
            "max_train_rows": args.train_rows,
            "max_dev_rows": args.dev_rows,
            **values,
            **{OVERRIDES[option]: value for option, value in own.items()},
        }
        keep, micro_batch_size = (
            args.keep if kind == args.method else 0,
            args.micro_batch or (32 if demo else 8),
        )
        return run_stage(
            name,
            Settings(**values),
            args.out,
            micro_batch_size,
            device,
            paper_row(kind, values, own),
            keep,
            args.save_every,
        )

    if args.method == "pretrain":
        stage("pretrain", args.shape)
    else:
        from_init = args.method in FROM_INIT
        teacher = (
            None
            if args.method == "sft"
            else args.sft_teacher or args.teacher or (None if demo else "gpt2-xl")
        )
        student = args.init or args.student or (None if demo else "gpt2")
        responses = None
        check_later_inputs(args, home, teacher, student)
        if args.method != "sft":
            teacher = args.sft_teacher or stage(
                "teacher", teacher or stage("pretrain", DEMO_TEACHER)
            )
        student = student or stage("pretrain", DEMO_STUDENT)
        if from_init and not args.init:
            student = stage("init", student)
        if args.method == "seqkd":
            s = {
                "student": teacher,
                "data": data,
                "max_train_rows": args.train_rows,
                "max_new_tokens": DEMO["seqkd"]["max_new_tokens"] if demo else MAX_NEW_TOKENS,
                "seed": 10,
                "dtype": dtype,
            }
            responses = sample_responses(
                f"responses-{base_label(teacher)}{data_label}", s, args.out, device
            )
        trained = stage(args.method, student, teacher, responses)
        if demo:
            models = {
                "teacher": teacher,
                "student's init": student if from_init else None,
                args.method: trained,
            }
            show_demo({label: model for label, model in models.items() if model}, device, dtype)
            print0(
                f"Curves: {Path(trained) / 'curves.png'}. All of it took {format_seconds(time.perf_counter() - started)}."
            )
    dist.shutdown()


def show_demo(models, device, dtype):
    """The demo's table: models on the test set and on the sets unlike what they were trained on."""
    scores = evaluate_models(
        models,
        open_sets(["demo"]),
        [10, 20, 30],
        device,
        max_new_tokens=DEMO["promptkd"]["max_new_tokens"],
        dtype=dtype,
    )
    print0("\n" + format_table(table(add_averages(scores))))
    print0(
        "Mean ± standard deviation over three sampling seeds. The sets behind `test` have wordings, words, lengths and combinations of tasks"
    )
    print0(
        "that no fine-tuning row has. Both models were pre-trained on packed text in which many rows stand behind sentences like"
    )
    print0(
        f"{PROMPT['prompt_text']!r}, so that the prompt, before it is tuned, costs the teacher little."
    )


if __name__ == "__main__":
    run_command_line(main)
