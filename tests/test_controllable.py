"""Score SDE: Tab. 1's predictors, Sec. 5 from the command line, classes, series and forecasts."""

import json
from dataclasses import replace

import common.data
import score_based_diffusion_example as sb
from common import quality
from common.cli import Mistake, parse_args
from common.data import Data, load_series

import numpy as np
import pytest
import torch
from conftest import only_run, open_picture
from PIL import Image
from test_score_based import (
    SDES,
    Correlated,
    Mixture,
    awake,
    every_sde,
    flow_of_gaussian,
    gaussian,
    noise,
    opened,
    spy,
)
from torch.testing import assert_close

# Predictors of Tab. 1


@every_sde
def test_the_flow_predictor_is_an_euler_step_of_eq_13_in_the_limit(name):
    sde, x = SDES[name](), noise(SDES[name](), 5)
    score = gaussian(sde)
    for t in (0.9, 0.4):
        mean, std = sb.flow_step(score, sde, x, t, t - 1e-6)
        assert std == 0
        assert_close((mean - x) / -1e-6, sb.flow_drift(score, sde, x, t), rtol=1e-3, atol=1e-4)


def test_the_flow_predictor_is_eq_43_and_44():
    x, score = torch.randn(4, 2).double(), lambda x, t: -0.3 * x
    ve, vp = sb.VESDE(), sb.VPSDE()
    s, t = (torch.tensor([u], dtype=torch.float64) for u in (0.5, 0.6))
    mean, _ = sb.flow_step(score, ve, x, 0.6, 0.5)
    assert_close(mean, x + 0.5 * (ve.std(t) ** 2 - ve.std(s) ** 2) * -0.3 * x)
    beta = 1 - (vp.m(t) / vp.m(s)) ** 2
    mean, _ = sb.flow_step(score, vp, x, 0.6, 0.5)
    assert_close(mean, (2 - (1 - beta).sqrt()) * x + 0.5 * beta * -0.3 * x)


@every_sde
def test_the_flow_predictor_follows_the_flow_at_first_order(name):
    """Twice the steps, half the error, and the way is that of the exact flow."""
    sde = SDES[name]()
    data, x, errors = gaussian(sde), noise(SDES[name](), 50), []
    exact = flow_of_gaussian(sde, data, x, sde.T, sde.eps)
    for steps in (400, 800):
        states = list(sb.sde_process(sb.flow_step, data, sde, x, steps, denoise=False))
        errors.append((states[-1][1] - exact).abs().mean().item())
    assert errors[1] < 0.05 and errors[0] / errors[1] == pytest.approx(2, rel=0.2)


def test_the_identity_predictor_leaves_x_to_the_corrector_and_ends_with_tweedie(monkeypatch):
    sde, x = sb.VPSDE(), noise(sb.VPSDE(), 5)
    score = gaussian(sde)
    mean, std = sb.identity_step(score, sde, x, 0.4, 0.3)
    assert mean is x and std == 0
    mean, std = sb.identity_step(score, sde, x, 0.01, sde.eps)
    assert_close(mean, sb.tweedie(score, sde, x, 0.01), rtol=0, atol=0)
    steps = spy(monkeypatch, sb, "langevin_step")
    cfg = sb.Config(sampler="pc", predictor="none", corrector_steps=2, N=6)
    states = list(sb.process(cfg, score, sde, x, calls=6))
    assert len(steps) == 6 and len(states) == 4  # calls: all of them are the corrector's


def test_the_corrector_alone_draws_what_its_score_says():
    sde = sb.VPSDE()
    x = sb.last(sb.sde_process(sb.identity_step, gaussian(sde), sde, noise(sde), 200, corrector_steps=4,
                               snr=0.2))
    assert_close(x.mean(0), torch.tensor([0.4, -0.3]).double(), rtol=0, atol=0.06)
    assert x.std(0).sub(0.5).abs().max() < 0.06


@pytest.mark.parametrize("predictor, corrector_steps", [
    ("reverse", 0), ("reverse", 1), ("ancestral", 1), ("flow", 2), ("none", 3)])
def test_process_takes_the_predictor_of_pc(predictor, corrector_steps, monkeypatch):
    sde, taken = sb.VPSDE(), []
    step = sb.PREDICTORS[predictor]
    monkeypatch.setitem(sb.PREDICTORS, predictor, lambda *args: taken.append(args) or step(*args))
    steps = spy(monkeypatch, sb, "langevin_step")
    cfg = sb.Config(sampler="pc", predictor=predictor, corrector_steps=corrector_steps, N=5)
    list(sb.process(cfg, gaussian(sde), sde, noise(sde, 3)))
    assert len(taken) == 5 and len(steps) == 5 * corrector_steps


