"""Flow Matching for Generative Modeling (Lipman, Chen, Ben-Hamu, Nickel, Le, arXiv
2210.02747): [FM], with rectified flow (Liu, Gong, Liu, arXiv 2209.03003): [RF].

    python flow_matching_example.py                          train and draw digits
    python flow_matching_example.py --dataset two_moons      points in the plane
    python flow_matching_example.py --reflow RUN             straighten a trained flow
    python experiments/flow_matching.py                      more figures

Time runs as in both papers: noise x_0 at t = 0, data x_1 at t = 1. The page follows
[FM]: conditional paths (Eq. 10, 11, 18, 20), the conditional objective (Eq. 9, 14, 23),
sampling by an ODE and its likelihood (App. C); then couplings: minibatch optimal
transport (Tong et al., arXiv 2302.00482: [OT]) and reflow ([RF] Alg. 1). [CFG]: arXiv
2207.12598; [DDPM]: arXiv 2006.11239; [ADM]: arXiv 2105.05233.

Departures from the papers:
  1. the network is the small U-Net of conditional_diffusion_example.py, the learning
     rate decays by a cosine, the weights are averaged; an MLP for points;
  2. training draws t from a logit-normal distribution (`drawing`), after arXiv
     2403.03206, and spreads the t of a batch evenly;
  3. sampling multiplies the estimated noise by 1.5 (`noise_scale`);
  4. reflow draws 4,000 pairs, in 25 Euler steps ([RF]: millions, by RK45).
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import plotting, quality
from common.cli import (Count, Fraction, Mistake, NonNegative, OpenFraction, Positive,
                        Range, Whole, check_sizes, command_line, config_from)
from common.data import POINTS, is_8bit, load_data
from common.device import seeded
from common.run import load_checkpoint, open_run, reading

Drawing = Literal["uniform", "logit_normal"]
Sampler = Literal["euler", "midpoint", "heun", "rk45"]
Weight = Annotated[float, Range(">= -1", lambda w: w >= -1)]
Dropping = Annotated[float, Range("in (0, 1]", lambda p: 0 < p <= 1)]


@dataclass(frozen=True)
class Config:
    """Each field is a flag. Its type gives the range, its comment is the help text."""

    # path
    path: Literal["straight", "vp"] = "straight"  # conditional path (paper: also ve)
    sigma_min: Fraction = 0.0    # std of the straight path at t = 1 ([RF] Eq. 1: 0)
    beta_min: Positive = 0.1     # vp: beta(s) at s = 0 (paper: 0.1)
    beta_max: Positive = 20.0    # vp: beta(s) at s = 1 (paper: 20)
    coupling: Literal["independent", "ot"] = "independent"  # ([OT]: both)
    reflow: str = ""             # run to learn noises and their samples from ([RF])
    pairs: Count = 4000          # number of pairs that reflow draws ([RF]: 4 million)
    p_uncond: Dropping = 1.0     # chance to drop a label; 1: no labels ([CFG]: 0.1)
    # sampling
    sampler: Sampler = "euler"   # ODE solver (paper: dopri5, midpoint, euler)
    S: Count = 25                # steps; midpoint and heun take two calls each
    tolerance: OpenFraction = 1e-4  # rtol and atol of rk45 (paper: 1e-5)
    noise_scale: Positive = 1.5  # factor of the estimated noise in sampling (paper: 1)
    classes: tuple[str, ...] = ()   # classes to draw, with p_uncond < 1; all if empty
    w: Weight = 1.0              # guidance weight, with p_uncond < 1 ([CFG]: 0 to 4)
    likelihood: Whole = 16       # number of held-out examples for the likelihood
    n_samples: Count = 64        # images drawn, or hundreds of points
    # data
    dataset: str = "digits"      # digits, mnist, folder:PATH, two_moons, ...
    image_size: Whole = 0        # resize images to this resolution; 0 keeps theirs
    flip: bool = False           # mirror images at random (not for digits)
    dequantize: bool = True      # spread 8-bit values over their bins
    # network
    channels: Count = 32         # width of the U-Net, even, at least 4 (paper: 256)
    mults: tuple[Count, ...] = (1, 2)    # relative width of each level (paper: 1 2 2 2)
    blocks: Count = 1            # residual blocks per level (paper: 2)
    attention: tuple[Count, ...] = (7,)  # resolutions with attention (paper: 16)
    heads: Count = 1             # attention heads (paper: 4)
    groups: Count = 8            # groups in each group norm
    dropout: Fraction = 0.0      # dropout in the residual blocks (paper: 0)
    patch: Count = 2             # patch x patch pixels become channels (paper: 1)
    hidden: Count = 128          # width of the MLP for points
    layers: Count = 4            # blocks of the MLP for points
    # training
    drawing: Drawing = "logit_normal"  # distribution of t in training (paper: uniform)
    steps: Count = 4800          # optimiser steps (paper: 391000)
    batch_size: Count = 32       # examples per step, over all processes (paper: 256)
    lr: Positive = 2e-3          # peak learning rate (paper: 5e-4)
    warmup: Whole = 200          # steps of learning-rate warm-up (paper: 45000)
    decay: Literal["cosine", "constant"] = "cosine"  # decay of lr (paper: polynomial)
    weight_decay: NonNegative = 0.0  # AdamW's weight decay; 0 gives Adam (paper: 0)
    grad_clip: Positive = 1.0    # largest norm of the gradient
    ema: Fraction = 0.999        # decay of the averaged weights
    preview_every: Count = 1000  # steps between previews and checkpoints


# The fields that may change after training
SAMPLING = ("sampler", "S", "tolerance", "noise_scale", "classes", "w", "likelihood",
            "n_samples")

PLANE = Config(
    dataset="two_moons", dequantize=False, drawing="uniform", steps=10_000,
    batch_size=512, lr=3e-3, preview_every=5000, sampler="rk45", noise_scale=1.0,
    likelihood=1000)
PRESETS = {
    "laptop": Config(),
    "smoke": Config(
        channels=8, groups=4, hidden=16, layers=2, steps=6, batch_size=8, warmup=2,
        preview_every=3, S=5, tolerance=0.1, likelihood=2, n_samples=4, pairs=16),
    "paper": Config(  # CIFAR-10, with the sizes and rates of [FM] Table 3
        dataset="cifar10", flip=True, channels=256, mults=(1, 2, 2, 2), blocks=2,
        attention=(16,), heads=4, groups=32, patch=1, drawing="uniform",
        steps=391_000, batch_size=256, lr=5e-4, warmup=45_000, preview_every=5000,
        grad_clip=1e9, sampler="rk45", tolerance=1e-5, noise_scale=1.0),
    **{name: replace(PLANE, dataset=name) for name in POINTS},
}


# %% 1. Probability paths ([FM] Sec. 4)
#
# A flow dx/dt = v(x, t) carries noise at t = 0 to data at t = 1 (Eq. 1). Each example
# x_1 has a path of its own, p_t(x | x_1) = N(a(t) x_1, s(t)^2 I). It is made by the
# conditional flow psi_t(x_0) = a(t) x_1 + s(t) x_0 of noise x_0 ~ N(0, I):
#
#                       a(t)          s(t)
#   straight (Eq. 20)   t             1 - (1 - sigma_min) t
#   VP (Eq. 18)         e^(-B/2)      sqrt(1 - e^-B)          where B = B(1 - t)
#
# The v that one wants makes the mixture of these paths (Eq. 6). At x it is the mean of
# the conditional velocities, weighted by how likely each x_1 is there (Eq. 8, Theorem
# 1). So the flow of all examples bends even where each conditional flow is a line.
#
# B(s) is the integral of beta(u) = beta_min + u (beta_max - beta_min) from 0 to s, as
# on the score-based page, whose time s = 1 - t runs the other way.


def per_example(value, x):
    """Shape value, (B,), to broadcast over x: (B, ...)."""
    return value.view(-1, *[1] * (x.ndim - 1))


class Path:
    """A row of the table above. t: (B,) in [0, t_end]; x0 is noise, x1 data.

    A subclass defines coefficients(t): a, s and their derivatives by t, each (B,).
    """

    t_end = 1.0  # where sampling ends and training stops

    def interpolate(self, x0, x1, t):
        """x_t on the way from x0 to x1. x0, x1: (B, ...) -> the same shape."""
        a, s, _, _ = (per_example(c, x1) for c in self.coefficients(t))
        # [FM] Eq. 10, 11: psi_t(x_0) = s(t) x_0 + a(t) x_1
        return s * x0 + a * x1

    def velocity(self, x0, x1, t):
        """The conditional velocity at x_t: (B, ...). t = 1 is allowed if straight."""
        _, _, da, ds = (per_example(c, x1) for c in self.coefficients(t))
        # [FM] Eq. 13: u_t(psi_t(x_0) | x_1) = d psi_t(x_0)/dt = s' x_0 + a' x_1, which
        # is Eq. 15, s'/s (x_t - a x_1) + a' x_1, without its division by s
        return ds * x0 + da * x1

    def predict_x1(self, xt, v, t):
        """E[x_1 | x_t], like xt, if v is the velocity that one wants at x_t."""
        a, s, da, ds = (per_example(c, xt) for c in self.coefficients(t))
        # Solve a x_1 + s x_0 = x_t and a' x_1 + s' x_0 = v for x_1
        return (s * v - ds * xt) / (s * da - ds * a)


class StraightPath(Path):
    """The optimal-transport path, a line for each pair. [FM] Eq. 20, 22, 23."""

    def __init__(self, sigma_min=0.0):
        self.sigma_min = sigma_min

    def coefficients(self, t):
        one = torch.ones_like(t)
        # [FM] Eq. 20: mu_t = t x_1, sigma_t = 1 - (1 - sigma_min) t; so the velocity
        # is that of Eq. 23, x_1 - (1 - sigma_min) x_0
        fall = 1 - self.sigma_min
        return t, 1 - fall * t, one, -fall * one


class VPPath(Path):
    """The variance-preserving path of diffusion models. [FM] Eq. 18, 19."""

    t_end = 1 - 1e-5  # s' is infinite at t = 1

    def __init__(self, beta_min=0.1, beta_max=20.0):
        if beta_min >= beta_max:
            raise Mistake(f"beta_min {beta_min}: must be below --beta_max {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def coefficients(self, t):
        u, span = 1 - t, self.beta_max - self.beta_min
        beta, B = self.beta_min + u * span, u * self.beta_min + u**2 * span / 2
        # [FM] Eq. 18: a = e^(-B(1 - t) / 2), s = sqrt(1 - a^2)
        a, s = torch.exp(-B / 2), (-torch.expm1(-B)).sqrt()
        da = a * beta / 2          # since dB(1 - t) / dt = -beta(1 - t)
        return a, s, da, -a * da / s


def make_path(cfg):
    """The conditional path that cfg names."""
    if cfg.path == "straight":
        return StraightPath(cfg.sigma_min)
    return VPPath(cfg.beta_min, cfg.beta_max)


# %% 2. Training objective ([FM] Sec. 3.2, 4)


def cfm_loss(v, path, x0, x1, t):
    """Conditional flow matching. x0: noise, x1: data, (B, ...); t: (B,) -> scalar.

    The loss that one wants (Eq. 5) needs an integral over all data (Eq. 8). This one
    has the same gradient (Theorem 2). Its minimum is above 0: pairs cross at x_t, and
    the best v(x_t, t) is the mean of their velocities.
    """
    # [FM] Eq. 9, 14: E |v(psi_t(x_0), t) - d psi_t(x_0) / dt|^2; Eq. 23 if straight
    xt = path.interpolate(x0, x1, t)
    return F.mse_loss(v(xt, t), path.velocity(x0, x1, t))


def draw_time(n, path, drawing):
    """Draw the times of a batch: (n,) in [0, t_end], on the CPU.

    "uniform" is [FM] Eq. 9. "logit_normal" prefers the early t that decide, on the
    straight path, what a picture shows: logit(t) is N(-1, 1), after arXiv 2403.03206,
    Sec. 3.1, whose time is 1 - t, and one t in sixteen is uniform. Each of n equal
    quantiles gives one t, so that batches differ less.
    """
    t = (torch.arange(n) + torch.rand(n)) / n
    if drawing == "logit_normal":
        t = torch.where(torch.rand(n) < 1 / 16, torch.rand(n),
                        torch.sigmoid(torch.special.ndtri(t) - 1))
    return t.clamp(max=path.t_end)


def drop_labels(y, p_uncond, null):
    """Replace each label of y: (B,) by the null class with probability p_uncond."""
    # [CFG] Alg. 1, line 3: c <- the empty set with probability p_uncond
    dropped = torch.rand(len(y), device=y.device) < p_uncond
    return torch.where(dropped, null, y)


# Couplings: which noise goes with which example. Theorem 2 holds for any joint
# distribution of x_0 and x_1 ([OT]), so for the pairs of reflow, too.


def ot_coupling(x0, x1):
    """Indices i, (B,), so that the pairs x0, x1[i] have the least transport cost.

    x0, x1: (B, ...). Reorder the labels, too: y[i]. The plan of a batch stands in for
    that of all data ([OT]). It ignores the labels: in training the noise of one class
    is no longer N(0, I), as it is in sampling (arXiv 2503.10636).
    """
    from scipy.optimize import linear_sum_assignment

    # minimise the sum over the batch of |x_0 - x_1|^2
    cost = torch.cdist(x0.flatten(1).float(), x1.flatten(1).float()).square()
    _, i = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(i).to(x1.device)


# %% 3. Sampling ([FM] Eq. 1)


def batch_time(t, x):
    """The float t for each example of x: (B,), of x's dtype and device."""
    return torch.full((len(x),), t, dtype=x.dtype, device=x.device)


