"""Drawing: pictures, curves, points in the plane and animations.

A figure function of a script says which tensors are drawn, and the words beside them.
Every function here writes one file. Images are (B, C, H, W) in [-1, 1], points (N, 2).
matplotlib is imported on the first drawing, and never pyplot: a notebook's own figures
keep their backend and their style.
"""

import contextlib
import functools
import io
import math
import os
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .cli import Mistake, in_notebook, out_of_memory, say_once, write_whole

STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
         "figure.dpi": 110, "savefig.bbox": "tight", "axes.titlesize": 12}
# Families with letters of Chinese, Japanese and Korean; used where they are installed.
CJK = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic",
       "Apple SD Gothic Neo", "Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans",
       "Microsoft YaHei", "PingFang SC", "WenQuanYi Zen Hei", "Arial Unicode MS")
not_drawn = {}  # the files that could not be drawn: the last line of a run names them
left_out = {}  # those that compare with data, where there is none
_written = []


def figure(*files, compares=True):
    """Decorator of a function that draws these files: @plotting.figure("loss.png").

    It draws without gradients and in the style used here. An error prints its traceback
    and the program goes on, since the other figures and the run do not depend on this
    one; a full disk or too little memory still ends it. Where its data has no examples,
    a figure that compares with them is left out. Without files, as in this module, the
    first argument is the path.
    """
    def decorate(draw):
        @functools.wraps(draw)
        def drawn(*args, **kwargs):
            given = [*args, *kwargs.values()]
            names = files or [Path(kwargs.get("path") or args[0]).name]
            if compares and any(getattr(x, "empty", False) for x in given):
                left_out.update(dict.fromkeys(names))
                return
            begin = len(_written)
            try:
                with _style(), torch.no_grad():
                    return draw(*args, **kwargs)
            except Exception as problem:
                if isinstance(problem, Mistake) or out_of_memory(problem):
                    raise
                missing = [name for name in names if name not in _written[begin:]]
                print(f"{', '.join(missing)}: not drawn", file=sys.stderr)
                traceback.print_exc()
                not_drawn.update(dict.fromkeys(missing))
        return drawn

    return decorate


@contextlib.contextmanager
def _style():
    """matplotlib's own settings and STYLE, whatever a matplotlibrc says."""
    backend = os.environ.pop("MPLBACKEND", None)  # it may name a package not installed
    import matplotlib
    from matplotlib import font_manager

    if backend:
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    quiet = np.errstate(all="ignore")  # NaN and infinity are left blank
    with quiet, warnings.catch_warnings(record=True) as caught, matplotlib.rc_context():
        warnings.simplefilter("always")
        matplotlib.rcdefaults()
        installed = {font.name for font in font_manager.fontManager.ttflist}
        fonts = ["DejaVu Sans", *(name for name in CJK if name in installed)]
        matplotlib.rcParams.update(STYLE | {"font.family": fonts})
        yield
    if any("Glyph" in str(warning.message) for warning in caught):
        say_once("figures: no installed font has all letters of these names; a package "
                 "with letters of Chinese, Japanese and Korean is fonts-noto-cjk")


def _write(path, save):
    """Write a picture as a whole: save(file, format). A notebook shows it, too."""
    path, packed = Path(path), io.BytesIO()
    save(packed, path.suffix[1:] or "png")
    write_whole(path, packed.getvalue())
    not_drawn.pop(path.name, None)
    _written.append(path.name)
    if in_notebook():
        with contextlib.suppress(Exception):
            from IPython.display import Image, display
            display(Image(filename=str(path)))


def _write_gif(path, pictures, hold, milliseconds):
    """Write PIL images as an animated GIF that holds the last one."""
    first, *rest = pictures + [pictures[-1]] * hold
    _write(path, lambda file, _: first.save(
        file, "gif", save_all=True, append_images=rest, duration=milliseconds, loop=0))


