"""The probability-flow ODE: its solvers, likelihoods and bits per dimension."""

import math

import score_based_diffusion_example as sb

import numpy as np
import pytest
import torch
from exact_scores import SDES, Bounded, Mixture, every_sde, flow_of_gaussian, gaussian, noise
from scipy.integrate import solve_ivp
from torch.testing import assert_close

# Solvers


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_rk4_is_of_fourth_order(name):
    sde = SDES[name]()
    data, x = gaussian(sde, std=0.8), noise(sde, 16)
    errors = []
    for steps in (40, 80):
        found = sb.final(sb.ode_process(data, sde, x, sde.T, sde.eps, "rk4", steps))
        errors.append((found - flow_of_gaussian(sde, data, x, 1.0, sde.eps)).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.35), errors


@every_sde
def test_rk45_follows_the_exact_flow(name):
    sde = SDES[name]()
    data, x = gaussian(sde), noise(sde, 16)
    found = sb.final(sb.ode_process(data, sde, x, sde.T, sde.eps, tolerance=1e-8))
    assert_close(found, flow_of_gaussian(sde, data, x, 1.0, sde.eps), rtol=0, atol=1e-5)


@pytest.mark.slow
@every_sde
@pytest.mark.parametrize("method", ["rk45", "rk4"])
def test_encode_then_decode_returns_the_input(name, method):
    sde = SDES[name]()
    data = Mixture(sde)
    x = data.mu + 0.1
    z = sb.final(sb.ode_process(data, sde, x, sde.eps, sde.T, method, 200, 1e-7))
    assert (z - x).norm() > 0.5
    back = sb.final(sb.ode_process(data, sde, z, sde.T, sde.eps, method, 200, 1e-7))
    assert_close(back, x, rtol=0, atol=2e-3)


@pytest.mark.parametrize("t, s", [(1.0, 1e-3), (0.2, 0.9)])
def test_ode_process_is_scipy_s_rk45(t, s):
    """The same end as solve_ivp at the same tolerance, and every accepted t on the way."""
    sde = sb.VPSDE()
    data, x = Mixture(sde), noise(sde, 6)

    def rhs(u, flat):
        state = torch.from_numpy(flat).view(6, 2)
        u = torch.full((6,), u, dtype=torch.float64)
        drift, g = sde.sde(state, u)
        return (drift - 0.5 * g**2 * data(state, u)).numpy().ravel()

    for tolerance in (1e-3, 1e-6):
        ref = solve_ivp(rhs, (t, s), x.numpy().ravel(), rtol=tolerance, atol=tolerance)
        ts, states = zip(*sb.ode_process(data, sde, x, t, s, tolerance=tolerance), strict=True)
        assert list(ts) == pytest.approx(ref.t.tolist())
        assert_close(torch.stack(states), torch.from_numpy(ref.y.T.copy()).view(-1, 6, 2))
        assert torch.equal(states[0], x) and ts[-1] == s


def test_solve_carries_every_part_of_the_state():
    """A rotation beside a decay, float32 and float64, there and back; against solve_ivp."""
    a, b = torch.randn(3, 2).double(), torch.rand(4)

    def velocity(state, t):
        x, y = state
        assert (x.shape, y.shape, x.dtype, y.dtype) == (a.shape, b.shape, a.dtype, b.dtype)
        return torch.stack([-x[:, 1], x[:, 0]], 1), -t * y

    flat = np.concatenate([a.numpy().ravel(), b.double().numpy()])
    ref = solve_ivp(
        lambda t, y: np.concatenate([np.stack([-y[1:6:2], y[0:6:2]], 1).ravel(), -t * y[6:]]),
        (0.0, 2.0), flat, rtol=1e-6, atol=1e-6)
    ts, states = zip(*sb.solve(velocity, (a, b), 0.0, 2.0, 1e-6), strict=True)
    assert (ts[0], ts[-1]) == (0.0, 2.0) and len(ts) == pytest.approx(len(ref.t), abs=2)
    assert_close(states[-1][0], torch.from_numpy(ref.y[:6, -1].copy()).view(3, 2), rtol=1e-5, atol=1e-5)
    assert_close(states[-1][1], b * math.exp(-2), rtol=1e-4, atol=1e-5)
    back = sb.final(sb.solve(velocity, states[-1], 2.0, 0.0, 1e-6))
    assert_close(back[0], a, rtol=0, atol=1e-4)
    assert_close(back[1], b, rtol=0, atol=1e-4)


RATES = {"pole": lambda x, t: x**2, "nan": lambda x, t: x if t < 1 else x * math.nan}


@pytest.mark.parametrize("rate", RATES)
def test_a_solver_that_fails_says_so(rate):
    """y' = y^2 from 1 has no solution beyond t = 1: never an answer from half of the way."""
    calls = []

    def velocity(state, t):
        calls.append(t)
        assert len(calls) < 5000
        return (RATES[rate](state[0], t),)

    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="ODE solver stopped at t = "):
        sb.final(sb.solve(velocity, (torch.ones(1).double(),), 0.0, 2.0, 1e-4))


def test_a_network_that_says_nan_does_not_hold_the_solver_for_ever():
    score = Bounded(lambda x, t: x * math.nan)
    with pytest.raises(FloatingPointError):
        sb.final(sb.ode_process(score, sb.VPSDE(), torch.ones(2, 2), 1.0, 1e-3))


# Likelihoods


@every_sde
def test_likelihood_with_the_exact_trace(name):
    """To 1e-3 nats at t = eps, with the exact log p_T of the mixture."""
    sde = SDES[name]()
    data = Mixture(sde)
    x = torch.tensor([[-1.2, 0.0], [1.0, 1.2], [0.0, 0.3], [0.7, -1.0]]).double()
    sde.prior_logp = lambda z: data.logp(z, 1.0)
    found = sb.log_likelihood(Bounded(data), sde, x, tolerance=1e-7, eps=1e-3)
    assert_close(found, data.logp(x, 1e-3), rtol=0, atol=1e-3)


