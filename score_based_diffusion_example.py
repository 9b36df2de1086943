"""Score-Based Generative Modeling through Stochastic Differential Equations
(Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, arXiv 2011.13456).

    python score_based_diffusion_example.py                         train on digits, draw
    python score_based_diffusion_example.py --dataset swiss_roll    points in the plane
    python score_based_diffusion_example.py --sde ve                or vp, subvp
    python score_based_diffusion_example.py --sample --evaluate 500 score every sampler

Implemented here: the VE, VP and sub-VP SDEs (Eq. 9, 11, 12; App. B, C) behind one interface,
denoising score matching (Eq. 7), the reverse SDE (Eq. 6) by Euler-Maruyama, reverse diffusion (App.
E), ancestral sampling (Eq. 4, App. F) and predictor-corrector (Alg. 1-5), the probability-flow ODE
(Eq. 13) by adaptive RK45 and fixed-step RK4, exact likelihoods (Eq. 39), codes by the ODE, and the
network options of NCSN++ and DDPM++ (App. H).

Departures from the paper:
  1. Time runs on a grid of its own from T to eps, steps are differences of that grid, and the step
     of reverse diffusion is the exact forward transition of the SDE, for sub-VP too.
  2. The corrector comes before the predictor, as in the authors' code (Alg. 1 prints it after).
  3. Tweedie's formula ends every sampler, and x0_hat is clamped for images (`denoise`, `clip_x0`).
  4. In the laptop preset the small U-Net of ddpm_example.py, which works on 2x2 blocks of pixels.
  5. VE's network predicts what is left of eps when a Gaussian's share is taken out: an error of
     eps_hat at sigma = 50 would shift the brightness of x0_hat fifty times as much.

Measured on 2 CPU cores, as typed, seed 0: 375 s in all (training 333 s, 64 samples of 1,001 network
calls 21 s). Of 500 samples (last command) a digit classifier is sure of 83 % (of real digits: 97
%), Fréchet distance in its features 9.5 (held-out digits: 0.9); held-out digits take 2.15 bits/dim.
Swiss roll: 40 s in all; energy distance to the data 0.0029 (of two fresh data sets: 0.0043).
Results: results/score_based/. Not run on CUDA; the paper preset was not trained.
"""

import copy
import math
import time
from dataclasses import asdict, dataclass, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy.integrate import solve_ivp
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common import metrics, plotting
from common.cli import check, fail, parse_args
from common.data import POINTS, load_images, load_points, point_density
from common.device import Stopwatch, autocast, launch, peak_memory_mb
from common.plotting import plt
from common.runs import restore, resume_training, start


@dataclass(frozen=True)
class Config:
    # SDE
    sde: str = "vp"                  # ve, vp or subvp (paper: all three)
    beta: str = "linear"             # beta(t) of vp and subvp: linear or cosine (paper: linear)
    beta_min: float = 0.1            # beta(0) of the linear beta (paper: 0.1)
    beta_max: float = 20.0           # beta(1) of the linear beta (paper: 20)
    sigma_min: float = 0.01          # least noise of ve (paper: 0.01)
    sigma_max: float = 50.0          # most noise of ve (paper: 50)
    weighting: str = "simple"        # lambda(t): simple (std^2) or likelihood (g^2, 2101.09258)
    # sampling
    sampler: str = "pc"              # em, reverse, ancestral, pc, rk45 or rk4
    N: int = 500                     # steps of the sampler, rk45 chooses its own (paper: 1000)
    snr: float = 0.16                # signal-to-noise ratio r of the corrector (paper: 0.16)
    corrector_steps: int = 1         # Langevin steps a predictor step (paper: 1)
    tolerance: float = 1e-4          # relative and absolute, of rk45 (paper: 1e-5)
    denoise: bool = True             # end with Tweedie's formula
    clip_x0: bool = True             # clamp x0_hat to [-1, 1]; images only
    std_floor: float = 1e-5          # least std that eps_hat is divided by
    temperature: float = 1.0         # scales the starting noise (paper: 1)
    likelihood: int = 16             # held-out examples whose likelihood is computed; 0 for none
    n_samples: int = 64              # pictures drawn at the end (points: 100 times as many)
    # data
    dataset: str = "digits"          # digits, cifar10, ..., swiss_roll, two_moons, gaussians
    image_size: int = 0              # resize the pictures to this size; 0 keeps theirs
    flip: bool = False               # mirror pictures at random (paper: yes; never for digits)
    dequantize: bool = True          # spread 8-bit values over their bin (paper: for likelihoods)
    # network
    model: str = "auto"              # unet for images, mlp for points, auto chooses
    channels: int = 32               # base width of the U-Net (paper: 128)
    mults: tuple[int, ...] = (1, 2)  # width of each level as a multiple (paper: 1 2 2 2)
    blocks: int = 1                  # residual blocks a level (paper: 4)
    attention: tuple[int, ...] = (7,)    # resolutions with self-attention (paper: 16)
    heads: int = 1                   # attention heads (paper: 1)
    groups: int = 8                  # groups of each group norm (paper: 32)
    dropout: float = 0.0             # dropout in the residual blocks (paper: 0.1)
    patch: int = 2                   # side of the pixel blocks made channels (paper: none, 1)
    fir: bool = False                # anti-aliased resampling (paper: NCSN++ yes, DDPM++ no)
    skip_rescale: bool = False       # residual sums times 1/sqrt(2) (paper: yes)
    biggan: bool = False             # residual blocks that resample inside (paper: yes)
    progressive_input: bool = False  # shrunken input added at each level (paper: NCSN++ yes)
    hidden: int = 128                # width of the MLP
    layers: int = 4                  # hidden layers of the MLP
    # training
    steps: int = 8000                # optimiser steps (paper: 1300000)
    batch_size: int = 32             # examples a step, over all processes (paper: 128)
    lr: float = 2e-3                 # peak learning rate (paper: 2e-4)
    warmup: int = 200                # steps of linear learning-rate warm-up (paper: 5000)
    decay: str = "cosine"            # after the warm-up: cosine to 0, or constant (paper: constant)
    weight_decay: float = 0.0        # AdamW's weight decay; 0 makes it Adam (paper: 0)
    grad_clip: float = 1.0           # largest norm of the gradient (paper: 1)
    ema: float = 0.999               # decay of the average of the weights (paper: 0.9999, ve 0.999)
    preview_every: int = 2000        # steps between previews and checkpoints


PRESETS = {
    "laptop": Config(),
    "smoke": Config(N=5, n_samples=4, likelihood=2, tolerance=0.1, channels=8, groups=4, hidden=16,
                    layers=2, steps=6, batch_size=8, warmup=2, preview_every=3),
    # DDPM++ cont. (VP) of Tab. 3
    "paper": Config(sampler="em", N=1000, tolerance=1e-5, dataset="cifar10", flip=True,
                    channels=128, mults=(1, 2, 2, 2), blocks=4, attention=(16,), groups=32,
                    dropout=0.1, patch=1, skip_rescale=True, biggan=True, steps=1_300_000,
                    batch_size=128, lr=2e-4, warmup=5000, decay="constant", ema=0.9999,
                    preview_every=5000),
    "swiss_roll": Config(dataset="swiss_roll", sampler="rk45", dequantize=False, likelihood=1000,
                         steps=10000, batch_size=512, lr=3e-3, preview_every=5000),
}
# what may change when a trained model is loaded; the SDE and its constants may not
SAMPLING = ("sampler", "N", "snr", "corrector_steps", "tolerance", "denoise", "clip_x0",
            "std_floor", "temperature", "likelihood", "n_samples")


