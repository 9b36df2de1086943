"""Score-Based Generative Modeling through Stochastic Differential Equations
(Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, arXiv 2011.13456): [SDE]

    python score_based_diffusion_example.py                        train on digits, draw
    python score_based_diffusion_example.py --dataset swiss_roll   points in the plane
    python score_based_diffusion_example.py --dataset sines        series, forecasts
    python score_based_diffusion_example.py --sde ve               or vp, subvp
    python score_based_diffusion_example.py --sample --classes 3 1 4   digits by class
    python score_based_diffusion_example.py --sample --evaluate 500    every sampler

Implemented here: the VE, VP and sub-VP SDEs (Eq. 9, 11, 12; App. B, C) behind one
interface, denoising score matching (Eq. 7), the reverse SDE (Eq. 6) by Euler-Maruyama,
reverse diffusion (App. E), ancestral sampling (App. F), probability-flow sampling (App.
D.3) and predictor-corrector (Alg. 1 to 5), the probability-flow ODE (Eq. 13) by RK45
and RK4, exact likelihoods (Eq. 39), codes by the ODE (App. D.4), imputation,
colorization and sampling by class (Sec. 5, App. I), the network options of App. H.
[DDPM] is arXiv 2006.11239, [DDIM] 2010.02502, [ADM] 2105.05233; "code" is that of
the authors, score_sde_pytorch.

Departures from the paper:
  1. time runs from T to eps in equal steps, and reverse diffusion, ancestral sampling
     and the corrector's alpha take the exact transition of each step: the betas of
     DDPM miss the variance as t -> 0, which the paper saw in its FID (App. H.2). So
     there is a corrector for sub-VP too, which has no alpha in the authors' code;
  2. the corrector comes before the predictor, as in the code (Alg. 1 prints it after).
     r = 0.16 is Tab. 5's for VE; for VP it has 0.01, or 0.04 behind the flow predictor.
     Where part is known there are five per step, and r = 0.4 (`inpaint_corrector`);
  3. x0_hat is clamped while sampling images (`clip_x0`), not in likelihoods;
  4. the small U-Net of ddpm_example.py, on 2x2 blocks of pixels, an MLP for points,
     dilated convolutions for series, a cosine decay of the learning rate;
  5. VE's network predicts eps less the best guess for Gaussian data, in units of its
     own (`scaling`), and the loss is in these units too: arXiv 2206.00364. Its sigmas
     are twice the paper's, whose pixels are in [0, 1];
  6. pictures are trained on more of the middle t (`weighting`);
  7. not from the paper: the cosine beta, the likelihood weighting, fixed-step RK4.
`--preset ddpmpp` and `ncsnpp` keep 1, 2, 5, PyTorch's initial weights and its 1e-5 in
the group norms (code: uniform weights scaled by the mean of both fans, 1e-6).

Training takes 5 to 15 CPU minutes, summed over all cores: 3 to 8 minutes on two.
What it draws and how good that is: results/ and README.md.
"""

import copy
import math
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import plotting, quality
from common.cli import (Count, Fraction, Mistake, NonNegative, OpenFraction, Positive,
                        Probability, Whole, check_sizes, command_line, writing)
from common.data import (POINTS, SERIES, cached, load_data, make_masks, point_density,
                         read_question)
from common.device import counted, seeded
from common.run import open_run

Sampler = Literal["em", "reverse", "ancestral", "pc", "rk45", "rk4"]
Predictor = Literal["reverse", "ancestral", "flow", "none"]
Weighting = Literal["simple", "likelihood", "logit_normal"]


@dataclass(frozen=True)
class Config:
    """Each field is a flag: its type is the range, its comment the help text."""

    # SDE
    sde: Literal["ve", "vp", "subvp"] = "vp"  # forward SDE (paper: all three)
    beta: Literal["linear", "cosine"] = "linear"  # beta(t) of vp, subvp (paper: linear)
    beta_min: Positive = 0.1     # linear beta(t) at t = 0 (paper: 0.1)
    beta_max: Positive = 20.0    # linear beta(t) at t = 1 (paper: 20)
    sigma_min: Positive = 0.02   # smallest noise of ve (paper: 0.01 for x in [0, 1])
    sigma_max: Positive = 100.0  # largest noise of ve (paper: 50 for x in [0, 1])
    weighting: Weighting = "logit_normal"  # weight lambda(t) (paper: simple, std^2)
    # sampling
    sampler: Sampler = "pc"           # SDE or ODE (paper: ve pc, vp, subvp em)
    N: Count = 500                    # steps; rk4: N / 4, rk45: adaptive (paper: 1000)
    predictor: Predictor = "reverse"  # predictor of pc and imputation (code: reverse)
    corrector_steps: Whole = 1        # corrector steps per predictor step (paper: 1)
    snr: Positive = 0.16              # corrector's ratio r (paper: ve 0.16, vp 0.01)
    tolerance: OpenFraction = 1e-4    # rtol and atol of rk45 (paper: 1e-5)
    denoise: bool = True              # end with a noise-free mean (paper: yes)
    clip_x0: bool = True              # clamp x0_hat in sampling images (paper: no)
    std_floor: Probability = 1e-5     # smallest std by which eps_hat is divided
    temperature: NonNegative = 1.0    # scale of x_T alone (paper: 1)
    likelihood: Whole = 16            # held-out examples whose likelihood is computed
    n_samples: Count = 64             # samples drawn; points: 100 n, series: 5 n
    classes: tuple[str, ...] = ()     # classes to draw with a noisy classifier (Eq. 49)
    classifier_steps: Count = 1500    # training steps of the classifier
    inpaint_N: Count = 50             # imputation steps, where part of x is known
    inpaint_corrector: Whole = 5      # corrector steps per imputation step
    inpaint_snr: Positive = 0.4       # corrector's ratio r in imputation
    image: str = ""                   # file of a picture to complete
    mask: str = ""                    # mask file: white is kept, black is completed
    forecast: Whole = 0               # last values to hide and forecast; 0: a quarter
    # data
    dataset: str = "digits"  # digits, cifar10, ..., swiss_roll, ..., sines, csv:PATH
    image_size: Whole = 0    # resize or pad pictures to this resolution; 0 keeps theirs
    flip: bool = False       # mirror pictures at random (code: yes; never for digits)
    dequantize: bool = True  # spread 8-bit values evenly over their bins (code: no)
    # network
    channels: Count = 32                 # width of the U-Net, even, >= 4 (code: 128)
    mults: tuple[Count, ...] = (1, 2)    # relative width of each level (code: 1 2 2 2)
    blocks: Count = 1                    # residual blocks per level (paper: 4)
    attention: tuple[Count, ...] = (7,)  # resolutions with attention (code: 16)
    heads: Count = 1                     # attention heads (code: 1)
    groups: Count = 8                    # groups in each group norm (code: 32)
    dropout: Fraction = 0.0              # dropout in residual blocks (code: 0.1)
    patch: Count = 2                     # p x p pixels become channels (paper: none, 1)
    fir: bool = False  # anti-aliased resampling (paper: NCSN++ yes, DDPM++ no)
    skip_rescale: bool = False           # scale residual sums by 1/sqrt(2) (paper: yes)
    biggan: bool = False                 # resample inside residual blocks (paper: yes)
    progressive_input: bool = False      # shrunken input per level (paper: NCSN++ yes)
    hidden: Count = 128                  # width of the MLP or SeriesNet
    layers: Count = 4                    # blocks of the MLP or SeriesNet
    # training
    steps: Count = 4000          # optimiser steps (paper: 1300000)
    batch_size: Count = 32       # examples per step, all processes (paper: 128)
    lr: Positive = 2e-3          # peak learning rate (code: 2e-4)
    warmup: Whole = 200          # steps of learning-rate warm-up (code: 5000)
    decay: Literal["cosine", "constant"] = "cosine"  # decay of lr (code: constant)
    weight_decay: NonNegative = 0.0  # AdamW's weight decay; 0 gives Adam (code: 0)
    grad_clip: Positive = 1.0    # largest norm of the gradient (code: 1)
    ema: Fraction = 0.999        # decay of the average (paper: ve 0.999, vp 0.9999)
    preview_every: Count = 1000  # steps between previews and checkpoints


# these may change after training
SAMPLING = (
    "sampler", "N", "predictor", "corrector_steps", "snr", "tolerance", "denoise",
    "clip_x0", "std_floor", "temperature", "likelihood", "n_samples", "classes",
    "classifier_steps", "inpaint_N", "inpaint_corrector", "inpaint_snr", "image",
    "mask", "forecast")


PLANE = Config(
    dataset="swiss_roll", dequantize=False, weighting="simple", steps=10_000,
    batch_size=512, lr=3e-3, preview_every=5000, sampler="rk45", likelihood=1000)
LINE = Config(
    dataset="sines", sde="ve", sigma_max=20.0, dequantize=False, weighting="simple",
    hidden=48, layers=8, steps=3000, sampler="em", N=200, inpaint_N=100,
    inpaint_corrector=2, inpaint_snr=0.2)
DDPMPP = Config(  # DDPM++ cont. (VP) of Tab. 3
    dataset="cifar10", flip=True, channels=128, mults=(1, 2, 2, 2), blocks=4,
    attention=(16,), groups=32, dropout=0.1, patch=1, skip_rescale=True, biggan=True,
    steps=1_300_000, batch_size=128, lr=2e-4, warmup=5000, decay="constant",
    ema=0.9999, preview_every=5000, sampler="em", N=1000, tolerance=1e-5,
    clip_x0=False, dequantize=False, weighting="simple")
PRESETS = {
    "laptop": Config(),
    "smoke": Config(
        channels=8, groups=4, hidden=16, layers=2, steps=6, batch_size=8, warmup=2,
        preview_every=3, N=5, tolerance=0.1, likelihood=2, n_samples=4, inpaint_N=3,
        classifier_steps=4),
    "ddpmpp": DDPMPP,
    "ncsnpp": replace(  # NCSN++ cont. (VE), the same table
        DDPMPP, sde="ve", fir=True, progressive_input=True, ema=0.999, sampler="pc"),
    **{name: replace(PLANE, dataset=name) for name in POINTS},
    **{name: replace(LINE, dataset=name) for name in (*SERIES, "csv")},
}


