"""What experiments/controllable.py reads, draws, trains, measures and refuses."""

import json
from dataclasses import replace

import common.data
import score_based_diffusion_example as sb
from common import quality
from common import run as runs
from common.cli import Mistake
from common.data import Data, load_images, load_points

import numpy as np
import pytest
import torch
from conftest import only_run, spied
from PIL import Image
from torch.testing import assert_close

import controllable

pytestmark = pytest.mark.slow  # the file as a whole


@pytest.fixture
def flags(finished, tmp_path, monkeypatch):
    """Those of a run of the page that other tests share, and of a cache of its own."""
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    folder, _ = finished(sb, "--dataset", "digits8", "--attention", "4")
    return ["--sample", str(folder), "--device", "cpu", "--out", str(tmp_path / "out")]


def opened(flags, *argv):
    """(cfg, run, data), as main makes them."""
    cfg, run = runs.open_run("controllable", controllable.Config, controllable.PRESETS, controllable.SAMPLING,
                             [*flags, *map(str, argv)], reads=("score_based",), trained=True)
    return cfg, run, run.load(load_images, cfg.dataset, cfg.image_size)


def ask(tmp_path, picture=None, mask=None, shape=(1, 4, 6), dtype=np.uint8):
    """read_question of pixel arrays, written as files."""
    names = []
    for name, pixels in (("picture.png", picture), ("mask.png", mask)):
        if pixels is not None:
            Image.fromarray(np.asarray(pixels, dtype)).save(tmp_path / name)
        names.append("" if pixels is None else str(tmp_path / name))
    return controllable.read_question(*names, shape)


def test_a_picture_and_its_mask_are_read_alike(tmp_path):
    """Known where white; grey or in three channels, as the network has; one may be missing."""
    rng = np.random.default_rng(0)
    picture, mask = rng.integers(0, 256, (6, 6, 3)), 255 * (rng.random((6, 6)) < 0.5)
    colours = torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1
    x, known = ask(tmp_path, picture, mask, (3, 6, 6))
    assert_close(x[0], colours)
    assert known.dtype == torch.bool and torch.equal(known[0, 0], torch.from_numpy(mask) == 255)
    x, known = ask(tmp_path, picture, None, (1, 6, 6))
    assert_close(x[0], colours.mean(0, keepdim=True), rtol=0, atol=1e-5)
    assert known is None
    assert_close(ask(tmp_path, picture[..., 0], None, (3, 6, 6))[0][0], colours[:1].expand(3, -1, -1))
    for mask, dtype in (([[0, 127], [128, 255]], np.uint8), ([[0, 9000], [40000, 65535]], np.uint16)):
        x, known = ask(tmp_path, None, mask, (1, 2, 2), dtype)
        assert x is None and known.tolist() == [[[[False, False], [True, True]]]]


def test_a_picture_and_its_mask_keep_their_middle_and_are_turned_as_they_are_seen(tmp_path):
    """A 4 x 8 picture is cut to the middle 4 x 4, then halved; where it is known goes along."""
    columns = np.tile([0, 0, 40, 40, 200, 200, 255, 255], (4, 1))
    x, known = ask(tmp_path, columns, 255 * (columns >= 200), (1, 2, 2))
    assert_close(x[0, 0, 0] * 127.5 + 127.5, torch.tensor([40.0, 200.0]), rtol=0, atol=25)
    assert known[0, 0].tolist() == [[False, True]] * 2
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(np.repeat([[0], [255]], 2, 0).repeat(8, 1).astype(np.uint8)).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(np.tri(8, 4, dtype=np.uint8) * 255).save(tmp_path / "m.png")
    x, known = controllable.read_question(str(tmp_path / "a.png"), str(tmp_path / "m.png"), (1, 4, 4))
    assert x[0, 0].tolist() == [[1, 1, -1, -1]] * 4  # what is above lies to the right
    assert known[0, 0].tolist() == np.tri(8, 4, dtype=bool)[2:6].tolist()


@pytest.mark.parametrize("picture, mask, words", [
    (np.zeros((5, 6)), np.eye(6), "is 6 x 6 pixels, must be 6 x 5 like the picture"),
    (None, np.eye(5), "is 5 x 5 pixels, must be 6 x 4"), (None, np.full((4, 6), 255), "is white all over"),
    (None, np.zeros((4, 6)), "is black all over")])
def test_a_mask_that_asks_nothing(picture, mask, words, tmp_path):
    with pytest.raises(Mistake) as stop:
        ask(tmp_path, picture, mask)
    assert str(stop.value).startswith(f"mask {tmp_path / 'mask.png'}: {words}")


