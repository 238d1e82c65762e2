"""The contracts that every part of the library is written against.

Shapes: ``T`` steps of a rollout, ``B`` environments, ``N = T * B``; time comes first. A leading axis of
seeds or of a sweep is never written: it comes from ``jax.vmap``. All of these are immutable, and all but
the bundles of functions (`Env`, `VectorEnv`, `Model`, `Update`, `Reward`, `Trainer`) are pytrees of arrays.
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

    Like the other spaces it takes numbers of Python, NumPy and JAX and holds plain ones, so that it can
    be compared, hashed and written to a file. Raises `ConfigError` for values that describe no space,
    and for traced ones.
    """

    n: int

    def __init__(self, n: ArrayLike):
        array = _real_numbers("Discrete.n", n)
        if array is None or array.shape or not _are_sizes(array):
            raise ConfigError(
                f"Discrete.n = {_shown(n)}: it must be an integer of at least 1 and below 2**31"
            )
        object.__setattr__(self, "n", int(array))

    @property
    def shape(self) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True, init=False)
class MultiDiscrete:
    """Several independent integers, the i-th in 0 … sizes[i] − 1; arrays have shape ``[len(sizes)]``."""

    sizes: tuple[int, ...]

    def __init__(self, sizes: ArrayLike):
        array = _real_numbers("MultiDiscrete.sizes", sizes)
        if array is None or array.ndim != 1 or not array.size or not _are_sizes(array):
            raise ConfigError(
                f"MultiDiscrete.sizes = {_shown(sizes)}: "
                "it must be a sequence of integers of at least 1 and below 2**31, such as (3, 2)"
            )
        object.__setattr__(self, "sizes", tuple(int(n) for n in array))

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.sizes),)


