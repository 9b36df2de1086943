"""Series in place of pictures: a score model that draws, fills in and forecasts them.

    python experiments/series.py                             sine waves under noise
    python experiments/series.py --dataset membrane          a nerve cell that fires
    python experiments/series.py --dataset csv:series.csv    your own, one a row
    python experiments/series.py --sample --forecast 12      of 12 values, no training

samples.png, samples.csv    series drawn from noise, in the unit of the data
series.png      power spectrum and autocorrelation of the samples and of the data
forecast.png    futures and fillings of held-out series ([SDE] App. I.2), with bands
denoising.gif, preview.png, loss.png    as of pictures

The SDEs, the loss, the samplers and the imputation are those of the page
score_based_diffusion_example.py, which take a tensor of any shape. New here are the
network (dilated convolutions, as in WaveNet) and the reading of tables. [SDE] is arXiv
2011.13456.
"""

import csv
import io
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent))
import score_based_diffusion_example as sb  # noqa: E402
from common import plotting  # noqa: E402
from common.cli import (  # noqa: E402
    Count, Mistake, Positive, Whole, command_line, say, writing)
from common.data import SERIES_NAMES, Data, check_name  # noqa: E402
from common.run import open_run  # noqa: E402


@dataclass(frozen=True)
class Config(sb.Config):
    """The page's settings with defaults for series, and a few for series alone."""

    dataset: str = "sines"  # sines, membrane, csv:PATH
    sde: Literal["ve", "vp", "subvp"] = "ve"  # forward SDE
    sigma_max: Positive = 20.0       # largest noise of ve
    weighting: sb.Weighting = "simple"  # weight lambda(t)
    dequantize: bool = False         # series have no 8-bit values to spread
    sampler: sb.Sampler = "em"       # SDE or ODE
    N: Count = 200                   # steps; rk4: N / 4, rk45: adaptive
    clip_x0: bool = False            # series have no range
    n_samples: Count = 320           # series drawn at the end
    hidden: Count = 48               # width of the network
    layers: Count = 8                # dilated blocks of the network
    steps: Count = 3000              # optimiser steps
    forecast: Whole = 0              # last values to hide and forecast; 0: a quarter
    inpaint_N: Count = 100           # steps where part of a series is known
    inpaint_corrector: Whole = 2     # corrector steps in each of them
    inpaint_snr: Positive = 0.2      # the corrector's ratio r in them


# The fields that may change after training
SAMPLING = (*sb.SAMPLING, "forecast", "inpaint_N", "inpaint_corrector", "inpaint_snr")

PRESETS = {
    "sines": Config(),
    "membrane": Config(dataset="membrane"),
    "csv": Config(dataset="csv"),
    "smoke": Config(
        hidden=16, layers=2, steps=6, batch_size=8, warmup=2, preview_every=3, N=5,
        tolerance=0.1, n_samples=20, inpaint_N=3),
}

# Fields of the page that only pictures have
PICTURES = ("image_size", "flip", "dequantize", "clip_x0", "likelihood", "channels",
            "mults", "blocks", "attention", "heads", "groups", "dropout", "patch")


# %% 1. Data


@dataclass(eq=False)
class Series(Data):
    """Series (N, 1, L) of mean 0 and std 1; offset + unit * x are their own numbers."""

    offset: float = 0.0
    unit: float = 1.0

    def restore(self, x):
        """Series x in the unit of the table that they come from."""
        return self.offset + self.unit * x

    def rescale(self, offset, unit):
        """The same series, scaled for a network that was trained on other numbers."""
        train, test = (x * (self.unit / unit) + (self.offset - offset) / unit
                       for x in (self.train, self.test))
        return Series(self.name, train, test, offset=offset, unit=unit)


