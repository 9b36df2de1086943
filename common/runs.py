"""A run: folder, log and checkpoints, and what surrounds a training step or a draw."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import signal
import threading
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from . import metrics, plotting
from .checkpoints import (
    FORMAT,
    anew,
    check_kinds,
    hold,
    is_finite,
    load_checkpoint,
    new_folder,
    release,
    restore,
    to_resume,
    to_sample,
)
from .cli import (
    STOPPED,
    check_config,
    check_memory,
    config_from,
    fail,
    merge_config,
    parse_args,
    say,
)
from .device import (
    Meter,
    autocast,
    launch,
    peak_memory_mb,
    random_state,
    seed_everything,
    seeded,
    set_random_state,
    synchronize,
)


def open_run(script, Config, presets, argv=None, reads=()):
    """Open the run that a command line asks for: (cfg, run).

    With --sample or --resume cfg is the checkpoint's Config. With --sample its
    `# sampling` block is that of the preset that the checkpoint was trained by, and of
    the flags. reads: other scripts whose checkpoints --sample takes. A mistake ends the
    program with one line before anything is written.
    """
    begin = time.perf_counter()
    cfg, opts = parse_args(Config, presets, argv)
    place = launch(opts.device)
    autocast(place.device, opts.amp)  # refuses what this device cannot do
    state = folder = where = None
    if opts.sample is not None:
        source = to_sample(opts, (script, *reads))
        where = f"--sample {source}"
        state = load_checkpoint(source, (script, *reads), where)
    elif opts.resume is not None:
        source = folder = to_resume(opts, script)
        where = f"--resume {source}"
        state = load_checkpoint(folder, (script,), where)
        check_kinds(state, {"loop": str, "optimizer": dict, "random": list}, where)
        if opts.seed not in (None, state["seed"]):
            fail(f"--seed {opts.seed}: {source} goes on with its own, {state['seed']}")
        opts.seed = state["seed"]
    if state is not None:
        opts.preset = opts.preset or state["preset"]
        if opts.preset in presets and not opts.config:
            cfg = dataclasses.replace(presets[opts.preset], **opts.given)
        stored = state["config"]
        if state["script"] != script:  # what is not shared keeps this script's values
            shared = {k: v for k, v in stored.items() if k in vars(cfg)}
            stored = dataclasses.asdict(cfg) | shared
        trained = config_from(stored, Config, where)
        if opts.resume is not None:  # goes on as it was, but for flags of the draw
            trained = _train_on(trained, opts.given, state, source)
            cfg = dataclasses.replace(trained, **opts.given)
        cfg = merge_config(trained, cfg, opts.given, str(source))
        check_config(cfg)
    if cfg.batch_size % place.world:
        fail(f"--batch_size {cfg.batch_size}: must be a multiple of {place.world}, the "
             "number of processes")
    opts.seed = opts.seed or 0
    seed_everything(opts.seed)
    opts.preset = opts.preset or next(iter(presets))
    run = Run(script, cfg, opts, place, folder, state, begin, where)
    if state is not None:
        run.say(f"loaded {source} (step {state['step']})")
    if folder and place.main:
        hold(folder)
        run.read_metrics()  # one that cannot be read is told before the training
    return cfg, run


def new_run(script, cfg, **settings):
    """The Run of a Config, without a command line: new_run("ddpm", Config(), seed=1).

    settings: flags of the run by their names: device, seed, out, evaluate, amp, ...
    """
    argv = [f"--{name}" if value is True else f"--{name}={value}"
            for name, value in settings.items()]
    return open_run(script, type(cfg), {"own": cfg}, argv)[1]


def _train_on(trained, given, state, source):
    """The Config of a run that is resumed, with the number of steps given by hand."""
    steps, done = given.get("steps", trained.steps), state["step"]
    if state["loop"] == "model" and steps < done:
        fail(f"--steps {steps}: must be >= {done}, which {source} has done")
    if steps != trained.steps:
        say(f"trains to step {steps} in place of {trained.steps}; the decay of the "
            "learning rate goes on as if that had been the end from the beginning")
    return dataclasses.replace(trained, steps=steps)


class Run:
    """One run folder outputs/<script>/<date-time>/, and the plumbing of what fills it.

    Only the main process writes; in the others every method that writes does nothing
    and folder is None.
    """

    def __init__(self, script, cfg, opts, launch, folder=None, state=None, begin=None,
                 where=""):
        self.script, self.cfg, self.opts, self.launch = script, cfg, opts, launch
        self.device, self.main = launch.device, launch.main
        self.sampling = state is not None and opts.resume is None
        self.begin = time.perf_counter() if begin is None else begin
        self.stopped, self.saved, self.row = False, 0, {}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=opts.amp == "fp16")
        self._folder, self._state, self._random = folder, state, ()
        self._where = where  # the state is from
        self._logs, self._board = {}, None
        if opts.tensorboard and self.main:
            try:
                from torch.utils.tensorboard import SummaryWriter  # noqa: F401
            except ImportError:
                fail("--tensorboard: is not installed (pip install tensorboard)")

    # Files

    @property
    def folder(self):
        """The run folder, made when first asked for: a mistake leaves nothing."""
        if self._folder is None and self.main:
            self._folder = new_folder(Path(self.opts.out) / self.script)
            self.write_config()
            self.say(f"run folder: {self._folder}")
        return self._folder

    def write_config(self):
        """Write config.json, from which --config repeats the run."""
        config = {"script": self.script, "preset": self.opts.preset,
                  "seed": self.opts.seed, "config": dataclasses.asdict(self.cfg)}
        self._write("config.json", json.dumps(config, indent=2))

    def path(self, name):
        """Where a file of this run lies."""
        return self.folder / name

    def part(self, name, cfg):
        """A run with another Config, in a folder of its own inside this one."""
        folder = self.path(name)
        folder.mkdir()
        return Run(self.script, cfg, self.opts, self.launch, folder)

    def _write(self, name, content):
        """Write a file as a whole: on a full disk the old one stays as it was."""
        path, scratch = self.path(name), self.path(name + ".tmp")
        content = content.encode() if isinstance(content, str) else content
        try:
            scratch.write_bytes(content)
            os.replace(scratch, path)
        except OSError as problem:
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise OSError(problem.errno, problem.strerror, str(path)) from None

    def log(self, step, name="log.csv", **values):
        """Append one row to a log (and to TensorBoard when asked for)."""
        if not self.main:
            return
        if name not in self._logs:
            # not buffered: a row is on disk before the checkpoint that counts it
            self._logs[name] = file = open(self.path(name), "ab", buffering=0)
            if not file.tell():
                file.write((",".join(["step", *values]) + "\n").encode())
        row = ",".join(map(str, [step, *values.values()])) + "\n"
        self._logs[name].write(row.encode())
        if self.opts.tensorboard:
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter
                self._board = SummaryWriter(self.path("tensorboard"))
            for key, value in values.items():
                self._board.add_scalar(f"{Path(name).stem}/{key}", value, step)

    def _close_logs(self):
        while self._logs:
            self._logs.popitem()[1].close()

    def read_log(self, name="log.csv"):
        """A log as {column: list of floats}; empty where there is none.

        A row torn by a crash is left out. What is no log ends the program.
        """
        file = self.path(name) if self.main else None
        if not file or not file.exists():
            return {}
        try:
            head, *rows = file.read_text("utf-8").splitlines(keepends=True) or [""]
            whole = [row for row in rows if row.endswith("\n")]
            pairs = [dict(zip(head.split(","), map(float, row.split(",")), strict=True))
                     for row in whole]
            return {name.strip(): [row[name] for row in pairs]
                    for name in pairs and head.split(",")}
        except ValueError:
            fail(f"{file}: is not the log of a run")

    def trim_log(self, step, name="log.csv"):
        """Drop the rows after step: a resumed run writes them again."""
        self._close_logs()
        if self.read_log(name):
            head, *rows = self.path(name).read_text("utf-8").splitlines(keepends=True)
            kept = [row for row in rows
                    if row.endswith("\n") and float(row.split(",")[0]) <= step]
            self._write(name, "".join([head, *kept]))
        elif self.main:  # no whole row: not even the head can be trusted
            self.path(name).unlink(missing_ok=True)

    def read_metrics(self):
        """metrics.json as a dict."""
        file = self.path("metrics.json")
        try:
            found = json.loads(file.read_text("utf-8")) if file.exists() else {}
        except ValueError:
            found = None
        if not isinstance(found, dict):
            fail(f"{file}: cannot be read as JSON, move it away to go on without it")
        return found

    def add_metrics(self, **values):
        """Merge values into metrics.json."""
        if self.main:
            merged = self.read_metrics() | values
            self._write("metrics.json", json.dumps(merged, indent=2))

    def say(self, text):
        """Print a line, from the main process only."""
        say(text)

    # Training

    def load(self, data):
        """The data on the run's device; --evaluate needs its labels."""
        if self.opts.evaluate and data.train_labels is None:
            fail(f"--evaluate {self.opts.evaluate}: --dataset {data.name} has no "
                 "labels to score by")
        numbers, share = data.train[0].numel(), self.cfg.batch_size // self.launch.world
        check_memory("batch_size", self.cfg.batch_size, 4 * share * numbers)
        return data.to(self.device)

    def place(self, module):
        """The module on the run's device, its images stored channels last (faster)."""
        return module.to(self.device, memory_format=torch.channels_last)

    def training(self, steps, model, optimizer, preview=None, name="model", keep=True,
                 **others):
        """Yields 0, 1, ..., steps - 1; the loop's body is one step of the algorithm.

        Before a step the learning rates of the optimisers are set: each one's own times
        what cfg.warmup and cfg.decay say. After it a row of the log is written, from
        what `backward` saw. Every cfg.preview_every steps and at the end there is a
        checkpoint of model (as `name`), optimizer and others, all with a state_dict; in
        between preview(step) is called. A resumed run starts where its checkpoint
        stopped. Ctrl-C ends the loop after the step under way, twice it leaves with
        status 130; torchrun stops its processes itself. keep=False: no log, no
        checkpoint, no resume.
        """
        modules = {name: model, **others}
        if keep and self.main:
            hold(self.folder)  # a folder that cannot be made is told before
        first = self._resume(name, modules, optimizer) if keep else 0
        if first is None:
            return
        self._spread(modules, first)
        optimizers = [optimizer, *(each for each in others.values()
                                   if isinstance(each, torch.optim.Optimizer))]
        for each in optimizers:
            for group in each.param_groups:
                group["fused"] = self.device.type != "mps"  # one kernel for all weights
        bar = tqdm(range(first, steps), initial=first, total=steps, unit="step",
                   desc=f"train {name}", disable=not self.main, mininterval=0.5)
        self._batch_drawn, self._core, begin = None, 0.0, time.perf_counter()
        hook = optimizer.register_step_post_hook(lambda *_: self._end_core())
        before = self._listen()
        self._dress(model)
        try:
            done = self.saved = first
            if keep and first == 0:
                self._save(0, name, modules, optimizer)
            for step in bar:
                self.row, self.step, share = {}, step, self._rate(step, steps)
                for each in optimizers:
                    for group in each.param_groups:
                        group["lr"] = share * each.defaults["lr"]
                yield step
                done = step + 1
                row = self.row | {"lr": share * optimizer.defaults["lr"]}
                bar.set_postfix({k: f"{v:.4g}" for k, v in row.items()}, refresh=False)
                if keep:
                    self.log(done, _log_name(name), **row)
                    if done % self.cfg.preview_every == 0 and done < steps:
                        self._save(done, name, modules, optimizer)
                        if preview and self.main:
                            preview(done)
                if self.stopped:
                    break
            if keep:
                self._save(done, name, modules, optimizer)
                self._measure(name, model, done, first, time.perf_counter() - begin)
        finally:
            bar.close()
            hook.remove()
            for module in model.modules():
                vars(module).pop("forward", None)  # what _dress put on
            self._close_logs()
            if keep and self.main:
                release(self.folder)
            if before and not self.stopped:
                signal.signal(signal.SIGINT, before)

    def batch(self, data, size, flip=False):
        """This process's share of a random batch: (images or points, labels or None).

        flip: each image is mirrored with probability 1/2.
        """
        size //= self.launch.world
        i = torch.randint(len(data.train), (size,), device=self.device)
        x = data.train[i]
        if flip:
            mirrored = torch.rand(size, 1, 1, 1, device=self.device) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        self._batch_drawn = time.perf_counter()
        return x, None if data.train_labels is None else data.train_labels[i]

    def backward(self, loss, optimizer, clip, **notes):
        """The gradient of loss, averaged over all processes, clipped to the norm clip.

        notes: scalars for the log. A loss or gradient that is not finite ends the
        program, naming the step; under fp16 such a gradient is dropped and the loss
        scale lowered.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        seen = torch.stack([x.detach().float() for x in (loss, *notes.values())])
        self.launch.average([*gradients, seen])
        norm = nn.utils.clip_grad_norm_(parameters, clip).item()
        value, *noted = seen.tolist()
        if not math.isfinite(value):
            self._diverged("loss is", value, optimizer)
        if not math.isfinite(norm):
            if not self.scaler.is_enabled():
                self._diverged("gradient's norm is", norm, optimizer)
            optimizer.zero_grad()  # optimizer.step() leaves what has no gradient alone
        self.scaler.update()
        if not self.row:  # of several in a step the first is logged
            self.row = {"loss": value, "grad_norm": norm,
                        **dict(zip(notes, noted, strict=True))}

    def _diverged(self, what, value, optimizer):
        fail(f"the {what} {value} at step {self.step + 1}, a learning rate of "
             f"{optimizer.defaults['lr']:g} may be too high; the last good checkpoint "
             f"is that of step {self.saved} in {self.folder}")

    def _rate(self, step, steps):
        """The share of the learning rate: linear warm-up, then constant or a cosine."""
        share = min(1.0, (step + 1) / max(self.cfg.warmup, 1))
        if self.cfg.decay == "cosine":
            share *= 0.5 * (1 + math.cos(math.pi * step / steps))
        return share

    def _spread(self, modules, first):
        """Give every process the main one's weights, and draws of its own.

        They go on where the checkpoint left them.
        """
        for module in modules.values():
            if isinstance(module, nn.Module):
                self.launch.broadcast(module)
        rank, states = self.launch.rank, self._random
        if rank < len(states):
            try:
                set_random_state(states[rank], self.device)
            except Exception:  # what is damaged makes it raise any of several kinds
                fail(f"{self._where}: its random state cannot be read")
        elif rank:
            torch.manual_seed(self.opts.seed + 1_000_003 * rank + first)
        self._random = ()

    def _dress(self, model):
        """Recomputed activations, mixed precision, compilation, as the flags ask."""
        if self.opts.grad_checkpointing:
            for block in model.modules():
                if type(block).__name__.endswith("Block"):
                    block.forward = functools.partial(
                        checkpoint, block.forward, use_reentrant=False)
        if self.opts.amp != "off":
            model.forward = _in_precision(model.forward, self.device, self.opts.amp)
        if self.opts.compile:
            model.compile()

    def _end_core(self):
        """A step of the optimiser is over: add the time since its batch was drawn."""
        if self._batch_drawn is not None:
            synchronize(self.device)
            self._core += time.perf_counter() - self._batch_drawn
            self._batch_drawn = None

    def _measure(self, name, model, done, first, seconds):
        """The numbers of a finished loop, for metrics.json."""
        if not self.main or done == first:
            return
        prefix = "" if name == "model" else f"{name}_"
        speed = {"steps_per_second": (done - first) / seconds,
                 "share_outside_core": 1 - self._core / seconds}
        if first:
            seconds += self.read_metrics().get(f"{prefix}train_seconds", 0.0)
        losses = self.read_log(_log_name(name))["loss"][-500:]
        found = {"steps": done, "train_seconds": seconds,
                 "parameters": sum(p.numel() for p in model.parameters()),
                 "loss_of_last_500": sum(losses) / len(losses)}
        found |= speed
        self.add_metrics(**{prefix + key: value for key, value in found.items()})

    def _listen(self):
        """Answer Ctrl-C in place of Python; returns what answered before."""
        here = threading.current_thread() is threading.main_thread()
        if not self.main or self.launch.world > 1 or not here:
            return None
        before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._interrupt)
        return before

    def _interrupt(self, *_):
        if self.stopped:
            os._exit(STOPPED)
        self.stopped = True
        say("stopping: saving and sampling what there is (Ctrl-C again leaves)")

    # Checkpoints

    def _save(self, step, loop, modules, optimizer):
        """Write checkpoint.pt under a temporary name, then rename it."""
        states = self.launch.gather(random_state(self.device))
        if not all(map(is_finite, modules.values())):
            self._diverged("weights are", "not finite", optimizer)
        self.saved = step
        if not self.main:
            return
        state = {"format": FORMAT, "script": self.script, "preset": self.opts.preset,
                 "seed": self.opts.seed, "loop": loop, "step": step,
                 "config": dataclasses.asdict(self.cfg),
                 "optimizer": optimizer.state_dict(), "random": states,
                 **{name: module.state_dict() for name, module in modules.items()}}
        packed = io.BytesIO()
        torch.save(anew(state), packed)
        self._write("checkpoint.pt", packed.getbuffer())

    def _resume(self, loop, modules, optimizer):
        """Put the checkpoint of --resume back: the number of steps done, 0 without one.

        None: the checkpoint is of a later loop; this one was finished before it.
        """
        state = None if self.sampling else self._state
        if state is None:
            return 0
        for name, module in modules.items():
            if name in state:
                restore(module, state[name], self._where)
            elif state["loop"] == loop:
                fail(f"{self._where}: its checkpoint holds no {name}")
        if state["loop"] != loop:
            return None
        self._state = None
        restore(optimizer, state["optimizer"], self._where)
        self._random = state["random"]
        if self.main:
            self.write_config()  # with the steps that may have been given anew
        self.trim_log(state["step"], _log_name(loop))
        return state["step"]

    def trained(self, module, name="ema"):
        """The module with its weights from the checkpoint of --sample, in eval mode."""
        if name not in self._state:
            fail(f"{self._where}: holds no {name} (stopped too early?)")
        restore(module, self._state[name], self._where)
        if not is_finite(module):
            fail(f"{self._where}: its weights are not finite numbers")
        return self.place(module).eval().requires_grad_(False)

    # Sampling

    def draw(self, n, states, network, steps, batch_size=100):
        """n samples, in batches: (samples, {"n", "seconds", "network_calls", ...}).

        states(batch), batch a range of 0..n-1, is a sampler: a generator that yields
        (t, x_t) about `steps` times, the samples last. network: the one that it calls.
        """
        batches = [range(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
        bar = tqdm(total=steps * len(batches), desc=f"sample {n}", unit="step",
                   leave=False, disable=not self.main)
        parts = []
        with bar, Meter(network, self.device) as meter:
            for batch in batches:
                for _, x in states(batch):
                    bar.update()
                if not x.isfinite().all():
                    raise FloatingPointError("the samples are not finite numbers: the "
                                             "network has diverged (--lr too high?)")
                parts.append(x)
        return torch.cat(parts), {
            "n": n, "seconds": meter.seconds,
            "network_calls": meter.calls / len(batches),
            "share_outside_network": 1 - meter.inside / meter.seconds}

    def quality(self, states, network, steps, data, labels=None, picture=None):
        """The quality of as many samples as --evaluate says, always from one seed."""
        with seeded(self.opts.seed, self.device):
            samples, timing = self.draw(self.opts.evaluate, states, network, steps)
        if picture:
            first = samples[:100]
            plotting.grid(self.path(picture), first, 10,
                          f"The first {len(first)} of {len(samples)} samples")
        return metrics.quality(samples, data, labels) | timing

    def evaluate(self, states, network, steps, data, labels=None):
        """With --evaluate N: N samples scored, the first of them as a picture."""
        if self.opts.evaluate:
            self.add_metrics(evaluation=self.quality(
                states, network, steps, data, labels, "evaluated.png"))

    def finish(self):
        """The last lines of metrics.json; what a person looks for first is printed."""
        self.add_metrics(config=dataclasses.asdict(self.cfg),
                         total_seconds=time.perf_counter() - self.begin,
                         peak_memory_mb=peak_memory_mb(self.device))
        found = self.read_metrics()
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
        self.say(f"{line}; figures and metrics.json in {self.folder}")


def _scatter(scores):
    """How far the share that is legible scatters from one draw to the next."""
    n, k = scores.get("n", 0) + 4, scores.get("legible", 0) * scores.get("n", 0) + 2
    error = math.sqrt(k / n * (1 - k / n) / n)  # of Agresti and Coull: not 0 at 0 %
    return f" ± {100 * error:.0f} points (n = {scores.get('n', 0)})"


def _log_name(loop):
    return "log.csv" if loop == "model" else f"{loop}_log.csv"


def _in_precision(forward, device, amp):
    """forward under autocast, with answers in float32 for the loss."""
    @functools.wraps(forward)
    def cast(*args, **kwargs):
        with autocast(device, amp):
            out = forward(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return out.float()
        return tuple(part.float() for part in out)

    return cast
