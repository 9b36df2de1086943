"""run.steps and what stands in its body: the log, checkpoints, a student's edits, precision; samples."""

import copy
import dataclasses
import gc
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
from toy import fit, images, network, open_toy, stored
from torch import nn
from torch.testing import assert_close

import conditional_diffusion_example as conditional
import ddpm_example as ddpm
import flow_matching_example as flow
import latent_diffusion_example as latent
import score_based_diffusion_example as score_based
from common import plotting
from common import run as runs
from common.cli import Mistake, write_whole
from common.run import Log, LossScale, Run


def on_disk(out):
    """The checkpoint in the one run folder under out."""
    return torch.load(only_run(out, "toy") / "checkpoint.pt", weights_only=True)


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
    assert (state["step"], state["preset"], state["loop"]) == (5, "laptop", "model")
    assert_same_tree(dict(model.state_dict()), dict(state["model"]))
    assert_same_tree(dict(average.state_dict()), dict(state["ema"]))
    assert list(log) == ["step", "loss", "grad_norm", "lr"] and log["step"] == [1, 2, 3, 4, 5]
    assert_close(log["lr"], [0.01, 0.02, 0.03, 0.04, 0.05])  # the optimiser's own at the end of the step


def test_the_numbers_of_a_training_and_the_mean_loss_of_its_last_500_steps(tmp_path):
    _, run = open_toy(tmp_path, "--preview_every", 1000)
    for step in run.steps(503, model=network()):
        run.log(loss=step)
    found = run.read_metrics()
    assert found["steps"] == 503 and found["parameters"] == 4 * 3 + 3 + 3 + 1
    assert found["steps_per_second"] == pytest.approx(503 / found["train_seconds"])
    assert found["loss_of_last_500"] == (3 + 502) / 2


