"""The result of a training run, its files, and loading its policies."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from purejaxppo.config import Config
from purejaxppo.metrics import finite_so_far
from purejaxppo.policies.files import load_policy, save_policy
from purejaxppo.policies.policy import Policy
from purejaxppo.runs.disk import atomic_write
from purejaxppo.runs.evaluation import Best
from purejaxppo.runs.tables import Table
from purejaxppo.types import ConfigError, Env, Metrics, Model, TrainState


class RunPlan(NamedTuple):
    """A run after compilation and before its first iteration."""

    config: Config
    seeds: int
    device: str
    memory_bytes: int  # for the state and the temporaries of the compiled program, on each device
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Run:
    """The result of `fit`."""

    config: Config
    seeds: int
    state: TrainState  # [seeds, ...] for several seeds
    metrics: Metrics  # NumPy arrays [seeds, iterations]
    plan: RunPlan
    train_seconds: float
    interrupted: bool  # by Ctrl-C or SIGTERM, before the last iteration
    env: Env
    model: Model | None
    best: Best | None = None  # None without evaluations during training
    # Columns iteration, timesteps, return_mean, …, each [seeds, evaluations].
    evaluations: Table | None = None
    resumed_at: int = 0  # iteration of the checkpoint that the run resumed from; 0 without one

    def policy(self, seed: int = 0) -> Policy:
        """The final policy of one seed."""
        index = seed if self.seeds > 1 else None
        return Policy.from_state(self.config, self.state, index, self.env, self.model)

    def best_policy(self, seed: int = 0) -> Policy:
        """The policy with the highest mean return in an evaluation during training.

        The maximum of several noisy means is biased upwards: evaluate the policy again before
        quoting its return. Raises `ConfigError` without an evaluation (``eval_every``).
        """
        index = seed if self.seeds > 1 else None
        if self.best is None or not self.best.iteration.reshape(-1)[seed]:
            raise ConfigError(
                "no policy was evaluated during training: fit(..., eval_every=iterations)"
            )
        return Policy.from_state(self.config, self.best, index, self.env, self.model)

    @property
    def diverged_at(self) -> list[int | None]:
        """The first iteration with a non-finite loss or gradient, counted from 1, for each seed.

        None for a seed that did not diverge.
        """
        finite = finite_so_far(self.metrics)
        return [None if row.all() else int(row.argmin()) + 1 for row in finite]


def write(directory: Path, run: Run) -> None:
    """Write the learning curve and the policies of a run, each atomically."""
    from purejaxppo.analysis.plots import learning_curve

    title = f"{run.config.algorithm.upper()} on {run.config.env}"
    atomic_write(
        directory / "learning_curve.png",
        lambda path: learning_curve(run.metrics, title).savefig(path, format="png"),
    )
    best_at = np.zeros(run.seeds) if run.best is None else np.reshape(run.best.iteration, -1)
    seeds = {"policy": range(run.seeds), "best_policy": np.flatnonzero(best_at).tolist()}
    for name, policy in (("policy", run.policy), ("best_policy", run.best_policy)):
        shutil.rmtree(directory / name, ignore_errors=True)  # from before a resume
        for seed in seeds[name]:
            path = directory / name / f"seed_{seed}" if run.seeds > 1 else directory / name
            save_policy(path, policy(seed))


def load_policies(directory: str | os.PathLike) -> list[Policy]:
    """Load the policies of a run, ordered by seed; a directory with one policy gives that one.

    Raises `ConfigError` if there is no such directory or a policy cannot be loaded.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a run: there is no such directory")
    home = directory / "policy" if (directory / "policy").is_dir() else directory
    seed_of = {path: path.name.removeprefix("seed_") for path in home.glob("seed_*")}
    seed_directories = sorted(
        (path for path in seed_of if seed_of[path].isdecimal()),
        key=lambda path: int(seed_of[path]),
    )
    return [load_policy(path) for path in seed_directories or [home]]
