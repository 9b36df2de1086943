"""What experiments/series.py trains, draws and measures. Its main is in test_score_based_figures.py, too."""

import shutil

import score_based_diffusion_example as sb
from common import plotting
from common import run as runs

import numpy as np
import pytest
import torch
from conftest import only_run, spied
from torch.testing import assert_close

import series

pytestmark = pytest.mark.slow  # the file as a whole

ROWS = np.random.default_rng(0).normal(size=(30, 10))


def opened(*argv):
    """(cfg, run, data), as main makes them."""
    cfg, run = runs.open_run("series", series.Config, series.PRESETS, series.SAMPLING, [*map(str, argv)])
    return cfg, run, run.load(series.load_series, cfg.dataset)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run on a table of values about 50, which has ended, and its data."""
    out = tmp_path_factory.mktemp("trained")
    np.savetxt(out / "mine.csv", 50 + 20 * ROWS, delimiter=",", header="a,b,c,d,e,f,g,h,i,j", comments="")
    cfg, run, data = opened("--preset", "smoke", "--steps", 1, "--out", out, "--dataset", f"csv:{out / 'mine.csv'}")
    series.train(cfg, run, data)
    return run.folder, data


@pytest.fixture
def moved(tmp_path):
    """The table at another place, with other numbers."""
    np.savetxt(tmp_path / "moved.csv", 100 + 7 * ROWS, delimiter=",")
    return f"csv:{tmp_path / 'moved.csv'}"


@pytest.mark.parametrize("at", ["moved", "nowhere"])
def test_samples_are_in_the_unit_of_the_network_that_draws_them(at, trained, moved, tmp_path, capsys, drawings):
    """Not in that of a table that has changed since; the table itself is not needed."""
    folder, data = trained
    series.main(["--sample", str(folder), "--n_samples", "20", "--N", "2", "--inpaint_N", "1", "--out", str(tmp_path),
                 "--device", "cpu", "--dataset", moved if at == "moved" else "csv:nowhere.csv"])
    drawn, found = drawings["samples.png"]["drawn"], drawings["samples.png"]["data"]
    assert (found.offset, found.unit) == pytest.approx((data.offset, data.unit))
    assert (data.offset, data.unit) == pytest.approx((50, 20), abs=5)
    rows = np.loadtxt(only_run(tmp_path, "series") / "samples.csv", delimiter=",")
    assert rows.shape == (20, 10) and np.allclose(rows, data.offset + data.unit * drawn[:, 0].numpy(), rtol=1e-4)
    if at == "nowhere":
        assert found.empty and "drawn without it" in capsys.readouterr().out
    else:
        wanted = 100 + 7 / 20 * (data.restore(data.train) - 50)
        assert_close(found.restore(found.train), wanted, rtol=1e-4, atol=1e-3)


def all_among(x, known):
    """Whether each of the series x is nearly one of the known ones."""
    distance = torch.cdist(x[:, 0], known[:, 0], compute_mode="donot_use_mm_for_euclid_dist")
    return distance.min(1).values.max() < 1e-3


def test_a_resumed_run_goes_on_in_the_unit_of_its_checkpoint(trained, moved, tmp_path, monkeypatch):
    folder, data = trained
    shutil.copytree(folder, tmp_path / "copy")
    cfg, run, changed = opened("--resume", tmp_path / "copy", "--steps", 2, "--dataset", moved)
    seen = []
    spied(monkeypatch, sb, "score_loss", lambda given, _: seen.append(given["x0"]))
    model = series.train(cfg, run, changed)
    assert model.offset.item() == pytest.approx(data.offset) != pytest.approx(changed.offset)
    assert len(seen) == 1 and all_among(seen[0], (changed.restore(changed.train) - data.offset) / data.unit)


def test_what_the_loss_is_given(tmp_path, monkeypatch, drawings):
    """Series of the training part, its SDE and its weighting; the average is returned and kept."""
    cfg, run, data = opened("--preset", "smoke", "--out", tmp_path, "--sde", "subvp", "--beta_max", 9, "--weighting",
                            "likelihood", "--ema", 0.5, "--lr", 0.01)
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


def test_bands_hold_the_truth_as_often_as_they_say(tmp_path, monkeypatch):
    """Fans of an exact score over series drawn from it; the known part is the truth."""
    cfg, run, _ = opened("--preset", "smoke", "--out", tmp_path, "--forecast", 4, "--inpaint_N", 40,
                         "--inpaint_corrector", 5, "--inpaint_snr", 0.3)
    L, sde, drawn, ratios = 12, sb.VPSDE(), [], []
    monkeypatch.setattr(series, "fans", lambda path, parts, title: drawn.extend(parts))
    spied(monkeypatch, sb, "langevin_step", lambda given, _: ratios.append(given["snr"]))
    cov = 0.9 ** (torch.arange(L)[:, None] - torch.arange(L)).abs().double()
    torch.manual_seed(0)
    x = (torch.randn(40, L).double() @ torch.linalg.cholesky(cov).T).float()[:, None]

    def score(x, t):
        m, std = (f(t[:1]) for f in (sde.m, sde.std))
        return (-x[:, 0] @ torch.linalg.inv(m**2 * cov.float() + std**2 * torch.eye(L)))[:, None]

    series.figure_forecast(run, cfg, score, sde, series.Series("mine", x.flip(0), x, offset=10.0, unit=2.0))
    found = run.read_metrics()["bands_of_80_percent_hold"]
    assert found["series"] == 16 and 0.7 < found["forecast"] < 0.96 and 0.7 < found["gap"] < 0.96
    assert ratios == [0.3] * (2 * 40 * 5)
    hidden = {"forecast": range(8, 12), "gap": range(4, 8)}
    assert [part[0] for part in drawn] == [f"{name}, held out {i}" for name in hidden for i in (1, 2, 3)]
    for i, (subtitle, truth, known, bands) in enumerate(drawn):
        assert_close(truth, 10 + 2 * x[i % 3, 0])
        assert known.tolist() == [t not in hidden[subtitle.split(",")[0]] for t in range(L)]
        assert bands.shape == (5, L) and (bands.diff(dim=0) >= 0).all()
        assert_close(bands[:, known], truth[known].expand(5, -1))
        assert (bands[-1] - bands[0])[~known].min() > 0.1


def test_fans_are_bands_of_pairs_of_quantiles_where_nothing_is_known(monkeypatch):
    sheets, truth = [], torch.arange(6.0) ** 2
    monkeypatch.setattr(plotting, "save", lambda sheet, path, title: sheets.append(sheet))
    known, quantiles = torch.tensor([1, 1, 0, 0, 0, 1]).bool(), torch.arange(5.0)[:, None] + torch.arange(6.0)
    series.fans("a.png", [(f"part {i}", truth + i, known, quantiles + i) for i in range(4)], "title")
    axes = sheets[0].axes
    assert [axis.get_title() for axis in axes] == [f"part {i}" for i in range(4)]  # two rows of two
    for band, levels in zip(axes[3].collections, ((0, 4), (1, 3)), strict=True):
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
        assert corners == {(float(i), float(3 + i + level)) for i in range(1, 6) for level in levels}
    median, line, edge = axes[3].lines
    assert (median.get_label(), line.get_label(), list(edge.get_xdata())) == ("median", "truth", [2, 2])
    assert median.get_xydata().tolist() == [[i, 5 + i] for i in range(1, 6)]  # from the known values on both sides
    assert line.get_xydata().tolist() == [[i, i**2 + 3] for i in range(6)]


def test_spectra_and_their_distance_are_those_of_the_training_part(tmp_path, drawings):
    cfg, run, data = opened("--preset", "smoke", "--out", tmp_path)
    samples = (2 * data.test[:100]).flip(2).cumsum(2)
    series.figure_series(run, data, samples)
    for part, title, measure in zip(drawings["series.png"]["parts"], ("power spectrum", "autocorrelation"),
                                    (series.spectrum, series.autocorrelation), strict=True):
        assert part["title"].startswith(title) and [name.strip("_") for name in part["lines"]] == ["samples", "data"]
        for (lags, values, _), x in zip(part["lines"].values(), (samples, data.train), strict=True):
            assert list(lags) == list(range(65))
            assert_close(values, measure(x))
    found = run.read_metrics()["samples"]
    wanted = series.spectral_distance(samples, data.train)
    assert found["n"] == 100 and found["spectral_distance_db"] == pytest.approx(wanted) and wanted > 5
    assert 0 < found["spectral_distance_db_of_halves"] < 1.5
