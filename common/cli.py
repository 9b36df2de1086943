"""The command line: a flag for each field of a Config, a line for each mistake."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

from tqdm import tqdm

KERNELS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")
NEWEST = "the newest"  # of --sample and --resume without a value; compared by `is`
STOPPED = 130  # the exit status after Ctrl-C, as a shell reports it


class Mistake(ValueError):
    """A user's mistake. Its message names the setting, its value and what is allowed.

    A message that begins with the name of a field of Config gets its dashes from the
    command line: Mistake("S 30: must be at most T, 20").
    """


# The types of a Config


class Range(NamedTuple):
    """The allowed range of a number, in words and as a function of it.

    Your own: Annotated[float, Range("in [0, 5]", lambda x: 0 <= x <= 5)].
    """

    words: str
    allows: Callable


Count = Annotated[int, Range(">= 1", lambda n: n >= 1)]
Whole = Annotated[int, Range(">= 0", lambda n: n >= 0)]
Positive = Annotated[float, Range("> 0", lambda x: x > 0)]
NonNegative = Annotated[float, Range(">= 0", lambda x: x >= 0)]
Probability = Annotated[float, Range("in [0, 1]", lambda x: 0 <= x <= 1)]
Fraction = Annotated[float, Range("in [0, 1)", lambda x: 0 <= x < 1)]
OpenFraction = Annotated[float, Range("in (0, 1)", lambda x: 0 < x < 1)]
ANY = Range("finite", lambda x: True)
LARGEST = 10**9  # the largest whole number accepted; a larger one is a typing error


def check_config(cfg):
    """Raise Mistake for the first field that its type does not allow."""
    for name, hint in get_type_hints(type(cfg), include_extras=True).items():
        value, many = getattr(cfg, name), get_origin(hint) is tuple
        kind, allowed, words = _read_hint(hint)
        entries = value if many and type(value) is tuple else [value]
        for entry in entries:
            number = kind is float and type(entry) is int  # 2 for 2.0
            if type(entry) is not kind and not number or many != (entries is value):
                rule = f"of type {kind.__name__}"
            elif words and entry not in words:
                rule = f"one of {', '.join(map(str, words))}"
            elif kind is int and abs(entry) > LARGEST:
                rule = f"at most {LARGEST:g}"
            elif kind in (int, float) and not (math.isfinite(entry)
                                               and allowed.allows(entry)):
                rule = allowed.words
            else:
                continue
            raise Mistake(f"{name} {spell(value)}: must be {rule}")


def _read_hint(hint):
    """(type of an entry, its Range, the words of a Literal) of a field's annotation."""
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0]), ANY, get_args(hint)
    if get_origin(hint) is Annotated:
        kind, *notes = get_args(hint)
        return kind, next((n for n in notes if isinstance(n, Range)), ANY), ()
    if hint not in (int, float, bool, str):
        raise TypeError(f"Config: {hint} is no type of a setting; use int, float, "
                        "bool, str, Literal, Annotated, or tuple[one of these, ...]")
    return hint, ANY, ()


def check_sizes(image_size, channels, mults, attention, heads, groups, patch):
    """Raise Mistake where a script's UNet of these sizes cannot be built."""
    if not mults:
        raise Mistake("mults: needs at least one number")
    check_multiple(image_size, patch * 2 ** (len(mults) - 1),
                   f"patch {patch}, {len(mults)} levels")
    if channels % 2 or channels < 4:
        raise Mistake(f"channels {channels}: must be even and at least 4, for the "
                      "sines and cosines of t")
    for name, divisor in (("groups", groups), ("heads", heads)):
        if channels % divisor:
            raise Mistake(f"{name} {divisor}: must divide channels {channels}")
    levels = [image_size // patch // 2**level for level in range(len(mults))]
    if unused := set(attention) - set(levels):
        say_once(f"note: --attention {spell(tuple(unused))} changes nothing, the "
                  f"resolutions of the levels are {spell(tuple(levels))}")


def check_multiple(image_size, multiple, reason):
    """Raise Mistake where a resolution is no multiple; it names the nearest ones."""
    if image_size % multiple or not image_size:
        low = image_size // multiple * multiple
        near = ", ".join(str(size) for size in (low, low + multiple) if size)
        raise Mistake(f"image_size {image_size}: must be a multiple of {multiple} "
                      f"({reason}), the nearest: {near}")


def spell(value):
    """A value as it is typed after its flag."""
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) < 100 else f"{text[:20]}..."


