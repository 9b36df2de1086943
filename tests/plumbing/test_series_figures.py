"""What experiments/series.py trains, draws and measures."""

import shutil
import sys

import score_based_diffusion_example as sb
from common import plotting
from common import run as runs

import numpy as np
import pytest
import torch
from conftest import ROOT, only_run, spied
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


@pytest.mark.parametrize("at", ["moved", "nowhere"])
def test_samples_are_in_the_unit_of_the_network_that_draws_them(at, trained, moved, tmp_path, capsys, drawings):
    """Not in that of a table that has changed since; the table itself is not needed."""
    folder, data = trained
    argv = ["--sample", str(folder), "--preset", "smoke", "--out", str(tmp_path), "--device", "cpu"]
    series.main([*argv, "--dataset", moved if at == "moved" else "csv:nowhere.csv"])
    drawn, found = drawings["samples.png"]["drawn"], drawings["samples.png"]["data"]
    assert found.offset == pytest.approx(data.offset) and found.unit == pytest.approx(data.unit)
    assert abs(data.offset - 50) < 5 and abs(data.unit - 20) < 5
    rows = np.loadtxt(only_run(tmp_path, "series") / "samples.csv", delimiter=",")
    assert rows.shape == (20, 10) and np.allclose(rows, data.offset + data.unit * drawn[:, 0].numpy(), rtol=1e-4)
    if at == "moved":
        wanted = 100 + 7 / 20 * (data.restore(data.train) - 50)
        assert_close(found.restore(found.train), wanted, rtol=1e-4, atol=1e-3)
    else:
        assert found.empty and "drawn without it" in capsys.readouterr().out


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


@pytest.mark.slow
def test_the_smallest_table(tmp_path, monkeypatch):
    """Two rows of two values, one sample: every figure is drawn."""
    monkeypatch.setattr(sb, "figure_denoising", lambda *args: None)  # slow
    (tmp_path / "mine.csv").write_text("1,2\n3,5\n")
    series.main(["--preset", "smoke", "--dataset", f"csv:{tmp_path / 'mine.csv'}", "--n_samples", "1",
                 "--device", "cpu", "--out", str(tmp_path)])
    assert np.loadtxt(only_run(tmp_path, "series") / "samples.csv", delimiter=",").shape == (2,)


@pytest.mark.slow
def test_what_the_loss_is_given(tmp_path, monkeypatch):
    """Series of the training part, its SDE and its weighting; the average is returned and kept."""
    cfg, run, data = opened(tmp_path, "--sde", "subvp", "--beta_max", 9, "--weighting", "likelihood", "--ema", 0.5,
                            "--lr", 0.01)
    seen, rates = [], []
    spied(monkeypatch, sb, "score_loss", lambda given, _: seen.append(given))
    spied(monkeypatch, torch.optim.AdamW, "step", lambda given, _: rates.append(given["self"].param_groups[0]["lr"]))
    model = series.train(cfg, run, data)
    wanted = [0.01 * min(1, (i + 1) / 2) * (1 + np.cos(np.pi * i / 6)) / 2 for i in range(6)]
    assert rates == pytest.approx(wanted) and len(seen) == 6 and not model.training
    for given in seen:
        assert given["x0"].shape == given["eps"].shape == (8, 1, 128) and given["weighting"] == "likelihood"
        assert vars(given["sde"]) == vars(sb.SubVPSDE(beta_max=9.0)) and (given["density"] != 1).any()
        assert all_among(given["x0"], data.train)
    state = torch.load(run.path("checkpoint.pt"), weights_only=True)
    assert_close(dict(model.state_dict()), dict(state["ema"]), rtol=0, atol=0)
    assert any((a != b).any() for a, b in zip(model.parameters(), seen[0]["model"].parameters(), strict=True))


# Figures


