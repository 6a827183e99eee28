"""Algorithm 1 and the step functions around it, against the NumPy computation in reference.py: gradients, who gets them and when,
what a window is averaged over, one and two ranks, dropout, and the student's own samples.

Models are tiny and in float64, and so are the losses here (they round to float32 otherwise), so that a wrong formula can't hide
behind rounding. Responses are given, but where sampling itself is tested.
"""

import functools
import math
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from helpers import ROOT, run_command, stored_weights, tiny_model
from torch.nn.parallel import DistributedDataParallel

import train
from data import dist
from data.rows import Example
from model import TRANSPOSED, Config
from prompt import freeze

V, END, T = 29, 28, 10  # vocabulary, end-of-text, optimizer steps
STUDENT = Config(n_layer=1, n_embd=16, n_head=2, vocab_size=V, n_positions=64, dropout=0.0)
TEACHER = Config(n_layer=2, n_embd=24, n_head=3, vocab_size=V, n_positions=64, dropout=0.0)
PROMPT = 0.4 * np.random.default_rng(1).standard_normal((3, TEACHER.n_embd))
RESPONSE_LENGTHS = (1, 3, 0, 12, 2, 7, 1, 5)


def make_examples(response_lengths, seed=2):
    """Rows of which the lengths differ, with 0 (what batches are padded with) and end-of-text among their tokens."""
    rng = np.random.default_rng(seed)
    examples = []
    for index, length in enumerate(response_lengths):
        request, response = (
            rng.integers(0, V, rng.integers(2, 7)).tolist(),
            rng.integers(0, V, length).tolist(),
        )
        if length and index % 2 == 0:
            response[-1] = END
        elif length:
            response[-1] = 0
        examples.append(Example(100 + index, request, response))
    return examples


EXAMPLES = make_examples(RESPONSE_LENGTHS)


def rows_of(examples):
    return [(e.request, e.response) for e in examples]


def make_run(
    dtype=torch.float64, dropout=0.0, teacher_dropout=0.0, micro_batch_size=3, lr=1e-2, **settings
):
    """A Run of tiny models. The prompt's learning rate is ten times the student's, so that a stale prompt shows."""
    student = tiny_model(replace(STUDENT, dropout=dropout)).to(dtype)
    teacher = freeze(tiny_model(replace(TEACHER, dropout=teacher_dropout)).train().to(dtype))
    P = torch.tensor(PROMPT, dtype=dtype, requires_grad=True)
    values = {
        "method": "promptkd",
        "student": "tiny",
        "data": "none",
        "global_batch_size": 8,
        "lr": lr,
        "epochs": 1,
        "schedule": "constant",
        "max_new_tokens": 16,
    }
    s = train.Settings(**{**values, **train.PROMPT, **settings})
    run = train.Run(
        settings=s,
        total_steps=T,
        global_batch_size=s.global_batch_size,
        micro_batch_size=micro_batch_size,
        device=torch.device("cpu"),
        tokenizer=SimpleNamespace(eot_token=END),
        student=student,
        ddp_student=student,
        optimizer=train.adamw(student.parameters(), s),
        teacher=teacher,
        P=P,
        prompt_optimizer=train.adamw([P], s),
        clock={"since": 0.0},
        text=TEXT,
    )
    if torch.distributed.is_initialized():
        run.ddp_student = DistributedDataParallel(student)
    train.set_learning_rate(run.optimizer, lr)
    train.set_learning_rate(run.prompt_optimizer, 10 * lr)
    return run


def keep_float64(patch):
    patch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else x.to(torch.float32)
    )


@pytest.fixture
def in_float64(monkeypatch):
    keep_float64(monkeypatch)


def state_of(run):
    """Copies of all that a step could change: {"student": {name: tensor}, "teacher": {...}, "P": tensor}."""
    copies = {
        who: {name: w.detach().clone() for name, w in model.named_parameters()}
        for who, model in (("student", run.student), ("teacher", run.teacher))
    }
    return copies | {"P": run.P.detach().clone()}


def same_bits(a, b):
    return (
        torch.equal(a, b)
        if isinstance(a, torch.Tensor)
        else all(torch.equal(a[name], b[name]) for name in a)
    )


