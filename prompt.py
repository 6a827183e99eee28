"""The soft prompt P (PromptKD, section 3.2): a few trainable embeddings in front of a frozen teacher."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data.cli import InputError
from model import save_tensors


def initial_prompt(embedding, init, length, text_tokens, pad_token, seed):
    """The prompt before it is tuned, float32 (P, C).

    embedding: the teacher's token embedding (V, C). init, one of the three of Figure 4:
      "text"     the embeddings of `text_tokens`, cut or repeated to `length`
      "padding"  the embedding of `pad_token` (GPT-2's end-of-text), `length` times
      "random"   standard normal, large beside GPT-2's embeddings, as in the released code
    """
    if init == "random":
        return torch.randn(
            length, embedding.shape[1], generator=torch.Generator().manual_seed(seed)
        )
    tokens = (
        [text_tokens[i % len(text_tokens)] for i in range(length)]
        if init == "text"
        else [pad_token] * length
    )
    return embedding.detach()[tokens].float().cpu().clone()


def freeze(teacher, dtype="float32"):
    """The teacher p: no gradients to its weights, no dropout. In bfloat16 the matrices of its blocks take half the memory, and are what
    autocast would make of them at each use; embeddings, head and LayerNorm stay float32."""
    for module in teacher.modules():
        if isinstance(module, torch.nn.Linear) and dtype == "bfloat16":
            module.bfloat16()
    return teacher.eval().requires_grad_(False)


def teacher_hidden(teacher, ids, P=None, output_positions=None):
    """The teacher's hidden states for p(y | P, x), or for p(y | x) without a prompt.

    ids (B, T), P (P, C) -> (B, T, C): the prompt's own positions are cut off, so both forms line up token by token. With `where`,
    row and place of N tokens of ids, theirs alone, (N, C).
    """
    hidden = teacher(ids, prefix=P, output_positions=output_positions)
    return hidden if P is None or output_positions is not None else hidden[:, len(P) :]


def save_prompt(P, directory):
    """Write P (P, C) as `prompt.safetensors` in a checkpoint directory."""
    save_tensors(
        {"prompt": P.detach().float().cpu().contiguous()}, Path(directory) / "prompt.safetensors"
    )


def load_prompt(path, width):
    """Read a soft prompt (P, C) from a file, or from `prompt.safetensors` in a directory.

    width: the C of the model that it is to stand before. Raises InputError where it does not fit or can't be read.
    """
    path, output_positions = (
        Path(path),
        "a PromptKD run keeps its prompt in best/prompt.safetensors",
    )
    path = path / "prompt.safetensors" if path.is_dir() else path
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {output_positions}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: is cut short or damaged ({error}); {output_positions}"
        ) from error
    P = tensors.get("prompt")
    if (
        P is None
        or P.ndim != 2
        or len(P) == 0
        or not P.is_floating_point()
        or not torch.isfinite(P).all()
    ):
        raise InputError(
            f"{path}: has no finite floating-point tensor 'prompt' of two dimensions; {output_positions}"
        )
    if P.shape[1] != width:
        raise InputError(
            f"{path}: tensor 'prompt' is {P.shape[1]} wide and the model {width}; take the teacher that it was tuned for"
        )
    return P.float()
