"""An independent computation of all that the trainer computes, in NumPy and float64: GPT-2 (Radford
et al. 2019), the losses, equations 1 to 4 of PromptKD, MiniLLM (Gu et al. 2024) and AdamW.

It follows the formulas of the papers, one row at a time, without batches, padding or masks. Every
loss is a loop over tokens. Gradients are central finite differences. A row is a pair (request,
response) of token lists. Weights are a dictionary of arrays under GPT-2's official names, with
matrices stored as (in, out).
"""

import math

import numpy as np

# --- GPT-2 ---


def as_arrays(weights):
    return {name: np.asarray(w).astype(np.float64) for name, w in weights.items()}


def layer_norm(x, w, name):
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(x, w, name):
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(x, w, name, n_head):
    T, C = x.shape
    D = C // n_head
    q, k, v = np.split(linear(x, w, f"{name}.c_attn"), 3, axis=1)
    y = np.zeros((T, C))
    for head in range(n_head):
        part = slice(head * D, (head + 1) * D)
        for t in range(T):
            scores = k[: t + 1, part] @ q[t, part] / math.sqrt(D)  # positions up to t
            weights = np.exp(scores - scores.max())
            y[t, part] = (weights / weights.sum()) @ v[: t + 1, part]
    return linear(y, w, f"{name}.c_proj")


def gpt2_logits(w, n_head, ids, prompt=None):
    """Logits (T, V) of the T tokens `ids` of one row, after a soft prompt (prompt_length, C)."""
    x = w["wte.weight"][list(ids)]
    n_prompt = 0 if prompt is None else len(prompt)
    if n_prompt:
        x = np.concatenate([prompt, x])
    x = x + w["wpe.weight"][: len(x)]
    layer = 0
    while f"h.{layer}.ln_1.weight" in w:
        x = x + attention(layer_norm(x, w, f"h.{layer}.ln_1"), w, f"h.{layer}.attn", n_head)
        h = gelu(linear(layer_norm(x, w, f"h.{layer}.ln_2"), w, f"h.{layer}.mlp.c_fc"))
        x = x + linear(h, w, f"h.{layer}.mlp.c_proj")
        layer += 1
    return layer_norm(x, w, "ln_f")[n_prompt:] @ w["wte.weight"].T


# --- Losses at one token ---


def log_softmax(logits):
    logits = np.asarray(logits, dtype=np.float64)
    shifted = logits - logits.max()
    return shifted - math.log(np.exp(shifted).sum())


def token_cross_entropy(logits, target):
    return -log_softmax(logits)[target]


def token_kl(first, second):
    """KL(first || second) = Σ_v first(v) log(first(v) / second(v)), from two rows of logits."""
    log_first, log_second = log_softmax(first), log_softmax(second)
    return float(sum(math.exp(a) * (a - b) for a, b in zip(log_first, log_second)))


# --- Losses over rows: the mean over all response tokens of all rows ---


def response_logits(model, row, prompt=None):
    """The logits (V,) that predict each token of a row's response. model: (weights, n_head)."""
    request, response = row
    logits = gpt2_logits(*model, [*request, *response], prompt)
    return [logits[len(request) + i - 1] for i in range(len(response))]


def mean(values):
    return sum(values) / len(values)


def sft_loss(student, rows):
    losses = []
    for row in rows:
        for q, token in zip(response_logits(student, row), row[1]):
            losses.append(token_cross_entropy(q, token))
    return mean(losses)


def directed_kl(trained, target, direction):
    return token_kl(trained, target) if direction == "reverse" else token_kl(target, trained)


