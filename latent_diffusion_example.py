"""High-Resolution Image Synthesis with Latent Diffusion Models
(Rombach, Blattmann, Lorenz, Esser, Ommer, arXiv 2112.10752): [LDM]

    python latent_diffusion_example.py              train autoencoder, then diffusion
    python latent_diffusion_example.py --vae RUN    the autoencoder of another run
    python latent_diffusion_example.py --sample --evaluate 500    score the newest run

Implemented here: the autoencoder ([LDM] Sec. 3.1) with KL regularisation and, as an
option, a patch discriminator (App. G, Eq. 25); the scale of the latents (App. G); their
diffusion (Sec. 3.2, Eq. 2), with the objective of [DDPM] (arXiv 2006.11239) and the
sampler of [DDIM] (arXiv 2010.02502), whose x_0 and x_t are scaled latents here.

Departures from the paper (`--preset paper` undoes all but 4, 5 and the loss in 1):
  1. no perceptual loss, which needs a network trained on ImageNet; the discriminator,
     with a hinge loss as in the code, is off unless `adversarial` is set;
  2. small networks, the autoencoder's on 2x2 blocks of pixels (`vae_patch`), squared
     error, a KL weight of 0.01: 1e-6 goes with the paper's large perceptual term;
  3. a cosine decay of the learning rates, a shorter average of the weights, training
     on more of the middle t (`drawing`), smaller noise in sampling (`temperature`);
  4. no codebook (App. G, ii), no conditioning (Sec. 3.3); the U-Net is [DDPM]'s, its
     gradients are clipped;
  5. the scale is that of all training pictures, the paper's is of one batch;
  6. linear betas, as in [DDPM]: the linear square roots of the code, which keep more of
     the signal half way, are `sqrt_linear`, and the preset's. A schedule that ends near
     0, as the cosine with T above 20, is refused: the first step of DDIM would
     magnify the network's error a thousandfold, and latents have no range to clamp to.

Training takes 6 to 17 CPU minutes, summed over all cores: 3 to 9 minutes on two.
What it draws and how good that is: results/ and README.md.
"""

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common import plotting, quality
from common.cli import (Count, Fraction, Mistake, NonNegative, OpenFraction, Positive,
                        Probability, Whole, check_multiple, check_sizes, command_line)
from common.data import load_images
from common.device import seeded, training_cost
from common.run import load_checkpoint, open_run, reading

Kind = Literal["linear", "sqrt_linear", "cosine"]
Drawing = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class Config:
    """Each field is a flag: its type is the range, its comment the help text."""

    # autoencoder
    vae: str = ""                   # skip stage 1: use the VAE of a run or checkpoint
    factor: Literal[2, 4, 8] = 4    # downsampling factor f (paper: 1 to 32)
    z_channels: Count = 4           # channels of the latents (paper: 3 or 4)
    vae_channels: Count = 32        # base width of the autoencoder (code: 128)
    vae_blocks: Count = 1           # residual blocks per autoencoder level (code: 2)
    vae_patch: Literal[1, 2, 4, 8] = 2  # patch size of the autoencoder (paper: 1)
    kl_weight: NonNegative = 1e-2   # weight of the summed KL term (paper: 1e-6)
    reconstruction: Literal["l1", "l2"] = "l2"  # pixel error (code: l1 and perceptual)
    adversarial: NonNegative = 0.0  # weight of the discriminator (code: 0.5)
    adversarial_start: Whole = 500  # steps before the discriminator joins (code: 50001)
    vae_steps: Count = 1000         # optimiser steps of stage 1
    vae_lr: Positive = 2e-3         # peak lr of stage 1 (code: 4.5e-6 per picture)
    # diffusion
    T: Count = 1000              # diffusion steps (paper: 1000)
    schedule: Kind = "linear"    # noise schedule (code: sqrt_linear)
    beta_1: OpenFraction = 1e-4  # linear schedules: beta_1 for T = 1000 (code: 1.5e-3)
    beta_T: OpenFraction = 0.02  # linear schedules: beta_T for T = 1000 (code: 0.0195)
    # sampling
    S: Count = 250                  # sampling steps (paper: 500 for CelebA-HQ)
    eta: Probability = 1.0          # noise: 0 none, 1 as in DDPM (paper: 0 to 1)
    spacing: Literal["linear", "quadratic"] = "linear"  # spacing of tau
    temperature: NonNegative = 0.9  # scale of all noise in sampling (paper: 1)
    n_samples: Count = 64           # pictures drawn at the end
    # data
    dataset: str = "digits"  # digits, mnist, folder:PATH, ... (paper: ImageNet, ...)
    image_size: Whole = 32   # resize or pad pictures to this resolution; 0 keeps theirs
    flip: bool = False       # mirror pictures at random (code: yes; never for digits)
    # network
    channels: Count = 48                 # width of the U-Net, even, >= 4 (paper: 224)
    mults: tuple[Count, ...] = (1, 2)    # relative width of each level (paper: 1 2 3 4)
    blocks: Count = 1                    # residual blocks per level (paper: 2)
    attention: tuple[Count, ...] = (4,)  # resolutions with attention (paper: 32 16 8)
    heads: Count = 1                     # attention heads (paper: one for 32 channels)
    groups: Count = 8                    # groups in each group norm (code: 32)
    dropout: Fraction = 0.0              # dropout in residual blocks (paper: none)
    patch: Count = 1                     # p x p pixels become channels (paper: none, 1)
    # training
    drawing: Drawing = "logit_normal"  # distribution of t in training (paper: uniform)
    steps: Count = 5000                # optimiser steps of stage 2 (paper: 410000)
    batch_size: Count = 32             # examples per step, all processes (paper: 48)
    lr: Positive = 1e-3                # peak learning rate of stage 2 (paper: 9.6e-5)
    warmup: Whole = 200                # steps of learning-rate warm-up (code: 10000)
    decay: Literal["cosine", "constant"] = "cosine"  # decay of lr (paper: constant)
    weight_decay: NonNegative = 0.0    # AdamW's weight decay; 0 gives Adam (code: 0.01)
    grad_clip: Positive = 1.0          # largest norm of stage 2's gradient (code: none)
    ema: Fraction = 0.999              # decay of the averaged weights (code: 0.9999)
    preview_every: Count = 1000        # steps between previews and checkpoints


