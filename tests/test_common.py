"""common/: data sets, metrics against closed forms, command line, runs, drawing."""

import copy
import dataclasses
import json
import linecache
import math
import os
import signal
import sys
import time
import types
import urllib.error
from typing import Literal

import ddpm_example as ddpm
from common import data, metrics, plotting, runs
from common import judge as judges
from common.checkpoints import load_checkpoint, newest
from common.cli import check_config, command_line, config_from, parse_args, read_lines
from common.device import (
    Launch,
    Meter,
    Stopwatch,
    pick_device,
    random_state,
    seeded,
    set_random_state,
)
from common.runs import Run, open_run

import numpy as np
import pytest
import torch
from conftest import assert_same_tree, open_picture, script_name, spied
from matplotlib.axes import Axes
from PIL import Image, ImageSequence
from torch import nn
from torch.testing import assert_close

# Data


def test_digits_split_is_fixed_and_stratified():
    digits = data.load_images("digits")
    assert digits.train.shape == (4500, 1, 28, 28) and digits.test.shape == (500, 1, 28, 28)
    assert digits.train.dtype == torch.float32 and digits.train_labels.dtype == torch.int64
    assert digits.train.min() == -1 and digits.train.max() == 1
    assert torch.bincount(digits.test_labels).tolist() == [50] * 10
    assert torch.bincount(digits.train_labels).tolist() == [450] * 10
    again = data.load_images("digits")
    assert torch.equal(digits.test, again.test) and torch.equal(digits.train, again.train)
    # no held-out picture is a training picture
    assert metrics.nearest_neighbours(digits.test, digits.train)[1].min() > 0


@pytest.mark.parametrize("name, shape", [("digits8", (1, 8, 8)), ("color_digits", (3, 32, 32))])
def test_other_bundled_images(name, shape):
    found = data.load_images(name)
    assert found.train.shape[1:] == shape and len(found.classes) == 10
    assert -1 <= found.train.min() < -0.5 and 0.5 < found.train.max() <= 1
    assert abs(len(found.test) / (len(found.train) + len(found.test)) - 0.1) < 0.01
    assert torch.equal(found.train, data.load_images(name).train)


@pytest.mark.parametrize("size", [14, 32, 40])
def test_images_are_resized_on_request(size):
    found = data.load_images("digits", size)
    assert found.train.shape[1:] == (1, size, size)
    assert found.train.min() >= -1.001 and found.train.max() <= 1.001


def pictures(folder, n, size=(40, 30), suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.full((size[1], size[0], 3), 20 * i % 256, dtype=np.uint8)
        pixels[:, : size[0] // 2, 0] = 255
        Image.fromarray(pixels).save(folder / f"{i:03}{suffix}")


def test_flat_folder(tmp_path):
    pictures(tmp_path / "flat", 12)
    found = data.load_images(f"folder:{tmp_path / 'flat'}", 16)
    assert found.train.shape == (11, 3, 16, 16) and found.test.shape == (1, 3, 16, 16)
    assert found.train_labels is None and -1 <= found.train.min() and found.train.max() <= 1
    assert found.train[:, 0, :, 0].min() > 0.9 and found.train[:, 0, :, -1].max() < 0.9


def test_nested_folder_gives_classes(tmp_path):
    pictures(tmp_path / "cats", 5)
    pictures(tmp_path / "dogs", 7, suffix=".jpg")
    found = data.load_images(f"folder:{tmp_path}", 8)
    assert found.classes == ("cats", "dogs")
    labels = torch.cat([found.train_labels, found.test_labels])
    assert torch.bincount(labels).tolist() == [5, 7]


def test_broken_picture_is_named_and_skipped(tmp_path, capsys):
    pictures(tmp_path, 6)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    whole = (tmp_path / "000.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    found = data.load_images(f"folder:{tmp_path}", 8)
    assert len(found.train) + len(found.test) == 6
    out = capsys.readouterr()
    said = (out.out + out.err).strip().splitlines()
    assert len(said) == 1 and "2" in said[0] and "broken.png" in said[0] and "cut.png" in said[0]


@pytest.mark.parametrize("name", data.POINTS)
def test_points_are_centred_and_of_about_unit_size(name):
    found = data.load_points(name, n=4000)
    assert found.train.shape == (2000, 2) and found.train.dtype == torch.float32
    assert found.train.mean(0).abs().max() < 0.25
    assert 0.3 < found.train.std() < 1.5
    assert torch.equal(found.train, data.load_points(name, n=4000).train)


def test_the_spectrum_of_a_wave_is_one_line_and_that_of_noise_is_flat():
    t = torch.arange(64) / 64
    waves = torch.sin(2 * torch.pi * (5 * t + torch.rand(10, 1)))[:, None]
    power = metrics.spectrum(waves)
    assert power.shape == (33,)
    assert_close(power, torch.zeros(33).index_fill(0, torch.tensor(5), 16.0), rtol=1e-4, atol=1e-4)
    assert_close(metrics.spectrum(torch.randn(4000, 1, 64)), torch.ones(33), rtol=0.1, atol=0)


def test_autocorrelation_is_that_of_its_definition():
    x = torch.randn(6, 1, 9).cumsum(2)
    wanted = torch.zeros(6, 5)
    for i, series in enumerate(x[:, 0] - x[:, 0].mean(1, keepdim=True)):
        for lag in range(5):
            wanted[i, lag] = (series[:9 - lag] * series[lag:]).sum() / (series**2).sum()
    assert_close(metrics.autocorrelation(x), wanted.mean(0))


def test_the_spectral_distance_is_in_decibels():
    x = torch.randn(50, 1, 32)
    assert metrics.spectral_distance(x, x) == 0
    assert metrics.spectral_distance(x, 2 * x) == pytest.approx(10 * np.log10(4), rel=1e-4)
    assert metrics.spectral_distance(2 * x, x) == metrics.spectral_distance(x, 2 * x)
    silent = torch.zeros(3, 1, 32)
    assert metrics.spectral_distance(silent, silent) == 0
    # other gains at other frequencies: the root of the mean of the squares
    gains = torch.tensor([1.0, 2.0, 10.0, 0.5, 1.0, 3.0, 1.0, 0.1, 1.0])
    x = torch.randn(5, 1, 16)
    other = torch.fft.irfft(torch.fft.rfft(x) * gains, 16)
    wanted = (20 * gains.log10()).square().mean().sqrt().item()
    assert metrics.spectral_distance(x, other) == pytest.approx(wanted, rel=1e-3)


def test_autocorrelation_of_noise_waves_and_silence():
    found = metrics.autocorrelation(torch.randn(4000, 1, 64))
    assert_close(found[0].item(), 1.0)
    assert found.shape == (33,) and found[1:].abs().max() < 0.03
    phases = 2 * torch.pi * torch.arange(4)[:, None] / 4
    waves = torch.sin(2 * torch.pi * 3 * torch.arange(48) / 48 + phases)[:, None] + 5
    lag = torch.arange(25)
    wanted = (1 - lag / 48) * torch.cos(2 * torch.pi * 3 * lag / 48)  # fewer pairs at a longer lag
    assert_close(metrics.autocorrelation(waves), wanted, rtol=0, atol=1e-4)
    assert metrics.autocorrelation(torch.zeros(2, 1, 8)).tolist() == [0] * 5


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"),
                                        ("cifar10", "CIFAR10")])
def test_downloaded_sets_have_the_shape_of_the_others(name, kind, tmp_path, monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(data, "CACHE", tmp_path)

    class Stored:
        classes = list("0123456789")

        def __init__(self, root, train, download):
            n = 20 if train else 10
            grey = torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8)
            colour = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
            self.data = colour if kind == "CIFAR10" else grey
            self.targets = list(range(10)) * (n // 10)

    monkeypatch.setattr(torchvision.datasets, kind, Stored)
    found = data.load_images(name)
    shape = (3, 32, 32) if kind == "CIFAR10" else (1, 28, 28)
    assert found.train.shape == (20, *shape) and found.test.shape == (10, *shape)
    assert -1 <= found.train.min() < -0.9 and 0.9 < found.train.max() <= 1
    assert found.train_labels.tolist() == list(range(10)) * 2


@pytest.mark.parametrize("problem", [urllib.error.URLError("no network"), RuntimeError("broken"),
                                     OSError("no space")])
def test_download_without_network_names_the_bundled_sets(tmp_path, monkeypatch, problem, capsys):
    import torchvision.datasets

    monkeypatch.setattr(data, "CACHE", tmp_path)

    def offline(*_, **__):
        raise problem

    monkeypatch.setattr(torchvision.datasets, "MNIST", offline)
    with pytest.raises(SystemExit) as stop:
        data.load_images("mnist")
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1
    for name in data.OFFLINE:
        assert name in said[0]


# Metrics


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(2000, 3))
    a = (a - a.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(a.T))).T  # exactly N(0, I)
    sigma, shift = np.diag([2.0, 0.5, 1.0]), np.array([1.0, -2.0, 0.5])
    b = a @ sigma + shift
    expected = (shift**2).sum() + ((1 - np.diag(sigma)) ** 2).sum()
    assert_close(metrics.frechet_distance(a, b), expected, rtol=1e-5, atol=1e-5)
    assert_close(metrics.frechet_distance(b, a), expected, rtol=1e-5, atol=1e-5)
    assert_close(metrics.frechet_distance(b, b), 0.0, rtol=0, atol=1e-4)
    # covariances that do not commute, against the trace of the root of their product
    mix = np.array([[1.0, 0.8, 0.0], [0.0, 0.6, -0.3], [0.2, 0.0, 1.5]])
    c = a @ mix
    product = np.linalg.eigvals(np.cov(b.T) @ np.cov(c.T)).real
    expected = (shift**2).sum() + np.trace(np.cov(b.T) + np.cov(c.T)) - 2 * np.sqrt(product).sum()
    assert_close(metrics.frechet_distance(b, c), expected, rtol=1e-5, atol=1e-5)


def test_frechet_distance_of_features_without_full_rank():
    rng = np.random.default_rng(0)
    a = np.concatenate([rng.normal(size=(500, 2)), np.zeros((500, 3))], 1)
    assert_close(metrics.frechet_distance(a, a + 1.0), 5.0, rtol=0, atol=1e-2)


