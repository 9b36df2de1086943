"""Latent diffusion: the autoencoder, its loss, the scale of the latents, both stages of training.

What latent_diffusion_example.py shares with ddpm_example.py and ddim_example.py is tested in their files.
"""

import math
from types import SimpleNamespace

import ddim_example as ddim
import ddpm_example as ddpm
import latent_diffusion_example as latent
from common.data import Data, load_images
from common.run import load_checkpoint
from common.run import open_run as open_any

import numpy as np
import pytest
import torch
from conftest import ExactEps, assert_same_tree, spied
from torch import distributions
from torch.testing import assert_close


def open_run(out, *argv):
    """(cfg, run) of the smoke preset with a few more arguments, without previews, as main opens them."""
    where = [] if "--resume" in argv else ["--preset", "smoke", "--preview_every", "100", "--out", out]
    argv = [*map(str, where), "--device", "cpu", *map(str, argv)]
    return open_any("latent", latent.Config, latent.PRESETS, latent.SAMPLING, argv)


@pytest.fixture(scope="module")
def pictures():
    """200 of the small digits, 16 x 16."""
    data = load_images("digits8", 16)
    return Data("digits", data.train[:160], data.test[:40], data.train_labels[:160],
                data.test_labels[:40], data.classes)


# The autoencoder


