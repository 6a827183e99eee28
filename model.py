"""GPT-2 (Radford et al. 2019) in PyTorch: configuration, blocks, key-value cache, and Hugging Face checkpoint directories.

Shapes: B rows, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import json
import math
import os
import platform
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from data.cli import InputError


@dataclass(frozen=True)
class Config:
    """GPT-2's sizes under Hugging Face's names. `dropout` stands for its three equal rates."""

    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    vocab_size: int = 50257
    n_positions: int = 1024
    dropout: float = 0.1


class KVCache:
    """The keys and values of rows being decoded, in fixed memory. Row b holds `lengths[b]` tokens and starts at position 0;
    what lies behind that is not attended to and gets overwritten, so rows of any lengths share a batch without padding."""

    def __init__(self, config, n_rows, max_seq_len, device, dtype):
        shape = (
            config.n_layer,
            n_rows,
            max_seq_len,
            config.n_head,
            config.n_embd // config.n_head,
        )  # (layers, B, K, H, D)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(n_rows, dtype=torch.long, device=device)  # (B,)
        self.longest = 0  # an upper bound of the lengths, known without asking the device

    @staticmethod
    def row_bytes(config, max_seq_len, dtype):
        """Bytes of a row of `capacity` tokens, in "float32" or "bfloat16"."""
        return 2 * config.n_layer * max_seq_len * config.n_embd * getattr(torch, dtype).itemsize

    def extend(self, n_tokens):
        """Make room for `n_tokens` more in every row. Returns their positions (B, T) and who attends to whom (B, 1, T, K)."""
        self.positions = self.lengths[:, None] + torch.arange(
            n_tokens, device=self.lengths.device
        )  # (B, T)
        self.rows = torch.arange(len(self.lengths), device=self.lengths.device)[:, None]  # (B, 1)
        self.lengths = self.lengths + n_tokens
        self.longest += n_tokens
        key_positions = torch.arange(self.longest, device=self.lengths.device)  # (K,)
        return self.positions, (key_positions <= self.positions[..., None])[:, None]

    def write(self, layer, k, v):
        """Store a layer's new keys and values (B, T, H, D). Returns all of the layer's so far, (B, K, H, D)."""
        self.keys[layer][self.rows, self.positions] = k
        self.values[layer][self.rows, self.positions] = v
        return self.keys[layer, :, : self.longest], self.values[layer, :, : self.longest]

    def set_lengths(self, lengths):
        """Cut each row back to its own length (B,), after a right-padded batch was written."""
        self.lengths = lengths.clone()

    def select_rows(self, rows):
        """Drop all rows but these (an index tensor)."""
        self.keys = self.keys[:, rows]
        # Only now, so that of keys and values one alone is there twice
        self.values = self.values[:, rows]
        self.lengths = self.lengths[rows]


def linear(x, weight, bias=None):
    """F.linear, by the packed copy of the weight where it has one: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    packed = getattr(weight, "packed", None)
    return (
        F.linear(x, weight, bias)
        if packed is None
        else torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    )


