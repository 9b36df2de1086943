"""common/data.py: the bundled sets, a person's own pictures and files, and what is said of mistakes."""

import gzip
import struct
import subprocess
import sys
import urllib.error
import warnings
import zlib
from pathlib import Path

from common import data
from common.cli import Mistake

import matplotlib
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
from pathlib import Path
from common import data

def loaded():
    print("loaded:", *sorted({{"torchvision", "sklearn", "scipy", "matplotlib", "PIL"}} & set(sys.modules)))

def blocked(*_, **__):
    raise OSError("no route to host")

loaded()
data.load_images("digits", 32), data.load_images("color_digits")
loaded()
urllib.request.urlopen, data.CACHE = blocked, Path({str(tmp_path)!r})
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

    def picture(file, size):
        if file.name == "b.png":
            raise problem("broken")
        return whole(file, size)

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
    assert kept.min() >= 1 and len(found.test) == max(1, sum(sizes) // 10)
    assert (kept + torch.bincount(found.test_labels, minlength=len(sizes))).tolist() == list(sizes)
    if sizes == (10, 10, 10):
        assert kept.tolist() == [9, 9, 9]
    assert torch.equal(found.train_labels, load(tmp_path, 1).train_labels)


def test_the_held_out_pictures_of_a_flat_folder_are_not_the_first(tmp_path):
    for i in range(20):
        save(plain((10 * i, 0, 0)), tmp_path / f"{i:02}.png")
    found = load(tmp_path, 1)
    held_out = found.test[:, 0].flatten().add(1).mul(127.5).round().tolist()
    assert len(held_out) == 2 and held_out != [0, 10] and held_out != [180, 190]


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
    (data.load_images, "sines", ["which score_based_diffusion_example.py takes"]),
    (data.load_images, "csv:a.csv", ["which score_based_diffusion_example.py takes"]),
    (data.load_data, "moons", ["the nearest is two_moons", "gaussians", "digits", "folder:PATH"]),
    (data.load_data, "sine", ["the nearest is sines"]),
    (data.load_points, "Two-Moons", ["the nearest is two_moons"]),
    (data.load_points, "digits", ["must be one of swiss_roll"]),
    (data.load_series, "sine", ["the nearest is sines"]),
    (data.load_series, "folder:/x", ["must be one of sines"]),
    (data.load_images, "folder:", ["the nearest is folder:PATH"]),
    (data.load_series, "csv:", ["the nearest is csv:PATH"]),
    (data.load_images, "", ["must be one of"]),
    (data.load_images, "a\0b", ["must be one of"])])
def test_misspelt_names(read, name, words):
    said = refused(read, name)
    assert said.startswith(f"dataset {name}") and all(word in said for word in words)
    assert said.endswith("takes it") == any(word.endswith("takes it") for word in words)


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


# Series and points


@pytest.mark.parametrize("text, word", [
    ("", "0 series of 0 numbers"), ("\n \n", "0 series"), ("a,b\n", "0 series"),
    ("1,2", "1 series of 2 numbers"), ("1\n2\n3", "3 series of 1 numbers"),
    ("1,2\n3", "row 2 has 1 numbers, must have 2"), ("h,i\n1,2\n\n3,4,5", "row 4 has 3 numbers, must have 2"),
    ("1,2\n3,inf", "row 2, number 2 is 'inf'"), ("1,2\nnan,3", "row 2, number 1 is 'nan'"),
    ("1,2\n3,", "row 2, number 2 is ''"), ("1,2\n3,4\nx,5", "row 3, number 1 is 'x'"),
    ("day,1\n1,2\n3,4", "row 1, number 1 is 'day'"), ("-1e308,0\n1e308,0", "row 1, number 1 is '-1e308'"),
    ("\x00\xff", "cannot be read")])
