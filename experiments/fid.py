"""FID and Inception Score of a run's samples, by torchvision's Inception v3.

    python experiments/fid.py RUN

RUN is a run folder with evaluated.npz, as `--evaluate N` writes it; the samples in it
are held against the training part of the data set that RUN/config.json names. Prints
both scores and adds them to RUN/metrics.json. The weights must lie in torch's hub
cache: nothing is downloaded. They are not the TensorFlow weights of published FIDs,
from which small differences are expected; an FID of few samples is too large.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.cli import Mistake, command_line, write_whole  # noqa: E402
from common.data import load_images, to_unit  # noqa: E402
from common.device import pick_device  # noqa: E402
from common.quality import frechet_distance, inception_score  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402


def load_inception():
    """torchvision's Inception v3 with the weights in torch's hub cache; eval mode."""
    from torchvision.models import Inception_V3_Weights, inception_v3

    url = Inception_V3_Weights.IMAGENET1K_V1.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not file.exists():
        raise Mistake(f"{file}: the weights of Inception v3 are missing; download "
                      f"{url} into that folder")
    network = inception_v3(weights=None, init_weights=False, transform_input=False)
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network.eval()


@torch.no_grad()
def look(network, x, batch_size=50):
    """Pooled features (N, D), float64 numpy, and probabilities of (N, C, H, W) images.

    Images are in [-1, 1], grey or of three channels, of any size.
    """
    device, pooled, logits = next(network.parameters()).device, [], []
    hook = network.avgpool.register_forward_hook(
        lambda _, __, out: pooled.append(out.flatten(1).cpu().double()))
    for part in tqdm(x.split(batch_size), desc=f"Inception of {len(x)}", leave=False):
        part = part.expand(-1, 3, -1, -1)
        part = F.interpolate(part, (299, 299), mode="bilinear", antialias=True)
        logits.append(network(part.to(device)).cpu())
    hook.remove()
    return torch.cat(pooled).numpy(), torch.cat(logits).softmax(1)


def read(file, how):
    """What a file of a run folder holds; how: what makes it, where it is missing."""
    if not file.is_file():
        raise Mistake(f"{file}: is missing; {how}")
    if file.suffix == ".npz":
        return np.load(file)
    return json.loads(file.read_text("utf-8"))


@command_line
def main(argv=None):
    """Score the samples of a run folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    folder = parser.parse_args(argv).run
    cfg = read(folder / "config.json", "RUN must be a run folder")["config"]
    how = f"the run folder of --sample {folder} --evaluate 500 has one"
    samples = read(folder / "evaluated.npz", how)["samples"]
    metrics = read(folder / "metrics.json", how)
    network = load_inception().to(pick_device())
    real, _ = look(network, load_images(cfg["dataset"], cfg["image_size"]).train)
    fake, p = look(network, to_unit(torch.from_numpy(samples)))
    scores = {"fid_torchvision": frechet_distance(real, fake),
              "inception_score_torchvision": inception_score(p)}
    print("\n".join(f"{name} {value:.3f}" for name, value in scores.items()))
    write_whole(folder / "metrics.json", json.dumps(metrics | scores, indent=2))


if __name__ == "__main__":
    main()
