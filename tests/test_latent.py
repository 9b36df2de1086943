"""Latent diffusion: the autoencoder, its loss, the scale of the latents, both stages together."""

import copy
import inspect
import json
import math
from functools import partial
from pathlib import Path

import latent_diffusion_example as latent
from common import plotting
from common.data import Data, load_images
from common.device import training_cost
from common.run import load_checkpoint
from common.run import open_run as open_any

import numpy as np
import pytest
import torch
from conftest import ExactEps, assert_same_tree, only_run, open_picture, run_script, spied
from torch import distributions
from torch.testing import assert_close

SMOKE = latent.PRESETS["smoke"]


def small_vae(channels=1, factor=4, z_channels=4, patch=2):
    return latent.VAE(channels, factor, z_channels, 8, 1, 4, patch)


def open_run(out, *argv):
    """(cfg, run) of the smoke preset with a few more arguments, as main opens them."""
    argv = ["--preset", "smoke", "--device", "cpu", "--out", str(out), *map(str, argv)]
    return open_any("latent", latent.Config, latent.PRESETS, latent.SAMPLING, argv)


@pytest.fixture(scope="module")
def pictures():
    """200 of the digits, 32 x 32."""
    data = load_images("digits", 32)
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
        stage = "vae_log.csv" if {"kl", "discriminator_loss"} & set(values) else "log.csv"
        run.stopped = (stage, run.step + 1) == (name, step)

    run.log = stopping


def gaps(x, reference):
    """The distance of each picture to the nearest one of a reference."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x.flatten(1), reference.flatten(1), compute_mode=exact).amin(1)


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


@pytest.mark.slow
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
        scale = torch.tensor(0.1)

        def decode(self, z):
            return z

    z = 2 * torch.randn(5, 1, 4, 4)
    found = latent.decode_all(Echo(), 0.1 * z, batch_size=2)
    assert_close(found, z.clamp(-1, 1))


def test_sampling_exact_gaussian_latents_decodes_without_scale_errors():
    """Latents of std 5, diffused at unit std: the samples decode to std 5 again."""
    class Echo:
        scale = torch.tensor(0.2)

        def decode(self, z):
            return z / 50  # inside the clamp of pixels

    schedule = latent.make_schedule("linear", 1000)
    exact = ExactEps(schedule.alpha_bars, [1.0], [[0.4, -0.2]], [[[1.0, 0.3], [0.3, 1.0]]])
    z = latent.ddim_sample(exact, (8000, 2, 1, 1), schedule, 100, clip_x0=False)
    pixels = latent.decode_all(Echo(), z).flatten(1)
    assert_close(pixels.mean(0), torch.tensor([0.04, -0.02]), rtol=0, atol=0.005)
    assert_close(torch.cov(pixels.T), torch.tensor([[1.0, 0.3], [0.3, 1.0]]) / 100, rtol=0.07,
                 atol=5e-4)


def test_alpha_bar_T_is_large_enough_for_latents_that_are_not_clamped():
    assert latent.make_schedule("linear", 1000).alpha_bars[-1] > 4e-5
    assert latent.make_schedule("cosine", 1000).alpha_bars[-1] < 1e-6  # refused, by its end


def test_the_schedule_of_the_paper_preset_is_that_of_the_code():
    """ldm/modules/diffusionmodules/util.py: linspace(sqrt(1.5e-3), sqrt(1.95e-2), 1000)^2."""
    cfg = latent.PRESETS["paper"]
    found = latent.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    betas = np.linspace(1.5e-3**0.5, 1.95e-2**0.5, 1000) ** 2
    assert_close(found.betas[1:], torch.from_numpy(betas).float())
    assert found.alpha_bars[500].item() == pytest.approx(0.116, abs=5e-4)
    straight = latent.make_schedule("linear", cfg.T, cfg.beta_1, cfg.beta_T)
    assert straight.alpha_bars[500].item() == pytest.approx(0.049, abs=5e-4)


# The networks


def unet(**changes):
    """A small U-Net whose layers that start at zero are woken."""
    how = {"image_channels": 2, "image_size": 8, "channels": 8, "mults": (1, 2), "blocks": 1,
           "attention": (4,), "groups": 4, "dropout": 0.0}
    return awake(latent.UNet(**how | changes))


def awake(model):
    """The layers that start at zero, woken: the output then depends on everything."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def test_the_unet_hands_each_skip_to_its_twin_on_the_way_up():
    """What a level made going down is concatenated, last made first, going up."""
    model, made, got = unet(blocks=2), [], []
    model.conv_in.register_forward_hook(lambda _, __, out: made.append(out))
    for module in model.down:
        last = module if isinstance(module, latent.Downsample) else module[1]
        last.register_forward_hook(lambda _, __, out: made.append(out))
    blocks = [module[0] for module in model.up if not isinstance(module, latent.Upsample)]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: got.append(args[0]))
    model(torch.randn(2, 2, 8, 8), torch.tensor([3, 9]))
    assert len(made) == len(got) == 6
    for skip, h in zip(reversed(made), got, strict=True):
        assert skip.abs().max() > 0.1
        assert torch.equal(h[:, -skip.shape[1]:], skip)


