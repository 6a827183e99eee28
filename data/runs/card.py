"""The model card of a complete run, `best/README.md`, so that `best/` can be published as it is.

What is not known is left out, and so is where models and data are on this machine.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from textwrap import dedent, indent

from data.models.hub import HUB_ID, OFFICIAL_MODELS, find_local_model, hub_repository
from data.models.named import resolve_input
from data.process.errors import InputError
from data.process.files import write_atomic
from data.runs.methods import METHODS, file_fields
from data.runs.names import printable
from data.runs.runs import LOCATIONS, read_record, run_dir
from data.sets.prepare import PUBLIC_SETS
from data.sets.rows import fill_template

HUB = "https://huggingface.co"


def write_card(directory, s, record):
    """Write the card of a run. s: its Settings. record: the content of its run.json in the end."""
    metadata = "".join(
        f"{field}: {json.dumps(value, ensure_ascii=False)}\n"  # JSON is YAML, too
        for field, value in card_metadata(s, record).items()
        if value
    )
    parts = [
        f"---\n{metadata}---",
        f"# {card_title(record)}",
        describe_model(s, record),
        f"## Validation\n\n{describe_validation(s, record)}",
        f"## Use\n\n{describe_use(s)}",
        f"## Training\n\n{describe_training(s, record)}",
    ]
    write_atomic(Path(directory) / "best" / "README.md", "\n\n".join(parts) + "\n")


def card_title(record):
    return "".join(filter(str.isprintable, printable(record["name"])))


def card_metadata(s, record):
    """The fields of the hub's metadata. Those that are not known are None."""
    is_distilled = METHODS[s.method].needs_teacher
    public_set, uses_rouge = PUBLIC_SETS.get(s.data), s.metric_for_best == "rouge_l"
    results = None
    if public_set and uses_rouge:
        score = {"type": "rouge", "name": "ROUGE-L", "value": round(record["best"], 2)}
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"type": public_set.repository, "name": f"{s.data}, validation rows"},
            "metrics": [score],
        }
        results = [{"name": card_title(record), "results": [result]}]
    return {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": None if s.method == "pretrain" else trace(s.student)[1],
        "teacher": trace(s.teacher)[1] if is_distilled else None,
        "datasets": [public_set.repository] if public_set else None,
        "dataset_license": data_license(s.data),
        "metrics": ["rouge"] if uses_rouge else None,
        "tags": ["gpt2", s.method, *(["knowledge-distillation"] if is_distilled else [])],
        "model-index": results,
    }


def data_license(name):
    """The licence of a data set as the hub spells it, None if it is not known."""
    if name == "demo":
        return "mit"  # it is made by this code
    return PUBLIC_SETS[name].license if name in PUBLIC_SETS else None


def trace(name):
    """The names of the runs that a model comes from, newest first, and the hub's id or the name of
    what the first of them was trained from, as Markdown; and that id, None if it is not known."""
    parts, seen = [], set()
    with suppress(InputError):  # a run.json that was damaged since
        # A run that was renamed may be called like what it was trained from.
        while (record := read_record(name)) and run_dir(name) not in seen:
            seen.add(run_dir(name))
            parts.append(code(record["name"]))
            if record["settings"].get("method") == "pretrain":
                return " from ".join([*parts, "random weights"]), None
            name = resolve_input(run_dir(name), record["settings"].get("student", ""))
    hub_id = find_hub_id(name)
    parts.append(f"[{hub_id}]({HUB}/{hub_id})" if hub_id else code(run_dir(name).name))
    return " from ".join(parts), hub_id


def find_hub_id(name):
    """The hub's id of a model, None for a directory, also for one that is no longer here."""
    repository = hub_repository(name)
    if os.path.exists(name) or not HUB_ID.fullmatch(repository):
        return None
    with suppress(InputError):  # a damaged cache
        if repository in map(hub_repository, OFFICIAL_MODELS) or find_local_model(name)[0]:
            return repository
    return None


def code(text):
    return f"`{printable(text).replace('`', '')}`"


