"""The networks of Sec. 4.4: NCSN++ and DDPM++ in place of the page's small U-Net.

    python experiments/ncsnpp.py                    a small NCSN++ of digits (VE)
    python experiments/ncsnpp.py --sde vp --no-fir --no-progressive_input    DDPM++
    python experiments/ncsnpp.py --sample           draw from the newest run
    python experiments/ncsnpp.py --preset ncsnpp    the paper's, for CIFAR-10 on a GPU

samples.png, preview.png, denoising.gif, loss.png    as of the page

The SDEs, the loss and the samplers are those of the page
score_based_diffusion_example.py; new here is the network of App. H ([SDE], arXiv
2011.13456), each of whose options is a flag. NCSN++ has all of them, and random Fourier
features of the time; DDPM++ has `skip_rescale` and `biggan`.

Departures from the paper: those of the page (`--preset ncsnpp` and `ddpmpp` keep its 3,
4, 6 and 7), PyTorch's initial weights, and its 1e-5 in the group norms. The authors'
code has uniform weights scaled by the mean of both fans, and 1e-6.
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent))
import score_based_diffusion_example as sb  # noqa: E402
from common import plotting, quality  # noqa: E402
from common.cli import check_sizes, command_line  # noqa: E402
from common.data import load_images  # noqa: E402
from common.run import open_run  # noqa: E402


@dataclass(frozen=True)
class Config(sb.Config):
    """The page's settings, and the options of App. H."""

    sde: Literal["ve", "vp", "subvp"] = "ve"  # forward SDE (NCSN++: ve, DDPM++: vp)
    fir: bool = True                # anti-aliased resampling (NCSN++: yes, DDPM++: no)
    skip_rescale: bool = True       # scale residual sums by 1 / sqrt(2) (both: yes)
    biggan: bool = True             # resample inside residual blocks (both: yes)
    progressive_input: bool = True  # the input at every level (NCSN++: yes, DDPM++: no)


SAMPLING = sb.SAMPLING

# Tab. 3 of the paper, "cont.": CIFAR-10, App. H
PAPER = dict(
    dataset="cifar10", flip=True, dequantize=False, channels=128, mults=(1, 2, 2, 2),
    blocks=4, attention=(16,), groups=32, dropout=0.1, patch=1, weighting="simple",
    steps=1_300_000, batch_size=128, lr=2e-4, warmup=5000, decay="constant",
    preview_every=5000, N=1000, tolerance=1e-5, clip_x0=False)
PRESETS = {
    "laptop": Config(),
    "smoke": Config(
        channels=8, groups=4, steps=6, batch_size=8, warmup=2, preview_every=3, N=5,
        tolerance=0.1, likelihood=2, n_samples=4),
    "ncsnpp": Config(**PAPER, sampler="pc", ema=0.999),
    "ddpmpp": Config(**PAPER, sde="vp", fir=False, progressive_input=False,
                     sampler="em", ema=0.9999),
}


# %% 1. Resampling (App. H.1)


def fir_filter(x):
    """Blur by the filter (1, 3, 3, 1) both ways. (B, C, H, W) -> (B, C, H + 1, W + 1).

    Source: [SDE] App. H.1, item 1, after StyleGAN-2, arXiv 1912.04958.
    """
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    kernel = (taps[:, None] * taps[None, :]).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (2, 2, 2, 2)), kernel, groups=x.shape[1])


def shrink(x, fir=False):
    """Halve the resolution without weights, by averages or by the FIR filter."""
    return fir_filter(x)[:, :, 1::2, 1::2] if fir else F.avg_pool2d(x, 2)


def grow(x, fir=False):
    """Double the resolution without weights, by copies or by the FIR filter."""
    if not fir:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    B, C, H, W = x.shape
    spread = x.new_zeros(B, C, H, 2, W, 2)  # each pixel is followed by zeros
    spread[:, :, :, 0, :, 0] = x
    return 4 * fir_filter(spread.view(B, C, 2 * H, 2 * W))[:, :, :-1, :-1]


