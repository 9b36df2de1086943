"""Train the two judges of the bundled digits that are shipped in pretrained/.

About two minutes each on one core. Prints what share of held-out digits, and of
pictures of no digit, a judge finds legible.
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import data, quality  # noqa: E402


def pictures(x, y):
    """{name: (N, C, H, W)} of held-out digits x and their labels y, the first real."""
    def noised(alpha_bar):
        return alpha_bar**0.5 * x + (1 - alpha_bar) ** 0.5 * torch.randn_like(x)

    other = x[(y[:, None] != y).float().multinomial(1)[:, 0]]
    half, block = x.shape[2] // 2, x.shape[2] // 4  # 4 x 4 blocks
    smooth = F.interpolate(torch.randn(len(x), 1, 4, 4), x.shape[2:], mode="bilinear")
    grid = F.unfold(x, block, stride=block)
    order = torch.rand(len(x), 1, 16).argsort(2).expand_as(grid)
    alpha_bars = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    return {
        "real": x, "with noise of 0.05": x + 0.05 * torch.randn_like(x),
        "inverted": -x, "uniform noise": 2 * torch.rand_like(x) - 1,
        "Gaussian noise": torch.randn_like(x),
        "Gaussian noise of 0.3": 0.3 * torch.randn_like(x),
        "smooth noise": smooth, "smooth noise of 0.3": 0.3 * smooth,
        "black": -torch.ones_like(x), "grey": 0 * x, "white": torch.ones_like(x),
        "x_t at t = T/2": noised(alpha_bars[499].item()),
        "alpha_bar = 0.5": noised(0.5), "alpha_bar = 0.9": noised(0.9),
        "two digits, the maximum": torch.maximum(x, other),
        "two digits, the mean": (x + other) / 2,
        "upper and lower half exchanged": x.roll(half, 2),
        "4 x 4 blocks, shuffled": F.fold(grid.gather(2, order), x.shape[2:], block,
                                         stride=block),
        "halves of two": torch.cat([x[:, :, :half], other[:, :, half:]], 2)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    data.CACHE = ROOT / "pretrained"
    for file in data.CACHE.glob("judge_*.pt"):
        file.unlink()
    for size in (28, 32):
        digits, begin = data.load_images("digits", size), time.perf_counter()
        judge, of_held_out = quality.load_judge(digits)
        print(f"\n{size} x {size}: {time.perf_counter() - begin:.0f} s, of held-out "
              f"digits {of_held_out['accuracy']:.1%} right\n\n| | legible |\n|---|---|")
        torch.manual_seed(0)
        for name, x in pictures(digits.test, digits.test_labels).items():
            share = quality.legible_fraction(quality.probabilities(judge, x))
            print(f"| {name} | {share:.1%} |", flush=True)
