"""The `# %%` cells one after the other, %run and import: a script in a notebook's kernel."""

import linecache
import re
import sys
import types

from common import cli, plotting

import pytest
import torch
from conftest import ROOT, only_run, open_picture

SCRIPTS = sorted(ROOT.glob("*_example.py"))


def cells(path):
    """The cells as Jupyter sees them: what stands between the `# %%` lines."""
    return re.split(r"(?m)^(?=# %%)", path.read_text())


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A namespace like a kernel's: no __file__, the kernel's own arguments, the repository importable."""
    shell = types.SimpleNamespace(kernel=object())
    fake = types.SimpleNamespace(get_ipython=lambda: shell, version_info=(9, 0))
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setattr(sys, "argv", ["/usr/lib/ipykernel_launcher.py", "-f", "kernel-1.json"])
    monkeypatch.chdir(tmp_path)
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert not hasattr(main, "__file__")

    def execute(source, number):
        name = f"<ipython-input-{number}>"  # IPython keeps the source of a cell here
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec"), vars(main))

    yield execute, vars(main)
    for name in [name for name in linecache.cache if name.startswith("<ipython-input-")]:
        del linecache.cache[name]


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_the_cells_run_one_after_the_other_and_start_nothing(path, kernel, capsys, tmp_path):
    execute, names = kernel
    for number, source in enumerate(cells(path)):
        execute(source, number)
    said = capsys.readouterr()
    assert "main([" in said.out and len(said.out.splitlines()) == 1 and not said.err
    assert list(tmp_path.iterdir()) == []  # no training, no folder
    with pytest.raises(cli.Mistake, match="^steps 0: must be >= 1$"):
        names["main"](["--steps", "0"])
    with pytest.raises(SystemExit):  # though the comments of a cell's Config cannot be read
        names["main"](["--help"])
    assert "--steps" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_main_runs_from_a_cell_when_it_is_told_to(kernel, tmp_path, monkeypatch):
    execute, names = kernel
    for number, source in enumerate(cells(ROOT / "ddpm_example.py")):
        execute(source, number)
    for name, draw in list(vars(plotting).items()):  # takes most of the time
        if hasattr(draw, "__wrapped__") and name[0] != "_":
            monkeypatch.setattr(plotting, name, lambda *_, **__: None)
    execute('main(["--preset", "smoke", "--device", "cpu"])', 99)
    assert (only_run(tmp_path / "outputs", "ddpm") / "metrics.json").exists()


@pytest.mark.slow
def test_an_imported_script_trains_and_draws_in_a_few_lines(kernel, tmp_path):
    """The lines of README.md, with fewer steps."""
    execute, names = kernel
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- notebook -->\n```python\n(.*?)```", readme, re.DOTALL)[1]
    for line in ("run = new_run(", "data = run.load(load_images, run.cfg.dataset)\n",
                 "x = ddpm.sample(model, (16, *data.shape), schedule)"):
        assert line in block
    lines = block.replace("Config(steps=500)", "Config(steps=3, T=20, channels=8, groups=4)")
    assert lines != block
    execute(lines, 1)
    assert names["x"].shape == (16, 1, 28, 28) and torch.isfinite(names["x"]).all()
    folder = only_run(tmp_path / "outputs", "ddpm")
    assert (folder / "checkpoint.pt").exists() and open_picture(folder / "mine.png")


def test_run_is_a_command(kernel, monkeypatch, capsys):
    """%run puts the script into sys.argv; then its last line starts it. So does main() of an import."""
    _, names = kernel
    source = "def main(argv=None):\n    started.append(argv)\n"
    for module, argv0, expected in (("__main__", "there/toy_example.py", [None]),
                                    ("__main__", "ipykernel_launcher.py", []),
                                    ("toy_example", "ipykernel_launcher.py", [None])):
        names |= {"started": [], "__name__": module}
        exec(compile(source, "here/toy_example.py", "exec"), names)
        monkeypatch.setattr(sys, "argv", [argv0, "--preset", "smoke"])
        cli.command_line(names["main"])()
        assert names["started"] == expected
    assert capsys.readouterr().out.count("main([])") == 1
