"""Quality: a judge, Fréchet distance, Inception Score, precision and recall.

The features are those of the judge, a classifier trained here: the distance is a
Fréchet distance in them; it is not an FID, and is not comparable with one.
"""

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from .judge import agreement, features, legible_share, load_judge, probabilities


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


def spectrum(x):
    """Mean power at each frequency of series (N, 1, L): (L // 2 + 1,)."""
    return torch.fft.rfft(x[:, 0].cpu(), norm="ortho").abs().square().mean(0)


def autocorrelation(x):
    """Mean autocorrelation of series (N, 1, L) at lags 0 to L // 2, 1 at lag 0.

    Each about its own mean, over the sum of all its squares, as usual (biased).
    """
    x = x[:, 0].cpu()
    x, length = x - x.mean(1, keepdim=True), x.shape[1]
    power = torch.fft.rfft(x, 2 * length).abs().square()  # padded: it does not wrap
    products = torch.fft.irfft(power)[:, :length // 2 + 1]
    return (products / products[:, :1].clamp(min=1e-12)).mean(0)


def spectral_distance(a, b):
    """Log-spectral distance of series a and b, (N, 1, L) and (M, 1, L), in dB.

    The root of the mean square difference of their mean power spectra in decibels.
    """
    decibels = [10 * spectrum(x).clamp(min=1e-12).log10() for x in (a, b)]
    return (decibels[0] - decibels[1]).square().mean().sqrt().item()


def glance(samples, data, labels=None):
    """A first look at samples (N, C, H, W): what metrics.json says of every run.

    labels: (N,) the classes asked for. No judge is trained for it: where none is at
    hand, the distances alone.
    """
    distance = nearest_neighbours(samples, data.train)[1]
    found = {"n": len(samples),
             "nearest_train_rms_mean": distance.mean().item(),
             "nearest_train_rms_min": distance.min().item()}
    judge, of_held_out = load_judge(data, fit=False)
    return found | (_judged(probabilities(judge, samples), of_held_out, labels)
                    if judge else {})


def _judged(p, of_held_out, labels):
    found = {"legible": legible_share(p), "legible_of_held_out": of_held_out["legible"]}
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


def quality(samples, data, labels=None):
    """The scores of --evaluate: samples (N, C, H, W) against the training part.

    labels: (N,) the classes asked for. Data without labels has no judge: distances.
    """
    of_data = reference(data)
    scores = {
        "n": len(samples),
        "reference": f"{data.name}, training part, n = {len(data.train)}",
        "nearest_train_rms": nearest_neighbours(samples, data.train)[1].mean().item(),
        "nearest_train_rms_of_held_out": of_data.nearest_rms}
    if of_data.judge:
        p = probabilities(of_data.judge, samples)
        real, fake = of_data.real, features(of_data.judge, samples)
        precision, recall = precision_recall(real[:2000], fake)
        scores |= _judged(p, of_data.of_held_out, labels) | {
            "classes": torch.bincount(p.argmax(1), minlength=p.shape[1]).tolist(),
            "frechet_distance": frechet_distance(real, fake),
            "frechet_distance_of_held_out": of_data.frechet_distance,
            "inception_score": inception_score(p),
            "precision": precision,
            "recall": recall}
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
