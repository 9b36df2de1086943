"""DDIM against closed forms: for Gaussian data the exact eps and the exact flow are known."""

import math

import pytest
import torch
from conftest import run_script
from torch.testing import assert_close

import ddim_example as ddim
import ddpm_example as ddpm

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


@pytest.mark.parametrize("eta, sigma_hat", [(0.0, False), (0.5, False), (1.0, False)])
def test_mixture_keeps_its_modes(schedule, eta, sigma_hat):
    torch.manual_seed(0)
    model = mixture_eps(schedule)
    x = ddim.ddim_sample(model, (6000, 1, 1, 1), schedule, 200, eta, clip_x0=False, xT=noise(6000),
                         sigma_hat=sigma_hat).flatten()
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
    assert_close(ddim.ddim_step(x, eps, 500, 400, a, 1.0, zero, True),
                 ddim.ddim_step(x, eps, 500, 400, a, 1.0, zero))
    added = ddim.ddim_step(x, eps, 500, 400, a, 1.0, z, True) - ddim.ddim_step(
        x, eps, 500, 400, a, 1.0, zero, True)
    assert_close(added, (1 - a[500] / a[400]).sqrt() * z)
    assert_close(ddim.ddim_step(x, eps, 20, 0, a, 1.0, z, True),
                 ddim.ddim_step(x, eps, 20, 0, a, 1.0, zero, True))


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
        assert_close(x, ddim.predict_x0(gaussian_eps(schedule), xT, 1000, schedule, clip))


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
    (["--S", "1001"], "--S 1001"), (["--S", "0"], "--S 0"), (["--eta", "1.5"], "--eta 1.5"),
    (["--eta", "-0.1"], "--eta -0.1"), (["--spacing", "cubic"], "--spacing cubic"),
    (["--eta", "nan"], "--eta nan"), (["--sigma_hat"], "--eta")])
def test_mistakes_end_in_one_line(argv, word, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        ddim.main([*argv, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and word in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_samples_a_ddpm_checkpoint_without_training(tmp_path):
    run_script("ddpm_example.py", "--preset", "smoke", "--out", str(tmp_path), cwd=tmp_path)
    run_script("ddim_example.py", "--sample", "--S", "7", "--out", str(tmp_path), "--preset",
               "smoke", "--evaluate", "12", cwd=tmp_path)
    folder = next((tmp_path / "ddim").iterdir())
    assert not (folder / "checkpoint.pt").exists() and not (folder / "log.csv").exists()
    for name in ("samples", "steps", "eta", "interpolation", "reconstruction", "quality"):
        assert (folder / f"{name}.png").stat().st_size > 2000
