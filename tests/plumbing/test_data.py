"""common/data.py: the bundled sets, points, downloads, their names, and data that has moved since a training."""

import functools
import gzip
import os
import shutil
import struct
import sys
import urllib.error
from types import SimpleNamespace

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


load = functools.cache(data.load_images)


@pytest.mark.parametrize("name, suffix, shape", [
    ("digits", "", (1, 28, 28)), ("color_digits", "", (3, 32, 32)), ("digits8", "_digits8", (1, 8, 8))])
def test_the_stored_splits_are_stratified_partitions(name, suffix, shape):
    """No picture is left out or in both parts; a tenth of each class is held out; they are what is loaded."""
    stored, eight = np.load(ROOT / "common" / "assets" / "mnist_5k.npz"), load_digits()
    x, y = (eight.images / 8 - 1, eight.target) if suffix else (stored["x"] / 127.5 - 1, stored["y"])
    train, test = (stored[part + suffix].astype(int) for part in ("train", "test"))
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(y)))
    assert np.abs(np.bincount(y[test]) - np.bincount(y) / 10).max() < 1
    found = load(name)
    assert found.classes == tuple("0123456789") and found.shape == found.test.shape[1:] == shape
    for part, labels, i in ((found.train, found.train_labels, train), (found.test, found.test_labels, test)):
        assert labels.tolist() == y[i].tolist() and labels.dtype == torch.int64 and part.dtype == torch.float32
        part, wanted = part[:300], torch.from_numpy(x[i[:300]]).float()[:, None]
        if name == "color_digits":  # from ground to ink, each channel follows the grey of its digit
            grey, ground = F.pad(wanted + 1, (2, 2, 2, 2)) / 2, part[:, :, :1, :1]
            brightest = grey.flatten(1).max(1)
            span = (part - ground).flatten(2)[range(300), :, brightest.indices] / brightest.values[:, None]
            assert span.std(0).min() > 0.1 and ground.std(0).min() > 0.05
            wanted = ground + grey * span[..., None, None]
        assert_close(part, wanted, atol=1e-5, rtol=0)


def test_a_larger_picture_has_its_digit_in_the_middle_and_a_smaller_one_is_not_mirrored():
    digits, larger = data.load_images("digits8"), data.load_images("digits8", 10)
    for small, large in ((digits.train, larger.train), (digits.test, larger.test)):
        assert torch.equal(large, F.pad(small, (1, 1, 1, 1), mode="replicate"))
    assert torch.equal(data.load_images("digits8", 9).test[:, :, :-1, :-1], digits.test)
    halved, doubled = (data.load_images("digits8", size).test for size in (4, 16))
    assert halved.shape[1:] == (1, 4, 4) and halved.min() >= -1.001 and halved.max() <= 1.001
    assert (halved - F.avg_pool2d(digits.test, 2)).abs().mean() < 0.25
    assert (F.avg_pool2d(doubled, 2) - digits.test).abs().mean() < 0.25
    assert data.load_images("digits8", 1).shape == (1, 1, 1)


def test_digits_need_no_library_that_is_slow_to_import(monkeypatch):
    for name in ("torchvision", "sklearn", "sklearn.datasets", "scipy", "matplotlib", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)  # an import fails
    torch.manual_seed(1)  # which changes no data
    for name in ("digits", "color_digits"):
        assert torch.equal(data.load_images(name).test, load(name).test)  # the same each time
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
    (data.load_images, "digit", "the nearest is digits"),
    (data.load_images, "Fashion-MNIST", "the nearest is fashion_mnist"),
    (data.load_images, "folder", "the nearest is folder:PATH"),
    (data.load_images, "Folder:/pictures", "the nearest is folder:PATH"),
    (data.load_images, "folder:", "the nearest is folder:PATH"),
    (data.load_images, "two_moons", "which score_based_diffusion_example.py takes"),
    (data.load_images, "csv:a.csv", "the nearest is csv:PATH, which experiments/series.py takes"),
    (data.load_data, "moons", "digits, digits8, color_digits, mnist, fashion_mnist, cifar10, folder:PATH, swiss_roll, "
     "two_moons, gaussians; the nearest is two_moons"),
    (data.load_points, "digits", "must be one of swiss_roll, two_moons, gaussians; the nearest is digits"),
    (data.load_images, "", "must be one of"), (data.load_images, "a\0b", "must be one of")])
def test_misspelt_names(read, name, words):
    said = refused(read, name)
    assert said.startswith(f"dataset {name}") and words in said
    assert ("nearest" in said) == ("nearest" in words or "takes" in words)  # none is made up