# %% 1. Forward process (Sec. 3, App. B, C)


def over(value, x):
    """value: (B,) -> (B, 1, ...), to broadcast over x: (B, ...)."""
    return value.view(-1, *[1] * (x.ndim - 1))


class SDE:
    """dx = f(x, t) dt + g(t) dw for t in [0, T], f linear in x. Source: [SDE] Eq. 5.

    x: (B, ...); t: (B,) of x's dtype. A subclass gives m(t), std(t) of the kernel
    p(x_t | x_0) = N(m x_0, std^2 I), drift and diffusion, the std of the prior, and how
    the network is asked. Sampling ends at the time eps, training at eps_train ([SDE]
    App. C). In score_loss eps is noise; epsilon is the corrector's step.
    """

    T, eps, eps_train, prior_std, device = 1.0, 1e-3, 1e-5, 1.0, "cpu"
    samplers = ("em", "reverse", "ancestral", "pc", "rk45", "rk4")

    def marginal(self, x0, t):
        """Mean (like x0) and std (broadcastable) of x_t given x_0. [SDE] Eq. 29.

        The variance of VE is sigma(t)^2, as in App. C; Eq. 29 has - sigma(0)^2, too.
        """
        return over(self.m(t), x0) * x0, over(self.std(t), x0)

    def to(self, device):
        """Itself, with its noise drawn on the device from now on."""
        self.device = device
        return self

    def prior_sampling(self, shape):
        """Noise to start from: p_T without its memory of the data."""
        return self.prior_std * torch.randn(shape, device=self.device)

    def prior_logp(self, z):
        """log p_T of z: (B, ...) -> (B,) in nats."""
        z, D, variance = z.flatten(1), z[0].numel(), self.prior_std**2
        return -0.5 * (D * math.log(2 * math.pi * variance) + (z**2).sum(1) / variance)

    def time_feature(self, t):
        """How the network is told t: as the steps of [DDPM]."""
        return 999 * t

    def scaling(self, t, sigma_data):
        """c_in, c_skip, c_out, (B,), of eps_hat = c_skip x + c_out model(c_in x, t)."""
        return torch.ones_like(t), torch.zeros_like(t), torch.ones_like(t)


class VESDE(SDE):
    """Variance exploding, the limit of SMLD: [SDE] Eq. 9, with sigma(t) of App. C."""

    eps = 1e-5

    def __init__(self, sigma_min=0.01, sigma_max=50.0):
        if sigma_min >= sigma_max:
            raise Mistake(
                f"sigma_min {sigma_min}: must be below --sigma_max {sigma_max}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.prior_std = sigma_max

    def std(self, t):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t  # [SDE] App. C

    def m(self, t):
        return torch.ones_like(t)

    def sde(self, x, t):
        """Drift (like x) and diffusion (broadcastable)."""
        g = self.std(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))
        return torch.zeros_like(x), over(g, x)  # [SDE] Eq. 9: g^2 = d sigma^2 / dt

    def time_feature(self, t):
        """How the network is told t: as ln sigma."""
        return self.std(t).log()

    def scaling(self, t, sigma_data):
        """Input of std 1; the network corrects the eps_hat of N(0, sigma_data^2) data.

        Source: Karras et al., arXiv 2206.00364, Tab. 1, in terms of eps.
        """
        sigma = self.std(t)
        size2 = sigma**2 + sigma_data**2
        return 1 / size2.sqrt(), sigma / size2, sigma_data / size2.sqrt()

    def ancestral_variance(self, s, t):
        """Variance of the noise of an ancestral step from t to s. [SDE] Eq. 47."""
        _, variance = transition(self, s, t)
        return variance * (self.sigma_max / self.sigma_min) ** (2 * (s - t))


