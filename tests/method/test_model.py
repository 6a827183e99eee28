"""GPT-2: the numbers of transformers, the KV cache, dropout, and stored tensors.

PYTHONPATH=.:tests python tests/method/test_model.py     writes tests/golden/gpt2.json, with
                                                         transformers
"""

import json
import weakref
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from helpers import (
    GOLDEN,
    TINY,
    greedy_by_transformers,
    soft_prompt,
    stored_weights,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    transformers_logits,
    transformers_model,
)
from torch.utils._python_dispatch import TorchDispatchMode

from data.process.errors import InputError
from data.sets.rows import fill_template
from model import (
    GPT,
    TRANSPOSED,
    Config,
    KVCache,
    convert_stored,
    from_state,
    from_stored,
    to_stored,
)
from prompt import prepend
from sample import pad

ROWS = [[5, 17, 60, 3, 3, 41, 8], [22], [9, 60, 60, 1, 30, 12, 55, 2, 19, 44, 7]]
PROMPT = soft_prompt(5)


def assert_close(result, expected, atol=1e-4):
    torch.testing.assert_close(result, expected, atol=atol, rtol=0)


def with_prompt(prompt, model, ids):
    """The inputs of a forward pass: ids (B, T), or embeddings (B, prompt_length + T, C)."""
    return ids if prompt is None else prepend(prompt, model, ids)


# --- The numbers of transformers ---


@torch.no_grad()
def our_logits(model, rows, prompt=None):
    """The logits (T, V) of each row, from one right-padded batch."""
    ids, lengths = pad(rows, "cpu")
    logits = model.logits(model(with_prompt(prompt, model, ids)))
    start = 0 if prompt is None else len(prompt)
    assert logits.shape == (len(rows), start + ids.shape[1], model.config.vocab_size)
    return [logits[b, start : start + n] for b, n in enumerate(lengths)]


def golden_values():
    """What transformers computes from the tiny weights: the logits at the end of each row, without
    and with a soft prompt, and greedy tokens."""
    hf, talker = transformers_model(), transformers_model(talker_config())
    eos_token_id = tiny_tokenizer().eot_token
    request = tiny_tokenizer().encode_ordinary(fill_template("Write a task.", ""))

    def last_logits(prompt=None):
        logits = [transformers_logits(hf, row, prompt)[-1].tolist() for row in ROWS]
        return [[round(x, 5) for x in row] for row in logits]

    return {
        "bare": last_logits(),
        "prompted": last_logits(PROMPT),
        "greedy": [greedy_by_transformers(hf, row, 12, None) for row in ROWS],
        "command": greedy_by_transformers(talker, request, 20, eos_token_id),
    }


@pytest.mark.parametrize("name, prompt", [("bare", None), ("prompted", PROMPT)])
def test_logits_equal_the_golden_ones(name, prompt):
    golden = json.loads(GOLDEN.read_text())[name]
    for logits, expected in zip(our_logits(tiny_model(), ROWS, prompt), golden, strict=True):
        assert_close(logits[-1], torch.tensor(expected))


def test_the_golden_file_is_what_transformers_gives():
    golden, values = json.loads(GOLDEN.read_text()), golden_values()
    for name in ("greedy", "command"):
        assert golden[name] == values[name]
    for name in ("bare", "prompted"):
        assert_close(torch.tensor(golden[name]), torch.tensor(values[name]))


def weights_in_layout(layout):
    """The stored weights of TINY under the names of one kind of file."""
    weights = stored_weights(TINY)
    prefix = "transformer." if "prefix" in layout else ""
    weights = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    if "head" in layout:
        weights["lm_head.weight"] = stored_weights(TINY)["wte.weight"].clone()
    if "buffers" in layout:
        causal = torch.ones(TINY.n_positions, TINY.n_positions, dtype=torch.uint8).tril()
        for n in range(TINY.n_layer):
            weights[f"{prefix}h.{n}.attn.bias"] = causal[None, None].clone()
            weights[f"{prefix}h.{n}.attn.masked_bias"] = torch.tensor(-1e4)
    return weights


