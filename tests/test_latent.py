"""Latent diffusion: the autoencoder, its loss, the scale of the latents, both stages together."""

import copy
import json
import math

import pytest
import torch
from conftest import ExactEps, only_run, open_picture, run_script
from torch import distributions
from torch.testing import assert_close

import latent_diffusion_example as latent
from common.data import Data, load_images
from common.runs import load_checkpoint

SMOKE = latent.PRESETS["smoke"]


def small_vae(channels=1, factor=4, z_channels=4, patch=2):
    return latent.VAE(channels, factor, z_channels, 8, 1, 4, patch)


def open_run(tmp_path, *argv):
    """cfg, run, state of a command line, as main opens them."""
    argv = ["--preset", "smoke", "--out", str(tmp_path), *map(str, argv)]
    cfg, opts = latent.parse_args(latent.Config, latent.PRESETS, argv, latent.SAMPLING)
    return latent.start("latent", latent.Config, cfg, opts, latent.launch("cpu"), latent.validate)


@pytest.fixture(scope="module")
def pictures():
    """200 of the digits, 32 x 32."""
    data = load_images("digits", 32)
    return Data("digits", data.train[:160], data.test[:40], data.train_labels[:160],
                data.test_labels[:40], data.classes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures):
    """A run of both stages: (folder, U-Net, VAE, scale)."""
    cfg, run, _ = open_run(tmp_path_factory.mktemp("trained"))
    return run.folder, *latent.train(cfg, run, pictures)


# Stage 1


