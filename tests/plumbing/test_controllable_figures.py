"""What experiments/controllable.py reads, draws, trains, measures and refuses."""

import json
import sys
from dataclasses import replace

import common.data
import score_based_diffusion_example as sb
from common import plotting, quality
from common import run as runs
from common.cli import Mistake
from common.data import Data, load_images

import numpy as np
import pytest
import torch
from conftest import ROOT, only_run, open_picture, spied
from PIL import Image
from torch.testing import assert_close

sys.path.append(str(ROOT / "experiments"))
import controllable  # noqa: E402


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{data set: folder} of smoke runs of the page."""
    folders = {}
    for name in ("digits8", "gaussians"):
        argv = ["--preset", "smoke", "--device", "cpu", "--out", str(tmp_path_factory.mktemp(name)),
                "--dataset", name, "--attention", "4", "--preview_every", "100"]
        cfg, run = runs.open_run("score_based", sb.Config, sb.PRESETS, sb.SAMPLING, argv)
        sb.train(cfg, run, run.load(common.data.load_data, cfg.dataset, cfg.image_size))
        folders[name] = str(run.folder)
    return folders


@pytest.fixture
def opened(trained, tmp_path):
    """opened(flags...) -> (cfg, run, data), as main makes them, from the run on digits8."""
    def opened(*argv, sample=trained["digits8"]):
        argv = ["--sample", sample, "--device", "cpu", "--out", str(tmp_path / "out"), *map(str, argv)]
        cfg, run = runs.open_run("controllable", controllable.Config, controllable.PRESETS,
                                 controllable.SAMPLING, argv, reads=("score_based",), trained=True)
        return cfg, run, run.load(load_images, cfg.dataset, cfg.image_size)

    return opened


def black(x, t):
    """A score that goes to 0."""
    return -x


def refused(read, *args):
    """The message of the mistake with which read(*args) ends, one line."""
    with pytest.raises(Mistake) as stop:
        read(*args)
    said, = str(stop.value).splitlines()
    return said


def test_it_takes_the_network_of_the_page_and_its_own_settings(opened):
    cfg, run, data = opened("--inpaint_snr", 0.3)
    assert (cfg.channels, cfg.dataset, cfg.N) == (8, "digits8", 5)  # of the run, and its preset
    assert (cfg.inpaint_N, cfg.inpaint_corrector, cfg.inpaint_snr) == (3, 5, 0.3)
    assert run.trained(sb.make_network(cfg, data.shape)).sigma_data.item() == pytest.approx(
        data.train.std().item())


# A person's own picture and mask


def ask(tmp_path, picture=None, mask=None, shape=(1, 4, 6)):
    """read_question of pixel arrays, written as files."""
    names = []
    for name, pixels in (("picture.png", picture), ("mask.png", mask)):
        if pixels is not None:
            Image.fromarray(np.asarray(pixels, np.uint8)).save(tmp_path / name)
        names.append("" if pixels is None else str(tmp_path / name))
    return controllable.read_question(*names, shape)


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
    assert controllable.read_question("", "", (1, 4, 6)) == (None, None)


def test_a_turned_picture_has_the_size_that_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(np.repeat([[0], [255]], 2, 0).repeat(8, 1).astype(np.uint8)).save(
        tmp_path / "a.png", exif=exif)
    Image.fromarray(np.tri(8, 4, dtype=np.uint8) * 255).save(tmp_path / "m.png")
    x, known = controllable.read_question(str(tmp_path / "a.png"), str(tmp_path / "m.png"), (1, 4, 4))
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


def test_a_mask_is_known_where_it_is_nearer_to_white(tmp_path):
    _, known = ask(tmp_path, None, [[0, 127], [128, 255]], (1, 2, 2))
    assert known.dtype == torch.bool and known.tolist() == [[[[False, False], [True, True]]]]
    Image.fromarray(np.array([[0, 9000], [40000, 65535]], np.uint16)).save(tmp_path / "m.png")
    _, known = controllable.read_question("", str(tmp_path / "m.png"), (1, 2, 2))  # 16 bits
    assert known.tolist() == [[[[False, False], [True, True]]]]


@pytest.mark.parametrize("picture, mask, words", [
    (np.zeros((5, 6)), np.eye(6), "mask mask.png: is 6 x 6 pixels, must be 6 x 5 like the picture"),
    (None, np.eye(5), "mask mask.png: is 5 x 5 pixels, must be 6 x 4"),
    (None, np.full((4, 6), 255), "mask mask.png: is white all over"),
    (None, np.zeros((4, 6)), "mask mask.png: is black all over")])
def test_a_mask_that_asks_nothing(picture, mask, words, tmp_path):
    assert words in refused(ask, tmp_path, picture, mask).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize("flag", ["image", "mask"])
def test_what_is_no_picture(flag, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    for path in (tmp_path / "a.png", tmp_path, tmp_path / "none.png"):
        files = (str(path), "") if flag == "image" else ("", str(path))
        said = refused(controllable.read_question, *files, (1, 4, 6))
        assert said.startswith(f"{flag} {path}: cannot be read as a picture")


@pytest.mark.slow
def test_a_person_s_picture_is_completed_where_the_mask_is_black(trained, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    mask = np.full((8, 8), 255, np.uint8)
    mask[2:5, 3:] = 0
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    tables = []
    spied(monkeypatch, plotting, "table", lambda given, _: tables.append(given["rows"]))
    controllable.main(["--sample", trained["digits8"], "--out", str(tmp_path), "--device", "cpu",
                       "--image", str(tmp_path / "mine.png"), "--mask", str(tmp_path / "mask.png")])
    assert [len(row) for row in tables[0]] == [1] * 5
    folder, seen = only_run(tmp_path, "controllable"), []
    for i in (1, 2, 3):
        found = np.array(Image.open(folder / f"completed_{i}.png").convert("L"))
        assert (found[mask == 255] == pixels[mask == 255]).all()
        seen.append(found[mask == 0].tolist())
    assert seen[0] != seen[1] != seen[2] and pixels[mask == 0].tolist() not in seen


# Completing and colouring


@pytest.mark.parametrize("own", ["neither", "image", "mask"])
def test_the_figure_completes_what_its_masks_leave_out(own, opened, monkeypatch):
    """The known pixels of every completion are those of the truth, and nothing else is."""
    cfg, run, data = opened("--inpaint_N", 4)
    image = torch.rand(1, 1, 8, 8) if own == "image" else None
    mask = torch.rand(1, 1, 8, 8) < 0.5 if own == "mask" else None
    tables, asked = [], []
    spied(monkeypatch, plotting, "table", lambda given, _: tables.append(given))
    spied(monkeypatch, controllable, "inpaint", lambda given, _: asked.append(given))
    controllable.figure_inpainting(run, cfg, black, sb.VPSDE(), data, image, mask)
    known, *completed, truth = tables[0]["rows"]
    names = ["box", "half", "pixels", "border"]
    if own == "image":
        assert tables[0]["column_labels"] == names and torch.equal(truth, image.expand(4, -1, -1, -1))
    elif own == "mask":
        assert torch.equal(truth, data.test[:2]) and torch.equal(asked[0]["mask"], mask.expand(2, -1, -1, -1))
    else:
        assert tables[0]["column_labels"] == [name for name in names for _ in range(2)]
        assert torch.equal(truth, data.test[:8])
    mask = asked[0]["mask"]
    assert mask.shape == truth.shape and not known[~mask].any() and torch.equal(known[mask], truth[mask])
    for x in completed:
        assert torch.equal(x[mask], truth[mask]) and (x - truth)[~mask].abs().min() > 0
    assert len(completed) == 3 and (completed[0] - completed[1])[~mask].abs().min() > 0  # a draw each
    assert [given["steps"] for given in asked] == [4] * 3
    assert all(len(given["correctors"]) == 5 for given in asked)
    assert run.path("completed_1.png").exists() == (own == "image")


def test_the_figure_of_colourings_keeps_their_grey(opened, monkeypatch):
    cfg, run, _ = opened()
    data, tables = load_images("color_digits"), []
    spied(monkeypatch, plotting, "table", lambda given, _: tables.append(given["rows"]))
    controllable.figure_colorization(run, cfg, black, sb.VPSDE(), data)
    grey, *coloured, truth = tables[0]
    assert torch.equal(truth, data.test[:8]) and len(coloured) == 3
    for x in coloured:
        assert_close(x.mean(1, keepdim=True), grey, rtol=0, atol=1e-5)
        assert x.std(1).mean() > 0.01
    assert (coloured[0] - coloured[1]).abs().max() > 0.01


def test_completions_are_judged_by_mask(opened, monkeypatch, capsys):
    cfg, run, _ = opened("--evaluate", 12)
    data = load_images("digits")  # whose judge is shipped
    monkeypatch.setattr(controllable, "inpaint", lambda score, sde, x, mask, *settings: torch.where(
        mask, x, -torch.ones_like(x)))
    controllable.measure_completions(run, cfg, None, None, data)
    found = run.read_metrics()["completions"]
    assert list(found) == ["box", "half", "pixels", "border", "held_out"]
    assert {row["n"] for row in found.values()} == {12}
    assert found["held_out"]["legible"] > 0.8 > 0.3 > found["pixels"]["legible"]
    assert f"legible completions: box {found['box']['legible']:.0%}" in capsys.readouterr().out


# Classes, Eq. 49


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_the_classifier_is_trained_on_what_the_sde_makes_of_the_training_part(name, opened, tmp_path,
                                                                             monkeypatch):
    """All of (0, 1] as 999 t, inputs of the network's size, their own labels; then kept."""
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    cfg, run, data = opened("--classifier_steps", 30)
    cfg = replace(cfg, sde=name)
    sde, seen, forward = sb.make_sde(cfg), [], controllable.NoisyClassifier.forward
    monkeypatch.setattr(torch, "roll", lambda x, *args, **how: x)

    def watching(self, x, t):
        seen.append((x.detach(), t, self.training))
        return forward(self, x, t)

    monkeypatch.setattr(controllable.NoisyClassifier, "forward", watching)
    labels, clean, rates = [], [], []
    spied(monkeypatch, controllable.F, "cross_entropy", lambda given, _: labels.append(given["target"]))
    spied(monkeypatch, sb.SDE, "marginal", lambda given, _: clean.append(given["x0"]))
    spied(monkeypatch, controllable, "set_learning_rate", lambda given, _: rates.append(given))
    classifier = controllable.train_classifier(cfg, run, sde, data)
    assert [(given["step"], given["cfg"].lr, given["cfg"].steps) for given in rates] == [
        (i, 3e-3, 30) for i in range(30)]
    assert len(seen) == 30 and all(training for *_, training in seen)
    t = torch.cat([t for _, t, _ in seen])
    assert t.min() < 5 and t.max() > 994 and abs(t.mean() - 499.5) < 30
    assert torch.cat([x for x, *_ in seen])[t > 900].std().item() == pytest.approx(1, abs=0.1)
    for x0, y in zip(clean, labels, strict=True):
        rows = [(data.train == one).flatten(1).all(1) for one in x0[:3]]
        assert all(data.train_labels[row].eq(label).any() for row, label in zip(rows, y[:3], strict=True))

    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.9])
    logits = classifier(x, t)
    scaled, times, training = seen[-1]
    c_in = sde.scaling(t, data.train.std())[0]
    assert_close(scaled, c_in.view(-1, 1, 1, 1) * x)
    assert_close(times, 999 * t)
    assert not training and logits.shape == (3, 10)
    again = controllable.train_classifier(cfg, run, sde, data)  # no training: 30 steps would be seen
    assert_close(again(x, t), logits, rtol=0, atol=0)
    assert len(seen) == 32


