"""What score_based_diffusion_example.py and the experiments around it train, draw, measure and refuse."""

import inspect
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import score_based_diffusion_example as sb
from common import plotting
from common.cli import Mistake, parse_args
from common.data import POINTS, Data, load_data
from common.run import Run

import numpy as np
import pytest
import torch
from conftest import experiment, only_run, open_picture, open_run, spied
from torch.testing import assert_close

import controllable
import ncsnpp
import series

pytestmark = pytest.mark.slow  # the file as a whole

figures, samplers, sdes = map(experiment, ("score_based", "samplers", "sdes"))
DIGITS = "--dataset", "digits8", "--attention", "4"
SHORT = "--steps", "2", "--preview_every", "2", "--N", "2"
RUNS = {"images": (sb, *DIGITS), "points": (sb, "--dataset", "two_moons", "--sde", "subvp", *SHORT),
        "ncsnpp": (ncsnpp, *DIGITS, *SHORT), "series": (series, "--n_samples", "1", *SHORT)}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The smallest table: two series of two values."""
    file = tmp_path_factory.mktemp("table") / "mine.csv"
    file.write_text("1,2\n3,5\n")
    return f"csv:{file}"


@pytest.fixture(scope="module")
def trained(request, finished, table):
    """(name, folder, printed text) of one of these runs. The figures of the page are drawn once, which is slow."""
    page, *flags = RUNS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("figure_preview", "figure_loss", "figure_denoising"):
            if request.param != "images":
                patch.setattr(sb, name, lambda *_: None)
        return request.param, *finished(page, *flags, *["--dataset", table] * (page is series))


@pytest.mark.parametrize("dataset, sde", [("digits8", "ve"), ("two_moons", "subvp")])
def test_each_step_hands_the_loss_what_the_config_says(dataset, sde, tmp_path, monkeypatch):
    """A batch, images spread over their bins, times and noise of its own; the SDE; the std of the data."""
    batches, times, losses = [], [], []
    spied(monkeypatch, Run, "batch", lambda given, out: batches.append((given["x"], out[0])))
    spied(monkeypatch, sb, "draw_times", lambda given, out: times.append((given["n"], given["weighting"], *out)))
    spied(monkeypatch, sb, "score_loss", lambda given, _: losses.append(SimpleNamespace(**given)))
    cfg, run, data = open_run(sb, tmp_path, "--batch_size", 24, "--steps", 3, "--preview_every", 9, "--dataset",
                              dataset, "--sde", sde, "--beta_max", 9, "--sigma_max", 7, "--weighting", "likelihood")
    model = sb.train(cfg, run, data)
    for loss, (source, x0), (n, weighting, t, density) in zip(losses, batches, times, strict=True):
        assert source is data.train and n == 24 and weighting == loss.weighting == cfg.weighting
        assert torch.equal(loss.t, t) and torch.equal(loss.density, density)
        assert (type(loss.sde), vars(loss.sde)) == (type(sb.make_sde(cfg)), vars(sb.make_sde(cfg)))
        assert loss.model.sigma_data == data.train.std() != pytest.approx(0.5)
        place = (loss.x0 + 1) * 128 - (x0 + 1) * 127.5
        if dataset == "digits8":
            assert place.min() > -1e-3 and place.max() < 1.001 and abs(place.std() - 12**-0.5) < 0.05
        else:
            assert torch.equal(loss.x0, x0)
    assert len(torch.cat([loss.eps.flatten(1) for loss in losses]).unique(dim=0)) == 3 * 24
    assert abs(torch.cat([loss.eps.flatten() for loss in losses]).std() - 1) < 0.3
    kept = torch.load(run.path("checkpoint.pt"), weights_only=True)["ema"]
    for name, value in losses[0].model.named_buffers():  # sigma_data, and VE's random frequencies
        assert torch.equal(kept[name], value) and torch.equal(model.get_buffer(name), value)


@pytest.mark.parametrize("trained, files, n", [
    ("images", "samples.png preview.png loss.png denoising.gif samplers.png", 4), ("ncsnpp", "samples.png", 4),
    ("points", "samples.png scores.png", 2), ("series", "samples.png samples.csv series.png forecast.png", 1)],
    indirect=["trained"])
def test_a_run_writes_every_file(trained, files, n):
    name, folder, said = trained
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "log.csv", "metrics.json", "checkpoint.pt", *files.split()}
    for file in files.replace("samples.csv", "").split():
        open_picture(folder / file)
    found = json.loads((folder / "metrics.json").read_text())
    assert found["sampling"]["sampler"] == found["config"]["sampler"] and str(folder) in said.splitlines()[-1]
    assert found["nats" if name == "points" else "samples"]["n"] == n


# The fields of SAMPLING but clip_x0 and likelihood, with values that are nowhere the default
SET = {"sampler": "rk4", "N": 7, "predictor": "flow", "corrector_steps": 2, "snr": 0.37, "tolerance": 0.07,
       "denoise": False, "std_floor": 0.3, "n_samples": 5}
ALWAYS = ["figure_loss", "figure_denoising"]


@pytest.mark.parametrize("trained, page, clips, n, names", [
    ("images", sb, True, 5, [*ALWAYS, "figure_samplers", "measure_likelihood"]),
    ("points", sb, False, 500, [*ALWAYS, "figure_scores", "measure_likelihood"]),
    ("ncsnpp", ncsnpp, True, 5, [*ALWAYS, "measure_likelihood"]),
    ("ncsnpp", ncsnpp, False, 5, [*ALWAYS, "measure_likelihood"]),
    ("series", series, False, 5, [*ALWAYS, "figure_series", "figure_forecast"]),
    ("images", figures, True, 12, ["figure_guardrails", "figure_codes"]),
    ("images", figures, False, 12, ["figure_guardrails", "figure_codes"]),
    ("points", figures, False, 10_000, ["figure_density", "measure_points"])],
    indirect=["trained"], ids=lambda value: getattr(value, "__name__", str(value)))
def test_every_sampling_flag_reaches_the_sampler_and_figures_get_what_was_drawn(
        trained, page, clips, n, names, tmp_path, monkeypatch, drawings):
    """n draws by the average of the weights, from the prior of the SDE; points and series are never clamped."""
    kind, folder, _ = trained
    seen, handed, scores, processes = {}, {}, [], []

    def draw(run, n, states, model, steps, batch_size=100):
        states(range(3))
        x = torch.rand(3, *processes[0]["xT"].shape[1:])
        seen.update(n=n, steps=steps, dataset=run.cfg.dataset, model=model, samples=x, drawn=x)
        return x, {"n": n}

    for name in names:
        owner = page if hasattr(page, name) else sb
        bind = inspect.signature(getattr(owner, name)).bind
        monkeypatch.setattr(owner, name, lambda *args, name=name, bind=bind: handed.update(
            {name: bind(*args).arguments}))
    monkeypatch.setattr(Run, "draw", draw)
    monkeypatch.setattr(figures, "figure_paths", lambda run, sde: None)  # the same for every run
    monkeypatch.setattr(sb.SDE, "prior_sampling", lambda self, shape, device: torch.full(shape, 9.0))
    spied(monkeypatch, sb, "score_fn", lambda given, out: scores.append(given | {"score": out}))
    spied(monkeypatch, sb, "sampling_process", lambda given, _: processes.append(given))
    flags = [f"--{name}={value}" for name, value in SET.items() if name != "denoise"] + ["--no-denoise"]
    flags += ["--no-clip_x0"] * (not clips and kind in ("images", "ncsnpp"))
    page.main(["--device", "cpu", "--out", str(tmp_path), "--sample", str(folder), *flags])

    made, = scores
    assert made["model"] is seen["model"] and (made["std_floor"], made["clip_x0"]) == (0.3, clips)
    average = torch.load(folder / "checkpoint.pt", weights_only=True)["ema"]
    assert_close(dict(seen["model"].state_dict()), dict(average), rtol=0, atol=0)
    assert not seen["model"].training and (seen["n"], seen["steps"]) == (n, 7) and set(handed) == set(names)
    for process in processes:
        assert process["score"] is made["score"] and len(process["xT"]) in (3, 6, 9) and (process["xT"] == 9).all()
        assert {name: getattr(process["cfg"], name) for name in SET} == SET
    assert ("samples.png" in drawings) == (page is not figures)
    assert ("neighbours.png" in drawings) == (page is figures and kind == "images")
    data = series.load_series(seen["dataset"]) if page is series else load_data(seen["dataset"])
    wanted = seen | {"score": made["score"], "cfg": processes[0]["cfg"]}
    for arguments in (*handed.values(), *drawings.values()):
        for name in wanted.keys() & arguments:
            assert arguments[name] is wanted[name], name
        if "data" in arguments:
            assert_close(arguments["data"].test, data.test)


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
    numbers = {name: i for i, name in enumerate(methods, 1) if name != "ODE, RK4"}
    assert drawings["samplers.png"]["row_labels"] == [f"{name}\n{i} calls" for name, i in numbers.items()]
    assert [row.mean() for row in drawings["samplers.png"]["rows"]] == list(numbers.values())
    assert all(start is xT for start in starts)


@pytest.mark.parametrize("shape", [(5, 2), (5, 1, 2, 1)], ids=["points", "images"])
def test_the_film_is_divided_by_the_size_of_x_t(shape, tmp_path, drawings):
    """VE's noise of 100 fits the page; x_0 of small noise is left as it is. First the noise."""
    cfg, run, _ = open_run(sb, tmp_path, "--dataset", "gaussians", "--sde", "ve")
    states = [(t, torch.full(shape, x)) for t, x in ((1.0, 100.0), (0.5, 1.0), (0.0, 0.5))]
    sb.figure_denoising(run, sb.make_sde(cfg), iter(states))
    given = drawings["denoising.gif"]
    times, frames = zip(*given["states"], strict=True) if "states" in given else (given["captions"], given["frames"])
    assert list(times) in ([1.0, 0.5, 0.0], ["t = 1.00", "t = 0.50", "t = 0.00"])
    assert [frames[0].mean().item(), frames[2].mean().item()] == pytest.approx([1, 0.5], rel=1e-3)


