"""Conditional diffusion: guidance against closed forms, the networks, the command line."""

import csv
import json
import math
from functools import partial
from itertools import groupby

import common.data
import conditional_diffusion_example as cond
import score_based_diffusion_example as sb
from common import plotting
from common.data import Data, load_images

import pytest
import torch
from conftest import (
    assert_same_tree,
    mean_and_cov,
    mixture_eps,
    only_run,
    open_picture,
    open_run,
    run_script,
    spied,
)
from torch.distributions import MultivariateNormal
from torch.nn import functional as F
from torch.testing import assert_close

SCRIPT = "conditional_diffusion_example.py"


def double(schedule):
    return cond.Schedule(*(a.double() for a in (schedule.betas, schedule.alphas,
                                                schedule.alpha_bars)))


@pytest.fixture(scope="module")
def schedule():
    return double(cond.make_schedule("linear", 1000))


@pytest.fixture(scope="module")
def exact(schedule):
    """The exact conditional network of a mixture; each component is a class."""
    model = mixture_eps(schedule.alpha_bars)
    model.classes = len(model.weights)
    return model


class Logits:
    """The exact classifier p(y | x_t) of the mixture, written with torch.distributions."""

    def __init__(self, exact):
        self.exact = exact

    def joint(self, x, t):
        """log p(y) p_t(x | y): (B, K). x: (B, 2, 1, 1), t: (B,)."""
        a = self.exact.alpha_bars[t][:, None]
        noise = (1 - a)[..., None, None] * torch.eye(2, dtype=torch.float64)
        cov = a[..., None, None] * self.exact.covs + noise
        density = MultivariateNormal(a[..., None].sqrt() * self.exact.means, cov)
        return density.log_prob(x.flatten(1)[:, None].double()) + self.exact.weights.log()

    def __call__(self, x, t):
        return self.joint(x, t)


def unet(**changes):
    how = dict(image_channels=1, image_size=16, channels=8, mults=(1, 2), blocks=1, attention=(4,),
               groups=4, dropout=0.0, patch=2, classes=5) | changes
    return cond.UNet(**how)


def dit(**changes):
    how = dict(image_channels=1, image_size=16, patch=4, width=16, depth=2, heads=2, classes=5)
    return cond.DiT(**how | changes)


def awake(model):
    """The layers that start at zero, woken: the output then depends on everything."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


BOTH = pytest.mark.parametrize("make", [unet, dit], ids=["unet", "dit"])


class Plain:
    """A stand-in network whose answer shows what it was asked: x plus 10 t plus 1000 y."""

    classes = 7

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append((x.shape, t.clone(), y.clone()))
        return x + (10 * t + 1000 * y).view(-1, 1, 1, 1)


# Classifier-free guidance


def test_a_network_that_knows_v_is_asked_for_eps():
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0, of arXiv 2202.00512."""
    schedule, t = cond.make_schedule("linear", 1000), torch.tensor([1, 40, 500, 1000])
    x0, eps, y = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.tensor([3, 0, 1, 2])
    a = schedule.alpha_bars[t].view(-1, 1, 1, 1)

    def knows(x, t_, y_):
        assert torch.equal(t_, t) and torch.equal(y_, y)
        return a.sqrt() * eps - (1 - a).sqrt() * x0

    class Network(torch.nn.Module):
        classes, forward = 7, staticmethod(knows)

    model = cond.VPrediction(Network(), schedule.alpha_bars)
    xt = cond.q_sample(x0, t, eps, schedule.alpha_bars)
    assert model.classes == 7
    assert_close(model(xt, t, y), eps)
    assert_close(cond.v_loss(partial(model, y=y), x0, t, eps, schedule), torch.tensor(0.0),
                 rtol=0, atol=1e-6)


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_the_network_and_the_loss_are_those_of_predict(predict, tmp_path, monkeypatch):
    """The loss that training minimises, and the alpha_bars of the schedule that cfg asks for."""
    called = []
    for name in ("v_loss", "ddpm_loss"):
        spied(monkeypatch, cond, name, lambda given, _, name=name: called.append((name, given)))
    cfg, run, data = open_run(cond, tmp_path, "--predict", predict, "--schedule", "cosine")
    model = cond.train(cfg, run, data)
    wanted = {"v": "v_loss", "eps": "ddpm_loss"}[predict]
    assert {name for name, _ in called} == {wanted} and len(called) == cfg.steps
    assert cond.objective(cfg) is getattr(cond, wanted)
    schedule = cond.make_schedule("cosine", cfg.T)
    assert torch.equal(called[0][1]["schedule"].alpha_bars, schedule.alpha_bars)
    assert isinstance(model, cond.VPrediction) == (predict == "v")
    if predict == "v":
        assert torch.equal(model.alpha_bars, schedule.alpha_bars)
        assert isinstance(model.network, cond.UNet)
    for preset in ("ddpm_adagn", "dit_s", "dit_b", "dit_l", "dit_xl"):
        assert cond.PRESETS[preset].predict == "eps"  # as in the papers
        assert cond.PRESETS[preset].dit_kernel == 1 or preset == "ddpm_adagn"


@pytest.mark.parametrize("kind, T, beta_T", [
    ("linear", 1000, 0.02), ("linear", 10, 0.02), ("linear", 1000, 0.2), ("cosine", 1000, 0.02)])
def test_v_loss_is_the_squared_error_of_v(kind, T, beta_T):
    """Its value and its gradient, also where alpha_bar is next to nothing, or nothing."""
    schedule, t = cond.make_schedule(kind, T, beta_T=beta_T), torch.tensor([1, T // 3, T - 1, T])
    x0, eps = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    a = schedule.alpha_bars.double()[t].view(-1, 1, 1, 1)

    class Network(torch.nn.Module):
        classes = 7

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, x, t, y):
            return self.scale * x + 0.1

    model = cond.VPrediction(Network(), schedule.alpha_bars)
    xt = a.sqrt() * x0.double() + (1 - a).sqrt() * eps.double()
    v = a.sqrt() * eps.double() - (1 - a).sqrt() * x0.double()
    loss, error = cond.v_loss(model, x0, t, eps, schedule), 0.3 * xt + 0.1 - v
    assert_close(loss.detach().double(), error.square().mean(), rtol=1e-5, atol=0)
    loss.backward()
    assert_close(model.network.scale.grad.double(), (2 * error * xt).mean(), rtol=1e-4, atol=1e-6)


def test_w_0_is_conditional_and_w_minus_1_unconditional_exactly():
    x, t, y = torch.randn(4, 1, 2, 2), torch.tensor([1, 5, 9, 2]), torch.tensor([0, 3, 6, 3])
    model = Plain()
    null = torch.full_like(y, 7)
    assert torch.equal(cond.cfg_eps(model, x, t, y, 0.0), model(x, t, y))
    assert torch.equal(cond.cfg_eps(model, x, t, y, -1.0), model(x, t, null))
    assert torch.equal(cond.cfg_eps(model, x, t, y, 2), 3 * model(x, t, y) - 2 * model(x, t, null))


def test_each_sample_may_have_its_own_w():
    x, y, w = torch.randn(3, 1, 2, 2), torch.tensor([0, 1, 2]), torch.tensor([-1.0, 0.0, 3.0])
    found = cond.cfg_eps(Plain(), x, 4, y, w)
    for i in range(3):
        assert_close(found[i:i + 1], cond.cfg_eps(Plain(), x[i:i + 1], 4, y[i:i + 1], w[i].item()))


@BOTH
def test_the_batched_call_equals_two_calls(make):
    model, calls = awake(make()), []
    model.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.randn(6, 1, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0])
    found = cond.cfg_eps(model, x, 300, y, 1.7)
    assert len(calls) == 1
    t = torch.full((6,), 300)
    eps_c, eps_u = model(x, t, y), model(x, t, torch.full_like(y, 5))
    assert (eps_c - eps_u).abs().max() > 1e-3
    assert_close(found, 2.7 * eps_c - 1.7 * eps_u, rtol=1e-4, atol=1e-4)
    assert_close(model(x, t), eps_u, rtol=1e-4, atol=1e-4)  # no label is the null class


