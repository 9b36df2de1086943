"""A run: its folder, log and checkpoints, and what surrounds a training step."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
import zipfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from . import device, plotting, quality
from .cli import (NEWEST, SETTINGS, STOPPED, Mistake, check_config, check_seed,
                  config_from, in_notebook, merge_config, parse_args, say,
                  take_settings, write_whole, writing)
from .data import ROOT, Data, place_of

FORMAT = "diffusion-examples-1"


def open_run(script, Config, presets, sampling=(), argv=None, reads=(), trained=False):
    """Open the run that a command line asks for: (cfg, run).

    With --sample or --resume, cfg is the Config of the checkpoint, except for the
    fields named in `sampling`: with --sample those are this file's, and flags may
    change them. reads: other scripts whose checkpoints --sample takes. trained: a
    checkpoint is always loaded, as if --sample stood there. Raises Mistake before
    anything is written.
    """
    begin = time.perf_counter()
    cfg, opts = parse_args(Config, presets, argv)
    if trained and opts.resume is not None:
        raise Mistake("--resume: this script trains nothing, --sample RUN names a run")
    if trained and opts.sample is None:
        opts.sample = NEWEST
    state = where = None
    if opts.sample is not None or opts.resume is not None:
        state, where = _open_checkpoint(opts, script, reads)
        cfg = _stored_config(script, state, where, cfg, opts, presets, sampling)
    if hasattr(cfg, "dataset"):
        cfg = dataclasses.replace(cfg, dataset=place_of(cfg.dataset))
    for name, value in (SETTINGS | {"seed": 0, "preset": next(iter(presets))}).items():
        if getattr(opts, name) in (None, ""):
            setattr(opts, name, value)
    place = device.launch(opts.device)
    precisions = ("off", "bf16", "fp16")[:3 if place.device.type == "cuda" else 2]
    if opts.amp not in precisions:
        raise Mistake(f"--amp {opts.amp}: must be one of {', '.join(precisions)} on "
                      f"{place.device.type}")
    if cfg.batch_size % place.world:
        raise Mistake(f"batch_size {cfg.batch_size}: must be a multiple of "
                      f"{place.world}, the number of processes")
    if opts.tensorboard and find_spec("tensorboard") is None:
        raise Mistake("--tensorboard: the package is not installed (pip install "
                      "tensorboard)")
    device.seed_everything(opts.seed)
    plotting.not_drawn.clear()
    plotting.left_out.clear()
    run = Run(script, cfg, opts, place, opts.resume, state, begin, where)
    if opts.resume and run.main:
        run.read_metrics()  # if it cannot be read, say so before the training
    return cfg, run


def new_run(script, cfg, **settings):
    """The Run of a Config without a command line: new_run("ddpm", Config(), seed=1).

    settings: flags of the run by their names: device, seed, out, sample, amp, ...
    """
    argv = [f"--{name}" if value is True else f"--{name}={value}"
            for name, value in settings.items()
            if value is not None and value is not False]
    page = sys.modules.get(type(cfg).__module__)
    sampling = getattr(page, "SAMPLING", ())
    return open_run(script, type(cfg), {"own": cfg}, sampling, argv)[1]


def _open_checkpoint(opts, script, reads):
    """The checkpoint that --sample or --resume asks for, and that flag with its value.

    opts.sample or opts.resume becomes the path that was found.
    """
    scripts = (script, *reads) if opts.resume is None else (script,)
    flag = "sample" if opts.resume is None else "resume"
    source = getattr(opts, flag)
    if source is NEWEST:
        found = [file.parent for name in scripts
                 for file in (Path(opts.out) / name).glob("*/checkpoint.pt")]
        if flag == "sample":
            shipped = (ROOT / "pretrained" / f"{name}.pt" for name in scripts)
            found = found or [file for file in shipped if file.exists()][:1]
        if not found:
            raise Mistake(f"--{flag}: no run of {' or '.join(scripts)} in {opts.out}"
                          + (", and no shipped model" if flag == "sample" else ""))
        source = max(found, key=lambda path: (
            path / "checkpoint.pt" if path.is_dir() else path).stat().st_mtime)
    source, also = Path(source), {}
    where = f"--{flag} {source}"
    if flag == "resume":
        source = source.parent if source.name == "checkpoint.pt" else source
        with reading(where):
            if not source.is_dir():
                raise Mistake(f"{where}: must be a run folder or its checkpoint.pt")
        if device.torchrun()[0] == 0:
            _lock(source)
        also = {"loop": str, "random": list, "optimizer": dict}
    state = load_checkpoint(source, scripts, where, also)
    setattr(opts, flag, source)
    loop, step = state.get("loop", "model"), state["step"]
    steps = state["config"].get("steps" if loop == "model" else f"{loop}_steps", step)
    words = f"step {step} of {steps}" + ("" if loop == "model" else f" of its {loop}")
    if loop != "model" or steps != step:
        words = f"unfinished: {words}"
    if state["preset"] == "smoke":
        words += ", a smoke run, too short to learn anything"
    say(f"loaded {source} ({words})")
    return state, where


def _stored_config(script, state, where, cfg, opts, presets, sampling):
    """The Config of a checkpoint, with what may differ from it taken from cfg."""
    if opts.resume is not None:
        take_settings(opts, state.get("run"))
        for name in ("seed", "preset"):
            own, given = state[name], getattr(opts, name)
            if given is not None and own not in ("", given):
                raise Mistake(f"--{name} {given}: {opts.resume} goes on with its own, "
                              f"{own}")
            setattr(opts, name, own)
    opts.preset = opts.preset or state["preset"]
    if opts.resume is None and opts.preset in presets and not opts.config:
        cfg = dataclasses.replace(presets[opts.preset], **opts.given)
    known, stored = dataclasses.asdict(cfg), state["config"]
    if state["script"] != script:  # what the two do not share keeps this one's values
        stored = known | {key: stored[key] for key in stored if key in known}
    trained = config_from(stored, type(cfg), where)
    if opts.resume is not None:  # goes on as it was, except for flags of sampling
        steps = opts.given.get("steps", trained.steps)
        if state["loop"] == "model" and steps < state["step"]:
            raise Mistake(f"steps {steps}: must be >= {state['step']}, the step of "
                          f"{opts.resume}")
        if steps != trained.steps:
            say(f"trains to step {steps} instead of {trained.steps}; the learning rate "
                f"goes on as in a run of {steps} steps")
        trained = dataclasses.replace(trained, steps=steps)
        cfg = dataclasses.replace(trained, **opts.given)
    cfg = merge_config(trained, cfg, sampling, opts.given, where.split(" ", 1)[1])
    check_config(cfg)
    return cfg


# Checkpoints


@contextlib.contextmanager
def reading(where):
    """Turn any error inside the block into a Mistake: a damaged file raises a dozen."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign pickle, never executed
            yield
    except Mistake:
        raise
    except FileNotFoundError:
        raise Mistake(f"{where}: no such file") from None
    except Exception as problem:
        reason = getattr(problem, "strerror", None) or (
            f"{type(problem).__name__}: {' '.join(str(problem).split()):.300}")
        raise Mistake(f"{where}: damaged, or not a checkpoint that fits this script "
                      f"and its Config ({reason})") from None