@pytest.mark.parametrize("dataset", ["digits8", "gaussians"])
def test_previews_are_the_best_guess_of_one_call(dataset, tmp_path, drawings):
    cfg, run, data = open_run(sb, tmp_path, "--dataset", dataset)
    sde, noises = sb.VPSDE(), []
    sb.figure_preview(run, lambda x, t: 0 * x, sde, data, 7)
    found = drawings["preview.png"]
    (name, x0), *parts = found["parts"] if "parts" in found else zip(found["row_labels"], found["rows"], strict=True)
    assert name == "held out" and torch.equal(x0, data.test[:len(x0)]) and "step 7" in found["title"]
    for t, (noisy, xt), (guess, x0_hat) in zip((0.1, 0.3, 0.5, 0.7), parts[::2], parts[1::2], strict=True):
        m, std = sde.m(torch.tensor(t)), sde.std(torch.tensor(t))
        assert (noisy, guess) == (f"x_t, t = {t}", "x0_hat")
        assert_close(x0_hat, xt / m)  # a score of 0
        noises.append((xt - m * x0) / std)
        assert_close(noises[-1], noises[0], rtol=0, atol=1e-3)
    assert abs(noises[0].std() - 1) < 0.2


def test_the_loss_is_shown_by_step_and_by_t_of_held_out_examples(tmp_path, monkeypatch, drawings):
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "gaussians")
    held_out = []
    monkeypatch.setattr(run, "read_log", lambda: {"step": [1, 2], "loss": [3.0, 2.0]})
    monkeypatch.setattr(sb, "score_loss", lambda model, sde, x0, t, eps: held_out.append((model, x0)) or t.mean())
    sb.figure_loss(run, "model", sb.VPSDE(), data)
    by_step, by_t = drawings["loss.png"]["parts"]
    middles, losses, _ = by_t["bars"]
    assert list(by_step["lines"]["each step"][1]) == [3.0, 2.0]
    assert middles == pytest.approx([0.05 + i / 10 for i in range(10)]) and losses == pytest.approx(middles, abs=0.02)
    assert all(model == "model" and torch.equal(x0, data.test[:200]) for model, x0 in held_out)


