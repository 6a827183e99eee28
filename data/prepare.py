"""The command `python -m data.prepare`; its body is data/sets/prepare.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before another `data`

from data.process.command_line import run_command_line
from data.sets.prepare import main

if __name__ == "__main__":
    run_command_line(main)