@pytest.mark.parametrize("factor, patch", [(2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2), (8, 8)])
@pytest.mark.parametrize("channels, z_channels", [(1, 4), (3, 3)])
def test_shapes_for_each_factor(factor, patch, channels, z_channels):
    vae, x = small_vae(channels, factor, z_channels, patch), torch.randn(2, channels, 32, 32)
    mean, logvar = vae.encode(x)
    assert mean.shape == logvar.shape == (2, z_channels, 32 // factor, 32 // factor)
    assert vae.decode(mean).shape == x.shape
    cfg = latent.Config(factor=factor, z_channels=z_channels)
    assert latent.latent_shape(cfg, (channels, 32, 32)) == mean.shape[1:]


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


def test_overfitting_one_batch_brings_it_back(pictures):
    torch.manual_seed(0)
    vae, x = small_vae(), pictures.train[:4]
    optimizer = torch.optim.Adam(vae.parameters(), 5e-3)
    before = latent.psnr(x, vae.decode(vae.encode(x)[0])).mean().item()
    for _ in range(250):
        x_hat, mean, logvar = vae(x, torch.randn(4, 4, 8, 8))
        loss, _, _ = latent.vae_loss(x, x_hat, mean, logvar, 1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = latent.psnr(x, vae.decode(vae.encode(x)[0])).mean().item()
    assert after > 20 > before + 5, (before, after)


def test_psnr_of_a_known_error():
    x = torch.zeros(2, 1, 4, 4)
    assert_close(latent.psnr(x, x + 0.2), torch.full((2,), 20.0), rtol=1e-4, atol=0)


def test_discriminator_loss_is_the_hinge():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert_close(latent.discriminator_loss(real, fake).item(), 0.5 * (0.25 + 0.5))


def test_adversarial_weight_balances_both_gradients():
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = latent.adversarial_weight(3 * last.sum(), 0.5 * last.sum(), last)
    assert_close(weight.item(), 6.0, rtol=1e-3, atol=0)


# The scale


def test_scaled_sampled_latents_have_unit_std():
    mean, logvar = 3 * torch.randn(500, 4, 8, 8) + 1, torch.full((500, 4, 8, 8), math.log(16.0))
    scale = latent.latent_scale(mean, logvar)
    assert_close(scale, 0.2, rtol=0.01, atol=0)  # sqrt(9 + 16): the means alone would give 1/3
    z = scale * latent.reparameterise(mean, logvar, torch.randn_like(mean))
    assert_close(z.std().item(), 1.0, rtol=0.01, atol=0)


def test_decode_undoes_the_scale_and_clamps_only_pixels():
    class Echo:
        def decode(self, z):
            return z

    z = torch.randn(5, 1, 4, 4)
    found = latent.decode(Echo(), 0.1 * z, 0.1, batch_size=2)
    assert_close(found, z.clamp(-1, 1))


def test_sampling_exact_gaussian_latents_decodes_without_scale_errors():
    """Latents of std 5, diffused at unit std: the samples decode to std 5 again."""
    class Echo:
        def decode(self, z):
            return z / 50  # inside the clamp of pixels

    torch.manual_seed(0)
    schedule, scale = latent.make_schedule("linear", 1000), 0.2
    exact = ExactEps(schedule.alpha_bars, [1.0], [[0.4, -0.2]], [[[1.0, 0.3], [0.3, 1.0]]])
    z = latent.ddim_sample(exact, (8000, 2, 1, 1), schedule, 100, clip_x0=False)
    pixels = latent.decode(Echo(), z, scale).flatten(1)
    assert_close(pixels.mean(0), torch.tensor([0.04, -0.02]), rtol=0, atol=0.005)
    assert_close(torch.cov(pixels.T), torch.tensor([[1.0, 0.3], [0.3, 1.0]]) / 100, rtol=0.07,
                 atol=5e-4)


def test_alpha_bar_T_is_large_enough_for_latents_that_are_not_clamped():
    assert latent.make_schedule("linear", 1000).alpha_bars[-1] > 4e-5


# Both stages


def test_the_scale_and_the_vae_survive_saving(trained, pictures):
    folder, _, vae, scale = trained
    state = load_checkpoint(folder, ("latent",))
    assert state["latent_scale"] == scale and state["stage"] == 2
    for name, value in vae.state_dict().items():
        assert_close(state["vae"][name], value, rtol=0, atol=0)
    mean, logvar = latent.encode_all(vae, pictures.train)
    z = scale * latent.reparameterise(mean, logvar, torch.randn_like(mean))
    assert_close(z.std().item(), 1.0, rtol=0.03, atol=0)


def test_stage_2_leaves_the_vae_alone(trained, pictures, tmp_path):
    folder, _, vae, _ = trained
    assert not vae.training
    assert all(p.grad is None and not p.requires_grad for p in vae.parameters())
    before = copy.deepcopy(vae.state_dict())
    cfg, run, _ = open_run(tmp_path, "--vae", folder)
    _, again, _ = latent.train(cfg, run, pictures)
    assert not again.training and all(p.grad is None for p in again.parameters())
    for name, value in again.state_dict().items():
        assert_close(value, before[name], rtol=0, atol=0)
    assert set(run.read_log()["stage"]) == {2.0}  # stage 1 was skipped


def test_diffusion_trains_on_scaled_latents(tmp_path, pictures, trained, monkeypatch):
    """An odd scale shows up in x_0, and the network is given nothing clamped."""
    seen, loss, scale = [], latent.ddpm_loss, trained[3]

    def watching(model, x0, *rest):
        seen.append(x0)
        return loss(model, x0, *rest)

    monkeypatch.setattr(latent, "latent_scale", lambda *_: 7 * scale)
    monkeypatch.setattr(latent, "ddpm_loss", watching)
    cfg, run, _ = open_run(tmp_path, "--vae", trained[0])
    assert latent.train(cfg, run, pictures)[2] == 7 * scale
    assert len(seen) == cfg.steps
    assert_close(torch.cat(seen).std().item(), 7.0, rtol=0.1, atol=0)


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_a_resumed_run_ends_like_one_that_never_stopped(stop, tmp_path, pictures, trained):
    """The smoke preset has 4 steps of stage 1 and 6 of stage 2; stop counts both."""
    folder, _, _, scale = trained
    cfg, run, _ = open_run(tmp_path)
    log = run.log

    def stopping(step, **values):
        log(step, **values)
        run.stopped = step == stop

    run.log = stopping
    latent.train(cfg, run, pictures)
    cfg, run, state = open_run(tmp_path, "--resume", run.folder)
    assert state["step"] == stop and state["stage"] == (1 if stop <= 4 else 2)
    assert latent.train(cfg, run, pictures, state)[2] == scale
    assert (run.folder / "checkpoint.pt").read_bytes() == (folder / "checkpoint.pt").read_bytes()
    assert run.read_log()["step"] == list(map(float, range(1, 11)))


def test_the_patch_discriminator_joins_when_it_is_due(tmp_path, pictures):
    states = []
    for weight in (0, 0.5):
        cfg, run, _ = open_run(tmp_path, "--adversarial", weight, "--adversarial_start", 2)
        torch.manual_seed(1)
        latent.train_vae(cfg, run, pictures)
        states.append((run.read_log()["loss"], load_checkpoint(run.folder, ("latent",))))
    (plain, one), (joined, other) = states
    assert plain[:2] == joined[:2] and plain[2] != joined[2]
    assert not torch.equal(one["judge"]["body.0.weight"], other["judge"]["body.0.weight"])


def test_a_step_on_latents_costs_fewer_operations_than_on_pixels():
    cost = [latent.step_cost(SMOKE, shape, torch.device("cpu"), 1)
            for shape in ((4, 8, 8), (1, 32, 32))]
    assert all(0 < cost[0][name] for name in cost[0])
    assert cost[1]["gflop"] > 10 * cost[0]["gflop"]
    assert cost[1]["activations_mb"] > 5 * cost[0]["activations_mb"]


# Mistakes


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        latent.main(["--preset", "smoke", *map(str, argv)])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and said[-1].startswith("error: "), said
    return said[-1]


@pytest.mark.parametrize("argv, words", [
    (["--schedule", "cosine"], ["--schedule cosine", "linear"]),
    (["--factor", 3], ["--factor 3", "2, 4, 8"]),
    (["--factor", 8, "--image_size", 28], ["--factor 8", "28"]),
    (["--factor", 4, "--image_size", 28], ["--factor 4", "side 7"]),
    (["--factor", 2, "--vae_patch", 4], ["--vae_patch 4", "--factor 2"]),
    (["--vae_channels", 6], ["--groups 4", "--vae_channels 6"]),
    (["--kl_weight", -1], ["--kl_weight -1", ">= 0"]),
    (["--S", 21], ["--S 21", "20"]),
    (["--reconstruction", "l3"], ["--reconstruction l3", "l1, l2"]),
    (["--vae", "nowhere.pt"], ["nowhere.pt"]),
], ids=lambda v: " ".join(map(str, v)))
def test_bad_values(capsys, tmp_path, argv, words):
    said = refused(capsys, "--out", tmp_path / "out", *argv)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, words", [
    (["--z_channels", 3], ["--z_channels 3", "4"]),
    (["--factor", 2], ["--factor 2", "4"]),
    (["--dataset", "color_digits"], ["(1, 32, 32)", "(3, 32, 32)"]),
    (["--image_size", 64], ["(1, 32, 32)", "(1, 64, 64)"]),
], ids=lambda v: " ".join(map(str, v)))
def test_a_vae_that_does_not_fit(capsys, tmp_path, trained, argv, words):
    said = refused(capsys, "--out", tmp_path / "out", "--vae", trained[0], *argv)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_its_scale(capsys, tmp_path, trained):
    state = torch.load(trained[0] / "checkpoint.pt", weights_only=True)
    del state["latent_scale"]
    torch.save(state, tmp_path / "c.pt")
    said = refused(capsys, "--out", tmp_path / "out", "--sample", tmp_path / "c.pt")
    assert "latent scale" in said and not (tmp_path / "out").exists()


# The script


FIGURES = ("reconstructions.png", "latents.png", "histogram.png", "samples.png", "neighbours.png",
           "walk.png", "cost.png", "loss.png", "preview.png", "denoising.gif")


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["digits", "color_digits"])
def test_smoke(tmp_path, dataset):
    out = run_script("latent_diffusion_example.py", "--preset", "smoke", "--out", tmp_path / "o",
                     "--dataset", dataset, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    folder = only_run(tmp_path / "o", "latent")
    for name in FIGURES:
        open_picture(folder / name)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 6 and metrics["vae_steps"] == 4
    assert math.isfinite(metrics["psnr_held_out"]) and metrics["latent_scale"] > 0
    assert metrics["cost_of_a_step"]["pixel_over_latent"]["gflop"] > 10
    assert 0 <= metrics["samples"]["sure"] <= 1
    assert len((folder / "log.csv").read_text().splitlines()) == 11
    state = load_checkpoint(folder, ("latent",))
    assert state["step"] == 10 and state["latent_scale"] == metrics["latent_scale"]
    again = run_script("latent_diffusion_example.py", "--sample", folder, "--out", tmp_path / "o2",
                       cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    open_picture(only_run(tmp_path / "o2", "latent") / "samples.png")