class VPSDE(SDE):
    """Variance preserving, the limit of DDPM (Eq. 10): [SDE] Eq. 11, variance Eq. 26.

    kind "linear": beta(t) from beta_min to beta_max ([SDE] C). kind "cosine": that of
    the cosine schedule (arXiv 2102.09672, Eq. 17), capped where it runs to infinity.
    """

    def __init__(self, beta_min=0.1, beta_max=20.0, kind="linear", cap=100.0):
        if kind not in ("linear", "cosine"):
            raise Mistake(f"beta {kind}: must be one of linear, cosine")
        if beta_min >= beta_max:
            raise Mistake(
                f"beta_min {beta_min}: must be below --beta_max {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max
        self.kind, self.cap = kind, cap
        # the cosine beta reaches its cap at this t
        self.t_cap = 1.008 * math.atan(cap * 1.008 / math.pi) * 2 / math.pi - 0.008

    def beta(self, t):
        if self.kind == "linear":
            return self.beta_min + t * (self.beta_max - self.beta_min)
        u = (t.clamp(max=self.t_cap) + 0.008) / 1.008 * math.pi / 2
        return math.pi / 1.008 * u.tan()

    def B(self, t):
        """The integral of beta from 0 to t."""
        if self.kind == "linear":
            return self.beta_min * t + 0.5 * t**2 * (self.beta_max - self.beta_min)
        start = 0.008 / 1.008 * math.pi / 2
        move = t.clamp(max=self.t_cap) / 1.008 * math.pi / 2
        # -2 log(cos(start + move) / cos(start)), which keeps its digits at small t
        fall = 2 * torch.sin(start + move / 2) * torch.sin(move / 2) / math.cos(start)
        return -2 * torch.log1p(-fall) + self.cap * (t - self.t_cap).clamp(min=0)

    def m(self, t):
        return torch.exp(-0.5 * self.B(t))  # [SDE] Eq. 29

    def std(self, t):
        return (-torch.expm1(-self.B(t))).sqrt()  # [SDE] Eq. 29; expm1: t near 0

    def diffusion2(self, t):
        return self.beta(t)  # [SDE] Eq. 11: g^2

    def sde(self, x, t):
        """Drift (like x) and diffusion (broadcastable)."""
        drift = -0.5 * over(self.beta(t), x) * x
        return drift, over(self.diffusion2(t), x).sqrt()

    def ancestral_variance(self, s, t):
        """Variance of the noise of an ancestral step from t to s: [SDE] Eq. 4."""
        return transition(self, s, t)[1]


class SubVPSDE(VPSDE):
    """The drift of VP, and never more variance: [SDE] Eq. 12, variance Eq. 28."""

    samplers = ("em", "reverse", "pc", "rk45", "rk4")

    def std(self, t):
        return -torch.expm1(-self.B(t))  # [SDE] Eq. 29

    def diffusion2(self, t):
        return self.beta(t) * -torch.expm1(-2 * self.B(t))  # [SDE] Eq. 12: g^2

    def ancestral_variance(self, s, t):
        raise Mistake("sampler ancestral: is for VESDE and VPSDE, must be one of "
                      f"{', '.join(self.samplers)}")


@cache  # a corrector asks again, and every batch walks the same grid
def transition(sde, s, t):
    """(a, variance) of x_t = a x_s + sqrt(variance) z, floats, s < t.

    VE: a = 1, variance sigma_t^2 - sigma_s^2 ([SDE] Eq. 8). VP: [SDE] Eq. 10 with the
    exact beta_i = 1 - exp(B(s) - B(t)), B the integral of beta. Sub-VP: VP's a.
    """
    s, t = (torch.tensor(u, dtype=torch.float64) for u in (s, t))
    a = sde.m(t) / sde.m(s)
    return a.item(), (sde.std(t) ** 2 - a**2 * sde.std(s) ** 2).item()


def make_sdes(cfg):
    """The three SDEs with the constants of cfg, by their names in cfg.sde."""
    beta = cfg.beta_min, cfg.beta_max, cfg.beta
    return {"ve": VESDE(cfg.sigma_min, cfg.sigma_max), "vp": VPSDE(*beta),
            "subvp": SubVPSDE(*beta)}


def make_sde(cfg):
    """The SDE that cfg names."""
    return make_sdes(cfg)[cfg.sde]


# %% 2. Training objective (Sec. 3.3)


def network_eps(model, sde, xt, t):
    """The network's eps_hat(x_t, t), like xt; model.sigma_data: the std of the data."""
    sigma_data = getattr(model, "sigma_data", 0.5)  # a plain function has none
    c_in, c_skip, c_out = (over(c, xt) for c in sde.scaling(t, sigma_data))
    return c_skip * xt + c_out * model(c_in * xt, sde.time_feature(t))


def score_fn(model, sde, std_floor=1e-5, clip_x0=False):
    """score(x, t), the gradient of log p_t, from a network that predicts eps.

    clip_x0: x0_hat = (x - std eps_hat) / m is clamped to [-1, 1] and put back.
    """
    def score(x, t):
        m, std = over(sde.m(t), x), over(sde.std(t), x).clamp(min=std_floor)
        eps_hat = network_eps(model, sde, x, t)
        if clip_x0:
            x0_hat = ((x - std * eps_hat) / m).clamp(-1, 1)
            return (m * x0_hat - x) / std**2
        return -eps_hat / std

    return score


def draw_times(sde, n, weighting="simple"):
    """(n,) times of a batch, and the factor of the loss that makes up for their share.

    "simple": uniform in [eps_train, T]. "likelihood": with density proportional to
    g^2 / std^2, the weight of eps_hat's error, like 1 / t near 0 (VE: constant): it is
    drawn, not multiplied, and the loss keeps a small variance (arXiv 2101.09258).
    "logit_normal": more of the middle t, which decide what a sample shows: the logit of
    t / T is N(-0.2, 1), after arXiv 2403.03206, Sec. 3.1; one draw from each of its n
    quantiles, so that batches differ less. One t in sixteen is uniform all the same:
    small t, rare here, weigh most in the likelihood. The factor stays 1.
    """
    u = torch.rand(n)
    if weighting == "logit_normal":
        share = torch.sigmoid(torch.special.ndtri((torch.arange(n) + u) / n) - 0.2)
        share = torch.where(torch.rand(n) < 1 / 16, torch.rand(n), share)
        return sde.eps_train + (sde.T - sde.eps_train) * share, 1.0
    if weighting == "simple":
        return sde.eps_train + (sde.T - sde.eps_train) * u, 1.0
    grid = torch.logspace(math.log10(sde.eps_train), math.log10(sde.T), 2001,
                          dtype=torch.float64)
    weight = (sde.sde(grid, grid)[1] / sde.std(grid)) ** 2
    area = F.pad(torch.cumulative_trapezoid(weight, grid), (1, 0))
    t = np.interp(u.numpy() * area[-1].item(), area, grid)
    return torch.from_numpy(t).float(), area[-1].item() / (sde.T - sde.eps_train)


def score_loss(model, sde, x0, weighting="simple", t=None, eps=None):
    """Denoising score matching. x0: (B, ...) -> scalar. Source: [SDE] Eq. 7.

    With lambda(t) = std^2 the weighted error std^2 |score + eps/std|^2 is |eps_hat -
    eps|^2. "simple" divides it by c_out^2, the scale of the network's output: one for
    VP; without it VE's network would hardly be trained at large sigma (arXiv
    2206.00364, Eq. 8). "likelihood": lambda = g^2 (arXiv 2101.09258). "logit_normal" is
    "simple" with other times, see draw_times.
    t: (B,) in (0, T] and eps, like x0, are drawn unless they are given.
    """
    if t is None:
        t, factor = draw_times(sde, len(x0), weighting)
        t = t.to(x0)
    elif weighting == "likelihood":
        factor = (over(sde.sde(t, t)[1] / sde.std(t), x0)) ** 2
    else:
        factor = 1.0
    if eps is None:
        eps = torch.randn_like(x0)
    mean, std = sde.marginal(x0, t)
    error = network_eps(model, sde, mean + std * eps, t) - eps
    if weighting != "likelihood":
        _, _, c_out = sde.scaling(t, getattr(model, "sigma_data", 0.5))
        error = error / over(c_out, x0)
    return (factor * error**2).mean()  # [SDE] Eq. 7


# %% 3a. Samplers of the reverse SDE (Sec. 4.1, 4.2)


def at(t, x):
    """The float t as a tensor (B,) of x's kind."""
    return torch.full((len(x),), t, dtype=x.dtype, device=x.device)


def tweedie(score, sde, x, t):
    """E[x_0 | x_t = x], noise-free ([SDE] App. G). t: float -> like x."""
    t = at(t, x)
    return (x + over(sde.std(t), x) ** 2 * score(x, t)) / over(sde.m(t), x)


def em_step(score, sde, x, t, s):
    """Euler-Maruyama on the reverse SDE, from t down to s. Source: [SDE] Eq. 6."""
    drift, g = sde.sde(x, at(t, x))
    x_mean = x - (drift - g**2 * score(x, at(t, x))) * (t - s)
    return x_mean, g * math.sqrt(t - s)


def reverse_diffusion_step(score, sde, x, t, s):
    """The transition x_s -> x_t, backwards: [SDE] Eq. 46; Alg. 2, 3, lines 3 to 5."""
    a, variance = transition(sde, s, t)
    x_mean = (2 - a) * x + variance * score(x, at(t, x))  # x - f, f = (a - 1) x
    return x_mean, math.sqrt(variance)


def ancestral_step(score, sde, x, t, s):
    """The ancestral step of DDPM (VP, [SDE] Eq. 4) and of SMLD (VE, Eq. 47)."""
    a, variance = transition(sde, s, t)
    x_mean = (x + variance * score(x, at(t, x))) / a  # VP: a = sqrt(1 - beta), VE: 1
    return x_mean, math.sqrt(sde.ancestral_variance(s, t))


def flow_step(score, sde, x, t, s):
    """Probability-flow sampling, no noise: [SDE] Eq. 42; VE 43, VP 44."""
    a, variance = transition(sde, s, t)
    return (2 - a) * x + 0.5 * variance * score(x, at(t, x)), 0.0


def identity_step(score, sde, x, t, s):
    """x as it is, for the corrector alone; last of all Tweedie's mean."""
    return (x if s > sde.eps else tweedie(score, sde, x, t)), 0.0


PREDICTORS = {"em": em_step, "reverse": reverse_diffusion_step, "flow": flow_step,
              "ancestral": ancestral_step, "none": identity_step}


def langevin_step(score, x, t, alpha, snr):
    """One corrector step at t. alpha: 1 (VE), or 1 - beta. [SDE] Alg. 4, 5."""
    z = torch.randn_like(x)  # line 4
    g = score(x, at(t, x))  # line 5
    # means over the batch, as in the authors' code
    z_norm, g_norm = (u.flatten(1).norm(dim=1).mean() for u in (z, g))
    epsilon = 2 * alpha * (snr * z_norm / g_norm) ** 2  # line 6, App. G
    return x + epsilon * g + (2 * epsilon).sqrt() * z  # line 7


@torch.no_grad()
def sde_process(predictor, score, sde, xT, steps, denoise=True, corrector_steps=0,
                snr=0.16, constrain=None):
    """From noise xT: (B, ...), yields (t, x_t) on the way from T to eps. [SDE] Alg. 1.

    predictor(score, sde, x, t, s) gives the mean of x_s and the std of its noise;
    corrector_steps steps of the corrector come before it, with the signal-to-noise
    ratio r = snr ([SDE] Alg. 2: VE, 3: VP). constrain(x, t) makes each new state a
    wanted one: imputation.

    denoise: the last step's mean is the sample, (0, x_0). Its noise is larger than that
    of x_eps as soon as the steps are few, so that [SDE] App. G's Tweedie formula, which
    takes away the noise of x_eps, would leave most of it.
    """
    constrain = constrain or (lambda x, t: x)
    x, ts = constrain(xT, sde.T), np.linspace(sde.T, sde.eps, steps + 1).tolist()
    for t, s in zip(ts[:-1], ts[1:], strict=True):
        yield t, x
        alpha = transition(sde, s, t)[0] ** 2  # 1 for VE, else 1 - beta of this step
        for _ in range(corrector_steps):  # before the predictor: departure 2
            x = constrain(langevin_step(score, x, t, alpha, snr), t)
        x_mean, std = predictor(score, sde, x, t, s)
        x = constrain(x_mean + std * torch.randn_like(x), s)
    yield (0.0, constrain(x_mean, 0.0)) if denoise else (sde.eps, x)


def sample(predictor, score, sde, shape, steps, denoise=True, xT=None, **how):
    """The x that sde_process ends with, of this shape; xT is drawn when None."""
    xT = sde.prior_sampling(shape) if xT is None else xT
    return last(sde_process(predictor, score, sde, xT, steps, denoise, **how))


def last(states):
    """The last x of a sampler's (t, x)."""
    for _, x in states:
        pass
    return x


def euler_maruyama(score, sde, shape, steps, **how):
    """The reverse SDE ([SDE] Eq. 6) by Euler-Maruyama; how: see `sde_process`."""
    return sample(em_step, score, sde, shape, steps, **how)


def reverse_diffusion(score, sde, shape, steps, **how):
    """Reverse diffusion sampling ([SDE] App. E); how: see `sde_process`."""
    return sample(reverse_diffusion_step, score, sde, shape, steps, **how)


def ancestral_sampling(score, sde, shape, steps, **how):
    """Ancestral sampling ([SDE] App. F) for VE and VP; how: see `sde_process`."""
    return sample(ancestral_step, score, sde, shape, steps, **how)


def predictor_corrector(score, sde, shape, steps, snr=0.16, corrector_steps=1,
                        predictor=reverse_diffusion_step, **how):
    """Corrector and predictor in turn ([SDE] Alg. 1); how: see `sde_process`.

    snr: signal-to-noise ratio r of the corrector.
    """
    return sample(predictor, score, sde, shape, steps, snr=snr,
                  corrector_steps=corrector_steps, **how)


# %% 3b. The probability-flow ODE: sampling, codes, likelihood (Sec. 4.3, App. D)


def solve(velocity, state, t, s, tolerance):
    """d state/dt = velocity(state, t) by scipy's adaptive RK45: yields (t, state) to s.

    state: a tuple of tensors; velocity returns such a tuple. tolerance: both relative
    and absolute. Raises FloatingPointError if the solver fails.
    """
    from scipy.integrate import RK45

    sizes = [part.numel() for part in state]

    def pack(parts):
        flat = [part.detach().cpu().double().ravel() for part in parts]
        return torch.cat(flat).numpy()

    def unpack(flat):
        return tuple(part.to(like.dtype).to(like.device).view_as(like) for part, like
                     in zip(torch.from_numpy(flat).split(sizes), state, strict=True))

    def slope(u, flat):
        u = min(max(u, min(t, s)), max(t, s))  # scipy 1.11 evaluates beyond the ends
        found = pack(velocity(unpack(flat), float(u)))
        if not np.isfinite(found).all():  # the solver would never end
            raise FloatingPointError(f"the ODE solver stopped at t = {u:g}: nan or inf")
        return found

    solver = RK45(slope, t, pack(state), s, rtol=tolerance, atol=tolerance)
    yield t, state
    while solver.status == "running":
        failure = solver.step()
        yield solver.t, unpack(solver.y)
    if solver.status == "failed":
        reason = f"the ODE solver stopped at t = {solver.t:g}: {failure}"
        raise FloatingPointError(reason)


def flow_drift(score, sde, x, t):
    """dx/dt of the probability-flow ODE; t: float. Source: [SDE] Eq. 13."""
    drift, g = sde.sde(x, at(t, x))
    return drift - 0.5 * g**2 * score(x, at(t, x))


def rk4_step(score, sde, x, t, s):
    """x carried by the ODE from t to s, by one classical Runge-Kutta step."""
    h = s - t
    k1 = flow_drift(score, sde, x, t)
    k2 = flow_drift(score, sde, x + h / 2 * k1, t + h / 2)
    k3 = flow_drift(score, sde, x + h / 2 * k2, t + h / 2)
    k4 = flow_drift(score, sde, x + h * k3, s)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@torch.no_grad()
def ode_process(score, sde, x, t, s, method="rk45", steps=100, tolerance=1e-5):
    """x: (B, ...) carried by the ODE from t to s, yields (t, x_t). [SDE] App. D.4.

    method: "rk45", adaptive to the tolerance, or "rk4", in steps of four network calls.
    """
    if method == "rk4":
        ts = np.linspace(t, s, steps + 1).tolist()
        for u, v in zip(ts[:-1], ts[1:], strict=True):
            yield u, x
            x = rk4_step(score, sde, x, u, v)
        yield s, x
    else:
        def velocity(state, u):
            return (flow_drift(score, sde, state[0], u),)
        for u, state in solve(velocity, (x,), t, s, tolerance):
            yield u, state[0]


@torch.no_grad()
def probability_flow_ode(score, sde, shape, method="rk45", steps=100, tolerance=1e-5,
                         denoise=True, xT=None):
    """Noise carried to data by the ODE with the SDE's marginals; xT drawn when None."""
    x = sde.prior_sampling(shape) if xT is None else xT
    x = ode_decode(score, sde, x, method, steps, tolerance)
    return tweedie(score, sde, x, sde.eps) if denoise else x


def ode_decode(score, sde, z, method="rk45", steps=100, tolerance=1e-5, eps=None):
    """A code z = x_T: (B, ...) carried to x_eps. Source: [SDE] App. D.4."""
    eps = sde.eps if eps is None else eps
    return last(ode_process(score, sde, z, sde.T, eps, method, steps, tolerance))


def ode_encode(score, sde, x, method="rk45", steps=100, tolerance=1e-5, eps=None):
    """The code x_T of x: (B, ...), taken as x_eps. Source: [SDE] App. D.4."""
    eps = sde.eps if eps is None else eps
    return last(ode_process(score, sde, x, eps, sde.T, method, steps, tolerance))


def slerp(a, b, share):
    """Spherical interpolation, a (share 0) to b (share 1): (B, ...). [DDIM] App. D.5"""
    theta = torch.acos(F.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1))
    theta = theta.clamp(min=1e-4)  # between parallel vectors a line, the limit
    theta = theta.view(-1, *[1] * (a.ndim - 1))
    return (((1 - share) * theta).sin() * a + (share * theta).sin() * b) / theta.sin()