@pytest.mark.parametrize("name", ["vp", "subvp"])
def test_the_methods_are_those_of_table_1(name):
    cfg = sb.Config(sde=name)
    methods = sb.make_methods(cfg, sb.make_sde(cfg))
    found = {key: (its.sampler, its.predictor, its.corrector_steps) for key, its in methods.items()}
    wanted = {"Euler–Maruyama": ("em", "reverse", 1),
              "reverse diffusion": ("pc", "reverse", 0), "ancestral": ("pc", "ancestral", 0),
              "probability flow": ("pc", "flow", 0), "reverse diffusion, corrector": ("pc", "reverse", 1),
              "ancestral, corrector": ("pc", "ancestral", 1),
              "probability flow, corrector": ("pc", "flow", 1),
              "corrector alone": ("pc", "none", 1), "ODE, RK45": ("rk45", "reverse", 1),
              "ODE, RK4": ("rk4", "reverse", 1)}
    if name == "subvp":
        wanted = {key: value for key, value in wanted.items() if "ancestral" not in key}
    assert found == wanted


def test_every_sampler_is_scored_in_200_calls_by_r_and_by_tolerance(tmp_path, monkeypatch):
    cfg, run, data = opened(tmp_path, "--evaluate", 10)
    sde, asked, drawn = sb.make_sde(cfg), [], []

    def states(batch, cfg, calls):
        drawn.append((cfg, calls))
        return range(len(batch))

    def quality(states, network, steps, given):
        assert given is data and network == "model" and len(states(range(3))) == 3
        asked.append(steps)
        return {"n": 10, "frechet_distance": float(len(asked)), "network_calls": 200 - len(asked)}

    monkeypatch.setattr(run, "quality", quality)
    parts = spy(monkeypatch, sb.plotting, "curves")
    scores = sb.measure_samplers(run, cfg, "model", sde, data, states)
    methods, found = sb.make_methods(cfg, sde), run.read_metrics()
    assert list(scores) == list(methods) == list(found["evaluation_by_samplers"])
    assert [each for each, _ in drawn[:len(methods)]] == list(methods.values())
    assert {calls for _, calls in drawn} == {200} and set(asked) == {200}
    by_r, by_tolerance = drawn[len(methods):][:5], drawn[len(methods):][5:]
    assert [each.snr for each, _ in by_r] == [float(r) for r in found["evaluation_by_r"]] == [
        0.01, 0.04, 0.08, 0.16, 0.32]
    found_by_r = {(each.sampler, each.predictor, each.corrector_steps) for each, _ in by_r}
    assert found_by_r == {("pc", "reverse", 1)}
    assert [each.tolerance for each, _ in by_tolerance] == [0.1, 0.01, 1e-3, 1e-4, 1e-5]
    assert {each.sampler for each, _ in by_tolerance} == {"rk45"}

    alone, both, r, tolerance = parts[0].parts
    numbers = {name: row["frechet_distance"] for name, row in scores.items()}
    predictors = ("reverse diffusion", "ancestral", "probability flow")
    assert alone["bars"] == ([name.replace(" ", "\n") for name in predictors],
                             [numbers[name] for name in predictors])
    assert both["bars"][1] == [numbers[name] for name in numbers if "corrector" in name]
    assert alone["ylim"] == both["ylim"]
    rows = found["evaluation_by_tolerance"].values()
    assert tolerance["lines"]["_"][:2] == ([row["network_calls"] for row in rows],
                                           [row["frechet_distance"] for row in rows])
    assert list(r["lines"]["_"][0]) == [0.01, 0.04, 0.08, 0.16, 0.32]
    open_picture(run.path("table1.png"))


