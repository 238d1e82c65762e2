"""The general settings of PPO that learn most in few steps, in environments without tuning."""

from pathlib import Path

import numpy as np
import pandas as pd

from purejaxppo import Config, sweep
from purejaxppo.analysis.statistics import estimate

RESULTS = Path(__file__).parent / "results" / "general.csv"
ENVS = (
    "CartPole-v1",
    "Acrobot-v1",
    "Pendulum-v1",
    "MountainCarContinuous-v0",
    "Catch-bsuite",
    "UmbrellaChain-bsuite",
    "FourRooms-misc",
    "PointRobot-misc",
)
KEY = 4711  # used neither for the tables nor for tuning
TIMESTEPS = 98_304
RATES = (3e-4, 1e-3, 2e-3)
SHAPES = (  # num_envs, num_steps, num_minibatches, num_epochs
    (64, 128, 8, 4),
    (16, 64, 4, 10),
    (16, 128, 8, 10),
)
SETTING = ["num_envs", "num_steps", "num_minibatches", "num_epochs", "lr"]


def run(names: list[str], seeds: int) -> None:
    """Train every setting with ``seeds`` seeds; rows are stored after each environment."""
    for name in names:
        rows = []
        for shape in SHAPES:
            sizes = dict(zip(SETTING, shape, strict=False))
            config = Config.from_dict({"env": name, "total_timesteps": TIMESTEPS, **sizes})
            scores = sweep(config, seeds, {"lr": list(RATES)}, key=KEY).scores
            rows.append(scores[["seed", "lr", "score"]].assign(env=name, **sizes))
        table = pd.concat(rows)
        if RESULTS.exists():
            stored = pd.read_csv(RESULTS)
            table = pd.concat([stored[stored["env"] != name], table])
        table.to_csv(RESULTS, index=False)
        print(name, "done", flush=True)
        show()


def show() -> None:
    """Print the score of each setting with its 95 % interval.

    Scores are scaled to 0 for the worst setting of an environment and 1 for the best.
    """
    table = pd.read_csv(RESULTS)
    means = table.groupby(["env", *SETTING])["score"].mean()
    worst = means.groupby("env").min()
    best = means.groupby("env").max()
    spread = table["env"].map(best - worst).replace(0, np.nan)
    scaled = (table["score"] - table["env"].map(worst)) / spread
    rows = []
    for setting, part in table.assign(scaled=scaled).dropna().groupby(SETTING):
        by_env = part.pivot(index="seed", columns="env", values="scaled").to_numpy()
        rows.append((*setting, *estimate(by_env.mean(axis=1))))
    columns = [*SETTING, "score", "low", "high"]
    print(
        pd.DataFrame(rows, columns=columns)
        .sort_values("score", ascending=False)
        .to_string(index=False)
    )
