"""What latent_diffusion_example.py and experiments/latent.py draw and refuse."""

import json

import latent_diffusion_example as latent
from common.data import Data, load_images
from common.run import open_run as open_any

import pytest
import torch
from conftest import experiment, only_run, open_run, spied
from torch.testing import assert_close

pytestmark = pytest.mark.slow  # the file as a whole

figures = experiment("latent")
RUN = "--dataset", "digits8", "--image_size", "16"


@pytest.fixture(scope="module")
def pictures():
    """50 of the digits, 16 x 16."""
    data = load_images("digits8", 16)
    return Data("digits8", data.train[:40], data.test[:10], data.train_labels[:40], data.test_labels[:10], data.classes)


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
    z = torch.randn(9, 4, 4, 4)
    assert (vae.decode(z) - vae.decode(z / 3)).abs().mean() > 0.1
    return vae


@pytest.fixture
def stored(finished):
    """The checkpoint of a smoke run."""
    return torch.load(finished(latent, *RUN)[0] / "checkpoint.pt", weights_only=True)


@pytest.fixture
def drawn(stored, odd, pictures, drawings, tmp_path, monkeypatch):
    """drawn(script): (figures, calls of the sampler with their states, metrics) of its main.

    From the checkpoint of a smoke run with the odd autoencoder in place of its own.
    """
    calls, process = [], latent.ddim_process
    monkeypatch.setattr(latent, "ddim_process", lambda *args: list(process(*args)))
    spied(monkeypatch, latent, "ddim_process", lambda given, states: calls.append((given["args"], states)))
    for script in (latent, figures):
        monkeypatch.setattr(script, "load_images", lambda *_: pictures)
    costs = iter([dict(seconds=1, gflop=2, activations_mb=3), dict(seconds=10, gflop=40, activations_mb=90)])
    monkeypatch.setattr(figures, "training_cost", lambda *_: next(costs))
    torch.save(stored | {"vae": odd.state_dict()}, tmp_path / "odd.pt")

    def run(script):
        script.main(["--sample", str(tmp_path / "odd.pt"), "--out", str(tmp_path), "--device", "cpu", "--S", "3",
                     "--eta", "0.5", "--spacing", "quadratic", "--n_samples", "6", "--eps_scale", "1.2"])
        return drawings, calls, json.loads((only_run(tmp_path, "latent") / "metrics.json").read_text())
    return run


def decoded(vae, z):
    """Scaled latents as pictures."""
    return vae.decode(z / vae.scale).clamp(-1, 1)


def test_samples_and_film_are_decoded_at_the_scale_of_the_vae(drawn, odd):
    """The film shows z0_hat of the network itself, without eps_scale."""
    shown, calls, _ = drawn(latent)
    (_, states), ((model, _, schedule, *_), of_film) = calls
    film = shown["denoising.gif"]["states"]
    assert_close(shown["samples.png"]["drawn"], decoded(odd, states[-1][1]), rtol=1e-4, atol=1e-4)
    assert [t for t, _ in film] == [t for t, _ in of_film] == [50, 22, 5, 0]
    assert_close(film[-1][1], decoded(odd, of_film[-1][1]), rtol=1e-4, atol=1e-4)
    for (t, zt), (_, frame) in zip(of_film[:-1], film[:-1], strict=True):
        eps_hat = model(zt, torch.full((len(zt),), t)) / 1.2
        wanted = decoded(odd, latent.predict_x0(zt, eps_hat, t, schedule.alpha_bars))
        assert_close(frame, wanted, rtol=1e-3, atol=1e-3)
        assert (wanted - decoded(odd, zt)).abs().max() > 0.01


