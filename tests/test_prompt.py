"""The soft prompt: its three initialisations, a frozen teacher behind it, and its file."""

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

from data.cli import InputError
from data.rows import pad
from data.tokenizer import load_tokenizer
from losses import kl
from prompt import freeze, initial_prompt, load_prompt, save_prompt, teacher_hidden

WORDS, PAD = [11, 7, 30, 7, 2], 60
ROWS = [[5, 17, 60, 3, 8], [22], [9, 60, 1, 30, 12, 55, 2]]


@pytest.fixture
def teacher():
    return freeze(tiny_model())


def initial(init, length, seed=10, embedding=None):
    embedding = stored_weights(TINY)["wte.weight"] if embedding is None else embedding
    return initial_prompt(embedding, init, length, WORDS, PAD, seed)


# ---- initialisation ----------------------------------------------------------------------------------------------------------


def test_the_papers_sentence_is_seven_tokens_of_gpt2(shared, tmp_path):
    for name, file in [("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")]:
        (tmp_path / name).symlink_to(shared / "gpt2-bpe" / file)
    tokenizer = load_tokenizer(tmp_path)
    tokens = tokenizer.encode_ordinary("Suppose you are a student.")
    assert [tokenizer.decode([token]) for token in tokens] == [
        "Supp",
        "ose",
        " you",
        " are",
        " a",
        " student",
        ".",
    ]
    embedding = torch.arange(tokenizer.n_vocab * 2.0).view(-1, 2)
    P = initial_prompt(embedding, "text", len(tokens), tokens, tokenizer.eot_token, seed=10)
    assert P.shape == (7, 2) and torch.equal(P[:, 0], 2.0 * torch.tensor(tokens))


@pytest.mark.parametrize(
    "length, tokens", [(5, WORDS), (3, [11, 7, 30]), (8, [11, 7, 30, 7, 2, 11, 7, 30]), (1, [11])]
)
def test_text_is_cut_or_repeated_to_the_length(length, tokens):
    assert torch.equal(initial("text", length), stored_weights(TINY)["wte.weight"][tokens])


def test_padding_is_the_end_of_text_repeated():
    assert torch.equal(initial("padding", 4), stored_weights(TINY)["wte.weight"][PAD].expand(4, -1))


def test_random_is_standard_normal_and_hangs_on_the_seed_alone():
    embedding = torch.zeros(10, 500)
    P = initial("random", 100, embedding=embedding)
    assert P.shape == (100, 500)
    assert abs(P.mean()) < 0.02 and abs(P.std() - 1) < 0.02 and abs((P**4).mean() - 3) < 0.2
    torch.manual_seed(99)
    assert torch.equal(P, initial("random", 100, embedding=embedding))
    assert not torch.equal(P, initial("random", 100, seed=11, embedding=embedding))


@pytest.mark.parametrize("init", ["text", "padding", "random"])
def test_a_prompt_is_float32_of_its_own(init):
    embedding = torch.nn.Parameter(stored_weights(TINY)["wte.weight"].bfloat16())
    before = embedding.detach().clone()
    P = initial(init, 6, embedding=embedding)
    assert P.dtype == torch.float32 and not P.requires_grad and P.shape == (6, 32)
    P += 1
    assert torch.equal(embedding.detach(), before)


