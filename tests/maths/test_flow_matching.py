"""The mathematics of flow_matching_example.py against closed forms and the other pages."""

import math

import ddim_example as ddim
import flow_matching_example as flow
import score_based_diffusion_example as score_based

import pytest
import torch
from conftest import mixture_eps
from torch.testing import assert_close

PATHS = [flow.StraightPath(), flow.StraightPath(0.1), flow.VPPath()]
every_path = pytest.mark.parametrize("path", PATHS, ids=["straight", "sigma_min 0.1", "vp"])
MU, LAMBDA = torch.tensor([0.7, -0.4], dtype=torch.float64), 0.3


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def at(t, x):
    """The time t for each example of x."""
    return torch.full((len(x),), t, dtype=torch.float64)


def numbers(path, t):
    """a, s and their derivatives by t, as floats."""
    return [c.item() for c in path.coefficients(torch.tensor(t, dtype=torch.float64))]


def shaped(path, t, x):
    """The same for times t: (B,), shaped for x."""
    return [flow.per_example(c, x) for c in path.coefficients(t)]


def gaussian_velocity(path, mu=MU, lam=LAMBDA):
    """The exact v(x, t) where x_1 ~ N(mu, lam I): E[a' x_1 + s' x_0 | x_t = x]."""
    def v(x, t):
        a, s, da, ds = shaped(path, t, x)
        gap = (x - a * mu) / (a**2 * lam + s**2)
        return da * (mu + a * lam * gap) + ds * s * gap

    return v


# Paths


@every_path
def test_a_path_leads_from_noise_to_the_example_and_its_velocity_is_its_derivative(path):
    """[FM] Eq. 13, by differences; and Eq. 15, with its division by s."""
    x0, x1, h = normal(64, 2), normal(64, 2, seed=1), 1e-5
    t = torch.linspace(0.01, 0.98, 64, dtype=torch.float64)
    velocity = (path.interpolate(x0, x1, t + h) - path.interpolate(x0, x1, t - h)) / (2 * h)
    assert_close(path.velocity(x0, x1, t), velocity, rtol=1e-5, atol=1e-6)
    xt, (a, s, da, ds) = path.interpolate(x0, x1, t), shaped(path, t, x1)
    assert_close(ds / s * (xt - a * x1) + da * x1, path.velocity(x0, x1, t))
    assert numbers(path, 0.0)[:2] == pytest.approx([0, 1], abs=7e-3)  # VP: a = e^(-5)
    assert numbers(path, path.t_end)[:2] == pytest.approx([1, getattr(path, "sigma_min", 0.0)], abs=2e-3)


def test_the_straight_path_is_that_of_the_paper():
    """[FM] Eq. 22 and 23 with sigma_min = 0.1; sigma_min = 0 is the line of [RF]."""
    x0, x1, path = normal(8, 2), normal(8, 2, seed=1), flow.StraightPath(0.1)
    assert_close(path.interpolate(x0, x1, at(0.25, x0)), (1 - 0.9 * 0.25) * x0 + 0.25 * x1)
    assert_close(path.velocity(x0, x1, at(0.25, x0)), x1 - 0.9 * x0)
    assert_close(flow.StraightPath().velocity(x0, x1, at(0.25, x0)), x1 - x0)


@every_path
def test_x1_hat_solves_for_the_example(path):
    """Even at t = 0 and at the end, where other formulas divide by 0."""
    x0, x1 = normal(4, 2), normal(4, 2, seed=1)
    t = torch.tensor([0.0, 0.3, 0.9, path.t_end], dtype=torch.float64)
    xt, v = path.interpolate(x0, x1, t), path.velocity(x0, x1, t)
    assert_close(path.predict_x1(xt, v, t), x1)


def test_the_vp_path_is_the_probability_flow_of_the_vp_sde():
    """[SDE] Eq. 13 under t -> 1 - t, with the exact score of a Gaussian."""
    path, sde, x = flow.VPPath(0.1, 20.0), score_based.VPSDE(0.1, 20.0), normal(50, 2)

    def score(x, t):
        m, std = (score_based.per_example(c(t), x) for c in (sde.m, sde.std))
        return -(x - m * MU) / (m**2 * LAMBDA + std**2)

    for t in (0.0, 0.2, 0.7, 0.99):
        drift = score_based.flow_drift(score, sde, x, 1 - t)
        assert_close(gaussian_velocity(path)(x, at(t, x)), -drift)


