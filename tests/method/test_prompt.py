"""The soft prompt: its initialisations, a frozen teacher with a prompt, and its file."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    TINY,
    soft_prompt,
    stored_weights,
    tiny_model,
    transformers_logits,
    transformers_model,
)
from safetensors.torch import save_file

from data.models.prompts import load_prompt, save_prompt
from data.models.tokenizer import load_tokenizer
from data.process.errors import InputError
from data.sets.rows import Example, make_batch
from losses import kl
from prompt import freeze, initial_prompt, prepend, response_hidden
from sample import pad

TEXT_TOKENS, PAD_TOKEN = [11, 7, 30, 7, 2], 60
ROWS = [[5, 17, 60, 3, 8], [22], [9, 60, 1, 30, 12, 55, 2]]
WTE = stored_weights(TINY)["wte.weight"]


@pytest.fixture
def teacher():
    return freeze(tiny_model())


def initial(init, length, seed=10, embedding=WTE, text_tokens=TEXT_TOKENS):
    return initial_prompt(embedding, init, length, text_tokens, PAD_TOKEN, seed)


def hidden_after(P, model, ids):
    """Hidden states (B, T, C) of ids (B, T), with the prompt P before each row if there is one."""
    return model(ids) if P is None else model(prepend(P, model, ids))[:, len(P) :]


# --- Initialisation ---


def test_the_prompt_of_the_paper_is_seven_tokens_of_gpt2(shared, tmp_path):
    for name, file in [("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")]:
        (tmp_path / name).symlink_to(shared / "gpt2-bpe" / file)
    tokenizer = load_tokenizer(tmp_path)
    tokens = tokenizer.encode_ordinary("Suppose you are a student.")
    pieces = [tokenizer.decode([token]) for token in tokens]
    assert pieces == ["Supp", "ose", " you", " are", " a", " student", "."]
    embedding = torch.arange(tokenizer.n_vocab * 2.0).view(-1, 2)
    P = initial_prompt(embedding, "text", len(tokens), tokens, tokenizer.eot_token, seed=10)
    assert P.shape == (7, 2)
    assert torch.equal(P[:, 0], 2.0 * torch.tensor(tokens))


@pytest.mark.parametrize(
    "init, length, tokens",
    [
        ("text", 5, TEXT_TOKENS),
        ("text", 3, [11, 7, 30]),
        ("text", 8, [11, 7, 30, 7, 2, 11, 7, 30]),
        ("text", 1, [11]),
        ("padding", 4, [PAD_TOKEN] * 4),
    ],
)
def test_text_is_cut_or_repeated_to_the_length_and_padding_is_repeated(init, length, tokens):
    assert torch.equal(initial(init, length), WTE[tokens])


def test_random_is_standard_normal_and_depends_only_on_the_seed():
    embedding = torch.zeros(10, 500)
    P = initial("random", 100, embedding=embedding)
    assert P.shape == (100, 500)
    assert abs(P.mean()) < 0.02
    assert abs(P.std() - 1) < 0.02
    assert abs((P**4).mean() - 3) < 0.2
    torch.manual_seed(99)
    assert torch.equal(P, initial("random", 100, embedding=embedding))
    assert not torch.equal(P, initial("random", 100, seed=11, embedding=embedding))


@pytest.mark.parametrize("init", ["text", "padding", "random"])
def test_a_prompt_is_float32_and_a_copy(init):
    embedding = torch.nn.Parameter(WTE.bfloat16())
    before = embedding.detach().clone()
    P = initial(init, 6, embedding=embedding)
    assert P.dtype == torch.float32
    assert P.shape == (6, 32)
    assert not P.requires_grad
    P += 1
    assert torch.equal(embedding.detach(), before)


@pytest.mark.parametrize("init, tokens", [("zeros", TEXT_TOKENS), ("", TEXT_TOKENS), ("text", [])])
def test_an_unknown_init_and_an_empty_text_are_value_errors(init, tokens):
    with pytest.raises(ValueError, match=f"init {init!r} must be 'text'"):
        initial(init, 3, text_tokens=tokens)


# --- A frozen teacher ---


@torch.no_grad()
def test_a_text_prompt_equals_its_tokens_in_front(teacher):
    ids, lengths = pad(ROWS, "cpu")
    hidden = hidden_after(initial("text", 5), teacher, ids)
    assert hidden.shape == teacher(ids).shape == (3, 7, 32)
    for b, (row, n) in enumerate(zip(ROWS, lengths)):
        expected = teacher(torch.tensor([[*TEXT_TOKENS, *row]]))[0, 5:]
        torch.testing.assert_close(hidden[b, :n], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("P", [None, soft_prompt(4)], ids=["bare", "prompted"])
@torch.no_grad()
def test_logits_of_the_teacher_match_transformers(teacher, P):
    hf, (ids, _) = transformers_model(), pad(ROWS, "cpu")
    logits = teacher.logits(hidden_after(P, teacher, ids))
    for b, row in enumerate(ROWS):
        expected = transformers_logits(hf, row, P)
        torch.testing.assert_close(logits[b, : len(row)], expected, atol=1e-4, rtol=0)


def test_the_gradient_reaches_the_prompt_and_not_the_teacher(teacher):
    P = torch.nn.Parameter(soft_prompt(3))
    ids, _ = pad(ROWS, "cpu")
    teacher.logits(hidden_after(P, teacher, ids)).logsumexp(-1).sum().backward()
    assert (P.grad.abs().amax(1) > 1e-3).all()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_the_gradient_of_the_prompt_matches_a_finite_difference():
    teacher = freeze(tiny_model().double())
    ids = torch.tensor([ROWS[2]])
    P = soft_prompt(3).double().requires_grad_()
    direction = soft_prompt(3).double().flip(0)

    def loss(P):
        """KL(prompted || bare), in float64. `GPT.logits` would be float32."""
        prompted = (hidden_after(P, teacher, ids) @ teacher.head.T).log_softmax(-1)
        bare = (teacher(ids) @ teacher.head.T).log_softmax(-1)
        return (prompted.exp() * (prompted - bare)).sum()

    loss(P).backward()
    with torch.no_grad():
        slope = (loss(P + 1e-5 * direction) - loss(P - 1e-5 * direction)) / 2e-5
    assert (P.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)
    assert abs(slope) > 1e-2


@torch.no_grad()
def test_a_prompt_changes_the_distributions_of_the_teacher(teacher):
    ids = torch.tensor([ROWS[2]])
    bare, again, prompted = (
        teacher.logits(hidden_after(P, teacher, ids))[0] for P in (None, None, soft_prompt(3))
    )
    assert kl(prompted, bare).max() > 0.1
    assert kl(again, bare).abs().max() == 0


@torch.no_grad()
def test_a_frozen_teacher_has_no_dropout():
    teacher = freeze(tiny_model(replace(TINY, dropout=0.5)).train())
    ids, P = torch.tensor([ROWS[2]]), soft_prompt(3)
    assert torch.equal(hidden_after(P, teacher, ids), hidden_after(P, tiny_model(), ids))


# --- The hidden states of response tokens ---

BATCH = make_batch([Example(0, row[:2], row[2:]) for row in (ROWS[0], ROWS[2])], "cpu")
with_and_without_prompt = pytest.mark.parametrize(
    "P", [None, soft_prompt(4)], ids=["bare", "prompted"]
)


@with_and_without_prompt
@torch.no_grad()
def test_response_hidden_is_one_to_the_left_of_each_response_token(teacher, P):
    hidden, head = response_hidden(teacher, BATCH, P)
    rows = [hidden_after(P, teacher, torch.tensor([row]))[0, 1:-1] for row in (ROWS[0], ROWS[2])]
    torch.testing.assert_close(hidden, torch.cat(rows), atol=1e-5, rtol=0)  # (N, C)
    assert torch.equal(head, teacher.wte.weight)


@with_and_without_prompt
@pytest.mark.parametrize("training", [False, True])
def test_response_hidden_leaves_mode_and_gradients_to_its_caller(P, training):
    """Dropout is on in training mode only. Gradients reach weights and prompt unless they are off
    at the call."""
    model = tiny_model(replace(TINY, dropout=0.5)).train(training)
    P = None if P is None else P.clone().requires_grad_()
    torch.manual_seed(1)
    hidden, _ = response_hidden(model, BATCH, P)
    assert all(module.training == training for module in model.modules())
    assert torch.equal(hidden, response_hidden(model, BATCH, P)[0]) != training
    hidden.sum().backward()
    inputs = [model.wte.weight] if P is None else [model.wte.weight, P]
    assert all(x.grad.abs().max() > 0 for x in inputs)
    with torch.no_grad():
        assert not response_hidden(model, BATCH, P)[0].requires_grad


# --- The file ---


def test_a_saved_prompt_loads_bit_for_bit(tmp_path):
    P = torch.nn.Parameter(soft_prompt(7))
    save_prompt(P, tmp_path)
    assert os.listdir(tmp_path) == ["prompt.safetensors"]
    for path in [tmp_path, tmp_path / "prompt.safetensors", str(tmp_path)]:
        loaded = load_prompt(path, width=32)
        assert torch.equal(loaded, P)
        assert not loaded.requires_grad


def prompt_file(**tensors):
    def write(path):
        save_file(tensors, path)

    return write


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "damage, message",
    [
        pytest.param(Path.unlink, "no such file", id="no file"),
        pytest.param(truncate, "truncated or damaged", id="truncated"),
        pytest.param(empty, "truncated or damaged", id="empty"),
        pytest.param(prompt_file(P=torch.ones(7, 32)), "'prompt'", id="another tensor"),
        pytest.param(prompt_file(prompt=torch.ones(32)), "'prompt'", id="one dimension"),
        pytest.param(prompt_file(prompt=torch.ones(0, 32)), "'prompt'", id="no rows"),
        pytest.param(prompt_file(prompt=torch.ones(7, 32).long()), "'prompt'", id="integers"),
        pytest.param(prompt_file(prompt=torch.full((7, 32), torch.nan)), "finite", id="NaN"),
        pytest.param(
            prompt_file(prompt=torch.ones(7, 48)),
            "'prompt' is 48 wide and the model 32",
            id="another width",
        ),
    ],
)
def test_a_wrong_prompt_file_gives_one_line_with_its_path(tmp_path, damage, message):
    save_prompt(soft_prompt(7), tmp_path)
    path = tmp_path / "prompt.safetensors"
    damage(path)
    with pytest.raises(InputError) as caught:
        load_prompt(tmp_path, width=32)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text
