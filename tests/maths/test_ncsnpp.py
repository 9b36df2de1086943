"""experiments/ncsnpp.py: the options of [SDE] App. H. Its networks as networks are in test_networks.py."""

from functools import partial

import score_based_diffusion_example as sb

import pytest
import torch
from conftest import experiment, spied
from torch.testing import assert_close

ncsnpp = experiment("ncsnpp")
each_fir = pytest.mark.parametrize("fir", [False, True])


def kinds(model, name):
    return [part for part in model.modules() if type(part).__name__ == name]


def test_the_small_network_is_ncsnpp():
    model = ncsnpp.make_network(ncsnpp.Config(), (1, 28, 28))
    assert model.fourier is not None and model.rescale == 0.5**0.5
    assert [part.fir for part in kinds(model, "Downsample")] == [part.fir for part in model.pyramid] == [True]
    assert [block.resample.keywords["fir"] for block in kinds(model, "ResampleBlock")] == [True, True]


# Resampling


def test_fir_resampling():
    """Constants pass, the finest checkerboard is removed, ramps stay ramps, and both are adjoint."""
    shrink, grow = (partial(function, fir=True) for function in (ncsnpp.shrink, ncsnpp.grow))
    ramp = torch.arange(16.0).expand(1, 1, 16, 16).contiguous()
    stripes = (torch.arange(16) % 2 * 2.0 - 1).expand(16, 16)
    for x in (stripes, stripes * stripes.mT):
        assert shrink(x.view(1, 1, 16, 16))[..., 1:-1, 1:-1].abs().max() < 1e-6
    assert_close(shrink(torch.ones(1, 2, 16, 16))[..., 1:-1, 1:-1], torch.ones(1, 2, 6, 6))
    assert_close(shrink(ramp)[0, 0, 4, 1:-1], 2 * torch.arange(1.0, 7.0) + 0.5)
    assert_close(grow(ramp)[0, 0, 10, 2:-2], torch.arange(2.0, 30.0) / 2 - 0.25)
    a, b = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 16, 16)
    assert_close((grow(a) * b).sum(), 4 * (a * shrink(b)).sum(), rtol=1e-4, atol=1e-4)


@each_fir
def test_strided_convolutions_see_every_pixel(fir):
    """The filter comes first, at the full resolution, and the convolution strides; not the reverse."""
    layer, x = ncsnpp.Downsample(2, 3, fir), torch.randn(1, 2, 8, 8)
    blurred, padding = (ncsnpp.fir_filter(x), 0) if fir else (x, 1)  # the filter adds a row and a column
    everywhere = torch.nn.functional.conv2d(blurred, layer.conv.weight, layer.conv.bias, padding=padding)
    assert layer(x).shape == (1, 3, 4, 4)
    assert_close(layer(x), everywhere[:, :, ::2, ::2])
    layer = ncsnpp.Upsample(2, 3, fir)
    assert layer(x).shape == (1, 3, 16, 16)
    assert_close(layer(x), layer.conv(ncsnpp.grow(layer.narrow(x), fir)))


# The network


def test_every_residual_sum_is_rescaled():
    """With zero branches the signal shrinks by sqrt(2) at each sum: a block, its attention, a resampling."""
    x, emb = torch.randn(2, 8, 8, 8), torch.zeros(2, 32)
    plain, scaled = (ncsnpp.UNet(1, 8, 8, (1, 2), 1, (4,), groups=4, skip_rescale=rescale, biggan=True)
                     for rescale in (False, True))
    scaled.load_state_dict(plain.state_dict())
    for part, wide, power in (("down.0", 8, 0.5), ("mid.0", 16, 1.0), ("mid.1", 16, 0.5), ("down.1", 8, 0.5)):
        h = x.repeat(1, wide // 8, 1, 1)
        found, full = (net.eval().get_submodule(part)(h, emb) for net in (scaled, plain))
        assert_close(found, full / 2**power)


def test_attention_on_the_way_up_follows_the_last_block_alone():
    model = ncsnpp.UNet(1, 8, 8, (1, 2), 3, (4,), groups=4)
    assert [len(stage) for stage in kinds(model.down, "Stage")] == [1] * 3 + [2] * 3
    assert [len(stage) for stage in kinds(model.up, "Stage")] == [1, 1, 1, 2] + [1] * 4
    assert [len(stage) for stage in model.mid] == [2, 1]


@each_fir
@pytest.mark.parametrize("skip_rescale", [False, True])
@torch.no_grad()
def test_progressive_input_is_a_residual_sum_at_every_level(skip_rescale, fir):
    """With all else silent and one tap a convolution: a constant times the weights, each sum scaled."""
    model = ncsnpp.UNet(1, 32, 8, (1, 1, 1), 1, (), groups=4, skip_rescale=skip_rescale, fir=fir,
                        progressive_input=True).eval()
    scale, given = 2**-0.5 if skip_rescale else 1.0, []
    for layer in kinds(model.down, "Downsample"):
        torch.nn.init.zeros_(layer.conv.weight)
        torch.nn.init.constant_(layer.conv.bias, 0.5)
    for layer, gain in zip(model.pyramid, (2.0, 3.0), strict=True):
        torch.nn.init.zeros_(layer.conv.weight)
        torch.nn.init.zeros_(layer.conv.bias)
        layer.conv.weight[:, 0, 1, 1] = gain
    for stage in kinds(model.down, "Stage")[1:]:
        stage.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    dot = torch.zeros(1, 1, 32, 32)
    dot[..., 14, 14] = 1  # reaches one pixel of the next level, 2 x 2 through the FIR filter
    model(dot, torch.ones(1))
    assert ((given[0][0, 0] - 0.5 * scale).abs() > 1e-3).sum() == (4 if fir else 1)
    model(torch.full((1, 1, 32, 32), 0.7), torch.ones(1))
    first = (2 * 0.7 + 0.5) * scale
    second = (3 * first + 0.5) * scale
    for x, expected in zip(given[2:], (first, second), strict=True):
        inside = x[..., 3:-3, 3:-3]
        assert_close(inside, torch.full_like(inside, expected))


def test_each_field_reaches_the_argument_of_its_name(monkeypatch):
    asked = []
    spied(monkeypatch, ncsnpp.UNet, "__init__", lambda given, _: asked.append(given))
    options = ("fir", "skip_rescale", "biggan", "progressive_input")
    numbers = dict(channels=16, mults=(1, 3), blocks=2, attention=(2,), heads=4, groups=8, dropout=0.5, patch=4)
    for on in options:
        fields = numbers | {name: name == on for name in options}
        for sde in ("ve", "vp"):
            network = ncsnpp.make_network(ncsnpp.Config(sde=sde, **fields), (3, 8, 8))
            given = asked.pop()
            assert {name: given[name] for name in fields} == fields
            assert (given["image_channels"], given["image_size"], given["fourier"]) == (3, 8, sde == "ve")
            assert network.sigma_data == 0.5 and isinstance(network.down[2], sb.ResBlock) == (on == "biggan")
