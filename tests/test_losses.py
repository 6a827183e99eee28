"""The losses on tokens, against NumPy and against numbers worked out by hand."""

import math

import numpy as np
import pytest
import reference
import torch
from reference import central_difference, log_softmax, token_cross_entropy, token_kl

import losses
from losses import (
    cross_entropy,
    directed_kl,
    importance_weight,
    kd_loss,
    kl,
    minillm_loss,
    minillm_returns,
    policy_gradient_loss,
    prompt_loss,
    student_loss,
    whiten,
)
from model import head_logits

N, V = 6, 11
DTYPES = [torch.float64, torch.float32]
DIRECTIONS = ["reverse", "forward"]


def logits(seed, n=N, scale=3.0):
    return scale * np.random.default_rng(seed).standard_normal((n, V))


def tensor(array, dtype=torch.float64, grad=False):
    return torch.tensor(array, dtype=dtype).requires_grad_(grad)


def by_token(function, *arrays):
    return [function(*rows) for rows in zip(*arrays)]


def close(result, wanted, tolerance=2e-6):
    """The losses work in float32, whatever comes in."""
    np.testing.assert_allclose(
        result.detach().double().numpy(), wanted, rtol=tolerance, atol=tolerance
    )


# ---- values ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_is_that_of_numpy(dtype):
    targets = [0, 3, 10, 3, 5, 7]
    close(
        cross_entropy(tensor(logits(0), dtype), torch.tensor(targets)),
        by_token(token_cross_entropy, logits(0), targets),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_reverse_kl_are_those_of_numpy(dtype):
    p, q = logits(1), logits(2)
    close(kl(tensor(p, dtype), tensor(q, dtype)), by_token(token_kl, p, q))
    close(kl(tensor(q, dtype), tensor(p, dtype)), by_token(token_kl, q, p))


def test_kl_of_two_coins_by_hand_in_both_directions():
    """KL((1/2, 1/2) || (1/4, 3/4)) = ln(4/3) / 2 = 0.1438; the other way round 3/4 ln(3/2) - 1/4 ln 2 = 0.1308."""
    fair, loaded = tensor([[0.0, 0.0]]), tensor([[math.log(1), math.log(3)]])
    assert kl(fair, loaded).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-7)
    assert kl(loaded, fair).item() == pytest.approx(
        0.75 * math.log(1.5) - 0.25 * math.log(2), abs=1e-7
    )
    assert kl(fair, loaded).item() - kl(loaded, fair).item() > 0.01


def test_reverse_puts_the_trained_distribution_first():
    trained, target = tensor([[0.0, 0.0]]), tensor([[0.0, math.log(3)]])
    assert directed_kl(trained, target, "reverse").item() == pytest.approx(
        0.5 * math.log(4 / 3), abs=1e-7
    )
    assert directed_kl(trained, target, "forward").item() == pytest.approx(
        0.75 * math.log(1.5) - 0.25 * math.log(2), abs=1e-7
    )


@pytest.mark.parametrize("prompt_kl", DIRECTIONS)
@pytest.mark.parametrize("reg_kl", DIRECTIONS)
@pytest.mark.parametrize(
    "reg_weight, lam", [(1.0, 1.0), (1.0, 0.25), (0.5, 0.75), (0.0, 1.0), (3.0, 0.0)]
)
def test_equations_1_to_3_are_those_of_numpy(prompt_kl, reg_kl, reg_weight, lam):
    prompted, q, bare = logits(3), logits(4), logits(5)
    L_kd = np.array(
        by_token(token_kl, prompted, q)
        if prompt_kl == "reverse"
        else by_token(token_kl, q, prompted)
    )
    L_reg = np.array(
        by_token(token_kl, prompted, bare)
        if reg_kl == "reverse"
        else by_token(token_kl, bare, prompted)
    )
    results = prompt_loss(
        tensor(prompted), tensor(q), tensor(bare), lam, reg_weight, prompt_kl, reg_kl
    )
    for result, wanted in zip(results, (L_kd + reg_weight * lam * L_reg, L_kd, L_reg), strict=True):
        close(result, wanted)


