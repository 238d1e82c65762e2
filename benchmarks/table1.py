"""Table 1 of the PPO paper (Schulman et al. 2017, section 6.1) on the available environments.

The paper's protocol: 1M steps, T = 2048 in one environment, Adam at 3e-4 without annealing, 10
epochs with minibatches of 64, γ = 0.99, λ = 0.95, two separate networks of 64 × 64 tanh units, no
entropy bonus. The score of a run is the mean return of its last 100 episodes (here of the last
iterations with at least 100). In each environment the scores are shifted and scaled so that a
random policy has 0 and the best result 1, here the mean over the runs of the best setting. The
score of a setting is the mean over all its runs. A run that diverged has the random policy's score.

Choices that the paper leaves open follow OpenAI's ppo1: observations are normalised, rewards are
not, and the gradient is not clipped. Advantages, however, are standardised in each minibatch. The
random policy is the untrained network. The environments differ: the paper uses seven of MuJoCo's.
"""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from purejaxppo import Config, Metrics, Policy, envs, evaluate, make_trainer
from purejaxppo.runs.agents import job_of
from purejaxppo.runs.chunks import run_chunks
from purejaxppo.runs.programs import compile_programs
from purejaxppo.setup import set_up

RESULTS = Path(__file__).parent / "results" / "table1"
ENVS = (
    "Pendulum-v1",
    "MountainCarContinuous-v0",
    "Reacher-misc",
    "Swimmer-misc",
    "PointRobot-misc",
)
PROTOCOL = Config(
    num_envs=1,
    num_steps=2048,
    num_epochs=10,
    num_minibatches=32,
    lr=3e-4,
    anneal_lr=False,
    max_grad_norm=1e6,
    gamma=0.99,
    gae_lambda=0.95,
    ent_coef=0.0,
    normalize_obs=True,
)
LAST_EPISODES = 100


class Row(NamedTuple):
    """A setting of the paper's table and its score there."""

    label: str
    objective: str
    value: float
    paper: float


FIELD = {
    "unclipped": "clip_eps",
    "clip": "clip_eps",
    "adaptive_kl": "kl_target",
    "fixed_kl": "kl_coef",
}
ROWS = (
    Row("no clipping or penalty", "unclipped", 0.2, -0.39),
    Row("clipping, ε = 0.1", "clip", 0.1, 0.76),
    Row("clipping, ε = 0.2", "clip", 0.2, 0.82),
    Row("clipping, ε = 0.3", "clip", 0.3, 0.70),
    Row("adaptive KL, d_targ = 0.003", "adaptive_kl", 0.003, 0.68),
    Row("adaptive KL, d_targ = 0.01", "adaptive_kl", 0.01, 0.74),
    Row("adaptive KL, d_targ = 0.03", "adaptive_kl", 0.03, 0.71),
    Row("fixed KL, β = 0.3", "fixed_kl", 0.3, 0.62),
    Row("fixed KL, β = 1", "fixed_kl", 1.0, 0.71),
    Row("fixed KL, β = 3", "fixed_kl", 3.0, 0.72),
    Row("fixed KL, β = 10", "fixed_kl", 10.0, 0.69),
)


def run(names: list[str], seeds: int, timesteps: int) -> None:
    """Train every setting in every environment and store the raw scores.

    There is one compilation for each objective.
    """
    for name in names:
        scores: dict[str, Any] = {"random policy": random_policy(name)}
        for objective, field in FIELD.items():
            rows = [row for row in ROWS if row.objective == objective]
            started = time.perf_counter()
            trained = train(name, objective, field, [row.value for row in rows], seeds, timesteps)
            for row, row_scores in zip(rows, trained, strict=True):
                scores[row.label] = [
                    round(float(x), 4) if np.isfinite(x) else None for x in row_scores
                ]
            seconds = time.perf_counter() - started
            print(
                f"{name}, {objective}: {np.round(trained, 2).tolist()}, {seconds:.0f} s",
                flush=True,
            )
        command = (
            f"python -m benchmarks table1 --envs {name} --seeds {seeds} --timesteps {timesteps}"
        )
        result = {
            "env": name,
            "command": command,
            "timesteps": timesteps,
            "jax": jax.__version__,
            "scores": scores,
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(
            json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        )
    table()


def train(
    name: str, objective: str, field: str, values: list[float], seeds: int, timesteps: int
) -> NDArray[np.floating]:
    """The scores [values, seeds]."""
    config = PROTOCOL.replace(env=name, objective=objective, total_timesteps=timesteps)
    programs = compile_programs(job_of(set_up(config)), len(values) * seeds, (field,))
    swept = {field: np.repeat(values, seeds).astype(np.float32)}
    state = programs.init(
        jnp.tile(jax.random.split(jax.random.key(2017), seeds), len(values)), swept
    )
    # In a single call for the whole run, the CPU runtime would accumulate about ten gigabytes.
    chunks = [chunk.metrics for chunk in run_chunks(programs, swept, state)]
    metrics = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *chunks)
    return last_episodes(metrics).reshape(len(values), seeds)


