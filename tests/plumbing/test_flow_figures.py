"""What the flow page and its experiment draw, measure and refuse: each row and line is what its label says."""

from types import SimpleNamespace

import flow_matching_example as flow
from common import plotting, quality
from common.data import Data

import numpy as np
import pytest
import torch
from conftest import ROOT, experiment, open_run
from torch.testing import assert_close

pytestmark = pytest.mark.slow  # the file as a whole

figures = experiment("flow_matching")
PATH = flow.StraightPath()  # whose x1_hat is x_t + (1 - t) v


def greys(*values):
    """Pictures of one grey each."""
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


@pytest.fixture
def run(tmp_path):
    return open_run(flow, tmp_path, "--dataset", "gaussians")[1]


@pytest.mark.parametrize("x1", [greys(*range(1000, 9000, 1000)), torch.full((9, 2), 7000.0)], ids=["images", "points"])
def test_the_preview_shows_what_is_held_out_then_pairs_of_x_t_and_x1_hat(x1, run, drawings, monkeypatch):
    monkeypatch.setattr(flow, "velocity_fn", lambda model: lambda x, t: 50 + 100 * flow.per_example(t, x) + 0 * x)
    state = torch.get_rng_state()
    flow.figure_preview(run, None, PATH, Data("toy", x1 + 1e6, x1), 17)
    given = drawings["preview.png"]
    (name, shown), *parts = given.get("parts") or zip(given["row_labels"], given["rows"], strict=True)
    assert name == "held out" and torch.equal(shown, x1[:6] if x1.ndim == 4 else x1) and "17" in given["title"]
    for t, (noisy, xt), (guess, x1_hat) in zip((0.8, 0.5, 0.2, 0.0), parts[::2], parts[1::2], strict=True):
        assert (noisy, guess) == (f"x_t, t = {t}", "x1_hat") and (xt - t * shown).abs().max() < 6
        assert_close(x1_hat, xt + (1 - t) * (50 + 100 * t), rtol=1e-5, atol=0.01)
    assert torch.equal(state, torch.get_rng_state())  # the draws of training are left alone


def test_the_steps_are_those_of_euler_and_the_arrows_are_the_velocity(run, drawings):
    """Euler's S steps of dx / dt = x make (1 + 1 / S)^S x."""
    x0 = greys(1, 2, 3)
    flow.figure_steps(run, lambda x, t: x, x0, 1.0)
    given = drawings["steps.png"]
    for S, row, label in zip((1, 2, 4, 10, 25, 50), given["rows"], given["row_labels"], strict=True):
        assert label == f"S = {S}"
        assert_close(row, (1 + 1 / S) ** S * x0)
    flow.figure_velocity(run, lambda x, t: 10 * x + t[:, None], PATH, Data("toy", x0, torch.full((9, 2), 1000.0)))
    for t, (label, points, where, arrows) in zip((0, 0.4, 0.7, 0.95), drawings["velocity.png"]["parts"], strict=True):
        assert label == f"t = {t:.2f}" and where.min() < -2 < 2 < where.max() and (points - 1000 * t).abs().max() < 6
        assert_close(arrows, 10 * where + t)


