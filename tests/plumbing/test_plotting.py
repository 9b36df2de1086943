"""common/plotting.py: a figure shows what it was handed, leaves matplotlib alone, and takes no run along."""

import builtins
import contextlib
import math
import os
import sys
import types
import warnings
from pathlib import Path

from common import plotting
from common.cli import Mistake
from common.data import Data

import matplotlib
import numpy as np
import pytest
import torch
from conftest import open_picture, spied
from matplotlib.figure import Figure
from PIL import Image, ImageSequence
from torch.testing import assert_close

pytestmark = pytest.mark.may_not_draw
NAN, INF = float("nan"), float("inf")
SAMPLES, NEIGHBOURS = plotting.samples, plotting.neighbours  # where `drawings` has replaced them


def one_of_each(folder):
    """{name: function that draws it} for every function that writes a file."""
    x, points = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8), torch.arange(20.0).view(10, 2) / 10
    made, p, series = Data("toy", x, x), plotting, torch.randn(6, 1, 9)
    return {
        "grid.png": lambda: p.grid(folder / "grid.png", x, 2, "title"),
        "panels.png": lambda: p.panels(folder / "panels.png", [("a", x), ("b", x)], "title"),
        "samples.png": lambda: p.samples(folder / "samples.png", x, made, "title"),
        "table.png": lambda: p.table(folder / "table.png", [x, x], "title", ["a", "b"]),
        "neighbours.png": lambda: p.neighbours(folder / "neighbours.png", x, made),
        "frames.gif": lambda: p.gif(folder / "frames.gif", [x, -x], 2, ["a", "b"], hold=1),
        "denoising.gif": lambda: p.denoising(folder / "denoising.gif", [(2, x), (1, -x), (0, x)]),
        "curves.png": lambda: p.curves(folder / "curves.png", [{"lines": {"a": ([1, 2], [3, 4])}}]),
        "fields.png": lambda: p.fields(folder / "fields.png", [("a", points, points, points)], "title"),
        "points.gif": lambda: p.film(folder / "points.gif", [points, -points], ["a", "b"], hold=1),
        "series.gif": lambda: p.film(folder / "series.gif", [series, -series], ["a", "b"], hold=1),
        "series.png": lambda: p.panels(folder / "series.png", [("a", series), ("b", series)], "title"),
        "picture.png": lambda: p.picture(folder / "picture.png", x[0]),
    }


EACH = list(one_of_each(Path()))


@pytest.fixture
def axes_of(monkeypatch):
    """axes_of(draw, ...): what a figure has on its axes; nothing is written."""
    def draw(function, *args, **kwargs):
        sheets = []
        monkeypatch.setattr(plotting, "save", lambda sheet, path, title="", math=True: sheets.append(sheet))
        function("a.png", *args, **kwargs)
        assert not plotting.not_drawn
        return sheets[0].axes

    return draw


def shades(n, size=4):
    """n pictures (1, size, size), each of one shade of its own."""
    return torch.linspace(-1, 1, n).view(n, 1, 1, 1).expand(n, 1, size, size)


# What a figure shows


def texts(labels):
    return [label.get_text() for label in labels]


