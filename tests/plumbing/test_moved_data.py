"""Data that lies elsewhere, holds other classes or other pictures than were trained."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import open_run
from PIL import Image

import ddpm_example as ddpm
from common import plotting
from common import run as runs
from common.cli import Mistake
from common.data import load_images

FLAGS = ["--image_size", "16", "--steps", "2", "--attention"]


def make_pictures(folder, classes=("a_black", "b_white"), n=8):
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(n):
            pixels = np.full((16, 16, 3), 30 + 190 * i + k, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a folder of pictures: (its run folder, the pictures' folder)."""
    place = tmp_path_factory.mktemp("trained")
    pictures = make_pictures(place / "pics")
    cfg, run, data = open_run(ddpm, place, "--dataset", f"folder:{pictures}", *FLAGS)
    ddpm.train(cfg, run, data)
    return run.folder, pictures


@pytest.fixture
def moved(trained, tmp_path):
    """Copies of both, the pictures at another place: (run folder, pictures)."""
    folder, pictures = trained
    shutil.copytree(folder, tmp_path / "run")
    shutil.copytree(pictures, tmp_path / "elsewhere")
    return tmp_path / "run", tmp_path / "elsewhere"


def opened(tmp_path, *argv):
    """(cfg, run, data) of ddpm's command line, read from its checkpoint."""
    argv = ["--out", str(tmp_path / "out"), *map(str, argv)]
    cfg, run = runs.open_run("ddpm", ddpm.Config, ddpm.PRESETS, ddpm.SAMPLING, argv)
    return cfg, run, run.load(load_images, cfg.dataset, cfg.image_size)


@pytest.mark.parametrize("how", ["--sample", "--resume"])
@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/../elsewhere", "elsewhere"])
def test_a_path_is_a_place(how, spelling, moved, tmp_path, monkeypatch):
    run_folder, pictures = moved
    monkeypatch.chdir(tmp_path)
    cfg, _, data = opened(tmp_path, how, run_folder, "--dataset", "folder:" + spelling.format(pictures))
    assert cfg.dataset == f"folder:{pictures}" and data.classes == ("a_black", "b_white")
    assert len(data.train) + len(data.test) == 16


def test_a_relative_path_is_found_from_another_folder(tmp_path, monkeypatch):
    make_pictures(tmp_path / "pics")
    monkeypatch.chdir(tmp_path)
    cfg, run, data = open_run(ddpm, tmp_path, "--dataset", "folder:pics", *FLAGS)
    ddpm.train(cfg, run, data)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for how in ("--sample", "--resume"):
        _, _, again = opened(tmp_path, how, run.folder)
        assert torch.equal(again.train, data.train)


@pytest.mark.parametrize("how", ["--sample", "--resume"])
@pytest.mark.parametrize("dataset", ["digits8", "csv:x.csv"])
def test_another_kind_of_data_is_refused(how, dataset, moved, tmp_path):
    with pytest.raises(Mistake, match=f"dataset {dataset}: .* was made with folder:"):
        opened(tmp_path, how, moved[0], "--dataset", dataset)


def test_without_its_data_a_run_draws_and_names_what_is_left_out(moved, tmp_path, capsys, trained):
    run_folder, _ = moved
    away = trained[1].with_name("away")
    os.rename(trained[1], away)
    try:
        ddpm.main(["--sample", str(run_folder), "--out", str(tmp_path / "out")])
        said = capsys.readouterr().out
        assert "cannot be read" in said and "drawn without it" in said
        assert "without data there is no loss.png" in said.splitlines()[-1]
        drawn = {file.name for file in (tmp_path / "out").rglob("*.*")}
        assert {"samples.png", "denoising.gif", "metrics.json"} <= drawn and "loss.png" not in drawn
        with pytest.raises(Mistake, match="cannot be read"):
            opened(tmp_path, "--resume", run_folder)
        with pytest.raises(Mistake, match="cannot be read"):
            opened(tmp_path, "--sample", run_folder, "--evaluate", 20)
    finally:
        os.rename(away, trained[1])
        plotting.left_out.clear()


@pytest.mark.parametrize("change", ["renamed", "another"])
def test_other_classes_than_were_trained_are_said(change, moved, tmp_path, capsys):
    run_folder, pictures = moved
    if change == "renamed":
        os.rename(pictures / "a_black", pictures / "z_black")
        classes = "b_white, z_black"
    else:
        make_pictures(pictures, ["cats"])
        classes = "a_black, b_white, cats"
    words = f"holds other classes than were trained: {classes}; trained: a_black, b_white"
    _, _, data = opened(tmp_path, "--sample", run_folder, "--dataset", f"folder:{pictures}")
    assert data.empty and data.classes == ("a_black", "b_white") and data.shape == (3, 16, 16)
    assert words in capsys.readouterr().out
    with pytest.raises(Mistake, match=words):
        opened(tmp_path, "--resume", run_folder, "--dataset", f"folder:{pictures}")


def test_other_pictures_are_said_when_a_run_goes_on(moved, tmp_path, capsys):
    run_folder, pictures = moved
    argv = "--resume", run_folder, "--dataset", f"folder:{pictures}"
    opened(tmp_path, *argv)
    assert "training examples" not in capsys.readouterr().out
    Image.new("RGB", (16, 16), "red").save(pictures / "a_black" / "new.png")
    opened(tmp_path, *argv)
    assert "are not the 1" in capsys.readouterr().out


def test_another_resolution_is_another_network(moved, tmp_path):
    state = torch.load(moved[0] / "checkpoint.pt")
    assert state["data"]["shape"] == [3, 16, 16] and state["data"]["n"] > 8
    state["data"]["shape"] = [3, 8, 8]
    torch.save(state, moved[0] / "checkpoint.pt")
    with pytest.raises(Mistake, match=r"shape \(3, 16, 16\), the network was trained on \(3, 8, 8\)"):
        opened(tmp_path, "--resume", moved[0], "--dataset", f"folder:{moved[1]}")


@pytest.mark.parametrize("byte", [0.3, 0.6, 0.9])
def test_a_flipped_bit_in_the_weights_is_seen(byte, moved, tmp_path):
    file = moved[0] / "checkpoint.pt"
    content = bytearray(file.read_bytes())
    content[int(byte * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(Mistake, match="damaged"):
        opened(tmp_path, "--sample", moved[0])
