"""common/quality.py: what the shipped judges accept and refuse, and how one is made."""

import copy
import dataclasses
import json
import math
import sys

from common import data, quality

import pytest
import torch
from conftest import ROOT
from torch.testing import assert_close

sys.path.insert(0, str(ROOT / "experiments"))
import judge as shipped  # noqa: E402


@pytest.fixture(scope="module", params=[28, 32])
def at_hand(request):
    """A shipped judge and the legible share of each kind of held-out picture."""
    digits = data.load_images("digits", request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CACHE", ROOT / "no such folder")
        judge, of_held_out = quality.load_judge(digits, fit=False)
    assert judge is not None, "not of these digits: python experiments/judge.py"
    torch.manual_seed(1)
    kinds = shipped.pictures(digits.test, digits.test_labels)

    def share(x):
        return quality.legible_fraction(quality.probabilities(judge, x))

    return kinds, share, of_held_out


def test_real_digits_are_legible_to_the_shipped_judge(at_hand):
    kinds, share, of_held_out = at_hand
    assert share(kinds["real"]) == of_held_out["legible"] >= 0.93
    assert of_held_out["accuracy"] >= 0.95
    assert share(kinds["with noise of 0.05"]) >= 0.9  # as a sampler may leave it


@pytest.mark.parametrize("kind", [
    "uniform noise", "Gaussian noise", "Gaussian noise of 0.3", "smooth noise",
    "smooth noise of 0.3", "black", "grey", "white", "x_t at t = T/2", "alpha_bar = 0.5"])
def test_noise_and_emptiness_are_not_legible(at_hand, kind):
    kinds, share, _ = at_hand
    assert share(kinds[kind]) < 0.01


@pytest.mark.parametrize("kind", ["two digits, the maximum", "two digits, the mean",
                                  "4 x 4 blocks, shuffled"])
def test_what_is_made_of_parts_of_digits_is_not_legible(at_hand, kind):
    kinds, share, _ = at_hand
    assert share(kinds[kind]) < 0.10


def test_the_shipped_files_are_small():
    files = list((ROOT / "pretrained").glob("judge_*.pt"))
    assert len(files) == 2 and all(file.stat().st_size <= 250_000 for file in files)
    for file in files:
        state = torch.load(file, weights_only=True)
        assert {v.dtype for v in state.values()} <= {torch.float32, torch.int64}


def test_legible_fraction_does_not_count_none_of_these():
    p = torch.tensor([[0.95, 0.03, 0.02], [0.9, 0.1, 0.0], [0.5, 0.1, 0.4], [0.0, 0.92, 0.08],
                      [0.02, 0.03, 0.95]])
    assert_close(quality.legible_fraction(p), 0.4)
    assert quality.legible_fraction(p[-1:]) == 0.0


# How one is made


def toy(n, shape=(1, 8, 8), classes=2, held_out=2):
    x, y = torch.rand(n, *shape) * 2 - 1, torch.arange(n) % classes
    i = n - held_out
    return data.Data("toy", x[:i], x[i:], y[:i], y[i:], tuple("abcdefgh"[:classes]))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder in place of data/, and two steps of training."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(quality, "FEWEST", 2)
    monkeypatch.setattr(quality, "MOST", 2)
    return tmp_path / "cache"


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 14), (1, 28, 28), (3, 64, 64)])
def test_none_of_these_is_like_the_pictures_it_is_made_of(shape):
    x = torch.rand(70, *shape) - 0.5
    kept = x.clone()
    none = quality.none_of_these(x, torch.arange(70) % 3)
    assert none.shape == x.shape and none.dtype == x.dtype and none.isfinite().all()
    assert_close(x, kept, rtol=0, atol=0)
    assert (none != x).flatten(1).any(1).float().mean() > 0.9  # a shuffle may leave all
    assert (none != quality.none_of_these(x, torch.arange(70) % 3)).any()
    for make in quality.NONE:  # of one picture alone too
        assert make(x[:1], x[1:2]).shape == (1, *shape)


