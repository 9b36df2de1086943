"""Guidance against closed forms, and what training gives the noisy classifier.

The labels of the network's own training are in tests/plumbing/test_conditional_figures.py.
"""

import math
from dataclasses import replace

import common.data
import conditional_diffusion_example as cond
from common.data import Data

import pytest
import torch
from conftest import assert_same_tree, mean_and_cov, mixture_eps, open_run, spied
from torch.distributions import MultivariateNormal
from torch.nn import functional as F
from torch.testing import assert_close


def double(schedule):
    return cond.Schedule(*(array.double() for array in schedule))


def exact_network(schedule):
    """The exact conditional network of a mixture; each of its three components is a class."""
    model = mixture_eps(schedule.alpha_bars)
    model.classes = len(model.weights)
    return model


class Logits:
    """The exact classifier p(y | x_t) of the mixture, written with torch.distributions."""

    def __init__(self, exact):
        self.exact = exact

    def __call__(self, x, t):
        """log p(y) p_t(x | y): (B, K). x: (B, 2, 1, 1), t: (B,)."""
        a = self.exact.alpha_bars[t][:, None]
        noise = (1 - a)[..., None, None] * torch.eye(2, dtype=torch.float64)
        cov = a[..., None, None] * self.exact.covs + noise
        density = MultivariateNormal(a[..., None].sqrt() * self.exact.means, cov)
        return density.log_prob(x.flatten(1)[:, None].double()) + self.exact.weights.log()


# Prediction of v: arXiv 2202.00512


class Network(torch.nn.Module):
    """v_hat = scale x_t + 0.1, whatever the class."""

    classes = 7

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t, y):
        return self.scale * x + 0.1


