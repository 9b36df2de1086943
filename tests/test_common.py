"""common/: data sets, metrics against closed forms, command line, run folders, drawing."""

import argparse
import dataclasses
import json
import math
import sys
import urllib.error

import numpy as np
import pytest
import torch
from conftest import open_picture
from PIL import Image
from torch.testing import assert_close

import ddpm_example as ddpm
from common import data, metrics, plotting
from common.cli import check, config_from, parse_args
from common.device import Launch, Stopwatch, pick_device, random_state, set_random_state
from common.runs import Run, load_checkpoint, newest

# Data


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
    assert metrics.nearest_neighbours(digits.test, digits.train)[1].min() > 0


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
    assert found.train.shape == (11, 3, 16, 16) and found.test.shape == (1, 3, 16, 16)
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


def test_series(tmp_path):
    sines = data.load_series("sines", n=100, length=32)
    assert sines.train.shape == (90, 1, 32) and sines.test.shape == (10, 1, 32)
    assert sines.train.abs().max() <= 1
    table = np.arange(40.0).reshape(10, 4)
    np.savetxt(tmp_path / "mine.csv", table, delimiter=",")
    mine = data.load_series(f"csv:{tmp_path / 'mine.csv'}")
    assert mine.train.shape == (9, 1, 4) and mine.test.shape == (1, 1, 4)
    assert_close(torch.cat([mine.test, mine.train])[:, 0].double(),
                 torch.from_numpy(table / 39 * 2 - 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", ["1,2\n3", "a,b\nc,d", "", "1,2\n3,nan"])
def test_bad_csv_ends_with_one_line(tmp_path, text, capsys):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.warns() if not text else open("/dev/null"), pytest.raises(SystemExit) as stop:
        data.load_series(f"csv:{tmp_path / 'bad.csv'}")
    assert stop.value.code == 2 and "bad.csv" in capsys.readouterr().err


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"),
                                        ("cifar10", "CIFAR10")])
def test_downloaded_sets_have_the_shape_of_the_others(name, kind, monkeypatch):
    import torchvision.datasets

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
def test_download_without_network_names_the_bundled_sets(monkeypatch, problem, capsys):
    import torchvision.datasets

    def offline(*_, **__):
        raise problem

    monkeypatch.setattr(torchvision.datasets, "MNIST", offline)
    with pytest.raises(SystemExit) as stop:
        data.load_images("mnist")
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1
    for name in data.OFFLINE:
        assert name in said[0]


# Metrics


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(2000, 3))
    a = (a - a.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(a.T))).T  # exactly N(0, I)
    sigma, shift = np.diag([2.0, 0.5, 1.0]), np.array([1.0, -2.0, 0.5])
    b = a @ sigma + shift
    expected = (shift**2).sum() + ((1 - np.diag(sigma)) ** 2).sum()
    assert_close(metrics.frechet_distance(a, b), expected, rtol=1e-5, atol=1e-5)
    assert_close(metrics.frechet_distance(b, a), expected, rtol=1e-5, atol=1e-5)
    assert_close(metrics.frechet_distance(b, b), 0.0, rtol=0, atol=1e-4)
    # covariances that do not commute, against the trace of the root of their product
    mix = np.array([[1.0, 0.8, 0.0], [0.0, 0.6, -0.3], [0.2, 0.0, 1.5]])
    c = a @ mix
    product = np.linalg.eigvals(np.cov(b.T) @ np.cov(c.T)).real
    expected = (shift**2).sum() + np.trace(np.cov(b.T) + np.cov(c.T)) - 2 * np.sqrt(product).sum()
    assert_close(metrics.frechet_distance(b, c), expected, rtol=1e-5, atol=1e-5)


def test_frechet_distance_of_features_without_full_rank():
    rng = np.random.default_rng(0)
    a = np.concatenate([rng.normal(size=(500, 2)), np.zeros((500, 3))], 1)
    assert_close(metrics.frechet_distance(a, a + 1.0), 5.0, rtol=0, atol=1e-2)