def validate(cfg):
    """End the program with one line if a value is out of range."""
    check(cfg, sde=("ve", "vp", "subvp"), beta=("linear", "cosine"), beta_min="> 0", beta_max="> 0",
          sigma_min="> 0", sigma_max="> 0", weighting=("simple", "likelihood"),
          sampler=("em", "reverse", "ancestral", "pc", "rk45", "rk4"), N=">= 1", snr="> 0",
          corrector_steps=">= 1", tolerance="(0, 1)", std_floor=">= 0", temperature=">= 0",
          likelihood=">= 0", n_samples=">= 1", image_size=">= 0", model=("auto", "unet", "mlp"),
          channels=">= 4", mults=">= 1", blocks=">= 1", attention=">= 1", heads=">= 1",
          groups=">= 1", dropout="[0, 1)", patch=">= 1", hidden=">= 1", layers=">= 1", steps=">= 1",
          batch_size=">= 1", lr="> 0", warmup=">= 0", decay=("cosine", "constant"),
          weight_decay=">= 0", grad_clip="> 0", ema="[0, 1)", preview_every=">= 1")
    if cfg.sigma_min >= cfg.sigma_max:
        fail(f"--sigma_min {cfg.sigma_min}: must be below --sigma_max {cfg.sigma_max}")
    if cfg.beta_min >= cfg.beta_max:
        fail(f"--beta_min {cfg.beta_min}: must be below --beta_max {cfg.beta_max}")
    if cfg.sampler == "ancestral" and cfg.sde == "subvp":
        fail("--sampler ancestral: must be one of em, reverse, pc, rk45, rk4 with --sde subvp")
    points = cfg.dataset in POINTS
    if cfg.model == ("unet" if points else "mlp"):
        fail(f"--model {cfg.model}: must be auto or {'mlp' if points else 'unet'} with --dataset "
             f"{cfg.dataset}, which holds {'points' if points else 'images'}")
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


def over(value, x):
    """value: (B,) -> (B, 1, ...), to broadcast over x: (B, ...)."""
    return value.view(-1, *[1] * (x.ndim - 1))


class SDE:
    """dx = f(x, t) dt + g(t) dw for t in [0, T], f linear in x. Source: Eq. 5.

    x: (B, ...); t: (B,) of x's dtype. A subclass gives m(t), std(t) of the kernel
    p(x_t | x_0) = N(m x_0, std^2 I), the drift and diffusion, and the std of the prior. Sampling
    ends at eps; training and likelihoods go down to eps_train (App. C).
    """

    T, eps, eps_train, prior_std = 1.0, 1e-3, 1e-5, 1.0

    def marginal(self, x0, t):
        """Mean (like x0) and std (broadcastable) of x_t given x_0. Source: Eq. 29."""
        return over(self.m(t), x0) * x0, over(self.std(t), x0)

    def prior_sampling(self, shape):
        """Noise to start from: p_T without its memory of the data."""
        return self.prior_std * torch.randn(shape)

    def prior_logp(self, z):
        """log p_T of z: (B, ...) -> (B,) in nats."""
        z, D = z.flatten(1), z[0].numel()
        variance = self.prior_std**2
        return -0.5 * (D * math.log(2 * math.pi * variance) + (z**2).sum(1) / variance)


class VESDE(SDE):
    """Variance exploding: the limit of SMLD (Eq. 8). Source: Eq. 9 with sigma(t) of App. C."""

    eps = 1e-5

    def __init__(self, sigma_min=0.01, sigma_max=50.0):
        self.sigma_min, self.sigma_max, self.prior_std = sigma_min, sigma_max, sigma_max

    def std(self, t):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t  # App. C, sigma(t)

    def m(self, t):
        return torch.ones_like(t)

    def sde(self, x, t):
        """Drift (like x) and diffusion (broadcastable)."""
        g = self.std(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))
        return torch.zeros_like(x), over(g, x)  # Eq. 9: g^2 = d sigma^2 / dt


class VPSDE(SDE):
    """Variance preserving: the limit of DDPM (Eq. 10). Source: Eq. 11 = 25, variance Eq. 26.

    kind "linear": beta(t) from beta_min to beta_max (App. C). kind "cosine": that of the cosine
    schedule (Nichol & Dhariwal, arXiv 2102.09672, Eq. 17), capped where it would run to infinity.
    """

    def __init__(self, beta_min=0.1, beta_max=20.0, kind="linear", cap=100.0):
        self.beta_min, self.beta_max, self.kind, self.cap = beta_min, beta_max, kind, cap
        if kind not in ("linear", "cosine"):
            raise ValueError(f"beta {kind!r}: must be linear or cosine")
        # the cosine beta reaches its cap at this t
        self.t_cap = (1.008 * math.atan(cap * 1.008 / math.pi) * 2 / math.pi) - 0.008

    def beta(self, t):
        if self.kind == "linear":
            return self.beta_min + t * (self.beta_max - self.beta_min)
        u = (t.clamp(max=self.t_cap) + 0.008) / 1.008 * math.pi / 2
        return math.pi / 1.008 * u.tan()

    def B(self, t):
        """The integral of beta from 0 to t."""
        if self.kind == "linear":
            return self.beta_min * t + 0.5 * t**2 * (self.beta_max - self.beta_min)
        start, move = 0.008 / 1.008 * math.pi / 2, t.clamp(max=self.t_cap) / 1.008 * math.pi / 2
        # -2 log(cos(start + move) / cos(start)), in a form that keeps its digits at small t
        fall = 2 * torch.sin(start + move / 2) * torch.sin(move / 2) / math.cos(start)
        return -2 * torch.log1p(-fall) + self.cap * (t - self.t_cap).clamp(min=0)

    def m(self, t):
        return torch.exp(-0.5 * self.B(t))  # Eq. 29

    def std(self, t):
        return (-torch.expm1(-self.B(t))).sqrt()  # Eq. 26 from a point; expm1 for t near 0

    def diffusion2(self, t):
        return self.beta(t)

    def sde(self, x, t):
        """Drift (like x) and diffusion (broadcastable)."""
        return -0.5 * over(self.beta(t), x) * x, over(self.diffusion2(t), x).sqrt()  # Eq. 11 (12)


class SubVPSDE(VPSDE):
    """Sub-VP: VP's drift, at every t at most its variance. Source: Eq. 12 = 27, variance Eq. 28."""

    def std(self, t):
        return -torch.expm1(-self.B(t))  # Eq. 28 from a point: the variance is its square

    def diffusion2(self, t):
        return self.beta(t) * -torch.expm1(-2 * self.B(t))  # Eq. 27


@cache  # a corrector asks again, and every batch walks the same grid
def transition(sde, s, t):
    """(a, variance) of x_t = a x_s + sqrt(variance) z, floats, s < t. Source: Eq. 8, 10, 29.

    VE: a = 1, variance sigma_t^2 - sigma_s^2. VP: a = sqrt(1 - beta_i), variance beta_i.
    """
    s, t = (torch.tensor(u, dtype=torch.float64) for u in (s, t))
    a = sde.m(t) / sde.m(s)
    return a.item(), (sde.std(t) ** 2 - a**2 * sde.std(s) ** 2).item()


def make_sde(cfg):
    """The SDE that cfg describes."""
    if cfg.sde == "ve":
        return VESDE(cfg.sigma_min, cfg.sigma_max)
    kind = VPSDE if cfg.sde == "vp" else SubVPSDE
    return kind(cfg.beta_min, cfg.beta_max, cfg.beta)


