"""Sampling: every option against a plain computation in NumPy, row by row, and the command."""

import json
import os
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    GOLDEN,
    ROOT,
    TINY,
    after_device,
    greedy_by_transformers,
    run_command,
    soft_prompt,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    transformers_model,
    write_checkpoint,
    write_rows,
)

import sample as sample_module
from data.cli import InputError, run_command_line
from data.rows import fill_template, pad, read_rows
from prompt import save_prompt
from sample import (
    ban_repeated_ngrams,
    decode_response,
    main,
    row_uniforms,
    sample,
    sample_all,
    sample_next_token,
    sample_to_file,
)

SMALL = replace(
    TINY, vocab_size=12, n_positions=64
)  # so few words that responses end and n-grams repeat
END, MAX_NEW_TOKENS = 9, 14
PROMPT = soft_prompt(5)


@pytest.fixture(scope="module")
def model():
    return tiny_model(SMALL)


def ragged_requests(n):
    rng = np.random.default_rng(5)
    return [rng.integers(0, 12, rng.integers(1, 10)).tolist() for _ in range(n)]


def uniforms_of(n, max_new_tokens=MAX_NEW_TOKENS):
    return np.stack([row_uniforms(max_new_tokens, 10, "test", row) for row in range(n)])


# ---- a plain computation -----------------------------------------------------------------------------------------------------


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """What a token is drawn from, float64 (V,)."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    kept = np.argsort(-p)[: top_k or len(p)]
    mass = np.cumsum(p[kept]) / p[kept].sum()
    kept = kept[: np.searchsorted(mass, top_p) + 1]  # as few as hold top_p of it
    cut = np.zeros_like(p)
    cut[kept] = p[kept] / p[kept].sum()
    return cut


def banned(text, n):
    """The tokens that would complete an n-gram which is in the text."""
    return (
        [
            text[i + n - 1]
            for i in range(len(text) - n + 1)
            if text[i : i + n - 1] == text[len(text) - n + 1 :]
        ]
        if n and len(text) >= n - 1
        else []
    )


@torch.no_grad()
def by_hand(
    model, request, uniforms, P=None, no_repeat_ngram=0, max_new_tokens=MAX_NEW_TOKENS, **cut
):
    """One row's response and log-probabilities: the whole text through the model for every token, no cache, no batch."""
    text, log_probs = list(request), []
    for t in range(max_new_tokens):
        logits = model.logits(model(torch.tensor([text]), prefix=P)[0, -1]).double().numpy()
        logits[banned(text, no_repeat_ngram)] = -np.inf
        p = probabilities(logits, **(cut if uniforms is not None else {**cut, "temperature": 1.0}))
        token = int(
            p.argmax()
            if uniforms is None
            else np.searchsorted(np.cumsum(p), float(uniforms[t]), side="right")
        )
        text.append(token)
        log_probs.append(np.log(p[token]))
        if token == END:
            break
    return text[len(request) :], log_probs


# ---- a batch -----------------------------------------------------------------------------------------------------------------

HOW = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.7},
    "ban": {"no_repeat_ngram": 2},
    "all": {"temperature": 1.5, "top_k": 8, "top_p": 0.9, "no_repeat_ngram": 3},
}


@pytest.mark.parametrize("P", [None, PROMPT], ids=["bare", "prompted"])
@pytest.mark.parametrize("greedy", [False, True], ids=["random", "greedy"])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
def test_a_ragged_batch_equals_each_row_by_hand(model, how, greedy, P):
    requests, uniforms = ragged_requests(10), None if greedy else uniforms_of(10)
    responses, log_probs = sample(model, requests, uniforms, END, MAX_NEW_TOKENS, P=P, **how)
    for row, request in enumerate(requests):
        u = None if greedy else uniforms[row]
        tokens, log_p = by_hand(model, request, u, P, **how)
        assert responses[row] == tokens
        np.testing.assert_allclose(log_probs[row], log_p, atol=1e-4)
        alone, log_p = sample(
            model, [request], None if greedy else u[None], END, MAX_NEW_TOKENS, P=P, **how
        )
        assert responses[row] == alone[0]
        np.testing.assert_allclose(log_probs[row], log_p[0], atol=1e-5)
    if not greedy:
        assert len({len(response) for response in responses}) > 2


