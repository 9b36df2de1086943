"""What stands between the mathematics of a page and its run: the lines of `train` and of `main`.

Toy pictures of 8 x 8 make every training a second or less; each test fails when its line is broken.
DDIM's `train` is DDPM's to the letter, see test_drift.py. What one page alone does is in its own file.
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
from conftest import only_run, open_run, script_name
from torch.testing import assert_close

PAGES = (ddpm, ddim, latent, conditional, score_based)
LOSS = {ddpm: "ddpm_loss", latent: "ddpm_loss", conditional: "v_loss", score_based: "score_loss"}
every_page = pytest.mark.parametrize("page", PAGES, ids=script_name)
every_loop = pytest.mark.parametrize("page", LOSS, ids=script_name)


def toy(*_):
    """48 pictures of two classes: a bright left half, a bright right half, with some noise; 8-bit."""
    y = torch.arange(48) % 2
    pixels = torch.randint(20, 60, (48, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels[y == 0, :, :, :4] += 180
    pixels[y == 1, :, :, 4:] += 180
    x = pixels / 127.5 - 1
    return Data("toy", x[:24], x[24:], y[:24], y[24:], ("left", "right"))


@pytest.fixture(autouse=True, scope="module")
def _no_drawing():
    """Figures are computed, and none is written: that takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for name, draw in list(vars(plotting).items()):
            if hasattr(draw, "__wrapped__") and name[0] != "_":
                patch.setattr(plotting, name, lambda *_, **__: None)
        yield


def trained(page, out, *argv):
    """(run, what train returned as its network) of a smoke run on toy pictures."""
    cfg, run, _ = open_run(page, out, "--image_size", 8, *argv)
    model = page.train(cfg, run, toy())
    return run, model[0] if page is latent else model


# Training


@pytest.fixture(scope="module", params=LOSS, ids=script_name)
def recorded(request, tmp_path_factory):
    """A training, what its loss was given, and what its AdamW did at each step.

    loss_gradients: of the loss alone. Every process but this one has gradients of 0.
    """
    page, seen = request.param, SimpleNamespace(steps=[], loss_gradients=[], given=[], drawn=[])
    true_step, true_loss = torch.optim.AdamW.step, getattr(page, LOSS[page])

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
        seen.given.append([a for a in args if isinstance(a, torch.Tensor)][:3])  # x0, t, eps
        return out

    def average(run, model):
        for p in model.parameters():
            p.grad /= 2

    flags = ["--lr", 0.01, "--warmup", 3, "--ema", 0.6, "--grad_clip", 0.01, "--batch_size", 24]
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        patch.setattr(page, LOSS[page], loss)
        patch.setattr(Run, "average_gradients", average)
        if page is not score_based:
            flags += ["--drawing", "uniform"]
            true_draw = page.draw_t
            patch.setattr(page, "draw_t", lambda *how: seen.drawn.append((how, true_draw(*how))) or
                          seen.drawn[-1][1])
        seen.run, seen.model = trained(page, tmp_path_factory.mktemp("recorded"), *flags)
    assert len(seen.steps) == len(seen.loss_gradients) == seen.run.cfg.steps == 6
    assert len(seen.drawn) == (0 if page is score_based else 6)
    return seen


