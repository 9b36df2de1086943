"""Nothing meets on two devices, no float64 leaves the CPU; every network takes H != W.

A device without a GPU: tensors on torch's "meta" device, which have shapes and no numbers, under a
dispatch mode that does what "meta" does not: it refuses two devices in one operation, as CUDA
does, and float64, as MPS does; a copy to the CPU gives numbers, none of them computed.
"""

import ast
import functools
import sys

import conditional_diffusion_example as conditional
import ddim_example as ddim
import ddpm_example as ddpm
import latent_diffusion_example as latent
import score_based_diffusion_example as sb

import pytest
import torch
from conftest import ROOT
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.append(str(ROOT / "experiments"))
import controllable  # noqa: E402
import ncsnpp  # noqa: E402
import series  # noqa: E402

SOURCES = [path for glob in ("*_example.py", "common/*.py", "experiments/*.py")
           for path in sorted(ROOT.glob(glob))]
DEVICE = torch.device("meta")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}


class Device(TorchDispatchMode):
    """"meta" as a device like CUDA and MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        there = [a for a in given if a.device == DEVICE]
        # a scalar on the CPU may join an operation on any device: torch's own rule
        here = [a for a in given if a.device != DEVICE and a.ndim]
        if there and here and func not in COPIES:
            raise RuntimeError(f"{func}: tensors on two devices")
        if there and func is aten._to_copy.default and kwargs.get("device", DEVICE) != DEVICE:
            values = torch.linspace(-1, 1, there[0].numel()).view(there[0].shape)
            out = values.to(kwargs.get("dtype") or there[0].dtype)
        elif there and func is aten._local_scalar_dense.default:
            out = 1.0 if there[0].dtype.is_floating_point else 1
        else:
            out = func(*args, **kwargs)
        arrived = [a for a in tree_leaves(out) if isinstance(a, torch.Tensor) and a.device == DEVICE]
        copied = given if arrived and func in COPIES else []  # a copy may move before it casts
        for a in (*there, *arrived, *copied):
            if a.dtype == torch.float64:
                raise TypeError(f"{func}: MPS has no float64")
        return out


@pytest.fixture
def device():
    with Device():
        yield DEVICE


def assert_there(*tensors, shape=None):
    for x in tensors:
        assert x.device == DEVICE and x.dtype == torch.float32
        assert shape is None or x.shape == shape


@pytest.mark.slow  # the first operation under a mode imports much of torch
def test_the_device_refuses_what_cuda_and_mps_refuse(device):
    x, linear = torch.randn(2, 3, device=device), torch.nn.Linear(3, 3)
    for mixed in (lambda: x + torch.ones(2, 3), lambda: linear(x), lambda: torch.cat([x, torch.ones(1, 3)]),
                  lambda: torch.ones(5)[torch.zeros(2, dtype=torch.int64, device=device)],
                  lambda: linear.to(device)(torch.ones(2, 3)), lambda: x.expand(2, 3) * torch.ones(3)):
        with pytest.raises(RuntimeError, match="two devices"):
            mixed()
    for double in (lambda: x.double(), lambda: torch.ones(2, device=device, dtype=torch.float64),
                   lambda: torch.ones(2).double().to(device), lambda: x.to(torch.float64)):
        with pytest.raises(TypeError, match="float64"):
            double()
    assert x.cpu().double().dtype == torch.float64 and x.sum().item() == 1.0
    assert_there(x * torch.tensor(2.0), torch.ones(2).double().to(torch.float32).to(device))


# The networks, small


def unet(module, **how):
    return module.UNet(1, 8, 8, (1, 2), 1, (4,), 1, 4, 0.0, how.pop("patch", 1), **how)


OPTIONS = ("fourier", "fir", "skip_rescale", "biggan", "progressive_input")
NETWORKS = {
    "ddpm": lambda: unet(ddpm), "patched": lambda: unet(ddpm, patch=2),
    "conditional": lambda: unet(conditional, classes=3),
    "dit": lambda: conditional.DiT(1, 8, 4, 16, 2, 2, 3),
    "classifier": lambda: conditional.NoisyClassifier(1, 3, 8, 4, 2),
    "score": lambda: unet(sb), "score_fourier": lambda: unet(sb, fourier=True),
    "ncsnpp_fir": lambda: unet(ncsnpp, fir=True),
    "ncsnpp": lambda: unet(ncsnpp, **dict.fromkeys(OPTIONS, True))}
every_network = pytest.mark.parametrize("name", NETWORKS)


def awake(net):
    """Weights that start at zero drawn instead: every part of the network has a say."""
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net.eval()


def answer(name, x):
    """The shape of a network's answer to x."""
    return (len(x), 3) if name == "classifier" else x.shape


