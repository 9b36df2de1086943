"""The scripts of experiments/ that make results/: tables equal their files, make.py, and pictures of several runs."""

import json
import re
import shlex
from dataclasses import replace

import ddim_example as ddim
import ddpm_example as ddpm
from common.data import load_images, load_points
from common.run import Run, new_run

import numpy as np
import pytest
import torch
from conftest import ROOT, experiment, open_run, spied
from PIL import Image

failures, gallery, how_many, make, race, training, unique_codes = map(experiment, (
    "failures", "gallery", "how_many", "make", "race", "training", "unique_codes"))
PAGES = [page for page in make.PAGES if (ROOT / page).exists()]


def read(path):
    return json.loads(path.read_text())


# Tables and make.py


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_those_of_the_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    emptied = re.sub(r"(<!-- table: \w+ -->).*?<!-- end -->", r"\1 old <!-- end -->", text, flags=re.DOTALL)
    assert make.with_tables(emptied, ".ko." in page) == text, "python experiments/make.py --tables"


def test_every_table_is_shown_on_a_page():
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == set(make.TABLES)


@pytest.mark.parametrize("table, label, cell, file, keys", [
    ("race", "DDPM, T steps", 1, "ddpm/race.json", ("rows", 0, "T steps")),
    ("race", "DDIM, 25 steps, η = 0", 2, "ddpm/race.json", ("rows", 1, "25 steps")),
    ("ddim", "DDPM, η = 1", 1, "ddim/figures.json", ("evaluation_by_S", "eta = 1", "10")),
    ("compare", "DiT", -1, "conditional/compare.json", ("compare", "dit")),
    ("defaults", "`latent_diffusion_example.py`", 4, "latent/evaluation.json", ("evaluation",)),
    ("sdes", "sub-VP", 2, "score_based/evaluation_subvp.json", ("evaluation",))])
def test_a_row_of_a_table_holds_the_scores_of_its_label(table, label, cell, file, keys):
    scores = read(ROOT / "results" / file)
    for key in keys:
        scores = scores[key]
    row, = (row for row in make.TABLES[table]() if row[0] == label)
    legible, *shown = [float(number) for number in re.findall(r"[\d.]+", row[cell])]
    assert legible == pytest.approx(100 * scores["legible"], abs=0.51)
    assert shown == pytest.approx([scores["frechet_distance"], scores["recall"]], abs=0.051)


def test_every_figure_that_make_copies_is_named_in_the_script_that_draws_it():
    for step in make.STEPS.values():
        source = (ROOT / shlex.split(step.command)[0]).read_text()
        for word in step.copies.split():
            made = word.partition(">")[0]
            assert re.search(rf"\b{re.escape(made)}\b", source) or made == "metrics.json", made


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """make.py with a workplace of its own, whose one command writes what it was told."""
    monkeypatch.setattr(make, "ROOT", tmp_path)
    monkeypatch.setattr(make, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(make, "WORK", tmp_path / "outputs" / "evidence")
    (tmp_path / "results" / "toy").mkdir(parents=True)
    Image.effect_noise((90, 90), 40).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "toy_example.py").write_text(
        "import json, pathlib, shutil, sys\n"
        "argv = sys.argv[1:]\n"
        "folder = pathlib.Path(argv[argv.index('--out') + 1]) / 'toy' / 'now'\n"
        "folder.mkdir(parents=True)\n"
        "(folder / 'config.json').write_text('{}')\n"
        "(folder / 'metrics.json').write_text(json.dumps({'argv': argv}))\n"
        "shutil.copy('a.png', folder)\n"
        "if 'fail' in argv: sys.exit(3)\n")
    monkeypatch.setattr(make, "STEPS", {
        "one": make.Step("toy_example.py --steps 3", 1, "toy", "metrics.json a.png>b.png"),
        "two": make.Step("toy_example.py --sample {one}", 2, "toy", "metrics.json>scores.json"),
        "bad": make.Step("toy_example.py fail", 1, "toy")})
    monkeypatch.setattr(make, "code_commit", lambda: "abc1234")
    return tmp_path


