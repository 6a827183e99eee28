"""Tables and plots of the miniature, from its results.

    python -m tests.study.report

Reads docs/results, trains nothing, and writes the plots in docs/ and the blocks of README.md and
docs/miniature.md: what stands between a line `<!-- study: NAME -->` and a line `<!-- end -->`. The
text outside of the blocks stays as it is. What has no result yet reads "not run".
"""

import argparse
import re
import statistics
from functools import partial

from data.process.command_line import run_command_line
from data.process.errors import InputError
from data.process.files import write_atomic
from data.runs.paper import PAPER_SCORES
from data.runs.report import format_table
from tests.study import plots
from tests.study.measure import KINDS
from tests.study.miniature import (
    GRID,
    GROUPS,
    PROMPT_INITS,
    PROMPT_LENGTHS,
    ROOT,
    SEEDS,
    STUDENTS,
    TEACHER,
    VARIANTS,
    Experiment,
    beyond_grid,
    control_instead,
    figure4_variant,
    grid_experiments,
    prompt_grid_experiments,
    temperature_grid_experiments,
)
from tests.study.results import (
    COLUMNS,
    KLS,
    LARGE,
    LOSSES,
    METHODS,
    NAMES,
    NOT_APPLICABLE,
    NOT_RUN,
    ON_REFERENCES,
    ON_STUDENT,
    RESPONSES,
    REVERSE_KLS,
    SMALL,
    by_seed,
    common_step,
    differences,
    effect,
    effect_along,
    effect_on,
    epsilon_at,
    error_per_step,
    exposure_at,
    format_interval,
    format_mean,
    format_median,
    load_results,
    mean_interval,
    measured,
    minutes,
    released_exposure_at,
    rouge_l,
    table1_results,
    teacher_result,
)

DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", DOCS / "miniature.md")
BY_NAME = {name: method for method, name in NAMES.items()}
RIVALS = [method for method in METHODS if method != "promptkd"]


def markdown(table):
    return format_table(table, markdown=True)


def mean_cell(results, student, variant, metric, digits=1):
    return format_mean(measured(results, student, variant, metric), digits)


def difference_cell(results, student, a, b, metric, digits=1):
    """The cell of a metric of variant a minus that of variant b, paired over the seeds."""
    pairs = (measured(results, student, variant, metric) for variant in (a, b))
    return format_interval(differences(*pairs), digits)


def scores_of_sets(student, way="sampled"):
    """ROUGE-L on each set and on average, as columns of the two functions below."""
    return [(student, rouge_l(column, way), 1) for column in COLUMNS]


def mean_rows(results, variants, columns):
    """Rows of means. variants: {label: variant}; columns: (student, metric, digits) of each."""
    return [
        [label, *(mean_cell(results, s, variant, metric, n) for s, metric, n in columns)]
        for label, variant in variants.items()
    ]


def difference_rows(results, pairs, columns):
    """Rows of differences, paired over seeds. pairs: {label: (variant, variant to subtract)};
    columns: (student, metric, digits) of each."""
    return [
        [label, *(difference_cell(results, s, *pair, metric, n) for s, metric, n in columns)]
        for label, pair in pairs.items()
    ]


# ---- models, learning rates, Table 1 -------------------------------------------------------------


def teacher_cell(results, column, way="sampled"):
    result = teacher_result(results)
    return NOT_RUN if result is None else f"{rouge_l(column, way)(result):.1f}"


def teachers_rouge_l(result):
    """The teacher's ROUGE-L on dev, with the prompt of a run's best checkpoint if it has one."""
    return result["effect"]["rouge_l"]["teacher"]


def models_table(results):
    """The models' sizes, and what the untuned prompt does to the teacher."""

    def loss(name):
        return lambda result: result["validation"][name][0]

    def prompted_rouge_l(result):
        return result["along"][0]["effect"]["rouge_l"]["teacher"]

    # The teacher and the untuned prompt are the same for all runs. GKD's has no prompt.
    columns = {
        "validation loss": ("promptkd", loss("bare_loss"), 4),
        "with the untuned prompt": ("promptkd", loss("prompted_loss"), 4),
        "validation ROUGE-L": ("gkd", teachers_rouge_l, 1),
        "with it": ("promptkd", prompted_rouge_l, 1),
    }
    table = [["model", "parameters", *columns]]
    teacher = teacher_result(results)
    student = SMALL if by_seed(results, SMALL, "promptkd") else LARGE
    cells = [mean_cell(results, student, *column) for column in columns.values()]
    table.append(["teacher", f"{teacher['parameters']:,}" if teacher else NOT_RUN, *cells])
    for student in STUDENTS:
        found = next(iter(table1_results(results, student)), None)
        parameters = f"{found['parameters']:,}" if found else NOT_RUN
        table.append([f"student {student}", parameters, *[NOT_APPLICABLE] * len(columns)])
    return markdown(table)


