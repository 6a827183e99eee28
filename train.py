"""PromptKD (Kim, Jang and Yang, Findings of EMNLP 2024) and the methods it is compared with.

python train.py                                        the demo: offline, CPU or GPU, minutes
torchrun --nproc_per_node=8 train.py --student gpt2    the paper's main result, all its stages
"""

from data.threads import configure_threads

configure_threads()  # before torch is imported

import math
import signal
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

import losses
from data import demo, dist, options, runs, stages
from data.cli import check_output_dir, run_command_line
from data.dist import print0
from data.models import load_model
from data.optim import adamw, clip_and_step, set_learning_rates
from data.prepare import find_data_dir
from data.rows import Example, epoch_order, micro_batches
from data.runs import Settings, format_time
from data.states import load_state, save_state
from data.tokenizer import check_same_vocabulary
from data.validation import check_prompt, check_references, checkpoint_score, show_demo, validate
from model import GPT, precision
from prompt import freeze, hidden_states, response_hidden, untuned_prompt
from sample import sample_all

TEACHER_MIX = 0.2  # MiniLLM's α, the share of the teacher in the mixture that responses come from


@dataclass
class Run:
    """What a step works on: the student q with parameters θ, the teacher p, the soft prompt P."""

    settings: Settings
    total_steps: int  # T, optimizer steps
    global_batch_size: int  # rows per optimizer step, over all ranks
    micro_batch_tokens: int  # positions per forward pass of one rank, padding and prompt included
    device: torch.device
    tokenizer: object  # a tiktoken.Encoding
    student: GPT  # the bare module, for sampling and as a target of the prompt's loss
    ddp_student: torch.nn.Module  # the student under DDP, or itself without torchrun; for training
    optimizer: torch.optim.Optimizer
    teacher: GPT | None = None  # frozen
    P: torch.Tensor | None = None  # (prompt_length, C of the teacher)
    prompt_optimizer: torch.optim.Optimizer | None = None
    steps_per_epoch: int | None = None
    rollout_size: int | None = None  # requests per rollout: a global batch, if not MiniLLM
    rollout_steps: int = 1  # MiniLLM: optimizer steps per rollout
    scored_rollout: list | None = None  # MiniLLM: the examples of all ranks, with their scores
    lm_blocks: list | None = None  # MiniLLM: plain text, as examples
    seconds: dict = field(default_factory=dict)  # of the current step, by phase
    phase_start: float = 0.0  # of time.perf_counter


def record_time(run, phase):
    """Record the seconds since the phase before this one ended."""
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    now = time.perf_counter()
    run.seconds[phase] = now - run.phase_start
    run.phase_start = now


# --- Gradients of a global batch ---


def split_global_batch(run, examples):
    """This rank's examples as micro-batches, and the number of response tokens of all ranks.

    Losses are averaged over that number. Averages per micro-batch would give more weight to tokens
    of short responses. A batch has ids (B, S), each row a request and its response; targets (N,),
    the response tokens of all rows; response_positions, (row, position) of the logits that predict
    them, two tensors (N,). Padding is on the right and attention is causal, so no mask is needed.
    """
    prompt_length = 0 if run.P is None else len(run.P)
    batches = micro_batches(examples, run.micro_batch_tokens, run.device, prompt_length)
    n_tokens = torch.tensor(sum(len(batch.targets) for batch in batches), device=run.device)
    return batches, max(1, int(dist.all_reduce_sum(n_tokens)))


