"""The paper in miniature: every method, two students and five seeds, in the demo's world.

    python -m tests.study.miniature                    # all experiments that have no result yet
    python -m tests.study.miniature --groups table1    # those of one group
    python -m tests.study.miniature --released-exposure    # adds to the results of Table 1

An experiment is a training run with all that is measured on it. Its result is a JSON file in
docs/results/, and an experiment that has one is skipped: the work can be spread over days. Runs are
kept in out/study, which may be deleted. What an experiment needs and is not there is trained again.
`python -m tests.study.report` makes tables and plots of the results.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: each experiment has one thread

import argparse
import contextlib
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch

import losses
import train
from data.models.named import load_model
from data.models.prompts import load_prompt
from data.process.files import write_atomic
from data.runs.methods import METHODS, STAGES, ResponseSettings, Settings, preset
from data.runs.runs import read_record
from data.runs.stages import sample_responses
from data.runs.tuned_prompt import untuned_prompt
from data.sets.demo import MODELS_DIR
from data.sets.prepare import find_data_dir
from data.sets.rows import read_jsonl
from tests.study import measure, released

ROOT = Path(__file__).parents[2]
RESULTS, OUT = ROOT / "docs" / "results", ROOT / "out" / "study"
CPU = torch.device("cpu")
TEACHER, STUDENTS = "3x128x4", ("1x48x4", "1x96x4")
PROMPT_WIDTH = 128  # the teacher's
SEEDS, GRID_SEED = (1, 2, 3, 4, 5), 0
DEMO = {kind: preset(kind, "demo") for kind in (*STAGES, *METHODS)}

# The methods that start from the init make the same number of optimizer steps, of 64 rows. With the
# init's 24,000 rows they see as many rows as those that start from the pre-trained student.
INIT_BUDGET = {"steps": 375, "eval_interval": 75}
PRETRAINED_BUDGET = {"epochs": 6}
BUDGET = dict.fromkeys(("sft", "kd", "seqkd"), PRETRAINED_BUDGET)
BUDGET |= dict.fromkeys(("minillm", "gkd", "promptkd"), INIT_BUDGET)

# The grids of the learning rates. The init has SFT's rate, as in the paper. The prompt's rate is
# chosen after the student's, which is chosen with the second of the prompt's rates.
GRID = dict.fromkeys(BUDGET, (1e-3, 2e-3, 4e-3, 8e-3)) | {"minillm": (5e-4, 1e-3, 2e-3, 4e-3)}
PROMPT_GRID = (3e-4, 1e-3, 3e-3)
# The temperature of GKD's teacher is chosen as the prompt's rate is: after the student's rate,
# which is chosen with the second of the temperatures.
TEMPERATURES = (0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Variant:
    """A way to train a student."""

    method: str  # "init", or one of BUDGET
    changes: tuple = ()  # of Settings, as pairs of field and value
    patch: str | None = None  # of PATCHES
    init: str = "init"  # the variant that it starts from
    has_tuned_prompt: bool = False  # starts with the prompt that PromptKD tuned with the same seed
    has_tuned_temperature: bool = False  # its teacher has the temperature that the grid chose
    keep: int = 0  # checkpoints along training that are measured too
    students: tuple = STUDENTS[:1]


@contextlib.contextmanager
def sharp_teacher(temperature=0.5):
    """In the losses of the student and of the prompt the teacher has this temperature."""
    student_loss, prompt_loss = losses.student_loss, losses.prompt_loss

    def sharp_prompt_loss(p_prompted, q, p_bare, *others):
        return prompt_loss(p_prompted / temperature, q, p_bare / temperature, *others)

    with (
        mock.patch.object(losses, "student_loss", lambda q, p: student_loss(q, p / temperature)),
        mock.patch.object(losses, "prompt_loss", sharp_prompt_loss),
    ):
        yield


PATCHES = released.PATCHES | {"sharp-teacher": sharp_teacher}


def promptkd(patch=None, init="init", **changes):
    return Variant("promptkd", tuple(changes.items()), patch, init)


PROMPT_INITS, PROMPT_LENGTHS = ("text", "padding", "random"), (2, 6, 12)


def figure4_variant(init, length):
    """The variant with a prompt of this initialisation and length. PromptKD's own has six vectors
    from text."""
    return "promptkd" if (init, length) == ("text", 6) else f"{init}-{length}"


GROUPS = {
    "table1": {
        "init": Variant("init", students=STUDENTS),
        # PromptKD's prompt is measured on GKD's student, too, so GKD comes first.
        **{m: Variant(m, keep=5, students=STUDENTS) for m in ("gkd", "promptkd")},
        **{m: Variant(m, students=STUDENTS) for m in ("sft", "kd", "seqkd", "minillm")},
    },
    # What the tuned prompt adds: prompts that stay as they are, one of them tuned before; and GKD
    # with the time that PromptKD takes, and from a teacher that is more certain.
    "controls": {
        "fixed-tidy": promptkd(prompt_lr=0.0, prompt_text="Suppose you are a tidy student."),
        "fixed-busy": promptkd(prompt_lr=0.0, prompt_text="Suppose you are a busy student."),
        "fixed-tuned": replace(promptkd(prompt_lr=0.0), has_tuned_prompt=True),
        "gkd-equal-time": Variant("gkd", (("steps", 1200), ("eval_interval", 240))),
        "gkd-sharp": Variant("gkd", patch="sharp-teacher", students=STUDENTS),
    },
    "temperature": {
        "gkd-tuned": Variant("gkd", has_tuned_temperature=True, students=STUDENTS),
        "promptkd-tuned": Variant("promptkd", has_tuned_temperature=True, students=STUDENTS),
    },
    "table3": {"reg0": promptkd(reg_weight=0.0)},
    "table5": {
        "forward-reverse": promptkd(prompt_kl="forward"),
        "reverse-forward": promptkd(reg_kl="forward"),
        "forward-forward": promptkd(prompt_kl="forward", reg_kl="forward"),
    },
    "released": {
        **{name: promptkd(patch=name) for name in released.PATCHES},
        "late-init": Variant("init", (("epochs", 10), ("metric_for_best", "rouge_l"))),
        "promptkd-late-init": promptkd(init="late-init"),
        "gkd-late-init": Variant("gkd", init="late-init"),
    },
    "figure4": {
        figure4_variant(init, length): promptkd(prompt_init=init, prompt_length=length)
        for init in PROMPT_INITS
        for length in PROMPT_LENGTHS
        if figure4_variant(init, length) != "promptkd"
    },
}
VARIANTS = {name: v for group in GROUPS.values() for name, v in group.items()}


@dataclass(frozen=True)
class Experiment:
    """A training run. lr, prompt_lr, temperature: of the grid; None for those that the grid has
    chosen."""

    student: str
    variant: str
    seed: int
    lr: float | None = None
    prompt_lr: float | None = None
    temperature: float | None = None

    @property
    def name(self):
        if self.lr is None:
            return f"{self.student}/{self.variant}-s{self.seed}"
        prompt_lr = f"-promptlr{self.prompt_lr:g}" if self.prompt_lr else ""
        temperature = f"-temperature{self.temperature:g}" if self.temperature else ""
        return f"{self.student}/grid/{self.variant}-lr{self.lr:g}{prompt_lr}{temperature}"

    @property
    def path(self):
        return RESULTS / f"{self.name}.json"


# ---- the grid of learning rates ------------------------------------------------------------------


def best_validation(experiment):
    """The best ROUGE-L on the validation rows; None without a result."""
    if not experiment.path.is_file():
        return None
    return max(json.loads(experiment.path.read_text())["validation"]["rouge_l"])


def with_best(experiments, score):
    """The experiments, and the one of the highest score; None for it if a score is missing."""
    is_done = all(score(experiment) is not None for experiment in experiments)
    return experiments, max(experiments, key=score) if is_done else None


def grid_experiments(student, method, score=best_validation):
    """The experiments of a method's grid, and the best of them if all are done. Those of the
    prompt's grid are not among them."""
    prompt_lr = PROMPT_GRID[1] if method == "promptkd" else None
    rates = GRID[method]
    return with_best([Experiment(student, method, GRID_SEED, r, prompt_lr) for r in rates], score)


