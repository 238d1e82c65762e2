"""Types shared by all modules: spaces, environments, models, data, algorithms and states.

Shapes: ``T`` steps of a rollout, ``B`` environments, ``N = T * B``. Time is the first axis. The
leading axis of seeds or of a sweep is not written, because ``jax.vmap`` adds it. All types are
immutable. Data and states are pytrees of arrays; `Env`, `VectorEnv`, `Model`, `Update`, `Reward`
and `Trainer` are bundles of functions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike, NDArray

PyTree = Any
PRNGKey = jax.Array  # a typed key, or the two uint32 of jax.random.PRNGKey


class ConfigError(ValueError):
    """Invalid or unsupported configuration. The message is one sentence for the user."""


# ---------------------------------------------------------------------------------------- spaces


@dataclass(frozen=True, init=False)
class Discrete:
    """The integers 0 … n − 1; arrays have shape ``[]``.

    Like the other spaces, it accepts numbers of Python, NumPy and JAX and stores Python numbers, so
    that it can be compared, hashed and written to a file. Raises `ConfigError` for invalid and for
    traced values.
    """

    n: int

    def __init__(self, n: ArrayLike):
        array = _real_numbers("Discrete.n", n)
        if array is None or array.shape or not _are_sizes(array):
            raise ConfigError(
                f"Discrete.n = {_one_line(n)}: it must be an integer of at least 1 and below 2**31"
            )
        object.__setattr__(self, "n", int(array))

    @property
    def shape(self) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True, init=False)
class MultiDiscrete:
    """Vectors of integers, the i-th in 0 … sizes[i] − 1; arrays have shape ``[len(sizes)]``."""

    sizes: tuple[int, ...]

    def __init__(self, sizes: ArrayLike):
        array = _real_numbers("MultiDiscrete.sizes", sizes)
        if array is None or array.ndim != 1 or not array.size or not _are_sizes(array):
            raise ConfigError(
                f"MultiDiscrete.sizes = {_one_line(sizes)}: "
                "it must be a sequence of integers of at least 1 and below 2**31, such as (3, 2)"
            )
        object.__setattr__(self, "sizes", tuple(int(n) for n in array))

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.sizes),)


@dataclass(frozen=True, init=False)
class Box:
    """Real arrays of ``shape`` between ``low`` and ``high``, which may be infinite.

    A bound is one number for all elements or one number per element: an array or nested list of
    ``shape``, or a flat list in row-major order. It is stored as one number if all elements are
    equal, otherwise as a flat tuple, so that equivalent boxes compare equal.
    """

    shape: tuple[int, ...]
    low: float | tuple[float, ...]
    high: float | tuple[float, ...]

    def __init__(self, shape: ArrayLike, low: ArrayLike, high: ArrayLike):
        lengths = _real_numbers("Box.shape", shape)
        if lengths is None or lengths.ndim > 1 or not _are_sizes(lengths):
            raise ConfigError(
                f"Box.shape = {_one_line(shape)}: "
                "it must be a sequence of integers of at least 1, such as (84, 84)"
            )
        object.__setattr__(self, "shape", tuple(int(n) for n in lengths.ravel()))
        object.__setattr__(self, "low", self._validated_bound("low", low))
        object.__setattr__(self, "high", self._validated_bound("high", high))
        lowest, highest = self.limits
        is_empty = (lowest > highest) | (lowest == np.inf) | (highest == -np.inf)
        if is_empty.any():
            low_value = lowest[is_empty][0]
            high_value = highest[is_empty][0]
            raise ConfigError(
                f"Box has an element with low = {low_value} and high = {high_value}: "
                "low must be at most high, low below inf and high above -inf"
            )

    @property
    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """``low`` and ``high`` as arrays of ``shape``."""
        return self._as_array(self.low), self._as_array(self.high)

    def _as_array(self, bound: float | tuple[float, ...]) -> np.ndarray:
        return np.full(
            self.shape, np.reshape(bound, self.shape) if isinstance(bound, tuple) else bound, float
        )

    def _validated_bound(self, name: str, bound: ArrayLike) -> float | tuple[float, ...]:
        array = _real_numbers(f"Box.{name}", bound)
        if array is None or np.isnan(array).any():
            raise ConfigError(
                f"Box.{name} = {_one_line(bound)}: "
                "it must be made of real numbers, none of them NaN"
            )
        if array.shape not in ((), self.shape, (math.prod(self.shape),)):
            raise ConfigError(
                f"Box.{name} has the shape {array.shape}: "
                f"it must be one number, or one for each element of {self.shape}"
            )
        flat = (array.ravel() + 0.0).tolist()  # adding 0 turns -0.0 into 0.0
        return flat[0] if len(set(flat)) == 1 else tuple(flat)


Space = Discrete | MultiDiscrete | Box


@dataclass(frozen=True, init=False)
class Dict:
    """Observations with named parts: ``Dict({"board": Box(...), "action_mask": Box((9,), 0, 1)})``.

    An observation is a dict of arrays. The optional part ``action_mask`` marks the allowed actions
    (`action_mask_shape`). Raises `ConfigError` unless the argument maps names to spaces.
    """

    spaces: tuple[tuple[str, Space], ...]  # sorted by name

    def __init__(self, spaces: Mapping[str, Space] | tuple[tuple[str, Space], ...]):
        try:
            named = dict(spaces)
        except (TypeError, ValueError):
            named = {}
        is_named = all(isinstance(name, str) and isinstance(x, Space) for name, x in named.items())
        if not named or not is_named:
            raise ConfigError(
                f"Dict = {_one_line(spaces)}: it must map at least one name to a Discrete, a "
                "MultiDiscrete or a Box"
            )
        object.__setattr__(self, "spaces", tuple(sorted(named.items(), key=lambda part: part[0])))


ObservationSpace = Space | Dict

ACTION_MASK = "action_mask"  # name of the observation part that marks the allowed actions


def parts_of(space: ObservationSpace) -> PyTree:
    """The space as a pytree with the structure of its observations; the leaves are spaces."""
    return dict(space.spaces) if isinstance(space, Dict) else space


def action_mask_shape(space: Space) -> tuple[int, ...] | None:
    """The shape of the ``action_mask`` for this action space; None if actions cannot be masked.

    ``Discrete(n)`` has ``[n]``. ``MultiDiscrete(sizes)`` has ``[sum(sizes)]``: the masks of its
    integers are concatenated.
    """
    if isinstance(space, Discrete):
        return (space.n,)
    if isinstance(space, MultiDiscrete):
        return (sum(space.sizes),)
    return None


def _real_numbers(name: str, value: Any) -> NDArray[np.float64] | None:
    """Convert a real number, or a sequence or array of them, to an array; None for anything else.

    Raises `ConfigError` for traced values, on which a space cannot depend.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(value)):
        raise ConfigError(f"{name} is traced by JAX: a space must be made of concrete numbers")
    try:
        array = np.asarray(value)
        are_long_ints = array.dtype == object and all(isinstance(x, int) for x in array.flat)
        is_real = jax.dtypes.issubdtype(array.dtype, np.number) and array.dtype.kind not in "cm"
        return np.asarray(array, float) if is_real or are_long_ints else None
    except (TypeError, ValueError, OverflowError):  # such as a ragged list
        return None


