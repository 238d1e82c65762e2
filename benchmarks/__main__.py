"""``python -m benchmarks learning | table | speed | trpo_cost | table1``: the figures of the README, re-made."""

import tyro

from benchmarks import learning as learning_benchmark
from benchmarks import table1 as table1_benchmark


def learning(
    algorithm: str = "ppo", envs: tuple[str, ...] | None = None, seeds: int = 16, at_once: int | None = None
) -> None:
    """Train the tuned settings over many seeds and store the scores of the final policies.

    Args:
        algorithm: ppo, trpo or reinforce
        envs: which environments (all that have a goal, if not given)
        seeds: how many agents each
        at_once: how many of them in one compiled call (all, if not given)
    """
    learning_benchmark.run(algorithm, list(envs or learning_benchmark.GOALS[algorithm]), seeds, at_once)


def table() -> None:
    """Print the stored scores as a table."""
    learning_benchmark.table()


def speed(cases: tuple[str, ...] = ("wide", "single", "seeds"), repeats: int = 5) -> None:
    """Measure steps per second and compile time.

    Args:
        cases: wide (2,048 environments), single (one agent, 4 environments), seeds (16 vmapped agents), trpo and
            trpo_seeds (one agent and 16, at the zoo's settings)
        repeats: timed runs of each
    """
    from benchmarks import speed as speed_benchmark

    speed_benchmark.run(list(cases), repeats)


def trpo_cost(repeats: int = 15) -> None:
    """Measure an iteration of TRPO against one of PPO.

    Args:
        repeats: timed runs of each
    """
    from benchmarks import speed as speed_benchmark

    speed_benchmark.iteration_cost(repeats)


def table1(
    envs: tuple[str, ...] = table1_benchmark.ENVS, seeds: int = 3, timesteps: int = 1_000_000, show: bool = False
) -> None:
    """Repeat table 1 of the PPO paper on continuous environments, all settings and seeds, and store the scores.

    Args:
        envs: which environments
        seeds: runs of each setting in each environment
        timesteps: of each run
        show: only print the stored table
    """
    if not show:
        table1_benchmark.run(list(envs), seeds, timesteps)
    else:
        table1_benchmark.table()


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"learning": learning, "table": table, "speed": speed, "trpo_cost": trpo_cost, "table1": table1},
        prog="python -m benchmarks",
    )
