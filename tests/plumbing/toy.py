"""A small script for the tests of the plumbing: a Config, a network, a training loop."""

import copy
import dataclasses
from typing import Literal

import torch
from torch import nn

from common.cli import Count, Positive, Whole
from common.data import Data
from common.run import open_run


@dataclasses.dataclass(frozen=True)
class Config:
    # model
    T: Count = 10                      # diffusion steps (paper: 1000)
    lr: Positive = 0.01                # peak learning rate, in 100% plain words
    widths: tuple[Count, ...] = (1, 2)  # width of each level
    flip: bool = False                 # mirror pictures
    kind: Literal["a", "b"] = "a"      # one of two kinds
    # sampling
    n_samples: Count = 4               # samples drawn at the end
    # training
    steps: Count = 6                   # optimiser steps
    batch_size: Count = 8              # pictures per step
    warmup: Whole = 0                  # steps of warm-up
    preview_every: Count = 100         # steps between checkpoints


SAMPLING = ("n_samples",)
PRESETS = {"laptop": Config(), "smoke": Config(T=2, widths=(3,), n_samples=2)}


def open_toy(out, *argv, device="cpu"):
    """(cfg, run), as the main of a script makes them; device None leaves the flag out."""
    given = ["--device", device] if device else []
    argv = [*given, "--out", str(out), *map(str, argv)]
    return open_run("toy", Config, PRESETS, SAMPLING, argv)


def images(n=40, labels=True):
    """Data of pictures that say who they are: picture i is i / n, brighter to its right and bottom."""
    x = torch.arange(n).float().view(-1, 1, 1, 1) / n + torch.tensor([0.0, 0.001]).view(1, 1, 1, 2)
    x = x + torch.tensor([0.0, 0.01]).view(1, 1, 2, 1)  # (n, 1, 2, 2)
    y, held_out = torch.arange(n), n // 4
    if not labels:
        return Data("toy", x[held_out:], x[:held_out])
    return Data("toy", x[held_out:], x[:held_out], y[held_out:], y[:held_out], tuple(map(str, range(n))))


class Block(nn.Sequential):
    """Layers that --grad_checkpointing computes twice."""

    recompute = True


def network():
    return nn.Sequential(nn.Flatten(), Block(nn.Linear(4, 3), nn.Tanh()), nn.Linear(3, 1))


def fit(run, steps=6, watch=None, name="model", save=True, model=None):
    """Train as a script's train does; watch(step, optimizer) ends each step. Returns (model, average)."""
    made = images()
    model = run.place(network() if model is None else model)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), run.cfg.lr)
    for step in run.steps(steps, name, save, ema=average, optimizer=optimizer, **{name: model}):
        x, _ = run.batch(made.train)
        with run.autocast():
            loss = (model(x + 0.1 * torch.randn_like(x)) - x.flatten(1).mean(1, True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for a, b in zip(average.parameters(), model.parameters(), strict=True):
            a.data.lerp_(b.data, 0.5)
        run.log(loss=loss, grad_norm=norm)
        if watch:
            watch(step, optimizer)
    return model, average


def stored(run):
    """The checkpoint of a run."""
    return torch.load(run.path("checkpoint.pt"), weights_only=True)
