"""Make data/demo_models, the pre-trained models that the demo starts from.

    python train.py --method pretrain --data demo --shape 3x128x4
    python train.py --method pretrain --data demo --shape 1x96x4 --train-rows 80000
    python train.py --method pretrain --data demo --shape 1x48x4 --train-rows 80000
    python -m tests.make_demo_models

The first takes about 25 minutes of one thread, the others two each. The last converts their weights
to float16.
"""

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from data.process.command_line import run_command_line
from data.process.errors import InputError
from data.sets.demo import MODELS_DIR

RUNS = {
    "3x128x4": "pretrain-3x128x4-demo",
    "1x96x4": "pretrain-1x96x4-demo-80000rows",
    "1x48x4": "pretrain-1x48x4-demo-80000rows",
}


def convert(source, target):
    """Copy a checkpoint directory, with its weights in float16."""
    if not (source / "model.safetensors").is_file():
        raise InputError(f"{source}: has no model.safetensors; run the commands before this one")
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "vocab.json", "merges.txt"):
        shutil.copyfile(source / name, target / name)
    weights = load_file(source / "model.safetensors")
    half = {name: weight.half() for name, weight in weights.items()}
    save_file(half, target / "model.safetensors", metadata={"format": "pt"})


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.make_demo_models")
    parser.add_argument("--out", default="out", metavar="DIR", help="the directory of the runs")
    out = Path(parser.parse_args(argv).out)
    for shape, run in RUNS.items():
        convert(out / run / "best", MODELS_DIR / shape)


if __name__ == "__main__":
    run_command_line(main)