def velocity_fn(model, y=None, w=0.0):
    """v(x, t), like x, of a network. t: (B,) in [0, 1].

    y: (B,) labels, or None for the null class; w: guidance weight.
    """
    def v(x, t):
        t = 1000 * t  # the embedding expects [DDPM]'s steps, 0 to 1000
        if y is None or w == 0:
            return model(x, t, y)
        null = torch.full_like(y, model.classes)
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        v_c, v_u = both.chunk(2)
        # [CFG] Eq. 6 for v: eps is affine in v, and the weights 1 + w and -w sum to 1
        return (1 + w) * v_c - w * v_u

    return v


def euler_step(v, x, t, h):
    """One network call, of order 1: follow the velocity at the beginning."""
    return x + h * v(x, batch_time(t, x))


def midpoint_step(v, x, t, h):
    """Two network calls, of order 2: follow the velocity in the middle."""
    middle = x + h / 2 * v(x, batch_time(t, x))
    return x + h * v(middle, batch_time(t + h / 2, x))


def heun_step(v, x, t, h):
    """Two network calls, of order 2: follow the mean velocity of both ends."""
    first = v(x, batch_time(t, x))
    second = v(x + h * first, batch_time(t + h, x))
    return x + h / 2 * (first + second)


STEPS = {"euler": euler_step, "midpoint": midpoint_step, "heun": heun_step}


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
def flow_process(v, x, t=0.0, t_end=1.0, sampler="euler", S=25, tolerance=1e-5):
    """Carry x, (B, ...), along the flow from t to t_end: yields (t, x_t), ...

    From 0 to 1 noise becomes samples, from 1 to 0 data becomes its noise. "rk45" is
    dopri5, which adapts its steps to the tolerance; the others take S equal steps.
    """
    # [FM] Eq. 1: d x_t / dt = v(x_t, t)
    if sampler == "rk45":
        def velocity(state, u):
            return (v(state[0], batch_time(u, state[0])),)
        for u, state in solve(velocity, (x,), t, t_end, tolerance):
            yield u, state[0]
        return
    step, ts = STEPS[sampler], np.linspace(t, t_end, S + 1).tolist()
    for u, following in zip(ts[:-1], ts[1:], strict=True):
        yield u, x
        x = step(v, x, u, following - u)
    yield t_end, x


