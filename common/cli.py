"""Command line: a flag for each line of a Config, and the settings every run shares."""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import json
import linecache
import math
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

KERNELS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")
# a range in a comment: ">= 1", "> 0", "in [0, 1)"
RULE = re.compile(r">=? -?[\d.]+|\bin [\[(]-?[\d.]+, -?[\d.]+[\])]")


def fail(message):
    """End the program for a user's mistake: one line on standard error, status 2."""
    # Under torchrun every process finds the mistake: one of them tells it.
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def command_line(main):
    """main(argv), which tells a ValueError of its own script in one line with the flag.

    A script, or check_sizes here, raises `ValueError("S 30: must be ...")` where two of
    its settings do not fit together. An error from anywhere else keeps its traceback.
    """
    @functools.wraps(main)
    def told(argv=None):
        try:
            return main(argv)
        except ValueError as problem:
            *_, (frame, _) = traceback.walk_tb(problem.__traceback__)
            if frame.f_globals not in (main.__globals__, globals()):
                raise
            fail(f"--{problem}")

    return told


# What a Config says


@dataclasses.dataclass
class Line:
    """What the line of one hyperparameter says: its comment and the block it is in."""

    comment: str = ""
    block: str = ""

    @property
    def rule(self):
        """The range in the comment, such as ">= 1" or "in [0, 1)", or None."""
        found = RULE.search(self.comment)
        return found and found[0]


def read_lines(Config):
    """{field: Line} from the source of a Config; empty Lines where there is no source.

    `    name: type = default  # meaning, range (paper: value)` is a hyperparameter,
    `    # sampling` begins a block.
    """
    lines, block = {field.name: Line() for field in dataclasses.fields(Config)}, ""
    for text in _source(Config).splitlines():
        if found := re.match(r"    (\w+):.*?  # (.+)$", text):
            if found[1] in lines:
                lines[found[1]] = Line(found[2], block)
        elif found := re.match(r"    # (\w+)", text):
            block = found[1]
    return lines


def _source(Config):
    """The source text of a class, from its file or the notebook cell that made it."""
    try:
        return inspect.getsource(Config)
    except (OSError, TypeError):
        pass
    # IPython keeps its cells here; of a class defined twice the last is in force.
    for entry in reversed(list(linecache.cache.values())):
        text = "".join(entry[2]) if len(entry) == 4 else ""
        if re.search(rf"^class {Config.__name__}\b", text, re.MULTILINE):
            for node in ast.parse(text).body:
                if getattr(node, "name", "") == Config.__name__:
                    return "\n".join(text.splitlines()[node.lineno - 1:node.end_lineno])
    return ""


def check_config(cfg):
    """Hold every field to its line; the first that breaks it ends the program."""
    hints = get_type_hints(type(cfg))
    for name, line in read_lines(type(cfg)).items():
        value = getattr(cfg, name)
        words = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        for entry in value if isinstance(value, tuple) else (value,):
            if words and entry not in words:
                fail(f"--{name} {value}: must be one of {', '.join(map(str, words))}")
            if isinstance(entry, float) and not math.isfinite(entry):
                fail(f"--{name} {spell(value)}: must be {line.rule or 'finite'}")
            if line.rule and not allowed(entry, line.rule):
                fail(f"--{name} {spell(value)}: must be {line.rule}")


def allowed(value, rule):
    """Whether a number keeps a rule: ">= 1", "> 0", or an interval, "in [0, 1)"."""
    if rule.startswith(">="):
        return value >= float(rule[2:])
    if rule.startswith(">"):
        return value > float(rule[1:])
    low, high = (float(end) for end in rule[4:-1].split(","))
    above = value >= low if rule[3] == "[" else value > low
    below = value <= high if rule[-1] == "]" else value < high
    return above and below


def check_sizes(image_size, channels, mults, heads, groups, patch):
    """ValueError where a script's UNet of these sizes cannot be built."""
    if not mults:
        raise ValueError("mults: needs at least one number")
    multiple = patch * 2 ** (len(mults) - 1)
    if image_size % multiple:
        low = image_size // multiple * multiple
        near = ", ".join(str(size) for size in (low, low + multiple) if size)
        raise ValueError(f"image_size {image_size}: must be a multiple of {multiple} "
                         f"(patch {patch}, {len(mults)} levels), nearest: {near}")
    if channels % 2:
        raise ValueError(f"channels {channels}: must be even (sines and cosines of t)")
    for name, divisor in (("groups", groups), ("heads", heads)):
        if channels % divisor:
            raise ValueError(f"{name} {divisor}: must divide channels {channels}")


