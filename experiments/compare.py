"""U-Net and Diffusion Transformer, each trained for the same time.

    python experiments/compare.py                  240 seconds each
    python experiments/compare.py --seconds 60 --sampler ancestral

compare.png      samples of both from the same noises, with their scores; the runs of
                 both networks are the folders unet and dit beside it
The flags are those of conditional_diffusion_example.py.
"""

import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
import conditional_diffusion_example as conditional  # noqa: E402
from common import plotting, quality  # noqa: E402
from common.cli import Mistake, Positive, command_line  # noqa: E402
from common.data import load_images  # noqa: E402
from common.device import seeded  # noqa: E402
from common.run import open_run  # noqa: E402
from experiments.latent import training_cost  # noqa: E402


@dataclass(frozen=True)
class Config(conditional.Config):
    """The page's settings, and the time."""

    seconds: Positive = 240.0  # seconds of training for each of the two networks


PRESETS = {name: Config(**vars(cfg)) for name, cfg in conditional.PRESETS.items()}
# What this script chooses itself
CHOSEN = {"backbone": "both are trained", "steps": "--seconds gives the time",
          "w": "--w_samples is the weight of the samples"}


def steps_in(seconds, cfg, run, data, schedule):
    """The number of training steps that take so many seconds here."""
    model = run.place(conditional.make_model(cfg, data.shape, len(data.classes)))
    loss = conditional.v_loss if cfg.predict == "v" else conditional.ddpm_loss
    x0 = data.train[:cfg.batch_size]
    t = conditional.draw_t(len(x0), cfg.T, cfg.drawing).to(run.device)
    cost = training_cost(model, partial(loss, model, x0, t, torch.randn_like(x0),
                                        schedule), repeats=25)
    return max(10, int(seconds / cost["seconds"]))


@command_line
def main(argv=None):
    """Train both networks, draw from both, and score what they draw."""
    cfg, run = open_run("conditional", Config, PRESETS, (), argv)
    for name, reason in CHOSEN.items():
        if name in run.opts.given:
            raise Mistake(f"--{name}: must be left out, {reason}")
    for name in ("sample", "resume"):
        if getattr(run.opts, name) is not None:
            raise Mistake(f"--{name}: must be left out, both networks are trained anew")
    if run.launch.world > 1:
        raise Mistake(f"seconds {cfg.seconds:g}: must be run in one process")
    data = run.load(load_images, cfg.dataset, cfg.image_size)
    classes = conditional.asked_classes(cfg, data)
    schedule = conditional.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    schedule = schedule.to(run.device)
    seconds = cfg.seconds
    cfg = conditional.Config(**{field.name: getattr(cfg, field.name)
                                for field in fields(conditional.Config)})
    networks = {name: replace(cfg, backbone=name) for name in ("unet", "dit")}
    for its in networks.values():  # a Mistake in one of them comes before training
        conditional.make_model(its, data.shape, len(data.classes))
    classifier = None
    if cfg.guidance == "classifier":
        classifier = conditional.train_classifier(cfg, run, data, schedule)

    n = run.opts.evaluate or (len(classes) if cfg.classes else cfg.n_samples)
    y = torch.tensor(classes)[torch.arange(n) % len(classes)].to(run.device)
    steps = cfg.S if cfg.sampler == "ddim" else cfg.T
    scores, panels = {}, []
    for name, its in networks.items():
        if run.stopped:
            break
        its = replace(its, steps=steps_in(seconds, its, run, data, schedule))
        part = run.part(name, its)
        model = conditional.train(its, part, data)
        if part.stopped:
            break

        def states(batch, its=its, model=model):
            xT = torch.randn(len(batch), *data.shape, device=run.device)
            return conditional.guided_process(
                its, model, xT, schedule, y[batch.start:batch.stop], its.w_samples,
                classifier)

        with seeded(run.opts.seed, run.device):
            samples, timing = run.draw(n, states, model, steps)
        scored = quality.scores(samples, data, y)
        scores[name] = part.read_metrics() | scored | {"sampling": timing}
        run.add_metrics(compare=scores)
        distance, right = scored["frechet_distance"], scored["accuracy"]
        title = f"{name}: {its.steps} steps, Fréchet {distance:.1f}, right {right:.0%}"
        panels.append((title, samples[:100]))
    if panels:
        plotting.panels(
            run.path("compare.png"), panels,
            f"{seconds:g} seconds of training each, the same noises", 10)
    run.finish()


if __name__ == "__main__":
    main()
