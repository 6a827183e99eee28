"""Which stages a command of train.py has, in their order, each with all its settings."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from data.models.named import config_parameters, known_parameters
from data.models.tokenizer import GPT2_VOCAB_SIZE, load_tokenizer
from data.process.dist import print_once
from data.process.errors import InputError
from data.runs.methods import (
    METHODS,
    SIZES,
    STAGES,
    ResponseSettings,
    Settings,
    file_fields,
    find_overrides,
    nearest_size,
    preset,
)
from data.runs.names import base_label, override_suffix
from data.runs.options import parse_shape
from data.runs.paper import PUBLISHED, paper_row
from data.runs.runs import read_record
from data.sets.demo import STUDENT, TEACHER, TOKENIZER_DIR

MAX_NAME_BYTES = 255  # of a file or directory, on the usual file systems


@dataclass(frozen=True)
class Model:
    """What is known of a model that a stage starts from. It may be one that is still to be made."""

    name: str  # as settings have it
    base: str  # the short name of what it was trained from (see `data.runs.names.base_label`)
    origin: str  # a named model with the same tokenizer
    n_parameters: int | None  # None: not known before it is downloaded
    paper: str | None  # which of the paper's runs it is


@dataclass(frozen=True)
class Stage:
    """A stage that a command runs, or skips if it is complete."""

    kind: str  # a key of STAGES or METHODS, or "responses"
    directory: Path
    settings: Settings | ResponseSettings | None  # None: they depend on a size that is not known
    student: Model  # that is trained; of "responses", the teacher that is sampled from
    inputs: dict  # what it reads, {field of settings: name of a model, data set or file}
    paper: str | None = None  # which of the paper's runs it is
    keep: int = 0  # checkpoints to keep

    @property
    def label(self):
        return self.kind if self.kind == "responses" else (STAGES | METHODS)[self.kind].label

    def result(self):
        """The Model that this stage leaves."""
        record = read_record(self.directory)
        paper = record.get("paper") if record else self.paper
        return replace(self.student, name=str(self.directory), paper=paper)


def plan_stages(args, dtype):
    """The stages of a command, in their order: the teacher, the student's init, the teacher's
    responses, and the method itself, as far as it needs them. Training carries out this list.

    args: of train.py. Reads what is here, downloads and writes nothing. Under torchrun, call it
    with dist.run_on_rank0.
    """
    method = METHODS[args.method]
    if method.start == "shape":
        return [plan_stage(args, dtype, args.method, new_model(args))]
    planned, teacher, responses = [], None, None
    teacher_name, student_name = named_models(args)
    if method.needs_teacher:
        teacher = named_model(teacher_name)
        if not args.sft_teacher:
            planned.append(plan_stage(args, dtype, "teacher", teacher))
            teacher = planned[-1].result()
    student = named_model(student_name)
    if method.start == "init" and not args.init:
        planned.append(plan_stage(args, dtype, "init", student))
        student = planned[-1].result()
    if method.teacher_responses:
        planned.append(plan_responses(args, dtype, teacher))
        responses = str(planned[-1].directory)
    planned.append(plan_stage(args, dtype, args.method, student, teacher, responses))
    for stage in planned:
        check_name(stage.directory.name)
    return planned


def check_name(name):
    """Raise InputError, before the first stage is trained, if a run's name is too long."""
    if (n := len(os.fsencode(name))) > MAX_NAME_BYTES:
        problem = f"has {n} bytes, and a file's name at most {MAX_NAME_BYTES}"
        fix = "rename the directories of data and models, or give fewer options"
        raise InputError(f"the run's name {name[:40]}... {problem}; {fix}")


def named_models(args):
    """The names of teacher and student, from the options. None if there is no such model."""
    if METHODS[args.method].start == "shape":
        return None, None
    is_demo = args.data == "demo"
    teacher = args.sft_teacher or args.teacher or (TEACHER if is_demo else "gpt2-xl")
    student = args.init or args.student or (STUDENT if is_demo else "gpt2")
    return teacher if METHODS[args.method].needs_teacher else None, student


def named_model(name):
    """The Model of a run, a directory or a hub id. Warns if it is a run that is not complete."""
    record = read_record(name)
    if record and not record.get("complete"):
        problem = "its training is not complete; what it has saved so far is taken"
        print_once(f"warning: {name}: {problem}")
    return Model(
        name=name,
        base=base_label(name),
        origin=name,
        n_parameters=known_parameters(name),
        paper=record.get("paper", PUBLISHED.get(name)),
    )


def new_model(args):
    """The Model of --shape, with random weights."""
    is_demo = args.data == "demo"
    n_vocab = load_tokenizer(TOKENIZER_DIR).n_vocab if is_demo else GPT2_VOCAB_SIZE
    return Model(
        name=args.shape,
        base=base_label(args.shape),
        origin=args.shape,
        n_parameters=config_parameters(parse_shape(args.shape, n_vocab)),
        paper=None,
    )