def test_inception_score_extremes():
    assert_close(metrics.inception_score(torch.eye(10).repeat(5, 1)), 10.0)  # sure and diverse
    assert_close(metrics.inception_score(torch.full((50, 10), 0.1)), 1.0)  # never sure
    assert_close(metrics.inception_score(torch.eye(10)[:1].repeat(50, 1)), 1.0)  # one class only
    half = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    kl = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert_close(metrics.inception_score(half), math.exp(kl))


def test_precision_and_recall():
    x = torch.randn(300, 2)
    assert metrics.precision_recall(x, x) == (1.0, 1.0)
    assert metrics.precision_recall(x, x + 100) == (0.0, 0.0)
    both = torch.cat([x, x + 100])
    precision, recall = metrics.precision_recall(both, x)  # good pictures of half of the modes
    assert precision == 1.0 and recall == 0.5
    precision, recall = metrics.precision_recall(x, both)
    assert precision == 0.5 and recall == 1.0


def test_the_kth_neighbour_is_another_point():
    """The ball of a point reaches to its k-th neighbour, the point itself not counted."""
    real = torch.tensor([[0.0], [1.0], [3.0]])  # with k = 1 of radius 1, 1 and 2
    fake = torch.tensor([[-0.9], [-1.5], [4.9], [5.5]])
    # counted with itself no ball would reach anything, with k + 1 all four would be inside
    assert metrics.precision_recall(real, fake, k=1)[0] == 0.5
    assert metrics.precision_recall(fake, real, k=1)[1] == 0.5
    assert metrics.precision_recall(real, fake, k=2)[0] == 1.0
    # the default is k = 3, the paper's
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [30.0]])
    near = torch.tensor([[-2.8], [-2.9], [-3.5], [-3.6]])
    assert metrics.precision_recall(line, near)[0] == 0.5


def test_energy_distance():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]])
    # 2 E|a-b| = 2, E|a-a'| = (0 + 2 + 2 + 0) / 4 = 1, E|b-b'| = 0
    assert_close(metrics.energy_distance(a, b), 1.0)
    assert_close(metrics.energy_distance(a, a), 0.0, rtol=0, atol=1e-6)
    x = torch.randn(3000, 2)
    near, far = metrics.energy_distance(x, torch.randn(3000, 2)), metrics.energy_distance(x, x + 1)
    assert near < 0.01 < 0.1 < far


def test_nearest_neighbours():
    reference = torch.randn(20, 1, 4, 4)
    x = reference[[7, 3, 19]] + 0.1
    index, distance = metrics.nearest_neighbours(x, reference, batch_size=2)
    assert index.tolist() == [7, 3, 19]
    assert_close(distance, torch.full((3,), 0.1), rtol=1e-3, atol=1e-4)


