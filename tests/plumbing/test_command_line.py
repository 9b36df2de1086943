"""The command line: flags, the types of a Config, and what becomes of mistakes and other errors."""

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
import types
from typing import Annotated, Literal, get_args

import pytest
import torch
from conftest import ROOT, environment, open_run
from toy import PRESETS, Config, fit, network, open_toy

import ddpm_example as ddpm
from common import cli, device
from common import run as runs
from common.cli import Mistake, Range, check_config, command_line, config_from, parse_args

PAGES = ("ddpm", "ddim", "latent_diffusion", "conditional_diffusion", "score_based_diffusion")


def parse(*argv):
    return parse_args(Config, PRESETS, list(argv))


# Flags


def test_flags_override_the_preset_with_either_spelling():
    assert parse()[0] == Config()
    assert parse("--preset", "smoke")[0] == PRESETS["smoke"]
    cfg, opts = parse("--preset", "smoke", "--T", "7", "--batch-size", "3")
    assert cfg == dataclasses.replace(PRESETS["smoke"], T=7, batch_size=3)
    assert opts.given == {"T": 7, "batch_size": 3}
    assert parse("--widths", "1", "2", "4", "--flip")[0] == Config(widths=(1, 2, 4), flip=True)
    assert not parse("--no-flip")[0].flip
    assert parse("--grad-checkpointing")[1].grad_checkpointing
    assert parse("--no-compile")[1].compile is False and parse()[1].compile is None


def test_a_data_set_takes_the_preset_of_its_name():
    Sets = dataclasses.make_dataclass("Sets", [("dataset", str, "digits"), ("T", int, 10)])
    presets = {"digits": Sets(), "csv": Sets("csv:PATH", 5), "smoke": Sets(T=2)}

    def read(*argv):
        cfg, opts = parse_args(Sets, presets, list(argv))
        return cfg.dataset, cfg.T, opts.preset

    assert read("--dataset=csv:/a/b:c.csv", "--T", "7") == ("csv:/a/b:c.csv", 7, "csv")
    assert read("--dataset", "csv:a.csv", "--preset", "smoke") == ("csv:a.csv", 2, "smoke")
    assert read("--dataset", "membrane") == ("membrane", 10, None)


def test_help_shows_comment_range_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "diffusion steps (paper: 1000) {>= 1} [10]" in said
    assert "peak learning rate, in 100% plain words {> 0} [0.01]" in said
    assert "width of each level {>= 1} [1 2]" in said and "{a,b}" in said


@pytest.mark.parametrize("page", PAGES)
def test_every_field_has_a_help_text_and_every_preset_keeps_the_ranges(page):
    module = importlib.import_module(f"{page}_example")
    fields = {field.name for field in dataclasses.fields(module.Config)}
    assert set(cli._comments(module.Config)) == fields and set(module.SAMPLING) < fields
    for preset in module.PRESETS.values():
        check_config(preset)


def test_arguments_of_a_notebook_kernel_are_ignored(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "kernel.json"])
    assert parse_args(Config, PRESETS)[0] == Config()


# Types and comments


@pytest.mark.parametrize("name, bad, good", [
    ("T", (0, -3, 10**10), (1, 10**6)), ("lr", (0.0, -1.0, float("nan"), float("inf")), (1e-9, 3.0)),
    ("widths", ((1, 0), (-1,)), ((5,), ())), ("warmup", (-1,), (0, 7)), ("kind", ("c", ""), ("b",))])
def test_a_type_is_a_range(name, bad, good):
    for value in bad:
        with pytest.raises(Mistake, match=rf"^{name} .*must be"):
            check_config(Config(**{name: value}))
    for value in good:
        check_config(Config(**{name: value}))


def test_each_type_allows_what_its_words_say():
    for hint, words, inside, outside in (
            (cli.Count, ">= 1", (1, 9), (0,)), (cli.Whole, ">= 0", (0, 9), (-1,)),
            (cli.Positive, "> 0", (1e-9,), (0.0,)), (cli.NonNegative, ">= 0", (0.0, 7.0), (-1e-9,)),
            (cli.Probability, "in [0, 1]", (0.0, 1.0), (-0.1, 1.1)),
            (cli.Fraction, "in [0, 1)", (0.0, 0.99), (1.0,)),
            (cli.OpenFraction, "in (0, 1)", (0.5,), (0.0, 1.0))):
        range_ = get_args(hint)[1]
        assert range_.words == words
        assert all(map(range_.allows, inside)) and not any(map(range_.allows, outside))


