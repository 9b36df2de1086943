"""Denoising Diffusion Implicit Models (Song, Meng, Ermon, arXiv 2010.02502): [DDIM]

    python ddim_example.py                            train as DDPM, draw in few steps
    python ddim_example.py --sample                   the newest run, DDPM's too
    python ddim_example.py --sample --evaluate 500    the paper's Table 1 in small

DDPM's objective asks only for the marginals q(x_t | x_0). Other processes, no longer
Markovian, have the same (q_sigma, Eq. 6, 7), and one network serves them all (Thm. 1):
only the sampler changes. Implemented here: steps from DDIM (eta = 0) to DDPM (eta = 1)
(Eq. 12, 16), with the larger noise of Sec. 5, too; sub-sequences tau (Sec. 4.2, App.
D.2); encoding, the ODE of Eq. 14 reversed (Sec. 5.4); interpolation (App. D.5). The
paper's alpha_t is alpha_bars[t] here; the rest is [DDPM], arXiv 2006.11239.

Departures from the paper (`--preset paper` undoes all but 4 and 8):
  1. a small U-Net on 2x2 blocks of pixels (`patch`), so that it trains on a CPU;
  2. its up path narrows before it doubles the resolution: a cheaper convolution;
  3. a cosine decay of the learning rate, a shorter average of the weights;
  4. the average follows the weights faster in the first steps (EMA);
  5. x0_hat is clamped to [-1, 1] (`clip_x0`);
  6. training draws more of the middle t (`drawing`; results/ideas.md);
  7. in sampling alone eps_hat is a little larger (`eps_scale`), x_T and z are smaller
     (`temperature`): what a small network gets wrong does less harm;
  8. tau always ends in T, in the authors' code a little below it.

Training takes 5 to 14 CPU minutes, summed over all cores: 3 to 7 minutes on two.
What it draws and how good that is: results/ and README.md.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common import plotting, quality
from common.cli import (Count, Fraction, Mistake, NonNegative, OpenFraction, Positive,
                        Probability, Whole, check_sizes, command_line)
from common.data import load_images
from common.run import open_run

Drawing = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class Config:
    """Each field is a flag: its type is the range, its comment the help text."""

    # diffusion
    T: Count = 1000              # diffusion steps (paper: 1000)
    schedule: Literal["linear", "cosine"] = "linear"  # noise schedule (paper: linear)
    beta_1: OpenFraction = 1e-4  # linear schedule: beta_1 for T = 1000 (paper: 1e-4)
    beta_T: OpenFraction = 0.02  # linear schedule: beta_T for T = 1000 (paper: 0.02)
    # sampling
    S: Count = 50                   # sampling steps (paper: 10 to 1000)
    eta: Probability = 0.0          # noise: 0 none, 1 as in DDPM (paper: 0 to 1)
    spacing: Literal["linear", "quadratic"] = "linear"  # spacing of tau (paper: both)
    sigma_hat: bool = False         # larger noise (Sec. 5) for eta 1 (paper: Table 1)
    clip_x0: bool = True            # clamp x0_hat to [-1, 1] in sampling (code: no)
    eps_scale: Positive = 1.1       # scale of eps_hat in sampling (paper: 1)
    temperature: NonNegative = 0.9  # scale of all noise in sampling (paper: 1)
    n_samples: Count = 64           # pictures drawn at the end
    # data
    dataset: str = "digits"  # digits, mnist, folder:PATH, ... (paper: cifar10)
    image_size: Whole = 0    # resize or pad pictures to this resolution; 0 keeps theirs
    flip: bool = False       # mirror pictures at random (paper: yes; never for digits)
    # network
    channels: Count = 32                 # width of the U-Net, even, >= 4 (code: 128)
    mults: tuple[Count, ...] = (1, 2)    # relative width of each level (code: 1 2 2 2)
    blocks: Count = 1                    # residual blocks per level (paper: 2)
    attention: tuple[Count, ...] = (7,)  # resolutions with attention (paper: 16)
    heads: Count = 1                     # attention heads (code: 1)
    groups: Count = 8                    # groups in each group norm (code: 32)
    dropout: Fraction = 0.0              # dropout in residual blocks (paper: 0.1)
    patch: Count = 2                     # p x p pixels become channels (paper: none, 1)
    # training
    drawing: Drawing = "logit_normal"  # distribution of t in training (paper: uniform)
    steps: Count = 4000                # optimiser steps (paper: 800000)
    batch_size: Count = 32             # examples per step, all processes (paper: 128)
    lr: Positive = 2e-3                # peak learning rate (paper: 2e-4)
    warmup: Whole = 200                # steps of learning-rate warm-up (code: 5000)
    decay: Literal["cosine", "constant"] = "cosine"  # decay of lr (paper: constant)
    weight_decay: NonNegative = 0.0    # AdamW's weight decay; 0 gives Adam (paper: 0)
    grad_clip: Positive = 1.0          # largest norm of the gradient (code: 1)
    ema: Fraction = 0.999              # decay of the averaged weights (paper: 0.9999)
    preview_every: Count = 1000        # steps between previews and checkpoints


# these may change after training
SAMPLING = (
    "S", "eta", "spacing", "sigma_hat", "clip_x0", "eps_scale", "temperature",
    "n_samples")


PRESETS = {
    "laptop": Config(),
    "smoke": Config(
        T=20, channels=8, groups=4, steps=6, batch_size=8, warmup=2, preview_every=3,
        S=5, n_samples=4),
    "paper": Config(  # CIFAR-10, [DDPM] App. B
        dataset="cifar10", flip=True, channels=128, mults=(1, 2, 2, 2), blocks=2,
        attention=(16,), groups=32, dropout=0.1, patch=1, steps=800_000, batch_size=128,
        lr=2e-4, warmup=5000, decay="constant", ema=0.9999, preview_every=5000,
        drawing="uniform",
        S=100, spacing="quadratic", clip_x0=False, eps_scale=1.0, temperature=1.0),
}


# %% 1. Forward process ([DDPM] Sec. 2)


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
    another T, so that x_T is noise all the same. "cosine": arXiv 2102.09672, Eq. 17.
    """
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
    alphas = 1 - betas  # [DDPM] Sec. 2
    alpha_bars = alphas.cumprod(0)  # [DDPM] Sec. 2: alpha_1 * ... * alpha_t
    return Schedule(betas.float(), alphas.float(), alpha_bars.float())


