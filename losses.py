"""Every loss on tokens. N is the number of response tokens, V the vocabulary; each function gives one value a token, (N,), so that
the caller can divide their sum by the number of response tokens in the whole global batch."""

import torch
import torch.nn.functional as F


def cross_entropy(logits, targets):
    """- log q(y_t | y_<t, x): logits (N, V), targets (N,) -> (N,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def kl(first, second):
    """KL(first || second) at each token, exact over the vocabulary: logits (N, V), (N, V) -> (N,).

    Zero for equal distributions. Forward KL is kl(p, q), reverse KL is kl(q, p), for teacher p and student q.
    """
    log_first = F.log_softmax(first.float(), dim=-1)
    log_second = F.log_softmax(second.float(), dim=-1)
    return (log_first.exp() * (log_first - log_second)).sum(-1)


def directed_kl(trained, target, direction):
    """ "reverse": KL(trained || target), as in the paper's equations; "forward": KL(target || trained), as in Table 5."""
    return kl(trained, target) if direction == "reverse" else kl(target, trained)


def prompt_loss(p_prompted, q, p_bare, lam, reg=1.0, prompt_kl="reverse", reg_kl="reverse"):
    """Equations 1 to 3, the loss of the soft prompt P:  L_P = L_kd + reg · λ · L_reg.

    p_prompted: logits of p(y | P, x), which carry the gradient to P; q: of the student; p_bare: of p(y | x); all (N, V).
    lam: λ = 1 - t/T. Returns L_P, L_kd and L_reg, each (N,).
    """
    L_kd = directed_kl(p_prompted, q, prompt_kl)  # (1)
    L_reg = directed_kl(p_prompted, p_bare, reg_kl)  # (2)
    return L_kd + reg * lam * L_reg, L_kd, L_reg  # (3)


def student_loss(q, p):
    """Equation 4, the loss of the student:  L_θ = KL(q(y | x) || p(y | P, x)), (N, V), (N, V) -> (N,).

    With p(y | x), without a prompt, it is GKD's (Agarwal et al. 2024), fully on-policy with reverse KL.
    """
    return kl(q, p)


def kd_loss(q, p, targets):
    """Half cross-entropy, half forward KL:  0.5 · -log q(y_t) + 0.5 · KL(p || q), (N, V), (N, V), (N,) -> (N,). KD's and SeqKD's."""
    return 0.5 * cross_entropy(q, targets) + 0.5 * kl(p, q)


# ---- MiniLLM (Gu et al. 2024), with the values of its released code -----------------------------------------------------------------


def minillm_returns(log_p, log_q, gamma=0.95):
    """R_t of one response:  R_t = 1 / (n - t) · Σ_{k=t}^{n-1} γ^(k-t) r_k,  r_k = (log p(y_k) - log q(y_k)) / 0.5, clipped at ±100.

    log_p, log_q: log-probabilities of the response's n tokens under teacher and sampling student (n,) -> (n,). The sum starts at r_t
    itself, as in the released code; the paper's equation starts one token later, for the single-step term has r_t's exact gradient.
    """
    r = ((log_p - log_q) / 0.5).clamp(-100, 100)
    t = torch.arange(len(r), device=r.device, dtype=r.dtype)
    discount = (gamma ** (t - t[:, None]).clamp(min=0)).triu()  # (n, n): γ^(k-t) from k = t on
    return discount @ r / (len(r) - t)


def whiten(R):
    """R over all tokens of a rollout (M,), shifted and scaled to mean 0 and variance 1."""
    return (R - R.mean()) * (R.var(correction=0) + 1e-8).rsqrt()


def importance_weight(log_p, log_q, alpha=0.2):
    """w = q / ((1 - α) q + α p) at each token (N,), of responses that were sampled from that mixture of student q and teacher p."""
    return 1 / (1 - alpha + alpha * (log_p - log_q).exp())


def policy_gradient_loss(log_q_theta, log_q, w, R, epsilon=0.2):
    """- min(ρ R, clip(ρ, 1 - ε, 1 + ε) R),  ρ = w · q_θ(y_t) / q(y_t), at each token; all (N,).

    q_θ is the student being trained, q the one that the rollout was sampled from, R its whitened return.
    """
    rho = w * (log_q_theta - log_q).exp()
    return -torch.minimum(rho * R, rho.clamp(1 - epsilon, 1 + epsilon) * R)


def minillm_loss(q_theta, p, targets, log_q, w, R):
    """The policy gradient, and the exact KL(q_θ || p) of the single step: logits (N, V), (N, V) and tokens, log_q, w, R (N,) -> (N,)."""
    return policy_gradient_loss(-cross_entropy(q_theta, targets), log_q, w, R) + kl(q_theta, p)
