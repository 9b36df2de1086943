"""What score_based_diffusion_example.py and the experiments around it train, draw, measure and refuse."""

import inspect
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import score_based_diffusion_example as sb
from common import plotting
from common.cli import Mistake, parse_args
from common.data import POINTS, load_data
from common.run import Run

import numpy as np
import pytest
import torch
from conftest import ROOT, experiment, only_run, open_picture, open_run, spied
from torch.testing import assert_close

sys.path.append(str(ROOT / "experiments"))
import controllable  # noqa: E402
import ncsnpp  # noqa: E402
import series  # noqa: E402

figures, samplers, sdes = map(experiment, ("score_based", "samplers", "sdes"))
DIGITS = "--dataset", "digits8", "--attention", "4"
RUNS = {"images": (sb, *DIGITS), "points": (sb, "--dataset", "two_moons", "--sde", "subvp"),
        "ncsnpp": (ncsnpp, *DIGITS), "series": (series, "--dataset", "membrane")}


@pytest.fixture(scope="module")
def trained(request, finished):
    """(folder, printed text) of one of the runs above, made before a test watches what is drawn."""
    page, *flags = RUNS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("figure_preview", "figure_loss", "figure_denoising"):
            if page is not sb:  # the figures of the page are drawn for the page
                patch.setattr(sb, name, lambda *_: None)
        return finished(page, *flags)


# Training


@pytest.mark.slow
@pytest.mark.parametrize("page, argv, sde", [
    (sb, ["--dataset", "digits8", "--sde", "ve", "--sigma_min", 0.1, "--sigma_max", 7], sb.VESDE(0.1, 7.0)),
    (sb, ["--dataset", "digits8", "--no-dequantize", "--weighting", "likelihood"], sb.VPSDE()),
    (sb, ["--dataset", "two_moons", "--sde", "subvp", "--beta_min", 0.2, "--beta_max", 9], sb.SubVPSDE(0.2, 9.0)),
    (sb, ["--dataset", "swiss_roll", "--beta", "cosine", "--weighting", "simple"], sb.VPSDE(kind="cosine")),
    (ncsnpp, [*DIGITS, "--sde", "vp", "--no-fir"], sb.VPSDE())], ids=["ve", "vp", "points", "cosine", "ncsnpp"])
def test_each_step_hands_the_loss_what_the_config_says(page, argv, sde, tmp_path, monkeypatch):
    """A batch, spread over its bins if asked to, times and noise of its own; the SDE; sigma_data."""
    batches, times, losses = [], [], []
    spied(monkeypatch, Run, "batch", lambda given, out: batches.append((given["x"], out[0])))
    spied(monkeypatch, sb, "draw_times", lambda given, out: times.append((given["n"], given["weighting"], *out)))
    spied(monkeypatch, sb, "score_loss", lambda given, _: losses.append(SimpleNamespace(**given)))
    cfg, run, data = open_run(page, tmp_path, "--batch_size", 24, "--preview_every", 100, *argv)
    returned = sb.train(cfg, run, data, None if page is sb else page.make_network(cfg, data.shape))
    assert len(losses) == len(batches) == 6
    for loss, (source, x0), (n, weighting, t, density) in zip(losses, batches, times, strict=True):
        assert source is data.train and (n, weighting) == (24, cfg.weighting) and loss.weighting == weighting
        assert torch.equal(loss.t, t) and torch.equal(loss.density, density)
        assert type(loss.sde) is type(sde) and vars(loss.sde) == vars(sde)
        assert loss.model.sigma_data == data.train.std() and abs(loss.model.sigma_data - 0.5) > 0.05
        if x0.ndim == 4 and cfg.dequantize:
            place = (loss.x0 + 1) * 128 - (x0 + 1) * 127.5
            assert place.min() > -1e-3 and place.max() < 1.001
            assert abs(place.mean() - 0.5) < 0.05 and abs(place.std() - 12**-0.5) < 0.05
        else:
            assert torch.equal(loss.x0, x0)
    noise = torch.cat([loss.eps.flatten(1) for loss in losses])
    assert len(noise.unique(dim=0)) == 6 * 24 and abs(noise.std() - 1) < 0.25

    _, again, _ = open_run(page, tmp_path / "again", "--sample", run.folder)
    torch.manual_seed(1)  # VE's random frequencies are those of the checkpoint
    kept = again.trained(page.make_network(cfg, data.shape))
    x, t = torch.randn(3, *data.shape), torch.tensor([0.5, 3.0, 900.0])
    assert not returned.training and kept.sigma_data == data.train.std()
    assert returned(x, t).abs().max() > 0 and torch.equal(kept(x, t), returned(x, t))


