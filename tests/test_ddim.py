"""DDIM against closed forms: for Gaussian data the exact eps and the exact flow are known."""

import json
import math

import ddim_example as ddim
import ddpm_example as ddpm
from common.run import open_run as open_any_run

import pytest
import torch
from conftest import only_run, open_picture, open_run, run_script, spied
from torch.testing import assert_close

MEAN, STD = 0.4, 0.3


def double(schedule):
    return ddim.Schedule(*(a.double() for a in (schedule.betas, schedule.alphas, schedule.alpha_bars)))


@pytest.fixture(scope="module")
def schedule():
    return double(ddim.make_schedule("linear", 1000))


def gaussian_eps(schedule):
    """The exact eps*(x_t, t) of data N(MEAN, STD^2), pixel by pixel."""
    def model(x, t):
        a = schedule.alpha_bars[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)
    return model


def mixture_eps(schedule, means=(-1.0, 0.5), weights=(0.3, 0.7), std=0.1):
    """The exact eps*(x_t, t) of a mixture of two Gaussians, pixel by pixel."""
    m, w = torch.tensor(means).double(), torch.tensor(weights).double()

    def model(x, t):
        a = schedule.alpha_bars[t].view(-1, 1, 1, 1, 1)
        gap, variance = x[..., None] - a.sqrt() * m, a * std**2 + 1 - a
        share = (w.log() - gap**2 / (2 * variance)).softmax(-1)
        return (1 - a[..., 0]).sqrt() * (share * gap / variance).sum(-1)
    return model


def flow(xT, schedule):
    """Where the probability-flow ODE of the Gaussian takes x_T: a rescaling of the distance to the mean."""
    a = schedule.alpha_bars[-1]
    return MEAN + STD * (xT - a.sqrt() * MEAN) / (a * STD**2 + 1 - a).sqrt()


def noise(n=64, seed=0):
    return torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
@pytest.mark.parametrize("T, S", [(1000, S) for S in (1, 2, 3, 7, 50, 999, 1000)] + [(20, 20), (7, 3)])
def test_timesteps_are_distinct_ascending_and_end_in_T(T, S, spacing):
    tau = ddim.ddim_timesteps(T, S, spacing)
    assert len(tau) == len(set(tau)) == S and tau == sorted(tau)
    assert tau[0] >= 1 and tau[-1] == T


def test_timesteps_as_the_formula_says():
    assert ddim.ddim_timesteps(1000, 4) == [250, 500, 750, 1000]
    assert ddim.ddim_timesteps(1000, 4, "quadratic") == [62, 250, 562, 1000]


def test_eta_0_follows_the_flow_at_first_order(schedule):
    xT, model, errors = noise(), gaussian_eps(schedule), []
    for S in (25, 50, 100, 200):
        x = ddim.ddim_sample(model, xT.shape, schedule, S, clip_x0=False, xT=xT)
        errors.append((x - flow(xT, schedule)).abs().max().item())
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert all(1.7 < ratio < 2.3 for ratio in ratios), (errors, ratios)


def end(states):
    """x_0, the last state of a sampler."""
    return list(states)[-1][1]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_mixture_keeps_its_modes(schedule, eta):
    torch.manual_seed(0)
    model = mixture_eps(schedule)
    x = ddim.ddim_sample(model, (6000, 1, 1, 1), schedule, 200, eta, clip_x0=False,
                         xT=noise(6000)).flatten()
    low = x < -0.25
    assert abs(low.double().mean().item() - 0.3) < 0.03
    assert_close(x[low].mean(), torch.tensor(-1.0).double(), atol=0.02, rtol=0)
    assert_close(x[~low].mean(), torch.tensor(0.5).double(), atol=0.02, rtol=0)
    assert_close(x[~low].std(), torch.tensor(0.1).double(), atol=0.02, rtol=0)


