"""The pages: their commands run as they are typed, at smoke size; links, tables, the two languages."""

import re
import shlex
import shutil
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
from conftest import ROOT, environment, only_run, open_picture
from PIL import Image

PAGES = ["README.md", "README.ko.md", "docs/learn.md", "docs/use.md", "results/README.md", "results/ideas.md"]
ONCE = {"python3", "source", "pip"}  # the installation, which .ci/run does word for word


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text, language="bash"):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(name):
    """The commands of a page, each a list of words, but those for a person's own data."""
    lines = chain.from_iterable(block.splitlines() for block in blocks(page(name))
                                if "folder:pictures" not in block)
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def at_smoke_size(words, cwd):
    """The words of a command as they are started here."""
    program, *argv = words
    if program in ("grep", "git"):
        return words
    start = [sys.executable]
    if program == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", "--master_port=29731", argv.pop(0)]
    script, argv = ROOT / argv[0], argv[1:]
    changed = {"--evaluate": "10", "--steps": "9", "--minutes": "0.001", "--batch_size": "8", "--channels": "8",
               "--T": "30"}
    out, flag = [], ""
    for word in argv:
        if word.startswith("--"):
            flag = word.partition("=")[0]
        elif flag in changed:
            word = changed[flag]
        elif word.startswith("outputs/"):
            word = str(next(cwd.glob(word.replace("DATE", "*"))))
        out.append(word)
    if "fashion_mnist" in out or "paper" in out:  # a download and a GPU: read, not run
        return [*start, script, *out, "--help"]
    if script.name == "make.py":
        return [*start, script, *out, "--list"]
    if script.name in ("judge.py", "machine.py"):
        pytest.fail(f"{script}: has no small size")
    if script.name == "race.py":
        assert "--no_keep" in out
        return [*start, script, *out, "--n", "4", "--preset", "smoke", "--device", "cpu"]
    loaded = {"--sample", "--resume", "--config", "--help", "--preset"} & set(out)
    return [*start, script, *out, *([] if loaded else ["--preset", "smoke"]), "--device", "cpu"]


@pytest.mark.slow
def test_every_command_of_the_pages_runs(tmp_path):
    """In one folder, after a small run of each script, so that --sample draws from these."""
    def start(words):
        cwd = ROOT if words[0] in ("grep", "git") else tmp_path
        done = subprocess.run(list(map(str, words)), cwd=cwd, env=environment(), capture_output=True, text=True)
        differs = words[0] == "git" and done.returncode == 1
        assert done.returncode == 0 or differs, (words, done.stderr[-9000:])
        return done.stdout

    for script in sorted(ROOT.glob("*_example.py")):
        start([sys.executable, script, "--preset", "smoke", "--device", "cpu"])
    ran = []
    for name in ("README.md", "docs/use.md"):
        for words in commands(name):
            if words[0] in ONCE or "pytest" in words:
                continue
            small = at_smoke_size(words, tmp_path)
            said = start(small)
            assert said or words[0] not in ("grep", "git", "torchrun")
            ran.append(" ".join(words))
    assert len(ran) > 20 and any("torchrun" in each for each in ran)


def test_the_installation_is_the_one_that_is_tested():
    """Each is one line, the same but for its last command."""
    start, tests = (re.search(rf"<!-- {name} -->\n```bash\n(.*?)\n```", page("README.md"), re.DOTALL)[1]
                    for name in ("start", "tests"))
    set_up = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python "
    assert start == set_up + "ddpm_example.py" and tests == set_up + "-m pytest"
    assert blocks(page("README.md"))[0].strip() == start  # the first thing to type
    for line in chain.from_iterable(map(str.splitlines, blocks(page("README.md")))):
        if " install torch" in line:  # torch and torchvision always in one call, from one index
            assert "install torch torchvision --index-url" in line and page("README.md").index(line) > 0


