"""GPT-2 (Radford et al. 2019) in PyTorch, its key-value cache, and Hugging Face checkpoints.

Shapes: B rows, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import json
import math
import platform
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data.cli import InputError, read_json, write_atomic
from data.hub import weights_files
from data.tensors import read_tensors, save_tensors


@dataclass(frozen=True)
class Config:
    """GPT-2's sizes under Hugging Face's names. `dropout` is all three of its equal rates."""

    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    vocab_size: int = 50257
    n_positions: int = 1024
    dropout: float = 0.1


class GPT(nn.Module):
    """GPT-2. `forward` returns hidden states, `logits` the output of the head on some of them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # tokens, and the head
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)  # positions
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)

    def forward(self, ids, prefix=None, cache=None, output_positions=None):
        """Hidden states after the last LayerNorm, (B, prompt_length + T, C).

        ids: tokens (B, T), right-padded. A position attends only to those before it, so padding
        changes no real token's state.
        prefix: a soft prompt (prompt_length, C) in front of every row; None: prompt_length is 0.
        cache: a KVCache with the tokens before `ids`; the new tokens are added to it.
        output_positions: row and position in `ids` of N tokens, two tensors (N,). Then only their
        states are returned, (N, C), and the last layer's MLP skips all others. A last token beyond
        the model's positions is not read: it is only predicted.
        """
        prompt_length = 0 if prefix is None else len(prefix)
        if output_positions is not None:
            rows, columns = output_positions
            output_positions = (rows, columns + prompt_length)
            ids = ids[:, : self.config.n_positions - prompt_length]
        x = self.wte(ids)  # (B, T, C)
        if prefix is not None:
            # (B, prompt_length + T, C)
            x = torch.cat([prefix.to(x.dtype).expand(len(ids), -1, -1), x], dim=1)
        if cache is None:
            positions, mask = torch.arange(x.shape[1], device=ids.device), None
        else:
            positions, mask = cache.extend(x.shape[1])
        x = self.drop(x + self.wpe(positions))
        for layer, block in enumerate(self.h):
            x = block(x, mask, cache, layer, output_positions if block is self.h[-1] else None)
        return self.ln_f(x)

    def logits(self, hidden):
        """Hidden states (..., C) to float32 logits (..., V). The head is tied to `wte`.

        Position i sees tokens 0 to i, so its logits predict token i + 1.
        """
        return head_logits(hidden, self.wte.weight)

    def n_parameters(self):
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def init_weights(self, seed):
        """Weights before pre-training: normal with standard deviation 1 / √C. As in GPT-2, layers
        that add to the residual stream start smaller by the root of their number. GPT-2's own
        0.02 suits the width of XL; a narrow model that starts there never learns to copy."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                scale = math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 1
                std = self.config.n_embd**-0.5 / scale
                p.copy_(torch.empty_like(p, device="cpu").normal_(0.0, std, generator=generator))
            elif name.endswith("bias"):
                p.zero_()
        return self


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.ln_1 = nn.LayerNorm(C, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(C, eps=1e-5)
        self.mlp = nn.ModuleDict({"c_fc": Linear(C, 4 * C), "c_proj": Linear(4 * C, C)})
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, cache=None, layer=None, output_positions=None):
        x = x + self.drop(self.attn(self.ln_1(x), mask, cache, layer))  # (B, T, C)
        if output_positions is not None:
            x = x[output_positions]  # (N, C)
        h = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.drop(self.mlp["c_proj"](h))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, cache, layer):
        B, T, C = x.shape
        qkv = self.c_attn(x).split(C, dim=2)
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head) for y in qkv)  # (B, T, H, D)
        if cache is not None:
            k, v = cache.write(layer, k, v)  # (B, K, H, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T or K, D)
        # Without a cache the causal mask suffices: rows are right-padded, so padding comes after
        # every real token of its row.
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class KVCache:
    """Keys and values of rows being decoded, in memory of fixed size.

    Row b holds `lengths[b]` tokens from position 0 on. What is stored after them is masked and will
    be overwritten, so rows of different lengths share a batch without left padding.
    """

    def __init__(self, config, n_rows, max_seq_len, device, dtype):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, n_rows, max_seq_len, config.n_head, head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # (layers, B, K, H, D)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(n_rows, dtype=torch.long, device=device)  # (B,)
        # An upper bound of the lengths. It is a Python integer, so no step waits for the device.
        self.longest = 0

    @staticmethod
    def row_bytes(config, max_seq_len, dtype):
        """Bytes of one row, in "float32" or "bfloat16"."""
        return 2 * config.n_layer * max_seq_len * config.n_embd * getattr(torch, dtype).itemsize

    def extend(self, n_tokens):
        """Make room for `n_tokens` more in every row.

        Returns their positions (B, T) and the attention mask (B, 1, T, K).
        """
        device = self.lengths.device
        self.positions = self.lengths[:, None] + torch.arange(n_tokens, device=device)  # (B, T)
        self.rows = torch.arange(len(self.lengths), device=device)[:, None]  # (B, 1)
        self.lengths = self.lengths + n_tokens
        self.longest += n_tokens
        key_positions = torch.arange(self.longest, device=device)  # (K,)
        return self.positions, (key_positions <= self.positions[..., None])[:, None]

    def write(self, layer, k, v):
        """Store a layer's new keys and values (B, T, H, D). Returns all of them, (B, K, H, D)."""
        self.keys[layer][self.rows, self.positions] = k
        self.values[layer][self.rows, self.positions] = v
        return self.keys[layer, :, : self.longest], self.values[layer, :, : self.longest]

    def set_lengths(self, lengths):
        """Cut each row back to its own length (B,), after a right-padded batch was written."""
        self.lengths = lengths.clone()

    def select_rows(self, rows):
        """Keep only the rows of an index tensor."""
        for cache in (self.keys, self.values):
            for layer in cache:  # in place, so that only one layer is in memory twice
                layer[: len(rows)] = layer[rows]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        self.lengths = self.lengths[rows]


