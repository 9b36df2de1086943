"""run.steps and what stands in its body: the log, checkpoints, a student's edits, precision."""

import copy
import csv
import dataclasses
import gc
import importlib
import json
import math
import signal
import sys
import types

import pytest
import torch
from conftest import assert_same_tree, open_picture
from toy import Config, fit, images, network, open_toy, stored
from torch import nn
from torch.testing import assert_close

import ddpm_example as ddpm
from common import run as runs
from common.cli import Mistake, write_whole
from common.data import Data, load_images
from common.device import Launch
from common.run import Log, LossScale, Run

PAGES = [importlib.import_module(f"{page}_example") for page in
         ("ddpm", "ddim", "latent_diffusion", "conditional_diffusion", "score_based_diffusion")]


# What a loop writes


def test_the_log_has_a_row_for_each_step(tmp_path):
    _, run = open_toy(tmp_path)
    seen = []
    fit(run, 5, lambda step, optimizer: optimizer.param_groups[0].update(lr=0.01 * (step + 1)))
    log = run.read_log()
    assert list(log) == ["step", "loss", "grad_norm", "lr"] and log["step"] == [1, 2, 3, 4, 5]
    assert_close(log["lr"], [0.01, 0.02, 0.03, 0.04, 0.05])  # the optimiser's own at the end of the step
    assert all(value > 0 for value in log["loss"] + log["grad_norm"]) and seen == []


def test_checkpoints_come_every_so_many_steps_and_hold_what_the_loop_kept(tmp_path):
    _, run = open_toy(tmp_path, "--preview_every", 2)
    kept = []
    model, average = fit(run, 5, lambda *_: kept.append(stored(run)["step"]))
    assert kept == [0, 0, 2, 2, 4]  # the first before any step: killed early it can be resumed
    state = stored(run)
    assert state["step"] == 5 and state["preset"] == "laptop" and state["loop"] == "model"
    assert_same_tree(dict(model.state_dict()), dict(state["model"]))
    assert_same_tree(dict(average.state_dict()), dict(state["ema"]))
    found = run.read_metrics()
    assert found["steps"] == 5 and found["parameters"] == 4 * 3 + 3 + 3 + 1
    assert found["steps_per_second"] > 0 and found["train_seconds"] > 0
    assert_close(found["loss_of_last_500"], sum(run.read_log()["loss"]) / 5)


def test_the_mean_loss_of_the_end_is_of_its_last_500_steps(tmp_path):
    _, run = open_toy(tmp_path)
    fit(run, 510)
    assert_close(run.read_metrics()["loss_of_last_500"], sum(run.read_log()["loss"][10:]) / 500)


def test_a_loop_that_saves_nothing_writes_nothing(tmp_path):
    _, run = open_toy(tmp_path, "--preview_every", 2)
    steps = []
    fit(run, 5, lambda step, _: steps.append(step), save=False)
    assert steps == [0, 1, 2, 3, 4] and list(tmp_path.iterdir()) == []
    with pytest.raises(Mistake, match="loss is nan at step 3") as problem:
        fit(run, 5, lambda step, _: run.log(loss=math.nan) if step == 2 else None, save=False)
    assert "checkpoint" not in str(problem.value) and list(tmp_path.iterdir()) == []


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    run = open_toy(tmp_path)[1]
    run = Run("toy", Config(), run.opts, Launch(torch.device("cpu"), rank=1, world=2))
    for name in ("gather", "average", "broadcast"):  # there is no other process to talk to
        monkeypatch.setattr(run.launch, name, lambda value: value)
    run.add_metrics(a=1)
    fit(run, 2)
    assert run.folder is None and list(tmp_path.iterdir()) == []


