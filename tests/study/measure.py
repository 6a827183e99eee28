"""What is measured on the models of the miniature: numbers for the JSON files of the results."""

import statistics
from dataclasses import replace
from functools import partial
from unittest import mock

import torch

import evaluate
import exposure_bias
from data.models.named import load_model
from data.models.sampling import decode_response, sample_all
from data.runs.methods import METHODS
from data.runs.paper import BANNED_NGRAM, PAPER_SAMPLING
from data.sets.demo import ALL_WORDS
from data.sets.prepare import find_data_dir
from data.sets.rows import Example, encode_request, encode_training_rows, micro_batches, read_rows
from losses import cross_entropy, kl
from prompt import response_hidden

CPU = torch.device("cpu")
MAX_NEW_TOKENS = METHODS["promptkd"].demo["max_new_tokens"]
SAMPLING = PAPER_SAMPLING | {"max_new_tokens": MAX_NEW_TOKENS, "dtype": "float32"}
SAMPLING_SEEDS = (10, 20, 30)
MICRO_BATCH_TOKENS = 4096


def rounded(values):
    """Numbers to five significant digits, in lists and dicts too."""
    if isinstance(values, dict):
        return {name: rounded(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [rounded(value) for value in values]
    return float(f"{values:.5g}") if isinstance(values, float) else values


def rouge_l(model):
    """ROUGE-L of a model by name on the demo's five sets: sampled as in Table 1 with each of
    SAMPLING_SEEDS, decoded greedily, and sampled with the first seed and the ban on repeated
    6-grams that the published numbers have. {way: {set: [score from 0 to 100 per seed]}}."""
    columns = evaluate.open_columns(["demo"])
    banned = {name: replace(column, ban=BANNED_NGRAM) for name, column in columns.items()}
    ways = {
        "sampled": (columns, SAMPLING_SEEDS, SAMPLING),
        "greedy": (columns, SAMPLING_SEEDS[:1], SAMPLING | {"greedy": True}),
        "banned": (banned, SAMPLING_SEEDS[:1], SAMPLING),
    }
    results = {}
    for way, (columns_of_way, seeds, sampling) in ways.items():
        scores, _ = evaluate.evaluate_models({"": model}, columns_of_way, seeds, CPU, **sampling)
        results[way] = scores[""]
    return results


def rouge_l_by_kind(model):
    """ROUGE-L of a model by name on the rows of `test`, apart for each kind of row: {kind: {"rows":
    number of rows, "scores": [score per seed]}}. The responses are those of `rouge_l`."""
    q, tokenizer = load_model(model, CPU)
    rows = read_rows(find_data_dir("demo") / "test.jsonl")
    kinds = [kind_of(row) for row in rows]
    results = {kind: {"rows": kinds.count(kind), "scores": []} for kind in KINDS}
    for seed in SAMPLING_SEEDS:
        responses = evaluate.evaluate(q, tokenizer, rows, (seed, "evaluate", "test"), **SAMPLING)
        for kind in KINDS:
            scores = [r["rouge_l"] for r, k in zip(responses, kinds, strict=True) if k == kind]
            results[kind]["scores"].append(statistics.fmean(scores))
    return results


KINDS = ("one answer", "a list in any order", "another choice")
LIST_WORDS = {*ALL_WORDS.animals, *ALL_WORDS.things, *ALL_WORDS.adjectives}


def kind_of(row):
    """What a row leaves open, one of KINDS: nothing, if its references are the same; the order of a
    list only, if they have the same words of the text; else more."""
    if len(set(row.references)) == 1:
        return "one answer"
    words, contents = text_of(row), {tuple(sorted(r.split())) for r in row.references}
    is_list = set(words) <= LIST_WORDS and len(contents) == 1 and set(*contents) <= set(words)
    return "a list in any order" if is_list else "another choice"


def text_of(row):
    """The words that a row asks something about."""
    return (row.input or row.instruction.partition(": ")[2]).split()


# ---- exposure bias -------------------------------------------------------------------------------


def exposure_teacher(p, tokenizer):
    """The teacher p, with its responses to the test requests."""
    options = f"--teacher - --students - --steps {MAX_NEW_TOKENS} --dtype float32".split()
    rows = read_rows(find_data_dir("demo") / "test.jsonl")
    return exposure_bias.Teacher(p, tokenizer, rows, exposure_bias.parse_args(options))


def exposure(teacher, student):
    """The curve of a student by name (see `exposure_bias.exposure_curve`): lists over generation
    steps, the sum R and the mean ε in nats, ExAccErr in %. And ExAccErr without the first generated
    token, as in the released code: that list begins with step 2."""
    label = str(student)
    kl_lists = teacher.kl_lists(student, label, MAX_NEW_TOKENS)
    curve = exposure_bias.exposure_curve(*kl_lists, teacher.args.seed, label)
    _, _, error = exposure_bias.excess_accumulated_error(*without_first_token(kl_lists))
    return curve | {"ex_acc_err_without_first": error.tolist()}


def over_all_requests(kl_q, kl_p):
    """ExAccErr in %, an array over l, where the mean at a step is over all responses and those that
    have ended add 0. kl_q, kl_p: as `exposure_bias.excess_accumulated_error` takes them."""
    # There are as many responses of the student as of the teacher, so their number cancels.
    q_sums, p_sums = (exposure_bias.sum_by_step(kl_steps)[0].sum(0) for kl_steps in (kl_q, kl_p))
    L = min(len(q_sums), len(p_sums))
    R, l_epsilon = q_sums[:L].cumsum(), p_sums[:L].cumsum()
    return 100 * (R - l_epsilon) / l_epsilon


def without_first_token(kl_lists):
    return [[[y[1:] for y in responses] for responses in kl_x] for kl_x in kl_lists]


def released_exposure(p, tokenizer, student):
    """ExAccErr in % as the released code measures it, lists over generation steps: with the mean
    over all requests, with a ban on repeated 6-grams while both models sample, and with both and
    without the first generated token. The last list begins with step 2."""
    kl_lists = exposure_teacher(p, tokenizer).kl_lists(student, str(student), MAX_NEW_TOKENS)
    banned_sampling = partial(sample_all, no_repeat_ngram=BANNED_NGRAM)
    with mock.patch.object(exposure_bias, "sample_all", banned_sampling):
        banned = exposure_teacher(p, tokenizer).kl_lists(student, str(student), MAX_NEW_TOKENS)
    _, _, error_banned = exposure_bias.excess_accumulated_error(*banned)
    return {
        "all requests": over_all_requests(*kl_lists).tolist(),
        "ban": error_banned.tolist(),
        "all three": over_all_requests(*without_first_token(banned)).tolist(),
    }


# ---- what the prompt does to the teacher ---------------------------------------------------------


@torch.no_grad()
def means_over_tokens(p, q, P, examples):
    """Means over the response tokens of examples, in nats, {name: mean}: KLs between the teacher p,
    the prompted teacher p_P and the student q, and the losses of the three.

    P: the prompt (prompt_length, C), or None.
    """
    sums, n_tokens, head = {}, 0, 0 if P is None else len(P)
    for batch in micro_batches(examples, MICRO_BATCH_TOKENS, CPU, head):
        logits = {"p": p.logits(response_hidden(p, batch)[0])}  # (N, V)
        logits["q"] = q.logits(response_hidden(q, batch)[0])  # (N, V)
        pairs = ["p q", "q p"]
        if P is not None:
            logits["p_P"] = p.logits(response_hidden(p, batch, P)[0])  # (N, V)
            pairs += ["p_P q", "q p_P", "p_P p"]
        values = {}
        for pair in pairs:
            a, b = pair.split()
            values[f"kl {pair}"] = kl(logits[a], logits[b])  # (N,)
        for name, z in logits.items():
            values[f"loss {name}"] = cross_entropy(z, batch.targets)  # (N,)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.sum().item()
        n_tokens += len(batch.targets)
    return {name: value / n_tokens for name, value in sums.items()}


def sample_rows(model, tokenizer, rows, role, P=None):
    """A response to each row, as examples."""
    requests = [encode_request(row, tokenizer)[0] for row in rows]
    # "habits" is part of the key of the random numbers: another word gives other responses.
    rng_keys = [(SAMPLING_SEEDS[0], "habits", role, row.index) for row in rows]
    inputs = requests, rng_keys, tokenizer.eot_token, MAX_NEW_TOKENS
    responses, _ = sample_all(model, *inputs, P=P)
    return [Example(row.index, x, y) for row, x, y in zip(rows, requests, responses)]


def count_orders(examples, rows, tokenizer):
    """How lists are written, {name: number of responses}: by the alphabet, in the text's order, in
    another order, or wrong. Only rows with at least three references where order alone is free, and
    the two orders differ."""
    counts = {"alphabet": 0, "text": 0, "other": 0, "wrong": 0}
    for example, row in zip(examples, rows, strict=True):
        if kind_of(row) != "a list in any order" or len(row.references) < 3:
            continue
        text, answer = text_of(row), row.references[0].split()
        in_text, by_alphabet = sorted(answer, key=text.index), sorted(answer)
        if in_text != by_alphabet:
            words = decode_response(example.response, tokenizer).split()
            orders = {"alphabet": words == by_alphabet, "text": words == in_text}
            orders |= {"other": sorted(words) == by_alphabet, "wrong": True}
            counts[next(name for name, is_so in orders.items() if is_so)] += 1
    return counts


def prompt_effect(p, tokenizer, student, P=None):
    """What a prompt P (prompt_length, C) does to the teacher p, as a student by name sees it.

    The KLs and losses on the first reference of each dev row and on the student's own responses;
    ROUGE-L on dev of teacher and student, and how they write lists. P: None for no prompt.
    """
    q, _ = load_model(student, CPU)
    rows = read_rows(find_data_dir("demo") / "dev.jsonl")
    sampled = {"teacher": sample_rows(p, tokenizer, rows, "teacher", P)}
    sampled["student"] = sample_rows(q, tokenizer, rows, "student")
    scores = {}
    for role, examples in sampled.items():
        texts = [decode_response(example.response, tokenizer) for example in examples]
        scores[role] = statistics.fmean(evaluate.rouge_l(texts, [r.references for r in rows]))
    return {
        "rouge_l": scores,
        "references": means_over_tokens(p, q, P, encode_training_rows(rows, tokenizer)),
        "student's responses": means_over_tokens(p, q, P, sampled["student"]),
        "lists": {
            role: count_orders(examples, rows, tokenizer) for role, examples in sampled.items()
        },
    }