def student_backward(run, loss_fn, batches, n_tokens, compare_with=()):
    """Accumulate the gradient of a loss with respect to θ. Returns the global batch's mean loss.

    loss_fn(batch, span, q, *others) -> (n,): the loss of n of the batch's N response tokens, which
    the slice `span` selects, from their logits (n, V) under the student and the other models.
    compare_with: these models, each as (model, P or None). They get no gradient.
    """
    run.student.train()  # dropout here only: sampling and the q of L_P are without
    total = torch.zeros((), device=run.device)
    for batch in batches:
        # Each rank adds to its own .grad under no_sync; the last backward pass averages .grad over
        # the ranks. MiniLLM calls this twice per update, so the first call's gradient is averaged
        # again. It is equal on all ranks by then, so that changes nothing.
        defer = run.ddp_student is not run.student and batch is not batches[-1]
        with run.ddp_student.no_sync() if defer else nullcontext():
            with precision(run.device, run.settings.dtype):
                hidden = run.ddp_student(batch.ids, output_positions=batch.response_positions)
                # The head is tied to the embedding. It may be used outside DDP's forward, because
                # autograd adds up both gradients of the weight before it calls DDP's hook.
                head = run.student.wte.weight  # (V, C); hidden (N, C)
                compared = [response_hidden(model, batch, P) for model, P in compare_with]
                loss = losses.sum_over_tokens(partial(loss_fn, batch), hidden, head, *compared)
                loss = loss / n_tokens
            # DDP will divide by the number of ranks. n_tokens counts all ranks already, so undo it.
            (loss * dist.world_size()).backward()
        total += loss.detach()
    return dist.all_reduce_sum(total)


PROMPT_METRICS = ("prompt_loss", "prompt_kd", "prompt_reg", "kl_prompted_bare")


def prompt_backward(run, loss_fn, batches, n_tokens):
    """Accumulate the gradient of L_P with respect to P. Returns the global batch's means by name.

    loss_fn(batch, span, p_prompted, q, p_bare) -> (4, n), as `losses.prompt_loss`, from logits
    (n, V) of p(y | P, x), q(y | x) and p(y | x). The teacher's weights are frozen, and q and p_bare
    are computed without gradient: only P gets one.
    """
    total = torch.zeros(4, device=run.device)
    for batch in batches:
        with precision(run.device, run.settings.dtype):
            hidden = hidden_states(run.teacher, batch.ids, run.P, batch.response_positions)
            head = run.teacher.wte.weight  # (V, C); hidden (N, C)
            compared = response_hidden(run.student, batch), response_hidden(run.teacher, batch)
            means = losses.sum_over_tokens(partial(loss_fn, batch), hidden, head, *compared)
            means = means / n_tokens
        means[0].backward()
        total += means.detach()
    # P is not in DDP: sum its gradient over the ranks, in place. n_tokens counts all ranks already.
    dist.all_reduce_sum(run.P.grad)
    return dict(zip(PROMPT_METRICS, dist.all_reduce_sum(total), strict=True))


def update_student(run, n_tokens, **values):
    """Clip the accumulated gradient, make an optimizer step and clear it. Returns the metrics."""
    grad_norm = clip_and_step(run.optimizer)
    record_time(run, "student")
    return {**values, "grad_norm": grad_norm, "response_tokens": n_tokens}


# --- PromptKD ---


def rollout(run, examples, t, teacher_mix=None):
    """Sample a response to each of this rank's requests: y ~ q_θ(y | x), or from the mixture with
    the teacher (see `sample.sample`). Without dropout and gradient."""
    run.student.eval()
    s, requests = run.settings, [e.request for e in examples]
    rng_keys = [(s.seed, "rollout", t, e.index) for e in examples]
    eos, max_new = run.tokenizer.eot_token, s.max_new_tokens
    responses, _ = sample_all(
        run.student, requests, rng_keys, eos, max_new, teacher_mix=teacher_mix, dtype=s.dtype
    )
    record_time(run, "sampling")
    return [replace(e, response=y) for e, y in zip(examples, responses, strict=True)]


