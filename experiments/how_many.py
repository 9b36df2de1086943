"""How many images are enough: the default training on 100, 500 and 4,500 digits.

    python experiments/how_many.py          about 12 minutes on 2 cores

Writes results/ddpm/how_many.json: the quality of 500 samples, and how near they are to
the images that were trained on, beside how near held-out digits are to these.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
import ddim_example as ddim  # noqa: E402
from common import quality  # noqa: E402
from common.data import load_images  # noqa: E402
from common.device import seeded  # noqa: E402
from common.run import new_run  # noqa: E402


def measure(run, count, n):
    """Scores of n samples (50 steps, eta = 1) after a training on `count` images."""
    cfg, data = run.cfg, run.load(load_images, run.cfg.dataset)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    few = data.train[order[:count].to(run.device)]
    own = run.load(lambda: replace(data, train=few, train_labels=None))
    model = ddim.train(cfg, run, own)
    schedule = ddim.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    schedule = schedule.to(run.device)

    def eps_model(xt, t):
        return cfg.eps_scale * model(xt, t)

    with seeded(0, run.device):
        xT = torch.randn(n, *data.shape).to(run.device)
        x = torch.cat([ddim.ddim_sample(eps_model, part, schedule, min(50, cfg.T), 1.0)
                       for part in xT.split(100)])
    nearest = {name: quality.nearest_neighbours(part, few)[1].mean().item()
               for name, part in (("samples", x), ("held_out", data.test))}
    return quality.scores(x, data) | {  # compared with all 4,500
        "pictures": count, "steps": cfg.steps, "nearest_trained_rms": nearest}


def main(counts=(100, 500, 4500), n=500, folder=ROOT / "results/ddpm",
         cfg=ddim.Config(), out=None, device=None):  # noqa: B008  frozen
    """Train and score for each count."""
    rows = [measure(new_run("ddim", cfg, out=out, device=device), count, n)
            for count in counts]
    (folder / "how_many.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