def grids(results):
    """All grids of learning rates, as (student, whose rate, field of Experiment, experiments, the
    best of them). The best is None if a result is missing; then the prompt's grid is empty."""
    score, found = partial(grid_score, results), []
    for student in STUDENTS:
        for method in GRID:
            found.append((student, NAMES[method], "lr", *grid_experiments(student, method, score)))
        grid = prompt_grid_experiments(student, score)
        found.append((student, "the prompt", "prompt_lr", *grid))
    return found


def grid_score(results, experiment):
    """The best ROUGE-L on the validation rows; None without a result."""
    result = results.get(experiment.name)
    return result and max(result["validation"]["rouge_l"])


def grid_table(results):
    table = [["student", "rate of", "rates and their scores", "chosen", "one step beyond"]]
    for student, label, field, experiments, best in grids(results):
        cells = [", ".join(score_cell(results, e, field) for e in experiments) or NOT_RUN]
        beyond = beyond_grid(experiments, best, field) if best else None
        chosen = f"{getattr(best, field):g}" if best else NOT_RUN
        cells += [f"{chosen}, at the edge" if beyond else chosen]
        cells += [score_cell(results, beyond, field) if beyond else NOT_APPLICABLE]
        table.append([student, label, *cells])
    return markdown(table)


def score_cell(results, experiment, field):
    """What a grid says of an experiment: "rate: score"."""
    score = grid_score(results, experiment)
    return f"{getattr(experiment, field):g}: {NOT_RUN if score is None else f'{score:.1f}'}"


def settings_table(results):
    """How the methods were trained."""
    head = ["starts from", "steps", "rows per step", "schedule", "warm-up, steps"]
    table = [["method", *head, *(f"rate, {student}" for student in STUDENTS)]]
    for method in METHODS:
        by_student = [by_seed(results, student, method).values() for student in STUDENTS]
        found = [next(iter(of_student), None) for of_student in by_student]
        if not any(found):
            table.append([NAMES[method], *[NOT_RUN] * (len(table[0]) - 1)])
            continue
        any_result = found[0] or found[1]
        s = any_result["settings"]
        cells = [f"{any_result['steps']:,}", str(s["global_batch_size"])]
        cells += [s["schedule"], str(s["warmup_steps"])]
        start = "the init" if method in plots.INIT_METHODS else "pre-trained weights"
        rates = []
        for result in found:
            values = result["settings"] if result else {}
            prompt_lr = values.get("prompt_lr")
            rate = f"{values['lr']:g}" if result else NOT_RUN
            rates.append(f"{rate}, the prompt's {prompt_lr:g}" if prompt_lr else rate)
        table.append([NAMES[method], start, *cells, *rates])
    return markdown(table)


def table_1(results, student, way="sampled"):
    teacher = ["teacher", *(teacher_cell(results, column, way) for column in COLUMNS)]
    rows = mean_rows(results, BY_NAME, scores_of_sets(student, way))
    return markdown([["ROUGE-L", *COLUMNS], teacher, *rows])


def differences_table(results, student, way="sampled"):
    """PromptKD minus each other method."""
    pairs = {NAMES[rival]: ("promptkd", rival) for rival in RIVALS}
    rows = difference_rows(results, pairs, scores_of_sets(student, way))
    return markdown([["PromptKD minus", *COLUMNS], *rows])


# ---- cost ----------------------------------------------------------------------------------------


def table_2(results):
    """What training the small student costs."""
    columns = {
        "s per step": (lambda result: result["seconds_per_step"], 3),
        "minutes": (minutes, 1),
        "resident, GB": (lambda result: result["memory_resident_gb"], 2),
    }
    table = [["cost", *columns]]
    for method in METHODS:
        cells = [
            format_median(measured(results, SMALL, method, metric), digits)
            for metric, digits in columns.values()
        ]
        table.append([NAMES[method], *cells])
    return markdown(table)


