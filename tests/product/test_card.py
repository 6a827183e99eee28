"""What makes `best/` ready to be published: generation_config.json, tokenizer_config.json, and the
model card README.md.

With transformers, all of it is loaded; the content of the files is compared without it, too.
"""

import json
import logging
import shlex
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import TINY, interrupted_in_step, tiny_model, tiny_tokenizer
from test_train import (  # noqa: F401
    CPU,
    SHAPES,
    TOKENIZER,
    hub,
    main,
    no_demo_table,
    no_validation,
    promptkd_settings,
    record,
    student,
    teacher,
    world,
    write_hub,
)

import train
from data.models.hub import model_hash
from data.models.tokenizer import END_OF_TEXT, load_tokenizer
from data.runs import options, runs
from data.runs.card import trace, write_card
from data.runs.methods import METHODS, STAGES, Settings, preset
from data.sets.rows import fill_template

TEXT = fill_template("Write a task , don't stop.", "naïve 你好  \n\n 12 34")


# ---- generation_config.json and tokenizer_config.json --------------------------------------------


@pytest.fixture(params=["tiny", "demo", "gpt2"])
def tokenizer(request, monkeypatch):
    """Of a test, of the demo, and GPT-2's own, which is read from ../shared."""
    if request.param == "gpt2":
        cache = request.getfixturevalue("shared") / "gpt2-bpe" / "tiktoken-cache"
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return load_tokenizer()
    return TOKENIZER if request.param == "demo" else tiny_tokenizer()


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    config = replace(TINY, vocab_size=tokenizer.n_vocab, n_positions=288, n_embd=4)
    student = tiny_model(config)
    s = SimpleNamespace(max_new_tokens=7)
    run = SimpleNamespace(student=student, tokenizer=tokenizer, settings=s, P=None)
    runs.save_checkpoint(run, tmp_path / "best")
    return tmp_path / "best"


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_checkpoint_says_how_to_sample_and_how_its_tokenizer_is_used(checkpoint, tokenizer):
    eos, generation = tokenizer.eot_token, read_json(checkpoint / "generation_config.json")
    tokens = {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert generation == {**tokens, **sampling, "max_new_tokens": 7}
    found = read_json(checkpoint / "tokenizer_config.json")
    assert found["tokenizer_class"] == "GPT2Tokenizer" and found["model_max_length"] == 288
    assert {found[f"{name}_token"] for name in ("bos", "eos", "unk", "pad")} == {END_OF_TEXT}
    assert load_tokenizer(checkpoint).eot_token == eos


def test_transformers_loads_a_checkpoint_and_generates_without_a_warning(checkpoint, tokenizer):
    transformers, logged = pytest.importorskip("transformers"), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: logged.append(entry.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hf_tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
            pipeline = transformers.pipeline("text-generation", str(checkpoint), device="cpu")
            [first], [second] = pipeline([TEXT, TEXT + "a"], batch_size=2, max_new_tokens=2)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert [line for line in logged if not line.startswith("Device set to use")] == []
    assert first["generated_text"].startswith(TEXT) and second["generated_text"].startswith(TEXT)
    ids = hf_tokenizer(TEXT).input_ids
    assert ids == tokenizer.encode_ordinary(TEXT) and hf_tokenizer.decode(ids) == TEXT
    assert hf_tokenizer.eos_token_id == hf_tokenizer.pad_token_id == tokenizer.eot_token
    generation, sampling = pipeline.model.generation_config, ("do_sample", "top_k", "top_p")
    assert [getattr(generation, name) for name in sampling] == [True, 0, 1.0]
    assert (generation.temperature, generation.max_new_tokens) == (1.0, 7)


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, shown",
    [
        ("", "--method promptkd --data demo --seed 10"),
        (
            "--student gpt2 --teacher owner/name --lr 1e-05 --plan --out elsewhere",
            "--method promptkd --student gpt2 --teacher owner/name --data dolly --seed 10 "
            "--lr 1e-05",
        ),
        (
            "--method minillm --init {0}/small/best --sft-teacher {0}/wide --data {0}/dolly "
            "--lm-data {0}/text.txt --save-every 3 --dtype float32",
            "--method minillm --sft-teacher ./wide --init ./small --data ./dolly --seed 10 "
            "--lm-data ./text.txt --save-every 3 --dtype float32",
        ),
        (
            "--prompt-text 'Suppose it\"s\n a `b`.' --reg 0",
            "--method promptkd --data demo --seed 10 --prompt-text 'Suppose it\"s\n a `b`.' "
            "--reg 0.0",
        ),
        ("--method pretrain --shape 1x16x2", "--method pretrain --data demo --shape 1x16x2"),
    ],
)
def test_the_recorded_command_gives_the_same_options_without_paths(tmp_path, given, shown):
    for name in ("small/best", "wide", "dolly"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "text.txt").touch()
    args = options.parse_train_args(shlex.split(given.format(tmp_path)))
    options.check_options(args)
    line = options.command_line(args)
    program, *words = shlex.split(line)
    assert program == "train.py" and str(tmp_path) not in line
    expected, again = (options.parse_train_args(w) for w in (shlex.split(shown), words))
    assert vars(again) == vars(expected)


# ---- the card ------------------------------------------------------------------------------------


def card_of(directory):
    """The metadata of a card, and its text."""
    start, metadata, text = (directory / "best" / "README.md").read_text("utf-8").split("---\n", 2)
    assert start == ""
    lines = (line.split(": ", 1) for line in metadata.splitlines())
    return {field: json.loads(value) for field, value in lines}, text


def write_run(directory, **settings):
    content = {"format": runs.RUN_FORMAT, "name": directory.name, "settings": settings}
    directory.mkdir(parents=True, exist_ok=True)
    runs.write_record(directory, content)
    return str(directory)


def write_card_of(directory, **values):
    """The card of a run with these settings. Returns what `card_of` does."""
    s = Settings(**{"data": "dolly", "global_batch_size": 8, "lr": 1e-3, "epochs": 1} | values)
    end = {
        "name": directory.name,
        "parameters": 1234,
        "total_steps": 20,
        "ranks": 8,
        "best": 25.128,
    }
    end |= {"best_step": 10, "dev_rows": 1000, "device": "cuda", "versions": {"torch": "2.13.0"}}
    end |= {"later_versions": [{"torch": "2.14.0"}, {"torch": "2.13.0"}]}
    write_card(directory, s, end | {"command": "train.py --student gpt2"})
    return card_of(directory)


@pytest.fixture
def published(hub, tmp_path, monkeypatch):
    """PromptKD's own run from GPT-2, and the runs before it, in out/."""
    monkeypatch.chdir(tmp_path)
    start = write_run(tmp_path / "out" / "init-gpt2", method="sft", student="gpt2")
    teacher = write_run(tmp_path / "out" / "teacher-gpt2-xl", method="sft", student="gpt2-xl")
    prompt = METHODS["promptkd"].option_defaults()
    return {"method": "promptkd", "student": start, "teacher": teacher, **prompt}


def test_the_card_of_a_run_of_the_paper_has_the_hubs_metadata(tmp_path, published):
    metadata, text = write_card_of(tmp_path / "out" / "promptkd-gpt2-s10", **published)
    rouge_l = {"type": "rouge", "name": "ROUGE-L", "value": 25.13}
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"type": "MiniLLM/dolly", "name": "dolly, validation rows"},
        "metrics": [rouge_l],
    }
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "openai-community/gpt2",
        "teacher": "openai-community/gpt2-xl",
        "datasets": ["MiniLLM/dolly"],
        "dataset_license": "cc-by-sa-3.0",
        "metrics": ["rouge"],
        "tags": ["gpt2", "promptkd", "knowledge-distillation"],
        "model-index": [{"name": "promptkd-gpt2-s10", "results": [result]}],
    }
    for line in (
        "# promptkd-gpt2-s10",
        "- Method: PromptKD",
        "- Base model: `init-gpt2` from "
        "[openai-community/gpt2](https://huggingface.co/openai-community/gpt2)",
        "- Data: [MiniLLM/dolly](https://huggingface.co/datasets/MiniLLM/dolly)",
        "- Licence of the data: cc-by-sa-3.0",
        "    torchrun --nproc_per_node=8 train.py --student gpt2",
        "With torch 2.13.0, torch 2.14.0, 8 ranks, cuda. The settings:",
        '     "prompt_text": "Suppose you are a student.",',
    ):
        assert f"\n{line}\n" in text
    assert "\nROUGE-L 25.13 on 1,000 validation rows, the best of the validations" in text
    assert "after step 10 of 20. One response per row was sampled at temperature 1" in text
    assert json.dumps(fill_template("Name three colours.")) in text


