"""Conditional diffusion, after three papers: [CFG] Classifier-Free Diffusion Guidance
(Ho & Salimans, arXiv 2207.12598), [ADM] Diffusion Models Beat GANs on Image Synthesis
(Dhariwal & Nichol, arXiv 2105.05233), [DiT] Scalable Diffusion Models with Transformers
(Peebles & Xie, arXiv 2212.09748).

    python conditional_diffusion_example.py                  train, draw class by class
    python conditional_diffusion_example.py --sample --classes 3 1 4 1 5 --w 0 1 3 8
    python conditional_diffusion_example.py --p_uncond 1 --guidance classifier
    python conditional_diffusion_example.py --sample --evaluate 500   accuracy against w
    python conditional_diffusion_example.py --backbone dit   a transformer for the U-Net
    python conditional_diffusion_example.py --compare 240    both, in equal time

Implemented here: training with and without labels ([CFG] Alg. 1), guidance by the
difference (Eq. 6, Alg. 2), guidance by a classifier of noisy images ([ADM] Alg. 1, 2),
adaptive group normalisation ([ADM] Sec. 3.1), adaLN-Zero blocks ([DiT] Sec. 3.2), over
[DDPM] (arXiv 2006.11239) and [DDIM] (arXiv 2010.02502). Guidance is counted as in
[CFG]: w = 0 is the conditional model, w = -1 the unconditional one; the scale s of
[ADM]'s unconditional model and of most other code is 1 + w, and --w sets both.

x_t and y are [CFG]'s z_lambda and c; its log-SNR lambda, log(alpha_bar_t / (1 -
alpha_bar_t)), falls as t grows. The label of no class, [CFG]'s empty set, is the last.

Departures from the papers:
  1. discrete t in 1..T as in [DDPM], where [CFG] draws a continuous log-SNR;
  2. the variance is fixed ([ADM] and [DiT] learn it, [CFG] interpolates);
  3. of [ADM]'s U-Net only the norm, on [DDPM]'s; on 2x2 blocks of pixels (`patch`), and
     its up path narrows before it doubles the resolution; the DiT works on pixels, its
     tokens are made of a patch and the eight around it (`dit_kernel`);
  4. the noisy classifier ends in an average pool, [ADM]'s in attention;
  5. x0_hat is clamped to [-1, 1] while sampling (`clip_x0`): after classifier-free
     guidance, but before the push of a classifier, as in [ADM]'s code. That push wants
     a network trained without labels (`--p_uncond 1`): one trained with them sees its
     null class too seldom;
  6. the networks give v, not eps (`predict`; arXiv 2202.00512): the error of v weighs
     large t more; training draws more of the middle t (`drawing`);
  7. a cosine decay of the learning rate, clipped gradients, a shorter average of the
     weights, which follows them faster at first.

Training takes 6 to 17 CPU minutes, summed over all cores: 3 to 9 minutes on two.
What it draws and how good that is: results/ and README.md.
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
                        Probability, Range, Whole, check_sizes, command_line)
from common.data import cached, load_images
from common.device import seeded, training_cost
from common.run import open_run

Guidance = Literal["classifier_free", "classifier", "none"]
Drawing = Literal["uniform", "logit_normal"]
Weight = Annotated[float, Range(">= -1", lambda w: w >= -1)]


@dataclass(frozen=True)  # (paper: ...) is [CFG] on guidance, else [ADM]; DiT: [DiT]
class Config:
    """Each field is a flag: its type is the range, its comment the help text."""

    # diffusion
    T: Count = 1000              # diffusion steps (paper: 1000)
    schedule: Literal["linear", "cosine"] = "linear"  # noise schedule (paper: both)
    beta_1: OpenFraction = 1e-4  # linear schedule: beta_1 for T = 1000 (paper: 1e-4)
    beta_T: OpenFraction = 0.02  # linear schedule: beta_T for T = 1000 (paper: 0.02)
    predict: Literal["eps", "v"] = "v"  # the network's target (paper, DiT: eps)
    p_uncond: Probability = 0.1  # probability of a null label (paper: 0.1, 0.2, 0.5)
    # sampling
    guidance: Guidance = "classifier_free"  # kind of guidance; none uses labels alone
    classes: tuple[str, ...] = ()   # classes to draw, in order; all if empty
    w: tuple[Weight, ...] = (-1.0, 0.0, 1.0, 2.0, 4.0)  # guidance weights of grid.png
    w_samples: Weight = 2.0         # guidance weight of samples.png (paper: 0 to 4)
    classifier_steps: Count = 1500  # training steps of the classifier (paper: 300000)
    sampler: Literal["ddim", "ancestral"] = "ddim"  # takes S steps, or T (paper: both)
    S: Count = 10                   # DDIM steps (paper: 25 DDIM or 250 ancestral)
    eta: Probability = 0.0          # noise: 0 none, 1 as in DDPM (paper: 0)
    spacing: Literal["linear", "quadratic"] = "linear"  # DDIM step spacing
    variance: Literal["beta", "beta_tilde"] = "beta_tilde"  # ancestral step's sigma_t^2
    clip_x0: bool = True            # clamp x0_hat to [-1, 1] in sampling (code: yes)
    temperature: NonNegative = 1.0  # scale of all noise in sampling (paper: 1)
    n_samples: Count = 500          # pictures drawn if `classes` is empty
    # data
    dataset: str = "digits"  # digits, mnist, folder:PATH, ... (paper: imagenet)
    image_size: Whole = 0    # resize or pad pictures to this resolution; 0 keeps theirs
    flip: bool = False       # mirror pictures at random (paper: yes; never for digits)
    # network
    backbone: Literal["unet", "dit"] = "unet"  # U-Net or Diffusion Transformer
    channels: Count = 32                 # width of the U-Net, even (paper: 192, 256)
    mults: tuple[Count, ...] = (1, 2)    # relative width of each level (paper: 1 2 3 4)
    blocks: Count = 1                    # residual blocks per level (paper: 2 or 3)
    attention: tuple[Count, ...] = (7,)  # resolutions with attention (paper: 32 16 8)
    heads: Count = 1                     # attention heads (paper: 64 channels each)
    groups: Count = 8                    # groups in each group norm (code: 32)
    dropout: Fraction = 0.0              # dropout in residual blocks (paper: 0 or 0.1)
    patch: Count = 2                     # p x p pixels become channels (paper: none, 1)
    dit_width: Count = 96                # width of the DiT, of 4 n (DiT: 384 to 1152)
    dit_depth: Count = 4                 # blocks of the DiT (DiT: 12 to 28)
    dit_heads: Count = 4                 # attention heads of the DiT (DiT: 6 to 16)
    dit_patch: Count = 4                 # patch size of the DiT (DiT: 2, 4 or 8)
    dit_kernel: Count = 3                # patches per token and side; odd (DiT: 1)
    # training
    drawing: Drawing = "logit_normal"  # distribution of t in training (paper: uniform)
    steps: Count = 5000                # optimiser steps (DiT: 400000 and more)
    batch_size: Count = 32             # examples per step, all processes (DiT: 256)
    lr: Positive = 2e-3                # peak learning rate (paper and DiT: 1e-4)
    warmup: Whole = 200                # steps of learning-rate warm-up (paper: 0)
    decay: Literal["cosine", "constant"] = "cosine"  # decay of lr (paper: constant)
    weight_decay: NonNegative = 0.0    # AdamW's weight decay; 0 gives Adam (paper: 0)
    grad_clip: Positive = 1.0          # largest norm of the gradient (paper: none)
    ema: Fraction = 0.999              # decay of the averaged weights (paper: 0.9999)
    preview_every: Count = 2500        # steps between previews and checkpoints
    compare: NonNegative = 0.0         # train U-Net and DiT for this many seconds each


# these may change after training
SAMPLING = (
    "guidance", "classes", "w", "w_samples", "classifier_steps", "sampler", "S", "eta",
    "spacing", "variance", "clip_x0", "temperature", "n_samples")


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
    "ddpm_adagn": Config(  # [DDPM]'s CIFAR-10 network, [ADM]'s norm and attention
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


def beta_tilde(t, schedule):
    """The variance of q(x_{t-1} | x_t, x_0), 0 at t = 1. t: int or (B,) in 1..T."""
    beta, alpha_bars = schedule.betas[t], schedule.alpha_bars
    return (1 - alpha_bars[t - 1]) / (1 - alpha_bars[t]) * beta  # [DDPM] Eq. 7


# %% 2. Training objective ([CFG] Alg. 1)


def drop_labels(y, p_uncond, null):
    """Each label of y: (B,) becomes the null class with probability p_uncond."""
    dropped = torch.rand(len(y), device=y.device) < p_uncond
    return torch.where(dropped, null, y)  # [CFG] Alg. 1, line 3


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


def v_loss(model, x0, t, eps, schedule):
    """The squared error of v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 -> scalar.

    model(xt, t, v=True) gives v_hat. x_t is given, so that eps_hat - eps is
    sqrt(alpha_bar) (v_hat - v): large t count for more than in ddpm_loss. t, eps: as
    there. Source: arXiv 2202.00512, Sec. 4.
    """
    xt = q_sample(x0, t, eps, schedule.alpha_bars)
    alpha_bar = schedule.alpha_bars[t].view(-1, 1, 1, 1)
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
    return F.mse_loss(model(xt, t, v=True), v)


def objective(cfg):
    """The loss of what the network gives, cfg.predict."""
    return v_loss if cfg.predict == "v" else ddpm_loss


# %% 3. Sampling: guidance ([CFG] Alg. 2, [ADM] Alg. 1, 2)


def per_image(value, x):
    """A number, or (B,), one per image, shaped to broadcast over x: (B, C, H, W)."""
    return torch.as_tensor(value, dtype=x.dtype).to(x.device).view(-1, 1, 1, 1)


def cfg_eps(model, xt, t, y, w):
    """Classifier-free guidance, in one call of the network on both halves -> like xt.

    xt: (B, C, H, W), t: int or (B,) int64, y: (B,) int64, w: number or (B,). The null
    class is y = model.classes. Source: [CFG] Eq. 6.
    """
    t = torch.as_tensor(t, device=xt.device).expand(len(xt))
    null = torch.full_like(y, model.classes)
    both = model(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([y, null]))
    eps_c, eps_u = both.chunk(2)
    w = per_image(w, xt)
    return (1 + w) * eps_c - w * eps_u  # [CFG] Eq. 6; Alg. 2, line 3


def classifier_gradient(classifier, xt, t, y):
    """The gradient of log p(y | x_t) with respect to x_t, like xt. t, y: (B,) int64."""
    with torch.enable_grad():
        xt = xt.detach().requires_grad_()
        log_p = classifier(xt, t).log_softmax(1).gather(1, y[:, None]).sum()
        return torch.autograd.grad(log_p, xt)[0]


def classifier_guided_eps(model, classifier, xt, t, y, s, alpha_bars, clip_x0=False):
    """Classifier guidance of the unconditional network -> like xt: (B, C, H, W).

    t: int or (B,) int64, y: (B,) int64, s: number or (B,). classifier(xt, t) gives
    logits (B, classes). With exact networks s = 1 + w makes this cfg_eps. clip_x0: the
    unconditional x0_hat is clamped, and then pushed. Source: [ADM] Alg. 2, with the
    scale s of Sec. 4.3.
    """
    t = torch.as_tensor(t, device=xt.device).expand(len(xt))
    alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
    eps_u = model(xt, t, torch.full_like(y, model.classes))
    if clip_x0:
        x0_hat = (xt - (1 - alpha_bar).sqrt() * eps_u) / alpha_bar.sqrt()
        x0_hat = x0_hat.clamp(-1, 1)
        eps_u = (xt - alpha_bar.sqrt() * x0_hat) / (1 - alpha_bar).sqrt()
    gradient = classifier_gradient(classifier, xt, t, y)
    push = (1 - alpha_bar).sqrt() * per_image(s, xt) * gradient
    return eps_u - push  # [ADM] Eq. 14


@torch.no_grad()
def classifier_guided_process(model, classifier, xT, schedule, y, s,
                              variance="beta_tilde", clip_x0=True, temperature=1.0):
    """reverse_process of the unconditional network, guided by a classifier.

    y: (B,) int64, s: number or (B,). Source: [ADM] Alg. 1.
    """
    unconditional = partial(model, y=torch.full_like(y, model.classes))
    xt = temperature * xT
    for t in range(schedule.T, 0, -1):
        yield t, xt
        mean, sigma2 = p_theta(unconditional, xt, t, schedule, variance, clip_x0)
        gradient = classifier_gradient(classifier, xt, torch.full_like(y, t), y)
        z = temperature * torch.randn_like(xt) if t > 1 else torch.zeros_like(xt)
        # the gradient at x_t, as printed and coded; Eq. 5, 6 derive it at the mean
        mean = mean + per_image(s, xt) * sigma2 * gradient  # [ADM] Alg. 1, Eq. 10
        xt = mean + sigma2.sqrt() * z
    yield 0, xt


def guided_process(model, xT, schedule, y, w=2.0, guidance="classifier_free",
                   classifier=None, sampler="ddim", S=10, eta=0.0, spacing="linear",
                   variance="beta_tilde", clip_x0=True, temperature=1.0):
    """From noise xT: (B, C, H, W) to images of the classes y: (B,), yields (t, x_t).

    guidance: "classifier_free" with the weight w, number or (B,); "classifier" with the
    scale s = 1 + w; "none", the conditional network alone. Source: [CFG] Alg. 2 and
    [ADM] Alg. 1, 2, with the step of [DDIM] or of [DDPM].
    """
    s = 1 + torch.as_tensor(w)
    if guidance == "classifier" and sampler == "ancestral":
        return classifier_guided_process(
            model, classifier, xT, schedule, y, s, variance, clip_x0, temperature)
    if guidance == "classifier":
        eps = partial(classifier_guided_eps, model, classifier, y=y, s=s,
                      alpha_bars=schedule.alpha_bars, clip_x0=clip_x0)
        how = S, eta, spacing, False, temperature
        return ddim_process(eps, xT, schedule, *how)
    if guidance == "classifier_free":
        eps = partial(cfg_eps, model, y=y, w=w)
    else:
        eps = partial(model, y=y)
    if sampler == "ddim":
        return ddim_process(eps, xT, schedule, S, eta, spacing, clip_x0, temperature)
    return reverse_process(eps, xT, schedule, variance, clip_x0, temperature)


def sample(model, shape, schedule, y, w=2.0, guidance="classifier_free",
           classifier=None, sampler="ddim", S=10, eta=0.0, spacing="linear",
           variance="beta_tilde", clip_x0=True, xT=None, temperature=1.0):
    """The images (B, C, H, W) that guided_process ends with; xT is drawn when None."""
    xT = torch.randn(shape, device=schedule.betas.device) if xT is None else xT
    for _, xt in guided_process(model, xT, schedule, y, w, guidance, classifier,
                                sampler, S, eta, spacing, variance, clip_x0,
                                temperature):
        pass  # the last state is x_0
    return xt


# %% 4. Sampling: the steps of DDPM and DDIM


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


def mean_from_eps(xt, eps_hat, t, schedule):
    """mu_theta(x_t, t), the mean of [DDPM] Eq. 7 at x0_hat, from eps_hat. t: int."""
    beta, alpha, alpha_bar = (array[t] for array in schedule)
    mean = (xt - beta / (1 - alpha_bar).sqrt() * eps_hat) / alpha.sqrt()
    return mean  # [DDPM] Eq. 11


def p_theta(model, xt, t, schedule, variance="beta_tilde", clip_x0=True):
    """p_theta(x_{t-1} | x_t) of [DDPM] Eq. 1: mean (B, C, H, W), variance. t: 1..T.

    variance: "beta", optimal if x_0 ~ N(0, I), or "beta_tilde", optimal if x_0 is one
    fixed point ([DDPM] Sec. 3.2).
    """
    eps_hat = predict_eps(model, xt, t, schedule.alpha_bars, clip_x0)
    sigma2 = schedule.betas[t] if variance == "beta" else beta_tilde(t, schedule)
    return mean_from_eps(xt, eps_hat, t, schedule), sigma2


@torch.no_grad()
def p_sample(model, xt, t, schedule, variance="beta_tilde", clip_x0=True,
             temperature=1.0):
    """One reverse step x_t -> x_{t-1}. xt: (B, C, H, W), t: int in 1..T."""
    mean, sigma2 = p_theta(model, xt, t, schedule, variance, clip_x0)
    z = temperature * torch.randn_like(xt) if t > 1 else torch.zeros_like(xt)
    return mean + sigma2.sqrt() * z  # [DDPM] Alg. 2, lines 3 and 4


def reverse_process(model, xT, schedule, variance="beta_tilde", clip_x0=True,
                    temperature=1.0):
    """Yields (T, x_T), (T - 1, x_{T-1}), ..., (0, x_0) from noise xT. [DDPM] Alg. 2.

    temperature: factor of all noise, that of x_T and z; the paper's is 1.
    """
    xt = temperature * xT
    for t in range(schedule.T, 0, -1):  # [DDPM] Alg. 2, line 2
        yield t, xt
        xt = p_sample(model, xt, t, schedule, variance, clip_x0, temperature)
    yield 0, xt


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


# %% 5. Networks


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
    """Two convolutions, time and class. (B, c_in, H, W) -> (B, c_out, H, W).

    Time and class scale and shift the second norm: adaptive group normalisation, [ADM]
    Sec. 3.1.
    """

    recompute = True  # activations, in the backward pass (--grad_checkpointing)

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
    """eps_hat(x_t, t, y), or v_hat. x: (B, C, H, W), t: (B,) int64 or float -> like x.

    y: (B,) int64 in 0..classes; `classes` itself, or None, is the null class, no label.

    H and W are multiples of patch * 2^(levels - 1). attention: the resolutions, after
    patching, where self-attention follows each residual block; it always stands in the
    middle. Source: [DDPM] App. B, with the class embedding of [ADM] Sec. 3.1.
    """

    def __init__(self, image_channels=3, image_size=32, channels=128,
                 mults=(1, 2, 2, 2), blocks=2, attention=(16,), heads=1, groups=32,
                 dropout=0.1, patch=1, classes=10):
        super().__init__()
        check_sizes(image_size, channels, mults, attention, heads, groups, patch)
        self.channels, self.patch, self.classes = channels, patch, classes
        time_dim = 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, time_dim), nn.SiLU(),
                                  nn.Linear(time_dim, time_dim))
        self.label = nn.Embedding(classes + 1, time_dim)  # the last is the null class

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

    def forward(self, x, t, y=None):
        y = torch.full_like(t, self.classes, dtype=torch.int64) if y is None else y
        emb = self.time(timestep_embedding(t, self.channels).to(x.dtype))
        emb = emb + self.label(y)
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


def modulate(x, shift, scale):
    """Scale and shift of tokens x: (B, N, width) by scale, shift: (B, width)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Attention and MLP on tokens (B, N, width), modulated and gated by c: (B, width).

    c: the embedding of time and class. adaLN-Zero: the gates start at zero, so that the
    block starts as the identity. Source: [DiT] Sec. 3.2.
    """

    recompute = True  # activations, in the backward pass (--grad_checkpointing)

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        widen, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(widen, nn.GELU(approximate="tanh"),
                                 nn.Dropout(dropout), narrow)
        self.condition = nn.Linear(width, 6 * width)

    def attend(self, x):
        B, N, width = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, width/heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.out(h.transpose(1, 2).reshape(B, N, width))

    def forward(self, x, c):
        parts = self.condition(F.silu(c)).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1[:, None] * self.attend(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


def positions_2d(rows, columns, width, device=None):
    """Sines and cosines of row and column, half each: (rows * columns, width).

    Source: [DiT] Sec. 3.2; its code has them from MAE, arXiv 2111.06377.
    """
    k = torch.arange(width // 4, device=device) / (width // 4)
    frequencies = 10000.0 ** -k

    def line(n):
        angles = torch.arange(n, device=device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (n, width/2)

    down = line(rows).repeat_interleave(columns, 0)
    across = line(columns).repeat(rows, 1)
    return torch.cat([down, across], dim=1)


class DiT(nn.Module):
    """A transformer: eps_hat or v_hat. x: (B, C, H, W), t: (B,) -> like x.

    H and W are multiples of patch. y: (B,) int64 in 0..classes; `classes`, or None, is
    the null class, no label. out_channels: C unless given. kernel: side, in patches, of
    the first and the last convolution; 1 (paper) is a linear layer. [DiT] Sec. 3.2.
    """

    def __init__(self, image_channels=4, image_size=32, patch=2, width=384, depth=12,
                 heads=6, classes=1000, dropout=0.0, out_channels=None, kernel=1):
        super().__init__()
        if width % 4:
            raise Mistake(f"dit_width {width}: must be a multiple of 4 (positions)")
        if width % heads:
            raise Mistake(f"dit_heads {heads}: must divide --dit_width {width}")
        if kernel % 2 == 0:
            raise Mistake(f"dit_kernel {kernel}: must be odd")
        if image_size % patch:
            low = image_size // patch * patch
            raise Mistake(f"image_size {image_size}: must be a multiple of {patch} "
                          f"(dit_patch), the nearest: {low}, {low + patch}")
        self.classes, self.patch, self.width = classes, patch, width
        self.embed = nn.Conv2d(image_channels * patch**2, width, kernel,
                               padding=kernel // 2)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(),
                                  nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        blocks = [DiTBlock(width, heads, dropout) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.condition = nn.Linear(width, 2 * width)
        self.out = nn.Conv2d(width, (out_channels or image_channels) * patch**2, kernel,
                             padding=kernel // 2)
        for layer in self.modules():  # initial values as in the code
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in (self.time[0], self.time[2], self.label):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.condition, self.out, *(block.condition for block in blocks)):
            zero_init(layer)

    def forward(self, x, t, y=None):
        y = torch.full_like(t, self.classes, dtype=torch.int64) if y is None else y
        c = self.time(timestep_embedding(t, 256).to(x.dtype)) + self.label(y)
        h = self.embed(F.pixel_unshuffle(x, self.patch))  # (B, width, rows, columns)
        rows, columns = h.shape[2:]
        positions = positions_2d(rows, columns, self.width, x.device).to(x.dtype)
        h = h.flatten(2).transpose(1, 2) + positions  # (B, N, width)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.condition(F.silu(c)).chunk(2, dim=1)
        h = modulate(self.norm(h), shift, scale).transpose(1, 2)
        return F.pixel_shuffle(self.out(h.unflatten(2, (rows, columns))), self.patch)


class VPrediction(nn.Module):
    """eps_hat(x_t, t, y) of a network that gives v_hat. x: (B, C, H, W), t: (B,) int64.

    eps_hat = sqrt(alpha_bar) v_hat + sqrt(1 - alpha_bar) x_t: noise is passed through,
    and need not go through the tokens of a DiT. v: v_hat itself, for the loss.
    Source: arXiv 2202.00512, App. D.
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
        return alpha_bar.sqrt() * v_hat + (1 - alpha_bar).sqrt() * x