@pytest.mark.slow
def test_bands_hold_the_truth_as_often_as_they_say(tmp_path, monkeypatch):
    """Fans of an exact score over series drawn from it; the known part is the truth."""
    cfg, run, _ = opened(tmp_path, "--forecast", 4, "--inpaint_N", 40, "--inpaint_corrector", 5,
                         "--inpaint_snr", 0.3)
    L, sde, drawn, snrs = 12, sb.VPSDE(), [], []
    monkeypatch.setattr(series, "fans", lambda path, parts, title: drawn.append(parts))
    spied(monkeypatch, sb, "langevin_step", lambda given, _: snrs.append(given["snr"]))
    cov = 0.9 ** (torch.arange(L)[:, None] - torch.arange(L)).abs().double()
    torch.manual_seed(0)
    x = (torch.randn(40, L).double() @ torch.linalg.cholesky(cov).T).float()[:, None]
    data = series.Series("mine", x.flip(0), x, offset=10.0, unit=2.0)

    def score(x, t):
        m, std = (f(t[:1]) for f in (sde.m, sde.std))
        return (-x[:, 0] @ torch.linalg.inv(m**2 * cov.float() + std**2 * torch.eye(L)))[:, None]

    series.figure_forecast(run, cfg, score, sde, data)
    found, (parts,) = run.read_metrics()["bands_of_80_percent_hold"], drawn
    assert found["series"] == 16 and 0.7 < found["forecast"] < 0.96 and 0.7 < found["gap"] < 0.96
    assert snrs == [0.3] * (2 * 40 * 5)
    assert [part[0] for part in parts] == [
        f"{name}, held out {i}" for name in ("forecast", "gap") for i in (1, 2, 3)]
    hidden = {"forecast": range(8, 12), "gap": range(4, 8)}
    for i, (subtitle, truth, known, bands) in enumerate(parts):
        assert_close(truth, 10 + 2 * x[i % 3, 0])
        assert known.tolist() == [t not in hidden[subtitle.split(",")[0]] for t in range(L)]
        assert bands.shape == (5, L) and (bands.diff(dim=0) >= 0).all()
        assert_close(bands[:, known], truth[known].expand(5, -1))
        assert (bands[-1] - bands[0])[~known].min() > 0.1


def test_fans_are_bands_of_pairs_of_quantiles_where_nothing_is_known(monkeypatch):
    sheets = []
    monkeypatch.setattr(plotting, "save", lambda sheet, path, title: sheets.append(sheet))
    truth, known = torch.arange(6.0) ** 2, torch.tensor([True, True, False, False, False, True])
    quantiles = torch.arange(5.0)[:, None] + torch.arange(6.0)
    series.fans("a.png", [(f"part {i}", truth + i, known, quantiles + i) for i in range(4)], "title")
    axes = sheets[0].axes
    assert [axis.get_title() for axis in axes] == [f"part {i}" for i in range(4)]  # two rows of two
    outer, inner = axes[3].collections
    for band, (low, high) in ((outer, (0, 4)), (inner, (1, 3))):
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
        assert {(float(i), float(3 + i + level)) for i in range(1, 6) for level in (low, high)} == corners
    median, line, edge = axes[3].lines
    assert (median.get_label(), line.get_label()) == ("median", "truth")
    assert median.get_xdata().tolist() == [1, 2, 3, 4, 5]  # from the known values on both sides
    assert median.get_ydata().tolist() == [6, 7, 8, 9, 10]
    assert line.get_ydata().tolist() == (truth + 3).tolist() and list(edge.get_xdata()) == [2, 2]
    assert line.get_xdata().tolist() == list(range(6))


def test_spectra_and_their_distance_are_those_of_the_training_part(tmp_path, drawings):
    cfg, run, data = opened(tmp_path)
    samples = (2 * data.test[:100]).flip(2).cumsum(2)
    series.figure_series(run, data, samples)
    spectra, correlations = drawings["series.png"]["parts"]
    assert spectra["title"].startswith("power spectrum") and correlations["title"] == "autocorrelation"
    for part, measure in ((spectra, series.spectrum), (correlations, series.autocorrelation)):
        for name, x in (("samples", samples), ("data", data.train)):
            lags, values, _ = part["lines"][name if part is spectra else f"_{name}"]
            assert list(lags) == list(range(65))
            assert_close(values, measure(x))
    found = run.read_metrics()["samples"]
    wanted = series.spectral_distance(samples, data.train)
    assert found["n"] == 100 and found["spectral_distance_db"] == pytest.approx(wanted) and wanted > 5
    assert 0 < found["spectral_distance_db_of_halves"] < 1.5