# The objective


def test_the_gradient_is_that_of_the_marginal_objective():
    """[FM] Theorem 2: regression on conditional velocities has the slope of that on the exact field."""
    path, n = flow.StraightPath(), 100_000
    x0, x1 = normal(n, 2), MU + math.sqrt(LAMBDA) * normal(n, 2, seed=1)
    t = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    xt, slopes = path.interpolate(x0, x1, t), []
    for target in (path.velocity(x0, x1, t), gaussian_velocity(path)(xt, t)):
        weight = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
        loss = (weight[0] * xt + weight[1] * t[:, None] - target).square().mean()
        slopes.append(torch.autograd.grad(loss, weight)[0])
    assert_close(*slopes, atol=0.02, rtol=0)


@pytest.mark.parametrize("lam", [0.3, 1.0])
def test_the_smallest_loss_is_not_zero(lam):
    """At t it is lam / (t^2 lam + (1 - t)^2) a dimension, over uniform t sqrt(lam) pi / 2."""
    path, n = flow.StraightPath(), 100_000
    v = gaussian_velocity(path, lam=lam)
    x0, x1 = normal(n, 2), MU + math.sqrt(lam) * normal(n, 2, seed=1)
    for t in (0.0, 0.4, 0.8):
        loss = flow.cfm_loss(v, path, x0, x1, at(t, x0))
        assert loss.item() == pytest.approx(lam / (t**2 * lam + (1 - t) ** 2), rel=0.02)
    t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert flow.cfm_loss(v, path, x0, x1, t).item() == pytest.approx(math.sqrt(lam) * math.pi / 2, rel=0.02)


@pytest.mark.parametrize("drawing", ["uniform", "logit_normal"])
@every_path
def test_times_are_drawn_as_they_say(path, drawing):
    t = torch.cat([flow.draw_time(64, path, drawing) for _ in range(2000)])
    assert 0 <= t.min() and t.max() <= path.t_end
    u = torch.linspace(0.05, 0.95, 19)
    share = torch.stack([(t < bound).float().mean() for bound in u])
    wanted = u if drawing == "uniform" else u / 16 + torch.special.ndtr(torch.logit(u) + 1) * 15 / 16
    assert_close(share, wanted, atol=0.006, rtol=0)
    one = flow.draw_time(64, path, "uniform")  # one in each quantile
    assert torch.equal((one * 64).long().clamp(max=63), torch.arange(64))


# Couplings


def test_an_ot_coupling_keeps_both_parts_and_costs_least():
    x0, x1 = normal(40, 2), normal(40, 2, seed=1) + 1
    i = flow.ot_coupling(x0, x1)
    assert torch.equal(i.sort().values, torch.arange(40))

    def cost(j):
        return (x0 - x1[j]).square().sum()

    assert cost(i) < min(cost(torch.randperm(40)) for _ in range(200))
    line0, line1 = x0[:, :1], x1[:, :1]  # on a line the least cost is in the order of the numbers
    i = flow.ot_coupling(line0, line1)
    assert torch.equal(line1[i].argsort(0), line0.argsort(0))


def test_rectifying_a_gaussian_lowers_the_cost():
    """[RF] Thm. 3.5: from 1 + lam a dimension, of independent pairs, to (sqrt(lam) - 1)^2."""
    lam, x0 = 0.3, normal(400, 2)
    v = gaussian_velocity(flow.StraightPath(), mu=0 * MU, lam=lam)
    x1 = flow.final(flow.flow_process(v, x0, sampler="rk45", tolerance=1e-8))
    assert_close(x1, math.sqrt(lam) * x0, rtol=1e-6, atol=1e-6)
    cost = ((x1 - x0).square().mean() / x0.square().mean()).item()
    assert cost == pytest.approx((math.sqrt(lam) - 1) ** 2, rel=1e-4) and cost < (1 + lam) / 5


