"""Checkpoint directories: all layouts that occur, what is written, and damaged ones."""

import errno
import json
import os
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import (
    TINY,
    hf_config,
    stored_weights,
    talker_config,
    tiny_model,
    tiny_tokenizer,
    transformers_logits,
    transformers_model,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from test_model import (
    PREFIXES,
    PROMPT,
    ROWS,
    assert_close,
    assert_same_weights,
    nested,
    our_logits,
    weights_in_layout,
)

from data.models.checkpoint import load, save
from data.models.tokenizer import load_tokenizer, tokenizer_files
from data.process.errors import InputError
from model import GPT, Config
from sample import pad

TEXTS = [
    "Below is an instruction.",
    "don't  stop\n\n\tnow 123,456",
    "naïve café — 大きさ 🙂",
    " leading and trailing ",
    "<|endofte",
]

# --- Layouts ---


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


# What tests/product/test_bad_input.py does not damage
DAMAGES = {
    "activation": (
        config_with(activation_function="relu"),
        CONFIG,
        "'activation_function' is 'relu'",
    ),
    "epsilon": (config_with(layer_norm_epsilon=1e-6), CONFIG, "'layer_norm_epsilon'"),
    "untied head": (config_with(tie_word_embeddings=False), CONFIG, "'tie_word_embeddings'"),
    "attention unscaled": (config_with(scale_attn_weights=False), CONFIG, "'scale_attn_weights'"),
    "attention scaled by layer": (
        config_with(scale_attn_by_inverse_layer_idx=True),
        CONFIG,
        "'scale_attn_by_inverse_layer_idx'",
    ),
    "cross attention": (config_with(add_cross_attention=True), CONFIG, "'add_cross_attention'"),
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
}


@pytest.mark.parametrize("damage, file, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_gives_one_line_with_the_file(tmp_path, damage, file, message):
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
