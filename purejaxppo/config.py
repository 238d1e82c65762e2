"""`Config`: the configuration of a training run, its settings by algorithm, and its validation."""

import dataclasses
import functools
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jax
import numpy as np

from purejaxppo.purejaxrl_config import from_purejaxrl
from purejaxppo.types import ConfigError, EnvSettings, plain_settings
from purejaxppo.validation import (
    INSIDE_UNIT,
    NONE_OR_POSITIVE,
    NONE_OR_POSITIVE_INT,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_INT,
    UNIT,
    Check,
    checked_env_settings,
    checked_int,
    checked_leaf,
    checked_sizes,
    nearest,
    one_of,
    require_compatible,
    wrong,
)

# A new algorithm or estimator needs its name here and an entry in `UPDATES` or `ADVANTAGES`.
ALGORITHMS = ["ppo", "trpo", "reinforce"]
OBJECTIVES = ("clip", "adaptive_kl", "fixed_kl", "unclipped")
ESTIMATORS = ["auto", "gae", "returns", "grpo", "rloo"]
GROUP_ESTIMATORS = ("grpo", "rloo")  # compare the episodes of a group and need no value function
LOSS_REDUCTIONS = ("token", "sequence", "constant")
BASELINES = ("value", "leave_one_out", "running_mean", "none")
NETWORKS = ("mlp",)
REF_KL_LOSSES = ("none", "k1", "k3")
ACTIVATIONS = ("tanh", "relu", "elu", "gelu", "silu")


def _static(
    default: Any,
    doc: str,
    check: Check | Sequence[str] | None = None,
    *,
    of: Sequence[str] = (),
    variant: bool = False,
    compared: bool = False,
    kw_only: bool = False,
) -> Any:
    """A static field (size, name or switch): each value needs its own compiled program.

    ``doc`` is the help text. ``of`` names the algorithms that have this field; empty means all. A
    ``variant`` changes the computation of its algorithm; other algorithms accept only its default.
    The choices of a ``compared`` variant are names that `compare` knows.
    """
    metadata = {
        "static": True,
        "doc": doc,
        "check": check,
        "of": tuple(of),
        "variant": variant,
        "compared": compared,
    }
    return dataclasses.field(default=default, metadata=metadata, kw_only=kw_only)


