"""Whole runs in processes of their own, and what becomes of a run that is disturbed.

Only six tests here, and none elsewhere, start a process: a run, torchrun, Ctrl-C, a closed pipe, a full disk, a kill.
"""

import contextlib
import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, assert_same_tree, beside, only_run, open_picture, open_run
from torch.testing import assert_close

import ddpm_example as ddpm
from common import cli, plotting
from common import run as runs

SCRIPT = ROOT / "ddpm_example.py"
SMOKE = ("--preset", "smoke", "--dataset", "digits8")
not_on_windows = pytest.mark.skipif(sys.platform == "win32", reason="a shell, limits and signals of Unix")
LIMIT = 300  # seconds that a process may take, on a machine at work on other things, too


@contextlib.contextmanager
def process(*argv, cwd, pipe=None, **environ):
    """A Python process that writes into files of cwd, and that Ctrl-C reaches even where it is ignored (nohup)."""
    with open(cwd / "stdout", "w") as out, open(cwd / "stderr", "w") as err:
        begun = subprocess.Popen(
            [sys.executable, *map(str, argv)], cwd=cwd, env=ENVIRONMENT | environ, stdout=pipe or out,
            stderr=pipe or err,
            preexec_fn=None if sys.platform == "win32" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    begun.folder = cwd
    try:
        yield begun
    finally:
        begun.kill()
        begun.wait()


def ended(process):
    """Wait for the end of a process: (returncode, stdout, stderr, its folder)."""
    process.wait(LIMIT)
    return SimpleNamespace(returncode=process.returncode, folder=process.folder,
                           stdout=(process.folder / "stdout").read_text(), stderr=(process.folder / "stderr").read_text())


def wait_for(found, process):
    """Wait until found() is true, while the process runs; its value."""
    begin = time.monotonic()
    while time.monotonic() - begin < LIMIT and process.poll() is None:
        if value := found():
            return value
        time.sleep(0.2)
    raise AssertionError(f"it did not come: {process.poll()}")


def folder_after(steps, out):
    """The run folder under out, once its log has more steps than that."""
    return next((file.parent for file in (out / "ddpm").glob("*/log.csv") if file.read_text().count("\n") > steps + 1),
                None)


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def source(finished):
    """The folder of a run that was made before a test replaces anything."""
    return finished(ddpm, *SMOKE[2:])[0]


# The six processes: what happens to each, in the thread of conftest's `beside`, and the test of its end


def as_typed(folder):
    """In another folder, where neither torchvision nor scikit-learn can be imported."""
    for name in ("torchvision", "sklearn"):
        (folder / f"{name}.py").write_text("raise RuntimeError('operator does not exist')")
    with process(SCRIPT, "--preset", "smoke", cwd=folder, PYTHONPATH=str(folder)) as begun:
        return ended(begun)


@pytest.mark.slow
@beside(as_typed)
def test_a_run_as_it_is_typed_writes_every_file_without_torchvision(done):
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    folder = only_run(done.folder / "outputs", "ddpm")
    name = folder.relative_to(done.folder)
    assert done.stdout.splitlines()[-1].endswith(f"in {name}; more: python experiments/ddpm.py --sample {name}")
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "log.csv", "metrics.json", "checkpoint.pt", "samples.png", "loss.png", "preview.png",
        "denoising.gif"}
    for picture in folder.glob("*.png"):
        assert len(open_picture(picture)) == 1
    assert len(open_picture(folder / "denoising.gif")) > 5
    config, found = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
    assert (config["script"], config["preset"], config["seed"], config["config"]["T"]) == ("ddpm", "smoke", 0, 20)
    assert found["sampling"]["n"] == 4 and found["sampling"]["network_calls"] == 20
    assert found["samples"]["legible_of_held_out"] > 0.93 and found["samples"]["legible"] < 0.01
    assert found["total_seconds"] > found["train_seconds"]


def ctrl_c(folder):
    with process(SCRIPT, *SMOKE, "--steps", "100000", "--preview_every", "2", "--T", "9999", "--n_samples", "1",
                 "--out", folder, cwd=folder) as begun:
        run = wait_for(lambda: folder_after(2, folder), begun)
        begun.send_signal(signal.SIGINT)
        wait_for((run / "metrics.json").exists, begun)  # written between training and sampling
        begun.send_signal(signal.SIGINT)
        return ended(begun)


@pytest.mark.slow
@not_on_windows
@beside(ctrl_c)
def test_ctrl_c_saves_and_samples_and_a_second_one_leaves(done):
    assert done.returncode == cli.STOPPED and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "stopping: " in done.stdout and "finished files stay" in done.stderr
    folder = only_run(done.folder, "ddpm")
    with open(folder / "log.csv") as file:
        assert load(folder)["step"] == int(list(csv.DictReader(file))[-1]["step"]) < 100_000


LONGER = (*SMOKE, "--steps", "30", "--preview_every", "5", "--dropout", "0.2")


def kill_9(folder):
    with process(SCRIPT, *LONGER, "--out", folder, cwd=folder) as begun:
        wait_for(lambda: folder_after(5, folder), begun)
        begun.kill()
        return ended(begun)


