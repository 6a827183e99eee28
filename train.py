"""PromptKD (Kim, Jang and Yang, Findings of EMNLP 2024) and the methods it is compared with.

python train.py                                        the demo: offline, CPU or GPU, minutes
torchrun --nproc_per_node=8 train.py --student gpt2    the paper's main result, all its stages
"""

import os.path
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # before others' `data`, `evaluate`

import data.process.threads  # noqa: F401  (must precede torch: it sets how threads wait)

import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

import losses
from data.models.named import load_model
from data.models.sampling import sample_all
from data.models.tokenizer import check_same_vocabulary
from data.process import dist
from data.process.command_line import run_command_line
from data.process.dist import print0
from data.process.files import check_output_dir
from data.runs import options, plan, preview, runs, stages
from data.runs.methods import Settings
from data.runs.names import public_name
from data.runs.optim import adamw, clip_and_step, set_learning_rates
from data.runs.preflight import check_plan
from data.runs.runs import format_time
from data.runs.states import load_state, save_state
from data.runs.tuned_prompt import untuned_prompt
from data.runs.validation import check_prompt, checkpoint_score, note_best, validate
from data.sets.rows import epoch_order, micro_batches
from evaluate import print_unscorable, sampled_rouge_l, show_demo
from losses import sum_over_tokens
from model import GPT, precision
from prompt import freeze, response_hidden

TEACHER_MIX = 0.2  # MiniLLM's α, the share of the teacher in the mixture that responses come from
# The rows of losses.prompt_loss
PROMPT_METRICS = ("prompt_loss", "prompt_kd", "prompt_reg", "kl_prompted_bare")


@dataclass
class Run:
    """What a step works on: the student q with parameters θ, the teacher p, the soft prompt P."""

    settings: Settings
    total_steps: int  # optimizer steps
    global_batch_size: int  # rows per optimizer step, over all ranks
    micro_batch_tokens: int  # positions per forward pass of one rank, padding and prompt included
    device: torch.device
    tokenizer: object  # a tiktoken.Encoding
    student: GPT  # the module itself, for sampling and as a target of the prompt's loss
    ddp_student: torch.nn.Module  # in `dist.DDP` under torchrun, else the student; for training
    optimizer: torch.optim.Optimizer
    teacher: GPT | None = None  # frozen
    teacher_name: str | None = None  # for others
    teacher_hash: str | None = None  # SHA-256
    P: torch.Tensor | None = None  # (prompt_length, C of the teacher)
    prompt_optimizer: torch.optim.Optimizer | None = None
    warmup_steps: int = 0  # those of the settings, or fewer in a short run
    steps_per_epoch: int | None = None
    rollout_size: int | None = None  # requests per rollout: a global batch, if not MiniLLM
    rollout_steps: int = 1  # MiniLLM: optimizer steps per rollout
    scored_rollout: list | None = None  # MiniLLM: the examples of all ranks, with their scores
    lm_blocks: list | None = None  # MiniLLM: plain text, as examples
    seconds: dict = field(default_factory=dict)  # of the current step, by phase
    phase_start: float = 0.0  # of time.perf_counter


def record_time(run, phase):
    """Record how long the phase that ends here took."""
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    now = time.perf_counter()
    run.seconds[phase] = now - run.phase_start
    run.phase_start = now


# --- What the steps of all methods share ---


def rollout(run, examples, t, teacher_mix=None):
    """Sample a response to each of this rank's requests: y ~ q_θ(y | x), or from the mixture with
    the teacher (see `sample.sample`). Returns the examples with these responses in place of their
    own. Without dropout and gradient; leaves the student in eval mode."""
    run.student.eval()
    s, requests = run.settings, [e.request for e in examples]
    rng_keys = [(s.seed, "rollout", t, e.index) for e in examples]
    responses, _ = sample_all(
        run.student,
        requests,
        rng_keys,
        run.tokenizer.eot_token,
        s.max_new_tokens,
        teacher_mix=teacher_mix,
        dtype=s.dtype,
    )
    record_time(run, "sampling")
    sampled = [replace(e, response=y) for e, y in zip(examples, responses, strict=True)]
    stages.check_positions(run, sampled)
    return sampled


