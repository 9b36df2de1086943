"""What broken looks like: docs/failures.png, each row one mistake made on purpose.

    python experiments/failures.py          about five minutes on 2 cores

The rows that concern sampling are drawn from the shipped DDPM model, the others from
networks that are trained here, with the mistake. docs/learn.md names the causes.
"""

import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ddim_example as ddim  # noqa: E402
from common import plotting, quality  # noqa: E402
from common.data import Data, load_images  # noqa: E402
from common.run import new_run, open_run  # noqa: E402

import torch  # noqa: E402


class FixedDecay(ddim.EMA):
    """An average that does not follow the first steps faster."""

    def update(self, model, n):
        super().update(model, 10**9)


def draw(model, xT, cfg, **changes):
    """DDIM's sampler with one thing changed: the last state."""
    how = {"S": 50, "eta": 1.0, "clip_x0": True, "temperature": cfg.temperature}
    schedule = ddim.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    *_, (_, x) = ddim.ddim_process(model, xT, schedule.to(xT.device), **how | changes)
    return x


def sampling_mistakes(model, xT, cfg):
    """Yields (label, pictures) of one trained network, sampled wrongly."""
    schedule = ddim.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    schedule = schedule.to(xT.device)
    def clamped(*args):
        return ddim.ddim_step(*args).clamp(-1, 1)

    def quiet(xt, eps_hat, t, t_prev, alpha_bars, eta, z):
        return ddim.ddim_step(xt, eps_hat, t, t_prev, alpha_bars, eta, 0 * z)

    def told(shift):
        return lambda xt, t: model(xt, (t + shift).clamp(1, cfg.T))

    yield "as it should be", draw(model, xT, cfg)
    *_, (_, x), _, _, _ = ddim.ddim_process(
        model, xT, schedule, 50, 1.0, temperature=cfg.temperature)
    yield "ends before t = 0", x
    yield "too much noise\nin few steps", draw(
        model, xT, cfg, S=10, step=ddim.sigma_hat_step, temperature=1.0)
    yield "no noise\nadded back", draw(model, xT, cfg, step=quiet)
    yield "told t 100\ntoo large", draw(told(100), xT, cfg)
    yield "told t 200\ntoo small", draw(told(-200), xT, cfg)
    yield "t off by one", draw(told(-1), xT, cfg, S=cfg.T)
    yield "x_t clamped,\nnot x0_hat, eta = 0", draw(
        model, xT, cfg, step=clamped, clip_x0=False, eta=0.0)
    yield "temperature 0.5", draw(model, xT, cfg, temperature=0.5)


def training_mistakes(data, xT, steps, how):
    """Yields (label, pictures) of networks that were trained wrongly."""
    def trained(data, steps, **changes):
        cfg = ddim.Config(steps=steps, preview_every=steps, **changes)
        run = new_run("ddim", cfg, **how)
        return draw(ddim.train(cfg, run, run.load(data)), xT, cfg)

    def of(train):
        return Data(**vars(data) | {"train": train, "train_labels": None})

    grey = trained(of((data.train + 1) / 2), steps)
    yield "pixels in [0, 1],\nshown as [-1, 1]", grey
    with mock.patch.object(ddim, "EMA", FixedDecay):
        yield "averaged over\n10,000 steps", trained(data, steps, ema=0.9999)
    yield "stopped after\n200 steps", trained(data, max(1, steps // 6), warmup=50)
    few = data.train[:20]
    pictures = trained(of(few), 2 * steps)
    nearest = few[quality.nearest_neighbours(pictures, few)[0]]
    yield "20 training\npictures only", pictures
    yield "the nearest\nof the 20", nearest


def main(steps=1200, columns=10, file=ROOT / "docs/failures.png", sample="", **how):
    """Write the picture. how: see common.run.new_run."""
    checkpoint = sample or ROOT / "pretrained/ddpm.pt"
    argv = ["--sample", str(checkpoint), *(f"--{name}={x}" for name, x in how.items())]
    cfg, run = open_run("ddim", ddim.Config, ddim.PRESETS, ddim.SAMPLING, argv,
                        reads=("ddpm",))
    data = run.load(load_images(cfg.dataset, cfg.image_size))
    model = run.trained(ddim.make_unet(cfg, data.shape))
    xT = torch.randn(columns, *data.shape).to(run.device)
    cfg = replace(cfg, temperature=ddim.Config().temperature)
    parts = [*sampling_mistakes(model, xT, cfg),
             *training_mistakes(load_images(cfg.dataset), xT, steps, how)]
    file.parent.mkdir(exist_ok=True)
    labels, rows = zip(*parts, strict=True)
    plotting.table(file, rows, "Each column one noise, each row one mistake", labels)
    return dict(parts)


if __name__ == "__main__":
    main()