# Main, of the page and of the experiments that draw as it does


OF_PAGE = {"samples.png", "preview.png", "loss.png", "denoising.gif"}


@pytest.mark.slow
@pytest.mark.parametrize("trained, pictures", [
    ("images", OF_PAGE | {"samplers.png"}), ("points", OF_PAGE | {"scores.png"}), ("ncsnpp", {"samples.png"}),
    ("series", {"samples.png", "series.png", "forecast.png"})], indirect=["trained"])
def test_a_run_writes_every_file(trained, pictures):
    folder, said = trained
    others = {file.name for file in folder.iterdir()} - pictures - {"samples.csv"}
    assert others == {"config.json", "log.csv", "metrics.json", "checkpoint.pt"}
    for name in pictures:
        open_picture(folder / name)
    found = json.loads((folder / "metrics.json").read_text())
    assert found["sampling"]["sampler"] == found["config"]["sampler"] and str(folder) in said.splitlines()[-1]
    assert found["nats" if "scores.png" in pictures else "samples"]["n"] > 1


# The fields of SAMPLING but clip_x0 and likelihood, with values that are nowhere the default
SET = {"sampler": "rk4", "N": 7, "predictor": "flow", "corrector_steps": 2, "snr": 0.37, "tolerance": 0.07,
       "denoise": False, "std_floor": 0.3, "n_samples": 5}
# (data, script, does clip_x0 hold): how many main draws, and to which functions it hands the draws or the network
MAINS = {("images", sb, True): (5, ["figure_loss", "figure_denoising", "figure_samplers", "measure_likelihood"]),
         ("points", sb, False): (500, ["figure_loss", "figure_denoising", "figure_scores", "measure_likelihood"]),
         ("ncsnpp", ncsnpp, True): (5, ["figure_loss", "figure_denoising", "measure_likelihood"]),
         ("series", series, False): (5, ["figure_loss", "figure_denoising", "figure_series", "figure_forecast"]),
         ("images", figures, True): (12, ["figure_guardrails", "figure_codes"]),
         ("points", figures, False): (10_000, ["figure_density", "measure_points"])}
MAINS |= {(data, page, False): found for (data, page, clips), found in MAINS.items() if clips}


@pytest.mark.slow
@pytest.mark.parametrize("trained, page, clips", MAINS, indirect=["trained"],
                         ids=lambda value: getattr(value, "__name__", str(value)))
def test_every_sampling_flag_reaches_the_sampler_and_figures_get_what_was_drawn(
        trained, page, clips, request, tmp_path, monkeypatch, drawings):
    """By the average of the weights, from the prior of the SDE; points and series are never clamped."""
    folder, data = trained[0], request.node.callspec.params["trained"]
    n, names = MAINS[data, page, clips]
    seen, handed, scores, processes = {}, {}, [], []
    for owner, name in ((owner, name) for owner in {sb, page} for name in names if hasattr(owner, name)):
        order = inspect.signature(getattr(owner, name))
        monkeypatch.setattr(owner, name, lambda *args, name=name, order=order: handed.update(
            {name: order.bind(*args).arguments}))

    def draw(run, n, states, network, steps, batch_size=100):
        states(range(3))
        seen.update(run=run, n=n, network=network, steps=steps,
                    samples=torch.rand(3, *processes[0]["xT"].shape[1:]))
        return seen["samples"], {"n": n}

    monkeypatch.setattr(Run, "draw", draw)
    monkeypatch.setattr(figures, "figure_paths", lambda run, sde: None)  # the same for every run
    monkeypatch.setattr(sb.SDE, "prior_sampling", lambda self, shape, device: torch.full(shape, 9.0))
    spied(monkeypatch, sb, "score_fn", lambda given, out: scores.append((given, out)))
    spied(monkeypatch, sb, "sampling_process", lambda given, _: processes.append(given))
    assert {*SET, "clip_x0", "likelihood"} == set(sb.SAMPLING)
    flags = [f"--{name}={value}" for name, value in SET.items() if name != "denoise"] + ["--no-denoise"]
    if data in ("images", "ncsnpp") and not clips:
        flags.append("--no-clip_x0")
    page.main(["--device", "cpu", "--out", str(tmp_path), "--sample", str(folder), *flags])

    (given, score), = scores
    assert given["model"] is seen["network"] and (given["std_floor"], given["clip_x0"]) == (0.3, clips)
    average = torch.load(folder / "checkpoint.pt", weights_only=True)["ema"]
    assert not seen["network"].training and seen["n"] == n and seen["steps"] == 7
    assert_close(dict(seen["network"].state_dict()), dict(average), rtol=0, atol=0)
    for process in processes:
        assert process["score"] is score and len(process["xT"]) in (3, 6, 9) and (process["xT"] == 9).all()
        assert {name: getattr(process["cfg"], name) for name in SET} == SET
    pictures = [drawings[file] for file in ("samples.png", "neighbours.png") if file in drawings]
    assert set(handed) == set(names) and len(pictures) == (names[0] != "figure_density")
    load = series.load_series if page is series else load_data
    held_out = load(seen["run"].cfg.dataset).test
    wanted = {"score": score, "model": seen["network"], "samples": seen["samples"], "drawn": seen["samples"],
              "cfg": processes[0]["cfg"]}
    for arguments in (*handed.values(), *pictures):
        assert all(arguments[name] is value for name, value in wanted.items() if name in arguments)
        if "data" in arguments:
            assert_close(arguments["data"].test, held_out)