def test_a_csv_that_is_no_table(tmp_path, text, word):
    (tmp_path / "a.csv").write_text(text, encoding="latin-1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = refused(data.load_series, f"csv:{tmp_path / 'a.csv'}")
    assert "a.csv" in said and word in said


@pytest.mark.parametrize("path", ["", "none.csv", "x" * 300, "a\0b"])
def test_a_csv_that_cannot_be_opened(tmp_path, path):
    assert "dataset csv:" in refused(data.load_series, f"csv:{tmp_path}/{path}")


def test_a_csv_of_one_value(tmp_path):
    (tmp_path / "a.csv").write_text("5,5\n5,5\n")
    said = refused(data.load_series, f"csv:{tmp_path / 'a.csv'}")
    assert "all numbers of its training rows are 5" in said


def test_series_far_from_zero_keep_their_digits(tmp_path):
    table = 1e6 + np.random.default_rng(1).normal(size=(40, 6))
    np.savetxt(tmp_path / "a.csv", table, delimiter=",")
    found = data.load_series(f"csv:{tmp_path / 'a.csv'}")
    same = found.rescale(found.offset, found.unit)
    assert_close(same.test, found.test, rtol=0, atol=1e-6)
    rows = torch.cat([found.train, found.test])[:, 0].double()
    assert_close(np.sort(found.restore(rows).numpy(), 0), np.sort(table, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", [
    "1,2,3\n4,5,6\n", "a,b,c\n1,2,3\n4,5,6", '"x 1";"x 2";"x 3"\r\n"1";2;3\r\n\r\n4;5;"6"\r\n',
    "1\t2\t3\n4\t5\t6\n",
    "\ufeff1,2,3\n4, 5 ,6e0\n", '"a, or b",c,d\n1,2,3\n4,5,6', "\n \n1;2;3\n4;5;6",
    '"a, or b, or c";"d";"e"\n1;2;3\n4;5;6'])
def test_a_csv_is_read_as_people_write_it(text, tmp_path):
    (tmp_path / "a.csv").write_bytes(text.encode())
    found = data.read_csv("csv:a.csv", tmp_path / "a.csv")
    assert found.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_row_of_zeros_is_no_header(tmp_path):
    (tmp_path / "a.csv").write_text("0,0\n1,2\n")
    assert data.read_csv("csv:a.csv", tmp_path / "a.csv").tolist() == [[0, 0], [1, 2]]


def test_series_are_scaled_by_their_training_part_and_scaled_back(tmp_path):
    table = 30 + 5 * np.random.default_rng(1).normal(size=(40, 6))
    np.savetxt(tmp_path / "a.csv", table, delimiter=",")
    found = data.load_data(f"csv:{tmp_path / 'a.csv'}")
    assert found.train.shape == (36, 1, 6) and found.test.shape == (4, 1, 6)
    assert abs(found.train.mean()) < 1e-5 and abs(found.train.std(correction=0) - 1) < 1e-5
    assert abs(found.test.mean()) > 1e-5
    rows = torch.cat([found.restore(found.train), found.restore(found.test)])[:, 0].double().numpy()
    assert_close(np.sort(rows, 0), np.sort(table, 0), rtol=1e-5, atol=1e-4)
    other = found.rescale(10.0, 2.0)
    assert_close(other.train, (found.restore(found.train) - 10) / 2, rtol=1e-4, atol=1e-4)
    assert_close(other.restore(other.test), found.restore(found.test), rtol=1e-5, atol=1e-4)
    moved = other.to("cpu")
    assert (moved.offset, moved.unit, moved.name) == (10.0, 2.0, found.name)


@pytest.mark.parametrize("name", data.SERIES)
def test_series_have_mean_0_and_std_1_over_the_training_part_alone(name):
    found = data.load_data(name)
    assert found.name == name and found.train.dtype == found.test.dtype == torch.float32
    assert_close(found.train.double().mean().item(), 0.0, rtol=0, atol=1e-6)
    assert_close(found.train.double().std(correction=0).item(), 1.0, rtol=0, atol=1e-6)
    every = torch.cat([found.train, found.test]).double()
    assert abs(every.mean()) > 1e-4 and abs(every.std(correction=0) - 1) > 1e-4
    assert found.train_labels is None and found.classes == ()


def test_written_series_are_read_back_as_the_same_rows(tmp_path):
    table = np.random.default_rng(2).normal(7, 3, (21, 5)).astype(np.float32).astype(float)
    np.savetxt(tmp_path / "a.csv", table, delimiter=",")
    found = data.load_series(f"csv:{tmp_path / 'a.csv'}")
    rows = found.restore(torch.cat([found.train, found.test]))[:, 0].numpy()
    np.savetxt(tmp_path / "b.csv", rows, delimiter=",")
    again = data.read_csv("csv:b.csv", tmp_path / "b.csv")
    assert np.array_equal(again, rows.astype(float))
    assert np.allclose(again[again[:, 0].argsort()], table[table[:, 0].argsort()], rtol=1e-6, atol=1e-6)


def test_series_in_another_unit_keep_what_they_stand_for():
    x, y = torch.tensor([[[1.0, 3.0]], [[-1.0, 0.5]]]), torch.tensor([[[2.0, 4.0]]])
    found = data.Data("toy", x, y, offset=10.0, unit=4.0)
    assert_close(found.restore(x), torch.tensor([[[14.0, 22.0]], [[6.0, 12.0]]]))
    other = found.rescale(6.0, 2.0).to("cpu")
    assert_close(other.train, torch.tensor([[[4.0, 8.0]], [[0.0, 3.0]]]))
    assert_close(other.test, torch.tensor([[[6.0, 10.0]]]))
    assert (other.offset, other.unit) == (6.0, 2.0) and (found.offset, found.unit) == (10.0, 4.0)
    assert_close(other.restore(other.test), found.restore(found.test))
    moved = other.to("meta")
    assert moved.train.is_meta and moved.test.is_meta and (moved.offset, moved.unit) == (6.0, 2.0)


def test_sines_are_one_wave_each_under_noise():
    found = data.load_series("sines")
    assert found.train.shape == (1000, 1, 128) and found.test.shape == (250, 1, 128)
    assert torch.equal(found.train, data.load_series("sines").train)
    assert not torch.equal(found.train, data.load_series("sines", seed=1).train)
    x = found.restore(torch.cat([found.train, found.test]))[:, 0].double().numpy()
    grid, rest, sizes, speeds = np.linspace(0, 1, 128), [], [], []
    for series in x[:40]:  # the best wave of any frequency leaves noise of 0.1
        def left(f, series=series):
            waves = np.stack([np.sin(2 * np.pi * f * grid), np.cos(2 * np.pi * f * grid)], 1)
            weights = np.linalg.lstsq(waves, series, rcond=None)[0]
            sizes.append(np.linalg.norm(weights))
            return series - waves @ weights
        speeds.append(min(np.linspace(1, 9, 161), key=lambda f: left(f).std()))
        rest.append(left(speeds[-1]).std())
        sizes[len(rest) - 1:] = sizes[-1:]
    assert 1.9 < min(speeds) < 2.6 and 7.4 < max(speeds) < 8.1
    assert 0.45 < min(sizes) < 0.55 and 0.95 < max(sizes) < 1.05
    assert np.mean(rest) == pytest.approx(0.1, abs=0.006)


def test_windows_of_the_recording_are_held_out_whole(monkeypatch):
    found = data.load_series("membrane")
    assert found.shape == (1, 128) and len(found.train) == 1003 and len(found.test) == 156
    assert torch.equal(found.train[1, 0, :-1], found.train[0, 0, 1:])
    potential = found.restore(found.train)
    assert -0.7 < potential.min() < -0.4 and -0.1 < potential.max() < 0.1
    recorded = np.fromfile(Path(matplotlib.get_data_path()) / "sample_data" / "membrane.dat", np.float32)
    recorded = torch.from_numpy(recorded[1400:7050:4].copy())
    seen = len(found.train) + 127  # values of the recording before the first that is held out
    wanted = recorded[seen:].unfold(0, 128, 1)
    held_out = found.restore(found.test[:, 0])
    assert_close(held_out.sort(0).values, wanted.sort(0).values, rtol=1e-4, atol=1e-4)
    assert (held_out - wanted).abs().max() > 0.1  # shuffled
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: "/nowhere")
    assert "/nowhere" in refused(data.load_series, "membrane")


