"""The plots of the miniature, drawn from its results."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from data.process.errors import InputError
from data.process.files import write_atomic
from data.runs.paper import DEMO_SETS
from data.runs.report import save_plot
from tests.study.miniature import GROUPS, PROMPT_INITS, PROMPT_LENGTHS, STUDENTS, figure4_variant
from tests.study.results import (
    KLS,
    LARGE,
    LOSSES,
    METHODS,
    NAMES,
    RESPONSES,
    SMALL,
    by_seed,
    common_step,
    mean_interval,
    measured,
    rouge_l,
    table1_results,
    teacher_result,
)

COLOURS = {"init": "0.55", "sft": "#56b4e9", "kd": "#e69f00", "seqkd": "#cc79a7"}
COLOURS |= {"minillm": "#009e73", "gkd": "#0072b2", "promptkd": "#d55e00"}
CURVES = ("sft", "kd", "gkd", "promptkd")  # of the README's plot
INIT_METHODS = ("minillm", "gkd", "promptkd")  # start from the init
BAND = "bands: 95 % intervals over seeds"


def plot_band(axes, x, curves, **style):
    """Plot the mean of curves, each a list of values over x, and its 95 % interval by Student's t
    as a band."""
    intervals = [mean_interval(values) for values in zip(*curves)]
    means = np.array([mean for mean, _ in intervals])
    [line] = axes.plot(x, means, linewidth=1.5, **style)
    if intervals and intervals[0][1] is not None:
        half = np.array([half for _, half in intervals])
        band = {"color": line.get_color(), "alpha": 0.15, "linewidth": 0}
        axes.fill_between(x, means - half, means + half, **band)


def style_of(method):
    return {"label": NAMES[method], "color": COLOURS[method]}


# ---- validation along training -------------------------------------------------------------------


def rows_before(results, student, seed, method):
    """The rows that a student had seen before the first step of a method: its init's. None if the
    init has no result."""
    if method not in INIT_METHODS:
        return 0
    init = by_seed(results, student, "init").get(seed)
    return init and init["steps"] * init["settings"]["global_batch_size"]


def plot_validation(axes, results, student):
    """ROUGE-L on dev over the rows seen in fine-tuning, those of the init included."""
    starts = measured(results, student, "promptkd", lambda r: r["validation"]["rouge_l"][0])
    for method in CURVES:
        curves = []
        for seed, result in by_seed(results, student, method).items():
            before = rows_before(results, student, seed, method)
            if before is None:
                continue
            validation, size = result["validation"], result["settings"]["global_batch_size"]
            steps, scores = validation["step"], validation["rouge_l"]
            if method == "gkd" and seed in starts:
                # Both methods start from the same init, which PromptKD has validated.
                steps, scores = [0, *steps], [starts[seed], *scores]
            x = [(before + step * size) / 1000 for step in steps]
            curves.append(scores)
        if curves:
            length = min(map(len, curves))
            curves = [scores[-length:] for scores in curves]
            plot_band(axes, x[-length:], curves, marker=".", **style_of(method))
    if teacher := teacher_result(results):
        score = max(teacher["validation"]["rouge_l"])
        axes.axhline(score, color="black", linestyle="--", linewidth=1, label="teacher")
    axes.set(xlabel="thousand rows seen in fine-tuning, the init's included")
    axes.set(ylabel="ROUGE-L on the validation rows", title=f"Validation, student {student}")
    axes.legend(fontsize=8)


# ---- exposure bias -------------------------------------------------------------------------------


def add_legend(axes, has_curves):
    if has_curves:
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")


def plot_exposure(axes, results, student, methods):
    """ExAccErr over generation steps, up to the last one that is reliable for all runs drawn."""
    found = {method: by_seed(results, student, method).values() for method in methods}
    l = common_step(r["exposure"] for of_method in found.values() for r in of_method)
    for method, of_method in found.items():
        if of_method:
            curves = [result["exposure"]["ex_acc_err"][:l] for result in of_method]
            plot_band(axes, range(1, l + 1), curves, **style_of(method))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="generation step l (tokens)", ylabel="ExAccErr(l) (%)")
    axes.set(title=f"Exposure bias, student {student}")
    add_legend(axes, l)


def plot_exposure_along(axes, results, student):
    """ExAccErr at one generation step along training, from the init on."""
    inits = measured(results, student, "init", lambda r: r["exposure"])
    found = {m: by_seed(results, student, m) for m in ("gkd", "promptkd")}
    points = {
        (method, seed): {0: inits.get(seed)}
        | {p["step"]: p["exposure"] for p in result["along"] if "exposure" in p}
        for method, of_method in found.items()
        for seed, result in of_method.items()
    }
    points = {key: {s: c for s, c in p.items() if c} for key, p in points.items()}
    l = common_step(curve for of_run in points.values() for curve in of_run.values())
    for method in found:
        runs = [of_run for (m, _), of_run in points.items() if m == method]
        if runs:
            # An init that has no result yet leaves out the first point.
            steps = sorted(set.intersection(*map(set, runs)))
            curves = [[of_run[step]["ex_acc_err"][l - 1] for step in steps] for of_run in runs]
            plot_band(axes, steps, curves, marker=".", **style_of(method))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="optimizer step", ylabel=f"ExAccErr({l}) (%)", title=f"student {student}")
    add_legend(axes, l)


# ---- what the prompt does ------------------------------------------------------------------------


def plot_along(axes, results, student, responses, names):
    """Means over tokens along PromptKD's training, {name: label}, and the same KL(p ‖ q) of GKD."""

    def draw(method, name, **style):
        found = list(by_seed(results, student, method).values())
        if found:
            steps = [point["step"] for point in found[0]["along"]]
            curves = [[p["effect"][responses][name] for p in r["along"]] for r in found]
            plot_band(axes, steps, curves, marker=".", **style)

    for name, label in names.items():
        draw("promptkd", name, label=label)
    if "kl p q" in names:
        draw("gkd", "kl p q", label="KL(p ‖ q) in GKD", color="0.55", linestyle="--")
    axes.set(xlabel="optimizer step", ylabel="nats per token")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.25 * (top - bottom))  # room for the legend
    axes.legend(fontsize=8, loc="upper left", ncols=2)


