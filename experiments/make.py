"""The evidence: every number and figure that the READMEs show, by one command.

    python experiments/make.py              all that is missing: hours, step by step
    python experiments/make.py --list       the steps: what is there, how long all takes
    python experiments/make.py ddpm latent  these steps again
    python experiments/make.py --tables     only the tables, from the files in results/

A step is one command. Its run folder is outputs/evidence/<step>; what the READMEs show
of it is copied into results/ (pictures in fewer colours) and pretrained/ (weights in
half precision), and results/evidence.json says of which commit it is, on what machine,
and what it took. A training that was stopped goes on where it was. The tables between
`<!-- table: NAME -->` and `<!-- end -->` are written from these files.
"""

import argparse
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RESULTS, WORK = ROOT / "results", ROOT / "outputs" / "evidence"
PAGES = ["README.md", "README.ko.md", "docs/use.md", "results/README.md"]


class Step(NamedTuple):
    """command: of Python, {step}: the run folder of another step; minutes: on 2 cores.

    copies: what is shown of its run folder, in results/<folder>: "name" or "name>as".
    """

    command: str
    minutes: int
    folder: str
    copies: str = ""
    pretrained: str = ""


STEPS = {
    "ddpm": Step("ddpm_example.py", 5, "ddpm", "metrics.json samples.png loss.png",
                 "ddpm"),
    "ddpm_scores": Step("ddpm_example.py --sample {ddpm} --evaluate 500", 5, "ddpm",
                        "metrics.json>evaluation.json"),
    "ddpm_figures": Step(
        "experiments/ddpm.py --sample {ddpm} --evaluate 500", 3, "ddpm",
        "metrics.json>figures.json neighbours.png forward.png schedules.png "
        "denoising.png bound.png rate_distortion.png"),
    "ddim": Step("ddim_example.py", 5, "ddim", "metrics.json samples.png"),
    "ddim_scores": Step("ddim_example.py --sample {ddim} --evaluate 500", 1, "ddim",
                        "metrics.json>evaluation.json"),
    "ddim_figures": Step(
        "experiments/ddim.py --sample {ddim} --evaluate 500", 18, "ddim",
        "metrics.json>figures.json steps.png eta.png reconstruction.png "
        "interpolation.png interpolation.gif quality.png"),
    "conditional": Step("conditional_diffusion_example.py", 5, "conditional",
                        "metrics.json samples.png", "conditional"),
    "conditional_scores": Step(
        "experiments/conditional.py --sample {conditional} --evaluate 500", 3,
        "conditional", "metrics.json>evaluation.json grid.png same_noise.png "
        "classifier.png"),
    "unconditional": Step(
        "conditional_diffusion_example.py --p_uncond 1 --guidance classifier", 6,
        "conditional", "metrics.json>metrics_unconditional.json"),
    "unconditional_scores": Step(
        "experiments/conditional.py --sample {unconditional} --guidance classifier "
        "--evaluate 500", 1, "conditional",
        "metrics.json>evaluation_unconditional.json"),
    "guidance": Step("experiments/guidance.py", 1, ""),
    "compare": Step("experiments/compare.py --seconds 240", 10, "conditional",
                    "metrics.json>compare.json compare.png"),
    "latent": Step("latent_diffusion_example.py", 5, "latent",
                   "metrics.json samples.png", "latent"),
    "latent_scores": Step("latent_diffusion_example.py --sample {latent} "
                          "--evaluate 500", 1, "latent",
                          "metrics.json>evaluation.json"),
    "latent_figures": Step(
        "experiments/latent.py --sample {latent}", 2, "latent",
        "metrics.json>figures.json neighbours.png reconstructions.png latents.png "
        "histogram.png prior.png walk.png cost.png"),
    "score": Step("score_based_diffusion_example.py", 5, "score_based",
                  "metrics.json samples.png", "score_based"),
    "score_scores": Step(
        "score_based_diffusion_example.py --sample {score} --evaluate 500", 8,
        "score_based", "metrics.json>evaluation.json"),
    "score_figures": Step(
        "experiments/score_based.py --sample {score}", 2, "score_based",
        "sdes.png paths.png codes.png guardrails.png"),
    "samplers": Step("experiments/samplers.py --sample {score} --evaluate 500", 16,
                     "score_based", "metrics.json>samplers.json samplers.png "
                     "table1.png"),
    "controllable": Step(
        "experiments/controllable.py --sample {score} "
        "--classes 0 1 2 3 4 5 6 7 8 9", 3, "score_based",
        "metrics.json>classes.json classes.png inpainting.png"),
    "ve": Step("score_based_diffusion_example.py --sde ve", 5, "score_based",
               "metrics.json>metrics_ve.json"),
    "ve_scores": Step(
        "score_based_diffusion_example.py --sample {ve} --evaluate 250", 8,
        "score_based", "metrics.json>evaluation_ve.json"),
    "subvp": Step("score_based_diffusion_example.py --sde subvp", 5, "score_based",
                  "metrics.json>metrics_subvp.json"),
    "subvp_scores": Step(
        "score_based_diffusion_example.py --sample {subvp} --evaluate 250", 8,
        "score_based", "metrics.json>evaluation_subvp.json"),
    "sdes": Step("experiments/sdes.py {score} {ve} {subvp}", 1, ""),
    "swiss_roll": Step(
        "score_based_diffusion_example.py --dataset swiss_roll", 1, "score_based",
        "metrics.json>swiss_roll.json scores.png"),
    "density": Step("experiments/score_based.py --sample {swiss_roll}", 1,
                    "score_based", "density.png"),
    "flow": Step("flow_matching_example.py", 5, "flow_matching",
                 "metrics.json samples.png", "flow_matching"),
    "flow_scores": Step("flow_matching_example.py --sample {flow} --evaluate 500", 8,
                        "flow_matching", "metrics.json>evaluation.json"),
    "flow_figures": Step(
        "experiments/flow_matching.py --sample {flow}", 1, "flow_matching",
        "metrics.json>figures.json way.png one_step.png straightness.png"),
    "flow_ot": Step("flow_matching_example.py --coupling ot", 5, "flow_matching",
                    "metrics.json>metrics_ot.json"),
    "flow_reflow": Step(
        "flow_matching_example.py --reflow {flow} --steps 2000 --lr 0.001", 14,
        "flow_matching", "metrics.json>metrics_reflow.json"),
    "flow_steps": Step("experiments/flow_steps.py {flow} {flow_ot} {flow_reflow}", 4,
                       ""),
    "rectify": Step("experiments/rectify.py", 4, ""),
    "sines": Step("experiments/series.py --dataset sines", 3, "score_based",
                  "metrics.json>sines.json forecast.png series.png"),
    "membrane": Step("experiments/series.py --dataset membrane", 3, "score_based",
                     "metrics.json>membrane.json forecast.png>membrane.png"),
    "unique_codes": Step("experiments/unique_codes.py", 1, ""),
    "training": Step("experiments/training.py", 5, ""),
    "how_many": Step("experiments/how_many.py", 12, ""),
    "failures": Step("experiments/failures.py", 7, ""),
    "gallery": Step("experiments/gallery.py {ddpm} {conditional} {swiss_roll}", 1, ""),
    "race": Step("experiments/race.py", 45, ""),
}