# Figures of the page


def tags(monkeypatch, methods):
    """Each sampler draws its number in place of pictures, after as many calls of the score: 1, 2, ..."""
    starts = []

    def process(cfg, score, sde, xT):
        starts.append(xT)
        number = list(methods).index(cfg) + 1
        for _ in range(number):
            score(xT, torch.ones(len(xT)))
        yield 0.0, torch.full_like(xT, number)

    monkeypatch.setattr(sb, "sampling_process", process)
    return starts


def test_each_sampler_has_its_own_row_with_its_network_calls(tmp_path, monkeypatch, drawings):
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "digits8", "--N", 8)
    sde, model, xT = sb.make_sde(cfg), torch.nn.Identity(), torch.randn(10, *data.shape)
    methods = sb.make_methods(cfg, sde, 8)
    starts = tags(monkeypatch, methods.values())
    sb.figure_samplers(run, cfg, model, lambda x, t: model(x), sde, xT)
    rows, labels = drawings["samplers.png"]["rows"], drawings["samplers.png"]["row_labels"]
    names = list(methods)
    assert [label.split("\n")[0] for label in labels] == [name for name in names if name != "ODE, RK4"]
    for row, label in zip(rows, labels, strict=True):
        number = names.index(label.split("\n")[0]) + 1
        assert row.shape == xT.shape and (row == number).all() and label.endswith(f"\n{number} calls")
    assert all(start is xT for start in starts)


def test_the_film_is_divided_by_the_size_of_x_t(tmp_path, drawings):
    """VE's noise of 100 fits the page; x_0 of small noise is left as it is. First the noise."""
    cfg, run, _ = open_run(sb, tmp_path, "--dataset", "gaussians", "--sde", "ve")
    states = [(1.0, 100 * torch.ones(5, 2)), (0.5, torch.ones(5, 2)), (0.0, 0.5 * torch.ones(5, 2))]
    sb.figure_denoising(run, sb.make_sde(cfg), iter(states))
    film = drawings["denoising.gif"]
    first, _, last = film["frames"]
    assert_close(first, torch.ones(5, 2), rtol=1e-3, atol=0)
    assert_close(last, 0.5 * torch.ones(5, 2), rtol=1e-3, atol=0)
    assert film["captions"] == ["t = 1.00", "t = 0.50", "t = 0.00"]
    sb.figure_denoising(run, sb.make_sde(cfg), iter([(t, x.view(5, 1, 2, 1)) for t, x in states]))
    assert [t for t, _ in drawings["denoising.gif"]["states"]] == [1.0, 0.5, 0.0]
    assert_close(drawings["denoising.gif"]["states"][0][1], first.view(5, 1, 2, 1))


@pytest.mark.parametrize("dataset", ["digits8", "gaussians"])
def test_previews_are_the_best_guess_of_one_call(dataset, tmp_path, drawings):
    cfg, run, data = open_run(sb, tmp_path, "--dataset", dataset)
    sde = sb.VPSDE()
    sb.figure_preview(run, lambda x, t: 0 * x, sde, data, 7)
    found = drawings["preview.png"]
    parts = found["parts"] if dataset == "gaussians" else zip(found["row_labels"], found["rows"], strict=True)
    (name, x0), *parts = parts
    assert name == "held out" and torch.equal(x0, data.test[:len(x0)]) and "step 7" in found["title"]
    noises = []
    for i, t in enumerate((0.1, 0.3, 0.5, 0.7)):
        (noisy, xt), (guess, x0_hat) = parts[2 * i:2 * i + 2]
        m, std = sde.m(torch.tensor(t)), sde.std(torch.tensor(t))
        assert (noisy, guess) == (f"x_t, t = {t}", "x0_hat")
        assert_close(x0_hat, xt / m)  # a score of 0
        noises.append((xt - m * x0) / std)
        assert_close(noises[-1], noises[0], rtol=0, atol=1e-3)
    assert abs(noises[0].std() - 1) < 0.2 and len(parts) == 8


