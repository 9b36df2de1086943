"""The scripts repeat each other on purpose: what has one name has one text, and stays in its place."""

import ast
import difflib
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

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
    ("conditional", "score", "train_classifier"): (34, "time is continuous, the SDE makes the noise")
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
    assert changed(*papers) <= 210


@pytest.mark.parametrize("path", SCRIPTS + COMMON, ids=lambda p: p.stem)
def test_a_page_fits_a_projector(path):
    long = [f"{path.name}:{n}: {line}" for n, line in enumerate(path.read_text().splitlines(), 1)
            if len(line) > 88]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_hyperparameter_says_all_on_its_line(path):
    """Type, default and meaning; a number its range; nothing else validates in a script."""
    import importlib

    from common.cli import get_args, get_type_hints, read_lines

    module = importlib.import_module(path.stem)
    hints, lines = get_type_hints(module.Config), read_lines(module.Config)
    assert set(lines) == set(hints)
    for name, line in lines.items():
        numbers = any(kind in (int, float) for kind in (hints[name], *get_args(hints[name])))
        assert len(line.comment) > 5 and line.block, name
        assert not numbers or line.rule, f"{name} has no range: {line.comment}"
    assert "n_samples" in [n for n, line in lines.items() if line.block == "sampling"]
    assert not {"validate", "SAMPLING"} & set(vars(module))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_no_script_imports_another(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [n for n in names if "_example" in n], f"{path.name} imports {names}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_the_page_draws_times_and_steps_by_common_alone(path):
    """No matplotlib, no learning-rate rule, no checkpoint and no interval of a bar in a script."""
    text = path.read_text()
    for word in ("plt.", "torch.manual_seed", "matplotlib", "torch.save", "torch.load", "GradScaler", "autocast", "perf_counter",
                 "clip_grad_norm_", "state_dict", "bar.update", "signal."):
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


# What every start of a script passes


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_common_comes_before_torch(path):
    """It sets how idle threads wait, which OpenMP reads when torch is loaded."""
    modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
               for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    first = [name.partition(".")[0] for name in modules]
    assert first.index("common") < min(first.index(name) for name in ("torch", "tqdm") if name in first)


@pytest.mark.parametrize("user, expected", [
    ({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)])
def test_idle_threads_spin_briefly_unless_the_user_says_otherwise(user, expected):
    code = "import os, sys, common; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept | user, capture_output=True, text=True)
    assert said.stdout.strip() == str(expected), said.stderr


@pytest.mark.slow
def test_no_script_loads_at_its_start_what_only_a_run_needs():
    names = ", ".join(path.stem for path in SCRIPTS)
    code = (f"import sys, {names}; "
            "print([m for m in ('matplotlib', 'scipy', 'sklearn', 'torchvision', 'PIL') if m in sys.modules])")
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.strip() == "[]", said.stdout + said.stderr
