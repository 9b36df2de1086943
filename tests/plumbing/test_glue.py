"""What stands between the mathematics of a page and its run: the lines of `train` and of `main`.

Toy pictures of 8 x 8 make every training a second or less; each test fails when its line is broken.
DDIM's `train` is DDPM's to the letter, see test_drift.py. Which field of a Config reaches which place is in
test_config.py, what one page alone does in its own file.
"""

import json
from types import SimpleNamespace

import conditional_diffusion_example as conditional
import ddim_example as ddim
import ddpm_example as ddpm
import flow_matching_example as flow
import latent_diffusion_example as latent
import score_based_diffusion_example as score_based
from common import plotting, quality
from common.cli import Mistake
from common.data import Data
from common.run import Run

import pytest
import torch
from conftest import experiment, only_run, open_picture, open_run, script_name, spied
from torch.testing import assert_close

pytestmark = pytest.mark.slow  # the file as a whole

PAGES = (ddpm, ddim, latent, conditional, score_based, flow)
LOSS = {ddpm: "ddpm_loss", latent: "ddpm_loss", conditional: "v_loss", score_based: "score_loss", flow: "cfm_loss"}
RUNS = dict.fromkeys(PAGES, ("--dataset", "digits8"))  # the runs of `finished`, which other files share
RUNS[latent] += ("--image_size", "16")
RUNS[score_based] += ("--attention", "4")
every_page = pytest.mark.parametrize("page", PAGES, ids=script_name)


def name_of(value):
    """The id of a page among the values of a row."""
    return script_name(value) if value in PAGES else ""


