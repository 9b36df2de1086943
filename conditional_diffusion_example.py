"""Conditional diffusion: Classifier-Free Diffusion Guidance (Ho & Salimans, arXiv 2207.12598),
Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, arXiv 2105.05233) and Scalable
Diffusion Models with Transformers (Peebles & Xie, arXiv 2212.09748).

    python conditional_diffusion_example.py                   train, then draw a class x w grid
    python conditional_diffusion_example.py --sample --classes 3 1 4 1 5 --w 0 1 3 8
    python conditional_diffusion_example.py --sample --guidance classifier
    python conditional_diffusion_example.py --sample --evaluate 500    accuracy and diversity by w
    python conditional_diffusion_example.py --backbone dit             a transformer for the U-Net
    python conditional_diffusion_example.py --compare 240              both, at equal training time

Implemented here, [CFG] being the first paper, [ADM] the second and [DiT] the third: joint training
of the conditional and the unconditional model ([CFG] Alg. 1), guidance by their difference ([CFG]
Eq. 6, Alg. 2), guidance by a classifier of noisy images ([ADM] Alg. 1, 2), adaptive group
normalisation ([ADM] Sec. 3.1), the transformer with adaLN-Zero blocks ([DiT] Sec. 3). Tags without
a name, in the parts shared with ddpm_example.py and ddim_example.py, are those of the DDPM and DDIM
papers.

Guidance is counted as in [CFG]: w = 0 is the conditional model, w = -1 the unconditional one. The
scale s of [ADM], and the "guidance scale" of most other code, is 1 + w; --w sets both.

Departures from the papers:
1. discrete t in 1..T as in DDPM ([CFG] draws a continuous log-SNR), and for the U-Net DDPM's layout
   with the normalisation of [ADM];
2. the DiT predicts eps alone, not the variance, and works on pixels, not on latents;
3. the U-Net works on 2x2 pixel blocks (--patch 1 takes single pixels): four times faster.

Measured on 2 CPU cores: the first command takes 249 s (240 s of training, 0.8 s for 100 digits of
10 DDIM steps); at w = 2 an independent classifier agrees with 99.6 % of 500 labels, Fréchet
distance in its features 7.2 (w = 1: 3.8; held-out digits: 0.9). After 240 s of training each, the
DiT is far behind: 33 % against the U-Net's 99.8 %; after 703 s (--backbone dit --steps 16000 --lr
3e-3) it has 97 %. Results: results/conditional/. Not run on CUDA; the paper and dit presets were
not trained.
"""

import copy
import functools
import hashlib
import math
import os
import time
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common import metrics, plotting
from common.cli import check, fail, parse_args
from common.data import CACHE, load_images
from common.device import Stopwatch, autocast, launch, peak_memory_mb
from common.plotting import plt
from common.runs import Run, restore, resume_training, start


@dataclass(frozen=True)
class Config:
    # diffusion
    T: int = 1000                    # diffusion steps (paper: 1000)
    schedule: str = "linear"         # linear or cosine variance schedule (paper: linear)
    beta_1: float = 1e-4             # first variance of the linear schedule (paper: 1e-4)
    beta_T: float = 0.02             # last variance of the linear schedule (paper: 0.02)
    # guidance
    p_uncond: float = 0.1            # share of labels dropped in training (paper: 0.1 or 0.2)
    guidance: str = "classifier_free"    # classifier_free, classifier, or none: the labels alone
    classes: tuple[int, ...] = ()    # what to draw, in this order; none given: every class
    w: tuple[float, ...] = (-1.0, 0.0, 1.0, 2.0, 4.0)    # guidance weights to draw, s = 1 + w
    w_samples: float = 2.0           # guidance weight of the samples (paper: 0 to 4)
    classifier_steps: int = 1500     # steps of the noisy classifier (paper: 300000)
    # sampling
    sampler: str = "ddim"            # ddim: S steps, or ancestral: all T (paper: both)
    S: int = 10                      # DDIM steps, 1 to T (paper: 25 DDIM or 250 ancestral)
    eta: float = 0.0                 # 0: deterministic (DDIM), 1: as noisy as DDPM
    spacing: str = "linear"          # of the DDIM steps: linear or quadratic
    variance: str = "beta_tilde"     # of the ancestral step: beta or beta_tilde
    clip_x0: bool = True             # clamp the predicted x_0 to [-1, 1] while sampling
    n_samples: int = 500             # pictures drawn at the end, over all the classes
    # data
    dataset: str = "digits"          # digits, mnist, cifar10, folder:PATH, ... (paper: imagenet)
    image_size: int = 0              # resize the pictures to this size; 0 keeps theirs
    flip: bool = False               # mirror pictures at random (never for digits)
    # network
    backbone: str = "unet"           # unet or dit
    channels: int = 32               # base width of the U-Net (paper: 128 and more)
    mults: tuple[int, ...] = (1, 2)  # width of each level as a multiple (paper: 1 2 2 2 and more)
    blocks: int = 1                  # residual blocks a level (paper: 2)
    attention: tuple[int, ...] = (7,)    # resolutions with self-attention (paper: 32 16 8)
    heads: int = 1                   # attention heads (paper: 4 and more)
    groups: int = 8                  # groups of each group norm (paper: 32)
    dropout: float = 0.0             # dropout in the residual blocks (paper: 0.1)
    patch: int = 2                   # side of the pixel blocks made channels (paper: none, 1)
    dit_width: int = 96              # width of the DiT (paper: 384 to 1152)
    dit_depth: int = 4               # blocks of the DiT (paper: 12 to 28)
    dit_heads: int = 4               # attention heads of the DiT (paper: 6 to 16)
    dit_patch: int = 4               # side of the DiT's patches (paper: 2, 4 or 8)
    # training
    steps: int = 5000                # optimiser steps (paper: 400000 and more)
    batch_size: int = 32             # pictures a step, over all processes (paper: 256)
    lr: float = 2e-3                 # peak learning rate (paper: 1e-4)
    warmup: int = 200                # steps of linear learning-rate warm-up
    decay: str = "cosine"            # after the warm-up: cosine to 0, or constant (paper: constant)
    weight_decay: float = 0.0        # AdamW's weight decay; 0 makes it Adam (paper: 0)
    grad_clip: float = 1.0           # largest norm of the gradient
    ema: float = 0.999               # decay of the average of the weights (paper: 0.9999)
    preview_every: int = 2500        # steps between previews and checkpoints
    compare: float = 0.0             # seconds of training for U-Net and DiT each; 0: no comparison


