"""What no paper is about: machine, command line, data, runs, drawing, quality."""

import os

# Idle threads of OpenMP spin before they sleep, and starve whoever shares the machine:
# two trainings side by side took 6 to 9 times as long each, with a short spin twice to
# three times. Alone it costs up to a fifth (results/machine.py measures both). GNU's
# OpenMP reads this when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