@pytest.mark.parametrize("flag", ["image", "mask"])
def test_what_is_no_picture(flag, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    for path in map(str, (tmp_path / "a.png", tmp_path, tmp_path / "none.png")):
        with pytest.raises(Mistake, match=f"^{flag} .*: cannot be read as a picture"):
            controllable.read_question(*((path, "") if flag == "image" else ("", path)), (1, 4, 6))


def test_a_model_of_points_is_refused(flags, tmp_path, capsys):
    state = torch.load(f"{flags[1]}/checkpoint.pt", weights_only=True)
    config, facts = state["config"] | {"dataset": "two_moons"}, load_points("two_moons").facts()
    torch.save(state | {"config": config, "data": facts}, tmp_path / "points.pt")
    with pytest.raises(SystemExit):
        controllable.main([*flags, "--sample", str(tmp_path / "points.pt")])
    assert "two_moons" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", ["", "image", "image mask"])
def test_the_figure_completes_what_its_masks_leave_out(own, flags, tmp_path, monkeypatch, drawings):
    """The known pixels of every completion are those of the truth, and nothing else is; main reads the files."""
    rng, asked, ratios = np.random.default_rng(0), [], []
    pixels, white = rng.integers(0, 256, (8, 8), np.uint8), rng.random((8, 8)) < 0.5
    for flag, array in (("image", pixels), ("mask", np.uint8(255 * white))):
        if flag in own:
            Image.fromarray(array).save(tmp_path / f"{flag}.png")
            flags += [f"--{flag}", str(tmp_path / f"{flag}.png")]
    spied(monkeypatch, controllable, "inpaint", lambda given, _: asked.append(given))
    spied(monkeypatch, sb, "langevin_step", lambda given, _: ratios.append(given["snr"]))
    spied(monkeypatch, sb, "score_fn", lambda given, out: asked.append(given | {"score": out}))
    controllable.main([*flags, "--inpaint_N", "2", "--inpaint_corrector", "3", "--inpaint_snr", "0.3",
                       "--predictor", "flow", "--no-clip_x0", "--std_floor", "0.2"])
    made, *asked = asked
    average = torch.load(f"{flags[1]}/checkpoint.pt", weights_only=True)["ema"]
    assert_close(dict(made["model"].state_dict()), dict(average), rtol=0, atol=0)
    assert (made["clip_x0"], made["std_floor"]) == (False, 0.2) and ratios == [0.3] * (3 * 2 * 3)
    for given in asked:
        assert given["score"] is made["score"] and (given["steps"], given["predictor"]) == (2, sb.flow_step)
    table = drawings["inpainting.png"]
    known, *completed, truth = table["rows"]
    names = [""] if "mask" in own else ["box", "half", "pixels", "border"]
    assert table["column_labels"] == [name for name in names for _ in range(1 if own else 2)]
    assert table["row_labels"] == ["known", "completed", "again", "again", "as given" if own else "truth"]
    wanted = torch.from_numpy(pixels).float().expand(8, 1, 8, 8) / 127.5 - 1 if own else load_images("digits8").test
    assert_close(truth, wanted[:len(truth)])
    mask = asked[0]["mask"].expand_as(truth)
    masks = controllable.make_masks(8, 8) | {"": torch.from_numpy(white)[None, None]}
    for column, name in enumerate(table["column_labels"]):  # each name over its own kind of mask
        assert name == "pixels" or torch.equal(mask[column], masks[name][0])
    assert not known[~mask].any() and torch.equal(known[mask], truth[mask]) and len(completed) == 3
    for i, x in enumerate(completed, 1):
        assert torch.equal(x[mask], truth[mask]) and (x - truth)[~mask].abs().min() > 0
        assert (f"completed_{i}.png" in drawings) == bool(own)
        assert not own or torch.equal(drawings[f"completed_{i}.png"]["x"], x[0])
    assert (completed[0] - completed[1])[~mask].abs().min() > 0  # a draw each


def test_the_figure_of_colourings_keeps_their_grey(flags, drawings):
    cfg, run, _ = opened(flags, "--inpaint_N", 10)
    data = Data("colours", torch.rand(3, 3, 4, 4), torch.rand(9, 3, 4, 4))
    controllable.figure_colorization(run, cfg, lambda x, t: -x, sb.VPSDE(), data)
    grey, *coloured, truth = drawings["colorization.png"]["rows"]
    assert drawings["colorization.png"]["row_labels"] == ["grey", "coloured", "again", "again", "truth"]
    assert torch.equal(truth, data.test[:8]) and len(coloured) == 3
    assert_close(grey, truth.mean(1, keepdim=True))
    for x in coloured:
        assert_close(x.mean(1, keepdim=True), grey, rtol=0, atol=1e-5)
        assert x.std(1).mean() > 0.01
    assert (coloured[0] - coloured[1]).abs().max() > 0.01


def test_completions_are_judged_by_mask(flags, monkeypatch, capsys):
    cfg, run, data = opened(flags, "--evaluate", 12)
    asked = []

    def glance(x, given):
        assert given is data and len(x) == 12
        return {"legible": (x - data.test[:12]).mean().item() / 10}

    monkeypatch.setattr(controllable, "inpaint", lambda score, sde, x, mask, *_: asked.append(mask) or x + len(asked))
    monkeypatch.setattr(quality, "glance", glance)
    controllable.measure_completions(run, cfg, None, None, data)
    found = {name: row["legible"] for name, row in run.read_metrics()["completions"].items()}
    assert found == pytest.approx({"box": 0.1, "half": 0.2, "pixels": 0.3, "border": 0.4, "held_out": 0}, abs=1e-6)
    masks = controllable.make_masks(8, 8)
    assert all(torch.equal(mask, masks[name]) for mask, name in zip(asked, masks, strict=True) if name != "pixels")
    assert "legible completions: box 10%, half 20%" in capsys.readouterr().out


def test_the_classifier_is_trained_on_what_the_sde_makes_of_the_training_part(flags, monkeypatch):
    """All of (0, 1] as 999 t, inputs of the network's size, their own labels; then kept."""
    cfg, run, data = opened(flags, "--classifier_steps", 10)
    cfg = replace(cfg, sde="ve")
    sde, seen, clean, labels, rates = sb.make_sde(cfg), [], [], [], []
    monkeypatch.setattr(torch, "roll", lambda x, *args, **how: x)
    spied(monkeypatch, controllable.NoisyClassifier, "forward", lambda given, _: seen.append(
        (given["x"].detach(), given["t"], given["self"].training)))
    spied(monkeypatch, controllable.F, "cross_entropy", lambda given, _: labels.append(given["target"]))
    spied(monkeypatch, sb.SDE, "marginal", lambda given, _: clean.append(given["x0"]))
    spied(monkeypatch, controllable, "set_learning_rate", lambda given, _: rates.append(
        (given["step"], given["cfg"].lr, given["cfg"].steps)))
    classifier = controllable.train_classifier(cfg, run, sde, data)
    assert rates == [(i, 3e-3, 10) for i in range(10)] and len(seen) == 10
    t = torch.cat([t for _, t, _ in seen])
    assert t.min() < 10 and t.max() > 989 and abs(t.mean() - 499.5) < 60
    assert torch.cat([x for x, *_ in seen])[t > 900].std().item() == pytest.approx(1, abs=0.1)
    for x0, y in zip(clean, labels, strict=True):
        assert all(data.train_labels[(data.train == one).flatten(1).all(1)].eq(label).any()
                   for one, label in zip(x0[:3], y[:3], strict=True))
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.9])
    logits = classifier(x, t)
    scaled, times, training = seen[-1]
    assert_close((scaled, times), (sde.scaling(t, data.train.std())[0].view(-1, 1, 1, 1) * x, 999 * t))
    assert seen[0][2] and not training and logits.shape == (3, 10)
    again = controllable.train_classifier(cfg, run, sde, data)
    assert_close(again(x, t), logits, rtol=0, atol=0)
    assert len(seen) == 12  # it is not trained again