# ---- figures -------------------------------------------------------------------------------------


def draw_overview(figure, results):
    figure.set_size_inches(10, 3.8)
    left, right = figure.subplots(1, 2)
    plot_validation(left, results, LARGE)
    plot_exposure(right, results, LARGE, CURVES)
    figure.supxlabel(BAND, fontsize=8)


def draw_figure_1(figure, results):
    """The average over the five sets by student and method."""
    figure.set_size_inches(8, 4)
    axes, width, labelled = figure.subplots(), 0.8 / len(METHODS), set()
    for i, method in enumerate(METHODS):
        for k, student in enumerate(STUDENTS):
            scores = measured(results, student, method, rouge_l("average")).values()
            if scores:
                mean, half = mean_interval(list(scores))
                x = k + (i - (len(METHODS) - 1) / 2) * width
                error = {"yerr": half, "capsize": 3, "error_kw": {"linewidth": 1}}
                style = {"color": COLOURS[method]} if method in labelled else style_of(method)
                labelled.add(method)
                bar = axes.bar(x, mean, 0.9 * width, **error, **style)
                axes.bar_label(bar, fmt="%.1f", padding=2, fontsize=7)
    if teacher := teacher_result(results):
        score = rouge_l("average")(teacher)
        axes.axhline(score, color="black", linestyle="--", linewidth=1, label="teacher")
    axes.set_xticks(range(len(STUDENTS)), [f"student {student}" for student in STUDENTS])
    axes.set(ylabel="ROUGE-L", title="Average over " + ", ".join(DEMO_SETS))
    figure.legend(loc="outside right upper", fontsize=8)
    figure.supxlabel("error bars: 95 % intervals over seeds", fontsize=8)


def draw_figure_3a(figure, results):
    figure.set_size_inches(10, 4)
    for axes, student in zip(figure.subplots(1, 2, sharey=True), STUDENTS):
        plot_exposure(axes, results, student, METHODS)
    figure.supxlabel(BAND, fontsize=8)


def draw_figure_3b(figure, results):
    figure.set_size_inches(10, 3.8)
    for axes, student in zip(figure.subplots(1, 2, sharey=True), STUDENTS):
        plot_exposure_along(axes, results, student)
    figure.suptitle("Exposure bias along training")
    figure.supxlabel(BAND, fontsize=8)


