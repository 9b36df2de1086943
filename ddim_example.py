"""Denoising Diffusion Implicit Models (Song, Meng, Ermon, arXiv 2010.02502).

    python ddim_example.py                     train as in ddpm_example.py, then sample in few steps
    python ddim_example.py --sample            no training: take the newest DDPM (or DDIM) model
    python ddim_example.py --sample --evaluate 500    the paper's Table 1 in small

The paper changes only the sampler: schedule, objective, network and training are those of
ddpm_example.py word for word, and `diff ddpm_example.py ddim_example.py` reads as what it adds.
Implemented here: generalised steps (Eq. 12, 16) from DDIM (eta = 0) to DDPM (eta = 1), the larger
variance of App. D.3, sub-sequences tau (Sec. 4.2, App. D.2), encoding by the ODE run forwards
(Eq. 13, 14) and spherical interpolation (App. D.5). The paper writes alpha_t for alpha_bars[t].
Tags in the parts shared with ddpm_example.py are those of the DDPM paper.

Departures from the paper: those of ddpm_example.py, and tau always ends in T, so that sampling
starts from the noise level it was trained on.

Measured on 2 CPU cores with the model of ddpm_example.py: 64 samples take 1.3 s at S = 50 (19 s by
the DDPM sampler). Of 500 samples, Fréchet distance in a digit classifier's features (third command,
493 s): 22.4, 17.1, 15.3, 14.9 at S = 10, 20, 50, 100 with eta = 0; 18.7, 9.5, 10.1, 8.7 with eta =
1; 8.9 for DDPM's 1,000 steps. For so small a model noise helps: it undoes earlier errors, which the
deterministic path keeps. Results: results/ddim/. Not run on CUDA; the paper preset was not trained.
"""

import copy
import math
import time
from dataclasses import asdict, dataclass

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
    S: int = 50                      # sampling steps, 1 to T (paper: 10 to 1000)
    eta: float = 0.0                 # 0: deterministic (DDIM), 1: as noisy as DDPM (Eq. 16)
    spacing: str = "linear"          # of the steps: linear or quadratic (paper: both, App. D.2)
    sigma_hat: bool = False          # the larger noise of App. D.3 (paper: its DDPM rows)
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
        T=20, S=5, n_samples=4, channels=8, groups=4, steps=6, batch_size=8, warmup=2,
        preview_every=3),
    "paper": Config(S=100, spacing="quadratic", dataset="cifar10", flip=True, channels=128,
                    mults=(1, 2, 2, 2), blocks=2, attention=(16,), groups=32, dropout=0.1, patch=1,
                    steps=800_000, batch_size=128, lr=2e-4, warmup=5000, decay="constant",
                    ema=0.9999, preview_every=5000),
}
# what may change when a trained model is loaded
SAMPLING = ("S", "eta", "spacing", "sigma_hat", "clip_x0", "n_samples")


def validate(cfg):
    """End the program with one line if a value is out of range."""
    check(cfg, T=">= 1", schedule=("linear", "cosine"), beta_1="(0, 1)", beta_T="(0, 1)",
          S=">= 1", eta="[0, 1]", spacing=("linear", "quadratic"), n_samples=">= 1",
          image_size=">= 0", channels=">= 4",
          mults=">= 1", blocks=">= 1", attention=">= 1", heads=">= 1", groups=">= 1",
          dropout="[0, 1)", patch=">= 1", steps=">= 1", batch_size=">= 1", lr="> 0", warmup=">= 0",
          decay=("cosine", "constant"), weight_decay=">= 0", grad_clip="> 0", ema="[0, 1)",
          preview_every=">= 1")
    if cfg.S > cfg.T:
        fail(f"--S {cfg.S}: must be in [1, {cfg.T}], the number of diffusion steps --T")
    if cfg.sigma_hat and cfg.eta != 1:
        fail(f"--eta {cfg.eta}: must be 1 with --sigma_hat (App. D.3)")
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


def q_sample(x0, t, eps, alpha_bars):
    """x_t given x_0. x0, eps: (B, C, H, W), t: int or (B,) int64 in 0..T. Source: Eq. 4."""
    alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps  # Eq. 4


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
def ddim_invert(model, x0, schedule, S=50, spacing="linear"):
    """The code x_T of images x0: (B, C, H, W) -> the same shape. Source: Eq. 13, 14 run forwards.

    The Euler step from t needs eps at t, which the network never saw at t = 0: tau_1 stands in.
    """
    xt, taus = x0, [0] + ddim_timesteps(schedule.T, S, spacing)
    for t, t_next in zip(taus[:-1], taus[1:], strict=True):
        eps_hat = model(xt, torch.full((len(xt),), max(t, taus[1]), device=xt.device))
        xt = ddim_step(xt, eps_hat, t, t_next, schedule.alpha_bars)  # Eq. 13: eta = 0
    return xt