def test_the_default_of_the_prompt_loss_is_the_papers_reverse_and_reverse_with_weight_1():
    prompted, q, bare = tensor(logits(3)), tensor(logits(4)), tensor(logits(5))
    for result, wanted in zip(
        prompt_loss(prompted, q, bare, 0.4),
        prompt_loss(prompted, q, bare, 0.4, 1.0, "reverse", "reverse"),
    ):
        assert torch.equal(result, wanted)


def test_equation_4_is_the_kl_from_the_student_to_the_prompted_teacher():
    q, prompted = logits(6), logits(7)
    close(student_loss(tensor(q), tensor(prompted)), by_token(token_kl, q, prompted))


# ---- a KL is a KL -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_kl_of_a_distribution_to_itself_is_zero(dtype):
    p = tensor(logits(8), dtype)
    assert torch.equal(kl(p, p.clone()), torch.zeros_like(kl(p, p)))
    close(
        kl(p, p + 2.0), np.zeros(N), 1e-6 if dtype != torch.bfloat16 else 1e-3
    )  # the same distribution: logits are free up to a constant


def test_every_loss_of_prompt_and_student_vanishes_where_all_three_agree():
    p = tensor(logits(9))
    for direction in DIRECTIONS:
        for loss in prompt_loss(p, p, p, 1.0, 1.0, direction, direction):
            assert loss.abs().max() == 0
    assert student_loss(p, p).abs().max() == 0


def test_kl_is_not_below_zero_for_many_distributions_near_and_far():
    generator = np.random.default_rng(10)
    for scale in (0.01, 1.0, 30.0):
        p = generator.standard_normal((2000, V)) * scale
        near, far = (
            p + 0.01 * generator.standard_normal(p.shape),
            generator.standard_normal(p.shape) * scale,
        )
        for other in (near, far):
            assert kl(tensor(p), tensor(other)).min() > -1e-6
    assert kl(tensor(p), tensor(far)).mean() > 1


def test_kl_is_cross_entropy_less_entropy():
    p, q = logits(11), logits(12)
    probs = np.exp(np.stack([log_softmax(row) for row in p]))
    cross = -(probs * np.stack([log_softmax(row) for row in q])).sum(1)
    entropy = -(probs * np.log(probs)).sum(1)
    close(kl(tensor(p), tensor(q)), cross - entropy)
    assert entropy.min() > 0.1  # so that leaving it out would show


# ---- range and precision ------------------------------------------------------------------------------------------------------------


def test_logits_of_ten_thousand_stay_finite_and_right_with_their_gradients():
    first, second = np.zeros((2, V)), np.zeros((2, V))
    first[0, 0], first[1, 1] = 1e4, -1e4
    second[0, 1], second[1, 2] = 1e4, 1e4
    a, b = tensor(first, torch.float32, grad=True), tensor(second, torch.float32, grad=True)
    losses = kl(a, b)
    close(losses, by_token(token_kl, first, second), 1e-5)
    assert losses[0].item() == pytest.approx(1e4)
    (losses.sum() + cross_entropy(a, torch.tensor([1, 1])).sum()).backward()
    assert torch.isfinite(a.grad).all() and torch.isfinite(b.grad).all()
    close(
        cross_entropy(a, torch.tensor([1, 1])), by_token(token_cross_entropy, first, [1, 1]), 1e-5
    )


def test_bfloat16_logits_are_reckoned_with_in_float32():
    """The inputs are rounded once; from there on nothing is lost: sums of bfloat16 numbers in bfloat16 would be off by percents."""
    a, b = tensor(logits(13)).bfloat16(), tensor(logits(14)).bfloat16()
    exact_a, exact_b = a.double().numpy(), b.double().numpy()
    targets = torch.arange(N)
    assert kl(a, b).dtype == cross_entropy(a, targets).dtype == torch.float32
    close(kl(a, b), by_token(token_kl, exact_a, exact_b))
    close(cross_entropy(a, targets), by_token(token_cross_entropy, exact_a, range(N)))
    for loss, wanted in zip(prompt_loss(a, b, b, 0.5), (1.5, 1.0, 1.0)):
        close(loss, wanted * np.array(by_token(token_kl, exact_a, exact_b)), 1e-5)


