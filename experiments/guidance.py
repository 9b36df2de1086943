"""results/conditional/guidance.png, from the two sweeps that lie beside it.

    python experiments/guidance.py

The sweeps, made by `experiments/conditional.py --evaluate 500`, are of the default
network (evaluation.json) and of one that never saw a label, trained with --p_uncond 1
--guidance classifier (evaluation_unconditional.json).
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from experiments.conditional import figure_guidance  # noqa: E402


def main(folder=ROOT / "results/conditional"):
    """Draw both sweeps of the folder in one figure."""
    scores = {}
    for name in ("evaluation", "evaluation_unconditional"):
        scores |= json.loads((folder / f"{name}.json").read_text())["guidance_sweep"]
    figure_guidance(folder / "guidance.png", scores)


if __name__ == "__main__":
    main()
