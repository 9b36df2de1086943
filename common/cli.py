"""Command line: a flag for each line of a Config, and the settings every run shares."""

import argparse
import ast
import collections
import dataclasses
import difflib
import errno
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

from tqdm import tqdm

KERNELS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")
STOPPED = 130  # the exit status after Ctrl-C, as a shell gives it
# a range in a comment: ">= 1", "> 0", "in [0, 1)", "in [1, 1e6]"
RULE = re.compile(r">=? -?[\d.]+|\bin [\[(][\d.e-]+, [\d.e-]+[\])]")
# what no program can mend, and is told in a line: disk full, no permission, ...
OUTSIDE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES,
           errno.EPERM, errno.EIO, errno.EMFILE, errno.ENAMETOOLONG}


def say(text, file=None):
    """Print a line, above a progress bar where there is one; from one process only."""
    if not re.fullmatch(r"[1-9]\d*", os.environ.get("RANK", "")):
        tqdm.write(" ".join(str(text).splitlines()), file or sys.stdout)


@functools.cache
def say_once(text):
    """say(text), the first time."""
    say(text)


def fail(message):
    """End the program for a user's mistake: one line on standard error, status 2."""
    # Under torchrun every process finds the mistake: one of them tells it.
    say(f"error: {message}", sys.stderr)
    raise SystemExit(2)


def in_kernel():
    """Whether this is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def memory_bytes():
    """The physical memory of this machine; infinity where it cannot be known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf


def command_line(main):
    """main(argv) as a command: what a person or a machine can cause ends in one line.

    A script, or check_sizes here, raises `ValueError("S 30: must be ...")` where two of
    its settings do not fit together. A full disk, too little memory, a network whose
    answers are not finite: status 2. Ctrl-C: status 130. Any other error keeps its
    traceback. In a notebook's cells main() only says how to start.
    """
    @functools.wraps(main)
    def told(argv=None):
        if argv is None and main.__module__ == "__main__":
            if Path(sys.argv[0]).name != Path(main.__code__.co_filename).name:
                say('main([]) trains and draws as typed, main(["--steps", "500"]) less')
                return None
            if not in_kernel():  # whose streams are its own
                _open_streams()
        try:
            return main(argv)
        except KeyboardInterrupt:
            say("stopped: what is finished stays in the run folder", sys.stderr)
            raise SystemExit(STOPPED) from None
        except ValueError as problem:
            *_, (frame, _) = traceback.walk_tb(problem.__traceback__)
            if frame.f_globals not in (main.__globals__, globals()):
                raise
            fail(f"--{problem}")
        except FloatingPointError as problem:
            fail(str(problem))
        except OSError as problem:
            if problem.errno not in OUTSIDE:
                raise
            where = f"{problem.filename}: " if problem.filename else ""
            fail(f"{where}{problem.strerror}")
        except (MemoryError, RuntimeError) as problem:
            short = "out of memory|allocate|buffer size"  # CUDA and MPS, CPU, MPS
            if isinstance(problem, RuntimeError) and not re.search(short, str(problem)):
                raise
            fail("out of memory: a smaller --batch_size, --channels, --image_size or "
                 f"--n_samples needs less ({str(problem).partition(chr(10))[0]})")

    return told


class _Stream:
    """A standard stream that stops no run: what nobody reads any more is dropped."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # `| head -1`: nor may the rest fail when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        except RuntimeError:  # Ctrl-C in the midst of a write, and its own word
            pass
        return len(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def _open_streams():
    """Standard output and error that take any letter, closed or read by nobody."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, _Stream(stream))


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
    sources = map(_source, reversed(Config.__mro__[:-1]))  # what it inherits first
    for text in "\n".join(sources).splitlines():
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
            if isinstance(entry, int) and entry > 1e9:
                fail(f"--{name} {spell(value)}: must be at most 1e9")


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


def check_sizes(image_size, channels, mults, attention, heads, groups, patch):
    """ValueError where a script's UNet of these sizes cannot be built."""
    if not mults:
        raise ValueError("mults: needs at least one number")
    check_multiple(image_size, patch * 2 ** (len(mults) - 1),
                   f"patch {patch}, {len(mults)} levels")
    if channels % 2:
        raise ValueError(f"channels {channels}: must be even (sines and cosines of t)")
    for name, divisor in (("groups", groups), ("heads", heads)):
        if channels % divisor:
            raise ValueError(f"{name} {divisor}: must divide channels {channels}")
    # its five blocks at the widest level have ten convolutions; training holds weights,
    # their average, gradients and the optimiser's two moments
    check_memory("channels", channels, 5 * 10 * 9 * (channels * max(mults)) ** 2)
    sides = [image_size // patch // 2**level for level in range(len(mults))]
    for side in set(attention) - set(sides):
        say_once(f"note: --attention {side} changes nothing, "
            f"the levels have sides {spell(tuple(sides))}")


def check_multiple(image_size, multiple, why):
    """ValueError where a side of the images is no multiple, with the nearest ones."""
    if image_size % multiple or not image_size:
        low = image_size // multiple * multiple
        near = ", ".join(str(size) for size in (low, low + multiple) if size)
        raise ValueError(f"image_size {image_size}: must be a multiple of {multiple} "
                         f"({why}), nearest: {near}")


def check_memory(name, value, numbers):
    """ValueError where so many float32 numbers, asked for by a flag, cannot be held."""
    if 4 * numbers > memory_bytes():
        raise ValueError(f"{name} {value}: needs {4e-9 * numbers:,.1f} GB and more, "
                         f"this machine has {memory_bytes() / 1e9:,.1f} GB")


def spell(value):
    """A value as it is typed behind its flag."""
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) < 100 else f"{text[:20]}..."


