"""High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., arXiv 2112.10752).

    python latent_diffusion_example.py               train the autoencoder, then diffusion
    python latent_diffusion_example.py --vae RUN     the autoencoder of another run, no stage 1
    python latent_diffusion_example.py --sample --evaluate 500    score the newest run

Implemented here: the autoencoder with its KL regularisation and, as an option, the patch-based
adversarial objective (Sec. 3.1, Eq. 25), the measured scale of the latents (App. G), diffusion in
the latent space (Eq. 2) with the U-Net, schedule and objective of ddpm_example.py and the sampler
of ddim_example.py. Tags in the parts shared with those scripts are those of their papers.

Departures from the paper:
  1. No perceptual loss (LPIPS): it needs a network trained on ImageNet. The patch discriminator is
     there but off (`adversarial`), so the default autoencoder is a plain VAE.
  2. The laptop preset works on 2x2 blocks of pixels as channels (`vae_patch`), has small networks,
     squared error, and a KL weight of 0.01: the paper's 1e-6 goes with its large perceptual term.
  3. The scale is 1/std of sampled latents of the whole training set, the paper's is of one batch.
  4. AdamW with a cosine decay of the learning rate: few steps must do.

Latents are not clamped while sampling. From a cosine schedule's alpha_bar_T (2e-9) the first DDIM
step would magnify the network's error a thousandfold, so only the linear schedule is offered.

Measured on 2 CPU cores: the first command takes 365 s (autoencoder 63 s, diffusion 293 s, 64
samples 4 s); held-out digits come back at 31.6 dB. Of 500 samples (third command) a digit
classifier is sure of 78 % (of real digits: 95 %), Fréchet distance in its features 6.8 (held-out
digits: 0.7). A training step of the same U-Net on pixels takes 9 times as long. Results:
results/latent/. Not run on CUDA; the paper preset was not trained, nor the discriminator beyond
its tests.
"""

import copy
import math
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import metrics, plotting
from common.cli import check, fail, parse_args
from common.data import load_images
from common.device import Stopwatch, autocast, launch, peak_memory_mb
from common.plotting import plt
from common.runs import load_checkpoint, restore, resume_training, start


@dataclass(frozen=True)
class Config:
    # autoencoder
    vae: str = ""                    # run or checkpoint whose autoencoder is taken: skips stage 1
    factor: int = 4                  # sides shrink by f = 2, 4 or 8 (paper: 4 and 8 are best)
    z_channels: int = 4              # channels of the latents (paper: 3 or 4)
    vae_channels: int = 32           # base width of the autoencoder (paper: 128)
    vae_blocks: int = 1              # residual blocks a level (paper: 2)
    vae_patch: int = 2               # side of the pixel blocks made channels (paper: none, 1)
    kl_weight: float = 1e-2          # of the KL, both terms summed over an image (paper: 1e-6)
    reconstruction: str = "l2"       # reconstruction loss: l1 or l2 (paper: l1 and perceptual)
    adversarial: float = 0.0         # weight of the patch discriminator, 0: none (paper: 0.5)
    adversarial_start: int = 500     # stage-1 steps before it joins (paper: 50000)
    vae_steps: int = 2000            # optimiser steps of stage 1
    vae_lr: float = 2e-3             # peak learning rate of stage 1 (paper: 4.5e-6 a picture)
    # diffusion
    T: int = 1000                    # diffusion steps (paper: 1000)
    schedule: str = "linear"         # variance schedule; latents are not clamped, so linear only
    beta_1: float = 1e-4             # first variance of the linear schedule (paper: 1.5e-3)
    beta_T: float = 0.02             # last variance of the linear schedule (paper: 0.0195)
    # sampling
    S: int = 250                     # sampling steps, 1 to T (paper: 50 to 500)
    eta: float = 1.0                 # 0: deterministic, 1: as noisy as DDPM (paper: 0 to 1)
    spacing: str = "linear"          # of the steps: linear or quadratic
    n_samples: int = 64              # pictures drawn at the end
    # data
    dataset: str = "digits"          # digits, color_digits, folder:PATH, ... (paper: ImageNet, ...)
    image_size: int = 32             # resize or pad the pictures to this size; 0 keeps theirs
    flip: bool = False               # mirror pictures at random (paper: yes; never for digits)
    # network
    channels: int = 48               # base width of the U-Net (paper: 224)
    mults: tuple[int, ...] = (1, 2)  # width of each level as a multiple (paper: 1 2 3 4)
    blocks: int = 1                  # residual blocks a level (paper: 2)
    attention: tuple[int, ...] = (4,)    # latent resolutions with self-attention (paper: 32 16 8)
    heads: int = 1                   # attention heads (paper: one for 32 channels)
    groups: int = 8                  # groups of each group norm (paper: 32)
    dropout: float = 0.0             # dropout in the residual blocks (paper: 0)
    patch: int = 1                   # side of the latent blocks made channels (paper: none, 1)
    # training
    steps: int = 7500                # optimiser steps of stage 2 (paper: 410000)
    batch_size: int = 32             # pictures a step, over all processes (paper: 48)
    lr: float = 1e-3                 # peak learning rate of stage 2 (paper: 9.6e-5)
    warmup: int = 200                # steps of linear learning-rate warm-up
    decay: str = "cosine"            # after the warm-up: cosine to 0, or constant (paper: constant)
    weight_decay: float = 0.0        # AdamW's weight decay; 0 makes it Adam (paper: 0.01)
    grad_clip: float = 1.0           # largest norm of the gradient of stage 2
    ema: float = 0.999               # decay of the average of the U-Net's weights (paper: 0.9999)
    preview_every: int = 1000        # steps between previews and checkpoints


