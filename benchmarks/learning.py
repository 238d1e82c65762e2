"""How well the tuned settings learn: the final policy in fresh episodes, interquartile mean over seeds."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from purejaxppo import Config, Policy, envs, evaluate, make_train
from purejaxppo.config import tuned
from purejaxppo.statistics import estimate

RESULTS = Path(__file__).parent / "results" / "learning"
SCORING_KEY = 20260  # settings were tuned with other keys


class Goal(NamedTuple):
    score: float
    timesteps: int
    deterministic: bool = True
    episodes: int = 128


GOALS = {
    "CartPole-v1": Goal(500, 100_000),
    "Acrobot-v1": Goal(-75, 1_000_000),
    "MountainCar-v0": Goal(-110, 1_000_000),
    "MountainCarContinuous-v0": Goal(92, 100_000),
    "Pendulum-v1": Goal(-165, 1_000_000, episodes=1024),
    "Breakout-MinAtar": Goal(50, 10_000_000, deterministic=False),
    "Freeway-MinAtar": Goal(60, 10_000_000, deterministic=False),
    "SpaceInvaders-MinAtar": Goal(165, 10_000_000, deterministic=False),
}


def scorer(config: Config, goal: Goal) -> Callable[[jax.Array], jax.Array]:
    """From keys to the mean return of each one's final policy; all of them trained in one compiled function."""
    env = envs.make(config.env)

    def one(key: jax.Array) -> jax.Array:
        key_train, key_evaluate = jax.random.split(key)
        result = make_train(config, env)(key_train)
        policy = Policy.from_state(config, result.state, env=env)
        return evaluate(policy, env, key_evaluate, goal.episodes, goal.deterministic).returns.mean()

    return jax.jit(jax.vmap(one))


def run(names: list[str], seeds: int, at_once: int | None) -> None:
    """Score each environment, ``at_once`` seeds in one call, and store what came out after every call."""
    for name in names:
        goal = GOALS[name]
        config = Config.for_env(name)
        assert config.actual_timesteps <= goal.timesteps, f"{name} is tuned for more steps than the goal allows"
        keys = jax.random.split(jax.random.key(SCORING_KEY), seeds)
        score, scores = scorer(config, goal), []
        started = time.perf_counter()
        for group in np.split(np.arange(seeds), range(at_once or seeds, seeds, at_once or seeds)):
            scores += score(keys[group]).tolist()
            store(name, config, goal, scores, time.perf_counter() - started)
            print(row(read(name)), flush=True)


def store(name: str, config: Config, goal: Goal, scores: list[float], seconds: float) -> None:
    middle = estimate(scores)
    result = {
        "env": name,
        "command": f"python -m benchmarks learning --envs {name} --seeds {len(scores)}",
        "goal": goal._asdict(),
        "config": config.to_dict(),
        "actual_timesteps": config.actual_timesteps,
        "scores": [round(x, 3) for x in scores],
        "interquartile_mean": round(float(middle.point), 3),
        "interval_95": [round(float(middle.low), 3), round(float(middle.high), 3)],
        "seconds": round(seconds, 1),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def row(result: dict[str, Any]) -> str:
    low, high = result["interval_95"]
    goal = result["goal"]["score"]
    met = "yes" if high >= goal else "no"
    return (
        f"| {result['env']} | {result['actual_timesteps']:,} | {result['interquartile_mean']:.1f} "
        f"[{low:.1f}, {high:.1f}] | {goal:g} | {met} | {len(result['scores'])} |"
    )


def table() -> None:
    """The stored results as Markdown, in the order of the goals."""
    print("| environment | steps | return: interquartile mean [95 % interval] | goal | met | seeds |")
    print("|---|---|---|---|---|---|")
    for name in GOALS:
        if (RESULTS / f"{name}.json").exists():
            print(row(read(name)))


assert set(GOALS) <= set(tuned()), "a goal for an environment without tuned settings"
