"""Whole runs of ddpm_example.py: files, --sample, --config, resume, Ctrl-C, torchrun."""

import csv
import json
import math
import re
import signal
import time

import ddpm_example as ddpm

import pytest
import torch
from conftest import (
    ROOT,
    assert_same_tree,
    only_run,
    open_picture,
    open_run,
    run_script,
    start_script,
)
from torch.testing import assert_close

SCRIPT = "ddpm_example.py"
FIGURES = ("forward", "schedules", "loss", "samples", "neighbours", "denoising", "bound", "preview")


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def finished(done, status=0):
    assert done.returncode == status, (done.returncode, done.stderr[-9000:])
    assert "Traceback" not in done.stderr, done.stderr[-9000:]
    return done


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of one smoke run, started from another directory."""
    away = tmp_path_factory.mktemp("away")
    finished(run_script(SCRIPT, "--preset", "smoke", cwd=away))
    assert [p.name for p in away.iterdir()] == ["outputs"]
    return only_run(away / "outputs", "ddpm")


# The files of a run


@pytest.mark.slow
def test_smoke_run_writes_every_file(smoke):
    for name in FIGURES:
        assert len(open_picture(smoke / f"{name}.png")) == 1
    assert len(open_picture(smoke / "denoising.gif")) > 5
    with open(smoke / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    config = json.loads((smoke / "config.json").read_text())
    assert config["script"] == "ddpm" and config["preset"] == "smoke"
    assert config["config"]["T"] == 20 and config["seed"] == 0
    assert not list(smoke.glob("*.tmp"))


@pytest.mark.slow
def test_smoke_run_measures_what_it_should(smoke):
    found = json.loads((smoke / "metrics.json").read_text())
    assert found["steps"] == 6 and found["steps_per_second"] > 0 and found["train_seconds"] > 0
    assert 0 <= found["share_outside_core"] < 1 and found["peak_memory_mb"] > 50
    assert found["sampling"]["n"] == 4 and found["sampling"]["seconds"] > 0
    assert 0 <= found["sampling"]["share_outside_network"] < 1
    assert found["samples"]["legible_of_held_out"] > 0.93
    assert found["samples"]["legible"] < 0.01 and found["samples"]["nearest_train_rms_min"] > 0
    log = (smoke / "log.csv").read_text().splitlines()[1:]  # all six are among the last 500
    losses = [float(line.split(",")[1]) for line in log]
    assert_close(found["loss_of_last_500"], sum(losses) / 6)
    assert found["sampling"]["network_calls"] == 20 and found["parameters"] > 1000
    bits = found["bits_per_dim"]
    assert bits["images"] == 32 and bits["variance"] == "beta_tilde" and bits["L_T"] > 0
    assert bits["total"] > bits["rate"] > bits["L_T"] and bits["distortion"] > 0
    assert_close(bits["total"], bits["rate"] + bits["distortion"])
    assert found["config"]["T"] == 20 and found["total_seconds"] > found["train_seconds"]


@pytest.mark.slow
def test_checkpoint_holds_all_that_a_resume_needs(smoke):
    state = load(smoke)
    assert state["step"] == 6 and state["script"] == "ddpm" and state["seed"] == 0
    assert state["preset"] == "smoke" and state["loop"] == "model"
    for key in ("model", "ema", "optimizer", "random", "config"):
        assert state[key]


# --sample, --config


@pytest.mark.slow
def test_sample_draws_from_a_run_without_touching_it(smoke, tmp_path):
    before = {p.name: p.read_bytes() for p in smoke.iterdir()}
    ddpm.main(["--sample", str(smoke), "--n_samples", "9", "--variance", "beta", "--out",
               str(tmp_path), "--evaluate", "10"])
    drawn = only_run(tmp_path, "ddpm")
    assert {p.name: p.read_bytes() for p in smoke.iterdir()} == before
    for name in ("samples", "denoising", "evaluated"):
        open_picture(drawn / f"{name}.png")
    assert not (drawn / "checkpoint.pt").exists()
    found = json.loads((drawn / "metrics.json").read_text())
    assert found["sampling"]["n"] == 9 and found["config"]["variance"] == "beta"
    scores = found["evaluation"]
    assert scores["n"] == 10 and sum(scores["classes"]) == 10
    for name in ("frechet_distance", "inception_score", "precision", "recall"):
        assert math.isfinite(scores[name])
    # without a value it is the newest run under --out
    ddpm.main(["--sample", "--n_samples", "1", "--out", str(smoke.parent.parent)])
    newer = [p for p in smoke.parent.iterdir() if p != smoke]
    assert len(newer) == 1 and (newer[0] / "samples.png").exists()


@pytest.mark.slow
def test_config_repeats_a_run_to_the_last_bit(smoke, tmp_path):
    ddpm.main(["--config", str(smoke / "config.json"), "--out", str(tmp_path)])
    again = only_run(tmp_path, "ddpm")
    one, other = (json.loads((f / "config.json").read_text()) for f in (again, smoke))
    assert one | {"preset": None} == other | {"preset": None}  # see test_common for the preset
    assert_same_tree(load(again) | {"preset": None}, load(smoke) | {"preset": None})
    assert (again / "log.csv").read_bytes() == (smoke / "log.csv").read_bytes()
    assert (again / "samples.png").read_bytes() == (smoke / "samples.png").read_bytes()


# Resume


def train(out, *argv, stop_at=None, die_at=None):
    """Train in this process as main does; stop as after Ctrl-C, or die as when killed, at a step.
    """
    cfg, run, data = open_run(ddpm, out, *argv)
    log = run.log

    def spy(step, name, **values):
        log(step, name, **values)
        if step == die_at:
            raise MemoryError
        run.stopped = run.stopped or step == stop_at

    run.log = spy
    ddpm.train(cfg, run, data)
    return run.folder


VARIED = ("--steps", "9", "--dropout", "0.2", "--flip", "--preview_every", "4", "--ema", "0.9")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped at 5", "died at 6", "resumed twice", "already done"])
def test_resume_ends_with_the_bytes_of_a_run_that_never_stopped(how, tmp_path):
    whole = train(tmp_path / "whole", *VARIED)
    out = tmp_path / "parts"
    if how == "died at 6":
        with pytest.raises(MemoryError):
            train(out, *VARIED, die_at=6)
        assert load(only_run(out, "ddpm"))["step"] == 4
    else:
        train(out, *VARIED, stop_at={"stopped at 5": 5, "resumed twice": 2}.get(how))
    parts = only_run(out, "ddpm")
    if how == "resumed twice":
        assert load(parts)["step"] == 2
        train(out, "--resume", str(parts), stop_at=7)
        assert load(parts)["step"] == 7
    if how == "stopped at 5":
        assert load(parts)["step"] == 5
    torch.randn(3)  # what another program drew must not matter
    assert train(out, "--resume") == parts  # the newest run
    assert_same_tree(load(parts), load(whole))
    assert (parts / "checkpoint.pt").read_bytes() == (whole / "checkpoint.pt").read_bytes()
    assert (parts / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()


def test_another_seed_is_another_run(tmp_path):
    a = load(train(tmp_path / "a", "--steps", "2"))
    b = load(train(tmp_path / "b", "--steps", "2", "--seed", "1"))
    assert not torch.equal(a["model"]["conv_in.weight"], b["model"]["conv_in.weight"])


# Ctrl-C


def wait_for_steps(process, out, steps, limit=120):
    """Wait until the run under out has a checkpoint of at least so many steps."""
    begin = time.monotonic()
    while time.monotonic() - begin < limit and process.poll() is None:
        for file in (out / "ddpm").glob("*/checkpoint.pt"):
            if load(file.parent)["step"] >= steps:
                return file.parent
        time.sleep(0.1)
    raise AssertionError(f"no checkpoint of {steps} steps: {process.communicate()[1][-1000:]}")


LONG = ("--preset", "smoke", "--steps", "100000", "--preview_every", "2", "--n_samples", "1")


@pytest.mark.slow
def test_ctrl_c_once_saves_and_samples(tmp_path):
    process = start_script(SCRIPT, *LONG, "--out", tmp_path, cwd=tmp_path)
    folder = wait_for_steps(process, tmp_path, 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-1000:]
    assert "Traceback" not in err
    state = load(folder)
    with open(folder / "log.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert state["step"] == int(last["step"]) < 100_000
    for name in ("samples", "loss", "denoising"):
        open_picture(folder / f"{name}.png")
    found = json.loads((folder / "metrics.json").read_text())
    assert found["steps"] == state["step"] and found["sampling"]["n"] == 1


@pytest.mark.slow
def test_ctrl_c_twice_leaves_at_once(tmp_path):
    process = start_script(SCRIPT, *LONG, "--T", "5000", "--out", tmp_path, cwd=tmp_path)
    folder = wait_for_steps(process, tmp_path, 2)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)  # by now it saves, or samples for a long time
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - begin < 5
    assert "Traceback" not in err
    assert load(folder)["step"] >= 2 and not (folder / "samples.png").exists()


# Several processes


# A script of its own: every rank writes what it saw. Rank 1 starts from other weights on purpose.
RANKS = """
import atexit
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

