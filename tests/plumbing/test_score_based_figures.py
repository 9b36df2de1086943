"""What score_based_diffusion_example.py and its experiments train, draw, measure and refuse."""

import importlib.util
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import score_based_diffusion_example as sb
from common import quality
from common.cli import Mistake, parse_args
from common.data import POINTS, load_data
from common.run import Run

import pytest
import torch
from conftest import ROOT, assert_same_tree, only_run, open_picture, open_run, spied
from torch.testing import assert_close


def load(name):
    """A script of experiments/ as a module."""
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", ROOT / f"experiments/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


figures, samplers = load("score_based"), load("samplers")
PICTURES = ("samples.png", "preview.png", "loss.png", "denoising.gif")


@pytest.fixture
def drawn(monkeypatch):
    """What tables, curves and points are drawn from, by the names of their files."""
    found = {}
    for name in ("table", "curves", "fields", "film", "denoising", "samples"):
        spied(monkeypatch, sb.plotting, name, lambda given, _: found.update({given["path"].name: given}))
    return found


# Training


def fit(monkeypatch, out, *argv):
    """What train returns, and what it handed to score_loss at each step."""
    cfg, run, data = open_run(sb, out, "--preview_every", 100, *argv)
    found = SimpleNamespace(cfg=cfg, run=run, data=data, losses=[])
    with monkeypatch.context() as patch:
        spied(patch, sb, "score_loss", lambda given, _: found.losses.append(SimpleNamespace(**given)))
        found.model = sb.train(cfg, run, data)
    return found