def _are_sizes(array: NDArray[np.float64]) -> bool:
    """Whether all elements are integers of at least 1 and below 2**31."""
    return bool(np.all((array >= 1) & (array < 2**31) & (array == np.floor(array))))


def _one_line(value: Any) -> str:
    """The value's ``repr`` on one line, shortened to 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------------------------- environments


class Step(NamedTuple):
    """Result of one step of one environment, before any reset."""

    state: PyTree  # environment state after the step
    obs: PyTree  # observation of ``state``: the true successor, never one of the next episode
    reward: Float[Array, ""]
    terminated: Bool[Array, ""]  # ``state`` is terminal: the return after it is zero
    truncated: Bool[Array, ""]  # a time limit ended the episode: ``state`` still has a value
    mask: Bool[Array, ""] | bool = True  # False: the action was forced, not chosen by the policy


# Pairs (name, value) sorted by name; the values are `plain`.
EnvSettings = tuple[tuple[str, Any], ...]


def plain(value: Any) -> Any:
    """An environment setting as a value that can be hashed and written to JSON.

    Finite numbers, strings, True, False, None and tuples of these are returned unchanged. NumPy and
    JAX scalars become Python scalars; lists become tuples. Raises `ValueError` for anything else,
    such as larger arrays, traced values and infinity.
    """
    if type(value) in (list, tuple):
        return tuple(plain(x) for x in value)
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        try:
            value = value.item()
        except Exception:  # a traced value or a random key
            raise ValueError("not a plain value") from None
    if type(value) not in (bool, int, float, str, type(None)):
        raise ValueError("not a plain value")
    if type(value) is float and not math.isfinite(value):
        raise ValueError("not a finite number")
    return value


def plain_settings(settings: Any) -> EnvSettings | None:
    """Convert a mapping of names to values, or its pairs, to `EnvSettings`; None if impossible."""
    if not isinstance(settings, Mapping | tuple):
        return None
    try:
        named = dict(settings)
        if not all(isinstance(name, str) for name in named):
            return None
        return tuple(sorted((str(name), plain(value)) for name, value in named.items()))
    except (TypeError, ValueError):
        return None


class Env(NamedTuple):
    """One environment without auto-reset, which `envs.vector` adds.

    ``truncates`` says whether a time limit can end an episode. If so, truncation happens exactly
    at ``max_episode_steps``; with ``max_episode_steps=None`` it may happen at any step.

    ``name`` and ``settings`` are the arguments of ``envs.make(name, **settings)``. They fully
    identify the environment in a config, a run directory and a saved policy. The settings are
    sorted pairs, because an Env must be hashable; ``dict(env.settings)`` is the mapping. They are
    None if a file cannot store them (arrays, for example); the environment must then be passed
    again.
    """

    name: str
    reset: Callable[[PRNGKey], tuple[PyTree, PyTree]]  # key -> state, obs
    step: Callable[[PRNGKey, PyTree, Array], Step]  # key, state, action -> Step
    observation_space: ObservationSpace
    action_space: Space
    max_episode_steps: int | None  # upper bound on the length of an episode; None: no bound
    truncates: bool
    settings: EnvSettings | None = ()


class EpisodeSums(NamedTuple):
    """Sums over the episodes finished in one rollout. Without episodes, means are undefined."""

    returns: Float[Array, ""]
    lengths: Float[Array, ""]
    episodes: Int[Array, ""]


class VectorState(NamedTuple):
    """State of B environments between two steps. S shards add a first axis S to all fields."""

    env: PyTree  # [B, ...] environment states
    obs: PyTree  # [B, ...] observations for the next action
    reset: Bool[Array, "B"]  # obs is the first of its episode
    episode_return: Float[Array, "B"]  # of the current episode so far, undiscounted
    episode_length: Int[Array, "B"]  # of the current episode so far, in steps
    finished: EpisodeSums  # episodes finished since the rollout began


class VectorEnv(NamedTuple):
    """B environments with auto-reset, made by `envs.vector.vectorize`."""

    reset: Callable[[PRNGKey], VectorState]
    # Sets the sums over finished episodes to zero.
    begin_rollout: Callable[[VectorState], VectorState]
    # key, state, action -> state after the resets of ended episodes, Step [B, ...] before them
    step: Callable[[PRNGKey, VectorState, Array], tuple[VectorState, Step]]


# ---------------------------------------------------------------------------------------- models


@runtime_checkable
class Distribution(Protocol):
    """A batch of distributions over actions (see `purejaxppo.networks.distributions`).

    ``kl(other)`` is KL(self ‖ other). Entropy and KL are in nats.
    """

    def sample(self, key: PRNGKey) -> Array: ...
    def mode(self) -> Array: ...
    def log_prob(self, action: Array) -> Array: ...
    def entropy(self) -> Array: ...
    def kl(self, other: Any) -> Array: ...


class Model(NamedTuple):
    """An actor-critic as four functions.

    ``step`` and ``unroll`` must agree, so that probability ratios start at 1. ``params`` is a dict
    with the keys ``policy``, ``value`` and, only if they share layers, ``trunk``. Each entry is a
    pytree of floating-point arrays. (TRPO needs this dict, without ``trunk``; the other algorithms
    accept any pytree.) ``carry`` is the recurrent state, which is empty for a feed-forward model. B
    is the first axis of every leaf. ``reset[t]`` clears the carry before ``obs[t]``.
    """

    init: Callable[[PRNGKey, PyTree], PyTree]  # key, obs [B, ...] -> params
    initial_carry: Callable[[int], PyTree]  # B -> carry
    # params, carry, obs [B, ...], reset [B] -> carry, distribution, value [B]
    step: Callable[..., tuple[PyTree, Distribution, Array]]
    # params, carry, obs [T, B, ...], reset [T, B] -> distribution, value [T, B]
    unroll: Callable[..., tuple[Distribution, Array]]


# ------------------------------------------------------------------------------------------ data


class Transition(NamedTuple):
    """Transitions of a rollout under the behaviour policy π_old; inside its loop, of one step."""

    obs: PyTree  # [T, B, ...] input of the model, normalised if the config says so
    action: Array  # [T, B, ...] as sampled, before any clipping
    log_prob: Float[Array, "T B"]  # log π_old(action[t] | obs[t]), in nats
    value: Float[Array, "T B"]  # V(obs[t])
    # V of the true successor of step t, also at a truncation; arbitrary at a termination
    next_value: Float[Array, "T B"]
    reward: Float[Array, "T B"]
    terminated: Bool[Array, "T B"]
    truncated: Bool[Array, "T B"]
    reset: Bool[Array, "T B"]  # obs[t] is the first of its episode
    mask: Bool[Array, "T B"]  # the action counts in the policy loss
    valid: Bool[Array, "T B"]  # the step counts in the value loss and in all statistics


class Batch(NamedTuple):
    """Training data of one update; fields of the same name are those of `Transition`."""

    obs: PyTree  # [T, B, ...]
    action: Array  # [T, B, ...]
    log_prob: Float[Array, "T B"]
    value: Float[Array, "T B"]
    advantage: Float[Array, "T B"]
    target: Float[Array, "T B"]  # regression target of the value function
    reset: Bool[Array, "T B"]
    mask: Bool[Array, "T B"]
    valid: Bool[Array, "T B"]
    carry: PyTree  # [B, ...] recurrent state before step 0; () for a feed-forward model
    # name -> [T, B, ...]: extras of the reward function, such as reference log-probabilities
    extras: dict[str, PyTree] = {}  # noqa: RUF012


# ------------------------------------------------------------------------------------- algorithms


class Update(NamedTuple):
    """A policy-gradient algorithm: PPO, TRPO and REINFORCE differ only in their `Update`."""

    init: Callable[[PyTree], PyTree]  # params -> update_state, such as the optimiser's moments
    # key, params, update_state, batch -> params, update_state, metrics
    step: Callable[[PRNGKey, PyTree, PyTree, Batch], tuple[PyTree, PyTree, dict[str, Array]]]


class Rewards(NamedTuple):
    """Output of a reward function for one rollout."""

    reward: Float[Array, "T B"]
    state: PyTree  # state of the reward function for the next rollout
    metrics: dict[str, Array]  # name -> scalar
    extras: dict[str, PyTree]  # name -> [T, B, ...], stored in `Batch.extras`


class Reward(NamedTuple):
    """A reward function with a state (an adaptive coefficient, say), or with metrics or extras."""

    init: Callable[[Any], PyTree]  # config -> reward_state
    step: Callable[..., Rewards]  # reward_state, transitions, config, frozen -> Rewards


class Estimator(Protocol):
    """An advantage estimator."""

    def __call__(
        self, config: Any, transitions: Transition, reward: Float[Array, "T B"], /
    ) -> tuple[Float[Array, "T B"], Float[Array, "T B"]]:
        """The advantages and the targets of the value function, both [T, B].

        ``reward`` replaces ``transitions.reward``: it is the output of the reward function after
        normalisation. With ``group_size`` G, environments G·i … G·i + G − 1 have the same initial
        state, so an estimator can use the mean return of a group as a baseline.
        """


class TrainState(NamedTuple):
    """The complete state of training. Training resumes from it exactly."""

    params: PyTree
    update: PyTree  # state of the `Update`
    normalizer: PyTree  # running moments of observations and of discounted returns
    env: VectorState
    carry: PyTree  # [B, ...] recurrent state of the model
    reward: PyTree  # state of the reward function
    key: PRNGKey
    iteration: Int[Array, ""]  # number of completed iterations
    timesteps: Array  # environment steps so far; with whole episodes only those in the mask


@runtime_checkable
class Trained(Protocol):
    """Source of a policy: a `TrainState`, or the part of it that is stored for the best policy."""

    @property
    def params(self) -> PyTree: ...
    @property
    def normalizer(self) -> PyTree: ...
    @property
    def iteration(self) -> Any: ...


# Represents NaN while jax_debug_nans is on; see `Metrics`.
UNDEFINED = float(np.finfo(np.float32).min)


def undefined() -> float:
    """The stored value of an undefined metric: NaN, or `UNDEFINED` under ``jax_debug_nans``."""
    return UNDEFINED if jax.config.jax_debug_nans else math.nan  # type: ignore[attr-defined]


def nan_where_undefined(x: Any) -> Any:
    """``x`` with NaN in place of `UNDEFINED`; unchanged if it is not a floating-point array."""
    if not isinstance(x, np.ndarray | np.generic | jax.Array) or not jax.numpy.issubdtype(
        x.dtype, np.floating
    ):
        return x
    if not isinstance(x, jax.Array):
        with np.errstate(over="ignore"):  # in half precision `UNDEFINED` overflows to −∞
            return np.where(x == x.dtype.type(UNDEFINED), x.dtype.type(np.nan), x)[()]
    with jax.debug_nans(False):  # this NaN is intended
        return jax.numpy.where(x == UNDEFINED, jax.numpy.nan, x)


def _undefined_reads_as_nan(cls: Any) -> Any:
    """Class decorator: apply `nan_where_undefined` to a NamedTuple's fields, `_asdict` and `repr`.

    The items of the tuple, which are the leaves that JAX sees, keep their stored values.
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
    cls._asdict = as_dict
    cls.__repr__ = text
    return cls


