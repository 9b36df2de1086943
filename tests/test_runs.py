"""Whole runs of ddpm_example.py: files, --sample, --config, resume, Ctrl-C, torchrun."""

import csv
import json
import math
import re
import signal
import time

import pytest
import torch
from conftest import (
    assert_same_tree,
    only_run,
    open_picture,
    run_script,
    start_script,
)
from torch.testing import assert_close

import ddpm_example as ddpm

SCRIPT = "ddpm_example.py"
FIGURES = ("forward", "schedules", "loss", "samples", "neighbours", "denoising", "bound", "preview")


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def finished(done, status=0):
    assert done.returncode == status, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
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
    assert config["script"] == "ddpm" and config["config"]["T"] == 20
    assert not list(smoke.glob("*.tmp"))


@pytest.mark.slow
def test_smoke_run_measures_what_it_should(smoke):
    found = json.loads((smoke / "metrics.json").read_text())
    assert found["steps"] == 6 and found["steps_per_second"] > 0 and found["train_seconds"] > 0
    assert 0 <= found["share_outside_core"] < 1 and found["peak_memory_mb"] > 50
    assert found["sampling"]["n"] == 4 and found["sampling"]["seconds"] > 0
    assert 0 <= found["sampling"]["share_outside_network"] < 1
    assert found["samples"]["classifier"]["accuracy"] > 0.95
    assert 0 <= found["samples"]["sure"] <= 1 and found["samples"]["nearest_train_rms_min"] > 0
    assert found["bits_per_dim"]["total"] > 0 and found["bits_per_dim"]["t_used"] == 20


@pytest.mark.slow
def test_checkpoint_holds_all_that_a_resume_needs(smoke):
    state = load(smoke)
    assert state["step"] == 6 and state["script"] == "ddpm" and state["seed"] == 0
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
    assert (again / "config.json").read_text() == (smoke / "config.json").read_text()
    assert_same_tree(load(again), load(smoke))
    assert (again / "log.csv").read_bytes() == (smoke / "log.csv").read_bytes()
    assert (again / "samples.png").read_bytes() == (smoke / "samples.png").read_bytes()


# Resume


def train(out, *argv, stop_at=None, die_at=None):
    """Train in this process as main does; stop as after Ctrl-C, or die as when killed, at a step.
    """
    args = ["--preset", "smoke", "--out", str(out), *argv]
    cfg, opts = ddpm.parse_args(ddpm.Config, ddpm.PRESETS, args, ddpm.SAMPLING)
    cfg, run, state = ddpm.start("ddpm", ddpm.Config, cfg, opts, ddpm.launch("cpu"), ddpm.validate)
    log = run.log

    def spy(step, **values):
        log(step, **values)
        if step == die_at:
            raise MemoryError
        run.stopped = run.stopped or step == stop_at

    run.log = spy
    ddpm.train(cfg, run, state=state)
    run.flush_log()
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


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(tmp_path):
    """The same batch, t and eps, split in two, the gradients averaged: the same weights."""
    argv = ("--preset", "smoke", "--n_samples", "2", "--out")
    finished(run_script(SCRIPT, *argv, "two", cwd=tmp_path, processes=2))
    one = load(train(tmp_path / "one", "--n_samples", "2"))
    folder = only_run(tmp_path / "two", "ddpm")  # one writer: one folder
    two = load(folder)
    assert two["step"] == one["step"] == 6
    moved = False
    for key in ("model", "ema"):
        for name, value in one[key].items():
            assert_close(two[key][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)
    fresh = load(train(tmp_path / "fresh", "--n_samples", "2", stop_at=1))
    moved = max((one["model"][k] - fresh["model"][k]).abs().max() for k in one["model"])
    assert moved > 1e-3  # the comparison is of weights that training has changed
    assert_same_tree(one["random"], two["random"])
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    log = (tmp_path / "one" / "ddpm").glob("*/log.csv")
    with open(next(log)) as file:
        for row, other in zip(rows, csv.DictReader(file), strict=True):  # the loss of the batch
            assert_close(float(row["loss"]), float(other["loss"]), rtol=1e-3, atol=1e-4)
    for name in FIGURES:
        open_picture(folder / f"{name}.png")


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