def test_scores_of_a_few_rows():
    one, few = np.ones((1, 4)), np.arange(8.0).reshape(2, 4)
    assert_close(metrics.frechet_distance(one, one + 1), 4.0, rtol=0, atol=1e-4)
    assert math.isfinite(metrics.frechet_distance(one, few))
    assert metrics.precision_recall(one, few) == (0.0, 0.0)
    assert metrics.precision_recall(few, few) == (1.0, 1.0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder in place of data/."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def halves():
    """Labelled 8x8 pictures of two kinds: bright above or bright below."""
    x = torch.rand(200, 1, 8, 8) - 1
    y = torch.arange(200) % 2
    x[y == 1, :, :4] += 1
    x[y == 0, :, 4:] += 1
    return data.Data("toy", x[:150], x[150:], y[:150], y[150:], ("a", "b"))


@pytest.mark.slow
def test_judge_is_cached_and_leaves_the_random_state_alone(cache, monkeypatch):
    monkeypatch.setattr(judges, "FEWEST", 60)
    made = halves()
    x = made.train
    state = torch.get_rng_state()
    first, judged = metrics.load_judge(made)
    assert torch.equal(state, torch.get_rng_state())
    assert judged["accuracy"] > 0.8 and 0 <= judged["legible"] <= 1
    p = metrics.probabilities(first, 2 * torch.rand_like(x) - 1)
    assert p.shape == (150, 3) and (p.argmax(1) == 2).float().mean() > 0.8
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    files = list(cache.iterdir())
    assert len(files) == 1 and files[0].suffix == ".pt"
    stamp = files[0].stat().st_mtime_ns
    second, _ = metrics.load_judge(made)
    assert files[0].stat().st_mtime_ns == stamp
    assert_close(first(x[:5]), second(x[:5]))
    files[0].write_bytes(b"cut short")  # a broken cache is made again
    again, _ = metrics.load_judge(made)
    assert_close(first(x[:5]), again(x[:5]))
    assert files[0].stat().st_size > 1000
    # one of other pictures is not used
    metrics.load_judge(dataclasses.replace(made, train=x * 0.5))
    assert len(list(cache.iterdir())) == 2
    assert metrics.load_judge(dataclasses.replace(made, train_labels=None)) == (None, {})


def make_and_fit(fits, value=7.0, answer=None):
    """The arguments make and fit of data.cached: a layer, and a fit that counts its calls."""
    def fit(layer):
        fits.append(layer)
        torch.nn.init.constant_(layer.weight, value)
        return answer

    return lambda: torch.nn.Linear(2, 2), fit


def test_what_is_cached_is_not_fitted_again(cache):
    fits = []
    first = data.cached("toy:a/b", (1, 2), *make_and_fit(fits))
    again = data.cached("toy:a/b", (1, 2), *make_and_fit(fits))
    assert len(fits) == 1 and len(list(cache.iterdir())) == 1
    assert_close(again.weight, torch.full((2, 2), 7.0), rtol=0, atol=0)
    assert_close(again.bias, first.bias, rtol=0, atol=0)
    data.cached("toy:a/b", (1, 3), *make_and_fit(fits))  # another key, another name
    data.cached("other", (1, 2), *make_and_fit(fits))
    assert len(fits) == 3 and len(list(cache.iterdir())) == 3
    assert all(file.suffix == ".pt" for file in cache.iterdir())
    data.cached("toy_a_b", (1, 2), *make_and_fit(fits))  # it reads like the first
    assert len(fits) == 4 and len(list(cache.iterdir())) == 4


def test_a_long_or_odd_name_makes_a_short_file_name(cache, capsys):
    fits = []
    for name in ("folder:/" + 60 * "very long/", 'a\\b?*"<>|\0\n..ü', ".", "\udc80"):
        data.cached(name, 0, *make_and_fit(fits))
        data.cached(name, 0, *make_and_fit(fits))
    assert len(fits) == 4 and capsys.readouterr().out == ""
    names = sorted(file.name for file in cache.iterdir())
    assert len(names) == 4
    for name in names:
        assert len(name) <= 54 and name[:-3].replace("_", "").isalnum() and name.isascii()


def test_what_is_shipped_comes_first(cache, tmp_path, monkeypatch):
    fits = []
    data.cached("toy", 0, *make_and_fit(fits))
    (file,) = cache.iterdir()
    monkeypatch.setattr(data, "ROOT", tmp_path)
    shipped = torch.nn.Linear(2, 2)
    (tmp_path / "pretrained").mkdir()
    torch.save(shipped.state_dict(), tmp_path / "pretrained" / file.name)
    found = data.cached("toy", 0, *make_and_fit(fits))
    assert_close(found.weight, shipped.weight, rtol=0, atol=0)
    (tmp_path / "pretrained" / file.name).write_bytes(b"cut short")
    found = data.cached("toy", 0, *make_and_fit(fits))  # then what was kept here
    assert_close(found.weight, torch.full((2, 2), 7.0), rtol=0, atol=0)
    assert len(fits) == 1


def test_only_what_is_at_hand(cache):
    fits = []
    make, fit = make_and_fit(fits)
    assert data.cached("toy", 0, make, None) is None and not cache.exists()
    data.cached("toy", 0, make, fit)
    assert_close(data.cached("toy", 0, make, None).weight, torch.full((2, 2), 7.0))


@pytest.mark.parametrize("content", [b"", b"no tensors", "cut", "of another shape", "a tensor"])
def test_a_broken_cache_is_fitted_again(content, cache):
    fits = []
    data.cached("toy", 0, *make_and_fit(fits))
    (file,) = cache.iterdir()
    if content == "cut":
        content = file.read_bytes()[:-50]
    if content == "of another shape":
        torch.save(torch.nn.Linear(3, 3).state_dict(), file)
    elif content == "a tensor":
        torch.save(torch.ones(3), file)
    else:
        file.write_bytes(content)
    found = data.cached("toy", 0, *make_and_fit(fits, 8.0))
    assert len(fits) == 2
    assert_close(found.weight, torch.full((2, 2), 8.0), rtol=0, atol=0)
    data.cached("toy", 0, *make_and_fit(fits, 9.0))  # and the new one was kept
    assert len(fits) == 2


@pytest.mark.parametrize("what", ["disk full", "torch's own error", "a file is in the way"])
def test_a_cache_that_cannot_be_written_is_done_without(what, cache, monkeypatch, capsys):
    def full(*_):
        if what == "disk full":
            raise OSError(28, "No space left on device")
        raise RuntimeError("File toy.pt cannot be opened.")

    if what != "a file is in the way":
        monkeypatch.setattr(torch, "save", full)
    else:
        cache.write_text("x")
    fits = []
    for _ in range(2):
        found = data.cached("toy", 0, *make_and_fit(fits))
        assert_close(found.weight, torch.full((2, 2), 7.0), rtol=0, atol=0)
        captured = capsys.readouterr()
        said = (captured.out + captured.err).strip().splitlines()
        assert len(said) == 1 and str(cache) in said[0]
    assert len(fits) == 2


def test_what_was_fitted_in_part_is_not_kept(cache):
    fits = []
    found = data.cached("toy", 0, *make_and_fit(fits, answer=False))
    assert_close(found.weight, torch.full((2, 2), 7.0), rtol=0, atol=0)
    assert not cache.exists() or list(cache.iterdir()) == []
    data.cached("toy", 0, *make_and_fit(fits))
    assert len(fits) == 2


class Judge(torch.nn.Module):
    """A judge whose features are the pixels; it takes the brighter half for the class."""

    body = torch.nn.Flatten()

    def forward(self, x):
        halves = x.flatten(1).view(len(x), 2, -1).mean(2)
        # class 0 is bright below; as bright as dark is none of these
        return torch.cat([20 * halves.flip(1), 10 + 20 * halves.amin(1, keepdim=True)], 1)


@pytest.fixture
def judged(monkeypatch):
    """Data of two kinds whose held-out part is darker, and Judge in place of a fitted one."""
    made = halves()
    made = dataclasses.replace(made, test=made.test - 0.4)
    monkeypatch.setattr(metrics, "load_judge", lambda *_, **__: (
        (Judge(), {"accuracy": 0.75, "legible": 0.5}) if made.train_labels is not None else (None, {})))
    monkeypatch.setattr(metrics, "inception_v3_scores", lambda *_: {})
    return made


def test_quality_compares_with_the_training_part(judged):
    """The training pictures themselves score perfectly though the held-out part differs."""
    found = metrics.quality(judged.train, judged)
    assert found["n"] == 150 and "training part, n = 150" in found["reference"]
    assert_close(found["frechet_distance"], 0.0, rtol=0, atol=1e-4)
    assert found["precision"] == found["recall"] == 1.0
    assert_close(found["nearest_train_rms"], 0.0, rtol=0, atol=1e-3)
    assert found["frechet_distance_of_held_out"] > 5
    assert found["nearest_train_rms_of_held_out"] > 0.3
    assert found["classes"] == [75, 75, 0] and found["legible"] > 0.9
    assert found["legible_of_held_out"] == 0.5
    assert_close(found["inception_score"], 2.0, rtol=1e-3, atol=0)
    assert "accuracy" not in found and "accuracy_of_held_out" not in found
    other = metrics.quality(judged.test, judged)  # and the held-out ones do not
    assert_close(other["frechet_distance"], found["frechet_distance_of_held_out"])
    assert_close(other["nearest_train_rms"], found["nearest_train_rms_of_held_out"])
    assert other["precision"] == 0.0


def test_precision_is_of_the_samples_and_recall_of_the_data(judged):
    """Good pictures of one kind alone: all of them are real, half of the real ones are missing."""
    found = metrics.quality(judged.train[judged.train_labels == 0], judged)
    assert found["precision"] == 1.0 and 0.4 < found["recall"] < 0.6


def test_quality_of_labelled_samples_says_how_often_the_judge_agrees(judged):
    labels = judged.train_labels.clone()
    labels[:30] = 1 - labels[:30]
    found = metrics.quality(judged.train, judged, labels)
    assert_close(found["accuracy"], 0.8)
    assert found["accuracy_of_held_out"] == 0.75


def test_what_is_none_of_these_is_a_kind_of_its_own_and_not_legible(judged):
    bright = torch.ones(10, 1, 8, 8)
    found = metrics.quality(bright, judged, torch.zeros(10, dtype=torch.int64))
    assert found["classes"] == [0, 0, 10] and found["legible"] == found["accuracy"] == 0.0


def test_glance(judged, monkeypatch):
    samples = judged.train[:10] + 0.1
    asked = []
    load = metrics.load_judge
    monkeypatch.setattr(metrics, "load_judge", lambda data, fit=True: (
        asked.append(fit), load(data))[1])
    found = metrics.glance(samples, judged)
    assert asked == [False]  # no judge is trained for a first look
    assert set(found) == {"n", "nearest_train_rms_mean", "nearest_train_rms_min", "legible",
                          "legible_of_held_out"}
    assert found["n"] == 10 and found["legible"] > 0.8 and found["legible_of_held_out"] == 0.5
    assert_close(found["nearest_train_rms_mean"], 0.1, rtol=1e-3, atol=1e-4)
    assert_close(found["nearest_train_rms_min"], 0.1, rtol=1e-3, atol=1e-4)
    labelled = metrics.glance(samples, judged, judged.train_labels[:10])
    assert labelled["accuracy"] == 1.0 and labelled["accuracy_of_held_out"] == 0.75
    monkeypatch.setattr(metrics, "load_judge", lambda *_, **__: (None, {}))
    assert set(metrics.glance(samples, judged)) == {
        "n", "nearest_train_rms_mean", "nearest_train_rms_min"}


# Command line


@dataclasses.dataclass(frozen=True)
class Toy:
    # model
    T: int = 10                      # diffusion steps, >= 1
    learning_rate: float = 0.5       # how fast, in % of something, > 0
    widths: tuple[int, ...] = (1, 2)  # width of each level, >= 1
    flip: bool = False               # mirror
    kind: Literal["a", "b"] = "a"    # of something
    # sampling
    n_samples: int = 4               # drawn at the end, >= 1
    # training
    steps: int = 6                   # of the optimiser, >= 1
    batch_size: int = 8              # pictures a step, >= 1
    warmup: int = 0                  # steps until the peak learning rate, >= 0
    decay: Literal["cosine", "constant"] = "constant"  # of the rate
    preview_every: int = 100         # steps between checkpoints, >= 1


TOYS = {"laptop": Toy(), "smoke": Toy(T=2, widths=(3,), n_samples=2)}


def parse(*argv):
    return parse_args(Toy, TOYS, list(argv))


def complaint(capsys, call, *args):
    """The one line of complaint with which call(*args) must end the program."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and said.startswith("error: "), said
    return said


def test_flags_override_the_preset_with_either_spelling():
    assert parse()[0] == Toy()
    assert parse("--preset", "smoke")[0] == TOYS["smoke"]
    cfg, opts = parse("--preset", "smoke", "--T", "7", "--learning-rate", "0.1")
    assert cfg == Toy(T=7, learning_rate=0.1, widths=(3,), n_samples=2)
    assert opts.given == {"T": 7, "learning_rate": 0.1}
    assert parse("--learning_rate", "0.1")[0].learning_rate == 0.1
    assert parse("--widths", "1", "2", "4", "--flip")[0] == Toy(widths=(1, 2, 4), flip=True)
    assert parse("--batch-size", "3")[0] == parse("--batch_size", "3")[0] == Toy(batch_size=3)
    assert not parse("--no-flip")[0].flip
    assert parse("--grad-checkpointing")[1].grad_checkpointing
    assert parse("--grad_checkpointing")[1].grad_checkpointing


def test_a_data_set_takes_the_preset_of_its_name():
    Config = dataclasses.make_dataclass("Config", [("dataset", str, "digits"), ("T", int, 10)])
    presets = {"digits": Config(), "sines": Config("sines", 3), "csv": Config("csv:PATH", 5),
               "smoke": Config(T=2)}

    def read(*argv):
        cfg, opts = parse_args(Config, presets, list(argv))
        return cfg.dataset, cfg.T, opts.preset

    assert read("--dataset", "sines") == ("sines", 3, "sines")
    assert read("--dataset", "csv:/a/b:c.csv") == ("csv:/a/b:c.csv", 5, "csv")
    assert read("--dataset=csv:a.csv", "--T", "7") == ("csv:a.csv", 7, "csv")
    assert read("--dataset", "csv:a.csv", "--preset", "smoke") == ("csv:a.csv", 2, "smoke")
    assert read("--dataset", "membrane") == ("membrane", 10, None)
    assert read("--T", "4") == ("digits", 4, None)
    del presets["csv"]
    assert read("--dataset", "csv:a.csv") == ("csv:a.csv", 10, None)


def test_help_is_the_trailing_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for comment in ("diffusion steps, >= 1 [10]", "how fast, in % of something", "width of each level",
                    "--kind a|b", "[1 2]"):
        assert comment in text
    with pytest.raises(SystemExit):
        ddpm.main(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(ddpm.Config):
        assert f"--{field.name} " in text or f"--{field.name}," in text, field.name
    assert "(paper: 1e-4)" in " ".join(text.split()) and "2006.11239" in text and "CPU minutes" in text


def test_every_field_of_config_has_a_comment_and_a_block():
    for Config in (ddpm.Config, Toy):
        lines = read_lines(Config)
        assert list(lines) == [f.name for f in dataclasses.fields(Config)]
        assert all(line.comment and line.block for line in lines.values())


def test_a_line_says_comment_rule_and_block():
    lines = read_lines(Toy)
    assert lines["T"].comment == "diffusion steps, >= 1" and lines["T"].rule == ">= 1"
    assert lines["learning_rate"].rule == "> 0" and lines["flip"].rule is None
    blocks = {name: line.block for name, line in lines.items()}
    assert [n for n, block in blocks.items() if block == "sampling"] == ["n_samples"]
    assert blocks["T"] == "model" and blocks["warmup"] == "training"
    lines = read_lines(ddpm.Config)
    assert lines["beta_1"].rule == "in (0, 1)" and lines["dropout"].rule == "in [0, 1)"
    assert lines["image_size"].rule == ">= 0" and lines["clip_x0"].rule is None
    assert {n for n, line in lines.items() if line.block == "sampling"} == {
        "variance", "clip_x0", "eps_scale", "temperature", "n_samples"}


CELL = """
import dataclasses
from dataclasses import dataclass
from typing import Literal

@dataclass(frozen=True)
class CellConfig:
    # model
    T: int = 10  # diffusion steps, >= 1 (paper: 1000)
    share: float = 0.5  # of something, in [0, 1)
    kind: Literal["a", "b"] = "a"  # a or b
    # sampling
    S: int = {S}  # steps of a draw, >= 1

PRESETS = {{"laptop": CellConfig()}}
"""


def run_cell(monkeypatch, text, number=1, module=None, keep=True):
    """The CellConfig of a notebook cell, made as IPython makes it: no file, a linecache entry."""
    name = f"<ipython-input-{number}-abc>"
    if keep:
        entry = (len(text), None, text.splitlines(keepends=True), name)
        monkeypatch.setitem(linecache.cache, name, entry)
    if module is None:
        module = types.ModuleType("__main__")  # a kernel's has no __file__ either
        monkeypatch.setitem(sys.modules, "__main__", module)
    exec(compile(text, name, "exec"), vars(module))
    return module


def test_a_notebook_cell_is_read_like_a_file(monkeypatch, capsys):
    module = run_cell(monkeypatch, CELL.format(S=50))
    Config = module.CellConfig
    lines = read_lines(Config)
    assert lines["T"].comment == "diffusion steps, >= 1 (paper: 1000)"
    assert lines["T"].rule == ">= 1" and lines["share"].rule == "in [0, 1)"
    assert {name: line.block for name, line in lines.items()} == {
        "T": "model", "share": "model", "kind": "model", "S": "sampling"}
    assert parse_args(Config, module.PRESETS, ["--T", "3"])[0] == Config(T=3)
    said = complaint(capsys, parse_args, Config, module.PRESETS, ["--share", "1"])
    assert "--share 1.0: must be in [0, 1)" in said
    with pytest.raises(SystemExit):
        parse_args(Config, module.PRESETS, ["--help"])
    assert "diffusion steps, >= 1 (paper: 1000)" in " ".join(capsys.readouterr().out.split())


def test_a_cell_that_was_edited_and_run_again_counts(monkeypatch):
    first = CELL.format(S=50)
    module = run_cell(monkeypatch, first)
    run_cell(monkeypatch, first.replace("S: int = 50  # steps of a draw, >= 1",
                                        "S: int = 50  # steps, >= 7"), 2, module)
    assert read_lines(module.CellConfig)["S"].rule == ">= 7"


@dataclasses.dataclass(frozen=True)
class Mine(Toy):
    T: int = 4  # my own, >= 3


def test_a_config_that_inherits_another_s_lines():
    lines, before = read_lines(Mine), read_lines(Toy)
    assert lines.pop("T").rule == ">= 3" and before.pop("T").rule == ">= 1"
    assert lines == before


def test_without_any_source_the_flags_still_work(monkeypatch, capsys):
    module = run_cell(monkeypatch, CELL.format(S=50), keep=False)
    Config = module.CellConfig
    lines = read_lines(Config)
    assert list(lines) == ["T", "share", "kind", "S"]
    assert all((line.comment, line.rule, line.block) == ("", None, "") for line in lines.values())
    cfg, _ = parse_args(Config, module.PRESETS, ["--T", "3", "--S", "7", "--kind", "b"])
    assert cfg == Config(T=3, S=7, kind="b")
    # what types and words say is checked all the same
    said = complaint(capsys, parse_args, Config, module.PRESETS, ["--kind", "c"])
    assert "--kind c: must be one of a, b" in said
    assert "finite" in complaint(capsys, parse_args, Config, module.PRESETS, ["--share", "nan"])


def test_arguments_of_a_notebook_kernel_are_ignored(monkeypatch):
    for kernel in ("ipykernel_launcher.py", "colab_kernel_launcher.py"):
        monkeypatch.setattr(sys, "argv", [f"/x/{kernel}", "-f", "/x/kernel.json"])
        assert parse_args(Toy, TOYS)[0] == Toy()
    monkeypatch.setattr(sys, "argv", ["ddpm_example.py", "--T", "3"])
    assert parse_args(Toy, TOYS)[0].T == 3


def test_config_round_trip(tmp_path):
    cfg = Toy(T=3, learning_rate=1.0, widths=(5, 6), flip=True, kind="b")
    file = tmp_path / "config.json"
    stored = {"script": "toy", "seed": 17, "config": dataclasses.asdict(cfg)}
    file.write_text(json.dumps(stored))
    found, opts = parse("--config", str(file))
    assert found == cfg and opts.seed == 17
    assert parse("--config", str(file), "--T", "9")[0] == dataclasses.replace(cfg, T=9)
    for seed in (4, 0):  # a seed given by hand counts, 0 too
        assert parse("--config", str(file), "--seed", str(seed))[1].seed == seed
    assert parse()[1].seed is None and parse("--seed", "5")[1].seed == 5


def test_config_keeps_the_preset_of_the_run(tmp_path):
    """The preset goes into the checkpoint: --sample takes the sampling fields from it."""
    _, run = open_toy(tmp_path, "--preset", "smoke")
    _, again = open_toy(tmp_path, "--config", run.path("config.json"))
    assert again.opts.preset == "smoke"
    assert again.path("config.json").read_text() == run.path("config.json").read_text()


@pytest.mark.parametrize("change", [{"T": "ten"}, {"T": True}, {"widths": 3}, {"flip": 1},
                                    {"unknown": 1}, {"kind": None}])
def test_config_of_another_kind_is_refused(change, capsys):
    said = complaint(capsys, config_from, dataclasses.asdict(Toy()) | change, Toy, "here")
    assert "here" in said and next(iter(change)) in said


@pytest.mark.parametrize("flag, nearest", [
    ("--learning_rat", "--learning_rate"), ("--batchsize", "--batch_size"), ("--widht", "--width"),
    ("--n-sampels", "--n-samples"), ("--evalute", "--evaluate")])
def test_a_misspelt_flag_gets_the_nearest_one_named(flag, nearest, capsys):
    said = complaint(capsys, parse, flag, "1")
    assert f"{flag}: no such flag" in said and nearest in said


def test_a_flag_near_to_none_is_only_named(capsys):
    said = complaint(capsys, parse, "--qqqqq", "1")
    assert "--qqqqq: no such flag" in said and "nearest" not in said
    # half a flag is a mistake too: with abbreviations a new flag would change old commands
    assert "--learning: no such flag" in complaint(capsys, parse, "--learning", "1")


@dataclasses.dataclass(frozen=True)
class Ruled:
    whole: int = 1  # a number, >= 1 (paper: 4)
    positive: float = 1.0  # > 0, the smaller the slower
    inside: float = 0.5  # a share, in (0, 1) (paper: 0.1)
    half_open: float = 0.0  # in [0, 1)
    closed: float = 0.0  # in [0, 1]
    signed: float = 0.0  # in [-1, 1]
    below: float = 0.0  # >= -1.5
    free: float = 0.0  # any number
    each: tuple[int, ...] = (1, 2)  # of every level, >= 1
    shares: tuple[float, ...] = ()  # of every level, in (0, 1]
    word: Literal["a", "b"] = "a"  # which of them
    words: tuple[Literal["a", "b"], ...] = ("a",)  # some of them


@pytest.mark.slow
@pytest.mark.parametrize("name, rule, good, bad", [
    ("whole", ">= 1", [1, 2], [0, -1]),
    ("positive", "> 0", [0.1, 1e9], [0.0, -1.0, math.nan, math.inf, -math.inf]),
    ("inside", "in (0, 1)", [0.5], [0.0, 1.0, math.nan, math.inf]),
    ("half_open", "in [0, 1)", [0.0, 0.99], [1.0, -0.1, math.nan]),
    ("closed", "in [0, 1]", [0.0, 1.0], [2.0, -0.1, math.nan]),
    ("signed", "in [-1, 1]", [-1.0, 1.0], [-1.1, 1.1]),
    ("below", ">= -1.5", [-1.5, 3.0], [-1.6, math.inf]),
    ("free", "finite", [-3.0, 1e30], [math.nan, math.inf, -math.inf]),
    ("each", ">= 1", [(), (1,), (3, 1)], [(0,), (1, 0), (2, -1, 2)]),
    ("shares", "in (0, 1]", [(), (0.5, 1.0)], [(0.0,), (0.5, 1.5), (math.nan,)]),
    ("word", "one of a, b", ["a", "b"], ["c", "", "A"])])
def test_check_config_holds_values_to_their_lines(name, rule, good, bad, capsys):
    for value in good:
        check_config(Ruled(**{name: value}))
    for value in bad:
        typed = " ".join(map(str, value)) if isinstance(value, tuple) else value
        said = complaint(capsys, check_config, Ruled(**{name: value}))
        assert said == f"error: --{name} {typed}: must be {rule}\n"


def test_the_first_line_that_is_broken_is_told(capsys):
    assert "--whole 0" in complaint(capsys, check_config, Ruled(whole=0, positive=0.0, word="c"))


def test_a_value_error_of_the_script_is_told_in_one_line(capsys):
    def clash():
        raise ValueError("S 30: must be in [1, 20]")

    space = {"clash": clash, "torch": torch, "__name__": "toy_script"}  # the script's own globals
    exec("def fits():\n    raise ValueError('S 30: must be in [1, 20]')\n"
         "def main(argv=None):\n    return {'own': fits, 'other': clash,\n"
         "        'torch': lambda: torch.ones(3).view(2), 'fine': lambda: argv,\n"
         "        'deep': lambda: torch.randn(2).view(3)}[argv]()", space)
    main = command_line(space["main"])
    assert main("fine") == "fine"
    assert complaint(capsys, main, "own") == "error: --S 30: must be in [1, 20]\n"
    with pytest.raises(ValueError):  # an error from anywhere else keeps its traceback
        main("other")
    with pytest.raises(RuntimeError):
        main("torch")


# Runs


def images(n=40, labels=True):
    """Data of pictures that say who they are: picture i is i everywhere, brighter to its right."""
    x = torch.arange(n).float().view(-1, 1, 1, 1) / n + torch.tensor([0.0, 0.001]).view(1, 1, 1, 2)
    x = x + torch.tensor([0.0, 0.01]).view(1, 1, 2, 1)  # (n, 1, 2, 2)
    y = torch.arange(n)
    held_out = n // 4
    if not labels:
        return data.Data("toy", x[held_out:], x[:held_out])
    return data.Data("toy", x[held_out:], x[:held_out], y[held_out:], y[:held_out],
                     tuple(map(str, range(n))))


def open_toy(out, *argv):
    """(cfg, run) of Toy, as the main of a script makes them."""
    return open_run("toy", Toy, TOYS, ["--device", "cpu", "--out", str(out), *map(str, argv)])


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def fit(run, steps=6, watch=None, name="model", **options):
    """Train a small network as a script's train does; watch(step, optimizer) ends each step."""
    made = images()
    model = run.place(network())
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in run.training(steps, model, optimizer, name=name, ema=average, **options):
        x, _ = run.batch(made, run.cfg.batch_size)
        loss = (model(x + 0.1 * torch.randn_like(x)) - x.flatten(1).mean(1, True)).square().mean()
        optimizer.zero_grad()
        run.backward(loss, optimizer, 1.0)
        optimizer.step()
        for a, b in zip(average.parameters(), model.parameters(), strict=True):
            a.data.lerp_(b.data, 0.5)
        if watch:
            watch(step, optimizer)
    return model, average


def stored(run):
    return torch.load(run.path("checkpoint.pt"), weights_only=True)


def save(run, step=3):
    """A checkpoint as training writes it, of a model that is also its own average."""
    model = nn.Linear(2, 2)
    modules = {"model": model, "ema": model}
    run._save(step, "model", modules, torch.optim.AdamW(model.parameters()))
    return model


def test_run_folders_are_unique(tmp_path):
    runs = [open_toy(tmp_path)[1] for _ in range(5)]
    assert list(tmp_path.iterdir()) == []  # a folder is made when it is first asked for
    folders = {run.folder for run in runs}
    assert len(folders) == 5 and all(f.parent == tmp_path / "toy" for f in folders)
    for folder in folders:
        found = json.loads((folder / "config.json").read_text())
        assert found["config"]["T"] == 10 and found["seed"] == 0 and found["script"] == "toy"
        assert found["preset"] == "laptop"


def test_checkpoints_are_plain_and_replaced_as_a_whole(tmp_path, monkeypatch):
    _, run = open_toy(tmp_path)
    model = save(run)
    state = stored(run)
    assert state["step"] == 3 and state["config"] == dataclasses.asdict(Toy())
    assert_close(state["model"]["weight"], model.weight.detach())
    whole = run.path("checkpoint.pt").read_bytes()

    def dies(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError):
        save(run, step=4)
    assert run.path("checkpoint.pt").read_bytes() == whole


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    _, opts = parse_args(Toy, TOYS, ["--out", str(tmp_path), "--seed", "0"])
    run = Run("toy", Toy(), opts, Launch(torch.device("cpu"), rank=1, world=2))
    for name in ("gather", "average", "broadcast"):  # there is no other process to talk to
        monkeypatch.setattr(run.launch, name, lambda value: value)
    save(run)
    run.log(1, loss=0.5)
    run.add_metrics(a=1)
    fit(run, 2)
    assert run.folder is None and list(tmp_path.iterdir()) == []


def test_log_and_metrics(tmp_path):
    _, run = open_toy(tmp_path)
    assert run.read_log() == {} and run.read_metrics() == {}
    for step in range(1, 6):
        run.log(step, loss=step / 10, lr=1.0)
        run.log(step, "vae_log.csv", kl=2.0)
    run.trim_log(3)
    assert run.read_log() == {"step": [1, 2, 3], "loss": [0.1, 0.2, 0.3], "lr": [1, 1, 1]}
    assert run.read_log("vae_log.csv") == {"step": [1, 2, 3, 4, 5], "kl": [2] * 5}
    run.log(4, loss=0.5, lr=1.0)  # a log goes on after its end
    assert run.read_log()["step"] == [1, 2, 3, 4]
    run.add_metrics(a=1, b=2)
    run.add_metrics(b=3)
    assert run.read_metrics() == {"a": 1, "b": 3}


def test_newest_run(tmp_path):
    assert newest(tmp_path, ("toy",)) is None
    runs = [open_toy(tmp_path)[1] for _ in range(3)]
    for age, run in enumerate(runs):
        save(run)
        os.utime(run.path("checkpoint.pt"), (1000 - age, 1000 - age))
    open_toy(tmp_path)[1].path("config.json")  # without a checkpoint it is no candidate
    assert newest(tmp_path, ("toy",)) == runs[0].folder
    assert newest(tmp_path, ("other",)) is None
    assert load_checkpoint(runs[1].folder, ("toy",))["step"] == 3


# What of a Config --sample takes from where


@pytest.fixture(scope="module")
def drawn_from(tmp_path_factory):
    """A finished run of the smoke preset whose checkpoint holds other values of some fields."""
    out = tmp_path_factory.mktemp("drawn_from")
    _, run = open_toy(out, "--preset", "smoke", "--n_samples", 77, "--T", 5, "--seed", 3)
    fit(run, 2)
    return run.folder


@pytest.mark.slow
def test_sampling_fields_come_from_the_script_and_all_others_from_the_checkpoint(drawn_from, tmp_path):
    assert torch.load(drawn_from / "checkpoint.pt")["config"]["n_samples"] == 77
    cfg, run = open_toy(tmp_path, "--sample", drawn_from)
    assert run.sampling
    assert cfg.n_samples == 2  # of the preset that it was trained by, not 77, nor the default 4
    assert cfg.T == 5 and cfg.widths == (3,)
    cfg, _ = open_toy(tmp_path, "--sample", drawn_from, "--preset", "laptop")
    assert cfg.n_samples == 4  # of the preset named
    assert cfg.T == 5 and cfg.widths == (3,)
    cfg, _ = open_toy(tmp_path, "--sample", drawn_from, "--n_samples", 9)
    assert cfg.n_samples == 9 and cfg.T == 5
    cfg, _ = open_toy(tmp_path, "--sample", drawn_from, "--n_samples", 9, "--preset", "laptop")
    assert cfg.n_samples == 9 and cfg.T == 5
    cfg, _ = open_toy(tmp_path, "--sample", drawn_from, "--T", 5)  # what agrees may be said
    assert cfg.T == 5 and cfg.n_samples == 2
    assert list(tmp_path.iterdir()) == []


def test_a_preset_edited_since_counts_for_the_draw_alone_and_is_told(drawn_from, tmp_path, capsys):
    edited = {"laptop": Toy(), "smoke": Toy(T=2, widths=(9, 9), n_samples=31)}
    cfg, _ = open_run("toy", Toy, edited, ["--out", str(tmp_path), "--sample", str(drawn_from)])
    assert cfg.n_samples == 31 and cfg.widths == (3,)
    said, _ = capsys.readouterr().out.splitlines()
    assert "widths 3 (here 9 9)" in said and "T 5 (here 2)" in said and "n_samples" not in said
    open_toy(tmp_path, "--resume", drawn_from)
    assert len(capsys.readouterr().out.splitlines()) == 1  # a run that goes on is no edit


@pytest.mark.parametrize("how", ["--sample", "--resume"])
@pytest.mark.parametrize("argv, words", [
    (("--T", 6), ["--T 6", "made with 5"]), (("--widths", 3, 4), ["--widths 3 4", "made with 3"]),
    (("--flip",), ["--flip True", "made with False"])])
def test_a_flag_that_contradicts_the_checkpoint_is_an_error(argv, words, how, drawn_from, tmp_path, capsys):
    said = complaint(capsys, open_toy, tmp_path, how, drawn_from, *argv)
    assert all(word in said for word in words) and str(drawn_from) in said
    assert list(tmp_path.iterdir()) == []


def test_sampling_flags_are_checked_under_sample_too(drawn_from, tmp_path, capsys):
    said = complaint(capsys, open_toy, tmp_path, "--sample", drawn_from, "--n_samples", 0)
    assert "--n_samples 0: must be >= 1" in said


def test_another_script_s_checkpoint_gives_what_the_two_share(drawn_from, tmp_path, capsys):
    @dataclasses.dataclass(frozen=True)
    class Fewer:
        T: int = 10  # steps, >= 1
        extra: float = 0.25  # its own
        n_samples: int = 8  # drawn
        batch_size: int = 8  # a step

    argv = ["--out", str(tmp_path), "--sample", str(drawn_from)]
    cfg, _ = open_run("other", Fewer, {"smoke": Fewer(extra=0.75)}, argv, reads=("toy",))
    assert cfg.T == 5 and cfg.extra == 0.75
    said = complaint(capsys, open_run, "other", Fewer, {"smoke": Fewer()}, argv)
    assert "made by 'toy', this script reads 'other'" in said


def test_the_config_of_a_sampling_run_is_that_of_its_draw(drawn_from, tmp_path):
    _, run = open_toy(tmp_path, "--sample", drawn_from, "--n_samples", 9, "--seed", 8)
    found = json.loads(run.path("config.json").read_text())
    assert found["config"]["n_samples"] == 9 and found["config"]["T"] == 5
    assert found["seed"] == 8 and found["preset"] == "smoke"


def test_resume_takes_the_seed_of_the_run(drawn_from, tmp_path):
    _, run = open_toy(tmp_path, "--resume", drawn_from)
    assert run.opts.seed == 3 and not run.sampling and run.folder == drawn_from


# A training step


def test_load_and_place(tmp_path, capsys):
    _, run = open_toy(tmp_path)
    made = run.load(images(labels=False))
    assert made.train.device == run.device and made.name == "toy"
    model = run.place(nn.Conv2d(3, 4, 3))
    assert model.weight.device == run.device
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    _, run = open_toy(tmp_path, "--evaluate", 10)
    assert run.load(images()).classes
    said = complaint(capsys, run.load, images(labels=False))
    assert "--evaluate 10" in said and "no labels" in said


@pytest.mark.parametrize("decay", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_training_sets_the_learning_rate_of_the_optimiser(decay, warmup, tmp_path):
    _, run = open_toy(tmp_path, "--warmup", warmup, "--decay", decay)
    model, rates = nn.Linear(2, 2), []
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)  # its own peak, whatever cfg says
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    for step in run.training(100, model, optimizer, keep=False):
        assert step == len(rates)
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == second
        rates.append(first)
    expected = [2.0 * min(1.0, (step + 1) / max(warmup, 1)) for step in range(100)]
    if decay == "cosine":
        expected = [rate * (1 + math.cos(math.pi * step / 100)) / 2
                    for step, rate in enumerate(expected)]
        assert 0 < rates[-1] < 1e-3
    assert_close(rates, expected)
    assert rates[50] == (2.0 if decay == "constant" else pytest.approx(1.0))


def test_another_optimiser_gets_its_own_rate_by_the_same_rule(tmp_path):
    """The optimisers of two networks that one loop trains; both are kept and resumed."""
    _, run = open_toy(tmp_path, "--warmup", 4)
    model, rates = nn.Linear(2, 2), []
    one, two = (torch.optim.SGD(model.parameters(), lr=lr) for lr in (2.0, 0.5))
    for _ in run.training(6, model, one, second=two, keep=False):
        rates.append((one.param_groups[0]["lr"], two.param_groups[0]["lr"]))
    shares = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert_close(rates, [(2.0 * share, 0.5 * share) for share in shares])


def test_an_error_in_the_loop_puts_everything_back(tmp_path):
    _, run = open_toy(tmp_path, "--amp", "bf16")
    model = nn.Linear(2, 2)
    before = signal.getsignal(signal.SIGINT)
    loop = run.training(6, model, torch.optim.SGD(model.parameters(), 1.0), keep=False)
    next(loop)
    assert "forward" in vars(model) and signal.getsignal(signal.SIGINT) is not before
    with pytest.raises(KeyError):
        loop.throw(KeyError)
    assert "forward" not in vars(model) and signal.getsignal(signal.SIGINT) is before


def test_a_part_is_a_run_in_a_folder_of_its_own(tmp_path):
    cfg, run = open_toy(tmp_path)
    part = run.part("coarse", dataclasses.replace(cfg, T=3))
    assert part.folder == run.folder / "coarse" and part.cfg.T == 3 and run.cfg.T == 10
    part.add_metrics(a=1)
    assert part.read_metrics() == {"a": 1} and run.read_metrics() == {}
    fit(part, 2)
    assert stored(part)["config"]["T"] == 3 and not run.path("checkpoint.pt").exists()


def test_a_batch_is_of_the_training_part_with_the_labels_of_its_pictures(tmp_path):
    _, run = open_toy(tmp_path)
    made, seen = images(), set()
    for _ in range(40):
        x, y = run.batch(made, 16)
        assert x.shape == (16, 1, 2, 2) and y.shape == (16,) and y.dtype == torch.int64
        assert_close(x[:, 0, 0, 0], y / 40)
        seen |= set(y.tolist())
    assert seen == set(range(10, 40))  # all of the training part, nothing of the held-out one
    x, y = run.batch(images(labels=False), 16)
    assert y is None and x.shape == (16, 1, 2, 2)
    points = data.Data("points", torch.arange(20.0).view(10, 2), torch.zeros(2, 2))
    x, y = run.batch(points, 5)
    assert y is None and x.shape == (5, 2) and (x[:, 1] - x[:, 0] == 1).all()


def test_flip_mirrors_left_and_right_for_half_of_the_pictures(tmp_path):
    _, run = open_toy(tmp_path)
    x, y = run.batch(images(), 4000, flip=True)
    right = (x[:, 0, 0, 1] - x[:, 0, 0, 0] > 0)  # as it was
    below = (x[:, 0, 1, 0] - x[:, 0, 0, 0] > 0)
    assert abs(right.double().mean() - 0.5) < 0.03 and below.all()
    assert_close(torch.where(right, x[:, 0, 0, 0], x[:, 0, 0, 1]), y / 40)
    assert right[:2000].any() and not right[:2000].all()  # each picture by itself
    x, _ = run.batch(images(), 400)
    assert (x[:, 0, 0, 1] > x[:, 0, 0, 0]).all()


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "launch", lambda name: Launch(torch.device("cpu"), 0, 3))
    said = complaint(capsys, open_toy, tmp_path)
    assert said.startswith("error: --batch_size 8: must be a multiple of 3") and "processes" in said
    monkeypatch.setenv("RANK", "1")  # under torchrun all find the mistake and one tells it
    with pytest.raises(SystemExit) as stop:
        open_toy(tmp_path)
    assert stop.value.code == 2 and capsys.readouterr().err == ""