def make_model(cfg, shape, classes):
    """The network that cfg describes, for images of shape (C, H, W)."""
    if cfg.backbone == "dit":
        model = DiT(shape[0], shape[1], cfg.dit_patch, cfg.dit_width, cfg.dit_depth,
                    cfg.dit_heads, classes, cfg.dropout, kernel=cfg.dit_kernel)
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


# %% 6. Training


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
    """Train on data.train; returns the averaged network in eval mode. [CFG] Alg. 1."""
    classes = len(data.classes)
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(run.device)
    model = run.place(make_model(cfg, data.shape, classes))
    ema = EMA(model, cfg.ema)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, weight_decay=cfg.weight_decay,
        fused=run.device.type != "mps")  # one kernel for all weights

    loss_of = objective(cfg)
    # run.steps: progress bar, checkpoints, resume, Ctrl-C (common/run.py)
    for step in run.steps(cfg.steps, model=model, ema=ema.model, optimizer=optimizer):
        set_learning_rate(optimizer, cfg, step)
        x0, y = run.batch(data.train, data.train_labels)  # [CFG] Alg. 1, line 2
        y = drop_labels(y, cfg.p_uncond, null=classes)  # line 3
        t = draw_t(len(x0), cfg.T, cfg.drawing).to(run.device)  # line 4
        eps = torch.randn_like(x0)  # line 5
        with run.autocast():
            loss = loss_of(partial(model, y=y), x0, t, eps, schedule)  # lines 6 and 7
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


