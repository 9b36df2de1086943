"""What latent_diffusion_example.py and experiments/latent.py draw and refuse."""

import json

import latent_diffusion_example as latent
from common.data import Data, load_images
from common.run import open_run as open_any

import pytest
import torch
from conftest import experiment, only_run, open_run, spied
from torch.testing import assert_close

figures = experiment("latent")


@pytest.fixture(scope="module")
def pictures():
    """50 of the digits, 32 x 32."""
    data = load_images("digits", 32)
    return Data("digits", data.train[:40], data.test[:10], data.train_labels[:40],
                data.test_labels[:10], data.classes)


@pytest.fixture(scope="module")
def odd():
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


@pytest.fixture
def drawn(finished, odd, pictures, drawings, tmp_path, monkeypatch):
    """drawn(script): (figures, calls of the sampler with their states, metrics) of its main.

    From the checkpoint of a smoke run with the odd autoencoder in place of its own.
    """
    state = torch.load(finished(latent)[0] / "checkpoint.pt", weights_only=True)
    calls, process = [], latent.ddim_process
    monkeypatch.setattr(latent, "ddim_process", lambda *args: list(process(*args)))
    spied(monkeypatch, latent, "ddim_process", lambda given, states: calls.append((given["args"], states)))
    for script in (latent, figures):
        monkeypatch.setattr(script, "load_images", lambda *_: pictures)
    monkeypatch.setattr("common.quality.load_judge", lambda *_, **__: (None, {}))
    costs = iter([dict(seconds=1, gflop=2, activations_mb=3), dict(seconds=10, gflop=40, activations_mb=90)])
    monkeypatch.setattr(figures, "training_cost", lambda *_: next(costs))
    torch.save(state | {"vae": odd.state_dict()}, tmp_path / "odd.pt")

    def run(script):
        script.main(["--sample", str(tmp_path / "odd.pt"), "--out", str(tmp_path), "--device", "cpu", "--S", "3",
                     "--eta", "0.5", "--spacing", "quadratic", "--n_samples", "6", "--eps_scale", "1.2"])
        return drawings, calls, json.loads((only_run(tmp_path, "latent") / "metrics.json").read_text())
    return run


def decoded(vae, z):
    """Scaled latents as pictures."""
    return vae.decode(z / vae.scale).clamp(-1, 1)


@pytest.mark.slow
def test_samples_and_film_are_decoded_at_the_scale_of_the_vae(drawn, odd):
    """The film shows z0_hat of the network itself, without eps_scale."""
    shown, calls, _ = drawn(latent)
    (_, states), ((model, _, schedule, *_), of_film) = calls
    assert_close(shown["samples.png"]["drawn"], decoded(odd, states[-1][1]), rtol=1e-4, atol=1e-5)
    film = shown["denoising.gif"]["states"]
    assert [t for t, _ in film] == [t for t, _ in of_film] == [50, 22, 5, 0]
    assert_close(film[-1][1], decoded(odd, of_film[-1][1]), rtol=1e-4, atol=1e-4)
    for (t, zt), (_, frame) in zip(of_film[:-1], film[:-1], strict=True):
        eps_hat = model(zt, torch.full((len(zt),), t)) / 1.2
        wanted = decoded(odd, latent.predict_x0(zt, eps_hat, t, schedule.alpha_bars))
        assert_close(frame, wanted, rtol=1e-3, atol=1e-3)
        assert (wanted - decoded(odd, zt)).abs().max() > 0.01


