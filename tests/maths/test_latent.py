"""Latent diffusion: the autoencoder, its loss, the scale of the latents, both stages of training.

What latent_diffusion_example.py shares with ddpm_example.py and ddim_example.py is tested in their files.
"""

import math

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

SMOKE = latent.PRESETS["smoke"]


def open_run(out, *argv):
    """(cfg, run) of the smoke preset with a few more arguments, as main opens them."""
    where = [] if "--resume" in argv else ["--preset", "smoke", "--out", out]
    argv = [*map(str, where), "--device", "cpu", *map(str, argv)]
    return open_any("latent", latent.Config, latent.PRESETS, latent.SAMPLING, argv)


@pytest.fixture(scope="module")
def pictures():
    """200 of the small digits, 16 x 16."""
    data = load_images("digits8", 16)
    return Data("digits", data.train[:160], data.test[:40], data.train_labels[:160],
                data.test_labels[:40], data.classes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures):
    """A run of both stages: (folder, U-Net, VAE)."""
    cfg, run = open_run(tmp_path_factory.mktemp("trained"))
    return run.folder, *latent.train(cfg, run, pictures)


def stop_after(run, name, step):
    """As Ctrl-C in this step of this stage would: the run stops at its end."""
    log = run.log

    def stopping(**values):
        log(**values)
        stage = "vae_log.csv" if "kl" in values else "log.csv"
        run.stopped = (stage, run.step + 1) == (name, step)

    run.log = stopping


