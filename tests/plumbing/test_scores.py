"""Scores against closed forms, the judge, and the cache of what is trained once."""

import dataclasses
import pathlib
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from common import data, quality


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
    assert_close(quality.frechet_distance(b, b), 0.0, rtol=0, atol=1e-4)
    # covariances that do not commute, against the trace of the root of their product
    mix = np.array([[1.0, 0.8, 0.0], [0.0, 0.6, -0.3], [0.2, 0.0, 1.5]])
    c = a @ mix
    product = np.linalg.eigvals(np.cov(b.T) @ np.cov(c.T)).real
    expected = (shift**2).sum() + np.trace(np.cov(b.T) + np.cov(c.T)) - 2 * np.sqrt(product).sum()
    assert_close(quality.frechet_distance(b, c), expected, rtol=1e-5, atol=1e-5)


def test_frechet_distance_of_features_without_full_rank():
    rng = np.random.default_rng(0)
    a = np.concatenate([rng.normal(size=(500, 2)), np.zeros((500, 3))], 1)
    assert_close(quality.frechet_distance(a, a + 1.0), 5.0, rtol=0, atol=1e-2)


def test_inception_score_extremes():
    assert_close(quality.inception_score(torch.eye(10).repeat(5, 1)), 10.0)  # sure and diverse
    assert_close(quality.inception_score(torch.full((50, 10), 0.1)), 1.0)  # never sure
    assert_close(quality.inception_score(torch.eye(10)[:1].repeat(50, 1)), 1.0)  # one class only
    half = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    kl = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert_close(quality.inception_score(half), math.exp(kl))


def test_precision_and_recall():
    x = torch.randn(300, 2)
    assert quality.precision_recall(x, x) == (1.0, 1.0)
    assert quality.precision_recall(x, x + 100) == (0.0, 0.0)
    both = torch.cat([x, x + 100])
    precision, recall = quality.precision_recall(both, x)  # good pictures of half of the modes
    assert precision == 1.0 and recall == 0.5
    precision, recall = quality.precision_recall(x, both)
    assert precision == 0.5 and recall == 1.0


def test_the_kth_neighbour_is_another_point():
    """The ball of a point reaches to its k-th neighbour, the point itself not counted."""
    real = torch.tensor([[0.0], [1.0], [3.0]])  # with k = 1 of radius 1, 1 and 2
    fake = torch.tensor([[-0.9], [-1.5], [4.9], [5.5]])
    # counted with itself no ball would reach anything, with k + 1 all four would be inside
    assert quality.precision_recall(real, fake, k=1)[0] == 0.5
    assert quality.precision_recall(fake, real, k=1)[1] == 0.5
    assert quality.precision_recall(real, fake, k=2)[0] == 1.0
    # the default is k = 3, the paper's
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [30.0]])
    near = torch.tensor([[-2.8], [-2.9], [-3.5], [-3.6]])
    assert quality.precision_recall(line, near)[0] == 0.5


def test_energy_distance():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]])
    # 2 E|a-b| = 2, E|a-a'| = (0 + 2 + 2 + 0) / 4 = 1, E|b-b'| = 0
    assert_close(quality.energy_distance(a, b), 1.0)
    assert_close(quality.energy_distance(a, a), 0.0, rtol=0, atol=1e-6)
    x = torch.randn(3000, 2)
    near, far = quality.energy_distance(x, torch.randn(3000, 2)), quality.energy_distance(x, x + 1)
    assert near < 0.01 < 0.1 < far


def test_nearest_neighbours():
    reference = torch.randn(20, 1, 4, 4)
    x = reference[[7, 3, 19]] + 0.1
    index, distance = quality.nearest_neighbours(x, reference, batch_size=2)
    assert index.tolist() == [7, 3, 19]
    assert_close(distance, torch.full((3,), 0.1), rtol=1e-3, atol=1e-4)