def test_ci_runs_the_test_command_word_for_word(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "README.md").write_text("```bash\nexit 1\n```\n<!-- tests -->\n```bash\necho as typed && exit 3\n```\n")
    done = subprocess.run(["bash", tmp_path / ".ci" / "run"], capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout.splitlines() == ["+ echo as typed && exit 3", "as typed"]


def test_uv_installs_what_pip_does():
    text = page("pyproject.toml")
    listed = re.search(r"dependencies = \[\n(.*?)\]", text, re.DOTALL)[1]
    assert re.findall(r'"(.*)"', listed) == page("requirements.txt").split()
    assert "package = false" in text and 'requires-python = ">=3.10"' in text


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    here = (ROOT / name).parent
    for image, target in re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", page(name)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (here / file).resolve() if file else ROOT / name
        assert path.exists(), target
        if image:
            open_picture(path)
        if anchor:
            heads = re.findall(r"(?m)^#+ (.*)$", path.read_text(encoding="utf-8"))
            assert anchor in [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads], target


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_says_what_it_shows(name):
    for words in re.findall(r"!\[([^\]]*)\]", page(name)):
        assert len(words.split()) >= 3, words


def test_the_korean_page_is_the_english_one():
    """The same code, links, pictures and numbers, in the same order."""
    english, korean = page("README.md"), page("README.ko.md")
    assert re.findall(r"```.*?```", english, re.DOTALL) == re.findall(r"```.*?```", korean, re.DOTALL)
    links = [[target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)] for text in (english, korean)]
    swapped = ["README.md" if target == "README.ko.md" else target for target in links[0]]
    assert swapped == links[1]
    tables = [[re.findall(r"`[^`]*`|\d[\d.,]*", line) for line in text.splitlines() if line.startswith("|")]
              for text in (english, korean)]
    for a, b in zip(*tables, strict=True):
        assert sorted(a) == sorted(b)
    heads = [re.findall(r"(?m)^(#+) ", re.sub(r"```.*?```", "", text, flags=re.DOTALL)) for text in (english, korean)]
    assert heads[0] == heads[1]


def test_the_first_page_is_short():
    assert len(page("README.md").splitlines()) <= 320


def test_the_map_of_equations_is_right():
    """Each function of docs/learn.md stands in each script named, and carries one of the numbers."""
    table = re.search(r"## Which equation.*?(\| paper.*?)\n\n", page("docs/learn.md"), re.DOTALL)[1]
    scripts = {name: next(ROOT.glob(f"{name}*_example.py")).read_text()
               for name in ("ddpm", "ddim", "conditional", "latent", "score_based")}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) > 30
    for _, words, functions, where in rows:
        tags = re.findall(r"(?:Eq\.|Alg\.|Sec\.|App\.) [\w.]+\w|\b\d+\b", words)
        for script in where.split(", "):
            found = [re.search(rf"(?m)^(?:def|class) {name}\b.*?(?=^(?:def|class|# %%|@)|\Z)", scripts[script], re.DOTALL)
                     for name in re.findall(r"`(\w+)`", functions)]
            assert all(found), (functions, script)
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


def test_the_citation_can_be_read():
    text = page("CITATION.cff")
    assert re.search(r"(?m)^cff-version: 1\.2\.0$", text) and "license: MIT" in text
    cited = re.findall(r'url: "(https://arxiv.org/abs/[\d.]+)"', text)
    assert len(cited) == 7 and all(url in page("README.md") for url in cited)


@pytest.mark.slow
def test_the_commands_for_a_person_s_own_data(tmp_path):
    """In a folder with such pictures, a mask and a table, each with --preset smoke behind it."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(tmp_path / "broken.png")
    mask = np.full((40, 36), 255, np.uint8)
    mask[10:20, 5:25] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    np.savetxt(tmp_path / "series.csv", rng.normal(size=(20, 30)), delimiter=",")

    readme = page("README.md")
    block = re.search(r"<!-- own data -->\n```bash\n(.*?)```", readme, re.DOTALL)[1]
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len(commands) == 5
    for python, script, *argv in commands:
        assert python == "python"
        smoke = [] if "--sample" in argv else ["--preset", "smoke"]
        done = subprocess.run([sys.executable, ROOT / script, *argv, *smoke, "--device", "cpu"], cwd=tmp_path,
                              env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    completed = only_run(tmp_path / "outputs", "controllable")
    trained, forecast = sorted((tmp_path / "outputs" / "series").iterdir())
    for i in (1, 2, 3):
        open_picture(completed / f"completed_{i}.png")
    assert len(np.loadtxt(trained / "samples.csv", delimiter=",")[0]) == 30
    open_picture(forecast / "forecast.png")
    assert '"forecast": 12' in (forecast / "config.json").read_text()