def test_each_process_draws_its_share_of_the_batch(tmp_path):
    _, opts = parse_args(Toy, TOYS, ["--out", str(tmp_path), "--seed", "0"])
    for rank in range(3):
        run = Run("toy", Toy(), opts, Launch(torch.device("cpu"), rank, 3))
        assert len(run.batch(images(), 12)[0]) == 4


def one_step(out, *, clip=1e9, scale=1.0, **notes):
    """(gradient, run) of one backward whose gradient is scale * (3, 4)."""
    _, run = open_toy(out)
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], 0.0)
    model = nn.Module()
    model.weight = weight
    for _ in run.training(1, model, optimizer, keep=False):
        loss = scale * (weight * torch.tensor([3.0, 4.0])).sum() + 0.5
        run.backward(loss, optimizer, clip, **notes)
    return weight.grad, run


def test_backward_clips_to_the_norm_and_notes_loss_and_norm(tmp_path):
    gradient, run = one_step(tmp_path)
    assert_close(gradient, torch.tensor([3.0, 4.0]))
    assert run.row == {"loss": 0.5, "grad_norm": pytest.approx(5.0)}
    gradient, run = one_step(tmp_path, clip=1.0)
    assert_close(gradient, torch.tensor([0.6, 0.8]), rtol=1e-4, atol=1e-5)
    assert run.row["grad_norm"] == pytest.approx(5.0)  # the norm that it had
    gradient, run = one_step(tmp_path, clip=10.0)  # a short one is not made longer
    assert_close(gradient, torch.tensor([3.0, 4.0]))
    _, run = one_step(tmp_path, kl=torch.tensor(0.25), mse=torch.tensor(4.0))
    assert run.row == {"loss": 0.5, "grad_norm": pytest.approx(5.0), "kl": 0.25, "mse": 4.0}


