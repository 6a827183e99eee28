"""Sampling: every option against a plain computation in NumPy, row by row; files of responses; and
the command."""

import io
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import (
    GOLDEN,
    TINY,
    after_device,
    error_of,
    fork_ranks,
    greedy_by_transformers,
    run_command,
    soft_prompt,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    transformers_model,
    wait_for,
    write_checkpoint,
    write_rows,
)

from data.models import sampling
from data.models.sampling import decode_response, main, sample_all, sample_to_file
from data.models.tensors import save_prompt
from data.process import dist
from data.process.command_line import run_command_line
from data.sets.rows import fill_template, read_rows
from prompt import prepend
from sample import ban_repeated_ngrams, pad, row_uniforms, sample, sample_next_token

# So few vocabulary entries that responses finish and n-grams repeat.
SMALL = replace(TINY, vocab_size=12, n_positions=64)
EOS, MAX_NEW_TOKENS = 9, 14
PROMPT = soft_prompt(5)
with_and_without_prompt = pytest.mark.parametrize("P", [None, PROMPT], ids=["bare", "prompted"])


@pytest.fixture(scope="module")
def model():
    return tiny_model(SMALL)


def ragged_requests(n):
    rng = np.random.default_rng(5)
    return [rng.integers(0, 12, rng.integers(1, 10)).tolist() for _ in range(n)]


def keys_of(n):
    return [(10, "test", row) for row in range(n)]


def uniforms_of(n, max_new_tokens=MAX_NEW_TOKENS):
    return np.stack([row_uniforms(max_new_tokens, *key) for key in keys_of(n)])


def assert_all_close(lists, expected):
    for values, others in zip(lists, expected, strict=True):
        np.testing.assert_allclose(values, others, atol=1e-5)


# --- A plain computation ---


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution that a token is drawn from, float64 (V,)."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    kept = np.argsort(-p)[: top_k or len(p)]
    mass = np.cumsum(p[kept]) / p[kept].sum()
    kept = kept[: np.searchsorted(mass, top_p) + 1]  # as few as have the mass top_p
    result = np.zeros_like(p)
    result[kept] = p[kept] / p[kept].sum()
    return result


def banned_tokens(text, n):
    """The tokens that would complete an n-gram of the text."""
    if not n or len(text) < n - 1:
        return []
    last = text[len(text) - n + 1 :]
    return [text[i + n - 1] for i in range(len(text) - n + 1) if text[i : i + n - 1] == last]


@torch.no_grad()
def next_logits(model, text, P=None):
    """The logits (V,) of the next token, float64, from a forward pass over the whole text."""
    ids = torch.tensor([text])
    hidden = model(ids if P is None else prepend(P, model, ids))
    return model.logits(hidden[0, -1]).double().numpy()


def generate(request, uniforms, next_probs, eos_token_id=EOS):
    """One row's response and log-probabilities, with `next_probs(text)` for every token."""
    text, log_probs = list(request), []
    for t in range(MAX_NEW_TOKENS):
        p = next_probs(text)
        if uniforms is None:
            token = int(p.argmax())
        else:
            token = int(np.searchsorted(np.cumsum(p), float(uniforms[t]), side="right"))
        text.append(token)
        log_probs.append(np.log(p[token]))
        if token == eos_token_id:
            break
    return text[len(request) :], log_probs


def plain_sample(model, request, uniforms, P=None, no_repeat_ngram=0, **kwargs):
    """`sample` of one row, without cache and batch."""
    if uniforms is None:
        kwargs = {**kwargs, "temperature": 1.0}

    def next_probs(text):
        logits = next_logits(model, text, P)
        logits[banned_tokens(text, no_repeat_ngram)] = -np.inf
        return probabilities(logits, **kwargs)

    return generate(request, uniforms, next_probs)


# --- A batch ---

SAMPLING_KWARGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.7},
    "ban": {"no_repeat_ngram": 2},
    "all": {"temperature": 1.5, "top_k": 8, "top_p": 0.9, "no_repeat_ngram": 3},
}


@with_and_without_prompt
@pytest.mark.parametrize("greedy", [False, True], ids=["random", "greedy"])
@pytest.mark.parametrize("kwargs", SAMPLING_KWARGS.values(), ids=SAMPLING_KWARGS)
def test_a_ragged_batch_equals_each_row_alone_and_by_hand(model, kwargs, greedy, P):
    requests, uniforms = ragged_requests(8), None if greedy else uniforms_of(8)
    responses, log_probs = sample(model, requests, uniforms, EOS, MAX_NEW_TOKENS, P=P, **kwargs)
    for row, request in enumerate(requests):
        u = None if greedy else uniforms[row]
        tokens, log_p = plain_sample(model, request, u, P, **kwargs)
        assert responses[row] == tokens
        np.testing.assert_allclose(log_probs[row], log_p, atol=1e-4)
        u = None if greedy else u[None]
        [alone], log_p = sample(model, [request], u, EOS, MAX_NEW_TOKENS, P=P, **kwargs)
        assert responses[row] == alone
        np.testing.assert_allclose(log_probs[row], log_p[0], atol=1e-5)
    if not greedy:
        assert len({len(response) for response in responses}) > 2