# %% 2. Training objective


def predict_eps(model, sde, xt, t, sigma_data=0.5):
    """The network's eps_hat(x_t, t), like xt. sigma_data: std of the data.

    VP, sub-VP: time enters as 999 t, the steps of DDPM. VE: as ln sigma; x_t, whose size runs from
    sigma_data to sigma_max, is scaled to unit variance, and the network corrects the eps_hat of
    data ~ N(0, sigma_data^2 I) (departure 5; Karras et al., arXiv 2206.00364, Tab. 1).
    """
    if isinstance(sde, VESDE):
        sigma = over(sde.std(t), xt)
        size = (sigma**2 + sigma_data**2).sqrt()
        return (sigma * xt / size + sigma_data * model(xt / size, sde.std(t).log())) / size
    return model(xt, 999 * t)


def score_fn(model, sde, sigma_data=0.5, std_floor=1e-5, clip_x0=False):
    """score(x, t), the gradient of log p_t, from a network that predicts eps.

    clip_x0: take the score to the nearest one whose x0_hat = (x + std^2 score) / m lies in [-1, 1].
    """
    def score(x, t):
        std = over(sde.std(t), x).clamp(min=std_floor)
        eps_hat = predict_eps(model, sde, x, t, sigma_data)
        if clip_x0:
            m = over(sde.m(t), x)
            x0_hat = ((x - std * eps_hat) / m).clamp(-1, 1)  # never x itself
            return (m * x0_hat - x) / std**2
        return -eps_hat / std

    return score


def score_loss(model, sde, x0, sigma_data=0.5, weighting="simple", t=None, eps=None):
    """Denoising score matching. x0: (B, ...) -> scalar. Source: Eq. 7.

    With lambda(t) = std^2 ("simple") the weighted error std^2 |score + eps/std|^2 is |eps_hat -
    eps|^2, of the same size at every t. "likelihood": lambda = g^2 (arXiv 2101.09258). t: (B,) in
    (0, T] and eps like x0 are drawn unless they are given.
    """
    if t is None:
        t = sde.eps_train + (sde.T - sde.eps_train) * torch.rand(len(x0), device=x0.device)
    if eps is None:
        eps = torch.randn_like(x0)
    mean, std = sde.marginal(x0, t)
    error = predict_eps(model, sde, mean + std * eps, t, sigma_data) - eps
    if weighting == "likelihood":
        error = error * sde.sde(x0, t)[1] / std  # lambda = g^2 in place of std^2
    return (error**2).mean()  # Eq. 7


# %% 3. Sampling


def at(t, x):
    """The float t as a tensor (B,) of x's kind."""
    return torch.full((len(x),), t, dtype=x.dtype, device=x.device)


def tweedie(score, sde, x, t):
    """E[x_0 | x_t = x], the noise-free end of a sample. x: (B, ...), t: float -> like x."""
    t = at(t, x)
    return (x + over(sde.std(t), x) ** 2 * score(x, t)) / over(sde.m(t), x)


def em_step(score, sde, x, t, s):
    """Euler-Maruyama on the reverse SDE, from t down to s. Source: Eq. 6."""
    drift, g = sde.sde(x, at(t, x))
    x_mean = x - (drift - g**2 * score(x, at(t, x))) * (t - s)  # Eq. 6
    return x_mean + g * math.sqrt(t - s) * torch.randn_like(x)


def reverse_diffusion_step(score, sde, x, t, s):
    """The forward transition x_s -> x_t, run backwards. Source: App. E; Alg. 2 and 3, lines 3-5."""
    a, variance = transition(sde, s, t)
    x_mean = (2 - a) * x + variance * score(x, at(t, x))
    return x_mean + math.sqrt(variance) * torch.randn_like(x)


def ancestral_step(score, sde, x, t, s):
    """The ancestral step of DDPM (VP, Eq. 4) and of SMLD (VE, App. F)."""
    if isinstance(sde, SubVPSDE):
        raise ValueError("ancestral sampling is defined for VESDE and VPSDE")
    a, variance = transition(sde, s, t)
    x_mean = (x + variance * score(x, at(t, x))) / a  # Eq. 4 with a = sqrt(1 - beta); App. F: a = 1
    if isinstance(sde, VESDE):
        sigma_s, sigma_t = (sde.std(torch.tensor(u, dtype=torch.float64)).item() for u in (s, t))
        variance *= sigma_s**2 / sigma_t**2  # App. F
    return x_mean + math.sqrt(variance) * torch.randn_like(x)


def langevin_step(score, x, t, alpha, snr):
    """One corrector step at t. alpha: 1 (VE), or the step's 1 - beta. Source: Alg. 4 and 5."""
    z = torch.randn_like(x)  # line 4
    g = score(x, at(t, x))  # line 5
    z_norm, g_norm = (u.flatten(1).norm(dim=1).mean() for u in (z, g))  # over the batch, App. G
    epsilon = 2 * alpha * (snr * z_norm / g_norm) ** 2  # line 6
    return x + epsilon * g + (2 * epsilon).sqrt() * z  # line 7


@torch.no_grad()
def sample(step, score, sde, shape, steps, denoise=True, xT=None, watch=None):
    """step(score, sde, x, t, s) from t = T down to eps in equal steps, then Tweedie's formula.

    xT: the noise to start from (drawn when None). watch(t, x) sees every state. Returns `shape`.
    """
    x = sde.prior_sampling(shape) if xT is None else xT
    ts = np.linspace(sde.T, sde.eps, steps + 1).tolist()
    for t, s in zip(ts[:-1], ts[1:], strict=True):
        if watch is not None:
            watch(t, x)
        x = step(score, sde, x, t, s)
    return tweedie(score, sde, x, sde.eps) if denoise else x


def euler_maruyama(score, sde, shape, steps, **how):
    """The reverse SDE (Eq. 6) by Euler-Maruyama; see `sample` for denoise, xT, watch."""
    return sample(em_step, score, sde, shape, steps, **how)


def reverse_diffusion(score, sde, shape, steps, **how):
    """Reverse diffusion sampling (App. E); see `sample` for denoise, xT, watch."""
    return sample(reverse_diffusion_step, score, sde, shape, steps, **how)


def ancestral_sampling(score, sde, shape, steps, **how):
    """Ancestral sampling (Eq. 4, App. F) for VE and VP; see `sample` for denoise, xT, watch."""
    return sample(ancestral_step, score, sde, shape, steps, **how)


def predictor_corrector(score, sde, shape, steps, snr=0.16, corrector_steps=1,
                        predictor=reverse_diffusion_step, **how):
    """A predictor step after each `corrector_steps` Langevin steps. Source: Alg. 1 (2: VE, 3: VP).

    snr: target signal-to-noise ratio r of the corrector. See `sample` for denoise, xT, watch.
    """
    def step(score, sde, x, t, s):
        alpha = transition(sde, s, t)[0] ** 2  # 1 for VE, else 1 - beta of this step
        for _ in range(corrector_steps):  # before the predictor: departure 2
            x = langevin_step(score, x, t, alpha, snr)
        return predictor(score, sde, x, t, s)

    return sample(step, score, sde, shape, steps, **how)


def flow_drift(score, sde, x, t):
    """dx/dt of the probability-flow ODE; t: float. Source: Eq. 13."""
    drift, g = sde.sde(x, at(t, x))
    return drift - 0.5 * g**2 * score(x, at(t, x))