def train_classifier(cfg, run, data, schedule):
    """The classifier of noisy images, in eval mode: trained once, then kept on disk.

    Source: [ADM] Sec. 4.3.
    """
    def make():
        patch = 2 if data.shape[1] % 2 == 0 else 1
        return run.place(NoisyClassifier(data.shape[0], len(data.classes), patch=patch))

    def fit(classifier):
        optimizer = torch.optim.AdamW(classifier.parameters(), 3e-3, weight_decay=0.05,
                                      fused=run.device.type != "mps")
        its_cfg = replace(cfg, lr=3e-3, steps=cfg.classifier_steps)
        for step in run.steps(cfg.classifier_steps, "classifier", save=False,
                              classifier=classifier, optimizer=optimizer):
            set_learning_rate(optimizer, its_cfg, step)
            x0, y = run.batch(data.train, data.train_labels, size=64)
            shift = tuple(torch.randint(-2, 3, (2,)).tolist())
            x0 = torch.roll(x0, shift, dims=(2, 3))  # for [ADM]'s random crops
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
        return not run.stopped

    key = (data.shape, data.fingerprint(), cfg.schedule, cfg.T, cfg.beta_1,
           cfg.beta_T, cfg.classifier_steps, cfg.warmup, cfg.decay, cfg.flip)
    with seeded(2025, run.device):
        classifier = cached(f"noisy_classifier_{data.name}", key, make, fit)
    return classifier.eval().requires_grad_(False)


