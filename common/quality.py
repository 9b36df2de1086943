"""Quality: a judge of legible pictures, and distances in its features.

The judge is a classifier with one class more, "none of these". A plain classifier is
sure of noise, too; the judge has seen noise, noised pictures, two pictures in one and
more, and tells them from pictures of the data's classes. The Fréchet distance here is
taken in its features: it is not an FID and cannot be compared with one.
"""

import functools
import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from .data import cached
from .device import seeded

# A picture is legible when one class of the data is more probable than this.
LEGIBLE = 0.9
# A judge is trained for 40 epochs, but for so many steps at least and at most.
FEWEST, MOST = 200, 1500


class Judge(nn.Module):
    """A small classifier of pictures; its last class is "none of these".

    Its 64 last features are the space of all distances here.
    """

    def __init__(self, shape, classes):
        super().__init__()
        (c_in, h, w), layers = shape, [nn.Hardtanh()]
        halvings = max(2, math.ceil(math.log2(min(h, w) / 4)))
        for c in (16, 32, *[24] * (halvings - 2)):
            # One convolution at the full size, two at the smaller ones: half the time.
            layers += ([nn.Conv2d(c_in, c, 5, padding=2)] if c == 16 else
                       [nn.Conv2d(c_in, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(),
                        nn.Conv2d(c, c, 3, padding=1)])
            layers += [nn.MaxPool2d(2), nn.BatchNorm2d(c), nn.ReLU()]
            c_in, h, w = c, h // 2, w // 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.25),
                                  nn.Linear(c_in * h * w, 64), nn.ReLU())
        self.head = nn.Linear(64, classes + 1)

    def forward(self, x):
        """x: (B, C, H, W), clamped to [-1, 1] -> logits (B, classes + 1)."""
        return self.head(self.body(x))


def load_judge(data, fit=True):
    """The judge of labelled data, trained once on its training part, then kept.

    Returns (judge in eval mode, {"accuracy", "legible"} on the held-out part), or
    (None, {}) where the data has no labels, or fit is False and none is kept.
    The caller's random state is left alone.
    """
    if data.train_labels is None:
        return None, {}
    device = data.train.device
    key = (data.shape, len(data.train), data.classes, data.fingerprint())
    with seeded(2024, device):
        judge = cached(f"judge_{data.name}", key,
                       lambda: Judge(data.shape, len(data.classes)).to(device),
                       (lambda judge: _train(judge, data)) if fit else None)
    if judge is None:
        return None, {}
    judge.eval().requires_grad_(False)
    p = probabilities(judge, data.test)
    return judge, {"accuracy": agreement(p, data.test_labels),
                   "legible": legible_fraction(p)}