def promptkd_step(run, examples, t):
    """Algorithm 1 of PromptKD, iteration t = 0 ... T - 1. The equation numbers are the paper's."""
    s = run.settings
    lam = 1 - t / run.total_steps  # λ: 1 at first, then linearly down to 1/T
    variant = s.reg_weight, s.prompt_kl, s.reg_kl  # for the ablations

    def L_P(_batch, _span, p_prompted, q, p_bare):
        return losses.prompt_loss(p_prompted, q, p_bare, lam, *variant)  # (1) to (3)

    def L_theta(_batch, _span, q, p_prompted):
        return losses.student_loss(q, p_prompted)  # (4)

    # Sample responses y ~ q_θ(y | x), for both phases. No gradient goes through the sampling.
    sampled = rollout(run, examples, t)
    batches, n_tokens = split_global_batch(run, sampled)

    # Tune the prompt, so that the teacher becomes student-friendly. Gradient to P only.
    prompt_metrics = prompt_backward(run, L_P, batches, n_tokens) | {"lambda": lam}
    prompt_metrics["prompt_grad_norm"] = clip_and_step(run.prompt_optimizer)  # updates P
    record_time(run, "prompt")

    # Distil from the teacher with the prompt just updated. Gradient to θ only.
    prompted_teacher = (run.teacher, run.P)
    loss = student_backward(run, L_theta, batches, n_tokens, compare_with=[prompted_teacher])
    return update_student(run, n_tokens, loss=loss, **prompt_metrics)


# --- The methods it is compared with ---


def gkd_step(run, examples, t):
    """GKD (Agarwal et al. 2024) as the paper compares it: on-policy with reverse KL, which is
    PromptKD without the prompt."""

    def L_theta(_batch, _span, q, p):
        return losses.student_loss(q, p)  # KL(q(y | x) || p(y | x))

    batches, n_tokens = split_global_batch(run, rollout(run, examples, t))  # y ~ q_θ(y | x)
    loss = student_backward(run, L_theta, batches, n_tokens, compare_with=[(run.teacher, None)])
    return update_student(run, n_tokens, loss=loss)


def sft_step(run, examples, t):
    """Cross-entropy on the rows' own responses. Pre-training is the same on packed text."""

    def L_theta(batch, span, q):
        return losses.cross_entropy(q, batch.targets[span])

    batches, n_tokens = split_global_batch(run, examples)
    loss = student_backward(run, L_theta, batches, n_tokens)
    return update_student(run, n_tokens, loss=loss)


def hinton_loss(batch, span, q, p):
    """Half cross-entropy, half KL(p || q): of KD, of SeqKD, and of MiniLLM on plain text."""
    return losses.kd_loss(q, p, batch.targets[span])


def kd_step(run, examples, t):
    """KD (Hinton et al. 2015) on the rows' own responses. SeqKD as released is the same on
    responses sampled from the teacher (Kim and Rush 2016: cross-entropy on beam-search outputs)."""
    batches, n_tokens = split_global_batch(run, examples)
    compare_with = [(run.teacher, None)]
    loss = student_backward(run, hinton_loss, batches, n_tokens, compare_with)
    return update_student(run, n_tokens, loss=loss)


