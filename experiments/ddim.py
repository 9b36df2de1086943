"""More figures of DDIM: one noise in few steps and many, codes of images, the quality.

    python experiments/ddim.py                   the newest run, or the shipped DDPM
    python experiments/ddim.py --sample RUN      this run, of DDPM or DDIM
    python experiments/ddim.py --evaluate 500    the paper's Table 1 as well, of digits

steps.png            each column starts from one noise, in more and more steps
eta.png              each noise drawn from twice, with more and more noise on the way
interpolation.png, interpolation.gif    from noise to noise, on the sphere or the line
reconstruction.png   images, what their codes x_T are decoded to, and these codes
neighbours.png       samples, and under each its nearest training image
quality.png          the Fréchet distance by the number of steps (with --evaluate)
"""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
import ddim_example as ddim  # noqa: E402
from common import plotting  # noqa: E402
from common.cli import Mistake, command_line  # noqa: E402
from common.data import load_images  # noqa: E402
from common.run import open_run  # noqa: E402

Config = ddim.Config


def step_counts(T, counts):
    """Those of the step counts that are below T, and T itself."""
    return [*(S for S in counts if S < T), T]


@plotting.figure("steps.png")
def figure_steps(run, cfg, eps_model, schedule, shape):
    """steps.png: with eta = 0 the noise x_T is a code: it alone decides the image."""
    xT = torch.randn(8, *shape, device=run.device)
    counts = step_counts(cfg.T, (5, 10, 20, 50, 100))
    rows = [ddim.ddim_sample(eps_model, xT, schedule, S, 0.0, cfg.spacing, cfg.clip_x0)
            for S in counts]
    plotting.table(run.path("steps.png"), rows, "Each column: one noise, S steps",
                   [f"S = {S}" for S in counts])


@plotting.figure("eta.png")
def figure_eta(run, cfg, eps_model, schedule, shape):
    """eta.png: with eta > 0 the same noise x_T gives another image each time."""
    xT = torch.randn(5, *shape, device=run.device).repeat_interleave(2, 0)
    etas = (0.0, 0.2, 0.5, 1.0)
    rows = [ddim.ddim_sample(eps_model, xT, schedule, cfg.S, eta, cfg.spacing,
                             cfg.clip_x0) for eta in etas]
    plotting.table(run.path("eta.png"), rows,
                   f"Each noise x_T drawn from twice, {cfg.S} steps",
                   [f"eta = {eta:g}" for eta in etas],
                   [name for i in range(5) for name in (f"noise {i + 1}", "again")])


@plotting.figure("interpolation.png", "interpolation.gif")
def figure_interpolation(run, cfg, eps_model, schedule, shape):
    """interpolation.png: between two noises; interpolation.gif: through three noises.

    On the line the noise becomes smaller than any that the network was trained on.
    """
    def decode(xT):
        return ddim.ddim_sample(eps_model, xT, schedule, min(50, cfg.S), 0.0,
                                cfg.spacing, cfg.clip_x0)

    u = torch.linspace(0, 1, 9, device=run.device).view(-1, 1, 1, 1)
    rows, labels = [], []
    for _ in range(2):
        a, b = torch.randn(2, 1, *shape, device=run.device).expand(2, 9, *shape)
        for name, xT in (("slerp", ddim.slerp(a, b, u)), ("line", (1 - u) * a + u * b)):
            rows.append(decode(xT))
            labels.append(f"{name}: std of x_T\n{xT[4].std():.2f} in the middle")
    plotting.table(run.path("interpolation.png"), rows, "Between two noises, eta = 0",
                   labels, [f"u = {fraction:.2f}" for fraction in u.flatten()])

    noises, frames, captions = torch.randn(3, 6, *shape, device=run.device), [], []
    for i, u in ((i, step / 12) for i in range(3) for step in range(12)):
        frames.append(ddim.slerp(noises[i], noises[i - 2], u))
        captions.append(f"x_T from noise {i + 1} to {(i + 1) % 3 + 1}, {u:.0%}")
    frames = decode(torch.cat(frames)).split(6)
    plotting.gif(run.path("interpolation.gif"), frames, 6, captions, hold=0)


