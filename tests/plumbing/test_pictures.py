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


def save(picture, *paths):
    """The same picture at each path, its folders made."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def plain(value, size=(8, 8), mode="RGB"):
    return Image.new(mode, size, value)


def load(folder, size=4):
    return data.load_images(f"folder:{folder}", size)


def pixels(folder, size=4):
    """The 8-bit pixels (N, 3, size, size) of a folder of one kind of picture."""
    found = load(folder, size)
    return torch.cat([found.test, found.train]).add(1).mul(127.5).round().int()


def notices(capsys):
    captured = capsys.readouterr()
    assert not captured.err
    return captured.out.splitlines()


# One picture


def test_exif_rotation_is_applied(tmp_path):
    stored = np.zeros((8, 8, 3), np.uint8)
    stored[:4], stored[:, :2] = GREEN, RED  # green above, red on the left
    for turned in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = turned
        Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
        found = data.read_picture(tmp_path / "a.png", 8).permute(1, 2, 0).numpy()
        assert np.array_equal(found, np.rot90(stored, {1: 0, 3: 2, 6: -1, 8: 1}[turned])), turned


@pytest.mark.parametrize("mode, colour, shown", [
    ("RGBA", (255, 0, 0, 0), (255, 255, 255)), ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
    ("LA", (0, 0), (255, 255, 255)), ("P", 0, (255, 255, 255)), ("L", 0, (255, 255, 255)),
    ("CMYK", (0, 0, 0, 0), (255, 255, 255)), ("CMYK", (0, 255, 255, 0), RED)])
def test_transparent_is_white_and_any_mode_becomes_rgb(tmp_path, mode, colour, shown):
    picture = plain(colour, mode=mode)
    if mode == "P":
        picture.putpalette([10, 20, 30] * 256)
    file = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    picture.save(file, **({"transparency": 0} if mode in "PL" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = data.read_picture(file, 4)
    assert (found.flatten(1).int() - torch.tensor(shown)[:, None]).abs().max() <= 1


def test_the_first_frame_of_a_film_is_read(tmp_path):
    plain(RED).save(tmp_path / "a.gif", save_all=True, append_images=[plain(BLUE)])
    assert data.read_picture(tmp_path / "a.gif", 4)[:, 0, 0].tolist() == list(RED)


@pytest.mark.parametrize("values, suffix, shades", [
    (np.uint16([10, 100, 200, 250]) * 257, "png", [10, 100, 200, 250]),
    ((np.uint16([10, 100, 200, 250]) * 257).astype(">u2"), "tiff", [10, 100, 200, 250]),
    (np.int32([10, 100, 200, 250]) * 257, "tiff", [10, 100, 200, 250]),
    (np.float32([0.1, 0.2, 0.3, 0.6]), "tiff", [0, 51, 102, 255]),
    (np.int32([-10, 0, 10, 40]), "tiff", [0, 51, 102, 255]),
    (np.int32([50_000, 60_000, 70_000, 100_000]), "tiff", [0, 51, 102, 255]),
    (np.float32([0.5] * 4), "tiff", [0] * 4), (np.float32([np.nan] * 4), "tiff", [0] * 4),
    (np.float32([1, np.nan, 1, 1]), "tiff", [255, 0, 255, 255]),
    (np.float32([np.inf, 1, -np.inf, 1]), "tiff", [0, 255, 0, 255])])
def test_numbers_of_more_than_8_bits_keep_their_shades(tmp_path, values, suffix, shades):
    """16 bits are scaled by their range, wider numbers by the values that occur; nothing is clipped at 255."""
    grey = np.repeat(values, 4).reshape(4, 4)
    save(Image.fromarray(grey), tmp_path / f"a.{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.read_picture(tmp_path / f"a.{suffix}", 4)[0, :, 0].tolist() == shades


@pytest.mark.parametrize("top, shade", [(4095, 4095), (1023, 1023), (60000, 65535), (200, 255)])
def test_pictures_of_more_than_8_bits_have_one_range_a_folder(tmp_path, capsys, top, shade):
    for name, value in (("a", top), ("b", top // 2), ("c", 0)):
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / f"{name}.png")
    seen = pixels(tmp_path)[:, 0, 0, 0].float().sort().values
    wanted = torch.tensor([0, top // 2, top]) / shade * 255
    assert torch.allclose(seen, wanted.round(), atol=1)
    assert f"their values 0 to {shade:g} become 0 to 255" in notices(capsys)[0]


@pytest.mark.parametrize("wide", [True, False])
def test_the_middle_square_is_what_is_read(tmp_path, wide):
    """Of three squares in a row, or one below the other, and nothing of the others."""
    bands = np.repeat(np.uint8([RED, GREEN, BLUE]), 12, axis=0)[None].repeat(12, 0)  # (12, 36, 3)
    Image.fromarray(bands if wide else bands.transpose(1, 0, 2)).save(tmp_path / "a.png")
    assert (data.read_picture(tmp_path / "a.png", 12).permute(1, 2, 0) == torch.tensor(GREEN)).all()


def test_pictures_shrink_without_aliasing(tmp_path):
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, 32:96:2] = 255  # of one pixel, in the middle square
    save(Image.fromarray(stripes), tmp_path / "a.png")
    assert (data.read_picture(tmp_path / "a.png", 8)[:, :, 1:-1].int() - 128).abs().max() < 16


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 1)])
def test_extreme_sizes(tmp_path, shape):
    save(plain(RED, shape), tmp_path / "a.png")
    for size in (1, 3, 32):
        found = data.read_picture(tmp_path / "a.png", size)
        assert found.shape == (3, size, size) and (found[0] == 255).all()


# Files that are read, and files that are left out


def test_every_format_of_pillow_is_read(tmp_path, capsys):
    for suffix in ("png", "jpg", "jpeg", "bmp", "gif", "webp", "tif", "ppm", "tga", "pcx", "ico"):
        save(plain(RED, (16, 16)), tmp_path / f"a.{suffix.upper()}")
    found = load(tmp_path)
    assert len(found.train) + len(found.test) == 11 and not notices(capsys)
    assert found.shape == (3, 4, 4) and found.train_labels is None and found.classes == ()


def test_what_is_skipped_is_told_in_one_line(tmp_path, capsys):
    save(plain(RED), tmp_path / "x.png", tmp_path / "y.png")
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "a_cut.png").write_bytes(whole[: len(whole) // 2])
    for name in ("a_text.txt", "b.csv", "c.mp4", "d.png", ".DS_Store", "._x.png"):
        (tmp_path / name).write_text("no picture")
    assert len(pixels(tmp_path)) == 2
    said, = notices(capsys)
    assert "files skipped, no readable pictures (5)" in said and "a_cut.png, a_text.txt, b.csv, ..." in said
    assert "d.png" not in said and ".DS_Store" not in said


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="macOS and Windows take only names that are Unicode")
def test_a_name_that_is_no_utf8_is_told(tmp_path, capsys):
    save(plain(RED), tmp_path / "x.png", tmp_path / "y.png")
    with open(bytes(tmp_path) + b"/caf\xe9.txt", "w") as file:
        file.write("no picture")
    load(tmp_path)
    assert "caf?.txt" in notices(capsys)[0]


@pytest.mark.parametrize("side", [10_000, 20_000])  # a warning of Pillow's, an error
def test_a_huge_header_is_skipped(tmp_path, side, capsys):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    save(plain(RED), tmp_path / "x.png", tmp_path / "y.png")
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))  # one bit
    rows = zlib.compress(bytes((1 + 10_000 // 8) * 10_000), 1)
    content = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(content)
    assert len(pixels(tmp_path)) == 2
    said, = notices(capsys)
    assert "(1)" in said and "bomb.png" in said


@pytest.mark.parametrize("problem", [MemoryError, SyntaxError])
def test_any_error_of_a_decoder_skips_the_picture(tmp_path, problem, monkeypatch, capsys):
    save(plain(RED), *(tmp_path / f"{name}.png" for name in "abc"))
    whole = Image.open

    def opened(file, *args):
        if str(file).endswith("b.png"):
            raise problem("broken")
        return whole(file, *args)

    monkeypatch.setattr(Image, "open", opened)
    load(tmp_path)
    assert "b.png" in notices(capsys)[0]


@pytest.mark.parametrize("path, words", [
    ("x" * 300, ["too long"]), ("a\0b", ["null"]), ("nowhere", ["No such"]), ("file.png", ["Not a directory"]),
    ("~nobody_of_that_name/pictures", ["No such"]), ("empty", ["found 0"]), ("one", ["found 1"])])
def test_paths_without_pictures(tmp_path, path, words):
    (tmp_path / "file.png").write_text("x")
    (tmp_path / "empty").mkdir()
    save(plain(RED), tmp_path / "one" / "cats" / "a.png")
    said = refused(data.load_images, f"folder:{path if path[0] == '~' else tmp_path / path}")
    assert "dataset folder:" in said and all(word in said for word in words)


# Classes


def test_subfolders_are_classes_and_what_has_no_class_is_told(tmp_path, capsys):
    save(plain(RED), *(tmp_path / "cats" / f"{i}.png" for i in range(3)), tmp_path / "loose.png",
         *(tmp_path / name / "a.png" for name in (".git", "__MACOSX", ".ipynb_checkpoints", "cats/.thumbs")))
    save(plain(BLUE), tmp_path / "emus" / "big" / "old" / "a.png", tmp_path / "emus" / "small" / "a.png")
    (tmp_path / "dogs").mkdir()
    (tmp_path / "ants").mkdir()
    (tmp_path / "ants" / "1.png").write_text("broken")
    found = load(tmp_path)
    x, y = torch.cat([found.train, found.test]), torch.cat([found.train_labels, found.test_labels])
    assert found.classes == ("cats", "emus") and torch.bincount(y).tolist() == [3, 2] and y.dtype == torch.int64
    assert torch.equal(x[:, 2, 0, 0] > 0, y == 1)  # the blue ones are emus
    said = notices(capsys)
    assert len(said) == 3 and "1.png" in said[0]
    assert "pictures beside the class folders left out (1)" in said[1] and "loose.png" in said[1]
    assert "class folders without pictures left out (2)" in said[2] and "ants, dogs" in said[2]


def test_a_folder_without_pictures_makes_no_classes(tmp_path):
    save(plain(RED), tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "notes").mkdir()
    found = load(tmp_path)
    assert found.classes == () and found.train_labels is None and len(found.train) == len(found.test) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows makes links for administrators only")
def test_links_are_followed_once_and_what_they_repeat_is_named(tmp_path, capsys):
    for name, colour in (("cats", RED), ("far", GREEN)):
        save(plain(colour), *(tmp_path / name / f"{i}.png" for i in range(3)))
    (tmp_path / "cats" / "more").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "cats" / "loop").symlink_to(tmp_path / "cats")
    (tmp_path / "cats" / "lost.png").symlink_to(tmp_path / "gone.png")
    found = load(tmp_path / "cats")
    assert len(found.train) + len(found.test) == 3 and found.classes == ("more",)  # those beside it have no class
    said = notices(capsys)
    assert any("read already (1): loop" in line for line in said)
    assert any("no readable pictures (1): lost.png" in line for line in said)


def test_classes_called_train_and_test_are_said(tmp_path, capsys):
    for part in ("train", "test"):
        save(plain(RED), *(tmp_path / part / name / "a.png" for name in ("cats", "dogs")))
    assert load(tmp_path).classes == ("test", "train")
    assert f"name one of these, folder:{tmp_path / 'train'}" in notices(capsys)[0]


# What is held out


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (1, 1), (1, 1, 30), (10, 10, 10), (3, 97)])
def test_each_class_keeps_a_training_picture(tmp_path, sizes):
    for label, count in enumerate(sizes):
        save(plain(RED), *(tmp_path / f"class {label}" / f"{i}.png" for i in range(count)))
    found = load(tmp_path, 1)
    kept = torch.bincount(found.train_labels, minlength=len(sizes))
    assert kept.min() >= 1 or sizes == (1, 1)
    assert 1 <= len(found.test) <= max(1, sum(sizes) // 4)
    assert (kept + torch.bincount(found.test_labels, minlength=len(sizes))).tolist() == list(sizes)
    assert torch.equal(found.train_labels, load(tmp_path, 1).train_labels)


def test_a_picture_that_is_added_moves_no_other_one(tmp_path):
    def held_out():
        found = load(tmp_path, 1)
        train, test = (set(part[:, 0].flatten().add(1).mul(127.5).round().int().tolist())
                       for part in (found.train, found.test))
        assert not train & test and len(train | test) == len(found.train) + len(found.test)
        return test

    for i in range(100):
        save(plain((2 * i, 0, 0)), tmp_path / f"{i:03}.png")
    before = held_out()
    assert 3 <= len(before) <= 20 and before != set(range(0, 2 * len(before), 2))
    for i in range(100, 120):
        save(plain((2 * i, 0, 0)), tmp_path / f"a{i:03}.png")
    assert held_out() & set(range(0, 200, 2)) == before
    (tmp_path / "050.png").unlink()
    assert held_out() & set(range(0, 200, 2)) == before - {100}