def test_pictures_are_tiled_row_by_row_from_black_to_white(axes_of):
    x = shades(5)
    axis, = axes_of(plotting.grid, x, 3, "title")
    sheet = axis.images[0].get_array()
    assert sheet.shape == (2 * 5 + 1, 3 * 5 + 1, 3) and axis.get_title() == "title"
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first row is above
    for i, shade in enumerate(np.linspace(0, 1, 5)):
        top, left = 1 + 5 * (i // 3), 1 + 5 * (i % 3)
        assert_close(np.asarray(sheet[top:top + 4, left:left + 4]), np.full((4, 4, 3), shade, np.float32))
    assert plotting.tile(x * 5, 2, pad=0).max() == 1
    first, second = axes_of(plotting.panels, [("a", x), ("b", -x)], "title", columns=3)
    assert np.array_equal(first.images[0].get_array(), sheet)
    assert np.array_equal(second.images[0].get_array(), plotting.tile(-x, 3))
    assert (first.get_title(), second.get_title()) == ("a", "b")
    corner = -torch.ones(1, 3, 4, 6)
    corner[0, 1, 0, 5] = 1  # green, above, on the right
    assert np.argwhere(plotting.tile(corner, 1, pad=0)).tolist() == [[0, 5, 1]]
    assert plotting.to_rgb(torch.tensor([NAN, INF, -INF, 0.0]).view(1, 1, 2, 2))[0, 2].tolist() == [[0, 1], [0, 0.5]]


def test_a_table_has_its_rows_and_labels_where_they_belong(axes_of):
    rows = [shades(5, 8)[:3], shades(5, 4)[3:]]  # the smaller ones are enlarged
    axis, = axes_of(plotting.table, rows, "title", ["above", "below"], ["x", "y", "z"])
    shown, xs, ys = axis.images[0].get_array(), axis.get_xticks(), axis.get_yticks()
    assert [[shown[int(y), int(x), 0] for x in xs] for y in ys] == [[0, 0.25, 0.5], [0.75, 1, 1]]  # white: there is none
    assert texts(axis.get_yticklabels()) == ["above", "below"] and texts(axis.get_xticklabels()) == ["x", "y", "z"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1] and axis.get_title() == "title"
    picture = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)  # upright, and left is left
    axis, = axes_of(plotting.table, [picture], "title", ["one"])
    assert np.allclose(axis.images[0].get_array()[:8, :8, 0], (picture[0, 0] + 1) / 2, atol=0.01)


def test_points_series_and_arrows_are_drawn_where_they_are(axes_of):
    points, arrows, series = torch.randn(9, 2), torch.randn(4, 2), torch.randn(9, 1, 20)
    axis, other = axes_of(plotting.panels, [("a", points), ("b", -points)], "title", limit=1.5)
    assert (axis.get_xlim(), axis.get_ylim()) == ((-1.5, 1.5), (-1.5, 1.5))
    assert np.allclose(axis.collections[0].get_offsets(), points) and other.get_title() == "b"
    assert np.allclose(other.collections[0].get_offsets(), -points)
    axis, = axes_of(plotting.fields, [("t = 1", points, points[:4], arrows)], "title")
    cloud, field = axis.collections
    assert np.allclose(cloud.get_offsets(), points) and np.allclose(field.get_offsets(), points[:4])
    assert np.allclose(np.stack([field.U, field.V], 1), arrows) and axis.get_title() == "t = 1"
    for sign, axis in zip((1, -1), axes_of(plotting.panels, [("a", series), ("b", -series)], "t"), strict=True):
        assert len(axis.lines) == 8 and axis.get_ylim() == (-8, 1)  # the first one above
        for i, line in enumerate(axis.lines):
            assert np.allclose(line.get_ydata(), sign * series[i, 0] / 6 - i, atol=1e-6)


def test_curves_bars_points_and_levels_stand_where_their_numbers_say(axes_of):
    parts = [{"lines": {"a": ([1, 2, 3], torch.tensor([3.0, 5.0, 4.0]).bfloat16(), "o-"), "_b": ([0, 1], [7, 8])},
              "points": {"p": ([1], [2])}, "levels": {"held out": 1.5}, "xscale": "log", "xlabel": "t"},
             {"bars": (["x", "y"], [1.0, 2.0]), "title": "bars"}, None,
             {"histogram": [0.0, 1.0, 90.0], "xlim": (-2, 3), "title": "h"}]
    lines, bars, histogram = axes_of(plotting.curves, parts, "title")
    assert [line.get_xydata().tolist() for line in lines.lines[:2]] == [[[1, 3], [2, 5], [3, 4]], [[0, 7], [1, 8]]]
    assert lines.collections[0].get_offsets().tolist() == [[1, 2]] and lines.lines[2].get_ydata() == [1.5, 1.5]
    assert texts(lines.get_legend().get_texts()) == ["a", "p", "held out"]
    assert (lines.get_xscale(), lines.get_xlabel(), bars.get_title()) == ("log", "t", "bars")
    assert [bar.get_height() for bar in bars.patches] == [1, 2] and texts(bars.get_xticklabels()) == ["x", "y"]
    assert len(histogram.patches) == 100 and histogram.patches[0].get_x() == -2
    assert histogram.patches[-1].get_x() + histogram.patches[-1].get_width() == pytest.approx(3)
    assert "lines" in parts[0]  # a part may be drawn twice


