"""Conditional diffusion: guidance against closed forms, the networks, the command line."""

import csv
import json
import math

import pytest
import torch
from conftest import assert_same_tree, mean_and_cov, mixture_eps, only_run, open_picture, run_script
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

import conditional_diffusion_example as cond

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


@pytest.mark.parametrize("guidance", ["classifier_free", "classifier"])
@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_at_w_minus_1_samples_follow_the_whole_mixture(short, guidance, sampler):
    schedule, exact = short
    y = torch.zeros(2000, dtype=torch.int64)
    xT = torch.randn(2000, 2, 1, 1, dtype=torch.float64)
    x = cond.sample(exact, xT.shape, schedule, y, -1.0, guidance, Logits(exact), sampler, 100,
                    clip_x0=False, xT=xT)
    assert_close(exact.nearest(x), exact.weights, rtol=0, atol=0.05)


def test_ancestral_classifier_guidance_moves_the_mean_by_s_sigma_gradient():
    """[ADM] Alg. 1 step by step, with a linear classifier whose gradient is known."""
    schedule, moves = cond.make_schedule("linear", 5), torch.tensor([[0.7, -0.7]])

    class Still:
        classes = 2

        def __call__(self, x, t, y):
            assert (y == 2).all()  # the unconditional network is asked
            return torch.zeros_like(x)

    def classifier(x, t):
        return x.flatten(1) * moves

    x = torch.randn(6, 2, 1, 1)
    y = torch.zeros(6, dtype=torch.int64)
    torch.manual_seed(1)
    found = cond.sample(Still(), x.shape, schedule, y, 2.0, "classifier", classifier, "ancestral",
                        clip_x0=False, xT=x)
    torch.manual_seed(1)
    for t in range(5, 0, -1):
        p = (x.flatten(1) * moves).softmax(1)
        # the gradient of log softmax_0: m_0 (1 - p_0) along x_0, -m_1 p_1 along x_1
        gradient = torch.stack([0.7 * (1 - p[:, 0]), 0.7 * p[:, 1]], 1).view(6, 2, 1, 1)
        mean, variance = cond.q_posterior(x / schedule.alpha_bars[t].sqrt(), x, t, schedule)
        z = torch.randn_like(x) if t > 1 else 0
        x = mean + 3 * variance * gradient + variance.sqrt() * z
    assert_close(found, x, rtol=1e-4, atol=1e-5)


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
    p = cond.positions_2d(5, 16).view(5, 5, 16)
    assert_close(p[2, :, :8], p[2, :1, :8].expand(5, 8))  # the first half knows the row
    assert_close(p[:, 3, 8:], p[:1, 3, 8:].expand(5, 8))  # the second half the column
    assert torch.cdist(p.view(25, 16), p.view(25, 16)).fill_diagonal_(9).min() > 0.1
    assert_close(p[1, 0, :4], (10000 ** (-torch.arange(4.0) / 4)).sin())


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


