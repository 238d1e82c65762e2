"""The options of the command line: one for each field of `Config`, and those of a command beside them."""

import argparse
import ast
import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from purejaxppo.config import FIELDS, Config
from purejaxppo.types import ConfigError
from purejaxppo.validation import integer, seconds_of

RUN_OPTIONS = {
    "key": (0, "number that the random key is made of"),
    "directory": (None, "where the results go; must be new"),
    "resume": (False, "go on with what was killed or interrupted: the same command, and this"),
    "checkpoint_seconds": (30.0, "time between two checkpoints"),
    "log": ((), "further logs beside metrics.csv: tensorboard, wandb"),
    "tuned": (True, "start from the settings that are tuned for the environment"),
    "coordinator": (
        None,
        "of several processes: HOST:PORT of the first, or auto where JAX finds them (Slurm, MPI, Kubernetes, TPU)",
    ),
    "num_processes": (None, "how many there are"),
    "process_index": (None, "which of them this one is: 0, 1, …"),
}
TRAIN_OPTIONS = {
    "seeds": (1, "agents to train at once"),
    "eval_episodes": (
        128,
        "episodes of an evaluation of the policies; 0: no evaluation at the end",
    ),
    "eval_every": (
        0,
        "iterations between two evaluations during training, which keep the best policy; 0: none",
    ),
    **RUN_OPTIONS,
}
SWEEP_OPTIONS = {
    "grid": (
        (),
        "what is swept: lr=1e-4,3e-4 num_envs=4,8 hidden_sizes=64x64,128x128 or lr=loguniform(1e-5,1e-2)",
    ),
    "seeds": (8, "seeds of each setting"),
    "samples": (0, "draws from the distributions in the grid"),
    "exchange_every": (
        0,
        "iterations after which members copy better ones (population-based training); 0: they do not",
    ),
    "eval_episodes": (
        128,
        "episodes that each final policy is scored in; 0: the last returns of training",
    ),
    "at_once": (None, "members that train at once; if not given, as many as the memory holds"),
    "memory_limit": (
        None,
        "bytes on each device that they may take; if not given, most of what is free",
    ),
    "devices": (None, "parts that the CPU is used as; if not given, one for each core"),
    **RUN_OPTIONS,
}


