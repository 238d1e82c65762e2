"""What a training run returns, what it leaves in its directory, and its policies read back."""

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
from purejaxppo.runs import run_directory
from purejaxppo.runs.disk import atomic_write
from purejaxppo.runs.session import Best
from purejaxppo.runs.tables import Table
from purejaxppo.types import ConfigError, Env, Metrics, Model, TrainState


class RunPlan(NamedTuple):
    """What is about to run, known once it is compiled."""

    config: Config
    seeds: int
    device: str
    memory_bytes: int  # what the compiled program needs for its state and temporaries
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Run:
    """What `fit` returns: metrics as NumPy arrays [seeds, iterations]; of several seeds the state has them first."""

    config: Config
    seeds: int
    state: TrainState
    metrics: Metrics
    plan: RunPlan
    train_seconds: float
    interrupted: bool  # stopped by the user before all iterations were run
    env: Env
    model: Model | None
    best: Best | None = None  # by the evaluations during training; None without any
    evaluations: Table | None = (
        None  # columns iteration, timesteps, return_mean, …, each [seeds, evaluations]
    )
    resumed_at: int = 0  # the iteration of the checkpoint that the run went on from

    def policy(self, seed: int = 0) -> Policy:
        """The trained policy of one of the seeds."""
        index = seed if self.seeds > 1 else None
        return Policy.from_state(self.config, self.state, index, self.env, self.model)

    def best_policy(self, seed: int = 0) -> Policy:
        """The policy with the highest mean return in an evaluation during training (``eval_every``).

        The highest of several noisy means is higher than what it estimates: evaluate it again before quoting it.
        """
        index = seed if self.seeds > 1 else None
        if self.best is None or not self.best.iteration.reshape(-1)[seed]:
            raise ConfigError(
                "no policy was evaluated during training: fit(..., eval_every=iterations)"
            )
        return Policy.from_state(self.config, self.best, index, self.env, self.model)

    @property
    def diverged_at(self) -> list[int | None]:
        """For each seed the first iteration (counted from 1) at which loss or gradient were not finite, or None."""
        finite = finite_so_far(self.metrics)
        return [None if row.all() else int(row.argmin()) + 1 for row in finite]


def write(directory: Path, run: Run) -> None:
    """The picture and the policies of a run that has ended; each appears whole or not at all.

    Of one that was interrupted the checkpoints stay, so that it can go on.
    """
    from purejaxppo.analysis.plots import learning_curve

    title = f"{run.config.algorithm.upper()} on {run.config.env}"
    atomic_write(
        directory / "learning_curve.png",
        lambda path: learning_curve(run.metrics, title).savefig(path, format="png"),
    )
    best = np.zeros(run.seeds) if run.best is None else np.reshape(run.best.iteration, -1)
    seeds = {"policy": range(run.seeds), "best_policy": np.flatnonzero(best).tolist()}
    for name, policy in (("policy", run.policy), ("best_policy", run.best_policy)):
        shutil.rmtree(directory / name, ignore_errors=True)  # of before a resume
        for seed in seeds[name]:
            save_policy(
                directory / name / f"seed_{seed}" if run.seeds > 1 else directory / name,
                policy(seed),
            )
    if not run.interrupted:
        run_directory.end(directory)


def load_policies(directory: str | os.PathLike) -> list[Policy]:
    """The policies of a run, by seed; also of a directory that is one policy."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a run: there is no such directory")
    home = directory / "policy" if (directory / "policy").is_dir() else directory
    number = {path: path.name.removeprefix("seed_") for path in home.glob("seed_*")}
    seeds = sorted(
        (path for path in number if number[path].isdecimal()), key=lambda path: int(number[path])
    )
    return [load_policy(path) for path in seeds or [home]]