def slerp(a, b, share):
    """Spherical interpolation from a (share = 0) to b (share = 1). Source: App. D.5.

    a, b: (B, ...); one angle theta a sample, over all but the first dimension.
    """
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    theta = torch.acos(F.cosine_similarity(flat_a, flat_b).clamp(-1, 1))
    theta = theta.clamp(min=1e-4).view(-1, *[1] * (a.ndim - 1))  # parallel: in the limit a line
    return ((1 - share) * theta).sin() / theta.sin() * a + (share * theta).sin() / theta.sin() * b


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


def timed_sample(run, model, noise, schedule, cfg, **changes):
    """ddim_sample with cfg's settings from given noise. Returns (images, seconds)."""
    how = {k: getattr(cfg, k) for k in ("S", "eta", "spacing", "clip_x0", "sigma_hat")} | changes
    watch = Stopwatch(run.device)
    with watch:
        x = ddim_sample(model, noise.shape, schedule, xT=noise, **how)
    return x, watch.seconds


def step_counts(T, wanted=(5, 10, 20, 50, 100, 1000)):
    """The step counts of the figures that a model with T steps allows, T itself the last."""
    return sorted({S for S in wanted if S < T} | {T})


def figure_steps(run, model, schedule, cfg, shape):
    """steps.png: the same noises with more and more steps. Returns the seconds for each S."""
    noise, rows, labels, seconds = torch.randn(8, *shape, device=run.device), [], [], {}
    for S in step_counts(cfg.T):
        x, seconds[S] = timed_sample(run, model, noise, schedule, cfg, S=S, eta=0.0,
                                     sigma_hat=False)
        rows.append(x)
        labels.append(f"S = {S}\n{S} calls, {seconds[S]:.2f} s")
    plotting.save_rows(run.path("steps.png"), rows, "The same noise gives the same picture, "
                       "in few steps or many (eta = 0)", labels)
    return seconds


def figure_eta(run, model, schedule, cfg, shape):
    """eta.png: from deterministic to as noisy as DDPM, from the same noises."""
    noise, etas = torch.randn(8, *shape, device=run.device), (0.0, 0.2, 0.5, 1.0)
    rows = [timed_sample(run, model, noise, schedule, cfg, eta=eta, sigma_hat=False)[0]
            for eta in etas]
    plotting.save_rows(run.path("eta.png"), rows, f"More noise on the way, {cfg.S} steps: "
                       "eta = 0 is fixed by its start, eta = 1 is not",
                       [f"eta = {eta:g}" for eta in etas])


def figure_interpolation(run, model, schedule, cfg, shape):
    """interpolation.png: between two noises along the sphere, and along the straight line."""
    ends = torch.randn(2, 2, *shape, device=run.device)
    shares = torch.linspace(0, 1, 9).tolist()
    rows, labels = [], []
    for a, b in zip(ends[0], ends[1], strict=True):
        paths = {"slerp": [slerp(a[None], b[None], share)[0] for share in shares],
                 "linear": [(1 - share) * a + share * b for share in shares]}
        for name, path in paths.items():
            codes = torch.stack(path)
            rows += timed_sample(run, model, codes, schedule, cfg, eta=0.0, sigma_hat=False)[:1]
            labels.append(name)
    plotting.save_rows(run.path("interpolation.png"), rows, "Between two noises: the straight line "
                       "leaves the sphere where noise lives", labels,
                       [f"{share:.2f}" for share in shares])


def figure_reconstruction(run, model, schedule, cfg, data):
    """reconstruction.png: image, code, reconstruction. Returns the root-mean-square error by S."""
    x0, rows, labels, errors = data.test[:8], [data.test[:8]], ["held out"], {}
    for S in [S for S in (5, 10, 20, 50, 100, 200) if S < cfg.T] or [cfg.T]:
        code = ddim_invert(model, x0, schedule, S, cfg.spacing)
        x, _ = timed_sample(run, model, code, schedule, cfg, S=S, eta=0.0, sigma_hat=False,
                            clip_x0=False)
        errors[S] = (x - x0).square().mean().sqrt().item()
        rows.append(x)
        labels.append(f"S = {S}\nerror {errors[S]:.3f}")
    rows.insert(1, code)
    labels.insert(1, "its code x_T")
    plotting.save_rows(run.path("reconstruction.png"), rows, "Encode, then decode: the error "
                       "falls as the steps grow (eta = 0)", labels)
    return errors


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


