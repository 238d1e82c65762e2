"""``python -m benchmarks COMMAND``: reproduce the numbers of the README."""

from typing import Literal

import tyro

from benchmarks import learning as learning_benchmark
from benchmarks import table1 as table1_benchmark
from purejaxppo.cli.options import split_cpu


def learning(
    algorithm: str = "ppo",
    envs: tuple[str, ...] | None = None,
    seeds: int = 16,
    at_once: int | None = None,
) -> None:
    """Train the tuned settings over many seeds and store the scores of the final policies.

    Args:
        algorithm: ppo, trpo or reinforce
        envs: names of the environments; None: all that have a goal
        seeds: number of agents in each environment
        at_once: number of agents in one compiled call; None: all
    """
    learning_benchmark.run(
        algorithm, list(envs or learning_benchmark.GOALS[algorithm]), seeds, at_once
    )


def table() -> None:
    """Print the stored scores as a table."""
    learning_benchmark.table()


def speed(cases: tuple[str, ...] = ("wide", "single", "seeds"), repeats: int = 5) -> None:
    """Measure steps per second and compile time.

    Args:
        cases: wide (2,048 environments), single (one agent, 4 environments), seeds (16 vmapped
            agents), trpo and trpo_seeds (one agent and 16, at rl-baselines3-zoo's settings)
        repeats: number of timed runs of each case
    """
    from benchmarks import speed as speed_benchmark

    speed_benchmark.run(list(cases), repeats)


def trpo_cost(repeats: int = 15) -> None:
    """Compare the time of an iteration of TRPO with that of PPO.

    Args:
        repeats: number of timed runs of each algorithm
    """
    from benchmarks import speed as speed_benchmark

    speed_benchmark.iteration_cost(repeats)


def table1(
    envs: tuple[str, ...] = table1_benchmark.ENVS,
    seeds: int = 3,
    timesteps: int = 1_000_000,
    show: bool = False,
) -> None:
    """Reproduce table 1 of the PPO paper on continuous environments and store the scores.

    Args:
        envs: names of the environments
        seeds: number of runs of each setting in each environment
        timesteps: environment steps of each run
        show: only print the stored table
    """
    if not show:
        table1_benchmark.run(list(envs), seeds, timesteps)
    else:
        table1_benchmark.table()


def sweeps(
    seeds: int = 16,
    repeats: int = 9,
    members: tuple[int, ...] = (256, 2048),
    timesteps: int = 50_000,
) -> None:
    """Compare a sweep with sequential runs, and measure large sweeps and checkpoints.

    Args:
        seeds: number of members in the comparison
        repeats: number of timed runs of each
        members: sizes of the large sweeps
        timesteps: environment steps of each member of a large sweep
    """
    split_cpu(None)
    from benchmarks import sweeps as sweeps_benchmark

    sweeps_benchmark.throughput(seeds, repeats)
    sweeps_benchmark.checkpoint_cost(seeds, repeats)
    for size in members:
        sweeps_benchmark.many(size, timesteps)


def population(
    envs: tuple[str, ...] = ("CartPole-v1", "Acrobot-v1"),
    populations: int = 8,
    members: int = 16,
    show: bool = False,
) -> None:
    """Compare populations with and without exchanges, from learning rates between 1e-6 and 0.1.

    Args:
        envs: names of the environments
        populations: number of populations of each kind, from different keys
        members: number of agents in a population
        show: only print the stored table
    """
    split_cpu(None)
    from benchmarks import population as population_benchmark

    if not show:
        population_benchmark.run(list(envs), populations, members)
    population_benchmark.table()


def rlhf_speed(
    peer_python: str,
    peer_threads: int | None = None,
    pairs: int = 5,
    repeats: int = 9,
    iterations: int = 9,
    store: bool = False,
) -> None:
    """Compare generation and iterations of PPO on a language model with TRL's PPOTrainer.

    Args:
        peer_python: interpreter of an environment with trl==1.12.0 and torch==2.13.0
        peer_threads: threads of PyTorch; None: its default, all cores
        pairs: number of times that both sides run in turn
        repeats: number of timed generations and rollouts in each run
        iterations: number of timed iterations in each run
        store: write the medians of each run to benchmarks/results/rlhf/speed.csv
    """
    from benchmarks import rlhf_speed as rlhf_speed_benchmark

    rlhf_speed_benchmark.run(peer_python, peer_threads, pairs, repeats, iterations, store)


def general(envs: tuple[str, ...] | None = None, seeds: int = 4, show: bool = False) -> None:
    """Compare candidates for the default settings of PPO after 98,304 steps.

    Environments without tuned settings get the defaults.

    Args:
        envs: names of the environments; None: eight of gymnax
        seeds: number of agents for each setting
        show: only print the stored table
    """
    split_cpu(None)
    from benchmarks import general as general_benchmark

    if not show:
        general_benchmark.run(list(envs or general_benchmark.ENVS), seeds)
    general_benchmark.show()


def rlhf(
    task: Literal["arithmetic", "reviews"] = "arithmetic",
    seeds: int = 5,
    workers: int = 1,
    show: bool = False,
) -> None:
    """Train language models over several seeds and store the measurements.

    Args:
        task: arithmetic (PPO, GRPO and RLOO beside the exact optimum) or reviews (PPO)
        seeds: number of pipelines of each kind, from different keys
        workers: number of seeds that run at once, each on one core
        show: only print the stored table
    """
    from benchmarks import rlhf as rlhf_benchmark

    if not show:
        rlhf_benchmark.run(task, seeds, workers)
    else:
        rlhf_benchmark.show(task)


def rlhf_judges() -> None:
    """Measure how often people, judges and a ridge regression agree with one person's comparison.

    The texts are the film-review snippets T, which no judge has learnt from.
    """
    from benchmarks import rlhf as rlhf_benchmark

    rlhf_benchmark.judges()


if __name__ == "__main__":
    commands = {
        "learning": learning,
        "table": table,
        "table1": table1,
        "speed": speed,
        "trpo_cost": trpo_cost,
        "rlhf_speed": rlhf_speed,
        "sweeps": sweeps,
        "population": population,
        "general": general,
        "rlhf": rlhf,
        "rlhf_judges": rlhf_judges,
    }
    tyro.extras.subcommand_cli_from_dict(commands, prog="python -m benchmarks")