@torch.no_grad()
def test_the_unet_sees_its_input_through_the_skips_alone():
    """Where the middle is silenced, the picture still reaches the output."""
    model, t = unet(), torch.tensor([5])
    model.mid2.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    a, b = (model(torch.randn(1, 2, 8, 8), t) for _ in range(2))
    assert (a - b).abs().max() > 0.05


@torch.no_grad()
def test_the_networks_take_pictures_that_are_not_square():
    t, x = torch.tensor([3, 900]), torch.randn(2, 2, 8, 12)
    model = unet()
    assert model(x, t).shape == x.shape
    assert_close(model(x, t)[:1], model(x[:1], t[:1]), rtol=1e-4, atol=1e-5)
    for factor, patch in ((4, 2), (8, 1)):
        vae, x = awake(small_vae(1, factor, 4, patch)), torch.randn(2, 1, 16, 32)
        mean, _ = vae.encode(x)
        cfg = latent.Config(factor=factor, mults=(1,))
        assert mean.shape == (2, 4, 16 // factor, 32 // factor)
        assert mean.shape[1:] == latent.latent_shape(cfg, (1, 16, 32))
        assert vae.decode(mean).shape == x.shape


@torch.no_grad()
def test_the_networks_work_in_float64():
    t, x = torch.tensor([3, 900]), torch.randn(2, 2, 8, 8)
    model, vae = unet(), awake(small_vae(2))
    single = model(x, t)
    double = model.double()(x.double(), t)
    assert double.dtype == torch.float64
    assert_close(double.float(), single, rtol=1e-3, atol=1e-3)
    eps = torch.randn(2, 4, 2, 2)
    single = vae(x, eps)
    double = vae.double()(x.double(), eps.double())
    for a, b in zip(double, single, strict=True):
        assert a.dtype == torch.float64
        assert_close(a.float(), b, rtol=1e-3, atol=1e-3)


def test_recomputed_activations_give_the_same_gradients(tmp_path):
    """--grad_checkpointing acts on the blocks of both networks, inside the loop alone."""
    found = []
    x, z, t = torch.randn(2, 1, 16, 16), torch.randn(2, 2, 8, 8), torch.tensor([3, 500])

    def loss(unet, vae):
        x_hat, mean, _ = vae(x, torch.zeros(2, 4, 4, 4))
        return unet(z, t).square().mean() + x_hat.square().mean() + mean.mean()

    for flags, times in ([], 1), (["--grad_checkpointing"], 2):
        torch.manual_seed(3)
        both, count = torch.nn.ModuleList([unet(), awake(small_vae())]), []
        firsts = [block.norm1 for block in both.modules() if isinstance(block, latent.ResBlock)]
        firsts += [block.body[0] for block in both.modules() if isinstance(block, latent.VAEBlock)]
        for layer in firsts:
            layer.register_forward_hook(lambda *_, count=count: count.append(1))
        _, run = open_run(tmp_path, *flags)
        for _ in run.steps(1, "both", save=False, both=both):
            loss(*both).backward()
        found.append([p.grad for p in both.parameters()])
        assert len(count) == times * len(firsts)
        count.clear()
        loss(*both).backward()
        assert len(count) == len(firsts)  # not outside the loop
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


def test_a_step_on_latents_costs_fewer_operations_than_on_pixels():
    schedule, cost = latent.make_schedule("linear", SMOKE.T), []
    for shape in ((4, 8, 8), (1, 32, 32)):
        model, x0 = latent.make_unet(SMOKE, shape), torch.randn(SMOKE.batch_size, *shape)
        t = torch.randint(1, SMOKE.T + 1, (len(x0),))
        loss = partial(latent.ddpm_loss, model, x0, t, torch.randn_like(x0), schedule)
        cost.append(training_cost(model, loss))
    assert set(cost[0]) == {"seconds", "gflop", "activations_mb"}
    assert all(0 < cost[0][name] for name in cost[0])
    assert cost[1]["gflop"] > 10 * cost[0]["gflop"]
    assert cost[1]["activations_mb"] > 5 * cost[0]["activations_mb"]


# Stage 1, its loop


def test_stage_1_trains_on_the_training_part_and_draws_its_noise(tmp_path, pictures, monkeypatch):
    """Each x is a training picture, mirrored or not as --flip says; eps ~ N(0, I) is new."""
    for flags in ([], ["--flip"]):
        seen, noise = [], []
        cfg, run = open_run(tmp_path, "--batch_size", 40, *flags)
        with monkeypatch.context() as patch:
            spied(patch, latent, "vae_loss", lambda given, _, seen=seen: seen.append(given["x"]))
            spied(patch, latent, "reparameterise",
                  lambda given, _, noise=noise: noise.append(given["eps"]))
            latent.train_vae(cfg, run, pictures)
        x = torch.cat(seen)
        assert len(x) == 40 * cfg.vae_steps
        as_is, mirrored = gaps(x, pictures.train) < 1e-3, gaps(x.flip(3), pictures.train) < 1e-3
        assert as_is.all() if not flags else (as_is | mirrored).all()
        if flags:
            assert 0.3 < mirrored.float().mean() < 0.7
        assert (gaps(x, pictures.test) > 1).all()
        eps = torch.cat(noise)
        assert_close(eps.std().item(), 1.0, rtol=0.05, atol=0)
        assert len(eps[:, 0, 0, 0].unique()) == len(eps)


def test_the_loss_of_stage_1_is_that_of_the_flags(tmp_path, pictures, monkeypatch):
    """kl_weight and reconstruction reach the loss, the loss and its parts the log."""
    asked, out = [], []

    def look(given, result):
        asked.append((given["kl_weight"], given["reconstruction"]))
        out.append([part.item() for part in result])

    spied(monkeypatch, latent, "vae_loss", look)
    cfg, run = open_run(tmp_path, "--kl_weight", 0.25, "--reconstruction", "l1")
    latent.train_vae(cfg, run, pictures)
    assert asked == [(0.25, "l1")] * cfg.vae_steps
    log = run.read_log("vae_log.csv")
    for column, values in zip(("loss", "reconstruction", "kl"), zip(*out, strict=True), strict=True):
        assert_close(torch.tensor(log[column]), torch.tensor(values), rtol=1e-4, atol=1e-4)


def test_the_patch_discriminator_joins_when_it_is_due(tmp_path, pictures):
    states = []
    for weight in (0, 0.5):
        cfg, run = open_run(tmp_path, "--adversarial", weight, "--adversarial_start", 2)
        torch.manual_seed(1)
        latent.train_vae(cfg, run, pictures)
        state = load_checkpoint(run.folder, ("latent",))
        assert state["loop"] == "vae" and state["step"] == cfg.vae_steps
        states.append((run.read_log("vae_log.csv")["loss"], state))
    (plain, one), (joined, other) = states
    assert plain[:2] == joined[:2] and plain[2] != joined[2]
    assert not torch.equal(one["discriminator"]["body.0.weight"],
                           other["discriminator"]["body.0.weight"])


def test_both_players_of_the_adversarial_game_pull_their_own_way(tmp_path, pictures, monkeypatch):
    """The generator's gradient raises the logit of x_hat; the discriminator's part tells real
    from fake and leaves x_hat alone. Both are compared with Eq. 25 at every step, and each player
    moves by the gradient of its own loss, of this batch alone, at the rate that cfg says.
    """
    made, last, seen, rates = {}, {}, [], []
    spied(monkeypatch, latent, "make_vae", lambda _, out: made.update(vae=out))
    true = latent.Discriminator

    def recorded(*args):
        made["judge"] = true(*args)
        return made["judge"]

    def loss_parts(given, out):
        last.update(x=given["x"], x_hat=given["x_hat"], rec=out[0])

    monkeypatch.setattr(latent, "Discriminator", recorded)
    spied(monkeypatch, latent, "vae_loss", loss_parts)
    spied(monkeypatch, latent, "discriminator_loss", lambda _, out: last.update(hinge=out))
    backward, step = torch.Tensor.backward, torch.optim.Adam.step

    def watching(loss, *args, **how):
        judge, vae, x, x_hat = made["judge"], made["vae"], last["x"], last["x_hat"]
        if loss is not last.get("hinge"):
            logit = judge(x_hat).mean()
            pull, = torch.autograd.grad(loss - last["rec"], x_hat, retain_graph=True)
            joined = pull.abs().max() > 1e-3
            if joined:  # the discriminator takes part
                up, = torch.autograd.grad(logit, x_hat, retain_graph=True)
                weight = latent.adversarial_weight(last["rec"], -logit, vae.conv_out.weight)
                assert weight > 0
                assert_close(pull, -0.5 * weight * up, rtol=1e-2, atol=1e-4 * pull.abs().max().item())
            seen.append("joined" if joined else "alone")
            last["player"] = list(vae.parameters())
        else:
            real, fake = judge(x), judge(x_hat.detach())
            assert_close(loss, 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean()))
            assert torch.autograd.grad(loss, x_hat, retain_graph=True, allow_unused=True) == (None,)
            seen.append("judge")
            last["player"] = list(judge.parameters())
        last["gradients"] = torch.autograd.grad(loss, last["player"], retain_graph=True)
        backward(loss, *args, **how)

    def moving(optimizer, *args, **how):
        moved = [p for group in optimizer.param_groups for p in group["params"]]
        assert list(map(id, moved)) == list(map(id, last["player"]))
        norm = torch.cat([g.flatten() for g in last["gradients"]]).norm()
        for p, gradient in zip(moved, last["gradients"], strict=True):
            wanted = gradient / max(1, norm / 100)
            assert_close(p.grad, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item() + 1e-7)
        rates.append((seen[-1], optimizer.param_groups[0]["lr"]))
        return step(optimizer, *args, **how)

    monkeypatch.setattr(torch.Tensor, "backward", watching)
    monkeypatch.setattr(torch.optim.Adam, "step", moving)
    cfg, run = open_run(tmp_path, "--adversarial", 0.5, "--adversarial_start", 1, "--vae_lr", 0.004)
    latent.train_vae(cfg, run, pictures)
    assert seen == ["alone"] + ["joined", "judge"] * 3
    share = [0.5, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]  # two steps of warm-up, then half a cosine
    assert [rate for player, rate in rates if player != "judge"] == pytest.approx(
        [0.004 * each for each in share])
    assert [rate for player, rate in rates if player == "judge"] == pytest.approx(
        [0.004 * each for each in share[1:]])


