"""Guidance against closed forms, and what training gives the networks."""

import math
from dataclasses import replace
from functools import partial

import common.data
import conditional_diffusion_example as cond
from common.data import Data

import pytest
import torch
from conftest import assert_same_tree, mean_and_cov, mixture_eps, open_run, spied
from torch.distributions import MultivariateNormal
from torch.nn import functional as F
from torch.testing import assert_close

FREE = cond.Config(clip_x0=False)
SAMPLERS = [(guidance, sampler) for guidance in ("classifier_free", "classifier", "none")
            for sampler in ("ddim", "ancestral")]


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
    cfg, run, data = open_run(cond, tmp_path, "--predict", predict, "--schedule", "cosine",
                              "--preview_every", 100)
    model = cond.train(cfg, run, data)
    wanted = {"v": "v_loss", "eps": "ddpm_loss"}[predict]
    assert {name for name, _ in called} == {wanted} and len(called) == cfg.steps
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


@pytest.mark.slow
@pytest.mark.parametrize("guidance, sampler", SAMPLERS)
def test_samples_follow_the_class_at_w_0_and_the_whole_mixture_at_w_minus_1(guidance, sampler):
    schedule, n = double(cond.make_schedule("linear", 150)), 800
    exact = mixture_eps(schedule.alpha_bars)
    exact.classes = len(exact.weights)
    y = torch.cat([torch.arange(3).repeat_interleave(n), torch.zeros(n, dtype=torch.int64)])
    w = torch.cat([torch.zeros(3 * n), -torch.ones(n)])
    xT = torch.randn(4 * n, 2, 1, 1, dtype=torch.float64)
    settings = replace(FREE, guidance=guidance, sampler=sampler, S=75)
    x = cond.sample(settings, exact, xT, schedule, y, w, Logits(exact))
    for k in range(3):
        mean, cov = mean_and_cov(x[:3 * n][y[:3 * n] == k])
        assert_close(mean, exact.means[k], rtol=0, atol=0.04)
        assert_close(cov, exact.covs[k], rtol=0.2, atol=0.008)
    if guidance != "none":
        assert_close(exact.nearest(x[3 * n:]), exact.weights, rtol=0, atol=0.06)


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
    settings = replace(FREE, guidance="classifier", sampler="ancestral", variance=variance)
    found = list(cond.guided_process(settings, Still(), x, schedule, y, s - 1, classifier))
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
        z = torch.randn_like(x) if t > 1 else 0
        x = mean + s.view(-1, 1, 1, 1) * sigma2 * gradient.view(6, 2, 1, 1) + sigma2.sqrt() * z
    assert found[5][0] == 0 and len(found) == 6
    assert_close(found[5][1], x, rtol=1e-4, atol=1e-5)


def test_the_clamp_of_x0_hat_comes_before_the_push_of_the_classifier():
    """As the authors do: the mean that is moved is that of the clamped x0_hat."""
    schedule = cond.make_schedule("linear", 5)
    model = Plain()
    x, y = torch.randn(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)

    def classifier(x, t):
        return torch.stack([x.flatten(1).sum(1), 0 * x.flatten(1).sum(1)], 1)

    settings = cond.Config(guidance="classifier", sampler="ancestral", variance="beta")
    _, (_, found) = list(cond.guided_process(settings, model, x, one_step(schedule), y, 7.0, classifier))
    p = x.flatten(1).sum(1).sigmoid().view(-1, 1, 1, 1)
    assert_close(found, -1 + 8 * schedule.betas[5] * (1 - p).expand_as(x), rtol=1e-4, atol=1e-4)


def one_step(schedule):
    """The schedule of one step that is as noisy as the last of this one."""
    return cond.Schedule(*(torch.stack([a[0], a[-1]]) for a in (
        schedule.betas, 1 - schedule.betas, 1 - schedule.betas)))


