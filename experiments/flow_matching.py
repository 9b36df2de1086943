"""More figures of a trained flow: its way, its first step, how straight it is.

    python experiments/flow_matching.py               the newest run, or the shipped one
    python experiments/flow_matching.py --sample RUN  this run, of images or of points

way.png           images: x_t of four samples, and below it the x1_hat of that moment
one_step.png      images: one Euler step leads from any noise to the mean of the data
neighbours.png    images: samples, and under each its nearest training image
paths.png         points: the flow of 100 noises, and their straight connections
straightness.png  how far the velocity is from x_1 - x_0 along the flow, by t
"""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
import flow_matching_example as fm  # noqa: E402
from common import plotting  # noqa: E402
from common.cli import command_line  # noqa: E402
from common.data import load_data  # noqa: E402
from common.run import open_run  # noqa: E402

Config = fm.Config


def straightness(v, states):
    """(t, bend): the mean of |(x_1 - x_0) - v(x_t, t)|^2 a dimension, at each t.

    states: all (t, x_t) of a flow. Their mean over t is the straightness S of [RF] Sec.
    2.2, per dimension: it is 0 where the flow runs in straight lines at constant speed.
    """
    (_, x0), (_, x1) = states[0], states[-1]
    times = [t for t, _ in states[:-1]]
    bend = [((x1 - x0) - v(x, fm.batch_time(t, x))).square().mean().item()
            for t, x in states[:-1]]
    return times, bend


@plotting.figure("straightness.png")
def figure_straightness(run, v, states):
    """straightness.png: straightness by t; its mean over t is in metrics.json."""
    times, bend = straightness(v, states)
    mean = sum(bend) / len(bend)
    cost = (states[-1][1] - states[0][1]).square().mean().item()
    run.add_metrics(straightness=mean, transport_cost=cost)
    plotting.curves(run.path("straightness.png"), [{
        "lines": {"_": (times, bend, "-")}, "xlabel": "t", "xlim": (0, 1),
        "ylabel": "squared, a dimension", "ylim": (0, None),
        "title": r"$|(x_1 - x_0) - v(x_t, t)|^2$" + f", mean over t: {mean:.3f}"}])


@plotting.figure("way.png")
def figure_way(run, v, path, states):
    """way.png: x_t of four samples; below it x1_hat, what the velocity aims at."""
    columns, rows = plotting.evenly(states[:-1], 8), []
    for t, xt in columns:
        xt, times = xt[:4], fm.batch_time(t, xt[:4])
        x1_hat = path.predict_x1(xt, v(xt, times), times)
        rows.append(torch.stack([xt, x1_hat], dim=1).flatten(0, 1))
    plotting.table(run.path("way.png"), list(torch.stack(rows, dim=1)),
                   "x_t and x1_hat on the way", ["x_t", "x1_hat"] * 4,
                   [f"t = {t:.2f}" for t, _ in columns])


@plotting.figure("one_step.png")
def figure_one_step(run, v, path, data, x0):
    """one_step.png: at t = 0 the best velocity is E[x_1] - x_0, whatever x_0 is."""
    t = fm.batch_time(0.0, x0)
    rows = [x0, path.predict_x1(x0, v(x0, t), t)]
    labels = ["noise x_0", "x1_hat(x_0, 0)"]
    mean = data.train.mean(0, keepdim=True).expand_as(x0)
    plotting.table(run.path("one_step.png"), [*rows, mean],
                   "One step from noise, and the mean of the training data",
                   [*labels, "mean of x_1"])


@plotting.figure("paths.png")
def figure_paths(run, states, data):
    """paths.png: ways of 100 points from noise to data, and their connections."""
    ways = torch.stack([x[:100] for _, x in states])  # (time, point, 2)
    sheet, axes = plotting.sheet_of(2, 9.6, 4.8, sharex=True, sharey=True)
    for axis, name, lines in zip(axes, ("the flow", "from x_0 to x_1 directly"),
                                 (ways, ways[[0, -1]]), strict=True):
        draw_ways(axis, lines, data.test[:2000])
        axis.set_title(name)
    plotting.save(sheet, run.path("paths.png"), "From noise (dots) to data")


def draw_ways(axis, ways, data, limit=2.6):
    """Lines of ways: (time, point, 2), dots at their beginnings, over grey data."""
    axis.scatter(*plotting.to_numpy(data).T, s=2, color="0.8")
    ways = plotting.to_numpy(ways)
    axis.plot(ways[:, :, 0], ways[:, :, 1], lw=0.7, color="C0", alpha=0.7)
    axis.scatter(*ways[0].T, s=8, color="C1", zorder=3)
    axis.set(aspect="equal", xlim=(-limit, limit), ylim=(-limit, limit),
             xticks=[], yticks=[])


@command_line
def main(argv=None):
    """Load a trained flow and draw these figures in a new run folder."""
    cfg, run = open_run("flow_matching", Config, fm.PRESETS, fm.SAMPLING, argv,
                        trained=True)
    path, data = fm.make_path(cfg), run.load(load_data, cfg.dataset, cfg.image_size)
    model = run.trained(fm.make_network(cfg, data))
    v, images = fm.velocity_fn(model), len(data.shape) == 3
    n = 12 if images else 1000
    x0 = torch.randn(n, *data.shape, device=run.device)
    states = list(fm.flow_process(v, x0, 0.0, path.t_end, "euler", 100))
    if images:
        figure_way(run, v, path, states)
        figure_one_step(run, v, path, data, x0[:8])
        plotting.neighbours(run.path("neighbours.png"), states[-1][1], data)
    else:
        figure_paths(run, states, data)
    figure_straightness(run, v, states)
    run.finish()


if __name__ == "__main__":
    main()
