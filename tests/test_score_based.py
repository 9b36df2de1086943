"""The score-based script against closed forms: Gaussians and mixtures under every SDE and sampler."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import only_run, open_picture, run_script
from scipy.integrate import solve_ivp as reference_solve_ivp
from torch.testing import assert_close

import ddpm_example as ddpm
import score_based_diffusion_example as sb

SDES = {
    "ve": sb.VESDE, "vp": sb.VPSDE, "vp_cosine": lambda: sb.VPSDE(kind="cosine"),
    "subvp": sb.SubVPSDE, "subvp_cosine": lambda: sb.SubVPSDE(kind="cosine")}
every_sde = pytest.mark.parametrize("name", SDES)


class Mixture:
    """Isotropic Gaussians of given weights, means and stds: its exact score and density at any t."""

    def __init__(self, sde, weights=(0.5, 0.3, 0.2), means=((-1.2, 0.0), (1.0, 0.9), (0.9, -1.1)),
                 stds=(0.15, 0.25, 0.2)):
        self.sde = sde
        self.w, self.mu, self.s = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, stds))
        self.calls = []

    def terms(self, x, t):
        m, std = self.sde.m(t).view(-1, 1), self.sde.std(t).view(-1, 1)
        variance = m**2 * self.s**2 + std**2  # (B, K)
        gap = x[:, None].flatten(2) - m[..., None] * self.mu  # (B, K, D)
        D = gap.shape[2]
        log_p = self.w.log() - 0.5 * (gap**2).sum(2) / variance - 0.5 * D * (
            2 * math.pi * variance).log()
        return gap, variance, log_p

    def logp(self, x, t):
        return self.terms(x, torch.full((len(x),), t, dtype=x.dtype))[2].logsumexp(1)

    def __call__(self, x, t):
        assert t.shape == (len(x),) and t.dtype == x.dtype
        self.calls.append(t[0].item())
        gap, variance, log_p = self.terms(x, t)
        return -(log_p.softmax(1)[..., None] * gap / variance[..., None]).sum(1).view_as(x)

    def moments(self):
        mean = self.w @ self.mu
        gap = self.mu - mean
        D = len(mean)
        spread = gap[:, :, None] * gap[:, None] + (self.s**2)[:, None, None] * torch.eye(D).double()
        return mean, (self.w[:, None, None] * spread).sum(0)


def gaussian(sde, mean=(0.4, -0.3), std=0.5):
    return Mixture(sde, (1.0,), (mean,), (std,))


def flow_of_gaussian(sde, data, x, t, s):
    """Where the probability-flow ODE of one Gaussian takes x from time t to s, in closed form."""
    t, s = torch.tensor(t).double(), torch.tensor(s).double()
    size = [(sde.m(u) ** 2 * data.s**2 + sde.std(u) ** 2).sqrt() for u in (t, s)]
    return sde.m(s) * data.mu + (x - sde.m(t) * data.mu) * size[1] / size[0]


def noise(sde, n=4000, D=2):
    generator = torch.Generator().manual_seed(1)
    return sde.prior_std * torch.randn(n, D, dtype=torch.float64, generator=generator)


# the SDEs


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
    found = reference_solve_ivp(rhs, (0, 1), [1.0, start], t_eval=ts, rtol=1e-9, atol=1e-12,
                                max_step=0.01)
    t = torch.from_numpy(ts)
    mean, std = sde.marginal(torch.ones(9, 1).double(), t)
    assert_close(mean[:, 0], torch.from_numpy(found.y[0]), rtol=1e-5, atol=1e-8)
    assert_close(std[:, 0] ** 2, torch.from_numpy(found.y[1]), rtol=1e-5, atol=1e-8)


@every_sde
def test_marginals_by_simulation(name):
    sde, n, steps = SDES[name](), 10000, 1000
    x = torch.full((n, 1), 0.7).double()
    ts = torch.linspace(0, 1, steps + 1).double()
    for t, s in zip(ts[:-1], ts[1:], strict=True):
        drift, g = sde.sde(x, ((t + s) / 2).expand(n))
        x = x + drift * (s - t) + g * (s - t).sqrt() * torch.randn_like(x)
        if s in (ts[steps // 2], ts[-1]):
            mean, std = sde.marginal(torch.full((1, 1), 0.7).double(), s.view(1))
            assert abs(x.mean() - mean) < 5 * std / n**0.5 + 0.005
            assert abs(x.std() / std - 1).item() < 0.03


@every_sde
def test_transition_composes_to_the_marginal(name):
    sde = SDES[name]()
    a, variance = sb.transition(sde, 0.2, 0.6)
    m, std = (f(torch.tensor([0.2, 0.6]).double()) for f in (sde.m, sde.std))
    assert a == pytest.approx((m[1] / m[0]).item())
    assert variance + a**2 * std[0].item() ** 2 == pytest.approx(std[1].item() ** 2)
    f, g = sde.sde(torch.ones(1, 1).double(), torch.tensor([0.4]).double())
    a, variance = sb.transition(sde, 0.4 - 1e-5, 0.4 + 1e-5)
    assert (a - 1) / 2e-5 == pytest.approx(f.item(), rel=1e-3, abs=1e-6)
    assert variance / 2e-5 == pytest.approx(g.item() ** 2, rel=1e-3)


def test_sub_vp_variance_is_at_most_vp():
    t = torch.linspace(0, 1, 1001).double()
    vp, sub = sb.VPSDE().std(t) ** 2, sb.SubVPSDE().std(t) ** 2
    assert (sub <= vp).all() and sub[0] == vp[0] == 0 and vp[-1] - sub[-1] < 1e-4
    assert (vp - sub).max() > 0.2


def test_priors():
    z = torch.randn(5, 3, 2, 2)
    for sde, std in ((sb.VESDE(), 50.0), (sb.VPSDE(), 1.0), (sb.SubVPSDE(), 1.0)):
        expected = torch.distributions.Normal(0, std).log_prob(z).flatten(1).sum(1)
        assert_close(sde.prior_logp(z), expected)
        assert sde.prior_sampling((4000, 3)).std().item() == pytest.approx(std, rel=0.05)
        assert sde.std(torch.ones(1)).item() == pytest.approx(std, rel=1e-3)


def test_paper_constants():
    assert (sb.VESDE().sigma_min, sb.VESDE().sigma_max, sb.VESDE().eps) == (0.01, 50.0, 1e-5)
    for kind in (sb.VPSDE, sb.SubVPSDE):
        assert (kind().beta_min, kind().beta_max, kind().eps, kind().T) == (0.1, 20.0, 1e-3, 1.0)
    assert sb.VPSDE().eps_train == sb.VESDE().eps_train == 1e-5


@pytest.mark.parametrize("name", ["vp", "vp_cosine", "subvp", "subvp_cosine"])
def test_std_keeps_its_digits_near_zero_in_float32(name):
    """float32 1 - exp(-B) is 5 % off at t = 1e-5."""
    sde, t = SDES[name](), torch.tensor([1e-5, 1e-4, 1e-3])
    assert_close(sde.std(t).double(), sde.std(t.double()), rtol=1e-4, atol=0)
    assert_close(sde.sde(t[:, None], t)[1].double(), sde.sde(t[:, None].double(), t.double())[1],
                 rtol=1e-4, atol=0)


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


# training


@every_sde
def test_loss_is_eps_mse_and_likelihood_weighting_is_g_squared(name):
    sde, x0 = SDES[name](), torch.randn(6, 2).double()
    t, eps = torch.linspace(0.05, 1, 6).double(), torch.randn(6, 2).double()
    network = lambda x, c: torch.tanh(x) * 0.3  # noqa: E731
    mean, std = sde.marginal(x0, t)
    score = sb.score_fn(network, sde)(mean + std * eps, t)
    target = -eps / std  # the score of the kernel
    simple = (std**2 * (score - target) ** 2).mean()
    assert_close(sb.score_loss(network, sde, x0, t=t, eps=eps), simple)
    g = sde.sde(x0, t)[1]
    weighted = (g**2 * (score - target) ** 2).mean()
    assert_close(sb.score_loss(network, sde, x0, weighting="likelihood", t=t, eps=eps), weighted)


def test_loss_draws_t_over_the_whole_range():
    seen = []

    def network(x, c):
        seen.append(c / 999)
        return x

    for _ in range(50):
        sb.score_loss(network, sb.VPSDE(), torch.zeros(400, 2))
    t = torch.cat(seen)
    assert 1e-5 <= t.min() < 2e-3 and 0.998 < t.max() <= 1 and abs(t.mean() - 0.5) < 0.01


def test_time_and_input_of_the_network():
    got = {}

    def network(x, c):
        got.update(x=x, c=c)
        return x

    x, t = torch.randn(3, 2), torch.tensor([0.1, 0.5, 1.0])
    for sde in (sb.VPSDE(), sb.SubVPSDE()):
        sb.predict_eps(network, sde, x, t, 0.5)
        assert_close(got["c"], 999 * t)
        assert_close(got["x"], x)
    sde = sb.VESDE()
    sb.predict_eps(network, sde, x, t, 0.5)
    sigma = 0.01 * 5000**t
    assert_close(got["c"], sigma.log())
    size, sigma = (sigma**2 + 0.25).sqrt()[:, None], sigma[:, None]
    assert_close(got["x"], x / size)
    # a network of zeros gives the score of Gaussian data, any other moves x0_hat by bounded amounts
    silent = sb.score_fn(lambda x, c: 0 * x, sde, 0.5)(x, t)
    assert_close(silent, -x / size**2)
    x0_hat = x + sigma**2 * sb.score_fn(lambda x, c: torch.ones_like(x), sde, 0.5)(x, t)
    assert_close(x0_hat - (x + sigma**2 * silent), (-0.5 * sigma / size).expand_as(x), rtol=1e-3,
                 atol=1e-4)


@every_sde
def test_clamp_acts_on_x0_hat_never_on_x(name, monkeypatch):
    monkeypatch.setattr(sb, "predict_eps", lambda model, sde, x, t, sigma_data: model(x, t))
    sde, x = SDES[name](), 100 * torch.randn(8, 1, 2, 2).double()
    t = torch.full((8,), 0.7).double()
    network = lambda x, c: torch.zeros_like(x)  # noqa: E731
    score = sb.score_fn(network, sde, clip_x0=True)(x, t)
    m, std = sde.m(t).view(-1, 1, 1, 1), sde.std(t).view(-1, 1, 1, 1)
    assert_close(x + std**2 * score, m * (x / m).clamp(-1, 1))
    small = 1e-3 * x / 100
    assert_close(sb.score_fn(lambda x, c: 1e-4 * x, sde, clip_x0=True)(small, t),
                 sb.score_fn(lambda x, c: 1e-4 * x, sde)(small, t), rtol=1e-4, atol=1e-6)


def test_std_floor():
    sde, t = sb.SubVPSDE(), torch.full((2,), 1e-5)
    one = lambda x, c: torch.ones_like(x)  # noqa: E731
    assert_close(sb.score_fn(one, sde, std_floor=1e-2)(torch.zeros(2, 2), t), torch.full((2, 2), -100.0))
    free = sb.score_fn(one, sde, std_floor=0.0)(torch.zeros(2, 2), t)
    assert_close(free, -1 / sde.std(t)[:, None].expand(2, 2))


# samplers


SAMPLERS = {
    "em": lambda score, sde, x: sb.euler_maruyama(score, sde, x.shape, 500, xT=x),
    "reverse": lambda score, sde, x: sb.reverse_diffusion(score, sde, x.shape, 300, xT=x),
    "ancestral": lambda score, sde, x: sb.ancestral_sampling(score, sde, x.shape, 300, xT=x),
    "pc": lambda score, sde, x: sb.predictor_corrector(score, sde, x.shape, 150, snr=0.1, xT=x),
    "rk45": lambda score, sde, x: sb.probability_flow_ode(score, sde, x.shape, tolerance=1e-4, xT=x),
    "rk4": lambda score, sde, x: sb.probability_flow_ode(score, sde, x.shape, "rk4", 100, xT=x),
}


@every_sde
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_with_every_sde(name, sampler):
    """Mean, covariance and mode weights of a mixture."""
    sde = SDES[name]()
    data = Mixture(sde)
    if sampler == "ancestral" and name.startswith("subvp"):
        with pytest.raises(ValueError, match="VESDE and VPSDE"):
            SAMPLERS[sampler](data, sde, noise(sde))
        return
    x = SAMPLERS[sampler](data, sde, noise(sde))
    mean, cov = data.moments()
    assert_close(x.mean(0), mean, rtol=0, atol=0.07)
    assert_close(torch.cov(x.T), cov, rtol=0, atol=0.09)
    nearest = torch.cdist(x, data.mu).argmin(1)
    assert_close(torch.bincount(nearest, minlength=3) / len(x), data.w.float(), rtol=0, atol=0.035)
    for k in range(3):
        within = x[nearest == k]
        assert within.std(0).mean().item() == pytest.approx(data.s[k].item(), rel=0.12)


@every_sde
def test_sde_and_ode_share_marginals_along_the_way(name):
    """At t = 0.5 the variance of the ODE's and of the reverse SDE's states is that of p_t."""
    sde = SDES[name]()
    data, x = gaussian(sde), noise(sde, 5000)
    kept = {}
    sb.reverse_diffusion(data, sde, x.shape, 600, xT=x,
                         watch=lambda t, x: kept.setdefault(round(t, 3), x))
    t = min(kept, key=lambda t: abs(t - 0.5))
    along = sb.rk4_flow(data, sde, x, 1.0, t, 100)
    expected = (sde.m(torch.tensor(t).double()) ** 2 * 0.25 + sde.std(torch.tensor(t).double()) ** 2).sqrt()
    for states in (kept[t], along):
        assert (states.std(0) / expected).tolist() == pytest.approx([1, 1], rel=0.035)


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_rk4_is_of_fourth_order(name):
    sde = SDES[name]()
    data, x = gaussian(sde, std=0.8), noise(sde, 16)
    errors = []
    for steps in (40, 80):
        found = sb.probability_flow_ode(data, sde, x.shape, "rk4", steps, denoise=False, xT=x)
        errors.append((found - flow_of_gaussian(sde, data, x, 1.0, sde.eps)).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.35), errors


@every_sde
def test_rk45_follows_the_exact_flow(name):
    sde = SDES[name]()
    data, x = gaussian(sde), noise(sde, 16)
    found = sb.probability_flow_ode(data, sde, x.shape, tolerance=1e-8, denoise=False, xT=x)
    assert_close(found, flow_of_gaussian(sde, data, x, 1.0, sde.eps), rtol=0, atol=1e-5)


@every_sde
@pytest.mark.parametrize("method", ["rk45", "rk4"])
def test_encode_then_decode_returns_the_input(name, method):
    sde = SDES[name]()
    data = Mixture(sde)
    x = data.mu + 0.1
    how = {"method": method, "tolerance": 1e-7, "steps": 400}
    z = sb.ode_encode(data, sde, x, **how)
    assert (z - x).norm() > 0.5
    assert_close(sb.ode_decode(data, sde, z, **how), x, rtol=0, atol=2e-3)


def test_em_steps_are_differences_of_the_grid():
    """Zero score, zero data: EM from T to eps of a VE SDE adds g^2 dt, reverse diffusion sigma^2."""
    sde, steps = sb.VESDE(0.1, 10.0), 100
    zero, x = (lambda x, t: torch.zeros_like(x)), torch.zeros(20000, 1).double()
    total = 10.0**2 - sde.std(torch.tensor(sde.eps).double()).item() ** 2
    exact = sb.reverse_diffusion(zero, sde, x.shape, steps, denoise=False, xT=x).var().item()
    assert exact == pytest.approx(total, rel=0.04)
    euler = sb.euler_maruyama(zero, sde, x.shape, steps, denoise=False, xT=x).var().item()
    ts = np.linspace(1, sde.eps, steps + 1)[:-1]
    g2dt = (0.1**2 * 100 ** (2 * ts) * 2 * math.log(100) * (1 - sde.eps) / steps).sum()
    assert euler == pytest.approx(g2dt, rel=0.04) and g2dt > 1.03 * total


def test_ancestral_is_ddpm_with_sigma_beta():
    """Eq. 4 draw for draw: the VP step with beta = the step's 1 - alpha is p_sample's."""
    sde, t, s = sb.VPSDE(), 0.6, 0.55
    data, x = gaussian(sde), noise(sde, 8)
    a, beta = sb.transition(sde, s, t)
    torch.manual_seed(3)
    found = sb.ancestral_step(data, sde, x, t, s)
    torch.manual_seed(3)
    tt = torch.full((8,), t).double()
    alpha_bar = sde.m(tt[:1]) ** 2
    eps_hat = -data(x, tt) * (1 - alpha_bar).sqrt()
    mean = (x - beta / (1 - alpha_bar).sqrt() * eps_hat) / math.sqrt(1 - beta)  # DDPM Alg. 2, line 4
    assert a == pytest.approx(math.sqrt(1 - beta))
    assert_close(found, mean + math.sqrt(beta) * torch.randn_like(x))


def test_ve_ancestral_is_the_posterior_of_smld():
    """With the exact score of a single point x_0 the step's mean and variance are q(x_s | x_t, x_0)'s."""
    sde, t, s = sb.VESDE(), 0.6, 0.5
    x0, x = 0.3, torch.full((40000, 1), 2.0).double()
    sigma_t, sigma_s = (sde.std(torch.tensor(u).double()).item() for u in (t, s))
    score = lambda x, tt: -(x - x0) / sigma_t**2  # noqa: E731
    found = sb.ancestral_step(score, sde, x, t, s)
    share = sigma_s**2 / sigma_t**2
    std = sigma_s * math.sqrt(1 - share)
    assert found.mean().item() == pytest.approx(x0 + share * (2.0 - x0), abs=5 * std / 200)
    assert found.std().item() == pytest.approx(std, rel=0.02)


def test_corrector_comes_first_and_the_end_is_noise_free():
    sde = sb.VPSDE()
    data, x = gaussian(sde), noise(sde, 4)
    sb.predictor_corrector(data, sde, x.shape, 3, corrector_steps=2, xT=x)
    ts = np.linspace(1, sde.eps, 4)
    assert data.calls == pytest.approx([*np.repeat(ts[:3], 3), ts[3]])
    for sampler in (sb.euler_maruyama, sb.reverse_diffusion, sb.ancestral_sampling,
                    sb.predictor_corrector):
        torch.manual_seed(0)
        noisy = sampler(data, sde, x.shape, 5, denoise=False, xT=x)
        torch.manual_seed(0)
        assert_close(sampler(data, sde, x.shape, 5, xT=x), sb.tweedie(data, sde, noisy, sde.eps))


@every_sde
def test_euler_maruyama_step_is_as_long_as_its_grid_says(name, monkeypatch):
    """Eq. 6 over t - s, whatever the number of steps."""
    sde, x = SDES[name](), torch.randn(4, 2).double()
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    drift, g = sde.sde(x, torch.full((4,), 0.8).double())
    for s in (0.75, 0.2):
        found = sb.em_step(lambda x, t: -3 * x, sde, x, 0.8, s)
        assert_close(found, x - (drift + 3 * g**2 * x) * (0.8 - s) + g * (0.8 - s) ** 0.5,
                     rtol=1e-5, atol=1e-6)


def test_langevin_step_size():
    """Alg. 4, 5: epsilon = 2 alpha (r |z| / |g|)^2 with norms averaged over the batch."""
    x, g = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    torch.manual_seed(4)
    found = sb.langevin_step(lambda x, t: g, x, 0.5, alpha=0.9, snr=0.2)
    torch.manual_seed(4)
    z = torch.randn_like(x)
    epsilon = 2 * 0.9 * (0.2 * z.norm(dim=1).mean() / g.norm(dim=1).mean()) ** 2
    assert_close(found, x + epsilon * g + (2 * epsilon) ** 0.5 * z)


def test_alpha_of_the_corrector_is_that_of_the_step(monkeypatch):
    """Alg. 5: alpha_i = 1 - beta_i = exp(-integral of beta over the step); Alg. 4 has none."""
    seen = []
    monkeypatch.setattr(sb, "langevin_step",
                        lambda score, x, t, alpha, snr: seen.append(float(alpha)) or x)
    x = torch.zeros(2, 2).double()
    sb.predictor_corrector(lambda x, t: -x, sb.VESDE(), x.shape, 3, xT=x)
    assert seen == [1, 1, 1]
    seen.clear()
    sde = sb.VPSDE(beta_min=0.1, beta_max=20)
    sb.predictor_corrector(lambda x, t: -x, sde, x.shape, 1000, xT=x)
    ts = torch.linspace(1, sde.eps, 1001).double()
    B = 0.1 * ts + 9.95 * ts**2
    assert_close(torch.tensor(seen).double(), (B[1:] - B[:-1]).exp(), rtol=1e-6, atol=0)
    assert seen[0] == pytest.approx(1 - 20 / 1000, abs=5e-4)


@pytest.mark.parametrize("snr", [0.5, 0.3, 0.15])
def test_corrector_bias_on_a_unit_gaussian(snr):
    """Unadjusted Langevin ends at variance 1 / (1 - epsilon / 2); with this rule's epsilon, 1 + r^2."""
    x = torch.randn(64, 1000).double()
    seen = []
    for i in range(120):
        x = sb.langevin_step(lambda x, t: -x, x, 0.5, alpha=1.0, snr=snr)
        if i >= 80:
            seen.append(x.var().item())
    variance = sum(seen) / len(seen)
    epsilon = 2 * snr**2 / variance
    assert variance == pytest.approx(1 / (1 - epsilon / 2), abs=0.01)
    assert variance - 1 == pytest.approx(snr**2, abs=0.01)


