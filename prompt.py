"""The soft prompt P (PromptKD, section 3.2): trainable embeddings in front of a frozen teacher."""

from pathlib import Path

import torch
from safetensors import SafetensorError

from data.cli import InputError
from data.tensors import load_tensors, save_tensors


def hidden_states(model, ids, P=None, output_positions=None):
    """Hidden states (B, S, C) of ids (B, S): for p(y | P, x), or for p(y | x) if P is None.

    P: (prompt_length, C), in front of every row at positions 0 to prompt_length - 1, so that ids
    move right; its own states are cut off. output_positions: two tensors (N,), rows and positions
    in ids; if given, only the states there are returned, (N, C). The model adds prompt_length to
    these positions, so they mean the same tokens with and without P.
    """
    hidden = model(ids, prefix=P, output_positions=output_positions)
    if P is None or output_positions is not None:
        return hidden
    return hidden[:, len(P) :]


@torch.no_grad()
def response_hidden(model, batch, P=None):
    """The hidden states (N, C) that predict a batch's N response tokens, and the head (V, C).

    No gradient and no dropout, also for the student's q in equation 1: there q is only a target.
    `batch.response_positions` are one to the left of the response tokens, as logits predict ahead.
    """
    model.eval()  # no dropout; train.student_backward switches the student back
    return hidden_states(model, batch.ids, P, batch.response_positions), model.wte.weight


def freeze(teacher, dtype="float32"):
    """Make a teacher p: no gradients to its weights, no dropout.

    In bfloat16 only the linear layers of the blocks are converted, which halves their memory.
    bfloat16 autocast would convert them at each use anyway, so no result changes. Embeddings, head
    and LayerNorm stay float32.
    """
    if dtype == "bfloat16":
        for module in teacher.modules():
            if isinstance(module, torch.nn.Linear):
                module.bfloat16()
    return teacher.eval().requires_grad_(False)


def initial_prompt(embedding, init, length, text_tokens, pad_token, seed):
    """The prompt before it is tuned: float32 (length, C).

    embedding: the teacher's token embedding (V, C). init is one of the three of Figure 4:
      "text"     the embeddings of text_tokens (paper: "Suppose you are a student.", 7 tokens), cut
                 or repeated to length
      "padding"  the embedding of pad_token (GPT-2's end-of-text), repeated to length
      "random"   standard normal numbers as in the released code; much larger than GPT-2's
                 embeddings
    """
    if init == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(length, embedding.shape[1], generator=generator)
    source = text_tokens if init == "text" else [pad_token]
    tokens = [source[i % len(source)] for i in range(length)]
    return embedding.detach()[tokens].float().cpu().clone()


def save_prompt(P, directory):
    """Write P (prompt_length, C) to `prompt.safetensors` in a checkpoint directory."""
    tensor = P.detach().float().cpu().contiguous()
    save_tensors({"prompt": tensor}, Path(directory) / "prompt.safetensors")


def load_prompt(path, width):
    """Read a soft prompt, float32 (prompt_length, C), from a file or from `prompt.safetensors` in a
    directory. width: the C of the model that it will be prepended to. Raises InputError if it does
    not fit or the file can't be read."""
    path = Path(path)
    if path.is_dir():
        path = path / "prompt.safetensors"
    hint = "a PromptKD run keeps its prompt in best/prompt.safetensors"
    try:
        P = load_tensors(path).get("prompt")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {hint}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: is truncated or damaged ({error}); {hint}") from error
    is_matrix = P is not None and P.ndim == 2 and len(P) > 0 and P.is_floating_point()
    if not is_matrix or not torch.isfinite(P).all():
        raise InputError(
            f"{path}: has no finite floating-point tensor 'prompt' of two dimensions; {hint}"
        )
    if P.shape[1] != width:
        raise InputError(
            f"{path}: tensor 'prompt' is {P.shape[1]} wide and the model {width}; "
            "use the teacher that it was tuned for"
        )
    return P.float()