@pytest.mark.parametrize("case", ["bare", "prompted", "mixture"])
def test_batches_of_1_8_and_32_give_the_same_responses(model, teacher, case):
    cases = {"bare": {}, "prompted": {"P": PROMPT}, "mixture": {"teacher_mix": (teacher, 0.5)}}
    kwargs = cases[case]
    arguments = (model, ragged_requests(40), keys_of(40), EOS, MAX_NEW_TOKENS)
    responses, log_probs = sample_all(*arguments, batch_size=32, **kwargs)
    for batch_size in [8, 1]:
        again, log_p = sample_all(*arguments, batch_size=batch_size, **kwargs)
        assert again == responses
        assert_all_close(log_p, log_probs)


def test_random_numbers_depend_on_the_key_and_not_on_the_order(model):
    requests, keys = ragged_requests(12), keys_of(12)
    responses, _ = sample_all(model, requests, keys, EOS, MAX_NEW_TOKENS)
    backwards, _ = sample_all(model, requests[::-1], keys[::-1], EOS, MAX_NEW_TOKENS, batch_size=5)
    assert backwards[::-1] == responses
    other_keys = [(11, "test", row) for row in range(12)]
    assert sample_all(model, requests, other_keys, EOS, MAX_NEW_TOKENS)[0] != responses
    shorter, _ = sample_all(model, requests, keys, EOS, max_new_tokens=4)
    assert shorter == [response[:4] for response in responses]


def test_no_requests_give_no_responses(model):
    assert sample_all(model, [], [], EOS) == ([], [])


@pytest.mark.parametrize("case", ["a long request", "a soft prompt", "a mixture"])
def test_too_many_positions_are_an_input_error_before_anything_is_sampled(model, monkeypatch, case):
    """Only the last of the requests is long. One token less, and all of them are sampled."""
    short = tiny_model(replace(WIDE, n_positions=60))
    n_tokens, n_positions, kwargs = {
        "a long request": (52, 64, {}),  # 52 + 14 - 1 = 65 positions
        "a soft prompt": (47, 64, {"P": PROMPT}),  # 5 more
        "a mixture": (48, 60, {"teacher_mix": (short, 0.2)}),
    }[case]
    requests = [*ragged_requests(19), [1] * (n_tokens - 1)]
    arguments = (model, requests, keys_of(20), EOS, MAX_NEW_TOKENS)
    responses, _ = sample_all(*arguments, **kwargs)
    assert all(responses)
    monkeypatch.setattr(sampling, "sample", lambda *_, **__: pytest.fail("sampled"))
    requests[-1].append(1)
    n_tokens += len(kwargs.get("P", ()))
    problem = f"{n_tokens} tokens of prompt and request and 14 new ones exceed the model's "
    problem += f"{n_positions} positions; shorten them"
    for options in ({}, {"greedy": True}, {"batch_size": 8}):
        assert error_of(partial(sample_all, *arguments, **kwargs, **options)) == problem


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_batch_is_sampled_with_the_weights_of_all_models_packed(
    model, teacher, monkeypatch, dtype
):
    events = []

    @contextmanager
    def recording_packed_weights(models, dtype):
        events.append((models, dtype))
        yield
        events.append("unpacked")

    def recording_sample(model, requests, *args, **kwargs):
        events.append(len(requests))
        return sample(model, requests, *args, **kwargs)

    monkeypatch.setattr(sampling, "packed_weights", recording_packed_weights)
    monkeypatch.setattr(sampling, "sample", recording_sample)
    arguments = (model, ragged_requests(12), keys_of(12), EOS, MAX_NEW_TOKENS)
    for mix, models in ((None, [model]), ((teacher, 0.2), [model, teacher])):
        sample_all(*arguments, batch_size=5, teacher_mix=mix, dtype=dtype)
        assert events == [(models, dtype), 5, 5, 2, "unpacked"]
        events.clear()


@with_and_without_prompt
def test_dropout_is_as_the_mode_of_the_model_says(P):
    """And the mode stays."""
    model, without = tiny_model(replace(SMALL, dropout=0.5)), tiny_model(SMALL)
    arguments = (ragged_requests(8), uniforms_of(8), EOS, MAX_NEW_TOKENS)
    responses, _ = sample(model, *arguments, P=P)
    assert responses == sample(without, *arguments, P=P)[0]
    assert not any(module.training for module in model.modules())
    torch.manual_seed(1)
    assert sample(model.train(), *arguments, P=P)[0] != responses
    assert all(module.training for module in model.modules())


