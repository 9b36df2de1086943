"""The command line: flags, the types of a Config, and what becomes of mistakes and other errors."""

import dataclasses
import importlib
import json
import math
import sys
import types
from typing import Annotated, Literal

import pytest
import torch
from conftest import script_name
from toy import PRESETS, Config, fit, open_toy

import ddpm_example as ddpm
from common import cli
from common.cli import Mistake, Range, check_config, command_line, config_from, parse_args

PAGES = [importlib.import_module(f"{name}_example") for name in (
    "ddpm", "ddim", "latent_diffusion", "conditional_diffusion", "score_based_diffusion", "flow_matching")]


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
    import experiments.series as series  # its Config inherits

    said = []
    for own, presets in ((Config, PRESETS), (series.Config, series.PRESETS)):
        with pytest.raises(SystemExit) as stop:
            parse_args(own, presets, ["--help"])
        said.append(" ".join(capsys.readouterr().out.split()))
        assert stop.value.code == 0
    assert "diffusion steps (paper: 1000) {>= 1} [10]" in said[0]
    assert "peak learning rate, in 100% plain words {> 0} [0.01]" in said[0]
    assert "width of each level {>= 1} [1 2]" in said[0] and "{a,b}" in said[0]
    assert "peak learning rate" in said[1] and "forecast" in said[1]


def test_every_preset_keeps_the_ranges_and_every_sampling_field_is_one():
    for page in PAGES:
        assert set(page.SAMPLING) < {field.name for field in dataclasses.fields(page.Config)}
        for preset in page.PRESETS.values():
            check_config(preset)


def test_arguments_of_a_notebook_kernel_are_ignored(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "kernel.json"])
    assert parse_args(Config, PRESETS)[0] == Config()


# Types


@pytest.mark.parametrize("hint, words, inside, outside", [
    (cli.Count, ">= 1", (1, 9, 10**9), (0, -5)), (cli.Count, "at most 1e+09", (), (10**10,)),
    (cli.Whole, ">= 0", (0, 9), (-1,)), (cli.Positive, "> 0", (1e-9,), (0.0, math.nan, math.inf)),
    (cli.NonNegative, ">= 0", (0.0, 7.0), (-1e-9,)), (cli.Probability, "in [0, 1]", (0.0, 1.0), (-0.1, 1.1)),
    (cli.Fraction, "in [0, 1)", (0.0, 0.99), (1.0,)), (cli.OpenFraction, "in (0, 1)", (0.5,), (0.0, 1.0)),
    (Literal["a", "b"], "one of a, b", ("b",), ("c", "")), (float, "finite", (-1.0,), (math.nan,)),
    (tuple[cli.Count, ...], ">= 1", ((5,), ()), ((1, 0), (-1,))),
    (Annotated[float, Range("in [-1, 0]", lambda x: -1 <= x <= 0)], "in [-1, 0]", (-1.0,), (-1.5, 0.1))])
def test_each_type_allows_what_its_words_say(hint, words, inside, outside):
    One = dataclasses.make_dataclass("One", [("a", hint)])
    for value in inside:
        check_config(One(value))
    for value in outside:
        with pytest.raises(Mistake, match="^a .*must be ") as problem:
            check_config(One(value))
        assert words in str(problem.value)


def test_a_field_that_the_script_gains_or_loses_leaves_old_checkpoints_readable(capsys):
    Edited = dataclasses.make_dataclass("Edited", [("T", cli.Count, 10), ("new", float, 0.5)])
    assert config_from({"T": 3, "old": 1}, Edited, "--sample x") == Edited(T=3, new=0.5)
    assert "new, old" in capsys.readouterr().out


def test_a_stored_config_keeps_its_types():
    hints = dataclasses.asdict(Config(widths=(3, 4), lr=2.0))
    assert config_from(json.loads(json.dumps(hints | {"lr": 2})), Config, "x") == Config(widths=(3, 4), lr=2.0)
    for name, value in (("T", 1.5), ("T", "3"), ("widths", 3), ("widths", [1, 1.5]), ("flip", "no"), ("T", 10**400)):
        with pytest.raises(Mistake, match=f"x: {name} .*must be"):
            config_from(hints | {name: value}, Config, "x")
    for other in ([], {"colour": "blue"}):
        with pytest.raises(Mistake, match="not one of this script"):
            config_from(other, Config, "x")