def test_the_log_holds_what_backward_saw(tmp_path):
    _, run = open_toy(tmp_path, "--warmup", 4)
    seen = []
    fit(run, 5, lambda step, optimizer: seen.append((run.row["loss"], run.row["grad_norm"])))
    log = run.read_log()
    assert list(log) == ["step", "loss", "grad_norm", "lr"] and log["step"] == [1, 2, 3, 4, 5]
    assert_close(list(zip(log["loss"], log["grad_norm"], strict=True)), seen)
    assert_close(log["lr"], [0.0025, 0.005, 0.0075, 0.01, 0.01])


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("bad_at, kept", [(0, 0), (3, 2), (4, 4)])
def test_what_is_not_finite_stops_and_names_step_and_checkpoint(what, bad_at, kept, tmp_path, capsys):
    _, run = open_toy(tmp_path, "--preview_every", 2)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)

    def diverge():
        for step in run.training(6, model, optimizer):
            loss = (model.weight**2).sum()
            if step == bad_at and what == "loss":
                loss = loss * math.nan
            if step == bad_at and what == "gradient":  # 0, whose root has no gradient
                loss = loss + (model.bias - model.bias.detach()).abs().sqrt().sum()
            optimizer.zero_grad()
            run.backward(loss, optimizer, 1.0)
            optimizer.step()

    with pytest.raises(SystemExit) as stop:
        diverge()
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(said) == 1
    assert f"{what}" in said[0] and "nan" in said[0] and f"at step {bad_at + 1}," in said[0]
    assert f"checkpoint is that of step {kept} in {run.folder}" in said[0] and "0.5" in said[0]
    assert stored(run)["step"] == kept
    assert all(torch.isfinite(p).all() for p in stored(run)["model"].values())


