"""The three SDEs against their moment equations, and denoising score matching against Eq. 7."""

from dataclasses import replace

import ddpm_example as ddpm
import score_based_diffusion_example as sb

import numpy as np
import pytest
import torch
from exact_scores import SDES, every_sde
from scipy.integrate import solve_ivp
from torch.testing import assert_close

# Section 1


@every_sde
def test_marginals_solve_the_moment_equations(name):
    """dm/dt = f m and dV/dt = 2 f V + g^2, integrated by a solver that knows nothing of the kernel."""
    sde = SDES[name]()
    start = sde.std(torch.zeros(1).double()).item() ** 2

    def rhs(t, state):
        one, t = torch.ones(1, 1).double(), torch.tensor([t]).double()
        f, g = (part.item() for part in sde.sde(one, t))
        return [f * state[0], 2 * f * state[1] + g**2]

    ts = np.linspace(0, 1, 9)
    found = solve_ivp(rhs, (0, 1), [1.0, start], t_eval=ts, rtol=1e-8, atol=1e-11)
    t = torch.from_numpy(ts)
    mean, std = sde.marginal(torch.ones(9, 1).double(), t)
    assert_close(mean[:, 0], torch.from_numpy(found.y[0]), rtol=1e-5, atol=1e-8)
    assert_close(std[:, 0] ** 2, torch.from_numpy(found.y[1]), rtol=1e-5, atol=1e-8)


@every_sde
def test_transition_composes_to_the_marginal(name):
    sde = SDES[name]()
    a, variance = sde.transition(0.2, 0.6)
    m, std = (f(torch.tensor([0.2, 0.6]).double()) for f in (sde.m, sde.std))
    assert a == pytest.approx((m[1] / m[0]).item())
    assert variance + a**2 * std[0].item() ** 2 == pytest.approx(std[1].item() ** 2)
    f, g = sde.sde(torch.ones(1, 1).double(), torch.tensor([0.4]).double())
    a, variance = sde.transition(0.4 - 1e-5, 0.4 + 1e-5)
    assert (a - 1) / 2e-5 == pytest.approx(f.item(), rel=1e-3, abs=1e-6)
    assert variance / 2e-5 == pytest.approx(g.item() ** 2, rel=1e-3)


def test_the_paper_s_sdes():
    """App. C: the constants, the priors and the ends; sub-VP has the variance of VP, squared."""
    z, t = torch.randn(5, 3, 2, 2), torch.linspace(0, 1, 101).double()
    for sde, std, eps in ((sb.VESDE(), 50.0, 1e-5), (sb.VPSDE(), 1.0, 1e-3), (sb.SubVPSDE(), 1.0, 1e-3)):
        assert (sde.eps, sde.eps_train, sde.T) == (eps, 1e-5, 1.0)
        expected = torch.distributions.Normal(0, std).log_prob(z).flatten(1).sum(1)
        assert_close(sde.prior_logp(z), expected)
        assert sde.prior_sampling((4000, 3)).std().item() == pytest.approx(std, rel=0.05)
        assert sde.std(torch.ones(1)).item() == pytest.approx(std, rel=1e-3)
    assert_close(sb.VESDE().std(t[[0, 50]]), torch.tensor([0.01, 0.5**0.5]).double())
    assert_close(sb.VPSDE().beta(t), 0.1 + 19.9 * t)
    assert_close(sb.SubVPSDE().std(t), sb.VPSDE().std(t) ** 2)


def test_the_sde_is_the_one_that_the_config_describes():
    cfg = sb.Config(beta="cosine", beta_min=0.3, beta_max=7.0, sigma_min=0.2, sigma_max=30.0)
    for name, wanted in (("ve", sb.VESDE(0.2, 30.0)), ("vp", sb.VPSDE(0.3, 7.0, "cosine")),
                         ("subvp", sb.SubVPSDE(0.3, 7.0, "cosine"))):
        made = sb.make_sde(replace(cfg, sde=name))
        assert type(made) is type(wanted) and vars(made) == vars(wanted)


@pytest.mark.parametrize("name", ["vp", "vp_cosine", "subvp", "subvp_cosine"])
def test_std_keeps_its_digits_near_zero_in_float32(name):
    """float32 1 - exp(-B) is 5 % off at t = 1e-5."""
    sde, t = SDES[name](), torch.tensor([1e-5, 1e-4, 1e-3])
    assert_close(sde.std(t).double(), sde.std(t.double()), rtol=1e-4, atol=0)
    assert_close(sde.sde(t[:, None], t)[1].double(), sde.sde(t[:, None].double(), t.double())[1], rtol=1e-4, atol=0)