# %% 7. Figures and main


@plotting.figure("grid.png")
def figure_grid(run, cfg, model, data, schedule, classes, settings):
    """grid.png: each column a noise and a class, each row a guidance weight."""
    weights = cfg.w if cfg.guidance != "none" else (0.0,)
    xT = torch.randn(len(classes), *data.shape, device=run.device)
    y = torch.tensor(classes, device=run.device)
    rows = [sample(model, xT.shape, schedule, y, w, xT=xT, **settings) for w in weights]
    plotting.table(run.path("grid.png"), rows, "Each column one noise and class",
                   [spell(cfg, w) for w in weights], [data.classes[c] for c in classes])


@plotting.figure("same_noise.png")
def figure_same_noise(run, cfg, model, data, schedule, settings):
    """same_noise.png: each row one noise, each column one class."""
    y = torch.arange(min(10, len(data.classes)), device=run.device)
    w, rows = min(1.0, cfg.w_samples), []
    for _ in range(5):
        xT = torch.randn(1, *data.shape, device=run.device).expand(len(y), *data.shape)
        rows.append(sample(model, xT.shape, schedule, y, w, xT=xT, **settings))
    plotting.table(run.path("same_noise.png"), rows,
                   f"Each row one noise, each column one class ({spell(cfg, w)})",
                   [f"noise {i + 1}" for i in range(5)], [data.classes[c] for c in y])


