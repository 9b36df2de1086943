"""Data sets, each held as one tensor: images, points in the plane, series.

Images are float32 in [-1, 1] of shape (N, C, H, W), their labels int64.
"""

import hashlib
import os
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import functional as TF

from .cli import fail

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "data"
OFFLINE = ("digits", "digits8", "color_digits")
DOWNLOADED = ("mnist", "fashion_mnist", "cifar10")
POINTS = ("swiss_roll", "two_moons", "gaussians")
IMAGE_NAMES = (*OFFLINE, *DOWNLOADED, "folder:PATH")
SERIES_NAMES = ("sines", "csv:PATH")


@dataclass(eq=False)  # two sets are the same where they are one object
class Data:
    """A dataset split in two: images, points in the plane or series.

    train, test: (N, C, H, W) images, (N, 2) points or (N, 1, L) series.
    train_labels, test_labels: (N,) int64, or None where the data has no classes.
    classes: their names.
    Distances, neighbours and latent scales refer to the training part.
    """

    name: str
    train: torch.Tensor
    test: torch.Tensor
    train_labels: torch.Tensor | None = None
    test_labels: torch.Tensor | None = None
    classes: tuple = ()

    @property
    def shape(self):
        """The shape of one example: (C, H, W), (2,) or (1, L)."""
        return tuple(self.train.shape[1:])

    def to(self, device):
        """The same data on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items()
                 if isinstance(value, torch.Tensor)}
        return Data(**{**vars(self), **moved})


def load_data(name, size=0):
    """Points or images, as the name says."""
    return load_points(name) if name in POINTS else load_images(name, size)


def load_images(name, size=0):
    """Image dataset by name (IMAGE_NAMES), resized to size x size where size is not 0.

    folder:PATH needs no labels: a flat folder of pictures or one folder a class.
    Nothing is downloaded for the bundled names.
    A mistake ends the program with one line.
    """
    if name.startswith("folder:"):
        return _folder(Path(name[len("folder:") :]).expanduser(), size or 32)
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
    elif name in DOWNLOADED:
        data = _downloaded(name)
    else:
        fail(f"--dataset {name}: must be one of {', '.join(IMAGE_NAMES)}")
    if size and size != data.train.shape[-1]:
        data.train, data.test = _fit(data.train, size), _fit(data.test, size)
    return data


def load_points(name, n=20000, seed=0):
    """2-D points (n, 2) from scikit-learn of about unit variance; half are held out."""
    from sklearn import datasets

    if name == "swiss_roll":
        x = datasets.make_swiss_roll(n, noise=0.5, random_state=seed)[0][:, [0, 2]]
        x = (x - np.array([2.0, 0.3])) / 7.0
    elif name == "two_moons":
        x = datasets.make_moons(n, noise=0.06, random_state=seed)[0]
        x = (x - np.array([0.5, 0.25])) / 0.75
    elif name == "gaussians":
        angles = np.arange(8) * np.pi / 4
        centres = 1.4 * np.stack([np.cos(angles), np.sin(angles)], 1)
        x, _ = datasets.make_blobs(n, centers=centres, cluster_std=0.1,
                                   random_state=seed)
    else:
        fail(f"--dataset {name}: must be one of {', '.join(POINTS)}")
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
    return log_p.exp().to(x)


def load_series(name, n=5000, length=64, seed=0):
    """1-D series (N, 1, L) in [-1, 1]: made sines, or csv:PATH, one series a row."""
    if name == "sines":
        rng = np.random.default_rng(seed)
        grid = np.linspace(0, 1, length)
        frequency, phase = rng.uniform(1, 4, (n, 1)), rng.uniform(0, 2 * np.pi, (n, 1))
        x = np.sin(2 * np.pi * frequency * grid + phase) * rng.uniform(0.4, 1.0, (n, 1))
    elif name.startswith("csv:"):
        try:
            x = np.loadtxt(name[len("csv:") :], delimiter=",", ndmin=2)
        except (OSError, ValueError) as problem:
            fail(f"--dataset {name}: not a readable CSV of numbers, one series a row "
                 f"({problem})")
        if len(x) < 2 or not np.isfinite(x).all():
            fail(f"--dataset {name}: needs at least 2 rows of finite numbers")
        low, high = x.min(), x.max()
        x = 2 * (x - low) / (high - low if high > low else 1) - 1
    else:
        fail(f"--dataset {name}: must be one of {', '.join(SERIES_NAMES)}")
    x = torch.from_numpy(x).float()[:, None]
    held_out = max(1, len(x) // 10)
    return Data(name, x[held_out:], x[:held_out])


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

    kind = {"mnist": datasets.MNIST,
            "fashion_mnist": datasets.FashionMNIST,
            "cifar10": datasets.CIFAR10}[name]
    parts = []
    for train in (True, False):
        try:
            raw = kind(CACHE, train=train, download=True)
        except (OSError, RuntimeError, urllib.error.URLError):
            fail(f"--dataset {name}: could not be downloaded to {CACHE} (no network?); "
                 f"these need none: {', '.join(OFFLINE)}, folder:PATH")
        pixels = torch.as_tensor(np.asarray(raw.data))
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        parts.append((to_unit(pixels), torch.as_tensor(raw.targets).long()))
    (train, train_labels), (test, test_labels) = parts
    classes = tuple(map(str, raw.classes))
    return Data(name, train, test, train_labels, test_labels, classes)


def _folder(path, size):
    """A person's own pictures, resized and centre-cropped; subfolders are classes."""
    from PIL import Image, UnidentifiedImageError
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    try:
        flat = sorted(p for p in path.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
        nested = any(p.is_dir() for p in path.iterdir())
    except OSError as problem:
        fail(f"--dataset folder:{path}: cannot be read ({problem.strerror})")
    files, classes = [(str(p), 0) for p in flat], ()
    if not flat and nested:
        try:
            found = ImageFolder(path, allow_empty=True)
        except (OSError, FileNotFoundError) as problem:
            fail(f"--dataset folder:{path}: cannot be read ({problem})")
        files, classes = found.samples, tuple(found.classes)
    images, labels, broken = [], [], []
    for file, label in files:
        try:
            with Image.open(file) as picture:
                resized = TF.resize(picture.convert("RGB"), size, antialias=True)
                images.append(TF.pil_to_tensor(TF.center_crop(resized, size)))
                labels.append(label)
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError):
            broken.append(file)
    if broken:
        names = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
        print(f"skipped {len(broken)} broken picture(s): {names}")
    if len(images) < 2:
        fail(f"--dataset folder:{path}: needs at least 2 readable pictures "
             f"({', '.join(IMG_EXTENSIONS)}), found {len(images)}")
    x, y = to_unit(torch.stack(images)), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out = max(1, len(x) // 10)
    test, train = order[:held_out], order[held_out:]
    if not classes:
        return Data(f"folder:{path}", x[train], x[test])
    return Data(f"folder:{path}", x[train], x[test], y[train], y[test], classes)


# What is kept between runs


def cached(name, key, make, fit):
    """make() with weights from data/<name>_<digest of key>.pt, else fitted and kept.

    fit(module) returns False where it was interrupted: its weights are not kept.
    A file that cannot be read is made again; one that cannot be written is forgone.
    """
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:10]
    file = CACHE / f"{name.replace(':', '_').replace('/', '_')}_{digest}.pt"
    try:
        module = make()
        module.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        return module
    except Exception:  # absent, cut short or foreign: it is only a cache
        module = make()
    if fit(module) is not False:
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(f".{os.getpid()}.tmp")
            torch.save(module.state_dict(), scratch)
            os.replace(scratch, file)
        except OSError as problem:
            print(f"not kept for the next run: {file} ({problem.strerror})")
    return module