def nested(*prefixes):
    """The stored weights of TINY under prefixes that wrappers give them."""
    return {"".join(prefixes) + name: tensor for name, tensor in stored_weights(TINY).items()}


PREFIXES = {
    "DDP": ["module."],
    "torch.compile": ["_orig_mod."],
    "DDP of a compiled model of transformers": ["module.", "_orig_mod.", "transformer."],
    "a compiled DDP": ["_orig_mod.", "module.", "transformer."],
    "TRL": ["pretrained_model.", "transformer."],
    "DeepSpeed of TRL": ["module.", "module.", "pretrained_model.", "transformer."],
}


def assert_same_weights(model, expected):
    pairs = zip(model.state_dict().items(), expected.state_dict().items(), strict=True)
    for (name, tensor), (expected_name, expected_tensor) in pairs:
        assert name == expected_name
        assert torch.equal(tensor, expected_tensor), name


# --- The model ---


@pytest.mark.parametrize(
    "n_layer, n_embd, n_head, n_parameters",
    [
        (12, 768, 12, 124_439_808),
        (24, 1024, 16, 354_823_168),
        (36, 1280, 20, 774_030_080),
        (48, 1600, 25, 1_557_611_200),
    ],
)
def test_the_official_sizes_have_their_parameter_counts(n_layer, n_embd, n_head, n_parameters):
    with torch.device("meta"):
        model = GPT(Config(n_layer=n_layer, n_embd=n_embd, n_head=n_head))
    assert model.n_parameters() == n_parameters


def test_the_width_must_be_divisible_among_the_heads():
    with pytest.raises(ValueError, match="n_embd 32, n_head 5: the width can't be divided"):
        GPT(replace(TINY, n_head=5))


def test_the_head_is_the_token_embedding():
    model = tiny_model()
    assert model.head is model.wte.weight
    names = [name for name, _ in model.named_parameters()]
    assert names == list(model.state_dict())
    assert not [name for name in names if "head" in name]
    # Its gradient is the sum of both uses, and a step changes both.
    hidden = torch.randn(3, TINY.n_embd, generator=torch.Generator().manual_seed(1))
    weights = torch.arange(183.0).view(3, 61)
    (model.logits(hidden) * weights).sum().backward()
    assert_close(model.wte.weight.grad, weights.T @ hidden, atol=1e-3)
    with torch.no_grad():
        model.wte.weight[7] = 1.0
        assert_close(model.logits(hidden)[:, 7], hidden.sum(-1))


@pytest.mark.parametrize("prompt", [None, PROMPT], ids=["bare", "prompted"])
@torch.no_grad()
def test_embeddings_as_inputs_give_the_states_of_their_tokens(prompt):
    model = tiny_model()
    ids, _ = pad(ROWS, "cpu")
    if prompt is None:
        assert torch.equal(model(model.wte(ids)), model(ids))
    else:
        inputs = model.wte(ids)
        inputs[:, :5] = prompt  # in place of tokens
        changed = ids.clone()
        changed[:, :5] = 33
        assert (model(inputs) - model(changed)).abs().amin(-1).amax() > 0.01
        assert torch.equal(model(inputs), model(prepend(prompt, model, ids[:, 5:])))


@pytest.mark.parametrize("prompt", [None, PROMPT], ids=["bare", "prompted"])
@torch.no_grad()
def test_a_last_token_beyond_the_positions_is_only_predicted(prompt):
    model = tiny_model()
    prompt_length = 0 if prompt is None else len(prompt)
    ids = torch.arange(49 - prompt_length)[None]  # with the prompt one more than positions
    last = torch.tensor([0]), torch.tensor([47])
    states = model(with_prompt(prompt, model, ids), output_positions=last)
    assert_close(states, model(with_prompt(prompt, model, ids[:, :-1]))[:, -1], atol=1e-5)


