"""The networks of the conditional page: what its U-Net adds to ddpm's, and the DiT, by their formulas."""

import math

import conditional_diffusion_example as cond

import pytest
import torch
from conftest import open_run
from torch.nn import functional as F
from torch.testing import assert_close


def unet(**changes):
    settings = dict(image_channels=1, image_size=16, channels=8, mults=(1, 2), blocks=1, attention=(4,),
                    groups=4, dropout=0.0, patch=2, classes=5)
    return cond.UNet(**settings | changes)


def dit(**changes):
    settings = dict(image_channels=1, image_size=16, patch=4, width=16, depth=2, heads=2, classes=5)
    return cond.DiT(**settings | changes)


def awake(model):
    """The layers that start at zero, woken: the output then depends on everything."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


BOTH = pytest.mark.parametrize("make", [unet, dit], ids=["unet", "dit"])


@BOTH
@torch.no_grad()
def test_output_changes_with_the_label_and_with_t(make):
    """No label is the null class, which comes after the others; t may be a float."""
    model, x = awake(make()), torch.randn(1, 1, 16, 16)
    outs = [model(x, torch.tensor([t]), torch.tensor([y]))
            for t, y in [(10, 0), (10, 1), (10, 5), (11, 0), (900, 0)]]
    for i, a in enumerate(outs):
        for b in outs[i + 1:]:
            assert (a - b).abs().max() > 1e-5
    assert_close(model(x, torch.tensor([10.0]), torch.tensor([0])), outs[0])
    assert_close(model(x, torch.tensor([10])), outs[2])


@pytest.mark.slow
@BOTH
def test_the_first_guess_is_zero_and_every_weight_learns(make):
    model = make()
    before = [p.clone() for p in model.parameters()]
    x, t, y = torch.randn(4, 1, 16, 16), torch.tensor([3, 900, 40, 400]), torch.tensor([1, 2, 5, 0])
    assert not model(x, t, y).any()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(6):
        optimizer.zero_grad()
        (model(x, t, y) - x).square().mean().backward()
        optimizer.step()
    assert not [name for (name, p), start in zip(model.named_parameters(), before, strict=True)
                if torch.equal(p, start)]


@BOTH
@torch.no_grad()
def test_pictures_need_not_be_square_nor_of_single_precision(make):
    """Each picture of a batch is answered by itself."""
    model, x = awake(make()), torch.randn(2, 1, 16, 24)
    t, y = torch.tensor([3, 900]), torch.tensor([1, 5])
    out = model(x, t, y)
    assert out.shape == x.shape
    assert_close(model(x[:1], t[:1], y[:1]), out[:1], rtol=1e-3, atol=1e-4)
    assert model(x.mT.contiguous(), t, y).shape == (2, 1, 24, 16)
    double = model.double()(x.double(), t, y)
    assert double.dtype == torch.float64
    assert_close(double.float(), out, rtol=1e-3, atol=1e-3)


@BOTH
def test_gradient_checkpointing_computes_each_block_again(make, tmp_path):
    """In the loop alone."""
    model, calls = make(), []
    blocks = [m for m in model.modules() if isinstance(m, cond.ResBlock | cond.DiTBlock)]
    for block in blocks:
        block.norm1.register_forward_hook(lambda *_: calls.append(1))

    def step():
        calls.clear()
        model(torch.randn(1, 1, 16, 16), torch.tensor([3]), torch.tensor([1])).square().mean().backward()
        return len(calls)

    _, run, _ = open_run(cond, tmp_path, "--grad_checkpointing")
    for _ in run.steps(1, model=model, save=False):
        assert step() == 2 * len(blocks)
    assert step() == len(blocks)


# The U-Net


def test_adaptive_group_norm_scales_and_shifts_after_the_norm():
    block, x, emb = cond.ResBlock(4, 4, 6, 2, 0.0), torch.randn(3, 4, 5, 5), torch.randn(3, 6)
    torch.nn.init.dirac_(block.conv2.weight)
    scale, shift = block.time(F.silu(emb)).chunk(2, 1)
    h = block.conv1(F.silu(block.norm1(x))).view(3, 2, -1)
    h = (h - h.mean(2, keepdim=True)) / (h.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    h = h.view(3, 4, 5, 5) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    assert_close(block(x, emb), x + F.silu(h), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_unet_hands_each_skip_to_its_twin_on_the_way_up():
    """What a level made going down is concatenated, last made first, going up."""
    model, made, got = awake(unet(blocks=2)), [], []
    for module in (model.conv_in, *model.down):
        module.register_forward_hook(lambda _, __, out: made.append(out))
    for module in model.up:
        if isinstance(module, cond.Stage):
            module.register_forward_pre_hook(lambda _, args: got.append(args[0]))
    model(torch.randn(2, 1, 16, 16), torch.tensor([3, 9]))
    assert len(made) == len(got) == 6
    for skip, h in zip(reversed(made), got, strict=True):
        assert skip.abs().max() > 0.1
        assert torch.equal(h[:, -skip.shape[1]:], skip)


# The DiT


@pytest.mark.parametrize("name, millions", [("dit_s", 33), ("dit_b", 130), ("dit_l", 458), ("dit_xl", 675)])
def test_dit_sizes_are_those_of_the_paper(name, millions, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "normal_", lambda weight, **_: weight)  # it imports for seconds on meta
    cfg = cond.PRESETS[name]
    with torch.device("meta"):
        model = cond.DiT(4, 32, cfg.dit_patch, cfg.dit_width, cfg.dit_depth, cfg.dit_heads, 1000,
                         kernel=cfg.dit_kernel)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / 1e6 - millions) < 0.005 * millions, count
    assert cfg.predict == cond.PRESETS["ddpm_adagn"].predict == "eps"


def test_positions_tell_rows_from_columns():
    p = cond.positions_2d(5, 6, 16).view(5, 6, 16)
    assert_close(p[2, :, :8], p[2, :1, :8].expand(6, 8))  # the first half knows the row
    assert_close(p[:, 3, 8:], p[:1, 3, 8:].expand(5, 8))  # the second half the column
    assert_close(p[1, 0, :4], (10000 ** (-torch.arange(4.0) / 4)).sin())
    assert_close(p[0, 5, 12:], (5 * 10000 ** (-torch.arange(4.0) / 4)).cos())


@torch.no_grad()
def test_each_patch_is_told_its_place_and_put_back_there(monkeypatch):
    """With the layers opened so that tokens pass unmixed, a bright patch stays where it was."""
    model, seen = dit(width=64, patch=4), []
    model.embed.register_forward_hook(lambda _, __, out: seen.append(out.flatten(2).mT))
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randn(2, 1, 16, 24), torch.tensor([1, 7]))
    assert_close(seen[1] - seen[0], cond.positions_2d(4, 6, 64).expand(2, 24, 64), rtol=1e-4, atol=1e-5)

    torch.nn.init.zeros_(model.embed.weight)
    torch.nn.init.eye_(model.embed.weight[:16, :, 0, 0])
    torch.nn.init.eye_(model.out.weight[:, :16, 0, 0])
    monkeypatch.setattr(cond, "positions_2d", lambda rows, columns, width, device=None:
                        torch.zeros(rows * columns, width, device=device))
    x = torch.zeros(1, 1, 16, 24)
    x[0, 0, 4:8, 8:12] = torch.arange(16.0).view(4, 4) / 15
    out = model(x, torch.tensor([1]), torch.tensor([0]))
    token = torch.cat([x[0, 0, 4:8, 8:12].flatten(), torch.zeros(48)])
    wanted = F.layer_norm(token, (64,), eps=1e-6)[:16].view(4, 4)
    assert_close(out[0, 0, 4:8, 8:12], wanted, rtol=1e-4, atol=1e-5)
    out[0, 0, 4:8, 8:12] = 0
    assert not out.any()


@pytest.mark.parametrize("layer", ["embed", "out"])
@pytest.mark.parametrize("kernel, reach", [(1, 0), (3, 1)])
@torch.no_grad()
def test_a_token_sees_as_many_patches_as_its_kernel_says(kernel, reach, layer):
    """With the blocks asleep a pixel changes its own patch, or the patches around it too."""
    model, x = dit(kernel=kernel), torch.randn(1, 1, 16, 16)
    torch.nn.init.normal_(model.out.weight)
    other = model.out if layer == "embed" else model.embed  # this one looks at the middle alone
    middle = torch.zeros_like(other.weight)
    middle[:, :, kernel // 2, kernel // 2] = other.weight[:, :, kernel // 2, kernel // 2]
    other.weight.copy_(middle)
    brighter = x.clone()
    brighter[0, 0, 9, 5] += 3  # in the patch of row 2 and column 1
    change = (model(brighter, torch.tensor([5])) - model(x, torch.tensor([5]))).abs()
    wanted = torch.zeros(4, 4, dtype=torch.bool)
    wanted[2 - reach:3 + reach, 1 - reach:2 + reach] = True
    assert torch.equal(F.max_pool2d(change, 4)[0, 0] > 1e-5, wanted)


@torch.no_grad()
def test_attention_is_that_of_the_formula_head_by_head():
    """softmax(q k^T / sqrt(d)) v of each head."""
    block, x = cond.DiTBlock(12, 3), torch.randn(2, 7, 12)
    block.qkv.weight.mul_(4)  # so that the softmax is far from uniform
    found = block.attend(x)
    for b in range(2):
        q, k, v = block.qkv(x[b]).chunk(3, 1)
        heads = [(q[:, i:i + 4] @ k[:, i:i + 4].T / math.sqrt(4)).softmax(1) @ v[:, i:i + 4] for i in (0, 4, 8)]
        assert_close(found[b], block.out(torch.cat(heads, 1)), rtol=1e-4, atol=1e-5)


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
