"""The same noises after 250 to 4,000 steps of training, with and without the average.

Trains ddim_example.py's default network, as `train` there does, and writes
results/ddim/training.png and training.json; takes about as long as that script.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ddim_example as ddim  # noqa: E402
from common import plotting, quality  # noqa: E402
from common.data import load_images  # noqa: E402
from common.run import new_run  # noqa: E402


def look(model, cfg, data, schedule, xT):
    """What a network draws of the noises xT: 8 pictures, the share that is legible."""
    model = ddim.scaled(model, cfg.eps_scale)
    drawn = [ddim.ddim_sample(model, part.shape, schedule, S=20, xT=part,
                              temperature=cfg.temperature)
             for part in xT.split(100)]
    return drawn[0][:8], quality.glance(torch.cat(drawn), data)["legible"]


def main(n=500, at=(250, 500, 1000, 2000, 4000), folder=ROOT / "results/ddim", **how):
    """Train, look at the steps `at` from n noises; the averaged network.

    how: see common.run.new_run.
    """
    run = new_run("ddim", ddim.Config(steps=max(at)), **how)
    cfg, data = run.cfg, run.load(load_images(run.cfg.dataset))
    schedule = ddim.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    schedule = schedule.to(run.device)
    xT = torch.randn(n, *data.shape).to(run.device)
    model = run.place(ddim.make_unet(cfg, data.shape))
    ema = ddim.EMA(model, cfg.ema)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, weight_decay=cfg.weight_decay,
        fused=run.device.type != "mps")  # one kernel for all weights
    rows, labels, found = [], [], {}
    for step in run.steps(cfg.steps, model=model, ema=ema.model, optimizer=optimizer):
        ddim.set_learning_rate(optimizer, cfg, step)
        x0, _ = run.batch(data.train)
        t = ddim.draw_t(len(x0), cfg.T, cfg.drawing).to(run.device)
        eps = torch.randn_like(x0)
        with run.autocast():
            loss = ddim.ddpm_loss(model, x0, t, eps, schedule)
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        ema.update(model, step)
        run.log(loss=loss, grad_norm=norm)
        for name, network in (("averaged", ema.model), ("last weights", model)):
            if step + 1 in at:
                pictures, legible = look(network.eval(), cfg, data, schedule, xT)
                rows.append(pictures)
                labels.append(f"{step + 1} steps, {name}\n{legible:.0%} legible")
                found[f"{step + 1}, {name}"] = legible
        model.train()
    plotting.table(folder / "training.png", rows,
                   "Each column one noise, 20 steps, eta = 0", labels)
    found = {"n": n, "legible": found}
    (folder / "training.json").write_text(json.dumps(found, indent=2))
    return ema.model


if __name__ == "__main__":
    main()
