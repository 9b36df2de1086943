"""The scripts repeat each other on purpose: what has one name has one text, and stays in its place."""

import ast
import difflib
import importlib
import inspect
import io
import re
import subprocess
import sys
import tokenize
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from common import cli

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*_example.py"))
COMMON = sorted((ROOT / "common").glob("*.py"))

# Each script's own, alike in shape only: they name the script's settings, run and figures.
OWN = {"Config", "main", "train", "sample"}
# (a script, another, name): (most changed lines, why the texts differ)
EXCEPTIONS = {
    ("conditional", other, name): (cap, reason)
    for other in ("ddim", "ddpm", "latent", "score")
    for name, cap, reason in (
        ("ResBlock", 13, "adaptive group norm scales and shifts by time and class (ADM Sec. 3.1)"),
        ("UNet", 15, "class embedding and null class join the time embedding"))
} | {
    (other, "score", "UNet"): (113, "NCSN++ and DDPM++: Fourier features, FIR and BigGAN resampling,"
                               " skip rescaling, progressive input, attention once on the way up")
    for other in ("conditional", "ddim", "ddpm", "latent")
} | {
    (other, "latent", "make_schedule"): (11, "the schedule of LDM's code: linear square roots")
    for other in ("conditional", "ddim", "ddpm")
} | {
    ("conditional", "score", "train_classifier"): (38, "time is continuous, the SDE makes the noise")
}


def definitions(path):
    """{name: source text} of the top-level classes and functions of a script."""
    text = path.read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = lines[first - 1:node.end_lineno]
    return found


def changes(a, b):
    """The lines of a unified diff, without its header and context."""
    diff = list(difflib.unified_diff(a, b, "one copy", "the other", lineterm="", n=0))
    return [line for line in diff[2:] if line[0] in "+-"], "\n".join(diff)


def drift(a, b):
    """What is wrong between two scripts: a list of messages, each with the diff."""
    one, other = definitions(a), definitions(b)
    shared = [n for n in one if n in other and n not in OWN and not n.startswith("figure_")]
    wrong = []
    for name in shared:
        changed, diff = changes(one[name], other[name])
        pair = tuple(sorted((a.stem.split("_")[0], b.stem.split("_")[0])))
        cap, _ = EXCEPTIONS.get((*pair, name), (0, ""))
        if len(changed) > cap:
            wrong.append(f"{name} differs between {a.name} and {b.name}: {len(changed)} lines, "
                         f"allowed {cap}\n{diff}")
    return wrong


PAIRS = list(combinations(SCRIPTS, 2))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0].stem}-{p[1].stem}")
def test_shared_names_have_one_text(pair):
    wrong = drift(*pair)
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("name", ["train", "figure_preview", "figure_loss", "figure_denoising"])
def test_ddim_trains_and_looks_on_as_ddpm_does(name):
    one, other = (definitions(ROOT / f"{script}_example.py")[name] for script in ("ddpm", "ddim"))
    assert one == other, changes(one, other)[1]


def test_the_check_sees_an_edited_copy(tmp_path):
    source = (ROOT / "ddpm_example.py").read_text()
    copy = tmp_path / "copy_example.py"
    copy.write_text(source.replace("alpha_bar.sqrt() * x0 +", "alpha_bar * x0 +", 1))
    wrong = drift(ROOT / "ddpm_example.py", copy)
    assert len(wrong) == 1 and "q_sample" in wrong[0] and "-    return alpha_bar.sqrt()" in wrong[0]


def test_exceptions_are_needed_and_reasoned():
    for (a, b, name), (cap, reason) in EXCEPTIONS.items():
        one = definitions(ROOT / next(p.name for p in SCRIPTS if p.name.startswith(a)))
        other = definitions(ROOT / next(p.name for p in SCRIPTS if p.name.startswith(b)))
        assert reason and 0 < len(changes(one[name], other[name])[0]) <= cap, name


def test_the_diff_of_ddpm_and_ddim_is_short_enough_to_read(tmp_path):
    """As `git diff --no-index --stat` counts it: the papers' part, and all with the figures."""
    def changed(*files):
        told = subprocess.run(["git", "diff", "--no-index", "--numstat", *files], cwd=ROOT,
                              capture_output=True, text=True)
        return sum(map(int, told.stdout.split()[:2]))

    papers = []
    for name in ("ddpm_example.py", "ddim_example.py"):
        page, figures, _ = (ROOT / name).read_text().partition(". Figures and main")
        assert figures
        papers.append(tmp_path / name)
        papers[-1].write_text(page)
    assert changed(*papers) <= 220


