"""What experiments/series.py trains, draws, measures and refuses."""

import json
import shutil
import sys
from dataclasses import replace

import score_based_diffusion_example as sb
from common import plotting
from common import run as runs
from common.cli import parse_args

import numpy as np
import pytest
import torch
from conftest import ROOT, only_run, open_picture, spied
from torch.testing import assert_close

sys.path.append(str(ROOT / "experiments"))
import series  # noqa: E402


def opened(out, *argv):
    """(cfg, run, data) of the smoke preset with a few more arguments, as main makes them."""
    argv = ["--preset", "smoke", "--device", "cpu", "--out", str(out), *map(str, argv)]
    cfg, run = runs.open_run("series", series.Config, series.PRESETS, series.SAMPLING, argv)
    return cfg, run, run.load(series.load_series, cfg.dataset)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A CSV of 30 series of 10 values about 50, and its rows."""
    file, rows = tmp_path_factory.mktemp("table") / "mine.csv", np.random.default_rng(0).normal(size=(30, 10))
    np.savetxt(file, 50 + 20 * rows, delimiter=",", header="a,b,c,d,e,f,g,h,i,j", comments="")
    return file, rows


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory):
    """The folder of a run on the table that has ended, and its data."""
    cfg, run, data = opened(tmp_path_factory.mktemp("trained"), "--dataset", f"csv:{table[0]}")
    series.train(cfg, run, data)
    return run.folder, data


@pytest.fixture
def moved(table, tmp_path):
    """The table at another place, with other numbers."""
    np.savetxt(tmp_path / "moved.csv", 100 + 7 * table[1], delimiter=",")
    return f"csv:{tmp_path / 'moved.csv'}"


@pytest.mark.slow
def test_a_run_on_a_table_and_its_samples_as_a_table(table, tmp_path, monkeypatch, capsys):
    """The samples are in the unit of the table, and are read back as data."""
    drawn = []
    spied(monkeypatch, series, "figure_series", lambda given, _: drawn.append(given["samples"]))
    series.main(["--preset", "smoke", "--dataset", f"csv:{table[0]}", "--device", "cpu", "--out",
                 str(tmp_path)])
    assert "30 series of 10 values; first row: header" in capsys.readouterr().out
    folder = only_run(tmp_path, "series")
    for name in ("samples.png", "preview.png", "denoising.gif", "series.png", "forecast.png", "loss.png"):
        open_picture(folder / name)
    state, data = torch.load(folder / "checkpoint.pt", weights_only=True), series.load_series(f"csv:{table[0]}")
    assert state["script"] == "series" and state["step"] == 6
    assert state["ema"]["offset"].item() == pytest.approx(data.offset)
    assert state["ema"]["unit"].item() == pytest.approx(data.unit)
    assert state["ema"]["sigma_data"].item() == pytest.approx(1, abs=0.01)
    assert abs(data.offset - 50) < 5 and abs(data.unit - 20) < 5
    found = np.loadtxt(folder / "samples.csv", delimiter=",")
    wanted = data.offset + data.unit * drawn[0][:, 0].double().numpy()
    assert found.shape == (20, 10) and np.allclose(found, wanted, rtol=1e-4, atol=1e-3)
    again = series.load_series(f"csv:{folder / 'samples.csv'}")
    both = torch.cat([again.restore(again.train), again.restore(again.test)])[:, 0].double().numpy()
    assert_close(np.sort(both, 0), np.sort(found, 0), rtol=1e-4, atol=1e-3)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["samples"]["n"] == 20 and metrics["sampling"]["sampler"] == "em"


@pytest.mark.slow
def test_the_smallest_table(tmp_path, monkeypatch):
    """Two rows of two values, one sample: every figure is drawn."""
    monkeypatch.setattr(sb, "figure_denoising", lambda *args: None)  # slow
    (tmp_path / "mine.csv").write_text("1,2\n3,5\n")
    series.main(["--preset", "smoke", "--dataset", f"csv:{tmp_path / 'mine.csv'}", "--n_samples", "1",
                 "--device", "cpu", "--out", str(tmp_path)])
    folder = only_run(tmp_path, "series")
    assert np.loadtxt(folder / "samples.csv", delimiter=",").shape == (2,)
    for name in ("series.png", "forecast.png", "samples.png"):
        open_picture(folder / name)


def sampled(folder, dataset, out, monkeypatch):
    """What main hands to its figures when it draws from a run, and the run that it makes."""
    seen = []
    for owner, name in ((sb, "figure_loss"), (sb, "figure_denoising"), (series, "figure_series"),
                        (series, "figure_forecast")):
        monkeypatch.setattr(owner, name, lambda *args: None)
    monkeypatch.setattr(plotting, "samples", lambda path, samples, data, title: seen.append((samples, data)))
    series.main(["--sample", str(folder), "--dataset", dataset, "--preset", "smoke", "--out", str(out),
                 "--device", "cpu"])
    (samples, data), = seen
    return samples, data, only_run(out, "series")


def test_samples_are_in_the_unit_of_the_network_that_draws_them(trained, moved, tmp_path, monkeypatch):
    """Not in that of a table that has changed since: offset and unit are of the checkpoint."""
    folder, data = trained
    _, found, _ = sampled(folder, moved, tmp_path, monkeypatch)
    assert found.offset == pytest.approx(data.offset) and found.unit == pytest.approx(data.unit)
    assert_close(found.restore(found.train), 100 + 7 / 20 * (data.restore(data.train) - 50), rtol=1e-4,
                 atol=1e-3)


def test_a_checkpoint_draws_without_its_table(trained, tmp_path, monkeypatch, capsys):
    folder, data = trained
    samples, found, out = sampled(folder, "csv:nowhere.csv", tmp_path, monkeypatch)
    assert found.empty and "drawn without it" in capsys.readouterr().out
    table = np.loadtxt(out / "samples.csv", delimiter=",")
    assert table.shape == (20, 10)
    assert np.allclose(table, data.offset + data.unit * samples[:, 0].numpy(), rtol=1e-4, atol=1e-3)


def test_a_resumed_run_goes_on_in_the_unit_of_its_checkpoint(trained, moved, tmp_path, monkeypatch):
    folder, data = trained
    shutil.copytree(folder, tmp_path / "copy")
    argv, seen = ["--resume", str(tmp_path / "copy"), "--steps", "7", "--dataset", moved], []
    cfg, run = runs.open_run("series", series.Config, series.PRESETS, series.SAMPLING, argv)
    changed = run.load(series.load_series, cfg.dataset)
    spied(monkeypatch, sb, "score_loss", lambda given, _: seen.append(given["x0"]))
    model = series.train(cfg, run, changed)
    assert model.offset.item() == pytest.approx(data.offset) != pytest.approx(changed.offset)
    assert len(seen) == 1 and all_among(seen[0], (changed.restore(changed.train) - data.offset) / data.unit)


def all_among(x, known):
    """Whether each of the series x is nearly one of the known ones."""
    distance = torch.cdist(x[:, 0], known[:, 0], compute_mode="donot_use_mm_for_euclid_dist")
    return distance.min(1).values.max() < 1e-3


def test_what_the_loss_is_given(tmp_path, monkeypatch):
    """Series of the training part, its SDE and its weighting; the EMA is returned."""
    cfg, run, data = opened(tmp_path, "--sde", "subvp", "--weighting", "likelihood")
    seen, rates = [], []
    spied(monkeypatch, sb, "score_loss", lambda given, _: seen.append(given))
    spied(monkeypatch, sb, "set_learning_rate", lambda given, _: rates.append(given["step"]))
    model = series.train(cfg, run, data)
    assert rates == list(range(6)) and len(seen) == 6 and not model.training
    for given in seen:
        assert given["x0"].shape == (8, 1, 128) and given["weighting"] == "likelihood"
        assert isinstance(given["sde"], sb.SubVPSDE) and (given["density"] != 1).any()
        assert all_among(given["x0"], data.train)
    assert any((a != b).any() for a, b in zip(model.parameters(), seen[0]["model"].parameters(), strict=True))


# Figures


@pytest.mark.slow
def test_bands_hold_the_truth_as_often_as_they_say(tmp_path, monkeypatch):
    """Fans of an exact score over series drawn from it; the known part is the truth."""
    cfg, run, _ = opened(tmp_path, "--forecast", 4, "--inpaint_N", 60, "--inpaint_corrector", 5,
                         "--inpaint_snr", 0.3)
    L, sde, drawn = 12, sb.VPSDE(), []
    spied(monkeypatch, series, "fans", lambda given, _: drawn.append(given["parts"]))
    cov = 0.9 ** (torch.arange(L)[:, None] - torch.arange(L)).abs().double()
    torch.manual_seed(0)
    x = (torch.randn(40, L).double() @ torch.linalg.cholesky(cov).T).float()[:, None]
    data = series.Series("mine", x, x, offset=10.0, unit=2.0)

    def score(x, t):
        m, std = (f(t[:1]) for f in (sde.m, sde.std))
        return (-x[:, 0] @ torch.linalg.inv(m**2 * cov.float() + std**2 * torch.eye(L)))[:, None]

    series.figure_forecast(run, cfg, score, sde, data)
    found, (parts,) = run.read_metrics()["bands_of_80_percent_hold"], drawn
    assert found["series"] == 16 and 0.7 < found["forecast"] < 0.96 and 0.7 < found["gap"] < 0.96
    assert [part[0] for part in parts] == [
        f"{name}, held out {i}" for name in ("forecast", "gap") for i in (1, 2, 3)]
    _, truth, known, bands = parts[1]
    assert_close(truth, 10 + 2 * x[1, 0])
    assert known.tolist() == [True] * 8 + [False] * 4
    assert bands.shape == (5, L) and (bands.diff(dim=0) >= 0).all()
    assert_close(bands[:, :8], truth[:8].expand(5, -1))
    assert parts[3][2].tolist() == [True] * 4 + [False] * 4 + [True] * 4
    open_picture(run.path("forecast.png"))


def test_fans_are_bands_of_pairs_of_quantiles_where_nothing_is_known(monkeypatch):
    truth, known = torch.arange(6.0), torch.tensor([True, True, False, False, False, True])
    quantiles, sheets = torch.arange(5.0)[:, None] + torch.arange(6.0), []
    monkeypatch.setattr(plotting, "save", lambda sheet, path, title: sheets.append(sheet))
    series.fans("a.png", [("part", truth, known, quantiles)] * 4, "title")
    axes = sheets[0].axes
    assert len(axes) == 4  # two rows of two
    outer, inner = axes[3].collections
    for band, (low, high) in ((outer, (0, 4)), (inner, (1, 3))):
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
        assert {(float(i), float(i + level)) for i in range(1, 6) for level in (low, high)} == corners
    median, line, edge = axes[3].lines
    assert median.get_xdata().tolist() == [1, 2, 3, 4, 5]  # from the known values on both sides
    assert median.get_ydata().tolist() == [3, 4, 5, 6, 7]
    assert line.get_ydata().tolist() == truth.tolist() and list(edge.get_xdata()) == [2, 2]


def test_spectra_and_their_distance_are_those_of_the_training_part(tmp_path, monkeypatch):
    cfg, run, data = opened(tmp_path)
    drawn = []
    spied(monkeypatch, plotting, "curves", lambda given, _: drawn.append(given["parts"]))
    series.figure_series(run, data, 2 * data.test[:100])
    spectra, correlations = (part["lines"] for part in drawn[0])
    assert_close(spectra["samples"][1], 4 * series.spectrum(data.test[:100]))
    assert_close(spectra["data"][1], series.spectrum(data.train))
    assert_close(correlations["_data"][1], series.autocorrelation(data.train))
    found = run.read_metrics()["samples"]
    wanted = series.spectral_distance(2 * data.test[:100], data.train)
    assert found["spectral_distance_db"] == pytest.approx(wanted) and wanted > 5
    assert 0 < found["spectral_distance_db_of_halves"] < 1.5


# The command line


def test_series_take_the_preset_of_their_kind():
    for name, preset in (("sines", "sines"), ("membrane", "membrane"), ("csv:/a/b.csv", "csv")):
        cfg, _ = parse_args(series.Config, series.PRESETS, ["--dataset", name])
        assert cfg == replace(series.PRESETS[preset], dataset=name) == replace(series.Config(), dataset=name)


@pytest.mark.parametrize("argv, message", [
    (["--forecast", "128"], "--forecast 128: must be below 128, the length of the series"),
    (["--flip"], "--flip: is for pictures"), (["--image_size", "8"], "--image_size: is for pictures"),
    (["--mults", "1", "2"], "--mults: is for pictures"),
    (["--evaluate"], "--evaluate 500: --dataset sines has no labels"),
    (["--dataset", "digits"], "--dataset digits: must be one of sines, membrane, csv:PATH"),
    (["--predictor", "none", "--inpaint_corrector", "0"], "--inpaint_corrector 0: must be at least 1 with"),
    (["--sde", "subvp", "--sampler", "ancestral"], "--sampler ancestral: must be em"),
    (["--inpaint_snr", "0"], "--inpaint_snr 0.0: must be > 0")])
def test_bad_input_ends_with_one_line(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        series.main(["--preset", "smoke", "--out", str(tmp_path / "out"), *argv])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and message in said[0], said
    assert not (tmp_path / "out").exists()
