"""The race: how legible digits are after 1, 2, 5, 10 and 20 CPU minutes of training.

    python experiments/race.py                            the default of ddpm_example.py
    python experiments/race.py --minutes 2 10 --no_keep --drawing uniform    other flags

A CPU minute is one minute of one core, summed over all cores. For each budget the
number of steps that it pays for is estimated from 200 steps, and a network is trained
for so many, with the decay of the learning rate fitted to them; the time that this took
is reported. Then 500 samples are drawn in T steps (DDPM, Alg. 2) and in 25 steps (DDIM,
eta = 0). All other flags are those of ddpm_example.py. Writes results/ddpm/race.json
and race.png, or with --no_keep only prints.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
import ddim_example as ddim  # noqa: E402
import ddpm_example as ddpm  # noqa: E402
from common import plotting, quality  # noqa: E402
from common.cli import command_line  # noqa: E402
from common.data import load_images  # noqa: E402
from common.device import seeded  # noqa: E402
from common.run import open_run  # noqa: E402

SAMPLERS = {"T steps": "DDPM, T steps", "25 steps": "DDIM, 25 steps, eta = 0"}


def trained(minutes, data, flags):
    """(cfg, network, CPU seconds) of a training that takes so many CPU minutes."""
    def train(steps):
        cfg, run = open_run("ddpm", ddpm.Config, ddpm.PRESETS, ddpm.SAMPLING,
                            [*flags, f"--steps={steps}", f"--preview_every={steps}"])
        begin = time.process_time()
        model = ddpm.train(cfg, run, run.load(lambda: data))
        if run.stopped:
            sys.exit(130)
        return cfg, model, time.process_time() - begin

    _, _, start = train(1)  # includes what starting and saving cost
    _, _, some = train(201)
    cost = (some - start) / 200
    return train(max(1, 1 + round((60 * minutes - start) / cost)))


def scores(cfg, model, data, n):
    """{sampler: the scores of n samples}, both from the same noises."""
    schedule = ddpm.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    schedule = schedule.to(data.train.device)

    def eps_model(xt, t):
        return cfg.eps_scale * model(xt, t)

    with seeded(0, data.train.device):
        parts = torch.randn(n, *data.shape).to(data.train.device).split(100)
        drawn = {"T steps": [ddpm.sample(eps_model, part.shape, schedule, cfg.variance,
                                         cfg.clip_x0, part) for part in parts],
                 "25 steps": [ddim.ddim_sample(eps_model, part, schedule,
                                               min(25, cfg.T)) for part in parts]}
    return {name: quality.scores(torch.cat(x), data) for name, x in drawn.items()}


def figure(path, rows):
    """race.png: legible and Fréchet distance against CPU minutes."""
    minutes = [row["cpu_minutes"] for row in rows]

    def lines(key, hidden=""):
        return {hidden + words: (minutes, [row[name][key] for row in rows], "o-")
                for name, words in SAMPLERS.items()}

    n = rows[0]["T steps"]["n"]
    of_data = rows[0]["T steps"]["legible_of_held_out"]
    plotting.curves(path, [
        {"lines": lines("legible"), "levels": {"held-out digits": of_data},
         "xlabel": "CPU minutes", "xlim": (0, None), "ylim": (0, 1),
         "title": "legible"},
        {"lines": lines("frechet_distance", "_"), "xlabel": "CPU minutes",
         "xlim": (0, None), "ylim": (0, None),
         "title": "Fréchet distance in features"}],
        f"{n} samples after each training")


def main(argv=None, folder=ROOT / "results/ddpm"):
    """Run the race; the row of each budget is printed and written at once."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 2, 5, 10, 20])
    parser.add_argument("--n", type=int, default=500, help="number of samples")
    parser.add_argument("--no_keep", action="store_true", help="print only")
    opts, flags = parser.parse_known_args(argv)
    rows = []
    for minutes in sorted(opts.minutes):
        with tempfile.TemporaryDirectory() as out:
            flags_out = [f"--out={out}", *flags]
            cfg, run = open_run("ddpm", ddpm.Config, ddpm.PRESETS, ddpm.SAMPLING,
                                flags_out)
            data = run.load(load_images, cfg.dataset, cfg.image_size)
            cfg, model, seconds = trained(minutes, data, flags_out)
        rows.append({"cpu_minutes": seconds / 60, "steps": cfg.steps,
                     **scores(cfg, model, data, opts.n)})
        for name, words in SAMPLERS.items():
            row = rows[-1][name]
            print(f"{seconds / 60:.1f} CPU minutes, {cfg.steps} steps, {words}: "
                  f"{row['legible']:.1%} legible, distance "
                  f"{row['frechet_distance']:.1f}, "
                  f"precision {row['precision']:.2f}, recall {row['recall']:.2f}, "
                  f"to the nearest of the training part "
                  f"{row['nearest_train_rms']:.3f} (held-out digits: "
                  f"{row['nearest_train_rms_of_held_out']:.3f}), classes "
                  f"{row['classes']}", flush=True)
        if not opts.no_keep:
            (folder / "race.json").write_text(json.dumps(
                {"flags": flags, "rows": rows}, indent=2) + "\n")
            figure(folder / "race.png", rows)
    return rows


if __name__ == "__main__":
    command_line(main)()  # a mistyped flag is reported in one line