@pytest.mark.parametrize("P", [None, PROMPT], ids=["bare", "prompted"])
def test_batches_of_1_8_and_32_draw_the_same(model, P):
    requests, keys = ragged_requests(40), [(10, "test", row) for row in range(40)]
    responses, log_probs = sample_all(
        model, requests, keys, END, MAX_NEW_TOKENS, batch_size=32, P=P
    )
    for batch_size in [8, 1]:
        again, log_p = sample_all(
            model, requests, keys, END, MAX_NEW_TOKENS, batch_size=batch_size, P=P
        )
        assert again == responses
        assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(log_p, log_probs, strict=True))


def test_a_rows_random_numbers_go_with_its_key_and_not_with_its_place(model):
    requests, keys = ragged_requests(12), [(10, "test", row) for row in range(12)]
    responses, _ = sample_all(model, requests, keys, END, MAX_NEW_TOKENS)
    backwards, _ = sample_all(model, requests[::-1], keys[::-1], END, MAX_NEW_TOKENS, batch_size=5)
    assert backwards[::-1] == responses
    assert (
        sample_all(model, requests, [(11, "test", row) for row in range(12)], END, MAX_NEW_TOKENS)[
            0
        ]
        != responses
    )
    shorter, _ = sample_all(model, requests, keys, END, max_new_tokens=4)
    assert shorter == [response[:4] for response in responses]


def test_no_requests_give_no_responses(model):
    assert sample_all(model, [], [], END) == ([], [])


@pytest.mark.parametrize("P", [None, PROMPT], ids=["bare", "prompted"])
@torch.no_grad()
def test_log_probabilities_scored_in_one_pass_equal_those_of_decoding(model, P):
    requests = ragged_requests(32)
    responses, log_probs = sample(
        model, requests, uniforms_of(32), END, MAX_NEW_TOKENS, temperature=1.3, P=P
    )
    texts = [request + response for request, response in zip(requests, responses)]
    ids = torch.tensor([text + [0] * (24 - len(text)) for text in texts])
    log_p = (model.logits(model(ids, prefix=P)) / 1.3).log_softmax(-1)[
        :, 0 if P is None else len(P) :
    ]
    for row, (request, response) in enumerate(zip(requests, responses)):
        where = range(len(request) - 1, len(texts[row]) - 1)
        torch.testing.assert_close(
            log_p[row, where, response], torch.tensor(log_probs[row]), atol=1e-5, rtol=0
        )


def test_a_response_ends_with_end_of_text_or_at_the_limit(model):
    requests = [
        [*request, END, 5] for request in ragged_requests(40)
    ]  # an end-of-text in the request is not the response's
    responses, log_probs = sample(model, requests, uniforms_of(40), END, MAX_NEW_TOKENS)
    ended = [response for response in responses if response[-1] == END]
    cut_off = [response for response in responses if response[-1] != END]
    assert len(ended) > 3 and len(cut_off) > 3
    assert all(END not in response[:-1] for response in responses)
    assert all(len(response) == MAX_NEW_TOKENS for response in cut_off) and min(map(len, ended)) < 5
    assert list(map(len, log_probs)) == list(map(len, responses))


def test_decoding_stops_when_all_rows_have_ended_and_drops_those_that_have(model, monkeypatch):
    shapes, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, **how: shapes.append(ids.shape) or forward(ids, **how)
    )
    responses, _ = sample(
        model, ragged_requests(24), uniforms_of(24, 50), 10, max_new_tokens=50, temperature=2
    )
    lengths = [len(response) for response in responses]
    assert max(lengths) < 50 and len(shapes) == max(
        lengths
    )  # the request, and every token but the last
    assert [tokens for _, tokens in shapes[1:]] == [1] * (len(shapes) - 1)
    for t, (rows, _) in enumerate(shapes[1:], start=1):
        alive = sum(length > t for length in lengths)
        assert alive <= rows <= max(alive / 0.75, 1)


def test_positions_that_do_not_suffice_are_an_error_and_the_last_one_is_used(model):
    request = [1] * 50  # 50 + 14 = 64 positions
    assert (
        sample(model, [request], None, 99, MAX_NEW_TOKENS)[0][0] == by_hand(model, request, None)[0]
    )
    with pytest.raises(
        InputError, match="50 tokens and 15 new ones exceed the model's 64 positions"
    ):
        sample(model, [request], None, END, MAX_NEW_TOKENS + 1)
    with pytest.raises(InputError, match="51 tokens"):
        sample(model, [request], None, END, MAX_NEW_TOKENS, P=PROMPT[:1])


