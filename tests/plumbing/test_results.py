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

failures, gallery, how_many, make, race, sdes, training, unique_codes = map(experiment, (
    "failures", "gallery", "how_many", "make", "race", "sdes", "training", "unique_codes"))
PAGES = [page for page in make.PAGES if (ROOT / page).exists()]


# Tables and make.py


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_those_of_the_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert make.with_tables(text, ".ko." in page) == text, "python experiments/make.py --tables"


def test_a_page_shows_what_is_there_and_every_table_is_shown():
    shown = [name for page in PAGES for name in
             re.findall(r"<!-- table: (\w+) -->", (ROOT / page).read_text(encoding="utf-8"))]
    assert set(shown) == set(make.TABLES)


@pytest.mark.parametrize("table, label, cell, file, keys", [
    ("race", "DDPM, T steps", 1, "ddpm/race.json", ("rows", 0, "T steps")),
    ("race", "DDIM, 25 steps, η = 0", 2, "ddpm/race.json", ("rows", 1, "25 steps")),
    ("ddim", "DDPM, η = 1", 1, "ddim/figures.json", ("evaluation_by_S", "eta = 1", "10")),
    ("compare", "DiT", -1, "conditional/compare.json", ("compare", "dit")),
    ("defaults", "`latent_diffusion_example.py`", 4, "latent/evaluation.json", ("evaluation",)),
    ("sdes", "sub-VP", 2, "score_based/evaluation_subvp.json", ("evaluation",))])
def test_a_row_of_a_table_holds_the_scores_of_its_label(table, label, cell, file, keys):
    scores = json.loads((ROOT / "results" / file).read_text())
    for key in keys:
        scores = scores[key]
    row, = (row for row in make.TABLES[table]() if row[0] == label)
    shown = [float(number) for number in re.findall(r"[\d.]+", row[cell])]
    assert shown == pytest.approx([100 * scores["legible"], scores["frechet_distance"], scores["recall"]], abs=0.51)
    assert shown[1:] == pytest.approx([scores["frechet_distance"], scores["recall"]], abs=0.051)


@pytest.mark.parametrize("name", make.STEPS)
def test_a_step_copies_figures_that_its_command_makes(name):
    """Every file it copies is written by that script, or by a result of that name."""
    step = make.STEPS[name]
    script = (ROOT / shlex.split(step.command)[0])
    assert script.exists()
    source = script.read_text()
    for word in step.copies.split():
        made = word.partition(">")[0]
        assert re.search(rf"\b{re.escape(made)}\b", source) or made == "metrics.json", made


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """make.py with a workplace of its own, whose one command writes what it is told to."""
    monkeypatch.setattr(make, "ROOT", tmp_path)
    monkeypatch.setattr(make, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(make, "WORK", tmp_path / "outputs" / "evidence")
    (tmp_path / "results" / "toy").mkdir(parents=True)
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "toy_example.py").write_text(
        "import json, pathlib, sys\n"
        "argv = sys.argv[1:]\n"
        "if '--resume' in argv: folder = pathlib.Path(argv[argv.index('--resume') + 1])\n"
        "else:\n"
        "    folder = pathlib.Path(argv[argv.index('--out') + 1]) / 'toy' / 'now'\n"
        "    folder.mkdir(parents=True)\n"
        "(folder / 'config.json').write_text('{}')\n"
        "(folder / 'metrics.json').write_text(json.dumps({'argv': argv}))\n"
        "from PIL import Image\n"
        "Image.effect_noise((90, 90), 40).convert('RGB').save(folder / 'a.png')\n"
        "if 'fail' in argv: sys.exit(3)\n")
    monkeypatch.setattr(make, "STEPS", {
        "one": make.Step("toy_example.py --steps 3", 1, "toy", "metrics.json a.png>b.png"),
        "two": make.Step("toy_example.py --sample {one}", 2, "toy", "metrics.json>scores.json"),
        "bad": make.Step("toy_example.py fail", 1, "toy")})
    monkeypatch.setattr(make, "code_commit", lambda: "abc1234")
    return tmp_path


def read(path):
    return json.loads(path.read_text())


