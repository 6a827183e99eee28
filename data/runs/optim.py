"""AdamW, its learning rate, and gradient clipping."""

import math

import torch

from data.process import dist

MAX_GRAD_NORM = 1.0
MIN_LR = 1e-7  # at the end of a cosine schedule


def adamw(parameters, s, sharded=False):
    """AdamW for Settings `s`, with weight decay on matrices, not on biases and LayerNorm.

    sharded: with several ranks, each keeps the states of a part of the parameters and updates that
    part (ZeRO stage 1, Rajbhandari et al. 2020). The bits are those of plain AdamW.
    """
    parameters = list(parameters)
    matrices = {"params": [p for p in parameters if p.ndim > 1]}
    others = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    groups = [group for group in (matrices, others) if group["params"]]
    kwargs = {"betas": (0.9, s.beta2), "weight_decay": s.weight_decay, "fused": True}
    if sharded and dist.world_size() > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second

        # The parameters of a rank in one tensor: one broadcast per rank and step, not one per
        # parameter.
        return ZeroRedundancyOptimizer(
            groups, torch.optim.AdamW, parameters_as_bucket_view=True, **kwargs
        )
    return torch.optim.AdamW(groups, **kwargs)


def optimizer_state(optimizer):
    """The state of all ranks, as that of plain AdamW, on rank 0. All ranks must call it.

    Tensors pass one by one: ZeRO's own consolidate_state_dict takes minutes and GPU memory.
    """
    state = torch.optim.Optimizer.state_dict(optimizer)
    if isinstance(optimizer, torch.optim.AdamW):  # not sharded
        return state
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shard, rank = optimizer.optim.state, dist.rank()  # {parameter: {name: tensor}}
    owners = dist.all_gather_list([(i, rank) for i, p in enumerate(parameters) if p in shard])
    for i, owner in sorted(owners):
        p = parameters[i]
        values = shard.get(p)  # None on all but the owner
        if rank == 0 < owner:
            values = {name: torch.empty_like(p, device="cpu") for name in ("exp_avg", "exp_avg_sq")}
            values["step"] = torch.empty(())
        if values is not None and owner > 0:
            for name in sorted(values):
                dist.send_to_rank0(values[name], owner)
        state["state"][i] = values
    return state


def load_optimizer_state(optimizer, state):
    """Load a state on the CPU that any number of ranks saved. Changes `state`."""
    optimizer.load_state_dict(state)
    if not isinstance(optimizer, torch.optim.AdamW):  # sharded
        optimizer.state.clear()  # a second copy: the inner optimizer has its own
        for p, values in optimizer.optim.state.items():
            values["step"] = values["step"].to(p.device)  # fused AdamW needs it there


def clip_and_step(optimizer):
    """Clip the gradients at norm 1, step, and clear them. Returns the norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    # DDP's gradients are views of its buckets: new ones would be allocated next to them.
    optimizer.zero_grad(set_to_none=not torch.distributed.is_initialized())
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
            schedule = (run.total_steps, s.schedule, run.warmup_steps)
            rates[name] = learning_rate(getattr(s, name), t, *schedule)
            set_learning_rate(optimizer, rates[name])
    return rates