def test_the_kept_classifier_is_of_its_settings(flags, monkeypatch):
    """Another SDE or constant of it, another length, warm-up or decay of its training: another classifier."""
    cfg, run, data = opened(flags, "--classifier_steps", 3)
    keys, ve = [], {"sde": "ve"}
    monkeypatch.setattr(controllable, "cached", lambda name, key, make, fit: keys.append(repr((name, key))) or make())
    for change in ({}, {"sde": "subvp"}, {"beta_max": 19.0}, {"beta": "cosine"}, ve, ve | {"sigma_max": 50.0},
                   {"classifier_steps": 4}, {"warmup": 5}, {"decay": "constant"}, {"flip": True}, {"N": 7}):
        changed = replace(cfg, **change)
        controllable.train_classifier(changed, run, sb.make_sde(changed), data)
    controllable.train_classifier(cfg, run, sb.make_sde(cfg), replace(data, train=-data.train))
    assert len(set(keys)) == len(keys) - 1 and keys[-2] == keys[0]  # N is of sampling


def test_a_classifier_whose_training_was_stopped_is_neither_kept_nor_used(
        flags, tmp_path, monkeypatch, capsys, drawings):
    cfg, run, data = opened(flags, "--classifier_steps", 3)
    for stopped in (True, False):
        run.stopped = stopped  # as by Ctrl-C in the first step
        controllable.train_classifier(cfg, run, sb.make_sde(cfg), data)
        assert bool(list(tmp_path.glob("cache/*"))) != stopped

    def interrupted(cfg, run, sde, data):
        run.stopped = True
        return lambda x, t: None

    monkeypatch.setattr(controllable, "train_classifier", interrupted)
    controllable.main([*flags, "--classes", "3", "--inpaint_N", "1"])
    assert "no classes.png" in capsys.readouterr().out and list(drawings) == ["inpainting.png"]