@with_and_without_prompt
@torch.no_grad()
def test_log_probabilities_of_decoding_equal_those_of_one_forward_pass(model, P):
    requests = ragged_requests(32)
    responses, log_probs = sample(
        model, requests, uniforms_of(32), EOS, MAX_NEW_TOKENS, temperature=1.3, P=P
    )
    texts = [request + response for request, response in zip(requests, responses)]
    ids = torch.tensor([text + [0] * (24 - len(text)) for text in texts])
    hidden = model(ids if P is None else prepend(P, model, ids))
    log_p = (model.logits(hidden) / 1.3).log_softmax(-1)
    log_p = log_p[:, 0 if P is None else len(P) :]
    for row, (request, response) in enumerate(zip(requests, responses)):
        positions = range(len(request) - 1, len(texts[row]) - 1)
        expected = torch.tensor(log_probs[row])
        torch.testing.assert_close(log_p[row, positions, response], expected, atol=1e-5, rtol=0)


def test_a_response_ends_with_end_of_text_or_at_the_limit(model):
    """An end-of-text in the request does not end the response."""
    requests = [[*request, EOS, 5] for request in ragged_requests(40)]
    responses, log_probs = sample(model, requests, uniforms_of(40), EOS, MAX_NEW_TOKENS)
    finished = [response for response in responses if response[-1] == EOS]
    cut_off = [response for response in responses if response[-1] != EOS]
    assert len(finished) > 3 and len(cut_off) > 3
    assert all(EOS not in response[:-1] for response in responses)
    assert all(len(response) == MAX_NEW_TOKENS for response in cut_off)
    assert min(map(len, finished)) < 5
    assert list(map(len, log_probs)) == list(map(len, responses))


def test_finished_rows_are_dropped_and_decoding_stops_after_the_last(model, monkeypatch):
    shapes, forward = [], model.forward

    def recording_forward(inputs, **kwargs):
        shapes.append(inputs.shape)
        return forward(inputs, **kwargs)

    monkeypatch.setattr(model, "forward", recording_forward)
    requests, uniforms = ragged_requests(24), uniforms_of(24, 50)
    responses, _ = sample(model, requests, uniforms, 10, max_new_tokens=50, temperature=2)
    lengths = [len(response) for response in responses]
    assert max(lengths) < 50
    assert len(shapes) == max(lengths)  # the requests, and every token but the last
    for t, (n_rows, n_tokens) in enumerate(shapes[1:], start=1):
        assert n_tokens == 1
        n_alive = sum(length > t for length in lengths)
        assert n_alive <= n_rows <= max(n_alive / 0.75, 1)


def test_all_positions_can_be_used_and_more_are_an_error(model):
    """The last token is only predicted, never read."""
    request = [1] * 51  # 51 + 14 - 1 = 64 positions
    [response], _ = sample(model, [request], None, 99, MAX_NEW_TOKENS)
    assert response == plain_sample(model, request, None)[0]
    message = "51 tokens of prompt and request and 15 new ones exceed the model's 64 positions"
    with pytest.raises(ValueError, match=message):
        sample(model, [request], None, EOS, MAX_NEW_TOKENS + 1)
    with pytest.raises(ValueError, match="52 tokens"):
        sample(model, [request], None, EOS, MAX_NEW_TOKENS, P=PROMPT[:1])


def test_greedy_tokens_equal_the_golden_ones():
    golden = json.loads(GOLDEN.read_text())
    rows = [[5, 17, 60, 3, 3, 41, 8], [22], [9, 60, 60, 1, 30, 12, 55, 2, 19, 44, 7]]
    assert sample(tiny_model(), rows, None, -1, max_new_tokens=12)[0] == golden["greedy"]


# --- A mixture of two models ---

WIDE = replace(SMALL, n_layer=1, n_embd=48, n_head=3)


@pytest.fixture(scope="module")
def teacher():
    return tiny_model(WIDE)


def mixture(model, teacher, alpha, text):
    """(1 - α) q + α p of the next token, float64 (V,)."""
    q, p = (probabilities(next_logits(m, text)) for m in (model, teacher))
    return (1 - alpha) * q + alpha * p


def plain_mixed_sample(model, teacher, alpha, request, uniforms, eos_token_id=EOS):
    def next_probs(text):
        return mixture(model, teacher, alpha, text)

    return generate(request, uniforms, next_probs, eos_token_id)


