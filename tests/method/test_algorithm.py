"""Algorithm 1 and the other methods' steps against the NumPy computation in reference.py.

Covered are gradients, what gets them and when, the average over the global batch, one and two
ranks, dropout, and the student's own samples. Models are tiny. Models and losses are in float64, so
that rounding can't hide a wrong formula. Responses are given, except where sampling is tested.
"""

import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from helpers import METHODS_WITH_STEPS, PROMPT, fork_ranks, stored_weights, tiny_model, wait_for

import train
from data.process import dist
from data.runs.methods import METHODS
from data.runs.optim import adamw, clip_and_step, set_learning_rate
from data.runs.validation import validation_loss
from data.sets.rows import Example, make_batch
from model import GPT, TRANSPOSED, Config
from prompt import freeze, prepend, response_hidden

CPU = torch.device("cpu")
V, EOS, T = 29, 28, 10  # vocabulary, end-of-text, optimizer steps
STUDENT = Config(n_layer=1, n_embd=16, n_head=2, vocab_size=V, n_positions=64, dropout=0.0)
TEACHER = Config(n_layer=2, n_embd=24, n_head=3, vocab_size=V, n_positions=64, dropout=0.0)
P = 0.4 * np.random.default_rng(1).standard_normal((3, TEACHER.n_embd))
RESPONSE_LENGTHS = (1, 3, 0, 12, 2, 7, 1, 5)


def make_examples(response_lengths, seed=2):
    """Examples with requests of different lengths. Every second response ends with end-of-text, the
    others with 0, which batches are padded with."""
    rng = np.random.default_rng(seed)
    examples = []
    for index, length in enumerate(response_lengths):
        request = rng.integers(0, V, rng.integers(2, 7)).tolist()
        response = rng.integers(0, V, length).tolist()
        if length:
            response[-1] = EOS if index % 2 == 0 else 0
        examples.append(Example(100 + index, request, response))
    return examples


EXAMPLES = make_examples(RESPONSE_LENGTHS)
SAMPLED = make_examples((4, 3, 1, 12, 2, 7, 1, 5), seed=8)  # MiniLLM samples at least one token
LM_BLOCKS = make_examples((6,) * 5, seed=6)  # MiniLLM's plain text
REQUESTS = [Example(e.index, e.request, []) for e in make_examples([0] * 32, seed=5)]
STEPS = {name: train.STEPS[name] for name in METHODS_WITH_STEPS}


def rows_of(examples):
    return [(e.request, e.response) for e in examples]


def make_run(
    dtype=torch.float64,
    dropout=0.0,
    teacher_dropout=0.0,
    micro_batch_tokens=45,
    lr=1e-2,
    **settings,
):
    """A Run of tiny models, whose eight rows are three micro-batches. The prompt's learning rate is
    ten times the student's, so that a stale prompt is noticed."""
    values = {"student": "tiny", "data": "none", "global_batch_size": 8, "lr": lr, "epochs": 1}
    values |= {"schedule": "constant", "max_new_tokens": 16, **PROMPT, **settings}
    s = train.Settings("promptkd", **values)
    student = tiny_model(replace(STUDENT, dropout=dropout)).to(dtype)
    teacher = freeze(tiny_model(replace(TEACHER, dropout=teacher_dropout)).train().to(dtype))
    prompt = torch.tensor(P, dtype=dtype, requires_grad=True)
    run = train.Run(
        settings=s,
        total_steps=T,
        global_batch_size=s.global_batch_size,
        micro_batch_tokens=micro_batch_tokens,
        device=CPU,
        tokenizer=SimpleNamespace(eot_token=EOS),
        student=student,
        ddp_student=dist.wrap_in_ddp(student, CPU),
        optimizer=adamw(student.parameters(), s, sharded=True),
        teacher=teacher,
        P=prompt,
        prompt_optimizer=adamw([prompt], s),
        lm_blocks=LM_BLOCKS,
    )
    set_learning_rate(run.optimizer, lr)
    set_learning_rate(run.prompt_optimizer, 10 * lr)
    return run


def keep_float64(patch):
    def to_float(x):
        return x if x.dtype == torch.float64 else x.to(torch.float32)

    patch.setattr(torch.Tensor, "float", to_float)


@pytest.fixture
def in_float64(monkeypatch):
    keep_float64(monkeypatch)


def state_of(run):
    """Copies of all that a step could change: {"student": {name: tensor}, "teacher": ..., "P"}."""
    models = {"student": run.student, "teacher": run.teacher}
    state = {
        name: {n: w.detach().clone() for n, w in model.named_parameters()}
        for name, model in models.items()
    }
    return state | {"P": run.P.detach().clone()}


