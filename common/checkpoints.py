"""Run folders and checkpoints: found, locked, loaded, told where they are damaged."""

import os
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from .cli import check_seed, fail
from .data import ROOT

FORMAT = "diffusion-examples-1"
HELD = {}  # the run folders that this process trains in, each with its lock


# Folders


def new_folder(parent):
    """A new folder named after the time; never one that exists."""
    stamp, count = time.strftime("%Y-%m-%d_%H-%M-%S"), 0
    while True:
        folder = parent / (stamp + (f"_{count}" if count else ""))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not parent.is_dir():
                fail(f"--out {parent.parent}: is not a folder")
            count += 1
        except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
            reason = getattr(problem, "strerror", problem)
            fail(f"--out {str(parent.parent)!r}: cannot be written ({reason})")


def hold(folder):
    """Keep other trainings out of a run folder; ends the program where one is in it."""
    try:
        import fcntl  # absent on Windows
    except ImportError:
        return
    if folder.resolve() in HELD:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        HELD[folder.resolve()] = handle
    except BlockingIOError:
        fail(f"--resume {folder}: another process is training in it")
    except OSError:  # a file system without locks
        os.close(handle)


def release(folder):
    """Undo hold."""
    if folder.resolve() in HELD:
        os.close(HELD.pop(folder.resolve()))


def newest(out, scripts):
    """The newest run folder with a checkpoint among these scripts, or None."""
    found = [file.parent for script in scripts
             for file in (Path(out) / script).glob("*/checkpoint.pt")]
    return max(found, key=lambda p: (p / "checkpoint.pt").stat().st_mtime, default=None)


def to_sample(opts, scripts):
    """The checkpoint that --sample means: the one named, the newest or the shipped."""
    shipped = [ROOT / "pretrained" / f"{name}.pt" for name in scripts]
    source = opts.sample or newest(opts.out, scripts)
    source = source or next((p for p in shipped if p.exists()), None)
    if source is None:
        names = " or ".join(scripts)
        fail(f"--sample: no run of {names} under {opts.out}, and none is shipped")
    return source


def to_resume(opts, script):
    """The run folder that --resume means: the one named, or the newest."""
    source = opts.resume or newest(opts.out, (script,))
    if source is None:
        fail(f"--resume: no run of {script} under {opts.out}")
    source = Path(source)
    if not _exists(source, Path.is_file):
        return source
    if source.name != "checkpoint.pt":
        fail(f"--resume {source}: must be a run folder or the checkpoint.pt in it")
    return source.parent


def _exists(path, kind):
    """kind(path), Path.is_file or is_dir; no name is too long or odd to ask."""
    try:
        return kind(path)
    except (OSError, ValueError):
        return False


# Checkpoints


def load_checkpoint(path, scripts, where=None):
    """The dict in a checkpoint file, or in a run folder, of one of these scripts.

    where: what errors begin with, such as "--sample FILE"; else with the path.
    """
    path, where = Path(path), where or path
    file = path / "checkpoint.pt" if _exists(path, Path.is_dir) else path
    if not _exists(file, Path.is_file):
        fail(f"{where}: no such checkpoint")
    try:
        with warnings.catch_warnings():  # of a foreign pickle: the error below says it
            warnings.simplefilter("ignore")
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a foreign file makes torch.load raise any of a dozen kinds
        fail(f"{where}: truncated, or not a checkpoint of plain tensors")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        fail(f"{where}: not a checkpoint of this collection")
    state.setdefault("preset", "")  # what is shipped names none
    kinds = {"script": str, "preset": str, "seed": int, "step": int, "config": dict}
    check_kinds(state, kinds, where)
    check_seed(state["seed"], where)
    if state["script"] not in scripts:
        fail(f"{where}: made by {_file(state['script'])}, this script reads "
             f"{' or '.join(map(_file, scripts))}")
    return state


def _file(script):
    """The file of a script by the name of its runs; what has none is quoted."""
    files = sorted(file.name for file in ROOT.glob("*_example.py"))
    return next((file for file in files if file.startswith(script)), repr(script))


def check_kinds(state, kinds, where):
    """End the program where a checkpoint lacks an entry or has one of another type."""
    if missing := sorted(set(kinds) - set(state)):
        fail(f"{where}: incomplete, lacks {', '.join(missing)}")
    for name, kind in kinds.items():
        if type(state[name]) is not kind:
            fail(f"{where}: damaged, {name} is of type {type(state[name]).__name__}, "
                 f"must be {kind.__name__}")


def is_finite(module):
    """Whether all weights and buffers are finite numbers."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in
               module.state_dict().values() if isinstance(tensor, torch.Tensor))


def restore(module, state, where):
    """module.load_state_dict(state); a state that does not fit ends the program."""
    try:
        module.load_state_dict(state)
    except Exception:  # what is damaged makes it raise any of half a dozen kinds
        kind = "weights do" if isinstance(module, nn.Module) else "optimiser state does"
        fail(f"{where}: its {kind} not fit what its Config describes")


def anew(value):
    """The same value in new containers, its strings interned.

    Equal values then pickle to equal bytes, so that a resumed run can end with the very
    file of one that never stopped.
    """
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, dict):
        return {anew(k): anew(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(anew, value))
    return value
