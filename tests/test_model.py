"""GPT-2: the numbers of transformers, the KV cache, dropout, and checkpoint directories.

PYTHONPATH=. python tests/test_model.py      writes tests/golden/gpt2.json, with transformers
"""

import errno
import json
import os
import platform
import struct
import weakref
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from helpers import (
    GOLDEN,
    TINY,
    greedy_by_transformers,
    hf_config,
    soft_prompt,
    stored_weights,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    transformers_logits,
    transformers_model,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from data.models.checkpoint import load, save
from data.models.tokenizer import load_tokenizer, tokenizer_files
from data.process.errors import InputError
from data.process.packed import packed_linear, packed_weights
from data.sets.rows import fill_template
from model import (
    GPT,
    TRANSPOSED,
    Config,
    KVCache,
    convert_stored,
    from_state,
    from_stored,
    precision,
    to_stored,
)
from prompt import prepend
from sample import pad

ROWS = [[5, 17, 60, 3, 3, 41, 8], [22], [9, 60, 60, 1, 30, 12, 55, 2, 19, 44, 7]]
PROMPT = soft_prompt(5)
TEXTS = [
    "Below is an instruction.",
    "don't  stop\n\n\tnow 123,456",
    "naïve café — 大きさ 🙂",
    " leading and trailing ",
    "<|endofte",
]


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


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("layout", ["plain", "prefix", "buffers", "prefix, head, buffers"])
def test_every_layout_gives_the_logits_of_transformers(tmp_path, layout, file):
    hf = transformers_model()
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    write = save_file if file.endswith("safetensors") else torch.save
    write(weights_in_layout(layout), tmp_path / file)
    model = load(tmp_path).eval()
    for prompt in [None, PROMPT]:
        for row, logits in zip(ROWS, our_logits(model, ROWS, prompt), strict=True):
            assert_close(logits, transformers_logits(hf, row, prompt))


def test_a_model_saved_by_transformers_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 3, "n_embd": 24, "n_head": 2, "vocab_size": 61, "n_positions": 32}
    torch.manual_seed(1)
    config = transformers.GPT2Config(**sizes, initializer_range=0.3)
    hf = transformers.GPT2LMHeadModel(config).eval()
    hf.save_pretrained(tmp_path)
    model = load(tmp_path).eval()
    assert model.config == Config(**sizes, dropout=0.1)
    ids, lengths = pad(ROWS, "cpu")
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        expected = hf(ids, attention_mask=mask).logits  # right-padded, as ours
    for b, logits in enumerate(our_logits(model, ROWS)):
        assert_close(logits, expected[b, : len(logits)])


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