def dit_preset(width, depth, heads):
    """A size of [DiT] Table 1 with patches of 2, trained as there, on CIFAR-10 pixels."""
    return Config(p_uncond=0.1, w=(0.0, 0.5, 1.5, 3.0), w_samples=0.5, S=250, dataset="cifar10",
                  flip=True, backbone="dit", dit_width=width, dit_depth=depth, dit_heads=heads,
                  dit_patch=2, steps=400_000, batch_size=256, lr=1e-4, warmup=0, decay="constant",
                  ema=0.9999, preview_every=5000, classifier_steps=50_000)


PRESETS = {
    "laptop": Config(),
    "smoke": Config(
        T=20, S=5, n_samples=20, channels=8, groups=4, dit_width=16, dit_depth=2, dit_heads=2,
        steps=6, batch_size=8, warmup=2, preview_every=3, classifier_steps=4, w=(0.0, 2.0)),
    "paper": Config(S=25, dataset="cifar10", flip=True, channels=128, mults=(1, 2, 2, 2), blocks=2,
                    attention=(16, 8), heads=4, groups=32, dropout=0.1, patch=1, steps=800_000,
                    batch_size=128, lr=2e-4, warmup=5000, decay="constant", ema=0.9999,
                    preview_every=5000, classifier_steps=50_000),
    "dit_s": dit_preset(384, 12, 6),
    "dit_b": dit_preset(768, 12, 12),
    "dit_l": dit_preset(1024, 24, 16),
    "dit_xl": dit_preset(1152, 28, 16),
}
# what may change when a trained model is loaded
SAMPLING = ("guidance", "classes", "w", "w_samples", "classifier_steps", "sampler", "S", "eta",
            "spacing", "variance", "clip_x0", "n_samples")


def validate(cfg):
    """End the program with one line if a value is out of range."""
    check(cfg, T=">= 1", schedule=("linear", "cosine"), beta_1="(0, 1)", beta_T="(0, 1)",
          p_uncond="[0, 1)", guidance=("classifier_free", "classifier", "none"), classes=">= 0",
          w=">= -1", w_samples=">= -1", classifier_steps=">= 1", sampler=("ddim", "ancestral"),
          S=">= 1", eta="[0, 1]", spacing=("linear", "quadratic"), variance=("beta", "beta_tilde"),
          n_samples=">= 1", image_size=">= 0", backbone=("unet", "dit"), channels=">= 4",
          mults=">= 1", blocks=">= 1", attention=">= 1", heads=">= 1", groups=">= 1",
          dropout="[0, 1)", patch=">= 1", dit_width=">= 4", dit_depth=">= 1", dit_heads=">= 1",
          dit_patch=">= 1", steps=">= 1", batch_size=">= 1", lr="> 0", warmup=">= 0",
          decay=("cosine", "constant"), weight_decay=">= 0", grad_clip="> 0", ema="[0, 1)",
          preview_every=">= 1", compare=">= 0")
    if cfg.S > cfg.T:
        fail(f"--S {cfg.S}: must be in [1, {cfg.T}], the number of diffusion steps --T")
    if not cfg.w:
        fail("--w: needs at least one number")
    if cfg.p_uncond == 0 and cfg.guidance != "none":
        fail(f"--p_uncond {cfg.p_uncond:g}: must be > 0 with --guidance {cfg.guidance}, which asks "
             "the network for the null class")
    if not cfg.mults:
        fail("--mults: needs at least one number")
    if cfg.channels % cfg.groups:
        fail(f"--groups {cfg.groups}: must divide --channels {cfg.channels}")
    if any(cfg.channels * mult % cfg.heads for mult in cfg.mults):
        fail(f"--heads {cfg.heads}: must divide the channels of every level "
             f"({' '.join(str(cfg.channels * mult) for mult in cfg.mults)})")
    if cfg.dit_width % 4:
        fail(f"--dit_width {cfg.dit_width}: must be a multiple of 4, for its 2-D positions")
    if cfg.dit_width % cfg.dit_heads:
        fail(f"--dit_heads {cfg.dit_heads}: must divide --dit_width {cfg.dit_width}")


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