@dataclass(frozen=True, init=False)
class Box:
    """Real arrays of ``shape`` between ``low`` and ``high``, which may be infinite.

    A bound is one number for all elements, or one for each: an array or nested list of ``shape``, or a
    flat one in row-major order. It is held as one number where all are equal, else as a flat tuple, so
    that boxes that mean the same are equal.
    """

    shape: tuple[int, ...]
    low: float | tuple[float, ...]
    high: float | tuple[float, ...]

    def __init__(self, shape: ArrayLike, low: ArrayLike, high: ArrayLike):
        lengths = _real_numbers("Box.shape", shape)
        if lengths is None or lengths.ndim > 1 or not _are_sizes(lengths):
            raise ConfigError(
                f"Box.shape = {_shown(shape)}: it must be a sequence of integers of at least 1, such as (84, 84)"
            )
        object.__setattr__(self, "shape", tuple(int(n) for n in lengths.ravel()))
        object.__setattr__(self, "low", self._bound("low", low))
        object.__setattr__(self, "high", self._bound("high", high))
        lowest, highest = self.limits
        is_empty = (lowest > highest) | (lowest == np.inf) | (highest == -np.inf)
        if is_empty.any():
            below = lowest[is_empty][0]
            above = highest[is_empty][0]
            raise ConfigError(
                f"Box has an element with low = {below} and high = {above}: "
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

    def _bound(self, name: str, bound: ArrayLike) -> float | tuple[float, ...]:
        array = _real_numbers(f"Box.{name}", bound)
        if array is None or np.isnan(array).any():
            raise ConfigError(
                f"Box.{name} = {_shown(bound)}: it must be made of real numbers, none of them NaN"
            )
        if array.shape not in ((), self.shape, (math.prod(self.shape),)):
            raise ConfigError(
                f"Box.{name} has the shape {array.shape}: "
                f"it must be one number, or one for each element of {self.shape}"
            )
        flat = (array.ravel() + 0.0).tolist()  # adding 0 makes -0.0 a 0.0
        return flat[0] if len(set(flat)) == 1 else tuple(flat)


Space = Discrete | MultiDiscrete | Box


@dataclass(frozen=True, init=False)
class Dict:
    """Observations with named parts: ``Dict({"board": Box(...), "action_mask": Box((9,), 0, 1)})``.

    Such an observation is a dict of arrays. The part named ``action_mask``, where there is one, says
    which actions are allowed (`action_mask_shape`). Raises `ConfigError` for anything else than names
    of spaces.
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
                f"Dict = {_shown(spaces)}: it must map at least one name to a Discrete, a "
                "MultiDiscrete or a Box"
            )
        object.__setattr__(self, "spaces", tuple(sorted(named.items(), key=lambda part: part[0])))


ObservationSpace = Space | Dict

ACTION_MASK = "action_mask"  # the part of an observation that says which actions are allowed


def parts_of(space: ObservationSpace) -> PyTree:
    """The space as a tree that has the structure of its observations, with spaces for leaves."""
    return dict(space.spaces) if isinstance(space, Dict) else space


def action_mask_shape(space: Space) -> tuple[int, ...] | None:
    """The shape of an ``action_mask`` for this action space; None where actions have none.

    ``Discrete(n)`` has ``[n]``. ``MultiDiscrete(sizes)`` has ``[sum(sizes)]``, the masks of its
    integers one after the other.
    """
    if isinstance(space, Discrete):
        return (space.n,)
    if isinstance(space, MultiDiscrete):
        return (sum(space.sizes),)
    return None


def _real_numbers(name: str, value: Any) -> NDArray[np.float64] | None:
    """A number, a sequence or an array of real numbers, as an array; None for anything else.

    Raises `ConfigError` for numbers that JAX traces: a space cannot depend on them.
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
    """Whether all are integers of at least 1 and below 2**31."""
    return bool(np.all((array >= 1) & (array < 2**31) & (array == np.floor(array))))


def _shown(value: Any) -> str:
    """The value on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------------------------- environments


class Step(NamedTuple):
    """What one step of one environment leads to."""

    state: PyTree  # the environment's state after the step
    obs: PyTree  # observation of that state: the true successor, never one of the next episode
    reward: Float[Array, ""]
    terminated: Bool[Array, ""]  # the episode ended by itself: the return after it is zero
    truncated: Bool[Array, ""]  # a time limit cut the episode: the state still has a value
    mask: Bool[Array, ""] | bool = True  # False: the action was forced and not the agent's


EnvSettings = tuple[
    tuple[str, Any], ...
]  # (name, value) of each setting, sorted by name; `plain` values


def plain(value: Any) -> Any:
    """A setting of an environment in a form that can be hashed and that JSON can hold.

    A finite number, a string, True, False and None are Python's own; NumPy's and JAX's scalars become these, and lists
    and tuples of them tuples. Raises `ValueError` for anything else: larger arrays, traced values, infinity.
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
    """A mapping of names to values, or the pairs of one, as `EnvSettings`; None if that is impossible."""
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
    """One environment, without auto-reset (`envs.vector` does that for all alike).

    ``truncates`` says whether an episode can be cut by time, which then happens exactly at
    ``max_episode_steps``; with ``max_episode_steps=None`` it may happen at any step.

    ``name`` and ``settings`` are what ``envs.make(name, **settings)`` was called with, so that a
    config, a run directory and a saved policy name the environment completely. The settings are
    sorted pairs, because an Env must be hashable; ``dict(env.settings)`` is the mapping. They are
    None where a file cannot hold them (arrays, say): such an environment has to be given again.
    """

    name: str
    reset: Callable[[PRNGKey], tuple[PyTree, PyTree]]  # key -> state, obs
    step: Callable[[PRNGKey, PyTree, Array], Step]  # key, state, action -> Step
    observation_space: ObservationSpace
    action_space: Space
    max_episode_steps: int | None  # bound on the length of an episode; None: no bound
    truncates: bool
    settings: EnvSettings | None = ()


class EpisodeSums(NamedTuple):
    """Sums over the episodes that finished in one rollout; a mean over none of them is NaN, not 0."""

    returns: Float[Array, ""]
    lengths: Float[Array, ""]
    episodes: Int[Array, ""]


class VectorState(NamedTuple):
    """The state of B environments between two steps; of S shards of them, every field has S in front."""

    env: PyTree  # [B, ...] states of the environments
    obs: PyTree  # [B, ...] what the agent sees next
    reset: Bool[Array, "B"]  # obs is the first of its episode
    episode_return: Float[Array, "B"]  # of the running episode, undiscounted
    episode_length: Int[Array, "B"]
    finished: EpisodeSums  # since the rollout began


class VectorEnv(NamedTuple):
    """B environments that restart by themselves; made by `envs.vector.vectorize`."""

    reset: Callable[[PRNGKey], VectorState]
    begin_rollout: Callable[
        [VectorState], VectorState
    ]  # sets the sums over finished episodes to zero
    step: Callable[
        [PRNGKey, VectorState, Array], tuple[VectorState, Step]
    ]  # Step of [B, ...], before the reset


# ---------------------------------------------------------------------------------------- models


@runtime_checkable
class Distribution(Protocol):
    """A batch of distributions over actions, as `purejaxppo.networks.distributions` has them."""

    def sample(self, key: PRNGKey) -> Array: ...
    def mode(self) -> Array: ...
    def log_prob(self, action: Array) -> Array: ...
    def entropy(self) -> Array: ...
    def kl(self, other: Any) -> Array: ...


class Model(NamedTuple):
    """An actor-critic as four functions; ``step`` and ``unroll`` must agree, so that ratios start at 1.

    ``params`` is a dict: ``policy``, ``value`` and, only where they share one, ``trunk``, each any pytree of
    floating-point arrays. (TRPO needs this dict, the other algorithms take any pytree.) ``carry`` is the
    memory, each leaf with B first, and is empty for a feed-forward model. ``reset[t]`` clears it before
    ``obs[t]``.
    """

    init: Callable[[PRNGKey, PyTree], PyTree]  # key, obs [B, ...] -> params
    initial_carry: Callable[[int], PyTree]  # B -> carry
    step: Callable[
        ..., tuple[PyTree, Distribution, Array]
    ]  # params, carry, obs[B], reset[B] -> carry, dist, value[B]
    unroll: Callable[
        ..., tuple[Distribution, Array]
    ]  # params, carry, obs[T,B], reset[T,B] -> dist, value[T,B]


# ------------------------------------------------------------------------------------------ data


class Transition(NamedTuple):
    """A rollout, as the policy lived it."""

    obs: PyTree  # [T, B, ...] what the model saw: normalised where the config says so
    action: Array  # [T, B, ...] as sampled, before any clipping
    log_prob: Float[Array, "T B"]  # of that action under the policy that took it
    value: Float[Array, "T B"]  # V(obs[t])
    next_value: Float[
        Array, "T B"
    ]  # V of the true successor of step t, also where an episode was cut
    reward: Float[Array, "T B"]
    terminated: Bool[Array, "T B"]
    truncated: Bool[Array, "T B"]
    reset: Bool[Array, "T B"]  # obs[t] is the first of its episode
    mask: Bool[Array, "T B"]  # the action counts in the policy loss
    valid: Bool[Array, "T B"]  # the step exists at all: value loss, statistics


class Batch(NamedTuple):
    """What an update learns from."""

    obs: PyTree  # [T, B, ...]
    action: Array  # [T, B, ...]
    log_prob: Float[Array, "T B"]
    value: Float[Array, "T B"]
    advantage: Float[Array, "T B"]
    target: Float[Array, "T B"]  # what the value function is fitted to
    reset: Bool[Array, "T B"]
    mask: Bool[Array, "T B"]
    valid: Bool[Array, "T B"]
    carry: PyTree  # [B, ...] memory before step 0; () for a feed-forward model
    # name -> [T, B, ...]: what the reward function adds, such as reference log-probabilities
    extras: dict[str, PyTree] = {}  # noqa: RUF012


# ------------------------------------------------------------------------------------- algorithms


class Update(NamedTuple):
    """An algorithm: PPO, TRPO and REINFORCE differ in nothing else."""

    init: Callable[
        [PyTree], PyTree
    ]  # params -> update_state (moments of the optimiser and the like)
    step: Callable[[PRNGKey, PyTree, PyTree, Batch], tuple[PyTree, PyTree, dict[str, Array]]]
    # key, params, update_state, batch -> params, update_state, metrics


class Rewards(NamedTuple):
    """What a reward function makes of a rollout."""

    reward: Float[Array, "T B"]
    state: PyTree  # the reward function's state for the next rollout
    metrics: dict[str, Array]  # name -> one number
    extras: dict[str, PyTree]  # name -> [T, B, ...]; they go into the `Batch`


class Reward(NamedTuple):
    """A reward function with memory, such as an adaptive coefficient, or with more to say."""

    init: Callable[[Any], PyTree]  # config -> reward_state
    step: Callable[..., Rewards]  # reward_state, transitions, config, frozen -> Rewards


class Estimator(Protocol):
    """An advantage estimator."""

    def __call__(
        self, config: Any, transitions: Transition, reward: Float[Array, "T B"], /
    ) -> tuple[Float[Array, "T B"], Float[Array, "T B"]]:
        """The advantages and the targets of the value function.

        ``reward`` replaces ``transitions.reward``: it comes from the reward function and its
        normaliser. With ``group_size`` G, environments G·i … G·i + G − 1 began at the same start.
        """


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


UNDEFINED = float(
    np.finfo(np.float32).min
)  # stands for NaN while jax_debug_nans is on: see `Metrics`


def undefined() -> float:
    """What a program stores where a metric has no value: NaN, or `UNDEFINED` if traced under ``jax_debug_nans``."""
    return UNDEFINED if jax.config.jax_debug_nans else math.nan  # type: ignore[attr-defined]


def nan_where_undefined(x: Any) -> Any:
    """``x`` with NaN where it is `UNDEFINED`; what is not a floating-point array or number is returned as it is."""
    if not isinstance(x, np.ndarray | np.generic | jax.Array) or not jax.numpy.issubdtype(
        x.dtype, np.floating
    ):
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
    cls._asdict = as_dict
    cls.__repr__ = text
    return cls


@_undefined_reads_as_nan
class Metrics(NamedTuple):
    """One number per iteration and field, so memory grows with neither ``num_steps`` nor ``num_envs``.

    A value that does not exist, such as the mean return where no episode finished, is NaN. Because ``jax_debug_nans``
    raises where a result holds a NaN, a program that is traced while that switch is on stores `UNDEFINED` instead. The
    field ``metrics.episode_return`` reads as NaN in either case; ``jax.tree.map`` sees what is stored. A NaN that a
    program computed stays one.
    """

    timesteps: Array  # environment steps done at the end of the iteration
    episode_return: Float[
        Array, ""
    ]  # mean over the episodes that finished in it; NaN where none did
    episode_length: Float[Array, ""]  # steps, likewise
    episodes: Int[Array, ""]  # how many finished
    entropy: Float[Array, ""]  # nats, mean over the minibatches
    approx_kl: Float[Array, ""]  # nats, KL(old || new), mean over the minibatches
    clip_fraction: Float[Array, ""]  # share of the samples whose ratio left 1 ± clip_eps
    explained_variance: Float[
        Array, ""
    ]  # 1 − Var(target − value) / Var(target); NaN for equal targets, or no V
    policy_loss: Float[Array, ""]
    value_loss: Float[Array, ""]  # NaN where no value function is fitted
    grad_norm: Float[Array, ""]  # global norm before clipping, mean over the minibatches
    first_ratio_deviation: Float[
        Array, ""
    ]  # max |ratio − 1| before the first step: 0 but for rounding
    extra: dict[str, Array]  # the algorithm's and the reward function's own


class Trainer(NamedTuple):
    """Training in pieces: `make_train` is the scan of ``step`` from ``init``."""

    init: Callable[..., TrainState]  # key, params=None -> TrainState
    step: Callable[..., tuple[TrainState, Metrics]]  # state, frozen=None -> TrainState, Metrics


class Result(NamedTuple):
    """What a whole run returns."""

    state: TrainState
    metrics: Metrics  # each field [num_iterations]