@pytest.mark.parametrize("edit", [
    ("# diffusion steps (paper: 1000)", "# was 1000 -> 500, in [3, 5], > 99"),
    ("# diffusion steps (paper: 1000)", ""),
    ("    # sampling\n", ""),
    ("    n_samples: Count = 4               # samples drawn at the end", "    n_samples: Count = 4"),
    ("    # training\n", "    # other\n    # >= 1000\n")])
def test_a_comment_never_changes_what_the_program_does(edit, tmp_path, monkeypatch):
    source = (ROOT / "tests/plumbing/toy.py").read_text()
    assert edit[0] in source
    (tmp_path / "edited_toy.py").write_text(source.replace(*edit))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "edited_toy", raising=False)
    edited = importlib.import_module("edited_toy")
    check_config(edited.Config())
    cfg, _ = parse_args(edited.Config, edited.PRESETS, ["--T", "4", "--n_samples", "9"])
    assert dataclasses.asdict(cfg) == dataclasses.asdict(Config(T=4, n_samples=9))
    with pytest.raises(Mistake, match="T 0"):
        check_config(edited.Config(T=0))
    merged = cli.merge_config(edited.Config(), cfg, edited.SAMPLING, {"n_samples": 9}, "x")
    assert (merged.n_samples, merged.T) == (9, 10)


def test_a_field_that_the_script_gains_or_loses_leaves_old_checkpoints_readable(capsys):
    @dataclasses.dataclass(frozen=True)
    class Edited:
        T: cli.Count = 10
        new: float = 0.5

    cfg = config_from({"T": 3, "old": 1}, Edited, "--sample x")
    assert cfg == Edited(T=3, new=0.5)
    assert "new, old" in capsys.readouterr().out


def test_a_stored_config_keeps_its_types():
    hints = dataclasses.asdict(Config(widths=(3, 4), lr=2.0))
    assert config_from(json.loads(json.dumps(hints | {"lr": 2})), Config, "x") == Config(widths=(3, 4), lr=2.0)
    for name, value in (("T", 1.5), ("T", "3"), ("widths", 3), ("widths", [1, 1.5]), ("flip", "no"),
                        ("lr", "fast"), ("T", 10**400)):
        with pytest.raises(Mistake, match=f"x: {name} .*must be"):
            config_from(hints | {name: value}, Config, "x")
    for other in ([], {}, {"colour": "blue"}, None):
        with pytest.raises(Mistake, match="not one of this script"):
            config_from(other, Config, "x")


@pytest.mark.parametrize("hint", [int | None, list[int], dict])
def test_a_type_that_no_flag_can_have_is_named(hint):
    Odd = dataclasses.make_dataclass("Odd", [("dataset", str, "digits"), ("a", hint, None)])
    with pytest.raises(TypeError, match="is no type of a setting"):
        parse_args(Odd, {"own": Odd()}, [])


def test_a_person_s_own_range():
    @dataclasses.dataclass
    class Own:
        w: Annotated[float, Range(">= -1", lambda w: w >= -1)] = 0.0
        plain: float = 1.0
        n: Literal[2, 4] = 2
        noted: Annotated[int, "a note", Range(">= 1", lambda n: n >= 1)] = 1

    check_config(Own(w=-1.0))
    for wrong in (Own(w=-1.5), Own(plain=float("nan")), Own(n=3), Own(noted=0)):
        with pytest.raises(Mistake):
            check_config(wrong)


# Mistakes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of ddpm with a checkpoint of two steps."""
    cfg, run, data = open_run(ddpm, tmp_path_factory.mktemp("trained"), "--steps", "2")
    ddpm.train(cfg, run, data)
    return run.folder


def refused(capsys, tmp_path, *argv, main=ddpm.main, out=None):
    """Run a script that must refuse; its one line of complaint. Nothing may be written."""
    out = tmp_path / "out" if out is None else out
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        preset = [] if {"--preset", "--config"} & set(argv) else ["--preset", "smoke"]
        main([*preset, "--out", str(out), *map(str, argv)])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said
    assert sorted(tmp_path.rglob("*")) == before, "something was written"
    return said[0]