def test_a_picture_is_mixed_with_one_of_another_class(monkeypatch):
    y = torch.tensor([0] * 30 + [1, 2])  # by chance it would mostly be of the same
    x = y[:, None, None, None].float().expand(-1, 1, 4, 4)
    monkeypatch.setattr(quality, "NONE", (lambda a, b: b,))
    assert (quality.none_of_these(x, y) != x).all()
    alone = quality.none_of_these(x[:5], y[:5])  # one class: of whatever there is
    assert_close(alone, x[:5])


def test_blocks_are_shuffled_and_halves_are_joined():
    a = torch.arange(64.0).view(1, 1, 8, 8).repeat(40, 1, 1, 1)
    b = -a - 1
    _, _, joined, shuffled, *_ = quality.NONE
    out = shuffled(a, b)
    assert_close(out.flatten(1).sort(1).values, a.flatten(1))
    assert (out[:, 0, 1::2, 1::2] - out[:, 0, ::2, ::2] == 9).all()  # each block whole
    halves = joined(a, b) < 0
    upright, flat = halves[:, 0].all(1).any(1), halves[:, 0].all(2).any(1)
    assert (upright ^ flat).all() and upright.any() and flat.any()
    assert (halves.flatten(1).sum(1) == 32).all()


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
    ((1, 8, 8), 4, 2), ((3, 16, 16), 3, 1), ((1, 28, 28), 5, 3), ((3, 64, 64), 4, 2),
    ((1, 32, 32), 200, 8)])
def test_a_judge_of_any_shape_and_of_a_few_pictures(shape, n, classes, cache):
    made = toy(n, shape, classes)
    judge, of_held_out = quality.load_judge(made)
    assert judge(made.test).shape == (2, classes + 1)
    assert judge.body(made.test).shape == (2, 64)
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())
    assert set(of_held_out) == {"accuracy", "legible"}
    (file,) = cache.iterdir()
    assert file.stat().st_size < 300_000


def test_very_small_data_is_scored(cache):
    made = toy(4, held_out=1)
    found = quality.scores(torch.randn(10, 1, 8, 8), made, torch.arange(10) % 2)
    assert json.dumps(found, allow_nan=False) and len(found["classes"]) == 3
    assert math.isfinite(found["frechet_distance"] + found["frechet_distance_of_held_out"])


def test_data_without_labels_has_distances_alone(cache):
    made = dataclasses.replace(toy(8), train_labels=None, test_labels=None, classes=())
    assert quality.load_judge(made) == (None, {})
    found = quality.scores(made.train + 0.1, made)
    assert set(found) == {"n", "reference", "nearest_train_rms",
                          "nearest_train_rms_of_held_out"}
    assert_close(found["nearest_train_rms"], 0.1, rtol=1e-3, atol=1e-4)
    assert not cache.exists()


def test_without_fit_a_judge_is_only_looked_for(cache):
    made = toy(6)
    assert quality.load_judge(made, fit=False) == (None, {}) and not cache.exists()
    assert set(quality.glance(made.test, made)) == {
        "n", "nearest_train_rms_mean", "nearest_train_rms_min"}
    judge, _ = quality.load_judge(made)
    again, _ = quality.load_judge(made, fit=False)
    assert_close(again(made.test), judge(made.test), rtol=0, atol=0)
    assert "legible" in quality.glance(made.test, made)


def test_fingerprint_is_of_every_bit():
    made = toy(6)
    same = dataclasses.replace(made, train=made.train.clone())
    assert same.fingerprint() == made.fingerprint()
    other = made.train.flip(0)  # of the same mean
    assert dataclasses.replace(made, train=other).fingerprint() != made.fingerprint()
    bit = copy.deepcopy(made)
    bit.train[0, 0, 0, 0] = torch.nextafter(bit.train[0, 0, 0, 0], torch.tensor(2.0))
    assert bit.fingerprint() != made.fingerprint()
    labels = dataclasses.replace(made, train_labels=made.train_labels.flip(0))
    assert labels.fingerprint() != made.fingerprint()
