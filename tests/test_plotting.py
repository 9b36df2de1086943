"""common/plotting.py: nothing of matplotlib's is touched, and no figure takes a run along."""

import contextlib
import io
import subprocess
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
from conftest import environment, open_picture
from matplotlib.figure import Figure
from PIL import Image

pytestmark = pytest.mark.may_not_draw

ROOT = Path(__file__).resolve().parent.parent
NAN, INF = float("nan"), float("inf")


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


# matplotlib


@pytest.mark.slow
def test_a_students_matplotlib_is_left_alone(tmp_path):
    """Nothing is imported with the module; after a drawing the backend is the student's."""
    code = f"""
import sys
from pathlib import Path
import common.plotting
assert not {{"matplotlib", "PIL", "torchvision"}} & set(sys.modules), "imported too early"
import matplotlib
before = dict(matplotlib.rcParams)
from tests.test_plotting import one_of_each
for draw in one_of_each(Path({str(tmp_path)!r})).values():
    draw()
assert matplotlib.get_backend().lower() == "svg", matplotlib.get_backend()
assert "matplotlib.pyplot" not in sys.modules, "pyplot is imported"
assert dict(matplotlib.rcParams) == before, "rcParams are changed"
"""
    env = {"MPLBACKEND": "svg", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         cwd=ROOT, env=env)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "" and sorted(p.name for p in tmp_path.iterdir()) == sorted(EACH)


def test_the_style_holds_while_drawing_and_saving_only(tmp_path, monkeypatch):
    seen, save = [], Figure.savefig

    def savefig(self, *args, **kwargs):
        seen.append((self.dpi, self.axes[0].spines["top"].get_visible(),
                     matplotlib.rcParams["savefig.bbox"], matplotlib.rcParams["font.size"]))
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    with matplotlib.rc_context({"font.size": 7.0, "savefig.bbox": None}):
        before = dict(matplotlib.rcParams)
        plotting.curves(tmp_path / "a.png", [{"lines": {"a": ([1, 2], [3, 4])}}])
        with pytest.raises(Mistake):
            plotting.curves(tmp_path / "missing" / "a.png", [{"lines": {"a": ([1, 2], [3, 4])}}])
        assert dict(matplotlib.rcParams) == before
    assert seen == [(110, False, "tight", 11.0)] * 2


# A figure that cannot be drawn


def test_an_error_prints_its_traceback_and_the_next_figure_is_drawn(tmp_path, capsys):
    @plotting.figure("one.png", "two.gif")
    def figure_broken(run):
        raise ValueError("first line\nsecond line")

    assert figure_broken(object()) is None
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("one.png, two.gif: not drawn\nTraceback")
    assert "figure_broken" in said.err and said.err.endswith("ValueError: first line\nsecond line\n")
    plotting.grid(tmp_path / "three.png", "no tensor", 2, "title")
    assert "AttributeError" in capsys.readouterr().err
    plotting.grid(tmp_path / "next.png", torch.zeros(4, 1, 8, 8), 2, "title")
    assert list(plotting.not_drawn) == ["one.png", "two.gif", "three.png"]
    assert [p.name for p in tmp_path.iterdir()] == ["next.png"]


def test_the_path_may_be_given_by_its_name(tmp_path):
    plotting.grid(path=tmp_path / "a.png", x=torch.zeros(4, 1, 8, 8), columns=2, title="title")
    plotting.grid(path=tmp_path / "b.png", x="no tensor", columns=2, title="title")
    assert (tmp_path / "a.png").exists() and list(plotting.not_drawn) == ["b.png"]


def test_a_figure_that_is_drawn_later_is_drawn(tmp_path):
    """As preview.png is, many times in a run."""
    plotting.grid(tmp_path / "a.png", "no tensor", 2, "title")
    assert list(plotting.not_drawn) == ["a.png"]
    plotting.grid(tmp_path / "a.png", torch.zeros(4, 1, 8, 8), 2, "title")
    assert not plotting.not_drawn


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


def test_a_folder_that_is_missing_is_a_mistake(tmp_path):
    with pytest.raises(Mistake, match="such.png: cannot be written .No such file or directory"):
        plotting.grid(tmp_path / "no" / "such.png", torch.zeros(4, 1, 8, 8), 2, "title")