def all_experiments(results):
    """All experiments. Those of the prompt's grid, and those beyond a grid, are known only when the
    results of the grids are there."""
    experiments = [Experiment(TEACHER, "teacher", 10)]
    for _, _, field, grid, best in grids(results):
        beyond = beyond_grid(grid, best, field) if best else None
        experiments += [*grid, beyond] if beyond else grid
    for student in STUDENTS:
        rates, temperatures, _ = temperature_grid_experiments(student, partial(grid_score, results))
        experiments += [*rates, *temperatures]
    for variants in GROUPS.values():
        for name, variant in variants.items():
            experiments += [Experiment(s, name, seed) for s in variant.students for seed in SEEDS]
    return [e for e in experiments if not control_instead(e, partial(grid_score, results))]


def total_cost(results):
    """Sentences with the hours of computation, and how many results are missing."""
    if not results:
        return NOT_RUN
    hours = 0.0
    for result in results.values():
        # An init is trained before its result is computed, which only measures.
        is_init = result["variant"] in VARIANTS and VARIANTS[result["variant"]].method == "init"
        measuring = result.get("seconds", 0) / 3600
        hours += measuring + result["hours"] if is_init else max(measuring, result["hours"])
    total = {experiment.name for experiment in all_experiments(results)}
    cost = f"{hours:.1f} core-hours, that is {hours / 2:.1f} hours\non two cores"
    return (
        f"{len(results)} of {len(total)} results are there. They took {cost}, "
        "without the grid's inits and SeqKD's responses."
    )


# ---- variants of PromptKD: Tables 3 and 5, Figure 4, controls ------------------------------------


def variant_row(results, label, variant, against="promptkd"):
    """A row of `variants_table`."""
    cells = [mean_cell(results, SMALL, variant, rouge_l(c)) for c in ("test", "average")]
    for column in ("test", "average"):
        if variant == against:
            cells.append(NOT_APPLICABLE)
        else:
            cells.append(difference_cell(results, SMALL, variant, against, rouge_l(column)))

    def rise(result):
        on_references = result["effect"][ON_REFERENCES]
        return on_references["loss p_P"] - on_references["loss p"]

    for metric, digits in ((effect(ON_STUDENT, "kl p_P p"), 3), (rise, 3), (teachers_rouge_l, 1)):
        has_prompt = VARIANTS[variant].method == "promptkd"
        cell = mean_cell(results, SMALL, variant, metric, digits) if has_prompt else NOT_APPLICABLE
        cells.append(cell)
    best_steps = measured(results, SMALL, variant, lambda result: result["best_step"])
    return [label, *cells, format_median(best_steps, 0)]


def variants_table(results, title, rows):
    """ROUGE-L of variants, their difference to PromptKD, and what the tuned prompt does.

    rows: {label: variant}.
    """
    head = [
        "test",
        "average",
        "minus PromptKD: test",
        "minus PromptKD: average",
        "KL(p_P ‖ p)",
        "rise of the teacher's loss",
        "prompted teacher's ROUGE-L",
        "best step",
    ]
    table = [[title, *head], *(variant_row(results, *row) for row in rows.items())]
    return markdown(table)


TABLE_3 = {"L_kd + λ L_reg (PromptKD)": "promptkd", "L_kd alone": "reg0"}
TABLE_5 = {
    "reverse, reverse (PromptKD)": "promptkd",
    "forward, reverse": "forward-reverse",
    "reverse, forward": "reverse-forward",
    "forward, forward": "forward-forward",
}
SHARP_LABEL = "GKD, teacher at temperature 0.5"
CONTROLS = {
    "PromptKD": "promptkd",
    "fixed prompt, tuned before": "fixed-tuned",
    "fixed prompt, tidy": "fixed-tidy",
    "fixed prompt, busy": "fixed-busy",
    "GKD": "gkd",
    "GKD, 3.2 times the steps": "gkd-equal-time",
    SHARP_LABEL: "gkd-sharp",
}
FIGURE_4 = {
    f"{init}, {length}": figure4_variant(init, length)
    for init in PROMPT_INITS
    for length in PROMPT_LENGTHS
}


def text_table(results):
    """Prompts from text minus the others of the same length, on average."""
    text, *others = PROMPT_INITS
    table = [["length", *(f"{text} minus {init}" for init in others)]]
    for length in PROMPT_LENGTHS:
        pairs = [[figure4_variant(init, length) for init in (text, other)] for other in others]
        cells = (difference_cell(results, SMALL, *pair, rouge_l("average")) for pair in pairs)
        table.append([str(length), *cells])
    return markdown(table)