def q_sample(x0, t, eps, alpha_bars):
    """x_t given x_0. x0, eps: (B, C, H, W), t: int or (B,) int64 in 0..T."""
    alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps  # [DDPM] Eq. 4


# %% 2. Training objective ([DDPM] Sec. 3.4)


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


def scaled(model, scale):
    """The network with its eps_hat times scale, for sampling.

    x0_hat is a mean over all pictures that x_t may show, pale where they differ. A
    scale above 1 strengthens it, and the clamp keeps it in [-1, 1]; one below 1
    corrects the drift of large models in few steps (arXiv 2308.15321).
    """
    return lambda xt, t: scale * model(xt, t)


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


def sigma_hat_step(xt, eps_hat, t, t_prev, alpha_bars, eta, z):
    """ddim_step at eta = 1, whatever eta, its noise the larger sigma_hat. App. D.3."""
    mean = ddim_step(xt, eps_hat, t, t_prev, alpha_bars, eta=1.0, z=0.0)
    sigma_hat = (1 - alpha_bars[t] / alpha_bars[t_prev]).sqrt()
    return mean + sigma_hat * z if t_prev > 0 else mean  # a clean end: [DDPM] Alg. 2


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
def ddim_invert(model, x0, schedule, S=50, spacing="linear"):
    """x_T that encodes images x0: (B, C, H, W). [DDIM] Sec. 5.4: Eq. 14 reversed."""
    xt, alpha_bars = x0, schedule.alpha_bars
    tau = [0, *ddim_timesteps(schedule.T, S, spacing)]
    for i in range(S):
        t = max(tau[i], tau[1])  # untrained at t = 0: the first step asks at tau_1
        eps_hat = predict_eps(model, xt, t, alpha_bars)
        xt = ddim_step(xt, eps_hat, tau[i], tau[i + 1], alpha_bars)
    return xt