def test_a_log_grows_columns_and_forgets_what_is_after_a_step(tmp_path):
    log = Log(tmp_path / "log.csv", 0)
    for step in range(1, 4):
        log.append({"step": step, "loss": step / 10})
    log.append({"step": 4, "loss": 0.4, "kl": 2.0})
    log.append({"step": 5, "kl": 1.0})
    log.close()
    with open(log.path) as file:
        assert [list(row.values()) for row in csv.DictReader(file)] == [
            ["1", "0.1", ""], ["2", "0.2", ""], ["3", "0.3", ""], ["4", "0.4", "2.0"], ["5", "", "1.0"]]
    found = Log(log.path).read()
    assert found["step"] == [1, 2, 3, 4, 5] and found["kl"][3:] == [2, 1] and math.isnan(found["kl"][0])
    again = Log(log.path, 2)
    again.append({"step": 3, "loss": 0.7, "kl": 9.0})
    again.close()
    assert Log(log.path).read()["loss"] == [0.1, 0.2, 0.7]
    log.path.write_text(log.path.read_text() + "4,0.5")  # a row that kill -9 cut short
    assert Log(log.path).read()["step"] == [1, 2, 3]
    for text in ("some words\nand more\n", "a,b\n1,x\n", "a,b\n1,2\n"):
        log.path.write_text(text)
        with pytest.raises(Mistake, match="not the log of a run"):
            Log(log.path).read()


def test_metrics_hold_no_number_that_json_lacks(tmp_path):
    _, run = open_toy(tmp_path)
    run.add_metrics(a=1, b=[math.nan, 2.0], c={"d": -math.inf})
    run.add_metrics(a=3)
    text = run.path("metrics.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "a": 3, "b": [None, 2.0], "c": {"d": None}}


def test_a_file_is_replaced_as_a_whole_and_a_held_one_is_tried_again(tmp_path, monkeypatch):
    import os

    path, tries, replace = tmp_path / "file", [], os.replace
    write_whole(path, "old")

    def held(source, target):
        tries.append(source)
        if len(tries) < 3:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr("time.sleep", lambda _: None)
    write_whole(path, b"new")  # as Windows does while another program reads the old one
    assert path.read_text() == "new" and len(tries) == 3
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Mistake, match="file: cannot be written .No space left"):
        write_whole(path, "newer")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


# A student's edits


def edited(tmp_path, monkeypatch, *edits, page="ddpm_example"):
    """The page with some text of its file replaced, as a module; the copy imports the same common/."""
    from conftest import ROOT

    source = (ROOT / f"{page}.py").read_text()
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (tmp_path / "edited_page.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "edited_page", raising=False)
    return importlib.import_module("edited_page")


def run_page(module, out, *argv):
    """Train by a page's train, as its main does, and go on; the run folder."""
    argv = ["--preset", "smoke", "--device", "cpu", "--out", str(out), *argv]
    cfg, run = runs.open_run("ddpm", module.Config, module.PRESETS, module.SAMPLING, argv)
    data = run.load(load_images(cfg.dataset))
    model = module.train(cfg, run, data)
    schedule = module.make_schedule(cfg.schedule, cfg.T)
    module.figure_loss(run, model, data, schedule)
    return run.folder


BACKWARD = "        loss.backward()\n"
LOG = "        run.log(loss=loss, grad_norm=norm)\n"


def test_two_backward_passes_accumulate(tmp_path, monkeypatch):
    """Half the loss, twice: the same gradients, so the same run to rounding."""
    twice = "        (loss / 2).backward(retain_graph=True)\n        (loss / 2).backward()\n"
    module = edited(tmp_path, monkeypatch, (BACKWARD, twice))
    a = torch.load(run_page(module, tmp_path / "a") / "checkpoint.pt")
    b = torch.load(run_page(ddpm, tmp_path / "b") / "checkpoint.pt")
    for name, value in b["model"].items():
        assert_close(a["model"][name], value, rtol=1e-3, atol=1e-5)


def test_steps_without_a_log(tmp_path, monkeypatch):
    module = edited(tmp_path, monkeypatch, (LOG, "        if step % 2: run.log(loss=loss)\n"))
    folder = run_page(module, tmp_path / "out")
    assert Log(folder / "log.csv").read()["step"] == [2, 4, 6]
    module = edited(tmp_path, monkeypatch, (LOG, ""))
    folder = run_page(module, tmp_path / "none")
    assert Log(folder / "log.csv").read() == {}
    assert torch.load(folder / "checkpoint.pt")["step"] == 6


def test_another_scalar_from_some_step_on(tmp_path, monkeypatch):
    more = LOG + "        if step >= 3: run.log(twice=2 * loss)\n"
    folder = run_page(edited(tmp_path, monkeypatch, (LOG, more)), tmp_path / "out")
    log = Log(folder / "log.csv").read()
    assert log["step"] == [1, 2, 3, 4, 5, 6]
    assert all(map(math.isnan, log["twice"][:3]))
    assert_close(log["twice"][3:], [2 * loss for loss in log["loss"][3:]])
    open_picture(folder / "loss.png")


def test_an_early_break_is_saved_when_the_run_goes_on(tmp_path, monkeypatch):
    module = edited(tmp_path, monkeypatch, (LOG, LOG + "        if step == 3: break\n"))
    folder = run_page(module, tmp_path / "out")
    state = torch.load(folder / "checkpoint.pt")
    assert state["step"] == 4 and Log(folder / "log.csv").read()["step"] == [1, 2, 3, 4]
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 4
    whole = run_page(ddpm, tmp_path / "whole", "--steps", "4", "--decay", "constant")
    again = run_page(edited(tmp_path, monkeypatch, (LOG, LOG + "        if step == 3: break\n")),
                     tmp_path / "again", "--decay", "constant")
    assert_same_tree(torch.load(again / "checkpoint.pt")["ema"], torch.load(whole / "checkpoint.pt")["ema"])


def test_a_loop_left_by_break_is_saved_before_the_samples_are_drawn(tmp_path):
    _, run = open_toy(tmp_path)
    fit_until = iter(range(3))
    model = network()
    for _ in run.steps(9, model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1)):
        run.log(loss=1.0)
        if next(fit_until) == 2:
            break

    def interrupted(batch):
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        run.draw(3, interrupted, model, 1)
    assert torch.load(run._folder / "checkpoint.pt")["step"] == 3