def test_the_loss_is_shown_by_step_and_by_t_of_held_out_examples(tmp_path, monkeypatch, drawings):
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "gaussians")
    monkeypatch.setattr(run, "read_log", lambda: {"step": [1, 2], "loss": [3.0, 2.0]})
    held_out = []
    monkeypatch.setattr(sb, "score_loss", lambda model, sde, x0, t, eps: held_out.append((model, x0)) or t.mean())
    sb.figure_loss(run, "model", sb.VPSDE(), data)
    by_step, by_t = drawings["loss.png"]["parts"]
    assert list(by_step["lines"]["each step"][1]) == [3.0, 2.0]
    middles, losses, _ = by_t["bars"]
    assert middles == pytest.approx([0.05 + i / 10 for i in range(10)])
    assert losses == pytest.approx(middles, abs=0.02)
    assert all(model == "model" and torch.equal(x0, data.test[:200]) for model, x0 in held_out)


def test_arrows_are_the_score_at_their_place_and_time_over_the_noisy_data(tmp_path, drawings):
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "two_moons")
    sde = sb.VPSDE()
    sb.figure_scores(run, lambda x, t: torch.stack([4 * t, t * x[:, 1]], 1), sde, data)
    parts, levels = drawings["scores.png"]["parts"], (0.05, 0.2, 0.5, 0.9)
    for (caption, points, where, arrows), level in zip(parts, levels, strict=True):
        t = torch.tensor(float(caption.removeprefix("t = ")))
        assert sde.std(t) / sde.m(t) == pytest.approx(level, abs=0.02)
        wanted = torch.stack([4 * t.expand(len(where)), t * where[:, 1]], 1)
        lengths = arrows.norm(dim=1, keepdim=True)
        assert_close(arrows * lengths, wanted, rtol=0.1, atol=0.1)  # t of the caption is rounded
        noise = (points - sde.m(t) * data.test[:1500]) / sde.std(t)
        assert noise.std(0).sub(1).abs().max() < 0.3


# Likelihoods


@pytest.mark.parametrize("dataset, function, key", [
    ("digits", "bits_per_dim", "bits_per_dim"), ("gaussians", "log_likelihood", "nats")])
def test_likelihoods_are_of_held_out_examples_and_of_a_score_that_is_not_clamped(
        dataset, function, key, tmp_path, monkeypatch, capsys):
    asked, made = [], []
    monkeypatch.setattr(sb, function, lambda score, sde, x, tolerance: (
        asked.append((x, tolerance)) or torch.arange(len(x)) + 2.0))
    spied(monkeypatch, sb, "score_fn", lambda given, _: made.append(given))
    cases = [([], 2), (["--likelihood", 3, "--tolerance", 0.3, "--std_floor", 0.2], 3), (["--likelihood", 0], 0)]
    for argv, n in cases + [(["--evaluate", 10], 500)] * (dataset == "digits"):
        asked.clear()
        cfg, run, data = open_run(sb, tmp_path, "--dataset", dataset, *argv)
        model = sb.make_network(cfg, data.shape)
        sb.measure_likelihood(run, cfg, model, sb.make_sde(cfg), data)
        if not n:
            assert not asked and key not in run.read_metrics()
            continue
        found = run.read_metrics()[key]
        assert torch.equal(torch.cat([x for x, _ in asked]), data.test[:n]) and found["n"] == n
        assert {tolerance for _, tolerance in asked} == {cfg.tolerance}
        assert made[-1]["model"] is model and not made[-1]["clip_x0"] and made[-1]["std_floor"] == cfg.std_floor
        values = torch.cat([torch.arange(len(x)) + 2.0 for x, _ in asked])
        assert found["mean"] == pytest.approx(values.mean().item())
        assert found["standard_error"] == pytest.approx(values.std().item() / n**0.5)

    def fail(*args, **kwargs):
        raise FloatingPointError("stopped at t = 0.5")

    monkeypatch.setattr(sb, function, fail)  # it costs the likelihood alone
    cfg, run, data = open_run(sb, tmp_path, "--dataset", dataset)
    sb.measure_likelihood(run, cfg, model, sb.make_sde(cfg), data)
    assert "stopped at t = 0.5" in capsys.readouterr().out and key not in run.read_metrics()


