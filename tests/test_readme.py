"""The commands of README.md run as they are typed, at smoke size."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, environment, open_picture
from PIL import Image


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

    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- own data -->\n```bash\n(.*?)```", readme, re.DOTALL)[1]
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len(commands) == 5
    for python, script, *argv in commands:
        assert python == "python"
        smoke = [] if "--sample" in argv else ["--preset", "smoke"]
        done = subprocess.run([sys.executable, ROOT / script, *argv, *smoke, "--device", "cpu"], cwd=tmp_path,
                              env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    runs = sorted((tmp_path / "outputs" / "score_based").iterdir())
    _, completed, trained, forecast = runs
    for i in (1, 2, 3):
        open_picture(completed / f"completed_{i}.png")
    assert len(np.loadtxt(trained / "samples.csv", delimiter=",")[0]) == 30
    open_picture(forecast / "forecast.png")
    assert '"forecast": 12' in (forecast / "config.json").read_text()
