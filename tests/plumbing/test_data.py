"""common/data.py: the bundled sets, points, downloads, their names, and data that has moved since a training."""

import gzip
import os
import shutil
import struct
import sys
import urllib.error

import ddpm_example as ddpm
from common import data, plotting
from common import run as runs
from common.cli import Mistake

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.datasets
from conftest import ROOT, open_run
from PIL import Image
from sklearn.datasets import load_digits
from torch.testing import assert_close


def refused(read, *args):
    """The message of the mistake with which read(*args) ends, one line."""
    with pytest.raises(Mistake) as stop:
        read(*args)
    said, = str(stop.value).splitlines()
    return said


def pixels(x):
    """Images in [-1, 1] as 8-bit pixels."""
    return x.add(1).mul(127.5).round().long()


# The bundled sets


@pytest.mark.slow
@pytest.mark.parametrize("name, parts, shape", [
    ("digits", ("train", "test"), (1, 28, 28)), ("color_digits", ("train", "test"), (3, 32, 32)),
    ("digits8", ("train_digits8", "test_digits8"), (1, 8, 8))])
def test_the_stored_splits_are_stratified_partitions(name, parts, shape):
    """No picture is left out or in both parts; a tenth of each class is held out; they are what is loaded."""
    stored = np.load(ROOT / "common" / "assets" / "mnist_5k.npz")
    train, test = (stored[part].astype(int) for part in parts)
    y = load_digits().target if name == "digits8" else stored["y"]
    x = load_digits().images / 8 - 1 if name == "digits8" else stored["x"] / 127.5 - 1
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(y)))
    for label in range(10):
        assert abs((y[test] == label).sum() - (y == label).sum() / 10) < 1
    found = data.load_images(name)
    assert found.train_labels.tolist() == y[train].tolist() and found.test_labels.tolist() == y[test].tolist()
    assert found.train_labels.dtype == torch.int64 and found.train.dtype == torch.float32
    assert found.classes == tuple("0123456789") and found.shape == found.test.shape[1:] == shape
    for part, i in ((found.train, train), (found.test, test)):
        part, i = (part[:500], i[:500]) if name == "color_digits" else (part, i)
        raw = torch.from_numpy(x[i]).float()[:, None]
        if name == "color_digits":  # from ground to ink, each channel follows the grey of its digit
            grey, ground = F.pad(raw + 1, (2, 2, 2, 2)), part[:, :, :1, :1]
            brightest = grey.flatten(1).argmax(1)
            span = (part - ground).flatten(2)[range(len(i)), :, brightest]
            span = span / grey.flatten(1).amax(1)[:, None]
            assert_close(part, ground + grey * span[..., None, None], atol=1e-5, rtol=0)
            assert span.std(0).min() > 0.1 and ground.std(0).min() > 0.05
        else:
            assert_close(part, raw)
    assert found.fingerprint() == data.load_images(name).fingerprint()


def test_a_larger_picture_has_its_digit_in_the_middle_and_a_smaller_one_is_not_mirrored():
    digits = data.load_images("digits")
    larger = data.load_images("digits", 32)
    for small, large in ((digits.train, larger.train), (digits.test, larger.test)):
        assert torch.equal(large[..., 2:-2, 2:-2], small)
        assert torch.equal(large, F.pad(small, (2, 2, 2, 2), mode="replicate"))
    assert_close(data.load_images("digits", 29).test[:, :, :-1, :-1], digits.test)
    halved = data.load_images("digits", 14).test
    assert halved.shape == (500, 1, 14, 14) and halved.min() >= -1.001 and halved.max() <= 1.001
    assert (halved - F.avg_pool2d(digits.test, 2)).abs().mean() < 0.08
    doubled = data.load_images("digits", 56).test
    assert (F.avg_pool2d(doubled, 2) - digits.test).abs().mean() < 0.05
    for size in (1, 2, 3):
        assert data.load_images("digits8", size).shape == (1, size, size)


def test_digits_need_no_library_that_is_slow_to_import(monkeypatch):
    for name in ("torchvision", "sklearn", "sklearn.datasets", "scipy", "matplotlib", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)  # an import fails
    data.load_images("digits", 32), data.load_images("color_digits")
    with pytest.raises(ImportError):
        data.load_images("digits8")


@pytest.mark.parametrize("name", data.POINTS)
def test_points_are_centred_and_of_about_unit_size(name):
    found = data.load_points(name, n=4000)
    assert found.train.shape == found.test.shape == (2000, 2) and found.train.dtype == torch.float32
    assert found.train.mean(0).abs().max() < 0.25 and 0.3 < found.train.std() < 1.5
    assert torch.equal(found.train, data.load_points(name, n=4000).train)
    assert len(torch.cat([found.train, found.test]).unique(dim=0)) == 4000  # none is in both parts


# Names