# Running


def git(*words):
    """What git says, stripped."""
    return subprocess.run(["git", "-C", ROOT, *words], check=True, text=True,
                          capture_output=True).stdout.strip()


def code_commit():
    """The last commit that changed the code, where all is committed."""
    code = ["*_example.py", "common", "experiments"]
    if git("status", "--porcelain", "--", *code):
        sys.exit("experiments/make.py: the code has changes that are not committed; "
                 "commit them, evidence belongs to a commit")
    return git("log", "-1", "--format=%h", "--", *code)


def run_folder(name):
    """The newest run folder of a step, or None."""
    files = sorted((WORK / name).glob("*/*/config.json"))
    return files[-1].parent if files else None


def command_of(name):
    """The command of a step as it is started here, a list of words."""
    step = STEPS[name]
    folders = {each: run_folder(each) for each in re.findall(r"{(\w+)}", step.command)}
    if missing := [each for each, folder in folders.items() if folder is None]:
        sys.exit(f"experiments/make.py: {name} needs the run of {missing[0]}; first "
                 f"python experiments/make.py {missing[0]}")
    words = [sys.executable, *shlex.split(step.command.format(**folders))]
    if not step.folder:
        return words
    old = run_folder(name)
    if old and (old / "checkpoint.pt").exists() and "--sample" not in words:
        return [*words[:2], "--resume", str(old)]
    return [*words, "--out", str(WORK / name)]


