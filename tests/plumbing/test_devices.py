"""The device: what auto takes, random states, launch; and no page mixes devices or takes float64 to one.

A device without a GPU: tensors on torch's "meta" device, which have shapes and no numbers, under a
dispatch mode that does what "meta" does not: it refuses two devices in one operation, as CUDA
does, and float64, as MPS does; a copy to the CPU gives numbers, none of them computed.
"""

import ast
import importlib
import re

import conditional_diffusion_example as conditional
import ddim_example as ddim
import ddpm_example as ddpm
import flow_matching_example as flow
import latent_diffusion_example as latent
import score_based_diffusion_example as sb
from common import data, device, plotting
from common import run as runs
from common.cli import Mistake
from common.device import Launch

import pytest
import scipy.integrate
import torch
import torch.fx.experimental._config
from conftest import ROOT, awake
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import Config, fit, images, open_toy

import controllable
import ncsnpp
import series

pytestmark = pytest.mark.slow  # the file as a whole

CPU, META = torch.device("cpu"), torch.device("meta")
NCSNPP = ("fir", "skip_rescale", "biggan", "progressive_input")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}


# The choice of a device


@pytest.mark.parametrize("present, chosen", [
    (("cuda", "mps"), "cuda"), (("mps",), "mps"), ((), "cpu")])
def test_auto_takes_cuda_before_mps_before_the_cpu(present, chosen, tmp_path, monkeypatch):
    """A run without --device, or with auto, and what torchrun's fourth process on a machine of two GPUs takes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in present)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in present)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name, kind in ((None, chosen), ("auto", chosen), ("cpu", "cpu")):
        assert open_toy(tmp_path, device=name)[1].device.type == kind
    for name in {"cuda", "mps"} - set(present):
        with pytest.raises(Mistake, match=f"--device {name}: must be one of auto, .*cpu"):
            open_toy(tmp_path, device=name)
    monkeypatch.setattr(device, "torchrun", lambda: (0, 1, 3))
    where = device.launch().device
    assert where.index == (1 if chosen == "cuda" else None) and (where in taken) == (chosen == "cuda")


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_seeded_draws_leave_the_others_alone(kind, monkeypatch):
    """Also the generator of a GPU, here a stand-in."""
    own, where = {"state": torch.tensor([5])}, torch.device(kind)
    for module in (torch.cuda, torch.mps):
        monkeypatch.setattr(module, "get_rng_state", lambda *_: own["state"])
        monkeypatch.setattr(module, "set_rng_state", lambda state, *_: own.update(state=state))
    state = device.random_state(where)
    expected = torch.randn(3)
    device.set_random_state(state, where)
    inside = []
    for _ in range(2):
        with device.seeded(5, where):
            inside.append(torch.randn(3))
            own["state"] = torch.tensor([6])
        assert own["state"].item() == (6 if kind == "cpu" else 5)
    assert torch.equal(*inside) and torch.equal(torch.randn(3), expected)


# Several processes


@pytest.mark.parametrize("values", ["RANK=abc WORLD_SIZE=2 LOCAL_RANK=0", "RANK=1", "WORLD_SIZE=2",
                                    "RANK=0 WORLD_SIZE=0 LOCAL_RANK=0", "RANK=2 WORLD_SIZE=2 LOCAL_RANK=0"])
def test_variables_of_torchrun_that_do_not_fit(values, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for value in values.split():
        monkeypatch.setenv(*value.split("="))
    with pytest.raises(Mistake, match=f"^{values}: .*RANK below WORLD_SIZE"):
        open_toy(tmp_path)


def test_each_process_draws_its_part_of_the_batch_and_only_the_first_one_writes(tmp_path, monkeypatch):
    opts = open_toy(tmp_path)[1].opts
    for rank in range(2):
        run = runs.Run("toy", Config(), opts, Launch(CPU, rank, 2))
        assert len(run.batch(images().train)[0]) == 4
    for name in ("gather", "average", "broadcast"):  # there is no other process to talk to
        monkeypatch.setattr(run.launch, name, lambda value: value)
    run.add_metrics(a=1)
    fit(run, 2)
    assert run.folder is None and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(device, "launch", lambda name: Launch(CPU, 0, 3))
    with pytest.raises(Mistake, match="batch_size 8: must be a multiple of 3, the number of processes"):
        open_toy(tmp_path)


def test_the_first_process_downloads_before_the_others(monkeypatch):
    """The others wait at a barrier before the download, the first one releases them after it."""
    x, seen = torch.zeros(4, 1, 8, 8), []
    monkeypatch.setattr(device.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(device.dist, "barrier", lambda: seen.append("barrier"))
    monkeypatch.setattr(data, "_downloaded", lambda name: seen.append(name) or data.Data(name, x, x))
    for rank, expected in ((0, ["mnist", "barrier"]), (1, ["barrier", "mnist"])):
        monkeypatch.setattr(device.dist, "get_rank", lambda rank=rank: rank)
        data.load_images("mnist")
        assert seen == expected
        seen.clear()


# Whole runs on a device


class Device(TorchDispatchMode):
    """"meta" as a device like CUDA and MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        there = [a for a in given if a.device == META]
        # a scalar on the CPU may join an operation on any device: torch's own rule
        here = [a for a in given if a.device != META and a.ndim]
        if there and here and func not in COPIES:
            raise RuntimeError(f"{func}: tensors on two devices")
        if there and func is aten._to_copy.default and kwargs.get("device", META) != META:
            values = torch.linspace(-1, 1, there[0].numel()).view(there[0].shape)
            out = values.to(kwargs.get("dtype") or there[0].dtype)
        elif there and func is aten._local_scalar_dense.default:
            out = 1.0 if there[0].dtype.is_floating_point else 1
        elif there and func is aten._unique2.default:  # "meta" cannot know how many there are
            out = tuple(torch.empty(1, dtype=dtype, device=META) for dtype in (there[0].dtype, *2 * [torch.int64]))
        elif there and func is aten.native_group_norm.default:  # a third of the time
            out = torch.empty_like(there[0]), *(torch.empty(args[3], args[6], device=META) for _ in range(2))
        else:
            out = func(*args, **kwargs)
        arrived = [a for a in tree_leaves(out) if isinstance(a, torch.Tensor) and a.device == META]
        copied = given if arrived and func in COPIES else []  # a copy may move before it casts
        for a in (*there, *arrived, *copied):
            if a.dtype == torch.float64:
                raise TypeError(f"{func}: MPS has no float64")
        return out


