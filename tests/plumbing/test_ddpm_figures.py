"""What ddpm_example.py and experiments/ddpm.py draw, measure and refuse."""

import importlib.util
import json
import math

import ddpm_example as ddpm
from common.run import Run

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


figures = load(ROOT / "experiments/ddpm.py")


@pytest.fixture(scope="module")
def ddpm_run(tmp_path_factory):
    """A run folder with a checkpoint, made by the smoke preset's six steps."""
    cfg, run, data = open_run(ddpm, tmp_path_factory.mktemp("ddpm"))
    ddpm.train(cfg, run, data)
    return run.folder


@pytest.fixture
def drawn(monkeypatch):
    """What the tables and the curves are drawn from, by the names of their files."""
    found = {}
    for name in ("table", "curves"):
        spied(monkeypatch, figures.plotting, name, lambda given, _: found.update({given["path"].name: given}))
    return found


# The page


@pytest.mark.slow
def test_a_run_trains_and_writes_every_file(tmp_path, capsys):
    ddpm.main(["--preset", "smoke", "--device", "cpu", "--out", str(tmp_path)])
    folder = only_run(tmp_path, "ddpm")
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "log.csv", "metrics.json", "checkpoint.pt", "preview.png", "samples.png",
        "loss.png", "denoising.gif"}
    assert len(open_picture(folder / "denoising.gif")) == 21  # at each t, and at 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.endswith(f"more: python experiments/ddpm.py --sample {folder}") and "legible" in last


class Stop(Exception):
    pass


@pytest.mark.parametrize("argv, expected, scale", [
    ("", dict(variance="beta_tilde", clip_x0=True), 1.1),
    ("--variance beta --no-clip_x0 --eps_scale 0.9", dict(variance="beta", clip_x0=False), 0.9)])
def test_every_sampling_flag_reaches_the_sampler(argv, expected, scale, ddpm_run, tmp_path, monkeypatch):
    def draw(run, n, states, network, steps):
        assert (n, steps) == (4, 20)
        next(states(range(3)))
        given = dict(asked[0])
        model, xT = given.pop("model"), given.pop("xT")
        assert given.pop("schedule").T == 20 and xT.shape == (3, 1, 28, 28)
        assert isinstance(network, ddpm.UNet) and not network.training
        t = torch.full((3,), 3)
        assert_close(model(xT, t), scale * network(xT, t))
        assert given == expected
        raise Stop

    asked = []
    spied(monkeypatch, ddpm, "reverse_process", lambda given, _: asked.append(given))
    monkeypatch.setattr(Run, "draw", draw)
    with pytest.raises(Stop):
        ddpm.main(["--sample", str(ddpm_run), "--out", str(tmp_path), *argv.split()])


# experiments/ddpm.py


@pytest.mark.slow
def test_the_experiment_writes_every_file(ddpm_run, drawn, tmp_path):
    before = {p.name: p.read_bytes() for p in ddpm_run.iterdir()}
    figures.main(["--sample", str(ddpm_run), "--out", str(tmp_path), "--device", "cpu"])
    assert {p.name: p.read_bytes() for p in ddpm_run.iterdir()} == before
    folder = only_run(tmp_path, "ddpm")
    for name in ("forward", "schedules", "denoising", "neighbours", "bound", "rate_distortion"):
        open_picture(folder / f"{name}.png")
    assert not (folder / "checkpoint.pt").exists()
    assert json.loads((folder / "metrics.json").read_text())["bits_per_dim"]["images"] == 32
    way = drawn["denoising.png"]
    assert way["row_labels"] == ["x_t", "x0_hat"] * 3 and way["column_labels"][0] == "t = 20"
    assert len(way["rows"]) == 6 and len(way["rows"][0]) == 8


@pytest.mark.parametrize("argv", [[], ["--no-clip_x0"]])
def test_x0_hat_on_the_way_is_that_of_the_sampler(argv, drawn, tmp_path):
    """The mean of the next step is that of q given this x0_hat (Eq. 7), at the last step x0_hat itself."""
    cfg, run, data = open_run(ddpm, tmp_path, "--T", 8, *argv)
    schedule = ddpm.make_schedule("linear", cfg.T)

    def eps_model(xt, t):
        return 0.3 * xt

    xT = torch.randn(3, *data.shape)
    states = list(ddpm.reverse_process(eps_model, xT, schedule, cfg.variance, cfg.clip_x0))
    figures.figure_denoising(run, cfg, eps_model, states, schedule)
    rows = drawn["denoising.png"]["rows"]
    for i, (t, xt) in enumerate(states[:-1]):
        mean, _ = ddpm.p_theta(eps_model, xt, t, schedule, cfg.variance, cfg.clip_x0)
        for k in range(3):
            assert torch.equal(rows[2 * k][i], xt[k])
            wanted, _ = ddpm.q_posterior(rows[2 * k + 1][i], xt[k], t, schedule)
            assert_close(wanted[0], mean[k], rtol=1e-3, atol=1e-3)
    assert_close(torch.stack([row[-1] for row in rows[1::2]]), states[-1][1], rtol=1e-3, atol=1e-3)


