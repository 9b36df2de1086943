"""Quality: the judge, how it is made and kept, distances against closed forms, the scores, experiments/fid.py."""

import copy
import dataclasses
import json
import math
import pathlib

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

# The shipped judges

EMPTY = ["uniform noise", "Gaussian noise", "Gaussian noise of 0.3", "smooth noise", "smooth noise of 0.3",
         "black", "grey", "white", "x_t at t = T/2", "alpha_bar = 0.5"]
PARTS = ["two digits, the maximum", "two digits, the mean", "4 x 4 blocks, shuffled"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [28, 32])
def test_the_shipped_judge_reads_digits_and_nothing_else(size, monkeypatch):
    monkeypatch.setattr(data, "CACHE", ROOT / "no such folder")
    digits = data.load_images("digits", size)
    judge, of_held_out = quality.load_judge(digits, fit=False)
    assert judge is not None, "not of these digits: python experiments/judge.py"
    assert of_held_out["accuracy"] >= 0.95 and of_held_out["legible"] >= 0.93
    kinds = experiment("judge").pictures(digits.test[::4], digits.test_labels[::4])
    legible = {name: quality.legible_fraction(quality.probabilities(judge, kinds[name]))
               for name in ("with noise of 0.05", *EMPTY, *PARTS)}
    assert legible["with noise of 0.05"] >= 0.9  # as a sampler may leave it
    assert max(legible[name] for name in EMPTY) < 0.01 and max(legible[name] for name in PARTS) < 0.10


def test_the_shipped_files_are_small():
    files = list((ROOT / "pretrained").glob("judge_*.pt"))
    assert len(files) == 2 and all(file.stat().st_size <= 250_000 for file in files)


# How a judge is made


def toy(n, shape=(1, 8, 8), classes=2, held_out=2):
    x, y = torch.rand(n, *shape) * 2 - 1, torch.arange(n) % classes
    i = n - held_out
    return data.Data("toy", x[:i], x[i:], y[:i], y[i:], tuple("abcdefgh"[:classes]))


def halves():
    """Labelled 8 x 8 pictures of two kinds: bright below (a) or bright above (b)."""
    x = torch.rand(200, 1, 8, 8) - 1
    y = torch.arange(200) % 2
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


def test_a_picture_is_mixed_with_one_of_another_class(monkeypatch):
    y = torch.tensor([0] * 30 + [1, 2])  # by chance it would mostly be of the same
    x = y[:, None, None, None].float().expand(-1, 1, 4, 4)
    monkeypatch.setattr(quality, "NONE", (lambda a, b: b,))
    assert (quality.none_of_these(x, y) != x).all()
    assert_close(quality.none_of_these(x[:5], y[:5]), x[:5])  # one class: of whatever there is


def test_blocks_are_shuffled_and_halves_are_joined():
    a = torch.arange(64.0).view(1, 1, 8, 8).repeat(40, 1, 1, 1)
    b = -a - 1
    _, _, joined, shuffled, *_ = quality.NONE
    out = shuffled(a, b)
    assert_close(out.flatten(1).sort(1).values, a.flatten(1))
    assert (out[:, 0, 1::2, 1::2] - out[:, 0, ::2, ::2] == 9).all()  # each block whole
    of_b = joined(a, b) < 0
    upright, flat = of_b[:, 0].all(1).any(1), of_b[:, 0].all(2).any(1)
    assert (upright ^ flat).all() and upright.any() and flat.any()
    assert (of_b.flatten(1).sum(1) == 32).all()


def test_augmented_moves_by_whole_pixels_or_turns_a_little():
    x = torch.zeros(200, 1, 12, 16)  # in each direction by 2 at most, the width is 2 * 8
    x[:, :, 5:8, 6:11] = 1.0
    out = quality.augmented(x)
    weight = out.sum((1, 2, 3))
    assert out.shape == x.shape and weight.min() > 11 and weight.max() < 20
    still = (out - out.round()).abs().flatten(1).amax(1) < 1e-4
    assert 0.3 < still.float().mean() < 0.7
    rows = (out * torch.arange(12.0)[:, None]).sum((1, 2, 3)) / weight
    columns = (out * torch.arange(16.0)).sum((1, 2, 3)) / weight
    for centre, middle in ((rows, 6.0), (columns, 8.0)):
        found = (centre[still] - middle).round()
        assert_close(centre[still] - middle, found, rtol=0, atol=1e-3)
        assert sorted(set(found.int().tolist())) == [-2, -1, 0, 1, 2]