def test_likelihood_where_the_prior_is_exact():
    sde = sb.VPSDE()
    data = gaussian(sde, mean=(0.0, 0.0), std=1.0)
    x = torch.randn(5, 2).double()
    found = sb.log_likelihood(Bounded(data), sde, x, tolerance=1e-8)
    assert_close(found, torch.distributions.Normal(0, 1).log_prob(x).sum(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(probe):
    """A correlated Gaussian, one point many times: the mean is the density within its error."""
    sde, cov = sb.VPSDE(), torch.tensor([[0.5, 0.3], [0.3, 0.4]]).double()

    def score(x, t):
        m, std = sde.m(t).view(-1, 1, 1), sde.std(t).view(-1, 1, 1)
        return -torch.linalg.solve(m**2 * cov + std**2 * torch.eye(2), x[..., None])[..., 0]

    x = torch.tensor([[0.5, -0.2]]).double().expand(2000, 2)
    found = sb.log_likelihood(Bounded(score), sde, x, "hutchinson", probe, 1e-6)
    exact = torch.distributions.MultivariateNormal(torch.zeros(2).double(), cov).log_prob(x[0])
    error = found.std() / len(x) ** 0.5
    assert 1e-3 < error < 0.1 and abs(found.mean() - exact) < 4 * error


def test_the_probe_is_fixed_along_a_trajectory():
    """A fresh probe each evaluation would make the same solve differ with its tolerance by noise."""
    sde = sb.VPSDE()
    data = gaussian(sde)
    x = torch.randn(4, 2).double()
    results = []
    for tolerance in (1e-6, 1e-8):
        torch.manual_seed(7)
        score = Bounded(data)
        results.append(sb.log_likelihood(score, sde, x, "hutchinson", "gaussian", tolerance))
        assert all(torch.equal(state, score.states[0]) for state in score.states)  # no draws on the way
    assert_close(results[0], results[1], rtol=0, atol=1e-3)


def test_bits_per_dim_of_a_gaussian_model():
    """Against the probability of each 8-bit bin under N(0.1, 0.3^2), from its distribution function."""
    sde, mean, std = sb.VPSDE(), 0.1, 0.3
    data = Mixture(sde, (1.0,), ((mean,) * 16,), (std,))
    pixels = torch.randint(60, 200, (30, 1, 4, 4)).double()
    x = pixels / 127.5 - 1
    found = sb.bits_per_dim(Bounded(data), sde, x, tolerance=1e-5)
    cdf = torch.distributions.Normal(mean, std).cdf
    mass = cdf((pixels + 1) / 128 - 1) - cdf(pixels / 128 - 1)
    assert found.mean().item() == pytest.approx(-mass.log2().mean().item(), abs=0.02)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_the_probe_is_of_its_kind(probe):
    """At x = 0 with s = -A x the trace is v^T (A - 1) v times beta / 2: its values tell the probe."""
    sde, A = sb.VPSDE(), torch.tensor([[1.0, 0.5], [0.5, 3.0]]).double()
    x = torch.zeros(4000, 2).double()
    score = Bounded(lambda x, t: -x @ A)
    sde.prior_logp = lambda z: z.sum(1)
    found = sb.log_likelihood(score, sde, x, "hutchinson", probe, 1e-3)
    scale = sde.B(torch.ones(1).double()).item() - sde.B(torch.full((1,), 1e-5).double()).item()
    found, rest = found / (0.5 * scale), A - torch.eye(2)
    if probe == "rademacher":  # 1 or 3, each half of the time
        assert_close((found - 2).abs(), torch.ones(4000).double(), rtol=0, atol=1e-2)
        assert (found - 2).mean().abs() < 0.1
    else:  # mean tr (A - 1), variance 2 tr (A - 1)^2
        assert found.mean().item() == pytest.approx(rest.trace().item(), abs=0.3)
        assert found.var().item() == pytest.approx(2 * (rest @ rest).trace().item(), rel=0.2)


def test_bits_per_dim_spreads_the_pixels_over_their_bins(monkeypatch):
    """The density is that of the spread pixels, by Hutchinson's trace, with the tolerance asked for."""
    pixels, asked = torch.randint(0, 256, (40, 3, 8, 8)).float(), []

    def log_likelihood(score, sde, x, trace, tolerance):
        asked.append((score, sde, x, trace, tolerance))
        return torch.zeros(len(x))

    monkeypatch.setattr(sb, "log_likelihood", log_likelihood)
    for _ in range(2):
        found = sb.bits_per_dim("score", "sde", pixels / 127.5 - 1, tolerance=0.03)
        assert_close(found, torch.full((40,), 7.0))
    (score, sde, first, *rest), (_, _, second, *_) = asked
    assert (score, sde, rest) == ("score", "sde", ["hutchinson", 0.03])
    place = (first + 1) * 128 - pixels
    assert -1e-4 < place.min() < 0.01 and 0.99 < place.max() < 1 + 1e-4
    assert place.mean().item() == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(first, second)


def test_dequantize_fills_the_bins():
    x = torch.tensor([0.0, 17.0, 255.0]).expand(5000, 3) / 127.5 - 1
    bins = (sb.dequantize(x) + 1) * 128
    assert_close(bins.floor(), torch.tensor([0.0, 17.0, 255.0]).expand(5000, 3))
    assert_close((bins - bins.floor()).mean(0), torch.full((3,), 0.5), rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="8-bit"):
        sb.bits_per_dim(None, sb.VPSDE(), torch.rand(2, 1, 4, 4))
