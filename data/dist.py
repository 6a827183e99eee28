"""Data-parallel ranks under torchrun. Without torchrun there is one, and nothing communicates."""

import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch.nn.parallel import DistributedDataParallel

from data.cli import InputError

DTYPES = ("float32", "bfloat16")  # of the matrix products in a model's blocks


def init_process(dtype=None):
    """Join the other ranks if torchrun started this process, and print what it runs on.

    Returns this rank's device and the dtype of its matrix products: `dtype` if given, else bfloat16
    on a GPU with native support, else float32.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")
    if torch.distributed.is_torchelastic_launched() and not torch.distributed.is_initialized():
        store, global_rank, size = next(torch.distributed.rendezvous("env://"))
        if size == local_world_size:
            # On one machine, torchrun's store still holds the addresses of the attempt before a
            # restart (--max-restarts).
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = torch.distributed.PrefixStore(f"attempt {attempt}", store)
        # gloo for Python objects. It notices at once when a peer exits. The timeout is for one that
        # hangs, and longer than rank 0 takes to download GPT-2 XL while the others wait.
        backend, timeout = "cpu:gloo,cuda:nccl" if gpu else "gloo", timedelta(hours=2)
        torch.distributed.init_process_group(
            backend, store=store, rank=global_rank, world_size=size, timeout=timeout
        )
    if not gpu and world_size() > 1:
        # Processes with more threads than cores between them run ten times slower.
        cores = (os.cpu_count() or 1) // local_world_size
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores)))
    if dtype is None:
        native = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if native else "float32"
    if rank() == 0:
        name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
        sys.stderr.write(f"device: {name}; ranks: {world_size()}; precision: {dtype}\n")
        if not gpu and (built := torch.version.cuda or torch.version.hip):
            hint = "check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
            problem = f"this PyTorch is built for GPUs ({built}) but can use none"
            sys.stderr.write(f"warning: {problem}; {hint}\n")
    return torch.device("cuda", local_rank) if gpu else torch.device("cpu"), dtype


def shutdown():
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def print0(*values):
    """Print on rank 0."""
    if rank() == 0:
        print(*values, flush=True)


def shard(items):
    """This rank's part of a list that all ranks hold."""
    return items[rank() :: world_size()]


def all_reduce_sum(tensor):
    """Sum a tensor over all ranks, in place. Returns it."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def all_reduce_max(number):
    """The maximum of an int over all ranks."""
    return max(all_gather_list([number]))


def all_gather_list(items):
    """The concatenation of all ranks' lists, in the order of ranks, on every rank."""
    if world_size() == 1:
        return items
    lists = [None] * world_size()
    torch.distributed.all_gather_object(lists, items)
    return [item for items in lists for item in items]


def wrap_in_ddp(model, device):
    """The model under DistributedDataParallel; without torchrun the model itself."""
    if not torch.distributed.is_initialized():
        return model
    device_ids = [device] if device.type == "cuda" else None
    ddp = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    # DDP rebuilds its buckets after the first pass, and they determine the order in which the
    # gradients of three or more ranks are summed. After this empty pass a run that resumes sums
    # them in the same order as one that was never interrupted.
    ddp(torch.zeros(1, 1, dtype=torch.long, device=device)).sum().backward()
    model.zero_grad(set_to_none=True)
    return ddp


def run_on_rank0(function, *arguments):
    """Run a function on rank 0 while the others wait. All ranks return its result, and all raise
    InputError if it raises InputError or OSError. The ranks must share a file system."""
    result = [None, None]  # value, error message
    if rank() == 0:
        try:
            result[0] = function(*arguments)
        except (InputError, OSError) as error:
            result[1] = str(error)
    if world_size() > 1:
        torch.distributed.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise InputError(result[1])
    return result[0]


@contextmanager
def defer_signals():
    """Defer SIGINT and SIGTERM to the end of the block. Yields the list of those received."""
    received, previous = [], {}
    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for number in received:
        signal.raise_signal(number)