@pytest.mark.parametrize("prefixes", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_prefixes_of_wrappers_are_stripped_in_any_nesting(tmp_path, prefixes, file):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    weights = nested(*prefixes)
    head = "".join(prefixes).removesuffix("transformer.") + "lm_head.weight"
    weights[head] = stored_weights(TINY)["wte.weight"].clone()
    write = save_file if file.endswith("safetensors") else torch.save
    write(weights, tmp_path / file)
    assert_same_weights(load(tmp_path), tiny_model())


def test_prefixes_within_a_name_are_stripped(tmp_path):
    write_checkpoint(tmp_path)
    weights = stored_weights(TINY)
    blocks = {name: name.replace("h.1.", "h.1._orig_mod.") for name in weights}
    save_file({blocks[name]: tensor for name, tensor in weights.items()}, tmp_path / WEIGHTS)
    assert_same_weights(load(tmp_path), tiny_model())


def assert_same_weights(model, expected):
    pairs = zip(model.state_dict().items(), expected.state_dict().items(), strict=True)
    for (name, tensor), (expected_name, expected_tensor) in pairs:
        assert name == expected_name
        assert torch.equal(tensor, expected_tensor), name


def write_shards(directory, weights, n_shards, file="model.safetensors"):
    """Weights in shards with an index, as transformers names them."""
    (directory / "model.safetensors").unlink(missing_ok=True)
    stem, suffix = os.path.splitext(file)
    weight_map = {}
    for n in range(n_shards):
        shard = f"{stem}-{n + 1:05}-of-{n_shards:05}{suffix}"
        names = sorted(weights)[n::n_shards]
        write = save_file if suffix == ".safetensors" else torch.save
        write({name: weights[name] for name in names}, directory / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / f"{file}.index.json").write_text(json.dumps(index))
    return weight_map


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("layout", ["plain", "prefix, head, buffers"])
def test_sharded_weights_are_those_of_one_file(tmp_path, file, layout):
    write_checkpoint(tmp_path)
    write_shards(tmp_path, weights_in_layout(layout), 3, file)
    assert_same_weights(load(tmp_path), tiny_model())


def test_shards_written_by_transformers_load(tmp_path):
    hf = transformers_model()
    hf.save_pretrained(tmp_path, max_shard_size="40kB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_weights(load(tmp_path), tiny_model())


def test_tensors_move_to_the_device_one_by_one(tmp_path, monkeypatch):
    """The device `meta` stands for a GPU. It has no values, so the check of them is left out."""
    write_checkpoint(tmp_path)
    alive = []

    class Watched(dict):
        """Tensors that come into being when they are taken out."""

        def pop(self, name):
            assert sum(reference() is not None for reference in alive) <= 1
            tensor = super().pop(name).clone()
            alive.append(weakref.ref(tensor))
            return tensor

    files = [(tmp_path / WEIGHTS, Watched(stored_weights(TINY)))]
    monkeypatch.setattr("data.models.checkpoint.read_tensor_files", lambda directory: files)
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones(1))
    tensors = list(load(tmp_path, device="meta").state_dict().values())
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {("meta", torch.float32)}
    assert len(alive) == len(tensors)


def test_only_one_shard_is_in_memory_at_a_time(tmp_path, monkeypatch):
    write_checkpoint(tmp_path)
    write_shards(tmp_path, stored_weights(TINY), 4)
    alive = []

    def load_and_watch(path):
        assert sum(reference() is not None for reference in alive) <= 1
        tensors = {name: tensor.double() for name, tensor in load_file(path).items()}
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        return tensors

    monkeypatch.setattr("data.models.tensors.read_tensor_file", load_and_watch)
    assert_same_weights(load(tmp_path), tiny_model())
    assert len(alive) == len(stored_weights(TINY))


@pytest.mark.parametrize("with_head", [False, True])
def test_only_so_many_rows_of_the_embedding_are_kept(tmp_path, with_head):
    write_checkpoint(tmp_path)
    weights = stored_weights(TINY)
    weights["wte.weight"][-1] = torch.nan  # a padding row may hold anything
    if with_head:
        weights["lm_head.weight"] = weights["wte.weight"].clone()
        weights["lm_head.weight"][-2] = 0
    save_file(weights, tmp_path / WEIGHTS)
    model = load(tmp_path, vocab_size=59)
    assert model.config == replace(TINY, vocab_size=59, dropout=0.1)
    assert torch.equal(model.wte.weight, weights["wte.weight"][:59])
    save(model, tmp_path)
    assert load(tmp_path).config.vocab_size == 59


def test_the_end_token_is_the_last_one_or_the_given_one(tmp_path):
    for given, expected in [(None, 60), (0, 0), (7, 7)]:
        save(tiny_model(), tmp_path, given)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["bos_token_id"] == config["eos_token_id"] == expected


def test_a_model_saved_by_us_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = tiny_model(talker_config()), tiny_tokenizer()
    save(model, tmp_path)
    for name, text in zip(["vocab.json", "merges.txt"], tokenizer_files(tokenizer)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        tokens = tokenizer.encode_ordinary(text)
        assert hf_tokenizer.encode(text) == tokens
        assert load_tokenizer(tmp_path).encode_ordinary(text) == tokens
        assert hf_tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text
        assert_close(our_logits(model, [tokens])[0], transformers_logits(hf, tokens))
    assert hf_tokenizer.eos_token_id == hf.config.eos_token_id == tokenizer.eot_token
    assert hf_tokenizer.encode("a<|endoftext|>")[-1] == tokenizer.eot_token


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


# --- Writing and reading ---


def test_a_saved_model_loads_bit_for_bit(tmp_path):
    model = tiny_model(replace(TINY, dropout=0.25))
    first, second = tmp_path / "a" / "b", tmp_path / "c"
    save(model, first)
    loaded = load(first)
    assert loaded.config == model.config
    pairs = zip(model.state_dict().items(), loaded.state_dict().items(), strict=True)
    for (name, p), (other_name, q) in pairs:
        assert name == other_name
        assert torch.equal(p, q)
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    save(loaded, second)
    for file in ["config.json", "model.safetensors"]:
        assert (second / file).read_bytes() == (first / file).read_bytes()


def test_saved_tensors_have_the_stored_form(tmp_path):
    save(tiny_model(), tmp_path)
    saved, expected = load_file(tmp_path / "model.safetensors"), stored_weights(TINY)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_dropout_comes_from_the_config_unless_given(tmp_path):
    write_checkpoint(tmp_path)
    assert load(tmp_path).config.dropout == 0.1
    assert load(tmp_path, dropout=0.0).config.dropout == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_become_float32(tmp_path, dtype):
    write_checkpoint(tmp_path)
    weights = {name: tensor.to(dtype) for name, tensor in stored_weights(TINY).items()}
    save_file(weights, tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.wpe.weight, weights["wpe.weight"].float())


def test_safetensors_take_precedence_over_a_pickle(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    load(tmp_path)


def test_saving_leaves_only_the_two_files(tmp_path):
    save(tiny_model(), tmp_path)
    save(tiny_model(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = tiny_model()
    save(model, tmp_path)

    def full_disk(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data.process.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space") as caught:
        save(GPT(TINY).init_weights(0), tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.equal(load(tmp_path).wte.weight, model.wte.weight)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


# --- Damaged checkpoints ---

CONFIG, WEIGHTS, PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"


def config_with(**fields):
    """Replace these fields of config.json; None removes one."""

    def damage(directory):
        values = {**hf_config(TINY), **fields}
        values = {name: value for name, value in values.items() if value is not None}
        (directory / CONFIG).write_text(json.dumps(values))

    return damage


def config_bytes(content):
    def damage(directory):
        (directory / CONFIG).write_bytes(content)

    return damage


def remove(name):
    def damage(directory):
        (directory / name).unlink()

    return damage


def config_is_a_directory(directory):
    (directory / CONFIG).unlink()
    (directory / CONFIG).mkdir()


def tensor_with(name, change):
    """Replace a tensor by a function of the old one; None removes it."""

    def damage(directory):
        save_file(changed_weights(name, change), directory / WEIGHTS)

    return damage


def tensors_added(**shapes):
    """Tensors beside those of a language model, with __ for the dots of their names."""

    def damage(directory):
        tensors = {f"transformer.{name}": tensor for name, tensor in stored_weights(TINY).items()}
        for name, shape in shapes.items():
            tensors[name.replace("__", ".")] = torch.ones(shape)
        save_file(tensors, directory / WEIGHTS)

    return damage


INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00003.safetensors"


def sharded(damage_shards=None, tensors=()):
    """Shards with an index, of which one is damaged or has more tensors."""

    def damage(directory):
        write_shards(directory, stored_weights(TINY), 3)
        content = load_file(directory / SHARD)
        content |= {name: stored_weights(TINY)[name] for name in tensors}
        if damage_shards is not None:
            damage_shards(directory, content)
        else:
            save_file(content, directory / SHARD)

    return damage


def shard_without_a_tensor(directory, content):
    content.pop("h.0.attn.c_attn.weight")
    save_file(content, directory / SHARD)


def shard_missing(directory, content):
    (directory / SHARD).unlink()


def shard_truncated(directory, content):
    (directory / SHARD).write_bytes((directory / SHARD).read_bytes()[:-10])


def lfs_pointer(name):
    def damage(directory):
        if name in (SHARD, INDEX):
            write_shards(directory, stored_weights(TINY), 3)
        if name == PICKLE:
            (directory / WEIGHTS).unlink()
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 548105171\n"
        (directory / name).write_text(pointer)

    return damage


POINTER = "is a git-lfs pointer, not the file itself; run `git lfs pull`"


def file_bytes(change):
    """Replace the content of the weights' file by a function of the old one."""

    def damage(directory):
        path = directory / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return damage


def header_with(**fields):
    """Change the entry of wte.weight in the JSON header of the weights' file."""

    def change(content):
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        header["wte.weight"].update(fields)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return file_bytes(change)


def pickled(content, n_cut=0):
    """Replace the weights by a pickle, of which the last bytes are cut off."""

    def damage(directory):
        (directory / WEIGHTS).unlink()
        torch.save(content, directory / PICKLE)
        data = (directory / PICKLE).read_bytes()
        (directory / PICKLE).write_bytes(data[: len(data) - n_cut])

    return damage


class Code:
    """Its pickle makes a directory when it is loaded with the right to run code."""

    def __reduce__(self):
        return os.mkdir, ("run-by-a-pickle",)


DAMAGES = {
    **{
        what: (tensor_with(name, change), WEIGHTS, message)
        for what, (name, change, message) in WRONG_TENSORS.items()
    },
    "no config": (remove(CONFIG), CONFIG, "no such file"),
    "config truncated": (config_bytes(b'{"n_layer": 2,'), CONFIG, "can't be read as JSON"),
    "config is a list": (config_bytes(b"[1, 2]"), CONFIG, "must be a JSON object"),
    "config is not UTF-8": (config_bytes(b'{"n_layer": "\xff"}'), CONFIG, "can't be read"),
    "config is a directory": (config_is_a_directory, CONFIG, "can't be read"),
    "config nested too deep": (config_bytes(b"[" * 100_000), CONFIG, "can't be read"),
    "field missing": (config_with(n_embd=None), CONFIG, "'n_embd' must be an integer"),
    "field a string": (config_with(n_layer="2"), CONFIG, "'n_layer'"),
    "field a fraction": (config_with(vocab_size=61.0), CONFIG, "'vocab_size'"),
    "field zero": (config_with(n_head=0), CONFIG, "'n_head'"),
    "field a boolean": (config_with(n_head=True), CONFIG, "'n_head'"),
    "too many layers": (config_with(n_layer=10**9), CONFIG, "'n_layer'"),
    "too wide": (config_with(n_embd=4 * 10**12), CONFIG, "'n_embd'"),
    "heads that don't divide": (config_with(n_head=5), CONFIG, "n_head 5"),
    "model type": (config_with(model_type="gpt_neo"), CONFIG, "'model_type'"),
    "activation": (
        config_with(activation_function="relu"),
        CONFIG,
        "'activation_function' is 'relu'",
    ),
    "epsilon": (config_with(layer_norm_epsilon=1e-6), CONFIG, "'layer_norm_epsilon'"),
    "width of the MLP": (config_with(n_inner=64), CONFIG, "'n_inner' is 64"),
    "untied head": (config_with(tie_word_embeddings=False), CONFIG, "'tie_word_embeddings'"),
    "attention unscaled": (config_with(scale_attn_weights=False), CONFIG, "'scale_attn_weights'"),
    "attention scaled by layer": (
        config_with(scale_attn_by_inverse_layer_idx=True),
        CONFIG,
        "'scale_attn_by_inverse_layer_idx'",
    ),
    "cross attention": (config_with(add_cross_attention=True), CONFIG, "'add_cross_attention'"),
    "dropout of 1": (config_with(resid_pdrop=1.0), CONFIG, "'resid_pdrop'"),
    "dropout not a number": (config_with(resid_pdrop="0.1"), CONFIG, "'resid_pdrop'"),
    "no weights": (remove(WEIGHTS), WEIGHTS, "no such file"),
    "layer missing": (config_with(n_layer=3), WEIGHTS, "'h.2.ln_1.weight' is missing"),
    "another width": (config_with(n_embd=64), WEIGHTS, "does not fit config.json"),
    "a layer too many": (config_with(n_layer=1), WEIGHTS, "'h.1."),
    "safetensors truncated": (file_bytes(lambda data: data[:-100]), WEIGHTS, "truncated"),
    "header truncated": (file_bytes(lambda data: data[:50]), WEIGHTS, "truncated"),
    "safetensors empty": (file_bytes(lambda _: b""), WEIGHTS, "truncated"),
    "a web page": (file_bytes(lambda _: b"<html><body>Not found"), WEIGHTS, "truncated"),
    "header of an absurd length": (
        file_bytes(lambda data: struct.pack("<Q", 1 << 60) + data[8:]),
        WEIGHTS,
        "truncated",
    ),
    "header with another shape": (header_with(shape=[61, 31]), WEIGHTS, "truncated"),
    "header with offsets past the end": (
        header_with(data_offsets=[0, 1 << 40]),
        WEIGHTS,
        "truncated",
    ),
    "header with an unknown type": (header_with(dtype="F99"), WEIGHTS, "truncated"),
    "pickle truncated": (pickled(stored_weights(TINY), n_cut=2000), PICKLE, "truncated"),
    "pickle with code": (pickled({"wte.weight": Code()}), PICKLE, "not a file of tensors"),
    "pickle of a training state": (
        pickled({"model": stored_weights(TINY), "step": 3}),
        PICKLE,
        "dictionary of tensors",
    ),
    "a value head": (
        tensors_added(v_head__summary__weight=(1, 32), v_head__summary__bias=(1,)),
        WEIGHTS,
        "save the language model alone: no value head",
    ),
    "a value head of a wrapped model": (
        tensors_added(module__v_head__summary__weight=(1, 32)),
        WEIGHTS,
        "'module.v_head.summary.weight' is not part of a GPT-2",
    ),
    "a reward model": (
        tensors_added(score__weight=(1, 32)),
        WEIGHTS,
        "'score.weight' is not part of a GPT-2",
    ),
    "a LoRA adapter": (
        tensors_added(transformer__h__0__attn__c_attn__lora_A__default__weight=(8, 32)),
        WEIGHTS,
        "LoRA merged (merge_and_unload)",
    ),
    "a shard without a tensor": (
        sharded(shard_without_a_tensor),
        INDEX,
        "tensor 'h.0.attn.c_attn.weight' is missing",
    ),
    "a shard missing": (sharded(shard_missing), SHARD, "no such file"),
    "a shard truncated": (sharded(shard_truncated), SHARD, "truncated"),
    "a tensor in two shards": (
        sharded(tensors=stored_weights(TINY)),
        ("model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"),
        "is stored twice",
    ),
    "a pointer as safetensors": (lfs_pointer(WEIGHTS), WEIGHTS, POINTER),
    "a pointer as pickle": (lfs_pointer(PICKLE), PICKLE, POINTER),
    "a pointer as shard": (lfs_pointer(SHARD), SHARD, POINTER),
    "a pointer as index": (lfs_pointer(INDEX), INDEX, POINTER),
    "a pointer as config": (lfs_pointer(CONFIG), CONFIG, POINTER),
    "pickle of a list": (pickled([torch.ones(2)]), PICKLE, "dictionary of tensors"),
}


@pytest.mark.parametrize("damage, file, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_gives_one_line_with_the_file(
    tmp_path, monkeypatch, damage, file, message
):
    monkeypatch.chdir(tmp_path)
    directory = write_checkpoint(tmp_path / "checkpoint")
    load(directory)
    damage(directory)
    with pytest.raises(InputError) as caught:
        load(directory)
    text = str(caught.value)
    files = [file] if isinstance(file, str) else file
    assert text.startswith(tuple(f"{directory / file}: " for file in files))
    assert message in text
    assert "\n" not in text
    assert not (tmp_path / "run-by-a-pickle").exists()


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden_values()).replace("], ", "],\n") + "\n")