def test_a_log_grows_columns_and_forgets_what_is_after_a_step(tmp_path):
    log = Log(tmp_path / "log.csv", 0)
    for row in ({"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 0.3, "kl": 2.0},
                {"step": 4, "kl": 1.0}):
        log.append(row)
    log.close()
    assert log.path.read_text() == "step,loss,kl\n1,0.1,\n2,0.2,\n3,0.3,2.0\n4,,1.0\n"
    found = Log(log.path).read()
    assert found["step"] == [1, 2, 3, 4] and found["kl"][2:] == [2, 1] and math.isnan(found["kl"][0])
    again = Log(log.path, 2)
    again.append({"step": 3, "loss": 0.7, "kl": 9.0})
    again.close()
    log.path.write_text(log.path.read_text() + "4,0.5")  # a row that kill -9 cut short
    assert Log(log.path).read()["loss"] == [0.1, 0.2, 0.7]
    for left in ("", "st", "step,loss\n", "step,loss\n1,0.5\n2,0."):  # or less, and it begins anew
        log.path.write_text(left)
        again = Log(log.path, 0)
        again.append({"step": 1, "loss": 0.5})
        again.close()
        assert log.path.read_text() == "step,loss\n1,0.5\n"


def test_metrics_hold_no_number_that_json_lacks(tmp_path):
    _, run = open_toy(tmp_path)
    run.add_metrics(a=1, b=[math.nan, 2.0], c={"d": -math.inf})
    run.add_metrics(a=3)
    assert json.loads(run.path("metrics.json").read_text()) == {"a": 3, "b": [None, 2.0], "c": {"d": None}}


def test_a_file_is_replaced_as_a_whole_and_a_held_one_is_tried_again(tmp_path, monkeypatch):
    path, tries, replace = tmp_path / "file", [], os.replace
    write_whole(path, "old")

    def held(source, target):  # as Windows does while another program reads the old one
        tries.append(source)
        if len(tries) < 3:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr("time.sleep", lambda _: None)
    write_whole(path, b"new")
    assert path.read_text() == "new" and len(tries) == 3
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(Mistake, match="file: cannot be written .No space left"):
        write_whole(path, "newer")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


# A student's edits


def leave(out, logged):
    """A run whose body leaves its loop by a break, before or after the step is logged."""
    _, run = open_toy(out)
    for step in run.steps(9, model=network()):
        if step == 4 and not logged:
            break
        run.batch(images().train)
        run.log(mse=step)
        if step == 3 and logged:
            break
    return run


def test_a_loop_left_by_break_is_saved_as_it_was_left(tmp_path):
    """The step counts where it was logged; what is drawn after the loop is not in the random state."""
    states = []
    for logged in (True, False):
        torch.manual_seed(0)
        run = leave(tmp_path / str(logged), logged)
        torch.randn(3 + logged)
        states.append(stored(run))
        assert states[-1]["step"] == 4 and run.read_log()["step"] == [1, 2, 3, 4]
    assert_same_tree(*states)
    plotting.curves(tmp_path / "loss.png", [plotting.loss_curve(run.read_log(), "loss")])  # of a log without one

    def interrupted(batch):
        raise KeyboardInterrupt
        yield

    run = leave(tmp_path / "interrupted", True)
    with pytest.raises(KeyboardInterrupt):  # it is on disk before the samples are drawn
        run.draw(3, interrupted, network(), 1)
    assert on_disk(tmp_path / "interrupted")["step"] == 4


# What ends a loop


@pytest.mark.parametrize("what, bad_at, kept", [("loss", 0, 0), ("grad_norm", 3, 2), ("loss", 2, None)])
def test_what_is_not_finite_is_an_error_that_names_step_and_checkpoint(what, bad_at, kept, tmp_path):
    """As any error it leaves the last checkpoint, and the run can go on. kept None: a loop that saves nothing."""
    _, run = open_toy(tmp_path, "--preview_every", 2)
    before, steps = signal.getsignal(signal.SIGINT), []

    def diverge(step, _):
        steps.append(step)
        if step == bad_at:
            run.log(**{what: torch.tensor(math.nan)})

    with pytest.raises(Mistake, match=f"{what} is nan at step {bad_at + 1}.*--lr 0.01 may") as problem:
        fit(run, 6, diverge, save=kept is not None)
    assert steps == list(range(bad_at + 1))
    if kept is None:
        assert "checkpoint" not in str(problem.value) and list(tmp_path.iterdir()) == []
    else:
        assert f"checkpoint is of step {kept} in" in str(problem.value) and on_disk(tmp_path)["step"] == kept
    if kept == 2:
        del problem
        gc.collect()  # the traceback holds the loop
        assert signal.getsignal(signal.SIGINT) is before
        _, again = open_toy(tmp_path, "--resume")
        fit(again)
        assert stored(again)["step"] == 6 and again.read_log()["step"] == [1, 2, 3, 4, 5, 6]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    _, run, _ = open_run(latent, tmp_path, "--vae_lr", 0.5)
    vae = network()
    with pytest.raises(Mistake, match="weight is not finite at step 3, --vae_lr 0.5 may"):  # the rate of this loop
        for step in run.steps(3, "vae", vae=vae):
            if step == 2:
                vae[2].weight.data[0, 0] = math.inf
    assert torch.load(only_run(tmp_path, "latent") / "checkpoint.pt")["step"] == 0


# The learning rate and the batch


@pytest.mark.parametrize("warmup, decay", [(10, "constant"), (10, "cosine"), (0, "constant")])
def test_the_learning_rate_warms_up_and_decays(warmup, decay):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 7.0)
    cfg = ddpm.Config(lr=2.0, warmup=warmup, decay=decay, steps=100)  # the same lines in every page
    for step in (0, 4, 9, 50, 99):
        ddpm.set_learning_rate(optimizer, cfg, step)
        factor = (1 + math.cos(math.pi * step / 100)) / 2 if decay == "cosine" else 1
        rising = min(1, (step + 1) / 10) if warmup else 1
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * factor * rising)


def test_a_batch_is_of_the_training_part_with_its_labels_and_flip_mirrors_half_of_it(tmp_path):
    _, run = open_toy(tmp_path, "--flip")
    made = images()
    x, y = run.batch(made.train, made.train_labels)
    assert x.shape == (8, 1, 2, 2) and y.shape == (8,) and y.dtype == torch.int64
    x, y = run.batch(made.train, made.train_labels, size=4000)
    assert set(y.tolist()) == set(range(10, 40))  # all of the training part, nothing of the held-out one
    right = x[:, 0, 0, 1] - x[:, 0, 0, 0] > 0  # as it was
    assert abs(right.double().mean() - 0.5) < 0.05 and (x[:, 0, 1, 0] > x[:, 0, 0, 0]).all()
    assert_close(torch.where(right, x[:, 0, 0, 0], x[:, 0, 0, 1]), y / 40)
    for kept in (run.batch(made.train, size=400, flip=False), open_toy(tmp_path)[1].batch(made.train, size=400)):
        assert (kept[0][:, 0, 0, 1] > kept[0][:, 0, 0, 0]).all()
    run.cfg = types.SimpleNamespace(batch_size=3)  # a Config without flip; points
    x, y = run.batch(torch.arange(20.0).view(10, 2))
    assert y is None and x.shape == (3, 2) and (x[:, 1] - x[:, 0] == 1).all()