def test_checkpoints_and_previews_come_every_so_many_steps(tmp_path):
    _, run = open_toy(tmp_path, "--preview_every", 2)
    previews, kept = [], []

    def preview(step):
        previews.append((step, stored(run)["step"]))

    model, average = fit(run, 5, lambda step, _: kept.append(stored(run)["step"]), preview=preview)
    assert previews == [(2, 2), (4, 4)]
    assert kept == [0, 0, 2, 2, 4]  # the first before any step: killed early it can be resumed
    state = stored(run)
    assert state["step"] == 5 and state["preset"] == "laptop" and state["loop"] == "model"
    assert_same_tree(dict(model.state_dict()), dict(state["model"]))
    assert_same_tree(dict(average.state_dict()), dict(state["ema"]))
    found = run.read_metrics()
    assert found["steps"] == 5 and found["parameters"] == 4 * 3 + 3 + 3 + 1
    assert found["steps_per_second"] > 0 and found["train_seconds"] > 0
    assert 0 <= found["share_outside_core"] < 1
    assert_close(found["loss_of_last_500"], sum(run.read_log()["loss"]) / 5)


def test_the_mean_loss_of_the_end_is_of_its_last_500_steps(tmp_path):
    _, run = open_toy(tmp_path)
    fit(run, 510)
    losses = run.read_log()["loss"]
    assert_close(run.read_metrics()["loss_of_last_500"], sum(losses[10:]) / 500)


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 3, 4, 5])
def test_training_resumes_to_the_same_bytes(stop_at, tmp_path):
    _, whole = open_toy(tmp_path / "whole", "--preview_every", 2, "--seed", 7)
    fit(whole)

    _, parts = open_toy(tmp_path / "parts", "--preview_every", 2, "--seed", 7)

    def stop(step, _):
        parts.stopped = step + 1 == stop_at

    fit(parts, watch=stop)
    assert stored(parts)["step"] == stop_at and parts.read_log()["step"][-1] == stop_at
    torch.randn(3)  # what another program drew must not matter
    _, again = open_toy(tmp_path / "parts", "--resume", "--preview_every", 2)
    steps = []
    fit(again, watch=lambda step, _: steps.append(step))
    assert steps == list(range(stop_at, 6)) and again.folder == parts.folder
    for name in ("checkpoint.pt", "log.csv", "config.json"):
        assert again.path(name).read_bytes() == whole.path(name).read_bytes(), name


def test_a_run_killed_between_checkpoints_resumes_to_the_same_bytes(tmp_path):
    _, whole = open_toy(tmp_path / "whole", "--preview_every", 4)
    fit(whole)
    for die_at in (1, 5):  # before the first periodic checkpoint, and after it
        out = tmp_path / str(die_at)
        _, parts = open_toy(out, "--preview_every", 4)

        def die(step, _, parts=parts, die_at=die_at):
            if step == die_at:
                raise MemoryError

        with pytest.raises(MemoryError):
            fit(parts, watch=die)
        assert stored(parts)["step"] == die_at // 4 * 4
        _, again = open_toy(out, "--resume")
        fit(again)
        for name in ("checkpoint.pt", "log.csv"):
            assert again.path(name).read_bytes() == whole.path(name).read_bytes(), name