def test_greedy_tokens_equal_the_golden_ones():
    golden = json.loads(GOLDEN.read_text())
    rows = [[5, 17, 60, 3, 3, 41, 8], [22], [9, 60, 60, 1, 30, 12, 55, 2, 19, 44, 7]]
    assert sample(tiny_model(), rows, None, -1, max_new_tokens=12)[0] == golden["greedy"]


# ---- two models mixed -------------------------------------------------------------------------------------------------------------

WIDE = replace(SMALL, n_layer=1, n_embd=48, n_head=3)


@pytest.fixture(scope="module")
def teacher():
    return tiny_model(WIDE)


@torch.no_grad()
def mixture(model, teacher, alpha, text):
    """(1 - α) q + α p of the next token, float64 (V,), from the whole text through both models."""
    q, p = (
        probabilities(m.logits(m(torch.tensor([text]))[0, -1]).double().numpy())
        for m in (model, teacher)
    )
    return (1 - alpha) * q + alpha * p


def mixed_by_hand(model, teacher, alpha, request, uniforms, end=END):
    text, log_probs = list(request), []
    for t in range(MAX_NEW_TOKENS):
        m = mixture(model, teacher, alpha, text)
        token = int(np.searchsorted(np.cumsum(m), float(uniforms[t]), side="right"))
        text.append(token)
        log_probs.append(np.log(m[token]))
        if token == end:
            break
    return text[len(request) :], log_probs


@pytest.mark.parametrize("alpha", [0.2, 0.7, 1.0])
def test_a_ragged_batch_of_two_models_mixed_equals_each_row_by_hand(model, teacher, alpha):
    """Responses end at different lengths, so that rows are dropped from both models' caches on the way."""
    requests, uniforms = ragged_requests(12), uniforms_of(12)
    responses, log_probs = sample(
        model, requests, uniforms, END, MAX_NEW_TOKENS, teacher_mix=(teacher, alpha)
    )
    for row, request in enumerate(requests):
        tokens, log_p = mixed_by_hand(model, teacher, alpha, request, uniforms[row])
        assert responses[row] == tokens
        np.testing.assert_allclose(log_probs[row], log_p, atol=1e-4)
    assert len({len(response) for response in responses}) > 2 or alpha == 1
    if alpha == 1:
        assert responses == sample(teacher, requests, uniforms, END, MAX_NEW_TOKENS)[0]


def chi_square(counts, p):
    n = counts.sum()
    return ((counts - n * p) ** 2 / (n * p)).sum()


def test_mixed_first_tokens_have_the_frequencies_of_the_mixture_and_not_of_one_of_the_two(
    model, teacher
):
    request, n = [3, 1, 4], 6000
    uniforms = np.stack([row_uniforms(1, 10, "mixed", row) for row in range(n)])
    counts = np.bincount(
        [
            tokens[0]
            for tokens in sample(
                model, [request] * n, uniforms, END, 1, teacher_mix=(teacher, 0.2)
            )[0]
        ],
        minlength=12,
    )
    assert (
        chi_square(counts, mixture(model, teacher, 0.2, request)) < 34
    )  # 11 degrees of freedom: above in 0.04 % of draws
    for alpha in (0.0, 1.0, 0.8):
        assert chi_square(counts, mixture(model, teacher, alpha, request)) > 100


def test_a_share_of_0_draws_what_the_student_alone_draws(model, teacher):
    requests, uniforms = ragged_requests(16), uniforms_of(16)
    mixed, log_probs = sample(
        model, requests, uniforms, END, MAX_NEW_TOKENS, teacher_mix=(teacher, 0.0)
    )
    alone, log_p = sample(model, requests, uniforms, END, MAX_NEW_TOKENS)
    assert (
        mixed
        == alone
        != sample(model, requests, uniforms, END, MAX_NEW_TOKENS, teacher_mix=(teacher, 0.2))[0]
    )
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(log_probs, log_p, strict=True))


def test_batches_of_1_8_and_32_draw_the_same_from_two_models_mixed(model, teacher):
    requests, keys = ragged_requests(32), [(10, "test", row) for row in range(32)]
    responses, log_probs = sample_all(
        model, requests, keys, END, MAX_NEW_TOKENS, batch_size=32, teacher_mix=(teacher, 0.5)
    )
    for batch_size in [8, 1]:
        again, log_p = sample_all(
            model,
            requests,
            keys,
            END,
            MAX_NEW_TOKENS,
            batch_size=batch_size,
            teacher_mix=(teacher, 0.5),
        )
        assert again == responses
        assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(log_p, log_probs, strict=True))