def test_arrows_are_the_score_at_their_place_and_time_over_the_noisy_data(tmp_path, drawings):
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "two_moons")
    sde = sb.VPSDE()
    sb.figure_scores(run, lambda x, t: torch.stack([4 * t, t * x[:, 1]], 1), sde, data)
    for (caption, points, where, arrows), level in zip(
            drawings["scores.png"]["parts"], (0.05, 0.2, 0.5, 0.9), strict=True):
        t = torch.tensor(float(caption.removeprefix("t = ")))
        assert sde.std(t) / sde.m(t) == pytest.approx(level, abs=0.02)
        wanted = torch.stack([4 * t.expand(len(where)), t * where[:, 1]], 1)
        assert_close(arrows * arrows.norm(dim=1, keepdim=True), wanted, rtol=0.1, atol=0.1)  # t is rounded
        assert ((points - sde.m(t) * data.test[:1500]) / sde.std(t)).std(0).sub(1).abs().max() < 0.3


@pytest.mark.parametrize("key, function, shape", [
    ("bits_per_dim", "bits_per_dim", (130, 1, 1, 2)), ("nats", "log_likelihood", (130, 2))])
def test_likelihoods_are_of_held_out_examples_and_of_a_score_that_is_not_clamped(
        key, function, shape, tmp_path, monkeypatch, capsys):
    """Of as many as asked for, or of all with --evaluate. A solver that fails costs the likelihood alone."""
    cfg, run, _ = open_run(sb, tmp_path, "--dataset", "gaussians", "--std_floor", 0.2)
    made, x = [], torch.randint(256, shape) / 127.5 - 1
    spied(monkeypatch, sb, "score_fn", lambda given, _: made.append([*given.values()]))
    monkeypatch.setattr(sb, function, lambda score, sde, x, tolerance: x.flatten(1)[:, 0] + tolerance)
    for n, evaluate in ((4, None), (130, 10)):
        run.opts.evaluate, values = evaluate, 0.5 + x[:n].flatten(1)[:, 0]
        sb.measure_likelihood(run, replace(cfg, likelihood=4, tolerance=0.5), "model", "sde", Data("toy", 0 * x, x))
        assert run.read_metrics()[key] == pytest.approx(
            {"n": n, "mean": values.mean().item(), "standard_error": values.std().item() / n**0.5}, rel=1e-4)
    assert made == [["model", "sde", 0.2, False]] * 2

    def fail(score, sde, x, tolerance):
        raise FloatingPointError("stopped at t = 0.5")

    monkeypatch.setattr(sb, function, fail)
    sb.measure_likelihood(run, replace(cfg, likelihood=0), "model", "sde", Data("toy", x, x))
    assert "stopped" not in capsys.readouterr().out
    sb.measure_likelihood(run, cfg, "model", "sde", Data("toy", x, x))
    assert "stopped at t = 0.5" in capsys.readouterr().out


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
    assert stop.value.code == 2 and len(said) == 1 and message in said[0] and not (tmp_path / "out").exists()