def rows_of(x, data):
    """How many of x are, nearly to the last bit, among the examples of data."""
    distance = torch.cdist(x.flatten(1), data.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return (distance.min(1).values < 1e-4).sum().item()


@pytest.mark.slow
def test_training_spreads_the_pixels_of_the_training_part_over_their_bins(tmp_path, monkeypatch):
    """Every x_0 that the loss sees is a training picture, each value somewhere in its bin."""
    found = fit(monkeypatch, tmp_path, "--batch_size", 24)
    x0 = torch.cat([call.x0 for call in found.losses])
    assert x0.shape == (6 * 24, 1, 28, 28)
    bins = (x0 + 1) * 128
    place = bins - bins.floor()
    assert place.std().item() == pytest.approx(12**-0.5, rel=0.02)
    assert place.mean().item() == pytest.approx(0.5, abs=0.01)
    pictures = (bins.floor() / 127.5 - 1).clamp(-1, 1)
    assert rows_of(pictures, found.data.train) >= 0.99 * len(x0)
    assert rows_of(pictures, found.data.test) < 0.01 * len(x0)


@pytest.mark.parametrize("argv", [["--dataset", "digits", "--no-dequantize"],
                                  ["--dataset", "two_moons"]], ids=" ".join)
def test_training_leaves_points_alone_and_pixels_when_asked_to(argv, tmp_path, monkeypatch):
    found = fit(monkeypatch, tmp_path, *argv)
    x0 = torch.cat([call.x0 for call in found.losses])
    assert rows_of(x0, found.data.train) == len(x0) and rows_of(x0, found.data.test) < len(x0)


@pytest.mark.parametrize("weighting", ["simple", "likelihood", "logit_normal"])
def test_each_step_draws_its_times_and_its_noise_by_the_weighting(weighting, tmp_path, monkeypatch):
    drawings = []
    spied(monkeypatch, sb, "draw_times", lambda given, out: drawings.append((given, out)))
    found = fit(monkeypatch, tmp_path, "--dataset", "gaussians", "--weighting", weighting, "--batch_size", 12)
    assert [(given["n"], given["weighting"]) for given, _ in drawings] == [(12, weighting)] * 6
    for call, (_, (t, density)) in zip(found.losses, drawings, strict=True):
        assert torch.equal(call.t, t) and torch.equal(call.density, density)
        assert call.weighting == weighting and call.eps.shape == call.x0.shape == (12, 2)
    noises = torch.cat([call.eps for call in found.losses]).unique(dim=0)
    assert len(noises) == 72 and abs(noises.std() - 1) < 0.2


@pytest.mark.parametrize("sde", ["ve", "vp", "subvp"])
def test_training_is_of_the_sde_that_the_config_describes(sde, tmp_path, monkeypatch):
    found = fit(monkeypatch, tmp_path, "--dataset", "swiss_roll", "--sde", sde, "--sigma_max", 7,
                "--beta_max", 9, "--steps", 1)
    used = found.losses[0].sde
    assert type(used) is {"ve": sb.VESDE, "vp": sb.VPSDE, "subvp": sb.SubVPSDE}[sde]
    assert used.sigma_max == 7 if sde == "ve" else (used.beta_max, used.kind) == (9, "linear")


@pytest.mark.parametrize("dataset", ["digits8", "swiss_roll"])
def test_sigma_data_is_that_of_the_training_part_and_is_kept(dataset, tmp_path, monkeypatch):
    """In the network that is trained, in the average, in the checkpoint and in what it gives back."""
    found = fit(monkeypatch, tmp_path, "--dataset", dataset, "--sde", "ve")
    std = found.data.train.std()
    assert abs(std - 0.5) > 0.05  # not what a network starts with
    assert all(torch.equal(call.model.sigma_data, std) for call in found.losses)
    state = torch.load(found.run.path("checkpoint.pt"), weights_only=True)
    assert torch.equal(state["ema"]["sigma_data"], std) and torch.equal(state["model"]["sigma_data"], std)
    cfg, run, data = open_run(sb, tmp_path / "again", "--sample", found.run.folder)
    model = run.trained(sb.make_network(cfg, data.shape))
    assert_close(dict(model.state_dict()), dict(found.model.state_dict()), rtol=0, atol=0)


@pytest.mark.slow
def test_a_stopped_run_of_points_resumes_to_the_last_bit(tmp_path):
    """With the random frequencies that VE's network was made with."""
    flags = ("--dataset", "swiss_roll", "--sde", "ve")
    cfg, whole, data = open_run(sb, tmp_path / "a", *flags)
    sb.train(cfg, whole, data)
    cfg, half, data = open_run(sb, tmp_path / "b", *flags)
    log = half.log

    def stop(**values):  # as by Ctrl-C in the third step
        log(**values)
        half.stopped = half.step == 2

    half.log = stop
    sb.train(cfg, half, data)
    states = {name: torch.load(run.path("checkpoint.pt"), weights_only=True)
              for name, run in (("whole", whole), ("half", half))}
    assert (states["whole"]["step"], states["half"]["step"]) == (6, 3)
    argv = ["--preset", "smoke", "--device", "cpu", "--resume", str(half.folder)]
    cfg, again = sb.open_run("score_based", sb.Config, sb.PRESETS, sb.SAMPLING, argv)
    sb.train(cfg, again, again.load(load_data, cfg.dataset))
    assert_same_tree(torch.load(half.path("checkpoint.pt"), weights_only=True), states["whole"])
    assert half.path("log.csv").read_text() == whole.path("log.csv").read_text()


# The page's main


@pytest.mark.slow
@pytest.mark.parametrize("argv, more", [
    (["--dataset", "digits8", "--sde", "ve"], ["samplers.png"]),
    (["--dataset", "two_moons", "--sde", "subvp"], ["scores.png"])], ids=["images", "points"])
def test_a_run_trains_and_writes_every_file(argv, more, tmp_path, capsys):
    sb.main(["--preset", "smoke", "--device", "cpu", "--out", str(tmp_path), *argv])
    folder = only_run(tmp_path, "score_based")
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "log.csv", "metrics.json", "checkpoint.pt", *PICTURES, *more}
    for name in (*PICTURES, *more):
        open_picture(folder / name)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.endswith(f"more: python experiments/score_based.py --sample {folder}")
    found = json.loads((folder / "metrics.json").read_text())
    assert found["sampling"]["sampler"] == "pc" and found["sampling"]["n"] == (4 if "ve" in argv else 400)
    assert ("nats" in found) == ("two_moons" in argv)


class Enough(Exception):
    """All that a test wants to see of main has happened."""