@pytest.mark.parametrize("student_positions, teacher_positions", [(64, 30), (30, 64)])
def test_two_models_mixed_have_the_positions_of_the_one_with_fewer(
    student_positions, teacher_positions
):
    student, teacher = (
        tiny_model(replace(SMALL, n_positions=student_positions)),
        tiny_model(replace(WIDE, n_positions=teacher_positions)),
    )
    request, u = [1] * 16, uniforms_of(1)  # 16 + 14 = 30 positions
    assert (
        sample(student, [request], u, 99, MAX_NEW_TOKENS, teacher_mix=(teacher, 0.2))[0][0]
        == mixed_by_hand(student, teacher, 0.2, request, u[0], end=99)[0]
    )
    with pytest.raises(
        InputError, match="17 tokens and 14 new ones exceed the model's 30 positions"
    ):
        sample(student, [[*request, 1]], u, 99, MAX_NEW_TOKENS, teacher_mix=(teacher, 0.2))


# ---- one draw ----------------------------------------------------------------------------------------------------------------


def test_draws_have_the_frequencies_of_the_distribution():
    logits, n = np.random.default_rng(1).normal(0, 1.5, 40), 50_000
    tokens, log_p = sample_next_token(
        torch.tensor(logits).expand(n, -1),
        torch.from_numpy(np.random.default_rng(2).random(n, dtype=np.float32)),
    )
    p = probabilities(logits)
    counts = np.bincount(tokens.numpy(), minlength=40)
    chi_square = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi_square < 39 + 5 * (2 * 39) ** 0.5
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
def test_temperature_top_k_and_top_p_leave_the_right_tokens_with_the_right_odds(
    temperature, top_k, top_p
):
    u = torch.linspace(0, 1, 4001)[:-1]
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(0, 1, 9)
        p = probabilities(logits, temperature, top_k, top_p)
        tokens, log_p = sample_next_token(
            torch.tensor(logits).expand(4000, -1), u, temperature, top_k, top_p
        )
        assert set(tokens.tolist()) == set(np.flatnonzero(p))
        np.testing.assert_allclose(log_p, np.log(p[tokens]), atol=1e-5)
        np.testing.assert_allclose(np.bincount(tokens, minlength=9) / 4000, p, atol=1e-3)
        assert (
            sample_next_token(torch.tensor(logits)[None], None, temperature, top_k, top_p)[0].item()
            == logits.argmax()
        )


