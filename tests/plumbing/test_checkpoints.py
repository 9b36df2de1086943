"""Checkpoints: what --sample and --resume take from where, resume to the last bit, damaged files."""

import dataclasses
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT, assert_same_tree, open_picture, open_run
from toy import PRESETS, SAMPLING, Config, fit, images, network, open_toy, stored
from torch import nn
from torch.testing import assert_close

import ddim_example as ddim
import ddpm_example as ddpm
from common import run as runs
from common.cli import Mistake
from common.run import FORMAT, new_run


@pytest.fixture(scope="module")
def drawn_from(tmp_path_factory):
    """A finished run of the smoke preset whose checkpoint holds other values of some fields."""
    out = tmp_path_factory.mktemp("drawn_from")
    _, run = open_toy(out, "--preset", "smoke", "--n_samples", 77, "--T", 5, "--seed", 3, "--steps", 2)
    fit(run, 2)
    return run.folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of ddpm with a checkpoint of two steps."""
    cfg, run, data = open_run(ddpm, tmp_path_factory.mktemp("trained"), "--steps", "2")
    ddpm.train(cfg, run, data)
    return run.folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it to damage."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


# Which fields come from where


def test_sampling_fields_come_from_the_script_and_all_others_from_the_checkpoint(drawn_from, tmp_path):
    cfg, run = open_toy(tmp_path, "--sample", drawn_from)
    assert run.sampling and (cfg.n_samples, cfg.T, cfg.widths) == (2, 5, (3,))  # 2: its preset's, not 77
    for argv, n in ((("--preset", "laptop"), 4), (("--n_samples", 9), 9), (("--T", 5), 2),
                    (("--n_samples", 9, "--preset", "laptop"), 9)):
        cfg, _ = open_toy(tmp_path, "--sample", drawn_from, *argv)
        assert (cfg.n_samples, cfg.T, cfg.widths) == (n, 5, (3,))
    assert list(tmp_path.iterdir()) == []


def test_a_preset_edited_since_counts_for_the_draw_alone_and_is_said(drawn_from, tmp_path, capsys):
    edited = {"laptop": Config(), "smoke": Config(T=2, widths=(9, 9), n_samples=31, steps=2)}
    argv = ["--out", str(tmp_path), "--sample", str(drawn_from)]
    cfg, _ = runs.open_run("toy", Config, edited, SAMPLING, argv)
    assert cfg.n_samples == 31 and cfg.widths == (3,)
    said = capsys.readouterr().out.splitlines()[1]
    assert "widths 3 (this file: 9 9)" in said and "T 5 (this file: 2)" in said and "n_samples" not in said
    open_toy(tmp_path, "--resume", drawn_from)
    assert "kept from the checkpoint" not in capsys.readouterr().out  # a run that goes on is no edit


@pytest.mark.parametrize("how", ["--sample", "--resume"])
@pytest.mark.parametrize("argv, words", [
    (("--T", 6), "T 6: .* was made with 5"), (("--widths", 3, 4), "widths 3 4: .* was made with 3"),
    (("--flip",), "flip True: .* was made with False"), (("--n_samples", 0), "n_samples 0: must be >= 1")])
def test_a_flag_that_contradicts_the_checkpoint(argv, words, how, drawn_from, tmp_path):
    with pytest.raises(Mistake, match=words):
        open_toy(tmp_path, how, drawn_from, *argv)
    assert list(tmp_path.iterdir()) == []


def test_another_script_s_checkpoint_gives_what_the_two_share(drawn_from, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Fewer:
        T: int = 10
        extra: float = 0.25
        n_samples: int = 8
        batch_size: int = 8
        steps: int = 2

    argv = ["--out", str(tmp_path), "--sample", str(drawn_from)]
    cfg, _ = runs.open_run("other", Fewer, {"smoke": Fewer(extra=0.75)}, (), argv, reads=("toy",))
    assert cfg.T == 5 and cfg.extra == 0.75
    with pytest.raises(Mistake, match="made by the script 'toy', must be of other"):
        runs.open_run("other", Fewer, {"smoke": Fewer()}, (), argv)


def test_a_run_without_a_command_line(drawn_from, tmp_path):
    run = new_run("toy", Config(T=7), out=tmp_path, device="cpu", seed=0, compile=False, sample=None,
                  evaluate=20, amp="bf16")
    assert run.cfg.T == 7 and not run.sampling and run.opts.evaluate == 20 and run.opts.amp == "bf16"
    assert run.opts.seed == 0 and run.opts.compile is False and run.opts.preset == "own"
    run = new_run("toy", Config(n_samples=9), sample=drawn_from, compile=True)
    assert run.sampling and run.cfg.T == 5 and run.cfg.n_samples == 9 and run.opts.compile is True
    with pytest.raises(Mistake):
        new_run("toy", Config(T=0))
    run = new_run("ddpm", ddpm.Config(), sample=True, out=tmp_path)
    assert run.cfg.T == 1000


def test_the_newest_run_is_taken_and_the_first_line_says_what_it_is(tmp_path, capsys):
    def first_line(*argv):
        capsys.readouterr()
        ddpm_run = runs.open_run("ddpm", ddpm.Config, ddpm.PRESETS, ddpm.SAMPLING,
                                 ["--out", str(tmp_path), "--sample", *argv])[1]
        assert ddpm_run.sampling
        return capsys.readouterr().out.splitlines()[0]

    assert first_line().startswith(f"loaded {ROOT / 'pretrained' / 'ddpm.pt'}")
    cfg, run, data = open_run(ddpm, tmp_path)
    ddpm.train(cfg, run, data)
    said = first_line()
    assert str(run.folder) in said and "a smoke run" in said and "step 6 of 6" in said
    for name, age in (("old", 10), ("new", 0)):
        shutil.copytree(run.folder, run.folder.parent / name)
        state = torch.load(run.folder / "checkpoint.pt") | {"preset": "laptop", "step": 4}
        torch.save(state, run.folder.parent / name / "checkpoint.pt")
        stamp = run.path("checkpoint.pt").stat().st_mtime + 100 - age
        os.utime(run.folder.parent / name / "checkpoint.pt", (stamp, stamp))
    said = [line for line in (first_line(),) if "new" in line]
    assert said and "unfinished: step 4 of 6" in said[0] and "smoke" not in said[0]


def test_trained_is_the_average_of_the_checkpoint_in_eval_mode(drawn_from, tmp_path):
    _, run = open_toy(tmp_path, "--sample", drawn_from)
    state = torch.load(drawn_from / "checkpoint.pt")
    model = run.trained(network())
    assert_same_tree(dict(model.state_dict()), dict(state["ema"]))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    other = run.trained(network(), "model")
    assert_same_tree(dict(other.state_dict()), dict(state["model"]))
    assert not torch.equal(other[1].weight, model[1].weight)
    with pytest.raises(Mistake, match="holds no vae"):
        run.trained(network(), "vae")
    with pytest.raises(Mistake, match="fits this script and its Config"):
        run.trained(nn.Linear(2, 2))
    state["ema"]["1.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(Mistake, match="weights are not finite"):
        open_toy(tmp_path, "--sample", tmp_path / "nan.pt")[1].trained(network())


# Resume to the last bit


def same_run(a, b):
    assert_same_tree(torch.load(a / "checkpoint.pt"), torch.load(b / "checkpoint.pt"))
    for name in ("log.csv", "config.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("stop_at, dies", [(1, False), (3, False), (5, False), (1, True), (3, True), (5, True)])
def test_a_stopped_or_killed_run_resumes_to_the_last_bit(stop_at, dies, tmp_path):
    _, whole = open_toy(tmp_path / "whole", "--preview_every", 2, "--seed", 7)
    fit(whole)
    _, parts = open_toy(tmp_path / "parts", "--preview_every", 2, "--seed", 7)

    def stop(step, _):
        parts.stopped = step + 1 == stop_at
        if dies and parts.stopped:
            raise MemoryError  # nothing is saved after it, as when killed

    if dies:
        with pytest.raises(MemoryError):
            fit(parts, watch=stop)
    else:
        fit(parts, watch=stop)
    last = torch.load(parts._folder / "checkpoint.pt")["step"]
    assert last == (stop_at // 2 * 2 if dies else stop_at)
    torch.randn(3)  # what another program drew must not matter
    _, again = open_toy(tmp_path / "parts", "--resume")
    steps = []
    fit(again, watch=lambda step, _: steps.append(step))
    assert steps == list(range(last, 6))
    same_run(again.folder, whole.folder)


def test_a_column_that_begins_late_survives_a_resume(tmp_path):
    def note(run, stop=None):
        def watch(step, _):
            if step >= 3:
                run.log(late=step)
            run.stopped = step == stop
        return watch

    _, whole = open_toy(tmp_path / "whole", "--preview_every", 2)
    fit(whole, watch=note(whole))
    _, parts = open_toy(tmp_path / "parts", "--preview_every", 2)

    def dies(step, _):
        note(parts)(step, _)
        if step == 3:
            raise MemoryError

    with pytest.raises(MemoryError):
        fit(parts, watch=dies)
    _, again = open_toy(tmp_path / "parts", "--resume")
    fit(again, watch=note(again))
    same_run(again.folder, whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["ddpm", "latent_diffusion", "conditional_diffusion", "score_based_diffusion"])
def test_each_page_resumes_to_the_last_bit(page, tmp_path):
    module = importlib.import_module(f"{page}_example")
    argv = ("--steps", 5, "--dropout", 0.2, "--flip", "--preview_every", 2)

    def train(out, *argv, die_at=None):
        cfg, run, data = open_run(module, out, *argv)
        log = run.log

        def spied(**values):
            log(**values)
            if run.step == die_at and len(run._row) == 2:
                raise MemoryError

        run.log = spied
        module.train(cfg, run, data)
        return run.folder

    whole = train(tmp_path / "whole", *argv)
    with pytest.raises(MemoryError):
        train(tmp_path / "parts", *argv, die_at=3)
    same_run(train(tmp_path / "parts", "--resume"), whole)


@pytest.mark.parametrize("left", ["", "st", "step,loss,grad_norm,lr\n", "step,loss,grad_norm,lr\n1,0.5,1.0,0.1\n2,0."])
def test_a_run_killed_before_its_log_was_whole_resumes(left, tmp_path):
    """As kill -9 leaves it: a checkpoint of step 0, of the log nothing, a torn header or a torn row."""
    _, whole = open_toy(tmp_path / "whole")
    fit(whole)
    _, cut = open_toy(tmp_path / "cut")
    with pytest.raises(MemoryError):
        fit(cut, watch=lambda *_: (_ for _ in ()).throw(MemoryError))
    (cut._folder / "log.csv").write_text(left)
    _, again = open_toy(tmp_path / "cut", "--resume")
    fit(again)
    same_run(again.folder, whole.folder)


def test_the_log_is_on_disk_before_the_checkpoint(tmp_path, monkeypatch):
    _, run = open_toy(tmp_path, "--preview_every", 3)
    write, seen = runs.write_whole, []

    def watched(path, content):
        if path.name == "checkpoint.pt":
            step = torch.load(__import__("io").BytesIO(bytes(content)))["step"]
            log = path.parent / "log.csv"
            seen.append((step, log.read_text().count("\n")))
        write(path, content)

    monkeypatch.setattr(runs, "write_whole", watched)
    fit(run)
    assert seen == [(0, 0), (3, 4), (6, 7)]  # the header and a row a step


def test_a_finished_run_resumed_does_nothing_more(tmp_path):
    _, run = open_toy(tmp_path)
    fit(run)
    before = stored(run), run.path("log.csv").read_bytes()
    _, again = open_toy(tmp_path, "--resume")
    model, _ = fit(again, watch=lambda *_: pytest.fail("a step was made"))
    assert run.path("log.csv").read_bytes() == before[1]
    assert_same_tree(stored(run), before[0])
    assert_same_tree(dict(model.state_dict()), dict(stored(run)["model"]))


def test_a_finished_run_is_trained_on(tmp_path, capsys):
    _, run = open_toy(tmp_path, "--steps", 2)
    fit(run, 2)
    cfg, again = open_toy(tmp_path, "--resume", "--steps", 5)
    assert "trains to step 5 instead of 2" in capsys.readouterr().out
    fit(again, cfg.steps)
    assert again.read_log()["step"] == [1, 2, 3, 4, 5]
    assert stored(again)["step"] == stored(again)["config"]["steps"] == 5
    assert json.loads(again.path("config.json").read_text())["config"]["steps"] == 5


def test_config_repeats_a_run(tmp_path):
    _, run = open_toy(tmp_path / "a", "--preset", "smoke", "--T", 3, "--seed", 9)
    fit(run)
    cfg, again = open_toy(tmp_path / "b", "--config", run.path("config.json"))
    assert cfg == run.cfg and again.opts.seed == 9 and again.opts.preset == "smoke"
    fit(again)
    same_run(again.folder, run.folder)


def two_loops(run, stop=None):
    """An autoencoder, then the model, as in latent diffusion: (autoencoder, model, steps made)."""
    steps, made = [], images()
    vae, model = run.place(network()), run.place(network())
    for name, module, others in (("vae", vae, {}), ("model", model, {"vae": vae})):
        optimizer = torch.optim.AdamW(module.parameters(), 0.01)
        for step in run.steps(4, name, **{name: module}, optimizer=optimizer, **others):
            x, _ = run.batch(made.train)
            loss = (module(x) - x.flatten(1).mean(1, True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
            steps.append((name, step))
            run.stopped = run.stopped or (name, step) == stop
        if run.stopped:
            break
    return vae, model, steps


def test_a_checkpoint_of_a_later_loop_skips_the_earlier_one(tmp_path):
    _, whole = open_toy(tmp_path / "whole")
    *_, all_steps = two_loops(whole)
    assert all_steps == [(name, step) for name in ("vae", "model") for step in range(4)]
    assert whole.read_log("vae_log.csv")["step"] == whole.read_log()["step"] == [1, 2, 3, 4]
    found = whole.read_metrics()
    assert found["vae_steps"] == found["steps"] == 4 and found["vae_train_seconds"] > 0
    for stop, first in ((("model", 1), 6), (("vae", 1), 2)):
        out = tmp_path / "_".join(map(str, stop))
        _, parts = open_toy(out)
        vae, _, _ = two_loops(parts, stop)
        assert stored(parts)["loop"] == stop[0]
        _, again = open_toy(out, "--resume")
        restored, _, steps = two_loops(again)
        assert steps == all_steps[first:]  # nothing of the earlier loop, if it was finished
        if stop[0] == "model":
            assert_same_tree(dict(restored.state_dict()), dict(vae.state_dict()))
        same_run(again.folder, whole.folder)
        assert again.path("vae_log.csv").read_bytes() == whole.path("vae_log.csv").read_bytes()


def test_a_seed_is_the_run_s_own(tmp_path):
    states = []
    for seed in (0, 1):
        _, run = open_toy(tmp_path / str(seed), "--seed", seed, "--steps", 1)
        fit(run, 1)
        states.append(stored(run)["model"]["1.weight"])
    assert not torch.equal(*states)
    _, run = open_toy(tmp_path / "1", "--resume")
    assert run.opts.seed == 1
    with pytest.raises(Mistake, match="--seed 0"):
        open_toy(tmp_path / "1", "--resume", "--seed", 0)


def test_a_renamed_loop_is_not_skipped_silently(tmp_path):
    _, run = open_toy(tmp_path)
    fit(run)
    _, again = open_toy(tmp_path, "--resume")
    with pytest.raises(Mistake, match="holds no network, only the loop 'model'"):
        fit(again, name="network")


def test_the_preset_of_a_stored_run_is_its_own(drawn_from, tmp_path):
    with pytest.raises(Mistake, match="--preset laptop: .* goes on with its own, smoke"):
        open_toy(tmp_path, "--resume", drawn_from, "--preset", "laptop")
    with pytest.raises(Mistake, match="--preset and --config exclude each other"):
        open_toy(tmp_path, "--config", drawn_from / "config.json", "--preset", "laptop")
    assert open_toy(tmp_path, "--resume", drawn_from)[1].opts.preset == "smoke"


def test_a_stored_precision_that_does_not_exist(drawn_from, tmp_path):
    stored = json.loads((drawn_from / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"run": {"amp": "fp17"}}))
    with pytest.raises(Mistake, match="--amp fp17: must be one of off, bf16 on cpu"):
        open_toy(tmp_path, "--config", tmp_path / "config.json")


def test_an_edited_network_is_named_with_what_does_not_fit(drawn_from, tmp_path):
    _, run = open_toy(tmp_path, "--sample", drawn_from)
    larger = network()
    larger.append(nn.Linear(1, 1))
    with pytest.raises(Mistake, match="Missing key.*4.weight"):
        run.trained(larger)


def test_what_resume_refuses(folder, tmp_path):
    shutil.copy(folder / "checkpoint.pt", folder / "model.pt")
    for argv, words in [
            (("--resume", folder, "--seed", 5), "--seed 5"),
            (("--resume", folder, "--steps", 1), "steps 1: must be >= 2"),
            (("--resume", folder / "model.pt"), "must be a run folder"),
            (("--sample", folder / "log.csv"), "--sample .*log.csv")]:
        with pytest.raises(Mistake, match=words):
            open_run(ddpm, tmp_path, *argv)
    with pytest.raises(Mistake, match="--config and --resume exclude each other"):
        open_toy(tmp_path, "--resume", folder, "--config", folder / "config.json")
    assert open_run(ddpm, tmp_path, "--resume", folder / "checkpoint.pt")[1].folder == folder


LOCKED = """
import sys
sys.path[:0] = {path!r}
from toy import open_toy
from common.cli import Mistake
try:
    open_toy({out!r}, "--resume")
