"""Every loss on tokens: first the paper's equations 1 to 4, then the losses of the other methods,
last `sum_over_tokens`, which sums a loss over many tokens in little memory.

A loss takes logits (N, V) of N response tokens, V vocabulary entries each, and returns one value
per token, (N,); prompt_loss returns four. The caller divides the sum by the number of response
tokens in the global batch. Arguments p and q are logits of teacher and student; those of the model
that is trained come first. No loss detaches the others: `sum_over_tokens` gives them no gradient.
"""

import math

import torch
import torch.nn.functional as F

from model import no_autocast


def log_softmax(logits):
    """Log-probabilities (N, V) of logits (N, V), in float32."""
    return F.log_softmax(logits.float(), dim=-1)


def kl(a_logits, b_logits):
    """KL(a || b) per token in nats, exact over the vocabulary: (N, V), (N, V) -> (N,). In float32,
    differentiable in both."""
    return kl_of_logs(log_softmax(a_logits), log_softmax(b_logits))


def kl_of_logs(log_a, log_b):
    """Σ_v a_v (log a_v - log b_v), from log-probabilities (N, V) -> (N,)."""
    # As a product and a sum: autocast would compute a dot product in bfloat16.
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def directed_kl(log_trained, log_other, direction):
    """KL(trained || other) if "reverse", KL(other || trained) if "forward" (Table 5), from
    log-probabilities. What is trained in the prompt's loss is p(y | P, x). So reverse is KL(p || q)
    there, which papers that train the student call forward."""
    if direction not in ("reverse", "forward"):
        raise ValueError(f"direction {direction!r} must be 'reverse' or 'forward'")
    pair = (log_trained, log_other) if direction == "reverse" else (log_other, log_trained)
    return kl_of_logs(*pair)


def prompt_loss(p_prompted, q, p_bare, lam, reg_weight=1.0, prompt_kl="reverse", reg_kl="reverse"):
    """Equations 1 to 3, the loss of the soft prompt P:  L_P = L_kd + reg_weight · λ · L_reg.

    L_kd = KL(p(y | P, x) || q(y | x)) moves the prompted teacher towards the student q. L_reg =
    KL(p(y | P, x) || p(y | x)) keeps it near the teacher without prompt. λ (lam) falls from 1 at
    the first step to 1 / total_steps at the last: early on the prompt must not spoil the teacher,
    later it may move further. Only p_prompted is to get a gradient, and through it P.
    reg_weight, and prompt_kl and reg_kl as in `directed_kl`: for ablations; the defaults are the
    paper's method. Returns (4, N): L_P, L_kd, L_reg and KL(p(y | P, x) || p(y | x)), which is
    L_reg unless reg_kl is "forward".
    """
    log_prompted, log_bare = log_softmax(p_prompted), log_softmax(p_bare)  # (N, V)
    L_kd = directed_kl(log_prompted, log_softmax(q), prompt_kl)  # (1)
    L_reg = directed_kl(log_prompted, log_bare, reg_kl)  # (2)
    L_P = L_kd + reg_weight * lam * L_reg  # (3)
    kl_prompted_bare = L_reg if reg_kl == "reverse" else kl_of_logs(log_prompted, log_bare)
    return torch.stack([L_P, L_kd, L_reg, kl_prompted_bare])


def student_loss(q, p):
    """Equation 4:  L_θ = KL(q(y | x) || p(y | P, x)), the student's loss; p: logits of p(y | P, x).
    GKD, as the paper compares it, is the same with p(y | x), the teacher without the prompt."""
    return kl(q, p)


# --- SFT, KD and SeqKD ---


