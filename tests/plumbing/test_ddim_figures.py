"""What ddim_example.py and experiments/ddim.py draw, measure and refuse."""

import importlib.util
import json
import math

import ddim_example as ddim
import ddpm_example as ddpm
from common.run import Run
from common.run import open_run as open_any_run

import pytest
import torch
from conftest import ROOT, only_run, open_picture, open_run, spied
from torch.testing import assert_close


def load(path):
    """A script of experiments/ as a module; the page of the same subject has another name."""
    spec = importlib.util.spec_from_file_location(f"experiments_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


figures = load(ROOT / "experiments/ddim.py")


@pytest.fixture(scope="module")
def ddpm_run(tmp_path_factory):
    """A run folder of ddpm with a checkpoint, made by the smoke preset's six steps."""
    cfg, run, data = open_run(ddpm, tmp_path_factory.mktemp("ddpm"))
    ddpm.train(cfg, run, data)
    return run.folder


def test_a_ddpm_checkpoint_brings_its_network_and_ddim_its_sampler(ddpm_run, tmp_path):
    """Fields that DDPM does not have are DDIM's own; the network and its weights are DDPM's."""
    argv = ["--sample", str(ddpm_run), "--eta", "0.5", "--out", str(tmp_path)]
    cfg, run = open_any_run("ddim", ddim.Config, ddim.PRESETS, ddim.SAMPLING, argv, reads=("ddpm",))
    assert (cfg.T, cfg.channels, cfg.groups) == (20, 8, 4)
    assert (cfg.S, cfg.eta, cfg.n_samples) == (5, 0.5, 4)  # of ddim's smoke preset, and the flag
    stored = torch.load(ddpm_run / "checkpoint.pt", weights_only=True)
    model = run.trained(ddim.make_unet(cfg, (1, 28, 28)))
    for name, value in model.state_dict().items():
        assert_close(value, stored["ema"][name], rtol=0, atol=0)


@pytest.mark.parametrize("main", [ddim.main, figures.main], ids=["page", "experiment"])
@pytest.mark.parametrize("argv, word", [
    (["--S", "1001"], "--S 1001: must be at least 1 and at most T, 1000"),
    (["--S", "0"], "--S 0: must be >= 1"),
    (["--eta", "1.5"], "--eta 1.5: must be in [0, 1]"),
    (["--eta", "-0.1"], "--eta -0.1"), (["--eta", "nan"], "--eta nan"),
    (["--spacing", "cubic"], "--spacing: invalid choice: 'cubic'"),
    (["--sigma_hat"], "--eta 0: must be 1 with --sigma_hat")])
def test_mistakes_end_in_one_line(main, argv, word, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and word in error
    assert not (tmp_path / "out").exists()


# The page


@pytest.mark.slow
def test_a_run_trains_and_writes_every_file(tmp_path, capsys):
    ddim.main(["--preset", "smoke", "--device", "cpu", "--out", str(tmp_path)])
    folder = only_run(tmp_path, "ddim")
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "log.csv", "metrics.json", "checkpoint.pt", "preview.png", "samples.png",
        "loss.png", "denoising.gif"}
    assert len(open_picture(folder / "denoising.gif")) == 6  # at five t, and at 0
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == 6 and state["script"] == "ddim" and state["preset"] == "smoke"
    found = json.loads((folder / "metrics.json").read_text())
    assert found["steps"] == 6 and found["sampling"]["n"] == 4
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.endswith(f"more: python experiments/ddim.py --sample {folder}") and "legible" in last


@pytest.mark.slow
def test_samples_a_ddpm_checkpoint_without_training(ddpm_run, tmp_path):
    before = {p.name: p.read_bytes() for p in ddpm_run.iterdir()}
    ddim.main(["--sample", str(ddpm_run), "--S", "7", "--out", str(tmp_path), "--n_samples", "1",
               "--evaluate", "12"])
    assert {p.name: p.read_bytes() for p in ddpm_run.iterdir()} == before
    folder = only_run(tmp_path, "ddim")
    assert not (folder / "checkpoint.pt").exists() and not (folder / "log.csv").exists()
    for name in ("samples", "loss", "evaluated"):
        open_picture(folder / f"{name}.png")
    found = json.loads((folder / "metrics.json").read_text())
    assert found["sampling"]["network_calls"] == 7 and found["evaluation"]["n"] == 12
    assert found["evaluation"]["network_calls"] == 7


class Stop(Exception):
    pass


@pytest.mark.parametrize("argv, expected", [
    ("", dict(S=5, eta=0.0, spacing="linear", clip_x0=True)),
    ("--S 3 --eta 0.25 --spacing quadratic --no-clip_x0 --eps_scale 0.9",
     dict(S=3, eta=0.25, spacing="quadratic", clip_x0=False)),
    ("--eta 1 --sigma_hat --S 4 --spacing quadratic --no-clip_x0 --eps_scale 1",
     dict(S=4, spacing="quadratic", clip_x0=False))])
def test_every_sampling_flag_reaches_the_sampler(argv, expected, ddpm_run, tmp_path, monkeypatch):
    def draw(run, n, states, network, steps):
        assert (n, steps) == (4, expected["S"])
        next(states(range(3)))
        given = dict(asked[0])
        model, xT = given.pop("model"), given.pop("xT")
        assert given.pop("schedule").T == 20 and xT.shape == (3, 1, 28, 28)
        assert isinstance(network, ddim.UNet) and not network.training
        t = torch.full((3,), 3)
        scale = float((argv.split("--eps_scale ") + ["1.1"])[1])
        assert_close(model(xT, t), scale * network(xT, t))
        assert given == expected
        raise Stop

    asked, name = [], "sigma_hat_process" if "sigma_hat" in argv else "ddim_process"
    spied(monkeypatch, ddim, name, lambda given, _: asked.append(given))
    monkeypatch.setattr(Run, "draw", draw)
    with pytest.raises(Stop):
        ddim.main(["--sample", str(ddpm_run), "--out", str(tmp_path), *argv.split()])


# experiments/ddim.py


@pytest.fixture(scope="module")
def drawn(ddpm_run, tmp_path_factory):
    """(folder, tables, films) of the experiment from the DDPM checkpoint; they by their files' names.

    --sigma_hat is for the samples: no row of another sampler has its noise.
    """
    out, tables, films = tmp_path_factory.mktemp("drawn"), {}, {}
    with pytest.MonkeyPatch.context() as patch:
        spied(patch, figures.plotting, "table", lambda given, _: tables.update({given["path"].name: given}))
        spied(patch, figures.plotting, "gif", lambda given, _: films.update({given["path"].name: given}))
        spied(patch, figures.plotting, "curves", lambda given, _: tables.update({given["path"].name: given}))
        spied(patch, figures.plotting, "neighbours", lambda given, _: tables.update({"neighbours": given}))
        torch.manual_seed(0)
        figures.main(["--sample", str(ddpm_run), "--S", "7", "--sigma_hat", "--eta", "1", "--evaluate", "12",
                      "--out", str(out), "--device", "cpu"])
    return only_run(out, "ddim"), tables, films


def network(ddpm_run):
    model = ddim.UNet(1, 28, 8, (1, 2), 1, (7,), 1, 4, 0.0, 2)
    model.load_state_dict(torch.load(ddpm_run / "checkpoint.pt", weights_only=True)["ema"])
    return model.eval()


@pytest.mark.slow
def test_the_experiment_writes_every_file(drawn):
    folder, tables, _ = drawn
    for name in ("steps", "eta", "interpolation", "reconstruction", "neighbours", "quality"):
        open_picture(folder / f"{name}.png")
    assert len(open_picture(folder / "interpolation.gif")) == 36
    assert not (folder / "checkpoint.pt").exists()
    assert len(tables["neighbours"]["drawn"]) == 12


@pytest.mark.slow
def test_the_sweep_scores_three_samplers_by_their_steps(drawn):
    folder, tables, _ = drawn
    by_S = json.loads((folder / "metrics.json").read_text())["evaluation_by_S"]
    assert set(by_S) == {"eta = 0", "eta = 1", "sigma_hat"}
    for scores in by_S.values():
        assert {S: row["network_calls"] for S, row in scores.items()} == {"10": 10, "20": 20}
        assert all(math.isfinite(row["frechet_distance"]) and row["n"] == 12 for row in scores.values())
        assert all(row["seconds"] > 0 for row in scores.values())
    assert len({scores["10"]["frechet_distance"] for scores in by_S.values()}) == 3
    (part,) = tables["quality.png"]["parts"]
    for name, (x, y, _) in part["lines"].items():
        assert x == [10, 20] and y == [by_S[name][str(S)]["frechet_distance"] for S in x]


@pytest.mark.slow
def test_the_rows_of_the_sweep_are_of_their_sampler(ddpm_run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(figures.plotting, "curves", lambda *_: None)
    monkeypatch.setattr(Run, "quality", lambda run, states, *_: (
        next(states(range(2))), {"frechet_distance": 1.0, "frechet_distance_of_held_out": 1.0})[1])
    for name in ("figure_steps", "figure_eta", "figure_interpolation", "figure_reconstruction"):
        monkeypatch.setattr(figures, name, lambda *_: None)
    spied(monkeypatch, ddim, "ddim_process", lambda given, _: asked.append((given["eta"], given["S"])))
    spied(monkeypatch, ddim, "sigma_hat_process", lambda given, _: asked.append(("sigma_hat", given["S"])))
    for argv, of_samples in (("--sigma_hat --eta 1", "sigma_hat"), ("--eta 0.5", 0.5)):
        asked.clear()
        figures.main(["--sample", str(ddpm_run), "--out", str(tmp_path), "--evaluate", "10", *argv.split()])
        assert asked == [(of_samples, 5), (0.0, 10), (0.0, 20), (1.0, 10), (1.0, 20),
                         ("sigma_hat", 10), ("sigma_hat", 20)]


@pytest.mark.slow
def test_each_noise_is_drawn_in_more_steps_and_with_more_noise(drawn, ddpm_run):
    _, tables, _ = drawn
    steps = tables["steps.png"]
    assert steps["row_labels"] == ["S = 5", "S = 10", "S = 20"] and len(steps["rows"][0]) == 8
    assert all(not torch.equal(a, b) for a, b in zip(steps["rows"], steps["rows"][1:], strict=False))
    eta = tables["eta.png"]
    assert eta["row_labels"] == ["eta = 0", "eta = 0.2", "eta = 0.5", "eta = 1"]
    for i, row in enumerate(eta["rows"]):  # noise and again, side by side
        assert len(row) == len(eta["column_labels"]) == 10
        if i == 0:
            assert_close(row[0::2], row[1::2], atol=1e-5, rtol=0)
        else:
            assert (row[0::2] - row[1::2]).abs().max() > 1e-3
    assert (eta["rows"][0][0] - eta["rows"][0][2]).abs().max() > 0.01


@pytest.mark.slow
def test_one_interpolates_between_noises_on_the_sphere_and_on_the_line(drawn):
    _, tables, films = drawn
    way = tables["interpolation.png"]
    slerp, line = way["rows"][:2]
    for end in (0, -1):
        assert_close(slerp[end], line[end], rtol=1e-3, atol=1e-3)
    assert (slerp[4] - line[4]).abs().max() > 0.01
    stds = [float(label.split("\n")[1].split()[0]) for label in way["row_labels"]]
    assert stds == pytest.approx([1, 0.71, 1, 0.71], abs=0.06)
    film = films["interpolation.gif"]
    assert len(film["frames"]) == len(film["captions"]) == 36
    frames = film["frames"]
    moves = [(a - b).abs().mean() for a, b in zip(frames, frames[1:] + frames[:1], strict=True)]
    assert max(moves) < 4 * min(moves)  # a closed way, without a jump


@pytest.mark.slow
def test_images_are_encoded_and_decoded_by_the_network_itself(drawn, ddpm_run):
    folder, tables, _ = drawn
    back = tables["reconstruction.png"]
    assert back["row_labels"][1].startswith("back, S = 10\nerror ")
    assert [label.split("\n")[0] for label in back["row_labels"][-2:]] == ["x_T, S = 10", "N(0, I)"]
    x0, again, code = back["rows"][0], back["rows"][1], back["rows"][-2]
    model, schedule = network(ddpm_run), ddim.make_schedule("linear", 20)
    assert_close(code, ddim.ddim_invert(model, x0, schedule, 10), rtol=1e-3, atol=1e-3)
    wanted = ddim.ddim_sample(model, code, schedule, 10, clip_x0=False)
    assert (again - wanted).norm() < 0.01 * wanted.norm()  # the first step magnifies rounding
    error = json.loads((folder / "metrics.json").read_text())["reconstruction_error_by_S"]["10"]
    assert error == pytest.approx((again - x0).square().mean().item() / 4, rel=1e-3)