# these may change after training
SAMPLING = ("S", "eta", "spacing", "temperature", "n_samples")


PRESETS = {
    "laptop": Config(),
    "smoke": Config(
        vae_channels=8, vae_steps=4, T=50, channels=8, groups=4, steps=6, batch_size=8,
        warmup=2, preview_every=3, S=5, n_samples=4),
    "paper": Config(  # the widths of CelebA-HQ's LDM-4, Tab. 12, on CIFAR-10
        z_channels=3, vae_channels=128, vae_blocks=2, vae_patch=1, kl_weight=1e-6,
        reconstruction="l1", adversarial=0.5, adversarial_start=50_000,
        vae_steps=200_000, vae_lr=2e-4, schedule="sqrt_linear", beta_1=1.5e-3,
        beta_T=0.0195, dataset="cifar10", flip=True, channels=224, mults=(1, 2, 3, 4),
        blocks=2, attention=(4, 2, 1), heads=7, groups=32, steps=410_000, batch_size=48,
        lr=9.6e-5, warmup=10_000, decay="constant", weight_decay=0.01, ema=0.9999,
        drawing="uniform", preview_every=5000, S=500, temperature=1.0),
}


# %% 1. Latents and the forward process ([LDM] App. G, [DDPM] Sec. 2)


def reparameterise(mean, logvar, eps):
    """z ~ N(mean, exp(logvar)) from eps ~ N(0, I), all (B, c, h, w)."""
    return mean + (0.5 * logvar).exp() * eps


def latent_scale(mean, logvar, eps=None):
    """1/std of sampled latents (not of their means). mean, logvar, eps: (N, c, h, w).

    Diffusion sees scale * z, of unit standard deviation; decoding undoes it.
    """
    eps = torch.randn_like(mean) if eps is None else eps
    z = reparameterise(mean, logvar, eps)
    return 1 / z.cpu().double().std().item()  # [LDM] App. G; double: many terms


class Schedule(NamedTuple):
    """betas, alphas, alpha_bars: (T+1,). [t] is the paper's t, [0] the clean image.

    Functions that need only alpha_bars take only those.
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
    """The variances beta_1..beta_T of the forward process, and what follows from them.

    "linear": [DDPM] Sec. 4; beta_1 and beta_T are those of T = 1000, rescaled for
    another T, so that x_T is noise all the same. "sqrt_linear": their square roots grow
    linearly ([LDM] code). "cosine": arXiv 2102.09672, Eq. 17.
    """
    if kind in ("linear", "sqrt_linear"):
        p = 1 if kind == "linear" else 2
        ends = beta_1 ** (1 / p), beta_T ** (1 / p)
        betas = torch.linspace(*ends, max(T, 2), dtype=torch.float64) ** p
        betas = betas[-T:] * 1000 / T  # a single step has beta_T: x_1 is noise
    elif kind == "cosine":
        u = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - f[1:] / f[:-1]
    else:
        raise Mistake(f"schedule {kind}: must be one of linear, sqrt_linear, cosine")
    betas = F.pad(betas.clamp(max=0.999), (1, 0))  # betas[0] = 0: the clean image
    alphas = 1 - betas  # [DDPM] Sec. 2
    alpha_bars = alphas.cumprod(0)  # [DDPM] Sec. 2: alpha_1 * ... * alpha_t
    return Schedule(betas.float(), alphas.float(), alpha_bars.float())


def q_sample(x0, t, eps, alpha_bars):
    """x_t given x_0. x0, eps: (B, C, H, W), t: int or (B,) int64 in 0..T."""
    alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps  # [DDPM] Eq. 4


# %% 2. Training objectives ([LDM] Eq. 25, Eq. 2)


def gaussian_kl(mean, logvar):
    """KL(N(mean, exp(logvar)), N(0, I)), summed over an image: (B, c, h, w) -> (B,)."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def vae_loss(x, x_hat, mean, logvar, kl_weight, reconstruction="l2"):
    """Stage 1 without its adversary: (loss, error, KL), three scalars.

    x, x_hat: (B, C, H, W); mean, logvar: (B, c, h, w). Error and KL are sums over an
    image, averaged over the batch: with a mean over pixels, the same kl_weight would
    weigh C*H*W times as much. Source: [LDM] App. G, the KL-regularised autoencoder.
    """
    error = (x_hat - x).abs() if reconstruction == "l1" else (x_hat - x) ** 2
    error, kl = error.flatten(1).sum(1).mean(), gaussian_kl(mean, logvar).mean()
    return error + kl_weight * kl, error, kl  # [LDM] Eq. 25: L_rec + L_reg