@pytest.mark.parametrize("failing", [0, 1])
def test_a_sampler_that_fails_leaves_the_others_their_scores(failing, tmp_path, monkeypatch, capsys):
    cfg, run, data = opened(tmp_path, "--evaluate", 10)
    sde, asked = sb.make_sde(cfg), []

    def quality(*args):
        asked.append(args)
        if len(asked) == failing + 1:
            raise Mistake("no numbers")
        return {"n": 10, "frechet_distance": 2.0, "network_calls": 200}

    monkeypatch.setattr(run, "quality", quality)
    scores = sb.measure_samplers(run, cfg, "model", sde, data, lambda *args, **how: [])
    names = list(sb.make_methods(cfg, sde))
    assert list(scores) == names[:failing] + names[failing + 1:]
    assert len(run.read_metrics()["evaluation_by_tolerance"]) == 5
    assert f"{names[failing]}: no numbers" in capsys.readouterr().out
    open_picture(run.path("table1.png"))  # the rest of them


# A person's own picture and mask


@pytest.mark.slow
def test_a_person_s_picture_is_completed_where_the_mask_is_black(run_of, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    mask = np.full((8, 8), 255, np.uint8)
    mask[2:5, 3:] = 0
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    tables = spy(monkeypatch, sb.plotting, "table")
    sb.main(["--sample", str(run_of["digits8"]), "--out", str(tmp_path), "--device", "cpu",
             "--likelihood", "0", "--image", str(tmp_path / "mine.png"),
             "--mask", str(tmp_path / "mask.png")])
    rows = next(each.rows for each in tables if each.path.name == "inpainting.png")
    assert [len(row) for row in rows] == [1] * 5
    folder, seen = only_run(tmp_path, "score_based"), []
    for i in (1, 2, 3):
        found = np.array(Image.open(folder / f"completed_{i}.png").convert("L"))
        assert (found[mask == 255] == pixels[mask == 255]).all()
        seen.append(found[mask == 0].tolist())
    assert seen[0] != seen[1] != seen[2] and pixels[mask == 0].tolist() not in seen


@pytest.mark.parametrize("own", ["image", "mask"])
def test_a_picture_takes_every_mask_and_a_mask_held_out_pictures(own, tmp_path, monkeypatch):
    cfg, run, data = opened(tmp_path, "--N", 2)
    image = torch.rand(1, 1, 28, 28) if own == "image" else None
    mask = torch.rand(1, 1, 28, 28) < 0.5 if own == "mask" else None
    tables, asked = spy(monkeypatch, sb.plotting, "table"), spy(monkeypatch, sb, "inpaint")
    sb.figure_inpainting(run, cfg, lambda x, t: -x, sb.VPSDE(), data, image, mask)
    truth = tables[0].rows[-1]
    if own == "image":
        assert tables[0].column_labels == ["box", "half", "pixels", "border"]
        assert torch.equal(truth, image.expand(4, -1, -1, -1))
    else:
        assert torch.equal(truth, data.test[:2]) and torch.equal(asked[0].mask, mask.expand(2, -1, -1, -1))
    assert run.path("completed_1.png").exists() == (own == "image")


def test_completions_are_by_the_predictor_and_corrector_of_the_config(tmp_path, monkeypatch):
    cfg, run, data = opened(tmp_path, "--predictor", "flow", "--inpaint_corrector", 3, "--inpaint_snr", 0.3)
    asked = spy(monkeypatch, sb, "inpaint")
    x = data.test[:2]
    for steps in (7, 8):
        sb.complete(replace(cfg, inpaint_N=steps), lambda x, t: -x, sb.VPSDE(), x, x > 0)
        assert asked[-1].steps == steps and asked[-1].predictor is sb.flow_step
        assert asked[-1].how == {"denoise": True, "corrector_steps": 3, "snr": 0.3}


def test_completions_are_judged_by_mask(tmp_path, monkeypatch):
    cfg, run, data = opened(tmp_path, "--evaluate", 12)
    black = lambda cfg, score, sde, x, mask: torch.where(mask, x, -torch.ones_like(x))  # noqa: E731
    monkeypatch.setattr(sb, "complete", black)
    sb.measure_completions(run, cfg, None, None, data)
    found = run.read_metrics()["completions"]
    assert list(found) == ["box", "half", "pixels", "border", "held_out"]
    assert {row["n"] for row in found.values()} == {12}
    assert found["held_out"]["legible"] > 0.8 > 0.3 > found["pixels"]["legible"]


def test_colouring_needs_grey():
    with pytest.raises(ValueError, match="grey: must have one channel"):
        sb.colorize(lambda x, t: -x, sb.VPSDE(), torch.zeros(2, 3, 4, 4), 3)


# Classes, Eq. 49


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_the_classifier_is_trained_on_what_the_sde_makes_of_the_training_part(name, tmp_path, monkeypatch):
    """All of (0, 1] as 999 t, inputs of the network's size, their own labels; then kept."""
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    cfg, run, data = opened(tmp_path, "--dataset", "digits8", "--sde", name, "--classifier_steps", 30)
    sde, seen, forward = sb.make_sde(cfg), [], sb.NoisyClassifier.forward
    monkeypatch.setattr(torch, "roll", lambda x, *args, **how: x)

    def spying(self, x, t):
        seen.append((x.detach(), t, self.training))
        return forward(self, x, t)

    monkeypatch.setattr(sb.NoisyClassifier, "forward", spying)
    labels = spy(monkeypatch, sb.F, "cross_entropy")
    noises = spy(monkeypatch, sb.SDE, "marginal")
    rates = spy(monkeypatch, sb, "set_learning_rate")
    classifier = sb.train_classifier(cfg, run, sde, data)
    assert [(call.step, call.cfg.lr, call.cfg.steps) for call in rates] == [(i, 3e-3, 30) for i in range(30)]
    assert len(seen) == 30 and all(training for *_, training in seen)
    t = torch.cat([t for _, t, _ in seen])
    assert t.min() < 5 and t.max() > 994 and abs(t.mean() - 499.5) < 30
    assert torch.cat([x for x, *_ in seen])[t > 900].std().item() == pytest.approx(1, abs=0.1)
    for call, loss in zip(noises, labels, strict=True):
        rows = [(data.train == x0).flatten(1).all(1) for x0 in call.x0[:3]]
        assert all(data.train_labels[row].eq(y).any() for row, y in zip(rows, loss.target[:3], strict=True))

    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.9])
    logits = classifier(x, t)
    scaled, times, training = seen[-1]
    c_in = sde.scaling(t, data.train.std())[0]
    assert_close(scaled, c_in.view(-1, 1, 1, 1) * x)
    assert_close(times, 999 * t)
    assert not training and logits.shape == (3, 10)
    again = sb.train_classifier(cfg, run, sde, data)  # no training: 30 steps would be seen
    assert_close(again(x, t), logits, rtol=0, atol=0)
    assert len(seen) == 32
    changed = replace(cfg, sde="subvp")  # of another SDE it is another one
    other = sb.train_classifier(changed, run, sb.make_sde(changed), data)
    assert len(seen) == 62 and (other(x, t) - logits).abs().max() > 1e-4


