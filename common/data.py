"""Data sets, each held as one tensor: images, points in the plane, series.

Images are float32 in [-1, 1] of shape (N, C, H, W), their labels int64.
"""

import csv
import difflib
import gzip
import hashlib
import os
import re
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F

from .cli import check_memory, fail, say
from .pictures import read_folder

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "data"
OFFLINE = ("digits", "digits8", "color_digits")
DOWNLOADED = ("mnist", "fashion_mnist", "cifar10")
POINTS = ("swiss_roll", "two_moons", "gaussians")
IMAGE_NAMES = (*OFFLINE, *DOWNLOADED, "folder:PATH")
SERIES = ("sines", "membrane")
SERIES_NAMES = (*SERIES, "csv:PATH")


@dataclass(eq=False)  # two sets are the same where they are one object
class Data:
    """A dataset split in two: images, points in the plane or series.

    train, test: (N, C, H, W) images, (N, 2) points or (N, 1, L) series.
    train_labels, test_labels: (N,) int64, or None where the data has no classes.
    classes: their names. offset, unit: of series, see restore.
    Distances, neighbours and latent scales refer to the training part.
    """

    name: str
    train: torch.Tensor
    test: torch.Tensor
    train_labels: torch.Tensor | None = None
    test_labels: torch.Tensor | None = None
    classes: tuple = ()
    offset: float = 0.0
    unit: float = 1.0

    @property
    def shape(self):
        """The shape of one example: (C, H, W), (2,) or (1, L)."""
        return tuple(self.train.shape[1:])

    def fingerprint(self):
        """A text that changes with any bit of the training images and labels."""
        digest = hashlib.sha256()
        for part in (self.train, self.train_labels):
            digest.update(part.cpu().contiguous().numpy())
        return digest.hexdigest()

    def restore(self, x):
        """Series as they were before they were scaled: offset + unit * x."""
        return self.offset + self.unit * x

    def rescale(self, offset, unit):
        """The same series in the unit of a network trained on other numbers."""
        train, test = (x * (self.unit / unit) + (self.offset - offset) / unit
                       for x in (self.train, self.test))
        changed = {"train": train, "test": test, "offset": offset, "unit": unit}
        return Data(**{**vars(self), **changed})

    def to(self, device):
        """The same data on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items()
                 if isinstance(value, torch.Tensor)}
        return Data(**{**vars(self), **moved})


def load_data(name, size=0):
    """load_points, load_series or load_images, as the name says."""
    _check_name(name, (*IMAGE_NAMES, *POINTS, *SERIES_NAMES))
    if name in SERIES or name.startswith("csv:"):
        return load_series(name)
    return load_points(name) if name in POINTS else load_images(name, size)


def load_images(name, size=0):
    """Image dataset by name (IMAGE_NAMES): a Data of (N, C, H, W), resized if size.

    The bundled names need no network, the others are downloaded where CACHE lacks them.
    folder:PATH is (N, 3, size, size), size 32 if 0, without labels where the pictures
    lie loose, else with one class for each subfolder; what is left out is printed.
    A mistake ends the program with one line.
    """
    _check_name(name, IMAGE_NAMES)
    if name.startswith("folder:"):
        return _own(name, *read_folder(name[len("folder:") :], size or 32))
    if name == "digits":
        data = _split(name, *_digits())
    elif name == "digits8":
        from sklearn.datasets import load_digits

        raw = load_digits()
        x = torch.from_numpy(raw.images).float()[:, None] / 8 - 1
        data = _split(name, x, torch.from_numpy(raw.target).long())
    elif name == "color_digits":
        x, y = _digits()
        data = _split(name, _colour(x), y)
    else:
        data = _downloaded(name)
    if size and size != data.train.shape[-1]:
        numbers = (len(data.train) + len(data.test)) * data.shape[0] * size**2
        check_memory("image_size", size, numbers)
        data.train, data.test = _fit(data.train, size), _fit(data.test, size)
    return data


def load_points(name, n=20000, seed=0):
    """2-D points by name (POINTS) of about unit variance: a Data of halves (n // 2, 2).

    Another name ends the program with one line.
    """
    from sklearn import datasets

    _check_name(name, POINTS)
    if name == "swiss_roll":
        x = datasets.make_swiss_roll(n, noise=0.5, random_state=seed)[0][:, [0, 2]]
        x = (x - np.array([2.0, 0.3])) / 7.0
    elif name == "two_moons":
        x = datasets.make_moons(n, noise=0.06, random_state=seed)[0]
        x = (x - np.array([0.5, 0.25])) / 0.75
    else:
        angles = np.arange(8) * np.pi / 4
        centres = 1.4 * np.stack([np.cos(angles), np.sin(angles)], 1)
        x, _ = datasets.make_blobs(n, centers=centres, cluster_std=0.1,
                                   random_state=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    x = torch.from_numpy(x).float()[order]
    return Data(name, x[: n // 2], x[n // 2 :])


def point_density(name, x):
    """The true density of load_points(name) at x: (N, 2) -> (N,).

    Each set is a curve or a few centres under Gaussian noise: a mixture of Gaussians
    along it.
    """
    if name == "swiss_roll":
        u = 1.5 * np.pi * (1 + 2 * (np.arange(4000) + 0.5) / 4000)
        spiral = np.stack([u * np.cos(u), u * np.sin(u)], 1)
        centres = (spiral - np.array([2.0, 0.3])) / 7.0
        std = 0.5 / 7.0
    elif name == "two_moons":
        u = np.linspace(0, np.pi, 2000)
        upper = np.stack([np.cos(u), np.sin(u)], 1)
        lower = np.stack([1 - np.cos(u), 0.5 - np.sin(u)], 1)
        centres = (np.concatenate([upper, lower]) - np.array([0.5, 0.25])) / 0.75
        std = 0.06 / 0.75
    else:
        angles = np.arange(8) * np.pi / 4
        centres = 1.4 * np.stack([np.cos(angles), np.sin(angles)], 1)
        std = 0.1
    gap = torch.cdist(x.cpu().double(), torch.from_numpy(centres)) / std
    log_norm = np.log(len(centres) * 2 * np.pi * std**2)
    log_p = torch.logsumexp(-0.5 * gap**2, dim=1) - log_norm
    return log_p.exp().to(x.dtype).to(x.device)  # MPS has no float64


def load_series(name, n=1250, length=128, seed=0):
    """1-D series (N, 1, L), of mean 0 and std 1 over all numbers of the training part.

    Data.restore gives them back in their own unit. sines: one wave each, under noise
    of 0.1, made here. membrane: windows of a recording that ships with matplotlib, the
    potential of a nerve cell that fires at an even pace; the last fifth is held out.
    csv:PATH: one series a row, a tenth is held out. A mistake ends the program with
    one line.
    """
    _check_name(name, SERIES_NAMES)
    if name == "sines":
        rng = np.random.default_rng(seed)
        angle = 2 * np.pi * rng.uniform(2, 8, (n, 1)) * np.linspace(0, 1, length)
        size, phase = rng.uniform(0.5, 1, (n, 1)), rng.uniform(0, 2 * np.pi, (n, 1))
        x = size * np.sin(angle + phase) + rng.normal(0, 0.1, (n, length))
        held_out, train = np.split(x, [n // 5])
    elif name == "membrane":
        from matplotlib import get_data_path

        file = Path(get_data_path()) / "sample_data" / "membrane.dat"
        try:
            recorded = np.fromfile(file, np.float32).astype(float)
        except OSError as problem:
            fail(f"--dataset {name}: {file} cannot be read ({problem.strerror}), this "
                 "matplotlib comes without its sample data")
        recorded = recorded[1400:7050:4]  # where it fires at an even pace
        end = len(recorded) * 4 // 5
        train, held_out = (np.lib.stride_tricks.sliding_window_view(part, length)
                           for part in (recorded[:end], recorded[end:]))
        order = np.random.default_rng(seed).permutation(len(held_out))
        held_out = held_out[order]  # neighbours are nearly the same
    else:
        x = read_csv(name, Path(os.path.expanduser(name[len("csv:") :])))
        held_out, train = (x[i.numpy()] for i in _hold_out(torch.zeros(len(x))))
    offset, unit = float(train.mean()), float(train.std())
    if unit <= 1e-9 * abs(offset) or unit < 1e-30:
        fail(f"--dataset {name}: all numbers of its training rows are {offset:g}")
    train, test = (torch.from_numpy((x - offset) / unit).float()[:, None]
                   for x in (train, held_out))
    return Data(name, train, test, offset=offset, unit=unit)


def read_csv(name, path):
    """The numbers of a CSV as an array (N, L), N and L >= 2, one series a row.

    With a header or without, quotes, commas or semicolons or tabs. What is not such
    a table ends the program with one line that names the row.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = (line for line in file if line.strip())
            head = re.sub('"[^"]*"', "", next(lines, ""))
            mark = max(",;\t", key=head.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=mark)
            rows = [(reader.line_num, row) for row in reader
                    if any(map(str.strip, row))]
    except (OSError, ValueError, csv.Error) as problem:
        fail(f"--dataset {name}: cannot be read as a CSV "
             f"({getattr(problem, 'strerror', None) or problem})")
    if rows and all(_number(text) is None for text in rows[0][1]):
        del rows[0]  # a header
    for line, row in rows:
        for cell, text in enumerate(row, 1):
            value = _number(text)
            if value is None or not abs(value) < 1e30:  # nor nan
                fail(f"--dataset {name}: row {line}, number {cell} is "
                     f"{text.strip()!r}, must be a finite number")
        if len(row) != len(rows[0][1]):
            fail(f"--dataset {name}: row {line} has {len(row)} numbers, must have "
                 f"{len(rows[0][1])} like the first")
    if len(rows) < 2 or len(rows[0][1]) < 2:
        fail(f"--dataset {name}: holds {len(rows)} series of "
             f"{len(rows[0][1]) if rows else 0} numbers, needs at least 2 rows of 2 "
             "numbers, one series a row")
    return np.array([[_number(text) for text in row] for _, row in rows])


def _number(text):
    """What a text says as a float, None where it is no number."""
    try:
        return float(text)
    except ValueError:
        return None


def _check_name(name, allowed):
    """End the program where a name is none of `allowed`, with the nearest that is."""
    head, colon, path = name.partition(":")
    if (f"{head}:PATH" if colon else name) in allowed:
        if colon and not path:
            fail(f"--dataset {name}: needs a path behind the colon, {head}:PATH")
        return
    known = {each.partition(":")[0]: each
             for each in (*IMAGE_NAMES, *POINTS, *SERIES_NAMES)}
    near = difflib.get_close_matches(head.lower().replace("-", "_"), known, 1)
    hint = f"; the nearest is {known[near[0]]}" if near else ""
    if os.path.isdir(os.path.expanduser(name)):
        hint = f"; that folder is folder:{name}"
    elif near and known[near[0]] not in allowed:
        kinds = {"points in the plane": POINTS, "series": SERIES_NAMES}
        kind = [kind for kind, names in kinds.items() if known[near[0]] in names]
        hint += (f", {kind[0]}, which score_based_diffusion_example.py takes" if kind
                 else ", which is not read here")
    fail(f"--dataset {name}: must be one of {', '.join(allowed)}{hint}")


def _digits():
    """The bundled 5,000 MNIST digits: (5000, 1, 28, 28) in [-1, 1] and their labels."""
    stored = np.load(Path(__file__).parent / "assets" / "mnist_5k.npz")
    pixels, labels = torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"])
    return to_unit(pixels[:, None]), labels


def to_unit(pixels):
    """8-bit pixels 0..255 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def _split(name, x, y):
    """The stratified split, fixed for every script and metric: a tenth is held out."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        np.arange(len(x)), test_size=len(x) // 10, stratify=y, random_state=0)
    classes = tuple(str(c) for c in range(int(y.max()) + 1))
    return Data(name, x[train], x[test], y[train], y[test], classes)


def _colour(x):
    """Digits, each in one random colour on a dark random ground.

    x: (N, 1, 28, 28) -> (N, 3, 32, 32), both in [-1, 1].
    """
    generator = torch.Generator().manual_seed(0)
    ink = 0.55 + 0.45 * torch.rand(len(x), 3, 1, 1, generator=generator)
    bright = torch.rand(len(x), 3, 1, 1, generator=generator) > 0.35
    ink = ink * bright.float().clamp(min=0.15)
    ground = 0.25 * torch.rand(len(x), 3, 1, 1, generator=generator)
    mask = F.pad(x, (2, 2, 2, 2), value=-1.0) / 2 + 0.5
    return 2 * (mask * ink + (1 - mask) * ground) - 1


def _fit(x, size):
    """Square images to size x size, edge-padded where they grow by a little."""
    gap = size - x.shape[-1]
    if 0 < gap <= x.shape[-1] // 4:
        before, after = gap // 2, gap - gap // 2
        return F.pad(x, (before, after, before, after), mode="replicate")
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)