def prompt_grid_experiments(student, score=best_validation):
    """The experiments of the prompt's grid at the student's best rate, and the best of them."""
    _, best = grid_experiments(student, "promptkd", score)
    if best is None:
        return [], None
    return with_best([replace(best, prompt_lr=rate) for rate in PROMPT_GRID], score)


def temperature_grid_experiments(student, score=best_validation):
    """Two grids of GKD: of rates at the second temperature, and of temperatures at the best of
    these rates. Returns the experiments of the first, those of the second, and the best of the
    second. The second is empty if a result of the first is missing."""
    middle = {"seed": GRID_SEED, "temperature": TEMPERATURES[1]}
    rates = [Experiment(student, "gkd-tuned", lr=rate, **middle) for rate in GRID["gkd"]]
    _, best = with_best(rates, score)
    if best is None:
        return rates, [], None
    return rates, *with_best([replace(best, temperature=t) for t in TEMPERATURES], score)


def control_instead(experiment, score=best_validation):
    """The experiment that has the runs of this one: GKD from the sharp teacher, if that has the
    rate and the temperature that were chosen. Else None."""
    *_, best = temperature_grid_experiments(experiment.student, score)
    _, of_gkd = grid_experiments(experiment.student, "gkd", score)
    if experiment.variant != "gkd-tuned" or experiment.lr is not None or not best or not of_gkd:
        return None
    is_control = (best.lr, best.temperature) == (of_gkd.lr, 0.5)
    return replace(experiment, variant="gkd-sharp") if is_control else None


