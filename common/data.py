"""Data sets, each held as one tensor: images, or points in the plane.

Images are float32 in [-1, 1] of shape (N, C, H, W), their labels int64.
"""

import contextlib
import difflib
import gzip
import hashlib
import io
import os
import re
import warnings
import zlib
from dataclasses import dataclass, fields, replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .cli import Mistake, say, write_whole
from .device import first_process_first

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "data"
OFFLINE = ("digits", "digits8", "color_digits")
DOWNLOADED = ("mnist", "fashion_mnist", "cifar10")
POINTS = ("swiss_roll", "two_moons", "gaussians")
IMAGE_NAMES = (*OFFLINE, *DOWNLOADED, "folder:PATH")
SERIES_NAMES = ("sines", "membrane", "csv:PATH")
TAKERS = {**dict.fromkeys(IMAGE_NAMES, "ddpm_example.py"),
          **dict.fromkeys(POINTS, "score_based_diffusion_example.py"),
          **dict.fromkeys(SERIES_NAMES, "experiments/series.py")}


@dataclass(eq=False)  # two sets are the same where they are one object
class Data:
    """A dataset in two parts, train and test: (N, C, H, W) images or (N, 2) points.

    train_labels, test_labels: (N,) int64, or None where the data has no classes.
    classes: their names. Distances, neighbours and latent scales refer to the training
    part.
    """

    name: str
    train: torch.Tensor
    test: torch.Tensor
    train_labels: torch.Tensor | None = None
    test_labels: torch.Tensor | None = None
    classes: tuple = ()

    @property
    def shape(self):
        """The shape of one example: (C, H, W) or (2,)."""
        return tuple(self.train.shape[1:])

    @property
    def empty(self):
        """Whether there are no examples, only their shape and the classes' names."""
        return not len(self.train)

    def fingerprint(self):
        """A text that changes with any bit of the training examples and labels."""
        digest = hashlib.sha256()
        for part in (self.train, self.train_labels):
            if part is not None:
                digest.update(part.cpu().contiguous().numpy())
        return digest.hexdigest()

    def facts(self):
        """What a checkpoint keeps of its data, so that another is not taken for it."""
        return {"shape": list(self.shape), "classes": list(self.classes),
                "n": len(self.train), "fingerprint": self.fingerprint()}

    def check(self, facts, same_pictures=True):
        """Raise Mistake where a network of data with these facts was not made for it.

        same_pictures: say so where the training examples are others.
        """
        shape, classes = tuple(facts["shape"]), tuple(facts["classes"])
        if shape != self.shape:
            raise Mistake(f"dataset {self.name}: its examples have the shape "
                          f"{self.shape}, the network was trained on {shape}")
        if classes != self.classes:
            here, then = (", ".join(c[:10]) or "none" for c in (self.classes, classes))
            raise Mistake(f"dataset {self.name}: holds other classes than were "
                          f"trained: {here}; trained: {then}")
        if same_pictures and facts["fingerprint"] != self.fingerprint():
            say(f"dataset {self.name}: its {len(self.train)} training examples are not "
                f"the {facts['n']} that the run began with")

    @staticmethod
    def absent(name, facts):
        """The data of a checkpoint without any example: its shape and its classes."""
        none = torch.zeros(0, *facts["shape"])
        labels = torch.zeros(0, dtype=torch.int64) if facts["classes"] else None
        return Data(name, none, none, labels, labels, tuple(facts["classes"]))

    def to(self, device):
        """The same data on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items()
                                if isinstance(value, torch.Tensor)})


def load_data(name, size=0):
    """load_points or load_images, as the name says."""
    check_name(name, (*IMAGE_NAMES, *POINTS))
    return load_points(name) if name in POINTS else load_images(name, size)


def check_name(name, allowed):
    """Raise Mistake where a name is none of `allowed`, with the nearest that is."""
    head, colon, path = name.partition(":")
    if (f"{head}:PATH" if colon else name) in allowed and (path or not colon):
        return
    known = {each.partition(":")[0]: each for each in TAKERS}
    near = difflib.get_close_matches(head.lower().replace("-", "_"), known, 1)
    hint = f"; the nearest is {known[near[0]]}" if near else ""
    if os.path.isdir(os.path.expanduser(name)):
        hint = f"; that folder is folder:{name}"
    elif near and known[near[0]] not in allowed:
        hint += f", which {TAKERS[known[near[0]]]} takes"
    raise Mistake(f"dataset {name}: must be one of {', '.join(allowed)}{hint}")


def place_of(name):
    """A data set's name; a path in it, as in folder:PATH, is made absolute."""
    head, colon, path = name.partition(":")
    return f"{head}:{os.path.abspath(os.path.expanduser(path))}" if path else name


# Images