def do_step(patch, run, examples=EXAMPLES, t=0, step=None, rollout=True):
    """One step on examples whose responses are given. Returns its values, and for each update, in order, whose it was, the
    gradients that it was given, and the state before and after."""
    updates, update = [], train.clip_and_step

    def recording_update(optimizer):
        record = SimpleNamespace(
            of="prompt" if optimizer is run.prompt_optimizer else "student",
            P_grad=None if run.P.grad is None else run.P.grad.clone(),
            grads={
                name: w.grad.clone()
                for name, w in run.student.named_parameters()
                if w.grad is not None
            },
            teacher_grads=[
                name for name, w in run.teacher.named_parameters() if w.grad is not None
            ],
            before=state_of(run),
        )
        record.norm = update(optimizer)
        record.after = state_of(run)
        updates.append(record)
        return record.norm

    patch.setattr(train, "clip_and_step", recording_update)
    if rollout:
        patch.setattr(train, "rollout", lambda run, examples, t, teacher_mix=None: examples)
    values = (step or train.promptkd_step)(run, examples, t)
    patch.setattr(train, "clip_and_step", update)
    return {name: float(value) for name, value in values.items()}, updates


# ---- the reference's side ---------------------------------------------------------------------------------------------------------


@functools.cache
def arrays(config):
    return reference.as_arrays(stored_weights(config))


def numpy_losses(run, examples, t, student=None, P=PROMPT):
    s = run.settings
    teacher, student = (
        (arrays(TEACHER), TEACHER.n_head),
        (student or arrays(STUDENT), STUDENT.n_head),
    )
    return reference.promptkd_losses(
        teacher, student, P, rows_of(examples), 1 - t / T, s.reg_weight, s.prompt_kl, s.reg_kl
    )


def some_entries(weights):
    """Two entries of each weight tensor, and two of the embeddings of padding and end-of-text."""
    rng = np.random.default_rng(3)
    entries = [
        (name, tuple(int(rng.integers(n)) for n in w.shape))
        for name, w in weights.items()
        if name != "wpe.weight"
        for _ in range(2)
    ]
    return entries + [
        ("wte.weight", (0, 3)),
        ("wte.weight", (END, 5)),
        ("wpe.weight", (0, 2)),
        ("wpe.weight", (5, 7)),
    ]


def check_student_gradients(grads, loss_fn):
    """grads: of torch, by name. loss_of: student weights as arrays -> the loss in NumPy."""
    weights = arrays(STUDENT)
    assert set(grads) == set(weights)
    for name, index in some_entries(weights):
        wanted = reference.central_difference(lambda: loss_fn(weights), weights[name], index)
        grad = (
            grads[name].T if name.endswith("weight") and ".c_" in name else grads[name]
        )  # stored as in x out
        assert grad[index].item() == pytest.approx(wanted, abs=1e-8, rel=1e-6), (name, index)


# ---- the model that everything here stands on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config, prompt", [(STUDENT, None), (TEACHER, None), (TEACHER, PROMPT)])
def test_reference_and_model_give_the_same_logits(config, prompt):
    model, ids = tiny_model(config).double(), [3, 0, END, 7, 7, 12, 1]
    hidden = model(torch.tensor([ids]), prefix=None if prompt is None else torch.tensor(prompt))
    logits = model.logits(hidden)[0, 0 if prompt is None else len(prompt) :]
    wanted = reference.gpt2_logits(arrays(config), config.n_head, ids, prompt)
    np.testing.assert_allclose(logits.detach().numpy(), wanted, atol=1e-10)
    assert wanted.std() > 0.3  # the test's weights are no flat model


# ---- losses and gradients of Algorithm 1 ------------------------------------------------------------------------------------------

VARIANTS = [
    {},
    {"prompt_kl": "reverse", "reg_kl": "forward"},
    {"prompt_kl": "forward", "reg_kl": "reverse"},
    {"prompt_kl": "forward", "reg_kl": "forward"},
    {"reg_weight": 0.0},
    {"reg_weight": 2.5},
]


@pytest.mark.parametrize("t", [0, 4, T - 1])
@pytest.mark.parametrize(
    "variant",
    VARIANTS,
    ids=lambda v: " ".join(f"{name}={value}" for name, value in v.items()) or "paper",
)
def test_prompt_gradient_is_that_of_equation_3(monkeypatch, in_float64, variant, t):
    run = make_run(**variant)
    _, (prompt, _) = do_step(monkeypatch, run, t=t)
    P = PROMPT.copy()
    for index in [(0, 0), (1, 13), (2, 23)]:
        wanted = reference.central_difference(
            lambda: numpy_losses(run, EXAMPLES, t, P=P)["L_P"], P, index
        )
        assert prompt.P_grad[index].item() == pytest.approx(wanted, abs=1e-8, rel=1e-6)
    assert prompt.P_grad.abs().max() > 0.01


