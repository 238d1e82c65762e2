"""The options of the command line: one for each field of `Config`, and further ones per command."""

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

from purejaxppo.config import ALGORITHMS, FIELDS, Config, fields_of
from purejaxppo.types import ConfigError
from purejaxppo.validation import NONE_OR_POSITIVE_INT, integer, seconds_of

RUN_OPTIONS = {
    "key": (0, "integer from which the random key is made"),
    "directory": (None, "directory for the results; must be new"),
    "resume": (
        False,
        "continue a killed or interrupted run: repeat its command and add this option",
    ),
    "checkpoint_seconds": (30.0, "seconds between two checkpoints"),
    "log": ((), "loggers in addition to metrics.csv: tensorboard, wandb"),
    "tuned": (True, "start from the settings tuned for the environment"),
    "coordinator": (
        None,
        "with several processes: HOST:PORT of the first one, "
        "or auto where JAX detects them (Slurm, MPI, Kubernetes, TPU)",
    ),
    "num_processes": (None, "number of processes"),
    "process_index": (None, "index of this process: 0, 1, …"),
}
TRAIN_OPTIONS = {
    "seeds": (1, "number of agents to train at once"),
    "eval_episodes": (
        128,
        "episodes in each evaluation of a policy; 0: no evaluation at the end",
    ),
    "eval_every": (
        0,
        "iterations between evaluations during training, which keep the best policy; 0: none",
    ),
    **RUN_OPTIONS,
}
SWEEP_OPTIONS = {
    "grid": (
        (),
        "fields to sweep and their values: lr=1e-4,3e-4 num_envs=4,8 "
        "hidden_sizes=64x64,128x128 or lr=loguniform(1e-5,1e-2)",
    ),
    "seeds": (8, "number of seeds for each setting"),
    "samples": (0, "number of draws from the distributions in the grid"),
    "exchange_every": (
        0,
        "iterations between exchanges, in which the worst members copy the best "
        "(population-based training); 0: no exchanges",
    ),
    "eval_episodes": (
        128,
        "episodes in which each final policy is scored; 0: score by the last returns of training",
    ),
    "at_once": (None, "members to train at once; None: as many as fit into memory"),
    "memory_limit": (
        None,
        "bytes of memory for the members on each device; None: most of the free memory",
    ),
    "devices": (None, "number of devices to split the CPU into; None: one per core"),
    **RUN_OPTIONS,
}