def log_likelihood(score, sde, x, trace="exact", probe="rademacher", tolerance=1e-5,
                   eps=1e-5, prior_logp=None):
    """log p_eps(x) in nats: (B, ...) -> (B,). Source: [SDE] Eq. 39, Sec. 4.3, App. D.2.

    trace: "exact", for points (one backward pass per dimension), or "hutchinson" ([SDE]
    Eq. 40: one, with a rademacher or gaussian probe, the same along the trajectory).
    prior_logp: log p_T where it is known better than sde.prior_logp.
    """
    x = x.detach()
    v = torch.randn_like(x) if probe == "gaussian" else torch.randint_like(x, 2) * 2 - 1

    @torch.enable_grad()
    def velocity(state, t):
        x = state[0].requires_grad_()
        drift = flow_drift(score, sde, x, t)
        if trace == "hutchinson":
            vJ = torch.autograd.grad(drift, x, v)[0]
            return drift, (vJ * v).flatten(1).sum(1)  # [SDE] Eq. 40: v^T J v
        flat, divergence = drift.flatten(1), 0
        for i in range(flat.shape[1]):
            row = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0]
            divergence = divergence + row.flatten(1)[:, i]
        return drift, divergence

    z, change = last(solve(velocity, (x, x.new_zeros(len(x))), eps, sde.T, tolerance))
    return (prior_logp or sde.prior_logp)(z) + change  # [SDE] Eq. 39


def dequantize(x):
    """8-bit x = k / 127.5 - 1 spread over its bin: (k + u) / 128 - 1, u in [0, 1)."""
    k = (x + 1) * 127.5
    return (k + torch.rand_like(x)) / 128 - 1


def bits_per_dim(score, sde, x, **how):
    """Bits/dim of 8-bit images x: (B, C, H, W) -> (B,), by one uniform dequantization.

    In expectation an upper bound of -log_2 of their probability; the trace is estimated
    ([SDE] Eq. 40). A bin is 2/256 wide, hence the 7 (code). how: see log_likelihood.
    ValueError for x that are not 8-bit images in [-1, 1].
    """
    if not is_8bit(x):
        raise ValueError("bits/dim needs 8-bit images scaled to [-1, 1]")
    logp = log_likelihood(score, sde, dequantize(x), trace="hutchinson", **how)
    return -logp / (x[0].numel() * math.log(2)) + 7


def is_8bit(x):
    """Whether x: (B, C, H, W) holds 8-bit pixels scaled to [-1, 1]."""
    pixels = (x + 1) * 127.5
    return x.ndim == 4 and bool(((pixels - pixels.round()).abs() < 1e-3).all())


# %% 3c. Controllable generation (Sec. 5, App. I)


def imputation(sde, known, mask, basis=None):
    """constrain(x, t) for sde_process: what is known of x_t is its own noised self.

    known: like x; mask: bool, broadcastable to it, True where known. basis: (C, C), its
    orthonormal rows make the channels in which mask counts. Source: [SDE] App. I.2.
    """
    def turn(x, basis):
        return x if basis is None else torch.einsum("dc,bc...->bd...", basis, x)

    known, back = turn(known, basis), None if basis is None else basis.mT

    def constrain(x, t):
        noised = known
        if t > 0:  # at 0 it is clean, though VE's sigma(0) is not 0
            mean, std = sde.marginal(known, at(t, x))
            noised = mean + std * torch.randn_like(x)
        return turn(torch.where(mask, noised, turn(x, basis)), back)

    return constrain


def inpaint(score, sde, known, mask, steps, predictor=reverse_diffusion_step, **how):
    """Completions of known: (B, ...), where mask is False. Source: [SDE] App. I.2.

    mask: bool, broadcastable to known. how: see sde_process. An approximation: a step
    sees one noised draw of the known; corrector steps bring it nearer.
    """
    return sample(predictor, score, sde, known.shape, steps,
                  constrain=imputation(sde, known, mask), **how)


def colorize(score, sde, grey, steps, predictor=reverse_diffusion_step, **how):
    """Colourings of grey, the mean of three channels: (B, 1, H, W) -> (B, 3, H, W).

    Turned into an orthonormal basis that begins with (1, 1, 1) / sqrt(3), what is known
    is one channel of three. how: see sde_process. Source: [SDE] App. I.3.
    """
    if grey.shape[1] != 1:
        raise ValueError(f"grey: must have one channel, the mean, not {grey.shape[1]}")
    columns = torch.tensor([[1.0, 1, 0], [1, 0, 1], [1, 0, 0]])  # of QR: first is first
    basis = torch.linalg.qr(columns).Q.mT.to(grey)
    known = grey.expand(-1, 3, -1, -1)
    mask = torch.tensor([True, False, False], device=grey.device).view(3, 1, 1)
    constrain = imputation(sde, known, mask, basis)
    return sample(predictor, score, sde, known.shape, steps, constrain=constrain, **how)


def conditional_score(score, classifier, y):
    """score(x, t) of p_t(x | y), for every sampler and the ODE. [SDE] Eq. 14, App. I.1.

    classifier(x, t): the logits of p_t(y | x), (B, classes); y: (B,) int64.
    """
    def guided(x, t):
        with torch.enable_grad():
            x_in = x.detach().requires_grad_()
            log_p = classifier(x_in, t).log_softmax(1).gather(1, y[:, None]).sum()
            gradient = torch.autograd.grad(log_p, x_in)[0]
        return score(x, t) + gradient

    return guided


# %% 4. Networks (App. H)


def timestep_embedding(t, dim):
    """Sines, then cosines of t, as in [DDPM]'s code: (B,) -> (B, dim).

    After arXiv 1706.03762, Sec. 3.5, which takes them in turn.
    """
    k, last = torch.arange(dim // 2, device=t.device), dim // 2 - 1
    frequencies = torch.exp(-math.log(10000) * k / last)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class FourierFeatures(nn.Module):
    """Random Fourier features, scale 16: (B,) -> (B, 2 * dim). [SDE] App. H.2."""

    def __init__(self, dim, scale=16.0):
        super().__init__()
        self.register_buffer("W", torch.randn(dim) * scale)

    def forward(self, t):
        angles = 2 * math.pi * t[:, None].to(self.W.dtype) * self.W
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


def fir_filter(x):
    """Blur by the filter (1, 3, 3, 1) both ways. (B, C, H, W) -> (B, C, H + 1, W + 1).

    Source: [SDE] App. H.1, item 1, after StyleGAN-2, arXiv 1912.04958.
    """
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    kernel = (taps[:, None] * taps[None, :]).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (2, 2, 2, 2)), kernel, groups=x.shape[1])


def shrink(x, fir=False):
    """Half the resolution without weights: by averages, or by the FIR filter."""
    return fir_filter(x)[:, :, 1::2, 1::2] if fir else F.avg_pool2d(x, 2)


def grow(x, fir=False):
    """Twice the resolution without weights: by copies, or by the FIR filter."""
    if not fir:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    B, C, H, W = x.shape
    spread = x.new_zeros(B, C, H, 2, W, 2)  # each pixel followed by zeros
    spread[:, :, :, 0, :, 0] = x
    return 4 * fir_filter(spread.view(B, C, 2 * H, 2 * W))[:, :, :-1, :-1]


