"""Quality: the judge, how it is made and kept, distances against closed forms, the scores, experiments/fid.py."""

import dataclasses
import json
import math
import pathlib
import shutil

from common import data, quality

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, experiment
from PIL import Image
from torch import nn
from torch.testing import assert_close

fid = experiment("fid")

# The judges: those that are shipped, and how another is made


@pytest.mark.slow
@pytest.mark.parametrize("size", [28, 32])
def test_the_shipped_judge_reads_digits_and_nothing_else(size, monkeypatch):
    monkeypatch.setattr(data, "CACHE", ROOT / "no such folder")
    digits = data.load_images("digits", size)
    judge, of_held_out = quality.load_judge(digits, fit=False)
    assert judge is not None, "not of these digits: python experiments/judge.py"
    assert of_held_out["accuracy"] >= 0.95 and of_held_out["legible"] >= 0.93
    legible = {name: quality.legible_fraction(quality.probabilities(judge, x)) for name, x in
               experiment("judge").pictures(digits.test[::8], digits.test_labels[::8]).items()}
    assert legible["with noise of 0.05"] >= 0.9  # as a sampler may leave it
    for name in ("uniform noise", "Gaussian noise", "Gaussian noise of 0.3", "smooth noise", "smooth noise of 0.3",
                 "black", "grey", "white", "x_t at t = T/2", "alpha_bar = 0.5"):
        assert legible[name] == 0, name
    for name in ("two digits, the maximum", "two digits, the mean", "4 x 4 blocks, shuffled"):
        assert legible[name] < 0.10, name
    for file in (ROOT / "pretrained").glob("judge_*.pt"):
        assert file.stat().st_size <= 250_000


