"""DDIM against closed forms: for Gaussian data the exact eps and the exact flow are known."""

import math

import ddim_example as ddim
import ddpm_example as ddpm

import pytest
import torch
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
        x = ddim.ddim_sample(model, xT, schedule, S, clip_x0=False)
        errors.append((x - flow(xT, schedule)).abs().max().item())
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert all(1.7 < ratio < 2.3 for ratio in ratios), (errors, ratios)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_mixture_keeps_its_modes(schedule, eta):
    torch.manual_seed(0)
    model = mixture_eps(schedule)
    x = ddim.ddim_sample(model, noise(2000), schedule, 150, eta, clip_x0=False).flatten()
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
        one = ddim.ddim_sample(model, xT, schedule, 60, 1.0, clip_x0=clip)
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
    """App. D.3: the mean of eta = 1, and z times sqrt(1 - alpha_bar_t / alpha_bar_{t-1})."""
    model, xT, a = gaussian_eps(schedule), noise(4), schedule.alpha_bars
    torch.manual_seed(3)
    states = list(ddim.sigma_hat_process(model, xT, schedule, 4, "quadratic", clip_x0=False))
    assert [t for t, _ in states] == [1000, 562, 250, 62, 0]
    assert torch.equal(states[0][1], xT)
    torch.manual_seed(3)
    for (t, x), (t_prev, x_prev) in zip(states[:-1], states[1:], strict=True):
        eps_hat, z = model(x, torch.full((4,), t)), torch.randn_like(x)
        mean = ddim.ddim_step(x, eps_hat, t, t_prev, a, 1.0, torch.zeros_like(x))
        sigma_hat = (1 - a[t] / a[t_prev]).sqrt()
        assert_close(x_prev, mean + sigma_hat * z if t_prev else mean)  # and a clean end
        if t_prev:
            smaller = ddim.ddim_step(x, eps_hat, t, t_prev, a, 1.0, z) - mean
            assert ((x_prev - mean).abs() > smaller.abs()).all()


def test_sigma_hat_clamps_x0_hat_on_request(schedule):
    def states(clip):
        torch.manual_seed(0)
        return [x for _, x in ddim.sigma_hat_process(
            lambda x, t: 0.1 * x, 3 * noise(4), schedule, 2, clip_x0=clip)]

    assert states(True)[-1].abs().max() < 1.0001 < states(False)[-1].abs().max()
    assert states(True)[1].abs().max() > 1  # x_t itself is not clamped


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
    one, other = (ddim.ddim_sample(model, xT, schedule, 7) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, ddim.ddim_sample(model, xT, schedule, 7, 1.0))


@pytest.mark.parametrize("S", [1, 2, 3, 7, 50, 999, 1000])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_any_number_of_steps(schedule, S, eta):
    calls = []

    def model(x, t):
        calls.append(int(t[0]))
        assert t.dtype == torch.int64 and t.shape == (len(x),)
        return gaussian_eps(schedule)(x, t)

    x = ddim.ddim_sample(model, noise(3), schedule, S, eta)
    assert x.isfinite().all() and calls == ddim.ddim_timesteps(1000, S)[::-1]
    assert calls[0] == 1000    # sampling starts at the noise level of x_T


def test_one_step_is_x0_hat(schedule):
    xT = noise(5)
    for clip in (False, True):
        x = ddim.ddim_sample(gaussian_eps(schedule), xT, schedule, 1, clip_x0=clip)
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
    got = ddim.ddim_sample(lambda x, t: torch.full_like(x, 0.1), xT, schedule, 2)
    assert_close(got, x)


def test_inversion_goes_back(schedule):
    model, errors, code_errors = gaussian_eps(schedule), [], []
    x0 = MEAN + STD * noise(32)
    a = schedule.alpha_bars[-1]
    exact = a.sqrt() * MEAN + (x0 - MEAN) * (a * STD**2 + 1 - a).sqrt() / STD
    for S in (50, 100, 200, 1000):
        code = ddim.ddim_invert(model, x0, schedule, S)
        back = ddim.ddim_sample(model, code, schedule, S, clip_x0=False)
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
    for u in (0.25, 0.5, 0.9):
        middle = ddim.slerp(a, b, u)
        assert_close(middle.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
    angle = torch.acos(torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)))
    part = torch.acos(torch.nn.functional.cosine_similarity(
        a.flatten(1), ddim.slerp(a, b, 0.25).flatten(1)))
    assert_close(part, angle / 4)
    assert_close(ddim.slerp(a, a, 0.3), a)


def test_a_quarter_turn():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert_close(ddim.slerp(a, b, 1 / 3), torch.tensor([[math.cos(math.pi / 6), 0.5]]))


def test_inversion_starts_from_the_clean_image_along_tau(schedule):
    """Draw for draw: Eq. 12 with eta = 0, upwards."""
    model, x0, a = gaussian_eps(schedule), MEAN + STD * noise(4), schedule.alpha_bars
    x = x0
    for t, t_next in ((0, 62), (62, 250), (250, 562), (562, 1000)):
        eps_hat = model(x, torch.full((4,), max(t, 62)))
        x0_hat = (x - (1 - a[t]).sqrt() * eps_hat) / a[t].sqrt()
        x = a[t_next].sqrt() * x0_hat + (1 - a[t_next]).sqrt() * eps_hat
    assert_close(ddim.ddim_invert(model, x0, schedule, 4, "quadratic"), x)