def test_a_folder_without_the_word_is_recognised(tmp_path):
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


def write_mnist(folder, packed=True):
    """Four small files in the format of MNIST; the pictures and labels in them."""
    folder.mkdir(parents=True)
    rng, arrays = np.random.default_rng(0), []
    for part, count in (("train", 20), ("t10k", 10)):
        for what, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            array = rng.integers(0, 256 if len(shape) > 1 else 10, shape, dtype=np.uint8)
            raw = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + array.tobytes()
            name = f"{part}-{what}-ubyte" + (".gz" if packed else "")
            (folder / name).write_bytes(gzip.compress(raw) if packed else raw)
            arrays.append(torch.from_numpy(array.astype(np.int64)))
    return arrays


@pytest.mark.parametrize("name, word, packed", [("mnist", "MNIST", True), ("fashion_mnist", "FashionMNIST", False)])
def test_files_put_by_hand_need_no_network(name, word, packed, offline):
    x, y, test_x, test_y = write_mnist(offline / word / "raw", packed)
    found = data.load_images(name)
    assert torch.equal(pixels(found.train), x[:, None]) and torch.equal(pixels(found.test), test_x[:, None])
    assert torch.equal(found.train_labels, y) and torch.equal(found.test_labels, test_y) and len(found.classes) == 10


def test_colours_come_first_and_rows_stay_rows(monkeypatch, offline):
    parts = {train: np.random.default_rng(train).integers(0, 256, (3, 32, 32, 3), np.uint8) for train in (True, False)}

    def stored(root, train, download):
        return SimpleNamespace(data=parts[train], targets=[9, 8, 7] if train else [1, 2, 3], classes=list("abcdefghij"))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", stored)
    found = data.load_images("cifar10")
    for part, train in ((found.train, True), (found.test, False)):
        assert np.array_equal(pixels(part), parts[train].transpose(0, 3, 1, 2))
    assert found.train_labels.tolist() == [9, 8, 7] and found.test_labels.tolist() == [1, 2, 3]
    assert found.classes == tuple("abcdefghij")


@pytest.mark.parametrize("cut", [5, 100, -1])
def test_a_truncated_file_is_named_or_unpacked_again(offline, cut):
    write_mnist(offline / "MNIST" / "raw", packed=False)
    file = offline / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    whole, gz = file.read_bytes(), file.with_suffix(".gz")
    file.write_bytes(whole[:cut])
    assert str(file.parent) in refused(data.load_images, "mnist")
    gz.write_bytes(gzip.compress(whole))
    assert len(data.load_images("mnist").test) == 10
    assert len(list(file.parent.iterdir())) == 5  # no scratch is left
    gz.write_bytes(gz.read_bytes()[:cut])
    assert str(gz) in refused(data.load_images, "mnist")


@pytest.mark.parametrize("name, folder, files", [
    ("mnist", "MNIST/raw", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]),
    ("fashion_mnist", "FashionMNIST/raw", ["train-labels-idx1-ubyte.gz"]),
    ("cifar10", "", ["cifar-10-python.tar.gz"])])
def test_without_network_it_is_said_which_files_go_where(name, folder, files, offline, tmp_path, monkeypatch):
    said = refused(data.load_images, name)
    assert all(word in said for word in (str(offline / folder), *files, *data.OFFLINE))
    assert "no route to host" in said or name != "cifar10"  # an old torchvision keeps its reason
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(data, "CACHE", tmp_path / "file" / "data")  # a folder that cannot be written
    said = refused(data.load_images, name)
    assert f"{tmp_path / 'file' / 'data'}" in said and "Not a directory" in said


@pytest.mark.parametrize("problem", [RuntimeError("broken"), urllib.error.HTTPError(
    "http://x/y.gz", 404, "Not Found", None, None)])
def test_any_error_of_a_download_is_one_line(problem, offline, monkeypatch):
    def fails(*_, **__):
        raise problem

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fails)
    assert f"nor downloaded ({problem})" in refused(data.load_images, "cifar10")


