"""Training on minibatches of examples, for fine-tuning, the reward model and DPO.

One iteration is one gradient step on one minibatch. Every epoch visits the examples in a fresh
random order, each at most once; the examples after the last complete minibatch of an epoch are
left out of it. The examples are an argument, ``frozen["data"]``, because arrays in a closure would
be constants of the executable.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from purejaxppo.keys import is_typed, select
from purejaxppo.metrics import MetricsDescription
from purejaxppo.rlhf.supervised_settings import (
    SupervisedSettings,
    learning_rate,
    make_optimizer,
)
from purejaxppo.runs.programs import Job
from purejaxppo.types import ConfigError, PRNGKey, PyTree, Trainer


class SupervisedState(NamedTuple):
    """The complete state of training. Training resumes from it exactly."""

    params: PyTree
    optimizer: PyTree  # state of the optimiser: Adam's moments and its count
    order: Int[Array, "n"]  # the order of the examples in this epoch
    key: PRNGKey
    step: Int[Array, ""]  # number of completed gradient steps


class SupervisedResult(NamedTuple):
    """Result of a complete training run."""

    state: SupervisedState
    metrics: dict[str, Array]  # name -> [num_iterations]


@runtime_checkable
class Loss(Protocol):
    """A loss of a minibatch."""

    def __call__(
        self, params: PyTree, examples: PyTree, frozen: Mapping[str, Any], key: PRNGKey, /
    ) -> tuple[Array, dict[str, Array]]:
        """The loss, a mean, and metrics, all scalars.

        ``examples`` are those of the minibatch, rows of the leaves of ``frozen["data"]``.
        ``frozen`` also holds other arrays that the loss needs, such as a reference model. ``key``
        is for losses with noise.
        """


InitParams = Callable[[PRNGKey], PyTree]  # fresh parameters from a key


def make_supervised_trainer(
    settings: SupervisedSettings,
    num_examples: int,
    loss: Loss,
    init_params: InitParams | None = None,
) -> Trainer:
    """Supervised training in pieces: ``init(key, params)`` and ``step(state, frozen)``.

    ``frozen["data"]`` is a pytree of arrays [num_examples, ...]. The metrics are a dict: ``step``,
    the number of completed gradient steps; ``loss``; ``grad_norm``, the global norm before
    clipping; ``lr``; and those of the loss. Without ``params``, training starts from
    ``init_params(key)``. Raises `ConfigError` if there is neither, if there are fewer examples than
    in a minibatch, or if the data have another number of examples.
    """
    num_iterations = settings.num_iterations(num_examples)
    steps_per_epoch = num_examples // settings.batch_size
    optimizer = make_optimizer(settings, num_iterations)

    def init(key: PRNGKey, params: PyTree = None) -> Any:
        key_params, key_run = jax.random.split(key)
        if params is None:
            if init_params is None:
                raise ConfigError("there are no params: give those of the model to start from")
            params = init_params(key_params)
        state = SupervisedState(
            params=params,
            optimizer=optimizer.init(params),
            order=jnp.arange(num_examples, dtype=jnp.int32),
            key=key_run,
            step=jnp.zeros((), jnp.int32),
        )
        return _with_batch_axes_of(state, key)

    def step(state: Any, frozen: Any = None) -> Any:
        _require_data(frozen, num_examples)
        key_order, key_loss, key_next = jax.random.split(state.key, 3)
        minibatch = state.step % steps_per_epoch
        # Under `vmap` this becomes a select, and a permutation is drawn in every step.
        order = jax.lax.cond(
            minibatch == 0,
            lambda: jax.random.permutation(key_order, num_examples).astype(jnp.int32),
            lambda: state.order,
        )
        first = minibatch * settings.batch_size
        index = jax.lax.dynamic_slice_in_dim(order, first, settings.batch_size)
        examples = jax.tree.map(lambda x: jnp.take(x, index, axis=0), frozen["data"])
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (value, measured), gradient = value_and_grad(state.params, examples, frozen, key_loss)
        change, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        next_state = SupervisedState(
            params=optax.apply_updates(state.params, change),
            optimizer=optimizer_state,
            order=order,
            key=key_next,
            step=state.step + 1,
        )
        metrics = {
            "step": next_state.step,
            "loss": value,
            "grad_norm": optax.tree.norm(gradient),
            "lr": learning_rate(settings, state.step, num_iterations),
        }
        return next_state, metrics | measured

    return Trainer(init, step)


def make_supervised_train(
    settings: SupervisedSettings, loss: Loss, init_params: InitParams | None = None
) -> Callable[[PRNGKey, PyTree, Mapping[str, Any]], SupervisedResult]:
    """``train(key, params, frozen) -> SupervisedResult``: the scan of `make_supervised_trainer`."""

    def train(key: PRNGKey, params: PyTree, frozen: Mapping[str, Any]) -> SupervisedResult:
        num_examples = num_examples_of(frozen["data"])
        trainer = make_supervised_trainer(settings, num_examples, loss, init_params)
        iterations = settings.num_iterations(num_examples)
        state: Any = trainer.init(key, params)
        step: Any = trainer.step
        state, metrics = jax.lax.scan(lambda s, _: step(s, frozen), state, None, iterations)
        return SupervisedResult(state, metrics)

    return train


def supervised_job(
    settings: SupervisedSettings,
    num_examples: int,
    loss: Loss,
    init_params: InitParams | None = None,
    counts: Mapping[str, str] | None = None,
) -> Job:
    """The trainer as a job for `run_job`, which takes ``params`` and ``frozen``.

    Hyper-parameters of a sweep replace the settings ``lr``, ``max_grad_norm`` and
    ``weight_decay``. ``counts`` are those of `MetricsDescription`.
    """

    def trainer_of(**hyperparameters: Any) -> Trainer:
        changed = dataclasses.replace(settings, **hyperparameters)
        return make_supervised_trainer(changed, num_examples, loss, init_params)

    description = MetricsDescription(
        progress="step",
        plotted="loss",
        is_finite=_is_finite,
        counts=counts or {},
        groups={"loss": "loss", "grad_norm": "update", "lr": "update", "step": "train"},
    )
    return Job(trainer_of, settings.num_iterations(num_examples), description)


def num_examples_of(data: PyTree) -> int:
    """The length of the first axis of the leaves."""
    sizes = {np.shape(x)[0] for x in jax.tree.leaves(data)}
    if len(sizes) != 1:
        raise ConfigError(
            f"the arrays of the data have {sorted(sizes)} examples: they must have equally many"
        )
    return sizes.pop()


def in_batches(function: Callable[[PyTree], PyTree], data: PyTree, batch_size: int) -> PyTree:
    """``function(data)`` for a function of independent rows, computed ``batch_size`` at a time.

    All at once, the logits of many texts would need too much memory.
    """

    def on_row(row: PyTree) -> PyTree:
        outputs = function(jax.tree.map(lambda x: x[None], row))
        return jax.tree.map(lambda x: x[0], outputs)

    return jax.lax.map(on_row, data, batch_size=min(batch_size, num_examples_of(data)))


# ------------------------------------------------------------------------------------------ parts


def _is_finite(metrics: Mapping[str, Any]) -> Any:
    """Whether training has not diverged."""
    xp: Any = jnp if isinstance(metrics["loss"], jax.Array) else np
    return xp.isfinite(metrics["loss"]) & xp.isfinite(metrics["grad_norm"])


def _require_data(frozen: Any, num_examples: int) -> None:
    """Raise `ConfigError` unless ``frozen["data"]`` has this number of examples."""
    if not isinstance(frozen, Mapping) or "data" not in frozen:
        raise ConfigError('there are no data: give frozen={"data": ...}')
    given = num_examples_of(frozen["data"])
    if given != num_examples:
        raise ConfigError(
            f"the data have {given} examples, and the trainer was made for {num_examples}"
        )


def _with_batch_axes_of(state: SupervisedState, key: PRNGKey) -> SupervisedState:
    """The state, unchanged, but under `vmap` every leaf has the batch axes of the key.

    So runs are equal bit for bit whether ``init`` and all steps are compiled together or apart.
    """
    first = jnp.ravel(jax.random.key_data(key) if is_typed(key) else key)[0]
    return jax.tree.map(lambda x: select(first == first, x, x), jax.tree.map(jnp.asarray, state))
