"""The losses on tokens, against NumPy and against numbers computed by hand."""

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
    sum_over_tokens,
    whiten,
)

N, V = 6, 11
DTYPES = [torch.float64, torch.float32]
DIRECTIONS = ["reverse", "forward"]
TARGETS = [0, 3, 10, 3, 5, 7]


def logits(seed, scale=3.0):
    return scale * np.random.default_rng(seed).standard_normal((N, V))


def tensor(array, dtype=torch.float64, grad=False):
    return torch.tensor(array, dtype=dtype).requires_grad_(grad)


def per_token(function, *arrays):
    return [function(*rows) for rows in zip(*arrays)]


def assert_close(result, expected, tolerance=2e-6):
    """The losses compute in float32, whatever the dtype of their inputs."""
    result = result.detach().double().numpy()
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


def numerical_gradient(loss, array):
    """d loss(row) / d array[row] by central differences, for each of the N rows."""

    def of_row(row):
        def loss_of_row():
            return loss(row)

        return [central_difference(loss_of_row, array, (row, v)) for v in range(V)]

    return [of_row(row) for row in range(N)]


def token_kl_in(direction, trained, other):
    return token_kl(trained, other) if direction == "reverse" else token_kl(other, trained)


# --- Values ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_matches_numpy(dtype):
    result = cross_entropy(tensor(logits(0), dtype), torch.tensor(TARGETS))
    assert_close(result, per_token(token_cross_entropy, logits(0), TARGETS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_matches_numpy_in_both_directions(dtype):
    p, q = logits(1), logits(2)
    assert_close(kl(tensor(p, dtype), tensor(q, dtype)), per_token(token_kl, p, q))
    assert_close(kl(tensor(q, dtype), tensor(p, dtype)), per_token(token_kl, q, p))


# KL((1/2, 1/2) || (1/4, 3/4)) = ln(4/3) / 2 = 0.1438
# KL((1/4, 3/4) || (1/2, 1/2)) = 3/4 ln(3/2) - 1/4 ln 2 = 0.1308
FAIR, BIASED = [[0.0, 0.0]], [[0.0, math.log(3)]]
FAIR_TO_BIASED = 0.5 * math.log(4 / 3)
BIASED_TO_FAIR = 0.75 * math.log(1.5) - 0.25 * math.log(2)


def test_kl_of_two_coins_by_hand():
    fair, biased = tensor(FAIR), tensor(BIASED)
    assert kl(fair, biased).item() == pytest.approx(FAIR_TO_BIASED, abs=1e-7)
    assert kl(biased, fair).item() == pytest.approx(BIASED_TO_FAIR, abs=1e-7)
    assert FAIR_TO_BIASED - BIASED_TO_FAIR > 0.01


@pytest.mark.parametrize(
    "direction, expected", [("reverse", FAIR_TO_BIASED), ("forward", BIASED_TO_FAIR)]
)
def test_reverse_puts_the_trained_distribution_first(direction, expected):
    result = directed_kl(
        losses.log_softmax(tensor(FAIR)), losses.log_softmax(tensor(BIASED)), direction
    )
    assert result.item() == pytest.approx(expected, abs=1e-7)


def test_a_direction_with_another_name_is_refused():
    with pytest.raises(ValueError, match="direction 'Reverse' must be 'reverse' or 'forward'"):
        directed_kl(tensor(FAIR), tensor(BIASED), "Reverse")


@pytest.mark.parametrize("prompt_kl", DIRECTIONS)
@pytest.mark.parametrize("reg_kl", DIRECTIONS)
@pytest.mark.parametrize(
    "reg_weight, lam", [(1.0, 1.0), (1.0, 0.25), (0.5, 0.75), (0.0, 1.0), (3.0, 0.0)]
)
def test_equations_1_to_3_match_numpy(prompt_kl, reg_kl, reg_weight, lam):
    prompted, q, bare = logits(3), logits(4), logits(5)
    L_kd = np.array([token_kl_in(prompt_kl, *pair) for pair in zip(prompted, q)])
    L_reg = np.array([token_kl_in(reg_kl, *pair) for pair in zip(prompted, bare)])
    arguments = (tensor(prompted), tensor(q), tensor(bare), lam, reg_weight, prompt_kl, reg_kl)
    drift = per_token(token_kl, prompted, bare)
    expected = (L_kd + reg_weight * lam * L_reg, L_kd, L_reg, drift)
    assert_close(prompt_loss(*arguments), np.stack(expected))


def test_prompt_loss_defaults_to_reverse_kls_with_weight_1():
    arguments = (tensor(logits(3)), tensor(logits(4)), tensor(logits(5)), 0.4)
    explicit = prompt_loss(*arguments, 1.0, "reverse", "reverse")
    assert torch.equal(prompt_loss(*arguments), explicit)


def test_equation_4_is_the_kl_from_student_to_prompted_teacher():
    q, prompted = logits(6), logits(7)
    assert_close(student_loss(tensor(q), tensor(prompted)), per_token(token_kl, q, prompted))


# --- Properties of a KL ---


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_kl_of_a_distribution_to_itself_is_0(dtype):
    p = tensor(logits(8), dtype)
    assert torch.equal(kl(p, p.clone()), torch.zeros_like(kl(p, p)))
    # Adding a constant to all logits does not change the distribution.
    assert_close(kl(p, p + 2.0), np.zeros(N), 1e-3 if dtype == torch.bfloat16 else 1e-6)


def test_losses_of_prompt_and_student_are_0_if_all_distributions_are_equal():
    p = tensor(logits(9))
    for direction in DIRECTIONS:
        assert prompt_loss(p, p, p, 1.0, 1.0, direction, direction).abs().max() == 0
    assert student_loss(p, p).abs().max() == 0


def test_kl_is_never_negative():
    rng = np.random.default_rng(10)
    for scale in (0.01, 1.0, 30.0):
        p = rng.standard_normal((2000, V)) * scale
        near = p + 0.01 * rng.standard_normal(p.shape)
        far = rng.standard_normal(p.shape) * scale
        for other in (near, far):
            assert kl(tensor(p), tensor(other)).min() > -1e-6
    assert kl(tensor(p), tensor(far)).mean() > 1


def test_kl_is_cross_entropy_minus_entropy():
    p, q = logits(11), logits(12)
    probs = np.exp(np.stack([log_softmax(row) for row in p]))
    cross = -(probs * np.stack([log_softmax(row) for row in q])).sum(1)
    entropy = -(probs * np.log(probs)).sum(1)
    assert_close(kl(tensor(p), tensor(q)), cross - entropy)
    assert entropy.min() > 0.1  # large enough that leaving it out would fail


# --- Range and precision ---


def test_logits_of_ten_thousand_give_finite_losses_and_gradients():
    first, second = np.zeros((2, V)), np.zeros((2, V))
    first[0, 0], first[1, 1] = 1e4, -1e4
    second[0, 1], second[1, 2] = 1e4, 1e4
    a, b = tensor(first, torch.float32, grad=True), tensor(second, torch.float32, grad=True)
    targets = torch.tensor([1, 1])
    values = kl(a, b)
    assert_close(values, per_token(token_kl, first, second), 1e-5)
    assert values[0].item() == pytest.approx(1e4)
    (values.sum() + cross_entropy(a, targets).sum()).backward()
    assert torch.isfinite(a.grad).all() and torch.isfinite(b.grad).all()
    assert_close(
        cross_entropy(a, targets), per_token(token_cross_entropy, first, targets.tolist()), 1e-5
    )


def test_bfloat16_logits_are_processed_in_float32():
    """Sums of bfloat16 numbers in bfloat16 would be off by percents."""
    a, b = tensor(logits(13)).bfloat16(), tensor(logits(14)).bfloat16()
    exact_a, exact_b = a.double().numpy(), b.double().numpy()
    expected = np.array(per_token(token_kl, exact_a, exact_b))
    targets = torch.arange(N)
    assert kl(a, b).dtype == cross_entropy(a, targets).dtype == torch.float32
    assert_close(kl(a, b), expected)
    assert_close(cross_entropy(a, targets), per_token(token_cross_entropy, exact_a, range(N)))
    for loss, factor in zip(prompt_loss(a, b, b, 0.5), (1.5, 1.0, 1.0, 1.0), strict=True):
        assert_close(loss, factor * expected, 1e-5)


def by_name_under_autocast(enabled):
    """The values (N,) and gradient (N, V) of every loss with a KL in it, from float32 logits."""
    p, bare = tensor(logits(14), torch.float32), tensor(logits(15), torch.float32)
    targets = torch.tensor(TARGETS)
    log_q, w, R = (tensor(np.full(N, value), torch.float32) for value in (-3.0, 0.1, 0.5))
    loss_fns = {
        "kl": lambda q: kl(q, p),
        "kl, second": lambda q: kl(p, q),
        "reverse": lambda q: directed_kl(losses.log_softmax(q), losses.log_softmax(p), "reverse"),
        "forward": lambda q: directed_kl(losses.log_softmax(q), losses.log_softmax(p), "forward"),
        "prompt": lambda q: prompt_loss(q, p, bare, 0.5)[0],
        "prompt, forward": lambda q: prompt_loss(q, p, bare, 0.5, 1.0, "forward", "forward")[0],
        "student": lambda q: student_loss(q, p),
        "kd": lambda q: kd_loss(q, p, targets),
        "minillm": lambda q: minillm_loss(q, p, targets, log_q, w, R),
    }
    results = {}
    for name, loss_fn in loss_fns.items():
        q = tensor(logits(13), torch.float32, grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values = loss_fn(q)
        values.sum().backward()
        results[name] = (values.detach(), q.grad)
    return results


def test_a_kl_is_float32_whatever_autocast_says():
    """Autocast has dot products, but no sums, in its list of operations in bfloat16."""
    inside, outside = by_name_under_autocast(True), by_name_under_autocast(False)
    with torch.autocast("cpu", torch.bfloat16):
        a = tensor(logits(13), torch.float32)
        assert torch.linalg.vecdot(a, a).dtype == torch.bfloat16
    for name, (values, gradient) in outside.items():
        assert values.dtype == gradient.dtype == torch.float32
        for result, expected in zip(inside[name], (values, gradient)):
            assert result.dtype == torch.float32, name
            assert torch.equal(result, expected), name


def test_losses_of_no_tokens_are_empty_with_gradients_of_0():
    a, b = torch.zeros(0, V, requires_grad=True), torch.zeros(0, V, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.long)
    for loss in [
        cross_entropy(a, targets),
        kl(a, b),
        student_loss(a, b),
        *prompt_loss(a, b, b.detach(), 1.0),
    ]:
        assert loss.shape == (0,)
        assert loss.sum() == 0
    (cross_entropy(a, targets).sum() + kl(a, b).sum()).backward()
    assert a.grad.shape == b.grad.shape == (0, V)


# --- Gradients ---


def test_gradient_of_cross_entropy_is_probability_minus_one_hot():
    z, weights = tensor(logits(15), grad=True), np.linspace(0.5, 2, N)
    (cross_entropy(z, torch.arange(N)) * tensor(weights)).sum().backward()
    probs = np.exp(np.stack([log_softmax(row) for row in logits(15)]))
    assert_close(z.grad, weights[:, None] * (probs - np.eye(V)[:N]))


def test_gradients_of_kl_match_their_closed_forms():
    """d KL(a || b) / d b_logits = b - a, and d KL(a || b) / d a_logits = a (log a - log b - KL)."""
    a_logits, b_logits = tensor(logits(16), grad=True), tensor(logits(17), grad=True)
    kl(a_logits, b_logits).sum().backward()
    log_a, log_b = (np.stack([log_softmax(row) for row in logits(seed)]) for seed in (16, 17))
    a, b = np.exp(log_a), np.exp(log_b)
    assert_close(b_logits.grad, b - a)
    expected = a * (log_a - log_b - (a * (log_a - log_b)).sum(1, keepdims=True))
    assert_close(a_logits.grad, expected, 1e-5)


def test_gradients_of_kl_match_finite_differences(monkeypatch):
    """Of both distributions together, and of each while the other is fixed."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # keep float64
    a, b = (tensor(logits(seed)[:4, :6] / 3, grad=True) for seed in (35, 36))
    assert torch.autograd.gradcheck(kl, (a, b))
    assert torch.autograd.gradcheck(lambda a: kl(a, b.detach()), (a,))
    assert torch.autograd.gradcheck(lambda b: kl(a.detach(), b), (b,))


@pytest.mark.parametrize("prompt_kl", DIRECTIONS)
@pytest.mark.parametrize("reg_kl", DIRECTIONS)
def test_gradient_of_the_prompt_loss_matches_finite_differences(prompt_kl, reg_kl):
    prompted, q, bare = logits(18), logits(19), logits(20)
    lam, reg_weight = 0.3, 2.0

    def loss(row):
        L_kd = token_kl_in(prompt_kl, prompted[row], q[row])
        L_reg = token_kl_in(reg_kl, prompted[row], bare[row])
        return L_kd + reg_weight * lam * L_reg

    z = tensor(prompted, grad=True)
    prompt_loss(z, tensor(q), tensor(bare), lam, reg_weight, prompt_kl, reg_kl)[0].sum().backward()
    assert_close(z.grad, numerical_gradient(loss, prompted), 1e-5)


def test_gradient_of_the_student_loss_matches_finite_differences():
    q, prompted = logits(21), logits(22)
    z = tensor(q, grad=True)
    student_loss(z, tensor(prompted)).sum().backward()
    expected = numerical_gradient(lambda row: token_kl(q[row], prompted[row]), q)
    assert_close(z.grad, expected, 1e-5)


def test_the_distributions_that_are_not_trained_may_have_no_gradient():
    prompted, q, bare = tensor(logits(23), grad=True), tensor(logits(24)), tensor(logits(25))
    prompt_loss(prompted, q, bare, 1.0)[0].sum().backward()
    assert prompted.grad.abs().max() > 0.01
    assert q.grad is None and bare.grad is None
    student, teacher = tensor(logits(26), grad=True), prompted.detach()
    student_loss(student, teacher).sum().backward()
    assert student.grad.abs().max() > 0.01
    assert teacher.grad is None


# --- The loss of KD ---


def test_kd_loss_by_hand():
    """(ln 4 + ln(4/3) / 2) / 2 = 0.7651 for q biased, p fair, y_t the first token."""
    q, p = tensor(BIASED), tensor(FAIR)
    assert kd_loss(q, p, torch.tensor([0])).item() == pytest.approx(0.765067, abs=1e-6)
    assert kd_loss(p, p, torch.tensor([1])).item() == pytest.approx(0.5 * math.log(2), abs=1e-7)


def test_kd_loss_and_its_gradient_match_numpy():
    q, p = logits(27), logits(28)
    z = tensor(q, grad=True)

    def loss(row):
        return 0.5 * token_cross_entropy(q[row], TARGETS[row]) + 0.5 * token_kl(p[row], q[row])

    values = kd_loss(z, tensor(p), torch.tensor(TARGETS))
    assert_close(values, [loss(row) for row in range(N)])
    values.sum().backward()
    assert_close(z.grad, numerical_gradient(loss, q), 1e-5)


# --- MiniLLM ---


@pytest.mark.parametrize(
    "gamma, expected",
    [
        (None, [(1 - 0.95 + 2 * 0.9025) / 3, (-1 + 2 * 0.95) / 2, 2]),  # the released 0.95
        (0.95, [(1 - 0.95 + 2 * 0.9025) / 3, (-1 + 2 * 0.95) / 2, 2]),
        (0.5, [(1 - 0.5 + 0.5) / 3, (-1 + 1) / 2, 2]),
        (1.0, [2 / 3, 1 / 2, 2]),
        (0.0, [1 / 3, -1 / 2, 2]),
    ],
)
def test_returns_by_hand(gamma, expected):
    """log p - log q is 0.5, -0.5, 1, so the rewards are 1, -1, 2."""
    log_p, log_q = tensor([-1.0, -2.0, -3.0]), tensor([-1.5, -1.5, -4.0])
    kwargs = {} if gamma is None else {"gamma": gamma}
    assert_close(minillm_returns(log_p, log_q, **kwargs), expected)


@pytest.mark.parametrize(
    "log_p, log_q, expected",
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
def test_the_return_of_a_single_token_is_its_clipped_reward(log_p, log_q, expected):
    assert_close(minillm_returns(tensor([log_p]), tensor([log_q])), [expected])


def test_each_reward_is_clipped_before_the_sum():
    """The rewards 198 and -398 are clipped to 100 and -100: (100 - 95) / 2 and -100."""
    result = minillm_returns(tensor([-1.0, -200.0]), tensor([-100.0, -1.0]))
    assert_close(result, [2.5, -100])


@pytest.mark.parametrize("n", [1, 2, 7, 256])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_returns_match_numpy(n, dtype, tolerance):
    log_p, log_q = -30 * np.random.default_rng(n).random((2, n))
    result = minillm_returns(tensor(log_p, dtype), tensor(log_q, dtype))
    assert_close(result, reference.minillm_returns(log_p, log_q), tolerance)


def test_whitened_returns_have_mean_0_and_variance_1():
    """1, 2, 3, 4 have mean 2.5 and, divided by four and not three, variance 1.25."""
    expected = np.array([-1.5, -0.5, 0.5, 1.5]) / math.sqrt(1.25)
    assert_close(whiten(tensor([1.0, 2.0, 3.0, 4.0])), expected)
    R = 50 + 20 * np.random.default_rng(29).standard_normal(1000)
    whitened = whiten(tensor(R, torch.float32)).double()
    assert whitened.mean().item() == pytest.approx(0, abs=1e-5)
    assert (whitened**2).mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("R", [[0.0], [-100.0], [3.5, 3.5, 3.5]])
def test_equal_returns_are_whitened_to_0(R):
    assert whiten(tensor(R, torch.float32)).tolist() == [0.0] * len(R)


@pytest.mark.parametrize(
    "p, q, alpha, expected",
    [
        (0.25, 0.5, 0.2, 0.5 / 0.45),  # q / (0.8 q + 0.2 p)
        (0.25, 0.05, 0.2, 0.05 / 0.09),
        (0.9, 0.1, 0.5, 0.2),
        (0.3, 0.3, 0.2, 1.0),
        (0.9, 0.1, 0.0, 1.0),
    ],
)
def test_importance_weight_by_hand(p, q, alpha, expected):
    log_p, log_q = tensor([math.log(p)]), tensor([math.log(q)])
    assert importance_weight(log_p, log_q, alpha).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_importance_weight_of_tokens_that_are_unlikely_under_one_model(dtype):
    """0 if unlikely under the student, 1 / 0.8 under the teacher; exactly 1 for equal odds."""
    log_p = tensor([-1.0, -1.0, -5000.0, -1e-3, -800.0], dtype)
    log_q = tensor([-90.0, -5000.0, -1.0, -1e-3, -800.0], dtype)
    w = importance_weight(log_p, log_q, 0.2)
    assert torch.isfinite(w).all()
    np.testing.assert_allclose(w.numpy(), [5 * math.exp(-89), 0, 1.25, 1, 1], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    "rho, R, loss, gradient",  # the gradient with respect to log q_θ is -ρ R, or 0 if clipped
    [
        (1.5, 2.0, -2.4, 0.0),  # a good token that is already much more likely
        (1.5, -2.0, 3.0, 3.0),
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),  # a bad token that is already much less likely
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
        (1.0, 0.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("w", [1.0, 0.25])
def test_policy_gradient_at_the_corners_of_the_clip(rho, R, loss, gradient, w):
    """ρ = w · q_θ / q, so with w = 1/4 the ratio q_θ / q is four times as large."""
    log_q = tensor([-2.5])
    log_q_theta = (log_q + math.log(rho / w)).requires_grad_()
    result = policy_gradient_loss(log_q_theta, log_q, tensor([w]), tensor([R]))
    result.sum().backward()
    assert_close(result, [loss])
    assert_close(log_q_theta.grad, [gradient])


@pytest.mark.parametrize("epsilon, expected", [(0.4, [-2.8, 3.0]), (0.6, [-3.0, 3.0])])
def test_epsilon_is_the_width_of_the_clip(epsilon, expected):
    log_q_theta, zero, one = tensor([math.log(1.5)] * 2), tensor([0.0] * 2), tensor([1.0] * 2)
    result = policy_gradient_loss(log_q_theta, zero, one, tensor([2.0, -2.0]), epsilon=epsilon)
    assert_close(result, expected)


def test_minillm_loss_and_its_gradient_match_numpy():
    """The sum of policy gradient and KL(q_θ || p); only the policy gradient is weighted."""
    q_theta, p, rng = logits(30), logits(31), np.random.default_rng(32)
    rho = np.array([1.5, 1.5, 0.5, 0.5, 1.1, 0.9])
    w, R = rng.uniform(0.5, 1.2, N), np.array([1.3, -0.7, 0.4, -1.6, 0.9, -0.2])
    log_q = np.array([log_softmax(z)[y] for z, y in zip(q_theta, TARGETS)]) + np.log(w / rho)

    def ratio(row):
        return w[row] * math.exp(log_softmax(q_theta[row])[TARGETS[row]] - log_q[row])

    def loss(row):
        clipped = min(1.2, max(0.8, ratio(row)))
        return -min(ratio(row) * R[row], clipped * R[row]) + token_kl(q_theta[row], p[row])

    assert [ratio(row) for row in range(N)] == pytest.approx(rho)
    z = tensor(q_theta, grad=True)
    values = minillm_loss(z, tensor(p), torch.tensor(TARGETS), tensor(log_q), tensor(w), tensor(R))
    assert_close(values, [loss(row) for row in range(N)])
    values.sum().backward()
    assert_close(z.grad, numerical_gradient(loss, q_theta), 1e-5)


def test_the_single_step_term_of_minillm_is_the_exact_reverse_kl():
    """With returns of 0 nothing else is left."""
    q_theta, p = logits(33), logits(34)
    z = tensor(q_theta, grad=True)
    log_q, w, R = (tensor(np.full(N, value)) for value in (-3.0, 0.1, 0.0))
    values = minillm_loss(z, tensor(p), torch.tensor(TARGETS), log_q, w, R)
    assert_close(values, per_token(token_kl, q_theta, p))
    values.sum().backward()
    log_q, log_p = (np.stack([log_softmax(row) for row in array]) for array in (q_theta, p))
    q = np.exp(log_q)
    expected = q * (log_q - log_p - (q * (log_q - log_p)).sum(1, keepdims=True))
    assert_close(z.grad, expected, 1e-5)


# --- Losses from hidden states ---


@pytest.fixture(params=[(1, 1), (3, 1), (7, 2), (100, 3), (100, 100)])
def chunked(request, monkeypatch):
    """Chunks and blocks with the logits of at most so many tokens, of 13 vocabulary entries."""
    n_chunk, n_block = request.param
    monkeypatch.setattr(losses, "CPU_CHUNK_BYTES", n_chunk * 4 * 13)
    monkeypatch.setattr(losses, "CPU_BLOCK_BYTES", n_block * 4 * 13)


def make_hidden_and_head(n=7, C=5, V=13, seed=3):
    """Hidden states (n, C) and head (V, C) of a model, float64."""
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, C, generator=rng, dtype=torch.float64) for size in (n, V))


@pytest.mark.parametrize("n_max", [1, 3, 7, 100])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_slices_cover_every_token_once_within_the_limit(monkeypatch, n_max, device):
    """Every device but the CPU has the limit of a GPU."""
    limits = {"cpu": n_max * 4 * 13, "meta": 0}
    monkeypatch.setattr(losses, "GPU_BYTES", n_max * 4 * 13)
    head = torch.zeros(13, 5, device=device)
    for n in (0, 1, 2, 6, 7, 22):
        slices = losses.equal_slices(n, head, limits[device])
        assert slices
        assert [i for part in slices for i in range(n)[part]] == list(range(n))
        assert all(len(range(n)[part]) <= n_max for part in slices)


@pytest.mark.parametrize("V", [3, 16, 1024, 1025, 2100])
def test_aligned_logits_have_entries_of_probability_0_after_the_vocabulary(V):
    hidden, head = torch.randn(7, 5), torch.randn(V, 5)
    aligned, plain = losses.aligned_logits(hidden, head), hidden @ head.T
    assert (aligned[:, :V] - plain).abs().max() < 1e-5
    assert (aligned.log_softmax(-1)[:, :V] - plain.log_softmax(-1)).abs().max() < 1e-5
    assert aligned.is_contiguous()
    assert aligned.shape[1] % 16 == 0
    assert (aligned.softmax(-1)[:, V:] == 0).all()


def forward_kl(q, p):
    return kl(p, q)


def two_losses(q, p, targets):
    return torch.stack([kl(q, p), cross_entropy(q, targets)])


def weighted_losses(q, p, targets, weights):
    return torch.stack([kd_loss(q, p, targets), kl(p, q), kl(q, p)]) * weights.T


def with_two_others(q, p, p_bare):
    return prompt_loss(q, p, p_bare, 0.3, 2.0, "reverse", "forward")


PER_TOKEN = {
    "targets": torch.tensor([0, 12, 3, 3, 5, 1, 7]),
    "weights": torch.linspace(-1, 2, 21, dtype=torch.float64).view(7, 3),
    "log_q": torch.linspace(-4, -1, 7, dtype=torch.float64),
    "w": torch.linspace(0.5, 1.2, 7, dtype=torch.float64),
    "R": torch.linspace(1.5, -1.5, 7, dtype=torch.float64),
}
# A loss, how many other models it compares with, and what it takes per token
CASES = {
    "cross entropy": (cross_entropy, 0, ["targets"]),
    "reverse KL": (student_loss, 1, []),
    "forward KL": (forward_kl, 1, []),
    "KD": (kd_loss, 1, ["targets"]),
    "MiniLLM": (minillm_loss, 1, ["targets", "log_q", "w", "R"]),
    "(2, n)": (two_losses, 1, ["targets"]),
    "(3, n), weights (N, 3)": (weighted_losses, 1, ["targets", "weights"]),
    "(4, n), two others": (with_two_others, 2, []),
}


def plain_sum_over_tokens(loss_fn, trained, *others, **per_token):
    """The form in the docstring of sum_over_tokens."""
    logits = [hidden @ head.T for hidden, head in (trained, *others)]  # (N, V) each
    return loss_fn(*logits, **per_token).sum(-1)


def sum_and_gradients(sum_fn, loss_fn, n_others, names):
    """The sum of a loss over 7 tokens, and the gradients of 2.5 times the first one."""
    trained = [x.requires_grad_() for x in make_hidden_and_head()]
    others = [make_hidden_and_head(C=3, seed=4 + i) for i in range(n_others)]
    total = sum_fn(loss_fn, trained, *others, **{name: PER_TOKEN[name] for name in names})
    loss = total if total.ndim == 0 else total[0]
    return total.detach(), torch.autograd.grad(2.5 * loss, trained)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sum_over_tokens_equals_its_plain_form_and_the_gradients_of_the_first_sum(
    chunked, case, monkeypatch
):
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # keep float64
    result, gradients = sum_and_gradients(sum_over_tokens, *case)
    expected, expected_gradients = sum_and_gradients(plain_sum_over_tokens, *case)
    assert result.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert (gradient - expected_gradient).abs().max() < 1e-12
        assert expected_gradient.abs().max() > 0.1


def test_the_other_models_get_no_gradient():
    trained = [x.requires_grad_() for x in make_hidden_and_head()]
    other = [x.requires_grad_() for x in make_hidden_and_head(seed=4)]
    sum_over_tokens(student_loss, trained, other).backward()
    assert all(x.grad is not None for x in trained)
    assert all(x.grad is None for x in other)


def test_sum_over_tokens_with_a_frozen_head_has_gradients_to_the_hidden_states(chunked):
    hidden, head = (x.float() for x in make_hidden_and_head())
    hidden.requires_grad_()
    targets = PER_TOKEN["targets"]
    sum_over_tokens(cross_entropy, (hidden, head), targets=targets).backward()
    plain = cross_entropy(hidden @ head.T, targets).sum()
    (expected,) = torch.autograd.grad(plain, hidden)
    assert (hidden.grad - expected).abs().max() < 1e-5


def test_a_sum_without_gradients_equals_the_one_with_them(chunked):
    trained, other = make_hidden_and_head(), make_hidden_and_head(C=3, seed=4)
    total = sum_over_tokens(kd_loss, trained, other, targets=PER_TOKEN["targets"])
    assert not total.requires_grad
    trained[0].requires_grad_()
    expected = sum_over_tokens(kd_loss, trained, other, targets=PER_TOKEN["targets"])
    assert torch.equal(total, expected)


def test_sum_over_no_tokens_is_0_with_gradients_of_0():
    hidden, head = (x.requires_grad_() for x in make_hidden_and_head(n=0))
    targets = torch.zeros(0, dtype=torch.long)
    total = sum_over_tokens(cross_entropy, (hidden, head), targets=targets)
    total.backward()
    assert total.item() == 0
    assert head.grad.abs().max() == 0
    assert hidden.grad.shape == (0, 5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("in_bfloat16", [{"hidden"}, {"head"}, {"p"}, {"hidden", "head", "p"}])
def test_tensors_in_bfloat16_are_multiplied_in_float32(in_bfloat16, autocast):
    """The gradient of a bfloat16 tensor is itself bfloat16: rounded once, at the end."""
    hidden, head = make_hidden_and_head(n=64, C=96, V=500)
    rounded = {"hidden": hidden, "head": head / 6, "p": hidden + 0.3}
    rounded = {name: x.bfloat16().float() for name, x in rounded.items()}

    def sum_and_gradients_in(dtypes, sum_fn):
        x = {name: rounded[name].to(dtype, copy=True) for name, dtype in dtypes.items()}
        trained = [x[name].requires_grad_() for name in ("hidden", "head")]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and sum_fn is sum_over_tokens):
            total = sum_fn(student_loss, trained, (x["p"], rounded["head"].to(x["p"].dtype)))
        return total.detach().float(), torch.autograd.grad(total, trained)

    def relative_error(gradient, expected):
        return float((gradient.float() - expected).norm() / expected.norm())

    float32 = dict.fromkeys(rounded, torch.float32)
    mixed = float32 | dict.fromkeys(in_bfloat16, torch.bfloat16)
    total, gradients = sum_and_gradients_in(mixed, sum_over_tokens)
    expected, expected_gradients = sum_and_gradients_in(float32, plain_sum_over_tokens)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient, expected in zip(("hidden", "head"), gradients, expected_gradients):
        assert gradient.dtype == mixed[name]
        if name in in_bfloat16:
            unit = 2**-8  # bfloat16 keeps 8 bits
            assert ((gradient.float() - expected).abs() <= 1.01 * unit * expected.abs()).all()
        else:
            assert relative_error(gradient, expected) < 1e-5
    # Products in bfloat16 would have been noticed.
    all_bfloat16 = dict.fromkeys(rounded, torch.bfloat16)
    _, gradients = sum_and_gradients_in(all_bfloat16, plain_sum_over_tokens)
    for gradient, expected in zip(gradients, expected_gradients):
        assert relative_error(gradient, expected) > 5e-3


@pytest.mark.parametrize("sizes", [(31_990, 32_000), (32_000, 31_990), (32_000, 32_000, 31_999)])
def test_models_with_different_vocabularies_are_refused(sizes):
    """31,990 and 32,000 are both padded to 32,000, so that their logits have equal shapes."""
    trained, *others = (make_hidden_and_head(n=3, C=2, V=V) for V in sizes)
    with pytest.raises(ValueError, match="vocabularies") as caught:
        sum_over_tokens(lambda q, *p: kl(q, p[-1]), trained, *others)
    assert str(list(sizes)) in str(caught.value)


@pytest.mark.parametrize("n", [0, 1, 6, 8])
@pytest.mark.parametrize("name", ["others", "targets", "weights"])
def test_unequal_numbers_of_tokens_are_refused(name, n):
    """One token, too, which would be broadcast."""
    trained, other = make_hidden_and_head(), make_hidden_and_head(C=3, seed=4)
    per_token = {name: PER_TOKEN[name] for name in ("targets", "weights")}
    if name == "others":
        other = make_hidden_and_head(n=n, C=3)
    else:
        per_token[name] = torch.zeros(n, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="must have 7 tokens"):
        sum_over_tokens(weighted_losses, trained, other, **per_token)


def test_token_log_probs_equal_those_of_all_logits(chunked):
    hidden, head = (x.float() for x in make_hidden_and_head())
    tokens = PER_TOKEN["targets"]
    expected = (hidden @ head.T).log_softmax(-1)[torch.arange(7), tokens]
    result = losses.token_log_probs(hidden, head, tokens)
    assert result == pytest.approx(expected.numpy(), abs=1e-6)


def test_token_log_probs_of_bfloat16_tensors_are_those_of_float32_products():
    hidden, head = (x.bfloat16() for x in make_hidden_and_head())
    tokens = PER_TOKEN["targets"]
    expected = losses.token_log_probs(hidden.float(), head.float(), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        result = losses.token_log_probs(hidden, head, tokens)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_sums_and_log_probs_work_on_other_devices_than_cpu_and_cuda():
    """The meta device has shapes but no values."""
    trained = [x.to("meta").requires_grad_() for x in make_hidden_and_head()]
    other = [x.to("meta") for x in make_hidden_and_head(C=3, seed=4)]
    targets = PER_TOKEN["targets"].to("meta")
    sums = sum_over_tokens(two_losses, trained, other, targets=targets)
    sums[0].backward()
    assert (sums.device.type, sums.shape) == ("meta", (2,))
    assert [x.grad.shape for x in trained] == [(7, 5), (13, 5)]
    assert losses.token_log_probs(*trained, targets).shape == (7,)
