"""`SupervisedSettings`: minibatches, AdamW and its learning rate."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from purejaxppo.types import ConfigError, PyTree
from purejaxppo.validation import (
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_INT,
    UNIT,
    checked_int,
    checked_leaf,
    checked_number,
    one_of,
)

DECAYS = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class SupervisedSettings:
    """Minibatches and the optimiser, AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).

    ``lr``, ``max_grad_norm`` and ``weight_decay`` may be traced. Raises `ConfigError` for values
    out of range.
    """

    num_epochs: int = 1
    batch_size: int = 32  # examples in a minibatch
    lr: float | Array = 1e-3  # the highest learning rate, reached after the warm-up
    warmup: float = 0.05  # share of the gradient steps in which the learning rate grows
    decay: str = "cosine"  # how the learning rate falls to 0: cosine or linear; or constant
    max_grad_norm: float | Array = 1.0  # bound on the global norm of the gradient
    weight_decay: float | Array = 0.0

    def __post_init__(self) -> None:
        converted = {
            "num_epochs": checked_int("num_epochs", self.num_epochs, POSITIVE_INT),
            "batch_size": checked_int("batch_size", self.batch_size, POSITIVE_INT),
            "lr": checked_leaf("lr", self.lr, NOT_NEGATIVE),
            "warmup": checked_number("warmup", self.warmup, UNIT),
            "decay": one_of("decay", self.decay, DECAYS),
            "max_grad_norm": checked_leaf("max_grad_norm", self.max_grad_norm, POSITIVE),
            "weight_decay": checked_leaf("weight_decay", self.weight_decay, NOT_NEGATIVE),
        }
        for name, value in converted.items():
            object.__setattr__(self, name, value)

    def num_iterations(self, num_examples: int) -> int:
        """The number of gradient steps, ``num_epochs`` · ⌊``num_examples`` / ``batch_size``⌋.

        Raises `ConfigError` if there are no examples, or fewer than in one minibatch.
        """
        if num_examples < 1:
            raise ConfigError("the data are empty: there must be at least one example")
        if self.batch_size > num_examples:
            raise ConfigError(
                f"batch_size = {self.batch_size} exceeds the number of examples, {num_examples}"
            )
        return self.num_epochs * (num_examples // self.batch_size)


def learning_rate(
    settings: SupervisedSettings, step: Int[Array, ""], num_iterations: int
) -> Float[Array, ""]:
    """The learning rate of gradient step k = 0, 1, … of K:

        lr · (k + 1) / W                for k < W, with W = round(warmup · K) steps of warm-up
        lr · d((k − W) / (K − W))       from then on

    d(p) is (1 + cos πp) / 2 (cosine; Loshchilov and Hutter 2017, arXiv:1608.03983), 1 − p (linear)
    or 1 (constant).
    """
    num_warmup = round(settings.warmup * num_iterations)
    k = step.astype(jnp.result_type(float))
    share = jnp.clip((k - num_warmup) / max(num_iterations - num_warmup, 1), 0.0, 1.0)
    decayed = {
        "cosine": (1 + jnp.cos(jnp.pi * share)) / 2,
        "linear": 1 - share,
        "constant": jnp.ones_like(share),
    }[settings.decay]
    return settings.lr * jnp.where(k < num_warmup, (k + 1) / max(num_warmup, 1), decayed)


def make_optimizer(
    settings: SupervisedSettings, num_iterations: int
) -> optax.GradientTransformation:
    """AdamW with `learning_rate`, after clipping the global norm of the gradient."""
    adamw = optax.adamw(
        lambda count: learning_rate(settings, count, num_iterations),
        weight_decay=settings.weight_decay,  # type: ignore[arg-type]
        mask=_is_decayed,
    )
    clip = optax.clip_by_global_norm(settings.max_grad_norm)  # type: ignore[arg-type]
    return optax.chain(clip, adamw)


def _is_decayed(params: PyTree) -> PyTree:
    """Whether the weight decay acts on a parameter: on matrices, not on the scales of norms.

    The value function of a policy gets no gradient here. Decay alone would drive it to zero.
    """

    def of_leaf(path: tuple[Any, ...], x: Array) -> bool:
        return x.ndim >= 2 and path[:1] != (jax.tree_util.DictKey("value"),)

    return jax.tree_util.tree_map_with_path(of_leaf, params)
