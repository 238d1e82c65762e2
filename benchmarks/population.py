"""Populations with and without exchanges, from learning rates drawn at random."""

import json
import time
from pathlib import Path

import jax
import numpy as np

from purejaxppo import Config, Exchange, LogUniform, sweep
from purejaxppo.analysis.statistics import estimate

RESULTS = Path(__file__).parent / "results" / "population"
RATES = LogUniform(1e-6, 1e-1)
EXCHANGES = 12  # in a run
TIMESTEPS = {"Acrobot-v1": 200_000}  # other environments use their tuned number


def run(names: list[str], populations: int, members: int) -> None:
    """Train each population with exchanges and without, and store the scores after every pair."""
    for name in names:
        config = Config.for_env(name)
        config = config.replace(total_timesteps=TIMESTEPS.get(name) or config.total_timesteps)
        exchange = Exchange(max(1, config.num_iterations // EXCHANGES))
        scores: dict[str, list[list[float]]] = {"exchange": [], "alone": []}
        started = time.perf_counter()
        for key in range(populations):
            for kind, argument in (("exchange", exchange), ("alone", None)):
                result = sweep(config, 1, {"lr": RATES}, key, samples=members, exchange=argument)
                # An agent that diverged gets the lowest return of any curve.
                lowest = result.curves["episode_return"].min()
                scores[kind].append(result.scores["score"].fillna(lowest).round(3).tolist())
            _store(config, exchange, members, scores, time.perf_counter() - started)
            print(row(name), flush=True)


def _store(config: Config, exchange: Exchange, members: int, scores: dict, seconds: float) -> None:
    count = len(scores["alone"])
    result = {
        "env": config.env,
        "command": f"python -m benchmarks population --envs {config.env} "
        f"--populations {count} --members {members}",
        "config": config.to_dict(),
        "lr": list(RATES),
        "every": exchange.every,
        "scores": scores,  # [populations, members] final policies in 128 fresh episodes
        "seconds": round(seconds, 1),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{config.env}.json").write_text(json.dumps(result, indent=2) + "\n")


def row(name: str) -> str:
    """The line of the table for one environment."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    cells = []
    for summary in (np.median, np.max):
        for kind in ("exchange", "alone"):
            point, low, high = estimate(summary(np.array(result["scores"][kind]), axis=1))
            cells.append(f"{point:.1f} [{low:.1f}, {high:.1f}]")
    steps = result["config"]["total_timesteps"]
    count = len(result["scores"]["alone"])
    return f"| {name} | {steps:,} | {' | '.join(cells)} | {count} |"


def table() -> None:
    """Print the stored results as Markdown."""
    print(
        "| environment | steps | middle agent, exchange | middle, alone | best, exchange "
        "| best, alone | populations |"
    )
    print("|---|---|---|---|---|---|---|")
    for path in sorted(RESULTS.glob("*.json")):
        print(row(path.stem))