def _downloaded(name):
    from torchvision import datasets

    word = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
    folder, files = CACHE, ["cifar-10-python.tar.gz"]
    if name != "cifar10":
        folder = CACHE / word[name] / "raw"
        files = [f"{part}-{what}-ubyte.gz" for part in ("train", "t10k")
                 for what in ("images-idx3", "labels-idx1")]
        _unpack(name, [folder / file for file in files])
    x, y = [], []
    for train in (True, False):
        try:
            raw = getattr(datasets, word[name])(CACHE, train=train, download=True)
            pixels = torch.as_tensor(np.asarray(raw.data))
        except (AssertionError, OSError, RuntimeError, ValueError,
                HTTPException) as problem:
            if getattr(problem, "filename", 0) and not isinstance(problem, URLError):
                fail(f"--dataset {name}: {folder} cannot be read and written "
                     f"({problem.strerror})")
            reason = (str(problem).strip() or type(problem).__name__).splitlines()[-1]
            fail(f"--dataset {name}: neither whole in {folder} nor downloaded "
                 f"({reason}); put {', '.join(files)} there by hand, or take one that "
                 f"needs no network: {', '.join(OFFLINE)}, folder:PATH")
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        x.append(to_unit(pixels))
        y.append(torch.as_tensor(raw.targets).long())
    return Data(name, *x, *y, tuple(map(str, raw.classes)))


