"""More figures of a trained score model: its SDE, its codes, what its guardrails do.

    python experiments/score_based.py               the newest run, or the shipped model
    python experiments/score_based.py --sample RUN  this run, of images or of points

sdes.png         mean, variance and signal-to-noise ratio of the three SDEs
paths.png        [SDE] Fig. 2: the way back from noise by the SDE and by the ODE
codes.png        images through their codes, a walk between codes, temperatures
guardrails.png   few steps, with the noise of the last one, and without the clamp
neighbours.png   samples, and under each its nearest training image
density.png      points: the density by the ODE (Eq. 39) beside the true one
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
import score_based_diffusion_example as sb  # noqa: E402
from common import plotting, quality  # noqa: E402
from common.cli import command_line  # noqa: E402
from common.data import load_data  # noqa: E402
from common.device import seeded  # noqa: E402
from common.run import open_run  # noqa: E402
from ddim_example import slerp  # noqa: E402

Config = sb.Config


# Every run


@plotting.figure("sdes.png")
def figure_sdes(run, cfg):
    """sdes.png: mean, variance and signal-to-noise ratio of the three SDEs."""
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    mean, variance, log_snr = {}, {}, {}
    for name, style in (("ve", "-"), ("vp", "-"), ("subvp", "--")):
        sde = sb.make_sde(replace(cfg, sde=name))
        mean[name] = t, sde.m(t), style
        variance[f"_{name}"] = t, sde.std(t) ** 2, style
        log_snr[f"_{name}"] = t, 2 * (sde.m(t) / sde.std(t)).log(), style
    plotting.curves(run.path("sdes.png"), [
        {"lines": mean, "xlabel": "t", "title": r"mean: $m(t)\,x_0$"},
        {"lines": variance, "xlabel": "t", "yscale": "log", "ylim": (1e-4, None),
         "title": "variance"},
        {"lines": log_snr, "xlabel": "t", "ylim": (-12, 12),
         "title": r"signal to noise, $\log\,m^2 / std^2$"}])


def mixture_on_the_line(sde, centres=(-1.0, 0.6), std=0.15):
    """log_p(x, t) of equal Gaussians under the SDE. x: (B, 1), t: (B,) -> (B,)."""
    def log_p(x, t):
        m, noise = (sb.per_example(value, x) for value in (sde.m(t), sde.std(t)))
        mean = m * torch.tensor(centres, dtype=x.dtype, device=x.device)
        total = ((m * std) ** 2 + noise**2).sqrt()
        log_each = torch.distributions.Normal(mean, total).log_prob(x)
        return log_each.logsumexp(1) - math.log(len(centres))

    return log_p


def exact_score(log_p):
    """score(x, t), the gradient of log_p(x, t)."""
    @torch.enable_grad()
    def score(x, t):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(log_p(x, t).sum(), x)[0]

    return score


@plotting.figure("paths.png")
def figure_paths(run, sde, steps=500):
    """paths.png: [SDE] Fig. 2, p_t of a mixture on the line and ways back from p_T.

    The score is exact. Everything is divided by the root of m^2 + std^2, so that VE's
    large noise fits; p_t is shown relative to its largest value at each t.
    """
    log_p = mixture_on_the_line(sde)
    score, xT = exact_score(log_p), sde.prior_sampling((8, 1), run.device)
    ways = {"reverse SDE (Eq. 6)": sb.sde_process(sb.em_step, score, sde, xT, steps),
            "probability-flow ODE (Eq. 13)": sb.ode_process(
                score, sde, xT, sde.T, sde.eps, "rk4", steps)}
    line, ts = torch.linspace(-3, 3, 301).to(xT), np.linspace(sde.eps, sde.T, 300)
    density = []
    for t in ts:
        x = line[:, None] / sb.rescaled(sde, torch.ones(1).to(xT), t)
        p = log_p(x, sb.batch_time(t, x)).exp()
        density.append(p / p.max())
    density = plotting.to_numpy(torch.stack(density, 1))

    sheet, axes = plotting.sheet_of(2, 10.4, 3.8, sharex=True, sharey=True)
    for axis, (name, states) in zip(axes, ways.items(), strict=True):
        times, places = zip(*[(t, sb.rescaled(sde, x, t)[:, 0]) for t, x in states],
                            strict=True)
        axis.pcolormesh(ts, plotting.to_numpy(line), density, cmap="Blues", vmax=1.3)
        axis.plot(times, plotting.to_numpy(torch.stack(places)), lw=0.9, color="C1")
        axis.set(title=name, xlabel="t", xlim=(sde.T, 0))
    plotting.save(sheet, run.path("paths.png"),
                  "From the same noise at T to the data at 0, over p_t")


# Images


@plotting.figure("codes.png")
def figure_codes(run, cfg, score, sde, data):
    """codes.png: images through their codes, a walk between codes, temperatures."""
    def encode(x):
        return sb.final(sb.ode_process(score, sde, x, sde.eps, sde.T,
                                       tolerance=cfg.tolerance))

    def decode(z):
        return sb.final(sb.ode_process(score, sde, z, sde.T, sde.eps,
                                       tolerance=cfg.tolerance))

    x = data.test[:8]
    z = encode(x)
    back, first, second = decode(z), z[:1], z[:2][-1:]
    u = sb.per_example(torch.linspace(0, 1, len(x), device=run.device), x)
    rows = [x, back, decode(slerp(first, second, u))]
    labels = ["held out", "encoded, decoded", "first to second"]
    noise = sde.prior_sampling(x.shape, run.device)
    for temperature in (0.7, 0.9, 1.0):
        rows.append(decode(temperature * noise))
        labels.append(f"temperature {temperature}")
    plotting.table(run.path("codes.png"), rows, "Codes by the ODE (App. D.4)", labels)
    run.add_metrics(code_error=(back - x).square().mean().sqrt().item())


@plotting.figure("guardrails.png")
def figure_guardrails(run, cfg, model, sde, shape):
    """guardrails.png: few steps, with the noise of the last one, without the clamp."""
    xT = sde.prior_sampling((10, *shape), run.device)
    few, rows, labels = replace(cfg, sampler="em", N=min(20, cfg.N)), [], []
    for name, changed in (
            ("as it is", few),
            ("last noise kept", replace(few, denoise=False)),
            ("x0_hat not clamped", replace(few, clip_x0=False))):
        score = sb.score_fn(model, sde, changed.std_floor, changed.clip_x0)
        with seeded(0, run.device):  # the rows differ in one switch, not in their noise
            x = sb.final(sb.sampling_process(changed, score, sde, xT))
        rows.append(x)
        labels.append(f"{name}\nborder std {x[..., :2, :].std():.2f}")
    plotting.table(run.path("guardrails.png"), rows,
                   f"Euler–Maruyama in {few.N} steps, each column from one noise",
                   labels)


# Points


def point_density(name, x):
    """The true density of load_points(name) at x: (N, 2) -> (N,).

    Each set is a curve or a few centres under Gaussian noise: a mixture of Gaussians
    along it.
    """
    if name == "swiss_roll":
        u = 1.5 * np.pi * (1 + 2 * (np.arange(4000) + 0.5) / 4000)
        spiral = np.stack([u * np.cos(u), u * np.sin(u)], 1)
        centres = (spiral - np.array([2.0, 0.3])) / 7.0
        std = 0.5 / 7.0
    elif name == "two_moons":
        u = np.linspace(0, np.pi, 2000)
        upper = np.stack([np.cos(u), np.sin(u)], 1)
        lower = np.stack([1 - np.cos(u), 0.5 - np.sin(u)], 1)
        centres = (np.concatenate([upper, lower]) - np.array([0.5, 0.25])) / 0.75
        std = 0.06 / 0.75
    else:
        angles = np.arange(8) * np.pi / 4
        centres = 1.4 * np.stack([np.cos(angles), np.sin(angles)], 1)
        std = 0.1
    gap = torch.cdist(x.cpu().double(), torch.from_numpy(centres)) / std
    log_norm = np.log(len(centres) * 2 * np.pi * std**2)
    log_p = torch.logsumexp(-0.5 * gap**2, dim=1) - log_norm
    return log_p.exp().to(x.dtype).to(x.device)  # MPS has no float64


@plotting.figure("density.png")
def figure_density(run, cfg, score, sde, data, points_a_side=70):
    """density.png: the model's density beside the true one, in the colours of that."""
    limit = 2.1
    line = torch.linspace(-limit, limit, points_a_side)
    where = torch.cartesian_prod(line, line).to(run.device)
    # [SDE] Eq. 39
    model = sb.log_likelihood(score, sde, where, tolerance=cfg.tolerance).exp()
    true = point_density(data.name, where)

    sheet, axes = plotting.sheet_of(2, 9, 4.4)
    for axis, p, title in zip(axes, (model, true), (
            "model: exp of the likelihood (Eq. 39)", "truth"), strict=True):
        square = plotting.to_numpy(p.view(points_a_side, points_a_side))
        axis.imshow(square.T, origin="lower", vmin=0, vmax=true.max().item(),
                    cmap="magma", extent=(-limit, limit, -limit, limit))
        axis.set_title(title)
    plotting.save(sheet, run.path("density.png"), "Densities")
    cell = (line[1] - line[0]).item() ** 2
    run.add_metrics(density={
        "sums_to": model.sum().item() * cell,
        "total_variation": (model - true).abs().sum().item() * cell / 2})


