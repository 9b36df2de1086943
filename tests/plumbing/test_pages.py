"""README and docs: their commands run as they are typed, at smoke size; links, tables, the two languages."""

import functools
import importlib
import inspect
import json
import re
import shlex
import shutil
import subprocess
from itertools import chain
from types import SimpleNamespace

from common import data, plotting
from common.cli import parse_args

import numpy as np
import pytest
import torch
from conftest import ROOT, experiment, only_run, open_picture
from PIL import Image

PAGES = ["README.md", "README.ko.md", "docs/learn.md", "docs/use.md", "results/README.md", "results/ideas.md"]
NOT_RUN = {"python3", "source", "pip", "git", "grep"}  # the installation and reading, tested below and in test_drift
# Appended to a command, where the last value of a flag counts
SMALL = {"--evaluate": "10", "--steps": "9", "--channels": "8", "--T": "30", "--image_size": "16"}
SMALL_SAMPLES = {"conditional_diffusion_example.py": "--S 2 --w -1 2", "ddim_example.py": "--S 2 --n_samples 2",
                 "flow_matching_example.py": "--S 2 --likelihood 0 --n_samples 2",
                 "latent_diffusion_example.py": "--S 2 --n_samples 2",
                 "score_based_diffusion_example.py": "--N 2 --likelihood 0 --n_samples 2 --tolerance 0.1"}


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text, language="bash"):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text):
    """The commands of the blocks of a text, each a list of words."""
    lines = chain.from_iterable(map(str.splitlines, blocks(text)))
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@functools.cache
def module_of(script):
    """A script as a module: "ddpm_example.py" or "experiments/race.py"."""
    name = script.removesuffix(".py")
    return experiment(name.partition("/")[2]) if "/" in name else importlib.import_module(name)


def run(words):
    """Run `python SCRIPT ...` in this process; a mistake is an exit status other than 0."""
    try:
        module_of(words[1]).main(words[2:])
    except SystemExit as end:
        assert not end.code, words


# Commands


class Understood(Exception):
    """A script has read its command line, and would begin."""


def read_only(words, monkeypatch):
    """Let a script read the command line `python SCRIPT ...` and stop there; return its Config, if it has one."""
    def open_run(script, Config, presets, sampling=(), argv=None, **_):
        raise Understood(parse_args(Config, presets, list(argv))[0])

    module = module_of(words[1])
    words = [word for word in words if word != "--config" and "DATE" not in word]  # a file that is not there
    takes_flags = "argv" in inspect.signature(getattr(module, "main", lambda: None)).parameters
    assert takes_flags or not any(word.startswith("-") for word in words), words
    if not hasattr(module, "open_run") or not takes_flags:
        return None
    with monkeypatch.context() as patch, pytest.raises(Understood) as read:
        patch.setattr(module, "open_run", open_run)
        module.main(words[2:])
    return read.value.args[0]


def written_commands():
    """{command: where it stands} in blocks and sentences of the pages, in docstrings, and in make.py."""
    found = {}
    for name in PAGES:
        for words in commands(page(name)):
            if words[0] == "torchrun":
                words = ["python", *words[2:]]
            found[" ".join(words)] = name
        # in sentences; the table of evidence holds the commands of older commits
        lines = [line for line in page(name).splitlines() if not line.startswith("| `python ")]
        found |= dict.fromkeys(re.findall(r"`(python \S+\.py[^`]*)`", "\n".join(lines)), name)
    for path in [*ROOT.glob("*_example.py"), *ROOT.glob("experiments/*.py")]:
        about = inspect.getdoc(module_of(str(path.relative_to(ROOT))))
        found |= dict.fromkeys(re.findall(r"(?m)^ {4}(python \S+(?: \S+)*)", about), path.name)
    steps = experiment("make").STEPS.values()
    found |= dict.fromkeys(("python " + re.sub(r"{\w+}", "RUN", step.command) for step in steps), "make.py")
    return {command: where for command, where in found.items() if command.startswith("python ")}


@pytest.mark.slow
def test_every_command_that_is_written_is_understood(monkeypatch):
    """Its script exists and takes these flags and values, whatever it would take to run it."""
    found = written_commands()
    for command, where in found.items():
        words = shlex.split(command)
        assert (ROOT / words[1]).exists(), (command, where)
        if words[1] != "experiments/make.py" and "--help" not in words:
            read_only(words, monkeypatch)
    assert len(found) > 80 and {"python ddpm_example.py --batch_size 256", "python experiments/fid.py RUN",
                                "python experiments/compare.py --seconds 240"} <= set(found)
    paper = read_only("python ddpm_example.py --preset paper --device cuda".split(), monkeypatch)
    assert paper.channels == 128
    assert read_only("python experiments/race.py --drawing uniform".split(), monkeypatch).drawing == "uniform"