def controls_table(results):
    """The variants of CONTROLS against GKD, with their cost."""
    table = [["", "minus GKD: test", "minus GKD: average", "minutes", "in units of GKD's"]]
    for label, variant in CONTROLS.items():
        cells = [
            NOT_APPLICABLE
            if variant == "gkd"
            else difference_cell(results, SMALL, variant, "gkd", rouge_l(column))
            for column in ("test", "average")
        ]
        table.append([label, *cells, *time_cells(results, variant)])
    return markdown(table)


def sharp_columns():
    """The head of the two tables below, and their columns: (student, metric, digits) of each.
    Losses are in nats per token."""
    columns = {
        "average": (rouge_l("average"), 1),
        "average, greedily": (rouge_l("average", "greedy"), 1),
        "loss on its own responses": (effect(ON_STUDENT, "loss q"), 2),
    }
    head = ["", *(f"{student}: {name}" for student in STUDENTS for name in columns)]
    return head, [(student, *column) for student in STUDENTS for column in columns.values()]


def sharp_table(results):
    """GKD from a teacher at temperature 0.5 beside PromptKD."""
    variants = {"GKD": "gkd", SHARP_LABEL: "gkd-sharp", "PromptKD": "promptkd"}
    pairs = {
        "temperature 0.5 minus GKD": ("gkd-sharp", "gkd"),
        "PromptKD minus temperature 0.5": ("promptkd", "gkd-sharp"),
    }
    head, columns = sharp_columns()
    rows = mean_rows(results, variants, columns) + difference_rows(results, pairs, columns)
    return markdown([head, *rows])


def temperature_table(results):
    """The grid of GKD's rates and of its teacher's temperature."""
    head = ["rates at temperature 0.5, and their scores", "temperatures at the best rate", "chosen"]
    table = [["student", *head, "GKD's best score"]]
    score = partial(grid_score, results)
    for student in STUDENTS:
        rates, temperatures, best = temperature_grid_experiments(student, score)
        cells = [", ".join(score_cell(results, e, "lr") for e in rates)]
        scores = [score_cell(results, e, "temperature") for e in temperatures]
        cells.append(", ".join(scores) or NOT_RUN)
        cells.append(f"{best.lr:g}, {best.temperature:g}" if best else NOT_RUN)
        _, of_gkd = grid_experiments(student, "gkd", score)
        cells.append(f"{score(of_gkd):.1f}" if of_gkd else NOT_RUN)
        table.append([student, *cells])
    return markdown(table)


def tuned_temperature_table(results):
    """GKD whose teacher's temperature is tuned, and PromptKD from that teacher."""
    gkd, promptkd = "GKD, temperature tuned", "PromptKD from that teacher"
    variants = {"GKD": "gkd", gkd: "gkd-tuned", "PromptKD": "promptkd", promptkd: "promptkd-tuned"}
    pairs = {
        "GKD, temperature tuned, minus GKD": ("gkd-tuned", "gkd"),
        "PromptKD minus GKD, temperature tuned": ("promptkd", "gkd-tuned"),
        "PromptKD from that teacher minus GKD from it": ("promptkd-tuned", "gkd-tuned"),
        "PromptKD from that teacher minus PromptKD": ("promptkd-tuned", "promptkd"),
    }
    head, columns = sharp_columns()
    results = results | runs_of_control(results)
    rows = mean_rows(results, variants, columns) + difference_rows(results, pairs, columns)
    return markdown([head, *rows])


def runs_of_control(results):
    """The results of GKD from the sharp teacher, under the names of those that they stand for."""
    found = {}
    for experiment in [Experiment(s, "gkd-tuned", seed) for s in STUDENTS for seed in SEEDS]:
        control = control_instead(experiment, partial(grid_score, results))
        if control and control.name in results:
            found[experiment.name] = results[control.name]
    return found


def time_cells(results, variant):
    """The median of a variant's minutes, and its ratio to that of GKD."""
    if VARIANTS[variant].patch or ("prompt_lr", 0.0) in VARIANTS[variant].changes:
        # A fixed prompt need not be tuned. The sharp teacher's times are from a busy machine.
        return [NOT_APPLICABLE, NOT_APPLICABLE]
    took, of_gkd = (measured(results, SMALL, name, minutes) for name in (variant, "gkd"))
    ratio = NOT_RUN
    if took and of_gkd:
        ratio = f"{statistics.median(took.values()) / statistics.median(of_gkd.values()):.1f}"
    return [format_median(took), ratio]


# ---- how the released code differs ---------------------------------------------------------------