@torch.no_grad()
def test_padding_changes_no_state_of_a_real_token():
    model = tiny_model()
    ids, lengths = pad(ROWS, "cpu")
    states, others = model(ids), model(pad(ROWS, "cpu", fill=60)[0])
    for b, n in enumerate(lengths):
        assert_close(states[b, :n], others[b, :n], atol=1e-6)
        assert_close(states[b, :n], model(ids[b : b + 1, :n])[0], atol=1e-5)
    assert (states[1, 1:] - others[1, 1:]).abs().max() > 0.1


@torch.no_grad()
def test_a_token_changes_no_earlier_state():
    model, ids = tiny_model(), torch.tensor([ROWS[2]])
    changed = ids.clone()
    changed[0, 6] = 33
    difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert difference[:6].max() < 1e-6
    assert difference[6:].min() > 1e-3


@pytest.mark.parametrize("prompted", [False, True])
def test_states_at_output_positions_equal_those_of_all_positions(prompted):
    model = GPT(Config(2, 32, 4, 61, 64, 0.0)).init_weights(3)
    ids = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(1))
    prompt = torch.randn(4, 32, requires_grad=True) if prompted else None
    rows, columns = torch.tensor([0, 0, 2, 1]), torch.tensor([0, 8, 3, 7])
    columns += 4 if prompted else 0  # positions count within the inputs
    leaves = [*model.parameters(), *([prompt] if prompted else [])]
    expected = model(with_prompt(prompt, model, ids))[rows, columns]
    states = model(with_prompt(prompt, model, ids), output_positions=(rows, columns))
    assert_close(states, expected, atol=1e-5)
    gradients = torch.autograd.grad(states.square().sum(), leaves)
    expected_gradients = torch.autograd.grad(expected.square().sum(), leaves)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("prompt", [None, PROMPT], ids=["bare", "prompted"])
@torch.no_grad()
def test_decoding_ragged_rows_with_the_cache_equals_the_full_forward(prompt):
    model, starts = tiny_model(), torch.tensor([3, 1, 6])
    texts = [[*ROWS[0], 4, 4, 4, 4], [*ROWS[1], *range(20, 30)], ROWS[2]]  # 11 tokens each
    full = model(with_prompt(prompt, model, torch.tensor(texts)))
    P = 0 if prompt is None else len(prompt)
    cache = KVCache(TINY, 3, P + 11, "cpu", torch.float32)
    ids, _ = pad([text[:n] for text, n in zip(texts, starts)], "cpu", fill=13)
    states = model(with_prompt(prompt, model, ids), cache=cache)
    for b, n in enumerate(starts):
        assert_close(states[b, : P + n], full[b, : P + n], atol=1e-5)
    cache.set_lengths(starts + P)
    ends = starts.clone()
    for n_tokens in [1, 2, 1]:
        new = torch.tensor([text[n : n + n_tokens] for text, n in zip(texts, ends)])
        states = model(new, cache=cache)
        for b, n in enumerate(ends):
            assert_close(states[b], full[b, P + n : P + n + n_tokens], atol=1e-5)
        ends += n_tokens
    assert cache.lengths.tolist() == (ends + P).tolist()