def split_global_batch(run, examples):
    """This rank's examples as micro-batches, and the number of response tokens of all ranks.

    Losses are divided by that number. Means per micro-batch or per rank would give more weight to
    tokens where there are few. A micro-batch (`rows.Batch`) has ids (B, T), a request and its
    response in each row; targets (N,), their response tokens; and where the logits that predict
    these are.
    """
    prompt_length = 0 if run.P is None else len(run.P)
    batches = micro_batches(examples, run.micro_batch_tokens, run.device, prompt_length)
    n_tokens = torch.tensor(sum(len(batch.targets) for batch in batches), device=run.device)
    return batches, max(1, int(dist.all_reduce_sum(n_tokens)))


def sync_gradients_at(run, is_last):
    """The context of one micro-batch: no_sync under DDP for all but the last one. Each rank adds to
    its own .grad, and the last backward pass averages all of it over the ranks. So ranks may have
    different numbers of micro-batches. The forward pass must be in it, too: DDP decides there."""
    if is_last or run.ddp_student is run.student:
        return nullcontext()
    return run.ddp_student.no_sync()


def undo_ddp_mean(loss):
    """K times the loss, because DDP will divide the gradients' sum by the number K of ranks.

    Rank k has the loss L_k, its tokens' sum divided by the tokens of all ranks. So the gradient of
    the global batch is Σ_k ∇L_k. DDP makes 1/K Σ_k ∇(K · L_k) of it, which is the same.
    """
    return loss * dist.world_size()


def sum_prompt_gradient(run):
    """Add up P's gradient over the ranks, Σ_k ∇L_k, in place. P is not in DDP, so nothing else does
    it, and nothing divides by K. P starts equal on all ranks, and stays so."""
    dist.all_reduce_sum(run.P.grad)


def update_student(run, n_tokens, loss, **metrics):
    """Clip the accumulated gradient, make an optimizer step and clear it. Returns the metrics.

    loss: this rank's part of the mean over the global batch. metrics: further ones, of all ranks.
    """
    grad_norm = clip_and_step(run.optimizer)
    record_time(run, "student")
    loss = dist.all_reduce_sum(loss)
    return {"loss": loss, **metrics, "grad_norm": grad_norm, "response_tokens": n_tokens}


# --- PromptKD ---