def sheet_of(n, width, height, rows=1, **options):
    """(figure, axes): a figure of width x height inches, with n axes in each row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    sheet = Figure(figsize=(width, height))
    FigureCanvasAgg(sheet)
    return sheet, sheet.subplots(rows, n, squeeze=False, **options).ravel()


def save(sheet, path, title="", math=True):
    """Give a figure its title and write it to a file.

    math=False: $ in its texts is a letter, since names come from users.
    """
    if title:
        sheet.suptitle(title)
    if not math:
        from matplotlib.text import Text
        for text in sheet.findobj(Text):
            text.set_parse_math(False)
    if title or len(sheet.axes) > 1:
        sheet.tight_layout()
    _write(path, lambda file, kind: sheet.savefig(file, format=kind))


def to_numpy(x):
    """A tensor, or what numpy takes, as an array on the CPU."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = x.float() if x.dtype == torch.bfloat16 else x  # which numpy has not
    return np.asarray(x)


# Pictures


def to_rgb(x):
    """Images -> (B, 3, H, W) in [0, 1]: three channels, or the first; NaN is black."""
    x = (x.detach().cpu().float() / 2 + 0.5).nan_to_num(0, 1, 0).clamp(0, 1)
    return x if x.shape[1] == 3 else x[:, :1].expand(-1, 3, -1, -1)


