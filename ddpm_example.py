"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel, arXiv 2006.11239): [DDPM]

    python ddpm_example.py                            train and draw digits
    python ddpm_example.py --sample --evaluate 500    score samples of the newest run
    python experiments/ddpm.py                        more figures, the bound

The page follows the paper: the forward process (Eq. 2, 4) and its posterior (Eq. 6, 7),
the simple objective (Eq. 14, Alg. 1), ancestral sampling (Alg. 2), the U-Net (App. B)
and the variational bound (Eq. 5, 8, 12) with its discrete decoder (Eq. 13).

Departures from the paper (`--preset paper` undoes 1, 2, 3, 5 and 6):
  1. the U-Net is small and works on 2x2 blocks of pixels (`patch`), so that it trains
     on a CPU, and its up path narrows before it doubles the resolution;
  2. the learning rate decays, and the average of the weights is shorter;
  3. training draws more of the middle t (`drawing`; results/ideas.md);
  4. the average follows the weights faster in the first steps (EMA);
  5. sampling multiplies eps_hat by `eps_scale`: images of a small network are pale;
  6. the variance is beta_tilde, as in the authors' code for LSUN (for CIFAR-10: beta);
  7. initial weights, padding and the epsilon of the group norms are PyTorch's;
  8. x0_hat is clamped (`clip_x0`), as in the authors' code.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import plotting, quality
from common.cli import (Count, Fraction, Mistake, NonNegative, OpenFraction, Positive,
                        Whole, check_sizes, command_line)
from common.data import load_images
from common.run import open_run

Drawing = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class Config:
    """Each field is a flag. Its type gives the range, its comment is the help text."""

    # diffusion
    T: Count = 1000              # diffusion steps (paper: 1000)
    schedule: Literal["linear", "cosine"] = "linear"  # noise schedule (paper: linear)
    beta_1: OpenFraction = 1e-4  # linear schedule: beta_1 for T = 1000 (paper: 1e-4)
    beta_T: OpenFraction = 0.02  # linear schedule: beta_T for T = 1000 (paper: 0.02)
    # sampling
    variance: Literal["beta", "beta_tilde"] = "beta_tilde"  # sigma_t^2 (paper: either)
    clip_x0: bool = True         # clamp x0_hat to [-1, 1] in sampling (code: yes)
    eps_scale: Positive = 1.2    # factor of eps_hat in sampling (paper: 1)
    n_samples: Count = 64        # number of images drawn at the end
    # data
    dataset: str = "digits"      # digits, mnist, folder:PATH, ... (paper: cifar10)
    image_size: Whole = 0        # resize images to this resolution; 0 keeps theirs
    flip: bool = False           # mirror images at random (paper: yes; not for digits)
    # network
    channels: Count = 32         # width of the U-Net, even, at least 4 (code: 128)
    mults: tuple[Count, ...] = (1, 2)    # relative width of each level (code: 1 2 2 2)
    blocks: Count = 1            # residual blocks per level (paper: 2)
    attention: tuple[Count, ...] = (7,)  # in patches, where attention is (paper: 16)
    heads: Count = 1             # attention heads (code: 1)
    groups: Count = 8            # groups in each group norm (code: 32)
    dropout: Fraction = 0.0      # dropout in the residual blocks (paper: 0.1)
    patch: Count = 2             # patch x patch pixels become channels (paper: 1)
    # training
    drawing: Drawing = "logit_normal"  # distribution of t in training (paper: uniform)
    steps: Count = 4800          # optimiser steps (paper: 800000)
    batch_size: Count = 32       # images per step, over all processes (paper: 128)
    lr: Positive = 2e-3          # peak learning rate (paper: 2e-4)
    warmup: Whole = 200          # steps of learning-rate warm-up (code: 5000)
    decay: Literal["cosine", "constant"] = "cosine"  # decay of lr (paper: constant)
    weight_decay: NonNegative = 0.0  # AdamW's weight decay; 0 gives Adam (paper: 0)
    grad_clip: Positive = 1.0    # largest norm of the gradient (code: 1)
    ema: Fraction = 0.999        # decay of the averaged weights (paper: 0.9999)
    preview_every: Count = 1000  # steps between previews and checkpoints