@pytest.mark.parametrize("shape, n, classes", [
    ((1, 8, 8), 4, 2), ((3, 9, 14), 3, 1), ((1, 28, 28), 5, 3), ((3, 64, 64), 4, 2), ((1, 32, 32), 200, 8)])
def test_a_judge_of_any_shape_and_of_a_few_pictures(shape, n, classes, cache):
    made = toy(n, shape, classes)
    judge, of_held_out = quality.load_judge(made)
    assert judge(made.test).shape == (2, classes + 1)
    found = quality.features(judge, made.test, batch_size=1)  # of the last layer but one
    assert found.shape == (2, 64) and found.dtype == np.float64
    assert_close(judge.head(torch.from_numpy(found).float()), judge(made.test))
    assert_close(quality.probabilities(judge, made.test, batch_size=1), judge(made.test).softmax(1))
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())
    right = (judge(made.test).argmax(1) == made.test_labels).float().mean().item()
    assert of_held_out == {"accuracy": right, "legible": quality.legible_fraction(judge(made.test).softmax(1))}
    (file,) = cache.iterdir()
    assert file.stat().st_size < 300_000
    json.dumps(quality.scores(torch.randn(10, *shape), made), allow_nan=False)  # of very small data too


@pytest.mark.slow
def test_a_judge_learns_its_classes_and_leaves_the_random_state_alone(cache, monkeypatch):
    monkeypatch.setattr(quality, "FEWEST", 60)
    monkeypatch.setattr(quality, "MOST", 60)
    made, state = halves(), torch.get_rng_state()
    judge, of_held_out = quality.load_judge(made)
    assert torch.equal(state, torch.get_rng_state())
    assert of_held_out["accuracy"] > 0.8
    p = quality.probabilities(judge, 2 * torch.rand_like(made.train) - 1)
    assert p.shape == (150, 3) and (p.argmax(1) == 2).float().mean() > 0.8


def test_a_judge_is_trained_once_for_its_data_and_never_for_a_glance(cache):
    made = toy(6)
    assert quality.load_judge(made, fit=False) == (None, {}) and not cache.exists()
    assert set(quality.glance(made.test, made)) == {"n", "nearest_train_rms_mean", "nearest_train_rms_min"}
    judge, _ = quality.load_judge(made)
    for fit in (True, False):
        again, _ = quality.load_judge(made, fit)
        assert_close(again(made.test), judge(made.test), rtol=0, atol=0)
    assert "legible" in quality.glance(made.test, made) and len(list(cache.iterdir())) == 1
    quality.load_judge(dataclasses.replace(made, train=made.train * 0.5))
    assert len(list(cache.iterdir())) == 2


def test_fingerprint_is_of_every_bit():
    made = toy(6)
    same = dataclasses.replace(made, train=made.train.clone())
    assert same.fingerprint() == made.fingerprint()
    bit = copy.deepcopy(made)
    bit.train[0, 0, 0, 0] = torch.nextafter(bit.train[0, 0, 0, 0], torch.tensor(2.0))
    for other in (bit, dataclasses.replace(made, train=made.train.flip(0)),  # of the same mean
                  dataclasses.replace(made, train_labels=made.train_labels.flip(0))):
        assert other.fingerprint() != made.fingerprint()


# How it is kept


def keep(name, key, value=7.0, answer=None):
    """data.cached of a layer, which is filled with value if it is fitted: (the layer, whether it was)."""
    fits = []

    def fit(layer):
        fits.append(layer)
        nn.init.constant_(layer.weight, value)
        return answer

    return data.cached(name, key, lambda: nn.Linear(2, 2), fit).weight[0, 0].item(), bool(fits)


def test_what_is_cached_is_fitted_once_for_its_name_and_key(cache, capsys):
    names = [("toy:a/b", (1, 2)), ("toy:a/b", (1, 3)), ("other", (1, 2)), ("toy_a_b", (1, 2)), (".", 0),
             ("folder:/" + 60 * "very long/", 0), ('a\\b?*"<>|\0\n..ü', 0), ("\udc80", 0)]
    for i, (name, key) in enumerate(names):
        assert keep(name, key, i) == (i, True)
    for i, (name, key) in enumerate(names):
        assert keep(name, key, 99) == (i, False)
    files = [file.name for file in cache.iterdir()]
    assert len(files) == len(names) and capsys.readouterr().out == ""
    for file in files:
        assert len(file) <= 54 and file[:-3].replace("_", "").isalnum() and file.isascii() and file[-3:] == ".pt"