def test_a_figure_inside_a_figure_fails_alone(tmp_path):
    @plotting.figure("a.png")
    def figure_two():
        plotting.grid(tmp_path / "b.png", "no tensor", 2, "title")
        plotting.grid(tmp_path / "a.png", torch.zeros(4, 1, 8, 8), 2, "title")
        assert matplotlib.rcParams["savefig.bbox"] == "tight"
        return "done"

    assert figure_two() == "done"
    assert list(plotting.not_drawn) == ["b.png"] and (tmp_path / "a.png").exists()


def test_a_figure_is_drawn_without_gradients_but_may_ask_for_them():
    @plotting.figure("gradient.png")
    def figure_gradient(x, scale=1):
        """What it shows."""
        assert not torch.is_grad_enabled() and not (x * scale).requires_grad
        made = torch.ones(2)
        with torch.enable_grad():
            made.requires_grad_()
            return torch.autograd.grad((made * x).sum() * scale, made)[0]

    x = torch.full((2,), 3.0, requires_grad=True)
    assert torch.equal(figure_gradient(x, scale=2), torch.full((2,), 6.0))
    assert torch.is_grad_enabled()
    assert figure_gradient.__name__ == "figure_gradient" and figure_gradient.__doc__ == "What it shows."


@pytest.mark.parametrize("name", EACH)
def test_every_function_that_writes_survives_an_error(tmp_path, monkeypatch, name):
    def broken(path, content):
        assert not torch.is_grad_enabled()
        raise ValueError("broken")

    monkeypatch.setattr(plotting, "write_whole", broken)
    one_of_each(tmp_path)[name]()
    assert list(plotting.not_drawn) == [name]


def test_an_error_before_anything_is_drawn_is_told():
    plotting.samples("a.png", torch.zeros(4, 1, 8, 8), None, "title")
    plotting.neighbours("b.png", torch.zeros(4, 1, 8, 8), None)
    assert list(plotting.not_drawn) == ["a.png", "b.png"]


# Files


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["grid.png", "frames.gif", "points.gif"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, name, error):
    def save(self, file, *_, **__):
        file.write(b"half a pict")
        raise error("full")

    draw = one_of_each(tmp_path)[name]
    draw()
    before = (tmp_path / name).read_bytes()
    monkeypatch.setattr(Figure, "savefig", save)
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(KeyboardInterrupt) if error is KeyboardInterrupt else contextlib.nullcontext():
        draw()
    assert list(plotting.not_drawn) == [name] * (error is OSError)
    assert (tmp_path / name).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.svg", "a.PNG", "a"])
def test_a_name_says_the_format(tmp_path, name):
    plotting.grid(str(tmp_path / name), torch.zeros(4, 1, 8, 8), 2, "title")
    assert not plotting.not_drawn
    start = (tmp_path / name).read_bytes()[:200]
    assert b"xml" in start if name == "a.svg" else start.startswith(b"\x89PNG")


# In a notebook


@pytest.fixture
def notebook(monkeypatch):
    """A kernel: the list of what is shown under the cell."""
    shown = []
    display = types.ModuleType("IPython.display")
    display.Image = lambda filename: (filename, Path(filename).read_bytes())
    display.display = shown.append
    ipython = types.ModuleType("IPython")
    ipython.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(plotting, "in_notebook", lambda: True)
    return types.SimpleNamespace(shown=shown, display=display)


def test_a_notebook_shows_each_picture(tmp_path, notebook):
    names = ["grid.png", "frames.gif", "points.gif", "samples.png"]
    for name in names:
        one_of_each(tmp_path)[name]()
    plotting.curves(tmp_path / "none.png", [None])
    assert [shown for shown, _ in notebook.shown] == [str(tmp_path / name) for name in names]
    assert all(held == (tmp_path / name).read_bytes()
               for name, (_, held) in zip(names, notebook.shown, strict=True))
    assert not plotting.not_drawn


def test_a_picture_that_cannot_be_shown_is_still_written(tmp_path, notebook):
    def display(_):
        raise RuntimeError("no front end")

    notebook.display.display = display
    one_of_each(tmp_path)["grid.png"]()
    assert (tmp_path / "grid.png").exists() and not plotting.not_drawn


