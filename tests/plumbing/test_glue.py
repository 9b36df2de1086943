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

PAGES = (ddpm, ddim, latent, conditional, score_based, flow)
LOSS = {ddpm: "ddpm_loss", latent: "ddpm_loss", conditional: "v_loss", score_based: "score_loss", flow: "cfm_loss"}
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
    cfg, run, _ = open_run(page, out, "--image_size", 8, *argv)
    model = page.train(cfg, run, toy())
    return run, model[0] if page is latent else model


# Training


@pytest.fixture(scope="module", params=LOSS, ids=script_name)
def recorded(request, tmp_path_factory):
    """A training, what its loss was given, and what its AdamW did at each step.

    loss_gradients: of the loss alone. Every process but this one has gradients of 0.
    """
    page = request.param
    seen = SimpleNamespace(page=page, steps=[], loss_gradients=[], given=[], drawn=[], previews=[])
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
        given = [a for a in args if isinstance(a, torch.Tensor)][:3]  # x0, t, eps
        seen.given.append([given[i] for i in (1, 2, 0)] if page is flow else given)
        return out

    def average(run, model):
        for p in model.parameters():
            p.grad /= 2

    seen.flags = ["--lr", 0.01, "--warmup", 3, "--ema", 0.6, "--grad_clip", 0.01, "--batch_size", 24]
    seen.average = average
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        patch.setattr(page, LOSS[page], loss)
        network_is_shown(patch)
        patch.setattr(Run, "average_gradients", average)
        patch.setattr(plotting, "table", lambda *_, **__: None)
        spied(patch, page, "figure_preview", lambda given, _: seen.previews.append((given["model"], given["step"])))
        if page is not score_based:
            seen.flags += ["--drawing", "uniform"]
            name = "draw_time" if page is flow else "draw_t"
            true_draw = getattr(page, name)
            patch.setattr(page, name, lambda *how: seen.drawn.append((how, true_draw(*how))) or
                          seen.drawn[-1][1])
        seen.run, seen.model = trained(page, tmp_path_factory.mktemp("recorded"), *seen.flags)
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
        size, end, drawing = how
        assert (size, drawing) == (24, "uniform") and torch.equal(drawn, t)
        assert end.t_end == 1 if recorded.page is flow else end == recorded.run.cfg.T
    for before, after in zip(recorded.given[:-1], recorded.given[1:], strict=True):
        assert not any(map(torch.equal, before, after))
    eps = torch.cat([eps for _, _, eps in recorded.given])
    assert abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.1
    assert len(eps[:, 0, 0, 0].unique()) == len(eps) == 6 * 24


