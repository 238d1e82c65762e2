"""Measurements of the policies of a pipeline: during training, and before and after it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from purejaxppo.rlhf import arithmetic, reward_model, sft
from purejaxppo.rlhf.evaluation import evaluate_texts, win_rate
from purejaxppo.rlhf.json_files import write_json, write_json_lines
from purejaxppo.rlhf.judges import pairwise_accuracy
from purejaxppo.rlhf.language_model import language_model, policy_decoder
from purejaxppo.rlhf.model_files import StoredModel
from purejaxppo.rlhf.sampling import best_of_n, best_of_n_kl, generate
from purejaxppo.rlhf.settings import PipelineSettings
from purejaxppo.rlhf.tasks import Prompts, Task
from purejaxppo.rlhf.texts import Score, Texts, completion_log_prob
from purejaxppo.runs.chunks import Chunk
from purejaxppo.runs.programs import Programs
from purejaxppo.runs.session import Evaluator
from purejaxppo.runs.tables import Table
from purejaxppo.types import PRNGKey, PyTree

NUM_SAMPLES = 50  # continuations in samples.jsonl
EVALUATION_KEY = 0xE7A1


class Measurer:
    """Draws completions of prompts from policies, and measures them with scores and judges."""

    def __init__(
        self,
        settings: PipelineSettings,
        task: Task,
        reference: PyTree,
        score: Score,
        score_params: PyTree,
    ):
        self.task = task
        sizes = settings.decoder_sizes(task.vocab_size, task.context)
        self.model = language_model(sizes, "none")
        self.reference = as_policy(reference)
        self.score = score
        self.score_params = score_params
        self._generate = jax.jit(
            lambda params, key, prompts, lengths: generate(
                self.model, params, key, prompts, lengths, task.max_new_tokens, task.eos
            )
        )

    def completions(self, params: PyTree, prompts: Prompts, key: PRNGKey) -> Texts:
        """One completion of each prompt."""
        return self._generate(
            as_policy(params), key, jnp.asarray(prompts.tokens), jnp.asarray(prompts.length)
        )

    def numbers(self, params: PyTree, texts: Texts) -> dict[str, float]:
        """`evaluate_texts`, and the mean score of each judge."""
        measured = evaluate_texts(
            self.model,
            as_policy(params),
            self.reference,
            texts,
            self.task.eos,
            self.score,
            self.score_params,
        )
        return measured | {name: float(x.mean()) for name, x in self.judged(texts).items()}

    def judged(self, texts: Texts) -> dict[str, NDArray[np.float64]]:
        """The score of every text by each judge."""
        judges = self.task.judges()
        if not judges:
            return {}
        strings = self.strings(texts)
        return {name: judge.score(strings) for name, judge in judges.items()}

    def scores(self, texts: Texts) -> NDArray[Any]:
        """The score that training maximises, of every text."""
        return np.asarray(self.score(texts.tokens, texts.length, self.score_params))

    def strings(self, texts: Texts) -> list[str]:
        """Prompts with their completions, as strings."""
        rows = zip(np.asarray(texts.tokens), np.asarray(texts.length), strict=True)
        return [self.task.decode(tokens[:length]) for tokens, length in rows]


def as_policy(params: PyTree) -> PyTree:
    """Parameters of the policy without a critic."""
    return {"policy": policy_decoder(params), "value": {}}


def evaluation_key(settings: PipelineSettings) -> PRNGKey:
    """The base key of the evaluations of a pipeline."""
    return jax.random.fold_in(jax.random.key(EVALUATION_KEY), settings.key)


def make_text_evaluator(
    settings: PipelineSettings,
    task: Task,
    reference: PyTree,
    score: Score,
    score_params: PyTree,
    programs: Programs,
    keys: PRNGKey,
) -> Evaluator:
    """An `Evaluator` that measures completions of held-out prompts for ``evaluations.csv``."""
    measurer = Measurer(settings, task, reference, score, score_params)

    def step(best: PyTree, chunk: Chunk) -> tuple[PyTree, Table]:
        key = jax.random.fold_in(evaluation_key(settings), chunk.done)
        params = chunk.state.params
        texts = measurer.completions(params, task.held_out_prompts, key)
        numbers = measurer.numbers(params, texts)
        return best, {
            "iteration": np.full((1, 1), chunk.done),
            "timesteps": np.asarray(chunk.metrics.timesteps[:, -1:]),
            **{name: np.full((1, 1), value) for name, value in numbers.items()},
        }

    return Evaluator(settings.eval_every, lambda state: (), step)


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
    write_json(directory / "evaluation.json", measured)
    columns = {name: measurer.strings(x) for name, x in texts.items()}
    starts = measurer.strings(Texts(*map(jnp.asarray, (*prompts, prompts.length))))
    rows = [
        {"prompt": start, **{name: column[i] for name, column in columns.items()}}
        for i, start in enumerate(starts[:NUM_SAMPLES])
    ]
    write_json_lines(directory / "samples.jsonl", rows)
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
    model = reward_model.reward_model(trained_reward.sizes)
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
