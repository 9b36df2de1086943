"""experiments/ncsnpp.py: the networks of [SDE] App. H, and those of the score-based page that they replace."""

import math
import sys
from functools import partial

import score_based_diffusion_example as sb

import pytest
import torch
from conftest import ROOT, awake
from torch.testing import assert_close

sys.path.append(str(ROOT / "experiments"))
import ncsnpp  # noqa: E402

ALL = {"fir": True, "biggan": True, "skip_rescale": True, "progressive_input": True, "fourier": True}
OPTIONS = {"plain": {}, "plain_fir": {"fir": True}, "ddpmpp": {"biggan": True, "skip_rescale": True},
           "ncsnpp": ALL, "ncsnpp_on_patches": {**ALL, "patch": 2}}


def small(**options):
    return ncsnpp.UNet(1, 8, 8, (1, 2), 1, (4,), groups=4, dropout=0.0, **options)


# The networks of the page, and its network with the options of App. H
NETWORKS = {
    "page, mlp": lambda: sb.ScoreMLP(64, 16, 2), "page, mlp, fourier": lambda: sb.ScoreMLP(64, 16, 2, True),
    "page, unet": lambda: sb.UNet(1, 8, 8, (1, 2), 1, (4,), groups=4, dropout=0.0),
    "page, unet, fourier": lambda: sb.UNet(1, 8, 8, (1, 2), 1, (4,), groups=4, dropout=0.0, patch=2, fourier=True),
    **{name: partial(small, **options) for name, options in OPTIONS.items()}}
every_network = pytest.mark.parametrize("name", NETWORKS)


@pytest.mark.parametrize("preset, parameters", [("ddpmpp", 61_804_419), ("ncsnpp", 62_758_787)])
def test_parameters_of_the_paper_presets(preset, parameters, monkeypatch):
    """As configs/vp/cifar10_ddpmpp_continuous.py, ve/cifar10_ncsnpp_continuous.py of score_sde_pytorch."""
    monkeypatch.setattr(torch, "randn", torch.empty)  # drawing on the meta device imports for seconds
    with torch.device("meta"):
        model = ncsnpp.make_network(ncsnpp.PRESETS[preset], (3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_small_network_is_ncsnpp():
    model = ncsnpp.make_network(ncsnpp.Config(), (1, 28, 28))
    kinds = {type(part) for part in model.modules()}
    assert {ncsnpp.ResampleBlock, ncsnpp.Downsample, sb.FourierFeatures} <= kinds
    assert len(model.pyramid) == 1 and model.pyramid[0].fir and model.rescale == 0.5**0.5
    assert {block.resample.keywords["fir"] for block in model.modules()
            if isinstance(block, ncsnpp.ResampleBlock)} == {True}


# Resampling


def test_fir_resampling():
    """Constants pass, the finest checkerboard is removed, ramps stay ramps, and both are adjoint."""
    ramp = torch.arange(16.0).view(1, 1, 1, 16).expand(1, 1, 16, 16).contiguous()
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    stripes = (torch.arange(16) % 2 * 2.0 - 1).expand(16, 16)
    for x in (board, stripes):
        assert ncsnpp.shrink(x.view(1, 1, 16, 16), fir=True)[..., 1:-1, 1:-1].abs().max() < 1e-6
    assert_close(ncsnpp.shrink(torch.ones(1, 2, 16, 16), fir=True)[..., 1:-1, 1:-1], torch.ones(1, 2, 6, 6))
    assert_close(ncsnpp.shrink(ramp, fir=True)[0, 0, 4, 1:-1], 2 * torch.arange(1.0, 7.0) + 0.5)
    up = ncsnpp.grow(ramp, fir=True)[0, 0, 10, 2:-2]
    assert_close(up, torch.arange(2.0, 30.0) / 2 - 0.25)
    a, b = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 16, 16)
    assert_close((ncsnpp.grow(a, fir=True) * b).sum(), 4 * (a * ncsnpp.shrink(b, fir=True)).sum(),
                 rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fir", [False, True])
def test_strided_convolutions_see_every_pixel(fir):
    """The filter comes first, at the full resolution, and the convolution strides; not the reverse."""
    layer, x = ncsnpp.Downsample(2, 3, fir), torch.randn(1, 2, 8, 8)
    blurred, padding = (ncsnpp.fir_filter(x), 0) if fir else (x, 1)  # the filter adds a row and a column
    everywhere = torch.nn.functional.conv2d(blurred, layer.conv.weight, layer.conv.bias, padding=padding)
    assert_close(layer(x), everywhere[:, :, ::2, ::2])
    assert layer(x).shape == (1, 3, 4, 4)
    layer = ncsnpp.Upsample(2, 3, fir)
    assert_close(layer(x), layer.conv(ncsnpp.grow(layer.narrow(x), fir)))
    assert layer(x).shape == (1, 3, 16, 16)


# The networks


def test_fourier_features_are_sine_and_cosine_of_2_pi_w_t():
    """w is drawn once with a std of 16, is saved, and does not learn."""
    features = sb.FourierFeatures(2000)
    assert not list(features.parameters()) and "W" in features.state_dict()
    assert features.W.std().item() == pytest.approx(16, rel=0.1)
    t = torch.tensor([-4.6, 0.7, 3.9]).double()
    angles = 2 * math.pi * t[:, None] * features.W.double()
    assert_close(features.double()(t), torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=1e-9)


@pytest.mark.slow
@every_network
def test_the_network_is_zero_at_first_and_every_weight_learns(name):
    """After a few steps the answer depends on t."""
    model = NETWORKS[name]()
    before = [p.clone() for p in model.parameters()]
    x, t = torch.randn(4, 64) if "mlp" in name else torch.randn(4, 1, 8, 8), torch.tensor([3.0, 0.5, -2.0, 1.0])
    assert model(x, t).abs().max() == 0
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x, t) - x).pow(2).mean().backward()
        optimizer.step()
    still = [n for (n, p), b in zip(model.named_parameters(), before, strict=True) if torch.equal(p, b)]
    assert not still
    assert (model(x, t) - model(x, t + 1)).abs().max() > 1e-4


