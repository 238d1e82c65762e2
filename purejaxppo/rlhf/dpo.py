"""Direct preference optimisation: a policy learns from preferences without a reward model.

The policy's implicit reward of a completion y of the prompt x is β log π(y|x) / π_ref(y|x), up to a
function of x, and h = log π(y_w|x) / π_ref(y_w|x) − log π(y_l|x) / π_ref(y_l|x) is the difference
of a pair's log-ratios. Log-probabilities are sums over the tokens of a completion, in nats.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from purejaxppo.rlhf.preference_losses import dpo_loss, ipo_loss, share_above
from purejaxppo.rlhf.supervised import (
    Loss,
    SupervisedResult,
    in_batches,
    make_supervised_train,
    supervised_job,
)
from purejaxppo.rlhf.supervised_settings import SupervisedSettings
from purejaxppo.rlhf.texts import Pairs, completion_log_prob, concatenated
from purejaxppo.runs.programs import Job
from purejaxppo.types import ConfigError, Model, PRNGKey, PyTree
from purejaxppo.validation import POSITIVE, Check, checked_leaf, one_of

KINDS = ("dpo", "ipo")
BELOW_HALF = Check(lambda x: 0 <= x < 0.5, "a number of at least 0 and below 0.5")

BOTH = "there is a reference, and reference_free=True: leave one of them out"


class ReferencedPairs(NamedTuple):
    """Pairs with the log-probabilities that the reference policy gives their completions."""

    pairs: Pairs
    chosen: Float[Array, "n"]  # log π_ref(y_w|x)
    rejected: Float[Array, "n"]  # log π_ref(y_l|x)


def make_dpo(
    settings: SupervisedSettings,
    model: Model,
    kind: str = "dpo",
    beta: float | Array = 0.1,
    label_smoothing: float | Array = 0.0,
    reference_free: bool = False,
) -> Callable[..., SupervisedResult]:
    """``train(key, params, data, reference=None) -> SupervisedResult``: pure, for jit and vmap.

    ``data`` are `Pairs`, whose margins are not used. ``reference`` are the parameters of π_ref;
    its log-probabilities are computed once, before training. Alternatively ``data`` are the result
    of `with_reference`. ``kind`` is `dpo_loss` (``dpo``) or `ipo_loss` (``ipo``, without label
    smoothing). ``reference_free`` sets log π_ref = 0. Raises `ConfigError` if there is neither a
    reference nor ``reference_free``, or both.

    The metrics are those of `make_supervised_trainer` and ``accuracy`` (the share of pairs whose
    chosen completion has the higher implicit reward; a tie counts half), ``reward_margin``
    (mean of βh, nats), and ``chosen_log_ratio`` and ``rejected_log_ratio`` (means of log π / π_ref,
    nats). Check the data with `require_pairs` first.
    """
    loss = _loss(model, kind, beta, label_smoothing, reference_free)
    train_on = make_supervised_train(settings, loss)

    def train(
        key: PRNGKey, params: PyTree, data: Pairs | ReferencedPairs, reference: PyTree = None
    ) -> SupervisedResult:
        if reference is not None and isinstance(data, ReferencedPairs):
            raise ConfigError("the data already have log-probabilities of a reference: give one")
        if reference is not None and reference_free:
            raise ConfigError(BOTH)
        if reference is not None:
            pairs: Any = data
            data = with_reference(model, reference, pairs, settings.batch_size)
        return train_on(key, params, {"data": data})

    return train


def dpo_job(
    settings: SupervisedSettings,
    model: Model,
    num_examples: int,
    kind: str = "dpo",
    beta: float | Array = 0.1,
    label_smoothing: float | Array = 0.0,
    reference_free: bool = False,
) -> Job:
    """`make_dpo` for ``run_job(job, params=..., frozen={"data": data})``.

    ``data`` are the result of `with_reference`. With `Pairs` instead, ``frozen["reference"]`` are
    the parameters of the reference, which is then evaluated in every gradient step.
    """
    loss = _loss(model, kind, beta, label_smoothing, reference_free)
    return supervised_job(settings, num_examples, loss)


def with_reference(
    model: Model, reference: PyTree, pairs: Pairs, batch_size: int = 64
) -> ReferencedPairs:
    """The pairs with the log-probabilities under the parameters ``reference``."""
    chosen, rejected = in_batches(
        lambda rows: pair_log_probs(model, reference, rows), pairs, batch_size
    )
    return ReferencedPairs(pairs, chosen, rejected)


def pair_log_probs(
    model: Model, params: PyTree, pairs: Pairs
) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    """log π(y_w|x) and log π(y_l|x), from one pass over the texts of all pairs."""
    both = concatenated(pairs.chosen, pairs.rejected)
    chosen, rejected = jnp.split(completion_log_prob(model, params, both), 2)
    return chosen, rejected


# ------------------------------------------------------------------------------------------ parts


def _loss(
    model: Model,
    kind: str,
    beta: float | Array,
    label_smoothing: float | Array,
    reference_free: bool,
) -> Loss:
    one_of("kind", kind, KINDS)
    checked_leaf("beta", beta, POSITIVE)
    checked_leaf("label_smoothing", label_smoothing, BELOW_HALF)
    is_smoothed = isinstance(label_smoothing, jax.core.Tracer) or label_smoothing != 0
    if kind == "ipo" and is_smoothed:
        raise ConfigError("ipo has no label smoothing: set label_smoothing=0, or kind='dpo'")

    def loss(
        params: PyTree,
        examples: Pairs | ReferencedPairs,
        frozen: Mapping[str, Any],
        key: PRNGKey,
    ) -> tuple[Array, dict[str, Array]]:
        _require_one_reference(examples, frozen, reference_free)
        pairs = examples.pairs if isinstance(examples, ReferencedPairs) else examples
        policy = pair_log_probs(model, params, pairs)
        reference = _reference_log_probs(model, examples, frozen, policy)
        if kind == "dpo":
            losses = dpo_loss(*policy, *reference, beta, label_smoothing)
        else:
            losses = ipo_loss(*policy, *reference, beta)
        chosen_log_ratio = policy[0] - reference[0]
        rejected_log_ratio = policy[1] - reference[1]
        metrics = {
            "accuracy": share_above(chosen_log_ratio, rejected_log_ratio),
            "reward_margin": (beta * (chosen_log_ratio - rejected_log_ratio)).mean(),
            "chosen_log_ratio": chosen_log_ratio.mean(),
            "rejected_log_ratio": rejected_log_ratio.mean(),
        }
        return losses.mean(), metrics

    return loss


def _reference_log_probs(
    model: Model,
    examples: Pairs | ReferencedPairs,
    frozen: Mapping[str, Any],
    policy: tuple[Array, Array],
) -> tuple[Array, Array]:
    """log π_ref of the chosen and the rejected completions; 0 without a reference."""
    if isinstance(examples, ReferencedPairs):
        return examples.chosen, examples.rejected
    if "reference" in frozen:
        return jax.lax.stop_gradient(pair_log_probs(model, frozen["reference"], examples))
    return jnp.zeros_like(policy[0]), jnp.zeros_like(policy[1])


def _require_one_reference(
    examples: Pairs | ReferencedPairs, frozen: Mapping[str, Any], reference_free: bool
) -> None:
    given = isinstance(examples, ReferencedPairs) + ("reference" in frozen)
    if given == 0 and not reference_free:
        raise ConfigError(
            "DPO needs a reference: give its parameters, or set reference_free=True to go without"
        )
    if given and reference_free:
        raise ConfigError(BOTH)
    if given == 2:
        raise ConfigError("the data already have log-probabilities of a reference: give one")