def test_a_network_that_knows_v_is_asked_for_eps():
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0."""
    schedule, t = cond.make_schedule("linear", 1000), torch.tensor([1, 40, 500, 1000])
    x0, eps, y = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.tensor([3, 0, 1, 2])
    a = schedule.alpha_bars[t].view(-1, 1, 1, 1)

    def knows(x, t_, y_):
        assert torch.equal(t_, t) and torch.equal(y_, y)
        return a.sqrt() * eps - (1 - a).sqrt() * x0

    model = cond.VPrediction(Network(), schedule.alpha_bars)
    model.network.forward = knows
    assert model.classes == 7
    assert_close(model(cond.q_sample(x0, t, eps, schedule.alpha_bars), t, y), eps)


@pytest.mark.parametrize("kind, T, beta_T", [
    ("linear", 1000, 0.02), ("linear", 10, 0.02), ("linear", 1000, 0.2), ("cosine", 1000, 0.02)])
def test_v_loss_is_the_squared_error_of_v(kind, T, beta_T):
    """Its value and its gradient, also where alpha_bar is next to nothing, or nothing."""
    schedule, t = cond.make_schedule(kind, T, beta_T=beta_T), torch.tensor([1, T // 3, T - 1, T])
    x0, eps = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    a = schedule.alpha_bars.double()[t].view(-1, 1, 1, 1)
    model = cond.VPrediction(Network(), schedule.alpha_bars)
    xt = a.sqrt() * x0.double() + (1 - a).sqrt() * eps.double()
    v = a.sqrt() * eps.double() - (1 - a).sqrt() * x0.double()
    loss, error = cond.v_loss(model, x0, t, eps, schedule), 0.3 * xt + 0.1 - v
    assert_close(loss.detach().double(), error.square().mean(), rtol=1e-5, atol=0)
    loss.backward()
    assert_close(model.network.scale.grad.double(), (2 * error * xt).mean(), rtol=1e-4, atol=1e-6)


# Guidance


def test_w_0_is_conditional_and_w_minus_1_unconditional_exactly():
    """By one call of the network, which is asked for the null class besides."""
    calls = []

    def model(x, t, y):
        calls.append(y)
        return x + (10 * t + 1000 * y).view(-1, 1, 1, 1)

    model.classes = 7
    x, t, y = torch.randn(4, 1, 2, 2), torch.tensor([1, 5, 9, 2]), torch.tensor([0, 3, 6, 3])
    for w, asked in ((0.0, y), (-1.0, torch.full_like(y, 7))):
        assert torch.equal(cond.cfg_eps(model, x, t, y, w), model(x, t, asked))
    assert len(calls) == 4


def test_both_guidances_are_the_tempered_score_at_every_t():
    """The score of p(x_t) p(y | x_t)^(1 + w), by autograd; each picture has its own w."""
    schedule = double(cond.make_schedule("linear", 1000))
    exact = exact_network(schedule)
    classifier, t = Logits(exact), torch.linspace(1, 1000, 200).long()
    x, y = 1.5 * torch.randn(200, 2, 1, 1, dtype=torch.float64), torch.arange(200) // 4 % 3
    w = torch.tensor([-1.0, 0.0, 1.0, 3.5]).repeat(50)
    probe = x.clone().requires_grad_()
    joint = classifier(probe, t)
    log_p = joint.logsumexp(1)
    log_y = joint.gather(1, y[:, None])[:, 0] - log_p
    score, = torch.autograd.grad((log_p + (1 + w) * log_y).sum(), probe)
    wanted = -(1 - schedule.alpha_bars[t]).sqrt().view(-1, 1, 1, 1) * score
    assert_close(cond.cfg_eps(exact, x, t, y, w), wanted, rtol=1e-7, atol=1e-9)
    found = cond.classifier_guided_eps(exact, classifier, x, t, y, 1 + w, schedule.alpha_bars)
    assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    assert not found.requires_grad


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_ancestral_classifier_guidance_moves_the_mean_by_s_sigma_gradient(variance):
    """[ADM] Alg. 1 step by step, with a linear classifier whose gradient is known."""
    schedule = cond.make_schedule("linear", 5, 1e-4, 2e-3)  # mild: x_t stays of order 1
    moves, asked = torch.tensor([[0.7, -0.7]]), []

    def still(x, t, y):
        assert (y == 2).all()  # the unconditional network is asked
        return torch.zeros_like(x)

    def classifier(x, t):
        asked.append(t.unique().item())
        return x.flatten(1) * moves

    still.classes = 2
    x = torch.randn(6, 2, 1, 1)
    y, s = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0.0, 3.0, 1.0, 0.0, 3.0, 1.0])
    settings = cond.Config(clip_x0=False, guidance="classifier", sampler="ancestral", variance=variance)
    torch.manual_seed(1)
    found = list(cond.guided_process(settings, still, x, schedule, y, s - 1, classifier))
    assert asked == [5, 4, 3, 2, 1]
    torch.manual_seed(1)
    for t in range(5, 0, -1):
        assert found[5 - t][0] == t
        assert_close(found[5 - t][1], x, rtol=1e-4, atol=1e-5)
        p = (x.flatten(1) * moves).softmax(1)
        # the gradient of log softmax_y: m_i ((i == y) - p_i) along x_i
        gradient = moves * (F.one_hot(y, 2) - p)
        mean, sigma2 = cond.p_theta(lambda x, t: 0 * x, x, t, schedule, variance, False)
        z = torch.randn_like(x) if t > 1 else 0
        x = mean + s.view(-1, 1, 1, 1) * sigma2 * gradient.view(6, 2, 1, 1) + sigma2.sqrt() * z
    assert found[5][0] == 0 and len(found) == 6
    assert_close(found[5][1], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_a_classifier_pushes_what_is_already_clamped(sampler):
    """As in guided-diffusion: x0_hat = 3 becomes 1, and only then the gradient is added."""
    schedule = double(cond.make_schedule("linear", 1))  # of a single step x_0 is x0_hat
    s, y, xt, a = 0.7, torch.ones(4, dtype=torch.int64), torch.randn(4, 1, 2, 2).double(), schedule.alpha_bars[1]

    def model(x, t, y):
        return (x - 3 * a.sqrt()) / (1 - a).sqrt()  # x0_hat = 3 everywhere

    def classifier(x, t):
        return torch.stack([0 * x.sum((1, 2, 3)), x.sum((1, 2, 3))], 1)

    model.classes = 2
    gradient = torch.sigmoid(-xt.sum((1, 2, 3), keepdim=True)).expand_as(xt)
    factor = (1 - a) / a.sqrt() if sampler == "ddim" else 1 - a  # [ADM] Eq. 14; sigma^2 = beta of Alg. 1
    for clip_x0, x0_hat in ((True, 1), (False, 3)):
        settings = cond.Config(guidance="classifier", sampler=sampler, clip_x0=clip_x0, S=1, variance="beta")
        found = cond.sample(settings, model, xt, schedule, y, s - 1, classifier)
        assert_close(found, x0_hat + factor * s * gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", ["classifier_free", "none"])
@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_the_process_is_the_plain_sampler_with_a_guided_network(guidance, sampler):
    """S, eta, spacing, variance and clip_x0 of the Config reach the steps that have them."""
    schedule = double(cond.make_schedule("linear", 12))
    exact = exact_network(schedule)
    xT, y = torch.randn(5, 2, 1, 1, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    w = torch.tensor([0.0, 1.0, -1.0, 3.0, 0.5])

    def guided(x, t):
        return exact(x, t, y) if guidance == "none" else cond.cfg_eps(exact, x, t, y, w)

    for clip_x0 in (True, False):
        cfg = cond.Config(guidance=guidance, sampler=sampler, S=5, eta=0.3, spacing="quadratic", variance="beta",
                          clip_x0=clip_x0)
        torch.manual_seed(4)
        found = list(cond.guided_process(cfg, exact, xT, schedule, y, w))
        torch.manual_seed(4)
        if sampler == "ddim":
            wanted = list(cond.ddim_process(guided, xT, schedule, 5, 0.3, "quadratic", clip_x0))
        else:
            wanted = list(cond.reverse_process(guided, xT, schedule, "beta", clip_x0))
        assert [t for t, _ in found] == [t for t, _ in wanted]
        assert_close([x for _, x in found], [x for _, x in wanted], rtol=1e-7, atol=1e-7)
        torch.manual_seed(4)
        assert torch.equal(cond.sample(cfg, exact, xT, schedule, y, w), found[-1][1])


def test_samples_follow_the_class_at_w_0_and_the_whole_mixture_at_w_minus_1():
    schedule, n = double(cond.make_schedule("linear", 100)), 600
    exact = exact_network(schedule)
    y = torch.cat([torch.arange(3).repeat_interleave(n), torch.zeros(n, dtype=torch.int64)])
    w = torch.cat([torch.zeros(3 * n), -torch.ones(n)])
    xT = torch.randn(4 * n, 2, 1, 1, dtype=torch.float64)
    x = cond.sample(cond.Config(clip_x0=False, S=50), exact, xT, schedule, y, w)
    for k in range(3):
        mean, cov = mean_and_cov(x[:3 * n][y[:3 * n] == k])
        assert_close(mean, exact.means[k], rtol=0, atol=0.05)
        assert_close(cov, exact.covs[k], rtol=0.25, atol=0.01)
    assert_close(exact.nearest(x[3 * n:]), exact.weights, rtol=0, atol=0.08)


def test_labels_are_dropped_one_by_one_at_the_right_rate():
    y = torch.arange(10).repeat(4000)
    dropped = cond.drop_labels(y, 0.1, 10)
    gone = dropped == 10
    assert torch.equal(dropped[~gone], y[~gone])
    assert abs(gone.float().mean() - 0.1) < 0.009  # six standard deviations
    per_batch = gone.view(-1, 20).sum(1)
    assert 1.2 < per_batch.float().var() < 2.4  # binomial: 1.8; whole batches would give 36
    assert torch.equal(cond.drop_labels(y, 0.0, 10), y)
    assert (cond.drop_labels(y, 1.0, 10) == 10).all()
    assert torch.equal(y, torch.arange(10).repeat(4000))


# The noisy classifier


class Linear(torch.nn.Module):
    """A classifier in place of the convolutional one, wrong at first, which keeps what it is asked."""

    asked = []

    def __init__(self, *_, **__):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        torch.nn.init.normal_(self.layer.weight, std=0.5)

    def forward(self, x, t):
        self.asked.append((x, t))
        return self.layer(x.flatten(1))


def test_the_noisy_classifier_learns_the_labels_of_noisy_pictures_and_is_kept(tmp_path, monkeypatch):
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps with t over all of 1..T.

    Each step takes the gradient of its batch alone, clipped to a norm of 1, by a rate that warms up and decays.
    The random numbers of the caller stay as they were.
    """
    y = torch.arange(300) % 10
    x = (y / 5 - 0.9).view(-1, 1, 1, 1).expand(300, 1, 8, 8).contiguous()  # one grey each: a roll changes nothing
    data = Data("coded", x, x[:30] + 0.05, y, y[:30], tuple("abcdefghij"))
    batches, norms, rates, step = [], [], [], torch.optim.AdamW.step
    Linear.asked.clear()

    def watching(optimizer, *args, **kwargs):
        weight, bias = optimizer.param_groups[0]["params"]
        xt = Linear.asked[-1][0].flatten(1)
        error = ((xt @ weight.mT + bias).softmax(1) - F.one_hot(batches[-1][1], 10)) / len(xt)
        gradients = error.mT @ xt, error.sum(0)
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        for p, gradient in zip((weight, bias), gradients, strict=True):
            assert_close(p.grad, gradient / max(1, norms[-1]), rtol=1e-3, atol=1e-5)
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(cond, "NoisyClassifier", Linear)
    monkeypatch.setattr(torch.optim.AdamW, "step", watching)
    cfg, run, _ = open_run(cond, tmp_path, "--classifier_steps", 20, "--T", 12, "--warmup", 3)
    spied(monkeypatch, run, "batch", lambda _, out: batches.append(out))
    schedule, before = cond.make_schedule("linear", 12), torch.get_rng_state()
    classifier = cond.train_classifier(cfg, run, data, schedule)
    assert torch.equal(torch.get_rng_state(), before)
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())
    assert not run.path("checkpoint.pt").exists()  # the run's own is not replaced
    assert len(batches) == len(Linear.asked) == 20 and max(norms) > 1.1  # the clip acts
    assert rates == pytest.approx([3e-3 * min(1, (i + 1) / 3) * (1 + math.cos(math.pi * i / 20)) / 2
                                   for i in range(20)])

    x0, y = map(torch.cat, zip(*batches, strict=True))
    xt, t = map(torch.cat, zip(*Linear.asked, strict=True))
    assert_close(x0.mean((1, 2, 3)), y / 5 - 0.9, rtol=0, atol=1e-3)  # of the training part, with its labels
    assert set(t.tolist()) == set(range(1, 13))
    alpha_bar = schedule.alpha_bars[t].view(-1, 1, 1, 1)
    eps = (xt - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    for value in range(1, 13):
        of_t = eps[t == value]
        assert abs(of_t.std() - 1) < 0.08 and abs(of_t.mean()) < 0.08

    again = cond.train_classifier(cfg, run, data, schedule)
    assert len(Linear.asked) == 20
    assert_same_tree(dict(again.state_dict()), dict(classifier.state_dict()))


def test_a_kept_classifier_is_of_its_noise_its_training_and_its_data(tmp_path, monkeypatch):
    """Each of these settings makes another key in the cache; those of sampling and of the network do not."""
    keys, x = [], torch.linspace(-1, 1, 20 * 64).view(20, 1, 8, 8)
    data, other = (Data("greys", part, x, torch.arange(20) % 2, None, ("a", "b")) for part in (x, x.flip(0)))
    start, run, _ = open_run(cond, tmp_path)
    monkeypatch.setattr(cond, "cached", lambda name, key, make, fit: keys.append(repr((name, key))) or make())

    def train(data, **changes):
        cfg = replace(start, **changes)
        schedule = cond.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
        cond.train_classifier(cfg, run, data, schedule)

    train(data)
    train(other)
    for change in ({"schedule": "cosine"}, {"T": 30}, {"beta_1": 0.002}, {"beta_T": 0.03}, {"classifier_steps": 5},
                   {"warmup": 9}, {"decay": "constant"}, {"flip": True}):
        train(data, **change)
    assert len(set(keys)) == len(keys) == 10
    for change in ({"n_samples": 7}, {"channels": 16}, {"sampler": "ancestral"}):
        train(data, **change)
        assert keys[-1] == keys[0]
