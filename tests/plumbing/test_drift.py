"""The scripts repeat each other on purpose: what has one name has one text, and stays in its place."""

import ast
import difflib
import functools
import importlib
import inspect
import re
import subprocess
from itertools import combinations, product
from typing import get_args, get_origin, get_type_hints

import pytest
from conftest import ROOT

PAGES = sorted(ROOT.glob("*_example.py"))
COMMON = sorted((ROOT / "common").glob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))

# Each script's own, alike in name only: they are of its settings, its run and its figures.
OWN = {"Config", "main", "train", "make_network", "check_settings", "asked_classes"}
DIFFERENCES = (  # scripts that differ from others in {name: most changed lines}, and why
    ("conditional", "ddim ddpm latent score", {"ResBlock": 10, "UNet": 24},
     "time and class scale and shift the second norm (ADM Sec. 3.1); the classes are embedded"),
    ("conditional", "ddpm", {"sample": 7}, "it draws classes, as its Config asks for"),
    ("flow", "ddim ddpm latent score", {"ResBlock": 10, "UNet": 24},
     "time and class scale and shift the second norm (ADM Sec. 3.1); the classes are embedded"),
    ("flow", "score", {"log_likelihood": 40, "bits_per_dim": 10, "measure_likelihood": 20},
     "a velocity and the time at which its path ends, for a score and an SDE; time runs from noise to data"),
    ("score", "ddim ddpm latent", {"UNet": 15}, "random Fourier features of the time"),
    ("latent", "conditional ddim ddpm", {"make_schedule": 8}, "scaled_linear is LDM's schedule"),
    ("latent", "conditional ddim", {"ddim_process": 7}, "latents have no range to clamp x0_hat to"),
    ("latent", "ddim", {"ddim_sample": 6}, "latents have no range to clamp x0_hat to"),
    ("controllable", "conditional", {"train_classifier": 28}, "time is continuous, the SDE makes the noise"),
    ("ncsnpp", "conditional ddim ddpm flow latent score",
     {"Stage": 16, "Downsample": 15, "Upsample": 13, "UNet": 82},
     "the options of SDE App. H: FIR and BigGAN resampling, skip rescaling, the input at every level"))
EXCEPTIONS = {(frozenset((one, other)), name): (most, why) for one, others, names, why in DIFFERENCES
              for other in others.split() for name, most in names.items()}


def stem(path):
    """The name of a script in DIFFERENCES: an experiment's is that of its file."""
    return path.stem.split("_")[0] if path.stem.endswith("_example") else path.stem


@functools.cache
def definitions(path):
    """{name: lines} of the top-level classes and functions of a script."""
    text = path.read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = lines[first - 1:node.end_lineno]
    return found


def differences(a, b):
    """{name: lines of a diff} of what two scripts define by one name and by two texts."""
    one, other, found = definitions(a), definitions(b), {}
    for name in one.keys() & other.keys() - OWN:
        diff = difflib.unified_diff(one[name], other[name], a.name, b.name, lineterm="", n=0)
        changed = [line for line in list(diff)[2:] if line[0] in "+-"]
        if changed and not name.startswith("figure_"):
            found[name] = changed
    return found


PAIRS = [*combinations(PAGES, 2), *product(PAGES, EXPERIMENTS)]


def test_shared_names_have_one_text():
    wrong, needed = [], set()
    for a, b in PAIRS:
        for name, diff in differences(a, b).items():
            key = frozenset((stem(a), stem(b))), name
            needed.add(key)
            if len(diff) > EXCEPTIONS.get(key, (0, ""))[0]:
                wrong.append("\n".join([f"{name} of {a.name} and of {b.name}: {len(diff)} lines", *diff]))
    assert not wrong, "\n\n".join(wrong)
    assert needed == set(EXCEPTIONS)  # none is stale


@pytest.mark.parametrize("name", ["train", "figure_preview", "figure_loss"])
def test_ddim_trains_and_looks_on_as_ddpm_does(name):
    one, other = (definitions(ROOT / f"{page}_example.py")[name] for page in ("ddpm", "ddim"))
    assert one == other


def test_every_training_loop_makes_its_step_by_the_same_lines():
    """The optimiser, and all from the loss to the log."""
    for pattern in (r"optimizer = torch.optim.AdamW\(\n.*?\n\n",
                    r" {8}optimizer.zero_grad\(\)\n.*?run.log\(loss=loss, grad_norm=norm\)\n"):
        found = [re.search(pattern, "\n".join(definitions(page)["train"]), re.DOTALL)[0] for page in PAGES]
        assert len(set(found)) == 1, found


def test_the_check_sees_an_edited_copy(tmp_path):
    source = (ROOT / "ddpm_example.py").read_text()
    copy = tmp_path / "copy_example.py"
    copy.write_text(source.replace("alpha_bar.sqrt() * x0 +", "alpha_bar * x0 +", 1))
    found = differences(ROOT / "ddpm_example.py", copy)
    assert list(found) == ["q_sample"] and found["q_sample"][0].startswith("-    return alpha_bar.sqrt()")


def test_the_diff_of_ddpm_and_ddim_is_short_enough_to_read():
    done = subprocess.run(["git", "diff", "--no-index", "--numstat", "ddpm_example.py", "ddim_example.py"],
                          cwd=ROOT, capture_output=True, text=True)
    added, removed, _ = done.stdout.split(maxsplit=2)
    assert 0 < int(added) + int(removed) <= 250


@pytest.mark.parametrize("path", [*PAGES, *COMMON, *EXPERIMENTS], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_page_fits_a_projector(path):
    assert not [line for line in path.read_text().splitlines() if len(line) > 88]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_every_hyperparameter_says_all_on_its_line(path):
    """Type, default and meaning; a whole number has a range."""
    Config = importlib.import_module(path.stem).Config
    comments = re.findall(r"(?m)^    (\w+): .* = .*?  # (.{6,})$", inspect.getsource(Config))
    hints = get_type_hints(Config, include_extras=True)
    assert [name for name, _ in comments] == list(hints)
    for name, hint in hints.items():
        kind = get_args(hint)[0] if get_origin(hint) is tuple else hint
        assert kind is not int, f"{name} has no range"


@pytest.mark.parametrize("path", [*PAGES, *COMMON], ids=lambda p: p.stem)
def test_neither_a_page_nor_common_imports_a_page_or_an_experiment(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not re.search("_example|experiments", ast.unparse(node)), ast.unparse(node)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_the_page_leaves_drawing_files_and_clocks_to_common(path):
    """No matplotlib, no checkpoint, no scaler, no clock and no signal in a page."""
    text = path.read_text()
    for word in ("plt.", "torch.manual_seed", "matplotlib", "torch.save", "torch.load(", "GradScaler",
                 "torch.autocast", "perf_counter", ".state_dict(", "signal."):
        assert word not in text, word


def test_no_page_asks_which_sde_it_has():
    tree = ast.parse((ROOT / "score_based_diffusion_example.py").read_text())
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [call for call in calls if call.startswith("isinstance") and "SDE" in call]


@pytest.mark.parametrize("path", COMMON, ids=lambda p: p.stem)
def test_common_holds_no_model_and_no_sampler(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = {node.name for node in nodes if isinstance(node, ast.ClassDef)
               and any("Module" in ast.unparse(base) for base in node.bases)}
    assert modules <= {"Judge"}
    names = {getattr(node, field, "") for node in nodes for field in ("id", "arg", "name")}
    words = r"betas|alpha_bars|eps_hat|score|drift|xt|(ddim|p_sample|q_sample|euler|ancestral).*"
    assert not [name for name in names if name and re.fullmatch(words, name)]
