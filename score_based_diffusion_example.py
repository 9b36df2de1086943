"""Score-Based Generative Modeling through Stochastic Differential Equations
(Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, arXiv 2011.13456): [SDE]

    python score_based_diffusion_example.py                        train and draw digits
    python score_based_diffusion_example.py --dataset swiss_roll   points in the plane
    python experiments/score_based.py                              more figures

The page follows the paper: the VE, VP and sub-VP SDEs (Eq. 9, 11, 12), score matching
(Eq. 7), predictor-corrector sampling (Alg. 1 to 5), the probability-flow ODE (Eq. 13),
control (Eq. 14, App. I), likelihoods (Eq. 39). Code: score_sde_pytorch; [DDPM]: arXiv
2006.11239.

Departures from the paper:
  1. the small U-Net and decaying learning rate of ddpm_example.py; an MLP for points;
  2. training draws the times in the middle more often (`weighting`);
  3. the discrete steps use the exact transition from s to t; sub-VP has a corrector;
  4. the corrector comes before the predictor, as in the code; r is 0.16 for VP, too;
  5. sampling clamps x0_hat of images (`clip_x0`), likelihoods do not;
  6. an SDE sampler ends with its last mean, as in the code; App. G has Tweedie's;
  7. VE's network and loss are scaled as in arXiv 2206.00364 (`scaling`), and its sigmas
     are twice the paper's, whose pixels are in [0, 1];
  8. not from the paper: the cosine beta, the likelihood weighting, RK4.
"""

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import plotting, quality
from common.cli import (Count, Fraction, Mistake, NonNegative, OpenFraction, Positive,
                        Probability, Whole, check_sizes, command_line)
from common.data import POINTS, is_8bit, load_data
from common.device import counted
from common.run import open_run

Sampler = Literal["em", "reverse", "ancestral", "pc", "rk45", "rk4"]
Predictor = Literal["reverse", "ancestral", "flow", "none"]
Weighting = Literal["simple", "likelihood", "logit_normal"]


@dataclass(frozen=True)
class Config:
    """Each field is a flag. Its type gives the range, its comment is the help text."""

    # SDE
    sde: Literal["ve", "vp", "subvp"] = "vp"  # forward SDE (paper: all three)
    beta: Literal["linear", "cosine"] = "linear"  # beta(t) of vp, subvp (paper: linear)
    beta_min: Positive = 0.1     # linear beta(t) at t = 0 (paper: 0.1)
    beta_max: Positive = 20.0    # linear beta(t) at t = 1 (paper: 20)
    sigma_min: Positive = 0.02   # smallest noise of ve (paper: 0.01 for x in [0, 1])
    sigma_max: Positive = 100.0  # largest noise of ve (code: 50 for x in [0, 1])
    # sampling
    sampler: Sampler = "pc"           # rk45, rk4: ODE (paper: ve pc, vp and subvp em)
    N: Count = 500                    # steps; rk4: N / 4, rk45: adaptive (paper: 1000)
    predictor: Predictor = "reverse"  # predictor of the sampler pc (code: reverse)
    corrector_steps: Whole = 1        # corrector steps per predictor step (paper: 1)
    snr: Positive = 0.16              # corrector's ratio r (paper: ve 0.16, vp 0.01)
    tolerance: OpenFraction = 1e-4    # rtol and atol of rk45 (paper: 1e-5)
    denoise: bool = True              # end with a mean, without its noise (paper: yes)
    clip_x0: bool = True              # clamp x0_hat in sampling images (paper: no)
    std_floor: Probability = 1e-5     # least std to divide by, for subvp near t = 0
    likelihood: Whole = 16            # number of held-out examples for the likelihood
    n_samples: Count = 64             # number of images drawn; of points, 100 n
    # data
    dataset: str = "digits"      # digits, mnist, folder:PATH, swiss_roll, ...
    image_size: Whole = 0        # resize images to this resolution; 0 keeps theirs
    flip: bool = False           # mirror images at random (code: yes; not for digits)
    dequantize: bool = True      # spread 8-bit values over their bins (code: no)
    # network
    channels: Count = 32         # width of the U-Net, even, at least 4 (code: 128)
    mults: tuple[Count, ...] = (1, 2)    # relative width of each level (code: 1 2 2 2)
    blocks: Count = 1            # residual blocks per level (paper: 4)
    attention: tuple[Count, ...] = (7,)  # resolutions with attention (code: 16)
    heads: Count = 1             # attention heads (code: 1)
    groups: Count = 8            # groups in each group norm (code: 32)
    dropout: Fraction = 0.0      # dropout in the residual blocks (code: 0.1)
    patch: Count = 2             # patch x patch pixels become channels (paper: 1)
    hidden: Count = 128          # width of the MLP for points
    layers: Count = 4            # blocks of the MLP for points
    # training
    weighting: Weighting = "logit_normal"  # lambda(t), density of t (paper: simple)
    steps: Count = 4000          # optimiser steps (paper: 950000)
    batch_size: Count = 32       # examples per step, over all processes (paper: 128)
    lr: Positive = 2e-3          # peak learning rate (code: 2e-4)
    warmup: Whole = 200          # steps of learning-rate warm-up (code: 5000)
    decay: Literal["cosine", "constant"] = "cosine"  # decay of lr (code: constant)
    weight_decay: NonNegative = 0.0  # AdamW's weight decay; 0 gives Adam (code: 0)
    grad_clip: Positive = 1.0    # largest norm of the gradient (code: 1)
    ema: Fraction = 0.999        # decay of the average (paper: ve 0.999, vp 0.9999)
    preview_every: Count = 1000  # steps between previews and checkpoints