def test_eta_1_with_all_steps_is_ancestral_sampling_draw_for_draw():
    schedule = double(ddim.make_schedule("linear", 60))
    model, xT = mixture_eps(schedule), noise()
    for clip in (False, True):
        torch.manual_seed(3)
        one = ddim.ddim_sample(model, xT.shape, schedule, 60, 1.0, clip_x0=clip, xT=xT)
        torch.manual_seed(3)
        other = ddpm.sample(model, xT.shape, schedule, "beta_tilde", clip, xT)
        assert_close(one, other, atol=1e-5, rtol=0)    # the schedules are rounded to float32


def test_sigma_of_eq_16_is_beta_tilde_for_one_step(schedule):
    zero, one = torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double()
    for t in (2, 10, 500, 1000):
        quiet = ddim.ddim_step(zero, zero, t, t - 1, schedule.alpha_bars, 1.0, zero)
        loud = ddim.ddim_step(zero, zero, t, t - 1, schedule.alpha_bars, 1.0, one)
        variance = ddpm.q_posterior(zero, zero, t, schedule)[1]
        assert_close((loud - quiet) ** 2, variance)


def test_sigma_hat_changes_only_the_noise(schedule):
    x, eps, z, a = noise(4), noise(4, 1), noise(4, 2), schedule.alpha_bars
    zero = torch.zeros_like(z)
    quiet = ddim.sigma_hat_step(x, eps, 500, 400, a, 1.0, zero)
    assert_close(quiet, ddim.ddim_step(x, eps, 500, 400, a, 1.0, zero))
    added = ddim.sigma_hat_step(x, eps, 500, 400, a, 1.0, z) - quiet
    assert_close(added, (1 - a[500] / a[400]).sqrt() * z)
    smaller = ddim.ddim_step(x, eps, 500, 400, a, 1.0, z) - quiet
    assert (added.abs() > smaller.abs()).all()  # sigma_hat is the larger of the two
    assert_close(ddim.sigma_hat_step(x, eps, 20, 0, a, 1.0, z),
                 ddim.sigma_hat_step(x, eps, 20, 0, a, 1.0, zero))


def test_the_step_given_to_the_process_is_the_one_it_takes(schedule):
    model, xT = gaussian_eps(schedule), noise(4)
    torch.manual_seed(3)
    found = end(ddim.ddim_process(
        model, xT, schedule, 4, 1.0, clip_x0=False, step=ddim.sigma_hat_step))
    torch.manual_seed(3)
    x = xT
    for t, s in ((1000, 750), (750, 500), (500, 250), (250, 0)):
        eps_hat = model(x, torch.full((4,), t))
        z = torch.randn_like(x)
        x = ddim.sigma_hat_step(x, eps_hat, t, s, schedule.alpha_bars, 1.0, z)
    assert_close(found, x)
    torch.manual_seed(3)
    other = ddim.ddim_sample(model, xT.shape, schedule, 4, 1.0, clip_x0=False, xT=xT)
    assert (found - other).abs().max() > 1e-3


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_process_yields_the_states_along_tau(schedule, eta):
    asked = []

    def model(x, t):
        asked.append((int(t[0]), x))
        return gaussian_eps(schedule)(x, t)

    xT = noise(4)
    states = list(ddim.ddim_process(model, xT, schedule, 4, eta, "quadratic"))
    assert [t for t, _ in states] == [1000, 562, 250, 62, 0]
    assert torch.equal(states[0][1], xT)
    for (t, x), (at, xt) in zip(states[:-1], asked, strict=True):
        assert t == at and x is xt


