"""Guidance against closed forms, and what training gives the network and the noisy classifier."""

import json
import math
from dataclasses import replace

import common.data
import conditional_diffusion_example as cond
from common import quality
from common.data import Data
from experiments import compare

import pytest
import torch
from conftest import assert_same_tree, mean_and_cov, mixture_eps, only_run, open_run, spied
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
    """By one call of the network, which is asked for the null class besides; each picture may have its own w."""
    calls = []

    def model(x, t, y):
        calls.append(y)
        return x + (10 * t + 1000 * y).view(-1, 1, 1, 1)

    model.classes = 7
    x, t, y = torch.randn(4, 1, 2, 2), torch.tensor([1, 5, 9, 2]), torch.tensor([0, 3, 6, 3])
    with_label, without = model(x, t, y), model(x, t, torch.full_like(y, 7))
    calls.clear()
    assert torch.equal(cond.cfg_eps(model, x, t, y, 0.0), with_label)
    assert torch.equal(cond.cfg_eps(model, x, t, y, -1.0), without)
    assert len(calls) == 2
    found = cond.cfg_eps(model, x, t, y, torch.tensor([-1.0, 0.0, 2.0, 3.5]))
    for i, w in enumerate([-1.0, 0.0, 2.0, 3.5]):
        assert_close(found[i], (1 + w) * with_label[i] - w * without[i])


