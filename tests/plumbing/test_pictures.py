"""A person's own pictures: what each is read as, folders as classes, what is left out and said."""

import struct
import sys
import warnings
import zlib

from common import data

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import refused

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(colour, *paths, size=(8, 8)):
    """A picture of one colour at each path, the folders made."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, colour).save(path)


def load(folder, size=1):
    return data.load_images(f"folder:{folder}", size)


def reds(part):
    """The red of each picture of one colour, 0 to 255."""
    return part[:, 0, 0, 0].add(1).mul(127.5).round().int().tolist()


def read(tmp_path, picture, size, name="a.png", **options):
    """The 8-bit pixels (size, size, 3) of a picture that was saved; no warning is seen."""
    picture.save(tmp_path / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return data.read_picture(tmp_path / name, size).permute(1, 2, 0).numpy().astype(int)


def notices(capsys):
    captured = capsys.readouterr()
    assert not captured.err
    return captured.out.splitlines()


# One picture


@pytest.mark.parametrize("turned, quarters", [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_rotation_is_applied(tmp_path, turned, quarters):
    stored, exif = np.zeros((8, 8, 3), np.uint8), Image.Exif()
    stored[:4], stored[:, :2] = GREEN, RED  # green above, red on the left
    exif[0x0112] = turned
    assert np.array_equal(read(tmp_path, Image.fromarray(stored), 8, exif=exif), np.rot90(stored, quarters))


@pytest.mark.parametrize("mode, colour, shown, options", [
    ("RGBA", (255, 0, 0, 0), (255, 255, 255), {}), ("RGBA", (255, 0, 0, 128), (255, 127, 127), {}),
    ("LA", (0, 0), (255, 255, 255), {}), ("P", 0, (255, 255, 255), {"transparency": 0}),
    ("L", 0, (255, 255, 255), {"transparency": 0}), ("CMYK", (0, 0, 0, 0), (255, 255, 255), {"name": "a.tiff"}),
    ("CMYK", (0, 255, 255, 0), RED, {"name": "a.tiff"}),
    ("RGB", RED, RED, {"name": "a.gif", "save_all": True, "append_images": [Image.new("RGB", (8, 8), BLUE)]})])
def test_transparent_is_white_any_mode_becomes_rgb_and_a_film_is_its_first_frame(tmp_path, mode, colour, shown, options):
    found = read(tmp_path, Image.new(mode, (8, 8), colour), 4, **options)
    assert abs(found - shown).max() <= 1


@pytest.mark.parametrize("values, suffix, shades", [
    (np.uint16([10, 100, 200, 250]) * 257, "png", [10, 100, 200, 250]),
    ((np.uint16([10, 100, 200, 250]) * 257).astype(">u2"), "tiff", [10, 100, 200, 250]),
    (np.int32([10, 100, 200, 250]) * 257, "tiff", [10, 100, 200, 250]),
    (np.float32([0.1, 0.2, 0.3, 0.6]), "tiff", [0, 51, 102, 255]),
    (np.int32([-10, 0, 10, 40]), "tiff", [0, 51, 102, 255]),
    (np.int32([50_000, 60_000, 70_000, 100_000]), "tiff", [0, 51, 102, 255]),
    (np.float32([0.5] * 4), "tiff", [0] * 4), (np.float32([1, np.nan, 1, 1]), "tiff", [255, 0, 255, 255]),
    (np.float32([np.inf, 1, -np.inf, 1]), "tiff", [0, 255, 0, 255])])
def test_numbers_of_more_than_8_bits_keep_their_shades(tmp_path, values, suffix, shades):
    """16 bits are scaled by their range, wider numbers by the values that occur; nothing is clipped at 255."""
    grey = Image.fromarray(np.repeat(values, 4).reshape(4, 4))
    assert read(tmp_path, grey, 4, f"a.{suffix}")[:, 0, 0].tolist() == shades


@pytest.mark.parametrize("top, shade", [(4095, 4095), (1023, 1023), (60000, 65535), (200, 255)])
def test_pictures_of_more_than_8_bits_have_one_range_a_folder(tmp_path, capsys, top, shade):
    for name, value in (("a", top), ("b", top // 5), ("c", 0)):
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / f"{name}.png")
    found = load(tmp_path)
    wanted = np.array([0, top // 5, top]) / shade * 255
    assert np.allclose(sorted(reds(found.train) + reds(found.test)), wanted, atol=1)
    assert f"their values 0 to {shade:g} become 0 to 255" in notices(capsys)[0]


def test_the_middle_square_is_what_is_read_and_shrinks_without_aliasing(tmp_path):
    bands = np.repeat(np.uint8([RED, GREEN, BLUE]), 12, axis=0)[None].repeat(12, 0)  # (12, 36, 3)
    for picture in (bands, bands.transpose(1, 0, 2)):  # three squares in a row, or one below the other
        assert (read(tmp_path, Image.fromarray(picture), 12) == GREEN).all()
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, 32:96:2] = 255  # of one pixel, in the middle square
    assert abs(read(tmp_path, Image.fromarray(stripes), 8)[:, 1:-1] - 128).max() < 16
    for shape in ((1, 5000), (5000, 1), (1, 1)):
        assert (read(tmp_path, Image.new("RGB", shape, RED), 3) == RED).all()


# Files that are read, and files that are left out


def test_every_format_of_pillow_is_read(tmp_path, capsys):
    for suffix in ("png", "jpg", "jpeg", "bmp", "gif", "webp", "tif", "ppm", "tga", "pcx", "ico"):
        save(RED, tmp_path / f"a.{suffix.upper()}", size=(16, 16))
    (tmp_path / "notes").mkdir()  # no class, since it has no pictures
    found = load(tmp_path, 4)
    assert len(found.train) + len(found.test) == 11 and not notices(capsys)
    assert found.shape == (3, 4, 4) and found.train_labels is None and found.classes == ()


def huge(side):
    """A small PNG file whose header says that it is side x side."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))  # one bit
    rows = zlib.compress(bytes((1 + 10_000 // 8) * 10_000), 1)
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_what_is_skipped_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    save(RED, *(tmp_path / name for name in ("x.png", "y.png", "memory.png", "syntax.png")))
    whole, true = (tmp_path / "x.png").read_bytes(), Image.open
    for name, content in {
            "a_bomb.png": huge(20_000), "a_warning.png": huge(10_000), "b_cut.png": whole[: len(whole) // 2],
            "b.csv": b"no picture", ".DS_Store": b"no picture", "._x.png": b"no picture"}.items():
        (tmp_path / name).write_bytes(content)

    def opened(file, *args):  # decoders raise errors of any kind
        for name, problem in (("memory.png", MemoryError), ("syntax.png", SyntaxError)):
            if str(file).endswith(name):
                raise problem("broken")
        return true(file, *args)

    monkeypatch.setattr(Image, "open", opened)
    found = load(tmp_path)
    assert len(found.train) == len(found.test) == 1
    said, = notices(capsys)
    assert "files skipped, no readable pictures (6): a_bomb.png, a_warning.png, b.csv, ..." in said


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="macOS and Windows take only names that are Unicode")
def test_a_name_that_is_no_utf8_is_told(tmp_path, capsys):
    save(RED, tmp_path / "x.png", tmp_path / "y.png")
    with open(bytes(tmp_path) + b"/caf\xe9.txt", "w") as file:
        file.write("no picture")
    load(tmp_path)
    assert "caf?.txt" in notices(capsys)[0]


@pytest.mark.parametrize("path, words", [
    ("x" * 300, "too long"), ("a\0b", "null"), ("nowhere", "No such"), ("file.png", "Not a directory"),
    ("~nobody_of_that_name/pictures", "No such"), ("empty", "found 0"), ("one", "found 1")])
def test_paths_without_pictures(tmp_path, path, words):
    (tmp_path / "file.png").write_text("x")
    (tmp_path / "empty").mkdir()
    save(RED, tmp_path / "one" / "cats" / "a.png")
    said = refused(data.load_images, f"folder:{path if path[0] == '~' else tmp_path / path}")
    assert "dataset folder:" in said and words in said


# Classes


def test_subfolders_are_classes_and_what_has_no_class_is_told(tmp_path, capsys):
    save(RED, *(tmp_path / "cats" / f"{i}.png" for i in range(3)), tmp_path / "loose.png",
         *(tmp_path / name / "a.png" for name in (".git", "__MACOSX", ".ipynb_checkpoints", "cats/.thumbs")))
    save(BLUE, tmp_path / "emus" / "big" / "old" / "a.png", tmp_path / "emus" / "small" / "a.png")
    for name in ("ants", "dogs"):
        (tmp_path / name).mkdir()
    (tmp_path / "ants" / "1.png").write_text("broken")
    found = load(tmp_path)
    x, y = torch.cat([found.train, found.test]), torch.cat([found.train_labels, found.test_labels])
    assert found.classes == ("cats", "emus") and torch.bincount(y).tolist() == [3, 2] and y.dtype == torch.int64
    assert torch.equal(x[:, 2, 0, 0] > 0, y == 1)  # the blue ones are emus
    said = notices(capsys)
    assert len(said) == 3 and "1.png" in said[0]
    assert "pictures beside the class folders left out (1)" in said[1] and "loose.png" in said[1]
    assert "class folders without pictures left out (2)" in said[2] and "ants, dogs" in said[2]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows makes links for administrators only")
def test_links_are_followed_once_and_what_they_repeat_is_named(tmp_path, capsys):
    save(RED, *(tmp_path / name / f"{i}.png" for name in ("cats", "far") for i in range(3)))
    (tmp_path / "cats" / "more").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "cats" / "loop").symlink_to(tmp_path / "cats")
    (tmp_path / "cats" / "lost.png").symlink_to(tmp_path / "gone.png")
    found = load(tmp_path / "cats")
    assert len(found.train) + len(found.test) == 3 and found.classes == ("more",)  # those beside it have no class
    said = "\n".join(notices(capsys))
    assert "read already (1): loop" in said and "no readable pictures (1): lost.png" in said


def test_classes_called_train_and_test_are_said(tmp_path, capsys):
    save(RED, *(tmp_path / part / name / "a.png" for part in ("train", "test") for name in ("cats", "dogs")))
    assert load(tmp_path).classes == ("test", "train")
    assert f"name one of these, folder:{tmp_path / 'train'}" in notices(capsys)[0]


# What is held out


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (1, 1), (1, 1, 30), (10, 10, 10), (2, *[1] * 15)])
def test_each_class_keeps_a_training_picture(tmp_path, sizes):
    for label, count in enumerate(sizes):
        save(RED, *(tmp_path / f"class {label}" / f"{i}.png" for i in range(count)))
    found = load(tmp_path)
    kept, held_out = (torch.bincount(y, minlength=len(sizes)) for y in (found.train_labels, found.test_labels))
    assert kept.min() >= 1 or sizes == (1, 1)
    assert 1 <= held_out.sum() <= max(1, sum(sizes) // 4) and (kept + held_out).tolist() == list(sizes)
    assert torch.equal(found.train_labels, load(tmp_path).train_labels)


def test_a_picture_that_is_added_moves_no_other_one(tmp_path):
    def held_out():
        found = load(tmp_path)
        train, test = set(reds(found.train)), set(reds(found.test))
        assert not train & test and len(train | test) == len(found.train) + len(found.test)
        return test

    for i in range(60):
        save((2 * i, 0, 0), tmp_path / f"{i:03}.png")
    before = held_out()
    assert 3 <= len(before) <= 12 and before != set(range(0, 2 * len(before), 2))
    for i in range(60, 80):
        save((2 * i, 0, 0), tmp_path / f"a{i:03}.png")
    (tmp_path / "030.png").unlink()
    assert held_out() & set(range(0, 120, 2)) == before - {60}