@every_sde
def test_tweedie_is_the_posterior_mean(name):
    sde = SDES[name]()
    data = gaussian(sde, mean=(0.4, -0.3), std=0.5)
    x, t = torch.randn(9, 2).double(), torch.tensor([0.4]).double()
    m, std = sde.m(t), sde.std(t)
    gain = m * 0.25 / (m**2 * 0.25 + std**2)
    assert_close(sb.tweedie(data, sde, x, 0.4), data.mu + gain * (x - m * data.mu))


def test_samplers_take_images_and_float32():
    sde = sb.VESDE()
    score = sb.score_fn(sb.UNet(1, 8, 8, (1, 2), 1, (4,), groups=4, fourier=True), sde)
    for out in (sb.euler_maruyama(score, sde, (2, 1, 8, 8), 3),
                sb.predictor_corrector(score, sde, (2, 1, 8, 8), 3),
                sb.probability_flow_ode(score, sde, (2, 1, 8, 8), tolerance=0.1)):
        assert out.shape == (2, 1, 8, 8) and out.dtype == torch.float32


# likelihood


@every_sde
def test_likelihood_with_the_exact_trace(name):
    """To 1e-3 nats at t = eps, with the exact log p_T of the mixture."""
    sde = SDES[name]()
    data = Mixture(sde)
    x = torch.tensor([[-1.2, 0.0], [1.0, 1.2], [0.0, 0.3], [0.7, -1.0]]).double()
    found = sb.log_likelihood(data, sde, x, tolerance=1e-7, eps=1e-3,
                              prior_logp=lambda z: data.logp(z, 1.0))
    assert_close(found, data.logp(x, 1e-3), rtol=0, atol=1e-3)