# The fields that may change after training
SAMPLING = ("variance", "clip_x0", "eps_scale", "n_samples")

PRESETS = {
    "laptop": Config(),
    "smoke": Config(
        T=20, channels=8, groups=4, steps=6, batch_size=8, warmup=2, preview_every=3,
        n_samples=4),
    "paper": Config(  # CIFAR-10, [DDPM] App. B
        dataset="cifar10", flip=True, channels=128, mults=(1, 2, 2, 2), blocks=2,
        attention=(16,), groups=32, dropout=0.1, patch=1, steps=800_000, batch_size=128,
        lr=2e-4, warmup=5000, decay="constant", ema=0.9999, preview_every=5000,
        drawing="uniform", variance="beta", eps_scale=1.0),
}


# %% 1. Forward process ([DDPM] Sec. 2)


class Schedule(NamedTuple):
    """betas, alphas and alpha_bars, each of shape (T+1,).

    The index is the paper's t. At index 0 stands the clean image: beta 0, alpha_bar 1.
    """

    betas: torch.Tensor
    alphas: torch.Tensor
    alpha_bars: torch.Tensor

    @property
    def T(self):
        return len(self.betas) - 1

    def to(self, device):
        return Schedule(*(array.to(device) for array in self))


def make_schedule(kind, T, beta_1=1e-4, beta_T=0.02):
    """The variances beta_1..beta_T of the forward process, and the products of alpha.

    "linear": [DDPM] Sec. 4; beta_1 and beta_T are those of T = 1000, and are rescaled
    for another T so that x_T is still noise. "cosine": arXiv 2102.09672, Eq. 17.
    """
    if kind != "cosine" and not 1e-6 <= beta_1 <= beta_T:
        raise Mistake(f"beta_1 {beta_1}: must be in [1e-6, --beta_T {beta_T}]")
    if kind == "linear":
        betas = torch.linspace(beta_1, beta_T, max(T, 2), dtype=torch.float64)
        betas = betas[-T:] * 1000 / T  # a single step has beta_T: x_1 is noise
    elif kind == "cosine":
        u = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - f[1:] / f[:-1]
    else:
        raise Mistake(f"schedule {kind}: must be one of linear, cosine")
    betas = F.pad(betas.clamp(max=0.999), (1, 0))  # betas[0] = 0: the clean image
    alphas = 1 - betas
    # [DDPM] Sec. 2: alpha_bar_t = alpha_1 alpha_2 ... alpha_t
    alpha_bars = alphas.cumprod(0)
    return Schedule(betas.float(), alphas.float(), alpha_bars.float())


def q_step(x_prev, t, eps, schedule):
    """One forward step, x_{t-1} -> x_t. x_prev, eps: (B, C, H, W); t: int or (B,)."""
    beta = schedule.betas[t].view(-1, 1, 1, 1)
    # [DDPM] Eq. 2: q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)
    return (1 - beta).sqrt() * x_prev + beta.sqrt() * eps


def q_sample(x0, t, eps, alpha_bars):
    """x_t, given x_0. x0, eps: (B, C, H, W); t: int or (B,) int64 in 0..T."""
    alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
    # [DDPM] Eq. 4: q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps


def beta_tilde(t, schedule):
    """The variance of q(x_{t-1} | x_t, x_0); 0 at t = 1. t: int or (B,) in 1..T."""
    beta, alpha_bars = schedule.betas[t], schedule.alpha_bars
    # [DDPM] Eq. 7: beta_tilde_t = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t
    return (1 - alpha_bars[t - 1]) / (1 - alpha_bars[t]) * beta


