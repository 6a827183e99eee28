"""Data-parallel ranks under a launcher. Without one there is one rank, and nothing communicates."""

import functools
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.process.command_line import LAUNCH_FIX, STOP_SIGNALS, handle_signals, is_launched
from data.process.errors import InputError

DTYPES = ("float32", "bfloat16")  # of the matrix products in a model's blocks
JOIN_TIMEOUT = timedelta(minutes=10)  # for the other ranks
# Where launchers say how many processes they started: srun, Open MPI, MPICH and Intel MPI, MVAPICH
# 2 and 3, jsrun, Flux, Horovod. SLURM_NTASKS is no such place: sbatch and salloc set it, too.
PROCESS_COUNTS = """SLURM_STEP_NUM_TASKS OMPI_COMM_WORLD_SIZE PMI_SIZE MV2_COMM_WORLD_SIZE
MVP_COMM_WORLD_SIZE JSM_NAMESPACE_SIZE FLUX_JOB_SIZE HOROVOD_SIZE""".split()
# Seconds from a first signal to one that ends the process. torchrun and a terminal's Ctrl-C send
# two at once, and the step that is finished before the process ends may take minutes.
PATIENCE = 10


def init_process(dtype=None):
    """Join the other ranks if a launcher started this process, and print what it runs on.

    Returns this rank's device and the dtype of its matrix products: `dtype` if given, else bfloat16
    on a GPU with native support, else float32. Raises InputError if the launcher's variables are
    wrong, if the other ranks can't be joined, or if there are more ranks than GPUs.
    """
    check_launcher()
    gpu = torch.cuda.is_available()
    if is_launched() and not torch.distributed.is_initialized():
        join_ranks("cpu:gloo,cuda:nccl" if gpu else "gloo")
    gpu_index, n_local_ranks = place_rank(rank(), all_gather_list([process_location()]))
    if gpu:
        torch.cuda.set_device(gpu_index)
        torch.set_float32_matmul_precision("high")
        # It would build a plan for each length of a sequence, that is at every decoded token.
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif world_size() > 1:
        # Processes with more threads than cores between them run ten times slower.
        cores = (os.cpu_count() or 1) // n_local_ranks
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores)))
    if dtype is None:
        native = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if native else "float32"
    if rank() == 0:
        name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
        sys.stderr.write(f"device: {name}; ranks: {world_size()}; precision: {dtype}\n")
        if not gpu and (built := torch.version.cuda or torch.version.hip):
            warning = f"warning: this PyTorch is built for GPUs ({built}) but can use none"
            sys.stderr.write(f"{warning}; check nvidia-smi and CUDA_VISIBLE_DEVICES\n")
    return torch.device("cuda", gpu_index) if gpu else torch.device("cpu"), dtype


def check_launcher():
    """Raise InputError if this process is one of several that can't join each other."""
    if torch.distributed.is_torchelastic_launched():
        return
    variables = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
    rank, size, address = (os.environ.get(name, "").strip() for name in variables)
    if rank not in ("", "0") or size not in ("", "1"):
        are_numbers = rank.isdecimal() and size.isdecimal()
        if not (address and are_numbers and int(rank) < int(size)):
            found = f"RANK is {rank!r}, WORLD_SIZE {size!r}, MASTER_ADDR {address!r}"
            fix = f"set all three, with RANK from 0 to WORLD_SIZE - 1, or {LAUNCH_FIX}"
            raise InputError(f"{found}: they don't make this process a rank; {fix}")
        return
    # A person's shell inside a SLURM job starts one process, whatever the tasks of its step. That
    # of salloc has a step id of its own; that of srun has a terminal.
    is_shell = os.environ.get("SLURM_STEP_ID") == "4294967290" or os.isatty(0)
    if is_shell and "SLURM_JOB_ID" in os.environ:
        return
    for name in PROCESS_COUNTS:
        n = os.environ.get(name, "")
        if n.isdecimal() and int(n) > 1:
            problem = f"{name} is {n}: each of these processes would run alone"
            raise InputError(f"{problem}; {LAUNCH_FIX}, or unset {name} if there is only one")


def join_ranks(backend):
    """Join the other ranks. Raises InputError if that fails, as when a rank never comes."""
    os.environ["MASTER_PORT"] = os.environ.get("MASTER_PORT", "").strip() or "29500"
    # gloo for Python objects. It notices at once when a peer exits. The timeout is for one that
    # hangs, and longer than rank 0 takes to download GPT-2 XL while the others wait.
    timeout = timedelta(hours=2)
    try:
        store, rank, size = next(torch.distributed.rendezvous("env://", timeout=JOIN_TIMEOUT))
        if not torch.distributed.is_torchelastic_launched():
            if store.add(f"rank {rank}", 1) > 1:
                raise InputError(f"two processes have RANK {rank}; give each its own")
        elif os.environ.get("LOCAL_WORLD_SIZE") == str(size):
            # On one machine, torchrun's store still holds the addresses of the attempt before a
            # restart (--max-restarts).
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = torch.distributed.PrefixStore(f"attempt {attempt}", store)
        store.set_timeout(timeout)
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timeout
        )
    except (RuntimeError, OSError, ValueError) as error:  # ValueError: for the port
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).partition("\n")[0]
        fix = "check MASTER_ADDR and MASTER_PORT, and that every rank has started"
        raise InputError(f"{address}: can't join the other ranks ({reason}); {fix}") from error