def draw_of(monkeypatch, folder, out, *argv):
    """(the Config, score and xT that main gives to a sampler, the network, n, N, batch size)."""
    seen = SimpleNamespace()

    def draw(run, n, states, network, steps, batch_size):
        seen.network, seen.n, seen.steps, seen.batch_size = network, n, steps, batch_size
        seen.states = states
        raise Enough

    with monkeypatch.context() as patch:
        patch.setattr(Run, "draw", draw)
        spied(patch, sb, "score_fn", lambda given, _: setattr(seen, "made", given))
        with pytest.raises(Enough):
            sb.main(["--out", str(out), "--device", "cpu", "--sample", str(folder), *map(str, argv)])
        spied(patch, sb, "sampling_process", lambda given, _: vars(seen).update(given))
        seen.states(range(3))
    return seen


@pytest.mark.parametrize("name", ["digits8", "gaussians"])
def test_main_draws_by_the_average_with_the_sampling_flags(name, run_of, tmp_path, monkeypatch):
    """Every flag of SAMPLING reaches the sampler or the score; points are never clamped."""
    state, images = torch.load(run_of[name] / "checkpoint.pt", weights_only=True), name == "digits8"
    flags = ["--sampler", "rk4", "--N", 7, "--predictor", "flow", "--corrector_steps", 2, "--snr", 0.37,
             "--tolerance", 0.07, "--no-denoise", "--std_floor", 0.3, "--n_samples", 5]
    found = draw_of(monkeypatch, run_of[name], tmp_path, *flags)
    cfg = found.cfg
    assert (cfg.sampler, cfg.N, cfg.predictor, cfg.corrector_steps, cfg.snr, cfg.tolerance, cfg.denoise) == (
        "rk4", 7, "flow", 2, 0.37, 0.07, False)
    assert (found.n, found.steps) == ((5 if images else 500), 7)
    assert found.made["std_floor"] == 0.3 and found.made["clip_x0"] == images
    assert found.made["model"] is found.network and not found.network.training
    assert_close(dict(found.network.state_dict()), dict(state["ema"]), rtol=0, atol=0)
    assert any(not torch.equal(state["ema"][k], state["model"][k]) for k in state["ema"])
    assert found.xT.shape == (3, *((1, 8, 8) if images else (2,)))
    if images:
        assert not draw_of(monkeypatch, run_of[name], tmp_path, "--no-clip_x0").made["clip_x0"]


def test_sampling_starts_from_the_prior_of_the_sde(run_of, tmp_path, monkeypatch):
    monkeypatch.setattr(sb.SDE, "prior_sampling", lambda self, shape, device: torch.full(shape, 9.0))
    found = draw_of(monkeypatch, run_of["digits8"], tmp_path)
    assert_close(found.xT, torch.full((3, 1, 8, 8), 9.0))


@pytest.mark.parametrize("name", ["vp", "subvp"])
def test_figure_samplers_has_a_row_for_every_sampler_of_the_sde(name, tmp_path, drawn):
    """Each named with its network calls, about as many as N; all from one noise."""
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "digits8", "--sde", name, "--N", 8)
    sde, model = sb.make_sde(cfg), sb.make_network(cfg, data.shape)
    xT = sde.prior_sampling((10, *data.shape))
    sb.figure_samplers(run, cfg, model, sb.score_fn(model, sde), sde, xT)
    rows, labels = drawn["samplers.png"]["rows"], drawn["samplers.png"]["row_labels"]
    calls = {label.split("\n")[0]: int(label.split("\n")[1].split()[0]) for label in labels}
    assert list(calls) == [each for each in sb.make_methods(cfg, sde) if each != "ODE, RK4"]
    calls.pop("ODE, RK45")
    assert calls.pop("corrector alone") == 9  # and Tweedie
    assert calls == dict.fromkeys(calls, 8)
    assert ("ancestral" in calls) == (name != "subvp")
    assert all(row.shape == (10, 1, 8, 8) for row in rows) and len(rows) == len(labels)