def q_posterior(x0, xt, t, schedule):
    """Mean (B, C, H, W) and variance of q(x_{t-1} | x_t, x_0). Source: [DDPM] Eq. 6, 7.

    x0, xt: (B, C, H, W); t: int or (B,) in 1..T.
    """
    beta, alpha, alpha_bar = (array[t].view(-1, 1, 1, 1) for array in schedule)
    alpha_bar_prev = schedule.alpha_bars[t - 1].view(-1, 1, 1, 1)
    # [DDPM] Eq. 7: mu_tilde = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0
    #         + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t
    mu_tilde = (alpha_bar_prev.sqrt() * beta / (1 - alpha_bar) * x0
                + alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar) * xt)
    return mu_tilde, beta_tilde(t, schedule).view(-1, 1, 1, 1)


# %% 2. Training objective ([DDPM] Sec. 3.4)


def ddpm_loss(model, x0, t, eps, schedule):
    """The simple objective. x0, eps: (B, C, H, W); t: (B,) int64 in 1..T -> scalar.

    It is the bound with every weight of Eq. 12 set to 1, so the terms of small t count
    for less. This takes the mean over pixels where the paper takes their sum.
    """
    # [DDPM] Eq. 14: E |eps - eps_theta(sqrt(alpha_bar_t) x_0
    #                                   + sqrt(1 - alpha_bar_t) eps, t)|^2
    xt = q_sample(x0, t, eps, schedule.alpha_bars)
    return F.mse_loss(model(xt, t), eps)


def draw_t(n, T, drawing):
    """Draw the steps t of a batch: (n,) int64 in 1..T, on the CPU.

    "uniform" is [DDPM] Alg. 1, line 3. "logit_normal" draws the middle t more often,
    since they decide what an image shows: logit(t / T) is N(-0.2, 0.8^2), after arXiv
    2403.03206, Sec. 3.1. Each of n equal quantiles gives one t, so batches differ less.
    One t in sixteen is uniform: small t, which weigh most in the bound, would otherwise
    be too rare.
    """
    if drawing == "uniform":
        return torch.randint(1, T + 1, (n,))
    u = (torch.arange(n) + torch.rand(n)) / n
    fraction = torch.sigmoid(0.8 * torch.special.ndtri(u) - 0.2)
    fraction = torch.where(torch.rand(n) < 1 / 16, torch.rand(n), fraction)
    return (1 + (T * fraction).long()).clamp(max=T)


# %% 3. Sampling ([DDPM] Sec. 3.2)


