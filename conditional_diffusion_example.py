"""Classifier-free guidance (Ho, Salimans, arXiv 2207.12598): [CFG], classifier guidance
(Dhariwal, Nichol, arXiv 2105.05233): [ADM], and diffusion transformers (Peebles, Xie,
arXiv 2212.09748): [DiT], on [DDPM] (2006.11239) and [DDIM] (2010.02502).

    python conditional_diffusion_example.py                  train and draw digits
    python conditional_diffusion_example.py --sample --classes 3 1 4 1 5 --w 0 1 3 8
    python conditional_diffusion_example.py --p_uncond 1 --guidance classifier
    python experiments/conditional.py --evaluate 500         accuracy against w, figures

x_t and y are [CFG]'s z_lambda and c. w = 0 is the conditional model, w = -1 the
unconditional one. Classifier guidance, and most other code, use the scale s = 1 + w.

Departures from the papers:
  1. t is one of 1..T as in [DDPM], and the variance is fixed ([ADM], [DiT]: learnt);
  2. the networks are small, predict v (`predict`) and fold patches of pixels into
     channels; of [ADM]'s U-Net only the norm is here, and the 64-channel heads in the
     preset; the noisy classifier ends in a mean, not in attention;
  3. x0_hat is clamped in sampling (`clip_x0`), with a classifier before its gradient is
     added, as in [ADM]'s code; a classifier guides the unconditional network alone,
     best one that was trained without labels (`--p_uncond 1`);
  4. training draws the middle t more often (`drawing`), the learning rate decays,
     gradients are clipped, and the average of the weights is shorter and warms up.
"""

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common import plotting, quality
from common.cli import (Count, Fraction, Mistake, NonNegative, OpenFraction, Positive,
                        Probability, Range, Whole, check_multiple, check_sizes,
                        command_line)
from common.data import cached, load_images
from common.device import seeded
from common.run import open_run

Guidance = Literal["classifier_free", "classifier", "none"]
Drawing = Literal["uniform", "logit_normal"]
Weight = Annotated[float, Range(">= -1", lambda w: w >= -1)]


@dataclass(frozen=True)  # (paper: ...) is [CFG] for guidance, otherwise [ADM]
class Config:
    """Each field is a flag. Its type gives the range, its comment is the help text."""

    # diffusion
    T: Count = 1000              # diffusion steps (paper: 1000)
    schedule: Literal["linear", "cosine"] = "linear"  # noise schedule (paper: both)
    beta_1: OpenFraction = 1e-4  # linear schedule: beta_1 for T = 1000 (paper: 1e-4)
    beta_T: OpenFraction = 0.02  # linear schedule: beta_T for T = 1000 (paper: 0.02)
    predict: Literal["eps", "v"] = "v"  # output of the network (paper, DiT: eps)
    p_uncond: Probability = 0.1  # probability of a null label (paper: 0.1, 0.2, 0.5)
    # sampling
    guidance: Guidance = "classifier_free"  # none: the conditional network as it is
    classes: tuple[str, ...] = ()   # classes to draw, in this order; all if empty
    w: tuple[Weight, ...] = (-1.0, 0.0, 1.0, 2.0, 4.0)  # of grid.png (with `classes`)
    w_samples: Weight = 2.0         # guidance weight of samples.png (paper: 0 to 4)
    classifier_steps: Count = 1500  # of the classifier (paper: 300000 or 500000)
    sampler: Literal["ddim", "ancestral"] = "ddim"  # S steps, or T (paper: both)
    S: Count = 10                   # DDIM steps (paper: 25 DDIM or 250 ancestral)
    eta: Probability = 0.0          # noise of DDIM, 0 (none) to 1 (DDPM) (paper: 0)
    spacing: Literal["linear", "quadratic"] = "linear"  # spacing of DDIM's steps
    variance: Literal["beta", "beta_tilde"] = "beta_tilde"  # of ancestral steps
    clip_x0: bool = True         # clamp x0_hat to [-1, 1] ([ADM]'s code: yes)
    n_samples: Count = 500       # number of images drawn if `classes` is empty
    # data
    dataset: str = "digits"      # digits, mnist, folder:PATH, ... (paper: imagenet)
    image_size: Whole = 0        # resize images to this resolution; 0 keeps theirs
    flip: bool = False           # mirror images at random (paper: yes; not for digits)
    # network
    backbone: Literal["unet", "dit"] = "unet"  # U-Net or Diffusion Transformer
    channels: Count = 32         # width of the U-Net, even, at least 4 (paper: 192)
    mults: tuple[Count, ...] = (1, 2)    # relative width of each level (paper: 1 2 3 4)
    blocks: Count = 1            # residual blocks per level (paper: 2 or 3)
    attention: tuple[Count, ...] = (7,)  # resolutions with attention (paper: 32 16 8)
    heads: Count = 1             # attention heads (paper: one for each 64 channels)
    groups: Count = 8            # groups in each group norm ([ADM]'s code: 32)
    dropout: Fraction = 0.0      # dropout in the blocks (paper: 0 or 0.1)
    patch: Count = 2             # patch x patch pixels become channels (paper: 1)
    dit_width: Count = 96        # width of the DiT, a multiple of 4 (DiT: 384 to 1152)
    dit_depth: Count = 4         # blocks of the DiT (DiT: 12 to 28)
    dit_heads: Count = 4         # attention heads of the DiT (DiT: 6 to 16)
    dit_patch: Count = 4         # patch size of the DiT (DiT: 2, 4 or 8)
    dit_kernel: Count = 3        # width in patches of its convolutions, odd (DiT: 1)
    # training
    drawing: Drawing = "logit_normal"  # distribution of t in training (paper: uniform)
    steps: Count = 5000          # optimiser steps (DiT: 400000 and more)
    batch_size: Count = 32       # images per step, over all processes (DiT: 256)
    lr: Positive = 2e-3          # peak learning rate (paper: 1e-4, 3e-4; DiT: 1e-4)
    warmup: Whole = 200          # steps of learning-rate warm-up (paper: 0)
    decay: Literal["cosine", "constant"] = "cosine"  # decay of lr (paper: constant)
    weight_decay: NonNegative = 0.0  # AdamW's weight decay; 0 gives Adam (paper: 0)
    grad_clip: Positive = 1.0    # largest norm of the gradient (paper: none)
    ema: Fraction = 0.999        # decay of the averaged weights (paper: 0.9999)
    preview_every: Count = 2500  # steps between previews and checkpoints


