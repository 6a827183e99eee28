"""A pretended GPU: a device whose tensors can't be mixed with those of the CPU.

A CPU build of PyTorch makes no CUDA tensors, not even without memory. Here the meta device stands
for the GPU. Its tensors have values, kept on the CPU, so that the product runs as it is. What it
does for a device other than the CPU is done, and an operation on tensors of both devices fails, as
it would with CUDA. Only a copy, and a number (a tensor without dimensions), may come from the CPU.
"""

from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("meta")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}


class GpuTensor(torch.Tensor):
    """A tensor of the pretended GPU. `values` is the same on the CPU."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=GPU,
        )

    def __init__(self, values):
        self.values_on_cpu = values

    def __reduce_ex__(self, protocol):
        return self.values_on_cpu.__reduce_ex__(protocol)  # a file is loaded to the CPU first

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside the context of pretended_gpu")


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in tensors if isinstance(x, GpuTensor)]
        on_cpu = [x for x in tensors if not isinstance(x, GpuTensor) and x.ndim > 0]
        if on_gpu and on_cpu and func not in COPIES:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        device = kwargs.get("device")
        to_gpu = bool(on_gpu) if device is None else torch.device(device) == GPU
        if device is not None and to_gpu:
            kwargs = kwargs | {"device": "cpu"}
        wrappers = {id(x.values_on_cpu): x for x in on_gpu}
        args, kwargs = tree_map_only(GpuTensor, lambda x: x.values_on_cpu, (args, kwargs))
        result = func(*args, **kwargs)
        if not to_gpu:
            return result

        def wrap(x):  # an operation in place returns what it was given
            return wrappers.get(id(x)) if id(x) in wrappers else GpuTensor(x)

        return tree_map_only(torch.Tensor, wrap, result)


class _Functions(TorchFunctionMode):
    """What PyTorch does with memory directly: numbers from lists, and lists from numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") == GPU:
            return func(*args, **kwargs | {"device": "cpu"}).to(GPU)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            return func(args[0], torch.tensor(args[1]).to(args[0].device))
        if func is torch.Tensor.tolist:
            return func(args[0].cpu())
        return func(*args, **kwargs)


@contextmanager
def pretended_gpu(total_memory=80e9):
    """In this context tensors on the meta device behave as on a GPU, and commands run there.

    Replaced are: the properties of the card, the device that `dist.init_process` returns, and
    the list of devices for which PyTorch has a fused AdamW.
    """
    card = SimpleNamespace(total_memory=total_memory)
    optimizer = import_module("torch.optim.optimizer")
    fused = [*optimizer._get_fused_kernels_supported_devices(), GPU.type]
    with (
        patch("torch.cuda.get_device_properties", lambda device: card),
        patch("data.process.dist.init_process", lambda dtype=None: (GPU, dtype or "float32")),
        patch.object(optimizer, "_get_fused_kernels_supported_devices", lambda: fused),
        _Functions(),
        _Operations(),
    ):
        yield
