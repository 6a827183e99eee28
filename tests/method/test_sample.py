"""Sampling: every option against a plain computation in NumPy, row by row."""

import json
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import GOLDEN, TINY, error_of, soft_prompt, tiny_model

from data.models import sampling
from data.models.sampling import sample_all
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
    problem += (
        f"{n_positions} positions; use a shorter request, fewer new tokens, or a model with more"
    )
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