def discriminator_loss(real, fake):
    """Hinge loss of patch logits (B, 1, h, w) -> scalar, for [LDM] Eq. 25's logs."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adversarial_weight(loss, adversary, last_layer):
    """Ratio of both gradients at the decoder's last layer, so that neither drowns.

    Source: Esser et al., arXiv 2012.09841, Eq. 7, with the constants of the code.
    """
    norm, norm_adversary = (
        torch.autograd.grad(part, last_layer, retain_graph=True)[0].norm()
        for part in (loss, adversary))
    return (norm / (norm_adversary + 1e-4)).clamp(0, 1e4).detach()


def draw_t(n, T, drawing="uniform"):
    """The steps t of a batch, (n,) int64 in 1..T, on the CPU.

    "uniform": as in [DDPM] Alg. 1. "logit_normal": more of the middle t, which decide
    what a picture shows: the logit of t / T is N(-0.2, 1), after arXiv 2403.03206, Sec.
    3.1; stratified, one draw from each of n equal shares, so that batches differ less.
    One t in sixteen is uniform all the same: small t, rare here, weigh most in the
    bound.
    """
    if drawing == "uniform":
        return torch.randint(1, T + 1, (n,))
    u = (torch.arange(n) + torch.rand(n)) / n
    share = torch.sigmoid(torch.special.ndtri(u) - 0.2)
    share = torch.where(torch.rand(n) < 1 / 16, torch.rand(n), share)
    return (1 + (T * share).long()).clamp(max=T)


def ddpm_loss(model, x0, t, eps, schedule):
    """The simple objective, [DDPM] Eq. 14. x0: (B, C, H, W) -> scalar.

    The terms of the bound in the form of [DDPM] Eq. 12, without their weight
    beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)): small t count for less than in
    the bound. The mean over pixels, in the paper their sum. t: (B,) int64 in 1..T; eps:
    like x0, standard normal.
    """
    xt = q_sample(x0, t, eps, schedule.alpha_bars)
    return F.mse_loss(model(xt, t), eps)  # [DDPM] Alg. 1, line 5


# %% 3. Sampling


def predict_x0(xt, eps_hat, t, alpha_bars):
    """x0_hat, the image behind x_t if its noise is eps_hat. t: int in 0..T."""
    alpha_bar = alpha_bars[t]
    return (xt - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt()  # [DDPM] Eq. 15


def predict_eps(model, xt, t, alpha_bars, clip_x0=False):
    """eps_hat = eps_theta(x_t, t), like xt: (B, C, H, W). t: int in 1..T.

    clip_x0: x0_hat is clamped, and the eps_hat that leads to it is returned.
    """
    eps_hat = model(xt, torch.full((len(xt),), t, device=xt.device))
    if clip_x0:
        x0_hat = predict_x0(xt, eps_hat, t, alpha_bars).clamp(-1, 1)
        alpha_bar = alpha_bars[t]
        eps_hat = (xt - alpha_bar.sqrt() * x0_hat) / (1 - alpha_bar).sqrt()
    return eps_hat


def ddim_timesteps(T, S, spacing="linear"):
    """tau: S distinct ascending ints of 1..T that end in T. Source: [DDIM] App. D.2."""
    if not 1 <= S <= T:
        raise Mistake(f"S {S}: must be at least 1 and at most T, {T}")
    if spacing == "quadratic":  # max: small tau_i stay distinct
        return [max(i, T * i * i // S**2) for i in range(1, S + 1)]
    return [T * i // S for i in range(1, S + 1)]


def ddim_step(xt, eps_hat, t, t_prev, alpha_bars, eta=0.0, z=None):
    """One step x_t -> x_{t_prev}. xt, eps_hat, z: (B, C, H, W), t, t_prev: int in 0..T.

    z ~ N(0, I) is needed where eta > 0. With eta = 0 t_prev may be above t: encoding.
    """
    alpha_bar, alpha_bar_prev = alpha_bars[t], alpha_bars[t_prev]
    sigma = torch.zeros_like(alpha_bar)
    if eta > 0:  # never with t_prev > t, where the second root has no value
        sigma = (eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt()
                 * (1 - alpha_bar / alpha_bar_prev).sqrt())  # [DDIM] Eq. 16
    x0_hat = predict_x0(xt, eps_hat, t, alpha_bars)  # "predicted x_0", [DDIM] Eq. 9
    # "direction pointing to x_t", the second term of [DDIM] Eq. 12
    direction = (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt() * eps_hat
    x_prev = alpha_bar_prev.sqrt() * x0_hat + direction
    return x_prev if eta == 0 else x_prev + sigma * z  # [DDIM] Eq. 12


@torch.no_grad()
def ddim_process(model, xT, schedule, S=50, eta=0.0, spacing="linear", clip_x0=True,
                 temperature=1.0, step=ddim_step):
    """Yields (t, x_t) along tau from T down, then (0, x_0). [DDIM] Eq. 12, Sec. 4.2.

    temperature: factor of all noise, that of x_T and z; the paper's is 1.
    """
    xt, alpha_bars = temperature * xT, schedule.alpha_bars
    tau = [0, *ddim_timesteps(schedule.T, S, spacing)]
    for i in range(S, 0, -1):
        yield tau[i], xt
        eps_hat = predict_eps(model, xt, tau[i], alpha_bars, clip_x0)
        z = temperature * torch.randn_like(xt) if eta > 0 else None
        xt = step(xt, eps_hat, tau[i], tau[i - 1], alpha_bars, eta, z)
    yield 0, xt


def ddim_sample(model, shape, schedule, S=50, eta=0.0, spacing="linear", clip_x0=True,
                xT=None, temperature=1.0):
    """Images of this shape (B, C, H, W), from the noise xT or from noise drawn here."""
    xT = torch.randn(shape, device=schedule.betas.device) if xT is None else xT
    how = S, eta, spacing, clip_x0, temperature
    for _, xt in ddim_process(model, xT, schedule, *how):
        pass  # the last state is x_0
    return xt


@torch.no_grad()
def encode_all(vae, x, batch_size=200):
    """Mean and log-variance of latents: (N, C, H, W) -> two (N, c, h, w)."""
    mean, logvar = zip(*(vae.encode(part) for part in x.split(batch_size)), strict=True)
    return torch.cat(mean), torch.cat(logvar)


@torch.no_grad()
def decode_all(vae, z, batch_size=100):
    """Scaled latents (N, c, h, w) -> images (N, C, H, W), clamped to [-1, 1]."""
    parts = [vae.decode(part / vae.scale) for part in z.split(batch_size)]
    return torch.cat(parts).clamp(-1, 1)


# %% 4. Networks


def timestep_embedding(t, dim):
    """Sines, then cosines of t, as in [DDPM]'s code: (B,) -> (B, dim).

    After arXiv 1706.03762, Sec. 3.5, which takes them in turn.
    """
    k, last = torch.arange(dim // 2, device=t.device), dim // 2 - 1
    frequencies = torch.exp(-math.log(10000) * k / last)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def zero_init(layer):
    """A layer that starts as zero: its residual block starts by adding nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """Two convolutions and the time. (B, c_in, H, W) -> (B, c_out, H, W)."""

    recompute = True  # activations, in the backward pass (--grad_checkpointing)

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
    """Half the resolution, by a stride of 2. (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the resolution, by copies. (B, c_in, H, W) -> (B, c_out, 2H, 2W)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.narrow = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.conv = nn.Conv2d(c_out, c_out, 3, padding=1)

    def forward(self, x):
        x = F.interpolate(self.narrow(x), scale_factor=2.0, mode="nearest")
        return self.conv(x)


class UNet(nn.Module):
    """eps_hat(x_t, t). x: (B, C, H, W), t: (B,) int64 or float -> like x.

    H and W are multiples of patch * 2^(levels - 1). attention: the resolutions, after
    patching, where self-attention follows each residual block; it always stands in the
    middle. Source: [DDPM] App. B.
    """

    def __init__(self, image_channels=3, image_size=32, channels=128,
                 mults=(1, 2, 2, 2), blocks=2, attention=(16,), heads=1, groups=32,
                 dropout=0.1, patch=1):
        super().__init__()
        check_sizes(image_size, channels, mults, attention, heads, groups, patch)
        self.channels, self.patch = channels, patch
        time_dim = 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, time_dim), nn.SiLU(),
                                  nn.Linear(time_dim, time_dim))

        def stage(c_in, c_out, size):
            block = ResBlock(c_in, c_out, time_dim, groups, dropout)
            attends = size in attention
            attend = Attention(c_out, heads, groups) if attends else nn.Identity()
            return nn.ModuleList([block, attend])

        c, size = channels, image_size // patch
        self.conv_in = nn.Conv2d(image_channels * patch**2, c, 3, padding=1)
        self.down, skips = nn.ModuleList(), [c]
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                self.down.append(stage(c, channels * mult, size))
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
                self.up.append(stage(c + skips.pop(), channels * mult, size))
                c = channels * mult
            if level > 0:
                # a patched network narrows before it doubles the resolution: cheaper
                c_up = channels * mults[level - 1] if patch > 1 else c
                self.up.append(Upsample(c, c_up))
                c, size = c_up, size * 2
        self.norm_out = nn.GroupNorm(groups, c)
        self.conv_out = zero_init(nn.Conv2d(c, image_channels * patch**2, 3, padding=1))

    def forward(self, x, t):
        emb = self.time(timestep_embedding(t, self.channels).to(x.dtype))
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for module in self.down:
            if isinstance(module, Downsample):
                h = module(h)
            else:
                block, attention = module
                h = attention(block(h, emb))
            skips.append(h)
        h = self.mid2(self.mid_attention(self.mid1(h, emb)), emb)
        for module in self.up:
            if isinstance(module, Upsample):
                h = module(h)
            else:
                block, attention = module
                h = attention(block(torch.cat([h, skips.pop()], dim=1), emb))
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


def make_unet(cfg, shape):
    """The U-Net that cfg describes, for images of shape (C, H, W)."""
    return UNet(shape[0], shape[1], cfg.channels, cfg.mults, cfg.blocks, cfg.attention,
                cfg.heads, cfg.groups, cfg.dropout, cfg.patch)


class VAEBlock(nn.Module):
    """ResBlock without the time. (B, c_in, H, W) -> (B, c_out, H, W)."""

    recompute = True  # activations, in the backward pass (--grad_checkpointing)

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1),
            nn.GroupNorm(groups, c_out), nn.SiLU(),
            zero_init(nn.Conv2d(c_out, c_out, 3, padding=1)))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        return self.skip(x) + self.body(x)


class VAE(nn.Module):
    """Autoencoder of images (B, C, H, W); its latents are (B, z_channels, H/f, W/f).

    1 + log2(f / patch) levels, each but the first of half the side and twice the width,
    up to four times the base. scale: what diffusion multiplies the latents by. Source:
    [LDM] Sec. 3.1, App. G.
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
        """Mean and log-variance of q(z | x), two (B, z_channels, H/f, W/f)."""
        H, W = x.shape[2:]
        if H % self.factor or W % self.factor:  # what is decoded would be larger than x
            raise Mistake(f"factor {self.factor}: must divide the height {H} and the "
                          f"width {W}")
        mean, logvar = self.encoder(F.pixel_unshuffle(x, self.patch)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # exp stays finite (code)

    def decode(self, z):
        """Latents as encoded, not scaled -> images, not clamped."""
        return F.pixel_shuffle(self.conv_out(self.decoder(z)), self.patch)

    def forward(self, x, eps):
        """x_hat, mean, logvar; eps ~ N(0, I), of the shape of the latents."""
        mean, logvar = self.encode(x)
        return self.decode(reparameterise(mean, logvar, eps)), mean, logvar


class Discriminator(nn.Module):
    """A logit, real or not, for each patch. (B, C, H, W) -> (B, 1, H/4, W/4)."""

    def __init__(self, image_channels, channels, groups):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(image_channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
            nn.GroupNorm(groups, 2 * channels), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 1, 3, padding=1))

    def forward(self, x):
        return self.body(x)