# Both stages


def test_the_scale_and_the_vae_survive_saving(trained, pictures):
    folder, model, vae = trained
    state = load_checkpoint(folder, ("latent",))
    assert state["loop"] == "model" and state["step"] == SMOKE.steps
    assert state["vae"]["scale"] == vae.scale != 1
    for name, value in vae.state_dict().items():
        assert_close(state["vae"][name], value, rtol=0, atol=0)
    for name, value in model.state_dict().items():
        assert_close(state["ema"][name], value, rtol=0, atol=0)
    mean, logvar = latent.encode_all(vae, pictures.train)
    z = vae.scale * latent.reparameterise(mean, logvar, torch.randn_like(mean))
    assert_close(z.std().item(), 1.0, rtol=0.03, atol=0)


def test_each_stage_has_its_log_and_both_count_from_one(trained):
    for name, steps in (("vae_log.csv", SMOKE.vae_steps), ("log.csv", SMOKE.steps)):
        rows = (trained[0] / name).read_text().splitlines()
        assert [row.split(",")[0] for row in rows] == ["step", *map(str, range(1, steps + 1))]
        wanted = ["reconstruction", "kl"] if name == "vae_log.csv" else []
        assert all(column in rows[0].split(",") for column in ["loss", "grad_norm", "lr", *wanted])