def load_checkpoint(path, scripts, where=None, also=()):
    """The dict in a checkpoint file, or in a run folder, of one of these scripts.

    where: what an error begins with, such as "--sample FILE"; else the path. also: the
    types of more entries that it must have.
    """
    where = where or path
    kinds = {"preset": str, "script": str, "seed": int, "step": int, "config": dict}
    with reading(where):
        file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
        state = torch.load(file, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(file) as packed:  # torch does not look at the checksums
            if broken := packed.testzip():
                raise ValueError(f"{broken} has another checksum")
        if state["format"] != FORMAT:
            raise ValueError("another format")
        state.setdefault("preset", "")  # a shipped model names none
        for name, kind in {**kinds, **dict(also)}.items():
            if type(state[name]) is not kind:
                raise TypeError(f"{name} must be of type {kind.__name__}")
    check_seed(state["seed"], where)
    if state["script"] not in scripts:
        raise Mistake(f"{where}: made by the script {state['script']!r:.80}, must be "
                      f"of {' or '.join(scripts)}")
    return state


def is_finite(module):
    """Whether all weights and buffers are finite numbers."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in
               module.state_dict().values() if isinstance(tensor, torch.Tensor))


_LOCKS = {}  # the run folders that this process trains in, each with its lock


def _lock(folder):
    """Keep other processes from training in a run folder, where files can be locked."""
    if (folder := folder.resolve()) in _LOCKS or sys.platform == "win32":
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise Mistake(f"--resume {folder}: another process trains in it") from None
    except OSError:  # a file system without locks
        pass
    _LOCKS[folder] = handle


# The log


class Log:
    """A CSV file: a row for each step, a column for each name that was logged.

    after: drop the rows of later steps, which a resumed run writes again.
    """

    def __init__(self, path, after=None):
        self.path, self.columns, self.file = path, [], None
        if after is not None:
            kept = [row for row in self._rows() if float(row["step"]) <= after]
            self._rewrite(kept, list(kept[0]) if kept else [])

    def _rows(self):
        """All rows as dicts of texts; a row that a crash cut short is left out."""
        if not self.path.exists():
            return []
        try:
            text = self.path.read_text("utf-8", errors="replace")
            rows = [row for row in csv.DictReader(text.splitlines())
                    if None not in row and None not in row.values()]
            for row in rows:
                [float(text or "nan") for text in (row["step"], *row.values())]
            return rows
        except (KeyError, ValueError, csv.Error):
            raise Mistake(f"{self.path}: is not the log of a run") from None

    def read(self):
        """{column: list of floats}, NaN for an empty cell; {} where there is no row."""
        rows = self._rows()
        return {name: [float(row[name] or "nan") for row in rows]
                for name in (rows[0] if rows else ())}

    def _rewrite(self, rows, columns):
        self.close()
        self.columns = columns
        lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
        write_whole(self.path, "".join(",".join(line) + "\n" for line in lines if line))
        # not buffered: a row is on disk before the checkpoint that counts it
        self.file = open(self.path, "ab", buffering=0)

    def append(self, row):
        """Add a row, a dict; a new name becomes a column, empty in earlier rows."""
        if new := [name for name in row if name not in self.columns]:
            self._rewrite(self._rows(), self.columns + new)
        cells = [str(row.get(name, "")) for name in self.columns]
        with writing(self.path):
            self.file.write((",".join(cells) + "\n").encode())

    def close(self):
        if self.file is not None:
            self.file.close()


# Mixed precision


class LossScale:
    """The loss scale of fp16 training: small gradients would be 0 in fp16.

    The gradient that enters the network at its output is multiplied by the scale, and
    run.average_gradients divides again. Where a gradient overflows, the step is left
    out and the scale halved; after 2,000 good steps it is doubled.
    """

    def __init__(self, model, scale=2.0**16, good_steps=0):
        self.model, self.scale, self.good_steps = model, scale, good_steps
        self.hook = model.register_forward_hook(self._enter)

    def _enter(self, module, inputs, output):
        if isinstance(output, tuple):
            return tuple(self._enter(module, inputs, part) for part in output)
        output = output.float()
        if output.requires_grad:
            output.register_hook(lambda grad: grad * self.scale)
        return output

    def divide(self, gradients):
        """Undo the scale; drop the gradients of a step that overflowed, and adapt."""
        for gradient in gradients:
            gradient /= self.scale
        self.good_steps += 1
        if not all(bool(torch.isfinite(grad).all()) for grad in gradients):
            self.model.zero_grad()  # optimizer.step() leaves a weight without one alone
            self.scale, self.good_steps = self.scale / 2, 0
            if self.scale < 2.0**-24:
                raise Mistake("--amp fp16: the gradients are not finite at any loss "
                              "scale; --amp off shows where that begins")
        elif self.good_steps == 2000:
            self.scale, self.good_steps = self.scale * 2, 0


# The run


class Run:
    """One run folder outputs/<script>/<date-time>/, and the plumbing that fills it.

    Of several processes only the first, where run.main is true, writes and draws.
    """

    def __init__(self, script, cfg, opts, launch, folder=None, state=None, begin=None,
                 where=""):
        self.script, self.cfg, self.opts, self.launch = script, cfg, opts, launch
        self.device, self.main = launch.device, launch.rank == 0
        self.sampling = state is not None and opts.resume is None
        self.stopped, self.step, self.scale = False, 0, None
        self._begin = time.perf_counter() if begin is None else begin
        self._folder, self._state, self._where = folder, state, where
        self._row, self._loss_scale, self._saved, self._data = {}, (), None, {}
        self._unsaved = self._board = None

    # Files

    @property
    def folder(self):
        """The run folder, made when first asked for: a mistake leaves nothing."""
        self._finish_loop()
        if self._folder is None and self.main:
            self._folder = _new_folder(Path(self.opts.out) / self.script)
            self._write_config()
            say(f"run folder: {self._folder}")
        return self._folder

    def path(self, name):
        """Where a file of this run lies."""
        if not self.main:
            raise RuntimeError("only the first process has a run folder: write "
                               "`if run.main:` before it")
        return self.folder / name

    def _finish_loop(self):
        """Save the state of a loop that was left by a break."""
        end, self._unsaved = self._unsaved, None
        if end:
            end()

    def say(self, text):
        """Print a line, from the first process only."""
        say(text)

    def part(self, name, cfg):
        """A run with another Config, in a folder of its own inside this one."""
        folder = self.path(name)
        folder.mkdir()
        return Run(self.script, cfg, self.opts, self.launch, folder)

    def _settings(self):
        return {name: getattr(self.opts, name) for name in SETTINGS}

    def _write_config(self):
        """Write config.json, from which --config repeats the run."""
        write_whole(self._folder / "config.json", json.dumps({
            "script": self.script, "preset": self.opts.preset, "seed": self.opts.seed,
            "run": self._settings(), "config": dataclasses.asdict(self.cfg)}, indent=2))

    def read_log(self, name="log.csv"):
        """A log as {column: list of floats}; {} where there is none."""
        return Log(self.path(name)).read() if self.main else {}

    def read_metrics(self):
        """metrics.json as a dict."""
        file = self.path("metrics.json")
        try:
            found = json.loads(file.read_text("utf-8")) if file.exists() else {}
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Mistake(f"{file}: cannot be read as JSON; move it away to go on "
                          "without it")
        return found

    def add_metrics(self, **values):
        """Merge values into metrics.json; a number that is not finite becomes null."""
        if self.main:
            found = _finite_or_none(self.read_metrics() | values)
            write_whole(self.path("metrics.json"), json.dumps(found, indent=2))

    # A training step

    def load(self, load, *args):
        """The data on the run's device: run.load(load_images, cfg.dataset, size).

        load: a function that is called with args, or a Data itself.
        The checkpoint knows the shape and the classes of its data. Data that differs in
        these is refused; with --sample the drawing goes on without it, and so it does
        where the data is not there.
        """
        stored = self._state.get("data") if self._state else None
        try:
            data = load(*args) if callable(load) else load
            if stored:
                data.check(stored, same_pictures=not self.sampling)
        except Mistake as problem:
            if not (self.sampling and stored) or self.opts.evaluate:
                raise
            say(f"{problem}; drawn without it: no comparison with data")
            data = Data.absent(self.cfg.dataset, stored)
        if self.opts.evaluate and data.train_labels is None:
            raise Mistake(f"--evaluate {self.opts.evaluate}: --dataset {data.name} has "
                          "no labels to score by")
        self._data = stored if self.sampling else data.facts()
        return data.to(self.device)

    def place(self, module):
        """The module on the run's device, its images stored channels last (faster)."""
        return module.to(self.device, memory_format=torch.channels_last)

    def batch(self, x, labels=None, size=None, flip=None):
        """This process's part of a random batch of x: (examples, their labels or None).

        size: the run's cfg.batch_size unless given. flip: mirror each image with
        probability 1/2; as the run's cfg.flip says unless given.
        """
        size = (size or self.cfg.batch_size) // self.launch.world
        i = torch.randint(len(x), (size,), device=self.device)
        batch = x[i]
        if getattr(self.cfg, "flip", False) if flip is None else flip:
            mirrored = torch.rand(size, 1, 1, 1, device=self.device) < 0.5
            batch = torch.where(mirrored, batch.flip(3), batch)
        return batch, None if labels is None else labels[i]

    def autocast(self):
        """Mixed precision inside `with run.autocast():`, as --amp asks."""
        if self.opts.amp == "off":
            return contextlib.nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.opts.amp]
        return torch.autocast(self.device.type, dtype)

    def average_gradients(self, model):
        """Average the gradients over all processes; under fp16, undo the loss scale."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if gradients:
            self.launch.average(gradients)
        if self.scale is not None and self.scale.model is model:
            self.scale.divide(gradients)

    def log(self, **values):
        """Add numbers to this step's row of the log, each the mean over all processes.

        One that is not finite ends the program, naming the step.
        """
        found = [float(value.detach() if isinstance(value, torch.Tensor) else value)
                 for value in values.values()]
        if self.launch.world > 1:
            seen = torch.tensor(found, device=self.device)
            self.launch.average([seen])
            found = seen.tolist()
        self._row |= dict(zip(values, found, strict=True))
        for name, value in self._row.items():
            if not math.isfinite(value):
                self._diverged(f"{name} is {value}")

    def _diverged(self, problem):
        last = "" if self._saved is None else (
            f"; the last good checkpoint is of step {self._saved} in {self._folder}")
        raise Mistake(f"{problem} at step {self.step + 1}, {self._rate} may be too "
                      f"high{last}")

    # The training loop

    def steps(self, steps, name="model", save=True, **parts):
        """Yields 0, 1, ..., steps - 1; the body of the loop is one training step.

        parts: what a checkpoint keeps, each with a state_dict; the network is the one
        called `name`. There is a progress bar, a row of the log for each step that
        called run.log, a checkpoint every cfg.preview_every steps and at the end, also
        after a break. A resumed run begins at its checkpoint's step. Ctrl-C ends the
        loop after the step under way, a second one leaves at once. Gradients are not
        saved: where they are accumulated over several steps, preview_every should be a
        multiple of these. save=False: no log, no checkpoint, no resume.
        """
        if self.stopped:
            say(f"stopped before: the {name} is not trained; --resume goes on")
            return
        model = parts[name]
        blocks = [m for m in model.modules() if getattr(m, "recompute", False)]
        if self.opts.grad_checkpointing and not blocks:
            raise Mistake(f"--grad_checkpointing: {type(model).__name__} has no blocks "
                          "to compute again")
        first = self._restore(name, parts, save)
        if first is None:
            return  # the checkpoint is of a later loop: this one is finished
        self._prepare(model, blocks)
        if save and self.main:
            _lock(self.folder)
        log = Log(self.path(_log_name(name)), first) if save and self.main else None
        groups = [group for part in parts.values()
                  for group in getattr(part, "param_groups", ())]
        field = f"{name}_lr" if hasattr(self.cfg, f"{name}_lr") else "lr"
        self._rate = f"--{field} {getattr(self.cfg, field, math.nan):g}"
        self._saved, done, begin = None, first, time.perf_counter()

        def end(seconds, states=None):
            if save:
                self._save(done, name, parts, states)
                self._measure(name, model, done, first, seconds)

        def finish_step():
            shown = {key: f"{value:.4g}" for key, value in self._row.items()}
            bar.set_postfix(shown, refresh=False)
            if self._row and log:
                row = dict(self._row)
                if groups:
                    row.setdefault("lr", groups[0]["lr"])
                log.append({"step": done, **row} | {"step": done})
                self._to_tensorboard(name, done, row)
            self._row = {}

        bar = tqdm(range(first, steps), initial=first, total=steps, unit="step",
                   desc=f"train {name}", disable=not self.main, mininterval=0.5)
        before = self._listen()
        try:
            if save:
                self._save(first, name, parts)
            for self.step in bar:
                self._row = {}
                yield self.step
                done = self.step + 1
                finish_step()
                if save and done % self.cfg.preview_every == 0 and done < steps:
                    self._save(done, name, parts)
                if self.stopped:
                    break
            end(time.perf_counter() - begin)
        except GeneratorExit:  # the body left the loop: by a break, or by an error
            if self._row:
                done = self.step + 1
                finish_step()
            # After an error nothing more is asked of the run, and nothing saved.
            self._unsaved = partial(end, time.perf_counter() - begin,
                                    [device.random_state(self.device)])
            raise
        finally:
            bar.close()
            if before is not None:
                signal.signal(signal.SIGINT, before)
            for block in blocks:
                vars(block).pop("forward", None)
            if self.scale is not None:
                self.scale.hook.remove()
                self.scale = None
            if log:
                log.close()
                if handle := _LOCKS.pop(self._folder.resolve(), None):
                    os.close(handle)

    def _restore(self, name, parts, save):
        """Load the checkpoint of --resume: the number of steps done, 0 without one.

        None: the checkpoint is of a later loop. Every process gets the weights of the
        first one, and draws of its own.
        """
        state = self._state if save and not self.sampling else None
        first, states = 0, []
        if state is not None:
            later = state["loop"] != name
            if name not in state:
                raise Mistake(f"{self._where}: holds no {name}, only the loop "
                              f"{state['loop']!r:.80}")
            with reading(self._where):
                for key, part in parts.items():
                    if not later or key in state and not key.startswith("optimizer"):
                        part.load_state_dict(state[key])
            if later:
                return None
            first, states, self._state = state["step"], state["random"], None
            if self.main:
                self._write_config()  # with the number of steps that may be new
            self._loss_scale = state.get("loss_scale", ())
        for part in parts.values():
            if isinstance(part, nn.Module):
                self.launch.broadcast(part)
        rank = self.launch.rank
        with reading(self._where):
            if rank < len(states):
                device.set_random_state(states[rank], self.device)
            elif rank:
                torch.manual_seed(self.opts.seed + 1_000_003 * rank + first)
        return first

    def _prepare(self, model, blocks):
        """Make the network compute as the flags ask."""
        if self.opts.grad_checkpointing:
            for block in blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if self.opts.amp == "fp16":
            self.scale = LossScale(model, *self._loss_scale)
            self._loss_scale = ()  # a checkpoint's is for the loop it was saved in
        self._compile(model)

    def _compile(self, model):
        """Compile the network with --compile, where a compiler is there."""
        if self.opts.compile:
            try:  # a small function first: an error here would end the first step
                torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=self.device))
            except Exception as problem:  # torch's compiler raises errors of many kinds
                reason = str(problem).strip().splitlines() or [type(problem).__name__]
                raise Mistake(f"--compile: torch.compile does not work here "
                              f"({reason[0]:.200}); it needs a C++ compiler, on CUDA "
                              "Triton, too; leave the flag out") from None
            model.compile()

    def _save(self, step, name, parts, states=None):
        """Write checkpoint.pt as a whole. states: random states, all processes' now."""
        states = states or self.launch.gather(device.random_state(self.device))
        for part in parts.values():
            if isinstance(part, nn.Module) and not is_finite(part):
                self._diverged("a weight is not finite")
        self._saved = step
        if self.main:
            scale = self.scale and [self.scale.scale, self.scale.good_steps]
            packed = io.BytesIO()
            torch.save({
                "format": FORMAT, "script": self.script, "preset": self.opts.preset,
                "seed": self.opts.seed, "run": self._settings(), "loop": name,
                "step": step, "config": dataclasses.asdict(self.cfg), "random": states,
                "data": self._data, "loss_scale": scale or [],
                **{key: part.state_dict() for key, part in parts.items()}}, packed)
            write_whole(self._folder / "checkpoint.pt", packed.getbuffer())

    def _measure(self, name, model, done, first, seconds):
        """Add the numbers of a finished loop to metrics.json."""
        if not self.main or done == first:
            return
        prefix = "" if name == "model" else f"{name}_"
        found = {"steps": done, "steps_per_second": (done - first) / seconds,
                 "parameters": sum(p.numel() for p in model.parameters())}
        if first:
            seconds += self.read_metrics().get(f"{prefix}train_seconds") or 0.0
        found["train_seconds"] = seconds
        if losses := self.read_log(_log_name(name)).get("loss", [])[-500:]:
            found["loss_of_last_500"] = sum(losses) / len(losses)
        self.add_metrics(**{prefix + key: value for key, value in found.items()})

    def _to_tensorboard(self, name, step, values):
        if self.opts.tensorboard:
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter
                self._board = SummaryWriter(self.path("tensorboard"))
            for key, value in values.items():
                self._board.add_scalar(f"{name}/{key}", value, step)
            self._board.flush()

    def _listen(self):
        """Handle Ctrl-C in place of Python; returns the handler that was set before."""
        def interrupt(*_):
            if self.stopped:
                if in_notebook():
                    raise KeyboardInterrupt
                os._exit(STOPPED)
            self.stopped = True
            say("stopping: saving and sampling what there is (Ctrl-C again leaves)")

        main_thread = threading.current_thread() is threading.main_thread()
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as nohup asks
        if self.launch.world > 1 or not main_thread or ignored:
            return None  # torchrun stops its processes itself
        return signal.signal(signal.SIGINT, interrupt)

    # Sampling

    def trained(self, module, name="ema"):
        """The module with its weights from the checkpoint of --sample, in eval mode."""
        if name not in self._state:
            raise Mistake(f"{self._where}: holds no {name} (was it stopped too early?)")
        with reading(self._where):
            module.load_state_dict(self._state[name])
        if not is_finite(module):
            raise Mistake(f"{self._where}: its weights are not finite numbers")
        self._compile(module)
        return self.place(module).eval().requires_grad_(False)

    def draw(self, n, states, network, steps, batch_size=100):
        """n samples, in batches: (samples, {"n", "seconds", "network_calls"}).

        states(batch), batch a range in 0..n-1, is a sampler: a generator that yields
        (t, x_t) before each of about `steps` steps, then the samples. network: the one
        that it calls.
        """
        batches = [range(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
        bar = tqdm(total=(steps + 1) * len(batches), desc=f"sample {n}", unit="step",
                   leave=False, disable=not self.main)
        self._finish_loop()
        parts, begin = [], time.perf_counter()
        with bar, device.counted(network) as calls, self.autocast():
            for batch in batches:
                try:
                    for _, x in states(batch):
                        bar.update()
                except FloatingPointError as problem:  # of an ODE solver
                    raise Mistake(f"{problem} (--lr {self.cfg.lr:g} too high?)") \
                        from None
                if not x.isfinite().all():
                    raise Mistake("the samples are not finite numbers: the network has "
                                  f"diverged (--lr {self.cfg.lr:g} too high?)")
                parts.append(x)
        device.synchronize(self.device)
        return torch.cat(parts), {"n": n, "seconds": time.perf_counter() - begin,
                                  "network_calls": len(calls) / len(batches)}

    def quality(self, states, network, steps, data, labels=None, keep=False):
        """The scores of as many samples as --evaluate says, always from one seed.

        keep: write them to evaluated.npz, the first 100 to evaluated.png.
        """
        with device.seeded(self.opts.seed, self.device):
            samples, timing = self.draw(self.opts.evaluate, states, network, steps)
        if keep:
            first = samples[:100]
            plotting.grid(self.path("evaluated.png"), first, 10,
                          f"The first {len(first)} of {len(samples)} samples")
            pixels = ((samples.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
            packed = io.BytesIO()
            np.savez_compressed(packed, samples=pixels)
            write_whole(self.path("evaluated.npz"), packed.getvalue())
        return quality.scores(samples, data, labels) | timing

    def evaluate(self, states, network, steps, data, labels=None):
        """With --evaluate N: N samples scored and kept."""
        if self.opts.evaluate:
            self.add_metrics(evaluation=self.quality(
                states, network, steps, data, labels, keep=True))

    def finish(self, more=None):
        """Print the last line; figures that were not drawn make the exit status 1.

        more: the script that draws more from the same checkpoint.
        """
        self.add_metrics(config=dataclasses.asdict(self.cfg),
                         total_seconds=time.perf_counter() - self._begin)
        found = self.read_metrics()
        if "evaluation" in found and not self.opts.evaluate:  # of the weights before
            self.add_metrics(evaluation=None)
            del found["evaluation"]
        scores = found.get("samples", {}) | found.get("evaluation", {})
        facts = [("trained", found.get("train_seconds"), "{:.0f} s"),
                 ("sampled", found.get("sampling", {}).get("seconds"), "{:.0f} s"),
                 ("legible", scores.get("legible"), "{:.0%}" + _scatter(scores)),
                 ("as asked", scores.get("accuracy"), "{:.1%}"),
                 ("Fréchet distance in the judge's features",
                  scores.get("frechet_distance"), "{:.1f}"),
                 ("all in", found["total_seconds"], "{:.0f} s")]
        line = ", ".join(f"{name} {form.format(x)}" for name, x, form in facts
                         if x is not None)
        line += f"; figures and metrics.json in {self.folder}"
        if more:
            line += f"; more: python {more} --sample {self.opts.sample or self.folder}"
        if plotting.left_out:
            line += f"; without data there is no {', '.join(plotting.left_out)}"
        if plotting.not_drawn:
            line += f"; NOT DRAWN, see above: {', '.join(plotting.not_drawn)}"
        say(line)
        if plotting.not_drawn and not in_notebook():
            raise SystemExit(1)


def _new_folder(parent):
    """A new folder named after the time; never one that exists."""
    stamp, count = time.strftime("%Y-%m-%d_%H-%M-%S"), 0
    with writing(f"--out {parent.parent}"):
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = parent / (stamp + (f"_{count}" if count else ""))
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                count += 1


def _finite_or_none(value):
    """The same plain values with None for nan and inf, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite_or_none(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_none(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scatter(scores):
    """How far the fraction that is legible scatters from one draw to the next."""
    n, k = scores.get("n", 0) + 4, scores.get("legible", 0) * scores.get("n", 0) + 2
    error = math.sqrt(k / n * (1 - k / n) / n)  # of Agresti and Coull: not 0 at 0 %
    return f" ± {100 * error:.0f} points (n = {scores.get('n', 0)})"


def _log_name(loop):
    return "log.csv" if loop == "model" else f"{loop}_log.csv"
