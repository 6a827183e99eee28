"""Tables and plots of the miniature, from its results.

    python -m tests.study.report

Reads docs/results, trains nothing, and writes the plots in docs/ and the blocks of README.md and
docs/miniature.md: what stands between a line `<!-- study: NAME -->` and a line `<!-- end -->`. The
text outside of the blocks stays as it is. What has no result yet reads "not run".
"""

import argparse
import re

from data.cli import InputError, write_atomic
from data.report import format_table
from tests.study import plots
from tests.study.miniature import (
    GRID,
    GRID_SEED,
    GROUPS,
    PROMPT_GRID,
    ROOT,
    SEEDS,
    STUDENTS,
    TEACHER,
    VARIANTS,
    Piece,
)
from tests.study.results import (
    COLUMNS,
    METHODS,
    NAMES,
    NOT_APPLICABLE,
    NOT_RUN,
    ON_REFERENCES,
    ON_STUDENT,
    by_seed,
    common_step,
    differences,
    effect,
    exposure_at,
    format_interval,
    format_mean,
    format_median,
    load_results,
    measured,
    minutes,
    rouge_l,
    table1_results,
    teacher_result,
)

DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", DOCS / "miniature.md")
# What is beyond Table 1 is on the small student, the README's table on the large one.
SMALL, LARGE = STUDENTS
RIVALS = [method for method in METHODS if method != "promptkd"]


def markdown(table):
    return format_table(table, markdown=True)


def n_seeds(variant):
    return len(VARIANTS[variant].seeds)


def mean_cell(results, student, variant, measure, digits=1):
    values = measured(results, student, variant, measure)
    return format_mean(values, n_seeds(variant), digits)


def difference_cell(results, student, a, b, measure, digits=1):
    """The cell of a measure of variant a minus that of variant b, paired over the seeds."""
    pairs = (measured(results, student, variant, measure) for variant in (a, b))
    expected = min(n_seeds(a), n_seeds(b))
    return format_interval(differences(*pairs), expected, digits)


# ---- models, learning rates, Table 1 -------------------------------------------------------------


def teacher_cell(results, column, way="sampled"):
    result = teacher_result(results)
    return NOT_RUN if result is None else f"{rouge_l(column, way)(result):.1f}"


def models_table(results):
    """The models' sizes, and the teacher's loss on dev without and with the untuned prompt."""
    table = [["model", "parameters", "loss on dev", "with the untuned prompt"]]
    teacher = teacher_result(results)
    prompted = by_seed(results, SMALL, "promptkd")
    losses = [NOT_RUN, NOT_RUN]
    if prompted:
        # The teacher and the untuned prompt are the same for all seeds.
        validation = next(iter(prompted.values()))["validation"]
        losses = [f"{validation[name][0]:.4f}" for name in ("bare_loss", "prompted_loss")]
    table.append(["teacher", f"{teacher['parameters']:,}" if teacher else NOT_RUN, *losses])
    for student in STUDENTS:
        found = next(iter(table1_results(results, student)), None)
        parameters = f"{found['parameters']:,}" if found else NOT_RUN
        table.append([f"student {student}", parameters, NOT_APPLICABLE, NOT_APPLICABLE])
    return markdown(table)


def grid_rows(student, method):
    """The grid of a method, {learning rate: piece}. PromptKD's has the prompt's middle rate."""
    rate = PROMPT_GRID[1] if method == "promptkd" else None
    return {lr: Piece(student, method, GRID_SEED, lr, rate) for lr in GRID[method]}


def grid_cells(results, pieces):
    """The cells of a grid and its best rate, None if a piece is missing. pieces: {rate: piece}."""
    found = {rate: results.get(piece.name) for rate, piece in pieces.items()}
    scores = {rate: r and max(r["validation"]["rouge_l"]) for rate, r in found.items()}
    cells = [f"{rate:g}: {NOT_RUN if s is None else f'{s:.1f}'}" for rate, s in scores.items()]
    if None in scores.values():
        return [*cells, NOT_RUN], None
    best = max(scores, key=scores.get)
    at_edge = best in (min(scores), max(scores))
    return [*cells, f"{best:g}, at the edge" if at_edge else f"{best:g}"], best