def predict_x0(xt, eps_hat, t, alpha_bars):
    """x0_hat, the image behind x_t if its noise is eps_hat. t: int or (B,) in 0..T."""
    alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
    # [DDPM] Eq. 15: x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_bar_t)
    return (xt - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt()


def clip_eps(xt, eps_hat, t, alpha_bars):
    """The eps_hat of the clamped x0_hat in [-1, 1]. t: int or (B,) in 1..T."""
    alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
    x0_hat = predict_x0(xt, eps_hat, t, alpha_bars).clamp(-1, 1)
    # Eq. 15 for eps_hat: (x_t - sqrt(alpha_bar_t) x0_hat) / sqrt(1 - alpha_bar_t)
    return (xt - alpha_bar.sqrt() * x0_hat) / (1 - alpha_bar).sqrt()


def p_theta(model, xt, t, schedule, variance="beta_tilde", clip_x0=True):
    """Mean (B, C, H, W) and variance of p_theta(x_{t-1} | x_t). t: int in 1..T.

    variance: "beta" is optimal if x_0 ~ N(0, I), "beta_tilde" if x_0 is one fixed point
    ([DDPM] Sec. 3.2).
    """
    beta, alpha, alpha_bar = (array[t] for array in schedule)
    eps_hat = model(xt, torch.full((len(xt),), t, device=xt.device))
    if clip_x0:
        eps_hat = clip_eps(xt, eps_hat, t, schedule.alpha_bars)
    # [DDPM] Eq. 11: (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_t)
    mean = (xt - beta / (1 - alpha_bar).sqrt() * eps_hat) / alpha.sqrt()
    sigma2 = beta if variance == "beta" else beta_tilde(t, schedule)
    return mean, sigma2


@torch.no_grad()
def reverse_process(model, xT, schedule, variance="beta_tilde", clip_x0=True):
    """[DDPM] Alg. 2. Yields (T, x_T), (T - 1, x_{T-1}), ..., (0, x_0).

    xT: (B, C, H, W), standard normal noise.
    """
    xt = xT                                                            # Alg. 2, line 1
    for t in range(schedule.T, 0, -1):                                 # line 2
        yield t, xt
        z = torch.randn_like(xt) if t > 1 else torch.zeros_like(xt)    # line 3
        mean, sigma2 = p_theta(model, xt, t, schedule, variance, clip_x0)
        xt = mean + sigma2.sqrt() * z                                  # line 4
    yield 0, xt


def sample(model, shape, schedule, variance="beta_tilde", clip_x0=True, xT=None):
    """Draw images of shape (B, C, H, W), starting from xT (fresh noise if None)."""
    xT = torch.randn(shape, device=schedule.betas.device) if xT is None else xT
    for _, xt in reverse_process(model, xT, schedule, variance, clip_x0):
        pass
    return xt


# %% 4. Network ([DDPM] App. B)


def timestep_embedding(t, dim):
    """Sines, then cosines of t: (B,) -> (B, dim). Source: arXiv 1706.03762, Sec. 3.5.

    The order and the frequencies are those of [DDPM]'s code; the source alternates
    sines and cosines, and divides k by dim / 2.
    """
    # sin(w_k t) and cos(w_k t), where w_k = 10000^(-k / (dim / 2 - 1))
    k, last = torch.arange(dim // 2, device=t.device), dim // 2 - 1
    frequencies = torch.exp(-math.log(10000) * k / last)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def zero_init(layer):
    """Set a layer to zero: residual blocks start as the identity, eps_hat as 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """Two convolutions, with the time added in between."""

    recompute = True  # --grad_checkpointing: not stored, computed again going back

    def __init__(self, c_in, c_out, time_dim, groups, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):  # (B, c_in, H, W), (B, time_dim)
        h = self.conv1(F.silu(self.norm1(x)))               # (B, c_out, H, W)
        h = h + self.time(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the H W positions. (B, C, H, W) -> the same shape."""

    def __init__(self, channels, heads, groups):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)           # (B, heads, H W, C / heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class Stage(nn.ModuleList):
    """A residual block, followed by self-attention where `attends` is true."""

    def __init__(self, c_in, c_out, time_dim, groups, dropout, heads, attends):
        super().__init__([
            ResBlock(c_in, c_out, time_dim, groups, dropout),
            Attention(c_out, heads, groups) if attends else nn.Identity()])

    def forward(self, x, emb):
        block, attention = self
        return attention(block(x, emb))


class Downsample(nn.Module):
    """Halve the resolution with a stride of 2. (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """Double the resolution by copying. (B, c_in, H, W) -> (B, c_out, 2H, 2W)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.narrow = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.conv = nn.Conv2d(c_out, c_out, 3, padding=1)

    def forward(self, x):
        x = F.interpolate(self.narrow(x), scale_factor=2.0, mode="nearest")
        return self.conv(x)


class UNet(nn.Module):
    """eps_hat(x_t, t). x: (B, C, H, W), t: (B,) int64 or float -> like x.

    H and W must be multiples of patch * 2^(levels - 1). attention: the resolutions,
    counted in patches, at which self-attention follows each residual block; the middle
    always has it. Source: [DDPM] App. B.
    """

    def __init__(self, image_channels=3, image_size=32, channels=128,
                 mults=(1, 2, 2, 2), blocks=2, attention=(16,), heads=1, groups=32,
                 dropout=0.1, patch=1):
        super().__init__()
        check_sizes(image_size, channels, mults, attention, heads, groups, patch)
        self.channels, self.patch = channels, patch
        self.levels, self.blocks = len(mults), blocks
        widths = [channels * mult for mult in mults]
        sizes = [image_size // patch // 2**level for level in range(len(mults))]
        time_dim = 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, time_dim), nn.SiLU(),
                                  nn.Linear(time_dim, time_dim))

        def stage(c_in, c_out, size):
            return Stage(c_in, c_out, time_dim, groups, dropout, heads,
                         size in attention)

        self.conv_in = nn.Conv2d(image_channels * patch**2, channels, 3, padding=1)
        self.down, c, skips = nn.ModuleList(), channels, [channels]
        for level, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            for _ in range(blocks):
                self.down.append(stage(c, width, size))
                c = width
                skips.append(c)
            if level < len(mults) - 1:
                self.down.append(Downsample(c))
                skips.append(c)

        self.mid1 = ResBlock(c, c, time_dim, groups, dropout)
        self.mid_attention = Attention(c, heads, groups)
        self.mid2 = ResBlock(c, c, time_dim, groups, dropout)

        self.up = nn.ModuleList()
        for level in reversed(range(len(mults))):
            for _ in range(blocks + 1):
                self.up.append(stage(c + skips.pop(), widths[level], sizes[level]))
                c = widths[level]
            if level > 0:
                # with patches the width falls before the resolution doubles: cheaper
                c_up = widths[level - 1] if patch > 1 else c
                self.up.append(Upsample(c, c_up))
                c = c_up
        self.norm_out = nn.GroupNorm(groups, c)
        self.conv_out = zero_init(nn.Conv2d(c, image_channels * patch**2, 3, padding=1))

    def forward(self, x, t):
        emb = timestep_embedding(t, self.channels).to(x.dtype)      # (B, channels)
        emb = self.time(emb)                                        # (B, 4 channels)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))  # (B, channels, H/p, W/p)
        down, up, skips = iter(self.down), iter(self.up), [h]
        for level in range(self.levels):
            for _ in range(self.blocks):
                h = next(down)(h, emb)
                skips.append(h)
            if level < self.levels - 1:
                h = next(down)(h)                           # half the resolution
                skips.append(h)
        h = self.mid2(self.mid_attention(self.mid1(h, emb)), emb)
        for level in reversed(range(self.levels)):
            for _ in range(self.blocks + 1):
                h = next(up)(torch.cat([h, skips.pop()], dim=1), emb)
            if level > 0:
                h = next(up)(h)                             # twice the resolution
        h = self.conv_out(F.silu(self.norm_out(h)))         # (B, C p^2, H/p, W/p)
        return F.pixel_shuffle(h, self.patch)               # (B, C, H, W)