def test_codes_are_decoded_to_what_they_encode(tmp_path, drawings):
    """Through codes and back, from the first to the second, and from one noise at three temperatures."""
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "digits8", "--tolerance", 1e-3)
    sde = sb.VPSDE()

    def score(x, t):  # that of N(0, 0.25)
        return -x / (0.25 * sde.m(t) ** 2 + sde.std(t) ** 2).view(-1, 1, 1, 1)

    figures.figure_codes(run, cfg, score, sde, data)
    x, back, walk, cold, cool, warm = drawings["codes.png"]["rows"]
    assert drawings["codes.png"]["row_labels"] == [
        "held out", "encoded, decoded", "first to second", "temperature 0.7", "temperature 0.9", "temperature 1.0"]
    error = run.read_metrics()["code_error"]
    assert torch.equal(x, data.test[:8]) and error == pytest.approx((back - x).square().mean().sqrt().item()) != 0
    assert 0.3 < warm.std() < 0.7  # data of std 0.5
    for found, wanted in ((back, x), (walk[0], x[0]), (walk[7], x[1]), (cold, 0.7 * warm), (cool, 0.9 * warm)):
        assert_close(found, wanted, rtol=0, atol=0.02)


def test_guardrails_differ_in_one_switch_and_not_in_their_noise(tmp_path, monkeypatch, drawings):
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "digits8", "--N", 30, "--std_floor", 0.1)
    starts = []

    def process(cfg, score, sde, xT):  # draws that say by what they were drawn
        starts.append((cfg.sampler, cfg.N, xT.sum(), torch.rand(1)))
        yield 0.0, xT * 0 + 10 * cfg.denoise + score

    monkeypatch.setattr(sb, "score_fn", lambda model, sde, std_floor, clip_x0: clip_x0 + std_floor)
    monkeypatch.setattr(sb, "sampling_process", process)
    figures.figure_guardrails(run, cfg, "model", sb.make_sde(cfg), data.shape)
    found = drawings["guardrails.png"]
    assert [label.split("\n")[0] for label in found["row_labels"]] == [
        "as it is", "last noise kept", "x0_hat not clamped"]
    assert [row.mean().item() for row in found["rows"]] == pytest.approx([11.1, 1.1, 10.1])
    assert starts[0] == starts[1] == starts[2] and starts[0][:2] == ("em", 20)


