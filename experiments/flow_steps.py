"""Few steps: flows beside DDIM and beside a DDPM model that is drawn as a flow.

    python experiments/flow_steps.py                    the shipped models
    python experiments/flow_steps.py RUN RUN --n 500    these runs of the flow page

A row for each flow, in 1, 2, 4, 10, 25 and 50 Euler steps, one network call each; two
rows for the shipped DDPM model: DDIM with eta = 0, and its flow without any training.
Writes results/flow_matching/steps.json and steps.png.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
import ddim_example as ddim  # noqa: E402
import flow_matching_example as fm  # noqa: E402
from common import plotting, quality  # noqa: E402
from common.cli import command_line  # noqa: E402
from common.data import load_images  # noqa: E402
from common.device import seeded  # noqa: E402
from common.run import open_run  # noqa: E402

CALLS = (1, 2, 4, 10, 25, 50)


def as_flow(eps_model, alpha_bars):
    """(v(x, t), the first t) of a noise-prediction network, without training.

    x_t of the straight path is sqrt(t^2 + (1 - t)^2) times x of the diffusion at
    alpha_bar = t^2 / (t^2 + (1 - t)^2). alpha_bar_T is not 0, so t does not begin at 0.
    """
    alpha_bars = alpha_bars.cpu().double()
    t_of = (alpha_bars.sqrt() / (alpha_bars.sqrt() + (1 - alpha_bars).sqrt())).numpy()
    steps = np.arange(len(t_of))

    def v(x, t):
        u = float(t[0])
        step = np.interp(u, t_of[::-1], steps[::-1])  # between two steps where needed
        step = fm.batch_time(max(step, 1.0), x)
        eps_hat = eps_model(x / math.hypot(u, 1 - u), step)
        # x_t = t x_1 + (1 - t) eps, so v = x_1 - eps = (x_t - eps) / t
        return (x - eps_hat) / u

    return v, float(t_of[-1])


def samplers(sources):
    """{name: draw(x0, calls)} of the flows in sources and of the shipped DDPM model."""
    found = {}
    for source in sources:
        cfg, run = open_run("flow_matching", fm.Config, fm.PRESETS, fm.SAMPLING,
                            ["--sample", *source], trained=True)
        data = run.load(load_images, cfg.dataset, cfg.image_size)
        v = fm.velocity_fn(run.trained(fm.make_network(cfg, data)))
        name = "reflow" if cfg.reflow else {"ot": "OT flow"}.get(cfg.coupling, "flow")
        name += ", VP path" if cfg.path == "vp" else ""
        end = fm.make_path(cfg).t_end
        found[name] = lambda x0, S, v=v, end=end: fm.final(
            fm.flow_process(v, x0, 0.0, end, "euler", S))

    cfg, run = open_run("ddim", ddim.Config, ddim.PRESETS, ddim.SAMPLING,
                        ["--sample", str(ROOT / "pretrained/ddpm.pt")], ["ddpm"])
    schedule = ddim.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    model = run.trained(ddim.make_unet(cfg, data.shape))
    found["DDIM"] = lambda x0, S: ddim.ddim_sample(model, x0, schedule, S)
    v, start = as_flow(model, schedule.alpha_bars)
    found["DDPM as a flow"] = lambda x0, S: fm.final(fm.flow_process(
        v, x0 * math.hypot(start, 1 - start), start, 1.0, "euler", S))
    return found, data


def main(argv=None, folder=ROOT / "results/flow_matching"):
    """Draw, score and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="runs of flow_matching_example.py")
    parser.add_argument("--n", type=int, default=500, help="samples of each row")
    opts = parser.parse_args(argv)
    draws, data = samplers([[run] for run in opts.runs] or [[]])
    with seeded(0, data.train.device):
        x0 = torch.randn(opts.n, *data.shape)
    rows, pictures = {}, {}
    for name, draw in draws.items():
        for calls in CALLS:
            x = torch.cat([draw(part, calls) for part in x0.split(100)])
            found = quality.scores(x, data)
            rows.setdefault(name, {})[calls] = {key: found[key] for key in (
                "legible", "frechet_distance", "recall")}
            pictures[f"{name}, {calls}"] = x[:10]
            print(f"{name}, {calls} calls: {found['legible']:.0%} legible, distance "
                  f"{found['frechet_distance']:.1f}, recall {found['recall']:.2f}",
                  flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steps.json").write_text(json.dumps(
        {"n": opts.n, "rows": rows}, indent=2) + "\n")
    plotting.table(folder / "steps.png", list(pictures.values()),
                   "The same ten noises, by sampler and number of network calls",
                   list(pictures))
    return rows


if __name__ == "__main__":
    command_line(main)()