def halves():
    """200 labelled 8 x 8 pictures of two kinds, bright below (a) or bright above (b); 50 are held out."""
    x, y = torch.rand(200, 1, 8, 8) - 1, torch.arange(200) % 2
    x[y == 1, :, :4] += 1
    x[y == 0, :, 4:] += 1
    return data.Data("toy", x[:150], x[150:], y[:150], y[150:], ("a", "b"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder in place of data/, and two steps of training."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(quality, "FEWEST", 2)
    monkeypatch.setattr(quality, "MOST", 2)
    return tmp_path / "cache"


def test_a_picture_of_no_class_is_made_of_two_classes(monkeypatch):
    y = torch.tensor([0] * 30 + [1, 2])  # by chance the second picture would mostly be of the same class
    monkeypatch.setattr(quality, "NONE", (lambda a, b: b,))
    assert (quality.none_of_these(y.float(), y) != y).all()


@pytest.mark.parametrize("shape, n, classes", [((1, 8, 8), 40, 8), ((3, 9, 14), 3, 1), ((3, 64, 64), 4, 2)])
def test_a_judge_of_any_shape_and_of_a_few_pictures(shape, n, classes, cache):
    x, y = torch.rand(n, *shape) * 2 - 1, torch.arange(n) % classes
    made = data.Data("toy", x[2:], x[:2], y[2:], y[:2], tuple("abcdefgh"[:classes]))
    judge, of_held_out = quality.load_judge(made)
    p = judge(made.test).softmax(1)
    assert p.shape == (2, classes + 1) and not judge.training and not any(w.requires_grad for w in judge.parameters())
    found = quality.features(judge, made.test, batch_size=1)  # of the last layer but one
    assert found.shape == (2, 64) and found.dtype == np.float64
    assert_close(judge.head(torch.from_numpy(found).float()).softmax(1), p)
    assert_close(quality.probabilities(judge, made.test, batch_size=1), p)
    right = (p.argmax(1) == made.test_labels).float().mean().item()
    assert of_held_out == {"accuracy": right, "legible": quality.legible_fraction(p)}
    (file,) = cache.iterdir()
    assert file.stat().st_size < 300_000
    json.dumps(quality.scores(torch.randn(10, *shape), made), allow_nan=False)  # of very small data too


def test_a_judge_learns_its_classes_and_leaves_the_random_state_alone(cache, monkeypatch):
    monkeypatch.setattr(quality, "FEWEST", 40)
    monkeypatch.setattr(quality, "MOST", 40)
    made, state = halves(), torch.get_rng_state()
    judge, of_held_out = quality.load_judge(made)
    assert torch.equal(state, torch.get_rng_state()) and of_held_out["accuracy"] > 0.8
    p = quality.probabilities(judge, 2 * torch.rand_like(made.train) - 1)
    assert p.shape == (150, 3) and (p.argmax(1) == 2).float().mean() > 0.8


def test_a_judge_is_trained_once_for_its_data_and_never_for_a_glance(cache):
    made = halves()
    assert quality.load_judge(made, fit=False) == (None, {}) and not cache.exists()
    assert set(quality.glance(made.test, made)) == {"n", "nearest_train_rms_mean", "nearest_train_rms_min"}
    judge, _ = quality.load_judge(made)
    for fit in (True, False):
        again, _ = quality.load_judge(made, fit)
        assert torch.equal(again(made.test), judge(made.test))
    assert "legible" in quality.glance(made.test, made) and len(list(cache.iterdir())) == 1
    bit = made.train.clone()
    bit[0, 0, 0, 0] = torch.nextafter(bit[0, 0, 0, 0], torch.tensor(2.0))
    others = [{"train": bit}, {"train": made.train.flip(0)}, {"train_labels": made.train_labels.flip(0)}]
    for n, change in enumerate(others, 2):  # a judge of its own for data with any other bit
        quality.load_judge(dataclasses.replace(made, **change))
        assert len(list(cache.iterdir())) == n


# How what is trained once is kept


def keep(name, key, value=7.0, answer=None):
    """data.cached of a layer, which is filled with value if it is fitted: (the value it has, whether it was)."""
    fits = []

    def fit(layer):
        fits.append(layer)
        nn.init.constant_(layer.weight, value)
        return answer

    return data.cached(name, key, lambda: nn.Linear(2, 2), fit).weight[0, 0].item(), bool(fits)


def test_what_is_cached_is_fitted_once_for_its_name_and_key(cache, capsys):
    names = [("toy:a/b", (1, 2)), ("toy:a/b", (1, 3)), ("other", (1, 2)), ("toy_a_b", (1, 2)), (".", 0),
             ("folder:/" + 60 * "very long/", 0), ('a\\b?*"<>|\0\n..ü', 0), ("\udc80", 0)]
    assert all(keep(name, key, i) == (i, True) for i, (name, key) in enumerate(names))
    assert all(keep(name, key, 99) == (i, False) for i, (name, key) in enumerate(names))
    files = [file.name for file in cache.iterdir()]
    assert len(files) == len(names) and capsys.readouterr().out == ""
    for file in files:
        assert len(file) <= 54 and file[:-3].replace("_", "").isalnum() and file.isascii() and file[-3:] == ".pt"
    assert keep("in part", 0, answer=False) == keep("in part", 0) == (7.0, True)  # which is not kept


def test_what_is_shipped_comes_first_and_a_broken_file_is_made_again(cache, tmp_path, monkeypatch):
    keep("toy", 0)
    (file,) = cache.iterdir()
    monkeypatch.setattr(data, "ROOT", tmp_path)
    shipped = tmp_path / "pretrained" / file.name
    shipped.parent.mkdir()
    torch.save({"weight": torch.full((2, 2), 3.0), "bias": torch.ones(2)}, shipped)
    assert keep("toy", 0) == (3.0, False)
    shipped.write_bytes(b"cut short")
    assert keep("toy", 0) == (7.0, False)  # then what was kept here
    torch.save(nn.Linear(3, 3).state_dict(), shipped)
    whole = file.read_bytes()
    for i, content in enumerate((b"", whole[:-50], shipped.read_bytes())):
        file.write_bytes(content)
        assert keep("toy", 0, i) == (i, True)
        assert keep("toy", 0, 99) == (i, False)  # and the new one was kept


def test_a_cache_that_cannot_be_written_is_done_without(cache, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", full)
        assert keep("toy", 0) == (7.0, True)
    shutil.rmtree(cache)
    cache.write_text("a file is in the way")
    assert keep("toy", 0) == (7.0, True)
    said = "".join(capsys.readouterr()).strip().splitlines()
    assert len(said) == 2 and all(str(cache) in line for line in said)


# Metrics


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(2000, 3))
    a = (a - a.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(a.T))).T  # exactly N(0, I)
    sigma, shift = np.diag([2.0, 0.5, 1.0]), np.array([1.0, -2.0, 0.5])
    b = a @ sigma + shift
    expected = (shift**2).sum() + ((1 - np.diag(sigma)) ** 2).sum()
    assert_close(quality.frechet_distance(a, b), expected, rtol=1e-5, atol=1e-5)
    assert_close(quality.frechet_distance(b, a), expected, rtol=1e-5, atol=1e-5)
    # covariances that do not commute, against the trace of the root of their product
    c = a @ np.array([[1.0, 0.8, 0.0], [0.0, 0.6, -0.3], [0.2, 0.0, 1.5]])
    product = np.linalg.eigvals(np.cov(b.T) @ np.cov(c.T)).real
    expected = (shift**2).sum() + np.trace(np.cov(b.T) + np.cov(c.T)) - 2 * np.sqrt(product).sum()
    assert_close(quality.frechet_distance(b, c), expected, rtol=1e-5, atol=1e-5)
    flat = np.concatenate([a, np.zeros((2000, 3))], 1)  # features without full rank
    assert_close(quality.frechet_distance(flat, flat + 1.0), 6.0, rtol=0, atol=1e-2)
    one = np.ones((1, 4))
    assert_close(quality.frechet_distance(one, one + 1), 4.0, rtol=0, atol=1e-4)
    assert math.isfinite(quality.frechet_distance(one, np.arange(8.0).reshape(2, 4)))


def test_inception_score_extremes():
    assert_close(quality.inception_score(torch.eye(10).repeat(5, 1)), 10.0)  # sure and diverse
    assert_close(quality.inception_score(torch.full((50, 10), 0.1)), 1.0)  # never sure
    assert_close(quality.inception_score(torch.eye(10)[:1].repeat(50, 1)), 1.0)  # one class only
    half = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    assert_close(quality.inception_score(half), math.exp(0.9 * math.log(1.8) + 0.1 * math.log(0.2)))


def test_precision_and_recall():
    x = torch.randn(300, 2)
    both = torch.cat([x, x + 100])
    assert quality.precision_recall(x, x + 100) == (0.0, 0.0)
    assert quality.precision_recall(real=both, fake=x) == (1.0, 0.5)  # good pictures of half of the modes
    assert quality.precision_recall(real=x, fake=both) == (0.5, 1.0)
    assert quality.precision_recall(x[:1], x[:2]) == (0.5, 1.0)  # no neighbours: the point itself
    real = torch.tensor([[0.0], [1.0], [3.0]])  # to the nearest other point, k = 1: 1, 1 and 2
    fake = torch.tensor([[-0.9], [-1.5], [4.9], [5.5]])
    assert quality.precision_recall(real, fake, k=1)[0] == quality.precision_recall(fake, real, k=1)[1] == 0.5
    assert quality.precision_recall(real, fake, k=2)[0] == 1.0
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [30.0]])
    near = torch.tensor([[-2.7], [-2.8], [-2.9], [-3.5], [-3.6], [-3.7]])
    assert quality.precision_recall(line, near)[0] == 0.5  # the default is k = 3, the paper's


