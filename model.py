"""GPT-2 (Radford et al. 2019) in PyTorch, its key-value cache, and how its official weights are
stored.

Shapes: B rows, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn


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
        if config.n_embd % config.n_head:
            sizes = f"n_embd {config.n_embd}, n_head {config.n_head}"
            raise ValueError(f"{sizes}: the width can't be divided among the heads")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # tokens, and the head
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)  # positions
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)

    def forward(self, inputs, cache=None, output_positions=None):
        """Hidden states after the last LayerNorm, (B, T, C).

        inputs: token ids (B, T), right-padded, or their embeddings (B, T, C), to put other vectors
        among them. A position attends only to those before it, so padding changes no real token's
        state.
        cache: a KVCache with the tokens before `inputs`; the new tokens are added to it.
        output_positions: row and position of N inputs, two tensors (N,). Then only their states
        are returned, (N, C), and the last layer's MLP skips all others. A last token beyond the
        model's positions is not read: it is only predicted.
        """
        n_positions = self.config.n_positions
        if inputs.shape[1] > n_positions + (output_positions is not None):
            raise ValueError(f"{inputs.shape[1]} tokens exceed the model's {n_positions} positions")
        if output_positions is not None:
            inputs = inputs[:, :n_positions]
        x = inputs if inputs.is_floating_point() else self.wte(inputs)  # (B, T, C)
        if cache is None:
            positions, mask = torch.arange(x.shape[1], device=x.device), None
        else:
            positions, mask = cache.extend(x.shape[1])
        x = self.drop(x + self.wpe(positions))
        for layer, block in enumerate(self.h):
            x = block(x, mask, cache, layer, output_positions if block is self.h[-1] else None)
        return self.ln_f(x)

    @property
    def head(self):
        """The output layer's weight (V, C): the token embedding, to which it is tied."""
        return self.wte.weight

    def logits(self, hidden):
        """Hidden states (..., C) to float32 logits (..., V).

        Position i sees tokens 0 to i, so its logits predict token i + 1.
        """
        return head_logits(hidden, self.head)

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
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})
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
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, cache, layer):
        B, T, C = x.shape
        qkv = self.c_attn(x).split(C, dim=2)
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head) for y in qkv)  # (B, T, H, D)
        if cache is not None:
            k, v = cache.write(layer, k, v)  # (B, K, H, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T or K, D)
        # Without a cache the causal mask suffices: a row's padding comes after all its real tokens.
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
        )
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


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
        self.longest = 0  # an upper bound of the lengths, on the host: no step waits for the device

    @staticmethod
    def row_bytes(config, max_seq_len, dtype):
        """Bytes of one row, in "float32" or "bfloat16"."""
        return 2 * config.n_layer * max_seq_len * config.n_embd * getattr(torch, dtype).itemsize

    def extend(self, n_tokens):
        """Make room for `n_tokens` more in every row. Returns their positions (B, T) and the mask
        (B, 1, T, K) that attention adds to its scores: 0, or -inf for a key that comes later. It is
        in the cache's dtype, so that no layer has to convert it."""
        device = self.lengths.device
        self.positions = self.lengths[:, None] + torch.arange(n_tokens, device=device)  # (B, T)
        self.rows = torch.arange(len(self.lengths), device=device)[:, None]  # (B, 1)
        self.lengths = self.lengths + n_tokens
        self.longest += n_tokens
        # A GPU's attention reads rows of a multiple of 8 keys, and would copy any others.
        key_positions = torch.arange(math.ceil(self.longest / 8) * 8, device=device)
        is_later = key_positions > self.positions[..., None]  # (B, T, K rounded up)
        mask = torch.zeros_like(is_later, dtype=self.keys.dtype).masked_fill_(is_later, -torch.inf)
        return self.positions, mask[:, None, :, : self.longest]

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
    if dtype == "float32":
        return no_autocast(device)
    return torch.autocast(device.type, torch.bfloat16)


