"""The scripts of experiments/ that make pictures of several runs or of one training."""

import json
import sys
from dataclasses import replace

import ddim_example as ddim
import score_based_diffusion_example as score_based
from common.data import load_images, load_points
from common.run import Run, new_run

import pytest
import torch
from conftest import ROOT, open_picture, open_run, spied
from PIL import Image

sys.path.insert(0, str(ROOT / "experiments"))
import failures  # noqa: E402
import gallery  # noqa: E402
import how_many  # noqa: E402
import race  # noqa: E402
import sdes  # noqa: E402
import training  # noqa: E402
import unique_codes  # noqa: E402


@pytest.mark.slow
def test_training_looks_at_both_networks_on_the_way(tmp_path, monkeypatch):
    looked, drawn = [], []
    spied(monkeypatch, training, "look", lambda given, out: looked.append((given["model"], out, given["xT"])))
    asked = []
    spied(monkeypatch, training.ddim, "ddim_sample", lambda given, _: asked.append(given))
    spied(monkeypatch, training.plotting, "table", lambda given, _: drawn.append(given))
    training.main(n=9, moments=(2, 4), folder=tmp_path, out=tmp_path / "runs", device="cpu")
    (ema, first, xT), (model, raw, again), (_, last, _), _ = looked
    assert not ema.training and not any(p.requires_grad for p in ema.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())  # it trains on
    assert xT is again and len(xT) == 9
    assert len(first[0]) == 8 and not torch.equal(first[0], raw[0]) and not torch.equal(first[0], last[0])
    rows, labels = drawn[0]["rows"], drawn[0]["row_labels"]
    assert [label.split("\n")[0] for label in labels] == [
        "2 steps, averaged", "2 steps, last weights", "4 steps, averaged", "4 steps, last weights"]
    assert torch.equal(rows[0], first[0]) and torch.equal(rows[1], raw[0])
    assert {given["S"] for given in asked} == {20} and len(asked) == 4
    t = torch.full((9,), 5)  # drawn from as the page does
    assert torch.equal(asked[-2]["model"](xT, t), 1.1 * ema(xT, t))
    open_picture(tmp_path / "training.png")
    found = json.loads((tmp_path / "training.json").read_text())
    assert found["n"] == 9
    assert list(found["legible"]) == [
        "2, averaged", "2, last weights", "4, averaged", "4, last weights"]


@pytest.mark.slow
def test_training_trains_as_the_script_does(tmp_path, monkeypatch):
    """The same weights, from a Config with weight decay and mirrored pictures."""
    cfg = replace(ddim.PRESETS["smoke"], weight_decay=0.3, flip=True, steps=4)
    monkeypatch.setattr(ddim, "Config", lambda steps: replace(cfg, steps=steps))
    monkeypatch.setattr(training, "look", lambda model, cfg, data, schedule, xT: (xT[:1], 0.5))
    found = training.main(n=2, moments=(2, 4), folder=tmp_path, out=tmp_path / "runs", device="cpu")
    run = new_run("ddim", cfg, out=tmp_path / "runs", device="cpu")
    data = run.load(load_images, cfg.dataset)
    torch.randn(2, *data.shape)  # the noises that are looked at
    wanted = ddim.train(cfg, run, data)
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_the_race_trains_for_its_budget_and_scores_both_samplers(tmp_path, monkeypatch, capsys):
    clock, trained, drawn = [0.0], [], []
    monkeypatch.setattr(race.time, "process_time", lambda: clock[0])

    def train(cfg, run, data):  # 3 s to begin with, half a second a step
        clock[0] += 3 + cfg.steps / 2
        trained.append(cfg)
        return lambda x, t: torch.full_like(x, 0.5)

    monkeypatch.setattr(race.ddpm, "train", train)
    spied(monkeypatch, race.ddpm, "sample", lambda given, _: drawn.append(("T", given)))
    spied(monkeypatch, race.ddim, "ddim_sample", lambda given, _: drawn.append(("25", given)))
    argv = ["--minutes", "2", "1", "--n", "120", "--preset", "smoke", "--device", "cpu", "--drawing", "uniform",
            "--T", "30", "--variance", "beta", "--eps_scale", "1.2"]
    rows = race.main(argv, folder=tmp_path)
    assert [cfg.steps for cfg in trained] == [1, 201, 114, 1, 201, 234]
    assert all(cfg.drawing == "uniform" and cfg.channels == 8 for cfg in trained)
    assert [row["cpu_minutes"] for row in rows] == [1.0, 2.0] and [row["steps"] for row in rows] == [114, 234]
    for name in race.SAMPLERS:
        assert rows[0][name]["n"] == 120 and 0 <= rows[0][name]["legible"] <= 1
    of_T, of_25 = ([given for which, given in drawn if which == name] for name in ("T", "25"))
    assert [len(given["xT"]) for given in of_T] == [100, 20] * 2
    for a, b in zip(of_T, of_25, strict=True):
        assert torch.equal(a["xT"], b["xT"]) and a["variance"] == "beta" and (b["S"], b["eta"]) == (25, 0.0)
        assert a["schedule"].T == b["schedule"].T == 30
        assert a["model"](a["xT"], 1).max() == b["model"](a["xT"], 1).max() == pytest.approx(0.6)
    kept = json.loads((tmp_path / "race.json").read_text())
    assert kept["rows"] == json.loads(json.dumps(rows)) and "--drawing" in kept["flags"]
    open_picture(tmp_path / "race.png")
    assert capsys.readouterr().out.count("CPU minutes, 234 steps") == 2
    (tmp_path / "race.json").unlink()
    race.main([*argv[:2], *argv[3:], "--no_keep"], folder=tmp_path)
    assert not (tmp_path / "race.json").exists()