def test_outside_a_notebook_nothing_is_shown(tmp_path, notebook, monkeypatch):
    monkeypatch.setattr(plotting, "in_notebook", lambda: False)
    one_of_each(tmp_path)["grid.png"]()
    assert (tmp_path / "grid.png").exists() and not notebook.shown


# Any data


@pytest.fixture
def all_drawn(monkeypatch):
    """No figure fails; drawn coarsely, which is faster."""
    monkeypatch.setitem(plotting.STYLE, "figure.dpi", 30)
    yield
    assert not plotting.not_drawn


def with_bad(*shape):
    """Values with NaN, infinity and minus infinity among them."""
    x = torch.linspace(-1, 1, int(np.prod(shape)))
    x[:3] = torch.tensor([NAN, INF, -INF])
    return x.view(shape)


PICTURES = {
    "two channels": torch.rand(5, 2, 8, 8), "five channels": torch.rand(5, 5, 8, 8),
    "one picture": torch.rand(1, 3, 8, 8), "one pixel": torch.rand(3, 1, 1, 1),
    "bad": with_bad(5, 3, 8, 8), "all nan": torch.full((4, 1, 8, 8), NAN),
    "all equal": torch.zeros(4, 3, 8, 8), "bfloat16": torch.rand(4, 1, 8, 8).bfloat16()}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PICTURES)
def test_any_pictures_are_drawn(tmp_path, all_drawn, name):
    x = PICTURES[name]
    plotting.grid(tmp_path / "a.png", x, 10, "title")
    plotting.neighbours(tmp_path / "b.png", x.float(), Data("toy", x.float(), x[:2].float()))
    plotting.table(tmp_path / "c.png", [x, x[:1]], "title", ["a", "b"], ["x"])
    plotting.gif(tmp_path / "d.gif", [x, x], 9, ["x", "y"], hold=1)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("drawn, held_out", [(torch.rand(5, 4, 8, 8), torch.rand(2, 4, 8, 8)),
                                             (torch.rand(1, 1, 8, 8), torch.rand(9, 1, 8, 8)),
                                             (torch.rand(9, 2), torch.rand(1, 2))])
def test_fewer_may_be_held_out_than_drawn(tmp_path, all_drawn, drawn, held_out):
    plotting.samples(tmp_path / "a.png", drawn, Data("toy", held_out, held_out), "title")
    assert (tmp_path / "a.png").exists()


POINTS = {"one": torch.rand(1, 2), "none": torch.zeros(0, 2), "bad": with_bad(9, 2),
          "all nan": torch.full((9, 2), NAN), "huge": torch.full((9, 2), 1e38),
          "bfloat16": torch.rand(9, 2).bfloat16()}


@pytest.mark.parametrize("name", POINTS)
def test_any_points_are_drawn(tmp_path, all_drawn, name):
    x = POINTS[name]
    plotting.panels(tmp_path / "a.png", [("a", x)], "title")
    plotting.fields(tmp_path / "b.png", [("a", x, x, x)], "title")
    plotting.film(tmp_path / "d.gif", [x, x], ["a", "b"], hold=1)
    assert len(list(tmp_path.iterdir())) == 3


SERIES = {"one": torch.rand(1, 1, 5), "none": torch.zeros(0, 1, 5), "one number": torch.rand(3, 1, 1),
          "bad": with_bad(9, 1, 7), "all nan": torch.full((2, 1, 9), NAN),
          "bfloat16": torch.rand(9, 1, 5).bfloat16(), "huge": torch.full((2, 1, 9), 1e38)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SERIES)
def test_any_series_are_drawn(tmp_path, all_drawn, name):
    x = SERIES[name]
    plotting.samples(tmp_path / "a.png", x, Data("toy", x[:1], x[:1]), "title")
    plotting.film(tmp_path / "b.gif", [x, x], ["a", "b"], hold=1)
    assert len(list(tmp_path.iterdir())) == 2


