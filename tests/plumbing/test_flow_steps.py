"""Few steps and straight ways: what flow_steps.py, rectify.py and the race of flows ask for, score and draw."""

import json

import ddim_example as ddim
import flow_matching_example as flow
from common import quality
from common.data import Data

import numpy as np
import pytest
import torch
from conftest import experiment, mixture_eps, spied
from torch.testing import assert_close

import rectify

pytestmark = pytest.mark.slow  # the file as a whole

steps, race = experiment("flow_steps"), experiment("race")


def test_a_diffusion_drawn_as_a_flow_ends_where_ddim_does():
    """From its first t, which is not 0, since alpha_bar_T is not 0."""
    schedule, asked = ddim.make_schedule("linear", 200, 1e-4, 0.005), []

    def eps_model(x, t):  # between two steps, too
        asked.append(float(t[0]))
        alpha_bar = np.interp(float(t[0]), np.arange(201), schedule.alpha_bars.numpy())
        return mixture_eps(torch.tensor([alpha_bar]))(x, torch.zeros(len(x), dtype=torch.int64))

    v, start = steps.as_flow(eps_model, schedule.alpha_bars)
    alpha_bar = schedule.alpha_bars[-1].item()
    assert start == pytest.approx(alpha_bar**0.5 / (alpha_bar**0.5 + (1 - alpha_bar) ** 0.5)) and start > 0.2
    x0 = torch.randn(30, 2, 1, 1, dtype=torch.float64)
    found = flow.final(flow.flow_process(v, x0 * np.hypot(start, 1 - start), start, 1.0, "euler", 200))
    assert asked[0] == 200 and asked == sorted(asked, reverse=True) and asked[-1] >= 1
    expected = ddim.ddim_sample(mixture_eps(schedule.alpha_bars), x0, schedule, 200, clip_x0=False)
    assert_close(found, expected, rtol=0, atol=0.01)


def test_each_row_of_few_steps_is_drawn_by_the_network_of_its_name(copied, monkeypatch):
    given = {"flow": {}, "OT flow": {"coupling": "ot"}, "reflow": {"reflow": "x"}, "flow, VP path": {"path": "vp"}}
    files = {name: copied(i, **values) for i, (name, values) in enumerate(given.items())}
    draws, data = steps.samplers([[str(file)] for file, _ in files.values()])
    assert list(draws) == [*given, "DDIM", "DDPM as a flow"] and len(data.train) == 4500
    x0, asked = torch.randn(1, 1, 28, 28), []
    for name, (_, ema) in files.items():
        network = flow.UNet(1, 28, 8, (1, 2), 1, (7,), 1, 4, 0.0, 2).eval()
        network.load_state_dict(ema)
        end = 1 - 1e-5 if "VP" in name else 1.0
        expected = flow.final(flow.flow_process(flow.velocity_fn(network), x0, 0.0, end, "euler", 2))
        assert_close(draws[name](x0, 2), expected)
    spied(monkeypatch, steps.ddim, "ddim_sample", lambda given, _: asked.append((given["S"], given["eta"])))
    spied(monkeypatch, steps.fm, "flow_process", lambda given, _: asked.append([*given.values()][1:6]))
    assert not torch.equal(draws["DDIM"](x0, 2), draws["DDPM as a flow"](x0, 2))
    ddim_asked, (x, start, end, sampler, S) = asked
    assert ddim_asked == (2, 0.0) and (end, sampler, S) == (1.0, "euler", 2) and 0 < start < 0.05
    assert_close(x, x0 * np.hypot(start, 1 - start))


def test_few_steps_are_scored_and_drawn_beside_their_names(tmp_path, drawings, monkeypatch):
    data, of = Data("toy", torch.zeros(9, 1, 2, 2), torch.zeros(9, 1, 2, 2)), {"a": 1000, "b": 2000}
    draws = {name: lambda x, S, add=add: x + add + S for name, add in of.items()}
    monkeypatch.setattr(steps, "samplers", lambda sources: (draws, data) if sources == [["R1"], ["R2"]] else None)
    monkeypatch.setattr(quality, "scores", lambda x, _: {
        "legible": x.mean().round().item(), "frechet_distance": len(x), "recall": -x.mean().round().item(), "n": 0})
    steps.main(["R1", "R2", "--n", "120"], tmp_path)
    wanted = {(name, S): add + S for name, add in of.items() for S in (1, 2, 4, 10, 25, 50)}
    kept, given = json.loads((tmp_path / "steps.json").read_text()), drawings["steps.png"]
    assert kept == {"n": 120, "rows": {name: {
        str(S): {"legible": add + S, "frechet_distance": 120, "recall": -add - S} for S in (1, 2, 4, 10, 25, 50)}
        for name, add in of.items()}}
    assert given["row_labels"] == [f"{name}, {S}" for name, S in wanted]
    noises = [row - value for row, value in zip(given["rows"], wanted.values(), strict=True)]
    assert all(len(noise) == 10 and (noise - noises[0]).abs().max() < 0.01 for noise in noises)


