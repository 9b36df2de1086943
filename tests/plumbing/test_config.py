"""Every field of every page's Config reaches the places that it is for, and no others.

A run of main is recorded: what it hands to its networks, its loss, its optimiser, its sampler and its
data set. A row of the table changes one field and names what then differs from the record before. A page needs no
row for a field that it reads only in functions that are DDPM's to the letter.
"""

import contextlib
import dataclasses
import functools
import inspect
import re
from fnmatch import fnmatch
from functools import partial

import common.data
import conditional_diffusion_example as conditional
import ddim_example as ddim
import ddpm_example as ddpm
import flow_matching_example as flow
import latent_diffusion_example as latent
import score_based_diffusion_example as score_based
from common import plotting, quality
from common.data import POINTS, Data
from common.run import Run

import pytest
import torch
from conftest import only_run, script_name, spied
from torch.optim.optimizer import register_optimizer_step_pre_hook

pytestmark = pytest.mark.slow  # the file as a whole

PAGES = (ddpm, ddim, latent, conditional, score_based, flow)
BASE = dict.fromkeys(PAGES, "--preset smoke --device cpu --steps 3")
BASE[latent] += " --image_size 16"
BASE[score_based] += " --tolerance 0.5"
BASE[flow] += " --p_uncond 0.5"
getsource = functools.cache(inspect.getsource)
BLOCKS = ("ResBlock", "VAEBlock", "DiTBlock")

# What is recorded. Of these functions the arguments: "model.draw_t.n" is the n of draw_t in the training loop.
FUNCTIONS = (
    "ddpm_loss", "v_loss", "vae_loss", "score_loss", "draw_t", "draw_times", "drop_labels", "dequantize",
    "figure_preview", "reverse_process", "ddim_process", "sigma_hat_process", "guided_process", "cfg_eps",
    "classifier_guided_eps", "sde_process", "ode_process", "score_fn", "bits_per_dim",
    "log_likelihood", "cfm_loss", "draw_time", "ot_coupling", "reflow_pairs", "velocity_fn", "scaled_noise",
    "flow_process")
NETWORKS = ("UNet", "DiT", "VAE", "ScoreMLP", "VelocityMLP", "VPrediction", "EMA")


def data_of(record, name, size=0):
    """Ten 8-bit pictures of two classes, or ten points; nobody looks at them."""
    record("load.name", name)
    record("load.size", size)
    if name in POINTS:
        return Data(name, torch.randn(10, 2), torch.randn(10, 2))
    shape = 20, 3 if name == "color_digits" else 1, size or 28, size or 28
    pixels = torch.randint(256, shape, generator=torch.Generator().manual_seed(0))
    x, y = pixels / 127.5 - 1, torch.arange(10) % 2
    return Data(name, x[:10], x[10:], y, y, ("even", "odd"))


def described(argument, value):
    """A value as something that can be compared, or None where it has no place in a record."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "betas"):
        return value.betas.tolist()
    if isinstance(value, (score_based.SDE, flow.Path)):
        return type(value).__name__, vars(value)
    if isinstance(value, list):
        return [described(argument, each) for each in value]
    if isinstance(value, partial) and argument == "correctors":
        return value.keywords
    if inspect.isfunction(value) and argument == "predictor":
        return value.__name__
    if isinstance(value, torch.Tensor) and argument in ("x", "x0", "xT"):
        return value.shape
    if isinstance(value, torch.Tensor) and argument in ("w", "alpha_bars"):
        return value.tolist()
    return None


def facts(network):
    """What a network is made of, whatever its Config says."""
    modules = [(type(module).__name__, module) for module in network.modules()]
    return {
        "weights": [tuple(p.shape) for p in network.parameters()],
        "blocks": sum(name in BLOCKS for name, _ in modules),
        "attentions": sum(name == "Attention" for name, _ in modules),
        "downs": sum(name == "Downsample" for name, _ in modules),
        "groups": {m.num_groups for name, m in modules if name == "GroupNorm"},
        "heads": {m.heads for _, m in modules if hasattr(m, "heads")},
        "dropout": {m.p for name, m in modules if name == "Dropout"},
        "patch": getattr(network, "patch", None)}


def encode(vae, x):
    """In place of the VAE's own, which takes a while."""
    z = x[:, :1, ::vae.factor, ::vae.factor].repeat(1, vae.decoder[0].in_channels, 1, 1)
    return z * next(vae.parameters()).mean(), z