def rk4_flow(score, sde, x, t, s, steps):
    """x carried by the ODE from t to s in `steps` steps of the classical Runge-Kutta method."""
    ts = np.linspace(t, s, steps + 1).tolist()
    for t, s in zip(ts[:-1], ts[1:], strict=True):
        h = s - t
        k1 = flow_drift(score, sde, x, t)
        k2 = flow_drift(score, sde, x + h / 2 * k1, t + h / 2)
        k3 = flow_drift(score, sde, x + h / 2 * k2, t + h / 2)
        k4 = flow_drift(score, sde, x + h * k3, s)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def solve(rhs, state, t, s, tolerance):
    """rhs(state, t) integrated from t to s by adaptive RK45; state: a tuple of tensors."""
    sizes = np.cumsum([part.numel() for part in state])[:-1]

    def pack(parts):
        return np.concatenate([p.detach().cpu().double().numpy().ravel() for p in parts])

    def unpack(flat):
        return tuple(torch.from_numpy(p).to(like.device, like.dtype).view_as(like)
                     for p, like in zip(np.split(flat, sizes), state, strict=True))

    found = solve_ivp(lambda u, flat: pack(rhs(unpack(flat), float(u))), (t, s), pack(state),
                      method="RK45", rtol=tolerance, atol=tolerance)
    return unpack(found.y[:, -1])


@torch.no_grad()
def probability_flow_ode(score, sde, shape, method="rk45", steps=100, tolerance=1e-5, denoise=True,
                         xT=None):
    """Noise carried to data by the ODE with the SDE's marginals. Source: Eq. 13, App. D.3.

    method: rk45 (adaptive, to `tolerance`) or rk4 (`steps` steps of four network calls). xT: the
    noise to start from (drawn when None).
    """
    x = sde.prior_sampling(shape) if xT is None else xT
    x = ode_decode(score, sde, x, method, steps, tolerance)
    return tweedie(score, sde, x, sde.eps) if denoise else x


@torch.no_grad()
def ode_decode(score, sde, z, method="rk45", steps=100, tolerance=1e-5, eps=None):
    """A code z = x_T (B, ...) carried to x_eps by the ODE. Source: App. D.4 (latent codes)."""
    eps = sde.eps if eps is None else eps
    if method == "rk4":
        return rk4_flow(score, sde, z, sde.T, eps, steps)
    return solve(lambda x, t: (flow_drift(score, sde, x[0], t),), (z,), sde.T, eps, tolerance)[0]


@torch.no_grad()
def ode_encode(score, sde, x, method="rk45", steps=100, tolerance=1e-5, eps=None):
    """The code x_T of x (B, ...), taken as x_eps, by the ODE run forwards. Source: App. D.4."""
    eps = sde.eps if eps is None else eps
    if method == "rk4":
        return rk4_flow(score, sde, x, eps, sde.T, steps)
    return solve(lambda x, t: (flow_drift(score, sde, x[0], t),), (x,), eps, sde.T, tolerance)[0]


def slerp(a, b, share):
    """Spherical interpolation from a (share = 0) to b (share = 1). Source: App. D.5.

    a, b: (B, ...); one angle theta a sample, over all but the first dimension.
    """
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    theta = torch.acos(F.cosine_similarity(flat_a, flat_b).clamp(-1, 1))
    theta = theta.clamp(min=1e-4).view(-1, *[1] * (a.ndim - 1))  # parallel: in the limit a line
    return ((1 - share) * theta).sin() / theta.sin() * a + (share * theta).sin() / theta.sin() * b


def log_likelihood(score, sde, x, trace="exact", probe="rademacher", tolerance=1e-5, eps=1e-5,
                   prior_logp=None):
    """log p_eps(x) in nats: (B, ...) -> (B,). Source: Eq. 39, App. D.2.

    trace: "exact" (one backward pass a dimension: for points) or "hutchinson" (Eq. 40: one, with a
    rademacher or gaussian probe, the same along the whole trajectory). prior_logp: log p_T where
    it is known better than sde.prior_logp.
    """
    x = x.detach()
    v = torch.randn_like(x) if probe == "gaussian" else torch.randint_like(x, 2) * 2 - 1

    @torch.enable_grad()
    def rhs(state, t):
        x = state[0].requires_grad_()
        velocity = flow_drift(score, sde, x, t)
        if trace == "hutchinson":
            vJ = torch.autograd.grad(velocity, x, v)[0]
            return velocity, (vJ * v).flatten(1).sum(1)  # Eq. 40: v^T J v
        flat, div = velocity.flatten(1), 0
        for i in range(flat.shape[1]):
            row = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0]
            div = div + row.flatten(1)[:, i]
        return velocity, div

    z, change = solve(rhs, (x, x.new_zeros(len(x))), eps, sde.T, tolerance)
    return (prior_logp or sde.prior_logp)(z) + change  # Eq. 39


def dequantize(x):
    """8-bit images in [-1, 1], each value spread over its bin: (255 x + u) / 256 in units of 1."""
    pixels = (x + 1) * 127.5
    return (pixels + torch.rand_like(x)) / 128 - 1


def bits_per_dim(score, sde, x, **how):
    """-log_2 of the probability of 8-bit images x (B, C, H, W) in [-1, 1], a dimension: (B,).

    A bin is 2/256 wide, hence the 7. Source: App. D.2. Raises ValueError for other data.
    """
    if not is_8bit(x):
        raise ValueError("bits/dim needs 8-bit images scaled to [-1, 1]")
    logp = log_likelihood(score, sde, dequantize(x), trace="hutchinson", **how)
    return -logp / (x[0].numel() * math.log(2)) + 7


def is_8bit(x):
    """Whether x (B, C, H, W) holds 8-bit pixels scaled to [-1, 1]."""
    pixels = (x + 1) * 127.5
    return x.ndim == 4 and bool(((pixels - pixels.round()).abs() < 1e-3).all())


# %% 4. Network