class Downsample(nn.Module):
    """A convolution with a stride of 2: (B, c_in, H, W) -> (B, c_out, H/2, W/2).

    With fir it follows the FIR filter, whose edge then is its padding. The time is not
    used.
    """

    def __init__(self, c_in, c_out, fir):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride=2, padding=0 if fir else 1)
        self.fir = fir

    def forward(self, x, emb=None):
        return self.conv(fir_filter(x) if self.fir else x)


class Upsample(nn.Module):
    """Double the resolution, then a convolution: (B, c_in, H, W) -> (B, c_out, 2H, 2W).

    The time is not used.
    """

    def __init__(self, c_in, c_out, fir):
        super().__init__()
        self.narrow = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.conv = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.fir = fir

    def forward(self, x, emb=None):
        return self.conv(grow(self.narrow(x), self.fir))


class ResampleBlock(sb.ResBlock):
    """A residual block that resamples inside, as BigGAN's does. Source: App. H.1.

    resample: a function of x alone. rescale: the factor of the residual sum.
    """

    def __init__(self, c_in, c_out, time_dim, groups, dropout, resample, rescale):
        super().__init__(c_in, c_out, time_dim, groups, dropout)
        self.resample, self.rescale = resample, rescale
        self.skip = nn.Conv2d(c_in, c_out, 1)  # also where the widths agree

    def forward(self, x, emb):
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        h = h + self.time(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (self.skip(self.resample(x)) + h) * self.rescale


# %% 2. Network (App. H)


class Stage(nn.ModuleList):
    """A residual block and perhaps self-attention; rescale: the factor of each sum."""

    def __init__(self, block, attention, rescale):
        super().__init__([block] if attention is None else [block, attention])
        self.rescale = rescale

    def forward(self, x, emb):
        block, *attention = self
        h = block(x, emb) * self.rescale
        for attend in attention:
            h = attend(h) * self.rescale
        return h


class UNet(nn.Module):
    """The page's U-Net with the options of App. H. x: (B, C, H, W), t: (B,) -> like x.

    fir, skip_rescale, biggan, progressive_input: see Config. Self-attention follows
    each block on the way down, but only the last one on the way up.
    """

    def __init__(self, image_channels=3, image_size=32, channels=128,
                 mults=(1, 2, 2, 2), blocks=4, attention=(16,), heads=1, groups=32,
                 dropout=0.1, patch=1, fourier=False, fir=False, skip_rescale=False,
                 biggan=False, progressive_input=False):
        super().__init__()
        check_sizes(image_size, channels, mults, attention, heads, groups, patch)
        self.channels, self.patch = channels, patch
        self.levels, self.blocks = len(mults), blocks
        # [SDE] App. H.1, item 2: h -> (x + h) / sqrt(2)
        self.rescale = rescale = math.sqrt(0.5) if skip_rescale else 1.0
        widths = [channels * mult for mult in mults]
        sizes = [image_size // patch // 2**level for level in range(len(mults))]
        time_dim, image_channels = 4 * channels, image_channels * patch**2
        self.fourier = sb.FourierFeatures(channels) if fourier else None
        self.time = nn.Sequential(
            nn.Linear(2 * channels if fourier else channels, time_dim), nn.SiLU(),
            nn.Linear(time_dim, time_dim))

        def stage(c_in, c_out, attends):
            block = sb.ResBlock(c_in, c_out, time_dim, groups, dropout)
            attention = sb.Attention(c_out, heads, groups) if attends else None
            return Stage(block, attention, rescale)

        def resampler(c_in, c_out, resample, plain):
            if not biggan:
                return plain(c_in, c_out, fir)
            return ResampleBlock(c_in, c_out, time_dim, groups, dropout,
                                 partial(resample, fir=fir), rescale)

        self.conv_in = nn.Conv2d(image_channels, channels, 3, padding=1)
        self.down, c, skips = nn.ModuleList(), channels, [channels]
        self.pyramid, c_pyramid = nn.ModuleList(), image_channels
        for level, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            for _ in range(blocks):
                self.down.append(stage(c, width, size in attention))
                c = width
                skips.append(c)
            if level < len(mults) - 1:
                self.down.append(resampler(c, c, shrink, Downsample))
                skips.append(c)
                if progressive_input:
                    self.pyramid.append(Downsample(c_pyramid, c, fir))
                    c_pyramid = c

        self.mid = nn.ModuleList([stage(c, c, True), stage(c, c, False)])

        self.up = nn.ModuleList()
        for level in reversed(range(len(mults))):
            for i in range(blocks + 1):
                attends = sizes[level] in attention and i == blocks
                self.up.append(stage(c + skips.pop(), widths[level], attends))
                c = widths[level]
            if level > 0:
                # with patches the width falls before the resolution doubles: cheaper
                c_up = widths[level - 1] if patch > 1 else c
                self.up.append(resampler(c, c_up, grow, Upsample))
                c = c_up
        self.norm_out = nn.GroupNorm(groups, c)
        self.conv_out = sb.zero_init(nn.Conv2d(c, image_channels, 3, padding=1))

    def forward(self, x, t):
        fourier = self.fourier
        emb = sb.timestep_embedding(t, self.channels) if fourier is None else fourier(t)
        emb = self.time(emb.to(x.dtype))                            # (B, 4 channels)
        pyramid = F.pixel_unshuffle(x, self.patch)          # (B, C p^2, H/p, W/p)
        h = self.conv_in(pyramid)                           # (B, channels, H/p, W/p)
        down, up, skips = iter(self.down), iter(self.up), [h]
        for level in range(self.levels):
            for _ in range(self.blocks):
                h = next(down)(h, emb)
                skips.append(h)
            if level < self.levels - 1:
                h = next(down)(h, emb)                      # half the resolution
                if self.pyramid:  # the input itself, at this resolution, is added
                    pyramid = h = (self.pyramid[level](pyramid) + h) * self.rescale
                skips.append(h)
        for stage in self.mid:
            h = stage(h, emb)
        for level in reversed(range(self.levels)):
            for _ in range(self.blocks + 1):
                h = next(up)(torch.cat([h, skips.pop()], dim=1), emb)
            if level > 0:
                h = next(up)(h, emb)                        # twice the resolution
        h = self.conv_out(F.silu(self.norm_out(h)))         # (B, C p^2, H/p, W/p)
        return F.pixel_shuffle(h, self.patch)               # (B, C, H, W)


def make_network(cfg, shape):
    """The network that cfg describes, for images (C, H, W); it holds sigma_data."""
    network = UNet(
        shape[0], shape[1], cfg.channels, cfg.mults, cfg.blocks, cfg.attention,
        cfg.heads, cfg.groups, cfg.dropout, cfg.patch, fourier=cfg.sde == "ve",
        fir=cfg.fir, skip_rescale=cfg.skip_rescale, biggan=cfg.biggan,
        progressive_input=cfg.progressive_input)
    network.register_buffer("sigma_data", torch.tensor(0.5))
    return network


# %% 3. Main


@command_line
def main(argv=None):
    """Train a network, or load one; then draw images, and score them if asked to."""
    cfg, run = open_run("ncsnpp", Config, PRESETS, SAMPLING, argv)
    data = run.load(load_images, cfg.dataset, cfg.image_size)
    sde = sb.make_sde(cfg)
    sb.check_settings(run, cfg, sde, data)
    if run.sampling:
        model = run.trained(make_network(cfg, data.shape))
    else:
        model = sb.train(cfg, run, data, make_network(cfg, data.shape))
    if not run.main:
        return  # of several processes only the first one draws

    score = sb.score_fn(model, sde, cfg.std_floor, cfg.clip_x0)

    def states(batch):
        xT = sde.prior_sampling((len(batch), *data.shape), run.device)
        return sb.sampling_process(cfg, score, sde, xT)

    samples, timing = run.draw(cfg.n_samples, states, model, cfg.N)
    run.add_metrics(sampling=timing | {"sampler": cfg.sampler},
                    samples=quality.glance(samples, data))
    plotting.samples(run.path("samples.png"), samples, data, "Drawn from noise")
    sb.figure_denoising(run, sde, states(range(9)))
    sb.figure_loss(run, model, sde, data)
    sb.measure_likelihood(run, cfg, model, sde, data)
    run.evaluate(states, model, cfg.N, data)
    run.finish()


if __name__ == "__main__":
    main()
