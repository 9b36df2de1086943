"""common/data.py: the bundled sets, a person's own pictures and files, and what is said of mistakes."""

import gzip
import struct
import subprocess
import sys
import urllib.error
import warnings
import zlib

from common import data
from common.cli import Mistake

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from PIL import Image
from sklearn.datasets import load_digits
from torch.testing import assert_close

RED, WHITE = (255, 0, 0), (255, 255, 255)


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


def refused(read, *args):
    """The message of the mistake with which read(*args) ends, one line."""
    with pytest.raises(Mistake) as stop:
        read(*args)
    said, = str(stop.value).splitlines()
    return said


def notices(capsys):
    captured = capsys.readouterr()
    assert not captured.err
    return captured.out.splitlines()


# The bundled sets


@pytest.mark.parametrize("name, parts", [("digits", ("train", "test")), ("color_digits", ("train", "test")),
                                         ("digits8", ("train_digits8", "test_digits8"))])
def test_the_stored_splits_are_stratified_partitions(name, parts):
    """No picture is left out or in both parts; a tenth of each class is held out; they are what is loaded."""
    stored = np.load(ROOT / "common" / "assets" / "mnist_5k.npz")
    train, test = (stored[part].astype(int) for part in parts)
    y = load_digits().target if name == "digits8" else stored["y"]
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(y)))
    for label in range(10):
        assert abs((y[test] == label).sum() - (y == label).sum() / 10) < 1
    found = data.load_images(name)
    assert found.train_labels.tolist() == y[train].tolist()
    assert found.test_labels.tolist() == y[test].tolist()
    if name != "color_digits":
        x = load_digits().images / 8 - 1 if name == "digits8" else stored["x"] / 127.5 - 1
        for part, i in ((found.train, train), (found.test, test)):
            assert_close(part[:, 0], torch.from_numpy(x[i]).float())