@pytest.mark.parametrize(
    "variant", [{}, {"prompt_kl": "forward", "reg_kl": "forward"}, {"reg_weight": 0.0}]
)
def test_student_gradient_is_that_of_equation_4_behind_the_prompt_just_updated(
    monkeypatch, in_float64, variant
):
    """Table 5's directions are the prompt's alone: the student's loss is the same reverse KL in all of them."""
    run = make_run(**variant)
    _, (prompt, student) = do_step(monkeypatch, run, t=3)
    updated = prompt.after["P"].numpy()
    check_student_gradients(
        student.grads, lambda weights: numpy_losses(run, EXAMPLES, 3, weights, updated)["L_theta"]
    )

    # A stale prompt would have shown: its gradient is another one.
    weights = arrays(STUDENT)
    stale = reference.central_difference(
        lambda: numpy_losses(run, EXAMPLES, 3, weights, PROMPT)["L_theta"], weights["ln_f.bias"], 0
    )
    assert abs(stale - student.grads["ln_f.bias"][0].item()) > 1e-4


@pytest.mark.parametrize(
    "t, variant", [(0, {}), (7, {}), (2, {"reg_kl": "forward"}), (2, {"reg_weight": 0.0})]
)
def test_step_reports_the_losses_of_the_four_equations(monkeypatch, in_float64, t, variant):
    run = make_run(**variant)
    values, (prompt, _) = do_step(monkeypatch, run, t=t)
    wanted = numpy_losses(run, EXAMPLES, t)
    behind_updated = numpy_losses(run, EXAMPLES, t, P=prompt.after["P"].numpy())
    drift = numpy_losses(make_run(), EXAMPLES, t)[
        "L_reg"
    ]  # KL(prompted || bare) whatever the direction trained on
    got = {
        name: values[name]
        for name in ("prompt_kd", "prompt_reg", "prompt_loss", "loss", "kl_prompted_bare")
    }
    assert got == pytest.approx(
        dict(
            zip(
                got,
                (wanted["L_kd"], wanted["L_reg"], wanted["L_P"], behind_updated["L_theta"], drift),
            )
        ),
        rel=1e-5,
    )
    assert values["response_tokens"] == sum(RESPONSE_LENGTHS)


def test_lambda_starts_at_exactly_1_and_falls_evenly_to_one_step_above_0(monkeypatch):
    lambdas = [do_step(monkeypatch, make_run(), t=t)[0]["lambda"] for t in range(T)]
    assert lambdas[0] == 1.0
    assert lambdas == pytest.approx([1 - t / T for t in range(T)])
    assert lambdas[-1] == pytest.approx(1 / T)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_sft_loss_and_gradient_are_the_mean_cross_entropy_over_all_response_tokens(
    monkeypatch, in_float64, micro_batch_size
):
    run = make_run(micro_batch_size=micro_batch_size)
    values, (student,) = do_step(monkeypatch, run, step=train.sft_step)
    n_head, rows = STUDENT.n_head, rows_of(EXAMPLES)
    assert values["loss"] == pytest.approx(
        reference.sft_loss((arrays(STUDENT), n_head), rows), rel=1e-6
    )
    check_student_gradients(
        student.grads, lambda weights: reference.sft_loss((weights, n_head), rows)
    )


def test_kd_is_half_cross_entropy_and_half_forward_kl(monkeypatch, in_float64):
    values, (student,) = do_step(monkeypatch, make_run(), step=train.kd_step)
    teacher, rows = (arrays(TEACHER), TEACHER.n_head), rows_of(EXAMPLES)
    loss_fn = lambda weights: reference.kd_loss(teacher, (weights, STUDENT.n_head), rows)  # noqa: E731
    assert values["loss"] == pytest.approx(loss_fn(arrays(STUDENT)), rel=1e-6)
    check_student_gradients(student.grads, loss_fn)
    assert student.P_grad is None and train.STEPS["seqkd"] is train.STEPS["kd"]


def test_gkd_is_reverse_kl_to_the_bare_teacher(monkeypatch, in_float64):
    values, (student,) = do_step(monkeypatch, make_run(), step=train.gkd_step)
    teacher, rows = (arrays(TEACHER), TEACHER.n_head), rows_of(EXAMPLES)
    loss_fn = lambda weights: reference.gkd_loss(teacher, (weights, STUDENT.n_head), rows)  # noqa: E731
    assert values["loss"] == pytest.approx(loss_fn(arrays(STUDENT)), rel=1e-6)
    check_student_gradients(student.grads, loss_fn)


# ---- MiniLLM ------------------------------------------------------------------------------------------------------------------------


def minillm_run(**settings):
    """A run of four rows an optimizer step, two inner epochs over rollouts of eight rows."""
    run = make_run(global_batch_size=4, **settings)
    run.rollout_steps, run.text = 4, None
    return run