# Precision and memory


def test_the_loss_scale_reaches_the_network_and_is_divided_again():
    model, x = nn.GRU(4, 3), torch.randn(5, 4)  # a network with two outputs
    plain, scale, entered = copy.deepcopy(model), LossScale(model, 1024.0), []
    for each in (model, plain):
        entered.append(x.clone().requires_grad_())
        for _ in range(2):  # accumulated
            first, second = each(entered[-1])
            (first.square().mean() + second.mean()).backward()
    scale.divide([p.grad for p in model.parameters()])
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad)
    assert_close(entered[0].grad, 1024 * entered[1].grad)
    assert LossScale(nn.Identity()).model(x.half()).dtype == torch.float32


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
    with pytest.raises(Mistake, match="--amp fp16: .* not finite at any loss scale"):
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
    monkeypatch.setattr(torch, "compile", lambda function: 1 / 0)
    with pytest.raises(Mistake, match="--compile: .*division by zero.;"):
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


SIZES = (8, 8, (1, 2), 1, (4,), 1, 4, 0.0, 1)
BLOCKS = {
    "ddpm": lambda: ddpm.UNet(1, *SIZES), "latent": lambda: latent.UNet(1, *SIZES),
    "vae": lambda: latent.make_vae(latent.Config(), (1, 8, 8)), "flow": lambda: flow.UNet(1, *SIZES, 3),
    "conditional": lambda: conditional.UNet(1, *SIZES, classes=3),
    "dit": lambda: conditional.DiT(1, 8, 4, 16, 2, 2, 3), "score_based": lambda: score_based.UNet(1, *SIZES, True)}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_blocks_of_each_network_are_computed_again_going_back(name, tmp_path):
    _, run = open_toy(tmp_path, "--grad_checkpointing")
    model, seen = BLOCKS[name](), []
    norms = [module for module in model.modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm))]
    for norm in norms:
        norm.register_forward_pre_hook(lambda module, _: seen.append(module))
    second = torch.ones(1, 4, 2, 2) if name == "vae" else torch.ones(1, dtype=torch.int64)  # its noise, or t
    for _ in run.steps(1, model=model, save=False):
        found = model(torch.ones(1, 1, 8, 8), second)
        forward = len(seen)
        (found[0] if name == "vae" else found).sum().backward()
    assert len(set(seen[forward:])) > 0.7 * len(norms)  # all but those outside the blocks


# Ctrl-C


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_ends_the_training_after_the_step_and_the_answer_to_it_is_put_back(ignored, tmp_path, capsys):
    """ignored: as `nohup` and a shell's `&` ask, it stays so."""
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGINT)
    _, run = open_toy(tmp_path)
    fit(run, 4, lambda step, _: step == 1 and signal.raise_signal(signal.SIGINT))
    last = 4 if ignored else 2
    assert run.stopped != ignored and stored(run)["step"] == last and run.read_log()["step"][-1] == last
    assert signal.getsignal(signal.SIGINT) is before
    if not ignored:  # a later loop, neither
        fit(run, 6, lambda *_: pytest.fail("a step was made"), name="classifier", save=False)
        assert "the classifier is not trained" in capsys.readouterr().out


@pytest.mark.parametrize("notebook, left, status", [(False, SystemExit, "130"), (True, KeyboardInterrupt, None)])
def test_ctrl_c_twice_leaves_at_once_and_in_a_notebook_only_the_cell(notebook, left, status, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "in_notebook", lambda: notebook)
    monkeypatch.setattr("os._exit", sys.exit)

    def twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(left, match=status):
        fit(open_toy(tmp_path)[1], 100, twice)


# Samples and the last line


