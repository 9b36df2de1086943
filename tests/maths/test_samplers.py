"""Predictors, correctors and the processes made of them, from exact scores."""

import math
from functools import partial

import score_based_diffusion_example as sb

import numpy as np
import pytest
import torch
from exact_scores import SDES, Bounded, Correlated, Mixture, every_sde, flow_of_gaussian, gaussian, noise, papers_sde
from torch.testing import assert_close

SAMPLERS = [  # each with two SDEs
    (sb.Config(sampler="em", N=400), ("vp", "subvp")), (sb.Config(sampler="reverse", N=300), ("ve", "subvp")),
    (sb.Config(sampler="ancestral", N=300), ("ve", "vp")), (sb.Config(sampler="pc", N=150, snr=0.1), ("ve", "subvp")),
    (sb.Config(sampler="rk45", tolerance=1e-4), ("vp", "subvp")), (sb.Config(sampler="rk4", N=160), ("ve", "vp"))]


def langevin(snr, times=1):
    """So many corrector steps of one ratio, as sde_process takes them."""
    return [partial(sb.langevin_step, snr=snr)] * times


def walk(step, score, sde, x, steps, **options):
    """The last two states of a process: with the noise of the last step, and without."""
    *_, (t, noisy), (zero, mean) = sb.sde_process(step, score, sde, x, steps, **options)
    assert (t, zero) == (pytest.approx(sde.eps), 0)
    return noisy, mean


# Steps


@every_sde
def test_euler_maruyama_step_is_as_long_as_its_grid_says(name):
    """Eq. 6 over t - s, whatever the number of steps."""
    sde, x = SDES[name](), torch.randn(4, 2).double()
    drift, g = sde.sde(x, torch.full((4,), 0.8).double())
    for s in (0.75, 0.2):
        found, std = sb.em_step(lambda x, t: -3 * x, sde, x, 0.8, s)
        assert_close(found, x - (drift + 3 * g**2 * x) * (0.8 - s), rtol=1e-5, atol=1e-6)
        assert_close(std, g * (0.8 - s) ** 0.5)


def test_the_reverse_diffusion_and_flow_predictors_are_those_of_the_paper():
    """Alg. 2, 3, line 3, and Eq. 43, 44, which have half of the score and no noise."""
    x, score = torch.randn(4, 2).double(), lambda x, t: -0.3 * x
    ve, vp = sb.VESDE(), sb.VPSDE()
    s, t = (torch.tensor([u], dtype=torch.float64) for u in (0.5, 0.6))
    difference = ve.std(t) ** 2 - ve.std(s) ** 2
    beta = 1 - (vp.m(t) / vp.m(s)) ** 2
    for sde, start, variance in ((ve, x, difference), (vp, (2 - (1 - beta).sqrt()) * x, beta)):
        mean, std = sb.reverse_diffusion_step(score, sde, x, 0.6, 0.5)
        assert_close(mean, start + variance * -0.3 * x)
        assert std == pytest.approx(variance.sqrt().item())
        mean, std = sb.flow_step(score, sde, x, 0.6, 0.5)
        assert_close(mean, start + 0.5 * variance * -0.3 * x)
        assert std == 0


def test_ancestral_is_ddpm_with_sigma_beta():
    """Eq. 4: the VP step with beta = the step's 1 - alpha is DDPM's Alg. 2, line 4."""
    sde, t, s = sb.VPSDE(), 0.6, 0.55
    data, x = gaussian(sde), noise(sde, 8)
    a, beta = sde.transition(s, t)
    found, std = sb.ancestral_step(data, sde, x, t, s)
    tt = torch.full((8,), t).double()
    alpha_bar = sde.m(tt[:1]) ** 2
    eps_hat = -data(x, tt) * (1 - alpha_bar).sqrt()
    assert_close(found, (x - beta / (1 - alpha_bar).sqrt() * eps_hat) / math.sqrt(1 - beta))
    assert (a, std) == pytest.approx((math.sqrt(1 - beta), math.sqrt(beta)))
    with pytest.raises(ValueError, match="VESDE and VPSDE"):
        sb.ancestral_step(data, sb.SubVPSDE(), x, t, s)


