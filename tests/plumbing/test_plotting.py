"""common/plotting.py: a figure shows what it was handed, leaves matplotlib alone, and takes no run along."""

import builtins
import contextlib
import io
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
from conftest import open_picture
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


def test_pictures_are_tiled_row_by_row_from_black_to_white():
    x = shades(5)
    sheet = plotting.tile(x, 3)
    assert sheet.shape == (2 * 5 + 1, 3 * 5 + 1, 3)
    for i, shade in enumerate(np.linspace(0, 1, 5)):
        top, left = 1 + 5 * (i // 3), 1 + 5 * (i % 3)
        assert_close(sheet[top:top + 4, left:left + 4], np.full((4, 4, 3), shade, np.float32))
    corner = -torch.ones(1, 3, 4, 6)
    corner[0, 1, 0, 5] = 1  # green, above, on the right
    assert np.argwhere(plotting.tile(corner, 1, pad=0)).tolist() == [[0, 5, 1]]
    assert plotting.tile(x * 5, 2, pad=0).max() == 1
    assert torch.equal(plotting.to_rgb(torch.tensor([NAN, INF, -INF, 0.0]).view(1, 1, 2, 2))[0, 0],
                       torch.tensor([[0.0, 1.0], [0.0, 0.5]]))


def test_a_table_has_its_rows_and_labels_where_they_belong(axes_of):
    rows = [shades(5, 8)[:3], shades(5, 4)[3:]]  # the smaller ones are enlarged
    axis, = axes_of(plotting.table, rows, "title", ["above", "below"], ["x", "y", "z"])
    shown, (_, xs), (_, ys) = axis.images[0].get_array(), *(
        ([label.get_text() for label in labels], ticks) for labels, ticks in
        ((axis.get_xticklabels(), axis.get_xticks()), (axis.get_yticklabels(), axis.get_yticks())))
    seen = [[shown[int(y), int(x), 0] for x in xs if x < shown.shape[1]] for y in ys]
    assert_close(np.array(seen), np.array([[0, 0.25, 0.5], [0.75, 1, 1]]))  # white where there is none
    assert [label.get_text() for label in axis.get_yticklabels()] == ["above", "below"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["x", "y", "z"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1] and ys[0] < ys[1] and axis.get_title() == "title"


def test_a_grid_and_panels_show_their_pictures_in_columns(axes_of):
    x = shades(6)
    axis, = axes_of(plotting.grid, x, 3, "title")
    assert np.array_equal(axis.images[0].get_array(), plotting.tile(x, 3)) and axis.get_title() == "title"
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first row is above
    first, second = axes_of(plotting.panels, [("a", x), ("b", -x)], "title", columns=3)
    assert np.array_equal(first.images[0].get_array(), plotting.tile(x, 3))
    assert np.array_equal(second.images[0].get_array(), plotting.tile(-x, 3))
    assert (first.get_title(), second.get_title()) == ("a", "b")


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
    parts = [{"lines": {"a": ([1, 2, 3], torch.tensor([3.0, 5.0, 4.0]), "o-"), "_b": ([0, 1], [7, 8])},
              "points": {"p": ([1], [2])}, "levels": {"held out": 1.5}, "xscale": "log", "xlabel": "t"},
             {"bars": (["x", "y"], [1.0, 2.0]), "title": "bars"}, None,
             {"histogram": [0.0, 1.0, 90.0], "xlim": (-2, 3), "title": "h"}]
    lines, bars, histogram = axes_of(plotting.curves, parts, "title")
    assert [line.get_xydata().tolist() for line in lines.lines[:2]] == [[[1, 3], [2, 5], [3, 4]], [[0, 7], [1, 8]]]
    assert lines.collections[0].get_offsets().tolist() == [[1, 2]] and lines.lines[2].get_ydata() == [1.5, 1.5]
    assert [text.get_text() for text in lines.get_legend().get_texts()] == ["a", "p", "held out"]
    assert (lines.get_xscale(), lines.get_xlabel(), bars.get_title()) == ("log", "t", "bars")
    assert [bar.get_height() for bar in bars.patches] == [1, 2]
    assert [text.get_text() for text in bars.get_xticklabels()] == ["x", "y"]
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


def test_a_loss_curve_is_each_step_and_their_mean():
    log = {"step": [1.0, 2.0, 3.0], "loss": [3.0, 2.0, 1.0], "kl": [4.0, 4.0, 4.0]}
    part = plotting.loss_curve(log, "loss")
    steps, losses, *_ = part["lines"]["each step"]
    assert steps == log["step"] and losses == log["loss"]
    assert_close(part["lines"]["mean of 100"][1], np.array([3.0, 2.5, 2.0]))
    assert plotting.loss_curve(log, "title", "kl")["lines"]["each step"][1] == log["kl"]
    assert plotting.loss_curve({}, "loss") is None
    assert_close(plotting.smooth([1.0, 2.0, 3.0, 4.0], 2), np.array([1.0, 1.5, 2.5, 3.5]))
    found = plotting.smooth([1.0, NAN, 3.0, INF, NAN, 5.0], 2)
    assert np.array_equal(found, [1, 1, 3, 3, NAN, 5], equal_nan=True)


def test_the_loss_by_t_asks_for_neighbouring_edges():
    part = plotting.loss_by_t(lambda low, high: 10 * low + high, [1, 3, 7], "t")
    middles, heights, width = part["bars"]
    assert middles == [2, 5] and heights == [13, 37] and width > 0


def test_evenly():
    assert plotting.evenly(list(range(11)), 3) == [0, 5, 10]
    assert plotting.evenly(list(range(21)), 8)[::7] == [0, 20]
    assert plotting.evenly([1, 2], 8) == [1, 2] and plotting.evenly([1], 8) == [1]
    assert plotting.evenly([1, 2, 3], 1) == [1]


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
    imported, true = [], builtins.__import__

    def watched(name, *args, **kwargs):
        imported.extend([os.environ.get("MPLBACKEND")] * (name == "matplotlib"))
        return true(name, *args, **kwargs)

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import fails
    monkeypatch.setenv("MPLBACKEND", "no_such_backend")
    monkeypatch.setattr(builtins, "__import__", watched)
    with matplotlib.rc_context({"backend": "svg"}):
        before = dict(matplotlib.rcParams)
        for draw in one_of_each(tmp_path).values():
            draw()
        assert dict(matplotlib.rcParams) == before
    assert not plotting.not_drawn and sorted(p.name for p in tmp_path.iterdir()) == sorted(EACH)
    assert imported[:2] == [None, None] and os.environ["MPLBACKEND"] == "no_such_backend"  # unseen when it is loaded
    assert all(len(open_picture(tmp_path / name)) > name.endswith("gif") for name in EACH if name != "picture.png")


def test_the_style_is_ours_whatever_a_matplotlibrc_says(tmp_path):
    draw, name = one_of_each(tmp_path)["curves.png"], tmp_path / "curves.png"
    draw()
    plain = name.read_bytes()
    with matplotlib.rc_context({"font.size": 40.0, "text.usetex": True, "savefig.bbox": None}):
        before = dict(matplotlib.rcParams)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw()
        with pytest.raises(Mistake, match="such.png: cannot be written .No such file or directory"):
            plotting.grid(tmp_path / "no" / "such.png", shades(4), 2, "title")
        assert dict(matplotlib.rcParams) == before
    assert name.read_bytes() == plain and not plotting.not_drawn


def test_names_of_users_are_never_mathtext(monkeypatch):
    monkeypatch.setattr(plotting, "_write", lambda path, save: save(io.BytesIO(), "png"))
    monkeypatch.setitem(plotting.STYLE, "figure.dpi", 30)
    x = torch.rand(1, 1, 8, 8)
    for name in ("$", r"a$\frac$b"):
        plotting.table("a.png", [x], name, [name], [name])
        plotting.panels("b.png", [(name, x)], name)
        plotting.grid("c.png", x, 2, name)
    assert not plotting.not_drawn


def test_letters_that_no_font_has_are_said_and_fallback_fonts_are_used(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plotting, "say_once", print)
    with warnings.catch_warnings(record=True) as seen:
        plotting.table(tmp_path / "a.png", [shades(1)], "title", ["\U000104AB"])
    assert not seen and "fonts-noto-cjk" in capsys.readouterr().out
    monkeypatch.setattr(plotting, "CJK", ("No such family", "DejaVu Serif"))
    families = []
    monkeypatch.setattr(plotting, "save", lambda *_, **__: families.append(matplotlib.rcParams["font.family"]))
    plotting.grid(tmp_path / "b.png", shades(1), 1, "title")
    assert families == [["DejaVu Sans", "DejaVu Serif"]]


# A figure that cannot be drawn


def test_an_error_prints_its_traceback_and_the_next_figure_is_drawn(tmp_path, capsys):
    @plotting.figure("one.png", "two.gif")
    def figure_broken(run):
        raise ValueError("first line\nsecond line")

    assert figure_broken(object()) is None
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("one.png, two.gif: not drawn\nTraceback")
    assert "figure_broken" in said.err and said.err.endswith("ValueError: first line\nsecond line\n")
    plotting.grid(path=tmp_path / "three.png", x="no tensor", columns=2, title="title")
    plotting.samples("four.png", shades(4), None, "title")
    assert list(plotting.not_drawn) == ["one.png", "two.gif", "three.png", "four.png"]
    plotting.grid(path=tmp_path / "three.png", x=shades(4), columns=2, title="title")  # as a preview is, later
    assert list(plotting.not_drawn) == ["one.png", "two.gif", "four.png"]
    assert [p.name for p in tmp_path.iterdir()] == ["three.png"]


@pytest.mark.parametrize("problem", [
    KeyboardInterrupt(), SystemExit(3), Mistake("a.png: cannot be written"), MemoryError("no room"),
    torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_what_ends_a_run_passes_through(problem, capsys):
    @plotting.figure("a.png")
    def figure_stopped():
        raise problem

    with pytest.raises(type(problem)) as raised:
        figure_stopped()
    assert raised.value is problem and not plotting.not_drawn and not capsys.readouterr().err


def test_a_figure_inside_a_figure_fails_alone(tmp_path):
    @plotting.figure("a.png")
    def figure_two():
        plotting.grid(tmp_path / "b.png", "no tensor", 2, "title")
        plotting.grid(tmp_path / "a.png", shades(4), 2, "title")
        return "done"

    assert figure_two() == "done"
    assert list(plotting.not_drawn) == ["b.png"] and (tmp_path / "a.png").exists()


def test_a_figure_is_drawn_without_gradients_but_may_ask_for_them():
    @plotting.figure("gradient.png")
    def figure_gradient(x, scale=1):
        assert not torch.is_grad_enabled() and not (x * scale).requires_grad
        made = torch.ones(2)
        with torch.enable_grad():
            made.requires_grad_()
            return torch.autograd.grad((made * x).sum() * scale, made)[0]

    x = torch.full((2,), 3.0, requires_grad=True)
    assert torch.equal(figure_gradient(x, scale=2), torch.full((2,), 6.0)) and torch.is_grad_enabled()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("name", EACH)
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, name, error):
    def save(self, file, *_, **__):
        file.write(b"half a pict")
        raise error("full")

    draw = one_of_each(tmp_path)[name]
    (tmp_path / name).write_bytes(b"before")
    monkeypatch.setattr(Figure, "savefig", save)
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(KeyboardInterrupt) if error is KeyboardInterrupt else contextlib.nullcontext():
        draw()
    assert list(plotting.not_drawn) == [name] * (error is OSError)
    assert (tmp_path / name).read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["a.svg", "a.PNG", "a"])
def test_a_name_says_the_format(tmp_path, name):
    plotting.grid(str(tmp_path / name), shades(4), 2, "title")
    start = (tmp_path / name).read_bytes()[:200]
    assert b"xml" in start if name == "a.svg" else start.startswith(b"\x89PNG")


@pytest.mark.parametrize("kernel, front_end", [(True, True), (True, False), (False, True)])
def test_a_notebook_shows_each_picture_once_it_is_written(tmp_path, monkeypatch, kernel, front_end):
    shown = []

    def display(picture):
        if not front_end:
            raise RuntimeError("no front end")
        shown.append(picture)

    ipython = types.SimpleNamespace(display=display, Image=lambda filename: (filename, Path(filename).read_bytes()))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=ipython))
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    monkeypatch.setattr(plotting, "in_notebook", lambda: kernel)
    names = ["grid.png", "frames.gif", "points.gif"]
    for name in names:
        one_of_each(tmp_path)[name]()
    plotting.curves(tmp_path / "none.png", [None])
    written = [(str(tmp_path / name), (tmp_path / name).read_bytes()) for name in names]
    assert shown == (written if kernel and front_end else []) and not plotting.not_drawn