def make_vae(cfg, shape):
    """The autoencoder that cfg describes, for images of shape (C, H, W)."""
    return VAE(shape[0], cfg.factor, cfg.z_channels, cfg.vae_channels, cfg.vae_blocks,
               cfg.groups, cfg.vae_patch)


def latent_shape(cfg, shape):
    """(c, h, w) of the latents of images of shape (C, H, W)."""
    _, H, W = shape
    levels = len(cfg.mults)
    for side in (H, W):
        check_multiple(side, cfg.factor * cfg.patch * 2 ** max(0, levels - 1),
                       f"factor {cfg.factor}, patch {cfg.patch}, {levels} levels")
    return cfg.z_channels, H // cfg.factor, W // cfg.factor


# %% 5. Training


class EMA:
    """An exponential moving average of a model's weights, in `ema.model`.

    At step n the decay is min(decay, (1 + n) / (10 + n)): while n is small, and the
    weights change fast, it follows them faster.
    """

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model, n):
        decay = min(self.decay, (1 + n) / (10 + n))
        weights = list(self.model.parameters())
        torch._foreach_lerp_(weights, list(model.parameters()), 1 - decay)
        for buffer, other in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(other)  # buffers are not averaged


def set_learning_rate(optimizer, cfg, step):
    """Warm up linearly to cfg.lr; a cosine decay multiplies this from step 0 on.

    step: 0..cfg.steps - 1.
    """
    lr = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup, 1))
    if cfg.decay == "cosine":
        lr *= 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
    for group in optimizer.param_groups:
        group["lr"] = lr


