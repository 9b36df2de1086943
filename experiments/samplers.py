"""Every sampler of a trained score model, scored at the same cost: [SDE] Tab. 1.

    python experiments/samplers.py                  the newest run, or the shipped model
    python experiments/samplers.py --evaluate 250   250 samples of each instead of 500

samplers.png   ten draws of each sampler, with its network calls and its legible part
table1.png     the distance by predictor, with and without the corrector; by the
               corrector's r; by the tolerance of RK45

Each sampler has about 200 network calls, RK45 as many as it needs. metrics.json holds
the scores: evaluation_by_samplers, evaluation_by_r, evaluation_by_tolerance.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
import score_based_diffusion_example as sb  # noqa: E402
from common import plotting  # noqa: E402
from common.cli import Mistake, command_line  # noqa: E402
from common.data import load_images  # noqa: E402
from common.run import open_run  # noqa: E402

Config = sb.Config


def make_sweeps(cfg, sde, calls):
    """{sweep: {value: Config}}: every sampler, the corrector's r, RK45's tolerance."""
    both = replace(cfg, sampler="pc", predictor="reverse", corrector_steps=1,
                   N=max(1, calls // 2))
    return {
        "samplers": sb.make_methods(cfg, sde, calls),
        "r": {r: replace(both, snr=r) for r in (0.01, 0.04, 0.08, 0.16, 0.32)},
        "tolerance": {tolerance: replace(cfg, sampler="rk45", tolerance=tolerance)
                      for tolerance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)}}


def measure(run, sweeps, model, score, sde, data):
    """{sweep: {value: scores}}, kept in metrics.json as they are found."""
    scores = {}
    for sweep, methods in sweeps.items():
        scores[sweep] = {}
        for value, method in methods.items():
            def states(batch, method=method):
                xT = sde.prior_sampling((len(batch), *data.shape), run.device)
                return sb.sampling_process(method, score, sde, xT)

            try:
                scores[sweep][value] = run.quality(states, model, method.N, data)
            except Mistake as problem:  # the other samplers may do better
                run.say(f"{sweep}, {value}: {problem}")
            run.add_metrics(**{f"evaluation_by_{sweep}": scores[sweep]})
    return scores


@plotting.figure("samplers.png")
def figure_samplers(run, methods, score, sde, xT, scores):
    """samplers.png: the draws of each sampler in a row, from the same noise xT.

    RK4 has no row: it solves RK45's equation from RK45's noise, the same picture.
    """
    rows, labels = [], []
    for name, found in scores.items():
        if name != "ODE, RK4":
            rows.append(sb.final(sb.sampling_process(methods[name], score, sde, xT)))
            labels.append(f"{name}\n{found['network_calls']:.0f} calls, "
                          f"{found['legible']:.0%} legible")
    plotting.table(run.path("samplers.png"), rows, f"{len(xT)} draws by each sampler",
                   labels)


@plotting.figure("table1.png")
def figure_table(run, scores):
    """table1.png: predictors without and with the corrector; r; RK45's tolerance."""
    distance = {sweep: {value: row["frechet_distance"] for value, row in rows.items()}
                for sweep, rows in scores.items()}
    found, parts = distance["samplers"], []
    both = [name for name in found if "corrector" in name]
    alone = [name.removesuffix(", corrector") for name in both if "," in name]
    for title, names in (("predictor alone", alone), ("with a corrector", both)):
        words = [name.removesuffix(", corrector").replace(" ", "\n") for name in names]
        bars = [found.get(name, math.nan) for name in names]  # one may have diverged
        parts.append({"bars": (words, bars), "title": title, "yscale": "log",
                      "ylim": (1, 3 * max(found.values()))})
    parts[0]["ylabel"] = "Fréchet distance in features"
    calls = [row["network_calls"] for row in scores["tolerance"].values()]
    least, most = min(scores["tolerance"]), max(scores["tolerance"])
    parts += [
        {"lines": {"_": (list(distance["r"]), list(distance["r"].values()), "o-")},
         "xlabel": "r", "xscale": "log", "ylim": (0, None),
         "title": "reverse diffusion, corrector"},
        {"lines": {"_": (calls, list(distance["tolerance"].values()), "o-")},
         "xlabel": "network calls", "ylim": (0, None),
         "title": f"ODE, RK45, tolerance {most:g} to {least:g}"}]
    plotting.curves(run.path("table1.png"), parts,
                    f"{run.opts.evaluate} samples per point")


@command_line
def main(argv=None):
    """Load a trained score model, and score every sampler in a new run folder."""
    cfg, run = open_run("score_based", Config, sb.PRESETS, sb.SAMPLING, argv,
                        trained=True)
    run.opts.evaluate = run.opts.evaluate or 500
    data = run.load(load_images, cfg.dataset, cfg.image_size)
    sde = sb.make_sde(cfg)
    sb.check_settings(run, cfg, sde, data)
    model = run.trained(sb.make_network(cfg, data.shape))
    score = sb.score_fn(model, sde, cfg.std_floor, cfg.clip_x0)

    sweeps = make_sweeps(cfg, sde, min(200, cfg.N))
    scores = measure(run, sweeps, model, score, sde, data)
    with torch.no_grad():
        xT = sde.prior_sampling((10, *data.shape), run.device)
        figure_samplers(run, sweeps["samplers"], score, sde, xT, scores["samplers"])
    figure_table(run, scores)
    run.finish()


if __name__ == "__main__":
    main()
