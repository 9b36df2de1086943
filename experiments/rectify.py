"""Two moons carried to eight Gaussians: pairs, their flow, and the flow rectified.

    python experiments/rectify.py               about three minutes
    python experiments/rectify.py --steps 500   a quick look

Flow matching needs no noise: x_0 may be any data. results/flow_matching/rectify.png
shows lines that connect pairs x_0, x_1 and cross; the flow trained on these pairs,
which never crosses itself, but bends; the flow trained on pairs of an optimal-transport
coupling within each batch; and reflow, trained on the pairs that the first flow has
made ([RF] Alg. 1). rectify.json has their straightness and transport cost.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
import flow_matching_example as fm  # noqa: E402
from common import plotting  # noqa: E402
from common.cli import command_line  # noqa: E402
from common.data import load_points  # noqa: E402
from flow_matching import draw_ways, straightness  # noqa: E402
from tqdm import tqdm  # noqa: E402


def fit(draw, steps, couple=False, lr=3e-3, batch_size=512):
    """The velocity v(x, t) that flow matching learns from the pairs draw(n)."""
    path, model = fm.StraightPath(), fm.VelocityMLP()
    ema, optimizer = fm.EMA(model, 0.999), torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in tqdm(range(steps), leave=False):
        x0, x1 = draw(128 if couple else batch_size)
        if couple:
            x1 = x1[fm.ot_coupling(x0, x1)]
        t = fm.draw_time(len(x0), path, "uniform")
        loss = fm.cfm_loss(fm.velocity_fn(model), path, x0, x1, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        ema.update(model, step)
    return fm.velocity_fn(ema.model)


@plotting.figure("rectify.png")
def figure(file, panels, data):
    """rectify.png: a panel for each (title, ways)."""
    sheet, axes = plotting.sheet_of(len(panels), 4.2 * len(panels), 5.2)
    for axis, (title, ways) in zip(axes, panels.items(), strict=True):
        draw_ways(axis, ways[:, :150], data, limit=2.0)
        axis.set_title(title)
    plotting.save(sheet, file, "From two moons (dots) to eight Gaussians (grey)")


def main(argv=None, folder=ROOT / "results/flow_matching"):
    """Train the three flows, draw them and write their numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000, help="of each training")
    steps = parser.parse_args(argv).steps
    torch.manual_seed(0)
    moons, gaussians = load_points("two_moons"), load_points("gaussians")

    def independent(n):
        return (moons.train[torch.randint(len(moons.train), (n,))],
                gaussians.train[torch.randint(len(gaussians.train), (n,))])

    flow = fit(independent, steps)
    x1_of = fm.final(fm.flow_process(flow, moons.train, sampler="heun", S=100))

    def rectified(n):
        i = torch.randint(len(moons.train), (n,))
        return moons.train[i], x1_of[i]

    x0, pairs = moons.test[:2000], gaussians.test[:2000]
    panels, rows = {"pairs": torch.stack([x0, pairs])}, {}
    rows["pairs"] = {"transport_cost": (pairs - x0).square().sum(1).mean().item()}
    for name, v in (("flow of these pairs", flow),
                    ("flow of OT pairs", fit(independent, steps, couple=True)),
                    ("reflow", fit(rectified, steps))):
        states = list(fm.flow_process(v, x0, sampler="heun", S=100))
        with torch.no_grad():
            _, bend = straightness(v, states)
        cost = (states[-1][1] - x0).square().sum(1).mean().item()
        rows[name] = {"straightness": 2 * sum(bend) / len(bend), "transport_cost": cost}
        title = f"{name}\nS = {rows[name]['straightness']:.2f}, cost {cost:.2f}"
        panels[title] = torch.stack([x for _, x in states])
        print(name, {key: round(value, 3) for key, value in rows[name].items()})
    folder.mkdir(parents=True, exist_ok=True)
    figure(folder / "rectify.png", panels, gaussians.test[:2000])
    (folder / "rectify.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    command_line(main)()