def timestep_embedding(t, dim):
    """Sinusoidal features of t: (B,) -> (B, dim). Source: App. B, after Vaswani et al., arXiv
    1706.03762.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - 1))
    angles = t.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class FourierFeatures(nn.Module):
    """Random Fourier features of a real number: (B,) -> (B, 2 * dim). Source: App. H, scale 16."""

    def __init__(self, dim, scale=16.0):
        super().__init__()
        self.register_buffer("W", torch.randn(dim) * scale)

    def forward(self, t):
        angles = 2 * math.pi * t.float()[:, None] * self.W[None, :]
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


def fir_filter(x):
    """Blur by the filter (1, 3, 3, 1) in both directions. (B, C, H, W) -> (B, C, H + 1, W + 1).
    Source: App. H, after StyleGAN-2, arXiv 1912.04958.
    """
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    kernel = (taps[:, None] * taps[None, :]).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (2, 2, 2, 2)), kernel, groups=x.shape[1])


def shrink(x, fir=False):
    """Half the resolution without weights: by averages, or anti-aliased by the FIR filter."""
    return fir_filter(x)[:, :, 1::2, 1::2] if fir else F.avg_pool2d(x, 2)


def grow(x, fir=False):
    """Twice the resolution without weights: by copies, or smooth by the FIR filter."""
    if not fir:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    B, C, H, W = x.shape
    spread = x.new_zeros(B, C, H, 2, W, 2)  # each pixel followed by zeros
    spread[:, :, :, 0, :, 0] = x
    return 4 * fir_filter(spread.view(B, C, 2 * H, 2 * W))[:, :, :-1, :-1]


class FirDownsample(Downsample):
    """Downsample behind the FIR filter, which removes what would alias."""

    def forward(self, x):
        return F.conv2d(fir_filter(x), self.conv.weight, self.conv.bias, stride=2)


class FirUpsample(Upsample):
    """Upsample with the FIR filter in place of copies."""

    def forward(self, x):
        return self.conv(grow(self.narrow(x), fir=True))


class ResampleBlock(ResBlock):
    """A residual block that halves or doubles the resolution inside, as BigGAN's. Source: App. H.
    """

    def __init__(self, c_in, c_out, time_dim, groups, dropout, resample, fir):
        super().__init__(c_in, c_out, time_dim, groups, dropout)
        self.resample, self.fir = resample, fir
        self.skip = nn.Conv2d(c_in, c_out, 1)  # also where the widths agree

    def forward(self, x, emb):
        h = self.conv1(self.resample(F.silu(self.norm1(x)), self.fir))
        h = h + self.time(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(self.resample(x, self.fir)) + h


class UNet(nn.Module):
    """eps_hat(x_t, t): x: (B, C, H, W), t: (B,) float, 999 t or ln sigma -> (B, C, H, W).

    H and W must be multiples of patch * 2^(levels - 1). attention: resolutions, counted after the
    patching, at which each block on the way down, and the last on the way up, is followed by
    self-attention. fourier: random Fourier features of t (VE). fir, skip_rescale, biggan and
    progressive_input: the options of NCSN++ (all, and fourier) and DDPM++ (skip_rescale, biggan).
    Source: App. H.
    """

    def __init__(self, image_channels=3, image_size=32, channels=128, mults=(1, 2, 2, 2), blocks=4,
                 attention=(16,), heads=1, groups=32, dropout=0.1, patch=1,
                 grad_checkpointing=False, fourier=False, fir=False, skip_rescale=False,
                 biggan=False, progressive_input=False):
        super().__init__()
        self.channels, self.patch, self.grad_checkpointing = channels, patch, grad_checkpointing
        self.fir, self.rescale = fir, math.sqrt(0.5) if skip_rescale else 1.0
        time_dim, image_channels = 4 * channels, image_channels * patch**2
        self.features = FourierFeatures(channels) if fourier else None
        self.time = nn.Sequential(nn.Linear(channels * (2 if fourier else 1), time_dim), nn.SiLU(),
                                  nn.Linear(time_dim, time_dim))

        def stage(c_in, c_out, attend):
            block = ResBlock(c_in, c_out, time_dim, groups, dropout)
            return nn.ModuleList([block, Attention(c_out, heads, groups)] if attend else [block])

        def resampler(c_in, c_out, resample):
            if biggan:
                return ResampleBlock(c_in, c_out, time_dim, groups, dropout, resample, fir)
            if resample is shrink:
                return FirDownsample(c_in) if fir else Downsample(c_in)
            return FirUpsample(c_in, c_out) if fir else Upsample(c_in, c_out)

        c, size = channels, image_size // patch
        self.conv_in = nn.Conv2d(image_channels, c, 3, padding=1)
        self.down, skips = nn.ModuleList(), [c]
        self.pyramid, c_pyramid = nn.ModuleList(), image_channels
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                self.down.append(stage(c, channels * mult, size in attention))
                c = channels * mult
                skips.append(c)
            if level < len(mults) - 1:
                self.down.append(resampler(c, c, shrink))
                if progressive_input:
                    self.pyramid.append(nn.Conv2d(c_pyramid, c, 3, padding=1))
                    c_pyramid = c
                skips.append(c)
                size //= 2

        self.mid = nn.ModuleList([stage(c, c, True), stage(c, c, False)])

        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for i in range(blocks + 1):
                attend = size in attention and i == blocks
                self.up.append(stage(c + skips.pop(), channels * mult, attend))
                c = channels * mult
            if level > 0:
                narrow = channels * mults[level - 1] if patch > 1 else c
                self.up.append(resampler(c, narrow, grow))
                c, size = narrow, size * 2
        self.norm_out = nn.GroupNorm(groups, c)
        self.conv_out = zero_init(nn.Conv2d(c, image_channels, 3, padding=1))

    def _block(self, block, h, emb):
        if self.grad_checkpointing and self.training:
            return checkpoint(block, h, emb, use_reentrant=False) * self.rescale
        return block(h, emb) * self.rescale  # (skip + h) / sqrt(2)

    def _stage(self, stage, h, emb):
        h = self._block(stage[0], h, emb)
        for attention in stage[1:]:
            h = attention(h) * self.rescale
        return h

    def _resample(self, module, h, emb):
        return self._block(module, h, emb) if isinstance(module, ResampleBlock) else module(h)

    def forward(self, x, t):
        fourier, c = self.features, self.channels
        emb = self.time(fourier(t) if fourier is not None else timestep_embedding(t, c))
        pyramid = F.pixel_unshuffle(x, self.patch)
        h, levels = self.conv_in(pyramid), iter(self.pyramid)
        skips = [h]
        for module in self.down:
            if isinstance(module, nn.ModuleList):
                h = self._stage(module, h, emb)
            else:
                h = self._resample(module, h, emb)
                if self.pyramid:  # the input itself, shrunk, joins at every level
                    pyramid = h = (next(levels)(shrink(pyramid, self.fir)) + h) * self.rescale
            skips.append(h)
        for module in self.mid:
            h = self._stage(module, h, emb)
        for module in self.up:
            if isinstance(module, nn.ModuleList):
                h = self._stage(module, torch.cat([h, skips.pop()], dim=1), emb)
            else:
                h = self._resample(module, h, emb)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


class ScoreMLP(nn.Module):
    """eps_hat(x_t, t) for points: x: (B, dim), t: (B,) float, 999 t or ln sigma -> (B, dim)."""

    def __init__(self, dim=2, hidden=128, layers=4, fourier=False):
        super().__init__()
        self.features = FourierFeatures(32) if fourier else None
        self.time = nn.Linear(64, hidden)
        self.lift = nn.Linear(dim, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden)) for _ in range(layers))
        self.out = zero_init(nn.Linear(hidden, dim))

    def forward(self, x, t):
        features = timestep_embedding(t, 64) if self.features is None else self.features(t)
        emb = self.time(features)
        h = self.lift(x)
        for block in self.blocks:
            h = h + block(h + emb)
        return self.out(F.silu(h))


def make_network(cfg, shape, grad_checkpointing=False):
    """The network that cfg describes, for images (C, H, W) or points (dim,); one that cannot be is
    fatal.
    """
    if len(shape) == 1:
        return ScoreMLP(shape[0], cfg.hidden, cfg.layers, cfg.sde == "ve")
    C, H, W = shape
    multiple = cfg.patch * 2 ** (len(cfg.mults) - 1)
    if H % multiple or W % multiple:
        low = H // multiple * multiple
        sizes = ", ".join(str(s) for s in (low, low + multiple) if s > 0)
        fail(f"--image_size {H}: must be a multiple of {multiple} (patch {cfg.patch}, "
             f"{len(cfg.mults)} levels); nearest sizes that work: {sizes}")
    return UNet(C, H, cfg.channels, cfg.mults, cfg.blocks, cfg.attention, cfg.heads, cfg.groups,
                cfg.dropout, cfg.patch, grad_checkpointing, cfg.sde == "ve", cfg.fir,
                cfg.skip_rescale, cfg.biggan, cfg.progressive_input)


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


def load_data(cfg):
    """Images or points, as cfg.dataset names them."""
    if cfg.dataset in POINTS:
        return load_points(cfg.dataset)
    return load_images(cfg.dataset, cfg.image_size)


def train(cfg, run, data=None, state=None):
    """Minimise Eq. 7. Returns the averaged (EMA) model in eval mode; writes log and checkpoint.

    data: common.data.Data (loaded from cfg.dataset when None); state: a checkpoint to go on from.
    Ends the program, naming the step, if the loss stops being finite; the last good checkpoint
    stays.
    """
    device, opts = run.device, run.opts
    data = load_data(cfg).to(device) if data is None else data
    shape, images = data.train.shape[1:], data.train.ndim == 4
    sde, sigma_data = make_sde(cfg), data.train.std().item()
    model = make_network(cfg, shape, opts.grad_checkpointing).to(device)
    if images:
        model = model.to(memory_format=torch.channels_last)
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
                            sigma_data=sigma_data)

    if first == 0:
        save(0)
    for step in run.steps(first, cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        # every process draws the same whole batch and takes its slice
        x0 = data.train[torch.randint(len(data.train), (cfg.batch_size,), device=device)]
        if cfg.flip:
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=device) < 0.5, x0.flip(3), x0)
        if cfg.dequantize and images:
            x0 = dequantize(x0)
        t = sde.eps_train + (sde.T - sde.eps_train) * torch.rand(len(x0), device=device)
        eps = torch.randn_like(x0)
        x0, t, eps = (run.launch.shard(z) for z in (x0, t, eps))
        with core:
            with autocast(device, opts.amp):
                loss = score_loss(network, sde, x0, sigma_data, cfg.weighting, t, eps)
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
        run.log(done, loss=value, grad_norm=norm.item(), lr=learning_rate(cfg, step))
        run.bar.set_postfix(loss=f"{value:.4f}", refresh=False)
        if done % cfg.preview_every == 0 and done < cfg.steps:
            save(done)
            saved = done
            figure_preview(run, ema.model, sde, data, sigma_data, done)
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


def draw(cfg, score, sde, xT, sampler=None, calls=None, watch=None):
    """Samples by cfg.sampler (or another) from the noises xT, in cfg.N steps or in about `calls`
    network calls.
    """
    name, shape = sampler or cfg.sampler, xT.shape
    how = {"denoise": cfg.denoise, "xT": xT}
    steps = cfg.N if calls is None else calls
    if name == "rk45":
        return probability_flow_ode(score, sde, shape, "rk45", tolerance=cfg.tolerance, **how)
    if name == "rk4":
        return probability_flow_ode(score, sde, shape, "rk4", max(1, steps // 4), **how)
    if name == "pc":
        each = 1 if calls is None else 1 + cfg.corrector_steps
        return predictor_corrector(score, sde, shape, max(1, steps // each), cfg.snr,
                                   cfg.corrector_steps, watch=watch, **how)
    walk = {"em": euler_maruyama, "reverse": reverse_diffusion, "ancestral": ancestral_sampling}
    return walk[name](score, sde, shape, steps, watch=watch, **how)


class Counted:
    """A network that counts its calls and the seconds spent in them."""

    def __init__(self, model, device, bar=None):
        self.model, self.watch, self.calls, self.bar = model, Stopwatch(device), 0, bar

    def __call__(self, x, t):
        self.calls += 1
        if self.bar is not None:
            self.bar.update()
        with self.watch:
            return self.model(x, t)


def draw_many(cfg, run, model, sde, shape, sigma_data, n, sampler=None, calls=None, batch_size=100):
    """n samples in batches. Returns (samples, {"seconds", "network_calls", ...})."""
    parts, total = [], Stopwatch(run.device)
    points = len(shape) == 1
    with total, tqdm(desc=f"{sampler or cfg.sampler} {n}", unit="call") as bar:
        network = Counted(model, run.device, bar)
        score = score_fn(network, sde, sigma_data, cfg.std_floor, cfg.clip_x0 and not points)
        for i in range(0, n, 10000 if points else batch_size):
            size = min(10000 if points else batch_size, n - i)
            xT = cfg.temperature * sde.prior_sampling((size, *shape)).to(run.device)
            parts.append(draw(cfg, score, sde, xT, sampler, calls))
    return torch.cat(parts), {"n": n, "seconds": total.seconds,
                              "network_calls": network.calls / len(parts),
                              "share_outside_network": 1 - network.watch.seconds / total.seconds}


SAMPLERS = {"em": "Euler–Maruyama", "reverse": "reverse diffusion", "ancestral": "ancestral",
            "pc": "predictor–corrector", "rk45": "ODE, RK45", "rk4": "ODE, RK4"}


def samplers_of(sde):
    """The names of the samplers that an SDE has."""
    return [name for name in SAMPLERS if name != "ancestral" or not isinstance(sde, SubVPSDE)]


def figure_sdes(run, cfg):
    """sdes.png: mean and variance of the three SDEs, and the size of two training targets."""
    sdes = {"VE": VESDE(cfg.sigma_min, cfg.sigma_max),
            "VP": VPSDE(cfg.beta_min, cfg.beta_max, cfg.beta),
            "sub-VP": SubVPSDE(cfg.beta_min, cfg.beta_max, cfg.beta)}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.5))
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    early = torch.logspace(-5, 0, 200, dtype=torch.float64)
    for (name, sde), dashes in zip(sdes.items(), ("-", "-", "--"), strict=True):
        axes[0].plot(t, sde.m(t), dashes, label=name)
        axes[1].plot(t, sde.std(t) ** 2, dashes)
        axes[2].plot(early, 1 / sde.std(early) ** 2, dashes)
    axes[2].axhline(1, color="0.3", lw=1.2)
    axes[2].text(1.2e-5, 1.4, r"of $\epsilon$: 1 at every $t$", fontsize=9)
    axes[0].set(xlabel="t", title=r"mean: $m(t)\,x_0$")
    axes[0].legend(frameon=False)
    axes[1].set(xlabel="t", yscale="log", ylim=(1e-4, None), title="variance of the noise")
    axes[2].set(xlabel="t", xscale="log", yscale="log",
                title=r"variance of the target: of the score, $1/std^2$")
    figure.tight_layout()
    plotting.finish(figure, run.path("sdes.png"))


@torch.no_grad()
def figure_loss(run, model, sde, data, sigma_data, bins=10):
    """loss.png: the training loss, and the held-out loss by t."""
    log = run.read_log()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    if log:
        axes[0].plot(log["step"], log["loss"], lw=0.4, alpha=0.35)
        axes[0].plot(log["step"], plotting.smooth(log["loss"], 100), lw=1.8)
        axes[0].set(yscale="log")
    axes[0].set(xlabel="step", title="training loss (Eq. 7) and its running mean")
    x0, values = data.test[:200], []
    for i in range(bins):
        t = (i + torch.rand(len(x0), device=x0.device)) / bins * sde.T
        values.append(score_loss(model, sde, x0, sigma_data, t=t.clamp(min=sde.eps_train)).item())
    axes[1].bar([(i + 0.5) / bins for i in range(bins)], values, width=0.9 / bins)
    axes[1].set(
        xlabel="t", yscale="log", title="held-out loss by t: little noise is hardest to see")
    figure.tight_layout()
    plotting.finish(figure, run.path("loss.png"))


@torch.no_grad()
def figure_preview(run, model, sde, data, sigma_data, step):
    """preview.png: x0_hat of held-out x_t at a few t, one network call, no sampling."""
    if not run.launch.main:
        return
    images = data.test.ndim == 4
    x0 = data.test[:6] if images else data.test[:1000]
    generator = torch.Generator().manual_seed(0)  # its own: previews leave the training draws alone
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    score, panels = score_fn(model, sde, sigma_data), [("held out", x0)]
    for t in (0.1, 0.3, 0.5, 0.7):
        mean, std = sde.marginal(x0, at(t, x0))
        xt = mean + std * eps
        panels += [(f"x_t, t = {t}", xt), ("x0_hat", tweedie(score, sde, xt, t))]
    title = f"What one network call recovers, step {step}"
    if images:
        plotting.save_rows(run.path("preview.png"), [x for _, x in panels], title,
                           [label for label, _ in panels])
    else:
        plotting.save_points(run.path("preview.png"), panels, title)


def figure_samples(run, samples, data):
    """samples.png: what was drawn, beside held-out data."""
    if data.test.ndim == 2:
        plotting.save_points(run.path("samples.png"), [("samples", samples[:5000]),
                                                       ("held out", data.test[:5000])],
                             "Drawn from noise, beside the real thing")
        return
    n = min(64, len(samples))
    plotting.save_panels(run.path("samples.png"),
                         [("samples", samples[:n]), ("real, held out", data.test[:n])],
                         "Drawn from noise, beside the real thing", max(1, math.isqrt(n)))


def figure_denoising(cfg, run, score, sde, shape, n=8):
    """denoising.gif: x_t above x0_hat, on the way from noise to pictures."""
    frames, captions, seen = [], [], []

    def watch(t, x):
        if not seen or len(seen) % max(1, cfg.N // 32) == 0:
            one = torch.tensor(t)
            size = math.sqrt(sde.m(one).item() ** 2 + sde.std(one).item() ** 2)
            frames.append(torch.cat([x / size, tweedie(score, sde, x, t)]))
            captions.append(f"t = {t:.2f}: x_t above, x0_hat below")
        seen.append(t)

    xT = sde.prior_sampling((n, *shape)).to(run.device)
    x = draw(cfg, score, sde, xT, "reverse", watch=watch)
    plotting.save_gif(run.path("denoising.gif"), frames + [torch.cat([x, x])], 8,
                      captions + ["t = 0"])


def figure_samplers(cfg, run, model, sde, shape, sigma_data, calls=100, n=10):
    """samplers.png: one row a sampler, from the same noises, in about equal numbers of calls."""
    rows, labels, found = [], [], {}
    xT = sde.prior_sampling((n, *shape)).to(run.device)
    for name in samplers_of(sde):
        network, total = Counted(model, run.device), Stopwatch(run.device)
        score = score_fn(network, sde, sigma_data, cfg.std_floor, cfg.clip_x0)
        with total:
            rows.append(draw(cfg, score, sde, xT, name, min(calls, cfg.N)))
        found[name] = {"network_calls": network.calls, "seconds": total.seconds}
        labels.append(f"{SAMPLERS[name]}\n{network.calls} calls, {total.seconds:.1f} s")
    plotting.save_rows(run.path("samplers.png"), rows,
                       "From the same noises to pictures: every sampler", labels)
    return found


def figure_guardrails(cfg, run, model, sde, shape, sigma_data, n=10):
    """guardrails.png: few steps with the safety measures, and without each of them."""
    xT = sde.prior_sampling((n, *shape)).to(run.device)
    rows, labels = [], []
    for label, change in (("all on", {}), ("no Tweedie step", {"denoise": False}),
                          ("x0_hat not clamped", {"clip_x0": False})):
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the rows differ in one switch, not in their noise
            now = replace(cfg, **change)
            score = score_fn(model, sde, sigma_data, now.std_floor, now.clip_x0)
            rows.append(draw(now, score, sde, xT, "em", min(30, cfg.N)))
        labels.append(label)
    plotting.save_rows(run.path("guardrails.png"), rows,
                       "What the guardrails do: Euler–Maruyama in 30 steps", labels)


def figure_codes(cfg, run, score, sde, data):
    """codes.png: pictures, their decoded codes, a walk between two codes, and temperatures."""
    x = data.test[:8]
    z = ode_encode(score, sde, x, tolerance=cfg.tolerance)
    back = ode_decode(score, sde, z, tolerance=cfg.tolerance)
    shares = torch.linspace(0, 1, 8).tolist()
    walk = torch.cat([slerp(z[:1], z[1:2], share) for share in shares])
    rows = [x, back, ode_decode(score, sde, walk, tolerance=cfg.tolerance)]
    labels = ["held out", "encoded, decoded", "first to second"]
    for temperature in (0.7, 0.9, 1.0):
        torch.manual_seed(1)
        noise = temperature * sde.prior_sampling(x.shape).to(x.device)
        rows.append(ode_decode(score, sde, noise, tolerance=cfg.tolerance))
        labels.append(f"temperature {temperature}")
    plotting.save_rows(run.path("codes.png"), rows,
                       "Codes by the probability-flow ODE: encode, decode, mix, cool", labels)
    return (back - x).pow(2).mean().sqrt().item()


@torch.no_grad()
def figure_fields(run, score, sde, data):
    """scores.png: the score field at several t over the noisy data."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 4))
    side = torch.linspace(-2.2, 2.2, 22)
    grid = torch.cartesian_prod(side, side).to(data.test.device)
    for axis, t in zip(axes, (0.01, 0.1, 0.3, 0.6), strict=True):
        if isinstance(sde, VESDE):  # equal steps in t are equal factors of sigma
            t = 0.5 + t / 2
        x0 = data.test[:1500]
        mean, std = sde.marginal(x0, at(t, x0))
        xt = plotting.series(mean + std * torch.randn_like(x0))
        arrows = score(grid, at(t, grid))
        arrows = arrows / arrows.norm(dim=1, keepdim=True).clamp(min=1e-9).sqrt()
        axis.scatter(*xt.T, s=2, alpha=0.35, color="C1")
        axis.quiver(*plotting.series(grid).T, *plotting.series(arrows).T, color="C0", width=0.003)
        axis.set(title=f"t = {t:.2f}", xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), aspect="equal")
    figure.suptitle("The score points to where data is more likely (lengths: square root)")
    figure.tight_layout()
    plotting.finish(figure, run.path("scores.png"))