def drop_labels(y, p, null):
    """Each label on its own becomes the null class with probability p. y: (B,) int64 -> (B,).
    Source: [CFG] Alg. 1, line 3.
    """
    dropped = torch.rand(len(y), device=y.device) < p
    return torch.where(dropped, null, y)


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


# %% 3. Sampling


def cfg_eps(model, xt, t, y, w):
    """Classifier-free guidance, in one network call on both halves. Source: [CFG] Eq. 6.

    xt: (B, C, H, W), t: int or (B,) int64, y: (B,) int64, w: number or (B,) -> like xt. The null
    class is y = model.classes.
    """
    t = torch.as_tensor(t, device=xt.device).expand(len(xt))
    w = torch.as_tensor(w, dtype=xt.dtype, device=xt.device).view(-1, 1, 1, 1)
    null = torch.full_like(y, model.classes)
    both = model(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([y, null]))
    eps_c, eps_u = both.chunk(2)
    return (1 + w) * eps_c - w * eps_u  # [CFG] Eq. 6


def classifier_gradient(classifier, xt, t, y):
    """The gradient of log p(y | x_t) with respect to x_t, like xt. t, y: (B,) int64."""
    with torch.enable_grad():
        xt = xt.detach().requires_grad_()
        log_p = classifier(xt, t).log_softmax(1).gather(1, y[:, None]).sum()
        return torch.autograd.grad(log_p, xt)[0]


def classifier_guided_eps(model, classifier, xt, t, y, s, alpha_bars):
    """Classifier guidance of the unconditional network. Source: [ADM] Alg. 2, Eq. 14.

    xt: (B, C, H, W), t: int or (B,) int64, y: (B,) int64, s: number or (B,) -> like xt.
    classifier(xt, t) gives logits (B, classes). With an exact network and classifier, s = 1 + w
    makes this cfg_eps.
    """
    t = torch.as_tensor(t, device=xt.device).expand(len(xt))
    s = torch.as_tensor(s, dtype=xt.dtype, device=xt.device).view(-1, 1, 1, 1)
    alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
    eps_hat = model(xt, t, torch.full_like(y, model.classes))
    gradient = classifier_gradient(classifier, xt, t, y)
    return eps_hat - (1 - alpha_bar).sqrt() * s * gradient  # [ADM] Eq. 14 with the scale s


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
def sample(model, shape, schedule, y, w=2.0, guidance="classifier_free", classifier=None,
           sampler="ddim", S=10, eta=0.0, spacing="linear", variance="beta_tilde", clip_x0=True,
           xT=None, bar=None):
    """From noise to images (B, C, H, W) of the classes y: (B,) int64, guided by w: number or (B,).

    guidance "classifier" takes the scale s = 1 + w, "none" the conditional model alone. Source:
    [CFG] Alg. 2, with DDPM's or DDIM's step; [ADM] Alg. 1 and 2.
    """
    xt = torch.randn(shape, device=schedule.betas.device) if xT is None else xT
    s = 1 + torch.as_tensor(w, dtype=xt.dtype, device=xt.device).view(-1, 1, 1, 1)

    def guided(x, t):
        if guidance == "classifier_free":
            return cfg_eps(model, x, t, y, w)  # [CFG] Alg. 2, line 3
        if guidance == "classifier" and sampler == "ddim":
            return classifier_guided_eps(model, classifier, x, t, y, s, schedule.alpha_bars)
        return model(x, t, torch.full_like(y, model.classes) if guidance == "classifier" else y)

    if sampler == "ddim":
        return ddim_sample(guided, shape, schedule, S, eta, spacing, clip_x0, xT=xt, bar=bar)
    for t in range(schedule.T, 0, -1):
        x_prev = p_sample(guided, xt, t, schedule, variance, clip_x0)
        if guidance == "classifier":  # [ADM] Alg. 1: the mean moves by s Sigma grad log p(y | x_t)
            beta_tilde = q_posterior(xt, xt, t, schedule)[1]
            sigma2 = beta_tilde if variance == "beta_tilde" else schedule.betas[t]
            ts = torch.full((len(xt),), t, device=xt.device)
            x_prev = x_prev + s * sigma2 * classifier_gradient(classifier, xt, ts, y)
        xt = x_prev
        if bar is not None:
            bar.update()
    return xt