# The command line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        if found := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            near = self._nearest(found[1])
            nearest = f", the nearest is {near}" if near else ""
            fail(f"{found[1]}: no such flag{nearest} (see --help)")
        fail(f"{message[:200]} (see --help)")

    def _nearest(self, flag):
        """The flag with the nearest name, else the first that speaks of it, or None."""
        if near := difflib.get_close_matches(flag, self._option_string_actions, 1):
            return near[0]
        words = flag.strip("-").replace("-", " ").replace("_", " ")
        return next((action.option_strings[0] for action in self._actions
                     if words in (action.help or "")), None)


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
    typed = collections.Counter(
        re.sub("^--(no-)?", "--", word.partition("=")[0]).replace("_", "-")
        for word in argv if word.startswith("--"))
    for flag, times in typed.items():
        if times > 1:
            fail(f"{flag}: is given {times} times, must be given once")
    names = {field.name for field in dataclasses.fields(Config)}
    opts = argparse.Namespace(**{k: v for k, v in given.items() if k not in names})
    opts.given = {k: tuple(v) if isinstance(v, list) else v
                  for k, v in given.items() if k in names}
    kind = opts.given.get("dataset", "").partition(":")[0]
    if opts.preset is None and kind in presets:
        opts.preset = kind
    if opts.preset is not None and opts.preset not in presets:
        fail(f"--preset {opts.preset}: must be one of {', '.join(presets)}")
    if opts.amp not in ("off", "bf16", "fp16"):
        fail(f"--amp {opts.amp}: must be one of off, bf16, fp16")
    if opts.evaluate is not None and not 10 <= opts.evaluate <= 1e6:
        fail(f"--evaluate {opts.evaluate}: must be in [10, 1e6]")
    if opts.resume is not None and opts.sample is not None:
        fail("--resume and --sample exclude each other: "
             "one trains on, the other does not")
    if opts.resume is not None and opts.config:
        fail("--resume and --config exclude each other: a run goes on as it was")
    if opts.seed is not None:
        check_seed(opts.seed, f"--seed {opts.seed}")
    cfg = presets[opts.preset or next(iter(presets))]
    if opts.config:
        cfg = read_config(opts.config, Config, opts)
    cfg = dataclasses.replace(cfg, **opts.given)
    check_config(cfg)
    return cfg, opts


def check_seed(seed, where):
    """End the program where a seed is none."""
    if type(seed) is not int or not 0 <= seed < 2**63:
        fail(f"{where}: the seed must be a whole number in [0, 2^63)")


def _parser(Config, presets):
    """The parser: the settings of a run, then a flag for each field of Config."""
    script = inspect.getmodule(Config)
    about = ((script and script.__doc__) or "").strip().split("\n\n")
    parser = _Parser(description=about[0], allow_abbrev=False,
                     epilog=about[-1] if len(about) > 1 else None)  # how long it takes
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
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        values, seed = stored["config"], stored["seed"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        kind = type(problem).__name__
        fail(f"--config {path}: not a readable config.json of a run ({kind})")
    check_seed(seed, f"--config {path}")
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
        kind, args, many = hints[name], get_args(hints[name]), False
        if args:
            many = get_origin(kind) is not Literal
            kind = args[0] if many else type(args[0])
        parts = value if many else [value]
        if not isinstance(parts, (list, tuple)):
            parts = [None]
        if kind is float:  # whole numbers are read as int
            parts = [float(part) if type(part) is int and abs(part) < 1e300 else part
                     for part in parts]
        if any(type(part) is not kind for part in parts):
            what = f"a list of {kind.__name__}" if many else kind.__name__
            fail(f"{where}: {name} is {str(value)[:80]}, must be of type {what}")
        values[name] = tuple(parts) if many else parts[0]
    return Config(**values)


def merge_config(trained, cfg, given, where):
    """The Config of a checkpoint with the `# sampling` block of cfg.

    Any other field set by hand to another value is an error; one that the script gives
    another value is told.
    """
    sampling = {name: getattr(cfg, name) for name, line in read_lines(type(cfg)).items()
                if line.block == "sampling"}
    differs = [name for name in vars(cfg) if name not in sampling
               and getattr(cfg, name) != getattr(trained, name)]
    for name in differs:
        if name in given:
            fail(f"--{name} {spell(given[name])}: {where} was made with "
                 f"{spell(getattr(trained, name))}")
    if differs:
        say("as the checkpoint was trained, not as this file has it: " + ", ".join(
            f"{name} {spell(getattr(trained, name))} (here {spell(getattr(cfg, name))})"
            for name in differs))
    return dataclasses.replace(trained, **sampling)