def gaps(x, reference):
    """The distance of each picture to the nearest one of a reference."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x.flatten(1), reference.flatten(1), compute_mode=exact).amin(1)


# Stage 1


@pytest.mark.parametrize("factor, patch", [(2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2), (8, 8)])
@pytest.mark.parametrize("channels, z_channels", [(1, 4), (3, 3)])
@torch.no_grad()
def test_the_autoencoder_takes_any_factor_and_pictures_that_are_not_square(factor, patch, channels, z_channels):
    """And float64."""
    vae, x = latent.VAE(channels, factor, z_channels, 8, 1, 4, patch), torch.randn(2, channels, 16, 32)
    mean, logvar = vae.encode(x)
    assert mean.shape == logvar.shape == (2, z_channels, 16 // factor, 32 // factor)
    assert vae.decode(mean).shape == x.shape
    cfg = latent.Config(factor=factor, z_channels=z_channels, mults=(1,))
    assert latent.latent_shape(cfg, (channels, 16, 32)) == mean.shape[1:]
    eps = torch.randn_like(mean)
    for single, double in zip(vae(x, eps), vae.double()(x.double(), eps.double()), strict=True):
        assert double.dtype == torch.float64
        assert_close(double.float(), single, rtol=1e-3, atol=1e-3)


def test_kl_against_torch_distributions():
    mean, logvar = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    q = distributions.Normal(mean, (0.5 * logvar).exp())
    kl = distributions.kl_divergence(q, distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    assert_close(latent.gaussian_kl(mean, logvar), kl)


def test_reparameterised_latents_have_their_mean_and_variance():
    mean, logvar = torch.tensor([[0.5, -2.0]]), torch.tensor([[-1.0, 0.7]])
    z = latent.reparameterise(mean, logvar, torch.randn(200_000, 2))
    assert_close(z.mean(0), mean[0], rtol=0, atol=0.02)
    assert_close(z.var(0), logvar[0].exp(), rtol=0.02, atol=0)


@pytest.mark.parametrize("kind, power", [("l1", 1), ("l2", 2)])
def test_vae_loss_sums_over_an_image_and_averages_over_the_batch(kind, power):
    x, x_hat = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    mean, logvar = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    loss, error, kl = latent.vae_loss(x, x_hat, mean, logvar, 0.3, kind)
    assert_close(error, (x - x_hat).abs().pow(power).sum() / 3)
    assert_close(kl, latent.gaussian_kl(mean, logvar).sum() / 3)
    assert_close(loss, error + 0.3 * kl)


@pytest.mark.slow
def test_overfitting_one_batch_brings_it_back(pictures):
    vae, x, errors = latent.VAE(1, 4, 4, 8, 1, 4, 2), pictures.train[:4], []
    optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
    for _ in range(60):
        x_hat, mean, logvar = vae(x, torch.randn(4, 4, 4, 4))
        loss, _, _ = latent.vae_loss(x, x_hat, mean, logvar, 1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(((x_hat - x) ** 2).mean().item())
    assert errors[-1] < 0.15 * errors[0], errors


@pytest.mark.parametrize("flip", [False, True])
def test_stage_1_trains_by_its_own_flags_on_the_training_part(flip, tmp_path, pictures, monkeypatch):
    """Each x is a training picture, mirrored or not as --flip says; eps ~ N(0, I) is new."""
    calls, noise = [], []
    spied(monkeypatch, latent, "vae_loss", lambda given, out: calls.append((given, [v.item() for v in out])))
    spied(monkeypatch, latent, "reparameterise", lambda given, _: noise.append(given["eps"]))
    cfg, run = open_run(tmp_path, "--batch_size", 40, "--kl_weight", 0.25, "--reconstruction", "l1",
                        "--vae_steps", 5, "--vae_lr", 0.01, "--lr", 0.5, *["--flip"] * flip)
    vae = latent.train_vae(cfg, run, pictures)
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    assert len(calls) == 5 and all(given["kl_weight"] == 0.25 and given["reconstruction"] == "l1"
                                   for given, _ in calls)
    x, eps = torch.cat([given["x"] for given, _ in calls]), torch.cat(noise)
    as_is, mirrored = gaps(x, pictures.train) < 1e-3, gaps(x.flip(3), pictures.train) < 1e-3
    assert len(x) == 200 and (as_is | mirrored).all() and (gaps(x, pictures.test) > 0.5).all()
    assert 0.3 < mirrored.float().mean() < 0.7 if flip else as_is.all()
    assert_close(eps.std().item(), 1.0, rtol=0.06, atol=0)
    assert len(eps[:, 0, 0, 0].unique()) == len(eps) == 200
    log = run.read_log("vae_log.csv")
    for column, values in zip(("loss", "reconstruction", "kl"), zip(*(out for _, out in calls), strict=True),
                              strict=True):
        assert log[column] == pytest.approx(values, rel=1e-4)
    rates = [0.01 * min(1, (n + 1) / 2) * (1 + math.cos(math.pi * n / 5)) / 2 for n in range(5)]
    assert log["lr"] == pytest.approx(rates, rel=1e-5)


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


def test_the_sampler_is_that_of_ddim_without_a_clamp():
    schedule, zT = latent.make_schedule("linear", 1000), 3 * torch.randn(5, 2, 3, 3)
    torch.manual_seed(7)
    found = list(latent.ddim_process(lambda z, t: z.sin(), zT, schedule, 4, 0.6, "quadratic"))
    torch.manual_seed(7)
    wanted = ddim.ddim_process(lambda z, t: z.sin(), zT, schedule, 4, 0.6, "quadratic", clip_x0=False)
    assert_same_tree(found, list(wanted))
    torch.manual_seed(7)
    last = latent.ddim_sample(lambda z, t: z.sin(), zT, schedule, 4, 0.6, "quadratic")
    assert torch.equal(last, found[-1][1])


def test_the_schedule_of_the_paper_preset_is_that_of_the_code():
    """ldm/modules/diffusionmodules/util.py: linspace(sqrt(1.5e-3), sqrt(1.95e-2), 1000)^2."""
    cfg = latent.PRESETS["paper"]
    found = latent.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    betas = np.linspace(1.5e-3**0.5, 1.95e-2**0.5, 1000) ** 2
    assert_close(found.betas[1:], torch.from_numpy(betas).float())
    assert found.alpha_bars[500].item() == pytest.approx(0.116, abs=5e-4)
    tenth = latent.make_schedule("scaled_linear", 100, cfg.beta_1, cfg.beta_T)
    assert_close(tenth.betas[1:], 10 * torch.linspace(1.5e-3**0.5, 1.95e-2**0.5, 100) ** 2)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_schedules_of_ddpm_are_here_too(kind):
    for T, ends in ((1, ()), (30, (0.001, 0.01)), (1000, ())):
        for one, other in zip(latent.make_schedule(kind, T, *ends), ddpm.make_schedule(kind, T, *ends), strict=True):
            assert torch.equal(one, other)


# Both stages


def test_both_stages_are_saved_with_the_scale_and_logged_from_step_1(trained, pictures):
    folder, model, vae = trained
    assert not any(module.training or p.requires_grad for module in (model, vae) for p in module.parameters())
    state = load_checkpoint(folder, ("latent",))
    assert state["loop"] == "model" and state["step"] == SMOKE.steps
    assert state["vae"]["scale"] == vae.scale != 1
    assert_same_tree(dict(state["vae"]), dict(vae.state_dict()))
    assert_same_tree(dict(state["ema"]), dict(model.state_dict()))
    mean, logvar = latent.encode_all(vae, pictures.train)
    z = vae.scale * latent.reparameterise(mean, logvar, torch.randn_like(mean))
    assert_close(z.std().item(), 1.0, rtol=0.03, atol=0)
    for name, steps in (("vae_log.csv", SMOKE.vae_steps), ("log.csv", SMOKE.steps)):
        rows = [row.split(",") for row in (folder / name).read_text().splitlines()]
        assert [row[0] for row in rows] == ["step", *map(str, range(1, steps + 1))]
        wanted = ["reconstruction", "kl"] if name == "vae_log.csv" else []
        assert {"loss", "grad_norm", "lr", *wanted} <= set(rows[0])


@pytest.mark.slow
@pytest.mark.parametrize("flip", [False, True])
def test_stage_2_trains_on_scaled_latents_of_the_training_part(flip, tmp_path, pictures, trained, monkeypatch):
    """Of its pictures, with --flip also of their mirror images, each time with new noise.

    An odd scale shows up in x_0. The autoencoder of --vae stays as it is, but for the scale.
    """
    before, drawn, loss, scaled = trained[2].state_dict(), [], [], []
    monkeypatch.setattr(latent, "latent_scale", lambda *moments: scaled.append(torch.cat(moments, 1)) or 7.0)
    spied(monkeypatch, latent, "reparameterise", lambda given, z: drawn.append((given, z)))
    spied(monkeypatch, latent, "ddpm_loss", lambda given, _: loss.append(given["x0"]))
    cfg, run = open_run(tmp_path, "--vae", trained[0], "--batch_size", 32, *["--flip"] * flip)
    _, vae = latent.train(cfg, run, pictures)

    assert not vae.training and all(p.grad is None and not p.requires_grad for p in vae.parameters())
    for name, value in vae.state_dict().items():
        assert torch.equal(value, torch.tensor(7.0) if name == "scale" else before[name])
    assert not (run.folder / "vae_log.csv").exists() and len(run.read_log()["step"]) == cfg.steps

    plain, mirrored = (torch.cat(latent.encode_all(vae, x), 1)
                       for x in (pictures.train, pictures.train.flip(3)))
    assert_close(scaled[0], torch.cat([plain, mirrored]) if flip else plain, rtol=1e-4, atol=1e-4)
    used = torch.cat([torch.cat([given["mean"], given["logvar"]], 1) for given, _ in drawn])
    assert len(used) == 32 * cfg.steps and (gaps(used, scaled[0]) < 1e-3).all()
    assert (0.3 if flip else 1) <= (gaps(used, plain) < 1e-3).float().mean() <= (0.7 if flip else 1)
    eps = torch.cat([given["eps"] for given, _ in drawn])
    assert_close(eps.std().item(), 1.0, rtol=0.06, atol=0)
    assert len(eps[:, 0, 0, 0].unique()) == len(eps)
    for (_, z), x0 in zip(drawn, loss, strict=True):
        assert_close(x0, 7 * z)


@pytest.mark.slow
def test_a_run_stopped_in_stage_1_resumes_to_the_last_bit(tmp_path, pictures, trained):
    folder, vae = trained[0], trained[2]
    cfg, run = open_run(tmp_path)
    stop_after(run, "vae_log.csv", 3)
    model, _ = latent.train(cfg, run, pictures)
    state = load_checkpoint(run.folder, ("latent",))
    assert model is None and (state["loop"], state["step"]) == ("vae", 3)
    cfg, run = open_run(tmp_path, "--resume", run.folder)
    assert latent.train(cfg, run, pictures)[1].scale == vae.scale
    assert_same_tree(load_checkpoint(run.folder, ("latent",)), load_checkpoint(folder, ("latent",)))
    for name in ("vae_log.csv", "log.csv"):
        assert (run.folder / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.slow
def test_a_run_with_another_run_s_vae_resumes_without_it(tmp_path, pictures, trained):
    """Its own checkpoint holds the autoencoder; nothing of stage 1 is done again."""
    lent = tmp_path / "lent.pt"
    lent.write_bytes((trained[0] / "checkpoint.pt").read_bytes())
    cfg, run = open_run(tmp_path, "--vae", lent)
    stop_after(run, "log.csv", 4)
    scale = latent.train(cfg, run, pictures)[1].scale
    lent.unlink()
    cfg, run = open_run(tmp_path, "--resume", run.folder)
    _, vae = latent.train(cfg, run, pictures)
    assert not (run.folder / "vae_log.csv").exists() and run.read_log()["step"] == [1, 2, 3, 4, 5, 6]
    assert vae.scale == scale and torch.equal(vae.conv_out.weight, trained[2].conv_out.weight)
