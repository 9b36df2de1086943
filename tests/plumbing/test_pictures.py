"""What the drawing functions write."""


import numpy as np
import pytest
import torch
from conftest import open_picture, spied
from matplotlib.axes import Axes
from PIL import Image, ImageSequence
from torch.testing import assert_close

from common import data, plotting


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
        plotting.samples(tmp_path / "a.png", pictures_of(n), made, "title")
        (how, drawn), (other, real) = seen.pop()
        assert how == "samples" and other == "real, held out" and len(drawn) == len(real) == shown
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
    for name in ("panels", "samples", "fields"):
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