# What is refused, and what a data set presets


@pytest.mark.parametrize("name, page, preset", [
    ("two_moons", sb, "two_moons"), ("membrane", series, "membrane"), ("csv:/a/b.csv", series, "csv")])
def test_points_and_series_take_the_preset_of_their_name(name, page, preset):
    cfg, _ = parse_args(page.Config, page.PRESETS, ["--dataset", name])
    assert cfg == replace(page.PRESETS[preset], dataset=name) and not cfg.dequantize and cfg != sb.Config()


@pytest.mark.parametrize("page, argv, message", [
    (sb, "--sigma_min 100 --sde ve", "--sigma_min 100.0: must be below --sigma_max 100.0"),
    (sb, "--beta_min 30", "--beta_min 30.0: must be below"),
    (sb, "--sde subvp --sampler ancestral", "--sampler ancestral: must be em, reverse, pc"),
    (sb, "--sde subvp --predictor ancestral", "--predictor ancestral: must be reverse, flow or none"),
    (sb, "--predictor none --corrector_steps 0", "--corrector_steps 0: must be at least 1"),
    (sb, "--dataset digits8 --likelihood 5", "--likelihood 5: --dataset digits8"),
    (sb, "--dataset swiss_roll --evaluate", "--evaluate 500: --dataset swiss_roll has no labels"),
    (sb, "--dataset swiss_roll --flip", "--flip needs images: --dataset swiss_roll has none"),
    (sb, "--dataset digits8 --hidden 8", "--hidden needs points: --dataset digits8 has none"),
    (ncsnpp, "--sde subvp --sampler ancestral", "--sampler ancestral: must be em, reverse, pc"),
    (series, "--sde subvp --sampler ancestral", "--sampler ancestral: must be em, reverse, pc"),
    (series, "--forecast 128", "--forecast 128: must be below 128"),
    (series, "--mults 1 2", "--mults: is for pictures"),
    (series, "--predictor none --inpaint_corrector 0", "--inpaint_corrector 0: must be at least 1 with"),
    (controllable, "--predictor none --inpaint_corrector 0", "--inpaint_corrector 0: must be at least 1 with"),
    (controllable, "--predictor none --corrector_steps 0", "--corrector_steps 0: must be at least 1"),
    (controllable, "--classes eleven", "--classes eleven: must be one of 0, 1, 2"),
    (controllable, "--mask none.png", "--mask none.png: cannot be read"),
    (controllable, "--resume", "--resume: this script trains nothing")],
    ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_bad_input_ends_with_one_line(page, argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    preset = [] if page is controllable else ["--preset", "smoke"]  # it takes the shipped model
    with pytest.raises(SystemExit) as stop:
        page.main([*preset, "--out", str(tmp_path / "out"), *argv.split()])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and message in said[0]
    assert not (tmp_path / "out").exists()


# experiments/score_based.py


def test_codes_are_decoded_to_what_they_encode(tmp_path, drawings):
    """Through codes and back, from the first to the second, and from one noise at three temperatures."""
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "digits8", "--tolerance", 1e-3)
    sde = sb.VPSDE()

    def score(x, t):  # that of N(0, 0.25)
        return -x / (0.25 * sde.m(t) ** 2 + sde.std(t) ** 2).view(-1, 1, 1, 1)

    figures.figure_codes(run, cfg, score, sde, data)
    x, back, walk, cold, cool, warm = drawings["codes.png"]["rows"]
    assert drawings["codes.png"]["row_labels"] == ["held out", "encoded, decoded", "first to second", *(
        f"temperature {value}" for value in (0.7, 0.9, 1.0))]
    assert torch.equal(x, data.test[:8])
    assert_close(back, x, rtol=0, atol=0.02)
    assert (back - x).abs().max() > 0
    assert run.read_metrics()["code_error"] == pytest.approx((back - x).square().mean().sqrt().item())
    for i, j in ((0, 0), (7, 1)):
        assert_close(walk[i], x[j], rtol=0, atol=0.02)
    assert 0.3 < warm.std() < 0.7  # data of std 0.5
    assert_close(cold, 0.7 * warm, rtol=0, atol=0.02)
    assert_close(cool, 0.9 * warm, rtol=0, atol=0.02)


def test_guardrails_differ_in_one_switch_and_not_in_their_noise(tmp_path, monkeypatch, drawings):
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "digits8", "--N", 30, "--std_floor", 0.1)
    starts = []

    def process(cfg, score, sde, xT):  # draws that say by what they were drawn
        starts.append((xT, torch.rand(1)))
        assert (cfg.sampler, cfg.N) == ("em", 20)
        clips, floor = score
        yield 0.0, xT * 0 + 10 * cfg.denoise + clips + floor

    monkeypatch.setattr(sb, "score_fn", lambda model, sde, std_floor, clip_x0: (clip_x0, std_floor))
    monkeypatch.setattr(sb, "sampling_process", process)
    figures.figure_guardrails(run, cfg, "model", sb.make_sde(cfg), data.shape)
    table = drawings["guardrails.png"]
    assert [label.split("\n")[0] for label in table["row_labels"]] == [
        "as it is", "last noise kept", "x0_hat not clamped"]
    assert [row.mean().item() for row in table["rows"]] == pytest.approx([11.1, 1.1, 10.1])
    assert all(torch.equal(xT, starts[0][0]) and torch.equal(noise, starts[0][1]) for xT, noise in starts)