def test_a_classifier_whose_training_was_stopped_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    cfg, run, data = opened(tmp_path, "--dataset", "digits8", "--classifier_steps", 3)
    for stopped in (True, False):
        run.stopped = stopped  # as by Ctrl-C in the first step
        sb.train_classifier(cfg, run, sb.make_sde(cfg), data)
        assert bool(list(tmp_path.glob("cache/*"))) != stopped


@pytest.mark.slow
def test_a_trained_classifier_moves_every_sampler_to_its_class(tmp_path, monkeypatch):
    """An exact classifier of a mixture in the trained one's place: rows by sampler, columns by class."""
    cfg, run, _ = opened(tmp_path, "--N", 200, "--tolerance", 1e-3)
    sde, tables = sb.VPSDE(), spy(monkeypatch, sb.plotting, "table", lambda *args: None)
    mixture = Mixture(sde)
    data = Data("points", torch.zeros(4, 2), torch.zeros(4, 2), classes=("a", "b", "c"))
    judged = {}

    def glance(x, data, y):
        judged[list(sb.make_methods(cfg, sde))[len(judged)]] = x, y
        return {"n": len(x), "accuracy": 0.125}

    monkeypatch.setattr(sb.quality, "glance", glance)
    labels = [2, 0] * 8

    def classifier(x, t):
        return mixture.terms(x.double(), t.double())[2]

    sb.figure_classes(run, replace(cfg, classes=("c", "a") * 8),
                      lambda x, t: mixture(x.double(), t.double()).to(x.dtype), sde, data, classifier)
    found = tables[0]
    assert found.column_labels == ["c", "a"] * 8
    names = list(sb.make_methods(cfg, sde))
    assert found.row_labels == [f"{name}\n12% of 80 as asked" for name in names]
    y = torch.tensor(labels * 5)
    assert list(judged) == names
    for name, (x, asked) in judged.items():
        assert torch.equal(asked, y)
        if name != "corrector alone":  # which needs more steps
            for k in (0, 2):
                assert (x[y == k].mean(0) - mixture.mu[k]).abs().max() < 0.25, name
    assert run.read_metrics()["classes"]["ancestral"] == {"n": 80, "accuracy": 0.125}