PRESETS = {
    "laptop": Config(),
    "smoke": Config(
        vae_channels=8, vae_steps=4, T=20, S=5, n_samples=4, channels=8, groups=4, steps=6,
        batch_size=8, warmup=2, preview_every=3),
    "paper": Config(z_channels=3, vae_channels=128, vae_blocks=2, vae_patch=1, kl_weight=1e-6,
                    reconstruction="l1", adversarial=0.5, adversarial_start=50_000,
                    vae_steps=200_000, vae_lr=2e-4, beta_1=1.5e-3, beta_T=0.0195, S=200,
                    dataset="cifar10", flip=True, channels=224, mults=(1, 2, 3, 4), blocks=2,
                    attention=(8, 4, 2), heads=7, groups=32, steps=410_000, batch_size=48,
                    lr=9.6e-5, warmup=5000, decay="constant", weight_decay=0.01, ema=0.9999,
                    preview_every=5000),
}
SAMPLING = ("S", "eta", "spacing", "n_samples")  # what may change when a trained model is loaded


def validate(cfg):
    """End the program with one line if a value is out of range."""
    if cfg.schedule == "cosine":
        fail("--schedule cosine: must be linear (latents are not clamped, alpha_bar_T near 0 "
             "magnifies errors)")
    check(cfg, z_channels=">= 1", vae_channels=">= 4", vae_blocks=">= 1", vae_patch=">= 1",
          kl_weight=">= 0", reconstruction=("l1", "l2"), adversarial=">= 0",
          adversarial_start=">= 0", vae_steps=">= 1", vae_lr="> 0", T=">= 1", schedule=("linear",),
          beta_1="(0, 1)", beta_T="(0, 1)", S=">= 1", eta="[0, 1]", spacing=("linear", "quadratic"),
          n_samples=">= 1", image_size=">= 0", channels=">= 4", mults=">= 1", blocks=">= 1",
          attention=">= 1", heads=">= 1", groups=">= 1", dropout="[0, 1)", patch=">= 1",
          steps=">= 1", batch_size=">= 1", lr="> 0", warmup=">= 0", decay=("cosine", "constant"),
          weight_decay=">= 0", grad_clip="> 0", ema="[0, 1)", preview_every=">= 1")
    if cfg.factor not in (2, 4, 8):
        fail(f"--factor {cfg.factor}: must be one of 2, 4, 8")
    if cfg.vae_patch not in (1, 2, 4, 8) or cfg.vae_patch > cfg.factor:
        fail(f"--vae_patch {cfg.vae_patch}: must be 1, 2, 4 or 8 and at most --factor {cfg.factor}")
    if cfg.S > cfg.T:
        fail(f"--S {cfg.S}: must be in [1, {cfg.T}], the number of diffusion steps --T")
    if not cfg.mults:
        fail("--mults: needs at least one number")
    for name in ("channels", "vae_channels"):
        if getattr(cfg, name) % cfg.groups:
            fail(f"--groups {cfg.groups}: must divide --{name} {getattr(cfg, name)}")
    if cfg.channels % 2:
        fail(f"--channels {cfg.channels}: must be even (the time embedding pairs sine and cosine)")
    if any(cfg.channels * mult % cfg.heads for mult in cfg.mults):
        fail(f"--heads {cfg.heads}: must divide the channels of every level "
             f"({' '.join(str(cfg.channels * mult) for mult in cfg.mults)})")


def latent_shape(cfg, shape):
    """(C, H, W) of the latents of images of this shape; a size that does not divide is fatal."""
    _, H, W = shape
    if H % cfg.factor or W % cfg.factor:
        fail(f"--factor {cfg.factor}: must divide the image size {H}")
    side, multiple = H // cfg.factor, cfg.patch * 2 ** (len(cfg.mults) - 1)
    if side % multiple:
        fail(f"--factor {cfg.factor}: makes latents of side {side} from images of {H}, which must "
             f"be a multiple of {multiple} (patch {cfg.patch}, {len(cfg.mults)} levels)")
    return cfg.z_channels, side, W // cfg.factor


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


def q_sample(x0, t, eps, alpha_bars):
    """x_t given x_0. x0, eps: (B, C, H, W), t: int or (B,) int64 in 0..T. Source: Eq. 4."""
    alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps  # Eq. 4


# %% 2. Training objective


