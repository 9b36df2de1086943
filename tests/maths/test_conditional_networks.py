"""The networks of the conditional page: U-Net, DiT and the noisy classifier, by their formulas."""

import math
from dataclasses import replace

import conditional_diffusion_example as cond

import pytest
import torch
from conftest import open_run
from torch.nn import functional as F
from torch.testing import assert_close


def unet(**changes):
    how = dict(image_channels=1, image_size=16, channels=8, mults=(1, 2), blocks=1, attention=(4,),
               groups=4, dropout=0.0, patch=2, classes=5) | changes
    return cond.UNet(**how)


def dit(**changes):
    how = dict(image_channels=1, image_size=16, patch=4, width=16, depth=2, heads=2, classes=5)
    return cond.DiT(**how | changes)


def awake(model):
    """The layers that start at zero, woken: the output then depends on everything."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


BOTH = pytest.mark.parametrize("make", [unet, dit], ids=["unet", "dit"])


@BOTH
def test_the_batched_call_equals_two_calls(make):
    model, calls = awake(make()), []
    model.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.randn(6, 1, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0])
    found = cond.cfg_eps(model, x, 300, y, 1.7)
    assert len(calls) == 1
    t = torch.full((6,), 300)
    eps_c, eps_u = model(x, t, y), model(x, t, torch.full_like(y, 5))
    assert (eps_c - eps_u).abs().max() > 1e-3
    assert_close(found, 2.7 * eps_c - 1.7 * eps_u, rtol=1e-4, atol=1e-4)
    assert_close(model(x, t), eps_u, rtol=1e-4, atol=1e-4)  # no label is the null class


@BOTH
def test_output_changes_with_the_label_and_with_t(make):
    model, x = awake(make()), torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        outs = [model(x, torch.tensor([t]), torch.tensor([y]))
                for t, y in [(10, 0), (10, 1), (10, 5), (11, 0), (900, 0)]]
    for i, a in enumerate(outs):
        assert a.shape == x.shape
        for b in outs[i + 1:]:
            assert (a - b).abs().max() > 1e-5
    with torch.no_grad():  # float t is taken too
        assert_close(model(x, torch.tensor([10.0]), torch.tensor([0])), outs[0])


@BOTH
def test_the_first_guess_is_zero(make):
    x = torch.randn(2, 1, 16, 16)
    assert not make()(x, torch.tensor([3, 900]), torch.tensor([1, 2])).any()


def test_adaptive_group_norm_scales_and_shifts_after_the_norm():
    block, x, emb = cond.ResBlock(4, 4, 6, 2, 0.0), torch.randn(3, 4, 5, 5), torch.randn(3, 6)
    torch.nn.init.dirac_(block.conv2.weight)
    scale, shift = block.time(torch.nn.functional.silu(emb)).chunk(2, 1)
    h = block.conv1(torch.nn.functional.silu(block.norm1(x))).view(3, 2, -1)
    h = (h - h.mean(2, keepdim=True)) / (h.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    h = h.view(3, 4, 5, 5) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    assert_close(block(x, emb), x + torch.nn.functional.silu(h), rtol=1e-4, atol=1e-5)


def test_a_dit_block_starts_as_the_identity():
    model, tokens, c = dit(depth=3), torch.randn(2, 16, 16), torch.randn(2, 16)
    for block in model.blocks:
        assert torch.equal(block(tokens, c), tokens)
    torch.nn.init.normal_(block.condition.bias)
    assert (block(tokens, c) - tokens).abs().max() > 0.01


def test_dit_positions_tell_rows_from_columns():
    p = cond.positions_2d(5, 6, 16).view(5, 6, 16)
    assert_close(p[2, :, :8], p[2, :1, :8].expand(6, 8))  # the first half knows the row
    assert_close(p[:, 3, 8:], p[:1, 3, 8:].expand(5, 8))  # the second half the column
    assert torch.cdist(p.view(30, 16), p.view(30, 16)).fill_diagonal_(9).min() > 0.1
    assert_close(p[1, 0, :4], (10000 ** (-torch.arange(4.0) / 4)).sin())
    assert_close(p[0, 5, 12:], (5 * 10000 ** (-torch.arange(4.0) / 4)).cos())


@torch.no_grad()
def test_a_dit_knows_where_its_patches_are(monkeypatch):
    """Two patches swapped do not just swap the output: without positions they would."""
    model, t = awake(dit()), torch.tensor([5])
    x = torch.randn(1, 1, 16, 16)

    def swapped(x):
        out = x.clone()
        out[..., :4, :4], out[..., 8:12, 4:8] = x[..., 8:12, 4:8], x[..., :4, :4]
        return out

    assert (model(swapped(x), t) - swapped(model(x, t))).abs().max() > 0.05
    monkeypatch.setattr(cond, "positions_2d", lambda rows, columns, width, device=None:
                        torch.zeros(rows * columns, width, device=device))
    assert_close(model(swapped(x), t), swapped(model(x, t)), rtol=1e-3, atol=1e-4)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, one head. q, k, v: (N, d)."""
    return (q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v


@torch.no_grad()
def test_dit_attention_is_that_of_the_formula_head_by_head():
    block, x = cond.DiTBlock(12, 3), torch.randn(2, 7, 12)
    block.qkv.weight.mul_(4)  # so that the softmax is far from uniform
    found = block.attend(x)
    for b in range(2):
        q, k, v = block.qkv(x[b]).chunk(3, 1)
        heads = [attention(q[:, i:i + 4], k[:, i:i + 4], v[:, i:i + 4]) for i in (0, 4, 8)]
        assert_close(found[b], block.out(torch.cat(heads, 1)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_unet_attention_is_that_of_the_formula_head_by_head():
    layer, x = awake(cond.Attention(12, 3, 4)), torch.randn(2, 12, 3, 4)
    layer.qkv.weight.mul_(4)
    found = layer(x)
    for b in range(2):
        rows = layer.qkv(F.group_norm(x, 4, layer.norm.weight, layer.norm.bias))[b].flatten(1).T
        q, k, v = rows.chunk(3, 1)  # each (12 positions, 12 channels)
        heads = [attention(q[:, i:i + 4], k[:, i:i + 4], v[:, i:i + 4]) for i in (0, 4, 8)]
        merged = torch.cat(heads, 1).T.reshape(1, 12, 3, 4)
        assert_close(found[b:b + 1], x[b:b + 1] + layer.out(merged), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_dit_block_is_adaln_zero_by_the_formula():
    """Both branches are normed, shifted, scaled and gated, each by its own part of c."""
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


def test_dit_tokens_attend_to_each_other():
    """Another last patch changes the noise predicted for the first one."""
    torch.manual_seed(0)
    model = awake(dit())
    x = torch.randn(1, 1, 16, 16)
    other, t = x.clone(), torch.tensor([5])
    other[..., 12:, 12:] += 1
    with torch.no_grad():
        change = (model(other, t) - model(x, t)).abs()
    assert change[..., :4, :4].max() > 1e-3


@torch.no_grad()
def test_a_dit_token_sees_as_many_patches_as_its_kernel_says():
    """With the blocks asleep a pixel changes its own patch, or the patches around it too."""
    for kernel, reach in ((1, 0), (3, 1)):
        model, x = dit(kernel=kernel), torch.randn(1, 1, 16, 16)
        torch.nn.init.normal_(model.out.weight)
        for conv, other in ((model.embed, model.out), (model.out, model.embed)):
            kept = other.weight.clone()
            middle = torch.zeros_like(kept)
            middle[:, :, kernel // 2, kernel // 2] = kept[:, :, kernel // 2, kernel // 2]
            other.weight.copy_(middle)  # one of the two at a time
            brighter = x.clone()
            brighter[0, 0, 9, 5] += 3  # in the patch of row 2 and column 1
            change = (model(brighter, torch.tensor([5])) - model(x, torch.tensor([5]))).abs()
            changed = F.max_pool2d(change, 4)[0, 0] > 1e-5
            wanted = torch.zeros(4, 4, dtype=torch.bool)
            wanted[2 - reach:3 + reach, 1 - reach:2 + reach] = True
            assert torch.equal(changed, wanted), (kernel, conv, changed)
            other.weight.copy_(kept)


def test_dit_puts_each_patch_back_where_it_came_from(monkeypatch):
    """With the layers opened so that tokens pass unmixed, a bright patch stays in its place."""
    model = dit(width=64, patch=4)
    torch.nn.init.zeros_(model.embed.weight)
    torch.nn.init.eye_(model.embed.weight[:16, :, 0, 0])
    torch.nn.init.eye_(model.out.weight[:, :16, 0, 0])
    monkeypatch.setattr(cond, "positions_2d", lambda rows, columns, width, device=None:
                        torch.zeros(rows * columns, width, device=device))
    x = torch.zeros(1, 1, 16, 24)
    x[0, 0, 4:8, 8:12] = torch.arange(16.0).view(4, 4) / 15
    out = model(x, torch.tensor([1]), torch.tensor([0]))
    token = torch.cat([x[0, 0, 4:8, 8:12].flatten(), torch.zeros(48)])
    wanted = torch.nn.functional.layer_norm(token, (64,), eps=1e-6)[:16].view(4, 4)
    assert_close(out[0, 0, 4:8, 8:12], wanted, rtol=1e-4, atol=1e-5)
    out[0, 0, 4:8, 8:12] = 0
    assert not out.any()


@BOTH
@torch.no_grad()
def test_pictures_need_not_be_square(make):
    model, x = awake(make()), torch.randn(2, 1, 16, 24)
    t, y = torch.tensor([3, 900]), torch.tensor([1, 5])
    out = model(x, t, y)
    assert out.shape == x.shape
    assert_close(model(x[:1], t[:1], y[:1]), out[:1], rtol=1e-3, atol=1e-4)
    assert model(x.mT.contiguous(), t, y).shape == (2, 1, 24, 16)
    if make is dit:  # 4 rows and 6 columns of patches, each told its own place
        seen = []
        model.embed.register_forward_hook(lambda _, __, out: seen.append(out.flatten(2).mT))
        model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(x, t, y)
        wanted = cond.positions_2d(4, 6, 16).expand(2, 24, 16)
        assert_close(seen[1] - seen[0], wanted, rtol=1e-4, atol=1e-5)
    settings = replace(cond.Config(), S=2)
    drawn = cond.sample(settings, model, x, cond.make_schedule("linear", 4), y, 2.0)
    assert drawn.shape == x.shape


@BOTH
@torch.no_grad()
def test_the_networks_work_in_float64(make):
    model, x = awake(make()), torch.randn(2, 1, 16, 16)
    t, y = torch.tensor([3, 900]), torch.tensor([1, 5])
    single = model(x, t, y)
    double = model.double()(x.double(), t, y)
    assert double.dtype == torch.float64
    assert_close(double.float(), single, rtol=1e-3, atol=1e-3)
    classifier = awake(cond.NoisyClassifier(1, 5, 8, 4)).double()
    assert classifier(x.double(), t).dtype == torch.float64


@torch.no_grad()
def test_the_unet_hands_each_skip_to_its_twin_on_the_way_up():
    """What a level made going down is concatenated, last made first, going up."""
    model, made, got = awake(unet(blocks=2)), [], []
    model.conv_in.register_forward_hook(lambda _, __, out: made.append(out))
    for module in model.down:
        module.register_forward_hook(lambda _, __, out: made.append(out))
    for module in model.up:
        if isinstance(module, cond.Stage):
            module.register_forward_pre_hook(lambda _, args: got.append(args[0]))
    model(torch.randn(2, 1, 16, 16), torch.tensor([3, 9]))
    assert len(made) == len(got) == 6
    for skip, h in zip(reversed(made), got, strict=True):
        assert skip.abs().max() > 0.1
        assert torch.equal(h[:, -skip.shape[1]:], skip)


@torch.no_grad()
def test_the_unet_sees_its_input_through_the_skips_alone():
    """Where the middle is silenced, the picture still reaches the output."""
    model, t = awake(unet()), torch.tensor([5])
    model.mid2.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    a, b = (model(torch.randn(1, 1, 16, 16), t) for _ in range(2))
    assert (a - b).abs().max() > 0.05


@pytest.mark.parametrize("name, millions", [("dit_s", 33), ("dit_b", 130), ("dit_l", 458),
                                            ("dit_xl", 675)])
def test_dit_sizes_are_those_of_the_paper(name, millions):
    cfg = cond.PRESETS[name]
    with torch.device("meta"):
        model = cond.DiT(4, 32, cfg.dit_patch, cfg.dit_width, cfg.dit_depth, cfg.dit_heads, 1000)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / 1e6 - millions) < 0.005 * millions, count
    assert model(torch.empty(2, 4, 32, 32, device="meta"), torch.ones(2, device="meta"),
                 torch.zeros(2, dtype=torch.int64, device="meta")).shape == (2, 4, 32, 32)


def overfit(model, lr, steps):
    schedule = cond.make_schedule("linear", 1000)
    x0, y = torch.randn(8, 1, 16, 16).sign(), torch.arange(8) % 5
    t, eps = torch.linspace(50, 950, 8).long(), torch.randn(8, 1, 16, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        loss = cond.ddpm_loss(lambda x, t: model(x, t, y), x0, t, eps, schedule)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.slow
def test_the_unet_overfits_one_batch():
    assert overfit(unet(), 1e-2, steps=45) < 0.5


def test_the_dit_overfits_one_batch():
    assert overfit(dit(width=64), 3e-3, steps=80) < 0.3


@BOTH
def test_gradient_checkpointing_gives_the_same_gradients(make, tmp_path):
    """--grad_checkpointing: each block's activations are computed again, in the loop alone."""
    found = []
    x, t, y = torch.randn(2, 1, 16, 16), torch.tensor([3, 500]), torch.tensor([1, 2])
    for flags, times in ([], 1), (["--grad_checkpointing"], 2):
        torch.manual_seed(3)
        model, count = awake(make()).train(), []
        blocks = [m for m in model.modules() if isinstance(m, cond.ResBlock | cond.DiTBlock)]
        for block in blocks:
            block.norm1.register_forward_hook(lambda *_, count=count: count.append(1))
        _, run, _ = open_run(cond, tmp_path, *flags)
        for _ in run.steps(1, model=model, save=False):
            model(x, t, y).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(count) == times * len(blocks)
        count.clear()
        model(x, t, y).square().mean().backward()
        assert len(count) == len(blocks)
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


def test_the_noisy_classifier_sees_t_and_the_picture():
    classifier = awake(cond.NoisyClassifier(1, 5, 8, 4))
    x = torch.randn(2, 1, 28, 28)
    a, b = (classifier(x, torch.tensor([t, t])) for t in (10, 800))
    assert a.shape == (2, 5) and (a - b).abs().max() > 1e-4
    assert (a[0] - a[1]).abs().max() > 1e-4
    y = torch.tensor([1, 2])
    gradient = cond.classifier_gradient(classifier, x, torch.tensor([10, 10]), y)
    step = 1e-2 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def log_p(x):
        out = classifier(x, torch.tensor([10, 10])).log_softmax(1)
        return out.gather(1, y[:, None])[:, 0].detach()

    assert_close((log_p(x + step) - log_p(x - step)) / 2e-2, gradient.flatten(1).norm(dim=1),
                 rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("H, W", [(4, 4), (4, 12), (28, 28)])
def test_a_noisy_classifier_pools_pictures_of_every_size_to_two_by_two(H, W):
    """Of 4 x 4 pixels a single one is left, which stands for all four."""
    classifier, x, pooled = awake(cond.NoisyClassifier(1, 5, 8, 4)), torch.randn(3, 1, H, W), []
    classifier.norm_out.register_forward_hook(lambda _, __, out: pooled.append(F.silu(out)))
    classifier.out.register_forward_pre_hook(lambda _, args: pooled.append(args[0]))
    x.requires_grad_()
    logits = classifier(x, torch.tensor([3, 3, 900]))
    h, last = pooled
    h = h.repeat_interleave(2, 2) if H == 4 else h
    h = h.repeat_interleave(2, 3) if W == 4 else h
    assert_close(last, F.adaptive_avg_pool2d(h, 2).flatten(1))
    assert logits.shape == (3, 5) and (logits[0] - logits[1]).abs().max() > 1e-4
    gradient, = torch.autograd.grad(logits.log_softmax(1)[:, 2].sum(), x)
    assert gradient.isfinite().all() and (gradient.flatten(1).abs().amax(1) > 1e-6).all()
