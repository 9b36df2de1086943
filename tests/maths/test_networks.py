"""Every network: its first guess, its shapes, its skip connections; and its layers by their formulas.

What several pages repeat to the letter (tests/plumbing/test_drift.py) is tested once.
"""

import math
from functools import partial

import conditional_diffusion_example as cond
import ddpm_example as ddpm
import flow_matching_example as flow
import score_based_diffusion_example as sb

import pytest
import torch
from conftest import awake, experiment, open_run
from torch.nn import functional as F
from torch.testing import assert_close

ncsnpp, series = experiment("ncsnpp"), experiment("series")


def unet(UNet, **changes):
    settings = dict(image_channels=1, image_size=8, channels=8, mults=(1, 2), blocks=1, attention=(4,), heads=1,
                    groups=4, dropout=0.0)
    return UNet(**settings | changes)


def dit(**changes):
    settings = dict(image_channels=1, image_size=16, patch=4, width=16, depth=2, heads=2, classes=5)
    return cond.DiT(**settings | changes)


ALL = {"fir": True, "biggan": True, "skip_rescale": True, "progressive_input": True, "fourier": True}
NETWORKS = {
    "unet": partial(unet, ddpm.UNet),
    "unet of one level": partial(unet, ddpm.UNet, mults=(1,), blocks=2, heads=2, patch=2),
    "unet of three levels": partial(unet, ddpm.UNet, image_channels=4, mults=(1, 3, 2), attention=()),
    "unet, fourier": partial(unet, sb.UNet, patch=2, fourier=True),
    "conditional unet": partial(unet, cond.UNet, patch=2, classes=5),
    "dit": dit,
    "dit, kernel of 3": partial(dit, kernel=3),
    "mlp": partial(sb.ScoreMLP, 6, 16, 2),
    "mlp, fourier": partial(sb.ScoreMLP, 6, 16, 2, True),
    "velocity mlp": partial(flow.VelocityMLP, 6, 16, 2),
    "series": partial(series.SeriesNet, 8, 3),
    "series, fourier": partial(series.SeriesNet, 8, 3, True),
    "plain ncsnpp": partial(unet, ncsnpp.UNet),
    "plain ncsnpp, fir": partial(unet, ncsnpp.UNet, fir=True),
    "ddpmpp": partial(unet, ncsnpp.UNet, biggan=True, skip_rescale=True),
    "ncsnpp": partial(unet, ncsnpp.UNet, **ALL),
    "ncsnpp, patches": partial(unet, ncsnpp.UNet, **ALL, patch=2)}
LABELLED = ("conditional unet", "dit", "dit, kernel of 3")
every_network = pytest.mark.parametrize("name", NETWORKS)
labelled = pytest.mark.parametrize("name", LABELLED)


def inputs(name):
    """(x, t, and labels for a network that has them): points, series, or pictures that are not square."""
    shape = (6,) if "mlp" in name else (1, 7) if "series" in name else (4 if "three" in name else 1, 8, 12)
    labels = [torch.tensor([1, 5, 0])] if name in LABELLED else []
    return torch.randn(3, *shape), torch.tensor([3.0, 1.0, 7.0]), *labels


@every_network
def test_the_first_guess_is_zero_and_every_weight_learns(name):
    model, (x, t, *y) = NETWORKS[name](), inputs(name)
    weights = dict(model.named_parameters())
    before = {weight: p.clone() for weight, p in weights.items()}
    assert not model(x, t, *y).any()
    for step in (1, 2, 3, 4):  # layers behind a zero begin to learn later
        gradients = torch.autograd.grad((model(x, t, *y) - x).square().mean(), list(weights.values()))
        with torch.no_grad():
            for p, gradient in zip(weights.values(), gradients, strict=True):
                p -= 0.01 / step * gradient.sign()
    assert not [weight for weight, p in weights.items() if torch.equal(p, before[weight])]


@every_network
@torch.no_grad()
def test_each_example_of_a_batch_is_answered_by_itself_at_its_own_t(name):
    """In single and in double precision; t may be whole numbers."""
    model, (x, t, *y) = awake(NETWORKS[name]()), inputs(name)
    out = model(x, t, *y)
    close = {"rtol": 1e-3, "atol": 1e-3 * out.abs().max().item()}
    assert out.shape == x.shape
    assert_close(model(x, t.long(), *y), out, **close)
    assert_close(model(x[1:], t[1:], *[label[1:] for label in y]), out[1:], **close)
    later = model(x, t + torch.tensor([1.0, 0.0, 0.0]), *y)
    assert (later - out)[0].abs().max() > 1e-4
    assert_close(later[1:], out[1:], **close)
    double = model.double()(x.double(), t.double(), *y)
    assert double.dtype == torch.float64
    assert_close(double.float(), out, **close)


