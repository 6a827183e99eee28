"""Validation during training: losses, ROUGE-L, and which checkpoint is the best."""

import math

import torch

from data.process import dist
from data.process.dist import print0
from data.runs.runs import format_metrics
from data.sets.rows import micro_batches
from losses import token_log_probs
from model import precision
from prompt import response_hidden


@torch.no_grad()
def validation_loss(run, model, examples, P=None):
    """Cross-entropy per response token, without dropout. All ranks hold the same examples."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    shard, prompt_length = dist.shard(examples), 0 if P is None else len(P)
    for batch in micro_batches(shard, run.micro_batch_tokens, run.device, prompt_length):
        with precision(run.device, run.settings.dtype):
            hidden, head = response_hidden(model, batch, P)
            sums[0] -= token_log_probs(hidden, head, batch.targets).sum()
        sums[1] += len(batch.targets)
    loss, n_tokens = dist.all_reduce_sum(sums).tolist()
    return loss / max(1, n_tokens)


def validate(run, rows, examples, sampled_rouge_l):
    """The student's loss and ROUGE-L, and the prompted teacher's loss.

    rows, examples: the validation set. sampled_rouge_l: that of evaluate.py. Responses are sampled
    with the same random numbers each time, so that checkpoints differ by their weights alone.
    """
    s = run.settings
    metrics = {"val_loss": validation_loss(run, run.student, examples)}
    # A student that has diverged can't be sampled from.
    if s.metric_for_best == "rouge_l" and math.isfinite(metrics["val_loss"]):
        metrics["val_rouge_l"] = sampled_rouge_l(
            run.student,
            run.tokenizer,
            rows,
            rng_key=(s.seed, "validate"),
            label="validation",
            max_new_tokens=s.max_new_tokens,
            dtype=s.dtype,
        )
    if run.P is not None:
        metrics["val_prompted_loss"] = validation_loss(run, run.teacher, examples, run.P)
    return metrics


def checkpoint_score(s, metrics):
    """What `best/` is chosen by, from the metrics of `validate`: a list, the higher the better.

    Among equal ROUGE-L the lower loss is better. This decides alone if ROUGE-L is 0 throughout, as
    on text without Latin letters.
    """
    by_loss = [-metrics["val_loss"]]
    return by_loss if s.metric_for_best == "loss" else [metrics["val_rouge_l"], *by_loss]


def note_best(progress, score, step):
    """Write a checkpoint's score into `progress` if no earlier one is as good."""
    if progress["best"] is None or score > progress["best"]:
        progress |= {"best": score, "best_step": step}


def check_prompt(run, metrics, examples):
    """Add the loss of the teacher without the prompt to the metrics of `validate` before the first
    step. Warns if the prompt harms the teacher, which tuning hardly ever repairs."""
    metrics = {"step": 0, **metrics, "val_bare_loss": validation_loss(run, run.teacher, examples)}
    print0(f"before: {format_metrics(metrics)}")
    harm = metrics["val_prompted_loss"] - metrics["val_bare_loss"]
    if harm > 0.1:
        cost = f"the prompt costs the teacher {harm:.2f} nats per token before it is tuned"
        print0(f"warning: {cost}, and the student will follow; try another --prompt-text")
    return metrics