def test_make_runs_what_is_missing_and_says_what_it_took(bench, capsys):
    make.main(["one"])
    make.main(["two"])
    assert "1 steps to do, about 2 minutes" in capsys.readouterr().out
    toy = bench / "results" / "toy"
    assert read(toy / "metrics.json")["argv"][:2] == ["--steps", "3"]
    one = bench / "outputs" / "evidence" / "one" / "toy" / "now"
    assert read(toy / "scores.json")["argv"][:2] == ["--sample", str(one)]
    with Image.open(toy / "b.png") as picture:
        assert picture.size == (90, 90)
    found = read(bench / "results" / "evidence.json")
    assert list(found) == ["one", "two"]
    assert found["two"]["command"] == "python toy_example.py --sample RUN"
    assert found["one"]["commit"] == "abc1234" and found["one"]["seconds"] >= 0
    assert found["one"]["cpu_seconds"] >= 0 and "cores of" in found["one"]["machine"]
    make.main(["--list"])
    assert "there, of abc1234" in capsys.readouterr().out
    before = (toy / "metrics.json").stat().st_mtime_ns
    with pytest.raises(SystemExit, match="bad ended with status 3"):
        make.main([])  # all that is not there: bad alone
    assert (toy / "metrics.json").stat().st_mtime_ns == before
    assert list(read(bench / "results" / "evidence.json")) == ["one", "two"]


def test_a_stopped_training_goes_on(bench):
    folder = bench / "outputs" / "evidence" / "one" / "toy" / "now"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert "--resume" not in make.command_of("one")  # it has no checkpoint yet
    (folder / "checkpoint.pt").write_text("")
    assert make.command_of("one")[2:] == ["--resume", str(folder)]
    assert "--resume" not in make.command_of("two")


def test_mistakes_are_named(bench, capsys):
    with pytest.raises(SystemExit, match="two needs the run of one"):
        make.main(["two"])
    with pytest.raises(SystemExit):
        make.main(["three"])
    assert "three: must be one of one, two, bad" in capsys.readouterr().err


def test_evidence_belongs_to_a_commit(monkeypatch):
    said = {"status": "", "log": "f00"}
    monkeypatch.setattr(make, "git", lambda *words: said[words[0]])
    assert make.code_commit() == "f00"
    said["status"] = " M ddpm_example.py"
    with pytest.raises(SystemExit, match="not committed"):
        make.code_commit()


def test_a_released_checkpoint_is_small_and_draws(tmp_path, monkeypatch):
    cfg, run, data = open_run(ddpm, tmp_path, "--steps", 2)
    model = ddpm.train(cfg, run, data)
    make.release(run.folder / "checkpoint.pt", tmp_path / "toy.pt")
    state = torch.load(tmp_path / "toy.pt", weights_only=True)
    assert not {"model", "optimizer", "random"} & set(state)
    assert (tmp_path / "toy.pt").stat().st_size < (run.folder / "checkpoint.pt").stat().st_size / 5
    cfg, again, _ = open_run(ddpm, tmp_path, "--sample", tmp_path / "toy.pt")
    loaded = again.trained(ddpm.make_unet(cfg, data.shape))
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_pictures_become_smaller_and_stay_pictures(tmp_path):
    Image.effect_noise((200, 200), 60).convert("RGB").save(tmp_path / "noise.png")
    packed = make.small(tmp_path / "noise.png")
    assert len(packed) < (tmp_path / "noise.png").stat().st_size
    (tmp_path / "again.png").write_bytes(packed)
    with Image.open(tmp_path / "again.png") as a, Image.open(tmp_path / "noise.png") as b:
        assert np.abs(np.asarray(a.convert("L"), int) - np.asarray(b.convert("L"), int)).max() <= 3


def test_minutes_until_are_read_off_between_the_budgets():
    points = [(0.0, 0.0), (2.0, 0.4), (4.0, 0.6), (8.0, 0.6), (10.0, 0.85)]
    assert make.minutes_until(0.5, points) == "3.0"
    assert make.minutes_until(0.4, points) == "2.0"
    assert make.minutes_until(0.85, points) == "10.0"
    assert make.minutes_until(0.9, points) == "> 10"


