"""The soft prompt P (PromptKD, section 3.2): trainable embeddings in front of a frozen teacher.
`python prompt.py RUN` shows what the tuned prompt of a run does."""

if __name__ == "__main__":
    import os.path
    import sys

    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # before another `data`
    import data.process.threads  # noqa: F401  (must precede torch: it sets how threads wait)

import torch


def prepend(P, model, ids):
    """The embeddings of ids (B, T) with the soft prompt P (prompt_length, C) before each row:
    (B, prompt_length + T, C). The prompt takes the positions from 0 on, and the tokens move right.
    All rows share P, so its gradient is the sum over rows."""
    x = model.wte(ids)  # (B, T, C)
    return torch.cat([P.to(x.dtype).expand(len(ids), -1, -1), x], dim=1)


def response_hidden(model, batch, P=None):
    """The hidden states (N, C) that predict a batch's N response tokens, and the head (V, C): for
    p(y | P, x), or for p(y | x) if P is None.

    batch: `ids` (B, T), and `response_positions`, the row and the position of N tokens, two tensors
    (N,). These are one to the left of the response tokens, because logits predict the next token.
    model: a GPT; without P also a wrapper, such as DDP, that has its `head`. Gradients reach the
    model's weights and P unless they are switched off. Dropout is as the model's mode says.
    """
    inputs, positions = batch.ids, batch.response_positions
    if P is not None:  # a GPT takes embeddings in place of ids
        rows, columns = positions
        inputs, positions = prepend(P, model, batch.ids), (rows, columns + len(P))
    return model(inputs, output_positions=positions), model.head


def freeze(teacher, dtype="float32"):
    """Make a teacher p: no gradients to its weights (they still pass through, to P), no dropout.

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
    Raises ValueError for another init, and if there are no text_tokens to repeat.
    """
    if init == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(length, embedding.shape[1], generator=generator)
    sources = {"text": text_tokens, "padding": [pad_token]}
    if not sources.get(init):
        raise ValueError(f"init {init!r} must be 'text' (with tokens), 'padding' or 'random'")
    tokens = [sources[init][i % len(sources[init])] for i in range(length)]
    return embedding.detach()[tokens].float().cpu()


if __name__ == "__main__":
    from data.process.command_line import run_command_line
    from data.runs.tuned_prompt import main

    run_command_line(main)