def test_stage_2_leaves_the_vae_alone(trained, pictures, tmp_path, monkeypatch):
    folder, model, vae = trained
    assert not vae.training and not model.training
    assert not any(p.requires_grad for p in vae.parameters())
    before = copy.deepcopy(vae.state_dict())
    cfg, run = open_run(tmp_path, "--vae", folder)
    monkeypatch.setattr(latent, "train_vae", None)  # stage 1 is skipped
    _, again = latent.train(cfg, run, pictures)
    assert not again.training
    assert all(p.grad is None and not p.requires_grad for p in again.parameters())
    for name, value in again.state_dict().items():
        tolerance = 0.02 * before[name].item() if name == "scale" else 0  # drawn anew
        assert_close(value, before[name], rtol=0, atol=tolerance)
    assert not (run.folder / "vae_log.csv").exists()
    assert len(run.read_log()["step"]) == cfg.steps


def test_diffusion_trains_on_scaled_latents(tmp_path, pictures, trained, monkeypatch):
    """An odd scale shows up in x_0, and the network is given nothing clamped."""
    seen, scale = [], trained[2].scale.item()
    monkeypatch.setattr(latent, "latent_scale", lambda *_: 7 * scale)
    spied(monkeypatch, latent, "ddpm_loss", lambda given, _: seen.append(given["x0"]))
    cfg, run = open_run(tmp_path, "--vae", trained[0])
    vae = latent.train(cfg, run, pictures)[1]
    assert_close(vae.scale.item(), 7 * scale)
    assert len(seen) == cfg.steps
    assert_close(torch.cat(seen).std().item(), 7.0, rtol=0.1, atol=0)