def test_sdes_are_the_three_with_the_constants_of_the_config(tmp_path, drawings):
    cfg, run, _ = open_run(sb, tmp_path, "--sigma_max", 7, "--beta_max", 10)
    figures.figure_sdes(run, cfg)
    mean, variance, snr = (part["lines"] for part in drawings["sdes.png"]["parts"])
    assert list(mean) == ["ve", "vp", "subvp"]
    assert variance["_ve"][1][-1].item() == pytest.approx(49)
    t, m = mean["vp"][:2]
    assert_close(m, torch.exp(-0.05 * t - 2.475 * t**2), rtol=1e-6, atol=0)
    assert_close(variance["_vp"][1], 1 - m**2, rtol=1e-6, atol=1e-9)
    assert_close(variance["_subvp"][1], (1 - m**2) ** 2, rtol=1e-6, atol=1e-9)
    for name in ("vp", "subvp"):
        assert_close(snr[f"_{name}"][1][1:], 2 * (mean[name][1] / variance[f"_{name}"][1].sqrt()).log()[1:])


@pytest.fixture
def sheets(monkeypatch):
    """The figures that experiments would save, none of which is drawn."""
    kept = []
    monkeypatch.setattr(plotting, "save", lambda sheet, path, title: kept.append(sheet))
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ve", "vp"])
def test_paths_end_where_the_data_is(name, tmp_path, sheets):
    """The paper's Figure 2: SDE and ODE go from the same noise to the two Gaussians."""
    cfg, run, _ = open_run(sb, tmp_path, "--dataset", "gaussians", "--sde", name)
    figures.figure_paths(run, sb.make_sde(cfg), steps=100)
    axes = sheets[0].axes
    assert [axis.get_title()[:11] for axis in axes] == ["reverse SDE", "probability"]
    ways = [np.stack([line.get_xydata() for line in axis.lines]) for axis in axes]  # (path, state, (t, x))
    assert [len(way) for way in ways] == [8, 8]
    assert (ways[0][:, 0] == ways[1][:, 0]).all() and (ways[0][:, 0, 0] == 1).all() and ways[1][0, -1, 0] <= 1e-3
    for way in ways:
        assert np.abs(way[:, -1, 1:] - [-1.0, 0.6]).min(1).max() < 0.6
    order = ways[1][:, 0, 1].argsort()
    assert (np.diff(ways[1][order, :, 1], axis=0) > 0).all()  # ways of an ODE do not cross
    assert np.abs(np.diff(ways[0][..., 1])).sum() > 2 * np.abs(np.diff(ways[1][..., 1])).sum()
    density = torch.tensor(axes[0].collections[0].get_array().reshape(301, 300))
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


def score_of(centres):
    """The score of equal Gaussians of std 0.1 about these centres in the plane, under VP."""
    sde = sb.VPSDE()

    def score(x, t):
        m, std = sde.m(t.double())[:, None], sde.std(t.double())[:, None]
        variance = 0.01 * m**2 + std**2
        gap = x.double()[:, None] - m[..., None] * centres
        share = (-0.5 * gap.square().sum(2) / variance).softmax(1)
        return (-(share[..., None] * gap).sum(1) / variance).to(x.dtype)

    return score


def eight(turn=0.0):
    """The centres of the data set `gaussians`, turned by an angle."""
    angles = torch.arange(8).double() * math.pi / 4 + turn
    return 1.4 * torch.stack([angles.cos(), angles.sin()], 1)


