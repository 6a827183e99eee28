"""Every loss on tokens. N is the number of response tokens, V the vocabulary; each function gives one value a token, (N,), so that
the caller can divide their sum by the number of response tokens in the whole global batch.

`sum_over_tokens` takes any of them from hidden states, a few tokens at a time, so that no (N, V) tensor ever exists.
"""

import torch
import torch.nn.functional as F


def cross_entropy(logits, targets):
    """- log q(y_t | y_<t, x): logits (N, V), targets (N,) -> (N,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


class _KL(torch.autograd.Function):
    """With gradients in closed form: a quarter of the passes over (N, V) tensors that autograd would make."""

    @staticmethod
    def forward(ctx, first, second):
        log_first, log_second = F.log_softmax(first, dim=-1), F.log_softmax(second, dim=-1)
        probs = log_first.exp()
        log_ratio = log_first.sub_(log_second)
        values = torch.linalg.vecdot(probs, log_ratio)  # (N,)
        ctx.save_for_backward(probs, log_ratio, values, log_second if ctx.needs_input_grad[1] else None)
        return values

    @staticmethod
    def backward(ctx, grad):  # (N,)
        probs, log_ratio, values, log_second = ctx.saved_tensors
        to_first = to_second = None
        if ctx.needs_input_grad[0]:
            to_first = (log_ratio - values[:, None]).mul_(probs).mul_(grad[:, None])
        if ctx.needs_input_grad[1]:
            to_second = log_second.exp().sub_(probs).mul_(grad[:, None])
        return to_first, to_second


def kl(first, second):
    """KL(first || second) at each token, exact over the vocabulary: logits (N, V), (N, V) -> (N,).

    Zero for equal distributions. Forward KL is kl(p, q), reverse KL is kl(q, p), for teacher p and student q.
    """
    return _KL.apply(first.float(), second.float())


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


# ---- the memory-lean form -----------------------------------------------------------------------------------------------------------

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}  # of one chunk's float32 logits: what a CPU's cache holds, and what keeps a GPU busy


def token_chunks(hidden, head):
    """Slices of the N tokens, each of as many as the logits of one chunk may be."""
    size = max(1, CHUNK_BYTES[hidden.device.type] // (4 * len(head)))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def token_log_probs(head, hidden, targets):
    """log q(y_t | y_<t, x) of tokens (N,), from hidden states (N, C) and head (V, C) -> (N,), a chunk at a time. Without gradients."""
    chunks = token_chunks(hidden, head)
    return torch.cat([hidden.new_zeros(0), *(-cross_entropy(F.linear(hidden[i], head), targets[i]) for i in chunks)])


def sum_over_tokens(loss_of, hidden, head):
    """The sum of a loss over N tokens, from hidden states (N, C) and head (V, C), a chunk of tokens at a time: no (N, V) tensor is ever made.

    loss_of: logits of a chunk (n, V), and the slice of the N tokens that it is -> the loss (n,); or (k, n), whose first row is the loss and whose others
    are for the log. Returns the sum (), or the sums (k,), of which the first carries gradients to hidden and head. They are made on the
    spot, while a chunk's logits are there.
    """
    return _SumOverTokens.apply(loss_of, hidden, head)


class _SumOverTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss_of, hidden, head):
        _, to_hidden, to_head = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if to_hidden else None
        d_head = torch.zeros_like(head) if to_head else None
        total = 0
        for i in token_chunks(hidden, head) or [slice(0, 0)]:
            logits = F.linear(hidden[i], head).requires_grad_(to_hidden or to_head)  # (n, V)
            with torch.set_grad_enabled(logits.requires_grad):
                losses = loss_of(logits, i).sum(-1)  # () or (k,)
                loss = losses if losses.ndim == 0 else losses[0]
            total = total + losses.detach()
            if logits.requires_grad:
                (d_logits,) = torch.autograd.grad(loss, logits)
                if to_hidden:
                    d_hidden[i] = d_logits @ head
                if to_head:
                    d_head.addmm_(d_logits.to(d_head.dtype).T, hidden[i].to(d_head.dtype))
        ctx.save_for_backward(d_hidden, d_head)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # () or (k,)
        scale = grad if grad.ndim == 0 else grad[0]
        return None, *(None if d is None else d * scale for d in ctx.saved_tensors)