@labelled
@torch.no_grad()
def test_the_answer_changes_with_the_label_and_no_label_is_the_null_class(name):
    """The null class comes after the others."""
    model, x, t = awake(NETWORKS[name]()), torch.randn(1, 1, 8, 8), torch.tensor([10])
    outs = [model(x, t, torch.tensor([y])) for y in (0, 1, 5)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (outs[one] - outs[other]).abs().max() > 1e-4
    assert_close(model(x, t), outs[2])


@pytest.mark.parametrize("name", ["unet", "conditional unet", "plain ncsnpp", "ddpmpp"])
@torch.no_grad()
def test_a_unet_hands_each_skip_to_its_twin_on_the_way_up(name):
    """What a level made going down is concatenated, unscaled, last made first, going up."""
    model, made, got = awake(NETWORKS[name](blocks=2)), [], []
    for module in (model.conv_in, *model.down):
        module.register_forward_hook(lambda _, __, out: made.append(out))
    for module in model.up:
        if type(module).__name__ == "Stage":
            module.register_forward_pre_hook(lambda _, args: got.append(args[0]))
    model(torch.randn(2, 1, 8, 8), torch.tensor([3, 9]))
    assert len(made) == len(got) == 6
    for skip, h in zip(reversed(made), got, strict=True):
        assert skip.abs().max() > 0.01
        assert torch.equal(h[:, -skip.shape[1]:], skip)


def test_gradient_checkpointing_computes_each_block_of_the_dit_again(tmp_path):
    """tests/plumbing has those of the U-Nets."""
    model, calls = dit(), []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda *_: calls.append(1))
    _, run, _ = open_run(cond, tmp_path, "--grad_checkpointing")
    for _ in run.steps(1, model=model, save=False):
        model(torch.randn(1, 1, 16, 16), torch.tensor([3])).square().mean().backward()
    assert len(calls) == 2 * len(model.blocks)


def dit_of_imagenet(cfg, shape):
    """On latents of 4 channels, as in [DiT] Table 1."""
    return cond.DiT(4, 32, cfg.dit_patch, cfg.dit_width, cfg.dit_depth, cfg.dit_heads, 1000, kernel=cfg.dit_kernel)


@pytest.mark.parametrize("make, script, preset, parameters, error", [
    (ddpm.make_unet, ddpm, "paper", 35_746_307, 0),
    (ncsnpp.make_network, ncsnpp, "ddpmpp", 61_804_419, 0),  # as in the configs of score_sde_pytorch
    (ncsnpp.make_network, ncsnpp, "ncsnpp", 62_758_787, 0),
    (dit_of_imagenet, cond, "dit_s", 33e6, 0.005), (dit_of_imagenet, cond, "dit_b", 130e6, 0.005),
    (dit_of_imagenet, cond, "dit_l", 458e6, 0.005), (dit_of_imagenet, cond, "dit_xl", 675e6, 0.005)])
def test_the_presets_of_papers_have_as_many_parameters(make, script, preset, parameters, error, monkeypatch):
    monkeypatch.setattr(torch, "randn", torch.empty)  # drawing on the meta device imports for seconds
    monkeypatch.setattr(torch.nn.init, "normal_", lambda weight, **_: weight)
    with torch.device("meta"):
        model = make(script.PRESETS[preset], (3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=error, abs=0)


# The embeddings of the time


def test_timestep_embedding_is_that_of_vaswani():
    t = torch.tensor([0, 1, 500, 1000])
    found = ddpm.timestep_embedding(t, 16)
    angles = t[:, None].double() * 10000 ** (-torch.arange(8).double() / 7)
    assert_close(found.double(), torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=1e-4)


def test_fourier_features_are_sine_and_cosine_of_2_pi_w_t():
    """w is drawn once with a std of 16, is saved, and does not learn."""
    features = sb.FourierFeatures(2000)
    assert not list(features.parameters()) and "W" in features.state_dict()
    assert features.W.std().item() == pytest.approx(16, rel=0.1)
    t = torch.tensor([-4.6, 0.7, 3.9]).double()
    angles = 2 * math.pi * t[:, None] * features.W.double()
    assert_close(features.double()(t), torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=1e-9)


# The layers


@torch.no_grad()
def test_attention_is_that_of_the_formula_head_by_head():
    def attention(q, k, v, heads):
        """softmax(q k^T / sqrt(d)) v of each head. q, k, v: (B, N, width)."""
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)

    layer, x = ddpm.Attention(8, 2, 4), torch.randn(2, 8, 4, 4)
    torch.nn.init.normal_(layer.out.weight)
    layer.qkv.weight.mul_(4)  # so that the softmax is far from uniform
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).mT.chunk(3, 2)
    h = attention(q, k, v, 2).mT.unflatten(2, (4, 4))
    assert_close(layer(x), x + layer.out(h), rtol=1e-4, atol=1e-5)

    block, x = cond.DiTBlock(12, 3), torch.randn(2, 7, 12)
    block.qkv.weight.mul_(4)
    assert_close(block.attend(x), block.out(attention(*block.qkv(x).chunk(3, 2), 3)), rtol=1e-4, atol=1e-5)


