"""A person's own pictures: whatever Pillow opens, as it is seen on a white page."""

import os
import warnings
from pathlib import Path

import numpy as np
import torch

from .cli import check_memory, fail, say


def read_folder(path, size):
    """Pictures of a folder, resized and centre-cropped; subfolders are classes.

    Returns uint8 pixels (N, 3, size, size), labels (N,) and the names of the classes,
    none where the pictures lie loose. What is left out is told. Fewer than two
    pictures, or a folder that cannot be read, end the program with one line.
    """
    from PIL import Image

    path = Path(os.path.expanduser(path))
    try:
        top = sorted(entry for entry in path.iterdir() if _shown(entry.name))
        files = [(entry, "") for entry in top if entry.is_file()]
        folders = [entry for entry in top if entry.is_dir()]
        files += [(file, folder.name) for folder in folders
                  for file in sorted(folder.rglob("*")) if file.is_file()
                  and all(map(_shown, file.relative_to(folder).parts))]
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        fail(f"--dataset folder:{path}: cannot be read ({reason})")
    check_memory("image_size", size, len(files) * 3 * size**2)
    found, skipped = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pictures that are read all the same
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for file, name in files:
            try:
                found.append((_picture(file, size), name, file))
            except Exception:  # Pillow's decoders let out errors of many kinds
                skipped.append(file)
    _tell(path, "files skipped, no readable pictures", skipped)
    classes = tuple(sorted({name for _, name, _ in found} - {""}))
    if classes:
        _tell(path, "pictures beside the class folders left out",
              [file for _, name, file in found if not name])
        _tell(path, "class folders without pictures left out",
              [folder for folder in folders if folder.name not in classes])
        found = [each for each in found if each[1]]
    if len(found) < 2:
        fail(f"--dataset folder:{path}: needs at least 2 readable pictures (.png, .jpg "
             f"or whatever else Pillow opens), found {len(found)}")
    labels = torch.tensor([classes.index(name) if name else 0 for _, name, _ in found])
    return torch.stack([pixels for pixels, _, _ in found]), labels, classes


def _shown(name):
    """Whether a file or folder is one that its owner sees."""
    return not name.startswith(".") and name != "__MACOSX"


def _tell(path, what, files):
    """Say how many files of a folder are left out, and the first three."""
    if files:
        names = ", ".join(str(file.relative_to(path)) for file in files[:3])
        names = names.encode(errors="replace").decode()  # bytes that are no UTF-8
        more = ", ..." if len(files) > 3 else ""
        say(f"folder:{path}: {what} ({len(files)}): {names}{more}")


def read_question(image, mask, shape):
    """A person's picture, (1, C, H, W) in [-1, 1], and what of it is known, or Nones.

    image, mask: files, "" for none; shape: (C, H, W), to which both are resized and
    cropped. The mask, (1, 1, H, W) bool, is as large as the picture, or as H and W, and
    known where it is white. A mistake ends the program with one line.
    """
    from PIL import Image, ImageOps

    C, H, W = shape
    x = known = None
    size = W, H
    if image:
        try:
            with Image.open(os.path.expanduser(image)) as opened:
                size = ImageOps.exif_transpose(opened).size
            pixels = _picture(os.path.expanduser(image), W)
        except Exception as problem:  # Pillow's decoders let out errors of many kinds
            fail(f"--image {image}: cannot be read as a picture ({_reason(problem)})")
        x = pixels[None].float() / 127.5 - 1
        x = x if C == 3 else x.mean(1, keepdim=True)
    if mask:
        try:
            with Image.open(os.path.expanduser(mask)) as opened:
                white = _eight_bit(ImageOps.exif_transpose(opened)).convert("L")
        except Exception as problem:
            fail(f"--mask {mask}: cannot be read as a picture ({_reason(problem)})")
        if white.size != size:
            fail(f"--mask {mask}: is {white.width} x {white.height} pixels, must be "
                 f"{size[0]} x {size[1]} like the picture")
        white = ImageOps.fit(white, (W, H), Image.NEAREST)
        known = torch.from_numpy(np.array(white) >= 128)[None, None]
        if known.all():
            fail(f"--mask {mask}: is white all over, at {W} x {H} pixels: all is known "
                 "and nothing is left to complete; it must be black somewhere")
        if not known.any():
            fail(f"--mask {mask}: is black all over, at {W} x {H} pixels: nothing is "
                 "known; it must be white somewhere (samples.png shows such pictures)")
    return x, known


def make_masks(H, W):
    """{name: (1, 1, H, W) bool}: where a picture is known that is to be completed."""
    row, column = torch.arange(H).view(1, 1, H, 1), torch.arange(W).view(1, 1, 1, W)
    box = ((row - H / 2 + 0.5).abs() < H / 4) & ((column - W / 2 + 0.5).abs() < W / 4)
    half = (column < W / 2).expand(1, 1, H, W)
    some = torch.rand(1, 1, H, W) < 0.3
    return {"box": ~box, "half": half, "pixels": some, "border": box}


def _reason(problem):
    """Why a file could not be read, on one line."""
    return getattr(problem, "strerror", None) or str(problem).split("\n")[0]


def _picture(file, size):
    """A picture file as uint8 (3, size, size); errors as Pillow raises them."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        picture = ImageOps.exif_transpose(opened)
    picture = _eight_bit(picture)
    if picture.mode[-1] in "Aa" or "transparency" in picture.info:
        above = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    fitted = ImageOps.fit(picture.convert("RGB"), (size, size), Image.BILINEAR)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def _eight_bit(picture):
    """A Pillow picture, grey of 8 bits where it was grey of more."""
    from PIL import Image

    if picture.mode[0] in "IF":  # convert() would clip them at 255
        pixels = np.nan_to_num(np.asarray(picture, np.float64), posinf=0, neginf=0)
        low, high = 0, 65535
        if picture.mode == "F" or pixels.min() < low or pixels.max() > high:
            low, high = pixels.min(), pixels.max()
        scaled = (pixels - low) / (high - low or 1) * 255
        picture = Image.fromarray(scaled.round().astype(np.uint8))
    return picture