@pytest.mark.parametrize("values, asked, scale", [
    ([0.0, 0.0], "log", "linear"), ([NAN, -1.0], "log", "linear"), ([0.0, 1e-3], "log", "log"),
    ([-1.0, -9.0], "symlog", "symlog")])
def test_a_log_scale_needs_a_positive_value(axes_of, values, asked, scale):
    axis, = axes_of(plotting.curves, [{"lines": {"a": ([1, 2], values)}, "xscale": "log", "yscale": asked}])
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", scale)


@pytest.mark.parametrize("shape, most", [((1, 8, 8), 64), ((2,), 5000), ((1, 16), 8)])
def test_samples_stand_beside_as_many_held_out_examples(drawings, shape, most):
    x = torch.randn(most + 50, *shape)
    for n, shown in ((3, 3), (most + 50, most)):
        SAMPLES("a.png", x[:n], Data("toy", 2 * x, -x), "title")
        (how, drawn), (other, real) = drawings["a.png"]["parts"]
        assert (how, other) == ("samples", "real, held out")
        assert torch.equal(drawn, x[:shown]) and torch.equal(real, -x[:shown])
    SAMPLES("a.png", x[:1], Data.absent("toy", {"shape": shape, "classes": []}), "title")
    assert len(drawings["a.png"]["parts"]) == 1


def test_neighbours_are_of_the_training_part(drawings):
    train = torch.randn(20, 1, 8, 8)
    NEIGHBOURS("a.png", train[[3, 8]] + 0.1, Data("toy", train, train[:4] + 0.5))
    handed = drawings["a.png"]
    drawn, nearest = handed["rows"]
    assert torch.equal(nearest, train[[3, 8]]) and torch.equal(drawn, train[[3, 8]] + 0.1)
    assert handed["column_labels"] == ["0.10", "0.10"] and handed["row_labels"] == ["sample", "nearest"]
    assert "0.50" in handed["title"]  # how far held-out pictures are


def test_a_loss_is_drawn_at_each_step_as_a_mean_and_by_t():
    log = {"step": range(1, 202), "loss": [float(i) for i in range(201)], "kl": [4.0] * 201}
    lines = plotting.loss_curve(log, "loss")["lines"]
    assert lines["each step"][:2] == (log["step"], log["loss"]) and lines["mean of 100"][0] == log["step"]
    assert lines["mean of 100"][1][[0, 1, 2, 200]].tolist() == [0.0, 0.5, 1.0, 150.5]
    lines = plotting.loss_curve(log, "title", "kl")["lines"]
    assert lines["each step"][1] == lines["mean of 100"][1].tolist() == log["kl"]
    assert plotting.loss_curve({}, "loss") is None
    found = plotting.smooth([1.0, 2.0, NAN, 3.0, INF, NAN, 5.0], 2)
    assert np.array_equal(found, [1, 1.5, 2, 3, 3, NAN, 5], equal_nan=True)
    middles, heights, width = plotting.loss_by_t(lambda low, high: 10 * low + high, [1, 3, 7], "t")["bars"]
    assert middles == [2, 5] and heights == [13, 37] and width > 0


@pytest.mark.parametrize("items, n, chosen", [
    (range(11), 3, [0, 5, 10]), (range(5), 4, [0, 1, 3, 4]), ([1, 2], 8, [1, 2]), ([1], 8, [1]), ([1, 2, 3], 1, [1])])
def test_evenly_spaced_items_have_the_first_and_the_last(items, n, chosen):
    assert plotting.evenly(list(items), n) == chosen