@pytest.mark.parametrize("flip", [False, True])
def test_diffusion_trains_on_latents_of_the_training_part(flip, tmp_path, pictures, trained,
                                                          monkeypatch):
    """Of its pictures, with --flip also of their mirror images, each time with new noise."""
    _, _, vae = trained
    encoded, noise, scales, loss, pool = [], [], [], [], []
    spied(monkeypatch, latent, "encode_all", lambda given, _: encoded.append(given["x"]))
    spied(monkeypatch, latent, "reparameterise", lambda given, z: noise.append((given, z)))
    spied(monkeypatch, latent, "latent_scale", lambda given, _: scales.append(given["mean"]))
    spied(monkeypatch, latent, "ddpm_loss", lambda given, _: loss.append(given["x0"]))
    cfg, run = open_run(tmp_path, "--vae", trained[0], "--preview_every", 100,
                        *["--flip"] * flip)
    batch = run.batch

    def watching(x, flip=None):
        assert flip is False  # a mirrored latent is not the latent of a mirrored picture
        pool.append(x)
        return batch(x, flip=flip)

    run.batch = watching
    scale = latent.train(cfg, run, pictures)[1].scale
    wanted = [pictures.train] + [pictures.train.flip(3)] * flip
    assert len(encoded) == len(wanted) and all(map(torch.equal, encoded, wanted))
    with torch.no_grad():
        mean, logvar = vae.encode(torch.cat(wanted))
    assert len(pool) == cfg.steps
    assert_close(pool[0], torch.cat([mean, logvar], 1), rtol=1e-4, atol=1e-4)
    assert_close(scales[0], mean, rtol=1e-4, atol=1e-4)
    drawn = noise[1:]  # the first is that of the scale
    assert len(drawn) == cfg.steps
    eps = torch.cat([given["eps"] for given, _ in drawn])
    assert_close(eps.std().item(), 1.0, rtol=0.1, atol=0)
    assert len(eps[:, 0, 0, 0].unique()) == len(eps)
    for (given, z), x0 in zip(drawn, loss, strict=True):
        assert (gaps(given["mean"], mean) < 1e-3).all()
        assert_close(x0, scale * z)


STOPS = [("vae_log.csv", 2), ("vae_log.csv", 3), ("vae_log.csv", 4), ("log.csv", 3), ("log.csv", 5)]


@pytest.fixture(scope="module")
def game(tmp_path_factory, pictures):
    """The folder of a run of both stages with its discriminator, never stopped."""
    cfg, run = open_run(tmp_path_factory.mktemp("game"), *GAME)
    latent.train(cfg, run, pictures)
    return run.folder


GAME = ["--adversarial", 0.5, "--adversarial_start", 1, "--flip"]