RELEASED = {
    "prompt stepped at the last micro-batch only": ("stale-prompt", "promptkd"),
    "mean of micro-batches' means": ("micro-batch-means", "promptkd"),
    "dropout in the teacher's prompt pass": ("teacher-dropout", "promptkd"),
    "init of 10 epochs, chosen by ROUGE-L: PromptKD from it": ("promptkd-late-init", "promptkd"),
    "init of 10 epochs, chosen by ROUGE-L: GKD from it": ("gkd-late-init", "gkd"),
    "init of 10 epochs, chosen by ROUGE-L: the init itself": ("late-init", "init"),
}
LATE_INIT = {"init": "late-init", "GKD": "gkd-late-init", "PromptKD": "promptkd-late-init"}


def released_table(results):
    rows = difference_rows(results, RELEASED, scores_of_sets(SMALL))
    return markdown([["with it minus without it", *COLUMNS], *rows])


def late_init_table(results):
    """ROUGE-L of the late init, and of GKD and PromptKD from it."""
    columns = scores_of_sets(SMALL)
    pairs = {"PromptKD minus GKD": ("promptkd-late-init", "gkd-late-init")}
    rows = mean_rows(results, LATE_INIT, columns) + difference_rows(results, pairs, columns)
    return markdown([["ROUGE-L", *COLUMNS], *rows])


def released_measures_table(results):
    """What the two differences in measuring change, for the methods of Table 1."""
    l = common_step(r["exposure"] for r in table1_results(results, SMALL))
    head = [
        f"ExAccErr({l}), %",
        "first token left out",
        "ban minus no ban: test",
        "ban minus no ban: average",
    ]
    table = [["", *head]]
    for method in METHODS:
        cells = [
            mean_cell(results, SMALL, method, exposure_at(l)),
            mean_cell(results, SMALL, method, exposure_at(l, without_first=True)),
        ]
        for column in ("test", "average"):
            effects = measured(results, SMALL, method, ban_effect(column))
            cells.append(format_interval(effects))
        table.append([NAMES[method], *cells])
    return markdown(table)


def released_exposure_table(results):
    """ExAccErr with the three differences of the released script, for the methods of Table 1."""
    l = common_step(r["exposure"] for r in table1_results(results, SMALL))
    found = {name: r for name, r in results.items() if "exposure_released" in r}
    columns = {
        f"ExAccErr({l}), %": (results, exposure_at(l)),
        "mean over all requests": (found, released_exposure_at(l, "all requests")),
        "repeated 6-grams banned": (found, released_exposure_at(l, "ban")),
        "both, and the first token left out": (found, released_exposure_at(l, "all three")),
    }
    table = [["", *columns]]
    for method in METHODS:
        values = [measured(r, SMALL, method, metric) for r, metric in columns.values()]
        table.append([NAMES[method], *map(format_interval, values)])
    falls = []
    for r, metric in columns.values():
        size = exposure_size(metric)
        falls.append(difference_cell(r, SMALL, "gkd", "promptkd", size))
    table.append(["fall of the size from GKD to PromptKD", *falls])
    return markdown(table)


def ban_effect(column):
    """The function that takes a result to its ROUGE-L with the ban on repeated 6-grams, minus that
    without it at the same sampling seed."""

    def metric(result):
        unbanned = {name: scores[:1] for name, scores in result["rouge_l"]["sampled"].items()}
        both = result["rouge_l"] | {"first seed": unbanned}
        return rouge_l(column, "banned")(result) - rouge_l(column, "first seed")({"rouge_l": both})

    return metric


# ---- exposure bias, student-friendliness, lists --------------------------------------------------


def exposure_table(results):
    """ExAccErr with 95 % intervals over seeds, and the two errors that it compares, in nats per
    step. All at the last step that is reliable for all runs."""
    steps = [common_step(r["exposure"] for r in table1_results(results, s)) for s in STUDENTS]
    table = [[""]]
    for student, step in zip(STUDENTS, steps):
        l = step or NOT_RUN
        names = (f"ExAccErr({l}), %", f"R({l}) / {l}", f"ε({l})")
        table[0] += [f"{student}: {name}" for name in names]
    for method in METHODS:
        cells = []
        for student, l in zip(STUDENTS, steps):
            values = measured(results, student, method, exposure_at(l))
            cells.append(format_interval(values))
            for metric in (error_per_step(l), epsilon_at(l)):
                cells.append(mean_cell(results, student, method, metric, 2))
        table.append([NAMES[method], *cells])
    return markdown(table)


EFFECTS = KLS | REVERSE_KLS | LOSSES
# The two ways to say how close the teacher is to the student: the KL that the prompt is trained to
# lower, and the one that the student is. {direction: (with the prompt, without)}
CLOSER = {"KL(p ‖ q)": ("kl p_P q", "kl p q"), "KL(q ‖ p)": ("kl q p_P", "kl q p")}

