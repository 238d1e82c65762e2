"""Measurements of the policies of a pipeline before and after training, for the report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from purejaxppo.rlhf import arithmetic, reward_model, reward_network, sft
from purejaxppo.rlhf.evaluation import win_rate
from purejaxppo.rlhf.json_files import write_json, write_json_lines
from purejaxppo.rlhf.judges import pairwise_accuracy
from purejaxppo.rlhf.measurer import Measurer, as_policy, evaluation_key
from purejaxppo.rlhf.model_files import StoredModel
from purejaxppo.rlhf.sampling import best_of_n, best_of_n_kl
from purejaxppo.rlhf.settings import PipelineSettings
from purejaxppo.rlhf.tasks import Task
from purejaxppo.rlhf.texts import Score, Texts, completion_log_prob
from purejaxppo.types import PRNGKey, PyTree

NUM_SAMPLES = 50  # continuations in samples.jsonl


def measure_policies(
    settings: PipelineSettings,
    task: Task,
    directory: Path,
    reference: PyTree,
    final: PyTree,
    score: Score,
    score_params: PyTree,
    trained_reward: StoredModel | None = None,
) -> dict[str, Any]:
    """Write ``evaluation.json`` and ``samples.jsonl``, and return the former.

    All policies continue the same held-out prompts: the fine-tuned one (sft), the final one, and
    the best of 2, 4, … completions of the fine-tuned one by the score that training maximised,
    clipped and with the penalty for a missing end.
    """
    measurer = Measurer(settings, task, reference, score, score_params)
    prompts = task.held_out_prompts
    key = evaluation_key(settings)
    texts = {
        "sft": measurer.completions(reference, prompts, key),
        settings.algorithm: measurer.completions(final, prompts, key),
    }
    numbers = {
        "sft": measurer.numbers(reference, texts["sft"]),
        settings.algorithm: measurer.numbers(final, texts[settings.algorithm]),
    }
    for n, best in _best_of(settings, measurer, key).items():
        name = f"best of {n}"
        texts[name] = best
        # Its KL divergence has no unbiased estimate from its texts: this is an upper bound.
        numbers[name] = measurer.numbers(reference, best) | {"kl": best_of_n_kl(n)}
        del numbers[name]["kl_k1"]
        del numbers[name]["entropy"]
    measured: dict[str, Any] = {
        "prompts": len(prompts.length),
        "policies": numbers,
        "win_rates": _win_rates(measurer, texts),
        "accuracies": _accuracies(task, trained_reward),
        "sft_held_out": _floats(sft.evaluate(measurer.model, measurer.reference, task.held_out)),
    }
    measured["notes"] = list(task.notes)
    is_anchored = settings.ref_kl_target is None and settings.missing_end_penalty == 0
    if task.name == "arithmetic" and is_anchored and settings.score_clip >= 1:
        measured["optimum"] = _against_optimum(settings, measurer, reference, final, numbers)
    columns = {name: measurer.strings(x) for name, x in texts.items()}
    starts = measurer.strings(Texts(*map(jnp.asarray, (*prompts, prompts.length))))
    rows = [
        {"prompt": start, **{name: column[i] for name, column in columns.items()}}
        for i, start in enumerate(starts[:NUM_SAMPLES])
    ]
    write_json_lines(directory / "samples.jsonl", rows)
    write_json(directory / "evaluation.json", measured)  # last: a resume takes it for the end
    return measured


# ------------------------------------------------------------------------------------------ parts


def _best_of(settings: PipelineSettings, measurer: Measurer, key: PRNGKey) -> dict[int, Texts]:
    """The best of 2, 4, …, ``best_of`` completions of the reference; none for ``best_of`` 1."""
    if settings.best_of == 1:
        return {}
    task = measurer.task

    def score(tokens: Array, lengths: Array, params: PyTree) -> Array:
        raw = measurer.score(tokens, lengths, params)
        last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
        penalty = jnp.where(last == task.eos, 0.0, settings.missing_end_penalty)
        return jnp.clip(raw, -settings.score_clip, settings.score_clip) - penalty

    best = jax.jit(
        lambda reference, score_params, prompts, lengths: best_of_n(
            measurer.model,
            reference,
            key,
            prompts,
            lengths,
            settings.best_of,
            score,
            score_params,
            task.max_new_tokens,
            task.eos,
        )
    )(measurer.reference, measurer.score_params, *map(jnp.asarray, task.held_out_prompts))
    return {n: x.texts for n, x in best.items() if n > 1}


def _win_rates(measurer: Measurer, texts: Mapping[str, Texts]) -> dict[str, Any]:
    """{judge: {policy: [share, low, high]}}: how often a text is better than that of sft."""
    scores = {name: measurer.judged(x) | {"score": measurer.scores(x)} for name, x in texts.items()}
    base = scores.pop("sft")
    return {
        judge: {name: _floats(win_rate(x[judge], base[judge])) for name, x in scores.items()}
        for judge in base
    }


def _accuracies(task: Task, trained_reward: StoredModel | None) -> dict[str, float]:
    """The accuracies of the reward model and of the judges on held-out preferences."""
    if trained_reward is None or task.held_out_pairs is None:
        return {}
    model = reward_network.reward_model(trained_reward.sizes)
    evaluated = reward_model.evaluate(model, trained_reward.params, task.held_out_pairs)
    return {"reward model": float(evaluated["accuracy"])} | {
        name: pairwise_accuracy(judge, task.held_out_preferences)
        for name, judge in task.judges().items()
    }


def _against_optimum(
    settings: PipelineSettings,
    measurer: Measurer,
    reference: PyTree,
    final: PyTree,
    numbers: Mapping[str, Mapping[str, float]],
) -> dict[str, float]:
    """Exact shares of right answers, and the objective J = q − β KL beside its optimum J*.

    J* is that of every prompt for the reference as it is (`arithmetic.optimum`); with β = 0 it is
    1. The KL divergence in J is a mean over drawn texts.
    """
    prompts = jnp.asarray(measurer.task.held_out_prompts.tokens)
    right = arithmetic.as_texts(prompts, arithmetic.answers(prompts))
    log_prob = jax.jit(lambda params: completion_log_prob(measurer.model, params, right))
    p0 = jnp.exp(log_prob(as_policy(reference)))
    q = jnp.exp(log_prob(as_policy(final)))
    beta = settings.ref_kl_coef
    kl = numbers[settings.algorithm]["kl"]
    best = arithmetic.optimum(p0, beta)[1].mean() if beta else 1.0
    return {
        "right_before": float(p0.mean()),
        "right_after": float(q.mean()),
        "beta": beta,
        "objective": float(q.mean()) - beta * kl,
        "optimal_objective": float(best),
    }


def _floats(values: Any) -> Any:
    """Numbers of a dict or a tuple as Python floats."""
    return jax.tree.map(float, dict(values) if isinstance(values, dict) else list(values))