def same_bits(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return all(torch.equal(a[name], b[name]) for name in a)


def take_step(patch, run, examples=EXAMPLES, t=0, step=train.promptkd_step, sample=False):
    """One step, on the examples' own responses unless `sample`.

    Returns its metrics, and for each update in order which one it was, the gradients that it was
    given, and the state before and after.
    """
    updates = []

    def recording_step(optimizer):
        gradients = {n: w.grad for n, w in run.student.named_parameters() if w.grad is not None}
        update = SimpleNamespace(
            name="prompt" if optimizer is run.prompt_optimizer else "student",
            P_grad=None if run.P.grad is None else run.P.grad.clone(),
            grads={name: gradient.clone() for name, gradient in gradients.items()},
            teacher_grads=[n for n, w in run.teacher.named_parameters() if w.grad is not None],
            before=state_of(run),
        )
        norm = clip_and_step(optimizer)
        update.after = state_of(run)
        updates.append(update)
        return norm

    def given_responses(run, examples, t, teacher_mix=None):
        run.student.eval()  # as sampling leaves it
        return examples

    patch.setattr(train, "clip_and_step", recording_step)
    if not sample:
        patch.setattr(train, "rollout", given_responses)
    metrics = step(run, examples, t)
    return {name: float(value) for name, value in metrics.items()}, updates


# ---- the reference -------------------------------------------------------------------------------


@functools.cache
def arrays(config):
    return reference.as_arrays(stored_weights(config))


TEACHER_ARRAYS = (arrays(TEACHER), TEACHER.n_head)


def student_arrays(weights=None):
    return (weights or arrays(STUDENT), STUDENT.n_head)


def equation_losses(run, t, weights=None, prompt=P):
    """Equations 1 to 4 on EXAMPLES."""
    s, lam = run.settings, 1 - t / T
    variant = (lam, s.reg_weight, s.prompt_kl, s.reg_kl)
    rows = rows_of(EXAMPLES)
    return reference.promptkd_losses(
        TEACHER_ARRAYS, student_arrays(weights), prompt, rows, *variant
    )


def central_difference(loss_fn, arrays, directions, h=1e-5):
    """The derivative of loss_fn() when every array moves along its direction."""
    values = []
    for step in (h, -2 * h, h):
        for name, direction in directions.items():
            arrays[name] += step * direction
        values.append(loss_fn())
    return (values[0] - values[1]) / (2 * h)


def check_student_gradients(grads, loss_fn, weights=None, rel=1e-6):
    """Compare gradients with finite differences: along a random direction in all the weights, in
    each kind of weight, and in the embeddings of padding, end-of-text and two positions.

    loss_fn: student weights, as arrays -> the loss in NumPy.
    """
    weights = {name: w.copy() for name, w in (weights or arrays(STUDENT)).items()}
    stored = {n: (g.T if n.endswith(TRANSPOSED) else g).numpy() for n, g in grads.items()}
    assert set(stored) == set(weights)
    rng = np.random.default_rng(3)
    kinds = {"all": "", "attention": ".attn.", "MLP": ".mlp.", "LayerNorm": "ln_", "wte": "wte"}
    for kind, part in kinds.items():
        names = [name for name in weights if part in name]
        directions = {name: rng.standard_normal(weights[name].shape) for name in names}
        expected = central_difference(lambda: loss_fn(weights), weights, directions)
        got = sum((stored[name] * direction).sum() for name, direction in directions.items())
        assert got == pytest.approx(expected, abs=1e-7, rel=rel), kind
    special = [("wte.weight", (0, 3)), ("wte.weight", (EOS, 5))]
    for name, index in [*special, ("wpe.weight", (0, 2)), ("wpe.weight", (5, 7))]:
        expected = reference.central_difference(lambda: loss_fn(weights), weights[name], index)
        assert stored[name][index] == pytest.approx(expected, abs=1e-8, rel=rel), (name, index)


@pytest.mark.parametrize("config, prompt", [(STUDENT, None), (TEACHER, None), (TEACHER, P)])
def test_reference_and_model_give_the_same_logits(in_float64, config, prompt):
    model, ids = tiny_model(config).double(), [3, 0, EOS, 7, 7, 12, 1]
    inputs = torch.tensor([ids])
    if prompt is not None:
        inputs = prepend(torch.tensor(prompt), model, inputs)
    logits = model.logits(model(inputs))[0, -len(ids) :]
    expected = reference.gpt2_logits(arrays(config), config.n_head, ids, prompt)
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-10)
    assert expected.std() > 0.3  # a flat distribution would hide errors


# ---- losses and gradients of Algorithm 1 ---------------------------------------------------------

VARIANTS = {
    "paper": {},
    "forward L_reg": {"prompt_kl": "reverse", "reg_kl": "forward"},
    "forward L_kd": {"prompt_kl": "forward", "reg_kl": "reverse"},
    "both forward": {"prompt_kl": "forward", "reg_kl": "forward"},
    "reg 0": {"reg_weight": 0.0},
    "reg 2.5": {"reg_weight": 2.5},
}