def test_a_break_before_the_step_was_made_counts_none(tmp_path):
    _, run = open_toy(tmp_path)
    model = network()
    for step in run.steps(6, model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1)):
        if step == 2:
            break
        run.log(loss=0.5)
    assert run.path("x") and stored(run)["step"] == 2 and run.read_log()["step"] == [1, 2]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, Mistake])
def test_an_error_in_the_body_leaves_the_last_checkpoint(error, tmp_path):
    _, run = open_toy(tmp_path, "--preview_every", 2, "--amp", "bf16")
    before = signal.getsignal(signal.SIGINT)

    def fail(step, _):
        if step == 3:
            raise error("own")

    with pytest.raises(error):
        fit(run, 6, fail)
    gc.collect()
    assert signal.getsignal(signal.SIGINT) is before
    folder = run._folder
    state = torch.load(folder / "checkpoint.pt")
    assert state["step"] == 2 and all(v.isfinite().all() for v in state["model"].values())
    _, again = open_toy(tmp_path, "--resume")  # and the folder is free again
    fit(again)
    assert stored(again)["step"] == 6 and again.read_log()["step"] == [1, 2, 3, 4, 5, 6]


def test_the_optimiser_is_the_page_s(tmp_path):
    """No setting of it is changed, and what the body logs as lr is kept."""
    _, run = open_toy(tmp_path)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, foreach=True)
    before = dict(optimizer.param_groups[0])
    for _ in run.steps(2, model=model, optimizer=optimizer):
        model(torch.ones(2, 1, 2, 2)).mean().backward()
        optimizer.step()
        run.log(loss=1.0, lr=7.0, step=99)
    assert optimizer.param_groups[0] == before
    assert run.read_log() == {"step": [1, 2], "loss": [1, 1], "lr": [7, 7]}


def test_a_renamed_loss_is_logged_and_only_its_curve_left_out(tmp_path, monkeypatch):
    module = edited(tmp_path, monkeypatch, (LOG, "        run.log(mse=loss)\n"))
    folder = run_page(module, tmp_path / "out")
    assert list(Log(folder / "log.csv").read()) == ["step", "mse", "lr"]
    open_picture(folder / "loss.png")