VALUES = {"zeros": torch.zeros(5), "all nan": torch.full((5,), NAN),
          "all infinite": torch.full((5,), INF), "bad": with_bad(5), "none": torch.zeros(0),
          "huge": torch.full((5,), 1e38), "bfloat16": torch.ones(5).bfloat16(),
          "with a gradient": torch.ones(5, requires_grad=True)}


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")  # of an old matplotlib's parser
@pytest.mark.parametrize("name", VALUES)
def test_any_values_are_drawn(tmp_path, all_drawn, name):
    y = VALUES[name]
    x = list(range(len(y)))
    plotting.curves(tmp_path / "a.png", [
        {"lines": {"a": (x, y, "o-"), "_b": (y, y)}, "points": {"a": (x, y)},
         "bars": (x, y, 0.3), "levels": {f"_{i}": level for i, level in enumerate(y)},
         "yscale": "log", "xscale": "log"}])
    plotting.curves(tmp_path / "b.png", [{"bars": ([f"bar {i}" for i in x], y)}])
    plotting.curves(tmp_path / "c.png", [{"histogram": y, "xlim": (-2, 2)}])
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("losses", [[0.0, 0.0], [1.0, NAN, INF], [2.0]])
def test_any_losses_are_drawn(tmp_path, all_drawn, losses):
    log = {"step": list(range(len(losses))), "loss": losses}
    plotting.curves(tmp_path / "a.png", [
        plotting.loss_curve(log, "loss"),
        plotting.loss_by_t(lambda low, high: losses[low % len(losses)], [1, 3, 4], "by t")])
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("values, asked, scale", [
    ([0.0, 0.0], "log", "linear"), ([NAN, -1.0], "log", "linear"), ([0.0, 1e-3], "log", "log"),
    ([-1.0, -9.0], "symlog", "symlog")])
def test_a_log_scale_needs_a_positive_value(tmp_path, monkeypatch, values, asked, scale):
    seen = []
    monkeypatch.setattr(plotting, "save", lambda sheet, *_, **__: seen.append(sheet))
    part = {"lines": {"a": ([1, 2], values)}, "xscale": "log", "yscale": asked}
    plotting.curves(tmp_path / "a.png", [part])
    axis, = seen[0].axes
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", scale) and not plotting.not_drawn


def test_a_histogram_is_drawn_over_its_xlim(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plotting, "save", lambda sheet, *_, **__: seen.append(sheet))
    plotting.curves(tmp_path / "a.png", [{"histogram": [0.0, 1.0, 90.0], "xlim": (-2, 3)}])
    bars = seen[0].axes[0].patches
    assert len(bars) == 100 and not plotting.not_drawn
    assert bars[0].get_x() == -2 and bars[-1].get_x() + bars[-1].get_width() == pytest.approx(3)


def test_nothing_to_draw_writes_nothing(tmp_path):
    plotting.curves(tmp_path / "a.png", [None])
    plotting.curves(tmp_path / "a.png", [])
    plotting.table(tmp_path / "a.png", [], "title")
    plotting.table(tmp_path / "a.png", [torch.zeros(0, 1, 8, 8)], "title")
    assert not list(tmp_path.iterdir()) and not plotting.not_drawn


def test_pixels_that_are_not_finite():
    x = torch.tensor([NAN, INF, -INF, 0.0]).view(1, 1, 2, 2)
    assert torch.equal(plotting.to_rgb(x)[0, 0], torch.tensor([[0.0, 1.0], [0.0, 0.5]]))


def test_a_loss_that_is_not_finite_leaves_the_mean_of_the_others():
    found = plotting.smooth([1.0, NAN, 3.0, INF, NAN, 5.0], 2)
    assert np.array_equal(found, [1, 1, 3, 3, NAN, 5], equal_nan=True)


def test_any_tensor_is_an_array():
    assert plotting.to_numpy(torch.ones(2, requires_grad=True)).tolist() == [1, 1]
    assert plotting.to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32
    assert plotting.to_numpy(torch.ones(2, dtype=torch.float64)).dtype == np.float64


def test_a_picture_is_written_pixel_for_pixel(tmp_path):
    pixels = torch.randint(0, 256, (3, 5, 7))
    plotting.picture(tmp_path / "a.png", pixels / 127.5 - 1)
    plotting.picture(tmp_path / "b.png", pixels[:1] / 127.5 - 1)
    assert np.array(Image.open(tmp_path / "a.png")).tolist() == pixels.permute(1, 2, 0).tolist()
    assert np.array(Image.open(tmp_path / "b.png"))[..., 2].tolist() == pixels[0].tolist()