sys.path.insert(0, {root!r})
from common.data import Data
from common.runs import open_run


@dataclass(frozen=True)
class Config:
    batch_size: int = 6  # pictures per step, >= 1
    warmup: int = 0  # steps, >= 0
    decay: Literal["cosine", "constant"] = "constant"  # of the rate
    preview_every: int = 2  # steps, >= 1


atexit.register(lambda: print(f"in the group: {{torch.distributed.is_initialized()}}"))  # the last one
cfg, run = open_run("toy", Config, {{"smoke": Config()}})
assert torch.distributed.is_initialized()
x = torch.linspace(-1, 1, 500).view(-1, 1, 1, 1)
data = run.load(Data("toy", x, x[:5]))
model = run.place(nn.Sequential(nn.Flatten(), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
if run.launch.rank == 1:
    nn.init.ones_(model[1].weight)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
rows = []
for step in run.training(5, model, optimizer):
    before = [p.detach().clone() for p in model.parameters()]
    x, labels = run.batch(data, cfg.batch_size)
    assert labels is None
    loss = (model(x) - x.flatten(1) ** 2).square().mean()
    local = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
    optimizer.zero_grad()
    run.backward(loss, optimizer, 1e9)
    rows.append(dict(x=x, local=local, loss=loss.item(), logged=run.row["loss"], before=before,
                     shared=[p.grad.clone() for p in model.parameters()]))
    optimizer.step()
weights = [p.detach().clone() for p in model.parameters()]
torch.save(dict(rows=rows, weights=weights), f"rank{{run.launch.rank}}.pt")
"""


@pytest.mark.slow
def test_two_processes_share_the_batch_and_average_the_gradients(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(ROOT)))
    done = finished(run_script(script, "--device", "cpu", cwd=tmp_path, processes=2))
    assert done.stdout.count("in the group: False") == 2  # left before Python ends
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert len(one["rows"]) == len(other["rows"]) == 5
    for a, b in zip(one["rows"], other["rows"], strict=True):
        assert a["x"].shape == b["x"].shape == (3, 1, 1, 1)  # half of the batch each
        assert not torch.equal(a["x"], b["x"])
        assert_same_tree(a["before"], b["before"])  # the same weights, from the first step on
        assert_same_tree(a["shared"], b["shared"])
        for mean, left, right in zip(a["shared"], a["local"], b["local"], strict=True):
            assert not torch.equal(left, right)
            assert_close(mean, (left + right) / 2)
        assert_close(a["logged"], (a["loss"] + b["loss"]) / 2)  # the log has the whole batch's
    assert_same_tree(one["weights"], other["weights"])
    assert not torch.equal(one["weights"][0], one["rows"][0]["before"][0])
    assert not torch.equal(one["rows"][0]["x"], one["rows"][1]["x"])  # and a new one each step
    state = load(only_run(tmp_path / "outputs", "toy"))
    assert state["step"] == 5 and len(state["random"]) == 2  # the state of both generators
    assert not torch.equal(state["random"][0]["cpu"], state["random"][1]["cpu"])


@pytest.mark.slow
def test_smoke_run_of_two_processes(tmp_path):
    argv = ("--preset", "smoke", "--n_samples", 2, "--out", "two")
    finished(run_script(SCRIPT, *argv, cwd=tmp_path, processes=2))
    folder = only_run(tmp_path / "two", "ddpm")  # one writer: one folder
    assert load(folder)["step"] == 6
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    for name in FIGURES:
        open_picture(folder / f"{name}.png")
    open_picture(folder / "denoising.gif")
    for name in ("config.json", "metrics.json"):
        assert json.loads((folder / name).read_text())
    assert not list(folder.glob("*.tmp"))


# Divergence


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    argv = ["--preset", "smoke", "--lr", "1e30", "--grad_clip", "1e30", "--warmup", "0",
            "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        ddpm.main(argv)
    assert stop.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(said) == 1
    step = int(re.search(r"at step (\d+)", said[0])[1])
    kept = int(re.search(r"checkpoint is that of step (\d+)", said[0])[1])
    assert "nan" in said[0] or "inf" in said[0]
    assert 1 < step <= 6 and kept < step
    state = load(only_run(tmp_path, "ddpm"))
    assert state["step"] == kept
    assert all(torch.isfinite(v).all() for v in state["model"].values())


@pytest.mark.slow
def test_gradient_checkpointing_trains_the_same(tmp_path):
    plain = load(train(tmp_path / "a", "--steps", "2"))
    saving = load(train(tmp_path / "b", "--steps", "2", "--grad_checkpointing"))
    for name, value in plain["model"].items():
        assert_close(saving["model"][name], value, rtol=1e-4, atol=1e-5)