# A network and its data: elsewhere, with other classes or other pictures than were trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a folder of pictures, whose path was relative: (its run folder, the pictures' folder)."""
    place = tmp_path_factory.mktemp("trained")
    for name, shade in (("a_black", 30), ("b_white", 220)):
        (place / "pics" / name).mkdir(parents=True)
        for k in range(8):
            Image.new("RGB", (8, 8), (shade + k,) * 3).save(place / "pics" / name / f"{k}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        cfg, run, found = open_run(ddpm, place, "--dataset", "folder:pics", "--image_size", 8, "--steps", 1)
        ddpm.train(cfg, run, found)
    return run.folder, place / "pics"


@pytest.fixture
def moved(trained, tmp_path):
    """Copies of both, the pictures at another place: (run folder, pictures)."""
    shutil.copytree(trained[0], tmp_path / "run")
    shutil.copytree(trained[1], tmp_path / "elsewhere")
    return tmp_path / "run", tmp_path / "elsewhere"


def opened(tmp_path, how, run_folder, dataset="", *argv):
    """(cfg, run, data) of ddpm's command line, read from its checkpoint."""
    argv = ["--out", str(tmp_path / "out"), how, str(run_folder), *(["--dataset", dataset] if dataset else []), *argv]
    cfg, run = runs.open_run("ddpm", ddpm.Config, ddpm.PRESETS, ddpm.SAMPLING, argv)
    return cfg, run, run.load(data.load_images, cfg.dataset, cfg.image_size)


@pytest.mark.parametrize("how, spelling", [
    ("--sample", ""), ("--resume", ""), ("--sample", "folder:{}/../elsewhere/"), ("--resume", "folder:elsewhere")])
def test_a_path_is_a_place(how, spelling, moved, trained, tmp_path, monkeypatch):
    """Without --dataset it is where it was in training, from whatever folder one looks."""
    run_folder, pictures = moved
    monkeypatch.chdir(tmp_path)
    cfg, _, found = opened(tmp_path, how, run_folder, spelling.format(pictures))
    assert cfg.dataset == f"folder:{pictures if spelling else trained[1]}" and found.classes == ("a_black", "b_white")
    assert len(found.train) + len(found.test) == 16


@pytest.mark.parametrize("how, dataset", [("--sample", "csv:x.csv"), ("--resume", "digits8"), ("--sample", "digits8")])
def test_another_kind_of_data_is_refused(how, dataset, moved, tmp_path):
    with pytest.raises(Mistake, match=f"dataset {dataset}: .* was made with folder:"):
        opened(tmp_path, how, moved[0], dataset)


def test_without_its_data_a_run_draws_and_names_what_is_left_out(moved, tmp_path, capsys, monkeypatch, drawings):
    run_folder, _ = moved
    monkeypatch.setattr(plotting, "left_out", {})
    state = torch.load(run_folder / "checkpoint.pt")
    state["config"]["dataset"] = f"folder:{tmp_path / 'deleted'}"
    torch.save(state, run_folder / "checkpoint.pt")
    ddpm.main(["--sample", str(run_folder), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "cannot be read" in said and "drawn without it" in said
    assert "without data there is no loss.png" in said.splitlines()[-1]
    assert {"samples.png", "denoising.gif"} <= set(drawings) and "loss.png" not in drawings
    for argv in (["--resume", run_folder], ["--sample", run_folder, "", "--evaluate", "20"]):
        with pytest.raises(Mistake, match="cannot be read"):
            opened(tmp_path, *argv)


def test_other_pictures_classes_or_sizes_than_were_trained_are_said(moved, tmp_path, capsys):
    run_folder, pictures = moved
    opened(tmp_path, "--resume", run_folder, f"folder:{pictures}")
    assert "training examples" not in capsys.readouterr().out
    for i in range(4):  # of which not all are held out
        Image.new("RGB", (8, 8), "red").save(pictures / "a_black" / f"new {i}.png")
    opened(tmp_path, "--resume", run_folder, f"folder:{pictures}")
    state = torch.load(run_folder / "checkpoint.pt")
    assert f"are not the {state['data']['n']} that the run began with" in capsys.readouterr().out
    assert state["data"]["shape"] == [3, 8, 8] and 8 < state["data"]["n"] < 16
    os.rename(pictures / "a_black", pictures / "z_black")
    words = "holds other classes than were trained: b_white, z_black; trained: a_black, b_white"
    _, _, found = opened(tmp_path, "--sample", run_folder, f"folder:{pictures}")
    assert found.empty and found.classes == ("a_black", "b_white") and found.shape == (3, 8, 8)
    assert words in capsys.readouterr().out
    with pytest.raises(Mistake, match=words):
        opened(tmp_path, "--resume", run_folder, f"folder:{pictures}")
    state["data"]["shape"] = [3, 16, 16]
    torch.save(state, run_folder / "checkpoint.pt")
    with pytest.raises(Mistake, match=r"shape \(3, 8, 8\), the network was trained on \(3, 16, 16\)"):
        opened(tmp_path, "--resume", run_folder, f"folder:{pictures}")