# Columns of the friendliness tables: before and after PromptKD's training, as points along it
ENDS = {
    "before training (init, untuned prompt)": 0,
    "after training (final student, tuned prompt)": -1,
}


def effect_rows(results, student, columns, names):
    """Means over tokens, in nats, and what the prompt changes in the KLs to the student.

    columns: functions that take the name of a mean to a metric. names: {name: label}.
    """
    rows = []
    for name, label in names.items():
        cells = (mean_cell(results, student, "promptkd", column(name), 3) for column in columns)
        rows.append([label, *cells])
    for prompted, bare in CLOSER.values():
        cells = []
        for column in columns:
            pair = (measured(results, student, "promptkd", column(n)) for n in (prompted, bare))
            cells.append(format_interval(differences(*pair), 3))
        rows.append([f"{EFFECTS[prompted]} - {EFFECTS[bare]}", *cells])
    return rows


def friendliness_table(results, student):
    """What the prompt does to the teacher before and after PromptKD's training."""
    columns = {
        f"{label}, {when}": partial(effect_along, responses, i)
        for responses, label in RESPONSES.items()
        for when, i in ENDS.items()
    }
    return markdown([["", *columns], *effect_rows(results, student, columns.values(), EFFECTS)])


def others_table(results, student):
    """What the tuned prompt does for two students that were not trained with it."""
    columns = {
        f"{NAMES[other]}, {label}": partial(effect_on, other, responses)
        for other in ("init", "gkd")
        for responses, label in RESPONSES.items()
    }
    names = {name: EFFECTS[name] for pair in CLOSER.values() for name in reversed(pair)}
    return markdown([["", *columns], *effect_rows(results, student, columns.values(), names)])


def list_cells(counts):
    """The shares of orders among the right lists, and of the wrong lists among all, in %.

    counts: {seed: {"alphabet": ..., "text": ..., "other": ..., "wrong": ...}}.
    """
    if not counts:
        return [NOT_RUN] * 4
    right, wrong = {}, {}
    for seed, count in counts.items():
        n_right = sum(count.values()) - count["wrong"]
        for order in ("alphabet", "text", "other"):
            if n_right:
                right.setdefault(order, {})[seed] = 100 * count[order] / n_right
        wrong[seed] = 100 * count["wrong"] / max(1, n_right + count["wrong"])
    orders = [right.get(order, {}) for order in ("alphabet", "text", "other")]
    cells = [format_mean(values) if values else NOT_APPLICABLE for values in orders]
    return [*cells, format_mean(wrong)]


def lists_table(results, student):
    """How the teacher and the students order the lists that have several right orders."""

    def measure_of(name, role, along):
        def metric(result):
            found = result["effect"] if along is None else result["along"][along]["effect"]
            return found[name][role]

        return metric

    # {label: (variant, role, point along training, or None for the best checkpoint)}
    rows = {
        "bare teacher": ("gkd", "teacher", None),
        "teacher with the untuned prompt": ("promptkd", "teacher", 0),
        "teacher with the tuned prompt": ("promptkd", "teacher", None),
        **{f"{NAMES[m]}, the student": (m, "student", None) for m in METHODS},
        f"{SHARP_LABEL}, the student": ("gkd-sharp", "student", None),
    }
    orders = ["by the alphabet", "in the text's order", "in another", "wrong"]
    table = [["who writes", *orders, "ROUGE-L on validation rows"]]
    for label, (variant, *who) in rows.items():
        counts = measured(results, student, variant, measure_of("lists", *who))
        score = mean_cell(results, student, variant, measure_of("rouge_l", *who))
        table.append([label, *list_cells(counts), score])
    return markdown(table)


def kinds_table(results, student):
    """ROUGE-L on `test`, apart for each kind of row: what the rows leave open."""

    def score(kind):
        return lambda result: statistics.fmean(result["kinds"][kind]["scores"])

    teacher, table = teacher_result(results), [["ROUGE-L on test"]]
    for kind in KINDS:
        found = f" ({teacher['kinds'][kind]['rows']} rows)" if teacher else ""
        table[0].append(kind + found)
    cells = [f"{score(kind)(teacher):.1f}" if teacher else NOT_RUN for kind in KINDS]
    table.append(["teacher", *cells])
    columns = [(student, score(kind), 1) for kind in KINDS]
    table += mean_rows(results, BY_NAME | {SHARP_LABEL: "gkd-sharp"}, columns)
    pairs = {"PromptKD minus GKD": ("promptkd", "gkd")}
    return markdown(table + difference_rows(results, pairs, columns))