def test_main_draws_the_classes_that_were_asked_for(copied, tmp_path, drawings, monkeypatch):
    """A stand-in leaves what it was asked for in the picture. Batches go on where the one before has ended."""
    true, asked, glanced, scales = flow.velocity_fn, [], [], []
    file, ema = copied(0)

    def velocity_fn(model, y=None, w=0.0):
        v = true(model, y, w)
        v.leaves = 0 if y is None else 100 * w + 10_000 * y.view(-1, 1, 1, 1)
        assert torch.equal(model.conv_out.weight, ema["conv_out.weight"])
        return v

    def scaled_noise(v, path, scale):
        scales.append((type(path), scale))
        return SimpleNamespace(leaves=v.leaves + 1000)

    def flow_process(v, x, t, t_end, sampler, S, tolerance=None):
        asked.append((t, t_end, sampler, S, tolerance))
        yield t, x
        yield t_end, x + v.leaves

    monkeypatch.setattr(flow, "velocity_fn", velocity_fn)
    monkeypatch.setattr(flow, "flow_process", flow_process)
    monkeypatch.setattr(flow, "scaled_noise", scaled_noise)
    monkeypatch.setattr(plotting, "loss_by_t", lambda *_: {})
    for name in ("glance", "scores"):
        monkeypatch.setattr(quality, name, lambda x, data, labels: glanced.append((x, labels)) or {})
    flow.main(["--sample", str(file), "--classes", "3", "1", "4", "--w", "2", "--sampler", "heun", "--S", "7",
               "--n_samples", "130", "--evaluate", "140", "--likelihood", "0", "--tolerance", "0.3", "--noise_scale", "1.3",
               "--out", str(tmp_path / "out")])
    *_, (_, film) = drawings["denoising.gif"]["states"]
    samples, rows = drawings["samples.png"]["drawn"], drawings["steps.png"]["rows"]
    assert len(samples) == 130 and len(film) == 9 and len(rows[0]) == 10 and glanced[0][0] is samples
    for x, scaled in ((samples, 1000), (film, 1000), (glanced[1][0], 1000), *((row, 0) for row in rows)):
        mean = x.flatten(1).mean(1) - 10_000 * torch.tensor([3, 1, 4]).repeat(50)[:len(x)]
        assert (mean - 200 - scaled).abs().max() < 2  # steps.png is of the flow itself
    assert set(scales) == {(flow.StraightPath, 1.3)}
    assert [labels.tolist() for _, labels in glanced] == [([3, 1, 4] * 47)[:n] for n in (130, 140)]
    assert {ask for ask in asked if ask[2] == "heun"} == {(0.0, 1.0, "heun", 7, 0.3)}
    assert [ask[3] for ask in asked if ask[2] == "euler"] == [1, 2, 4, 10, 25, 50]


def test_a_reflowed_run_draws_by_its_velocity_as_it_is(copied, tmp_path, drawings, monkeypatch):
    """Its pairs were drawn with the noise scaled."""
    file, _ = copied(0, reflow="the run that drew its pairs")
    monkeypatch.setattr(flow, "scaled_noise", None)
    monkeypatch.setattr(plotting, "loss_by_t", lambda *_: {})
    flow.main(["--sample", str(file), "--S", "2", "--likelihood", "0", "--out", str(tmp_path / "out")])
    assert len(drawings["samples.png"]["drawn"]) == 4


@pytest.mark.parametrize("evaluate", [None, 10])
def test_the_likelihood_is_of_held_out_examples(evaluate, run, monkeypatch):
    """Of as many as asked for, or of all with --evaluate; its standard error beside it."""
    data, run.opts.evaluate = Data("toy", torch.zeros(9, 2), torch.arange(24.0).view(12, 2)), evaluate
    monkeypatch.setattr(flow, "log_likelihood", lambda v, x, t_end, tolerance: x[:, 0] * t_end + tolerance)
    flow.measure_likelihood(run, SimpleNamespace(likelihood=4, tolerance=0.5), None, flow.VPPath(), data)
    n, found = 12 if evaluate else 4, 0.5 + np.arange(0, 24, 2)
    assert run.read_metrics()["nats"] == pytest.approx(
        {"n": n, "mean": found[:n].mean(), "standard_error": found[:n].std(ddof=1) / n**0.5}, rel=1e-4)


@pytest.mark.parametrize("argv, words", [
    ("--classes 3", "--classes 3: needs"), ("--p_uncond 0.5 --classes 3 cat", "--classes cat: must be one of 0"),
    ("--p_uncond 0.5 --dataset two_moons", "--p_uncond 0.5: must be 1"), ("--hidden 8", "--hidden needs points"),
    ("--dataset two_moons --mults 1", "--mults needs images"), ("--p_uncond 0", "--p_uncond 0.0: must be in (0, 1]"),
    ("--reflow none --coupling ot", "--coupling ot: must be independent"),
    ("--path vp --beta_min 30", "--beta_min 30.0: must be below"), ("--reflow none", "--reflow none: no such file"),
    (f"--reflow {ROOT}/pretrained/ddpm.pt", "must be of flow_matching")])