def test_labels_are_dropped_one_by_one_at_the_right_rate():
    y = torch.arange(10).repeat(4000)
    dropped = cond.drop_labels(y, 0.1, 10)
    gone = dropped == 10
    assert torch.equal(dropped[~gone], y[~gone])
    assert abs(gone.float().mean() - 0.1) < 0.006  # four standard deviations
    per_batch = gone.view(-1, 20).sum(1)
    assert 1.2 < per_batch.float().var() < 2.4  # binomial: 1.8; whole batches would give 36
    assert torch.equal(cond.drop_labels(y, 0.0, 10), y)
    assert (cond.drop_labels(y, 1.0, 10) == 10).all()
    assert torch.equal(y, torch.arange(10).repeat(4000))


@pytest.mark.slow
@pytest.mark.parametrize("w", [-1.0, 0.0, 1.0, 3.5])
def test_both_guidances_are_the_tempered_score_at_every_t(exact, schedule, w):
    t = torch.arange(1, 1001)
    x = 1.5 * torch.randn(1000, 2, 1, 1, dtype=torch.float64)
    y = torch.arange(1000) % 3
    classifier = Logits(exact)
    probe = x.clone().requires_grad_()
    joint = classifier.joint(probe, t)
    log_p = joint.logsumexp(1)
    log_y = joint.gather(1, y[:, None])[:, 0] - log_p
    score, = torch.autograd.grad((log_p + (1 + w) * log_y).sum(), probe)
    wanted = -(1 - schedule.alpha_bars[t]).sqrt().view(-1, 1, 1, 1) * score
    assert_close(cond.cfg_eps(exact, x, t, y, w), wanted, rtol=1e-7, atol=1e-9)
    found = cond.classifier_guided_eps(exact, classifier, x, t, y, 1 + w, schedule.alpha_bars)
    assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    assert not found.requires_grad


@pytest.fixture(scope="module")
def short():
    """A schedule of 250 steps and the exact network for it."""
    schedule = double(cond.make_schedule("linear", 250))
    model = mixture_eps(schedule.alpha_bars)
    model.classes = len(model.weights)
    return schedule, model


@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["classifier_free", "classifier", "none"])
@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_at_w_0_samples_follow_the_class(short, guidance, sampler):
    (schedule, exact), n = short, 1500
    y = torch.arange(3).repeat_interleave(n)
    xT = torch.randn(3 * n, 2, 1, 1, dtype=torch.float64)
    x = cond.sample(exact, xT.shape, schedule, y, 0.0, guidance, Logits(exact), sampler, 100,
                    clip_x0=False, xT=xT)
    for k in range(3):
        mean, cov = mean_and_cov(x[y == k])
        assert_close(mean, exact.means[k], rtol=0, atol=0.03)
        assert_close(cov, exact.covs[k], rtol=0.15, atol=0.006)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["classifier_free", "classifier"])