@pytest.mark.parametrize("alpha", [0.2, 0.7, 1.0])
def test_a_ragged_batch_of_a_mixture_equals_each_row_by_hand(model, teacher, alpha):
    """The responses have different lengths, so that rows are dropped from both caches."""
    requests, uniforms = ragged_requests(12), uniforms_of(12)
    responses, log_probs = sample(
        model, requests, uniforms, EOS, MAX_NEW_TOKENS, teacher_mix=(teacher, alpha)
    )
    for row, request in enumerate(requests):
        tokens, log_p = plain_mixed_sample(model, teacher, alpha, request, uniforms[row])
        assert responses[row] == tokens
        np.testing.assert_allclose(log_probs[row], log_p, atol=1e-4)
    assert len({len(response) for response in responses}) > 2 or alpha == 1
    if alpha == 1:
        assert responses == sample(teacher, requests, uniforms, EOS, MAX_NEW_TOKENS)[0]


def chi_square(counts, p):
    n = counts.sum()
    return ((counts - n * p) ** 2 / (n * p)).sum()


def test_first_tokens_have_the_frequencies_of_the_mixture(model, teacher):
    request, n = [3, 1, 4], 6000
    uniforms = np.stack([row_uniforms(1, 10, "mixed", row) for row in range(n)])
    responses, _ = sample(model, [request] * n, uniforms, EOS, 1, teacher_mix=(teacher, 0.2))
    counts = np.bincount([token for [token] in responses], minlength=12)
    # With 11 degrees of freedom, 0.04 % of samples are above 34.
    assert chi_square(counts, mixture(model, teacher, 0.2, request)) < 34
    for alpha in (0.0, 1.0, 0.8):
        assert chi_square(counts, mixture(model, teacher, alpha, request)) > 100


def test_a_mixture_with_alpha_0_gives_the_responses_of_the_student(model, teacher):
    arguments = (model, ragged_requests(16), uniforms_of(16), EOS, MAX_NEW_TOKENS)
    responses, log_probs = sample(*arguments, teacher_mix=(teacher, 0.0))
    expected, expected_log_probs = sample(*arguments)
    assert responses == expected
    assert_all_close(log_probs, expected_log_probs)
    assert responses != sample(*arguments, teacher_mix=(teacher, 0.2))[0]


@pytest.mark.parametrize("n_student, n_teacher", [(64, 30), (30, 64)])
def test_a_mixture_has_the_positions_of_the_model_with_fewer(n_student, n_teacher):
    student = tiny_model(replace(SMALL, n_positions=n_student))
    teacher = tiny_model(replace(WIDE, n_positions=n_teacher))
    request, u = [1] * 17, uniforms_of(1)  # 17 + 14 - 1 = 30 positions
    mix = (teacher, 0.2)
    [response], _ = sample(student, [request], u, 99, MAX_NEW_TOKENS, teacher_mix=mix)
    assert response == plain_mixed_sample(student, *mix, request, u[0], eos_token_id=99)[0]
    message = "18 tokens of prompt and request and 14 new ones exceed the model's 30 positions"
    with pytest.raises(ValueError, match=message):
        sample(student, [[*request, 1]], u, 99, MAX_NEW_TOKENS, teacher_mix=mix)


def test_a_prompt_with_a_mixture_is_a_value_error(model, teacher):
    """Also with a teacher as wide as the student: the prompt belongs to one model."""
    for other in (teacher, tiny_model(SMALL)):
        with pytest.raises(ValueError, match="P can't be combined with teacher_mix"):
            sample(model, [[1, 2]], None, EOS, 3, P=PROMPT, teacher_mix=(other, 0.2))


# --- One token ---


def test_tokens_have_the_frequencies_of_the_distribution():
    logits, n = np.random.default_rng(1).normal(0, 1.5, 40), 50_000
    u = torch.from_numpy(np.random.default_rng(2).random(n, dtype=np.float32))
    tokens, log_p = sample_next_token(torch.tensor(logits).expand(n, -1), u)
    p = probabilities(logits)
    counts = np.bincount(tokens.numpy(), minlength=40)
    assert chi_square(counts, p) < 39 + 5 * (2 * 39) ** 0.5
    np.testing.assert_allclose(log_p, np.log(p)[tokens], atol=1e-5)


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (0.5, 0, 1.0),
        (2.0, 0, 1.0),
        (1.0, 1, 1.0),
        (1.0, 4, 1.0),
        (1.0, 100, 1.0),
        (1.0, 0, 0.01),
        (1.0, 0, 0.5),
        (1.0, 0, 0.95),
        (0.7, 5, 0.8),
        (3.0, 6, 0.6),
    ],
)
def test_temperature_top_k_and_top_p_give_the_right_distribution(temperature, top_k, top_p):
    u = torch.linspace(0, 1, 4001)[:-1]
    options = (temperature, top_k, top_p)
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(0, 1, 9)
        p = probabilities(logits, *options)
        tokens, log_p = sample_next_token(torch.tensor(logits).expand(4000, -1), u, *options)
        assert set(tokens.tolist()) == set(np.flatnonzero(p))
        np.testing.assert_allclose(log_p, np.log(p[tokens]), atol=1e-5)
        np.testing.assert_allclose(np.bincount(tokens, minlength=9) / 4000, p, atol=1e-3)
        greedy, _ = sample_next_token(torch.tensor(logits)[None], None, *options)
        assert greedy.item() == logits.argmax()


