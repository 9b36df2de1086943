"""Whole runs in processes of their own: files, kill, Ctrl-C, a closed pipe, a full disk, torchrun."""

import csv
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (ROOT, assert_same_tree, environment, only_run, open_picture, open_run, run_script,
                      start_script)
from torch.testing import assert_close

import ddpm_example as ddpm
from common import cli, data, device, plotting
from common import run as runs

SCRIPT = "ddpm_example.py"
FIGURES = ("samples", "loss", "preview")


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def wait_for_steps(process, out, steps, limit=120):
    """Wait until the run under out has a checkpoint of at least so many steps."""
    begin = time.monotonic()
    while time.monotonic() - begin < limit and process.poll() is None:
        for file in (out / "ddpm").glob("*/checkpoint.pt"):
            if load(file.parent)["step"] >= steps:
                return file.parent
        time.sleep(0.1)
    raise AssertionError(f"no checkpoint of {steps} steps: {process.communicate()[1][-1000:]}")


# A run from start to end


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of one smoke run, in a process that has no torchvision, from another directory."""
    away = tmp_path_factory.mktemp("away")
    (away / "broken").mkdir()
    (away / "broken" / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    env = environment() | {"PYTHONPATH": str(away / "broken")}
    done = subprocess.run([sys.executable, ROOT / SCRIPT, "--preset", "smoke", "--evaluate", "10"], cwd=away,
                          env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    folder = only_run(away / "outputs", "ddpm").relative_to(away)
    assert done.stdout.splitlines()[-1].endswith(
        f"in {folder}; more: python experiments/ddpm.py --sample {folder}")
    return only_run(away / "outputs", "ddpm")


@pytest.mark.slow
def test_a_smoke_run_writes_every_file_without_torchvision(smoke):
    for name in (*FIGURES, "evaluated"):
        assert len(open_picture(smoke / f"{name}.png")) == 1
    assert len(open_picture(smoke / "denoising.gif")) > 5
    with open(smoke / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    config = json.loads((smoke / "config.json").read_text())
    assert config["script"] == "ddpm" and config["preset"] == "smoke" and config["seed"] == 0
    assert config["config"]["T"] == 20 and config["run"]["amp"] == "off"
    assert not list(smoke.glob("*.tmp"))
    found = json.loads((smoke / "metrics.json").read_text())
    assert found["sampling"]["n"] == 4 and found["sampling"]["network_calls"] == 20
    assert found["samples"]["legible_of_held_out"] > 0.93 and found["samples"]["legible"] < 0.01
    assert found["total_seconds"] > found["train_seconds"]
    state = load(smoke)
    assert state["step"] == 6 and all(state[key] for key in ("model", "ema", "optimizer", "random", "config", "run"))


@pytest.mark.slow
def test_sample_draws_from_a_run_without_touching_it(smoke, tmp_path):
    before = {p.name: p.read_bytes() for p in smoke.iterdir()}
    ddpm.main(["--sample", str(smoke), "--n_samples", "9", "--variance", "beta", "--out", str(tmp_path)])
    drawn = only_run(tmp_path, "ddpm")
    assert {p.name: p.read_bytes() for p in smoke.iterdir()} == before
    open_picture(drawn / "samples.png")
    assert not (drawn / "checkpoint.pt").exists()
    found = json.loads((drawn / "metrics.json").read_text())
    assert found["sampling"]["n"] == 9 and found["config"]["variance"] == "beta"


@pytest.mark.slow
def test_config_repeats_a_run_to_the_last_bit(smoke, tmp_path):
    ddpm.main(["--config", str(smoke / "config.json"), "--out", str(tmp_path), "--evaluate", "10"])
    again = only_run(tmp_path, "ddpm")
    assert_same_tree(load(again), load(smoke))
    for name in ("config.json", "log.csv", "samples.png"):
        assert (again / name).read_bytes() == (smoke / name).read_bytes(), name


# What could not be drawn


@pytest.mark.slow
@pytest.mark.may_not_draw
def test_figures_that_fail_are_told_and_the_rest_is_there(tmp_path, monkeypatch, capsys):
    """In a page's own figure, and inside a drawing function; the last line and the status say so."""
    def broken(*_):
        _, _ = (1, 2, 3)

    monkeypatch.setattr(plotting, "loss_by_t", broken)
    monkeypatch.setattr(plotting, "_write_gif", broken)
    with pytest.raises(SystemExit) as stop:
        ddpm.main(["--preset", "smoke", "--out", str(tmp_path)])
    said = capsys.readouterr()
    assert stop.value.code == 1 and said.err.count("Traceback") == 2 and "too many values" in said.err
    last = said.out.splitlines()[-1]
    assert last.endswith("NOT DRAWN, see above: denoising.gif, loss.png"), last
    folder = only_run(tmp_path, "ddpm")
    for name in ("samples", "preview"):
        open_picture(folder / f"{name}.png")
    assert load(folder)["step"] == 6 and not (folder / "loss.png").exists()


