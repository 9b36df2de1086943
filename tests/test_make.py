"""experiments/make.py: what is run, copied and written into the tables."""

import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "experiments"))
import make  # noqa: E402

PAGES = [page for page in make.PAGES if (ROOT / page).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_those_of_the_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert make.with_tables(text, ".ko." in page) == text, "python experiments/make.py --tables"


def test_a_page_shows_what_is_there_and_every_table_is_shown():
    shown = [name for page in PAGES for name in
             re.findall(r"<!-- table: (\w+) -->", (ROOT / page).read_text(encoding="utf-8"))]
    assert set(shown) == set(make.TABLES)


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
    import ddpm_example as ddpm
    from conftest import open_run

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