def plan_stage(args, dtype, kind, student, teacher=None, responses=None):
    """The Stage of a kind. student, teacher: each a Model. responses: seqkd's data directory."""
    is_own, overrides = kind == args.method, {}
    name = f"{kind}-{student.base}{data_label(args)}"
    if is_own:
        overrides = find_overrides(kind, args)
        name += "".join(override_suffix(option, value) for option, value in overrides.items())
        name += f"-s{args.seed}" if kind != "pretrain" or args.seed != 10 else ""
    values = {
        "method": "sft" if kind in STAGES else kind,
        "student": student.name,
        "data": args.data,
        "teacher": teacher and teacher.name,
        "responses": responses,
        "dtype": dtype,
        "max_train_rows": args.train_rows,
        "max_dev_rows": args.dev_rows,
    }
    given = {option.field: value for option, value in overrides.items()}
    settings = paper = None
    if size := preset_size(kind, student, is_demo=args.data == "demo"):
        values |= preset(kind, size) | given
        values |= {"seed": args.seed} if is_own else {}
        settings = Settings(**values)
        paper = paper_row(
            kind,
            settings,
            overrides={option.name for option in overrides},
            from_init=is_own and METHODS[kind].start == "init",
            start_row=student.paper,
            teacher_row=teacher and teacher.paper,
        )
    fields = {"data", "student", "teacher", "responses", *file_fields()}
    inputs = {f: value for f, value in (values | given).items() if f in fields and value}
    if kind == "pretrain":
        del inputs["student"]  # a shape
    return Stage(
        kind=kind,
        directory=Path(args.out) / name,
        settings=settings,
        student=student,
        inputs=inputs,
        paper=paper,
        keep=plan_keep(Path(args.out) / name, args.keep) if is_own else 0,
    )


def plan_keep(directory, asked):
    """How many checkpoints a run keeps: `asked`, of --keep, or what it was started with if that is
    None. Prints a difference, which is never a reason to refuse the run."""
    record = read_record(directory)
    found, is_complete = record.get("keep"), record.get("complete")
    if is_complete and found is None:  # the run is older than the field
        found = len(list(directory.glob("kept/step-*")))
    if asked is None and found and not is_complete:
        print(f"{directory}: was started with --keep {found} and resumes with it", flush=True)
    if asked is not None and found not in (None, asked):
        problem = f"was started with --keep {found}, and from here on --keep {asked} counts"
        fix = f"for evenly spaced checkpoints give --keep {found}, or move it elsewhere first"
        if is_complete:
            problem = f"is complete, with the checkpoints of --keep {found}, and gets no others"
            fix = f"for those of --keep {asked}, move it elsewhere and give this command again"
        print(f"warning: {directory}: {problem}; {fix}", flush=True)
    return (found if asked is None else asked) or 0


def data_label(args):
    """What a run's name says of its data: nothing for all of dolly."""
    label = "" if args.data == "dolly" else f"-{Path(os.path.abspath(args.data)).name}"
    label += "-dir" if label == "-demo" and args.data != "demo" else ""  # not our demo
    return f"{label}-{args.train_rows}rows" if args.train_rows else label


def preset_size(kind, student, is_demo):
    """Whose presets a stage has: "demo", or the size of GPT-2 nearest to its student's, which is
    printed unless it is the same. None if the student's size is not known."""
    if is_demo:
        return "demo"
    n = student.n_parameters
    if n is None:
        return None
    size = nearest_size(n)
    is_pretrained = kind in STAGES or METHODS[kind].start != "shape"
    if is_pretrained and abs(n / SIZES[size] - 1) > 0.05:
        note = f"its {kind} stage uses the preset of GPT-2 {size}"
        print(f"{student.name} has {n:,} parameters; {note}", flush=True)
    return size


def trained_models(stage):
    """The models of a method's stage, {label: directory or name}: the teacher and the student's
    init, if it has them, and the student."""
    models = {"teacher": stage.settings.teacher}
    if METHODS[stage.kind].start == "init":
        models["init"] = stage.settings.student
    labels = {STAGES[kind].label: name for kind, name in models.items() if name}
    return labels | {stage.label: str(stage.directory)}


def plan_responses(args, dtype, teacher):
    """The Stage in which the teacher's responses to the training requests are sampled."""
    limit = METHODS[args.method].demo["max_new_tokens"] if args.data == "demo" else None
    settings = ResponseSettings(
        student=teacher.name,
        data=args.data,
        max_train_rows=args.train_rows,
        max_new_tokens=limit or Settings.max_new_tokens,
        dtype=dtype,
    )
    return Stage(
        kind="responses",
        directory=Path(args.out) / f"responses-{teacher.base}{data_label(args)}",
        settings=settings,
        student=teacher,
        inputs={"student": teacher.name, "data": args.data},
    )
