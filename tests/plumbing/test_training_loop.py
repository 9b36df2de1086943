"""run.steps and what stands in its body: the log, checkpoints, a student's edits, precision; samples."""

import copy
import csv
import dataclasses
import gc
import importlib
import json
import math
import os
import signal
import sys
import types

import numpy as np
import pytest
import torch
from conftest import assert_same_tree, only_run, open_run
from toy import Config, fit, images, network, open_toy, stored
from torch import nn
from torch.testing import assert_close

from common import plotting
from common import run as runs
from common.cli import Mistake, write_whole
from common.data import Data
from common.run import Log, LossScale, Run

PAGES = [importlib.import_module(f"{page}_example") for page in
         ("ddpm", "ddim", "latent_diffusion", "conditional_diffusion", "score_based_diffusion",
          "flow_matching")]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.__name__)


# What a loop writes


def test_a_loop_writes_a_row_for_each_step_and_a_checkpoint_every_so_many(tmp_path):
    _, run = open_toy(tmp_path, "--preview_every", 2)
    kept = []

    def watch(step, optimizer):
        kept.append(stored(run)["step"])
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)

    model, average = fit(run, 5, watch)
    assert kept == [0, 0, 2, 2, 4]  # the first before any step: killed early it can be resumed
    state, log = stored(run), run.read_log()
    assert state["step"] == 5 and state["preset"] == "laptop" and state["loop"] == "model"
    assert_same_tree(dict(model.state_dict()), dict(state["model"]))
    assert_same_tree(dict(average.state_dict()), dict(state["ema"]))
    assert list(log) == ["step", "loss", "grad_norm", "lr"] and log["step"] == [1, 2, 3, 4, 5]
    assert_close(log["lr"], [0.01, 0.02, 0.03, 0.04, 0.05])  # the optimiser's own at the end of the step


@pytest.mark.slow
def test_the_numbers_of_a_training_and_the_mean_loss_of_its_last_500_steps(tmp_path):
    _, run = open_toy(tmp_path)
    fit(run, 502)
    found, losses = run.read_metrics(), run.read_log()["loss"]
    assert found["steps"] == 502 and found["parameters"] == 4 * 3 + 3 + 3 + 1
    assert found["steps_per_second"] == pytest.approx(502 / found["train_seconds"])
    assert_close(found["loss_of_last_500"], sum(losses[2:]) / 500)


def test_a_loop_that_saves_nothing_writes_nothing(tmp_path):
    _, run = open_toy(tmp_path, "--preview_every", 2)
    steps = []
    fit(run, 5, lambda step, _: steps.append(step), save=False)
    assert steps == [0, 1, 2, 3, 4] and list(tmp_path.iterdir()) == []
    with pytest.raises(Mistake, match="loss is nan at step 3") as problem:
        fit(run, 5, lambda step, _: run.log(loss=math.nan) if step == 2 else None, save=False)
    assert "checkpoint" not in str(problem.value) and list(tmp_path.iterdir()) == []


