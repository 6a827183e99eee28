"""What is checked of a plan before its first stage, because a later one would fail after hours."""

from data.models.checkpoint import read_config
from data.models.copies import check_shared_out
from data.models.named import check_weights, find_model
from data.process import dist
from data.process.errors import InputError
from data.runs.methods import METHODS
from data.runs.runs import read_record
from data.sets.prepare import find_data_dir
from data.sets.rows import MAX_LENGTH, MAX_REQUEST, encode_training_rows, read_rows


def check_plan(planned, out):
    """Raise InputError if a stage of a plan can't use what it reads: models whose weights can't be
    loaded or that have too few positions for a row, and what an earlier stage leaves in `out`."""
    made = {str(stage.directory): stage.student.origin for stage in planned}
    if any(made.keys() & stage.inputs.values() for stage in planned):
        check_shared_out(out)
    for stage in planned:
        if dist.run_on_rank0(read_record, stage.directory):
            continue  # it has begun
        for field in {"student", "teacher"} & stage.inputs.keys():
            name = made.get(stage.inputs[field], stage.inputs[field])
            if len(planned) > 1:
                check_weights(name)
            check_positions(name, field, stage)


def check_positions(name, field, stage):
    """Raise InputError if a model has too few positions for a row of a stage. name: of the model
    itself, or of the one that the stage's model is trained from. field: "student" or "teacher"."""
    directory, tokenizer, _ = find_model(name)
    n_positions, s, prompt_length = read_config(directory).n_positions, stage.settings, 0
    if field == "teacher" and s.prompt_text is not None:
        prompt_length = s.prompt_length or len(tokenizer.encode_ordinary(s.prompt_text))
    # Only few models have to be compared with all rows.
    if n_positions < prompt_length + max(MAX_LENGTH, MAX_REQUEST + s.max_new_tokens):
        needed, row = max(positions_of_rows(s, field, tokenizer), default=(0, ""))
        if needed + prompt_length > n_positions:
            problem = f"has {n_positions} positions, and {row} needs {needed + prompt_length}"
            fix = "use a model with more, or leave such rows out"
            raise InputError(f"{name}: {problem} in the stage {stage.directory.name}; {fix}")


def positions_of_rows(s, field, tokenizer):
    """How many positions each row takes in the student or the teacher of Settings `s`, without the
    prompt, and which row it is: [(n, text)]. A response to be sampled counts at its limit."""
    if s.method == "responses":
        limits, is_sampled = {"train": s.max_train_rows}, {"train": True}
    else:
        limits = {"train": s.max_train_rows, "dev": s.max_dev_rows}
        is_sampled = {"train": METHODS[s.method].start == "init"}
        is_sampled["dev"] = field == "student" and s.metric_for_best == "rouge_l"
        if s.responses is not None:
            del limits["train"]  # they are sampled by an earlier stage
    found, data_dir = [], dist.run_on_rank0(find_data_dir, s.data)
    for split, limit in limits.items():
        path = data_dir / f"{split}.jsonl"
        n_new = s.max_new_tokens if is_sampled[split] else 0
        for e in encode_training_rows(read_rows(path, limit), tokenizer):
            # The last token is only predicted.
            n = len(e.request) + max(len(e.response), n_new) - 1
            found.append((n, f"row {e.index + 1} of {path}"))
    return found
