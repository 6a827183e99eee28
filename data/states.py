"""Training states: what resuming needs, saved atomically."""

import os
import pickle
import zipfile
from dataclasses import astuple

import torch

from data import dist
from data.cli import InputError
from data.dist import print0
from data.rows import RolloutRow


def save_state(run, directory, done):
    """What going on needs, on disk. done: step, best score and its step, and hours so far."""
    state = {
        "done": done,
        "student": run.student.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    if run.P is not None:
        state |= {"P": run.P.detach(), "prompt_optimizer": run.prompt_optimizer.state_dict()}
    if run.rollout is not None:
        state["rollout"] = [astuple(row) for row in run.rollout]
    dist.run_on_rank0(write_state, directory / "state" / f"step-{done['step']:06d}.pt", state)


def write_state(path, state):
    """Write a state, which has its name only when whole. The one before it is kept, older ones go."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except RuntimeError as error:  # torch.save's word for a full disk
        raise InputError(
            f"{path}: can't be written ({error.__context__ or error}); make room, and the same command goes on"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    for old in list_states(path.parent)[2:]:
        old.unlink()


def list_states(directory):
    """The saved states in a directory, the newest first."""
    return sorted(
        directory.glob("*.pt"), key=lambda path: (len(path.name), path.name), reverse=True
    )


def find_newest_state(directory):
    """The newest saved state that is whole, None where there is none. Damaged ones are said and put aside."""
    for path in (found := list_states(directory / "state")):
        try:
            whole = (
                zipfile.ZipFile(path).testzip() is None
            )  # torch.load does not look at the checksums
        except Exception:  # zipfile has many ways to fail
            whole = False
        if whole:
            return path
        os.replace(path, path.with_suffix(".damaged"))
        print0(
            f"{path}: is damaged; "
            + (
                "this stage starts anew"
                if path == found[-1]
                else "going on from the state before it"
            )
        )
    return None


def load_state(run, directory):
    """Take up the newest state. Returns its step, best score and its step, and hours so far."""
    path = dist.run_on_rank0(find_newest_state, directory)
    if path is None:
        return {"step": 0, "best": None, "best_step": None, "hours": 0.0}
    try:
        state = torch.load(path, map_location=run.device, weights_only=True)
        run.student.load_state_dict(state["student"])
        run.optimizer.load_state_dict(state["optimizer"])
        if run.P is not None:
            run.P.data.copy_(state["P"])
            run.prompt_optimizer.load_state_dict(state["prompt_optimizer"])
        if "rollout" in state:
            run.rollout = [RolloutRow(*row) for row in state["rollout"]]
        return state["done"]
    except (
        RuntimeError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        raise InputError(
            f"{path}: is no state of this run; remove {path.parent} to start this stage anew"
        ) from error