def frames_of(path):
    """(frames as arrays, how long each is shown in milliseconds) of a film that begins again at its end."""
    with Image.open(path) as picture:
        assert picture.info["loop"] == 0
        return open_picture(path), [frame.info["duration"] for frame in ImageSequence.Iterator(picture)]


def test_a_film_of_pictures_shows_its_frames_in_order_and_holds_its_end(tmp_path):
    x = shades(4)
    states = [(3, x), (2, x.flip(0)), (1, x.roll(1, 0)), (0, x)]
    plotting.denoising(tmp_path / "a.gif", iter(states), columns=3)
    plotting.gif(tmp_path / "b.gif", [x for _, x in states], 3, ["t = 3", "t = 2", "t = 1", "t = 0"])
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    frames, durations = frames_of(tmp_path / "a.gif")
    assert durations == [80, 80, 80, 80 * (1 + 12)]
    for frame, (_, x) in zip(frames, states, strict=True):
        wanted = plotting.tile(x, 3).repeat(4, 0).repeat(4, 1) * 255
        assert np.abs(frame[22:] - wanted).max() < 12


def test_a_film_of_points_moves_and_holds_its_end(tmp_path):
    frames = [torch.full((9, 2), value) for value in (-2.0, 0.0, 2.0)]
    plotting.film(tmp_path / "a.gif", frames, ["t", "t", "t"], limit=3, hold=5, milliseconds=40)
    shown, durations = frames_of(tmp_path / "a.gif")
    assert durations == [40, 40, 40 * (1 + 5)]
    rows, columns = zip(*(np.nonzero(f.max(2) - f.min(2).astype(int) > 60) for f in shown), strict=True)  # not grey
    places = [(-y.mean(), x.mean()) for y, x in zip(rows, columns, strict=True)]
    assert np.diff(places, axis=0).min() > 30  # up and to the right, and of the frame before nothing is left
    assert all(np.ptp(y) < 15 for y in rows)


def test_a_picture_is_written_pixel_for_pixel(tmp_path):
    pixels = torch.randint(0, 256, (3, 5, 7))
    plotting.picture(tmp_path / "a.png", pixels / 127.5 - 1)
    plotting.picture(tmp_path / "b.png", pixels[:1] / 127.5 - 1)
    assert np.array(Image.open(tmp_path / "a.png")).tolist() == pixels.permute(1, 2, 0).tolist()
    assert np.array(Image.open(tmp_path / "b.png"))[..., 2].tolist() == pixels[0].tolist()


# matplotlib


@pytest.mark.slow
def test_a_students_matplotlib_is_left_alone(tmp_path, monkeypatch):
    """Every figure is drawn without pyplot and leaves the settings; a backend that is not there does not matter."""
    imported, written, true = [], [], builtins.__import__

    def watched(name, *args, **kwargs):
        imported.extend([os.environ.get("MPLBACKEND")] * (name == "matplotlib"))
        return true(name, *args, **kwargs)

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import fails
    monkeypatch.setenv("MPLBACKEND", "no_such_backend")
    monkeypatch.setattr(builtins, "__import__", watched)
    monkeypatch.setitem(plotting.STYLE, "figure.dpi", 40)
    spied(monkeypatch, plotting, "write_whole", lambda given, _: written.append(given["path"].name))
    with matplotlib.rc_context({"backend": "svg"}):
        before = dict(matplotlib.rcParams)
        for draw in one_of_each(tmp_path).values():
            draw()
        assert dict(matplotlib.rcParams) == before
    assert not plotting.not_drawn and sorted(p.name for p in tmp_path.iterdir()) == sorted(written) == sorted(EACH)
    assert imported[:2] == [None, None] and os.environ["MPLBACKEND"] == "no_such_backend"  # unseen when it is loaded
    assert all(len(open_picture(tmp_path / name)) > name.endswith("gif") for name in EACH if name != "picture.png")