@pytest.mark.slow
def test_three_sdes_stand_beside_their_own_numbers(tmp_path, monkeypatch):
    runs, drawn = [], []
    for i, (sde, file) in enumerate([("vp", "evaluation"), ("subvp", "evaluation_subvp"),
                                     ("ve", "evaluation_ve")]):
        cfg, run, data = open_run(score_based, tmp_path / sde, "--sde", sde, "--steps", 1)
        score_based.train(cfg, run, data)
        runs.append(str(run.folder))
        (tmp_path / f"{file}.json").write_text(json.dumps({
            "evaluation": {"n": 9, "legible": 0.5 + i / 10, "frechet_distance": 3.25 + i},
            "bits_per_dim": {"mean": 2.5 + i}}))
    spied(monkeypatch, sdes.plotting, "table", lambda given, _: drawn.append(given))
    sdes.main(*runs, folder=tmp_path, flags=["--device=cpu", f"--out={tmp_path}"])
    assert drawn[0]["row_labels"] == (
        "vp: 50% of 9 legible\nFréchet distance 3.2\n2.50 bits/dim",
        "subvp: 60% of 9 legible\nFréchet distance 4.2\n3.50 bits/dim",
        "ve: 70% of 9 legible\nFréchet distance 5.2\n4.50 bits/dim")
    assert [len(row) for row in drawn[0]["rows"]] == [10, 10, 10]
    open_picture(tmp_path / "three_sdes.png")


@pytest.mark.slow
def test_unique_codes_are_of_two_networks_and_the_same_points(tmp_path, monkeypatch):
    encoded, codes, drawn = [], [], []
    spied(monkeypatch, unique_codes.sb, "ode_process", lambda given, _: encoded.append(given))
    spied(monkeypatch, unique_codes.sb, "final", lambda _, out: codes.append(out))
    spied(monkeypatch, unique_codes.plotting, "curves", lambda given, _: drawn.append(given["parts"]))
    a, b = unique_codes.main((8, 16), n=20, folder=tmp_path, changes={"steps": 3, "batch_size": 8},
                             out=tmp_path / "runs", device="cpu")
    test = load_points("swiss_roll").test[:20]
    assert all(torch.equal(given["x"], test) and (given["t"], given["s"]) == (1e-3, 1.0) for given in encoded)
    assert torch.equal(a, codes[0]) and torch.equal(b, codes[1]) and not torch.equal(a, b)
    assert len(encoded) == len(codes) == 2
    for i, part in enumerate(drawn[0]):
        x, y = part["points"]["_"]
        assert torch.equal(x, a[:, i]) and torch.equal(y, b[:, i])
    found = json.loads((tmp_path / "unique_codes.json").read_text())
    assert found["rms_difference"] == pytest.approx((a - b).square().mean().sqrt().item())
    assert found["correlation"][0] == pytest.approx(torch.corrcoef(torch.stack([a[:, 0], b[:, 0]]))[0, 1].item(), rel=1e-4)
    assert found["widths"] == [8, 16] and found["n"] == 20
    configs = sorted(json.loads(file.read_text())["config"]["hidden"]
                     for file in (tmp_path / "runs").glob("*/*/config.json"))
    assert configs == [8, 16]
    open_picture(tmp_path / "unique_codes.png")