def grid_table(results):
    table = [["student", "rate of", "lowest", "middle", "highest", "chosen"]]
    for student in STUDENTS:
        for method in GRID:
            pieces = grid_rows(student, method)
            cells, best = grid_cells(results, pieces)
            table.append([student, NAMES[method], *cells])
        # The last method is PromptKD: the prompt's rate is chosen at the student's best.
        if best is None:
            cells = [*(f"{rate:g}: {NOT_RUN}" for rate in PROMPT_GRID), NOT_RUN]
        else:
            rates = {r: Piece(student, "promptkd", GRID_SEED, best, r) for r in PROMPT_GRID}
            cells, _ = grid_cells(results, rates)
        table.append([student, "the prompt", *cells])
    return markdown(table)


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
        start = "the init" if method in plots.FROM_INIT else "pre-trained weights"
        rates = []
        for result in found:
            values = result["settings"] if result else {}
            prompt_lr = values.get("prompt_lr")
            rate = f"{values['lr']:g}" if result else NOT_RUN
            rates.append(f"{rate}, the prompt's {prompt_lr:g}" if prompt_lr else rate)
        table.append([NAMES[method], start, *cells, *rates])
    return markdown(table)


def table_1(results, student, way="sampled"):
    table = [["ROUGE-L", *COLUMNS]]
    table.append(["teacher", *(teacher_cell(results, column, way) for column in COLUMNS)])
    for method in METHODS:
        cells = (mean_cell(results, student, method, rouge_l(c, way)) for c in COLUMNS)
        table.append([NAMES[method], *cells])
    return markdown(table)


def differences_table(results, student, way="sampled"):
    """PromptKD minus each other method."""
    table = [["PromptKD minus", *COLUMNS]]
    for rival in RIVALS:
        pair = student, "promptkd", rival
        cells = (difference_cell(results, *pair, rouge_l(c, way)) for c in COLUMNS)
        table.append([NAMES[rival], *cells])
    return markdown(table)


def demo_table(results):
    """Table 1 of the demo's student in short, for the README."""
    table = [["ROUGE-L", "test", "average of the five sets", "minutes of training"]]
    teacher = teacher_result(results)
    scores = [teacher_cell(results, column) for column in ("test", "average")]
    table.append(["teacher", *scores, f"{minutes(teacher):.1f}" if teacher else NOT_RUN])
    for method in METHODS:
        scores = [mean_cell(results, LARGE, method, rouge_l(c)) for c in ("test", "average")]
        took = format_median(measured(results, LARGE, method, minutes), len(SEEDS))
        table.append([NAMES[method], *scores, took])
    return markdown(table)


# ---- cost ----------------------------------------------------------------------------------------


def table_2(results):
    columns = {"s per step": ("seconds_per_step", 2), "minutes": ("hours", 1)}
    columns["resident, GB"] = ("memory_resident_gb", 2)
    table = [["cost", *(f"{student}: {name}" for student in STUDENTS for name in columns)]]
    for method in METHODS:
        cells = []
        for student in STUDENTS:
            for field, digits in columns.values():
                scale = 60 if field == "hours" else 1
                found = by_seed(results, student, method)
                values = {seed: scale * result[field] for seed, result in found.items()}
                cells.append(format_median(values, n_seeds(method), digits))
        table.append([NAMES[method], *cells])
    return markdown(table)


def all_pieces():
    """The pieces whose names are known before any is run: all but those of the prompt's grid at
    two more rates."""
    pieces = [Piece(TEACHER, "teacher", 10)]
    pieces += [p for s in STUDENTS for m in GRID for p in grid_rows(s, m).values()]
    for variants in GROUPS.values():
        for name, variant in variants.items():
            pieces += [Piece(s, name, seed) for s in variant.students for seed in variant.seeds]
    return pieces


def total_cost(results):
    """A sentence with the hours of computation, and how many results are missing."""
    if not results:
        return NOT_RUN
    hours = 0.0
    for result in results.values():
        # An init was trained before its piece was computed: a piece of its own only measures.
        is_init = result["variant"] in VARIANTS and VARIANTS[result["variant"]].method == "init"
        measuring = result.get("seconds", 0) / 3600
        hours += measuring + result["hours"] if is_init else max(measuring, result["hours"])
    total = len(all_pieces()) + (len(PROMPT_GRID) - 1) * len(STUDENTS)
    return (
        f"{len(results)} of {total} results are there. They took {hours:.1f} hours of one core, "
        f"{hours / 2:.1f} hours with two at a time."
    )