# %% 4. Networks


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
    """Two 3x3 convolutions; time and class scale and shift the norm in between. (B, c_in, H, W) ->
    (B, c_out, H, W). Source: [ADM] Sec. 3.1, adaptive group normalisation.
    """

    def __init__(self, c_in, c_out, time_dim, groups, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift  # AdaGN(h, y) = y_s GroupNorm(h) + y_b
        h = self.conv2(self.dropout(F.silu(h)))
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
    """eps_hat(x_t, t, y): x: (B, C, H, W), t: (B,) int64 or float, y: (B,) int64, the null class
    where None -> (B, C, H, W). Source: App. B, with the class embedding of [ADM].

    H and W must be multiples of patch * 2^(levels - 1). attention: resolutions, counted after the
    patching, at which each residual block is followed by self-attention; the middle always has it.
    """

    def __init__(self, image_channels=3, image_size=32, channels=128, mults=(1, 2, 2, 2), blocks=2,
                 attention=(16,), heads=1, groups=32, dropout=0.1, patch=1,
                 grad_checkpointing=False, classes=10):
        super().__init__()
        self.channels, self.patch, self.grad_checkpointing = channels, patch, grad_checkpointing
        self.multiple = patch * 2 ** (len(mults) - 1)
        time_dim, self.classes = 4 * channels, classes
        self.time = nn.Sequential(nn.Linear(channels, time_dim), nn.SiLU(),
                                  nn.Linear(time_dim, time_dim))
        self.label = nn.Embedding(classes + 1, time_dim)  # the last is the null class

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

    def forward(self, x, t, y=None):
        y = torch.full_like(t, self.classes, dtype=torch.int64) if y is None else y
        emb = self.time(timestep_embedding(t, self.channels)) + self.label(y)
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


def modulate(x, shift, scale):
    """Scale and shift the channels of the tokens x: (B, N, width); shift, scale: (B, width)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Attention and MLP on tokens (B, N, width), modulated and gated by c: (B, width). Source:
    [DiT] Sec. 3.2, adaLN-Zero: all gates start at zero, so that the block starts as the identity.
    """

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"),
                                 nn.Dropout(dropout), nn.Linear(4 * width, width))
        self.condition = nn.Linear(width, 6 * width)

    def attend(self, x):
        B, N, width = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, width/heads)
        return self.out(h.transpose(1, 2).reshape(B, N, width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(F.silu(c)).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attend(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


def positions_2d(side, width):
    """Sine-cosine features of the side x side positions, half for the row, half for the column:
    (side*side, width). Source: [DiT] Sec. 3.2, as in ViT.
    """
    frequencies = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width/2)
    rows, columns = line.repeat_interleave(side, 0), line.repeat(side, 1)
    return torch.cat([rows, columns], dim=1).float()


class DiT(nn.Module):
    """eps_hat(x_t, t, y) by a transformer on patches: x: (B, C, H, W), t: (B,), y: (B,) int64, the
    null class where None -> (B, out_channels, H, W), out_channels = C unless given. Source: [DiT]
    Sec. 3.2.
    """

    def __init__(self, image_channels=4, image_size=32, patch=2, width=384, depth=12, heads=6,
                 classes=1000, dropout=0.0, out_channels=None, grad_checkpointing=False):
        super().__init__()
        self.classes, self.patch, self.grad_checkpointing = classes, patch, grad_checkpointing
        self.embed = nn.Linear(image_channels * patch**2, width)
        self.register_buffer("positions", positions_2d(image_size // patch, width),
                             persistent=False)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.condition = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, (out_channels or image_channels) * patch**2)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in (self.time[0], self.time[2], self.label):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.condition, self.out, *(block.condition for block in self.blocks)):
            zero_init(layer)

    def forward(self, x, t, y=None):
        y = torch.full_like(t, self.classes, dtype=torch.int64) if y is None else y
        c = self.time(timestep_embedding(t, 256)) + self.label(y)
        h = F.pixel_unshuffle(x, self.patch)  # (B, C*patch^2, H/patch, W/patch)
        rows, columns = h.shape[2:]
        h = self.embed(h.flatten(2).transpose(1, 2)) + self.positions  # (B, N, width)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                h = checkpoint(block, h, c, use_reentrant=False)
            else:
                h = block(h, c)
        h = self.out(modulate(self.norm(h), *self.condition(F.silu(c)).chunk(2, dim=1)))
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, (rows, columns)), self.patch)


def make_model(cfg, shape, classes, grad_checkpointing=False):
    """The network that cfg describes, for images of shape (C, H, W); one that cannot be is
    fatal.
    """
    C, H, W = shape
    what = f"patch {cfg.patch}, {len(cfg.mults)} levels"
    multiple = cfg.patch * 2 ** (len(cfg.mults) - 1)
    if cfg.backbone == "dit":
        what, multiple = f"dit_patch {cfg.dit_patch}", cfg.dit_patch
    if H % multiple or W % multiple:
        low = H // multiple * multiple
        sizes = ", ".join(str(s) for s in (low, low + multiple) if s > 0)
        fail(f"--image_size {H}: must be a multiple of {multiple} ({what}); nearest sizes that "
             f"work: {sizes}")
    if cfg.backbone == "dit":
        return DiT(C, H, cfg.dit_patch, cfg.dit_width, cfg.dit_depth, cfg.dit_heads, classes,
                   cfg.dropout, grad_checkpointing=grad_checkpointing)
    return UNet(C, H, cfg.channels, cfg.mults, cfg.blocks, cfg.attention, cfg.heads, cfg.groups,
                cfg.dropout, cfg.patch, grad_checkpointing, classes)