def draw_figure_4(figure, results):
    """The average over the five sets by length and initialisation of the prompt."""
    figure.set_size_inches(6, 4)
    axes = figure.subplots()
    for i, init in enumerate(PROMPT_INITS):
        points = []
        for k, length in enumerate(PROMPT_LENGTHS):
            variant = figure4_variant(init, length)
            scores = measured(results, SMALL, variant, rouge_l("average"))
            if scores:
                points.append((k + 0.06 * (i - 1), *mean_interval(list(scores.values()))))
        if points:
            x, means, halves = zip(*points)
            halves = [half or 0 for half in halves]
            style = {"marker": "o", "capsize": 3, "linewidth": 1, "label": init}
            axes.errorbar(x, means, yerr=halves, **style)
    axes.set_xticks(range(len(PROMPT_LENGTHS)), PROMPT_LENGTHS)
    axes.set(xlabel="length of the prompt (vectors)", ylabel="ROUGE-L, average of five sets")
    axes.set(title=f"Prompt by length and initialisation, student {SMALL}")
    axes.legend(fontsize=8)
    figure.supxlabel("error bars: 95 % intervals over seeds", fontsize=8)


def draw_friendliness(figure, results, student):
    """KLs above, losses below."""
    figure.set_size_inches(9, 6.5)
    panels = figure.subplots(2, 2)
    for column, (responses, label) in zip(panels.T, RESPONSES.items()):
        plot_along(column[0], results, student, responses, KLS)
        plot_along(column[1], results, student, responses, LOSSES)
        for axes, what in zip(column, ("KLs", "losses")):
            axes.set_title(f"{what}, on the {label}", fontsize=10)
    figure.suptitle(f"Along PromptKD's training, student {student}", fontsize=11)
    figure.supxlabel(BAND, fontsize=8)


def has_any(student, *variants):
    return lambda results: any(by_seed(results, student, variant) for variant in variants)


@dataclass(frozen=True)
class Plot:
    """A plot: its file in docs/, its text for who can't see it, and how it is drawn."""

    file: str
    alt: str
    drawing: Callable  # (figure, results) -> nothing
    has_data: Callable  # results -> whether there is anything to draw

    def draw(self, results, directory):
        """Write the plot. Returns the path. Raises InputError if there is none: a page would link
        what is not there."""
        path = directory / self.file
        message = save_plot(path, partial(self.drawing, results=results))
        if message != str(path):
            raise InputError(f"{self.file}: {message}")
        # With a palette the file is a third as large.
        image, small = Image.open(path).convert("RGB"), io.BytesIO()
        image.quantize(256, Image.Quantize.MAXCOVERAGE).save(small, "png")
        write_atomic(path, small.getvalue())
        return path


BY_STUDENT = "for both students"
PLOTS = {
    "picture": Plot(
        "miniature.png",
        f"validation ROUGE-L along training, and exposure bias, of student {LARGE}",
        draw_overview,
        has_any(LARGE, *CURVES),
    ),
    "figure1": Plot(
        "miniature-figure1.png",
        "average ROUGE-L by student and method",
        draw_figure_1,
        lambda results: any(table1_results(results, student) for student in STUDENTS),
    ),
    "figure3a": Plot(
        "miniature-figure3a.png",
        f"exposure bias over generation steps, {BY_STUDENT}",
        draw_figure_3a,
        lambda results: any(table1_results(results, student) for student in STUDENTS),
    ),
    "figure3b": Plot(
        "miniature-figure3b.png",
        f"exposure bias along training, {BY_STUDENT}",
        draw_figure_3b,
        lambda results: any(has_any(s, "gkd", "promptkd")(results) for s in STUDENTS),
    ),
    "figure4": Plot(
        "miniature-figure4.png",
        "average ROUGE-L by length and initialisation of the prompt",
        draw_figure_4,
        has_any(SMALL, "promptkd", *GROUPS["figure4"]),
    ),
}
PLOTS |= {
    f"friendliness-plot-{size}": Plot(
        f"miniature-friendliness-{size}.png",
        f"KLs and losses of teacher, prompted teacher and student {student} along training",
        partial(draw_friendliness, student=student),
        has_any(student, "promptkd"),
    )
    for size, student in {"small": SMALL, "large": LARGE}.items()
}