# The fields that may change after training
SAMPLING = ("sampler", "N", "predictor", "corrector_steps", "snr", "tolerance",
            "denoise", "clip_x0", "std_floor", "likelihood", "n_samples")

PLANE = Config(
    dataset="swiss_roll", dequantize=False, weighting="simple", steps=10_000,
    batch_size=512, lr=3e-3, preview_every=5000, sampler="rk45", likelihood=1000)
PRESETS = {
    "laptop": Config(),
    "smoke": Config(
        channels=8, groups=4, hidden=16, layers=2, steps=6, batch_size=8, warmup=2,
        preview_every=3, N=5, tolerance=0.1, likelihood=2, n_samples=4),
    **{name: replace(PLANE, dataset=name) for name in POINTS},
}


# %% 1. Forward process ([SDE] Sec. 3, App. B, C)
#
# dx = f(x, t) dt + g(t) dw, which makes p(x_t | x_0) = N(m(t) x_0, std(t)^2 I):
#
#                    f(x, t)          g(t)^2                   m(t)       std(t)
#   VE (Eq. 9)       0                d sigma(t)^2 / dt        1          sigma(t)
#   VP (Eq. 11)      -1/2 beta(t) x   beta(t)                  e^(-B/2)   sqrt(1 - e^-B)
#   sub-VP (Eq. 12)  -1/2 beta(t) x   beta(t) (1 - e^(-2 B))   e^(-B/2)   1 - e^-B
#
# sigma(t) = sigma_min (sigma_max / sigma_min)^t, beta(t) = beta_min + t (beta_max -
# beta_min) (App. C), and B(t) is the integral of beta from 0 to t.


def per_example(value, x):
    """Shape value, (B,), to broadcast over x: (B, ...)."""
    return value.view(-1, *[1] * (x.ndim - 1))


class SDE:
    """A row of the table above, for t in [0, T]. Source: [SDE] Eq. 5, 29.

    x: (B, ...), t: (B,) of x's dtype. Sampling ends at the time eps, training at
    eps_train ([SDE] App. C). A subclass defines m, std, sde and ancestral_variance.
    """

    T, eps, eps_train, prior_std, has_ancestral = 1.0, 1e-3, 1e-5, 1.0, True

    def marginal(self, x0, t):
        """Mean (like x0) and std (broadcastable) of x_t, given x_0."""
        # [SDE] Eq. 29: p(x_t | x_0) = N(m(t) x_0, std(t)^2 I). VE has std(0) =
        # sigma_min; the paper's sigma jumps from 0 to it at t = 0 (App. C)
        return per_example(self.m(t), x0) * x0, per_example(self.std(t), x0)

    def transition(self, s, t):
        """(a, variance) of p(x_t | x_s) = N(a x_s, variance I), for floats s < t."""
        s, t = (torch.tensor(u, dtype=torch.float64) for u in (s, t))
        # m(t) = a m(s) and std(t)^2 = a^2 std(s)^2 + variance
        a = self.m(t) / self.m(s)
        return a.item(), (self.std(t) ** 2 - a**2 * self.std(s) ** 2).item()

    def prior_sampling(self, shape, device="cpu"):
        """The noise x_T that sampling starts from."""
        return self.prior_std * torch.randn(shape, device=device)

    def prior_logp(self, z):
        """log p_T of z: (B, ...) -> (B,) in nats."""
        z, D, variance = z.flatten(1), z[0].numel(), self.prior_std**2
        return -0.5 * (D * math.log(2 * math.pi * variance) + (z**2).sum(1) / variance)

    def time_feature(self, t):
        """The time that the network is given: the steps of DDPM."""
        return 999 * t

    def scaling(self, t, sigma_data):
        """c_in, c_skip, c_out, (B,), of eps_hat = c_skip x + c_out model(c_in x, t)."""
        return torch.ones_like(t), torch.zeros_like(t), torch.ones_like(t)


class VESDE(SDE):
    """Variance exploding, the limit of SMLD. Source: [SDE] Eq. 9, App. C."""

    eps = 1e-5

    def __init__(self, sigma_min=0.01, sigma_max=50.0):
        if sigma_min >= sigma_max:
            raise Mistake(
                f"sigma_min {sigma_min}: must be below --sigma_max {sigma_max}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.prior_std = sigma_max

    def m(self, t):
        return torch.ones_like(t)

    def std(self, t):
        # [SDE] App. C: sigma(t) = sigma_min (sigma_max / sigma_min)^t
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def sde(self, x, t):
        """Drift (like x) and diffusion (broadcastable)."""
        # [SDE] Eq. 9: dx = sqrt(d sigma(t)^2 / dt) dw
        g = self.std(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))
        return torch.zeros_like(x), per_example(g, x)

    def ancestral_variance(self, s, t):
        """The variance of the noise of an ancestral step from t down to s."""
        # [SDE] Eq. 47: sigma_s^2 (sigma_t^2 - sigma_s^2) / sigma_t^2
        _, variance = self.transition(s, t)
        return variance * (self.sigma_max / self.sigma_min) ** (2 * (s - t))

    def time_feature(self, t):
        """The time that the network is given: ln sigma(t)."""
        return self.std(t).log()

    def scaling(self, t, sigma_data):
        """The network sees x with std 1, and corrects eps_hat of N(0, sigma_data^2).

        Source: Karras et al., arXiv 2206.00364, Tab. 1, written in terms of eps.
        """
        sigma = self.std(t)
        size2 = sigma**2 + sigma_data**2
        return 1 / size2.sqrt(), sigma / size2, sigma_data / size2.sqrt()