def test_a_config_without_flip(tmp_path):
    run = open_toy(tmp_path)[1]
    run.cfg = types.SimpleNamespace(batch_size=3)
    assert len(run.batch(images().train)[0]) == 3


def test_a_stopped_run_trains_no_more(tmp_path, capsys):
    _, run = open_toy(tmp_path)
    fit(run, 6, lambda step, _: setattr(run, "stopped", step == 3))
    before = stored(run)
    fit(run, 6, lambda *_: pytest.fail("a step was made"), name="classifier", save=False)
    fit(run, 6, lambda *_: pytest.fail("a step was made"))
    assert "stopped before: the classifier is not trained" in capsys.readouterr().out
    assert_same_tree(stored(run), before)


# What is not finite


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
@pytest.mark.parametrize("bad_at, kept", [(0, 0), (3, 2), (4, 4)])
def test_what_is_not_finite_stops_and_names_step_and_checkpoint(what, bad_at, kept, tmp_path):
    _, run = open_toy(tmp_path, "--preview_every", 2)

    def diverge(step, _):
        if step == bad_at:
            run.log(**{what: torch.tensor(math.nan)})

    with pytest.raises(Mistake) as problem:
        fit(run, 6, diverge)
    for words in (f"{what} is nan at step {bad_at + 1}", f"checkpoint is of step {kept} in", "--lr 0.01 may"):
        assert words in str(problem.value)
    assert torch.load(run._folder / "checkpoint.pt")["step"] == kept


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    _, run = open_toy(tmp_path)
    model = network()
    with pytest.raises(Mistake, match="weight is not finite"):
        for step in run.steps(3, model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1)):
            if step == 2:
                model[1].weight.data[0, 0] = math.inf
    assert torch.load(run._folder / "checkpoint.pt")["step"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.__name__)
def test_a_rate_of_1e38_is_one_line(page, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        page.main(["--preset", "smoke", "--steps", "2", "--warmup", "0", "--lr", "1e38",
                   "--grad_clip", "1e30", "--out", str(tmp_path)])
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(said) == 1 and "finite" in said[0] or " is " in said[0], said


# The learning rate and the batch


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.__name__)
def test_the_learning_rate_warms_up_and_decays(page):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 7.0)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    for decay in ("constant", "cosine"):
        cfg = dataclasses.replace(page.Config(), lr=2.0, warmup=10, decay=decay, steps=100)
        for step in range(100):
            page.set_learning_rate(optimizer, cfg, step)
            expected = 2.0 * min(1, (step + 1) / 10)
            if decay == "cosine":
                expected *= (1 + math.cos(math.pi * step / 100)) / 2
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected] * 2)
    page.set_learning_rate(optimizer, dataclasses.replace(cfg, warmup=0, decay="constant"), 0)
    assert optimizer.param_groups[0]["lr"] == 2.0


def test_a_batch_is_of_the_training_part_with_its_labels(tmp_path):
    _, run = open_toy(tmp_path)
    made, seen = images(), set()
    for _ in range(40):
        x, y = run.batch(made.train, made.train_labels)
        assert x.shape == (8, 1, 2, 2) and y.shape == (8,) and y.dtype == torch.int64
        assert_close(x[:, 0, 0, 0], y / 40)
        seen |= set(y.tolist())
    assert seen == set(range(10, 40))  # all of the training part, nothing of the held-out one
    x, y = run.batch(torch.arange(20.0).view(10, 2), size=5)
    assert y is None and x.shape == (5, 2) and (x[:, 1] - x[:, 0] == 1).all()