def promptkd_step(run, examples, t):
    """Algorithm 1, iteration t = 0 ... total_steps - 1, on the requests of this rank's examples.
    Equation numbers are the paper's.

    q, p_prompted and p_bare are distributions of a micro-batch's N response tokens, each as a pair:
    hidden states (N, C) and a head (V, C) of a model of width C, from `response_hidden`.
    `sum_over_tokens` makes logits (N, V) of them, some tokens at a time, and sums a loss over the
    tokens. Only its first distribution gets a gradient.
    """
    s, teacher = run.settings, run.teacher
    lam = 1 - t / run.total_steps  # λ: 1 at first, then linearly down to 1 / total_steps

    def L_P(p_prompted, q, p_bare):  # (1) to (3); gets logits of some tokens at a time
        return losses.prompt_loss(p_prompted, q, p_bare, lam, s.reg_weight, s.prompt_kl, s.reg_kl)

    # Sample y ~ q_θ(y | x) for both phases, without gradient. n_tokens: those of all ranks.
    batches, n_tokens = split_global_batch(run, rollout(run, examples, t))

    # Tune the prompt, so that the teacher becomes student-friendly. rollout left q in eval mode.
    prompt_sums = torch.zeros(4, device=run.device)  # this rank's part of the global means
    for batch in batches:
        with precision(run.device, s.dtype):
            p_prompted = response_hidden(teacher, batch, run.P)  # gradient to P only: p is frozen
            with torch.no_grad():  # constants
                q = response_hidden(run.student, batch)
                p_bare = response_hidden(teacher, batch)
            part = sum_over_tokens(L_P, p_prompted, q, p_bare) / n_tokens  # (4,), L_P first
        part[0].backward()  # this micro-batch's part of the global mean
        prompt_sums += part.detach()
    sum_prompt_gradient(run)
    prompt_grad_norm = clip_and_step(run.prompt_optimizer)  # updates P and clears its gradient
    record_time(run, "prompt")

    # Distil from the teacher with the prompt just updated.
    run.student.train()  # dropout, here only
    loss = torch.zeros((), device=run.device)  # this rank's part of the global mean
    for batch in batches:
        with sync_gradients_at(run, batch is batches[-1]):
            with precision(run.device, s.dtype):
                q = response_hidden(run.ddp_student, batch)  # gradient to θ, through DDP
                with torch.no_grad():  # a constant: no gradient to P
                    p_prompted = response_hidden(teacher, batch, run.P)
                L_theta = sum_over_tokens(losses.student_loss, q, p_prompted) / n_tokens  # (4)
            undo_ddp_mean(L_theta).backward()
        loss += L_theta.detach()
    metrics = dict(zip(PROMPT_METRICS, dist.all_reduce_sum(prompt_sums), strict=True))
    metrics |= {"lambda": lam, "prompt_grad_norm": prompt_grad_norm}
    return update_student(run, n_tokens, loss, **metrics)


# --- The methods it is compared with ---


def gkd_step(run, examples, t):
    """GKD (Agarwal et al. 2024) as the paper compares it: on-policy with reverse KL, which is
    PromptKD without the prompt."""
    s = run.settings
    batches, n_tokens = split_global_batch(run, rollout(run, examples, t))  # y ~ q_θ(y | x)
    run.student.train()  # dropout
    loss = torch.zeros((), device=run.device)
    for batch in batches:
        with sync_gradients_at(run, batch is batches[-1]):
            with precision(run.device, s.dtype):
                q = response_hidden(run.ddp_student, batch)  # gradient to θ
                with torch.no_grad():  # a constant
                    p = response_hidden(run.teacher, batch)
                L_theta = sum_over_tokens(losses.student_loss, q, p) / n_tokens
            undo_ddp_mean(L_theta).backward()
        loss += L_theta.detach()
    return update_student(run, n_tokens, loss)


def sft_step(run, examples, t):
    """Cross-entropy on the rows' own responses. Pre-training is the same on packed text."""
    s = run.settings
    batches, n_tokens = split_global_batch(run, examples)
    run.student.train()  # dropout
    loss = torch.zeros((), device=run.device)
    for batch in batches:
        with sync_gradients_at(run, batch is batches[-1]):
            with precision(run.device, s.dtype):
                q = response_hidden(run.ddp_student, batch)
                L_theta = sum_over_tokens(losses.cross_entropy, q, targets=batch.targets)
                L_theta = L_theta / n_tokens
            undo_ddp_mean(L_theta).backward()
        loss += L_theta.detach()
    return update_student(run, n_tokens, loss)


def kd_step(run, examples, t):
    """KD (Sanh et al. 2019, as the paper cites it) on the rows' own responses. SeqKD as released is
    the same on responses sampled from the teacher (Kim and Rush 2016: cross-entropy on beam-search
    outputs)."""
    batches, n_tokens = split_global_batch(run, examples)
    loss = kd_backward(run, batches, n_tokens)
    return update_student(run, n_tokens, loss)