# ---- a frozen teacher behind it ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_text_prompt_is_the_same_as_its_tokens_in_front(teacher):
    ids, lengths = pad(ROWS, "cpu")
    hidden = teacher_hidden(teacher, ids, initial("text", 5))
    assert hidden.shape == teacher_hidden(teacher, ids).shape == (3, 7, 32)
    for b, (row, n) in enumerate(zip(ROWS, lengths)):
        torch.testing.assert_close(
            hidden[b, :n], teacher(torch.tensor([[*WORDS, *row]]))[0, 5:], atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_bare_and_prompted_teacher_line_up_with_transformers(teacher):
    hf, (ids, _) = transformers_model(), pad(ROWS, "cpu")
    for P in [None, soft_prompt(4)]:
        logits = teacher.logits(teacher_hidden(teacher, ids, P))
        for b, row in enumerate(ROWS):
            torch.testing.assert_close(
                logits[b, : len(row)], transformers_logits(hf, row, P), atol=1e-4, rtol=0
            )


def test_the_gradient_reaches_the_prompt_and_not_the_teacher(teacher):
    P = torch.nn.Parameter(soft_prompt(3))
    ids, _ = pad(ROWS, "cpu")
    teacher.logits(teacher_hidden(teacher, ids, P)).logsumexp(-1).sum().backward()
    assert (P.grad.abs().amax(1) > 1e-3).all()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_the_prompts_gradient_is_the_slope_of_the_loss():
    teacher = freeze(tiny_model().double())
    ids, P, direction = (
        torch.tensor([ROWS[2]]),
        soft_prompt(3).double().requires_grad_(),
        soft_prompt(3).double().flip(0),
    )

    def loss(P):
        return kl_64(
            teacher.logits(teacher_hidden(teacher, ids, P)),
            teacher.logits(teacher_hidden(teacher, ids)),
        )

    loss(P).backward()
    with torch.no_grad():
        slope = (loss(P + 1e-5 * direction) - loss(P - 1e-5 * direction)) / 2e-5
    assert (P.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)
    assert abs(slope) > 1e-2


def kl_64(first, second):
    """KL(first || second), summed, in float64."""
    first, second = first.log_softmax(-1), second.log_softmax(-1)
    return (first.exp() * (first - second)).sum()


@torch.no_grad()
def test_a_prompt_changes_what_the_teacher_says(teacher):
    ids = torch.tensor([ROWS[2]])
    bare = teacher.logits(teacher_hidden(teacher, ids))[0]
    assert kl(teacher.logits(teacher_hidden(teacher, ids, soft_prompt(3)))[0], bare).max() > 0.1
    assert kl(teacher.logits(teacher_hidden(teacher, ids))[0], bare).abs().max() == 0


@torch.no_grad()
def test_a_frozen_teacher_has_no_dropout():
    teacher = freeze(tiny_model(replace(TINY, dropout=0.5)).train())
    ids = torch.tensor([ROWS[2]])
    assert torch.equal(
        teacher_hidden(teacher, ids, soft_prompt(3)),
        teacher_hidden(tiny_model(), ids, soft_prompt(3)),
    )


# ---- its file ----------------------------------------------------------------------------------------------------------------


def test_a_saved_prompt_reads_back_bit_for_bit(tmp_path):
    P = torch.nn.Parameter(soft_prompt(7))
    save_prompt(P, tmp_path)
    assert os.listdir(tmp_path) == ["prompt.safetensors"]
    for path in [tmp_path, tmp_path / "prompt.safetensors", str(tmp_path)]:
        loaded = load_prompt(path, width=32)
        assert torch.equal(loaded, P) and not loaded.requires_grad


def prompt_file(**tensors):
    return lambda path: save_file(tensors, path)


DAMAGES = {
    "no file": (Path.unlink, "no such file"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-10]), "cut short or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "cut short or damaged"),
    "another tensor": (prompt_file(P=torch.ones(7, 32)), "'prompt'"),
    "one dimension": (prompt_file(prompt=torch.ones(32)), "'prompt'"),
    "no rows": (prompt_file(prompt=torch.ones(0, 32)), "'prompt'"),
    "integers": (prompt_file(prompt=torch.ones(7, 32, dtype=torch.long)), "'prompt'"),
    "NaN": (prompt_file(prompt=torch.full((7, 32), float("nan"))), "finite"),
    "another width": (
        prompt_file(prompt=torch.ones(7, 48)),
        "'prompt' is 48 wide and the model 32",
    ),
}


@pytest.mark.parametrize("damage, words", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_prompt_file_that_is_wrong_gives_one_line_that_names_it(tmp_path, damage, words):
    save_prompt(soft_prompt(7), tmp_path)
    path = tmp_path / "prompt.safetensors"
    damage(path)
    with pytest.raises(InputError) as caught:
        load_prompt(tmp_path, width=32)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and words in message and "\n" not in message