def test_ve_ancestral_is_the_posterior_of_smld():
    """With the exact score of a single point x_0 the step's mean and variance are q(x_s | x_t, x_0)'s."""
    sde, t, s = sb.VESDE(), 0.6, 0.5
    x0, x = 0.3, torch.full((4, 1), 2.0).double()
    sigma_t, sigma_s = (sde.std(torch.tensor(u).double()).item() for u in (t, s))
    found, std = sb.ancestral_step(lambda x, t: -(x - x0) / sigma_t**2, sde, x, t, s)
    fraction = sigma_s**2 / sigma_t**2
    assert_close(found, torch.full_like(x, x0 + fraction * (2.0 - x0)), rtol=1e-5, atol=0)
    assert std == pytest.approx(sigma_s * math.sqrt(1 - fraction))


@papers_sde
def test_the_flow_predictor_follows_the_flow_at_first_order(name):
    """Twice the steps, half the error, and the way is that of the exact flow."""
    sde = SDES[name]()
    data, x = gaussian(sde), noise(sde, 20)
    exact = flow_of_gaussian(sde, data, x, sde.T, sde.eps)
    errors = [(walk(sb.flow_step, data, sde, x, steps)[0] - exact).abs().mean().item() for steps in (100, 200)]
    assert errors[1] < 0.15 and errors[0] / errors[1] == pytest.approx(2, rel=0.2)


def test_no_predictor_leaves_x_to_the_corrector_and_ends_with_tweedie():
    sde, x = sb.VPSDE(), noise(sb.VPSDE(), 5)
    score = gaussian(sde)
    mean, std = sb.identity_step(score, sde, x, 0.4, 0.3)
    assert mean is x and std == 0
    mean, std = sb.identity_step(score, sde, x, 0.01, sde.eps)
    assert_close(mean, sb.tweedie(score, sde, x, 0.01), rtol=0, atol=0)
    assert std == 0


@every_sde
def test_tweedie_is_the_posterior_mean(name):
    sde = SDES[name]()
    data = gaussian(sde, mean=(0.4, -0.3), std=0.5)
    x, t = torch.randn(9, 2).double(), torch.tensor([0.4]).double()
    m, std = sde.m(t), sde.std(t)
    gain = m * 0.25 / (m**2 * 0.25 + std**2)
    assert_close(sb.tweedie(data, sde, x, 0.4), data.mu + gain * (x - m * data.mu))


# The corrector and sde_process


def test_langevin_step_size():
    """Alg. 4, 5: epsilon = 2 alpha (r |z| / |g|)^2 with norms averaged over the batch."""
    x, g = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    torch.manual_seed(4)
    found = sb.langevin_step(lambda x, t: g * t[:, None], x, 0.5, alpha=0.9, snr=0.2)
    torch.manual_seed(4)
    z, g = torch.randn_like(x), 0.5 * g
    epsilon = 2 * 0.9 * (0.2 * z.norm(dim=1).mean() / g.norm(dim=1).mean()) ** 2
    assert_close(found, x + epsilon * g + (2 * epsilon) ** 0.5 * z)


def test_alpha_of_the_corrector_is_that_of_the_step():
    """Alg. 5: alpha_i = 1 - beta_i = exp(-integral of beta over the step); Alg. 4 has none."""
    seen, x = [], torch.zeros(2, 2).double()
    correctors = [lambda score, x, t, alpha: seen.append(float(alpha)) or x]
    walk(sb.reverse_diffusion_step, lambda x, t: -x, sb.VESDE(), x, 3, correctors=correctors)
    assert seen == [1, 1, 1]
    seen.clear()
    sde = sb.VPSDE(beta_min=0.1, beta_max=20)
    walk(sb.reverse_diffusion_step, lambda x, t: -x, sde, x, 200, correctors=correctors)
    ts = torch.linspace(1, sde.eps, 201).double()
    B = 0.1 * ts + 9.95 * ts**2
    assert_close(torch.tensor(seen).double(), (B[1:] - B[:-1]).exp(), rtol=1e-6, atol=0)