class VPSDE(SDE):
    """Variance preserving, the limit of DDPM. Source: [SDE] Eq. 11.

    kind "linear" is the paper's beta(t). "cosine" is the continuous form of the cosine
    schedule (arXiv 2102.09672, Eq. 17), which goes to infinity and is cut off at cap.
    """

    def __init__(self, beta_min=0.1, beta_max=20.0, kind="linear", cap=100.0):
        if kind not in ("linear", "cosine"):
            raise Mistake(f"beta {kind}: must be one of linear, cosine")
        if kind == "linear" and beta_min >= beta_max:
            raise Mistake(
                f"beta_min {beta_min}: must be below --beta_max {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max
        self.kind, self.cap = kind, cap
        # the t at which the cosine beta reaches its cap
        self.t_cap = 1.008 * math.atan(cap * 1.008 / math.pi) * 2 / math.pi - 0.008

    def beta(self, t):
        if self.kind == "linear":
            # [SDE] App. C: beta(t) = beta_min + t (beta_max - beta_min)
            return self.beta_min + t * (self.beta_max - self.beta_min)
        # e^(-B) is the squared cosine of u, so beta = 2 tan(u) du/dt
        u = (t.clamp(max=self.t_cap) + 0.008) / 1.008 * math.pi / 2
        return math.pi / 1.008 * u.tan()

    def B(self, t):
        """The integral of beta from 0 to t."""
        if self.kind == "linear":
            return self.beta_min * t + 0.5 * t**2 * (self.beta_max - self.beta_min)
        start = 0.008 / 1.008 * math.pi / 2
        move = t.clamp(max=self.t_cap) / 1.008 * math.pi / 2
        # -2 log(cos(start + move) / cos(start)), in a form that is precise at small t
        fall = 2 * torch.sin(start + move / 2) * torch.sin(move / 2) / math.cos(start)
        return -2 * torch.log1p(-fall) + self.cap * (t - self.t_cap).clamp(min=0)

    def m(self, t):
        return torch.exp(-0.5 * self.B(t))  # [SDE] Eq. 29: e^(-B/2)

    def std(self, t):
        # [SDE] Eq. 29: sqrt(1 - e^-B); expm1 is precise at small t
        return (-torch.expm1(-self.B(t))).sqrt()

    def g2(self, t):
        return self.beta(t)

    def sde(self, x, t):
        """Drift (like x) and diffusion (broadcastable)."""
        # [SDE] Eq. 11: dx = -1/2 beta(t) x dt + sqrt(beta(t)) dw; Eq. 12: another g
        drift = -0.5 * per_example(self.beta(t), x) * x
        return drift, per_example(self.g2(t), x).sqrt()

    def ancestral_variance(self, s, t):
        """The variance of the noise of an ancestral step from t down to s."""
        return self.transition(s, t)[1]  # [SDE] Eq. 4: beta of this step


class SubVPSDE(VPSDE):
    """The drift of VP with less noise. Source: [SDE] Eq. 12."""

    has_ancestral = False

    def std(self, t):
        return -torch.expm1(-self.B(t))  # [SDE] Eq. 29: 1 - e^-B, not its root

    def g2(self, t):
        # [SDE] Eq. 12: g^2 = beta(t) (1 - e^(-2 B))
        return self.beta(t) * -torch.expm1(-2 * self.B(t))

    def ancestral_variance(self, s, t):
        raise Mistake("sampler ancestral: is for VESDE and VPSDE, not for SubVPSDE")


def make_sde(cfg):
    """The SDE that cfg names."""
    if cfg.sde == "ve":
        return VESDE(cfg.sigma_min, cfg.sigma_max)
    kind = VPSDE if cfg.sde == "vp" else SubVPSDE
    return kind(cfg.beta_min, cfg.beta_max, cfg.beta)


# %% 2. Training objective ([SDE] Sec. 3.3)


def network_eps(model, sde, xt, t):
    """eps_hat(x_t, t), like xt. The network holds sigma_data, the std of the data."""
    sigma_data = getattr(model, "sigma_data", 0.5)  # a plain function has none
    c_in, c_skip, c_out = (per_example(c, xt) for c in sde.scaling(t, sigma_data))
    return c_skip * xt + c_out * model(c_in * xt, sde.time_feature(t))


def score_loss(model, sde, x0, t, eps, weighting="simple", density=None):
    """Denoising score matching. x0, eps: (B, ...), t: (B,) in (0, T] -> scalar.

    lambda(t) = std^2 makes this the squared error of eps_hat. VE has std^2 / c_out^2,
    or its network would hardly be trained at large sigma (arXiv 2206.00364, Eq. 8).
    With "likelihood" it is g^2 (arXiv 2101.09258). density: see draw_times.
    """
    mean, std = sde.marginal(x0, t)
    eps_hat = network_eps(model, sde, mean + std * eps, t)
    if weighting == "likelihood":
        weight = (per_example(sde.sde(t, t)[1], x0) / std) ** 2
    else:
        _, _, c_out = sde.scaling(t, getattr(model, "sigma_data", 0.5))
        weight = 1 / per_example(c_out, x0) ** 2
    if density is not None:
        weight = weight / per_example(density, x0)
    # [SDE] Eq. 7: E lambda(t) |score_theta(x_t, t) - grad log p(x_t | x_0)|^2,
    # where score_theta = -eps_hat / std, grad log p = -eps / std, lambda = weight std^2
    return (weight * (eps_hat - eps) ** 2).mean()


def draw_times(sde, n, weighting="simple"):
    """Draw the times t of a batch: (t, density), each (n,), on the CPU.

    The loss is divided by the density, which is relative to that of uniform t.
    "simple" is the paper's uniform t. "likelihood" draws t with a density proportional
    to its weight g^2 / std^2, which keeps the variance of the loss small (arXiv
    2101.09258). "logit_normal" draws more of the middle t, which decide what a sample
    shows, and leaves this in the loss: the logit of t / T is N(-0.2, 1), after arXiv
    2403.03206, Sec. 3.1, with one draw from each of n equal quantiles, so that batches
    differ less. One t in sixteen is uniform all the same, since small t, which are rare
    here, weigh most in the likelihood.
    """
    u, span = torch.rand(n), sde.T - sde.eps_train
    if weighting == "logit_normal":
        fraction = torch.sigmoid(torch.special.ndtri((torch.arange(n) + u) / n) - 0.2)
        u = torch.where(torch.rand(n) < 1 / 16, torch.rand(n), fraction)
    if weighting != "likelihood":
        return sde.eps_train + span * u, torch.ones(n)
    grid = torch.logspace(math.log10(sde.eps_train), math.log10(sde.T), 2001,
                          dtype=torch.float64)
    weight = (sde.sde(grid, grid)[1] / sde.std(grid)) ** 2
    area = F.pad(torch.cumulative_trapezoid(weight, grid), (1, 0))
    t = torch.from_numpy(np.interp(u.numpy() * area[-1].item(), area, grid))
    density = (sde.sde(t, t)[1] / sde.std(t)) ** 2 * span / area[-1]
    return t.float(), density.float()


# %% 3. Sampling ([SDE] Sec. 4, 5, App. D to I)


def score_fn(model, sde, std_floor=1e-5, clip_x0=False):
    """score(x, t), like x, of a network. With clip_x0, x0_hat is clamped to [-1, 1]."""
    def score(x, t):
        m, std = per_example(sde.m(t), x), per_example(sde.std(t), x)
        std = std.clamp(min=std_floor)
        eps_hat = network_eps(model, sde, x, t)
        if clip_x0:
            x0_hat = ((x - std * eps_hat) / m).clamp(-1, 1)
            return (m * x0_hat - x) / std**2  # Tweedie's formula, solved for the score
        # [SDE] Eq. 7, 29: score(x_t, t) = E[-eps | x_t] / std
        return -eps_hat / std

    return score


def batch_time(t, x):
    """The float t for each example of x: (B,), of x's dtype and device."""
    return torch.full((len(x),), t, dtype=x.dtype, device=x.device)


def tweedie(score, sde, x, t):
    """The mean of x_0, given x_t = x. t: float -> like x."""
    t = batch_time(t, x)
    # [SDE] App. G, Tweedie's formula: E[x_0 | x_t] = (x_t + std^2 score(x_t, t)) / m
    std2 = per_example(sde.std(t), x) ** 2
    return (x + std2 * score(x, t)) / per_example(sde.m(t), x)


# Predictors go from t down to s: the mean of x_s, and the std of the noise to add


def em_step(score, sde, x, t, s):
    """Euler-Maruyama on the reverse SDE."""
    drift, g = sde.sde(x, batch_time(t, x))
    # [SDE] Eq. 6: dx = (f(x, t) - g(t)^2 score(x, t)) dt + g(t) dw_bar, dt = s - t < 0
    x_mean = x + (drift - g**2 * score(x, batch_time(t, x))) * (s - t)
    return x_mean, g * math.sqrt(t - s)


def reverse_diffusion_step(score, sde, x, t, s):
    """The transition from x_s to x_t, reversed. Source: [SDE] App. E; Alg. 2, 3."""
    a, variance = sde.transition(s, t)
    # [SDE] Eq. 46: x_s = x_t - f_t(x_t) + G_t^2 score(x_t, t) + G_t z,
    # where x_t = x_s + f_t(x_s) + G_t z, so f_t(x) = (a - 1) x and G_t^2 = variance
    x_mean = (2 - a) * x + variance * score(x, batch_time(t, x))
    return x_mean, math.sqrt(variance)


def ancestral_step(score, sde, x, t, s):
    """The ancestral step of DDPM (VP) and of SMLD (VE). Source: [SDE] App. F."""
    a, variance = sde.transition(s, t)
    # [SDE] Eq. 4, VP: x_s = (x_t + beta_t score(x_t, t)) / sqrt(1 - beta_t)
    #     + sqrt(beta_t) z, where beta_t = variance and 1 - beta_t = a^2
    # [SDE] Eq. 47, VE: x_s = x_t + (sigma_t^2 - sigma_s^2) score(x_t, t)
    #     + sigma_s / sigma_t sqrt(sigma_t^2 - sigma_s^2) z, where a = 1
    x_mean = (x + variance * score(x, batch_time(t, x))) / a
    return x_mean, math.sqrt(sde.ancestral_variance(s, t))


def flow_step(score, sde, x, t, s):
    """Probability-flow sampling, which adds no noise. Source: [SDE] App. D.3."""
    a, variance = sde.transition(s, t)
    # [SDE] App. D.3, below Eq. 42: x_s = x_t - f_t(x_t) + 1/2 G_t^2 score(x_t, t);
    # VE: Eq. 43, VP: Eq. 44
    return (2 - a) * x + 0.5 * variance * score(x, batch_time(t, x)), 0.0


def identity_step(score, sde, x, t, s):
    """No predictor: the corrector works alone, and Tweedie's mean ends the process."""
    return (x if s > sde.eps else tweedie(score, sde, x, t)), 0.0


PREDICTORS = {"em": em_step, "reverse": reverse_diffusion_step, "flow": flow_step,
              "ancestral": ancestral_step, "none": identity_step}


def langevin_step(score, x, t, alpha, snr):
    """One corrector step at t. alpha: 1 for VE, 1 - beta_t for VP. [SDE] Alg. 4, 5."""
    z = torch.randn_like(x)                                            # line 4
    g = score(x, batch_time(t, x))                                     # line 5
    # epsilon = 2 alpha (r |z| / |g|)^2, the norms averaged over the batch (App. G)
    z_norm, g_norm = (u.flatten(1).norm(dim=1).mean() for u in (z, g))
    epsilon = 2 * alpha * (snr * z_norm / g_norm) ** 2                 # line 6
    return x + epsilon * g + (2 * epsilon).sqrt() * z                  # line 7


@torch.no_grad()
def sde_process(predictor, score, sde, xT, steps, correctors=(), constrain=None):
    """[SDE] Alg. 1. Yields (T, x_T), ..., (eps, x_eps), (0, x_0).

    The corrector comes before the predictor (departure 4). x_0 is the mean of the last
    step (departure 6): with few steps, the noise that it adds is larger than that of
    p_eps, and Tweedie's formula at eps would leave most of it.
    predictor(score, sde, x, t, s): the mean of x_s, and the std of the noise to add.
    correctors: functions (score, x, t, alpha) -> x, which are applied in turn.
    constrain(x, t) -> x puts a draw of the known part of x_t in its place (imputation).
    """
    constrain = constrain or (lambda x, t: x)
    ts = np.linspace(sde.T, sde.eps, steps + 1).tolist()
    x = constrain(xT, sde.T)                                           # line 1
    for t, s in zip(ts[:-1], ts[1:], strict=True):                     # line 2
        yield t, x
        alpha = sde.transition(s, t)[0] ** 2  # Alg. 5: 1 - beta_t; Alg. 4: 1
        for correct in correctors:                                     # line 4
            x = constrain(correct(score, x, t, alpha), t)              # line 5
        x_mean, std = predictor(score, sde, x, t, s)                   # line 3
        x = constrain(x_mean + std * torch.randn_like(x), s)
    yield sde.eps, x
    yield 0.0, constrain(x_mean, 0.0)                                  # line 6


def flow_drift(score, sde, x, t):
    """dx/dt of the probability-flow ODE. t: float -> like x."""
    drift, g = sde.sde(x, batch_time(t, x))
    # [SDE] Eq. 13: dx/dt = f(x, t) - 1/2 g(t)^2 score(x, t)
    return drift - 0.5 * g**2 * score(x, batch_time(t, x))


def rk4_step(score, sde, x, t, s):
    """x, carried by the ODE from t to s in one classical Runge-Kutta step."""
    h = s - t
    k1 = flow_drift(score, sde, x, t)
    k2 = flow_drift(score, sde, x + h / 2 * k1, t + h / 2)
    k3 = flow_drift(score, sde, x + h / 2 * k2, t + h / 2)
    k4 = flow_drift(score, sde, x + h * k3, s)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def solve(velocity, state, t, s, tolerance):
    """Solve d state / dt = velocity(state, t) from t to s by RK45: yields (t, state).

    state and velocity are tuples of tensors. tolerance is relative and absolute. A
    solver that fails raises FloatingPointError.
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


@torch.no_grad()
def ode_process(score, sde, x, t, s, method="rk45", steps=100, tolerance=1e-5):
    """Carry x, (B, ...), along the probability-flow ODE from t to s: yields (t, x_t).

    "rk45" adapts its steps to the tolerance; "rk4" takes `steps` of four network calls
    each. From T to eps the ODE draws samples, from eps to T it finds their codes ([SDE]
    App. D.4).
    """
    if method == "rk45":
        def velocity(state, u):
            return (flow_drift(score, sde, state[0], u),)
        for u, state in solve(velocity, (x,), t, s, tolerance):
            yield u, state[0]
        return
    ts = np.linspace(t, s, steps + 1).tolist()
    for u, v in zip(ts[:-1], ts[1:], strict=True):
        yield u, x
        x = rk4_step(score, sde, x, u, v)
    yield s, x


@torch.no_grad()
def sampling_process(cfg, score, sde, xT):
    """The process of the sampler that cfg names: yields (T, x_T), ..., samples last.

    Without cfg.denoise the samples are x_eps; with it they are the last mean of an SDE
    sampler, or Tweedie's mean of the ODE's x_eps. The predictor "none" ends with
    Tweedie's mean in either case.
    """
    if cfg.sampler in ("rk45", "rk4"):
        for t, x in ode_process(score, sde, xT, sde.T, sde.eps, cfg.sampler,
                                max(1, cfg.N // 4), cfg.tolerance):
            yield t, x
        if cfg.denoise:
            yield 0.0, tweedie(score, sde, x, sde.eps)
        return
    name, correctors = cfg.sampler, []
    if name == "pc":
        name = cfg.predictor
        correctors = [partial(langevin_step, snr=cfg.snr)] * cfg.corrector_steps
    for t, x in sde_process(PREDICTORS[name], score, sde, xT, cfg.N, correctors):
        if t > 0 or cfg.denoise:
            yield t, x


def final(states):
    """The last x of a process, which yields (t, x)."""
    for _, x in states:
        pass
    return x


# Controllable generation ([SDE] Sec. 5, App. I); experiments/controllable.py uses it


def conditional_score(score, classifier, y):
    """score(x, t) of p_t(x | y), for every sampler. Source: [SDE] App. I.1.

    classifier(x, t): the logits of p_t(y | x), (B, classes). y: (B,) int64.
    """
    def guided(x, t):
        with torch.enable_grad():
            x_in = x.detach().requires_grad_()
            log_p = classifier(x_in, t).log_softmax(1).gather(1, y[:, None]).sum()
            gradient = torch.autograd.grad(log_p, x_in)[0]
        # [SDE] Eq. 14: grad log p_t(x | y) = grad log p_t(x) + grad log p_t(y | x)
        return score(x, t) + gradient

    return guided


def imputation(sde, known, mask, basis=None):
    """constrain(x, t) for sde_process: draw the unknown part, given the known part.

    known: like x. mask: bool, broadcastable to x, True where x is known. basis: (C, C),
    its orthonormal rows are the channels that mask refers to. [SDE] App. I.2, I.3.
    """
    def turn(x, basis):
        return x if basis is None else torch.einsum("dc,bc...->bd...", basis, x)

    known, back = turn(known, basis), None if basis is None else basis.mT

    def constrain(x, t):
        noised = known
        if t > 0:  # at t = 0 it has no noise, although VE's sigma(0) is not 0
            mean, std = sde.marginal(known, batch_time(t, x))
            noised = mean + std * torch.randn_like(x)
        # the known part of x_t is a draw from p(x_t | x_0), the other part stays
        return turn(torch.where(mask, noised, turn(x, basis)), back)

    return constrain


# %% 4. Networks ([SDE] App. H)


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


class FourierFeatures(nn.Module):
    """Random Fourier features of t: (B,) -> (B, 2 dim). Source: [SDE] App. H.2."""

    def __init__(self, dim, scale=16.0):
        super().__init__()
        self.register_buffer("W", torch.randn(dim) * scale)

    def forward(self, t):
        angles = 2 * math.pi * t[:, None].to(self.W.dtype) * self.W
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
    always has it. fourier: random Fourier features of t (VE). Source: [DDPM] App. B.
    """

    def __init__(self, image_channels=3, image_size=32, channels=128,
                 mults=(1, 2, 2, 2), blocks=2, attention=(16,), heads=1, groups=32,
                 dropout=0.1, patch=1, fourier=False):
        super().__init__()
        check_sizes(image_size, channels, mults, attention, heads, groups, patch)
        self.channels, self.patch = channels, patch
        self.levels, self.blocks = len(mults), blocks
        widths = [channels * mult for mult in mults]
        sizes = [image_size // patch // 2**level for level in range(len(mults))]
        time_dim = 4 * channels
        self.fourier = FourierFeatures(channels) if fourier else None
        self.time = nn.Sequential(
            nn.Linear(2 * channels if fourier else channels, time_dim), nn.SiLU(),
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
        fourier = self.fourier
        emb = timestep_embedding(t, self.channels) if fourier is None else fourier(t)
        emb = self.time(emb.to(x.dtype))                            # (B, 4 channels)
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


class ScoreMLP(nn.Module):
    """model(x, t) of points. x: (B, dim), t: (B,), 999 t or ln sigma -> like x."""

    def __init__(self, dim=2, hidden=128, layers=4, fourier=False):
        super().__init__()
        self.fourier = FourierFeatures(32) if fourier else None
        self.time = nn.Linear(64, hidden)
        self.lift = nn.Linear(dim, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden)) for _ in range(layers))
        self.out = zero_init(nn.Linear(hidden, dim))

    def forward(self, x, t):
        fourier = self.fourier
        emb = timestep_embedding(t, 64) if fourier is None else fourier(t)  # (B, 64)
        emb, h = self.time(emb.to(x.dtype)), self.lift(x)           # (B, hidden)
        for block in self.blocks:
            h = h + block(h + emb)
        return self.out(F.silu(h))


def make_network(cfg, shape):
    """The network that cfg describes, for images (C, H, W) or points (dim,).

    It holds sigma_data, the std of the data, which training sets.
    """
    fourier = cfg.sde == "ve"
    if len(shape) == 1:
        network = ScoreMLP(shape[0], cfg.hidden, cfg.layers, fourier)
    else:
        network = UNet(shape[0], shape[1], cfg.channels, cfg.mults, cfg.blocks,
                       cfg.attention, cfg.heads, cfg.groups, cfg.dropout, cfg.patch,
                       fourier)
    network.register_buffer("sigma_data", torch.tensor(0.5))
    return network


# %% 5. Training


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


def train(cfg, run, data, model=None):
    """Train on data.train and return the averaged network. Source: [SDE] Eq. 7.

    model: the network to train, with its buffer sigma_data; that of cfg if None.
    """
    sde, images = make_sde(cfg), len(data.shape) == 3
    model = run.place(make_network(cfg, data.shape) if model is None else model)
    model.sigma_data.fill_(data.train.std())
    ema = EMA(model, cfg.ema)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, weight_decay=cfg.weight_decay,
        fused=run.device.type != "mps")  # updates all weights in one call

    # run.steps: progress bar, checkpoints, resume, Ctrl-C (common/run.py)
    for step in run.steps(cfg.steps, model=model, ema=ema.model, optimizer=optimizer):
        set_learning_rate(optimizer, cfg, step)
        x0, _ = run.batch(data.train)
        x0 = dequantize(x0) if cfg.dequantize and images else x0
        t, density = (part.to(run.device) for part in
                      draw_times(sde, len(x0), cfg.weighting))
        eps = torch.randn_like(x0)
        with run.autocast():
            loss = score_loss(model, sde, x0, t, eps, cfg.weighting, density)
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(model)  # over all processes; alone it does nothing
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        ema.update(model, step)
        run.log(loss=loss, grad_norm=norm)
        if run.main and (step + 1) % cfg.preview_every == 0:
            figure_preview(run, ema.model, sde, data, step + 1)
    return ema.model