def test_a_type_that_no_flag_can_have_is_named():
    Odd = dataclasses.make_dataclass("Odd", [("dataset", str, "digits"), ("a", list[int], None)])
    with pytest.raises(TypeError, match="is no type of a setting"):
        parse_args(Odd, {"own": Odd()}, [])


# Mistakes


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
    (["surplus"], ["surplus"]),
    (["--preset", "huge"], ["--preset", "huge", "laptop", "smoke", "paper"]),
    (["--dataset", "birds"], ["--dataset birds", "digits", "folder:PATH"]),
    (["--device", "tpu"], ["--device", "tpu", "auto", "cpu", "cuda", "mps"]),
    (["--T", "many"], ["--T", "many"]),
    (["--T", "0"], ["--T 0: must be >= 1"]),
    (["--mults", "1", "0"], ["--mults 1 0: must be >= 1"]),
    (["--mults"], ["--mults: needs at least one"]),
    (["--mults", "1", "2", "2", "2"], ["28", "16", "32"]),
    (["--lr", "nan"], ["--lr nan: must be > 0"]),
    (["--image_size", "30"], ["--image_size 30", "28, 32"]),
    (["--heads", "3"], ["--heads 3: must divide channels 8"]),
    (["--groups", "3"], ["--groups 3: must divide channels 8"]),
    (["--channels", "2", "--groups", "1"], ["--channels 2", "even and at least 4"]),
    (["--channels", "5", "--groups", "1"], ["--channels 5", "even"]),
    (["--amp", "fp16", "--device", "cpu"], ["--amp fp16", "off, bf16 on cpu"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--evaluate", "1"], ["--evaluate 1", "in [10, 1e6]"]),
    (["--config", "/no/such/config.json"], ["--config /no/such/config.json"]),
    (["--sample", "/no/such/checkpoint.pt"], ["--sample /no/such/checkpoint.pt"]),
    (["--resume"], ["--resume: no run of ddpm"]),
    (["--dataset", "two_moons"], ["--dataset two_moons", "score_based"]),
    (["--dataset", "csv:none.csv"], ["--dataset csv:", "none.csv: must be one of", "experiments/series.py"]),
    (["--steps", "1" + 400 * "0"], ["--steps 1000", "at most 1e+09"]),
    (["--sample", "a\0b"], ["--sample"]),
    (["--resume", 300 * "a"], ["--resume aaa"]),
    (["--sample", "3", "1", "4"], ["1 4", "--sample takes one checkpoint"]),
    *((["--" + name, ""], [f"--{name} '': must name a path"]) for name in ("sample", "resume", "config", "out")),
    (["--beta_1", "0.5"], ["--beta_1 0.5: must be in [1e-6, --beta_T 0.02]"]),
], ids=lambda x: " ".join(x)[:40] if isinstance(x, list) and x and x[0][:2] == "--" else "")
def test_a_mistake_is_one_line_that_names_it(argv, words, capsys, tmp_path):
    said = refused(capsys, tmp_path, *argv)
    for word in words:
        assert word in said, said
    assert len(said) < 500


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "runs", tmp_path / "file", "a\0b"):
        with pytest.raises(Mistake, match="(?s)^--out .*cannot be written"):
            fit(open_toy(out)[1])
    assert (tmp_path / "file").read_text() == "x"


def test_a_config_file_of_another_kind(capsys, tmp_path):
    file = tmp_path / "config.json"
    fields = json.dumps(dataclasses.asdict(ddpm.Config(lr=math.nan)))
    for text, words in (
            ("", ""), ("{", ""), ("[]", ""), ('{"config": {}}', ""), ('{"seed": 0, "config": []}', ""),
            ('{"seed": -1, "config": {"T": 3}}', "seed"), (f'{{"seed": 0, "config": {fields}}}', "lr nan: must be > 0")):
        file.write_text(text)
        said = refused(capsys, tmp_path, "--config", file)
        assert f"--config {file}: " in said and words in said


