"""Control of a score model ([SDE] Sec. 5, App. I): complete, colour, draw classes.

    python experiments/controllable.py                    complete held-out pictures
    python experiments/controllable.py --image broken.png --mask mask.png    your own
    python experiments/controllable.py --classes 3 1 4    digits by class
    python experiments/controllable.py --evaluate         how legible completions are
    python experiments/controllable.py --sample RUN       by this run of the page

inpainting.png      what is known, three completions, the truth: a box is missing, a
                    half, most pixels, the border; completed_1.png to _3.png of your own
colorization.png    the same for pictures in colour whose grey is known
classes.png         the classes asked for, by every sampler, with a noisy classifier

The model is one of score_based_diffusion_example.py: its newest run, or the shipped
one. `imputation` and `conditional_score` are the page's. As in the paper a completion
is approximate: each step sees one noised draw of what is known. Corrector steps bring
it nearer; here there are five with r = 0.4, in the authors' code one with the r of
sampling. [SDE] is arXiv 2011.13456, [ADM] arXiv 2105.05233.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent))
import score_based_diffusion_example as sb  # noqa: E402
from common import plotting, quality  # noqa: E402
from common.cli import Count, Mistake, Positive, Whole, command_line  # noqa: E402
from common.data import (  # noqa: E402
    POINTS, cached, load_images, open_picture, read_picture, to_unit)
from common.device import seeded  # noqa: E402
from common.run import open_run  # noqa: E402
from score_based_diffusion_example import (  # noqa: E402
    Attention, Downsample, ResBlock, set_learning_rate, timestep_embedding)


@dataclass(frozen=True)
class Config(sb.Config):
    """The settings of the page's run, and those of completing and of the classifier."""

    image: str = ""                  # file of a picture to complete
    mask: str = ""                   # file: white is known, black is to be completed
    inpaint_N: Count = 50            # steps where part of a picture is known
    inpaint_corrector: Whole = 5     # corrector steps in each of them (code: 1)
    inpaint_snr: Positive = 0.4      # the corrector's ratio r in them (code: 0.16)
    classes: tuple[str, ...] = ()    # classes to draw, by their names or numbers
    classifier_steps: Count = 1500   # training steps of the noisy classifier


# The fields that may change after training
SAMPLING = (*sb.SAMPLING, "image", "mask", "inpaint_N", "inpaint_corrector",
            "inpaint_snr", "classes", "classifier_steps")

PRESETS = {name: Config(**vars(preset)) for name, preset in sb.PRESETS.items()
           if name not in POINTS}
PRESETS["smoke"] = replace(PRESETS["smoke"], inpaint_N=3, classifier_steps=4)


# %% 1. Completing and colouring (App. I.2, I.3)


def inpaint(score, sde, known, mask, steps, predictor=sb.reverse_diffusion_step,
            correctors=()):
    """Draw what is not known beside what is. Source: [SDE] App. I.2.

    known: (B, ...). mask: bool, broadcastable to it, True where it is known.
    predictor, correctors: see sde_process.
    """
    xT = sde.prior_std * torch.randn_like(known)
    return sb.final(sb.sde_process(predictor, score, sde, xT, steps, correctors,
                                   sb.imputation(sde, known, mask)))


def colorize(score, sde, grey, steps, predictor=sb.reverse_diffusion_step,
             correctors=()):
    """Draw colours for grey, the mean of the channels: (B, 1, H, W) -> (B, 3, H, W).

    In an orthonormal basis that begins with (1, 1, 1) / sqrt(3), one channel of three
    is known. Source: [SDE] App. I.3.
    """
    if grey.shape[1] != 1:
        raise ValueError(f"grey: must have one channel, the mean, not {grey.shape[1]}")
    rows = torch.tensor([[1.0, 1, 1], [-2, 1, 1], [0, 1, -1]])  # orthogonal: App. I.3
    basis = F.normalize(rows.to(grey), dim=1)
    known = grey.repeat(1, 3, 1, 1)
    mask = torch.tensor([True, False, False], device=grey.device).view(3, 1, 1)
    xT = sde.prior_std * torch.randn_like(known)
    return sb.final(sb.sde_process(predictor, score, sde, xT, steps, correctors,
                                   sb.imputation(sde, known, mask, basis)))