# A person's own picture and mask


def ask(tmp_path, picture=None, mask=None, shape=(1, 4, 6)):
    """read_question of pixel arrays, written as files."""
    names = []
    for name, pixels in (("picture.png", picture), ("mask.png", mask)):
        if pixels is not None:
            Image.fromarray(np.asarray(pixels, np.uint8)).save(tmp_path / name)
        names.append("" if pixels is None else str(tmp_path / name))
    return data.read_question(*names, shape)


def test_a_picture_and_its_mask_are_read_alike(tmp_path):
    """Known where white; both fitted to the network's size, grey or in three channels."""
    rng = np.random.default_rng(0)
    picture, mask = rng.integers(0, 256, (6, 6, 3)), 255 * (rng.random((6, 6)) < 0.5)
    x, known = ask(tmp_path, picture, mask, (3, 6, 6))
    assert_close(x[0], torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1)
    assert torch.equal(known[0, 0], torch.from_numpy(mask) == 255)
    x, known = ask(tmp_path, picture, None, (1, 6, 6))
    assert known is None
    assert_close(x[0, 0], torch.from_numpy(picture).float().mean(2) / 127.5 - 1, rtol=0, atol=1e-5)
    halves = np.repeat([[0, 255]], 6, 0).repeat(6, 1)  # 6 x 12, the middle 6 x 6 is cut out
    x, known = ask(tmp_path, np.stack([halves] * 3, 2), halves, (1, 3, 3))
    assert x.shape == known.shape == (1, 1, 3, 3)
    assert known[0, 0].tolist() in ([[False, False, True]] * 3, [[False, True, True]] * 3)
    x, known = ask(tmp_path, None, 255 * np.eye(4, 6), (1, 4, 6))
    assert x is None and known[0, 0].nonzero().tolist() == [[i, i] for i in range(4)]
    assert data.read_question("", "", (1, 4, 6)) == (None, None)