def process_location():
    """Where this process runs: its host, what selects its GPUs, and the GPUs that it can see."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # SLURM may show each task another GPU as number 0. UUIDs tell them apart.
    uuids = tuple(str(torch.cuda.get_device_properties(n).uuid) for n in range(n_gpus))
    return socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES"), uuids


def place_rank(rank, locations):
    """The index of a rank's GPU, and how many ranks its host has. Ranks that see the same GPUs take
    them in turn. Raises InputError if these are fewer. locations: of `process_location`."""
    for (host, _, gpus), n in Counter(locations).items():
        if n > len(gpus) and any(gpus for *_, gpus in locations):
            problem = f"{n} ranks need a GPU each, and they see {len(gpus)}"
            fix = "start one rank per GPU; check --nproc_per_node and CUDA_VISIBLE_DEVICES"
            raise InputError(f"{host}: {problem}; {fix}")
    hosts = [host for host, *_ in locations]
    return locations[:rank].count(locations[rank]), hosts.count(hosts[rank])


def shutdown():
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def print0(*values):
    if rank() == 0:
        print(*values, flush=True)


@functools.cache
def print_once(message):
    """Print to standard error, once in a process. Standard output may be for responses."""
    if rank() == 0:
        print(message, file=sys.stderr, flush=True)


def shard(items):
    """This rank's part of a list that all ranks hold."""
    return items[rank() :: world_size()]


def all_reduce_sum(tensor):
    """Sum a tensor over all ranks, in place. Returns it."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def all_gather_list(items):
    """The concatenation of all ranks' lists, in the order of ranks, on every rank."""
    if world_size() == 1:
        return items
    lists = [None] * world_size()
    torch.distributed.all_gather_object(lists, items)
    return [item for items in lists for item in items]


def least(number):
    """The least of all ranks' numbers, on every rank."""
    return min(all_gather_list([number]))


def send_to_rank0(tensor, owner):
    """Copy a tensor of one rank, the owner, through the CPU. On rank 0, `tensor` is written to."""
    if rank() == owner:
        torch.distributed.send(tensor.cpu(), dst=0)
    elif rank() == 0:
        torch.distributed.recv(tensor, src=owner)


class DDP(DistributedDataParallel):
    """DistributedDataParallel with the head of the model in it.

    The head is tied to the embedding. It may be used outside DDP's forward, because autograd adds
    up both gradients of the weight before it calls DDP's hook.
    """

    @property
    def head(self):
        return self.module.head


def wrap_in_ddp(model, device):
    """The model under DDP; without a launcher the model itself."""
    if not torch.distributed.is_initialized():
        return model
    device_ids = [device] if device.type == "cuda" else None
    ddp = DDP(model, device_ids=device_ids, gradient_as_bucket_view=True)
    # DDP rebuilds its buckets after the first pass, and they determine the order in which the
    # gradients of three or more ranks are summed. After these empty passes a run that resumes sums
    # them in the same order as one that was never interrupted, and gradients are views of the
    # buckets. The first buckets are freed before there are others.
    for keep_gradients in (False, True):
        ddp(torch.zeros(1, 1, dtype=torch.long, device=device)).sum().backward()
        model.zero_grad(set_to_none=not keep_gradients)
    return ddp


def run_on_rank0(function, *arguments):
    """Run a function on rank 0 while the others wait. All ranks return its result, and all raise
    InputError if it raises InputError or OSError. The ranks must share a file system."""
    value = problem = cause = None
    if rank() == 0:
        try:
            value = function(*arguments)
        except (InputError, OSError) as error:
            problem, cause = str(error), error
    [(value, problem), *_] = all_gather_list([(value, problem)])
    if problem is not None:
        raise InputError(problem) from cause
    return value


@contextmanager
def defer_signals():
    """Defer the signals that end a run to the end of the block. Yields those received, a list. The
    first is announced at once. One that comes later than PATIENCE after it ends the process."""
    received = []
    with handle_signals(lambda number, frame: received.append(number)), _watch_signals():
        yield received
    for number in received:
        signal.raise_signal(number)


@contextmanager
def _watch_signals():
    """Let a thread see the block's signals at once. Python runs their handlers only when the main
    thread returns from C, and it never does if it waits for a rank that is frozen."""
    if threading.current_thread() is not threading.main_thread():  # it gets no signals
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # as Python requires
    watcher = threading.Thread(target=_read_signals, args=[reader], daemon=True)
    watcher.start()
    previous = signal.set_wakeup_fd(writer.fileno())
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        writer.close()  # ends the thread
        watcher.join()


def _read_signals(reader):
    """Read the numbers of signals, a byte each, until the other end is closed."""
    first_time = None
    with reader:
        while byte := reader.recv(1):
            name = signal.Signals(byte[0]).name
            if name not in STOP_SIGNALS:
                continue
            if first_time is None:
                first_time = time.monotonic()
                if rank() == 0:
                    _warn("stopping after this step; once more, after ten seconds, ends at once")
            elif time.monotonic() - first_time > PATIENCE:
                fix = "the same command resumes from the last saved state"
                _warn(f"ended by {name} before the step was complete; {fix}")
                os._exit(128 + byte[0])


def _warn(line):
    """Print a line above a progress bar, if standard error can be written to."""
    with suppress(OSError):
        tqdm.write(f"{line}\n", file=sys.stderr, end="")


def first_signal(signals):
    """A signal that any rank has received, the same one on all ranks; 0 if there is none."""
    return max(all_gather_list(signals), default=0)