def test_libraries_read_the_metadata_of_a_card(tmp_path, published):
    yaml = pytest.importorskip("yaml")
    directory = tmp_path / "out" / "promptkd-gpt2-s10"
    metadata, _ = write_card_of(directory, **published)
    text = (directory / "best" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---\n")[1]) == metadata
    hub_library = pytest.importorskip("huggingface_hub")
    [result] = hub_library.ModelCard.load(directory / "best" / "README.md").data.eval_results
    assert (result.metric_name, result.metric_value) == ("ROUGE-L", 25.13)


@pytest.mark.parametrize("kind", [*STAGES, *METHODS])
def test_no_card_says_where_models_and_data_are(tmp_path, kind):
    method, place = "sft" if kind in STAGES else kind, tmp_path / "a"
    values = preset(kind, "demo") | {"method": method, "data": str(place / "mine")}
    values |= {"student": "1x16x2" if method == "pretrain" else str(place / "small")}
    values |= {"responses": str(place / "sampled"), "lm_data": str(place / "text.txt")}
    if METHODS[method].needs_teacher:
        values["teacher"] = write_run(place / "wide", method="sft", student="../b/before")
    for name in ("mine", "small", "sampled"):
        (place / name).mkdir(parents=True)
    metadata, text = write_card_of(tmp_path / "out" / f"{kind}-small-mine-s10", **values)
    unknown = {"base_model", "teacher", "datasets", "dataset_license", "model-index"}
    assert metadata.keys() & unknown == set()
    assert [word for word in (str(tmp_path), "/a/", "../", "null", "None") if word in text] == []
    assert "\n- Data: `mine`" in text and "Licence" not in text
    assert ("\n- Teacher: `wide` from `before`\n" in text) == METHODS[method].needs_teacher


@pytest.mark.parametrize(
    "name, text, hub_id",
    [
        ("gpt2", "[{0}](https://huggingface.co/{0})", "openai-community/gpt2"),
        ("owner/cached", "[{0}](https://huggingface.co/{0})", "owner/cached"),
        ("owner/elsewhere", "`elsewhere`", None),  # perhaps a folder that was here
        ("owner/folder", "`folder`", None),
        ("out/init-a", "`init-a` from `pretrain-b` from random weights", None),
        ("out/gpt2", "`init-c` from `gpt2`", None),  # was renamed: its record seems to name itself
        ("out/damaged", "`damaged`", None),
        ("out/od`d\nname", "`odd name`", None),
    ],
)
def test_a_model_is_traced_to_what_is_known_of_it(tmp_path, hub, monkeypatch, name, text, hub_id):
    monkeypatch.chdir(tmp_path)
    write_hub(tmp_path, "owner/cached", SHAPES["gpt2"])
    [snapshot] = tmp_path.glob("hub/*cached/snapshots/*")
    (snapshot / "tokenizer.json").touch()
    for folder in ("owner/folder", "out/damaged", "out/od`d\nname"):
        (tmp_path / folder).mkdir(parents=True)
    write_run(tmp_path / "out" / "pretrain-b", method="pretrain", student="1x16x2")
    write_run(tmp_path / "out" / "init-a", method="sft", student="pretrain-b")
    write_run(tmp_path / "out" / "init-c", method="sft", student="gpt2")
    (tmp_path / "out" / "init-c").rename(tmp_path / "out" / "gpt2")
    (tmp_path / "out" / "damaged" / "run.json").write_text("{")
    assert trace(name) == (text.format(hub_id), hub_id)


def test_what_an_older_run_has_not_recorded_is_left_out(tmp_path, published):
    directory, given = tmp_path / "out" / "old", {"metric_for_best": "loss", "data": "demo"}
    s = Settings(global_batch_size=8, lr=1e-3, epochs=1, **published, **given)
    end = {"name": "old", "parameters": 1234, "total_steps": 20, "ranks": 1, "best": 1.25}
    write_card(directory, s, end | {"best_step": 10, "dev_rows": 1, "device": "cpu"})
    metadata, text = card_of(directory)
    assert "train.py" not in text and "\nWith 1 rank, cpu. The settings:\n" in text
    assert "\nCross-entropy 1.250 nats per response token on the references of 1 valid" in text
    assert (
        metadata["dataset_license"] == "mit" and metadata.keys() & {"metrics", "datasets"} == set()
    )


# ---- when it is written --------------------------------------------------------------------------


def test_the_card_is_written_at_the_end_and_changes_no_hash(
    tmp_path, student, no_validation, no_demo_table
):
    command = ["--method", "sft", "--data", "demo", "--student", student, "--steps", 4]
    with interrupted_in_step("sft", 3):
        main(tmp_path / "out", *command)
    [directory] = (tmp_path / "out").iterdir()
    expected = model_hash(directory)
    assert not (directory / "best" / "README.md").exists()
    main(tmp_path / "out", *command)
    assert record(directory)["best_step"] == 2 and model_hash(directory) == expected
    _, text = card_of(directory)
    assert f"\n    python {record(directory)['command']}\n" in text
    assert "on 8 validation rows, the best of the validations during training, after step 2" in text


def test_the_prompts_file_names_a_teacher_elsewhere_without_its_path(tmp_path, student, teacher):
    s = promptkd_settings(student, teacher, steps=1, max_dev_rows=2)
    train.run_stage("stage", s, tmp_path, 600, CPU)
    content = (tmp_path / "stage" / "best" / "prompt.safetensors").read_bytes()
    assert b'"teacher":"./wide"' in content and bytes(teacher) not in content


def test_new_weights_remove_the_card_of_those_before(tmp_path):
    """A run that was killed at its end, and whose last state is damaged, trains steps again."""
    path = tmp_path / "best" / "README.md"
    path.parent.mkdir()
    path.write_text("the card of other weights")
    s = SimpleNamespace(max_new_tokens=7)
    run = SimpleNamespace(student=tiny_model(), tokenizer=tiny_tokenizer(), settings=s, P=None)
    runs.save_checkpoint(run, tmp_path / "best")
    assert not path.exists()