def head_logits(hidden, head, padded=False, on_gpu=None):
    """Logits of hidden states (..., C) under a head (V, C): a float32 product on every device, also inside autocast.

    GPT-2's logits share an offset of -35 to -112, where bfloat16 numbers lie 0.25 to 0.5 apart: rounded to it, they would lose the
    differences between tokens. A GPU rounds the inputs of the product to TF32, which only loses what is small beside each of them.

    on_gpu: the GPU's form of the product or the CPU's; None: the form for the device that the tensors are on.
    padded: on a CPU, add tokens of no probability up to a multiple of 16, and make no gradients: one row of GPT-2's 50,257 logits
    would leave the next at an odd address. Returns (..., V), or (n, V') if padded.
    """
    on_gpu = hidden.is_cuda if on_gpu is None else on_gpu
    with torch.autocast(hidden.device.type, enabled=False):
        if on_gpu:
            return F.linear(hidden, head)
        if not padded:
            return linear(hidden, head)
        V = len(head)
        logits = hidden.new_empty(len(hidden), -(-V // 16) * 16)
        logits[:, V:] = -1e30
        for words, part in zip(
            head.split(1024), logits[:, :V].split(1024, dim=1)
        ):  # few enough of the head to stay in cache
            torch.mm(hidden, words.T, out=part)
        return logits


def precision(device, dtype):
    """The context of a forward pass whose blocks multiply matrices in `dtype`, "float32" or "bfloat16". What stays float32 either way: the
    residual stream, LayerNorm, and the logits (`head_logits`)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@contextmanager
def packed_weights(*models):
    """While it lasts, decoding on an x86 CPU multiplies by copies of the large weights, laid out as oneDNN reads them for a few rows: up
    to three times as fast as F.linear, which is built for many. Inside autocast the head alone is packed, whose product is float32 there
    too. The weights must not change meanwhile."""
    weights = []
    if torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64"):
        matrices = (
            w
            for model in models
            for w in model.parameters()
            if w.ndim == 2 and w is not model.wpe.weight
        )
        if torch.is_autocast_enabled("cpu"):
            matrices = (model.wte.weight for model in models)
        weights = [
            w for w in matrices if w.numel() >= 2**18 and w.dtype == torch.float32 and not w.is_cuda
        ]
    try:
        for weight in weights:
            weight.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 32)
        yield
    finally:
        for weight in weights:
            weight.packed = None


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, cache, layer):
        B, T, C = x.shape
        q, k, v = (
            y.view(B, T, self.n_head, C // self.n_head) for y in self.c_attn(x).split(C, dim=2)
        )  # (B, T, H, D)
        if cache is not None:
            k, v = cache.write(layer, k, v)  # (B, K, H, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T or K, D)
        # Rows are right-padded, so without a cache the causal mask keeps padding out of sight as well.
        y = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal=mask is None
        )
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": Linear(config.n_embd, 4 * config.n_embd),
                "c_proj": Linear(4 * config.n_embd, config.n_embd),
            }
        )
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, x, mask=None, cache=None, layer=None, output_positions=None
    ):  # (B, T, C) -> (B, T, C), or (N, C) of the N tokens `where`
        x = x + self.drop(self.attn(self.ln_1(x), mask, cache, layer))
        x = x if output_positions is None else x[output_positions]
        h = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.drop(self.mlp["c_proj"](h))


class GPT(nn.Module):
    """GPT-2. `forward` gives hidden states, `logits` the head's output at whichever of them the caller wants."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # tokens, and the head
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)  # positions
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)

    def forward(self, ids, prefix=None, cache=None, output_positions=None):
        """Hidden states after the last LayerNorm.

        ids: tokens (B, T), right-padded. prefix: embeddings (P, C) in front of every row, at positions 0 to P - 1.
        cache: a KVCache that holds what stands before `ids`; it takes in the new tokens.
        where: the N tokens of `ids` whose hidden states are wanted, as two (N,) tensors, row and place in `ids`; the last layer
        spares itself the others.
        Returns (B, P + T, C), or (N, C). A position sees what is before it in its row, so padding changes no real token's state.
        """
        x = self.wte(ids)  # (B, T, C)
        if prefix is not None:
            x = torch.cat([prefix.to(x.dtype).expand(len(ids), -1, -1), x], dim=1)  # (B, P + T, C)
        if cache is None:
            positions, mask = torch.arange(x.shape[1], device=ids.device), None
        else:
            positions, mask = cache.extend(x.shape[1])
        x = self.drop(x + self.wpe(positions))
        if output_positions is not None and prefix is not None:
            output_positions = (output_positions[0], output_positions[1] + len(prefix))
        for layer, block in enumerate(self.h):
            x = block(x, mask, cache, layer, output_positions if block is self.h[-1] else None)
        return self.ln_f(x)

    def logits(self, hidden):
        """Hidden states (..., C) to float32 logits (..., V). The head is tied to the token embedding."""
        return head_logits(hidden, self.wte.weight)

    def n_parameters(self):
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def initialise(self, seed):
        """Weights before pre-training: normal with standard deviation 1 / √C, those of layers that add to the residual stream smaller by
        the root of their number, as in GPT-2. GPT-2's own 0.02 suits its XL; a narrow model that starts there never learns to copy."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = self.config.n_embd**-0.5 / (
                    math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 1
                )
                p.copy_(torch.empty_like(p, device="cpu").normal_(0.0, std, generator=generator))
            elif name.endswith("bias"):
                p.zero_()
        return self


# ---- Hugging Face checkpoint directories --------------------------------------------------------------------------------------

# Stored as (in, out), the transpose of nn.Linear
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load(directory, dropout=None):
    """The model of a Hugging Face GPT-2 directory (config.json with model.safetensors or pytorch_model.bin), in float32, on the CPU.

    Reads the names with and without `transformer.`, and files with the buffers `attn.bias` or with `lm_head.weight`.
    dropout: instead of the configuration's own. Raises InputError naming file and tensor.
    """
    directory = Path(directory)
    config = read_config(directory, dropout)
    path, state = _read_tensors(directory)
    with torch.device(
        "meta"
    ):  # no memory and no random numbers for weights that are replaced at once
        model = GPT(config)
    wanted = model.state_dict()
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    state = {
        name: tensor
        for name, tensor in state.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    head = state.pop("lm_head.weight", None)
    for name, tensor in state.items():
        if name not in wanted:
            raise InputError(
                f"{path}: tensor '{name}' is no part of GPT-2 with {config.n_layer} layers; config.json belongs to another model"
            )
        if not tensor.is_floating_point():
            raise InputError(
                f"{path}: tensor '{name}' is {tensor.dtype}; floating-point weights are wanted"
            )
        if name.endswith(TRANSPOSED) and tensor.ndim == 2:
            tensor = tensor.T
        if tensor.shape != wanted[name].shape:
            raise InputError(
                f"{path}: tensor '{name}' has shape {tuple(state[name].shape)}, which does not fit config.json"
            )
        state[name] = tensor.float().contiguous()
        if not torch.isfinite(state[name]).all():
            raise InputError(
                f"{path}: tensor '{name}' has values that are not finite; the file is damaged or its training diverged"
            )
    for name in wanted:
        if name not in state:
            raise InputError(f"{path}: tensor '{name}' is missing; fetch the file again")
    if head is not None and (
        head.shape != state["wte.weight"].shape
        or not torch.equal(head.float(), state["wte.weight"])
    ):
        raise InputError(
            f"{path}: tensor 'lm_head.weight' differs from 'wte.weight'; GPT-2's head is its token embedding"
        )
    model.load_state_dict(state, assign=True)
    return model


def read_config(directory, dropout=None):
    """The Config of a checkpoint directory. Raises InputError naming the field that is not GPT-2's."""
    path = Path(directory) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sizes = {
            name: values[name]
            for name in ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions")
        }
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file; a checkpoint directory has config.json and model.safetensors"
        ) from error
    except KeyError as error:
        raise InputError(f"{path}: field {error} is missing; this is no GPT-2") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: can't be read as a JSON object ({error}); fetch it again"
        ) from error
    for name, size in sizes.items():
        most = 1_000 if name == "n_layer" else 1_000_000
        if type(size) is not int or not 0 < size <= most:
            raise InputError(
                f"{path}: field '{name}' must be a whole number above 0 and up to {most:,}, not {size!r}"
            )
    if sizes["n_embd"] % sizes["n_head"]:
        raise InputError(
            f"{path}: n_embd {sizes['n_embd']} can't be divided among n_head {sizes['n_head']}"
        )
    # What GPT-2 fixes and this code relies on
    fixed = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    for name, value in fixed.items():
        if values.get(name, value) != value:
            raise InputError(f"{path}: field '{name}' is {values[name]!r}; GPT-2 has {value!r}")
    if values.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        raise InputError(
            f"{path}: field 'n_inner' is {values['n_inner']!r}; GPT-2 has {4 * sizes['n_embd']}"
        )
    rate = values.get("resid_pdrop", 0.1) if dropout is None else dropout
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise InputError(
            f"{path}: field 'resid_pdrop' must be a rate from 0 to below 1, not {rate!r}"
        )
    return Config(**sizes, dropout=rate)