def reparameterise(mean, logvar, eps):
    """z ~ N(mean, exp(logvar)) from eps ~ N(0, I), all (B, c, h, w), with a gradient to both."""
    return mean + (0.5 * logvar).exp() * eps


def gaussian_kl(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, I)), summed over an image: (B, C, H, W) twice -> (B,)."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def vae_loss(x, x_hat, mean, logvar, kl_weight, reconstruction="l2"):
    """The objective of stage 1 without its adversary -> (loss, reconstruction, kl), three scalars.

    x, x_hat: (B, C, H, W); mean, logvar: (B, c, h, w). Both terms are summed over an image and
    averaged over the batch: with a mean over pixels instead, the same kl_weight would weigh C*H*W
    times as much. Source: Sec. 3.1 and App. G, the KL-regularised variant.
    """
    error = (x_hat - x).abs() if reconstruction == "l1" else (x_hat - x) ** 2
    error, kl = error.flatten(1).sum(1).mean(), gaussian_kl(mean, logvar).mean()
    return error + kl_weight * kl, error, kl  # Eq. 25, L_rec + L_reg


def discriminator_loss(real, fake):
    """Hinge loss of the patch logits real, fake: (B, 1, h, w) -> scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


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
def encode_all(vae, x, batch_size=200):
    """Mean and log-variance of the latents of many images: (N, C, H, W) -> two (N, c, h, w)."""
    parts = [vae.encode(part) for part in x.split(batch_size)]
    return torch.cat([mean for mean, _ in parts]), torch.cat([logvar for _, logvar in parts])


def latent_scale(mean, logvar, eps=None):
    """1/std of *sampled* latents, one number for all channels. mean, logvar, eps: (N, c, h, w).

    Diffusion sees scale * z, of unit standard deviation; decoding undoes it. Source: App. G.
    """
    z = reparameterise(mean, logvar, torch.randn_like(mean) if eps is None else eps)
    return 1 / z.double().std().item()


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


def ddim_timesteps(T, S, spacing="linear"):
    """The sub-sequence tau of 1..T: S distinct ascending ints that end in T. Source: App. D.2."""
    if spacing == "quadratic":
        return [max(i, T * i * i // S**2) for i in range(1, S + 1)]
    return [T * i // S for i in range(1, S + 1)]


def ddim_step(xt, eps_hat, t, t_prev, alpha_bars, eta=0.0, z=None, sigma_hat=False):
    """One generalised step x_t -> x_{t_prev}. xt, eps_hat, z: (B, C, H, W), t, t_prev: int in 0..T.

    z is needed where eta > 0. sigma_hat: only the noise grows to App. D.3's standard deviation, and
    none is added on the way to t_prev = 0. Source: Eq. 12 with the sigma of Eq. 16.
    """
    alpha_bar, alpha_bar_prev = alpha_bars[t], alpha_bars[t_prev]
    sigma = torch.zeros_like(alpha_bar)
    if eta > 0:
        sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt()  # Eq. 16
        sigma = sigma * (1 - alpha_bar / alpha_bar_prev).sqrt()
    x0_hat = (xt - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt()  # Eq. 9, "predicted x_0"
    direction = (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt() * eps_hat  # "pointing to x_t"
    x_prev = alpha_bar_prev.sqrt() * x0_hat + direction  # Eq. 12
    if eta == 0 or t_prev == 0:
        return x_prev
    noise = (1 - alpha_bar / alpha_bar_prev).sqrt() if sigma_hat else sigma  # App. D.3
    return x_prev + noise * z  # Eq. 12, "random noise"


@torch.no_grad()
def ddim_sample(model, shape, schedule, S=50, eta=0.0, spacing="linear", clip_x0=True, xT=None,
                sigma_hat=False, bar=None):
    """From noise to images (B, C, H, W) in S network calls. Source: Eq. 12 along tau, Sec. 4.2.

    xT: the noise to start from (drawn when None). The clamp acts on x0_hat, and eps_hat is computed
    again from it. bar: a tqdm that is advanced by one a network call.
    """
    xt = torch.randn(shape, device=schedule.betas.device) if xT is None else xT
    taus = [0] + ddim_timesteps(schedule.T, S, spacing)
    for t, t_prev in zip(taus[:0:-1], taus[-2::-1], strict=True):
        alpha_bar = schedule.alpha_bars[t]
        x0_hat = predict_x0(model, xt, t, schedule, clip_x0)
        eps_hat = (xt - alpha_bar.sqrt() * x0_hat) / (1 - alpha_bar).sqrt()  # Eq. 4 solved for eps
        z = torch.randn_like(xt) if eta > 0 and t_prev > 0 else None
        xt = ddim_step(xt, eps_hat, t, t_prev, schedule.alpha_bars, eta, z, sigma_hat)
        if bar is not None:
            bar.update()
    return xt


@torch.no_grad()
def decode(vae, z, scale, batch_size=100):
    """Scaled latents z: (B, c, h, w) -> images (B, C, H, W) clamped to [-1, 1]."""
    return torch.cat([vae.decode(part / scale) for part in z.split(batch_size)]).clamp(-1, 1)


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


class VAEBlock(nn.Module):
    """Two 3x3 convolutions and a skip: ResBlock without the time. (B, c_in, H, W) -> (B, c_out,
    H, W).
    """

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
    """Autoencoder with Gaussian latents. Images (B, C, H, W), latents (B, z_channels, H/f, W/f).

    Each of log2(f / patch) levels halves the side and doubles the width, up to four times the base;
    attention sits at the lowest resolution. Source: Sec. 3.1, App. G.
    """

    def __init__(self, image_channels=1, factor=4, z_channels=4, channels=32, blocks=1, groups=8,
                 patch=2):
        super().__init__()
        self.factor, self.patch = factor, patch
        levels = (factor // patch).bit_length()  # 1 + log2(f / patch)
        widths = [channels * min(2**level, 4) for level in range(levels)]
        pixels, c = image_channels * patch**2, channels
        encoder = [nn.Conv2d(pixels, c, 3, padding=1)]
        for level, width in enumerate(widths):
            encoder += [Downsample(c)] if level else []
            for _ in range(blocks):
                encoder.append(VAEBlock(c, width, groups))
                c = width
        encoder += [Attention(c, 1, groups), VAEBlock(c, c, groups), nn.GroupNorm(groups, c),
                    nn.SiLU(), nn.Conv2d(c, 2 * z_channels, 3, padding=1)]
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
        mean, logvar = self.encoder(F.pixel_unshuffle(x, self.patch)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """Latents -> images, not clamped."""
        return F.pixel_shuffle(self.conv_out(self.decoder(z)), self.patch)

    def forward(self, x, eps):
        """x: (B, C, H, W), eps: (B, z_channels, H/f, W/f) ~ N(0, I) -> x_hat, mean, logvar."""
        mean, logvar = self.encode(x)
        return self.decode(reparameterise(mean, logvar, eps)), mean, logvar


class Discriminator(nn.Module):
    """Patch discriminator: a real-or-not logit for each patch. (B, C, H, W) -> (B, 1, H/4, W/4)."""

    def __init__(self, image_channels, channels, groups):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(image_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
            nn.GroupNorm(groups, 2 * channels), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 1, 3, padding=1))

    def forward(self, x):
        return self.body(x)


def make_vae(cfg, shape):
    """The autoencoder that cfg describes, for images of shape (C, H, W)."""
    return VAE(shape[0], cfg.factor, cfg.z_channels, cfg.vae_channels, cfg.vae_blocks, cfg.groups,
               cfg.vae_patch)


# %% 5. Training


def learning_rate(cfg, step):
    """Linear warm-up over cfg.warmup steps, then constant or a cosine to zero at cfg.steps."""
    rate = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup, 1))
    if cfg.decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
    return rate


def freeze(vae):
    """Eval mode and no gradients: what stage 2 does to the autoencoder."""
    vae.zero_grad(set_to_none=True)
    return vae.eval().requires_grad_(False)


def load_vae(cfg, shape, device):
    """The frozen autoencoder of the checkpoint cfg.vae; one that does not fit is fatal."""
    state, where = load_checkpoint(cfg.vae, ("latent",)), f"--vae {cfg.vae}"
    if "vae" not in state:
        fail(f"{where}: holds no autoencoder")
    for name in ("factor", "z_channels", "vae_channels", "vae_blocks", "vae_patch", "groups"):
        theirs = state["config"].get(name)
        if theirs != getattr(cfg, name):
            fail(f"--{name} {getattr(cfg, name)}: {where} was made with {theirs}")
    if list(state["shape"]) != list(shape):
        fail(f"{where}: was made for images of shape {tuple(state['shape'])}, "
             f"--dataset {cfg.dataset} has {tuple(shape)}")
    vae = make_vae(cfg, shape)
    restore(vae, state["vae"], where)
    return freeze(vae.to(device, memory_format=torch.channels_last))


def adversarial_weight(error, adversary, last):
    """Ratio of the gradients of both losses at the decoder's last layer, so that neither drowns the
    other (Esser et al., arXiv 2012.09841, Eq. 7).
    """
    ours, theirs = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
                    for loss in (error, adversary))
    return (ours / (theirs + 1e-4)).clamp(0, 1e4).detach()


def train_vae(cfg, run, data, state=None):
    """Stage 1. Returns the frozen autoencoder; writes log and checkpoint. state as in train."""
    device, shape = run.device, tuple(data.train.shape[1:])
    small = latent_shape(cfg, shape)
    vae = make_vae(cfg, shape).to(device, memory_format=torch.channels_last)
    judge = Discriminator(shape[0], cfg.vae_channels, cfg.groups).to(device)
    fused = device.type != "mps"
    optimizer = torch.optim.AdamW(vae.parameters(), cfg.vae_lr, weight_decay=0.0, fused=fused)
    judge_optimizer = torch.optim.AdamW(judge.parameters(), cfg.vae_lr, betas=(0.5, 0.9),
                                        weight_decay=0.0, fused=fused)
    first = 0
    if state:
        restore(judge, state["judge"])
        judge_optimizer.load_state_dict(state["judge_optimizer"])
        first = resume_training(state, vae, copy.deepcopy(vae), optimizer, run)
    network = torch.compile(vae) if run.opts.compile else vae
    parameters, done = list(vae.parameters()), first
    start_time = time.perf_counter()

    def save(step):
        run.save_checkpoint(step, {"model": vae, "ema": vae, "vae": vae, "judge": judge}, optimizer,
                            stage=1, judge_optimizer=judge_optimizer.state_dict(),
                            shape=list(shape))

    def update(loss, optimizer, parameters, step):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        run.launch.average([p.grad for p in parameters] + [loss.detach()])
        if not math.isfinite(loss.item()):
            fail(f"the loss of the autoencoder is {loss.item()} at step {step + 1}, "
                 f"--vae_lr {cfg.vae_lr:g} may be too high; the last good checkpoint is in "
                 f"{run.folder}")
        norm = nn.utils.clip_grad_norm_(parameters, 100.0)  # sums over an image: a large scale
        optimizer.step()
        return norm

    if first == 0:
        save(0)
    for step in run.steps(first, cfg.vae_steps):
        rate = cfg.vae_lr * min(1.0, (step + 1) / max(cfg.warmup, 1))
        rate *= 0.5 * (1 + math.cos(math.pi * step / cfg.vae_steps))
        for group in optimizer.param_groups + judge_optimizer.param_groups:
            group["lr"] = rate
        x = data.train[torch.randint(len(data.train), (cfg.batch_size,), device=device)]
        if cfg.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        eps = torch.randn(len(x), *small, device=device)
        x, eps = run.launch.shard(x), run.launch.shard(eps)
        # fp16 is for stage 2 alone: sums over an image would overflow its range
        with autocast(device, "bf16" if run.opts.amp == "bf16" else "off"):
            x_hat, mean, logvar = network(x, eps)
        loss, error, kl = vae_loss(x, x_hat.float(), mean.float(), logvar.float(), cfg.kl_weight,
                                   cfg.reconstruction)
        total = loss
        if cfg.adversarial and step >= cfg.adversarial_start:
            adversary = -judge(x_hat.float()).mean()  # Eq. 25, L_adv
            weight = adversarial_weight(error, adversary, vae.conv_out.weight)
            total = loss + cfg.adversarial * weight * adversary
        norm = update(total, optimizer, parameters, step)
        if cfg.adversarial and step >= cfg.adversarial_start:  # Eq. 25, the maximum over psi
            verdict = discriminator_loss(judge(x), judge(x_hat.detach().float()))
            update(verdict, judge_optimizer, list(judge.parameters()), step)
        done = step + 1
        run.log(done, stage=1, loss=total.item(), grad_norm=norm.item(), lr=rate,
                reconstruction=error.item(), kl=kl.item())
        run.bar.set_postfix(error=f"{error.item():.2f}", kl=f"{kl.item():.0f}", refresh=False)
        if done % cfg.preview_every == 0 and done < cfg.vae_steps:
            save(done)
    save(done)
    run.add_metrics(vae_steps=done, vae_seconds=time.perf_counter() - start_time,
                    vae_parameters=sum(p.numel() for p in vae.parameters()))
    return freeze(vae)


def train(cfg, run, data=None, state=None):
    """Both stages. Returns (averaged U-Net or None, frozen VAE, scale or None); writes log and
    checkpoint. None: stopped before stage 2.

    data: common.data.Data (loaded from cfg.dataset when None); state: a checkpoint to go on from.
    Ends the program, naming the step, if the loss stops being finite; the last good checkpoint
    stays.
    """
    device, opts = run.device, run.opts
    data = load_images(cfg.dataset, cfg.image_size).to(device) if data is None else data
    shape = tuple(data.train.shape[1:])
    small = latent_shape(cfg, shape)
    if cfg.batch_size % run.launch.world:
        fail(f"--batch_size {cfg.batch_size}: must be a multiple of {run.launch.world} processes")
    second = state if state and state["stage"] == 2 else None
    if second:
        vae = make_vae(cfg, shape)
        restore(vae, state["vae"])
        vae = freeze(vae.to(device, memory_format=torch.channels_last))
    elif cfg.vae:
        vae = load_vae(cfg, shape, device)
    else:
        vae = train_vae(cfg, run, data, state)
    if run.stopped:
        return None, vae, None

    # every latent is encoded once: its mean and log-variance, from which each step samples
    mean, logvar = encode_all(vae, data.train)
    mirrored = encode_all(vae, data.train.flip(3)) if cfg.flip else None
    scale = second["latent_scale"] if second else latent_scale(mean, logvar)
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(device)
    model = make_unet(cfg, small, opts.grad_checkpointing)
    model = model.to(device, memory_format=torch.channels_last)
    ema = EMA(model, cfg.ema)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=cfg.weight_decay,
                                  fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=opts.amp == "fp16")
    before_it = 0 if cfg.vae else cfg.vae_steps  # the log and the checkpoints count both stages
    first = 0
    if second:
        first = resume_training(second, model, ema.model, optimizer, run) - before_it
    network = torch.compile(model) if opts.compile else model
    parameters = list(model.parameters())
    core, start_time, done, saved = Stopwatch(device), time.perf_counter(), first, first

    def save(step):
        run.save_checkpoint(before_it + step, {"model": model, "ema": ema.model, "vae": vae},
                            optimizer, stage=2, latent_scale=scale, shape=list(shape))

    if first == 0:
        save(0)
    for step in run.steps(first, cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        i = torch.randint(len(mean), (cfg.batch_size,), device=device)
        m, v = mean[i], logvar[i]
        if cfg.flip:
            keep = torch.rand(len(i), 1, 1, 1, device=device) < 0.5
            m, v = torch.where(keep, m, mirrored[0][i]), torch.where(keep, v, mirrored[1][i])
        x0 = scale * reparameterise(m, v, torch.randn_like(m))  # unit standard deviation
        t = torch.randint(1, cfg.T + 1, (cfg.batch_size,), device=device)
        eps = torch.randn_like(x0)
        x0, t, eps = (run.launch.shard(z) for z in (x0, t, eps))
        with core:
            with autocast(device, opts.amp):
                loss = ddpm_loss(network, x0, schedule, t, eps)  # Eq. 2
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
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
        run.log(before_it + done, stage=2, loss=value, grad_norm=norm.item(),
                lr=learning_rate(cfg, step), reconstruction=math.nan, kl=math.nan)
        run.bar.set_postfix(loss=f"{value:.4f}", refresh=False)
        if done % cfg.preview_every == 0 and done < cfg.steps:
            save(done)
            saved = done
            figure_preview(run, ema.model, vae, scale, data, schedule, done)
    save(done)
    seconds = time.perf_counter() - start_time
    before = run.read_metrics().get("train_seconds", 0.0) if second else 0.0
    run.add_metrics(steps=done, train_seconds=before + seconds,
                    steps_per_second=(done - first) / seconds,
                    share_outside_core=1 - core.seconds / seconds,
                    parameters=sum(p.numel() for p in parameters), latent_scale=scale)
    return ema.model, vae, scale


# %% 6. Figures and main


def psnr(x, x_hat):
    """Peak signal-to-noise ratio in dB of x_hat to x: (B, C, H, W) in [-1, 1] -> (B,)."""
    error = ((x_hat.clamp(-1, 1) - x) ** 2).flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))  # the range is 2, its square 4


@torch.no_grad()
def figure_reconstructions(run, vae, data):
    """reconstructions.png: held-out pictures and what comes back. Returns the mean PSNR in dB."""
    x = data.test[:500]
    mean, _ = encode_all(vae, x)
    x_hat = decode(vae, mean, 1.0)
    values = psnr(x, x_hat)
    n = min(10, len(x))
    plotting.save_rows(
        run.path("reconstructions.png"), [x[:n], x_hat[:n]],
        f"Held-out pictures through the autoencoder: {values.mean().item():.1f} dB on average",
        ["original", "decode(encode)"], [f"{v:.1f} dB" for v in values[:n].tolist()])
    return values.mean().item()


@torch.no_grad()
def figure_latents(run, vae, data):
    """latents.png: the channels of the latents as pictures, each stretched to its own range."""
    x = data.test[:8]
    mean, _ = encode_all(vae, x)
    mean = mean / mean.abs().amax((0, 2, 3), keepdim=True)
    rows = [x] + [mean[:, i : i + 1] for i in range(mean.shape[1])]
    plotting.save_rows(run.path("latents.png"), rows, "What diffusion sees: the latent channels",
                       ["picture"] + [f"channel {i + 1}" for i in range(mean.shape[1])])


@torch.no_grad()
def figure_histogram(run, vae, scale, data):
    """histogram.png: sampled latents before and after scaling, against N(0, 1)."""
    mean, logvar = encode_all(vae, data.train[:1000])
    z = reparameterise(mean, logvar, torch.randn_like(mean)).cpu()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    grid = torch.linspace(-4, 4, 200)
    for axis, values, name in ((axes[0], z, "as encoded"), (axes[1], scale * z, "scaled")):
        axis.hist(values.flatten().numpy(), 100, (-4, 4), density=True, alpha=0.6, label=name)
        axis.plot(grid, torch.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi), "k", label="N(0, 1)")
        axis.set(title=f"{name}: std {values.std().item():.3f}", xlabel="value of a latent")
        axis.legend(frameon=False)
    figure.suptitle(f"Scale 1/std = {scale:.4f}, measured on sampled latents")
    figure.tight_layout()
    plotting.finish(figure, run.path("histogram.png"))


@torch.no_grad()
def figure_walk(run, vae, data, n=9):
    """walk.png: from one picture to another in latent space, and mixed in pixels below."""
    rows, labels = [], []
    mean, _ = encode_all(vae, data.test[:4])
    for a, b in ((0, 1), (2, 3)) if len(mean) >= 4 else ((0, 1),):
        shares = torch.linspace(0, 1, n, device=run.device).view(-1, 1, 1, 1)
        rows += [decode(vae, (1 - shares) * mean[a] + shares * mean[b], 1.0),
                 (1 - shares) * data.test[a] + shares * data.test[b]]
        labels += ["latent", "pixels"]
    plotting.save_rows(run.path("walk.png"), rows, "A straight line in latent space and in pixels",
                       labels)


@torch.no_grad()
def figure_preview(run, model, vae, scale, data, schedule, step):
    """preview.png: x0_hat of held-out latents at a few t, decoded; no sampling."""
    if not run.launch.main:
        return
    x = data.test[:6]
    x0 = scale * encode_all(vae, x)[0]
    generator = torch.Generator().manual_seed(
        0)  # its own, so that previews leave the training draws alone
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    rows, labels = [x], ["held out"]
    for t in (max(1, round(schedule.T * share)) for share in (0.1, 0.3, 0.5, 0.7)):
        xt = q_sample(x0, t, eps, schedule.alpha_bars)
        guess = predict_x0(model, xt, t, schedule, clip_x0=False)
        rows += [decode(vae, xt, scale), decode(vae, guess, scale)]
        labels += [f"z_t, t = {t}", "z0_hat"]
    plotting.save_rows(
        run.path("preview.png"), rows, f"What one network call recovers, step {step}", labels)


def figure_samples(run, samples, data):
    """samples.png, neighbours.png: samples beside real pictures, and their nearest in training."""
    n = min(64, len(samples))
    plotting.save_panels(run.path("samples.png"),
                         [("samples", samples[:n]), ("real, held out", data.test[:n])],
                         "Drawn in latent space and decoded, beside the real thing",
                         max(1, math.isqrt(n)))
    nearest, distance = metrics.nearest_neighbours(samples[:12], data.train)
    plotting.save_rows(run.path("neighbours.png"), [samples[:12], data.train[nearest]],
                       "Samples and their nearest training pictures: alike, not copied",
                       ["sample", "nearest"], [f"{d:.2f}" for d in distance.tolist()])


def figure_denoising(run, model, vae, scale, schedule, small, n=16, frames=16):
    """denoising.gif: the decoded guess of z_0 along a DDIM path."""
    xt, taus = torch.randn(n, *small, device=run.device), [0] + ddim_timesteps(
        schedule.T, min(frames, schedule.T))
    pictures, captions = [], []
    for t, t_prev in zip(taus[:0:-1], taus[-2::-1], strict=True):
        x0_hat = predict_x0(model, xt, t, schedule, clip_x0=False)
        alpha_bar = schedule.alpha_bars[t]
        eps_hat = (xt - alpha_bar.sqrt() * x0_hat) / (1 - alpha_bar).sqrt()
        pictures.append(decode(vae, x0_hat, scale))
        captions.append(f"z0_hat, t = {t}")
        xt = ddim_step(xt, eps_hat, t, t_prev, schedule.alpha_bars)
    plotting.save_gif(run.path("denoising.gif"), pictures, max(1, math.isqrt(n)), captions)


def figure_loss(run):
    """loss.png: the losses of the stages that this run trained."""
    log = run.read_log()
    if not log:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for axis, stage, name in ((axes[0], 1, "reconstruction"), (axes[1], 2, "loss")):
        rows = [i for i, s in enumerate(log["stage"]) if s == stage]
        if rows:
            steps, values = [log["step"][i] for i in rows], [log[name][i] for i in rows]
            axis.plot(steps, values, lw=0.4, alpha=0.35)
            axis.plot(steps, plotting.smooth(values, 100), lw=1.8)
            axis.set(yscale="log")
        axis.set(xlabel="step", title=f"stage {stage}: " + (
            "reconstruction error an image" if stage == 1 else "noise prediction (Eq. 2)"))
    figure.tight_layout()
    plotting.finish(figure, run.path("loss.png"))


def step_cost(cfg, shape, device, repeats=3):
    """What one training step of the U-Net costs on batches of this shape (C, H, W): seconds (the
    least of the repeats), 10^9 floating-point operations, and MB kept for the backward pass.
    """
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(device)
    model = make_unet(cfg, shape).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr)
    x0, kept = torch.randn(cfg.batch_size, *shape, device=device), {}

    def step():
        optimizer.zero_grad(set_to_none=True)
        ddpm_loss(model, x0, schedule).backward()
        optimizer.step()

    def remember(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        loss = ddpm_loss(model, x0, schedule)
    memory = sum(size for pointer, size in kept.items() if pointer not in weights)
    del loss
    with FlopCounterMode(display=False) as counter:
        step()
    seconds = []
    for _ in range(repeats):
        watch = Stopwatch(device)
        with watch:
            step()
        seconds.append(watch.seconds)
    return {"seconds": min(seconds), "gflop": counter.get_total_flops() / 1e9,
            "activations_mb": memory / 1e6}


def figure_cost(run, cfg, shape, small):
    """cost.png: a training step of the same U-Net on latents and on pixels. Returns the numbers."""
    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
        found = {"latent": step_cost(cfg, small, run.device),
                 "pixel": step_cost(cfg, shape, run.device)}
    found["pixel_over_latent"] = {
        name: found["pixel"][name] / found["latent"][name] for name in found["latent"]}
    figure, axes = plt.subplots(1, 3, figsize=(9, 3))
    titles = {"seconds": "seconds", "gflop": "10^9 operations", "activations_mb": "activations, MB"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        bars = axis.bar(["latent", "pixel"], [found[k][name] for k in ("latent", "pixel")],
                        color=["C0", "C1"])
        axis.bar_label(bars, fmt="%.3g")
        axis.set(title=f"{title}: {found['pixel_over_latent'][name]:.0f} times")
        axis.margins(y=0.15)
    figure.suptitle(f"One training step of the same U-Net, batch {cfg.batch_size}")
    figure.tight_layout()
    plotting.finish(figure, run.path("cost.png"))
    return found


def draw(cfg, run, model, vae, scale, schedule, small, n, batch_size=100):
    """n pictures: latents by DDIM, decoded. Returns (samples, timings)."""
    sizes = [min(batch_size, n - i) for i in range(0, n, batch_size)]
    inside, total = Stopwatch(run.device), Stopwatch(run.device)
    parts = []
    with total, tqdm(total=cfg.S * len(sizes), desc=f"sample {n}", unit="call") as bar:
        for size in sizes:
            with inside:
                z = ddim_sample(model, (size, *small), schedule, cfg.S, cfg.eta, cfg.spacing,
                                clip_x0=False, bar=bar)
            parts.append(decode(vae, z, scale))
    return torch.cat(parts), {"seconds": total.seconds,
                              "share_decoding": 1 - inside.seconds / total.seconds}


def main(argv=None):
    """Read the command line, train both stages (or load), sample, draw the figures, measure."""
    begin = time.perf_counter()
    cfg, opts = parse_args(Config, PRESETS, argv, SAMPLING)
    validate(cfg)
    place = launch(opts.device)
    autocast(place.device, opts.amp)  # refuses what this device cannot do, before anything is made
    cfg, run, state = start("latent", Config, cfg, opts, place, validate)
    data = load_images(cfg.dataset, cfg.image_size).to(place.device)
    shape = tuple(data.train.shape[1:])
    small = latent_shape(cfg, shape)
    if opts.evaluate and data.train_labels is None:
        fail(f"--evaluate {opts.evaluate}: --dataset {cfg.dataset} has no labels to score by")
    if cfg.vae and state is None:
        load_vae(cfg, shape, place.device)  # refuses what does not fit, before anything is made
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(place.device)
    if opts.sample is None:
        model, vae, scale = train(cfg, run, data, state)
    else:
        if "latent_scale" not in state or "vae" not in state:
            fail(f"--sample {opts.sample}: holds no autoencoder with its latent scale (stopped "
                 f"before stage 2?)")
        if list(state["shape"]) != list(shape):
            fail(f"--sample {opts.sample}: was made for images of shape {tuple(state['shape'])}")
        model = make_unet(cfg, small).eval().to(place.device, memory_format=torch.channels_last)
        vae, scale = make_vae(cfg, shape), state["latent_scale"]
        restore(model, state["ema"])
        restore(vae, state["vae"])
        vae = freeze(vae.to(place.device))
    if not place.main:
        return
    run.say(f"writing to {run.folder}")
    figure_loss(run)
    run.add_metrics(psnr_held_out=figure_reconstructions(run, vae, data))
    figure_latents(run, vae, data)
    figure_walk(run, vae, data)
    if model is None:
        run.say("stopped in stage 1: no diffusion model to draw from; --resume goes on")
        run.report()
        return
    samples, timing = draw(cfg, run, model, vae, scale, schedule, small, cfg.n_samples)
    run.add_metrics(sampling=timing | {"n": cfg.n_samples, "network_calls": cfg.S})
    figure_samples(run, samples, data)
    figure_histogram(run, vae, scale, data)
    figure_denoising(run, model, vae, scale, schedule, small)
    run.add_metrics(cost_of_a_step=figure_cost(run, cfg, shape, small))
    classifier, judged = metrics.load_classifier(data)
    if classifier:
        sure = metrics.sure_share(metrics.probabilities(classifier, samples))
        run.add_metrics(samples={"sure": sure, "classifier": judged})
    if opts.evaluate:
        many, timing = draw(cfg, run, model, vae, scale, schedule, small, opts.evaluate)
        run.add_metrics(evaluation=metrics.quality(many, data, classifier) | timing)
        plotting.save_grid(run.path("evaluated.png"), many[:100], 10,
                           f"The first {min(100, len(many))} of {len(many)} samples")
    run.add_metrics(config=asdict(cfg), total_seconds=time.perf_counter() - begin,
                    peak_memory_mb=peak_memory_mb(place.device))
    run.report()


if __name__ == "__main__":
    main()
