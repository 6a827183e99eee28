"""AdamW, its learning rate, and gradient clipping."""

import math

import torch

MAX_GRAD_NORM = 1.0
MIN_LR = 1e-7  # at the end of a cosine schedule


def adamw(parameters, s):
    """AdamW for Settings `s`, with weight decay on matrices, not on biases and LayerNorm."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=(0.9, s.beta2), weight_decay=s.weight_decay, fused=True)


def clip_and_step(optimizer):
    """Clip the gradients at norm 1, step, and clear them. Returns the norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def learning_rate(peak, step, total_steps, schedule, warmup_steps):
    """The rate at a step from 0: a linear warm-up, then constant, or a cosine down to MIN_LR."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    angle = math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return MIN_LR + (peak - MIN_LR) * (1 + math.cos(angle)) / 2


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_learning_rates(run, t):
    """Set the rates of step t. Returns them by name."""
    s, rates = run.settings, {}
    for name, optimizer in (("lr", run.optimizer), ("prompt_lr", run.prompt_optimizer)):
        if optimizer is not None:
            schedule = (run.total_steps, s.schedule, s.warmup_steps)
            rates[name] = learning_rate(getattr(s, name), t, *schedule)
            set_learning_rate(optimizer, rates[name])
    return rates
