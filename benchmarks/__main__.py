"""``python -m benchmarks learning | table | speed``: the figures of the README, re-made."""

import tyro

from benchmarks import learning as learning_benchmark


def learning(
    envs: tuple[str, ...] = tuple(learning_benchmark.GOALS), seeds: int = 16, at_once: int | None = None
) -> None:
    """Train the tuned settings over many seeds and store the scores of the final policies.

    Args:
        envs: which environments
        seeds: how many agents each
        at_once: how many of them in one compiled call (all, if not given)
    """
    learning_benchmark.run(list(envs), seeds, at_once)


def table() -> None:
    """Print the stored scores as a table."""
    learning_benchmark.table()


def speed(cases: tuple[str, ...] = ("wide", "single", "seeds"), repeats: int = 5) -> None:
    """Measure steps per second and compile time.

    Args:
        cases: wide (2,048 environments), single (one agent, 4 environments), seeds (16 vmapped agents)
        repeats: timed runs of each
    """
    from benchmarks import speed as speed_benchmark

    speed_benchmark.run(list(cases), repeats)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"learning": learning, "table": table, "speed": speed}, prog="python -m benchmarks"
    )