def test_energy_distance_and_nearest_neighbours():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]])
    # 2 E|a-b| = 2, E|a-a'| = (0 + 2 + 2 + 0) / 4 = 1, E|b-b'| = 0
    assert_close(quality.energy_distance(a, b), 1.0)
    assert_close(quality.energy_distance(b, a), 1.0)
    reference = torch.randn(20, 1, 4, 4)
    index, distance = quality.nearest_neighbours(reference[[7, 3, 19]] + 0.1, reference, batch_size=2)
    assert index.tolist() == [7, 3, 19]
    assert_close(distance, torch.full((3,), 0.1), rtol=1e-3, atol=1e-4)


def test_a_picture_is_legible_where_one_class_of_the_data_is_sure():
    p = torch.tensor([[0.95, 0.03, 0.02], [0.89, 0.11, 0.0], [0.5, 0.1, 0.4], [0.0, 0.92, 0.08], [0.02, 0.03, 0.95]])
    assert_close(quality.legible_fraction(p), 0.4)
    assert quality.legible_fraction(p[-1:]) == 0.0  # sure of none of these


# Scores


class Judge(nn.Module):
    """A judge whose features are the pixels; it takes the brighter half for the class."""

    body = nn.Flatten()

    def forward(self, x):
        halves = x.flatten(1).view(len(x), 2, -1).mean(2)
        # class 0 is bright below; as bright as dark is none of these
        return torch.cat([20 * halves.flip(1), 10 + 20 * halves.amin(1, keepdim=True)], 1)


