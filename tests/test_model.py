"""GPT-2: the same numbers as transformers, the KV cache, dropout, and reading and writing checkpoint directories.

PYTHONPATH=. python tests/test_model.py      makes tests/golden/gpt2.json anew, with transformers
"""

import json
import os
import platform
import struct
from dataclasses import replace

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

from data.cli import InputError
from data.rows import fill_template, pad
from data.tokenizer import load_tokenizer, tokenizer_files
from model import GPT, Config, KVCache, load, packed_weights, save

ROWS = [[5, 17, 60, 3, 3, 41, 8], [22], [9, 60, 60, 1, 30, 12, 55, 2, 19, 44, 7]]
PROMPT = soft_prompt(5)
TEXTS = [
    "Below is an instruction.",
    "don't  stop\n\n\tnow 123,456",
    "naïve café — 大きさ 🙂",
    " leading and trailing ",
    "<|endofte",
]


# ---- transformers' numbers ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def our_logits(model, rows, prompt=None):
    """The logits (T, V) of each row, from one right-padded batch."""
    ids, lengths = pad(rows, "cpu")
    logits = model.logits(model(ids, prefix=prompt))
    start = 0 if prompt is None else len(prompt)
    assert logits.shape == (len(rows), start + ids.shape[1], model.config.vocab_size)
    return [logits[b, start : start + n] for b, n in enumerate(lengths)]


def golden_values():
    """What transformers makes of the tiny weights: the logits at each row's end, bare and behind a soft prompt, and greedy tokens."""
    hf, talker = transformers_model(), transformers_model(talker_config())
    tokenizer = tiny_tokenizer()
    request = tokenizer.encode_ordinary(fill_template("Write a task.", ""))
    return {
        "bare": [[round(x, 5) for x in transformers_logits(hf, row)[-1].tolist()] for row in ROWS],
        "prompted": [
            [round(x, 5) for x in transformers_logits(hf, row, PROMPT)[-1].tolist()] for row in ROWS
        ],
        "greedy": [greedy_by_transformers(hf, row, 12, end=None) for row in ROWS],
        "command": greedy_by_transformers(talker, request, 20, end=tokenizer.eot_token),
    }


def test_logits_equal_the_golden_ones():
    golden = json.loads(GOLDEN.read_text())
    for name, prompt in [("bare", None), ("prompted", PROMPT)]:
        for ours, theirs in zip(our_logits(tiny_model(), ROWS, prompt), golden[name], strict=True):
            torch.testing.assert_close(ours[-1], torch.tensor(theirs), atol=1e-4, rtol=0)


def test_the_golden_file_is_what_transformers_gives():
    golden, now = json.loads(GOLDEN.read_text()), golden_values()
    assert golden["greedy"] == now["greedy"] and golden["command"] == now["command"]
    for name in ["bare", "prompted"]:
        torch.testing.assert_close(
            torch.tensor(golden[name]), torch.tensor(now[name]), atol=1e-4, rtol=0
        )


def spelt(layout):
    """The stored weights of TINY in one of the spellings that files of transformers have."""
    weights = stored_weights(TINY)
    if layout in ("prefixed", "prefixed, head, buffers"):
        weights = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    if "head" in layout:
        weights["lm_head.weight"] = stored_weights(TINY)["wte.weight"].clone()
    if "buffers" in layout:
        name = "h.{}.attn.{}" if layout == "buffers" else "transformer.h.{}.attn.{}"
        for n in range(TINY.n_layer):
            weights[name.format(n, "bias")] = torch.ones(
                TINY.n_positions, TINY.n_positions, dtype=torch.uint8
            ).tril()[None, None]
            weights[name.format(n, "masked_bias")] = torch.tensor(-1e4)
    return weights


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("layout", ["plain", "prefixed", "buffers", "prefixed, head, buffers"])
def test_every_spelling_gives_transformers_logits(tmp_path, layout, file):
    hf = transformers_model()
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    (save_file if file.endswith("safetensors") else torch.save)(spelt(layout), tmp_path / file)
    model = load(tmp_path).eval()
    for prompt in [None, PROMPT]:
        for row, ours in zip(ROWS, our_logits(model, ROWS, prompt), strict=True):
            torch.testing.assert_close(
                ours, transformers_logits(hf, row, prompt), atol=1e-4, rtol=0
            )


