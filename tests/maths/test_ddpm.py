"""The mathematics and the training of ddpm_example.py, against closed forms. Its network is in test_networks.py.

What other pages repeat is one text (tests/plumbing/test_drift.py), and is tested here for all of them.
"""

import math

import conditional_diffusion_example as conditional
import ddpm_example as ddpm
import flow_matching_example as flow
import score_based_diffusion_example as score_based

import numpy as np
import pytest
import torch
from conftest import ExactEps, mean_and_cov, mixture_eps, open_run, spied
from scipy import stats
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

ONE, ZERO = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
each_kind = pytest.mark.parametrize("kind", ["linear", "cosine"])
each_variance = pytest.mark.parametrize("variance", ["beta", "beta_tilde"])


# Forward process


@each_kind
@pytest.mark.parametrize("T", [1, 2, 10, 1000])
def test_schedule_is_indexed_like_the_paper_and_ends_in_noise(kind, T):
    schedule = ddpm.make_schedule(kind, T)
    for array in (schedule.betas, schedule.alphas, schedule.alpha_bars):
        assert array.shape == (T + 1,) and array.dtype == torch.float32
    assert schedule.T == T
    assert schedule.betas[0] == 0 and schedule.alphas[0] == 1 and schedule.alpha_bars[0] == 1
    assert (schedule.betas[1:] > 0).all() and schedule.betas.max() <= 0.9991
    assert (schedule.alpha_bars.diff() < 0).all()
    assert schedule.alpha_bars[-1] < (1e-4 if T >= 10 else 2e-3)
    # alpha_bars is the product of the betas as they are after capping, not of the formula's
    assert_close(schedule.alphas, 1 - schedule.betas)
    product = (1 - schedule.betas.double()).cumprod(0).float()
    assert_close(schedule.alpha_bars, product, rtol=2e-3, atol=1e-7)


def test_linear_schedule_has_the_values_of_the_paper_and_is_rescaled_for_another_T():
    full, tenth = ddpm.make_schedule("linear", 1000), ddpm.make_schedule("linear", 100)
    assert_close(full.betas[1:], torch.linspace(1e-4, 0.02, 1000))
    assert_close(full.alpha_bars[-1].item(), 4.0358e-5, rtol=1e-3, atol=0)
    assert_close(tenth.betas[1:], torch.linspace(1e-3, 0.2, 100))
    for fraction in (0.1, 0.3, 0.5):  # so alpha_bar is about the same function of t / T
        a, b = full.alpha_bars[int(1000 * fraction)], tenth.alpha_bars[int(100 * fraction)]
        assert_close(a, b, rtol=0.12, atol=0)
    assert ddpm.make_schedule("linear", 10).betas.max().item() == pytest.approx(0.999)


def test_cosine_schedule_is_that_of_nichol_and_dhariwal():
    T = 1000
    schedule = ddpm.make_schedule("cosine", T)
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    wanted = torch.from_numpy(f / f[0]).float()
    assert_close(schedule.alpha_bars[:-1], wanted[:-1], rtol=1e-4, atol=1e-7)
    assert schedule.betas[-1].item() == pytest.approx(0.999)
    assert_close(schedule.alpha_bars[-1], 0.001 * schedule.alpha_bars[-2], rtol=1e-3, atol=0)


