"""The probability-flow ODE: its solvers, likelihoods and bits per dimension."""

import math

import score_based_diffusion_example as sb

import numpy as np
import pytest
import torch
from conftest import spied
from exact_scores import SDES, Bounded, Mixture, every_sde, flow_of_gaussian, gaussian, noise, papers_sde
from scipy.integrate import solve_ivp
from torch.testing import assert_close

# Solvers


@papers_sde
def test_rk4_is_of_fourth_order(name):
    """Against the exact flow, which it also takes back to where it came from."""
    sde = SDES[name]()
    data, x = gaussian(sde, std=0.8), noise(sde, 16)
    exact = flow_of_gaussian(sde, data, x, sde.T, sde.eps)
    for start, end, t, s in ((x, exact, sde.T, sde.eps), (exact, x, sde.eps, sde.T)):
        errors = [(sb.final(sb.ode_process(data, sde, start, t, s, "rk4", steps)) - end).abs().max().item()
                  for steps in (40, 80)]
        assert errors[0] / errors[1] == pytest.approx(16, rel=0.35), errors


@every_sde
def test_rk45_follows_the_exact_flow(name):
    """From noise to data, and from data to its code."""
    sde = SDES[name]()
    data, x = gaussian(sde), noise(sde, 16)
    exact = flow_of_gaussian(sde, data, x, sde.T, sde.eps)
    found = sb.final(sb.ode_process(data, sde, x, sde.T, sde.eps, tolerance=1e-8))
    assert_close(found, exact, rtol=0, atol=1e-5)
    found = sb.final(sb.ode_process(data, sde, exact, sde.eps, sde.T, tolerance=1e-7))
    assert_close(found, x, rtol=1e-5, atol=1e-4)


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


RATES = {"pole": lambda x, t: x**2, "nan": lambda x, t: x if t < 1 else x * math.nan,
         "nan at once": lambda x, t: x * math.nan}


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


# Likelihoods


@every_sde
def test_likelihood_with_the_exact_trace(name):
    """To 1e-3 nats at t = eps, with the exact log p_T of the mixture."""
    sde = SDES[name]()
    data = Mixture(sde)
    x = torch.tensor([[-1.2, 0.0], [1.0, 1.2], [0.0, 0.3], [0.7, -1.0]]).double()
    sde.prior_logp = lambda z: data.logp(z, 1.0)
    found = sb.log_likelihood(Bounded(data), sde, x, tolerance=1e-6, eps=1e-3)
    assert_close(found, data.logp(x, 1e-3), rtol=0, atol=1e-3)


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


# Bits per dimension


def test_bits_per_dim_is_the_bound_of_a_gaussian_model(monkeypatch):
    """In closed form, where a bin is wider than the model: E_u -log_2 N((k + u) / 128 - 1; mean, std^2) + 7."""
    sde, mean, std, asked = sb.VPSDE(), 0.1, 0.005, []
    data = Mixture(sde, (1.0,), ((mean,) * 16,), (std,))
    pixels = torch.randint(139, 143, (200, 1, 4, 4)).double()
    spied(monkeypatch, sb, "log_likelihood", lambda given, _: asked.append((given["trace"], given["tolerance"])))
    found = sb.bits_per_dim(Bounded(data), sde, pixels / 127.5 - 1, tolerance=1e-4)
    assert asked == [("hutchinson", 1e-4)]
    m, noise_std = (f(torch.tensor(1e-5).double()) for f in (sde.m, sde.std))
    variance = (m**2 * std**2 + noise_std**2).item()
    distance2 = ((pixels + 0.5) / 128 - 1 - mean) ** 2 + 1 / 128**2 / 12
    exact = (math.log(2 * math.pi * variance) / 2 + distance2 / (2 * variance)) / math.log(2) + 7
    error = (found - exact.flatten(1).mean(1)).std().item() / 200**0.5
    assert error < 0.02
    assert found.mean().item() == pytest.approx(exact.mean().item(), abs=4 * error)
    with pytest.raises(ValueError, match="8-bit"):
        sb.bits_per_dim(Bounded(data), sde, torch.rand(2, 1, 4, 4))