@pytest.fixture
def judged(monkeypatch):
    """Data of two kinds whose held-out part is darker, and Judge in place of a fitted one."""
    made = halves()
    monkeypatch.setattr(quality, "load_judge", lambda *_, **__: (Judge(), {"accuracy": 0.75, "legible": 0.5}))
    return dataclasses.replace(made, test=made.test - 0.4)


def test_each_score_is_the_metric_that_its_name_says(judged):
    """Of samples against the training part, and of the held-out part where the name says so."""
    samples = judged.train[judged.train_labels == 0][:60] + 0.05 * torch.randn(60, 1, 8, 8)
    samples[:6] = 1.0  # none of these
    samples[6:10] = judged.train[judged.train_labels == 1][:4]
    found = quality.scores(samples, judged, torch.zeros(60, dtype=torch.int64))
    real, fake, held_out = (x.flatten(1).double() for x in (judged.train, samples, judged.test))
    precision, recall = quality.precision_recall(real, fake)
    p = Judge()(samples).softmax(1)
    assert 0.8 < precision < recall < 1 and 0.5 < quality.legible_fraction(p) < 0.95
    assert found.pop("reference") == "toy, training part, n = 150"
    assert found.pop("classes") == [50, 4, 6]
    assert found == pytest.approx({
        "n": 60, "nearest_train_rms": quality.nearest_neighbours(samples, judged.train)[1].mean().item(),
        "nearest_train_rms_of_held_out": quality.nearest_neighbours(judged.test, judged.train)[1].mean().item(),
        "legible": quality.legible_fraction(p), "legible_of_held_out": 0.5,
        "accuracy": 50 / 60, "accuracy_of_held_out": 0.75,
        "frechet_distance": quality.frechet_distance(real.numpy(), fake.numpy()),
        "frechet_distance_of_held_out": quality.frechet_distance(real.numpy(), held_out.numpy()),
        "inception_score": quality.inception_score(p), "precision": precision, "recall": recall})
    assert set(found) - set(quality.scores(samples, judged)) == {"accuracy", "accuracy_of_held_out"}


def test_a_glance_is_of_the_samples_and_their_labels(judged):
    samples = judged.train[:10] + 0.1
    samples[0] -= 0.05
    samples[9] = 1.0
    distance = quality.nearest_neighbours(samples, judged.train)[1]
    wanted = {"n": 10, "legible": quality.legible_fraction(Judge()(samples).softmax(1)), "legible_of_held_out": 0.5,
              "nearest_train_rms_mean": distance.mean().item(), "nearest_train_rms_min": distance.min().item()}
    assert quality.glance(samples, judged) == pytest.approx(wanted)
    labels = torch.cat([1 - judged.train_labels[:1], judged.train_labels[1:10]])
    wanted |= {"accuracy": 0.8, "accuracy_of_held_out": 0.75}
    assert quality.glance(samples, judged, labels) == pytest.approx(wanted)