def test_the_kept_classifier_is_of_its_settings(opened, tmp_path, monkeypatch):
    """Another SDE, another length, warm-up or decay of its training: another classifier."""
    cfg, run, data = opened("--classifier_steps", 3)
    keys = []

    def cached(name, key, make, fit):
        keys.append(repr((name, key)))
        return make()

    monkeypatch.setattr(controllable, "cached", cached)
    changes = ({}, {"sde": "subvp"}, {"beta_max": 19.0}, {"classifier_steps": 4}, {"warmup": 5},
               {"decay": "constant"}, {"flip": True}, {"N": 7})
    for change in changes:
        changed = replace(cfg, **change)
        controllable.train_classifier(changed, run, sb.make_sde(changed), data)
    assert len(set(keys)) == len(changes) - 1 and keys[-1] == keys[0]  # N is of sampling


def test_a_classifier_whose_training_was_stopped_is_neither_kept_nor_used(opened, trained, tmp_path,
                                                                         monkeypatch, capsys):
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    cfg, run, data = opened("--classifier_steps", 3)
    for stopped in (True, False):
        run.stopped = stopped  # as by Ctrl-C in the first step
        controllable.train_classifier(cfg, run, sb.make_sde(cfg), data)
        assert bool(list(tmp_path.glob("cache/*"))) != stopped

    def interrupted(cfg, run, sde, data):
        run.stopped = True
        return lambda x, t: None

    monkeypatch.setattr(controllable, "train_classifier", interrupted)
    controllable.main(["--sample", trained["digits8"], "--out", str(tmp_path), "--device", "cpu",
                       "--classes", "3"])
    assert "no classes.png" in capsys.readouterr().out
    folder = only_run(tmp_path, "controllable")
    assert (folder / "inpainting.png").exists() and not (folder / "classes.png").exists()