def test_rate_and_distortion_belong_to_the_bound(drawn, tmp_path):
    """Fig. 5: the rate at t is the bits of all later terms; x0_hat of a blind network is known."""
    cfg, run, data = open_run(ddpm, tmp_path, "--no-clip_x0")
    schedule = ddpm.make_schedule("linear", cfg.T)
    figures.figure_bound(run, cfg, lambda x, t: 0 * x, data, schedule)
    found = run.read_metrics()["bits_per_dim"]
    parts = drawn["rate_distortion.png"]["parts"]
    distortion, rate, both = (next(iter(part["lines"].values())) for part in parts)
    assert list(distortion[0]) == list(rate[0]) == list(range(1, 21))
    assert [part["xlabel"] for part in parts][:2] == ["t", "t"]
    assert both[:2] == (rate[1], distortion[1])
    assert_close(rate[1][0], found["rate"])
    assert_close(rate[1][-1], found["L_T"])
    L = next(iter(drawn["bound.png"]["parts"][0]["lines"].values()))[1]
    assert_close(rate[1][4], sum(L[4:]) + found["L_T"])  # L holds L_1 to L_{T-1}
    for t, error in zip(*distortion[:2], strict=True):  # x0_hat - x0 = eps / sqrt(snr)
        a = schedule.alpha_bars[t].item()
        assert_close(error, 127.5 * math.sqrt((1 - a) / a), rtol=0.03, atol=0)


def test_the_rate_is_drawn_for_every_t_and_the_distortion_for_the_smallest(drawn, tmp_path):
    cfg, run, data = open_run(ddpm, tmp_path, "--T", "200")
    schedule = ddpm.make_schedule("linear", 200)
    figures.figure_bound(run, cfg, lambda x, t: 0 * x, data, schedule)
    distortion, rate, both = (next(iter(part["lines"].values()))
                              for part in drawn["rate_distortion.png"]["parts"])
    assert list(rate[0]) == list(range(1, 201))
    ts = list(distortion[0])
    assert {1, 2, 3, 5, 8, 13, 200} <= set(ts) and ts == sorted(ts) and len(ts) < 60
    assert list(both[0]) == [rate[1][t - 1] for t in ts]


def test_the_forward_figure_goes_both_ways(drawn, tmp_path, monkeypatch):
    """Eq. 2 iterated and Eq. 4 at once: different noise, one distribution."""
    cfg, run, data = open_run(ddpm, tmp_path)
    schedule, steps = ddpm.make_schedule("linear", 1000), []
    spied(monkeypatch, ddpm, "q_step", lambda given, out: steps.append((given, out)))
    figures.figure_forward(run, data, schedule)
    rows, ts = drawn["forward.png"]["rows"], [0, 50, 100, 200, 300, 500, 750, 1000]
    for i, row in enumerate(rows):
        for t, xt in zip(ts, row, strict=True):
            a, x0 = schedule.alpha_bars[t], data.test[i // 2]
            assert_close((xt - a.sqrt() * x0).std(), (1 - a).sqrt(), rtol=0.1, atol=1e-6)
    assert (rows[0][3] - rows[1][3]).abs().max() > 0.1
    assert [given["t"] for given, _ in steps] == list(range(1, 1001))
    assert torch.equal(steps[0][0]["x_prev"], data.test[:2])
    for (_, out), (given, _) in zip(steps[:-1], steps[1:], strict=True):
        assert given["x_prev"] is out  # a chain
    for t, first, second in zip(ts[1:], rows[0][1:], rows[2][1:], strict=True):
        assert torch.equal(torch.stack([first, second]), steps[t - 1][1])


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_the_schedules_stand_beside_the_weights_of_the_bound(variance, drawn, tmp_path):
    cfg, run, _ = open_run(ddpm, tmp_path, "--T", 1000, "--variance", variance)
    figures.figure_schedules(run, cfg)
    signal, log_snr, weight = drawn["schedules.png"]["parts"]
    for kind in ("linear", "cosine"):
        schedule = ddpm.make_schedule(kind, 1000)
        a = schedule.alpha_bars[1:]
        assert torch.equal(signal["lines"][kind][1], a)
        assert_close(log_snr["lines"][f"_{kind}"][1], (a / (1 - a)).log())
        t, weights = weight["lines"][f"_{kind}"]
        assert t[0] == 2 and torch.isfinite(weights).all()  # at 1 beta_tilde is 0
        assert_close(weights[498], ddpm.bound_weight(500, schedule, variance))
    assert ("tilde" in weight["title"]) == (variance == "beta_tilde")


@pytest.mark.parametrize("dataset, bound", [("digits8", False), ("digits", True)])
def test_the_bound_is_of_8_bit_images_alone(dataset, bound, tmp_path, capsys, monkeypatch):
    cfg, run, data = open_run(ddpm, tmp_path, "--dataset", dataset, "--steps", 1)
    ddpm.train(cfg, run, data)
    asked = []
    for name in [name for name in vars(figures) if name.startswith("figure_")] + ["neighbours"]:
        owner = figures.plotting if name == "neighbours" else figures
        monkeypatch.setattr(owner, name, lambda *_, name=name: asked.append(name))
    figures.main(["--sample", str(run.folder), "--out", str(tmp_path / "out")])
    assert ("figure_bound" in asked) == bound
    assert ("no bound: --dataset digits8 must be images of 8 bits" in capsys.readouterr().out) != bound