@pytest.mark.parametrize("path", SCRIPTS + COMMON, ids=lambda p: p.stem)
def test_a_page_fits_a_projector(path):
    long = [f"{path.name}:{n}: {line}" for n, line in enumerate(path.read_text().splitlines(), 1)
            if len(line) > 88]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_hyperparameter_says_all_on_its_line(path):
    """Type, default and meaning; a whole number has a range, a float has one or may be any finite number."""
    module = importlib.import_module(path.stem)
    comments = dict(re.findall(r"(?m)^    (\w+): .* = .*?  # (.+)$", inspect.getsource(module.Config)))
    hints = get_type_hints(module.Config, include_extras=True)
    assert set(comments) == set(hints) and all(len(comment) > 5 for comment in comments.values())
    for name, hint in hints.items():
        kind = get_args(hint)[0] if get_origin(hint) is tuple else hint
        assert kind is not int, f"{name} has no range"
    assert set(module.SAMPLING) <= set(hints) and "n_samples" in module.SAMPLING


def without_comments(text):
    """A program without its comments."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    return "\n".join(lines) + "\n"


def refusals(module):
    """{field: what is said where it is -1, None where that is allowed}."""
    found, cfg = {}, cli.parse_args(module.Config, module.PRESETS, ["--preset", "smoke"])[0]
    for name, value in vars(cfg).items():
        try:
            cli.check_config(replace(cfg, **{name: (-1,) if isinstance(value, tuple) else -1}))
            found[name] = None
        except cli.Mistake as problem:
            found[name] = str(problem)
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_comments_are_for_readers_alone(path, tmp_path, monkeypatch):
    """A script without a single comment takes and refuses the same settings."""
    (tmp_path / f"bare_{path.name}").write_text(without_comments(path.read_text()))
    monkeypatch.syspath_prepend(tmp_path)
    module, bare = importlib.import_module(path.stem), importlib.import_module(f"bare_{path.stem}")
    assert "  # " in inspect.getsource(module.Config) and "#" not in inspect.getsource(bare.Config)
    assert {n: vars(c) for n, c in bare.PRESETS.items()} == {n: vars(c) for n, c in module.PRESETS.items()}
    assert refusals(bare) == refusals(module)
    assert refusals(bare)["steps"] == "steps -1: must be >= 1"


@pytest.mark.parametrize("path", SCRIPTS + COMMON, ids=lambda p: p.stem)
def test_neither_a_script_nor_common_imports_a_script(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [n for n in names if "_example" in n], f"{path.name} imports {names}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_the_page_leaves_drawing_files_and_clocks_to_common(path):
    """No matplotlib, no checkpoint, no scaler, no clock and no signal in a script."""
    text = path.read_text()
    for word in ("plt.", "torch.manual_seed", "matplotlib", "torch.save", "torch.load", "GradScaler",
                 "torch.autocast", "perf_counter", ".state_dict(", "signal."):
        assert word not in text, f"{path.name} has {word}"


def test_no_script_asks_which_sde_it_has():
    tree = ast.parse((ROOT / "score_based_diffusion_example.py").read_text())
    asked = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Call)
             and getattr(n.func, "id", "") == "isinstance" and "SDE" in ast.unparse(n)]
    assert not asked


@pytest.mark.parametrize("path", COMMON, ids=lambda p: p.stem)
def test_common_holds_no_model_and_no_sampler(path):
    tree = ast.parse(path.read_text())
    classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    modules = [c.name for c in classes if any("Module" in ast.unparse(b) for b in c.bases)]
    assert set(modules) <= {"Judge"}, f"{path.name} defines {modules}"
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    names |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    names |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    banned = [n for n in names if n in ("betas", "alpha_bars", "eps_hat", "score", "drift", "xt")
              or n.startswith(("ddim", "p_sample", "q_sample", "euler", "ancestral"))]
    assert not banned, f"{path.name} names {banned}"


@pytest.mark.slow
def test_no_script_loads_at_its_start_what_only_a_run_needs():
    names = ", ".join(path.stem for path in SCRIPTS)
    code = (f"import sys, {names}; "
            "print([m for m in ('matplotlib', 'scipy', 'sklearn', 'torchvision', 'PIL') "
            "if m in sys.modules])")
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.strip() == "[]", said.stdout + said.stderr