def certainty_table(results, student):
    """The loss of each method's student, at the best checkpoint."""
    head = ["nats per token", *(f"loss on the {label}" for label in RESPONSES.values())]
    columns = [(student, effect(responses, "loss q"), 2) for responses in RESPONSES]
    return markdown([head, *mean_rows(results, BY_NAME, columns)])


# ---- the paper's claims --------------------------------------------------------------------------


def verdict(intervals, n_expected):
    """Whether the means of a claim are above 0 for all students. intervals: (mean, half of the 95 %
    interval) per student, None for one without results."""
    found = [interval for interval in intervals if interval is not None and interval[1] is not None]
    if not found:
        return NOT_RUN
    if all(mean > half for mean, half in found):
        word = "holds"
    elif all(mean < -half for mean, half in found):
        word = "does not hold"
    else:
        word = "undecided"
    return word if len(found) == n_expected else f"{word} with {len(found)} of {n_expected}"


def paper_average(method):
    """The paper's average over its five sets, by size of the student."""
    sizes = ("base", "medium", "large")
    return [statistics.fmean(PAPER_SCORES[f"{method} {size}"]) for size in sizes]


def exposure_size(metric):
    """The function that takes a result to the absolute value of a metric."""
    return lambda result: abs(metric(result))


def early_exposure(results, student):
    """The size of GKD's ExAccErr minus that of PromptKD's, at the first checkpoint that was kept,
    {seed: points}."""
    curves = {
        method: measured(results, student, method, lambda r: r["along"][1]["exposure"])
        for method in ("gkd", "promptkd")
    }
    l = common_step(curve for by_seed in curves.values() for curve in by_seed.values())
    sizes = {
        method: {seed: abs(curve["ex_acc_err"][l - 1]) for seed, curve in by_seed.items()}
        for method, by_seed in curves.items()
    }
    return differences(sizes["gkd"], sizes["promptkd"])


def claims(results):
    """The claims, as (claim, what the paper reports, {student: {seed: value}}, digits of the cell).
    A claim is that its value is above 0."""
    average, rows = rouge_l("average"), []

    def minus(a, b, metric, students=STUDENTS):
        return {
            s: differences(measured(results, s, a, metric), measured(results, s, b, metric))
            for s in students
        }

    for rival in ("sft", "kd", "seqkd", "minillm", "gkd"):
        pairs = zip(paper_average("promptkd"), paper_average(rival))
        reported = ", ".join(f"{ours - theirs:+.1f}" for ours, theirs in pairs)
        claim = f"PromptKD is better than {NAMES[rival]}: average ROUGE-L"
        rows.append(
            (claim, f"{reported} (base, medium, large)", minus("promptkd", rival, average), 1)
        )
    if teacher := teacher_result(results):
        pairs = zip(paper_average("promptkd"), [statistics.fmean(PAPER_SCORES["teacher xl"])] * 3)
        reported = ", ".join(f"{ours - theirs:+.1f}" for ours, theirs in pairs)
        scores = {s: measured(results, s, "promptkd", average) for s in STUDENTS}
        values = {
            s: {seed: score - average(teacher) for seed, score in by_seed.items()}
            for s, by_seed in scores.items()
        }
        claim = "PromptKD's student is better than its teacher: average ROUGE-L"
        rows.append((claim, f"{reported} (base, medium, large)", values, 1))
    # The paper: ExAccErr should be near 0. It may be negative, so its size counts.
    steps = {s: common_step(r["exposure"] for r in table1_results(results, s)) for s in STUDENTS}
    for rival in ("sft", "kd", "seqkd", "minillm", "gkd"):
        sizes = {s: exposure_size(exposure_at(steps[s])) for s in STUDENTS}
        values = {s: minus(rival, "promptkd", sizes[s], [s])[s] for s in STUDENTS}
        claim = f"PromptKD has less exposure bias than {NAMES[rival]}: fall of the size of ExAccErr"
        rows.append((f"{claim}, points", "Figure 3a", values, 1))
    values = {s: early_exposure(results, s) for s in STUDENTS}
    claim = "and less than GKD after a fifth of the training"
    rows.append((claim, '"from the early stages", Figure 3b', values, 1))

    for direction, (prompted, bare) in CLOSER.items():

        def closer(result, prompted=prompted, bare=bare):
            kls = result["effect_on"]["gkd"][ON_STUDENT]
            return kls[bare] - kls[prompted]

        values = {s: measured(results, s, "promptkd", closer) for s in STUDENTS}
        claim = "the tuned prompt brings the teacher closer to GKD's student, which never saw it: "
        claim += f"fall of {direction}, nats per token of its responses"
        rows.append((claim, "claimed, not measured", values, 3))
    values = minus("promptkd", "reg0", average, [SMALL])
    rows.append(("L_reg helps: average ROUGE-L", "Table 3", values, 1))
    for label, variant in TABLE_5.items():
        if variant != "promptkd":
            values = minus("promptkd", variant, average, [SMALL])
            kd, reg = label.split(", ")
            claim = f"two reverse KLs are better than L_kd {kd}, L_reg {reg}: average ROUGE-L"
            rows.append((claim, "Table 5", values, 1))
    for init in ("padding", "random"):
        values = minus("promptkd", f"{init}-6", average, [SMALL])
        claim = f"a prompt of six vectors from text is better than from {init}: average ROUGE-L"
        rows.append((claim, "Figure 4", values, 1))
    return rows