@pytest.mark.slow
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "adversarial, flip"])
@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: f"{stop[0][:-4]} {stop[1]}")
def test_a_resumed_run_ends_like_one_that_never_stopped(stop, plain, tmp_path, pictures, trained,
                                                        game):
    """The smoke preset has 4 steps of stage 1 and 6 of stage 2."""
    folder, vae = (trained[0] if plain else game), trained[2]
    cfg, run = open_run(tmp_path, *([] if plain else GAME))
    stop_after(run, *stop)
    model, _ = latent.train(cfg, run, pictures)
    assert (model is None) == (stop[0] == "vae_log.csv")
    state = load_checkpoint(run.folder, ("latent",))
    assert state["step"] == stop[1]
    assert state["loop"] == ("vae" if stop[0] == "vae_log.csv" else "model")
    cfg, run = open_run(tmp_path, "--resume", run.folder)
    found = latent.train(cfg, run, pictures)[1]
    assert not plain or found.scale == vae.scale
    assert_same_tree(load_checkpoint(run.folder, ("latent",)), load_checkpoint(folder, ("latent",)))
    for name in ("vae_log.csv", "log.csv"):
        assert (run.folder / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_run_with_another_run_s_vae_resumes_without_it(tmp_path, pictures, trained):
    """Its own checkpoint holds the autoencoder; nothing of stage 1 is done again."""
    lent = tmp_path / "lent.pt"
    states, logs = [], []
    for stop in (None, 4):
        lent.write_bytes((trained[0] / "checkpoint.pt").read_bytes())
        cfg, run = open_run(tmp_path / str(stop), "--vae", lent)
        if stop:
            stop_after(run, "log.csv", stop)
        latent.train(cfg, run, pictures)
        lent.unlink()
        if stop:
            cfg, run = open_run(tmp_path, "--resume", run.folder)
            latent.train(cfg, run, pictures)
        assert not (run.folder / "vae_log.csv").exists()
        states.append(load_checkpoint(run.folder, ("latent",)))
        logs.append((run.folder / "log.csv").read_bytes())
    assert_same_tree(*states)
    assert logs[0] == logs[1]


# Main


class Pictures:
    """Stands in for `plotting`: notes what would be drawn, {name of the file: arguments}."""

    def __init__(self):
        self.drawn = {}

    def __getattr__(self, name):
        if name == "evenly":
            return plotting.evenly

        def note(*args, **_):
            if args and isinstance(args[0], Path):
                self.drawn[args[0].name] = args[1:]
        return note


@pytest.fixture(scope="module")
def odd(trained):
    """The autoencoder with other weights and a scale of 3, where a scale forgotten is seen."""
    torch.manual_seed(1)
    vae = awake(small_vae()).requires_grad_(False)
    vae.decoder[0].weight.mul_(0.3)
    vae.scale.fill_(3.0)
    with torch.no_grad():
        z = torch.randn(9, 4, 8, 8)
        assert (vae.decode(z) - vae.decode(z / 3)).abs().mean() > 0.1
    return vae


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, trained, odd, pictures):
    """(figures, calls of the sampler with what they yielded, metrics) of --sample with flags."""
    out, calls, figures = tmp_path_factory.mktemp("drawn"), [], Pictures()
    state = torch.load(trained[0] / "checkpoint.pt", weights_only=True)
    torch.save(state | {"vae": odd.state_dict()}, out / "odd.pt")
    true = latent.ddim_process

    def process(*args, **kwargs):
        bound = inspect.signature(true).bind(*args, **kwargs)
        bound.apply_defaults()
        states = list(true(*args, **kwargs))
        calls.append((bound.arguments, states))
        yield from states

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent, "ddim_process", process)
        patch.setattr(latent, "plotting", figures)
        patch.setattr(latent, "load_images", lambda *_: pictures)
        patch.setattr(latent.quality, "load_judge", lambda *_, **__: (None, {}))
        latent.main(["--sample", str(out / "odd.pt"), "--out", str(out), "--device", "cpu", "--S", "3",
                     "--eta", "0.5", "--spacing", "quadratic", "--n_samples", "6"])
    folder = only_run(out, "latent")
    return figures.drawn, calls, json.loads((folder / "metrics.json").read_text())


def test_the_flags_reach_the_sampler(drawn, trained):
    """S, eta and spacing; nothing clamped; the network is the average, in eval mode."""
    _, calls, found = drawn
    assert len(calls) == 2  # samples.png and denoising.gif
    for given, states in calls:
        assert (given["S"], given["eta"], given["spacing"]) == (3, 0.5, "quadratic")
        assert given["clip_x0"] is False
        assert [t for t, _ in states] == [50, 22, 5, 0]
        assert not given["model"].training
        for name, value in trained[1].state_dict().items():
            assert torch.equal(given["model"].state_dict()[name], value)
        wanted = latent.make_schedule("linear", SMOKE.T).alpha_bars
        assert torch.equal(given["schedule"].alpha_bars, wanted)
        assert_close(given["xT"].std().item(), 1.0, rtol=0.1, atol=0)
    assert found["sampling"]["network_calls"] == 3 and found["sampling"]["n"] == 6


