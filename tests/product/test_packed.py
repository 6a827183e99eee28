"""Packed weights: the same numbers, and nothing left behind."""

import platform

import pytest
import torch
from test_model import assert_close

from data.process.packed import packed_linear, packed_weights
from model import GPT, Config, precision

# --- Packed weights ---

PACKABLE = Config(2, 288, 4, 1_009, 64)
CAN_PACK = platform.machine() == "x86_64" and torch.backends.mkldnn.is_available()


def packed_names(model):
    """The names of a model's methods that have been replaced, and of its modules' methods."""
    return [
        f"{name}.{method}".lstrip(".")
        for name, module in model.named_modules()
        for method in ("logits", "forward")
        if method in vars(module)
    ]


def attributes(model):
    """All attributes of a model and of its modules, by name."""
    return {name: dict(vars(module)) for name, module in model.named_modules()}


MLP = [f"h.{n}.mlp.{name}.forward" for n in (0, 1) for name in ("c_fc", "c_proj")]


@pytest.mark.parametrize("n_rows, n_tokens", [(1, 1), (3, 1), (64, 1), (5, 40)])
@torch.no_grad()
def test_packed_weights_give_the_same_states_and_logits_and_are_removed(n_rows, n_tokens):
    model = GPT(PACKABLE).init_weights(3).eval()
    before = attributes(model)
    generator = torch.Generator().manual_seed(n_rows)
    ids = torch.randint(1_009, (n_rows, n_tokens), generator=generator)
    expected = model(ids)
    with packed_weights([model], "float32"):
        hidden, names = model(ids), packed_names(model)
        logits = model.logits(hidden)
    assert_close(hidden, expected)
    assert_close(logits, model.logits(expected))
    if CAN_PACK:  # all others are small
        assert names == ["logits", *MLP]
    assert attributes(model) == before
    assert torch.equal(model(ids), expected)


@pytest.mark.skipif(not CAN_PACK, reason="no oneDNN on x86")
@pytest.mark.parametrize("shape", [(1,), (3,), (64,), (300,), (2, 7), ()])
@pytest.mark.parametrize("with_bias", [False, True])
@torch.no_grad()
def test_a_packed_product_equals_f_linear(shape, with_bias):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(1_009, 288, generator=generator) / 288**0.5
    bias = torch.randn(1_009, generator=generator) if with_bias else None
    x = torch.randn(*shape, 288, generator=generator)
    expected = torch.nn.functional.linear(x, weight, bias)
    assert_close(packed_linear(weight, bias)(x), expected, atol=1e-5)


@torch.no_grad()
def test_in_bfloat16_only_the_head_is_packed():
    model = GPT(PACKABLE).init_weights(3).eval()
    before, ids = attributes(model), torch.arange(6).view(3, 2)
    cpu = torch.device("cpu")
    with precision(cpu, "bfloat16"):
        expected = model(ids)
        expected_logits = model.logits(expected)
        with packed_weights([model], "bfloat16"):
            hidden, names = model(ids), packed_names(model)
            logits = model.logits(hidden)
    assert torch.equal(hidden, expected)
    assert logits.dtype == torch.float32
    assert_close(logits, expected_logits)
    if CAN_PACK:
        assert names == ["logits"]
    assert attributes(model) == before


@torch.no_grad()
def test_several_models_are_packed_and_others_are_not():
    models = [GPT(PACKABLE).init_weights(seed).eval() for seed in range(3)]
    ids = torch.arange(6).view(3, 2)
    expected = [model.logits(model(ids)) for model in models]
    with packed_weights(models[:2], "float32"):
        logits = [model.logits(model(ids)) for model in models]
        names = [packed_names(model) for model in models]
    for result, expected_result in zip(logits, expected, strict=True):
        assert_close(result, expected_result)
    if CAN_PACK:
        assert names == [["logits", *MLP]] * 2 + [[]]
    assert [packed_names(model) for model in models] == [[]] * 3


@torch.no_grad()
def test_a_model_may_be_packed_twice():
    """As student and teacher of a mixture, or in a context within another."""
    model, ids = GPT(PACKABLE).init_weights(3).eval(), torch.arange(6).view(3, 2)
    before, expected = attributes(model), model.logits(model(ids))
    with packed_weights([model, model], "float32"):
        assert_close(model.logits(model(ids)), expected)
    assert attributes(model) == before
    with packed_weights([model], "float32"):
        with packed_weights([model], "bfloat16"):
            pass
        assert_close(model.logits(model(ids)), expected)
    assert attributes(model) == before


@pytest.mark.parametrize("reason", ["no oneDNN", "another processor"])
@torch.no_grad()
def test_without_onednn_on_x86_the_plain_product_is_used(monkeypatch, reason):
    if reason == "no oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(torch.ops, "mkldnn", None)  # any use of a private operator fails
    model = GPT(PACKABLE).init_weights(3).eval()
    ids = torch.arange(6).view(3, 2)
    expected = model(ids)
    with packed_weights([model], "float32"):
        hidden = model(ids)
        assert packed_names(model) == []
        assert torch.equal(hidden, expected)
        assert torch.equal(model.logits(hidden), expected @ model.wte.weight.T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_weights_are_removed_after_an_error(dtype):
    model = GPT(PACKABLE).init_weights(3)
    before = attributes(model)
    with pytest.raises(ZeroDivisionError), packed_weights([model], dtype):
        raise ZeroDivisionError
    assert packed_names(model) == []
    assert attributes(model) == before


@pytest.mark.skipif(not CAN_PACK, reason="no oneDNN on x86")
def test_packed_weights_are_removed_if_the_memory_does_not_suffice_for_all(monkeypatch):
    packed = []

    def pack(weight, bias=None):
        if len(packed) == 3:
            raise MemoryError
        packed.append(weight)
        return packed_linear(weight, bias)

    model = GPT(PACKABLE).init_weights(3)
    before = attributes(model)
    monkeypatch.setattr("data.process.packed.packed_linear", pack)
    with pytest.raises(MemoryError), packed_weights([model], "float32"):
        pytest.fail("the context has begun")
    assert len(packed) == 3
    assert attributes(model) == before


def test_float64_weights_are_not_packed():
    model = GPT(PACKABLE).double()
    with packed_weights([model], "float32"):
        assert packed_names(model) == []