@pytest.mark.parametrize("vocabulary", [3, 1000, 50257])
def test_the_smallest_and_largest_random_number_point_to_possible_tokens(vocabulary):
    rng = np.random.default_rng(vocabulary)
    u = torch.tensor([0.0, 2**-24, 2**-149, *(1 - k * 2**-24 for k in range(1, 9))])
    assert u[3] == np.nextafter(np.float32(1), np.float32(0)) and u.max() < 1
    for _ in range(20):
        logits = torch.tensor(rng.normal(0, 4, vocabulary)).float()
        logits[0] = logits[-1] = -torch.inf  # impossible at both ends
        tokens, log_p = sample_next_token(logits.expand(len(u), -1), u)
        assert (
            (tokens > 0).all() and (tokens < vocabulary - 1).all() and torch.isfinite(log_p).all()
        )
        assert tokens[0] == 1
        top, log_p = sample_next_token(logits.expand(len(u), -1), u, top_k=1 + vocabulary // 10)
        assert torch.isfinite(log_p).all() and (top < vocabulary).all()
    only = torch.full((len(u), vocabulary), -torch.inf).index_fill(1, torch.tensor([1]), 0.0)
    assert (
        sample_next_token(only, u)[0].tolist() == [1] * len(u)
        and sample_next_token(only, u)[1].abs().max() == 0
    )


def test_row_uniforms_are_uniform_and_hang_on_every_part_of_the_key():
    u = row_uniforms(20_000, 10, "promptkd", 3, 7)
    assert u.dtype == np.float32 and u.min() >= 0 and u.max() < 1
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


# ---- the ban on repeated n-grams ---------------------------------------------------------------------------------------------


def random_texts():
    rng = np.random.default_rng(3)
    return [rng.integers(0, 4, size).tolist() for size in (1, 9, 20, 2)], rng.integers(
        0, 4, (4, 25)
    )


def ban(logits, texts, n):
    """Logits under the ban. What stands behind a text in its row, here 0, must not count."""
    ids, lengths = pad([*texts, [0] * 60], "cpu")
    ban_repeated_ngrams(logits, ids[:-1], lengths[:-1], n)
    return logits


@pytest.mark.parametrize("n", [1, 2, 3, 6, 100])
def test_the_ban_forbids_what_would_repeat_and_nothing_else(n):
    texts, more = random_texts()
    forbidden = 0
    for t in range(25):
        logits = ban(torch.zeros(4, 4), texts, n)
        for row in range(4):
            assert set((logits[row] == -torch.inf).nonzero().flatten().tolist()) == set(
                banned(texts[row], n)
            )
            forbidden += len(set(banned(texts[row], n)))
            texts[row].append(int(more[row, t]))
        assert set(logits.unique().tolist()) <= {0.0, -np.inf}
    assert forbidden > 10 or n >= 6


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_ban_is_transformers_ban(n):
    theirs = pytest.importorskip("transformers").NoRepeatNGramLogitsProcessor(n)
    texts, more = random_texts()
    texts[0] = texts[2][-6:] * 2  # a request with repetitions of its own
    for t in range(25):
        scores = torch.randn(4, 4)
        ours = ban(scores.clone(), texts, n)
        for row in range(4):
            assert torch.equal(
                ours[row], theirs(torch.tensor([texts[row]]), scores[row : row + 1].clone())[0]
            )
        for row in range(4):
            texts[row].append(int(more[row, t]))


def test_a_banned_sample_repeats_nothing_and_a_plain_one_does(model):
    def repeats(text, n):
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        return len(grams) - len(set(grams))

    requests = [[1, 2, 3]] * 10
    plain, _ = sample(model, requests, uniforms_of(10, 30), -1, max_new_tokens=30)
    without, _ = sample(
        model, requests, uniforms_of(10, 30), -1, max_new_tokens=30, no_repeat_ngram=2
    )
    assert sum(repeats([1, 2, 3, *response], 2) for response in plain) > 10
    assert sum(repeats([1, 2, 3, *response], 2) for response in without) == 0


# ---- a teacher's responses in a file -----------------------------------------------------------------------------------------------

SAMPLED_NEW = 100
LONG = 4  # the row whose request is over the limit
SAMPLED_ROWS = [
    {
        "instruction": "Write a task." * (1 + n % 3),
        "input": "café" * (n % 2),
        "output": [f"answer {n}", "another"],
        "topic": n,
    }
    for n in range(13)
]
SAMPLED_ROWS[LONG]["input"] = "many " * 200


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The rows of a training file, in which one request is over the limit."""
    return read_rows(write_rows(tmp_path_factory.mktemp("asked") / "train.jsonl", SAMPLED_ROWS))


def to_file(rows, path, batch_size=4):
    sample_to_file(
        tiny_model(talker_config()),
        tiny_tokenizer(),
        rows,
        (10, "responses"),
        path,
        SAMPLED_NEW,
        batch_size=batch_size,
    )
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole_file(asked, tmp_path_factory):
    return to_file(asked, tmp_path_factory.mktemp("whole") / "train.jsonl")


def test_a_line_has_the_row_and_the_models_response_to_it(whole_file):
    lines, tokenizer = [json.loads(line) for line in whole_file.splitlines()], tiny_tokenizer()
    wanted = [(n, row) for n, row in enumerate(SAMPLED_ROWS) if n != LONG]
    for line, (n, row) in zip(lines, wanted, strict=True):
        request = tokenizer.encode_ordinary(fill_template(row["instruction"], row["input"]))
        [response], _ = sample(
            tiny_model(talker_config()),
            [request],
            row_uniforms(SAMPLED_NEW, 10, "responses", n)[None],
            tokenizer.eot_token,
            SAMPLED_NEW,
        )
        text = tokenizer.decode(response).removesuffix("<|endoftext|>")
        assert line == {
            "instruction": row["instruction"],
            "input": row["input"],
            "output": text,
            "ids": response,
            "reference": f"answer {n}",
        }


def test_sampled_ids_end_with_end_of_text_where_the_response_has_ended_and_nowhere_else(whole_file):
    end, lines = tiny_tokenizer().eot_token, [json.loads(line) for line in whole_file.splitlines()]
    ended = [line["ids"] for line in lines if line["ids"][-1] == end]
    cut_off = [line["ids"] for line in lines if line["ids"][-1] != end]
    assert len(ended) > 1 and len(cut_off) > 1
    assert all(end not in ids[:-1] for ids in ended) and all(
        end not in ids and len(ids) == SAMPLED_NEW for ids in cut_off
    )


def test_a_file_of_responses_reads_back_as_training_rows_with_these_tokens(whole_file, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(whole_file)
    lines = [json.loads(line) for line in whole_file.splitlines()]
    for n, (row, line) in enumerate(zip(read_rows(tmp_path / "train.jsonl"), lines, strict=True)):
        assert (row.index, row.references, list(row.ids)) == (n, (line["output"],), line["ids"])


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_file_of_responses_does_not_hang_on_the_batch_size(
    asked, whole_file, tmp_path, batch_size
):
    assert to_file(asked, tmp_path / "train.jsonl", batch_size) == whole_file


class Interrupted(BaseException):
    """Not to be caught by the code, as a kill isn't."""


def test_an_interrupted_sampling_goes_on_and_leaves_the_same_bytes(
    asked, whole_file, tmp_path, monkeypatch
):
    path, calls = tmp_path / "train.jsonl", []

    def stopping(model, requests, *rest, **how):
        calls.append(len(requests))
        if len(calls) == 3:
            raise Interrupted
        return sample_all(model, requests, *rest, **how)

    monkeypatch.setattr(sample_module, "sample_all", stopping)
    with pytest.raises(Interrupted):
        to_file(asked, path)
    assert not path.exists()  # a file with its own name is whole
    assert b"".join(file.read_bytes() for file in tmp_path.iterdir()) == b"".join(
        whole_file.splitlines(keepends=True)[:8]
    )
    calls[:] = [0] * 10
    assert to_file(asked, path) == whole_file
    assert calls[10:] == [4]  # of the twelve rows eight were there
    assert os.listdir(tmp_path) == ["train.jsonl"]


@pytest.mark.parametrize(
    "lines, more", [(0, 1), (0, 0), (1, 40), (5, -1), (7, 30), (11, -1), (12, 0)]
)
def test_a_sampling_that_was_cut_off_within_a_line_leaves_the_same_bytes(
    asked, whole_file, tmp_path, lines, more
):
    """lines are whole, and of the next there are `more` bytes; -1: all but its line end."""
    whole = whole_file.splitlines(keepends=True)
    cut = whole[lines][:more] if more else b""
    (tmp_path / "train.jsonl.partial").write_bytes(b"".join(whole[:lines]) + cut)
    assert to_file(asked, tmp_path / "train.jsonl") == whole_file
    assert os.listdir(tmp_path) == ["train.jsonl"]


# What each of two ranks runs: a file from its beginning, and one that goes on within a line.
RANK = """
import sys
from pathlib import Path
from data import dist
from data.cli import run_command_line as command
from data.rows import read_rows
from data.models import load_model
from sample import sample_to_file

def main():
    home = Path(sys.argv[1])
    model, tokenizer = load_model(home / "model", dist.init_process()[0])
    for name in ("begun", "gone_on"):
        sample_to_file(model, tokenizer, read_rows(home / "rows.jsonl"), (10, "responses"), home / f"{name}.jsonl", MAX_NEW, batch_size=3)

command(main)
"""


def test_two_ranks_write_the_bytes_of_one(whole_file, tmp_path):
    write_checkpoint(tmp_path / "model", talker_config(), tiny_tokenizer())
    write_rows(tmp_path / "rows.jsonl", SAMPLED_ROWS)
    (tmp_path / "gone_on.jsonl.partial").write_bytes(
        b"".join(whole_file.splitlines(keepends=True)[:4])[:-20]
    )
    (tmp_path / "rank.py").write_text(RANK.replace("MAX_NEW", str(SAMPLED_NEW)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launcher = [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_addr=127.0.0.1",
            f"--master_port={free.getsockname()[1]}",
        ]
    done = run_command(*launcher, tmp_path / "rank.py", tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert (
        (tmp_path / "begun.jsonl").read_bytes()
        == (tmp_path / "gone_on.jsonl").read_bytes()
        == whole_file
    )
    assert not list(tmp_path.glob("*.partial"))


# ---- the command -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A checkpoint directory with its tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("talker"), talker_config(), tiny_tokenizer())


def run(capsys, *arguments):
    main([*map(str, arguments)])
    return capsys.readouterr().out


def records(capsys, *arguments):
    return [json.loads(line) for line in run(capsys, *arguments, "--json").splitlines()]


def test_the_greedy_command_gives_the_golden_tokens(talker):
    done = run_command(
        "sample.py", talker, "--instruction", "Write a task.", "--greedy", "--max-new", 20, "--json"
    )
    assert (
        done.returncode == 0
        and after_device(done.stderr) == ""
        and done.stderr.startswith("device: CPU, ")
    )
    record = json.loads(done.stdout)
    assert record.keys() == {"instruction", "input", "text", "ids", "log_probs", "finished"}
    assert record["ids"] == json.loads(GOLDEN.read_text())["command"]
    assert (record["instruction"], record["input"], record["finished"]) == (
        "Write a task.",
        "",
        False,
    )


def test_the_greedy_command_gives_transformers_tokens(talker, tmp_path, capsys):
    hf, tokenizer = transformers_model(talker_config()), tiny_tokenizer()
    rows = [
        {"instruction": "Write."},
        {"instruction": "Say it.", "input": "café"},
        {"instruction": "Describes the task with an input", "output": "x"},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    for row, record in zip(
        rows, records(capsys, talker, "--file", file, "--greedy", "--max-new", 15), strict=True
    ):
        request = tokenizer.encode_ordinary(fill_template(row["instruction"], row.get("input", "")))
        assert record["ids"] == greedy_by_transformers(hf, request, 15, end=tokenizer.eot_token)


def test_one_instruction_prints_its_text_and_a_file_prints_each_under_its_instruction(
    talker, tmp_path, capsys
):
    what = ["--max-new", 12, "--seed", 3]
    one = run(capsys, talker, "--instruction", "Write.", "--input", "abc", *what)
    file = write_rows(
        tmp_path / "rows.jsonl",
        [{"instruction": "Write.", "input": "abc"}, {"instruction": "Read."}],
    )
    texts = [record["text"] for record in records(capsys, talker, "--file", file, *what)]
    assert one == f"{texts[0]}\n"  # a file's first row draws as one instruction does
    assert (
        run(capsys, talker, "--file", file, *what)
        == f"### Write.\n{texts[0]}\n\n### Read.\n{texts[1]}\n\n"
    )
    assert (
        run(capsys, talker, "--instruction", "Write.", "--input", "abc", *what[:2], "--seed", 4)
        != one
    )
    assert run(capsys, talker, "--instruction", "Write.", *what) != one


def test_the_json_record_is_what_sample_gives(talker, capsys):
    model, tokenizer = tiny_model(talker_config()), tiny_tokenizer()
    request = tokenizer.encode_ordinary(fill_template("Write.", ""))
    [record] = records(
        capsys,
        talker,
        "--instruction",
        "Write.",
        "--max-new",
        30,
        "--temperature",
        0.8,
        "--top-k",
        50,
        "--top-p",
        0.9,
        "--no-repeat-ngram",
        2,
    )
    u = row_uniforms(30, 10, "sample", 0)[None]
    responses, log_probs = sample(
        model,
        [request],
        u,
        tokenizer.eot_token,
        30,
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        no_repeat_ngram=2,
    )
    assert record["ids"] == responses[0] and np.allclose(
        record["log_probs"], log_probs[0], atol=1e-5
    )
    assert record["text"] == decode_response(responses[0], tokenizer)


def test_a_soft_prompt_stands_in_front(talker, tmp_path, capsys):
    model, tokenizer = tiny_model(talker_config()), tiny_tokenizer()
    save_prompt(PROMPT, tmp_path)
    what = [talker, "--instruction", "Write.", "--greedy", "--max-new", 20]
    [bare], [prompted] = records(capsys, *what), records(capsys, *what, "--prompt", tmp_path)
    request = tokenizer.encode_ordinary(fill_template("Write.", ""))
    assert (
        prompted["ids"]
        == sample(model, [request], None, tokenizer.eot_token, 20, P=PROMPT)[0][0]
        != bare["ids"]
    )
    assert records(capsys, *what, "--prompt", tmp_path / "prompt.safetensors") == [prompted]


def test_a_response_that_ends_says_so_and_its_text_has_no_end_of_text(talker, tmp_path, capsys):
    file = write_rows(tmp_path / "rows.jsonl", [{"instruction": "Write."}] * 12)
    found = records(capsys, talker, "--file", file, "--max-new", 100)
    for record in found:
        assert (
            record["finished"] == (record["ids"][-1] == tiny_tokenizer().eot_token)
            and "<|endoftext|>" not in record["text"]
        )
    assert {record["finished"] for record in found} == {True, False}


def test_a_runs_best_checkpoint_is_found(talker, tmp_path, capsys):
    (tmp_path / "best").symlink_to(talker)
    what = ["--instruction", "Write.", "--max-new", 5]
    assert run(capsys, tmp_path, *what) == run(capsys, talker, *what)


def test_a_long_request_is_shortened_and_said_to_be(talker, capsys):
    main([str(talker), "--instruction", "Write.", "--input", "many " * 200, "--max-new", "5"])
    assert after_device(capsys.readouterr().err) == "1 of 1 requests were shortened to fit\n"


@pytest.fixture
def wrong(talker, tmp_path):
    """Arguments that are wrong, and words of the error that each gives."""
    ok, file = ["--instruction", "Write."], tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "Write."}\n{"instruction": 3}\n')
    (tmp_path / "wide").mkdir()
    save_prompt(torch.ones(3, 48), tmp_path / "wide")
    weights = (
        write_checkpoint(tmp_path / "damaged", talker_config(), tiny_tokenizer())
        / "model.safetensors"
    )
    weights.write_bytes(weights.read_bytes()[:-1])
    write_checkpoint(tmp_path / "mismatched", TINY, tiny_tokenizer())
    return {
        "nothing to say": ([talker], "--instruction"),
        "two things to say": ([talker, *ok, "--file", file], "--instruction"),
        "no such file": ([talker, "--file", tmp_path / "none.jsonl"], "none.jsonl: no such file"),
        "a bad row": ([talker, "--file", file], "rows.jsonl, line 2: 'instruction'"),
        "no such model": (["nonsense", *ok], "'nonsense': no such directory"),
        "no checkpoint": ([tmp_path, *ok], "config.json: no such file"),
        "damaged weights": ([tmp_path / "damaged", *ok], "model.safetensors: is cut short"),
        "another tokenizer": ([tmp_path / "mismatched", *ok], "61 tokens and its tokenizer 364"),
        "no prompt there": (
            [talker, *ok, "--prompt", tmp_path],
            "prompt.safetensors: no such file",
        ),
        "another model's prompt": (
            [talker, *ok, "--prompt", tmp_path / "wide"],
            "48 wide and the model 32",
        ),
        "more than the positions": (
            [talker, *ok, "--max-new", 280],
            "exceed the model's 288 positions",
        ),
    }


def test_half_a_surrogate_pair_in_a_request_is_no_obstacle(talker, tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl", [{"instruction": "a\ud800b"}, {"instruction": "Write."}]
    )
    for option in ([], ["--json"]):
        done = run_command(
            "sample.py", talker, "--file", path, "--max-new", 3, *option, PYTHONIOENCODING="ascii"
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr and "Write." in done.stdout


def test_wrong_input_gives_one_line_and_status_2(wrong, capsys):
    for arguments, words in wrong.values():
        with pytest.raises(SystemExit) as exit:
            run_command_line(lambda arguments=arguments: main([*map(str, arguments)]), InputError)
        out, err = capsys.readouterr()
        assert exit.value.code == 2 and out == ""
        err = after_device(err)
        assert err.startswith("error: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("name", ["a bad row", "damaged weights"])
def test_wrong_input_ends_the_process_with_status_2(wrong, name):
    arguments, words = wrong[name]
    done = run_command("sample.py", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        after_device(done.stderr).startswith("error: ")
        and after_device(done.stderr).count("\n") == 1
        and words in done.stderr
    )


@pytest.mark.parametrize(
    "option",
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
def test_a_number_out_of_range_is_refused(talker, capsys, option):
    with pytest.raises(SystemExit) as exit:
        main([str(talker), "--instruction", "Write.", *option])
    assert exit.value.code == 2 and f"error: argument {option[0]}" in capsys.readouterr().err