@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_at_w_minus_1_samples_follow_the_whole_mixture(short, guidance, sampler):
    schedule, exact = short
    y = torch.zeros(2000, dtype=torch.int64)
    xT = torch.randn(2000, 2, 1, 1, dtype=torch.float64)
    x = cond.sample(exact, xT.shape, schedule, y, -1.0, guidance, Logits(exact), sampler, 100,
                    clip_x0=False, xT=xT)
    assert_close(exact.nearest(x), exact.weights, rtol=0, atol=0.05)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_ancestral_classifier_guidance_moves_the_mean_by_s_sigma_gradient(variance):
    """[ADM] Alg. 1 step by step, with a linear classifier whose gradient is known."""
    schedule = cond.make_schedule("linear", 5, 1e-4, 2e-3)  # mild: x_t stays of order 1
    moves = torch.tensor([[0.7, -0.7]])

    class Still:
        classes = 2

        def __call__(self, x, t, y):
            assert (y == 2).all()  # the unconditional network is asked
            return torch.zeros_like(x)

    asked = []

    def classifier(x, t):
        asked.append(t.unique().item())
        return x.flatten(1) * moves

    x = torch.randn(6, 2, 1, 1)
    y, s = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0.0, 3.0, 1.0, 0.0, 3.0, 1.0])
    torch.manual_seed(1)
    found = list(cond.classifier_guided_process(Still(), classifier, x / 0.8, schedule, y, s, variance,
                                                clip_x0=False, temperature=0.8))
    assert asked == [5, 4, 3, 2, 1]
    torch.manual_seed(1)
    for t in range(5, 0, -1):
        assert found[5 - t][0] == t
        assert_close(found[5 - t][1], x, rtol=1e-4, atol=1e-5)
        p = (x.flatten(1) * moves).softmax(1)
        # the gradient of log softmax_y: m_i ((i == y) - p_i) along x_i
        gradient = moves * (F.one_hot(y, 2) - p)
        beta, bar, before = schedule.betas[t], schedule.alpha_bars[t], schedule.alpha_bars[t - 1]
        x0_hat = x / bar.sqrt()  # the network says eps_hat = 0
        mean = (before.sqrt() * beta * x0_hat + (1 - beta).sqrt() * (1 - before) * x) / (1 - bar)
        sigma2 = beta if variance == "beta" else beta * (1 - before) / (1 - bar)
        z = 0.8 * torch.randn_like(x) if t > 1 else 0
        x = mean + s.view(-1, 1, 1, 1) * sigma2 * gradient.view(6, 2, 1, 1) + sigma2.sqrt() * z
    assert found[5][0] == 0 and len(found) == 6
    assert_close(found[5][1], x, rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    again = cond.sample(Still(), x.shape, schedule, y, s - 1, "classifier", classifier, "ancestral",
                        variance=variance, clip_x0=False, xT=found[0][1] / 0.8, temperature=0.8)
    assert_close(again, found[5][1])


def test_the_clamp_of_x0_hat_comes_before_the_push_of_the_classifier():
    """As the authors do: the mean that is moved is that of the clamped x0_hat."""
    schedule = cond.make_schedule("linear", 5)
    model = Plain()
    x, y = torch.randn(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)

    def classifier(x, t):
        return torch.stack([x.flatten(1).sum(1), 0 * x.flatten(1).sum(1)], 1)

    _, (_, found) = list(cond.classifier_guided_process(model, classifier, x, one_step(schedule), y,
                                                        8.0, "beta"))
    p = x.flatten(1).sum(1).sigmoid().view(-1, 1, 1, 1)
    assert_close(found, -1 + 8 * schedule.betas[5] * (1 - p).expand_as(x), rtol=1e-4, atol=1e-4)


def one_step(schedule):
    """The schedule of one step that is as noisy as the last of this one."""
    return cond.Schedule(*(torch.stack([a[0], a[-1]]) for a in (
        schedule.betas, 1 - schedule.betas, 1 - schedule.betas)))


SAMPLERS = [(guidance, sampler) for guidance in ("classifier_free", "classifier", "none")
            for sampler in ("ddim", "ancestral")]


@pytest.mark.parametrize("guidance, sampler", SAMPLERS)
def test_the_process_yields_every_state_with_its_t(guidance, sampler):
    """t descends from T, x_T is the noise given, (0, x_0) is last and what sample returns."""
    schedule = double(cond.make_schedule("linear", 12))
    exact = mixture_eps(schedule.alpha_bars)
    exact.classes = 3
    xT, y = torch.randn(5, 2, 1, 1, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    how = {"w": 1.0, "guidance": guidance, "classifier": Logits(exact), "sampler": sampler, "S": 4,
           "eta": 0.5}
    torch.manual_seed(2)
    states = list(cond.guided_process(exact, xT, schedule, y, **how))
    ts = [t for t, _ in states]
    assert ts == ([12, 9, 6, 3, 0] if sampler == "ddim" else list(range(12, -1, -1)))
    assert torch.equal(states[0][1], xT)
    for (_, a), (_, b) in zip(states, states[1:], strict=False):
        assert (a - b).abs().max() > 1e-3
    torch.manual_seed(2)
    assert torch.equal(cond.sample(exact, xT.shape, schedule, y, **how, xT=xT), states[-1][1])
    torch.manual_seed(3)
    drawn = cond.sample(exact, xT.shape, schedule, y, **how)  # noise of its own
    assert drawn.shape == xT.shape and (drawn - states[-1][1]).abs().max() > 1e-3


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_classifier_pushes_what_is_already_clamped(eta):
    """As in guided-diffusion: x0_hat = 3 becomes 1, then moves by (1 - a) / sqrt(a) s times the gradient."""
    schedule, classifier = double(cond.make_schedule("linear", 20)), torch.nn.Module()
    classifier.forward = lambda x, t: torch.stack([0 * x.sum((1, 2, 3)), x.sum((1, 2, 3))], 1)
    t, s, y = 12, 0.7, torch.ones(4, dtype=torch.int64)
    xt, a = torch.randn(4, 1, 2, 2).double(), schedule.alpha_bars[12]

    def model(x, t, y):
        return (x - 3 * a.sqrt()) / (1 - a).sqrt()  # x0_hat = 3 everywhere

    model.classes = 2
    found = cond.classifier_guided_eps(model, classifier, xt, t, y, s, schedule.alpha_bars, True)
    gradient = torch.sigmoid(-xt.sum((1, 2, 3), keepdim=True)).expand_as(xt)
    x0_hat = cond.predict_x0(xt, found, t, schedule.alpha_bars)
    assert_close(x0_hat, 1 + (1 - a) / a.sqrt() * s * gradient)
    free = cond.classifier_guided_eps(model, classifier, xt, t, y, s, schedule.alpha_bars)
    assert_close(cond.predict_x0(xt, free, t, schedule.alpha_bars), x0_hat + 2)
    states = list(cond.guided_process(model, xt, schedule, y, s - 1, "classifier", classifier, S=1, eta=eta))
    assert (states[-1][1] > 1).all()  # S = 1: x_0 is x0_hat, which the push took past 1


@pytest.mark.parametrize("guidance, sampler", SAMPLERS)
def test_the_process_is_the_plain_sampler_with_a_guided_network(guidance, sampler):
    """eta, S, spacing, variance and clip_x0 of guided_process reach the steps."""
    schedule = double(cond.make_schedule("linear", 12))
    exact = mixture_eps(schedule.alpha_bars)
    exact.classes, classifier = 3, Logits(exact)
    xT, y = torch.randn(5, 2, 1, 1, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    w = torch.tensor([0.0, 1.0, -1.0, 3.0, 0.5])
    guided = {"classifier_free": lambda x, t: cond.cfg_eps(exact, x, t, y, w),
              "classifier": lambda x, t: cond.classifier_guided_eps(
                  exact, classifier, x, t, y, 1 + w, schedule.alpha_bars, how["clip_x0"]),
              "none": lambda x, t: exact(x, t, y)}[guidance]
    ends = []
    for change in ({}, {"S": 3}, {"eta": 0.9}, {"spacing": "quadratic"}, {"variance": "beta"},
                   {"clip_x0": False}, {"temperature": 0.6}):
        how = {"S": 5, "eta": 0.3, "spacing": "linear", "variance": "beta_tilde",
               "clip_x0": True, "temperature": 0.9} | change
        torch.manual_seed(4)
        *_, (_, found) = cond.guided_process(exact, xT, schedule, y, w, guidance, classifier,
                                             sampler, **how)
        torch.manual_seed(4)
        if sampler == "ddim":
            wanted = cond.ddim_process(guided, xT, schedule, how["S"], how["eta"], how["spacing"],
                                       how["clip_x0"] and guidance != "classifier", how["temperature"])
        elif guidance == "classifier":
            wanted = cond.classifier_guided_process(exact, classifier, xT, schedule, y, 1 + w,
                                                    how["variance"], how["clip_x0"], how["temperature"])
        else:
            wanted = cond.reverse_process(guided, xT, schedule, how["variance"], how["clip_x0"],
                                          how["temperature"])
        *_, (_, wanted) = wanted
        assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        ends.append((change, found))
    matter = {"S", "eta", "spacing"} if sampler == "ddim" else {"variance"}
    for change, end in ends[1:]:
        told = (end - ends[0][1]).abs().max() > 1e-4
        assert told == bool(set(change) & (matter | {"clip_x0", "temperature"})), change


def test_the_gradient_is_taken_with_respect_to_x_t():
    seen = []

    def classifier(x, t):
        seen.append(x)
        return torch.stack([x.flatten(1).sum(1), 0 * x.flatten(1).sum(1)], 1)

    model, alpha_bars = Plain(), torch.tensor([1.0, 0.5])
    x, y = torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    found = cond.classifier_guided_eps(model, classifier, x, 1, y, 4.0, alpha_bars)
    assert torch.equal(seen[0], x) and (model.calls[0][2] == model.classes).all()
    # log softmax_0 of (u, 0) has slope 1/2 at u = 0
    assert_close(found, model(x, torch.ones(3), torch.full((3,), 7)) - math.sqrt(0.5) * 4 * 0.5)


# The networks


@BOTH
def test_output_changes_with_the_label_and_with_t(make):
    model, x = awake(make()), torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        outs = [model(x, torch.tensor([t]), torch.tensor([y]))
                for t, y in [(10, 0), (10, 1), (10, 5), (11, 0), (900, 0)]]
    for i, a in enumerate(outs):
        assert a.shape == x.shape
        for b in outs[i + 1:]:
            assert (a - b).abs().max() > 1e-5
    with torch.no_grad():  # float t is taken too
        assert_close(model(x, torch.tensor([10.0]), torch.tensor([0])), outs[0])


@BOTH
def test_the_first_guess_is_zero(make):
    x = torch.randn(2, 1, 16, 16)
    assert not make()(x, torch.tensor([3, 900]), torch.tensor([1, 2])).any()


def test_adaptive_group_norm_scales_and_shifts_after_the_norm():
    block, x, emb = cond.ResBlock(4, 4, 6, 2, 0.0), torch.randn(3, 4, 5, 5), torch.randn(3, 6)
    torch.nn.init.dirac_(block.conv2.weight)
    scale, shift = block.time(torch.nn.functional.silu(emb)).chunk(2, 1)
    h = block.conv1(torch.nn.functional.silu(block.norm1(x))).view(3, 2, -1)
    h = (h - h.mean(2, keepdim=True)) / (h.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    h = h.view(3, 4, 5, 5) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    assert_close(block(x, emb), x + torch.nn.functional.silu(h), rtol=1e-4, atol=1e-5)


def test_a_dit_block_starts_as_the_identity():
    model, tokens, c = dit(depth=3), torch.randn(2, 16, 16), torch.randn(2, 16)
    for block in model.blocks:
        assert torch.equal(block(tokens, c), tokens)
    torch.nn.init.normal_(block.condition.bias)
    assert (block(tokens, c) - tokens).abs().max() > 0.01


def test_dit_positions_tell_rows_from_columns():
    p = cond.positions_2d(5, 6, 16).view(5, 6, 16)
    assert_close(p[2, :, :8], p[2, :1, :8].expand(6, 8))  # the first half knows the row
    assert_close(p[:, 3, 8:], p[:1, 3, 8:].expand(5, 8))  # the second half the column
    assert torch.cdist(p.view(30, 16), p.view(30, 16)).fill_diagonal_(9).min() > 0.1
    assert_close(p[1, 0, :4], (10000 ** (-torch.arange(4.0) / 4)).sin())
    assert_close(p[0, 5, 12:], (5 * 10000 ** (-torch.arange(4.0) / 4)).cos())


@torch.no_grad()
def test_a_dit_knows_where_its_patches_are(monkeypatch):
    """Two patches swapped do not just swap the output: without positions they would."""
    model, t = awake(dit()), torch.tensor([5])
    x = torch.randn(1, 1, 16, 16)

    def swapped(x):
        out = x.clone()
        out[..., :4, :4], out[..., 8:12, 4:8] = x[..., 8:12, 4:8], x[..., :4, :4]
        return out

    assert (model(swapped(x), t) - swapped(model(x, t))).abs().max() > 0.05
    monkeypatch.setattr(cond, "positions_2d", lambda rows, columns, width, device=None:
                        torch.zeros(rows * columns, width, device=device))
    assert_close(model(swapped(x), t), swapped(model(x, t)), rtol=1e-3, atol=1e-4)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, one head. q, k, v: (N, d)."""
    return (q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v


@torch.no_grad()
def test_dit_attention_is_that_of_the_formula_head_by_head():
    block, x = cond.DiTBlock(12, 3), torch.randn(2, 7, 12)
    block.qkv.weight.mul_(4)  # so that the softmax is far from uniform
    found = block.attend(x)
    for b in range(2):
        q, k, v = block.qkv(x[b]).chunk(3, 1)
        heads = [attention(q[:, i:i + 4], k[:, i:i + 4], v[:, i:i + 4]) for i in (0, 4, 8)]
        assert_close(found[b], block.out(torch.cat(heads, 1)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_unet_attention_is_that_of_the_formula_head_by_head():
    layer, x = awake(cond.Attention(12, 3, 4)), torch.randn(2, 12, 3, 4)
    layer.qkv.weight.mul_(4)
    found = layer(x)
    for b in range(2):
        rows = layer.qkv(F.group_norm(x, 4, layer.norm.weight, layer.norm.bias))[b].flatten(1).T
        q, k, v = rows.chunk(3, 1)  # each (12 positions, 12 channels)
        heads = [attention(q[:, i:i + 4], k[:, i:i + 4], v[:, i:i + 4]) for i in (0, 4, 8)]
        merged = torch.cat(heads, 1).T.reshape(1, 12, 3, 4)
        assert_close(found[b:b + 1], x[b:b + 1] + layer.out(merged), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_dit_block_is_adaln_zero_by_the_formula():
    """Both branches are normed, shifted, scaled and gated, each by its own part of c."""
    block, x, c = cond.DiTBlock(8, 2).eval(), 3 * torch.randn(2, 5, 8) + 2, torch.randn(2, 8)
    parts = block.condition(F.silu(c)).view(2, 6, 1, 8).unbind(1)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts

    def norm(x):
        gap = x - x.mean(2, keepdim=True)
        return gap / (gap.square().mean(2, keepdim=True) + 1e-6).sqrt()

    h = x + gate1 * block.attend(norm(x) * (1 + scale1) + shift1)
    wanted = h + gate2 * block.mlp(norm(h) * (1 + scale2) + shift2)
    assert_close(block(x, c), wanted, rtol=1e-4, atol=1e-5)
    gelu = block.mlp[1](torch.tensor([1.0]))
    inner = math.tanh(math.sqrt(2 / math.pi) * (1 + 0.044715))
    assert_close(gelu, torch.tensor([0.5 * (1 + inner)]))


def test_dit_tokens_attend_to_each_other():
    """Another last patch changes the noise predicted for the first one."""
    torch.manual_seed(0)
    model = awake(dit())
    x = torch.randn(1, 1, 16, 16)
    other, t = x.clone(), torch.tensor([5])
    other[..., 12:, 12:] += 1
    with torch.no_grad():
        change = (model(other, t) - model(x, t)).abs()
    assert change[..., :4, :4].max() > 1e-3


@torch.no_grad()
def test_a_dit_token_sees_as_many_patches_as_its_kernel_says():
    """With the blocks asleep a pixel changes its own patch, or the patches around it too."""
    for kernel, reach in ((1, 0), (3, 1)):
        model, x = dit(kernel=kernel), torch.randn(1, 1, 16, 16)
        torch.nn.init.normal_(model.out.weight)
        for conv, other in ((model.embed, model.out), (model.out, model.embed)):
            kept = other.weight.clone()
            middle = torch.zeros_like(kept)
            middle[:, :, kernel // 2, kernel // 2] = kept[:, :, kernel // 2, kernel // 2]
            other.weight.copy_(middle)  # one of the two at a time
            brighter = x.clone()
            brighter[0, 0, 9, 5] += 3  # in the patch of row 2 and column 1
            change = (model(brighter, torch.tensor([5])) - model(x, torch.tensor([5]))).abs()
            changed = F.max_pool2d(change, 4)[0, 0] > 1e-5
            wanted = torch.zeros(4, 4, dtype=torch.bool)
            wanted[2 - reach:3 + reach, 1 - reach:2 + reach] = True
            assert torch.equal(changed, wanted), (kernel, conv, changed)
            other.weight.copy_(kept)


def test_dit_puts_each_patch_back_where_it_came_from(monkeypatch):
    """With the layers opened so that tokens pass unmixed, a bright patch stays in its place."""
    model = dit(width=64, patch=4)
    torch.nn.init.zeros_(model.embed.weight)
    torch.nn.init.eye_(model.embed.weight[:16, :, 0, 0])
    torch.nn.init.eye_(model.out.weight[:, :16, 0, 0])
    monkeypatch.setattr(cond, "positions_2d", lambda rows, columns, width, device=None:
                        torch.zeros(rows * columns, width, device=device))
    x = torch.zeros(1, 1, 16, 24)
    x[0, 0, 4:8, 8:12] = torch.arange(16.0).view(4, 4) / 15
    out = model(x, torch.tensor([1]), torch.tensor([0]))
    token = torch.cat([x[0, 0, 4:8, 8:12].flatten(), torch.zeros(48)])
    wanted = torch.nn.functional.layer_norm(token, (64,), eps=1e-6)[:16].view(4, 4)
    assert_close(out[0, 0, 4:8, 8:12], wanted, rtol=1e-4, atol=1e-5)
    out[0, 0, 4:8, 8:12] = 0
    assert not out.any()


@BOTH
@torch.no_grad()
def test_pictures_need_not_be_square(make):
    model, x = awake(make()), torch.randn(2, 1, 16, 24)
    t, y = torch.tensor([3, 900]), torch.tensor([1, 5])
    out = model(x, t, y)
    assert out.shape == x.shape
    assert_close(model(x[:1], t[:1], y[:1]), out[:1], rtol=1e-3, atol=1e-4)
    assert model(x.mT.contiguous(), t, y).shape == (2, 1, 24, 16)
    if make is dit:  # 4 rows and 6 columns of patches, each told its own place
        seen = []
        model.embed.register_forward_hook(lambda _, __, out: seen.append(out.flatten(2).mT))
        model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(x, t, y)
        wanted = cond.positions_2d(4, 6, 16).expand(2, 24, 16)
        assert_close(seen[1] - seen[0], wanted, rtol=1e-4, atol=1e-5)
    schedule = cond.make_schedule("linear", 4)
    assert cond.sample(model, x.shape, schedule, y, S=2).shape == x.shape


@BOTH
@torch.no_grad()
def test_the_networks_work_in_float64(make):
    model, x = awake(make()), torch.randn(2, 1, 16, 16)
    t, y = torch.tensor([3, 900]), torch.tensor([1, 5])
    single = model(x, t, y)
    double = model.double()(x.double(), t, y)
    assert double.dtype == torch.float64
    assert_close(double.float(), single, rtol=1e-3, atol=1e-3)
    classifier = awake(cond.NoisyClassifier(1, 5, 8, 4)).double()
    assert classifier(x.double(), t).dtype == torch.float64


@torch.no_grad()
def test_the_unet_hands_each_skip_to_its_twin_on_the_way_up():
    """What a level made going down is concatenated, last made first, going up."""
    model, made, got = awake(unet(blocks=2)), [], []
    model.conv_in.register_forward_hook(lambda _, __, out: made.append(out))
    for module in model.down:
        last = module if isinstance(module, cond.Downsample) else module[1]
        last.register_forward_hook(lambda _, __, out: made.append(out))
    for module in model.up:
        if not isinstance(module, cond.Upsample):
            module[0].register_forward_pre_hook(lambda _, args: got.append(args[0]))
    model(torch.randn(2, 1, 16, 16), torch.tensor([3, 9]))
    assert len(made) == len(got) == 6
    for skip, h in zip(reversed(made), got, strict=True):
        assert skip.abs().max() > 0.1
        assert torch.equal(h[:, -skip.shape[1]:], skip)


@torch.no_grad()
def test_the_unet_sees_its_input_through_the_skips_alone():
    """Where the middle is silenced, the picture still reaches the output."""
    model, t = awake(unet()), torch.tensor([5])
    model.mid2.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    a, b = (model(torch.randn(1, 1, 16, 16), t) for _ in range(2))
    assert (a - b).abs().max() > 0.05


@pytest.mark.parametrize("name, millions", [("dit_s", 33), ("dit_b", 130), ("dit_l", 458),
                                            ("dit_xl", 675)])
def test_dit_sizes_are_those_of_the_paper(name, millions):
    cfg = cond.PRESETS[name]
    with torch.device("meta"):
        model = cond.DiT(4, 32, cfg.dit_patch, cfg.dit_width, cfg.dit_depth, cfg.dit_heads, 1000,
                         out_channels=8)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / 1e6 - millions) < 0.005 * millions, count
    assert model(torch.empty(2, 4, 32, 32, device="meta"), torch.ones(2, device="meta"),
                 torch.zeros(2, dtype=torch.int64, device="meta")).shape == (2, 8, 32, 32)


def overfit(model, lr, steps=150):
    schedule = cond.make_schedule("linear", 1000)
    x0, y = torch.randn(8, 1, 16, 16).sign(), torch.arange(8) % 5
    t, eps = torch.linspace(50, 950, 8).long(), torch.randn(8, 1, 16, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        loss = cond.ddpm_loss(lambda x, t: model(x, t, y), x0, t, eps, schedule)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.slow
def test_the_unet_overfits_one_batch():
    assert overfit(unet(channels=16), 3e-3) < 0.1


def test_the_dit_overfits_one_batch():
    assert overfit(dit(width=64, depth=2), 3e-3) < 0.1


@BOTH
def test_gradient_checkpointing_gives_the_same_gradients(make, tmp_path):
    """--grad_checkpointing: each block's activations are computed again, in the loop alone."""
    found = []
    x, t, y = torch.randn(2, 1, 16, 16), torch.tensor([3, 500]), torch.tensor([1, 2])
    for flags, times in ([], 1), (["--grad_checkpointing"], 2):
        torch.manual_seed(3)
        model, count = awake(make()).train(), []
        blocks = [m for m in model.modules() if isinstance(m, cond.ResBlock | cond.DiTBlock)]
        for block in blocks:
            block.norm1.register_forward_hook(lambda *_, count=count: count.append(1))
        _, run, _ = open_run(cond, tmp_path, *flags)
        for _ in run.steps(1, model=model, save=False):
            model(x, t, y).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(count) == times * len(blocks)
        count.clear()
        model(x, t, y).square().mean().backward()
        assert len(count) == len(blocks)
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


def test_the_noisy_classifier_sees_t_and_the_picture():
    classifier = awake(cond.NoisyClassifier(1, 5, 8, 4))
    x = torch.randn(2, 1, 28, 28)
    a, b = (classifier(x, torch.tensor([t, t])) for t in (10, 800))
    assert a.shape == (2, 5) and (a - b).abs().max() > 1e-4
    assert (a[0] - a[1]).abs().max() > 1e-4
    y = torch.tensor([1, 2])
    gradient = cond.classifier_gradient(classifier, x, torch.tensor([10, 10]), y)
    step = 1e-2 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def log_p(x):
        out = classifier(x, torch.tensor([10, 10])).log_softmax(1)
        return out.gather(1, y[:, None])[:, 0].detach()

    assert_close((log_p(x + step) - log_p(x - step)) / 2e-2, gradient.flatten(1).norm(dim=1),
                 rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("page", [cond, sb], ids=["conditional", "score based"])
@pytest.mark.parametrize("H, W", [(4, 4), (4, 12), (28, 28)])
def test_a_noisy_classifier_pools_pictures_of_every_size_to_two_by_two(page, H, W):
    """Of 4 x 4 pixels a single one is left, which stands for all four."""
    classifier, x, pooled = awake(page.NoisyClassifier(1, 5, 8, 4)), torch.randn(3, 1, H, W), []
    classifier.norm_out.register_forward_hook(lambda _, __, out: pooled.append(F.silu(out)))
    classifier.out.register_forward_pre_hook(lambda _, args: pooled.append(args[0]))
    x.requires_grad_()
    logits = classifier(x, torch.tensor([3, 3, 900]))
    h, last = pooled
    h = h.repeat_interleave(2, 2) if H == 4 else h
    h = h.repeat_interleave(2, 3) if W == 4 else h
    assert_close(last, F.adaptive_avg_pool2d(h, 2).flatten(1))
    assert logits.shape == (3, 5) and (logits[0] - logits[1]).abs().max() > 1e-4
    gradient, = torch.autograd.grad(logits.log_softmax(1)[:, 2].sum(), x)
    assert gradient.isfinite().all() and (gradient.flatten(1).abs().amax(1) > 1e-6).all()


# The loops: what the networks are given


@pytest.fixture(scope="module")
def coded():
    """Pictures of one grey each, that of their class: a picture says its label.

    Held-out pictures are a little lighter; the classes come in no order.
    """
    def part(n, shift):
        y = torch.randperm(n, generator=torch.Generator().manual_seed(n)) % 10
        return (y / 5 - 0.9 + shift).view(-1, 1, 1, 1).expand(n, 1, 8, 8).contiguous(), y

    (train, train_labels), (test, test_labels) = part(300, 0.0), part(30, 0.05)
    return Data("coded", train, test, train_labels, test_labels, tuple("abcdefghij"))


def label_of(x):
    """The class of coded training pictures; a grey of no class is 99."""
    grey = (x.mean((1, 2, 3)) + 0.9) * 5
    return torch.where((grey - grey.round()).abs() < 0.01, grey.round(), 99).long()


@pytest.mark.parametrize("flags, share", [
    (["--p_uncond", 0.3], 0.3), (["--p_uncond", 0.3, "--backbone", "dit"], 0.3),
    (["--p_uncond", 0], 0.0),
], ids=["unet", "dit", "none dropped"])
def test_training_gives_each_picture_its_label_or_the_null_class(flags, share, tmp_path, coded,
                                                                 monkeypatch):
    """[CFG] Alg. 1: y belongs to x_0 and is the null class, 10, with probability p_uncond."""
    pictures, got = [], []
    spied(monkeypatch, cond, "v_loss", lambda given, _: pictures.append(given["x0"]))

    def listen(_, model):
        def hear(_, args, named):
            got.append((args[1], named["y"] if "y" in named else (*args, None, None)[2]))
        model.register_forward_pre_hook(hear, with_kwargs=True)

    spied(monkeypatch, cond, "make_model", listen)
    cfg, run, _ = open_run(cond, tmp_path, "--batch_size", 200,
                           "--preview_every", 100, "--dit_patch", 4, *flags)
    model = cond.train(cfg, run, coded)
    assert len(pictures) == len(got) == cfg.steps and not model.training
    x0, y = torch.cat(pictures), torch.cat([y for _, y in got])
    kept = y != 10
    assert (label_of(x0) < 10).all()  # of the training part
    assert torch.equal(y[kept], label_of(x0)[kept])
    assert len(y) == 1200 and abs((~kept).float().mean() - share) < 0.055 * (share > 0) + 1e-9
    for c in range(10 if share else 0):  # every class loses some, none all
        assert 0.1 < (~kept)[label_of(x0) == c].float().mean() < 0.5
    t = torch.cat([t for t, _ in got])
    assert set(t.tolist()) == set(range(1, cfg.T + 1))


@pytest.mark.parametrize("flip", [False, True])
def test_training_mirrors_pictures_where_flip_says_so(flip, tmp_path, monkeypatch):
    """In both loops, that of the network and that of the noisy classifier."""
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    x = torch.full((40, 1, 8, 8), -0.5)
    x[..., :4] = 0.5  # bright on the left
    data = Data("half", x, x[:4], torch.arange(40) % 10, torch.arange(4), tuple("abcdefghij"))
    cfg, run, _ = open_run(cond, tmp_path, "--preview_every", 100, *["--flip"] * flip)
    seen, batch = [], run.batch

    def watching(*args, **how):
        out = batch(*args, **how)
        seen.append(out[0])
        return out

    run.batch = watching
    cond.train(cfg, run, data)
    assert len(seen) == cfg.steps
    cond.train_classifier(cfg, run, data, cond.make_schedule("linear", cfg.T))
    assert len(seen) == cfg.steps + cfg.classifier_steps
    for part in (seen[:cfg.steps], seen[cfg.steps:]):
        share = (torch.cat(part)[:, 0, 0, 0] < 0).float().mean()
        assert 0.2 < share < 0.8 if flip else share == 0


def test_the_noisy_classifier_learns_from_noisy_pictures_and_their_labels(tmp_path, coded,
                                                                          monkeypatch):
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps with t over all of 1..T."""
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    batches, given, labels = [], [], []

    def listen(classifier, args):
        given.append(args)

    def made(_, classifier):
        classifier.register_forward_pre_hook(listen)

    spied(monkeypatch, cond, "NoisyClassifier", made)
    true = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda logits, y, *rest: labels.append(y)
                        or true(logits, y, *rest))
    cfg, run, _ = open_run(cond, tmp_path, "--classifier_steps", 30, "--T", 12, "--S", 5)
    batch = run.batch

    def watching(*args, **how):
        batches.append(batch(*args, **how))
        return batches[-1]

    run.batch = watching
    schedule = cond.make_schedule("linear", 12)
    classifier = cond.train_classifier(cfg, run, coded, schedule)
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())
    assert len(batches) == len(given) == len(labels) == 30
    x0, y = (torch.cat(part) for part in zip(*batches, strict=True))
    xt, t = (torch.cat(part) for part in zip(*given, strict=True))
    assert torch.equal(torch.cat(labels), y) and torch.equal(label_of(x0), y)
    assert set(t.tolist()) == set(range(1, 13))
    alpha_bar = schedule.alpha_bars[t].view(-1, 1, 1, 1)
    eps = (xt - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()  # a roll leaves grey as it is
    for value in range(1, 13):
        of_t = eps[t == value]
        assert_close(of_t.std().item(), 1.0, rtol=0.06, atol=0)
        assert abs(of_t.mean()) < 0.08
    assert not run.path("classifier_log.csv").exists()  # and no checkpoint of the run's
    assert not run.path("checkpoint.pt").exists()


def test_the_noisy_classifier_is_trained_by_the_gradient_of_each_batch(tmp_path, coded, monkeypatch):
    """Of this batch alone, clipped to a norm of 1, by a rate that warms up and decays as cfg says."""
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    made, wanted, rates = [], [], []
    spied(monkeypatch, cond, "NoisyClassifier", lambda _, classifier: made.append(classifier))
    spied(monkeypatch, F, "cross_entropy", lambda _, loss: wanted.append(
        torch.autograd.grad(loss, list(made[0].parameters()), retain_graph=True)))
    step = torch.optim.AdamW.step

    def watching(optimizer, *args, **how):
        norm = torch.cat([g.flatten() for g in wanted[-1]]).norm()
        for p, gradient in zip(made[0].parameters(), wanted[-1], strict=True):
            assert_close(p.grad, gradient / max(1, norm), rtol=1e-3, atol=1e-5)
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **how)

    monkeypatch.setattr(torch.optim.AdamW, "step", watching)
    cfg, run, _ = open_run(cond, tmp_path, "--classifier_steps", 5, "--warmup", 3)
    cond.train_classifier(cfg, run, coded, cond.make_schedule("linear", 20))
    norms = [torch.cat([g.flatten() for g in gradients]).norm() for gradients in wanted]
    assert len(norms) == 5 and max(norms) > 1.1  # the clip acts
    assert rates == pytest.approx([3e-3 * min(1, (i + 1) / 3) * (1 + math.cos(math.pi * i / 5)) / 2
                                   for i in range(5)])


def test_the_noisy_classifier_is_kept_on_disk_unless_it_was_stopped(tmp_path, coded, monkeypatch):
    """Another schedule, length or data set is another classifier; the draws stay as they were."""
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    loops, schedule = [], cond.make_schedule("linear", 20)

    def fitted(*flags, data=coded, stop=False):
        cfg, run, _ = open_run(cond, tmp_path, *flags)
        steps = run.steps

        def counted(*args, **kwargs):
            loops.append(1)
            for step in steps(*args, **kwargs):
                run.stopped = stop
                yield step

        run.steps = counted
        torch.manual_seed(5)
        classifier = cond.train_classifier(cfg, run, data, schedule)
        assert_close(torch.rand(1), wanted)
        return classifier.state_dict()

    torch.manual_seed(5)
    wanted = torch.rand(1)
    fitted(stop=True)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())
    first, again = fitted(), fitted()
    assert len(loops) == 2 and len(list((tmp_path / "cache").iterdir())) == 1
    assert_same_tree(dict(first), dict(again))
    lighter = Data("coded", coded.train + 0.1, coded.test, coded.train_labels, coded.test_labels,
                   coded.classes)
    for n, (flags, data) in enumerate([(["--classifier_steps", 5], coded), (["--T", 19], coded),
                                       (["--beta_T", 0.03], coded), ([], lighter)], 3):
        fitted(*flags, data=data)
        assert len(loops) == n


# Main: what the flags reach


class Pictures:
    """Stands in for `plotting`: notes what would be drawn, {name of the file: arguments}."""

    def __init__(self):
        self.drawn = {}

    def __getattr__(self, name):
        if name == "evenly":
            return plotting.evenly

        def note(*args, **_):
            if args and hasattr(args[0], "name"):
                self.drawn[args[0].name] = args[1:]
        return note


@pytest.fixture(scope="module")
def trained(tmp_path_factory, coded):
    """The folder of a smoke run on the coded pictures, and its averaged network."""
    cfg, run, _ = open_run(cond, tmp_path_factory.mktemp("trained"), "--preview_every", 100)
    return run.folder, cond.train(cfg, run, coded)


@pytest.fixture
def drawing(trained, coded, tmp_path, monkeypatch):
    """main --sample of that run with some flags: (figures, calls of each sampler, run folder)."""
    def draw(*flags, classifier=None):
        figures, calls = Pictures(), {}
        for name in ("ddim_process", "reverse_process", "classifier_guided_process", "cfg_eps",
                     "classifier_guided_eps"):
            calls[name] = []
            spied(monkeypatch, cond, name, lambda given, _, into=calls[name]: into.append(given))
        monkeypatch.setattr(cond, "plotting", figures)
        monkeypatch.setattr(cond, "load_images", lambda *_: coded)
        monkeypatch.setattr(cond.quality, "load_judge", lambda *_, **__: (None, {}))
        if classifier:
            monkeypatch.setattr(cond, "train_classifier", lambda *_: classifier)
        cond.main(["--sample", str(trained[0]), "--out", str(tmp_path / "drawn"), "--device", "cpu",
                   *map(str, flags)])
        return figures.drawn, calls, only_run(tmp_path / "drawn", "conditional")
    return draw


def runs_of(values):
    """Each value once where it is repeated in a row."""
    return [value for value, _ in groupby(values)]


def test_the_flags_of_ddim_reach_the_sampler(drawing, trained):
    """S, eta, spacing and clip_x0 everywhere; each figure its w and classes; the network is the
    average in eval mode.
    """
    figures, calls, folder = drawing("--S", 3, "--eta", 0.5, "--spacing", "quadratic",
                                     "--no-clip_x0", "--w", -1, 0, 3, "--w_samples", 0.5,
                                     "--classes", 3, 1, 4, "--n_samples", 7)
    assert calls["reverse_process"] == calls["classifier_guided_process"] == []
    assert len(calls["ddim_process"]) == 1 + 3 + 5 + 1  # samples, grid, same_noise, the film
    for given in calls["ddim_process"]:
        assert (given["S"], given["eta"], given["spacing"]) == (3, 0.5, "quadratic")
        assert given["clip_x0"] is False
        wanted = cond.make_schedule("linear", 20).alpha_bars
        assert torch.equal(given["schedule"].alpha_bars, wanted)
    asked = calls["cfg_eps"]
    assert runs_of([float(given["w"]) for given in asked]) == [0.5, -1, 0, 3, 0.5]
    for given in asked:
        assert not given["model"].training
        for name, value in trained[1].state_dict().items():
            assert torch.equal(given["model"].state_dict()[name], value)
    labels = runs_of([tuple(given["y"].tolist()) for given in asked])
    assert labels == [(3, 1, 4), tuple(range(10)), (3, 1, 4)]  # samples and grid; noise; the film
    found = json.loads((folder / "metrics.json").read_text())
    assert found["sampling"]["n"] == 3 and found["sampling"]["network_calls"] == 3
    rows, _, names, columns = figures["grid.png"]
    assert names == ["unconditional", "w = 0", "w = 3"] and columns == ["d", "b", "e"]
    noises = [given["xT"] for given in calls["ddim_process"]]
    assert all(torch.equal(xT, noises[1]) for xT in noises[2:4])  # grid: each column one noise
    for xT in noises[4:9]:  # same_noise: each row one noise
        assert torch.equal(xT, xT[:1].expand_as(xT))
    assert not torch.equal(noises[4], noises[5])


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_the_flags_of_the_ancestral_sampler_reach_it(variance, drawing):
    _, calls, folder = drawing("--sampler", "ancestral", "--variance", variance, "--n_samples", 4,
                               "--no-clip_x0", "--w", 2)
    assert calls["ddim_process"] == [] and len(calls["reverse_process"]) == 1 + 1 + 5 + 1
    for given in calls["reverse_process"]:
        assert (given["variance"], given["clip_x0"]) == (variance, False)
    found = json.loads((folder / "metrics.json").read_text())
    assert found["sampling"]["network_calls"] == 20


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_the_flags_of_classifier_guidance_reach_it(sampler, drawing):
    """The scale is s = 1 + w, the classifier the one that was trained."""
    classifier = cond.NoisyClassifier(1, 10, 8, 4).eval().requires_grad_(False)
    figures, calls, _ = drawing("--guidance", "classifier", "--sampler", sampler, "--variance",
                                "beta", "--w", -1, 0, 3, "--w_samples", 0.5, "--n_samples", 4,
                                "--eta", 0.25, classifier=classifier)
    used = calls["classifier_guided_eps" if sampler == "ddim" else "classifier_guided_process"]
    assert runs_of([float(given["s"]) for given in used]) == [1.5, 0, 1, 4, 1.5]
    assert all(given["classifier"] is classifier for given in used)
    assert figures["grid.png"][2] == ["unconditional", "s = 1", "s = 4"]
    if sampler == "ancestral":
        assert calls["ddim_process"] == [] and calls["reverse_process"] == []
        assert all(given["variance"] == "beta" and given["clip_x0"] for given in used)
    else:
        assert all(given["eta"] == 0.25 and given["S"] == 5 for given in calls["ddim_process"])


def test_without_guidance_the_labels_alone_are_used(drawing):
    figures, calls, _ = drawing("--guidance", "none", "--n_samples", 4)
    assert calls["cfg_eps"] == calls["classifier_guided_eps"] == []
    assert len(calls["ddim_process"]) == 1 + 1 + 5 + 1
    assert figures["grid.png"][2] == ["no guidance"]


# Resume


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3, 6])
def test_a_resumed_run_ends_like_one_that_never_stopped(stop, tmp_path, coded):
    """To the last bit of its checkpoint and the last byte of its log."""
    states, logs = [], []
    for name in ("whole", "stopped"):
        cfg, run, _ = open_run(cond, tmp_path / name, "--dropout", 0.1)
        if name == "stopped":
            log = run.log

            def stopping(run=run, log=log, **values):
                log(**values)
                run.stopped = run.step + 1 == stop

            run.log = stopping
            cond.train(cfg, run, coded)
            assert torch.load(run.path("checkpoint.pt"), weights_only=True)["step"] == stop
            cfg, run, _ = open_run(cond, tmp_path / name, "--resume", run.folder)
        cond.train(cfg, run, coded)
        states.append(torch.load(run.path("checkpoint.pt"), weights_only=True))
        logs.append(run.path("log.csv").read_bytes())
    assert_same_tree(*states)
    assert logs[0] == logs[1]


# The command line


@pytest.mark.slow
@pytest.mark.parametrize("argv, words", [
    (["--classes", "3", "10"], ["--classes 10", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"]),
    (["--classes", "-1"], ["--classes -1", "0, 1, 2"]),
    (["--classes", "cat"], ["--classes", "cat"]),
    (["--w", "much"], ["--w", "much"]),
    (["--w", "nan"], ["--w nan"]),
    (["--w", "0", "-2"], ["--w 0.0 -2.0", ">= -1"]),
    (["--w"], ["--w", "at least one"]),
    (["--w_samples", "inf"], ["--w_samples inf"]),
    (["--backbone", "mlp"], ["--backbone", "mlp", "unet", "dit"]),
    (["--guidance", "clip"], ["--guidance", "clip", "classifier_free", "none"]),
    (["--sampler", "euler"], ["--sampler", "euler", "ddim", "ancestral"]),
    (["--backbone", "dit", "--dit_kernel", "2"], ["--dit_kernel 2", "odd"]),
    (["--backbone", "dit", "--dit_patch", "5"], ["--image_size 28", "multiple of 5", "25, 30"]),
    (["--image_size", "30", "--backbone", "unet"], ["--image_size 30", "multiple of 4"]),
    (["--backbone", "dit", "--dit_heads", "5"], ["--dit_heads 5", "--dit_width 16"]),
    (["--backbone", "dit", "--dit_width", "18"], ["--dit_width 18", "multiple of 4"]),
    (["--compare", "1", "--dit_heads", "5"], ["--dit_heads 5", "--dit_width 16"]),
    (["--compare", "-1"], ["--compare -1.0", ">= 0"]),
    (["--compare", "1", "--sample"], ["--compare 1", "was made with 0"]),
    (["--p_uncond", "1.1"], ["--p_uncond 1.1", "[0, 1]"]),
    (["--p_uncond", "1"], ["--p_uncond 1", "below 1", "--guidance classifier_free"]),
    (["--p_uncond", "1", "--guidance", "none"], ["--p_uncond 1", "below 1", "--guidance none"]),
    (["--p_uncond", "0"], ["--p_uncond 0", "null class"]),
    (["--S", "21"], ["--S 21", "at most T, 20"]),
    (["--classifier_steps", "0"], ["--classifier_steps 0", ">= 1"]),
    (["--preset", "dit_xxl"], ["--preset", "dit_xxl", "dit_xl"]),
])
def test_a_mistake_is_one_line_and_status_2(argv, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        preset = [] if "--preset" in argv else ["--preset", "smoke"]
        cond.main([*preset, "--device", "cpu", "--out", str(tmp_path), *argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    for word in words:
        assert word in lines[0]
    assert not list(tmp_path.rglob("*.pt"))


def test_data_without_labels_is_refused(tmp_path, capsys):
    from PIL import Image

    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 9, 9)).save(tmp_path / f"{i}.png")
    with pytest.raises(SystemExit) as stop:
        cond.main(["--preset", "smoke", "--dataset", f"folder:{tmp_path}", "--out",
                   str(tmp_path / "o")])
    assert stop.value.code == 2 and "no labels" in capsys.readouterr().err


# Runs


FIGURES = ("grid", "samples", "same_noise", "loss", "preview")


def check_pictures(folder, names=FIGURES):
    for name in names:
        assert len(open_picture(folder / f"{name}.png")) == 1
    assert len(open_picture(folder / "denoising.gif")) > 5


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of one smoke run, started from another directory."""
    away = tmp_path_factory.mktemp("away")
    done = run_script(SCRIPT, "--preset", "smoke", cwd=away)
    assert done.returncode == 0, done.stderr
    return only_run(away / "outputs", "conditional")


@pytest.mark.slow
def test_smoke_run_writes_every_file(smoke):
    check_pictures(smoke)
    with open(smoke / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    assert json.loads((smoke / "config.json").read_text())["script"] == "conditional"
    found = json.loads((smoke / "metrics.json").read_text())
    assert found["sampling"]["n"] == 20 and found["sampling"]["seconds"] > 0
    assert 0 <= found["samples"]["accuracy"] <= 1
    assert found["samples"]["accuracy_of_held_out"] > 0.95
    assert found["samples"]["legible"] < 0.01  # six steps of training draw no digits
    state = torch.load(smoke / "checkpoint.pt", weights_only=True)
    assert state["step"] == 6 and state["loop"] == "model" and state["script"] == "conditional"
    assert state["ema"]["network.label.weight"].shape[0] == 11


@pytest.mark.slow
def test_sample_draws_exactly_the_classes_and_weights_asked_for(smoke, tmp_path, monkeypatch):
    tables, asked = {}, []
    spied(monkeypatch, cond, "sample", lambda given, _: asked.append(
        (given["y"].tolist(), float(given["w"]))))
    spied(monkeypatch, cond, "guided_process", lambda given, _: asked.append(
        (given["y"].tolist(), float(given["w"]))))
    monkeypatch.setattr(cond.plotting, "table", lambda path, rows, title, *labels:
                        tables.update({path.name: (rows, *labels)}))
    cond.main(["--sample", str(smoke), "--out", str(tmp_path), "--classes", "3", "1", "4", "1", "5",
               "--w", "0", "1", "3", "8"])
    rows, names, columns = tables["grid.png"]
    assert len(rows) == 4 and all(len(row) == 5 for row in rows)
    assert names == ["w = 0", "w = 1", "w = 3", "w = 8"] and columns == ["3", "1", "4", "1", "5"]
    y, w = asked[0]
    assert y == [3, 1, 4, 1, 5] and w == 2.0  # these and no others
    (drawn, real), names, columns = tables["samples.png"]
    assert len(drawn) == len(real) == 5 and columns == ["3", "1", "4", "1", "5"]
    data = load_images("digits")
    for picture, label in zip(real, (3, 1, 4, 1, 5), strict=True):
        same = (data.train == picture).flatten(1).all(1)
        assert data.train_labels[same].tolist() == [label]
    assert [([3, 1, 4, 1, 5], w) in asked for w in (0.0, 1.0, 3.0, 8.0)] == [True] * 4
    assert len(tables["same_noise.png"][0]) == 5
    assert not (only_run(tmp_path, "conditional") / "loss.png").exists()  # nothing was trained


@pytest.mark.slow
def test_classifier_guidance_and_evaluation(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    cond.main(["--sample", str(smoke), "--out", str(tmp_path), "--guidance", "classifier",
               "--sampler", "ancestral", "--classifier_steps", "150", "--evaluate", "20"])
    folder = only_run(tmp_path, "conditional")
    check_pictures(folder, ("grid", "samples", "same_noise", "guidance"))
    found = json.loads((folder / "metrics.json").read_text())
    assert found["noisy_classifier_accuracy_by_t"]["1"] > 0.3  # chance: 0.1
    assert list(found["guidance_sweep"]) == ["classifier-free", "classifier: null class"]
    for table in found["guidance_sweep"].values():
        assert list(table) == ["-1", "0", "2"]
        for row in table.values():
            assert 0 <= row["accuracy"] <= 1 and math.isfinite(row["frechet_distance"])
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.slow
def test_an_unconditional_network_is_guided_by_the_classifier(tmp_path, monkeypatch):
    """--p_uncond 1: every label dropped, samples by the classifier, its sweep alone in the table."""
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    asked = []
    spied(monkeypatch, cond, "drop_labels", lambda _, out: asked.append(out))
    cond.main(["--preset", "smoke", "--out", str(tmp_path), "--p_uncond", "1", "--guidance", "classifier",
               "--evaluate", "20"])
    assert torch.cat(asked).eq(10).all()
    folder = only_run(tmp_path, "conditional")
    check_pictures(folder, ("guidance", "classifier"))
    found = json.loads((folder / "metrics.json").read_text())
    (name, sweep), = found["guidance_sweep"].items()
    assert name == "classifier: unconditional" and "-1" in sweep


def dies_in_step(last):
    """EMA.update as it is, until it fails in a step between two checkpoints."""
    true = cond.EMA.update

    def update(ema, model, step):
        if step == last:
            raise LookupError
        true(ema, model, step)
    return update


@pytest.mark.slow
def test_the_dit_runs_and_resumes_to_the_last_bit(tmp_path):
    argv = ["--preset", "smoke", "--backbone", "dit", "--n_samples", "10"]
    cond.main([*argv, "--out", str(tmp_path / "a")])
    whole = only_run(tmp_path / "a", "conditional")
    check_pictures(whole)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(LookupError):
        patch.setattr(cond.EMA, "update", dies_in_step(4))
        cond.main([*argv, "--out", str(tmp_path / "b")])
    cond.main(["--resume", "--out", str(tmp_path / "b")])
    resumed = only_run(tmp_path / "b", "conditional")
    states = [torch.load(p / "checkpoint.pt", weights_only=True) for p in (whole, resumed)]
    assert_same_tree(*states)
    assert (whole / "log.csv").read_bytes() == (resumed / "log.csv").read_bytes()


@pytest.mark.slow
def test_compare_trains_both_networks_for_the_same_time(tmp_path):
    cond.main(["--preset", "smoke", "--compare", "0.5", "--preview_every", "1000", "--out", str(tmp_path)])
    folder = only_run(tmp_path, "conditional")
    open_picture(folder / "compare.png")
    found = json.loads((folder / "metrics.json").read_text())["compare"]
    for backbone in ("unet", "dit"):
        assert found[backbone]["steps"] >= 10 and 0 <= found[backbone]["accuracy"] <= 1
        assert (folder / backbone / "checkpoint.pt").exists()