class FirDownsample(nn.Module):
    """A stride of 2 behind the FIR filter: (B, c_in, H, W) -> (B, c_out, H/2, W/2)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride=2)  # the filter's edge pads

    def forward(self, x):
        return self.conv(fir_filter(x))


class FirUpsample(Upsample):
    """Upsample with the FIR filter in place of copies."""

    def forward(self, x):
        return self.conv(grow(self.narrow(x), fir=True))


class ResampleBlock(ResBlock):
    """A ResBlock that resamples inside, as BigGAN's. Source: [SDE] App. H.1."""

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
    """A U-Net for network_eps. x: (B, C, H, W), t: (B,), 999 t or ln sigma -> like x.

    H and W are multiples of patch * 2^(levels - 1). attention: the resolutions, after
    patching, where it follows each block on the way down, and the last on the way up.
    fourier: random Fourier features of t (VE). fir, skip_rescale, biggan and
    progressive_input are the options of NCSN++ (all, and fourier) and DDPM++
    (skip_rescale, biggan). Source: [SDE] App. H.
    """

    def __init__(self, image_channels=3, image_size=32, channels=128,
                 mults=(1, 2, 2, 2), blocks=4, attention=(16,), heads=1, groups=32,
                 dropout=0.1, patch=1, fourier=False, fir=False, skip_rescale=False,
                 biggan=False, progressive_input=False):
        super().__init__()
        check_sizes(image_size, channels, mults, attention, heads, groups, patch)
        self.channels, self.patch, self.fir = channels, patch, fir
        self.rescale = math.sqrt(0.5) if skip_rescale else 1.0
        self.register_buffer("sigma_data", torch.tensor(0.5))
        time_dim, image_channels = 4 * channels, image_channels * patch**2
        self.features = FourierFeatures(channels) if fourier else None
        self.time = nn.Sequential(nn.Linear(channels * (2 if fourier else 1), time_dim),
                                  nn.SiLU(), nn.Linear(time_dim, time_dim))

        def stage(c_in, c_out, attends):
            block = ResBlock(c_in, c_out, time_dim, groups, dropout)
            attend = [Attention(c_out, heads, groups)] if attends else []
            return nn.ModuleList([block, *attend])

        def resampler(c_in, c_out, resample):
            if biggan:
                return ResampleBlock(c_in, c_out, time_dim, groups, dropout,
                                     resample, fir)
            if resample is shrink:
                return FirDownsample(c_in, c_out) if fir else Downsample(c_in)
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
                    self.pyramid.append(FirDownsample(c_pyramid, c) if fir else
                                        nn.Conv2d(c_pyramid, c, 3, 2, padding=1))
                    c_pyramid = c
                skips.append(c)
                size //= 2

        self.mid = nn.ModuleList([stage(c, c, True), stage(c, c, False)])

        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for i in range(blocks + 1):
                attends = size in attention and i == blocks
                self.up.append(stage(c + skips.pop(), channels * mult, attends))
                c = channels * mult
            if level > 0:
                # a patched network narrows before it doubles the resolution: cheaper
                c_up = channels * mults[level - 1] if patch > 1 else c
                self.up.append(resampler(c, c_up, grow))
                c, size = c_up, size * 2
        self.norm_out = nn.GroupNorm(groups, c)
        self.conv_out = zero_init(nn.Conv2d(c, image_channels, 3, padding=1))

    def apply_stage(self, stage, h, emb):
        """A block and its attention, each sum times 1/sqrt(2) with skip_rescale."""
        block, *attention = stage
        h = block(h, emb) * self.rescale
        for attend in attention:
            h = attend(h) * self.rescale
        return h

    def change_size(self, module, h, emb):
        """A resampling module, with the time where it is a block."""
        if isinstance(module, ResampleBlock):
            return module(h, emb) * self.rescale
        return module(h)

    def forward(self, x, t):
        features = self.features
        emb = timestep_embedding(t, self.channels) if features is None else features(t)
        emb = self.time(emb.to(x.dtype))
        pyramid = F.pixel_unshuffle(x, self.patch)
        h, pyramid_convs = self.conv_in(pyramid), iter(self.pyramid)
        skips = [h]
        for module in self.down:
            if isinstance(module, nn.ModuleList):
                h = self.apply_stage(module, h, emb)
            else:
                h = self.change_size(module, h, emb)
                if self.pyramid:  # the input itself, shrunken, joins at every level
                    pyramid = next(pyramid_convs)(pyramid)
                    h = (pyramid + h) * self.rescale
                    pyramid = h
            skips.append(h)
        for module in self.mid:
            h = self.apply_stage(module, h, emb)
        for module in self.up:
            if isinstance(module, nn.ModuleList):
                h = self.apply_stage(module, torch.cat([h, skips.pop()], dim=1), emb)
            else:
                h = self.change_size(module, h, emb)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


class ScoreMLP(nn.Module):
    """An MLP for network_eps. x: (B, dim), t: (B,), 999 t or ln sigma -> like x."""

    def __init__(self, dim=2, hidden=128, layers=4, fourier=False):
        super().__init__()
        self.register_buffer("sigma_data", torch.tensor(0.5))
        self.features = FourierFeatures(32) if fourier else None
        self.time = nn.Linear(64, hidden)
        self.lift = nn.Linear(dim, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden)) for _ in range(layers))
        self.out = zero_init(nn.Linear(hidden, dim))

    def forward(self, x, t):
        features = self.features
        emb = timestep_embedding(t, 64) if features is None else features(t)
        emb, h = self.time(emb.to(x.dtype)), self.lift(x)
        for block in self.blocks:
            h = h + block(h + emb)
        return self.out(F.silu(h))


class DilatedBlock(nn.Module):
    """A dilated and a plain convolution, and the time. (B, C, 1, L) -> the same."""

    recompute = True  # activations, in the backward pass (--grad_checkpointing)

    def __init__(self, channels, dilation, time_dim):
        super().__init__()
        self.time = nn.Linear(time_dim, channels)
        self.conv1 = nn.Conv2d(channels, channels, (1, 3), padding=(0, dilation),
                               dilation=(1, dilation))
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x, emb):
        h = self.conv1(F.silu(x + self.time(emb)[:, :, None, None]))
        return x + self.conv2(F.silu(h))


class SeriesNet(nn.Module):
    """Convolutions for network_eps. x: (B, 1, L), any L, t: (B,) -> like x.

    They are of dilation 1, 2, ..., 64, 1, ... as in WaveNet, arXiv 1609.03499, but
    looking both ways; over pictures one pixel high, which CPUs are faster at. offset,
    unit: what undoes the scaling of the data it was trained on.
    """

    def __init__(self, channels=48, layers=8, fourier=False):
        super().__init__()
        self.register_buffer("sigma_data", torch.tensor(0.5))
        self.register_buffer("offset", torch.tensor(0.0))
        self.register_buffer("unit", torch.tensor(1.0))
        self.features = FourierFeatures(32) if fourier else None
        self.time = nn.Sequential(nn.Linear(64, channels), nn.SiLU())
        self.lift = nn.Conv2d(1, channels, (1, 3), padding=(0, 1))
        self.blocks = nn.ModuleList(
            DilatedBlock(channels, 2 ** (i % 7), channels) for i in range(layers))
        self.out = zero_init(nn.Conv2d(channels, 1, 1))

    def forward(self, x, t):
        features = self.features
        emb = timestep_embedding(t, 64) if features is None else features(t)
        emb, h = self.time(emb.to(x.dtype)), self.lift(x[:, :, None])
        for block in self.blocks:
            h = block(h, emb)
        return self.out(F.silu(h))[:, :, 0]