SAMPLED = make_examples((4, 3, 1, 12, 2, 7, 1, 5), seed=8)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_minillm_gradient_is_that_of_the_reference_with_the_q_that_sampled(
    monkeypatch, in_float64, steps_before
):
    """steps_before: optimizer steps since the rollout, after which q_θ is another one than the q that sampled it."""
    run = minillm_run()
    for t in range(steps_before):
        do_step(monkeypatch, run, SAMPLED, t, train.minillm_step)
    run.global_batch_size = 8  # all rows, whose order no longer matters
    weights = reference.as_arrays(
        {
            name: w.T if name.endswith(TRANSPOSED) else w
            for name, w in run.student.state_dict().items()
        }
    )
    if steps_before:
        run.rollout_steps = 8  # still the same rollout
    values, (student,) = do_step(monkeypatch, run, SAMPLED, steps_before, train.minillm_step)
    teacher, sampler, rows = (
        (arrays(TEACHER), TEACHER.n_head),
        (arrays(STUDENT), STUDENT.n_head),
        rows_of(SAMPLED),
    )

    def loss_fn(weights):
        return reference.minillm_loss(teacher, sampler, (weights, STUDENT.n_head), rows)

    assert values["loss"] == pytest.approx(loss_fn(weights), rel=1e-6)
    for name, index in some_entries(weights):
        wanted = reference.central_difference(lambda: loss_fn(weights), weights[name], index)
        grad = student.grads[name].T if name.endswith(TRANSPOSED) else student.grads[name]
        assert grad[index].item() == pytest.approx(wanted, abs=1e-8, rel=1e-5), (name, index)
    if steps_before:
        assert (
            abs(
                values["loss"]
                - reference.minillm_loss(
                    teacher, (weights, STUDENT.n_head), (weights, STUDENT.n_head), rows
                )
            )
            > 1e-3
        )