def assert_there(*tensors, shape=None):
    for x in tensors:
        assert x.device == META and x.dtype == torch.float32
        assert shape is None or x.shape == shape


SMALL = ("--dataset=digits8", "--image_size=8", "--mults=1", "--attention=8", "--channels=4", "--groups=2", "--patch=1",
         "--preset=smoke", "--steps=1", "--preview_every=1")


@pytest.mark.parametrize("page, argv", [
    ("ddpm", ["--T=1"]), ("latent_diffusion", ["--T=1", "--S=1", "--vae_steps=1"]),
    ("conditional_diffusion", ["--T=1", "--S=1", "--guidance=classifier", "--classifier_steps=1", "--n_samples=4"]),
    ("flow_matching", ["--S=1", "--coupling=ot", "--p_uncond=0.5", "--likelihood=0"])])
def test_a_page_runs_on_a_device(page, argv, tmp_path, monkeypatch, drawings):
    """From its first line to its last: training, checkpoint, samples, previews, figures, numbers."""
    def sgd(parameters, *_, **__):  # "meta" has no fused AdamW
        return torch.optim.SGD(parameters, 0.1)

    monkeypatch.setattr(device, "pick_device", lambda name: META)
    for name in ("Adam", "AdamW"):
        monkeypatch.setattr(torch.optim, name, sgd)
    monkeypatch.setattr(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True, raising=False)
    monkeypatch.setattr(runs, "is_finite", lambda module: True)  # takes most of the time here
    monkeypatch.setattr(plotting, "loss_by_t", lambda loss, edges, title: loss(edges[0], edges[1]))
    true_process = flow.flow_process  # one step in place of the 92 of steps.png
    monkeypatch.setattr(flow, "flow_process", lambda v, x, t, end, *_: true_process(v, x, t, end, S=1))
    with Device():
        importlib.import_module(f"{page}_example").main([*SMALL, *argv, f"--out={tmp_path}"])
    assert {"samples.png", "loss.png"} <= set(drawings)