def test_inception_score_extremes():
    assert_close(metrics.inception_score(torch.eye(10).repeat(5, 1)), 10.0)  # sure and diverse
    assert_close(metrics.inception_score(torch.full((50, 10), 0.1)), 1.0)  # never sure
    assert_close(metrics.inception_score(torch.eye(10)[:1].repeat(50, 1)), 1.0)  # one class only
    half = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    kl = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert_close(metrics.inception_score(half), math.exp(kl))


def test_precision_and_recall():
    x = torch.randn(300, 2)
    assert metrics.precision_recall(x, x) == (1.0, 1.0)
    assert metrics.precision_recall(x, x + 100) == (0.0, 0.0)
    both = torch.cat([x, x + 100])
    precision, recall = metrics.precision_recall(both, x)  # good pictures of half of the modes
    assert precision == 1.0 and recall == 0.5
    precision, recall = metrics.precision_recall(x, both)
    assert precision == 0.5 and recall == 1.0


def test_energy_distance():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]])
    # 2 E|a-b| = 2, E|a-a'| = (0 + 2 + 2 + 0) / 4 = 1, E|b-b'| = 0
    assert_close(metrics.energy_distance(a, b), 1.0)
    assert_close(metrics.energy_distance(a, a), 0.0, rtol=0, atol=1e-6)
    x = torch.randn(3000, 2)
    near, far = metrics.energy_distance(x, torch.randn(3000, 2)), metrics.energy_distance(x, x + 1)
    assert near < 0.01 < 0.1 < far


def test_nearest_neighbours():
    reference = torch.randn(20, 1, 4, 4)
    x = reference[[7, 3, 19]] + 0.1
    index, distance = metrics.nearest_neighbours(x, reference, batch_size=2)
    assert index.tolist() == [7, 3, 19]
    assert_close(distance, torch.full((3,), 0.1), rtol=1e-3, atol=1e-4)


def test_sure_share():
    p = torch.tensor([[0.95, 0.05], [0.9, 0.1], [0.5, 0.5], [0.05, 0.95]])
    assert metrics.sure_share(p) == 0.5