def last_episodes(metrics: Metrics) -> NDArray[np.floating]:
    """The mean return over the fewest last iterations with `LAST_EPISODES` episodes or more."""
    returns = np.asarray(metrics.episode_return)[..., ::-1]
    episodes = np.asarray(metrics.episodes)[..., ::-1]
    later = np.cumsum(episodes, axis=-1) - episodes
    counted = np.where(later < LAST_EPISODES, episodes, 0)
    return np.where(counted > 0, returns * counted, 0).sum(axis=-1) / counted.sum(axis=-1)


def random_policy(name: str) -> float:
    """The mean return of the untrained network with sampled actions."""
    config = PROTOCOL.replace(env=name)
    env = envs.make(name)
    state = jax.jit(make_trainer(config, env).init)(jax.random.key(0))
    policy = Policy.from_state(config, state, env=env)
    returns = evaluate(policy, env, jax.random.key(1), 512, deterministic=False).returns
    return round(float(returns.mean()), 4)


def table() -> None:
    """Print the paper's table from the stored scores, with the means over seeds per environment."""
    stored = {name: read(name) for name in ENVS if (RESULTS / f"{name}.json").exists()}
    normalised = {name: normalise(scores) for name, scores in stored.items()}
    print("| setting | paper | here [95 %] | " + " | ".join(stored) + " |")
    print("|---" * (3 + len(stored)) + "|")
    for row in ROWS:
        # [environments, seeds]
        runs = np.stack([scores[row.label] for scores in normalised.values()])
        low, high = interval(runs)
        cells = [f"{scores[row.label].mean():.1f}" for scores in stored.values()]
        print(
            f"| {row.label} | {row.paper:.2f} | {runs.mean():.2f} [{low:.2f}, {high:.2f}] | "
            + " | ".join(cells)
            + " |"
        )
    print(
        "| random policy | 0 | 0 | "
        + " | ".join(f"{x['random policy']:.1f}" for x in stored.values())
        + " |"
    )


def read(name: str) -> dict[str, NDArray[np.floating]]:
    """The scores [seeds] of each setting in an environment.

    A run that diverged has the score of the random policy.
    """
    scores = json.loads((RESULTS / f"{name}.json").read_text())["scores"]
    zero = scores.pop("random policy")
    return {"random policy": np.asarray(zero)} | {
        label: np.asarray([zero if x is None else x for x in row_scores])
        for label, row_scores in scores.items()
    }


def normalise(scores: dict[str, NDArray[np.floating]]) -> dict[str, NDArray[np.floating]]:
    """The scores scaled so that the random policy has 0 and the best setting's mean is 1."""
    zero = scores["random policy"]
    one = max(scores[row.label].mean() for row in ROWS)
    return {row.label: (scores[row.label] - zero) / (one - zero) for row in ROWS}


def interval(runs: NDArray[np.floating], resamples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over runs [environments, seeds].

    Seeds are resampled within each environment.
    """
    drawn = np.random.default_rng(0).integers(0, runs.shape[1], (resamples, *runs.shape))
    means = np.take_along_axis(np.broadcast_to(runs, drawn.shape), drawn, axis=2).mean(axis=(1, 2))
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))