def options_class(
    command: str, doc: str, extra: dict[str, tuple[Any, str]], arguments: Sequence[str]
) -> type:
    """A dataclass with an option for each field of `Config`, and the ``extra`` ones of a command.

    The defaults are the settings tuned for the environment that ``arguments`` name. ``extra`` maps
    the name of an option to its default and its help text.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--env", nargs="?", default=Config.env, const=Config.env)
    parser.add_argument("--algorithm", nargs="?", default=Config.algorithm, const=Config.algorithm)
    parser.add_argument("--no-tuned", "--no_tuned", dest="tuned", action="store_false")
    known, _ = parser.parse_known_args(arguments[1:] if arguments[:1] == [command] else [])
    defaults = (
        Config.for_env(known.env, algorithm=known.algorithm)
        if known.tuned
        else Config.from_dict({"env": known.env, "algorithm": known.algorithm})
    )
    options = {
        name: _option(name, getattr(defaults, name), field.metadata["doc"], field.metadata["check"])
        for name, field in FIELDS.items()
    }
    groups = [
        _group(algorithm, [options.pop(name) for name in fields_of(algorithm)])
        for algorithm in ALGORITHMS
        if fields_of(algorithm)
    ]
    for name, (default, text) in extra.items():
        options[name] = _option(name, known.tuned if name == "tuned" else default, text)
    fields = [*options.values(), *groups]
    return dataclasses.make_dataclass(command, fields, namespace={"__doc__": doc}, frozen=True)


def values_of(options: Any) -> dict[str, Any]:
    """The values of an instance of an `options_class`, by the names of the options."""
    values = dict(vars(options))
    for algorithm in ALGORITHMS:
        values |= vars(values.pop(algorithm, argparse.Namespace()))
    return values


def _group(algorithm: str, options: list[tuple[str, Any, Any]]) -> tuple[str, Any, Any]:
    """The options of one algorithm, under a heading of their own in ``--help``."""
    kind = dataclasses.make_dataclass(algorithm, options, frozen=True)
    default = dataclasses.field(default_factory=kind)
    return algorithm, Annotated[kind, tyro.conf.OmitArgPrefixes], default


class RunOptions(NamedTuple):
    """The options that `train` and `sweep` share."""

    key: int
    directory: Path | None
    resume: bool
    checkpoint_seconds: float
    loggers: tuple[str, ...]
    is_main_process: bool  # whether this process prints


def run_options(options: dict[str, Any]) -> RunOptions:
    """Remove the `RUN_OPTIONS` from ``options`` and check them; join the other processes, if any.

    Raises `ConfigError` for an invalid value.
    """
    shared = {name: options.pop(name) for name in RUN_OPTIONS}
    coordinator = shared["coordinator"]
    given = {name: shared[name] for name in ("num_processes", "process_index")}
    counts = {name: None if x is None else integer(name, x, 0) for name, x in given.items()}
    key = integer("key", shared["key"], 0)
    seconds = seconds_of("checkpoint_seconds", shared["checkpoint_seconds"])
    is_main_process = True
    if coordinator is not None:
        from purejaxppo.runs import processes

        processes.connect(coordinator, **counts)
        is_main_process = processes.is_main_process()
    elif any(x is not None for x in counts.values()):
        raise ConfigError(
            "num_processes and process_index need the address of the first process: "
            "coordinator=HOST:PORT"
        )
    return RunOptions(
        key=key,
        directory=shared["directory"],
        resume=shared["resume"],
        checkpoint_seconds=seconds,
        loggers=shared["log"],
        is_main_process=is_main_process,
    )


def _option(name: str, default: Any, doc: str, check: Any = None) -> tuple[str, Any, Any]:
    """One option. Text that is not a number stays text, so that `Config` words the error."""
    if isinstance(check, tuple | list):
        doc = f"{doc}: {', '.join(check)}"
    kind: Any = type(default)
    metavar = None
    if name == "directory":
        kind = Path | None
    elif name == "coordinator":
        kind = _one_word("TEXT", _text_or_none)
    elif name == "env_settings":
        kind = tuple[str, ...]
        metavar = "[NAME=VALUE ...]"
        default = tuple(f"{key}={value}" for key, value in default)
    elif name == "hidden_sizes":
        kind = _many_words("[INT ...]", number)
    elif isinstance(default, tuple):
        kind = tuple[str, ...]
    elif default is None:  # options that are not fields of `Config` are counts
        is_count = check is None or check is NONE_OR_POSITIVE_INT
        kind = _one_word("INT" if is_count else "FLOAT", number)
    elif kind in (int, float):
        kind = _one_word(kind.__name__.upper(), number)
    return (
        name,
        Annotated[kind, tyro.conf.arg(help=doc, metavar=metavar)],
        dataclasses.field(default=default),
    )


def _one_word(metavar: str, parse: Callable[[str], Any]) -> Any:
    """The type of an option that takes one word."""
    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: parse(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )
    return Annotated[Any, spec]


def _many_words(metavar: str, parse: Callable[[str], Any]) -> Any:
    """The type of an option that takes any number of words."""
    spec = PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda words: tuple(map(parse, words)),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(x) for x in value],
    )
    return Annotated[Any, spec]


def number(text: str) -> Any:
    """The text as an integer (including ``5e7``), a float or None; other text is unchanged."""
    if text == "None":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(text)
            is_integer = "." not in text and abs(value) < 2**62 and value == int(value)
            return int(value) if is_integer else value
    return text


def _text_or_none(text: str) -> str | None:
    return None if text == "None" else text


def parse_env_settings(items: Sequence[str]) -> dict[str, Any]:
    """``("max_steps_in_episode=50", "is_slippery=false")`` as a mapping.

    Numbers, True, False, None and tuples of them are written as in Python; any other value is a
    string. Raises `ConfigError` for an item without a name or ``=``, or a repeated name.
    """
    settings: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not name or not equals or name in settings:
            raise ConfigError(
                f"env_settings: {item!r} must be a name and its value, once each, "
                "such as max_steps_in_episode=50"
            )
        settings[name] = text
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            settings[name] = ast.literal_eval(
                text.capitalize() if text in ("true", "false") else text
            )
    return settings


def parse_grid(items: Sequence[str]) -> dict[str, Any]:
    """The grid of a sweep, from ``("lr=1e-4,3e-4", "hidden_sizes=64x64,32x32")``.

    ``gamma=uniform(0.9,1)`` and ``lr=loguniform(1e-5,1e-2)`` are distributions. Raises
    `ConfigError` for an item without a field or values, or a repeated field.
    """
    from purejaxppo.sweeps.grid import LogUniform, Uniform

    grid: dict[str, Any] = {}
    for item in items:
        name, equals, values = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not values or name in grid:
            raise ConfigError(
                f"grid: {item!r} must be a field and its values, once each, such as lr=1e-4,3e-4"
            )
        match = re.fullmatch(r"(loguniform|uniform)\(([^,]+),([^,]+)\)", values.replace(" ", ""))
        if match:
            distribution = LogUniform if match[1] == "loguniform" else Uniform
            grid[name] = distribution(number(match[2]), number(match[3]))
        else:
            grid[name] = [_grid_value(name, value) for value in values.split(",")]
    return grid


def _grid_value(name: str, text: str) -> Any:
    if name == "env_settings":
        return parse_env_settings(text.split("+"))
    if name == "hidden_sizes":
        return tuple(number(size) for size in text.split("x"))
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return text if name in FIELDS and isinstance(FIELDS[name].default, str) else number(text)


def split_cpu(num_devices: int | None) -> None:
    """Make JAX see the CPU as ``num_devices`` devices, by default one per core.

    A sweep spreads its members over them. Call this before JAX starts. It has no effect where JAX
    has a GPU or TPU, and the environment variable XLA_FLAGS takes precedence.
    """
    flag = "--xla_force_host_platform_device_count"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={num_devices or cores or 1}".strip()
