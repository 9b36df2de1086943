"""The mathematics and the network of ddpm_example.py, against closed forms."""

import math

import ddpm_example as ddpm

import numpy as np
import pytest
import torch
from conftest import ExactEps, gaussian_eps, mean_and_cov, mixture_eps, open_run, spied
from scipy import stats
from torch import nn
from torch.testing import assert_close

ONE, ZERO = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
KINDS = ("linear", "cosine")


# Forward process


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 2, 5, 10, 100, 1000, 4000])
def test_schedule_is_indexed_like_the_paper_and_ends_in_noise(kind, T):
    schedule = ddpm.make_schedule(kind, T)
    for array in (schedule.betas, schedule.alphas, schedule.alpha_bars):
        assert array.shape == (T + 1,) and array.dtype == torch.float32
    assert schedule.T == T
    assert schedule.betas[0] == 0 and schedule.alphas[0] == 1 and schedule.alpha_bars[0] == 1
    assert (schedule.betas[1:] > 0).all() and schedule.betas.max() <= 0.9991
    assert (schedule.alpha_bars.diff() < 0).all()
    assert schedule.alpha_bars[-1] < (1e-4 if T >= 5 else 2e-3)
    # alpha_bars is the product of the betas as they are after capping, not of the formula's
    assert_close(schedule.alphas, 1 - schedule.betas)
    product = (1 - schedule.betas.double()).cumprod(0).float()
    assert_close(schedule.alpha_bars, product, rtol=2e-3, atol=1e-7)


def test_linear_schedule_has_the_values_of_the_paper():
    betas = ddpm.make_schedule("linear", 1000).betas[1:]
    assert_close(betas, torch.linspace(1e-4, 0.02, 1000))
    assert_close(ddpm.make_schedule("linear", 1000).alpha_bars[-1].item(), 4.0358e-5, rtol=1e-3,
                 atol=0)


def test_linear_schedule_is_rescaled_for_another_number_of_steps():
    full, tenth = ddpm.make_schedule("linear", 1000), ddpm.make_schedule("linear", 100)
    assert_close(tenth.betas[1:], torch.linspace(1e-3, 0.2, 100))
    for share in (0.1, 0.3, 0.5):  # so alpha_bar is about the same function of t / T
        a, b = full.alpha_bars[int(1000 * share)], tenth.alpha_bars[int(100 * share)]
        assert_close(a, b, rtol=0.12, atol=0)
    assert ddpm.make_schedule("linear", 10).betas.max().item() == pytest.approx(0.999)


def test_cosine_schedule_is_that_of_nichol_and_dhariwal():
    T = 1000
    schedule = ddpm.make_schedule("cosine", T)
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    assert_close(schedule.alpha_bars[:-1], torch.from_numpy(f / f[0]).float()[:-1], rtol=1e-4,
                 atol=1e-7)
    assert schedule.betas[-1].item() == pytest.approx(0.999)
    assert_close(schedule.alpha_bars[-1], 0.001 * schedule.alpha_bars[-2], rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [10, 1000])
def test_iterating_eq_2_gives_eq_4(kind, T):
    schedule = ddpm.make_schedule(kind, T)
    scale, variance = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for t in range(1, T + 1):  # the maps are linear: their two coefficients say everything
        scale = ddpm.q_step(scale, t, ZERO, schedule)
        keep, add = ddpm.q_step(ONE, t, ZERO, schedule), ddpm.q_step(ZERO, t, ONE, schedule)
        variance = keep**2 * variance + add**2
        assert_close(ddpm.q_sample(ONE, t, ZERO, schedule.alpha_bars), scale, rtol=1e-3, atol=1e-5)
        assert_close(ddpm.q_sample(ZERO, t, ONE, schedule.alpha_bars) ** 2, variance, rtol=1e-3,
                     atol=1e-5)


def test_q_sample_takes_one_t_or_one_a_picture_and_0_is_clean():
    schedule = ddpm.make_schedule("linear", 20)
    x0, eps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    many = ddpm.q_sample(x0, torch.tensor([0, 7, 20]), eps, schedule.alpha_bars)
    for i, t in enumerate((0, 7, 20)):
        assert_close(many[i : i + 1], ddpm.q_sample(x0[i : i + 1], t, eps[i : i + 1],
                                                    schedule.alpha_bars))
    assert_close(many[0], x0[0])