def test_a_turned_picture_has_the_size_that_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(np.repeat([[0], [255]], 2, 0).repeat(8, 1).astype(np.uint8)).save(
        tmp_path / "a.png", exif=exif)
    Image.fromarray(np.tri(8, 4, dtype=np.uint8) * 255).save(tmp_path / "m.png")
    x, known = data.read_question(str(tmp_path / "a.png"), str(tmp_path / "m.png"), (1, 4, 4))
    assert x.shape == (1, 1, 4, 4)
    assert x[0, 0].tolist() == [[1, 1, -1, -1]] * 4  # what is above lies to the right
    assert known[0, 0].tolist() == np.tri(8, 4, dtype=bool)[2:6].tolist()


def test_a_picture_and_its_mask_keep_their_middle(tmp_path):
    """A 4 x 8 picture is cut to the middle 4 x 4, then halved; where it is known goes along."""
    columns = np.tile([0, 0, 40, 40, 200, 200, 255, 255], (4, 1))
    x, known = ask(tmp_path, columns, 255 * (columns >= 200), (1, 2, 2))
    assert_close(x[0, 0, 0] * 127.5 + 127.5, torch.tensor([40.0, 200.0]), rtol=0, atol=25)
    assert known[0, 0].tolist() == [[False, True]] * 2
    x, known = ask(tmp_path, columns.T, 255 * (columns.T == 200), (1, 4, 4))
    wanted = torch.tensor([40.0, 40.0, 200.0, 200.0])[:, None].expand(4, 4) / 127.5 - 1
    assert_close(x[0, 0], wanted)
    assert torch.equal(known[0, 0], wanted > 0)


def test_a_grey_picture_is_three_equal_channels_for_a_network_of_three(tmp_path):
    grey = np.arange(16).reshape(4, 4) * 17
    x, _ = ask(tmp_path, grey, None, (3, 4, 4))
    assert x.shape == (1, 3, 4, 4) and x.min() == -1 and x.max() == 1
    assert_close(x, (torch.from_numpy(grey) / 127.5 - 1).float().expand(1, 3, 4, 4))


def test_a_mask_of_16_bits_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 9000], [40000, 65535]], np.uint16)).save(tmp_path / "m.png")
    _, known = data.read_question("", str(tmp_path / "m.png"), (1, 2, 2))
    assert known.tolist() == [[[[False, False], [True, True]]]]


def test_a_mask_is_known_where_it_is_nearer_to_white(tmp_path):
    _, known = ask(tmp_path, None, [[0, 127], [128, 255]], (1, 2, 2))
    assert known.dtype == torch.bool and known.tolist() == [[[[False, False], [True, True]]]]


@pytest.mark.parametrize("picture, mask, words", [
    (np.zeros((5, 6)), np.eye(6), "mask mask.png: is 6 x 6 pixels, must be 6 x 5 like the picture"),
    (None, np.eye(5), "mask mask.png: is 5 x 5 pixels, must be 6 x 4"),
    (None, np.full((4, 6), 255), "mask mask.png: is white all over"),
    (None, np.zeros((4, 6)), "mask mask.png: is black all over")])
def test_a_mask_that_asks_nothing(picture, mask, words, tmp_path, monkeypatch):
    said = refused(ask, tmp_path, picture, mask).replace(f"{tmp_path}/", "")
    assert words in said


@pytest.mark.parametrize("flag", ["image", "mask"])
def test_what_is_no_picture(flag, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    for path in (tmp_path / "a.png", tmp_path, tmp_path / "none.png"):
        files = (str(path), "") if flag == "image" else ("", str(path))
        said = refused(data.read_question, *files, (1, 4, 6))
        assert said.startswith(f"{flag} {path}: cannot be read as a picture")


def test_masks_say_what_is_known():
    masks = data.make_masks(12, 20)
    shares = {name: mask.double().mean().item() for name, mask in masks.items()}
    assert all(mask.shape == (1, 1, 12, 20) and mask.dtype == torch.bool for mask in masks.values())
    assert shares["half"] == 0.5 and masks["half"][..., :10].all()
    assert shares["box"] == 0.75 and not masks["box"][0, 0, 3:9, 5:15].any()
    assert torch.equal(masks["border"], ~masks["box"])
    assert 0.2 < shares["pixels"] < 0.4
    many = data.make_masks(100, 100)["pixels"]
    assert many.double().mean() == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(many, data.make_masks(100, 100)["pixels"])
    odd = data.make_masks(5, 7)
    for mask in (odd["box"], odd["border"]):
        assert torch.equal(mask, mask.flip(2)) and torch.equal(mask, mask.flip(3))
    assert odd["border"].sum() == 3 * 3 and odd["half"].sum() == 5 * 4


def test_a_density_keeps_the_type_and_device_of_its_points():
    x = data.load_points("gaussians", n=10).train
    assert data.point_density("gaussians", x).dtype == torch.float32
    assert data.point_density("gaussians", x.double()).dtype == torch.float64
    assert data.point_density("gaussians", x).device == x.device