def test_data_without_labels_has_distances_alone(cache):
    made = dataclasses.replace(halves(), train_labels=None, test_labels=None, classes=())
    found = quality.scores(made.train + 0.1, made)
    assert set(found) == {"n", "reference", "nearest_train_rms", "nearest_train_rms_of_held_out"}
    assert found["nearest_train_rms"] == pytest.approx(0.1, rel=1e-3) and not cache.exists()


# experiments/fid.py, with a small stand-in for Inception v3

WEIGHTS = "inception_v3_google-0cc3c7bd.pth"


class Inception(nn.Module):
    """Its features are the mean colours, its logits three times these."""

    def __init__(self, weights=None, init_weights=True, transform_input=True):
        super().__init__()
        assert weights is None and not transform_input  # images in [-1, 1], as the network was trained with
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(3, 3, bias=False)

    def forward(self, x):
        assert x.shape[1:] == (3, 299, 299) and not self.training and not torch.is_grad_enabled()
        return self.fc(self.avgpool(x).flatten(1))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run folder with samples of one colour each, of a data set of pictures like them; the stand-in's weights."""
    rng = np.random.default_rng(0)
    for name in ("pictures", "run", "checkpoints"):
        (tmp_path / name).mkdir()
    for i, colour in enumerate(rng.integers(0, 256, (20, 3)).tolist()):
        Image.new("RGB", (8, 8), tuple(colour)).save(tmp_path / "pictures" / f"{i:02}.png")
    config = {"dataset": f"folder:{tmp_path / 'pictures'}", "image_size": 8, "channels": 32}
    (tmp_path / "run" / "config.json").write_text(json.dumps({"config": config}))
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"steps": 3}))
    samples = rng.integers(0, 256, (20, 3, 1, 1), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
    np.savez_compressed(tmp_path / "run" / "evaluated.npz", samples=samples)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torchvision.models, "inception_v3", Inception)
    torch.save({"fc.weight": 3 * torch.eye(3)}, tmp_path / "checkpoints" / WEIGHTS)
    return tmp_path / "run"


def test_both_scores_are_printed_and_added(folder, capsys):
    """Both are those of the mean colours, in [-1, 1]; the real ones are of the training part alone."""
    fid.main([str(folder)])
    found = json.loads((folder / "metrics.json").read_text())
    assert found.pop("steps") == 3
    real = data.load_images(f"folder:{folder.parent / 'pictures'}", 8).train.mean((2, 3)).double().numpy()
    fake = np.load(folder / "evaluated.npz")["samples"].mean((2, 3)) / 127.5 - 1
    assert 0 < len(real) < 20 and found == pytest.approx({
        "fid_torchvision": quality.frechet_distance(real, fake),
        "inception_score_torchvision": quality.inception_score(torch.from_numpy(3 * fake).softmax(1))}, rel=1e-4)
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert {name: float(value) for name, value in printed.items()} == pytest.approx(found, abs=1e-3)


@pytest.mark.parametrize("missing, hint", [
    ("config.json", "run folder"), ("evaluated.npz", "--evaluate 500"), (f"../checkpoints/{WEIGHTS}", "https://")])
def test_what_is_missing_is_told_in_one_line(folder, capsys, missing, hint):
    file = (folder / missing).resolve()
    file.unlink()
    with pytest.raises(SystemExit) as stop:
        fid.main([str(folder)])
    said, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said.startswith(f"error: {file}: ") and hint in said
    assert json.loads((folder / "metrics.json").read_text()) == {"steps": 3}


@pytest.mark.slow
def test_the_real_network_looks_at_grey_pictures(tmp_path, monkeypatch):
    """With weights drawn here: 2,048 features, 1,000 classes."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    made = torchvision.models.inception_v3(weights=None, init_weights=False)
    torch.save(made.state_dict(), tmp_path / "checkpoints" / WEIGHTS)
    features, p = fid.look(fid.load_inception(), torch.zeros(2, 1, 8, 8), batch_size=1)
    assert features.shape == (2, 2048) and p.shape == (2, 1000)
    assert_close(p.sum(1), torch.ones(2))
