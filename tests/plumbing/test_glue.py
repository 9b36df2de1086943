"""What stands between the mathematics of a script and its run: the lines of `train` and of `main`.

Toy pictures of 8 x 8 make every training a second or less; each test fails when its line is broken.
DDIM's `train` is DDPM's to the letter, see test_drift.py. What one script alone does is in its own file.
"""

import json
from types import SimpleNamespace

import conditional_diffusion_example as conditional
import ddim_example as ddim
import ddpm_example as ddpm
import latent_diffusion_example as latent
import score_based_diffusion_example as score_based
from common import plotting, quality
from common.data import Data
from common.run import Run

import pytest
import torch
from conftest import open_run, script_name
from torch.testing import assert_close

MODULES = (ddpm, ddim, latent, conditional, score_based)
LOSS = {ddpm: "ddpm_loss", latent: "ddpm_loss", conditional: "v_loss", score_based: "score_loss"}
every_script = pytest.mark.parametrize("module", MODULES, ids=script_name)
every_loop = pytest.mark.parametrize("module", LOSS, ids=script_name)


def toy(n=48, side=8):
    """Pictures of two classes: a bright left half, a bright right half, with some noise; 8-bit."""
    y = torch.arange(n) % 2
    pixels = torch.randint(20, 60, (n, 1, side, side))
    pixels[y == 0, :, :, :side // 2] += 180
    pixels[y == 1, :, :, side // 2:] += 180
    x = pixels / 127.5 - 1
    return Data("toy", x[:n // 2], x[n // 2:], y[:n // 2], y[n // 2:], ("left", "right"))


def trained(module, out, *argv):
    """(cfg, run, what train returned as its network) of a smoke run on toy pictures."""
    cfg, run, _ = open_run(module, out, "--image_size", 8, *argv)
    model = module.train(cfg, run, toy())
    return cfg, run, model[0] if module is latent else model


# Training


@pytest.fixture(scope="module", params=LOSS, ids=script_name)
def recorded(request, tmp_path_factory):
    """A training, and what its AdamW did at each step; stage 1 of the latent script has an Adam.

    loss_gradients: of the loss alone. Every process but this one has gradients of 0.
    """
    module, seen = request.param, SimpleNamespace(steps=[], loss_gradients=[])
    true_step, true_loss = torch.optim.AdamW.step, getattr(module, LOSS[module])

    def step(optimizer, *args, **kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        record = SimpleNamespace(lr=[group["lr"] for group in optimizer.param_groups],
                                 before=[p.detach().clone() for p in parameters],
                                 gradients=[p.grad.clone() for p in parameters])
        out = true_step(optimizer, *args, **kwargs)
        record.weights = [p.detach().clone() for p in parameters]
        seen.steps.append(record)
        return out

    def loss(model, *args, **kwargs):
        out = true_loss(model, *args, **kwargs)
        parameters = list(getattr(model, "func", model).parameters())
        seen.loss_gradients.append(torch.autograd.grad(out, parameters, retain_graph=True))
        return out

    def average(run, model):
        for p in model.parameters():
            p.grad /= 2

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        patch.setattr(module, LOSS[module], loss)
        patch.setattr(Run, "average_gradients", average)
        seen.cfg, seen.run, seen.model = trained(
            module, tmp_path_factory.mktemp("recorded"), "--lr", "0.01", "--warmup", "3",
            "--ema", "0.6", "--grad_clip", "0.01")
    assert len(seen.steps) == len(seen.loss_gradients) == seen.cfg.steps == 6
    return seen


@pytest.mark.slow
def test_the_learning_rate_reaches_the_optimiser_and_the_log(recorded):
    shares = [min(1, (step + 1) / 3) * (1 + torch.cos(torch.tensor(torch.pi * step / 6)).item()) / 2
              for step in range(6)]
    rates = [0.01 * share for share in shares]
    assert [rate for record in recorded.steps for rate in record.lr] == pytest.approx(rates, rel=1e-5)
    assert recorded.run.read_log()["lr"] == pytest.approx(rates, rel=1e-5)


@pytest.mark.slow
def test_the_gradient_is_of_this_batch_alone_averaged_then_clipped(recorded):
    """No gradient of an earlier step is left, and none is missing; the log has the norm before the clip."""
    for record, of_loss, logged in zip(recorded.steps, recorded.loss_gradients,
                                       recorded.run.read_log()["grad_norm"], strict=True):
        norm = torch.stack([g.norm() for g in of_loss]).norm().item() / 2
        assert logged == pytest.approx(norm, rel=1e-4) and norm > 0.02
        for found, gradient in zip(record.gradients, of_loss, strict=True):
            assert_close(found, gradient / 2 * 0.01 / norm, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_what_is_returned_is_the_average_of_the_weights(recorded):
    """In eval mode; the checkpoint holds it and the weights themselves."""
    model, steps = recorded.model, recorded.steps
    average = steps[0].before
    for n, record in enumerate(steps):
        decay = min(0.6, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, record.weights, strict=True)]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    state = torch.load(recorded.run.path("checkpoint.pt"), weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(state["ema"][name], value)
    for (name, found), wanted, last in zip(model.named_parameters(), average, steps[-1].weights,
                                           strict=True):
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(state["model"][name], last)
    assert any(not torch.equal(a, w) for a, w in zip(average, steps[-1].weights, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("module", [ddpm, latent, conditional], ids=script_name)
@pytest.mark.parametrize("drawing", ["uniform", "logit_normal"])
def test_each_step_draws_its_pictures_its_t_and_its_noise(module, drawing, tmp_path, monkeypatch):
    drawn, given, true, loss = [], [], module.draw_t, getattr(module, LOSS[module])
    monkeypatch.setattr(module, "draw_t", lambda *how: drawn.append((how, true(*how))) or drawn[-1][1])
    monkeypatch.setattr(module, LOSS[module], lambda *a: given.append(a[1:4]) or loss(*a))
    monkeypatch.setattr(module, "figure_preview", lambda *_: None)
    cfg, _, _ = trained(module, tmp_path, "--drawing", drawing, "--batch_size", "24")
    assert [how for how, _ in drawn] == [(24, cfg.T, drawing)] * 6
    for (_, t), (_, asked, _) in zip(drawn, given, strict=True):
        assert asked is t or torch.equal(asked, t)
    for (x0, t, eps), (next_x0, next_t, next_eps) in zip(given[:-1], given[1:], strict=True):
        assert not any(map(torch.equal, (x0, t, eps), (next_x0, next_t, next_eps)))
    eps = torch.cat([eps for _, _, eps in given])
    assert abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.1
    assert len(eps[:, 0, 0, 0].unique()) == len(eps)


@pytest.mark.slow
@every_loop
def test_mixed_precision_is_in_the_network_alone(module, tmp_path, monkeypatch):
    inside, losses, true = [], [], getattr(module, LOSS[module])

    def loss(model, *args):
        network = getattr(model, "func", model)
        conv = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
        hook = conv.register_forward_hook(lambda _, __, out: inside.append(out.dtype))
        losses.append(true(model, *args))
        hook.remove()
        return losses[-1]

    monkeypatch.setattr(module, LOSS[module], loss)
    cfg, run, model = trained(module, tmp_path, "--amp", "bf16")
    assert inside == [torch.bfloat16] * 6 and [loss.dtype for loss in losses] == [torch.float32] * 6
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.slow
@every_loop
def test_previews_leave_the_training_alone(module, tmp_path):
    _, run, often = trained(module, tmp_path / "a", "--preview_every", "1")
    assert run.path("preview.png").stat().st_size > 1000
    torch.manual_seed(0)
    _, _, seldom = trained(module, tmp_path / "b", "--preview_every", "100")
    for a, b in zip(often.parameters(), seldom.parameters(), strict=True):
        assert torch.equal(a, b)


@every_script
def test_the_presets_of_papers_draw_as_the_papers_do(module):
    """t uniform in training, eps_hat as it is, all noise whole."""
    papers = {"drawing": "uniform", "weighting": "simple", "eps_scale": 1.0, "temperature": 1.0}
    for preset, cfg in module.PRESETS.items():
        if preset in ("laptop", "smoke"):
            assert vars(cfg).get("drawing", vars(cfg).get("weighting")) == "logit_normal"
        else:
            assert all(vars(cfg).get(name, value) == value for name, value in papers.items()), preset


# Main


class Stop(Exception):
    """Ends main once the test has seen what it came for."""


@pytest.fixture
def no_drawing(monkeypatch):
    """Figures are computed, and none is written: that takes most of the time."""
    for name, draw in list(vars(plotting).items()):
        if hasattr(draw, "__wrapped__"):
            monkeypatch.setattr(plotting, name, lambda *_, **__: None)


def drawn(module, monkeypatch, *argv):
    """(network, states, n) that main hands to Run.draw; the rest of main is not run."""
    seen = []

    def spy(run, n, states, network, *rest):
        seen.append((network, states, n))
        raise Stop

    monkeypatch.setattr(Run, "draw", spy)
    with pytest.raises(Stop):
        module.main(["--device", "cpu", *map(str, argv)])
    return seen[0]


@pytest.fixture(scope="module")
def smoke_runs(tmp_path_factory):
    """{module: folder} of runs on the digits as main makes them, whose EMA differs from the model."""
    folders = {}
    for module in MODULES:
        cfg, run, data = open_run(module, tmp_path_factory.mktemp(script_name(module)),
                                  "--lr", "0.02", "--steps", "4")
        module.train(cfg, run, data)
        folders[module] = run.folder
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("module", [ddpm, ddim, latent, conditional], ids=script_name)
def test_sample_draws_by_the_average_from_noise_times_the_temperature(module, smoke_runs, tmp_path,
                                                                      monkeypatch):
    state = torch.load(smoke_runs[module] / "checkpoint.pt", weights_only=True)
    network, states, n = drawn(module, monkeypatch, "--sample", smoke_runs[module], "--n_samples", 64,
                               "--temperature", 0.5, "--out", tmp_path)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    for name, value in network.state_dict().items():
        assert torch.equal(value, state["ema"][name])
    assert any(not torch.equal(state["ema"][k], state["model"][k]) for k in state["model"])
    assert n == 64
    every = list(states(range(n)))
    ts = [t for t, _ in every]
    assert ts == sorted(ts, reverse=True) and ts[0] == state["config"]["T"] and ts[-1] == 0
    xT, x0 = every[0][1], every[-1][1]
    assert abs(xT.std() - 0.5) < 0.03 and len(xT[:, 0, 0, 0].unique()) == 64
    assert x0.shape == ((64, 1, 32, 32) if module is latent else (64, 1, 28, 28))


@pytest.mark.slow
@pytest.mark.parametrize("module", [ddpm, ddim, latent, conditional], ids=script_name)
def test_a_fresh_run_draws_by_what_it_trained(module, tmp_path, monkeypatch):
    network, _, _ = drawn(module, monkeypatch, "--preset", "smoke", "--steps", 2, "--out", tmp_path)
    state = torch.load(next((tmp_path / script_name(module)).glob("*/checkpoint.pt")),
                       weights_only=True)
    assert not network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, state["ema"][name])


@pytest.mark.slow
@pytest.mark.parametrize("module", [ddpm, ddim])
def test_x0_hat_on_the_way_is_the_network_s_own(module, smoke_runs, tmp_path, monkeypatch):
    """A mean over pictures, as the paper has it, not made stronger as for sampling."""
    shown = []

    def stop(run, model, *_):
        shown.append(model)
        raise Stop

    monkeypatch.setattr(module, "figure_denoising", stop)
    with pytest.raises(Stop):
        module.main(["--device", "cpu", "--sample", str(smoke_runs[module]), "--out", str(tmp_path)])
    assert isinstance(shown[0], module.UNet)


@pytest.mark.slow
@every_script
def test_main_measures_the_samples_it_drew(module, smoke_runs, no_drawing, tmp_path, monkeypatch):
    """metrics.json is of the drawn samples; --evaluate draws as many as it says."""
    scored, glanced = [], []
    monkeypatch.setattr(quality, "scores", lambda x, data, labels=None: (
        scored.append((x, labels)) or {"frechet_distance": 1.0, "frechet_distance_of_held_out": 1.0,
                                       "accuracy": 0.5, "accuracy_of_held_out": 1.0, "recall": 0.5}))
    monkeypatch.setattr(quality, "glance", lambda x, data, labels=None: (
        glanced.append((x, labels)) or {"legible": 0.25}))
    monkeypatch.setattr(score_based, "measure_samplers", lambda *args: {})
    monkeypatch.setattr("common.data.CACHE", tmp_path / "cache")
    module.main(["--sample", str(smoke_runs[module]), "--n_samples", "5", "--evaluate", "12", "--out",
                 str(tmp_path), *(["--likelihood", "0"] if module is score_based else []),
                 *(["--classifier_steps", "2"] if module is conditional else [])])
    folder = next((tmp_path / script_name(module)).iterdir())
    found = json.loads((folder / "metrics.json").read_text())
    assert len(glanced[0][0]) == 5 and found["sampling"]["n"] == 5
    assert len(glanced) == 1 or module is score_based  # which looks at completions as well
    assert found["samples"]["legible"] == 0.25 and found["evaluation"]["n"] == 12
    assert len(scored) >= 1 and all(len(x) == 12 for x, _ in scored)
    if module is conditional:
        assert glanced[0][1].tolist() == [0, 1, 2, 3, 4]
        assert all(y.tolist() == [i % 10 for i in range(12)] for _, y in scored)


@pytest.mark.slow
def test_one_class_may_be_scored_more_often_than_drawn(smoke_runs, no_drawing, tmp_path, monkeypatch):
    scored = []

    def scores(samples, data, labels=None):
        scored.append(labels)
        raise Stop

    monkeypatch.setattr(quality, "scores", scores)
    monkeypatch.setattr("common.data.CACHE", tmp_path / "cache")
    with pytest.raises(Stop):
        conditional.main(["--sample", str(smoke_runs[conditional]), "--classes", "3", "--n_samples", "2",
                          "--evaluate", "12", "--classifier_steps", "2", "--out", str(tmp_path)])
    assert scored[0].tolist() == [3] * 12
