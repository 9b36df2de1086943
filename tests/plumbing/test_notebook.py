"""The `# %%` cells one after the other, %run and import: a script in a notebook's kernel."""

import linecache
import re
import sys
import types

from common import cli

import pytest
import torch
from conftest import ROOT, only_run, open_picture

SCRIPTS = sorted(ROOT.glob("*_example.py"))


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
    linecache.clearcache()


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_the_cells_run_one_after_the_other_and_start_nothing(path, kernel, capsys, tmp_path):
    execute, names = kernel
    for number, source in enumerate(re.split(r"(?m)^(?=# %%)", path.read_text())):
        execute(source, number)
    said = capsys.readouterr()
    assert "main([" in said.out and len(said.out.splitlines()) == 1 and not said.err
    with pytest.raises(cli.Mistake, match="^steps 0: must be >= 1$"):
        names["main"](["--steps", "0"])
    with pytest.raises(SystemExit):  # though the comments of a cell's Config cannot be read
        names["main"](["--help"])
    assert "--steps" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_imported_script_trains_and_draws_in_a_few_lines(kernel, tmp_path):
    """The lines of README.md, with fewer steps: a run and a drawing outside main."""
    execute, names = kernel
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- notebook -->\n```python\n(.*?)```", readme, re.DOTALL)[1]
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