def test_tables_are_markdown_in_both_languages(monkeypatch):
    monkeypatch.setattr(make, "TABLES", {"toy": lambda: iter([["legible", "w"], ["50%", "−1"]])})
    page = "before\n<!-- table: toy -->\nold\n<!-- end -->\nafter"
    assert make.with_tables(page) == (
        "before\n<!-- table: toy -->\n\n| legible | w |\n| --- | --- |\n| 50% | −1 |\n\n<!-- end -->\nafter")
    assert "| 판독률 | w |" in make.with_tables(page, korean=True)
    assert make.with_tables(make.with_tables(page)) == make.with_tables(page)


# Pictures of several runs, or of one training


@pytest.mark.slow
def test_training_looks_at_both_networks_on_the_way(tmp_path, monkeypatch, drawings):
    looked = []
    spied(monkeypatch, training, "look", lambda given, out: looked.append((given["model"], out, given["xT"])))
    asked = []
    spied(monkeypatch, training.ddim, "ddim_sample", lambda given, _: asked.append(given))
    training.main(n=9, moments=(2, 4), folder=tmp_path, out=tmp_path / "runs", device="cpu")
    (ema, first, xT), (model, raw, again), (_, last, _), _ = looked
    assert not ema.training and not any(p.requires_grad for p in ema.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())  # it trains on
    assert xT is again and len(xT) == 9
    assert len(first[0]) == 8 and not torch.equal(first[0], raw[0]) and not torch.equal(first[0], last[0])
    rows, labels = drawings["training.png"]["rows"], drawings["training.png"]["row_labels"]
    assert [label.split("\n")[0] for label in labels] == [
        "2 steps, averaged", "2 steps, last weights", "4 steps, averaged", "4 steps, last weights"]
    assert torch.equal(rows[0], first[0]) and torch.equal(rows[1], raw[0])
    assert {given["S"] for given in asked} == {20} and len(asked) == 4
    t = torch.full((9,), 5)  # drawn from as the page does
    assert torch.equal(asked[-2]["model"](xT, t), 1.2 * ema(xT, t))
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
def test_the_race_trains_for_its_budget_and_scores_both_samplers(tmp_path, monkeypatch, capsys, drawings):
    clock, trained, drawn, scored = [0.0], [], [], []
    monkeypatch.setattr(race.time, "process_time", lambda: clock[0])

    def train(cfg, run, data):  # 3 s to begin with, half a second a step
        clock[0] += 3 + cfg.steps / 2
        trained.append(cfg)
        return lambda x, t: torch.full_like(x, 0.5)

    monkeypatch.setattr(race.ddpm, "train", train)
    spied(monkeypatch, race.ddpm, "sample", lambda given, _: drawn.append(("T", given)))
    spied(monkeypatch, race.ddim, "ddim_sample", lambda given, _: drawn.append(("25", given)))
    def scores(x, of):  # unequal for the two samplers, which come one after the other
        scored.append(x)
        assert len(of.train) == 4500
        return dict.fromkeys(("frechet_distance", "precision", "recall", "nearest_train_rms", "legible_of_held_out",
                              "nearest_train_rms_of_held_out"), len(scored)) | {
            "n": len(x), "legible": len(scored) / 10, "classes": []}

    monkeypatch.setattr(race.quality, "scores", scores)
    argv = ["--minutes", "2", "1", "--n", "120", "--preset", "smoke", "--device", "cpu", "--drawing", "uniform",
            "--T", "30", "--variance", "beta", "--eps_scale", "1.2"]
    rows = race.main(argv, folder=tmp_path)
    assert [cfg.steps for cfg in trained] == [1, 201, 114, 1, 201, 234]
    assert all(cfg.drawing == "uniform" and cfg.channels == 8 for cfg in trained)
    assert [row["cpu_minutes"] for row in rows] == [1.0, 2.0] and [row["steps"] for row in rows] == [114, 234]
    assert [row[name]["legible"] for row in rows for name in ("T steps", "25 steps")] == [0.1, 0.2, 0.3, 0.4]
    assert all(len(x) == 120 for x in scored)
    of_T, of_25 = ([given for which, given in drawn if which == name] for name in ("T", "25"))
    assert [len(given["xT"]) for given in of_T] == [100, 20] * 2
    for a, b in zip(of_T, of_25, strict=True):
        assert torch.equal(a["xT"], b["xT"]) and a["variance"] == "beta" and (b["S"], b["eta"]) == (25, 0.0)
        assert a["schedule"].T == b["schedule"].T == 30
        assert a["model"](a["xT"], 1).max() == b["model"](a["xT"], 1).max() == pytest.approx(0.6)
    kept = json.loads((tmp_path / "race.json").read_text())
    assert kept["rows"] == json.loads(json.dumps(rows)) and "--drawing" in kept["flags"]
    legible, distance = drawings["race.png"]["parts"]
    assert legible["lines"]["DDPM, T steps"][:2] == ([1.0, 2.0], [0.1, 0.3]) and legible["title"] == "legible"
    assert distance["lines"]["_DDIM, 25 steps, eta = 0"][:2] == ([1.0, 2.0], [2, 4])
    assert capsys.readouterr().out.count("CPU minutes, 234 steps") == 2
    (tmp_path / "race.json").unlink()
    race.main([*argv[:2], *argv[3:], "--no_keep"], folder=tmp_path)
    assert not (tmp_path / "race.json").exists()