class Sampler:
    """Samples of noise in three steps, each of which calls the network twice."""

    def __init__(self):
        self.network, self.batches = nn.Linear(4, 4), []

    def __call__(self, batch):
        self.batches.append(batch)
        x = torch.randn(len(batch), 4)
        for t in (3, 2, 1):
            yield t, x
            x = self.network(self.network(x)).detach()
        yield 0, x


def test_draw_puts_batches_together_and_counts_the_calls(tmp_path):
    _, run = open_toy(tmp_path)
    states = Sampler()
    torch.manual_seed(1)
    x, found = run.draw(10, states, states.network, 3, batch_size=4)
    assert states.batches == [range(4), range(4, 8), range(8, 10)]
    assert found["n"] == 10 and found["network_calls"] == 6 and found["seconds"] > 0
    torch.manual_seed(1)
    assert_close(x, torch.cat([list(states(range(n)))[-1][1] for n in (4, 4, 2)]), rtol=0, atol=0)
    with pytest.raises(Mistake, match="samples are not finite"):
        run.draw(3, lambda batch: [(0, torch.full((3, 4), math.nan))], states.network, 3)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_scores_as_many_as_asked_always_the_same_and_keeps_them(tmp_path, monkeypatch, drawings):
    seen = []
    monkeypatch.setattr(runs.quality, "scores", lambda x, *rest: seen.append((x, *rest)) or {"legible": 0.5})
    states, made, labels = Sampler(), images(), torch.arange(130)
    open_toy(tmp_path)[1].evaluate(states, states.network, 3, made)
    assert seen == [] and list(tmp_path.iterdir()) == []
    _, run = open_toy(tmp_path, "--evaluate", 130)
    with pytest.raises(Mistake, match="--evaluate 130: .*no labels"):
        run.load(images(labels=False))
    state = torch.get_rng_state()
    found = run.quality(states, states.network, 3, made)
    assert torch.equal(state, torch.get_rng_state())  # the caller's draws are left alone
    assert (found["legible"], found["n"], found["network_calls"]) == (0.5, 130, 6)
    assert list(tmp_path.iterdir()) == []
    torch.randn(5)
    run.evaluate(states, states.network, 3, made, labels)
    assert run.read_metrics()["evaluation"]["n"] == 130
    open_toy(tmp_path, "--evaluate", 130, "--seed", 1)[1].quality(states, states.network, 3, made)
    (first, *rest), (x, *of_labels), (other, *_) = seen
    assert torch.equal(first, x) and not torch.equal(first, other)
    assert rest[0] is made and rest[1] is None and of_labels[1] is labels
    assert torch.equal(drawings["evaluated.png"]["x"], x[:100])
    kept = torch.from_numpy(np.load(run.path("evaluated.npz"))["samples"])
    assert kept.dtype == torch.uint8
    assert_close(kept.float() / 127.5 - 1, x.clamp(-1, 1), rtol=0, atol=0.004)


def test_the_last_line_says_what_was_measured_and_where(tmp_path, capsys):
    """The scores of the samples drawn, or those of --evaluate where it was asked for."""
    def last_line():
        run.finish("experiments/toy.py")
        return capsys.readouterr().out.strip().splitlines()[-1]

    cfg, run = open_toy(tmp_path)
    said = last_line()
    assert "all in" in said and not any(word in said for word in ("trained", "sampled", "legible", "Fr"))
    run.add_metrics(train_seconds=3.0, sampling={"seconds": 2.0}, other={"legible": 0.125, "n": 3},
                    samples={"legible": 0.5, "accuracy": 0.25, "n": 64})
    for words in ("trained 3 s", "sampled 2 s", "legible 50% ± 6 points (n = 64)", "as asked 25.0%", str(run.folder),
                  f"python experiments/toy.py --sample {run.folder}"):
        assert words in (said := last_line()), said
    run.add_metrics(evaluation={"legible": 0.25, "accuracy": 0.75, "frechet_distance": 12.25, "n": 100})
    run.opts.evaluate = 100
    for words in ("legible 25% ± 4 points (n = 100)", "as asked 75.0%", "features 12.2"):
        assert words in (said := last_line()), said
    run.opts.evaluate = None  # resumed without it: those scores are of the weights before
    assert "legible 50%" in last_line() and run.read_metrics()["evaluation"] is None
    found = run.read_metrics()
    assert found["config"] == json.loads(json.dumps(dataclasses.asdict(cfg))) and found["total_seconds"] > 0