def test_scores_of_a_few_rows():
    one, few = np.ones((1, 4)), np.arange(8.0).reshape(2, 4)
    assert_close(quality.frechet_distance(one, one + 1), 4.0, rtol=0, atol=1e-4)
    assert math.isfinite(quality.frechet_distance(one, few))
    assert quality.precision_recall(one, few) == (0.0, 0.0)
    assert quality.precision_recall(few, few) == (1.0, 1.0)


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
    monkeypatch.setattr(quality, "FEWEST", 60)
    made = halves()
    x = made.train
    state = torch.get_rng_state()
    first, judged = quality.load_judge(made)
    assert torch.equal(state, torch.get_rng_state())
    assert judged["accuracy"] > 0.8 and 0 <= judged["legible"] <= 1
    p = quality.probabilities(first, 2 * torch.rand_like(x) - 1)
    assert p.shape == (150, 3) and (p.argmax(1) == 2).float().mean() > 0.8
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    files = list(cache.iterdir())
    assert len(files) == 1 and files[0].suffix == ".pt"
    stamp = files[0].stat().st_mtime_ns
    second, _ = quality.load_judge(made)
    assert files[0].stat().st_mtime_ns == stamp
    assert_close(first(x[:5]), second(x[:5]))
    files[0].write_bytes(b"cut short")  # a broken cache is made again
    again, _ = quality.load_judge(made)
    assert_close(first(x[:5]), again(x[:5]))
    assert files[0].stat().st_size > 1000
    # one of other pictures is not used
    quality.load_judge(dataclasses.replace(made, train=x * 0.5))
    assert len(list(cache.iterdir())) == 2
    assert quality.load_judge(dataclasses.replace(made, train_labels=None)) == (None, {})


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


@pytest.mark.parametrize("what", ["disk full", "a file is in the way"])
def test_a_cache_that_cannot_be_written_is_done_without(what, cache, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    if what == "disk full":
        monkeypatch.setattr(pathlib.Path, "write_bytes", full)
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
    monkeypatch.setattr(quality, "load_judge", lambda *_, **__: (
        (Judge(), {"accuracy": 0.75, "legible": 0.5}) if made.train_labels is not None else (None, {})))
    return made


def test_quality_compares_with_the_training_part(judged):
    """The training pictures themselves score perfectly though the held-out part differs."""
    found = quality.scores(judged.train, judged)
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
    other = quality.scores(judged.test, judged)  # and the held-out ones do not
    assert_close(other["frechet_distance"], found["frechet_distance_of_held_out"])
    assert_close(other["nearest_train_rms"], found["nearest_train_rms_of_held_out"])
    assert other["precision"] == 0.0


def test_precision_is_of_the_samples_and_recall_of_the_data(judged):
    """Good pictures of one kind alone: all of them are real, half of the real ones are missing."""
    found = quality.scores(judged.train[judged.train_labels == 0], judged)
    assert found["precision"] == 1.0 and 0.4 < found["recall"] < 0.6


def test_quality_of_labelled_samples_says_how_often_the_judge_agrees(judged):
    labels = judged.train_labels.clone()
    labels[:30] = 1 - labels[:30]
    found = quality.scores(judged.train, judged, labels)
    assert_close(found["accuracy"], 0.8)
    assert found["accuracy_of_held_out"] == 0.75


def test_what_is_none_of_these_is_a_kind_of_its_own_and_not_legible(judged):
    bright = torch.ones(10, 1, 8, 8)
    found = quality.scores(bright, judged, torch.zeros(10, dtype=torch.int64))
    assert found["classes"] == [0, 0, 10] and found["legible"] == found["accuracy"] == 0.0


def test_glance(judged, monkeypatch):
    samples = judged.train[:10] + 0.1
    asked = []
    load = quality.load_judge
    monkeypatch.setattr(quality, "load_judge", lambda data, fit=True: (
        asked.append(fit), load(data))[1])
    found = quality.glance(samples, judged)
    assert asked == [False]  # no judge is trained for a first look
    assert set(found) == {"n", "nearest_train_rms_mean", "nearest_train_rms_min", "legible",
                          "legible_of_held_out"}
    assert found["n"] == 10 and found["legible"] > 0.8 and found["legible_of_held_out"] == 0.5
    assert_close(found["nearest_train_rms_mean"], 0.1, rtol=1e-3, atol=1e-4)
    assert_close(found["nearest_train_rms_min"], 0.1, rtol=1e-3, atol=1e-4)
    labelled = quality.glance(samples, judged, judged.train_labels[:10])
    assert labelled["accuracy"] == 1.0 and labelled["accuracy_of_held_out"] == 0.75
    monkeypatch.setattr(quality, "load_judge", lambda *_, **__: (None, {}))
    assert set(quality.glance(samples, judged)) == {
        "n", "nearest_train_rms_mean", "nearest_train_rms_min"}
