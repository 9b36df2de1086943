"""More figures of a trained DDPM: its forward process, its bound, its nearest images.

    python experiments/ddpm.py                   the newest run, or the shipped model
    python experiments/ddpm.py --sample RUN      this run
    python experiments/ddpm.py --evaluate 100    the bound of 100 images instead of 32

forward.png      images dissolving, by t steps of Eq. 2 and by Eq. 4 at once
schedules.png    how fast they dissolve, and the weights of Eq. 12
denoising.png    x_t, and the x0_hat of the sampler below it
neighbours.png   samples, and under each its nearest training image
bound.png, rate_distortion.png    the variational bound by t, and [DDPM] Fig. 5
"""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
import ddpm_example as ddpm  # noqa: E402
from common import plotting  # noqa: E402
from common.cli import command_line  # noqa: E402
from common.data import is_8bit, load_images  # noqa: E402
from common.run import open_run  # noqa: E402

Config = ddpm.Config


@plotting.figure("forward.png")
def figure_forward(run, data, schedule):
    """forward.png: t small steps, or a large one: the same distribution of x_t."""
    x0, T = data.test[:2], schedule.T
    ts = [0, T // 20, T // 10, T // 5, 3 * T // 10, T // 2, 3 * T // 4, T]
    xt, chain = x0, {0: x0}
    for t in range(1, T + 1):
        xt = ddpm.q_step(xt, t, torch.randn_like(x0), schedule)
        if t in ts:
            chain[t] = xt
    steps = torch.stack([chain[t] for t in ts], dim=1)
    eps = torch.randn_like(x0)
    once = torch.stack([ddpm.q_sample(x0, t, eps, schedule.alpha_bars) for t in ts], 1)
    rows = torch.stack([steps, once], dim=1).flatten(0, 1)
    plotting.table(run.path("forward.png"), list(rows),
                   "The forward process: t steps of Eq. 2, or Eq. 4 once",
                   ["Eq. 2, t times", "Eq. 4, once"] * len(x0),
                   [f"t = {t}" for t in ts])


@plotting.figure("schedules.png")
def figure_schedules(run, cfg):
    """schedules.png: both schedules, and what Eq. 14 leaves out of the bound."""
    signal, log_snr, weight, t = {}, {}, {}, torch.arange(1, cfg.T + 1)
    sigma = r"\beta_t" if cfg.variance == "beta" else r"\tilde\beta_t"
    for kind in ("linear", "cosine"):
        schedule = ddpm.make_schedule(kind, cfg.T, cfg.beta_1, cfg.beta_T)
        a = schedule.alpha_bars[1:]
        signal[kind], log_snr[f"_{kind}"] = (t, a), (t, (a / (1 - a)).log())
        weights = ddpm.bound_weight(t[1:], schedule, cfg.variance)
        weight[f"_{kind}"] = t[1:], weights
    plotting.curves(run.path("schedules.png"), [
        {"lines": signal, "xlabel": "t", "title": r"signal left, $\bar\alpha_t$"},
        {"lines": log_snr, "xlabel": "t",
         "title": r"$\log\,\bar\alpha_t\,/\,(1-\bar\alpha_t)$"},
        {"lines": weight, "levels": {"Eq. 14": 1.0}, "xlabel": "t", "yscale": "log",
         "title": rf"weight in Eq. 12, $\sigma_t^2 = {sigma}$"}])


@plotting.figure("denoising.png")
def figure_denoising(run, cfg, eps_model, states, schedule):
    """denoising.png: x_t of three samples; below it the x0_hat of the sampler."""
    columns, rows = plotting.evenly(list(states)[:-1], 8), []
    for t, xt in columns:
        xt = xt[:3]
        eps_hat = eps_model(xt, torch.full((len(xt),), t, device=xt.device))
        x0_hat = ddpm.predict_x0(xt, eps_hat, t, schedule.alpha_bars)
        x0_hat = x0_hat.clamp(-1, 1) if cfg.clip_x0 else x0_hat
        rows.append(torch.stack([xt, x0_hat], dim=1).flatten(0, 1))
    plotting.table(run.path("denoising.png"), list(torch.stack(rows, dim=1)),
                   "x_t and x0_hat on the way", ["x_t", "x0_hat"] * 3,
                   [f"t = {t}" for t, _ in columns])


@plotting.figure("bound.png", "rate_distortion.png")
def figure_bound(run, cfg, model, data, schedule):
    """bound.png: the bound term by term; rate_distortion.png: [DDPM] Fig. 5.

    Sending x_t costs L_t + ... + L_T bits, the rate; x0_hat is computed from x_t.
    """
    x0 = data.test[:run.opts.evaluate or 32]
    L = ddpm.variational_bound(model, x0, schedule, cfg.variance, cfg.clip_x0)
    plotting.curves(run.path("bound.png"), [{
        "lines": {r"$L_{t-1}$, rate": (range(2, cfg.T + 1), L[1:-1])},
        "points": {r"$L_0$, distortion": ([1], L[:1])},
        "xlabel": "t", "xscale": "log", "ylabel": "bits / dimension", "yscale": "log",
        "title": f"The bound (Eq. 5) of {len(x0)} images: {sum(L):.2f} bits/dim"}])
    run.add_metrics(bits_per_dim={  # rate and distortion: [DDPM] Sec. 4.3
        "images": len(x0), "variance": cfg.variance, "total": sum(L),
        "rate": sum(L[1:]), "distortion": L[0], "L_T": L[-1]})

    small = [t for t in (1, 2, 3, 5, 8, 13) if t <= cfg.T]
    ts = sorted({*small, *plotting.evenly(range(1, cfg.T + 1), 50)})
    rate, distortion = [sum(L[t:]) for t in ts], []
    for t in ts:
        xt = ddpm.q_sample(x0, t, torch.randn_like(x0), schedule.alpha_bars)
        eps_hat = model(xt, torch.full((len(xt),), t, device=xt.device))
        x0_hat = ddpm.predict_x0(xt, eps_hat, t, schedule.alpha_bars)
        x0_hat = x0_hat.clamp(-1, 1) if cfg.clip_x0 else x0_hat
        distortion.append(127.5 * (x0 - x0_hat).square().mean().sqrt().item())
    every_t, style = range(1, cfg.T + 1), "o-" if cfg.T < 50 else "-"
    plotting.curves(run.path("rate_distortion.png"), [
        {"lines": {"_": (ts, distortion, "o-")}, "xlabel": "t", "xlim": (cfg.T, 0),
         "ylabel": "rms error of x0_hat, pixels 0 to 255", "title": "distortion"},
        {"lines": {"_": (every_t, [sum(L[t:]) for t in every_t], style)},
         "xlabel": "t", "xlim": (cfg.T, 0), "ylabel": "bits / dimension",
         "title": "rate"},
        {"lines": {"_": (rate, distortion, "o-")}, "xlabel": "bits / dimension",
         "ylabel": "rms error of x0_hat, pixels 0 to 255",
         "title": "distortion against rate (Fig. 5)"}])


@command_line
def main(argv=None):
    """Load a trained DDPM and draw these figures in a new run folder."""
    cfg, run = open_run("ddpm", Config, ddpm.PRESETS, ddpm.SAMPLING, argv, trained=True)
    data = run.load(load_images, cfg.dataset, cfg.image_size)
    schedule = ddpm.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    schedule = schedule.to(run.device)
    model = run.trained(ddpm.make_unet(cfg, data.shape))

    def eps_model(xt, t):
        return cfg.eps_scale * model(xt, t)

    xT = torch.randn(12, *data.shape, device=run.device)
    states = list(ddpm.reverse_process(eps_model, xT, schedule, cfg.variance,
                                       cfg.clip_x0))
    _, samples = states[-1]
    plotting.neighbours(run.path("neighbours.png"), samples, data)
    figure_denoising(run, cfg, eps_model, states, schedule)
    figure_forward(run, data, schedule)
    figure_schedules(run, cfg)
    if data.empty or is_8bit(data.test):
        figure_bound(run, cfg, model, data, schedule)
    else:
        run.say(f"no bound: --dataset {cfg.dataset} must be images of 8 bits at this "
                "resolution")
    run.finish()


if __name__ == "__main__":
    main()