def precision(device, dtype):
    """The context of a forward pass whose blocks multiply matrices in "float32" or "bfloat16". The
    residual stream, LayerNorm and the logits are float32 in both cases."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def head_logits(hidden, head, padded=False, on_gpu=None):
    """Logits (..., V) of hidden states (..., C) under a head (V, C), float32 also inside autocast.

    GPT-2's logits share an offset of -35 to -112, where neighboring bfloat16 numbers are 0.25 to
    0.5 apart: in bfloat16 the differences between tokens would be lost. A GPU may round the inputs
    of the product to TF32, which costs each term 0.1 % of itself, whatever the offset.

    padded: on a CPU, append entries of probability 0 up to a multiple of 16, so that every row of
    logits is aligned in memory; hidden (N, C) -> (N, V'), without gradients.
    on_gpu: compute as on a GPU; by default if the tensors are on one.
    """
    on_gpu = hidden.is_cuda if on_gpu is None else on_gpu
    with torch.autocast(hidden.device.type, enabled=False):
        if on_gpu or not padded:
            return linear(hidden, head)
        V = len(head)
        logits = hidden.new_empty(len(hidden), math.ceil(V / 16) * 16)
        # Not -inf: log p - log q of two such entries would be NaN, and with -1e30 it is 0.
        logits[:, V:] = -1e30
        # Parts of the head that stay in the CPU's cache.
        for part, out in zip(head.split(1024), logits[:, :V].split(1024, dim=1)):
            torch.mm(hidden, part.T, out=out)
        return logits


# Only the next two functions use PyTorch's private oneDNN operators; elsewhere F.linear serves.
def linear(x, weight, bias=None):
    """F.linear, by the packed copy of the weight if there is one: x (..., I) -> (..., O)."""
    packed = getattr(weight, "packed", None)
    if packed is None:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@contextmanager
def packed_weights(*models):
    """Within this context, products on an x86 CPU use packed copies of the large float32 weights.

    oneDNN's layout for a few rows makes decoding up to three times as fast as F.linear, whose
    layout is for many rows. Inside autocast only the head is packed, whose product is float32 there
    too. The weights must not change within the context.
    """
    weights = [w for m in models for w in m.parameters() if w is not m.wpe.weight]
    if torch.is_autocast_enabled("cpu"):
        weights = [model.wte.weight for model in models]
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        weights = []
    weights = [w for w in weights if w.dtype == torch.float32 and not w.is_cuda]
    weights = [w for w in weights if w.ndim == 2 and w.numel() >= 2**18]
    try:
        for weight in weights:
            # 32 is the number of rows that oneDNN chooses the layout for, as of a batch being
            # decoded. The copy multiplies any number of rows.
            weight.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 32)
        yield
    finally:
        for weight in weights:
            weight.packed = None


# --- Hugging Face checkpoint directories ---

# Stored as (in, out), the transpose of nn.Linear.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Parts of tensor names that DDP and DeepSpeed, torch.compile, FSDP, TRL and transformers add.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
WRAPPERS |= {"pretrained_model", "transformer"}
# Why a model may have other tensors: TRL's value heads, reward models, adapters of peft.
ALONE = "save the language model alone: no value head or classifier, LoRA merged (merge_and_unload)"

# The sizes that config.json must have, with their limits.
MAX_SIZES = {"n_layer": 1_000, "n_embd": 10**6, "n_head": 10**6}
MAX_SIZES |= {"vocab_size": 10**6, "n_positions": 10**6}
# What GPT-2 fixes and this code relies on.
FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def check(condition, subject, problem):
    if not condition:
        raise InputError(f"{subject} {problem}")


def load(directory, dropout=None, vocab_size=None, device="cpu"):
    """The model of a Hugging Face GPT-2 directory, float32, loaded tensor by tensor.

    Reads config.json and the weights: one file or shards with an index, safetensors or pickles,
    tensor names with the prefixes of WRAPPERS, the buffers `attn.bias`, and `lm_head.weight`.
    dropout: replaces the configuration's own. vocab_size: how many rows of the token embedding to
    keep; by default all. Raises InputError with the file and the tensor.
    """
    stored = read_config(directory, dropout)
    config = stored if vocab_size is None else replace(stored, vocab_size=vocab_size)
    with torch.device("meta"):  # no memory and no random numbers: all weights are replaced
        model, expected = GPT(config), GPT(stored).state_dict()
    expected["lm_head.weight"] = expected["wte.weight"]
    state = {}
    for path, stored_name, tensor in read_tensors(directory):
        name = ".".join(part for part in stored_name.split(".") if part not in WRAPPERS)
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, stored as a buffer
        key, shape = f"{path}: tensor '{stored_name}'", tuple(tensor.shape)
        problem = f"is not part of a GPT-2 with {config.n_layer} layers"
        check(name in expected, key, f"{problem}; give the model's own config.json, and {ALONE}")
        check(name not in state, key, f"is stored twice; keep one tensor for '{name}'")
        check(tensor.is_floating_point(), key, f"is {tensor.dtype}; weights must be floating-point")
        if name.endswith(TRANSPOSED) and tensor.ndim == 2:
            tensor = tensor.T
        fits = tensor.shape == expected[name].shape
        check(fits, key, f"has shape {shape}, which does not fit config.json")
        if name in ("wte.weight", "lm_head.weight") and len(tensor) > config.vocab_size:
            tensor = tensor[: config.vocab_size].clone()  # frees the other rows
        state[name] = tensor.to(device).float().contiguous()
        problem = "has values that are not finite; the file is damaged or its training diverged"
        check(torch.isfinite(state[name]).all(), key, problem)
    path = weights_files(directory)[0]  # the index, if there are shards
    head = state.pop("lm_head.weight", None)
    for name in model.state_dict():
        check(name in state, f"{path}: tensor '{name}'", "is missing; fetch the weights again")
    tied = head is None or torch.equal(head, state["wte.weight"])
    key = f"{path}: tensor 'lm_head.weight'"
    check(tied, key, "differs from 'wte.weight'; GPT-2's head is its token embedding")
    model.load_state_dict(state, assign=True)
    return model


def read_config(directory, dropout=None):
    """The Config of a checkpoint directory. Raises InputError for a field that is not GPT-2's."""
    path = Path(directory) / "config.json"
    layout = "a checkpoint directory has config.json and model.safetensors"
    check(path.exists(), f"{path}:", f"no such file; {layout}")
    values = read_json(path, "fetch it again")
    for name, limit in MAX_SIZES.items():
        size = values.get(name)
        valid = type(size) is int and 1 <= size <= limit
        problem = f"must be an integer from 1 to {limit:,}, not {size!r}"
        check(valid, f"{path}: field '{name}'", problem)
    C, H = values["n_embd"], values["n_head"]
    check(C % H == 0, f"{path}:", f"n_embd {C} can't be divided among n_head {H}")
    for name, value in (FIXED | {"n_inner": 4 * C}).items():
        found = values.get(name, value)
        valid = found == value or (name == "n_inner" and found is None)
        check(valid, f"{path}: field '{name}'", f"is {found!r}; GPT-2 has {value!r}")
    rate = values.get("resid_pdrop", 0.1) if dropout is None else dropout
    valid = isinstance(rate, int | float) and 0 <= rate < 1
    check(valid, f"{path}: field 'resid_pdrop'", f"must be a rate from 0 to below 1, not {rate!r}")
    return Config(**{name: values[name] for name in MAX_SIZES}, dropout=rate)


def save(model, directory, eos_token_id=None):
    """Write model.safetensors and config.json as Hugging Face does, each atomically.

    eos_token_id: the id of the tokenizer's end-of-text; by default the last one.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().float().cpu()
        state[name] = (tensor.T if name.endswith(TRANSPOSED) else tensor).contiguous()
    save_tensors(state, Path(directory) / "model.safetensors")
    sizes = asdict(model.config)
    dropout = sizes.pop("dropout")
    eos_token_id = sizes["vocab_size"] - 1 if eos_token_id is None else eos_token_id
    values = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        **sizes,
        "n_ctx": sizes["n_positions"],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), eos_token_id),
    }
    write_atomic(Path(directory) / "config.json", json.dumps(values, indent=2) + "\n")