@pytest.mark.slow
def test_the_figures_of_the_experiment_are_what_their_labels_say(drawn, odd, pictures, finished, monkeypatch):
    codes = []
    spied(monkeypatch, latent, "decode_all", lambda given, x: codes.append((given["z"], x)))
    shown, calls, metrics = drawn(figures)
    mean, back = odd.encode(pictures.test)[0], odd.decode(odd.encode(pictures.test)[0]).clamp(-1, 1)

    ((model, zT, schedule, *flags), states), = calls  # samples: by the scaled average
    average = latent.UNet(4, 8, 8, (1, 2), 1, (4,), 1, 4, 0.0, 1).eval()
    average.load_state_dict(torch.load(finished(latent)[0] / "checkpoint.pt", weights_only=True)["ema"])
    t = torch.full((len(zT),), 22)
    assert flags == [3, 0.5, "quadratic"] and schedule.T == 50 and len(zT) == 25
    assert_close(model(zT, t), 1.2 * average(zT, t))
    samples = shown["neighbours.png"]["drawn"]
    assert_close(samples, decoded(odd, states[-1][1]), rtol=1e-4, atol=1e-5)

    x, x_hat = shown["reconstructions.png"]["rows"]
    decibels = figures.psnr(pictures.test, back)
    assert torch.equal(x, pictures.test) and shown["reconstructions.png"]["row_labels"] == ["original", "decoded"]
    assert_close(x_hat, back, rtol=1e-4, atol=1e-4)
    assert shown["reconstructions.png"]["column_labels"] == [f"{value:.1f} dB" for value in decibels.tolist()]
    assert metrics["psnr_held_out"] == pytest.approx(decibels.mean().item(), rel=1e-3)

    walk = shown["walk.png"]
    assert walk["row_labels"] == ["latents", "pixels"] * 2
    for i, pair in ((0, pictures.test[:2]), (2, pictures.test[2:4])):
        z = odd.encode(pair)[0]
        assert_close(walk["rows"][i][2], odd.decode(0.75 * z[:1] + 0.25 * z[1:])[0].clamp(-1, 1), rtol=1e-4, atol=1e-4)
        assert_close(walk["rows"][i + 1][2], 0.75 * pair[0] + 0.25 * pair[1])

    x, *channels = shown["latents.png"]["rows"]
    assert torch.equal(x, pictures.test[:8]) and shown["latents.png"]["row_labels"][:2] == ["image", "channel 1"]
    for i, z in enumerate(channels):
        assert_close(z[:, 0], mean[:8, i] / mean[:8, i].abs().max(), rtol=1e-4, atol=1e-5)

    (title, alone), (of_samples, diffusion), (_, real) = shown["prior.png"]["parts"]
    assert "N(0, I)" in title and "samples" in of_samples
    assert torch.equal(diffusion, samples) and torch.equal(real, pictures.test)
    (z,) = [z for z, x in codes if x is alone]  # N(0, I) is what a VAE alone would decode, unscaled
    assert_close(z.std(), odd.scale, rtol=0.05, atol=0)

    values, spectrum = shown["histogram.png"]["parts"]
    mean, logvar = odd.encode(pictures.train)
    std = (mean.var() + logvar.exp().mean()).sqrt()
    assert_close(values["histogram"].std(), 3 * std, rtol=0.05, atol=0)
    before = float(values["title"].split(",")[0].removeprefix("std "))
    assert before == pytest.approx(std.item(), rel=0.05) and values["title"].endswith("scaled by 3.000")
    _, variances, _ = spectrum["lines"]["latents"]
    assert_close(variances.sum(), values["histogram"].flatten(1).var(0).sum(), rtol=1e-3, atol=1e-3)
    _, of_noise, _ = spectrum["lines"]["as many draws of N(0, I)"]
    assert of_noise.sum().item() == pytest.approx(256, rel=0.05)

    seconds, gflop, memory = shown["cost.png"]["parts"]  # the stand-ins: first on latents, then on pixels
    assert [part["bars"] for part in (seconds, gflop, memory)] == [
        (["latent", "pixel"], [1, 10]), (["latent", "pixel"], [2, 40]), (["latent", "pixel"], [3, 90])]
    assert [part["title"] for part in (seconds, gflop, memory)] == [
        "seconds: 10 times", "10^9 operations: 20 times", "activations, MB: 30 times"]


def test_the_preview_recovers_what_an_exact_network_knows(drawings, tmp_path, pictures, odd):
    """z0_hat of the true noise, decoded, is the picture that the latents themselves give."""
    schedule, mean = latent.make_schedule("linear", 20), odd.encode(pictures.test[:6])[0]
    z0 = odd.scale * mean

    def exact(zt, t):
        alpha_bar = schedule.alpha_bars[t].view(-1, 1, 1, 1)
        eps_hat = (zt - alpha_bar.sqrt() * z0) / (1 - alpha_bar).sqrt()
        assert_close(eps_hat, eps, rtol=1e-3, atol=1e-3)  # z_t is the scaled z_0 and noise
        return eps_hat

    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    latent.figure_preview(open_run(latent, tmp_path)[1], exact, odd, pictures, schedule, 1)
    rows, labels = drawings["preview.png"]["rows"], drawings["preview.png"]["row_labels"]
    assert torch.equal(rows[0], pictures.test[:6]) and labels[2::2] == ["z0_hat"] * 4
    for row in rows[2::2]:
        assert_close(row, odd.decode(mean).clamp(-1, 1), rtol=1e-3, atol=1e-3)
    for label, row in zip(labels[1::2], rows[1::2], strict=True):
        zt = latent.q_sample(z0, int(label.removeprefix("z_t, t = ")), eps, schedule.alpha_bars)
        assert_close(row, latent.decode_all(odd, zt), rtol=1e-3, atol=1e-3)