@pytest.mark.parametrize("guidance, sampler", SAMPLERS)
def test_the_process_yields_every_state_with_its_t(guidance, sampler):
    """t descends from T, x_T is the noise given, (0, x_0) is last and what sample returns."""
    schedule = double(cond.make_schedule("linear", 12))
    exact = mixture_eps(schedule.alpha_bars)
    exact.classes = 3
    xT, y = torch.randn(5, 2, 1, 1, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    settings = cond.Config(guidance=guidance, sampler=sampler, S=4, eta=0.5)
    torch.manual_seed(2)
    states = list(cond.guided_process(settings, exact, xT, schedule, y, 1.0, Logits(exact)))
    ts = [t for t, _ in states]
    assert ts == ([12, 9, 6, 3, 0] if sampler == "ddim" else list(range(12, -1, -1)))
    assert torch.equal(states[0][1], xT)
    for (_, a), (_, b) in zip(states, states[1:], strict=False):
        assert (a - b).abs().max() > 1e-3 and not b.requires_grad
    torch.manual_seed(2)
    drawn = cond.sample(settings, exact, xT, schedule, y, 1.0, Logits(exact))
    assert torch.equal(drawn, states[-1][1])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_classifier_pushes_what_is_already_clamped(eta):
    """As in guided-diffusion: x0_hat = 3 becomes 1, then moves by (1 - a) / sqrt(a) s times the gradient."""
    schedule, classifier = double(cond.make_schedule("linear", 20)), torch.nn.Module()
    classifier.forward = lambda x, t: torch.stack([0 * x.sum((1, 2, 3)), x.sum((1, 2, 3))], 1)
    s, y, xt, a = 0.7, torch.ones(4, dtype=torch.int64), torch.randn(4, 1, 2, 2).double(), schedule.alpha_bars[20]

    def model(x, t, y):
        return (x - 3 * a.sqrt()) / (1 - a).sqrt()  # x0_hat = 3 everywhere

    model.classes = 2
    gradient = torch.sigmoid(-xt.sum((1, 2, 3), keepdim=True)).expand_as(xt)
    for clip_x0, x0_hat in ((True, 1), (False, 3)):
        settings = cond.Config(guidance="classifier", clip_x0=clip_x0, S=1, eta=eta)
        *_, (_, found) = cond.guided_process(settings, model, xt, schedule, y, s - 1, classifier)
        assert_close(found, x0_hat + (1 - a) / a.sqrt() * s * gradient)  # S = 1: x_0 is x0_hat


@pytest.mark.parametrize("guidance, sampler", SAMPLERS)
def test_the_process_is_the_plain_sampler_with_a_guided_network(guidance, sampler):
    """S, eta, spacing, variance and clip_x0 of the Config reach the steps, and nothing else does."""
    schedule = double(cond.make_schedule("linear", 12))
    exact = mixture_eps(schedule.alpha_bars)
    exact.classes, classifier = 3, Logits(exact)
    xT, y = torch.randn(5, 2, 1, 1, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    w = torch.tensor([0.0, 1.0, -1.0, 3.0, 0.5])

    def by_classifier(x, t):
        beta, alpha, a = (array[t][0] for array in schedule)
        eps_u, g = exact(x, t), cond.classifier_gradient(classifier, x, t, y)
        if cfg.clip_x0:
            eps_u = cond.clip_eps(x, eps_u, t, schedule.alpha_bars)
        shift = (1 - a).sqrt() * (1 + w).view(-1, 1, 1, 1) * g
        if sampler == "ancestral":  # a shift of the mean by s sigma^2 g
            sigma2 = beta if cfg.variance == "beta" else cond.beta_tilde(t[0], schedule)
            shift = shift * sigma2 / beta * alpha.sqrt()
        return eps_u - shift

    guided = {"classifier_free": lambda x, t: cond.cfg_eps(exact, x, t, y, w),
              "classifier": by_classifier, "none": lambda x, t: exact(x, t, y)}[guidance]
    start = cond.Config(guidance=guidance, sampler=sampler, S=5, eta=0.3)
    changes, ends = ({}, {"S": 3}, {"eta": 0.9}, {"spacing": "quadratic"}, {"variance": "beta"}, {"clip_x0": False}), []
    for change in changes:
        cfg = replace(start, **change)
        clip_x0 = cfg.clip_x0 and guidance != "classifier"
        torch.manual_seed(4)
        found = cond.sample(cfg, exact, xT, schedule, y, w, classifier)
        torch.manual_seed(4)
        if sampler == "ddim":
            wanted = cond.ddim_process(guided, xT, schedule, cfg.S, cfg.eta, cfg.spacing, clip_x0)
        else:
            wanted = cond.reverse_process(guided, xT, schedule, cfg.variance, clip_x0)
        *_, (_, wanted) = wanted
        assert_close(found, wanted, rtol=1e-7, atol=1e-7)
        ends.append(found)
    matter = {"S", "eta", "spacing", "clip_x0"} if sampler == "ddim" else {"variance", "clip_x0"}
    for change, end in zip(changes[1:], ends[1:], strict=True):
        assert ((end - ends[0]).abs().max() > 1e-4) == bool(set(change) & matter), change


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
    cfg, run, _ = open_run(cond, tmp_path, "--classifier_steps", 30, "--T", 12)
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
        cfg, run, _ = open_run(cond, tmp_path, "--classifier_steps", 1, *flags)
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
    for n, (flags, data) in enumerate([(["--classifier_steps", 2], coded), (["--T", 19], coded),
                                       (["--beta_T", 0.03], coded), (["--warmup", 1], coded),
                                       (["--decay", "constant"], coded), ([], lighter)], 3):
        fitted(*flags, data=data)
        assert len(loops) == n