def final(states):
    """The last x of a process, which yields (t, x)."""
    for _, x in states:
        pass
    return x


def scaled_noise(v, path, scale):
    """v(x, t) with its estimate of the noise multiplied by `scale` (departure 3)."""
    def velocity(x, t):
        u = v(x, t)  # = a' x1_hat + s' x0_hat, of which x0_hat is the noise
        da = per_example(path.coefficients(t)[2], x)
        return scale * u - (scale - 1) * da * path.predict_x1(x, u, t)

    return velocity


def flow_from_noise(cfg, model, path, x0, y=None):
    """The flow_process that cfg asks for, from the noise x0, for labels y."""
    v = velocity_fn(model, y, cfg.w)
    if not cfg.reflow:  # a reflowed run has learnt from samples of scaled noise
        v = scaled_noise(v, path, cfg.noise_scale)
    return flow_process(v, x0, 0.0, path.t_end, cfg.sampler, cfg.S, cfg.tolerance)


@torch.no_grad()
def reflow_pairs(cfg, run, data):
    """The pairs of [RF] Alg. 1: noises, and where a trained flow carries them.

    Returns (pairs, labels, the trained network): pairs (n, 2, ...), noise first.
    """
    where = f"reflow {cfg.reflow}"
    with reading(f"--{where}"):
        state = load_checkpoint(cfg.reflow, ["flow_matching"], f"--{where}")
        teacher = config_from(state["config"], Config, where)
        if (teacher.p_uncond < 1) != (cfg.p_uncond < 1):
            raise Mistake(f"p_uncond {cfg.p_uncond:g}: must be {teacher.p_uncond:g}, "
                          f"that of --{where}")
        model = run.place(make_network(cfg, data)).eval()
        model.load_state_dict(state["ema"])
    path, size, parts = make_path(teacher), 100 if len(data.shape) == 3 else 10_000, []
    with seeded(run.opts.seed, run.device):  # a resumed run draws the same pairs
        x0 = torch.randn(cfg.pairs, *data.shape, device=run.device)
        y = torch.randint(len(data.classes) or 1, (cfg.pairs,), device=run.device)
        for i in tqdm(range(0, cfg.pairs, size), "pairs", disable=not run.main):
            labels = None if cfg.p_uncond == 1 else y[i:i + size]
            states = flow_from_noise(teacher, model, path, x0[i:i + size], labels)
            parts.append(final(states))
    pairs = torch.stack([x0, torch.cat(parts)], dim=1)
    return pairs, None if cfg.p_uncond == 1 else y, model