def test_sdes_are_the_three_with_the_constants_of_the_config(tmp_path, drawings):
    cfg, run, _ = open_run(sb, tmp_path, "--sigma_max", 7, "--beta_max", 10)
    figures.figure_sdes(run, cfg)
    mean, variance, snr = (part["lines"] for part in drawings["sdes.png"]["parts"])
    assert list(mean) == ["ve", "vp", "subvp"] and variance["_ve"][1][-1].item() == pytest.approx(49)
    t, m = mean["vp"][:2]
    assert_close(m, torch.exp(-0.05 * t - 2.475 * t**2), rtol=1e-6, atol=0)
    for name, wanted in (("vp", 1 - m**2), ("subvp", (1 - m**2) ** 2)):
        assert_close(variance[f"_{name}"][1], wanted, rtol=1e-6, atol=1e-9)
        assert_close(snr[f"_{name}"][1][1:], (m**2 / wanted).log()[1:])


@pytest.fixture
def sheets(monkeypatch):
    """The figures that experiments would save, none of which is drawn."""
    kept = []
    monkeypatch.setattr(plotting, "save", lambda sheet, path, title: kept.append(sheet))
    return kept


def test_paths_end_where_the_data_is(tmp_path, sheets):
    """The paper's Figure 2: SDE and ODE go from the same noise to the two Gaussians."""
    cfg, run, _ = open_run(sb, tmp_path, "--dataset", "gaussians", "--sde", "ve")
    figures.figure_paths(run, sb.make_sde(cfg), steps=100)
    axes = sheets[0].axes
    assert [axis.get_title()[:11] for axis in axes] == ["reverse SDE", "probability"]
    sde, ode = (np.stack([line.get_xydata() for line in axis.lines]) for axis in axes)  # (path, state, (t, x))
    assert len(sde) == 8 and (sde[:, 0] == ode[:, 0]).all() and (sde[:, 0, 0] == 1).all() and ode[0, -1, 0] <= 1e-3
    for way in (sde, ode):
        assert np.abs(way[:, -1, 1:] - [-1.0, 0.6]).min(1).max() < 0.6
    order = ode[:, 0, 1].argsort()
    assert (np.diff(ode[order, :, 1], axis=0) > 0).all()  # ways of an ODE do not cross
    assert np.abs(np.diff(sde[..., 1])).sum() > 2 * np.abs(np.diff(ode[..., 1])).sum()
    density, line = torch.tensor(axes[0].collections[0].get_array().reshape(301, 300)), torch.linspace(-3, 3, 301)
    assert abs(line[density[:, 0].argmax()].abs().item() - 0.8) < 0.25
    assert density[line.abs() < 0.05, 0].max() < 0.05 and density.max() == 1
    assert density[0, -1] < 0.05  # rescaled, as the paths are


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_the_mixture_on_the_line_moves_with_its_sde(name):
    """Figure 2's p_t: mass 1, and the moments of m x_0 + std z; its score is the derivative of log p_t."""
    sde, t, h = sb.make_sde(sb.Config(sde=name)), torch.tensor([0.3]).double(), 1e-6
    log_p, m, std = figures.mixture_on_the_line(sde, (-1.0, 0.6), 0.15), sde.m(t).item(), sde.std(t).item()
    line = torch.linspace(-8 - 8 * std, 8 + 8 * std, 20_001).double()
    p = log_p(line[:, None], t.expand(len(line))).exp()
    mass, mean, square = (torch.trapezoid(p * line**power, line).item() for power in (0, 1, 2))
    assert (mass, mean) == pytest.approx((1, -0.2 * m))
    assert square - mean**2 == pytest.approx(m**2 * (0.8**2 + 0.15**2) + std**2)
    x, t = torch.tensor([[0.1], [0.5]]).double(), t.expand(2)
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