except Mistake as mistake:
    print(mistake)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")
def test_a_run_at_work_elsewhere_is_not_resumed_nor_read(tmp_path):
    _, run = open_toy(tmp_path, "--steps", 2)
    code = LOCKED.format(path=[str(ROOT), str(ROOT / "tests" / "plumbing")], out=str(tmp_path))
    said = []

    def resume_elsewhere(*_):
        run.path("checkpoint.pt").rename(tmp_path / "kept")  # the lock comes before the reading
        run.path("checkpoint.pt").write_bytes(b"half written")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        (tmp_path / "kept").rename(run.path("checkpoint.pt"))
        said.append(done.stdout)

    fit(run, 1, resume_elsewhere)
    assert "another process trains in it" in said[0] and str(run.folder) in said[0]
    open_toy(tmp_path, "--resume")  # this process does not shut itself out


# Damaged and foreign files


@pytest.mark.parametrize("entry", ["script", "seed", "step", "config", "loop", "optimizer",
                                   "random", "model", "ema", "format", "preset", "run"])
@pytest.mark.parametrize("value", [None, "text", [1, 2], {"a": "b"}, 3.5])
def test_a_damaged_entry_is_a_mistake_that_names_the_file(entry, value, folder, tmp_path):
    state = torch.load(folder / "checkpoint.pt") | {entry: value}
    torch.save({k: v for k, v in state.items() if v is not None}, folder / "checkpoint.pt")
    harmless = [("preset", None), ("loop", "text"),
                *(("run", value) for value in (None, "text", [1, 2], {"a": "b"}, 3.5))]
    if any(entry == name and value == kind for name, kind in harmless):
        open_run(ddpm, tmp_path, "--resume", folder)  # nothing that could not be done without
        return
    with pytest.raises(Mistake) as problem:
        ddpm.train(*open_run(ddpm, tmp_path, "--resume", folder))
    assert str(folder) in str(problem.value)