class NoisyClassifier(nn.Module):
    """Logits of p(y | x_t): x: (B, C, H, W), t: (B,) -> (B, classes). Source: [ADM] Sec. 4.3, the
    downsampling half of the U-Net.
    """

    def __init__(self, image_channels, classes, channels=32, groups=8, patch=2):
        super().__init__()
        self.channels, self.patch = channels, patch
        time_dim, wide = 4 * channels, 2 * channels
        self.time = nn.Sequential(nn.Linear(channels, time_dim), nn.SiLU(),
                                  nn.Linear(time_dim, time_dim))
        self.conv_in = nn.Conv2d(image_channels * patch**2, channels, 3, padding=1)
        self.block1 = ResBlock(channels, channels, time_dim, groups, 0.0)
        self.down = Downsample(channels)
        self.block2 = ResBlock(channels, wide, time_dim, groups, 0.0)
        self.attention = Attention(wide, 1, groups)
        self.block3 = ResBlock(wide, wide, time_dim, groups, 0.1)
        self.norm_out = nn.GroupNorm(groups, wide)
        self.out = nn.Linear(4 * wide, classes)

    def forward(self, x, t):
        emb = self.time(timestep_embedding(t, self.channels))
        h = self.down(self.block1(self.conv_in(F.pixel_unshuffle(x, self.patch)), emb))
        h = F.silu(self.norm_out(self.block3(self.attention(self.block2(h, emb)), emb)))
        return self.out(F.adaptive_avg_pool2d(h, 2).flatten(1))


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
    """[CFG] Algorithm 1. Returns the averaged (EMA) model in eval mode; writes log and checkpoint.

    data: common.data.Data (loaded from cfg.dataset when None); state: a checkpoint to go on from.
    Ends the program, naming the step, if the loss stops being finite; the last good checkpoint
    stays.
    """
    device, opts = run.device, run.opts
    data = load_images(cfg.dataset, cfg.image_size).to(device) if data is None else data
    shape, classes = data.train.shape[1:], len(data.classes)
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(device)
    model = make_model(cfg, shape, classes, opts.grad_checkpointing)
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
        run.save_checkpoint(step, {"model": model, "ema": ema.model}, optimizer, shape=list(shape),
                            classes=classes)

    if first == 0:
        save(0)
    for step in run.steps(first, cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        # every process draws the same whole batch and takes its slice
        i = torch.randint(len(data.train), (cfg.batch_size,), device=device)
        x0, y = data.train[i], data.train_labels[i]  # [CFG] Alg. 1, line 2
        if cfg.flip:
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=device) < 0.5, x0.flip(3), x0)
        y = drop_labels(y, cfg.p_uncond, classes)  # [CFG] Alg. 1, line 3
        t = torch.randint(1, cfg.T + 1, (cfg.batch_size,), device=device)  # [CFG] Alg. 1, line 4
        eps = torch.randn_like(x0)  # [CFG] Alg. 1, line 5
        x0, y, t, eps = (run.launch.shard(z) for z in (x0, y, t, eps))
        with core:
            with autocast(device, opts.amp):
                loss = ddpm_loss(functools.partial(network, y=y), x0, schedule, t, eps)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()  # [CFG] Alg. 1, line 7
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


def noisy_classifier(cfg, run, data, schedule):
    """The NoisyClassifier for this data and schedule: trained once, at all t, then read from the
    cache. Returns (classifier in eval mode, {t: its accuracy on held-out x_t}).

    Source: [ADM] Sec. 4.3. Training leaves the caller's random state alone.
    """
    device, shape, x, y = run.device, data.train.shape, data.train, data.train_labels
    patch = 2 if shape[-1] % 2 == 0 else 1
    key = repr((data.name, tuple(shape), float(x.double().mean()), cfg.schedule, cfg.T, cfg.beta_1,
                cfg.beta_T, cfg.classifier_steps, cfg.flip))
    digest = hashlib.sha256(key.encode()).hexdigest()[:10]
    file = CACHE / f"noisy_classifier_{data.name.replace(':', '_').replace('/', '_')}_{digest}.pt"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(2025)
        classifier = NoisyClassifier(shape[1], len(data.classes), patch=patch).to(device)
        try:
            classifier.load_state_dict(torch.load(file, map_location=device, weights_only=True))
        except Exception:  # absent or cut short: it is only a cache, train
            optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
            plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3,
                                                       total_steps=cfg.classifier_steps)
            for _ in tqdm(range(cfg.classifier_steps), desc="noisy classifier (once)", unit="step"):
                i = torch.randint(len(x), (64,), device=device)
                shift = tuple(torch.randint(-2, 3, (2,)).tolist())
                x0 = torch.roll(x[i], shift, dims=(2, 3))
                if cfg.flip:
                    x0 = torch.where(torch.rand(64, 1, 1, 1, device=device) < 0.5, x0.flip(3), x0)
                t = torch.randint(1, cfg.T + 1, (64,), device=device)
                xt = q_sample(x0, t, torch.randn_like(x0), schedule.alpha_bars)
                loss = F.cross_entropy(classifier(xt, t), y[i])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                plan.step()
            file.parent.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(f".{os.getpid()}.tmp")
            torch.save(classifier.state_dict(), scratch)
            os.replace(scratch, file)
        classifier.eval().requires_grad_(False)
        accuracy = {}
        for share in (0, 0.1, 0.25, 0.5, 0.75, 1):
            t = max(1, round(cfg.T * share))
            xt = q_sample(data.test, t, torch.randn_like(data.test), schedule.alpha_bars)
            ts = torch.full((len(xt),), t, device=device)
            with torch.no_grad():
                hits = classifier(xt, ts).argmax(1) == data.test_labels
            accuracy[t] = hits.float().mean().item()
    return classifier, accuracy