def moments_seen(image):
    """(mean, mean of the squares and of x y) of the density that a picture shows on its axes."""
    p, (left, right, bottom, top) = np.asarray(image.get_array()), image.get_extent()
    rows, columns = np.linspace(bottom, top, len(p)), np.linspace(left, right, p.shape[1])
    x, y = np.meshgrid(columns, rows if image.origin == "lower" else rows[::-1])
    return [(p * value).sum() / p.sum() for value in (x, y, x * x, y * y, x * y)]


@pytest.mark.slow
def test_densities_are_shown_on_their_axes_and_measured_against_the_truth(tmp_path, sheets):
    """Model and truth each look like themselves: nothing here is the same after a turn or a mirroring."""
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "two_moons", "--tolerance", 1e-2)
    centres = torch.tensor([[1.3, -0.2], [-0.9, 0.8], [0.2, -1.5]]).double()
    figures.figure_density(run, cfg, score_of(centres), sb.VPSDE(), data, points_a_side=30)
    truth, second = data.test.double(), centres.T @ centres / 3 + 0.01 * torch.eye(2).double()
    wanted = {"model": [*centres.mean(0), second[0, 0], second[1, 1], second[0, 1]],
              "truth": [*truth.mean(0), *truth.square().mean(0), truth.prod(1).mean()]}
    for axis, (name, moments) in zip(sheets[0].axes, wanted.items(), strict=True):
        assert axis.get_title().startswith(name)
        assert moments_seen(axis.images[0]) == pytest.approx([float(value) for value in moments], abs=0.04)
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "gaussians", "--tolerance", 1e-2)
    for turn, distance in ((math.pi / 8, 1), (0, 0)):  # all wrong, all right
        figures.figure_density(run, cfg, score_of(eight(turn)), sb.VPSDE(), data, points_a_side=30)
        found = run.read_metrics()["density"]
        assert found["sums_to"] == pytest.approx(1, abs=0.03)
        assert found["total_variation"] == pytest.approx(distance, abs=0.04)


@pytest.mark.slow
def test_points_are_measured_against_held_out_points(tmp_path):
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "gaussians", "--tolerance", 1e-2, "--likelihood", 300)
    for score, samples, n in ((score_of(eight()), data.train[:4000], 300), (score_of(eight(0.1)), 0.3 * data.test, 7)):
        figures.measure_points(run, replace(cfg, likelihood=n), score, sb.VPSDE(), data, samples)
        found, likelihood = run.read_metrics()["samples"], run.read_metrics()["likelihood"]
        ratio = found["energy_distance"] / found["energy_distance_of_data"]
        loss = likelihood["nats_of_the_truth"] - likelihood["nats"]
        truth = figures.point_density("gaussians", data.test[:n]).log().mean().item()
        assert likelihood["n"] == n and likelihood["nats_of_the_truth"] == pytest.approx(truth)
        assert (ratio < 3 and abs(loss) < 0.02) if n == 300 else (ratio > 20 and loss > 0.1)
    assert found["energy_distance_of_data"] < 0.03


@pytest.mark.parametrize("name", POINTS)
def test_the_true_density_sums_to_one_and_is_that_of_the_points(name):
    line = torch.linspace(-2.6, 2.6, 53)
    p = figures.point_density(name, torch.cartesian_prod(line, line))
    assert p.sum().item() * 0.1**2 == pytest.approx(1, abs=0.01)
    entropy = -(p * p.clamp(min=1e-30).log()).sum().item() * 0.1**2
    of_points = figures.point_density(name, load_data(name).test[2000:3500])
    assert -of_points.log().mean().item() == pytest.approx(entropy, abs=0.1)


# experiments/samplers.py and sdes.py