# Any data


def with_bad(*shape):
    """Values with NaN, infinity and minus infinity among them."""
    x = torch.linspace(-1, 1, int(np.prod(shape)))
    x[:3] = torch.tensor([NAN, INF, -INF])
    return x.view(shape)


ANY = {  # number of dimensions: values of all kinds
    4: [torch.rand(5, 2, 8, 8), torch.rand(5, 5, 8, 8), torch.rand(1, 3, 8, 8), torch.rand(3, 1, 1, 1),
        with_bad(5, 3, 8, 8), torch.full((4, 1, 8, 8), NAN), torch.rand(4, 1, 8, 8).bfloat16()],
    3: [torch.rand(1, 1, 5), torch.zeros(0, 1, 5), torch.rand(3, 1, 1), with_bad(9, 1, 7),
        torch.full((2, 1, 9), NAN), torch.rand(9, 1, 5).bfloat16(), torch.full((2, 1, 9), 1e38)],
    2: [torch.rand(1, 2), torch.zeros(0, 2), with_bad(9, 2), torch.full((9, 2), NAN),
        torch.full((9, 2), 1e38), torch.rand(9, 2).bfloat16()],
    1: [torch.zeros(5), torch.full((5,), NAN), with_bad(5), torch.zeros(0), torch.full((5,), 1e38),
        torch.ones(5).bfloat16().requires_grad_()]}