def test_what_is_shipped_comes_first(cache, tmp_path, monkeypatch):
    keep("toy", 0)
    (file,) = cache.iterdir()
    monkeypatch.setattr(data, "ROOT", tmp_path)
    (tmp_path / "pretrained").mkdir()
    torch.save({"weight": torch.full((2, 2), 3.0), "bias": torch.ones(2)}, tmp_path / "pretrained" / file.name)
    assert keep("toy", 0) == (3.0, False)
    (tmp_path / "pretrained" / file.name).write_bytes(b"cut short")
    assert keep("toy", 0) == (7.0, False)  # then what was kept here


@pytest.mark.parametrize("content", [b"", b"no tensors", "cut", "of another shape", "a tensor"])
def test_a_broken_cache_is_fitted_again(content, cache):
    keep("toy", 0)
    (file,) = cache.iterdir()
    if content == "of another shape":
        torch.save(nn.Linear(3, 3).state_dict(), file)
    elif content == "a tensor":
        torch.save(torch.ones(3), file)
    else:
        file.write_bytes(file.read_bytes()[:-50] if content == "cut" else content)
    assert keep("toy", 0, 8.0) == (8.0, True)
    assert keep("toy", 0, 9.0) == (8.0, False)  # and the new one was kept


@pytest.mark.parametrize("what", ["disk full", "a file is in the way"])
def test_a_cache_that_cannot_be_written_is_done_without(what, cache, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    if what == "disk full":
        monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    else:
        cache.write_text("x")
    for _ in range(2):
        assert keep("toy", 0) == (7.0, True)
        captured = capsys.readouterr()
        said = (captured.out + captured.err).strip().splitlines()
        assert len(said) == 1 and str(cache) in said[0]


def test_what_was_fitted_in_part_is_not_kept(cache):
    assert keep("toy", 0, answer=False) == (7.0, True)
    assert keep("toy", 0) == (7.0, True)


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


def test_the_kth_neighbour_is_another_point():
    """The ball of a point reaches to its k-th neighbour, the point itself not counted."""
    real = torch.tensor([[0.0], [1.0], [3.0]])  # with k = 1 of radius 1, 1 and 2
    fake = torch.tensor([[-0.9], [-1.5], [4.9], [5.5]])
    assert quality.precision_recall(real, fake, k=1)[0] == 0.5
    assert quality.precision_recall(fake, real, k=1)[1] == 0.5
    assert quality.precision_recall(real, fake, k=2)[0] == 1.0
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [30.0]])
    near = torch.tensor([[-2.7], [-2.8], [-2.9], [-3.5], [-3.6], [-3.7]])
    assert quality.precision_recall(line, near)[0] == 0.5  # the default is k = 3, the paper's


def test_energy_distance():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]])
    # 2 E|a-b| = 2, E|a-a'| = (0 + 2 + 2 + 0) / 4 = 1, E|b-b'| = 0
    assert_close(quality.energy_distance(a, b), 1.0)
    assert_close(quality.energy_distance(b, a), 1.0)


def test_nearest_neighbours():
    reference = torch.randn(20, 1, 4, 4)
    index, distance = quality.nearest_neighbours(reference[[7, 3, 19]] + 0.1, reference, batch_size=2)
    assert index.tolist() == [7, 3, 19]
    assert_close(distance, torch.full((3,), 0.1), rtol=1e-3, atol=1e-4)


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
    made = dataclasses.replace(made, test=made.test - 0.4)
    monkeypatch.setattr(quality, "load_judge", lambda *_, **__: (Judge(), {"accuracy": 0.75, "legible": 0.5}))
    return made


def test_each_score_is_the_metric_that_its_name_says(judged):
    """Of samples against the training part, and of the held-out part where the name says so."""
    samples = judged.train[judged.train_labels == 0][:60] + 0.05 * torch.randn(60, 1, 8, 8)
    samples[:6] = 1.0  # none of these
    samples[6:10] = judged.train[judged.train_labels == 1][:4]
    labels = torch.zeros(60, dtype=torch.int64)
    found = quality.scores(samples, judged, labels)
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


def test_a_picture_is_legible_where_one_class_of_the_data_is_sure():
    p = torch.tensor([[0.95, 0.03, 0.02], [0.89, 0.11, 0.0], [0.5, 0.1, 0.4], [0.0, 0.92, 0.08], [0.02, 0.03, 0.95]])
    assert_close(quality.legible_fraction(p), 0.4)
    assert quality.legible_fraction(p[-1:]) == 0.0  # sure of none of these