def teacher_temperature(experiment):
    """The temperature of an experiment's teacher; None if it is left as it is."""
    if not VARIANTS[experiment.variant].has_tuned_temperature:
        return None
    return experiment.temperature or temperature_grid_experiments(experiment.student)[2].temperature


def beyond_grid(experiments, best, field):
    """The experiment one step beyond a grid whose best rate is at its edge, else None. Nothing is
    chosen from it. field: "lr" or "prompt_lr"."""
    if best not in (experiments[0], experiments[-1]):
        return None
    neighbour = experiments[1] if best == experiments[0] else experiments[-2]
    rate = getattr(best, field) ** 2 / getattr(neighbour, field)
    return replace(best, **{field: float(f"{rate:.3g}")})


def learning_rates(experiment):
    """The fields of Settings with the rates of an experiment."""
    method = VARIANTS[experiment.variant].method
    if method == "init":
        return {"lr": grid_experiments(experiment.student, "sft")[1].lr}
    if experiment.lr is not None:
        rates = experiment.lr, experiment.prompt_lr
    elif experiment.variant == "gkd-tuned":
        rates = temperature_grid_experiments(experiment.student)[2].lr, None
    elif method == "promptkd":
        best = prompt_grid_experiments(experiment.student)[1]
        rates = best.lr, best.prompt_lr
    else:
        rates = grid_experiments(experiment.student, method)[1].lr, None
    return {"lr": rates[0], "prompt_lr": rates[1]}


# ---- training ------------------------------------------------------------------------------------


def train_teacher():
    values = DEMO["teacher"] | {"dtype": "float32", "data": "demo"}
    settings = Settings("sft", str(MODELS_DIR / TEACHER), **values)
    return train.run_stage("teacher", settings, OUT, None, CPU)


def teacher_responses():
    """The data set of SeqKD: the teacher's responses to the training requests."""
    limit = measure.MAX_NEW_TOKENS
    settings = ResponseSettings(student=train_teacher(), data="demo", max_new_tokens=limit)
    return sample_responses(OUT / "responses", settings, CPU)


def init_of(experiment):
    """The experiment whose student this one starts from; None if that is the pre-trained one."""
    variant = VARIANTS[experiment.variant]
    if BUDGET.get(variant.method) is not INIT_BUDGET:
        return None
    return Experiment(experiment.student, variant.init, experiment.seed)


def train_student(experiment):
    """Train the student of an experiment, or find its run in out/study. Returns the directories of
    this run and of the teacher."""
    variant = VARIANTS[experiment.variant]
    method, teacher = variant.method, train_teacher()
    values = DEMO[method] | BUDGET.get(method, {})
    values |= learning_rates(experiment) | dict(variant.changes)
    values |= {"data": "demo", "dtype": "float32", "seed": experiment.seed}
    student = str(MODELS_DIR / experiment.student)
    if method == "init":
        method = "sft"
    else:
        values["teacher"] = teacher if method != "sft" else None
    if method == "seqkd":
        values["responses"] = teacher_responses()
    if init := init_of(experiment):
        student, _ = train_student(init)
    settings = Settings(method, student, **values)
    with contextlib.ExitStack() as patches:
        if variant.patch:
            patches.enter_context(PATCHES[variant.patch]())
        if temperature := teacher_temperature(experiment):
            patches.enter_context(sharp_teacher(temperature))
        if variant.has_tuned_prompt:
            tuned, _ = train_student(Experiment(experiment.student, "promptkd", experiment.seed))
            P = load_prompt(Path(tuned) / "best", PROMPT_WIDTH)  # (prompt_length, C)
            patches.enter_context(mock.patch.object(train, "untuned_prompt", lambda *_: P.clone()))
        name = experiment.name.replace("/", "-")
        return train.run_stage(name, settings, OUT, None, CPU, keep=variant.keep), teacher


