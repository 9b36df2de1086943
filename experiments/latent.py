"""More figures of a trained latent diffusion, and the cost of a training step.

    python experiments/latent.py                 the newest run, or the shipped model
    python experiments/latent.py --sample RUN    this run

neighbours.png        samples, and under each its nearest training image
reconstructions.png   held-out images, and the decoded means of their latents
latents.png           the channels of the latents
histogram.png         the values of scaled latents, and their spectrum
prior.png             decoded N(0, I) beside decoded samples of the diffusion
walk.png              the line between two images, in latents and in pixels
cost.png              time, operations and memory of a training step, against pixels
"""

import math
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parent.parent))
import latent_diffusion_example as latent  # noqa: E402
from common import plotting  # noqa: E402
from common.cli import command_line  # noqa: E402
from common.data import load_images  # noqa: E402
from common.device import synchronize  # noqa: E402
from common.run import open_run  # noqa: E402

Config = latent.Config


def psnr(x, x_hat):
    """Peak signal-to-noise ratio in dB. x, x_hat: (B, C, H, W) in [-1, 1] -> (B,)."""
    error = ((x_hat.clamp(-1, 1) - x) ** 2).flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))  # the range is 2, its square 4


@plotting.figure("reconstructions.png", "latents.png")
def figure_autoencoder(run, vae, data):
    """reconstructions.png: held-out images, decoded again; latents.png: latents."""
    x = data.test[:500]
    mean, _ = latent.encode_all(vae, x)
    x_hat = latent.decode_all(vae, vae.scale * mean)
    decibels = psnr(x, x_hat)
    average = decibels.mean().item()
    plotting.table(run.path("reconstructions.png"), [x[:10], x_hat[:10]],
                   f"Held-out images and their reconstructions ({average:.1f} dB)",
                   ["original", "decoded"],
                   [f"{value:.1f} dB" for value in decibels[:10].tolist()])
    run.add_metrics(psnr_held_out=average)

    z = mean[:8] / mean[:8].abs().amax((0, 2, 3), keepdim=True)
    channels = z.split(1, dim=1)
    plotting.table(run.path("latents.png"), [x[:8], *channels],
                   "The channels of the latents, each stretched to its own range",
                   ["image"] + [f"channel {i + 1}" for i in range(len(channels))])


