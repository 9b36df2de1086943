"""What stands between the mathematics of a script and its run, one test for all five scripts.

Toy pictures of 8 x 8 make every run a second or less; each test fails when its line of `train`,
`main` or common/runs.py is broken.
"""

import inspect
import json

import conditional_diffusion_example as conditional
import ddim_example as ddim
import ddpm_example as ddpm
import latent_diffusion_example as latent
import score_based_diffusion_example as score_based
from common import metrics
from common.data import Data
from common.runs import Run

import pytest
import torch
from conftest import open_run, script_name
from torch.testing import assert_close

MODULES = (ddpm, ddim, latent, conditional, score_based)
every_script = pytest.mark.parametrize("module", MODULES, ids=script_name)
LOSS = {module: "ddpm_loss" for module in MODULES} | {
    conditional: "v_loss", score_based: "score_loss"}


def toy(n=48, side=8):
    """Pictures of two classes: a bright left half, a bright right half, with some noise; 8-bit."""
    y = torch.arange(n) % 2
    pixels = torch.randint(20, 60, (n, 1, side, side))
    pixels[y == 0, :, :, :side // 2] += 180
    pixels[y == 1, :, :, side // 2:] += 180
    x = pixels / 127.5 - 1
    return Data("toy", x[:n // 2], x[n // 2:], y[:n // 2], y[n // 2:], ("left", "right"))


def prepared(module, out, *argv, data=None):
    """(cfg, run, data) of a smoke run on toy pictures."""
    cfg, run, _ = open_run(module, out, "--image_size", 8, *argv)
    return cfg, run, toy() if data is None else data


def trained(module, out, *argv, data=None):
    """(cfg, run, what train returned as its network) of a smoke run on toy pictures."""
    cfg, run, data = prepared(module, out, *argv, data=data)
    model = module.train(cfg, run, data)
    return cfg, run, model[0] if module is latent else model


@pytest.fixture
def steps(monkeypatch):
    """The optimiser's steps as they happen: dicts of lr, gradients and weights after each.

    Stage 1 of the latent script has an optimiser of its own and is left out.
    """
    seen, true = [], torch.optim.AdamW.step

    def spy(optimizer, *args, **kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        record = {"lr": [group["lr"] for group in optimizer.param_groups],
                  "peak": optimizer.defaults["lr"], "optimizer": optimizer,
                  "before": [p.detach().clone() for p in parameters],
                  "gradients": [p.grad.clone() for p in parameters]}
        out = true(optimizer, *args, **kwargs)
        record["weights"] = [p.detach().clone() for p in parameters]
        seen.append(record)
        return out

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    return seen


def of_last_loop(seen):
    """The steps of the optimiser that stepped last."""
    return [record for record in seen if record["optimizer"] is seen[-1]["optimizer"]]


@pytest.mark.slow
@every_script
@pytest.mark.parametrize("decay", ["cosine", "constant"])
def test_the_learning_rate_reaches_the_optimiser(module, decay, tmp_path, steps):
    cfg, run, _ = trained(module, tmp_path, "--decay", decay, "--warmup", "3", "--lr", "0.01")
    for record in steps:
        assert len(set(record["lr"])) == 1
    rates = [record["lr"][0] for record in of_last_loop(steps)]
    expected = []
    for step in range(cfg.steps):
        share = min(1, (step + 1) / 3)
        if decay == "cosine":
            share *= (1 + torch.cos(torch.tensor(torch.pi * step / cfg.steps)).item()) / 2
        expected.append(0.01 * share)
    assert rates == pytest.approx(expected, rel=1e-5)
    assert run.read_log()["lr"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@every_script
def test_gradients_are_clipped(module, tmp_path, steps):
    cfg, run, _ = trained(module, tmp_path, "--grad_clip", "0.01")
    for record in of_last_loop(steps):
        norm = torch.stack([g.norm() for g in record["gradients"]]).norm().item()
        assert norm == pytest.approx(0.01, rel=1e-3)
    assert min(run.read_log()["grad_norm"]) > 0.02  # what is logged is the norm before


@pytest.mark.slow
@every_script
def test_the_gradient_is_that_of_this_batch_alone(module, tmp_path, steps, monkeypatch):
    """No gradient of an earlier step is left, and none is missing."""
    expected, true = [], getattr(module, LOSS[module])

    def spy(model, *args, **kwargs):
        loss = true(model, *args, **kwargs)
        if loss.requires_grad:
            network = getattr(model, "func", model)
            expected.append(torch.autograd.grad(
                loss, list(network.parameters()), retain_graph=True, allow_unused=True))
        return loss

    monkeypatch.setattr(module, LOSS[module], spy)
    trained(module, tmp_path, "--grad_clip", "1e6")
    records = of_last_loop(steps)
    assert len(records) == len(expected) == 6
    for record, gradients in zip(records, expected, strict=True):
        for found, wanted in zip(record["gradients"], gradients, strict=True):
            assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@every_script
def test_what_is_returned_is_the_average_of_the_weights(module, tmp_path, steps):
    cfg, run, model = trained(module, tmp_path, "--lr", "0.01", "--ema", "0.6")
    records = of_last_loop(steps)
    average = records[0]["before"]
    for n, record in enumerate(records):
        decay = min(0.6, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * w
                   for a, w in zip(average, record["weights"], strict=True)]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    for found, wanted in zip(model.parameters(), average, strict=True):
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(a, w) for a, w in zip(average, records[-1]["weights"], strict=True))
    state = torch.load(run.path("checkpoint.pt"), weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(state["ema"][name], value)
    for value, wanted in zip(state["model"].values(), records[-1]["weights"], strict=False):
        if value.shape == wanted.shape:
            break
    else:
        raise AssertionError("the weights themselves are not in the checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("module", [ddpm, ddim, latent, conditional], ids=script_name)
def test_training_draws_every_t_from_1_to_T(module, tmp_path, monkeypatch):
    seen, true = [], module.q_sample

    def spy(x0, t, eps, alpha_bars):
        if isinstance(t, torch.Tensor):
            seen.append((t, x0, eps))
        return true(x0, t, eps, alpha_bars)

    monkeypatch.setattr(module, "q_sample", spy)
    trained(module, tmp_path, "--T", "4", "--batch_size", "24")
    ts = torch.cat([t for t, _, _ in seen])
    assert set(ts.tolist()) == {1, 2, 3, 4} and ts.dtype == torch.int64
    (_, x0, eps), (_, next_x0, next_eps) = seen[:2]
    assert not torch.equal(eps, next_eps) and not torch.equal(x0, next_x0)
    assert abs(torch.cat([eps for _, _, eps in seen]).std() - 1) < 0.1


def test_score_training_draws_t_up_to_T(tmp_path, monkeypatch):
    seen, true = [], score_based.network_eps

    def spy(model, sde, xt, t):
        seen.append(t)
        return true(model, sde, xt, t)

    monkeypatch.setattr(score_based, "network_eps", spy)
    trained(score_based, tmp_path, "--batch_size", "64", "--preview_every", "100", "--weighting", "simple")
    t = torch.cat(seen)
    assert len(t) == 6 * 64 and t.min() < 0.02 and 0.98 < t.max() <= 1
    assert abs(t.mean() - 0.5) < 0.06


def pictures_of(module, monkeypatch):
    """The pictures that train hands on, as they come: to its loss, or to the autoencoder's."""
    seen, name = [], "vae_loss" if module is latent else LOSS[module]
    place = {latent: 0, score_based: 2}.get(module, 1)
    true = getattr(module, name)

    def spy(*args, **kwargs):
        seen.append(args[place].detach().clone())
        return true(*args, **kwargs)

    monkeypatch.setattr(module, name, spy)
    return seen


@pytest.mark.slow
@every_script
def test_training_sees_the_training_pictures_and_no_other(module, tmp_path, monkeypatch):
    seen, data = pictures_of(module, monkeypatch), toy()
    trained(module, tmp_path, data=data)
    tolerance = 1.5 / 128 if module is score_based else 1e-6  # dequantised within its bin
    for x in torch.cat(seen):
        gap = (data.train - x).abs().flatten(1).amax(1)
        assert gap.min() < tolerance
        assert (data.test - x).abs().flatten(1).amax(1).min() > tolerance
    assert torch.unique(torch.cat(seen).flatten(1), dim=0).shape[0] > 8  # not one alone


@pytest.mark.slow
@every_script
def test_pictures_are_mirrored_left_to_right(module, tmp_path, monkeypatch):
    seen, data = pictures_of(module, monkeypatch), toy()
    dequantised = ("--no-dequantize",) if module is score_based else ()
    trained(module, tmp_path, "--flip", "--batch_size", "16", *dequantised, data=data)
    mirrored = [0, 0]
    for x in torch.cat(seen):
        same = (data.train - x).abs().flatten(1).amax(1).min() < 1e-6
        other = (data.train - x.flip(2)).abs().flatten(1).amax(1).min() < 1e-6
        assert same or other  # flipped upside down it would be neither
        mirrored[int(other)] += 1
    assert min(mirrored) > 0.25 * sum(mirrored)


@pytest.mark.slow
@every_script
def test_previews_leave_the_training_alone(module, tmp_path):
    _, run, often = trained(module, tmp_path / "a", "--preview_every", "1")
    assert run.path("preview.png").stat().st_size > 1000
    _, _, seldom = trained(module, tmp_path / "b", "--preview_every", "100")
    for a, b in zip(often.parameters(), seldom.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@every_script
def test_gradient_checkpointing_trains_the_same(module, tmp_path):
    argv = ("--dropout", "0.2", "--steps", "3")
    _, _, plain = trained(module, tmp_path / "a", *argv)
    _, _, saving = trained(module, tmp_path / "b", *argv, "--grad_checkpointing")
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)


class Stop(Exception):
    """Ends main once the test has seen what it came for."""


def drawn(module, monkeypatch, *argv):
    """(network, states, n) that main hands to Run.draw; the rest of main is not run."""
    seen = []

    def spy(run, n, states, network, *rest):
        seen.append((network, states, n))
        raise Stop

    monkeypatch.setattr(Run, "draw", spy)
    monkeypatch.setattr("common.plotting.table", lambda *_, **__: None)
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
@every_script
def test_sample_draws_by_the_average_in_eval_mode(module, smoke_runs, tmp_path, monkeypatch):
    state = torch.load(smoke_runs[module] / "checkpoint.pt", weights_only=True)
    network, _, n = drawn(module, monkeypatch, "--sample", smoke_runs[module], "--n_samples", 3,
                          "--out", tmp_path)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    for name, value in network.state_dict().items():
        assert torch.equal(value, state["ema"][name])
    assert any(not torch.equal(state["ema"][k], state["model"][k]) for k in state["model"])
    assert n == 3


@pytest.mark.slow
@every_script
def test_a_fresh_run_draws_by_what_it_trained(module, tmp_path, monkeypatch):
    network, _, _ = drawn(module, monkeypatch, "--preset", "smoke", "--steps", "2", "--out", tmp_path)
    state = torch.load(next((tmp_path / script_name(module)).glob("*/checkpoint.pt")),
                       weights_only=True)
    assert not network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, state["ema"][name])


FLAGS = [  # script, flags, the generator that must see them, what it must see
    (ddpm, ["--variance", "beta"], "reverse_process", {"variance": "beta", "clip_x0": True}),
    (ddpm, ["--no-clip_x0"], "reverse_process", {"clip_x0": False, "variance": "beta_tilde"}),
    (ddpm, ["--temperature", 0.3], "reverse_process", {"temperature": 0.3}),
    (ddim, ["--S", 7, "--eta", 0.5], "ddim_process", {"S": 7, "eta": 0.5, "step": "ddim_step"}),
    (ddim, ["--spacing", "quadratic"], "ddim_process", {"spacing": "quadratic", "eta": 0.0}),
    (ddim, ["--sigma_hat", "--eta", 1], "ddim_process", {"step": "sigma_hat_step", "eta": 1.0}),
    (ddim, ["--no-clip_x0"], "ddim_process", {"clip_x0": False}),
    (latent, ["--S", 6, "--eta", 0.25], "ddim_process", {"S": 6, "eta": 0.25, "clip_x0": False}),
    (latent, ["--spacing", "quadratic"], "ddim_process", {"spacing": "quadratic"}),
    (latent, ["--temperature", 0.3], "ddim_process", {"temperature": 0.3}),
    (conditional, ["--S", 6, "--eta", 0.5, "--spacing", "quadratic"], "ddim_process",
     {"S": 6, "eta": 0.5, "spacing": "quadratic", "clip_x0": True}),
    (conditional, ["--temperature", 0.3], "ddim_process", {"temperature": 0.3}),
    (conditional, ["--temperature", 0.3, "--sampler", "ancestral"], "reverse_process", {"temperature": 0.3}),
    (conditional, ["--no-clip_x0"], "ddim_process", {"clip_x0": False}),
    (conditional, ["--sampler", "ancestral", "--variance", "beta"], "reverse_process",
     {"variance": "beta", "clip_x0": True}),
    (conditional, ["--w_samples", 3.5, "--guidance", "none"], "guided_process",
     {"w": 3.5, "guidance": "none"}),
    (score_based, ["--sampler", "em", "--N", 4, "--no-denoise"], "sde_process",
     {"steps": 4, "denoise": False}),
    (score_based, ["--snr", 0.3, "--corrector_steps", 2], "sde_process",
     {"snr": 0.3, "corrector_steps": 2, "predictor": "reverse_diffusion_step"}),
    (score_based, ["--sampler", "rk45", "--tolerance", 0.2], "ode_process",
     {"method": "rk45", "tolerance": 0.2}),
    (score_based, ["--sampler", "rk4", "--N", 12], "ode_process", {"method": "rk4", "steps": 3}),
]


@pytest.mark.slow
@pytest.mark.parametrize("module, flags, generator, wanted", FLAGS, ids=lambda v: (
    script_name(v) if v in MODULES else " ".join(map(str, v)) if isinstance(v, list) else ""))
def test_every_sampling_flag_reaches_the_sampler(module, flags, generator, wanted, smoke_runs,
                                                 tmp_path, monkeypatch):
    seen, true = [], getattr(module, generator)

    def spy(*args, **kwargs):
        bound = inspect.signature(true).bind(*args, **kwargs)
        bound.apply_defaults()
        seen.append(bound.arguments)
        return true(*args, **kwargs)

    monkeypatch.setattr(module, generator, spy)
    _, states, _ = drawn(module, monkeypatch, "--sample", smoke_runs[module], "--out", tmp_path, *flags)
    end = list(states(range(2)))[-1]
    assert end[0] == 0 or "--no-denoise" in flags
    for name, value in wanted.items():
        found = seen[0][name]
        assert getattr(found, "__name__", found) == value, (name, found)


@pytest.mark.slow
@every_script
def test_states_start_from_noise_and_end_with_samples(module, smoke_runs, tmp_path, monkeypatch):
    _, states, _ = drawn(module, monkeypatch, "--sample", smoke_runs[module], "--out", tmp_path)
    every = list(states(range(64)))
    ts = [t for t, _ in every]
    assert ts == sorted(ts, reverse=True) and ts[0] == {score_based: 1.0, latent: 50}.get(module, 20)
    assert abs(every[0][1].std() - module.Config.temperature) < 0.05 and every[-1][0] == 0
    shape = (1, 32, 32) if module is latent else (1, 28, 28)
    assert every[-1][1].shape == (64, *shape)
    assert not torch.equal(every[0][1][0], every[0][1][1])


@pytest.mark.slow
@pytest.mark.parametrize("module, generator", [(ddpm, "reverse_process"), (ddim, "ddim_process")])
def test_samples_are_drawn_with_eps_scaled_and_the_rest_is_the_network(module, generator, smoke_runs,
                                                                       tmp_path, monkeypatch):
    seen, true = [], getattr(module, generator)
    monkeypatch.setattr(module, generator, lambda model, *args, **how: (
        seen.append(model), true(model, *args, **how))[1])
    network, states, _ = drawn(module, monkeypatch, "--sample", smoke_runs[module], "--out", tmp_path,
                               "--eps_scale", 1.5)
    next(states(range(2)))
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 9])
    assert_close(seen[0](x, t), 1.5 * network(x, t))
    assert module.Config().eps_scale > 1 == module.PRESETS["paper"].eps_scale


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
def test_the_temperature_scales_the_starting_noise(module, smoke_runs, tmp_path, monkeypatch):
    """The papers' is 1; what it does to the other noise is tested with the samplers."""
    _, states, _ = drawn(module, monkeypatch, "--sample", smoke_runs[module], "--temperature", 0.5, "--out", tmp_path)
    _, xT = next(states(range(64)))
    assert abs(xT.std() - 0.5) < 0.03
    assert all(cfg.temperature == 1 for name, cfg in module.PRESETS.items() if name in ("paper", "ddpmpp", "ncsnpp"))


@pytest.mark.slow
@every_script
def test_main_measures_the_samples_it_drew(module, smoke_runs, tmp_path, monkeypatch):
    """metrics.json and samples.png are of the drawn samples; --evaluate draws as many as it says."""
    scored, glanced = [], []
    monkeypatch.setattr(metrics, "quality", lambda x, data, labels=None: (
        scored.append((x, labels)) or {"frechet_distance": 1.0, "frechet_distance_of_held_out": 1.0,
                                       "accuracy": 0.5, "accuracy_of_held_out": 1.0, "recall": 0.5}))
    monkeypatch.setattr(metrics, "glance", lambda x, data, labels=None: (
        glanced.append((x, labels)) or {"legible": 0.25}))
    monkeypatch.setattr(score_based, "measure_samplers", lambda *args: {})
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
def test_one_class_may_be_drawn_and_scored_more_often_than_drawn(smoke_runs, tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(metrics, "quality", lambda x, data, labels=None: scored.append(labels) or {
        "frechet_distance": 1.0, "frechet_distance_of_held_out": 1.0, "accuracy": 0.5,
        "accuracy_of_held_out": 1.0, "recall": 0.5})
    conditional.main(["--sample", str(smoke_runs[conditional]), "--classes", "3", "--n_samples", "2",
                      "--evaluate", "12", "--classifier_steps", "2", "--out", str(tmp_path)])
    assert scored[0].tolist() == [3] * 12


@pytest.mark.slow
@every_script
@pytest.mark.parametrize("drawing", ["uniform", "logit_normal"])
def test_t_is_drawn_as_the_setting_says(module, drawing, tmp_path, monkeypatch):
    name, flag = ("draw_times", "weighting") if module is score_based else ("draw_t", "drawing")
    if module is score_based:
        drawing = {"uniform": "simple"}.get(drawing, drawing)
    asked, given, true, loss = [], [], getattr(module, name), getattr(module, LOSS[module])

    def draw(*args):
        asked.append((args, true(*args)))
        return asked[-1][1]

    def watch(*args, **kwargs):
        if module is not score_based:
            given.append(args[3])
        return loss(*args, **kwargs)

    monkeypatch.setattr(module, name, draw)
    monkeypatch.setattr(module, LOSS[module], watch)
    monkeypatch.setattr(module, "figure_preview", lambda *args: None)
    cfg, _, _ = trained(module, tmp_path, f"--{flag}", drawing)
    assert len(asked) == cfg.steps
    for (first, second, third), t in asked:
        n, T = (second, cfg.batch_size) if module is score_based else (first, second)
        assert third == drawing and n == cfg.batch_size and T in (cfg.batch_size, getattr(cfg, "T", None))
        assert module is score_based or any(torch.equal(t, each) for each in given)
    assert getattr(module.Config(), flag) == "logit_normal"
    for preset, config in module.PRESETS.items():
        paper = preset not in ("laptop", "smoke")
        assert getattr(config, flag) == (
            ("simple" if module is score_based else "uniform") if paper else "logit_normal")


# The networks


def skips_of(model):
    """The modules whose outputs the U-Net keeps for its way up."""
    return [model.conv_in, *(m[0] if isinstance(m, torch.nn.ModuleList) else m for m in model.down)]


@every_script
def test_every_skip_of_the_unet_reaches_its_output(module):
    torch.manual_seed(0)
    model = module.UNet(1, 8, 8, (1, 2), 1, (4,), 1, 4, 0.0)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    model, x, t = model.eval(), torch.randn(1, 1, 8, 8), torch.tensor([3])
    joined, true = [], torch.cat

    def spy(tensors, dim=0):
        if dim == 1 and len(tensors) == 2 and tensors[0].ndim == 4:
            joined.append(tensors)
            tensors = (tensors[0], tensors[1].requires_grad_())
            joined[-1] = tensors
        return true(tensors, dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", spy)
        out = model(x, t)
    assert len(joined) == len(skips_of(model)) == 4
    gradients = torch.autograd.grad(out.square().sum(), [skip for _, skip in joined])
    assert all(g.abs().max() > 1e-6 for g in gradients)
    assert all(skip.abs().max() > 1e-6 for _, skip in joined)


@every_script
def test_unet_takes_oblong_pictures_and_float64(module):
    model = module.UNet(1, 8, 8, (1, 2), 1, (4,), 1, 4, 0.0).double().eval()
    x = torch.randn(2, 1, 8, 12, dtype=torch.float64)
    out = model(x, torch.tensor([3, 7]))
    assert out.shape == x.shape and out.dtype == torch.float64