def measure_points(run, cfg, score, sde, data, samples):
    """Energy distance of samples, and of held-out points, to held-out points; nats."""
    draws = [torch.randperm(len(data.test))[:2000].split(1000) for _ in range(10)]
    picks = [torch.randperm(len(samples))[:1000] for _ in range(10)]
    of_model = [quality.energy_distance(samples[i], data.test[a])
                for i, (a, _) in zip(picks, draws, strict=True)]
    of_data = [quality.energy_distance(data.test[a], data.test[b]) for a, b in draws]
    run.add_metrics(samples={"energy_distance": float(np.mean(of_model)),
                             "energy_distance_of_data": float(np.mean(of_data))})
    x = data.test[:max(1, cfg.likelihood)]
    try:
        logp = sb.log_likelihood(score, sde, x, tolerance=cfg.tolerance)
    except FloatingPointError as problem:
        return run.say(f"no likelihood: {problem}")
    run.add_metrics(likelihood={
        "n": len(x), "nats": logp.mean().item(),
        "nats_of_the_truth": point_density(data.name, x).log().mean().item()})


@command_line
def main(argv=None):
    """Load a trained score model and draw these figures in a new run folder."""
    cfg, run = open_run("score_based", Config, sb.PRESETS, sb.SAMPLING, argv,
                        trained=True)
    data = run.load(load_data, cfg.dataset, cfg.image_size)
    sde, images = sb.make_sde(cfg), len(data.shape) == 3
    sb.check_settings(run, cfg, sde, data)
    model = run.trained(sb.make_network(cfg, data.shape))
    score = sb.score_fn(model, sde, cfg.std_floor, cfg.clip_x0 and images)

    def states(batch):
        xT = sde.prior_sampling((len(batch), *data.shape), run.device)
        return sb.sampling_process(cfg, score, sde, xT)

    figure_sdes(run, cfg)
    figure_paths(run, sde)
    n = 12 if images else 10_000
    samples, _ = run.draw(n, states, model, cfg.N, n)
    if images:
        plotting.neighbours(run.path("neighbours.png"), samples, data)
        figure_guardrails(run, cfg, model, sde, data.shape)
        figure_codes(run, cfg, score, sde, data)
    else:
        figure_density(run, cfg, score, sde, data)
        measure_points(run, cfg, score, sde, data, samples)
    run.finish()


if __name__ == "__main__":
    main()
