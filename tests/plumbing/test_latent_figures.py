"""What latent_diffusion_example.py and experiments/latent.py draw, measure and refuse."""

import importlib.util
import json
import math
from pathlib import Path

import latent_diffusion_example as latent
from common import plotting
from common.data import Data, load_images
from common.run import load_checkpoint
from common.run import open_run as open_any

import pytest
import torch
from conftest import ROOT, only_run, open_picture, spied
from torch.testing import assert_close

SMOKE = latent.PRESETS["smoke"]


def load(path):
    """A script of experiments/ as a module; the page of the same subject has another name."""
    spec = importlib.util.spec_from_file_location(f"experiments_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


experiment = load(ROOT / "experiments/latent.py")


def open_run(out, *argv):
    """(cfg, run) of the smoke preset with a few more arguments, as main opens them."""
    argv = ["--preset", "smoke", "--device", "cpu", "--out", str(out), *map(str, argv)]
    return open_any("latent", latent.Config, latent.PRESETS, latent.SAMPLING, argv)


@pytest.fixture(scope="module")
def pictures():
    """50 of the digits, 32 x 32."""
    data = load_images("digits", 32)
    return Data("digits", data.train[:40], data.test[:10], data.train_labels[:40],
                data.test_labels[:10], data.classes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures):
    """A run of both stages: (folder, U-Net, VAE)."""
    cfg, run = open_run(tmp_path_factory.mktemp("trained"), "--preview_every", 100)
    return run.folder, *latent.train(cfg, run, pictures)


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
    vae = latent.VAE(1, 4, 4, 8, 1, 4, 2).eval().requires_grad_(False)
    for parameter in vae.parameters():
        if not parameter.any():  # a layer that starts at zero
            torch.nn.init.normal_(parameter, std=0.3)
    vae.decoder[0].weight.mul_(0.3)
    vae.scale.fill_(3.0)
    z = torch.randn(9, 4, 8, 8)
    assert (vae.decode(z) - vae.decode(z / 3)).abs().mean() > 0.1
    return vae


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, trained, odd, pictures):
    """(figures, calls of the sampler, what they yielded, metrics), of the page and then of the
    experiment, from one checkpoint with the odd autoencoder.
    """
    out = tmp_path_factory.mktemp("drawn")
    state = torch.load(trained[0] / "checkpoint.pt", weights_only=True)
    torch.save(state | {"vae": odd.state_dict()}, out / "odd.pt")
    found = []
    for name, script in (("page", latent), ("experiment", experiment)):
        calls, figures = [], Pictures()

        def note(given, states, calls=calls):
            calls.append((given, states))

        with pytest.MonkeyPatch.context() as patch:
            process = latent.ddim_process
            patch.setattr(latent, "ddim_process", lambda *a, process=process: list(process(*a)))
            spied(patch, latent, "ddim_process", lambda given, out: note(given["a"], out))
            patch.setattr(latent, "plotting", figures)
            patch.setattr(experiment, "plotting", figures)
            for module in (latent, experiment):
                patch.setattr(module, "load_images", lambda *_: pictures)
            patch.setattr("common.quality.load_judge", lambda *_, **__: (None, {}))
            patch.setattr(experiment, "training_cost", lambda *_: dict(seconds=1, gflop=1, activations_mb=1))
            script.main(["--sample", str(out / "odd.pt"), "--out", str(out / name), "--device", "cpu",
                         "--S", "3", "--eta", "0.5", "--spacing", "quadratic", "--n_samples", "6",
                         "--eps_scale", "1.2"])
        metrics = json.loads((only_run(out / name, "latent") / "metrics.json").read_text())
        found.append((figures.drawn, calls, metrics))
    return found


# The page and its sampler


def test_the_flags_reach_the_sampler(drawn, trained):
    """S, eta, spacing and eps_scale; the network is the average, in eval mode."""
    (_, calls, found), (_, also, _) = drawn
    assert len(calls) == 2 and len(also) == 1  # samples.png and denoising.gif; prior.png
    average = trained[1].state_dict()
    for (model, zT, schedule, *flags), states in calls + also:
        assert flags == [3, 0.5, "quadratic"]
        assert [t for t, _ in states] == [50, 22, 5, 0]
        t = torch.full((len(zT),), 22)
        assert_close(model(zT, t), 1.2 * trained[1](zT, t))
        wanted = latent.make_schedule("linear", SMOKE.T).alpha_bars
        assert torch.equal(schedule.alpha_bars, wanted)
        assert_close(zT.std().item(), 1.0, rtol=0.1, atol=0)
    assert all(torch.isfinite(value).all() for value in average.values())
    assert found["sampling"]["network_calls"] == 3 and found["sampling"]["n"] == 6