@pytest.mark.slow
@every_loop
def test_mixed_precision_is_in_the_network_alone(page, tmp_path, drawings, monkeypatch):
    inside, losses, true = [], [], getattr(page, LOSS[page])

    def loss(model, *args):
        network = getattr(model, "func", model)
        conv = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
        hook = conv.register_forward_hook(lambda _, __, out: inside.append(out.dtype))
        losses.append(true(model, *args))
        hook.remove()
        return losses[-1]

    network_is_shown(monkeypatch)
    monkeypatch.setattr(page, LOSS[page], loss)
    _, model = trained(page, tmp_path, "--amp", "bf16", "--steps", 1)
    assert inside == [torch.bfloat16] and [loss.dtype for loss in losses] == [torch.float32]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_previews_are_of_the_average_and_leave_the_training_alone(recorded, tmp_path, monkeypatch):
    """They come every so many steps; without them the weights are the same to the last bit."""
    assert [step for _, step in recorded.previews] == [3, 6]
    assert all(model is recorded.model for model, _ in recorded.previews)
    monkeypatch.setattr(Run, "average_gradients", recorded.average)
    _, model = trained(recorded.page, tmp_path, *recorded.flags, "--preview_every", 100)
    for with_previews, without in zip(recorded.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(with_previews, without)


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


@pytest.mark.parametrize("coupling", ["independent", "ot"])
@pytest.mark.parametrize("reflow", [False, True])
def test_labels_follow_their_pictures_into_the_velocity(reflow, coupling, teacher, tmp_path, monkeypatch):
    """Through the coupling, through dropping some, and through reflow, whose stand-in leaves 10 y in its sample."""
    seen, dropped, couplings = [], [], []
    network_is_shown(monkeypatch)
    monkeypatch.setattr(flow, "flow_process", lambda v, x, *_: [(1.0, x + 10 * v.y.view(-1, 1, 1, 1))])
    spied(monkeypatch, flow, "cfm_loss", lambda given, _: seen.append((given["x0"], given["x1"], given["v"].y)))
    spied(monkeypatch, flow, "drop_labels", lambda given, _: dropped.append((given["p_uncond"], given["null"])))
    spied(monkeypatch, flow, "ot_coupling", lambda given, i: couplings.append((given["x0"], given["x1"][i])))
    state = torch.load(teacher / "checkpoint.pt", weights_only=True)
    state["config"]["p_uncond"] = 0.3
    torch.save(state, tmp_path / "labelled.pt")
    trained(flow, tmp_path, "--coupling", coupling, "--p_uncond", 0.3, "--batch_size", 24, "--preview_every", 100,
            "--pairs", 130, *(["--reflow", tmp_path / "labelled.pt"] if reflow else []))
    for _, x1, y in seen:
        side = (x1[..., 4:].mean((1, 2, 3)) > x1[..., :4].mean((1, 2, 3))).long()
        true = (x1.mean((1, 2, 3)) > 5).long() if reflow else side
        assert ((y == true) | (y == 2)).all() and 0 < true.sum() < 24
    assert 20 < sum((y == 2).sum() for *_, y in seen) < 70 and dropped == [(0.3, 2)] * 6
    assert len(couplings) == (6 if coupling == "ot" else 0)
    for (x0, x1, _), (noise, coupled) in zip(seen, couplings, strict=False):
        assert torch.equal(x0, noise) and torch.equal(x1, coupled)


def test_reflow_is_refused_where_only_one_of_the_two_has_labels(teacher, tmp_path):
    with pytest.raises(Mistake, match="p_uncond 0.3: must be 1, that of --reflow"):
        trained(flow, tmp_path, "--p_uncond", 0.3, "--reflow", teacher)


def test_reflow_trains_on_the_pairs_of_the_run_it_names(teacher, tmp_path, monkeypatch):
    """Noise first; drawn by its averaged network as it was sampled; training starts from these weights."""
    begun, pairs = [], []
    state = torch.load(teacher / "checkpoint.pt", weights_only=True)
    network_is_shown(monkeypatch)
    spied(monkeypatch, flow, "reflow_pairs", lambda given, made: pairs.append((given, made[0])))
    true = flow.cfm_loss

    def loss(v, path, x0, x1, t):
        begun.append(([p.detach().clone() for p in v.func.parameters()], x0, x1, v.func.training))
        return true(v, path, x0, x1, t)

    monkeypatch.setattr(flow, "cfm_loss", loss)
    trained(flow, tmp_path, "--reflow", teacher, "--pairs", 30, "--preview_every", 100)
    weights, *_, training = begun[0]
    assert training and all(map(torch.equal, weights, state["ema"].values()))
    network = flow.UNet(1, 8, 8, (1, 2), 1, (7,), 1, 4, 0.0, 2, 2).eval()
    network.load_state_dict(state["ema"])
    for _, x0, x1, _ in begun:
        assert abs(x0.std() - 1) < 0.15 and (x1 - x0).abs().mean() > 0.1
        assert_close(x1, flow.final(flow.flow_process(flow.velocity_fn(network), x0, 0.0, 1.0, "heun", 3)))
    given, drawn = pairs[0]
    assert drawn.shape == (30, 2, 1, 8, 8) and {tuple(x.flatten().tolist()) for _, x0, _, _ in begun for x in x0} <= {
        tuple(x.flatten().tolist()) for x in drawn[:, 0]}
    torch.randn(3)  # a run that is resumed has drawn something else before
    assert torch.equal(flow.reflow_pairs(**given)[0], drawn)


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

FILES = {"config.json", "log.csv", "metrics.json", "checkpoint.pt", "preview.png", "samples.png", "loss.png",
         "denoising.gif"}


@pytest.mark.slow
@pytest.mark.parametrize("page, data, more, frames", [
    (ddpm, "digits8 --T 8", set(), 9), (ddim, "digits8", set(), 6), (conditional, "digits8", set(), 6),
    (latent, "color_digits --image_size 16", {"vae_log.csv"}, 6), (flow, "digits8", {"steps.png"}, 6)],
    ids=lambda v: script_name(v) if v in PAGES else "")
def test_a_run_writes_every_file_and_says_where(page, data, more, frames, tmp_path, capsys):
    """The film shows each t of the sampler, and its end."""
    page.main(["--preset", "smoke", "--device", "cpu", "--out", str(tmp_path), "--dataset", *data.split()])
    name, said = script_name(page), capsys.readouterr().out
    folder = only_run(tmp_path, name)
    assert {file.name for file in folder.iterdir()} == FILES | more
    for picture in ("preview", "samples", "loss"):
        open_picture(folder / f"{picture}.png")
    assert len(open_picture(folder / "denoising.gif")) == frames
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (state["step"], state["script"], state["preset"]) == (6, name, "smoke")
    assert said.strip().splitlines()[-1].endswith(f"more: python experiments/{name}.py --sample {folder}")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 6 and metrics["sampling"]["n"] == state["config"]["n_samples"]


class Stop(Exception):
    """Ends main once the test has seen what it came for."""


def drawn(page, patch, *argv):
    """(network, states, n) that main hands to Run.draw; the rest of main is not run."""
    seen = []

    def spy(run, n, states, network, *rest):
        seen.append((network, states, n))
        raise Stop

    patch.setattr(Run, "draw", spy)
    with pytest.raises(Stop):
        page.main(["--device", "cpu", *map(str, argv)])
    return seen[0]


@every_page
def test_a_fresh_run_draws_by_the_network_that_training_returned(page, tmp_path, drawings, monkeypatch):
    returned = torch.nn.Identity()
    monkeypatch.setattr(page, "train", lambda *_: (returned, None) if page is latent else returned)
    network, _, _ = drawn(page, monkeypatch, "--preset", "smoke", "--out", tmp_path)
    assert network is returned


@pytest.mark.slow
@every_page
def test_sample_draws_by_the_average_and_from_fresh_noise(page, finished, tmp_path, drawings, monkeypatch):
    folder, _ = finished(page)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    network, states, n = drawn(page, monkeypatch, "--sample", folder, "--n_samples", 64, "--out", tmp_path)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    for name, value in network.state_dict().items():
        assert torch.equal(value, state["ema"][name])
    assert any(not torch.equal(state["ema"][k], state["model"][k]) for k in state["model"])
    (ts, xs), (_, others) = (zip(*states(range(n)), strict=True) for _ in range(2))
    assert n == 64 and list(ts) == sorted(ts, reverse=page is not flow) and xs[-1].shape[:2] == (64, 1)
    ends = (0, 1) if page is flow else (state["config"].get("T", 1), 0)
    assert (ts[0], ts[-1]) == ends
    assert abs(xs[0].std() - 1) < 0.06 and len(xs[0][:, 0, 0, 0].unique()) == 64
    assert not torch.equal(xs[0], others[0])


@pytest.mark.slow
@pytest.mark.parametrize("page, argv, y", [
    *((page, [], None) for page in PAGES if page is not conditional),
    (conditional, [], [0, 1, 2, 3, 4]), (conditional, ["--classes", "7", "0", "3"], [7, 0, 3])],
    ids=lambda v: script_name(v) if v in PAGES else None)
def test_main_measures_the_samples_it_drew(page, argv, y, finished, tmp_path, drawings, monkeypatch):
    """metrics.json is of the drawn samples; --evaluate draws as many as it says, of the same classes."""
    folder, _ = finished(page)  # before anything is patched
    scored, glanced, made = [], [], []
    true_draw = Run.draw
    monkeypatch.setattr(Run, "draw", lambda *a: made.append(true_draw(*a)) or made[-1])
    monkeypatch.setattr(quality, "scores", lambda x, data, labels=None: (
        scored.append((x, labels)) or {"frechet_distance": 1.0}))
    monkeypatch.setattr(quality, "glance", lambda x, data, labels=None: (
        glanced.append((x, labels)) or {"legible": 0.25}))
    if page in (score_based, flow):
        argv = ["--likelihood", 0]
    page.main(["--sample", str(folder), "--n_samples", "5", "--evaluate", "12", "--out",
               str(tmp_path), *map(str, argv)])
    folder = only_run(tmp_path, script_name(page))
    found = json.loads((folder / "metrics.json").read_text())
    assert {file.name for file in folder.iterdir()} == {"config.json", "metrics.json", "evaluated.npz"}
    n = len(y) if y else 5
    assert glanced[0][0] is made[0][0] and len(glanced) == 1 and found["sampling"]["n"] == n
    assert found["samples"]["legible"] == 0.25 and found["evaluation"]["frechet_distance"] == 1.0
    assert len(scored) == 1 and scored[0][0] is made[-1][0] and len(scored[0][0]) == 12
    labels = [None if of is None else of.tolist() for _, of in (*glanced, *scored)]
    assert labels == [y, y and ([i % 10 for i in range(12)] if len(y) == 5 else y * 4)]
    if page is not conditional:
        assert drawings["samples.png"]["drawn"] is made[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("page, flags, names", [
    (ddpm, [], "forward schedules denoising neighbours bound rate_distortion"),
    (ddim, ["--sigma_hat", "--eta", "1"], "steps eta interpolation reconstruction neighbours"),
    (latent, [], "neighbours reconstructions latents histogram prior walk cost"),
    (conditional, [], "grid same_noise neighbours"),
    (flow, [], "way one_step neighbours straightness")], ids=lambda v: script_name(v) if v in PAGES else "")
def test_an_experiment_draws_every_figure(page, flags, names, finished, tmp_path):
    """Here they are really drawn; that each shows what it says is in the files of the pages."""
    name = script_name(page)
    experiment(name).main(["--sample", str(finished(page)[0]), "--out", str(tmp_path), "--device", "cpu", *flags])
    folder = only_run(tmp_path, name)
    assert {file.stem for file in folder.glob("*.png")} == set(names.split())
    for figure in names.split():
        open_picture(folder / f"{figure}.png")
    assert not (folder / "checkpoint.pt").exists()