# %% 4. Networks


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


class VelocityMLP(nn.Module):
    """v(x, t) of points. x: (B, dim), t: (B,) -> like x. There are no labels."""

    def __init__(self, dim=2, hidden=128, layers=4):
        super().__init__()
        self.time = nn.Linear(64, hidden)
        self.lift = nn.Linear(dim, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden)) for _ in range(layers))
        self.out = zero_init(nn.Linear(hidden, dim))

    def forward(self, x, t, y=None):
        emb = timestep_embedding(t, 64).to(x.dtype)                 # (B, 64)
        emb, h = self.time(emb), self.lift(x)                       # (B, hidden)
        for block in self.blocks:
            h = h + block(h + emb)
        return self.out(F.silu(h))


def make_network(cfg, data):
    """The network that cfg describes, for data of images (C, H, W) or points (dim,)."""
    shape = data.shape
    if len(shape) == 1:
        return VelocityMLP(shape[0], cfg.hidden, cfg.layers)
    return UNet(shape[0], shape[1], cfg.channels, cfg.mults, cfg.blocks, cfg.attention,
                cfg.heads, cfg.groups, cfg.dropout, cfg.patch, len(data.classes))


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


def train(cfg, run, data):
    """Train on data.train and return the averaged network. Source: [FM] Eq. 9."""
    path, images = make_path(cfg), len(data.shape) == 3
    if cfg.reflow:
        pairs, pair_labels, teacher = reflow_pairs(cfg, run, data)
    model = teacher if cfg.reflow else run.place(make_network(cfg, data))
    model.train()
    ema = EMA(model, cfg.ema)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, weight_decay=cfg.weight_decay,
        fused=run.device.type != "mps")  # updates all weights in one call

    # run.steps: progress bar, checkpoints, resume, Ctrl-C (common/run.py)
    for step in run.steps(cfg.steps, model=model, ema=ema.model, optimizer=optimizer):
        set_learning_rate(optimizer, cfg, step)
        if cfg.reflow:  # [RF] Alg. 1: x_1 is where the first flow took x_0
            pair, y = run.batch(pairs, pair_labels, flip=False)
            x0, x1 = pair.unbind(1)
        else:
            x1, y = run.batch(data.train, data.train_labels)
            x1 = dequantize(x1) if cfg.dequantize and images else x1
            x0 = torch.randn_like(x1)
            if cfg.coupling == "ot":
                i = ot_coupling(x0, x1)
                x1, y = x1[i], None if y is None else y[i]
        if y is not None:
            y = drop_labels(y, cfg.p_uncond, null=len(data.classes))
        t = draw_time(len(x1), path, cfg.drawing).to(run.device)
        with run.autocast():
            loss = cfm_loss(velocity_fn(model, y), path, x0, x1, t)
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(model)  # over all processes; alone it does nothing
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        ema.update(model, step)
        run.log(loss=loss, grad_norm=norm)
        if run.main and (step + 1) % cfg.preview_every == 0:
            figure_preview(run, ema.model, path, data, step + 1)
    return ema.model