def test_densities_are_shown_on_their_axes_and_measured_against_the_truth(tmp_path, sheets):
    """Model and truth each look like themselves: nothing here is the same after a turn or a mirroring."""
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "two_moons", "--tolerance", 1e-2)
    centres = torch.tensor([[1.3, -0.2], [-0.9, 0.8], [0.2, -1.5]]).double()
    figures.figure_density(run, cfg, score_of(centres), sb.VPSDE(), data, points_a_side=30)
    x, y = torch.meshgrid(*[torch.linspace(-2.1, 2.1, 30).double()] * 2, indexing="xy")  # y by row, x by column
    where, shown = torch.stack([x, y], 2).view(-1, 2), []
    wanted = {"model": torch.exp(-50 * torch.cdist(where, centres) ** 2).mean(1) / (0.02 * math.pi),
              "truth": figures.point_density("two_moons", where)}
    for axis, (name, p) in zip(sheets[0].axes, wanted.items(), strict=True):
        image, = axis.images
        assert axis.get_title().startswith(name) and image.origin == "lower"
        assert list(image.get_extent()) == pytest.approx([-2.1, 2.1, -2.1, 2.1])
        shown.append(torch.tensor(np.asarray(image.get_array())).double() * (4.2 / 29) ** 2)
        assert_close(shown[-1], p.view(30, 30) * (4.2 / 29) ** 2, rtol=0, atol=0.01)
    found, (model, truth) = run.read_metrics()["density"], shown
    assert found["sums_to"] == pytest.approx(model.sum().item()) == pytest.approx(1, abs=0.03)
    assert 0.5 < found["total_variation"] == pytest.approx((model - truth).abs().sum().item() / 2)


def test_points_are_measured_against_held_out_points(tmp_path):
    cfg, run, data = open_run(sb, tmp_path, "--dataset", "gaussians", "--tolerance", 1e-2)
    angles = torch.arange(8).double() * math.pi / 4
    for turn, samples, n in ((0.0, data.train[:4000], 300), (0.1, 0.3 * data.test, 7)):  # all right, all wrong
        score = score_of(1.4 * torch.stack([(angles + turn).cos(), (angles + turn).sin()], 1))
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
    of_points = figures.point_density(name, load_data(name).test[2000:3000])
    assert -of_points.log().mean().item() == pytest.approx(entropy, abs=0.1)