def promptkd_losses(
    teacher, student, prompt, rows, lam, reg_weight=1.0, prompt_kl="reverse", reg_kl="reverse"
):
    """Equations 1 to 4, by name. "forward" swaps the two sides of a KL, as in Table 5."""
    L_kd, L_reg, L_theta = [], [], []
    for row in rows:
        logits = zip(
            response_logits(teacher, row, prompt),
            response_logits(student, row),
            response_logits(teacher, row),
        )
        for p_prompted, q, p in logits:
            L_kd.append(directed_kl(p_prompted, q, prompt_kl))
            L_reg.append(directed_kl(p_prompted, p, reg_kl))
            L_theta.append(token_kl(q, p_prompted))
    L_P = mean(L_kd) + reg_weight * lam * mean(L_reg)
    return {"L_kd": mean(L_kd), "L_reg": mean(L_reg), "L_P": L_P, "L_theta": mean(L_theta)}


def gkd_loss(teacher, student, rows):
    losses = []
    for row in rows:
        for q, p in zip(response_logits(student, row), response_logits(teacher, row)):
            losses.append(token_kl(q, p))
    return mean(losses)


def kd_loss(teacher, student, rows):
    """Half the cross-entropy plus half of KL(p || q)."""
    losses = []
    for row in rows:
        logits = zip(response_logits(student, row), response_logits(teacher, row))
        for (q, p), token in zip(logits, row[1]):
            losses.append(0.5 * token_cross_entropy(q, token) + 0.5 * token_kl(p, q))
    return mean(losses)


def token_log_probs(model, row):
    return [log_softmax(z)[token] for z, token in zip(response_logits(model, row), row[1])]


def minillm_returns(log_p, log_q, gamma=0.95, scale=0.5, limit=100.0):
    """The discounted return of each token of one response, divided by the number of tokens left."""
    rewards = [min(limit, max(-limit, (a - b) / scale)) for a, b in zip(log_p, log_q)]
    returns = []
    for t in range(len(rewards)):
        total = 0.0
        for k in range(t, len(rewards)):
            total += gamma ** (k - t) * rewards[k]
        returns.append(total / (len(rewards) - t))
    return returns


def minillm_loss(teacher, sampler, student, rows, alpha=0.2, epsilon=0.2):
    """The policy gradient's surrogate plus the single-step KL(q_θ || p). sampler: the student that
    sampled the rows."""
    log_p = [token_log_probs(teacher, row) for row in rows]
    log_q = [token_log_probs(sampler, row) for row in rows]
    returns = [minillm_returns(*pair) for pair in zip(log_p, log_q)]
    all_returns = [R for of_row in returns for R in of_row]
    center = mean(all_returns)
    std = math.sqrt(mean([(R - center) ** 2 for R in all_returns]) + 1e-8)
    losses = []
    for row, *of_row in zip(rows, log_p, log_q, returns):
        logits = response_logits(student, row), response_logits(teacher, row)
        for z, z_p, token, lp, lq, R in zip(*logits, row[1], *of_row):
            q_theta, q, p = math.exp(log_softmax(z)[token]), math.exp(lq), math.exp(lp)
            w = q / ((1 - alpha) * q + alpha * p)
            rho, A = w * q_theta / q, (R - center) / std
            clipped = min(1 + epsilon, max(1 - epsilon, rho))
            losses.append(-min(rho * A, clipped * A) + token_kl(z, z_p))
    return mean(losses)


# --- Gradients and updates ---


def central_difference(function, array, index, h=1e-5):
    """The derivative of function() with respect to array[index], which is restored."""
    value = array[index]
    array[index] = value + h
    above = function()
    array[index] = value - h
    below = function()
    array[index] = value
    return (above - below) / (2 * h)


def clipped(gradients, norm=1.0):
    """Gradients, scaled so that their joint norm is at most `norm`."""
    total = math.sqrt(sum((g**2).sum() for g in gradients))
    return [g * min(1.0, norm / total) for g in gradients]


def adamw(w, gradients, lr, decay, beta_1=0.9, beta_2=0.999, epsilon=1e-8):
    """A weight after one AdamW step (Loshchilov and Hutter 2019) for each of the gradients."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g**2
        update = (m / (1 - beta_1**t)) / (np.sqrt(v / (1 - beta_2**t)) + epsilon)
        w = w - lr * decay * w - lr * update
    return w