def test_the_figures_of_the_experiment_are_what_their_labels_say(drawn, odd, pictures, stored, monkeypatch):
    codes = []
    spied(monkeypatch, latent, "decode_all", lambda given, x: codes.append((given["z"], x)))
    shown, calls, metrics = drawn(figures)
    real, samples, close = pictures.test, shown["neighbours.png"]["drawn"], dict(rtol=1e-4, atol=1e-4)
    mean, _ = odd.encode(real)

    ((model, zT, schedule, *flags), states), = calls  # samples: by the scaled average
    average = latent.UNet(4, 4, 8, (1, 2), 1, (4,), 1, 4, 0.0, 1).eval()
    average.load_state_dict(stored["ema"])
    t = torch.full((len(zT),), 22)
    assert flags == [3, 0.5, "quadratic"] and schedule.T == 50 and len(zT) == 25
    assert_close(model(zT, t), 1.2 * average(zT, t))
    assert_close(samples, decoded(odd, states[-1][1]), **close)

    table, back = shown["reconstructions.png"], odd.decode(mean).clamp(-1, 1)
    decibels = figures.psnr(real, back)
    assert torch.equal(table["rows"][0], real) and table["row_labels"] == ["original", "decoded"]
    assert_close(table["rows"][1], back, **close)
    assert table["column_labels"] == [f"{value:.1f} dB" for value in decibels.tolist()]
    assert metrics["psnr_held_out"] == pytest.approx(decibels.mean().item(), rel=1e-3)

    walk = shown["walk.png"]
    assert walk["row_labels"] == ["latents", "pixels"] * 2
    for i in (0, 2):
        z = 0.75 * mean[i] + 0.25 * mean[i + 1]
        assert_close(walk["rows"][i][2], odd.decode(z[None])[0].clamp(-1, 1), **close)
        assert_close(walk["rows"][i + 1][2], 0.75 * real[i] + 0.25 * real[i + 1])

    x, *channels = shown["latents.png"]["rows"]
    assert torch.equal(x, real[:8]) and shown["latents.png"]["row_labels"][:2] == ["image", "channel 1"]
    for i, z in enumerate(channels):
        assert_close(z[:, 0], mean[:8, i] / mean[:8, i].abs().max(), **close)

    (title, alone), (of_samples, diffusion), (_, held_out) = shown["prior.png"]["parts"]
    assert "N(0, I)" in title and "samples" in of_samples
    assert torch.equal(diffusion, samples) and torch.equal(held_out, real)
    (z,) = [z for z, x in codes if x is alone]  # N(0, I) is what a VAE alone would decode, unscaled
    assert_close(z.std(), odd.scale, rtol=0.09, atol=0)

    values, spectrum = shown["histogram.png"]["parts"]
    mean, logvar = odd.encode(pictures.train)
    std = (mean.var() + logvar.exp().mean()).sqrt()
    assert_close(values["histogram"].std(), 3 * std, rtol=0.08, atol=0)
    before = float(values["title"].split(",")[0].removeprefix("std "))
    assert before == pytest.approx(std.item(), rel=0.08) and values["title"].endswith("scaled by 3.000")
    (_, variances, _), (_, of_noise, _) = spectrum["lines"].values()
    assert list(spectrum["lines"]) == ["latents", "as many draws of N(0, I)"]
    assert_close(variances.sum(), values["histogram"].flatten(1).var(0).sum(), rtol=1e-3, atol=1e-3)
    assert of_noise.sum().item() == pytest.approx(64, rel=0.14)

    # The stand-ins: first on latents, then on pixels
    assert [(part["title"], part["bars"]) for part in shown["cost.png"]["parts"]] == [
        ("seconds: 10 times", (["latent", "pixel"], [1, 10])),
        ("10^9 operations: 20 times", (["latent", "pixel"], [2, 40])),
        ("activations, MB: 30 times", (["latent", "pixel"], [3, 90]))]