def test_reflow_of_points_is_trained_on_the_pairs_of_the_first_flow(tmp_path, monkeypatch):
    """Of stand-ins: the flow that bends, x_0 + t^2 c; that of OT pairs, x_0 + 2 c t; reflow, x_0 + 3 c t."""
    c, fits, shown = torch.tensor([3.0, 1.0]), [], {}
    speeds = [lambda x, t: 2 * t[:, None] * c + 0 * x, lambda x, t: 2 * c + 0 * x, lambda x, t: 3 * c + 0 * x]

    def fit(draw, steps, couple=False):
        fits.append((draw(50), steps, couple))
        return speeds[len(fits) - 1]

    moons, gaussians = (Data(name, torch.randn(99, 2), torch.randn(9, 2)) for name in ("moons", "gaussians"))
    monkeypatch.setattr(rectify, "load_points", {"two_moons": moons, "gaussians": gaussians}.get)
    monkeypatch.setattr(rectify, "fit", fit)
    monkeypatch.setattr(rectify, "figure", lambda file, panels, data: shown.update(panels, data=data))
    rows = rectify.main(["--steps", "7"], tmp_path)
    (first, of_ot, again), counts, couples = zip(*fits, strict=True)
    assert counts == (7, 7, 7) and couples == (False, True, False)
    for x, of in zip((*first, *of_ot), (moons, gaussians) * 2, strict=True):
        assert {*map(tuple, x.tolist())} <= {*map(tuple, of.train.tolist())}
    assert_close(again[1], again[0] + c, rtol=0, atol=1e-4)
    assert rows == json.loads((tmp_path / "rectify.json").read_text())
    x0, x1 = moons.test, gaussians.test
    assert rows["pairs"] == {"transport_cost": pytest.approx((x0 - x1).square().sum(1).mean().item())}
    expected = {"flow of these pairs": (10 / 3, 10), "flow of OT pairs": (0, 40), "reflow": (0, 90)}
    for (name, (bend, cost)), (title, ways), k in zip(
            expected.items(), list(shown.items())[1:4], (1, 2, 3), strict=True):
        assert rows[name] == pytest.approx({"straightness": bend, "transport_cost": cost}, rel=1e-3, abs=1e-6)
        assert title.splitlines() == [name, f"S = {rows[name]['straightness']:.2f}, cost {cost:.2f}"]
        assert_close(ways[[0, -1]], torch.stack([x0, x0 + k * c]), rtol=0, atol=1e-3)
    assert torch.equal(shown["pairs"], torch.stack([x0, x1])) and torch.equal(shown["data"], x1)


@pytest.mark.parametrize("couple", [False, True])
def test_a_fit_is_to_the_pairs_or_to_those_of_least_cost(couple, monkeypatch):
    seen, drawn = [], torch.randn(2, 512, 2)
    spied(monkeypatch, flow, "cfm_loss", lambda given, _: seen.append((given["x0"], given["x1"])))
    rectify.fit(lambda n: drawn[:, :n], 1, couple)
    (x0, x1), n = seen[0], 128 if couple else 512
    expected = drawn[1, :n][flow.ot_coupling(drawn[0, :n], drawn[1, :n])] if couple else drawn[1]
    assert torch.equal(x0, drawn[0, :n]) and torch.equal(x1, expected)


def test_flows_race_in_25_euler_steps(tmp_path, drawings, monkeypatch):
    """As main draws: the network answers 1000, so that each sample is its noise, 1000, and the scale of the noise."""
    scored, asked, cfg = [], [], flow.Config(path="vp", steps=114, noise_scale=50.0)
    monkeypatch.setattr(race, "trained", lambda *_: (cfg, lambda x, t, y: torch.full_like(x, 1000.0), 60.0))
    monkeypatch.setattr(race, "ROOT", tmp_path)
    monkeypatch.setattr(race.fm, "scaled_noise", lambda v, path, scale: lambda x, t: v(x, t) + scale)
    spied(monkeypatch, race.fm, "flow_process", lambda given, _: asked.append(
        [given[name] for name in ("t", "t_end", "sampler", "S")]))
    monkeypatch.setattr(race.quality, "scores", lambda x, _: scored.append(x) or {
        "n": len(x), "legible": 0.25, "frechet_distance": 8.0, "classes": [], **dict.fromkeys((
            "precision", "recall", "nearest_train_rms", "legible_of_held_out", "nearest_train_rms_of_held_out"), 0.5)})
    race.main("--page flow_matching --minutes 1 --n 30 --preset smoke --device cpu".split())
    row, = json.loads((tmp_path / "results" / "flow_matching" / "race.json").read_text())["rows"]
    assert row["steps"] == 114 and row["25 steps"]["n"] == 30 and list(row) == ["cpu_minutes", "steps", "25 steps"]
    assert asked == [[0.0, 1 - 1e-5, "euler", 25]] and (scored[0] - 1050).abs().max() < 6
    assert {name: line[:2] for name, line in drawings["race.png"]["parts"][0]["lines"].items()} == {
        "flow, 25 Euler steps": ([1.0], [0.25])}