# ---- results -------------------------------------------------------------------------------------


def training_result(experiment, directory):
    """The JSON of how a run was trained."""
    steps = [step for _, step in read_jsonl(Path(directory) / "metrics.jsonl")]
    validated = [step for step in steps if "val_loss" in step]
    names = {"step": "step", "val_loss": "loss", "val_rouge_l": "rouge_l"}
    names |= {"val_prompted_loss": "prompted_loss", "val_bare_loss": "bare_loss"}
    validation = {}
    for field, name in names.items():
        if any(field in step for step in validated):
            validation[name] = [step.get(field) for step in validated]
    trained = [step for step in steps if step["step"] > 0]
    record = read_record(directory)
    result = {"student": experiment.student, "variant": experiment.variant, "seed": experiment.seed}
    # Not where the pre-trained models lie on this machine.
    settings = record["settings"] | {"student": Path(record["settings"]["student"]).name}
    result |= {"settings": settings, "parameters": record["parameters"]}
    result |= {"best_step": record["best_step"], "steps": len(trained), "hours": record["hours"]}
    seconds = [sum(step["seconds"].values()) for step in trained]
    result["seconds_per_step"] = statistics.fmean(seconds)  # MiniLLM samples at one in 16 only
    result["memory_resident_gb"] = max(step["memory_resident_gb"] for step in trained)
    result["validation"] = validation
    if "kl_prompted_bare" in trained[0]:
        # Means of 25 steps, which are noisy one by one.
        curves = {name: [s[name] for s in trained] for name in ("kl_prompted_bare", "prompt_kd")}
        result["training"] = {
            name: [statistics.fmean(values[i : i + 25]) for i in range(0, len(values), 25)]
            for name, values in curves.items()
        }
    return result


def compute(experiment):
    """Train and measure an experiment, and write its result."""
    start = time.perf_counter()
    directory, teacher = train_student(experiment)
    result, variant = training_result(experiment, directory), VARIANTS[experiment.variant]
    if experiment.lr is None:
        p, tokenizer = load_model(teacher, CPU)
        exposure_teacher = measure.exposure_teacher(p, tokenizer)
        has_prompt = variant.method == "promptkd"

        def effect(student, P=None):
            return measure.prompt_effect(p, tokenizer, student, P)

        def prompt_of(path):
            return load_prompt(path, PROMPT_WIDTH) if has_prompt else None

        best = Path(directory) / "best"
        result["rouge_l"] = measure.rouge_l(directory)
        result["kinds"] = measure.rouge_l_by_kind(directory)
        result["exposure"] = measure.exposure(exposure_teacher, directory)
        result["effect"] = effect(directory, prompt_of(best))
        if variant.keep:
            init, _ = train_student(init_of(experiment))
            settings = Settings(**result["settings"])
            P = untuned_prompt(settings, p.wte.weight, tokenizer) if has_prompt else None
            result["along"] = [{"step": 0, "effect": effect(init, P)}]
            for path in sorted(Path(directory).glob("kept/step-*")):
                point = {"step": int(path.name[5:]), "effect": effect(path, prompt_of(path))}
                point["exposure"] = measure.exposure(exposure_teacher, path)
                result["along"].append(point)
        if experiment.variant == "promptkd":
            # The student was trained towards the prompted teacher. These two never saw the prompt.
            gkd, _ = train_student(Experiment(experiment.student, "gkd", experiment.seed))
            others = {"init": init, "gkd": gkd}
            result["effect_on"] = {n: effect(m, prompt_of(best)) for n, m in others.items()}
    result["seconds"] = time.perf_counter() - start
    result["torch"] = torch.__version__
    write_result(experiment, result)


def write_result(experiment, result):
    write_atomic(experiment.path, json.dumps(measure.rounded(result), indent=1) + "\n")