def test_the_cost_of_a_step_of_a_known_network():
    """A product of (8, 64) and (64, 32): 2 * 8 * 64 * 32 operations, twice (x has no gradient)."""
    model, x = torch.nn.Linear(64, 32, bias=False), torch.randn(8, 64)
    cost = figures.training_cost(model, lambda: model(x).square().mean())
    assert cost["gflop"] == pytest.approx(2 * 2 * 8 * 64 * 32 / 1e9)
    kept = (8 * 64 + 8 * 32) * 4 / 1e6  # x, for the weight's gradient, and the output, for the square's
    assert cost["activations_mb"] == pytest.approx(kept, rel=0.05)


def test_psnr_of_a_known_error():
    x = torch.zeros(2, 1, 4, 4)
    assert_close(figures.psnr(x, x + 0.2), torch.full((2,), 20.0), rtol=1e-4, atol=0)


# Mistakes


def refused(capsys, main, *argv):
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, argv)))
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and said[-1].startswith("error: "), said
    return said[-1]


@pytest.mark.parametrize("argv, words", [
    (["--z_channels", 3], ["--z_channels 3", "4"]),
    (["--factor", 2], ["--factor 2", "4"]),
    (["--dataset", "color_digits"], ["--vae", "not a checkpoint that fits"]),
    (["--image_size", 64], ["--image_size 64", "made with 32"]),
], ids=lambda v: " ".join(map(str, v)))
def test_a_vae_that_does_not_fit(capsys, tmp_path, finished, argv, words):
    said = refused(capsys, latent.main, "--preset", "smoke", "--out", tmp_path / "out", "--vae",
                   finished(latent)[0], *argv)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("main, flag", [(latent.main, "--sample"), (figures.main, "--sample"),
                                        (latent.main, "--vae")])
def test_a_checkpoint_without_its_scale(capsys, tmp_path, finished, main, flag):
    state = torch.load(finished(latent)[0] / "checkpoint.pt", weights_only=True)
    del state["vae"]["scale"]
    torch.save(state, tmp_path / "c.pt")
    preset = ["--preset", "smoke"] if flag == "--vae" else []
    said = refused(capsys, main, *preset, "--out", tmp_path / "out", flag, tmp_path / "c.pt")
    assert "not a checkpoint that fits" in said and not (tmp_path / "out").exists()


def test_a_run_stopped_in_stage_1_has_nothing_to_sample(capsys, tmp_path, finished):
    state = torch.load(finished(latent)[0] / "checkpoint.pt", weights_only=True)
    stage1 = {name: value for name, value in state.items() if name not in ("model", "ema")}
    torch.save(stage1 | {"loop": "vae", "step": 2}, tmp_path / "c.pt")
    for main in (latent.main, figures.main):
        said = refused(capsys, main, "--out", tmp_path / "out", "--sample", tmp_path / "c.pt")
        assert "holds no ema" in said and not (tmp_path / "out").exists()


def test_a_run_stopped_in_stage_1_says_that_there_are_no_samples(capsys, tmp_path, monkeypatch):
    """As after Ctrl-C: the last lines say why, and main ends without an error."""
    monkeypatch.setattr(latent, "train", lambda cfg, run, data: (None, latent.make_vae(cfg, data.shape)))
    latent.main(["--preset", "smoke", "--device", "cpu", "--out", str(tmp_path)])
    assert "stopped in stage 1" in capsys.readouterr().out


def test_a_checkpoint_with_the_older_name_of_its_schedule_loads(capsys, tmp_path, finished):
    """And one with fields that the Config has no more: a line names them."""
    state = torch.load(finished(latent)[0] / "checkpoint.pt", weights_only=True)
    state["config"] |= {"schedule": "sqrt_linear", "adversarial": 0.5, "temperature": 0.9}
    torch.save(state, tmp_path / "c.pt")
    argv = ["--sample", str(tmp_path / "c.pt"), "--out", str(tmp_path / "out")]
    cfg, _ = open_any("latent", latent.Config, latent.PRESETS, latent.SAMPLING, argv)
    assert cfg.schedule == "scaled_linear"
    assert "adversarial, temperature" in capsys.readouterr().out