@pytest.mark.slow
def test_heavy_libraries_are_imported_on_use(tmp_path):
    """None by loading digits; sklearn by digits8, torchvision by a set that is downloaded."""
    code = f"""
import sys
import urllib.request
from common import data

def loaded():
    print("loaded:", *sorted({{"torchvision", "sklearn", "scipy", "matplotlib", "PIL"}} & set(sys.modules)))

def blocked(*_, **__):
    raise OSError("no route to host")

loaded()
data.load_images("digits", 32), data.load_images("color_digits")
loaded()
urllib.request.urlopen, data.CACHE = blocked, data.Path({str(tmp_path)!r})
try:
    data.load_images("mnist")
except data.Mistake as problem:
    loaded()
data.load_images("digits8")
loaded()
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(),
                           capture_output=True, text=True)
    at_start, bundled, downloaded, digits8 = [
        line for line in found.stdout.splitlines() if line.startswith("loaded:")]
    assert at_start == bundled == "loaded:", found.stdout + found.stderr
    assert "torchvision" in downloaded and "sklearn" not in downloaded and "sklearn" in digits8


# Pictures of a folder


def test_exif_rotation_is_applied(tmp_path):
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # to be turned by 180 degrees
    for name in ("a.png", "b.png"):
        Image.fromarray(upright).save(tmp_path / name, exif=exif)
    assert (pixels(tmp_path)[:, :, 0] == 0).all() and (pixels(tmp_path)[:, :, -1] == 255).all()


@pytest.mark.parametrize("mode, colour", [("RGBA", (255, 0, 0, 0)), ("LA", (0, 0)),
                                          ("P", 0), ("L", 0)])
def test_transparent_is_white(tmp_path, mode, colour):
    picture = plain(colour, mode=mode)
    if mode == "P":
        picture.putpalette([10, 20, 30] * 256)
    hidden = {"transparency": 0} if mode in "PL" else {}
    for name in ("a.png", "b.png"):
        picture.save(tmp_path / name, **hidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (pixels(tmp_path) == 255).all()


def test_half_transparent_is_half_white(tmp_path):
    save(plain((255, 0, 0, 128), mode="RGBA"), tmp_path / "a.png", tmp_path / "b.png")
    red, green, blue = pixels(tmp_path)[0, :, 0, 0].tolist()
    assert red == 255 and green == blue and abs(green - 127) <= 1


@pytest.mark.parametrize("suffix, kind", [("png", np.uint16), ("tiff", ">u2"),
                                          ("tiff", np.int32)])
def test_16_bit_grey_keeps_its_shades(tmp_path, suffix, kind):
    grey = np.repeat(np.array([10, 100, 200, 250]) * 257, 4).reshape(4, 4).astype(kind)
    save(Image.fromarray(grey), tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}")
    assert pixels(tmp_path)[0, 0, :, 0].tolist() == [10, 100, 200, 250]


@pytest.mark.parametrize("values", [np.float32([0.1, 0.2, 0.3, 0.6]),
                                    np.int32([-10, 0, 10, 40]),
                                    np.int32([50_000, 60_000, 70_000, 100_000])])
def test_numbers_beyond_16_bit_are_scaled_by_their_range(tmp_path, values):
    save(Image.fromarray(np.repeat(values, 4).reshape(4, 4)), tmp_path / "a.tiff",
         tmp_path / "b.tiff")
    assert pixels(tmp_path)[0, 0, :, 0].tolist() == [0, 51, 102, 255]


@pytest.mark.parametrize("values, shades", [
    ([0.5] * 4, [0] * 4), ([np.nan] * 4, [0] * 4),
    ([1.0, np.nan, 1.0, 1.0], [255, 0, 255, 255]), ([np.inf, 1.0, -np.inf, 1.0], [0, 255, 0, 255])])
def test_floats_of_one_value_or_not_finite(tmp_path, values, shades):
    save(Image.fromarray(np.repeat(np.float32(values), 4).reshape(4, 4)), tmp_path / "a.tiff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = data.read_picture(tmp_path / "a.tiff", 4)
    assert picture[0, :, 0].tolist() == shades


def test_cmyk_becomes_rgb(tmp_path):
    save(plain((0, 0, 0, 0), mode="CMYK"), tmp_path / "a.tiff", tmp_path / "b.tiff")
    assert (pixels(tmp_path) == 255).all()


def test_every_format_of_pillow_is_read(tmp_path, capsys):
    for suffix in ("png", "jpg", "jpeg", "bmp", "gif", "webp", "tif", "ppm", "tga", "pcx", "ico"):
        save(plain(RED, (16, 16)), tmp_path / f"a.{suffix.upper()}")
    found = load(tmp_path)
    assert len(found.train) + len(found.test) == 11 and not notices(capsys)


def test_the_first_frame_of_a_gif(tmp_path):
    frames = [plain(RED), plain((0, 0, 255))]
    for name in ("a.gif", "b.gif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert pixels(tmp_path)[0, :, 0, 0].tolist() == list(RED)


def test_what_is_skipped_is_told_in_one_line(tmp_path, capsys):
    save(plain(RED), tmp_path / "x.png", tmp_path / "y.png")
    for name in ("a.txt", "b.csv", "c.mp4", "d.png", ".DS_Store", "._x.png"):
        (tmp_path / name).write_text("no picture")
    load(tmp_path)
    said, = notices(capsys)
    assert "files skipped, no readable pictures (4)" in said and "a.txt, b.csv, c.mp4, ..." in said
    assert "d.png" not in said and ".DS_Store" not in said


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("side", [10_000, 20_000])  # a warning of Pillow's, an error
def test_a_huge_header_is_skipped(tmp_path, side, capsys):
    save(plain(RED), tmp_path / "x.png", tmp_path / "y.png")
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))  # one bit
    rows = zlib.compress(bytes((1 + 10_000 // 8) * 10_000), 1)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows)
                                        + chunk(b"IEND", b""))
    found = load(tmp_path)
    assert len(found.train) + len(found.test) == 2
    said, = notices(capsys)
    assert "(1)" in said and "bomb.png" in said


@pytest.mark.parametrize("problem", [MemoryError, struct.error, IndexError, SyntaxError])
def test_any_error_of_a_decoder_skips_the_picture(tmp_path, problem, monkeypatch, capsys):
    save(plain(RED), *(tmp_path / f"{name}.png" for name in "abc"))
    whole = data.read_picture

    def picture(file, *size):
        if file.name == "b.png":
            raise problem("broken")
        return whole(file, *size)

    monkeypatch.setattr(data, "read_picture", picture)
    load(tmp_path)
    assert "b.png" in notices(capsys)[0]


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 1)])
@pytest.mark.parametrize("size", [1, 3, 32])
def test_extreme_sizes(tmp_path, shape, size):
    save(plain(RED, shape), tmp_path / "a.png", tmp_path / "b.png")
    assert pixels(tmp_path, size).shape == (2, 3, size, size)
    assert (pixels(tmp_path, size)[:, 0] == 255).all()


def test_pictures_shrink_without_aliasing_and_are_cropped_in_the_middle(tmp_path):
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, 32:96:2] = 255  # of one pixel, in the middle square
    save(Image.fromarray(stripes), tmp_path / "a.png", tmp_path / "b.png")
    inner = pixels(tmp_path, 8)[:, :, :, 1:-1]
    assert (inner - 128).abs().max() < 16


# Folders


def test_loose_pictures_beside_class_folders_are_told(tmp_path, capsys):
    save(plain(RED), *(tmp_path / name / f"{i}.png" for name in ("cats", "dogs") for i in range(3)),
         tmp_path / "loose.png")
    found = load(tmp_path)
    assert found.classes == ("cats", "dogs") and len(found.train) + len(found.test) == 6
    said, = notices(capsys)
    assert "pictures beside the class folders left out (1)" in said and "loose.png" in said


def test_loose_pictures_beside_folders_without_pictures(tmp_path):
    save(plain(RED), tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "notes").mkdir()
    found = load(tmp_path)
    assert found.classes == () and found.train_labels is None and len(found.train) == 1


def test_empty_classes_are_told_and_left_out(tmp_path, capsys):
    save(plain(RED), *(tmp_path / name / f"{i}.png" for name in ("cats", "emus") for i in range(2)))
    (tmp_path / "dogs").mkdir()
    (tmp_path / "ants").mkdir()
    (tmp_path / "ants" / "1.png").write_text("broken")
    found = load(tmp_path)
    assert found.classes == ("cats", "emus")
    assert sorted(torch.cat([found.train_labels, found.test_labels]).tolist()) == [0, 0, 1, 1]
    said = notices(capsys)
    assert len(said) == 2 and "class folders without pictures left out (2)" in said[1]
    assert "ants, dogs" in said[1]


def test_deeper_folders_belong_to_their_class(tmp_path):
    save(plain(RED), tmp_path / "cats" / "a.png", tmp_path / "dogs" / "big" / "old" / "a.png",
         tmp_path / "dogs" / "small" / "a.png")
    found = load(tmp_path)
    labels = torch.cat([found.train_labels, found.test_labels])
    assert found.classes == ("cats", "dogs") and torch.bincount(labels).tolist() == [1, 2]
    assert labels.dtype == torch.int64


def test_a_linked_class_folder(tmp_path):
    save(plain(RED), *(tmp_path / "elsewhere" / f"{i}.png" for i in range(3)))
    (tmp_path / "mine").mkdir()
    try:
        (tmp_path / "mine" / "cats").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("Windows makes links for administrators only")
    assert load(tmp_path / "mine").classes == ("cats",)


def test_links_are_followed_once_and_what_they_repeat_is_named(tmp_path, capsys):
    for name, colour in (("cats", RED), ("far", (0, 255, 0))):
        save(plain(colour), *(tmp_path / name / f"{i}.png" for i in range(3)))
    (tmp_path / "cats" / "more").symlink_to(tmp_path / "far")     # a folder inside a class
    (tmp_path / "cats" / "loop").symlink_to(tmp_path / "cats")    # one that holds itself
    (tmp_path / "cats" / "lost.png").symlink_to(tmp_path / "gone.png")
    found = data.load_images(f"folder:{tmp_path / 'cats'}", 4)
    assert len(found.train) + len(found.test) == 3  # the loose pictures have no class: those in `more` are one
    assert found.classes == ("more",)
    said = notices(capsys)
    assert any("read already (1): loop" in line for line in said)
    assert any("no readable pictures (1): lost.png" in line for line in said)


@pytest.mark.parametrize("top, shade", [(4095, 4095), (1023, 1023), (60000, 65535), (200, 255)])
def test_pictures_of_more_than_8_bits_have_one_range_a_folder(tmp_path, capsys, top, shade):
    for name, value in (("a", top), ("b", top // 2), ("c", 0)):
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / f"{name}.png")
    found = load(tmp_path, 4)
    seen = torch.cat([found.train, found.test])[:, 0, 0, 0].add(1).mul(127.5).round().sort().values
    wanted = torch.tensor([0, top // 2, top]) / shade * 255
    assert torch.allclose(seen, wanted.round(), atol=1)
    assert f"their values 0 to {shade:g} become 0 to 255" in notices(capsys)[0]


def test_classes_called_train_and_test_are_said(tmp_path, capsys):
    for part in ("train", "test"):
        for name in ("cats", "dogs"):
            save(plain(RED), tmp_path / part / name / "a.png")
    assert load(tmp_path).classes == ("test", "train")
    assert f"name one of these, folder:{tmp_path / 'train'}" in notices(capsys)[0]


def test_hidden_folders_are_no_classes(tmp_path, capsys):
    save(plain(RED), *(tmp_path / name / f"{i}.png" for i in range(2) for name in
                       (".git", "__MACOSX", ".ipynb_checkpoints", "cats", "cats/.thumbs")))
    found = load(tmp_path)
    assert found.classes == ("cats",) and len(found.train) + len(found.test) == 2
    assert not notices(capsys)


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (1, 1, 30), (10, 10, 10), (3, 97)])
def test_each_class_keeps_a_training_picture(tmp_path, sizes):
    for label, count in enumerate(sizes):
        save(plain(RED), *(tmp_path / f"class {label}" / f"{i}.png" for i in range(count)))
    found = load(tmp_path, 1)
    kept = torch.bincount(found.train_labels, minlength=len(sizes))
    assert kept.min() >= 1 and 1 <= len(found.test) <= max(1, sum(sizes) // 4)
    assert (kept + torch.bincount(found.test_labels, minlength=len(sizes))).tolist() == list(sizes)
    assert torch.equal(found.train_labels, load(tmp_path, 1).train_labels)


def test_a_picture_that_is_added_moves_no_other_one(tmp_path):
    def held_out():
        found = load(tmp_path, 1)
        values = [set(part[:, 0].flatten().add(1).mul(127.5).round().int().tolist())
                  for part in (found.train, found.test)]
        assert not values[0] & values[1] and len(values[0] | values[1]) == len(found.train) + len(found.test)
        return values[1]

    for i in range(100):
        save(plain((2 * i, 0, 0)), tmp_path / f"{i:03}.png")
    before = held_out()
    assert 3 <= len(before) <= 20 and before != set(range(0, 2 * len(before), 2))
    for i in range(100, 120):
        save(plain((2 * i, 0, 0)), tmp_path / f"a{i:03}.png")
    assert held_out() & set(range(0, 200, 2)) == before
    (tmp_path / "050.png").unlink()
    assert held_out() & set(range(0, 200, 2)) == before - {100}


def test_classes_of_one_picture_each(tmp_path):
    save(plain(RED), tmp_path / "cats" / "a.png", tmp_path / "dogs" / "a.png")
    found = load(tmp_path)
    assert len(found.train) == len(found.test) == 1 and found.classes == ("cats", "dogs")


@pytest.mark.parametrize("path, words", [
    ("x" * 300, ["too long"]), ("a/" * 3000, ["too long"]), ("a\0b", ["null"]),
    ("nowhere", ["No such"]), ("~nobody_of_that_name/pictures", ["No such"])])
def test_paths_that_cannot_be_read(tmp_path, path, words):
    where = path if path[0] == "~" else f"{tmp_path}/{path}"
    said = refused(data.load_images, f"folder:{where}")
    assert "dataset folder:" in said and all(word in said for word in words)


def test_a_file_in_place_of_a_folder_and_a_folder_without_permission(tmp_path, monkeypatch):
    (tmp_path / "file.png").write_text("x")
    said = refused(load, tmp_path / "file.png")
    assert "file.png" in said and "Not a directory" in said

    def locked(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data.Path, "iterdir", locked)
    assert "Permission denied" in refused(load, tmp_path)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_pictures(tmp_path, count):
    save(plain(RED), *(tmp_path / "cats" / f"{i}.png" for i in range(count)))
    assert f"found {count}" in refused(load, tmp_path)


def test_names_that_are_no_utf8(tmp_path, capsys):
    save(plain(RED), tmp_path / "x.png", tmp_path / "y.png")
    try:
        with open(bytes(tmp_path) + b"/caf\xe9.txt", "w") as file:
            file.write("no picture")
    except OSError:
        pytest.skip("macOS and Windows take only names that are Unicode")
    load(tmp_path)
    assert "caf?.txt" in notices(capsys)[0]


# Sizes


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_sizes_of_bundled_pictures(size):
    assert data.load_images("digits8", size).shape == (1, size, size)


# Names


@pytest.mark.parametrize("read, name, words", [
    (data.load_images, "digit", ["the nearest is digits"]),
    (data.load_images, "MNIST", ["the nearest is mnist"]),
    (data.load_images, "Fashion-MNIST", ["the nearest is fashion_mnist"]),
    (data.load_images, "cifar-10", ["the nearest is cifar10"]),
    (data.load_images, "folder", ["the nearest is folder:PATH"]),
    (data.load_images, "Folder:/pictures", ["the nearest is folder:PATH"]),
    (data.load_images, "two_moons", ["which score_based_diffusion_example.py takes"]),
    (data.load_images, "sines", ["which experiments/series.py takes"]),
    (data.load_images, "csv:a.csv", ["the nearest is csv:PATH, which experiments/series.py takes"]),
    (data.load_data, "moons", ["the nearest is two_moons", "gaussians", "digits", "folder:PATH"]),
    (data.load_data, "sine", ["the nearest is sines, which experiments/series.py takes"]),
    (data.load_points, "Two-Moons", ["the nearest is two_moons"]),
    (data.load_points, "digits", ["must be one of swiss_roll"]),
    (data.load_images, "folder:", ["the nearest is folder:PATH"]),
    (data.load_images, "", ["must be one of"]),
    (data.load_images, "a\0b", ["must be one of"])])
def test_misspelt_names(read, name, words):
    said = refused(read, name)
    assert said.startswith(f"dataset {name}") and all(word in said for word in words)


def test_no_nearest_is_made_up():
    assert "nearest" not in refused(data.load_images, "xyzzy")


def test_a_folder_without_the_word(tmp_path):
    assert f"folder:{tmp_path}" in refused(data.load_images, str(tmp_path))


# Files put by hand, downloads


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network; an empty folder in place of data/, which is given."""
    def blocked(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", blocked)
    monkeypatch.setattr(data, "CACHE", tmp_path / "data")
    return tmp_path / "data"


def write_mnist(folder, packed=True, n=(20, 10)):
    """Four small files in the format of MNIST; the pictures and labels in them."""
    folder.mkdir(parents=True)
    rng, arrays = np.random.default_rng(0), []
    for part, count in zip(("train", "t10k"), n, strict=True):
        for what, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            array = rng.integers(0, 256 if len(shape) > 1 else 10, shape, dtype=np.uint8)
            head = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
            raw = head + array.tobytes()
            name = f"{part}-{what}-ubyte" + (".gz" if packed else "")
            (folder / name).write_bytes(gzip.compress(raw) if packed else raw)
            arrays.append(torch.from_numpy(array.astype(np.int64)))
    return arrays


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name, word", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_files_put_by_hand_need_no_network(name, word, packed, offline):
    x, y, test_x, test_y = write_mnist(offline / word / "raw", packed)
    found = data.load_images(name)
    assert torch.equal(found.train.add(1).mul(127.5).round().long(), x[:, None])
    assert torch.equal(found.test.add(1).mul(127.5).round().long(), test_x[:, None])
    assert torch.equal(found.train_labels, y) and torch.equal(found.test_labels, test_y)
    assert len(found.classes) == 10 and data.load_images(name, 32).shape == (1, 32, 32)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_truncated_packed_file_is_named(offline, cut):
    write_mnist(offline / "MNIST" / "raw")
    file = offline / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:cut])
    assert str(file) in refused(data.load_images, "mnist") or cut == 0


