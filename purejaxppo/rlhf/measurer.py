"""`Measurer`: completions of held-out prompts, their scores and what the judges say."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from purejaxppo.rlhf.evaluation import evaluate_texts
from purejaxppo.rlhf.language_model import language_model, policy_decoder
from purejaxppo.rlhf.sampling import generate
from purejaxppo.rlhf.settings import PipelineSettings
from purejaxppo.rlhf.tasks import Prompts, Task
from purejaxppo.rlhf.texts import Score, Texts
from purejaxppo.runs.chunks import Chunk
from purejaxppo.runs.programs import Programs
from purejaxppo.runs.session import Evaluator
from purejaxppo.runs.tables import Table
from purejaxppo.types import PRNGKey, PyTree

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
        """The score of every text, before clipping and without the penalty for a missing end."""
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