def spell(value):
    """A value as it is typed behind its flag."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# The command line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        if found := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            near = difflib.get_close_matches(found[1], self._option_string_actions, 1)
            nearest = f", the nearest is {near[0]}" if near else ""
            fail(f"{found[1]}: no such flag{nearest} (see --help)")
        fail(f"{message} (see --help)")


def parse_args(Config, presets, argv=None):
    """Read the command line of a script: (cfg, opts).

    cfg is a Config (preset, then --config, then flags), opts a namespace with the
    settings of the run; opts.given holds the fields set by hand. A data set that has a
    preset of its name takes it, unless another is named. In a notebook the kernel's own
    arguments are ignored. A mistake ends the program with status 2.
    """
    if argv is None:
        argv = [] if Path(sys.argv[0]).name in KERNELS else sys.argv[1:]
    given = vars(_parser(Config, presets).parse_args(argv))
    names = {field.name for field in dataclasses.fields(Config)}
    opts = argparse.Namespace(**{k: v for k, v in given.items() if k not in names})
    opts.given = {k: tuple(v) if isinstance(v, list) else v
                  for k, v in given.items() if k in names}
    if opts.preset is None and opts.given.get("dataset") in presets:
        opts.preset = opts.given["dataset"]
    if opts.preset is not None and opts.preset not in presets:
        fail(f"--preset {opts.preset}: must be one of {', '.join(presets)}")
    if opts.amp not in ("off", "bf16", "fp16"):
        fail(f"--amp {opts.amp}: must be one of off, bf16, fp16")
    if opts.evaluate is not None and opts.evaluate < 10:
        fail(f"--evaluate {opts.evaluate}: must be >= 10")
    if opts.resume is not None and opts.sample is not None:
        fail("--resume and --sample exclude each other: "
             "one trains on, the other does not")
    if opts.seed is not None and not 0 <= opts.seed < 2**63:
        fail(f"--seed {opts.seed}: must be in [0, 2^63)")
    cfg = presets[opts.preset or next(iter(presets))]
    if opts.config:
        cfg = read_config(opts.config, Config, opts)
    opts.seed = opts.seed or 0
    cfg = dataclasses.replace(cfg, **opts.given)
    check_config(cfg)
    return cfg, opts


def _parser(Config, presets):
    """The parser: the settings of a run, then a flag for each field of Config."""
    script = inspect.getmodule(Config)
    about = (script and script.__doc__) or ""
    parser = _Parser(description=about.split("\n\n")[0], allow_abbrev=False)
    run = parser.add_argument_group("the run")
    run.add_argument("--preset", metavar="NAME", help=", ".join(presets))
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    run.add_argument("--seed", type=int, help="seed of every random draw (0)")
    run.add_argument("--out", default="outputs", metavar="DIR",
                     help="where run folders are made")
    run.add_argument("--resume", nargs="?", const="", metavar="RUN",
                     help="go on with a run folder; without a value the newest")
    run.add_argument("--sample", nargs="?", const="", metavar="CHECKPOINT",
                     help="no training: draw from a checkpoint; "
                     "without a value the newest run's, else the shipped one")
    run.add_argument("--evaluate", nargs="?", type=int, const=500, metavar="N",
                     help="draw N samples and add distances and scores to metrics.json")
    run.add_argument("--config", metavar="FILE",
                     help="repeat a run from its config.json")
    run.add_argument("--amp", default="off", help="mixed precision: off, bf16 or fp16")
    run.add_argument("--compile", action="store_true", help="torch.compile the network")
    run.add_argument("--grad_checkpointing", "--grad-checkpointing",
                     action="store_true",
                     help="time for memory: compute each block's activations again")
    run.add_argument("--tensorboard", action="store_true",
                     help="also log for TensorBoard")

    group = parser.add_argument_group("hyperparameters (they override the preset)")
    hints, lines = get_type_hints(Config), read_lines(Config)
    for field in dataclasses.fields(Config):
        kind, args = hints[field.name], get_args(hints[field.name])
        how = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is Literal:
            how = {"type": type(args[0]), "metavar": "|".join(map(str, args))}
        elif args:
            how = {"type": args[0], "nargs": "*", "metavar": args[0].__name__.upper()}
        flags = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
        comment = lines[field.name].comment.replace("%", "%%")
        group.add_argument(*flags, dest=field.name, default=argparse.SUPPRESS,
                           help=f"{comment} [{spell(field.default)}]", **how)
    return parser


# A stored Config


def read_config(path, Config, opts):
    """The Config in a run's config.json; its seed and preset too, unless given."""
    try:
        stored = json.loads(Path(path).read_text())
        values, seed = stored["config"], int(stored["seed"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        kind = type(problem).__name__
        fail(f"--config {path}: not a readable config.json of a run ({kind})")
    opts.seed = seed if opts.seed is None else opts.seed
    opts.preset = opts.preset or stored.get("preset")
    return config_from(values, Config, f"--config {path}")


def config_from(values, Config, where):
    """Config from a dict of plain values, as a checkpoint or a config.json holds it."""
    hints = get_type_hints(Config)
    if not isinstance(values, dict) or set(values) != set(hints):
        differs = ["config"]
        if isinstance(values, dict):
            differs = sorted(set(values) ^ set(hints))
        fail(f"{where}: its Config does not fit this script "
             f"(differs in {', '.join(differs)})")
    values = dict(values)
    for name, value in values.items():
        kind, args = hints[name], get_args(hints[name])
        if args:
            kind = type(args[0]) if get_origin(kind) is Literal else tuple
        if isinstance(value, list):
            values[name] = value = tuple(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            values[name] = value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            fail(f"{where}: {name} is {value!r}, must be of type {kind.__name__}")
    return Config(**values)


def merge_config(trained, cfg, given, where):
    """The Config of a checkpoint with the `# sampling` block of cfg.

    Any other field set by hand to another value is an error.
    """
    sampling = {name: getattr(cfg, name) for name, line in read_lines(type(cfg)).items()
                if line.block == "sampling"}
    for name, value in given.items():
        if name not in sampling and value != getattr(trained, name):
            fail(f"--{name} {spell(value)}: {where} was made with "
                 f"{spell(getattr(trained, name))}")
    return dataclasses.replace(trained, **sampling)