def test_minillm_samples_once_a_rollout_and_each_inner_epoch_takes_every_row_once_in_its_own_order(
    monkeypatch,
):
    run, sampled, seen = minillm_run(dtype=torch.float32), [], []
    monkeypatch.setattr(
        train,
        "rollout",
        lambda run, examples, t, teacher_mix: sampled.append((t, teacher_mix)) or examples,
    )
    window = train.split_global_batch
    monkeypatch.setattr(
        train,
        "split_global_batch",
        lambda run, rows: seen.append([e.index for e in rows]) or window(run, rows),
    )
    for t in range(8):
        do_step(monkeypatch, run, SAMPLED, t, train.minillm_step, rollout=False)
    assert sampled == [(0, (run.teacher, 0.2)), (4, (run.teacher, 0.2))]
    epochs = [seen[i] + seen[i + 1] for i in range(0, 8, 2)]
    assert all(sorted(epoch) == sorted(e.index for e in SAMPLED) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_minillms_plain_text_adds_kds_loss_on_it(monkeypatch, in_float64):
    run, plain = minillm_run(), minillm_run()
    run.text = TEXT
    for r in (run, plain):
        r.global_batch_size, r.rollout_steps = 8, 1
    values, (with_text,) = do_step(monkeypatch, run, SAMPLED, 0, train.minillm_step)
    alone, (without,) = do_step(monkeypatch, plain, SAMPLED, 0, train.minillm_step)
    teacher, rows = (arrays(TEACHER), TEACHER.n_head), rows_of([TEXT[i % 5] for i in range(8)])

    def loss_fn(weights):
        return reference.kd_loss(teacher, (weights, STUDENT.n_head), rows)

    assert values["loss"] == pytest.approx(alone["loss"], rel=1e-9) and "lm_loss" not in alone
    assert values["lm_loss"] == pytest.approx(loss_fn(arrays(STUDENT)), rel=1e-6)
    check_student_gradients(
        {name: g - without.grads[name] for name, g in with_text.grads.items()}, loss_fn
    )


# ---- who is changed, and when -------------------------------------------------------------------------------------------------------


def test_prompt_step_changes_the_prompt_alone_and_student_step_the_student_alone(monkeypatch):
    run = make_run()
    start = state_of(run)
    _, (prompt, student) = do_step(monkeypatch, run)
    assert (prompt.of, student.of) == ("prompt", "student")
    assert same_bits(prompt.before["P"], start["P"]) and not same_bits(
        prompt.after["P"], start["P"]
    )
    assert same_bits(prompt.after["student"], start["student"])
    assert same_bits(student.before["student"], start["student"])
    for name, w in student.after["student"].items():
        assert not torch.equal(w, start["student"][name]), name
    assert same_bits(student.after["P"], prompt.after["P"]) and same_bits(
        state_of(run)["P"], prompt.after["P"]
    )
    assert same_bits(state_of(run)["teacher"], start["teacher"])


def test_prompt_phase_leaves_no_gradient_in_the_models_and_student_phase_none_in_the_prompt(
    monkeypatch,
):
    _, (prompt, student) = do_step(monkeypatch, make_run())
    assert prompt.grads == {} and prompt.teacher_grads == []
    assert prompt.P_grad is not None
    assert student.P_grad is None and student.teacher_grads == []


def test_a_second_step_starts_from_clean_gradients(monkeypatch):
    """What a run does next equals what a new one does that starts from its weights. Plain SGD, for it has no memory of its own."""

    def plain(run):
        run.optimizer, run.prompt_optimizer = (
            torch.optim.SGD(run.student.parameters(), lr=0.1),
            torch.optim.SGD([run.P], lr=0.1),
        )
        return run

    went_on, begun = plain(make_run()), plain(make_run())
    do_step(monkeypatch, went_on, t=0)
    state = state_of(went_on)
    begun.student.load_state_dict(state["student"])
    begun.P.data.copy_(state["P"])
    for run in (went_on, begun):
        do_step(monkeypatch, run, t=1)
    assert same_bits(state_of(went_on)["P"], state_of(begun)["P"])
    assert same_bits(state_of(went_on)["student"], state_of(begun)["student"])
    assert not same_bits(state_of(went_on)["student"], state["student"])


def test_many_steps_bring_the_student_to_the_teacher_and_never_move_the_teacher(monkeypatch):
    run = make_run(dtype=torch.float32)
    start = state_of(run)
    losses = [do_step(monkeypatch, run, t=t)[0]["loss"] for t in range(T)]
    assert losses[-1] < 0.6 * losses[0]
    assert same_bits(state_of(run)["teacher"], start["teacher"])


# ---- the window, not the micro-batch, is the batch ----------------------------------------------------------------------------------


def gradients_and_result(patch, run, examples, step):
    """The gradients of every update and the weights after the last, by name."""
    run.global_batch_size = len(examples) if dist.world_size() == 1 else len(UNEVEN)
    values, updates = do_step(patch, run, examples, t=3, step=step)
    tensors = {
        f"{u.of} d {name}": g
        for u in updates
        for name, g in (u.grads if u.of == "student" else {"P": u.P_grad}).items()
    }
    tensors |= {f"new {name}": w for name, w in updates[-1].after["student"].items()} | {
        "new P": updates[-1].after["P"]
    }
    return values, tensors


def check_close(tensors, wanted, tolerance=1e-10):
    assert set(tensors) == set(wanted)
    for name in wanted:
        assert (tensors[name] - wanted[name]).abs().max() < tolerance, name


STEPS = {
    method: step for method, step in train.STEPS.items() if method not in ("pretrain", "seqkd")
}  # those two are sft's and kd's
TEXT = make_examples((6,) * 5, seed=6)  # MiniLLM's plain text


@pytest.mark.parametrize("method", STEPS)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_micro_batches_of_any_size_give_the_gradients_and_the_update_of_one_row_at_a_time(
    monkeypatch, in_float64, method, size
):
    values, tensors = gradients_and_result(
        monkeypatch, make_run(micro_batch_size=size), EXAMPLES, STEPS[method]
    )
    wanted_values, wanted = gradients_and_result(
        monkeypatch, make_run(micro_batch_size=1), EXAMPLES, STEPS[method]
    )
    check_close(tensors, wanted)
    assert values == pytest.approx(wanted_values, rel=1e-6)


@pytest.mark.parametrize("method", STEPS)
def test_rows_of_another_order_give_the_same_update(monkeypatch, in_float64, method):
    _, tensors = gradients_and_result(monkeypatch, make_run(), EXAMPLES[::-1], STEPS[method])
    _, wanted = gradients_and_result(monkeypatch, make_run(), EXAMPLES, STEPS[method])
    check_close(tensors, wanted)


@pytest.mark.parametrize("method", STEPS)
def test_a_row_without_a_response_changes_nothing(monkeypatch, in_float64, method):
    with_responses = [e for e in EXAMPLES if e.response]
    assert len(with_responses) == len(EXAMPLES) - 1
    results = []
    for examples in (with_responses, EXAMPLES):
        run = make_run()
        run.text = None  # of which a step takes as many blocks as rows
        results.append(gradients_and_result(monkeypatch, run, examples, STEPS[method])[1])
    check_close(*results)


@pytest.mark.parametrize(
    "method", [method for method in STEPS if method != "minillm"]
)  # whose rows are sampled, a token at least
def test_a_window_without_any_response_token_has_loss_and_gradients_of_zero(monkeypatch, method):
    values, updates = do_step(
        monkeypatch, make_run(), [replace(e, response=[]) for e in EXAMPLES], step=STEPS[method]
    )
    assert values["loss"] == 0 and all(math.isfinite(value) for value in values.values())
    for u in updates:
        grads = [u.P_grad] if u.of == "prompt" else u.grads.values()
        assert all(grad.abs().max() == 0 for grad in grads)


# ---- one and two ranks --------------------------------------------------------------------------------------------------------------

# Nine rows over two ranks in micro-batches of four: one rank has two micro-batches, the other one, and far fewer tokens.
UNEVEN = make_examples((12, 1, 9, 0, 14, 2, 11, 1, 8), seed=4)
PLAIN = [Example(e.index, e.request, []) for e in make_examples([0] * 32, seed=5)]


def work_of_a_rank(directory):
    """All that the two-rank test compares, on this rank's share of the rows. Without torchrun, the whole."""
    mine = slice(dist.rank(), None, dist.world_size())
    result = {}
    with pytest.MonkeyPatch.context() as patch:
        keep_float64(patch)
        for method, step in STEPS.items():
            result[method] = gradients_and_result(
                patch, make_run(micro_batch_size=4), UNEVEN[mine], step
            )
        run = make_run(micro_batch_size=4)
        result["validation"] = [
            train.validation_loss(run, model, UNEVEN, P)
            for model, P in ((run.student, None), (run.teacher, run.P))
        ]
    responses = train.rollout(make_run(dtype=torch.float32), PLAIN[mine], 5)
    result["rollout"] = sorted((e.index, e.response) for e in dist.all_gather_list(responses))
    torch.save(result, directory / f"{dist.rank()}-of-{dist.world_size()}.pt")


@pytest.fixture(scope="module")
def two_ranks_and_one(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = run_command(
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        __file__,
        directory,
        PYTHONPATH=str(ROOT),
    )
    assert done.returncode == 0, done.stderr
    work_of_a_rank(directory)
    return [
        torch.load(directory / file, weights_only=True)
        for file in ("0-of-2.pt", "1-of-2.pt", "0-of-1.pt")
    ]


@pytest.mark.parametrize("method", STEPS)
def test_two_ranks_give_the_gradients_losses_and_update_of_one(two_ranks_and_one, method):
    first, second, alone = (result[method] for result in two_ranks_and_one)
    for values, tensors in (first, second):
        check_close(tensors, alone[1])
        assert values == pytest.approx(alone[0], rel=1e-6)
    assert alone[0]["response_tokens"] == 58


@pytest.mark.parametrize("method", STEPS)
def test_both_ranks_hold_the_same_bits_after_a_step(two_ranks_and_one, method):
    first, second, _ = (result[method][1] for result in two_ranks_and_one)
    for name in first:
        if name.startswith("new"):
            assert torch.equal(first[name], second[name]), name


def test_two_ranks_draw_the_responses_of_one(two_ranks_and_one):
    first, second, alone = (result["rollout"] for result in two_ranks_and_one)
    assert first == second == alone
    assert len(alone) == 32 and len({tuple(response) for _, response in alone}) > 25


def test_two_ranks_give_the_validation_losses_of_one(two_ranks_and_one):
    for result in two_ranks_and_one:
        assert result["validation"] == pytest.approx(two_ranks_and_one[-1]["validation"], rel=1e-12)


# ---- dropout ------------------------------------------------------------------------------------------------------------------------


def seeded_step(patch, seed, **how):
    torch.manual_seed(seed)
    return do_step(patch, make_run(**how))[1]


def test_prompt_phase_has_no_dropout_in_student_or_teacher(monkeypatch):
    plain = seeded_step(monkeypatch, 0)[0]
    for seed in (0, 1):
        dropped = seeded_step(monkeypatch, seed, dropout=0.5, teacher_dropout=0.5)[0]
        assert same_bits(dropped.P_grad, plain.P_grad)


def test_student_phase_has_dropout_in_the_student_that_hangs_on_the_seed(monkeypatch):
    plain, first, again, other = (
        seeded_step(monkeypatch, seed, dropout=dropout)[1].grads
        for seed, dropout in ((0, 0.0), (0, 0.5), (0, 0.5), (1, 0.5))
    )
    assert same_bits(first, again)
    for grads in (plain, other):
        assert not first["wpe.weight"].allclose(grads["wpe.weight"], atol=1e-3)


def test_student_phase_has_no_dropout_in_the_teacher(monkeypatch):
    plain = seeded_step(monkeypatch, 0)[1]
    dropped = seeded_step(monkeypatch, 0, teacher_dropout=0.5)[1]
    assert same_bits(dropped.grads, plain.grads)


def test_sft_has_dropout(monkeypatch):
    runs = [make_run(dropout=dropout) for dropout in (0.0, 0.5)]
    plain, dropped = (do_step(monkeypatch, run, step=train.sft_step)[1][0].grads for run in runs)
    assert not plain["wpe.weight"].allclose(dropped["wpe.weight"], atol=1e-3)


def test_sampling_and_validation_have_no_dropout_even_right_after_a_training_forward():
    results = []
    for dropout in (0.0, 0.5):
        run = make_run(dtype=torch.float32, dropout=dropout)
        run.student.train()
        responses = [e.response for e in train.rollout(run, PLAIN, 0)]
        run.student.train()
        results.append((responses, train.validation_loss(run, run.student, EXAMPLES)))
    assert results[0] == results[1]


# ---- the student's own samples ------------------------------------------------------------------------------------------------------


def responses(examples, t=0, **how):
    return {
        e.index: e.response
        for e in train.rollout(make_run(dtype=torch.float32, **how), examples, t)
    }


def test_rollout_samples_the_whole_window_in_one_call_and_keeps_requests_and_order(monkeypatch):
    calls = []

    def sample_all(model, requests, keys, *rest, **how):
        calls.append(requests)
        return [[index, END] for index in range(len(requests))], None

    monkeypatch.setattr(train, "sample_all", sample_all)
    sampled = train.rollout(make_run(), PLAIN, 0)
    assert calls == [[e.request for e in PLAIN]]
    assert [(e.index, e.request) for e in sampled] == [(e.index, e.request) for e in PLAIN]
    assert [e.response for e in sampled] == [[index, END] for index in range(len(PLAIN))]


def test_batches_of_8_and_of_32_draw_the_same_responses():
    whole = responses(PLAIN)
    parts = {}
    for i in range(0, 32, 8):
        parts |= responses(PLAIN[i : i + 8])
    assert parts == whole
    assert responses(PLAIN[::-1]) == whole


def test_responses_hang_on_seed_step_and_row():
    same = [replace(PLAIN[0], index=index) for index in range(8)]  # one request under eight numbers
    assert len({tuple(response) for response in responses(same).values()}) > 4
    assert responses(PLAIN, t=0) != responses(PLAIN, t=1) and responses(
        PLAIN, seed=10
    ) != responses(PLAIN, seed=11)
    assert responses(PLAIN, t=1) == responses(PLAIN, t=1)


def test_responses_follow_the_students_distribution():
    """First tokens drawn for one request under many numbers, against the reference's probabilities."""
    n = 4000
    same = [Example(index, [3, 9, 4], []) for index in range(n)]
    first = [response[0] for response in responses(same, max_new_tokens=1).values()]
    logits = reference.gpt2_logits(arrays(STUDENT), STUDENT.n_head, [3, 9, 4])[-1]
    probs = np.exp(reference.log_softmax(logits))
    counts = np.bincount(first, minlength=V)
    chi_squared = ((counts - n * probs) ** 2 / (n * probs)).sum()
    assert (
        chi_squared < 60
    )  # 28 degrees of freedom: above in 0.04 % of draws; these are always the same


def test_responses_end_with_the_first_end_of_text_or_at_the_limit():
    lengths = set()
    for response in responses(PLAIN, max_new_tokens=12).values():
        assert END not in response[:-1]
        assert response[-1] == END or len(response) == 12
        lengths.add(len(response))
    assert len(lengths) > 2


def test_rollout_gives_no_gradient_and_step_trains_on_what_it_sampled(monkeypatch):
    run = make_run(dtype=torch.float32)
    seen = []
    monkeypatch.setattr(
        train,
        "micro_batches",
        lambda examples, *rest, original=train.micro_batches: (
            seen.append(examples) or original(examples, *rest)
        ),
    )
    values, _ = do_step(monkeypatch, run, PLAIN[:8], rollout=False)
    wanted = responses(PLAIN[:8])
    assert [(e.index, e.response) for e in seen[0]] == list(wanted.items())
    assert values["response_tokens"] == sum(len(response) for response in wanted.values())


# ---- updates ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, wanted", [(10.0, 1.0), (0.5, 0.5)])
def test_gradients_are_clipped_together_at_norm_1_and_the_norm_before_is_returned(size, wanted):
    weights = [torch.zeros(3, 2, requires_grad=True), torch.zeros(4, requires_grad=True)]
    rng = np.random.default_rng(6)
    grads = [rng.standard_normal(w.shape) for w in weights]
    norm = math.sqrt(sum((g**2).sum() for g in grads))
    grads = [size * g / norm for g in grads]
    for w, g in zip(weights, grads):
        w.grad = torch.tensor(g, dtype=torch.float32)
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=1.0)
    assert float(train.clip_and_step(optimizer)) == pytest.approx(size, rel=1e-5)
    for w, g in zip(weights, reference.clipped(grads)):
        np.testing.assert_allclose(w.detach().numpy(), -g, atol=1e-5)
    assert math.sqrt(sum(float((w.detach() ** 2).sum()) for w in weights)) == pytest.approx(
        wanted, abs=1e-4
    )
    assert all(w.grad is None or w.grad.abs().max() == 0 for w in weights)


def test_prompt_and_student_are_clipped_each_by_its_own_norm(monkeypatch, in_float64):
    run = make_run(reg_weight=1000.0)
    values, (prompt, student) = do_step(monkeypatch, run)
    assert (
        values["prompt_grad_norm"] == pytest.approx(prompt.P_grad.norm().item(), rel=1e-6)
        and values["prompt_grad_norm"] > 1
    )
    assert values["grad_norm"] == pytest.approx(
        math.sqrt(sum(float((g**2).sum()) for g in student.grads.values())), rel=1e-6
    )
    lr = 1e-1
    wanted = reference.adamw(PROMPT, reference.clipped([prompt.P_grad.numpy()]), lr, 0.01)
    np.testing.assert_allclose(prompt.after["P"].numpy(), wanted, atol=1e-7)


@pytest.mark.parametrize("beta_2", [0.999, 0.95])
def test_optimizer_is_adamw_with_decay_on_matrices_and_none_on_biases_and_layer_norm(beta_2):
    """Two steps with given gradients, against the formulas; decay 0.01, first beta 0.9."""
    model, lr = tiny_model(STUDENT).double(), 0.05
    optimizer = train.adamw(model.parameters(), SimpleNamespace(beta2=beta_2, weight_decay=0.01))
    train.set_learning_rate(optimizer, lr)
    start = {name: w.detach().numpy().copy() for name, w in model.named_parameters()}
    rng = np.random.default_rng(7)
    grads = {
        name: [0.001 * rng.standard_normal(w.shape) for _ in range(2)] for name, w in start.items()
    }
    for step in range(2):
        for name, w in model.named_parameters():
            w.grad = torch.tensor(grads[name][step])
        optimizer.step()
    for name, w in model.named_parameters():
        decay = 0.0 if name.endswith("bias") or "ln_" in name else 0.01
        np.testing.assert_allclose(
            w.detach().numpy(),
            reference.adamw(start[name], grads[name], lr, decay, 0.9, beta_2),
            atol=1e-6,
            err_msg=name,
        )


def test_the_prompt_is_decayed_too():
    P = torch.full((3, 4), 2.0, requires_grad=True)
    optimizer = train.adamw([P], SimpleNamespace(beta2=0.999, weight_decay=0.01))
    train.set_learning_rate(optimizer, 0.1)
    P.grad = torch.zeros_like(P)
    optimizer.step()
    assert P.detach().numpy() == pytest.approx(np.full((3, 4), 2.0 * (1 - 0.1 * 0.01)))


# ---- validation ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_validation_loss_is_the_mean_over_tokens_bare_and_behind_the_prompt(
    in_float64, micro_batch_size
):
    run = make_run(micro_batch_size=micro_batch_size)
    losses = [
        train.validation_loss(run, run.student, EXAMPLES),
        train.validation_loss(run, run.teacher, EXAMPLES),
    ]
    losses.append(train.validation_loss(run, run.teacher, EXAMPLES, run.P))
    rows = rows_of(EXAMPLES)
    wanted = [
        reference.sft_loss((arrays(config), config.n_head), rows) for config in (STUDENT, TEACHER)
    ]
    teacher = (arrays(TEACHER), TEACHER.n_head)
    prompted = [
        reference.token_cross_entropy(z, token)
        for row in rows
        for z, token in zip(reference.response_logits(teacher, row, PROMPT), row[1])
    ]
    assert losses == pytest.approx([*wanted, sum(prompted) / len(prompted)], rel=1e-9)
    assert abs(losses[2] - losses[1]) > 0.01
    assert all(
        w.grad is None for w in [run.P, *run.student.parameters(), *run.teacher.parameters()]
    )


if __name__ == "__main__":  # one of the two ranks of two_ranks_and_one
    torch.set_num_threads(1)
    dist.init_process()
    work_of_a_rank(Path(sys.argv[1]))
    dist.shutdown()
    os._exit(0)  # gloo's threads abort the interpreter's own way out once in a while
