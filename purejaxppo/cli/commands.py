"""The command line, ``purejaxppo train | sweep | compare | evaluate | render | envs | rlhf``.

Each command is a thin layer over a Python function.
"""

import time

STARTED = time.perf_counter()  # before anything heavy is imported

# ruff: noqa: E402
import datetime
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from purejaxppo.cli.options import (
    SWEEP_OPTIONS,
    TRAIN_OPTIONS,
    RunOptions,
    number,
    options_class,
    parse_env_settings,
    parse_grid,
    run_options,
    split_cpu,
    values_of,
)
from purejaxppo.cli.rlhf import rlhf
from purejaxppo.cli.terminal import allow_any_character
from purejaxppo.config import Config, tuned
from purejaxppo.types import ConfigError
from purejaxppo.validation import integer

# Exit codes.
FAILED = 1
DIVERGED = 1
WRONG_INPUT = 2
INTERRUPTED = 130

console = Console(highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. An invalid input gives one sentence on stderr and exit code 2.

    If one of several processes fails, it does not wait for the others, which may have exited.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    allow_any_character()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"purejaxppo: {message}", file=sys.stderr)
        try:
            _dispatch(arguments)
        except ConfigError as error:
            print(f"purejaxppo: {error}", file=sys.stderr)
            _exit_without_others(WRONG_INPUT)
            raise SystemExit(WRONG_INPUT) from None
        except KeyboardInterrupt:
            _exit_without_others(INTERRUPTED)
            raise SystemExit(INTERRUPTED) from None
        except OSError as error:
            print(f"purejaxppo: {error}", file=sys.stderr)
            _exit_without_others(FAILED)
            raise SystemExit(FAILED) from None
        except Exception:
            if _has_other_processes():
                traceback.print_exc()
            _exit_without_others(FAILED)
            raise


def _has_other_processes() -> bool:
    processes = sys.modules.get("purejaxppo.runs.processes")
    return processes is not None and processes.connected()


def _exit_without_others(code: int) -> None:
    """Exit at once if this is one of several processes.

    A wrong input is wrong for all of them, so each first has time to print its message.
    """
    if _has_other_processes():
        if code == WRONG_INPUT:
            time.sleep(3)
        else:
            print(
                "purejaxppo: all processes end; the same commands with --resume continue the run",
                file=sys.stderr,
            )
        sys.modules["purejaxppo.runs.processes"].exit_immediately(code)


def _dispatch(arguments: list[str]) -> None:
    options = {
        "train": options_class(
            "train", "Train agents; without options, PPO on CartPole-v1.", TRAIN_OPTIONS, arguments
        ),
        "sweep": options_class(
            "sweep", "Train every setting of a grid with many seeds.", SWEEP_OPTIONS, arguments
        ),
    }
    commands: dict[str, Any] = {
        **options,
        "evaluate": evaluate,
        "render": render,
        "envs": envs,
        "compare": compare,
        "rlhf": rlhf,
    }
    chosen = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="purejaxppo",
        description="Reinforcement learning as one JAX function.",
        args=arguments,
    )
    for name, command in (("train", train), ("sweep", sweep)):
        if isinstance(chosen, options[name]):
            values = values_of(chosen)
            if name == "sweep":
                devices = values.pop("devices")
                # Before JAX starts.
                split_cpu(None if devices is None else integer("devices", devices, 1))
            run = run_options(values)
            console.quiet = not run.is_main_process
            command(run, **values)


# --------------------------------------------------------------------------------------- commands