def load_images(name, size=0):
    """Image dataset by name (IMAGE_NAMES): a Data of (N, C, H, W), resized if size.

    The bundled names need no network, the others are downloaded where CACHE lacks them.
    folder:PATH is (N, 3, size, size), size 32 if 0, without labels where the pictures
    lie loose, else with one class for each subfolder; what is left out is printed.
    """
    check_name(name, IMAGE_NAMES)
    if name.startswith("folder:"):
        pixels, y, classes, names = read_folder(name[len("folder:"):], size or 32)
        x, (test, train) = to_unit(pixels), _hold_out(names, y)
        labels = (y[train], y[test], classes) if classes else ()
        return Data(name, x[train], x[test], *labels)
    if name in DOWNLOADED:
        with first_process_first():
            data = _downloaded(name)
    else:
        data = _bundled(name)
    if size and size != data.train.shape[-1]:
        data.train, data.test = _fit(data.train, size), _fit(data.test, size)
    return data


def _bundled(name):
    """digits, digits8 or color_digits, with the split that is stored beside them.

    A tenth is held out, as many of each class.
    """
    stored = np.load(Path(__file__).parent / "assets" / "mnist_5k.npz")
    if name == "digits8":
        from sklearn.datasets import load_digits

        raw = load_digits()
        x = torch.from_numpy(raw.images).float()[:, None] / 8 - 1
        y = torch.from_numpy(raw.target).long()
        parts = "train_digits8", "test_digits8"
    else:
        x = to_unit(torch.from_numpy(stored["x"])[:, None])
        y, parts = torch.from_numpy(stored["y"]), ("train", "test")
        x = _colour(x) if name == "color_digits" else x
    train, test = (torch.from_numpy(stored[part].astype(np.int64)) for part in parts)
    return Data(name, x[train], x[test], y[train], y[test], tuple("0123456789"))