class NoisyClassifier(nn.Module):
    """Logits of p(y | x_t). x: (B, C, H, W), t: (B,) -> (B, classes).

    A small downsampling half of the U-Net; that of [ADM] Sec. 4.3 pools by attention.
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
        emb = self.time(timestep_embedding(t, self.channels).to(x.dtype))
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        h = self.down(self.block1(h, emb))
        h = self.block3(self.attention(self.block2(h, emb)), emb)
        h = F.silu(self.norm_out(h))
        H, W = (max(2, size) for size in h.shape[2:])
        h = F.interpolate(h, (H, W))  # a 4 x 4 image has shrunk to one pixel
        # average to 2 x 2, with windows that MPS supports for odd sizes
        h = F.avg_pool2d(h, ((H + 1) // 2, (W + 1) // 2), (H // 2, W // 2))
        return self.out(h.flatten(1))


def make_network(cfg, shape):
    """The network of cfg, for images (C, H, W), series (1, L) or points (dim,)."""
    fourier = cfg.sde == "ve"
    if len(shape) == 1:
        return ScoreMLP(shape[0], cfg.hidden, cfg.layers, fourier)
    if len(shape) == 2:
        return SeriesNet(cfg.hidden, cfg.layers, fourier)
    return UNet(shape[0], shape[1], cfg.channels, cfg.mults, cfg.blocks, cfg.attention,
                cfg.heads, cfg.groups, cfg.dropout, cfg.patch, fourier, cfg.fir,
                cfg.skip_rescale, cfg.biggan, cfg.progressive_input)


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
    """Train on data.train; returns the averaged network in eval mode. [SDE] Eq. 7."""
    sde = make_sde(cfg)
    model = run.place(make_network(cfg, data.shape))
    model.sigma_data.fill_(data.train.std())
    if len(data.shape) == 2:  # what undoes the scaling belongs to the network
        model.offset.fill_(data.offset)
        model.unit.fill_(data.unit)
    ema = EMA(model, cfg.ema)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, weight_decay=cfg.weight_decay,
        fused=run.device.type != "mps")  # one kernel for all weights
    images = len(data.shape) == 3

    # run.steps: progress bar, checkpoints, resume, Ctrl-C (common/run.py)
    for step in run.steps(cfg.steps, model=model, ema=ema.model, optimizer=optimizer):
        set_learning_rate(optimizer, cfg, step)
        x0, _ = run.batch(data.train)
        if cfg.dequantize and images:
            x0 = dequantize(x0)
        with run.autocast():
            # [SDE] Eq. 7; draws t and eps
            loss = score_loss(model, sde, x0, cfg.weighting)
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(model)  # over all processes; fp16: drops an overflow
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        ema.update(model, step)
        run.log(loss=loss, grad_norm=norm)
        if run.main and (step + 1) % cfg.preview_every == 0:
            figure_preview(run, ema.model, sde, data, step + 1)
    return ema.model


def train_classifier(cfg, run, sde, data):
    """classifier(x, t), logits of p_t(y | x): trained once, then kept on disk.

    It sees x as the network does, c_in x, and 999 t. Source: [SDE] App. I.1.
    """
    sigma_data = data.train.std()

    def make():
        patch = 2 if data.shape[1] % 2 == 0 else 1
        return run.place(NoisyClassifier(data.shape[0], len(data.classes), patch=patch))

    def logits(network, x, t):
        c_in, _, _ = sde.scaling(t, sigma_data)
        return network(over(c_in, x) * x, 999 * t)

    def fit(network):
        optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.05,
                                      fused=run.device.type != "mps")
        its_cfg = replace(cfg, lr=3e-3, steps=cfg.classifier_steps)
        for step in run.steps(cfg.classifier_steps, "classifier", save=False,
                              classifier=network, optimizer=optimizer):
            set_learning_rate(optimizer, its_cfg, step)
            x0, y = run.batch(data.train, data.train_labels, size=64)
            shift = tuple(torch.randint(-2, 3, (2,)).tolist())
            x0 = torch.roll(x0, shift, dims=(2, 3))  # for [ADM]'s random crops
            t = draw_times(sde, len(x0))[0].to(x0)
            mean, std = sde.marginal(x0, t)
            xt = mean + std * torch.randn_like(x0)
            with run.autocast():
                loss = F.cross_entropy(logits(network, xt, t), y)
            optimizer.zero_grad()
            loss.backward()
            run.average_gradients(network)
            norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            run.log(loss=loss, grad_norm=norm)
        return not run.stopped

    constants = sorted((k, v) for k, v in vars(sde).items() if k != "device")
    key = (data.shape, data.fingerprint(), cfg.sde, constants, cfg.classifier_steps,
           cfg.warmup, cfg.decay, cfg.flip)
    with seeded(2025, run.device):
        network = cached(f"sde_classifier_{data.name}", key, make, fit)
    return partial(logits, network.eval().requires_grad_(False))


# %% 6. Figures and main


@torch.no_grad()
def process(cfg, score, sde, xT, calls=None):
    """The sampler that cfg names, from the noise xT at its temperature: (t, x_t).

    In cfg.N steps, or in about as many calls of the network (rk45: as it needs).
    """
    xT, steps, name = cfg.temperature * xT, calls or cfg.N, cfg.sampler
    if name in ("rk45", "rk4"):
        for t, x in ode_process(score, sde, xT, sde.T, sde.eps, name,
                                max(1, steps // 4), cfg.tolerance):
            yield t, x
        if cfg.denoise:
            yield 0.0, tweedie(score, sde, x, sde.eps)
        return
    corrector_steps = cfg.corrector_steps if name == "pc" else 0
    predictor = PREDICTORS[cfg.predictor if name == "pc" else name]
    if calls:
        steps = max(1, calls // (corrector_steps + (predictor is not identity_step)))
    yield from sde_process(predictor, score, sde, xT, steps, cfg.denoise,
                           corrector_steps, cfg.snr)


def make_methods(cfg, sde):
    """{name: Config} of the samplers compared: Tab. 1, Euler-Maruyama and the ODE."""
    names = {"reverse": "reverse diffusion", "ancestral": "ancestral",
             "flow": "probability flow"}
    if "ancestral" not in sde.samplers:
        del names["ancestral"]
    alone = {"sampler": "pc", "corrector_steps": 0}
    both = {"sampler": "pc", "corrector_steps": 1}
    found = {"Euler–Maruyama": {"sampler": "em"}}
    found |= {word: alone | {"predictor": name} for name, word in names.items()}
    found |= {f"{word}, corrector": both | {"predictor": name}
              for name, word in names.items()}
    found |= {"corrector alone": both | {"predictor": "none"},
              "ODE, RK45": {"sampler": "rk45"}, "ODE, RK4": {"sampler": "rk4"}}
    return {name: replace(cfg, **how) for name, how in found.items()}


@plotting.figure("sdes.png")
def figure_sdes(run, cfg):
    """sdes.png: mean, variance and signal-to-noise ratio of the three SDEs."""
    sdes = make_sdes(cfg)
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    dashes = {"ve": "-", "vp": "-", "subvp": "--"}
    plotting.curves(run.path("sdes.png"), [
        {"lines": {name: (t, sde.m(t), dashes[name]) for name, sde in sdes.items()},
         "xlabel": "t", "title": r"mean: $m(t)\,x_0$"},
        {"lines": {f"_{n}": (t, s.std(t) ** 2, dashes[n]) for n, s in sdes.items()},
         "xlabel": "t", "yscale": "log", "ylim": (1e-4, None), "title": "variance"},
        {"lines": {f"_{n}": (t, 2 * (s.m(t) / s.std(t)).log(), dashes[n])
                   for n, s in sdes.items()},
         "xlabel": "t", "ylim": (-12, 12),
         "title": r"signal to noise, $\log\,m^2 / std^2$"}])


@plotting.figure("loss.png")
def figure_loss(run, model, sde, data):
    """loss.png: the training loss, and the held-out loss by t."""
    x0 = data.test[:200]

    def loss(low, high):
        t = low + (high - low) * torch.rand(len(x0), device=x0.device)
        return score_loss(model, sde, x0, t=t.clamp(min=sde.eps_train)).item()

    edges = [sde.T * i / 10 for i in range(11)]
    plotting.curves(run.path("loss.png"), [
        plotting.loss_curve(run.read_log(), "training loss ([SDE] Eq. 7)"),
        plotting.loss_by_t(loss, edges, "held-out loss by t")])


@plotting.figure("preview.png")
def figure_preview(run, model, sde, data, step):
    """preview.png: x0_hat of held-out x_t at a few t: one network call, no sampling."""
    x0 = data.test[:1000 if len(data.shape) == 1 else 6]
    generator = torch.Generator().manual_seed(0)  # training draws are left alone
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    score, parts = score_fn(model, sde), [("held out", x0)]
    for t in (0.1, 0.3, 0.5, 0.7):
        mean, std = sde.marginal(x0, at(t, x0))
        xt = mean + std * eps
        parts += [(f"x_t, t = {t}", xt), ("x0_hat", tweedie(score, sde, xt, t))]
    title = f"What one network call recovers, step {step}"
    if x0.ndim == 4:
        labels, rows = zip(*parts, strict=True)
        plotting.table(run.path("preview.png"), rows, title, labels)
    else:
        plotting.panels(run.path("preview.png"), parts, title)


def shown(sde, x, t):
    """x_t scaled to the size of the data, so that VE's wide start fits the page."""
    t = torch.tensor(t, dtype=torch.float64)
    return x / math.sqrt(sde.m(t).item() ** 2 + sde.std(t).item() ** 2)


@plotting.figure("denoising.gif")
def figure_denoising(run, score, sde, states):
    """denoising.gif: x_t above x0_hat, on the way from noise to pictures."""
    frames, captions = [], []
    for t, x in plotting.evenly(list(states), 33):
        x0_hat = tweedie(score, sde, x, t) if t else x
        frames.append(torch.cat([shown(sde, x, t), x0_hat]))
        captions.append(f"t = {t:.2f}: x_t above, x0_hat below")
    plotting.gif(run.path("denoising.gif"), frames, 8, captions)


@plotting.figure("samplers.png")
def figure_samplers(run, cfg, model, score, sde, shape, scores):
    """samplers.png: one row a sampler, in about 200 network calls.

    scores: {name: its row of measure_samplers}, empty without --evaluate. RK4 has no
    row: it solves RK45's equation from RK45's noise, so both are one picture.
    """
    xT = sde.prior_sampling((10, *shape))
    rows, labels = [], []
    for name, its_cfg in make_methods(cfg, sde).items():
        if its_cfg.sampler == "rk4":
            continue
        with counted(model) as calls:
            rows.append(last(process(its_cfg, score, sde, xT, min(200, cfg.N))))
        label = f"{name}\n{len(calls)} calls"
        if "legible" in scores.get(name, {}):
            label += f", {scores[name]['legible']:.0%} legible"
        labels.append(label)
    plotting.table(run.path("samplers.png"), rows, "Ten draws by each sampler", labels)


def measure_samplers(run, cfg, model, sde, data, states):
    """{name: scores} of every sampler, kept in metrics.json; table1.png: [SDE] Tab. 1.

    In 200 network calls, RK45 in as many as it needs; also reverse diffusion with the
    corrector by r, and RK45 by its tolerance.
    """
    pc = replace(cfg, sampler="pc", predictor="reverse", corrector_steps=1)
    ode = replace(cfg, sampler="rk45")
    configs = {
        "samplers": make_methods(cfg, sde),
        "r": {r: replace(pc, snr=r) for r in (0.01, 0.04, 0.08, 0.16, 0.32)},
        "tolerance": {tolerance: replace(ode, tolerance=tolerance)
                      for tolerance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)}}
    scores = {}
    for by, compared in configs.items():
        scores[by] = {}
        for name, its_cfg in compared.items():
            draw = partial(states, cfg=its_cfg, calls=200)
            try:
                scores[by][name] = run.quality(draw, model, 200, data)
            except Mistake as problem:  # the other samplers may do better
                run.say(f"{by}, {name}: {problem}")
            run.add_metrics(**{f"evaluation_by_{by}": scores[by]})
    figure_table(run.path("table1.png"), scores)
    return scores["samplers"]


@plotting.figure("table1.png")
def figure_table(path, scores):
    """table1.png: predictors, with and without the corrector; r; RK45's tolerance.

    scores: {"samplers", "r", "tolerance": {name: its scores}}.
    """
    distance = {by: {name: row["frechet_distance"] for name, row in rows.items()}
                for by, rows in scores.items()}
    of, parts = distance["samplers"], []
    both = [name for name in of if "corrector" in name]
    alone = [name.removesuffix(", corrector") for name in both if "," in name]
    for title, names in (("predictor alone", alone), ("with a corrector", both)):
        words = [name.removesuffix(", corrector").replace(" ", "\n") for name in names]
        bars = [of.get(name, math.nan) for name in names]  # one may have diverged
        parts.append({"bars": (words, bars), "title": title,
                      "yscale": "log", "ylim": (1, 3 * max(of.values()))})
    calls = [row["network_calls"] for row in scores["tolerance"].values()]
    least, most = min(scores["tolerance"]), max(scores["tolerance"])
    parts += [
        {"lines": {"_": (list(distance["r"]), list(distance["r"].values()), "o-")},
         "xlabel": "r", "xscale": "log", "ylim": (0, None),
         "title": "reverse diffusion, corrector"},
        {"lines": {"_": (calls, list(distance["tolerance"].values()), "o-")},
         "xlabel": "network calls", "ylim": (0, None),
         "title": f"ODE, RK45, tolerance {most:g} to {least:g}"}]
    parts[0]["ylabel"] = "Fréchet distance in features"
    n = next(iter(scores["r"].values()))["n"]
    plotting.curves(path, parts, f"{n} samples per point")