# %% 6. Likelihood ([FM] App. C)


def log_likelihood(v, x, trace="exact", t_end=1.0, tolerance=1e-5):
    """log p_1(x) in nats: (B, ...) -> (B,), by RK45 from t_end back to 0.

    trace: "exact" takes a backward pass for each dimension, "hutchinson" one, with a
    Rademacher probe that stays the same along the trajectory.
    """
    x = x.detach()
    probe = torch.randint_like(x, 2) * 2 - 1

    @torch.enable_grad()
    def velocity(state, t):
        x = state[0].detach().requires_grad_()
        drift = v(x, batch_time(t, x))
        if trace == "hutchinson":
            # div v = E z^T (dv / dx) z for a random z with E z z^T = I
            zJ = torch.autograd.grad(drift, x, probe)[0]
            return drift, (zJ * probe).flatten(1).sum(1)
        flat, divergence = drift.flatten(1), 0
        for i in range(flat.shape[1]):
            row = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0]
            divergence = divergence + row.flatten(1)[:, i]
        return drift, divergence

    start = x, x.new_zeros(len(x))
    x0, change = final(solve(velocity, start, t_end, 0.0, tolerance))
    # [FM] App. C: log p_1(x_1) = log p_0(x_0) - integral from 0 to 1 of div v(x_t, t);
    # `change` is the integral from 1 to 0, hence the plus
    return torch.distributions.Normal(0.0, 1.0).log_prob(x0).flatten(1).sum(1) + change