def test_corrector_bias_on_a_unit_gaussian():
    """Unadjusted Langevin ends at variance 1 / (1 - epsilon / 2); with this rule's epsilon, 1 + r^2."""
    x, seen = torch.randn(64, 1000).double(), []
    for i in range(60):
        x = sb.langevin_step(lambda x, t: -x, x, 0.5, alpha=1.0, snr=0.5)
        if i >= 30:
            seen.append(x.var().item())
    variance = sum(seen) / len(seen)
    assert variance == pytest.approx(1 / (1 - 0.5**2 / variance), abs=0.01)
    assert variance - 1 == pytest.approx(0.5**2, abs=0.01)


@every_sde
def test_the_process_walks_from_T_down_to_eps_and_ends_with_a_mean(name):
    """Mean and noise at every step; the last mean alone is x_0, which leaves no speckle."""
    sde = SDES[name]()
    data, x = gaussian(sde), noise(sde, 3)
    torch.manual_seed(5)
    ts, states = zip(*sb.sde_process(sb.em_step, data, sde, x, 7), strict=True)
    grid = np.linspace(sde.T, sde.eps, 8).tolist()
    assert list(ts) == pytest.approx([*grid, 0.0])
    assert torch.equal(states[0], x)
    torch.manual_seed(5)
    for i in range(7):
        mean, std = sb.em_step(data, sde, states[i], grid[i], grid[i + 1])
        assert_close(states[i + 1], mean + std * torch.randn_like(x))
    assert_close(states[8], mean)


# The route from --sampler to the algorithm


@pytest.mark.slow
@pytest.mark.parametrize("cfg, name", [(cfg, name) for cfg, names in SAMPLERS for name in names],
                         ids=lambda value: getattr(value, "sampler", value))
def test_every_sampler_draws_a_mixture(cfg, name):
    """Its mean, covariance and mode weights, and the width of each mode."""
    sde = SDES[name]()
    data = Mixture(sde)
    x = sb.final(sb.sampling_process(cfg, data, sde, noise(sde, 3000)))
    mean, cov = data.moments()
    assert_close(x.mean(0), mean, rtol=0, atol=0.09)
    assert_close(torch.cov(x.T), cov, rtol=0, atol=0.1)
    nearest = torch.cdist(x, data.mu).argmin(1)
    assert_close(torch.bincount(nearest, minlength=3) / len(x), data.w.float(), rtol=0, atol=0.045)
    for k in range(3):
        assert x[nearest == k].std(0).mean().item() == pytest.approx(data.s[k].item(), rel=0.12)


STEPS = {"em": sb.em_step, "reverse": sb.reverse_diffusion_step, "flow": sb.flow_step,
         "ancestral": sb.ancestral_step, "none": sb.identity_step}


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("sampler, predictor, corrector_steps", [
    ("em", "none", 3), ("reverse", "flow", 3), ("ancestral", "reverse", 3), ("rk4", "reverse", 3),
    ("rk45", "reverse", 3), ("pc", "reverse", 0), ("pc", "ancestral", 1), ("pc", "flow", 2), ("pc", "none", 3)])
def test_the_process_is_that_of_the_sampler_that_the_config_names(sampler, predictor, corrector_steps, denoise):
    """With its N, predictor, snr, corrector_steps, tolerance and denoise, state by state; no gradient is kept."""
    sde, weight = sb.VPSDE(), torch.nn.Parameter(torch.ones(1).double())
    data, xT = gaussian(sde), noise(sde, 3)
    cfg = sb.Config(N=12, snr=0.123, tolerance=0.02, sampler=sampler, predictor=predictor,
                    corrector_steps=corrector_steps, denoise=denoise)
    if sampler in ("rk4", "rk45"):  # these stop at x_eps
        wanted = list(sb.ode_process(data, sde, xT, sde.T, sde.eps, sampler, steps=3, tolerance=0.02))
        wanted.append((0.0, sb.tweedie(data, sde, wanted[-1][1], sde.eps)))
    else:
        correctors = langevin(0.123, corrector_steps) if sampler == "pc" else ()
        step = STEPS[predictor if sampler == "pc" else sampler]
        torch.manual_seed(3)
        wanted = list(sb.sde_process(step, data, sde, xT, 12, correctors))
    torch.manual_seed(3)
    states = list(sb.sampling_process(cfg, lambda x, t: weight * data(x, t), sde, xT))
    assert [t for t, _ in states] == [t for t, _ in wanted if t > 0 or denoise]
    for (_, x), (_, y) in zip(states, wanted, strict=False):
        assert_close(x, y, rtol=0, atol=0)
        assert not x.requires_grad