def test_a_glance_is_of_the_samples_and_their_labels(judged):
    samples = judged.train[:10] + 0.1
    samples[0] = judged.train[0] + 0.05
    samples[9] = 1.0
    wanted = {"n": 10, "legible": quality.legible_fraction(Judge()(samples).softmax(1)), "legible_of_held_out": 0.5}
    distance = quality.nearest_neighbours(samples, judged.train)[1]
    wanted |= {"nearest_train_rms_mean": distance.mean().item(), "nearest_train_rms_min": distance.min().item()}
    assert quality.glance(samples, judged) == pytest.approx(wanted)
    labels = judged.train_labels[:10].clone()
    labels[0] = 1 - labels[0]
    wanted |= {"accuracy": 0.8, "accuracy_of_held_out": 0.75}
    assert quality.glance(samples, judged, labels) == pytest.approx(wanted)


def test_data_without_labels_has_distances_alone(cache):
    made = dataclasses.replace(toy(8), train_labels=None, test_labels=None, classes=())
    assert quality.load_judge(made) == (None, {})
    found = quality.scores(made.train + 0.1, made)
    assert set(found) == {"n", "reference", "nearest_train_rms", "nearest_train_rms_of_held_out"}
    assert_close(found["nearest_train_rms"], 0.1, rtol=1e-3, atol=1e-4)
    assert not cache.exists()


# experiments/fid.py, with a small stand-in for Inception v3


class Inception(nn.Module):
    """Its features are the mean colours, its logits three times these."""

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
    (tmp_path / "pictures").mkdir()
    for i, colour in enumerate(rng.integers(0, 256, (20, 3)).tolist()):
        Image.new("RGB", (8, 8), tuple(colour)).save(tmp_path / "pictures" / f"{i:02}.png")
    run = tmp_path / "run"
    run.mkdir()
    config = {"dataset": f"folder:{tmp_path / 'pictures'}", "image_size": 8, "channels": 32}
    (run / "config.json").write_text(json.dumps({"config": config}))
    (run / "metrics.json").write_text(json.dumps({"steps": 3}))
    samples = rng.integers(0, 256, (60, 3, 1, 1), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
    np.savez_compressed(run / "evaluated.npz", samples=samples)
    return run


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The stand-in's weights in a hub cache: the file."""
    def inception_v3(weights, init_weights, transform_input):
        assert weights is None and not init_weights
        assert not transform_input  # images in [-1, 1], as the network was trained with
        return Inception()

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torchvision.models, "inception_v3", inception_v3)
    file = tmp_path / "hub" / "checkpoints" / "inception_v3_google-0cc3c7bd.pth"
    file.parent.mkdir(parents=True)
    torch.save({"fc.weight": 3 * torch.eye(3)}, file)
    return file


def test_both_scores_are_printed_and_added(folder, weights, capsys):
    """Both are those of the mean colours, in [-1, 1]; the real ones are of the training part alone."""
    fid.main([str(folder)])
    found = json.loads((folder / "metrics.json").read_text())
    assert found.pop("steps") == 3 and set(found) == {"fid_torchvision", "inception_score_torchvision"}
    real = data.load_images(f"folder:{folder.parent / 'pictures'}", 8).train.mean((2, 3)).double().numpy()
    fake = np.load(folder / "evaluated.npz")["samples"].mean((2, 3)) / 127.5 - 1
    assert 0 < len(real) < 20
    assert found["fid_torchvision"] == pytest.approx(quality.frechet_distance(real, fake), rel=1e-4)
    p = torch.from_numpy(3 * fake).softmax(1)
    assert found["inception_score_torchvision"] == pytest.approx(quality.inception_score(p), rel=1e-4)
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert {name: float(value) for name, value in printed.items()} == pytest.approx(found, abs=1e-3)


def test_grey_images_are_seen_in_three_channels():
    x = torch.rand(3, 1, 8, 8)
    features, p = fid.look(Inception().eval(), x, batch_size=2)
    assert_close(features, x.mean((2, 3)).expand(-1, 3).double().numpy(), rtol=1e-5, atol=1e-5)
    assert_close(p, torch.full((3, 3), 1 / 3))


@pytest.mark.parametrize("missing", ["config.json", "evaluated.npz", "the weights"])
def test_what_is_missing_is_told_in_one_line(folder, weights, capsys, missing):
    file = weights if missing == "the weights" else folder / missing
    file.unlink()
    with pytest.raises(SystemExit) as stop:
        fid.main([str(folder)])
    said, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said.startswith(f"error: {file}: ") and "missing" in said
    hint = {"config.json": "run folder", "evaluated.npz": "--evaluate 500", "the weights": "https://"}[missing]
    assert hint in said and json.loads((folder / "metrics.json").read_text()) == {"steps": 3}


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
