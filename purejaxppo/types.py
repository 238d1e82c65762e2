"""The contracts that every part of the library is written against.

Shapes: ``T`` steps of a rollout, ``B`` environments, ``N = T * B``; time comes first. A leading axis of
seeds or of a sweep is never written: it comes from ``jax.vmap``. All of these are immutable, and all but
the bundles of functions (`Env`, `VectorEnv`, `Model`, `Update`, `Reward`, `Trainer`) are pytrees of arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PyTree = Any
PRNGKey = jax.Array  # a typed key, or the two uint32 of jax.random.PRNGKey


class ConfigError(ValueError):
    """What was asked for cannot be run; the message is one sentence for the person who asked."""


# ---------------------------------------------------------------------------------------- spaces


@dataclass(frozen=True)
class Discrete:
    """The integers 0 … n − 1; arrays have shape ``[]``."""

    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class MultiDiscrete:
    """Several independent integers, the i-th in 0 … sizes[i] − 1; arrays have shape ``[len(sizes)]``."""

    sizes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.sizes),)


@dataclass(frozen=True)
class Box:
    """Real arrays of ``shape`` between ``low`` and ``high``: one number for all, or one for each element.

    The bounds are plain numbers in row-major order, not arrays, so that a space can be compared and hashed.
    """

    shape: tuple[int, ...]
    low: float | tuple[float, ...]
    high: float | tuple[float, ...]

    @property
    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """``low`` and ``high`` as arrays of ``shape``."""
        return self._as_array(self.low), self._as_array(self.high)

    def _as_array(self, bound: float | tuple[float, ...]) -> np.ndarray:
        return np.full(self.shape, np.reshape(bound, self.shape) if isinstance(bound, tuple) else bound, float)


Space = Discrete | MultiDiscrete | Box


# ---------------------------------------------------------------------------------- environments


class Step(NamedTuple):
    """What one step of one environment leads to."""

    state: PyTree  # the environment's state after the step
    obs: Array  # observation of that state: the true successor, never one of the next episode
    reward: Float[Array, ""]
    terminated: Bool[Array, ""]  # the episode ended by itself: nothing is worth anything after it
    truncated: Bool[Array, ""]  # the episode was cut, by a time limit: the state has a value still
    mask: Bool[Array, ""] | bool = True  # False: the action was forced and not the agent's


class Env(NamedTuple):
    """One environment, without auto-reset (`envs.vector` does that for all alike).

    ``truncates`` says whether an episode can be cut by time, which then happens exactly at
    ``max_episode_steps``; with ``max_episode_steps=None`` it may happen at any step.
    """

    name: str
    reset: Callable[[PRNGKey], tuple[PyTree, Array]]  # key -> state, obs
    step: Callable[[PRNGKey, PyTree, Array], Step]  # key, state, action -> Step
    observation_space: Space
    action_space: Space
    max_episode_steps: int | None  # bound on the length of an episode; None: no bound
    truncates: bool
    action_mask: Callable[[PyTree], Bool[Array, "n"]] | None = None  # state -> the actions that are allowed


class EpisodeSums(NamedTuple):
    """Sums over the episodes that finished in one rollout; a mean over none of them is NaN, not 0."""

    returns: Float[Array, ""]
    lengths: Float[Array, ""]
    episodes: Int[Array, ""]


class VectorState(NamedTuple):
    """The state of B environments between two steps; of S shards of them, every field has S in front."""

    env: PyTree  # [B, ...] states of the environments
    obs: Array  # [B, ...] what the agent sees next
    reset: Bool[Array, "B"]  # obs is the first of its episode
    pool: PyTree  # [P, ...] (state, obs) of fresh starts, drawn once per rollout
    pool_row: Int[Array, ""]  # where the next step takes its starts from
    episode_return: Float[Array, "B"]  # of the running episode, undiscounted
    episode_length: Int[Array, "B"]
    finished: EpisodeSums  # since the last refill


class VectorEnv(NamedTuple):
    """B environments that restart by themselves; made by `envs.vector.vectorize`."""

    reset: Callable[[PRNGKey], VectorState]
    refill: Callable[[PRNGKey, VectorState], VectorState]  # once per rollout: a new pool, sums at zero
    step: Callable[[PRNGKey, VectorState, Array], tuple[VectorState, Step]]  # Step of [B, ...], before the reset


# ---------------------------------------------------------------------------------------- models


@runtime_checkable
class Distribution(Protocol):
    """A batch of distributions over actions, as `purejaxppo.distributions` has them."""

    def sample(self, key: PRNGKey) -> Array: ...
    def mode(self) -> Array: ...
    def log_prob(self, action: Array) -> Array: ...
    def entropy(self) -> Array: ...
    def kl(self, other: Any) -> Array: ...


class Model(NamedTuple):
    """An actor-critic as four functions; ``step`` and ``unroll`` must agree, so that ratios start at 1.

    ``params`` is a dict: ``policy``, ``value`` and, only where they share one, ``trunk``. ``carry`` is the
    memory, each leaf with B first, and is empty for a feed-forward model. ``reset[t]`` clears it before
    ``obs[t]``.
    """

    init: Callable[[PRNGKey, Array], PyTree]  # key, obs [B, ...] -> params
    initial_carry: Callable[[int], PyTree]  # B -> carry
    step: Callable[..., tuple[PyTree, Distribution, Array]]  # params, carry, obs[B], reset[B] -> carry, dist, value[B]
    unroll: Callable[..., tuple[Distribution, Array]]  # params, carry, obs[T,B], reset[T,B] -> dist, value[T,B]


# ------------------------------------------------------------------------------------------ data


class Transition(NamedTuple):
    """A rollout, as the policy lived it."""

    obs: Array  # [T, B, ...] what the model saw: normalised where the config says so
    action: Array  # [T, B, ...] as sampled, before any clipping
    log_prob: Float[Array, "T B"]  # of that action under the policy that took it
    value: Float[Array, "T B"]  # V(obs[t])
    next_value: Float[Array, "T B"]  # V of the true successor of step t, also where an episode was cut
    reward: Float[Array, "T B"]
    terminated: Bool[Array, "T B"]
    truncated: Bool[Array, "T B"]
    reset: Bool[Array, "T B"]  # obs[t] is the first of its episode
    mask: Bool[Array, "T B"]  # the action counts in the policy loss
    valid: Bool[Array, "T B"]  # the step exists at all: value loss, statistics


class Batch(NamedTuple):
    """What an update learns from."""

    obs: Array  # [T, B, ...]
    action: Array  # [T, B, ...]
    log_prob: Float[Array, "T B"]
    value: Float[Array, "T B"]
    advantage: Float[Array, "T B"]
    target: Float[Array, "T B"]  # what the value function is fitted to
    reset: Bool[Array, "T B"]
    mask: Bool[Array, "T B"]
    valid: Bool[Array, "T B"]
    carry: PyTree  # [B, ...] memory before step 0; () for a feed-forward model


# ------------------------------------------------------------------------------------- algorithms


class Update(NamedTuple):
    """An algorithm: PPO, TRPO and REINFORCE differ in nothing else."""

    init: Callable[[PyTree], PyTree]  # params -> update_state (moments of the optimiser and the like)
    step: Callable[[PRNGKey, PyTree, PyTree, Batch], tuple[PyTree, PyTree, dict[str, Array]]]
    # key, params, update_state, batch -> params, update_state, metrics


class Reward(NamedTuple):
    """A reward function with memory, such as a coefficient that adapts."""

    init: Callable[[Any], PyTree]  # config -> reward_state
    step: Callable[..., tuple[Array, PyTree, dict[str, Array]]]
    # reward_state, transitions, config, frozen -> rewards [T, B], reward_state, metrics


class TrainState(NamedTuple):
    """Everything that training needs to go on exactly where it is."""

    params: PyTree
    update: PyTree  # the algorithm's own state
    normalizer: PyTree  # running moments of observations and of discounted returns
    env: VectorState
    carry: PyTree  # [B, ...] the model's memory
    reward: PyTree  # the reward function's state
    key: PRNGKey
    iteration: Int[Array, ""]  # iterations done
    timesteps: Array  # environment steps done: all, or with whole episodes those in a mask


@runtime_checkable
class Trained(Protocol):
    """What a policy can be taken out of: a `TrainState`, or as much of one as is kept of the best policy so far."""

    @property
    def params(self) -> PyTree: ...
    @property
    def normalizer(self) -> PyTree: ...
    @property
    def iteration(self) -> Any: ...


UNDEFINED = float(np.finfo(np.float32).min)  # stands for NaN in the results of compiled programs: see `Metrics`


def nan_where_undefined(x: Any) -> Any:
    """``x`` with NaN where it is `UNDEFINED`; what is not a floating-point array or number is returned as it is."""
    if not isinstance(x, np.ndarray | np.generic | jax.Array) or not jax.numpy.issubdtype(x.dtype, np.floating):
        return x
    if not isinstance(x, jax.Array):
        with np.errstate(over="ignore"):  # half precision has no such number, and holds −∞ instead
            return np.where(x == x.dtype.type(UNDEFINED), x.dtype.type(np.nan), x)[()]
    with jax.debug_nans(False):  # this NaN is meant
        return jax.numpy.where(x == UNDEFINED, jax.numpy.nan, x)


def _undefined_reads_as_nan(cls: Any) -> Any:
    """Let the floating-point fields of a NamedTuple, its `_asdict` and its text show `nan_where_undefined`.

    The items of the tuple, which are the leaves that JAX sees, stay as they are stored.
    """

    def field(index: int) -> property:
        return property(lambda self: nan_where_undefined(self[index]))

    def as_dict(self: Any) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._fields}

    def text(self: Any) -> str:
        return f"{cls.__name__}({', '.join(f'{name}={x!r}' for name, x in self._asdict().items())})"

    for index, name in enumerate(cls._fields):
        if name != "extra":
            setattr(cls, name, field(index))
    cls._asdict, cls.__repr__ = as_dict, text
    return cls


@_undefined_reads_as_nan
class Metrics(NamedTuple):
    """One number per iteration and field, so memory grows with neither ``num_steps`` nor ``num_envs``.

    A value that does not exist, such as the mean return where no episode finished, reads as NaN. A compiled program
    stores `UNDEFINED` in its place, because ``jax_debug_nans`` raises where a result holds a NaN: that is what
    ``jax.tree.leaves(metrics)`` and ``jax.tree.map`` see, while ``metrics.episode_return`` is NaN. A NaN that a program
    computed stays one.
    """

    timesteps: Array  # environment steps done at the end of the iteration
    episode_return: Float[Array, ""]  # mean over the episodes that finished in it; NaN where none did
    episode_length: Float[Array, ""]  # steps, likewise
    episodes: Int[Array, ""]  # how many finished
    entropy: Float[Array, ""]  # nats, mean over the minibatches
    approx_kl: Float[Array, ""]  # nats, KL(old || new), mean over the minibatches
    clip_fraction: Float[Array, ""]  # share of the samples whose ratio left 1 ± clip_eps
    explained_variance: Float[Array, ""]  # 1 − Var(target − value) / Var(target); NaN for equal targets, or no V
    policy_loss: Float[Array, ""]
    value_loss: Float[Array, ""]  # NaN where no value function is fitted
    grad_norm: Float[Array, ""]  # global norm before clipping, mean over the minibatches
    first_ratio_deviation: Float[Array, ""]  # max |ratio − 1| before the first step: 0 but for rounding
    extra: dict[str, Array]  # the algorithm's and the reward function's own


class Trainer(NamedTuple):
    """Training in pieces: `make_train` is the scan of ``step`` from ``init``."""

    init: Callable[..., TrainState]  # key, params=None -> TrainState
    step: Callable[..., tuple[TrainState, Metrics]]  # state, frozen=None -> TrainState, Metrics


class Result(NamedTuple):
    """What a whole run returns."""

    state: TrainState
    metrics: Metrics  # each field [num_iterations]
