"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel, arXiv 2006.11239).

    python ddpm_example.py                            train, draw 64 digits, make the figures
    python ddpm_example.py --sample --evaluate 500    score the newest run

Implemented here: the forward process (Eq. 2, 4), its posterior (Eq. 6, 7), the simple objective
(Eq. 14, Algorithm 1), ancestral sampling (Eq. 11, Algorithm 2, both choices of variance of Sec.
3.2), the variational bound (Eq. 5, 8) with the discrete decoder (Eq. 13), and the U-Net of Appendix
B.

Departures from the paper, in the laptop preset only (--preset paper has none of the first three):
  1. A small U-Net that works on 2x2 blocks of pixels as channels (`patch`), so that it trains on a
     CPU.
  2. AdamW with a cosine decay of the learning rate and a shorter average: few steps must do.
  3. The up path narrows before it doubles the resolution, which halves its widest convolution.
  4. x0_hat is clamped to [-1, 1] while sampling (`clip_x0`), as in the authors' code.

Measured on 2 CPU cores: the first command takes 348 s (326 s of training, 19 s for 64 samples of
1,000 steps) and 1.1 GB of memory. The second, 317 s: a digit classifier is sure of 78 % of 500
samples (of real digits: 97 %), Fréchet distance in its features 8.9 (held-out digits: 0.9), bound
2.14 bits/dim. Results: results/ddpm/. Not run on CUDA; the paper preset was not trained.
"""

import copy
import math
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common import metrics, plotting
from common.cli import check, fail, parse_args
from common.data import load_images
from common.device import Stopwatch, autocast, launch, peak_memory_mb
from common.plotting import plt
from common.runs import restore, resume_training, start


@dataclass(frozen=True)
class Config:
    # diffusion
    T: int = 1000                    # diffusion steps (paper: 1000)
    schedule: str = "linear"         # linear or cosine variance schedule (paper: linear)
    beta_1: float = 1e-4             # first variance of the linear schedule (paper: 1e-4)
    beta_T: float = 0.02             # last variance of the linear schedule (paper: 0.02)
    # sampling
    variance: str = "beta_tilde"     # of a reverse step: beta or beta_tilde (paper: both, Sec. 3.2)
    clip_x0: bool = True             # clamp the predicted x_0 to [-1, 1] while sampling
    n_samples: int = 64              # pictures drawn at the end
    # data
    dataset: str = "digits"          # digits, mnist, cifar10, folder:PATH, ... (paper: cifar10)
    image_size: int = 0              # resize the pictures to this size; 0 keeps theirs
    flip: bool = False               # mirror pictures at random (paper: yes; never for digits)
    # network
    channels: int = 32               # base width of the U-Net (paper: 128)
    mults: tuple[int, ...] = (1, 2)  # width of each level as a multiple (paper: 1 2 2 2)
    blocks: int = 1                  # residual blocks a level (paper: 2)
    attention: tuple[int, ...] = (7,)    # resolutions with self-attention (paper: 16)
    heads: int = 1                   # attention heads (paper: 1)
    groups: int = 8                  # groups of each group norm (paper: 32)
    dropout: float = 0.0             # dropout in the residual blocks (paper: 0.1)
    patch: int = 2                   # side of the pixel blocks made channels (paper: none, 1)
    # training
    steps: int = 8000                # optimiser steps (paper: 800000)
    batch_size: int = 32             # pictures a step, over all processes (paper: 128)
    lr: float = 2e-3                 # peak learning rate (paper: 2e-4)
    warmup: int = 200                # steps of linear learning-rate warm-up (paper: 5000)
    decay: str = "cosine"            # after the warm-up: cosine to 0, or constant (paper: constant)
    weight_decay: float = 0.0        # AdamW's weight decay; 0 makes it Adam (paper: 0)
    grad_clip: float = 1.0           # largest norm of the gradient (paper: 1)
    ema: float = 0.999               # decay of the average of the weights (paper: 0.9999)
    preview_every: int = 2000        # steps between previews and checkpoints


PRESETS = {
    "laptop": Config(),
    "smoke": Config(
        T=20, n_samples=4, channels=8, groups=4, steps=6, batch_size=8, warmup=2, preview_every=3),
    "paper": Config(variance="beta", dataset="cifar10", flip=True, channels=128, mults=(1, 2, 2, 2),
                    blocks=2, attention=(16,), groups=32, dropout=0.1, patch=1, steps=800_000,
                    batch_size=128, lr=2e-4, warmup=5000, decay="constant", ema=0.9999,
                    preview_every=5000),
}
SAMPLING = ("variance", "clip_x0", "n_samples")  # what may change when a trained model is loaded


def validate(cfg):
    """End the program with one line if a value is out of range."""
    check(cfg, T=">= 1", schedule=("linear", "cosine"), beta_1="(0, 1)", beta_T="(0, 1)",
          variance=("beta", "beta_tilde"), n_samples=">= 1", image_size=">= 0", channels=">= 4",
          mults=">= 1", blocks=">= 1", attention=">= 1", heads=">= 1", groups=">= 1",
          dropout="[0, 1)", patch=">= 1", steps=">= 1", batch_size=">= 1", lr="> 0", warmup=">= 0",
          decay=("cosine", "constant"), weight_decay=">= 0", grad_clip="> 0", ema="[0, 1)",
          preview_every=">= 1")
    if not cfg.mults:
        fail("--mults: needs at least one number")
    if cfg.channels % 2:
        fail(f"--channels {cfg.channels}: must be even (the time embedding pairs sine and cosine)")
    if cfg.channels % cfg.groups:
        fail(f"--groups {cfg.groups}: must divide --channels {cfg.channels}")
    if any(cfg.channels * mult % cfg.heads for mult in cfg.mults):
        fail(f"--heads {cfg.heads}: must divide the channels of every level "
             f"({' '.join(str(cfg.channels * mult) for mult in cfg.mults)})")


# %% 1. Forward process


@dataclass
class Schedule:
    """betas, alphas, alpha_bars: (T+1,) float32, indexed like the paper: [t] for t = 1..T, [0] is
    the clean image.
    """

    betas: torch.Tensor
    alphas: torch.Tensor
    alpha_bars: torch.Tensor

    @property
    def T(self):
        return len(self.betas) - 1

    def to(self, device):
        return Schedule(self.betas.to(device), self.alphas.to(device), self.alpha_bars.to(device))


def make_schedule(kind, T, beta_1=1e-4, beta_T=0.02):
    """The variances beta_1..beta_T of the forward process and what follows from them.

    kind "linear": Sec. 4 of the paper; beta_1 and beta_T are meant for T = 1000 and are rescaled
    for another T, so that x_T is noise all the same. kind "cosine": Eq. 17 of Nichol & Dhariwal,
    arXiv 2102.09672.
    """
    if kind == "linear":
        betas = torch.linspace(beta_1, beta_T, T, dtype=torch.float64) * 1000 / T
    elif kind == "cosine":
        u = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - f[1:] / f[:-1]
    else:
        raise ValueError(f"schedule {kind!r}: must be linear or cosine")
    betas = F.pad(betas.clamp(max=0.999), (1, 0))  # betas[0] = 0: t = 0 is the clean image
    alphas = 1 - betas
    alpha_bars = alphas.cumprod(0)
    return Schedule(betas.float(), alphas.float(), alpha_bars.float())


def q_step(x_prev, t, eps, schedule):
    """One forward step x_{t-1} -> x_t. x_prev, eps: (B, C, H, W), t: int or (B,) in 1..T. Source:
    Eq. 2.
    """
    beta = schedule.betas[t].view(-1, 1, 1, 1)
    return (1 - beta).sqrt() * x_prev + beta.sqrt() * eps  # Eq. 2


def q_sample(x0, t, eps, alpha_bars):
    """x_t given x_0. x0, eps: (B, C, H, W), t: int or (B,) int64 in 0..T. Source: Eq. 4."""
    alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps  # Eq. 4


def q_posterior(x0, xt, t, schedule):
    """Mean (B, C, H, W) and variance (broadcastable) of q(x_{t-1} | x_t, x_0), t: int or (B,).
    Source: Eq. 6, 7.

    At t = 1 the variance is 0 and the mean is x_0.
    """
    beta, alpha = schedule.betas[t].view(-1, 1, 1, 1), schedule.alphas[t].view(-1, 1, 1, 1)
    alpha_bar = schedule.alpha_bars[t].view(-1, 1, 1, 1)
    alpha_bar_prev = schedule.alpha_bars[t - 1].view(-1, 1, 1, 1)
    mean = (alpha_bar_prev.sqrt() * beta / (1 - alpha_bar) * x0
            + alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar) * xt)  # Eq. 7, mu_tilde
    variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)  # Eq. 7, beta_tilde
    return mean, variance


# %% 2. Training objective


def ddpm_loss(model, x0, schedule, t=None, eps=None):
    """The simple objective: mean squared error of the predicted noise. x0: (B, C, H, W) -> scalar.

    t: (B,) int64 in 1..T and eps like x0 are drawn unless they are given. Source: Eq. 14, Alg. 1.
    """
    if t is None:
        t = torch.randint(1, schedule.T + 1, (len(x0),), device=x0.device)  # Alg. 1, line 3
    if eps is None:
        eps = torch.randn_like(x0)  # Alg. 1, line 4
    xt = q_sample(x0, t, eps, schedule.alpha_bars)
    return F.mse_loss(model(xt, t), eps)  # Eq. 14; Alg. 1, line 5


@torch.no_grad()
def variational_bound(model, x0, schedule, variance="beta", clip_x0=True, ts=None):
    """The terms of the variational bound of 8-bit images x0: (B, C, H, W) in [-1, 1].

    Returns {"L_0", "L_t": {t: value}, "L_T", "total"} in bits per dimension, averaged over the
    images. L_t[t] is the term L_{t-1} of Eq. 5, t = 2..T. ts: the t at which it is computed (all
    when None); the sum then interpolates between them. Source: Eq. 5, 8, 13.
    """
    bits = 1 / math.log(2)
    alpha_bar_T = schedule.alpha_bars[-1]
    kl = 0.5 * (alpha_bar_T * x0**2 - alpha_bar_T - torch.log1p(-alpha_bar_T))  # Eq. 5, L_T
    L_T = kl.mean().item() * bits
    every = range(2, schedule.T + 1)
    ts = every if ts is None else ts
    L_t = {}
    for t in ts:
        xt = q_sample(x0, t, torch.randn_like(x0), schedule.alpha_bars)
        mean_q, variance_q = q_posterior(x0, xt, t, schedule)
        mean_p, _ = q_posterior(predict_x0(model, xt, t, schedule, clip_x0), xt, t, schedule)
        variance_p = variance_q if variance == "beta_tilde" else schedule.betas[t]
        ratio = variance_q / variance_p
        kl = 0.5 * (
            ratio - 1 - ratio.log() + (mean_q - mean_p) ** 2 / variance_p
        )  # Eq. 8, with its constant C
        L_t[t] = kl.mean().item() * bits
    x1 = q_sample(x0, 1, torch.randn_like(x0), schedule.alpha_bars)
    mean = predict_x0(
        model, x1, 1, schedule, clip_x0)  # beta_tilde_1 = 0: the posterior mean at t = 1 is x0_hat
    L_0 = -discrete_log_likelihood(x0, mean, schedule.betas[1].sqrt()).mean().item() * bits
    rate = float(np.interp(every, list(L_t), list(L_t.values())).sum()) if L_t else 0.0
    return {"L_0": L_0, "L_t": L_t, "L_T": L_T, "total": L_0 + rate + L_T}


def discrete_log_likelihood(x0, mean, sigma):
    """log of the Gaussian's mass in the bin of each 8-bit value x0 in [-1, 1], in nats, like x0.
    Source: Eq. 13.
    """
    upper = (x0 + 1 / 255 - mean) / sigma  # delta_+ of Eq. 13, open at 1
    lower = (x0 - 1 / 255 - mean) / sigma  # delta_- of Eq. 13, open at -1
    upper = upper.masked_fill(x0 > 0.999, torch.inf)
    lower = lower.masked_fill(x0 < -0.999, -torch.inf)
    flip = lower > 0  # the same mass from the lower tail, where it does not round to 1 - 1
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log1p(-torch.exp(log_lower - log_upper).clamp(max=1 - 1e-7))


# %% 3. Sampling


def predict_x0(model, xt, t, schedule, clip_x0=True):
    """The network's guess of x_0 behind x_t. xt: (B, C, H, W), t: int in 1..T -> like xt. Source:
    Eq. 15.
    """
    alpha_bar = schedule.alpha_bars[t]
    eps_hat = model(xt, torch.full((len(xt),), t, device=xt.device))
    x0_hat = (
        xt - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt()  # Eq. 15: Eq. 4 solved for x_0
    return x0_hat.clamp(-1, 1) if clip_x0 else x0_hat


@torch.no_grad()
def p_sample(model, xt, t, schedule, variance="beta_tilde", clip_x0=True):
    """One reverse step x_t -> x_{t-1}. xt: (B, C, H, W), t: int in 1..T. Source: Eq. 11, Alg. 2.

    variance: "beta" (best for x_0 ~ N(0, I)) or "beta_tilde" (best for a single x_0), Sec. 3.2. The
    mean is Eq. 7 at x0_hat, which without the clamp is Eq. 11.
    """
    x0_hat = predict_x0(model, xt, t, schedule, clip_x0)
    mean, beta_tilde = q_posterior(x0_hat, xt, t, schedule)  # Eq. 7 = Eq. 11
    sigma = (beta_tilde if variance == "beta_tilde" else schedule.betas[t]).sqrt()
    z = torch.randn_like(xt) if t > 1 else torch.zeros_like(xt)  # Alg. 2, line 3
    return mean + sigma * z  # Alg. 2, line 4


@torch.no_grad()
def sample(model, shape, schedule, variance="beta_tilde", clip_x0=True, xT=None, keep=(), bar=None):
    """Ancestral sampling from noise to images: (B, C, H, W). Source: Alg. 2.

    xT: the noise to start from (drawn when None). keep: the t at which x_t is recorded; if any,
    returns (x_0, {t: x_t}). bar: a tqdm that is advanced by one a network call.
    """
    xt = torch.randn(shape, device=schedule.betas.device) if xT is None else xT  # Alg. 2, line 1
    kept = {}
    for t in range(schedule.T, 0, -1):  # Alg. 2, line 2
        if t in keep:
            kept[t] = xt
        xt = p_sample(model, xt, t, schedule, variance, clip_x0)
        if bar is not None:
            bar.update()
    return (xt, kept) if keep else xt


# %% 4. Network


def timestep_embedding(t, dim):
    """Sinusoidal features of t: (B,) -> (B, dim). Source: App. B, after Vaswani et al., arXiv
    1706.03762.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - 1))
    angles = t.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def zero_init(layer):
    """A layer that starts as the zero map, so that its residual block starts as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding added in between. (B, c_in, H, W) -> (B, c_out,
    H, W).
    """

    def __init__(self, c_in, c_out, time_dim, groups, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the H*W positions. (B, C, H, W) -> the same shape."""

    def __init__(self, channels, heads, groups):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each (B, heads, H*W, C/heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution. (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """Double the resolution by nearest neighbour and convolve. (B, c_in, H, W) -> (B, c_out, 2H,
    2W).
    """

    def __init__(self, c_in, c_out):
        super().__init__()
        self.narrow = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.conv = nn.Conv2d(c_out, c_out, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(self.narrow(x), scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """eps_hat(x_t, t): x: (B, C, H, W), t: (B,) int64 or float -> (B, C, H, W). Source: App. B.

    H and W must be multiples of patch * 2^(levels - 1). attention: resolutions, counted after the
    patching, at which each residual block is followed by self-attention; the middle always has it.
    """

    def __init__(self, image_channels=3, image_size=32, channels=128, mults=(1, 2, 2, 2), blocks=2,
                 attention=(16,), heads=1, groups=32, dropout=0.1, patch=1,
                 grad_checkpointing=False):
        super().__init__()
        self.channels, self.patch, self.grad_checkpointing = channels, patch, grad_checkpointing
        self.multiple = patch * 2 ** (len(mults) - 1)
        time_dim = 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, time_dim), nn.SiLU(),
                                  nn.Linear(time_dim, time_dim))

        def stage(c_in, c_out):
            block = ResBlock(c_in, c_out, time_dim, groups, dropout)
            attend = Attention(c_out, heads, groups) if size in attention else nn.Identity()
            return nn.ModuleList([block, attend])

        c, size = channels, image_size // patch
        self.conv_in = nn.Conv2d(image_channels * patch**2, c, 3, padding=1)
        self.down, skips = nn.ModuleList(), [c]
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                self.down.append(stage(c, channels * mult))
                c = channels * mult
                skips.append(c)
            if level < len(mults) - 1:
                self.down.append(Downsample(c))
                skips.append(c)
                size //= 2

        self.mid1 = ResBlock(c, c, time_dim, groups, dropout)
        self.mid_attention = Attention(c, heads, groups)
        self.mid2 = ResBlock(c, c, time_dim, groups, dropout)

        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(stage(c + skips.pop(), channels * mult))
                c = channels * mult
            if level > 0:
                narrow = channels * mults[level - 1] if patch > 1 else c  # a narrow up path
                self.up.append(Upsample(c, narrow))
                c, size = narrow, size * 2
        self.norm_out = nn.GroupNorm(groups, c)
        self.conv_out = zero_init(nn.Conv2d(c, image_channels * patch**2, 3, padding=1))

    def _stage(self, stage, h, emb):
        block, attention = stage
        if self.grad_checkpointing and self.training:
            return attention(checkpoint(block, h, emb, use_reentrant=False))
        return attention(block(h, emb))

    def forward(self, x, t):
        emb = self.time(timestep_embedding(t, self.channels))
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for module in self.down:
            h = module(h) if isinstance(module, Downsample) else self._stage(module, h, emb)
            skips.append(h)
        h = self.mid2(self.mid_attention(self.mid1(h, emb)), emb)
        for module in self.up:
            if isinstance(module, Upsample):
                h = module(h)
            else:
                h = self._stage(module, torch.cat([h, skips.pop()], dim=1), emb)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


def make_unet(cfg, shape, grad_checkpointing=False):
    """The U-Net that cfg describes, for images of shape (C, H, W); one that cannot be is fatal."""
    C, H, W = shape
    multiple = cfg.patch * 2 ** (len(cfg.mults) - 1)
    if H % multiple or W % multiple:
        low = H // multiple * multiple
        sizes = ", ".join(str(s) for s in (low, low + multiple) if s > 0)
        fail(f"--image_size {H}: must be a multiple of {multiple} (patch {cfg.patch}, "
             f"{len(cfg.mults)} levels); nearest sizes that work: {sizes}")
    return UNet(C, H, cfg.channels, cfg.mults, cfg.blocks, cfg.attention, cfg.heads, cfg.groups,
                cfg.dropout, cfg.patch, grad_checkpointing)


class EMA:
    """An exponential moving average of a model's weights, in `ema.model`.

    The decay min(decay, (1 + n) / (10 + n)) lets it follow the fast first n steps; buffers are
    copied.
    """

    def __init__(self, model, decay):
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model, n):
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for mine, other in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(other)


# %% 5. Training


def learning_rate(cfg, step):
    """Linear warm-up over cfg.warmup steps, then constant or a cosine to zero at cfg.steps."""
    rate = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup, 1))
    if cfg.decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
    return rate


def train(cfg, run, data=None, state=None):
    """Algorithm 1. Returns the averaged (EMA) model in eval mode; writes log and checkpoint.

    data: common.data.Data (loaded from cfg.dataset when None); state: a checkpoint to go on from.
    Ends the program, naming the step, if the loss stops being finite; the last good checkpoint
    stays.
    """
    device, opts = run.device, run.opts
    data = load_images(cfg.dataset, cfg.image_size).to(device) if data is None else data
    shape = data.train.shape[1:]
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(device)
    model = make_unet(cfg, shape, opts.grad_checkpointing)
    model = model.to(device, memory_format=torch.channels_last)
    ema = EMA(model, cfg.ema)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=cfg.weight_decay,
                                  fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=opts.amp == "fp16")
    first = resume_training(state, model, ema.model, optimizer, run) if state else 0
    if cfg.batch_size % run.launch.world:
        fail(f"--batch_size {cfg.batch_size}: must be a multiple of {run.launch.world} processes")
    network = torch.compile(model) if opts.compile else model
    parameters = list(model.parameters())
    core, start_time, done, saved = Stopwatch(device), time.perf_counter(), first, first

    def save(step):
        run.save_checkpoint(step, {"model": model, "ema": ema.model}, optimizer, shape=list(shape))

    if first == 0:
        save(0)
    for step in run.steps(first, cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        # every process draws the same whole batch and takes its slice
        x0 = data.train[
            torch.randint(len(data.train), (cfg.batch_size,), device=device)]  # Alg. 1, line 2
        if cfg.flip:
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=device) < 0.5, x0.flip(3), x0)
        t = torch.randint(1, cfg.T + 1, (cfg.batch_size,), device=device)  # Alg. 1, line 3
        eps = torch.randn_like(x0)  # Alg. 1, line 4
        x0, t, eps = (run.launch.shard(z) for z in (x0, t, eps))
        with core:
            with autocast(device, opts.amp):
                loss = ddpm_loss(network, x0, schedule, t, eps)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()  # Alg. 1, line 5
            scaler.unscale_(optimizer)
            run.launch.average([p.grad for p in parameters] + [loss.detach()])
            value = loss.item()
            if not math.isfinite(value):
                fail(f"the loss is {value} at step {step + 1}, --lr {cfg.lr:g} may be too high; "
                     f"the last good checkpoint is that of step {saved} in {run.folder}")
            norm = nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
            scaler.step(optimizer)
            scaler.update()
        ema.update(model, step)
        done = step + 1
        run.log(done, loss=value, grad_norm=norm.item(), lr=learning_rate(cfg, step))
        run.bar.set_postfix(loss=f"{value:.4f}", refresh=False)
        if done % cfg.preview_every == 0 and done < cfg.steps:
            save(done)
            saved = done
            figure_preview(run, ema.model, data, schedule, done)
    save(done)
    seconds = time.perf_counter() - start_time
    before = run.read_metrics().get("train_seconds", 0.0) if state else 0.0
    run.add_metrics(steps=done, train_seconds=before + seconds,
                    steps_per_second=(done - first) / seconds,
                    share_outside_core=1 - core.seconds / seconds,
                    parameters=sum(p.numel() for p in parameters),
                    train_loss_last_500=sum(run.read_log()["loss"][-500:]) / min(500, done)
                    if run.launch.main else None)
    return ema.model


# %% 6. Figures and main


def figure_forward(run, data, schedule):
    """forward.png: pictures dissolving into noise."""
    x0 = data.test[:4]
    eps = torch.randn_like(x0)
    ts = [round(schedule.T * share) for share in (0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)]
    noisy = torch.stack([q_sample(x0, t, eps, schedule.alpha_bars) for t in ts], dim=1)
    plotting.save_rows(run.path("forward.png"), list(noisy),
                       "The forward process turns a picture into noise (Eq. 4)",
                       column_labels=[f"t = {t}" for t in ts])


def figure_schedules(run, cfg):
    """schedules.png: alpha_bar and log-SNR of both schedules, the one in use drawn thick."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for kind in ("linear", "cosine"):
        alpha_bars = make_schedule(kind, cfg.T, cfg.beta_1, cfg.beta_T).alpha_bars[1:].double()
        t, width = range(1, cfg.T + 1), 2.6 if kind == cfg.schedule else 1.2
        axes[0].plot(
            t, alpha_bars, label=kind + (" (used)" if kind == cfg.schedule else ""), lw=width)
        axes[1].plot(t, (alpha_bars / (1 - alpha_bars)).log(), lw=width)
    axes[0].set(xlabel="t", title=r"share of signal left, $\bar\alpha_t$")
    axes[0].legend(frameon=False)
    axes[1].set(
        xlabel="t", title=r"log signal-to-noise ratio, $\log\,\bar\alpha_t/(1-\bar\alpha_t)$")
    figure.tight_layout()
    plotting.finish(figure, run.path("schedules.png"))


@torch.no_grad()
def figure_loss(run, model, data, schedule, bins=10):
    """loss.png: the training loss, and the held-out loss by t: almost all of it is at small t."""
    log = run.read_log()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    if log:
        axes[0].plot(log["step"], log["loss"], lw=0.4, alpha=0.35)
        axes[0].plot(log["step"], plotting.smooth(log["loss"], 100), lw=1.8)
        axes[0].set(yscale="log")
    axes[0].set(xlabel="step", title="training loss (Eq. 14) and its running mean")
    edges = [1 + schedule.T * i // bins for i in range(bins + 1)]
    values, x0 = [], data.test[:200]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        t = torch.randint(low, max(high, low + 1), (len(x0),), device=x0.device)
        values.append(ddpm_loss(model, x0, schedule, t).item())
    axes[1].bar([(low + high) / 2 for low, high in zip(edges[:-1], edges[1:], strict=True)], values,
                width=0.9 * schedule.T / bins)
    axes[1].set(
        xlabel="t", yscale="log", title="held-out loss by t: little noise is hardest to see")
    figure.tight_layout()
    plotting.finish(figure, run.path("loss.png"))


@torch.no_grad()
def figure_preview(run, model, data, schedule, step):
    """preview.png: x0_hat of held-out x_t at a few t, one network call, no sampling."""
    if not run.launch.main:
        return
    x0 = data.test[:6]
    ts = [max(1, round(schedule.T * share)) for share in (0.1, 0.3, 0.5, 0.7)]
    generator = torch.Generator().manual_seed(
        0)  # its own, so that previews leave the training draws alone
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    rows = [x0]
    for t in ts:
        xt = q_sample(x0, t, eps, schedule.alpha_bars)
        rows += [xt, predict_x0(model, xt, t, schedule)]
    labels = ["held out"] + [label for t in ts for label in (f"x_t, t = {t}", "x0_hat")]
    plotting.save_rows(
        run.path("preview.png"), rows, f"What one network call recovers, step {step}", labels)


def figure_samples(run, samples, data):
    """samples.png and neighbours.png: samples beside real pictures and beside their nearest in the
    training set.
    """
    n = min(64, len(samples))
    columns = max(1, math.isqrt(n))
    plotting.save_panels(run.path("samples.png"),
                         [("samples", samples[:n]), ("real, held out", data.test[:n])],
                         "Drawn from noise, beside the real thing", columns)
    nearest, distance = metrics.nearest_neighbours(samples[:12], data.train)
    plotting.save_rows(run.path("neighbours.png"), [samples[:12], data.train[nearest]],
                       "Samples and their nearest training pictures: alike, not copied",
                       ["sample", "nearest"], [f"{d:.2f}" for d in distance.tolist()])


def figure_denoising(run, model, kept, x0, schedule, cfg):
    """denoising.png: x_t, and under it what the network takes for x_0; denoising.gif: the same,
    moving.
    """
    ts = sorted(kept, reverse=True)
    picks = [ts[i * (len(ts) - 1) // 8] for i in range(9)] if len(ts) >= 9 else ts
    rows, labels = [], []
    for i in range(min(3, len(x0))):
        rows.append(torch.stack([kept[t][i] for t in picks] + [x0[i]]))
        guesses = [
            predict_x0(model, kept[t][i : i + 1], t, schedule, cfg.clip_x0)[0] for t in picks]
        rows.append(torch.stack(guesses + [x0[i]]))
        labels += ["x_t", "x0_hat"]
    plotting.save_rows(run.path("denoising.png"), rows,
                       "From noise to a picture, and what the network takes it for", labels,
                       [f"t = {t}" for t in picks] + ["sample"])
    n = min(9, len(x0))
    frames = [kept[t][:n] for t in ts] + [x0[:n]]
    plotting.save_gif(run.path("denoising.gif"), frames, max(1, math.isqrt(n)),
                      [f"t = {t}" for t in ts] + ["t = 0"])


def figure_bound(run, bound):
    """bound.png: the variational bound term by term."""
    figure, axis = plt.subplots(figsize=(6, 3.4))
    axis.plot(list(bound["L_t"]), list(bound["L_t"].values()), marker=".", label=r"$L_{t-1}$, rate")
    axis.scatter([1], [bound["L_0"]], color="C3", zorder=3, label=r"$L_0$, distortion")
    axis.set(xlabel="t", ylabel="bits / dimension", xscale="log", yscale="log",
             title=f"The variational bound sums to {bound['total']:.2f} bits/dim\n"
                   f"(Eq. 5, computed at {len(bound['L_t']) + 1} values of t)")
    axis.legend(frameon=False)
    figure.tight_layout()
    plotting.finish(figure, run.path("bound.png"))


def draw(cfg, run, model, shape, schedule, n, keep=(), batch_size=100):
    """n samples in batches, with a progress bar. Returns (samples, kept x_t of the first batch,
    timings).
    """
    sizes = [min(batch_size, n - i) for i in range(0, n, batch_size)]
    inside, total = Stopwatch(run.device), Stopwatch(run.device)

    def timed(x, t):
        with inside:
            return model(x, t)

    parts, kept = [], {}
    with total, tqdm(total=cfg.T * len(sizes), desc=f"sample {n}", unit="call") as bar:
        for i, size in enumerate(sizes):
            out = sample(timed, (size, *shape), schedule, cfg.variance, cfg.clip_x0,
                         keep=keep if i == 0 else (), bar=bar)
            x, kept = out if keep and i == 0 else (out, kept)
            parts.append(x)
    return (torch.cat(parts), kept,
            {"seconds": total.seconds, "share_outside_network": 1 - inside.seconds / total.seconds})


def main(argv=None):
    """Read the command line, train (or load), sample, draw the figures, measure."""
    begin = time.perf_counter()
    cfg, opts = parse_args(Config, PRESETS, argv, SAMPLING)
    validate(cfg)
    place = launch(opts.device)
    autocast(place.device, opts.amp)  # refuses what this device cannot do, before anything is made
    cfg, run, state = start("ddpm", Config, cfg, opts, place, validate)
    data = load_images(cfg.dataset, cfg.image_size).to(place.device)
    if opts.evaluate and data.train_labels is None:
        fail(f"--evaluate {opts.evaluate}: --dataset {cfg.dataset} has no labels to score by")
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(place.device)
    if opts.sample is None:
        model = train(cfg, run, data, state)
    else:
        model = make_unet(cfg, state["shape"]).eval()
        model = model.to(place.device, memory_format=torch.channels_last)
        restore(model, state["ema"])
    if not place.main:
        return
    run.say(f"writing to {run.folder}")
    shape = tuple(data.train.shape[1:])
    keep = {max(1, round(cfg.T * (1 - i / 32))) for i in range(32)}
    samples, kept, timing = draw(cfg, run, model, shape, schedule, cfg.n_samples, keep)
    run.add_metrics(sampling=timing | {"n": cfg.n_samples, "network_calls": cfg.T})

    figure_forward(run, data, schedule)
    figure_schedules(run, cfg)
    figure_loss(run, model, data, schedule)
    figure_samples(run, samples, data)
    figure_denoising(run, model, kept, samples, schedule, cfg)
    classifier, judged = metrics.load_classifier(data)
    distance = metrics.nearest_neighbours(samples, data.train)[1]
    found = {"nearest_train_rms_mean": distance.mean().item(),
             "nearest_train_rms_min": distance.min().item()}
    if classifier:
        found |= {"sure": metrics.sure_share(metrics.probabilities(classifier, samples)),
                  "classifier": judged}
    run.add_metrics(samples=found)
    strided = sorted({round(2 * (cfg.T / 2) ** (i / 49)) for i in range(50)} & set(range(2, cfg.T)))
    x0 = data.test[:100 if opts.evaluate else 50]
    bound = variational_bound(model, x0, schedule, cfg.variance, cfg.clip_x0,
                              None if opts.evaluate or cfg.T <= 50 else strided)
    figure_bound(run, bound)
    run.add_metrics(bits_per_dim={  # rate and distortion as in Sec. 4.3
        "images": len(x0), "t_used": len(bound["L_t"]) + 1, "variance": cfg.variance,
        "total": bound["total"], "rate": bound["total"] - bound["L_0"], "distortion": bound["L_0"],
        "L_T": bound["L_T"]})
    if opts.evaluate:
        many, _, timing = draw(cfg, run, model, shape, schedule, opts.evaluate)
        run.add_metrics(evaluation=metrics.quality(many, data, classifier) | timing)
        plotting.save_grid(run.path("evaluated.png"), many[:100], 10,
                           f"The first {min(100, len(many))} of {len(many)} samples")
    run.add_metrics(config=asdict(cfg), total_seconds=time.perf_counter() - begin,
                    peak_memory_mb=peak_memory_mb(place.device))
    run.report()


if __name__ == "__main__":
    main()