@each_kind
def test_iterating_eq_2_gives_eq_4(kind):
    schedule = ddpm.make_schedule(kind, 100)
    scale, variance = ONE, ZERO
    for t in range(1, 101):  # the maps are linear: their two coefficients say everything
        scale = ddpm.q_step(scale, t, ZERO, schedule)
        keep, add = ddpm.q_step(ONE, t, ZERO, schedule), ddpm.q_step(ZERO, t, ONE, schedule)
        variance = keep**2 * variance + add**2
        signal = ddpm.q_sample(ONE, t, ZERO, schedule.alpha_bars)
        noise = ddpm.q_sample(ZERO, t, ONE, schedule.alpha_bars)
        assert_close(signal, scale, rtol=1e-3, atol=1e-5)
        assert_close(noise**2, variance, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("t", [2, 6])
def test_q_posterior_is_the_normalised_product_of_two_gaussians(t):
    schedule = ddpm.make_schedule("linear", 10)
    x0, xt = 0.7, -0.4
    beta, alpha_bar_prev = schedule.betas[t].item(), schedule.alpha_bars[t - 1].item()
    grid = np.linspace(-9, 9, 100_001)
    density = stats.norm.pdf(xt, math.sqrt(1 - beta) * grid, math.sqrt(beta))
    density *= stats.norm.pdf(grid, math.sqrt(alpha_bar_prev) * x0, math.sqrt(1 - alpha_bar_prev))
    density /= density.sum()
    mean = (density * grid).sum()
    variance = (density * (grid - mean) ** 2).sum()
    found_mean, found_variance = ddpm.q_posterior(x0 * ONE, xt * ONE, t, schedule)
    assert_close(found_mean.item(), mean, rtol=1e-4, atol=1e-5)
    assert_close(found_variance.item(), variance, rtol=1e-4, atol=1e-6)
    mean, variance = ddpm.q_posterior(x0 * ONE, xt * ONE, 1, schedule)
    assert variance.item() == 0  # at t = 1 it is x_0 itself
    assert_close(mean, x0 * ONE)


@pytest.mark.parametrize("formula", [
    lambda a, b, t, schedule: ddpm.q_step(a, t, b, schedule),
    lambda a, b, t, schedule: ddpm.q_sample(a, t, b, schedule.alpha_bars),
    lambda a, b, t, schedule: ddpm.q_posterior(a, b, t, schedule)[0],
    lambda a, b, t, schedule: ddpm.q_posterior(a, b, t, schedule)[1],
    lambda a, b, t, schedule: ddpm.predict_x0(a, b, t, schedule.alpha_bars),
    lambda a, b, t, schedule: ddpm.clip_eps(a, b, t, schedule.alpha_bars)],
    ids=["q_step", "q_sample", "posterior mean", "posterior variance", "predict_x0", "clip_eps"])
def test_each_picture_of_a_batch_has_a_t_of_its_own(formula):
    """Also where the batch is as large as an image is wide."""
    schedule, t = ddpm.make_schedule("linear", 20), torch.tensor([1, 9, 14, 20])
    a, b = torch.randn(2, 4, 2, 4, 4)
    together = formula(a, b, t, schedule)
    for i in range(4):
        alone = formula(a[i:i + 1], b[i:i + 1], int(t[i]), schedule)
        assert_close(together[i:i + 1], alone)


def test_predict_x0_undoes_q_sample_and_t_0_is_clean():
    bars, t = ddpm.make_schedule("linear", 20).alpha_bars, torch.tensor([0, 1, 9, 14])
    x0, eps = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    xt = ddpm.q_sample(x0, t, eps, bars)
    assert torch.equal(xt[0], x0[0]) and not torch.allclose(xt[1], x0[1])
    assert_close(ddpm.predict_x0(xt, eps, t, bars), x0, rtol=1e-3, atol=1e-3)


# Training objective


def test_t_are_uniform_on_1_to_T_or_in_equal_quantiles_of_a_logit_normal():
    """But for one in sixteen, which is uniform; each from its whole quantile, not from the middle of it."""
    T, n, normal = 1000, 64, torch.distributions.Normal(-0.2, 0.8)
    t = torch.stack([ddpm.draw_t(n, T, "logit_normal") for _ in range(1000)])
    assert t.dtype == torch.int64 and t.shape == (1000, n) and t.min() == 1 and t.max() == T
    for fraction in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        below = (t <= T * fraction).double().mean(1)
        wanted = (fraction + 15 * normal.cdf(torch.logit(torch.tensor(fraction))).item()) / 16
        assert below.mean() == pytest.approx(wanted, abs=0.006)
    assert (t <= 500).double().mean(1).std() < 0.03  # of independent draws 0.062
    assert torch.bincount(t[:, 10])[266:281].count_nonzero() >= 9
    for few in (1, 2):
        assert set(ddpm.draw_t(1000, few, "logit_normal").tolist()) == set(range(1, few + 1))
    t = ddpm.draw_t(20_000, 5, "uniform")
    assert t.dtype == torch.int64 and t.shape == (20_000,)
    shares = torch.bincount(t, minlength=7).double() / len(t)
    assert_close(shares, torch.tensor([0, 0.2, 0.2, 0.2, 0.2, 0.2, 0]).double(), rtol=0, atol=0.02)


def test_loss_is_the_mean_squared_error_of_eps():
    schedule = ddpm.make_schedule("linear", 10)
    x0, eps = torch.rand(6, 1, 4, 4) * 2 - 1, torch.randn(6, 1, 4, 4)
    t = torch.tensor([1, 2, 4, 6, 9, 10])

    def knows(xt, asked):  # solves Eq. 4 for eps, knowing x0
        assert torch.equal(asked, t)
        alpha_bar = schedule.alpha_bars[t].view(-1, 1, 1, 1)
        return (xt - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

    loss = ddpm.ddpm_loss(knows, x0, t, eps, schedule)
    assert loss.shape == ()
    assert_close(loss.item(), 0.0, atol=1e-8, rtol=0)
    half = ddpm.ddpm_loss(lambda x, t: knows(x, t) / 2, x0, t, eps, schedule)
    assert_close(half, (eps**2).mean() / 4, rtol=1e-3, atol=1e-5)


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
    mass = np.where(low > 0, stats.norm.sf(low) - stats.norm.sf(high), stats.norm.cdf(high) - stats.norm.cdf(low))
    likely = torch.from_numpy(mass > 1e-12)
    assert_close(found[likely].double(), torch.from_numpy(np.log(mass.clip(1e-300)))[likely], rtol=5e-3, atol=5e-3)
    assert torch.isfinite(found).all() and (found <= 1e-6).all()  # far away, too


@each_variance
@pytest.mark.parametrize("kind, T", [("linear", 30), ("cosine", 30), ("linear", 1)])
def test_the_terms_of_the_bound_are_those_of_eq_5_draw_by_draw(kind, T, variance):
    """L_0 by the decoder, L_{t-1} and L_T as KL divergences by torch.distributions, without a gradient.

    By Eq. 12 L_{t-1} is also a constant and the weight of |eps - eps_hat|^2, of any network.
    """
    schedule, factor = ddpm.make_schedule(kind, T), torch.tensor(0.3, requires_grad=True)
    x0 = torch.cat([torch.randint(256, (20,)), torch.tensor([0, 255])]).view(-1, 1, 1, 1) / 127.5 - 1

    def network(x, t):
        return factor * x

    torch.manual_seed(1)
    bound = ddpm.variational_bound(network, x0, schedule, variance, False)
    assert len(bound) == T + 1
    torch.manual_seed(1)
    for t in range(1, T + 1):
        state = torch.get_rng_state()
        term = ddpm.bound_term(network, x0, t, schedule, variance, False)
        torch.set_rng_state(state)
        eps = torch.randn_like(x0)
        xt = ddpm.q_sample(x0, t, eps, schedule.alpha_bars)
        mean, sigma2 = (part.detach() for part in ddpm.p_theta(network, xt, t, schedule, variance, False))
        if t == 1:  # sigma_1^2 = beta_tilde_2 as in the authors' code
            sigma2 = ddpm.beta_tilde(2, schedule) if T > 1 else schedule.betas[1]
            wanted = -ddpm.discrete_log_likelihood(x0, mean, sigma2.sqrt())
        else:
            mean_q, tilde = ddpm.q_posterior(x0, xt, t, schedule)
            wanted = kl_divergence(Normal(mean_q, tilde.sqrt()), Normal(mean, sigma2.sqrt()))
            weight, ratio = ddpm.bound_weight(t, schedule, variance), tilde / sigma2
            constant = 0.5 * (ratio - 1 - ratio.log())
            assert_close(term - constant, weight * (eps - 0.3 * xt) ** 2, rtol=2e-3, atol=1e-5)
            assert_close(ddpm.bound_weight(torch.tensor([t]), schedule, variance), weight[None])
        assert not term.requires_grad
        assert_close(term, wanted, rtol=2e-3, atol=1e-5)
        assert bound[t - 1] == pytest.approx(wanted.mean().item() / math.log(2), rel=2e-3, abs=1e-5)
    alpha_bar = schedule.alpha_bars[-1].double()
    last = kl_divergence(Normal(alpha_bar.sqrt() * x0, (1 - alpha_bar).sqrt()), Normal(0.0, 1.0))
    assert bound[T] == pytest.approx(last.mean().item() / math.log(2), rel=0.02, abs=1e-8)


# Sampling


@each_variance
@pytest.mark.parametrize("clip_x0", [True, False])
@each_kind
def test_p_theta_is_the_posterior_of_x0_hat_which_alone_is_clamped(kind, clip_x0, variance):
    """The mean as Alg. 2 writes it, from eps_hat (Eq. 11), is the one over x0_hat (Eq. 7)."""
    betas = ddpm.make_schedule(kind, 50).betas.double()
    schedule = ddpm.Schedule(betas, 1 - betas, (1 - betas).cumprod(0))  # in float64 throughout
    xt, eps_hat = 2 * torch.randn(2, 4, 1, 3, 3).double()

    def network(x, asked):
        assert torch.equal(x, xt) and asked.tolist() == [t] * 4
        return eps_hat

    for t in (1, 2, 10, 49, 50):
        x0_hat = ddpm.predict_x0(xt, eps_hat, t, schedule.alpha_bars)
        assert x0_hat.abs().max() > 1
        mean, tilde = ddpm.q_posterior(x0_hat.clamp(-1, 1) if clip_x0 else x0_hat, xt, t, schedule)
        found, sigma2 = ddpm.p_theta(network, xt, t, schedule, variance, clip_x0)
        assert_close(found, mean, rtol=1e-7, atol=1e-7)
        assert_close(sigma2, schedule.betas[t] if variance == "beta" else tilde.squeeze())


@each_variance
def test_the_reverse_process_is_algorithm_2_draw_for_draw(variance):
    """Each step adds noise of its variance to its mean, and the last one none. A state comes when it is asked for."""
    schedule, xT, asked = ddpm.make_schedule("linear", 7), torch.randn(3, 1, 2, 2), []

    def network(x, t):
        assert t.dtype == torch.int64 and t.tolist() == [t[0]] * 3
        asked.append((t[0].item(), x))
        return x.sin()

    torch.manual_seed(5)
    process = ddpm.reverse_process(network, xT, schedule, variance, clip_x0=False)
    states = [next(process)]
    assert states[0][1] is xT and not asked
    states += process
    assert [t for t, _ in states] == [7, 6, 5, 4, 3, 2, 1, 0]
    torch.manual_seed(5)
    for (t, xt), (_, x_prev), (asked_t, x) in zip(states[:-1], states[1:], asked[:7], strict=True):
        assert asked_t == t and x is xt
        mean, sigma2 = ddpm.p_theta(network, xt, t, schedule, variance, clip_x0=False)
        z = torch.randn_like(xt) if t > 1 else torch.zeros_like(xt)
        assert_close(x_prev, mean + sigma2.sqrt() * z)
    torch.manual_seed(5)  # the sampler returns the last state, and draws x_T where none is given
    assert torch.equal(ddpm.sample(network, xT.shape, schedule, variance, False, xT), states[-1][1])
    torch.manual_seed(5)
    drawn = ddpm.sample(network, xT.shape, schedule)
    torch.manual_seed(5)
    assert torch.equal(ddpm.sample(network, xT.shape, schedule, xT=torch.randn(3, 1, 2, 2)), drawn)


def test_each_variance_is_exact_for_the_data_of_section_3_2():
    """sigma^2 = beta keeps x_0 ~ N(0, I) exactly; beta_tilde a single x_0."""
    schedule = ddpm.make_schedule("linear", 10)
    standard = ExactEps(schedule.alpha_bars, [1.0], [[0.0]], [[[1.0]]])
    x = ddpm.sample(standard, (40_000, 1, 1, 1), schedule, "beta", clip_x0=False)
    assert_close(x.var().item(), 1 - schedule.betas[1].item(), rtol=0.042, atol=0)
    single = ExactEps(schedule.alpha_bars, [1.0], [[0.35]], [[[0.0]]])
    xT = torch.randn(40_000, 1, 1, 1)
    states = dict(ddpm.reverse_process(single, xT, schedule, "beta_tilde", clip_x0=False))
    assert_close(states[0], torch.full_like(xT, 0.35), rtol=0, atol=1e-3)
    for t in (2, 5):
        assert_close(states[t].var(), 1 - schedule.alpha_bars[t], rtol=0.042, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind, variance", [("linear", "beta"), ("cosine", "beta_tilde")])
def test_sampling_with_the_exact_eps_gives_the_modes_their_weights_means_and_covariances(kind, variance):
    schedule = ddpm.make_schedule(kind, 150)
    exact = mixture_eps(schedule.alpha_bars)
    x = ddpm.sample(exact, (6000, 2, 1, 1), schedule, variance, clip_x0=False)
    assert_close(exact.nearest(x), exact.weights, rtol=0, atol=0.035)
    assert_close(mean_and_cov(x)[0], exact.moments()[0], rtol=0, atol=0.08)
    assert_close(mean_and_cov(x)[1], exact.moments()[1], rtol=0, atol=0.08)
    which = torch.cdist(x.flatten(1).double(), exact.means).argmin(1)
    for k in range(3):  # and within each mode its own covariance
        assert_close(mean_and_cov(x[which == k])[1], exact.covs[k], rtol=0.2, atol=0.012)


# Training


def test_ema_follows_faster_in_the_first_steps():
    model = nn.Linear(2, 2)
    ema = ddpm.EMA(model, 0.9)
    expected = model.weight.detach().clone()
    for n in range(120):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 2))
        ema.update(model, n)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        assert_close(ema.model.weight.data, expected)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())