def dequantize(x):
    """Spread 8-bit x = k / 127.5 - 1 over its bin: (k + u) / 128 - 1, u in [0, 1)."""
    k = (x + 1) * 127.5
    return (k + torch.rand_like(x)) / 128 - 1


def bits_per_dim(v, x, t_end=1.0, tolerance=1e-5):
    """Bits per dimension of 8-bit images x: (B, C, H, W) -> (B,).

    One uniform dequantization gives an upper bound of -log_2 P(x) in expectation. A bin
    is 2/256 wide, hence the 7. Anything but 8-bit images raises ValueError.
    """
    if not is_8bit(x):
        raise ValueError("bits/dim needs 8-bit images scaled to [-1, 1]")
    logp = log_likelihood(v, dequantize(x), "hutchinson", t_end, tolerance)
    return -logp / (x[0].numel() * math.log(2)) + 7


# %% 7. Main


@plotting.figure("preview.png")
def figure_preview(run, model, path, data, step):
    """preview.png: x1_hat of held-out x_t at a few t, each from one network call."""
    x1 = data.test[:6 if len(data.shape) == 3 else 1000]
    generator = torch.Generator().manual_seed(0)  # leaves the draws of training alone
    x0 = torch.randn(x1.shape, generator=generator).to(x1.device)
    v, parts = velocity_fn(model), [("held out", x1)]
    for fraction in (0.8, 0.5, 0.2, 0.0):
        t = batch_time(fraction, x1)
        xt = path.interpolate(x0, x1, t)
        parts += [(f"x_t, t = {fraction}", xt),
                  ("x1_hat", path.predict_x1(xt, v(xt, t), t))]
    title = f"What one network call recovers, step {step}"
    if x1.ndim == 4:
        labels, rows = zip(*parts, strict=True)
        plotting.table(run.path("preview.png"), rows, title, labels)
    else:
        plotting.panels(run.path("preview.png"), parts, title)