@pytest.mark.slow
def test_classes_are_drawn_and_judged(run_of, tmp_path, monkeypatch):
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    asked = spy(monkeypatch, sb, "conditional_score")
    sb.main(["--sample", str(run_of["digits8"]), "--out", str(tmp_path), "--device", "cpu",
             "--likelihood", "0", "--classes", "3", "1", "--classifier_steps", "4"])
    folder = only_run(tmp_path, "score_based")
    open_picture(folder / "classes.png")
    assert {tuple(call.y.tolist()) for call in asked} == {(3, 1) * 5}
    assert {row["n"] for row in json.loads((folder / "metrics.json").read_text())["classes"].values()} == {10}


# Series


def test_series_net_moves_with_its_input_where_padding_is_not_seen():
    """Dilations 1, 2, 4 behind a first 3: eight values see the edge on either side."""
    net = awake(sb.SeriesNet(8, 3)).double()
    x, t = torch.randn(2, 1, 64).double(), torch.tensor([0.3, 0.8]).double() * 999
    y, moved = net(x, t), net(x.roll(5, 2), t)
    assert_close(moved[..., 13:-8], y[..., 8:-13], rtol=1e-9, atol=1e-12)
    assert (moved[..., :5] - y.roll(5, 2)[..., :5]).abs().max() > 1e-6
    changed = x.clone()
    changed[..., 32] += 1
    reached = (net(changed, t) - y).abs().amax((0, 1)) > 0
    assert reached[24:41].all() and not reached[:24].any() and not reached[41:].any()
    changed = x.clone()
    changed[..., 0] += 1  # nor does the start reach the end
    assert not ((net(changed, t) - y).abs().amax((0, 1)) > 0)[9:].any()


@pytest.mark.parametrize("length", [2, 7, 128])
@pytest.mark.parametrize("fourier", [False, True])
def test_series_net_takes_any_length_and_hears_the_time(length, fourier):
    net, x = awake(sb.SeriesNet(8, 9, fourier)), torch.randn(3, 1, length)
    a, b = (net(x, torch.full((3,), t)) for t in (1.0, 2.0))
    assert a.shape == x.shape and (a - b).abs().max() > 1e-5
    assert [block.conv1.dilation for block in net.blocks][-3:] == [(1, 64), (1, 1), (1, 2)]
    assert (sb.SeriesNet(8, 3)(x, torch.ones(3)) == 0).all()  # it starts as zero


def ar1(L, rho=0.9):
    """The covariance of an AR(1) process of variance 1."""
    lag = (torch.arange(L)[:, None] - torch.arange(L)).abs()
    return rho ** lag.double()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ve", "vp"])
def test_forecasting_an_ar1_process_gives_its_conditional_mean_and_variance(name, tmp_path):
    """Of three values behind five: rho^k times the last one, 1 - rho^2k.

    With five corrector steps within 0.15, and 25 % of the variance; a predictor alone goes half the way.
    """
    sde, L, rho = SDES[name](), 8, 0.9
    data = Correlated(sde, [0.0] * L, ar1(L, rho).tolist())
    x = torch.tensor([0.3, -0.2, 0.1, 0.6, 1.2, 0.0, 0.0, 0.0]).double().view(1, 1, L)
    known = torch.arange(L) < 5
    k, means = torch.arange(1, 4).double(), []
    for corrector_steps in (0, 5):
        cfg = sb.Config(inpaint_N=100, inpaint_corrector=corrector_steps, inpaint_snr=0.3)
        found = sb.futures(cfg, lambda x, t: data(x[:, 0], t)[:, None], sde, x, known.view(1, 1, L), 2000)
        assert found.shape == (2000, 1, 1, L)
        assert (found[..., :5] == x[..., :5]).all()
        means.append(found[:, 0, 0, 5:].mean(0))
    assert_close(means[1], 1.2 * rho**k, rtol=0, atol=0.15)
    assert_close(found[:, 0, 0, 5:].var(0), 1 - rho ** (2 * k), rtol=0.25, atol=0)
    assert (means[0] / means[1] < 0.65).all()


