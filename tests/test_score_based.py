"""The score-based script against closed forms: Gaussians and mixtures under every SDE and sampler."""

import functools
import inspect
import json
import math
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import ddpm_example as ddpm
import score_based_diffusion_example as sb
from common import run as runs
from common.cli import parse_args
from common.data import POINTS, load_data, load_points

import numpy as np
import pytest
import torch
from conftest import assert_same_tree, only_run, open_picture, open_run, run_script
from scipy.integrate import solve_ivp as reference_solve_ivp
from torch.testing import assert_close

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


LIMIT = 3000  # evaluations: a solver that needs more has been given noise to integrate


class Bounded:
    """A score that says no more than `limit` times: an adaptive solver that crawls is stopped."""

    def __init__(self, score, limit):
        self.score, self.limit, self.calls, self.states = score, limit, 0, []

    def __call__(self, x, t):
        self.calls += 1
        self.states.append(torch.get_rng_state())
        assert self.calls <= self.limit, f"more than {self.limit} evaluations"
        return self.score(x, t)


opened = functools.partial(open_run, sb)


def spy(monkeypatch, owner, name, answer=None):
    """Replace owner.name by itself, or by `answer`, and list the arguments of its calls by name."""
    real, calls = getattr(owner, name), []

    @functools.wraps(real)
    def spied(*args, **kwargs):
        bound = inspect.signature(real).bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(SimpleNamespace(**bound.arguments))
        return (answer or real)(*args, **kwargs)

    monkeypatch.setattr(owner, name, spied)
    return calls


def late_bound(monkeypatch):
    """PREDICTORS that look their functions up, so that a spy is seen."""
    steps = {name: step.__name__ for name, step in sb.PREDICTORS.items()}
    wrapped = sb.identity_step
    monkeypatch.setattr(sb, "PREDICTORS", {
        name: wrapped if name == "none" else lambda *args, step=step: getattr(sb, step)(*args)
        for name, step in steps.items()})


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


@pytest.mark.slow
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
    c_out = sde.scaling(t, 0.5)[2][:, None]  # of the network's output: VE's is undone
    simple = (std**2 * (score - target) ** 2 / c_out**2).mean()
    assert_close(sb.score_loss(network, sde, x0, t=t, eps=eps), simple)
    g = sde.sde(x0, t)[1]
    weighted = (g**2 * (score - target) ** 2).mean()
    assert_close(sb.score_loss(network, sde, x0, weighting="likelihood", t=t, eps=eps), weighted)


@every_sde
def test_the_network_is_trained_alike_at_every_t(name):
    """An error of the network's output weighs the same at every noise, that of VE's largest too."""
    sde, x0, eps = SDES[name](), 0.5 * torch.randn(2000, 2).double(), torch.randn(2000, 2).double()
    grow = []
    for at in (0.02, 0.5, 1.0):
        t = torch.full((2000,), at).double()
        losses = [sb.score_loss(lambda x, c, b=b: torch.full_like(x, b), sde, x0, t=t, eps=eps)
                  for b in (1.0, -1.0)]
        grow.append((sum(losses) / 2 - sb.score_loss(lambda x, c: 0 * x, sde, x0, t=t, eps=eps)).item())
    assert grow == pytest.approx([1.0] * 3, rel=1e-6)


@every_sde
def test_likelihood_weighting_draws_its_weight(name):
    """arXiv 2101.09258: t has the density of g^2 / std^2, and the loss its mean at uniform t."""
    sde = SDES[name]()
    t, factor = sb.draw_times(sde, 40_000, "likelihood")
    assert t.dtype == torch.float32 and sde.eps_train * 0.99 <= t.min() and t.max() <= sde.T
    grid = torch.logspace(-5, 0, 20_001, dtype=torch.float64)
    weight = (sde.sde(grid, grid)[1] / sde.std(grid)) ** 2
    area = torch.cumulative_trapezoid(weight, grid)
    assert factor == pytest.approx(area[-1].item() / (1 - 1e-5), rel=1e-3)
    shares = torch.linspace(0.1, 0.9, 9).double()
    expected = grid[1:][torch.searchsorted(area, shares * area[-1])]
    found = torch.stack([(t <= e).double().mean() for e in expected])
    assert_close(found, shares, rtol=0, atol=0.015)
    error = lambda x, c: x * 0  # noqa: E731
    if name != "ve":  # where eps_hat = 0 and the squared error is eps^2
        torch.manual_seed(0)
        drawn = torch.stack([sb.score_loss(error, sde, torch.zeros(500, 2), "likelihood")
                             for _ in range(20)])
        assert drawn.mean().item() == pytest.approx(factor, rel=0.03)
        assert drawn.std() < 0.1 * drawn.mean()  # at uniform t it is as large as the mean


def test_logit_normal_times_are_the_sigmoid_of_a_normal_one_in_each_nth_but_for_one_of_sixteen():
    sde, normal = sb.VESDE(), torch.distributions.Normal(-0.2, 1)
    t = torch.stack([sb.draw_times(sde, 64, "logit_normal")[0] for _ in range(1000)])
    assert sb.draw_times(sde, 64, "logit_normal")[1] == 1.0
    assert t.dtype == torch.float32 and sde.eps_train <= t.min() < 1e-3 and 0.999 < t.max() <= sde.T
    for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        below = (t <= share).double().mean(1)
        wanted = (share + 15 * normal.cdf(torch.logit(torch.tensor(share))).item()) / 16
        assert below.mean() == pytest.approx(wanted, abs=0.006)
    assert (t <= 0.5).double().mean(1).std() < 0.03  # of independent draws 0.062


def test_logit_normal_times_leave_the_loss_of_one_t_as_it_is():
    sde, x0, t = sb.VESDE(), torch.randn(5, 3), torch.rand(5)
    eps = torch.randn_like(x0)
    losses = [sb.score_loss(lambda x, c: x.cos(), sde, x0, weighting, t, eps).item()
              for weighting in ("simple", "logit_normal", "likelihood")]
    assert losses[0] == losses[1] != losses[2]


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
        sb.network_eps(network, sde, x, t)
        assert_close(got["c"], 999 * t)
        assert_close(got["x"], x)
    sde = sb.VESDE()
    sb.network_eps(network, sde, x, t)  # a plain function: sigma_data 0.5
    sigma = 0.01 * 5000**t
    assert_close(got["c"], sigma.log())
    size, sigma = (sigma**2 + 0.25).sqrt()[:, None], sigma[:, None]
    assert_close(got["x"], x / size)
    # a network of zeros gives the score of Gaussian data, any other moves x0_hat by bounded amounts
    silent = sb.score_fn(lambda x, c: 0 * x, sde)(x, t)
    assert_close(silent, -x / size**2)
    x0_hat = x + sigma**2 * sb.score_fn(lambda x, c: torch.ones_like(x), sde)(x, t)
    assert_close(x0_hat - (x + sigma**2 * silent), (-0.5 * sigma / size).expand_as(x), rtol=1e-3,
                 atol=1e-4)


class Preconditioned(torch.nn.Module):
    """A network of zeros that knows how large its data are."""

    def __init__(self, sigma_data):
        super().__init__()
        self.register_buffer("sigma_data", torch.tensor(sigma_data))

    def forward(self, x, t):
        self.asked = x
        return torch.zeros_like(x)


