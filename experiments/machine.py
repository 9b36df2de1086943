"""What the machine costs: the start of a script, and two trainings side by side.

    python experiments/machine.py          about two minutes; prints the lines below

Seconds of `import torch`, of a mistake on the command line and of --help; then the
seconds of a training step of ddpm_example.py alone and beside another one.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = str(Path(__file__).parent.parent / "ddpm_example.py")
STEPS, REPEATS = 150, 5


def seconds(*command):
    """The median of a command's wall time."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *command], capture_output=True)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def step_seconds(processes):
    """Seconds of a default training step, the mean over processes side by side."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, SCRIPT, "--device", "cpu", "--steps", str(STEPS),
                   "--n_samples", "1", "--T", "20", "--out"]
        running = [subprocess.Popen([*command, f"{out}/{i}"], stdout=subprocess.DEVNULL,
                                    stderr=subprocess.DEVNULL)
                   for i in range(processes)]
        for process in running:
            process.wait()
        texts = [file.read_text() for file in Path(out).glob("*/ddpm/*/metrics.json")]
    speeds = [float(re.search(r'"steps_per_second": ([\d.]+)', text)[1])
              for text in texts]
    return statistics.mean(1 / speed for speed in speeds)


def main():
    bare = seconds("-c", "import torch")
    print(f"import torch {bare:.2f} s")
    for what, argv in (("a mistake", ["--stpes", "3"]), ("--help", ["--help"])):
        took = seconds(SCRIPT, *argv)
        print(f"{what:<12} {took:.2f} s, {took / bare:.2f} times as long")
    alone, pair = step_seconds(1), step_seconds(2)
    print(f"a training step alone {alone:.3f} s, in a pair {pair:.3f} s, "
          f"{pair / alone:.1f} times as long")


if __name__ == "__main__":
    main()
