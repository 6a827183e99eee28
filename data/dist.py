"""Data-parallel ranks under torchrun. Without torchrun there is one rank, and every function here is the identity."""

import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch

from data.cli import InputError

DTYPES = ("float32", "bfloat16")  # of the products in a model's blocks


def init_process(dtype=None):
    """Join the other ranks, if torchrun started us. Returns this rank's device, and the dtype of its products: what is given, else bfloat16
    on a GPU that has it without emulation, float32 elsewhere. Both, and the ranks, are said on standard error."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")
    if torch.distributed.is_torchelastic_launched() and not torch.distributed.is_initialized():
        store, number, size = next(torch.distributed.rendezvous("env://"))
        if size == int(os.environ["LOCAL_WORLD_SIZE"]):
            # With --max-restarts torchrun's store on one machine still has the addresses of the attempt before.
            store = torch.distributed.PrefixStore(
                f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
            )
        # gloo beside nccl: Python objects travel between CPUs. A peer that dies closes its connection, which gloo notices at once. The
        # timeout is for one that hangs: longer than rank 0 takes to download GPT-2 XL while the others wait.
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        torch.distributed.init_process_group(
            backend, store=store, rank=number, world_size=size, timeout=timedelta(hours=2)
        )
    if not gpu and world_size() > 1:
        # Processes with more threads than cores between them run ten times slower.
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(
            max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // local_world))
        )
    if dtype is None:
        dtype = (
            "bfloat16"
            if gpu and torch.cuda.is_bf16_supported(including_emulation=False)
            else "float32"
        )
    if rank() == 0:
        name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
        print(
            f"device: {name}; ranks: {world_size()}; precision: {dtype}",
            file=sys.stderr,
            flush=True,
        )
        if not gpu and (built := torch.version.cuda or torch.version.hip):
            hint = "look at nvidia-smi, the driver's version and CUDA_VISIBLE_DEVICES"
            print(
                f"warning: this PyTorch is built for GPUs ({built}) but can use none, so the CPU works; {hint}",
                file=sys.stderr,
                flush=True,
            )
    return torch.device("cuda", local) if gpu else torch.device("cpu"), dtype


def shutdown():
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def print0(*words):
    """Print on rank 0."""
    if rank() == 0:
        print(*words, flush=True)


def barrier():
    """Wait for all ranks."""
    if world_size() > 1:
        torch.distributed.all_gather_object(
            [None] * world_size(), None
        )  # over gloo, also where the tensors go over nccl


def all_reduce_sum(tensor):
    """The sum of a tensor over all ranks, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def all_reduce_max(number):
    """The largest of all ranks' whole numbers."""
    if world_size() > 1:
        number = torch.tensor(number)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return int(number)


@contextmanager
def defer_signals():
    """Inside, SIGINT and SIGTERM end nothing: their numbers are appended to the list that is given. Those noted when it is left take
    their usual effect then."""
    noted = []
    before = {
        number: signal.signal(number, lambda number, frame: noted.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in noted:
        signal.raise_signal(number)


def shard(items):
    """This rank's part of a list that all ranks hold."""
    return items[rank() :: world_size()]


def all_gather_list(items):
    """The lists of all ranks, joined in the order of ranks; every rank gets the whole."""
    if world_size() == 1:
        return items
    lists = [None] * world_size()
    torch.distributed.all_gather_object(lists, items)
    return [item for items in lists for item in items]


def run_on_rank0(function, *arguments):
    """Run a function on rank 0 while the others wait. All return its result, and all raise its InputError or OSError.

    The ranks' machines share a file system.
    """
    answer = [None, None]
    if rank() == 0:
        try:
            answer[0] = function(*arguments)
        except (InputError, OSError) as error:
            answer[1] = str(error)
    if world_size() > 1:
        torch.distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise InputError(answer[1])
    return answer[0]
