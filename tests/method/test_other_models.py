"""docs/other_models.md: its block on small random Llamas equals the plain form, in which the models
themselves make all logits."""

import pytest
import torch
from helpers import ROOT
from test_style import code_blocks

from prompt import freeze

[BLOCK] = code_blocks(ROOT / "docs" / "other_models.md", "python")
REQUESTS, EOS, N_VOCAB, LAM = [[5, 6, 7, 8], [9, 10]], 2, 97, 0.25


@pytest.fixture(scope="module")
def page():
    """The names that the block defines."""
    names = {}
    exec(BLOCK, names)
    return names


def make_llama(width, is_tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=N_VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=is_tied,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return transformers.LlamaForCausalLM(config)


def kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def test_the_block_has_at_most_60_lines():
    assert len(BLOCK.splitlines()) <= 60


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_step_on_llamas_of_different_widths_equals_the_plain_form(page, is_tied, monkeypatch):
    torch.manual_seed(0)
    q, p = make_llama(16, is_tied), freeze(make_llama(32, is_tied))
    P = (0.3 * torch.randn(3, 32)).requires_grad_()
    batch = page["make_batch"](q, REQUESTS, EOS, max_new_tokens=6)
    for x, row in zip(REQUESTS, batch.ids.tolist(), strict=True):
        assert row[: len(x)] == x
    rows, columns = batch.response_positions
    assert batch.n_tokens == len(rows) > 6

    def log_probs(model, P=None):
        x = model.get_input_embeddings()(batch.ids)
        x = x if P is None else torch.cat([P.expand(len(x), -1, -1), x], dim=1)
        n = 0 if P is None else len(P)
        return model(inputs_embeds=x).logits[rows, columns + n].log_softmax(-1)

    prompted, student, bare = log_probs(p, P), log_probs(q), log_probs(p)
    L_P = (kl(prompted, student.detach()) + LAM * kl(prompted, bare)).mean()
    [P_grad] = torch.autograd.grad(L_P, [P])
    q_grads = torch.autograd.grad(kl(student, prompted.detach()).mean(), list(q.parameters()))
    # Steps so small that they change nothing, and gradients that are not clipped
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, max_norm: None)
    optimizers = (torch.optim.SGD(parameters, 1e-30) for parameters in (q.parameters(), [P]))
    page["promptkd_step"](q, p, P, batch, LAM, *optimizers)
    torch.testing.assert_close(P.grad, P_grad, rtol=1e-5, atol=1e-6)
    for parameter, expected in zip(q.parameters(), q_grads, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6)
    assert P_grad.abs().max() > 0.1 and all(parameter.grad is None for parameter in p.parameters())