def load_series(name, n=1250, length=128, seed=0):
    """Series by name, of mean 0 and std 1 over all numbers of the training part.

    sines: one wave each, under noise of 0.1, made here. membrane: windows of a
    recording that comes with matplotlib, the potential of a nerve cell that fires at an
    even pace; the last fifth is held out. csv:PATH: one series a row, a tenth is held
    out.
    """
    if name not in SERIES_NAMES and os.path.isfile(os.path.expanduser(name)):
        raise Mistake(f"dataset {name}: a table is named csv:{name}")
    check_name(name, SERIES_NAMES)
    if name == "sines":
        rng = np.random.default_rng(seed)
        angle = 2 * np.pi * rng.uniform(2, 8, (n, 1)) * np.linspace(0, 1, length)
        size, phase = rng.uniform(0.5, 1, (n, 1)), rng.uniform(0, 2 * np.pi, (n, 1))
        x = size * np.sin(angle + phase) + rng.normal(0, 0.1, (n, length))
        held_out, train = np.split(x, [n // 5])
    elif name == "membrane":
        recorded = read_recording(name)
        end = len(recorded) * 4 // 5
        train, held_out = (np.lib.stride_tricks.sliding_window_view(part, length)
                           for part in (recorded[:end], recorded[end:]))
        order = np.random.default_rng(seed).permutation(len(held_out))
        held_out = held_out[order]  # neighbours are nearly the same
    else:
        x = read_csv(name, Path(os.path.expanduser(name[len("csv:"):])))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        held_out, train = np.split(x[order.numpy()], [max(1, len(x) // 10)])
    offset, unit = float(train.mean()), float(train.std())
    if unit <= 1e-9 * abs(offset) or unit < 1e-30:
        raise Mistake(f"dataset {name}: all numbers of its training rows are "
                      f"{offset:g}")
    train, test = (torch.from_numpy((x - offset) / unit).float()[:, None]
                   for x in (train, held_out))
    return Series(name, train, test, offset=offset, unit=unit)


def read_recording(name):
    """The part of matplotlib's recording of a nerve cell that fires at an even pace."""
    from matplotlib import get_data_path

    file = Path(get_data_path()) / "sample_data" / "membrane.dat"
    try:
        return np.fromfile(file, np.float32).astype(float)[1400:7050:4]
    except OSError as problem:
        raise Mistake(f"dataset {name}: {file} cannot be read ({problem.strerror}); "
                      "this matplotlib has no sample data") from None


def read_csv(name, path):
    """The numbers of a table as an array (N, L), N and L >= 2, one series a row.

    Tables are read as pandas, Excel and numpy write them: separated by commas,
    semicolons, tabs or spaces; with decimal commas where commas separate nothing; with
    or without a header and a column of row numbers, names or dates. A line says which
    of these it found.
    """
    def refuse(problem):
        raise Mistake(f"dataset {name}: {problem}") from None

    try:
        content = path.read_bytes()
        if content[:2] == b"PK":
            refuse("is a workbook or an archive; save its sheet as CSV")
        utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # Excel's "Unicode text"
        # Only the numbers matter: a header in another encoding may lose its letters.
        text = content.decode("utf-16" if utf16 else "utf-8-sig", errors="replace")
        mark = find_mark(text)
        rows = cut(text, mark)
    except (OSError, ValueError, csv.Error) as problem:
        refuse(f"cannot be read ({getattr(problem, 'strerror', None) or problem})")
    width = len(rows[0][1]) if rows else 0
    for line, row in rows:
        if len(row) != width:
            refuse(f"row {line} has {len(row)} cells, must have {width} like the first "
                   "row: all series must have one length")
    # A separator at the end of each row makes an empty column.
    kept = [i for i in range(width) if any(row[i] for _, row in rows)]
    cells = [[row[i] for i in kept] for _, row in rows]
    values = np.array([[to_number(cell, mark) for cell in row] for row in cells])
    values = values.reshape(len(cells), len(kept))
    header, index = find_labels(cells, values)
    values = values[header:, index:]
    for i, j in np.argwhere(~(np.abs(values) < 1e30))[:1]:  # NaN is none of these
        line, row = rows[i + header]
        cell = kept[j + index]
        refuse(f"row {line}, cell {cell + 1} is {row[cell]!r:.40}, must be a finite "
               "number: fill it in, or leave the row out")
    n, length = values.shape
    if n < 2 or length < 2:
        refuse(f"holds {n} series of {length} numbers, needs at least 2 rows of 2 "
               "numbers: one series a row (transpose a table of one series a column)")
    say(f"{name}: {n} series of {length} values"
        + "; first row: header" * header + "; first column: index, left out" * index)
    return values


def find_mark(text):
    """The separator of a table: a semicolon, tab, comma or space.

    It is the first under which all cells of the last row, which is no header, are
    numbers; the first one may be a date. A comma may belong to the numbers instead.
    """
    last = [line for line in text.splitlines() if line.strip()][-1:]
    marks = [mark for mark in ";\t, " if mark in "".join(last)]
    for mark in marks:
        if not any(is_word(cell, to_number(cell, mark))
                   for _, row in cut("".join(last), mark) for cell in row[1:]):
            return mark
    return marks[0] if marks else ","


def cut(text, mark):
    """The rows of a table, each (line number, cells), without comments and empty rows.

    Spaces count as one separator, however many they are.
    """
    lines = io.StringIO(text, newline="")
    if mark == " ":
        rows = [(number, line.split()) for number, line in enumerate(lines, 1)]
    else:
        reader = csv.reader(lines, delimiter=mark)
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    return [(number, row) for number, row in rows
            if any(row) and not row[0].startswith("#")]


def to_number(cell, mark):
    """The number that a text stands for; NaN where it is none.

    A comma is a decimal point where it is no separator.
    """
    if mark != "," and "." not in cell:
        cell = cell.replace(",", ".")
    try:
        return float(cell)
    except ValueError:
        return math.nan


def is_word(cell, value):
    """Whether a cell holds a text that stands for no number."""
    return bool(math.isnan(value) and cell and cell.lower() != "nan")


def find_labels(cells, values):
    """Whether the first row is a header, and whether the first column is an index.

    cells, values: the texts of a table and their numbers, (N, L). Rows and columns are
    labelled by words (or dates), or by numbers that count where most others do not.
    """
    if not cells:
        return False, False
    words = np.array([[is_word(cell, value) for cell, value in zip(*row, strict=True)]
                      for row in zip(cells, values, strict=True)])
    corner_is_empty, index = cells[0][0] == "", False
    cornered = corner_is_empty or words[0, 0]  # the first cell is no number
    if cornered and words[0, 1:].all():
        header, index = True, corner_is_empty
    elif cornered and (corner_is_empty or not words[1:, 0].all()):
        # a row of data would have a number in this corner
        header = index = counts(values[0, 1:]) or counts(values[1:, 0])
    else:
        header = first_counts(values[:, 1:] if cornered else values)
    rest = values[header:]
    if len(rest) and words[header:, 0].all():
        index = True
    elif len(rest) > 2 and first_counts(rest.T):
        index = True
    return bool(header), bool(index)


def counts(values):
    """Whether numbers are whole, ascend and are evenly spaced, as 0, 1, 2, ... are."""
    with np.errstate(all="ignore"):  # an infinite number does not count
        steps = np.diff(values)
        return bool((values % 1 == 0).all() and (steps > 0).all()
                    and (steps == steps[:1]).all())


def first_counts(rows):
    """Whether the first of three or more rows counts where most others do not."""
    if len(rows) < 3 or len(rows[0]) < 2:
        return False
    alike = sum(counts(row) for row in rows[1:])
    return counts(rows[0]) and alike < (len(rows) - 1) / 2


# %% 2. Network


class DilatedBlock(nn.Module):
    """A dilated and a plain convolution, with the time added. (B, C, 1, L) -> same."""

    recompute = True  # --grad_checkpointing: not stored, computed again going back

    def __init__(self, channels, dilation, time_dim):
        super().__init__()
        self.time = nn.Linear(time_dim, channels)
        self.conv1 = nn.Conv2d(channels, channels, (1, 3), padding=(0, dilation),
                               dilation=(1, dilation))
        self.conv2 = sb.zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x, emb):
        h = self.conv1(F.silu(x + self.time(emb)[:, :, None, None]))
        return x + self.conv2(F.silu(h))


class SeriesNet(nn.Module):
    """The network of series. x: (B, 1, L) of any L, t: (B,) -> like x.

    Its convolutions have dilations 1, 2, ..., 64, 1, ... as in WaveNet (arXiv
    1609.03499), but see both directions. Series are treated as images that are one
    pixel high, which CPUs are faster at. The buffers are set by training: sigma_data is
    the std of the data, offset + unit * x undoes its scaling.
    """

    def __init__(self, channels=48, layers=8, fourier=False):
        super().__init__()
        self.register_buffer("sigma_data", torch.tensor(0.5))
        self.register_buffer("offset", torch.tensor(0.0))
        self.register_buffer("unit", torch.tensor(1.0))
        self.fourier = sb.FourierFeatures(32) if fourier else None
        self.time = nn.Sequential(nn.Linear(64, channels), nn.SiLU())
        self.lift = nn.Conv2d(1, channels, (1, 3), padding=(0, 1))
        self.blocks = nn.ModuleList(
            DilatedBlock(channels, 2 ** (i % 7), channels) for i in range(layers))
        self.out = sb.zero_init(nn.Conv2d(channels, 1, 1))

    def forward(self, x, t):
        fourier = self.fourier
        emb = sb.timestep_embedding(t, 64) if fourier is None else fourier(t)
        emb, h = self.time(emb.to(x.dtype)), self.lift(x[:, :, None])  # (B, C, 1, L)
        for block in self.blocks:
            h = block(h, emb)
        return self.out(F.silu(h))[:, :, 0]


def in_unit_of(model, data):
    """The data scaled as what the network was trained on, or only its unit."""
    offset, unit = model.offset.item(), model.unit.item()
    if data.empty:  # the table of the checkpoint is not there
        return Series(data.name, data.train, data.test, offset=offset, unit=unit)
    return data.rescale(offset, unit)


def train(cfg, run, data):
    """Train on data.train and return the averaged network, as the page does."""
    sde = sb.make_sde(cfg)
    model = run.place(SeriesNet(cfg.hidden, cfg.layers, fourier=cfg.sde == "ve"))
    model.sigma_data.fill_(data.train.std())
    model.offset.fill_(data.offset)
    model.unit.fill_(data.unit)
    ema = sb.EMA(model, cfg.ema)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr,
                                  weight_decay=cfg.weight_decay)
    scaled = None
    for step in run.steps(cfg.steps, model=model, ema=ema.model, optimizer=optimizer):
        sb.set_learning_rate(optimizer, cfg, step)
        if scaled is None:  # a resumed run goes on in the unit of its checkpoint
            scaled = in_unit_of(model, data)
        x0, _ = run.batch(scaled.train)
        t, density = (part.to(run.device) for part in
                      sb.draw_times(sde, len(x0), cfg.weighting))
        eps = torch.randn_like(x0)
        with run.autocast():
            loss = sb.score_loss(model, sde, x0, t, eps, cfg.weighting, density)
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        ema.update(model, step)
        run.log(loss=loss, grad_norm=norm)
        if run.main and (step + 1) % cfg.preview_every == 0:
            sb.figure_preview(run, ema.model, sde, scaled, step + 1)
    return ema.model


# %% 3. Forecasts


def complete(cfg, score, sde, x, known):
    """Draw what is not known of x, (B, 1, L), beside what is. Source: [SDE] App. I.2.

    known: bool, broadcastable to x.
    """
    xT = sde.prior_std * torch.randn_like(x)
    correct = partial(sb.langevin_step, snr=cfg.inpaint_snr)
    states = sb.sde_process(sb.PREDICTORS[cfg.predictor], score, sde, xT, cfg.inpaint_N,
                            [correct] * cfg.inpaint_corrector,
                            sb.imputation(sde, x, known))
    return sb.final(states)


def futures(cfg, score, sde, x, known, n):
    """n completions of each series where known is False: (B, 1, L) -> (n, B, 1, L)."""
    times = n, 1, 1
    completed = complete(cfg, score, sde, x.repeat(times), known.repeat(times))
    return completed.view(n, *x.shape)


def unknown_parts(cfg, length):
    """{name: what is known, (1, 1, L) bool}: the last values are missing, or a gap."""
    t = torch.arange(length).view(1, 1, length)
    horizon = cfg.forecast or max(1, length // 4)
    start = (length - horizon) // 2
    return {"forecast": t < length - horizon,
            "gap": (t < start) | (t >= start + horizon)}


# %% 4. Measurements


def spectrum(x):
    """The mean power at each frequency of series (N, 1, L): (L // 2 + 1,)."""
    return torch.fft.rfft(x[:, 0].cpu(), norm="ortho").abs().square().mean(0)


def autocorrelation(x):
    """The mean autocorrelation of series (N, 1, L) at lags 0 to L // 2; 1 at lag 0.

    Each series is taken about its own mean, and divided by the sum of all its squares,
    as usual (biased).
    """
    x = x[:, 0].cpu()
    x, length = x - x.mean(1, keepdim=True), x.shape[1]
    power = torch.fft.rfft(x, 2 * length).abs().square()  # padded: it does not wrap
    products = torch.fft.irfft(power)[:, :length // 2 + 1]
    return (products / products[:, :1].clamp(min=1e-12)).mean(0)


def spectral_distance(a, b):
    """The log-spectral distance of series a and b, (N, 1, L) and (M, 1, L), in dB.

    It is the root mean square of the difference of their mean spectra in decibels.
    """
    decibels = [10 * spectrum(x).clamp(min=1e-12).log10() for x in (a, b)]
    return (decibels[0] - decibels[1]).square().mean().sqrt().item()


# %% 5. Figures and main


@plotting.figure("series.png")
def figure_series(run, data, samples):
    """series.png: spectrum and autocorrelation of the samples and of the data."""
    both = {"samples": (samples, "-"), "data": (data.train, "k--")}
    spectra, correlations = {}, {}
    for name, (x, style) in both.items():
        power, correlation = spectrum(x), autocorrelation(x)
        spectra[name] = range(len(power)), power, style
        correlations[f"_{name}"] = range(len(correlation)), correlation, style
    plotting.curves(run.path("series.png"), [
        {"lines": spectra, "xlabel": "cycles per series", "yscale": "log",
         "title": "power spectrum, the mean over series"},
        {"lines": correlations, "xlabel": "lag", "title": "autocorrelation"}])
    n, half = len(data.train), max(1, len(data.train) // 2)
    splits = [data.train[torch.randperm(2 * half) % n].split(half) for _ in range(10)]
    of_halves = [spectral_distance(a, b) for a, b in splits]
    run.add_metrics(samples={
        "n": len(samples),
        "spectral_distance_db": spectral_distance(samples, data.train),
        "spectral_distance_db_of_halves": float(np.mean(of_halves))})


@plotting.figure("forecast.png")
def figure_forecast(run, cfg, score, sde, data):
    """forecast.png: futures and fillings of held-out series, as bands over the truth.

    Between the 4th and the 36th of 39 draws lie 80 % of such draws, between the 10th
    and the 30th 50 %. How often the outer band holds the truth is in metrics.json.
    """
    x, parts, found = data.test[:16], [], {}
    for name, known in unknown_parts(cfg, data.shape[1]).items():
        known = known.to(x.device).expand_as(x)
        drawn = futures(cfg, score, sde, x, known, 39).sort(0).values
        bands = drawn[[3, 9, 19, 29, 35]]
        inside = (bands[0] <= x) & (x <= bands[-1])
        found[name] = inside[~known].float().mean().item()
        parts += [(f"{name}, held out {i + 1}", data.restore(x[i, 0]), known[i, 0],
                   data.restore(bands[:, i, 0])) for i in range(min(3, len(x)))]
    fans(run.path("forecast.png"), parts,
         "The truth, and 50 % and 80 % bands of 39 completions (App. I.2)")
    run.add_metrics(bands_of_80_percent_hold=found | {"series": len(x)})


def fans(path, parts, title):
    """Series, and bands where they are not known, in two rows or three columns.

    parts: (subtitle, truth (L,), known (L,) bool, quantiles (Q, L), Q odd).
    """
    columns = min(3, -(-len(parts) // 2))
    rows = -(-len(parts) // columns)
    sheet, axes = plotting.sheet_of(columns, 13, 2.6 * rows, rows)
    for axis, (subtitle, truth, known, quantiles) in zip(axes, parts, strict=False):
        truth, known, quantiles = map(plotting.to_numpy, (truth, known, quantiles))
        near = ~known  # with the known values beside them, where a band begins
        near[1:] |= ~known[:-1]
        near[:-1] |= ~known[1:]
        where = np.flatnonzero(near)
        for i in range(len(quantiles) // 2):
            axis.fill_between(where, quantiles[i, where], quantiles[-1 - i, where],
                              color="C0", alpha=0.25, lw=0)
        axis.plot(where, quantiles[len(quantiles) // 2, where], "C0", label="median")
        axis.plot(truth, "k", lw=0.8, label="truth")
        axis.axvline(np.flatnonzero(~known)[0], color="0.7", ls=":")
        axis.set_title(subtitle)
    axes[0].legend(frameon=False)
    plotting.save(sheet, path, title)


def check_settings(run, cfg, sde, data):
    """Raise Mistake where cfg asks for something that series or the SDE lack."""
    for name in PICTURES:
        if run.opts.given.get(name):
            raise Mistake(f"{name}: is for pictures, --dataset {cfg.dataset} has none")
    sb.check_settings(run, cfg, sde, data)
    if cfg.predictor == "none" and not cfg.inpaint_corrector:
        raise Mistake("inpaint_corrector 0: must be at least 1 with --predictor none")
    if cfg.forecast >= data.shape[1]:
        raise Mistake(f"forecast {cfg.forecast}: must be below {data.shape[1]}, the "
                      "length of the series")


@command_line
def main(argv=None):
    """Train a network on series, or load one; then draw, complete and measure."""
    cfg, run = open_run("series", Config, PRESETS, SAMPLING, argv)
    data = run.load(load_series, cfg.dataset)
    sde = sb.make_sde(cfg)
    check_settings(run, cfg, sde, data)
    if run.sampling:
        model = run.trained(SeriesNet(cfg.hidden, cfg.layers, fourier=cfg.sde == "ve"))
    else:
        model = train(cfg, run, data)
    data = in_unit_of(model, data)
    if not run.main:
        return  # of several processes only the first one draws

    score = sb.score_fn(model, sde, cfg.std_floor)

    def states(batch):
        xT = sde.prior_sampling((len(batch), *data.shape), run.device)
        return sb.sampling_process(cfg, score, sde, xT)

    samples, timing = run.draw(cfg.n_samples, states, model, cfg.N, batch_size=1000)
    run.add_metrics(sampling=timing | {"sampler": cfg.sampler})
    table = data.restore(samples[:, 0].cpu().double()).numpy()
    with writing(run.path("samples.csv")):
        np.savetxt(run.path("samples.csv"), table, "%.9g", ",")
    plotting.samples(run.path("samples.png"), samples, data, "Drawn from noise")
    sb.figure_denoising(run, sde, states(range(6)))
    sb.figure_loss(run, model, sde, data)
    figure_series(run, data, samples)
    figure_forecast(run, cfg, score, sde, data)
    run.finish()


if __name__ == "__main__":
    main()