def kd_backward(run, batches, n_tokens):
    """Accumulate the gradient of half cross-entropy, half KL(p || q). Returns this rank's part of
    the mean loss. MiniLLM has the same term on plain text."""
    s = run.settings
    run.student.train()  # dropout
    loss = torch.zeros((), device=run.device)
    for batch in batches:
        with sync_gradients_at(run, batch is batches[-1]):
            with precision(run.device, s.dtype):
                q = response_hidden(run.ddp_student, batch)
                with torch.no_grad():  # a constant
                    p = response_hidden(run.teacher, batch)
                L_theta = sum_over_tokens(losses.kd_loss, q, p, targets=batch.targets)
                L_theta = L_theta / n_tokens
            undo_ddp_mean(L_theta).backward()
        loss += L_theta.detach()
    return loss


def minillm_step(run, examples, t):
    """MiniLLM (Gu et al. 2024): several optimizer steps per rollout, by policy gradient and the
    exact KL of the single step; and, given plain text, KD's loss on it.

    examples: this rank's requests of a whole rollout, read only when that rollout is made. A step
    trains on a global batch of the rows of all ranks in `run.scored_rollout`, shuffled together,
    and takes this rank's share of it itself.
    """
    s, batch_size = run.settings, run.global_batch_size
    if t % run.rollout_steps == 0:
        run.scored_rollout = minillm_rollout(run, examples, t)
    # Several epochs over each rollout, numbered across rollouts, each in another order. A rollout
    # has whole epochs.
    inner_epoch, k = divmod(t, len(run.scored_rollout) // batch_size)
    order = epoch_order(len(run.scored_rollout), s.seed, inner_epoch)
    rows = [run.scored_rollout[i] for i in order[k * batch_size : (k + 1) * batch_size]]
    batches, n_tokens = split_global_batch(run, dist.shard(rows))
    run.student.train()  # dropout
    loss = torch.zeros((), device=run.device)
    for batch in batches:
        scores = [score for e in batch.examples for score in e.scores]  # as in `Example.scores`
        log_q, w, R = torch.tensor(scores, device=run.device).view(-1, 3).T  # (N,); N may be 0
        rollout_values = {"targets": batch.targets, "log_q": log_q, "w": w, "R": R}
        with sync_gradients_at(run, batch is batches[-1]):
            with precision(run.device, s.dtype):
                q = response_hidden(run.ddp_student, batch)
                with torch.no_grad():  # a constant
                    p = response_hidden(run.teacher, batch)
                L_theta = sum_over_tokens(losses.minillm_loss, q, p, **rollout_values)
                L_theta = L_theta / n_tokens
            undo_ddp_mean(L_theta).backward()
        loss += L_theta.detach()
    metrics = {}
    if run.lm_blocks:
        n_blocks = len(run.lm_blocks)
        blocks = [run.lm_blocks[(t * batch_size + i) % n_blocks] for i in range(batch_size)]
        # DDP averages the gradient above again. It is equal on all ranks, so nothing changes.
        lm_loss = kd_backward(run, *split_global_batch(run, dist.shard(blocks)))
        metrics["lm_loss"] = dist.all_reduce_sum(lm_loss)
    return update_student(run, n_tokens, loss, **metrics)


@torch.no_grad()
def minillm_rollout(run, examples, t):
    """Sample responses from the mixture of student and teacher, and score each of their tokens.

    Returns the rows of all ranks in an order that does not depend on the number of ranks.
    """
    rows = []
    sampled = rollout(run, examples, t, teacher_mix=(run.teacher, TEACHER_MIX))
    # Without dropout: rollout has left the student in eval mode.
    for batch in micro_batches(sampled, run.micro_batch_tokens, run.device):
        with precision(run.device, run.settings.dtype):
            student_hidden, student_head = response_hidden(run.student, batch)
            teacher_hidden, teacher_head = response_hidden(run.teacher, batch)
            log_q = losses.token_log_probs(student_hidden, student_head, batch.targets).cpu()
            log_p = losses.token_log_probs(teacher_hidden, teacher_head, batch.targets).cpu()
        lengths = [len(e.response) for e in batch.examples]
        rows += zip(batch.examples, log_q.split(lengths), log_p.split(lengths), strict=True)
    rows = sorted(dist.all_gather_list(rows), key=lambda row: row[0].index)
    scored, log_qs, log_ps = zip(*rows, strict=True)  # examples; tensors (n,) of each response
    R = losses.whiten(torch.cat(list(map(losses.minillm_returns, log_ps, log_qs))))
    log_q, log_p = torch.cat(log_qs), torch.cat(log_ps)  # (M,), like R: the M tokens of all rows
    w = losses.importance_weight(log_p, log_q, TEACHER_MIX)  # (M,)
    scores = torch.stack([log_q, w, R], dim=1).split([len(e.response) for e in scored])
    record_time(run, "scoring")
    return [replace(e, scores=row.tolist()) for e, row in zip(scored, scores, strict=True)]


# The steps of data.runs.methods.METHODS: (run, this rank's examples, t) -> metrics
STEPS = {
    "sft": sft_step,
    "kd": kd_step,
    "seqkd": kd_step,
    "minillm": minillm_step,
    "gkd": gkd_step,
    "promptkd": promptkd_step,
    "pretrain": sft_step,
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
    if s.prompt_text is not None:
        P = untuned_prompt(s, run.teacher.wte.weight, tokenizer)
        run.P = P.to(device).requires_grad_()
        run.prompt_optimizer = adamw([run.P], s)  # P is a matrix: it has weight decay, too
    if s.lm_data is not None:
        n_blocks = run.total_steps * run.global_batch_size
        run.lm_blocks = stages.read_lm_blocks(s, tokenizer, n_blocks)
    return run


def train_step(run, examples, t):
    """Iteration t of the method on this rank's examples: an update of the student, in PromptKD
    after one of P. Returns its metrics."""
    s = run.settings
    # Seed dropout from the step number, so that a saved state needs no generator state.
    torch.manual_seed(zlib.crc32(repr((s.seed, t, dist.rank())).encode()))
    run.seconds, run.phase_start = {}, time.perf_counter()
    metrics = set_learning_rates(run, t)
    metrics |= {k: float(v) for k, v in STEPS[s.method](run, examples, t).items()}
    metrics["tokens_per_second"] = metrics["response_tokens"] / sum(run.seconds.values())
    return metrics | {"seconds": run.seconds, **runs.peak_memory(run.device)}


def step_examples(run, data, t):
    """The examples of all ranks for step t: a global batch; in MiniLLM the requests of a rollout,
    the same for all of its steps."""
    epoch, k = divmod(t, run.steps_per_epoch)
    first = k // run.rollout_steps * run.rollout_size
    return data.epoch_examples(epoch)[first : first + run.rollout_size]


def train_loop(run, data, progress, directory, keep, save_every):
    """Train from `progress["step"]` to the last step, updating `progress`.

    keep: number of evenly spaced checkpoints to keep. save_every: steps between saved states,
    besides those at validations. If any rank receives a signal of `command_line.STOP_SIGNALS`, all
    finish the current step, save the state and exit.
    """
    total_steps = run.total_steps
    eval_interval = run.settings.eval_interval or run.steps_per_epoch
    log = runs.MetricsLog(directory / "metrics.jsonl", progress["step"])
    if run.P is not None and progress["step"] == 0:
        metrics = validate(run, data.dev_rows, data.dev_examples, sampled_rouge_l)
        log.write(check_prompt(run, metrics, data.dev_examples))
    clock = runs.Clock(progress, total_steps)
    with dist.defer_signals() as signals:
        for t in range(progress["step"], total_steps):
            step = t + 1
            metrics = {"step": step, "epoch": step / run.steps_per_epoch}
            metrics |= train_step(run, dist.shard(step_examples(run, data, t)), t)
            stages.check_finite(directory, metrics)
            is_eval_step = step % eval_interval == 0 or step == total_steps
            if is_eval_step:
                metrics |= validate(run, data.dev_rows, data.dev_examples, sampled_rouge_l)
                stages.check_finite(directory, metrics)
                note_best(progress, checkpoint_score(run.settings, metrics), step)
            # With 6 steps and keep=4: after steps 2, 3, 5 and 6.
            if step * keep // total_steps > t * keep // total_steps:
                runs.save_checkpoint(run, directory / "kept" / f"step-{step:06d}")
            log.write(metrics)
            clock.update(progress, step)
            stop_signal = dist.first_signal(signals)
            if is_eval_step or stop_signal or step % (save_every or total_steps) == 0:
                save_state(run, directory, progress)
            # Saved after the state, because a resumed run can save it again from the state.
            if progress["best_step"] == step:
                runs.save_checkpoint(run, directory / "best")
            if is_eval_step or clock.is_report_due():
                clock.report(metrics)
            if stop_signal:
                stages.stop(directory, step, stop_signal)


def run_stage(
    name, s, out, micro_batch_tokens, device, paper=None, keep=0, save_every=None, command=None
):
    """Train a stage in `out/name`, resume it, or skip it if it is complete. Returns its directory.

    micro_batch_tokens: None for the default. paper, command: which of the paper's runs it is, and
    of which command line, for run.json. keep, save_every: as in `train_loop`.
    """
    directory = Path(out) / name
    with stages.open_stage(directory, asdict(s), stages.data_files(s), paper, command) as record:
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
            blocks = run.lm_blocks or []
            stages.check_positions(run, [*examples, *data.dev_examples, *blocks])
            record |= {"keep": keep, "dev_rows": len(data.dev_rows)}
            run.teacher_name = public_name(record["settings"]["teacher"])
            run.teacher_hash = record["inputs"].get("teacher")
            dist.run_on_rank0(runs.write_record, directory, record)
            progress = load_state(run, directory)
            if progress["step"] and progress["best_step"] == progress["step"]:
                runs.save_checkpoint(run, directory / "best")  # see train_loop
            stages.print_stage(run, directory, len(examples), progress["step"])
            if s.metric_for_best == "rouge_l":
                print_unscorable("validation", [row.references for row in data.dev_rows])
            train_loop(run, data, progress, directory, keep, save_every)
        stages.finish_stage(run, directory, record, progress)
    return str(directory)


def run_stages(planned, args, device):
    """Run the stages of a plan (see `data.runs.plan.plan_stages`), each unless it is complete."""
    check_plan(planned, args.out)
    for stage in planned:
        if stage.kind == "responses":
            stages.sample_responses(stage.directory, stage.settings, device)
            continue
        run_stage(
            stage.directory.name,
            stage.settings,
            args.out,
            args.micro_batch_tokens,
            device,
            paper=stage.paper,
            keep=stage.keep,
            save_every=args.save_every,
            command=options.command_line(args),
        )


def main(argv=None):
    args = options.parse_train_args(argv)
    check_output_dir(args.out)
    device, dtype = dist.init_process(args.dtype)
    start_time = time.perf_counter()
    options.check_options(args)
    if not args.plan:
        teacher, student = plan.named_models(args)
        stages.fetch_inputs(args, teacher=teacher, student=student)
    planned = dist.run_on_rank0(plan.plan_stages, args, dtype)
    if args.plan:
        dist.run_on_rank0(preview.print_plan, args, planned)
    else:
        run_stages(planned, args, device)
        if args.data == "demo" and args.method != "pretrain":
            show_demo(plan.trained_models(planned[-1]), device, dtype)
            curves, took = planned[-1].directory / "curves.png", time.perf_counter() - start_time
            print0(f"Curves: {curves}. All of it took {format_time(took)}.")
    dist.shutdown()


if __name__ == "__main__":
    run_command_line(main)
