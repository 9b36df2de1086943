"""The figure docs/failures.png: each row shows one mistake, made on purpose.

    python experiments/failures.py          about five minutes on 2 cores

The mistakes in sampling are made with the shipped DDPM model, those in training with
networks that are trained here. docs/learn.md names the causes.
"""

import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
import ddim_example as ddim  # noqa: E402
from common import plotting, quality  # noqa: E402
from common.data import load_images  # noqa: E402
from common.run import new_run, open_run  # noqa: E402

right_step = ddim.ddim_step


class FixedDecay(ddim.EMA):
    """An average that does not follow the weights faster in the first steps."""

    def update(self, model, n):
        super().update(model, 10**9)


def clamped_step(*args):
    return right_step(*args).clamp(-1, 1)


def quiet_step(xt, eps_hat, t, t_prev, alpha_bars, eta, z):
    return right_step(xt, eps_hat, t, t_prev, alpha_bars, eta, 0 * z)


def halved_step(xt, eps_hat, t, t_prev, alpha_bars, eta, z):
    return right_step(xt, eps_hat, t, t_prev, alpha_bars, eta, z / 2)


def eps_model(model, cfg):
    """The network as main of the page samples from it."""
    return lambda xt, t: cfg.eps_scale * model(xt, t)


def draw(model, xT, schedule, S=50, eta=1.0, clip_x0=True, step=right_step):
    """DDIM's sampler, with `step` in place of `ddim_step`."""
    with mock.patch.object(ddim, "ddim_step", step):
        return ddim.ddim_sample(model, xT, schedule, S, eta, "linear", clip_x0)


def sampling_mistakes(model, xT, schedule):
    """Yields (label, images) from one trained network, with mistakes in the sampler."""
    def shifted(shift):
        return lambda xt, t: model(xt, (t + shift).clamp(1, schedule.T))

    yield "as it should be", draw(model, xT, schedule)
    *_, (_, x), _, _, _ = ddim.ddim_process(model, xT, schedule, 50, 1.0)
    yield "ends before t = 0", x
    *_, (_, x) = ddim.sigma_hat_process(model, xT, schedule, 10)
    yield "too much noise\nin few steps", x
    yield "no noise\nadded back", draw(model, xT, schedule, step=quiet_step)
    yield "asked at a t\n100 too large", draw(shifted(100), xT, schedule)
    yield "asked at a t\n200 too small", draw(shifted(-200), xT, schedule)
    yield "t off by one", draw(shifted(-1), xT, schedule, S=schedule.T)
    yield "x_t clamped,\nnot x0_hat, eta = 0", draw(
        model, xT, schedule, eta=0.0, clip_x0=False, step=clamped_step)
    yield "half of all noise", draw(model, xT / 2, schedule, step=halved_step)


def training_mistakes(data, xT, cfg, schedule, train):
    """Yields (label, images) from networks with mistakes in their training.

    train(images, cfg) returns a network.
    """
    def drawn(images, **changes):
        model = train(images, replace(cfg, **changes))
        return draw(eps_model(model, cfg), xT, schedule)

    yield "pixels in [0, 1],\nshown as [-1, 1]", drawn((data.train + 1) / 2)
    with mock.patch.object(ddim, "EMA", FixedDecay):
        yield "averaged over\n10,000 steps", drawn(data.train, ema=0.9999)
    yield "stopped after\n200 steps", drawn(
        data.train, steps=max(1, cfg.steps // 6), warmup=50)
    few = data.train[:20]
    images = drawn(few, steps=2 * cfg.steps)
    nearest, _ = quality.nearest_neighbours(images, few)
    yield "20 training\nimages only", images
    yield "the nearest\nof the 20", few[nearest]


def main(steps=1200, columns=10, file=ROOT / "docs/failures.png", out=None,
         device=None):
    """Draw the figure and return its rows. steps: how long most networks train."""
    settings = {"sample": ROOT / "pretrained/ddpm.pt", "out": out, "device": device}
    argv = [f"--{name}={value}" for name, value in settings.items() if value]
    cfg, run = open_run("ddim", ddim.Config, ddim.PRESETS, ddim.SAMPLING, argv,
                        reads=("ddpm",))
    data = run.load(load_images, cfg.dataset, cfg.image_size)
    schedule = ddim.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    schedule = schedule.to(run.device)
    model = run.trained(ddim.make_unet(cfg, data.shape))
    xT = torch.randn(columns, *data.shape).to(run.device)
    rows = dict(sampling_mistakes(eps_model(model, cfg), xT, schedule))

    def train(images, cfg):
        run = new_run("ddim", replace(cfg, preview_every=cfg.steps), out=out,
                      device=device)
        own = run.load(lambda: replace(data, train=images, train_labels=None))
        return ddim.train(run.cfg, run, own)

    rows |= training_mistakes(data, xT, ddim.Config(steps=steps), schedule, train)
    file.parent.mkdir(exist_ok=True)
    plotting.table(file, rows.values(), "Each column one noise, each row one mistake",
                   list(rows))
    return rows


if __name__ == "__main__":
    main()