def test_a_model_that_transformers_made_and_saved_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=3, n_embd=24, n_head=2, vocab_size=61, n_positions=32, initializer_range=0.3
        )
    ).eval()
    hf.save_pretrained(tmp_path)
    model = load(tmp_path).eval()
    assert model.config == Config(
        n_layer=3, n_embd=24, n_head=2, vocab_size=61, n_positions=32, dropout=0.1
    )
    ids, lengths = pad(ROWS, "cpu")
    with torch.no_grad():
        theirs = hf(
            ids, attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long()
        ).logits  # padded on the right, as ours
    for b, ours in enumerate(our_logits(model, ROWS)):
        torch.testing.assert_close(ours, theirs[b, : len(ours)], atol=1e-4, rtol=0)


def test_ours_loads_in_transformers_with_the_same_logits_and_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = tiny_model(talker_config()), tiny_tokenizer()
    save(model, tmp_path)
    for name, text in zip(["vocab.json", "merges.txt"], tokenizer_files(tokenizer)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    hf, hf_tokenizer = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    )
    for text in TEXTS:
        tokens = tokenizer.encode_ordinary(text)
        assert hf_tokenizer.encode(text) == tokens == load_tokenizer(tmp_path).encode_ordinary(text)
        assert hf_tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text
        torch.testing.assert_close(
            our_logits(model, [tokens])[0], transformers_logits(hf, tokens), atol=1e-4, rtol=0
        )
    assert hf_tokenizer.eos_token_id == hf.config.eos_token_id == tokenizer.eot_token
    assert hf_tokenizer.encode("a<|endoftext|>")[-1] == tokenizer.eot_token


# ---- the model itself --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n_layer, n_embd, n_head, count",
    [
        (12, 768, 12, 124_439_808),
        (24, 1024, 16, 354_823_168),
        (36, 1280, 20, 774_030_080),
        (48, 1600, 25, 1_557_611_200),
    ],
)
def test_the_official_sizes_have_their_parameter_counts(n_layer, n_embd, n_head, count):
    with torch.device("meta"):
        assert GPT(Config(n_layer=n_layer, n_embd=n_embd, n_head=n_head)).n_parameters() == count


def test_padding_changes_no_real_tokens_state():
    model = tiny_model()
    ids, lengths = pad(ROWS, "cpu")
    other, _ = pad(ROWS, "cpu", fill=60)
    with torch.no_grad():
        states, others = model(ids), model(other)
        for b, n in enumerate(lengths):
            torch.testing.assert_close(states[b, :n], others[b, :n], atol=1e-6, rtol=0)
            torch.testing.assert_close(
                states[b, :n], model(ids[b : b + 1, :n])[0], atol=1e-5, rtol=0
            )
    assert (states[1, 1:] - others[1, 1:]).abs().max() > 0.1


def test_a_later_token_changes_no_earlier_state():
    model, ids = tiny_model(), torch.tensor([ROWS[2]])
    changed = ids.clone()
    changed[0, 6] = 33
    with torch.no_grad():
        difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert difference[:6].max() < 1e-6 and difference[6:].min() > 1e-3


@pytest.mark.parametrize("prompt", [None, PROMPT], ids=["bare", "prompted"])
@torch.no_grad()
def test_decoding_ragged_rows_with_the_cache_equals_the_full_forward(prompt):
    model, starts = tiny_model(), torch.tensor([3, 1, 6])
    whole = [[*ROWS[0], 4, 4, 4, 4], [*ROWS[1], *range(20, 30)], ROWS[2]]  # 11 tokens each
    full = model(torch.tensor(whole), prefix=prompt)
    P = 0 if prompt is None else len(prompt)
    cache = KVCache(TINY, 3, P + 11, "cpu", torch.float32)
    ids, _ = pad([row[:n] for row, n in zip(whole, starts)], "cpu", fill=13)
    states = model(ids, prefix=prompt, cache=cache)
    for b, n in enumerate(starts):
        torch.testing.assert_close(states[b, : P + n], full[b, : P + n], atol=1e-5, rtol=0)
    cache.set_lengths(starts + P)
    at = starts.clone()
    for width in [1, 2, 1]:  # one token a row at a time, or several
        new = torch.stack([torch.tensor(row[n : n + width]) for row, n in zip(whole, at)])
        states = model(new, cache=cache)
        for b, n in enumerate(at):
            torch.testing.assert_close(states[b], full[b, P + n : P + n + width], atol=1e-5, rtol=0)
        at += width
    assert cache.lengths.tolist() == (at + P).tolist()