@plotting.figure("samples.png")
def figure_samples(run, cfg, samples, y, data):
    """samples.png: samples, each row one class, beside real pictures of it.

    Classes that were asked for stand in one row, in their order, over real ones.
    """
    if cfg.classes:
        real = torch.stack([data.train[data.train_labels == c][i % 2]
                            for i, c in enumerate(y)])
        names = [data.classes[c] for c in y]
        plotting.table(run.path("samples.png"), [samples, real], "As asked for",
                       [spell(cfg, cfg.w_samples), "real"], names)
        return
    kinds = y.unique()[:10]
    counts = [(labels == c).sum() for c in kinds for labels in (y, data.test_labels)]
    n = max(1, min(10, *counts))
    steps = f"{cfg.S} DDIM steps" if cfg.sampler == "ddim" else f"{cfg.T} steps"
    plotting.panels(run.path("samples.png"), [
        (f"{steps}, {spell(cfg, cfg.w_samples)}",
         torch.cat([samples[y == c][:n] for c in kinds])),
        ("real, held out",
         torch.cat([data.test[data.test_labels == c][:n] for c in kinds]))],
        "Each row one class", n)


@plotting.figure("preview.png")
def figure_preview(run, model, data, schedule, step):
    """preview.png: x0_hat of held-out x_t, with the right label and without one."""
    x0, y = data.test[:6], data.test_labels[:6]
    generator = torch.Generator().manual_seed(0)  # training draws are left alone
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    rows, labels = [x0], ["held out"]
    for share in (0.3, 0.5, 0.8):
        t = max(1, round(schedule.T * share))
        xt = q_sample(x0, t, eps, schedule.alpha_bars)
        rows.append(xt)
        for network in (partial(model, y=y), model):
            eps_hat = predict_eps(network, xt, t, schedule.alpha_bars)
            rows.append(predict_x0(xt, eps_hat, t, schedule.alpha_bars))
        labels += [f"x_t, t = {t}", "x0_hat, label", "x0_hat, none"]
    title = f"What one network call recovers, step {step}"
    plotting.table(run.path("preview.png"), rows, title, labels)


