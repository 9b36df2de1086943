"""results/conditional/guidance.png, of the evaluations that lie beside it.

Those are evaluation.json, of the default network, and evaluation_unconditional.json, of
the one trained by --p_uncond 1 --guidance classifier: see README.md.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from conditional_diffusion_example import figure_guidance  # noqa: E402


def main(folder=ROOT / "results/conditional"):
    """Draw both evaluations of the folder in one figure."""
    scores = {}
    for name in ("evaluation", "evaluation_unconditional"):
        scores |= json.loads((folder / f"{name}.json").read_text())["guidance_sweep"]
    figure_guidance(folder / "guidance.png", scores)


if __name__ == "__main__":
    main()
