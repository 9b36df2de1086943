"""Faults of machine and files, interrupts, streams: one line, and nothing good is lost."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import ddpm_example as ddpm
from common import cli, plotting, runs

import pytest
import torch
from conftest import ROOT, environment, only_run, open_picture, open_run, start_script


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of ddpm with a checkpoint of two steps."""
    cfg, run, data = open_run(ddpm, tmp_path_factory.mktemp("trained"), "--steps", 2)
    ddpm.train(cfg, run, data)
    return run.folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it to damage."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def smoke(out, *argv):
    ddpm.main(["--preset", "smoke", "--device", "cpu", "--out", str(out), *map(str, argv)])


def ends(capsys, status, call, *args):
    """Run what must end with this status; its one line, without any progress bar in it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*args)
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if "error: " in line or "stopped" in line]
    assert stop.value.code == status and "Traceback" not in err and len(said) == 1, err
    assert said[0].rpartition("\r")[2].startswith(("error: ", "stopped")), said
    return said[0].rpartition("\r")[2]


def edit(folder, **values):
    """Change entries of a checkpoint; None takes one out."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True) | values
    torch.save({k: v for k, v in state.items() if v is not None}, folder / "checkpoint.pt")


# Damaged files


@pytest.mark.parametrize("entry", ["script", "seed", "step", "config", "loop", "optimizer",
                                   "random", "model", "ema", "format", "preset"])
@pytest.mark.parametrize("value", [None, "text", [1, 2], {"a": "b"}, 3.5])
def test_a_damaged_entry_of_a_checkpoint_is_one_line_with_its_name(entry, value, folder, capsys):
    edit(folder, **{entry: value})
    if entry == "preset" and value in (None, "text"):
        return  # nothing to fall back on but the first
    if entry == "loop" and value == "text":
        return  # the name of a loop that this script does not have: nothing to train
    said = ends(capsys, 2, smoke, folder.parent / "out", "--resume", folder, "--steps", 3)
    assert str(folder) in said


@pytest.mark.parametrize("seed", [2**70, -1])
def test_a_seed_out_of_range_in_a_file(seed, folder, capsys, tmp_path):
    edit(folder, seed=seed)
    assert "seed" in ends(capsys, 2, smoke, tmp_path, "--resume", folder)
    stored = json.loads((folder / "config.json").read_text()) | {"seed": seed}
    (folder / "config.json").write_text(json.dumps(stored))
    assert "config.json" in ends(capsys, 2, smoke, tmp_path, "--config", folder / "config.json")


@pytest.mark.parametrize("values", [{"mults": [1, 1.5]}, {"mults": 2}, {"T": 10**400}, {"lr": 10**400},
                                    {"mults": [[1]]}, {"flip": "no"}])
def test_values_of_another_type_in_a_config_file(values, folder, capsys, tmp_path):
    stored = json.loads((folder / "config.json").read_text())
    stored["config"] |= values
    (folder / "config.json").write_text(json.dumps(stored))
    said = ends(capsys, 2, smoke, tmp_path, "--config", folder / "config.json")
    assert next(iter(values)) in said and len(said) < 300