# Sampling


@every_path
def test_the_noise_that_is_found_counts_as_often_as_it_says(path):
    """v = a' x1_hat + s' x0_hat becomes a' x1_hat + scale s' x0_hat."""
    x0, x1, t = normal(9, 2), normal(9, 2, seed=1), torch.linspace(0.0, 0.99, 9, dtype=torch.float64)
    xt, (_, _, da, ds) = path.interpolate(x0, x1, t), shaped(path, t, x1)

    def v(x, t):
        return path.velocity(x0, x1, t)

    assert_close(flow.scaled_noise(v, path, 1.0)(xt, t), v(xt, t))
    assert_close(flow.scaled_noise(v, path, 1.5)(xt, t), da * x1 + 1.5 * ds * x0)


@pytest.mark.parametrize("sampler, order", [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_the_samplers_have_their_order(sampler, order):
    """On two Gaussians, whose flow bends, against RK45; on one alone midpoint happens to have order 3."""
    path = flow.StraightPath(0.1)

    def v(x, t):
        a, s, _, _ = shaped(path, t, x)
        log_p = torch.cat([-(x - a * mu).square().sum(1, True) / (2 * (a**2 * 0.1 + s**2))[:, :1]
                           for mu in (MU, -MU)], 1)
        fields = torch.stack([gaussian_velocity(path, mu, 0.1)(x, t) for mu in (MU, -MU)], 1)
        return (log_p.softmax(1)[:, :, None] * fields).sum(1)

    x0, errors = normal(20, 2), []
    wanted = flow.final(flow.flow_process(v, x0, sampler="rk45", tolerance=1e-9))
    for S in (60, 120):
        states = list(flow.flow_process(v, x0, sampler=sampler, S=S))
        assert [t for t, _ in states] == pytest.approx([i / S for i in range(S + 1)])
        errors.append((states[-1][1] - wanted).square().mean().sqrt().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@every_path
def test_the_flow_goes_to_the_data_and_back(path):
    x0, v, (a, s, *_), a0 = normal(20, 2), gaussian_velocity(path), numbers(path, path.t_end), numbers(path, 0.0)[0]
    x1 = flow.final(flow.flow_process(v, x0, 0.0, path.t_end, "rk45", tolerance=1e-9))
    start = math.sqrt(a0**2 * LAMBDA + 1 - a0**2)  # VP: not quite N(0, I) at t = 0
    assert_close(x1, a * MU + math.sqrt(a**2 * LAMBDA + s**2) * (x0 - a0 * MU) / start, rtol=1e-5, atol=1e-5)
    back = flow.final(flow.flow_process(v, x1, path.t_end, 0.0, "rk45", tolerance=1e-9))
    assert_close(back, x0, rtol=1e-5, atol=1e-5)


def diffused(t):
    """alpha_bar and the scale of x_t on the straight path: t / scale = sqrt(alpha_bar)."""
    scale = math.hypot(t, 1 - t)
    return (t / scale) ** 2, scale


def test_an_euler_step_is_a_ddim_step():
    """In the variables of the diffusion: x / sqrt(t^2 + (1 - t)^2), alpha_bar = t^2 / (t^2 + (1 - t)^2)."""
    t, s, x = 0.35, 0.5, normal(30, 2, 1, 1)
    (bar_t, scale_t), (bar_s, scale_s) = diffused(t), diffused(s)
    alpha_bars = torch.tensor([bar_s, bar_t], dtype=torch.float64)
    eps_hat = mixture_eps(alpha_bars)(x / scale_t, torch.ones(30, dtype=torch.int64))
    euler = flow.euler_step(lambda x, t: (x - eps_hat) / flow.per_example(t, x), x, t, s - t)
    step = ddim.ddim_step(x / scale_t, eps_hat, 1, 0, alpha_bars)
    assert_close(euler / scale_s, step, rtol=1e-12, atol=1e-12)


class Labelled:
    """A network that knows each component of a mixture; it is asked at 1000 t."""

    classes = 3

    def __init__(self):
        self.asked = []

    def __call__(self, x, t, y=None):
        self.asked.append(y)
        t = t[0].item() / 1000
        alpha_bar, scale = diffused(t)
        exact = mixture_eps(torch.tensor([1.0, alpha_bar], dtype=torch.float64))
        eps_hat = exact(x / scale, torch.ones(len(x), dtype=torch.int64), y)
        return (x - eps_hat) / t


def test_velocity_score_and_noise_say_the_same():
    """v = (x + (1 - t) score) / t = (x - eps_hat) / t on the straight path, for a mixture."""
    t, x = 0.6, normal(30, 2, 1, 1)
    v = flow.velocity_fn(Labelled())(x, at(t, x))
    eps_hat = x - t * v
    probe = x.clone().requires_grad_()
    exact = mixture_eps(torch.ones(1, dtype=torch.float64))
    cov = t**2 * exact.covs + (1 - t) ** 2 * torch.eye(2, dtype=torch.float64)
    density = torch.distributions.MultivariateNormal(t * exact.means, cov)
    log_p = (density.log_prob(probe.flatten(1)[:, None]) + exact.weights.log()).logsumexp(1)
    score, = torch.autograd.grad(log_p.sum(), probe)
    assert_close(v, (x + (1 - t) * score) / t)
    assert_close(flow.StraightPath().predict_x1(x, v, at(t, x)), (x - (1 - t) * eps_hat) / t)


def test_guidance_of_the_velocity_is_guidance_of_the_noise():
    x, y, network = normal(12, 2, 1, 1), torch.arange(12) % 3, Labelled()
    eps = {w: x - 0.4 * flow.velocity_fn(network, y, w)(x, at(0.4, x)) for w in (-1.0, 0.0, 1.5)}
    assert_close(eps[1.5], 2.5 * eps[0.0] - 1.5 * eps[-1.0])
    assert_close(eps[-1.0], x - 0.4 * flow.velocity_fn(network)(x, at(0.4, x)))  # the null class
    assert (eps[0.0] - eps[-1.0]).abs().max() > 0.1
    assert sorted({len(y) for y in network.asked if y is not None}) == [12, 24]


# Likelihood


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@every_path
def test_the_likelihood_of_gaussian_data(path, trace):
    x, (a, s, *_) = MU + math.sqrt(LAMBDA) * normal(50, 2), numbers(path, path.t_end)
    found = flow.log_likelihood(gaussian_velocity(path), x, trace, path.t_end, 1e-8)
    wanted = torch.distributions.Normal(a * MU, math.sqrt(a**2 * LAMBDA + s**2)).log_prob(x).sum(1)
    # The field is isotropic, so that Hutchinson's estimate is exact; VP's p_0 is not quite N(0, I)
    assert_close(found, wanted, atol=0.02 if path is PATHS[2] else 1e-5, rtol=0)


def test_hutchinson_s_trace_is_right_on_average():
    cov = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)

    def v(x, t):
        t = t[0]
        gap = torch.linalg.solve(t**2 * cov + (1 - t) ** 2 * torch.eye(2, dtype=torch.float64), x.T).T
        return t * gap @ cov - (1 - t) * gap

    x = normal(1, 2).expand(3000, 2)
    exact = flow.log_likelihood(v, x[:1], "exact", tolerance=1e-7)
    wanted = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), cov).log_prob(x[:1])
    assert_close(exact, wanted, atol=1e-5, rtol=0)
    found = flow.log_likelihood(v, x, "hutchinson", tolerance=1e-5)
    assert found.std() > 0.01
    assert_close(found.mean(), exact[0], atol=6 * found.std().item() / 3000**0.5, rtol=0)


def test_bits_per_dim_of_uniform_noise_are_eight():
    """A flow that does nothing has log p = log N(x; 0, I): the offset and the sign are known."""
    x = torch.randint(0, 256, (4, 1, 8, 8)) / 127.5 - 1
    bits = flow.bits_per_dim(lambda x, t: 0 * x, x)
    wanted = (0.5 * math.log(2 * math.pi) + 0.5 * x.square().flatten(1).mean(1)) / math.log(2) + 7
    assert_close(bits, wanted, atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="8-bit"):
        flow.bits_per_dim(lambda x, t: 0 * x, x * 0.999)
