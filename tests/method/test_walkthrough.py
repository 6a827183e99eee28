"""docs/walkthrough.md: its blocks run in order, and print what the page shows."""

import re

import pytest

from tests.walkthrough import BLOCK, PAGE, run_blocks

NUMBER = re.compile(r"\d+\.\d+")
BLOCKS = BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def test_every_block_prints_what_the_page_shows():
    """The text exactly, and numbers to 1 % or one unit of the last digit."""
    _, printed = run_blocks(PAGE.read_text(encoding="utf-8"))
    for (code, shown), found in zip(BLOCKS, printed, strict=True):
        assert NUMBER.sub("0.0", found) == NUMBER.sub("0.0", shown), code
        for a, b in zip(NUMBER.findall(found), NUMBER.findall(shown), strict=True):
            unit = 10.0 ** -len(b.partition(".")[2])
            assert float(a) == pytest.approx(float(b), rel=0.01, abs=1.01 * unit), code


def test_blocks_are_short_and_use_only_the_core_but_for_loading():
    assert 10 <= len(BLOCKS) <= 20
    *steps, _ = BLOCKS
    for code, _ in steps:
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= 10, code
    imports = re.findall(r"^from ([\w.]+)", "".join(code for code, _ in BLOCKS), re.M)
    allowed = {"data.models.named", "types", "losses", "model", "prompt", "sample"}
    assert set(imports) == allowed