@pytest.mark.parametrize("page, loss, name", [
    (ddpm, "ddpm_loss", "x0"), (conditional, "v_loss", "x0"), (score_based, "score_loss", "x0"),
    (flow, "cfm_loss", "x1")], ids=lambda value: getattr(value, "__name__", ""))
def test_training_sees_the_training_pictures_mirrored_left_to_right(page, loss, name, tmp_path, monkeypatch):
    """Half of them, with --flip. tests/plumbing has the rest of the training."""
    seen = []
    spied(monkeypatch, page, loss, lambda given, _: seen.append(given[name]))
    cfg, run, data = open_run(page, tmp_path, "--dataset", "digits8", "--batch_size", 32, "--steps", 3,
                              "--preview_every", 100, "--flip", "--attention", 4)
    page.train(cfg, run, data)
    x0 = torch.cat(seen)
    assert x0.shape == (96, 1, 8, 8) and len(torch.unique(x0.flatten(1), dim=0)) > 80

    def among(x, part):  # up to the noise that dequantizes
        distance = torch.cdist(x.flatten(1), part.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        return distance.min(1).values < 0.1

    as_is, mirrored = among(x0, data.train), among(x0.flip(3), data.train)
    assert (as_is | mirrored).all() and not among(x0, data.test).any()
    assert 0.25 < mirrored.float().mean() < 0.75
