"""Drawing: grids of pictures with labels, curves, GIFs. What a figure shows is the script's
business.
"""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from matplotlib.animation import FuncAnimation, PillowWriter  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.utils import make_grid  # noqa: E402

plt.rcParams.update(
    {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110,
     "savefig.bbox": "tight", "axes.titlesize": 12}
)


def to_rgb(x):
    """Images (B, C, H, W) in [-1, 1] of any channel count -> (B, 3, H, W) in [0, 1]."""
    x = (x.detach().float().cpu() / 2 + 0.5).clamp(0, 1)
    if x.shape[1] == 3:
        return x
    return x[:, :1].expand(-1, 3, -1, -1)


def grid(x, columns, pad=1):
    """Images (B, C, H, W) in [-1, 1] -> one (H', W', 3) numpy picture, `columns` a row."""
    return make_grid(to_rgb(x), nrow=columns, padding=pad, pad_value=0.35).permute(1, 2, 0).numpy()


def save_grid(path, x, columns, title):
    """One labelled grid of images."""
    picture = grid(x, columns)
    width = min(10.0, max(5.0, picture.shape[1] / 40))
    figure, axis = plt.subplots(figsize=(width, width * picture.shape[0] / picture.shape[1] + 0.5))
    axis.imshow(picture, interpolation="nearest")
    axis.axis("off")
    axis.set_title(title)
    finish(figure, path)


def save_panels(path, panels, title, columns=4):
    """Grids side by side. panels: list of (subtitle, images (B, C, H, W)), each `columns` pictures
    wide.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 5.2), squeeze=False)
    for axis, (subtitle, x) in zip(axes[0], panels, strict=True):
        axis.imshow(grid(x, columns), interpolation="nearest")
        axis.axis("off")
        axis.set_title(subtitle)
    figure.suptitle(title, y=1.0)
    figure.tight_layout()
    finish(figure, path)


def save_rows(path, rows, title, row_labels=None, column_labels=None, cell=0.95):
    """A table of pictures. rows: list of (B, C, H, W) in [-1, 1], one tensor a row of the table."""
    n, H = max(len(row) for row in rows), max(row.shape[-2] for row in rows)
    W, gap = max(row.shape[-1] for row in rows), max(1, H // 14)
    canvas = np.ones((len(rows) * (H + gap), n * (W + gap), 3))
    for i, row in enumerate(rows):
        row = F.interpolate(to_rgb(row), (H, W), mode="nearest").permute(0, 2, 3, 1).numpy()
        for j, picture in enumerate(row):
            top, left = i * (H + gap), j * (W + gap)
            canvas[top : top + H, left : left + W] = picture
    figure, axis = plt.subplots(figsize=(cell * n, cell * len(rows) * (H + gap) / (W + gap)))
    axis.imshow(canvas[:-gap, :-gap], interpolation="nearest", aspect="auto")
    axis.set_position([0, 0, 1, 1])
    axis.set_frame_on(False)
    axis.xaxis.tick_top()
    axis.tick_params(length=0, pad=6)
    columns, middles = column_labels or [], row_labels or []
    axis.set_xticks([j * (W + gap) + W / 2 for j in range(len(columns))], columns, fontsize=10)
    axis.set_yticks([i * (H + gap) + H / 2 for i in range(len(middles))], middles)
    axis.set_title(title, fontsize=12, pad=10)
    finish(figure, path)


def save_gif(path, frames, columns, captions, hold=12, milliseconds=80, scale=4):
    """An animated GIF. frames: list of (B, C, H, W) in [-1, 1]; captions: one a frame; the last is
    held.
    """
    pictures = []
    for x, caption in zip(frames, captions, strict=True):
        picture = (grid(x, columns) * 255).round().astype(np.uint8)
        picture = Image.fromarray(picture)
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)
        canvas = Image.new("RGB", (picture.width, picture.height + 22), "white")
        canvas.paste(picture, (0, 22))
        _write(canvas, caption)
        pictures.append(canvas.quantize(32))
    pictures += [pictures[-1]] * hold
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)


def save_points(path, panels, title, limit=2.3):
    """Clouds of points side by side. panels: list of (subtitle, points (N, 2))."""
    width = min(5, 16 / len(panels))
    figure, axes = plt.subplots(1, len(panels), figsize=(width * len(panels), width + 0.6),
                                squeeze=False)
    for axis, (subtitle, x) in zip(axes[0], panels, strict=True):
        axis.scatter(*series(x).T, s=2, alpha=0.4)
        axis.set(title=subtitle, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal",
                 xticks=[], yticks=[])
    figure.suptitle(title)
    figure.tight_layout()
    finish(figure, path)


def save_points_gif(path, frames, captions, limit=2.3, hold=12, milliseconds=80):
    """An animated GIF of clouds of points. frames: list of (N, 2); the last is held."""
    figure, axis = plt.subplots(figsize=(4.2, 4.4), dpi=80)
    dots = axis.scatter(*series(frames[0]).T, s=2, alpha=0.5)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])

    def show(i):
        dots.set_offsets(series(frames[min(i, len(frames) - 1)]))
        axis.set_title(captions[min(i, len(frames) - 1)])

    FuncAnimation(figure, show, frames=len(frames) + hold).save(
        path, writer=PillowWriter(fps=1000 / milliseconds))
    plt.close(figure)


def _write(canvas, text):
    from PIL import ImageDraw

    ImageDraw.Draw(canvas).text((4, 4), text, fill="black")


def smooth(values, window=50):
    """Running mean over a trailing window; the same length as values."""
    total = np.cumsum(np.insert(np.asarray(values, dtype=float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def finish(figure, path):
    """Save a figure and close it."""
    figure.savefig(path)
    plt.close(figure)


def series(x):
    """A tensor as numpy on the CPU, for matplotlib."""
    return x.detach().float().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