@pytest.mark.slow
def test_every_command_of_the_pages_runs(tmp_path, monkeypatch, drawings, finished, capsys):
    """One after the other in one folder, as a reader types them; --sample draws from the shipped models.

    The shipped DDPM takes a thousand steps, so that ddpm_example.py draws from a smoke run.
    """
    import torchvision.datasets

    def downloaded(root, train, download):
        pixels = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8)
        return SimpleNamespace(data=pixels, targets=[*range(10)] * 2, classes=list("abcdefghij"))

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", downloaded)
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(plotting, "loss_by_t", lambda loss, edges, title: {})  # slow, and tested elsewhere
    monkeypatch.setattr(module_of("flow_matching_example.py"), "figure_steps", lambda *_: None)
    monkeypatch.setattr(module_of("score_based_diffusion_example.py"), "figure_samplers", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    smoke, _ = finished(module_of("ddpm_example.py"), "--dataset", "digits8")
    ran = []
    for name in ("README.md", "docs/use.md"):
        for words in commands(page(name).replace("<!-- own data -->\n```bash", "")):
            if words[0] in NOT_RUN or words in ran or "race.py" in words[1] or "pytest" in words:
                continue  # test_results runs a race
            ran.append(words)
            if words[0] == "torchrun" or "paper" in words or words[2:] == ["--resume"]:
                continue  # a process of its own, a GPU, the same with --steps: understood, see above
            words = [word if "DATE" not in word else str(next(tmp_path.glob(word.replace("DATE", "*"))))
                     for word in words]
            small = [f"{flag}={value}" for flag, value in SMALL.items() if flag in words]
            loads = {"--sample", "--resume", "--config"} & set(words)
            if words[1] == "experiments/make.py":
                small += ["--list"]
            elif not loads | {"--preset", "--help"} & set(words):
                small += ["--preset=smoke"] + ["--dataset=digits8"] * ("--dataset" not in words)
            elif words[1:] == ["ddpm_example.py", "--sample"]:
                small += ["--sample", str(smoke)]
            elif "--sample" in words and words[1] != "ddpm_example.py":
                small += SMALL_SAMPLES[words[1]].split()
            elif "--resume" in words and "--steps" in words:
                small += ["--steps=11"]
            run(words + small)
            if "--sample" in words and words[1] != "ddpm_example.py":
                assert f"loaded {ROOT / 'pretrained'}" in capsys.readouterr().out, words
    assert len(ran) > 16 and any("torchrun" in words for words in ran)
    newest = max((tmp_path / "outputs" / "ddpm").glob("*/checkpoint.pt"), key=lambda file: file.stat().st_mtime)
    assert torch.load(newest)["step"] == 11  # the last command of docs/use.md trained its newest run on
    assert json.loads((newest.parent / "config.json").read_text())["config"]["steps"] == 11


@pytest.mark.slow
def test_the_commands_for_a_person_s_own_data(tmp_path, monkeypatch, drawings):
    """In a folder with such pictures, a mask and a table."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(tmp_path / "broken.png")
    mask = np.full((40, 36), 255, np.uint8)
    mask[10:20, 5:25] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    np.savetxt(tmp_path / "series.csv", rng.normal(size=(20, 30)), delimiter=",")
    monkeypatch.chdir(tmp_path)

    typed = commands(page("README.md").partition("<!-- own data -->\n")[2].partition("\n\n")[0])
    assert len(typed) == 5
    for words in typed:
        small = [f"{flag}={value}" for flag, value in SMALL.items() if flag in words]
        run([*words, *small, *(["--preset=smoke"] if "--sample" not in words else []), "--device=cpu"])
    assert only_run(tmp_path / "outputs", "controllable").is_dir()
    assert all(drawings[f"completed_{i}.png"]["x"].shape == (3, 16, 16) for i in (1, 2, 3))
    trained, forecast = sorted((tmp_path / "outputs" / "series").iterdir())
    assert len(np.loadtxt(trained / "samples.csv", delimiter=",")[0]) == 30
    assert (forecast / "forecast.png").exists() and '"forecast": 12' in (forecast / "config.json").read_text()


def test_the_installation_is_the_one_that_is_tested():
    """Each is one line, the same but for its last command."""
    start, tests = (re.search(rf"<!-- {name} -->\n```bash\n(.*?)\n```", page("README.md"), re.DOTALL)[1]
                    for name in ("start", "tests"))
    set_up = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python "
    assert start == set_up + "ddpm_example.py" and tests == set_up + "-m pytest"
    assert blocks(page("README.md"))[0].strip() == start  # the first thing to type
    lines = [line for line in page("README.md").splitlines() if "pip install torch" in line]
    assert lines and all("install torch torchvision --index-url" in line for line in lines)  # both from one index
    listed = re.search(r"dependencies = \[\n(.*?)\]", page("pyproject.toml"), re.DOTALL)[1]  # what uv installs
    assert re.findall(r'"(.*)"', listed) == page("requirements.txt").split()


def test_ci_runs_the_test_command_word_for_word(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "README.md").write_text("```bash\nexit 1\n```\n<!-- tests -->\n```bash\necho as typed && exit 3\n```\n")
    done = subprocess.run(["bash", tmp_path / ".ci" / "run"], capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout.splitlines() == ["+ echo as typed && exit 3", "as typed"]


def test_what_the_pages_read_off_the_scripts_is_there():
    """grep finds what it looks for, and the files that a sentence names exist."""
    searched = [words for words in commands(page("README.md")) if words[0] == "grep"]
    assert searched
    for _, _, text, file in searched:
        assert text in page(file)
    for name in PAGES:
        for file in re.findall(r"`((?:tests|experiments|results|common|docs)/[\w/]+\.\w+)`", page(name)):
            assert (ROOT / file).exists(), (name, file)


# Links, pictures, languages


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere_and_pictures_say_what_they_show(name):
    here = (ROOT / name).parent
    for image, words, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)]+)\)", page(name)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (here / file).resolve() if file else ROOT / name
        assert path.exists(), target
        if image:
            open_picture(path)
            assert len(words.split()) >= 3, words
        if anchor:
            heads = re.findall(r"(?m)^#+ (.*)$", path.read_text(encoding="utf-8"))
            assert anchor in [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads], target


def test_the_korean_page_is_the_english_one():
    """The same code, links, pictures and numbers, in the same order."""
    english, korean = page("README.md"), page("README.ko.md")
    assert re.findall(r"```.*?```", english, re.DOTALL) == re.findall(r"```.*?```", korean, re.DOTALL)
    links = [[target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)] for text in (english, korean)]
    assert ["README.md" if target == "README.ko.md" else target for target in links[0]] == links[1]
    tables = [[re.findall(r"`[^`]*`|\d[\d.,]*", line) for line in text.splitlines() if line.startswith("|")]
              for text in (english, korean)]
    for a, b in zip(*tables, strict=True):
        assert sorted(a) == sorted(b)
    heads = [re.findall(r"(?m)^(#+) ", re.sub(r"```.*?```", "", text, flags=re.DOTALL)) for text in (english, korean)]
    assert heads[0] == heads[1]


def test_the_heads_of_korean_tables_are_korean():
    """But for columns that are names, code or numbers; those that make.py writes, too."""
    lines = page("README.ko.md").splitlines()
    heads = [line.strip("| ").split(" | ") for line, below in zip(lines, lines[1:], strict=False)
             if below.startswith("| ---")]
    assert len(heads) > 7
    for head in heads:
        assert re.search("[가-힣]", head[0]) or head[0].startswith("`"), head
        english = [cell for cell in head if re.fullmatch(r"[a-z][a-zA-Z ,-]{3,}", cell) and cell != "diffusers"]
        assert not english, head


def test_the_map_of_equations_is_right():
    """Each function of docs/learn.md stands in each script named, and carries one of the numbers."""
    table = re.search(r"## Which equation.*?(\| paper.*?)\n\n", page("docs/learn.md"), re.DOTALL)[1]
    scripts = {name: next(ROOT.glob(f"{name}*_example.py")).read_text()
               for name in ("ddpm", "ddim", "conditional", "latent", "score_based", "flow_matching")}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) > 30
    for _, words, functions, where in rows:
        tags = re.findall(r"(?:Eq\.|Alg\.|Sec\.|App\.) [\w.]+\w|\b\d+\b", words)
        for script in where.split(", "):
            found = [re.search(rf"(?m)^ *(?:def|class) {name}\b.*?(?=^(?:def|class|# %%|@)|\Z)", scripts[script],
                               re.DOTALL)
                     for name in re.findall(r"`(?:\w+\.)?(\w+)`", functions)]
            assert found and all(found), (functions, script)
            text = "".join(match[0] for match in found)
            missing = [tag for tag in tags if not re.search(rf"\b{re.escape(tag)}\b", text)]
            assert not missing, (words, script, missing)


def test_a_checkpoint_is_loaded_in_ten_lines(monkeypatch):
    code, = blocks(re.search(r"<!-- checkpoint -->(.*)", page("docs/use.md"), re.DOTALL)[1].split("## ")[0], "python")
    assert len([line for line in code.splitlines() if line]) <= 11
    monkeypatch.chdir(ROOT)
    names = {}
    exec(code.replace("cfg.T, cfg.beta_1", "5, cfg.beta_1"), names)
    assert names["x"].shape == (4, 1, 28, 28) and names["x"].isfinite().all()
    state = names["state"]["ema"]
    assert all((value == state[name].float()).all() for name, value in names["model"].state_dict().items())


def test_the_citation_can_be_read_and_the_first_page_is_short():
    text = page("CITATION.cff")
    assert re.search(r"(?m)^cff-version: 1\.2\.0$", text) and "license: MIT" in text
    cited = re.findall(r'url: "(https://arxiv.org/abs/[\d.]+)"', text)
    assert len(cited) == 9 and all(url in page("README.md") for url in cited)
    assert len(page("README.md").splitlines()) <= 320
