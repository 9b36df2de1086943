"""The same noises after 250 to 4,000 steps of training, with and without the average.

    python experiments/training.py          about as long as python ddim_example.py

Trains the default network of ddim_example.py as `train` does there, and writes
results/ddim/training.png and training.json.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
import ddim_example as ddim  # noqa: E402
from common import plotting, quality  # noqa: E402
from common.data import load_images  # noqa: E402
from common.run import new_run  # noqa: E402


def look(model, cfg, data, schedule, xT):
    """Draw from the noises xT: 8 images, and the fraction of all that is legible."""
    def eps_model(xt, t):
        return cfg.eps_scale * model(xt, t)

    drawn = [ddim.ddim_sample(eps_model, part, schedule, S=20)
             for part in xT.split(100)]
    return drawn[0][:8], quality.glance(torch.cat(drawn), data)["legible"]


def main(n=500, moments=(250, 500, 1000, 2000, 4000), folder=ROOT / "results/ddim",
         out=None, device=None):
    """Train and return the averaged network; draw from n noises at some moments."""
    run = new_run("ddim", ddim.Config(steps=max(moments)), out=out, device=device)
    cfg, data = run.cfg, run.load(load_images, run.cfg.dataset)
    schedule = ddim.make_schedule(cfg.schedule, cfg.T, cfg.beta_1, cfg.beta_T)
    schedule = schedule.to(run.device)
    xT = torch.randn(n, *data.shape).to(run.device)
    model = run.place(ddim.make_unet(cfg, data.shape))
    ema = ddim.EMA(model, cfg.ema)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, weight_decay=cfg.weight_decay,
        fused=run.device.type != "mps")  # updates all weights in one call
    rows, labels, legible = [], [], {}
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
            if step + 1 in moments:
                images, fraction = look(network.eval(), cfg, data, schedule, xT)
                rows.append(images)
                labels.append(f"{step + 1} steps, {name}\n{fraction:.0%} legible")
                legible[f"{step + 1}, {name}"] = fraction
        model.train()
    plotting.table(folder / "training.png", rows,
                   "Each column one noise, 20 steps, eta = 0", labels)
    (folder / "training.json").write_text(
        json.dumps({"n": n, "legible": legible}, indent=2))
    return ema.model


if __name__ == "__main__":
    main()