# ---- variants of PromptKD: Tables 3 and 5, Figure 4, causes --------------------------------------


def variant_row(results, label, variant, against="promptkd"):
    """A row of `variants_table`."""
    cells = [mean_cell(results, SMALL, variant, rouge_l(c)) for c in ("test", "average")]
    for column in ("test", "average"):
        if variant == against:
            cells.append(NOT_APPLICABLE)
        else:
            cells.append(difference_cell(results, SMALL, variant, against, rouge_l(column)))

    def harm(result):
        on_references = result["effect"][ON_REFERENCES]
        return on_references["loss p_P"] - on_references["loss p"]

    for measure in (effect(ON_STUDENT, "kl p_P p"), harm):
        has_prompt = VARIANTS[variant].method == "promptkd"
        cell = mean_cell(results, SMALL, variant, measure, 3) if has_prompt else NOT_APPLICABLE
        cells.append(cell)
    return [label, *cells]


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
        "harm",
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
CAUSES = {
    "PromptKD": "promptkd",
    "fixed prompt, tidy": "fixed-tidy",
    "fixed prompt, busy": "fixed-busy",
    "GKD": "gkd",
    "GKD, more steps": "gkd-equal-time",
}


def figure_4_rows():
    """The rows of Figure 4's numbers, {label: variant}."""
    text = {length: f"text-{length}" for length in (2, 12)} | {6: "promptkd"}
    rows = {f"text, {length}": text[length] for length in sorted(text)}
    others = [name for name in GROUPS["figure4"] if name not in text.values()]
    return rows | {name.replace("-", ", "): name for name in others}


def causes_table(results):
    """The variants of CAUSES against GKD, with their cost."""
    table = [["", "minus GKD: test", "minus GKD: average", "minutes"]]
    for label, variant in CAUSES.items():
        cells = [
            NOT_APPLICABLE
            if variant == "gkd"
            else difference_cell(results, SMALL, variant, "gkd", rouge_l(column))
            for column in ("test", "average")
        ]
        took = format_median(measured(results, SMALL, variant, minutes), n_seeds(variant))
        table.append([label, *cells, took])
    return markdown(table)


# ---- how the released code differs ---------------------------------------------------------------

RELEASED = {
    "prompt stepped at the last micro-batch only": ("stale-prompt", "promptkd"),
    "mean of micro-batches' means": ("micro-batch-means", "promptkd"),
    "dropout in the teacher's prompt pass": ("teacher-dropout", "promptkd"),
    "an init chosen late: PromptKD from it": ("promptkd-late-init", "promptkd"),
    "an init chosen late: the init itself": ("late-init", "init"),
}


def released_table(results):
    table = [["with it minus without it", *COLUMNS]]
    for label, pair in RELEASED.items():
        cells = (difference_cell(results, SMALL, *pair, rouge_l(column)) for column in COLUMNS)
        table.append([label, *cells])
    return markdown(table)


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
            cells.append(format_interval(effects, n_seeds(method)))
        table.append([NAMES[method], *cells])
    return markdown(table)


def ban_effect(column):
    """The function that takes a result to its ROUGE-L with the ban on repeated 6-grams, minus that
    without it at the same sampling seed."""

    def measure(result):
        unbanned = {name: scores[:1] for name, scores in result["rouge_l"]["sampled"].items()}
        both = result["rouge_l"] | {"first seed": unbanned}
        return rouge_l(column, "banned")(result) - rouge_l(column, "first seed")({"rouge_l": both})

    return measure


# ---- exposure bias, student-friendliness, lists --------------------------------------------------


def exposure_table(results):
    """ExAccErr at the last step that is reliable for all runs, with 95 % intervals over seeds."""
    steps = [common_step(r["exposure"] for r in table1_results(results, s)) for s in STUDENTS]
    heads = [f"{student}, l = {l or NOT_RUN}" for student, l in zip(STUDENTS, steps)]
    table = [["ExAccErr(l), %", *heads]]
    for method in METHODS:
        cells = []
        for student, l in zip(STUDENTS, steps):
            values = measured(results, student, method, exposure_at(l))
            cells.append(format_interval(values, n_seeds(method)))
        table.append([NAMES[method], *cells])
    return markdown(table)