@plotting.figure("guardrails.png")
def figure_guardrails(run, cfg, model, sde, shape):
    """guardrails.png: few steps, with the noise of the last one, and with no clamp."""
    xT = sde.prior_sampling((10, *shape))
    few, rows, labels = replace(cfg, sampler="em", N=min(20, cfg.N)), [], []
    changes = {"as it is": {}, "last noise kept": {"denoise": False},
               "x0_hat not clamped": {"clip_x0": False}}
    for name, change in changes.items():
        changed = replace(few, **change)
        score = score_fn(model, sde, changed.std_floor, changed.clip_x0)
        with seeded(0, run.device):  # the rows differ in one switch, not in their noise
            x = last(process(changed, score, sde, xT))
        rows.append(x)
        labels.append(f"{name}\nborder std {x[..., :2, :].std():.2f}")
    plotting.table(run.path("guardrails.png"), rows,
                   f"Euler–Maruyama in {few.N} steps, each column one noise", labels)


@plotting.figure("inpainting.png")
def figure_inpainting(run, cfg, score, sde, data, image=None, mask=None):
    """inpainting.png: pictures, what is known of them, three completions, the truth.

    image, mask: a person's own, or None: held-out pictures, masks of several kinds.
    """
    kinds = {"": mask} if mask is not None else make_masks(*data.shape[1:])
    times = 2 if image is None else 1
    names = [name for name in kinds for _ in range(times)]
    x = data.test[:len(names)]
    if image is not None:
        x = image.to(x.device).expand(len(names), -1, -1, -1)
    mask = torch.cat([kinds[name] for name in names[:len(x)]]).to(x.device)
    completed = [complete(cfg, score, sde, x, mask) for _ in range(3)]
    plotting.table(run.path("inpainting.png"),
                   [torch.where(mask, x, torch.zeros_like(x)), *completed, x],
                   "What is known, three completions, the truth (App. I.2)",
                   ["known", "completed", "again", "again",
                    "truth" if image is None else "as given"], names)
    if image is not None:
        for i, pictures in enumerate(completed, 1):
            plotting.picture(run.path(f"completed_{i}.png"), pictures[0])


def complete(cfg, score, sde, x, mask):
    """Completions of x: (B, ...) where mask is False, by the settings of cfg."""
    completed = inpaint(score, sde, x, mask, cfg.inpaint_N, PREDICTORS[cfg.predictor],
                        denoise=cfg.denoise, corrector_steps=cfg.inpaint_corrector,
                        snr=cfg.inpaint_snr)
    return torch.where(mask, x, completed)  # noised where --no-denoise


def measure_completions(run, cfg, score, sde, data):
    """The share of completions of held-out pictures that is legible, by mask."""
    x, found = data.test[:min(100, run.opts.evaluate)], {}
    for name, mask in make_masks(*data.shape[1:]).items():
        completed = complete(cfg, score, sde, x, mask.to(x.device))
        found[name] = quality.glance(completed, data)
    run.add_metrics(completions=found | {"held_out": quality.glance(x, data)})


@plotting.figure("colorization.png")
def figure_colorization(run, cfg, score, sde, data):
    """colorization.png: grey, colourings, the truth; of pictures in colour."""
    x, how = data.test[:8], {
        "predictor": PREDICTORS[cfg.predictor], "denoise": cfg.denoise,
        "corrector_steps": cfg.inpaint_corrector, "snr": cfg.inpaint_snr}
    grey = x.mean(1, keepdim=True)
    drawn = [colorize(score, sde, grey, cfg.inpaint_N, **how) for _ in range(3)]
    plotting.table(run.path("colorization.png"), [grey, *drawn, x],
                   "Grey, three colourings, the truth (App. I.3)",
                   ["grey", "coloured", "again", "again", "truth"])


@plotting.figure("classes.png")
def figure_classes(run, cfg, score, sde, data, classifier):
    """classes.png: the classes asked for, by every sampler with [SDE] Eq. 49."""
    labels = [data.classes.index(c) for c in cfg.classes]
    n = max(run.opts.evaluate or 0, 5 * len(labels))
    rows, names, found = [], [], {}
    y = torch.tensor(labels, device=run.device).repeat(n)[:n]
    for name, its_cfg in make_methods(cfg, sde).items():
        x = torch.cat([
            last(process(its_cfg, conditional_score(score, classifier, part), sde,
                         sde.prior_sampling((len(part), *data.shape)), min(200, cfg.N)))
            for part in y.split(100)])
        found[name] = quality.glance(x, data, y)
        rows.append(x[:len(labels)])
        as_asked = found[name].get("accuracy")
        names.append(name if as_asked is None else
                     f"{name}\n{as_asked:.0%} of {n} as asked")
    plotting.table(run.path("classes.png"), rows, "By class (Eq. 49)", names,
                   [data.classes[c] for c in labels])
    run.add_metrics(classes=found)


@plotting.figure("codes.png")
def figure_codes(run, cfg, score, sde, data):
    """codes.png: pictures through their codes, a walk between codes, temperatures."""
    x = data.test[:8]
    shares = torch.linspace(0, 1, len(x), device=run.device)
    decode = partial(ode_decode, score, sde, tolerance=cfg.tolerance)
    z = ode_encode(score, sde, x, tolerance=cfg.tolerance)
    back = decode(z)
    ends = z[:1].expand_as(x), z[:2][-1:].expand_as(x)
    rows = [x, back, decode(slerp(*ends, over(shares, x)))]
    labels = ["held out", "encoded, decoded", "first to second"]
    noise = sde.prior_sampling(x.shape)
    for temperature in (0.7, 0.9, 1.0):
        rows.append(decode(temperature * noise))
        labels.append(f"temperature {temperature}")
    plotting.table(run.path("codes.png"), rows, "Codes by the ODE (App. D.4)", labels)
    run.add_metrics(code_error=(back - x).pow(2).mean().sqrt().item())


@plotting.figure("scores.png")
def figure_fields(run, score, sde, data):
    """scores.png: the score at four t, chosen by the size of the noise."""
    line, parts, x0 = torch.linspace(-2.2, 2.2, 22), [], data.test[:1500]
    where = torch.cartesian_prod(line, line).to(run.device)
    every_t = torch.linspace(sde.eps, sde.T, 1000)
    for noise in (0.05, 0.2, 0.5, 0.9):
        ratio = sde.std(every_t) / sde.m(every_t)
        t = every_t[(ratio - noise).abs().argmin()].item()
        mean, std = sde.marginal(x0, at(t, x0))
        arrows = score(where, at(t, where))
        arrows = arrows / arrows.norm(dim=1, keepdim=True).clamp(min=1e-9).sqrt()
        parts.append((f"t = {t:.2f}", mean + std * torch.randn_like(x0), where, arrows))
    plotting.fields(run.path("scores.png"), parts,
                    "The score, its length as a square root, over the noisy data")


def mixture_1d(sde, centres=(-1.0, 0.6), std=0.15):
    """log_p(x, t) of equal Gaussians under the sde. x: (B, 1), t: (B,) -> (B,)."""
    def log_p(x, t):
        mean = over(sde.m(t), x) * torch.tensor(centres, dtype=x.dtype, device=x.device)
        total = ((over(sde.m(t), x) * std) ** 2 + over(sde.std(t), x) ** 2).sqrt()
        log_each = torch.distributions.Normal(mean, total).log_prob(x)
        return log_each.logsumexp(1) - math.log(len(centres))

    return log_p


@plotting.figure("paths.png")
def figure_paths(run, sde, steps=500):
    """paths.png: [SDE] Fig. 2. p_t of a mixture on the line, and ways back from p_T.

    The score is exact, the gradient of log p_t. What is drawn is x_t over the root of
    m^2 + std^2, so that VE's wide start fits the page.
    """
    log_p = mixture_1d(sde)

    @torch.enable_grad()
    def score(x, t):
        x = x.requires_grad_()
        return torch.autograd.grad(log_p(x, t).sum(), x)[0]

    xT, line = sde.prior_sampling((8, 1)), torch.linspace(-3, 3, 301)[:, None]
    ways = {"reverse SDE (Eq. 6)": sde_process(em_step, score, sde, xT, steps),
            "probability-flow ODE (Eq. 13)": ode_process(
                score, sde, xT, sde.T, sde.eps, "rk4", steps)}
    parts = []
    for name, states in ways.items():
        ts, xs = zip(*[(t, shown(sde, x, t)[:, 0]) for t, x in states], strict=True)
        parts.append((name, ts, torch.stack(xs)))
    ts = np.linspace(sde.eps, sde.T, 300)
    columns = []
    for t in ts:
        x = line.to(xT) / shown(sde, torch.ones(1).to(xT), t)  # back to the size of x_t
        columns.append(log_p(x, at(t, x)).exp())
    plotting.flow(run.path("paths.png"), parts, ts, line[:, 0], torch.stack(columns, 1),
                  "From the same starts at T to the data at 0, over p_t")


@plotting.figure("denoising.gif")
def figure_walk(run, score, sde, shape, steps=400):
    """denoising.gif: points or series on their way by the reverse SDE."""
    states = sde_process(em_step, score, sde, sde.prior_sampling(shape), steps)
    frames = plotting.evenly(list(states), 41)
    plotting.film(run.path("denoising.gif"), [shown(sde, x, t) for t, x in frames],
                  [f"t = {t:.2f}" for t, _ in frames])


@plotting.figure("density.png")
def figure_density(run, cfg, score, sde, data, side=70, limit=2.1):
    """density.png: the model's density by the ODE's likelihood beside the true one."""
    line = torch.linspace(-limit, limit, side)
    where = torch.cartesian_prod(line, line).to(run.device)
    model = log_likelihood(score, sde, where, tolerance=cfg.tolerance).exp()
    true = point_density(data.name, where)
    plotting.densities(run.path("density.png"), [
        ("model: exp of the likelihood (Eq. 39)", model.view(side, side)),
        ("truth", true.view(side, side))], "Densities", limit)
    cell = (line[1] - line[0]).item() ** 2
    run.add_metrics(density={
        "sums_to": model.sum().item() * cell,
        "total_variation": (model - true).abs().sum().item() * cell / 2})