def train(
    run: RunOptions,
    seeds: Any,
    eval_episodes: Any,
    eval_every: Any,
    **settings: Any,
) -> None:
    """Train, show the progress, and write a run directory; ``settings`` are fields of `Config`."""
    from purejaxppo.cli import console as show
    from purejaxppo.runs import processes
    from purejaxppo.runs.fit import fingerprint, fit
    from purejaxppo.setup import set_up

    setup = set_up(settings | {"env_settings": parse_env_settings(settings["env_settings"])})
    num_episodes = integer("eval_episodes", eval_episodes, 0)
    arguments: dict[str, Any] = {
        "seeds": integer("seeds", seeds, 1),
        "eval_every": integer("eval_every", eval_every, 0),
    }
    if arguments["eval_every"] and not num_episodes:
        raise ConfigError("eval_every needs eval_episodes of at least 1")
    arguments["eval_episodes"] = num_episodes or 1
    if num_episodes and setup.env.max_episode_steps is None:
        raise ConfigError(
            f"{setup.env.name} has no bound on the length of an episode, "
            "so its policies cannot be evaluated at the end: "
            "set eval_episodes=0, and give a bound to `purejaxppo evaluate`"
        )
    identity = fingerprint(setup.config, **arguments)
    directory = run.directory or _directory(setup.config, identity, run)
    screen = show.Screen(console, import_seconds=time.perf_counter() - STARTED)
    with screen.live():
        result = fit(
            setup,
            **arguments,
            key=run.key,
            directory=directory,
            resume=run.resume,
            checkpoint_seconds=run.checkpoint_seconds,
            loggers=run.loggers,
            on_start=screen.on_run_start,
            on_progress=screen.on_progress,
        )
    show.show_result(console, result)
    finite = [seed for seed, iteration in enumerate(result.diverged_at) if iteration is None]
    if num_episodes and finite and not result.interrupted:
        policies = [result.policy(seed) for seed in finite]
        processes.on_main_process(lambda: show.show_evaluation(console, policies, num_episodes))
    best = ", best_policy/" if (directory / "best_policy").exists() else ""
    show.say(
        console,
        f"The run is in {directory}: config.json, metrics.csv, learning_curve.png, policy/{best}",
    )
    if result.interrupted:
        console.print("The same command with --resume continues from here.")
    if not finite or result.interrupted:
        raise SystemExit(INTERRUPTED if result.interrupted else DIVERGED)


def sweep(
    run: RunOptions,
    grid: tuple[str, ...],
    seeds: Any,
    samples: Any,
    exchange_every: Any,
    eval_episodes: Any,
    at_once: Any,
    memory_limit: Any,
    **settings: Any,
) -> None:
    """Train every setting of a grid with many seeds, and show the best ones.

    Main arguments:
        run: the options that every run has.
        grid, samples: fields with their values or distributions, and the number of draws.
        seeds: the number of seeds for each setting.
        settings: the fields of `Config`.

    Other arguments:
        exchange_every: iterations between the exchanges of a population; 0 for none.
        eval_episodes: episodes that score each final policy.
        at_once, memory_limit: bounds on the members that train at once, as in `sweep`.
    """
    from purejaxppo.cli import console as show
    from purejaxppo.population import Exchange
    from purejaxppo.sweeps.sweep import fingerprint
    from purejaxppo.sweeps.sweep import sweep as run_sweep

    config = Config.from_dict(
        settings | {"env_settings": parse_env_settings(settings["env_settings"])}
    )
    arguments: dict[str, Any] = {
        "seeds": integer("seeds", seeds, 1),
        "grid": parse_grid(grid),
        "samples": integer("samples", samples, 0),
    }
    every = integer("exchange_every", exchange_every, 0)
    arguments["exchange"] = Exchange(every) if every else None
    arguments["eval_episodes"] = integer("eval_episodes", eval_episodes, 0)
    arguments["at_once"] = None if at_once is None else integer("at_once", at_once, 1)
    identity = fingerprint(config, **arguments)
    directory = run.directory or _directory(config, identity, run, "sweep-")
    screen = show.Screen(console)
    with screen.live():
        result = run_sweep(
            config,
            **arguments,
            key=run.key,
            directory=directory,
            memory_limit=None
            if memory_limit is None
            else integer("memory_limit", memory_limit, 1, bits=62),
            resume=run.resume,
            checkpoint_seconds=run.checkpoint_seconds,
            loggers=run.loggers,
            on_plan=screen.on_sweep_plan,
            on_start=screen.on_group_start,
            on_progress=screen.on_progress,
        )
    show.show_sweep(console, result)
    show.say(
        console,
        f"The sweep is in {directory}: summary.csv, scores.csv, curves.csv, figures, parts/",
    )
    if result.interrupted:
        console.print("The same command with --resume continues from here.")
        raise SystemExit(INTERRUPTED)
    if result.scores["diverged_at"].notna().all():
        raise SystemExit(DIVERGED)