@pytest.mark.parametrize("values, word", [
    ({"T": "ten"}, "T ten: must be of type int"), ({"T": 0}, "T 0"), ({"channels": 16}, "fits this script and its Config"),
    ({"mults": [1, 1]}, "fits this script and its Config"), ({"heads": 3}, "heads 3")])
@pytest.mark.parametrize("how", ["--sample", "--resume"])
def test_a_stored_config_that_does_not_fit(values, word, how, folder, tmp_path):
    state = torch.load(folder / "checkpoint.pt")
    state["config"] |= values
    torch.save(state, folder / "checkpoint.pt")
    with pytest.raises(Mistake, match=word):
        cfg, run, data = open_run(ddpm, tmp_path, how, folder)
        run.trained(ddpm.make_unet(cfg, data.shape)) if run.sampling else ddpm.train(cfg, run, data)


class Executed:
    """A pickle that leaves a trace where it is executed."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("how", ["--sample", "--resume"])
@pytest.mark.parametrize("kind", [
    "empty", "truncated", "last byte missing", "text", "bytes", "zip", "tensor", "dict of weights",
    "whole module", "only the mark", "other script", "pickle"])
def test_foreign_checkpoints(kind, how, trained, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "checkpoint.pt"
    path.parent.mkdir()
    whole = (trained / "checkpoint.pt").read_bytes()
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("readme.txt", "no tensors here")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"format": FORMAT, "a": Executed()}))
    elif kind in ("empty", "truncated", "last byte missing", "text", "bytes"):
        path.write_bytes({"empty": b"", "truncated": whole[:len(whole) // 2], "last byte missing": whole[:-1],
                          "text": b"I am no checkpoint\n", "bytes": bytes(range(256)) * 40}[kind])
    else:
        torch.save({"tensor": torch.randn(3), "dict of weights": {"weight": torch.randn(3)},
                    "whole module": nn.Linear(2, 2), "only the mark": {"format": FORMAT},
                    "other script": torch.load(trained / "checkpoint.pt") | {"script": "score_based"}}[kind], path)
    before = path.read_bytes()
    with pytest.raises(Mistake) as problem:
        open_run(ddpm, tmp_path / "out", how, path.parent)
    said = str(problem.value)
    assert str(path.parent) in said and "\n" not in said and path.read_bytes() == before
    assert ("score_based" in said) == (kind == "other script")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()
    assert not [w for w in recwarn if w.category is not ResourceWarning]


@pytest.mark.parametrize("name, content", [
    ("log.csv", b"\xff\xfe,\xff\n" * 30), ("log.csv", b"some words\nand more\n"), ("log.csv", b"a,b\n1,x\n"),
    ("metrics.json", b""), ("metrics.json", b'{"steps": 2,'), ("metrics.json", b"[1, 2]")])
def test_a_file_that_is_none_is_told_before_the_training(name, content, folder, tmp_path):
    (folder / name).write_bytes(content)
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(Mistake, match=name):
        cfg, run, data = open_run(ddpm, tmp_path, "--resume", folder, "--steps", 3)
        ddpm.train(cfg, run, data)
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_shipped_models_load(tmp_path):
    for page, name in (("ddpm", "ddpm"), ("ddim", "ddpm"), ("latent_diffusion", "latent"),
                       ("conditional_diffusion", "conditional"), ("score_based_diffusion", "score_based")):
        module = importlib.import_module(f"{page}_example")
        cfg, run, data = open_run(module, tmp_path, "--preset", "laptop", "--sample",
                                  ROOT / "pretrained" / f"{name}.pt") if module is not ddim else (
            *runs.open_run("ddim", ddim.Config, ddim.PRESETS, ddim.SAMPLING,
                           ["--sample", str(ROOT / "pretrained" / "ddpm.pt")], reads=("ddpm",)), None)
        assert run.sampling and cfg.steps > 1000


# Sampling and the last line


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
    assert not states.network._forward_hooks and not states.network._forward_pre_hooks
    with pytest.raises(Mistake, match="samples are not finite"):
        run.draw(3, lambda batch: [(0, torch.full((3, 1, 2, 2), float("nan")))], states.network, 3)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_scores_as_many_as_asked_always_the_same_and_keeps_them(tmp_path, monkeypatch):
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
    open_picture(run.path("evaluated.png"))
    assert run.read_metrics()["evaluation"]["n"] == 130
    assert_close(seen[0][0], seen[1][0], rtol=0, atol=0)
    assert seen[0][1] is made and seen[0][2] is None and seen[1][2] is labels
    import numpy as np
    kept = torch.from_numpy(np.load(run.path("evaluated.npz"))["samples"])
    assert kept.dtype == torch.uint8
    assert_close(kept.float() / 127.5 - 1, seen[1][0].clamp(-1, 1), rtol=0, atol=0.004)
    _, other = open_toy(tmp_path, "--evaluate", 130, "--seed", 1)
    other.quality(states, states.network, 3, made)
    assert not torch.equal(seen[0][0], seen[2][0])


def test_the_last_line_says_what_was_measured_and_where(tmp_path, capsys):
    cfg, run = open_toy(tmp_path)
    fit(run)
    run.add_metrics(sampling={"seconds": 2.0}, samples={"legible": 0.5, "n": 64},
                    evaluation={"accuracy": 0.75, "frechet_distance": 12.25})
    run.finish()
    found = run.read_metrics()
    assert found["config"] == json.loads(json.dumps(dataclasses.asdict(cfg)))
    assert found["total_seconds"] >= found["train_seconds"]
    said = capsys.readouterr().out.strip().splitlines()[-1]
    for words in ("trained 0 s", "sampled 2 s", "legible 50% ± 6 points (n = 64)", "as asked 75.0%",
                  "12.2", str(run.folder)):
        assert words in said, said
    _, run = open_toy(tmp_path)
    run.finish()
    said = capsys.readouterr().out.strip()
    assert "trained" not in said and "sampled" not in said and "all in" in said


def test_run_folders_are_unique_and_made_when_first_asked_for(tmp_path):
    made = [open_toy(tmp_path)[1] for _ in range(5)]
    assert list(tmp_path.iterdir()) == []
    folders = {run.folder for run in made}
    assert len(folders) == 5 and all(f.parent == tmp_path / "toy" for f in folders)
    part = made[0].part("coarse", dataclasses.replace(Config(), T=3))
    assert part.folder == made[0].folder / "coarse" and part.cfg.T == 3
    part.add_metrics(a=1)
    assert part.read_metrics() == {"a": 1} and made[0].read_metrics() == {}
    assert PRESETS["laptop"] == Config()