def test_the_preview_recovers_what_an_exact_network_knows(drawings, tmp_path, pictures, odd):
    """z0_hat of the true noise, decoded, is the picture that the latents themselves give."""
    schedule, mean = latent.make_schedule("linear", 20), odd.encode(pictures.test[:6])[0]
    z0 = odd.scale * mean
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))

    def exact(zt, t):
        alpha_bar = schedule.alpha_bars[t].view(-1, 1, 1, 1)
        eps_hat = (zt - alpha_bar.sqrt() * z0) / (1 - alpha_bar).sqrt()
        assert_close(eps_hat, eps, rtol=1e-3, atol=1e-3)  # z_t is the scaled z_0 and noise
        return eps_hat

    latent.figure_preview(open_run(latent, tmp_path, *RUN)[1], exact, odd, pictures, schedule, 1)
    rows, labels = drawings["preview.png"]["rows"], drawings["preview.png"]["row_labels"]
    assert torch.equal(rows[0], pictures.test[:6]) and labels[2::2] == ["z0_hat"] * 4
    for label, noisy, recovered in zip(labels[1::2], rows[1::2], rows[2::2], strict=True):
        zt = latent.q_sample(z0, int(label.removeprefix("z_t, t = ")), eps, schedule.alpha_bars)
        assert_close(noisy, latent.decode_all(odd, zt), rtol=1e-3, atol=1e-3)
        assert_close(recovered, odd.decode(mean).clamp(-1, 1), rtol=1e-3, atol=1e-3)


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

FITS = "not a checkpoint that fits"


@pytest.mark.parametrize("script, flag, lost, argv, words", [
    (latent, "--vae", None, ["--z_channels", "3"], ["--z_channels 3", "4"]),
    (latent, "--vae", None, ["--factor", "2"], ["--factor 2", "4"]),
    (latent, "--vae", None, ["--dataset", "color_digits"], ["--vae", FITS]),
    (latent, "--vae", None, ["--image_size", "32"], ["--image_size 32", "made with 16"]),
    (latent, "--vae", "scale", [], ["--vae", FITS]),
    (latent, "--sample", "scale", [], ["--sample", FITS]),
    (figures, "--sample", "scale", [], ["--sample", FITS]),
    (latent, "--sample", "ema", [], ["--sample", "holds no ema"]),  # as if stopped in stage 1
    (figures, "--sample", "ema", [], ["--sample", "holds no ema"])])
def test_a_checkpoint_that_does_not_fit_is_refused(script, flag, lost, argv, words, stored, tmp_path, capsys):
    stored.pop(lost, None)
    stored["vae"].pop(lost, None)
    torch.save(stored, tmp_path / "c.pt")
    of_training = ["--preset", "smoke", *RUN] if flag == "--vae" else []
    with pytest.raises(SystemExit) as stop:
        script.main([*of_training, "--out", str(tmp_path / "out"), flag, str(tmp_path / "c.pt"), *argv])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and said.startswith("error: ") and all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_a_run_stopped_in_stage_1_says_that_there_are_no_samples(capsys, tmp_path, monkeypatch):
    """As after Ctrl-C: the last lines say why, and main ends without an error."""
    monkeypatch.setattr(latent, "train", lambda cfg, run, data: (None, latent.make_vae(cfg, data.shape)))
    latent.main(["--preset", "smoke", "--device", "cpu", "--out", str(tmp_path), *RUN])
    assert "stopped in stage 1" in capsys.readouterr().out


def test_a_checkpoint_with_the_older_name_of_its_schedule_loads(capsys, tmp_path, stored):
    """And one with fields that the Config has no more: a line names them."""
    stored["config"] |= {"schedule": "sqrt_linear", "adversarial": 0.5, "temperature": 0.9}
    torch.save(stored, tmp_path / "c.pt")
    argv = ["--sample", str(tmp_path / "c.pt"), "--out", str(tmp_path / "out")]
    cfg, _ = open_any("latent", latent.Config, latent.PRESETS, latent.SAMPLING, argv)
    assert cfg.schedule == "scaled_linear" and "adversarial, temperature" in capsys.readouterr().out