def test_a_setting_that_nothing_can_follow_is_refused_in_a_line(argv, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        flow.main(["--preset", "smoke", "--device", "cpu", "--out", str(tmp_path / "out"), *argv.split()])
    said, = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and said.startswith("error: ") and words in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("bent", [False, True])
def test_a_straight_flow_has_straightness_0_and_a_bent_one_its_closed_form(bent, run, drawings):
    """x_t = x_0 + t^2 c moves at 2 t c, so that |(x_1 - x_0) - v|^2 is c^2 (1 - 2 t)^2, on average c^2 / 3."""
    x0, c, times = torch.randn(5, 2), torch.tensor([3.0, 1.0]), [i / 100 for i in range(101)]
    states = [(t, x0 + (t**2 if bent else t) * c) for t in times]
    figures.figure_straightness(run, lambda x, t: (2 * t[:, None] * c if bent else c).expand_as(x), states)
    part, = drawings["straightness.png"]["parts"]
    ts, bend, _ = part["lines"]["_"]
    assert ts == times[:-1] and bend == pytest.approx([5 * (1 - 2 * t) ** 2 * bent for t in ts], abs=1e-4)
    found = run.read_metrics()
    assert found["transport_cost"] == pytest.approx(5, rel=1e-4)
    assert found["straightness"] == pytest.approx(5 / 3 * bent, rel=1e-3, abs=1e-9)
    assert f"{found['straightness']:.3f}" in part["title"]


def test_the_way_and_the_first_step(run, drawings):
    states = [(i / 8, greys(*(1000 * k + i for k in range(5)))) for i in range(9)]
    figures.figure_way(run, lambda x, t: x + 10 * flow.per_example(t, x), PATH, states)
    given, t = drawings["way.png"], torch.arange(8).view(-1, 1, 1, 1) / 8
    assert given["column_labels"] == [f"t = {i / 8:.2f}" for i in range(8)]
    assert given["row_labels"] == ["x_t", "x1_hat"] * 4
    for k, (xt, x1_hat) in enumerate(zip(given["rows"][::2], given["rows"][1::2], strict=True)):
        assert_close(xt, torch.cat([x[k:k + 1] for _, x in states[:-1]]))
        assert_close(x1_hat, xt + (1 - t) * (xt + 10 * t))
    x0, data = greys(1, 2, 3), Data("toy", greys(4, 8), greys(100))
    figures.figure_one_step(run, lambda x, t: 7 - x + flow.per_example(t, x), PATH, data, x0)
    given = drawings["one_step.png"]
    assert given["row_labels"] == ["noise x_0", "x1_hat(x_0, 0)", "mean of x_1"]
    assert_close(given["rows"], [x0, greys(7, 7, 7), greys(6, 6, 6)])


def test_paths_are_the_flow_and_beside_it_the_straight_connections(run, monkeypatch):
    sheets, data = [], torch.randn(30, 2)
    monkeypatch.setattr(plotting, "save", lambda sheet, path, title: sheets.append(sheet))
    states = [(t, torch.randn(120, 2)) for t in (0.0, 0.5, 1.0)]
    figures.figure_paths(run, states, Data("toy", data + 9, data))
    ways = torch.stack([x[:100] for _, x in states])
    for axis, title, lines in zip(sheets[0].axes, ("the flow", "from x_0 to x_1 directly"), (ways, ways[[0, 2]]),
                                  strict=True):
        assert axis.get_title() == title
        assert_close(torch.tensor(np.stack([line.get_xydata() for line in axis.lines], 1)).float(), lines)
        grey, dots = (torch.tensor(np.asarray(part.get_offsets())).float() for part in axis.collections)
        assert torch.equal(grey, data) and torch.equal(dots, ways[0])