# %% 6. Likelihood ([SDE] Sec. 4.3, App. D.2)


def log_likelihood(score, sde, x, trace="exact", probe="rademacher", tolerance=1e-5,
                   eps=1e-5):
    """log p_eps(x) in nats: (B, ...) -> (B,), by RK45.

    trace: "exact" takes a backward pass for each dimension, "hutchinson" one, with a
    probe v ("rademacher" or "gaussian") that stays the same along the trajectory.
    """
    x = x.detach()
    v = torch.randn_like(x) if probe == "gaussian" else torch.randint_like(x, 2) * 2 - 1

    @torch.enable_grad()
    def velocity(state, t):
        x = state[0].detach().requires_grad_()
        drift = flow_drift(score, sde, x, t)
        if trace == "hutchinson":
            # [SDE] Eq. 40: div = E v^T (d drift / dx) v
            vJ = torch.autograd.grad(drift, x, v)[0]
            return drift, (vJ * v).flatten(1).sum(1)
        flat, divergence = drift.flatten(1), 0
        for i in range(flat.shape[1]):
            row = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0]
            divergence = divergence + row.flatten(1)[:, i]
        return drift, divergence

    start = x, x.new_zeros(len(x))
    xT, change = final(solve(velocity, start, eps, sde.T, tolerance))
    # [SDE] Eq. 39: log p_0(x_0) = log p_T(x_T) + integral over t of div drift(x_t, t)
    return sde.prior_logp(xT) + change