def test_a_finished_run_resumed_does_nothing_more(tmp_path):
    _, run = open_toy(tmp_path)
    fit(run)
    before = run.path("checkpoint.pt").read_bytes(), run.path("log.csv").read_bytes()
    _, again = open_toy(tmp_path, "--resume")
    model, _ = fit(again, watch=lambda *_: pytest.fail("a step was made"))
    assert (run.path("checkpoint.pt").read_bytes(), run.path("log.csv").read_bytes()) == before
    assert_same_tree(dict(model.state_dict()), dict(stored(run)["model"]))


def test_a_loop_that_is_not_kept_writes_nothing(tmp_path):
    _, run = open_toy(tmp_path, "--preview_every", 2)
    steps = []
    fit(run, 5, lambda step, _: steps.append(step), keep=False,
        preview=lambda _: pytest.fail("a preview was asked for"))
    assert steps == [0, 1, 2, 3, 4] and list(tmp_path.iterdir()) == []


def two_loops(run, stop=None):
    """An autoencoder, then the model, as in latent diffusion: (autoencoder, model, steps made)."""
    steps, made = [], images()
    vae, model = run.place(network()), run.place(network())
    for name, module, others in (("vae", vae, {}), ("model", model, {"vae": vae})):
        optimizer = torch.optim.AdamW(module.parameters(), 0.01)
        for step in run.training(4, module, optimizer, name=name, **others):
            x, _ = run.batch(made, 8)
            loss = (module(x) - x.flatten(1).mean(1, True)).square().mean()
            optimizer.zero_grad()
            run.backward(loss, optimizer, 1.0)
            optimizer.step()
            steps.append((name, step))
            run.stopped = run.stopped or (name, step) == stop
        if run.stopped:
            break
    return vae, model, steps


def test_a_checkpoint_of_a_later_loop_skips_the_earlier_one(tmp_path):
    _, whole = open_toy(tmp_path / "whole")
    *_, all_steps = two_loops(whole)
    assert all_steps == [(name, step) for name in ("vae", "model") for step in range(4)]
    assert whole.read_log("vae_log.csv")["step"] == whole.read_log()["step"] == [1, 2, 3, 4]
    found = whole.read_metrics()
    assert found["vae_steps"] == found["steps"] == 4 and found["vae_train_seconds"] > 0

    for stop, first in ((("model", 1), 6), (("vae", 1), 2)):
        out = tmp_path / "_".join(map(str, stop))
        _, parts = open_toy(out)
        vae, _, _ = two_loops(parts, stop)
        assert stored(parts)["loop"] == stop[0]
        _, again = open_toy(out, "--resume")
        restored, _, steps = two_loops(again)
        assert steps == all_steps[first:]  # of the earlier loop nothing, if it was finished
        if stop[0] == "model":
            assert_same_tree(dict(restored.state_dict()), dict(vae.state_dict()))
        for name in ("log.csv", "vae_log.csv", "checkpoint.pt"):
            assert again.path(name).read_bytes() == whole.path(name).read_bytes(), name


def test_stopped_ends_the_loop_after_the_step_and_saves(tmp_path):
    _, run = open_toy(tmp_path)

    def stop(step, _):
        run.stopped = step == 2

    fit(run, 100, stop)
    assert stored(run)["step"] == 3 and run.read_log()["step"] == [1, 2, 3]
    assert run.read_metrics()["steps"] == 3


def test_ctrl_c_ends_the_loop_and_the_answer_to_it_is_put_back(tmp_path):
    _, run = open_toy(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    fit(run, 3)
    assert signal.getsignal(signal.SIGINT) is before
    fit(run, 100, lambda step, _: step == 1 and signal.raise_signal(signal.SIGINT), name="second")
    assert run.stopped and stored(run)["step"] == 2


def test_ctrl_c_twice_leaves_at_once(tmp_path, monkeypatch):
    class Left(Exception):
        pass

    def leave(status):
        assert status == 130
        raise Left

    monkeypatch.setattr(os, "_exit", leave)
    _, run = open_toy(tmp_path)

    def twice(step, _):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Left):
        fit(run, 100, twice)


def test_trained_is_the_average_of_the_checkpoint_in_eval_mode(drawn_from, tmp_path, capsys):
    _, run = open_toy(tmp_path, "--sample", drawn_from)
    state = torch.load(drawn_from / "checkpoint.pt")
    model = run.trained(network())
    assert_same_tree(dict(model.state_dict()), dict(state["ema"]))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    other = run.trained(network(), "model")
    assert_same_tree(dict(other.state_dict()), dict(state["model"]))
    assert not torch.equal(other[1].weight, model[1].weight)
    assert "holds no vae" in complaint(capsys, run.trained, network(), "vae")
    assert "weights do not fit" in complaint(capsys, run.trained, nn.Linear(2, 2))


# Sampling


class Sampler:
    """Samples of 1 1x2x2 noise in three steps, each of which calls the network twice."""

    def __init__(self):
        self.network, self.batches = nn.Linear(4, 4), []

    def __call__(self, batch):
        self.batches.append(batch)
        x = torch.randn(len(batch), 1, 2, 2)
        for t in (3, 2, 1):
            yield t, x
            x = x + self.network(self.network(x.flatten(1))).view(x.shape).detach()
        yield 0, x


def test_draw_puts_batches_together_and_counts_the_calls(tmp_path):
    _, run = open_toy(tmp_path)
    states = Sampler()
    torch.manual_seed(1)
    x, found = run.draw(10, states, states.network, 3, batch_size=4)
    assert states.batches == [range(4), range(4, 8), range(8, 10)] and x.shape == (10, 1, 2, 2)
    assert found["n"] == 10 and found["network_calls"] == 6 and found["seconds"] > 0
    assert 0 <= found["share_outside_network"] < 1
    torch.manual_seed(1)
    expected = torch.cat([list(states(range(n)))[-1][1] for n in (4, 4, 2)])
    assert_close(x, expected, rtol=0, atol=0)
    assert not states.network._forward_hooks and not states.network._forward_pre_hooks
    x, found = run.draw(3, states, states.network, 3)
    assert len(x) == 3 and found["network_calls"] == 6
    assert list(tmp_path.iterdir()) == []


def test_score_draws_as_many_as_asked_and_always_the_same(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(metrics, "quality", lambda x, *rest: seen.append((x, *rest)) or {"legible": 1.0})
    _, run = open_toy(tmp_path, "--evaluate", 130)
    states, made, labels = Sampler(), images(), torch.arange(130)
    state = torch.get_rng_state()
    found = run.quality(states, states.network, 3, made)
    assert torch.equal(state, torch.get_rng_state())  # the caller's draws are left alone
    assert found["legible"] == 1.0 and found["n"] == 130 and found["network_calls"] == 6
    assert list(tmp_path.iterdir()) == []
    torch.randn(5)
    run.quality(states, states.network, 3, made, labels, "scored.png")
    open_picture(run.path("scored.png"))
    assert_close(seen[0][0], seen[1][0], rtol=0, atol=0)
    assert seen[0][1] is made and seen[0][2] is None and seen[1][2] is labels
    _, other = open_toy(tmp_path, "--evaluate", 130, "--seed", 1)
    other.quality(states, states.network, 3, made)
    assert not torch.equal(seen[0][0], seen[2][0])


def test_evaluate_only_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "quality", lambda *_: {"legible": 0.5})
    _, run = open_toy(tmp_path)
    states = Sampler()
    run.evaluate(states, states.network, 3, images())
    assert states.batches == [] and list(tmp_path.iterdir()) == []
    _, run = open_toy(tmp_path, "--evaluate", 12)
    run.evaluate(states, states.network, 3, images())
    open_picture(run.path("evaluated.png"))
    found = run.read_metrics()["evaluation"]
    assert states.batches == [range(12)] and found["legible"] == 0.5 and found["n"] == 12


def test_finish_writes_the_last_metrics_and_says_where(tmp_path, capsys):
    cfg, run = open_toy(tmp_path)
    fit(run)
    run.add_metrics(sampling={"seconds": 2.0}, samples={"legible": 0.5, "n": 64},
                    evaluation={"accuracy": 0.75, "frechet_distance": 12.25})
    run.finish()
    found = run.read_metrics()
    assert found["config"] == json.loads(json.dumps(dataclasses.asdict(cfg)))
    assert found["total_seconds"] >= found["train_seconds"] and found["peak_memory_mb"] > 50
    said = capsys.readouterr().out.strip().splitlines()[-1]
    for words in ("trained 0 s", "sampled 2 s", "legible 50% ± 6 points (n = 64)", "as asked 75.0%", "12.2", str(run.folder)):
        assert words in said, said


def test_finish_says_only_what_there_is(tmp_path, capsys):
    _, run = open_toy(tmp_path)
    run.finish()
    said = capsys.readouterr().out.strip()
    assert "trained" not in said and "sampled" not in said and "all in" in said


# Device


def test_device_choice():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cuda", "mps", "cpu")


def test_random_state_round_trip():
    state = random_state(torch.device("cpu"))
    a = torch.randn(4)
    set_random_state(state, torch.device("cpu"))
    assert torch.equal(a, torch.randn(4))


def test_seeded_draws_leave_the_others_alone():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    with seeded(5, torch.device("cpu")):
        inside = torch.randn(3)
    assert_close(torch.randn(3), expected, rtol=0, atol=0)
    with seeded(5, torch.device("cpu")):
        assert_close(torch.randn(3), inside, rtol=0, atol=0)
    with pytest.raises(KeyError), seeded(5, torch.device("cpu")):
        raise KeyError


def test_one_process_averages_broadcasts_and_gathers_for_itself():
    launch = Launch(torch.device("cpu"))
    x = torch.arange(3.0)
    launch.average([x])
    launch.broadcast(nn.Linear(2, 2))
    assert_close(x, torch.arange(3.0)) and launch.main
    assert launch.gather("a") == ["a"]


def test_average_keeps_shapes_and_order(monkeypatch):
    """Two processes, the other of which has everywhere 10 more."""
    from common import device

    def all_reduce(flat):
        flat += flat + 10

    monkeypatch.setattr(device.dist, "all_reduce", all_reduce)
    a, b = torch.arange(6.0).view(2, 3), torch.tensor(7.0)
    Launch(torch.device("cpu"), 0, 2).average([a, b])
    assert_close(a, torch.arange(6.0).view(2, 3) + 5)
    assert_close(b, torch.tensor(12.0))