def test_adaptive_group_norm_scales_and_shifts_after_the_norm():
    block, x, emb = cond.ResBlock(4, 4, 6, 2, 0.0), torch.randn(3, 4, 5, 5), torch.randn(3, 6)
    torch.nn.init.dirac_(block.conv2.weight)
    scale, shift = block.time(F.silu(emb)).chunk(2, 1)
    h = block.conv1(F.silu(block.norm1(x))).view(3, 2, -1)
    h = (h - h.mean(2, keepdim=True)) / (h.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    h = h.view(3, 4, 5, 5) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    assert_close(block(x, emb), x + F.silu(h), rtol=1e-4, atol=1e-5)


def test_positions_tell_rows_from_columns():
    p = cond.positions_2d(5, 6, 16).view(5, 6, 16)
    assert_close(p[2, :, :8], p[2, :1, :8].expand(6, 8))  # the first half knows the row
    assert_close(p[:, 3, 8:], p[:1, 3, 8:].expand(5, 8))  # the second half the column
    assert_close(p[1, 0, :4], (10000 ** (-torch.arange(4.0) / 4)).sin())
    assert_close(p[0, 5, 12:], (5 * 10000 ** (-torch.arange(4.0) / 4)).cos())


@torch.no_grad()
def test_each_patch_is_told_its_place_and_put_back_there(monkeypatch):
    """With the layers opened so that tokens pass unmixed, a bright patch stays where it was."""
    model, seen = dit(width=64), []
    model.embed.register_forward_hook(lambda _, __, out: seen.append(out.flatten(2).mT))
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randn(2, 1, 16, 24), torch.tensor([1, 7]))
    assert_close(seen[1] - seen[0], cond.positions_2d(4, 6, 64).expand(2, 24, 64), rtol=1e-4, atol=1e-5)

    torch.nn.init.zeros_(model.embed.weight)
    torch.nn.init.eye_(model.embed.weight[:16, :, 0, 0])
    torch.nn.init.eye_(model.out.weight[:, :16, 0, 0])
    monkeypatch.setattr(cond, "positions_2d", lambda rows, columns, width, device=None:
                        torch.zeros(rows * columns, width))
    x = torch.zeros(1, 1, 16, 24)
    x[0, 0, 4:8, 8:12] = torch.arange(16.0).view(4, 4) / 15
    out = model(x, torch.tensor([1]), torch.tensor([0]))
    token = torch.cat([x[0, 0, 4:8, 8:12].flatten(), torch.zeros(48)])
    wanted = F.layer_norm(token, (64,), eps=1e-6)[:16].view(4, 4)
    assert_close(out[0, 0, 4:8, 8:12], wanted, rtol=1e-4, atol=1e-5)
    out[0, 0, 4:8, 8:12] = 0
    assert not out.any()


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_token_sees_as_many_patches_as_its_kernel_says(kernel):
    model = dit(kernel=kernel)
    assert model.embed.kernel_size == model.out.kernel_size == (kernel, kernel)


@torch.no_grad()
def test_a_dit_block_is_adaln_zero_by_the_formula():
    """Both branches are normed, shifted, scaled and gated, each by its own part of c; as identities at first."""
    for block in dit(depth=3).blocks:
        tokens = torch.randn(2, 16, 16)
        assert torch.equal(block(tokens, torch.randn(2, 16)), tokens)

    block, x, c = cond.DiTBlock(8, 2).eval(), 3 * torch.randn(2, 5, 8) + 2, torch.randn(2, 8)
    parts = block.condition(F.silu(c)).view(2, 6, 1, 8).unbind(1)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts

    def norm(x):
        gap = x - x.mean(2, keepdim=True)
        return gap / (gap.square().mean(2, keepdim=True) + 1e-6).sqrt()

    h = x + gate1 * block.attend(norm(x) * (1 + scale1) + shift1)
    wanted = h + gate2 * block.mlp(norm(h) * (1 + scale2) + shift2)
    assert_close(block(x, c), wanted, rtol=1e-4, atol=1e-5)
    gelu = block.mlp[1](torch.tensor([1.0]))
    inner = math.tanh(math.sqrt(2 / math.pi) * (1 + 0.044715))
    assert_close(gelu, torch.tensor([0.5 * (1 + inner)]))
