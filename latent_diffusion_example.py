"""High-Resolution Image Synthesis with Latent Diffusion Models
(Rombach, Blattmann, Lorenz, Esser, Ommer, arXiv 2112.10752): [LDM]

    python latent_diffusion_example.py              train autoencoder, then diffusion
    python latent_diffusion_example.py --vae RUN    use the autoencoder of another run
    python experiments/latent.py                    more figures, the cost of a step

Stage 1 is an autoencoder with a KL term (Sec. 3.1, App. G). Stage 2 is the diffusion of
its scaled latents (Sec. 3.2, Eq. 2), with the objective of [DDPM] (arXiv 2006.11239)
and the sampler of [DDIM] (arXiv 2010.02502), whose x_0 and x_t are latents here.

Departures from the paper (`--preset paper` undoes 3, 4 and 5):
  1. the loss of stage 1 has neither LPIPS nor a discriminator (Eq. 25). The authors'
     code has Adam's betas (0.5, 0.9), no clipping, and more residual blocks;
  2. there is no codebook (App. G) and no conditioning (Sec. 3.3); the U-Net is that of
     [DDPM], with as many heads at each level, and its gradients are clipped; the scale
     is that of all training images, not of the first batch;
  3. the networks are small, the autoencoder works on 2x2 blocks of pixels, and its loss
     is the squared error with a KL weight of 0.01;
  4. learning rates decay, the average of the weights is shorter, training draws the
     middle t more often (`drawing`), and beta is linear, as in [DDPM];
  5. sampling multiplies eps_hat by `eps_scale`, which suits this small network.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common import plotting, quality
from common.cli import (Count, Fraction, Mistake, NonNegative, OpenFraction, Positive,
                        Probability, Whole, check_multiple, check_sizes, command_line)
from common.data import load_images
from common.run import load_checkpoint, open_run, reading

Kind = Literal["linear", "scaled_linear", "cosine"]
Drawing = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class Config:
    """Each field is a flag. Its type gives the range, its comment is the help text."""

    # autoencoder
    vae: str = ""                # skip stage 1: use the autoencoder of this run or file
    factor: Literal[2, 4, 8] = 4        # downsampling factor f (paper: 1 to 32)
    z_channels: Count = 4        # channels of the latents (paper: 2 to 64)
    vae_channels: Count = 32     # width of the autoencoder's first level (code: 128)
    vae_blocks: Count = 1        # residual blocks per level (code: 2)
    vae_patch: Literal[1, 2, 4, 8] = 2  # patch of the autoencoder, in pixels (paper: 1)
    kl_weight: NonNegative = 1e-2       # weight of the KL term (paper: 1e-6)
    reconstruction: Literal["l1", "l2"] = "l2"  # error of pixels (code: l1 and LPIPS)
    vae_steps: Count = 1000      # optimiser steps of stage 1
    vae_lr: Positive = 2e-3      # peak rate of stage 1 (code: 4.5e-6 times the batch)
    # diffusion
    T: Count = 1000              # diffusion steps (paper: 1000)
    schedule: Kind = "linear"    # noise schedule (code: scaled_linear)
    beta_1: OpenFraction = 1e-4  # linear schedules: beta_1 for T = 1000 (code: 1.5e-3)
    beta_T: OpenFraction = 0.02  # linear schedules: beta_T for T = 1000 (code: 0.0195)
    # sampling
    S: Count = 250               # sampling steps (paper: 500 for CelebA-HQ)
    eta: Probability = 1.0       # noise: 0 (none) to 1 (as much as DDPM) (paper: both)
    spacing: Literal["linear", "quadratic"] = "linear"  # spacing of tau (code: either)
    eps_scale: Positive = 1.1    # factor of eps_hat in sampling (paper: 1)
    n_samples: Count = 64        # number of images drawn at the end
    # data
    dataset: str = "digits"      # digits, mnist, folder:PATH, ... (paper: CelebA-HQ)
    image_size: Whole = 32       # resize images to this resolution; 0 keeps theirs
    flip: bool = False           # mirror images at random (code: for LSUN only)
    # network
    channels: Count = 48         # width of the U-Net, even, at least 4 (paper: 224)
    mults: tuple[Count, ...] = (1, 2)    # relative width of each level (paper: 1 2 3 4)
    blocks: Count = 1            # residual blocks per level (paper: 2)
    attention: tuple[Count, ...] = (4,)  # resolutions with attention (paper: 32 16 8)
    heads: Count = 1             # attention heads (paper: one for 32 channels)
    groups: Count = 8            # groups in each group norm (code: 32)
    dropout: Fraction = 0.0      # dropout in the residual blocks (paper: 0)
    patch: Count = 1             # patch x patch latents become channels (paper: 1)
    # training
    drawing: Drawing = "logit_normal"  # distribution of t in training (paper: uniform)
    steps: Count = 5000          # optimiser steps of stage 2 (paper: 410000)
    batch_size: Count = 32       # images per step, over all processes (paper: 48)
    lr: Positive = 1e-3          # peak learning rate of stage 2 (paper: 9.6e-5)
    warmup: Whole = 200          # steps of learning-rate warm-up (code: 0)
    decay: Literal["cosine", "constant"] = "cosine"  # decay of lr (code: constant)
    weight_decay: NonNegative = 0.0  # AdamW's weight decay; 0 gives Adam (code: 0.01)
    grad_clip: Positive = 1.0    # largest norm of stage 2's gradient (code: no limit)
    ema: Fraction = 0.999        # decay of the averaged weights (code: 0.9999)
    preview_every: Count = 1000  # steps between previews and checkpoints

    def __post_init__(self):
        if self.schedule == "sqrt_linear":  # its name in older checkpoints
            object.__setattr__(self, "schedule", "scaled_linear")


# The fields that may change after training
SAMPLING = ("S", "eta", "spacing", "eps_scale", "n_samples")

PRESETS = {
    "laptop": Config(),
    "smoke": Config(
        vae_channels=8, vae_steps=4, T=50, channels=8, groups=4, steps=6, batch_size=8,
        warmup=2, preview_every=3, S=5, n_samples=4),
    "paper": Config(  # CelebA-HQ's LDM-4, Tab. 12 (there VQ), for CIFAR-10
        z_channels=3, vae_channels=128, vae_blocks=2, vae_patch=1, kl_weight=1e-6,
        reconstruction="l1", vae_steps=200_000, vae_lr=2e-4, schedule="scaled_linear",
        beta_1=1.5e-3, beta_T=0.0195, S=500, eps_scale=1.0, dataset="cifar10",
        channels=224, mults=(1, 2, 3, 4), blocks=2, attention=(4, 2, 1), heads=7,
        groups=32, drawing="uniform", steps=410_000, batch_size=48, lr=9.6e-5, warmup=0,
        decay="constant", weight_decay=0.01, ema=0.9999, preview_every=5000),
}


# %% 1. Latents and the forward process ([LDM] App. G, [DDPM] Sec. 2)


def reparameterise(mean, logvar, eps):
    """Draw z ~ N(mean, exp(logvar)) with eps ~ N(0, I). All: (B, c, h, w)."""
    return mean + (0.5 * logvar).exp() * eps


def latent_scale(mean, logvar):
    """1 / sigma_hat of sampled latents, not of their means. mean, logvar: (N, c, h, w).

    Diffusion sees scale * z, whose standard deviation is 1; decoding divides again.
    """
    # [LDM] App. G: z <- z / sigma_hat, sigma_hat^2 = mean of (z - mu_hat)^2
    z = reparameterise(mean, logvar, torch.randn_like(mean))
    return 1 / z.cpu().double().std().item()  # double, since there are many terms


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
    "scaled_linear": linear in sqrt(beta). This is "linear" in [LDM]'s code, where
    "sqrt_linear" is linear in beta.
    """
    if kind != "cosine" and not 1e-6 <= beta_1 <= beta_T:
        raise Mistake(f"beta_1 {beta_1}: must be in [1e-6, --beta_T {beta_T}]")
    if kind == "linear":
        betas = torch.linspace(beta_1, beta_T, max(T, 2), dtype=torch.float64)
        betas = betas[-T:] * 1000 / T  # a single step has beta_T: x_1 is noise
    elif kind == "scaled_linear":
        ends = beta_1**0.5, beta_T**0.5
        roots = torch.linspace(*ends, max(T, 2), dtype=torch.float64)
        betas = roots[-T:] ** 2 * 1000 / T
    elif kind == "cosine":
        u = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - f[1:] / f[:-1]
    else:
        raise Mistake(f"schedule {kind}: must be one of linear, scaled_linear, cosine")
    betas = F.pad(betas.clamp(max=0.999), (1, 0))  # betas[0] = 0: the clean image
    alphas = 1 - betas
    # [DDPM] Sec. 2: alpha_bar_t = alpha_1 alpha_2 ... alpha_t
    alpha_bars = alphas.cumprod(0)
    return Schedule(betas.float(), alphas.float(), alpha_bars.float())


