"""Tables and plots: text, Markdown, JSON and PNG."""

import io
import json
import os
import statistics
import textwrap
import warnings
from contextlib import contextmanager

import numpy as np

from data.process.files import write_atomic
from data.runs.names import printable, unique_labels
from data.sets.rows import read_jsonl

# Lowest share of responses alive at which a generation step is reliable (Figures 3a and 3b)
MIN_ALIVE = 0.1


# ---- tables ----------------------------------------------------------------------------------
def std(scores):
    """The sample standard deviation; None for a single score."""
    return statistics.stdev(scores) if len(scores) > 1 else None


def format_score(scores):
    """The mean and, for several seeds, the standard deviation."""
    mean = f"{statistics.fmean(scores):.1f}"
    return f"{mean} ± {std(scores):.1f}" if len(scores) > 1 else mean


def score_table(scores, reported=None):
    """Rows of cells, a row per model and a column per data set. scores: {label: {column: [score per
    seed]}}. reported: the paper's, to add in brackets, {label: {column: score}}."""
    table = [["ROUGE-L", *next(iter(scores.values()))]]
    for label, by_column in scores.items():
        cells = {column: format_score(ours) for column, ours in by_column.items()}
        for column, score in (reported or {}).get(label, {}).items():
            cells[column] += f" ({score:.1f})"
        table.append([label, *cells.values()])
    return table