# %% 6. Figures and main


def draw(cfg, run, model, schedule, shape, y, w, classifier=None, batch_size=100, xT=None,
         **changes):
    """Samples of the classes y: (N,) with guidance w: number or (N,), in batches, with a progress
    bar, by cfg's sampler. Returns (images, seconds).
    """
    names = ("guidance", "sampler", "S", "eta", "spacing", "variance", "clip_x0")
    how = {name: getattr(cfg, name) for name in names} | changes
    xT = torch.randn(len(y), *shape, device=run.device) if xT is None else xT
    w = torch.as_tensor(w, dtype=torch.float32, device=run.device).expand(len(y))
    parts, watch = [], Stopwatch(run.device)
    calls = (how["S"] if how["sampler"] == "ddim" else cfg.T) * len(y.split(batch_size))
    with watch, tqdm(total=calls, desc=f"sample {len(y)}", unit="call", leave=False) as bar:
        pieces = [z.split(batch_size) for z in (xT, y, w)]
        for noise, labels, weights in zip(*pieces, strict=True):
            parts.append(sample(model, noise.shape, schedule, labels, weights,
                                classifier=classifier, xT=noise, bar=bar, **how))
    return torch.cat(parts), watch.seconds


def agreement(judge, x, y):
    """Share of the pictures x that an independent classifier takes for the class y asked for."""
    return (metrics.probabilities(judge, x).argmax(1) == y).float().mean().item()


def convention(cfg, w):
    """How a weight is written in the figures."""
    return {"classifier_free": f"w = {w:g}", "classifier": f"s = {1 + w:g}",
            "none": "no guidance"}[cfg.guidance]


def figure_grid(run, model, data, schedule, cfg, classes, classifier):
    """grid.png: the classes asked for, one a column, by guidance, one weight a row. Each column
    starts from one noise.
    """
    noise = torch.randn(len(classes), *data.train.shape[1:], device=run.device)
    y = torch.tensor(classes, device=run.device)
    weights = cfg.w if cfg.guidance != "none" else (0.0,)
    n = len(weights)
    x, _ = draw(cfg, run, model, schedule, noise.shape[1:], y.repeat(n),
                torch.tensor(weights).repeat_interleave(len(classes)), classifier,
                xT=noise.repeat(n, 1, 1, 1))
    plotting.save_rows(run.path("grid.png"), list(x.split(len(classes))),
                       "The same noise down each column: guidance trades variety for certainty",
                       [convention(cfg, w) for w in weights], [data.classes[c] for c in classes])


def figure_samples(run, samples, y, data, cfg, classes):
    """samples.png: samples, one class a row, beside real pictures of the class."""
    kinds = [c for c in dict.fromkeys(classes) if (y == c).any()][:10]
    counts = [int((labels == c).sum()) for c in kinds for labels in (y, data.test_labels)]
    rows = max(1, min(10, *counts))
    fake = torch.cat([samples[y == c][:rows] for c in kinds])
    real = torch.cat([data.test[data.test_labels == c][:rows] for c in kinds])
    how = f"{cfg.S} DDIM steps" if cfg.sampler == "ddim" else f"{cfg.T} steps"
    plotting.save_panels(run.path("samples.png"), [
        (f"asked for, {how}, {convention(cfg, cfg.w_samples)}", fake), ("real, held out", real)],
        "One class a row", rows)


def figure_same_noise(run, model, data, schedule, cfg, classifier):
    """same_noise.png: one noise a row, one class a column: the noise decides the style."""
    kinds = list(range(min(10, len(data.classes))))
    noise = torch.randn(5, *data.train.shape[1:], device=run.device)
    y = torch.tensor(kinds, device=run.device).repeat(5)
    x, _ = draw(cfg, run, model, schedule, noise.shape[1:], y, min(1.0, cfg.w_samples), classifier,
                xT=noise.repeat_interleave(len(kinds), 0))
    plotting.save_rows(run.path("same_noise.png"), list(x.split(len(kinds))),
                       "One noise a row: it decides the style, the label the digit"
                       if "digits" in cfg.dataset else "One noise a row, one class a column",
                       [f"noise {i + 1}" for i in range(5)], [data.classes[c] for c in kinds])