def test_flip_mirrors_left_and_right_for_half_of_the_pictures(tmp_path):
    _, run = open_toy(tmp_path, "--flip")
    made = images()
    x, y = run.batch(made.train, made.train_labels, size=4000)
    right = x[:, 0, 0, 1] - x[:, 0, 0, 0] > 0  # as it was
    assert abs(right.double().mean() - 0.5) < 0.03 and (x[:, 0, 1, 0] > x[:, 0, 0, 0]).all()
    assert_close(torch.where(right, x[:, 0, 0, 0], x[:, 0, 0, 1]), y / 40)
    x, _ = run.batch(made.train, size=400, flip=False)
    assert (x[:, 0, 0, 1] > x[:, 0, 0, 0]).all()
    x, _ = open_toy(tmp_path)[1].batch(made.train, size=400)
    assert (x[:, 0, 0, 1] > x[:, 0, 0, 0]).all()


def test_each_process_draws_its_part_of_the_batch(tmp_path, monkeypatch):
    opts = open_toy(tmp_path)[1].opts
    for rank in range(2):
        run = Run("toy", Config(), opts, Launch(torch.device("cpu"), rank, 2))
        assert len(run.batch(images().train)[0]) == 4
    monkeypatch.setattr("common.device.launch", lambda name: Launch(torch.device("cpu"), 0, 3))
    with pytest.raises(Mistake, match="batch_size 8: must be a multiple of 3, the number of processes"):
        open_toy(tmp_path)


def test_load_and_place(tmp_path):
    _, run = open_toy(tmp_path)
    assert run.load(images(labels=False)).train.device == run.device
    model = run.place(nn.Conv2d(3, 4, 3))
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    _, run = open_toy(tmp_path, "--evaluate", 10)
    with pytest.raises(Mistake, match="no labels"):
        run.load(Data("toy", torch.ones(3, 2), torch.ones(3, 2)))


# Precision and memory


def test_autocast_and_what_is_resumed_of_a_run_s_settings(tmp_path):
    _, run = open_toy(tmp_path, "--amp", "bf16", "--preview_every", 2)
    fit(run, 4, lambda step, _: setattr(run, "stopped", step == 1))
    with run.autocast():
        assert network()(torch.ones(2, 1, 2, 2)).dtype == torch.bfloat16
    settings = {"device": "cpu", "amp": "bf16", "compile": False, "grad_checkpointing": False}
    assert stored(run)["run"] == settings
    assert json.loads(run.path("config.json").read_text())["run"] == settings
    _, again = open_toy(tmp_path, "--resume")
    assert again.opts.amp == "bf16"
    assert open_toy(tmp_path, "--resume", "--amp", "off")[1].opts.amp == "off"
    assert open_toy(tmp_path, "--config", run.path("config.json"))[1].opts.amp == "bf16"
    assert open_toy(tmp_path, "--sample")[1].opts.amp == "off"


def test_samples_are_drawn_under_autocast(tmp_path):
    fit(open_toy(tmp_path)[1], 1)
    for amp, dtype in (("bf16", torch.bfloat16), ("off", torch.float32)):
        _, run = open_toy(tmp_path, "--sample", "--amp", amp)
        model = run.trained(network())
        x, _ = run.draw(3, lambda batch, model=model: [(0, model(torch.ones(len(batch), 1, 2, 2)))], model, 1)
        assert x.dtype == dtype


def test_the_loss_scale_reaches_the_network_and_is_divided_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    plain, x, inside = copy.deepcopy(model), torch.randn(5, 4), []
    scale = LossScale(model, 1024.0)
    model[1].register_full_backward_hook(lambda module, grads, out: inside.append(out[0].abs().max().item()))
    for _ in range(2):  # accumulated
        model(x).square().mean().backward()
        plain(x).square().mean().backward()
    scale.divide([p.grad for p in model.parameters()])
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)
    largest = inside[0]
    scale.hook.remove()
    model(x).square().mean().backward()
    assert largest == pytest.approx(1024 * inside[-1], rel=1e-4)


def test_the_loss_scale_of_a_network_with_several_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return tuple(self.layer(x).half().unbind(1))

    torch.manual_seed(0)
    model = Two()
    plain, x = copy.deepcopy(model), torch.randn(5, 4)
    scale = LossScale(model, 1024.0)
    for each in (model, plain):
        a, b = each(x)
        assert a.dtype == (torch.float32 if each is model else torch.float16)
        (a.float().square() + b.float()).mean().backward()
    scale.divide([p.grad for p in model.parameters()])
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-3)


