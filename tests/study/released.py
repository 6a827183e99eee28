"""How the authors' released code departs from the paper's equations, as patches of train.py.

Each is a context in which `train.run_stage` trains as that code does in one respect. The other
three differences need no patch: the first token left out of exposure bias and the ban on repeated
6-grams at evaluation (tests/study/measure.py), and the late init (tests/study/miniature.py).
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch

import train
from data.sets.rows import make_batch

MICRO_BATCH_ROWS = 8
TEACHER_DROPOUT = 0.1  # GPT-2's


def micro_batches_of_rows(examples, max_tokens, device, prompt_length=0):
    """Micro-batches of a fixed number of rows, in the order of the rows."""
    starts = range(0, len(examples), MICRO_BATCH_ROWS)
    return [make_batch(examples[i : i + MICRO_BATCH_ROWS], device) for i in starts]


@contextmanager
def micro_batch_means():
    """The loss is the mean over micro-batches of the mean over each one's tokens. So a token counts
    more the shorter the responses of its micro-batch are."""
    split_global_batch, sum_over_tokens = train.split_global_batch, train.sum_over_tokens
    whole = {}  # the global batch of the step

    def remember_sizes(run, examples):
        batches, n_tokens = split_global_batch(run, examples)
        whole.update(n_tokens=n_tokens, n_batches=len(batches))
        return batches, n_tokens

    def rescaled(loss_fn, trained, *others, **per_token):
        sums = sum_over_tokens(loss_fn, trained, *others, **per_token)  # () or (k,)
        # The step divides by n_tokens. This leaves 1 / (the batch's tokens · n_batches).
        return sums * (whole["n_tokens"] / (len(trained[0]) * whole["n_batches"]))

    with (
        patch.object(train, "micro_batches", micro_batches_of_rows),
        patch.object(train, "split_global_batch", remember_sizes),
        patch.object(train, "sum_over_tokens", rescaled),
    ):
        yield


def gives_prompt_its_gradient(P):
    """Whether a call of `response_hidden` with this P is the pass that the prompt is tuned on. All
    others with a P give the student's target, without gradient."""
    return P is not None and torch.is_grad_enabled()


@contextmanager
def stale_prompt():
    """The prompt is stepped at the last micro-batch of a global batch only. So the student distils
    from the prompt of the step before on all micro-batches but the last."""
    response_hidden = train.response_hidden
    before_step = {}

    def with_stale_prompt(model, batch, P=None):
        if gives_prompt_its_gradient(P):
            before_step.update(P=P.detach().clone(), last_batch=batch)  # P: (prompt_length, C)
        elif P is not None and batch is not before_step["last_batch"]:
            P = before_step["P"]
        return response_hidden(model, batch, P)

    with (
        patch.object(train, "micro_batches", micro_batches_of_rows),
        patch.object(train, "response_hidden", with_stale_prompt),
    ):
        yield


@contextmanager
def teacher_dropout():
    """The teacher has dropout in the pass that gives the prompt its gradient."""
    response_hidden = train.response_hidden

    def with_dropout(model, batch, P=None):
        if not gives_prompt_its_gradient(P):
            return response_hidden(model, batch, P)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = TEACHER_DROPOUT
            if hasattr(module, "dropout"):  # attention's
                module.dropout = TEACHER_DROPOUT
        try:
            return response_hidden(model, batch, P)
        finally:
            model.eval()

    with patch.object(train, "response_hidden", with_dropout):
        yield


PATCHES = {
    "stale-prompt": stale_prompt,
    "micro-batch-means": micro_batch_means,
    "teacher-dropout": teacher_dropout,
}