@plotting.figure("denoising.gif")
def figure_denoising(run, states, n):
    """denoising.gif: x_t on its way to the classes asked for."""
    frames = plotting.evenly(list(states), 40)
    plotting.gif(run.path("denoising.gif"), [xt for _, xt in frames], n,
                 [f"t = {t}" for t, _ in frames])


def measure_guidance(run, cfg, model, data, schedule, classifier, settings):
    """{how it is guided: {w: its scores}}, kept in metrics.json on the way."""
    n, weights = run.opts.evaluate, sorted({*cfg.w, -1.0, 0.0, cfg.w_samples})
    y, scores = torch.arange(n, device=run.device) % len(data.classes), {}
    if cfg.p_uncond == 1:
        names = {"classifier": "classifier: unconditional"}
    else:
        names = {"classifier_free": "classifier-free",
                 "classifier": "classifier: null class"}
    for guidance, name in names.items():
        changed = settings | {"guidance": guidance, "classifier": classifier}
        for w in weights:
            def states(batch, w=w, changed=changed):
                xT = torch.randn(len(batch), *data.shape, device=run.device)
                asked = y[batch.start:batch.stop]
                return guided_process(model, xT, schedule, asked, w, **changed)
            found = run.quality(states, model, cfg.S, data, y)
            scores.setdefault(name, {})[f"{w:g}"] = found
            run.add_metrics(guidance_sweep=scores)
    return scores