@every_network
@torch.no_grad()
def test_the_network_works_in_float64_and_on_pictures_that_are_not_square(name):
    """Scaled as the score scales it."""
    network, t = awake(NETWORKS[name]()), torch.tensor([0.1, 0.5, 0.9])
    network.register_buffer("sigma_data", torch.tensor(0.5))
    x = torch.randn(3, 64) if "mlp" in name else torch.randn(3, 1, 8, 12)
    sde = sb.VESDE() if network.fourier else sb.VPSDE()
    single = sb.network_eps(network, sde, x, t)
    double = sb.network_eps(network.double(), sde, x.double(), t.double())
    assert single.shape == x.shape and (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert_close(single.double(), double, rtol=0.02, atol=0.02)


def test_every_residual_sum_is_rescaled():
    """With zero branches the signal shrinks by sqrt(2) at each sum: a block, its attention, a resampling."""
    x, emb = torch.randn(2, 8, 8, 8), torch.zeros(2, 32)
    plain, scaled = (small(skip_rescale=s, biggan=True) for s in (False, True))
    scaled.load_state_dict(plain.state_dict())
    for part, wide, power in (("down.0", 8, 0.5), ("mid.0", 16, 1.0), ("mid.1", 16, 0.5), ("down.1", 8, 0.5)):
        h = x.repeat(1, wide // 8, 1, 1)
        found, full = (net.get_submodule(part)(h, emb) for net in (scaled, plain))
        assert_close(found, full / 2**power)


def test_attention_on_the_way_up_follows_the_last_block_alone():
    model = ncsnpp.UNet(1, 8, 8, (1, 2), 3, (4,), groups=4)
    assert [len(stage) for stage in model.down if isinstance(stage, ncsnpp.Stage)] == [1] * 3 + [2] * 3
    assert [len(stage) for stage in model.up if isinstance(stage, ncsnpp.Stage)] == [1, 1, 1, 2] + [1] * 4
    assert [len(stage) for stage in model.mid] == [2, 1]


def wiring(model, x, t):
    """What each stage and each resampler of the way down gave, in order, and what stages were given."""
    seen = {}
    for name in ("conv_in", "down", "up"):
        part = getattr(model, name)
        for module in part if isinstance(part, torch.nn.ModuleList) else [part]:
            module.register_forward_hook(lambda m, given, out: seen.__setitem__(m, (given[0], out)))
    with torch.no_grad():
        model(x, t)
    return seen


@pytest.mark.parametrize("name", ["plain", "ddpmpp"])
def test_skip_connections_carry_each_state_of_the_way_down(name):
    """Every block on the way up is given, unscaled, what the way down had there, last in first out."""
    model = awake(small(**OPTIONS[name]))
    seen = wiring(model, torch.randn(2, 1, 8, 8), torch.tensor([10.0, 500.0]))
    skips = [seen[part][1] for part in (model.conv_in, *model.down)]
    ups = [part for part in model.up if isinstance(part, ncsnpp.Stage)]
    assert len(ups) == len(skips)
    for part in ups:
        skip = skips.pop()
        assert skip.abs().max() > 0.01
        assert torch.equal(seen[part][0][:, -skip.shape[1]:], skip)


@pytest.mark.parametrize("fir", [False, True])
@pytest.mark.parametrize("skip_rescale", [False, True])
def test_progressive_input_is_a_residual_sum_at_every_level(skip_rescale, fir):
    """With all else silent and one tap a convolution: a constant times the weights, each sum scaled."""
    model = ncsnpp.UNet(1, 32, 8, (1, 1, 1), 1, (), groups=4, skip_rescale=skip_rescale, fir=fir,
                        progressive_input=True).eval()
    scale, stages = 2**-0.5 if skip_rescale else 1.0, [p for p in model.down if isinstance(p, ncsnpp.Stage)]
    with torch.no_grad():
        for part in model.down:
            if isinstance(part, ncsnpp.Downsample):
                part.conv.weight.zero_(), part.conv.bias.fill_(0.5)
        for layer, gain in zip(model.pyramid, (2.0, 3.0), strict=True):
            layer.conv.weight.zero_(), layer.conv.bias.zero_()
            layer.conv.weight[:, 0, 1, 1] = gain
    dot = torch.zeros(1, 1, 32, 32)
    dot[..., 14, 14] = 1  # reaches one pixel of the next level, 2 x 2 through the FIR filter
    reached = (wiring(model, dot, torch.ones(1))[stages[1]][0][0, 0] - 0.5 * scale).abs() > 1e-3
    assert reached.sum() == (4 if fir else 1)
    seen = wiring(model, torch.full((1, 1, 32, 32), 0.7), torch.ones(1))
    first = (2 * 0.7 + 0.5) * scale
    second = (3 * first + 0.5) * scale
    for stage, expected in zip(stages[1:], (first, second), strict=True):
        inside = seen[stage][0][..., 3:-3, 3:-3]
        assert_close(inside, torch.full_like(inside, expected))


# {field of its Config: (argument of the network, a value, another value)}; tests/plumbing/test_config.py has the pages'
FIELDS = {"channels": ("channels", 8, 16), "mults": ("mults", (1, 2), (1, 1)), "blocks": ("blocks", 1, 2),
          "attention": ("attention", (4,), (8,)), "heads": ("heads", 1, 2), "groups": ("groups", 4, 8),
          "dropout": ("dropout", 0.0, 0.5), "patch": ("patch", 1, 2), "sde": ("fourier", "vp", "ve"),
          **{name: (name, False, True) for name in ("fir", "skip_rescale", "biggan", "progressive_input")}}


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_changes_the_network_as_its_name_says(field):
    def behaviour(network):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in network.parameters():
                p.normal_(std=0.3, generator=generator)
            if network.fourier is not None:
                network.fourier.W.normal_(generator=generator)
            torch.manual_seed(1)  # of the dropout
            answer = network.train()(torch.randn(2, 1, 8, 8), torch.tensor([3.0, 0.7]))
        return {name: p.shape for name, p in network.named_parameters()}, answer

    def same(one, other):
        return one[0] == other[0] and torch.allclose(one[1], other[1], rtol=1e-4, atol=1e-5)

    found, start = [], {name: value for name, (_, value, _) in FIELDS.items()}
    for settings in (start, start | {field: FIELDS[field][2]}):
        arguments = {FIELDS[name][0]: value == "ve" if name == "sde" else value for name, value in settings.items()}
        made = behaviour(ncsnpp.make_network(ncsnpp.Config(**settings), (1, 8, 8)))
        assert same(made, behaviour(ncsnpp.UNet(1, 8, **arguments)))
        found.append(made)
    assert not same(*found)