FRIENDLINESS = {
    "KL(p ‖ q)": "kl p q",
    "KL(p_P ‖ q)": "kl p_P q",
    "KL(p_P ‖ p)": "kl p_P p",
    "loss of p": "loss p",
    "loss of p_P": "loss p_P",
    "loss of q": "loss q",
}


def friendliness_table(results, student):
    """What the prompt does to the teacher before and after PromptKD's training, in nats."""
    table = [["", *(f"{on}, {when}" for on in (ON_REFERENCES, ON_STUDENT) for when in plots.ENDS)]]
    for label, name in FRIENDLINESS.items():
        measures = [plots.along(on, name, i) for on in (ON_REFERENCES, ON_STUDENT) for i in (0, -1)]
        table.append([label, *(mean_cell(results, student, "promptkd", m, 3) for m in measures)])

    def closer(on, i):
        """How much closer to the student the prompt makes the teacher."""
        bare, prompted = (plots.along(on, name, i) for name in ("kl p q", "kl p_P q"))
        return lambda result: prompted(result) - bare(result)

    cells = []
    for on in (ON_REFERENCES, ON_STUDENT):
        for i in (0, -1):
            values = measured(results, student, "promptkd", closer(on, i))
            cells.append(format_interval(values, n_seeds("promptkd"), 3))
    table.append(["KL(p_P ‖ q) - KL(p ‖ q)", *cells])
    return markdown(table)


def list_cells(counts, expected):
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
    cells = [format_mean(values, expected) if values else NOT_APPLICABLE for values in orders]
    return [*cells, format_mean(wrong, expected)]


def lists_table(results, student):
    """How the teacher and the students order the lists that have several right orders."""

    def lists(role, along=None):
        def measure(result):
            found = result["effect"] if along is None else result["along"][along]["effect"]
            return found["lists"][role]

        return measure

    rows = {
        "bare teacher": ("gkd", lists("teacher")),
        "teacher with the untuned prompt": ("promptkd", lists("teacher", along=0)),
        "teacher with the tuned prompt": ("promptkd", lists("teacher")),
        **{f"{NAMES[m]}, the student": (m, lists("student")) for m in METHODS},
    }
    table = [["who writes", "by the alphabet", "in the text's order", "in another", "wrong"]]
    for label, (variant, measure) in rows.items():
        counts = measured(results, student, variant, measure)
        table.append([label, *list_cells(counts, n_seeds(variant))])
    return markdown(table)


# ---- blocks of the pages -------------------------------------------------------------------------


def make_blocks(results):
    """All blocks, {name: Markdown}."""
    blocks = {
        "demo-table": demo_table(results),
        "models": models_table(results),
        "settings": settings_table(results),
        "grid": grid_table(results),
        "table2": table_2(results),
        "cost": total_cost(results),
        "table3": variants_table(results, "loss of the prompt", TABLE_3),
        "table5": variants_table(results, "direction of L_kd, L_reg", TABLE_5),
        "causes": variants_table(results, "", CAUSES),
        "causes-gkd": causes_table(results),
        "figure4-table": variants_table(results, "initialisation, length", figure_4_rows()),
        "released": released_table(results),
        "released-measures": released_measures_table(results),
        "exposure": exposure_table(results),
    }
    for size, student in {"small": SMALL, "large": LARGE}.items():
        blocks |= {
            f"table1-{size}": table_1(results, student),
            f"differences-{size}": differences_table(results, student),
            f"greedy-{size}": table_1(results, student, "greedy"),
            f"greedy-differences-{size}": differences_table(results, student, "greedy"),
            f"friendliness-{size}": friendliness_table(results, student),
            f"lists-{size}": lists_table(results, student),
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

    def replace(match):
        start, name, end = match.groups()
        if name not in blocks:
            raise InputError(f"there is no block {name!r}; there are {', '.join(blocks)}")
        return f"{start}{blocks[name]}\n{end}"

    return BLOCK.sub(replace, text)


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
    main()
