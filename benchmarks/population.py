"""Whether agents that copy one another do better than the same agents alone, from learning rates drawn at random."""

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
TIMESTEPS = {"Acrobot-v1": 200_000}  # elsewhere as many as the environment is tuned for


def run(names: list[str], populations: int, members: int) -> None:
    """Each population of an environment with exchanges and without, stored after every pair."""
    for name in names:
        config = Config.for_env(name)
        config = config.replace(total_timesteps=TIMESTEPS.get(name) or config.total_timesteps)
        exchange = Exchange(max(1, config.num_iterations // EXCHANGES))
        scores: dict[str, list[list[float]]] = {"exchange": [], "alone": []}
        started = time.perf_counter()
        for key in range(populations):
            for kind, given in (("exchange", exchange), ("alone", None)):
                result = sweep(config, 1, {"lr": RATES}, key, samples=members, exchange=given)
                lowest = result.curves["episode_return"].min()  # of an agent that diverged
                scores[kind].append(result.scores["score"].fillna(lowest).round(3).tolist())
            _store(config, exchange, members, scores, time.perf_counter() - started)
            print(row(name), flush=True)


def _store(config: Config, exchange: Exchange, members: int, scores: dict, seconds: float) -> None:
    count = len(scores["alone"])
    result = {
        "env": config.env,
        "command": f"python -m benchmarks population --envs {config.env} --populations {count} --members {members}",
        "config": config.to_dict(),
        "lr": list(RATES),
        "every": exchange.every,
        "scores": scores,  # of the final policies in 128 fresh episodes, [populations, members]
        "seconds": round(seconds, 1),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{config.env}.json").write_text(json.dumps(result, indent=2) + "\n")


def row(name: str) -> str:
    """An environment's line of the table."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    cells = []
    for summary in (np.median, np.max):
        for kind in ("exchange", "alone"):
            point, low, high = estimate(summary(np.array(result["scores"][kind]), axis=1))
            cells.append(f"{point:.1f} [{low:.1f}, {high:.1f}]")
    steps, count = result["config"]["total_timesteps"], len(result["scores"]["alone"])
    return f"| {name} | {steps:,} | {' | '.join(cells)} | {count} |"


def table() -> None:
    """The stored results as Markdown."""
    print(
        "| environment | steps | middle agent, exchange | middle, alone | best, exchange | best, alone | populations |"
    )
    print("|---|---|---|---|---|---|---|")
    for path in sorted(RESULTS.glob("*.json")):
        print(row(path.stem))