def make_unet(cfg, shape):
    """The U-Net that cfg describes, for images of shape (C, H, W)."""
    return UNet(shape[0], shape[1], cfg.channels, cfg.mults, cfg.blocks, cfg.attention,
                cfg.heads, cfg.groups, cfg.dropout, cfg.patch)


# %% 5. Training ([DDPM] Alg. 1)


class EMA:
    """An exponential moving average of a model's weights, in `ema.model`.

    At step n the decay is min(decay, (1 + n) / (10 + n)): the average follows the
    weights faster in the first steps, where they change most.
    """

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model, n):
        decay = min(self.decay, (1 + n) / (10 + n))
        for mean, weight in zip(self.model.parameters(), model.parameters(),
                                strict=True):
            mean.lerp_(weight, 1 - decay)


def set_learning_rate(optimizer, cfg, step):
    """A linear warm-up to cfg.lr, times half a cosine over cfg.steps if it decays."""
    lr = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup, 1))
    if cfg.decay == "cosine":
        lr *= 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
    for group in optimizer.param_groups:
        group["lr"] = lr


def train(cfg, run, data):
    """Train on data.train and return the averaged network. Source: [DDPM] Alg. 1."""
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(run.device)
    model = run.place(make_unet(cfg, data.shape))
    ema = EMA(model, cfg.ema)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, weight_decay=cfg.weight_decay,
        fused=run.device.type != "mps")  # updates all weights in one call

    # run.steps: progress bar, checkpoints, resume, Ctrl-C (common/run.py)
    for step in run.steps(cfg.steps, model=model, ema=ema.model, optimizer=optimizer):
        set_learning_rate(optimizer, cfg, step)
        x0, _ = run.batch(data.train)                               # Alg. 1, line 2
        t = draw_t(len(x0), cfg.T, cfg.drawing).to(run.device)      # line 3
        eps = torch.randn_like(x0)                                  # line 4
        with run.autocast():
            loss = ddpm_loss(model, x0, t, eps, schedule)           # line 5
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(model)  # over all processes; alone it does nothing
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        ema.update(model, step)
        run.log(loss=loss, grad_norm=norm)
        if run.main and (step + 1) % cfg.preview_every == 0:
            figure_preview(run, ema.model, data, schedule, step + 1)
    return ema.model