@pytest.mark.parametrize("name, predictors", [
    ("vp", ("reverse diffusion", "ancestral", "probability flow")),
    ("subvp", ("reverse diffusion", "probability flow"))])
def test_the_methods_are_those_of_table_1_at_the_same_cost(name, predictors):
    cfg = sb.Config(sde=name)
    sde, short = sb.make_sde(cfg), {"reverse diffusion": "reverse", "probability flow": "flow"}
    methods = sb.make_methods(cfg, sde, calls=40)
    found = {key: (its.sampler, its.predictor, its.corrector_steps) for key, its in methods.items()}
    wanted = {"Euler–Maruyama": ("em", "reverse", 1)}
    wanted |= {word: ("pc", short.get(word, word), 0) for word in predictors}
    wanted |= {f"{word}, corrector": ("pc", short.get(word, word), 1) for word in predictors}
    wanted |= {"corrector alone": ("pc", "none", 1), "ODE, RK45": ("rk45", "reverse", 1),
               "ODE, RK4": ("rk4", "reverse", 1)}
    assert found == wanted
    for key, method in methods.items():
        if method.sampler != "rk45":
            score = Bounded(gaussian(sde))
            sb.final(sb.sampling_process(method, score, sde, noise(sde, 3)))
            assert score.calls == 40 + (key in ("corrector alone", "ODE, RK4")), key  # Tweedie's


# Controllable generation


def test_correctors_come_first_and_every_state_is_constrained_at_its_own_t():
    """The start at T, each corrector's x at t, the predictor's at s, the mean at 0."""
    sde, order = sb.VESDE(), []

    def corrector(word):
        return lambda score, x, t, alpha: order.append((word, t)) or x

    def predictor(score, sde, x, t, s):
        order.append(("predictor", t))
        return x, 0.0

    def constrain(x, t):
        order.append(("constrain", t))
        return torch.full_like(x, len(order))

    states = list(sb.sde_process(predictor, lambda x, t: -x, sde, noise(sde, 3), 3,
                                 [corrector("first"), corrector("second")], constrain))
    grid = np.linspace(sde.T, sde.eps, 4).tolist()
    wanted = [("constrain", sde.T)]
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        wanted += [("first", t), ("constrain", t), ("second", t), ("constrain", t), ("predictor", t), ("constrain", s)]
    assert order == [*wanted, ("constrain", 0.0)]
    assert [x.unique().item() for _, x in states] == [1, 7, 13, 19, 20]  # each as it was constrained last


@every_sde
def test_imputation_noises_what_is_known_as_the_sde_does(name):
    sde = SDES[name]()
    known, x = torch.full((4000, 2), 0.7).double(), noise(sde)
    constrain = sb.imputation(sde, known, torch.tensor([True, False]))
    for t in (0.3, 1.0):
        found, (mean, std) = constrain(x, t), sde.marginal(known, torch.full((4000,), t).double())
        assert_close(found[:, 1], x[:, 1], rtol=0, atol=0)
        assert found[:, 0].mean().item() == pytest.approx(mean[0, 0].item(), abs=4 * std[0].item() / 63)
        assert found[:, 0].std().item() == pytest.approx(std[0].item(), rel=0.05)
    assert_close(constrain(x, 0.0)[:, 0], known[:, 0], rtol=0, atol=0)  # VE: sigma(0) is not 0