@pytest.mark.parametrize("vocab_size", [3, 1000, 50257])
def test_the_smallest_and_largest_random_numbers_select_possible_tokens(vocab_size):
    rng = np.random.default_rng(vocab_size)
    u = torch.tensor([0.0, 2**-24, 2**-149, *(1 - k * 2**-24 for k in range(1, 9))])
    assert u[3] == np.nextafter(np.float32(1), np.float32(0))
    assert u.max() < 1
    for _ in range(20):
        logits = torch.tensor(rng.normal(0, 4, vocab_size)).float()
        logits[0] = logits[-1] = -torch.inf  # impossible at both ends
        logits = logits.expand(len(u), -1)
        tokens, log_p = sample_next_token(logits, u)
        assert (tokens > 0).all() and (tokens < vocab_size - 1).all()
        assert torch.isfinite(log_p).all()
        assert tokens[0] == 1
        tokens, log_p = sample_next_token(logits, u, top_k=1 + vocab_size // 10)
        assert torch.isfinite(log_p).all()
        assert (tokens < vocab_size).all()
    only = torch.full((len(u), vocab_size), -torch.inf).index_fill(1, torch.tensor([1]), 0.0)
    tokens, log_p = sample_next_token(only, u)
    assert tokens.tolist() == [1] * len(u)
    assert log_p.abs().max() == 0


def test_row_uniforms_are_uniform_and_depend_on_every_part_of_the_key():
    u = row_uniforms(20_000, 10, "promptkd", 3, 7)
    assert u.dtype == np.float32
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(np.histogram(u, 10, (0, 1))[0] - 2000).max() < 5 * 1800**0.5
    assert np.array_equal(row_uniforms(50, 10, "promptkd", 3, 7), u[:50])
    for key in [
        (11, "promptkd", 3, 7),
        (10, "gkd", 3, 7),
        (10, "promptkd", 4, 7),
        (10, "promptkd", 3, 8),
        (10, "promptkd", 7, 3),
    ]:
        assert not np.isclose(row_uniforms(50, *key), u[:50]).all()


# --- The ban on repeated n-grams ---


def random_texts():
    """Four texts, and 25 tokens to append to each."""
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, 4, size).tolist() for size in (1, 9, 20, 2)]
    return texts, rng.integers(0, 4, (4, 25)).tolist()


def ban(logits, texts, n):
    """Logits under the ban. The padding after a text, here 0, must have no effect."""
    ids, lengths = pad([*texts, [0] * 60], "cpu")
    ban_repeated_ngrams(logits, ids[:-1], lengths[:-1], n)
    return logits


@pytest.mark.parametrize("n", [1, 2, 3, 6, 100])
def test_the_ban_excludes_only_tokens_that_would_repeat_an_ngram(n):
    texts, more = random_texts()
    n_banned = 0
    for t in range(25):
        logits = ban(torch.zeros(4, 4), texts, n)
        for row, text in enumerate(texts):
            expected = set(banned_tokens(text, n))
            assert set((logits[row] == -torch.inf).nonzero().flatten().tolist()) == expected
            n_banned += len(expected)
            text.append(more[row][t])
        assert set(logits.unique().tolist()) <= {0.0, -np.inf}
    assert n_banned > 10 or n >= 6


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_ban_equals_that_of_transformers(n):
    processor = pytest.importorskip("transformers").NoRepeatNGramLogitsProcessor(n)
    texts, more = random_texts()
    texts[0] = texts[2][-6:] * 2  # a request that repeats itself
    for t in range(25):
        scores = torch.randn(4, 4)
        result = ban(scores.clone(), texts, n)
        for row, text in enumerate(texts):
            expected = processor(torch.tensor([text]), scores[row : row + 1].clone())
            assert torch.equal(result[row], expected[0])
            text.append(more[row][t])


def test_responses_repeat_ngrams_only_without_the_ban(model):
    request = [1, 2, 3]

    def count_repeats(**kwargs):
        uniforms = uniforms_of(10, 30)
        responses, _ = sample(model, [request] * 10, uniforms, -1, max_new_tokens=30, **kwargs)
        texts = [request + response for response in responses]
        bigrams = [list(zip(text, text[1:])) for text in texts]
        return sum(len(pairs) - len(set(pairs)) for pairs in bigrams)

    assert count_repeats() > 10
    assert count_repeats(no_repeat_ngram=2) == 0