def test_every_eta_keeps_the_marginal(schedule):
    """Eq. 12 with the true eps takes q(x_t | x_0) to q(x_s | x_0): Lemma 1, here by its two moments."""
    a, x0 = schedule.alpha_bars, torch.full((1, 1, 1, 1), 0.7).double()
    for eta in (0.0, 0.3, 1.0):
        eps, zero, one = (torch.full_like(x0, v) for v in (1.3, 0.0, 1.0))
        xt = a[600].sqrt() * x0 + (1 - a[600]).sqrt() * eps
        mean = ddim.ddim_step(xt, eps, 600, 350, a, eta, zero)
        sigma = ddim.ddim_step(xt, eps, 600, 350, a, eta, one) - mean
        direction = (mean - a[350].sqrt() * x0) / eps
        assert_close(direction**2 + sigma**2, (1 - a[350]).view(1, 1, 1, 1))
        assert (sigma == 0).all() == (eta == 0)


def test_same_noise_same_picture_to_the_bit():
    torch.manual_seed(0)
    model = ddim.UNet(1, 8, 8, (1, 2), 1, (4,), 1, 4, 0.0).eval()
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    schedule, xT = ddim.make_schedule("linear", 100), torch.randn(2, 1, 8, 8)
    one, other = (ddim.ddim_sample(model, xT.shape, schedule, 7, xT=xT) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, ddim.ddim_sample(model, xT.shape, schedule, 7, 1.0, xT=xT))


@pytest.mark.parametrize("S", [1, 2, 3, 7, 50, 999, 1000])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_any_number_of_steps(schedule, S, eta):
    calls = []

    def model(x, t):
        calls.append(int(t[0]))
        assert t.dtype == torch.int64 and t.shape == (len(x),)
        return gaussian_eps(schedule)(x, t)

    x = ddim.ddim_sample(model, (3, 1, 1, 1), schedule, S, eta, xT=noise(3))
    assert x.isfinite().all() and calls == ddim.ddim_timesteps(1000, S)[::-1]
    assert calls[0] == 1000    # sampling starts at the noise level of x_T


def test_one_step_is_x0_hat(schedule):
    xT = noise(5)
    for clip in (False, True):
        x = ddim.ddim_sample(gaussian_eps(schedule), xT.shape, schedule, 1, clip_x0=clip, xT=xT)
        eps_hat = gaussian_eps(schedule)(xT, torch.full((5,), 1000))
        x0_hat = ddim.predict_x0(xT, eps_hat, 1000, schedule.alpha_bars)
        assert_close(x, x0_hat.clamp(-1, 1) if clip else x0_hat)


def test_the_clamp_recomputes_eps(schedule):
    """With x0_hat clamped to 1, x_t must move as if the noise were (x_t - sqrt(a) 1) / sqrt(1 - a)."""
    xT = torch.full((1, 1, 1, 1), 3.0).double()
    x, a = xT, schedule.alpha_bars
    for t, s in ((1000, 500), (500, 0)):
        x0 = ((x - (1 - a[t]).sqrt() * 0.1) / a[t].sqrt()).clamp(-1, 1)
        x = a[s].sqrt() * x0 + (1 - a[s]).sqrt() * (x - a[t].sqrt() * x0) / (1 - a[t]).sqrt()
    got = ddim.ddim_sample(lambda x, t: torch.full_like(x, 0.1), xT.shape, schedule, 2, xT=xT)
    assert_close(got, x)


