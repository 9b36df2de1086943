"""The race: how legible digits are after 1, 2, 5, 10 and 20 CPU minutes of training.

    python experiments/race.py                            the default of ddpm_example.py
    python experiments/race.py --minutes 2 10 --no_keep --drawing uniform    other flags
    python experiments/race.py --page flow_matching --minutes 10             flows

A CPU minute is one minute of one core, summed over all cores. For each budget the
number of steps that it pays for is estimated from 200 steps, and a network is trained
for so many, with the decay of the learning rate fitted to them; the time that this took
is reported. Then 500 samples are drawn: of DDPM in T steps (Alg. 2) and in 25 steps
(DDIM, eta = 0), of a flow in 25 Euler steps. All other flags are those of the page.
Writes race.json and race.png in results/ddpm or results/flow_matching, or with
--no_keep only prints.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
import ddim_example as ddim  # noqa: E402
import ddpm_example as ddpm  # noqa: E402
import flow_matching_example as fm  # noqa: E402
from common import plotting, quality  # noqa: E402
from common.cli import command_line  # noqa: E402
from common.data import load_images  # noqa: E402
from common.device import seeded  # noqa: E402
from common.run import open_run  # noqa: E402

PAGES = {"ddpm": ddpm, "flow_matching": fm}
SAMPLERS = {"ddpm": {"T steps": "DDPM, T steps", "25 steps": "DDIM, 25 steps, eta = 0"},
            "flow_matching": {"25 steps": "flow, 25 Euler steps"}}


def trained(name, minutes, data, flags):
    """(cfg, network, CPU seconds) of a training that takes so many CPU minutes."""
    page = PAGES[name]

    def train(steps):
        cfg, run = open_run(name, page.Config, page.PRESETS, page.SAMPLING,
                            [*flags, f"--steps={steps}", f"--preview_every={steps}"])
        begin = time.process_time()
        model = page.train(cfg, run, run.load(lambda: data))
        if run.stopped:
            sys.exit(130)
        return cfg, model, time.process_time() - begin

    _, _, start = train(1)  # includes what starting and saving cost
    _, _, some = train(201)
    cost = (some - start) / 200
    return train(max(1, 1 + round((60 * minutes - start) / cost)))


def draws(name, cfg, model, device):
    """{sampler: draw(x_T) -> samples} of a trained network of this page."""
    if name == "flow_matching":
        cfg, path = replace(cfg, sampler="euler", S=25), fm.make_path(cfg)
        return {"25 steps": lambda x: fm.final(
            fm.flow_from_noise(cfg, model, path, x))}
    schedule = ddpm.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    schedule = schedule.to(device)

    def eps_model(xt, t):
        return cfg.eps_scale * model(xt, t)

    return {"T steps": lambda x: ddpm.sample(eps_model, x.shape, schedule, cfg.variance,
                                             cfg.clip_x0, x),
            "25 steps": lambda x: ddim.ddim_sample(eps_model, x, schedule,
                                                   min(25, cfg.T))}


def scores(name, cfg, model, data, n):
    """{sampler: the scores of n samples}, all from the same noises."""
    device, found = data.train.device, {}
    with seeded(0, device):
        parts = torch.randn(n, *data.shape).to(device).split(100)
        for sampler, draw in draws(name, cfg, model, device).items():
            found[sampler] = quality.scores(torch.cat([draw(x) for x in parts]), data)
    return found


def figure(path, rows, samplers):
    """race.png: legible and Fréchet distance against CPU minutes."""
    minutes = [row["cpu_minutes"] for row in rows]

    def lines(key, hidden=""):
        return {hidden + words: (minutes, [row[name][key] for row in rows], "o-")
                for name, words in samplers.items()}

    n = rows[0]["25 steps"]["n"]
    of_data = rows[0]["25 steps"]["legible_of_held_out"]
    plotting.curves(path, [
        {"lines": lines("legible"), "levels": {"held-out digits": of_data},
         "xlabel": "CPU minutes", "xlim": (0, None), "ylim": (0, 1),
         "title": "legible"},
        {"lines": lines("frechet_distance", "_"), "xlabel": "CPU minutes",
         "xlim": (0, None), "ylim": (0, None),
         "title": "Fréchet distance in features"}],
        f"{n} samples after each training")


def main(argv=None, folder=None):
    """Run the race; the row of each budget is printed and written at once."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("--page", choices=list(PAGES), default="ddpm")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 2, 5, 10, 20])
    parser.add_argument("--n", type=int, default=500, help="number of samples")
    parser.add_argument("--no_keep", action="store_true", help="print only")
    opts, flags = parser.parse_known_args(argv)
    page, name = PAGES[opts.page], opts.page
    folder, rows = folder or ROOT / "results" / name, []
    for minutes in sorted(opts.minutes):
        with tempfile.TemporaryDirectory() as out:
            flags_out = [f"--out={out}", *flags]
            cfg, run = open_run(name, page.Config, page.PRESETS, page.SAMPLING,
                                flags_out)
            data = run.load(load_images, cfg.dataset, cfg.image_size)
            cfg, model, seconds = trained(name, minutes, data, flags_out)
        rows.append({"cpu_minutes": seconds / 60, "steps": cfg.steps,
                     **scores(name, cfg, model, data, opts.n)})
        for sampler, words in SAMPLERS[name].items():
            row = rows[-1][sampler]
            print(f"{seconds / 60:.1f} CPU minutes, {cfg.steps} steps, {words}: "
                  f"{row['legible']:.1%} legible, distance "
                  f"{row['frechet_distance']:.1f}, "
                  f"precision {row['precision']:.2f}, recall {row['recall']:.2f}, "
                  f"to the nearest of the training part "
                  f"{row['nearest_train_rms']:.3f} (held-out digits: "
                  f"{row['nearest_train_rms_of_held_out']:.3f}), classes "
                  f"{row['classes']}", flush=True)
        if not opts.no_keep:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "race.json").write_text(json.dumps(
                {"flags": flags, "rows": rows}, indent=2) + "\n")
            figure(folder / "race.png", rows, SAMPLERS[name])
    return rows


if __name__ == "__main__":
    command_line(main)()  # a mistyped flag is reported in one line