def test_make_runs_what_is_missing_and_says_what_it_took(bench, capsys):
    toy, one = bench / "results" / "toy", bench / "outputs" / "evidence" / "one" / "toy" / "now"
    with pytest.raises(SystemExit, match="two needs the run of one"):
        make.main(["two"])
    with pytest.raises(SystemExit):
        make.main(["three"])
    assert "three: must be one of one, two, bad" in capsys.readouterr().err
    make.main(["one"])
    make.main(["two"])
    assert "1 steps to do, about 2 minutes" in capsys.readouterr().out
    assert read(toy / "metrics.json")["argv"][:2] == ["--steps", "3"]
    assert read(toy / "scores.json")["argv"][:2] == ["--sample", str(one)]
    small, noise = ((folder / name).read_bytes() for folder, name in ((toy, "b.png"), (bench, "a.png")))
    with Image.open(toy / "b.png") as a, Image.open(bench / "a.png") as b:
        assert len(small) < len(noise)  # in fewer colours, but hardly to be seen
        assert np.abs(np.asarray(a.convert("L"), int) - np.asarray(b.convert("L"), int)).max() <= 3
    found = read(bench / "results" / "evidence.json")
    assert list(found) == ["one", "two"] and found["two"]["command"] == "python toy_example.py --sample RUN"
    assert found["one"]["commit"] == "abc1234" and "cores of" in found["one"]["machine"]
    assert found["one"]["seconds"] >= 0 and found["one"]["cpu_seconds"] >= 0
    make.main(["--list"])
    assert "there, of abc1234" in capsys.readouterr().out
    before = (toy / "metrics.json").stat().st_mtime_ns
    with pytest.raises(SystemExit, match="bad ended with status 3"):
        make.main([])  # all that is not there: bad alone
    assert (toy / "metrics.json").stat().st_mtime_ns == before
    assert list(read(bench / "results" / "evidence.json")) == ["one", "two"]
    assert "--resume" not in make.command_of("one")  # it has no checkpoint yet
    (one / "checkpoint.pt").write_text("")
    assert make.command_of("one")[2:] == ["--resume", str(one)] and "--resume" not in make.command_of("two")


def test_evidence_belongs_to_a_commit(monkeypatch):
    said = {"status": "", "log": "f00"}
    monkeypatch.setattr(make, "git", lambda *words: said[words[0]])
    assert make.code_commit() == "f00"
    said["status"] = " M ddpm_example.py"
    with pytest.raises(SystemExit, match="not committed"):
        make.code_commit()


def test_a_released_checkpoint_is_small_and_draws(tmp_path):
    cfg, run, data = open_run(ddpm, tmp_path, "--steps", 1, "--dataset", "digits8")
    model = ddpm.train(cfg, run, data)
    made, released = run.folder / "checkpoint.pt", tmp_path / "toy.pt"
    make.release(made, released)
    assert not {"model", "optimizer", "random"} & set(torch.load(released, weights_only=True))
    assert released.stat().st_size < made.stat().st_size / 4
    cfg, again, _ = open_run(ddpm, tmp_path, "--sample", released)
    loaded = again.trained(ddpm.make_unet(cfg, data.shape))
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_minutes_until_are_read_off_between_the_budgets():
    points = [(0.0, 0.0), (2.0, 0.4), (4.0, 0.6), (8.0, 0.6), (10.0, 0.85)]
    assert [make.minutes_until(level, points) for level in (0.5, 0.4, 0.85, 0.9)] == ["3.0", "2.0", "10.0", "> 10"]


# Pictures of several runs, or of one training