def figure_loss(run):
    """loss.png: the training loss, where this run trained."""
    log = run.read_log()
    if log:
        figure, axis = plt.subplots(figsize=(5.5, 3.4))
        axis.plot(log["step"], log["loss"], lw=0.4, alpha=0.35)
        axis.plot(log["step"], plotting.smooth(log["loss"], 100), lw=1.8)
        axis.set(xlabel="step", yscale="log", title="training loss, labels dropped at random")
        plotting.finish(figure, run.path("loss.png"))


@torch.no_grad()
def figure_preview(run, model, data, schedule, step):
    """preview.png: x0_hat of held-out x_t, with the right label and without one: the label helps
    most where the noise hides the picture. One network call each, no sampling.
    """
    if not run.launch.main:
        return
    x0, y = data.test[:6], data.test_labels[:6]
    ts = [max(1, round(schedule.T * share)) for share in (0.3, 0.5, 0.8)]
    generator = torch.Generator().manual_seed(0)  # its own: training draws are left alone
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    rows, labels = [x0], ["held out"]
    for t in ts:
        xt = q_sample(x0, t, eps, schedule.alpha_bars)
        rows += [xt, predict_x0(functools.partial(model, y=y), xt, t, schedule),
                 predict_x0(model, xt, t, schedule)]
        labels += [f"x_t, t = {t}", "x0_hat, label", "x0_hat, none"]
    plotting.save_rows(
        run.path("preview.png"), rows, f"What one network call recovers, step {step}", labels)


def figure_denoising(run, model, data, schedule, cfg, classes, classifier):
    """denoising.gif: x_t on its way to the classes asked for."""
    frames, S = [], min(40, cfg.T)
    y = torch.tensor((classes * 10)[:10], device=run.device)

    class Watched:  # the network, keeping what it is shown
        def __init__(self):
            self.classes = model.classes

        def __call__(self, x, t, y):
            frames.append((int(t[0]), x[:10]))
            return model(x, t, y)

    x, _ = draw(cfg, run, Watched(), schedule, data.train.shape[1:], y, cfg.w_samples, classifier,
                sampler="ddim", S=S)
    plotting.save_gif(run.path("denoising.gif"), [f for _, f in frames] + [x], min(10, len(y)),
                      [f"t = {t}" for t, _ in frames] + ["t = 0"])


def evaluate(run, model, schedule, cfg, data, judge, n):
    """guidance.png: accuracy, Fréchet distance and recall against w, both ways to guide, n samples
    each, from the same noises. Scores go to metrics.json.
    """
    classifier, accuracy = noisy_classifier(cfg, run, data, schedule)
    run.add_metrics(noisy_classifier_accuracy_by_t=accuracy)
    shape = data.train.shape[1:]
    y = torch.arange(n, device=run.device) % len(data.classes)
    noise, table = torch.randn(n, *shape, device=run.device), {}
    weights = sorted({w for w in (*cfg.w, 0.0, cfg.w_samples) if w >= 0})
    real = agreement(judge, data.test, data.test_labels)
    for guidance in ("classifier_free", "classifier"):
        for w in weights:
            x, seconds = draw(cfg, run, model, schedule, shape, y, w, classifier, xT=noise,
                              guidance=guidance)
            scores = metrics.quality(x, data, judge) | {"accuracy": agreement(judge, x, y)}
            table.setdefault(guidance, {})[f"{w:g}"] = scores | {"seconds": seconds}
            run.add_metrics(guidance_sweep=table)
    free = table["classifier_free"][f"{cfg.w_samples:g}"]
    run.add_metrics(evaluation=free | {"w": cfg.w_samples})
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    kinds = [("accuracy", "agrees with the label asked for", real),
             ("frechet_distance", "Fréchet distance in features",
              free["frechet_distance_of_held_out"]),
             ("recall", "recall: variety", None)]
    for axis, (key, title, reference) in zip(axes, kinds, strict=True):
        for guidance, name in (("classifier_free", "classifier-free"),
                               ("classifier", "noisy classifier, s = 1 + w")):
            axis.plot(weights, [row[key] for row in table[guidance].values()], "o-", label=name)
        if reference is not None:
            axis.axhline(reference, color="0.5", ls=":", label="real, held out")
        axis.set(xlabel="guidance w", title=title)
        axis.margins(y=0.15)
    figure.suptitle(f"What guidance buys and costs, {n} samples a point")
    figure.tight_layout()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=3, frameon=False,
                  bbox_to_anchor=(0.5, 0.02))
    plotting.finish(figure, run.path("guidance.png"))


