"""Which general settings of PPO learn most in few steps, over environments that they are not tuned for."""

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
KEY = 4711  # neither that of the tables nor one that settings were tuned with
TIMESTEPS = 98_304
RATES = (3e-4, 1e-3, 2e-3)
SHAPES = (  # num_envs, num_steps, num_minibatches, num_epochs
    (64, 128, 8, 4),
    (16, 64, 4, 10),
    (16, 128, 8, 10),
)
SETTING = ["num_envs", "num_steps", "num_minibatches", "num_epochs", "lr"]


def run(names: list[str], seeds: int) -> None:
    """Train every setting with so many seeds in each environment; rows are stored after each environment."""
    for name in names:
        rows = []
        for shape in SHAPES:
            sizes = dict(zip(SETTING, shape, strict=False))
            config = Config.from_dict({"env": name, "total_timesteps": TIMESTEPS, **sizes})
            scores = sweep(config, seeds, {"lr": list(RATES)}, key=KEY).scores
            rows.append(scores[["seed", "lr", "score"]].assign(env=name, **sizes))
        table = pd.concat(rows)
        if RESULTS.exists():
            before = pd.read_csv(RESULTS)
            table = pd.concat([before[before["env"] != name], table])
        table.to_csv(RESULTS, index=False)
        print(name, "done", flush=True)
        show()


def show() -> None:
    """Each setting's score, 0 for the worst setting of an environment and 1 for the best, with its 95 % interval."""
    table = pd.read_csv(RESULTS)
    means = table.groupby(["env", *SETTING])["score"].mean()
    worst, best = means.groupby("env").min(), means.groupby("env").max()
    scaled = (table["score"] - table["env"].map(worst)) / table["env"].map(best - worst).replace(
        0, np.nan
    )
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