def test_the_network_s_own_sigma_data_preconditions_ve():
    """Zeros give the score of N(0, sigma_data^2) data, for whatever sigma_data the network holds."""
    sde, x, t = sb.VESDE(), torch.randn(3, 1, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    for sigma_data in (0.2, 1.3):
        network = Preconditioned(sigma_data)
        size2 = (sde.std(t) ** 2 + sigma_data**2).view(-1, 1, 1, 1)
        assert_close(sb.score_fn(network, sde)(x, t), -x / size2)
        assert_close(network.asked, x / size2.sqrt())
        for other in (sb.VPSDE(), sb.SubVPSDE()):
            assert not sb.score_fn(network, other)(x, t).any()


@every_sde
def test_clamp_acts_on_x0_hat_never_on_x(name, monkeypatch):
    monkeypatch.setattr(sb, "network_eps", lambda model, sde, x, t: model(x, t))
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


# training, the glue


def fit(monkeypatch, out, *argv, **changes):
    """What train returns, and the calls of score_loss and of clip_grad_norm_."""
    cfg, run, data = opened(out, "--preview_every", 100, *argv)
    found = SimpleNamespace(cfg=cfg, run=run, data=replace(data, **changes))
    with monkeypatch.context() as patch:
        found.losses = spy(patch, sb, "score_loss")
        found.clipped = spy(patch, torch.nn.utils, "clip_grad_norm_")
        found.model = sb.train(cfg, run, found.data)
    return found


def rows_of(x, data):
    """How many of x are, to the last bit or nearly, among the examples of data."""
    distance = torch.cdist(x.flatten(1), data.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return (distance.min(1).values < 1e-4).sum().item()


@pytest.mark.slow
def test_training_spreads_the_pixels_of_the_training_part_over_their_bins(tmp_path, monkeypatch):
    """Every x_0 that the loss sees is a training picture, each value somewhere in its bin."""
    found = fit(monkeypatch, tmp_path, "--batch_size", 64)
    x0 = torch.cat([call.x0 for call in found.losses])
    assert x0.shape == (6 * 64, 1, 28, 28)
    bins = (x0 + 1) * 128
    share = bins - bins.floor()
    assert share.std().item() == pytest.approx(12**-0.5, rel=0.02)
    assert share.mean().item() == pytest.approx(0.5, abs=0.01)
    pictures = (bins.floor() / 127.5 - 1).clamp(-1, 1)
    assert rows_of(pictures, found.data.train) >= 0.99 * len(x0)
    assert rows_of(pictures, found.data.test) < 0.01 * len(x0)


@pytest.mark.parametrize("argv", [["--dataset", "digits", "--no-dequantize"],
                                  ["--dataset", "digits8", "--no-dequantize"],
                                  ["--dataset", "two_moons", "--dequantize"],
                                  ["--dataset", "two_moons"]], ids=" ".join)
def test_training_leaves_points_alone_and_pixels_when_asked_to(argv, tmp_path, monkeypatch):
    found = fit(monkeypatch, tmp_path, *argv)
    x0 = torch.cat([call.x0 for call in found.losses])
    assert rows_of(x0, found.data.train) == len(x0) and rows_of(x0, found.data.test) < len(x0)


def test_training_hands_on_what_the_config_says(tmp_path, monkeypatch):
    """weighting to the loss; flip and batch_size to the batch; lr, weight_decay and grad_clip."""
    for weighting in ("likelihood", "simple"):
        found = fit(monkeypatch, tmp_path / weighting, "--weighting", weighting, "--steps", 2, "--flip",
                    "--no-dequantize", "--batch_size", 12, "--lr", 0.0123, "--warmup", 0,
                    "--decay", "constant", "--weight_decay", 0.045, "--grad_clip", 0.67)
        assert [call.weighting for call in found.losses] == [weighting] * 2
        assert all(call.t is None and call.eps is None for call in found.losses)
        assert [len(call.x0) for call in found.losses] == [12] * 2
        x0, train = torch.cat([call.x0 for call in found.losses]), found.data.train
        mirrored = rows_of(x0.flip(3), train)
        assert 0 < mirrored < 24 and mirrored + rows_of(x0, train) >= 24
        assert [call.max_norm for call in found.clipped] == [0.67] * 2
        assert found.run.read_log()["lr"] == [0.0123] * 2
        state = torch.load(found.run.path("checkpoint.pt"), weights_only=True)["optimizer"]
        assert [group["weight_decay"] for group in state["param_groups"]] == [0.045]


def test_the_gradient_is_clipped_before_the_step_and_its_norm_before_that_is_logged(tmp_path, monkeypatch):
    """A clip of 1e-9 is far below Adam's epsilon of 1e-8: with it the weights hardly move."""
    moved, norms = {}, {}
    for clip in (1e-9, 1e9):
        torch.manual_seed(0)
        found = fit(monkeypatch, tmp_path / str(clip), "--dataset", "gaussians", "--warmup", 0, "--steps", 3,
                    "--lr", 0.01, "--grad_clip", clip, "--ema", 0)
        moved[clip], norms[clip] = found.model.out.weight.abs().max(), found.run.read_log()["grad_norm"]
    assert moved[1e-9] < 0.1 * moved[1e9] and moved[1e9] > 0.01
    assert norms[1e-9][0] == norms[1e9][0] > 1e-3  # the whole gradient, not what was left of it


@pytest.mark.parametrize("sde", ["ve", "vp", "subvp"])
def test_training_is_of_the_sde_that_the_config_describes(sde, tmp_path, monkeypatch):
    found = fit(monkeypatch, tmp_path, "--dataset", "swiss_roll", "--sde", sde, "--sigma_max", 7,
                "--beta_max", 9, "--steps", 1)
    used = found.losses[0].sde
    assert type(used) is {"ve": sb.VESDE, "vp": sb.VPSDE, "subvp": sb.SubVPSDE}[sde]
    assert used.sigma_max == 7 if sde == "ve" else (used.beta_max, used.kind) == (9, "linear")


@pytest.mark.parametrize("dataset", ["digits", "swiss_roll"])
def test_sigma_data_is_that_of_the_training_part_and_is_kept(dataset, tmp_path, monkeypatch):
    """In the network that is trained, in the average, in the checkpoint and in what it gives back."""
    found = fit(monkeypatch, tmp_path, "--dataset", dataset, "--sde", "ve")
    std = found.data.train.std()
    assert abs(std - 0.5) > 0.05  # not what a network starts with
    assert all(torch.equal(call.model.sigma_data, std) for call in found.losses)
    assert torch.equal(found.model.sigma_data, std)
    state = torch.load(found.run.path("checkpoint.pt"), weights_only=True)
    assert torch.equal(state["ema"]["sigma_data"], std) and torch.equal(state["model"]["sigma_data"], std)
    cfg, run, data = opened(tmp_path / "again", "--sample", found.run.folder)
    model = run.trained(sb.make_network(cfg, data.shape))
    assert torch.equal(model.sigma_data, std) and not model.training
    assert_same(model, found.model)


def assert_same(a, b):
    """Two networks hold the same numbers."""
    assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)


def test_train_returns_the_recursion_over_the_weights_in_eval_mode(tmp_path, monkeypatch):
    """The average is updated once a step, after the optimiser, with its decay of step n."""
    seen = []

    class Watched(sb.EMA):
        def __init__(self, model, decay):
            super().__init__(model, decay)
            seen.append([p.clone() for p in model.parameters()])

        def update(self, model, n):
            super().update(model, n)
            assert n == len(seen) - 1
            seen.append([p.detach().clone() for p in model.parameters()])

    monkeypatch.setattr(sb, "EMA", Watched)
    found = fit(monkeypatch, tmp_path, "--dataset", "gaussians", "--ema", 0.3)
    assert len(seen) == 1 + found.cfg.steps
    expected = seen[0]
    for n, weights in enumerate(seen[1:]):
        decay = min(0.3, (1 + n) / (10 + n))
        expected = [decay * a + (1 - decay) * b for a, b in zip(expected, weights, strict=True)]
    assert_close(list(found.model.parameters()), expected, rtol=1e-4, atol=1e-6)
    assert_close(list(found.losses[-1].model.parameters()), seen[-1], rtol=0, atol=0)  # after the step
    assert (found.model.out.weight - seen[-1][-2]).abs().max() > 1e-5  # not the last weights
    assert not found.model.training and not any(p.requires_grad for p in found.model.parameters())
    assert found.losses[0].model.training and found.losses[0].model is not found.model


def test_gradient_checkpointing_trains_to_the_same_weights(tmp_path, monkeypatch):
    """Recomputed blocks keep the scale of their sums and the way they resample."""
    again, real = [], runs.checkpoint
    monkeypatch.setattr(runs, "checkpoint", lambda *a, **k: again.append(1) or real(*a, **k))
    how = ["--dataset", "digits8", "--biggan", "--steps", 3, "--warmup", 0]
    ends = []
    for argv in (["--skip_rescale"], ["--skip_rescale", "--grad_checkpointing"], []):
        torch.manual_seed(0)
        ends.append(fit(monkeypatch, tmp_path / str(len(ends)), *how, *argv))
        assert bool(again) == (len(ends) > 1)
    plain, recomputed, unscaled = (end.losses[-1].model for end in ends)
    assert_close(dict(recomputed.state_dict()), dict(plain.state_dict()), rtol=1e-4, atol=1e-5)
    assert (unscaled.conv_out.weight - plain.conv_out.weight).abs().max() > 1e-4


@pytest.mark.parametrize("H, W", [(8, 4), (4, 8)])
def test_training_and_sampling_take_pictures_that_are_not_square(H, W, tmp_path, monkeypatch):
    data = load_data("digits8")
    found = fit(monkeypatch, tmp_path, "--dataset", "digits8", "--steps", 2,
                train=data.train[..., :H, :W], test=data.test[..., :H, :W])
    sde = sb.make_sde(found.cfg)
    score = sb.score_fn(found.model, sde, clip_x0=True)
    out = sb.predictor_corrector(score, sde, (2, 1, H, W), 2)
    assert out.shape == (2, 1, H, W) and out.isfinite().all()
    assert sb.log_likelihood(score, sde, out, "hutchinson", tolerance=0.1).shape == (2,)


# samplers


SAMPLERS = {
    "em": lambda score, sde, x: sb.euler_maruyama(score, sde, x.shape, 500, xT=x),
    "reverse": lambda score, sde, x: sb.reverse_diffusion(score, sde, x.shape, 300, xT=x),
    "ancestral": lambda score, sde, x: sb.ancestral_sampling(score, sde, x.shape, 300, xT=x),
    "pc": lambda score, sde, x: sb.predictor_corrector(score, sde, x.shape, 150, snr=0.1, xT=x),
    "rk45": lambda score, sde, x: sb.probability_flow_ode(score, sde, x.shape, tolerance=1e-4, xT=x),
    "rk4": lambda score, sde, x: sb.probability_flow_ode(score, sde, x.shape, "rk4", 100, xT=x),
}


@pytest.mark.slow
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


@pytest.mark.slow
@every_sde
def test_sde_and_ode_share_marginals_along_the_way(name):
    """At t = 0.5 the variance of the ODE's and of the reverse SDE's states is that of p_t."""
    sde = SDES[name]()
    data, x = gaussian(sde), noise(sde, 5000)
    t, kept = min(sb.sde_process(sb.reverse_diffusion_step, data, sde, x, 600),
                  key=lambda state: abs(state[0] - 0.5))
    assert abs(t - 0.5) < 1e-3
    along = sb.last(sb.ode_process(data, sde, x, 1.0, t, "rk4", 100))
    expected = (sde.m(torch.tensor(t).double()) ** 2 * 0.25 + sde.std(torch.tensor(t).double()) ** 2).sqrt()
    for states in (kept, along):
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


@pytest.mark.slow
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
    found, std = sb.ancestral_step(data, sde, x, t, s)
    tt = torch.full((8,), t).double()
    alpha_bar = sde.m(tt[:1]) ** 2
    eps_hat = -data(x, tt) * (1 - alpha_bar).sqrt()
    mean = (x - beta / (1 - alpha_bar).sqrt() * eps_hat) / math.sqrt(1 - beta)  # DDPM Alg. 2, line 4
    assert a == pytest.approx(math.sqrt(1 - beta))
    assert_close(found, mean)
    assert std == pytest.approx(math.sqrt(beta))


def test_ve_ancestral_is_the_posterior_of_smld():
    """With the exact score of a single point x_0 the step's mean and variance are q(x_s | x_t, x_0)'s."""
    sde, t, s = sb.VESDE(), 0.6, 0.5
    x0, x = 0.3, torch.full((4, 1), 2.0).double()
    sigma_t, sigma_s = (sde.std(torch.tensor(u).double()).item() for u in (t, s))
    score = lambda x, tt: -(x - x0) / sigma_t**2  # noqa: E731
    found, std = sb.ancestral_step(score, sde, x, t, s)
    share = sigma_s**2 / sigma_t**2
    assert_close(found, torch.full_like(x, x0 + share * (2.0 - x0)), rtol=1e-5, atol=0)
    assert std == pytest.approx(sigma_s * math.sqrt(1 - share))


def test_corrector_comes_first_and_the_end_is_noise_free():
    sde = sb.VPSDE()
    data, x = gaussian(sde), noise(sde, 4)
    sb.predictor_corrector(data, sde, x.shape, 3, corrector_steps=2, xT=x)
    ts = np.linspace(1, sde.eps, 4)
    assert data.calls == pytest.approx(np.repeat(ts[:3], 3))
    for sampler in (sb.euler_maruyama, sb.reverse_diffusion, sb.ancestral_sampling,
                    sb.predictor_corrector):
        torch.manual_seed(0)
        noisy = sampler(data, sde, x.shape, 5, denoise=False, xT=x)
        torch.manual_seed(0)
        clean = sampler(data, sde, x.shape, 5, xT=x)
        a, variance = sb.transition(sde, sde.eps, float(np.linspace(1, sde.eps, 6)[4]))
        assert 0.05 * variance < (noisy - clean).var() < 5 * variance  # 8 numbers


@every_sde
def test_euler_maruyama_step_is_as_long_as_its_grid_says(name):
    """Eq. 6 over t - s, whatever the number of steps."""
    sde, x = SDES[name](), torch.randn(4, 2).double()
    drift, g = sde.sde(x, torch.full((4,), 0.8).double())
    for s in (0.75, 0.2):
        found, std = sb.em_step(lambda x, t: -3 * x, sde, x, 0.8, s)
        assert_close(found, x - (drift + 3 * g**2 * x) * (0.8 - s), rtol=1e-5, atol=1e-6)
        assert_close(std, g * (0.8 - s) ** 0.5)


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


@every_sde
@pytest.mark.parametrize("denoise", [True, False])
def test_the_process_walks_from_T_down_to_eps(name, denoise):
    """Mean and noise at every step; at the last one denoise keeps the mean, and calls it x_0."""
    sde = SDES[name]()
    data, x = gaussian(sde), noise(sde, 3)
    torch.manual_seed(5)
    ts, states = zip(*sb.sde_process(sb.em_step, data, sde, x, 7, denoise), strict=True)
    grid = np.linspace(sde.T, sde.eps, 8).tolist()
    assert list(ts) == pytest.approx(grid[:7] + [0.0 if denoise else sde.eps])
    assert torch.equal(states[0], x)
    torch.manual_seed(5)
    for i in range(7):
        mean, std = sb.em_step(data, sde, states[i], grid[i], grid[i + 1])
        z = torch.randn_like(x)
        assert_close(states[i + 1], mean if denoise and i == 6 else mean + std * z)
    torch.manual_seed(5)
    assert_close(sb.sample(sb.em_step, data, sde, x.shape, 7, denoise, xT=x), states[-1])


@every_sde
def test_few_steps_leave_no_speckle(name):
    """Data that is one point: what 40 steps end with is as sharp as the step's mean can be."""
    sde = SDES[name]()
    data, x = gaussian(sde, mean=(0.4, -0.3), std=1e-3), noise(sde, 500)
    for sampler in (sb.reverse_diffusion, sb.predictor_corrector):
        clean, noisy = (sampler(data, sde, x.shape, 40, denoise=d, xT=x) for d in (True, False))
        assert clean.std(0).max() < 0.9 * noisy.std(0).min()


@every_sde
def test_the_mixture_on_the_line_moves_with_its_sde(name):
    """Figure 2's p_t: mass 1, and the moments of m x_0 + std z."""
    sde = SDES[name]()
    log_p = sb.mixture_1d(sde, (-1.0, 0.6), 0.15)
    for t in (0.1, 0.4):
        m, std = (f(torch.tensor([t]).double()).item() for f in (sde.m, sde.std))
        x = torch.linspace(-8 - 8 * std, 8 + 8 * std, 40_001).double()[:, None]
        p, x = log_p(x, torch.full((len(x),), t).double()).exp(), x[:, 0]
        mean = torch.trapezoid(p * x, x)
        assert torch.trapezoid(p, x).item() == pytest.approx(1)
        assert mean.item() == pytest.approx(-0.2 * m)
        variance = m**2 * (0.8**2 + 0.15**2) + std**2
        assert torch.trapezoid(p * (x - mean) ** 2, x).item() == pytest.approx(variance)


@every_sde
def test_figure_paths_ends_where_the_data_is(name, tmp_path, monkeypatch):
    """The paper's Figure 2: SDE and ODE go from the same noise to the two Gaussians."""
    flow = MagicMock()
    monkeypatch.setattr(sb.plotting, "flow", flow)
    sde, run = SDES[name](), SimpleNamespace(path=lambda file: tmp_path / file)
    sb.figure_paths(run, sde)
    _, parts, ts, line, density, _ = flow.call_args[0]
    assert density.shape == (len(line), len(ts)) and len(parts) == 2
    assert torch.equal(parts[0][2][0], parts[1][2][0])
    for _, times, places in parts:
        assert times[0] == sde.T and times[-1] <= sde.eps and len(times) == len(places)
        gap = (places[-1][:, None] - torch.tensor([-1.0, 0.6])).abs().min(1).values
        assert gap.max() < 0.6
    found = density[:, 0] / density[:, 0].max()  # at eps: the data
    assert abs(line[found.argmax()].abs().item() - 0.8) < 0.25 and found[line.abs() < 0.05].max() < 0.05


def test_samplers_start_from_the_prior_of_their_sde(monkeypatch):
    sde = sb.VESDE(0.1, 10.0)
    seen = spy(monkeypatch, sb, "sde_process")
    torch.manual_seed(2)
    sb.euler_maruyama(gaussian(sde), sde, (5, 2), 1, denoise=False)
    torch.manual_seed(2)
    assert_close(seen[0].xT, 10 * torch.randn(5, 2))


# Controllable generation


class Correlated:
    """The exact score of one Gaussian N(mean, cov) of any covariance, at any t."""

    def __init__(self, sde, mean, cov):
        self.sde, self.mean, self.cov = sde, torch.tensor(mean).double(), torch.tensor(cov).double()

    def matrix(self, t):
        """(m, -C_t^-1) of the score -C_t^-1 (x - m mean)."""
        m, std = (f(torch.tensor([t]).double()) for f in (self.sde.m, self.sde.std))
        return m, -torch.linalg.inv(m**2 * self.cov + std**2 * torch.eye(len(self.mean)).double())

    def __call__(self, x, t):
        m, matrix = self.matrix(t[0].item())
        return (x - m * self.mean) @ matrix


@every_sde
@pytest.mark.parametrize("corrector_steps", [0, 2])
def test_every_state_is_constrained_at_its_own_t(name, corrector_steps):
    """The start at T, each corrector step at t, each predictor step at s, the mean at 0."""
    sde, asked = SDES[name](), []
    x = noise(sde, 3)

    def constrain(x, t):
        asked.append(t)
        return x + 1

    states = list(sb.sde_process(sb.em_step, lambda x, t: -x, sde, x, 3, snr=1e-4,
                                 corrector_steps=corrector_steps, constrain=constrain))
    grid = np.linspace(sde.T, sde.eps, 4).tolist()
    wanted = [sde.T]
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        wanted += [t] * corrector_steps + [s]
    assert asked == pytest.approx([*wanted, 0.0])
    assert_close(states[0][1], x + 1)


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


@every_sde
@pytest.mark.parametrize("predictor", ["em_step", "reverse_diffusion_step"])
def test_completions_follow_the_recursion_of_a_joint_gaussian(name, predictor):
    """Every step is linear: mean and variance of the unknown in closed form, step by step.

    The exact conditional is N(0.44, 0.09): what the predictor alone misses of it stands at the end.
    """
    sde, steps, k = SDES[name](), 100, 0.875
    data = Correlated(sde, [0.2, -0.1], [[0.25, 0.2], [0.2, 0.25]])
    step = getattr(sb, predictor)
    known = torch.tensor([k, 0.0]).double().expand(10_000, 2)
    torch.manual_seed(0)
    found = sb.inpaint(data, sde, known, torch.tensor([True, False]), steps, step,
                       xT=noise(sde, 10_000))
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
    assert found[:, 1].mean().item() == pytest.approx(mean, abs=4 * (variance / 10_000) ** 0.5)
    assert found[:, 1].var().item() == pytest.approx(variance, rel=0.07)
    exact, exact_variance = -0.1 + 0.8 * (k - 0.2), 0.25 - 0.2**2 / 0.25
    assert 0.15 < exact - mean < 0.25 and 1.2 < variance / exact_variance < 1.8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_the_corrector_brings_completions_to_the_exact_conditional(name):
    """It lets the unknown hear of what is known again and again at the same t."""
    sde = SDES[name]()
    data = Correlated(sde, [0.2, -0.1], [[0.25, 0.2], [0.2, 0.25]])
    known = torch.tensor([0.875, 0.0]).double().expand(4000, 2)
    found = sb.inpaint(data, sde, known, torch.tensor([True, False]), 200, xT=noise(sde),
                       corrector_steps=5, snr=0.16)[:, 1]
    assert found.mean().item() == pytest.approx(0.44, abs=0.05)
    assert found.var().item() == pytest.approx(0.09, rel=0.15)


@pytest.mark.parametrize("name, sampler", [
    (name, sampler) for name, sde in SDES.items() for sampler in sde().samplers if sampler[:2] != "rk"])
def test_independent_dimensions_are_completed_as_they_are_drawn(name, sampler):
    """Then the method is exact; by every stochastic sampler of the SDE."""
    sde = SDES[name]()
    how = {"em": (sb.em_step, {}), "reverse": (sb.reverse_diffusion_step, {}),
           "ancestral": (sb.ancestral_step, {}),
           "pc": (sb.reverse_diffusion_step, {"corrector_steps": 1, "snr": 0.1})}[sampler]
    known = torch.tensor([0.875, 0.0]).double().expand(4000, 2)
    found = sb.inpaint(gaussian(sde), sde, known, torch.tensor([True, False]), 300, how[0],
                       xT=noise(sde), **how[1])
    assert (found[:, 0] == 0.875).all()
    assert found[:, 1].mean().item() == pytest.approx(-0.3, abs=0.04)
    assert found[:, 1].std().item() == pytest.approx(0.5, rel=0.06)


@every_sde
def test_colourings_keep_the_grey_and_draw_the_rest(name, monkeypatch):
    """Data with a grey of std 0.6 and two independent colours of std 0.2: drawn so beside any grey."""
    sde = SDES[name]()
    one = torch.full((3, 3), 1 / 3).double()  # the projection on grey
    cov = 0.36 * one + 0.04 * (torch.eye(3).double() - one)
    data = Correlated(sde, [0.0, 0.0, 0.0], cov.tolist())
    made = spy(monkeypatch, sb, "imputation")
    grey = torch.linspace(-0.5, 0.5, 3000).double().view(-1, 1, 1, 1)

    def score(x, t):
        return data(x[..., 0, 0], t)[..., None, None]

    found = sb.colorize(score, sde, grey, 300, xT=noise(sde, 3000, 3).view(3000, 3, 1, 1))
    assert found.shape == (3000, 3, 1, 1)
    assert_close(found.mean(1, keepdim=True), grey)
    basis = made[0].basis
    assert_close(basis @ basis.mT, torch.eye(3).double(), rtol=0, atol=1e-6)
    assert_close(basis[0].abs(), torch.full((3,), 3**-0.5).double(), rtol=1e-6, atol=0)
    colour = (found - grey)[..., 0, 0]
    assert torch.cov(colour.T).sub(0.04 * (torch.eye(3) - one)).abs().max() < 0.006
    assert torch.corrcoef(torch.cat([colour.T, grey.view(1, -1)]))[3, :3].abs().max() < 0.08


@every_sde
def test_a_classifier_makes_the_score_that_of_its_class(name):
    """Bayes: with the exact p_t(y | x) of a mixture, component by component and picture by picture."""
    sde = SDES[name]()
    data, x = Mixture(sde), torch.randn(7, 2).double()
    y, t = torch.arange(7) % 3, torch.full((7,), 0.4).double()
    guided = sb.conditional_score(data, lambda x, t: data.terms(x, t)[2], y)
    found = guided(x, t)
    for k in range(3):
        component = Mixture(sde, (1.0,), (data.mu[k].tolist(),), (data.s[k].item(),))
        assert_close(found[y == k], component(x[y == k], t[y == k]), rtol=1e-6, atol=1e-8)


def test_the_figure_completes_what_its_masks_leave_out(tmp_path, monkeypatch):
    """The known pixels of every completion are those of the truth, and nothing else is."""
    cfg, run, data = opened(tmp_path, "--inpaint_N", 4)
    tables, sde = spy(monkeypatch, sb.plotting, "table"), sb.VPSDE()
    inpainted = spy(monkeypatch, sb, "inpaint")
    sb.figure_inpainting(run, cfg, lambda x, t: -x, sde, data)
    known, *completed, truth = tables[0].rows
    assert torch.equal(truth, data.test[:8])
    assert tables[0].column_labels == ["box", "box", "half", "half", "pixels", "pixels", "border", "border"]
    mask = inpainted[0].mask
    assert mask.shape == (8, 1, 28, 28) and not known[~mask].any() and torch.equal(known[mask], truth[mask])
    for x in completed:
        assert torch.equal(x[mask], truth[mask])
        assert (x - truth)[~mask].abs().min() > 0
    assert (completed[0] - completed[1])[~mask].abs().min() > 0  # a draw each
    assert [call.steps for call in inpainted] == [4] * 3
    assert all(call.how == {"corrector_steps": 5, "snr": 0.4, "denoise": True} for call in inpainted)


def test_the_figure_of_colourings_keeps_their_grey(tmp_path, monkeypatch):
    cfg, run, _ = opened(tmp_path, "--N", 4)
    data, tables = load_data("color_digits", 0), spy(monkeypatch, sb.plotting, "table")
    sb.figure_colorization(run, cfg, lambda x, t: -x, sb.VPSDE(), data)
    grey, *coloured, truth = tables[0].rows
    assert torch.equal(truth, data.test[:8]) and len(coloured) == 3
    for x in coloured:
        assert_close(x.mean(1, keepdim=True), grey, rtol=0, atol=1e-5)
        assert x.std(1).mean() > 0.01
    assert (coloured[0] - coloured[1]).abs().max() > 0.01


@pytest.mark.slow
@every_sde
@pytest.mark.parametrize("draw", [sb.euler_maruyama, sb.predictor_corrector, sb.probability_flow_ode])
def test_every_sampler_draws_by_class(name, draw):
    sde = SDES[name]()
    data, y = Mixture(sde), torch.arange(1500) % 3
    guided = sb.conditional_score(data, lambda x, t: data.terms(x, t)[2], y)
    how = {} if draw is sb.probability_flow_ode else {"steps": 500}
    found = draw(guided, sde, None, xT=noise(sde, 1500), **how)
    for k in range(3):
        part = found[y == k]
        assert (part.mean(0) - data.mu[k]).abs().max() < 0.06
        assert part.std(0).mean().item() == pytest.approx(data.s[k].item(), rel=0.12)


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
        ref = reference_solve_ivp(rhs, (t, s), x.numpy().ravel(), rtol=tolerance, atol=tolerance)
        ts, states = zip(*sb.ode_process(data, sde, x, t, s, "rk45", tolerance=tolerance), strict=True)
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
    ref = reference_solve_ivp(
        lambda t, y: np.concatenate([np.stack([-y[1:6:2], y[0:6:2]], 1).ravel(), -t * y[6:]]),
        (0.0, 2.0), flat, rtol=1e-6, atol=1e-6)
    ts, states = zip(*sb.solve(velocity, (a, b), 0.0, 2.0, 1e-6), strict=True)
    assert (ts[0], ts[-1]) == (0.0, 2.0) and len(ts) == pytest.approx(len(ref.t), abs=2)
    assert_close(states[-1][0], torch.from_numpy(ref.y[:6, -1].copy()).view(3, 2), rtol=1e-5, atol=1e-5)
    assert_close(states[-1][1], b * math.exp(-2), rtol=1e-4, atol=1e-5)
    back = sb.last(sb.solve(velocity, states[-1], 2.0, 0.0, 1e-6))
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
        sb.last(sb.solve(velocity, (torch.ones(1).double(),), 0.0, 2.0, 1e-4))


def test_a_network_that_says_nan_does_not_hold_the_solver_for_ever():
    score = Bounded(lambda x, t: x * math.nan, LIMIT)
    with pytest.raises(FloatingPointError):
        sb.ode_decode(score, sb.VPSDE(), torch.ones(2, 2))


def test_the_last_state_of_a_sampler():
    assert sb.last(iter([(1.0, "a"), (0.5, "b"), (0.0, "c")])) == "c"


def ways(cfg, score, sde, monkeypatch, calls=None):
    """The states that process yields, and {name: calls} of what it used on the way."""
    names = ("em_step", "reverse_diffusion_step", "ancestral_step", "langevin_step", "rk4_step",
             "solve", "tweedie", "ode_process", "sde_process")
    late_bound(monkeypatch)
    used = {name: spy(monkeypatch, sb, name) for name in names}
    states = list(sb.process(cfg, score, sde, noise(sde, 3), calls))
    return states, {name: found for name, found in used.items() if found}


SMALL = sb.Config(N=12, snr=0.123, corrector_steps=3, tolerance=0.02)
PARTS = {
    "em": {"em_step": 12}, "reverse": {"reverse_diffusion_step": 12}, "ancestral": {"ancestral_step": 12},
    "pc": {"reverse_diffusion_step": 12, "langevin_step": 36}, "rk4": {"rk4_step": 3}, "rk45": {"solve": 1}}


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("sampler", PARTS)
def test_process_runs_the_sampler_that_the_config_names(sampler, denoise, monkeypatch):
    """With its N, snr, corrector_steps, tolerance and denoise; from T to eps, then 0."""
    sde = sb.VPSDE()
    cfg = replace(SMALL, sampler=sampler, denoise=denoise)
    states, used = ways(cfg, gaussian(sde), sde, monkeypatch)
    around = {"ode_process" if sampler.startswith("rk") else "sde_process": 1}
    ode = sampler.startswith("rk")  # what stops at x_eps; the others end with a mean
    around |= {"tweedie": 1} if denoise and ode else {}
    assert {name: len(found) for name, found in used.items()} == PARTS[sampler] | around
    assert all(call.snr == 0.123 for call in used.get("langevin_step", ()))
    assert all(call.tolerance == 0.02 for call in used.get("solve", ()))
    ts = [t for t, _ in states]
    assert ts[0] == sde.T and ts == sorted(ts, reverse=True)
    assert ts[-1] == (0 if denoise else sde.eps) and (not ode or sde.eps in ts)
    if denoise and ode:
        assert_close(states[-1][1], sb.tweedie(gaussian(sde), sde, states[-2][1], sde.eps))


@pytest.mark.parametrize("sampler", ["em", "reverse", "ancestral", "pc", "rk4"])
def test_process_spends_the_calls_that_it_is_given(sampler, monkeypatch):
    """calls: about as many evaluations of the score, whatever the sampler and N; the ODE's Tweedie."""
    sde = sb.VPSDE()
    score = Bounded(gaussian(sde), 300)
    ways(replace(SMALL, sampler=sampler, N=1000), score, sde, monkeypatch, calls=100)
    assert score.calls == (101 if sampler == "rk4" else 100)


@pytest.mark.parametrize("sampler", PARTS)
def test_process_starts_at_the_temperature(sampler):
    """So that every figure that draws by the settings does."""
    sde = sb.VPSDE()
    x, cfg = noise(sde, 3), replace(SMALL, sampler=sampler, temperature=0.3)
    assert_close(next(sb.process(cfg, gaussian(sde), sde, x))[1], 0.3 * x)


def test_process_needs_no_gradient():
    sde = sb.VPSDE()
    weight = torch.nn.Parameter(torch.ones(1).double())
    for sampler in PARTS:
        cfg = replace(SMALL, sampler=sampler)
        for _, x in sb.process(cfg, lambda x, t: -weight * x, sde, noise(sde, 2)):
            assert not x.requires_grad


# likelihood


@every_sde
def test_likelihood_with_the_exact_trace(name):
    """To 1e-3 nats at t = eps, with the exact log p_T of the mixture."""
    sde = SDES[name]()
    data = Mixture(sde)
    x = torch.tensor([[-1.2, 0.0], [1.0, 1.2], [0.0, 0.3], [0.7, -1.0]]).double()
    found = sb.log_likelihood(Bounded(data, LIMIT), sde, x, tolerance=1e-7, eps=1e-3,
                              prior_logp=lambda z: data.logp(z, 1.0))
    assert_close(found, data.logp(x, 1e-3), rtol=0, atol=1e-3)


def test_likelihood_where_the_prior_is_exact():
    sde = sb.VPSDE()
    data = gaussian(sde, mean=(0.0, 0.0), std=1.0)
    x = torch.randn(5, 2).double()
    found = sb.log_likelihood(Bounded(data, LIMIT), sde, x, tolerance=1e-8)
    assert_close(found, torch.distributions.Normal(0, 1).log_prob(x).sum(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(probe):
    """A correlated Gaussian, one point many times: the mean is the density within its error."""
    sde, cov = sb.VPSDE(), torch.tensor([[0.5, 0.3], [0.3, 0.4]]).double()

    def score(x, t):
        m, std = sde.m(t).view(-1, 1, 1), sde.std(t).view(-1, 1, 1)
        return -torch.linalg.solve(m**2 * cov + std**2 * torch.eye(2), x[..., None])[..., 0]

    x = torch.tensor([[0.5, -0.2]]).double().expand(2000, 2)
    found = sb.log_likelihood(Bounded(score, LIMIT), sde, x, "hutchinson", probe, 1e-6)
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
        score = Bounded(data, LIMIT)
        results.append(sb.log_likelihood(score, sde, x, "hutchinson", "gaussian", tolerance))
        assert all(torch.equal(state, score.states[0]) for state in score.states)  # no draws on the way
    assert_close(results[0], results[1], rtol=0, atol=1e-3)


def test_bits_per_dim_of_a_gaussian_model():
    """Against the probability of each 8-bit bin under N(0.1, 0.3^2), from its distribution function."""
    sde, mean, std = sb.VPSDE(), 0.1, 0.3
    data = Mixture(sde, (1.0,), ((mean,) * 16,), (std,))
    pixels = torch.randint(60, 200, (30, 1, 4, 4)).double()
    x = pixels / 127.5 - 1
    found = sb.bits_per_dim(Bounded(data, LIMIT), sde, x, tolerance=1e-5)
    cdf = torch.distributions.Normal(mean, std).cdf
    mass = cdf((pixels + 1) / 128 - 1) - cdf(pixels / 128 - 1)
    assert found.mean().item() == pytest.approx(-mass.log2().mean().item(), abs=0.02)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_the_probe_is_of_its_kind(probe):
    """At x = 0 with s = -A x the trace is v^T (A - 1) v times beta / 2: its values tell the probe."""
    sde, A = sb.VPSDE(), torch.tensor([[1.0, 0.5], [0.5, 3.0]]).double()
    x = torch.zeros(4000, 2).double()
    score = Bounded(lambda x, t: -x @ A, LIMIT)
    found = sb.log_likelihood(score, sde, x, "hutchinson", probe, 1e-3, prior_logp=lambda z: z.sum(1))
    scale = sde.B(torch.ones(1).double()).item() - sde.B(torch.full((1,), 1e-5).double()).item()
    found, rest = found / (0.5 * scale), A - torch.eye(2)
    if probe == "rademacher":  # 1 or 3, each half of the time
        assert_close((found - 2).abs(), torch.ones(4000).double(), rtol=0, atol=1e-2)
        assert (found - 2).mean().abs() < 0.1
    else:  # mean tr (A - 1), variance 2 tr (A - 1)^2
        assert found.mean().item() == pytest.approx(rest.trace().item(), abs=0.3)
        assert found.var().item() == pytest.approx(2 * (rest @ rest).trace().item(), rel=0.2)


def test_bits_per_dim_spreads_the_pixels_over_their_bins(monkeypatch):
    """What the density is taken of, by Hutchinson's trace, with the tolerance asked for."""
    pixels = torch.randint(0, 256, (40, 3, 8, 8)).float()
    asked = spy(monkeypatch, sb, "log_likelihood", lambda score, sde, x, **how: torch.zeros(len(x)))
    for _ in range(2):
        found = sb.bits_per_dim("score", "sde", pixels / 127.5 - 1, tolerance=0.03)
        assert_close(found, torch.full((40,), 7.0))
    assert [(call.trace, call.tolerance, call.score, call.sde) for call in asked] == [
        ("hutchinson", 0.03, "score", "sde")] * 2
    share = (asked[0].x + 1) * 128 - pixels
    assert -1e-4 < share.min() < 0.01 and 0.99 < share.max() < 1 + 1e-4
    assert share.mean().item() == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(asked[0].x, asked[1].x)


def test_dequantize_fills_the_bins():
    x = torch.tensor([0.0, 17.0, 255.0]).expand(5000, 3) / 127.5 - 1
    bins = (sb.dequantize(x) + 1) * 128
    assert_close(bins.floor(), torch.tensor([0.0, 17.0, 255.0]).expand(5000, 3))
    assert_close((bins - bins.floor()).mean(0), torch.full((3,), 0.5), rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="8-bit"):
        sb.bits_per_dim(None, sb.VPSDE(), torch.rand(2, 1, 4, 4))


# networks


@pytest.mark.parametrize("preset, parameters", [("ddpmpp", 61_804_419), ("ncsnpp", 62_758_787)])
def test_parameters_of_the_paper_presets(preset, parameters):
    """As configs/vp/cifar10_ddpmpp_continuous.py, ve/cifar10_ncsnpp_continuous.py of score_sde_pytorch."""
    with torch.device("meta"):
        model = sb.make_network(sb.PRESETS[preset], (3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_ncsnpp_filters_its_input_and_then_strides_the_convolution():
    """The input's pyramid sees every pixel of the blurred input, not every second one."""
    torch.manual_seed(0)
    model = sb.UNet(2, 8, 8, (1, 2), 1, (), groups=4, fir=True, progressive_input=True)
    layer, x = model.pyramid[0], torch.randn(1, 2, 8, 8)
    blurred = sb.fir_filter(x)  # (1, 2, 9, 9)
    everywhere = torch.nn.functional.conv2d(blurred, layer.conv.weight, layer.conv.bias)
    assert_close(layer(x), everywhere[:, :, ::2, ::2])
    plain = sb.UNet(2, 8, 8, (1, 2), 1, (), groups=4, progressive_input=True).pyramid[0]
    everywhere = torch.nn.functional.conv2d(x, plain.weight, plain.bias, padding=1)
    assert_close(plain(x), everywhere[:, :, ::2, ::2])


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


@pytest.mark.slow
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
    for stage, power in ("down", 0.5), ("mid", 1.0):  # a block; a block and its attention
        found, full = (net.apply_stage(getattr(net, stage)[0], h, emb) for net in (scaled, plain))
        assert_close(found, full / 2**power)
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
    layer = sb.FirDownsample(3, 3)
    assert layer(b).shape == (1, 3, 8, 8) and sb.FirUpsample(3, 2)(a).shape == (1, 2, 16, 16)


def test_fourier_features_are_fixed_and_bounded():
    features = sb.FourierFeatures(2000)
    assert not list(features.parameters()) and "W" in features.state_dict()
    assert features.W.std().item() == pytest.approx(16, rel=0.05)
    out = features(torch.tensor([0.3]))
    assert_close(out[0, :2000] ** 2 + out[0, 2000:] ** 2, torch.ones(2000))


def test_fourier_features_are_sine_and_cosine_of_2_pi_w_t():
    features = sb.FourierFeatures(3)
    features.W.copy_(torch.tensor([0.25, 1.0, -2.0]))
    sin, cos = [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]  # at t = 1
    assert_close(features(torch.ones(1)), torch.tensor([sin + cos]), rtol=0, atol=1e-5)
    t = torch.tensor([-4.6, 0.7, 3.9]).double()
    angles = 2 * math.pi * t[:, None] * features.W.double()
    assert_close(features.double()(t), torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=1e-9)


NETWORKS = {
    "mlp": lambda **o: sb.ScoreMLP(2, 16, 2, **o),
    "unet": lambda **o: sb.UNet(1, 8, 8, (1, 2), 1, (4,), groups=4, **o),
    "ddpmpp": lambda **o: sb.UNet(1, 8, 8, (1, 2), 1, (4,), groups=4, biggan=True, skip_rescale=True, **o),
    "ncsnpp": lambda **o: sb.UNet(1, 8, 8, (1, 2), 1, (4,), groups=4, fir=True, biggan=True,
                                  skip_rescale=True, progressive_input=True, **o),
    "ncsnpp_on_patches": lambda **o: NETWORKS["ncsnpp"](patch=2, **o)}


def awake(network):
    """The network with no weight left at the zero that it starts from."""
    with torch.no_grad():
        for p in network.parameters():
            if not p.any():
                p.normal_(std=0.3)
    return network.eval()


@pytest.mark.slow
@pytest.mark.parametrize("fourier", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_work_in_float64(name, fourier):
    """As they do in float32, through the score, a sampler and the likelihood."""
    torch.manual_seed(0)
    network = awake(NETWORKS[name](fourier=fourier))
    sde = sb.VESDE() if fourier else sb.VPSDE()
    x = torch.randn(3, 2) if name == "mlp" else torch.randn(3, 1, 8, 8)
    t = torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        single = sb.network_eps(network, sde, x, t)
        double = sb.network_eps(network.double(), sde, x.double(), t.double())
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert {c.dtype for c in sde.scaling(t.double(), network.sigma_data)} == {torch.float64}
    assert_close(single.double(), double, rtol=0.02, atol=0.02 if fourier else 1e-3)
    score = Bounded(sb.score_fn(network, sde, clip_x0=True), LIMIT)
    assert sb.euler_maruyama(score, sde, x.shape, 2, xT=x.double()).dtype == torch.float64
    logp = sb.log_likelihood(score, sde, x.double(), "hutchinson", tolerance=0.5, eps=0.3)
    assert logp.dtype == torch.float64 and logp.isfinite().all()
    loss = sb.score_loss(network, sde, x.double(), t=t.double(), eps=x.double())
    loss.backward()
    assert all(p.grad.dtype == torch.float64 for p in network.parameters() if p.grad is not None)


class Wiring:
    """What each stage of a U-Net was given and gave; what changed the size gave, in order."""

    def __init__(self, model):
        self.stages, self.resampled, stage = {}, [], model.apply_stage

        def apply_stage(part, h, emb):
            out = stage(part, h, emb)
            self.stages[part] = (h, out)
            return out

        def remember(part, _, out):
            block = isinstance(part, sb.ResampleBlock)  # whose sum is scaled as in a stage
            self.resampled.append(out * model.rescale if block else out)

        model.apply_stage = apply_stage
        for part in (model.conv_in, *model.down):
            if not isinstance(part, torch.nn.ModuleList):
                part.register_forward_hook(remember)


@pytest.mark.parametrize("name", ["unet", "ddpmpp"])
def test_skip_connections_carry_each_state_of_the_way_down(name):
    """Every block on the way up is given, unscaled, what the way down had there, last in first out."""
    model = awake(NETWORKS[name]())
    wiring = Wiring(model)
    with torch.no_grad():
        model(torch.randn(2, 1, 8, 8), torch.tensor([10.0, 500.0]))
    skips, resampled = [wiring.resampled[0]], iter(wiring.resampled[1:])
    for part in model.down:
        stage = isinstance(part, torch.nn.ModuleList)
        skips.append(wiring.stages[part][1] if stage else next(resampled))
    ups = [part for part in model.up if isinstance(part, torch.nn.ModuleList)]
    assert len(ups) == len(skips)
    for part in ups:
        skip = skips.pop()
        assert skip.abs().max() > 0.01
        assert torch.equal(wiring.stages[part][0][:, -skip.shape[1]:], skip)


@pytest.mark.parametrize("fir", [False, True])
@pytest.mark.parametrize("skip_rescale", [False, True])
def test_progressive_input_is_a_residual_sum_at_every_level(skip_rescale, fir):
    """With all else silent and one tap a convolution: a constant times the weights, each sum scaled."""
    torch.manual_seed(0)
    model = sb.UNet(1, 32, 8, (1, 1, 1), 1, (), groups=4, skip_rescale=skip_rescale, fir=fir,
                    progressive_input=True).eval()
    wiring, scale = Wiring(model), 2**-0.5 if skip_rescale else 1.0
    with torch.no_grad():
        for part in model.down:
            if not isinstance(part, torch.nn.ModuleList):
                part.conv.weight.zero_(), part.conv.bias.fill_(0.5)
        for conv, gain in zip(model.pyramid, (2.0, 3.0), strict=True):
            conv = getattr(conv, "conv", conv)
            conv.weight.zero_(), conv.bias.zero_()
            conv.weight[:, 0, 1, 1] = gain
        stages_of = [part for part in model.down if isinstance(part, torch.nn.ModuleList)]
        dot = torch.zeros(1, 1, 32, 32)
        dot[..., 14, 14] = 1  # reaches one pixel of the next level, 2 x 2 through the FIR filter
        model(dot, torch.ones(1))
        reached = (wiring.stages[stages_of[1]][0][0, 0] - 0.5 * scale).abs() > 1e-3
        assert reached.sum() == (4 if fir else 1)
        model(torch.full((1, 1, 32, 32), 0.7), torch.ones(1))
    stages = [wiring.stages[part][0] for part in stages_of]
    first = (2 * 0.7 + 0.5) * scale
    second = (3 * first + 0.5) * scale
    for h, expected in zip(stages[1:], (first, second), strict=True):
        inside = h[..., 3:-3, 3:-3]
        assert_close(inside, torch.full_like(inside, expected))


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


class Enough(Exception):
    """All that a test wants to see of main has happened."""


@pytest.fixture
def drawn(run_of, tmp_path, monkeypatch):
    """draw(*flags): what --sample with these flags did up to its samples."""
    def draw(*argv, name="digits8"):
        found = SimpleNamespace(plotting=MagicMock())
        found.plotting.samples.side_effect = Enough
        names = ("em_step", "reverse_diffusion_step", "ancestral_step", "langevin_step", "rk4_step",
                 "solve", "tweedie", "process", "score_fn")
        with monkeypatch.context() as patch:
            for part in names:
                setattr(found, part, spy(patch, sb, part))
            late_bound(patch)
            patch.setattr(sb, "plotting", found.plotting)
            patch.setattr(sb.SDE, "prior_sampling", lambda self, shape: torch.ones(shape))
            with pytest.raises(Enough):
                sb.main(["--out", str(tmp_path), "--device", "cpu", "--sample", str(run_of[name]), *argv])
        found.samples = found.plotting.samples.call_args[0][1]
        return found
    return draw


@pytest.mark.slow
def test_main_draws_with_the_sampling_flags(drawn):
    """sampler, N, corrector_steps, snr, tolerance, denoise, n_samples, through --sample."""
    found = drawn("--sampler", "pc", "--N", "3", "--corrector_steps", "2", "--snr", "0.37")
    assert len(found.langevin_step) == 6 and len(found.reverse_diffusion_step) == 3
    assert {call.snr for call in found.langevin_step} == {0.37} and not found.tweedie
    assert found.samples.shape == (4, 1, 8, 8)
    assert len(drawn("--sampler", "em", "--N", "7").em_step) == 7
    assert len(drawn("--sampler", "ancestral", "--N", "4").ancestral_step) == 4
    assert len(drawn("--sampler", "rk4", "--N", "8").rk4_step) == 2
    found = drawn("--sampler", "rk45", "--tolerance", "0.07", "--no-denoise", "--n_samples", "5")
    assert [call.tolerance for call in found.solve] == [0.07]
    assert not found.tweedie and len(found.samples) == 5
    assert len(drawn("--sampler", "rk4", "--N", "8").tweedie) == 1


def test_main_starts_from_noise_times_the_temperature(drawn):
    for temperature in (0.0, 0.6, 1.0):
        found = drawn("--sampler", "em", "--N", "1", "--temperature", str(temperature))
        assert_close(found.em_step[0].x, torch.full((4, 1, 8, 8), temperature))


def test_main_clamps_x0_hat_of_pictures_as_asked(drawn):
    """And divides by no less than std_floor; points are never clamped."""
    sde, t = sb.VPSDE(), torch.full((4,), 0.9)
    for flag, bound in (("--clip_x0", True), ("--no-clip_x0", False)):
        found = drawn("--sampler", "em", "--N", "1", flag, "--std_floor", "0.3")
        x = 5 * torch.ones(4, 1, 8, 8)
        x0_hat = (x + over_std2(sde, t) * found.process[0].score(x, t)) / sde.m(t).view(-1, 1, 1, 1)
        assert (x0_hat.abs().max() <= 1.001) == bound
        assert found.score_fn[0].std_floor == 0.3
    found = drawn("--sampler", "em", "--N", "1", "--clip_x0", "--n_samples", "1", name="gaussians")
    assert not found.score_fn[0].clip_x0 and found.samples.shape == (100, 2)


def over_std2(sde, t):
    """The variance of the kernel, broadcastable over pictures."""
    return sde.std(t).view(-1, 1, 1, 1) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits8", "gaussians"])
@pytest.mark.parametrize("how", ["train", "sample"])
def test_all_that_is_drawn_and_measured_is_of_the_average(name, how, run_of, tmp_path, monkeypatch):
    """Samples, figures, quality and likelihood: the EMA in eval mode, after training and by --sample."""
    argv = ["--preset", "smoke", "--dataset", name] if how == "train" else ["--sample", run_of[name]]
    evaluate = ["--evaluate", "10"] if name == "digits8" else []
    behind, real = {}, sb.score_fn
    calls = {part: spy(monkeypatch, sb, part, lambda *a, **k: None) for part in vars(sb)
             if part.startswith(("figure_", "measure_"))}

    def score_fn(model, *args, **kwargs):
        score = real(model, *args, **kwargs)
        behind[score] = model
        return score

    monkeypatch.setattr(sb, "score_fn", score_fn)
    monkeypatch.setattr(sb, "plotting", MagicMock())
    monkeypatch.setattr(sb.quality, "glance", lambda *args: {})
    scored = spy(monkeypatch, runs.Run, "quality", lambda *a, **k: {})
    process = spy(monkeypatch, sb, "process")
    sb.main(list(map(str, [*argv, "--device", "cpu", "--out", tmp_path, "--sampler", "em", *evaluate])))
    folder = run_of[name] if how == "sample" else only_run(tmp_path, "score_based")
    cfg = sb.PRESETS["smoke"]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len({str(state[part].values()) for part in ("ema", "model")}) == 2

    used = [call for part in calls.values() for call in part]
    used = [call for call in used if not getattr(call, "step", None)]  # the previews aside
    points = name == "gaussians"
    assert {part for part, found in calls.items() if found} >= (
        {"figure_sdes", "figure_loss", "figure_fields", "figure_paths", "figure_walk", "figure_density",
         "measure_points"}
        if points else {"figure_sdes", "figure_loss", "figure_denoising", "figure_samplers",
                        "figure_guardrails", "figure_codes", "figure_inpainting", "measure_bits"})
    models = [call.model for call in used if hasattr(call, "model")]
    models += [behind[call.score] for call in [*used, *process] if hasattr(call, "score")]
    models += [call.network for call in scored]
    for model in models:
        assert not model.training
        assert_close(dict(model.state_dict()), dict(state["ema"]), rtol=0, atol=0)
    if not points:
        assert [call.steps for call in scored] == [5]
        process.clear()
        next(scored[0].states(range(2)))
        next(calls["measure_samplers"][0].states(range(2), cfg=replace(cfg, sampler="rk4"), calls=8))
        assert [(call.cfg.sampler, call.calls) for call in process] == [("em", None), ("rk4", 8)]
        assert all(behind[call.score] in models for call in process)


def test_bits_are_of_held_out_pictures_and_of_a_score_that_is_not_clamped(tmp_path, monkeypatch):
    asked = spy(monkeypatch, sb, "bits_per_dim", lambda score, sde, x, **how: torch.arange(len(x)) + 2.0)
    scores = spy(monkeypatch, sb, "score_fn")
    for argv, n in ([], 2), (["--likelihood", "3", "--tolerance", "0.3"], 3), (["--evaluate", "10"], 500):
        cfg, run, data = opened(tmp_path, *argv)
        model = sb.make_network(cfg, data.shape)
        sb.measure_bits(run, cfg, model, sb.make_sde(cfg), data)
        found = run.read_metrics()["bits_per_dim"]
        x = torch.cat([call.x for call in asked])
        assert torch.equal(x, data.test[:n]) and found["n"] == n
        assert {call.how["tolerance"] for call in asked} == {cfg.tolerance}
        assert scores[-1].model is model and not scores[-1].clip_x0
        if n < 100:
            values = torch.arange(n) + 2.0
            assert found["mean"] == pytest.approx(values.mean().item())
            assert found["standard_error"] == pytest.approx(values.std().item() / n**0.5)
        asked.clear()
    cfg, run, data = opened(tmp_path, "--likelihood", "0")
    sb.measure_bits(run, cfg, model, sb.make_sde(cfg), data)
    assert not asked and "bits_per_dim" not in run.read_metrics()


@pytest.mark.slow
def test_densities_and_likelihoods_of_points_against_the_truth(tmp_path, monkeypatch):
    """The exact score of the eight Gaussians is right, that of eight between them is all wrong."""
    cfg, run, data = opened(tmp_path, "--dataset", "gaussians", "--tolerance", 1e-3, "--likelihood", 300)
    sde = sb.VPSDE()

    def exact(turn):
        angles = torch.arange(8).double() * math.pi / 4 + turn
        centres = 1.4 * torch.stack([angles.cos(), angles.sin()], 1)
        data = Mixture(sde, (1 / 8,) * 8, centres.tolist(), (0.1,) * 8)
        return Bounded(lambda x, t: data(x.double(), t.double()).to(x.dtype), LIMIT)

    monkeypatch.setattr(sb, "plotting", MagicMock())
    sb.figure_density(run, cfg, exact(math.pi / 8), sde, data, side=50)
    density = run.read_metrics()["density"]
    assert density["sums_to"] == pytest.approx(1, abs=0.02)
    assert density["total_variation"] == pytest.approx(1, abs=0.03)
    score = exact(0)
    sb.figure_density(run, cfg, score, sde, data, side=50)
    density = run.read_metrics()["density"]
    assert density["sums_to"] == pytest.approx(1, abs=0.02) and density["total_variation"] < 0.03
    sb.measure_points(run, cfg, score, sde, data, load_points("gaussians", n=4000, seed=5).train)
    found = run.read_metrics()
    assert found["likelihood"]["n"] == 300
    assert found["likelihood"]["nats"] == pytest.approx(found["likelihood"]["nats_of_the_truth"], abs=0.02)
    assert found["samples"]["energy_distance"] < 3 * found["samples"]["energy_distance_of_data"] < 0.1
    sb.measure_points(run, replace(cfg, likelihood=0), score, sde, data, 0.3 * data.test[:2000])
    far = run.read_metrics()["samples"]
    assert far["energy_distance"] > 20 * far["energy_distance_of_data"]


@pytest.mark.parametrize("name", ["vp", "ve", "subvp"])
def test_figure_samplers_has_a_row_for_every_sampler_of_the_sde(name, tmp_path, monkeypatch):
    """Each named with its calls of the network: N of its steps, an ODE's Tweedie, from one noise."""
    cfg, run, data = opened(tmp_path, "--dataset", "digits8", "--sde", name, "--N", 8)
    sde, model = sb.make_sde(cfg), sb.make_network(cfg, data.shape)
    plotting, process = MagicMock(), spy(monkeypatch, sb, "process")
    monkeypatch.setattr(sb, "plotting", plotting)
    sb.figure_samplers(run, cfg, model, sb.score_fn(model, sde), sde, data.shape,
                       {"ancestral, corrector": {"legible": 0.515}})
    rows, labels = plotting.table.call_args[0][1], plotting.table.call_args[0][3]
    calls = {label.split("\n")[0]: int(label.split("\n")[1].split()[0]) for label in labels}
    names = [each for each in sb.make_methods(cfg, sde) if each != "ODE, RK4"]
    assert list(calls) == names
    calls.pop("ODE, RK45")
    assert calls.pop("corrector alone") == 9  # and Tweedie
    assert calls == dict.fromkeys(calls, 8)
    legible = [name for name, label in zip(names, labels, strict=True) if ", 52% legible" in label]
    assert legible == [name for name in names if name == "ancestral, corrector"]
    assert ("ancestral" in calls) == (name != "subvp")
    assert all(row.shape == (10, 1, 8, 8) for row in rows) and len(rows) == len(labels)
    assert all(torch.equal(call.xT, process[0].xT) for call in process)


def test_points_take_the_preset_of_their_name():
    for name in POINTS:
        assert parse_args(sb.Config, sb.PRESETS, ["--dataset", name])[0] == sb.PRESETS[name]
        assert sb.PRESETS[name].dataset == name and not sb.PRESETS[name].dequantize
        cfg, _ = parse_args(sb.Config, sb.PRESETS, ["--dataset", name, "--preset", "smoke"])
        assert cfg == replace(sb.PRESETS["smoke"], dataset=name)


BAD = [
    (["--sigma_min", "100"], "--sigma_min 100.0: must be below --sigma_max 100.0"),
    (["--beta_min", "30"], "--beta_min 30.0: must be below"),
    (["--steps", "0"], "--steps 0"), (["--N", "0"], "--N 0: must be >= 1"),
    (["--snr", "0"], "--snr 0.0: must be > 0"), (["--sde", "vpx"], "--sde: invalid choice: 'vpx'"),
    (["--sampler", "heun"], "--sampler: invalid choice"), (["--beta", "sigmoid"], "--beta: invalid choice"),
    (["--sde", "subvp", "--sampler", "ancestral"], "--sampler ancestral: must be one of em"),
    (["--dataset", "color_digits", "--likelihood", "5"], "--likelihood 5: --dataset color_digits"),
    (["--dataset", "digits8", "--likelihood", "5"], "--likelihood 5: --dataset digits8"),
    (["--image_size", "30"], "--image_size 30: must be a multiple of 4"),
    (["--dataset", "swiss_roll", "--evaluate"], "--evaluate 500: --dataset swiss_roll has no labels"),
    (["--dataset", "swissroll"], "--dataset swissroll: must be one of"),
    (["--temperature", "-1"], "--temperature -1.0"), (["--std_floor", "-1"], "--std_floor -1.0"),
    (["--tolerance", "1"], "--tolerance 1.0: must be in (0, 1)"),
    (["--corrector_steps", "-1"], "--corrector_steps -1: must be >= 0"),
    (["--likelihood", "-1"], "--likelihood -1: must be >= 0"),
    (["--ema", "1"], "--ema 1.0: must be in [0, 1)"),
    (["--groups", "3"], "--groups 3: must divide channels 8"), (["--heads", "3"], "--heads 3: must divide"),
    (["--dataset", "swiss_roll", "--flip"], "--flip needs images: --dataset swiss_roll has none"),
]


@pytest.mark.slow
@pytest.mark.parametrize("argv, message", BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input_ends_with_one_line(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sb.main(["--preset", "smoke", "--out", str(tmp_path / "out"), *argv])
    captured = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(captured) == 1
    assert captured[0].startswith("error: ") and message in captured[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sde", ["vp", "ve"])
def test_smoke_run_on_images(sde, tmp_path, capsys):
    result = run_script("score_based_diffusion_example.py", "--preset", "smoke", "--sde", sde,
                        "--out", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    run = only_run(tmp_path / "out", "score_based")
    pictures = ["sdes.png", "loss.png", "preview.png", "samples.png", "samplers.png",
                "guardrails.png", "codes.png", "inpainting.png", "denoising.gif"]
    for name in pictures:
        open_picture(run / name)
    found = json.loads((run / "metrics.json").read_text())
    assert found["bits_per_dim"]["n"] == 2 and math.isfinite(found["bits_per_dim"]["mean"])
    if sde != "ve":
        return
    # sampling takes the SDE and its constants from the checkpoint and from nowhere else
    sb.main(["--sample", str(run), "--sampler", "em", "--out", str(tmp_path / "again")])
    with pytest.raises(SystemExit) as stop:
        sb.main(["--sample", str(run), "--sigma_max", "5", "--out", str(tmp_path / "no")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "--sigma_max 5.0" in error and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_smoke_run_on_points(tmp_path):
    sb.main(["--preset", "smoke", "--dataset", "two_moons", "--device", "cpu", "--out", str(tmp_path)])
    run = only_run(tmp_path, "score_based")
    for picture in ("sdes.png", "loss.png", "samples.png", "scores.png", "paths.png", "density.png",
                    "denoising.gif"):
        open_picture(run / picture)
    found = json.loads((run / "metrics.json").read_text())
    assert found["samples"]["energy_distance"] > 0 and math.isfinite(found["likelihood"]["nats"])


@pytest.mark.slow
def test_a_stopped_run_of_points_resumes_to_the_last_bit(tmp_path):
    """With the random frequencies that VE's network was made with."""
    how = ("--dataset", "swiss_roll", "--sde", "ve")
    cfg, whole, data = opened(tmp_path / "a", *how)
    sb.train(cfg, whole, data)
    cfg, half, data = opened(tmp_path / "b", *how)
    log = half.log

    def stop(**values):  # as by Ctrl-C in the third step
        log(**values)
        half.stopped = half.step == 2

    half.log = stop
    sb.train(cfg, half, data)
    states = {name: torch.load(run.path("checkpoint.pt"), weights_only=True)
              for name, run in (("whole", whole), ("half", half))}
    assert (states["whole"]["step"], states["half"]["step"]) == (6, 3)
    cfg, again, data = opened(tmp_path / "b", "--resume")
    sb.train(cfg, again, data)
    assert_same_tree(torch.load(half.path("checkpoint.pt"), weights_only=True), states["whole"])
    assert half.path("log.csv").read_text() == whole.path("log.csv").read_text()