def test_samples_are_decoded_at_the_scale_of_the_vae(drawn, odd, pictures):
    """Every figure decodes z / scale: samples, the film, reconstructions, the walk."""
    (figures, calls, _), (more, also, _) = drawn
    for x, (_, states) in ((figures["samples.png"][0], calls[0]), (more["neighbours.png"][0], also[0])):
        wanted = odd.decode(states[-1][1] / odd.scale).clamp(-1, 1)
        assert_close(x, wanted, rtol=1e-4, atol=1e-5)
    mean = odd.encode(pictures.test)[0]
    back = odd.decode(mean).clamp(-1, 1)
    x, x_hat = more["reconstructions.png"][0]
    assert torch.equal(x, pictures.test)
    assert_close(x_hat, back, rtol=1e-4, atol=1e-4)
    rows = more["walk.png"][0]
    assert_close(rows[0][[0, -1]], back[:2], rtol=1e-4, atol=1e-4)
    assert_close(rows[2][[0, -1]], back[2:4], rtol=1e-4, atol=1e-4)
    assert_close(rows[1][4], pictures.test[:2].mean(0))


def test_the_film_shows_the_decoded_z0_hat(drawn, odd):
    figures, calls, _ = drawn[0]
    film = figures["denoising.gif"][0]
    (model, _, schedule, *_), states = calls[1]
    assert [t for t, _ in film] == [t for t, _ in states]
    assert_close(film[-1][1], odd.decode(states[-1][1] / odd.scale).clamp(-1, 1), rtol=1e-4, atol=1e-4)
    t, zt = states[0]
    alpha_bar = schedule.alpha_bars[t]
    eps_hat = model(zt, torch.full((len(zt),), t)) / 1.2  # the network's own, without eps_scale
    z0_hat = (zt - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt()
    wanted = odd.decode(z0_hat / odd.scale).clamp(-1, 1)
    assert_close(film[0][1], wanted, rtol=1e-3, atol=1e-3)
    assert (wanted - odd.decode(zt / odd.scale).clamp(-1, 1)).abs().max() > 0.01


def test_the_preview_recovers_what_an_exact_network_knows(tmp_path, pictures, odd, monkeypatch):
    """z0_hat of the true noise, decoded, is the picture that the latents themselves give."""
    figures, vae = Pictures(), odd
    monkeypatch.setattr(latent, "plotting", figures)
    _, run = open_run(tmp_path)
    schedule = latent.make_schedule("linear", 20)
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


@pytest.mark.slow
def test_smoke_in_colour(tmp_path, capsys):
    latent.main(["--preset", "smoke", "--dataset", "color_digits", "--out", str(tmp_path)])
    folder = only_run(tmp_path, "latent")
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "vae_log.csv", "log.csv", "metrics.json", "checkpoint.pt", "preview.png",
        "samples.png", "loss.png", "denoising.gif"}
    assert len(open_picture(folder / "denoising.gif")) == 6  # at five t, and at 0
    found = json.loads((folder / "metrics.json").read_text())
    assert found["steps"] == 6 and found["vae_steps"] == 4
    for name, steps in (("vae_log.csv", 4), ("log.csv", 6)):
        assert len((folder / name).read_text().splitlines()) == 1 + steps
    state = load_checkpoint(folder, ("latent",))
    assert state["step"] == 6 and state["loop"] == "model" and state["vae"]["scale"] > 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.endswith(f"more: python experiments/latent.py --sample {folder}")


# experiments/latent.py


def test_the_experiment_draws_every_figure(trained, tmp_path, monkeypatch):
    experiment.main(["--sample", str(trained[0]), "--out", str(tmp_path), "--device", "cpu"])
    folder = only_run(tmp_path, "latent")
    for name in ("neighbours", "reconstructions", "latents", "histogram", "prior", "walk", "cost"):
        open_picture(folder / f"{name}.png")
    found = json.loads((folder / "metrics.json").read_text())
    assert math.isfinite(found["psnr_held_out"])
    cost = found["cost_of_a_step"]
    for name in ("latent", "pixel"):
        assert set(cost[name]) == {"seconds", "gflop", "activations_mb"}
        assert all(value > 0 for value in cost[name].values())
    ratio = cost["pixel_over_latent"]
    assert ratio["gflop"] > 10 and ratio["activations_mb"] > 5
    assert ratio["gflop"] == pytest.approx(cost["pixel"]["gflop"] / cost["latent"]["gflop"])


def test_the_cost_of_a_step_of_a_known_network():
    """A product of (8, 64) and (64, 32): 2 * 8 * 64 * 32 operations, twice (x has no gradient)."""
    model, x = torch.nn.Linear(64, 32, bias=False), torch.randn(8, 64)
    cost = experiment.training_cost(model, lambda: model(x).square().mean())
    assert cost["gflop"] == pytest.approx(2 * 2 * 8 * 64 * 32 / 1e9)
    kept = (8 * 64 + 8 * 32) * 4 / 1e6  # x, for the weight's gradient, and the output, for the square's
    assert cost["activations_mb"] == pytest.approx(kept, rel=0.05)


def test_psnr_of_a_known_error():
    x = torch.zeros(2, 1, 4, 4)
    assert_close(experiment.psnr(x, x + 0.2), torch.full((2,), 20.0), rtol=1e-4, atol=0)