def add_released_exposure(experiment):
    """Add to a result how the released code measures exposure bias. The run is trained again if it
    is not in out/study."""
    student, teacher = train_student(experiment)
    result = json.loads(experiment.path.read_text())
    result["exposure_released"] = measure.released_exposure(*load_model(teacher, CPU), student)
    write_result(experiment, result)


def add_missing_released_exposure(jobs):
    """Call `add_released_exposure` for the methods of Table 1 with the smaller student."""
    experiments = [Experiment(STUDENTS[0], m, seed) for m in GROUPS["table1"] for seed in SEEDS]
    found = [e for e in experiments if e.path.is_file()]
    missing = [e for e in found if "exposure_released" not in json.loads(e.path.read_text())]
    # One at a time: two could train the same init.
    for experiment in missing:
        call_all([(experiment.name, add_released_exposure, experiment)], jobs)


def compute_teacher():
    """Train and measure the teacher, and write its result."""
    directory = train_teacher()
    experiment = Experiment(TEACHER, "teacher", 10)
    result = training_result(experiment, directory)
    result["rouge_l"] = measure.rouge_l(directory)
    result["kinds"] = measure.rouge_l_by_kind(directory)
    write_result(experiment, result)


# ---- the command ---------------------------------------------------------------------------------


def call_logged(name, function, *args):
    """Call a function in this process with one thread; what it prints goes to out/study/logs."""
    torch.set_num_threads(1)
    log = OUT / "logs" / f"{name.replace('/', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", buffering=1) as file, contextlib.redirect_stdout(file):
        function(*args)


def call_all(calls, jobs):
    """Make calls (name, function, arguments), `jobs` at a time, each in a process of its own: the
    peak memory is that of one run."""
    context, start = multiprocessing.get_context("spawn"), time.perf_counter()
    with ProcessPoolExecutor(jobs, context, max_tasks_per_child=1) as pool:
        futures = [pool.submit(call_logged, name, f, *args) for name, f, *args in calls]
        for (name, *_), future in zip(calls, futures):
            future.result()
            print(f"{(time.perf_counter() - start) / 60:6.1f} min  {name}", flush=True)


def compute_missing(experiments, jobs):
    """Train and measure the experiments that have no result. What several of them start from is
    trained first: no two may train the same run."""
    missing = [e for e in experiments if not e.path.is_file()]
    if not missing:
        return
    call_all([("teacher", train_teacher)], jobs)
    if any(e.variant == "seqkd" for e in missing):
        call_all([("responses", teacher_responses)], jobs)
    inits = dict.fromkeys(init for e in missing if (init := init_of(e)))
    call_all([(init.name, train_student, init) for init in inits], jobs)
    call_all([(e.name, compute, e) for e in missing], jobs)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.study.miniature")
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--jobs", type=int, default=2, help="experiments at a time, a thread each")
    help = "instead, add the released code's exposure bias to the results that lack it"
    parser.add_argument("--released-exposure", action="store_true", help=help)
    args = parser.parse_args(argv)
    find_data_dir("demo")  # written before two processes need it
    if args.released_exposure:
        return add_missing_released_exposure(args.jobs)
    if not Experiment(TEACHER, "teacher", 10).path.is_file():
        call_all([("teacher", compute_teacher)], args.jobs)
    for methods in (["sft"], [method for method in BUDGET if method != "sft"]):  # inits: SFT's rate
        grid = [e for s in STUDENTS for method in methods for e in grid_experiments(s, method)[0]]
        compute_missing(grid, args.jobs)
    compute_missing([e for s in STUDENTS for e in prompt_grid_experiments(s)[0]], args.jobs)
    beyond = [beyond_grid(*grid_experiments(s, method), "lr") for s in STUDENTS for method in GRID]
    beyond += [beyond_grid(*prompt_grid_experiments(s), "prompt_lr") for s in STUDENTS]
    compute_missing([e for e in beyond if e], args.jobs)
    for group in args.groups:
        if any(variant.has_tuned_temperature for variant in GROUPS[group].values()):
            for i in range(2):  # the rates, then the temperatures
                grid = [e for s in STUDENTS for e in temperature_grid_experiments(s)[i]]
                compute_missing(grid, args.jobs)
        experiments = [
            Experiment(student, name, seed)
            for student in reversed(STUDENTS)  # the demo's first
            for name, variant in GROUPS[group].items()
            for seed in SEEDS
            if student in variant.students
        ]
        compute_missing([e for e in experiments if not control_instead(e)], args.jobs)


if __name__ == "__main__":
    main()