def test_likelihood_where_the_prior_is_exact():
    sde = sb.VPSDE()
    data = gaussian(sde, mean=(0.0, 0.0), std=1.0)
    x = torch.randn(5, 2).double()
    found = sb.log_likelihood(data, sde, x, tolerance=1e-8)
    assert_close(found, torch.distributions.Normal(0, 1).log_prob(x).sum(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(probe):
    """A correlated Gaussian, one point many times: the mean is the density within its error."""
    sde, cov = sb.VPSDE(), torch.tensor([[0.5, 0.3], [0.3, 0.4]]).double()

    def score(x, t):
        m, std = sde.m(t).view(-1, 1, 1), sde.std(t).view(-1, 1, 1)
        return -torch.linalg.solve(m**2 * cov + std**2 * torch.eye(2), x[..., None])[..., 0]

    x = torch.tensor([[0.5, -0.2]]).double().expand(2000, 2)
    found = sb.log_likelihood(score, sde, x, trace="hutchinson", probe=probe, tolerance=1e-6)
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
        results.append(sb.log_likelihood(data, sde, x, "hutchinson", "gaussian", tolerance))
    assert_close(results[0], results[1], rtol=0, atol=1e-3)


def test_bits_per_dim_of_a_gaussian_model():
    """Against the probability of each 8-bit bin under N(0.1, 0.3^2), from its distribution function."""
    sde, mean, std = sb.VPSDE(), 0.1, 0.3
    data = Mixture(sde, (1.0,), ((mean,) * 16,), (std,))
    pixels = torch.randint(60, 200, (30, 1, 4, 4)).double()
    x = pixels / 127.5 - 1
    found = sb.bits_per_dim(data, sde, x, tolerance=1e-5)
    cdf = torch.distributions.Normal(mean, std).cdf
    mass = cdf((pixels + 1) / 128 - 1) - cdf(pixels / 128 - 1)
    assert found.mean().item() == pytest.approx(-mass.log2().mean().item(), abs=0.02)


def test_dequantize_fills_the_bins():
    x = torch.tensor([0.0, 17.0, 255.0]).expand(5000, 3) / 127.5 - 1
    bins = (sb.dequantize(x) + 1) * 128
    assert_close(bins.floor(), torch.tensor([0.0, 17.0, 255.0]).expand(5000, 3))
    assert_close((bins - bins.floor()).mean(0), torch.full((3,), 0.5), rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="8-bit"):
        sb.bits_per_dim(None, sb.VPSDE(), torch.rand(2, 1, 4, 4))


# networks


def test_parameters_of_the_paper_preset():
    """configs/vp/cifar10_ddpmpp_continuous.py of the authors' score_sde_pytorch builds 61,804,419."""
    with torch.device("meta"):
        model = sb.make_network(sb.PRESETS["paper"], (3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == 61_804_419


def test_parameters_of_ncsnpp():
    """configs/ve/cifar10_ncsnpp_continuous.py builds 62,758,787: Fourier features, residual input."""
    with torch.device("meta"):
        model = sb.UNet(fourier=True, fir=True, skip_rescale=True, biggan=True,
                        progressive_input=True)
    assert sum(p.numel() for p in model.parameters()) == 62_758_787


def test_progressive_input_reaches_the_output():
    torch.manual_seed(0)
    model = sb.UNet(1, 8, 8, (1, 2), 1, (4,), groups=4, progressive_input=True).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([10.0, 500.0])
    with torch.no_grad():
        before = model(x, t)
        torch.nn.init.zeros_(model.pyramid[0].weight)
        assert (model(x, t) - before).abs().max() > 1e-2


OPTIONS = ({}, {"fir": True}, {"skip_rescale": True}, {"biggan": True}, {"progressive_input": True},
           {"fourier": True}, {"fir": True, "biggan": True, "skip_rescale": True,
                               "progressive_input": True, "fourier": True})


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "none")
@pytest.mark.parametrize("patch", [1, 2])
def test_unet_learns_with_every_option(options, patch):
    """Zero at first; after a few steps every weight has moved and the answer depends on t."""
    torch.manual_seed(0)
    model = sb.UNet(1, 8, 8, (1, 2), 1, (4,), groups=4, dropout=0.0, patch=patch, **options)
    before = [p.clone() for p in model.parameters()]
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([3.0, 0.5, -2.0, 1.0])
    assert model(x, t).abs().max() == 0
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(6):
        optimizer.zero_grad()
        (model(x, t) - x).pow(2).mean().backward()
        optimizer.step()
    still = [n for (n, p), b in zip(model.named_parameters(), before, strict=True) if torch.equal(p, b)]
    assert not still
    assert (model(x, t) - model(x, t + 1)).abs().max() > 1e-4


def test_skip_rescale_keeps_the_variance():
    """Each residual sum is divided by sqrt(2): with zero branches the signal shrinks by it each time."""
    x, t = torch.randn(2, 1, 8, 8), torch.ones(2)
    plain, scaled = (sb.UNet(1, 8, 8, (1,), 1, (), groups=4, skip_rescale=s) for s in (False, True))
    scaled.load_state_dict(plain.state_dict())
    h = plain.conv_in(x)
    emb = torch.zeros(2, 32)
    assert_close(scaled._stage(scaled.down[0], h, emb), plain._stage(plain.down[0], h, emb) / 2**0.5)
    assert_close(scaled._stage(scaled.mid[0], h, emb), plain._stage(plain.mid[0], h, emb) / 2)
    assert scaled(x, t).shape == x.shape


def test_fir_resampling():
    """Constants pass, the finest checkerboard is removed, ramps stay ramps, and both are adjoint."""
    ramp = torch.arange(16.0).view(1, 1, 1, 16).expand(1, 1, 16, 16).contiguous()
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    stripes = (torch.arange(16) % 2 * 2.0 - 1).expand(16, 16)
    for x in (board, stripes):
        assert sb.shrink(x.view(1, 1, 16, 16), fir=True)[..., 1:-1, 1:-1].abs().max() < 1e-6
    assert_close(sb.shrink(torch.ones(1, 2, 16, 16), fir=True)[..., 1:-1, 1:-1], torch.ones(1, 2, 6, 6))
    assert_close(sb.shrink(ramp, fir=True)[0, 0, 4, 1:-1], 2 * torch.arange(1.0, 7.0) + 0.5)
    up = sb.grow(ramp, fir=True)[0, 0, 10, 2:-2]
    assert_close(up, torch.arange(2.0, 30.0) / 2 - 0.25)
    a, b = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 16, 16)
    assert_close((sb.grow(a, fir=True) * b).sum(), 4 * (a * sb.shrink(b, fir=True)).sum(),
                 rtol=1e-4, atol=1e-4)
    layer = sb.FirDownsample(3)
    assert layer(b).shape == (1, 3, 8, 8) and sb.FirUpsample(3, 2)(a).shape == (1, 2, 16, 16)


def test_fourier_features_are_fixed_and_bounded():
    features = sb.FourierFeatures(2000)
    assert not list(features.parameters()) and "W" in features.state_dict()
    assert features.W.std().item() == pytest.approx(16, rel=0.05)
    out = features(torch.tensor([0.3]))
    assert_close(out[0, :2000] ** 2 + out[0, 2000:] ** 2, torch.ones(2000))


def test_mlp_fits_a_line():
    torch.manual_seed(0)
    model = sb.ScoreMLP(2, 32, 2)
    x, t = torch.randn(256, 2), 999 * torch.rand(256)
    assert model(x, t).abs().max() == 0
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(x, t) - x * (t / 999)[:, None]).pow(2).mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.02


# the script


BAD = [
    (["--sigma_min", "50"], "--sigma_min 50.0: must be below --sigma_max 50.0"),
    (["--beta_min", "30"], "--beta_min 30.0: must be below"),
    (["--steps", "0"], "--steps 0"), (["--N", "0"], "--N 0: must be >= 1"),
    (["--snr", "0"], "--snr 0.0: must be > 0"), (["--sde", "vpx"], "--sde vpx: must be one of"),
    (["--sampler", "heun"], "--sampler heun"), (["--beta", "sigmoid"], "--beta sigmoid"),
    (["--sde", "subvp", "--sampler", "ancestral"], "--sampler ancestral: must be one of em"),
    (["--dataset", "swiss_roll", "--model", "unet"], "--model unet: must be auto or mlp"),
    (["--model", "mlp"], "--model mlp: must be auto or unet"),
    (["--dataset", "color_digits", "--likelihood", "5"], "--likelihood 5: --dataset color_digits"),
    (["--dataset", "digits8", "--likelihood", "5"], "--likelihood 5: --dataset digits8"),
    (["--image_size", "30"], "--image_size 30: must be a multiple of 4"),
    (["--dataset", "swiss_roll", "--evaluate"], "--evaluate 500: --dataset swiss_roll has no labels"),
    (["--dataset", "swissroll"], "--dataset swissroll: must be one of"),
    (["--temperature", "-1"], "--temperature -1.0"), (["--std_floor", "-1"], "--std_floor -1.0"),
]


@pytest.mark.parametrize("argv, message", BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input_ends_with_one_line(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sb.main(["--preset", "smoke", "--out", str(tmp_path / "out"), *argv])
    captured = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(captured) == 1
    assert captured[0].startswith("error: ") and message in captured[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sde", ["vp", "ve", "subvp"])
def test_smoke_run_on_images(sde, tmp_path):
    result = run_script("score_based_diffusion_example.py", "--preset", "smoke", "--sde", sde,
                        "--out", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    run = only_run(tmp_path / "out", "score_based")
    pictures = ["sdes.png", "loss.png", "preview.png", "samples.png", "samplers.png",
                "guardrails.png", "codes.png", "denoising.gif"]
    for name in pictures:
        open_picture(run / name)
    found = json.loads((run / "metrics.json").read_text())
    assert found["bits_per_dim"]["n"] == 2 and math.isfinite(found["bits_per_dim"]["mean"])
    assert set(found["samplers"]) == set(sb.samplers_of(sb.make_sde(sb.Config(sde=sde))))
    if sde != "ve":
        return
    # sampling takes the SDE and its constants from the checkpoint and from nowhere else
    again = run_script("score_based_diffusion_example.py", "--sample", run, "--sampler", "em",
                       "--out", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    other = run_script("score_based_diffusion_example.py", "--sample", run, "--sigma_max", "5",
                       "--out", "no", cwd=tmp_path)
    assert other.returncode == 2 and "--sigma_max 5.0" in other.stderr
    assert other.stderr.strip().count("\n") == 0 and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_smoke_run_on_points(tmp_path):
    for name in ("swiss_roll", "two_moons", "gaussians"):
        result = run_script("score_based_diffusion_example.py", "--preset", "smoke", "--dataset", name,
                            "--out", name, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-2000:]
        run = only_run(tmp_path / name, "score_based")
        for picture in ("sdes.png", "loss.png", "samples.png", "scores.png", "paths.png",
                        "density.png", "denoising.gif"):
            open_picture(run / picture)
        found = json.loads((run / "metrics.json").read_text())
        assert found["samples"]["energy_distance"] > 0 and math.isfinite(found["likelihood"]["nats"])


@pytest.mark.slow
def test_resumed_run_ends_with_the_same_bytes(tmp_path):
    how = ("--preset", "smoke", "--dataset", "swiss_roll", "--sde", "ve")
    whole = run_script("score_based_diffusion_example.py", *how, "--out", "a", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr[-2000:]
    run = only_run(tmp_path / "a", "score_based")
    cfg = sb.Config(**{k: tuple(v) if isinstance(v, list) else v
                       for k, v in json.loads((run / "config.json").read_text())["config"].items()})
    stop_at_three(cfg, tmp_path / "b")
    half = only_run(tmp_path / "b", "score_based")
    resumed = run_script("score_based_diffusion_example.py", "--resume", half, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert (run / "checkpoint.pt").read_bytes() == (half / "checkpoint.pt").read_bytes()
    assert (run / "log.csv").read_text() == (half / "log.csv").read_text()


def stop_at_three(cfg, out):
    """A run of cfg that stops after three steps, as by Ctrl-C."""
    from common.cli import parse_args
    from common.device import launch
    from common.runs import start

    _, opts = parse_args(sb.Config, sb.PRESETS, ["--preset", "smoke", "--out", str(out)])
    cfg, run, _ = start("score_based", sb.Config, cfg, opts, launch("cpu"), sb.validate)
    log = run.log

    def stop(step, **values):
        log(step, **values)
        run.stopped = step == 3

    run.log = stop
    sb.train(cfg, run)
