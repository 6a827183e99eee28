"""Tables and plots."""

import csv
import io
import json
import math
import statistics
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np

from data.cli import write_atomic


def plot_curves(directory):
    """curves.png: losses, and validation ROUGE-L, over steps. Says where it lies, or why there is none."""
    plot = pyplot()
    if plot is None:
        return "no picture without matplotlib"
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    figure, (left, right) = plot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    series = {
        "loss": "loss",
        "prompt_kd": "prompt: L_kd",
        "prompt_reg": "prompt: L_reg",
        "val_loss": "validation loss",
    }
    for name, label in series.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            left.plot(
                *zip(*points), label=label, linewidth=1, marker="o" if name == "val_loss" else None
            )
    left.set(xlabel="optimizer step", ylabel="nats a token", title=directory.name)
    left.legend()
    points = [(line["step"], line["val_rouge_l"]) for line in lines if "val_rouge_l" in line]
    if points:
        right.plot(*zip(*points), marker="o")
    right.set(
        xlabel="optimizer step",
        ylabel="ROUGE-L",
        title="validation" if points else "no validation by ROUGE-L in this stage",
    )
    figure.savefig(directory / "curves.png", dpi=120)
    plot.close(figure)
    return str(directory / "curves.png")


def std(scores):
    """The standard deviation of the sample; of a single score None."""
    return statistics.stdev(scores) if len(scores) > 1 else None


def format_score(scores):
    """Mean and, for several seeds, spread."""
    return f"{statistics.fmean(scores):.1f}" + (f" ± {std(scores):.1f}" if len(scores) > 1 else "")


def differs_from_paper(scores, figure):
    """Whether a figure of the paper's lies outside our spread around our mean."""
    return len(scores) > 1 and abs(statistics.fmean(scores) - figure) > std(scores)


def table(scores, figures=None, best=None):
    """Cells of a table with a row for each model and a column for each of its scores.

    scores: {label: {column: [a score a seed]}}. figures: the paper's, {label: {column: figure}}. best: {column: labels to be marked}.
    """
    figures, best = figures or {}, best or {}
    lines = [["ROUGE-L"], *([label] for label in scores)]
    for name in next(iter(scores.values())):
        numbers, marks = [name], [""]
        for label, by_column in scores.items():
            figure = figures.get(label, {}).get(name)
            numbers.append(format_score(by_column[name]))
            marks.append("" if name not in best else " *" if label in best[name] else "  ")
            if figure is not None:
                marks[-1] += (
                    f" ({figure:.1f}{' ≠' if differs_from_paper(by_column[name], figure) else ''})"
                )
        width = max(map(len, marks))
        for line, number, mark in zip(lines, numbers, marks):
            line.append(number + mark.ljust(width))
    return lines


def format_table(lines, markdown=False):
    """Lines of cells, the first with the columns' names, as aligned text or as a table in Markdown."""
    if markdown:
        rule = [":--", *["--:"] * (len(lines[0]) - 1)]
        return "\n".join(
            "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |"
            for line in [lines[0], rule, *lines[1:]]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(width) for c, width in zip(line[1:], widths[1:]))]
        ).rstrip()
        for line in lines
    )


def legend(scores, figures, best):
    """What the marks in a table mean, a line each, as far as there are any."""
    lines = (
        [
            "*: the best of its size in the column, or not worse by more than the spread of the difference, √(s₁² + s₂²)"
        ]
        if best
        else []
    )
    if any(figures.values()):
        far = any(
            differs_from_paper(scores[label][name], figure)
            for label, by_column in figures.items()
            for name, figure in by_column.items()
        )
        lines.append(
            "in brackets: the paper's figure"
            + ("; ≠: ours differs from it by more than our spread" if far else "")
        )
    return lines


def write_table(out, stem, title, cells, notes, content):
    """Print a table, and write it as Markdown and JSON."""
    print(format_table(cells), *notes, sep="\n")
    write_atomic(
        out / f"{stem}.md",
        "\n\n".join([f"### {title}", format_table(cells, markdown=True), *notes]) + "\n",
    )
    write_atomic(out / f"{stem}.json", json.dumps(content, indent=1) + "\n")
    print(f"also in {out / stem}.md and .json")