def dequantize(x):
    """Spread 8-bit x = k / 127.5 - 1 over its bin: (k + u) / 128 - 1, u in [0, 1)."""
    k = (x + 1) * 127.5
    return (k + torch.rand_like(x)) / 128 - 1


def bits_per_dim(score, sde, x, tolerance=1e-5):
    """Bits per dimension of 8-bit images x: (B, C, H, W) -> (B,).

    One uniform dequantization gives an upper bound of -log_2 P(x) in expectation. A bin
    is 2/256 wide, hence the 7. Anything but 8-bit images raises ValueError.
    """
    if not is_8bit(x):
        raise ValueError("bits/dim needs 8-bit images scaled to [-1, 1]")
    logp = log_likelihood(score, sde, dequantize(x), "hutchinson", tolerance=tolerance)
    return -logp / (x[0].numel() * math.log(2)) + 7


# %% 7. Main


@plotting.figure("preview.png")
def figure_preview(run, model, sde, data, step):
    """preview.png: x0_hat of held-out x_t at a few t, each from one network call."""
    x0 = data.test[:6 if len(data.shape) == 3 else 1000]
    generator = torch.Generator().manual_seed(0)  # leaves the draws of training alone
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    score, parts = score_fn(model, sde), [("held out", x0)]
    for t in (0.1, 0.3, 0.5, 0.7):
        mean, std = sde.marginal(x0, batch_time(t, x0))
        xt = mean + std * eps
        parts += [(f"x_t, t = {t}", xt), ("x0_hat", tweedie(score, sde, xt, t))]
    title = f"What one network call recovers, step {step}"
    if x0.ndim == 4:
        labels, rows = zip(*parts, strict=True)
        plotting.table(run.path("preview.png"), rows, title, labels)
    else:
        plotting.panels(run.path("preview.png"), parts, title)


