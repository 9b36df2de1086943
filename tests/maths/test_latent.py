"""Latent diffusion: the autoencoder, its loss, the scale of the latents, both stages of training."""

import copy
import math

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


def small_vae(channels=1, factor=4, z_channels=4, patch=2):
    return latent.VAE(channels, factor, z_channels, 8, 1, 4, patch)


def open_run(out, *argv):
    """(cfg, run) of the smoke preset with a few more arguments, as main opens them."""
    where = [] if "--resume" in argv else ["--preset", "smoke", "--out", out]
    argv = [*map(str, where), "--device", "cpu", *map(str, argv)]
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


@torch.no_grad()
def psnr(x, vae):
    """Peak signal-to-noise ratio of a VAE's reconstructions of x, in dB."""
    return 10 * torch.log10(4 / ((vae.decode(vae.encode(x)[0]) - x) ** 2).mean()).item()


@pytest.mark.slow
def test_overfitting_one_batch_brings_it_back(pictures):
    torch.manual_seed(0)
    vae, x = small_vae(), pictures.train[:4]
    optimizer = torch.optim.Adam(vae.parameters(), 5e-3)
    before = psnr(x, vae)
    for _ in range(60):
        x_hat, mean, logvar = vae(x, torch.randn(4, 4, 8, 8))
        loss, _, _ = latent.vae_loss(x, x_hat, mean, logvar, 1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = psnr(x, vae)
    assert after > 14 > before + 5, (before, after)


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


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_exact_gaussian_latents_decodes_without_scale_errors(eta):
    """Latents of std 5, diffused at unit std and far outside of [-1, 1]: decoded, they have std 5 again."""
    class Echo:
        scale = torch.tensor(0.2)

        def decode(self, z):
            return z / 50  # inside the clamp of pixels

    schedule = latent.make_schedule("linear", 1000)
    exact = ExactEps(schedule.alpha_bars, [1.0], [[0.4, -0.2]], [[[1.0, 0.3], [0.3, 1.0]]])
    z = latent.ddim_sample(exact, torch.randn(8000, 2, 1, 1), schedule, 100, eta)
    pixels = latent.decode_all(Echo(), z).flatten(1)
    assert_close(pixels.mean(0), torch.tensor([0.04, -0.02]), rtol=0, atol=0.005)
    assert_close(torch.cov(pixels.T), torch.tensor([[1.0, 0.3], [0.3, 1.0]]) / 100, rtol=0.07,
                 atol=5e-4)


def test_a_step_of_the_sampler_is_ddim_s_and_clamps_nothing():
    """Eq. 12 and 16 with the network's own eps_hat, from tau_S = T down to 0."""
    schedule = latent.make_schedule("linear", 1000)
    zT = 3 * torch.randn(5, 2, 3, 3)
    states, asked = [], []

    def model(zt, t):
        asked.append(t)
        return zt.sin()

    torch.manual_seed(7)
    states = list(latent.ddim_process(model, zT, schedule, 4, 0.6, "quadratic"))
    assert [t for t, _ in states] == [1000, 562, 250, 62, 0]
    assert all(t.dtype == torch.int64 and t.tolist() == [s] * 5 for t, (s, _) in
               zip(asked, states[:-1], strict=True))
    torch.manual_seed(7)
    for (t, zt), (s, z_prev) in zip(states[:-1], states[1:], strict=True):
        a, a_prev = schedule.alpha_bars[t], schedule.alpha_bars[s]
        sigma = 0.6 * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
        z0_hat = (zt - (1 - a).sqrt() * zt.sin()) / a.sqrt()
        assert z0_hat.abs().max() > 1
        wanted = a_prev.sqrt() * z0_hat + (1 - a_prev - sigma**2).sqrt() * zt.sin()
        assert_close(z_prev, wanted + sigma * torch.randn_like(zt), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind, ends, refused", [
    ("linear", (1e-4, 0.02), range(3, 30)), ("scaled_linear", (1e-4, 0.02), range(3, 21)),
    ("cosine", (1e-4, 0.02), range(50, 61))])
def test_the_schedules_whose_end_is_too_near_0_are_those_of_the_docs(kind, ends, refused):
    """main refuses an alpha_bar_T below 1e-6, whatever the T of the list."""
    low = [T for T in range(1, 61) if latent.make_schedule(kind, T, *ends).alpha_bars[-1] < 1e-6]
    assert low == list(refused)
    assert (latent.make_schedule(kind, 1000, *ends).alpha_bars[-1] < 1e-6) == (kind == "cosine")


def test_the_schedule_of_the_paper_preset_is_that_of_the_code():
    """ldm/modules/diffusionmodules/util.py: linspace(sqrt(1.5e-3), sqrt(1.95e-2), 1000)^2."""
    cfg = latent.PRESETS["paper"]
    found = latent.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    betas = np.linspace(1.5e-3**0.5, 1.95e-2**0.5, 1000) ** 2
    assert_close(found.betas[1:], torch.from_numpy(betas).float())
    assert found.alpha_bars[500].item() == pytest.approx(0.116, abs=5e-4)
    straight = latent.make_schedule("linear", cfg.T, cfg.beta_1, cfg.beta_T)
    assert straight.alpha_bars[500].item() == pytest.approx(0.049, abs=5e-4)
    tenth = latent.make_schedule("scaled_linear", 100, cfg.beta_1, cfg.beta_T)
    assert_close(tenth.betas[1:], 10 * torch.linspace(1.5e-3**0.5, 1.95e-2**0.5, 100) ** 2)


def test_the_older_name_of_a_schedule_is_read_as_the_new_one():
    assert latent.Config(schedule="sqrt_linear") == latent.Config(schedule="scaled_linear")


# The networks


def unet(blocks=1):
    """A small U-Net whose layers that start at zero are woken."""
    return awake(latent.UNet(2, 8, 8, (1, 2), blocks, (4,), 1, 4, 0.0))


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


STOPS = [("vae_log.csv", 3), ("vae_log.csv", 4), ("log.csv", 4)]


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: f"{stop[0][:-4]} {stop[1]}")
def test_a_resumed_run_ends_like_one_that_never_stopped(stop, tmp_path, pictures, trained):
    """The smoke preset has 4 steps of stage 1 and 6 of stage 2."""
    folder, vae = trained[0], trained[2]
    cfg, run = open_run(tmp_path)
    stop_after(run, *stop)
    model, _ = latent.train(cfg, run, pictures)
    assert (model is None) == (stop[0] == "vae_log.csv")
    state = load_checkpoint(run.folder, ("latent",))
    assert state["step"] == stop[1]
    assert state["loop"] == ("vae" if stop[0] == "vae_log.csv" else "model")
    cfg, run = open_run(tmp_path, "--resume", run.folder)
    assert latent.train(cfg, run, pictures)[1].scale == vae.scale
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