def load_vae(cfg, run, shape):
    """The frozen autoencoder of the checkpoint cfg.vae."""
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
    """Stage 1: the autoencoder, trained on data.train, then frozen. [LDM] Eq. 25."""
    vae = run.place(make_vae(cfg, data.shape))
    discriminator = Discriminator(data.shape[0], cfg.vae_channels, cfg.groups)
    discriminator = run.place(discriminator)
    fused = run.device.type != "mps"
    optimizer = torch.optim.Adam(vae.parameters(), cfg.vae_lr, fused=fused)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), cfg.vae_lr,
                                   betas=(0.5, 0.9), fused=fused)
    z_shape = latent_shape(cfg, data.shape)
    stage1 = replace(cfg, lr=cfg.vae_lr, steps=cfg.vae_steps)
    for step in run.steps(cfg.vae_steps, "vae", vae=vae, discriminator=discriminator,
                          optimizer=optimizer, optimizer_d=optimizer_d):
        set_learning_rate(optimizer, stage1, step)
        set_learning_rate(optimizer_d, stage1, step)
        x, _ = run.batch(data.train)
        eps = torch.randn(len(x), *z_shape, device=x.device)
        with run.autocast():
            output = vae(x, eps)
        x_hat, mean, logvar = (part.float() for part in output)
        loss, error, kl = vae_loss(x, x_hat, mean, logvar, cfg.kl_weight,
                                   cfg.reconstruction)
        adversarial = cfg.adversarial > 0 and step >= cfg.adversarial_start
        if adversarial:  # [LDM] Eq. 25, the minimum: the autoencoder fools it
            adversary = -discriminator(x_hat).mean()
            weight = adversarial_weight(loss, adversary, vae.conv_out.weight)
            loss = loss + cfg.adversarial * weight * adversary
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(vae)
        norm = nn.utils.clip_grad_norm_(vae.parameters(), 100.0)
        optimizer.step()
        run.log(loss=loss, grad_norm=norm, reconstruction=error, kl=kl)
        if adversarial:  # [LDM] Eq. 25, the maximum: it tells them apart
            loss = discriminator_loss(discriminator(x), discriminator(x_hat.detach()))
            optimizer_d.zero_grad()
            loss.backward()
            run.average_gradients(discriminator)
            nn.utils.clip_grad_norm_(discriminator.parameters(), 100.0)
            optimizer_d.step()
            run.log(discriminator_loss=loss)
    vae.zero_grad()  # its gradients would stay in memory
    return vae.eval().requires_grad_(False)