def decode(vae, z):
    x = z[:, :1].repeat(1, vae.conv_out.out_channels // vae.patch**2, 1, 1) * next(vae.parameters()).mean()
    return x.repeat_interleave(vae.factor, 2).repeat_interleave(vae.factor, 3)


@contextlib.contextmanager
def recording(page):
    """Record what runs of the page in this block hand over: {place: values in their order, each once}."""
    found, loop, sampler = {}, [""], {}

    def record(place, value):
        values = found.setdefault(loop[0] + place, [])
        if value not in values:
            values.append(value)

    def arguments(given, result, name):
        if name in ("sigma_hat_process", "ddim_process", "reverse_process", "sde_process"):
            sampler.update(given)
        if name == "reflow_pairs":
            record("reflow_pairs.pairs", result[0].shape)
        for argument, value in given.items():
            if argument == "y" and (name == "guided_process" or name == "velocity_fn" and not loop[0]):
                record(f"{name}.y", None if value is None else value.tolist())
            elif (value := described(argument, value)) is not None:
                record(f"{name}.{argument}", value)

    def steps(run, count, name="model", *args, **parts):
        loop[0] = f"{name}."
        record("steps", count)
        yield from true_steps(run, count, name, *args, **parts)
        loop[0] = ""

    def step(optimizer, *_):
        found.setdefault(f"{loop[0]}lr", []).append(optimizer.param_groups[0]["lr"])
        record("weight_decay", optimizer.param_groups[0]["weight_decay"])

    def batch(given, drawn):
        pool = given["x"].flatten(1)
        record("pool", len(pool))
        record("mirrored", not all((pool == x.flatten()).all(1).any() for x in drawn[0]))

    def draw(run, n, states, network, steps, batch_size=100):
        record("draw.n", n)
        record("draw.steps", steps)
        for t, x in states(range(n)):
            pass
        record("draw.last_t", t)
        if hasattr(run.cfg, "eps_scale"):
            t = torch.full((n,), 2)
            ratio = sampler["model"](sampler["xT"], t) / network(sampler["xT"], t)
            record("eps_scale", round(ratio.median().item(), 4))
        return x, {}

    true_steps = Run.steps
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as ended:
        ended.callback(register_optimizer_step_pre_hook(step).remove)
        for name in FUNCTIONS:
            if hasattr(page, name):
                spied(patch, page, name, partial(arguments, name=name))
        for name in NETWORKS:
            if hasattr(page, name):
                def made(given, _, name=name):
                    self = given.pop("self")
                    if name in ("EMA", "VPrediction"):
                        arguments(given, _, name)
                    else:
                        for fact, value in facts(self).items():
                            record(f"{name}.{fact}", value)
                spied(patch, getattr(page, name), "__init__", made)
        spied(patch, torch.nn.utils, "clip_grad_norm_", lambda given, _: record("max_norm", given["max_norm"]))
        spied(patch, Run, "batch", batch)
        patch.setattr(Run, "steps", steps)
        patch.setattr(Run, "draw", draw)
        patch.setattr(quality, "glance", lambda *_: {})
        load = "load_data" if page in (score_based, flow) else "load_images"
        patch.setattr(page, load, partial(data_of, record))
        for name in {"UNet", "DiT", "ScoreMLP", "VelocityMLP"} & set(vars(page)):
            patch.setattr(getattr(page, name), "forward", lambda self, x, t, y=None: next(self.parameters()).mean() * x)
        if page is latent:
            patch.setattr(page.VAE, "encode", encode)
            patch.setattr(page.VAE, "decode", decode)
        for name in ("figure_samplers", "figure_steps"):
            patch.setattr(page, name, lambda *_: None, raising=False)
        for name, draws in list(vars(plotting).items()):
            if hasattr(draws, "__wrapped__") and name[0] != "_":
                patch.setattr(plotting, name, lambda *_, **__: None)
        yield found


# The table: field, another value, all places whose record this changes ("*" as in file names; a page may lack
# some), and flags of both runs where the field counts only with these; RUN is a run with the flags of BASE.

SHARED = [
    ("T", 30, "*schedule *alpha_bars *draw_t.T"),
    ("schedule", "cosine", "*schedule *alpha_bars"),
    ("beta_1", 0.001, "*schedule *alpha_bars"),
    ("beta_T", 0.03, "*schedule *alpha_bars"),
    ("dataset", "color_digits", "load.name *.x *.x0 *.xT UNet.weights"),
    ("image_size", 16, "load.size *.x *.x0 *.xT UNet.weights UNet.attentions"),
    ("dequantize", False, "model.dequantize.x"),
    ("flip", True, "*mirrored"),
    ("channels", 16, "UNet.weights"),
    ("mults", (1,), "UNet.weights UNet.blocks UNet.downs UNet.attentions"),
    ("blocks", 2, "UNet.weights UNet.blocks UNet.attentions"),
    ("attention", (7, 14), "UNet.weights UNet.attentions"),
    ("heads", 2, "UNet.heads"),
    ("groups", 2, "*.groups"),
    ("dropout", 0.5, "UNet.dropout"),
    ("patch", 1, "UNet.patch UNet.weights UNet.attentions"),
    ("drawing", "uniform", "model.draw_t*.drawing"),
    ("steps", 4, "model.steps model.lr"),
    ("batch_size", 4, "vae.vae_loss.x model.*_loss.x0 model.draw_t*.n model.dequantize.x"),
    ("lr", 0.003, "model.lr"),
    ("warmup", 3, "*lr"),
    ("decay", "constant", "*lr"),
    ("weight_decay", 0.1, "model.weight_decay"),
    ("grad_clip", 2.0, "model.max_norm"),
    ("ema", 0.9, "EMA.decay"),
    ("preview_every", 2, "model.figure_preview.step"),
]
SAMPLING = {  # these are drawn with --sample, from one checkpoint
    ddpm: [
        ("variance", "beta", "reverse_process.variance"),
        ("clip_x0", False, "reverse_process.clip_x0"),
        ("eps_scale", 0.9, "eps_scale"),
        ("n_samples", 3, "draw.n reverse_process.xT"),
    ],
    ddim: [
        ("S", 4, "ddim_process.S draw.steps"),
        ("S", 4, "sigma_hat_process.S draw.steps", "--sigma_hat --eta 1"),
        ("eta", 0.5, "ddim_process.eta"),
        ("spacing", "quadratic", "ddim_process.spacing"),
        ("spacing", "quadratic", "sigma_hat_process.spacing", "--sigma_hat --eta 1"),
        ("sigma_hat", True, "sigma_hat_process.* ddim_process.*", "--eta 1"),
        ("clip_x0", False, "ddim_process.clip_x0"),
        ("clip_x0", False, "sigma_hat_process.clip_x0", "--sigma_hat --eta 1"),
        ("eps_scale", 0.9, "eps_scale"),
        ("n_samples", 3, "draw.n ddim_process.xT"),
    ],
    latent: [
        ("S", 4, "ddim_process.S draw.steps"),
        ("eta", 0.5, "ddim_process.eta"),
        ("spacing", "quadratic", "ddim_process.spacing"),
        ("eps_scale", 0.9, "eps_scale"),
        ("n_samples", 3, "draw.n ddim_process.xT"),
    ],
    conditional: [
        ("guidance", "none", "cfg_eps.*"),
        ("guidance", "classifier", "cfg_eps.* classifier_guided_eps.* classifier.* ddim_process.clip_x0"),
        ("classes", ("odd",), "draw.n *.y *.xT *.w"),  # and grid.png is drawn
        ("w", (0.5, 4.0), "*.w", "--classes 0"),
        ("w_samples", 3.0, "*.w"),
        ("classifier_steps", 3, "classifier.steps classifier.lr", "--guidance classifier"),
        ("sampler", "ancestral", "ddim_process.* reverse_process.* draw.steps"),
        ("S", 4, "ddim_process.S draw.steps"),
        ("eta", 0.5, "ddim_process.eta"),
        ("spacing", "quadratic", "ddim_process.spacing"),
        ("variance", "beta", "reverse_process.variance", "--sampler ancestral"),
        ("clip_x0", False, "ddim_process.clip_x0"),
        ("clip_x0", False, "reverse_process.clip_x0", "--sampler ancestral"),
        ("n_samples", 3, "draw.n *.y *.xT"),
    ],
    score_based: [
        ("sampler", "em", "sde_process.predictor sde_process.correctors"),
        ("N", 4, "draw.steps sde_process.steps"),
        ("N", 8, "draw.steps ode_process.steps", "--sampler rk4"),
        ("predictor", "flow", "sde_process.predictor"),
        ("corrector_steps", 2, "sde_process.correctors"),
        ("snr", 0.05, "sde_process.correctors"),
        ("tolerance", 0.05, "ode_process.tolerance bits_per_dim.tolerance log_likelihood.tolerance",
         "--sampler rk45"),
        ("denoise", False, "draw.last_t"),
        ("clip_x0", False, "score_fn.clip_x0"),
        ("std_floor", 0.1, "score_fn.std_floor"),
        ("likelihood", 3, "bits_per_dim.x log_likelihood.x dequantize.x"),
        ("n_samples", 3, "draw.n sde_process.xT"),
    ],
    flow: [
        ("sampler", "heun", "flow_process.sampler"),
        ("S", 4, "flow_process.S draw.steps"),
        ("tolerance", 0.05, "flow_process.tolerance bits_per_dim.tolerance log_likelihood.tolerance"),
        ("noise_scale", 1.2, "scaled_noise.scale"),
        ("classes", ("odd",), "velocity_fn.y"),
        ("w", 3.0, "velocity_fn.w"),
        ("likelihood", 3, "bits_per_dim.x log_likelihood.x dequantize.x"),
        ("n_samples", 3, "draw.n flow_process.x velocity_fn.y"),
    ],
}
OWN = {
    ddpm: [
        ("T", 30, "*schedule *draw_t.T draw.steps"),
    ],
    ddim: [],
    latent: [
        ("T", 60, "*schedule *draw_t.T"),
        ("schedule", "scaled_linear", "*schedule"),
        ("beta_T", 0.015, "*schedule"),
        ("dataset", "color_digits", "load.name *.x VAE.weights"),
        ("image_size", 32, "load.size *.x *.x0 *.xT UNet.weights"),
        ("mults", (1, 2, 2), "UNet.weights UNet.blocks UNet.downs"),
        ("patch", 2, "UNet.patch UNet.weights UNet.attentions"),
        ("vae", "a run", "vae.*"),
        ("factor", 2, "VAE.weights VAE.blocks VAE.downs UNet.weights *.x0 *.xT"),
        ("z_channels", 2, "VAE.weights UNet.weights *.x0 *.xT"),
        ("vae_channels", 16, "VAE.weights"),
        ("vae_blocks", 2, "VAE.weights VAE.blocks"),
        ("vae_patch", 4, "VAE.weights VAE.patch VAE.blocks VAE.downs"),
        ("kl_weight", 0.1, "vae.vae_loss.kl_weight"),
        ("reconstruction", "l1", "vae.vae_loss.reconstruction"),
        ("vae_steps", 5, "vae.steps vae.lr"),
        ("vae_lr", 0.003, "vae.lr"),
        ("flip", True, "vae.mirrored model.pool"),
    ],
    conditional: [
        ("predict", "eps", "VPrediction.* model.*_loss.*"),
        ("p_uncond", 0.3, "model.drop_labels.p_uncond"),
        ("backbone", "dit", "UNet.* DiT.*"),
        ("dit_width", 32, "DiT.weights", "--backbone dit"),
        ("dit_depth", 3, "DiT.weights DiT.blocks", "--backbone dit"),
        ("dit_heads", 4, "DiT.heads", "--backbone dit"),
        ("dit_patch", 2, "DiT.patch DiT.weights", "--backbone dit"),
        ("dit_kernel", 1, "DiT.weights", "--backbone dit"),
        ("dropout", 0.5, "DiT.dropout", "--backbone dit"),
    ],
    score_based: [
        ("sde", "subvp", "*sde"),
        ("beta", "cosine", "*sde"),
        ("beta_min", 0.2, "*sde"),
        ("beta_max", 10.0, "*sde"),
        ("sigma_min", 0.03, "*sde", "--sde ve"),
        ("sigma_max", 50.0, "*sde", "--sde ve"),
        ("hidden", 32, "ScoreMLP.weights", "--dataset gaussians"),
        ("layers", 3, "ScoreMLP.weights", "--dataset gaussians"),
        ("weighting", "likelihood", "model.draw_times.weighting model.score_loss.weighting"),
    ],
    flow: [
        ("path", "vp", "*.path *.t_end draw.last_t"),
        ("sigma_min", 0.1, "*.path"),
        ("beta_min", 0.2, "*.path", "--path vp"),
        ("beta_max", 10.0, "*.path", "--path vp"),
        ("coupling", "ot", "model.ot_coupling.x0"),
        ("reflow", "RUN", "reflow_pairs.pairs model.pool model.dequantize.x flow_process.x velocity_fn.y"),
        ("pairs", 12, "reflow_pairs.pairs model.pool flow_process.x velocity_fn.y", "--reflow RUN"),
        ("p_uncond", 0.3, "model.drop_labels.p_uncond"),
        ("hidden", 32, "VelocityMLP.weights", "--dataset gaussians --p_uncond 1"),
        ("layers", 3, "VelocityMLP.weights", "--dataset gaussians --p_uncond 1"),
    ],
}


# Where an old value rightly stays beside the new one: rates of other steps, noises and labels of figures, the
# grid's and the samples' w, and the likelihood, which is never clamped
MIXED = ("*lr", "*.xT", "flow_process.x", "velocity_fn.y", "*.w", "score_fn.clip_x0")


def read_as_by_ddpm(page, field):
    """Whether all functions of a page that read a field are DDPM's to the letter."""
    readers = [name for name, value in vars(page).items() if inspect.isfunction(value)
               and value.__module__ == page.__name__ and re.search(rf"\bcfg\.{field}\b", getsource(value))]
    return page is not ddpm and readers != [] and all(
        hasattr(ddpm, name) and getsource(vars(page)[name]) == getsource(vars(ddpm)[name]) for name in readers)


def rows_of(page):
    """The rows of a page: its own, and the shared ones of fields that it reads by itself, without a row of its own."""
    rows = SAMPLING[page] + OWN[page]
    named = [field for field, *_ in rows if field != "dropout"]
    fields = [field.name for field in dataclasses.fields(page.Config)]
    return rows + [row for row in SHARED if row[0] in fields and row[0] not in named
                   and not read_as_by_ddpm(page, row[0])]


@pytest.fixture(scope="module")
def record_of(tmp_path_factory):
    """record_of(page, flags): the record of main, made once."""
    made = {}

    def run(page, flags):
        if (page, flags) not in made:
            out = tmp_path_factory.mktemp(script_name(page))
            with pytest.MonkeyPatch.context() as patch, recording(page) as found:
                patch.setattr(common.data, "CACHE", out / "cache")
                if flags != BASE[page]:
                    patch.setattr(torch, "save", lambda *_: None)  # nobody samples this run
                page.main([*flags.split(), "--out", str(out)])
            made[page, flags] = found, only_run(out, script_name(page))
        return made[page, flags]

    return run


@pytest.mark.parametrize("page", PAGES, ids=script_name)
def test_every_field_has_a_row(page):
    """A new field needs one: it says what the field is for."""
    fields = {field.name for field in dataclasses.fields(page.Config)}
    shared = {field for field, *_ in SHARED if field in fields and read_as_by_ddpm(page, field)}
    assert fields == {field for field, *_ in rows_of(page)} | shared
    assert set(page.SAMPLING) == {field for field, *_ in SAMPLING[page]}


@pytest.mark.parametrize("page, field, value, places, flags", [
    pytest.param(page, *row, *[""] * (4 - len(row)), id=f"{script_name(page)}-{row[0]}")
    for page in PAGES for row in rows_of(page)])
def test_a_field_changes_what_it_is_for_and_nothing_else(page, field, value, places, flags, record_of):
    if "RUN" in (value, *flags.split()):
        run = str(record_of(page, BASE[page])[1])
        value, flags = run if value == "RUN" else value, flags.replace("RUN", run)
    base = f"{BASE[page]} {flags}".strip()
    if field in page.SAMPLING:
        base = f"--sample {record_of(page, BASE[page])[1]} --device cpu {flags}".strip()
    if field == "vae":
        value = record_of(page, base)[1]
    flag = {True: f"--{field}", False: f"--no-{field}"}.get(value) if isinstance(value, bool) else (
        f"--{field} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    before, after = record_of(page, base)[0], record_of(page, f"{base} {flag}")[0]
    changed = {place for place in before | after if before.get(place) != after.get(place)}
    named = {place for place in before | after if any(fnmatch(place, pattern) for pattern in places.split())}
    assert changed == named != set()
    for place in named:
        if not any(fnmatch(place, pattern) for pattern in MIXED):
            left = [value for value in before.get(place, []) if value in after.get(place, [])]
            assert not left, f"{place} has the old value, too"