@pytest.mark.parametrize("argv, words", [
    (["--no_such_flag", "1"], ["--no_such_flag: no such flag"]),
    (["--chanels", "8"], ["--chanels: no such flag, the nearest is --channels"]),
    (["--batchsize", "8"], ["--batchsize: no such flag", "--batch_size"]),
    (["surplus"], ["surplus"]),
    (["--preset", "huge"], ["--preset", "huge", "laptop", "smoke", "paper"]),
    (["--dataset", "birds"], ["--dataset birds", "digits", "folder:PATH"]),
    (["--device", "tpu"], ["--device", "tpu", "auto", "cpu", "cuda", "mps"]),
    (["--T", "many"], ["--T", "many"]),
    (["--T"], ["--T"]),
    (["--mults", "1", "x"], ["--mults", "x"]),
    (["--T", "0"], ["--T 0: must be >= 1"]),
    (["--lr", "0"], ["--lr 0.0: must be > 0"]),
    (["--lr", "nan"], ["--lr nan: must be > 0"]),
    (["--beta_1", "0"], ["--beta_1 0.0: must be in (0, 1)"]),
    (["--schedule", "square"], ["--schedule", "square", "linear", "cosine"]),
    (["--image_size", "30"], ["--image_size 30", "28, 32"]),
    (["--image_size", "-8"], ["--image_size -8", ">= 0"]),
    (["--mults", "1", "2", "2", "2"], ["28", "16", "32"]),
    (["--mults"], ["--mults"]),
    (["--mults", "1", "0"], ["--mults 1 0: must be >= 1"]),
    (["--heads", "3"], ["--heads 3: must divide channels 8"]),
    (["--groups", "3"], ["--groups 3: must divide channels 8"]),
    (["--channels", "2", "--groups", "1"], ["--channels 2", "even and at least 4"]),
    (["--channels", "5", "--groups", "1"], ["--channels 5", "even"]),
    (["--dropout", "1"], ["--dropout 1.0: must be in [0, 1)"]),
    (["--amp", "fp8"], ["--amp", "fp8", "off", "bf16", "fp16"]),
    (["--amp", "fp16", "--device", "cpu"], ["--amp fp16", "off, bf16 on cpu"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--seed", str(2**63)], [f"--seed {2**63}"]),
    (["--evaluate", "1"], ["--evaluate 1", "in [10, 1e6]"]),
    (["--resume", "--sample"], ["--resume", "--sample"]),
    (["--config", "/no/such/config.json"], ["--config /no/such/config.json"]),
    (["--sample", "/no/such/checkpoint.pt"], ["/no/such/checkpoint.pt"]),
    (["--resume", "/no/such/run"], ["/no/such/run"]),
    (["--resume"], ["--resume: no run of ddpm"]),
    (["--dataset", "folder:/no/such/folder"], ["--dataset folder:/no/such/folder"]),
    (["--dataset", "folder:"], ["folder:"]),
    (["--dataset", "two_moons"], ["--dataset two_moons", "score_based"]),
    (["--dataset", "csv:none.csv"], ["--dataset csv:", "none.csv: must be one of", "experiments/series.py"]),
    (["--steps", "1" + 400 * "0"], ["--steps 1000", "at most 1e+09"]),
    (["--n_samples", "1" + 5000 * "0"], ["--n_samples"]),
    (["--sample", "a\0b"], ["--sample"]),
    (["--sample", 300 * "a"], ["--sample aaa", "File name too long"]),
    (["--resume", 300 * "a"], ["--resume aaa"]),
    (["--sample", "3", "1", "4"], ["1 4", "--sample takes one checkpoint"]),
    (["--sample", ""], ["--sample '': must name a path"]),
    (["--resume", ""], ["--resume '': must name a path"]),
    (["--config", ""], ["--config '': must name a path"]),
    (["--beta_1", "0.5"], ["--beta_1 0.5: must be in [1e-6, --beta_T 0.02]"]),
    (["--beta_1", "1e-300", "--beta_T", "1e-300"], ["--beta_1 1e-300: must be in [1e-6,"]),
], ids=lambda x: " ".join(x)[:40] if isinstance(x, list) and x and x[0][:2] == "--" else "")
def test_a_mistake_is_one_line_that_names_it(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # "folder:" alone is the current folder, here without pictures
    said = refused(capsys, tmp_path, *argv)
    for word in words:
        assert word in said, said
    assert len(said) < 500


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_absent_accelerator(kind, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    said = refused(capsys, tmp_path, "--device", kind)
    assert f"--device {kind}" in said and "cpu" in said


def test_auto_takes_cuda_before_mps_before_the_cpu(monkeypatch):
    for cuda, mps, chosen in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert device.pick_device("auto").type == chosen


@pytest.mark.parametrize("values", [
    {"RANK": "abc", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, {"RANK": "1"}, {"WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}])
def test_variables_of_torchrun_that_do_not_fit(values, capsys, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        ddpm.main(["--preset", "smoke", "--out", str(tmp_path)])
    said = capsys.readouterr().err  # also where RANK says that another process is the first
    assert stop.value.code == 2 and "RANK below WORLD_SIZE" in said and said.count("\n") == 1
    assert all(f"{name}={value}" in said for name, value in values.items())
    assert list(tmp_path.iterdir()) == []


def test_an_attention_that_no_level_has_is_said(capsys):
    sizes = dict(image_size=28, channels=8, heads=1, groups=4, patch=2)
    ddpm.UNet(1, mults=(1, 2), attention=(7, 9), **sizes)
    said = capsys.readouterr().out
    assert "--attention 9 changes nothing" in said and "14 7" in said
    ddpm.UNet(1, mults=(1, 2), attention=(14, 7), **sizes)
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "runs", tmp_path / "file", "a\0b"):
        said = refused(capsys, tmp_path, "--steps", 1, out=out)
        assert "--out" in said and "cannot be written" in said
    assert (tmp_path / "file").read_text() == "x"


def test_a_config_file_of_another_kind(capsys, tmp_path, trained):
    for text in ("", "{", "[]", '{"config": {}}', '{"seed": 0, "config": []}', '{"seed": -1, "config": {"T": 3}}'):
        (tmp_path / "config.json").write_text(text)
        assert "config.json" in refused(capsys, tmp_path, "--config", tmp_path / "config.json")
    stored = json.loads((trained / "config.json").read_text())
    stored["config"]["lr"] = float("nan")
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert "lr nan: must be > 0" in refused(capsys, tmp_path, "--config", tmp_path / "config.json")


def test_settings_that_no_data_fits_are_refused_before_training(capsys, tmp_path):
    from PIL import Image

    (tmp_path / "empty").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    said = refused(capsys, tmp_path, "--dataset", f"folder:{tmp_path}", "--evaluate", "10")
    assert "--evaluate 10" in said and "no labels" in said
    assert "found 0" in refused(capsys, tmp_path, "--dataset", f"folder:{tmp_path / 'empty'}")


@pytest.mark.skipif(shutil.which("git") is None, reason="git lists the scripts")
def test_the_pages_refuse_the_same_way(capsys, tmp_path):
    for page in PAGES:
        main = importlib.import_module(f"{page}_example").main
        assert "--chanels" in refused(capsys, tmp_path, "--chanels", "8", main=main)
        assert "--batch_size 0" in refused(capsys, tmp_path, "--batch_size", "0", main=main)


# Other errors keep their traceback


def unpack():
    _, _ = (1, 2, 3)


@pytest.mark.parametrize("error", [
    unpack, lambda: list(zip([1], [1, 2], strict=True)), lambda: [1].index(2),
    lambda: torch.ones(3).reshape(2), lambda: {}["absent"], lambda: open("/no/such/file"),
    lambda: int("three"), lambda: (_ for _ in ()).throw(RuntimeError("illegal memory access"))])
@pytest.mark.parametrize("place", ["load_images", "make_unet", "draw_t"])
def test_a_student_s_own_error_keeps_its_traceback(error, place, tmp_path, monkeypatch, capsys):
    """In a function of the page that main calls before the training, or the training itself."""
    def broken(*args):
        error()

    monkeypatch.setattr(ddpm, place, broken)
    with pytest.raises((ValueError, RuntimeError, KeyError, OSError)) as problem:
        ddpm.main(["--preset", "smoke", "--out", str(tmp_path)])
    assert not isinstance(problem.value, Mistake) and "error: " not in capsys.readouterr().err
    assert "broken" in [entry.name for entry in problem.traceback]


def test_a_mistake_is_an_exception_in_a_notebook_and_a_line_elsewhere(monkeypatch, capsys):
    space = {"Mistake": Mistake, "Config": Config, "__name__": "script"}
    exec("def main(argv=None):\n    raise Mistake(argv)", space)
    main = command_line(space["main"])
    for text, line in (("T 30: must be\nat most 20", "error: --T 30: must be at most 20\n"),
                       ("mask x: is black", "error: mask x: is black\n"),
                       ("--resume x: no", "error: --resume x: no\n")):
        with pytest.raises(SystemExit) as stop:
            main(text)
        assert stop.value.code == 2 and capsys.readouterr().err == line
    kernel = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=1))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    with pytest.raises(Mistake):
        main("T 30: must be at most 20")
    assert capsys.readouterr().err == ""


def test_every_process_prints_its_error(monkeypatch, capsys):
    space = {"Mistake": Mistake, "__name__": "script"}
    exec("def main(argv=None):\n    raise Mistake('no')", space)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        command_line(space["main"])()
    assert capsys.readouterr().err == "process 3: error: no\n"


@pytest.mark.parametrize("problem", [
    MemoryError("Unable to allocate 7 TiB"), torch.OutOfMemoryError("CUDA out of memory. Tried ..."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes.\nmore")])
def test_too_little_memory_is_one_line_with_the_flags_that_help(problem, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ddpm, "make_unet", lambda *_: (_ for _ in ()).throw(problem))
    said = refused(capsys, tmp_path)
    assert "--batch_size" in said and "--channels" in said


# How long it takes to start


@pytest.mark.slow
def test_what_a_start_imports():
    """What takes seconds to import is imported where it is needed, and torchvision not for digits."""
    code = ("import sys; sys.argv = ['x', '--help']\n"
            "import ddpm_example, common.data\n"
            "try: ddpm_example.main()\nexcept SystemExit: pass\n"
            "common.data.load_images('digits')\n"
            "print([m for m in ('sklearn', 'scipy', 'matplotlib', 'torchvision', 'IPython') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr[-2000:]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for flag in ("out", "config", "sample", "resume"):
        if flag == "config":
            (tmp_path / "x").write_text('{"config": {"T": 3}, "seed": 1}')
        _, opts = cli.parse_args(Config, PRESETS, [f"--{flag}=~/x"])
        assert getattr(opts, flag) == str(tmp_path / "x")


@pytest.mark.parametrize("argv, said", [
    (["--warmup", "9", "--steps", "5"], True), (["--warmup", "5", "--steps", "5"], False),
    (["--steps", "5"], False)])
def test_a_warm_up_longer_than_the_training_is_said(argv, said, tmp_path, capsys):
    open_toy(tmp_path, *argv)
    assert ("warm-up of 9 steps is longer" in capsys.readouterr().out) == said


def test_another_out_with_resume_is_said(tmp_path, capsys):
    _, run = open_toy(tmp_path / "one")
    fit(run)
    for out, said in ((tmp_path / "two", True), (tmp_path / "one", False)):
        capsys.readouterr()
        open_toy(out, "--resume", run.folder)
        assert ("not used, the run goes on in its own folder" in capsys.readouterr().out) == said


def test_the_help_of_a_config_that_inherits_has_the_comments_of_both(capsys):
    import experiments.series as series

    with pytest.raises(SystemExit):
        cli.parse_args(series.Config, series.PRESETS, ["--help"])
    said = capsys.readouterr().out
    assert "peak learning rate" in said and "forecast" in said


def test_compile_without_a_compiler_is_one_line_before_the_training(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("No working C++ compiler found\nand a page more")

    monkeypatch.setattr(torch, "compile", broken)
    _, run = open_toy(tmp_path, "--compile")
    with pytest.raises(Mistake, match="--compile: torch.compile does not work here .No working C.. compiler found.;"):
        fit(run)
    assert not list(tmp_path.rglob("checkpoint.pt"))


@pytest.mark.parametrize("name, flag", [("model", "--lr 0.01"), ("vae", "--vae_lr 0.5")])
def test_a_loss_that_is_not_finite_names_the_rate_s_flag(name, flag, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Two(Config):
        vae_lr: float = 0.5

    _, run = runs.open_run("toy", Two, {"laptop": Two()}, (), ["--device", "cpu", "--out", str(tmp_path)])
    model = network()
    with pytest.raises(Mistake, match=f"loss is nan at step 1, {flag} may be too high"):
        for _ in run.steps(2, name, **{name: model}):
            run.log(loss=float("nan"))