def test_no_response_token_gives_an_empty_result_a_sum_of_zero_and_gradients_of_zero():
    a, b = torch.zeros(0, V, requires_grad=True), torch.zeros(0, V, requires_grad=True)
    no_targets = torch.zeros(0, dtype=torch.long)
    for loss in [
        cross_entropy(a, no_targets),
        kl(a, b),
        student_loss(a, b),
        *prompt_loss(a, b, b.detach(), 1.0),
    ]:
        assert loss.shape == (0,)
        assert loss.sum() == 0
    (cross_entropy(a, no_targets).sum() + kl(a, b).sum()).backward()
    assert a.grad.shape == b.grad.shape == (0, V)


# ---- gradients ----------------------------------------------------------------------------------------------------------------------


def test_gradient_of_cross_entropy_is_probability_less_one_at_the_target():
    z, targets = tensor(logits(15), grad=True), torch.arange(N)
    weights = tensor(np.linspace(0.5, 2, N))
    (cross_entropy(z, targets) * weights).sum().backward()
    probs = np.exp(np.stack([log_softmax(row) for row in logits(15)]))
    close(z.grad, weights.numpy()[:, None] * (probs - np.eye(V)[:N]))


def test_gradients_of_kl_are_those_derived_by_hand():
    """d KL(p || q) / d logits of q = q - p, and / d logits of p = p (log p - log q - KL)."""
    a, b = tensor(logits(16), grad=True), tensor(logits(17), grad=True)
    kl(a, b).sum().backward()
    log_p, log_q = (np.stack([log_softmax(row) for row in logits(seed)]) for seed in (16, 17))
    p, q = np.exp(log_p), np.exp(log_q)
    close(b.grad, q - p)
    close(a.grad, p * (log_p - log_q - (p * (log_p - log_q)).sum(1, keepdims=True)), 1e-5)


@pytest.mark.parametrize("prompt_kl", DIRECTIONS)
@pytest.mark.parametrize("reg_kl", DIRECTIONS)
def test_gradient_of_the_prompt_loss_is_that_of_finite_differences(prompt_kl, reg_kl):
    prompted, q, bare = logits(18), logits(19), logits(20)
    lam, reg_weight = 0.3, 2.0
    z = tensor(prompted, grad=True)
    prompt_loss(z, tensor(q), tensor(bare), lam, reg_weight, prompt_kl, reg_kl)[0].sum().backward()

    def loss(row):
        L_kd = (
            token_kl(prompted[row], q[row])
            if prompt_kl == "reverse"
            else token_kl(q[row], prompted[row])
        )
        L_reg = (
            token_kl(prompted[row], bare[row])
            if reg_kl == "reverse"
            else token_kl(bare[row], prompted[row])
        )
        return L_kd + reg_weight * lam * L_reg

    wanted = [
        [central_difference(lambda: loss(row), prompted, (row, v)) for v in range(V)]
        for row in range(N)
    ]
    close(z.grad, wanted, 1e-5)


def test_gradient_of_the_student_loss_is_that_of_finite_differences():
    q, prompted = logits(21), logits(22)
    z = tensor(q, grad=True)
    student_loss(z, tensor(prompted)).sum().backward()
    wanted = [
        [central_difference(lambda: token_kl(q[row], prompted[row]), q, (row, v)) for v in range(V)]
        for row in range(N)
    ]
    close(z.grad, wanted, 1e-5)


def test_gradient_goes_to_the_prompted_teacher_in_the_prompt_loss_and_to_the_student_in_its_own():
    """The losses cut no gradient themselves: the caller computes the targets without one."""
    prompted, q, bare = tensor(logits(23), grad=True), tensor(logits(24)), tensor(logits(25))
    prompt_loss(prompted, q, bare, 1.0)[0].sum().backward()
    assert prompted.grad.abs().max() > 0.01 and q.grad is None and bare.grad is None
    student, target = tensor(logits(26), grad=True), prompted.detach()
    student_loss(student, target).sum().backward()
    assert student.grad.abs().max() > 0.01 and target.grad is None