def test_cosine_beta_is_that_of_the_cosine_schedule_and_finite():
    sde = sb.VPSDE(kind="cosine")
    T = 4000
    t = torch.arange(1, T + 1).double() / T
    early = t < 0.9
    assert_close(sde.m(t)[early] ** 2, ddpm.make_schedule("cosine", T).alpha_bars[1:][early].double(),
                 rtol=1e-3, atol=1e-5)
    assert sde.beta(torch.ones(1)).item() <= sde.cap * 1.01 and torch.isfinite(sde.beta(t)).all()
    assert sde.m(torch.ones(1)).item() < 0.02


def test_discrete_betas_of_ddpm():
    """beta(t_i) / N at t_i = (i - 1) / (N - 1) are DDPM's betas; their product tends to exp(-B)."""
    sde, N = sb.VPSDE(), 1000
    t = torch.arange(N).double() / (N - 1)
    assert_close(sde.beta(t) / N, ddpm.make_schedule("linear", N).betas[1:].double(), rtol=1e-5, atol=0)
    errors = []
    for N in (1000, 10000):
        t = torch.arange(N).double() / (N - 1)
        alpha_bar = torch.cumprod(1 - sde.beta(t) / N, 0)[N // 2 - 1]
        errors.append(abs(alpha_bar / torch.exp(-sde.B(torch.tensor(0.5).double())) - 1).item())
    assert errors[0] < 0.02 and errors[0] / errors[1] == pytest.approx(10, rel=0.1)


# Section 2, and the score of a network


@every_sde
def test_loss_is_eps_mse_and_likelihood_weighting_is_g_squared(name):
    sde, x0 = SDES[name](), torch.randn(6, 2).double()
    t, eps = torch.linspace(0.05, 1, 6).double(), torch.randn(6, 2).double()
    density, (mean, std) = torch.linspace(0.5, 3, 6).double(), sde.marginal(x0, t)

    def network(x, c):
        return torch.tanh(x) * 0.3

    score = sb.score_fn(network, sde)(mean + std * eps, t)
    target = -eps / std  # the score of the kernel
    c_out = sde.scaling(t, 0.5)[2][:, None]  # of the network's output: VE's is undone
    simple = std**2 * (score - target) ** 2 / c_out**2
    weighted = sde.sde(x0, t)[1] ** 2 * (score - target) ** 2
    for weighting, terms in (("simple", simple), ("logit_normal", simple), ("likelihood", weighted)):
        assert_close(sb.score_loss(network, sde, x0, t, eps, weighting), terms.mean())
        assert_close(sb.score_loss(network, sde, x0, t, eps, weighting, density), (terms / density[:, None]).mean())


@every_sde
def test_the_network_is_trained_alike_at_every_t(name):
    """An error of the network's output weighs the same at every noise, that of VE's largest too."""
    sde, x0, eps = SDES[name](), 0.5 * torch.randn(2000, 2).double(), torch.randn(2000, 2).double()
    grow = []
    for at in (0.02, 0.5, 1.0):
        t = torch.full((2000,), at).double()
        up, down, none = (sb.score_loss(lambda x, c, b=b: torch.full_like(x, b), sde, x0, t, eps).item()
                          for b in (1.0, -1.0, 0.0))
        grow.append((up + down) / 2 - none)
    assert grow == pytest.approx([1.0] * 3, rel=1e-6)


@every_sde
def test_likelihood_weighting_draws_its_weight(name):
    """arXiv 2101.09258: t has the density of g^2 / std^2, and the loss its mean at uniform t."""
    sde = SDES[name]()
    t, density = sb.draw_times(sde, 40_000, "likelihood")
    assert t.dtype == density.dtype == torch.float32
    assert sde.eps_train * 0.99 <= t.min() and t.max() <= sde.T
    grid = torch.logspace(-5, 0, 20_001, dtype=torch.float64)
    weight = (sde.sde(grid, grid)[1] / sde.std(grid)) ** 2
    area = torch.cumulative_trapezoid(weight, grid)
    fractions = torch.linspace(0.1, 0.9, 9).double()
    expected = grid[1:][torch.searchsorted(area, fractions * area[-1])]
    found = torch.stack([(t <= e).double().mean() for e in expected])
    assert_close(found, fractions, rtol=0, atol=0.015)
    assert (1 / density).mean().item() == pytest.approx(1, rel=0.03)  # relative to uniform t
    if name != "ve":  # where eps_hat = 0 and the squared error is eps^2
        drawn = torch.stack([
            sb.score_loss(lambda x, c: x * 0, sde, torch.zeros(500, 2), t[i:i + 500], torch.randn(500, 2),
                          "likelihood", density[i:i + 500]) for i in range(0, 10_000, 500)])
        assert drawn.mean().item() == pytest.approx(area[-1].item(), rel=0.03)
        assert drawn.std() < 0.1 * drawn.mean()  # at uniform t it is as large as the mean


def test_times_cover_the_whole_range_uniformly_or_by_equal_quantiles_of_a_logit_normal():
    """But for one in sixteen, which is uniform."""
    sde, normal = sb.VESDE(), torch.distributions.Normal(-0.2, 1)
    t = torch.stack([sb.draw_times(sde, 64, "logit_normal")[0] for _ in range(1000)])
    assert t.dtype == torch.float32 and sde.eps_train <= t.min() < 1e-3 and 0.999 < t.max() <= sde.T
    for fraction in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        below = (t <= fraction).double().mean(1)
        wanted = (fraction + 15 * normal.cdf(torch.logit(torch.tensor(fraction))).item()) / 16
        assert below.mean() == pytest.approx(wanted, abs=0.006)
    assert (t <= 0.5).double().mean(1).std() < 0.03  # of independent draws 0.062
    for weighting in ("simple", "logit_normal"):
        assert sb.draw_times(sde, 64, weighting)[1].tolist() == [1.0] * 64
    t, _ = sb.draw_times(sde, 20_000)
    assert 1e-5 <= t.min() < 2e-3 and 0.998 < t.max() <= 1 and abs(t.mean() - 0.5) < 0.01


class Network:
    """It has one answer everywhere, knows the size of its data and keeps what it was asked."""

    def __init__(self, answer, sigma_data=0.5):
        self.answer, self.sigma_data = answer, torch.tensor(sigma_data)

    def __call__(self, x, t):
        self.x, self.t = x, t
        return torch.full_like(x, self.answer)


@pytest.mark.parametrize("name", ["vp", "subvp"])
def test_vp_asks_the_network_for_eps_and_divides_by_std_or_the_least_one(name):
    sde, network, x, t = SDES[name](), Network(0.7, 0.2), torch.randn(3, 1, 2, 2), torch.tensor([0.1, 0.5, 1.0])
    found = sb.score_fn(network, sde)(x, t)
    assert_close(found, -0.7 / sde.std(t).view(-1, 1, 1, 1).expand_as(x))
    assert_close(network.t, 999 * t)
    assert_close(network.x, x)
    x, t = torch.zeros(2, 2), torch.full((2,), 1e-5)
    assert_close(sb.score_fn(Network(1.0), sde, std_floor=0.1)(x, t), torch.full((2, 2), -10.0))
    assert_close(sb.score_fn(Network(1.0), sde, std_floor=0.0)(x, t), -1 / sde.std(t)[:, None].expand(2, 2))


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_ve_corrects_the_score_of_data_as_large_as_the_network_s(sigma_data):
    """Zeros give the score of N(0, sigma_data^2) data, any other answer moves x0_hat by at most sigma_data."""
    sde, x, t = sb.VESDE(), torch.randn(3, 1, 2, 2), torch.tensor([0.1, 0.5, 1.0])
    network, sigma = Network(0.0, sigma_data), (0.01 * 5000**t).view(-1, 1, 1, 1)
    size = (sigma**2 + sigma_data**2).sqrt()
    silent = sb.score_fn(network, sde)(x, t)
    assert_close(silent, -x / size**2)
    assert_close(network.x, x / size)
    assert_close(network.t, sigma.flatten().log())
    found = sb.score_fn(Network(1.0, sigma_data), sde)(x, t)
    assert_close(sigma**2 * (found - silent), (-sigma_data * sigma / size).expand_as(x), rtol=1e-3, atol=1e-4)
    if sigma_data == 0.5:  # that of a plain function in place of a network
        assert_close(sb.score_fn(lambda x, t: 0 * x, sde)(x, t), silent, rtol=0, atol=0)


@every_sde
def test_clamp_acts_on_x0_hat_never_on_x(name, monkeypatch):
    monkeypatch.setattr(sb, "network_eps", lambda model, sde, x, t: model * x)  # eps_hat = model x_t
    sde, x, t = SDES[name](), 100 * torch.randn(8, 1, 2, 2).double(), torch.full((8,), 0.7).double()
    score = sb.score_fn(0.0, sde, clip_x0=True)(x, t)
    m, std = sde.m(t).view(-1, 1, 1, 1), sde.std(t).view(-1, 1, 1, 1)
    assert_close(x + std**2 * score, m * (x / m).clamp(-1, 1))
    clamped, free = (sb.score_fn(1e-4, sde, clip_x0=clip_x0)(1e-5 * x, t) for clip_x0 in (True, False))
    assert_close(clamped, free, rtol=1e-4, atol=1e-6)