@pytest.mark.parametrize("read, name, words", [
    (data.load_images, "digit", ["the nearest is digits"]),
    (data.load_images, "Fashion-MNIST", ["the nearest is fashion_mnist"]),
    (data.load_images, "folder", ["the nearest is folder:PATH"]),
    (data.load_images, "Folder:/pictures", ["the nearest is folder:PATH"]),
    (data.load_images, "two_moons", ["which score_based_diffusion_example.py takes"]),
    (data.load_images, "csv:a.csv", ["the nearest is csv:PATH, which experiments/series.py takes"]),
    (data.load_data, "moons", ["the nearest is two_moons", "gaussians", "digits", "folder:PATH"]),
    (data.load_data, "sine", ["the nearest is sines, which experiments/series.py takes"]),
    (data.load_points, "digits", ["must be one of swiss_roll"]),
    (data.load_images, "folder:", ["the nearest is folder:PATH"]),
    (data.load_images, "", ["must be one of"]),
    (data.load_images, "a\0b", ["must be one of"])])
def test_misspelt_names(read, name, words):
    said = refused(read, name)
    assert said.startswith(f"dataset {name}") and all(word in said for word in words)


def test_no_nearest_name_is_made_up_and_a_folder_without_the_word_is_recognised(tmp_path):
    assert "nearest" not in refused(data.load_images, "xyzzy")
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


@pytest.mark.parametrize("name, word, packed", [("mnist", "MNIST", True), ("fashion_mnist", "FashionMNIST", False)])
def test_files_put_by_hand_need_no_network(name, word, packed, offline):
    x, y, test_x, test_y = write_mnist(offline / word / "raw", packed)
    found = data.load_images(name)
    assert torch.equal(pixels(found.train), x[:, None]) and torch.equal(pixels(found.test), test_x[:, None])
    assert torch.equal(found.train_labels, y) and torch.equal(found.test_labels, test_y)
    assert len(found.classes) == 10 and data.load_images(name, 32).shape == (1, 32, 32)


def test_colours_come_first_and_rows_stay_rows(monkeypatch, offline):
    def stored(root, train, download):
        raw = np.random.default_rng(train).integers(0, 256, (6 if train else 3, 32, 32, 3), np.uint8)
        return type("CIFAR10", (), {"data": raw, "targets": [9, 8, 7] * (1 + train), "classes": list("abcdefghij")})

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", stored)
    found = data.load_images("cifar10")
    for part, train in ((found.train, True), (found.test, False)):
        raw = torch.from_numpy(stored("", train, False).data).long()
        assert torch.equal(pixels(part), raw.permute(0, 3, 1, 2))
    assert found.train_labels.tolist() == [9, 8, 7] * 2 and found.classes == tuple("abcdefghij")


@pytest.mark.parametrize("cut", [5, 100, -1])
def test_a_truncated_packed_file_is_named(offline, cut):
    write_mnist(offline / "MNIST" / "raw")
    file = offline / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:cut])
    assert str(file) in refused(data.load_images, "mnist")


@pytest.mark.parametrize("cut", [0, 10, 100])
def test_a_truncated_file_ends_with_one_line_or_is_unpacked_again(offline, cut):
    write_mnist(offline / "MNIST" / "raw", packed=False)
    file = offline / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    assert str(file.parent) in refused(data.load_images, "mnist")
    file.with_suffix(".gz").write_bytes(gzip.compress(whole))
    assert len(data.load_images("mnist").test) == 10
    assert len(list(file.parent.iterdir())) == 5  # no scratch is left


@pytest.mark.parametrize("name, folder, files", [
    ("mnist", "MNIST/raw", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]),
    ("fashion_mnist", "FashionMNIST/raw", ["train-labels-idx1-ubyte.gz"]),
    ("cifar10", "", ["cifar-10-python.tar.gz"])])
def test_without_network_it_is_said_which_files_go_where(name, folder, files, offline):
    said = refused(data.load_images, name)
    assert all(word in said for word in (str(offline / folder), *files, *data.OFFLINE))
    assert "no route to host" in said or name != "cifar10"  # an old torchvision keeps its reason


@pytest.mark.parametrize("problem", [RuntimeError("broken"), OSError("no space"), urllib.error.HTTPError(
    "http://x/y.gz", 404, "Not Found", None, None)])
def test_any_error_of_a_download_is_one_line(problem, offline, monkeypatch):
    def fails(*_, **__):
        raise problem

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fails)
    said = refused(data.load_images, "cifar10")
    assert "nor downloaded" in said and str(problem) in said


