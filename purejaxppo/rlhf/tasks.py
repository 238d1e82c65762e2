"""`Task`: the data of a pipeline, its score and its judges; and that of arithmetic."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from purejaxppo.rlhf import arithmetic
from purejaxppo.rlhf.evaluation import MEASUREMENTS
from purejaxppo.rlhf.judges import Judge
from purejaxppo.rlhf.preferences import Preference
from purejaxppo.rlhf.texts import Pairs, Ranked, Score, Texts
from purejaxppo.rlhf.tokenizer import Tokenizer
from purejaxppo.types import ConfigError

Judges = Mapping[str, Judge]


# Names that a judge cannot have, because the evaluations or the report use them.
TAKEN = (*MEASUREMENTS, "iteration", "timesteps", "reward model")


def require_judges(judges: Judges) -> None:
    """Raise `ConfigError` for a judge that is no `Judge` or has the name of a measurement."""
    for name, judge in judges.items():
        if not isinstance(judge, Judge):
            raise ConfigError(
                f"the judge {name} is a {type(judge).__name__}: give Judge(score), with a function "
                "from texts to an array of scores"
            )
        if name in TAKEN:
            raise ConfigError(f"a judge has the name {name}, which the report uses: rename it")


class Prompts(NamedTuple):
    """Prompts as tokens, NumPy arrays."""

    tokens: NDArray[np.int32]  # [n, L]
    length: NDArray[np.int32]  # [n]


class Task(NamedTuple):
    """The data of a pipeline as tokens, its score and its judges.

    A task has either a ``score`` or ``pairs``, from which a reward model learns.
    """

    name: str
    vocab_size: int
    eos: int  # the end-of-text token
    context: int  # tokens of the longest text
    max_new_tokens: int
    demonstrations: Texts
    held_out: Texts
    prompts: Prompts  # for reinforcement learning
    held_out_prompts: Prompts  # for evaluation
    decode: Callable[[Any], str]  # tokens -> text
    pairs: Pairs | None  # for the reward model and DPO
    ranked: Ranked | None  # for the reward model instead of the pairs
    held_out_pairs: Pairs | None
    held_out_preferences: Sequence[Preference]  # the same pairs as strings
    score: Score | None
    judges: Callable[[], Judges]  # of texts; not known to the reward model
    tokenizer: Tokenizer | None
    notes: tuple[str, ...] = ()  # sentences about the data, for the report


def arithmetic_task(seed: int = 0, num_held_out: int = 1000, repeats: int = 3) -> Task:
    """Two-digit addition (`arithmetic`): 1,000 of the 10,000 prompts are held out."""
    prompts = np.random.default_rng(seed).permutation(arithmetic.make_prompts())
    held_out = prompts[:num_held_out]
    train = prompts[num_held_out:]
    repeated = jnp.asarray(np.tile(train, (repeats, 1)))
    key_train, key_held_out = jax.random.split(jax.random.key(seed))
    answers = arithmetic.demonstrations(key_train, repeated)
    others = jnp.asarray(held_out)
    return Task(
        name="arithmetic",
        vocab_size=arithmetic.VOCAB_SIZE,
        eos=arithmetic.END,
        context=arithmetic.PROMPT_LENGTH + arithmetic.MAX_NEW_TOKENS,
        max_new_tokens=arithmetic.MAX_NEW_TOKENS,
        demonstrations=arithmetic.as_texts(repeated, answers),
        held_out=arithmetic.as_texts(others, arithmetic.demonstrations(key_held_out, others)),
        prompts=_arithmetic_prompts(train),
        held_out_prompts=_arithmetic_prompts(held_out),
        decode=arithmetic.decode,
        pairs=None,
        ranked=None,
        held_out_pairs=None,
        held_out_preferences=(),
        score=arithmetic.score,
        judges=dict,
        tokenizer=None,
    )


def _arithmetic_prompts(prompts: NDArray[np.int32]) -> Prompts:
    return Prompts(prompts, np.full(len(prompts), arithmetic.PROMPT_LENGTH, np.int32))