@torch.no_grad()
def test_selected_rows_of_the_cache_decode_as_before():
    model = tiny_model()
    cache = KVCache(TINY, 3, 20, "cpu", torch.float32)
    ids, lengths = pad(ROWS, "cpu")
    model(ids, cache=cache)
    cache.set_lengths(lengths)
    cache.select_rows(torch.tensor([2, 0]))
    for token in [50, 51]:
        states = model(torch.full((2, 1), token), cache=cache)
    for state, row in zip(states, [ROWS[2], ROWS[0]]):
        assert_close(state[0], model(torch.tensor([[*row, 50, 51]]))[0, -1], atol=1e-5)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create: `peak`, of those that are alive at
    once. `storages`: of the tensors that there were before, whose views need no memory."""

    def __init__(self, *tensors):
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.alive, self.peak = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            if result.untyped_storage().data_ptr() not in self.storages:
                self.alive.append(weakref.ref(result))
            created = [tensor for tensor in (r() for r in self.alive) if tensor is not None]
            self.peak = max(self.peak, sum(tensor.nbytes for tensor in created))
        return result


def random_cache(n_rows, max_seq_len, n_tokens):
    """A cache whose rows have so many tokens, with random keys and values."""
    cache = KVCache(TINY, n_rows, max_seq_len, "cpu", torch.float32)
    cache.keys[:, :, :n_tokens] = torch.randn(TINY.n_layer, n_rows, n_tokens, 4, 8)
    cache.values[:, :, :n_tokens] = torch.randn(TINY.n_layer, n_rows, n_tokens, 4, 8)
    cache.extend(n_tokens)
    return cache


@pytest.mark.parametrize("n_kept", range(1, 6))
def test_any_rows_of_the_cache_are_selected_in_its_own_memory(n_kept):
    for kept in combinations(range(5), n_kept):
        cache = random_cache(5, 20, 11)
        cache.set_lengths(torch.tensor([11, 3, 8, 5, 9]))
        before = [cache.keys, cache.values]
        expected = [tensor[:, list(kept), :11].clone() for tensor in before]
        cache.select_rows(torch.tensor(kept))
        for old, new, rows in zip(before, (cache.keys, cache.values), expected):
            assert torch.equal(new[:, :, :11], rows)
            assert new.shape == (TINY.n_layer, n_kept, 20, 4, 8)
            assert new.data_ptr() == old.data_ptr()
        assert cache.lengths.tolist() == [[11, 3, 8, 5, 9][row] for row in kept]


def test_rows_are_selected_from_those_selected_before():
    cache = random_cache(6, 20, 11)
    start, expected = cache.keys.data_ptr(), cache.values[:, [1, 4], :11].clone()
    for rows in ([1, 2, 4, 5], [0, 2, 3], [0, 1]):
        cache.select_rows(torch.tensor(rows))
    assert torch.equal(cache.values[:, :, :11], expected)
    assert cache.keys.data_ptr() == start
    k, v = torch.randn(2, 2, 1, 4, 8)  # (B, T, H, D)
    cache.extend(1)
    _, values = cache.write(1, k, v)
    assert torch.equal(values, torch.cat([expected[1], v], dim=1))


def test_selecting_rows_takes_the_memory_of_one_layer():
    n_layer, n_rows = 12, 8
    cache = KVCache(replace(TINY, n_layer=n_layer), n_rows, 40, "cpu", torch.float32)
    rows = torch.arange(6)
    cache_bytes = cache.keys.nbytes + cache.values.nbytes
    with PeakMemory(cache.keys, cache.values) as memory:
        cache.select_rows(rows)
    layer_bytes = cache_bytes / n_layer / 2
    assert 0 < memory.peak <= layer_bytes
    # This is what the mode counts where all layers are copied at once.
    with PeakMemory(cache.keys) as memory:
        cache.keys[:, rows]
    assert memory.peak == cache.keys.nbytes > 8 * layer_bytes


@torch.no_grad()
def test_dropout_is_on_only_in_training():
    model, bare = tiny_model(replace(TINY, dropout=0.5)), tiny_model()
    ids = torch.tensor([ROWS[2]])
    assert torch.equal(model.eval()(ids), model(ids))
    assert torch.equal(model(ids), bare(ids))
    assert torch.equal(bare.train()(ids), bare.eval()(ids))
    model.train()
    assert not torch.allclose(model(ids), model(ids), atol=1e-2)


@pytest.mark.parametrize("place", ["embedding", "attention", "residual"])
@torch.no_grad()
def test_dropout_is_in_all_three_places(place):
    model, ids = tiny_model(replace(TINY, dropout=0.5)).train(), torch.tensor([ROWS[2]])
    model.drop.p = 0.5 if place == "embedding" else 0.0
    for block in model.h:
        block.attn.dropout = 0.5 if place == "attention" else 0.0
        block.drop.p = 0.5 if place == "residual" else 0.0
    assert not torch.allclose(model(ids), model(ids), atol=1e-2)


@torch.no_grad()
def test_dropout_of_the_embeddings_is_of_their_sum():
    model, ids = tiny_model(replace(TINY, dropout=0.25)).train(), torch.tensor([ROWS[2]])
    inputs = []
    model.h[0].register_forward_pre_hook(lambda block, arguments: inputs.append(arguments[0]))
    model(ids)
    kept = inputs[0] != 0
    assert 0.65 < kept.float().mean() < 0.85
    expected = (model.wte(ids) + model.wpe.weight[:11]) / 0.75
    torch.testing.assert_close(inputs[0][kept], expected[kept])


def test_initial_weights_scale_with_width_and_depth_and_depend_on_the_seed():
    config = replace(TINY, n_layer=8, n_embd=64)
    model, again, other = (GPT(config).init_weights(seed) for seed in (3, 3, 4))
    for (name, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(p, q)
        if p.ndim == 2:
            assert not torch.equal(p, r)
            # 1 / √C = 1 / 8, and √(2 × 8 layers) = 4
            std = 1 / 8 / 4 if "c_proj" in name else 1 / 8
            assert p.std().item() == pytest.approx(std, rel=0.1)
        else:
            assert (p == (1 if name.endswith("weight") else 0)).all()


# --- Stored tensors, without files ---

LAYOUTS = ["plain", "prefix", "buffers", "prefix, head, buffers"]


def test_a_model_equals_its_stored_tensors_and_back():
    model = tiny_model()
    tensors = to_stored(model)
    assert list(tensors) == list(model.state_dict())
    assert tensors.keys() == stored_weights(TINY).keys()
    for name, expected in stored_weights(TINY).items():
        assert torch.equal(tensors[name], expected), name
        assert tensors[name].is_contiguous() and not tensors[name].requires_grad
    again = from_stored(tensors, TINY)
    assert tensors == {}  # emptied on the way
    assert again.config == TINY
    assert_same_weights(again, model)
    assert all(p.requires_grad and p.is_leaf and p.is_contiguous() for p in again.parameters())
    ids = torch.tensor([ROWS[2]])
    assert torch.equal(again.eval()(ids), model(ids))


def test_the_transposed_matrices_are_those_of_the_linear_layers():
    for name, tensor in to_stored(GPT(TINY).init_weights(0)).items():
        module = GPT(TINY).get_submodule(name.rpartition(".")[0])
        is_matrix = isinstance(module, torch.nn.Linear) and name.endswith("weight")
        assert name.endswith(TRANSPOSED) == is_matrix
        shape = module.get_parameter(name.rpartition(".")[2]).shape
        assert tensor.shape == (shape[::-1] if is_matrix else shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_stored_tensors_gives_the_same_model(layout):
    assert_same_weights(from_stored(weights_in_layout(layout), TINY), tiny_model())


@pytest.mark.parametrize("prefixes", PREFIXES.values(), ids=PREFIXES)
def test_stored_tensors_may_have_prefixes_of_wrappers(prefixes):
    assert_same_weights(from_stored(nested(*prefixes), TINY), tiny_model())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_tensors_of_another_dtype_become_float32(dtype):
    weights = {name: tensor.to(dtype) for name, tensor in stored_weights(TINY).items()}
    expected = {name: tensor.float() for name, tensor in weights.items()}
    model = from_stored(weights, TINY)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    stored = to_stored(model.to(dtype))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert all(torch.equal(stored[name], expected[name]) for name in expected)


def test_stored_tensors_are_converted_all_or_some():
    names = ["h.1.attn.c_attn.weight", "ln_f.bias", "lm_head.weight"]
    weights = weights_in_layout("prefix, head, buffers")
    some = {name: weights[name] for name in (f"transformer.{names[0]}", *names[2:])}
    some["module.ln_f.bias"] = weights["transformer.ln_f.bias"]
    some["h.0.attn.bias"] = weights["transformer.h.0.attn.bias"]
    state = convert_stored(some, TINY)
    assert some == {}
    assert state.keys() == set(names)
    expected = tiny_model().state_dict()
    assert torch.equal(state["h.1.attn.c_attn.weight"], expected["h.1.attn.c_attn.weight"])
    assert torch.equal(state["lm_head.weight"], expected["wte.weight"])


@pytest.mark.parametrize("with_head", [False, True])
def test_stored_embeddings_lose_their_last_rows(with_head):
    weights = weights_in_layout("head" if with_head else "plain")
    weights["wte.weight"][59:] = torch.nan  # padding rows may hold anything
    model = from_stored(weights, TINY, vocab_size=59)
    assert model.config == replace(TINY, vocab_size=59)
    assert torch.equal(model.head, stored_weights(TINY)["wte.weight"][:59])
    assert model.wte.weight.untyped_storage().nbytes() == 59 * TINY.n_embd * 4


def with_value(value):
    def change(tensor):
        tensor[3] = value
        return tensor

    return change


# What is wrong with stored tensors: a tensor's name, a function of the old tensor that returns the
# new one (None removes it), and what the message says.
WRONG_TENSORS = {
    "tensor missing": ("h.1.mlp.c_fc.bias", None, "'h.1.mlp.c_fc.bias' is missing"),
    "no embedding": ("wte.weight", None, "'wte.weight' is missing"),
    "wrong shape": (
        "wpe.weight",
        lambda t: t[:-1].clone(),
        "'wpe.weight' has shape (47, 32), which does not fit config.json",
    ),
    "not transposed": (
        "h.0.attn.c_attn.weight",
        lambda t: t.T.contiguous(),
        "'h.0.attn.c_attn.weight' has shape (96, 32)",
    ),
    "a vector for a matrix": (
        "h.0.mlp.c_fc.weight",
        lambda t: t[0].clone(),
        "'h.0.mlp.c_fc.weight' has shape (128,)",
    ),
    "integers": ("wte.weight", torch.Tensor.long, "'wte.weight' is torch.int64"),
    "NaN": ("ln_f.bias", with_value(float("nan")), "'ln_f.bias' has values that are not finite"),
    "infinite": (
        "h.1.attn.c_proj.weight",
        with_value(float("-inf")),
        "'h.1.attn.c_proj.weight' has values that are not finite",
    ),
    "a tensor of another model": (
        "score.weight",
        lambda _: torch.ones(2, 32),
        "'score.weight' is not part of a GPT-2 with 2 layers",
    ),
    "another head": (
        "lm_head.weight",
        lambda _: torch.ones(61, 32),
        "'lm_head.weight' differs from 'wte.weight'",
    ),
    "a tensor with and without a prefix": (
        "module.wte.weight",
        lambda _: torch.ones(61, 32),
        "is stored twice; keep one tensor for 'wte.weight'",
    ),
}


def changed_weights(name, change):
    """The stored weights with one tensor replaced by a function of the old one, or removed."""
    tensors = stored_weights(TINY)
    old = tensors.pop(name, None)
    return tensors if change is None else tensors | {name: change(old)}


@pytest.mark.parametrize("name, change, message", WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_wrong_stored_tensors_are_a_value_error(name, change, message):
    """With a file they are an InputError: see DAMAGES."""
    with pytest.raises(ValueError) as caught:
        from_stored(changed_weights(name, change), TINY)
    text = str(caught.value)
    assert not isinstance(caught.value, InputError)
    assert text.startswith("tensor '") and message in text and "\n" not in text


def test_another_number_of_layers_is_a_value_error():
    message = r"^tensor 'h\.1\..*' is not part of a GPT-2 with 1 layers"
    with pytest.raises(ValueError, match=message):
        from_stored(stored_weights(TINY), replace(TINY, n_layer=1))
    with pytest.raises(ValueError, match=r"^tensor 'h\.2\.ln_1\.weight' is missing"):
        from_stored(stored_weights(TINY), replace(TINY, n_layer=3))
    with pytest.raises(ValueError, match=r"^tensor 'wpe.weight' is missing"):
        from_state(convert_stored({"wte.weight": torch.ones(61, 32)}, TINY), TINY)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden_values()).replace("], ", "],\n") + "\n")