@pytest.mark.slow
def test_failures_are_each_made_by_one_mistake(tmp_path, monkeypatch):
    trained, drawn, loaded = [], [], []

    def train(cfg, run, data):
        trained.append((cfg, data, failures.ddim.EMA))
        return lambda x, t: torch.full_like(x, 0.1)

    monkeypatch.setattr(failures.ddim, "train", train)
    monkeypatch.setattr(Run, "trained", lambda run, model: loaded.append(model) or (
        lambda x, t: 0.5 * x + 0.001 * t.view(-1, 1, 1, 1)))  # fast, and it minds x and t
    spied(monkeypatch, failures.ddim, "ddim_process", lambda given, _: drawn.append(given))
    rows = failures.main(steps=12, columns=3, file=tmp_path / "broken.png", out=tmp_path, device="cpu")
    assert len(loaded) == 1 and len(rows) == 14 and all(x.shape == (3, 1, 28, 28) for x in rows.values())
    good = rows["as it should be"]
    assert all(not torch.equal(good, x) for name, x in rows.items() if x is not good)
    (grey, _, _), (late, _, average), (short, _, _), (few, small, _) = trained
    assert trained[0][1].train.min() == 0 and trained[0][1].train.max() == 1
    assert late.ema == 0.9999 and average is failures.FixedDecay and failures.ddim.EMA is not failures.FixedDecay
    assert [grey.steps, late.steps, short.steps, few.steps] == [12, 12, 2, 24] and len(small.train) == 20
    nearest = rows["the nearest\nof the 20"]
    assert all(any(torch.equal(x, y) for y in small.train) for x in nearest)
    assert [given["S"] for given in drawn][:8] == [50, 50, 50, 50, 50, 1000, 50, 50]
    assert [given["eta"] for given in drawn][:8] == [1, 1, 1, 1, 1, 1, 0, 1]
    assert torch.equal(drawn[7]["xT"], drawn[0]["xT"] / 2)
    open_picture(tmp_path / "broken.png")


@pytest.mark.parametrize("step, wanted", [
    ("right_step", lambda mean, noise: mean + noise), ("quiet_step", lambda mean, noise: mean),
    ("halved_step", lambda mean, noise: mean + noise / 2),
    ("clamped_step", lambda mean, noise: (mean + noise).clamp(-1, 1))])
def test_each_broken_step_is_broken_in_one_way(step, wanted):
    bars, (x, eps, z) = ddim.make_schedule("linear", 100).alpha_bars, torch.randn(3, 5, 1, 1, 1)
    mean = ddim.ddim_step(x, eps, 80, 60, bars, 1.0)
    noise = ddim.ddim_step(x, eps, 80, 60, bars, 1.0, z) - mean
    found = getattr(failures, step)(x, eps, 80, 60, bars, 1.0, z)
    torch.testing.assert_close(found, wanted(mean, noise))


def test_an_average_with_a_fixed_decay_stays_where_it_began():
    model = torch.nn.Linear(2, 2)
    ema = failures.FixedDecay(model, 0.9)
    before = ema.model.weight.clone()
    with torch.no_grad():
        model.weight += 1
    ema.update(model, 0)
    torch.testing.assert_close(ema.model.weight, before + 0.1)


@pytest.mark.slow
def test_how_many_trains_on_so_many_pictures(tmp_path, monkeypatch):
    trained = []

    def train(cfg, run, data):
        trained.append((cfg, data))
        return lambda x, t: torch.full_like(x, 0.5)

    monkeypatch.setattr(how_many.ddim, "train", train)
    drawn = []
    spied(monkeypatch, how_many.ddim, "ddim_sample", lambda given, _: drawn.append(given))
    rows = how_many.main((5, 30), n=120, folder=tmp_path, cfg=ddim.Config(T=30, steps=7), out=tmp_path,
                         device="cpu")
    assert [len(data.train) for _, data in trained] == [5, 30] and len(trained[0][1].test) == 500
    assert torch.equal(trained[0][1].train, trained[1][1].train[:5])
    assert [len(given["xT"]) for given in drawn] == [100, 20] * 2
    assert drawn[0]["S"] == 30 and drawn[0]["eta"] == 1.0
    assert drawn[0]["model"](drawn[0]["xT"], 3).unique().item() == pytest.approx(0.55)
    assert json.loads((tmp_path / "how_many.json").read_text()) == json.loads(json.dumps(rows))
    for row, count in zip(rows, (5, 30), strict=True):
        assert row["pictures"] == count and row["n"] == 120 and row["steps"] == 7
        data = load_images("digits")
        train = trained[0 if count == 5 else 1][1].train
        wanted = torch.cdist(data.test.flatten(1), train.flatten(1)).min(1).values.mean() / 28
        assert row["nearest_trained_rms"]["held_out"] == pytest.approx(wanted.item(), rel=1e-3)


def test_the_gallery_shows_the_films_side_by_side_and_wide_ones_below(tmp_path):
    for name, count, size in (("a", 3, (20, 30)), ("b", 5, (120, 30)), ("c", 9, (40, 30))):
        (tmp_path / name).mkdir()
        frames = [Image.new("RGB", size, (25 * i, 0, 0)) for i in range(count)]
        frames[0].save(tmp_path / name / "denoising.gif", save_all=True, append_images=frames[1:], duration=80)
    folders = [tmp_path / name for name in "abc"]
    gallery.main(*folders, file=tmp_path / "g.gif", height=60, frames=9, gap=10)
    with Image.open(tmp_path / "g.gif") as film:
        assert film.size == (40 + 10 + 80, 60 + 10 + 32) and film.n_frames == 9
        film.seek(8)
        last = film.convert("RGB")
    assert [last.getpixel(at) for at in ((5, 5), (45, 5), (60, 5), (5, 65), (5, 90))] == [
        (50, 0, 0), (255, 255, 255), (200, 0, 0), (255, 255, 255), (100, 0, 0)]