@pytest.mark.parametrize("t", [2, 3, 6, 10])
def test_q_posterior_is_the_normalised_product_of_two_gaussians(t):
    schedule = ddpm.make_schedule("linear", 10)
    x0, xt = 0.7, -0.4
    beta, alpha_bar_prev = schedule.betas[t].item(), schedule.alpha_bars[t - 1].item()
    grid = np.linspace(-9, 9, 400_001)
    density = (stats.norm.pdf(xt, math.sqrt(1 - beta) * grid, math.sqrt(beta))
               * stats.norm.pdf(grid, math.sqrt(alpha_bar_prev) * x0, math.sqrt(1 - alpha_bar_prev))
               )
    density /= density.sum()
    mean = (density * grid).sum()
    variance = (density * (grid - mean) ** 2).sum()
    found_mean, found_variance = ddpm.q_posterior(x0 * ONE, xt * ONE, t, schedule)
    assert_close(found_mean.item(), mean, rtol=1e-4, atol=1e-5)
    assert_close(found_variance.item(), variance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_q_posterior_at_t_1_is_x0_without_variance(kind):
    schedule = ddpm.make_schedule(kind, 50)
    mean, variance = ddpm.q_posterior(0.3 * ONE, -2.0 * ONE, 1, schedule)
    assert variance.item() == 0
    assert_close(mean, 0.3 * ONE)


def test_q_posterior_of_a_batch_of_t():
    schedule = ddpm.make_schedule("linear", 30)
    x0, xt, ts = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), [1, 15, 30]
    mean, variance = ddpm.q_posterior(x0, xt, torch.tensor(ts), schedule)
    for i, t in enumerate(ts):
        one_mean, one_variance = ddpm.q_posterior(x0[i : i + 1], xt[i : i + 1], t, schedule)
        assert_close(mean[i : i + 1], one_mean)
        assert_close(variance[i : i + 1], one_variance)


# Training objective


def test_logit_normal_t_are_the_sigmoid_of_a_normal_one_in_each_nth_but_for_one_of_sixteen():
    T, n, normal = 1000, 64, torch.distributions.Normal(-0.2, 1)
    t = torch.stack([ddpm.draw_t(n, T, "logit_normal") for _ in range(1000)])
    assert t.dtype == torch.int64 and t.shape == (1000, n) and t.min() == 1 and t.max() == T
    for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        below = (t <= T * share).double().mean(1)
        wanted = (share + 15 * normal.cdf(torch.logit(torch.tensor(share))).item()) / 16
        assert below.mean() == pytest.approx(wanted, abs=0.006)
    assert (t <= 500).double().mean(1).std() < 0.03  # of independent draws 0.062
    assert torch.bincount(t[:, 10])[228:245].count_nonzero() >= 10  # from a part, not its middle
    assert set(ddpm.draw_t(1000, 1, "logit_normal").tolist()) == {1}
    assert set(ddpm.draw_t(1000, 2, "logit_normal").tolist()) == {1, 2}


def test_uniform_t_are_on_1_to_T_and_each_picture_gets_the_noise_of_its_own():
    schedule, seen = ddpm.make_schedule("linear", 5), []
    t = ddpm.draw_t(20_000, 5, "uniform")
    assert t.dtype == torch.int64 and t.shape == (20_000,)
    shares = torch.bincount(t, minlength=7).double() / len(t)
    assert_close(shares, torch.tensor([0, 0.2, 0.2, 0.2, 0.2, 0.2, 0]).double(), rtol=0, atol=0.02)

    def network(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)

    x0, eps = torch.zeros(20_000, 1, 1, 1), torch.randn(20_000, 1, 1, 1)
    ddpm.ddpm_loss(network, x0, t, eps, schedule)
    x, asked = seen[0]
    assert torch.equal(asked, t)
    for value in range(1, 6):
        assert_close(x[t == value].var(), 1 - schedule.alpha_bars[value], rtol=0.1, atol=0)