# ---- KD's loss ----------------------------------------------------------------------------------------------------------------------

TARGETS = [0, 3, 10, 3, 5, 7]


def test_kd_by_hand_is_half_cross_entropy_and_half_forward_kl():
    """q = (1/4, 3/4), p = (1/2, 1/2), y_t the first: (ln 4 + ln(4/3) / 2) / 2 = 0.7651; reverse KL would give 0.7586."""
    q, p = tensor([[0.0, math.log(3)]]), tensor([[0.0, 0.0]])
    assert kd_loss(q, p, torch.tensor([0])).item() == pytest.approx(0.765067, abs=1e-6)
    assert kd_loss(p, p, torch.tensor([1])).item() == pytest.approx(0.5 * math.log(2), abs=1e-7)


def test_kd_and_its_gradient_are_those_of_numpy():
    q, p = logits(27), logits(28)
    z, fixed = tensor(q, grad=True), tensor(p)

    def loss(row):
        return 0.5 * token_cross_entropy(q[row], TARGETS[row]) + 0.5 * token_kl(p[row], q[row])

    losses = kd_loss(z, fixed, torch.tensor(TARGETS))
    close(losses, [loss(row) for row in range(N)])
    losses.sum().backward()
    close(
        z.grad,
        [
            [central_difference(lambda: loss(row), q, (row, v)) for v in range(V)]
            for row in range(N)
        ],
        1e-5,
    )


# ---- MiniLLM ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gamma, wanted",
    [
        (0.95, [(1 - 0.95 + 2 * 0.9025) / 3, (-1 + 2 * 0.95) / 2, 2]),
        (0.5, [(1 - 0.5 + 0.5) / 3, (-1 + 1) / 2, 2]),
        (1.0, [2 / 3, 1 / 2, 2]),
        (0.0, [1 / 3, -1 / 2, 2]),
    ],
)
def test_returns_by_hand(gamma, wanted):
    """log p - log q is 0.5, -0.5, 1, so the rewards are 1, -1, 2; a return starts at its own token's and is divided by the tokens left."""
    log_p, log_q = tensor([-1.0, -2.0, -3.0]), tensor([-1.5, -1.5, -4.0])
    close(minillm_returns(log_p, log_q, gamma), wanted)
    if gamma == 0.95:
        close(minillm_returns(log_p, log_q), wanted)  # the released value


@pytest.mark.parametrize(
    "log_p, log_q, wanted",
    [
        (-1.0, -50.5, 99.0),
        (-1.0, -51.5, 100.0),
        (-1.0, -400.0, 100.0),
        (-50.5, -1.0, -99.0),
        (-51.5, -1.0, -100.0),
        (-1e30, -1.0, -100.0),
        (-1.0, -1.25, 0.5),
    ],
)
def test_a_response_of_one_token_returns_its_clipped_reward(log_p, log_q, wanted):
    close(minillm_returns(tensor([log_p]), tensor([log_q])), [wanted])


def test_each_reward_is_clipped_before_the_sum():
    """Rewards 100 and -100 after clipping, of 198 and -398: (100 - 95) / 2 and -100."""
    close(minillm_returns(tensor([-1.0, -200.0]), tensor([-100.0, -1.0])), [2.5, -100])


@pytest.mark.parametrize("n", [1, 2, 7, 256])
def test_returns_are_those_of_numpy(n):
    log_p, log_q = -30 * np.random.default_rng(n).random((2, n))
    close(
        minillm_returns(tensor(log_p), tensor(log_q)), reference.minillm_returns(log_p, log_q), 1e-9
    )
    close(
        minillm_returns(tensor(log_p, torch.float32), tensor(log_q, torch.float32)),
        reference.minillm_returns(log_p, log_q),
        1e-4,
    )