def test_a_log_grows_columns_and_forgets_what_is_after_a_step(tmp_path):
    log = Log(tmp_path / "log.csv", 0)
    for row in ({"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 0.3, "kl": 2.0},
                {"step": 4, "kl": 1.0}):
        log.append(row)
    log.close()
    with open(log.path) as file:
        assert [list(row.values()) for row in csv.DictReader(file)] == [
            ["1", "0.1", ""], ["2", "0.2", ""], ["3", "0.3", "2.0"], ["4", "", "1.0"]]
    found = Log(log.path).read()
    assert found["step"] == [1, 2, 3, 4] and found["kl"][2:] == [2, 1] and math.isnan(found["kl"][0])
    again = Log(log.path, 2)
    again.append({"step": 3, "loss": 0.7, "kl": 9.0})
    again.close()
    assert Log(log.path).read()["loss"] == [0.1, 0.2, 0.7]
    log.path.write_text(log.path.read_text() + "4,0.5")  # a row that kill -9 cut short
    assert Log(log.path).read()["step"] == [1, 2, 3]
    for left in ("", "st", "step,loss\n", "step,loss\n1,0.5\n2,0."):  # or less, and it begins anew
        log.path.write_text(left)
        again = Log(log.path, 0)
        again.append({"step": 1, "loss": 0.5})
        again.close()
        assert log.path.read_text() == "step,loss\n1,0.5\n"
    for text in ("some words\nand more\n", "a,b\n1,2\n"):
        log.path.write_text(text)
        with pytest.raises(Mistake, match="not the log of a run"):
            Log(log.path).read()
    if os.path.exists("/dev/full"):
        with open("/dev/full", "ab", buffering=0) as again.file, pytest.raises(Mistake, match="log.csv: cannot be"):
            again.append({"step": 2, "loss": 0.5})


def test_metrics_hold_no_number_that_json_lacks(tmp_path):
    _, run = open_toy(tmp_path)
    run.add_metrics(a=1, b=[math.nan, 2.0], c={"d": -math.inf})
    run.add_metrics(a=3)
    text = run.path("metrics.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "a": 3, "b": [None, 2.0], "c": {"d": None}}


def test_a_file_is_replaced_as_a_whole_and_a_held_one_is_tried_again(tmp_path, monkeypatch):
    path, tries, replace = tmp_path / "file", [], os.replace
    write_whole(path, "old")

    def held(source, target):
        tries.append(source)
        if len(tries) < 3:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr("time.sleep", lambda _: None)
    write_whole(path, b"new")  # as Windows does while another program reads the old one
    assert path.read_text() == "new" and len(tries) == 3
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(Mistake, match="file: cannot be written .No space left"):
        write_whole(path, "newer")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


# A student's edits


def leave(run, last, logged=True):
    """Log every second step, under another name, and leave by a break after or before step `last` is logged."""
    model, made = network(), images()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in run.steps(9, model=model, optimizer=optimizer):
        if step == last and not logged:
            break
        loss = model(run.batch(made.train)[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 2:
            run.log(mse=loss)
        if step == last:
            break


def test_a_loop_left_by_break_is_saved_as_it_was_left(tmp_path):
    """The step counts where it was logged; what is drawn after the loop is not in the random state."""
    states = []
    for name, last, logged in (("after", 3, True), ("before", 4, False)):
        _, run = open_toy(tmp_path / name)
        leave(run, last, logged)
        torch.randn(2 * last)
        states.append(stored(run))
        assert states[-1]["step"] == 4 and run.read_metrics()["steps"] == 4
        assert list(run.read_log()) == ["step", "mse", "lr"] and run.read_log()["step"] == [2, 4]
        plotting.curves(tmp_path / f"{name}.png", [plotting.loss_curve(run.read_log(), "loss")])  # and no loss
    assert_same_tree(*states)

    def interrupted(batch):
        raise KeyboardInterrupt
        yield

    _, run = open_toy(tmp_path / "interrupted")
    leave(run, 3)
    with pytest.raises(KeyboardInterrupt):  # it is on disk before the samples are drawn
        run.draw(3, interrupted, network(), 1)
    assert_same_tree(torch.load(only_run(tmp_path / "interrupted", "toy") / "checkpoint.pt"), states[0])


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
    assert torch.load(only_run(tmp_path, "toy") / "checkpoint.pt")["step"] == 2
    _, again = open_toy(tmp_path, "--resume")  # and the folder is free again
    fit(again)
    assert stored(again)["step"] == 6 and again.read_log()["step"] == [1, 2, 3, 4, 5, 6]


def test_a_stopped_run_trains_no_more(tmp_path, capsys):
    _, run = open_toy(tmp_path)
    fit(run, 6, lambda step, _: setattr(run, "stopped", step == 3))
    before = stored(run)
    fit(run, 6, lambda *_: pytest.fail("a step was made"), name="classifier", save=False)
    fit(run, 6, lambda *_: pytest.fail("a step was made"))
    assert "the classifier is not trained" in capsys.readouterr().out
    assert_same_tree(stored(run), before)


# What is not finite


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
@pytest.mark.parametrize("bad_at, kept", [(0, 0), (3, 2)])
def test_what_is_not_finite_stops_and_names_step_and_checkpoint(what, bad_at, kept, tmp_path):
    _, run = open_toy(tmp_path, "--preview_every", 2)

    def diverge(step, _):
        if step == bad_at:
            run.log(**{what: torch.tensor(math.nan)})

    with pytest.raises(Mistake) as problem:
        fit(run, 6, diverge)
    for words in (f"{what} is nan at step {bad_at + 1}", f"checkpoint is of step {kept} in", "--lr 0.01 may"):
        assert words in str(problem.value)
    assert torch.load(only_run(tmp_path, "toy") / "checkpoint.pt")["step"] == kept


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Two(Config):
        vae_lr: float = 0.5

    _, run = runs.open_run("toy", Two, {"laptop": Two()}, (), ["--device", "cpu", "--out", str(tmp_path)])
    vae = network()
    with pytest.raises(Mistake, match="weight is not finite at step 3, --vae_lr 0.5 may"):  # the rate of this loop
        for step in run.steps(3, "vae", vae=vae):
            if step == 2:
                vae[2].weight.data[0, 0] = math.inf
    assert torch.load(only_run(tmp_path, "toy") / "checkpoint.pt")["step"] == 0


# The learning rate and the batch


@every_page
def test_the_learning_rate_warms_up_and_decays(page):
    """With a cosine it is seen in a training, too; here also the constant rate, and no warm-up."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 7.0)
    for warmup, decay in ((10, "constant"), (10, "cosine"), (0, "constant")):
        cfg = dataclasses.replace(page.Config(), lr=2.0, warmup=warmup, decay=decay, steps=100)
        for step in (0, 4, 9, 50, 99):
            page.set_learning_rate(optimizer, cfg, step)
            factor = (1 + math.cos(math.pi * step / 100)) / 2 if decay == "cosine" else 1
            assert optimizer.param_groups[0]["lr"] == pytest.approx(
                2.0 * factor * (min(1, (step + 1) / 10) if warmup else 1))


def test_a_batch_is_of_the_training_part_with_its_labels(tmp_path):
    _, run = open_toy(tmp_path)
    made, seen = images(), set()
    for _ in range(40):
        x, y = run.batch(made.train, made.train_labels)
        assert x.shape == (8, 1, 2, 2) and y.shape == (8,) and y.dtype == torch.int64
        assert_close(x[:, 0, 0, 0], y / 40)
        seen |= set(y.tolist())
    assert seen == set(range(10, 40))  # all of the training part, nothing of the held-out one
    run.cfg = types.SimpleNamespace(batch_size=3)  # a Config without flip
    assert len(run.batch(made.train)[0]) == 3
    x, y = run.batch(torch.arange(20.0).view(10, 2), size=5)
    assert y is None and x.shape == (5, 2) and (x[:, 1] - x[:, 0] == 1).all()


def test_flip_mirrors_left_and_right_for_half_of_the_pictures(tmp_path):
    _, run = open_toy(tmp_path, "--flip")
    made = images()
    x, y = run.batch(made.train, made.train_labels, size=4000)
    right = x[:, 0, 0, 1] - x[:, 0, 0, 0] > 0  # as it was
    assert abs(right.double().mean() - 0.5) < 0.05 and (x[:, 0, 1, 0] > x[:, 0, 0, 0]).all()
    assert_close(torch.where(right, x[:, 0, 0, 0], x[:, 0, 0, 1]), y / 40)
    for kept in (run.batch(made.train, size=400, flip=False), open_toy(tmp_path)[1].batch(made.train, size=400)):
        assert (kept[0][:, 0, 0, 1] > kept[0][:, 0, 0, 0]).all()


def test_scores_need_labels(tmp_path):
    _, run = open_toy(tmp_path, "--evaluate", 10)
    with pytest.raises(Mistake, match="--evaluate 10: .*no labels"):
        run.load(Data("toy", torch.ones(3, 2), torch.ones(3, 2)))


# Precision and memory


class Two(nn.Module):
    """A network with two outputs, one of them in half precision as under autocast."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        a, b = self.second(self.first(x).tanh()).unbind(1)
        return a, b.half()


def test_the_loss_scale_reaches_the_network_and_is_divided_again():
    model = Two()
    plain, x, inside = copy.deepcopy(model), torch.randn(5, 4), []
    scale = LossScale(model, 1024.0)
    for each in (model, plain):
        each.second.register_full_backward_hook(lambda _, grads, out: inside.append(out[0].abs().max().item()))
        for _ in range(2):  # accumulated
            a, b = each(x)
            assert b.dtype == (torch.float32 if each is model else torch.float16)
            (a.square() + b.float()).mean().backward()
    scale.divide([p.grad for p in model.parameters()])
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-3)
    assert inside[0] == pytest.approx(1024 * inside[2], rel=1e-2)


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
    with pytest.raises(Mistake, match="not finite at any loss scale"):
        for _ in range(60):
            scale.divide([torch.tensor(math.nan)])


def test_the_loss_scale_is_saved_and_restored(tmp_path, monkeypatch):
    """The weights show that run.average_gradients divides by it: fp16's are those of a run without it."""
    monkeypatch.setattr(Run, "autocast", lambda self: torch.autocast("cpu", enabled=False))
    _, plain = open_toy(tmp_path / "plain")
    expected, _ = fit(plain, 6)
    _, run = open_toy(tmp_path, "--preview_every", 2)
    run.opts.amp = "fp16"  # which the command line refuses on a CPU
    fit(run, 6, lambda step, _: setattr(run, "stopped", step == 2))
    assert stored(run)["loss_scale"] == [2.0**16, 3]
    _, again = open_toy(tmp_path, "--resume", "--amp", "off")
    again.opts.amp, seen = "fp16", []
    model, _ = fit(again, 6, lambda *_: seen.append((again.scale.scale, again.scale.good_steps)))
    assert seen == [(2.0**16, 4), (2.0**16, 5), (2.0**16, 6)] and again.scale is None
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert_close(p, q, rtol=1e-4, atol=1e-5)
    fit(again, 1, lambda *_: seen.append(again.scale.good_steps), name="later")
    assert seen[-1] == 1  # a later loop begins anew


def test_samples_are_drawn_under_autocast_and_by_a_compiled_network(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    fit(open_toy(tmp_path)[1], 1)
    for amp, dtype, flag in (("bf16", torch.bfloat16, "--compile"), ("off", torch.float32, "--no-compile")):
        _, run = open_toy(tmp_path, "--sample", "--amp", amp, flag)
        model = run.trained(network())
        x, _ = run.draw(3, lambda batch, model=model: [(0, model(torch.ones(len(batch), 4)))], model, 1)
        assert x.dtype == dtype and (model in compiled) == (flag == "--compile")


def test_compile_without_a_compiler_is_one_line_before_the_training(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("No working C++ compiler found\nand a page more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(Mistake, match="--compile: .*No working C.. compiler found.;"):
        fit(open_toy(tmp_path, "--compile")[1])
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_gradient_checkpointing_changes_no_weight_and_is_refused_where_nothing_is_to_recompute(tmp_path):
    weights = [fit(open_toy(tmp_path / str(i), *argv)[1])[0].state_dict()
               for i, argv in enumerate(((), ("--grad_checkpointing",)))]
    assert_same_tree(dict(weights[0]), dict(weights[1]))
    _, run = open_toy(tmp_path / "refused", "--grad_checkpointing")
    with pytest.raises(Mistake, match="--grad_checkpointing: Sequential has no blocks"):
        fit(run, model=nn.Sequential(nn.Flatten(), nn.Linear(4, 1)))
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
@every_page
def test_the_blocks_of_each_page_are_computed_again_going_back(page, tmp_path, monkeypatch, drawings):
    forward, again, backward = set(), set(), torch.Tensor.backward
    seen = forward

    def going_back(loss, *args, **kwargs):
        nonlocal seen
        seen = again
        backward(loss, *args, **kwargs)
        seen = forward

    monkeypatch.setattr(torch.Tensor, "backward", going_back)
    argv = ("--dataset", "digits8", "--image_size", 8, "--steps", 1, "--grad_checkpointing")
    cfg, run, data = open_run(page, tmp_path, *argv)
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: seen.add(module))
    page.train(cfg, run, data)
    handle.remove()
    norms = [module for module in forward if isinstance(module, nn.GroupNorm)]
    assert len(again.intersection(norms)) > 0.7 * len(norms)  # all but those outside the blocks


# Ctrl-C


def test_ctrl_c_ends_the_loop_after_the_step_and_the_answer_to_it_is_put_back(tmp_path):
    _, run = open_toy(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    fit(run, 100, lambda step, _: step == 1 and signal.raise_signal(signal.SIGINT))
    assert run.stopped and stored(run)["step"] == 2 and run.read_log()["step"] == [1, 2]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_stays_ignored_where_it_is(tmp_path):
    """As `nohup` and a shell's `&` ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, run = open_toy(tmp_path)
    fit(run, 3, lambda step, _: step == 1 and signal.raise_signal(signal.SIGINT))
    assert not run.stopped and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


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

    def twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt if notebook else Left):
        fit(open_toy(tmp_path)[1], 100, twice)


# Samples and the last line


class Sampler:
    """Samples of 1 x 2 x 2 noise in three steps, each of which calls the network twice."""

    def __init__(self):
        self.network, self.batches = nn.Linear(4, 4), []

    def __call__(self, batch):
        self.batches.append(batch)
        x = torch.randn(len(batch), 1, 2, 2)
        for t in (3, 2, 1):
            yield t, x
            x = x + self.network(self.network(x.flatten(1))).view(x.shape).detach()
        yield 0, x


def test_draw_puts_batches_together_and_counts_the_calls(tmp_path):
    _, run = open_toy(tmp_path)
    states = Sampler()
    torch.manual_seed(1)
    x, found = run.draw(10, states, states.network, 3, batch_size=4)
    assert states.batches == [range(4), range(4, 8), range(8, 10)] and x.shape == (10, 1, 2, 2)
    assert found["n"] == 10 and found["network_calls"] == 6 and found["seconds"] > 0
    torch.manual_seed(1)
    expected = torch.cat([list(states(range(n)))[-1][1] for n in (4, 4, 2)])
    assert_close(x, expected, rtol=0, atol=0)
    with pytest.raises(Mistake, match="samples are not finite"):
        run.draw(3, lambda batch: [(0, torch.full((3, 1, 2, 2), math.nan))], states.network, 3)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_scores_as_many_as_asked_always_the_same_and_keeps_them(tmp_path, monkeypatch, drawings):
    seen = []
    monkeypatch.setattr(runs.quality, "scores", lambda x, *rest: seen.append((x, *rest)) or {"legible": 0.5})
    states, made, labels = Sampler(), images(), torch.arange(130)
    _, run = open_toy(tmp_path)
    run.evaluate(states, states.network, 3, made)
    assert seen == [] and list(tmp_path.iterdir()) == []
    _, run = open_toy(tmp_path, "--evaluate", 130)
    state = torch.get_rng_state()
    found = run.quality(states, states.network, 3, made)
    assert torch.equal(state, torch.get_rng_state())  # the caller's draws are left alone
    assert found["legible"] == 0.5 and found["n"] == 130 and found["network_calls"] == 6
    assert list(tmp_path.iterdir()) == []
    torch.randn(5)
    run.evaluate(states, states.network, 3, made, labels)
    assert run.read_metrics()["evaluation"]["n"] == 130
    assert_close(drawings["evaluated.png"]["x"], seen[1][0][:100], rtol=0, atol=0)
    assert_close(seen[0][0], seen[1][0], rtol=0, atol=0)
    assert seen[0][1] is made and seen[0][2] is None and seen[1][2] is labels
    kept = torch.from_numpy(np.load(run.path("evaluated.npz"))["samples"])
    assert kept.dtype == torch.uint8
    assert_close(kept.float() / 127.5 - 1, seen[1][0].clamp(-1, 1), rtol=0, atol=0.004)
    _, other = open_toy(tmp_path, "--evaluate", 130, "--seed", 1)
    other.quality(states, states.network, 3, made)
    assert not torch.equal(seen[0][0], seen[2][0])


def test_the_last_line_says_what_was_measured_and_where(tmp_path, capsys):
    """The scores of the samples drawn, or those of --evaluate where it was asked for."""
    def last_line():
        run.finish("experiments/toy.py")
        return capsys.readouterr().out.strip().splitlines()[-1]

    cfg, run = open_toy(tmp_path)
    said = last_line()
    assert "all in" in said and not any(word in said for word in ("trained", "sampled", "legible", "Fr"))
    fit(run)
    run.add_metrics(sampling={"seconds": 2.0}, samples={"legible": 0.5, "accuracy": 0.25, "n": 64},
                    other={"legible": 0.125, "n": 3})
    for words in ("trained 0 s", "sampled 2 s", "legible 50% ± 6 points (n = 64)", "as asked 25.0%", str(run.folder),
                  f"python experiments/toy.py --sample {run.folder}"):
        assert words in (said := last_line()), said
    evaluation = {"legible": 0.25, "accuracy": 0.75, "frechet_distance": 12.25, "n": 100}
    run.add_metrics(evaluation=evaluation)
    run.opts.evaluate = 100
    for words in ("legible 25% ± 4 points (n = 100)", "as asked 75.0%", "features 12.2"):
        assert words in (said := last_line()), said
    run.opts.evaluate = None  # resumed without it: those scores are of the weights before
    assert "legible 50%" in last_line() and run.read_metrics()["evaluation"] is None
    found = run.read_metrics()
    assert found["config"] == json.loads(json.dumps(dataclasses.asdict(cfg)))
    assert found["total_seconds"] >= found["train_seconds"]