@plotting.figure("guidance.png")
def figure_guidance(path, scores):
    """guidance.png: accuracy, recall, Fréchet distance against w, a line per guidance.

    scores: as measure_guidance returns them.
    """
    titles = {"accuracy": "agrees with the label", "recall": "recall",
              "frechet_distance": "Fréchet distance in features"}
    parts = []
    for key, title in titles.items():
        quiet = "" if key == "accuracy" else "_"  # one legend will do
        lines = {quiet + name: ([float(w) for w in rows],
                                [row[key] for row in rows.values()], "o-")
                 for name, rows in scores.items()}
        row = next(iter(next(iter(scores.values())).values()))
        reached = row.get(f"{key}_of_held_out")  # of recall there is none
        levels = {f"{quiet}held out": reached} if reached else {}
        parts.append({"lines": lines, "levels": levels, "title": title,
                      "xlabel": "guidance w = s - 1"})
    plotting.curves(path, parts, f"{row['n']} samples per point")


def classifier_accuracy(classifier, data, schedule):
    """{t: share of held-out x_t that the noisy classifier gets right}."""
    found = {}
    for share in (0, *(i / 20 for i in range(1, 21))):
        t = max(1, round(schedule.T * share))
        xt = q_sample(data.test, t, torch.randn_like(data.test), schedule.alpha_bars)
        logits = classifier(xt, torch.full((len(xt),), t, device=xt.device))
        found[t] = (logits.argmax(1) == data.test_labels).float().mean().item()
    return found


@plotting.figure("classifier.png")
def figure_classifier(run, classifier, data, schedule):
    """classifier.png: how often the noisy classifier is right at t."""
    found = classifier_accuracy(classifier, data, schedule)
    run.add_metrics(noisy_classifier_accuracy_by_t=found)
    plotting.curves(run.path("classifier.png"), [{
        "lines": {"noisy classifier": (list(found), list(found.values()), "o-")},
        "levels": {"by chance": 1 / len(data.classes)},
        "xlabel": "t", "ylim": (0, 1.02),
        "title": f"right on {len(data.test)} held-out x_t"}])


def compare(cfg, run, data, schedule):
    """compare.png: U-Net and DiT, each trained for cfg.compare seconds."""
    if run.launch.world > 1:
        raise Mistake(f"compare {cfg.compare:g}: must be run in one process")
    classes, scores, panels = len(data.classes), {}, []
    y = torch.arange(cfg.n_samples, device=run.device) % classes
    models = {name: make_model(replace(cfg, backbone=name), data.shape, classes)
              for name in ("unet", "dit")}
    for backbone, model in models.items():
        x0 = data.train[:cfg.batch_size]
        t = draw_t(len(x0), cfg.T, cfg.drawing).to(run.device)
        cost = training_cost(run.place(model), partial(
            objective(cfg), model, x0, t, torch.randn_like(x0), schedule), repeats=25)
        steps = max(10, int(cfg.compare / cost["seconds"]))
        part = run.part(backbone, replace(cfg, backbone=backbone, steps=steps))
        model = train(part.cfg, part, data)
        if part.stopped:
            break

        def states(batch, model=model):
            xT = torch.randn(len(batch), *data.shape, device=run.device)
            return guided_process(model, xT, schedule, y[batch.start:batch.stop],
                                  cfg.w_samples, S=cfg.S)

        with seeded(run.opts.seed, run.device):
            samples, timing = run.draw(cfg.n_samples, states, model, cfg.S)
        found = quality.scores(samples, data, y)
        scores[backbone] = part.read_metrics() | found | {"sampling": timing}
        run.add_metrics(compare=scores)
        title = (f"{backbone}: {steps} steps, Fréchet {found['frechet_distance']:.1f},"
                 f" right {found['accuracy']:.0%}")
        panels.append((title, samples[:100]))
    if panels:
        title = f"{cfg.compare:g} seconds of training each, the same noises"
        plotting.panels(run.path("compare.png"), panels, title, 10)
    run.finish()