# The fields that may change after training
SAMPLING = (
    "guidance", "classes", "w", "w_samples", "classifier_steps", "sampler", "S", "eta",
    "spacing", "variance", "clip_x0", "n_samples")


DIT = Config(  # [DiT] Table 1 with patches of 2, trained as there, on CIFAR-10's pixels
    predict="eps", drawing="uniform", backbone="dit", dit_patch=2, dit_kernel=1,
    dataset="cifar10", flip=True, steps=400_000, batch_size=256, lr=1e-4, warmup=0,
    decay="constant", grad_clip=1e9, ema=0.9999, preview_every=5000,
    w=(0.0, 0.5, 1.5, 3.0), w_samples=0.5, S=250, eta=1.0, clip_x0=False,
    classifier_steps=50_000)
PRESETS = {
    "laptop": Config(),
    "smoke": Config(
        T=20, channels=8, groups=4, dit_width=16, dit_depth=2, dit_heads=2, steps=6,
        batch_size=8, warmup=2, preview_every=3, S=5, w=(0.0, 2.0), n_samples=20,
        classifier_steps=4),
    "ddpm_adagn": Config(  # [DDPM]'s CIFAR-10 network, [ADM]'s norm and heads
        predict="eps", drawing="uniform", dataset="cifar10", flip=True, channels=128,
        mults=(1, 2, 2, 2), blocks=2, attention=(16, 8), heads=4, groups=32,
        dropout=0.1, patch=1, steps=800_000, batch_size=128, lr=2e-4, warmup=5000,
        decay="constant", ema=0.9999, preview_every=5000, S=25,
        classifier_steps=50_000),
    "dit_s": replace(DIT, dit_width=384, dit_depth=12, dit_heads=6),
    "dit_b": replace(DIT, dit_width=768, dit_depth=12, dit_heads=12),
    "dit_l": replace(DIT, dit_width=1024, dit_depth=24, dit_heads=16),
    "dit_xl": replace(DIT, dit_width=1152, dit_depth=28, dit_heads=16),
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


# %% 2. Training objective ([CFG] Alg. 1)


def drop_labels(y, p_uncond, null):
    """Replace each label of y: (B,) by the null class with probability p_uncond."""
    # [CFG] Alg. 1, line 3: c <- the empty set with probability p_uncond
    dropped = torch.rand(len(y), device=y.device) < p_uncond
    return torch.where(dropped, null, y)


def ddpm_loss(model, x0, t, eps, schedule):
    """The simple objective. x0, eps: (B, C, H, W); t: (B,) int64 in 1..T -> scalar.

    It is the bound with every weight of Eq. 12 set to 1, so the terms of small t count
    for less. This takes the mean over pixels where the paper takes their sum.
    """
    # [DDPM] Eq. 14: E |eps - eps_theta(sqrt(alpha_bar_t) x_0
    #                                   + sqrt(1 - alpha_bar_t) eps, t)|^2
    xt = q_sample(x0, t, eps, schedule.alpha_bars)
    return F.mse_loss(model(xt, t), eps)


def v_loss(model, x0, t, eps, schedule):
    """The squared error of v. x0, eps: (B, C, H, W); t: (B,) int64 in 1..T -> scalar.

    model(xt, t, v=True) gives v_hat. Since x_t is given, eps_hat - eps is
    sqrt(alpha_bar_t) (v_hat - v), so large t count for more than in `ddpm_loss`.
    """
    xt = q_sample(x0, t, eps, schedule.alpha_bars)
    alpha_bar = schedule.alpha_bars[t].view(-1, 1, 1, 1)
    # arXiv 2202.00512, App. D: v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
    return F.mse_loss(model(xt, t, v=True), v)


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


# %% 3. Guidance ([CFG] Sec. 3.2, [ADM] Sec. 4)


def per_image(value, x):
    """Shape a number, or one for each image, (B,), to broadcast over (B, C, H, W)."""
    return torch.as_tensor(value, dtype=x.dtype).to(x.device).view(-1, 1, 1, 1)


def cfg_eps(model, xt, t, y, w):
    """Guide a network that was trained with and without labels -> like xt.

    xt: (B, C, H, W); t: int or (B,) int64; y: (B,) int64; w: number or (B,). One call
    of the network serves both terms; the null class is y = model.classes.
    """
    t = torch.as_tensor(t, device=xt.device).expand(len(xt))
    null = torch.full_like(y, model.classes)
    both = model(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([y, null]))
    eps_c, eps_u = both.chunk(2)
    w = per_image(w, xt)
    # [CFG] Eq. 6; Alg. 2, line 3: (1 + w) eps_theta(x_t, y) - w eps_theta(x_t)
    return (1 + w) * eps_c - w * eps_u


def classifier_gradient(classifier, xt, t, y):
    """The gradient of log p(y | x_t) with respect to x_t, like xt. t, y: (B,) int64."""
    with torch.enable_grad():
        xt = xt.detach().requires_grad_()
        log_p = classifier(xt, t).log_softmax(1).gather(1, y[:, None]).sum()
        return torch.autograd.grad(log_p, xt)[0]


def classifier_guided_eps(model, classifier, xt, t, y, s, alpha_bars):
    """Guide the unconditional network by a classifier of noisy images -> like xt.

    xt: (B, C, H, W); t: int or (B,) int64; y: (B,) int64; s: number or (B,), the scale
    of [ADM] Sec. 4.3. classifier(xt, t) gives logits: (B, classes). With exact networks
    s = 1 + w makes this the same as `cfg_eps`.
    """
    t = torch.as_tensor(t, device=xt.device).expand(len(xt))
    alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
    eps_u = model(xt, t, torch.full_like(y, model.classes))
    gradient = classifier_gradient(classifier, xt, t, y)
    # [ADM] Eq. 14 with the scale s of Sec. 4.3, an input of Alg. 2:
    # eps_hat = eps_theta(x_t) - sqrt(1 - alpha_bar_t) s grad log p(y | x_t)
    return eps_u - (1 - alpha_bar).sqrt() * per_image(s, xt) * gradient


def ancestral_scale(s, t, schedule, variance="beta_tilde"):
    """The s of `classifier_guided_eps` that moves the mean of Alg. 1 by s sigma_t^2 g.

    g is the classifier's gradient, at x_t as in the authors' algorithm and code; their
    derivation (Eq. 5, 6) has it at the mean. s: number or (B,); t: (B,) in 1..T.
    """
    beta, alpha, _ = (array[t] for array in schedule)
    sigma2 = beta if variance == "beta" else beta_tilde(t, schedule)
    # [ADM] Alg. 1: the mean is mu + s sigma_t^2 g. By [DDPM] Eq. 11, changing eps_hat
    # by -sqrt(1 - alpha_bar_t) s_t g moves mu by s_t beta_t / sqrt(alpha_t) g, so that
    # s_t = s sigma_t^2 sqrt(alpha_t) / beta_t.
    s = torch.as_tensor(s, dtype=beta.dtype).to(t.device)
    return s * sigma2 * alpha.sqrt() / beta


class ClippedModel:
    """A network whose x0_hat is clamped before anything is added to its eps_hat."""

    def __init__(self, model, alpha_bars):
        self.model, self.classes, self.alpha_bars = model, model.classes, alpha_bars

    def __call__(self, xt, t, y):
        return clip_eps(xt, self.model(xt, t, y), t, self.alpha_bars)


# %% 4. Sampling ([DDPM] Sec. 3.2, [DDIM] Sec. 4): `model` is any eps_hat(x_t, t)


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
def ddim_process(model, xT, schedule, S=50, eta=0.0, spacing="linear", clip_x0=True):
    """S steps of DDIM (eta = 0) or DDPM (eta = 1). Yields (T, x_T), ..., (0, x_0).

    xT: (B, C, H, W), standard normal noise. Source: [DDIM] Eq. 12, Sec. 4.2.
    """
    xt, alpha_bars = xT, schedule.alpha_bars
    tau = [0, *ddim_timesteps(schedule.T, S, spacing)]
    for i in range(S, 0, -1):
        yield tau[i], xt
        eps_hat = model(xt, torch.full((len(xt),), tau[i], device=xt.device))
        if clip_x0:
            eps_hat = clip_eps(xt, eps_hat, tau[i], alpha_bars)
        z = torch.randn_like(xt) if eta > 0 else 0.0
        xt = ddim_step(xt, eps_hat, tau[i], tau[i - 1], alpha_bars, eta, z)
    yield 0, xt


def guided_process(cfg, model, xT, schedule, y, w, classifier=None):
    """Draw images of the classes y: (B,) int64, as cfg asks for. Yields (t, x_t).

    xT: (B, C, H, W), standard normal noise; w: number or (B,), with a classifier s - 1.
    """
    eps_model, clip_x0 = partial(model, y=y), cfg.clip_x0  # no guidance
    if cfg.guidance == "classifier_free":  # [CFG] Alg. 2
        eps_model = partial(cfg_eps, model, y=y, w=w)
    if cfg.guidance == "classifier":  # [ADM] Alg. 1, 2
        network = ClippedModel(model, schedule.alpha_bars) if clip_x0 else model
        clip_x0 = False  # the gradient may lead out of [-1, 1]

        def eps_model(xt, t):
            s = 1 + torch.as_tensor(w)
            if cfg.sampler == "ancestral":
                s = ancestral_scale(s, t, schedule, cfg.variance)
            return classifier_guided_eps(network, classifier, xt, t, y, s,
                                         schedule.alpha_bars)

    if cfg.sampler == "ddim":
        return ddim_process(eps_model, xT, schedule, cfg.S, cfg.eta, cfg.spacing,
                            clip_x0)
    return reverse_process(eps_model, xT, schedule, cfg.variance, clip_x0)


def sample(cfg, model, xT, schedule, y, w, classifier=None):
    """Draw images of the classes y: (B,), starting from the noise xT -> like xT."""
    for _, xt in guided_process(cfg, model, xT, schedule, y, w, classifier):
        pass
    return xt


# %% 5. Networks ([DDPM] App. B, [ADM] Sec. 3.1, [DiT] Sec. 3.2)


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
    """Two convolutions, with time and class in the second norm ([ADM] Sec. 3.1)."""

    recompute = True  # --grad_checkpointing: not stored, computed again going back

    def __init__(self, c_in, c_out, time_dim, groups, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):  # (B, c_in, H, W), (B, time_dim)
        h = self.conv1(F.silu(self.norm1(x)))               # (B, c_out, H, W)
        y_s, y_b = self.time(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        # [ADM] Sec. 3.1: AdaGN(h, y) = y_s GroupNorm(h) + y_b; as 1 + y_s in their code
        h = self.norm2(h) * (1 + y_s) + y_b
        h = self.conv2(self.dropout(F.silu(h)))
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
    """eps_hat(x_t, t, y) or v_hat. x: (B, C, H, W), t: (B,) int64 or float -> like x.

    y: (B,) int64 in 0..classes; `classes` itself, or None, is the null class.
    H and W must be multiples of patch * 2^(levels - 1). attention: the resolutions,
    counted in patches, at which self-attention follows each residual block; the middle
    always has it. Source: [DDPM] App. B, with the labels of [ADM] Sec. 3.1.
    """

    def __init__(self, image_channels=3, image_size=32, channels=128,
                 mults=(1, 2, 2, 2), blocks=2, attention=(16,), heads=1, groups=32,
                 dropout=0.1, patch=1, classes=10):
        super().__init__()
        check_sizes(image_size, channels, mults, attention, heads, groups, patch)
        self.channels, self.patch, self.classes = channels, patch, classes
        self.levels, self.blocks = len(mults), blocks
        widths = [channels * mult for mult in mults]
        sizes = [image_size // patch // 2**level for level in range(len(mults))]
        time_dim = 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, time_dim), nn.SiLU(),
                                  nn.Linear(time_dim, time_dim))
        self.label = nn.Embedding(classes + 1, time_dim)  # the last is the null class

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

    def forward(self, x, t, y=None):
        y = torch.full_like(t, self.classes, dtype=torch.int64) if y is None else y
        emb = timestep_embedding(t, self.channels).to(x.dtype)      # (B, channels)
        emb = self.time(emb) + self.label(y)                        # (B, 4 channels)
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


def modulate(x, shift, scale):
    """Shift and scale tokens x: (B, N, width) by shift, scale: (B, width)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Attention and MLP on tokens (B, N, width), with an adaLN-Zero norm before each.

    The embedding c: (B, width) of time and class shifts, scales and gates both; the
    gates start at zero, so the block starts as the identity. Source: [DiT] Sec. 3.2.
    """

    recompute = True  # --grad_checkpointing: not stored, computed again going back

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"),
            nn.Dropout(dropout), nn.Linear(4 * width, width))
        self.condition = nn.Linear(width, 6 * width)

    def attend(self, x):
        B, N, width = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                # (B, heads, N, width/heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.out(h.transpose(1, 2).reshape(B, N, width))

    def forward(self, x, c):
        parts = self.condition(F.silu(c)).chunk(6, dim=1)   # each (B, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        # [DiT] Sec. 3.2: x <- x + gate attention((1 + scale) norm(x) + shift), then MLP
        x = x + gate1[:, None] * self.attend(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


def positions_2d(rows, columns, width, device=None):
    """Sines and cosines of the row, then of the column: (rows * columns, width).

    Source: [DiT] Sec. 3.2; its code, from MAE (arXiv 2111.06377), has the column first.
    """
    k = torch.arange(width // 4, device=device) / (width // 4)
    frequencies = 10000.0 ** -k

    def line(n):
        angles = torch.arange(n, device=device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (n, width / 2)

    down = line(rows).repeat_interleave(columns, 0)
    across = line(columns).repeat(rows, 1)
    return torch.cat([down, across], dim=1)


class DiT(nn.Module):
    """A transformer, eps_hat(x_t, t, y) or v_hat. x: (B, C, H, W), t: (B,) -> like x.

    H and W must be multiples of patch. y: (B,) int64 in 0..classes; `classes` itself,
    or None, is the null class. kernel: the width, in patches, of the first and the last
    convolution; 1 is the paper's linear layer. Source: [DiT] Sec. 3.2.
    """

    def __init__(self, image_channels=4, image_size=32, patch=2, width=384, depth=12,
                 heads=6, classes=1000, dropout=0.0, kernel=1):
        super().__init__()
        if width % 4:
            raise Mistake(f"dit_width {width}: must be a multiple of 4 (positions)")
        if width % heads:
            raise Mistake(f"dit_heads {heads}: must divide --dit_width {width}")
        if kernel % 2 == 0:
            raise Mistake(f"dit_kernel {kernel}: must be odd")
        check_multiple(image_size, patch, "dit_patch")
        self.classes, self.patch, self.width = classes, patch, width
        self.embed = nn.Conv2d(image_channels * patch**2, width, kernel,
                               padding=kernel // 2)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(),
                                  nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)  # the last is the null class
        self.blocks = nn.ModuleList(
            DiTBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.condition = nn.Linear(width, 2 * width)
        self.out = nn.Conv2d(width, image_channels * patch**2, kernel,
                             padding=kernel // 2)
        for layer in self.modules():  # as in the authors' code for kernel = 1
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in (self.time[0], self.time[2], self.label):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self, *self.blocks):
            zero_init(layer.condition)
        zero_init(self.out)

    def forward(self, x, t, y=None):
        y = torch.full_like(t, self.classes, dtype=torch.int64) if y is None else y
        c = self.time(timestep_embedding(t, 256).to(x.dtype)) + self.label(y)
        h = self.embed(F.pixel_unshuffle(x, self.patch))    # (B, width, rows, columns)
        rows, columns = h.shape[2:]
        positions = positions_2d(rows, columns, self.width, x.device).to(x.dtype)
        h = h.flatten(2).transpose(1, 2) + positions        # (B, N, width)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.condition(F.silu(c)).chunk(2, dim=1)
        h = modulate(self.norm(h), shift, scale).transpose(1, 2)
        h = self.out(h.unflatten(2, (rows, columns)))       # (B, C p^2, rows, columns)
        return F.pixel_shuffle(h, self.patch)               # (B, C, H, W)


class VPrediction(nn.Module):
    """eps_hat(x_t, t, y) of a network that gives v_hat; with v=True v_hat itself.

    eps_hat holds x_t itself, so a DiT need not carry its noise through the tokens.
    """

    def __init__(self, network, alpha_bars):
        super().__init__()
        self.network, self.classes = network, network.classes
        self.register_buffer("alpha_bars", alpha_bars, persistent=False)

    def forward(self, x, t, y=None, v=False):
        v_hat = self.network(x, t, y)
        if v:
            return v_hat
        alpha_bar = self.alpha_bars[t].view(-1, 1, 1, 1).to(x.dtype)
        # arXiv 2202.00512, App. D, solved for eps:
        # eps_hat = sqrt(alpha_bar_t) v_hat + sqrt(1 - alpha_bar_t) x_t
        return alpha_bar.sqrt() * v_hat + (1 - alpha_bar).sqrt() * x


def make_model(cfg, shape, classes):
    """The network that cfg describes, for images of shape (C, H, W)."""
    if cfg.backbone == "dit":
        model = DiT(shape[0], shape[1], cfg.dit_patch, cfg.dit_width, cfg.dit_depth,
                    cfg.dit_heads, classes, cfg.dropout, cfg.dit_kernel)
    else:
        model = UNet(shape[0], shape[1], cfg.channels, cfg.mults, cfg.blocks,
                     cfg.attention, cfg.heads, cfg.groups, cfg.dropout, cfg.patch,
                     classes)
    if cfg.predict == "v":
        schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
        model = VPrediction(model, schedule.alpha_bars)
    return model


class NoisyClassifier(nn.Module):
    """Logits of p(y | x_t). x: (B, C, H, W), t: (B,) -> (B, classes).

    It is a small version of the U-Net's way down; [ADM] Sec. 4.3 ends in attention.
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
        h = F.interpolate(h, (H, W))  # a 4 x 4 image is one pixel here
        # the mean of each quarter, with windows that MPS supports for odd sizes
        h = F.avg_pool2d(h, ((H + 1) // 2, (W + 1) // 2), (H // 2, W // 2))
        return self.out(h.flatten(1))


# %% 6. Training ([CFG] Alg. 1, [ADM] Sec. 4.3)


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
    """Train on data.train and return the averaged network. Source: [CFG] Alg. 1."""
    classes = len(data.classes)
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(run.device)
    model = run.place(make_model(cfg, data.shape, classes))
    objective = v_loss if cfg.predict == "v" else ddpm_loss
    ema = EMA(model, cfg.ema)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, weight_decay=cfg.weight_decay,
        fused=run.device.type != "mps")  # updates all weights in one call

    # run.steps: progress bar, checkpoints, resume, Ctrl-C (common/run.py)
    for step in run.steps(cfg.steps, model=model, ema=ema.model, optimizer=optimizer):
        set_learning_rate(optimizer, cfg, step)
        x0, y = run.batch(data.train, data.train_labels)            # Alg. 1, line 2
        y = drop_labels(y, cfg.p_uncond, null=classes)              # line 3
        t = draw_t(len(x0), cfg.T, cfg.drawing).to(run.device)      # line 4
        eps = torch.randn_like(x0)                                  # line 5
        with run.autocast():                                        # lines 6 and 7
            loss = objective(partial(model, y=y), x0, t, eps, schedule)
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


def train_classifier(cfg, run, data, schedule):
    """Train the classifier of noisy images, once: its weights are kept on disk."""
    def make():
        patch = 2 if data.shape[1] % 2 == 0 else 1
        return run.place(NoisyClassifier(data.shape[0], len(data.classes), patch=patch))

    def fit(classifier):
        optimizer = torch.optim.AdamW(classifier.parameters(), 3e-3, weight_decay=0.05,
                                      fused=run.device.type != "mps")
        classifier_cfg = replace(cfg, lr=3e-3, steps=cfg.classifier_steps)
        for step in run.steps(cfg.classifier_steps, "classifier", save=False,
                              classifier=classifier, optimizer=optimizer):
            set_learning_rate(optimizer, classifier_cfg, step)
            x0, y = run.batch(data.train, data.train_labels, size=64)
            shift = tuple(torch.randint(-2, 3, (2,)).tolist())
            x0 = torch.roll(x0, shift, dims=(2, 3))  # in place of [ADM]'s random crops
            t = torch.randint(1, cfg.T + 1, (len(x0),), device=x0.device)
            xt = q_sample(x0, t, torch.randn_like(x0), schedule.alpha_bars)
            with run.autocast():
                loss = F.cross_entropy(classifier(xt, t), y)
            optimizer.zero_grad()
            loss.backward()
            run.average_gradients(classifier)
            norm = nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
            run.log(loss=loss, grad_norm=norm)
        return not run.stopped  # an unfinished classifier is not kept

    key = (data.shape, data.fingerprint(), cfg.schedule, cfg.T, cfg.beta_1,
           cfg.beta_T, cfg.classifier_steps, cfg.warmup, cfg.decay, cfg.flip)
    with seeded(2025, run.device):
        classifier = cached(f"noisy_classifier_{data.name}", key, make, fit)
    return classifier.eval().requires_grad_(False)


# %% 7. Main


@plotting.figure("preview.png")
def figure_preview(run, model, data, schedule, step):
    """preview.png: x0_hat of held-out x_t, with the right label and without one."""
    x0, y = data.test[:6], data.test_labels[:6]
    generator = torch.Generator().manual_seed(0)  # leaves the draws of training alone
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    rows, labels = [x0], ["held out"]
    for fraction in (0.3, 0.5, 0.8):
        t = torch.full((len(x0),), max(1, round(schedule.T * fraction)),
                       device=x0.device)
        xt = q_sample(x0, t, eps, schedule.alpha_bars)
        rows += [xt, predict_x0(xt, model(xt, t, y), t, schedule.alpha_bars),
                 predict_x0(xt, model(xt, t), t, schedule.alpha_bars)]
        labels += [f"x_t, t = {t[0]}", "x0_hat, label", "x0_hat, none"]
    plotting.table(run.path("preview.png"), rows,
                   f"What one network call recovers, step {step}", labels)


@plotting.figure("samples.png", compares=False)
def figure_samples(run, cfg, samples, y, data):
    """samples.png: samples, one class in each row, beside real images of it.

    Classes that were asked for stand in one row, in their order, above real images.
    """
    label = weight_label(cfg, cfg.w_samples)
    if cfg.classes:
        rows, labels = [samples], [label]
        if not data.empty:
            rows.append(torch.stack([data.train[data.train_labels == c][i % 2]
                                     for i, c in enumerate(y)]))
            labels.append("real")
        plotting.table(run.path("samples.png"), rows, "As asked for", labels,
                       [data.classes[c] for c in y])
        return
    kinds = y.unique()[:10]
    steps = f"{cfg.S} DDIM steps" if cfg.sampler == "ddim" else f"{cfg.T} steps"
    both = [(f"{steps}, {label}", samples, y)]
    if not data.empty:
        both.append(("real, held out", data.test, data.test_labels))
    n = max(1, min(10, *((labels == c).sum() for _, _, labels in both for c in kinds)))
    plotting.panels(run.path("samples.png"), [
        (name, torch.cat([x[labels == c][:n] for c in kinds]))
        for name, x, labels in both], "Each row one class", n)


@plotting.figure("grid.png", compares=False)
def figure_grid(run, cfg, draw, data, classes):
    """grid.png: a column for each class and its noise, a row for each weight."""
    weights = cfg.w if cfg.guidance != "none" else (0.0,)
    xT = torch.randn(len(classes), *data.shape, device=run.device)
    y = torch.tensor(classes, device=run.device)
    plotting.table(run.path("grid.png"), [draw(xT, y, w) for w in weights],
                   "Each column one noise and class",
                   [weight_label(cfg, w) for w in weights],
                   [data.classes[c] for c in classes])


def weight_label(cfg, w):
    """The text that stands for a guidance weight in the figures."""
    if cfg.guidance == "none":
        return "no guidance"
    if w == -1:
        return "unconditional"
    return f"s = {1 + w:g}" if cfg.guidance == "classifier" else f"w = {w:g}"


def asked_classes(cfg, data):
    """The labels to draw. A Mistake if the data or the network cannot serve cfg."""
    if data.train_labels is None:
        raise Mistake(f"dataset {cfg.dataset}: has no labels to condition on")
    known = [*data.classes, *map(str, range(len(data.classes)))]  # names, or numbers
    for c in cfg.classes:
        if c not in known:
            raise Mistake(f"classes {c}: must be one of "
                          f"{', '.join(data.classes[:20])}")
    if not cfg.w:
        raise Mistake("w: needs at least one number")
    if cfg.p_uncond == 0 and cfg.guidance != "none":
        raise Mistake(f"p_uncond {cfg.p_uncond:g}: must be above 0 for guidance, which "
                      "asks the network for the null class")
    if cfg.p_uncond == 1 and cfg.guidance != "classifier":
        raise Mistake(f"p_uncond {cfg.p_uncond:g}: must be below 1 with --guidance "
                      f"{cfg.guidance}, or the network would never see a label")
    if cfg.sampler == "ddim":
        ddim_timesteps(cfg.T, cfg.S, cfg.spacing)  # a Mistake if S > T
    return [known.index(c) % len(data.classes) for c in cfg.classes or data.classes]


@command_line
def main(argv=None):
    """Train a network, or load one; then draw images, and score them if asked to."""
    cfg, run = open_run("conditional", Config, PRESETS, SAMPLING, argv)
    data = run.load(load_images, cfg.dataset, cfg.image_size)
    classes = asked_classes(cfg, data)
    if run.sampling:
        model = run.trained(make_model(cfg, data.shape, len(data.classes)))
    else:
        model = train(cfg, run, data)
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(run.device)
    classifier = None
    if cfg.guidance == "classifier" and not run.stopped:
        classifier = train_classifier(cfg, run, data, schedule)
    if not run.main:
        return  # of several processes only the first one draws
    if cfg.guidance == "classifier" and run.stopped:
        run.say("stopped: no classifier to guide the samples; --resume goes on")
        return run.finish()

    n = len(classes) if cfg.classes else cfg.n_samples
    steps = cfg.S if cfg.sampler == "ddim" else cfg.T
    i = torch.arange(max(n, run.opts.evaluate or 0)) % len(classes)
    y = torch.tensor(classes)[i].to(run.device)

    def draw(xT, y, w):
        return sample(cfg, model, xT, schedule, y, w, classifier)

    def states(batch):
        xT = torch.randn(len(batch), *data.shape, device=run.device)
        return guided_process(cfg, model, xT, schedule, y[batch.start:batch.stop],
                              cfg.w_samples, classifier)

    samples, timing = run.draw(n, states, model, steps)
    run.add_metrics(sampling=timing, samples=quality.glance(samples, data, y[:n]))
    figure_samples(run, cfg, samples, y[:n], data)
    if cfg.classes:
        figure_grid(run, cfg, draw, data, classes)
    plotting.denoising(run.path("denoising.gif"), states(range(min(10, n))), 10)
    plotting.curves(run.path("loss.png"), [
        plotting.loss_curve(run.read_log(), "training loss")])
    run.evaluate(states, model, steps, data, y[:run.opts.evaluate])
    run.finish("experiments/conditional.py")


if __name__ == "__main__":
    main()