def slerp(a, b, share):
    """Spherical interpolation, a (share 0) to b (share 1): (B, ...). [DDIM] App. D.5"""
    theta = torch.acos(F.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1))
    theta = theta.clamp(min=1e-4)  # between parallel vectors a line, the limit
    theta = theta.view(-1, *[1] * (a.ndim - 1))
    return (((1 - share) * theta).sin() * a + (share * theta).sin() * b) / theta.sin()


# %% 4. Network


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


def train(cfg, run, data):
    """Train on data.train; returns the averaged network in eval mode. [DDPM] Alg. 1."""
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(run.device)
    model = run.place(make_unet(cfg, data.shape))
    ema = EMA(model, cfg.ema)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, weight_decay=cfg.weight_decay,
        fused=run.device.type != "mps")  # one kernel for all weights

    # run.steps: progress bar, checkpoints, resume, Ctrl-C (common/run.py)
    for step in run.steps(cfg.steps, model=model, ema=ema.model, optimizer=optimizer):
        set_learning_rate(optimizer, cfg, step)
        x0, _ = run.batch(data.train)  # [DDPM] Alg. 1, line 2
        t = draw_t(len(x0), cfg.T, cfg.drawing).to(run.device)  # line 3
        eps = torch.randn_like(x0)  # line 4
        with run.autocast():
            loss = ddpm_loss(model, x0, t, eps, schedule)  # line 5
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(model)  # over all processes; fp16: drops an overflow
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        ema.update(model, step)
        run.log(loss=loss, grad_norm=norm)
        if run.main and (step + 1) % cfg.preview_every == 0:
            figure_preview(run, ema.model, data, schedule, step + 1)
    return ema.model


# %% 6. Figures and main


@plotting.figure("preview.png")
def figure_preview(run, model, data, schedule, step):
    """preview.png: x0_hat of held-out x_t at a few t: one network call, no sampling."""
    x0 = data.test[:6]
    generator = torch.Generator().manual_seed(0)  # training draws are left alone
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    rows, labels = [x0], ["held out"]
    for share in (0.1, 0.3, 0.5, 0.7):
        t = max(1, round(schedule.T * share))
        xt = q_sample(x0, t, eps, schedule.alpha_bars)
        eps_hat = predict_eps(model, xt, t, schedule.alpha_bars)
        rows += [xt, predict_x0(xt, eps_hat, t, schedule.alpha_bars)]
        labels += [f"x_t, t = {t}", "x0_hat"]
    title = f"What one network call recovers, step {step}"
    plotting.table(run.path("preview.png"), rows, title, labels)