def run(name, commit):
    """Run a step, copy what it shows, and write down what it took."""
    step, begin, before = STEPS[name], time.time(), os.times()
    done = subprocess.run(command_of(name), cwd=ROOT)
    if done.returncode:
        sys.exit(f"experiments/make.py: {name} ended with status {done.returncode}")
    publish(step, run_folder(name))
    after = os.times()
    cpu = (after.children_user + after.children_system
           - before.children_user - before.children_system)
    file = RESULTS / "evidence.json"
    entries = json.loads(file.read_text()) if file.exists() else {}
    entries[name] = {"command": "python " + re.sub(r"{(\w+)}", r"RUN", step.command),
                     "commit": commit, "date": time.strftime("%Y-%m-%d"),
                     "seconds": round(time.time() - begin), "cpu_seconds": round(cpu),
                     "machine": machine()}
    entries = {each: entries[each] for each in STEPS if each in entries}
    file.write_text(json.dumps(entries, indent=2) + "\n")


def machine():
    """Cores, kind of processor and version of torch."""
    import torch

    cpu = "CPU"
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = found[1] if found else cpu
    return f"{os.cpu_count()} cores of {cpu}, torch {torch.__version__}"


def publish(step, folder):
    """Copy into results/ what a run folder shows, into pretrained/ what it learnt."""
    for word in step.copies.split():
        source, _, target = word.partition(">")
        target = RESULTS / step.folder / (target or source)
        if target.suffix == ".png":
            target.write_bytes(small(folder / source))
        else:
            target.write_bytes((folder / source).read_bytes())
    if step.pretrained:
        release(folder / "checkpoint.pt", ROOT / "pretrained" / f"{step.pretrained}.pt")


def small(path):
    """The bytes of a picture, in 256 colours where that is smaller."""
    packed = io.BytesIO()
    Image.open(path).convert("RGB").quantize(256).save(packed, "PNG", optimize=True)
    return min(packed.getvalue(), path.read_bytes(), key=len)


def release(checkpoint, target):
    """What --sample needs of a checkpoint, its weights in half precision."""
    import torch

    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    kept = {key: value for key, value in state.items()
            if key not in ("model", "optimizer", "random", "loss_scale")}
    for part in ("ema", "vae"):
        if part in kept:
            kept[part] = {name: x.half() if x.ndim > 1 else x
                          for name, x in kept[part].items()}
    torch.save(kept, target)


# Tables


def load(name):
    """A file of results/, {} where it is not there yet."""
    file = RESULTS / name
    return json.loads(file.read_text()) if file.exists() else {}


def percent(share, digits=0):
    """0.83 as "83 %"."""
    return f"{100 * share:.{digits}f} %"


def of_500(scores):
    """Legible, Fréchet distance and recall, as the tables write them."""
    return (f"{percent(scores['legible'])}, {scores['frechet_distance']:.1f}, "
            f"{scores['recall']:.2f}")


SCRIPTS = {  # script: what its two files of results/ are called
    "ddpm_example.py": ("ddpm/metrics.json", "ddpm/evaluation.json"),
    "ddim_example.py": ("ddim/metrics.json", "ddim/evaluation.json"),
    "conditional_diffusion_example.py": (
        "conditional/metrics.json", "conditional/evaluation.json"),
    "latent_diffusion_example.py": ("latent/metrics.json", "latent/evaluation.json"),
    "score_based_diffusion_example.py": (
        "score_based/metrics.json", "score_based/evaluation.json"),
    "flow_matching_example.py": (
        "flow_matching/metrics.json", "flow_matching/evaluation.json")}


def table_defaults():
    """Each script as typed: training, all of it, 64 samples; then 500 scored."""
    yield ["script", "training", "all, with figures", "one batch of samples",
           "legible, distance, recall", "held-out digits"]
    for script, (typed, scored) in SCRIPTS.items():
        run, found = load(typed), load(scored).get("evaluation")
        if not found:
            continue  # not run yet
        train = run.get("train_seconds", 0) + run.get("vae_train_seconds", 0)
        draw = run["sampling"]
        yield [f"`{script}`", f"{train:.0f} s", f"{run['total_seconds']:.0f} s",
               f"{draw['n']} in {draw['seconds']:.0f} s, "
               f"{draw['network_calls']:.0f} calls", of_500(found),
               f"{percent(found['legible_of_held_out'])}, "
               f"{found['frechet_distance_of_held_out']:.1f}"]


def table_race():
    """The race of experiments/race.py: legible, distance and recall by CPU minutes."""
    rows = load("ddpm/race.json")["rows"]
    yield ["CPU minutes, steps", *(f"{row['cpu_minutes']:.1f}, {row['steps']:,}"
                                   for row in rows)]
    for name in ("T steps", "25 steps"):
        words = "DDPM, T steps" if name == "T steps" else "DDIM, 25 steps, η = 0"
        yield [words, *(of_500(row[name]) for row in rows)]