@pytest.mark.slow
def test_unique_codes_are_of_two_networks_and_the_same_points(tmp_path, monkeypatch, drawings):
    encoded, codes = [], []
    spied(monkeypatch, unique_codes.sb, "ode_process", lambda given, _: encoded.append(given))
    spied(monkeypatch, unique_codes.sb, "final", lambda _, out: codes.append(out))
    a, b = unique_codes.main((8, 16), n=20, folder=tmp_path, changes={"steps": 3, "batch_size": 8},
                             out=tmp_path / "runs", device="cpu")
    test = load_points("swiss_roll").test[:20]
    assert all(torch.equal(given["x"], test) and (given["t"], given["s"]) == (1e-3, 1.0) for given in encoded)
    assert torch.equal(a, codes[0]) and torch.equal(b, codes[1]) and not torch.equal(a, b)
    assert len(encoded) == len(codes) == 2
    for i, part in enumerate(drawings["unique_codes.png"]["parts"]):
        assert (part["xlabel"], part["ylabel"]) == ("code, 8 wide", "code, 16 wide")
        x, y = part["points"]["_"]
        assert torch.equal(x, a[:, i]) and torch.equal(y, b[:, i])
    found = json.loads((tmp_path / "unique_codes.json").read_text())
    assert found["rms_difference"] == pytest.approx((a - b).square().mean().sqrt().item())
    assert found["correlation"][0] == pytest.approx(torch.corrcoef(torch.stack([a[:, 0], b[:, 0]]))[0, 1].item(), rel=1e-4)
    assert found["widths"] == [8, 16] and found["n"] == 20
    configs = sorted(json.loads(file.read_text())["config"]["hidden"]
                     for file in (tmp_path / "runs").glob("*/*/config.json"))
    assert configs == [8, 16]


@pytest.mark.slow
def test_failures_are_each_made_by_one_mistake(tmp_path, monkeypatch, drawings):
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


@pytest.mark.slow
def test_how_many_trains_on_so_many_pictures(tmp_path, monkeypatch):
    trained = []

    def train(cfg, run, data):
        trained.append((cfg, data))
        return lambda x, t: torch.full_like(x, 0.5)

    monkeypatch.setattr(how_many.ddim, "train", train)
    drawn = []
    spied(monkeypatch, how_many.ddim, "ddim_sample", lambda given, _: drawn.append(given))
    monkeypatch.setattr(how_many.quality, "scores", lambda x, of: {"n": len(x), "of": len(of.train)})
    rows = how_many.main((5, 30), n=120, folder=tmp_path, cfg=ddim.Config(T=30, steps=7), out=tmp_path,
                         device="cpu")
    assert [len(data.train) for _, data in trained] == [5, 30] and len(trained[0][1].test) == 500
    assert torch.equal(trained[0][1].train, trained[1][1].train[:5])
    assert [len(given["xT"]) for given in drawn] == [100, 20] * 2
    assert drawn[0]["S"] == 30 and drawn[0]["eta"] == 1.0
    assert drawn[0]["model"](drawn[0]["xT"], 3).unique().item() == pytest.approx(0.6)
    assert json.loads((tmp_path / "how_many.json").read_text()) == json.loads(json.dumps(rows))
    for row, count in zip(rows, (5, 30), strict=True):
        assert (row["pictures"], row["n"], row["of"], row["steps"]) == (count, 120, 4500, 7)
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
