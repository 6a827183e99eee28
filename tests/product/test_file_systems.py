"""File systems that lack what a disk has: permissions, truncation, links, times, fsync. And that
tensors are written without safetensors' own save_file, which needs more of them."""

import shutil
import subprocess
import sys

import pytest
from helpers import TINY, run_command, soft_prompt, stored_weights
from safetensors.torch import load_file, save_file

from data.models.tensors import save_tensors

# Each call fails as it does on a mounted object store or on CIFS.
SHIM = """
#include <errno.h>
#define FAILS(name, error) int name() { errno = error; return -1; }
FAILS(chmod, EPERM) FAILS(fchmod, EPERM) FAILS(fchmodat, EPERM) FAILS(lchmod, EPERM)
FAILS(chown, EPERM) FAILS(fchown, EPERM) FAILS(lchown, EPERM) FAILS(fchownat, EPERM)
FAILS(utime, EPERM) FAILS(utimes, EPERM) FAILS(futimes, EPERM) FAILS(futimens, EPERM)
FAILS(utimensat, EPERM) FAILS(link, ENOTSUP) FAILS(linkat, ENOTSUP) FAILS(symlink, ENOTSUP)
FAILS(symlinkat, ENOTSUP) FAILS(fallocate, EOPNOTSUPP) FAILS(truncate64, ENOTSUP)
FAILS(ftruncate, ENOTSUP) FAILS(ftruncate64, ENOTSUP) FAILS(fsync, FSYNC) FAILS(fdatasync, FSYNC)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """A library that, preloaded, lets these calls fail."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("takes gcc and Linux's LD_PRELOAD")
    directory = tmp_path_factory.mktemp("shim")
    (directory / "shim.c").write_text(SHIM)
    command = ["gcc", "-w", "-shared", "-fPIC", "-fno-builtin", "-DFSYNC=EINVAL"]
    subprocess.run([*command, "-o", "shim.so", "shim.c"], cwd=directory, check=True)
    return directory / "shim.so"


# Trained, killed in the second step, resumed, and sampled from
SCRIPT = """
import os, sys
sys.path.insert(0, "")
import train
from data.models import sampling
from data.runs import report
from data.sets import demo
report.save_plot = lambda path, draw: "no plot"
demo.make_documents = lambda seed: ["one two three " * 20] * 500  # 240,000 take ten seconds
for call in (lambda: os.chmod(".", 0o755), lambda: os.truncate(sys.argv[1], 1)):
    try:
        call()
    except OSError as error:
        print(error.strerror)
argv, train_step = sys.argv[2:], train.train_step

def killed(run, examples, t):
    if t == 1:
        raise KeyboardInterrupt
    return train_step(run, examples, t)

train.train_step = killed
try:
    train.main(argv)
except KeyboardInterrupt:
    print("killed")
train.train_step = train_step
train.main(argv)
run = argv[-1] + "/pretrain-1x16x2-demo-steps2"
sampling.main([run, "--instruction", "x", "--max-new", "4"])
"""


@pytest.mark.slow
def test_a_run_on_a_file_system_that_can_do_little(shim, tmp_path):
    options = "--method pretrain --data demo --shape 1x16x2 --steps 2 --save-every 1 --dev-rows 4"
    (tmp_path / "file").write_text("text")
    result = run_command(
        "-c",
        SCRIPT,
        tmp_path / "file",
        *options.split(),
        "--out",
        tmp_path / "out",
        LD_PRELOAD=str(shim),
        PROMPTKD_DATA_DIR=str(tmp_path / "data"),
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:2] == ["Operation not permitted", "Operation not supported"]
    assert "killed" in lines and any("resum" in line for line in lines)
    best = tmp_path / "out" / "pretrain-1x16x2-demo-steps2" / "best"
    assert load_file(best / "model.safetensors")


@pytest.mark.parametrize("tensors", [stored_weights(TINY), {"prompt": soft_prompt(3)}])
def test_the_bytes_are_those_of_safetensors(tmp_path, tensors):
    save_tensors(tensors, tmp_path / "ours")
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