def table_record():
    """The fewest CPU minutes of the race at which so many samples are legible."""
    rows = load("ddpm/race.json")["rows"]
    levels = (0.5, 0.8, 0.9)
    yield ["legible", *(percent(level) for level in levels)]
    for name in ("T steps", "25 steps"):
        words = "DDPM, T steps" if name == "T steps" else "DDIM, 25 steps, η = 0"
        points = [(0.0, 0.0), *((row["cpu_minutes"], row[name]["legible"])
                                for row in rows)]
        yield [words, *(minutes_until(level, points) for level in levels)]


def minutes_until(level, points):
    """The CPU minutes at which a line through points (minutes, share) gets there."""
    for (a, low), (b, high) in zip(points, points[1:], strict=False):
        if low < level <= high:
            return f"{a + (b - a) * (level - low) / (high - low):.1f}"
    return f"> {points[-1][0]:.0f}"


def table_ddim():
    """Samplers of ddim_example.py by their number of steps."""
    found = load("ddim/figures.json")["evaluation_by_S"]
    words = {"eta = 0": "DDIM, η = 0", "eta = 1": "DDPM, η = 1",
             "sigma_hat": "DDPM, σ̂"}
    yield ["steps S, network calls", *next(iter(found.values()))]
    for key, name in words.items():
        yield [name, *(of_500(scores) for scores in found[key].values())]


def table_guidance():
    """Agreement with the class asked for, and quality, against the weight w."""
    found = {}
    for name in ("evaluation", "evaluation_unconditional"):
        found |= load(f"conditional/{name}.json")["guidance_sweep"]
    yield ["w", *(w.replace("-", "−") for w in next(iter(found.values())))]
    for name, sweep in found.items():
        yield [f"{name}: as asked", *(percent(scores['accuracy'], 1)
                                      for scores in sweep.values())]
        yield [f"{name}: legible, distance, recall", *map(of_500, sweep.values())]


def table_compare():
    """U-Net and DiT in equal time."""
    found = load("conditional/compare.json")["compare"]
    yield ["", "steps", "seconds", "weights", "as asked", "legible, distance, recall"]
    for key, name in (("unet", "U-Net"), ("dit", "DiT")):
        scores = found[key]
        yield [name, f"{scores['steps']:,}", f"{scores['train_seconds']:.0f}",
               f"{scores['parameters'] / 1e6:.2f} M", percent(scores['accuracy'], 1),
               of_500(scores)]


def table_latent():
    """What one training step costs, in latent space and in pixels."""
    cost = load("latent/figures.json")["cost_of_a_step"]
    yield ["", "latents, 4×8×8", "pixels, 1×32×32", "ratio"]
    rows = (("seconds", "seconds", 3), ("gflop", "10⁹ operations", 1),
            ("activations_mb", "activations kept, MB", 1))
    for key, name, digits in rows:
        yield [name, *(f"{cost[part][key]:.{digits}f}" for part in ("latent", "pixel")),
               f"{cost['pixel_over_latent'][key]:.1f}"]


def table_samplers():
    """The samplers of the score SDE at about 200 network calls, and the default."""
    found = load("score_based/samplers.json") | load("score_based/evaluation.json")
    yield ["sampler", "network calls", "legible, distance, recall"]
    for name, scores in found["evaluation_by_samplers"].items():
        yield [name, f"{scores['network_calls']:.0f}", of_500(scores)]
    yield ["the default", f"{found['evaluation']['network_calls']:.0f}",
           of_500(found["evaluation"])]


def table_r():
    """Reverse diffusion with the corrector, by its signal-to-noise ratio r."""
    found = load("score_based/samplers.json")["evaluation_by_r"]
    yield ["r", *found]
    yield ["legible, distance, recall", *map(of_500, found.values())]


def table_tolerance():
    """The ODE by RK45, by its tolerance."""
    found = load("score_based/samplers.json")["evaluation_by_tolerance"]
    yield ["tolerance", *found]
    yield ["network calls", *(f"{scores['network_calls']:.0f}"
                              for scores in found.values())]
    yield ["legible, distance, recall", *map(of_500, found.values())]