@_undefined_reads_as_nan
class Metrics(NamedTuple):
    """One number per iteration and field; memory is independent of ``num_steps`` and ``num_envs``.

    An undefined value, such as the mean return of no episodes, is NaN. ``jax_debug_nans`` raises an
    error if a result contains NaN, so a program traced under it stores `UNDEFINED` instead. The
    field ``metrics.episode_return`` reads as NaN in either case; ``jax.tree.map`` sees the stored
    value. A NaN that results from the computation stays NaN.
    """

    timesteps: Array  # environment steps up to the end of the iteration
    episode_return: Float[Array, ""]  # mean over the episodes finished in it; NaN if none did
    episode_length: Float[Array, ""]  # steps; mean over the same episodes
    episodes: Int[Array, ""]  # number of these episodes
    entropy: Float[Array, ""]  # nats, mean over the minibatches
    approx_kl: Float[Array, ""]  # nats, KL(old || new), mean over the minibatches
    clip_fraction: Float[Array, ""]  # fraction of samples with a ratio outside 1 ± clip_eps
    # 1 − Var(target − value) / Var(target); NaN if all targets are equal or no V is fitted
    explained_variance: Float[Array, ""]
    policy_loss: Float[Array, ""]
    value_loss: Float[Array, ""]  # NaN if no value function is fitted
    grad_norm: Float[Array, ""]  # global norm before clipping, mean over the minibatches
    # max |ratio − 1| before the first step: 0 up to rounding
    first_ratio_deviation: Float[Array, ""]
    extra: dict[str, Array]  # further metrics of the algorithm and of the reward function


class Trainer(NamedTuple):
    """Training one iteration at a time: `make_train` scans ``step`` from the state of ``init``."""

    init: Callable[..., TrainState]  # key, params=None -> TrainState
    step: Callable[..., tuple[TrainState, Metrics]]  # state, frozen=None -> TrainState, Metrics


class Result(NamedTuple):
    """Result of a complete training run."""

    state: TrainState  # final state
    metrics: Metrics  # each field [num_iterations]