@plotting.figure("reconstruction.png")
def figure_reconstruction(run, cfg, model, schedule, data):
    """reconstruction.png: images encoded and decoded again, and their codes x_T."""
    x0, errors, rows, codes = data.test[:8], {}, [], []
    for S in [S for S in (10, 20, 50, 100, 200) if S < cfg.T] or [cfg.T]:
        xT = ddim.ddim_invert(model, x0, schedule, S, cfg.spacing)
        back = ddim.ddim_sample(model, xT, schedule, S, 0.0, cfg.spacing, False)
        errors[S] = ((back - x0) / 2).square().mean().item()  # pixels in [0, 1]: Tab. 2
        rows.append(back)
        codes.append(xT)
    labels = [f"back, S = {S}\nerror {error:.4f}" for S, error in errors.items()]
    codes = {f"x_T, S = {min(errors)}": codes[0], f"x_T, S = {max(errors)}": codes[-1],
             "N(0, I)": torch.randn_like(x0)}
    labels += [f"{name}\nstd {xT.std():.2f}" for name, xT in codes.items()]
    plotting.table(run.path("reconstruction.png"), [x0, *rows, *codes.values()],
                   "Encoded and decoded in S steps each, and the codes x_T",
                   ["held out", *labels])
    run.add_metrics(reconstruction_error_by_S=errors)


@plotting.figure("quality.png")
def figure_quality(run, cfg, model, states, data):
    """quality.png: each sampler in more and more steps, as in [DDIM] Table 1.

    metrics.json has all scores, and the seconds that the samples took.
    """
    samplers = {"eta = 0": {"eta": 0.0, "sigma_hat": False},
                "eta = 1": {"eta": 1.0, "sigma_hat": False},
                "sigma_hat": {"eta": 1.0, "sigma_hat": True}}
    counts, scores, lines = step_counts(cfg.T, (10, 20, 50, 100)), {}, {}
    for name, settings in samplers.items():
        scores[name] = {
            S: run.quality(partial(states, S=S, **settings), model, S, data)
            for S in counts}
        run.add_metrics(evaluation_by_S=scores)
        distances = [row["frechet_distance"] for row in scores[name].values()]
        lines[name] = counts, distances, "o-"
    held_out = scores["eta = 0"][cfg.T]["frechet_distance_of_held_out"]
    plotting.curves(run.path("quality.png"), [{
        "lines": lines, "levels": {"held out": held_out}, "ylim": (0, None),
        "xlabel": "steps S", "xscale": "log", "ylabel": "Fréchet distance in features",
        "title": f"{run.opts.evaluate} samples per point"}])


@command_line
def main(argv=None):
    """Load a trained network and draw these figures in a new run folder."""
    cfg, run = open_run("ddim", Config, ddim.PRESETS, ddim.SAMPLING, argv,
                        reads=("ddpm",), trained=True)
    ddim.ddim_timesteps(cfg.T, cfg.S, cfg.spacing)  # S > T is a mistake
    if cfg.sigma_hat and cfg.eta != 1:
        raise Mistake(f"eta {cfg.eta:g}: must be 1 with --sigma_hat")
    data = run.load(load_images, cfg.dataset, cfg.image_size)
    schedule = ddim.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    schedule = schedule.to(run.device)
    model = run.trained(ddim.make_unet(cfg, data.shape))

    def eps_model(xt, t):
        return cfg.eps_scale * model(xt, t)

    def states(batch, S=cfg.S, eta=cfg.eta, sigma_hat=cfg.sigma_hat):
        xT = torch.randn(len(batch), *data.shape, device=run.device)
        if sigma_hat:
            return ddim.sigma_hat_process(eps_model, xT, schedule, S, cfg.spacing,
                                          cfg.clip_x0)
        return ddim.ddim_process(eps_model, xT, schedule, S, eta, cfg.spacing,
                                 cfg.clip_x0)

    *_, (_, samples) = states(range(12))
    plotting.neighbours(run.path("neighbours.png"), samples, data)
    figure_steps(run, cfg, eps_model, schedule, data.shape)
    figure_eta(run, cfg, eps_model, schedule, data.shape)
    figure_interpolation(run, cfg, eps_model, schedule, data.shape)
    figure_reconstruction(run, cfg, model, schedule, data)
    if run.opts.evaluate:
        figure_quality(run, cfg, model, states, data)
    run.finish()


if __name__ == "__main__":
    main()