@plotting.figure("loss.png")
def figure_loss(run, model, sde, data):
    """loss.png: the training loss, and the loss of held-out examples by t."""
    x0 = data.test[:200]

    def loss(low, high):
        t = low + (high - low) * torch.rand(len(x0), device=x0.device)
        t = t.clamp(min=sde.eps_train)
        return score_loss(model, sde, x0, t, torch.randn_like(x0)).item()

    edges = [sde.T * i / 10 for i in range(11)]
    plotting.curves(run.path("loss.png"), [
        plotting.loss_curve(run.read_log(), "training loss"),
        plotting.loss_by_t(loss, edges, "held-out loss by t")])


def rescaled(sde, x, t):
    """x_t over the root of m^2 + std^2, so that VE's large noise fits a picture."""
    t = torch.tensor(t, dtype=torch.float64)
    return x / math.sqrt(sde.m(t).item() ** 2 + sde.std(t).item() ** 2)


@plotting.figure("denoising.gif")
def figure_denoising(run, sde, states):
    """denoising.gif: samples on their way from noise, rescaled."""
    frames = [(t, rescaled(sde, x, t)) for t, x in plotting.evenly(list(states), 33)]
    if frames[0][1].ndim == 4:
        plotting.denoising(run.path("denoising.gif"), frames)
    else:
        plotting.film(run.path("denoising.gif"), [x for _, x in frames],
                      [f"t = {t:.2f}" for t, _ in frames])