def table_sdes():
    """The three SDEs, each trained as typed, with the default sampler."""
    yield ["SDE", "n", "legible, distance, recall", "held-out digits' distance",
           "bits/dim"]
    for name, end in (("VP", ""), ("sub-VP", "_subvp"), ("VE", "_ve")):
        found = load(f"score_based/evaluation{end}.json")
        scores, bits = found["evaluation"], found["bits_per_dim"]
        yield [name, f"{scores['n']}", of_500(scores),
               f"{scores['frechet_distance_of_held_out']:.1f}",
               f"{bits['mean']:.2f} ± {bits['standard_error']:.2f}"]


def table_series():
    """Series: training, spectra, and how many true values the 80 % bands hold."""
    yield ["series", "training", "spectrum, dB from the data's (two halves of it)",
           "80 % bands hold, forecasts", "fillings"]
    for name in ("sines", "membrane"):
        run = load(f"score_based/{name}.json")
        scores, hold = run["samples"], run["bands_of_80_percent_hold"]
        yield [f"`{name}`", f"{run['train_seconds']:.0f} s",
               f"{scores['spectral_distance_db']:.2f} "
               f"({scores['spectral_distance_db_of_halves']:.2f})",
               percent(hold['forecast']), percent(hold['gap'])]


def table_how_many():
    """The default DDPM training on fewer pictures."""
    yield ["training pictures", "legible, distance, recall",
           "to the nearest of them, rms", "held-out digits to it"]
    for row in load("ddpm/how_many.json"):
        nearest = row["nearest_trained_rms"]
        yield [f"{row['pictures']:,}", of_500(row), f"{nearest['samples']:.2f}",
               f"{nearest['held_out']:.2f}"]


def table_evidence():
    """What was run, of which commit, how long it took."""
    yield ["command", "commit", "date", "minutes", "CPU minutes"]
    for entry in load("evidence.json").values():
        yield [f"`{entry['command']}`", entry["commit"], entry["date"],
               f"{entry['seconds'] / 60:.1f}", f"{entry['cpu_seconds'] / 60:.1f}"]


TABLES = {name.removeprefix("table_"): function for name, function in globals().items()
          if name.startswith("table_")}
KOREAN = {  # of the tables that README.ko.md shows
    "script": "스크립트", "training": "학습",
    "all, with figures": "그림까지 모두",
    "one batch of samples": "표본 한 묶음",
    "legible, distance, recall": "판독률, 거리, 재현율",
    "held-out digits": "따로 떼어 둔 숫자",
    "CPU minutes, steps": "CPU 시간(분), 스텝", "legible": "판독률",
    "DDPM, T steps": "DDPM, T 스텝",
    "DDIM, 25 steps, η = 0": "DDIM, 25 스텝, η = 0"}


def table(name, korean=False):
    """A table in Markdown, its first row the head."""
    rows = [[KOREAN.get(cell, cell) for cell in row] if korean else row
            for row in TABLES[name]()]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_tables(text, korean=False):
    """The text of a page with its tables written anew."""
    def anew(found):
        return f"{found[1]}\n\n{table(found[2], korean)}\n\n<!-- end -->"

    return re.sub(r"(<!-- table: (\w+) -->).*?<!-- end -->", anew, text,
                  flags=re.DOTALL)


def write_tables():
    for page in PAGES:
        if (ROOT / page).exists():
            text = (ROOT / page).read_text(encoding="utf-8")
            text = with_tables(text, ".ko." in page)
            (ROOT / page).write_text(text, encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("steps", nargs="*", metavar="STEP",
                        help=f"run these again: {', '.join(STEPS)}")
    parser.add_argument("--list", action="store_true", help="what there is to do")
    parser.add_argument("--tables", action="store_true", help="write the tables only")
    parser.add_argument("--race", action="store_true", help="as the step race")
    opts = parser.parse_args(argv)
    asked = opts.steps + ["race"] * opts.race
    for name in asked:
        if name not in STEPS:
            parser.error(f"{name}: must be one of {', '.join(STEPS)}")
    there = load("evidence.json")
    todo = asked or [name for name in STEPS if name not in there]
    minutes = sum(STEPS[name].minutes for name in todo)
    if opts.list:
        for name, step in STEPS.items():
            state = f"about {step.minutes} minutes"
            if name in there:
                state = f"there, of {there[name]['commit']}"
            print(f"{name:21} {state:22} python {step.command}")
    if not opts.tables:
        print(f"{len(todo)} steps to do, about {minutes} minutes on 2 cores",
              flush=True)
    if not (opts.list or opts.tables):
        for name in todo:
            print(f"== {name}: about {STEPS[name].minutes} minutes", flush=True)
            run(name, code_commit())
    if not opts.list:
        write_tables()


if __name__ == "__main__":
    main()