def test_what_no_run_above_calls_stays_on_the_device(monkeypatch):
    monkeypatch.setattr(scipy.integrate, "RK45", scipy.integrate.RK23)  # fewer calls
    x, pictures = torch.randn(2, 2, device=META), torch.randn(2, 3, 2, 2, device=META)
    mask, y = torch.tensor([True, False], device=META), torch.tensor([0, 2], device=META)

    def model(x, t):
        return x + sb.per_example(t, x)

    with Device():
        schedule = ddim.make_schedule("linear", 5).to(META)
        assert_there(ddim.ddim_sample(model, pictures, schedule, 1, 1.0), ddim.slerp(pictures, pictures, 0.5),
                     ddim.ddim_invert(model, pictures, schedule, 1), shape=pictures.shape)
        for kind, sde in (("ve", sb.VESDE()), ("vp", sb.VPSDE()), ("subvp", sb.SubVPSDE())):
            t, density = (part.to(META) for part in sb.draw_times(sde, 2, "likelihood"))
            assert_there(sb.score_loss(model, sde, x, t, torch.randn_like(x), "likelihood", density), shape=())
            score = sb.score_fn(model, sde)
            methods = sb.make_methods(sb.Config(sde=kind, tolerance=0.5), sde, calls=1)
            for name in methods if kind == "ve" else ["Euler–Maruyama", "reverse diffusion", "probability flow"]:
                states = sb.sampling_process(methods[name], score, sde, sde.prior_sampling((2, 2), META))
                assert_there(sb.final(states), shape=(2, 2))
        assert_there(controllable.inpaint(score, sde, pictures, mask, 1),
                     controllable.colorize(score, sde, pictures[:, :1], 1), shape=pictures.shape)
        for trace, probe in (("exact", ""), ("hutchinson", "rademacher"), ("hutchinson", "gaussian")):
            assert_there(sb.log_likelihood(score, sde, x, trace, probe, tolerance=0.5), shape=(2,))
        v = flow.velocity_fn(flow.VelocityMLP(2, 16, 1).to(META))
        for sampler in ("midpoint", "heun", "rk45"):
            there = flow.final(flow.flow_process(v, x, sampler=sampler, S=1, tolerance=0.5))
            assert_there(there, flow.VPPath().predict_x1(x, x, flow.batch_time(0.5, x)), shape=(2, 2))
        for trace in ("exact", "hutchinson"):
            assert_there(flow.log_likelihood(v, x, trace, tolerance=0.5), shape=(2,))
        guided = sb.conditional_score(score, lambda x, t: x.flatten(1)[:, :3] * t[:, None], y)
        assert_there(guided(pictures, torch.ones(2, device=META)), sb.dequantize(pictures), shape=pictures.shape)
        unet = ncsnpp.UNet(1, 8, 8, (1, 2), 1, (4,), 1, 4, 0.0, 1, True, **dict.fromkeys(NCSNPP, True))
        for network, shape in ((sb.ScoreMLP(2, 16, 1, True), (2, 2)), (series.SeriesNet(8, 2, True), (2, 1, 9)),
                               (unet, (2, 1, 8, 8))):
            out = network.to(META)(torch.randn(shape, device=META), torch.ones(2, device=META))
            assert_there(out, shape=shape)


# Sides that differ


SIZES = (1, 8, 8, (1, 2), 1, (4,), 1, 4, 0.0)


@pytest.mark.parametrize("make, turns", [
    (lambda: ddpm.UNet(*SIZES, 1), True), (lambda: conditional.UNet(*SIZES, 1, classes=3), True),
    (lambda: ddpm.UNet(*SIZES, 2), False),  # a patch is ordered by row
    (lambda: conditional.DiT(1, 8, 4, 16, 2, 2, 3), False)])  # its positions tell rows from columns
def test_networks_take_sides_that_differ_and_refuse_what_does_not_divide(make, turns):
    """Turned weights answer turned pictures by the turned answer: neither side is read for the other."""
    network, t, wide = awake(make()), torch.tensor([1, 5]), torch.randn(2, 1, 8, 16)
    found = network(wide, t)
    assert found.shape == wide.shape
    for shape in ((8, 9), (9, 8)):
        with pytest.raises((RuntimeError, ValueError)):
            network(torch.randn(2, 1, *shape), t)
    if turns:
        for p in network.parameters():
            p.data = p.data.mT.clone() if p.ndim == 4 else p.data
        assert_close(network(wide.mT, t).mT, found, rtol=1e-3, atol=1e-3)


def test_a_vae_refuses_what_does_not_divide():
    vae = latent.VAE(1, 4, 3, 8, 1, 4, 2)
    for sides in ((16, 26), (18, 24), (16, 25)):  # else larger pictures come back
        with pytest.raises((RuntimeError, ValueError), match="divi"):
            vae.encode(torch.randn(2, 1, *sides))


def test_float64_is_made_on_the_cpu():
    """.double() comes after .cpu(), and no tensor is made as float64 on a device: MPS has none.

    In the whole text, since no test runs all of it on a device.
    """
    on_the_cpu = {"(torch.cdist(points, centres) <= radius).any(1)"}  # features are numpy arrays

    def offences(text):
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if not re.search("double|float64", "".join(lines[node.lineno - 1:node.end_lineno])):
                continue
            name, receiver = node.func.attr, ast.unparse(node.func.value)
            given = [ast.unparse(value) for value in (*node.args, *(k.value for k in node.keywords))]
            double = name == "double" or {"torch.float64", "torch.double"} & set(given)
            on_a_device = any(k.arg == "device" for k in node.keywords) or name.endswith("_like")
            casts = name in ("double", "to") and (len(given) > 1 or ".cpu()" not in receiver)
            if double and (casts and receiver not in on_the_cpu or on_a_device or name.startswith("new_")):
                yield ast.unparse(node)

    wrong = "x.double().cpu(), x.cpu().to(device, torch.float64), torch.zeros(3, dtype=torch.float64, device=x.device)"
    assert len(list(offences(wrong))) == 3
    for glob in ("*_example.py", "common/*.py", "experiments/*.py"):
        for path in ROOT.glob(glob):
            assert not list(offences(path.read_text())), path.name