def _read_tensors(directory):
    path = directory / "model.safetensors"
    if path.is_file():
        try:
            return path, load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(
                f"{path}: is cut short or damaged ({error}); fetch it again"
            ) from error
    path = directory / "pytorch_model.bin"
    if not path.is_file():
        raise InputError(
            f"{directory / 'model.safetensors'}: no such file; a checkpoint directory has config.json and model.safetensors"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles fail in many ways
        raise InputError(
            f"{path}: is cut short, damaged, or holds more than tensors ({type(error).__name__}); fetch it again"
        ) from error
    plain = isinstance(state, dict) and all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    )
    if not plain or not all(
        v.layout == torch.strided and v.device.type == "cpu" for v in state.values()
    ):
        raise InputError(f"{path}: is no dictionary of tensors; GPT-2's weights by name are wanted")
    return path, state


def save(model, directory):
    """Write config.json and model.safetensors as Hugging Face does, each whole or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().float().cpu()
        state[name] = (tensor.T if name.endswith(TRANSPOSED) else tensor).contiguous()
    save_tensors(state, directory / "model.safetensors")
    c = model.config
    values = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_layer": c.n_layer,
        "n_embd": c.n_embd,
        "n_head": c.n_head,
        "vocab_size": c.vocab_size,
        "n_positions": c.n_positions,
        "n_ctx": c.n_positions,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": c.vocab_size - 1,
        "eos_token_id": c.vocab_size - 1,
    }
    text = json.dumps(values, indent=2) + "\n"
    _write(directory / "config.json", lambda partial: partial.write_text(text, encoding="utf-8"))


def save_tensors(tensors, path):
    """Write a safetensors file, whole or not at all."""
    _write(path, lambda partial: save_file(tensors, partial, metadata={"format": "pt"}))


def _write(path, write):
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: can't be written ({error}); make room on the disk, or choose another place"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