def test_classes_are_asked_for_by_name_or_by_number():
    x = torch.zeros(3, 1, 4, 4)
    data = Data("mine", x, x, torch.arange(3), torch.arange(3), ("cats", "dogs", "0"))
    asked = controllable.asked_classes(controllable.Config(classes=("dogs", "0", "1", "cats")), data)
    assert asked == [1, 2, 1, 0]  # a class that is called 0 goes before the first one
    said = refused(controllable.asked_classes, controllable.Config(classes=("3",)), data)
    assert said == "classes 3: must be one of cats, dogs, 0"
    said = refused(controllable.asked_classes, controllable.Config(classes=("0",)), Data("loose", x, x))
    assert "has no labels" in said


@pytest.mark.slow
def test_every_sampler_is_moved_to_its_class(opened, monkeypatch):
    """An exact classifier of two Gaussians in the trained one's place: rows by sampler, columns by class."""
    cfg, run, _ = opened("--N", 100, "--tolerance", 1e-3)
    sde, means, tables, judged = sb.VPSDE(), torch.tensor([-1.0, 1.0]), [], []
    names = list(sb.make_methods(cfg, sde))
    monkeypatch.setattr(plotting, "table", lambda *args: tables.append(args))
    x = torch.zeros(4, 1, 1, 1)
    data = Data("points", x, x, torch.arange(4) % 2, torch.arange(4) % 2, ("a", "b"))

    def log_p(x, t):
        m, std = (f(t)[:, None] for f in (sde.m, sde.std))
        return -0.5 * (x[:, :, 0, 0] - m * means) ** 2 / (0.04 * m**2 + std**2)

    def score(x, t):
        with torch.enable_grad():
            x_in = x.detach().requires_grad_()
            return torch.autograd.grad(log_p(x_in, t).logsumexp(1).sum(), x_in)[0]

    def glance(x, data, y):
        judged.append((x, y))
        return {"n": len(x), "accuracy": 0.125}

    monkeypatch.setattr(quality, "glance", glance)
    controllable.figure_classes(run, replace(cfg, classes=("b", "a") * 8), score, sde, data, log_p)
    (_, rows, title, row_labels, column_labels), = tables
    assert column_labels == ["b", "a"] * 8 and [len(row) for row in rows] == [16] * len(names)
    assert row_labels == [f"{name}\n12% of 80 as asked" for name in names]
    for name, (x, y) in zip(names, judged, strict=True):
        assert torch.equal(y, torch.tensor([1, 0] * 40)) and torch.equal(x[:16], rows[names.index(name)])
        if name != "corrector alone":  # which needs more steps
            for k in (0, 1):
                assert (x[y == k].mean() - means[k]).abs() < 0.15, name
    assert run.read_metrics()["classes"]["ancestral"] == {"n": 80, "accuracy": 0.125}