def futures(cfg, score, sde, x, known, n):
    """n completions of each series where known is False: (B, 1, L) -> (n, B, 1, L)."""
    times = n, 1, 1
    completed = complete(cfg, score, sde, x.repeat(times), known.repeat(times))
    return completed.view(n, *x.shape)


def unknown_parts(cfg, length):
    """{name: (1, 1, L) bool, what is known}: the last values missing, or a gap."""
    t = torch.arange(length).view(1, 1, length)
    horizon = cfg.forecast or max(1, length // 4)
    start = (length - horizon) // 2
    return {"forecast": t < length - horizon,
            "gap": (t < start) | (t >= start + horizon)}


@plotting.figure("forecast.png")
def figure_forecast(run, cfg, score, sde, data):
    """forecast.png: fans of futures and of fillings over the truth, held-out series.

    The 4th and the 36th of 39 draws hold 80 % of what is drawn alike, the 10th and the
    30th 50 %. How often the outer two hold the truth is kept in metrics.json.
    """
    x, parts, found = data.test[:16], [], {}
    for name, known in unknown_parts(cfg, data.shape[1]).items():
        known = known.to(x.device).expand_as(x)
        drawn = futures(cfg, score, sde, x, known, 39).sort(0).values
        bands = drawn[[3, 9, 19, 29, 35]]
        inside = (bands[0] <= x) & (x <= bands[-1])
        found[name] = inside[~known].float().mean().item()
        parts += [(f"{name}, held out {i + 1}", data.restore(x[i, 0]), known[i, 0],
                   data.restore(bands[:, i, 0])) for i in range(min(3, len(x)))]
    plotting.fans(run.path("forecast.png"), parts,
                  "The truth, and 50 % and 80 % bands of 39 completions (App. I.2)")
    run.add_metrics(bands_of_80_percent_hold=found | {"series": len(x)})


@plotting.figure("series.png")
def figure_series(run, data, samples):
    """series.png: spectrum and autocorrelation of samples and of the data."""
    both = {"samples": (samples, "-"), "data": (data.train, "k--")}
    spectra, correlations = {}, {}
    for name, (x, style) in both.items():
        power, correlation = quality.spectrum(x), quality.autocorrelation(x)
        spectra[name] = range(len(power)), power, style
        correlations[f"_{name}"] = range(len(correlation)), correlation, style
    plotting.curves(run.path("series.png"), [
        {"lines": spectra, "xlabel": "cycles per series", "yscale": "log",
         "title": "power spectrum, the mean over series"},
        {"lines": correlations, "xlabel": "lag", "title": "autocorrelation"}])
    n, half = len(data.train), max(1, len(data.train) // 2)
    splits = [data.train[torch.randperm(2 * half) % n].split(half) for _ in range(10)]
    run.add_metrics(samples={
        "n": len(samples),
        "spectral_distance_db": quality.spectral_distance(samples, data.train),
        "spectral_distance_db_of_halves": float(np.mean(
            [quality.spectral_distance(a, b) for a, b in splits]))})


def measure_points(run, cfg, score, sde, data, samples):
    """Energy distance of samples and of fresh data to the data; the likelihood."""
    draws = [torch.randperm(len(data.test))[:2000].split(1000) for _ in range(10)]
    picks = [torch.randperm(len(samples))[:1000] for _ in range(10)]
    of_model = [quality.energy_distance(samples[i], data.test[a])
                for i, (a, _) in zip(picks, draws, strict=True)]
    of_data = [quality.energy_distance(data.test[a], data.test[b]) for a, b in draws]
    run.add_metrics(samples={"energy_distance": float(np.mean(of_model)),
                             "energy_distance_of_data": float(np.mean(of_data))})
    if cfg.likelihood:
        x = data.test[:cfg.likelihood]
        try:
            logp = log_likelihood(score, sde, x, tolerance=cfg.tolerance)
        except FloatingPointError as problem:
            return run.say(f"no likelihood: {problem}")
        run.add_metrics(likelihood={
            "n": len(x), "nats": logp.mean().item(),
            "nats_of_the_truth": point_density(data.name, x).log().mean().item()})


def measure_bits(run, cfg, model, sde, data):
    """bits/dim of held-out images, of all with --evaluate; the score is not clamped."""
    if not cfg.likelihood or not is_8bit(data.test):
        return
    x = data.test if run.opts.evaluate else data.test[:cfg.likelihood]
    score = score_fn(model, sde, cfg.std_floor)
    try:
        bits = torch.cat([bits_per_dim(score, sde, part, tolerance=cfg.tolerance)
                          for part in tqdm(x.split(100), "bits/dim", leave=False)])
    except FloatingPointError as problem:
        return run.say(f"no bits/dim: {problem}")
    error = bits.std().item() / math.sqrt(len(bits)) if len(bits) > 1 else None
    run.add_metrics(bits_per_dim={"n": len(x), "mean": bits.mean().item(),
                                  "standard_error": error})


def check_data(run, cfg, sde, data):
    """Mistake where cfg asks for what this data or this SDE does not have."""
    kind = {1: "points", 2: "series", 3: "images"}[len(data.shape)]
    only = {"flip": "images", "dequantize": "images", "image_size": "images",
            "image": "images", "mask": "images", "classes": "images",
            "forecast": "series"}
    for name, owner in only.items():
        if kind != owner and run.opts.given.get(name):
            raise Mistake(f"{name} needs {owner}: --dataset {cfg.dataset} has none")
    if cfg.sampler not in sde.samplers:
        raise Mistake(f"sampler {cfg.sampler}: must be one of "
                      f"{', '.join(sde.samplers)} with --sde {cfg.sde}")
    if cfg.predictor == "ancestral" and "ancestral" not in sde.samplers:
        raise Mistake("predictor ancestral: must be reverse, flow or none with "
                      f"--sde {cfg.sde}")
    if cfg.predictor == "none":
        for name in ("corrector_steps", "inpaint_corrector"):
            if not getattr(cfg, name):
                raise Mistake(f"{name} 0: must be at least 1 with --predictor none")
    if kind == "series" and cfg.forecast >= data.shape[1]:
        raise Mistake(f"forecast {cfg.forecast}: must be below {data.shape[1]}, the "
                      "length of the series")
    for c in cfg.classes:
        if data.train_labels is None:
            raise Mistake(f"classes {c}: --dataset {cfg.dataset} has no labels")
        if c not in data.classes:
            raise Mistake(f"classes {c}: must be one of "
                          f"{', '.join(data.classes[:20])}")
    if run.opts.given.get("likelihood") and kind != "points" and not is_8bit(data.test):
        raise Mistake(f"likelihood {cfg.likelihood}: --dataset {cfg.dataset} must be "
                      "points, or images of 8 bits at this resolution")
    if kind == "images":
        read_question(cfg.image, cfg.mask, data.shape)


def show_points(run, cfg, score, sde, data, samples):
    """The figures and numbers of points in the plane."""
    figure_fields(run, score, sde, data)
    figure_walk(run, score, sde, (2000, 2))
    figure_density(run, cfg, score, sde, data)
    measure_points(run, cfg, score, sde, data, samples)


def show_series(run, cfg, score, sde, data, samples):
    """The figures and numbers of series, and the samples as a table."""
    table = data.restore(samples[:, 0].cpu().double()).numpy()
    with writing(run.path("samples.csv")):
        np.savetxt(run.path("samples.csv"), table, "%.9g", ",")
    figure_walk(run, score, sde, (6, *data.shape))
    figure_series(run, data, samples)
    figure_forecast(run, cfg, score, sde, data)


def show_images(run, cfg, model, score, sde, data, samples, states, classifier):
    """The figures and numbers of images."""
    run.add_metrics(samples=quality.glance(samples, data))
    plotting.neighbours(run.path("neighbours.png"), samples, data)
    figure_denoising(run, score, sde, states(range(8)))
    figure_guardrails(run, cfg, model, sde, data.shape)
    figure_codes(run, cfg, score, sde, data)
    figure_inpainting(run, cfg, score, sde, data,
                      *read_question(cfg.image, cfg.mask, data.shape))
    if data.shape[0] == 3:
        figure_colorization(run, cfg, score, sde, data)
    if classifier:
        figure_classes(run, cfg, score, sde, data, classifier)
    measure_bits(run, cfg, model, sde, data)
    run.evaluate(states, model, cfg.N, data)
    scores = {}
    if run.opts.evaluate:
        measure_completions(run, cfg, score, sde, data)
        scores = measure_samplers(run, cfg, model, sde, data, states)
    figure_samplers(run, cfg, model, score, sde, data.shape, scores)


@command_line
def main(argv=None):
    """Train, or load what was trained; draw; measure."""
    cfg, run = open_run("score_based", Config, PRESETS, SAMPLING, argv)
    data = run.load(load_data(cfg.dataset, cfg.image_size))
    sde, kind = make_sde(cfg).to(run.device), len(data.shape)
    check_data(run, cfg, sde, data)
    if run.sampling:
        model = run.trained(make_network(cfg, data.shape))
    else:
        model = train(cfg, run, data)
    classifier = None
    if cfg.classes and not run.stopped:
        classifier = train_classifier(cfg, run, sde, data)
    if not run.main:
        return  # only the first process draws
    if kind == 2:
        data = data.rescale(model.offset.item(), model.unit.item())

    score = score_fn(model, sde, cfg.std_floor, cfg.clip_x0 and kind == 3)

    def states(batch, cfg=cfg, calls=None):
        xT = sde.prior_sampling((len(batch), *data.shape))
        return process(cfg, score, sde, xT, calls)

    times, size = {1: (100, 10_000), 2: (5, 1000), 3: (1, 100)}[kind]
    samples, timing = run.draw(times * cfg.n_samples, states, model, cfg.N, size)
    run.add_metrics(sampling=timing | {"sampler": cfg.sampler})
    plotting.samples(run.path("samples.png"), samples, data, "Drawn from noise")
    figure_sdes(run, cfg)
    figure_paths(run, sde)
    figure_loss(run, model, sde, data)
    if kind == 1:
        show_points(run, cfg, score, sde, data, samples)
    elif kind == 2:
        show_series(run, cfg, score, sde, data, samples)
    else:
        show_images(run, cfg, model, score, sde, data, samples, states, classifier)
    run.finish()


if __name__ == "__main__":
    main()