def make_masks(H, W):
    """{name: (1, 1, H, W) bool}: where a picture is known that is to be completed."""
    row, column = torch.arange(H).view(1, 1, H, 1), torch.arange(W).view(1, 1, 1, W)
    box = ((row - H / 2 + 0.5).abs() < H / 4) & ((column - W / 2 + 0.5).abs() < W / 4)
    half = (column < W / 2).expand(1, 1, H, W)
    some = torch.rand(1, 1, H, W) < 0.3
    return {"box": ~box, "half": half, "pixels": some, "border": box}


def read_question(image, mask, shape):
    """A person's picture, (1, C, H, W) in [-1, 1], and where it is known, or Nones.

    image, mask: files, "" for none. Both are resized and cropped to shape, (C, H, W).
    The mask, (1, 1, H, W) bool, must be as large as the picture, or H x W without one;
    the picture is known where the mask is white.
    """
    from PIL import Image, ImageOps

    (C, H, W), x, known, size = shape, None, None, shape[:0:-1]

    def read(flag, file, how):
        try:
            return how(file)
        except Exception as problem:  # Pillow's decoders raise errors of many kinds
            reason = getattr(problem, "strerror", None) or str(problem).split("\n")[0]
            raise Mistake(f"{flag} {file}: cannot be read as a picture ({reason})") \
                from None

    if image:
        size = read("image", image, open_picture).size
        x = to_unit(read("image", image, lambda file: read_picture(file, W)))[None]
        x = x if C == 3 else x.mean(1, keepdim=True)
    if mask:
        white = read("mask", mask, open_picture).convert("L")
        if white.size != tuple(size):
            raise Mistake(f"mask {mask}: is {white.width} x {white.height} pixels, "
                          f"must be {size[0]} x {size[1]} like the picture")
        white = ImageOps.fit(white, (W, H), Image.NEAREST)
        known = torch.from_numpy(np.array(white) >= 128)[None, None]
        if known.all() or not known.any():
            colour = "white" if known.all() else "black"
            raise Mistake(f"mask {mask}: is {colour} all over, at {W} x {H} pixels; it "
                          "must be white where the picture is known and black where it "
                          "is to be completed")
    return x, known


def settings(cfg):
    """The predictor and the correctors of inpaint and colorize that cfg asks for."""
    correct = partial(sb.langevin_step, snr=cfg.inpaint_snr)
    return sb.PREDICTORS[cfg.predictor], [correct] * cfg.inpaint_corrector


@plotting.figure("inpainting.png", compares=False)
def figure_inpainting(run, cfg, score, sde, data, image, mask):
    """inpainting.png: pictures, what is known of them, three completions, the truth.

    image: a person's own, (1, C, H, W), or None: two held-out ones for each mask.
    mask: a person's own, (1, 1, H, W), or None: masks of four kinds.
    """
    own, kinds = image is not None, {"": mask}
    if mask is None:
        kinds = make_masks(*data.shape[1:])
    names = [name for name in kinds for _ in range(1 if own else 2)]
    x = image.to(run.device).repeat(len(names), 1, 1, 1) if own else data.test
    x = x[:len(names)]  # a small data set may have fewer
    mask = torch.cat([kinds[name] for name in names[:len(x)]]).to(run.device)
    completed = [inpaint(score, sde, x, mask, cfg.inpaint_N, *settings(cfg))
                 for _ in range(3)]
    plotting.table(run.path("inpainting.png"),
                   [torch.where(mask, x, torch.zeros_like(x)), *completed, x],
                   "What is known, three completions, the truth (App. I.2)",
                   ["known", "completed", "again", "again",
                    "as given" if own else "truth"], names)
    if own:
        for i, pictures in enumerate(completed, 1):
            plotting.picture(run.path(f"completed_{i}.png"), pictures[0])


@plotting.figure("colorization.png")
def figure_colorization(run, cfg, score, sde, data):
    """colorization.png: the grey of held-out pictures, three colourings, the truth."""
    x = data.test[:8]
    grey = x.mean(1, keepdim=True)
    drawn = [colorize(score, sde, grey, cfg.inpaint_N, *settings(cfg))
             for _ in range(3)]
    plotting.table(run.path("colorization.png"), [grey, *drawn, x],
                   "Grey, three colourings, the truth (App. I.3)",
                   ["grey", "coloured", "again", "again", "truth"])