def test_samples_are_decoded_at_the_scale_of_the_vae(drawn, odd, pictures):
    """Every figure decodes z / scale: samples, reconstructions, the walk and the film."""
    (figures, calls, _), vae = drawn, odd
    with torch.no_grad():
        wanted = vae.decode(calls[0][1][-1][1] / vae.scale).clamp(-1, 1)
        assert_close(figures["samples.png"][0], wanted, rtol=1e-4, atol=1e-5)
        mean = vae.encode(pictures.test)[0]
        back = vae.decode(mean).clamp(-1, 1)
        x, x_hat = figures["reconstructions.png"][0]
        assert torch.equal(x, pictures.test[:10])
        assert_close(x_hat, back[:10], rtol=1e-4, atol=1e-4)
        rows = figures["walk.png"][0]
        assert_close(rows[0][[0, -1]], back[:2], rtol=1e-4, atol=1e-4)
        assert_close(rows[2][[0, -1]], back[2:4], rtol=1e-4, atol=1e-4)
        last = vae.decode(calls[1][1][-1][1] / vae.scale).clamp(-1, 1)
        film = figures["denoising.gif"][0]
        assert_close(film[-1], last, rtol=1e-4, atol=1e-4)
        given, ((t, zt), *_) = calls[1]  # the film shows z0_hat, not z_t
        alpha_bar = given["schedule"].alpha_bars[t]
        eps_hat = given["model"](zt, torch.full((len(zt),), t))
        z0_hat = (zt - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt()
        wanted = vae.decode(z0_hat / vae.scale).clamp(-1, 1)
        assert_close(film[0], wanted, rtol=1e-3, atol=1e-3)
        assert (wanted - vae.decode(zt / vae.scale).clamp(-1, 1)).abs().max() > 0.01


def test_the_prior_is_that_of_the_latents_before_they_are_scaled(drawn, odd, pictures, tmp_path,
                                                                 monkeypatch):
    """prior.png decodes N(0, I) itself, histogram.png shows what was scaled."""
    figures, _, _ = drawn
    (_, alone), (_, diffusion), (_, real) = figures["prior.png"][0]
    assert torch.equal(diffusion, figures["samples.png"][0][:25])
    assert torch.equal(real, pictures.test[:6]) and len(alone) == 6
    codes = []
    monkeypatch.setattr(latent, "decode_all", lambda _, z: codes.append(z) or diffusion)
    _, run = open_run(tmp_path)
    latent.figure_prior(run, odd, pictures, diffusion.repeat(4, 1, 1, 1))
    assert_close(codes[0].std(), odd.scale, rtol=0.05, atol=0)
    values, spectrum = figures["histogram.png"][0]
    mean, logvar = odd.encode(pictures.train[:1000])
    assert_close(values["histogram"].std(), 3 * (mean.var() + logvar.exp().mean()).sqrt(),
                 rtol=0.05, atol=0)
    _, variances, _ = spectrum["lines"]["latents"]
    assert_close(variances.sum(), values["histogram"].flatten(1).var(0).sum(), rtol=1e-3, atol=1e-3)
    assert (variances[:-1] >= variances[1:]).all()


def test_the_preview_recovers_what_an_exact_network_knows(tmp_path, pictures, odd, monkeypatch):
    """z0_hat of the true noise, decoded, is the picture that the latents themselves give."""
    figures, vae = Pictures(), odd
    monkeypatch.setattr(latent, "plotting", figures)
    _, run = open_run(tmp_path)
    schedule = latent.make_schedule("linear", 20)
    with torch.no_grad():
        mean = vae.encode(pictures.test[:6])[0]
        z0 = vae.scale * mean

    def exact(zt, t):
        alpha_bar = schedule.alpha_bars[t].view(-1, 1, 1, 1)
        eps_hat = (zt - alpha_bar.sqrt() * z0) / (1 - alpha_bar).sqrt()
        assert_close(eps_hat, eps, rtol=1e-3, atol=1e-3)  # z_t is the scaled z_0 and noise
        return eps_hat

    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    latent.figure_preview(run, exact, vae, pictures, schedule, 1)
    rows = figures.drawn["preview.png"][0]
    assert len(rows) == 9
    for row in rows[2::2]:
        assert_close(row, vae.decode(mean).clamp(-1, 1), rtol=1e-3, atol=1e-3)


# Mistakes


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        latent.main(["--preset", "smoke", *map(str, argv)])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and said[-1].startswith("error: "), said
    return said[-1]


@pytest.mark.parametrize("argv, words", [
    (["--schedule", "cosine", "--T", "1000"], ["--schedule cosine", "alpha_bar_T", "1e-06"]),
    (["--T", "20"], ["--schedule linear", "--T 20", "alpha_bar_T = 5.6e-11"]),
    (["--factor", 3], ["--factor", "3", "2, 4, 8"]),
    (["--factor", 8, "--image_size", 28], ["--image_size 28", "multiple of 16", "factor 8", "16, 32"]),
    (["--factor", 4, "--image_size", 28], ["--image_size 28", "multiple of 8", "24, 32"]),
    (["--factor", 2, "--vae_patch", 4], ["--vae_patch 4", "--factor 2"]),
    (["--vae_channels", 6], ["--groups 4", "--vae_channels 6"]),
    (["--kl_weight", -1], ["--kl_weight -1", ">= 0"]),
    (["--S", 51], ["--S 51", "50"]),
    (["--reconstruction", "l3"], ["--reconstruction", "l3", "l1", "l2"]),
    (["--vae", "nowhere.pt"], ["nowhere.pt"]),
], ids=lambda v: " ".join(map(str, v)))
def test_bad_values(capsys, tmp_path, argv, words):
    said = refused(capsys, "--out", tmp_path / "out", *argv)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, words", [
    (["--z_channels", 3], ["--z_channels 3", "4"]),
    (["--factor", 2], ["--factor 2", "4"]),
    (["--dataset", "color_digits"], ["--vae", "not a checkpoint that fits"]),
    (["--image_size", 64], ["--image_size 64", "made with 32"]),
], ids=lambda v: " ".join(map(str, v)))
def test_a_vae_that_does_not_fit(capsys, tmp_path, trained, argv, words):
    said = refused(capsys, "--out", tmp_path / "out", "--vae", trained[0], *argv)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--sample", "--vae"])
