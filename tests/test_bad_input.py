"""A user's mistake ends with one line that names it, exit status 2, and nothing written."""

import json
import os
import shutil
import urllib.error
import zipfile

import ddpm_example as ddpm
from common import cli
from common.checkpoints import FORMAT

import pytest
import torch
from conftest import open_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of ddpm with a checkpoint, made by two steps of training."""
    out = tmp_path_factory.mktemp("trained")
    cfg, run, data = open_run(ddpm, out, "--steps", 2)
    ddpm.train(cfg, run, data)
    return run.folder


def refused(capsys, tmp_path, *argv, main=ddpm.main, out=None):
    """Run a script that must refuse; its one line of complaint. Nothing may be written."""
    out = tmp_path / "out" if out is None else out
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        preset = [] if "--preset" in argv else ["--preset", "smoke"]
        main([*preset, "--out", str(out), *map(str, argv)])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    said = captured.err.strip().splitlines()
    assert len(said) == 1, captured.err
    assert said[0].startswith("error: ")
    assert sorted(p for p in tmp_path.rglob("*")) == before, "something was written"
    return said[0]


@pytest.mark.slow
@pytest.mark.parametrize("argv, words", [
    (["--no_such_flag", "1"], ["--no_such_flag", "no such flag"]),
    (["--chanels", "8"], ["--chanels: no such flag", "--channels"]),
    (["--batchsize", "8"], ["--batchsize: no such flag", "--batch_size"]),
    (["surplus"], ["surplus"]),
    (["--preset", "huge"], ["--preset huge", "laptop", "smoke", "paper"]),
    (["--dataset", "birds"], ["--dataset birds", "digits", "folder:PATH"]),
    (["--device", "tpu"], ["--device tpu", "auto", "cpu", "cuda", "mps"]),
    (["--T", "many"], ["--T", "many"]),
    (["--T", "1.5"], ["--T", "1.5"]),
    (["--T"], ["--T"]),
    (["--lr", "fast"], ["--lr", "fast"]),
    (["--mults", "1", "x"], ["--mults", "x"]),
    (["--T", "0"], ["--T 0", "in [1, 1e6]"]),
    (["--T", "-5"], ["--T -5", "in [1, 1e6]"]),
    (["--lr", "-0.001"], ["--lr -0.001", "> 0"]),
    (["--lr", "0"], ["--lr 0", "> 0"]),
    (["--lr", "nan"], ["--lr nan", "> 0"]),
    (["--lr", "inf"], ["--lr inf"]),
    (["--batch_size", "0"], ["--batch_size 0", ">= 1"]),
    (["--batch-size", "-1"], ["--batch_size -1", ">= 1"]),
    (["--beta_1", "0"], ["--beta_1 0", "in (0, 1)"]),
    (["--beta_1", "nan"], ["--beta_1 nan", "in (0, 1)"]),
    (["--beta_T", "1"], ["--beta_T 1", "in (0, 1)"]),
    (["--beta_T", "-0.1"], ["--beta_T -0.1", "in (0, 1)"]),
    (["--schedule", "square"], ["--schedule square", "linear", "cosine"]),
    (["--variance", "gamma"], ["--variance gamma", "beta", "beta_tilde"]),
    (["--decay", "step"], ["--decay step", "cosine", "constant"]),
    (["--image_size", "30"], ["--image_size 30", "28, 32"]),
    (["--image_size", "2"], ["--image_size 2", "4"]),
    (["--image_size", "-8"], ["--image_size -8", ">= 0"]),
    (["--mults", "1", "2", "2", "2"], ["28", "16", "32"]),
    (["--mults"], ["--mults"]),
    (["--mults", "1", "0"], ["--mults 1 0", ">= 1"]),
    (["--heads", "3"], ["--heads 3: must divide channels 8"]),
    (["--heads", "0"], ["--heads 0", ">= 1"]),
    (["--groups", "3"], ["--groups 3: must divide channels 8"]),
    (["--channels", "0"], ["--channels 0", ">= 4"]),
    (["--channels", "5", "--groups", "1"], ["--channels 5", "even"]),
    (["--dropout", "1"], ["--dropout 1", "in [0, 1)"]),
    (["--ema", "1"], ["--ema 1", "in [0, 1)"]),
    (["--grad_clip", "0"], ["--grad_clip 0", "> 0"]),
    (["--weight_decay", "-1"], ["--weight_decay -1", ">= 0"]),
    (["--warmup", "-1"], ["--warmup -1", ">= 0"]),
    (["--steps", "0"], ["--steps 0", ">= 1"]),
    (["--n_samples", "0"], ["--n_samples 0", "in [1, 1e6]"]),
    (["--preview_every", "0"], ["--preview_every 0", ">= 1"]),
    (["--amp", "fp8"], ["--amp fp8", "off", "bf16", "fp16"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--seed", str(2**63)], [f"--seed {2**63}"]),
    (["--evaluate", "1"], ["--evaluate 1", "in [10, 1e6]"]),
    (["--resume", "--sample"], ["--resume", "--sample"]),
    (["--config", "/no/such/config.json"], ["--config /no/such/config.json"]),
    (["--sample", "/no/such/checkpoint.pt"], ["/no/such/checkpoint.pt"]),
    (["--resume", "/no/such/run"], ["/no/such/run"]),
    (["--resume"], ["--resume"]),
    (["--dataset", "folder:/no/such/folder"], ["--dataset folder:/no/such/folder"]),
    (["--dataset", "folder:"], ["folder:"]),
    (["--dataset", "moons"], ["--dataset moons", "two_moons", "score_based"]),
    (["--dataset", "sine"], ["--dataset sine", "nearest is sines, series", "score_based"]),
    (["--dataset", "csv:none.csv"], ["--dataset csv:none.csv", "csv:PATH, series", "score_based"]),
    (["--learning_rate", "1"], ["--learning_rate", "--lr"]),
    (["--steps", "3", "--steps=4"], ["--steps: is given 2 times"]),
    (["--batch_size", "3", "--batch-size", "3"], ["--batch-size: is given 2 times"]),
    (["--flip", "--no-flip"], ["--flip: is given 2 times"]),
    (["--T", "1000000000"], ["--T 1000000000: must be in [1, 1e6]"]),
    (["--steps", "1" + 400 * "0"], ["--steps 1000", "at most 1e9"]),
    (["--n_samples", "1" + 5000 * "0"], ["--n_samples"]),
    (["--channels", "1000000"], ["--channels 1000000: needs", "GB"]),
    (["--batch_size", "1000000000"], ["--batch_size 1000000000: needs", "GB"]),
    (["--blocks", "1000000"], ["--blocks 1000000: must be in [1, 100]"]),
    (["--evaluate", "1" + 30 * "0"], ["--evaluate 1000", "in [10, 1e6]"]),
    (["--sample", "a\0b"], ["--sample"]),
    (["--sample", 300 * "a"], ["--sample aaa", "no such checkpoint"]),
    (["--resume", 300 * "a"], ["--resume aaa"]),
], ids=lambda x: " ".join(x) if isinstance(x, list) and x and x[0][:2] == "--" else "")
def test_bad_flags(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # "folder:" alone is the current folder, here without pictures
    said = refused(capsys, tmp_path, *argv)
    for word in words:
        assert word in said, said
    assert len(said) < 400


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_absent_accelerator(kind, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    said = refused(capsys, tmp_path, "--device", kind)
    assert f"--device {kind}" in said and "cpu" in said


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_variable_of_torchrun_that_is_no_number(variable, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "abc")
    assert f"{variable}=abc" in refused(capsys, tmp_path)


def test_an_attention_that_no_level_has_is_said(capsys):
    cli.say_once.cache_clear()
    sizes = dict(image_size=28, channels=8, heads=1, groups=4, patch=2)
    ddpm.UNet(1, mults=(1, 2), attention=(7, 9), **sizes)
    said = capsys.readouterr().out
    assert "--attention 9 changes nothing" in said and "14 7" in said and len(said.splitlines()) == 1
    ddpm.UNet(1, mults=(1, 2), attention=(14, 7), **sizes)
    assert capsys.readouterr().out == ""


def test_a_script_is_named_by_its_file(capsys, tmp_path, trained):
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    for name, file in (("latent", "latent_diffusion_example.py"), ("no/such", "'no/such'")):
        torch.save(state | {"script": name}, tmp_path / "other.pt")
        said = refused(capsys, tmp_path, "--sample", tmp_path / "other.pt")
        assert f"made by {file}, this script reads ddpm_example.py" in said


def test_a_folder_name_that_cannot_be(capsys, tmp_path):
    said = refused(capsys, tmp_path, "--steps", 1, out="a\0b")
    assert "--out" in said and "a\\x00b" in said


def test_fp16_without_cuda(capsys, tmp_path):
    assert "--amp fp16" in refused(capsys, tmp_path, "--amp", "fp16", "--device", "cpu")


# Checkpoints


def foreign(kind, path, trained):
    """A file that is no checkpoint of a DDPM run, of one of many kinds."""
    whole = (trained / "checkpoint.pt").read_bytes()
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "last byte missing":
        path.write_bytes(whole[:-1])
    elif kind == "text":
        path.write_text("I am no checkpoint\n")
    elif kind == "bytes":
        path.write_bytes(bytes(range(256)) * 40)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("readme.txt", "no tensors here")
    elif kind == "picture":
        shutil.copy(trained / "preview.png", path) if (trained / "preview.png").exists() else (
            path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)))
    elif kind == "tensor":
        torch.save(torch.randn(3), path)
    elif kind == "dict of weights":
        torch.save({"weight": torch.randn(3)}, path)
    elif kind == "whole module":
        torch.save(torch.nn.Linear(2, 2), path)
    elif kind == "only the mark":
        torch.save({"format": FORMAT}, path)
    elif kind == "no config":
        torch.save({k: v for k, v in state.items() if k != "config"}, path)
    elif kind == "no weights":
        torch.save({k: v for k, v in state.items() if k not in ("model", "ema")}, path)
    elif kind == "other script":
        torch.save(state | {"script": "score_based"}, path)


KINDS = ["empty", "truncated", "last byte missing", "text", "bytes", "zip", "picture", "tensor",
         "dict of weights", "whole module", "only the mark", "no config", "no weights",
         "other script"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--sample", "--resume"])
@pytest.mark.parametrize("kind", KINDS)
def test_foreign_checkpoints(kind, how, capsys, tmp_path, trained):
    folder = tmp_path / "run"
    folder.mkdir()
    foreign(kind, folder / "checkpoint.pt", trained)
    before = (folder / "checkpoint.pt").read_bytes()
    said = refused(capsys, tmp_path, how, folder)
    assert str(folder) in said
    assert (folder / "checkpoint.pt").read_bytes() == before
    if kind == "other script":
        assert "score_based_diffusion_example.py" in said and "ddpm_example.py" in said


def change(trained, tmp_path, **values):
    """A copy of the trained run whose stored Config differs."""
    folder = tmp_path / "changed"
    shutil.copytree(trained, folder)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["config"].update(values)
    torch.save(state, folder / "checkpoint.pt")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("values, word", [
    ({"colour": "blue"}, "colour"), ({"T": "ten"}, "T"), ({"T": 0}, "--T 0"),
    ({"channels": 16}, "weights"), ({"mults": [1, 1]}, "weights"), ({"heads": 3}, "--heads 3")])
@pytest.mark.parametrize("how", ["--sample", "--resume"])
def test_checkpoint_whose_config_does_not_fit(values, word, how, capsys, tmp_path, trained):
    folder = change(trained, tmp_path, **values)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert word in refused(capsys, tmp_path, how, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("how", ["--sample", "--resume"])
def test_flag_that_contradicts_the_checkpoint(how, capsys, tmp_path, trained):
    said = refused(capsys, tmp_path, how, trained, "--channels", "16")
    assert "--channels 16" in said and "made with 8" in said


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": {}}', '{"seed": 0, "config": []}',
                                  '{"seed": 0, "config": {"T": 3}}'])
def test_bad_config_files(text, capsys, tmp_path):
    (tmp_path / "config.json").write_text(text)
    said = refused(capsys, tmp_path, "--config", tmp_path / "config.json")
    assert "config.json" in said


def test_config_file_with_a_value_out_of_range(capsys, tmp_path, trained):
    stored = json.loads((trained / "config.json").read_text())
    stored["config"]["lr"] = float("nan")
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert "--lr nan" in refused(capsys, tmp_path, "--config", tmp_path / "config.json")


# Folders


def test_empty_picture_folder(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    said = refused(capsys, tmp_path, "--dataset", f"folder:{tmp_path / 'empty'}")
    assert "empty" in said and ".png" in said and "found 0" in said


def test_folder_of_empty_classes(capsys, tmp_path):
    (tmp_path / "pictures" / "cats").mkdir(parents=True)
    assert "pictures" in refused(capsys, tmp_path, "--dataset", f"folder:{tmp_path / 'pictures'}")


def test_picture_folder_that_is_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "file" in refused(capsys, tmp_path, "--dataset", f"folder:{tmp_path / 'file'}")


def test_folder_of_broken_pictures(capsys, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    said = refused(capsys, tmp_path, "--dataset", f"folder:{tmp_path}")
    assert "found 0" in said


def test_output_under_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    said = refused(capsys, tmp_path, out=tmp_path / "file" / "runs")
    assert "--out" in said and "file" in said
    said = refused(capsys, tmp_path, out=tmp_path / "file")
    assert "--out" in said
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0,
                    reason="root may write everywhere")
def test_output_without_write_permission(capsys, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "--out" in refused(capsys, tmp_path, out=tmp_path / "locked" / "runs")


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"),
                                        ("cifar10", "CIFAR10")])
def test_download_without_network(name, kind, capsys, tmp_path, monkeypatch):
    from common import data

    import torchvision.datasets

    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(data, "CACHE", tmp_path / "out" / "data")
    for module in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", offline)
    assert hasattr(torchvision.datasets, kind)
    with pytest.raises(SystemExit) as stop:
        ddpm.main(["--preset", "smoke", "--out", str(tmp_path / "runs"), "--dataset", name])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(said) == 1
    assert f"--dataset {name}" in said[0] and "digits" in said[0]
    assert not (tmp_path / "runs").exists()


def test_evaluation_without_labels_is_refused_before_training(capsys, tmp_path):
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    said = refused(capsys, tmp_path, "--dataset", f"folder:{tmp_path}", "--evaluate", "10")
    assert "--evaluate 10" in said