@pytest.mark.slow
def test_the_learning_rate_reaches_the_optimiser_and_the_log(recorded):
    rates = [0.01 * min(1, (step + 1) / 3) * (1 + torch.cos(torch.tensor(torch.pi * step / 6)).item()) / 2
             for step in range(6)]
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
    model, average = recorded.model, recorded.steps[0].before
    for n, record in enumerate(recorded.steps):
        decay = min(0.6, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, record.weights, strict=True)]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    state = torch.load(recorded.run.path("checkpoint.pt"), weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(state["ema"][name], value)
    for (name, found), wanted, last in zip(model.named_parameters(), average, recorded.steps[-1].weights,
                                           strict=True):
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(state["model"][name], last)
    assert any(not torch.equal(a, w) for a, w in zip(average, recorded.steps[-1].weights, strict=True))


@pytest.mark.slow
def test_each_step_draws_its_pictures_its_t_and_its_noise(recorded):
    """t by --drawing; the score-based page's times are in its own file."""
    for (how, drawn), (_, t, _) in zip(recorded.drawn, recorded.given, strict=False):
        assert how == (24, recorded.run.cfg.T, "uniform") and torch.equal(drawn, t)
    for before, after in zip(recorded.given[:-1], recorded.given[1:], strict=True):
        assert not any(map(torch.equal, before, after))
    eps = torch.cat([eps for _, _, eps in recorded.given])
    assert abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.1
    assert len(eps[:, 0, 0, 0].unique()) == len(eps) == 6 * 24


@pytest.mark.slow
@every_loop
def test_mixed_precision_is_in_the_network_alone(page, tmp_path, monkeypatch):
    inside, losses, true = [], [], getattr(page, LOSS[page])

    def loss(model, *args):
        network = getattr(model, "func", model)
        conv = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
        hook = conv.register_forward_hook(lambda _, __, out: inside.append(out.dtype))
        losses.append(true(model, *args))
        hook.remove()
        return losses[-1]

    monkeypatch.setattr(page, LOSS[page], loss)
    _, model = trained(page, tmp_path, "--amp", "bf16", "--steps", 2)
    assert inside == [torch.bfloat16] * 2 and [loss.dtype for loss in losses] == [torch.float32] * 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.slow
@every_loop
def test_previews_leave_the_training_alone(page, tmp_path, monkeypatch):
    """They come every so many steps, of the average."""
    seen, true = [], page.figure_preview
    monkeypatch.setattr(page, "figure_preview", lambda *args: seen.append(args[1:]) or true(*args))
    weights = []
    for every, steps in ((2, [2, 4]), (100, [])):
        torch.manual_seed(0)
        _, model = trained(page, tmp_path, "--preview_every", every, "--steps", 5)
        assert [args[-1] for args in seen] == steps and all(args[0] is model for args in seen)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
        seen.clear()
    assert torch.equal(*weights)


@every_page
def test_the_presets_of_papers_draw_as_the_papers_do(page):
    """t uniform in training, and eps_hat as it is."""
    for preset, cfg in page.PRESETS.items():
        drawing = vars(cfg).get("drawing", vars(cfg).get("weighting"))
        if preset in ("laptop", "smoke"):
            assert drawing == "logit_normal"
        else:
            assert drawing in ("uniform", "simple") and vars(cfg).get("eps_scale", 1.0) == 1.0, preset


# Main


class Stop(Exception):
    """Ends main once the test has seen what it came for."""


def drawn(page, patch, *argv):
    """(network, states, n) that main hands to Run.draw; the rest of main is not run."""
    seen = []

    def spy(run, n, states, network, *rest):
        seen.append((network, states, n))
        raise Stop

    patch.setattr(Run, "draw", spy)
    patch.setattr(page, "load_data" if page is score_based else "load_images", toy)
    with pytest.raises(Stop):
        page.main(["--device", "cpu", *map(str, argv)])
    return seen[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{page: (folder, the network it draws by)} of runs whose average differs from the weights."""
    found = {}
    for page in PAGES:
        out = tmp_path_factory.mktemp(script_name(page))
        with pytest.MonkeyPatch.context() as patch:
            network, _, _ = drawn(page, patch, "--preset", "smoke", "--image_size", 8, "--lr", 0.02,
                                  "--steps", 4, "--out", out)
        found[page] = only_run(out, script_name(page)), network
    return found


@pytest.mark.slow
@every_page
def test_a_fresh_run_and_sample_draw_by_the_average_and_from_fresh_noise(page, runs, tmp_path, monkeypatch):
    folder, fresh = runs[page]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    network, states, n = drawn(page, monkeypatch, "--sample", folder, "--n_samples", 64, "--out", tmp_path)
    for model in (fresh, network):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        for name, value in model.state_dict().items():
            assert torch.equal(value, state["ema"][name])
    assert any(not torch.equal(state["ema"][k], state["model"][k]) for k in state["model"])
    (ts, xs), (_, others) = (zip(*states(range(n)), strict=True) for _ in range(2))
    assert n == 64 and list(ts) == sorted(ts, reverse=True) and xs[-1].shape == (64, 1, 8, 8)
    assert ts[0] == state["config"].get("T", 1.0) and ts[-1] == 0
    assert abs(xs[0].std() - 1) < 0.06 and len(xs[0][:, 0, 0, 0].unique()) == 64
    assert not torch.equal(xs[0], others[0])


@pytest.mark.slow
@pytest.mark.parametrize("page, argv, y", [
    *((page, [], None) for page in PAGES if page is not conditional),
    (conditional, [], [0, 1, 0, 1, 0]), (conditional, ["--classes", "right", "0", "1"], [1, 0, 1])],
    ids=lambda v: script_name(v) if v in PAGES else None)
def test_main_measures_the_samples_it_drew(page, argv, y, runs, tmp_path, monkeypatch):
    """metrics.json is of the drawn samples; --evaluate draws as many as it says, of the same classes."""
    scored, glanced, made = [], [], []
    true_draw = Run.draw
    monkeypatch.setattr(Run, "draw", lambda *a: made.append(true_draw(*a)) or made[-1])
    monkeypatch.setattr(quality, "scores", lambda x, data, labels=None: (
        scored.append((x, labels)) or {"frechet_distance": 1.0, "frechet_distance_of_held_out": 1.0,
                                       "accuracy": 0.5, "accuracy_of_held_out": 1.0, "recall": 0.5}))
    monkeypatch.setattr(quality, "glance", lambda x, data, labels=None: (
        glanced.append((x, labels)) or {"legible": 0.25}))
    monkeypatch.setattr(page, "load_data" if page is score_based else "load_images", toy)
    if page is score_based:
        argv = ["--likelihood", 0]
    page.main(["--sample", str(runs[page][0]), "--n_samples", "5", "--evaluate", "12", "--out",
               str(tmp_path), *map(str, argv)])
    found = json.loads((only_run(tmp_path, script_name(page)) / "metrics.json").read_text())
    n = len(y) if y else 5
    assert glanced[0][0] is made[0][0] and len(glanced) == 1 and found["sampling"]["n"] == n
    assert found["samples"]["legible"] == 0.25 and found["evaluation"]["n"] == 12
    assert len(scored) == 1 and scored[0][0] is made[-1][0] and len(scored[0][0]) == 12
    labels = [None if of is None else of.tolist() for _, of in (*glanced, *scored)]
    assert labels == [y, y and ([0, 1] * 6 if len(y) == 5 else y * 4)]