@pytest.mark.parametrize("page", PAGES, ids=script_name)
def test_the_pages_refuse_the_same_way(page, capsys, tmp_path):
    assert "--chanels" in refused(capsys, tmp_path, "--chanels", "8", main=page.main)
    assert "--batch_size 0" in refused(capsys, tmp_path, "--batch_size", "0", main=page.main)


# Other errors keep their traceback


@pytest.mark.parametrize("error", [ValueError("too many values"), KeyError("absent"), FileNotFoundError("file"),
                                   RuntimeError("illegal memory access")])
@pytest.mark.parametrize("place", ["load_images", "draw_t"])
def test_a_student_s_own_error_keeps_its_traceback(error, place, tmp_path, monkeypatch, capsys):
    """In a function of the page that main calls before the training, or the training itself."""
    def broken(*args):
        raise error

    monkeypatch.setattr(ddpm, place, broken)
    with pytest.raises(type(error)) as problem:
        ddpm.main(["--preset", "smoke", "--image_size", "8", "--out", str(tmp_path)])
    assert problem.value is error and "error: " not in capsys.readouterr().err


def test_a_mistake_is_a_line_and_in_a_notebook_an_exception(monkeypatch, capsys):
    @command_line
    def main(argv):  # of this module, whose Config has a field T
        raise Mistake(argv)

    for text, line in (("T 30: must be\nat most 20", "error: --T 30: must be at most 20\n"),
                       ("mask x: is black", "error: mask x: is black\n"),
                       ("--resume x: no", "error: --resume x: no\n")):
        with pytest.raises(SystemExit) as stop:
            main(text)
        assert stop.value.code == 2 and capsys.readouterr().err == line
    monkeypatch.setenv("RANK", "3")  # of several processes each prints its own
    with pytest.raises(SystemExit):
        main("no")
    assert capsys.readouterr().err == "process 3: error: no\n"
    kernel = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=1))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    with pytest.raises(Mistake):
        main("T 30: must be at most 20")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("problem", [
    MemoryError("Unable to allocate 7 TiB"), torch.OutOfMemoryError("CUDA out of memory. Tried ..."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes.\nmore")])
def test_too_little_memory_is_one_line_with_the_flags_that_help(problem, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ddpm, "make_unet", lambda *_: (_ for _ in ()).throw(problem))
    said = refused(capsys, tmp_path)
    assert "--batch_size" in said and "--channels" in said


def test_what_takes_seconds_to_import_is_imported_where_it_is_needed(monkeypatch, capsys):
    """--help and the bundled digits need torch and numpy alone."""
    slow = ("sklearn", "scipy", "matplotlib", "torchvision", "IPython")
    for name in list(sys.modules):
        if name.split(".")[0] in (*slow, "common", "ddpm_example"):
            monkeypatch.delitem(sys.modules, name)  # the page is imported anew
    for name in slow:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    page = importlib.import_module("ddpm_example")
    with pytest.raises(SystemExit):
        page.main(["--help"])
    assert page is not ddpm and "--steps" in capsys.readouterr().out
    assert page.load_images("digits").shape == (1, 28, 28)


@pytest.mark.parametrize("flag", ["out", "config", "sample", "resume"])
def test_a_tilde_is_the_home_folder(flag, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").write_text('{"config": {"T": 3}, "seed": 1}')
    assert getattr(parse(f"--{flag}=~/x")[1], flag) == str(tmp_path / "x")


def test_flags_that_change_nothing_are_said(tmp_path, capsys):
    def said(*argv):
        open_toy(*argv)
        return capsys.readouterr().out

    assert "warm-up of 9 steps is longer" in said(tmp_path, "--warmup", 9, "--steps", 5)
    assert said(tmp_path, "--warmup", 5, "--steps", 5) == said(tmp_path, "--steps", 5) == ""
    _, run = open_toy(tmp_path / "one")
    fit(run)
    assert "not used, the run goes on in its own folder" in said(tmp_path / "two", "--resume", run.folder)
    assert "not used" not in said(tmp_path / "one", "--resume", run.folder)
    sizes = dict(image_size=28, channels=8, heads=1, groups=4, patch=2)
    for attention, words in (((7, 9), "--attention 9 changes nothing"), ((14, 7), "")):
        ddpm.UNet(1, mults=(1, 2), attention=attention, **sizes)
        assert words in (out := capsys.readouterr().out) and bool(words) == bool(out)
