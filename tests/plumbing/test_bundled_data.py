"""The bundled data sets, folders and downloads."""

import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image

from common import data, quality
from common.cli import Mistake


def test_digits_split_is_fixed_and_stratified():
    digits = data.load_images("digits")
    assert digits.train.shape == (4500, 1, 28, 28) and digits.test.shape == (500, 1, 28, 28)
    assert digits.train.dtype == torch.float32 and digits.train_labels.dtype == torch.int64
    assert digits.train.min() == -1 and digits.train.max() == 1
    assert torch.bincount(digits.test_labels).tolist() == [50] * 10
    assert torch.bincount(digits.train_labels).tolist() == [450] * 10
    again = data.load_images("digits")
    assert torch.equal(digits.test, again.test) and torch.equal(digits.train, again.train)
    # no held-out picture is a training picture
    assert quality.nearest_neighbours(digits.test, digits.train)[1].min() > 0


@pytest.mark.parametrize("name, shape", [("digits8", (1, 8, 8)), ("color_digits", (3, 32, 32))])
def test_other_bundled_images(name, shape):
    found = data.load_images(name)
    assert found.train.shape[1:] == shape and len(found.classes) == 10
    assert -1 <= found.train.min() < -0.5 and 0.5 < found.train.max() <= 1
    assert abs(len(found.test) / (len(found.train) + len(found.test)) - 0.1) < 0.01
    assert torch.equal(found.train, data.load_images(name).train)


@pytest.mark.parametrize("size", [14, 32, 40])
def test_images_are_resized_on_request(size):
    found = data.load_images("digits", size)
    assert found.train.shape[1:] == (1, size, size)
    assert found.train.min() >= -1.001 and found.train.max() <= 1.001


def pictures(folder, n, size=(40, 30), suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.full((size[1], size[0], 3), 20 * i % 256, dtype=np.uint8)
        pixels[:, : size[0] // 2, 0] = 255
        Image.fromarray(pixels).save(folder / f"{i:03}{suffix}")


def test_flat_folder(tmp_path):
    pictures(tmp_path / "flat", 12)
    found = data.load_images(f"folder:{tmp_path / 'flat'}", 16)
    assert len(found.train) + len(found.test) == 12 and 1 <= len(found.test) <= 3
    assert found.train.shape[1:] == found.test.shape[1:] == (3, 16, 16)
    assert found.train_labels is None and -1 <= found.train.min() and found.train.max() <= 1
    assert found.train[:, 0, :, 0].min() > 0.9 and found.train[:, 0, :, -1].max() < 0.9


def test_nested_folder_gives_classes(tmp_path):
    pictures(tmp_path / "cats", 5)
    pictures(tmp_path / "dogs", 7, suffix=".jpg")
    found = data.load_images(f"folder:{tmp_path}", 8)
    assert found.classes == ("cats", "dogs")
    labels = torch.cat([found.train_labels, found.test_labels])
    assert torch.bincount(labels).tolist() == [5, 7]


def test_broken_picture_is_named_and_skipped(tmp_path, capsys):
    pictures(tmp_path, 6)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    whole = (tmp_path / "000.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    found = data.load_images(f"folder:{tmp_path}", 8)
    assert len(found.train) + len(found.test) == 6
    out = capsys.readouterr()
    said = (out.out + out.err).strip().splitlines()
    assert len(said) == 1 and "2" in said[0] and "broken.png" in said[0] and "cut.png" in said[0]


@pytest.mark.parametrize("name", data.POINTS)
def test_points_are_centred_and_of_about_unit_size(name):
    found = data.load_points(name, n=4000)
    assert found.train.shape == (2000, 2) and found.train.dtype == torch.float32
    assert found.train.mean(0).abs().max() < 0.25
    assert 0.3 < found.train.std() < 1.5
    assert torch.equal(found.train, data.load_points(name, n=4000).train)


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"),
                                        ("cifar10", "CIFAR10")])
def test_downloaded_sets_have_the_shape_of_the_others(name, kind, tmp_path, monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(data, "CACHE", tmp_path)

    class Stored:
        classes = list("0123456789")

        def __init__(self, root, train, download):
            n = 20 if train else 10
            grey = torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8)
            colour = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
            self.data = colour if kind == "CIFAR10" else grey
            self.targets = list(range(10)) * (n // 10)

    monkeypatch.setattr(torchvision.datasets, kind, Stored)
    found = data.load_images(name)
    shape = (3, 32, 32) if kind == "CIFAR10" else (1, 28, 28)
    assert found.train.shape == (20, *shape) and found.test.shape == (10, *shape)
    assert -1 <= found.train.min() < -0.9 and 0.9 < found.train.max() <= 1
    assert found.train_labels.tolist() == list(range(10)) * 2


@pytest.mark.parametrize("problem", [urllib.error.URLError("no network"), RuntimeError("broken"),
                                     OSError("no space")])
def test_download_without_network_names_the_bundled_sets(tmp_path, monkeypatch, problem):
    import torchvision.datasets

    monkeypatch.setattr(data, "CACHE", tmp_path)

    def offline(*_, **__):
        raise problem

    monkeypatch.setattr(torchvision.datasets, "MNIST", offline)
    with pytest.raises(Mistake) as mistake:
        data.load_images("mnist")
    assert all(name in str(mistake.value) for name in data.OFFLINE)