@pytest.mark.slow
def test_classes_are_drawn_and_judged(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    asked = []
    spied(monkeypatch, sb, "conditional_score", lambda given, _: asked.append(given["y"].tolist()))
    controllable.main(["--sample", trained["digits8"], "--out", str(tmp_path), "--device", "cpu",
                       "--classes", "3", "1", "--classifier_steps", "4"])
    folder = only_run(tmp_path, "controllable")
    open_picture(folder / "classes.png")
    open_picture(folder / "inpainting.png")
    assert asked and all(y == [3, 1] * 5 for y in asked)
    found = json.loads((folder / "metrics.json").read_text())["classes"]
    assert {row["n"] for row in found.values()} == {10} and len(found) == 10


# What does not go together


@pytest.mark.parametrize("argv, message", [
    (["--classes", "eleven"], "--classes eleven: must be one of 0, 1, 2"),
    (["--image", "none.png"], "--image none.png: cannot be read"),
    (["--mask", "none.png"], "--mask none.png: cannot be read"),
    (["--predictor", "none", "--inpaint_corrector", "0"], "--inpaint_corrector 0: must be at least 1 with"),
    (["--predictor", "none", "--corrector_steps", "0"], "--corrector_steps 0: must be at least 1 with"),
    (["--resume"], "--resume: this script trains nothing")])
def test_bad_input_ends_with_one_line(argv, message, trained, tmp_path, capsys):
    sample = [] if "--resume" in argv else ["--sample", trained["digits8"]]
    with pytest.raises(SystemExit) as stop:
        controllable.main([*sample, "--out", str(tmp_path / "out"), *argv])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and message in said[0], said
    assert not (tmp_path / "out").exists()


def test_a_model_of_points_is_refused(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        controllable.main(["--sample", trained["gaussians"], "--out", str(tmp_path / "out")])
    assert "gaussians" in capsys.readouterr().err and not (tmp_path / "out").exists()
