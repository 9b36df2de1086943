"""The scripts repeat each other on purpose: what has one name has one text, and stays in its place."""

import ast
import difflib
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*_example.py"))

# Each script's own, alike in shape only: they name the script's settings, run and figures.
OWN = {"Config", "validate", "main", "train", "sample", "draw", "evaluate"}
# (a script, another, name): (most changed lines, why the texts differ)
EXCEPTIONS = {
    ("conditional", other, name): (cap, reason)
    for other in ("ddim", "ddpm", "latent", "score")
    for name, cap, reason in (
        ("ResBlock", 11, "adaptive group norm scales and shifts by time and class (ADM Sec. 3.1)"),
        ("UNet", 13, "class embedding and null class join the time embedding"))
} | {
    (other, "score", "UNet"): (101, "NCSN++ and DDPM++: Fourier features, FIR and BigGAN resampling,"
                               " skip rescaling, progressive input, attention once on the way up")
    for other in ("conditional", "ddim", "ddpm", "latent")
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


def body(path):
    """The lines of a script without docstrings, Config and presets, and the figures section."""
    lines, skip = path.read_text().split("# %% 6.")[0].splitlines(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        documented = isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module))
        if documented and ast.get_docstring(node) is not None:
            skip |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if getattr(node, "name", "") in ("Config", "validate"):
            skip |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.Assign) and node.targets[0].__dict__.get("id") in ("PRESETS", "SAMPLING"):
            skip |= set(range(node.lineno, node.end_lineno + 1))
    return [line for n, line in enumerate(lines, 1) if n not in skip and line.strip()]


def test_ddim_changes_little_of_ddpm():
    changed, diff = changes(body(ROOT / "ddpm_example.py"), body(ROOT / "ddim_example.py"))
    assert len(changed) <= 150, f"{len(changed)} changed lines\n{diff}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_no_script_imports_another(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [n for n in names if "_example" in n], f"{path.name} imports {names}"


@pytest.mark.parametrize("path", sorted((ROOT / "common").glob("*.py")), ids=lambda p: p.stem)
def test_common_holds_no_model_and_no_sampler(path):
    tree = ast.parse(path.read_text())
    classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    modules = [c.name for c in classes if any("Module" in ast.unparse(b) for b in c.bases)]
    assert set(modules) <= {"Classifier"}, f"{path.name} defines {modules}"
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    names |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    names |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    banned = [n for n in names if n in ("betas", "alpha_bars", "eps_hat", "score", "drift", "xt")
              or n.startswith(("ddim", "p_sample", "q_sample", "euler", "ancestral"))]
    assert not banned, f"{path.name} names {banned}"