def seconds_per_step(cfg, run, data, schedule, n=25):
    """Seconds of one training step of cfg's backbone, the median of n."""
    model, seconds = make_model(cfg, data.train.shape[1:], len(data.classes)).to(run.device), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
    for _ in range(n):
        x0, y = data.train[: cfg.batch_size], data.train_labels[: cfg.batch_size]
        watch = Stopwatch(run.device)
        with watch:
            optimizer.zero_grad(set_to_none=True)
            ddpm_loss(functools.partial(model, y=y), x0, schedule).backward()
            optimizer.step()
        seconds.append(watch.seconds)
    return sorted(seconds)[n // 2]


def compare(cfg, run, data, schedule, judge):
    """compare.png: U-Net and DiT, each trained cfg.compare seconds, from the same noises."""
    y = torch.arange(cfg.n_samples, device=run.device) % len(data.classes)
    noise, found, panels = torch.randn(len(y), *data.train.shape[1:], device=run.device), {}, []
    for backbone in ("unet", "dit"):
        its = replace(cfg, backbone=backbone)
        its = replace(its, steps=max(10, int(
            cfg.compare / seconds_per_step(its, run, data, schedule))))
        folder = run.path(backbone)
        folder.mkdir()
        part = Run("conditional", its, run.opts, run.launch, folder)
        torch.manual_seed(run.opts.seed)
        model = train(its, part, data)
        x, seconds = draw(its, run, model, schedule, noise.shape[1:], y, cfg.w_samples, xT=noise,
                          guidance="classifier_free")
        scores = metrics.quality(x, data, judge) | {"accuracy": agreement(judge, x, y)}
        found[backbone] = part.read_metrics() | scores | {"sampling_seconds": seconds}
        run.add_metrics(compare=found)
        panels.append((f"{backbone}: {its.steps} steps, Fréchet {scores['frechet_distance']:.1f}, "
                       f"right {scores['accuracy']:.0%}", x[:100]))
    plotting.save_panels(run.path("compare.png"), panels, f"The same {cfg.compare:g} seconds of "
                         "training, the same noises", min(10, len(data.classes)))


def main(argv=None):
    """Read the command line, train (or load), sample, draw the figures, measure."""
    begin = time.perf_counter()
    cfg, opts = parse_args(Config, PRESETS, argv, SAMPLING)
    validate(cfg)
    place = launch(opts.device)
    autocast(place.device, opts.amp)  # refuses what this device cannot do, before anything is made
    cfg, run, state = start("conditional", Config, cfg, opts, place, validate)
    data = load_images(cfg.dataset, cfg.image_size).to(place.device)
    if data.train_labels is None:
        fail(f"--dataset {cfg.dataset}: has no labels to condition on")
    odd = [c for c in cfg.classes if c >= len(data.classes)]
    if odd:
        fail(f"--classes {odd[0]}: must be in [0, {len(data.classes) - 1}], the classes of "
             f"--dataset {cfg.dataset}")
    if opts.evaluate and cfg.p_uncond == 0:
        fail(f"--evaluate {opts.evaluate}: compares guidances, which need --p_uncond > 0")
    shape, classes = tuple(data.train.shape[1:]), cfg.classes or tuple(range(len(data.classes)))
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(place.device)
    if cfg.compare:
        if place.world > 1 or state is not None:
            fail("--compare: trains both networks anew, in one process")
        for backbone in ("unet", "dit"):
            make_model(replace(cfg, backbone=backbone), shape, len(data.classes))
        compare(cfg, run, data, schedule, metrics.load_classifier(data)[0])
        run.say(f"compare.png and metrics.json in {run.folder}")
        return
    if opts.sample is None:
        model = train(cfg, run, data, state)
    else:
        model = make_model(cfg, state["shape"], state["classes"]).eval()
        model = model.to(place.device, memory_format=torch.channels_last)
        restore(model, state["ema"])
    if not place.main:
        return
    run.say(f"writing to {run.folder}")
    classifier = None
    if cfg.guidance == "classifier":
        classifier, accuracy = noisy_classifier(cfg, run, data, schedule)
        run.add_metrics(noisy_classifier_accuracy_by_t=accuracy)
    figure_loss(run)
    figure_grid(run, model, data, schedule, cfg, classes, classifier)
    y = torch.tensor(classes, device=place.device).repeat(-(-cfg.n_samples // len(classes)))
    y = y[: cfg.n_samples]
    samples, seconds = draw(cfg, run, model, schedule, shape, y, cfg.w_samples, classifier)
    run.add_metrics(sampling={"seconds": seconds, "seconds_per_100": 100 * seconds / len(y),
                              "n": len(y), "sampler": cfg.sampler, "w": cfg.w_samples,
                              "network_calls": cfg.S if cfg.sampler == "ddim" else cfg.T})
    figure_samples(run, samples, y, data, cfg, classes)
    figure_same_noise(run, model, data, schedule, cfg, classifier)
    figure_denoising(run, model, data, schedule, cfg, classes, classifier)
    judge, judged = metrics.load_classifier(data)
    run.add_metrics(samples={
        "accuracy": agreement(judge, samples, y), "classifier": judged,
        "sure": metrics.sure_share(metrics.probabilities(judge, samples))})
    if opts.evaluate:
        evaluate(run, model, schedule, cfg, data, judge, opts.evaluate)
    run.add_metrics(config=asdict(cfg), total_seconds=time.perf_counter() - begin,
                    peak_memory_mb=peak_memory_mb(place.device))
    run.report()
    run.say(f"the classifier agrees with {run.read_metrics()['samples']['accuracy']:.1%} of "
            f"{len(y)} labels asked for")


if __name__ == "__main__":
    main()