def toy():
    """48 pictures of two classes: a bright left half, a bright right half, with some noise; 8-bit."""
    y = torch.arange(48) % 2
    pixels = torch.randint(20, 60, (48, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels[y == 0, :, :, :4] += 180
    pixels[y == 1, :, :, 4:] += 180
    x = pixels / 127.5 - 1
    return Data("toy", x[:24], x[24:], y[:24], y[24:], ("left", "right"))


def network_is_shown(patch):
    """The velocity of the flow page knows its network and labels, as a partial of the other pages does."""
    true = flow.velocity_fn

    def velocity_fn(model, y=None, w=0.0):
        v = true(model, y, w)
        v.func, v.y = model, y
        return v

    patch.setattr(flow, "velocity_fn", velocity_fn)


def trained(page, out, *argv):
    """(run, what train returned as its network) of a smoke run on toy pictures."""
    cfg, run, _ = open_run(page, out, "--dataset", "digits8", *argv)
    model = page.train(cfg, run, toy())
    return run, model[0] if page is latent else model


# Training


@pytest.fixture(scope="module", params=LOSS, ids=script_name)
def recorded(request, tmp_path_factory):
    """A training in mixed precision: what its loss was given with the gradient of that, and what AdamW then did.

    Every process but this one has gradients of 0.
    """
    page, true_step = request.param, torch.optim.AdamW.step
    seen = SimpleNamespace(page=page, steps=[], losses=[], drawn=[], previews=[], inside=set())
    true_loss, true_preview = getattr(page, LOSS[page]), page.figure_preview

    def step(optimizer, *args, **kwargs):
        (group,) = optimizer.param_groups
        before = [p.detach().clone() for p in group["params"]]
        gradients = [p.grad.clone() for p in group["params"]]
        true_step(optimizer, *args, **kwargs)
        weights = [p.detach().clone() for p in group["params"]]
        seen.steps.append(SimpleNamespace(lr=group["lr"], before=before, gradients=gradients, weights=weights))

    def loss(model, *args, **kwargs):
        network = getattr(model, "func", model)
        conv = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
        hook = conv.register_forward_hook(lambda _, __, out: seen.inside.add(out.dtype))
        out = true_loss(model, *args, **kwargs)
        hook.remove()
        x0, t, eps = [a for a in args if isinstance(a, torch.Tensor)][:3]
        if page is flow:  # whose order is noise, data, time
            x0, t, eps = t, eps, x0
        gradients = torch.autograd.grad(out, list(network.parameters()), retain_graph=True)
        seen.losses.append(SimpleNamespace(value=out, x0=x0, t=t, eps=eps, gradients=gradients))
        return out

    def average(run, model):
        for p in model.parameters():
            p.grad /= 2

    def preview(run, model, *args):
        state = torch.get_rng_state()
        true_preview(run, model, *args)
        seen.previews.append((model, args[-1], torch.equal(torch.get_rng_state(), state)))

    flags = ["--lr", 0.01, "--warmup", 3, "--ema", 0.6, "--grad_clip", 0.01, "--batch_size", 24, "--amp", "bf16"]
    with pytest.MonkeyPatch.context() as patch:
        network_is_shown(patch)
        patch.setattr(torch.optim.AdamW, "step", step)
        patch.setattr(page, LOSS[page], loss)
        patch.setattr(page, "figure_preview", preview)
        patch.setattr(Run, "average_gradients", average)
        patch.setattr(plotting, "table", lambda *_, **__: None)
        if page is not score_based:
            flags += ["--drawing", "uniform"]
            draw = "draw_time" if page is flow else "draw_t"
            spied(patch, page, draw, lambda given, t: seen.drawn.append((*given.values(), t)))
        seen.run, seen.model = trained(page, tmp_path_factory.mktemp("recorded"), *flags)
    assert len(seen.steps) == len(seen.losses) == seen.run.cfg.steps == 6
    return seen


def test_a_step_follows_the_averaged_and_clipped_gradient_of_this_batch_alone(recorded):
    """No gradient of an earlier step is left, and none is missing; the log has the norm before the clip."""
    rates = [0.01 * min(1, (step + 1) / 3) * (1 + torch.cos(torch.tensor(torch.pi * step / 6)).item()) / 2
             for step in range(6)]
    log = recorded.run.read_log()
    assert [step.lr for step in recorded.steps] == log["lr"] == pytest.approx(rates, rel=1e-5)
    for step, loss, logged in zip(recorded.steps, recorded.losses, log["grad_norm"], strict=True):
        norm = torch.stack([g.norm() for g in loss.gradients]).norm().item() / 2
        assert logged == pytest.approx(norm, rel=1e-4) and norm > 0.02
        for found, gradient in zip(step.gradients, loss.gradients, strict=True):
            assert_close(found, gradient / 2 * 0.01 / norm, rtol=1e-3, atol=1e-7)


def test_mixed_precision_is_in_the_network_alone(recorded):
    assert recorded.inside == {torch.bfloat16} and {loss.value.dtype for loss in recorded.losses} == {torch.float32}
    assert {p.dtype for p in recorded.steps[-1].weights + [*recorded.model.parameters()]} == {torch.float32}


def test_what_is_returned_and_previewed_is_the_average_of_the_weights(recorded):
    """In eval mode; the checkpoint holds it and the weights themselves. A preview leaves the draws alone."""
    model, average, last = recorded.model, recorded.steps[0].before, recorded.steps[-1].weights
    for n, step in enumerate(recorded.steps):
        decay = min(0.6, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, step.weights, strict=True)]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    state = torch.load(recorded.run.path("checkpoint.pt"), weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(state["ema"][name], value)
    for (name, found), wanted, weight in zip(model.named_parameters(), average, last, strict=True):
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(state["model"][name], weight)
    assert not all(map(torch.equal, average, last))
    assert recorded.previews == [(model, 3, True), (model, 6, True)]


def test_each_step_draws_its_pictures_its_t_and_its_noise(recorded):
    """t by --drawing; the score-based page's times are in its own file."""
    assert len(recorded.drawn) == (0 if recorded.page is score_based else 6)
    for (size, end, drawing, t), loss in zip(recorded.drawn, recorded.losses, strict=False):
        assert (size, drawing) == (24, "uniform") and torch.equal(t, loss.t)
        assert end.t_end == 1 if recorded.page is flow else end == recorded.run.cfg.T
    for before, after in zip(recorded.losses[:-1], recorded.losses[1:], strict=True):
        assert not any(torch.equal(vars(before)[name], vars(after)[name]) for name in ("x0", "t", "eps"))
    eps = torch.cat([loss.eps for loss in recorded.losses])
    assert abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.1
    assert len(eps[:, 0, 0, 0].unique()) == len(eps) == 6 * 24


# The pairs of flow matching


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a trained flow, whose weights are larger, so that it moves something."""
    run, _ = trained(flow, tmp_path_factory.mktemp("teacher"), "--steps", 1, "--sampler", "heun", "--S", 3)
    state = torch.load(run.path("checkpoint.pt"), weights_only=True)
    for weight in state["ema"].values():
        weight += 0.1 * torch.randn_like(weight)
    torch.save(state, run.path("checkpoint.pt"))
    return run.folder


@pytest.mark.parametrize("coupling, reflow", [("independent", False), ("ot", False), ("independent", True)])
def test_labels_follow_their_pictures_into_the_velocity(coupling, reflow, teacher, tmp_path, monkeypatch):
    """Through the coupling, through dropping some, and through reflow, whose stand-in leaves 10 y in its sample."""
    seen, dropped, couplings = [], [], []
    network_is_shown(monkeypatch)
    monkeypatch.setattr(flow, "scaled_noise", lambda v, *_: v)
    monkeypatch.setattr(flow, "flow_process", lambda v, x, *_: [(1.0, x + 10 * v.y.view(-1, 1, 1, 1))])
    spied(monkeypatch, flow, "cfm_loss", lambda given, _: seen.append((given["x0"], given["x1"], given["v"].y)))
    spied(monkeypatch, flow, "drop_labels", lambda given, _: dropped.append((given["p_uncond"], given["null"])))
    spied(monkeypatch, flow, "ot_coupling", lambda given, i: couplings.append((given["x0"], given["x1"][i])))
    state = torch.load(teacher / "checkpoint.pt", weights_only=True)
    state["config"]["p_uncond"] = 0.3
    torch.save(state, tmp_path / "labelled.pt")
    trained(flow, tmp_path, "--coupling", coupling, "--p_uncond", 0.3, "--batch_size", 24, "--steps", 4,
            "--preview_every", 100, "--pairs", 130, *(["--reflow", tmp_path / "labelled.pt"] if reflow else []))
    for _, x1, y in seen:
        side = (x1[..., 4:].mean((1, 2, 3)) > x1[..., :4].mean((1, 2, 3))).long()
        true = (x1.mean((1, 2, 3)) > 5).long() if reflow else side
        assert ((y == true) | (y == 2)).all() and 0 < true.sum() < 24
    assert 6 < sum((y == 2).sum() for *_, y in seen) < 52 and dropped == [(0.3, 2)] * 4
    assert len(couplings) == (4 if coupling == "ot" else 0)
    for (x0, x1, _), (noise, coupled) in zip(seen, couplings, strict=coupling == "ot"):
        assert torch.equal(x0, noise) and torch.equal(x1, coupled)


def test_reflow_is_refused_where_only_one_of_the_two_has_labels(teacher, tmp_path):
    with pytest.raises(Mistake, match="p_uncond 0.3: must be 1, that of --reflow"):
        trained(flow, tmp_path, "--p_uncond", 0.3, "--reflow", teacher)


def test_reflow_trains_on_the_pairs_of_the_run_it_names(teacher, tmp_path, monkeypatch):
    """Noise first; drawn by its averaged network as it was sampled; training starts from these weights."""
    begun, pairs, true = [], [], flow.cfm_loss

    def loss(v, path, x0, x1, t):
        begun.append(([p.detach().clone() for p in v.func.parameters()], x0, x1, v.func.training))
        return true(v, path, x0, x1, t)

    network_is_shown(monkeypatch)
    spied(monkeypatch, flow, "reflow_pairs", lambda given, made: pairs.append((given, made[0])))
    monkeypatch.setattr(flow, "cfm_loss", loss)
    trained(flow, tmp_path, "--reflow", teacher, "--pairs", 30, "--steps", 2, "--preview_every", 100)
    state = torch.load(teacher / "checkpoint.pt", weights_only=True)
    weights, *_, training = begun[0]
    assert training and all(map(torch.equal, weights, state["ema"].values()))
    network = flow.UNet(1, 8, 8, (1, 2), 1, (7,), 1, 4, 0.0, 2, 2).eval()
    network.load_state_dict(state["ema"])
    (given, drawn), = pairs
    assert drawn.shape == (30, 2, 1, 8, 8)
    for _, x0, x1, _ in begun:
        assert abs(x0.std() - 1) < 0.15 and (x1 - x0).abs().mean() > 0.1
        v = flow.scaled_noise(flow.velocity_fn(network), flow.StraightPath(), 1.5)
        assert_close(x1, flow.final(flow.flow_process(v, x0, 0.0, 1.0, "heun", 3)))
        assert all((drawn[:, 0] == x).flatten(1).all(1).any() for x in x0)
    torch.randn(3)  # a run that is resumed has drawn something else before
    assert torch.equal(flow.reflow_pairs(**given)[0], drawn)


# Main


@every_page
def test_the_presets_of_papers_draw_as_the_papers_do(page):
    """t uniform in training, and eps_hat as it is."""
    for preset, cfg in page.PRESETS.items():
        drawing = vars(cfg).get("drawing", vars(cfg).get("weighting"))
        if preset in ("laptop", "smoke"):
            assert drawing == "logit_normal"
        else:
            assert drawing in ("uniform", "simple") and vars(cfg).get("eps_scale", 1.0) == 1.0, preset


@pytest.mark.parametrize("page, more, frames", [
    (ddpm, set(), 21), (ddim, set(), 6), (conditional, set(), 6), (latent, {"vae_log.csv"}, 6),
    (flow, {"steps.png"}, 6)], ids=name_of)
def test_a_run_writes_every_file_and_says_where(page, more, frames, finished):
    """The film shows each t of the sampler, and its end."""
    folder, said = finished(page, *RUNS[page])
    assert {file.name for file in folder.iterdir()} == more | {
        "config.json", "log.csv", "metrics.json", "checkpoint.pt", "preview.png", "samples.png", "loss.png",
        "denoising.gif"}
    for picture in folder.glob("*.png"):
        open_picture(picture)
    assert len(open_picture(folder / "denoising.gif")) == frames
    state, name = torch.load(folder / "checkpoint.pt", weights_only=True), script_name(page)
    assert (state["step"], state["script"], state["preset"]) == (6, name, "smoke")
    assert said.strip().splitlines()[-1].endswith(f"more: python experiments/{name}.py --sample {folder}")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 6 and metrics["sampling"]["n"] == state["config"]["n_samples"]


@every_page
def test_a_fresh_run_draws_by_the_network_that_training_returned(page, tmp_path, drawings, monkeypatch):
    returned, seen = torch.nn.Identity(), []
    monkeypatch.setattr(page, "train", lambda *_: (returned, None) if page is latent else returned)

    def draw(run, n, states, network, *_):
        seen.append(network)
        raise Mistake("enough")

    monkeypatch.setattr(Run, "draw", draw)
    with pytest.raises(SystemExit):
        page.main(["--preset", "smoke", "--device", "cpu", "--out", str(tmp_path), *RUNS[page]])
    assert seen == [returned]


@pytest.mark.parametrize("page, argv, y", [
    *((page, [], None) for page in PAGES if page is not conditional),
    (conditional, [], [*range(10)] * 4), (conditional, ["--classes", "7", "0", "3"], [7, 0, 3])], ids=name_of)
def test_sample_draws_by_the_average_from_fresh_noise_and_measures_what_it_drew(
        page, argv, y, finished, tmp_path, drawings, monkeypatch):
    """metrics.json is of the drawn samples; --evaluate draws as many as it says, of the same classes."""
    folder, _ = finished(page, *RUNS[page])  # before anything is patched
    drawn, scored, glanced, n = [], [], [], len(y or range(40))
    spied(monkeypatch, Run, "draw", lambda given, out: drawn.append(SimpleNamespace(samples=out[0], **given)))
    monkeypatch.setattr(quality, "scores", lambda x, data, labels=None: (
        scored.append((x, labels)) or {"frechet_distance": 1.0}))
    monkeypatch.setattr(quality, "glance", lambda x, data, labels=None: (
        glanced.append((x, labels)) or {"legible": 0.25}))
    for figure in ("figure_samplers", "figure_steps"):  # of a hundred calls of the network
        monkeypatch.setattr(page, figure, lambda *_: None, raising=False)
    if page in (score_based, flow):
        argv = ["--likelihood", "0"]
    page.main(["--sample", str(folder), "--n_samples", "40", "--evaluate", "12", "--out", str(tmp_path), *argv])

    state, (samples, evaluated) = torch.load(folder / "checkpoint.pt", weights_only=True), drawn
    for network in (samples.network, evaluated.network):
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        assert all(torch.equal(value, state["ema"][name]) for name, value in network.state_dict().items())
    assert any(not torch.equal(state["ema"][name], state["model"][name]) for name in state["model"])
    (ts, xs), (_, others) = (zip(*samples.states(range(n)), strict=True) for _ in range(2))
    assert list(ts) == sorted(ts, reverse=page is not flow) and xs[-1].shape[:2] == (n, 1)
    assert (ts[0], ts[-1]) == ((0, 1) if page is flow else (state["config"].get("T", 1), 0))
    assert abs(xs[0].std() - 1) < 5 / (128 * n) ** 0.5 and len(xs[0][:, 0, 0, 0].unique()) == n
    assert not torch.equal(xs[0], others[0])

    folder = only_run(tmp_path, script_name(page))
    found = json.loads((folder / "metrics.json").read_text())
    assert {file.name for file in folder.iterdir()} == {"config.json", "metrics.json", "evaluated.npz"}
    assert found["sampling"]["n"] == samples.n == n and evaluated.n == 12
    assert found["samples"]["legible"] == 0.25 and found["evaluation"]["frechet_distance"] == 1.0
    ((glance, labels),), ((score, score_labels),) = glanced, scored
    assert glance is samples.samples and score is evaluated.samples and len(score) == 12
    assert [of if of is None else of.tolist() for of in (labels, score_labels)] == [y, y and (y * 4)[:12]]
    if page is not conditional:
        assert drawings["samples.png"]["drawn"] is glance


@pytest.mark.parametrize("page, flags, names", [
    (ddpm, [], "forward schedules denoising neighbours"),
    (ddim, ["--sigma_hat", "--eta", "1"], "steps eta interpolation reconstruction neighbours"),
    (latent, [], "neighbours reconstructions latents histogram prior walk cost"),
    (conditional, ["--classes", "7", "0", "3"], "grid same_noise neighbours"),
    (flow, [], "way one_step neighbours straightness")], ids=name_of)
def test_an_experiment_draws_every_figure(page, flags, names, finished, tmp_path):
    """Here they are really drawn; that each shows what it says is in the files of the pages."""
    name = script_name(page)
    folder, _ = finished(page, *RUNS[page])
    experiment(name).main(["--sample", str(folder), "--out", str(tmp_path), "--device", "cpu", *flags])
    folder = only_run(tmp_path, name)
    assert {file.stem for file in folder.glob("*.png")} == set(names.split())
    for picture in folder.glob("*.png"):
        open_picture(picture)
    assert not (folder / "checkpoint.pt").exists()
