"""Checkpoints: what --sample and --resume take from where, resume to the last bit, damaged files."""

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import pickle
import shutil
import sys
import zipfile

import pytest
import torch
from conftest import ROOT, assert_same_tree, open_run
from toy import Config, fit, network, open_toy, stored
from torch import nn

import ddpm_example as ddpm
from common import run as runs
from common.cli import Mistake
from common.run import FORMAT, new_run


@pytest.fixture(scope="module")
def drawn_from(tmp_path_factory):
    """The folder of a finished run of the smoke preset, which has other values of some fields."""
    out = tmp_path_factory.mktemp("drawn_from")
    _, run = open_toy(out, "--preset", "smoke", "--n_samples", 77, "--T", 5, "--seed", 3, "--steps", 2)
    fit(run, 2)
    return run.folder


@pytest.fixture
def folder(drawn_from, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(drawn_from, tmp_path / "run")


# Which fields come from where


@pytest.mark.parametrize("argv, n", [
    (("--sample",), 2), (("--preset", "laptop", "--sample"), 4), (("--n_samples", 9, "--sample"), 9),
    (("--T", 5, "--sample"), 2), (("--n_samples", 9, "--preset", "laptop", "--sample"), 9), (("--resume",), 77)])
def test_sampling_fields_come_from_the_script_and_all_others_from_the_checkpoint(argv, n, drawn_from, tmp_path):
    """A run that goes on keeps all."""
    cfg, run = open_toy(tmp_path, *argv, drawn_from)
    assert (cfg.n_samples, cfg.T, cfg.widths) == (n, 5, (3,))
    assert run.sampling == ("--sample" in argv) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["--sample", "--resume"])
@pytest.mark.parametrize("argv, words", [
    (("--T", 6), "T 6: .* was made with 5"), (("--widths", 3, 4), "widths 3 4: .* was made with 3"),
    (("--n_samples", 0), "n_samples 0: must be >= 1")])
def test_a_flag_that_contradicts_the_checkpoint(argv, words, how, drawn_from, tmp_path):
    with pytest.raises(Mistake, match=words):
        open_toy(tmp_path, how, drawn_from, *argv)


def test_another_script_s_checkpoint_gives_what_the_two_share(drawn_from, tmp_path):
    fields = [("T", int, 10), ("extra", float, 0.25), ("batch_size", int, 8)]
    Fewer = dataclasses.make_dataclass("Fewer", fields, frozen=True)
    argv = ["--out", str(tmp_path), "--sample", str(drawn_from)]
    cfg, _ = runs.open_run("other", Fewer, {"smoke": Fewer(extra=0.75)}, (), argv, reads=("toy",))
    assert cfg.T == 5 and cfg.extra == 0.75
    with pytest.raises(Mistake, match="made by the script 'toy', must be of other"):
        runs.open_run("other", Fewer, {"smoke": Fewer()}, (), argv)


def test_a_run_without_a_command_line(drawn_from, tmp_path):
    run = new_run("toy", Config(T=7), out=tmp_path, compile=False, sample=None, evaluate=20, amp="bf16")
    assert run.cfg.T == 7 and not run.sampling and (run.opts.evaluate, run.opts.amp) == (20, "bf16")
    run = new_run("toy", Config(n_samples=9), sample=drawn_from, compile=True)
    assert run.sampling and run.cfg.T == 5 and run.cfg.n_samples == 9 and run.opts.compile is True
    assert new_run("ddpm", ddpm.Config(), sample=True, out=tmp_path).cfg.T == 1000


def test_the_newest_run_is_taken_else_the_shipped_model_and_the_first_line_says_so(folder, tmp_path, capsys):
    def first_line():
        capsys.readouterr()
        open_toy(tmp_path, "--sample")
        return capsys.readouterr().out.splitlines()[0]

    with pytest.raises(Mistake, match="--sample: no run of toy in .*, and no shipped model"):
        open_toy(tmp_path, "--sample")
    open_run(ddpm, tmp_path, "--sample")
    assert capsys.readouterr().out.startswith(f"loaded {ROOT / 'pretrained' / 'ddpm.pt'} (step ")
    (tmp_path / "toy").mkdir()
    for i, name in enumerate(("b", "c", "a")):  # the last one is the newest
        path = tmp_path / "toy" / name / "checkpoint.pt"
        shutil.copytree(folder, path.parent)
        torch.save(torch.load(path) | ({"preset": "laptop", "step": 1} if name == "c" else {}), path)
        os.utime(path, (10**9 + i, 10**9 + i))
    assert f"{tmp_path / 'toy' / 'a'} (step 2 of 2, a smoke run" in first_line()
    shutil.rmtree(tmp_path / "toy" / "a")
    assert f"{tmp_path / 'toy' / 'c'} (unfinished: step 1 of 2)" in first_line()