@plotting.figure("loss.png")
def figure_loss(run, model, data, schedule):
    """loss.png: the training loss, and the held-out loss by t."""
    x0 = data.test[:200]

    def loss(low, high):
        t = torch.randint(low, max(high, low + 1), (len(x0),), device=x0.device)
        return ddpm_loss(model, x0, t, torch.randn_like(x0), schedule).item()

    edges = [1 + schedule.T * i // 10 for i in range(11)]
    plotting.curves(run.path("loss.png"), [
        plotting.loss_curve(run.read_log(), "training loss"),
        plotting.loss_by_t(loss, edges, "held-out loss by t")])


@plotting.figure("denoising.gif", "denoising.png")
def figure_denoising(run, model, states, alpha_bars):
    """denoising.gif: x_t on its way; denoising.png: x_t, and below it x0_hat."""
    states = list(states)
    frames, columns = plotting.evenly(states, 33), plotting.evenly(states[:-1], 8)
    captions = [f"t = {t}" for t, _ in frames]
    plotting.gif(run.path("denoising.gif"), [xt for _, xt in frames], 3, captions)

    xts = torch.stack([xt[:3] for _, xt in columns], dim=1)  # (3, 8, C, H, W)
    eps_hats = torch.stack([predict_eps(model, xt[:3], t, alpha_bars)
                            for t, xt in columns], dim=1)
    x0_hats = torch.stack([predict_x0(xts[:, i], eps_hats[:, i], t, alpha_bars)
                           for i, (t, _) in enumerate(columns)], dim=1)
    rows = torch.stack([xts, x0_hats], dim=1).flatten(0, 1)
    plotting.table(run.path("denoising.png"), list(rows), "x_t and x0_hat on the way",
                   ["x_t", "x0_hat"] * 3, [f"t = {t}" for t, _ in columns])


@plotting.figure("steps.png", "eta.png")
def figure_steps(run, cfg, model, schedule, shape):
    """steps.png: each column one noise, in more and more steps; eta.png: each twice.

    With eta = 0 the noise x_T is a code: it alone says which picture.
    """
    xT = torch.randn(8, *shape, device=run.device)
    counts = [S for S in (5, 10, 20, 50, 100) if S < cfg.T] + [cfg.T]
    how = cfg.spacing, cfg.clip_x0, xT, cfg.temperature
    rows = [ddim_sample(model, xT.shape, schedule, S, 0.0, *how) for S in counts]
    plotting.table(run.path("steps.png"), rows, "Each column: one noise, S steps",
                   [f"S = {S}" for S in counts])

    etas, xT = (0.0, 0.2, 0.5, 1.0), xT[:5].repeat_interleave(2, 0)
    how = cfg.spacing, cfg.clip_x0, xT, cfg.temperature
    rows = [ddim_sample(model, xT.shape, schedule, cfg.S, eta, *how) for eta in etas]
    plotting.table(run.path("eta.png"), rows,
                   f"Each noise x_T drawn from twice, {cfg.S} steps",
                   [f"eta = {eta:g}" for eta in etas],
                   [name for i in range(5) for name in (f"noise {i + 1}", "again")])


@plotting.figure("interpolation.png", "interpolation.gif")
def figure_interpolation(run, cfg, model, schedule, shape):
    """interpolation.png: from noise to noise, on the sphere and on the line.

    interpolation.gif: on the sphere, through three noises.
    """
    def decode(xT):
        return ddim_sample(model, xT.shape, schedule, min(50, cfg.S), 0.0, cfg.spacing,
                           cfg.clip_x0, xT, cfg.temperature)

    shares = torch.linspace(0, 1, 9, device=run.device).view(-1, 1, 1, 1)
    rows, labels = [], []
    for _ in range(2):
        a, b = torch.randn(2, 1, *shape, device=run.device).expand(2, 9, *shape)
        for name, xT in (("slerp", slerp(a, b, shares)),
                         ("line", (1 - shares) * a + shares * b)):
            rows.append(decode(xT))
            labels.append(f"{name}: std of x_T\n{xT[4].std():.2f} in the middle")
    plotting.table(run.path("interpolation.png"), rows,
                   "Between two noises, eta = 0", labels,
                   [f"{u:.2f}" for u in shares.flatten()])

    noises, frames, captions = torch.randn(3, 6, *shape, device=run.device), [], []
    for i, share in ((i, share / 12) for i in range(3) for share in range(12)):
        frames.append(slerp(noises[i], noises[i - 2], share))
        captions.append(f"x_T from noise {i + 1} to {(i + 1) % 3 + 1}, {share:.0%}")
    frames = decode(torch.cat(frames)).split(6)
    plotting.gif(run.path("interpolation.gif"), frames, 6, captions, hold=0)


@plotting.figure("reconstruction.png")
def figure_reconstruction(run, cfg, model, schedule, data):
    """reconstruction.png: pictures, their codes, what comes back of them."""
    x0, errors, rows, codes = data.test[:8], {}, [], []
    for S in [S for S in (10, 20, 50, 100, 200) if S < cfg.T] or [cfg.T]:
        xT = ddim_invert(model, x0, schedule, S, cfg.spacing)
        back = ddim_sample(model, x0.shape, schedule, S, 0.0, cfg.spacing, False, xT)
        errors[S] = (back - x0).square().mean().sqrt().item()
        rows.append(back)
        codes.append(xT)
    labels = [f"back, S = {S}\nrms {error:.3f}" for S, error in errors.items()]
    codes = {f"x_T, S = {min(errors)}": codes[0], f"x_T, S = {max(errors)}": codes[-1],
             "N(0, I)": torch.randn_like(x0)}
    labels += [f"{name}\nstd {xT.std():.2f}" for name, xT in codes.items()]
    plotting.table(run.path("reconstruction.png"), [x0, *rows, *codes.values()],
                   "Encoded and decoded in S steps each, and the codes x_T",
                   ["held out", *labels])
    run.add_metrics(reconstruction_error_by_S=errors)


@plotting.figure("quality.png")
def figure_quality(run, cfg, model, states, data):
    """quality.png: Fréchet distance against S, the paper's Table 1 in small."""
    counts = [S for S in (10, 20, 50, 100) if S < cfg.T] + [cfg.T]
    scores, lines = {}, {}
    for name, how in (("eta = 0", {"eta": 0.0}), ("eta = 1", {"eta": 1.0}),
                      ("sigma_hat", {"eta": 1.0, "step": sigma_hat_step})):
        scores[name] = {S: run.quality(partial(states, S=S, **how), model, S, data)
                        for S in counts}
        run.add_metrics(evaluation_by_S=scores)
        distances = [found["frechet_distance"] for found in scores[name].values()]
        lines[name] = counts, distances, "o-"
    held_out = scores[name][cfg.T]["frechet_distance_of_held_out"]
    plotting.curves(run.path("quality.png"), [{
        "lines": lines, "levels": {"held out": held_out}, "ylim": (0, None),
        "xlabel": "steps S", "xscale": "log", "ylabel": "Fréchet distance in features",
        "title": f"{run.opts.evaluate} samples per point"}])


@command_line
def main(argv=None):
    """Train, or load what was trained; draw; measure."""
    cfg, run = open_run("ddim", Config, PRESETS, SAMPLING, argv, reads=("ddpm",))
    data = run.load(load_images(cfg.dataset, cfg.image_size))
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(run.device)
    ddim_timesteps(cfg.T, cfg.S, cfg.spacing)  # raises before training if S > T
    if cfg.sigma_hat and cfg.eta != 1:
        raise Mistake(f"eta {cfg.eta}: must be 1 with --sigma_hat")
    if run.sampling:
        model = run.trained(make_unet(cfg, data.shape))
    else:
        model = train(cfg, run, data)
    if not run.main:
        return  # only the first process draws

    sharper = scaled(model, cfg.eps_scale)

    def states(batch, S=cfg.S, eta=cfg.eta,
               step=sigma_hat_step if cfg.sigma_hat else ddim_step):
        xT = torch.randn(len(batch), *data.shape, device=run.device)
        how = S, eta, cfg.spacing, cfg.clip_x0, cfg.temperature, step
        return ddim_process(sharper, xT, schedule, *how)

    samples, timing = run.draw(cfg.n_samples, states, model, cfg.S)
    run.add_metrics(sampling=timing, samples=quality.glance(samples, data))
    plotting.samples(run.path("samples.png"), samples, data, "Drawn from noise")
    plotting.neighbours(run.path("neighbours.png"), samples, data)
    figure_loss(run, model, data, schedule)
    figure_denoising(run, model, states(range(9)), schedule.alpha_bars)
    figure_steps(run, cfg, sharper, schedule, data.shape)
    figure_interpolation(run, cfg, sharper, schedule, data.shape)
    figure_reconstruction(run, cfg, model, schedule, data)
    run.evaluate(states, model, cfg.S, data)
    if run.opts.evaluate:
        figure_quality(run, cfg, model, states, data)
    run.finish()


if __name__ == "__main__":
    main()