# Lines and files


def say(text):
    """Print one line above a progress bar; of several processes only the first does."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(" ".join(str(text).splitlines()))


say_once = functools.cache(say)


@contextlib.contextmanager
def writing(path):
    """Turn an error of the disk inside the block into a Mistake that names the path."""
    try:
        yield
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        reason = getattr(problem, "strerror", None) or problem
        raise Mistake(f"{path}: cannot be written ({reason})") from None


def write_whole(path, content):
    """Write bytes or text under another name, then rename: never half a file."""
    content = content.encode() if isinstance(content, str) else content
    scratch = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with writing(path):
            scratch.write_bytes(content)
            for seconds in (0.1, 0.2, 0.4, 0.8, 0):
                try:
                    return os.replace(scratch, path)
                except PermissionError:  # on Windows, while another program reads it
                    if not seconds:
                        raise
                    time.sleep(seconds)
    finally:
        with contextlib.suppress(OSError, ValueError):
            scratch.unlink(missing_ok=True)


def in_notebook():
    """Whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def out_of_memory(problem):
    """Whether an exception says that memory ran out, on a CPU, on CUDA or on MPS."""
    words = "out of memory|not enough memory|can't allocate memory|buffer size"
    return isinstance(problem, MemoryError) or (
        isinstance(problem, RuntimeError) and bool(re.search(words, str(problem))))


def command_line(main):
    """Decorator of a script's main(argv): a Mistake is one line, with exit status 2.

    So is too little memory; Ctrl-C is one line with status 130. Any other exception
    keeps its traceback. In a notebook these, too, are ordinary exceptions, and main()
    in a cell only says how to start.
    """
    @functools.wraps(main)
    def command(argv=None):
        if argv is None and main.__module__ == "__main__":
            if Path(sys.argv[0]).name != Path(main.__code__.co_filename).name:
                say('main([]) trains and draws; main(["--steps", "500"]) takes flags')
                return None
            if not in_notebook():
                _keep_streams_open()
        try:
            return main(argv)
        except (Mistake, KeyboardInterrupt, MemoryError, RuntimeError) as problem:
            known = (Mistake, KeyboardInterrupt)
            if in_notebook() or not (isinstance(problem, known)
                                     or out_of_memory(problem)):
                raise
            text, status = str(problem), 2
            if isinstance(problem, KeyboardInterrupt):
                text, status = "stopped: finished files stay in the run folder", STOPPED
            elif not isinstance(problem, Mistake):
                text = ("out of memory: a smaller --batch_size, --channels, "
                        f"--image_size or --n_samples needs less ({text})")
        Config = main.__globals__.get("Config")
        if re.match(r"\w*", text)[0] in getattr(Config, "__dataclass_fields__", ()):
            text = f"--{text}"
        rank = os.environ.get("RANK", "0")  # as torchrun sets it
        of_process = f"process {rank}: " if rank != "0" else ""
        begin = "error: " if status == 2 else ""
        tqdm.write(of_process + begin + " ".join(text.splitlines()), sys.stderr)
        raise SystemExit(status)

    return command


class _Stream:
    """A standard stream whose reader may leave, as `| head -1` does."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        except RuntimeError:  # Ctrl-C during a write: its handler prints, too
            pass
        return len(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def _keep_streams_open():
    """Make standard output and error take any letter, and outlive their readers."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, _Stream(stream))


# Flags


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        if found := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            near = difflib.get_close_matches(found[1], self._option_string_actions, 1)
            nearest = f", the nearest is {near[0]}" if near else ""
            raise Mistake(f"{found[1]}: no such flag{nearest} (see --help)")
        if "--sample" in self.argv and message.startswith("unrecognized"):
            message += "; --sample takes one checkpoint"
            if "--classes" in self._option_string_actions:
                message += ", and --classes takes classes"
        raise Mistake(f"{message[:300]} (see --help)")


