"""The command line: ``purejaxppo train | evaluate | render | envs | compare``, a thin layer on the Python functions."""

import time

STARTED = time.perf_counter()  # before anything heavy is imported

# ruff: noqa: E402
import argparse
import contextlib
import dataclasses
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from purejaxppo.checks import integer
from purejaxppo.config import FIELDS, Config, tuned
from purejaxppo.types import ConfigError

DIVERGED, WRONG_INPUT, INTERRUPTED = 1, 2, 130  # exit codes
console = Console(highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a wrong input is one sentence on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        commands: dict[str, Any] = {
            "train": _train_options(arguments),
            "evaluate": evaluate,
            "render": render,
            "envs": envs,
            "compare": compare,
        }
        chosen = tyro.extras.subcommand_cli_from_dict(
            commands, prog="purejaxppo", description="Reinforcement learning as one JAX function.", args=arguments
        )
        if dataclasses.is_dataclass(chosen):
            train(**vars(chosen))
    except ConfigError as error:
        print(f"purejaxppo: {error}", file=sys.stderr)
        raise SystemExit(WRONG_INPUT) from None


# --------------------------------------------------------------------------------------- commands


def train(seeds: str, key: str, directory: Path | None, eval_episodes: str, tuned: bool, **settings: Any) -> None:
    """Train, show what happens, and leave a run directory."""
    from purejaxppo import console as show
    from purejaxppo import envs as environments
    from purejaxppo.fitting import fit

    config = Config.from_dict(_numbers(settings))
    num_seeds, num_episodes = _count("seeds", seeds, 1), _count("eval_episodes", eval_episodes, 0)
    if directory is None:
        directory = Path("runs") / f"{config.env.replace('/', '_')}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    env = environments.make(config.env)
    screen = show.Screen(console, import_seconds=time.perf_counter() - STARTED)
    with screen.live():
        run = fit(
            config,
            seeds=num_seeds,
            key=_count("key", key, 0),
            env=env,
            directory=directory,
            on_start=screen.on_start,
            on_progress=screen.on_progress,
        )
    show.show_result(console, run)
    alive = [seed for seed, iteration in enumerate(run.diverged_at) if iteration is None]
    if num_episodes and alive and not run.interrupted:
        show.show_evaluation(console, [run.policy(seed) for seed in alive], num_episodes)
    console.print(f"The run is in {directory}: config.json, metrics.csv, learning_curve.png, policy/")
    if not alive or run.interrupted:
        raise SystemExit(INTERRUPTED if run.interrupted else DIVERGED)


def evaluate(run: tyro.conf.Positional[Path], episodes: int = 128, key: int = 0) -> None:
    """Play fresh episodes with the policies of a run.

    Args:
        run: directory that train left
        episodes: how many for each policy
        key: number that the random key is made of
    """
    from purejaxppo import console as show
    from purejaxppo.run_directory import load_policies

    show.show_evaluation(console, load_policies(run), episodes, key)


def render(
    run: tyro.conf.Positional[Path], out: Path | None = None, seed: int = 0, key: int = 0, max_steps: int = 500
) -> None:
    """Make a GIF of one episode of a trained policy.

    Args:
        run: directory that train left
        out: file to write; RUN/policy.gif if not given
        seed: which agent, of a run with several
        key: number that the random key is made of
        max_steps: longest episode to show
    """
    from purejaxppo.rendering import animate
    from purejaxppo.run_directory import load_policies

    if max_steps < 1:
        raise ConfigError(f"max_steps = {max_steps}: it must be an integer of at least 1")
    policies = load_policies(run)
    if not 0 <= seed < len(policies):
        raise ConfigError(f"seed = {seed}: this run has the seeds 0 … {len(policies) - 1}")
    path, episode_return = animate(policies[seed], out or run / "policy.gif", key, max_steps)
    console.print(f"{path}: one episode, return {episode_return:.1f}")


def envs(suite: str | None = None) -> None:
    """List what can be trained.

    Args:
        suite: only the environments of this suite
    """
    from purejaxppo import envs as environments

    with_settings = tuned()
    for name in environments.list_envs(suite):
        console.print(name + ("  (tuned settings)" if name in with_settings else ""))


def compare(
    envs: tuple[str, ...] = ("CartPole-v1",),
    algorithms: tuple[str, ...] = ("ppo", "trpo", "reinforce"),
    seeds: int = 8,
    total_timesteps: str | None = None,
    eval_episodes: int = 128,
    sampled: bool = False,
    key: int = 0,
    directory: Path | None = None,
) -> None:
    """Train several algorithms in several environments and compare them: a table, data and a picture.

    Args:
        envs: environments
        algorithms: ppo, trpo, reinforce, or variants: ppo/clip, ppo/adaptive_kl, ppo/fixed_kl, ppo/unclipped,
            reinforce/value, reinforce/leave_one_out, reinforce/running_mean, reinforce/none
        seeds: agents of each
        total_timesteps: steps of each agent; if not given, the largest that one of the algorithms is tuned for
        eval_episodes: fresh episodes in which each final policy is scored
        sampled: score sampled actions instead of the most probable ones
        key: number that the random key is made of
        directory: where the results go; must be new
    """
    from purejaxppo import comparison
    from purejaxppo import console as show

    directory = directory or Path("runs") / f"compare-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    screen = show.Screen(console, import_seconds=time.perf_counter() - STARTED)
    with screen.live():
        entries = comparison.compare(
            envs,
            algorithms,
            seeds=seeds,
            key=key,
            eval_episodes=eval_episodes,
            deterministic=not sampled,
            changes={} if total_timesteps is None else {"total_timesteps": _number(total_timesteps)},
            directory=directory,
            on_start=screen.on_start,
            on_progress=screen.on_progress,
        )
    if entries:
        show.show_comparison(console, comparison.rows(entries))
        console.print(f"The comparison is in {directory}: comparison.md, scores.csv, curves.csv, comparison.png")
    if len(entries) < len(envs) * len(algorithms) or entries[-1].interrupted:
        raise SystemExit(INTERRUPTED)


# ---------------------------------------------------------------------------------------- options


def _train_options(arguments: Sequence[str]) -> type:
    """A dataclass with an option for each field of `Config`; the defaults are those tuned for the environment."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env", nargs="?", default=Config.env, const=Config.env)
    first.add_argument("--algorithm", nargs="?", default=Config.algorithm, const=Config.algorithm)
    first.add_argument("--no-tuned", "--no_tuned", dest="tuned", action="store_false")
    asked, _ = first.parse_known_args(arguments[1:] if arguments[:1] == ["train"] else [])
    defaults = (
        Config.for_env(asked.env, algorithm=asked.algorithm)
        if asked.tuned
        else Config.from_dict({"env": asked.env, "algorithm": asked.algorithm})
    )

    options: list[tuple[str, Any, Any]] = [
        _option(name, getattr(defaults, name), field.metadata["doc"], field.metadata["check"])
        for name, field in FIELDS.items()
    ]
    options += [
        _option("seeds", 1, "agents to train at once"),
        _option("key", 0, "number that the random key is made of"),
        ("directory", Annotated[Path | None, tyro.conf.arg(help="where the run goes; must be new")], None),
        _option("eval_episodes", 128, "episodes to evaluate the final policy in; 0 for none"),
        _option("tuned", asked.tuned, "start from the settings that are tuned for the environment"),
    ]
    return dataclasses.make_dataclass(
        "train", options, namespace={"__doc__": "Train agents; without options, PPO on CartPole-v1."}, frozen=True
    )


def _option(name: str, default: Any, doc: str, check: Any = None) -> tuple[str, Any, Any]:
    """One option. Numbers come as text, so that `Config`, which knows what is allowed, says what is wrong with them."""
    if isinstance(check, tuple):
        doc = f"{doc}: {', '.join(check)}"
    number = default is None or type(default) in (int, float)
    metavar = None if not number else "FLOAT" if default is None else type(default).__name__.upper()
    kind: Any = tuple[str, ...] if isinstance(default, tuple) else str if number else type(default)
    default = tuple(map(str, default)) if isinstance(default, tuple) else str(default) if number else default
    return name, Annotated[kind, tyro.conf.arg(help=doc, metavar=metavar)], dataclasses.field(default=default)


def _numbers(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with text turned into numbers where it is one and a number is meant."""
    values = {name: x if isinstance(FIELDS[name].default, str) else _number(x) for name, x in settings.items()}
    return values | {"hidden_sizes": tuple(_number(x) for x in settings["hidden_sizes"])}


def _number(text: Any) -> Any:
    if text == "None":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError, TypeError):
            return text if isinstance(text, bool) else kind(text)
    return text


def _count(name: str, text: str, least: int) -> int:
    return integer(name, _number(text), least)


if __name__ == "__main__":
    main()