@pytest.mark.parametrize("problem", [MemoryError("none left"), torch.OutOfMemoryError("CUDA out of memory"),
                                     cli.Mistake("x.png: cannot be written (No space left)"), KeyboardInterrupt()])
def test_a_full_disk_too_little_memory_and_ctrl_c_are_not_swallowed(problem):
    @plotting.figure("x.png")
    def draw():
        raise problem

    with pytest.raises(type(problem)):
        draw()
    assert not plotting.not_drawn


@pytest.mark.may_not_draw
def test_a_figure_that_is_drawn_after_all_is_not_missing(tmp_path, capsys):
    plotting.grid(tmp_path / "a.png", "no tensor", 1, "")
    assert list(plotting.not_drawn) == ["a.png"] and "Traceback" in capsys.readouterr().err
    plotting.grid(tmp_path / "a.png", torch.zeros(1, 1, 8, 8), 1, "")
    assert not plotting.not_drawn and (tmp_path / "a.png").exists()


# Ctrl-C and kill


LONG = ("--preset", "smoke", "--steps", "100000", "--preview_every", "2", "--n_samples", "1")


@pytest.mark.slow
def test_ctrl_c_saves_and_samples_and_a_second_one_leaves(tmp_path):
    process = start_script(SCRIPT, *LONG, "--T", "3000", "--out", tmp_path, cwd=tmp_path)
    folder = wait_for_steps(process, tmp_path, 2)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)  # by now it saves, or samples for a long time
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == cli.STOPPED and time.monotonic() - begin < 5
    assert "Traceback" not in err and "stopping" in out + err
    with open(folder / "log.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert 2 <= load(folder)["step"] <= int(last["step"]) < 100_000


@pytest.mark.parametrize("owner, name", [(ddpm, "load_images"), (runs.Run, "draw"), (plotting, "samples"),
                                         (ddpm, "figure_loss"), (runs.Run, "add_metrics")])
def test_ctrl_c_at_any_time_is_one_line(owner, name, smoke, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(SystemExit) as stop:
        ddpm.main(["--sample", str(smoke), "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert stop.value.code == cli.STOPPED and "Traceback" not in err
    assert "stopped: finished files stay in the run folder" in err
    if name == "figure_loss":
        open_picture(only_run(tmp_path / "out", "ddpm") / "samples.png")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_kill_9_and_resume_end_as_a_run_that_never_stopped(tmp_path):
    argv = ("--preset", "smoke", "--steps", "40", "--preview_every", "4", "--dropout", "0.2")
    process = start_script(SCRIPT, *argv, "--out", tmp_path / "killed", cwd=tmp_path)
    folder = wait_for_steps(process, tmp_path / "killed", 4)
    process.kill()
    process.communicate()
    assert load(folder)["step"] < 40
    cfg, run, data = open_run(ddpm, tmp_path / "killed", "--resume")
    ddpm.train(cfg, run, data)
    cfg, whole, data = open_run(ddpm, tmp_path / "whole", *argv[2:])
    ddpm.train(cfg, whole, data)
    assert_same_tree(load(folder), load(whole.folder) | {"run": load(folder)["run"]})
    assert (folder / "log.csv").read_bytes() == whole.path("log.csv").read_bytes()


# Disk and streams


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_full_disk_ends_in_one_line_and_the_old_checkpoint_stays(tmp_path):
    """A limit on the size of a file stands in: the first checkpoint fits, one with Adam's moments not."""
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))\n"
            f"sys.path.insert(0, {str(ROOT)!r}); import ddpm_example\n"
            f"ddpm_example.main(['--preset', 'smoke', '--out', {str(tmp_path)!r}])")
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    folder = only_run(tmp_path, "ddpm")
    assert f"error: {folder / 'checkpoint.pt'}: cannot be written ({os.strerror(errno.EFBIG)})" in done.stderr
    assert load(folder)["step"] == 0 and not list(folder.glob("*.tmp"))


def test_a_log_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    class Full:
        def write(self, row):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            pass

    rewrite = runs.Log._rewrite
    monkeypatch.setattr(runs.Log, "_rewrite", lambda log, *rest: (rewrite(log, *rest), setattr(log, "file", Full())))
    with pytest.raises(SystemExit) as stop:
        ddpm.main(["--preset", "smoke", "--out", str(tmp_path)])
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(said) == 1 and "log.csv: cannot be written (No space left" in said[0]
    assert load(only_run(tmp_path, "ddpm"))["step"] == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a shell's pipe")
def test_a_run_outlives_whoever_reads_it(tmp_path):
    command = (f"{sys.executable} {ROOT / SCRIPT} --preset smoke --out {tmp_path / 'out'} "
               "2>&1 | head -1; exit ${PIPESTATUS[0]}")
    env = environment() | {"PYTHONIOENCODING": "cp949"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0 and b"Error" not in done.stderr + done.stdout, done.stderr[-1000:]
    folder = only_run(tmp_path / "out", "ddpm")
    open_picture(folder / "loss.png")
    assert "total_seconds" in json.loads((folder / "metrics.json").read_text())


# Several processes


RANKS = """
import atexit
import shutil
import sys

import torch
from torch import nn

sys.path[:0] = {path!r}
from common.data import Data
from common.run import open_run
from toy import PRESETS, SAMPLING, Config

atexit.register(lambda: print(f"in the group: {{torch.distributed.is_initialized()}}"))  # the last one
cfg, run = open_run("toy", Config, PRESETS, SAMPLING)
assert torch.distributed.is_initialized()
x = torch.linspace(-1, 1, 500).view(-1, 1, 1, 1)
model = run.place(nn.Sequential(nn.Flatten(), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
if run.launch.rank == 1:
    nn.init.ones_(model[1].weight)  # other weights on purpose
optimizer = torch.optim.SGD(model.parameters(), 0.1)
rows = []
for step in run.steps(5, model=model, optimizer=optimizer):
    before = [p.detach().clone() for p in model.parameters()]
    x0, _ = run.batch(x)
    loss = (model(x0) - x0.flatten(1) ** 2).square().mean()
    optimizer.zero_grad()
    loss.backward()
    local = [p.grad.clone() for p in model.parameters()]
    run.average_gradients(model)
    optimizer.step()
    run.log(loss=loss)
    rows.append(dict(x=x0, local=local, loss=loss.item(), logged=run._row["loss"], before=before,
                     shared=[p.grad.clone() for p in model.parameters()]))
other = nn.Linear(1, 1).requires_grad_(False)
unsaved = [run.batch(x)[0] for _ in run.steps(1, "other", save=False, other=other)]
torch.save((rows, unsaved, other.weight), f"rank{{run.launch.rank}}.pt")
if run.main:
    shutil.copy(run.path("checkpoint.pt"), "after_5.pt")
for _ in run.steps(9, "late", late=other):
    break  # each process leaves, and only the first one saves
if run.main:
    print(f"went on: {{run.folder}}", flush=True)
else:
    try:
        run.path("figure.png")
    except RuntimeError as error:
        assert "if run.main" in str(error)
torch.distributed.barrier()
if run.launch.rank == 1:
    raise ValueError("an error of the second process")
"""


@pytest.mark.slow
def test_two_processes_share_the_batch_and_average_the_gradients(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(path=[str(ROOT), str(ROOT / "tests" / "plumbing")]))
    done = run_script(script, "--device", "cpu", cwd=tmp_path, processes=2)
    assert done.returncode == 1 and "an error of the second process" in done.stderr
    assert done.stdout.count("in the group: False") == 2  # left before Python ends
    (one, left, a), (other, right, b) = (
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert torch.equal(a, b) and not torch.equal(left[0], right[0])  # a loop that saves nothing, too
    assert len(one) == len(other) == 5
    for a, b in zip(one, other, strict=True):
        assert a["x"].shape == b["x"].shape == (4, 1, 1, 1)  # half of the batch each
        assert not torch.equal(a["x"], b["x"])
        assert_same_tree(a["before"], b["before"])  # the same weights, from the first step on
        assert_same_tree(a["shared"], b["shared"])
        for mean, left, right in zip(a["shared"], a["local"], b["local"], strict=True):
            assert not torch.equal(left, right)
            assert_close(mean, (left + right) / 2)
        assert_close(a["logged"], (a["loss"] + b["loss"]) / 2)  # the log has the whole batch's
    assert not torch.equal(one[0]["x"], one[1]["x"])  # a new batch each step
    folder = only_run(tmp_path / "outputs", "toy")  # one writer: one folder
    assert load(folder)["loop"] == "late" and "went on: " in done.stdout
    state = torch.load(tmp_path / "after_5.pt")
    assert state["step"] == 5 and len(state["random"]) == 2  # the state of both generators
    assert not torch.equal(state["random"][0]["cpu"], state["random"][1]["cpu"])
    with open(folder / "log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5"]


def test_the_first_process_downloads_before_the_others(monkeypatch):
    """The others wait at a barrier before the download, the first one releases them after it."""
    x, seen = torch.zeros(4, 1, 8, 8), []
    monkeypatch.setattr(device.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(device.dist, "barrier", lambda: seen.append("barrier"))
    monkeypatch.setattr(data, "_downloaded", lambda name: seen.append(name) or data.Data(name, x, x))
    for rank, expected in ((0, ["mnist", "barrier"]), (1, ["barrier", "mnist"])):
        monkeypatch.setattr(device.dist, "get_rank", lambda rank=rank: rank)
        data.load_images("mnist")
        assert seen == expected
        seen.clear()


def test_average_keeps_shapes_and_order(monkeypatch):
    """Two processes, the other of which has everywhere 10 more."""
    def all_reduce(flat):
        flat += flat + 10

    monkeypatch.setattr(device.dist, "all_reduce", all_reduce)
    a, b = torch.arange(6.0).view(2, 3), torch.tensor(7.0)
    device.Launch(torch.device("cpu"), 0, 2).average([a, b])
    assert_close(a, torch.arange(6.0).view(2, 3) + 5)
    assert_close(b, torch.tensor(12.0))


def test_seeded_draws_leave_the_others_alone():
    cpu = torch.device("cpu")
    state = device.random_state(cpu)
    expected = torch.randn(3)
    device.set_random_state(state, cpu)
    with device.seeded(5, cpu):
        inside = torch.randn(3)
    assert_close(torch.randn(3), expected, rtol=0, atol=0)
    with device.seeded(5, cpu):
        assert_close(torch.randn(3), inside, rtol=0, atol=0)