# %% 6. Variational bound ([DDPM] Sec. 2, 3.2, 3.3)


def bound_weight(t, schedule, variance="beta"):
    """The factor of |eps - eps_theta|^2 in L_{t-1}; the simple objective sets it to 1.

    t: int or (B,) in 2..T; with "beta" also 1, where beta_tilde = 0 has no factor.
    """
    beta, alpha, alpha_bar = (array[t] for array in schedule)
    sigma2 = beta if variance == "beta" else beta_tilde(t, schedule)
    # [DDPM] Eq. 12: beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t))
    return beta**2 / (2 * sigma2 * alpha * (1 - alpha_bar))


def discrete_log_likelihood(x0, mean, sigma):
    """log p(x_0 | x_1) of 8-bit images x0, in nats, one number a pixel."""
    device = x0.device
    x0, mean, sigma = x0.cpu(), mean.cpu(), sigma.cpu()  # MPS may lack log_ndtr
    # [DDPM] Eq. 13: the integral of N(x; mean, sigma^2) from delta_- to delta_+,
    # x_0 - 1/255 and x_0 + 1/255; the outermost bins are open.
    upper = ((x0 + 1 / 255 - mean) / sigma).masked_fill(x0 > 0.999, torch.inf)
    lower = ((x0 - 1 / 255 - mean) / sigma).masked_fill(x0 < -0.999, -torch.inf)
    mirror = lower > 0  # the same mass in the lower tail, where it is precise
    upper, lower = (torch.where(mirror, -lower, upper),
                    torch.where(mirror, -upper, lower))
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    ratio = torch.exp(log_lower - log_upper).clamp(max=1 - 1e-7)  # log1p stays finite
    return (log_upper + torch.log1p(-ratio)).to(device)


@torch.no_grad()
def bound_term(model, x0, t, schedule, variance="beta_tilde", clip_x0=True):
    """L_{t-1} in nats, a number a pixel: (B, C, H, W), of one draw of x_t. t: in 1..T.

    L_0 takes sigma_1^2 = beta_tilde_2 with either variance, as the authors' code does:
    beta_tilde_1 is 0.
    """
    xt = q_sample(x0, t, torch.randn_like(x0), schedule.alpha_bars)
    mean, sigma2 = p_theta(model, xt, t, schedule, variance, clip_x0)
    if t == 1:  # a single step has no beta_tilde_2
        sigma2 = beta_tilde(2, schedule) if schedule.T > 1 else schedule.betas[1]
        return -discrete_log_likelihood(x0, mean, sigma2.sqrt())
    mean_q, variance_q = q_posterior(x0, xt, t, schedule)
    # [DDPM] Eq. 8: |mu_tilde - mu_theta|^2 / (2 sigma_t^2) + C, where
    # C = (r - 1 - log r) / 2 and r = beta_tilde_t / sigma_t^2, as of two Gaussians
    ratio = variance_q / sigma2
    C = 0.5 * (ratio - 1 - ratio.log())
    return (mean_q - mean) ** 2 / (2 * sigma2) + C


