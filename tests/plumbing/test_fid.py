"""experiments/fid.py: FID and Inception Score by torchvision's Inception v3, with a small stand-in for it."""

import json
import sys

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image
from torch import nn
from torch.testing import assert_close

sys.path.insert(0, str(ROOT / "experiments"))
import fid  # noqa: E402


class Inception(nn.Module):
    """In place of the real network: its features are the mean colours, its logits three times these."""

    def __init__(self):
        super().__init__()
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(3, 3, bias=False)
        nn.init.zeros_(self.fc.weight)

    def forward(self, x):
        assert x.shape[1:] == (3, 299, 299) and not self.training and not torch.is_grad_enabled()
        return self.fc(self.avgpool(x).flatten(1))


@pytest.fixture
def folder(tmp_path):
    """A run folder with samples of one colour each, of a data set of pictures like them."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (20, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for i, colour in enumerate(colours):
        Image.new("RGB", (8, 8), tuple(map(int, colour))).save(tmp_path / "pictures" / f"{i:02}.png")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(
        {"config": {"dataset": f"folder:{tmp_path / 'pictures'}", "image_size": 8, "channels": 32}}))
    (run / "metrics.json").write_text(json.dumps({"steps": 3}))
    samples = rng.integers(0, 256, (60, 3, 1, 1), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
    np.savez_compressed(run / "evaluated.npz", samples=samples)
    return run


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A hub cache with the stand-in's weights."""
    def inception_v3(weights, init_weights, transform_input):
        assert weights is None and not init_weights
        assert not transform_input  # images in [-1, 1], as the network was trained with
        return Inception()

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torchvision.models, "inception_v3", inception_v3)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save({"fc.weight": 3 * torch.eye(3)},
               tmp_path / "hub" / "checkpoints" / "inception_v3_google-0cc3c7bd.pth")


def test_both_scores_are_printed_and_added(folder, weights, capsys):
    """Both are those of the mean colours, in [-1, 1]; the real ones are of the training part alone."""
    fid.main([str(folder)])
    found = json.loads((folder / "metrics.json").read_text())
    assert found.pop("steps") == 3 and set(found) == {"fid_torchvision", "inception_score_torchvision"}
    pictures = fid.load_images(f"folder:{folder.parent / 'pictures'}", 8).train
    real = pictures.mean((2, 3)).double().numpy()
    fake = np.load(folder / "evaluated.npz")["samples"].mean((2, 3)) / 127.5 - 1
    assert 0 < len(real) < 20
    assert found["fid_torchvision"] == pytest.approx(fid.frechet_distance(real, fake), rel=1e-4)
    p = torch.from_numpy(3 * fake).softmax(1)
    kl = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert found["inception_score_torchvision"] == pytest.approx(kl.exp().item(), rel=1e-4)
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert {name: float(value) for name, value in printed.items()} == pytest.approx(found, abs=1e-3)


def test_grey_images_are_seen_in_three_channels():
    x = torch.rand(3, 1, 8, 8)
    features, p = fid.look(Inception().eval(), x, batch_size=2)
    assert_close(features, x.mean((2, 3)).expand(-1, 3).double().numpy(), rtol=1e-5, atol=1e-5)
    assert_close(p, torch.full((3, 3), 1 / 3))
    assert features.dtype == np.float64


@pytest.mark.parametrize("missing", ["config.json", "evaluated.npz"])
def test_what_a_run_folder_lacks_is_told_in_one_line(folder, weights, capsys, missing):
    (folder / missing).unlink()
    with pytest.raises(SystemExit) as stop:
        fid.main([str(folder)])
    said, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said.startswith(f"error: {folder / missing}: is missing")
    assert "--evaluate 500" in said or missing == "config.json"


def test_without_the_weights_one_line_says_where_they_go(folder, weights, tmp_path, capsys):
    file = tmp_path / "hub" / "checkpoints" / "inception_v3_google-0cc3c7bd.pth"
    file.unlink()
    with pytest.raises(SystemExit) as stop:
        fid.main([str(folder)])
    said, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said.startswith(f"error: {file}: the weights of Inception v3 are missing")
    assert "https://" in said and json.loads((folder / "metrics.json").read_text()) == {"steps": 3}


@pytest.mark.slow
def test_the_real_network_loads_and_looks(tmp_path, monkeypatch):
    """With weights drawn here: 2,048 features, 1,000 classes."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    made = torchvision.models.inception_v3(weights=None, init_weights=False)
    torch.save(made.state_dict(), tmp_path / "checkpoints" / "inception_v3_google-0cc3c7bd.pth")
    features, p = fid.look(fid.load_inception(), torch.zeros(1, 1, 8, 8))
    assert features.shape == (1, 2048) and p.shape == (1, 1000)
    assert_close(p.sum(1), torch.ones(1))