def test_inversion_goes_back(schedule):
    model, errors, code_errors = gaussian_eps(schedule), [], []
    x0 = MEAN + STD * noise(32)
    a = schedule.alpha_bars[-1]
    exact = a.sqrt() * MEAN + (x0 - MEAN) * (a * STD**2 + 1 - a).sqrt() / STD
    for S in (50, 100, 200, 1000):
        code = ddim.ddim_invert(model, x0, schedule, S)
        back = ddim.ddim_sample(model, x0.shape, schedule, S, clip_x0=False, xT=code)
        errors.append((back - x0).abs().max().item())
        code_errors.append((code - exact).abs().max().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02, errors
    assert code_errors == sorted(code_errors, reverse=True) and code_errors[-1] < 0.02, code_errors


def test_inversion_asks_the_network_only_where_it_was_trained(schedule):
    asked = []

    def model(x, t):
        asked.append(int(t[0]))
        return torch.zeros_like(x)

    ddim.ddim_invert(model, noise(2), schedule, 10)
    assert asked == [100, 100, 200, 300, 400, 500, 600, 700, 800, 900]


def test_slerp_keeps_the_norm_and_ends_at_its_ends():
    torch.manual_seed(0)
    a, b = torch.randn(4, 1, 16, 16).double(), torch.randn(4, 1, 16, 16).double()
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    assert_close(ddim.slerp(a, b, 0.0), a)
    assert_close(ddim.slerp(a, b, 1.0), b)
    for share in (0.25, 0.5, 0.9):
        middle = ddim.slerp(a, b, share)
        assert_close(middle.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
    angle = torch.acos(torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)))
    part = torch.acos(torch.nn.functional.cosine_similarity(
        a.flatten(1), ddim.slerp(a, b, 0.25).flatten(1)))
    assert_close(part, angle / 4)
    assert_close(ddim.slerp(a, a, 0.3), a)


def test_a_quarter_turn():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert_close(ddim.slerp(a, b, 1 / 3), torch.tensor([[math.cos(math.pi / 6), 0.5]]))


@pytest.mark.parametrize("argv, word", [
    (["--S", "1001"], "--S 1001: must be at least 1 and at most T, 1000"),
    (["--S", "0"], "--S 0: must be >= 1"),
    (["--preset", "smoke", "--S", "21"], "--S 21: must be at least 1 and at most T, 20"),
    (["--eta", "1.5"], "--eta 1.5: must be in [0, 1]"),
    (["--eta", "-0.1"], "--eta -0.1"), (["--eta", "nan"], "--eta nan"),
    (["--spacing", "cubic"], "--spacing: invalid choice: 'cubic'"),
    (["--sigma_hat"], "--eta 0.0: must be 1 with --sigma_hat")])