def q_sample(x0, t, eps, alpha_bars):
    """x_t, given x_0. x0, eps: (B, C, H, W); t: int or (B,) int64 in 0..T."""
    alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
    # [DDPM] Eq. 4: q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps


# %% 2. Training objectives ([LDM] Eq. 25, Eq. 2)


def gaussian_kl(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, I)) of each image: two (B, c, h, w) -> (B,)."""
    # arXiv 1312.6114, App. B: 1/2 sum of (mean^2 + sigma^2 - 1 - log sigma^2)
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def vae_loss(x, x_hat, mean, logvar, kl_weight, reconstruction="l2"):
    """The loss of stage 1, its error and its KL term: three scalars.

    x, x_hat: (B, C, H, W); mean, logvar: (B, c, h, w). Error and KL term are sums over
    an image and means over the batch. If the error were a mean over pixels, the same
    kl_weight would weigh C H W times as much.
    """
    # [LDM] Eq. 25 without L_adv: L = L_rec(x, D(E(x))) + L_reg(x; E, D)
    error = (x_hat - x).abs() if reconstruction == "l1" else (x_hat - x) ** 2
    error, kl = error.flatten(1).sum(1).mean(), gaussian_kl(mean, logvar).mean()
    return error + kl_weight * kl, error, kl


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


# %% 3. Sampling ([DDIM] Sec. 4)


def predict_x0(xt, eps_hat, t, alpha_bars):
    """x0_hat, the image behind x_t if its noise is eps_hat. t: int or (B,) in 0..T."""
    alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
    # [DDPM] Eq. 15: x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_bar_t)
    return (xt - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt()


def ddim_timesteps(T, S, spacing="linear"):
    """tau: S distinct ascending ints in 1..T, of which the last is T."""
    if not 1 <= S <= T:
        raise Mistake(f"S {S}: must be at least 1 and at most T, {T}")
    # [DDIM] App. D.2: tau_i = floor(c i) or floor(c i^2); here c makes tau_S = T
    power = 2 if spacing == "quadratic" else 1
    return [max(i, T * i**power // S**power) for i in range(1, S + 1)]  # max: distinct


def ddim_step(xt, eps_hat, t, t_prev, alpha_bars, eta=0.0, z=0.0):
    """One step, x_t -> x_{t_prev}. xt, eps_hat, z: (B, C, H, W); t, t_prev: int."""
    alpha_bar, alpha_bar_prev = alpha_bars[t], alpha_bars[t_prev]
    sigma = torch.zeros_like(alpha_bar)
    # [DDIM] Eq. 16: sigma_t = eta sqrt((1 - alpha_bar_{t-1}) / (1 - alpha_bar_t))
    #     sqrt(1 - alpha_bar_t / alpha_bar_{t-1}), where t_prev = tau_{i-1} is the t - 1
    if eta > 0:  # encoding steps upwards (eta = 0), where the second root is not real
        sigma = (eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt()
                 * (1 - alpha_bar / alpha_bar_prev).sqrt())
    # [DDIM] Eq. 12: x_{t-1} = sqrt(alpha_bar_{t-1}) x0_hat
    #                        + sqrt(1 - alpha_bar_{t-1} - sigma_t^2) eps_hat + sigma_t z
    x0_hat = predict_x0(xt, eps_hat, t, alpha_bars)  # [DDIM] Eq. 9
    direction = (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt() * eps_hat
    return alpha_bar_prev.sqrt() * x0_hat + direction + sigma * z


@torch.no_grad()
def ddim_process(model, xT, schedule, S=50, eta=0.0, spacing="linear"):
    """S steps of DDIM (eta = 0) or DDPM (eta = 1). Yields (T, x_T), ..., (0, x_0).

    xT: (B, C, H, W), standard normal noise. Source: [DDIM] Eq. 12, Sec. 4.2. Latents
    have no range, so no x0_hat is clamped.
    """
    xt, alpha_bars = xT, schedule.alpha_bars
    tau = [0, *ddim_timesteps(schedule.T, S, spacing)]
    for i in range(S, 0, -1):
        yield tau[i], xt
        eps_hat = model(xt, torch.full((len(xt),), tau[i], device=xt.device))
        z = torch.randn_like(xt) if eta > 0 else 0.0
        xt = ddim_step(xt, eps_hat, tau[i], tau[i - 1], alpha_bars, eta, z)
    yield 0, xt


def ddim_sample(model, xT, schedule, S=50, eta=0.0, spacing="linear"):
    """Draw latents, starting from the noise xT: (B, C, H, W) -> the same shape."""
    for _, xt in ddim_process(model, xT, schedule, S, eta, spacing):
        pass
    return xt


@torch.no_grad()
def encode_all(vae, x, batch_size=200):
    """Mean and log-variance of the latents of images: (N, C, H, W) -> (N, c, h, w)."""
    mean, logvar = zip(*(vae.encode(part) for part in x.split(batch_size)), strict=True)
    return torch.cat(mean), torch.cat(logvar)


@torch.no_grad()
def decode_all(vae, z, batch_size=100):
    """Decode scaled latents (N, c, h, w) to images (N, C, H, W), clamped to [-1, 1]."""
    parts = [vae.decode(part / vae.scale) for part in z.split(batch_size)]
    return torch.cat(parts).clamp(-1, 1)


# %% 4. Networks ([DDPM] App. B, [LDM] Sec. 3.1)


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


class VAEBlock(nn.Module):
    """Two convolutions, as in ResBlock, without the time."""

    recompute = True  # --grad_checkpointing: not stored, computed again going back

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1),
            nn.GroupNorm(groups, c_out), nn.SiLU(),
            zero_init(nn.Conv2d(c_out, c_out, 3, padding=1)))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):  # (B, c_in, H, W) -> (B, c_out, H, W)
        return self.skip(x) + self.body(x)


class VAE(nn.Module):
    """An autoencoder of images (B, C, H, W). Its latents are (B, z_channels, H/f, W/f).

    It has 1 + log2(f / patch) levels. Each level but the first has half the resolution
    and twice the width, up to four times the first width. Diffusion multiplies latents
    by `scale`. Source: [LDM] Sec. 3.1, App. G.
    """

    def __init__(self, image_channels=1, factor=4, z_channels=4, channels=32, blocks=1,
                 groups=8, patch=2):
        super().__init__()
        if patch > factor:
            raise Mistake(f"vae_patch {patch}: must be at most --factor {factor}")
        if channels % groups:
            raise Mistake(f"groups {groups}: must divide --vae_channels {channels}")
        self.factor, self.patch = factor, patch
        self.register_buffer("scale", torch.ones(()))
        levels = (factor // patch).bit_length()  # 1 + log2(f / patch)
        widths = [channels * min(2**level, 4) for level in range(levels)]
        pixels, c = image_channels * patch**2, channels
        encoder = [nn.Conv2d(pixels, c, 3, padding=1)]
        for level, width in enumerate(widths):
            encoder += [Downsample(c)] if level else []
            for _ in range(blocks):
                encoder.append(VAEBlock(c, width, groups))
                c = width
        encoder += [Attention(c, 1, groups), VAEBlock(c, c, groups),
                    nn.GroupNorm(groups, c), nn.SiLU(),
                    nn.Conv2d(c, 2 * z_channels, 3, padding=1)]
        self.encoder = nn.Sequential(*encoder)

        decoder = [nn.Conv2d(z_channels, c, 3, padding=1), VAEBlock(c, c, groups),
                   Attention(c, 1, groups)]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks):
                decoder.append(VAEBlock(c, width, groups))
                c = width
            if level:
                decoder.append(Upsample(c, widths[level - 1]))
                c = widths[level - 1]
        decoder += [nn.GroupNorm(groups, c), nn.SiLU()]
        self.decoder = nn.Sequential(*decoder)
        self.conv_out = nn.Conv2d(c, pixels, 3, padding=1)

    def encode(self, x):
        """Mean and log-variance of q(z | x): (B, C, H, W) -> two (B, c, H/f, W/f)."""
        H, W = x.shape[2:]
        if H % self.factor or W % self.factor:  # the decoded image would be larger
            raise Mistake(f"factor {self.factor}: must divide the height {H} and the "
                          f"width {W}")
        moments = self.encoder(F.pixel_unshuffle(x, self.patch))    # (B, 2c, H/f, W/f)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # keeps exp finite, as the code does

    def decode(self, z):
        """Decode latents (B, c, h, w) that are not scaled; images are not clamped."""
        h = self.conv_out(self.decoder(z))                  # (B, C p^2, H/p, W/p)
        return F.pixel_shuffle(h, self.patch)               # (B, C, H, W)

    def forward(self, x, eps):
        """Encode, draw z with eps ~ N(0, I), and decode: x_hat, mean, logvar."""
        mean, logvar = self.encode(x)
        return self.decode(reparameterise(mean, logvar, eps)), mean, logvar


def make_vae(cfg, shape):
    """The autoencoder that cfg describes, for images of shape (C, H, W)."""
    return VAE(shape[0], cfg.factor, cfg.z_channels, cfg.vae_channels, cfg.vae_blocks,
               cfg.groups, cfg.vae_patch)


def latent_shape(cfg, shape):
    """The shape (c, h, w) of the latents of images of shape (C, H, W)."""
    _, H, W = shape
    for size in (H, W):
        check_multiple(size, cfg.factor * cfg.patch * 2 ** (len(cfg.mults) - 1),
                       f"factor {cfg.factor}, patch {cfg.patch}, "
                       f"{len(cfg.mults)} levels")
    return cfg.z_channels, H // cfg.factor, W // cfg.factor


# %% 5. Training ([LDM] Sec. 3.1, 3.2; [DDPM] Alg. 1)


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


def load_vae(cfg, run, shape):
    """Load the autoencoder of the run or checkpoint cfg.vae, and freeze it."""
    where = f"--vae {cfg.vae}"
    state = load_checkpoint(cfg.vae, ("latent",), where)
    if "vae" not in state:
        raise Mistake(f"{where}: holds no autoencoder")
    for name in ("factor", "z_channels", "vae_channels", "vae_blocks", "vae_patch",
                 "groups", "image_size"):
        if (theirs := state["config"].get(name)) != getattr(cfg, name):
            raise Mistake(
                f"--{name} {getattr(cfg, name)}: {where} was made with {theirs}")
    vae = make_vae(cfg, shape)
    with reading(where):
        vae.load_state_dict(state["vae"])
    return run.place(vae).eval().requires_grad_(False)


def train_vae(cfg, run, data):
    """Stage 1: train the autoencoder on data.train, and freeze it."""
    vae = run.place(make_vae(cfg, data.shape))
    optimizer = torch.optim.Adam(vae.parameters(), cfg.vae_lr,
                                 fused=run.device.type != "mps")
    stage1 = replace(cfg, lr=cfg.vae_lr, steps=cfg.vae_steps)
    for step in run.steps(cfg.vae_steps, "vae", vae=vae, optimizer=optimizer):
        set_learning_rate(optimizer, stage1, step)
        x, _ = run.batch(data.train)
        eps = torch.randn(len(x), *latent_shape(cfg, data.shape), device=run.device)
        with run.autocast():
            output = vae(x, eps)
        x_hat, mean, logvar = (part.float() for part in output)
        loss, error, kl = vae_loss(x, x_hat, mean, logvar, cfg.kl_weight,
                                   cfg.reconstruction)
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(vae)
        norm = nn.utils.clip_grad_norm_(vae.parameters(), 100.0)
        optimizer.step()
        run.log(loss=loss, grad_norm=norm, reconstruction=error, kl=kl)
    vae.zero_grad()  # frees the memory of its gradients
    return vae.eval().requires_grad_(False)


def train(cfg, run, data):
    """Train both stages; return the averaged U-Net and the frozen autoencoder.

    The U-Net is None if the run was stopped in stage 1.
    """
    model = run.place(make_unet(cfg, latent_shape(cfg, data.shape)))
    if cfg.vae and run.opts.resume is None:  # a resumed run has its own
        vae = load_vae(cfg, run, data.shape)
    else:
        vae = train_vae(cfg, run, data)
    if run.stopped:
        return None, vae

    mean, logvar = encode_all(vae, data.train)  # once; each step draws a fresh z
    if cfg.flip:  # encoding a mirrored image is not mirroring its latents
        mirrored = encode_all(vae, data.train.flip(3))
        mean, logvar = torch.cat([mean, mirrored[0]]), torch.cat([logvar, mirrored[1]])
    vae.scale.fill_(latent_scale(mean, logvar))
    latents = torch.cat([mean, logvar], dim=1)

    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(run.device)
    ema = EMA(model, cfg.ema)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, weight_decay=cfg.weight_decay,
        fused=run.device.type != "mps")  # updates all weights in one call

    # run.steps: progress bar, checkpoints, resume, Ctrl-C (common/run.py)
    for step in run.steps(cfg.steps, model=model, ema=ema.model, vae=vae,
                          optimizer=optimizer):
        set_learning_rate(optimizer, cfg, step)
        moments, _ = run.batch(latents, flip=False)                 # Alg. 1, line 2
        mean, logvar = moments.chunk(2, dim=1)
        z0 = vae.scale * reparameterise(mean, logvar, torch.randn_like(mean))
        t = draw_t(len(z0), cfg.T, cfg.drawing).to(run.device)      # line 3
        eps = torch.randn_like(z0)                                  # line 4
        with run.autocast():
            # [LDM] Eq. 2: E |eps - eps_theta(z_t, t)|^2
            loss = ddpm_loss(model, z0, t, eps, schedule)           # line 5
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(model)  # over all processes; alone it does nothing
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        ema.update(model, step)
        run.log(loss=loss, grad_norm=norm)
        if run.main and (step + 1) % cfg.preview_every == 0:
            figure_preview(run, ema.model, vae, data, schedule, step + 1)
    return ema.model, vae


# %% 6. Main


@plotting.figure("preview.png")
def figure_preview(run, model, vae, data, schedule, step):
    """preview.png: the decoded z0_hat of held-out z_t, each from one network call."""
    x = data.test[:6]
    z0 = vae.scale * encode_all(vae, x)[0]
    generator = torch.Generator().manual_seed(0)  # leaves the draws of training alone
    eps = torch.randn(z0.shape, generator=generator).to(z0.device)
    rows, labels = [x], ["held out"]
    for fraction in (0.1, 0.3, 0.5, 0.7):
        t = torch.full((len(z0),), max(1, round(schedule.T * fraction)),
                       device=z0.device)
        zt = q_sample(z0, t, eps, schedule.alpha_bars)
        z0_hat = predict_x0(zt, model(zt, t), t, schedule.alpha_bars)
        rows += [decode_all(vae, zt), decode_all(vae, z0_hat)]
        labels += [f"z_t, t = {t[0]}", "z0_hat"]
    plotting.table(run.path("preview.png"), rows,
                   f"What one network call recovers, decoded, step {step}", labels)


@plotting.figure("denoising.gif")
def figure_denoising(run, model, vae, states, alpha_bars):
    """denoising.gif: the decoded z0_hat at some steps of the sampler."""
    frames = []
    for t, zt in plotting.evenly(list(states), 24):
        if t > 0:
            eps_hat = model(zt, torch.full((len(zt),), t, device=zt.device))
            zt = predict_x0(zt, eps_hat, t, alpha_bars)
        frames.append((t, decode_all(vae, zt)))
    plotting.denoising(run.path("denoising.gif"), frames)


@plotting.figure("loss.png")
def figure_loss(run):
    """loss.png: the losses of the stages that this run trained."""
    plotting.curves(run.path("loss.png"), [
        plotting.loss_curve(run.read_log("vae_log.csv"), "stage 1: error per image",
                            "reconstruction"),
        plotting.loss_curve(run.read_log(), "stage 2: noise prediction ([LDM] Eq. 2)")])


@command_line
def main(argv=None):
    """Train both stages, or load them; then draw images, and score them if asked to."""
    cfg, run = open_run("latent", Config, PRESETS, SAMPLING, argv)
    data = run.load(load_images, cfg.dataset, cfg.image_size)
    z_shape = latent_shape(cfg, data.shape)
    ddim_timesteps(cfg.T, cfg.S, cfg.spacing)  # a Mistake if S > T
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(run.device)
    # Latents have no range to clamp x0_hat to, and the first step divides the error of
    # eps_hat by sqrt(alpha_bar_T): it must not be tiny, as with cosine from T = 50 on.
    if (end := schedule.alpha_bars[-1].item()) < 1e-6:
        raise Mistake(f"schedule {cfg.schedule}: ends, with --T {cfg.T}, at "
                      f"alpha_bar_T = {end:.1e}, which must be at least 1e-06")
    if run.sampling:
        model = run.trained(make_unet(cfg, z_shape))
        vae = run.trained(make_vae(cfg, data.shape), "vae")
    else:
        model, vae = train(cfg, run, data)
    if not run.main:
        return  # of several processes only the first one draws

    figure_loss(run)
    if model is None:
        run.say("stopped in stage 1, so there are no samples; --resume goes on")
        return run.finish()

    def eps_model(zt, t):
        return cfg.eps_scale * model(zt, t)  # departure 5

    def latents(batch):
        zT = torch.randn(len(batch), *z_shape, device=run.device)
        return ddim_process(eps_model, zT, schedule, cfg.S, cfg.eta, cfg.spacing)

    def states(batch):
        for t, zt in latents(batch):
            yield t, zt if t > 0 else decode_all(vae, zt)

    samples, timing = run.draw(cfg.n_samples, states, model, cfg.S)
    run.add_metrics(sampling=timing, samples=quality.glance(samples, data))
    plotting.samples(run.path("samples.png"), samples, data, "Drawn in latent space")
    figure_denoising(run, model, vae, latents(range(9)), schedule.alpha_bars)
    run.evaluate(states, model, cfg.S, data)
    run.finish("experiments/latent.py")


if __name__ == "__main__":
    main()
