"""How many pictures are enough: the default DDPM training on 100, 500 and 4,500 digits.

    python experiments/how_many.py          about 12 minutes on 2 cores

Writes results/ddpm/how_many.json: the quality of 500 samples, and how near they are to
the pictures that were trained on, beside how near held-out digits are to these.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ddim_example as ddim  # noqa: E402
from common import quality  # noqa: E402
from common.data import Data, load_images  # noqa: E402
from common.device import seeded  # noqa: E402
from common.run import new_run  # noqa: E402

import torch  # noqa: E402


def measure(count, n, changes, how):
    """Scores of n samples (50 steps, eta = 1) of a training on count pictures."""
    run = new_run("ddim", ddim.Config(**changes), **how)
    cfg, data = run.cfg, run.load(load_images(run.cfg.dataset))
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    train = data.train[order[:count].to(run.device)]
    model = ddim.train(cfg, run, Data(**vars(data) | {"train": train,
                                                      "train_labels": None}))
    schedule = ddim.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    schedule, sharper = schedule.to(run.device), ddim.scaled(model, cfg.eps_scale)
    with seeded(0, run.device):
        xT = torch.randn(n, *data.shape).to(run.device)
        x = torch.cat([ddim.ddim_sample(sharper, part.shape, schedule, min(50, cfg.T),
                                        1.0, xT=part, temperature=cfg.temperature)
                       for part in xT.split(100)])
    found = quality.scores(x, data)  # against all 4,500
    nearest = {name: quality.nearest_neighbours(part, train)[1].mean().item()
               for name, part in (("samples", x), ("held_out", data.test))}
    return found | {"pictures": count, "steps": cfg.steps,
                    "nearest_trained_rms": nearest}


def main(counts=(100, 500, 4500), n=500, folder=ROOT / "results/ddpm", changes=(),
         **how):
    """Train and score for each count. changes: of Config; how: see new_run."""
    rows = [measure(count, n, dict(changes), how) for count in counts]
    (folder / "how_many.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