@pytest.mark.parametrize("factor, patch, channels", [(2, 1, 3), (2, 2, 1), (4, 1, 1), (4, 2, 3), (8, 2, 1), (8, 8, 3)])
@torch.no_grad()
def test_the_autoencoder_takes_any_factor_and_pictures_that_are_not_square(factor, patch, channels):
    """And float64."""
    vae, x = latent.VAE(channels, factor, 3, 8, 1, 4, patch), torch.randn(2, channels, 16, 32)
    mean, logvar = vae.encode(x)
    assert mean.shape == logvar.shape == (2, 3, 16 // factor, 32 // factor)
    cfg = latent.Config(factor=factor, z_channels=3, mults=(1,))
    assert latent.latent_shape(cfg, (channels, 16, 32)) == mean.shape[1:]
    eps = torch.randn_like(mean)
    for single, double in zip(vae(x, eps), vae.double()(x.double(), eps.double()), strict=True):
        assert double.dtype == torch.float64
        assert_close(double.float(), single, rtol=1e-3, atol=1e-3)
    assert vae(x.double(), eps.double())[0].shape == x.shape


def test_reparameterised_latents_have_their_mean_and_variance():
    mean, logvar = torch.tensor([[0.5, -2.0]]), torch.tensor([[-1.0, 0.7]])
    z = latent.reparameterise(mean, logvar, torch.randn(200_000, 2))
    assert_close(z.mean(0), mean[0], rtol=0, atol=0.02)
    assert_close(z.var(0), logvar[0].exp(), rtol=0.02, atol=0)


@pytest.mark.parametrize("kind, power", [("l1", 1), ("l2", 2)])
def test_vae_loss_sums_over_an_image_and_averages_over_the_batch(kind, power):
    """Its second term is the KL divergence of torch.distributions."""
    x, x_hat = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    mean, logvar = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    q = distributions.Normal(mean, (0.5 * logvar).exp())
    wanted = distributions.kl_divergence(q, distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    assert_close(latent.gaussian_kl(mean, logvar), wanted)
    loss, error, kl = latent.vae_loss(x, x_hat, mean, logvar, 0.3, kind)
    assert_close(error, (x - x_hat).abs().pow(power).sum() / 3)
    assert_close(kl, wanted.sum() / 3)
    assert_close(loss, error + 0.3 * kl)


def test_overfitting_one_batch_brings_it_back(pictures):
    vae, x, errors = latent.VAE(1, 4, 4, 8, 1, 4, 2), pictures.train[:2, :, ::2, ::2], []
    optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
    for _ in range(40):
        x_hat, mean, logvar = vae(x, torch.randn(2, 4, 2, 2))
        loss, _, _ = latent.vae_loss(x, x_hat, mean, logvar, 1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(((x_hat - x) ** 2).mean().item())
    assert errors[-1] < 0.15 * errors[0], errors


# The scale


def test_scaled_sampled_latents_have_unit_std():
    mean, logvar = 3 * torch.randn(500, 4, 8, 8) + 1, torch.full((500, 4, 8, 8), math.log(16.0))
    scale = latent.latent_scale(mean, logvar)
    assert_close(scale, 0.2, rtol=0.01, atol=0)  # sqrt(9 + 16): the means alone would give 1/3


def test_sampling_exact_gaussian_latents_decodes_without_scale_errors():
    """Latents of std 5, diffused at unit std and far outside of [-1, 1]: decoded, they have std 5 again."""
    class Echo:
        scale = torch.tensor(0.2)

        def decode(self, z):
            return z / divisor

    schedule = latent.make_schedule("linear", 1000)
    exact = ExactEps(schedule.alpha_bars, [1.0], [[0.4, -0.2]], [[[1.0, 0.3], [0.3, 1.0]]])
    z = latent.ddim_sample(exact, torch.randn(8000, 2, 1, 1), schedule, 50, 1.0)
    divisor = 50  # inside the clamp of pixels
    pixels = latent.decode_all(Echo(), z).flatten(1)
    assert_close(pixels.mean(0), torch.tensor([0.04, -0.02]), rtol=0, atol=0.007)
    assert_close(torch.cov(pixels.T), torch.tensor([[1.0, 0.3], [0.3, 1.0]]) / 100, rtol=0.1, atol=5e-4)
    divisor = 1  # pixels, and no latents, are clamped
    assert_close(latent.decode_all(Echo(), z), (5 * z).clamp(-1, 1))


# What differs from the other pages


def test_the_sampler_is_that_of_ddim_without_a_clamp():
    schedule, zT, how = latent.make_schedule("linear", 1000), 3 * torch.randn(5, 2, 3, 3), (4, 0.6, "quadratic")
    torch.manual_seed(7)
    found = list(latent.ddim_process(lambda z, t: z.sin(), zT, schedule, *how))
    torch.manual_seed(7)
    wanted = ddim.ddim_process(lambda z, t: z.sin(), zT, schedule, *how, clip_x0=False)
    assert_same_tree(found, list(wanted))
    torch.manual_seed(7)
    assert torch.equal(latent.ddim_sample(lambda z, t: z.sin(), zT, schedule, *how), found[-1][1])


def test_the_schedules_are_those_of_ddpm_and_that_of_the_authors_code():
    """ldm/modules/diffusionmodules/util.py: linspace(sqrt(1.5e-3), sqrt(1.95e-2), 1000)^2."""
    for kind in ("linear", "cosine"):
        for how in ((1,), (30, 0.001, 0.01), (1000,)):
            assert_same_tree(tuple(latent.make_schedule(kind, *how)), tuple(ddpm.make_schedule(kind, *how)))
    cfg = latent.PRESETS["paper"]
    found = latent.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    betas = np.linspace(1.5e-3**0.5, 1.95e-2**0.5, 1000) ** 2
    assert_close(found.betas[1:], torch.from_numpy(betas).float())
    assert found.alpha_bars[500].item() == pytest.approx(0.116, abs=5e-4)
    tenth = latent.make_schedule("scaled_linear", 100, cfg.beta_1, cfg.beta_T)
    assert_close(tenth.betas[1:], 10 * torch.linspace(1.5e-3**0.5, 1.95e-2**0.5, 100) ** 2)


# Both stages


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures):
    """A training of both stages with --flip, and what its functions were given and returned."""
    seen = SimpleNamespace(vae_loss=[], reparameterise=[], latent_scale=[], ddpm_loss=[])
    with pytest.MonkeyPatch.context() as patch:
        for name, calls in vars(seen).items():
            spied(patch, latent, name, lambda given, out, calls=calls: calls.append((given, out)))
        cfg, seen.run = open_run(tmp_path_factory.mktemp("trained"), "--flip", "--batch_size", 40)
        seen.model, seen.vae = latent.train(cfg, seen.run, pictures)
    return seen


def gaps(x, reference):
    """The distance of each picture to the nearest one of a reference."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x.flatten(1), reference.flatten(1), compute_mode=exact).amin(1)


@pytest.mark.slow
def test_stage_1_trains_on_the_training_part_and_logs_its_losses(trained, pictures):
    """Each x is a training picture, mirrored or not as --flip says."""
    x = torch.cat([given["x"] for given, _ in trained.vae_loss])
    as_is, mirrored = gaps(x, pictures.train) < 1e-3, gaps(x.flip(3), pictures.train) < 1e-3
    assert len(x) == 4 * 40 and (as_is | mirrored).all()
    assert (gaps(x, pictures.test) > 0.5).all() and 0.3 < mirrored.float().mean() < 0.7
    log = trained.run.read_log("vae_log.csv")
    assert log["step"] == [1, 2, 3, 4]
    for i, column in enumerate(("loss", "reconstruction", "kl")):
        assert log[column] == pytest.approx([out[i].item() for _, out in trained.vae_loss], rel=1e-4)
    rates = [trained.run.cfg.vae_lr * min(1, (n + 1) / 2) * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)]
    assert log["lr"] == pytest.approx(rates, rel=1e-5)


@pytest.mark.slow
def test_stage_2_trains_on_scaled_latents_of_the_training_part(trained, pictures):
    """With --flip also of the mirror images, which are encoded anew; each time with new noise."""
    seen, vae = trained, trained.vae
    assert not any(module.training or p.requires_grad or p.grad is not None
                   for module in (seen.model, vae) for p in module.parameters())
    plain, mirrored = (torch.cat(latent.encode_all(vae, x), 1) for x in (pictures.train, pictures.train.flip(3)))
    (given, scale), = seen.latent_scale
    assert_close(torch.cat([given["mean"], given["logvar"]], 1), torch.cat([plain, mirrored]), rtol=1e-4, atol=1e-4)
    assert vae.scale == pytest.approx(scale) and scale != 1
    drawn = seen.reparameterise[-len(seen.ddpm_loss):]  # before: those of stage 1 and of the scale
    used = torch.cat([torch.cat([given["mean"], given["logvar"]], 1) for given, _ in drawn])
    assert (gaps(used, torch.cat([plain, mirrored])) < 1e-3).all()
    assert 0.3 < (gaps(used, plain) < 1e-3).float().mean() < 0.7
    for (_, z), (given, _) in zip(drawn, seen.ddpm_loss, strict=True):
        assert_close(given["x0"], vae.scale * z)
    for eps in (torch.cat([given["eps"] for given, _ in calls]) for calls in (drawn, seen.reparameterise[:2])):
        assert_close(eps.std().item(), 1.0, rtol=0.06, atol=0)
        assert len(eps[:, 0, 0, 0].unique()) == len(eps)

    state = load_checkpoint(seen.run.folder, ("latent",))
    assert (state["loop"], state["step"]) == ("model", seen.run.cfg.steps)
    assert_same_tree(dict(state["vae"]), dict(vae.state_dict()))
    assert_same_tree(dict(state["ema"]), dict(seen.model.state_dict()))


def stop_after(run, loop, step):
    """As Ctrl-C in this step of this stage would: the run stops at its end."""
    log = run.log

    def stopping(**values):
        log(**values)
        run.stopped = ("vae" if "kl" in values else "model", run.step + 1) == (loop, step)

    run.log = stopping


def test_a_run_stopped_in_stage_1_has_no_unet(tmp_path, pictures):
    cfg, run = open_run(tmp_path)
    stop_after(run, "vae", 2)
    model, _ = latent.train(cfg, run, pictures)
    state = load_checkpoint(run.folder, ("latent",))
    assert model is None and (state["loop"], state["step"]) == ("vae", 2)


@pytest.mark.slow
def test_a_run_with_another_run_s_vae_leaves_it_as_it_is_but_for_the_scale_and_resumes_without_it(
        tmp_path, pictures, trained, monkeypatch):
    """Its own checkpoint holds the autoencoder; nothing of stage 1 is done again."""
    lent = tmp_path / "lent.pt"
    lent.write_bytes(trained.run.path("checkpoint.pt").read_bytes())
    monkeypatch.setattr(latent, "latent_scale", lambda *moments: 7.0)
    cfg, run = open_run(tmp_path, "--vae", lent)
    stop_after(run, "model", 4)
    latent.train(cfg, run, pictures)
    lent.unlink()
    cfg, run = open_run(tmp_path, "--resume", run.folder)
    _, vae = latent.train(cfg, run, pictures)
    assert not run.path("vae_log.csv").exists() and run.read_log()["step"] == [1, 2, 3, 4, 5, 6]
    wanted = dict(trained.vae.state_dict()) | {"scale": torch.tensor(7.0)}
    assert_same_tree(dict(vae.state_dict()), wanted)