# --- A file of responses ---

FILE_NEW_TOKENS = 100
LONG = 4  # the row whose request is over the limit
ROWS = [
    {
        "instruction": "Write a task." * (1 + n % 3),
        "input": "many " * 200 if n == LONG else "café" * (n % 2),
        "output": [f"answer {n}", "another"],
        "topic": n,
    }
    for n in range(13)
]
ASKED = [(n, row) for n, row in enumerate(ROWS) if n != LONG]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return read_rows(write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", ROWS))


@pytest.fixture(scope="module")
def talker_model():
    return tiny_model(talker_config())


def write_responses(model, rows, path, batch_size=4):
    key = (10, "responses")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "sampling_batch_size", lambda *_: batch_size)
        sample_to_file(model, tiny_tokenizer(), rows, key, path, FILE_NEW_TOKENS)


@pytest.fixture(scope="module")
def complete(talker_model, rows, tmp_path_factory):
    """The content of the file."""
    path = tmp_path_factory.mktemp("complete") / "train.jsonl"
    write_responses(talker_model, rows, path)
    return path.read_bytes()


def test_a_line_has_the_row_and_the_response_of_the_model(talker_model, complete):
    tokenizer = tiny_tokenizer()
    for line, (n, row) in zip(complete.splitlines(), ASKED, strict=True):
        request = tokenizer.encode_ordinary(fill_template(row["instruction"], row["input"]))
        u = row_uniforms(FILE_NEW_TOKENS, 10, "responses", n)[None]
        eos_token_id = tokenizer.eot_token
        [response], _ = sample(talker_model, [request], u, eos_token_id, FILE_NEW_TOKENS)
        assert json.loads(line) == {
            "instruction": row["instruction"],
            "input": row["input"],
            "output": tokenizer.decode(response).removesuffix("<|endoftext|>"),
            "ids": response,
            "reference": f"answer {n}",
        }


def test_ids_have_an_end_of_text_only_if_the_response_finished(complete):
    eos_token_id = tiny_tokenizer().eot_token
    ids = [json.loads(line)["ids"] for line in complete.splitlines()]
    cut_off = [row for row in ids if row[-1] != eos_token_id]
    assert 1 < len(cut_off) < len(ids) - 1
    assert all(eos_token_id not in row[:-1] for row in ids)
    assert all(len(row) == FILE_NEW_TOKENS for row in cut_off)