def test_a_checkpoint_without_its_scale(capsys, tmp_path, trained, flag):
    state = torch.load(trained[0] / "checkpoint.pt", weights_only=True)
    del state["vae"]["scale"]
    torch.save(state, tmp_path / "c.pt")
    said = refused(capsys, "--out", tmp_path / "out", flag, tmp_path / "c.pt")
    assert "not a checkpoint that fits" in said and not (tmp_path / "out").exists()


def test_a_run_stopped_in_stage_1_has_nothing_to_sample(capsys, tmp_path, pictures):
    cfg, run = open_run(tmp_path / "a")
    stop_after(run, "vae_log.csv", 2)
    latent.train(cfg, run, pictures)
    said = refused(capsys, "--out", tmp_path / "out", "--sample", run.folder)
    assert "holds no ema" in said and not (tmp_path / "out").exists()


# The script


FIGURES = ("reconstructions.png", "latents.png", "histogram.png", "samples.png", "neighbours.png",
           "prior.png", "walk.png", "cost.png", "loss.png", "preview.png", "denoising.gif")


@pytest.mark.slow
def test_smoke(tmp_path):
    out = run_script("latent_diffusion_example.py", "--preset", "smoke", "--out", tmp_path / "o",
                     cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    folder = only_run(tmp_path / "o", "latent")
    for name in FIGURES:
        open_picture(folder / name)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 6 and metrics["vae_steps"] == 4
    assert math.isfinite(metrics["psnr_held_out"])
    assert metrics["cost_of_a_step"]["pixel_over_latent"]["gflop"] > 10
    assert 0 <= metrics["samples"]["legible"] <= 1
    for name, steps in (("vae_log.csv", 4), ("log.csv", 6)):
        assert len((folder / name).read_text().splitlines()) == 1 + steps
    state = load_checkpoint(folder, ("latent",))
    assert state["step"] == 6 and state["loop"] == "model" and state["vae"]["scale"] > 0
    latent.main(["--sample", str(folder), "--out", str(tmp_path / "o2")])
    open_picture(only_run(tmp_path / "o2", "latent") / "samples.png")


@pytest.mark.slow
def test_smoke_in_colour(tmp_path):
    latent.main(["--preset", "smoke", "--dataset", "color_digits", "--out", str(tmp_path)])
    folder = only_run(tmp_path, "latent")
    for name in FIGURES:
        open_picture(folder / name)