def test_meter_counts_calls_and_their_time():
    network = nn.Linear(2, 2)
    with Meter(network, torch.device("cpu")) as meter:
        network(torch.ones(1, 2))
        network(torch.ones(1, 2))
        time.sleep(0.02)
    network(torch.ones(1, 2))
    assert meter.calls == 2 and meter.seconds >= 0.02 > meter.inside > 0


def test_stopwatch_adds_up():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch:
            time.sleep(0.02)
    assert 0.04 <= watch.seconds < 0.5


# Drawing


def pictures_of(n, channels=1, size=8):
    return torch.randn(n, channels, size, size)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_are_readable(tmp_path, channels):
    x = pictures_of(10, channels)
    made = data.Data("toy", x, x[:6] + 0.1)
    plotting.grid(tmp_path / "grid.png", x, 5, "title")
    plotting.panels(tmp_path / "panels.png", [("a", x), ("b", x[:4])], "title")
    plotting.samples(tmp_path / "samples.png", x[:5], made, "title")
    plotting.neighbours(tmp_path / "neighbours.png", x[:5], made)
    plotting.table(tmp_path / "table.png", [x[:3], x[3:6]], "title", ["a", "b"], list("xyz"))
    plotting.table(tmp_path / "uneven.png", [x[:3], pictures_of(2, channels, 4)], "title")
    for name in ("grid", "panels", "samples", "neighbours", "table", "uneven"):
        assert len(open_picture(tmp_path / f"{name}.png")) == 1


def test_samples_stand_beside_as_many_held_out_pictures(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plotting, "panels", lambda path, parts, title, columns: seen.append(parts))
    made = data.Data("toy", pictures_of(200), pictures_of(100))
    for n, shown in ((9, 9), (200, 64)):
        plotting.samples(tmp_path / "a.png", pictures_of(n), made, "title", "two")
        (how, drawn), (other, real) = seen.pop()
        assert how == "two" and other == "real, held out" and len(drawn) == len(real) == shown
        assert torch.equal(real, made.test[:shown])


@pytest.mark.parametrize("shape, most", [((2,), 5000), ((1, 16), 8)])
def test_samples_of_points_and_series_are_cut_to_what_can_be_seen(tmp_path, monkeypatch, shape, most):
    seen = []
    monkeypatch.setattr(plotting, "panels", lambda path, parts, title, columns: seen.append(parts))
    x = torch.randn(most + 50, *shape)
    for n, shown in ((3, 3), (most + 50, most)):
        plotting.samples(tmp_path / "a.png", x[:n], data.Data("toy", x, -x), "title")
        (_, drawn), (_, real) = seen.pop()
        assert torch.equal(drawn, x[:shown]) and torch.equal(real, -x[:shown])


def test_neighbours_are_of_the_training_part(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plotting, "table", lambda *args: seen.append(args))
    train = pictures_of(20)
    made = data.Data("toy", train, train[:4] + 0.5)
    plotting.neighbours(tmp_path / "a.png", train[[3, 8]] + 0.1, made)
    _, (drawn, nearest), title, _, columns = seen[0]
    assert torch.equal(nearest, train[[3, 8]]) and columns == ["0.10", "0.10"]
    assert "0.50" in title  # how far held-out pictures are


def test_points_are_drawn(tmp_path):
    x = torch.randn(300, 2)
    made = data.Data("toy", x, x)
    plotting.panels(tmp_path / "panels.png", [("a", x), ("b", x)], "title")
    plotting.samples(tmp_path / "samples.png", x, made, "title")
    plotting.fields(tmp_path / "fields.png", [("t = 1", x, x[:50], -x[:50])] * 2, "title")
    t = torch.linspace(1, 0, 9)
    plotting.flow(tmp_path / "flow.png", [("ODE", t, torch.randn(9, 20))] * 2, t.flip(0),
                  torch.linspace(-1, 1, 30), torch.rand(30, 9), "title")
    plotting.densities(tmp_path / "densities.png",
                       [("a", torch.rand(30, 30)), ("true", torch.rand(30, 30))], "title", 2.0)
    for name in ("panels", "samples", "fields", "flow", "densities"):
        assert len(open_picture(tmp_path / f"{name}.png")) == 1


def test_curves_bars_points_and_histograms(tmp_path):
    log = {"step": [1.0, 2.0, 3.0], "loss": [3.0, 2.0, 1.0], "kl": [1.0, 2.0, 3.0]}
    parts = [plotting.loss_curve(log, "loss"), plotting.loss_curve(log, "kl", "kl"),
             plotting.loss_by_t(lambda low, high: low + high, [1, 2, 4], "by t"),
             {"lines": {"a": (range(3), torch.arange(3.0), "o-"), "_b": ([0, 1], [1, 2])},
              "points": {"p": ([1], [2])}, "levels": {"held out": 1.5}, "xscale": "log"},
             {"bars": (["x", "y"], [1.0, 2.0])},
             {"histogram": torch.randn(400), "xlim": (-2, 2), "title": "h"}, None]
    plotting.curves(tmp_path / "curves.png", parts, "title")
    plotting.curves(tmp_path / "one.png", parts[:1])
    for name in ("curves", "one"):
        assert len(open_picture(tmp_path / f"{name}.png")) == 1
    assert "lines" in parts[0]  # a part may be drawn twice
    plotting.curves(tmp_path / "none.png", [None])
    assert not (tmp_path / "none.png").exists()


def test_a_loss_curve_is_each_step_and_their_mean():
    log = {"step": [1.0, 2.0, 3.0], "loss": [3.0, 2.0, 1.0]}
    part = plotting.loss_curve(log, "loss")
    steps, losses, *_ = part["lines"]["each step"]
    assert steps == log["step"] and losses == log["loss"]
    assert_close(part["lines"]["mean of 100"][1], np.array([3.0, 2.5, 2.0]))
    assert plotting.loss_curve({}, "loss") is None


def test_the_loss_by_t_asks_for_neighbouring_edges():
    asked = []
    part = plotting.loss_by_t(lambda low, high: asked.append((low, high)) or low, [1, 3, 7], "t")
    middles, heights, width = part["bars"]
    assert asked == [(1, 3), (3, 7)] and middles == [2, 5] and heights == [1, 3] and width > 0


def test_evenly():
    assert plotting.evenly(list(range(11)), 3) == [0, 5, 10]
    assert plotting.evenly(list(range(21)), 8)[::7] == [0, 20]
    assert plotting.evenly([1, 2], 8) == [1, 2] and plotting.evenly([1], 8) == [1]
    assert plotting.evenly([1, 2, 3], 1) == [1]


def test_gif_moves_and_holds_its_end(tmp_path):
    frames = [torch.full((4, 1, 8, 8), v) + torch.linspace(-0.2, 0.2, 8) for v in (-0.8, 0.0, 0.8)]
    plotting.gif(tmp_path / "a.gif", frames, 2, ["t = 2", "t = 1", "t = 0"], hold=2)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames >= 3 and picture.info["loop"] == 0
    shown = open_picture(tmp_path / "a.gif")
    middles = [f[30:].mean() for f in shown]
    assert middles[0] < middles[1] < middles[-1]


def durations(path):
    """How long each frame of a GIF is shown, in milliseconds; it must begin again at its end."""
    with Image.open(path) as picture:
        assert picture.info["loop"] == 0
        return [frame.info["duration"] for frame in ImageSequence.Iterator(picture)]


def test_a_film_of_points_moves_and_holds_its_end(tmp_path, monkeypatch):
    seen = []
    spied(monkeypatch, plotting, "_draw", lambda given, _: seen.append(
        (len(given["axis"].collections), given["axis"].get_xlim(), given["axis"].get_ylim())))
    frames = [torch.full((9, 2), value) for value in (-2.0, 0.0, 2.0)]
    plotting.film(tmp_path / "a.gif", frames, ["t", "t", "t"], limit=3, hold=5, milliseconds=40)
    assert seen == [(1, (-3, 3), (-3, 3))] * 3  # of the frame before nothing is left
    assert durations(tmp_path / "a.gif") == [40, 40, 40 * (1 + 5)]
    rows, columns = zip(*(np.nonzero(f.max(2) - f.min(2).astype(int) > 60)  # what is not grey
                          for f in open_picture(tmp_path / "a.gif")), strict=True)
    places = [(-y.mean(), x.mean()) for y, x in zip(rows, columns, strict=True)]
    assert np.diff(places, axis=0).min() > 30  # up and to the right


def test_a_film_of_series_has_a_caption_each_frame(tmp_path, monkeypatch):
    seen, titles = [], []
    monkeypatch.setattr(plotting, "_write_gif", lambda *args: seen.append(args))
    spied(monkeypatch, Axes, "set_title", lambda given, _: titles.append(
        (given["label"], len(given["self"].lines))))
    x = torch.randn(9, 1, 20)
    plotting.film(tmp_path / "a.gif", [x, x[:3], x], ["t = 1", "t = 0.5", "t = 0"])
    (path, (first, second, last), hold, milliseconds), = seen
    assert (path.name, hold, milliseconds) == ("a.gif", 12, 80)
    assert titles == [("t = 1", 8), ("t = 0.5", 3), ("t = 0", 8)]
    assert first.size == second.size == last.size and first != second != last


def test_tile_maps_minus_1_to_black_and_1_to_white():
    x = torch.stack([torch.full((1, 4, 4), -1.0), torch.full((1, 4, 4), 1.0)])
    picture = plotting.tile(x, 2, pad=0)
    assert_close(picture[:, :4], np.zeros((4, 4, 3), np.float32))
    assert_close(picture[:, 4:], np.ones((4, 4, 3), np.float32))
    assert plotting.tile(x * 5, 2, pad=0).max() == 1


def test_smooth_is_a_running_mean():
    assert_close(plotting.smooth([1.0, 2.0, 3.0, 4.0], 2), np.array([1.0, 1.5, 2.5, 3.5]))


def test_script_names_are_those_of_the_run_folders():
    for file, name in (("ddpm_example", "ddpm"), ("latent_diffusion_example", "latent"),
                       ("score_based_diffusion_example", "score_based")):
        assert script_name(types.ModuleType(file)) == name