@pytest.mark.slow
def test_bands_hold_the_truth_as_often_as_they_say(tmp_path, monkeypatch):
    """Fans of an exact score over series drawn from it; the known part is the truth."""
    cfg, run, _ = opened(tmp_path, "--dataset", "sines", "--forecast", 4, "--inpaint_N", 60,
                         "--inpaint_corrector", 5, "--inpaint_snr", 0.3)
    L, sde, drawn = 12, sb.VPSDE(), spy(monkeypatch, sb.plotting, "fans")
    torch.manual_seed(0)
    x = (torch.randn(40, L).double() @ torch.linalg.cholesky(ar1(L)).T).float()[:, None]
    data = Data("mine", x, x, offset=10.0, unit=2.0)
    exact = Correlated(sde, [0.0] * L, ar1(L).tolist())
    sb.figure_forecast(run, cfg, lambda x, t: exact(x[:, 0].double(), t.double())[:, None].float(), sde, data)
    found = run.read_metrics()["bands_of_80_percent_hold"]
    assert found["series"] == 16 and 0.7 < found["forecast"] < 0.96 and 0.7 < found["gap"] < 0.96
    assert [part[0] for part in drawn[0].parts] == [
        f"{name}, held out {i}" for name in ("forecast", "gap") for i in (1, 2, 3)]
    _, truth, known, bands = drawn[0].parts[1]
    assert_close(truth, 10 + 2 * x[1, 0])
    assert known.tolist() == [True] * 8 + [False] * 4
    assert bands.shape == (5, L) and (bands.diff(dim=0) >= 0).all()
    assert_close(bands[:, :8], truth[:8].expand(5, -1))
    assert drawn[0].parts[3][2].tolist() == [True] * 4 + [False] * 4 + [True] * 4
    open_picture(run.path("forecast.png"))


def test_what_is_not_known_is_as_long_as_the_forecast():
    for flag, length, horizon in ((0, 128, 32), (0, 3, 1), (5, 20, 5)):
        parts = sb.unknown_parts(sb.Config(forecast=flag), length)
        assert list(parts) == ["forecast", "gap"]
        assert all(known.shape == (1, 1, length) and (~known).sum() == horizon for known in parts.values())
        assert not parts["forecast"][0, 0, -horizon:].any()


def test_spectra_and_their_distance_are_those_of_the_training_part(tmp_path, monkeypatch):
    cfg, run, data = opened(tmp_path, "--dataset", "sines")
    parts = spy(monkeypatch, sb.plotting, "curves")
    sb.figure_series(run, data, 2 * data.test[:100])
    spectra, correlations = (part["lines"] for part in parts[0].parts)
    assert_close(spectra["samples"][1], 4 * quality.spectrum(data.test[:100]))
    assert_close(spectra["data"][1], quality.spectrum(data.train))
    assert_close(correlations["_data"][1], quality.autocorrelation(data.train))
    found = run.read_metrics()["samples"]
    wanted = quality.spectral_distance(2 * data.test[:100], data.train)
    assert found["spectral_distance_db"] == pytest.approx(wanted) and wanted > 5
    assert 0 < found["spectral_distance_db_of_halves"] < 1.5