def train(cfg, run, data):
    """Both stages: (averaged U-Net, frozen VAE), or (None, VAE) if stopped in stage 1.

    Stage 2, [LDM] Eq. 2, is [DDPM] Alg. 1 on latents.
    """
    model = run.place(make_unet(cfg, latent_shape(cfg, data.shape)))
    if cfg.vae and run.opts.resume is None:  # a resumed run's checkpoint holds its own
        vae = load_vae(cfg, run, data.shape)
    else:
        vae = train_vae(cfg, run, data)
    if run.stopped:
        return None, vae

    mean, logvar = encode_all(vae, data.train)  # once; each step draws a fresh z
    if cfg.flip:  # the latents of a mirrored picture are not mirrored latents
        mirrored = encode_all(vae, data.train.flip(3))
        mean, logvar = torch.cat([mean, mirrored[0]]), torch.cat([logvar, mirrored[1]])
    vae.scale.fill_(latent_scale(mean, logvar))
    latents = torch.cat([mean, logvar], dim=1)

    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(run.device)
    ema = EMA(model, cfg.ema)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, weight_decay=cfg.weight_decay,
        fused=run.device.type != "mps")  # one kernel for all weights

    # run.steps: progress bar, checkpoints, resume, Ctrl-C (common/run.py)
    for step in run.steps(cfg.steps, model=model, ema=ema.model, vae=vae,
                          optimizer=optimizer):
        set_learning_rate(optimizer, cfg, step)
        # the latents of mirrored pictures are among them already
        moments, _ = run.batch(latents, flip=False)  # [DDPM] Alg. 1, line 2
        mean, logvar = moments.chunk(2, dim=1)
        z0 = vae.scale * reparameterise(mean, logvar, torch.randn_like(mean))
        t = draw_t(len(z0), cfg.T, cfg.drawing).to(run.device)  # line 3
        eps = torch.randn_like(z0)  # line 4
        with run.autocast():
            loss = ddpm_loss(model, z0, t, eps, schedule)  # line 5: [LDM] Eq. 2
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(model)  # over all processes; fp16: drops an overflow
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        ema.update(model, step)
        run.log(loss=loss, grad_norm=norm)
        if run.main and (step + 1) % cfg.preview_every == 0:
            figure_preview(run, ema.model, vae, data, schedule, step + 1)
    return ema.model, vae