def plot_bars(path, bars, lines, title, xlabel):
    """Grouped bars. bars: {(group, series): scores}, as high as their mean, with the spread as error bar. lines: {label: height}.

    Returns the path, or why there is no picture.
    """
    plot = pyplot()
    if plot is None or not bars:
        return "no picture without " + ("matplotlib" if bars else "a student")
    groups, several = (list(dict.fromkeys(key[i] for key in bars)) for i in (0, 1))
    there = {group: [series for series in several if (group, series) in bars] for group in groups}
    width = 0.8 / max(map(len, there.values()))
    n_columns = 4 if max(map(len, several)) < 20 else 2  # of the legend
    height = 4 + 0.25 * math.ceil((len(several) + len(lines)) / n_columns)
    figure, axes = plot.subplots(
        figsize=(min(14, 5 + 0.5 * len(bars)), height), layout="constrained"
    )
    for color, series in enumerate(several):
        mine = [group for group in groups if series in there[group]]
        x = [
            groups.index(group) + (there[group].index(series) - (len(there[group]) - 1) / 2) * width
            for group in mine
        ]
        heights, errors = (
            [f(bars[group, series]) or 0 for group in mine] for f in (statistics.fmean, std)
        )
        drawn = axes.bar(
            x,
            heights,
            0.9 * width,
            yerr=errors if any(errors) else None,
            capsize=3,
            label=series,
            color=f"C{color % 10}",
        )
        axes.bar_label(
            drawn,
            fmt="%.1f",
            padding=2,
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    for label, height in lines.items():
        axes.axhline(height, linestyle="--", linewidth=1, color="black", label=label)
    axes.set_xticks(range(len(groups)), groups)
    axes.set(title=textwrap.fill(title, 72), xlabel=xlabel, ylabel="ROUGE-L")
    axes.margins(y=0.1)
    figure.legend(loc="outside lower center", ncols=n_columns)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plot.close(figure)
    return str(path)


def figure_1(path, averages, models, title):
    """A bar for each student, beside those of its size, and the teachers as dashed lines. averages: {label: [a score a seed]}."""
    sizes = {
        label: f"{m.size / 1e6:,.0f} M" if m.size >= 1e7 else f"{m.size / 1e3:,.0f} thousand"
        for label, m in models.items()
    }
    known = Counter((sizes[label], model.kind) for label, model in models.items())
    bars, lines = {}, {}
    for label, model in models.items():
        if model.kind == "teacher":
            lines[f"teacher, {sizes[label]}"] = statistics.fmean(averages[label])
        elif model.kind != "pretrain":
            alone = model.kind and known[sizes[label], model.kind] == 1
            bars[sizes[label], model.kind if alone else label] = averages[label]
    return plot_bars(path, bars, lines, title, "parameters of the student")


MIN_ALIVE = 0.1  # share of the responses alive below which Figure 3a is dotted, and which Figure 3b keeps to


def last_reliable_step(columns):
    """The last l of a curve at which enough responses of each kind are alive."""
    alive = np.minimum(columns["alive_student"], columns["alive_teacher"])
    return int((alive >= MIN_ALIVE * alive[0]).sum())  # they only ever become fewer


def write_figure(stem, first, series, settings, draw):
    """Write a figure as `stem`.csv, .json and, with matplotlib, .png. Returns a line that says where they lie.

    series: {label: columns of equal length by name}; first: what the labels are called in the CSV.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([first, *next(iter(series.values()))])
    for label, columns in series.items():
        lines.writerows([label, *values] for values in zip(*columns.values()))
    write_atomic(f"{stem}.csv", text.getvalue())
    write_atomic(f"{stem}.json", json.dumps({"settings": settings, f"{first}s": series}) + "\n")
    if pyplot() is None:
        return f"also in {stem}.csv and .json; no picture without matplotlib"
    what = f"{Path(settings['data']).name}: {settings['requests']} requests × {settings['samples']} samples; bands: 95 %, bootstrap over requests"
    figure = draw(pyplot(), series, what)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    pyplot().close(figure)
    write_atomic(f"{stem}.png", picture.getvalue())
    return f"also in {stem}.csv, .json and .png"


def plot_band(axes, x, columns, color):
    """The band of ExAccErr, and the line at zero."""
    axes.fill_between(x, columns["low"], columns["high"], color=color, alpha=0.15, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.8)


def plot_steps(pyplot, series, what):
    """Figure 3a: ExAccErr over generation steps, and below it the responses alive."""
    figure, (top, bottom) = pyplot.subplots(
        2, 1, sharex=True, height_ratios=(3, 1), figsize=(7, 6), layout="constrained"
    )
    for label, columns in series.items():
        l, error, n = columns["l"], columns["ex_acc_err"], last_reliable_step(columns)
        [line] = top.plot(l[:n], error[:n], label=label)
        top.plot(l[n - 1 :], error[n - 1 :], color=line.get_color(), linestyle=":")
        plot_band(top, l, columns, line.get_color())
        bottom.plot(l, columns["alive_student"], color=line.get_color())
    longest = max(series.values(), key=lambda columns: len(columns["l"]))
    bottom.plot(
        longest["l"], longest["alive_teacher"], color="black", linestyle="--", label="teacher's"
    )
    top.set(ylabel="ExAccErr (%)", title=f"Exposure bias over generation steps\n{what}")
    bottom.set(
        xlabel=f"generation step l (tokens); dotted: fewer than {100 * MIN_ALIVE:.0f} % alive",
        ylabel="responses alive",
        ylim=(0, None),
    )
    for axes in (top, bottom):
        axes.legend()
    return figure


def plot_training(pyplot, series, what):
    """Figure 3b: ExAccErr along training."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for label, columns in series.items():
        [line] = axes.plot(columns["percent"], columns["ex_acc_err"], label=label, marker="o")
        plot_band(axes, columns["percent"], columns, line.get_color())
    l = next(iter(series.values()))["l"][0]  # the same everywhere
    axes.set(
        xlabel="optimizer step (% of the best checkpoint's)",
        ylabel=f"ExAccErr at l = {l} (%)",
        title=f"Exposure bias along training\n{what}",
    )
    axes.legend()
    return figure


def pyplot():
    """matplotlib.pyplot, drawing without a screen; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