def test_loss_is_the_mean_squared_error_of_eps():
    schedule = ddpm.make_schedule("linear", 10)
    x0, eps = torch.rand(6, 1, 4, 4) * 2 - 1, torch.randn(6, 1, 4, 4)
    t = torch.tensor([1, 2, 4, 6, 9, 10])

    def knows(xt, t):  # solves Eq. 4 for eps, knowing x0
        alpha_bar = schedule.alpha_bars[t].view(-1, 1, 1, 1)
        return (xt - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

    loss = ddpm.ddpm_loss(knows, x0, t, eps, schedule)
    assert loss.shape == ()
    assert_close(loss.item(), 0.0, atol=1e-8, rtol=0)
    half = ddpm.ddpm_loss(lambda x, t: knows(x, t) / 2, x0, t, eps, schedule)
    assert_close(half, (eps**2).mean() / 4, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("t", [1, 30, 100])
def test_loss_of_the_exact_eps_is_the_variance_that_no_network_can_remove(t):
    schedule = ddpm.make_schedule("linear", 100)
    exact = ExactEps(schedule.alpha_bars, [1.0], [[0.0]], [[[0.25]]])
    x0, _ = exact.draw(50_000)
    given = x0, torch.full((50_000,), t), torch.randn_like(x0), schedule
    loss = ddpm.ddpm_loss(exact, *given)
    alpha_bar = schedule.alpha_bars[t].item()  # Var[eps | x_t] of a Gaussian
    left = alpha_bar * 0.25 / (alpha_bar * 0.25 + 1 - alpha_bar)
    assert_close(loss.item(), left, rtol=0.03, atol=1e-4)
    assert ddpm.ddpm_loss(lambda x, t: 0.9 * exact(x, t), *given) > loss or t == 1


# Variational bound


@pytest.mark.parametrize("sigma", [0.002, 0.01, 0.3])
@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.5, 0.0031, 0.99, 1.0])
def test_discrete_decoder_sums_to_1_and_matches_float64(mean, sigma):
    x0 = torch.arange(256) / 127.5 - 1
    found = ddpm.discrete_log_likelihood(x0, torch.full_like(x0, mean), torch.tensor(sigma))
    assert_close(found.double().exp().sum().item(), 1.0, rtol=1e-4, atol=1e-5)
    edges = (np.arange(257) - 0.5) / 127.5 - 1
    edges[0], edges[-1] = -np.inf, np.inf  # Eq. 13 is open at both ends
    z = (edges - mean) / sigma
    low, high = z[:-1], z[1:]
    mass = np.where(low > 0, stats.norm.sf(low) - stats.norm.sf(high),
                    stats.norm.cdf(high) - stats.norm.cdf(low))
    likely = torch.from_numpy(mass > 1e-12)
    assert_close(found[likely].double(), torch.from_numpy(np.log(mass.clip(1e-300)))[likely],
                 rtol=5e-3, atol=5e-3)
    assert torch.isfinite(found[likely]).all() and (found <= 1e-6).all()