def test_classes_are_asked_for_by_name_or_by_number():
    x = torch.zeros(3, 1, 4, 4)
    data = Data("mine", x, x, torch.arange(3), torch.arange(3), ("cats", "dogs", "0"))
    asked = controllable.asked_classes(controllable.Config(classes=("dogs", "0", "1", "cats")), data)
    assert asked == [1, 2, 1, 0]  # a class that is called 0 goes before the first one
    for name, mine, words in (("3", data, "must be one of cats, dogs, 0"), ("0", Data("loose", x, x), "no labels")):
        with pytest.raises(Mistake, match=f"classes {name}: .*{words}"):
            controllable.asked_classes(controllable.Config(classes=(name,)), mine)


def test_every_sampler_is_moved_to_its_class(flags, monkeypatch, drawings):
    """An exact classifier of two Gaussians in the trained one's place: rows by sampler, columns by class."""
    cfg, run, _ = opened(flags, "--N", 40, "--tolerance", 1e-2, "--evaluate", 90)
    sde, means, judged = sb.VPSDE(), torch.tensor([-1.0, 1.0]), []
    names, x = list(sb.make_methods(cfg, sde)), torch.zeros(4, 1, 1, 1)
    data = Data("points", x, x, torch.arange(4) % 2, torch.arange(4) % 2, ("a", "b"))

    def log_p(x, t):
        m, std = (f(t)[:, None] for f in (sde.m, sde.std))
        return -0.5 * (x[:, :, 0, 0] - m * means) ** 2 / (0.04 * m**2 + std**2)

    def score(x, t):
        with torch.enable_grad():
            x_in = x.detach().requires_grad_()
            return torch.autograd.grad(log_p(x_in, t).logsumexp(1).sum(), x_in)[0]

    monkeypatch.setattr(quality, "glance", lambda x, data, y: judged.append((x, y)) or {
        "n": len(x), "accuracy": len(judged) / 100})
    controllable.figure_classes(run, replace(cfg, classes=("b", "a") * 8), score, sde, data, log_p)
    table, found = drawings["classes.png"], run.read_metrics()["classes"]
    assert table["column_labels"] == ["b", "a"] * 8
    assert table["row_labels"] == [f"{name}\n{i}% of 90 as asked" for i, name in enumerate(names, 1)]
    assert found == {name: {"n": 90, "accuracy": i / 100} for i, name in enumerate(names, 1)}
    for name, row, (x, y) in zip(names, table["rows"], judged, strict=True):
        assert torch.equal(y, torch.tensor([1, 0] * 45)) and torch.equal(x[:16], row)
        for k in (0, 1):  # the corrector alone needs more steps
            assert name == "corrector alone" or (x[y == k].mean() - means[k]).abs() < 0.2, name


def test_main_draws_and_judges_the_classes_that_were_asked_for(flags, tmp_path, monkeypatch, drawings):
    asked, methods = [], []
    spied(monkeypatch, sb, "conditional_score", lambda given, _: asked.append(given["y"].tolist()))
    spied(monkeypatch, sb, "sampling_process", lambda given, _: methods.append(given["cfg"]))
    controllable.main([*flags, "--classes", "3", "1", "--classifier_steps", "1", "--N", "2", "--tolerance", "0.9",
                       "--inpaint_N", "1"])
    found = json.loads((only_run(tmp_path / "out", "controllable") / "metrics.json").read_text())["classes"]
    assert asked == [[3, 1] * 5] * 10 and drawings["classes.png"]["column_labels"] == ["3", "1"]
    assert {row["n"] for row in found.values()} == {10} and {cfg.tolerance for cfg in methods} == {0.9}
