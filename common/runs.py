"""A run: its folder, log, metrics, checkpoint, progress bar, Ctrl-C; finding and loading
checkpoints.
"""

import csv
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from .cli import config_from, fail, merge_config
from .data import ROOT
from .device import random_state, seed_everything, set_random_state

FORMAT = "diffusion-examples-1"


class Run:
    """One run folder outputs/<script>/<date-time>/ and what is written to it.

    Only the main process writes; in the others every method that writes does nothing and folder
    is None.
    """

    def __init__(self, script, cfg, opts, launch, folder=None):
        self.script, self.cfg, self.opts, self.launch = script, cfg, opts, launch
        self.device, self.stopped = launch.device, False
        self._folder, self._log, self._board = folder, None, None
        if opts.tensorboard and launch.main:
            try:
                import torch.utils.tensorboard  # noqa: F401
            except ImportError:
                fail("--tensorboard: tensorboard is not installed (pip install tensorboard)")

    @property
    def folder(self):
        """The run folder, made when first asked for: a mistake found earlier leaves nothing."""
        if self._folder is None and self.launch.main:
            self._folder = _new_folder(Path(self.opts.out) / self.script)
            config = {"script": self.script, "seed": self.opts.seed,
                      "config": dataclasses.asdict(self.cfg)}
            self._write_text("config.json", json.dumps(config, indent=2))
        return self._folder

    def path(self, name):
        """Where a file of this run lies."""
        return self.folder / name

    def _write_text(self, name, text):
        scratch = self.path(name + ".tmp")
        scratch.write_text(text, newline="\n")
        os.replace(scratch, self.path(name))

    def log(self, step, **values):
        """Append one row to log.csv (and to TensorBoard when asked for)."""
        if not self.launch.main:
            return
        if self._log is None:
            new = not self.path("log.csv").exists()
            self._log = open(self.path("log.csv"), "a", newline="")
            if new:
                csv.writer(self._log, lineterminator="\n").writerow(["step", *values])
        csv.writer(self._log, lineterminator="\n").writerow([step, *values.values()])
        if self.opts.tensorboard:
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter
                self._board = SummaryWriter(self.path("tensorboard"))
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def flush_log(self):
        """Put the rows logged so far on disk."""
        if self._log is not None:
            self._log.flush()

    def read_log(self):
        """log.csv as {column: list of floats}; empty where there is none."""
        self.flush_log()
        if not self.path("log.csv").exists():
            return {}
        with open(self.path("log.csv")) as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in rows[0]} if rows else {}

    def trim_log(self, step):
        """Drop the rows after step: a resumed run writes them again."""
        if self._log is not None:
            self._log.close()
            self._log = None
        if not self.launch.main or not self.path("log.csv").exists():
            return
        lines = self.path("log.csv").read_text().splitlines(keepends=True)
        kept = [line for line in lines[1:] if int(line.split(",")[0]) <= step]
        self._write_text("log.csv", "".join(lines[:1] + kept))

    def read_metrics(self):
        """metrics.json as a dict."""
        file = self.path("metrics.json")
        return json.loads(file.read_text()) if file.exists() else {}

    def add_metrics(self, **values):
        """Merge values into metrics.json."""
        if self.launch.main:
            self._write_text("metrics.json", json.dumps(self.read_metrics() | values, indent=2))

    def save_checkpoint(self, step, modules, optimizer, **extra):
        """Write checkpoint.pt under a temporary name, then rename it.

        modules: {"model": ..., "ema": ...}; extra: plain values and tensors that sampling needs.
        """
        if not self.launch.main:
            return
        state = {"format": FORMAT, "script": self.script, "seed": self.opts.seed, "step": step,
                 "config": dataclasses.asdict(self.cfg), "optimizer": optimizer.state_dict(),
                 "random": random_state(self.device), **extra,
                 **{name: module.state_dict() for name, module in modules.items()}}
        self.flush_log()
        scratch = self.path("checkpoint.pt.tmp")
        with open(scratch, "wb") as file:
            torch.save(_anew(state), file)
        os.replace(scratch, self.path("checkpoint.pt"))

    def steps(self, first, last):
        """Iterate over first..last-1 with a progress bar; Ctrl-C ends the loop after the step under
        way.

        A second Ctrl-C leaves the program at once with status 130. Under torchrun, which stops its
        processes itself, Ctrl-C is left alone.
        """
        watch = self.launch.main and self.launch.world == 1
        before = signal.getsignal(signal.SIGINT)
        if watch:
            signal.signal(signal.SIGINT, self._interrupt)
        self.bar = tqdm(range(first, last), initial=first, total=last, desc="train", unit="step",
                        disable=not self.launch.main, mininterval=0.5, file=sys.stderr)
        for step in self.bar:
            yield step
            if self.stopped:
                break
        self.bar.close()
        if watch and not self.stopped:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, *_):
        if self.stopped:
            os._exit(130)
        self.stopped = True
        tqdm.write("stopping: saving and sampling what there is (Ctrl-C again leaves at once)")

    def report(self):
        """Print the numbers of metrics.json that a person looks for first."""
        found = self.read_metrics()
        sampling, judged = found.get("sampling", {}), found.get("samples", {})
        evaluation = found.get("evaluation", {})
        facts = [
            ("trained", found.get("train_seconds"), "{:.0f} s"),
            ("sampled", sampling.get("seconds"), "{:.0f} s"),
            ("samples the classifier is sure of", evaluation.get("sure", judged.get("sure")),
             "{:.0%}"),
            ("Fréchet distance in its features", evaluation.get("frechet_distance"), "{:.1f}"),
            ("all in", found.get("total_seconds"), "{:.0f} s"),
        ]
        line = ", ".join(f"{name} {form.format(x)}" for name, x, form in facts if x is not None)
        self.say(f"{line}; figures and metrics.json in {self.folder}")

    def say(self, text):
        """Print a line, from the main process only."""
        if self.launch.main:
            tqdm.write(text)