def parse_args(Config, presets, argv=None):
    """Read a script's command line: (cfg, opts).

    cfg is a Config: the preset, then --config, then the flags. opts holds the settings
    of the run, None where they were not given, and opts.given the fields that were. A
    data set that has a preset of its name takes it unless --preset names another.
    """
    if argv is None:  # in a notebook the arguments are the kernel's own
        argv = [] if Path(sys.argv[0]).name in KERNELS else sys.argv[1:]
    parser = _parser(Config, presets, argv)
    values = vars(parser.parse_args(argv))
    names = {field.name for field in dataclasses.fields(Config)}
    opts = argparse.Namespace(**{k: v for k, v in values.items() if k not in names})
    opts.given = {k: tuple(v) if isinstance(v, list) else v
                  for k, v in values.items() if k in names}
    kind = opts.given.get("dataset", "").partition(":")[0]
    if kind in presets and (opts.preset, opts.config, opts.resume) == (None,) * 3:
        opts.preset = kind
    if opts.evaluate is not None and not 10 <= opts.evaluate <= 1e6:
        raise Mistake(f"--evaluate {opts.evaluate}: must be in [10, 1e6]")
    for one, other in (("sample", "resume"), ("config", "resume"),
                       ("preset", "config")):
        if getattr(opts, one) is not None and getattr(opts, other) is not None:
            raise Mistake(f"--{one} and --{other} exclude each other")
    for name in ("out", "config", "sample", "resume"):
        path = getattr(opts, name)
        if path == "":  # an unset variable of the shell
            raise Mistake(f"--{name} '': must name a path")
        if path is not None and path is not NEWEST:
            setattr(opts, name, os.path.expanduser(path))
    if opts.out and opts.resume not in (None, NEWEST) and (
            not Path(opts.resume).is_relative_to(opts.out)):
        say(f"--out {opts.out}: not used, the run goes on in its own folder")
    opts.out = opts.out or "outputs"
    check_seed(opts.seed, f"--seed {opts.seed}")
    cfg = presets[opts.preset or next(iter(presets))]
    if opts.config is not None:
        cfg = _read_config(opts, Config)
    cfg = dataclasses.replace(cfg, **opts.given)
    check_config(cfg)
    if getattr(cfg, "warmup", 0) > getattr(cfg, "steps", math.inf) and (
            {"warmup", "steps"} <= set(opts.given)):
        say(f"note: the warm-up of {cfg.warmup} steps is longer than the training, the "
            "learning rate never reaches --lr")
    return cfg, opts


def check_seed(seed, where):
    """Raise Mistake where a seed is neither None nor a whole number in [0, 2^63)."""
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise Mistake(f"{where}: the seed must be a whole number in [0, 2^63)")


def _parser(Config, presets, argv):
    """The parser of argv: the settings of a run, then a flag for each field of Config.

    Reading a page for its comments takes a while, so only --help does it.
    """
    about = (getattr(inspect.getmodule(Config), "__doc__", None) or "").strip()
    parser = _Parser(description=about.partition("\n\n")[0], allow_abbrev=False)
    parser.argv = argv
    run = parser.add_argument_group("the run").add_argument
    switch = argparse.BooleanOptionalAction
    run("--preset", choices=list(presets), help="named settings to start from")
    run("--device", choices=["auto", "cpu", "cuda", "mps"], help="where to run [auto]")
    run("--seed", type=int, help="seed of every random draw [0]")
    run("--out", metavar="DIR", help="where run folders are made [outputs]")
    run("--resume", nargs="?", const=NEWEST, metavar="RUN",
        help="continue a stopped run; without a value, the newest")
    run("--sample", nargs="?", const=NEWEST, metavar="CHECKPOINT",
        help="draw from a checkpoint without training; without a value, from the "
             "newest run, or from the shipped model where there is none")
    run("--evaluate", nargs="?", type=int, const=500, metavar="N",
        help="draw N samples (500) and add their scores to metrics.json")
    run("--config", metavar="FILE", help="repeat a run from its config.json")
    run("--amp", choices=["off", "bf16", "fp16"], help="mixed precision [off]")
    run("--compile", action=switch, help="compile the network with torch.compile")
    run("--grad_checkpointing", "--grad-checkpointing", action=switch,
        help="save memory: compute the activations of each block twice")
    run("--tensorboard", action="store_true", help="write a log for TensorBoard, too")

    group = parser.add_argument_group("hyperparameters (they override the preset)")
    comments = _comments(Config) if {"-h", "--help"} & set(argv) else {}
    hints = get_type_hints(Config, include_extras=True)
    for field in dataclasses.fields(Config):
        kind, allowed, words = _read_hint(hints[field.name])
        settings = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            settings = {"action": switch}
        elif words:
            settings = {"type": kind, "choices": words}
        if get_origin(hints[field.name]) is tuple:
            settings["nargs"] = "*"
        rule = f"{{{allowed.words}}}" if allowed is not ANY else ""
        about = comments.get(field.name, ""), rule, f"[{spell(field.default)}]"
        flags = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
        group.add_argument(*flags, dest=field.name, default=argparse.SUPPRESS,
                           help=" ".join(filter(None, about)).replace("%", "%%"),
                           **settings)
    return parser