def axes_of(monkeypatch, draw):
    """What a figure has on its axes."""
    sheets = []
    monkeypatch.setattr(plotting, "save", lambda sheet, path, title="", math=True: sheets.append(sheet))
    draw()
    return sheets[0].axes


def test_points_are_seen_to_a_limit_and_images_in_columns(monkeypatch):
    points, x = torch.randn(9, 2), torch.rand(6, 1, 4, 4)
    axis, other = axes_of(monkeypatch, lambda: plotting.panels(
        "a.png", [("a", points), ("b", points)], "title", limit=1.5))
    assert (axis.get_xlim(), axis.get_ylim()) == ((-1.5, 1.5), (-1.5, 1.5))
    assert np.allclose(other.collections[0].get_offsets(), points) and other.get_title() == "b"
    axis, = axes_of(monkeypatch, lambda: plotting.panels("a.png", [("a", x)], "title", columns=3))
    assert axis.images[0].get_array().shape[:2] == (2 * 5 + 1, 3 * 5 + 1)


def test_series_stand_one_below_the_other(monkeypatch):
    x = torch.randn(9, 1, 20)
    axes = axes_of(monkeypatch, lambda: plotting.panels("a.png", [("a", x), ("b", -x)], "title"))
    for sign, axis in zip((1, -1), axes, strict=True):
        assert len(axis.lines) == 8
        for i, line in enumerate(axis.lines):
            assert np.allclose(line.get_ydata(), sign * x[i, 0] / 6 - i, atol=1e-6)
        assert axis.get_ylim() == (-8, 1)


def test_names_of_users_are_never_mathtext(tmp_path, monkeypatch):
    monkeypatch.setattr(plotting, "_write", lambda path, save: save(io.BytesIO(), "png"))
    x = torch.rand(2, 1, 8, 8)
    for name in ("$", "$x", r"a$\frac$b", "100%_$a^$"):
        plotting.table("a.png", [x, x], name, [name, name], [name, name])
        plotting.panels("b.png", [(name, x)], name)
        plotting.grid("c.png", x, 2, name)
    assert not plotting.not_drawn


def test_letters_that_no_font_has_are_said_once_and_fallback_fonts_are_used(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plotting, "say_once", print)
    with warnings.catch_warnings(record=True) as seen:
        plotting.table(tmp_path / "a.png", [torch.rand(1, 1, 8, 8)], "title", ["\U000104AB"])
    assert not seen and "fonts-noto-cjk" in capsys.readouterr().out
    monkeypatch.setattr(plotting, "CJK", ("No such family", "DejaVu Serif"))
    families = []
    monkeypatch.setattr(plotting, "save", lambda sheet, *_, **__: families.append(
        matplotlib.rcParams["font.family"]))
    plotting.grid(tmp_path / "b.png", torch.rand(1, 1, 8, 8), 1, "title")
    assert families == [["DejaVu Sans", "DejaVu Serif"]]


@pytest.mark.parametrize("env", [
    {"MPLBACKEND": "module://no_such_package.backend"}, {"MPLBACKEND": "no_such_backend"},
    {"MATPLOTLIBRC": "rc"}, {"PYTHONWARNINGS": "error"}, {"MPLCONFIGDIR": "/proc/none"}], ids=str)
def test_what_other_programs_leave_in_the_environment_does_not_matter(env, tmp_path):
    (tmp_path / "rc").mkdir()
    (tmp_path / "rc" / "matplotlibrc").write_text("text.usetex: True\nfont.size: 40\nbackend: none\n")
    env = {k: str(tmp_path / "rc") if v == "rc" else v for k, v in env.items()}
    code = ("import sys, torch; from common import plotting; "
            "plotting.grid(sys.argv[1], torch.linspace(-1, 1, 256).view(4, 1, 8, 8), 2, 'title'); print(plotting.not_drawn)")
    for name, more in (("plain.png", {}), ("other.png", env)):
        ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], cwd=ROOT, text=True,
                             env=environment() | more, capture_output=True)
        assert ran.returncode == 0 and "{}" in ran.stdout, ran.stderr
    plain, other = (open_picture(tmp_path / name)[0] for name in ("plain.png", "other.png"))
    assert np.array_equal(plain, other)