def evaluate(
    run: tyro.conf.Positional[Path], episodes: int = 128, key: int = 0, max_steps: int | None = None
) -> None:
    """Play fresh episodes with the policies of a run.

    Args:
        run: directory written by train
        episodes: number of episodes for each policy
        key: integer from which the random key is made
        max_steps: steps after which an episode is cut off and counted; required if it has no bound
    """
    from purejaxppo.cli import console as show
    from purejaxppo.runs.run import load_policies

    show.show_evaluation(console, load_policies(run), episodes, key, max_steps)


def render(
    run: tyro.conf.Positional[Path],
    out: Path | None = None,
    seed: int = 0,
    key: int = 0,
    max_steps: int = 500,
) -> None:
    """Make a GIF of one episode of a trained policy.

    Args:
        run: directory written by train
        out: file to write; None: RUN/policy.gif
        seed: index of the agent in a run with several
        key: integer from which the random key is made
        max_steps: number of steps to show at most
    """
    from purejaxppo.policies.render import animate
    from purejaxppo.runs.run import load_policies

    if max_steps < 1:
        raise ConfigError(f"max_steps = {max_steps}: it must be an integer of at least 1")
    policies = load_policies(run)
    if not 0 <= seed < len(policies):
        raise ConfigError(f"seed = {seed}: this run has the seeds 0 … {len(policies) - 1}")
    path, episode_return = animate(policies[seed], out or run / "policy.gif", key, max_steps)
    console.print(f"{path}: one episode, return {episode_return:.1f}")


def envs(suite: str | None = None) -> None:
    """List the environments.

    Args:
        suite: list only the environments of this suite
    """
    import purejaxppo.envs as environments

    with_settings = tuned()
    for name in environments.list_envs(suite):
        console.print(name + ("  (tuned settings)" if name in with_settings else ""))


def compare(
    envs: tuple[str, ...] = ("CartPole-v1",),
    env_settings: tuple[str, ...] = (),
    algorithms: tuple[str, ...] = ("ppo", "trpo", "reinforce"),
    seeds: int = 8,
    total_timesteps: str | None = None,
    eval_episodes: int = 128,
    sampled: bool = False,
    key: int = 0,
    directory: Path | None = None,
) -> None:
    """Train several algorithms in several environments and compare them.

    Args:
        envs: names of the environments
        env_settings: settings of the environments, NAME=VALUE, such as max_steps_in_episode=50
        algorithms: ppo, trpo, reinforce, or variants: ppo/clip, ppo/adaptive_kl, ppo/fixed_kl,
            ppo/unclipped, reinforce/value, reinforce/leave_one_out, reinforce/running_mean,
            reinforce/none
        seeds: number of agents for each algorithm and environment
        total_timesteps: environment steps of each agent; None: the largest number that one of the
            algorithms is tuned for
        eval_episodes: fresh episodes in which each final policy is scored
        sampled: score sampled actions instead of the most probable ones
        key: integer from which the random key is made
        directory: directory for the results; must be new
    """
    from purejaxppo.cli import console as show
    from purejaxppo.sweeps import compare as comparison

    changes: dict[str, Any] = {}
    if total_timesteps is not None:
        changes["total_timesteps"] = number(total_timesteps)
    if env_settings:
        changes["env_settings"] = parse_env_settings(env_settings)
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
            changes=changes,
            directory=directory,
            on_start=screen.on_run_start,
            on_progress=screen.on_progress,
        )
    if entries:
        show.show_comparison(console, comparison.rows(entries))
        show.say(
            console,
            f"The comparison is in {directory}: "
            "comparison.md, scores.csv, curves.csv, comparison.png",
        )
    if len(entries) < len(envs) * len(algorithms) or entries[-1].interrupted:
        raise SystemExit(INTERRUPTED)


def _directory(config: Config, identity: dict[str, Any], run: RunOptions, kind: str = "") -> Path:
    """A new directory in ``runs/``; to resume, the newest unfinished one of the same command."""
    from purejaxppo.runs.processes import on_main_process
    from purejaxppo.runs.run_directory import unfinished

    name = f"{kind}{config.env.replace('/', '_')}"

    def choose() -> str:
        if run.resume:
            newest = unfinished(Path("runs"), f"{name}-*", identity, run.key)
            if newest:
                return str(newest)
            console.print("runs/ has no unfinished run of this command: starting a new one.")
        return str(Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}")

    return Path(on_main_process(choose))