def _leaf(
    default: float | None,
    doc: str,
    check: Check,
    *,
    of: Sequence[str] = (),
    variant: bool = False,
    kw_only: bool = False,
) -> Any:
    """A continuous hyper-parameter, which can be traced, batched and swept in one compiled program.

    The arguments are those of `_static`.
    """
    metadata = {"doc": doc, "check": check, "of": tuple(of), "variant": variant, "compared": False}
    return dataclasses.field(default=default, metadata=metadata, kw_only=kw_only)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a training run: a frozen dataclass that is also a pytree.

    A run is determined by its config and its random key. Sizes, names and switches are static.
    Continuous hyper-parameters are leaves: ``jax.vmap`` over a `Config` whose ``lr`` is an array
    trains all rates in one compiled program (``in_axes=config.axes("lr")``). The constructor does
    not validate, because JAX rebuilds pytrees with tracers and placeholders; `make_train` and
    `Config.from_dict` do.

    The defaults of the sizes, ``num_epochs`` and ``lr`` scored best after 100,000 steps over eight
    environments of gymnax (``python -m benchmarks general``). The other defaults follow the PPO
    paper where they apply (Schulman et al. 2017, table 3). `Config.for_env` returns tuned settings.

    ``env_settings`` is given as a mapping, ``Config(env_settings={"max_steps_in_episode": 50})``,
    and stored as sorted pairs, which are hashable; ``dict(config.env_settings)`` restores the
    mapping. None means that the settings were not recorded (see `Env`).
    """

    env: str = _static("CartPole-v1", "name of the environment; `purejaxppo envs` lists all")
    env_settings: Mapping[str, Any] | EnvSettings | None = _static(
        (), "parameters of the environment, such as max_steps_in_episode=50", kw_only=True
    )
    algorithm: str = _static("ppo", "learning algorithm", ALGORITHMS)
    total_timesteps: int = _static(
        1_000_000, "total environment steps, rounded up to full iterations", POSITIVE_INT
    )
    total_episodes: int | None = _static(
        None,
        "total episodes instead of total_timesteps, rounded up to full iterations "
        "(whole episodes only)",
        NONE_OR_POSITIVE_INT,
        kw_only=True,
    )
    num_envs: int = _static(16, "number of parallel environments (B)", POSITIVE_INT)
    num_steps: int = _static(128, "steps per environment and iteration (T)", POSITIVE_INT)
    num_epochs: int = _static(10, "passes over the data of each iteration (K)", POSITIVE_INT)
    num_minibatches: int = _static(
        8, "minibatches per epoch; must divide num_envs * num_steps", POSITIVE_INT
    )
    num_shards: int = _static(
        1, "shards of the environments, for placement on several devices (S)", POSITIVE_INT
    )

    lr: float = _leaf(2e-3, "learning rate of Adam", NOT_NEGATIVE)
    anneal_lr: bool = _static(True, "anneal the learning rate linearly to 0")
    adam_eps: float = _leaf(1e-5, "epsilon of Adam", POSITIVE)
    max_grad_norm: float = _leaf(
        0.5, "clip the global norm of the gradient to this value", POSITIVE
    )
    gamma: float = _leaf(0.99, "discount factor", UNIT)
    gae_lambda: float = _leaf(0.95, "lambda of generalised advantage estimation (GAE)", UNIT)
    advantage: str = _static(
        "auto", "advantage estimator (auto: returns for reinforce, gae otherwise)", ESTIMATORS
    )
    episodic: bool = _static(
        False,
        "play one whole episode per environment and iteration (implied by returns, grpo and rloo)",
    )
    baseline: str = _static(
        "value",
        "baseline that REINFORCE subtracts from the returns",
        BASELINES,
        of=["reinforce"],
        variant=True,
        compared=True,
    )
    baseline_decay: float = _leaf(
        0.9,
        "decay of the running-mean baseline per iteration",
        UNIT,
        of=["reinforce"],
    )
    objective: str = _static(
        "clip",
        "surrogate objective",
        OBJECTIVES,
        of=["ppo"],
        variant=True,
        compared=True,
    )
    clip_eps: float = _leaf(
        0.2, "epsilon: clip the probability ratio to 1 ± epsilon", INSIDE_UNIT, of=["ppo"]
    )
    kl_coef: float = _leaf(
        1.0,
        "beta: coefficient of the KL penalty (initial value for adaptive_kl)",
        NOT_NEGATIVE,
        of=["ppo"],
    )
    kl_target: float = _leaf(
        0.01, "target KL divergence per iteration for adaptive_kl, in nats", POSITIVE, of=["ppo"]
    )
    early_stop_kl: float | None = _leaf(
        None,
        "stop an iteration's updates above this KL divergence, in nats (None: never)",
        NONE_OR_POSITIVE,
        of=["ppo"],
        variant=True,
    )
    max_kl: float = _leaf(
        0.01, "delta: bound on the KL divergence of one step, in nats", POSITIVE, of=["trpo"]
    )
    cg_damping: float = _leaf(
        0.1,
        "damping: multiple of the identity added to the Fisher matrix",
        NOT_NEGATIVE,
        of=["trpo"],
    )
    cg_iterations: int = _static(10, "conjugate-gradient iterations", POSITIVE_INT, of=["trpo"])
    fisher_subsample: int = _static(
        1,
        "k: estimate the Fisher matrix from a random 1/k of the samples",
        POSITIVE_INT,
        of=["trpo"],
    )
    line_search_steps: int = _static(
        10, "maximum number of step sizes in the line search", POSITIVE_INT, of=["trpo"]
    )
    line_search_shrink: float = _leaf(
        0.8, "ratio of successive step sizes in the line search", INSIDE_UNIT, of=["trpo"]
    )
    vf_coef: float = _leaf(0.5, "c1: coefficient of the value loss", NOT_NEGATIVE)
    ent_coef: float = _leaf(0.0, "c2: coefficient of the entropy bonus", NOT_NEGATIVE)
    normalize_advantage: bool = _static(True, "standardise advantages within each minibatch")
    clip_value: bool = _static(
        False,
        "clip the change of the value estimate to within clip_eps, as in OpenAI baselines",
        of=["ppo"],
        variant=True,
    )

    normalize_obs: bool = _static(False, "standardise observations with running moments")
    normalize_reward: bool = _static(
        False, "divide rewards by the running standard deviation of the discounted return"
    )
    squash_actions: bool = _static(
        False, "squash continuous actions with tanh instead of clipping them"
    )

    network: str = _static("mlp", "network architecture", NETWORKS)
    hidden_sizes: tuple[int, ...] = _static((64, 64), "widths of the hidden layers")
    activation: str = _static("tanh", "activation function of the hidden layers", ACTIVATIONS)
    shared_trunk: bool = _static(False, "share the hidden layers of policy and value function")
    debug: bool = _static(False, "print one line per iteration from inside the compiled program")

    temperature: float = _leaf(
        1.0,
        "divide the logits of discrete actions by this, in acting and learning alike",
        POSITIVE,
        kw_only=True,
    )
    critic_obs: str = _static(
        "", "name of an observation part that only the value function sees", kw_only=True
    )
    group_size: int = _static(
        1,
        "environments per group with the same start (whole episodes only)",
        POSITIVE_INT,
        kw_only=True,
    )
    normalize_group: bool = _static(
        True,
        "divide the advantages of grpo by the standard deviation of the returns of the group "
        "(normalize_advantage standardises them after that, unless it is off)",
        kw_only=True,
    )
    clip_eps_high: float | None = _leaf(
        None,
        "upper epsilon: clip the ratio to [1 - clip_eps, 1 + clip_eps_high] (None: clip_eps)",
        NONE_OR_POSITIVE,
        of=["ppo"],
        variant=True,
        kw_only=True,
    )
    loss_reduction: str = _static(
        "token",
        "mean of the loss over all steps (token), over the means of the sequences (sequence), or "
        "sum divided by the constant size of the minibatch (constant)",
        LOSS_REDUCTIONS,
        of=["ppo"],
        variant=True,
        kw_only=True,
    )

    ref_kl_coef: float = _leaf(
        0.1,
        "beta: coefficient of the KL divergence of a language model from a reference policy, in "
        "the reward or the loss (initial value with ref_kl_target)",
        NOT_NEGATIVE,
        kw_only=True,
    )
    ref_kl_loss: str = _static(
        "none",
        "estimator of the KL divergence from a reference policy in the loss (none: it is in the "
        "reward)",
        REF_KL_LOSSES,
        of=["ppo"],
        variant=True,
        kw_only=True,
    )
    ref_kl_target: float | None = _leaf(
        None,
        "KL divergence per episode, in nats, to which ref_kl_coef is adapted (None: it is fixed)",
        NONE_OR_POSITIVE,
        kw_only=True,
    )
    ref_kl_horizon: float = _leaf(
        10_000.0,
        "horizon of the adaptation of ref_kl_coef, in episodes: a larger one is slower",
        POSITIVE,
        kw_only=True,
    )

    def __post_init__(self) -> None:
        """Convert a mapping or a list in a static field to a hashable value."""
        settings = plain_settings(self.env_settings)
        if settings is not None:
            object.__setattr__(self, "env_settings", settings)
        if isinstance(self.hidden_sizes, list):
            object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))

    # ------------------------------------------------------------------------------ derived values

    @property
    def batch_size(self) -> int:
        """N = num_envs · num_steps, the environment steps of one iteration."""
        return self.num_envs * self.num_steps

    @property
    def estimator(self) -> str:
        """The key in `ADVANTAGES`: ``advantage`` with ``auto`` resolved."""
        return {"auto": "returns" if self.algorithm == "reinforce" else "gae"}.get(
            self.advantage, self.advantage
        )

    @property
    def compares_groups(self) -> bool:
        """Whether an episode's advantage is relative to the other episodes of its group."""
        return self.estimator in GROUP_ESTIMATORS

    @property
    def fits_value(self) -> bool:
        """Whether a value function is fitted."""
        has_other_baseline = self.algorithm == "reinforce" and self.baseline != "value"
        return not (self.compares_groups or has_other_baseline)

    @property
    def whole_episodes(self) -> bool:
        """Whether each iteration plays one whole episode per environment.

        The estimators of returns require it, because returns of incomplete episodes are biased.
        """
        return self.episodic or self.estimator == "returns" or self.compares_groups

    @property
    def has_fixed_length(self) -> bool:
        """Whether ``num_iterations`` iterations will run.

        This is false if whole episodes are played until ``total_timesteps`` steps are counted,
        because an iteration has as many steps as its episodes are long.
        """
        return not self.whole_episodes or self.total_episodes is not None

    @property
    def num_iterations(self) -> int:
        """⌈total_timesteps / N⌉, or ⌈total_episodes / num_envs⌉.

        Without a fixed length this is the upper bound ⌈total_timesteps / num_envs⌉.
        """
        if self.total_episodes is not None:
            return -(-self.total_episodes // self.num_envs)
        least_steps = self.num_envs if self.whole_episodes else self.batch_size
        return -(-self.total_timesteps // least_steps)

    @property
    def actual_timesteps(self) -> int:
        """The environment steps that will run: ``total_timesteps`` rounded up to full iterations.

        With whole episodes this is an upper bound, because only the steps up to the end of an
        episode count. Without a fixed length the iteration that reaches ``total_timesteps`` is the
        last.
        """
        if not self.has_fixed_length:
            return self.total_timesteps + self.batch_size - 1
        return self.num_iterations * self.batch_size

    # ------------------------------------------------------------------ construction and conversion

    def replace(self, **changes: Any) -> "Config":
        """A copy with these fields changed."""
        _require_known(changes)
        return dataclasses.replace(self, **changes)

    def axes(self, *names: str) -> "Config":
        """The ``in_axes`` of `jax.vmap` for a config batched in these fields.

        For example ``config.axes("lr", "gamma")``. Raises `ConfigError` for a static field.
        """
        for name in names:
            if name not in LEAVES:
                raise ConfigError(
                    f"{name!r} cannot be batched{nearest(name, LEAVES)}; "
                    f"fields that can: {', '.join(LEAVES)}"
                )
        axes: dict[str, Any] = {name: 0 if name in names else None for name in LEAVES}
        return dataclasses.replace(self, **axes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], base: "Config | None" = None) -> "Config":
        """A validated config from a mapping of field names, or of PureJaxRL's upper-case keys.

        Missing fields come from ``base``, by default the general settings of the algorithm. The
        mapping is not changed. Raises `ConfigError` for an unknown key, a wrong type, or a value
        out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"a configuration is a Config or a mapping, not {type(values).__name__}"
            )
        if any(isinstance(key, str) and key.isupper() for key in values):
            values = from_purejaxrl(values, FIELDS)
            values = (
                {"clip_value": values.get("algorithm", "ppo") == "ppo"} | values
                if base is None
                else values
            )
        _require_known(values)
        base = base or dataclasses.replace(cls(), **general(values.get("algorithm")))
        return validate(dataclasses.replace(base, **values))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; `from_dict` is the inverse for an unbatched config."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: np.asarray(x).tolist() if name in LEAVES else x for name, x in values.items()
        } | {
            "env_settings": None if self.env_settings is None else dict(self.env_settings),
            "hidden_sizes": list(self.hidden_sizes),
        }

    @classmethod
    def for_env(cls, name: str, **changes: Any) -> "Config":
        """The settings tuned for an environment (``purejaxppo/tuned.toml``), else the general ones.

        ``changes`` replace fields; ``algorithm`` selects whose settings are used.
        """
        known = tuned(changes.get("algorithm", cls.algorithm)).get(
            str(name).removeprefix("gymnax/"), {}
        )
        settings = {key: value for key, value in known.items() if key != "result"}
        return cls.from_dict({"env": name} | settings | changes)


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
LEAVES = tuple(name for name, field in FIELDS.items() if not field.metadata.get("static"))


def fields_of(algorithm: str) -> tuple[str, ...]:
    """The fields that this algorithm has and others lack."""
    return tuple(name for name, field in FIELDS.items() if algorithm in field.metadata["of"])


def variants_of(algorithm: str) -> dict[str, tuple[str, ...]]:
    """The variants of ``ALGORITHM/VARIANT``: variant fields with named choices, and the choices."""
    named = {name: FIELDS[name].metadata for name in fields_of(algorithm)}
    return {
        name: tuple(metadata["check"]) for name, metadata in named.items() if metadata["compared"]
    }


def tuned(algorithm: str = Config.algorithm) -> dict[str, dict[str, Any]]:
    """The tuned settings of an algorithm by environment; ``result`` is the score they reach."""
    return _read_tuned_settings().get(algorithm, {}) if isinstance(algorithm, str) else {}


def general(algorithm: Any) -> dict[str, Any]:
    """The settings that an algorithm needs in any environment beyond the defaults of `Config`."""
    return (
        _read_tuned_settings()["general"].get(algorithm, {}) if isinstance(algorithm, str) else {}
    )


@functools.cache
def _read_tuned_settings() -> dict[str, Any]:
    return tomllib.loads(resources.files("purejaxppo").joinpath("tuned.toml").read_text())


# ----------------------------------------------------------------------------------------- checks


def validate(config: Config) -> Config:
    """The config with numbers converted to their types. Raises `ConfigError` for the first mistake.

    Batched values are checked element by element; traced values are not checked. A result of this
    function is returned unchanged; a copy made by `Config.replace` or JAX is checked again.
    """
    if not isinstance(config, Config):
        raise ConfigError(f"a configuration is a Config or a mapping, not {type(config).__name__}")
    if getattr(config, "_is_valid", False):
        return config
    config = dataclasses.replace(
        config, **{name: _validated_field(name, getattr(config, name)) for name in FIELDS}
    )
    _require_variants_of_algorithm(config)
    require_compatible(config)
    object.__setattr__(config, "_is_valid", True)  # no field: copies do not have it
    return config


def _require_variants_of_algorithm(config: Config) -> None:
    """Reject variants of other algorithms; their other fields have no effect and may differ."""
    for name, field in FIELDS.items():
        of = field.metadata["of"]
        if not field.metadata["variant"] or config.algorithm in of:
            continue
        value = getattr(config, name)
        is_plain = value is None or isinstance(value, bool | str)  # neither traced nor an array
        if not (is_plain and value == field.default):
            raise ConfigError(
                f"{name} = {value!r} is for {' and '.join(of)} only: leave it out, or set "
                f"algorithm={of[0]!r}"
            )


def require_scalars(config: Config) -> None:
    """Raise `ConfigError` for a batched config: one call trains one agent, and vmap trains many."""
    for name in LEAVES:
        shape = np.shape(getattr(config, name))
        if shape:
            raise ConfigError(
                f"{name} is an array of shape {shape}: train one agent for each element by "
                "jax.vmap(lambda config, key: make_train(config)(key), "
                f"in_axes=(config.axes({name!r}), None))"
            )


def _validated_field(name: str, value: Any) -> Any:
    """The value of a field in its type. Raises `ConfigError` if it is invalid."""
    default = FIELDS[name].default
    check = FIELDS[name].metadata["check"]
    if name in LEAVES:
        return None if value is None is default else checked_leaf(name, value, check)
    if name == "hidden_sizes":
        return checked_sizes(name, value)
    if name == "env_settings":
        return checked_env_settings(name, value)
    if isinstance(default, bool):
        if not isinstance(value, bool | np.bool_):
            raise wrong(name, value, "True or False")
        return bool(value)
    if name == "total_episodes" and value is None:
        return None
    if isinstance(default, int) or name == "total_episodes":
        return checked_int(name, value, check)
    if not isinstance(value, str):
        raise wrong(name, value, "a string")
    return one_of(name, value, check) if check else value


def _require_known(values: Mapping[str, Any]) -> None:
    for key in values:
        if key not in FIELDS:
            raise ConfigError(
                f"{key!r} is not a setting{nearest(key, FIELDS) or '; known: ' + ', '.join(FIELDS)}"
            )