def cross_entropy(logits, targets):
    """-log q(y_t | y_<t, x): logits (N, V), targets (N,) -> (N,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def kd_loss(q, p, targets):
    """0.5 · (-log q(y_t)) + 0.5 · KL(p || q), the loss of KD and SeqKD as released -> (N,)."""
    return 0.5 * cross_entropy(q, targets) + 0.5 * kl(p, q)


# --- MiniLLM (Gu et al. 2024), with the constants of its released code ---


def minillm_loss(q_theta, p, targets, log_q, w, R):
    """The policy gradient plus the exact single-step KL(q_θ || p): logits (N, V), others (N,).
    As in the released code the KL is not weighted by w; in the paper it is."""
    return policy_gradient_loss(-cross_entropy(q_theta, targets), log_q, w, R) + kl(q_theta, p)


def policy_gradient_loss(log_q_theta, log_q, w, R, epsilon=0.2):
    """-min(ρ R, clip(ρ, 1 - ε, 1 + ε) R) with ρ = w · q_θ(y_t) / q(y_t); all (N,).

    q_θ: the student being trained; q: the same student when the rollout was made; w: corrects for
    sampling from the mixture of q and p instead of q (`importance_weight`); R: the whitened return.
    """
    rho = w * (log_q_theta - log_q).exp()
    return -torch.minimum(rho * R, rho.clamp(1 - epsilon, 1 + epsilon) * R)


def minillm_returns(log_p, log_q, gamma=0.95):
    """The returns R_t of one response of n tokens:

        R_t = 1 / (n - t) · Σ_{k=t}^{n-1} γ^(k-t) r_k
        r_k = (log p(y_k) - log q(y_k)) / 0.5, clipped at ±100

    log_p, log_q: of the sampled tokens, under the teacher and under the student at the time of the
    rollout, (n,) -> (n,). 0.5 is the reward scale of the released code. The paper's sum starts at
    r_{t+1}, because the single-step KL already covers r_t exactly; the released code, followed
    here, starts at r_t.
    """
    rewards = ((log_p - log_q) / 0.5).clamp(-100, 100)
    t = torch.arange(len(rewards), device=rewards.device, dtype=rewards.dtype)
    # Row t of this triangular matrix has the discounts γ^(k-t) of the rewards from t on. One matrix
    # product replaces a loop over n dependent steps, and n is at most 256.
    discounts = (gamma ** (t - t[:, None]).clamp(min=0)).triu()  # (n, n)
    return discounts @ rewards / (len(rewards) - t)


def whiten(R):
    """R (M,), the returns of all M tokens of a rollout, shifted to mean 0, scaled to variance 1.
    The released code does this to each micro-batch, and counts its padding."""
    return (R - R.mean()) * (R.var(correction=0) + 1e-8).rsqrt()


def importance_weight(log_p, log_q, alpha):
    """w = q / ((1 - α) q + α p) per token (N,), for responses sampled from that mixture."""
    return 1 / (1 - alpha + alpha * (log_p - log_q).exp())


# --- A loss over many tokens in little memory ---

# Bytes of float32 logits: chunks for the matrix products, blocks within them for the loss. On a CPU
# a block stays in its cache; on a GPU a chunk is one block.
CPU_CHUNK_BYTES, CPU_BLOCK_BYTES, GPU_BYTES = 2**27, 2**23, 2**27


def sum_over_tokens(loss_fn, trained, *others, **per_token):
    """The sum of a loss over N tokens, from hidden states and heads. It equals

        logits = [hidden @ head.T for hidden, head in (trained, *others)]  # (N, V) each
        return loss_fn(*logits, **per_token).sum(-1)

    but never holds all (N, V) logits. Gradients are computed chunk by chunk in the forward pass;
    backward only scales them. All products are in float32, even inside autocast.

    trained: hidden (N, C) and head (V, C) that the gradient goes to: the student's; or, for the
    prompt's loss, the frozen teacher's, whose hidden states pass it on to P.
    others: hidden (N, C') and head (V, C') of each further model, which may have another width C';
    they get no gradient.
    per_token: what else loss_fn takes by name, tensors (N, ...).
    loss_fn: returns (m,), or (k, m): the loss first, then what is only logged. It is called for
    some m of the N tokens at a time, with their logits (m, V') as in `aligned_logits`. So it may
    reduce over the vocabulary only by a softmax, where the extra entries have probability 0.
    Returns the sum (), or sums (k,), of which only the first has a gradient. Raises ValueError if
    numbers of tokens or vocabularies differ.
    """
    (hidden, head), N = trained, len(trained[0])
    if any(len(W) != len(head) for _, W in others):
        sizes = [len(W) for _, W in (trained, *others)]
        raise ValueError(f"the models' vocabularies have {sizes} entries; they must be the same")
    if any(len(values) != N for values in (*(h for h, _ in others), *per_token.values())):
        raise ValueError(f"all models and tensors per token must have {N} tokens, as the first")
    others = [(h.float(), W.float()) for h, W in others]
    with no_autocast(hidden.device):
        return _SumOverTokens.apply(loss_fn, others, per_token, hidden.float(), head.float())


class _SumOverTokens(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits exist. PyTorch runs a
    Function's forward with autograd off."""

    @staticmethod
    def forward(ctx, loss_fn, others, per_token, hidden, head):
        hidden_needs_grad, head_needs_grad = ctx.needs_input_grad[3:]
        needs_grad = hidden_needs_grad or head_needs_grad
        d_hidden = torch.empty_like(hidden) if hidden_needs_grad else None
        d_head = torch.zeros_like(head) if head_needs_grad else None
        total = 0
        for chunk in equal_slices(len(hidden), head, CPU_CHUNK_BYTES):
            logits = aligned_logits(hidden[chunk], head)  # (n, V')
            other_logits = [aligned_logits(h[chunk], W) for h, W in others]
            for block in equal_slices(len(logits), head, CPU_BLOCK_BYTES):
                z = logits[block].detach().requires_grad_(needs_grad)  # (m, V')
                tokens = slice(chunk.start + block.start, chunk.start + block.stop)
                values = {name: x[tokens] for name, x in per_token.items()}
                with torch.set_grad_enabled(needs_grad):
                    per_token_losses = loss_fn(z, *(x[block] for x in other_logits), **values)
                    sums = per_token_losses.sum(-1)  # () or (k,)
                    loss = sums if sums.ndim == 0 else sums[0]
                total = total + sums.detach()
                if needs_grad:
                    # The gradient may overwrite the block's logits: nothing reads them again.
                    (d_z,) = torch.autograd.grad(loss, z)
                    logits[block] = d_z
            d_logits = logits[:, : len(head)]  # (n, V), without the padding
            if hidden_needs_grad:
                d_hidden[chunk] = d_logits @ head
            if head_needs_grad:
                d_head.addmm_(d_logits.T, hidden[chunk])
        ctx.save_for_backward(d_hidden, d_head)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # () or (k,)
        scale = grad if grad.ndim == 0 else grad[0]
        return None, None, None, *(None if d is None else d * scale for d in ctx.saved_tensors)


@torch.no_grad()
def token_log_probs(hidden, head, tokens):
    """Log-probabilities (N,) of tokens (N,) under the model of hidden (N, C) and head (V, C)."""
    hidden, head, log_probs = hidden.float(), head.float(), []
    for chunk in equal_slices(len(hidden), head, CPU_CHUNK_BYTES):
        logits = aligned_logits(hidden[chunk], head)  # (n, V')
        log_probs.append(-cross_entropy(logits, tokens[chunk]))
    return torch.cat(log_probs)


def aligned_logits(hidden, head):
    """Logits (n, V') of hidden (n, C) under a head (V, C), to be called with autograd off. V' is V
    rounded up to a multiple of 16, so that rows are aligned in memory. The extra logits are a large
    negative number: softmax makes them 0. With -inf, log a - log b would be NaN there."""
    V = len(head)
    logits = hidden.new_empty(len(hidden), math.ceil(V / 16) * 16)
    logits[:, V:] = -1e30
    part_size = 1024 if hidden.is_cpu else V  # a part of the head that stays in the CPU's cache
    for part, out in zip(head.split(part_size), logits[:, :V].split(part_size, dim=1)):
        torch.mm(hidden, part.T, out=out)  # autocast leaves products with `out` alone
    return logits


def equal_slices(n, head, cpu_bytes):
    """Slices of n tokens, the logits of each within cpu_bytes on a CPU, else within GPU_BYTES. A
    single empty slice for n = 0."""
    n_slices = max(1, math.ceil(n * 4 * len(head) / (cpu_bytes if head.is_cpu else GPU_BYTES)))
    size = max(1, math.ceil(n / n_slices))
    return [slice(start, min(start + size, n)) for start in range(0, max(1, n), size)]