@every_network
def test_networks_on_a_device(name, device):
    net, x = NETWORKS[name]().to(device), torch.randn(2, 1, 8, 16, device=device)
    out = net(x, torch.tensor([1, 5], device=device))
    out.square().mean().backward()
    assert_there(out, shape=answer(name, x))
    assert_there(*(p.grad for p in net.parameters() if p.grad is not None))


@every_network
def test_networks_take_sides_that_differ(name):
    """Turned weights answer turned pictures by the turned answer: neither side is read for the other."""
    net, t = awake(NETWORKS[name]()), torch.tensor([1, 5])
    wide = torch.randn(2, 1, 8, 16)
    assert net(wide, t).shape == answer(name, wide)
    if name == "dit":  # its positions tell rows from columns
        return
    found = net(wide, t)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 4:
                p.copy_(p.mT.clone())
    if name in ("patched", "classifier"):  # their channels and pooled cells are ordered by row
        return
    assert_close(net(wide.mT, t).mT, found, rtol=1e-3, atol=1e-4)


@every_network
def test_networks_refuse_sides_that_do_not_divide(name):
    net = NETWORKS[name]()
    for shape in ((8, 9), (9, 8)):
        with pytest.raises((RuntimeError, ValueError)):
            net(torch.randn(2, 1, *shape), torch.tensor([1, 5]))