def test_a_file_of_responses_reads_back_as_training_rows(complete, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(complete)
    for n, (row, line) in enumerate(zip(read_rows(path), complete.splitlines(), strict=True)):
        line = json.loads(line)
        assert (row.index, row.references, list(row.ids)) == (n, (line["output"],), line["ids"])


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_file_does_not_depend_on_the_batch_size(
    talker_model, rows, complete, tmp_path, batch_size
):
    write_responses(talker_model, rows, tmp_path / "train.jsonl", batch_size)
    assert (tmp_path / "train.jsonl").read_bytes() == complete


class Interrupted(BaseException):
    """Like a kill, not caught by the code."""


def test_an_interrupted_run_resumes_and_writes_the_same_bytes(
    talker_model, rows, complete, tmp_path, monkeypatch
):
    path, calls = tmp_path / "train.jsonl", []

    def interrupted_sample_all(model, requests, *args, **kwargs):
        calls.append(len(requests))
        if len(calls) == 3:
            raise Interrupted
        return sample_all(model, requests, *args, **kwargs)

    monkeypatch.setattr(sampling, "sample_all", interrupted_sample_all)
    with pytest.raises(Interrupted):
        write_responses(talker_model, rows, path)
    assert os.listdir(tmp_path) == ["train.jsonl.partial"]
    eight_lines = b"".join(complete.splitlines(keepends=True)[:8])
    assert (tmp_path / "train.jsonl.partial").read_bytes() == eight_lines
    write_responses(talker_model, rows, path)
    assert path.read_bytes() == complete
    assert calls == [4, 4, 4, 4]  # twelve rows, and four that were interrupted
    assert os.listdir(tmp_path) == ["train.jsonl"]


@pytest.mark.parametrize(
    "n_lines, n_bytes", [(0, 1), (0, 0), (1, 40), (5, -1), (7, 30), (11, -1), (12, 0)]
)
def test_a_run_resumes_after_a_partial_line(
    talker_model, rows, complete, tmp_path, n_lines, n_bytes
):
    """n_bytes: of the line after the complete ones; -1 for all but its newline."""
    lines = complete.splitlines(keepends=True)
    partial_line = lines[n_lines][:n_bytes] if n_bytes else b""
    content = b"".join(lines[:n_lines]) + partial_line
    (tmp_path / "train.jsonl.partial").write_bytes(content)
    write_responses(talker_model, rows, tmp_path / "train.jsonl", batch_size=64)
    assert (tmp_path / "train.jsonl").read_bytes() == complete
    assert os.listdir(tmp_path) == ["train.jsonl"]


def test_two_ranks_write_the_same_bytes(talker_model, rows, complete, tmp_path):
    partial = b"".join(complete.splitlines(keepends=True)[:4])[:-20]
    (tmp_path / "resumed.jsonl.partial").write_bytes(partial)

    def write_two_files():
        dist.init_process()
        for name in ("new", "resumed"):
            write_responses(talker_model, rows, tmp_path / f"{name}.jsonl", batch_size=3)

    ranks = fork_ranks(write_two_files, 2, tmp_path / "log")
    assert wait_for(ranks, 60) == [0, 0], (tmp_path / "log0").read_text()
    for name in ("new", "resumed"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == complete
    assert not list(tmp_path.glob("*.partial"))


# --- The command ---


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A checkpoint directory with its tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("talker"), talker_config(), tiny_tokenizer())


def run(capsys, *arguments):
    main([*map(str, arguments)])
    return capsys.readouterr().out


def records(capsys, *arguments):
    return [json.loads(line) for line in run(capsys, *arguments, "--json").splitlines()]


def encode(instruction, input=""):
    return tiny_tokenizer().encode_ordinary(fill_template(instruction, input))


def test_the_greedy_command_gives_the_golden_tokens(talker):
    options = ("--instruction", "Write a task.", "--greedy", "--max-new", 20, "--json")
    process = run_command("sample.py", talker, *options)
    assert process.returncode == 0
    assert process.stderr.startswith("device: CPU, ")
    assert after_device(process.stderr) == ""
    record = json.loads(process.stdout)
    assert record.keys() == {"instruction", "input", "text", "ids", "log_probs", "finished"}
    assert record["ids"] == json.loads(GOLDEN.read_text())["command"]
    assert record["instruction"] == "Write a task."
    assert record["input"] == ""
    assert record["finished"] is False


def test_the_greedy_command_gives_the_tokens_of_transformers(talker, tmp_path, capsys):
    hf, eos_token_id = transformers_model(talker_config()), tiny_tokenizer().eot_token
    rows = [
        {"instruction": "Write."},
        {"instruction": "Say it.", "input": "café"},
        {"instruction": "Describes the task with an input", "output": "x"},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    found = records(capsys, talker, "--file", file, "--greedy", "--max-new", 15)
    for row, record in zip(rows, found, strict=True):
        request = encode(row["instruction"], row.get("input", ""))
        assert record["ids"] == greedy_by_transformers(hf, request, 15, eos_token_id)


def test_an_instruction_prints_its_text_and_a_file_prints_headings(talker, tmp_path, capsys):
    options = ["--max-new", 12, "--seed", 3]
    instruction = ["--instruction", "Write.", "--input", "abc"]
    rows = [{"instruction": "Write.", "input": "abc"}, {"instruction": "Read."}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    texts = [record["text"] for record in records(capsys, talker, "--file", file, *options)]
    # The first row of a file has the random numbers of --instruction.
    assert run(capsys, talker, *instruction, *options) == f"{texts[0]}\n"
    expected = f"### Write.\n{texts[0]}\n\n### Read.\n{texts[1]}\n\n"
    assert run(capsys, talker, "--file", file, *options) == expected
    other_seed = run(capsys, talker, *instruction, "--max-new", 12, "--seed", 4)
    without_input = run(capsys, talker, *instruction[:2], *options)
    assert f"{texts[0]}\n" not in (other_seed, without_input)


def test_the_options_are_those_of_sample(talker, talker_model, capsys):
    options = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "no_repeat_ngram": 2}
    arguments = ["--instruction", "Write.", "--max-new", 30]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    [record] = records(capsys, talker, *arguments)
    tokenizer, u = tiny_tokenizer(), row_uniforms(30, 10, "sample", 0)[None]
    [response], [log_probs] = sample(
        talker_model, [encode("Write.")], u, tokenizer.eot_token, 30, **options
    )
    assert record["ids"] == response
    assert record["text"] == decode_response(response, tokenizer)
    np.testing.assert_allclose(record["log_probs"], log_probs, atol=1e-5)


def test_a_soft_prompt_is_prepended(talker, talker_model, tmp_path, capsys):
    save_prompt(PROMPT, tmp_path)
    arguments = [talker, "--instruction", "Write.", "--greedy", "--max-new", 20]
    [bare] = records(capsys, *arguments)
    [prompted] = records(capsys, *arguments, "--prompt", tmp_path)
    eos_token_id = tiny_tokenizer().eot_token
    [expected], _ = sample(talker_model, [encode("Write.")], None, eos_token_id, 20, P=PROMPT)
    assert prompted["ids"] == expected != bare["ids"]
    assert records(capsys, *arguments, "--prompt", tmp_path / "prompt.safetensors") == [prompted]


def test_a_response_reports_whether_it_finished(talker, tmp_path, capsys):
    file = write_rows(tmp_path / "rows.jsonl", [{"instruction": "Write."}] * 12)
    found = records(capsys, talker, "--file", file, "--max-new", 100)
    for record in found:
        assert record["finished"] == (record["ids"][-1] == tiny_tokenizer().eot_token)
        assert "<|endoftext|>" not in record["text"]
    assert {record["finished"] for record in found} == {True, False}


def test_the_best_checkpoint_of_a_run_is_found(talker, tmp_path, capsys):
    (tmp_path / "best").symlink_to(talker)
    options = ["--instruction", "Write.", "--max-new", 5]
    assert run(capsys, tmp_path, *options) == run(capsys, talker, *options)


def test_a_long_request_is_shortened_and_reported(talker, capsys):
    main([str(talker), "--instruction", "Write.", "--input", "many " * 200, "--max-new", "5"])
    assert after_device(capsys.readouterr().err) == "1 of 1 requests were shortened to fit\n"


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_text_that_the_terminal_cannot_show_is_escaped(talker, tmp_path, monkeypatch, options):
    """A request with half a surrogate pair, on an ASCII terminal."""
    rows = [{"instruction": "a\ud800b"}, {"instruction": "Write."}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    arguments = [str(talker), "--file", str(path), "--max-new", "3", *options]
    run_command_line(lambda: main(arguments))
    assert b"Write." in stdout.buffer.getvalue()


@pytest.fixture
def wrong(talker, tmp_path):
    """Wrong arguments, and a part of the error that they give."""
    options, file = ["--instruction", "Write."], tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "Write."}\n{"instruction": 3}\n')
    wide, damaged, mismatched = (tmp_path / name for name in ("wide", "damaged", "mismatched"))
    wide.mkdir()
    save_prompt(torch.ones(3, 48), wide)
    weights = write_checkpoint(damaged, talker_config(), tiny_tokenizer()) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    write_checkpoint(mismatched, TINY, tiny_tokenizer())
    none = tmp_path / "none.jsonl"
    prompt = [talker, *options, "--prompt"]
    positions = [talker, *options, "--max-new", 280]
    return {
        "no request": ([talker], "--instruction"),
        "two requests": ([talker, *options, "--file", file], "--instruction"),
        "no such file": ([talker, "--file", none], "none.jsonl: no such file"),
        "a bad row": ([talker, "--file", file], "rows.jsonl, line 2: 'instruction'"),
        "no such model": (["nonsense", *options], "'nonsense': no such directory"),
        "no checkpoint": ([tmp_path, *options], "config.json: no such file"),
        "damaged weights": ([damaged, *options], "model.safetensors: is truncated"),
        "another tokenizer": ([mismatched, *options], "61 tokens and its tokenizer 364"),
        "no prompt": ([*prompt, tmp_path], "prompt.safetensors: no such file"),
        "another model's prompt": ([*prompt, wide], "48 wide and the model 32"),
        "too many positions": (positions, "exceed the model's 288 positions"),
    }


def assert_one_error(stderr, message):
    error = after_device(stderr)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_wrong_arguments_give_one_line_and_status_2(wrong, capsys):
    for arguments, message in wrong.values():
        with pytest.raises(SystemExit) as exit:
            run_command_line(lambda arguments=arguments: main([*map(str, arguments)]))
        out, err = capsys.readouterr()
        assert exit.value.code == 2
        assert out == ""
        assert_one_error(err, message)


def test_wrong_arguments_end_the_process_with_status_2(wrong):
    arguments, message = wrong["damaged weights"]
    process = run_command("sample.py", *arguments)
    assert process.returncode == 2
    assert process.stdout == ""
    assert_one_error(process.stderr, message)


@pytest.mark.parametrize(
    "option, value",
    [
        ("--temperature", "0"),
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--top-p", "1.5"),
        ("--top-k", "-1"),
        ("--max-new", "0"),
        ("--max-new", "many"),
        ("--seed", "-1"),
        ("--no-repeat-ngram", "-2"),
    ],
)
def test_a_number_out_of_range_is_an_error(talker, option, value):
    message = error_of(main, [str(talker), "--instruction", "Write.", option, value])
    assert message.startswith(f"argument {option}: ") and message.endswith("; see --help")