@pytest.mark.parametrize("trained", ["images"], indirect=True)
def test_every_sampler_is_scored_by_r_and_by_tolerance(trained, tmp_path, monkeypatch, capsys, drawings):
    """One fails, which leaves the others their scores. Rows, bars and curves are of what their labels say."""
    argv = ["--sample", str(trained[0]), "--N", "500", "--evaluate", "10"]
    cfg, _, data = open_run(sb, tmp_path, *argv)
    sweeps, steps = samplers.make_sweeps(cfg, sb.make_sde(cfg), 200), []
    methods = [method for sweep in sweeps.values() for method in sweep.values()]
    assert sweeps["samplers"] == sb.make_methods(cfg, sb.VPSDE(), 200)
    both = replace(cfg, sampler="pc", predictor="reverse", corrector_steps=1, N=100)
    assert sweeps["r"] == {r: replace(both, snr=r) for r in (0.01, 0.04, 0.08, 0.16, 0.32)}
    assert sweeps["tolerance"] == {tolerance: replace(cfg, sampler="rk45", tolerance=tolerance)
                                   for tolerance in (0.1, 0.01, 1e-3, 1e-4, 1e-5)}
    starts = tags(monkeypatch, methods)

    def quality(run, states, network, n, given):
        number = sb.final(states(range(3))).mean().item()
        steps.append(n)
        if number == 3:
            raise Mistake("no numbers")
        assert torch.equal(given.train, data.train)
        return {"n": 10, "frechet_distance": number, "network_calls": 200 - number, "legible": number / 100}

    monkeypatch.setattr(Run, "quality", quality)
    monkeypatch.setattr(sb, "score_fn", lambda model, sde, std_floor, clip_x0: lambda x, t: x)
    samplers.main(["--device", "cpu", "--preset", "smoke", "--out", str(tmp_path), *argv])
    failed = list(sweeps["samplers"])[2]
    assert f"{failed}: no numbers" in capsys.readouterr().out and steps == [method.N for method in methods]
    numbers = {sweep: {value: methods.index(method) + 1 for value, method in found.items() if value != failed}
               for sweep, found in sweeps.items()}
    kept = json.loads((only_run(tmp_path, "score_based") / "metrics.json").read_text())
    for sweep, found in numbers.items():
        rows = kept[f"evaluation_by_{sweep}"]
        assert {name: row["frechet_distance"] for name, row in rows.items()} == {str(k): v for k, v in found.items()}

    table, found = drawings["samplers.png"], dict(numbers["samplers"])
    found.pop("ODE, RK4")
    assert table["row_labels"] == [f"{name}\n{200 - i} calls, {i}% legible" for name, i in found.items()]
    assert all((row == i).all() and len(row) == 10 for row, i in zip(table["rows"], found.values(), strict=True))
    assert all(torch.equal(start, starts[-1]) for start in starts[-len(found):])  # from one noise
    alone, corrected, r, tolerance = drawings["table1.png"]["parts"]
    predictors = ["reverse diffusion", "ancestral", "probability flow"]
    for part, ending in ((alone, ""), (corrected, ", corrector")):
        names, heights = part["bars"]
        assert names[:3] == [name.replace(" ", "\n") for name in predictors]
        wanted = [numbers["samplers"].get(name + ending, math.nan) for name in predictors]
        assert heights[:3] == pytest.approx(wanted, nan_ok=True) and part["ylim"] == alone["ylim"]
    assert "corrector" in corrected["title"] and len(alone["bars"][0]) == 3
    assert r["lines"]["_"][:2] == (list(numbers["r"]), list(numbers["r"].values()))
    found = list(numbers["tolerance"].values())
    assert tolerance["lines"]["_"][:2] == ([200 - i for i in found], found)


@pytest.mark.slow
def test_three_sdes_stand_beside_their_own_numbers(tmp_path, monkeypatch, drawings):
    folders, models, order = {}, [], ("vp", "subvp", "ve")
    for i, sde in enumerate(order):
        cfg, run, data = open_run(sb, tmp_path / sde, "--dataset", "digits8", "--sde", sde, "--steps", 1)
        sb.train(cfg, run, data)
        folders[sde] = run.folder
        name = "evaluation.json" if sde == "vp" else f"evaluation_{sde}.json"
        (tmp_path / name).write_text(json.dumps({
            "evaluation": {"n": 9, "legible": 0.5 + i / 10, "frechet_distance": 3.25 + i},
            "bits_per_dim": {"mean": 2.5 + i}}))
    spied(monkeypatch, sb, "score_fn", lambda given, _: models.append(given))
    monkeypatch.setattr(sb, "sampling_process", lambda cfg, score, sde, xT: [(0.0, xT * 0 + order.index(cfg.sde))])
    sdes.main(*map(str, folders.values()), folder=tmp_path, flags=["--device=cpu", f"--out={tmp_path}"])
    assert list(drawings["three_sdes.png"]["row_labels"]) == [
        "vp: 50% of 9 legible\nFréchet distance 3.2\n2.50 bits/dim",
        "subvp: 60% of 9 legible\nFréchet distance 4.2\n3.50 bits/dim",
        "ve: 70% of 9 legible\nFréchet distance 5.2\n4.50 bits/dim"]
    for i, (row, given) in enumerate(zip(drawings["three_sdes.png"]["rows"], models, strict=True)):
        average = torch.load(folders[order[i]] / "checkpoint.pt", weights_only=True)["ema"]
        assert len(row) == 10 and (row == i).all() and given["clip_x0"]
        assert_close(dict(given["model"].state_dict()), dict(average), rtol=0, atol=0)