def tile(x, columns, pad=1):
    """Images -> one (H', W', 3) array, `columns` a row, grey lines between them."""
    pictures = to_rgb(x).permute(0, 2, 3, 1).numpy()
    (n, H, W, _), columns = pictures.shape, min(columns, len(pictures))
    rows = -(-n // columns)
    sheet = np.full((pad + rows * (H + pad), pad + columns * (W + pad), 3), 0.35,
                    dtype=np.float32)
    for i, picture in enumerate(pictures):
        top, left = pad + i // columns * (H + pad), pad + i % columns * (W + pad)
        sheet[top:top + H, left:left + W] = picture
    return sheet


def square(n):
    """How many of n pictures stand in a row of a grid about as wide as high."""
    return max(1, math.isqrt(n))


def evenly(items, n):
    """n of the items, or all if there are fewer: evenly spaced, with first and last."""
    n = min(n, len(items))
    last, intervals = len(items) - 1, max(1, n - 1)
    return [items[round(i * last / intervals)] for i in range(n)]


@figure()
def grid(path, x, columns, title):
    """One grid of images."""
    picture = tile(x, columns)
    width = min(10.0, max(5.0, picture.shape[1] / 40))
    height = width * picture.shape[0] / picture.shape[1] + 0.5
    sheet, [axis] = sheet_of(1, width, height)
    axis.imshow(picture, interpolation="nearest")
    axis.axis("off")
    axis.set_title(title)
    save(sheet, path, math=False)


@figure()
def picture(path, x):
    """One image (C, H, W), pixel for pixel."""
    from PIL import Image
    pixels = (to_rgb(x[None])[0].permute(1, 2, 0).numpy() * 255).round()
    picture = Image.fromarray(pixels.astype(np.uint8))
    _write(path, lambda file, _: picture.save(file, "png"))


@figure()
def panels(path, parts, title, columns=None, limit=2.3):
    """Grids of images, points or series, side by side; parts: (subtitle, tensor)."""
    points = parts[0][1].ndim < 4
    width = min(4.4, 16 / len(parts))
    height = width + (0.6 if points else 0.8)
    sheet, axes = sheet_of(len(parts), width * len(parts), height)
    for axis, (subtitle, x) in zip(axes, parts, strict=True):
        if points:
            _draw(axis, x, limit)
        else:
            axis.imshow(tile(x, columns or square(len(x))), interpolation="nearest")
            axis.axis("off")
        axis.set_title(subtitle)
    save(sheet, path, title, math=False)


@figure(compares=False)
def samples(path, drawn, data, title):
    """Drawn beside held-out data: at most 64 images, 5,000 points or 8 series each."""
    n = min({2: 5000, 3: 8, 4: 64}[drawn.ndim], len(drawn))
    parts = [("samples", drawn[:n]), ("real, held out", data.test[:n])]
    panels(path, parts[:1] if data.empty else parts, title, square(n))


@figure()
def table(path, rows, title, row_labels=(), column_labels=(), cell=0.95):
    """A table of pictures; rows: images, one tensor a row of the table."""
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        return
    H, W = max(row.shape[-2] for row in rows), max(row.shape[-1] for row in rows)
    gap = max(1, H // 14)
    canvas = np.ones((len(rows) * (H + gap), columns * (W + gap), 3))
    for i, row in enumerate(rows):
        row = F.interpolate(to_rgb(row), (H, W), mode="nearest").permute(0, 2, 3, 1)
        for j, picture in enumerate(row.numpy()):
            top, left = i * (H + gap), j * (W + gap)
            canvas[top:top + H, left:left + W] = picture
    height = cell * len(rows) * (H + gap) / (W + gap)
    sheet, [axis] = sheet_of(1, cell * columns, height)
    axis.imshow(canvas[:-gap, :-gap], interpolation="nearest", aspect="auto")
    axis.set_position([0, 0, 1, 1])
    axis.set_frame_on(False)
    axis.xaxis.tick_top()
    axis.tick_params(length=0, pad=6)
    across = [j * (W + gap) + W / 2 for j in range(len(column_labels))]
    down = [i * (H + gap) + H / 2 for i in range(len(row_labels))]
    axis.set_xticks(across, column_labels, fontsize=10)
    axis.set_yticks(down, row_labels)
    axis.set_title(title, fontsize=12, pad=10)
    save(sheet, path, math=False)


@figure()
def neighbours(path, drawn, data, n=12):
    """Samples, and under each the nearest training picture with its distance.

    The title gives the distance of held-out pictures to theirs: samples that are much
    nearer are copies.
    """
    from .quality import nearest_neighbours
    nearest, distance = nearest_neighbours(drawn[:n], data.train)
    held_out = nearest_neighbours(data.test, data.train)[1].mean().item()
    table(path, [drawn[:n], data.train[nearest]],
          f"Samples, their nearest training pictures, the distance (rms a pixel;\n"
          f"of held-out pictures to their nearest: {held_out:.2f} on average)",
          ["sample", "nearest"], [f"{d:.2f}" for d in distance.tolist()])


@figure()
def gif(path, frames, columns, captions, hold=12, milliseconds=80, scale=4):
    """An animated GIF of grids of images, one caption a frame; the last is held."""
    from PIL import Image, ImageDraw
    pictures = []
    for x, caption in zip(frames, captions, strict=True):
        picture = (tile(x, columns) * 255).round().astype(np.uint8)
        picture = Image.fromarray(picture)
        size = picture.width * scale, picture.height * scale
        canvas = Image.new("RGB", (size[0], size[1] + 22), "white")
        canvas.paste(picture.resize(size, Image.NEAREST), (0, 22))
        ImageDraw.Draw(canvas).text((4, 4), caption, fill="black")
        pictures.append(canvas.quantize(32))
    _write_gif(path, pictures, hold, milliseconds)


@figure()
def denoising(path, states, columns=3, frames=33):
    """An animated GIF of a sampler on its way; states: its (t, x_t), one after another.

    At most `frames` of them are shown, evenly spaced, the first and the last included.
    """
    states = evenly(list(states), frames)
    captions = [f"t = {t:.3g}" if isinstance(t, float) else f"t = {t}"
                for t, _ in states]
    gif(path, [x for _, x in states], columns, captions)


# Curves and bars


@figure()
def curves(path, parts, title="", height=3.4):
    """Curves, bars or histograms side by side, one axes a part.

    A part is a dict, or None to be left out. Its keys:
    "lines": {label: (x, y)} or {label: (x, y, style)}, with style such as "--" or "o-";
    "points": {label: (x, y)};
    "bars": (x, heights) or (x, heights, width);
    "histogram": values, drawn over the part's "xlim";
    "levels": {label: y};
    any other key is set on the axes (title, xlabel, xscale, ...).
    A label that begins with "_" is left out of the legend.
    """
    parts = [part for part in parts if part]
    if not parts:
        return
    width = 5.5 if len(parts) == 1 else 4.4 * len(parts)
    sheet, axes = sheet_of(len(parts), width, height)
    for axis, part in zip(axes, parts, strict=True):
        part = dict(part)
        for label, (x, y, *style) in part.pop("lines", {}).items():
            axis.plot(to_numpy(x), to_numpy(y), *style, label=label)
        for label, (x, y) in part.pop("points", {}).items():
            axis.scatter(to_numpy(x), to_numpy(y), color="C3", zorder=3, label=label)
        if bars := part.pop("bars", None):
            x, heights, *width = bars
            drawn = axis.bar(to_numpy(x), to_numpy(heights), *width)
            if len(drawn) <= 10:
                named = any(isinstance(name, str) for name in x)
                style = {"fmt": "%.3g"} if named else {"fmt": "%.1g", "fontsize": 7}
                axis.bar_label(drawn, **style)
                axis.margins(y=0.15)
        if (values := part.pop("histogram", None)) is not None:
            axis.hist(to_numpy(values).ravel(), bins=100, range=part["xlim"],
                      density=True, alpha=0.6, label="_values")
        for label, level in part.pop("levels", {}).items():
            axis.axhline(to_numpy(level).item(), color="0.5", ls=":", label=label)
        for key, least in zip(("xscale", "yscale"), axis.dataLim.minpos, strict=True):
            if part.get(key) == "log" and not np.isfinite(least):
                del part[key]  # nothing is positive, as a log scale needs it
        axis.set(**part)
        _, labels = axis.get_legend_handles_labels()
        if any(not label.startswith("_") for label in labels):
            axis.legend(frameon=False)
    save(sheet, path, title)


def smooth(values, window=50):
    """Mean of the finite values in a trailing window; the same length as values."""
    values = np.insert(np.asarray(values, dtype=float), 0, 0.0)
    finite = np.isfinite(values)
    total, count = np.cumsum(np.where(finite, values, 0.0)), np.cumsum(finite)
    ends = np.arange(1, len(values))
    starts = np.maximum(ends - window, 0)
    with np.errstate(all="ignore"):  # NaN where a window has none
        return (total[ends] - total[starts]) / (count[ends] - count[starts])


def loss_curve(log, title, column="loss"):
    """A part of `curves`: the loss of each step in a log; None for an empty log."""
    if column not in log:
        return None
    mean = smooth(log[column], 100)
    return {"lines": {"each step": (log["step"], log[column], "0.75"),
                      "mean of 100": (log["step"], mean, "C1")},
            "xlabel": "step", "yscale": "log", "title": title}


def loss_by_t(loss, edges, title):
    """A part of `curves`: loss(low, high) of each pair of adjacent edges, as bars."""
    pairs = list(zip(edges[:-1], edges[1:], strict=True))
    middles = [(low + high) / 2 for low, high in pairs]
    width = 0.9 * (edges[-1] - edges[0]) / len(pairs)
    losses = [loss(low, high) for low, high in pairs]
    return {"bars": (middles, losses, width),
            "xlabel": "t", "yscale": "log", "ylabel": "squared error", "title": title}


# Points in the plane


@figure()
def fields(path, parts, title, limit=2.3):
    """Arrows over points; parts: (subtitle, points, where (N, 2), arrows (N, 2))."""
    sheet, axes = sheet_of(len(parts), 3.8 * len(parts), 4)
    for axis, (subtitle, points, where, arrows) in zip(axes, parts, strict=True):
        axis.scatter(*to_numpy(points).T, s=2, alpha=0.35, color="C1")
        axis.quiver(*to_numpy(where).T, *to_numpy(arrows).T, color="C0", width=0.003)
        axis.set(title=subtitle, aspect="equal",
                 xlim=(-limit, limit), ylim=(-limit, limit))
    save(sheet, path, title)


@figure()
def film(path, frames, captions, limit=2.3, hold=12, milliseconds=80):
    """An animated GIF of points or series, one caption a frame; the last is held."""
    from PIL import Image
    sheet, [axis] = sheet_of(1, 4.2, 4.4)
    sheet.set_dpi(80)
    pictures = []
    for x, caption in zip(frames, captions, strict=True):
        axis.clear()
        _draw(axis, x, limit)
        axis.set_title(caption)
        sheet.canvas.draw()
        picture = Image.fromarray(np.array(sheet.canvas.buffer_rgba()))
        pictures.append(picture.convert("RGB").quantize(64))
    _write_gif(path, pictures, hold, milliseconds)


def _draw(axis, x, limit=2.3):
    """Points (N, 2), or at most eight series (N, 1, L), one below the other."""
    x = to_numpy(x)
    if x.ndim == 2:
        axis.scatter(*x.T, s=2, alpha=0.4)
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    else:
        for i, series in enumerate(x[:8, 0]):
            axis.plot(series / 6 - i, lw=1)
        axis.set_ylim(-len(x[:8]), 1)
    axis.set(xticks=[], yticks=[])