def format_table(table, markdown=False):
    """Rows of cells, the header first, as aligned text or as a Markdown table."""
    if markdown:
        escaped = [[cell.strip().replace("|", "\\|") for cell in row] for row in table]
        rule = [":--", *["--:"] * (len(table[0]) - 1)]
        rows = [escaped[0], rule, *escaped[1:]]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = []
    for label, *cells in table:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([label.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def write_table(out, stem, title, table, notes, content):
    """Print a table with its notes. Write it as Markdown, and `content` as JSON."""
    print(format_table(table), *notes, sep="\n")
    page = [f"### {title}", format_table(table, markdown=True), *notes]
    write_atomic(out / f"{stem}.md", "\n\n".join(page) + "\n")
    write_atomic(out / f"{stem}.json", json.dumps(content, indent=1, default=str) + "\n")
    print(f"also in {out / stem}.md and .json")


def write_group_table(out, fields, groups, scores, title):
    """Print, write and plot the scores of groups of runs, pooled within each group.

    groups: {values of the fields: labels}. scores: {label: [score per seed]}.
    """
    table, content, bars = [[*fields, "runs", "ROUGE-L"]], [], {}
    for values, labels in groups.items():
        cells = ["-" if value is None else printable(str(value)) for value in values]
        pooled = [score for label in labels for score in scores[label]]
        table.append([*cells, str(len(labels)), format_score(pooled)])
        content.append({"values": cells, "runs": labels, "scores": pooled})
        bars[", ".join(map(" ".join, zip(fields, cells)))] = pooled
    stem = f"by-{'-'.join(fields)}"
    note = "scores of a group's runs are pooled: mean ± standard deviation over runs and seeds"
    content = {"fields": fields, "groups": content}
    write_table(out, f"table-{stem}", title, table, [note], content)
    print(plot_bars(out / f"figure-{stem}.png", bars, {}, title))


def write_samples(out, n, set_name, rows, paths):
    """Print and write Table 6: n of a set's rows, with each model's response to them. paths: the
    files of the responses, {label: path}."""
    n = min(n, len(rows))
    results = {label: [result for _, result in read_jsonl(path)] for label, path in paths.items()}
    page = [f"### Table 6: requests of {set_name} and the responses to them"]
    for row in (rows[i * len(rows) // n] for i in range(n)):
        page.append(f"#### {set_name}, row {row.index + 1}")
        parts = {"instruction": row.instruction, "input": row.input, "reference": row.references[0]}
        parts |= {label: results[label][row.index]["text"] for label in results}
        for name, text in parts.items():
            if text or name != "input":
                page.append(f"{name}:\n\n{textwrap.indent(text, '    ')}")
    text = "\n\n".join(page) + "\n"
    write_atomic(out / "table6.md", text)
    print(f"\n{text}\nalso in {out / 'table6.md'}")


def write_prompt(directory, content):
    """Print what a tuned prompt does, `content` of `tuned_prompt.describe_run`, and write it to a
    run's prompt.json; plot the responses in it as prompt.png."""
    vectors = [["began as", "moved", "cosine", *(f"nearest {n}" for n in range(1, 6))]]
    for vector in content["vectors"]:
        nearest = [f"{text} {cosine:.2f}" for text, cosine in vector["nearest"]]
        moved = "-" if vector["moved"] is None else f"{vector['moved']:.3f}"
        vectors.append([vector["began_as"], moved, f"{vector['cosine']:.3f}", *nearest])
    means = [["validation references", "nats per token"]]
    means += [[name, f"{value:.3f}"] for name, value in content["references"].items()]
    print(format_table(vectors), format_table(means), sep="\n\n")
    print("p: teacher, p_P: with the prompt, q: student")
    write_atomic(directory / "prompt.json", json.dumps(content, indent=1) + "\n")
    plot = plot_responses(directory / "prompt.png", content["responses"])
    print(f"also in {directory / 'prompt.json'}; {plot}")


# ---- plots -----------------------------------------------------------------------------------
@contextmanager
def without_variable(name):
    """In this context the environment has no such variable."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def save_plot(path, draw):
    """Write what draw(figure) draws, in a matplotlib Figure, as a PNG. Returns the path, or a line
    that says why there is no plot: hours of work must not end with an error in one."""
    try:
        # A notebook's back end may be missing here, and a file needs none.
        with without_variable("MPLBACKEND"):
            import matplotlib
            from matplotlib.figure import Figure

        # Names are drawn as they are: a `$` in one begins no formula.
        plain = {"text.parse_math": False, "text.usetex": False}
        with matplotlib.rc_context(plain), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each character that the font lacks
            figure, image = Figure(layout="constrained"), io.BytesIO()
            draw(figure)
            figure.savefig(image, dpi=150, format="png")
        write_atomic(path, image.getvalue())
    except Exception as error:
        return f"no plot ({type(error).__name__}: {textwrap.shorten(str(error), 200)})"
    return str(path)


def plot_curves(run_dir):
    """Plot a run's losses and validation ROUGE-L over its steps as curves.png (see `save_plot`)."""

    def draw(figure):
        metrics = [values for _, values in read_jsonl(run_dir / "metrics.jsonl")]
        figure.set_size_inches(10, 4)
        left, right = figure.subplots(1, 2)
        curves = {"loss": "loss", "prompt_kd": "prompt: L_kd", "prompt_reg": "prompt: L_reg"}
        curves |= {"val_loss": "validation loss", "val_rouge_l": "ROUGE-L"}
        for name, label in curves.items():
            axes = right if name == "val_rouge_l" else left
            marker = "o" if name.startswith("val_") else None
            points = [(values["step"], values[name]) for values in metrics if name in values]
            if points:
                axes.plot(*zip(*points), label=label, linewidth=1, marker=marker)
        [title] = unique_labels([run_dir])
        left.set(xlabel="optimizer step", ylabel="nats per token", title=title)
        left.legend()
        title = "validation" if right.lines else "no validation by ROUGE-L in this stage"
        right.set(xlabel="optimizer step", ylabel="ROUGE-L", title=title)

    return save_plot(run_dir / "curves.png", draw)


def plot_responses(path, responses, width=40):
    """Plot the probabilities of the tokens of responses under several models as bars, in panels of
    `width` tokens (see `save_plot`). responses: as `tuned_prompt.describe_run` makes them."""

    def draw(figure):
        panels = [(r, i) for r in responses for i in range(0, len(r["tokens"]), width)]
        figure.set_size_inches(11, 0.8 + 2.6 * len(panels))
        for axes, (response, start) in zip(
            figure.subplots(len(panels), squeeze=False)[:, 0], panels
        ):
            tokens = response["tokens"][start : start + width]
            bar = 0.8 / len(response["probabilities"])
            for i, (label, values) in enumerate(response["probabilities"].items()):
                places = [n + i * bar - 0.4 + bar / 2 for n in range(len(tokens))]
                axes.bar(places, values[start : start + width], bar, label=label)
            axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
            axes.set(xlim=(-0.6, min(width, len(response["tokens"])) - 0.4), ylim=(0, 1))
            part = "" if start == 0 else f", from token {start + 1} on"
            axes.set(title=f"validation row {response['row']}{part}", ylabel="probability")
        [label] = unique_labels([path.parent])
        figure.suptitle(f"{label}: responses of the student")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))

    return save_plot(path, draw)


def plot_bars(path, bars, lines, title):
    """Plot mean scores as bars, with the standard deviation as error bar (see `save_plot`). bars:
    {label: scores}, from top to bottom. lines: vertical lines, {label: score}."""

    def draw(figure):
        figure.set_size_inches(8, 1.5 + 0.3 * len(bars))
        axes = figure.subplots()
        for label, scores in bars.items():
            mean = statistics.fmean(scores)
            bar = axes.barh(label, mean, xerr=std(scores), capsize=3, color="C0")
            axes.bar_label(bar, fmt="%.1f", padding=2, fontsize=8)
        for label, score in lines.items():
            # A legend leaves out labels that begin with an underscore, hence the space.
            axes.axvline(score, linestyle="--", linewidth=1, color="black", label=f" {label}")
        axes.invert_yaxis()
        axes.set(title=textwrap.fill(title, 72), xlabel="ROUGE-L")
        if lines:
            figure.legend(loc="outside lower center")

    return save_plot(path, draw)


# ---- exposure bias: Figures 3a and 3b --------------------------------------------------------
def last_reliable_step(columns):
    """The last step l of a curve at which enough responses of student and teacher are alive."""
    alive = np.minimum(columns["alive_student"], columns["alive_teacher"])  # (L,), never rises
    return int((alive >= MIN_ALIVE * alive[0]).sum())


def write_figure(stem, series_name, series, settings, x, title, xlabel):
    """Write the curves of ExAccErr, {label: {column: values}}, as `stem`.json, and plot them over
    the column x as `stem`.png. Returns a line that names both. series_name: what a label is."""
    content = {"settings": settings, f"{series_name}s": series}
    write_atomic(f"{stem}.json", json.dumps(content) + "\n")
    [data] = unique_labels([settings["data"]])
    size = f"{data}: {settings['requests']} requests × {settings['samples']} samples"

    def draw(figure):
        axes = figure.subplots()
        for label, columns in series.items():
            # Over generation steps, a curve ends at its last reliable one.
            end = last_reliable_step(columns) if x == "l" else None
            steps, error = columns[x][:end], columns["ex_acc_err"][:end]
            [line] = axes.plot(steps, error, ".-", label=f" {label}")  # as in plot_bars
            band = columns["low"][:end], columns["high"][:end]
            axes.fill_between(steps, *band, color=line.get_color(), alpha=0.15, lw=0)
        axes.axhline(0, color="black", linewidth=0.8)
        title_lines = f"{title}\n{size}; bands: 95 %, bootstrap over requests"
        axes.set(title=title_lines, xlabel=xlabel, ylabel="ExAccErr (%)")
        axes.legend()

    return f"also in {stem}.json; {save_plot(f'{stem}.png', draw)}"
