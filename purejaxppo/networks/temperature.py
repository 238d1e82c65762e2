"""The temperature of a policy over discrete actions: p(a) ∝ exp(logit_a / temperature)."""

from typing import Any

import jax
from jax.typing import ArrayLike

from purejaxppo.networks.distributions import Categorical, MultiCategorical
from purejaxppo.types import Distribution, Model


def is_one(temperature: ArrayLike) -> bool:
    """Whether the temperature is known to be 1, and not traced."""
    return not isinstance(temperature, jax.core.Tracer | jax.Array) and temperature == 1


def tempered(distribution: Distribution, temperature: ArrayLike) -> Distribution:
    """The distribution with its logits divided; a continuous distribution is returned unchanged."""
    if is_one(temperature):
        return distribution
    if isinstance(distribution, Categorical):
        return Categorical(distribution.logits / temperature)
    if isinstance(distribution, MultiCategorical):
        parts: Any = (tempered(part, temperature) for part in distribution.parts)
        return MultiCategorical(tuple(parts))
    return distribution


def with_temperature(model: Model, temperature: ArrayLike) -> Model:
    """The model whose ``step`` and ``unroll`` both use the temperature.

    Probabilities of actions are then those that the actions were sampled with.
    """
    if is_one(temperature):
        return model

    def step(*inputs: Any) -> Any:
        carry, distribution, value = model.step(*inputs)
        return carry, tempered(distribution, temperature), value

    def unroll(*inputs: Any) -> Any:
        distribution, value = model.unroll(*inputs)
        return tempered(distribution, temperature), value

    return model._replace(step=step, unroll=unroll)