def spell(cfg, w):
    """How a weight is written in the figures."""
    if w == -1 and cfg.guidance != "none":
        return "unconditional"
    return {"classifier_free": f"w = {w:g}", "classifier": f"s = {1 + w:g}",
            "none": "no guidance"}[cfg.guidance]


def asked_classes(cfg, data, evaluates):
    """The labels to draw. Mistake where cfg asks for what data or network lack."""
    if data.train_labels is None:
        raise Mistake(f"dataset {cfg.dataset}: has no labels to condition on")
    known = [*data.classes, *map(str, range(len(data.classes)))]  # names, or numbers
    for c in cfg.classes:
        if c not in known:
            raise Mistake(f"classes {c}: must be one of "
                          f"{', '.join(data.classes[:20])}")
    if not cfg.w:
        raise Mistake("w: needs at least one number")
    if cfg.p_uncond == 0 and (cfg.guidance != "none" or evaluates):
        raise Mistake(f"p_uncond {cfg.p_uncond:g}: must be above 0 for guidance, which "
                      "asks the network for the null class")
    if cfg.p_uncond == 1 and cfg.guidance != "classifier":
        raise Mistake(f"p_uncond {cfg.p_uncond:g}: must be below 1 with --guidance "
                      f"{cfg.guidance}, or the network would never see a label")
    return [known.index(c) % len(data.classes) for c in cfg.classes or data.classes]


def show(run, cfg, model, data, schedule, classes, settings, samples, y):
    """The figures of a run: samples of the labels y, and what they depend on."""
    plotting.curves(run.path("loss.png"), [
        plotting.loss_curve(run.read_log(), "training loss, labels dropped at random")])
    plotting.neighbours(run.path("neighbours.png"), samples, data)
    figure_samples(run, cfg, samples, y, data)
    figure_grid(run, cfg, model, data, schedule, classes, settings)
    figure_same_noise(run, cfg, model, data, schedule, settings)
    if classifier := settings["classifier"]:
        figure_classifier(run, classifier, data, schedule)


@command_line
def main(argv=None):
    """Train, or load what was trained; draw; measure."""
    cfg, run = open_run("conditional", Config, PRESETS, SAMPLING, argv)
    data = run.load(load_images(cfg.dataset, cfg.image_size))
    schedule = make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T).to(run.device)
    ddim_timesteps(cfg.T, cfg.S, cfg.spacing)  # raises before training if S > T
    classes = asked_classes(cfg, data, run.opts.evaluate)
    if cfg.compare:
        return compare(cfg, run, data, schedule)
    if run.sampling:
        model = run.trained(make_model(cfg, data.shape, len(data.classes)))
    else:
        model = train(cfg, run, data)
    classifier = None
    if (cfg.guidance == "classifier" or run.opts.evaluate) and not run.stopped:
        classifier = train_classifier(cfg, run, data, schedule)
    if not run.main:
        return  # only the first process draws
    if cfg.guidance == "classifier" and (classifier is None or run.stopped):
        run.say("stopped: no noisy classifier to guide the samples; --resume goes on")
        return run.finish()

    largest_n = max(cfg.n_samples, run.opts.evaluate or 0)
    y = torch.tensor(classes, device=run.device).repeat(largest_n)  # enough for each n
    names = ("guidance", "sampler", "S", "eta", "spacing", "variance", "clip_x0",
             "temperature")
    settings = {name: getattr(cfg, name) for name in names} | {"classifier": classifier}

    def states(batch):
        xT = torch.randn(len(batch), *data.shape, device=run.device)
        asked = y[batch.start:batch.stop]
        return guided_process(model, xT, schedule, asked, cfg.w_samples, **settings)

    n = len(classes) if cfg.classes else cfg.n_samples
    steps = cfg.S if cfg.sampler == "ddim" else cfg.T
    samples, timing = run.draw(n, states, model, steps)
    run.add_metrics(sampling=timing, samples=quality.glance(samples, data, y[:n]))
    show(run, cfg, model, data, schedule, classes, settings, samples, y[:n])
    figure_denoising(run, states(range(min(10, n))), min(10, n))
    run.evaluate(states, model, steps, data, y[:run.opts.evaluate])
    if run.opts.evaluate and not run.stopped:
        scores = measure_guidance(run, cfg, model, data, schedule, classifier,
                                  settings)
        figure_guidance(run.path("guidance.png"), scores)
    run.finish()


if __name__ == "__main__":
    main()
