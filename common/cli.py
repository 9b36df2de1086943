"""Command line: one flag for each field of a script's Config, and the settings every run shares."""

import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import get_args, get_type_hints

KERNELS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")


def fail(message):
    """End the program with one line on standard error and exit status 2 for a user's mistake."""
    if os.environ.get("RANK", "0") == "0":  # under torchrun every process finds the mistake
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(cfg, **rules):
    """Hold each named field of cfg to its rule; the first that breaks it ends the program.

    A rule is the text shown to the user: ">= 1", "> 0", an interval such as "(0, 1)" or "[0, 1)",
    or a tuple of allowed words. A tuple field is checked entry by entry.
    """
    for name, rule in rules.items():
        value = getattr(cfg, name)
        for entry in value if isinstance(value, tuple) else (value,):
            if not _allowed(entry, rule):
                text = "one of " + ", ".join(rule) if isinstance(rule, tuple) else rule
                where = f"in {text}" if text[0] in "([" else text
                fail(f"--{name} {_spell(value)}: must be {where}")


def _allowed(value, rule):
    if isinstance(rule, tuple):
        return value in rule
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if rule.startswith(">="):
        return value >= float(rule[2:])
    if rule.startswith(">"):
        return value > float(rule[1:])
    low, high = (float(end) for end in rule[1:-1].split(","))
    return (value >= low if rule[0] == "[" else value > low) and (
        value <= high if rule[-1] == "]" else value < high)


def _spell(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _comments(Config):
    """The trailing comment of each field, read from the source: it is the flag's help text."""
    source = inspect.getsource(Config)
    return dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", source, flags=re.MULTILINE))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (see --help)")


def parse_args(Config, presets, argv=None, free=(), defaults="laptop"):
    """Read the command line of a script.

    Config: frozen dataclass; presets: {name: Config}; free: fields that may change when a
    checkpoint is loaded (they belong to sampling, not to the trained model). Returns (cfg, opts):
    cfg is a Config (preset, then --config, then flags) and opts a namespace with the run's
    settings; opts.given names the fields set by hand. Ends with status 2 on a mistake. In a
    notebook cell the kernel's own arguments are ignored.
    """
    if argv is None:
        argv = [] if Path(sys.argv[0]).name in KERNELS else sys.argv[1:]
    script = inspect.getmodule(Config)
    parser = _Parser(description=(script.__doc__ or "").split("\n\n")[0], allow_abbrev=False,
                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    run = parser.add_argument_group("the run")
    run.add_argument("--preset", default=defaults, metavar="NAME", help=", ".join(presets))
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    run.add_argument("--seed", type=int, default=0, help="seed of every random draw")
    run.add_argument("--out", default="outputs", metavar="DIR", help="where run folders are made")
    run.add_argument("--resume", nargs="?", const="", metavar="RUN",
                     help="go on with a run folder; without a value the newest")
    run.add_argument("--sample", nargs="?", const="", metavar="CHECKPOINT",
                     help="no training: draw from a checkpoint; without a value the newest run's, "
                     "else the shipped one")
    run.add_argument("--evaluate", nargs="?", type=int, const=500, metavar="N",
                     help="draw N samples and add distances and scores to metrics.json")
    run.add_argument("--config", metavar="FILE", help="repeat a run from its config.json")
    run.add_argument("--amp", default="off", help="mixed precision: off, bf16 or fp16")
    run.add_argument("--compile", action="store_true", help="torch.compile the network")
    run.add_argument("--grad_checkpointing", "--grad-checkpointing", action="store_true",
                     help="trade time for memory: recompute activations")
    run.add_argument("--tensorboard", action="store_true", help="also log for TensorBoard")

    fields = parser.add_argument_group("hyperparameters (they override the preset)")
    hints, comments = get_type_hints(Config), _comments(Config)
    for field in dataclasses.fields(Config):
        names = [f"--{field.name}"]
        if "_" in field.name:
            names.append(f"--{field.name.replace('_', '-')}")
        kind = hints[field.name]
        how = {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif get_args(kind):
            how = {"type": get_args(kind)[0], "nargs": "*"}
        text = comments.get(field.name, "").replace("%", "%%")
        fields.add_argument(*names, dest=field.name, default=argparse.SUPPRESS, help=text, **how)
    given = vars(parser.parse_args(argv))

    opts = argparse.Namespace(
        **{
            k: given.pop(k)
            for k in ("preset", "device", "seed", "out", "resume", "sample", "evaluate", "config",
                      "amp", "compile", "grad_checkpointing", "tensorboard")
        }
    )
    opts.given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    opts.free = free
    if opts.preset not in presets:
        fail(f"--preset {opts.preset}: must be one of {', '.join(presets)}")
    if opts.amp not in ("off", "bf16", "fp16"):
        fail(f"--amp {opts.amp}: must be one of off, bf16, fp16")
    if opts.evaluate is not None and opts.evaluate < 10:
        fail(f"--evaluate {opts.evaluate}: must be >= 10")
    if opts.resume is not None and opts.sample is not None:
        fail(
            "--resume and --sample exclude each other: one trains on, the other does not train"
        )
    if not 0 <= opts.seed < 2**63:
        fail(f"--seed {opts.seed}: must be in [0, 2^63)")
    cfg = presets[opts.preset]
    if opts.config:
        cfg = read_config(opts.config, Config, opts)
    return dataclasses.replace(cfg, **opts.given), opts


def read_config(path, Config, opts):
    """The Config in a run's config.json; the seed stored beside it becomes opts.seed."""
    try:
        stored = json.loads(Path(path).read_text())
        values = stored["config"]
        opts.seed = int(stored["seed"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        fail(f"--config {path}: not a readable config.json of a run ({type(problem).__name__})")
    return config_from(values, Config, f"--config {path}")


def config_from(values, Config, where):
    """Config from a dict of plain values, as a checkpoint or a config.json holds it."""
    known = {field.name: field for field in dataclasses.fields(Config)}
    if not isinstance(values, dict) or set(values) != set(known):
        odd = sorted(set(values) ^ set(known)) if isinstance(values, dict) else ["config"]
        fail(f"{where}: its Config does not fit this script (differs in {', '.join(odd)})")
    hints = get_type_hints(Config)
    for name, value in values.items():
        kind = tuple if get_args(hints[name]) else hints[name]
        if isinstance(value, list):
            values[name] = value = tuple(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            values[name] = value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            fail(f"{where}: {name} is {value!r}, must be of type {kind.__name__}")
    return Config(**values)


def merge_config(cfg_checkpoint, opts, where):
    """The checkpoint's Config with the free fields given by hand; any other given change is an
    error.
    """
    for name, value in opts.given.items():
        trained = getattr(cfg_checkpoint, name)
        if name not in opts.free and value != trained:
            fail(f"--{name} {_spell(value)}: {where} was made with {_spell(trained)}")
    return dataclasses.replace(cfg_checkpoint, **opts.given)
