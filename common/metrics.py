"""Quality: a classifier, Fréchet distance, Inception Score, precision and recall.

The features are those of a classifier trained here, so the distance is a Fréchet
distance in classifier features; it is not an FID, and is not comparable with one.
"""

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import linalg
from torch import nn
from tqdm import tqdm

from .data import cached
from .device import seeded

# A classifier is sure of a picture when its largest probability is above this.
SURE = 0.9


class Classifier(nn.Module):
    """A small classifier; its 64 last features are the space of all distances here."""

    def __init__(self, channels, classes):
        super().__init__()

        def block(c_in, c_out):
            return [
                nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(),
                nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(),
                nn.MaxPool2d(2)]

        self.body = nn.Sequential(
            *block(channels, 16), *block(16, 32), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
            nn.Dropout(0.25), nn.Linear(32 * 9, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        """x: (B, C, H, W) in [-1, 1] -> logits (B, classes)."""
        return self.head(self.body(x))


def load_classifier(data, epochs=12):
    """The classifier of labelled data, trained once on its training part, then kept.

    Returns (classifier in eval mode, {"accuracy", "sure"} on the held-out part), or
    (None, {}) where the data has no labels. The caller's random state is left alone.
    """
    if data.train_labels is None:
        return None, {}
    device = data.train.device
    key = (data.shape, len(data.train), epochs, data.classes, fingerprint(data))
    with seeded(2024, device):
        classifier = cached(
            f"classifier_{data.name}", key,
            lambda: Classifier(data.shape[0], len(data.classes)).to(device),
            lambda classifier: _train(classifier, data, epochs))
    classifier.eval().requires_grad_(False)
    p = probabilities(classifier, data.test)
    of_held_out = {"accuracy": agreement(p, data.test_labels), "sure": sure_share(p)}
    return classifier, of_held_out


def fingerprint(data):
    """A number that changes with the training images and labels.

    With it in the key, a classifier that was fitted to others is not used.
    """
    images, labels = data.train.cpu().double(), data.train_labels.cpu().double()
    return float(images.mean() + labels.std())


def _train(classifier, data, epochs, batch_size=64):
    x, y = data.train, data.train_labels
    steps = min(epochs * len(x) // batch_size, 3000)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    classifier.train()
    bar = tqdm(range(steps), desc=f"classifier of {data.name} (once)", unit="step",
               leave=False)
    for _ in bar:
        i = torch.randint(len(x), (batch_size,), device=x.device)
        shift = tuple(torch.randint(-2, 3, (2,)).tolist())
        loss = F.cross_entropy(classifier(torch.roll(x[i], shift, dims=(2, 3))), y[i])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def features(classifier, x, batch_size=500):
    """(N, C, H, W) -> (N, 64) float64 numpy features."""
    parts = [classifier.body(part).cpu().double() for part in x.split(batch_size)]
    return torch.cat(parts).numpy()


@torch.no_grad()
def probabilities(classifier, x, batch_size=500):
    """(N, C, H, W) -> (N, classes) class probabilities."""
    return torch.cat([classifier(part).softmax(1) for part in x.split(batch_size)])


def sure_share(p):
    """Share of rows of p, (N, classes), whose largest probability is above SURE."""
    return (p.max(1).values > SURE).float().mean().item()


def agreement(p, labels):
    """Share of rows of p, (N, classes), whose largest probability is the label's."""
    return (p.argmax(1) == labels).float().mean().item()


def frechet_distance(a, b):
    """Fréchet distance of Gaussians fitted to features a: (N, D) and b: (M, D).

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), the trace of the
    root from its eigenvalues. Source: Heusel et al., arXiv 1706.08500.
    """
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
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

    Precision: share of fakes inside a real point's k-nearest-neighbour ball;
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

    labels: (N,) the classes asked for. Without labels in the data, the distances alone.
    """
    distance = nearest_neighbours(samples, data.train)[1]
    found = {"n": len(samples),
             "nearest_train_rms_mean": distance.mean().item(),
             "nearest_train_rms_min": distance.min().item()}
    classifier, of_held_out = load_classifier(data)
    if classifier:
        p = probabilities(classifier, samples)
        found |= {"sure": sure_share(p), "classifier": of_held_out}
        if labels is not None:
            found["accuracy"] = agreement(p, labels)
    return found


@functools.lru_cache(maxsize=1)
def reference(data):
    """What samples are held against, computed once: a namespace of numbers."""
    classifier, of_held_out = load_classifier(data)
    real, held_out = (features(classifier, x) for x in (data.train, data.test))
    distance = nearest_neighbours(data.test, data.train)[1].mean().item()
    return SimpleNamespace(
        classifier=classifier, real=real, accuracy=of_held_out["accuracy"],
        frechet_distance=frechet_distance(real, held_out), nearest_rms=distance)


def quality(samples, data, labels=None):
    """The scores of --evaluate: samples (N, C, H, W) against the training part."""
    of_data = reference(data)
    p = probabilities(of_data.classifier, samples)
    real, fake = of_data.real, features(of_data.classifier, samples)
    precision, recall = precision_recall(real[:2000], fake)
    distance = nearest_neighbours(samples, data.train)[1].mean().item()
    scores = {
        "n": len(samples),
        "reference": f"{data.name}, training part, n = {len(data.train)}",
        "sure": sure_share(p),
        "classes": torch.bincount(p.argmax(1), minlength=p.shape[1]).tolist(),
        "frechet_distance": frechet_distance(real, fake),
        "frechet_distance_of_held_out": of_data.frechet_distance,
        "inception_score": inception_score(p),
        "precision": precision,
        "recall": recall,
        "nearest_train_rms": distance,
        "nearest_train_rms_of_held_out": of_data.nearest_rms}
    if labels is not None:
        scores |= {"accuracy": agreement(p, labels),
                   "accuracy_of_held_out": of_data.accuracy}
    return scores | inception_v3_scores(samples, data)


@torch.no_grad()
def inception_v3_scores(samples, data, batch_size=50):
    """FID and Inception Score with torchvision's Inception v3, {} without its weights.

    They are looked for in torch's hub cache; nothing is downloaded. They are not the
    TensorFlow weights of published FIDs, from which small differences are expected.
    """
    from torchvision.models import Inception_V3_Weights, inception_v3

    name = Inception_V3_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not file.exists():
        return {}
    network = inception_v3(weights=None, init_weights=False, transform_input=False)
    network.eval()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    network.to(samples.device)
    pooled = []
    network.avgpool.register_forward_hook(
        lambda _, __, out: pooled.append(out.flatten(1).cpu().double()))

    def run(x):
        pooled.clear()
        logits = []
        for part in x.split(batch_size):
            part = part.expand(-1, 3, -1, -1) if part.shape[1] == 1 else part
            part = F.interpolate(part, (299, 299), mode="bilinear", antialias=True)
            logits.append(network(part))
        return torch.cat(pooled).numpy(), torch.cat(logits).softmax(1)

    real, _ = run(data.train)
    fake, p = run(samples)
    return {"fid_torchvision": frechet_distance(real, fake),
            "inception_score_torchvision": inception_score(p)}