def no_autocast(device):
    """A context in which autocast is off. Some devices, such as meta, have none."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def head_logits(hidden, head):
    """Logits (..., V) of hidden states (..., C) under a head (V, C): float32 products, also inside
    autocast and for tensors in bfloat16.

    GPT-2's logits share an offset of -35 to -112, where neighboring bfloat16 numbers are 0.25 to
    0.5 apart: in bfloat16 the differences between tokens would be lost. A GPU may round the inputs
    of the product to TF32, which costs each term 0.1 % of itself, whatever the offset.
    """
    with no_autocast(hidden.device):
        return F.linear(hidden.float(), head.float())


# --- The official weights, as Hugging Face stores them ---

# Stored as (in, out), the transpose of nn.Linear.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Parts of tensor names that DDP and DeepSpeed, torch.compile, FSDP, TRL and transformers add.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
WRAPPERS |= {"pretrained_model", "transformer"}
# Why a model may have other tensors: TRL's value heads, reward models, adapters of peft.
ALONE = "save the language model alone: no value head or classifier, LoRA merged (merge_and_unload)"


def from_stored(tensors, config, vocab_size=None, device="cpu"):
    """A GPT with stored weights: all tensors of a checkpoint (see `convert_stored`)."""
    return from_state(convert_stored(tensors, config, vocab_size, device), config)


def convert_stored(tensors, config, vocab_size=None, device="cpu"):
    """Stored tensors, all or some, as float32 tensors under the names of `GPT.state_dict`.

    tensors: {stored name: tensor}, emptied on the way so that nothing is in memory twice. Names may
    have prefixes (WRAPPERS), matrices are transposed, the buffers of the causal mask are left out;
    `lm_head.weight`, the same as `wte.weight`, keeps its name. vocab_size: how many rows of the
    token embedding to keep; by default all. Raises ValueError, naming the tensor, if one is not
    GPT-2's, does not fit `config`, or has values that are not finite.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    shapes["lm_head.weight"] = shapes["wte.weight"]
    state = {}
    for stored_name in list(tensors):
        tensor = tensors.pop(stored_name)
        name = ".".join(part for part in stored_name.split(".") if part not in WRAPPERS)
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, stored as a buffer
        shape = tuple(tensor.shape)
        if name.endswith(TRANSPOSED) and tensor.ndim == 2:
            tensor = tensor.T
        problem = None
        if name not in shapes:
            problem = f"is not part of a GPT-2 with {config.n_layer} layers; "
            problem += f"give the model's own config.json, and {ALONE}"
        elif name in state:
            problem = f"is stored twice; keep one tensor for '{name}'"
        elif not tensor.is_floating_point():
            problem = f"is {tensor.dtype}; weights must be floating-point"
        elif tensor.shape != shapes[name]:
            problem = f"has shape {shape}, which does not fit config.json"
        if problem is None:
            if name in ("wte.weight", "lm_head.weight") and vocab_size is not None:
                tensor = tensor[:vocab_size].clone()  # frees the other rows
            state[name] = tensor.to(device).float().contiguous()
            if not torch.isfinite(state[name]).all():
                problem = "has values that are not finite; "
                problem += "the file is damaged or its training diverged"
        if problem is not None:
            raise ValueError(f"tensor '{stored_name}' {problem}")
    return state


def from_state(state, config):
    """A GPT with the weights that `convert_stored` returns; it takes these tensors themselves.
    Raises ValueError if one is missing, or if `lm_head.weight` differs from `wte.weight`."""
    vocab_size = len(state.get("wte.weight", range(config.vocab_size)))
    with torch.device("meta"):  # no memory and no random numbers: all weights are replaced
        model = GPT(replace(config, vocab_size=vocab_size))
    head = state.get("lm_head.weight")
    for name in model.state_dict():
        if name not in state:
            raise ValueError(f"tensor '{name}' is missing; fetch the weights again")
    if head is not None and not torch.equal(head, state["wte.weight"]):
        problem = "differs from 'wte.weight'; GPT-2's head is its token embedding"
        raise ValueError(f"tensor 'lm_head.weight' {problem}")
    model.load_state_dict({name: state[name] for name in model.state_dict()}, assign=True)
    return model


def to_stored(model):
    """The weights of a GPT under their stored names and in the stored form, float32 on the CPU.
    They may share memory with the model's own."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().float().cpu()
        tensors[name] = (tensor.T if name.endswith(TRANSPOSED) else tensor).contiguous()
    return tensors
