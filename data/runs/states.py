"""Training states: what resuming needs, saved atomically."""

import os
import zipfile
from dataclasses import astuple
from pickle import PickleError

import torch

from data.models.copies import check_same_files
from data.process import dist
from data.process.dist import print0
from data.process.errors import InputError
from data.process.files import atomic_path
from data.runs.optim import load_optimizer_state, optimizer_state
from data.sets.rows import Example


def save_state(run, directory, progress):
    """Save what resuming needs. progress: step, best score and its step, and hours so far."""
    state = {"progress": progress, "warmup_steps": run.warmup_steps}
    state |= {"student": run.student.state_dict(), "optimizer": optimizer_state(run.optimizer)}
    if run.P is not None:
        state |= {"P": run.P.detach(), "prompt_optimizer": run.prompt_optimizer.state_dict()}
    if run.scored_rollout is not None:
        state["rollout"] = [astuple(row) for row in run.scored_rollout]
    path = directory / "state" / f"step-{progress['step']:06d}.pt"
    dist.run_on_rank0(write_state, path, state)


def write_state(path, state):
    """Write a state atomically. The state before it is kept, in case this one gets damaged; older
    ones are removed."""
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
    except (RuntimeError, OSError) as error:
        # torch.save raises RuntimeError while it handles the OSError of a full disk.
        cause = error.__context__ or error
        fix = "free some disk space and run the same command again to resume"
        raise InputError(f"{path}: can't be written ({cause}); {fix}") from error
    for old in list_states(path.parent)[2:]:
        old.unlink()


def list_states(directory):
    """The saved states in a directory, newest first."""
    return sorted(directory.glob("*.pt"), key=lambda p: (len(p.name), p.name), reverse=True)


def is_intact(path):
    """Whether a state's checksums are right, which torch.load does not check."""
    try:
        return zipfile.ZipFile(path).testzip() is None
    except MemoryError:
        raise  # it says nothing of the file
    except Exception:  # zipfile raises many kinds of errors
        return False


def newest_step(directory):
    """The step of the newest undamaged state, 0 if there is none."""
    newest = next(filter(is_intact, list_states(directory / "state")), None)
    return 0 if newest is None else int(newest.stem.removeprefix("step-"))


def find_newest_state(directory):
    """The newest undamaged state, None if there is none. Damaged ones are reported and renamed."""
    paths = list_states(directory / "state")
    for path in paths:
        if is_intact(path):
            return path
        os.replace(path, path.with_suffix(".damaged"))
        fallback = "this stage starts from scratch" if path == paths[-1] else "trying an older one"
        print0(f"{path}: is damaged; {fallback}")
    return None


def load_state(run, directory):
    """Load the newest state into `run`. Returns its progress, as `save_state` takes it."""
    path = dist.run_on_rank0(find_newest_state, directory)
    if path is None:
        return {"step": 0, "best": None, "best_step": None, "hours": 0.0}
    check_same_files([path])
    try:
        # For a GPU the file is mapped into memory that the ranks share, and copied by tensor.
        mmap = run.device.type == "cuda"
        state = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        run.student.load_state_dict(state["student"])
        load_optimizer_state(run.optimizer, state["optimizer"])
        if run.P is not None:
            run.P.data.copy_(state["P"])
            run.prompt_optimizer.load_state_dict(state["prompt_optimizer"])
        if "rollout" in state:
            run.scored_rollout = [Example(*row) for row in state["rollout"]]
        # A run of an older version ends with the warm-up that it began with.
        run.warmup_steps = state.get("warmup_steps", run.settings.warmup_steps)
        return state["progress"]
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, PickleError) as error:
        fix = f"move {path.parent} elsewhere to start from scratch"
        raise InputError(f"{path}: is not a state of this run; {fix}") from error