def test_mistakes_end_in_one_line(argv, word, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        ddim.main([*argv, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and word in error
    assert not (tmp_path / "out").exists()


def finished(done):
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]


@pytest.fixture(scope="module")
def ddpm_run(tmp_path_factory):
    """A run folder of ddpm with a checkpoint, made by the smoke preset's six steps."""
    cfg, run, data = open_run(ddpm, tmp_path_factory.mktemp("ddpm"))
    ddpm.train(cfg, run, data)
    return run.folder


def test_a_ddpm_checkpoint_brings_its_network_and_ddim_its_sampler(ddpm_run, tmp_path):
    """Fields that DDPM does not have are DDIM's own; the network and its weights are DDPM's."""
    argv = ["--sample", str(ddpm_run), "--eta", "0.5", "--out", str(tmp_path)]
    cfg, run = open_any_run("ddim", ddim.Config, ddim.PRESETS, ddim.SAMPLING, argv, reads=("ddpm",))
    assert (cfg.T, cfg.channels, cfg.groups) == (20, 8, 4)
    assert (cfg.S, cfg.eta, cfg.n_samples) == (5, 0.5, 4)  # of ddim's smoke preset, and the flag
    stored = torch.load(ddpm_run / "checkpoint.pt", weights_only=True)
    model = run.trained(ddim.make_unet(cfg, (1, 28, 28)))
    for name, value in model.state_dict().items():
        assert_close(value, stored["ema"][name], rtol=0, atol=0)


@pytest.fixture(scope="module")
def drawn(ddpm_run, tmp_path_factory):
    """(folder, tables, films) of a run that samples the DDPM checkpoint; they by the names of their files."""
    out, tables, films = tmp_path_factory.mktemp("drawn"), {}, {}
    before = {p.name: p.read_bytes() for p in ddpm_run.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        spied(patch, ddim.plotting, "table", lambda given, _: tables.update({given["path"].name: given}))
        spied(patch, ddim.plotting, "gif", lambda given, _: films.update({given["path"].name: given}))
        ddim.main(["--sample", str(ddpm_run), "--S", "7", "--out", str(out), "--n_samples", "1",
                   "--evaluate", "12"])
    assert {p.name: p.read_bytes() for p in ddpm_run.iterdir()} == before
    return only_run(out, "ddim"), tables, films


@pytest.mark.slow
def test_samples_a_ddpm_checkpoint_without_training(drawn):
    folder, _, _ = drawn
    assert not (folder / "checkpoint.pt").exists() and not (folder / "log.csv").exists()
    for name in ("samples", "neighbours", "loss", "denoising", "steps", "eta", "interpolation",
                 "reconstruction", "evaluated", "quality"):
        open_picture(folder / f"{name}.png")
    assert len(open_picture(folder / "denoising.gif")) > 5
    assert len(open_picture(folder / "interpolation.gif")) == 36
    found = json.loads((folder / "metrics.json").read_text())
    assert found["sampling"]["network_calls"] == 7 and found["evaluation"]["n"] == 12
    assert found["evaluation"]["network_calls"] == 7
    by_S = found["evaluation_by_S"]
    assert set(by_S) == {"eta = 0", "eta = 1", "sigma_hat"}
    for scores in by_S.values():
        assert {S: found["network_calls"] for S, found in scores.items()} == {"10": 10, "20": 20}
        assert all(math.isfinite(found["frechet_distance"]) for found in scores.values())


@pytest.mark.slow
def test_smoke_run_trains_and_writes_every_file(tmp_path):
    finished(run_script("ddim_example.py", "--preset", "smoke", cwd=tmp_path))
    folder = only_run(tmp_path / "outputs", "ddim")
    for name in ("preview", "samples", "neighbours", "loss", "denoising", "steps", "eta",
                 "interpolation", "reconstruction"):
        open_picture(folder / f"{name}.png")
    assert len(open_picture(folder / "denoising.gif")) > 5
    assert not (folder / "quality.png").exists() and not (folder / "evaluated.png").exists()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == 6 and state["script"] == "ddim" and state["preset"] == "smoke"
    found = json.loads((folder / "metrics.json").read_text())
    assert found["steps"] == 6 and found["sampling"]["n"] == 4
    assert found["reconstruction_error_by_S"]["10"] > 0


@pytest.mark.slow
def test_figures_draw_what_their_labels_say(drawn, ddpm_run):
    _, figures, films = drawn
    eta = figures["eta.png"]
    assert eta["row_labels"] == ["eta = 0", "eta = 0.2", "eta = 0.5", "eta = 1"]
    for i, row in enumerate(eta["rows"]):  # noise and again, side by side
        assert len(row) == len(eta["column_labels"]) == 10
        if i == 0:
            assert_close(row[0::2], row[1::2], atol=1e-5, rtol=0)
        else:
            assert (row[0::2] - row[1::2]).abs().max() > 1e-3
    assert (eta["rows"][0][0] - eta["rows"][0][2]).abs().max() > 0.01
    way = figures["interpolation.png"]
    slerp, line = way["rows"][:2]
    for end in (0, -1):
        assert_close(slerp[end], line[end], rtol=1e-3, atol=1e-3)
    assert (slerp[4] - line[4]).abs().max() > 0.01
    stds = [float(label.split("\n")[1].split()[0]) for label in way["row_labels"]]
    assert stds == pytest.approx([1, 0.71, 1, 0.71], abs=0.06)
    film = films["interpolation.gif"]
    assert len(film["frames"]) == len(film["captions"]) == 36
    frames = film["frames"]
    steps = [(a - b).abs().mean() for a, b in zip(frames, frames[1:] + frames[:1], strict=True)]
    assert max(steps) < 4 * min(steps)  # a closed way, without a jump
    back = figures["reconstruction.png"]
    assert back["row_labels"][1].startswith("back, S = 10\nrms ")
    assert [label.split("\n")[0] for label in back["row_labels"][-2:]] == ["x_T, S = 10", "N(0, I)"]
    x0, code = back["rows"][0], back["rows"][-2]
    model = ddim.UNet(1, 28, 8, (1, 2), 1, (7,), 1, 4, 0.0, 2)
    model.load_state_dict(torch.load(ddpm_run / "checkpoint.pt", weights_only=True)["ema"])
    schedule = ddim.make_schedule("linear", 20)
    wanted = ddim.ddim_invert(model.eval(), x0, schedule, 10, "linear")
    assert_close(code, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("argv, expected", [
    ("", dict(S=5, eta=0.0, spacing="linear", clip_x0=True, step="ddim_step", scale=1.1, temperature=0.9)),
    ("--S 3 --eta 0.25 --spacing quadratic --no-clip_x0 --eps_scale 0.9 --temperature 0.8",
     dict(S=3, eta=0.25, spacing="quadratic", clip_x0=False, step="ddim_step", scale=0.9, temperature=0.8)),
    ("--eta 1 --sigma_hat --eps_scale 1 --temperature 1",
     dict(S=5, eta=1.0, spacing="linear", clip_x0=True, step="sigma_hat_step", scale=1.0,
          temperature=1.0))])
def test_every_sampling_flag_reaches_the_sampler(argv, expected, ddpm_run, tmp_path, monkeypatch):
    class Done(Exception):
        pass

    def spy(model, xT, schedule, S, eta, spacing, clip_x0, temperature, step):
        network, scale = asked[0]
        assert schedule.T == 20 and not network.training
        t = torch.full((len(xT),), 3)
        assert_close(model(xT, t), scale * network(xT, t))
        found = dict(S=S, eta=eta, spacing=spacing, clip_x0=clip_x0, scale=scale,
                     temperature=temperature, step=step.__name__)
        assert found == expected
        raise Done

    asked, true = [], ddim.scaled
    monkeypatch.setattr(ddim, "scaled", lambda *given: asked.append(given) or true(*given))
    monkeypatch.setattr(ddim, "ddim_process", spy)
    with pytest.raises(Done):
        ddim.main(["--sample", str(ddpm_run), "--out", str(tmp_path), *argv.split()])


def test_a_scaled_network_is_scaled_alone(schedule):
    """By 1 it is the network; by more the samples of a Gaussian are narrower, as at a lower temperature."""
    model, xT = gaussian_eps(schedule), torch.randn(4000, 1, 1, 1).double()
    plain, same, sharp = (
        ddim.ddim_sample(each, xT.shape, schedule, 50, clip_x0=False, xT=xT)
        for each in (model, ddim.scaled(model, 1.0), ddim.scaled(model, 1.15)))
    assert_close(same, plain)
    assert sharp.std() < 0.9 * same.std()


@pytest.mark.parametrize("eta, step", [(0.0, "ddim_step"), (0.5, "ddim_step"), (1.0, "sigma_hat_step")])
def test_the_temperature_is_a_factor_of_all_noise(eta, step, schedule):
    """The network of a Gaussian is affine, and so is the picture as a function of all its noise."""
    xT, found = noise(50), {}
    for temperature in (0.0, 0.7, 1.0):
        torch.manual_seed(1)
        found[temperature] = end(ddim.ddim_process(
            gaussian_eps(schedule), xT, schedule, 20, eta, "linear", False, temperature,
            getattr(ddim, step)))
    assert found[0.0].std() < 1e-9 < found[1.0].std()
    assert_close(found[0.7], 0.3 * found[0.0] + 0.7 * found[1.0])
    how = dict(schedule=schedule, S=20, clip_x0=False)
    assert_close(ddim.ddim_sample(gaussian_eps(schedule), xT.shape, xT=xT, temperature=0.7, **how),
                 ddim.ddim_sample(gaussian_eps(schedule), xT.shape, xT=0.7 * xT, **how))