@pytest.mark.slow
def test_smoke_run_on_series_and_its_samples_as_a_table(tmp_path, monkeypatch):
    """A CSV survives the round trip: the samples are read back as data."""
    rows = 50 + 20 * np.random.default_rng(0).normal(size=(30, 10))
    np.savetxt(tmp_path / "mine.csv", rows, delimiter=",", header="a,b,c,d,e,f,g,h,i,j", comments="")
    shown = spy(monkeypatch, sb, "show_series")
    sb.main(["--preset", "smoke", "--dataset", f"csv:{tmp_path / 'mine.csv'}", "--device", "cpu",
             "--out", str(tmp_path)])
    folder = only_run(tmp_path, "score_based")
    for name in ("samples.png", "preview.png", "denoising.gif", "series.png", "forecast.png", "loss.png",
                 "paths.png"):
        open_picture(folder / name)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["ema"]
    data = load_series(f"csv:{tmp_path / 'mine.csv'}")
    assert state["offset"].item() == pytest.approx(data.offset)
    assert state["unit"].item() == pytest.approx(data.unit)
    assert abs(data.offset - 50) < 5 and abs(data.unit - 20) < 5
    table = np.loadtxt(folder / "samples.csv", delimiter=",")
    drawn = data.offset + data.unit * shown[0].samples[:, 0].double().numpy()
    assert table.shape == (20, 10) and np.allclose(table, drawn, rtol=1e-4, atol=1e-3)
    again = load_series(f"csv:{folder / 'samples.csv'}")
    both = torch.cat([again.restore(again.train), again.restore(again.test)])[:, 0].double().numpy()
    assert_close(np.sort(both, 0), np.sort(table, 0), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_the_smallest_table(tmp_path):
    """Two rows of two values, five samples: every figure is drawn."""
    (tmp_path / "mine.csv").write_text("1,2\n3,5\n")
    sb.main(["--preset", "smoke", "--dataset", f"csv:{tmp_path / 'mine.csv'}", "--n_samples", "1",
             "--device", "cpu", "--out", str(tmp_path)])
    folder = only_run(tmp_path, "score_based")
    assert np.loadtxt(folder / "samples.csv", delimiter=",").shape == (5, 2)
    for name in ("series.png", "forecast.png", "samples.png"):
        open_picture(folder / name)


def test_samples_are_in_the_unit_of_the_network_that_draws_them(tmp_path, monkeypatch):
    """Not in that of a table that has changed since: offset and unit are of the checkpoint."""
    file, rows = tmp_path / "mine.csv", np.random.default_rng(0).normal(size=(30, 10))
    np.savetxt(file, rows, delimiter=",")
    cfg, run, data = opened(tmp_path / "a", "--dataset", f"csv:{file}")
    sb.train(cfg, run, data)
    np.savetxt(file, 100 + 7 * rows, delimiter=",")
    seen = spy(monkeypatch, sb, "show_series", lambda *args: None)
    sb.main(["--sample", str(run.folder), "--out", str(tmp_path / "b"), "--device", "cpu"])
    assert seen[0].data.offset == pytest.approx(data.offset) and seen[0].data.unit == pytest.approx(data.unit)
    found = seen[0].data.restore(seen[0].data.train)
    assert_close(found, 100 + 7 * data.restore(data.train), rtol=1e-4, atol=1e-3)


def test_series_take_the_preset_of_their_kind(tmp_path):
    for name, preset in (("sines", "sines"), ("membrane", "membrane"), ("csv:/a/b.csv", "csv")):
        cfg, _ = parse_args(sb.Config, sb.PRESETS, ["--dataset", name])
        assert cfg == replace(sb.PRESETS[preset], dataset=name) and not cfg.dequantize
    assert isinstance(sb.make_network(sb.PRESETS["sines"], (1, 20)), sb.SeriesNet)


# What does not go together


@pytest.fixture
def table(tmp_path):
    np.savetxt(tmp_path / "mine.csv", np.arange(40.0).reshape(4, 10) ** 2, delimiter=",")
    return f"csv:{tmp_path / 'mine.csv'}"


@pytest.mark.parametrize("argv, message", [
    (["--dataset", "TABLE", "--forecast", "10"], "--forecast 10: must be below 10, the length of the series"),
    (["--forecast", "3"], "--forecast needs series: --dataset digits has none"),
    (["--dataset", "swiss_roll", "--image", "a.png"], "--image needs images: --dataset swiss_roll has none"),
    (["--dataset", "TABLE", "--mask", "a.png"], "--mask needs images: --dataset csv:"),
    (["--dataset", "TABLE", "--classes", "3"], "--classes needs images: --dataset csv:"),
    (["--classes", "eleven"], "--classes eleven: must be one of 0, 1, 2"),
    (["--image", "none.png"], "--image none.png: cannot be read"),
    (["--mask", "none.png"], "--mask none.png: cannot be read"),
    (["--predictor", "none", "--corrector_steps", "0"], "--corrector_steps 0: must be at least 1 with"),
    (["--predictor", "none", "--inpaint_corrector", "0"], "--inpaint_corrector 0: must be at least 1 with"),
    (["--sde", "subvp", "--predictor", "ancestral"], "--predictor ancestral: must be reverse, flow or none"),
    (["--predictor", "euler"], "--predictor: invalid choice: 'euler'"),
    (["--dataset", "TABLE", "--likelihood", "3"], "--likelihood 3: --dataset csv:")])
def test_bad_input_ends_with_one_line(argv, message, table, tmp_path, capsys):
    argv = [table if word == "TABLE" else word for word in argv]
    with pytest.raises(SystemExit) as stop:
        sb.main(["--preset", "smoke", "--out", str(tmp_path / "out"), *argv])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and message in said[0], said
    assert not (tmp_path / "out").exists()