@pytest.mark.parametrize("content", [b"\x00\xff\xfe" * 30, b"some words\nand more\n", b"a,b\n1,x\n"])
def test_a_log_that_is_none_is_told_before_the_training(content, folder, capsys, tmp_path):
    (folder / "log.csv").write_bytes(content)
    before = (folder / "checkpoint.pt").read_bytes()
    said = ends(capsys, 2, smoke, tmp_path, "--resume", folder, "--steps", 3)
    assert str(folder / "log.csv") in said
    assert (folder / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("content", ["", '{"steps": 2,', "[1, 2]", "null"])
def test_metrics_cut_short_are_told_before_the_training(content, folder, capsys, tmp_path):
    (folder / "metrics.json").write_text(content)
    said = ends(capsys, 2, smoke, tmp_path, "--resume", folder, "--steps", 3)
    assert str(folder / "metrics.json") in said


@pytest.mark.slow
@pytest.mark.parametrize("left", ["", "st", "step,loss,grad_norm,lr\n", "step,loss,grad_norm,lr\n1,0.5,1.0,0.1\n2,0."])
def test_a_run_killed_before_its_log_was_whole_resumes(left, trained, folder, tmp_path):
    """As kill -9 leaves it: a checkpoint of step 0, of the log nothing, a torn head or a torn row."""
    whole = open_run(ddpm, tmp_path / "whole", "--steps", 4)
    ddpm.train(*whole)
    cfg, run, data = open_run(ddpm, tmp_path / "cut", "--steps", 4)

    def die(*_, **__):
        raise MemoryError

    run.log = die
    with pytest.raises(MemoryError):
        ddpm.train(cfg, run, data)
    assert torch.load(run.path("checkpoint.pt"), weights_only=True)["step"] == 0
    run.path("log.csv").write_text(left)
    cfg, again, data = open_run(ddpm, tmp_path / "cut", "--resume")
    ddpm.train(cfg, again, data)
    assert again.path("log.csv").read_bytes() == whole[1].path("log.csv").read_bytes()
    assert again.path("checkpoint.pt").read_bytes() == whole[1].path("checkpoint.pt").read_bytes()


def test_the_log_is_on_disk_before_the_checkpoint(tmp_path, monkeypatch):
    cfg, run, data = open_run(ddpm, tmp_path, "--steps", 6)
    save, seen = run._save, []
    monkeypatch.setattr(run, "_save", lambda step, *rest: (
        seen.append((step, run.path("log.csv").read_text().count("\n") if step else 0)), save(step, *rest)))
    ddpm.train(cfg, run, data)
    assert seen == [(0, 0), (3, 4), (6, 7)]  # the head and a row a step


def test_weights_that_are_not_finite_are_not_sampled_from(folder, capsys, tmp_path):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["ema"]["conv_in.weight"][0] = float("nan")
    torch.save(state, folder / "checkpoint.pt")
    assert "weights are not finite" in ends(capsys, 2, smoke, tmp_path, "--sample", folder)


def test_samples_that_are_not_finite_are_one_line(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(ddpm, "reverse_process", lambda model, xT, *_: [(1, xT), (0, xT * float("nan"))])
    said = ends(capsys, 2, smoke, tmp_path, "--sample", folder)
    assert "samples are not finite" in said and not (tmp_path / "samples.png").exists()


def test_a_message_of_several_lines_is_told_in_one(capsys):
    with pytest.raises(SystemExit):
        cli.fail("one\ntwo")
    assert capsys.readouterr().err == "error: one two\n"


def test_a_foreign_pickle_warns_of_nothing_else(tmp_path, capsys, recwarn):
    (tmp_path / "foreign.pt").write_bytes(pickle.dumps({"a": "text"}))
    ends(capsys, 2, smoke, tmp_path, "--sample", tmp_path / "foreign.pt")
    assert not [w for w in recwarn if w.category is not ResourceWarning]


# A run goes on


def test_resume_with_more_steps_trains_on(folder, tmp_path, capsys):
    cfg, run, data = open_run(ddpm, tmp_path, "--resume", folder, "--steps", 5)
    assert "trains to step 5 in place of 2" in capsys.readouterr().out
    ddpm.train(cfg, run, data)
    assert run.read_log()["step"] == [1, 2, 3, 4, 5]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == state["config"]["steps"] == 5
    assert json.loads((folder / "config.json").read_text())["config"]["steps"] == 5
    rates = run.read_log()["lr"]  # the cosine of five steps from here on
    for step, rate in enumerate(rates[2:], 2):
        assert rate == pytest.approx(cfg.lr * run._rate(step, 5))
    assert rates[1] == pytest.approx(cfg.lr * run._rate(1, 2))


def test_what_resume_refuses(folder, capsys, tmp_path):
    shutil.copy(folder / "checkpoint.pt", folder / "model.pt")
    for argv, words in [
            (("--resume", folder, "--seed", 5), "--seed 5"),
            (("--resume", folder, "--config", folder / "config.json"), "--config"),
            (("--resume", folder, "--steps", 1), "--steps 1: must be >= 2"),
            (("--resume", folder / "model.pt"), f"--resume {folder / 'model.pt'}"),
            (("--resume", tmp_path / "none.pt"), f"--resume {tmp_path / 'none.pt'}"),
            (("--sample", folder / "log.csv"), f"--sample {folder / 'log.csv'}")]:
        assert words in ends(capsys, 2, smoke, tmp_path, *argv)
    open_run(ddpm, tmp_path, "--resume", folder, "--seed", 0)  # its own seed may be said


HOLD = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")
def test_a_run_at_work_elsewhere_is_not_resumed(folder, capsys, tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        said = ends(capsys, 2, smoke, tmp_path, "--resume", folder)
        assert "another process" in said and str(folder) in said
    finally:
        other.kill()
        other.wait()
    cfg, run, data = open_run(ddpm, tmp_path, "--resume", folder)  # the lock went with the process
    code = ("import sys; sys.argv[1:] = []\n"
            f"from common import checkpoints; from pathlib import Path; checkpoints.hold(Path({str(folder)!r}))")
    def resumed():
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    held = resumed()
    assert held.returncode == 2 and "another process" in held.stderr  # this process has it now
    open_run(ddpm, tmp_path, "--resume", folder)  # but does not shut itself out
    ddpm.train(cfg, run, data)
    assert resumed().returncode == 0  # the training is over


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
    assert f"error: {folder / 'checkpoint.pt'}: {os.strerror(errno.EFBIG)}" in done.stderr
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 0
    assert not list(folder.glob("*.tmp"))


def test_a_log_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "log.csv")

    monkeypatch.setattr(runs.Run, "log", full)
    said = ends(capsys, 2, smoke, tmp_path)
    assert "log.csv" in said and "No space left" in said
    assert torch.load(only_run(tmp_path, "ddpm") / "checkpoint.pt", weights_only=True)["step"] == 0


def test_an_error_that_is_nobody_s_fault_but_ours_keeps_its_traceback(tmp_path, monkeypatch):
    for problem in (FileNotFoundError(errno.ENOENT, "gone", "x"), RuntimeError("illegal memory access")):
        monkeypatch.setattr(ddpm, "load_images", lambda *_, problem=problem: (_ for _ in ()).throw(problem))
        with pytest.raises(type(problem)):
            smoke(tmp_path)


@pytest.mark.parametrize("problem", [
    MemoryError("Unable to allocate 7 TiB"), torch.OutOfMemoryError("CUDA out of memory. Tried ..."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes.\nmore")])
def test_too_little_memory_is_one_line_with_the_flags_that_help(problem, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ddpm, "make_unet", lambda *_: (_ for _ in ()).throw(problem))
    said = ends(capsys, 2, smoke, tmp_path)
    assert "--batch_size" in said and "--channels" in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a shell's pipe")
@pytest.mark.parametrize("how", ["2>&-", "2>&1 | head -1"])
def test_a_run_outlives_whoever_reads_it(how, tmp_path):
    command = (f"{sys.executable} {ROOT / 'ddpm_example.py'} --preset smoke --evaluate 10 "
               f"--out {tmp_path / 'out'} {how}; exit ${{PIPESTATUS[0]}}")
    env = environment() | {"PYTHONIOENCODING": "cp949"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0 and b"Error" not in done.stderr + done.stdout, done.stderr[-1000:]
    folder = only_run(tmp_path / "out", "ddpm")
    for name in ("samples", "loss", "denoising", "bound", "evaluated"):
        open_picture(folder / f"{name}.png")
    assert "total_seconds" in json.loads((folder / "metrics.json").read_text())
    torch.load(folder / "checkpoint.pt", weights_only=True)


def test_a_stream_interrupted_in_a_write_stops_nothing():
    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call inside a writer")

    assert cli._Stream(Busy()).write("word") == 4


# Ctrl-C


@pytest.mark.parametrize("owner, name", [(ddpm, "load_images"), (runs.Run, "draw"), (plotting, "samples"),
                                         (ddpm, "figure_loss"), (runs.Run, "add_metrics")])
def test_ctrl_c_at_any_time_is_one_line(owner, name, folder, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupt)
    said = ends(capsys, cli.STOPPED, smoke, tmp_path / "out", "--sample", folder)
    assert said.startswith("stopped")
    if name == "figure_loss":
        open_picture(only_run(tmp_path / "out", "ddpm") / "samples.png")


@pytest.mark.slow
def test_ctrl_c_while_sampling_ends_a_process_without_a_traceback(tmp_path):
    process = start_script("ddpm_example.py", "--sample", ROOT / "pretrained" / "ddpm.pt",
                           "--n_samples", 500, "--out", tmp_path, cwd=tmp_path)
    read = ""
    while "sample 500:   0%" not in read and process.poll() is None:
        read += process.stderr.read(1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == cli.STOPPED and "Traceback" not in err, err[-1000:]
    assert err.splitlines()[-1].startswith("stopped")


# Divergence


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ddpm", "score_based_diffusion"])
def test_a_rate_of_1e38_for_one_step_is_one_line(script, tmp_path, capsys):
    import importlib

    main = importlib.import_module(f"{script}_example").main
    argv = ["--preset", "smoke", "--steps", "1", "--warmup", "0", "--lr", "1e38", "--out", str(tmp_path)]
    said = ends(capsys, 2, main, argv)
    assert "finite" in said and "lr" in said or "learning rate" in said


def test_a_gradient_that_is_not_finite_under_a_finite_loss(tmp_path, capsys, monkeypatch):
    def loss(model, x0, schedule, t):
        x = next(model.parameters())
        return (x * 0).sum() + (x * 0).sqrt().sum()  # the slope of the root at 0

    monkeypatch.setattr(ddpm, "ddpm_loss", loss)
    said = ends(capsys, 2, smoke, tmp_path)
    assert "gradient" in said and "step 1" in said and "step 0" in said
