"""Exact scores to stand in for the network: Gaussians and mixtures under every SDE."""

import math

import score_based_diffusion_example as sb

import pytest
import torch

SDES = {
    "ve": sb.VESDE, "vp": sb.VPSDE, "vp_cosine": lambda: sb.VPSDE(kind="cosine"),
    "subvp": sb.SubVPSDE, "subvp_cosine": lambda: sb.SubVPSDE(kind="cosine")}
every_sde = pytest.mark.parametrize("name", SDES)
papers_sde = pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
LIMIT = 3000  # evaluations: a solver that needs more has been given noise to integrate


class Mixture:
    """Isotropic Gaussians of given weights, means and stds: the exact score and density at any t."""

    def __init__(self, sde, weights=(0.5, 0.3, 0.2), means=((-1.2, 0.0), (1.0, 0.9), (0.9, -1.1)),
                 stds=(0.15, 0.25, 0.2)):
        self.sde = sde
        self.w, self.mu, self.s = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, stds))

    def terms(self, x, t):
        """Gaps to the means (B, K, D), variances (B, K), log of each weighted density (B, K)."""
        m, std = self.sde.m(t).view(-1, 1), self.sde.std(t).view(-1, 1)
        variance = m**2 * self.s**2 + std**2
        gap = x[:, None].flatten(2) - m[..., None] * self.mu
        D = gap.shape[2]
        log_p = self.w.log() - 0.5 * (gap**2).sum(2) / variance - 0.5 * D * (2 * math.pi * variance).log()
        return gap, variance, log_p

    def logp(self, x, t):
        return self.terms(x, torch.full((len(x),), t, dtype=x.dtype))[2].logsumexp(1)

    def __call__(self, x, t):
        assert t.shape == (len(x),) and t.dtype == x.dtype
        gap, variance, log_p = self.terms(x, t)
        return -(log_p.softmax(1)[..., None] * gap / variance[..., None]).sum(1).view_as(x)

    def moments(self):
        """Mean (D,) and covariance (D, D) of x_0."""
        mean = self.w @ self.mu
        gap = self.mu - mean
        eye = torch.eye(len(mean), dtype=torch.float64)
        spread = gap[:, :, None] * gap[:, None] + (self.s**2)[:, None, None] * eye
        return mean, (self.w[:, None, None] * spread).sum(0)


def gaussian(sde, mean=(0.4, -0.3), std=0.5):
    """The Mixture of a single Gaussian."""
    return Mixture(sde, (1.0,), (mean,), (std,))


class Correlated:
    """The exact score of one Gaussian N(mean, cov) of any covariance, at any t."""

    def __init__(self, sde, mean, cov):
        self.sde, self.mean, self.cov = sde, torch.tensor(mean).double(), torch.tensor(cov).double()

    def __call__(self, x, t):
        m, std = (f(t[:1]) for f in (self.sde.m, self.sde.std))
        matrix = torch.linalg.inv(m**2 * self.cov + std**2 * torch.eye(len(self.mean)).double())
        return -(x - m * self.mean) @ matrix


def flow_of_gaussian(sde, data, x, t, s):
    """Where the probability-flow ODE of one Gaussian takes x from time t to s, in closed form."""
    t, s = torch.tensor(t).double(), torch.tensor(s).double()
    size = [(sde.m(u) ** 2 * data.s**2 + sde.std(u) ** 2).sqrt() for u in (t, s)]
    return sde.m(s) * data.mu + (x - sde.m(t) * data.mu) * size[1] / size[0]


class Bounded:
    """A score that answers no more than LIMIT times: an adaptive solver that crawls is stopped."""

    def __init__(self, score):
        self.score, self.calls, self.states = score, 0, []

    def __call__(self, x, t):
        self.calls += 1
        self.states.append(torch.get_rng_state())
        assert self.calls <= LIMIT, f"more than {LIMIT} evaluations"
        return self.score(x, t)


def noise(sde, n=4000, D=2):
    """The same x_T (n, D) in every test, float64."""
    generator = torch.Generator().manual_seed(1)
    return sde.prior_std * torch.randn(n, D, dtype=torch.float64, generator=generator)