def _comments(Config):
    """{field: the comment on its line}, for --help alone; without the source, none."""
    found = {}
    for kind in reversed(Config.__mro__[:-1]):
        with contextlib.suppress(OSError, TypeError):  # a class made in a notebook
            source = inspect.getsource(kind)
            found |= dict(re.findall(r"^    (\w+):.*?  # (.+)$", source, re.MULTILINE))
    return found


# A Config that was stored


def _read_config(opts, Config):
    """The Config in a config.json; its seed, preset and run settings, unless given."""
    where = f"--config {opts.config}"
    try:
        stored = json.loads(Path(opts.config).read_text(encoding="utf-8"))
        values, seed = stored["config"], stored["seed"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise Mistake(f"{where}: not a readable config.json of a run "
                      f"({type(problem).__name__})") from None
    check_seed(seed, where)
    opts.seed = seed if opts.seed is None else opts.seed
    opts.preset = stored.get("preset")
    take_settings(opts, stored.get("run"))
    return config_from(values, Config, where)


SETTINGS = {"device": "auto", "amp": "off", "compile": False,
            "grad_checkpointing": False}


def take_settings(opts, stored):
    """Fill the settings that were not given from a stored run, a dict."""
    for name in SETTINGS:
        if getattr(opts, name) is None and isinstance(stored, dict):
            setattr(opts, name, stored.get(name))


def config_from(values, Config, where):
    """A Config from the plain values that a config.json or a checkpoint holds.

    A field that the script has lost is left out, one that it has gained takes its
    default, and a line says so.
    """
    known = {field.name for field in dataclasses.fields(Config)}
    if not isinstance(values, dict) or not known & set(values):
        raise Mistake(f"{where}: its Config is not one of this script")
    if differs := sorted(known ^ set(values)):
        say(f"{where}: the stored Config and this file's differ in the fields "
            f"{', '.join(differs)}: what it lacks takes this file's default")
    cfg = Config(**{name: tuple(value) if isinstance(value, list) else value
                    for name, value in values.items() if name in known})
    try:
        check_config(cfg)
    except Mistake as problem:
        raise Mistake(f"{where}: {problem}") from None
    return cfg


def merge_config(trained, cfg, sampling, given, where):
    """The Config of a checkpoint, with the fields named in `sampling` taken from cfg.

    Any other field that was given by hand must agree with the checkpoint. Where this
    file has another value than the checkpoint, a line says so. The path in a field such
    as dataset, "folder:PATH", is a place and may be another one.
    """
    def kind(value):
        return value.partition(":")[0] if isinstance(value, str) else value

    moved = [name for name in given if ":" in str(given[name])
             and kind(given[name]) == kind(getattr(trained, name))]
    sampling = (*sampling, *moved)
    differs = [name for name in vars(cfg) if name not in sampling
               and getattr(cfg, name) != getattr(trained, name)]
    for name in differs:
        if name in given:
            raise Mistake(f"{name} {spell(given[name])}: {where} was made with "
                          f"{spell(getattr(trained, name))}")
    if differs:
        say("settings kept from the checkpoint: " + ", ".join(
            f"{name} {spell(getattr(trained, name))} (this file: "
            f"{spell(getattr(cfg, name))})" for name in differs))
    return dataclasses.replace(
        trained, **{name: getattr(cfg, name) for name in sampling})