def variational_bound(model, x0, schedule, variance="beta_tilde", clip_x0=True):
    """[L_0, ..., L_T], whose sum bounds -log2 p(x0) from above, in bits per dimension.

    x0: (B, C, H, W), 8-bit images in [-1, 1]; each term is the mean over them.
    """
    # [DDPM] Eq. 5: L_T + sum of L_{t-1} for t > 1 + L_0
    terms = [bound_term(model, x0, t, schedule, variance, clip_x0)
             for t in tqdm(range(1, schedule.T + 1), "bound", leave=False)]
    # L_T = KL(q(x_T | x_0) || N(0, I))
    alpha_bar = schedule.alpha_bars[-1]
    terms.append(0.5 * (alpha_bar * x0**2 - alpha_bar - torch.log1p(-alpha_bar)))
    return [term.mean().item() / math.log(2) for term in terms]


# %% 7. Main


@plotting.figure("preview.png")
def figure_preview(run, model, data, schedule, step):
    """preview.png: x0_hat of held-out x_t at a few t, each from one network call."""
    x0 = data.test[:6]
    generator = torch.Generator().manual_seed(0)  # leaves the draws of training alone
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    rows, labels = [x0], ["held out"]
    for fraction in (0.1, 0.3, 0.5, 0.7):
        t = torch.full((len(x0),), max(1, round(schedule.T * fraction)),
                       device=x0.device)
        xt = q_sample(x0, t, eps, schedule.alpha_bars)
        rows += [xt, predict_x0(xt, model(xt, t), t, schedule.alpha_bars)]
        labels += [f"x_t, t = {t[0]}", "x0_hat"]
    plotting.table(run.path("preview.png"), rows,
                   f"What one network call recovers, step {step}", labels)


@plotting.figure("loss.png")
def figure_loss(run, model, data, schedule):
    """loss.png: the training loss, and the loss of held-out images by t."""
    x0 = data.test[:200]

    def loss(low, high):
        t = torch.randint(low, max(high, low + 1), (len(x0),), device=x0.device)
        return ddpm_loss(model, x0, t, torch.randn_like(x0), schedule).item()

    edges = [1 + schedule.T * i // 10 for i in range(11)]
    plotting.curves(run.path("loss.png"), [
        plotting.loss_curve(run.read_log(), "training loss"),
        plotting.loss_by_t(loss, edges, "held-out loss by t")])


@command_line
def main(argv=None):
    """Train a network, or load one; then draw images, and score them if asked to."""
    cfg, run = open_run("ddpm", Config, PRESETS, SAMPLING, argv)
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(run.device)
    data = run.load(load_images, cfg.dataset, cfg.image_size)
    if run.sampling:
        model = run.trained(make_unet(cfg, data.shape))
    else:
        model = train(cfg, run, data)
    if not run.main:
        return  # of several processes only the first one draws

    def eps_model(xt, t):
        return cfg.eps_scale * model(xt, t)  # departure 5

    def states(batch):
        xT = torch.randn(len(batch), *data.shape, device=run.device)
        return reverse_process(eps_model, xT, schedule, cfg.variance, cfg.clip_x0)

    samples, timing = run.draw(cfg.n_samples, states, model, cfg.T)
    run.add_metrics(sampling=timing, samples=quality.glance(samples, data))
    plotting.samples(run.path("samples.png"), samples, data, "Drawn from noise")
    plotting.denoising(run.path("denoising.gif"), states(range(9)))
    figure_loss(run, model, data, schedule)
    run.evaluate(states, model, cfg.T, data)
    run.finish("experiments/ddpm.py")


if __name__ == "__main__":
    main()