@pytest.mark.parametrize("name", data.DOWNLOADED)
def test_a_data_folder_that_cannot_be_written(name, tmp_path, offline, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(data, "CACHE", tmp_path / "file" / "data")
    said = refused(data.load_images, name)
    assert f"{tmp_path / 'file' / 'data'}" in said and "Not a directory" in said


# A network and its data: elsewhere, with other classes or other pictures than were trained


def make_pictures(folder, classes=("a_black", "b_white"), n=8):
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(n):
            Image.new("RGB", (16, 16), (30 + 190 * i + k,) * 3).save(folder / name / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a folder of pictures, whose path was relative: (its run folder, the pictures' folder)."""
    place = tmp_path_factory.mktemp("trained")
    pictures = make_pictures(place / "pics")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        flags = "--image_size", 16, "--steps", 2, "--attention"
        cfg, run, found = open_run(ddpm, place, "--dataset", "folder:pics", *flags)
        ddpm.train(cfg, run, found)
    return run.folder, pictures


@pytest.fixture
def moved(trained, tmp_path):
    """Copies of both, the pictures at another place: (run folder, pictures)."""
    shutil.copytree(trained[0], tmp_path / "run")
    shutil.copytree(trained[1], tmp_path / "elsewhere")
    return tmp_path / "run", tmp_path / "elsewhere"


def opened(tmp_path, *argv):
    """(cfg, run, data) of ddpm's command line, read from its checkpoint."""
    argv = ["--out", str(tmp_path / "out"), *map(str, argv)]
    cfg, run = runs.open_run("ddpm", ddpm.Config, ddpm.PRESETS, ddpm.SAMPLING, argv)
    return cfg, run, run.load(data.load_images, cfg.dataset, cfg.image_size)


@pytest.mark.parametrize("how", ["--sample", "--resume"])
@pytest.mark.parametrize("spelling", [None, "{}/../elsewhere/", "elsewhere"])
def test_a_path_is_a_place(how, spelling, moved, trained, tmp_path, monkeypatch):
    """Without --dataset it is where it was in training, from whatever folder one looks."""
    run_folder, pictures = moved
    monkeypatch.chdir(tmp_path)
    given = ["--dataset", "folder:" + spelling.format(pictures)] if spelling else []
    cfg, _, found = opened(tmp_path, how, run_folder, *given)
    assert cfg.dataset == f"folder:{pictures if spelling else trained[1]}" and found.classes == ("a_black", "b_white")
    assert len(found.train) + len(found.test) == 16


@pytest.mark.parametrize("how", ["--sample", "--resume"])
@pytest.mark.parametrize("dataset", ["digits8", "csv:x.csv"])
def test_another_kind_of_data_is_refused(how, dataset, moved, tmp_path):
    with pytest.raises(Mistake, match=f"dataset {dataset}: .* was made with folder:"):
        opened(tmp_path, how, moved[0], "--dataset", dataset)


def test_without_its_data_a_run_draws_and_names_what_is_left_out(moved, tmp_path, capsys, trained, drawings):
    run_folder, _ = moved
    away = trained[1].with_name("away")
    os.rename(trained[1], away)
    try:
        ddpm.main(["--sample", str(run_folder), "--out", str(tmp_path / "out")])
        said = capsys.readouterr().out
        assert "cannot be read" in said and "drawn without it" in said
        assert "without data there is no loss.png" in said.splitlines()[-1]
        assert {"samples.png", "denoising.gif"} <= set(drawings) and "loss.png" not in drawings
        for how in (["--resume", run_folder], ["--sample", run_folder, "--evaluate", 20]):
            with pytest.raises(Mistake, match="cannot be read"):
                opened(tmp_path, *how)
    finally:
        os.rename(away, trained[1])
        plotting.left_out.clear()


@pytest.mark.parametrize("change", ["renamed", "another"])
def test_other_classes_than_were_trained_are_said(change, moved, tmp_path, capsys):
    run_folder, pictures = moved
    if change == "renamed":
        os.rename(pictures / "a_black", pictures / "z_black")
    else:
        make_pictures(pictures, ["cats"])
    classes = "b_white, z_black" if change == "renamed" else "a_black, b_white, cats"
    words = f"holds other classes than were trained: {classes}; trained: a_black, b_white"
    _, _, found = opened(tmp_path, "--sample", run_folder, "--dataset", f"folder:{pictures}")
    assert found.empty and found.classes == ("a_black", "b_white") and found.shape == (3, 16, 16)
    assert words in capsys.readouterr().out
    with pytest.raises(Mistake, match=words):
        opened(tmp_path, "--resume", run_folder, "--dataset", f"folder:{pictures}")


def test_other_pictures_are_said_when_a_run_goes_on_and_another_resolution_is_refused(moved, tmp_path, capsys):
    run_folder, pictures = moved
    argv = "--resume", run_folder, "--dataset", f"folder:{pictures}"
    opened(tmp_path, *argv)
    assert "training examples" not in capsys.readouterr().out
    Image.new("RGB", (16, 16), "red").save(pictures / "a_black" / "new.png")
    opened(tmp_path, *argv)
    assert "are not the 1" in capsys.readouterr().out
    state = torch.load(run_folder / "checkpoint.pt")
    assert state["data"]["shape"] == [3, 16, 16] and state["data"]["n"] > 8
    state["data"]["shape"] = [3, 8, 8]
    torch.save(state, run_folder / "checkpoint.pt")
    with pytest.raises(Mistake, match=r"shape \(3, 16, 16\), the network was trained on \(3, 8, 8\)"):
        opened(tmp_path, *argv)


@pytest.mark.parametrize("byte", [0.3, 0.6, 0.9])
def test_a_flipped_bit_in_the_weights_is_seen(byte, moved, tmp_path):
    file = moved[0] / "checkpoint.pt"
    content = bytearray(file.read_bytes())
    content[int(byte * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(Mistake, match="damaged"):
        opened(tmp_path, "--sample", moved[0])