def test_trained_is_the_average_of_the_checkpoint_in_eval_mode(drawn_from, tmp_path):
    _, run = open_toy(tmp_path, "--sample", drawn_from)
    state = torch.load(drawn_from / "checkpoint.pt")
    model = run.trained(network())
    assert_same_tree(dict(model.state_dict()), dict(state["ema"]))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    other = run.trained(network(), "model")
    assert_same_tree(dict(other.state_dict()), dict(state["model"]))
    assert not torch.equal(other[2].weight, model[2].weight)
    with pytest.raises(Mistake, match="holds no vae"):
        run.trained(network(), "vae")
    with pytest.raises(Mistake, match="Missing key.*3.weight"):  # an edited network
        run.trained(network().append(nn.Linear(1, 1)))
    state["ema"]["2.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(Mistake, match="weights are not finite"):
        open_toy(tmp_path, "--sample", tmp_path / "nan.pt")[1].trained(network())


# Resume to the last bit


def same_run(a, b):
    assert_same_tree(torch.load(a / "checkpoint.pt"), torch.load(b / "checkpoint.pt"))
    for name in ("log.csv", "config.json", *(path.name for path in b.glob("*_log.csv"))):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("stop_at, dies", [(1, False), (5, False), (1, True), (5, True)])
def test_a_stopped_or_killed_run_resumes_to_the_last_bit(stop_at, dies, tmp_path):
    """Also where a column of the log begins in a step that is made again."""
    steps = []

    def train(out, *argv, stop_at=None):
        _, run = open_toy(tmp_path / out, *argv)

        def end_of_step(step, _):
            steps.append(step)
            if step >= 4:
                run.log(late=step)
            run.stopped = step + 1 == stop_at
            if dies and run.stopped:
                raise MemoryError  # nothing is saved after it, as when killed

        fit(run, watch=end_of_step)
        return run.folder

    new = ("--preview_every", 2, "--seed", 7)
    whole = train("whole", *new)
    with pytest.raises(MemoryError) if dies else contextlib.nullcontext():
        train("parts", *new, stop_at=stop_at)
    torch.randn(3)  # what another program drew must not matter
    steps.clear()
    same_run(train("parts", "--resume"), whole)
    assert steps == list(range(stop_at // 2 * 2 if dies else stop_at, 6))


@pytest.mark.slow
@pytest.mark.parametrize("page, kills", [
    ("ddpm", (3,)), ("latent_diffusion", (3, 6)), ("conditional_diffusion", (3,)), ("score_based_diffusion", (3,)),
    ("flow_matching", (3,)), ("flow_matching, reflow", (3,))])
def test_each_page_resumes_to_the_last_bit(page, kills, tmp_path, drawings):
    """From what is on disk at step 3, as after kill -9; where a VAE is trained before, also at its step 3.

    Its network, average and optimiser are in the checkpoint. A reflow draws the pairs of its first part again.
    """
    page, _, reflow = page.partition(", ")
    module = importlib.import_module(f"{page}_example")

    def train(out, *argv, kills=()):
        cfg, run, data = open_run(module, tmp_path / out, *argv)
        steps, log = itertools.count(1), run.log

        def copy_and_log(**values):
            if (step := next(steps)) in kills:
                shutil.copytree(run.folder, tmp_path / f"killed at {step}")
            log(**values)

        run.log = copy_and_log
        trained = module.train(cfg, run, data)
        networks = trained if isinstance(trained, tuple) else (trained,)
        return run.folder, [dict(each.state_dict()) for each in networks]

    def numbers(folder):
        found = json.loads((folder / "metrics.json").read_text())
        return {name: found[name] for name in found if not name.endswith(("seconds", "second"))}

    argv = ["--image_size", 8, "--mults", 1, "--channels", 4, "--groups", 2, "--flip", "--dropout", 0.2,
            "--steps", 3, "--preview_every", 2]
    if page == "latent_diffusion":
        argv += ["--vae_steps", 3, "--vae_channels", 4]
    if reflow:
        argv += ["--pairs", 4, "--reflow", train("teacher", *argv, "--steps", 1)[0]]
    whole, networks = train("whole", *argv, kills=kills)
    for step in kills:
        again, resumed = train("unused", "--resume", tmp_path / f"killed at {step}")
        same_run(again, whole)
        assert_same_tree(resumed, networks)  # the average, too
        assert numbers(again) == numbers(whole) and numbers(whole)["steps"] == 3


def test_a_finished_run_does_nothing_more_unless_it_gets_more_steps(folder, tmp_path, capsys):
    before = torch.load(folder / "checkpoint.pt"), (folder / "log.csv").read_bytes()
    _, again = open_toy(tmp_path, "--resume", folder)
    model, _ = fit(again, 2, watch=lambda *_: pytest.fail("a step was made"))
    assert_same_tree((stored(again), (folder / "log.csv").read_bytes()), before)
    assert_same_tree(dict(model.state_dict()), dict(before[0]["model"]))
    cfg, again = open_toy(tmp_path, "--resume", folder, "--steps", 5)
    assert "trains to step 5 instead of 2" in capsys.readouterr().out
    fit(again, cfg.steps)
    assert again.read_log()["step"] == [1, 2, 3, 4, 5] and again.read_metrics()["steps"] == 5
    assert stored(again)["step"] == stored(again)["config"]["steps"] == 5
    assert json.loads((folder / "config.json").read_text())["config"]["steps"] == 5


def test_config_repeats_a_run(drawn_from, tmp_path):
    cfg, again = open_toy(tmp_path / "b", "--config", drawn_from / "config.json")
    assert (cfg.T, cfg.n_samples, again.opts.seed, again.opts.preset) == (5, 77, 3, "smoke")
    fit(again, 2)
    same_run(again.folder, drawn_from)
    _, other = open_toy(tmp_path / "c", "--config", drawn_from / "config.json", "--seed", 8)
    fit(other, 2)
    assert not torch.equal(stored(other)["model"]["2.weight"], stored(again)["model"]["2.weight"])


@pytest.mark.parametrize("name, value, other", [
    ("device", "cpu", "auto"), ("amp", "bf16", "off"), ("compile", True, False), ("grad_checkpointing", True, False)])
def test_every_setting_of_a_run_is_kept_when_it_goes_on(name, value, other, tmp_path, monkeypatch):
    """By what it does in the resumed run. device: a GPU that has come since is not taken."""
    compiled, calls, model = [], [], network()
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    settings = {"device": "auto", "amp": "off", "compile": False, "grad_checkpointing": False}
    flag, undone = (f"--{name}={value}", f"--{name}={other}") if other else (f"--{name}", f"--no-{name}")
    _, run = open_toy(tmp_path, flag, "--steps", 3, device=None)
    fit(run, 3, lambda step, _: setattr(run, "stopped", step == 1))
    config = json.loads(run.path("config.json").read_text())
    assert stored(run)["run"] == config["run"] == settings | {name: value}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name == "device")
    _, again = open_toy(tmp_path, "--resume", device=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for layer in (model[1], model[1][0]):  # the block, whose forward is replaced, and what it computes
        layer.register_forward_hook(lambda *_: calls.append(1))
    fit(again, 3, model=model)
    assert (model in compiled, len(calls) == 3) == (name == "compile", name == "grad_checkpointing")
    with again.autocast():
        half = model(torch.ones(2, 4)).dtype == torch.bfloat16
    assert half == (name == "amp") and again.device.type == "cpu"
    for how, expected in ((["--config", run.path("config.json")], value), (["--resume", undone], other),
                          (["--sample"], other)):  # a draw is no part of that run
        assert getattr(open_toy(tmp_path, *how, device=None)[1].opts, name) == expected


def test_what_resume_refuses(folder, tmp_path):
    shutil.copy(folder / "checkpoint.pt", folder / "model.pt")
    for argv, words in [
            (("--resume", folder, "--seed", 5), "--seed 5: .* goes on with its own, 3"),
            (("--resume", folder, "--preset", "laptop"), "--preset laptop: .* goes on with its own, smoke"),
            (("--resume", folder, "--steps", 1), "steps 1: must be >= 2"),
            (("--resume", folder / "model.pt"), "must be a run folder"),
            (("--resume", folder, "--config", folder / "config.json"), "--config and --resume exclude"),
            (("--sample", folder, "--resume", folder), "--sample and --resume exclude"),
            (("--config", folder / "config.json", "--preset", "laptop"), "--preset and --config exclude"),
            (("--sample", folder / "log.csv"), "--sample .*log.csv")]:
        with pytest.raises(Mistake, match=words):
            open_toy(tmp_path, *argv)
    _, again = open_toy(tmp_path, "--resume", folder / "checkpoint.pt")
    assert again.folder == folder and again.opts.seed == 3 and again.opts.preset == "smoke"
    with pytest.raises(Mistake, match="holds no network, only the loop 'model'"):  # a loop that was renamed
        fit(again, name="network")


@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")
def test_a_run_at_work_elsewhere_is_neither_read_nor_trained(folder, tmp_path):
    import fcntl  # its locks are of an open file: a second one in this process is another process's

    def take(folder):
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle

    elsewhere, whole = take(folder), (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(b"half written")  # the lock comes before the reading
    with pytest.raises(Mistake, match="another process trains in it"):
        open_toy(tmp_path, "--resume", folder)
    os.close(elsewhere)
    (folder / "checkpoint.pt").write_bytes(whole)
    for argv in ((), ("--resume", folder, "--steps", 3)):  # a new run, too
        _, run = open_toy(tmp_path, *argv)
        seen = []

        def try_elsewhere(*_, run=run, seen=seen):
            with pytest.raises(BlockingIOError):
                take(run.folder)
            seen.append(open_toy(tmp_path, "--resume", run.folder))  # this process does not shut itself out

        fit(run, 3, try_elsewhere)
        assert len(seen) == (1 if argv else 3)
        os.close(take(run.folder))  # free again


# Damaged and foreign files


@pytest.mark.parametrize("entry", ["script", "seed", "step", "config", "loop", "optimizer",
                                   "random", "model", "ema", "format", "preset", "run"])
def test_a_damaged_entry_is_a_mistake_that_names_the_file(entry, folder, tmp_path):
    whole = torch.load(folder / "checkpoint.pt")
    del whole[entry]
    harmless = ("preset", {}), ("preset", {"preset": "text"}), ("loop", {"loop": "text"})
    for damage in ({}, *({entry: value} for value in ("text", [1, 2], {"a": "b"}, 3.5))):
        torch.save(whole | damage, folder / "checkpoint.pt")
        if entry == "run" or (entry, damage) in harmless:
            open_toy(tmp_path, "--resume", folder)  # nothing that could not be done without
            continue
        with pytest.raises(Mistake) as problem:
            fit(open_toy(tmp_path, "--resume", folder, "--steps", 3)[1], 3)
        assert str(folder) in str(problem.value), damage


class Executed:
    """A pickle that leaves a trace where it is executed."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("kind", ["empty", "truncated", "a bit turned", "zip", "dict of weights", "whole module",
                                  "only the mark", "other script", "pickle"])
def test_foreign_checkpoints(kind, folder, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    path, out = folder / "checkpoint.pt", tmp_path / "out"
    whole, state = path.read_bytes(), torch.load(path)
    if kind == "a bit turned":
        number = whole.index(state["model"]["2.weight"].numpy().tobytes())
        path.write_bytes(whole[:number] + bytes([whole[number] ^ 1]) + whole[number + 1:])
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("readme.txt", "no tensors here")
    elif kind in ("empty", "truncated", "pickle"):
        path.write_bytes({"empty": b"", "truncated": whole[:-1],
                          "pickle": pickle.dumps({"format": FORMAT, "a": Executed()})}[kind])
    else:
        torch.save({"dict of weights": {"weight": torch.randn(3)}, "whole module": nn.Linear(2, 2),
                    "only the mark": {"format": FORMAT}, "other script": state | {"script": "score_based"}}[kind], path)
    before = path.read_bytes()
    for how in ("--sample", "--resume"):
        with pytest.raises(Mistake) as problem:
            open_toy(out, how, folder)
        said = str(problem.value)
        assert str(folder) in said and "\n" not in said and ("score_based" in said) == (kind == "other script")
    assert path.read_bytes() == before and not (tmp_path / "executed").exists() and not out.exists()
    assert not [w for w in recwarn if w.category is not ResourceWarning]


@pytest.mark.parametrize("name, content", [
    ("log.csv", b"\xff\xfe,\xff\n" * 30), ("log.csv", b"a,b\n1,2\n"),
    ("metrics.json", b""), ("metrics.json", b'{"steps": 2,'), ("metrics.json", b"[1, 2]")])
def test_a_file_that_is_none_is_told_before_the_training(name, content, folder, tmp_path):
    (folder / name).write_bytes(content)
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(Mistake, match=name):
        _, run = open_toy(tmp_path, "--resume", folder, "--steps", 3)
        fit(run, 3, lambda *_: pytest.fail("a step was made"))
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_run_folders_are_unique_and_made_when_first_asked_for(tmp_path):
    made = [open_toy(tmp_path)[1] for _ in range(3)]
    assert list(tmp_path.iterdir()) == []
    folders = {run.folder for run in made}
    assert len(folders) == 3 and all(f.parent == tmp_path / "toy" for f in folders)
    part = made[0].part("coarse", Config(T=3))
    part.add_metrics(a=1)
    assert part.folder == made[0].folder / "coarse" and part.cfg.T == 3
    assert part.read_metrics() == {"a": 1} and made[0].read_metrics() == {}
