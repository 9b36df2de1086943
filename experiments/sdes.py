"""The three SDEs side by side: results/score_based/three_sdes.png.

    python experiments/sdes.py CHECKPOINT CHECKPOINT ...

Each row is ten draws of a checkpoint of score_based_diffusion_example.py. Beside it
stand the scores that `--sample CHECKPOINT --evaluate N` found, which are kept in
results/score_based/evaluation.json (vp), evaluation_ve.json and evaluation_subvp.json.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
import score_based_diffusion_example as sb  # noqa: E402
from common import plotting  # noqa: E402
from common.data import load_images  # noqa: E402
from common.run import open_run  # noqa: E402


def row(checkpoint, folder, flags):
    """(ten draws, the words beside them)."""
    cfg, run = open_run("score_based", sb.Config, sb.PRESETS, sb.SAMPLING,
                        ["--sample", checkpoint, *flags])
    data = run.load(load_images, cfg.dataset, cfg.image_size)
    sde = sb.make_sde(cfg)
    model = run.trained(sb.make_network(cfg, data.shape))
    score = sb.score_fn(model, sde, cfg.std_floor, cfg.clip_x0)
    xT = sde.prior_sampling((10, *data.shape), run.device)
    x = sb.final(sb.sampling_process(cfg, score, sde, xT))
    name = "evaluation.json" if cfg.sde == "vp" else f"evaluation_{cfg.sde}.json"
    found = json.loads((folder / name).read_text())
    scores, bits = found["evaluation"], found["bits_per_dim"]["mean"]
    return x, (f"{cfg.sde}: {scores['legible']:.0%} of {scores['n']} legible\n"
               f"Fréchet distance {scores['frechet_distance']:.1f}\n"
               f"{bits:.2f} bits/dim")


def main(*checkpoints, folder=ROOT / "results/score_based", flags=()):
    """Write three_sdes.png into the folder of the scores. flags: those of the runs."""
    rows, labels = zip(*(row(c, folder, flags) for c in checkpoints), strict=True)
    plotting.table(folder / "three_sdes.png", rows,
                   "The default settings with each SDE", labels)


if __name__ == "__main__":
    main(*sys.argv[1:])