def to_unit(pixels):
    """8-bit pixels 0..255 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def is_8bit(x):
    """Whether x: (B, C, H, W) holds 8-bit pixels scaled to [-1, 1], as bits/dim ask."""
    pixels = (x + 1) * 127.5
    return x.ndim == 4 and bool(((pixels - pixels.round()).abs() < 1e-3).all())


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
    """mnist, fashion_mnist or cifar10 by torchvision, which keeps them in CACHE."""
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
            from torchvision import datasets

            raw = getattr(datasets, word[name])(CACHE, train=train, download=True)
            pixels = torch.as_tensor(np.asarray(raw.data))
        except (AssertionError, ImportError, OSError, RuntimeError, ValueError,
                HTTPException) as problem:
            reason = (str(problem).strip() or type(problem).__name__).splitlines()[-1]
            raise Mistake(
                f"dataset {name}: neither whole in {folder} nor downloaded ({reason}); "
                f"put {', '.join(files)} there by hand, or take one that needs no "
                f"network: {', '.join(OFFLINE)}, folder:PATH") from None
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        x.append(to_unit(pixels))
        y.append(torch.as_tensor(raw.targets).long())
    return Data(name, *x, *y, tuple(map(str, raw.classes)))


def _unpack(name, files):
    """Unpack .gz files: torchvision takes only those with the checksums it knows."""
    for file in filter(Path.exists, files):
        unpacked = file.with_suffix("")
        try:
            packed = file.read_bytes()
            size = int.from_bytes(packed[-4:], "little")  # a .gz ends with it
            if not unpacked.exists() or unpacked.stat().st_size != size:
                write_whole(unpacked, gzip.decompress(packed))
        except (OSError, EOFError, zlib.error) as problem:
            raise Mistake(f"dataset {name}: {file} cannot be unpacked ({problem}); "
                          "without it, it is downloaded again") from None


def _hold_out(names, y):
    """Indices of (test, train): about a tenth is held out, by a hash of each name.

    So a picture that is added moves no other one. y: (N,) labels; a class is never held
    out as a whole where another one has two pictures.
    """
    keys = [hashlib.sha256(os.fsencode(name)).hexdigest() for name in names]
    test = torch.tensor([int(key, 16) % 10 == 0 for key in keys])
    for label in y.unique():
        own = y == label
        if test[own].all():
            test[own] = False
    if not test.any():
        several = [i for i in range(len(y)) if (y == y[i]).sum() > 1] or range(len(y))
        test[min(several, key=keys.__getitem__)] = True
    return test.nonzero()[:, 0], (~test).nonzero()[:, 0]


# A person's own pictures


def read_folder(path, size):
    """Pictures of a folder, resized and centre-cropped; subfolders are classes.

    Returns uint8 pixels (N, 3, size, size), labels (N,), the names of the classes, ()
    where the pictures lie loose, and those of the files. A line says what is left out.
    """
    path = Path(os.path.expanduser(path))
    try:
        entries = sorted(path.iterdir())
        files, again = _walk(path)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise Mistake(f"dataset folder:{path}: cannot be read ({reason})") from None
    _report(path, "linked folders left out, read already", again)
    span, pictures, skipped = span_of(files), {}, []
    if span:
        say(f"folder:{path}: pictures of more than 8 bits, their values {span[0]:g} to "
            f"{span[1]:g} become 0 to 255")
    for file in files:
        try:
            pictures[file] = read_picture(file, size, span)
        except Exception:  # Pillow's decoders raise errors of many kinds
            skipped.append(file)
    _report(path, "files skipped, no readable pictures", skipped)
    names = {file: parts[0] if len(parts := file.relative_to(path).parts) > 1 else ""
             for file in pictures}
    classes = tuple(sorted(set(names.values()) - {""}))
    if classes:
        _report(path, "pictures beside the class folders left out",
                [file for file in pictures if not names[file]])
        _report(path, "class folders without pictures left out",
                [entry for entry in entries if entry.is_dir() and _visible(entry.name)
                 and entry.name not in classes])
        pictures = {file: x for file, x in pictures.items() if names[file]}
        if {name.lower() for name in classes} <= {"train", "test", "val", "valid"}:
            say(f"folder:{path}: its classes are {', '.join(classes)}; if the classes "
                f"lie below, name one of these, folder:{path / classes[-1]}")
    if len(pictures) < 2:
        raise Mistake(f"dataset folder:{path}: needs at least 2 pictures that Pillow "
                      f"can open (.png, .jpg, ...), found {len(pictures)}")
    y = torch.tensor([classes.index(names[f]) if classes else 0 for f in pictures])
    files = [file.relative_to(path).as_posix() for file in pictures]
    return torch.stack(list(pictures.values())), y, classes, files


def _walk(path):
    """The visible files below a folder, and linked folders that are read already."""
    files, again, seen = [], [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        folder, real = Path(folder), os.path.realpath(folder)
        if real in seen:
            again.append(folder)
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(filter(_visible, folders))
        files += [folder / name for name in sorted(filter(_visible, names))]
    return files, again


def _visible(name):
    """Whether a file or folder is one that its owner sees."""
    return not name.startswith(".") and name != "__MACOSX"


def _report(path, what, files):
    """Say how many files of a folder are left out, and the first three."""
    if files:
        names = ", ".join(str(file.relative_to(path)) for file in files[:3])
        names = names.encode(errors="replace").decode()  # bytes that are no UTF-8
        more = ", ..." if len(files) > 3 else ""
        say(f"folder:{path}: {what} ({len(files)}): {names}{more}")


def span_of(files):
    """The values (low, high) of pictures of more than 8 bits, None where there is none.

    Whole numbers from 0 on have the range of the bits they need: 0 to 4095, 65535, ...
    """
    from PIL import Image

    found = []
    for file in files:
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("error")  # of a bomb: read_picture leaves it out, too
            with Image.open(file) as picture:
                if picture.mode[0] in "IF":
                    pixels = _numbers(picture)
                    found.append((pixels.min(), pixels.max(), picture.mode[0] == "I"))
    if not found:
        return None
    lows, highs, whole = zip(*found, strict=True)
    low, high = min(lows), max(highs)
    if all(whole) and low >= 0 and high < 2**16:
        return 0, next(2**n - 1 for n in (8, 10, 12, 14, 16) if high < 2**n)
    return low, high


def _numbers(picture):
    return np.nan_to_num(np.asarray(picture, np.float64), posinf=0, neginf=0)


def read_picture(file, size, span=None):
    """A picture file as uint8 (3, size, size); errors as Pillow raises them.

    Turned as its EXIF data says, on white where it is transparent, centre-cropped.
    span: the values of pictures of more than 8 bits, see span_of.
    """
    from PIL import Image, ImageOps

    picture = open_picture(file, span)
    if picture.mode[-1] in "Aa" or "transparency" in picture.info:
        above = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    fitted = ImageOps.fit(picture.convert("RGB"), (size, size), Image.BILINEAR)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def open_picture(file, span=None):
    """A picture as Pillow opens it, upright; grey of more than 8 bits becomes 8."""
    from PIL import Image, ImageOps

    file = os.path.expanduser(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pictures that are read all the same
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
        if picture.mode[0] in "IF":  # convert() would clip them at 255
            low, high = span or span_of([file])
            scaled = (_numbers(picture) - low) / (high - low or 1) * 255
            picture = Image.fromarray(scaled.round().astype(np.uint8))
    return picture


# Points in the plane


def load_points(name, n=20000, seed=0):
    """2-D points by name (POINTS), of about unit variance: halves of (n // 2, 2)."""
    from sklearn import datasets

    check_name(name, POINTS)
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


# Networks that are trained once and kept


def cached(name, key, make, fit):
    """make() with the weights kept under name and key, else fitted and then kept.

    They are looked for in pretrained/, which is shipped, and in data/. fit(module)
    returns False where it was interrupted: its weights are not kept. fit=None: None
    where none are kept. A file that cannot be read is made again; one that cannot be
    written is done without.
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
        packed = io.BytesIO()
        torch.save(module.state_dict(), packed)
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            write_whole(CACHE / file, packed.getvalue())
        except (OSError, Mistake) as problem:
            say(f"not kept for the next run: {problem}")
    return module