def test_the_film_is_divided_by_the_size_of_x_t(tmp_path, drawn):
    """VE's noise of 100 fits the page; x_0 of small noise is left as it is."""
    cfg, run, _ = open_run(sb, tmp_path, "--dataset", "gaussians", "--sde", "ve")
    sde = sb.make_sde(cfg)
    states = [(1.0, 100 * torch.ones(5, 2)), (0.0, 0.5 * torch.ones(5, 2))]
    sb.figure_denoising(run, sde, iter(states))
    first, last = drawn["denoising.gif"]["frames"]
    assert_close(first, torch.ones(5, 2), rtol=1e-3, atol=0)
    assert_close(last, 0.5 * torch.ones(5, 2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dataset", ["digits8", "gaussians"])
def test_previews_are_the_best_guess_of_one_call(dataset, tmp_path, monkeypatch):
    cfg, run, data = open_run(sb, tmp_path, "--dataset", dataset)
    parts = []
    for name in ("table", "panels"):
        monkeypatch.setattr(sb.plotting, name, lambda *given: parts.append(given))
    sde = sb.VPSDE()
    sb.figure_preview(run, lambda x, t: 0 * x, sde, data, 7)
    path, rows, *_ = parts[0]
    rows = [row[1] if dataset == "gaussians" else row for row in rows]
    for i, t in enumerate((0.1, 0.3, 0.5, 0.7)):
        xt, x0_hat = rows[1 + 2 * i], rows[2 + 2 * i]
        assert_close(x0_hat, xt / sde.m(torch.tensor(t)))  # a score of 0
    assert path == run.path("preview.png")


@pytest.mark.parametrize("dataset, function, key", [
    ("digits", "bits_per_dim", "bits_per_dim"), ("gaussians", "log_likelihood", "nats")])
def test_likelihoods_are_of_held_out_examples_and_of_a_score_that_is_not_clamped(
        dataset, function, key, tmp_path, monkeypatch):
    asked, made = [], []
    monkeypatch.setattr(sb, function, lambda score, sde, x, tolerance: (
        asked.append((x, tolerance)) or torch.arange(len(x)) + 2.0))
    spied(monkeypatch, sb, "score_fn", lambda given, _: made.append(given))
    for argv, n in ([], 2), (["--likelihood", "3", "--tolerance", "0.3"], 3), (["--likelihood", "0"], 0):
        asked.clear()
        cfg, run, data = open_run(sb, tmp_path, "--dataset", dataset, *argv)
        model = sb.make_network(cfg, data.shape)
        sb.measure_likelihood(run, cfg, model, sb.make_sde(cfg), data)
        if not n:
            assert not asked and key not in run.read_metrics()
            continue
        found, values = run.read_metrics()[key], torch.arange(n) + 2.0
        assert torch.equal(torch.cat([x for x, _ in asked]), data.test[:n]) and found["n"] == n
        assert {tolerance for _, tolerance in asked} == {cfg.tolerance}
        assert made[-1]["model"] is model and not made[-1]["clip_x0"]
        assert found["mean"] == pytest.approx(values.mean().item())
        assert found["standard_error"] == pytest.approx(values.std().item() / n**0.5)


def test_with_evaluate_all_held_out_images_have_their_likelihood(tmp_path, monkeypatch):
    monkeypatch.setattr(sb, "bits_per_dim", lambda score, sde, x, tolerance: torch.ones(len(x)))
    cfg, run, data = open_run(sb, tmp_path, "--evaluate", "10")
    sb.measure_likelihood(run, cfg, sb.make_network(cfg, data.shape), sb.make_sde(cfg), data)
    assert run.read_metrics()["bits_per_dim"]["n"] == 500


def test_a_solver_that_fails_costs_the_likelihood_alone(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise FloatingPointError("stopped at t = 0.5")

    monkeypatch.setattr(sb, "bits_per_dim", fail)
    cfg, run, data = open_run(sb, tmp_path)
    sb.measure_likelihood(run, cfg, sb.make_network(cfg, data.shape), sb.make_sde(cfg), data)
    assert "no bits/dim: stopped at t = 0.5" in capsys.readouterr().out


def test_points_take_the_preset_of_their_name():
    for name in POINTS:
        assert parse_args(sb.Config, sb.PRESETS, ["--dataset", name])[0] == sb.PRESETS[name]
        assert sb.PRESETS[name].dataset == name and not sb.PRESETS[name].dequantize
        cfg, _ = parse_args(sb.Config, sb.PRESETS, ["--dataset", name, "--preset", "smoke"])
        assert cfg == replace(sb.PRESETS["smoke"], dataset=name)


BAD = [
    (["--sigma_min", "100", "--sde", "ve"], "--sigma_min 100.0: must be below --sigma_max 100.0"),
    (["--beta_min", "30"], "--beta_min 30.0: must be below"),
    (["--sde", "subvp", "--sampler", "ancestral"], "--sampler ancestral: must be em, reverse, pc"),
    (["--sde", "subvp", "--predictor", "ancestral"], "--predictor ancestral: must be reverse, flow or none"),
    (["--predictor", "none", "--corrector_steps", "0"], "--corrector_steps 0: must be at least 1"),
    (["--dataset", "digits8", "--likelihood", "5"], "--likelihood 5: --dataset digits8"),
    (["--image_size", "30"], "--image_size 30: must be a multiple of 4"),
    (["--dataset", "swiss_roll", "--evaluate"], "--evaluate 500: --dataset swiss_roll has no labels"),
    (["--dataset", "swissroll"], "--dataset swissroll: must be one of"),
    (["--tolerance", "1"], "--tolerance 1.0: must be in (0, 1)"),
    (["--dataset", "swiss_roll", "--flip"], "--flip needs images: --dataset swiss_roll has none"),
]


@pytest.mark.parametrize("argv, message", BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input_ends_with_one_line(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sb.main(["--preset", "smoke", "--out", str(tmp_path / "out"), *argv])
    captured = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(captured) == 1
    assert captured[0].startswith("error: ") and message in captured[0]
    assert not (tmp_path / "out").exists()


def test_only_pc_needs_a_corrector_where_it_has_no_predictor(tmp_path):
    cfg, run, data = open_run(sb, tmp_path, "--predictor", "none", "--corrector_steps", 0, "--sampler", "em")
    sb.check_settings(run, cfg, sb.make_sde(cfg), data)


# experiments/score_based.py


@pytest.mark.slow
def test_the_experiment_draws_images(run_of, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "figure_paths", lambda run, sde: None)  # the same for every run
    figures.main(["--device", "cpu", "--out", str(tmp_path), "--sample", str(run_of["digits8"]),
                  "--tolerance", "0.1"])
    folder = only_run(tmp_path, "score_based")
    pictures = ("sdes.png", "codes.png", "guardrails.png", "neighbours.png")
    assert {file.name for file in folder.iterdir()} == {"config.json", "metrics.json", *pictures}
    for name in pictures:
        open_picture(folder / name)
    assert json.loads((folder / "metrics.json").read_text())["code_error"] > 0


def test_codes_are_decoded_to_what_they_encode(tmp_path, drawn):
    """Through codes and back, from the first to the second, and from one noise at three temperatures."""
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "digits8", "--tolerance", 1e-4)
    sde = sb.VPSDE()

    def score(x, t):  # that of N(0, 0.25)
        return -x / (0.25 * sde.m(t) ** 2 + sde.std(t) ** 2).view(-1, 1, 1, 1)

    figures.figure_codes(run, cfg, score, sde, data)
    x, back, walk, cold, cool, warm = drawn["codes.png"]["rows"]
    assert torch.equal(x, data.test[:8])
    assert_close(back, x, rtol=0, atol=0.01)
    assert run.read_metrics()["code_error"] == pytest.approx((back - x).square().mean().sqrt().item())
    for i, j in ((0, 0), (7, 1)):
        assert_close(walk[i], x[j], rtol=0, atol=0.01)
    assert 0.3 < warm.std() < 0.7  # data of std 0.5
    assert_close(cold, 0.7 * warm, rtol=0, atol=0.01)
    assert_close(cool, 0.9 * warm, rtol=0, atol=0.01)


@pytest.mark.slow
def test_guardrails_differ_in_one_switch_and_not_in_their_noise(tmp_path, monkeypatch, drawn):
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "digits8", "--N", 4)
    asked, made = [], []
    spied(monkeypatch, sb, "sampling_process", lambda given, _: asked.append((given, torch.get_rng_state())))
    spied(monkeypatch, sb, "score_fn", lambda given, _: made.append(given["clip_x0"]))
    figures.figure_guardrails(run, cfg, sb.make_network(cfg, data.shape), sb.make_sde(cfg), data.shape)
    assert [given["cfg"].denoise for given, _ in asked] == [True, False, True] and made == [True, True, False]
    for given, state in asked:
        assert torch.equal(given["xT"], asked[0][0]["xT"]) and torch.equal(state, asked[0][1])
        assert (given["cfg"].sampler, given["cfg"].N) == ("em", 4)


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_paths_end_where_the_data_is(name, tmp_path, monkeypatch):
    """The paper's Figure 2: SDE and ODE go from the same noise to the two Gaussians."""
    cfg, run, _ = open_run(sb, tmp_path, "--dataset", "gaussians", "--sde", name)
    monkeypatch.setattr(figures.plotting, "save", lambda sheet, path, title: kept.append(sheet))
    kept = []
    figures.figure_paths(run, sb.make_sde(cfg), steps=300)
    ways = [[line.get_xydata() for line in axis.lines] for axis in kept[0].axes]
    assert len(ways) == 2 and all(len(lines) == 8 for lines in ways)
    for one, other in zip(*ways, strict=True):
        assert tuple(one[0]) == tuple(other[0]) and one[0][0] == 1 and other[-1][0] <= 1e-3
    for lines in ways:
        ends = torch.tensor([line[-1][1] for line in lines])
        gap = (ends[:, None] - torch.tensor([-1.0, 0.6])).abs().min(1).values
        assert gap.max() < 0.6
    density = torch.tensor(kept[0].axes[0].collections[0].get_array().reshape(301, 300))
    line = torch.linspace(-3, 3, 301)
    assert abs(line[density[:, 0].argmax()].abs().item() - 0.8) < 0.25
    assert density[line.abs() < 0.05, 0].max() < 0.05 and density.max() == 1


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_the_mixture_on_the_line_moves_with_its_sde(name):
    """Figure 2's p_t: mass 1, and the moments of m x_0 + std z; its score is the derivative of log p_t."""
    sde = sb.make_sde(sb.Config(sde=name))
    log_p = figures.mixture_on_the_line(sde, (-1.0, 0.6), 0.15)
    for t in (0.1, 0.4):
        m, std = (f(torch.tensor([t]).double()).item() for f in (sde.m, sde.std))
        x = torch.linspace(-8 - 8 * std, 8 + 8 * std, 40_001).double()[:, None]
        p, line = log_p(x, torch.full((len(x),), t).double()).exp(), x[:, 0]
        mean = torch.trapezoid(p * line, line)
        assert torch.trapezoid(p, line).item() == pytest.approx(1)
        assert mean.item() == pytest.approx(-0.2 * m)
        variance = m**2 * (0.8**2 + 0.15**2) + std**2
        assert torch.trapezoid(p * (line - mean) ** 2, line).item() == pytest.approx(variance)
    x, t, h = torch.tensor([[0.1], [0.5]]).double(), torch.full((2,), 0.3).double(), 1e-6
    slope = (log_p(x + h, t) - log_p(x - h, t)) / (2 * h)
    assert_close(figures.exact_score(log_p)(x, t)[:, 0], slope, rtol=1e-5, atol=1e-6)


def test_sdes_are_the_three_with_the_constants_of_the_config(tmp_path, drawn):
    cfg, run, _ = open_run(sb, tmp_path, "--sigma_max", 7)
    figures.figure_sdes(run, cfg)
    mean, variance, snr = (part["lines"] for part in drawn["sdes.png"]["parts"])
    assert list(mean) == ["ve", "vp", "subvp"]
    assert variance["_ve"][1][-1].item() == pytest.approx(49)
    t, values = mean["vp"][:2]
    assert_close(values, torch.exp(-0.05 * t - 4.975 * t**2), rtol=1e-6, atol=0)
    assert_close(snr["_subvp"][1][1:], 2 * (mean["subvp"][1] / variance["_subvp"][1].sqrt()).log()[1:])


def exact_score_of_eight(turn):
    """The score of eight Gaussians of std 0.1 on a circle of 1.4 under VP, turned by an angle."""
    sde, angles = sb.VPSDE(), torch.arange(8).double() * math.pi / 4 + turn
    centres = 1.4 * torch.stack([angles.cos(), angles.sin()], 1)

    def score(x, t):
        m, std = sde.m(t.double())[:, None], sde.std(t.double())[:, None]
        variance = 0.01 * m**2 + std**2
        gap = x.double()[:, None] - m[..., None] * centres
        share = (-0.5 * gap.square().sum(2) / variance).softmax(1)
        return (-(share[..., None] * gap).sum(1) / variance).to(x.dtype)

    return score


@pytest.mark.slow
def test_densities_and_likelihoods_of_points_against_the_truth(tmp_path):
    """The exact score of the eight Gaussians is right, that of eight between them is all wrong."""
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "gaussians", "--tolerance", 1e-3, "--likelihood", 300)
    sde = sb.VPSDE()
    figures.figure_density(run, cfg, exact_score_of_eight(math.pi / 8), sde, data, points_a_side=50)
    density = run.read_metrics()["density"]
    assert density["sums_to"] == pytest.approx(1, abs=0.02)
    assert density["total_variation"] == pytest.approx(1, abs=0.03)
    score = exact_score_of_eight(0)
    figures.figure_density(run, cfg, score, sde, data, points_a_side=50)
    density = run.read_metrics()["density"]
    assert density["sums_to"] == pytest.approx(1, abs=0.02) and density["total_variation"] < 0.03
    open_picture(run.path("density.png"))
    figures.measure_points(run, cfg, score, sde, data, data.train[:4000])
    found = run.read_metrics()
    assert found["likelihood"]["n"] == 300
    assert found["likelihood"]["nats"] == pytest.approx(found["likelihood"]["nats_of_the_truth"], abs=0.02)
    assert found["samples"]["energy_distance"] < 3 * found["samples"]["energy_distance_of_data"] < 0.1
    figures.measure_points(run, replace(cfg, likelihood=1), score, sde, data, 0.3 * data.test[:2000])
    far = run.read_metrics()["samples"]
    assert far["energy_distance"] > 20 * far["energy_distance_of_data"]


@pytest.mark.parametrize("name", POINTS)
def test_the_true_density_sums_to_one_and_is_that_of_the_points(name):
    line = torch.linspace(-2.6, 2.6, 105)
    p = figures.point_density(name, torch.cartesian_prod(line, line))
    assert p.sum().item() * 0.05**2 == pytest.approx(1, abs=0.01)
    entropy = -(p * p.clamp(min=1e-30).log()).sum().item() * 0.05**2
    of_points = figures.point_density(name, load_data(name).test[2000:5000])
    assert -of_points.log().mean().item() == pytest.approx(entropy, abs=0.1)


@pytest.mark.slow
def test_the_experiment_draws_points(run_of, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "figure_paths", lambda run, sde: None)
    figures.main(["--device", "cpu", "--out", str(tmp_path), "--sample", str(run_of["gaussians"]), "--N", "3"])
    folder = only_run(tmp_path, "score_based")
    for name in ("sdes.png", "density.png"):
        open_picture(folder / name)
    found = json.loads((folder / "metrics.json").read_text())
    assert found["samples"]["energy_distance"] > 0 and math.isfinite(found["likelihood"]["nats"])


# experiments/samplers.py


def measured(tmp_path, monkeypatch, answer):
    """(cfg, its sweeps, the scores that samplers.measure keeps, the states it asked for, the run)."""
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "digits8", "--N", 500, "--evaluate", 10)
    sde, asked = sb.make_sde(cfg), []

    def measure_quality(states, network, steps, given):
        assert given is data and network == "model"
        asked.append((states, steps))
        return answer(len(asked))

    monkeypatch.setattr(run, "quality", measure_quality)
    sweeps = samplers.make_sweeps(cfg, sde, 200)
    scores = samplers.measure(run, sweeps, "model", lambda x, t: -x, sde, data)
    return cfg, sweeps, scores, asked, run


def test_every_sampler_is_scored_by_r_and_by_tolerance(tmp_path, monkeypatch, drawn):
    used = []
    cfg, sweeps, scores, asked, run = measured(tmp_path, monkeypatch, lambda i: {
        "n": 10, "frechet_distance": float(i), "network_calls": 200 - i, "legible": 0.5})
    spied(monkeypatch, sb, "sampling_process", lambda given, _: used.append(given))
    for states, _ in asked:
        states(range(3))
    methods = [method for sweep in sweeps.values() for method in sweep.values()]
    assert [given["cfg"] for given in used] == methods and {len(given["xT"]) for given in used} == {3}
    assert [steps for _, steps in asked] == [method.N for method in methods]
    assert sweeps["samplers"] == sb.make_methods(cfg, sb.VPSDE(), 200)
    assert [m.snr for m in sweeps["r"].values()] == list(sweeps["r"]) == [0.01, 0.04, 0.08, 0.16, 0.32]
    assert {(m.sampler, m.predictor, m.corrector_steps, m.N) for m in sweeps["r"].values()} == {
        ("pc", "reverse", 1, 100)}
    assert [m.tolerance for m in sweeps["tolerance"].values()] == [0.1, 0.01, 1e-3, 1e-4, 1e-5]
    assert {m.sampler for m in sweeps["tolerance"].values()} == {"rk45"}
    kept = run.read_metrics()
    for sweep, found in scores.items():
        assert list(kept[f"evaluation_by_{sweep}"].values()) == list(found.values())

    samplers.figure_table(run, scores)
    alone, both, r, tolerance = drawn["table1.png"]["parts"]
    numbers = {name: row["frechet_distance"] for name, row in scores["samplers"].items()}
    predictors = ("reverse diffusion", "ancestral", "probability flow")
    assert alone["bars"] == ([name.replace(" ", "\n") for name in predictors],
                             [numbers[name] for name in predictors])
    assert both["bars"][1] == [numbers[name] for name in numbers if "corrector" in name]
    assert alone["ylim"] == both["ylim"]
    rows = scores["tolerance"].values()
    assert tolerance["lines"]["_"][:2] == ([row["network_calls"] for row in rows],
                                           [row["frechet_distance"] for row in rows])
    assert list(r["lines"]["_"][0]) == [0.01, 0.04, 0.08, 0.16, 0.32]
    open_picture(run.path("table1.png"))


@pytest.mark.parametrize("failing", [1, 3])
def test_a_sampler_that_fails_leaves_the_others_their_scores(failing, tmp_path, monkeypatch, capsys):
    def answer(i):
        if i == failing:
            raise Mistake("no numbers")
        return {"n": 10, "frechet_distance": 2.0, "network_calls": 200, "legible": 0.5}

    _, sweeps, scores, _, run = measured(tmp_path, monkeypatch, answer)
    names = list(sweeps["samplers"])
    assert list(scores["samplers"]) == names[:failing - 1] + names[failing:]
    assert len(run.read_metrics()["evaluation_by_tolerance"]) == 5
    assert f"{names[failing - 1]}: no numbers" in capsys.readouterr().out
    samplers.figure_table(run, scores)
    open_picture(run.path("table1.png"))  # with the rest of them


@pytest.mark.slow
def test_the_samplers_are_drawn_beside_their_scores(run_of, tmp_path, monkeypatch, drawn):
    row, make_sweeps = {"n": 12, "frechet_distance": 2.0, "legible": 0.515}, samplers.make_sweeps
    wanted = ("Euler–Maruyama", "reverse diffusion, corrector", "ODE, RK4", 0.01, 0.1)
    monkeypatch.setattr(samplers, "make_sweeps", lambda *args: {
        sweep: {value: method for value, method in methods.items() if value in wanted}
        for sweep, methods in make_sweeps(*args).items()})
    monkeypatch.setattr(quality, "scores", lambda x, data, labels=None: dict(row))
    samplers.main(["--device", "cpu", "--out", str(tmp_path), "--sample", str(run_of["digits8"]),
                   "--evaluate", "12", "--N", "4"])
    folder = only_run(tmp_path, "score_based")
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "metrics.json", "samplers.png", "table1.png"}
    assert drawn["samplers.png"]["row_labels"] == [
        f"{name}\n4 calls, 52% legible" for name in wanted[:2]]
    assert [row.shape for row in drawn["samplers.png"]["rows"]] == [(10, 1, 8, 8)] * 2
