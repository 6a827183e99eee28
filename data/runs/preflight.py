"""What is checked of a plan before its first stage, because a later one would fail after hours."""

from data.models.checkpoint import read_config
from data.models.copies import check_shared_out
from data.models.named import check_weights, find_model
from data.process import dist
from data.process.errors import InputError
from data.runs.methods import METHODS
from data.runs.paper import DEMO_SETS
from data.runs.runs import read_record
from data.sets.prepare import find_data_dir
from data.sets.rows import (
    MAX_LENGTH,
    MAX_REQUEST,
    encode_request,
    encode_training_rows,
    read_rows,
)


def check_plan(planned, out):
    """Raise InputError if a stage of a plan can't use what it reads: models whose weights can't be
    loaded or that have too few positions for a row, and what an earlier stage leaves in `out`."""
    made = {str(stage.directory): stage.student.origin for stage in planned}
    if any(made.keys() & stage.inputs.values() for stage in planned):
        check_shared_out(out)
    records = dist.run_on_rank0(lambda: [read_record(stage.directory) for stage in planned])
    left = [(s, record) for s, record in zip(planned, records) if not record.get("complete")]
    origins = {str(stage.directory): stage.student.origin for stage, _ in left}
    # The weights that the first stage reads are read at once.
    known = {*origins, *(name for stage, _ in left[:1] for name in stage.inputs.values())}
    later = []
    for stage, record in left:
        for field in [field for field in ("student", "teacher") if field in stage.inputs]:
            name = stage.inputs[field]
            if not record:  # what has begun resumes; its responses may be short enough
                check_positions(origins.get(name, name), field, stage)
            if name not in known:
                later.append(name)
    for name in dict.fromkeys(later):
        check_weights(name)


def check_positions(name, field, stage):
    """Raise InputError if a model has too few positions for a row of a stage. name: of the model
    itself, or of the one that the stage's model is trained from. field: "student" or "teacher"."""
    directory, tokenizer, _ = find_model(name)
    n_positions, s, prompt_length = read_config(directory).n_positions, stage.settings, 0
    if field == "teacher" and s.prompt_text is not None:
        prompt_length = s.prompt_length or len(tokenizer.encode_ordinary(s.prompt_text))
    # Only few models have to be compared with all rows.
    if n_positions >= prompt_length + max(MAX_LENGTH, MAX_REQUEST + s.max_new_tokens):
        return
    found, fix = f"{name}: has {n_positions} positions", "use a model with more"
    corpus = stage.inputs.get("lm_data")
    if corpus and s.block_size > n_positions:
        raise InputError(f"{found}, and a block of {corpus} needs {s.block_size}; {fix}")
    needed, row = max(positions_of_rows(s, field, tokenizer), default=(0, ""))
    if needed + prompt_length > n_positions:
        fix += ", or shorten such rows or leave them out"
        if prompt_length and needed < n_positions:
            fix = f"give --prompt-length {n_positions - needed} or less, or use a model with more"
        problem = f"{row} needs {needed + prompt_length} in the stage {stage.directory.name}"
        raise InputError(f"{found}, and {problem}; {fix}")


def positions_of_rows(s, field, tokenizer):
    """How many positions each row takes in the student or the teacher of Settings `s`, without the
    prompt, and where the row is: [(n, text)]. A response to be sampled counts at its limit."""
    found, data_dir = [], dist.run_on_rank0(find_data_dir, s.data)

    def add(request, response, row):  # lengths; the last token is only predicted
        found.append((request + response - 1, row.location))

    rows = read_rows(data_dir / "train.jsonl", s.max_train_rows)
    of_teacher = s.method == "responses" or s.responses is not None  # in place of the rows' own
    is_sampled = of_teacher or METHODS[s.method].start == "init"
    for e in encode_training_rows(rows, tokenizer):
        own, new = 0 if of_teacher else len(e.response), s.max_new_tokens if is_sampled else 0
        add(len(e.request), max(own, new), rows[e.index])
    if s.method == "responses":
        return found
    rows = read_rows(data_dir / "dev.jsonl", s.max_dev_rows)
    examples = encode_training_rows(rows, tokenizer)
    for e in examples:
        add(len(e.request), len(e.response), rows[e.index])
    sampled = []
    # Without any example the first stage is refused for that.
    if examples and field == "student" and s.metric_for_best == "rouge_l":
        sampled += rows
    for part in DEMO_SETS if s.data == "demo" else ():  # of the table at the end
        sampled += read_rows(data_dir / ("" if part == "test" else part) / "test.jsonl")
    for row in sampled:
        add(len(encode_request(row, tokenizer)[0]), s.max_new_tokens, row)
    return found