def test_classifier_is_cached_and_leaves_the_random_state_alone(tmp_path):
    x = torch.rand(200, 1, 8, 8) - 1
    y = torch.arange(200) % 2
    x[y == 1, :, :4] += 1
    made = data.Data("toy", x[:150], x[150:], y[:150], y[150:], ("a", "b"))
    state = torch.get_rng_state()
    first, judged = metrics.load_classifier(made, epochs=15, cache=tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert judged["accuracy"] > 0.95 and not first.training
    files = list(tmp_path.iterdir())
    assert len(files) == 1 and files[0].suffix == ".pt"
    stamp = files[0].stat().st_mtime_ns
    second, _ = metrics.load_classifier(made, epochs=15, cache=tmp_path)
    assert files[0].stat().st_mtime_ns == stamp
    assert_close(first(x[:5]), second(x[:5]))
    files[0].write_bytes(b"cut short")  # a broken cache is made again
    again, _ = metrics.load_classifier(made, epochs=1, cache=tmp_path)
    assert again is not None and files[0].stat().st_size > 1000
    other = dataclasses.replace(made, train=x[:150] * 0.5)  # one of other pictures is not used
    stamp = files[0].stat().st_mtime_ns
    metrics.load_classifier(other, epochs=1, cache=tmp_path)
    assert files[0].stat().st_mtime_ns != stamp
    assert metrics.load_classifier(dataclasses.replace(made, train_labels=None)) == (None, {})


# Command line


@dataclasses.dataclass(frozen=True)
class Toy:
    T: int = 10                      # diffusion steps
    learning_rate: float = 0.5       # how fast, in % of something
    widths: tuple[int, ...] = (1, 2)  # width of each level
    flip: bool = False               # mirror
    kind: str = "a"                  # a or b


TOYS = {"laptop": Toy(), "smoke": Toy(T=2, widths=(3,))}


def parse(*argv):
    return parse_args(Toy, TOYS, list(argv), free=("kind",))


def test_flags_override_the_preset_with_either_spelling():
    assert parse()[0] == Toy()
    assert parse("--preset", "smoke")[0] == Toy(T=2, widths=(3,))
    cfg, opts = parse("--preset", "smoke", "--T", "7", "--learning-rate", "0.1")
    assert cfg == Toy(T=7, learning_rate=0.1, widths=(3,))
    assert opts.given == {"T": 7, "learning_rate": 0.1}
    assert parse("--learning_rate", "0.1")[0].learning_rate == 0.1
    assert parse("--widths", "1", "2", "4", "--flip")[0] == Toy(widths=(1, 2, 4), flip=True)
    assert not parse("--no-flip")[0].flip
    assert parse("--grad-checkpointing")[1].grad_checkpointing
    assert parse("--grad_checkpointing")[1].grad_checkpointing


def test_help_is_the_trailing_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for comment in ("diffusion steps", "how fast, in % of something", "width of each level"):
        assert comment in text
    with pytest.raises(SystemExit):
        ddpm.main(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(ddpm.Config):
        assert f"--{field.name} " in text or f"--{field.name}," in text, field.name
    assert "(paper: 1e-4)" in " ".join(text.split()) and "2006.11239" in text


def test_every_field_of_config_has_a_comment():
    from common.cli import _comments

    assert set(_comments(ddpm.Config)) == {f.name for f in dataclasses.fields(ddpm.Config)}


def test_arguments_of_a_notebook_kernel_are_ignored(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "/x/kernel.json"])
    assert parse_args(Toy, TOYS)[0] == Toy()
    monkeypatch.setattr(sys, "argv", ["ddpm_example.py", "--T", "3"])
    assert parse_args(Toy, TOYS)[0].T == 3


def test_config_round_trip(tmp_path):
    cfg = Toy(T=3, learning_rate=1.0, widths=(5, 6), flip=True, kind="b")
    file = tmp_path / "config.json"
    stored = {"script": "toy", "seed": 17, "config": dataclasses.asdict(cfg)}
    file.write_text(json.dumps(stored))
    found, opts = parse("--config", str(file))
    assert found == cfg and opts.seed == 17
    assert parse("--config", str(file), "--T", "9")[0] == dataclasses.replace(cfg, T=9)


@pytest.mark.parametrize("change", [{"T": "ten"}, {"T": True}, {"widths": 3}, {"flip": 1},
                                    {"unknown": 1}, {"kind": None}])
def test_config_of_another_kind_is_refused(change, capsys):
    with pytest.raises(SystemExit) as stop:
        config_from(dataclasses.asdict(Toy()) | change, Toy, "here")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "here" in said and next(iter(change)) in said


@pytest.mark.parametrize("rule, good, bad", [
    (">= 1", [1, 2], [0, -1]), ("> 0", [0.1], [0.0, -1.0, math.nan, math.inf]),
    ("(0, 1)", [0.5], [0.0, 1.0, math.nan]), ("[0, 1)", [0.0], [1.0]), ("[0, 1]", [0.0, 1.0], [2]),
    (("a", "b"), ["a"], ["c"])])
def test_check_holds_values_to_rules(rule, good, bad, capsys):
    for value in good:
        check(argparse.Namespace(x=value), x=rule)
    for value in bad:
        with pytest.raises(SystemExit) as stop:
            check(argparse.Namespace(x=value), x=rule)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and f"--x {value}" in said


# Run folders and checkpoints


def new_run(out, **opts):
    settings = argparse.Namespace(out=str(out), seed=0, tensorboard=False)
    for name, value in opts.items():
        setattr(settings, name, value)
    return Run("toy", Toy(), settings, Launch(torch.device("cpu")))


def save(run, step=3):
    model = torch.nn.Linear(2, 2)
    run.save_checkpoint(step, {"model": model, "ema": model}, torch.optim.AdamW(model.parameters()))
    return model


def test_run_folders_are_unique(tmp_path):
    folders = {new_run(tmp_path).folder for _ in range(5)}
    assert len(folders) == 5 and all(f.parent == tmp_path / "toy" for f in folders)
    for folder in folders:
        stored = json.loads((folder / "config.json").read_text())
        assert stored["config"]["T"] == 10 and stored["seed"] == 0 and stored["script"] == "toy"


def test_checkpoints_are_plain_and_replaced_as_a_whole(tmp_path, monkeypatch):
    run = new_run(tmp_path)
    model = save(run)
    state = torch.load(run.path("checkpoint.pt"), weights_only=True)
    assert state["step"] == 3 and state["config"] == dataclasses.asdict(Toy())
    assert_close(state["model"]["weight"], model.weight.detach())
    whole = run.path("checkpoint.pt").read_bytes()

    def dies(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError):
        save(run, step=4)
    assert run.path("checkpoint.pt").read_bytes() == whole


def test_only_the_main_process_writes(tmp_path):
    run = Run("toy", Toy(), argparse.Namespace(out=str(tmp_path), seed=0, tensorboard=False),
              Launch(torch.device("cpu"), rank=1, world=2))
    save(run)
    run.log(1, loss=0.5)
    run.add_metrics(a=1)
    assert list(tmp_path.iterdir()) == []


def test_log_and_metrics(tmp_path):
    run = new_run(tmp_path)
    assert run.read_log() == {} and run.read_metrics() == {}
    for step in range(1, 6):
        run.log(step, loss=step / 10, lr=1.0)
    run.trim_log(3)
    assert run.read_log() == {"step": [1, 2, 3], "loss": [0.1, 0.2, 0.3], "lr": [1, 1, 1]}
    run.add_metrics(a=1, b=2)
    run.add_metrics(b=3)
    assert run.read_metrics() == {"a": 1, "b": 3}


def test_newest_run(tmp_path):
    import os

    assert newest(tmp_path, ("toy",)) is None
    runs = [new_run(tmp_path) for _ in range(3)]
    for age, run in enumerate(runs):
        save(run)
        os.utime(run.path("checkpoint.pt"), (1000 - age, 1000 - age))
    new_run(tmp_path).path("config.json")  # without a checkpoint it is no candidate
    assert newest(tmp_path, ("toy",)) == runs[0].folder
    assert newest(tmp_path, ("other",)) is None
    assert load_checkpoint(runs[1].folder, ("toy",))["step"] == 3


# Device


def test_device_choice():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cuda", "mps", "cpu")


def test_random_state_round_trip():
    state = random_state(torch.device("cpu"))
    a = torch.randn(4)
    set_random_state(state, torch.device("cpu"))
    assert torch.equal(a, torch.randn(4))


def test_shards_make_up_the_batch():
    x = torch.arange(12).view(6, 2)
    parts = [Launch(torch.device("cpu"), rank, 3).shard(x) for rank in range(3)]
    assert torch.equal(torch.cat(parts), x)


def test_stopwatch_adds_up():
    import time

    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch:
            time.sleep(0.02)
    assert 0.04 <= watch.seconds < 0.5


# Drawing


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_are_readable(tmp_path, channels):
    x = torch.randn(10, channels, 8, 8)
    plotting.save_grid(tmp_path / "grid.png", x, 5, "title")
    plotting.save_panels(tmp_path / "panels.png", [("a", x), ("b", x[:4])], "title")
    plotting.save_rows(tmp_path / "rows.png", [x[:3], x[3:6]], "title", ["a", "b"], list("xyz"))
    for name in ("grid", "panels", "rows"):
        assert len(open_picture(tmp_path / f"{name}.png")) == 1


def test_gif_moves_and_holds_its_end(tmp_path):
    frames = [torch.full((4, 1, 8, 8), v) + torch.linspace(-0.2, 0.2, 8) for v in (-0.8, 0.0, 0.8)]
    plotting.save_gif(tmp_path / "a.gif", frames, 2, ["t = 2", "t = 1", "t = 0"], hold=2)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames >= 3 and picture.info["loop"] == 0
    shown = open_picture(tmp_path / "a.gif")
    middles = [f[30:].mean() for f in shown]
    assert middles[0] < middles[1] < middles[-1]


def test_grid_maps_minus_1_to_black_and_1_to_white():
    x = torch.stack([torch.full((1, 4, 4), -1.0), torch.full((1, 4, 4), 1.0)])
    picture = plotting.grid(x, 2, pad=0)
    assert_close(picture[:, :4], np.zeros((4, 4, 3), np.float32))
    assert_close(picture[:, 4:], np.ones((4, 4, 3), np.float32))
    assert plotting.grid(x * 5, 2, pad=0).max() == 1


def test_smooth_is_a_running_mean():
    assert_close(plotting.smooth([1.0, 2.0, 3.0, 4.0], 2), np.array([1.0, 1.5, 2.5, 3.5]))