def test_the_style_is_ours_whatever_a_matplotlibrc_says(tmp_path):
    draw, name = one_of_each(tmp_path)["curves.png"], tmp_path / "curves.png"
    draw()
    plain = name.read_bytes()
    with matplotlib.rc_context({"font.size": 40.0, "text.usetex": True, "savefig.bbox": None}):
        draw()
        before = dict(matplotlib.rcParams)
        with pytest.raises(Mistake, match="such.png: cannot be written .No such file or directory"):
            plotting.grid(tmp_path / "no" / "such.png", shades(4), 2, "title")
        assert dict(matplotlib.rcParams) == before
    assert name.read_bytes() == plain and not plotting.not_drawn


def test_names_of_users_are_never_mathtext(tmp_path, monkeypatch):
    monkeypatch.setitem(plotting.STYLE, "figure.dpi", 30)
    x, name = torch.rand(1, 1, 8, 8), r"a$\frac$b"
    plotting.table(tmp_path / "a.png", [x], name, [name], [name])
    plotting.panels(tmp_path / "b.png", [(name, x)], name)
    plotting.grid(tmp_path / "c.png", x, 2, name)
    assert not plotting.not_drawn and len(list(tmp_path.iterdir())) == 3


def test_letters_that_no_font_has_are_said_and_fallback_fonts_are_used(tmp_path, capsys, monkeypatch):
    families = []
    monkeypatch.setattr(plotting, "say_once", print)
    monkeypatch.setattr(plotting, "CJK", ("No such family", "DejaVu Serif"))
    spied(monkeypatch, plotting, "save", lambda *_: families.append(matplotlib.rcParams["font.family"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plotting.table(tmp_path / "a.png", [shades(1)], "title", ["\U000104AB"])
    assert "fonts-noto-cjk" in capsys.readouterr().out and families == [["DejaVu Sans", "DejaVu Serif"]]


# A figure that cannot be drawn


def test_an_error_prints_its_traceback_and_the_next_figure_is_drawn(tmp_path, capsys):
    @plotting.figure("one.png", "two.png", "three.png")
    def figure_broken(run):
        plotting.grid(tmp_path / "one.png", "no tensor", 2, "title")  # it fails alone
        plotting.grid(tmp_path / "two.png", shades(4), 2, "title")
        raise ValueError("first line\nsecond line")

    assert figure_broken(object()) is None
    said = capsys.readouterr()
    assert not said.out and "one.png: not drawn\nTraceback" in said.err
    assert "\none.png, three.png: not drawn\nTraceback" in said.err and "figure_broken" in said.err
    assert said.err.endswith("ValueError: first line\nsecond line\n")
    plotting.samples("four.png", shades(4), None, "title")
    assert list(plotting.not_drawn) == ["one.png", "three.png", "four.png"]
    plotting.grid(path=tmp_path / "three.png", x=shades(4), columns=2, title="title")  # as a preview is, later
    assert list(plotting.not_drawn) == ["one.png", "four.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["three.png", "two.png"]


@pytest.mark.parametrize("problem", [
    KeyboardInterrupt(), Mistake("a.png: cannot be written"), MemoryError("no room"),
    torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_what_ends_a_run_passes_through(problem, capsys):
    @plotting.figure("a.png")
    def figure_stopped():
        raise problem

    with pytest.raises(type(problem)):
        figure_stopped()
    assert not plotting.not_drawn and not capsys.readouterr().err


def test_a_figure_is_drawn_without_gradients_but_may_ask_for_them():
    @plotting.figure("gradient.png")
    def figure_gradient(x, scale=1):
        assert not (x * scale).requires_grad
        with torch.enable_grad():
            return torch.autograd.grad((x**2).sum() * scale, x)[0]

    x = torch.full((2,), 3.0, requires_grad=True)
    assert figure_gradient(x, scale=2).tolist() == [12.0, 12.0] and torch.is_grad_enabled()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["picture.png", "frames.gif", "curves.png"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, name, error):
    def save(self, file, *_, **__):
        file.write(b"half a pict")
        raise error("full")

    (tmp_path / name).write_bytes(b"before")
    monkeypatch.setattr(Figure, "savefig", save)
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(KeyboardInterrupt) if error is KeyboardInterrupt else contextlib.nullcontext():
        one_of_each(tmp_path)[name]()
    assert list(plotting.not_drawn) == [name] * (error is OSError)
    assert (tmp_path / name).read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name, start", [("a.svg", b"<?xml"), ("a.PNG", b"\x89PNG"), ("a", b"\x89PNG")])
def test_a_name_says_the_format(tmp_path, name, start):
    plotting.grid(str(tmp_path / name), shades(4), 2, "title")
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize("kernel, front_end", [(True, True), (True, False), (False, True)])
def test_a_notebook_shows_each_picture_once_it_is_written(tmp_path, monkeypatch, kernel, front_end):
    shown, names = [], ["picture.png", "frames.gif", "grid.png"]

    def display(picture):
        assert front_end, "no front end"
        shown.append(picture)

    ipython = types.SimpleNamespace(display=display, Image=lambda filename: (filename, Path(filename).read_bytes()))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=ipython))
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    monkeypatch.setattr(plotting, "in_notebook", lambda: kernel)
    for name in names:
        one_of_each(tmp_path)[name]()
    plotting.curves(tmp_path / "none.png", [None])
    written = [(str(tmp_path / name), (tmp_path / name).read_bytes()) for name in names]
    assert shown == (written if kernel and front_end else []) and not plotting.not_drawn


# Any data


ANY = [(shape, values) for shape in ((2, 8, 8), (1, 7), (2,), ())
       for values in ([NAN, INF, -INF, 0.0, 0.5], [NAN], [1e38], [])]


@pytest.mark.slow
@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")  # of an old matplotlib's parser
@pytest.mark.parametrize("shape, values", [*ANY, ((3, 1, 1), [0.5]), ((1, 1), [0.5])])
def test_any_data_are_drawn(tmp_path, monkeypatch, shape, values):
    """Coarsely, which is faster."""
    monkeypatch.setitem(plotting.STYLE, "figure.dpi", 30)
    monkeypatch.setitem(plotting.STYLE, "savefig.bbox", None)
    n = len(values) and (9 if shape else 5)
    x = torch.tensor((values * 9 * 128)[:n * math.prod(shape)]).view(n, *shape)
    x = x.bfloat16().requires_grad_() if values == [1e38] else x  # which numpy has not
    a, b, c = (tmp_path / name for name in ("a.png", "b.png", "c.gif"))
    if len(shape) == 0:
        steps = list(range(n))
        bars = {"bars": ([f"bar {i}" for i in steps], x)}
        lines = {"lines": {"a": (steps, x, "o-"), "_b": (x, x)}, "points": {"a": (steps, x)}, "bars": (steps, x, 0.3),
                 "levels": {f"_{i}": level for i, level in enumerate(x)}, "yscale": "log", "xscale": "log"}
        plotting.curves(a, [lines, bars, {"histogram": x, "xlim": (-2, 2)}])
        assert a.exists()
    elif len(shape) < 3:
        plotting.samples(a, x, Data("toy", x[:1], x[:1]), "title")  # fewer are held out than drawn
        plotting.film(c, [x], ["a"], hold=1)
        if shape == (2,):
            plotting.fields(b, [("a", x, x, x)], "title")
        assert a.exists() and c.exists() and b.exists() == (shape == (2,))
    elif values:
        plotting.neighbours(a, x.float(), Data("toy", x.float(), x[:2].float()))
        plotting.table(b, [x, x[:1]], "title", ["a", "b"], ["x"])
        plotting.gif(c, [x, x], 9, ["x", "y"], hold=1)
        assert a.exists() and b.exists() and c.exists()
    else:
        plotting.table(a, [x], "title")  # nothing to draw writes nothing
        plotting.table(a, [], "title")
        plotting.curves(a, [None])
        assert not a.exists()
    assert not plotting.not_drawn