@torch.no_grad()
def test_rows_that_the_cache_keeps_go_on_as_before():
    model = tiny_model()
    cache = KVCache(TINY, 3, 20, "cpu", torch.float32)
    ids, lengths = pad(ROWS, "cpu")
    model(ids, cache=cache)
    cache.set_lengths(lengths)
    cache.select_rows(torch.tensor([2, 0]))
    for token in [50, 51]:
        states = model(torch.full((2, 1), token), cache=cache)
    for state, row in zip(states, [ROWS[2], ROWS[0]]):
        torch.testing.assert_close(
            state[0], model(torch.tensor([[*row, 50, 51]]))[0, -1], atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_dropout_is_on_in_training_alone():
    model, bare = tiny_model(replace(TINY, dropout=0.5)), tiny_model()
    ids = torch.tensor([ROWS[2]])
    assert torch.equal(model.eval()(ids), model(ids)) and torch.equal(model(ids), bare(ids))
    assert torch.equal(bare.train()(ids), bare.eval()(ids))
    model.train()
    assert not torch.allclose(model(ids), model(ids), atol=1e-2)


@pytest.mark.parametrize("place", ["embedding", "attention", "residual"])
@torch.no_grad()
def test_dropout_is_in_all_three_places(place):
    model, ids = tiny_model(replace(TINY, dropout=0.5)).train(), torch.tensor([ROWS[2]])
    model.drop.p = 0.5 * (place == "embedding")
    for block in model.h:
        block.attn.dropout = 0.5 * (place == "attention")
        block.drop.p = 0.5 * (place == "residual")
    assert not torch.allclose(model(ids), model(ids), atol=1e-2)


@torch.no_grad()
def test_dropout_of_the_embedding_is_of_tokens_and_positions_together():
    model, ids = tiny_model(replace(TINY, dropout=0.25)).train(), torch.tensor([ROWS[2]])
    seen = []
    model.h[0].register_forward_pre_hook(lambda block, arguments: seen.append(arguments[0]))
    model(ids)
    kept = seen[0] != 0
    assert 0.65 < kept.float().mean() < 0.85
    torch.testing.assert_close(
        seen[0][kept], ((model.wte(ids) + model.wpe.weight[:11]) / 0.75)[kept]
    )


def test_initialise_goes_by_width_and_depth_and_hangs_on_the_seed():
    config = replace(TINY, n_layer=8, n_embd=64)
    model, again, other = (GPT(config).initialise(seed) for seed in (3, 3, 4))
    for (name, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(p, q)
        if p.ndim == 2:
            assert not torch.equal(p, r)
            assert p.std().item() == pytest.approx(
                1 / 8 / 4 if "c_proj" in name else 1 / 8, rel=0.1
            )  # the roots of C and of 2 × 8 layers
        else:
            assert torch.equal(
                p, torch.ones_like(p) if name.endswith("weight") else torch.zeros_like(p)
            )


# ---- reading and writing -----------------------------------------------------------------------------------------------------


def test_what_is_saved_loads_bit_for_bit(tmp_path):
    model = tiny_model(replace(TINY, dropout=0.25))
    save(model, tmp_path / "a" / "b")
    loaded = load(tmp_path / "a" / "b")
    assert loaded.config == model.config
    for (name, p), (other_name, q) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(p, q)
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    save(loaded, tmp_path / "c")
    for file in ["config.json", "model.safetensors"]:
        assert (tmp_path / "c" / file).read_bytes() == (tmp_path / "a" / "b" / file).read_bytes()


def test_saved_tensors_are_the_plain_form(tmp_path):
    save(tiny_model(), tmp_path)
    saved, wanted = load_file(tmp_path / "model.safetensors"), stored_weights(TINY)
    assert saved.keys() == wanted.keys() and all(
        torch.equal(saved[name], wanted[name]) for name in wanted
    )


def test_dropout_comes_from_the_config_unless_given(tmp_path):
    write_checkpoint(tmp_path)
    assert (
        load(tmp_path).config.dropout == 0.1 and load(tmp_path, dropout=0.0).config.dropout == 0.0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(tmp_path, dtype):
    write_checkpoint(tmp_path)
    save_file(
        {name: tensor.to(dtype) for name, tensor in stored_weights(TINY).items()},
        tmp_path / "model.safetensors",
    )
    model = load(tmp_path)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(
        model.wpe.weight.data, stored_weights(TINY)["wpe.weight"].to(dtype).float(), atol=0, rtol=0
    )


def test_safetensors_is_read_before_the_pickle(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    load(tmp_path)


def test_saving_leaves_nothing_but_the_two_files(tmp_path):
    save(tiny_model(), tmp_path)
    save(tiny_model(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = tiny_model()
    save(model, tmp_path)

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr("model.save_file", full_disk)
    with pytest.raises(InputError, match="No space"):
        save(GPT(TINY).initialise(0), tmp_path)
    assert torch.equal(load(tmp_path).wte.weight, model.wte.weight)


def config_with(**fields):
    """Damage: these fields of config.json are others; None takes a field away."""

    def damage(directory):
        values = {
            name: value
            for name, value in {**hf_config(TINY), **fields}.items()
            if value is not None
        }
        (directory / "config.json").write_text(json.dumps(values))

    return damage


def config_text(text):
    return lambda directory: (directory / "config.json").write_text(text)


def tensors_with(**changes):
    """Damage: these tensors are others (a function of the old one; dots in names are __); None takes a tensor away."""

    def damage(directory):
        tensors = stored_weights(TINY)
        for name, change in changes.items():
            name = name.replace("__", ".")
            tensors[name] = None if change is None else change(tensors.get(name))
        save_file(
            {name: tensor for name, tensor in tensors.items() if tensor is not None},
            directory / "model.safetensors",
        )

    return damage


def holed(value):
    def change(tensor):
        tensor[3] = value
        return tensor

    return change


def file_bytes(change, name="model.safetensors"):
    """Damage: the bytes of the weights' file are `change` of what they were."""
    return lambda directory: (directory / name).write_bytes(
        change((directory / "model.safetensors").read_bytes())
    )


def header(change):
    """Damage: the JSON header of the safetensors file says something else than the bytes behind it."""

    def change_bytes(content):
        size = struct.unpack("<Q", content[:8])[0]
        fields = json.loads(content[8 : 8 + size])
        change(fields["wte.weight"])
        text = json.dumps(fields).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return file_bytes(change_bytes)


def pickled(content):
    def damage(directory):
        (directory / "model.safetensors").unlink()
        torch.save(content, directory / "pytorch_model.bin")

    return damage


class Code:
    """A pickle of this makes a folder when it is read by one that runs code."""

    def __reduce__(self):
        return os.mkdir, ("run-by-a-pickle",)


def cut_pickle(directory):
    pickled(stored_weights(TINY))(directory)
    path = directory / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-2000])


CONFIG, WEIGHTS, PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"
DAMAGES = {
    "no config": (lambda directory: (directory / CONFIG).unlink(), CONFIG, "no such file"),
    "config cut short": (config_text('{"n_layer": 2,'), CONFIG, "JSON"),
    "config is a list": (config_text("[1, 2]"), CONFIG, "JSON object"),
    "config is not UTF-8": (
        lambda directory: (directory / CONFIG).write_bytes(b'{"n_layer": "\xff"}'),
        CONFIG,
        "can't be read",
    ),
    "config is a folder": (
        lambda directory: [(directory / CONFIG).unlink(), (directory / CONFIG).mkdir()],
        CONFIG,
        "can't be read",
    ),
    "field missing": (config_with(n_embd=None), CONFIG, "'n_embd' is missing"),
    "field a text": (config_with(n_layer="2"), CONFIG, "'n_layer'"),
    "field a fraction": (config_with(vocab_size=61.0), CONFIG, "'vocab_size'"),
    "more layers than any": (config_with(n_layer=10**9), CONFIG, "'n_layer'"),
    "wider than any": (config_with(n_embd=4 * 10**12), CONFIG, "'n_embd'"),
    "config nested too deep": (config_text("[" * 100_000), CONFIG, "can't be read"),
    "field zero": (config_with(n_head=0), CONFIG, "'n_head'"),
    "field a truth value": (config_with(n_head=True), CONFIG, "'n_head'"),
    "heads that don't divide": (config_with(n_head=5), CONFIG, "n_head 5"),
    "another family": (config_with(model_type="gpt_neo"), CONFIG, "'model_type'"),
    "another activation": (
        config_with(activation_function="relu"),
        CONFIG,
        "'activation_function' is 'relu'",
    ),
    "another epsilon": (config_with(layer_norm_epsilon=1e-6), CONFIG, "'layer_norm_epsilon'"),
    "another width of the MLP": (config_with(n_inner=64), CONFIG, "'n_inner' is 64"),
    "head said to be untied": (
        config_with(tie_word_embeddings=False),
        CONFIG,
        "'tie_word_embeddings'",
    ),
    "attention unscaled": (config_with(scale_attn_weights=False), CONFIG, "'scale_attn_weights'"),
    "attention scaled by layer": (
        config_with(scale_attn_by_inverse_layer_idx=True),
        CONFIG,
        "'scale_attn_by_inverse_layer_idx'",
    ),
    "cross attention": (config_with(add_cross_attention=True), CONFIG, "'add_cross_attention'"),
    "dropout of 1": (config_with(resid_pdrop=1.0), CONFIG, "'resid_pdrop'"),
    "dropout not a number": (config_with(resid_pdrop="0.1"), CONFIG, "'resid_pdrop'"),
    "no weights": (lambda directory: (directory / WEIGHTS).unlink(), WEIGHTS, "no such file"),
    "tensor missing": (
        tensors_with(h__1__mlp__c_fc__bias=None),
        WEIGHTS,
        "'h.1.mlp.c_fc.bias' is missing",
    ),
    "layer missing": (config_with(n_layer=3), WEIGHTS, "'h.2.ln_1.weight' is missing"),
    "wrong shape": (
        tensors_with(wpe__weight=lambda t: t[:-1].clone()),
        WEIGHTS,
        "'wpe.weight' has shape (47, 32)",
    ),
    "not transposed": (
        tensors_with(h__0__attn__c_attn__weight=lambda t: t.T.contiguous()),
        WEIGHTS,
        "'h.0.attn.c_attn.weight' has shape (96, 32)",
    ),
    "a vector for a matrix": (
        tensors_with(h__0__mlp__c_fc__weight=lambda t: t[0].clone()),
        WEIGHTS,
        "'h.0.mlp.c_fc.weight' has shape (128,)",
    ),
    "another width": (config_with(n_embd=64), WEIGHTS, "does not fit config.json"),
    "integers": (
        tensors_with(wte__weight=lambda t: t.long()),
        WEIGHTS,
        "'wte.weight' is torch.int64",
    ),
    "NaN": (tensors_with(ln_f__bias=holed(float("nan"))), WEIGHTS, "'ln_f.bias'"),
    "infinite": (
        tensors_with(h__1__attn__c_proj__weight=holed(float("-inf"))),
        WEIGHTS,
        "'h.1.attn.c_proj.weight'",
    ),
    "a layer too many": (config_with(n_layer=1), WEIGHTS, "'h.1."),
    "a tensor of another model": (
        tensors_with(score__weight=lambda _: torch.ones(2, 32)),
        WEIGHTS,
        "'score.weight'",
    ),
    "untied head": (
        tensors_with(lm_head__weight=lambda _: torch.ones(61, 32)),
        WEIGHTS,
        "'lm_head.weight' differs",
    ),
    "safetensors cut short": (
        file_bytes(lambda content: content[:-100]),
        WEIGHTS,
        "cut short or damaged",
    ),
    "safetensors cut in its header": (
        file_bytes(lambda content: content[:50]),
        WEIGHTS,
        "cut short or damaged",
    ),
    "safetensors empty": (file_bytes(lambda content: b""), WEIGHTS, "cut short or damaged"),
    "safetensors is a web page": (
        file_bytes(lambda content: b"<html><body>Not found</body></html>"),
        WEIGHTS,
        "cut short or damaged",
    ),
    "header of an absurd length": (
        file_bytes(lambda content: struct.pack("<Q", 1 << 60) + content[8:]),
        WEIGHTS,
        "cut short or damaged",
    ),
    "header with another shape": (
        header(lambda field: field.update(shape=[61, 31])),
        WEIGHTS,
        "cut short or damaged",
    ),
    "header with offsets past the end": (
        header(lambda field: field.update(data_offsets=[0, 1 << 40])),
        WEIGHTS,
        "cut short or damaged",
    ),
    "header with an unknown type": (
        header(lambda field: field.update(dtype="F99")),
        WEIGHTS,
        "cut short or damaged",
    ),
    "pickle cut short": (cut_pickle, PICKLE, "cut short, damaged"),
    "pickle with code": (pickled({"wte.weight": Code()}), PICKLE, "more than tensors"),
    "pickle with a checkpoint inside": (
        pickled({"model": stored_weights(TINY), "step": 3}),
        PICKLE,
        "no dictionary of tensors",
    ),
    "pickle of a list": (pickled([torch.ones(2)]), PICKLE, "no dictionary of tensors"),
}


@pytest.mark.parametrize("damage, file, words", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_checkpoint_that_is_wrong_gives_one_line_that_names_what(
    tmp_path, monkeypatch, damage, file, words
):
    monkeypatch.chdir(tmp_path)
    directory = write_checkpoint(tmp_path / "checkpoint")
    load(directory)
    damage(directory)
    with pytest.raises(InputError) as caught:
        load(directory)
    message = str(caught.value)
    assert message.startswith(f"{directory / file}: ") and words in message
    assert "\n" not in message
    assert not (tmp_path / "run-by-a-pickle").exists()


@pytest.mark.parametrize("rows, tokens", [(1, 1), (3, 1), (64, 1), (5, 40)])
def test_packed_weights_give_the_same_hidden_states_and_logits_and_are_gone_behind(rows, tokens):
    model = GPT(Config(2, 288, 4, 1_009, 64)).initialise(3).eval()
    ids = torch.randint(1_009, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        wanted = model(ids)
        with packed_weights(model):
            hidden = model(ids)
            packed = [
                name
                for name, w in model.named_parameters()
                if getattr(w, "packed", None) is not None
            ]
            logits = model.logits(hidden)
        assert (hidden - wanted).abs().max() < 1e-4 and (
            logits - model.logits(wanted)
        ).abs().max() < 1e-4
    if (
        platform.machine() == "x86_64" and torch.backends.mkldnn.is_available()
    ):  # the others are small
        assert packed == [
            "wte.weight",
            *(f"h.{n}.mlp.{name}.weight" for n in (0, 1) for name in ("c_fc", "c_proj")),
        ]
    assert all(getattr(w, "packed", None) is None for w in model.parameters())


@pytest.mark.parametrize("with_prefix", [False, True])
def test_hidden_states_of_some_tokens_are_those_of_all_with_the_same_gradients(with_prefix):
    model = GPT(Config(2, 32, 4, 61, 64, 0.0)).initialise(3)
    ids = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(1))
    prefix = torch.randn(4, 32, requires_grad=True) if with_prefix else None
    where, leaves = (
        (torch.tensor([0, 0, 2, 1]), torch.tensor([0, 8, 3, 7])),
        [*model.parameters(), *([prefix] if with_prefix else [])],
    )
    wanted, some = (
        model(ids, prefix)[where[0], where[1] + (4 if with_prefix else 0)],
        model(ids, prefix, output_positions=where),
    )
    assert (some - wanted).abs().max() < 1e-5
    for grad, want in zip(
        torch.autograd.grad(some.square().sum(), leaves),
        torch.autograd.grad(wanted.square().sum(), leaves),
    ):
        assert (grad - want).abs().max() < 1e-4


def test_packed_weights_are_gone_when_sampling_fails_and_doubles_are_left_alone():
    model = GPT(Config(1, 288, 4, 1_009, 64)).initialise(3)
    with pytest.raises(ZeroDivisionError), packed_weights(model):
        raise ZeroDivisionError
    assert model.wte.weight.packed is None
    with packed_weights(model.double()):
        assert all(getattr(w, "packed", None) is None for w in model.parameters())


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden_values()).replace("], ", "],\n") + "\n")