def test_whitened_returns_have_mean_0_and_variance_1():
    """Of 1, 2, 3, 4 the mean is 2.5 and the variance, over all four and not three, 1.25."""
    close(whiten(tensor([1.0, 2.0, 3.0, 4.0])), np.array([-1.5, -0.5, 0.5, 1.5]) / math.sqrt(1.25))
    R = whiten(
        tensor(50 + 20 * np.random.default_rng(29).standard_normal(1000), torch.float32)
    ).double()
    assert R.mean().item() == pytest.approx(0, abs=1e-5) and (R**2).mean().item() == pytest.approx(
        1, abs=1e-5
    )


@pytest.mark.parametrize("R", [[0.0], [-100.0], [3.5, 3.5, 3.5]])
def test_returns_that_are_all_alike_are_whitened_to_0(R):
    assert whiten(tensor(R, torch.float32)).tolist() == [0.0] * len(R)


@pytest.mark.parametrize(
    "p, q, alpha, wanted",
    [
        (0.25, 0.5, 0.2, 0.5 / 0.45),  # q / (0.8 q + 0.2 p)
        (0.25, 0.05, 0.2, 0.05 / 0.09),
        (0.9, 0.1, 0.5, 0.2),
        (0.3, 0.3, 0.2, 1.0),
        (0.9, 0.1, 0.0, 1.0),
    ],
)
def test_importance_weight_by_hand(p, q, alpha, wanted):
    log_p, log_q = (
        torch.tensor([probability], dtype=torch.float64).log() for probability in (p, q)
    )
    assert importance_weight(log_p, log_q, alpha).item() == pytest.approx(wanted, rel=1e-9)
    if alpha == 0.2:
        assert importance_weight(log_p, log_q).item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_importance_weight_of_tokens_that_one_of_the_two_would_hardly_say(dtype):
    """What the student would never have said weighs nothing; what the teacher would never have said, 1 / 0.8; equal odds, exactly 1."""
    log_p, log_q = (
        tensor([-1.0, -1.0, -5000.0, -1e-3, -800.0], dtype),
        tensor([-90.0, -5000.0, -1.0, -1e-3, -800.0], dtype),
    )
    w = importance_weight(log_p, log_q)
    assert torch.isfinite(w).all()
    np.testing.assert_allclose(w.numpy(), [5 * math.exp(-89), 0, 1.25, 1, 1], rtol=1e-5, atol=1e-30)