@pytest.mark.parametrize("factor, patch", [(4, 2), (2, 2), (8, 1)])
def test_vae(factor, patch):
    vae, x = latent.VAE(1, factor, 3, 8, 1, 4, patch), torch.randn(2, 1, 16, 24)
    z = (2, 3, 16 // factor, 24 // factor)
    x_hat, mean, logvar = vae(x, torch.randn(z))
    assert x_hat.shape == x.shape and mean.shape == logvar.shape == z
    for sides in ((16, 24 + patch), (16 + patch, 24), (16, 25)):  # else larger pictures come back
        if sides[0] % factor or sides[1] % factor:
            with pytest.raises((RuntimeError, ValueError), match="divi"):
                vae.encode(torch.randn(2, 1, *sides))
    with Device():
        vae, x = vae.to(DEVICE), x.to(DEVICE)
        out = vae(x, torch.randn(z, device=DEVICE))
        loss, error, kl = latent.vae_loss(x, *out, 1e-2)
        loss.backward()
        assert_there(*out, loss, error, kl, *(p.grad for p in vae.parameters()))
        moments = latent.encode_all(vae, x, batch_size=1)
        vae.scale.fill_(latent.latent_scale(*moments))
        assert_there(*moments, vae.scale)
        assert_there(latent.decode_all(vae, vae.scale * moments[0]), shape=x.shape)


# Schedule, losses, samplers


SHAPE = (2, 1, 8, 16)
DISCRETE = {"ddpm": ddpm, "conditional": conditional, "latent": latent}


@pytest.mark.parametrize("name", DISCRETE)
def test_losses_on_a_device(name, device):
    module = DISCRETE[name]
    schedule, net = module.make_schedule("cosine", 5).to(device), unet(module).to(device)
    x0, eps, t = *torch.randn(2, *SHAPE, device=device), torch.tensor([1, 5], device=device)
    loss = module.ddpm_loss(net, x0, t, eps, schedule)
    loss.backward()
    assert_there(loss, *(p.grad for p in net.parameters() if p.grad is not None))


@pytest.mark.slow
def test_ddpm_on_a_device(device):
    schedule, net = ddpm.make_schedule("linear", 2).to(device), unet(ddpm).to(device)
    x0, t = torch.randn(SHAPE, device=device), torch.tensor([1, 2], device=device)
    for variance, clip_x0, xT in (("beta", False, None), ("beta_tilde", True, x0)):
        assert_there(ddpm.sample(net, SHAPE, schedule, variance, clip_x0, xT), shape=SHAPE)
        for s in (1, 2):
            assert_there(ddpm.bound_term(net, x0, s, schedule, variance, clip_x0), shape=SHAPE)
    assert len(ddpm.variational_bound(net, x0, schedule)) == 3
    assert_there(ddpm.q_step(x0, t, x0, schedule), *ddpm.q_posterior(x0, x0, t, schedule))
    assert_there(ddpm.discrete_log_likelihood(x0, x0, schedule.betas[1].sqrt()), shape=SHAPE)


@pytest.mark.slow
def test_ddim_on_a_device(device):
    schedule, net = ddim.make_schedule("linear", 5).to(device), unet(ddim).to(device)
    x = torch.randn(SHAPE, device=device)
    assert_there(ddim.ddim_sample(net, x, schedule, 2, 1.0), latent.ddim_sample(net, x, schedule, 2),
                 ddim.ddim_invert(net, x, schedule, 2), ddim.slerp(x, x, 0.5), shape=SHAPE)
    for _, xt in ddim.sigma_hat_process(net, x, schedule, 2, "quadratic"):
        assert_there(xt, shape=SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("backbone, guidance, sampler", [
    ("conditional", "classifier_free", "ancestral"), ("dit", "classifier", "ddim"),
    ("dit", "classifier", "ancestral")])
def test_guidance_on_a_device(backbone, guidance, sampler, device):
    on_the_cpu = conditional.make_schedule("linear", 2)
    net, classifier = (NETWORKS[name]().to(device) for name in (backbone, "classifier"))
    net, schedule = conditional.VPrediction(net, on_the_cpu.alpha_bars).to(device), on_the_cpu.to(device)
    y = torch.tensor([0, 2], device=device)
    settings = conditional.Config(guidance=guidance, sampler=sampler, S=1, eta=1.0)
    x, t = torch.randn(SHAPE, device=device), torch.tensor([1, 2], device=device)
    for w in (2.0, torch.tensor([0.0, 1.0], device=device)):
        assert_there(conditional.sample(settings, net, x, schedule, y, w, classifier), shape=SHAPE)
    dropped = conditional.drop_labels(y, 0.5, 3)
    assert dropped.device == device and dropped.dtype == torch.int64
    for loss in (conditional.ddpm_loss, conditional.v_loss):
        loss(functools.partial(net, y=dropped), x, t, torch.randn_like(x), schedule).backward()
    assert_there(*(p.grad for p in net.parameters() if p.grad is not None))
    assert_there(conditional.per_image(torch.tensor([1.0, 2.0], dtype=torch.float64), x))


# The SDEs


SDES = {"ve": sb.VESDE, "vp": sb.VPSDE, "vp_cosine": lambda: sb.VPSDE(kind="cosine"),
        "subvp": sb.SubVPSDE}


def test_an_sde_draws_where_it_is_asked_to():
    for make in SDES.values():
        sde = make()
        torch.manual_seed(1)
        wanted = sde.prior_std * torch.randn(5, 2)
        torch.manual_seed(1)
        assert torch.equal(sde.prior_sampling((5, 2)), wanted)  # the CPU where no device is named
        assert sde.prior_sampling((5, 2), DEVICE).device == DEVICE


@pytest.mark.slow
@pytest.mark.parametrize("name, shape", [
    ("ve", (2, 1, 8, 8)), ("vp_cosine", (2, 2)), ("subvp", (2, 2)), ("ve", (2, 1, 9)), ("vp", (2, 1, 9))])
def test_sde_losses_on_a_device(name, shape, device):
    sde, fourier = SDES[name](), name == "ve"
    net = {2: lambda: sb.ScoreMLP(2, 16, 1, fourier), 3: lambda: series.SeriesNet(8, 2, fourier),
           4: lambda: unet(sb, fourier=fourier)}[len(shape)]().to(device)
    x0 = torch.randn(shape, device=device)
    for weighting in ("simple", "likelihood"):
        t, density = (part.to(device) for part in sb.draw_times(sde, 2, weighting))
        loss = sb.score_loss(net, sde, x0, t, torch.randn_like(x0), weighting, density)
        loss.backward()
        assert_there(loss, *(p.grad for p in net.parameters() if p.grad is not None))


@pytest.mark.slow
@pytest.mark.parametrize("name, shape", [("ve", (2, 2)), ("vp", (2, 1, 1, 3)), ("subvp", (2, 2))])
def test_sde_samplers_on_a_device(name, shape, device):
    sde, x0 = SDES[name](), torch.randn(shape, device=device)
    score = sb.score_fn(lambda x, t: x.sin() + sb.per_example(t, x), sde, clip_x0=len(shape) == 4)
    cfg = sb.Config(sde=name, tolerance=0.5)
    for method in sb.make_methods(cfg, sde, calls=2).values():
        xT = sde.prior_sampling(shape, device)
        assert_there(sb.final(sb.sampling_process(method, score, sde, xT)), shape=shape)
    z = sb.final(sb.ode_process(score, sde, x0, sde.eps, sde.T, tolerance=0.5))
    assert_there(z, sb.dequantize(x0), sb.rescaled(sde, z, 1.0), shape=shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_controllable_generation_on_a_device(name, device):
    sde = SDES[name]()
    x, grey = torch.randn(2, 3, 2, 2, device=device), torch.randn(2, 1, 2, 2, device=device)
    mask = torch.tensor([True, False], device=device)

    def score(x, t):
        return -x * sb.per_example(t, x)

    def classifier(x, t):
        return x.flatten(1)[:, :3] * t[:, None]

    guided = sb.conditional_score(score, classifier, torch.tensor([0, 2], device=device))
    assert_there(controllable.inpaint(guided, sde, x, mask, 1), controllable.colorize(score, sde, grey, 1),
                 shape=x.shape)


@pytest.mark.parametrize("name, trace, probe", [
    ("ve", "exact", ""), ("vp", "hutchinson", "rademacher"), ("subvp", "hutchinson", "gaussian")])
def test_likelihood_on_a_device(name, trace, probe, device):
    sde, x0 = SDES[name](), torch.randn(2, 2, device=device)
    score = sb.score_fn(lambda x, t: x.sin() + sb.per_example(t, x), sde)
    assert_there(sb.log_likelihood(score, sde, x0, trace, probe, tolerance=0.5), shape=(2,))


def test_solver_comes_back_to_the_device_in_its_dtype(device):
    x = torch.ones(3, device=device)
    for _, (state,) in sb.solve(lambda state, t: state, (x,), 0.0, 1.0, 0.1):
        assert_there(state, shape=(3,))


# The text of the scripts


# (file, receiver of .double()): why it is on the CPU without .cpu()
ON_THE_CPU = {
    ("quality.py", "(torch.cdist(points, centres) <= radius).any(1)"): "features are numpy arrays"}
DOUBLE = ("float64", "double")


def names_float64(node):
    return isinstance(node, ast.Attribute) and node.attr in DOUBLE and ast.unparse(node.value) == "torch"


def offences(path, text=None):
    """Where a file makes float64 of what may not be on the CPU, or takes it to a device too early."""
    for node in ast.walk(ast.parse(text or path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        receiver = ast.unparse(node.func.value) if name else ""
        handed = [*node.args, *(k.value for k in node.keywords)]
        line = f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        if name == "double" and ".cpu()" not in receiver and (path.name, receiver) not in ON_THE_CPU:
            yield line
        if any(names_float64(value) for value in handed):
            if any(k.arg == "device" for k in node.keywords):
                yield line
            if name == "to" and (len(handed) > 1 or ".cpu()" not in receiver):
                yield line
            if name.endswith("_like") or name.startswith("new_"):  # on the device of another
                yield line


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_float64_is_made_on_the_cpu(path):
    assert not list(offences(path))


def test_the_walk_sees_float64_on_a_device():
    path = ROOT / "common" / "quality.py"
    for wrong in ("x.double().cpu()", "x.double()", "x.to(torch.float64)", "x.to(device, torch.float64)",
                  "torch.zeros(3, dtype=torch.float64, device=x.device)",
                  "torch.zeros_like(x, dtype=torch.float64)", "x.new_zeros(3, dtype=torch.double)",
                  "x.cpu().to(device, torch.float64)"):
        assert list(offences(path, wrong)), wrong
    for right in ("x.cpu().double().mean()", "torch.arange(3, dtype=torch.float64)",
                  "x.cpu().to(torch.float64)"):
        assert not list(offences(path, right)), right
    texts = {path.name: path.read_text() for path in SOURCES}
    assert all(f"{receiver}.double()" in texts[name] for name, receiver in ON_THE_CPU)  # none is stale
