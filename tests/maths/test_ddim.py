"""DDIM against closed forms: for Gaussian data the exact eps and the exact flow are known.

What ddim_example.py shares with ddpm_example.py is tested in test_ddpm.py.
"""

import ddim_example as ddim
import ddpm_example as ddpm

import pytest
import torch
from conftest import ExactEps, mean_and_cov, mixture_eps
from torch.testing import assert_close

MEAN, STD = 0.4, 0.3


def double(schedule):
    return ddim.Schedule(*(array.double() for array in schedule))


@pytest.fixture(scope="module")
def schedule():
    return double(ddim.make_schedule("linear", 1000))


def gaussian(schedule):
    """The exact eps*(x_t, t) of data N(MEAN, STD^2)."""
    return ExactEps(schedule.alpha_bars, [1.0], [[MEAN]], [[[STD**2]]])


def noise(n=64, D=1):
    """The same x_T in every test: (n, D, 1, 1), float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, D, 1, 1, dtype=torch.float64, generator=generator)


def recorded(model):
    """The model, and a list of the (t, x_t) at which it is asked."""
    asked = []

    def network(x, t):
        assert t.dtype == torch.int64 and t.tolist() == [t[0]] * len(x)
        asked.append((int(t[0]), x))
        return model(x, t)

    return network, asked


# Sampling


@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
@pytest.mark.parametrize("T, S", [*((1000, S) for S in (1, 2, 3, 7, 50, 999, 1000)), (20, 20), (7, 3)])
def test_timesteps_are_distinct_ascending_and_end_in_T(T, S, spacing):
    tau = ddim.ddim_timesteps(T, S, spacing)
    assert len(tau) == len(set(tau)) == S and tau == sorted(tau)
    assert tau[0] >= 1 and tau[-1] == T
    assert ddim.ddim_timesteps(1000, 4, spacing) == {
        "linear": [250, 500, 750, 1000], "quadratic": [62, 250, 562, 1000]}[spacing]


@pytest.mark.parametrize("clip_x0", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_the_process_takes_the_steps_of_eq_12_and_16_along_tau(schedule, eta, clip_x0):
    """Draw for draw. With x0_hat clamped, x_t moves as if the noise were the one behind it."""
    model, asked = recorded(lambda x, t: x.sin())
    xT, a = 3 * noise(5), schedule.alpha_bars
    torch.manual_seed(7)
    states = list(ddim.ddim_process(model, xT, schedule, 4, eta, "quadratic", clip_x0))
    assert [t for t, _ in states] == [1000, 562, 250, 62, 0] and states[0][1] is xT
    torch.manual_seed(7)
    for (t, xt), (s, x_prev), (asked_t, x) in zip(states[:-1], states[1:], asked, strict=True):
        assert asked_t == t and x is xt  # x_t itself is not clamped
        x0_hat = (xt - (1 - a[t]).sqrt() * xt.sin()) / a[t].sqrt()
        assert x0_hat.abs().max() > 1 or t < 1000
        x0_hat = x0_hat.clamp(-1, 1) if clip_x0 else x0_hat
        eps_hat = (xt - a[t].sqrt() * x0_hat) / (1 - a[t]).sqrt()
        sigma = eta * ((1 - a[s]) / (1 - a[t]) * (1 - a[t] / a[s])).sqrt()  # Eq. 16
        mean = a[s].sqrt() * x0_hat + (1 - a[s] - sigma**2).clamp(min=0).sqrt() * eps_hat
        assert_close(x_prev, mean + sigma * torch.randn_like(xt) if eta else mean)
    torch.manual_seed(7)
    assert torch.equal(ddim.ddim_sample(model, xT, schedule, 4, eta, "quadratic", clip_x0), states[-1][1])


def test_eta_0_follows_the_flow_at_first_order(schedule):
    """The probability-flow ODE of a Gaussian rescales the distance to the mean."""
    xT, a, errors = noise(), schedule.alpha_bars[-1], []
    flow = MEAN + STD * (xT - a.sqrt() * MEAN) / (a * STD**2 + 1 - a).sqrt()
    for S in (25, 50, 100):
        x = ddim.ddim_sample(gaussian(schedule), xT, schedule, S, clip_x0=False)
        errors.append((x - flow).abs().max().item())
    assert all(1.7 < a / b < 2.3 for a, b in zip(errors[:-1], errors[1:], strict=True)), errors


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_mixture_keeps_its_modes(schedule, eta):
    exact = mixture_eps(schedule.alpha_bars)
    x = ddim.ddim_sample(exact, noise(2000, 2), schedule, 80, eta, clip_x0=False)
    assert_close(exact.nearest(x), exact.weights, rtol=0, atol=0.06)
    which = torch.cdist(x.flatten(1), exact.means).argmin(1)
    for k in range(3):
        mean, cov = mean_and_cov(x[which == k])
        assert_close(mean, exact.means[k], rtol=0, atol=0.07)
        assert_close(cov, exact.covs[k], rtol=0.25, atol=0.012)


def test_eta_1_with_all_steps_is_ancestral_sampling_draw_for_draw():
    schedule = double(ddim.make_schedule("linear", 60))
    model, xT = gaussian(schedule), noise()
    for clip in (False, True):
        torch.manual_seed(3)
        one = ddim.ddim_sample(model, xT, schedule, 60, 1.0, clip_x0=clip)
        torch.manual_seed(3)
        other = ddpm.sample(model, xT.shape, schedule, "beta_tilde", clip, xT)
        assert_close(one, other, atol=1e-5, rtol=0)    # the schedules are rounded to float32


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_every_eta_keeps_the_marginal(schedule, eta):
    """Eq. 12 with the true eps takes q(x_t | x_0) to q(x_s | x_0): Lemma 1, here by its two moments."""
    a, x0 = schedule.alpha_bars, torch.full((1, 1, 1, 1), 0.7).double()
    eps, zero, one = (torch.full_like(x0, v) for v in (1.3, 0.0, 1.0))
    xt = a[600].sqrt() * x0 + (1 - a[600]).sqrt() * eps
    mean = ddim.ddim_step(xt, eps, 600, 350, a, eta, zero)
    sigma = ddim.ddim_step(xt, eps, 600, 350, a, eta, one) - mean
    direction = (mean - a[350].sqrt() * x0) / eps
    assert_close(direction**2 + sigma**2, (1 - a[350]).view(1, 1, 1, 1))
    assert (sigma == 0).all() == (eta == 0)


@pytest.mark.parametrize("clip_x0", [True, False])
def test_sigma_hat_changes_only_the_noise(schedule, clip_x0):
    """App. D.3: the mean of eta = 1, and z times sqrt(1 - alpha_bar_t / alpha_bar_{t-1})."""
    model, asked = recorded(lambda x, t: 0.1 * x)
    xT, a = 3 * noise(4), schedule.alpha_bars
    torch.manual_seed(3)
    states = list(ddim.sigma_hat_process(model, xT, schedule, 4, "quadratic", clip_x0))
    assert [t for t, _ in states] == [1000, 562, 250, 62, 0] and states[0][1] is xT
    torch.manual_seed(3)
    for (t, x), (t_prev, x_prev), (asked_t, xt) in zip(states[:-1], states[1:], asked, strict=True):
        assert asked_t == t and xt is x
        eps_hat, z = 0.1 * x, torch.randn_like(x)
        if clip_x0:
            eps_hat = ddim.clip_eps(x, eps_hat, t, a)
            assert (eps_hat - 0.1 * x).abs().max() > 0.01
        mean = ddim.ddim_step(x, eps_hat, t, t_prev, a, 1.0, torch.zeros_like(x))
        sigma_hat = (1 - a[t] / a[t_prev]).sqrt()
        assert_close(x_prev, mean + sigma_hat * z if t_prev else mean)  # and a clean end


# Codes and interpolation


def test_inversion_starts_from_the_clean_image_along_tau(schedule):
    """Draw for draw: Eq. 12 with eta = 0, upwards; the network is asked where it was trained."""
    model, asked = recorded(gaussian(schedule))
    x0, a = MEAN + STD * noise(4), schedule.alpha_bars
    x = x0
    for t, t_next in ((0, 62), (62, 250), (250, 562), (562, 1000)):
        eps_hat = gaussian(schedule)(x, torch.full((4,), max(t, 62)))
        x0_hat = (x - (1 - a[t]).sqrt() * eps_hat) / a[t].sqrt()
        x = a[t_next].sqrt() * x0_hat + (1 - a[t_next]).sqrt() * eps_hat
    assert_close(ddim.ddim_invert(model, x0, schedule, 4, "quadratic"), x)
    assert [t for t, _ in asked] == [62, 62, 250, 562]


def test_inversion_finds_the_exact_code_and_goes_back(schedule):
    model, errors, code_errors = gaussian(schedule), [], []
    x0, a = MEAN + STD * noise(32), schedule.alpha_bars[-1]
    exact = a.sqrt() * MEAN + (x0 - MEAN) * (a * STD**2 + 1 - a).sqrt() / STD
    for S in (50, 200):
        code = ddim.ddim_invert(model, x0, schedule, S)
        back = ddim.ddim_sample(model, code, schedule, S, clip_x0=False)
        errors.append((back - x0).abs().max().item())
        code_errors.append((code - exact).abs().max().item())
    assert errors[1] < 0.5 * errors[0] < 0.05, errors
    assert code_errors[1] < 0.5 * code_errors[0] < 0.2, code_errors


def test_slerp_goes_along_the_arc_at_an_even_pace():
    a, b = torch.randn(2, 4, 1, 16, 16).double()
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)

    def angle(x):
        return torch.acos(torch.nn.functional.cosine_similarity(a.flatten(1), x.flatten(1)))

    assert_close(ddim.slerp(a, b, 0.0), a)
    assert_close(ddim.slerp(a, b, 1.0), b)
    for u in (0.25, 0.5, 0.9):
        between = ddim.slerp(a, b, u)
        assert_close(between.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
        assert_close(angle(between), u * angle(b))
    assert_close(ddim.slerp(a, a, 0.3), a)