def test_discrete_decoder_is_finite_far_away():
    x0 = torch.tensor([-1.0, 0.0, 1.0])
    found = ddpm.discrete_log_likelihood(x0, torch.tensor([1.0, -1.0, -1.0]), torch.tensor(0.01))
    assert torch.isfinite(found).all() and (found < -1000).all()


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("T", [1000, 20])
def test_variational_bound_against_its_closed_form(variance, T):
    """Data N(0, s^2) with its exact eps, linear in x_t, so that every expectation is known.

    The terms of the reference come from Eq. 12, which the script does not use.
    """
    schedule, s2 = ddpm.make_schedule("linear", T), 0.2
    exact = ExactEps(schedule.alpha_bars, [1.0], [[0.0]], [[[s2]]])
    x0 = (torch.randn(40_000, 1, 1, 1) * s2**0.5).clamp(-1, 1)
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    ts = [2, 5, T // 2, T - 1, T]

    def term(t):
        return ddpm.bound_term(exact, x0, t, schedule, variance, False).mean().item()

    double = (x0.double() ** 2).mean().item()
    betas, bars = schedule.betas.double(), schedule.alpha_bars.double()
    for t in ts:
        beta, bar, bar_prev = betas[t].item(), bars[t].item(), bars[t - 1].item()
        tilde = (1 - bar_prev) / (1 - bar) * beta
        sigma2 = beta if variance == "beta" else tilde
        a = math.sqrt(1 - bar) / (bar * s2 + 1 - bar)  # eps_hat = a * x_t
        error = a**2 * bar * double + (1 - a * math.sqrt(1 - bar)) ** 2  # E (eps - eps_hat)^2
        kl = beta**2 / (2 * sigma2 * (1 - beta) * (1 - bar)) * error  # Eq. 12
        kl += 0.5 * (tilde / sigma2 - 1 - math.log(tilde / sigma2))
        assert_close(term(t), kl, rtol=0.04, atol=1e-6)

    bar = bars[-1].item()
    beta, clean = betas[1].item(), x0.double().flatten().numpy()
    sigma = ((1 - bars[1]) / (1 - bars[2]) * betas[2]).sqrt().item()  # as in the authors' code
    a = math.sqrt(beta) / ((1 - beta) * s2 + beta)
    x1 = math.sqrt(1 - beta) * clean + math.sqrt(beta) * np.random.default_rng(0).normal(
        size=clean.shape)
    mean = (x1 - math.sqrt(beta) * a * x1) / math.sqrt(1 - beta)
    high = np.where(clean > 0.999, np.inf, (clean + 1 / 255 - mean) / sigma)
    low = np.where(clean < -0.999, -np.inf, (clean - 1 / 255 - mean) / sigma)
    mass = stats.norm.cdf(high) - stats.norm.cdf(low)
    assert_close(term(1), -np.log(mass).mean().item(), rtol=0.03, atol=0.01)

    few = x0[:2000]  # every term once, in bits: L_0, ..., L_{T-1} as above, and L_T
    bound = ddpm.variational_bound(exact, few, schedule, variance, False)
    assert len(bound) == T + 1
    for t in (1, *ts):
        assert_close(bound[t - 1], term(t) / math.log(2), rtol=0.15, atol=1e-5)
    bar, double = bars[-1].item(), (few.double() ** 2).mean().item()
    prior = 0.5 * (bar * double + (1 - bar) - 1 - math.log1p(-bar)) / math.log(2)
    assert_close(bound[T], prior, rtol=0.05, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_variational_bound_sums_every_term_and_bounds_the_entropy(variance):
    """No model codes N(0, s^2) in bins of 2/255 in fewer bits than its entropy; many steps come
    nearer to it than few.
    """
    s2, totals = 0.05, []
    x0 = (torch.randn(10_000, 1, 1, 1) * s2**0.5).clamp(-1, 1)
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    for T in (50, 800):
        schedule = ddpm.make_schedule("linear", T)
        exact = ExactEps(schedule.alpha_bars, [1.0], [[0.0]], [[[s2]]])
        bound = ddpm.variational_bound(exact, x0, schedule, variance, False)
        assert len(bound) == T + 1 and all(math.isfinite(term) for term in bound)
        totals.append(sum(bound))
    entropy = 0.5 * math.log2(2 * math.pi * math.e * s2) + math.log2(127.5)
    assert entropy - 0.04 < totals[1] < totals[0]


def test_bound_is_better_for_the_exact_eps_than_for_a_worse_one():
    schedule = ddpm.make_schedule("linear", 50)
    exact = ExactEps(schedule.alpha_bars, [1.0], [[0.0]], [[[0.1]]])
    x0 = ((torch.randn(2000, 1, 1, 1) * 0.316).clamp(-1, 1) * 127.5).round() / 127.5
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    good = ddpm.variational_bound(exact, x0, schedule, "beta", False)
    poor = ddpm.variational_bound(lambda x, t: 0.8 * exact(x, t), x0, schedule, "beta", False)
    assert sum(good) < sum(poor)


def test_the_bound_terms_are_pixelwise_and_need_no_gradient():
    schedule = ddpm.make_schedule("linear", 20)
    x0 = ((torch.randn(3, 1, 4, 4) * 0.3).clamp(-1, 1) * 127.5).round() / 127.5
    for t in (1, 2, 20):
        term = ddpm.bound_term(unet(image_size=4, attention=()), x0, t, schedule)
        assert term.shape == x0.shape and not term.requires_grad and torch.isfinite(term).all()
        assert t == 1 or (term >= -1e-6).all()  # each is a divergence of two Gaussians


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_a_single_step_has_a_finite_bound(variance):
    x0, schedule = torch.zeros(2, 1, 2, 2), ddpm.make_schedule("linear", 1)
    bound = ddpm.variational_bound(lambda x, t: x, x0 + 1 / 255, schedule, variance, False)
    assert len(bound) == 2 and all(math.isfinite(term) and term > 0 for term in bound)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_the_weight_of_eq_12_makes_the_bound_of_the_error_of_eps(variance):
    """Draw by draw: L_{t-1} - C = weight |eps - eps_hat|^2."""
    schedule, x0 = ddpm.make_schedule("cosine", 30), torch.rand(4, 1, 3, 3) * 2 - 1
    for t in (2, 11, 30):
        torch.manual_seed(t)
        eps = torch.randn_like(x0)
        torch.manual_seed(t)
        term = ddpm.bound_term(lambda x, t: 0.3 * x, x0, t, schedule, variance, False)
        error = (eps - 0.3 * ddpm.q_sample(x0, t, eps, schedule.alpha_bars)) ** 2
        ratio = ddpm.beta_tilde(t, schedule) / (
            schedule.betas[t] if variance == "beta" else ddpm.beta_tilde(t, schedule))
        constant = 0.5 * (ratio - 1 - ratio.log())
        weight = ddpm.bound_weight(t, schedule, variance)
        assert_close(term - constant, weight * error, rtol=1e-3, atol=1e-5)
        assert_close(ddpm.bound_weight(torch.tensor([t]), schedule, variance), weight[None])


# Sampling


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_a_step_adds_noise_of_its_variance_to_its_mean_and_the_last_one_none(variance):
    """Alg. 2, lines 3 and 4, draw for draw."""
    schedule, xT = ddpm.make_schedule("linear", 10), torch.randn(5, 2, 1, 1)
    exact = gaussian_eps(schedule.alpha_bars)
    torch.manual_seed(1)
    states = list(ddpm.reverse_process(exact, xT, schedule, variance, clip_x0=False))
    torch.manual_seed(1)
    for (t, xt), (_, x_prev) in zip(states[:-1], states[1:], strict=True):
        mean, sigma2 = ddpm.p_theta(exact, xt, t, schedule, variance, clip_x0=False)
        z = torch.randn_like(xt) if t > 1 else torch.zeros_like(xt)
        assert_close(x_prev, mean + sigma2.sqrt() * z)
    eps_hat = exact(states[-2][1], torch.ones(5, dtype=torch.int64))
    x0_hat = ddpm.predict_x0(states[-2][1], eps_hat, 1, schedule.alpha_bars)
    assert_close(states[-1][1], x0_hat, rtol=1e-4, atol=1e-5)


def test_each_variance_is_exact_for_the_data_of_section_3_2():
    """sigma^2 = beta keeps x_0 ~ N(0, I) exactly; beta_tilde a single x_0."""
    schedule = ddpm.make_schedule("linear", 10)
    standard = ExactEps(schedule.alpha_bars, [1.0], [[0.0]], [[[1.0]]])
    x = ddpm.sample(standard, (100_000, 1, 1, 1), schedule, "beta", clip_x0=False)
    assert_close(x.var().item(), 1 - schedule.betas[1].item(), rtol=0.02, atol=0)
    single = ExactEps(schedule.alpha_bars, [1.0], [[0.35]], [[[0.0]]])
    xT = torch.randn(100_000, 1, 1, 1)
    states = dict(ddpm.reverse_process(single, xT, schedule, "beta_tilde", clip_x0=False))
    assert_close(states[0], torch.full_like(xT, 0.35), rtol=0, atol=1e-3)
    for t in (2, 5):
        assert_close(states[t].var(), 1 - schedule.alpha_bars[t], rtol=0.03, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("kind", KINDS)
def test_sampling_with_the_exact_eps_gives_mean_and_covariance(variance, kind):
    schedule = ddpm.make_schedule(kind, 300)
    exact = gaussian_eps(schedule.alpha_bars)
    x = ddpm.sample(exact, (10_000, 2, 1, 1), schedule, variance, clip_x0=False)
    mean, cov = mean_and_cov(x)
    assert_close(mean, exact.moments()[0], rtol=0, atol=0.03)
    assert_close(cov, exact.moments()[1], rtol=0, atol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_sampling_with_the_exact_eps_gives_the_modes_their_weights(variance):
    schedule = ddpm.make_schedule("linear", 300)
    exact = mixture_eps(schedule.alpha_bars)
    x = ddpm.sample(exact, (8000, 2, 1, 1), schedule, variance, clip_x0=False)
    assert_close(exact.nearest(x), exact.weights, rtol=0, atol=0.025)
    assert_close(mean_and_cov(x)[0], exact.moments()[0], rtol=0, atol=0.05)
    assert_close(mean_and_cov(x)[1], exact.moments()[1], rtol=0, atol=0.06)
    which = torch.cdist(x.flatten(1).double(), exact.means).argmin(1)
    for k in range(3):  # and within each mode its own covariance
        assert_close(mean_and_cov(x[which == k])[1], exact.covs[k], rtol=0.15, atol=0.012)


def test_only_x0_hat_is_clamped():
    schedule = ddpm.make_schedule("linear", 1000)
    xt, t = torch.tensor([4.0, -3.0, 0.1]).view(3, 1, 1, 1), 500

    def network(x, t):
        assert_close(x, xt, rtol=0, atol=0)  # the network gets x_t as it is
        return 0.1 * x

    raw = ddpm.predict_x0(xt, 0.1 * xt, t, schedule.alpha_bars)
    assert raw.abs().max() > 1
    found, _ = ddpm.p_theta(network, xt, t, schedule, "beta")  # the clamp is the default
    mean, _ = ddpm.q_posterior(raw.clamp(-1, 1), xt, t, schedule)
    assert_close(found, mean, rtol=1e-4, atol=1e-4)
    assert found.abs().max() > 1  # x_{t-1} is not clamped
    free, _ = ddpm.p_theta(network, xt, t, schedule, "beta", clip_x0=False)
    assert_close(free, ddpm.q_posterior(raw, xt, t, schedule)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [500, torch.tensor([500, 3, 1000])])
def test_clip_eps_is_the_noise_behind_the_clamped_x0_hat(t):
    bars = ddpm.make_schedule("linear", 1000).alpha_bars
    xt, eps_hat = 2 * torch.randn(3, 1, 2, 3), torch.randn(3, 1, 2, 3)
    raw = ddpm.predict_x0(xt, eps_hat, t, bars)
    clipped = ddpm.clip_eps(xt, eps_hat, t, bars)
    assert_close(ddpm.predict_x0(xt, clipped, t, bars), raw.clamp(-1, 1), rtol=1e-3, atol=1e-3)
    inside = raw.abs() < 1
    assert_close(clipped[inside], eps_hat[inside], rtol=1e-3, atol=1e-3)
    assert (clipped[~inside] != eps_hat[~inside]).all() and (~inside).any()


def test_predict_x0_undoes_q_sample_for_a_batch_of_t():
    """Also where the batch is as large as an image is wide."""
    bars, t = ddpm.make_schedule("linear", 20).alpha_bars, torch.tensor([0, 1, 9, 14])
    x0, eps = torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4, 4)
    xt = ddpm.q_sample(x0, t, eps, bars)
    assert_close(ddpm.predict_x0(xt, eps, t, bars), x0, rtol=1e-3, atol=1e-3)
    for i in range(4):
        one = ddpm.predict_x0(xt[i:i + 1], eps[i:i + 1], int(t[i]), bars)
        assert_close(one, ddpm.predict_x0(xt, eps, t, bars)[i:i + 1])


def test_sampling_asks_the_network_once_at_each_t_from_T_to_1():
    schedule, asked = ddpm.make_schedule("linear", 7), []

    def network(x, t):
        assert t.shape == (3,) and t.dtype == torch.int64
        asked.append(t[0].item())
        return torch.zeros_like(x)

    xT = torch.randn(3, 1, 2, 2)
    x = ddpm.sample(network, (3, 1, 2, 2), schedule, xT=xT)
    assert asked == [7, 6, 5, 4, 3, 2, 1]
    assert x.shape == (3, 1, 2, 2)


def test_the_reverse_process_yields_every_state_from_xT_to_x0():
    schedule, asked = ddpm.make_schedule("linear", 7), []

    def network(x, t):
        asked.append((t[0].item(), x))
        return 0.5 * x

    xT = torch.randn(3, 1, 2, 2)
    torch.manual_seed(5)
    states = list(ddpm.reverse_process(network, xT, schedule))
    assert [t for t, _ in states] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert torch.equal(states[0][1], xT)
    assert [t for t, _ in asked] == [7, 6, 5, 4, 3, 2, 1]
    for (_, x), (_, xt) in zip(asked, states[:-1], strict=True):
        assert x is xt  # what is yielded at t is what the network gets at t
    torch.manual_seed(5)  # the sampler returns the last of them
    assert_close(ddpm.sample(network, xT.shape, schedule, xT=xT), states[-1][1], rtol=0, atol=0)
    torch.manual_seed(5)  # and draws its own noise where none is given, before all else
    noise = torch.randn(3, 1, 2, 2)
    first = ddpm.sample(network, xT.shape, schedule, xT=noise)
    torch.manual_seed(5)
    assert_close(ddpm.sample(network, xT.shape, schedule), first, rtol=0, atol=0)


def test_a_state_is_computed_only_when_it_is_asked_for():
    schedule, asked = ddpm.make_schedule("linear", 7), []

    def network(x, t):
        asked.append(t[0].item())
        return torch.zeros_like(x)

    states = ddpm.reverse_process(network, torch.randn(1, 1, 2, 2), schedule)
    assert asked == [] and next(states)[0] == 7 and asked == []
    assert next(states)[0] == 6 and asked == [7]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1, 2, 3, 10, 25, 49, 50])
def test_eq_11_is_the_posterior_mean_at_x0_hat(kind, t):
    """The mean as Alg. 2 writes it, from eps_hat, and the one over x0_hat (Eq. 7) are one."""
    betas = ddpm.make_schedule(kind, 50).betas.double()
    schedule = ddpm.Schedule(betas, 1 - betas, (1 - betas).cumprod(0))  # in float64 throughout
    xt, eps_hat = torch.randn(2, 4, 1, 3, 3).double()
    x0_hat = ddpm.predict_x0(xt, eps_hat, t, schedule.alpha_bars)
    mean, _ = ddpm.q_posterior(x0_hat, xt, t, schedule)
    found, _ = ddpm.p_theta(lambda x, t: eps_hat, xt, t, schedule, clip_x0=False)
    assert_close(found, mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("clip_x0", [True, False])
def test_p_theta_is_the_posterior_of_x0_hat_with_either_variance(variance, clip_x0):
    schedule = ddpm.make_schedule("linear", 50)
    exact, xt = gaussian_eps(schedule.alpha_bars), 2 * torch.randn(6, 2, 1, 1)
    for t in (1, 2, 30, 50):
        x0_hat = ddpm.predict_x0(xt, exact(xt, torch.full((6,), t)), t, schedule.alpha_bars)
        x0_hat = x0_hat.clamp(-1, 1) if clip_x0 else x0_hat
        mean, tilde = ddpm.q_posterior(x0_hat, xt, t, schedule)
        found, sigma2 = ddpm.p_theta(exact, xt, t, schedule, variance, clip_x0)
        assert_close(found, mean, rtol=1e-4, atol=1e-4)
        assert_close(sigma2, schedule.betas[t] if variance == "beta" else tilde.squeeze())


def test_beta_tilde_is_eq_7():
    schedule = ddpm.make_schedule("linear", 30)
    bars = schedule.alpha_bars
    assert ddpm.beta_tilde(1, schedule) == 0
    ts = torch.tensor([2, 15, 30])
    expected = schedule.betas[ts] * (1 - bars[ts - 1]) / (1 - bars[ts])
    assert_close(ddpm.beta_tilde(ts, schedule), expected)
    assert (ddpm.beta_tilde(ts, schedule) < schedule.betas[ts]).all()
    assert_close(ddpm.beta_tilde(15, schedule), expected[1])


# Network


def test_the_paper_preset_is_the_paper_s_network():
    with torch.device("meta"):
        model = ddpm.make_unet(ddpm.PRESETS["paper"], (3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == 35_746_307


def unet(seed=0, **options):
    """A small U-Net whose zero layers were given weights, so that everything in it matters."""
    torch.manual_seed(seed)
    settings = dict(image_channels=1, image_size=8, channels=8, mults=(1, 2), blocks=1,
                    attention=(4,), heads=2, groups=4, dropout=0.0)
    model = ddpm.UNet(**(settings | options))
    for p in model.parameters():
        if p.abs().max() == 0:
            nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("options", [
    dict(image_channels=1, image_size=28, patch=2), dict(image_channels=3, image_size=32),
    dict(image_channels=4, image_size=12, mults=(1, 2, 2)), dict(image_channels=2, mults=(1,)),
    dict(image_size=16, patch=4, blocks=2), dict(mults=(1, 3), heads=1, attention=())])
def test_unet_takes_any_channels_and_sizes(options):
    model = unet(**options)
    size, channels = options.get("image_size", 8), options.get("image_channels", 1)
    x = torch.randn(2, channels, size, size)
    out = model(x, torch.tensor([1, 9]))
    assert out.shape == x.shape and torch.isfinite(out).all()


def test_unet_starts_at_zero_and_changes_with_t_and_x():
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    fresh = ddpm.UNet(1, 8, 8, (1, 2), 1, (4,), 2, 4, 0.0)
    assert_close(fresh(x, t), torch.zeros_like(x), rtol=0, atol=0)
    model = unet()
    assert (model(x, t) - model(x, torch.tensor([4, 900])))[0].abs().max() > 1e-4
    assert_close(model(x, t)[1], model(x, torch.tensor([4, 900]))[1])
    assert (model(x, t) - model(x + 0.1, t)).abs().max() > 1e-3
    assert_close(model(x, t), model(x, t.float()))
    assert_close(model(x, t)[:1], model(x[:1], t[:1]), rtol=1e-4, atol=1e-5)


def test_attention_lets_every_position_see_every_other():
    torch.manual_seed(0)
    layer = ddpm.Attention(8, 2, 4)
    nn.init.normal_(layer.out.weight)
    x = torch.randn(1, 8, 4, 4, requires_grad=True)
    h = layer(x)[0, :, 0, 0].square().sum()
    (gradient,) = torch.autograd.grad(h, x)
    assert (gradient.abs().sum((0, 1)) > 1e-6).all()
    q, k, v = layer.qkv(layer.norm(x)).view(1, 3, 2, 4, 16).transpose(-1, -2).unbind(1)
    h = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    assert_close(layer(x), x + layer.out(h.transpose(-1, -2).reshape(1, 8, 4, 4)))


def test_timestep_embedding_is_that_of_vaswani():
    t = torch.tensor([0, 1, 500, 1000])
    found = ddpm.timestep_embedding(t, 16)
    i = torch.arange(8).double()
    angles = t[:, None].double() * 10000 ** (-i / 7)
    assert_close(found.double(), torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=1e-4)
    near = (found[1] - found[0]).norm()
    assert near > 0.5  # neighbouring steps can be told apart


# Training


def in_training(out, model, step, *argv):
    """Call step() inside the first step of run.steps, where the flags in argv apply to model."""
    _, run, _ = open_run(ddpm, out, *argv)
    for _ in run.steps(1, save=False, model=model):
        found = step()
    assert not any("forward" in vars(module) for module in model.modules())
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(dropout, tmp_path):
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 9])
    gradients, calls = [], []
    for argv in ((), ("--grad_checkpointing",)):
        model = unet(dropout=dropout).train()
        calls.append(0)

        def count(*_):
            calls[-1] += 1  # noqa: B023  it is called within this turn of the loop

        model.mid1.conv1.register_forward_hook(count)

        def step(model=model):
            torch.manual_seed(3)  # the same elements dropped, also when they are computed again
            out = model(x, t)
            out.square().mean().backward()
            return out

        out = in_training(tmp_path, model, step, *argv)
        gradients.append({name: p.grad for name, p in model.named_parameters()} | {"": out})
    assert calls == [1, 2]  # activations were thrown away and computed again
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert_close(gradients[1][name], gradient)
    if dropout:
        without = unet().train()(x, t)
        assert (without - gradients[0][""]).abs().max() > 1e-3  # dropout was at work


def test_compile_compiles_the_network(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    model = unet()
    in_training(tmp_path, model, lambda: None)
    assert compiled == []
    in_training(tmp_path, model, lambda: None, "--compile")
    assert compiled == [model]


def test_ema_warms_up():
    model = nn.Linear(2, 2)
    ema = ddpm.EMA(model, 0.9)
    expected = model.weight.detach().clone()
    for n in range(200):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 2))
        ema.update(model, n)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        assert_close(ema.model.weight.data, expected)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())