@plotting.figure("loss.png")
def figure_loss(run, model, path, data):
    """loss.png: the training loss, and the loss of held-out examples by t."""
    x1, v = data.test[:200], velocity_fn(model)

    def loss(low, high):
        t = low + (high - low) * torch.rand(len(x1), device=x1.device)
        t = t.clamp(max=path.t_end)
        return cfm_loss(v, path, torch.randn_like(x1), x1, t).item()

    plotting.curves(run.path("loss.png"), [
        plotting.loss_curve(run.read_log(), "training loss"),
        plotting.loss_by_t(loss, [i / 10 for i in range(11)], "held-out loss by t")])


@plotting.figure("steps.png", compares=False)
def figure_steps(run, v, x0, t_end):
    """steps.png: each column one noise, carried to data in 1 to 50 Euler steps."""
    numbers = (1, 2, 4, 10, 25, 50)
    rows = [final(flow_process(v, x0, 0.0, t_end, "euler", S)) for S in numbers]
    plotting.table(run.path("steps.png"), rows,
                   "The same noises in S Euler steps, noise_scale 1",
                   [f"S = {S}" for S in numbers])


@plotting.figure("velocity.png")
def figure_velocity(run, v, path, data):
    """velocity.png: the velocity of points at four t, over the noisy data."""
    line, parts, x1 = torch.linspace(-2.2, 2.2, 22), [], data.test[:1500]
    where = torch.cartesian_prod(line, line).to(x1.device)
    for t in (0.0, 0.4, 0.7, 0.95):
        xt = path.interpolate(torch.randn_like(x1), x1, batch_time(t, x1))
        parts.append((f"t = {t:.2f}", xt, where, v(where, batch_time(t, where))))
    plotting.fields(run.path("velocity.png"), parts,
                    "The velocity over the points on their way from noise to data")


def measure_likelihood(run, cfg, v, path, data):
    """Bits/dim of held-out 8-bit images, nats of held-out points, of the flow itself.

    With --evaluate it takes all held-out images.
    """
    images = len(data.shape) == 3
    if not cfg.likelihood or data.empty or images and not is_8bit(data.test):
        return
    x = data.test if run.opts.evaluate else data.test[:cfg.likelihood]
    measure, name = (bits_per_dim, "bits/dim") if images else (log_likelihood, "nats")
    try:
        found = torch.cat([
            measure(v, part, t_end=path.t_end, tolerance=cfg.tolerance)
            for part in tqdm(x.split(100 if images else 10_000), name, leave=False)])
    except FloatingPointError as problem:
        return run.say(f"no {name}: {problem}")
    error = found.std().item() / math.sqrt(len(found)) if len(found) > 1 else None
    run.add_metrics(**{"bits_per_dim" if images else "nats": {
        "n": len(x), "mean": found.mean().item(), "standard_error": error}})