def test_a_basis_turns_the_channels_that_are_known():
    """Rows (1, 1) / sqrt(2) and (-1, 1) / sqrt(2): the mean of two channels is known, their difference not."""
    basis = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]).double() / 2**0.5
    known, x = torch.randn(5, 2, 3).double(), torch.randn(5, 2, 3).double()
    mask = torch.tensor([[True], [False]])
    found = sb.imputation(sb.VPSDE(), known, mask, basis)(x, 0.0)
    assert_close(found.mean(1), known.mean(1))
    assert_close(found[:, 0] - found[:, 1], x[:, 0] - x[:, 1])


def complete(data, n, steps, step=sb.reverse_diffusion_step, correctors=()):
    """Draws of (x, y), where x is known to be 0.875."""
    known = torch.tensor([0.875, 0.0]).double().expand(n, 2)
    constrain = sb.imputation(data.sde, known, torch.tensor([True, False]))
    return walk(step, data, data.sde, noise(data.sde, n), steps, correctors=correctors, constrain=constrain)[1]


def correlated(sde):
    return Correlated(sde, [0.2, -0.1], [[0.25, 0.2], [0.2, 0.25]])


@pytest.mark.parametrize("predictor, name", [
    ("em_step", "subvp"), ("reverse_diffusion_step", "ve"), ("reverse_diffusion_step", "vp"),
    ("ancestral_step", "ve"), ("ancestral_step", "vp")])
def test_completions_follow_the_recursion_of_a_joint_gaussian(predictor, name):
    """Every step is linear: mean and variance of the unknown in closed form, step by step.

    The exact conditional is N(0.44, 0.09): what the predictor alone misses of it stands at the end.
    """
    sde, steps, k, n = SDES[name](), 100, 0.875, 6000
    data, step = correlated(sde), getattr(sb, predictor)
    found = complete(data, n, steps, step)
    assert (found[:, 0] == k).all()

    mean, variance = 0.0, sde.prior_std**2
    grid = np.linspace(sde.T, sde.eps, steps + 1).tolist()
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        m, std = (f(torch.tensor([t]).double()).item() for f in (sde.m, sde.std))
        corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
        (at_0, at_k, at_u), noise_std = step(data, sde, corners, t, s)
        of_k, of_u = (at_k - at_0)[1].item(), (at_u - at_0)[1].item()
        mean = at_0[1].item() + of_k * m * k + of_u * mean
        variance = of_k**2 * std**2 + of_u**2 * variance
        if s > grid[-1]:  # the last step returns its mean
            noise_std = noise_std[0].item() if torch.is_tensor(noise_std) else noise_std
            variance += noise_std**2
    assert found[:, 1].mean().item() == pytest.approx(mean, abs=5 * (variance / n) ** 0.5)
    assert found[:, 1].var().item() == pytest.approx(variance, rel=0.1)
    exact, exact_variance = -0.1 + 0.8 * (k - 0.2), 0.25 - 0.2**2 / 0.25
    assert 0.15 < exact - mean < 0.25 and 1.2 < variance / exact_variance < 1.8


@pytest.mark.slow
@papers_sde
def test_the_corrector_brings_completions_to_the_exact_conditional(name):
    """It lets the unknown hear of the known again and again at the same t."""
    found = complete(correlated(SDES[name]()), 2000, 120, correctors=langevin(0.16, 5))[:, 1]
    assert found.mean().item() == pytest.approx(0.44, abs=0.06)
    assert found.var().item() == pytest.approx(0.09, rel=0.18)


@every_sde
def test_a_classifier_makes_the_score_that_of_its_class(name):
    """Bayes: with the exact p_t(y | x) of a mixture, component by component, where gradients are off as in sampling."""
    sde = SDES[name]()
    data, x = Mixture(sde), torch.randn(7, 2).double()
    y, t = torch.arange(7) % 3, torch.full((7,), 0.4).double()
    guided = sb.conditional_score(data, lambda x, t: data.terms(x, t)[2], y)
    with torch.no_grad():
        found = guided(x, t)
    for k in range(3):
        component = Mixture(sde, (1.0,), (data.mu[k].tolist(),), (data.s[k].item(),))
        assert_close(found[y == k], component(x[y == k], t[y == k]), rtol=1e-6, atol=1e-8)