def measure_completions(run, cfg, score, sde, data):
    """How many completions of held-out pictures are legible, by mask."""
    x, found = data.test[:min(100, run.opts.evaluate)], {}
    for name, mask in make_masks(*data.shape[1:]).items():
        completed = inpaint(score, sde, x, mask.to(x.device), cfg.inpaint_N,
                            *settings(cfg))
        found[name] = quality.glance(completed, data)
    run.add_metrics(completions=found | {"held_out": quality.glance(x, data)})
    run.say("legible completions: " + ", ".join(
        f"{name} {row['legible']:.0%}" for name, row in found.items()))


# %% 2. Classes (Eq. 14, 49, App. I.1)


class NoisyClassifier(nn.Module):
    """Logits of p(y | x_t). x: (B, C, H, W), t: (B,) -> (B, classes).

    It is a small version of the U-Net's way down; [ADM] Sec. 4.3 ends in attention.
    """

    def __init__(self, image_channels, classes, channels=32, groups=8, patch=2):
        super().__init__()
        self.channels, self.patch = channels, patch
        time_dim, wide = 4 * channels, 2 * channels
        self.time = nn.Sequential(nn.Linear(channels, time_dim), nn.SiLU(),
                                  nn.Linear(time_dim, time_dim))
        self.conv_in = nn.Conv2d(image_channels * patch**2, channels, 3, padding=1)
        self.block1 = ResBlock(channels, channels, time_dim, groups, 0.0)
        self.down = Downsample(channels)
        self.block2 = ResBlock(channels, wide, time_dim, groups, 0.0)
        self.attention = Attention(wide, 1, groups)
        self.block3 = ResBlock(wide, wide, time_dim, groups, 0.1)
        self.norm_out = nn.GroupNorm(groups, wide)
        self.out = nn.Linear(4 * wide, classes)

    def forward(self, x, t):
        emb = self.time(timestep_embedding(t, self.channels).to(x.dtype))
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        h = self.down(self.block1(h, emb))
        h = self.block3(self.attention(self.block2(h, emb)), emb)
        h = F.silu(self.norm_out(h))
        H, W = (max(2, size) for size in h.shape[2:])
        h = F.interpolate(h, (H, W))  # a 4 x 4 image is one pixel here
        # the mean of each quarter, with windows that MPS supports for odd sizes
        h = F.avg_pool2d(h, ((H + 1) // 2, (W + 1) // 2), (H // 2, W // 2))
        return self.out(h.flatten(1))


def train_classifier(cfg, run, sde, data):
    """Train classifier(x, t), the logits of p_t(y | x), once: its weights are kept.

    It sees x as the network does, c_in x, and 999 t. Source: [SDE] App. I.1.
    """
    sigma_data = data.train.std()

    def make():
        patch = 2 if data.shape[1] % 2 == 0 else 1
        return run.place(NoisyClassifier(data.shape[0], len(data.classes), patch=patch))

    def logits(classifier, x, t):
        c_in, _, _ = sde.scaling(t, sigma_data)
        return classifier(sb.per_example(c_in, x) * x, 999 * t)

    def fit(classifier):
        optimizer = torch.optim.AdamW(classifier.parameters(), 3e-3, weight_decay=0.05,
                                      fused=run.device.type != "mps")
        classifier_cfg = replace(cfg, lr=3e-3, steps=cfg.classifier_steps)
        for step in run.steps(cfg.classifier_steps, "classifier", save=False,
                              classifier=classifier, optimizer=optimizer):
            set_learning_rate(optimizer, classifier_cfg, step)
            x0, y = run.batch(data.train, data.train_labels, size=64)
            shift = tuple(torch.randint(-2, 3, (2,)).tolist())
            x0 = torch.roll(x0, shift, dims=(2, 3))  # in place of [ADM]'s random crops
            t = sb.draw_times(sde, len(x0))[0].to(run.device)
            mean, std = sde.marginal(x0, t)
            xt = mean + std * torch.randn_like(x0)
            with run.autocast():
                loss = F.cross_entropy(logits(classifier, xt, t), y)
            optimizer.zero_grad()
            loss.backward()
            run.average_gradients(classifier)
            norm = nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
            run.log(loss=loss, grad_norm=norm)
        return not run.stopped  # an unfinished classifier is not kept

    key = (data.shape, data.fingerprint(), cfg.sde, sorted(vars(sde).items()),
           cfg.classifier_steps, cfg.warmup, cfg.decay, cfg.flip)
    with seeded(2025, run.device):
        classifier = cached(f"sde_classifier_{data.name}", key, make, fit)
    return partial(logits, classifier.eval().requires_grad_(False))


@plotting.figure("classes.png")
def figure_classes(run, cfg, score, sde, data, classifier):
    """classes.png: the classes asked for, in a row of each sampler (Eq. 49).

    The classes of at least five draws of each, or of --evaluate N, are judged.
    """
    labels = asked_classes(cfg, data)
    n = max(run.opts.evaluate or 0, 5 * len(labels))
    y = torch.tensor(labels, device=run.device).repeat(n)[:n]
    rows, names, found = [], [], {}
    for name, method in sb.make_methods(cfg, sde, min(200, cfg.N)).items():
        parts = []
        for part in y.split(100):
            guided = sb.conditional_score(score, classifier, part)
            xT = sde.prior_sampling((len(part), *data.shape), run.device)
            parts.append(sb.final(sb.sampling_process(method, guided, sde, xT)))
        x = torch.cat(parts)
        found[name] = quality.glance(x, data, y)
        rows.append(x[:len(labels)])
        agrees = found[name].get("accuracy")
        names.append(name if agrees is None else
                     f"{name}\n{agrees:.0%} of {n} as asked")
    plotting.table(run.path("classes.png"), rows, "By class (Eq. 49)", names,
                   [data.classes[c] for c in labels])
    run.add_metrics(classes=found)


def asked_classes(cfg, data):
    """The labels that cfg.classes asks for, by the names of classes or by numbers."""
    known = [*data.classes, *map(str, range(len(data.classes)))]  # a name goes first
    for c in cfg.classes:
        if data.train_labels is None or data.empty:
            raise Mistake(f"classes {c}: --dataset {cfg.dataset} has no labels")
        if c not in known:
            raise Mistake(f"classes {c}: must be one of "
                          f"{', '.join(data.classes[:20])}")
    return [known.index(c) % len(data.classes) for c in cfg.classes]


# %% 3. Main


def check_settings(run, cfg, sde, data):
    """Raise Mistake where cfg asks for something that the data or the SDE lacks."""
    if len(data.shape) != 3:
        raise Mistake(f"dataset {cfg.dataset}: this needs a model of pictures")
    sb.check_settings(run, cfg, sde, data)
    if cfg.predictor == "none" and not cfg.inpaint_corrector:
        raise Mistake("inpaint_corrector 0: must be at least 1 with --predictor none")
    asked_classes(cfg, data)


@command_line
def main(argv=None):
    """Load a score model; complete pictures, colour them, draw classes."""
    cfg, run = open_run("controllable", Config, PRESETS, SAMPLING, argv,
                        reads=("score_based",), trained=True)
    data = run.load(load_images, cfg.dataset, cfg.image_size)
    sde = sb.make_sde(cfg)
    check_settings(run, cfg, sde, data)
    image, mask = read_question(cfg.image, cfg.mask, data.shape)
    model = run.trained(sb.make_network(cfg, data.shape))
    classifier = train_classifier(cfg, run, sde, data) if cfg.classes else None
    if not run.main:
        return  # of several processes only the first one draws

    if run.opts.evaluate:
        quality.load_judge(data)  # is trained once and kept, so that glance finds it
    score = sb.score_fn(model, sde, cfg.std_floor, cfg.clip_x0)
    if image is None and data.empty:
        run.say("no inpainting.png: --image FILE names a picture to complete")
    else:
        figure_inpainting(run, cfg, score, sde, data, image, mask)
    if data.shape[0] == 3:
        figure_colorization(run, cfg, score, sde, data)
    if classifier and run.stopped:
        run.say("no classes.png: the training of the classifier was stopped")
    elif classifier:
        figure_classes(run, cfg, score, sde, data, classifier)
    if run.opts.evaluate:
        measure_completions(run, cfg, score, sde, data)
    run.finish()


if __name__ == "__main__":
    main()