@pytest.mark.slow
def test_training_lowers_the_loss(tmp_path):
    cfg, run, data = open_run(
        ddpm, tmp_path, "--steps", 40, "--lr", "3e-3", "--preview_every", 100)
    ddpm.train(cfg, run, data)
    log = run.read_log()
    assert log["step"] == list(range(1, 41))
    assert np.mean(log["loss"][-5:]) < 0.7 * np.mean(log["loss"][:5])


@pytest.mark.parametrize("flip", [False, True])
def test_training_sees_the_training_pictures_mirrored_on_request(flip, tmp_path, monkeypatch):
    """Left to right and no other; with AdamW's own decay of the weights. test_glue.py has the rest."""
    seen = []
    spied(monkeypatch, ddpm, "ddpm_loss", lambda given, _: seen.append(given["x0"]))
    cfg, run, data = open_run(ddpm, tmp_path, "--batch_size", 16, "--weight_decay", "0.5",
                              *["--flip"] * flip)
    ddpm.train(cfg, run, data)
    x0 = torch.cat(seen)
    assert x0.shape == (6 * 16, 1, 28, 28) and len(torch.unique(x0.flatten(1), dim=0)) > 80

    def among(x, part):
        distance = torch.cdist(x.flatten(1), part.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        return distance.min(1).values < 1e-4

    as_is, mirrored = among(x0, data.train), among(x0.flip(3), data.train)
    assert (as_is | mirrored).all() and not among(x0, data.test).any()
    assert 0.25 < mirrored.float().mean() < 0.75 if flip else as_is.all()
    state = torch.load(run.path("checkpoint.pt"), weights_only=True)
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.5]