def _anew(value):
    """The same value in new containers, its strings interned: equal values then pickle to equal
    bytes, so that a resumed run can end with the very file of one that never stopped.
    """
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, dict):
        return {_anew(k): _anew(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_anew, value))
    return value


def _new_folder(parent):
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
        except OSError as problem:
            fail(f"--out {parent.parent}: cannot be written ({problem.strerror})")


def newest(out, scripts):
    """The newest run folder with a checkpoint among these scripts, or None."""
    found = [p.parent for script in scripts for p in (Path(out) / script).glob("*/checkpoint.pt")]
    return max(found, key=lambda p: (p / "checkpoint.pt").stat().st_mtime, default=None)


def load_checkpoint(path, scripts):
    """The dict in a checkpoint file (or in a run folder), made by one of the named scripts."""
    path = Path(path)
    file = path / "checkpoint.pt" if path.is_dir() else path
    if not file.is_file():
        fail(f"{file}: no such checkpoint")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a foreign file makes torch.load raise any of a dozen kinds
        fail(f"{file}: truncated, or not a checkpoint of plain tensors")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        fail(f"{file}: not a checkpoint of this collection")
    missing = {"script", "seed", "step", "config", "ema"} - set(state)
    if missing:
        fail(f"{file}: incomplete, lacks {', '.join(sorted(missing))}")
    if state["script"] not in scripts:
        fail(f"{file}: made by {state['script']}_example.py, this script reads "
             f"{' or '.join(f'{s}_example.py' for s in scripts)}")
    return state


def start(script, Config, cfg, opts, launch, validate, reads=()):
    """Open the run that the command line asks for. Returns (cfg, run, state).

    state is the checkpoint of --resume or --sample, else None. cfg is then the checkpoint's Config,
    which only opts.free fields may depart from. reads: other scripts whose checkpoints --sample
    accepts. validate(cfg) ends the program when a value is out of range.
    """
    state, folder = None, None
    if opts.sample is not None:
        scripts = (script, *reads)
        source = opts.sample or newest(opts.out, scripts)
        shipped = [ROOT / "pretrained" / f"{name}.pt" for name in scripts]
        source = source or next((p for p in shipped if p.exists()), None)
        if source is None:
            fail(f"--sample: no run of {' or '.join(scripts)} under {opts.out} and none shipped")
        state = load_checkpoint(source, scripts)
    elif opts.resume is not None:
        source = opts.resume or newest(opts.out, (script,))
        if source is None:
            fail(f"--resume: no run of {script} under {opts.out}")
        folder = Path(source).parent if Path(source).is_file() else Path(source)
        state = load_checkpoint(folder, (script,))
        if not {"optimizer", "model", "random"} <= set(state):
            fail(f"--resume {source}: holds no optimiser state, it can only be sampled from")
        opts.seed = state["seed"]
    if state is not None:
        stored = state["config"]
        if (
            state["script"] != script
        ):  # the settings this script does not share keep their own values
            stored = dataclasses.asdict(cfg) | {
                k: v for k, v in stored.items() if k in vars(cfg) and k not in opts.free}
        cfg = merge_config(config_from(stored, Config, str(source)), opts, str(source))
    validate(cfg)
    seed_everything(opts.seed)
    run = Run(script, cfg, opts, launch, folder)
    if state is not None and launch.main:
        run.say(f"loaded {source} (step {state['step']})")
    return cfg, run, state


def restore(module, weights, where="checkpoint"):
    """Load weights into a module; ones of another shape or name end the program."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, KeyError, AttributeError, TypeError):
        fail(f"{where}: its weights do not fit the network that its Config describes")


def resume_training(state, model, ema, optimizer, run):
    """Put a checkpoint back so that training goes on where it was. Returns the number of steps
    done.
    """
    restore(model, state["model"])
    restore(ema, state["ema"])
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError):
        fail("checkpoint: its optimiser state does not fit the network")
    set_random_state(state["random"], run.device)
    run.trim_log(state["step"])
    return state["step"]