@plotting.figure("walk.png")
def figure_walk(run, vae, data):
    """walk.png: the line between two images, in latents and in pixels."""
    x, u = data.test[:4], torch.linspace(0, 1, 9, device=run.device).view(-1, 1, 1, 1)
    z, rows = vae.scale * latent.encode_all(vae, x)[0], []
    for a, b in ((0, 1), (2, 3))[:len(x) // 2]:
        rows += [latent.decode_all(vae, (1 - u) * z[a] + u * z[b]),
                 (1 - u) * x[a] + u * x[b]]
    if rows:
        plotting.table(run.path("walk.png"), rows, "The line between two images",
                       ["latents", "pixels"] * (len(rows) // 2))


@plotting.figure("histogram.png")
def figure_histogram(run, vae, data):
    """histogram.png: the values of scaled latents against N(0, 1), and their spectrum.

    The left title gives the standard deviation before the latents are scaled.
    """
    mean, logvar = latent.encode_all(vae, data.train[:1000])
    z = latent.reparameterise(mean, logvar, torch.randn_like(mean)).cpu()
    scaled = vae.scale.cpu() * z
    line, spectra = torch.linspace(-4, 4, 200), {}
    normal = line, torch.exp(-(line**2) / 2) / math.sqrt(2 * math.pi), "k"
    for name, x, style in (("latents", scaled, "C0"),
                           ("as many draws of N(0, I)", torch.randn_like(z), "k")):
        x = x.flatten(1) - x.flatten(1).mean(0)
        rank = max(1, len(x) - 1)  # the mean takes one degree of freedom
        variances = torch.linalg.svdvals(x)[:rank] ** 2 / rank
        spectra[name] = range(1, len(variances) + 1), variances, style
    plotting.curves(run.path("histogram.png"), [
        {"histogram": scaled, "lines": {"N(0, 1)": normal}, "xlim": (-4, 4),
         "xlabel": "value of a latent",
         "title": f"std {z.std():.3f}, scaled by {vae.scale.item():.3f}"},
        {"lines": spectra, "xlabel": "principal component", "yscale": "log",
         "title": "variance along each"}],
        "Latents against N(0, I)")


@plotting.figure("prior.png")
def figure_prior(run, vae, data, samples):
    """prior.png: decoded N(0, I), and decoded samples of the diffusion.

    The KL term of stage 1 makes single latents nearly N(0, 1), but not their joint
    distribution, which stage 2 learns.
    """
    mean, _ = latent.encode_all(vae, data.test[:1])
    z = torch.randn(len(samples), *mean.shape[1:], device=run.device)
    plotting.panels(run.path("prior.png"), [
        ("decoded N(0, I): a VAE alone", latent.decode_all(vae, vae.scale * z)),
        ("decoded samples of the diffusion", samples),
        ("real, held out", data.test[:len(samples)])],
        "Decoded: N(0, I), and samples of the diffusion")


@torch.enable_grad()  # a figure is drawn without gradients
def training_cost(model, loss, repeats=3):
    """Measure a training step of a network; loss() is its loss, a scalar.

    Returns the median "seconds", the 10^9 floating-point operations, "gflop", and the
    memory kept for the backward pass, "activations_mb".
    """
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
    device = next(model.parameters()).device

    def step():
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        synchronize(device)
        return time.perf_counter() - begin

    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss()  # keeps the graph: a freed address could be counted twice
    memory = sum(kept.values())
    del value
    with FlopCounterMode(display=False) as counter:
        step()
    seconds = statistics.median(step() for _ in range(repeats))
    return {"seconds": seconds, "gflop": counter.get_total_flops() / 1e9,
            "activations_mb": memory / 1e6}


@plotting.figure("cost.png")
def figure_cost(run, cfg, shape):
    """cost.png: a training step of the same U-Net, on latents and on pixels.

    On pixels its levels have other resolutions, and only the middle has attention.
    """
    schedule = latent.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    schedule, costs = schedule.to(run.device), {}
    for name, size, own_cfg in (
            ("latent", latent.latent_shape(cfg, shape), cfg),
            ("pixel", shape, replace(cfg, attention=()))):
        model = run.place(latent.make_unet(own_cfg, size))
        x0 = torch.randn(cfg.batch_size, *size, device=run.device)
        t = latent.draw_t(len(x0), cfg.T, cfg.drawing).to(run.device)
        costs[name] = training_cost(model, partial(
            latent.ddpm_loss, model, x0, t, torch.randn_like(x0), schedule))
    ratio = {key: costs["pixel"][key] / costs["latent"][key] for key in costs["pixel"]}
    titles = {"seconds": "seconds", "gflop": "10^9 operations",
              "activations_mb": "activations, MB"}
    plotting.curves(run.path("cost.png"), [
        {"bars": (list(costs), [cost[key] for cost in costs.values()]),
         "title": f"{title}: {ratio[key]:.0f} times"}
        for key, title in titles.items()],
        f"One training step of the same U-Net, batch {cfg.batch_size}")
    run.add_metrics(cost_of_a_step=costs | {"pixel_over_latent": ratio})


@command_line
def main(argv=None):
    """Load a trained latent diffusion and draw these figures in a new run folder."""
    cfg, run = open_run("latent", Config, latent.PRESETS, latent.SAMPLING, argv,
                        trained=True)
    data = run.load(load_images, cfg.dataset, cfg.image_size)
    z_shape = latent.latent_shape(cfg, data.shape)
    schedule = latent.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    model = run.trained(latent.make_unet(cfg, z_shape))
    vae = run.trained(latent.make_vae(cfg, data.shape), "vae")

    def eps_model(zt, t):
        return cfg.eps_scale * model(zt, t)

    zT = torch.randn(25, *z_shape, device=run.device)
    z = latent.ddim_sample(eps_model, zT, schedule.to(run.device), cfg.S, cfg.eta,
                           cfg.spacing)
    samples = latent.decode_all(vae, z)
    plotting.neighbours(run.path("neighbours.png"), samples, data)
    figure_autoencoder(run, vae, data)
    figure_histogram(run, vae, data)
    figure_prior(run, vae, data, samples)
    figure_walk(run, vae, data)
    figure_cost(run, cfg, data.shape)
    run.finish()


if __name__ == "__main__":
    main()