def _unpack(name, files):
    """Unpack .gz files: torchvision takes only those with the checksums it knows."""
    for file in filter(Path.exists, files):
        unpacked = file.with_suffix("")
        scratch = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            packed = file.read_bytes()
            size = int.from_bytes(packed[-4:], "little")  # a .gz ends with it
            if not unpacked.exists() or unpacked.stat().st_size != size:
                scratch.write_bytes(gzip.decompress(packed))
                os.replace(scratch, unpacked)
        except (OSError, EOFError, zlib.error) as problem:
            fail(f"--dataset {name}: {file} cannot be unpacked ({problem}); "
                 "without it, it is downloaded again")


def _own(name, pixels, y, classes):
    """A person's pictures as Data, without labels where there are no classes."""
    x, (test, train) = to_unit(pixels), _hold_out(y)
    labels = (y[train], y[test], classes) if classes else ()
    return Data(name, x[train], x[test], *labels)


def _hold_out(y):
    """Indices of (test, train) for labels y (N,): a tenth of each class, 1 at least.

    The last picture of a class is held out only where no class has two.
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    share = torch.empty(len(y))
    for label in y.unique():
        own = order[y[order] == label]
        share[own] = torch.arange(1, len(own) + 1) / len(own)
    order = order[share[order].argsort(stable=True)]
    return order.tensor_split([max(1, len(y) // 10)])


# What is kept between runs


def cached(name, key, make, fit):
    """make() with the weights kept under name and key, else fitted and then kept.

    They are looked for in pretrained/, which is shipped, and in data/.
    fit(module) returns False where it was interrupted: its weights are not kept.
    With fit=None they are never made: None where there are none.
    A file that cannot be read is made again; one that cannot be written is forgone.
    """
    digest = hashlib.sha256(repr((name, key)).encode()).hexdigest()[:10]
    # A name may be a long path: a part of it for the reader, the digest is the name.
    file = f"{re.sub(r'[^a-zA-Z0-9]+', '_', name)[:40]}_{digest}.pt"
    for folder in (ROOT / "pretrained", CACHE):
        try:
            kept = torch.load(folder / file, map_location="cpu", weights_only=True)
            module = make()
            module.load_state_dict(kept)
            return module
        except Exception:  # absent, cut short or foreign: it is only a cache
            pass
    if fit is None:
        return None
    module = make()
    if fit(module) is not False:
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            scratch = CACHE / f"{file}.{os.getpid()}.tmp"
            with open(scratch, "wb") as stream:  # of a path, torch would keep the name
                torch.save(module.state_dict(), stream)
            os.replace(scratch, CACHE / file)
        except (OSError, RuntimeError) as problem:  # the latter is torch's
            reason = getattr(problem, "strerror", None) or "cannot be written"
            say(f"not kept for the next run: {CACHE / file} ({reason})")
    return module
