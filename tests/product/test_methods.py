"""The declarations of data/runs/methods.py, and what is derived from them."""

import argparse
import json
import re
from dataclasses import MISSING, asdict, fields, replace

import pytest
from helpers import call_command, interrupted_in_step
from test_train import (  # noqa: F401
    hub,
    plan,
    record,
    run_stage,
    settings,
    student,
    world,
)

import train
from data.models.named import table_sort_key
from data.process.command_line import number_in_range
from data.process.errors import InputError
from data.runs.methods import (
    DEFAULTS,
    METHODS,
    PRESET_OPTIONS,
    SIZES,
    STAGES,
    Option,
    Settings,
    find_overrides,
    options_of_methods,
    preset,
)
from data.runs.options import parse_train_args

KINDS = [*STAGES, *METHODS]


def test_every_method_has_a_step_and_every_step_a_method():
    without_step = METHODS.keys() - train.STEPS.keys()
    assert not without_step, f"add {sorted(without_step)} to train.STEPS"
    without_method = train.STEPS.keys() - METHODS.keys()
    assert not without_method, f"add {sorted(without_method)} to data.runs.methods.METHODS"


@pytest.mark.parametrize("kind", KINDS)
def test_a_preset_completes_the_settings(kind):
    for size in (*SIZES, "demo"):
        values = preset(kind, size)
        unknown = values.keys() - {field.name for field in fields(Settings)}
        assert not unknown, f"{kind}: Settings has no field {sorted(unknown)}"
        Settings(method=kind, student="gpt2", data="dolly", **values)
    assert re.fullmatch(r"[a-z0-9_]+", kind), f"{kind}: `run_kind` splits names at a hyphen"


def test_every_option_sets_a_field_that_has_a_default():
    options = [*PRESET_OPTIONS, *options_of_methods()]
    for option in PRESET_OPTIONS:
        assert option.field in [field.name for field in fields(Settings)]
    for option in options_of_methods():
        assert option.field in DEFAULTS, f"{option.flag}: add {option.field} = ... to Settings"
    assert len({option.name for option in options}) == len(options)


def test_promptkd_for_gpt2_base_is_the_papers():
    s = Settings("promptkd", "init", "dolly", teacher="teacher", **preset("promptkd", "base"))
    expected = DEFAULTS | {
        "method": "promptkd",
        "student": "init",
        "data": "dolly",
        "global_batch_size": 256,
        "lr": 5e-5,
        "epochs": 20,
        "schedule": "constant",
        "warmup_steps": 100,
        "beta2": 0.999,
        "weight_decay": 1e-2,
        "teacher": "teacher",
        "metric_for_best": "rouge_l",
        "steps": None,
        "dropout": 0.1,
        "max_new_tokens": 256,
        "prompt_lr": 5e-5,
        "prompt_text": "Suppose you are a student.",
        "prompt_length": None,
        "prompt_init": "text",
        "reg_weight": 1.0,
        "prompt_kl": "reverse",
        "reg_kl": "reverse",
    }
    assert asdict(s) == expected


def test_tables_are_in_the_order_of_the_declarations():
    kinds = sorted(sorted(KINDS, reverse=True), key=lambda kind: table_sort_key(kind, 1))
    assert kinds == KINDS
    order = "teacher init sft kd seqkd minillm gkd promptkd".split()
    assert [kind for kind in kinds if kind in order] == order


def test_help_names_each_option_with_its_methods_and_default():
    text = " ".join(call_command(train.main, "--help").stdout.split())
    for option, names in options_of_methods().items():
        assert re.search(rf"{option.flag} .{{1,60}} {', '.join(names)}: ", text), option
    assert "weight of equation 2 (default: 1)" in text
    assert "(default: Suppose you are a student.)" in text
    choices = re.search(r"--method \{(.*?)\}", text).group(1)
    assert set(choices.split(",")) == METHODS.keys()


def test_an_overrides_place_in_the_name_is_that_of_older_runs(plan):
    options = "--reg 2 --prompt-kl forward --prompt-init text --prompt-length 5 --dropout 0"
    options += " --global-batch 8 {} --prompt-lr 0.1 --lr 0.2 --reg-kl forward --prompt-text x"
    name = "lr0.2-promptlr0.1-{}-globalbatch8-dropout0-prompttext8cdc1683"
    name += "-promptlength5-promptinittext-reg2-promptklforward-regklforward"
    for option, suffix in (("--steps 9", "steps9"), ("--epochs 7", "epochs7")):
        [*_, stage] = plan(f"--student gpt2 {options.format(option)}")
        assert stage.name == f"promptkd-gpt2-{name.format(suffix)}-s10"


# ---- a new option --------------------------------------------------------------------------------