def test_both_guidances_are_the_tempered_score_at_every_t():
    """The score of p(x_t) p(y | x_t)^(1 + w), by autograd."""
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
        beta, bar, before = schedule.betas[t], schedule.alpha_bars[t], schedule.alpha_bars[t - 1]
        x0_hat = x / bar.sqrt()  # the network says eps_hat = 0
        mean = (before.sqrt() * beta * x0_hat + (1 - beta).sqrt() * (1 - before) * x) / (1 - bar)
        sigma2 = beta if variance == "beta" else beta * (1 - before) / (1 - bar)
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
    """S, eta, spacing, variance and clip_x0 of the Config reach the steps, and nothing else does."""
    schedule = double(cond.make_schedule("linear", 12))
    exact = exact_network(schedule)
    xT, y = torch.randn(5, 2, 1, 1, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    w = torch.tensor([0.0, 1.0, -1.0, 3.0, 0.5])

    def guided(x, t):
        return exact(x, t, y) if guidance == "none" else cond.cfg_eps(exact, x, t, y, w)

    start = cond.Config(guidance=guidance, sampler=sampler, S=5, eta=0.3)
    changes, ends = ({}, {"S": 3}, {"eta": 0.9}, {"spacing": "quadratic"}, {"variance": "beta"}, {"clip_x0": False}), []
    for change in changes:
        cfg = replace(start, **change)
        torch.manual_seed(4)
        found = list(cond.guided_process(cfg, exact, xT, schedule, y, w))
        torch.manual_seed(4)
        if sampler == "ddim":
            wanted = cond.ddim_process(guided, xT, schedule, cfg.S, cfg.eta, cfg.spacing, cfg.clip_x0)
        else:
            wanted = cond.reverse_process(guided, xT, schedule, cfg.variance, cfg.clip_x0)
        for (t, x), (wanted_t, wanted_x) in zip(found, wanted, strict=True):
            assert t == wanted_t
            assert_close(x, wanted_x, rtol=1e-7, atol=1e-7)
        ends.append(x)
    torch.manual_seed(4)
    assert torch.equal(cond.sample(cfg, exact, xT, schedule, y, w), x)
    matter = {"S", "eta", "spacing", "clip_x0"} if sampler == "ddim" else {"variance", "clip_x0"}
    for change, end in zip(changes[1:], ends[1:], strict=True):
        assert ((end - ends[0]).abs().max() > 1e-4) == bool(set(change) & matter), change


@pytest.mark.slow
def test_samples_follow_the_class_at_w_0_and_the_whole_mixture_at_w_minus_1():
    schedule, n = double(cond.make_schedule("linear", 100)), 800
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


@pytest.mark.slow
@pytest.mark.parametrize("predict, backbone, schedule, share", [
    ("v", "unet", "cosine", 0.3), ("eps", "dit", "linear", 0.0)])
def test_training_gives_each_picture_its_label_or_the_null_class(predict, backbone, schedule, share, tmp_path,
                                                                 coded, monkeypatch):
    """[CFG] Alg. 1: y belongs to x_0 and is the null class, 10, with probability p_uncond.

    The loss and the network are those of predict, and both are of the schedule that the flags ask for.
    """
    losses, got = [], []
    for name in ("v_loss", "ddpm_loss"):
        spied(monkeypatch, cond, name, lambda given, _, name=name: losses.append((name, given)))

    def listen(_, model):
        def hear(_, args, named):
            got.append((args[1], named["y"] if "y" in named else (*args, None, None)[2]))
        model.register_forward_pre_hook(hear, with_kwargs=True)

    spied(monkeypatch, cond, "make_model", listen)
    cfg, run, _ = open_run(cond, tmp_path, "--batch_size", 200, "--preview_every", 100, "--dit_patch", 4,
                           "--p_uncond", share, "--predict", predict, "--backbone", backbone,
                           "--schedule", schedule, "--beta_1", 0.001, "--beta_T", 0.03)
    model = cond.train(cfg, run, coded)
    names, given = zip(*losses, strict=True)
    assert names == ({"v": "v_loss", "eps": "ddpm_loss"}[predict],) * cfg.steps
    wanted = cond.make_schedule(schedule, 20, 0.001, 0.03)
    assert all(torch.equal(each["schedule"].alpha_bars, wanted.alpha_bars) for each in given)
    assert isinstance(model, cond.VPrediction) == (predict == "v")
    if predict == "v":
        assert torch.equal(model.alpha_bars, wanted.alpha_bars)
    assert isinstance(getattr(model, "network", model), {"unet": cond.UNet, "dit": cond.DiT}[backbone])
    assert not model.training and len(got) == cfg.steps

    x0, (t, y) = torch.cat([each["x0"] for each in given]), map(torch.cat, zip(*got, strict=True))
    kept = y != 10
    assert len(y) == 1200 and (label_of(x0) < 10).all()  # of the training part
    assert torch.equal(y[kept], label_of(x0)[kept])
    assert abs((~kept).float().mean() - share) < 0.08 * (share > 0) + 1e-9
    for c in range(10 if share else 0):  # every class loses some, none all
        assert 0.1 < (~kept)[label_of(x0) == c].float().mean() < 0.5
    assert set(t.tolist()) == set(range(1, cfg.T + 1))


@pytest.mark.slow
def test_the_noisy_classifier_learns_the_labels_of_noisy_pictures(tmp_path, coded, monkeypatch):
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps with t over all of 1..T.

    Each step takes the gradient of its batch alone, clipped to a norm of 1, by a rate that warms up and decays.
    """
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    made, batches, given, labels, wanted, rates = [], [], [], [], [], []

    def listen(_, classifier):
        made.append(classifier)
        classifier.register_forward_pre_hook(lambda _, args: given.append(args))

    def hear(asked, loss):
        labels.append(asked["target"])
        wanted.append(torch.autograd.grad(loss, list(made[0].parameters()), retain_graph=True))

    def watching(optimizer, *args, **how):
        norm = torch.cat([g.flatten() for g in wanted[-1]]).norm()
        for p, gradient in zip(made[0].parameters(), wanted[-1], strict=True):
            assert_close(p.grad, gradient / max(1, norm), rtol=1e-3, atol=1e-5)
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **how)

    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", watching)
    spied(monkeypatch, cond, "NoisyClassifier", listen)
    spied(monkeypatch, F, "cross_entropy", hear)
    cfg, run, _ = open_run(cond, tmp_path, "--classifier_steps", 20, "--T", 12, "--warmup", 3)
    spied(monkeypatch, run, "batch", lambda _, out: batches.append(out))
    schedule = cond.make_schedule("linear", 12)
    classifier = cond.train_classifier(cfg, run, coded, schedule)
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())
    assert not run.path("checkpoint.pt").exists()  # the run's own is not replaced
    assert len(batches) == len(given) == len(labels) == 20
    norms = [torch.cat([g.flatten() for g in gradients]).norm() for gradients in wanted]
    assert max(norms) > 1.1  # the clip acts
    assert rates == pytest.approx([3e-3 * min(1, (i + 1) / 3) * (1 + math.cos(math.pi * i / 20)) / 2
                                   for i in range(20)])

    x0, y = map(torch.cat, zip(*batches, strict=True))
    xt, t = map(torch.cat, zip(*given, strict=True))
    assert torch.equal(torch.cat(labels), y) and torch.equal(label_of(x0), y)
    assert set(t.tolist()) == set(range(1, 13))
    alpha_bar = schedule.alpha_bars[t].view(-1, 1, 1, 1)
    eps = (xt - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()  # a roll leaves grey as it is
    for value in range(1, 13):
        of_t = eps[t == value]
        assert_close(of_t.std().item(), 1.0, rtol=0.08, atol=0)
        assert abs(of_t.mean()) < 0.08


def test_the_noisy_classifier_is_kept_on_disk_unless_it_was_stopped(tmp_path, coded, monkeypatch):
    """It is trained once, and the random numbers of the caller stay as they were."""
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    loops, found = [], []
    torch.manual_seed(5)
    wanted = torch.rand(1)
    for stop in (True, False, False):
        cfg, run, _ = open_run(cond, tmp_path, "--classifier_steps", 1)
        steps = run.steps

        def counted(*args, run=run, stop=stop, steps=steps, **kwargs):
            loops.append(stop)
            for step in steps(*args, **kwargs):
                run.stopped = stop
                yield step

        run.steps = counted
        torch.manual_seed(5)
        classifier = cond.train_classifier(cfg, run, coded, cond.make_schedule("linear", 20))
        assert torch.equal(torch.rand(1), wanted)
        found.append(dict(classifier.state_dict()))
    assert loops == [True, False] and len(list((tmp_path / "cache").iterdir())) == 1
    assert_same_tree(found[1], found[2])


# The comparison of both networks


@pytest.mark.slow
def test_compare_shows_each_network_under_its_own_name(tmp_path, coded, monkeypatch, drawings):
    """U-Net and DiT are each trained for their own number of steps; its samples stand under its score."""
    noises, values = [], {cond.UNet: 0.25, cond.DiT: 0.75}

    def kind(model):
        return type(getattr(model, "network", model))

    def cost(model, *_, **__):
        return {"seconds": {cond.UNet: 1 / 11.5, cond.DiT: 1 / 12.5}[kind(model)]}

    def process(cfg, model, xT, *_):
        noises.append(xT)
        yield 0, torch.full_like(xT, values[kind(model)])

    def scores(x, data, y):
        return {"frechet_distance": 100 * x.mean().item(), "accuracy": x.mean().item()}

    monkeypatch.setattr(compare, "training_cost", cost)
    monkeypatch.setattr(cond, "guided_process", process)
    monkeypatch.setattr(quality, "scores", scores)
    monkeypatch.setattr(compare, "load_images", lambda *_: coded)
    compare.main(["--preset", "smoke", "--attention", "4", "--seconds", "1", "--device", "cpu", "--out",
                  str(tmp_path), "--preview_every", "100", "--n_samples", "3"])
    (first, of_unet), (second, of_dit) = drawings["compare.png"]["parts"]
    assert first == "unet: 11 steps, Fréchet 25.0, right 25%"
    assert second == "dit: 12 steps, Fréchet 75.0, right 75%"
    assert (of_unet == 0.25).all() and (of_dit == 0.75).all() and len(of_unet) == len(of_dit) == 3
    assert torch.equal(*noises)
    folder = only_run(tmp_path, "conditional")
    assert list(json.loads((folder / "metrics.json").read_text())["compare"]) == ["unet", "dit"]
    for name, steps in (("unet", 11), ("dit", 12)):  # runs of the page, which it can --sample
        state = torch.load(folder / name / "checkpoint.pt", weights_only=True)
        config = state["config"]
        assert (config["backbone"], config["steps"], "seconds" in config) == (name, steps, False)
        assert any("blocks" in key for key in state["model"]) == (name == "dit")