def check_settings(run, cfg, data):
    """Raise Mistake where cfg asks for something that the data or the path lacks."""
    images = len(data.shape) == 3
    of_images = ("flip", "dequantize", "image_size", "channels", "mults", "blocks",
                 "attention", "heads", "groups", "dropout", "patch")
    for name in ("hidden", "layers") if images else of_images:
        if run.opts.given.get(name):
            raise Mistake(f"{name} needs {'points' if images else 'images'}: --dataset "
                          f"{cfg.dataset} has none")
    if cfg.p_uncond < 1 and data.train_labels is None:
        raise Mistake(f"p_uncond {cfg.p_uncond:g}: must be 1, since --dataset "
                      f"{cfg.dataset} has no labels")
    if cfg.p_uncond == 1 and cfg.classes:
        raise Mistake(f"classes {cfg.classes[0]}: needs a network that was trained "
                      "with --p_uncond below 1")
    for c in cfg.classes:
        if c not in data.classes:
            raise Mistake(f"classes {c}: must be one of "
                          f"{', '.join(data.classes[:20])}")
    if cfg.reflow and cfg.coupling == "ot":
        raise Mistake("coupling ot: must be independent with --reflow, which has pairs "
                      "of its own")
    if run.opts.given.get("likelihood") and images and not is_8bit(data.test):
        raise Mistake(f"likelihood {cfg.likelihood}: --dataset {cfg.dataset} must be "
                      "points, or images of 8 bits at this resolution")


@command_line
def main(argv=None):
    """Train a network, or load one; then draw samples, and score them if asked to."""
    cfg, run = open_run("flow_matching", Config, PRESETS, SAMPLING, argv)
    path = make_path(cfg)
    data = run.load(load_data, cfg.dataset, cfg.image_size)
    images = len(data.shape) == 3
    check_settings(run, cfg, data)
    if run.sampling:
        model = run.trained(make_network(cfg, data))
    else:
        model = train(cfg, run, data)
    if not run.main:
        return  # of several processes only the first one draws

    n, batch_size = (cfg.n_samples, 100) if images else (100 * cfg.n_samples, 10_000)
    y = None
    if cfg.p_uncond < 1:  # the classes that were asked for, one after another
        classes = [data.classes.index(c) for c in cfg.classes or data.classes]
        i = torch.arange(max(n, 10, run.opts.evaluate or 0)) % len(classes)
        y = torch.tensor(classes)[i].to(run.device)

    def labels_of(batch):
        return None if y is None else y[batch.start:batch.stop]

    def states(batch):
        x0 = torch.randn(len(batch), *data.shape, device=run.device)
        return flow_from_noise(cfg, model, path, x0, labels_of(batch))

    samples, timing = run.draw(n, states, model, cfg.S, batch_size)
    run.add_metrics(sampling=timing | {"sampler": cfg.sampler})
    plotting.samples(run.path("samples.png"), samples, data, "Drawn from noise")
    figure_loss(run, model, path, data)
    if images:
        run.add_metrics(samples=quality.glance(samples, data, labels_of(range(n))))
        plotting.denoising(run.path("denoising.gif"), states(range(9)))
        x0 = torch.randn(10, *data.shape, device=run.device)
        v = velocity_fn(model, labels_of(range(10)), cfg.w)
        figure_steps(run, v, x0, path.t_end)
    else:
        frames = plotting.evenly(list(states(range(2000))), 33)
        plotting.film(run.path("denoising.gif"), [x for _, x in frames],
                      [f"t = {t:.2f}" for t, _ in frames])
        figure_velocity(run, velocity_fn(model), path, data)
    measure_likelihood(run, cfg, velocity_fn(model), path, data)
    labels = labels_of(range(run.opts.evaluate or 0))
    run.evaluate(states, model, cfg.S, data, labels)
    run.finish("experiments/flow_matching.py")


if __name__ == "__main__":
    main()