@torch.no_grad()
def figure_paths(cfg, run, score, sde, data, n=6, steps=400):
    """paths.png: the SDE and the ODE from the same starts; denoising.gif: a crowd by the SDE."""
    xT, crowd = (sde.prior_sampling((k, 2)).to(data.test.device) for k in (n, 2000))
    ts = np.linspace(sde.T, sde.eps, steps + 1).tolist()

    def shown(x, t):
        """x_t scaled to the size of the data, so that VE's wide start fits the page."""
        t = torch.tensor(t)
        return plotting.series(x) / math.sqrt(sde.m(t).item() ** 2 + sde.std(t).item() ** 2)

    def walk(x, ode):
        states = [shown(x, ts[0])]
        for t, s in zip(ts[:-1], ts[1:], strict=True):
            x = rk4_flow(score, sde, x, t, s, 1) if ode else em_step(score, sde, x, t, s)
            states.append(shown(x, s))
        return np.stack(states)  # (steps + 1, n, 2)

    figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharex=True, sharey=True)
    for axis, ode, title in zip(axes, (False, True), (
            "reverse SDE (Eq. 6): every path its own noise",
            "probability-flow ODE (Eq. 13): no noise, short ways"), strict=True):
        paths = walk(xT, ode)
        axis.scatter(*plotting.series(data.test[:3000]).T, s=1, color="0.8")
        for i in range(n):
            axis.plot(paths[:, i, 0], paths[:, i, 1], lw=0.9, alpha=0.8)
        axis.scatter(*paths[0].T, s=18, marker="x", color="0.3", zorder=3)
        axis.scatter(*paths[-1].T, s=18, color="k", zorder=3)
        axis.set(title=title, aspect="equal")
    figure.suptitle("From the same starts (crosses) to the data (dots)")
    figure.tight_layout()
    plotting.finish(figure, run.path("paths.png"))
    frames = walk(crowd, ode=False)[:: max(1, steps // 40)]
    plotting.save_points_gif(run.path("denoising.gif"), list(frames),
                             [f"t = {t:.2f}" for t in ts[:: max(1, steps // 40)]])


def figure_density(cfg, run, score, sde, data, side=70):
    """density.png: the model's density by the ODE's likelihood beside the true one."""
    line = torch.linspace(-2.1, 2.1, side)
    grid = torch.cartesian_prod(line, line).to(data.test.device)
    logp = log_likelihood(score, sde, grid, tolerance=cfg.tolerance)
    true = point_density(data.name, grid)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4))
    top = true.max().item()
    for axis, p, title in zip(axes, (logp.exp(), true), (
            "model: exp of the likelihood (Eq. 39)", "truth"), strict=True):
        axis.imshow(plotting.series(p).reshape(side, side).T, origin="lower", vmin=0, vmax=top,
                    extent=(-2.1, 2.1, -2.1, 2.1), cmap="magma")
        axis.set(title=title)
    figure.suptitle("The density of the data, learnt and true")
    figure.tight_layout()
    plotting.finish(figure, run.path("density.png"))
    cell = (line[1] - line[0]).item() ** 2
    return {"density_sums_to": (logp.exp().sum() * cell).item(),
            "density_total_variation": ((logp.exp() - true).abs().sum() * cell / 2).item()}


def report_points(cfg, run, model, sde, data, sigma_data, samples, score):
    """Figures and numbers for points."""
    figure_fields(run, score, sde, data)
    figure_paths(cfg, run, score, sde, data)
    found = figure_density(cfg, run, score, sde, data)
    draws = [torch.randperm(len(data.test))[:2000].split(1000) for _ in range(10)]
    pick = [torch.randperm(len(samples))[:1000] for _ in range(10)]
    model_distance = np.mean([metrics.energy_distance(samples[i], data.test[a])
                              for i, (a, _) in zip(pick, draws, strict=True)])
    fresh = np.mean([metrics.energy_distance(data.test[a], data.test[b]) for a, b in draws])
    found |= {"energy_distance": float(model_distance), "energy_distance_of_data": float(fresh)}
    run.add_metrics(samples=found)
    if cfg.likelihood:
        x = data.test[:cfg.likelihood]
        logp = log_likelihood(score, sde, x, tolerance=cfg.tolerance)
        run.add_metrics(likelihood={
            "n": len(x), "nats": logp.mean().item(),
            "nats_of_the_truth": point_density(data.name, x).log().mean().item()})


def report_images(cfg, run, model, sde, data, sigma_data, samples, score, evaluate):
    """Figures and numbers for images."""
    shape = tuple(data.train.shape[1:])
    run.add_metrics(samplers=figure_samplers(cfg, run, model, sde, shape, sigma_data))
    figure_guardrails(cfg, run, model, sde, shape, sigma_data)
    run.add_metrics(code_error=figure_codes(cfg, run, score, sde, data))
    if cfg.likelihood and is_8bit(data.test):
        x = data.test if evaluate else data.test[:cfg.likelihood]
        begin, free = time.perf_counter(), score_fn(model, sde, sigma_data, cfg.std_floor)
        bits = torch.cat([bits_per_dim(free, sde, part, tolerance=cfg.tolerance)
                          for part in tqdm(x.split(100), desc="bits/dim", leave=False)])
        run.add_metrics(bits_per_dim={
            "n": len(x), "mean": bits.mean().item(),
            "standard_error": (bits.std() / math.sqrt(len(bits))).item() if len(bits) > 1 else None,
            "seconds": time.perf_counter() - begin})
    classifier, judged = metrics.load_classifier(data)
    if classifier:
        run.add_metrics(samples={"sure": metrics.sure_share(metrics.probabilities(
            classifier, samples)), "classifier": judged})
    if evaluate:
        many, timing = draw_many(cfg, run, model, sde, shape, sigma_data, evaluate)
        run.add_metrics(evaluation=metrics.quality(many, data, classifier) | timing)
        plotting.save_grid(run.path("evaluated.png"), many[:100], 10,
                           f"The first {min(100, len(many))} of {len(many)} samples")
        found = {}
        for name in samplers_of(sde):
            many, timing = draw_many(cfg, run, model, sde, shape, sigma_data, evaluate, name, 200)
            found[name] = metrics.quality(many, data, classifier) | timing
            run.add_metrics(evaluation_of_samplers=found)


def main(argv=None):
    """Read the command line, train (or load), sample, draw the figures, measure."""
    begin = time.perf_counter()
    cfg, opts = parse_args(Config, PRESETS, argv, SAMPLING)
    if cfg.dataset in POINTS and opts.preset == "laptop" and not opts.config:
        cfg = replace(PRESETS["swiss_roll"], **opts.given)  # the laptop's settings for points
    validate(cfg)
    place = launch(opts.device)
    autocast(place.device, opts.amp)  # refuses what this device cannot do, before anything is made
    cfg, run, state = start("score_based", Config, cfg, opts, place, validate)
    data = load_data(cfg).to(place.device)
    points = data.train.ndim == 2
    if opts.evaluate and data.train_labels is None:
        fail(f"--evaluate {opts.evaluate}: --dataset {cfg.dataset} has no labels to score by")
    if opts.given.get("likelihood") and not points and not is_8bit(data.test):
        fail(f"--likelihood {cfg.likelihood}: --dataset {cfg.dataset} at this size must be 8-bit "
             "images or points")
    sde, sigma_data = make_sde(cfg), data.train.std().item()
    if opts.sample is None:
        model = train(cfg, run, data, state)
    else:
        model = make_network(cfg, state["shape"]).eval().to(place.device)
        restore(model, state["ema"])
        sigma_data = state["sigma_data"]
    if not place.main:
        return
    run.say(f"writing to {run.folder}")
    shape = tuple(data.train.shape[1:])
    if not points:
        model = model.to(memory_format=torch.channels_last)
    samples, timing = draw_many(cfg, run, model, sde, shape, sigma_data,
                                cfg.n_samples * (100 if points else 1))
    run.add_metrics(sampling=timing | {"sampler": cfg.sampler})
    figure_sdes(run, cfg)
    figure_loss(run, model, sde, data, sigma_data)
    figure_samples(run, samples, data)
    score = score_fn(model, sde, sigma_data, cfg.std_floor, cfg.clip_x0 and not points)
    if points:
        report_points(cfg, run, model, sde, data, sigma_data, samples, score)
    else:
        figure_denoising(cfg, run, score, sde, shape)
        report_images(cfg, run, model, sde, data, sigma_data, samples, score, opts.evaluate)
    run.add_metrics(config=asdict(cfg), total_seconds=time.perf_counter() - begin,
                    peak_memory_mb=peak_memory_mb(place.device))
    run.report()


if __name__ == "__main__":
    main()