@pytest.mark.slow
def test_training_trains_as_the_script_does_and_looks_at_both_networks_on_the_way(tmp_path, monkeypatch, drawings):
    cfg = replace(ddim.PRESETS["smoke"], dataset="digits8", weight_decay=0.3, flip=True, eps_scale=1.2, T=30)
    monkeypatch.setattr(ddim, "Config", lambda steps: replace(cfg, steps=steps))
    monkeypatch.setattr(training.quality, "glance", lambda x, data: {"n": len(x), "legible": len(looked) / 10})
    looked, asked = [], []
    spied(monkeypatch, training, "look", lambda given, out: looked.append((given["model"], out[0], given["xT"])))
    spied(monkeypatch, training.ddim, "ddim_sample", lambda given, _: asked.append(given))
    found = training.main(n=9, moments=(2, 4), folder=tmp_path, out=tmp_path / "runs", device="cpu")
    (ema, first, xT), (model, raw, again), (_, last, _), _ = looked
    assert ema is found and xT is again and len(xT) == 9
    assert not ema.training and model.training  # it trains on
    assert len(first) == 8 and not torch.equal(first, raw) and not torch.equal(first, last)
    handed = drawings["training.png"]
    assert all(a is b for a, (_, b, _) in zip(handed["rows"], looked, strict=True))
    assert [label.split(" legible")[0] for label in handed["row_labels"]] == [
        "2 steps, averaged\n0%", "2 steps, last weights\n10%", "4 steps, averaged\n20%", "4 steps, last weights\n30%"]
    assert [given["S"] for given in asked] == [20] * 4
    t = torch.full((9,), 5)
    assert torch.equal(asked[-2]["model"](xT, t), 1.2 * ema(xT, t))  # as the page draws
    assert read(tmp_path / "training.json") == {"n": 9, "legible": {
        "2, averaged": 0.0, "2, last weights": 0.1, "4, averaged": 0.2, "4, last weights": 0.3}}
    run = new_run("ddim", replace(cfg, steps=4), out=tmp_path / "runs", device="cpu")
    data = run.load(load_images, cfg.dataset)
    torch.randn(9, *data.shape)  # the noises that are looked at
    for a, b in zip(found.parameters(), ddim.train(run.cfg, run, data).parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def fake(monkeypatch):
    """Networks that no training made, and scores that count: (what was trained, drawn and scored)."""
    trained, drawn, scored = [], [], []

    def train(cfg, run, data):
        trained.append((cfg, data, ddim.EMA))
        return lambda x, t: torch.full_like(x, 0.5)

    def scores(x, of):
        scored.append((x, of))
        return dict.fromkeys(("frechet_distance", "precision", "recall", "nearest_train_rms", "legible_of_held_out",
                              "nearest_train_rms_of_held_out"), len(scored)) | {
            "n": len(x), "legible": len(scored) / 10, "classes": []}

    for page in (ddpm, ddim):
        monkeypatch.setattr(page, "train", train)
    spied(monkeypatch, ddim, "ddim_sample", lambda given, _: drawn.append(given))
    monkeypatch.setattr(race.quality, "scores", scores)
    return trained, drawn, scored


@pytest.mark.slow
def test_the_race_trains_for_its_budget_and_scores_both_samplers(tmp_path, monkeypatch, capsys, drawings, fake):
    trained, of_25, scored = fake
    of_T = []
    # 3 s to begin with, half a second a step
    monkeypatch.setattr(race.time, "process_time", lambda: sum(3 + cfg.steps / 2 for cfg, *_ in trained))
    spied(monkeypatch, ddpm, "sample", lambda given, _: of_T.append(given))
    argv = ["--minutes", "2", "1", "--n", "120", "--preset", "smoke", "--device", "cpu", "--drawing", "uniform",
            "--T", "30", "--variance", "beta", "--eps_scale", "1.2"]
    rows = race.main(argv, folder=tmp_path)
    assert [cfg.steps for cfg, *_ in trained] == [1, 201, 114, 1, 201, 234]
    assert all(cfg.drawing == "uniform" and cfg.channels == 8 for cfg, *_ in trained)
    assert [row["cpu_minutes"] for row in rows] == [1.0, 2.0] and [row["steps"] for row in rows] == [114, 234]
    assert [row[name]["legible"] for row in rows for name in ("T steps", "25 steps")] == [0.1, 0.2, 0.3, 0.4]
    assert all(len(x) == 120 and len(of.train) == 4500 for x, of in scored)
    assert [len(given["xT"]) for given in of_T] == [100, 20] * 2
    for a, b in zip(of_T, of_25, strict=True):
        assert torch.equal(a["xT"], b["xT"]) and a["variance"] == "beta" and (b["S"], b["eta"]) == (25, 0.0)
        assert a["schedule"].T == b["schedule"].T == 30
        assert a["model"](a["xT"], 1).max() == b["model"](a["xT"], 1).max() == pytest.approx(0.6)
    kept = read(tmp_path / "race.json")
    assert kept["rows"] == rows and "--drawing" in kept["flags"]
    legible, distance = drawings["race.png"]["parts"]
    assert legible["lines"]["DDPM, T steps"][:2] == ([1.0, 2.0], [0.1, 0.3]) and legible["title"] == "legible"
    assert distance["lines"]["_DDIM, 25 steps, eta = 0"][:2] == ([1.0, 2.0], [2, 4])
    assert capsys.readouterr().out.count("CPU minutes, 234 steps") == 2
    (tmp_path / "race.json").unlink()
    race.main([*argv[:2], *argv[3:], "--no_keep"], folder=tmp_path)
    assert not (tmp_path / "race.json").exists()


def test_unique_codes_are_of_two_networks_and_the_same_points(tmp_path, monkeypatch, drawings):
    encoded, trained = [], []
    spied(monkeypatch, unique_codes.sb, "ode_process", lambda given, _: encoded.append(given))
    spied(monkeypatch, unique_codes.sb, "train", lambda given, _: trained.append(given["cfg"].hidden))
    a, b = unique_codes.main((8, 16), n=20, folder=tmp_path, changes={"steps": 3, "batch_size": 8},
                             out=tmp_path / "runs", device="cpu")
    test = load_points("swiss_roll").test[:20]
    assert all(torch.equal(given["x"], test) and (given["t"], given["s"]) == (1e-3, 1.0) for given in encoded)
    assert trained == [8, 16] and not torch.equal(a, b)
    for i, part in enumerate(drawings["unique_codes.png"]["parts"]):
        assert (part["xlabel"], part["ylabel"]) == ("code, 8 wide", "code, 16 wide")
        x, y = part["points"]["_"]
        assert torch.equal(x, a[:, i]) and torch.equal(y, b[:, i])
    found = read(tmp_path / "unique_codes.json")
    assert (found["widths"], found["n"]) == ([8, 16], 20)
    assert found["rms_difference"] == pytest.approx((a - b).square().mean().sqrt().item())
    correlation = [torch.corrcoef(torch.stack([a[:, i], b[:, i]]))[0, 1].item() for i in range(2)]
    assert found["correlation"] == pytest.approx(correlation, rel=1e-4)


@pytest.mark.slow
def test_failures_are_each_made_by_one_mistake(tmp_path, monkeypatch, drawings, fake):
    loaded, drawn = [], []
    monkeypatch.setattr(Run, "trained", lambda run, model: loaded.append(model) or (
        lambda x, t: 0.5 * x + 0.001 * t.view(-1, 1, 1, 1)))  # fast, and it minds x and t
    spied(monkeypatch, ddim, "ddim_process", lambda given, _: drawn.append(given))
    rows = failures.main(steps=12, columns=3, file=tmp_path / "broken.png", out=tmp_path, device="cpu")
    assert len(loaded) == 1 and len(rows) == 14 and all(x.shape == (3, 1, 28, 28) for x in rows.values())
    good = rows["as it should be"]
    assert all(not torch.equal(good, x) for name, x in rows.items() if x is not good)
    (grey, pixels, _), (late, _, average), (short, _, _), (few, small, _) = fake[0]
    assert pixels.train.min() == 0 and pixels.train.max() == 1
    assert late.ema == 0.9999 and average is failures.FixedDecay and ddim.EMA is not failures.FixedDecay
    assert [grey.steps, late.steps, short.steps, few.steps] == [12, 12, 2, 24] and len(small.train) == 20
    assert all(any(torch.equal(x, y) for y in small.train) for x in rows["the nearest\nof the 20"])
    assert [given["S"] for given in drawn][:8] == [50, 50, 50, 50, 50, 1000, 50, 50]
    assert [given["eta"] for given in drawn][:8] == [1, 1, 1, 1, 1, 1, 0, 1]
    assert torch.equal(drawn[7]["xT"], drawn[0]["xT"] / 2)
    handed = drawings["broken.png"]
    assert handed["row_labels"] == list(rows) and all(a is b for a, b in zip(handed["rows"], rows.values(), strict=True))


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


def test_how_many_trains_on_so_many_pictures(tmp_path, fake):
    trained, drawn, scored = fake
    rows = how_many.main((5, 30), n=120, folder=tmp_path, cfg=ddim.Config(T=30, steps=7), out=tmp_path, device="cpu")
    parts, data = [own.train for _, own, _ in trained], load_images("digits")
    assert [len(part) for part in parts] == [5, 30] and torch.equal(parts[0], parts[1][:5])
    assert [(len(given["xT"]), given["S"], given["eta"]) for given in drawn] == [(100, 30, 1.0), (20, 30, 1.0)] * 2
    assert drawn[0]["model"](drawn[0]["xT"], 3).unique().item() == pytest.approx(0.6)
    assert read(tmp_path / "how_many.json") == rows
    for row, count, part, (x, of), legible in zip(rows, (5, 30), parts, scored, (0.1, 0.2), strict=True):
        assert (row["pictures"], row["n"], row["steps"], row["legible"]) == (count, 120, 7, legible)
        assert torch.equal(of.train, data.train)
        for name, pictures in (("held_out", data.test), ("samples", x)):
            wanted = torch.cdist(pictures.flatten(1), part.flatten(1)).min(1).values.mean() / 28
            assert row["nearest_trained_rms"][name] == pytest.approx(wanted.item(), rel=1e-3)


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