@pytest.mark.slow
@not_on_windows
@beside(kill_9)
def test_kill_9_and_resume_end_as_a_run_that_never_stopped(done, tmp_path):
    folder = only_run(done.folder, "ddpm")
    assert 5 <= load(folder)["step"] < 30
    for how in (("--out", tmp_path, *LONGER[2:]), ("--out", done.folder, "--resume")):
        cfg, run, made = open_run(ddpm, tmp_path, *how)
        ddpm.train(cfg, run, made)
    whole = only_run(tmp_path, "ddpm")
    assert_same_tree(load(folder), load(whole) | {"run": load(folder)["run"]})
    assert (folder / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()


def full_disk(folder):
    """A limit on the size of a file stands in: the first checkpoint fits, one with Adam's moments not."""
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))\n"
            f"sys.path.insert(0, {str(ROOT)!r}); import ddpm_example\n"
            f"ddpm_example.main({[*SMOKE, '--out', str(folder)]!r})")
    with process("-c", code, cwd=folder) as begun:
        return ended(begun)


@pytest.mark.slow
@not_on_windows
@beside(full_disk)
def test_a_full_disk_ends_in_one_line_and_the_old_checkpoint_stays(done):
    folder = only_run(done.folder, "ddpm")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert f"error: {folder / 'checkpoint.pt'}: cannot be written ({os.strerror(errno.EFBIG)})" in done.stderr
    assert load(folder)["step"] == 0 and not list(folder.glob("*.tmp"))


def closed_pipe(folder):
    """As `| head -1`, in a terminal of letters that not every line fits."""
    read, write = os.pipe()
    with process(SCRIPT, *SMOKE, "--T", "5", "--out", folder, cwd=folder, pipe=write, PYTHONIOENCODING="ascii") as begun:
        os.close(write)
        said = os.read(read, 1)
        os.close(read)
        done = ended(begun)
    assert said
    return done


@pytest.mark.slow
@not_on_windows
@beside(closed_pipe)
def test_a_run_outlives_whoever_reads_it(done):
    """To the end of a Python whose output stays closed."""
    folder = only_run(done.folder, "ddpm")
    assert done.returncode == 0 and "total_seconds" in (folder / "metrics.json").read_text()
    open_picture(folder / "loss.png")


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


def two_processes(folder):
    (folder / "ranks.py").write_text(RANKS.format(path=[str(ROOT), str(ROOT / "tests" / "plumbing")]))
    with process("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "ranks.py", "--device", "cpu",
                 cwd=folder) as begun:
        return ended(begun)


@pytest.mark.slow
@beside(two_processes)
def test_two_processes_share_the_batch_and_average_the_gradients(done):
    here = done.folder
    assert done.returncode == 1 and "an error of the second process" in done.stderr
    assert done.stdout.count("in the group: False") == 2  # left before Python ends
    (one, left, a), (other, right, b) = (
        torch.load(here / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
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
    folder = only_run(here / "outputs", "toy")  # one writer: one folder
    assert load(folder)["loop"] == "late" and "went on: " in done.stdout
    state = torch.load(here / "after_5.pt")
    assert state["step"] == 5 and len(state["random"]) == 2  # the state of both generators
    assert not torch.equal(state["random"][0]["cpu"], state["random"][1]["cpu"])
    with open(folder / "log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5"]


# What disturbs a run, inside this process


@pytest.mark.slow
def test_sample_draws_from_a_run_without_touching_it(source, tmp_path, drawings):
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    ddpm.main(["--sample", str(source), "--n_samples", "9", "--variance", "beta", "--out", str(tmp_path)])
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    drawn = only_run(tmp_path, "ddpm")
    assert not (drawn / "checkpoint.pt").exists()
    found = json.loads((drawn / "metrics.json").read_text())
    assert found["sampling"]["n"] == 9 and found["config"]["variance"] == "beta"


@pytest.mark.slow
@pytest.mark.may_not_draw
def test_figures_that_fail_are_told_and_the_rest_is_there(source, tmp_path, monkeypatch, capsys):
    """In a page's own figure, and inside a drawing function; the last line and the status say so."""
    def broken(*_):
        _, _ = (1, 2, 3)

    monkeypatch.setattr(plotting, "loss_by_t", broken)
    monkeypatch.setattr(plotting, "_write_gif", broken)
    with pytest.raises(SystemExit) as stop:
        ddpm.main(["--sample", str(source), "--out", str(tmp_path)])
    said = capsys.readouterr()
    assert stop.value.code == 1 and said.err.count("Traceback") == 2 and "too many values" in said.err
    last = said.out.splitlines()[-1]
    assert last.endswith("NOT DRAWN, see above: denoising.gif, loss.png"), last
    folder = only_run(tmp_path, "ddpm")
    open_picture(folder / "samples.png")
    assert not (folder / "loss.png").exists()


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


@pytest.mark.parametrize("owner, name", [(ddpm, "load_images"), (runs.Run, "draw"), (ddpm, "figure_loss")])
def test_ctrl_c_at_any_time_is_one_line(owner, name, source, tmp_path, monkeypatch, capsys, drawings):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(SystemExit) as stop:
        ddpm.main(["--sample", str(source), "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert stop.value.code == cli.STOPPED and "Traceback" not in err
    assert "stopped: finished files stay in the run folder" in err