def claims_table(results):
    table = [["claim", "the paper", *(f"student {student}" for student in STUDENTS), "here"]]
    for claim, reported, by_student, digits in claims(results):
        cells, intervals = [], []
        for student in STUDENTS:
            values = by_student.get(student)
            cells.append("–" if values is None else format_interval(values, digits))
            intervals.append(mean_interval(list(values.values())) if values else None)
        table.append([claim, reported, *cells, verdict(intervals, len(by_student))])
    return markdown(table)


# ---- blocks of the pages -------------------------------------------------------------------------


def make_blocks(results):
    """All blocks, {name: Markdown}."""
    blocks = {
        "demo-table": table_1(results, LARGE),
        "claims": claims_table(results),
        "models": models_table(results),
        "settings": settings_table(results),
        "grid": grid_table(results),
        "table2": table_2(results),
        "cost": total_cost(results),
        "table3": variants_table(results, "loss of the prompt", TABLE_3),
        "table5": variants_table(results, "direction of L_kd, L_reg", TABLE_5),
        "controls": variants_table(results, "", CONTROLS),
        "controls-gkd": controls_table(results),
        "sharp": sharp_table(results),
        "temperature-grid": temperature_table(results),
        "tuned-temperature": tuned_temperature_table(results),
        "figure4-table": variants_table(results, "initialisation, length", FIGURE_4),
        "figure4-text": text_table(results),
        "released": released_table(results),
        "late-init": late_init_table(results),
        "released-measures": released_measures_table(results),
        "released-exposure": released_exposure_table(results),
        "exposure": exposure_table(results),
    }
    for size, student in {"small": SMALL, "large": LARGE}.items():
        blocks |= {
            f"table1-{size}": table_1(results, student),
            f"differences-{size}": differences_table(results, student),
            f"greedy-{size}": table_1(results, student, "greedy"),
            f"greedy-differences-{size}": differences_table(results, student, "greedy"),
            f"friendliness-{size}": friendliness_table(results, student),
            f"friendliness-others-{size}": others_table(results, student),
            f"lists-{size}": lists_table(results, student),
            f"kinds-{size}": kinds_table(results, student),
            f"certainty-{size}": certainty_table(results, student),
        }
    for name, plot in plots.PLOTS.items():
        # The README is above docs/.
        path = f"docs/{plot.file}" if name == "picture" else plot.file
        blocks[name] = f"![{plot.alt}]({path})" if plot.has_data(results) else NOT_RUN
    return blocks


BLOCK = re.compile(r"(<!-- study: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_blocks(text, blocks):
    """The text of a page with its blocks replaced. Raises InputError for a block of another name,
    or without an end."""
    if text.count("<!-- study: ") != len(BLOCK.findall(text)):
        raise InputError("a block `<!-- study: NAME -->` has no `<!-- end -->`")

    def fill(match):
        start, name, end = match.groups()
        if name not in blocks:
            raise InputError(f"there is no block {name!r}; there are {', '.join(blocks)}")
        return f"{start}{blocks[name]}\n{end}"

    return BLOCK.sub(fill, text)


def main(argv=None):
    argparse.ArgumentParser(prog="python -m tests.study.report").parse_args(argv)
    results = load_results()
    for plot in plots.PLOTS.values():
        if plot.has_data(results):
            print(plot.draw(results, DOCS))
    blocks = make_blocks(results)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = fill_blocks(text, blocks)
        if filled != text:
            write_atomic(page, filled)
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    run_command_line(main)