def figure_samples(run, samples, data, cfg):
    """samples.png: samples beside real pictures."""
    n = min(64, len(samples))
    plotting.save_panels(run.path("samples.png"), [
        (f"{cfg.S} steps, eta = {cfg.eta:g}", samples[:n]), ("real, held out", data.test[:n])],
        "Drawn from noise in few steps, beside the real thing", max(1, math.isqrt(n)))


def figure_loss(run):
    """loss.png: the training loss, where this run trained."""
    log = run.read_log()
    if log:
        figure, axis = plt.subplots(figsize=(5.5, 3.4))
        axis.plot(log["step"], log["loss"], lw=0.4, alpha=0.35)
        axis.plot(log["step"], plotting.smooth(log["loss"], 100), lw=1.8)
        axis.set(xlabel="step", yscale="log", title="training loss: the same as DDPM's (Eq. 5)")
        plotting.finish(figure, run.path("loss.png"))


def evaluate(run, model, schedule, cfg, data, n, batch_size=100):
    """quality.png: Fréchet distance against S for eta = 0, 1 and sigma_hat: Table 1 in small."""
    classifier, _ = metrics.load_classifier(data)
    rows = {"DDIM, eta = 0": {"eta": 0.0, "sigma_hat": False},
            "DDPM, eta = 1": {"eta": 1.0, "sigma_hat": False},
            "DDPM, sigma_hat": {"eta": 1.0, "sigma_hat": True}}
    counts = sorted({S for S in (10, 20, 50, 100) if S < cfg.T} | {cfg.T})
    noise, table = torch.randn(n, *data.train.shape[1:], device=run.device), {}
    jobs = [(name, S) for S in counts for name in rows if S < cfg.T or name != "DDPM, sigma_hat"]
    calls = sum(S for _, S in jobs) * len(noise.split(batch_size))
    with tqdm(total=calls, desc=f"evaluate {n}", unit="call") as bar:
        for name, S in jobs:
            watch = Stopwatch(run.device)
            with watch:
                x = torch.cat([ddim_sample(
                    model, part.shape, schedule, S, rows[name]["eta"], cfg.spacing, cfg.clip_x0,
                    part, rows[name]["sigma_hat"], bar) for part in noise.split(batch_size)])
            scores = metrics.quality(x, data, classifier)
            table.setdefault(name, {})[S] = scores | {"seconds": watch.seconds}
            run.add_metrics(evaluation=table)
    figure, axis = plt.subplots(figsize=(6.5, 3.8))
    for name, found in table.items():
        distances = [row["frechet_distance"] for row in found.values()]
        axis.plot(list(found), distances, "o-", label=name)
    axis.axhline(scores["frechet_distance_of_held_out"], color="0.5", ls=":", label="held-out data")
    axis.set(xscale="log", xlabel="steps S", ylabel="Fréchet distance in features",
             title=f"How many steps are enough? {n} samples a point")
    axis.set_ylim(bottom=0)
    axis.set_xticks(counts, [str(S) for S in counts])
    axis.minorticks_off()
    axis.legend(frameon=False)
    plotting.finish(figure, run.path("quality.png"))


def main(argv=None):
    """Read the command line, train (or load), sample, draw the figures, measure."""
    begin = time.perf_counter()
    cfg, opts = parse_args(Config, PRESETS, argv, SAMPLING)
    validate(cfg)
    place = launch(opts.device)
    autocast(place.device, opts.amp)  # refuses what this device cannot do, before anything is made
    cfg, run, state = start("ddim", Config, cfg, opts, place, validate, reads=("ddpm",))
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
    noise = torch.randn(cfg.n_samples, *shape, device=run.device)
    samples, seconds = timed_sample(run, model, noise, schedule, cfg)
    run.add_metrics(sampling={"seconds": seconds, "n": cfg.n_samples, "network_calls": cfg.S})

    figure_loss(run)
    figure_samples(run, samples, data, cfg)
    run.add_metrics(seconds_of_8_by_S=figure_steps(run, model, schedule, cfg, shape))
    figure_eta(run, model, schedule, cfg, shape)
    figure_interpolation(run, model, schedule, cfg, shape)
    errors = figure_reconstruction(run, model, schedule, cfg, data)
    run.add_metrics(reconstruction_error_by_S=errors)
    classifier, judged = metrics.load_classifier(data)
    if classifier:
        sure = metrics.sure_share(metrics.probabilities(classifier, samples))
        run.add_metrics(samples={"sure": sure, "classifier": judged})
    if opts.evaluate:
        evaluate(run, model, schedule, cfg, data, opts.evaluate)
    run.add_metrics(config=asdict(cfg), total_seconds=time.perf_counter() - begin,
                    peak_memory_mb=peak_memory_mb(place.device))
    run.report()


if __name__ == "__main__":
    main()