# %% 6. Figures and main


def psnr(x, x_hat):
    """Peak signal-to-noise ratio in dB. x, x_hat: (B, C, H, W) in [-1, 1] -> (B,)."""
    error = ((x_hat.clamp(-1, 1) - x) ** 2).flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))  # the range is 2, its square 4


@plotting.figure("reconstructions.png", "latents.png")
def figure_autoencoder(run, vae, data):
    """reconstructions.png: pictures and what comes back; latents.png: their latents."""
    x = data.test[:500]
    mean, _ = encode_all(vae, x)
    x_hat = decode_all(vae, vae.scale * mean)
    decibels = psnr(x, x_hat)
    average = decibels.mean().item()
    plotting.table(run.path("reconstructions.png"), [x[:10], x_hat[:10]],
                   f"Held-out pictures and what comes back ({average:.1f} dB)",
                   ["original", "decoded"],
                   [f"{value:.1f} dB" for value in decibels[:10].tolist()])
    run.add_metrics(psnr_held_out=average)

    z = mean[:8] / mean[:8].abs().amax((0, 2, 3), keepdim=True)
    channels = z.split(1, dim=1)
    plotting.table(run.path("latents.png"), [x[:8], *channels],
                   "The channels of the latents, each stretched to its own range",
                   ["picture"] + [f"channel {i + 1}" for i in range(len(channels))])