def _train(judge, data):
    x, y = data.train, data.train_labels
    batch_size = min(64, 4 * len(x))  # each picture comes shifted in many ways
    steps = min(max(40 * len(x) // batch_size, FEWEST), MOST)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    judge.train()
    bar = tqdm(range(steps), desc=f"judge of {data.name} (once)", unit="step",
               leave=False)
    for _ in bar:
        i = torch.randint(len(x), (batch_size,), device=x.device)
        real, labels = augmented(x[i]), y[i]
        none = none_of_these(real, labels)[::2]  # half as many as real ones
        # Faint noise on both sides, so that it tells nothing.
        both = torch.cat([real, none])
        std = (0.2 * _uniform(both) - 0.1).clamp(min=0)  # half of them get none
        target = torch.cat([labels, torch.full_like(labels[::2], len(data.classes))])
        loss = F.cross_entropy(judge(both + std * torch.randn_like(both)), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def _uniform(x, channels=1):
    """Numbers in [0, 1), one a picture (and channel): (B, channels, 1, 1)."""
    return torch.rand(len(x), channels, 1, 1, device=x.device)


def augmented(x):
    """Pictures moved by up to 2 pixels, half of them turned and scaled too.

    x: (B, C, H, W) -> like x.
    """
    some = (_uniform(x) < 0.5).float()
    angle = (some * (0.4 * _uniform(x) - 0.2)).flatten()  # radians
    scale = (1 + some * (0.2 * _uniform(x) - 0.1)).flatten()
    most = min(2, x.shape[3] // 8)
    shift = torch.randint(-most, most + 1, (2, len(x)), device=x.device)
    dx, dy = shift[0] * 2 / x.shape[3], shift[1] * 2 / x.shape[2]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos, -sin, dx, sin, cos, dy], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def none_of_these(x, y):
    """Pictures of no class, each of a kind drawn from NONE, made of real ones.

    x: (B, C, H, W) in [-1, 1], y: (B,) their labels -> like x.
    """
    # The second picture is of another class, where there is one.
    other = x[((y[:, None] != y) + 1e-6).multinomial(1)[:, 0]]
    kind, none = torch.randint(len(NONE), y.shape, device=x.device), x.clone()
    for k, make in enumerate(NONE):
        rows = kind == k
        if rows.any():
            none[rows] = make(x[rows], other[rows])
    return none


def _noise(a, b):
    uniform, normal = 2 * torch.rand_like(a) - 1, torch.randn_like(a)
    return torch.where(_uniform(a) < 0.3, uniform, 1.2 * _uniform(a) * normal)


def _noised(a, b):
    """x_t of a diffusion, moderate to large noise."""
    alpha_bar = 0.9 * _uniform(a)
    return alpha_bar.sqrt() * a + (1 - alpha_bar).sqrt() * torch.randn_like(a)


def _moved(b):
    most = b.shape[-1] // 8
    return b.roll(torch.randint(-most, most + 1, (2,)).tolist(), (2, 3))


def _joined(a, b):
    """One half of a, the other half of b: top and bottom, or left and right."""
    y, x = (torch.arange(n, device=a.device) < n // 2 for n in a.shape[2:])
    return torch.where(torch.where(_uniform(a) < 0.5, y[:, None], x), a, b)


def _shuffled(a, b):
    """The blocks of a 2 x 2 or 4 x 4 grid in random order."""
    (n, c, h, w), none = a.shape, a.clone()
    g = 2 if torch.rand(()) < 0.5 else 4
    h, w = h // g, w // g
    cells = a[..., :g * h, :g * w].reshape(n, c, g, h, g, w)
    blocks = cells.permute(0, 2, 4, 1, 3, 5).reshape(n, g * g, c, h, w)
    order = torch.rand(n, g * g, device=a.device).argsort(1)
    blocks = blocks[torch.arange(n, device=a.device)[:, None], order]
    cells = blocks.view(n, g, g, c, h, w).permute(0, 3, 1, 4, 2, 5)
    none[..., :g * h, :g * w] = cells.reshape(n, c, g * h, g * w)
    return none


def _smooth(a, b):
    """Blobs, or the lines between them."""
    side = int(torch.randint(2, 7, ()))
    coarse = torch.randn(*a.shape[:2], side, side, device=a.device)
    blobs = 2 * _uniform(a) * F.interpolate(coarse, a.shape[2:], mode="bilinear")
    return torch.where(_uniform(a) < 0.5, blobs, 1 - 10 * blobs.abs())


def _empty(a, b):
    """One grey or colour, black and white among them."""
    return (2.4 * _uniform(a, a.shape[1]) - 1.2).clamp(-1, 1).expand_as(a)


# The kinds of pictures that are none, each made of pictures a and b of two classes.
NONE = (_noise, _noised, _joined, _shuffled, _smooth, _empty,
        lambda a, b: torch.maximum(a, _moved(b)),
        lambda a, b: (a + _moved(b)) / 2,
        lambda a, b: -a)


@torch.no_grad()
def features(judge, x, batch_size=500):
    """(N, C, H, W) -> (N, 64) float64 numpy features."""
    parts = [judge.body(part).cpu().double() for part in x.split(batch_size)]
    return torch.cat(parts).numpy()


@torch.no_grad()
def probabilities(judge, x, batch_size=500):
    """(N, C, H, W) -> (N, classes + 1) probabilities, that of "none of these" last."""
    return torch.cat([judge(part).softmax(1) for part in x.split(batch_size)])


def legible_fraction(p):
    """The fraction of rows of p, (N, classes + 1), with one class above LEGIBLE.

    The last column, "none of these", is not a class of the data.
    """
    return (p[:, :-1].max(1).values > LEGIBLE).float().mean().item()


def agreement(p, labels):
    """The fraction of rows of p, (N, classes + 1), that are largest at their label."""
    return (p.argmax(1) == labels).float().mean().item()


# Scores


def frechet_distance(a, b):
    """Fréchet distance of Gaussians fitted to features a: (N, D) and b: (M, D).

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), the trace of the
    root from its eigenvalues. Source: Heusel et al., arXiv 1706.08500.
    """
    from scipy import linalg

    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    # with one row there is no n - 1 to divide by: the covariance is 0
    cov_a, cov_b = (np.cov(x.T, bias=len(x) == 1) for x in (a, b))
    root = linalg.sqrtm(cov_a + 1e-12 * np.eye(len(cov_a))).real
    # cov_a cov_b is not symmetric; this product is, and has the same eigenvalues.
    eigenvalues = linalg.eigvalsh(root @ cov_b @ root)
    cross = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return float(mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def inception_score(p):
    """exp E KL(p(y|x) || p(y)) from p: (N, classes).

    Source: Salimans et al., arXiv 1606.03498.
    """
    p = p.cpu().double()
    marginal = p.mean(0, keepdim=True).clamp(min=1e-300)  # no log of 0
    kl = torch.special.xlogy(p, p) - p * marginal.log()
    return kl.sum(1).mean().exp().item()


def precision_recall(real, fake, k=3):
    """Improved precision and recall of features real: (N, D), fake: (M, D).

    Precision: the fraction of fakes inside a real point's k-nearest-neighbour ball;
    recall: the reverse. Source: Kynkäänniemi et al., arXiv 1904.06991.
    """
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    k = min(k, len(real) - 1, len(fake) - 1)

    def covered(points, centres):
        # k + 1, since a centre's nearest neighbour is itself
        radius = torch.cdist(centres, centres).kthvalue(k + 1, dim=1).values
        return (torch.cdist(points, centres) <= radius).any(1).double().mean().item()

    return covered(fake, real), covered(real, fake)


def nearest_neighbours(x, reference, batch_size=250):
    """Index of the closest reference image to each x, and its rms distance a pixel."""
    flat = reference.flatten(1)
    found = [torch.cdist(part.flatten(1), flat).min(1) for part in x.split(batch_size)]
    distance = torch.cat([f.values for f in found]) / flat.shape[1] ** 0.5
    return torch.cat([f.indices for f in found]), distance


def energy_distance(a, b):
    """2 E|a-b| - E|a-a'| - E|b-b'| over all pairs, a V-statistic.

    a: (N, D), b: (M, D).
    """
    between = torch.cdist(a, b).mean()
    within_a, within_b = torch.cdist(a, a).mean(), torch.cdist(b, b).mean()
    return (2 * between - within_a - within_b).item()


def glance(samples, data, labels=None):
    """A first look at samples (N, C, H, W): what metrics.json says of every run.

    labels: (N,) the classes asked for. No judge is trained for it: where none is at
    hand, the distances alone, and where the data has no examples, none of them.
    """
    if data.empty:
        return {"n": len(samples)}
    distance = nearest_neighbours(samples, data.train)[1]
    found = {"n": len(samples),
             "nearest_train_rms_mean": distance.mean().item(),
             "nearest_train_rms_min": distance.min().item()}
    judge, of_held_out = load_judge(data, fit=False)
    return found | (_judged(probabilities(judge, samples), of_held_out, labels)
                    if judge else {})


def _judged(p, of_held_out, labels):
    found = {"legible": legible_fraction(p),
             "legible_of_held_out": of_held_out["legible"]}
    if labels is not None:
        found |= {"accuracy": agreement(p, labels),
                  "accuracy_of_held_out": of_held_out["accuracy"]}
    return found


@functools.lru_cache(maxsize=1)
def reference(data):
    """What samples are held against, computed once: a namespace of numbers."""
    judge, of_held_out = load_judge(data)
    distance = nearest_neighbours(data.test, data.train)[1].mean().item()
    found = SimpleNamespace(judge=judge, of_held_out=of_held_out, nearest_rms=distance)
    if judge:
        found.real, held_out = (features(judge, x) for x in (data.train, data.test))
        found.frechet_distance = frechet_distance(found.real, held_out)
    return found


def scores(samples, data, labels=None):
    """The scores of --evaluate: samples (N, C, H, W) against the training part.

    labels: (N,) the classes asked for. Data without labels has no judge: distances.
    """
    of_data = reference(data)
    found = {
        "n": len(samples),
        "reference": f"{data.name}, training part, n = {len(data.train)}",
        "nearest_train_rms": nearest_neighbours(samples, data.train)[1].mean().item(),
        "nearest_train_rms_of_held_out": of_data.nearest_rms}
    if of_data.judge:
        p = probabilities(of_data.judge, samples)
        real, fake = of_data.real, features(of_data.judge, samples)
        precision, recall = precision_recall(real[:2000], fake)
        found |= _judged(p, of_data.of_held_out, labels) | {
            "classes": torch.bincount(p.argmax(1), minlength=p.shape[1]).tolist(),
            "frechet_distance": frechet_distance(real, fake),
            "frechet_distance_of_held_out": of_data.frechet_distance,
            "inception_score": inception_score(p),
            "precision": precision,
            "recall": recall}
    return found