def test_the_prior_is_that_of_the_latents_before_they_are_scaled(drawn, odd, pictures, tmp_path,
                                                                 monkeypatch):
    """prior.png decodes N(0, I) itself, histogram.png shows the scaled latents."""
    figures, _, _ = drawn[1]
    (_, alone), (_, diffusion), (_, real) = figures["prior.png"][0]
    assert torch.equal(diffusion, figures["neighbours.png"][0])
    assert torch.equal(real, pictures.test) and len(alone) == len(diffusion) == 25
    codes = []
    monkeypatch.setattr(latent, "decode_all", lambda _, z: codes.append(z) or diffusion)
    _, run = open_run(tmp_path)
    experiment.figure_prior(run, odd, pictures, diffusion)
    assert_close(codes[0].std(), odd.scale, rtol=0.05, atol=0)
    values, spectrum = figures["histogram.png"][0]
    mean, logvar = odd.encode(pictures.train)
    assert_close(values["histogram"].std(), 3 * (mean.var() + logvar.exp().mean()).sqrt(),
                 rtol=0.05, atol=0)
    _, variances, _ = spectrum["lines"]["latents"]
    assert_close(variances.sum(), values["histogram"].flatten(1).var(0).sum(), rtol=1e-3, atol=1e-3)
    assert (variances[:-1] >= variances[1:]).all()


def test_the_latents_are_shown_channel_by_channel(drawn, odd, pictures):
    x, *channels = drawn[1][0]["latents.png"][0]
    mean = odd.encode(pictures.test[:8])[0]
    assert torch.equal(x, pictures.test[:8]) and len(channels) == 4
    for i, z in enumerate(channels):
        assert_close(z[:, 0], mean[:, i] / mean[:, i].abs().max(), rtol=1e-4, atol=1e-5)


# Mistakes


def refused(capsys, main, *argv):
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, argv)))
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and said[-1].startswith("error: "), said
    return said[-1]


@pytest.mark.parametrize("argv, words", [
    (["--schedule", "cosine", "--T", "1000"], ["--schedule cosine", "alpha_bar_T", "1e-06"]),
    (["--schedule", "sqrt_linear"], ["--schedule", "'sqrt_linear'", "scaled_linear"]),
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
    said = refused(capsys, latent.main, "--preset", "smoke", "--out", tmp_path / "out", *argv)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, words", [
    (["--z_channels", 3], ["--z_channels 3", "4"]),
    (["--factor", 2], ["--factor 2", "4"]),
    (["--dataset", "color_digits"], ["--vae", "not a checkpoint that fits"]),
    (["--image_size", 64], ["--image_size 64", "made with 32"]),
], ids=lambda v: " ".join(map(str, v)))
def test_a_vae_that_does_not_fit(capsys, tmp_path, trained, argv, words):
    said = refused(capsys, latent.main, "--preset", "smoke", "--out", tmp_path / "out", "--vae",
                   trained[0], *argv)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("main, flag", [(latent.main, "--sample"), (experiment.main, "--sample"),
                                        (latent.main, "--vae")])
def test_a_checkpoint_without_its_scale(capsys, tmp_path, trained, main, flag):
    state = torch.load(trained[0] / "checkpoint.pt", weights_only=True)
    del state["vae"]["scale"]
    torch.save(state, tmp_path / "c.pt")
    preset = ["--preset", "smoke"] if flag == "--vae" else []
    said = refused(capsys, main, *preset, "--out", tmp_path / "out", flag, tmp_path / "c.pt")
    assert "not a checkpoint that fits" in said and not (tmp_path / "out").exists()


def test_a_run_stopped_in_stage_1_has_nothing_to_sample(capsys, tmp_path, trained):
    state = torch.load(trained[0] / "checkpoint.pt", weights_only=True)
    stage1 = {name: value for name, value in state.items() if name not in ("model", "ema")}
    torch.save(stage1 | {"loop": "vae", "step": 2}, tmp_path / "c.pt")
    for main in (latent.main, experiment.main):
        said = refused(capsys, main, "--out", tmp_path / "out", "--sample", tmp_path / "c.pt")
        assert "holds no ema" in said and not (tmp_path / "out").exists()


def test_a_run_stopped_in_stage_1_says_that_there_are_no_samples(capsys, tmp_path, monkeypatch):
    """As after Ctrl-C: the last lines say why, and main ends without an error."""
    monkeypatch.setattr(latent, "train", lambda cfg, run, data: (None, latent.make_vae(cfg, data.shape)))
    latent.main(["--preset", "smoke", "--device", "cpu", "--out", str(tmp_path)])
    assert "stopped in stage 1" in capsys.readouterr().out


def test_a_checkpoint_with_the_older_name_of_its_schedule_loads(capsys, tmp_path, trained):
    """And one with fields that the Config has no more: a line names them."""
    state = torch.load(trained[0] / "checkpoint.pt", weights_only=True)
    state["config"] |= {"schedule": "sqrt_linear", "adversarial": 0.5, "temperature": 0.9}
    torch.save(state, tmp_path / "c.pt")
    argv = ["--sample", str(tmp_path / "c.pt"), "--out", str(tmp_path / "out")]
    cfg, _ = open_any("latent", latent.Config, latent.PRESETS, latent.SAMPLING, argv)
    assert cfg.schedule == "scaled_linear"
    assert "adversarial, temperature" in capsys.readouterr().out
