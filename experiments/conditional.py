"""More figures of a trained conditional model: guidance weights, noises, accuracy.

    python experiments/conditional.py                   of the newest or shipped model
    python experiments/conditional.py --sample RUN      of this run
    python experiments/conditional.py --evaluate 500    accuracy and diversity against w

grid.png         each column one noise and class, each row one guidance weight
same_noise.png   each row one noise, each column one class
neighbours.png   samples, and under each its nearest training image
With --evaluate N, N samples at each guidance weight:
guidance.png     agreement with the label, recall and Fréchet distance against w
classifier.png   how often the classifier of noisy images is right (or with --guidance
                 classifier)
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
import conditional_diffusion_example as conditional  # noqa: E402
from common import plotting  # noqa: E402
from common.cli import Mistake, command_line  # noqa: E402
from common.data import load_images  # noqa: E402
from common.run import open_run  # noqa: E402

Config = conditional.Config


@plotting.figure("same_noise.png")
def figure_same_noise(run, cfg, draw, data):
    """same_noise.png: each row one noise, each column one class."""
    y = torch.arange(min(10, len(data.classes)), device=run.device)
    w, rows = min(1.0, cfg.w_samples), []
    for _ in range(5):
        xT = torch.randn(1, *data.shape, device=run.device).expand(len(y), *data.shape)
        rows.append(draw(xT, y, w))
    plotting.table(run.path("same_noise.png"), rows,
                   "Each row one noise, each column one class "
                   f"({conditional.weight_label(cfg, w)})",
                   [f"noise {i + 1}" for i in range(5)], [data.classes[c] for c in y])


def measure_guidance(run, cfg, model, data, schedule, classifier):
    """Score samples at every weight: {kind of guidance: {w: scores}}.

    w = -1 (s = 0) and w = 0 are always among the weights. metrics.json gets each row as
    soon as it is there.
    """
    scores, weights = {}, sorted({*cfg.w, -1.0, 0.0, cfg.w_samples})
    y = torch.arange(run.opts.evaluate, device=run.device) % len(data.classes)
    kinds = {"classifier_free": "classifier-free",
             "classifier": "classifier: null class"}
    if cfg.p_uncond == 1:
        kinds = {"classifier": "classifier: unconditional"}
    for guidance, name in kinds.items():
        guided, scores[name] = replace(cfg, guidance=guidance), {}
        for w in weights:
            def states(batch, guided=guided, w=w):
                xT = torch.randn(len(batch), *data.shape, device=run.device)
                asked = y[batch.start:batch.stop]
                return conditional.guided_process(guided, model, xT, schedule, asked, w,
                                                  classifier)
            row = run.quality(states, model, steps_of(cfg), data, y)
            scores[name][f"{w:g}"] = row
            run.add_metrics(guidance_sweep=scores)
            if (guidance, w) == (cfg.guidance, cfg.w_samples):
                run.add_metrics(evaluation=row)
    return scores


@plotting.figure("guidance.png")
def figure_guidance(path, scores):
    """guidance.png: accuracy, recall, Fréchet distance against w, by `scores`."""
    titles = {"accuracy": "agrees with the label", "recall": "recall",
              "frechet_distance": "Fréchet distance in features"}
    row = next(iter(next(iter(scores.values())).values()))
    parts = []
    for key, title in titles.items():
        quiet = "" if key == "accuracy" else "_"  # one legend is enough
        lines = {quiet + name: ([float(w) for w in rows],
                                [scored[key] for scored in rows.values()], "o-")
                 for name, rows in scores.items()}
        reached = row.get(f"{key}_of_held_out")  # recall has none
        levels = {f"{quiet}held out": reached} if reached else {}
        parts.append({"lines": lines, "levels": levels, "title": title,
                      "xlabel": "guidance w = s - 1"})
    plotting.curves(path, parts, f"{row['n']} samples per point")


@plotting.figure("classifier.png")
def figure_classifier(run, classifier, data, schedule):
    """classifier.png: how often the noisy classifier is right on held-out x_t, by t."""
    right = {}
    for i in range(21):
        t = max(1, round(schedule.T * i / 20))
        xt = conditional.q_sample(data.test, t, torch.randn_like(data.test),
                                  schedule.alpha_bars)
        logits = classifier(xt, torch.full((len(xt),), t, device=xt.device))
        right[t] = (logits.argmax(1) == data.test_labels).float().mean().item()
    run.add_metrics(noisy_classifier_accuracy_by_t=right)
    plotting.curves(run.path("classifier.png"), [{
        "lines": {"noisy classifier": (list(right), list(right.values()), "o-")},
        "levels": {"by chance": 1 / len(data.classes)},
        "xlabel": "t", "ylim": (0, 1.02),
        "title": f"right on {len(data.test)} held-out x_t"}])


def steps_of(cfg):
    """The number of steps of the sampler that cfg asks for."""
    return cfg.S if cfg.sampler == "ddim" else cfg.T


@command_line
def main(argv=None):
    """Load a trained model, draw these figures, and measure guidance if asked to."""
    cfg, run = open_run("conditional", Config, conditional.PRESETS,
                        conditional.SAMPLING, argv, trained=True)
    data = run.load(load_images, cfg.dataset, cfg.image_size)
    classes = conditional.asked_classes(cfg, data)
    if run.opts.evaluate and cfg.p_uncond == 0:
        raise Mistake(f"--evaluate {run.opts.evaluate}: must be left out for a network "
                      "with --p_uncond 0, since guidance asks it for the null class")
    schedule = conditional.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    schedule = schedule.to(run.device)
    model = run.trained(conditional.make_model(cfg, data.shape, len(data.classes)))
    classifier = None
    if cfg.guidance == "classifier" or run.opts.evaluate:
        classifier = conditional.train_classifier(cfg, run, data, schedule)
    if not run.main:
        return
    if run.stopped:
        run.say("stopped: the classifier is not trained, nothing is drawn")
        return run.finish()

    def draw(xT, y, w):
        return conditional.sample(cfg, model, xT, schedule, y, w, classifier)

    y = torch.tensor(classes, device=run.device).repeat(12)[:12]
    xT = torch.randn(12, *data.shape, device=run.device)
    samples = draw(xT, y, cfg.w_samples)
    plotting.neighbours(run.path("neighbours.png"), samples, data)
    conditional.figure_grid(run, cfg, draw, data, classes)
    figure_same_noise(run, cfg, draw, data)
    if classifier:
        figure_classifier(run, classifier, data, schedule)
    if run.opts.evaluate:
        scores = measure_guidance(run, cfg, model, data, schedule, classifier)
        figure_guidance(run.path("guidance.png"), scores)
    run.finish()


if __name__ == "__main__":
    main()