@pytest.mark.parametrize("t", [0, 4, T - 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prompt_gradient_is_that_of_equation_3(monkeypatch, in_float64, variant, t):
    run = make_run(**VARIANTS[variant])
    _, (update, _) = take_step(monkeypatch, run, t=t)
    prompt = {"P": P.copy()}

    def loss_fn():
        return equation_losses(run, t, prompt=prompt["P"])["L_P"]

    direction = np.random.default_rng(4).standard_normal(P.shape)
    expected = central_difference(loss_fn, prompt, {"P": direction})
    got = (update.P_grad.numpy() * direction).sum()
    assert got == pytest.approx(expected, abs=1e-8, rel=1e-6)
    expected = reference.central_difference(loss_fn, prompt["P"], (1, 13))
    assert update.P_grad[1, 13].item() == pytest.approx(expected, abs=1e-8, rel=1e-6)
    assert update.P_grad.abs().max() > 0.01


@pytest.mark.parametrize("variant", ["paper", "both forward", "reg 0"])
def test_student_gradient_is_that_of_equation_4_with_the_updated_prompt(
    monkeypatch, in_float64, variant
):
    """Table 5 changes the directions of the prompt's losses. The student's is always reverse KL."""
    run = make_run(**VARIANTS[variant])
    _, (prompt, student) = take_step(monkeypatch, run, t=3)

    def loss_fn(weights, prompt):
        return equation_losses(run, 3, weights, prompt)["L_theta"]

    updated = prompt.after["P"].numpy()
    check_student_gradients(student.grads, lambda weights: loss_fn(weights, updated))

    # The check would have noticed a stale prompt.
    weights = {name: w.copy() for name, w in arrays(STUDENT).items()}
    bias = weights["ln_f.bias"]
    stale = reference.central_difference(lambda: loss_fn(weights, P), bias, 0)
    assert abs(stale - student.grads["ln_f.bias"][0].item()) > 1e-4


@pytest.mark.parametrize(
    "t, variant", [(0, "paper"), (7, "paper"), (2, "forward L_reg"), (2, "reg 0")]
)
def test_step_reports_the_losses_of_the_four_equations(monkeypatch, in_float64, t, variant):
    run = make_run(**VARIANTS[variant])
    metrics, (prompt, _) = take_step(monkeypatch, run, t=t)
    before = equation_losses(run, t)
    expected = {
        "prompt_kd": before["L_kd"],
        "prompt_reg": before["L_reg"],
        "prompt_loss": before["L_P"],
        "loss": equation_losses(run, t, prompt=prompt.after["P"].numpy())["L_theta"],
        # KL(prompted || bare), whichever direction is trained on
        "kl_prompted_bare": equation_losses(make_run(), t)["L_reg"],
        "response_tokens": sum(RESPONSE_LENGTHS),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_lambda_starts_at_exactly_1_and_falls_linearly_to_one_step_above_0(monkeypatch):
    lambdas = [take_step(monkeypatch, make_run(), t=t)[0]["lambda"] for t in range(T)]
    assert lambdas[0] == 1.0
    assert lambdas == pytest.approx([1 - t / T for t in range(T)])
    assert lambdas[-1] == pytest.approx(1 / T)


# ---- the other methods ---------------------------------------------------------------------------


def sft_loss(weights, rows):
    return reference.sft_loss(student_arrays(weights), rows)


def kd_loss(weights, rows):
    """Half the cross-entropy, half the forward KL."""
    return reference.kd_loss(TEACHER_ARRAYS, student_arrays(weights), rows)


def gkd_loss(weights, rows):
    """The reverse KL to the teacher without a prompt."""
    return reference.gkd_loss(TEACHER_ARRAYS, student_arrays(weights), rows)


@pytest.mark.parametrize(
    "method, loss_fn, micro_batch_tokens",
    [("sft", sft_loss, 1), ("sft", sft_loss, 45), ("kd", kd_loss, 45), ("gkd", gkd_loss, 45)],
)
def test_loss_and_gradient_are_the_mean_over_all_response_tokens(
    monkeypatch, in_float64, method, loss_fn, micro_batch_tokens
):
    run, rows = make_run(micro_batch_tokens=micro_batch_tokens), rows_of(EXAMPLES)
    metrics, (student,) = take_step(monkeypatch, run, step=STEPS[method])
    assert metrics["loss"] == pytest.approx(loss_fn(arrays(STUDENT), rows), rel=1e-6)
    check_student_gradients(student.grads, lambda weights: loss_fn(weights, rows))
    assert student.P_grad is None


def test_seqkd_and_pretrain_share_the_steps_of_kd_and_sft():
    assert train.STEPS["seqkd"] is train.STEPS["kd"]
    assert train.STEPS["pretrain"] is train.STEPS["sft"]


def minillm_run(**settings):
    """A run of four rows per optimizer step, and two inner epochs over rollouts of eight rows."""
    run = make_run(global_batch_size=4, **settings)
    run.rollout_steps, run.lm_blocks = 4, None
    return run


@pytest.mark.parametrize("steps_before", [0, 2])
def test_minillm_gradient_is_that_of_the_reference_with_the_q_that_sampled(
    monkeypatch, in_float64, steps_before
):
    """steps_before: optimizer steps since the rollout, so that q_θ is not the q that sampled it."""
    run, rows = minillm_run(), rows_of(SAMPLED)
    for t in range(steps_before):
        take_step(monkeypatch, run, SAMPLED, t, train.minillm_step)
    run.global_batch_size = 8  # all rows, so that their order does not matter
    weights = {
        name: w.T if name.endswith(TRANSPOSED) else w
        for name, w in run.student.state_dict().items()
    }
    weights = reference.as_arrays(weights)
    if steps_before:
        run.rollout_steps = 8  # the same rollout still
    metrics, (student,) = take_step(monkeypatch, run, SAMPLED, steps_before, train.minillm_step)

    def loss_fn(weights, sampler=None):
        models = (TEACHER_ARRAYS, student_arrays(sampler), student_arrays(weights))
        return reference.minillm_loss(*models, rows)

    assert metrics["loss"] == pytest.approx(loss_fn(weights), rel=1e-6)
    check_student_gradients(student.grads, loss_fn, weights, rel=1e-5)
    if steps_before:
        assert abs(metrics["loss"] - loss_fn(weights, sampler=weights)) > 1e-3


def test_minillm_samples_once_per_rollout_and_each_inner_epoch_has_every_row_in_an_order_of_its_own(
    monkeypatch,
):
    run, sampled, seen = minillm_run(dtype=torch.float32), [], []
    split_global_batch = train.split_global_batch

    def recording_rollout(run, examples, t, teacher_mix):
        run.student.eval()  # as sampling leaves it
        sampled.append((t, teacher_mix))
        return examples

    def recording_split(run, rows):
        seen.append([e.index for e in rows])
        return split_global_batch(run, rows)

    monkeypatch.setattr(train, "rollout", recording_rollout)
    monkeypatch.setattr(train, "split_global_batch", recording_split)
    for t in range(8):
        take_step(monkeypatch, run, SAMPLED, t, train.minillm_step, sample=True)
    assert sampled == [(0, (run.teacher, 0.2)), (4, (run.teacher, 0.2))]
    epochs = [seen[i] + seen[i + 1] for i in range(0, 8, 2)]
    assert all(sorted(epoch) == sorted(e.index for e in SAMPLED) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_minillms_plain_text_adds_the_loss_of_kd_on_it(monkeypatch, in_float64):
    results = []
    for blocks in (LM_BLOCKS, None):
        run = minillm_run()
        run.global_batch_size, run.rollout_steps, run.lm_blocks = 8, 1, blocks
        results.append(take_step(monkeypatch, run, SAMPLED, 0, train.minillm_step))
    (with_text, (update,)), (without_text, (update_without,)) = results
    rows = rows_of([LM_BLOCKS[i % 5] for i in range(8)])
    assert with_text["loss"] == pytest.approx(without_text["loss"], rel=1e-9)
    assert with_text["lm_loss"] == pytest.approx(kd_loss(arrays(STUDENT), rows), rel=1e-6)
    assert "lm_loss" not in without_text
    added = {name: g - update_without.grads[name] for name, g in update.grads.items()}
    check_student_gradients(added, lambda weights: kd_loss(weights, rows))


# ---- what is changed, and when -------------------------------------------------------------------


def test_prompt_update_changes_the_prompt_only_and_student_update_the_student_only(monkeypatch):
    run = make_run()
    start = state_of(run)
    _, (prompt, student) = take_step(monkeypatch, run)
    assert (prompt.name, student.name) == ("prompt", "student")
    assert same_bits(prompt.before["P"], start["P"])
    assert not same_bits(prompt.after["P"], start["P"])
    assert same_bits(prompt.after["student"], start["student"])
    assert same_bits(student.before["student"], start["student"])
    for name, w in student.after["student"].items():
        assert not torch.equal(w, start["student"][name]), name
    assert same_bits(student.after["P"], prompt.after["P"])
    assert same_bits(state_of(run)["P"], prompt.after["P"])
    assert same_bits(state_of(run)["teacher"], start["teacher"])


def test_prompt_phase_leaves_no_gradient_in_the_models_and_student_phase_none_in_the_prompt(
    monkeypatch,
):
    _, (prompt, student) = take_step(monkeypatch, make_run())
    assert prompt.grads == {}
    assert prompt.teacher_grads == []
    assert prompt.P_grad is not None
    assert student.P_grad is None
    assert student.teacher_grads == []


def test_a_gradient_flows_to_the_prompt_in_the_first_loop_and_to_the_student_in_the_second(
    monkeypatch,
):
    """No other hidden states have a graph: not the student's in the first loop, and not those with
    the prompt in the second. Three micro-batches each."""
    flows, run, sum_over_tokens = [], make_run(), train.sum_over_tokens

    def recording_sum(loss_fn, *models, **per_token):
        owners = ["student" if head is run.student.head else "teacher" for _, head in models]
        graphs = [hidden.requires_grad for hidden, _ in models]
        flows.append(list(zip(owners, graphs)))
        return sum_over_tokens(loss_fn, *models, **per_token)

    monkeypatch.setattr(train, "sum_over_tokens", recording_sum)
    take_step(monkeypatch, run)
    prompt_loop = [("teacher", True), ("student", False), ("teacher", False)]
    student_loop = [("student", True), ("teacher", False)]
    assert flows == [prompt_loop] * 3 + [student_loop] * 3
    assert not any(w.requires_grad for w in run.teacher.parameters())


@pytest.mark.parametrize("method", [method for method in STEPS if method != "promptkd"])
def test_in_the_other_methods_a_gradient_flows_to_the_student_only(monkeypatch, method):
    hidden_have_graphs, run, sum_over_tokens = [], make_run(), train.sum_over_tokens

    def recording_sum(loss_fn, *models, **per_token):
        assert models[0][1] is run.student.head
        hidden_have_graphs.append([hidden.requires_grad for hidden, _ in models])
        return sum_over_tokens(loss_fn, *models, **per_token)

    monkeypatch.setattr(train, "sum_over_tokens", recording_sum)
    _, (update,) = take_step(monkeypatch, run, SAMPLED, step=STEPS[method])
    assert hidden_have_graphs
    assert all(graphs == [True, False][: len(graphs)] for graphs in hidden_have_graphs)
    assert update.P_grad is None
    assert update.teacher_grads == []


def test_a_second_step_starts_without_gradients(monkeypatch):
    """The second step of a run equals the first of a new run with its weights. Both use plain SGD,
    which has no state of its own."""

    def make_sgd_run():
        run = make_run()
        run.optimizer = torch.optim.SGD(run.student.parameters(), lr=0.1)
        run.prompt_optimizer = torch.optim.SGD([run.P], lr=0.1)
        return run

    old, new = make_sgd_run(), make_sgd_run()
    take_step(monkeypatch, old, t=0)
    state = state_of(old)
    new.student.load_state_dict(state["student"])
    new.P.data.copy_(state["P"])
    for run in (old, new):
        take_step(monkeypatch, run, t=1)
    assert same_bits(state_of(old)["P"], state_of(new)["P"])
    assert same_bits(state_of(old)["student"], state_of(new)["student"])
    assert not same_bits(state_of(old)["student"], state["student"])


def test_several_steps_bring_the_student_to_the_teacher_and_never_change_the_teacher(monkeypatch):
    run = make_run(dtype=torch.float32)
    start = state_of(run)
    losses = [take_step(monkeypatch, run, t=t)[0]["loss"] for t in range(T)]
    assert losses[-1] < 0.6 * losses[0]
    assert same_bits(state_of(run)["teacher"], start["teacher"])


# ---- the global batch, not the micro-batch, is the batch -----------------------------------------


def gradients_and_result(patch, run, examples, method, t=3):
    """The metrics of a step; the gradients of its updates and the weights after it, by name."""
    run.global_batch_size = len(examples) if dist.world_size() == 1 else len(UNEVEN)
    defaults = METHODS[method].option_defaults()
    run.settings = replace(run.settings, method=method, **defaults)
    metrics, updates = take_step(patch, run, examples, t, step=STEPS[method])
    tensors = {f"new {name}": w for name, w in updates[-1].after["student"].items()}
    tensors["new P"] = updates[-1].after["P"]
    for update in updates:
        grads = update.grads if update.name == "student" else {"P": update.P_grad}
        tensors |= {f"{update.name} d {name}": g for name, g in grads.items()}
    return metrics, tensors


def gradients_of(tensors):
    return {name: tensor for name, tensor in tensors.items() if " d " in name}


def check_close(tensors, expected, tolerance=1e-10):
    assert set(tensors) == set(expected)
    for name in expected:
        assert (tensors[name] - expected[name]).abs().max() < tolerance, name


@pytest.mark.parametrize("method", STEPS)
def test_micro_batches_of_any_size_give_the_update_of_one_row_at_a_time(
    monkeypatch, in_float64, method
):
    """From less than one row to more than all rows. MiniLLM has its plain text, too."""
    passes = record_passes(monkeypatch)

    def take_step_with(micro_batch_tokens):
        passes.clear()
        run = make_run(micro_batch_tokens=micro_batch_tokens)
        result = gradients_and_result(monkeypatch, run, EXAMPLES, method)
        return *result, [n_rows for model, n_rows, _ in passes if model == "student in training"]

    expected_metrics, expected, n_rows = take_step_with(1)
    assert set(n_rows) == {1}  # though every row is longer
    for micro_batch_tokens in (30, 45, 60, 100, 1000):
        metrics, tensors, n_rows = take_step_with(micro_batch_tokens)
        check_close(tensors, expected)
        check_close(gradients_of(tensors), gradients_of(expected), tolerance=1e-14)
        assert metrics == pytest.approx(expected_metrics, rel=1e-6)
        assert max(n_rows) > 1 and (set(n_rows) == {8}) == (micro_batch_tokens == 1000)


def record_passes(patch):
    """A list to which each forward pass of a model adds which one it is, rows and positions."""
    passes, forward = [], GPT.forward

    def recording_forward(self, inputs, *arguments, **kwargs):
        name = "teacher" if len(self.h) == TEACHER.n_layer else "student"
        name = name + " in training" if self.training else name
        name = "prompted " + name if inputs.is_floating_point() else name
        passes.append((name, *inputs.shape[:2]))
        return forward(self, inputs, *arguments, **kwargs)

    patch.setattr(GPT, "forward", recording_forward)
    return passes


def test_positions_of_a_pass_count_with_padding_and_prompt(monkeypatch):
    """Three rows of 15 tokens are 45 positions, but 54 with the prompt's three each."""
    run, passes = make_run(micro_batch_tokens=45), record_passes(monkeypatch)

    def passes_of(name):
        return [(n_rows, n_positions) for found, n_rows, n_positions in passes if found == name]

    validation_loss(run, run.student, EXAMPLES)
    assert passes_of("student") == [(3, 15), (5, 8)]
    passes.clear()
    validation_loss(run, run.teacher, EXAMPLES, run.P)
    prompted, bare = [(2, 18), (3, 12), (3, 9)], [(2, 15), (3, 9), (3, 6)]
    assert passes_of("prompted teacher") == prompted
    passes.clear()
    take_step(monkeypatch, run)
    assert passes_of("prompted teacher") == 2 * prompted  # for the prompt, then for the student
    for name in ("teacher", "student", "student in training"):
        assert passes_of(name) == bare


@pytest.mark.parametrize("method", STEPS)
def test_the_order_of_rows_does_not_matter(monkeypatch, in_float64, method):
    _, tensors = gradients_and_result(monkeypatch, make_run(), EXAMPLES[::-1], method)
    _, expected = gradients_and_result(monkeypatch, make_run(), EXAMPLES, method)
    check_close(tensors, expected)


@pytest.mark.parametrize("method", STEPS)
def test_a_row_without_a_response_changes_nothing(monkeypatch, in_float64, method):
    with_responses = [e for e in EXAMPLES if e.response]
    assert len(with_responses) == len(EXAMPLES) - 1
    results = []
    for examples in (with_responses, EXAMPLES):
        run = make_run()
        run.lm_blocks = None  # a step takes as many of them as it has rows
        results.append(gradients_and_result(monkeypatch, run, examples, method)[1])
    check_close(*results)


# Not of MiniLLM, which samples at least one token per row
@pytest.mark.parametrize("method", [method for method in STEPS if method != "minillm"])
def test_a_global_batch_without_response_tokens_has_loss_and_gradients_of_zero(monkeypatch, method):
    examples = [replace(e, response=[]) for e in EXAMPLES]
    metrics, updates = take_step(monkeypatch, make_run(), examples, step=STEPS[method])
    assert metrics["loss"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    for update in updates:
        grads = [update.P_grad] if update.name == "prompt" else update.grads.values()
        assert all(grad.abs().max() == 0 for grad in grads)


# ---- one and two ranks ---------------------------------------------------------------------------

# Nine rows of up to 17 tokens, of which four and the prompt before each are a micro-batch. Of two
# ranks one has two micro-batches, the other has one, and far fewer tokens.
UNEVEN = make_examples((12, 1, 9, 0, 14, 2, 11, 1, 8), seed=4)


def train_on_this_rank(directory):
    """Everything that the two-rank tests compare, on this rank's rows. One rank has them all."""
    result = {}
    with pytest.MonkeyPatch.context() as patch:
        keep_float64(patch)
        for method in STEPS:
            run, rows = make_run(micro_batch_tokens=80), dist.shard(UNEVEN)
            result[method] = [gradients_and_result(patch, run, rows, method, t) for t in (3, 4)]
        run = make_run(micro_batch_tokens=80)
        result["validation"] = [
            validation_loss(run, model, UNEVEN, prompt)
            for model, prompt in ((run.student, None), (run.teacher, run.P))
        ]
    responses = train.rollout(make_run(dtype=torch.float32), dist.shard(REQUESTS), 5)
    result["rollout"] = sorted((e.index, e.response) for e in dist.all_gather_list(responses))
    torch.save(result, directory / f"{dist.rank()}-of-{dist.world_size()}.pt")


@pytest.fixture(scope="module")
def two_ranks_and_one(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")

    def on_each_rank():
        dist.init_process()
        train_on_this_rank(directory)
        dist.shutdown()

    ranks = fork_ranks(on_each_rank, 2, directory / "log")
    train_on_this_rank(directory)
    assert wait_for(ranks, 120) == [0, 0], (directory / "log0").read_text()
    names = ("0-of-2.pt", "1-of-2.pt", "0-of-1.pt")
    return [torch.load(directory / name, weights_only=True) for name in names]


@pytest.mark.parametrize("method", STEPS)
def test_two_ranks_give_the_gradients_losses_and_update_of_one(two_ranks_and_one, method):
    """In the second step, too: gradients that DDP keeps are zero, and each rank has the states of
    its own part of the parameters."""
    first, second, alone = (result[method] for result in two_ranks_and_one)
    for steps in (first, second):
        for (metrics, tensors), (expected_metrics, expected) in zip(steps, alone, strict=True):
            check_close(tensors, expected)
            assert metrics == pytest.approx(expected_metrics, rel=1e-6)
    assert [metrics["response_tokens"] for metrics, _ in alone] == [58, 58]


@pytest.mark.parametrize("method", STEPS)
def test_both_ranks_have_the_same_weights_bit_for_bit(two_ranks_and_one, method):
    first, second, _ = (result[method][-1][1] for result in two_ranks_and_one)
    for name in first:
        if name.startswith("new"):
            assert torch.equal(first[name], second[name]), name


def test_two_ranks_sample_the_responses_of_one(two_ranks_and_one):
    first, second, alone = (result["rollout"] for result in two_ranks_and_one)
    assert first == second == alone
    assert len(alone) == 32
    assert len({tuple(response) for _, response in alone}) > 25


def test_two_ranks_give_the_validation_losses_of_one(two_ranks_and_one):
    for result in two_ranks_and_one:
        assert result["validation"] == pytest.approx(two_ranks_and_one[-1]["validation"], rel=1e-12)


# ---- dropout -------------------------------------------------------------------------------------


def seeded_updates(patch, seed, step=train.promptkd_step, **dropout):
    torch.manual_seed(seed)
    return take_step(patch, make_run(**dropout), step=step)[1]


def test_prompt_phase_has_no_dropout_in_student_or_teacher(monkeypatch):
    expected = seeded_updates(monkeypatch, 0)[0]
    for seed in (0, 1):
        update = seeded_updates(monkeypatch, seed, dropout=0.5, teacher_dropout=0.5)[0]
        assert same_bits(update.P_grad, expected.P_grad)


def test_student_phase_has_dropout_in_the_student_from_the_seed(monkeypatch):
    without = seeded_updates(monkeypatch, 0)[1].grads
    first, again, other = (
        seeded_updates(monkeypatch, seed, dropout=0.5)[1].grads for seed in (0, 0, 1)
    )
    assert same_bits(first, again)
    for grads in (without, other):
        assert not first["wpe.weight"].allclose(grads["wpe.weight"], atol=1e-3)


def test_only_the_loop_of_the_student_has_it_in_training_mode(monkeypatch):
    """Also if it was in training mode before, as in any step after the first."""
    run, passes = make_run(dtype=torch.float32), record_passes(monkeypatch)
    run.student.train()
    take_step(monkeypatch, run, REQUESTS[:8], sample=True)
    names = [name for name, _, _ in passes]
    start = names.index("student in training")
    assert names[0] == "student"  # sampling
    assert set(names[:start]) == {"student", "teacher", "prompted teacher"}
    assert set(names[start:]) == {"student in training", "prompted teacher"}


@pytest.mark.parametrize("prompt", [None, torch.tensor(P, dtype=torch.float32)])
@pytest.mark.parametrize("training", [False, True])
def test_response_hidden_changes_no_mode(training, prompt):
    """Dropout is as the mode says, and so are gradients."""
    model = tiny_model(replace(TEACHER, dropout=0.5)).train(training)
    batch = make_batch(EXAMPLES, CPU)
    first, second = (response_hidden(model, batch, prompt)[0] for _ in range(2))
    assert all(module.training == training for module in model.modules())
    assert torch.equal(first, second) == (not training)
    assert first.requires_grad
    with torch.no_grad():
        assert not response_hidden(model, batch, prompt)[0].requires_grad


def test_student_phase_has_no_dropout_in_the_teacher(monkeypatch):
    expected = seeded_updates(monkeypatch, 0)[1]
    update = seeded_updates(monkeypatch, 0, teacher_dropout=0.5)[1]
    assert same_bits(update.grads, expected.grads)


def test_sft_has_dropout(monkeypatch):
    without, with_dropout = (
        seeded_updates(monkeypatch, 0, train.sft_step, dropout=dropout)[0].grads["wpe.weight"]
        for dropout in (0.0, 0.5)
    )
    assert not without.allclose(with_dropout, atol=1e-3)


def test_sampling_and_validation_have_no_dropout_even_right_after_a_training_forward():
    results = []
    for dropout in (0.0, 0.5):
        run = make_run(dtype=torch.float32, dropout=dropout)
        run.student.train()
        responses = [e.response for e in train.rollout(run, REQUESTS, 0)]
        run.student.train()
        results.append((responses, validation_loss(run, run.student, EXAMPLES)))
    assert results[0] == results[1]


# ---- the student's own samples -------------------------------------------------------------------


def responses(examples, t=0, **settings):
    sampled = train.rollout(make_run(dtype=torch.float32, **settings), examples, t)
    return {e.index: e.response for e in sampled}


def test_rollout_samples_the_whole_batch_in_one_call_and_keeps_requests_and_order(monkeypatch):
    calls = []

    def sample_all(model, requests, *arguments, **kwargs):
        calls.append(requests)
        return [[index, EOS] for index in range(len(requests))], None

    monkeypatch.setattr(train, "sample_all", sample_all)
    sampled = train.rollout(make_run(), REQUESTS, 0)
    assert calls == [[e.request for e in REQUESTS]]
    assert [(e.index, e.request) for e in sampled] == [(e.index, e.request) for e in REQUESTS]
    assert [e.response for e in sampled] == [[index, EOS] for index in range(len(REQUESTS))]


def test_batches_of_8_and_of_32_give_the_same_responses():
    expected = responses(REQUESTS)
    parts = {}
    for i in range(0, 32, 8):
        parts |= responses(REQUESTS[i : i + 8])
    assert parts == expected
    assert responses(REQUESTS[::-1]) == expected


def test_responses_depend_on_seed_step_and_row():
    same_request = [replace(REQUESTS[0], index=index) for index in range(8)]
    assert len({tuple(response) for response in responses(same_request).values()}) > 4
    assert responses(REQUESTS, t=0) != responses(REQUESTS, t=1)
    assert responses(REQUESTS, seed=10) != responses(REQUESTS, seed=11)
    assert responses(REQUESTS, t=1) == responses(REQUESTS, t=1)


def test_responses_follow_the_students_distribution():
    """First tokens sampled for one request under many indices, against the reference."""
    n = 4000
    same_request = [Example(index, [3, 9, 4], []) for index in range(n)]
    first = [response[0] for response in responses(same_request, max_new_tokens=1).values()]
    logits = reference.gpt2_logits(arrays(STUDENT), STUDENT.n_head, [3, 9, 4])[-1]
    probs = np.exp(reference.log_softmax(logits))
    counts = np.bincount(first, minlength=V)
    chi_squared = ((counts - n * probs) ** 2 / (n * probs)).sum()
    # 28 degrees of freedom: 0.04 % of samples are above. These are always the same.
    assert chi_squared < 60


def test_responses_end_with_the_first_end_of_text_or_at_the_limit():
    lengths = set()
    for response in responses(REQUESTS, max_new_tokens=12).values():
        assert EOS not in response[:-1]
        assert response[-1] == EOS or len(response) == 12
        lengths.add(len(response))
    assert len(lengths) > 2


def test_a_step_trains_on_what_it_sampled(monkeypatch):
    seen, micro_batches = [], train.micro_batches

    def recording_micro_batches(examples, *arguments):
        seen.append(examples)
        return micro_batches(examples, *arguments)

    monkeypatch.setattr(train, "micro_batches", recording_micro_batches)
    run = make_run(dtype=torch.float32)
    metrics, _ = take_step(monkeypatch, run, REQUESTS[:8], sample=True)
    expected = responses(REQUESTS[:8])
    assert [(e.index, e.response) for e in seen[0]] == list(expected.items())
    assert metrics["response_tokens"] == sum(len(response) for response in expected.values())


# ---- optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm, clipped_norm", [(10.0, 1.0), (0.5, 0.5)])
def test_gradients_are_clipped_together_at_norm_1_and_the_norm_before_is_returned(
    norm, clipped_norm
):
    weights = [torch.zeros(3, 2, requires_grad=True), torch.zeros(4, requires_grad=True)]
    rng = np.random.default_rng(6)
    grads = [rng.standard_normal(w.shape) for w in weights]
    scale = norm / math.sqrt(sum((g**2).sum() for g in grads))
    grads = [scale * g for g in grads]
    for w, g in zip(weights, grads, strict=True):
        w.grad = torch.tensor(g, dtype=torch.float32)
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=1.0)
    assert float(clip_and_step(optimizer)) == pytest.approx(norm, rel=1e-5)
    for w, g in zip(weights, reference.clipped(grads), strict=True):
        np.testing.assert_allclose(w.detach().numpy(), -g, atol=1e-5)
    moved = math.sqrt(sum(float((w.detach() ** 2).sum()) for w in weights))
    assert moved == pytest.approx(clipped_norm, abs=1e-4)
    assert all(w.grad is None for w in weights)


def test_prompt_and_student_are_clipped_each_by_its_own_norm(monkeypatch, in_float64):
    run = make_run(reg_weight=1000.0)
    metrics, (prompt, student) = take_step(monkeypatch, run)
    norm = math.sqrt(sum(float((g**2).sum()) for g in student.grads.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert metrics["prompt_grad_norm"] == pytest.approx(prompt.P_grad.norm().item(), rel=1e-6)
    assert metrics["prompt_grad_norm"] > 1
    expected = reference.adamw(P, reference.clipped([prompt.P_grad.numpy()]), lr=1e-1, decay=0.01)
    np.testing.assert_allclose(prompt.after["P"].numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("beta_2", [0.999, 0.95])
def test_adamw_decays_matrices_but_not_biases_and_layer_norm(beta_2):
    """Two steps with given gradients, against the formulas; decay 0.01, first beta 0.9."""
    model, lr = tiny_model(STUDENT).double(), 0.05
    optimizer = adamw(model.parameters(), SimpleNamespace(beta2=beta_2, weight_decay=0.01))
    set_learning_rate(optimizer, lr)
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
        expected = reference.adamw(start[name], grads[name], lr, decay, 0.9, beta_2)
        np.testing.assert_allclose(w.detach().numpy(), expected, atol=1e-6, err_msg=name)


def test_the_prompt_is_decayed_too():
    prompt = torch.full((3, 4), 2.0, requires_grad=True)
    optimizer = adamw([prompt], SimpleNamespace(beta2=0.999, weight_decay=0.01))
    set_learning_rate(optimizer, 0.1)
    prompt.grad = torch.zeros_like(prompt)
    optimizer.step()
    assert prompt.detach().numpy() == pytest.approx(np.full((3, 4), 2.0 * (1 - 0.1 * 0.01)))


# ---- validation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_tokens", [1, 45, 1000])
def test_validation_loss_is_the_mean_over_tokens_without_and_with_the_prompt(
    in_float64, micro_batch_tokens
):
    run, rows = make_run(micro_batch_tokens=micro_batch_tokens), rows_of(EXAMPLES)
    losses = [
        validation_loss(run, run.student, EXAMPLES),
        validation_loss(run, run.teacher, EXAMPLES),
        validation_loss(run, run.teacher, EXAMPLES, run.P),
    ]
    prompted = [
        reference.token_cross_entropy(z, token)
        for row in rows
        for z, token in zip(reference.response_logits(TEACHER_ARRAYS, row, P), row[1], strict=True)
    ]
    expected = [
        reference.sft_loss(student_arrays(), rows),
        reference.sft_loss(TEACHER_ARRAYS, rows),
        sum(prompted) / len(prompted),
    ]
    assert losses == pytest.approx(expected, rel=1e-9)
    assert abs(losses[2] - losses[1]) > 0.01
    weights = [run.P, *run.student.parameters(), *run.teacher.parameters()]
    assert all(w.grad is None for w in weights)
