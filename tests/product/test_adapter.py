"""Soft prompts as prompt-tuning adapters of PEFT: `prompt.py RUN --peft DIR`, and the way back."""

import json
import shutil

import pytest
import torch
from helpers import error_of, soft_prompt, talker_config, tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_prompt_command import P, out, run, write_run  # noqa: F401

from data.models import sampling
from data.models.checkpoint import load
from data.models.hub import model_hash
from data.models.prompts import load_prompt, prompt_metadata, save_prompt
from data.runs.tuned_prompt import main
from prompt import prepend
from sample import sample

WIDTH = talker_config().n_embd
IDS = torch.tensor([[5, 17, 200, 41, 3, 77, 8]])


@pytest.fixture
def adapter(run, tmp_path):  # noqa: F811
    main([str(run), "--peft", str(tmp_path / "adapter")])
    return tmp_path / "adapter"


def change_config(adapter, **values):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_adapter_has_the_prompt_and_names_its_teacher(run, out, adapter, capsys):  # noqa: F811
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "PROMPT_TUNING" and config["task_type"] == "CAUSAL_LM"
    sizes = [config[name] for name in ("num_virtual_tokens", "token_dim", "num_layers")]
    assert sizes == [*P.shape, talker_config().n_layer]
    assert config["base_model_name_or_path"] == "./teacher"  # without its path on this machine
    assert load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"].equal(P)
    assert prompt_metadata(adapter)["teacher_sha256"] == model_hash(out / "teacher")
    assert load_prompt(adapter, WIDTH).equal(P)
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_teacher_from_the_hub_keeps_its_id(out, tmp_path, monkeypatch):  # noqa: F811
    """So that PEFT can load it."""
    monkeypatch.chdir(tmp_path)
    for name, expected in (("gpt2-xl", "openai-community/gpt2-xl"), ("owner/name", "owner/name")):
        folder = tmp_path / "hub" / f"models--{expected.replace('/', '--')}"
        shutil.copytree(out / "teacher", folder / "snapshots" / "abc")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        directory = write_run(tmp_path / f"run-{name.partition('/')[0]}", P, teacher=name)
        main([str(directory), "--peft", str(directory / "adapter")])
        config = json.loads((directory / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == expected


def test_an_adapter_is_never_overwritten(run, adapter):  # noqa: F811
    problem = f"--peft {adapter}: has an adapter already; choose another directory"
    assert error_of(main, [str(run), "--peft", str(adapter)]) == problem
    (adapter / "adapter_config.json").unlink()
    assert error_of(main, [str(run), "--peft", str(adapter)]) == problem


def test_an_adapter_of_pefts_own_is_warned_of_by_the_name_of_its_model(
    out,  # noqa: F811
    adapter,
    capsys,
):
    change_config(adapter, base_model_name_or_path="owner/other", task_type=None)
    weights = adapter / "adapter_model.safetensors"
    save_file({"prompt_embeddings": P}, weights)
    arguments = ["--instruction", "Write.", "--max-new", "2", "--prompt", str(adapter)]
    sampling.main([str(out / "teacher"), *arguments])
    problem = "was tuned for owner/other, but does not say with which weights"
    assert f"warning: {weights}: {problem}\n" in capsys.readouterr().err


def test_sample_py_takes_an_adapter(out, adapter, tmp_path, capsys):  # noqa: F811
    arguments = [str(out / "teacher"), "--instruction", "Write.", "--max-new", "8", "--prompt"]
    save_prompt(P, tmp_path, "teacher", model_hash(out / "teacher"))
    printed = []
    for prompt in (tmp_path, adapter, adapter / "adapter_model.safetensors"):
        sampling.main([*arguments, str(prompt)])
        printed.append(capsys.readouterr())
    assert printed[0].out == printed[1].out == printed[2].out
    assert not any("warning" in text.err for text in printed)


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"peft_type": "LORA"}, "'peft_type' is 'LORA', and only 'PROMPT_TUNING' is a soft prompt"),
        ({"peft_type": "P_TUNING"}, "'peft_type' is 'P_TUNING'"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "'peft_type' is 'MULTITASK_PROMPT_TUNING'"),
        ({"peft_type": None}, "'peft_type' is None"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "'task_type' is 'SEQ_2_SEQ_LM', and only 'CAUSAL_LM'"),
        ({"num_transformer_submodules": 2}, "'num_transformer_submodules' is 2, and only 1"),
        ("no JSON", "adapter_config.json: can't be read as JSON"),
        ("a pickle", "adapter_model.bin: is a pickle, which is not read; save it with safe_serial"),
        ("no file", "adapter_model.safetensors: no such file"),
        ("other names", "has no finite floating-point tensor 'prompt_embeddings'"),
        ("another width", "tensor 'prompt_embeddings' is 48 wide and the model 32"),
    ],
)
def test_other_adapters_are_refused_in_one_line(adapter, change, parts):
    weights = adapter / "adapter_model.safetensors"
    if isinstance(change, dict):
        change_config(adapter, **change)
    elif change == "no JSON":
        (adapter / "adapter_config.json").write_text("{")
    elif change == "a pickle":
        weights.rename(adapter / "adapter_model.bin")
    elif change == "no file":
        weights.unlink()
    else:
        name = "prompt_embeddings" if change == "another width" else "lora_A.weight"
        save_file({name: torch.ones(3, 48)}, weights)
    for path in (adapter, weights) if isinstance(change, dict) else (adapter,):
        message = error_of(load_prompt, path, WIDTH)
        assert str(adapter) in message and parts in message


# Logits of PEFT's model on IDS with the prompt of `soft_prompt(5)`: of the last token, the first
# six; by peft 0.21.2 with transformers 4.57.6
PEFT_LOGITS = [0.73105, 2.0005, -2.08126, -0.69373, -3.50099, 0.52606]


def test_logits_are_those_of_peft(out, tmp_path):  # noqa: F811
    """By PEFT itself where it is installed, and by stored numbers of it."""
    prompt = soft_prompt(5)
    directory = write_run(out / "run-for-peft", prompt)
    main([str(directory), "--peft", str(tmp_path / "adapter")])
    model = load(out / "teacher").eval()
    with torch.no_grad():
        hidden = model(prepend(load_prompt(tmp_path / "adapter", WIDTH), model, IDS))
        ours = model.logits(hidden)[:, len(prompt) :]  # (1, T, V)
    assert ours[0, -1, :6].tolist() == pytest.approx(PEFT_LOGITS, abs=1e-4)
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(out / "teacher")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = theirs(IDS).logits[:, len(prompt) :]
    torch.testing.assert_close(logits, ours, rtol=1e-4, atol=1e-4)

    eos = tiny_tokenizer().eot_token
    [expected], _ = sample(model, IDS.tolist(), None, eos, 20, P=prompt)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": eos}
    for use_cache in (True, False):
        mask = torch.ones_like(IDS)
        found = theirs.generate(input_ids=IDS, attention_mask=mask, use_cache=use_cache, **options)
        assert found[0, IDS.shape[1] :].tolist() == expected