def describe_model(s, record):
    is_new = s.method == "pretrain"
    student = f"{code(s.student)}, random weights" if is_new else trace(s.student)[0]
    lines = [
        f"A GPT-2 with {record['parameters']:,} parameters, trained by a from-scratch PyTorch "
        "implementation of [PromptKD](https://arxiv.org/abs/2402.12842) (Kim, Jang and Yang, "
        "Findings of EMNLP 2024) and of the methods that it is compared with.\n",
        f"- Method: {METHODS[s.method].label}",
        f"- {'Shape' if is_new else 'Base model'}: {student}",
    ]
    if s.teacher:
        lines.append(f"- Teacher: {trace(s.teacher)[0]}")
    if s.data == "demo":
        data = "the made-up word tasks of the implementation's demo"
    elif s.data in PUBLIC_SETS:
        repository = PUBLIC_SETS[s.data].repository
        data = f"[{repository}]({HUB}/datasets/{repository})"
    else:
        data = code(run_dir(s.data).name)
    if s.responses:
        data += ", with responses that were sampled from the teacher"
    if s.lm_data:
        data += f"; plain text: {code(run_dir(s.lm_data).name)}"
    lines.append(f"- Data: {data}")
    if license := data_license(s.data):
        lines.append(f"- Licence of the data: {license}")
    if s.method == "promptkd":
        lines.append(
            "- `prompt.safetensors` is the tuned soft prompt of the teacher. The model itself does "
            "not need it."
        )
    return "\n".join(lines)


def describe_validation(s, record):
    rows = f"{record['dev_rows']:,} validation rows"
    chosen = f"the best of the validations during training, after step {record['best_step']:,} of "
    chosen += f"{record['total_steps']:,}."
    if s.metric_for_best == "loss":
        score = f"Cross-entropy {record['best']:.3f} nats per response token on the references of"
        return f"{score} {rows}, {chosen}"
    return (
        f"ROUGE-L {record['best']:.2f} on {rows}, {chosen} One response per row was sampled at "
        f"temperature 1, from all tokens and without a ban on repetitions, of at most "
        f"{s.max_new_tokens} tokens. A row's score is the F-measure of the package rouge-score "
        "with its stemmer, the maximum over the row's references; this is the mean over the rows, "
        "× 100."
    )


def describe_use(s):
    request = "Once upon a time" if s.method == "pretrain" else fill_template("Name three colours.")
    text = dedent(
        """\
        ```python
        from transformers import pipeline

        generate = pipeline("text-generation", "PATH_OR_NAME_OF_THIS_MODEL")
        request = {request}
        options = {{"temperature": 1.0, "max_new_tokens": {n}}}  # the pipeline has its own defaults
        print(generate(request, return_full_text=False, **options))
        ```"""
    ).format(request=json.dumps(request), n=s.max_new_tokens)
    if s.method == "pretrain":
        return text
    template = fill_template("{instruction}", "{input}")
    return (
        f"{text}\n\nThe model was trained on requests of this form, and on those of an instruction "
        f"with an input:\n\n{indent(template, '    ')}"
    )


def describe_training(s, record):
    n_ranks, settings, parts = record["ranks"], asdict(s), []
    if command := record.get("command"):
        launcher = f"torchrun --nproc_per_node={n_ranks}" if n_ranks > 1 else "python"
        parts.append(indent(f"{launcher} {command}", "    "))
    versions = [record.get("versions", {}), *record.get("later_versions", [])]
    software = [f"{name} {version}" for used in versions for name, version in used.items()]
    device = f"{n_ranks} {'rank' if n_ranks == 1 else 'ranks'}, {record['device']}"
    parts.append(f"With {', '.join([*dict.fromkeys(software), device])}. The settings:")
    hidden = {"student", "teacher", *LOCATIONS, *file_fields()}
    shown = {k: v for k, v in settings.items() if v is not None and k not in hidden}
    parts.append(indent(json.dumps(shown, indent=1, ensure_ascii=False), "    "))
    return "\n\n".join(parts)
