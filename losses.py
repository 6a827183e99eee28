"""Every loss on tokens. N is the number of response tokens, V the vocabulary; each function gives one value a token, (N,), so that
the caller can divide their sum by the number of response tokens in the whole global batch.

`sum_over_tokens` takes any of them from hidden states, a few tokens at a time, so that no (N, V) tensor ever exists.
"""

import torch
import torch.nn.functional as F

from model import head_logits


def cross_entropy(logits, targets):
    """- log q(y_t | y_<t, x): logits (N, V), targets (N,) -> (N,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


class _KL(torch.autograd.Function):
    """KL(first || other) for each of k others, with gradients in closed form: far fewer passes over (N, V) than autograd would make."""

    @staticmethod
    def forward(ctx, first, *others):
        log_first = F.log_softmax(first, dim=-1)
        probs, ratios, to_others = log_first.exp(), [], ctx.needs_input_grad[1:]
        of_others = []
        for other, needed in zip(others, to_others):
            log_other = F.log_softmax(other, dim=-1)
            of_others.append(log_other.exp() if needed else None)
            ratios.append(torch.sub(log_first, log_other, out=log_other))
        values = torch.stack([torch.linalg.vecdot(probs, ratio) for ratio in ratios])  # (k, N)
        ctx.save_for_backward(probs, values, *ratios, *of_others)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # (k, N)
        probs, values, *rest = ctx.saved_tensors
        ratios, of_others = rest[: len(values)], rest[len(values) :]
        to_first = None
        if ctx.needs_input_grad[0]:  # p ⊙ (m - p·m), with m = Σ_j g_j log(first / other_j)
            to_first = ratios[0] * grad[0][:, None]
            for ratio, g in zip(ratios[1:], grad[1:]):
                to_first.addcmul_(ratio, g[:, None])
            to_first.sub_((grad * values).sum(0)[:, None]).mul_(probs)
        return to_first, *(
            None if q is None else (q - probs).mul_(g[:, None]) for q, g in zip(of_others, grad)
        )


def kls(first, *others):
    """KL(first || other) at each token, exact over the vocabulary, for each of k others: logits (N, V), each (N, V) -> (k, N)."""
    return _KL.apply(first.float(), *(other.float() for other in others))


def kl(first, second):
    """KL(first || second) at each token, exact over the vocabulary: logits (N, V), (N, V) -> (N,).

    Zero for equal distributions. Forward KL is kl(p, q), reverse KL is kl(q, p), for teacher p and student q.
    """
    return kls(first, second)[0]


def directed_kl(trained, target, direction):
    """ "reverse": KL(trained || target), as in the paper's equations; "forward": KL(target || trained), as in Table 5."""
    return kl(trained, target) if direction == "reverse" else kl(target, trained)


def prompt_loss(p_prompted, q, p_bare, lam, reg_weight=1.0, prompt_kl="reverse", reg_kl="reverse"):
    """Equations 1 to 3, the loss of the soft prompt P:  L_P = L_kd + reg · λ · L_reg.

    p_prompted: logits of p(y | P, x), which carry the gradient to P; q: of the student; p_bare: of p(y | x); all (N, V).
    lam: λ = 1 - t/T. Returns L_P, L_kd and L_reg, each (N,).
    """
    if prompt_kl == reg_kl == "reverse":
        L_kd, L_reg = kls(p_prompted, q, p_bare)  # (1), (2), which share the work on p_prompted
    else:
        L_kd = directed_kl(p_prompted, q, prompt_kl)  # (1)
        L_reg = directed_kl(p_prompted, p_bare, reg_kl)  # (2)
    return L_kd + reg_weight * lam * L_reg, L_kd, L_reg  # (3)


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

# Of float32 logits: a chunk has enough rows for its matrix products to be fast, a block few enough to stay in a CPU's cache while its loss is made.
CHUNK_BYTES, BLOCK_BYTES = {"cpu": 2**27, "cuda": 2**28}, {"cpu": 2**23, "cuda": 2**28}


def equal_slices(n, head, most_bytes):
    """Slices of n tokens, of equal size, the logits of each of which take no more than `most_bytes`; one empty slice where n is 0."""
    size = max(1, -(-n // max(1, -(-n * 4 * len(head) // most_bytes[head.device.type]))))
    return [slice(start, min(start + size, n)) for start in range(0, max(1, n), size)]


@torch.no_grad()
def token_log_probs(hidden, head, tokens):
    """log q(y_t | y_<t, x) of tokens (N,), from hidden states (N, C) and head (V, C) -> (N,), a chunk at a time. Without gradients."""
    chunks = equal_slices(len(hidden), head, CHUNK_BYTES)
    return torch.cat(
        [-cross_entropy(head_logits(hidden[i], head, padded=True), tokens[i]) for i in chunks]
    )


def sum_over_tokens(loss_fn, hidden, head, *targets):
    """The sum of a loss over N tokens, from hidden states (N, C) and head (V, C), a few tokens at a time: no (N, V) tensor is ever made.

    targets: (hidden, head) of each model that the loss compares with, which get no gradient.
    loss_of: a slice i of the N tokens, their logits, and their logits of each target, (n, V'), padded as head_logits does -> the loss
    (n,); or (k, n), whose first row is the loss and whose others are for the log.
    Returns the sum (), or the sums (k,), of which the first carries gradients to hidden and head. They are made on the spot, while the
    logits are there, by float32 products like the logits themselves, also inside autocast.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _SumOverTokens.apply(loss_fn, targets, hidden, head)


class _SumOverTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss_fn, targets, hidden, head):
        *_, to_hidden, to_head = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if to_hidden else None
        d_head = torch.zeros_like(head) if to_head else None
        total = 0
        for i in equal_slices(len(hidden), head, CHUNK_BYTES):
            logits, *of_targets = (
                head_logits(h[i], w, padded=True) for h, w in ((hidden, head), *targets)
            )  # (n, V') each
            for j in equal_slices(len(logits), head, BLOCK_BYTES):
                block = logits[j].detach().requires_grad_(to_hidden or to_head)
                with torch.set_grad_enabled(block.requires_grad):
                    at = slice(i.start + j.start, i.start + j.stop)
                    losses = loss_fn(at, block, *(z[j] for z in of_targets)).sum(-1)  # () or (k,)
                    loss = losses if losses.ndim == 0 else losses[0]
                total = total + losses.detach()
                if block.requires_grad:
                    logits[j] = torch.autograd.grad(loss, block)[
                        0
                    ]  # in place of the logits, which are done with
            d_logits = logits[:, : len(head)]
            if to_hidden:
                d_hidden[i] = d_logits @ head
            if to_head:
                d_head.addmm_(d_logits.T, hidden[i])
        ctx.save_for_backward(d_hidden, d_head)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # () or (k,)
        scale = grad if grad.ndim == 0 else grad[0]
        return None, None, *(None if d is None else d * scale for d in ctx.saved_tensors)
