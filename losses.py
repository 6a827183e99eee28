"""Every loss on tokens. N is the number of response tokens, V the vocabulary; each function gives one value a token, (N,), so that
the caller can divide their sum by the number of response tokens in the whole global batch."""

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


def student_loss(q, p_prompted):
    """Equation 4, the loss of the student:  L_θ = KL(q(y | x) || p(y | P, x)), (N, V), (N, V) -> (N,)."""
    return kl(q, p_prompted)