def minillm_step(run, examples, t):
    """MiniLLM (Gu et al. 2024): several optimizer steps per rollout, by policy gradient and the
    exact KL of the single step; and, given plain text, KD's loss on it."""
    batch_size, compare_with = run.global_batch_size, [(run.teacher, None)]
    if t % run.rollout_steps == 0:
        run.scored_rollout = minillm_rollout(run, examples, t)
    # Several epochs over each rollout, numbered across rollouts, each in another order.
    inner_epoch, k = divmod(t, len(run.scored_rollout) // batch_size)
    order = epoch_order(len(run.scored_rollout), run.settings.seed, inner_epoch)
    examples = [run.scored_rollout[i] for i in order[k * batch_size : (k + 1) * batch_size]]

    def L_theta(batch, span, q, p):
        scores = [score for e in batch.examples for score in e.scores][span]
        scores = torch.tensor(scores, dtype=q.dtype, device=run.device)
        log_q, w, R = scores.view(-1, 3).T  # (n,) each
        return losses.minillm_loss(q, p, batch.targets[span], log_q, w, R)

    batches, n_tokens = split_global_batch(run, dist.shard(examples))
    values = {"loss": student_backward(run, L_theta, batches, n_tokens, compare_with)}
    if run.lm_blocks:
        n_blocks = len(run.lm_blocks)
        blocks = [run.lm_blocks[(t * batch_size + i) % n_blocks] for i in range(batch_size)]
        lm_batches = split_global_batch(run, dist.shard(blocks))
        values["lm_loss"] = student_backward(run, hinton_loss, *lm_batches, compare_with)
    return update_student(run, n_tokens, **values)


@torch.no_grad()
def minillm_rollout(run, examples, t):
    """Sample responses from the mixture of student and teacher, and score each of their tokens.

    Returns the rows of all ranks in an order that does not depend on the number of ranks.
    """
    rows = []
    sampled = rollout(run, examples, t, teacher_mix=(run.teacher, TEACHER_MIX))
    for batch in micro_batches(sampled, run.micro_batch_tokens, run.device):
        with precision(run.device, run.settings.dtype):
            student_hidden, student_head = response_hidden(run.student, batch)
            teacher_hidden, teacher_head = response_hidden(run.teacher, batch)
            log_q = losses.token_log_probs(student_hidden, student_head, batch.targets).cpu()
            log_p = losses.token_log_probs(teacher_hidden, teacher_head, batch.targets).cpu()
        lengths = [len(e.response) for e in batch.examples]
        rows += zip(batch.examples, log_q.split(lengths), log_p.split(lengths), strict=True)
    rows = sorted(dist.all_gather_list(rows), key=lambda row: row[0].index)
    examples, log_q, log_p = zip(*rows, strict=True)
    R = losses.whiten(torch.cat(list(map(losses.minillm_returns, log_p, log_q))))
    log_q, log_p = torch.cat(log_q), torch.cat(log_p)  # (M,), like R: the M tokens of all rows
    w = losses.importance_weight(log_p, log_q, TEACHER_MIX)  # (M,)
    scores = torch.stack([log_q, w, R], dim=1).split([len(e.response) for e in examples])
    record_time(run, "scoring")
    return [
        Example(e.index, e.request, e.response, row.tolist())
        for e, row in zip(examples, scores, strict=True)
    ]


@dataclass
class Method:
    step: Callable  # (run, this rank's examples, t) -> metrics: one optimizer step
    start: str  # the student starts from a "shape" (random), "pretrained", or fine-tuned ("init")
    needs_teacher: bool
    options: tuple = ()  # of the command line, that no other method has


METHODS = {
    "pretrain": Method(sft_step, "shape", needs_teacher=False, options=("shape",)),
    "sft": Method(sft_step, "pretrained", needs_teacher=False),
    "kd": Method(kd_step, "pretrained", needs_teacher=True),
    "seqkd": Method(kd_step, "pretrained", needs_teacher=True),
    "minillm": Method(minillm_step, "init", needs_teacher=True, options=("lm_data",)),
    "gkd": Method(gkd_step, "init", needs_teacher=True),
    "promptkd": Method(promptkd_step, "init", needs_teacher=True, options=options.PROMPT_OPTIONS),
}


def build(s, steps, tokenizer, micro_batch_tokens, device):
    """The Run of Settings `s` before its first step. steps: from `stages.plan_steps`."""
    if s.method == "pretrain":
        config = options.parse_shape(s.student, tokenizer.n_vocab, s.dropout)
        student = GPT(config).init_weights(s.seed).to(device)
    else:
        student, _ = load_model(s.student, device, s.dropout)
    run = Run(
        settings=s,
        **steps,
        micro_batch_tokens=micro_batch_tokens,
        device=device,
        tokenizer=tokenizer,
        student=student,
        ddp_student=dist.wrap_in_ddp(student, device),
        optimizer=adamw(student.parameters(), s, sharded=True),
    )
    if s.teacher is not None:
        teacher, teacher_tokenizer = load_model(s.teacher, device)
        check_same_vocabulary(s.teacher, s.student, teacher_tokenizer, tokenizer)
        run.teacher = freeze(teacher, s.dtype)
    if s.method == "promptkd":
        P = untuned_prompt(s, run.teacher.wte.weight, tokenizer)
        run.P = P.to(device).requires_grad_()
        run.prompt_optimizer = adamw([run.P], s)
    if s.lm_data is not None:
        n_blocks = run.total_steps * run.global_batch_size
        run.lm_blocks = stages.read_lm_blocks(s, tokenizer, n_blocks)
    return run


def train_step(run, examples, t):
    """One optimizer step on this rank's examples. Returns its metrics."""
    s = run.settings
    # Seed dropout from the step number, so that a saved state needs no generator state.
    torch.manual_seed(zlib.crc32(repr((s.seed, t, dist.rank())).encode()))
    run.seconds, run.phase_start = {}, time.perf_counter()
    metrics = set_learning_rates(run, t)
    metrics |= {k: float(v) for k, v in METHODS[s.method].step(run, examples, t).items()}
    metrics["tokens_per_second"] = metrics["response_tokens"] / sum(run.seconds.values())
    return metrics | {"seconds": run.seconds, **runs.peak_memory(run.device)}


def train_loop(run, data, progress, directory, keep, save_every):
    """Train from `progress["step"]` to the last step, updating `progress`.

    SIGTERM or SIGINT to any rank ends the process after the current step, with the state saved.
    """
    s, total_steps, start_step = run.settings, run.total_steps, progress["step"]
    eval_interval = s.eval_interval or run.steps_per_epoch
    log = runs.MetricsLog(directory / "metrics.jsonl", start_step)
    if run.P is not None and start_step == 0:
        metrics = validate(run, data.dev_rows, data.dev_examples)
        log.write(check_prompt(run, metrics, data.dev_examples))
    start_time, hours_before, last_print = time.perf_counter(), progress["hours"], -math.inf
    with dist.defer_signals() as signals:
        for t in range(start_step, total_steps):
            step = t + 1
            epoch, k = divmod(t, run.steps_per_epoch)
            # The same requests for all steps of one rollout.
            first = k // run.rollout_steps * run.rollout_size
            examples = data.epoch_examples(epoch)[first : first + run.rollout_size]
            metrics = {"step": step, "epoch": step / run.steps_per_epoch}
            metrics |= train_step(run, dist.shard(examples), t)
            stages.check_finite(directory, metrics)
            is_eval_step = step % eval_interval == 0 or step == total_steps
            if is_eval_step:
                metrics |= validate(run, data.dev_rows, data.dev_examples)
                stages.check_finite(directory, metrics)
                score = checkpoint_score(s, metrics)
                if progress["best"] is None or score > progress["best"]:
                    progress |= {"best": score, "best_step": step}
            # `keep` checkpoints, evenly spaced: of 6 steps and keep=4 after steps 2, 3, 5 and 6.
            if step * keep // total_steps > t * keep // total_steps:
                runs.save_checkpoint(run, directory / "kept" / f"step-{step:06d}")
            log.write(metrics)
            elapsed = time.perf_counter() - start_time
            progress |= {"step": step, "hours": hours_before + elapsed / 3600}
            stop_signal = max(dist.all_gather_list(signals), default=0)
            if is_eval_step or stop_signal or step % (save_every or total_steps) == 0:
                save_state(run, directory, progress)
            # Saved after the state, because a resumed run can save it again from the state.
            if progress["best_step"] == step:
                runs.save_checkpoint(run, directory / "best")
            if is_eval_step or time.perf_counter() - last_print > 5:
                last_print = time.perf_counter()
                left = format_time(elapsed / (step - start_step) * (total_steps - step))
                speed = f"{metrics['tokens_per_second']:,.0f} tokens/s  {left} left"
                print0(f"step {step:,}/{total_steps:,}  {runs.format_metrics(metrics)}  {speed}")
            if stop_signal:
                print0(
                    f"{directory}: stopped by {signal.Signals(stop_signal).name}, saved at step "
                    f"{step:,}; the same command resumes it"
                )
                sys.exit(128 + stop_signal)


def run_stage(name, s, out, micro_batch_tokens, device, paper=None, keep=0, save_every=None):
    """Train a stage in `out/name`, resume it, or skip it if it is complete. Returns its directory.

    micro_batch_tokens: None for the default. paper: which of the paper's runs it is, for run.json.
    keep: number of checkpoints to keep. save_every: steps between saved states, besides those at
    validations.
    """
    directory = Path(out) / name
    with stages.open_stage(directory, asdict(s), stages.data_files(s), paper) as record:
        if record.get("complete"):
            print0(f"{directory}: complete, skipped")
            return str(directory)
        micro_batch_tokens = micro_batch_tokens or stages.default_micro_batch_tokens(s)
        with stages.explain_memory(directory, micro_batch_tokens):
            runs.reset_peak_memory(device)
            data = stages.load_data(s)
            examples = data.epoch_examples(0)
            steps = stages.plan_steps(s, len(examples))
            run = build(s, steps, data.tokenizer, micro_batch_tokens, device)
            stages.check_positions(run, [*examples, *data.dev_examples])
            dist.run_on_rank0(runs.write_record, directory, record)
            progress = load_state(run, directory)
            if progress["step"] and progress["best_step"] == progress["step"]:
                runs.save_checkpoint(run, directory / "best")  # see train_loop
            stages.print_stage(run, directory, len(examples), progress["step"])
            check_references(s, data.dev_rows)
            train_loop(run, data, progress, directory, keep, save_every)
        stages.finish_stage(run, directory, record, progress)
    return str(directory)


def run_stages(args, device, dtype):
    """Stages: teacher SFT, student SFT ("init"), the method itself. Returns {label: directory}."""
    method, is_demo = METHODS[args.method], args.data == "demo"

    def stage(kind, student, teacher=None, responses=None):
        models = {"student": student, "teacher": teacher, "responses": responses, "dtype": dtype}
        from_init = kind == args.method and method.start == "init"
        name, s, paper = stages.plan_stage(args, kind, from_init, **models)
        keep = args.keep if kind == args.method else 0
        limits = args.micro_batch_tokens, device
        return run_stage(name, s, args.out, *limits, paper, keep, args.save_every)

    data_dir = dist.run_on_rank0(find_data_dir, args.data)  # before a model is downloaded
    if args.method == "pretrain":
        return {"pretrain": stage("pretrain", args.shape)}
    teacher = responses = None
    pretrained = (demo.TEACHER, demo.STUDENT) if is_demo else ("gpt2-xl", "gpt2")
    if method.needs_teacher:
        teacher = args.sft_teacher or args.teacher or pretrained[0]
    student = args.init or args.student or pretrained[1]
    stages.check_later_inputs(args, data_dir, teacher, student)
    if method.needs_teacher and not args.sft_teacher:
        teacher = stage("teacher", teacher)
    if method.start == "init" and not args.init:
        student = stage("init", student)
    if args.method == "seqkd":
        responses = stages.sample_responses(*stages.plan_responses(args, teacher, dtype), device)
    trained = stage(args.method, student, teacher, responses)
    init = student if method.start == "init" else None
    models = {"teacher": teacher, "student's init": init, args.method: trained}
    return {label: model for label, model in models.items() if model}


def main(argv=None):
    args = options.parse_train_args(argv, METHODS)
    check_output_dir(args.out)
    device, dtype = dist.init_process(args.dtype)
    start_time = time.perf_counter()
    options.check_options(args, METHODS[args.method])
    models = run_stages(args, device, dtype)
    if args.data == "demo" and args.method != "pretrain":
        show_demo(models, device, dtype)
        curves, took = Path(models[args.method]) / "curves.png", time.perf_counter() - start_time
        print0(f"Curves: {curves}. All of it took {format_time(took)}.")
    dist.shutdown()


if __name__ == "__main__":
    run_command_line(main)