@pytest.mark.parametrize("cut", [0, 2, 10, 100])
def test_a_truncated_file_ends_with_one_line(offline, cut):
    write_mnist(offline / "MNIST" / "raw", packed=False)
    file = offline / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:cut])
    assert str(file.parent) in refused(data.load_images, "mnist")


@pytest.mark.parametrize("cut", [0, 100])
def test_a_truncated_file_is_unpacked_again(offline, cut):
    write_mnist(offline / "MNIST" / "raw")
    (offline / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(bytes(cut))
    assert len(data.load_images("mnist").test) == 10
    assert len(list((offline / "MNIST" / "raw").iterdir())) == 8  # no scratch is left


@pytest.mark.parametrize("name, folder, files", [
    ("mnist", "MNIST/raw", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]),
    ("fashion_mnist", "FashionMNIST/raw", ["train-labels-idx1-ubyte.gz"]),
    ("cifar10", "", ["cifar-10-python.tar.gz"])])
def test_without_network_it_is_said_which_files_go_where(name, folder, files, offline):
    said = refused(data.load_images, name)
    assert all(word in said for word in (str(offline / folder), *files, *data.OFFLINE))
    assert "no route to host" in said or name != "cifar10"  # an old torchvision keeps its reason


def test_a_server_without_the_file_is_no_folder_without_permission(offline, monkeypatch):
    def absent(*_, **__):
        raise urllib.error.HTTPError("http://x/y.gz", 404, "Not Found", None, None)

    monkeypatch.setattr("urllib.request.urlopen", absent)
    said = refused(data.load_images, "cifar10")
    assert "nor downloaded" in said and "404" in said


def test_a_truncated_cifar_archive(offline):
    offline.mkdir()
    (offline / "cifar-10-python.tar.gz").write_bytes(gzip.compress(bytes(1000))[:20])
    assert "cifar-10-python.tar.gz" in refused(data.load_images, "cifar10")


@pytest.mark.parametrize("name", data.DOWNLOADED)
def test_a_data_folder_that_cannot_be_written(name, tmp_path, offline, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(data, "CACHE", tmp_path / "file" / "data")
    said = refused(data.load_images, name)
    assert f"{tmp_path / 'file' / 'data'}" in said and "Not a directory" in said


# Points