@pytest.mark.parametrize("trained", ["images"], indirect=True)
def test_every_sampler_is_scored_by_r_and_by_tolerance(trained, tmp_path, monkeypatch, capsys, drawings):
    """One fails, which leaves the others their scores. Rows, bars and curves are of what their labels say."""
    argv = ["--sample", str(trained[1]), "--N", "500", "--evaluate", "10"]
    cfg, _, data = open_run(sb, tmp_path, *argv)
    both = replace(cfg, sampler="pc", predictor="reverse", corrector_steps=1, N=100)
    sweeps = {"samplers": sb.make_methods(cfg, sb.VPSDE(), 200),
              "r": {r: replace(both, snr=r) for r in (0.01, 0.04, 0.08, 0.16, 0.32)},
              "tolerance": {x: replace(cfg, sampler="rk45", tolerance=x) for x in (0.1, 0.01, 1e-3, 1e-4, 1e-5)}}
    methods, steps = [method for sweep in sweeps.values() for method in sweep.values()], []
    starts, failed = tags(monkeypatch, methods), list(sweeps["samplers"])[2]
    numbers = {sweep: {value: methods.index(method) + 1 for value, method in found.items() if value != failed}
               for sweep, found in sweeps.items()}

    def quality(run, states, network, n, given):
        number = sb.final(states(range(3))).mean().item()
        steps.append(n)
        if number == 3:
            raise Mistake("no numbers")
        assert torch.equal(given.train, data.train)
        return {"n": 10, "frechet_distance": number, "network_calls": 200 - number, "legible": number / 100}

    monkeypatch.setattr(Run, "quality", quality)
    monkeypatch.setattr(sb, "score_fn", lambda model, sde, std_floor, clip_x0: lambda x, t: x)
    samplers.main(["--device", "cpu", "--out", str(tmp_path), *argv])
    assert f"{failed}: no numbers" in capsys.readouterr().out and steps == [method.N for method in methods]
    kept = json.loads((only_run(tmp_path, "score_based") / "metrics.json").read_text())
    for sweep, found in numbers.items():
        scores = {name: row["frechet_distance"] for name, row in kept[f"evaluation_by_{sweep}"].items()}
        assert scores == {str(value): number for value, number in found.items()}
    found = {name: number for name, number in numbers["samplers"].items() if name != "ODE, RK4"}
    assert drawings["samplers.png"]["row_labels"] == [
        f"{name}\n{200 - i} calls, {i}% legible" for name, i in found.items()]
    assert [(len(row), row.mean()) for row in drawings["samplers.png"]["rows"]] == [(10, i) for i in found.values()]
    assert all(torch.equal(start, starts[-1]) for start in starts[-len(found):])  # from one noise
    alone, corrected, r, tolerance = drawings["table1.png"]["parts"]
    predictors = ["reverse diffusion", "ancestral", "probability flow"]
    for part, ending in ((alone, ""), (corrected, ", corrector")):
        names, heights = part["bars"]
        assert names[:3] == [name.replace(" ", "\n") for name in predictors]
        wanted = [found.get(name + ending, math.nan) for name in predictors]
        assert heights[:3] == pytest.approx(wanted, nan_ok=True) and part["ylim"] == alone["ylim"]
    assert "corrector" in corrected["title"] and len(alone["bars"][0]) == 3
    assert r["lines"]["_"][:2] == (list(numbers["r"]), list(numbers["r"].values()))
    found = list(numbers["tolerance"].values())
    assert tolerance["lines"]["_"][:2] == ([200 - i for i in found], found)


@pytest.mark.parametrize("trained", ["images"], indirect=True)
def test_each_sde_stands_beside_its_own_numbers(trained, tmp_path, monkeypatch, drawings):
    """Checkpoints of copied weights, whose bias tells them apart; it is drawn in place of pictures."""
    state = torch.load(trained[1] / "checkpoint.pt", weights_only=True)
    for i, (sde, ending) in enumerate((("vp", ""), ("subvp", "_subvp"))):
        ema = state["ema"] | {"conv_out.bias": torch.full_like(state["ema"]["conv_out.bias"], i + 1)}
        torch.save(state | {"ema": ema, "config": state["config"] | {"sde": sde}}, tmp_path / sde)
        (tmp_path / f"evaluation{ending}.json").write_text(json.dumps({
            "evaluation": {"n": 9, "legible": 0.5 + i / 10, "frechet_distance": 3.25 + i},
            "bits_per_dim": {"mean": 2.5 + i}}))
    monkeypatch.setattr(sb, "score_fn", lambda model, sde, std_floor, clip_x0: model.conv_out.bias.mean() * clip_x0)
    monkeypatch.setattr(sb, "sampling_process", lambda cfg, score, sde, xT: [(0.0, 0 * xT + score)])
    sdes.main(*[str(tmp_path / name) for name in ("vp", "subvp")], folder=tmp_path, flags=[f"--out={tmp_path}"])
    assert list(drawings["three_sdes.png"]["row_labels"]) == [
        "vp: 50% of 9 legible\nFréchet distance 3.2\n2.50 bits/dim",
        "subvp: 60% of 9 legible\nFréchet distance 4.2\n3.50 bits/dim"]
    assert [(len(row), row.mean()) for row in drawings["three_sdes.png"]["rows"]] == [(10, 1), (10, 2)]