def test_gradients_that_are_never_finite_end_the_run():
    model = nn.Linear(2, 2)
    scale = LossScale(model)
    with pytest.raises(Mistake, match="not finite at any loss scale"):
        for _ in range(60):
            scale.divide([torch.tensor(math.nan)])


def test_a_step_that_overflows_is_left_out_and_the_scale_adapts():
    model = nn.Linear(2, 2)
    scale, optimizer = LossScale(model, 8.0), torch.optim.SGD(model.parameters(), 1.0)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, math.inf)
    scale.divide([p.grad for p in model.parameters()])
    optimizer.step()
    assert scale.scale == 4.0 and scale.good_steps == 0
    assert_same_tree(dict(model.state_dict()), dict(before))
    for _ in range(2000):
        scale.divide([torch.ones(2)])
    assert scale.scale == 8.0 and scale.good_steps == 0


def test_the_loss_scale_is_saved_and_restored(tmp_path, monkeypatch):
    _, run = open_toy(tmp_path, "--preview_every", 2)
    run.opts.amp = "fp16"  # which the command line refuses on a CPU
    monkeypatch.setattr(Run, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    fit(run, 6, lambda step, _: setattr(run, "stopped", step == 2))
    assert stored(run)["loss_scale"] == [2.0**16, 3]
    _, again = open_toy(tmp_path, "--resume", "--amp", "off")
    again.opts.amp, seen = "fp16", []
    fit(again, 6, lambda *_: seen.append((again.scale.scale, again.scale.good_steps)))
    assert seen == [(2.0**16, 4), (2.0**16, 5), (2.0**16, 6)] and again.scale is None
    fit(again, 1, lambda *_: seen.append(again.scale.good_steps), name="later")
    assert seen[-1] == 1  # a later loop begins anew


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.__name__)
def test_gradient_checkpointing_computes_again_and_changes_nothing(page, tmp_path, monkeypatch):
    """By what the run calls, whatever the blocks are called: each block runs twice in a step."""
    from conftest import open_run

    def train(out, *argv):
        cfg, run, data = open_run(page, out, "--steps", "2", *argv)
        calls = []
        handle = nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: calls.append(1) if isinstance(module, nn.GroupNorm) else None)
        page.train(cfg, run, data)
        handle.remove()
        return torch.load(run.path("checkpoint.pt"))["model"], len(calls)

    plain, calls = train(tmp_path / "a")
    saving, more = train(tmp_path / "b", "--grad_checkpointing")
    assert more > 1.2 * calls  # the latent page encodes its data besides
    for name, value in plain.items():
        assert_close(saving[name], value, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_is_refused_where_there_is_nothing_to_recompute(tmp_path):
    _, run = open_toy(tmp_path, "--grad_checkpointing")
    with pytest.raises(Mistake, match="--grad_checkpointing: Sequential has no blocks"):
        fit(run)
    assert list(tmp_path.iterdir()) == []


# Ctrl-C


def test_ctrl_c_ends_the_loop_after_the_step_and_the_answer_to_it_is_put_back(tmp_path):
    _, run = open_toy(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    fit(run, 100, lambda step, _: step == 1 and signal.raise_signal(signal.SIGINT))
    assert run.stopped and stored(run)["step"] == 2 and run.read_log()["step"] == [1, 2]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("notebook", [False, True])
def test_ctrl_c_twice_leaves_at_once_and_in_a_notebook_only_the_cell(notebook, tmp_path, monkeypatch):
    class Left(Exception):
        pass

    def leave(status):
        assert status == 130 and not notebook
        raise Left

    if notebook:
        kernel = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=1))
        monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setattr("os._exit", leave)
    _, run = open_toy(tmp_path)
    before = signal.getsignal(signal.SIGINT)

    def twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt if notebook else Left):
        fit(run, 100, twice)
    gc.collect()
    assert signal.getsignal(signal.SIGINT) is before