@plotting.figure("walk.png")
def figure_walk(run, vae, data):
    """walk.png: the line between two pictures, in latents and in pixels."""
    x, shares = data.test[:4], torch.linspace(0, 1, 9, device=run.device)
    z, rows = vae.scale * encode_all(vae, x)[0], []
    shares = shares.view(-1, 1, 1, 1)
    for a, b in ((0, 1), (2, 3))[:len(x) // 2]:
        rows += [decode_all(vae, (1 - shares) * z[a] + shares * z[b]),
                 (1 - shares) * x[a] + shares * x[b]]
    if rows:
        plotting.table(run.path("walk.png"), rows, "The line between two pictures",
                       ["latents", "pixels"] * (len(rows) // 2))


@plotting.figure("histogram.png")
def figure_histogram(run, vae, data):
    """histogram.png: the latents' values against N(0, 1), and their spectrum."""
    mean, logvar = encode_all(vae, data.train[:1000])
    z = reparameterise(mean, logvar, torch.randn_like(mean)).cpu()
    scaled = vae.scale.cpu() * z
    line, spectra = torch.linspace(-4, 4, 200), {}
    normal = line, torch.exp(-(line**2) / 2) / math.sqrt(2 * math.pi), "k"
    for name, x, style in (("latents", scaled, "C0"),
                           ("as many draws of N(0, I)", torch.randn_like(z), "k")):
        x = x.flatten(1) - x.flatten(1).mean(0)
        rank = max(1, len(x) - 1)  # one is lost to the mean
        variances = torch.linalg.svdvals(x)[:rank] ** 2 / rank
        spectra[name] = range(1, len(variances) + 1), variances, style
    plotting.curves(run.path("histogram.png"), [
        {"histogram": scaled, "lines": {"N(0, 1)": normal}, "xlim": (-4, 4),
         "xlabel": "value of a latent",
         "title": f"std {z.std():.3f}, scaled by {vae.scale.item():.3f}"},
        {"lines": spectra, "xlabel": "principal component", "yscale": "log",
         "title": "variance along each"}],
        "Latents against N(0, I)")


@plotting.figure("prior.png")
def figure_prior(run, vae, data, samples):
    """prior.png: what the VAE decodes from N(0, I), and from the diffusion's latents.

    The KL term of stage 1 makes single latents nearly N(0, 1), not their joint
    distribution: that is what stage 2 learns.
    """
    n = min(25, len(samples))
    z = torch.randn(n, *encode_all(vae, data.test[:1])[0].shape[1:], device=run.device)
    plotting.panels(run.path("prior.png"), [
        ("decoded N(0, I): a VAE alone", decode_all(vae, vae.scale * z)),
        ("decoded samples of the diffusion", samples[:n]),
        ("real, held out", data.test[:n])],
        "Decoded: N(0, I), and what the diffusion draws")


@plotting.figure("preview.png")
def figure_preview(run, model, vae, data, schedule, step):
    """preview.png: z0_hat of held-out z_t at a few t, decoded: one network call."""
    x = data.test[:6]
    z0 = vae.scale * encode_all(vae, x)[0]
    generator = torch.Generator().manual_seed(0)  # training draws are left alone
    eps = torch.randn(z0.shape, generator=generator).to(z0.device)
    rows, labels = [x], ["held out"]
    for share in (0.1, 0.3, 0.5, 0.7):
        t = max(1, round(schedule.T * share))
        zt = q_sample(z0, t, eps, schedule.alpha_bars)
        eps_hat = predict_eps(model, zt, t, schedule.alpha_bars)
        z0_hat = predict_x0(zt, eps_hat, t, schedule.alpha_bars)
        rows += [decode_all(vae, zt), decode_all(vae, z0_hat)]
        labels += [f"z_t, t = {t}", "z0_hat"]
    title = f"What one network call recovers, decoded, step {step}"
    plotting.table(run.path("preview.png"), rows, title, labels)


@plotting.figure("denoising.gif")
def figure_denoising(run, model, vae, states, alpha_bars):
    """denoising.gif: the decoded z0_hat along the sampler's way."""
    pictures, captions = [], []
    for t, zt in plotting.evenly(list(states)[:-1], 24):
        z0_hat = zt if t == 0 else predict_x0(
            zt, predict_eps(model, zt, t, alpha_bars), t, alpha_bars)
        pictures.append(decode_all(vae, z0_hat))
        captions.append(f"z0_hat, t = {t}")
    plotting.gif(run.path("denoising.gif"), pictures, 4, captions)


@plotting.figure("loss.png")
def figure_loss(run):
    """loss.png: the losses of the stages that this run trained."""
    plotting.curves(run.path("loss.png"), [
        plotting.loss_curve(run.read_log("vae_log.csv"), "stage 1: error per image",
                            "reconstruction"),
        plotting.loss_curve(run.read_log(), "stage 2: noise prediction ([LDM] Eq. 2)")])


@plotting.figure("cost.png")
def figure_cost(run, cfg, shape):
    """cost.png: a training step of the same U-Net, on latents and on pixels.

    On pixels its levels have other sides, and no attention but that in the middle.
    """
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(run.device)
    costs = {}
    with seeded(run.opts.seed, run.device):
        on_pixels = replace(cfg, attention=())
        for name, size, how in (("latent", latent_shape(cfg, shape), cfg),
                                ("pixel", shape, on_pixels)):
            model = run.place(make_unet(how, size))
            x0 = torch.randn(cfg.batch_size, *size, device=run.device)
            t = draw_t(cfg.batch_size, cfg.T).to(run.device)
            costs[name] = training_cost(model, partial(
                ddpm_loss, model, x0, t, torch.randn_like(x0), schedule))
    ratio = {key: costs["pixel"][key] / costs["latent"][key] for key in costs["pixel"]}
    titles = {"seconds": "seconds", "gflop": "10^9 operations",
              "activations_mb": "activations, MB"}
    parts = [{"bars": (list(costs), [cost[key] for cost in costs.values()]),
              "title": f"{title}: {ratio[key]:.0f} times"}
             for key, title in titles.items()]
    plotting.curves(run.path("cost.png"), parts,
                    f"One training step of the same U-Net, batch {cfg.batch_size}")
    run.add_metrics(cost_of_a_step=costs | {"pixel_over_latent": ratio})


@command_line
def main(argv=None):
    """Train both stages, or load what was trained; draw; measure."""
    cfg, run = open_run("latent", Config, PRESETS, SAMPLING, argv)
    data = run.load(load_images(cfg.dataset, cfg.image_size))
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(run.device)
    ddim_timesteps(cfg.T, cfg.S, cfg.spacing)  # raises before training if S > T
    if (end := schedule.alpha_bars[-1].item()) < 1e-6:
        raise Mistake(f"schedule {cfg.schedule}: ends, with --T {cfg.T}, at "
                      f"alpha_bar_T = {end:.1e}, which must be at least 1e-06")
    z_shape = latent_shape(cfg, data.shape)
    if run.sampling:
        model = run.trained(make_unet(cfg, z_shape))
        vae = run.trained(make_vae(cfg, data.shape), "vae")
    else:
        model, vae = train(cfg, run, data)
    if not run.main:
        return  # only the first process draws

    figure_loss(run)
    figure_autoencoder(run, vae, data)
    figure_walk(run, vae, data)
    if model is None:
        run.say("stopped in stage 1: no diffusion model to draw from; --resume goes on")
        return run.finish()

    def states(batch):
        zT = torch.randn(len(batch), *z_shape, device=run.device)
        for t, zt in ddim_process(model, zT, schedule, cfg.S, cfg.eta, cfg.spacing,
                                  clip_x0=False, temperature=cfg.temperature):
            yield t, zt
        yield 0, decode_all(vae, zt)

    samples, timing = run.draw(cfg.n_samples, states, model, cfg.S)
    run.add_metrics(sampling=timing, samples=quality.glance(samples, data))
    plotting.samples(run.path("samples.png"), samples, data, "Drawn in latent space")
    plotting.neighbours(run.path("neighbours.png"), samples, data)
    figure_histogram(run, vae, data)
    figure_prior(run, vae, data, samples)
    figure_denoising(run, model, vae, states(range(16)), schedule.alpha_bars)
    figure_cost(run, cfg, data.shape)
    run.evaluate(states, model, cfg.S, data)
    run.finish()


if __name__ == "__main__":
    main()
