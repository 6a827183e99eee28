"""How the authors' released code departs from the paper's equations, as patches of train.py.

Each is a context in which `train.run_stage` trains as that code does in one respect. The other
three differences need no patch: the first token left out of exposure bias and the ban on repeated
6-grams at evaluation (tests/study/measure.py), and the late init (tests/study/miniature.py).
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch

import train
from data.rows import make_batch

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

    def by_batch(backward):
        def averaged(run, loss_fn, batches, n_tokens, *args, **kwargs):
            results = []
            for batch in batches:
                weight = len(batch.targets) * len(batches)
                results.append(backward(run, loss_fn, [batch], weight, *args, **kwargs))
            if isinstance(results[0], dict):
                return {name: sum(r[name] for r in results) for name in results[0]}
            return sum(results)

        return averaged

    with (
        patch.object(train, "micro_batches", micro_batches_of_rows),
        patch.object(train, "student_backward", by_batch(train.student_backward)),
        patch.object(train, "prompt_backward", by_batch(train.prompt_backward)),
    ):
        yield


@contextmanager
def stale_prompt():
    """The prompt is stepped at the last micro-batch of a global batch only. So the student distils
    from the prompt of the step before on all micro-batches but the last."""
    prompt_backward, student_backward = train.prompt_backward, train.student_backward
    before_step = {}

    def keep_prompt(run, *args):
        before_step["P"] = run.P.detach().clone()  # (prompt_length, C)
        return prompt_backward(run, *args)

    def distil(run, loss_fn, batches, n_tokens, compare_with):
        stale = [(run.teacher, before_step["P"])]
        loss = student_backward(run, loss_fn, batches[-1:], n_tokens, compare_with)
        if len(batches) > 1:
            loss = loss + student_backward(run, loss_fn, batches[:-1], n_tokens, stale)
        return loss

    with (
        patch.object(train, "micro_batches", micro_batches_of_rows),
        patch.object(train, "prompt_backward", keep_prompt),
        patch.object(train, "student_backward", distil),
    ):
        yield


@contextmanager
def teacher_dropout():
    """The teacher has dropout in the pass that gives the prompt its gradient."""
    hidden_states = train.hidden_states

    def with_dropout(model, *args):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = TEACHER_DROPOUT
            if hasattr(module, "dropout"):  # attention's
                module.dropout = TEACHER_DROPOUT
        try:
            return hidden_states(model, *args)
        finally:
            model.eval()

    with patch.object(train, "hidden_states", with_dropout):
        yield


PATCHES = {
    "stale-prompt": stale_prompt,
    "micro-batch-means": micro_batch_means,
    "teacher-dropout": teacher_dropout,
}
