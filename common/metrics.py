"""Quality of samples: a small classifier, Fréchet distance, Inception Score, precision and recall.

The features are those of a classifier trained here, so the distance is a Fréchet distance in
classifier features; it is not an FID, and is not comparable with one.
"""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import linalg
from torch import nn
from tqdm import tqdm

from .data import CACHE

SURE = 0.9  # a classifier is sure of a picture when its largest probability is above this


class Classifier(nn.Module):
    """A small convolutional classifier; its 64 penultimate features are the space of all distances
    here.
    """

    def __init__(self, channels, classes):
        super().__init__()

        def block(c_in, c_out):
            return [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(),
                    nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(),
                    nn.MaxPool2d(2)]

        self.body = nn.Sequential(*block(channels, 16), *block(16, 32), nn.AdaptiveAvgPool2d(3),
                                  nn.Flatten(), nn.Dropout(0.25), nn.Linear(32 * 9, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        """x: (B, C, H, W) in [-1, 1] -> logits (B, classes)."""
        return self.head(self.body(x))


def load_classifier(data, epochs=12, cache=CACHE):
    """The classifier of a labelled dataset: trained once on its training part, then read from the
    cache.

    Returns (classifier in eval mode, {"accuracy", "sure"} on the held-out part), or (None, {})
    where the data has no labels. Training leaves the caller's random state alone.
    """
    if data.train_labels is None:
        return None, {}
    device, shape = data.train.device, data.train.shape
    name = data.name.replace(":", "_").replace("/", "_")
    file = Path(cache) / f"classifier_{name}_{shape[-1]}.pt"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(2024)
        classifier = Classifier(shape[1], len(data.classes)).to(device)
        if not _read(classifier, file, data):
            torch.manual_seed(2024)
            classifier = Classifier(shape[1], len(data.classes)).to(device)
            _train(classifier, data, epochs)
            file.parent.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(f".{os.getpid()}.tmp")
            torch.save({"weights": classifier.state_dict(), "reference": _fingerprint(data)},
                       scratch)
            os.replace(scratch, file)
    classifier.eval().requires_grad_(False)
    p = probabilities(classifier, data.test)
    return classifier, {"accuracy": (p.argmax(1) == data.test_labels).float().mean().item(),
                        "sure": sure_share(p)}


def _fingerprint(data):
    """A number that changes with the training images, so that another set is not judged by an old
    cache.
    """
    return float(data.train.double().mean() + len(data.train))


def _read(classifier, file, data):
    try:
        stored = torch.load(file, map_location=data.train.device, weights_only=True)
        classifier.load_state_dict(stored["weights"])
        return stored["reference"] == _fingerprint(data)
    except Exception:  # absent, cut short, or of another shape: it is only a cache, train again
        return False


def _train(classifier, data, epochs, batch_size=64):
    x, y = data.train, data.train_labels
    steps = min(epochs * len(x) // batch_size, 3000)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    classifier.train()
    for _ in tqdm(range(steps), desc=f"classifier of {data.name} (once)", unit="step", leave=False):
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
    return torch.cat([classifier.body(part) for part in x.split(batch_size)]).double().cpu().numpy()


@torch.no_grad()
def probabilities(classifier, x, batch_size=500):
    """(N, C, H, W) -> (N, classes) class probabilities."""
    return torch.cat([classifier(part).softmax(1) for part in x.split(batch_size)])


def sure_share(p):
    """Share of rows whose largest probability is above SURE. p: (N, classes)."""
    return (p.max(1).values > SURE).float().mean().item()


def frechet_distance(a, b):
    """Fréchet distance of Gaussians fitted to features a (N, D) and b (M, D) (Heusel et al., arXiv
    1706.08500).

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), the root's trace from the
    eigenvalues.
    """
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(
        cov_a + 1e-12 * np.eye(len(cov_a)))  # symmetric, so is the middle of root cov_b root
    cross = np.sqrt(np.clip(linalg.eigvalsh(root.real @ cov_b @ root.real), 0, None)).sum()
    return float(mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def inception_score(p):
    """exp E KL(p(y|x) || p(y)) (Salimans et al., arXiv 1606.03498) from probabilities p: (N,
    classes).
    """
    p = p.double()
    kl = torch.special.xlogy(p, p) - p * p.mean(0, keepdim=True).clamp(min=1e-300).log()
    return kl.sum(1).mean().exp().item()


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991) of features (N, D), (M,
    D).

    Precision: share of fakes inside a real point's k-nearest-neighbour ball; recall: the reverse.
    """
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)

    def covered(points, centres):
        radius = (
            torch.cdist(centres, centres).kthvalue(k + 1, dim=1).values)  # k + 1: itself is at 0
        return (torch.cdist(points, centres) <= radius).any(1).double().mean().item()

    return covered(fake, real), covered(real, fake)


def nearest_neighbours(x, reference, batch_size=250):
    """For each x the index of the closest reference image and its root-mean-square distance a
    pixel.
    """
    flat = reference.flatten(1)
    found = [torch.cdist(part.flatten(1), flat).min(1) for part in x.split(batch_size)]
    distance = torch.cat([f.values for f in found]) / flat.shape[1] ** 0.5
    return torch.cat([f.indices for f in found]), distance


def energy_distance(a, b):
    """2 E|a-b| - E|a-a'| - E|b-b'| over all pairs (V-statistic). a: (N, D), b: (M, D)."""
    return (
        2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def quality(samples, data, classifier):
    """The scores that --evaluate writes: samples (N, C, H, W) against the training part of data."""
    p = probabilities(classifier, samples)
    real, fake = features(classifier, data.train), features(classifier, samples)
    precision, recall = precision_recall(real[:2000], fake)
    scores = {
        "n": len(samples), "reference": f"{data.name}, training part, n = {len(data.train)}",
        "sure": sure_share(p),
        "classes": torch.bincount(p.argmax(1), minlength=p.shape[1]).tolist(),
        "frechet_distance": frechet_distance(real, fake),
        "frechet_distance_of_held_out": frechet_distance(real, features(classifier, data.test)),
        "inception_score": inception_score(p), "precision": precision, "recall": recall,
        "nearest_train_rms": nearest_neighbours(samples, data.train)[1].mean().item(),
        "nearest_train_rms_of_held_out": nearest_neighbours(data.test, data.train)[1].mean().item()}
    return scores | inception_v3_scores(samples, data)


@torch.no_grad()
def inception_v3_scores(samples, data, batch_size=50):
    """FID and Inception Score with torchvision's Inception v3 where its weights are in torch's hub
    cache.

    Empty where they are not; nothing is downloaded. The weights are torchvision's, not those of the
    TensorFlow graph that published FIDs use, so small differences from published numbers are
    expected.
    """
    from torchvision.models import Inception_V3_Weights, inception_v3

    name = Inception_V3_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not file.exists():
        return {}
    network = inception_v3(weights=None, init_weights=False, transform_input=False).eval()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    network.to(samples.device)
    pooled = []
    network.avgpool.register_forward_hook(
        lambda _, __, out: pooled.append(out.flatten(1).double().cpu()))

    def run(x):
        pooled.clear()
        logits = []
        for part in x.split(batch_size):
            part = part.expand(-1, 3, -1, -1) if part.shape[1] == 1 else part
            logits.append(network(F.interpolate(part, (299, 299), mode="bilinear", antialias=True)))
        return torch.cat(pooled).numpy(), torch.cat(logits).softmax(1)

    real, _ = run(data.train)
    fake, p = run(samples)
    return {"fid_torchvision": frechet_distance(real, fake),
            "inception_score_torchvision": inception_score(p)}