def options_of(
    command: str, doc: str, own: dict[str, tuple[Any, str]], arguments: Sequence[str]
) -> type:
    """A dataclass with an option for each field of `Config`; the defaults are those tuned for the environment."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env", nargs="?", default=Config.env, const=Config.env)
    first.add_argument("--algorithm", nargs="?", default=Config.algorithm, const=Config.algorithm)
    first.add_argument("--no-tuned", "--no_tuned", dest="tuned", action="store_false")
    asked, _ = first.parse_known_args(arguments[1:] if arguments[:1] == [command] else [])
    defaults = (
        Config.for_env(asked.env, algorithm=asked.algorithm)
        if asked.tuned
        else Config.from_dict({"env": asked.env, "algorithm": asked.algorithm})
    )
    options = [
        _option(name, getattr(defaults, name), field.metadata["doc"], field.metadata["check"])
        for name, field in FIELDS.items()
    ]
    for name, (default, text) in own.items():
        options.append(_option(name, asked.tuned if name == "tuned" else default, text))
    return dataclasses.make_dataclass(command, options, namespace={"__doc__": doc}, frozen=True)


class RunOptions(NamedTuple):
    """The options that `train` and `sweep` share, and whether this is the process that shows what happens."""

    key: int
    directory: Path | None
    resume: bool
    checkpoint_seconds: float
    loggers: tuple[str, ...]
    first: bool


def run_options(options: dict[str, Any]) -> RunOptions:
    """Take these out of the options of a command; with a coordinator, join the other processes."""
    own = {name: options.pop(name) for name in RUN_OPTIONS}
    coordinator = own["coordinator"]
    given = {name: own[name] for name in ("num_processes", "process_index")}
    counts = {name: None if x is None else integer(name, x, 0) for name, x in given.items()}
    key = integer("key", own["key"], 0)
    seconds = seconds_of("checkpoint_seconds", own["checkpoint_seconds"])
    first = True
    if coordinator is not None:
        from purejaxppo.runs import processes

        processes.connect(coordinator, **counts)
        first = processes.is_main_process()
    elif any(x is not None for x in counts.values()):
        raise ConfigError(
            "num_processes and process_index need the address of the first process: coordinator=HOST:PORT"
        )
    return RunOptions(key, own["directory"], own["resume"], seconds, own["log"], first)


def _option(name: str, default: Any, doc: str, check: Any = None) -> tuple[str, Any, Any]:
    """One option. A text that is no number stays one, so that `Config` words the error."""
    if isinstance(check, tuple | list):
        doc = f"{doc}: {', '.join(check)}"
    kind: Any = type(default)
    metavar = None
    if name == "directory":
        kind = Path | None
    elif name == "coordinator":
        kind = _one("TEXT", _text_or_none)
    elif name == "env_settings":
        kind, metavar = tuple[str, ...], "[NAME=VALUE ...]"
        default = tuple(f"{key}={value}" for key, value in default)
    elif name == "hidden_sizes":
        kind = _several("[INT ...]", number)
    elif isinstance(default, tuple):
        kind = tuple[str, ...]
    elif default is None:  # those that are not in `Config` are counts
        kind = _one("INT" if check is None else "FLOAT", number)
    elif kind in (int, float):
        kind = _one(kind.__name__.upper(), number)
    return (
        name,
        Annotated[kind, tyro.conf.arg(help=doc, metavar=metavar)],
        dataclasses.field(default=default),
    )


def _one(metavar: str, parse: Callable[[str], Any]) -> Any:
    """The type of an option with one word."""
    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: parse(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )
    return Annotated[Any, spec]


def _several(metavar: str, parse: Callable[[str], Any]) -> Any:
    """The type of an option with any number of words."""
    spec = PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda words: tuple(map(parse, words)),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(x) for x in value],
    )
    return Annotated[Any, spec]


def number(text: str) -> Any:
    """The text as an integer (``5e7`` is one), a float or None, if it is one; else as it is."""
    if text == "None":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(text)
            whole = "." not in text and abs(value) < 2**62 and value == int(value)
            return int(value) if whole else value
    return text


def _text_or_none(text: str) -> str | None:
    return None if text == "None" else text


def env_settings(items: Sequence[str]) -> dict[str, Any]:
    """``("max_steps_in_episode=50", "is_slippery=false")`` as a mapping.

    Numbers, True, False, None and tuples of them are written as in Python; all else is a string.
    """
    found: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not name or not equals or name in found:
            raise ConfigError(
                f"env_settings: {item!r} must be a name and its value, once each, such as max_steps_in_episode=50"
            )
        found[name] = text
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            found[name] = ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    return found


def grid(items: Sequence[str]) -> dict[str, Any]:
    """``("lr=1e-4,3e-4", "hidden_sizes=64x64,32x32", "gamma=uniform(0.9,1)")`` as the grid of a sweep."""
    from purejaxppo.sweeps.grid import LogUniform, Uniform

    found: dict[str, Any] = {}
    for item in items:
        name, equals, values = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not values or name in found:
            raise ConfigError(
                f"grid: {item!r} must be a field and its values, once each, such as lr=1e-4,3e-4"
            )
        drawn = re.fullmatch(r"(loguniform|uniform)\(([^,]+),([^,]+)\)", values.replace(" ", ""))
        if drawn:
            kind = LogUniform if drawn[1] == "loguniform" else Uniform
            found[name] = kind(number(drawn[2]), number(drawn[3]))
        else:
            found[name] = [_grid_value(name, value) for value in values.split(",")]
    return found


def _grid_value(name: str, text: str) -> Any:
    if name == "env_settings":
        return env_settings(text.split("+"))
    if name == "hidden_sizes":
        return tuple(number(size) for size in text.split("x"))
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return text if name in FIELDS and isinstance(FIELDS[name].default, str) else number(text)


def split_cpu(parts: int | None) -> None:
    """Let JAX see the CPU as so many devices, one for each core if not given; it must not have started yet.

    A sweep's members are then spread over them. Where JAX has a GPU or TPU it changes nothing, and what the environment
    variable XLA_FLAGS says goes first.
    """
    flag, flags = "--xla_force_host_platform_device_count", os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={parts or cores or 1}".strip()