def test_dit_puts_each_patch_back_where_it_came_from():
    """With the layers opened so that tokens pass unmixed, a bright patch stays in its place."""
    model = dit(width=64, patch=4)
    torch.nn.init.zeros_(model.embed.weight)
    torch.nn.init.eye_(model.embed.weight[:16])
    torch.nn.init.eye_(model.out.weight[:, :16])
    model.positions.zero_()
    x = torch.zeros(1, 1, 16, 16)
    x[0, 0, 4:8, 8:12] = torch.arange(16.0).view(4, 4) / 15
    out = model(x, torch.tensor([1]), torch.tensor([0]))
    token = torch.cat([x[0, 0, 4:8, 8:12].flatten(), torch.zeros(48)])
    wanted = torch.nn.functional.layer_norm(token, (64,), eps=1e-6)[:16].view(4, 4)
    assert_close(out[0, 0, 4:8, 8:12], wanted, rtol=1e-4, atol=1e-5)
    out[0, 0, 4:8, 8:12] = 0
    assert not out.any()


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
        loss = cond.ddpm_loss(lambda x, t: model(x, t, y), x0, schedule, t, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_the_unet_overfits_one_batch():
    assert overfit(unet(channels=16), 3e-3) < 0.1


def test_the_dit_overfits_one_batch():
    assert overfit(dit(width=64, depth=2), 3e-3) < 0.1


@BOTH
def test_gradient_checkpointing_gives_the_same_gradients(make):
    x, t, y = torch.randn(2, 1, 16, 16), torch.tensor([3, 500]), torch.tensor([1, 2])
    found = []
    for on in (False, True):
        torch.manual_seed(3)
        model = awake(make(grad_checkpointing=on)).train()
        model(x, t, y).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
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


# The command line


@pytest.mark.parametrize("argv, words", [
    (["--classes", "3", "10"], ["--classes 10", "[0, 9]"]),
    (["--classes", "-1"], ["--classes -1", ">= 0"]),
    (["--classes", "cat"], ["--classes", "cat"]),
    (["--w", "much"], ["--w", "much"]),
    (["--w", "nan"], ["--w nan"]),
    (["--w", "0", "-2"], ["--w 0.0 -2.0", ">= -1"]),
    (["--w"], ["--w", "at least one"]),
    (["--w_samples", "inf"], ["--w_samples inf"]),
    (["--backbone", "mlp"], ["--backbone mlp", "unet, dit"]),
    (["--guidance", "clip"], ["--guidance clip", "classifier_free, classifier, none"]),
    (["--sampler", "euler"], ["--sampler euler", "ddim, ancestral"]),
    (["--backbone", "dit", "--dit_patch", "5"], ["--image_size 28", "multiple of 5", "25, 30"]),
    (["--image_size", "30", "--backbone", "unet"], ["--image_size 30", "multiple of 4"]),
    (["--dit_heads", "5"], ["--dit_heads 5", "--dit_width 16"]),
    (["--dit_width", "18"], ["--dit_width 18", "multiple of 4"]),
    (["--p_uncond", "1"], ["--p_uncond 1.0", "[0, 1)"]),
    (["--p_uncond", "0"], ["--p_uncond 0", "null class"]),
    (["--S", "21"], ["--S 21", "[1, 20]"]),
    (["--classifier_steps", "0"], ["--classifier_steps 0", ">= 1"]),
    (["--preset", "dit_xxl"], ["--preset dit_xxl", "dit_xl"]),
])
def test_a_mistake_is_one_line_and_status_2(argv, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cond.main(["--preset", "smoke", "--device", "cpu", "--out", str(tmp_path), *argv])
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
    assert found["samples"]["classifier"]["accuracy"] > 0.95
    state = torch.load(smoke / "checkpoint.pt", weights_only=True)
    assert state["step"] == 6 and state["classes"] == 10 and state["shape"] == [1, 28, 28]
    assert state["ema"]["label.weight"].shape[0] == 11


@pytest.mark.slow
def test_sample_draws_exactly_the_classes_and_weights_asked_for(smoke, tmp_path, monkeypatch):
    tables, asked, true = {}, [], cond.sample

    def spy(model, shape, schedule, y, w, *rest, **how):
        asked.append((y.tolist(), w.tolist()))
        return true(model, shape, schedule, y, w, *rest, **how)

    monkeypatch.setattr(cond, "sample", spy)
    monkeypatch.setattr(cond.plotting, "save_rows", lambda path, rows, title, *labels:
                        tables.update({path.name: (rows, *labels)}))
    cond.main(["--sample", str(smoke), "--out", str(tmp_path), "--classes", "3", "1", "4", "1", "5",
               "--w", "0", "1", "3", "8"])
    rows, names, columns = tables["grid.png"]
    assert len(rows) == 4 and all(len(row) == 5 for row in rows)
    assert names == ["w = 0", "w = 1", "w = 3", "w = 8"] and columns == ["3", "1", "4", "1", "5"]
    y, w = asked[0]
    assert y == [3, 1, 4, 1, 5] * 4 and w == [0.0] * 5 + [1.0] * 5 + [3.0] * 5 + [8.0] * 5
    assert set(asked[1][0]) == {1, 3, 4, 5}


@pytest.mark.slow
def test_classifier_guidance_and_evaluation(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(cond, "CACHE", tmp_path / "cache")
    cond.main(["--sample", str(smoke), "--out", str(tmp_path), "--guidance", "classifier",
               "--sampler", "ancestral", "--classifier_steps", "60", "--evaluate", "20"])
    folder = only_run(tmp_path, "conditional")
    check_pictures(folder, ("grid", "samples", "same_noise", "guidance"))
    found = json.loads((folder / "metrics.json").read_text())
    assert found["noisy_classifier_accuracy_by_t"]["1"] > 0.3  # chance: 0.1
    for table in found["guidance_sweep"].values():
        assert list(table) == ["0", "2"]
        for row in table.values():
            assert 0 <= row["accuracy"] <= 1 and math.isfinite(row["frechet_distance"])
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.slow
def test_the_dit_runs_and_resumes_to_the_last_bit(tmp_path):
    argv = ["--preset", "smoke", "--backbone", "dit", "--n_samples", "10"]
    cond.main([*argv, "--out", str(tmp_path / "a")])
    whole = only_run(tmp_path / "a", "conditional")
    check_pictures(whole)
    true = cond.Run.log

    def die(run, step, **values):
        true(run, step, **values)
        if step == 5:
            raise MemoryError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(cond.Run, "log", die)
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
