"""What experiments/ncsnpp.py trains, draws and keeps."""

import json
import sys

import score_based_diffusion_example as sb
from common import plotting
from common import run as runs
from common.data import load_images

import pytest
import torch
from conftest import ROOT, only_run, open_picture, spied

sys.path.append(str(ROOT / "experiments"))
import ncsnpp  # noqa: E402


@pytest.mark.slow
def test_a_run_trains_and_draws_and_its_checkpoint_draws_again(tmp_path, monkeypatch):
    seen = []
    spied(monkeypatch, sb, "score_loss", lambda given, _: seen.append(given))
    ncsnpp.main(["--preset", "smoke", "--dataset", "digits8", "--attention", "4", "--device", "cpu",
                 "--out", str(tmp_path / "a")])
    folder = only_run(tmp_path / "a", "ncsnpp")
    for name in ("samples.png", "preview.png", "denoising.gif", "loss.png"):
        open_picture(folder / name)
    training = [given for given in seen if given["density"] is not None]
    assert len(training) == 6 and all(isinstance(given["model"], ncsnpp.UNet) for given in training)
    assert all(isinstance(given["sde"], sb.VESDE) for given in training)
    pixels = (training[0]["x0"] + 1) * 8  # digits8 has 17 shades, of which none is left as it was
    assert (pixels - pixels.round()).abs().max() > 0.01
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["script"] == "ncsnpp" and state["config"]["biggan"] is True

    drawn = []
    monkeypatch.setattr(plotting, "samples", lambda path, samples, data, title: drawn.append(samples))
    monkeypatch.setattr(sb, "figure_denoising", lambda *args: None)
    monkeypatch.setattr(sb, "figure_loss", lambda *args: None)
    ncsnpp.main(["--sample", str(folder), "--device", "cpu", "--likelihood", "0", "--out", str(tmp_path / "b")])
    assert drawn[0].shape == (4, 1, 8, 8) and drawn[0].isfinite().all()
    found = json.loads((only_run(tmp_path / "b", "ncsnpp") / "metrics.json").read_text())
    assert found["sampling"]["n"] == 4 and found["sampling"]["sampler"] == "pc"


def test_the_average_is_returned_in_eval_mode(tmp_path, monkeypatch):
    argv = ["--preset", "smoke", "--dataset", "digits8", "--attention", "4", "--device", "cpu", "--out",
            str(tmp_path), "--sde", "vp", "--no-fir", "--no-dequantize", "--preview_every", "100"]
    cfg, run = runs.open_run("ncsnpp", ncsnpp.Config, ncsnpp.PRESETS, ncsnpp.SAMPLING, argv)
    data, seen = run.load(load_images, cfg.dataset, cfg.image_size), []
    spied(monkeypatch, sb, "score_loss", lambda given, _: seen.append(given))
    model = sb.train(cfg, run, data, ncsnpp.make_network(cfg, data.shape))
    assert not model.training and model.fourier is None
    assert model.sigma_data.item() == pytest.approx(data.train.std().item())
    assert any((a != b).any() for a, b in zip(model.parameters(), seen[0]["model"].parameters(), strict=True))
    assert torch.cdist(seen[0]["x0"].flatten(1), data.train.flatten(1)).min(1).values.max() < 1e-2
