"""Scores of the tuned settings: the final policy in fresh episodes, summarised over seeds."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from purejaxppo import Config, Policy, envs, evaluate, make_train
from purejaxppo.analysis.statistics import estimate
from purejaxppo.config import tuned

RESULTS = Path(__file__).parent / "results" / "learning"
SCORING_KEY = 20260  # different from the keys used for tuning


class Goal(NamedTuple):
    score: float
    timesteps: int  # at most
    deterministic: bool = True
    episodes: int = 128


GOALS = {
    "ppo": {
        "CartPole-v1": Goal(500, 100_000),
        "Acrobot-v1": Goal(-75, 1_000_000),
        "MountainCar-v0": Goal(-110, 1_000_000),
        "MountainCarContinuous-v0": Goal(92, 100_000),
        "Pendulum-v1": Goal(-165, 1_000_000, episodes=1024),
        "Breakout-MinAtar": Goal(50, 10_000_000, deterministic=False),
        "Freeway-MinAtar": Goal(60, 10_000_000, deterministic=False),
        "SpaceInvaders-MinAtar": Goal(165, 10_000_000, deterministic=False),
    },
    "trpo": {
        "CartPole-v1": Goal(500, 100_000),
        "Acrobot-v1": Goal(-83, 100_000),
        "MountainCarContinuous-v0": Goal(92, 100_000),
        "Pendulum-v1": Goal(-170, 300_000, episodes=1024),
    },
    "reinforce": {"CartPole-v1": Goal(480, 500_000)},
}


def scorer(config: Config, goal: Goal) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """A compiled function from keys to the mean returns of final policies and their training steps.

    It trains one agent for each key, all of them at once.
    """
    env = envs.of_config(config)

    def score_agent(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_train, key_evaluate = jax.random.split(key)
        state = make_train(config, env)(key_train).state
        policy = Policy.from_state(config, state, env=env)
        returns = evaluate(policy, env, key_evaluate, goal.episodes, goal.deterministic).returns
        return returns.mean(), state.timesteps

    return jax.jit(jax.vmap(score_agent))


def run(algorithm: str, names: list[str], seeds: int, at_once: int | None) -> None:
    """Score each environment, ``at_once`` seeds per call, and store the results of every call."""
    for name in names:
        goal = GOALS[algorithm][name]
        config = Config.for_env(name, algorithm=algorithm)
        assert config.actual_timesteps <= goal.timesteps, (
            f"{name} is tuned for more steps than the goal allows"
        )
        keys = jax.random.split(jax.random.key(SCORING_KEY), seeds)
        score = scorer(config, goal)
        scores: list[float] = []
        steps: list[int] = []
        started = time.perf_counter()
        for group in np.split(np.arange(seeds), range(at_once or seeds, seeds, at_once or seeds)):
            group_scores, group_steps = score(keys[group])
            scores = scores + group_scores.tolist()
            steps = steps + group_steps.tolist()
            store(config, goal, scores, max(steps), time.perf_counter() - started)
            print(row(read(algorithm, name)), flush=True)


def store(config: Config, goal: Goal, scores: list[float], most_steps: int, seconds: float) -> None:
    mean = estimate(scores)
    command = (
        f"python -m benchmarks learning --algorithm {config.algorithm} --envs {config.env} "
        f"--seeds {len(scores)}"
    )
    result = {
        "algorithm": config.algorithm,
        "env": config.env,
        "command": command,
        "goal": goal._asdict(),
        "config": config.to_dict(),
        "timesteps": most_steps,  # of the agent that took the most
        "scores": [round(x, 3) for x in scores],
        "interquartile_mean": round(float(mean.point), 3),
        "interval_95": [round(float(mean.low), 3), round(float(mean.high), 3)],
        "seconds": round(seconds, 1),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    path = RESULTS / config.algorithm / f"{config.env}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def read(algorithm: str, name: str) -> dict[str, Any]:
    return json.loads((RESULTS / algorithm / f"{name}.json").read_text())


def row(result: dict[str, Any]) -> str:
    goal = result["goal"]["score"]
    met = "yes" if result["interval_95"][1] >= goal else "no"
    return (
        f"| {result['algorithm']} | {result['env']} | {result['timesteps']:,} | {summary(result)} "
        f"| {goal:g} | {met} | {len(result['scores'])} |"
    )


def summary(result: dict[str, Any]) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(result["interquartile_mean"], *result["interval_95"])


def table() -> None:
    """Print the stored results as Markdown, in the order of the goals."""
    print(
        "| algorithm | environment | steps | return: interquartile mean [95 % interval] "
        "| goal | met | seeds |"
    )
    print("|---|---|---|---|---|---|---|")
    for algorithm, goals in GOALS.items():
        for name in goals:
            if (RESULTS / algorithm / f"{name}.json").exists():
                print(row(read(algorithm, name)))


assert all(set(goals) <= set(tuned(algorithm)) for algorithm, goals in GOALS.items()), (
    "a goal without tuned settings"
)