def make_methods(cfg, sde, calls=200):
    """{name: Config} of every sampler, with N for about so many network calls."""
    words = {"reverse": "reverse diffusion", "ancestral": "ancestral",
             "flow": "probability flow"}
    if not sde.has_ancestral:
        del words["ancestral"]
    alone = replace(cfg, sampler="pc", corrector_steps=0, N=calls)
    both = replace(cfg, sampler="pc", corrector_steps=1, N=max(1, calls // 2))
    methods = {"Euler–Maruyama": replace(cfg, sampler="em", N=calls)}
    for predictor, word in words.items():
        methods[word] = replace(alone, predictor=predictor)
    for predictor, word in words.items():
        methods[f"{word}, corrector"] = replace(both, predictor=predictor)
    methods["corrector alone"] = replace(both, predictor="none", N=calls)
    methods["ODE, RK45"] = replace(cfg, sampler="rk45")
    methods["ODE, RK4"] = replace(cfg, sampler="rk4", N=calls)
    return methods


@plotting.figure("samplers.png")
def figure_samplers(run, cfg, model, score, sde, xT):
    """samplers.png: the draws of each sampler in a row, from the same noise xT."""
    rows, labels = [], []
    for name, method in make_methods(cfg, sde, min(200, cfg.N)).items():
        if name == "ODE, RK4":
            continue  # it solves RK45's equation from RK45's noise: the same picture
        with counted(model) as calls:
            rows.append(final(sampling_process(method, score, sde, xT)))
        labels.append(f"{name}\n{len(calls)} calls")
    plotting.table(run.path("samplers.png"), rows, f"{len(xT)} draws by each sampler",
                   labels)


@plotting.figure("scores.png")
def figure_scores(run, score, sde, data):
    """scores.png: the score of points at four t, chosen by std / m of the noise."""
    line, parts, x0 = torch.linspace(-2.2, 2.2, 22), [], data.test[:1500]
    where = torch.cartesian_prod(line, line).to(x0.device)
    every_t = torch.linspace(sde.eps, sde.T, 1000)
    for noise in (0.05, 0.2, 0.5, 0.9):
        ratio = sde.std(every_t) / sde.m(every_t)
        t = every_t[(ratio - noise).abs().argmin()].item()
        mean, std = sde.marginal(x0, batch_time(t, x0))
        arrows = score(where, batch_time(t, where))
        arrows = arrows / arrows.norm(dim=1, keepdim=True).clamp(min=1e-9).sqrt()
        parts.append((f"t = {t:.2f}", mean + std * torch.randn_like(x0), where, arrows))
    plotting.fields(run.path("scores.png"), parts,
                    "The score, its length as a square root, over the noisy data")


def measure_likelihood(run, cfg, model, sde, data):
    """Bits/dim of held-out 8-bit images, nats of held-out points; nothing is clamped.

    With --evaluate it takes all held-out images.
    """
    images, score = len(data.shape) == 3, score_fn(model, sde, cfg.std_floor)
    if not cfg.likelihood or data.empty or images and not is_8bit(data.test):
        return
    x = data.test if run.opts.evaluate else data.test[:cfg.likelihood]
    measure, name = (bits_per_dim, "bits/dim") if images else (log_likelihood, "nats")
    try:
        found = torch.cat([measure(score, sde, part, tolerance=cfg.tolerance)
                           for part in tqdm(x.split(100 if images else 10_000), name,
                                            leave=False)])
    except FloatingPointError as problem:
        return run.say(f"no {name}: {problem}")
    error = found.std().item() / math.sqrt(len(found)) if len(found) > 1 else None
    run.add_metrics(**{"bits_per_dim" if images else "nats": {
        "n": len(x), "mean": found.mean().item(), "standard_error": error}})


def check_settings(run, cfg, sde, data):
    """Raise Mistake where cfg asks for something that the data or the SDE lacks."""
    images = len(data.shape) == 3
    of_images = ("flip", "dequantize", "image_size", "channels", "mults", "blocks",
                 "attention", "heads", "groups", "dropout", "patch")
    for name in ("hidden", "layers") if images else of_images:
        if run.opts.given.get(name):
            raise Mistake(f"{name} needs {'points' if images else 'images'}: --dataset "
                          f"{cfg.dataset} has none")
    if cfg.sampler == "ancestral" and not sde.has_ancestral:
        raise Mistake("sampler ancestral: must be em, reverse, pc, rk45 or rk4 with "
                      f"--sde {cfg.sde}")
    if cfg.predictor == "ancestral" and not sde.has_ancestral:
        raise Mistake("predictor ancestral: must be reverse, flow or none with "
                      f"--sde {cfg.sde}")
    if (cfg.sampler, cfg.predictor, cfg.corrector_steps) == ("pc", "none", 0):
        raise Mistake("corrector_steps 0: must be at least 1 with --predictor none")
    if run.opts.given.get("likelihood") and images and not is_8bit(data.test):
        raise Mistake(f"likelihood {cfg.likelihood}: --dataset {cfg.dataset} must be "
                      "points, or images of 8 bits at this resolution")


@command_line
def main(argv=None):
    """Train a network, or load one; then draw samples, and score them if asked to."""
    cfg, run = open_run("score_based", Config, PRESETS, SAMPLING, argv)
    sde = make_sde(cfg)
    data = run.load(load_data, cfg.dataset, cfg.image_size)
    images = len(data.shape) == 3
    check_settings(run, cfg, sde, data)
    if run.sampling:
        model = run.trained(make_network(cfg, data.shape))
    else:
        model = train(cfg, run, data)
    if not run.main:
        return  # of several processes only the first one draws

    score = score_fn(model, sde, cfg.std_floor, cfg.clip_x0 and images)

    def states(batch):
        xT = sde.prior_sampling((len(batch), *data.shape), run.device)
        return sampling_process(cfg, score, sde, xT)

    n, batch_size = (cfg.n_samples, 100) if images else (100 * cfg.n_samples, 10_000)
    samples, timing = run.draw(n, states, model, cfg.N, batch_size)
    run.add_metrics(sampling=timing | {"sampler": cfg.sampler})
    plotting.samples(run.path("samples.png"), samples, data, "Drawn from noise")
    figure_loss(run, model, sde, data)
    if images:
        run.add_metrics(samples=quality.glance(samples, data))
        figure_denoising(run, sde, states(range(9)))
        xT = sde.prior_sampling((10, *data.shape), run.device)
        figure_samplers(run, cfg, model, score, sde, xT)
    else:
        xT = sde.prior_sampling((2000, *data.shape), run.device)
        figure_denoising(run, sde, sde_process(em_step, score, sde, xT, 400))
        figure_scores(run, score, sde, data)
    measure_likelihood(run, cfg, model, sde, data)
    run.evaluate(states, model, cfg.N, data)
    run.finish("experiments/score_based.py")


if __name__ == "__main__":
    main()
