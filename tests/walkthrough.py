"""Runs the blocks of docs/walkthrough.md in order.

python -m tests.walkthrough     # writes what they print into the page, and draws its pictures
"""

import contextlib
import io
import re
from pathlib import Path

from data.runs.report import save_plot

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "walkthrough.md"
# A block of code, and what the page shows of its output, if it prints something
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.M | re.S)


def run_blocks(page):
    """Run all blocks in one namespace. Returns it, and what each block printed."""
    namespace, printed = {}, []
    with contextlib.chdir(ROOT):
        for code, _ in BLOCK.findall(page):
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(compile(code, str(PAGE), "exec"), namespace)
            printed.append(stdout.getvalue())
    return namespace, printed


def draw_tuning(figure, with_reg, without_reg):
    """KL(p_P ‖ q) and the reference loss over the steps of phase 1, {step: [L_kd, L_reg, loss]}."""
    figure.set_size_inches(8, 3)
    titles = {0: "KL(p_P ‖ q)", 2: "loss of p_P on right answers"}
    for axes, (column, title) in zip(figure.subplots(1, 2), titles.items()):
        for label, style, history in (
            ("with L_reg (λ = 1)", "-o", with_reg),
            ("without (λ = 0)", "--s", without_reg),
        ):
            values = [numbers[column] for numbers in history.values()]
            axes.plot(list(history), values, style, label=label, markersize=4)
        axes.set(xlabel="steps of phase 1", ylabel="nats per token", title=title, ylim=0)
        axes.legend()


def draw_token(figure, distributions, tokenizer, n=9):
    """The probabilities of one token, {label: (V,)}: those most likely under any distribution."""
    figure.set_size_inches(8, 3)
    axes = figure.subplots()
    tokens = sum(distributions.values()).topk(n).indices.tolist()
    width = 0.8 / len(distributions)
    for i, (label, probabilities) in enumerate(distributions.items()):
        places = [place + i * width for place in range(n)]
        shade = str(0.15 + 0.2 * i)  # told apart in grey, too
        values = [float(probabilities[token]) for token in tokens]
        axes.bar(places, values, width, label=label, color=shade)
    middle = [place + 0.4 - width / 2 for place in range(n)]
    axes.set_xticks(middle, [tokenizer.decode([token]) for token in tokens])
    axes.set(ylabel="probability", title="the first token of the first answer")
    axes.legend()


def draw_pictures(found):
    """Write the page's pictures from the names that its blocks have defined."""
    before, probabilities, p = (found[name] for name in ("before", "probabilities", "p"))
    distributions = {
        "p": before["p"][0],
        "p_P with L_reg": probabilities(p, found["P_tuned"])[0],
        "p_P without": probabilities(p, found["P_free"])[0],
        "q": before["q"][0],
    }
    for name, draw, *content in (
        ("walkthrough-tuning.png", draw_tuning, found["tuned"], found["free"]),
        ("walkthrough-token.png", draw_token, distributions, found["tokenizer"]),
    ):
        print(save_plot(PAGE.with_name(name), lambda figure: draw(figure, *content)))  # noqa: B023


def main():
    page = PAGE.read_text(encoding="utf-8")
    found, printed = run_blocks(page)
    outputs = iter(printed)

    def insert(block):
        output = next(outputs)
        return f"```python\n{block[1]}```\n" + (f"\n```text\n{output}```\n" if output else "")

    PAGE.write_text(BLOCK.sub(insert, page), encoding="utf-8")
    draw_pictures(found)


if __name__ == "__main__":
    main()