# Settings can't get a field here, so the options set fields that other code has.
COUNT = Option("--count", "block_size", number_in_range(int, 1, 600), help="of all things")
SCALE = Option("--scale", "weight_decay", float, default=0.5)
WORDS = Option("--words", "schedule")
TABLE = Option("--table", "responses", metavar="FILE")


@pytest.fixture
def new_options(monkeypatch):
    """GKD has these options, and SFT one of them, too."""
    options = (COUNT, SCALE, WORDS, TABLE)
    monkeypatch.setitem(METHODS, "gkd", replace(METHODS["gkd"], options=options))
    monkeypatch.setitem(METHODS, "sft", replace(METHODS["sft"], options=(COUNT,)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("option", [COUNT, SCALE, WORDS, TABLE], ids=lambda option: option.name)
def test_an_option_is_refused_for_methods_that_do_not_declare_it(plan, new_options, method, option):
    options = f"--method {method} {option.flag} 1"
    options += " --shape 1x16x2" if method == "pretrain" else ""
    if option in METHODS[method].options:
        assert f"-{option.name}" in plan(options)[-1].name
        return
    error = rf"^{option.flag} has no effect here \(method {method}\); leave it out$"
    with pytest.raises(InputError, match=error):
        plan(options)


def test_an_option_is_in_the_settings_and_only_if_given_in_the_name(plan, new_options):
    usual = plan("--method gkd --student gpt2")
    assert usual[-1].name == "gkd-gpt2-s10"
    assert usual[-1].settings.block_size == Settings.block_size  # that of Settings
    assert usual[-1].settings.weight_decay == 0.5  # that of the option
    assert usual[0].settings.weight_decay == Settings.weight_decay  # not of the teacher's stage

    options = "--count 7 --scale 0.5 --words some/where --table a/b.c"
    given = plan(f"--method gkd --student gpt2 {options}")
    assert re.fullmatch(
        r"gkd-gpt2-count7-scale0\.5-words[0-9a-f]{8}-tableb-s10",
        given[-1].name,
    )
    values = {"block_size": 7, "weight_decay": 0.5, "schedule": "some/where", "responses": "a/b.c"}
    assert given[-1].settings == replace(usual[-1].settings, **values)
    assert given[:-1] == usual[:-1]
    assert given[-1].paper is None


def test_an_option_has_its_type(new_options):
    args = parse_train_args("--method gkd --count 7 --scale 0.25".split())
    assert (args.count, args.scale, args.words) == (7, 0.25, None)
    assert list(find_overrides("gkd", args)) == [COUNT, SCALE]
    with pytest.raises(InputError, match="--count: must be at least 1"):
        parse_train_args("--count 0".split())


def test_two_methods_may_not_declare_one_flag_differently(monkeypatch):
    other = replace(COUNT, help="another")
    monkeypatch.setitem(METHODS, "gkd", replace(METHODS["gkd"], options=(COUNT,)))
    monkeypatch.setitem(METHODS, "sft", replace(METHODS["sft"], options=(other,)))
    with pytest.raises(argparse.ArgumentError, match="--count: conflicting option"):
        parse_train_args([])


# ---- runs that are older than a field ------------------------------------------------------------


def forget(directory, names):
    """Remove fields from the settings in a run.json, as if it were older than they are."""
    found = record(directory)
    for name in names:
        del found["settings"][name]
    (directory / "run.json").write_text(json.dumps(found))


def test_an_older_run_has_the_default_of_a_field_that_it_lacks(tmp_path, student, capsys):
    s = settings(student=str(student), steps=1, max_dev_rows=2, metric_for_best="loss")
    directory = run_stage(tmp_path, s)
    optional = [field.name for field in fields(Settings) if field.default is not MISSING]
    new_fields = [name for name in optional if getattr(s, name) == DEFAULTS[name]]
    assert {"block_size", "beta2", "weight_decay", "dropout", "inner_epochs"} <= set(new_fields)
    forget(directory, new_fields)
    capsys.readouterr()
    assert run_stage(tmp_path, s) == directory
    assert "complete, skipped" in capsys.readouterr().out
    error = r"was made with block_size 512, not 64; choose another --out"
    with pytest.raises(InputError, match=error):
        run_stage(tmp_path, replace(s, block_size=64))


def test_an_unfinished_older_run_resumes(tmp_path, student, capsys):
    s = settings(student=str(student), steps=4, eval_interval=2, metric_for_best="loss")
    with interrupted_in_step("sft", 2):
        run_stage(tmp_path, s)
    forget(tmp_path / "stage", ["block_size", "beta2", "dropout"])
    capsys.readouterr()
    assert record(run_stage(tmp_path, s))["complete"]
    assert "resuming after step 2" in capsys.readouterr().out