@pytest.mark.slow
@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")  # of an old matplotlib's parser
@pytest.mark.parametrize("ndim, x", [(ndim, x) for ndim in ANY for x in ANY[ndim]])
def test_any_data_are_drawn(tmp_path, monkeypatch, ndim, x):
    """Coarsely, which is faster."""
    monkeypatch.setitem(plotting.STYLE, "figure.dpi", 30)
    a, b, c = (tmp_path / name for name in ("a.png", "b.png", "c.gif"))
    if ndim == 4:
        plotting.neighbours(a, x.float(), Data("toy", x.float(), x[:2].float()))
        plotting.table(b, [x, x[:1]], "title", ["a", "b"], ["x"])
        plotting.gif(c, [x, x], 9, ["x", "y"], hold=1)
    elif ndim > 1:
        plotting.samples(a, x, Data("toy", x[:1], x[:1]), "title")  # fewer are held out than drawn
        plotting.film(c, [x, x], ["a", "b"], hold=1)
        if ndim == 2:
            plotting.fields(b, [("a", x, x, x)], "title")
    else:
        steps = list(range(len(x)))
        plotting.curves(a, [
            {"lines": {"a": (steps, x, "o-"), "_b": (x, x)}, "points": {"a": (steps, x)},
             "bars": (steps, x, 0.3), "levels": {f"_{i}": level for i, level in enumerate(x)},
             "yscale": "log", "xscale": "log"},
            {"bars": ([f"bar {i}" for i in steps], x)}, {"histogram": x, "xlim": (-2, 2)},
            plotting.loss_curve({"step": steps, "loss": x.tolist()}, "loss")])
    assert not plotting.not_drawn and len(list(tmp_path.iterdir())) == {4: 3, 3: 2, 2: 3, 1: 1}[ndim]


def test_nothing_to_draw_writes_nothing(tmp_path):
    plotting.curves(tmp_path / "a.png", [None])
    plotting.curves(tmp_path / "a.png", [])
    plotting.table(tmp_path / "a.png", [], "title")
    plotting.table(tmp_path / "a.png", [torch.zeros(0, 1, 8, 8)], "title")
    assert not list(tmp_path.iterdir()) and not plotting.not_drawn
