"""Two networks, one code: results/score_based/unique_codes.png, [SDE] App. D.5.

    python experiments/unique_codes.py

The MLP of score_based_diffusion_example.py is trained on the Swiss roll twice, with two
widths and from two seeds, and both networks encode the same held-out points by the ODE.
The codes depend on the data alone, so they agree where both scores are right. This
takes about twice as long as that page on the Swiss roll.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
import score_based_diffusion_example as sb  # noqa: E402
from common import plotting  # noqa: E402
from common.data import load_points  # noqa: E402
from common.run import new_run  # noqa: E402


def codes(cfg, seed, n, settings):
    """The codes (n, 2) of held-out points, by a network that is trained here."""
    run = new_run("score_based", cfg, seed=seed, **settings)
    data = run.load(load_points, cfg.dataset)
    sde = sb.make_sde(cfg)
    score = sb.score_fn(sb.train(cfg, run, data), sde)
    x = data.test[:n]
    return sb.final(sb.ode_process(score, sde, x, sde.eps, sde.T)).cpu()


def main(widths=(64, 128), n=1000, folder=ROOT / "results/score_based", changes=(),
         **settings):
    """Write the figure and the correlations.

    changes: fields of Config; settings: those of new_run.
    """
    cfg = replace(sb.PRESETS["swiss_roll"], **dict(changes))
    a, b = (codes(replace(cfg, hidden=width), seed, n, settings)
            for seed, width in enumerate(widths))
    correlation = [float(np.corrcoef(a[:, i], b[:, i])[0, 1]) for i in range(2)]
    error = (a - b).square().mean().sqrt().item()
    ends = [-3.5, 3.5]
    plotting.curves(folder / "unique_codes.png", [
        {"points": {"_": (a[:, i], b[:, i])}, "lines": {"_equal": (ends, ends, "k:")},
         "title": f"coordinate {i + 1}: correlation {r:.4f}",
         "xlabel": f"code, {widths[0]} wide", "ylabel": f"code, {widths[1]} wide"}
        for i, r in enumerate(correlation)])
    (folder / "unique_codes.json").write_text(json.dumps({
        "n": n, "widths": widths, "correlation": correlation, "rms_difference": error},
        indent=2))
    return a, b


if __name__ == "__main__":
    main()