CORNERS = [
    # ρ, R, loss, and its gradient with respect to log q_θ, which is - ρ R or none
    (1.5, 2.0, -2.4, 0.0),  # better than before, and likelier by far already: no further
    (1.5, -2.0, 3.0, 3.0),
    (0.5, 2.0, -1.0, -1.0),
    (0.5, -2.0, 1.6, 0.0),  # worse, and unlikelier by far already
    (1.1, 2.0, -2.2, -2.2),
    (0.9, -2.0, 1.8, 1.8),
    (1.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize("rho, R, loss, gradient", CORNERS)
@pytest.mark.parametrize("w", [1.0, 0.25])
def test_policy_gradient_at_the_corners_of_the_clip_by_hand(rho, R, loss, gradient, w):
    """ρ = w · q_θ / q, so with w = 1/4 the student's own ratio is four times as large."""
    log_q = tensor([-2.5])
    log_q_theta = (log_q + math.log(rho / w)).requires_grad_()
    result = policy_gradient_loss(log_q_theta, log_q, tensor([w]), tensor([R]))
    result.sum().backward()
    close(result, [loss])
    close(log_q_theta.grad, [gradient])


def test_the_clips_width_is_epsilon():
    log_q_theta, zero, one = tensor([math.log(1.5)] * 2), tensor([0.0] * 2), tensor([1.0] * 2)
    close(
        policy_gradient_loss(log_q_theta, zero, one, tensor([2.0, -2.0]), epsilon=0.4), [-2.8, 3.0]
    )
    close(
        policy_gradient_loss(log_q_theta, zero, one, tensor([2.0, -2.0]), epsilon=0.6), [-3.0, 3.0]
    )


def minillm_token(q_theta, p, target, log_q, w, R):
    """The loss at one token, and ρ, in NumPy."""
    rho = w * math.exp(log_softmax(q_theta)[target] - log_q)
    return -min(rho * R, min(1.2, max(0.8, rho)) * R) + token_kl(q_theta, p), rho


def test_minillms_loss_and_gradient_are_those_of_numpy():
    """The policy gradient and KL(q_θ || p), added up; the weight is the policy gradient's alone."""
    q_theta, p, rng = logits(30), logits(31), np.random.default_rng(32)
    wanted_rho = np.array([1.5, 1.5, 0.5, 0.5, 1.1, 0.9])
    w, R = rng.uniform(0.5, 1.2, N), np.array([1.3, -0.7, 0.4, -1.6, 0.9, -0.2])
    log_q = np.array([log_softmax(z)[y] for z, y in zip(q_theta, TARGETS)]) + np.log(w / wanted_rho)

    def loss(row):
        return minillm_token(q_theta[row], p[row], TARGETS[row], log_q[row], w[row], R[row])[0]

    assert [
        minillm_token(*row)[1] for row in zip(q_theta, p, TARGETS, log_q, w, R)
    ] == pytest.approx(wanted_rho)
    z = tensor(q_theta, grad=True)
    losses = minillm_loss(z, tensor(p), torch.tensor(TARGETS), tensor(log_q), tensor(w), tensor(R))
    close(losses, [loss(row) for row in range(N)])
    losses.sum().backward()
    close(
        z.grad,
        [
            [central_difference(lambda: loss(row), q_theta, (row, v)) for v in range(V)]
            for row in range(N)
        ],
        1e-5,
    )


def test_minillms_single_step_term_is_the_exact_reverse_kl():
    """Where the return is 0 nothing else is left: no sampled token, weight or ratio is in it."""
    q_theta, p = logits(33), logits(34)
    z, nothing = tensor(q_theta, grad=True), tensor(np.zeros(N))
    losses = minillm_loss(
        z,
        tensor(p),
        torch.tensor(TARGETS),
        tensor(np.full(N, -3.0)),
        tensor(np.full(N, 0.1)),
        nothing,
    )
    close(losses, by_token(token_kl, q_theta, p))
    losses.sum().backward()
    log_q, log_p = (np.stack([log_softmax(row) for row in array]) for array in (q_theta, p))
    close(
        z.grad,
        np.exp(log_q) * (log_q - log_p - (np.exp(log_q) * (log_q - log_p)).sum(1, keepdims=True)),
        1e-5,
    )


# ---- the memory-lean form ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[(1, 1), (3, 1), (7, 2), (100, 3), (100, 100)])
def chunked(request, monkeypatch):
    """Chunks and blocks of so many tokens' logits at most, of 13 words."""
    for limit, n_tokens in zip((losses.CHUNK_BYTES, losses.BLOCK_BYTES), request.param):
        monkeypatch.setitem(limit, "cpu", n_tokens * 4 * 13)


def hidden_head_and_target(n=7, C=5, V=13):
    """Hidden states and head of what is trained, and hidden states of a target of width 3."""
    generator = torch.Generator().manual_seed(3)
    hidden, head, target = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((n, C), (V, C), (n, 3))
    )
    return hidden.requires_grad_(), head.requires_grad_(), target


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_slices_cover_every_token_once_and_none_is_over_the_limit(most):
    head = torch.zeros(13, 5)
    for n in (0, 1, 2, 6, 7, 22):
        slices = losses.equal_slices(n, head, {"cpu": most * 4 * 13})
        assert slices and [i for part in slices for i in range(n)[part]] == list(range(n))
        assert all(len(range(n)[part]) <= most for part in slices)


@pytest.mark.parametrize("V", [3, 16, 1024, 1025, 2100])
def test_logits_of_the_head_have_words_without_probability_behind_the_vocabulary(V):
    hidden, head = torch.randn(7, 5), torch.randn(V, 5)
    logits, plain = head_logits(hidden, head, padded=True), hidden @ head.T
    assert (logits[:, :V] - plain).abs().max() < 1e-5
    assert (logits.log_softmax(-1)[:, :V] - plain.log_softmax(-1)).abs().max() < 1e-5
    assert (
        logits.is_contiguous()
        and logits.shape[1] % 16 == 0
        and (logits.softmax(-1)[:, V:] == 0).all()
    )


def reverse(i, q, p):
    return losses.student_loss(q, p)


def forward(i, q, p):
    return losses.kl(p, q)


def with_tokens(i, q, p):
    return losses.kd_loss(q, p, torch.arange(7)[i])


def values_and_gradients(loss_fn, chunked_sum):
    """The sum of a loss over 7 tokens with its gradients, from sum_over_tokens or from logits of all tokens at once."""
    hidden, head, p_hidden = hidden_head_and_target()
    p_head = torch.randn(13, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    if chunked_sum:
        total = losses.sum_over_tokens(loss_fn, hidden, head, (p_hidden, p_head))
    else:
        total = loss_fn(slice(0, 7), hidden @ head.T, p_hidden @ p_head.T).sum(-1)
    return total, torch.autograd.grad(
        2.5 * (total if total.ndim == 0 else total[0]), (hidden, head)
    )


def two_losses(i, q, p):
    return torch.stack([losses.kl(q, p), losses.cross_entropy(q, torch.arange(7)[i])])


@pytest.mark.parametrize("loss_fn", [reverse, forward, with_tokens, two_losses])
def test_sum_over_tokens_is_the_plain_sum_with_the_plain_gradients(chunked, loss_fn, monkeypatch):
    """Of several losses, gradients are those of the first."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # keep float64
    (lean, lean_gradients), (plain, plain_gradients) = (
        values_and_gradients(loss_fn, chunked_sum) for chunked_sum in (True, False)
    )
    assert lean.tolist() == pytest.approx(plain.tolist(), rel=1e-12)
    for gradient, wanted in zip(lean_gradients, plain_gradients):
        assert (gradient - wanted).abs().max() < 1e-12


def test_sum_over_tokens_of_a_frozen_head_gives_hidden_states_their_gradients_alone(chunked):
    hidden, head, _ = hidden_head_and_target()
    hidden, head = hidden.detach().float().requires_grad_(), head.detach().float()  # a teacher's
    losses.sum_over_tokens(
        lambda i, logits: losses.cross_entropy(logits, torch.arange(7)[i]), hidden, head
    ).backward()
    (wanted,) = torch.autograd.grad(
        losses.cross_entropy(hidden @ head.T, torch.arange(7)).sum(), hidden
    )
    assert (hidden.grad - wanted).abs().max() < 1e-5


def test_sum_over_no_tokens_is_0_with_gradients_of_0():
    hidden, head, _ = hidden_head_and_target(n=0)
    total = losses.sum_over_tokens(
        lambda i, logits: losses.cross_entropy(logits, torch.zeros(0, dtype=torch.long)[i]),
        hidden,
        head,
    )
    total.backward()
    assert total.item() == 0 and head.grad.abs().max() == 0 and hidden.grad.shape == (0, 5)


def test_gradients_of_kls_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    logits = [
        torch.randn(
            4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n)
        ).requires_grad_()
        for n in range(3)
    ]
    assert torch.autograd.gradcheck(losses.kls, logits)
    assert torch.autograd.gradcheck(
        lambda first: losses.kls(first, *(other.detach() for other in logits[1:])), logits[:1]
    )


def test_token_log_probs_are_those_of_the_whole(chunked):
    hidden, head, _ = (x.detach().float() for x in hidden_head_and_target())
    targets = torch.tensor([0, 12, 3, 3, 5, 1, 7])
    wanted = (hidden @ head.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    assert losses.token_log_probs(hidden, head, targets) == pytest.approx(wanted.numpy(), abs=1e-6)
