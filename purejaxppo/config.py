"""`Config`: what is trained, on what and how, and the checks that turn a mistake into one clear sentence."""

import dataclasses
import functools
import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import jax
import numpy as np

from purejaxppo.checks import (
    INSIDE_UNIT,
    NONE_OR_POSITIVE,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_INT,
    UNIT,
    Check,
    checked_int,
    checked_leaf,
    checked_settings,
    checked_sizes,
    nearest,
    wrong,
)
from purejaxppo.types import ConfigError, EnvSettings, plain_settings

ALGORITHMS = ("ppo", "trpo", "reinforce")
OBJECTIVES = ("clip", "adaptive_kl", "fixed_kl", "unclipped")
ESTIMATORS = ("auto", "gae", "returns")
BASELINES = ("value", "leave_one_out", "running_mean", "none")
NETWORKS = ("mlp",)
ACTIVATIONS = ("tanh", "relu", "elu", "gelu", "silu")


def _static(default: Any, doc: str, check: Check | tuple[str, ...] | None = None, kw_only: bool = False) -> Any:
    """A size, a name or a switch: another value is another compiled program."""
    metadata = {"static": True, "doc": doc, "check": check}
    return dataclasses.field(default=default, metadata=metadata, kw_only=kw_only)


def _leaf(default: float | None, doc: str, check: Check) -> Any:
    """A continuous hyper-parameter: it may be traced, batched and swept within one compiled program."""
    return dataclasses.field(default=default, metadata={"doc": doc, "check": check})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a training run but its key; a frozen dataclass that is also a pytree.

    Sizes, names and switches are static. The continuous hyper-parameters are leaves: ``jax.vmap`` over a `Config`
    whose ``lr`` is an array trains every rate in one compiled program (``in_axes=config.axes("lr")``).
    Nothing is checked here, because JAX rebuilds pytrees with tracers and placeholders; `make_train` and
    `Config.from_dict` check.

    Of the defaults, the sizes, ``num_epochs`` and ``lr`` are those that learn most within 100,000 steps over eight
    environments of gymnax (``python -m benchmarks general``); the others are the PPO paper's where they carry over
    (Schulman et al. 2017, table 3). `Config.for_env` has tuned settings.

    ``env_settings`` are written as a mapping, ``Config(env_settings={"max_steps_in_episode": 50})``,
    and held as sorted pairs, which can be hashed; ``dict(config.env_settings)`` is the mapping. None
    says that they were not recorded (see `Env`).
    """

    env: str = _static("CartPole-v1", "environment: a name that `purejaxppo envs` lists")
    env_settings: Mapping[str, Any] | EnvSettings | None = _static(
        (), "settings of the environment's own, such as max_steps_in_episode=50", kw_only=True
    )
    algorithm: str = _static("ppo", "how the agent learns", ALGORITHMS)
    total_timesteps: int = _static(1_000_000, "environment steps in all, rounded up to whole iterations", POSITIVE_INT)
    num_envs: int = _static(16, "parallel environments (B)", POSITIVE_INT)
    num_steps: int = _static(128, "steps of each environment per iteration (T)", POSITIVE_INT)
    num_epochs: int = _static(10, "passes over each iteration's data", POSITIVE_INT)
    num_minibatches: int = _static(8, "gradient steps per pass; must divide num_envs * num_steps", POSITIVE_INT)
    num_shards: int = _static(1, "blocks of environments that can be on different devices (S)", POSITIVE_INT)

    lr: float = _leaf(2e-3, "learning rate of Adam", NOT_NEGATIVE)
    anneal_lr: bool = _static(True, "take the learning rate linearly to 0 over the run")
    adam_eps: float = _leaf(1e-5, "epsilon of Adam", POSITIVE)
    max_grad_norm: float = _leaf(0.5, "the gradient is scaled down to this global norm", POSITIVE)
    gamma: float = _leaf(0.99, "discount per step", UNIT)
    gae_lambda: float = _leaf(0.95, "lambda of generalised advantage estimation", UNIT)
    advantage: str = _static("auto", "estimator of the advantage; auto: returns for reinforce, else gae", ESTIMATORS)
    episodic: bool = _static(False, "restart all environments every iteration, one whole episode each, as returns do")
    baseline: str = _static("value", "what reinforce takes off the returns", BASELINES)
    baseline_decay: float = _leaf(0.9, "weight of the past, per iteration, in reinforce's running mean", UNIT)
    objective: str = _static("clip", "PPO's surrogate: clipped, penalised by the KL divergence, or neither", OBJECTIVES)
    clip_eps: float = _leaf(0.2, "the ratio is clipped to 1 ± this", INSIDE_UNIT)
    kl_coef: float = _leaf(1.0, "beta: weight of the KL penalty; of adaptive_kl the first one", NOT_NEGATIVE)
    kl_target: float = _leaf(0.01, "nats per iteration that adaptive_kl aims at", POSITIVE)
    early_stop_kl: float | None = _leaf(
        None, "nats after which an iteration's updates end; None: never", NONE_OR_POSITIVE
    )
    max_kl: float = _leaf(0.01, "delta: TRPO's bound on the divergence of a step, in nats", POSITIVE)
    cg_damping: float = _leaf(0.1, "TRPO adds this times the identity to the Fisher matrix", NOT_NEGATIVE)
    cg_iterations: int = _static(10, "conjugate-gradient steps of TRPO", POSITIVE_INT)
    fisher_subsample: int = _static(1, "TRPO's Fisher matrix is of one sample in so many", POSITIVE_INT)
    line_search_steps: int = _static(10, "lengths that TRPO's line search tries", POSITIVE_INT)
    line_search_shrink: float = _leaf(0.8, "each length is this times the one before", INSIDE_UNIT)
    vf_coef: float = _leaf(0.5, "c1: weight of the value loss", NOT_NEGATIVE)
    ent_coef: float = _leaf(0.0, "c2: weight of the entropy bonus", NOT_NEGATIVE)
    normalize_advantage: bool = _static(True, "standardise the advantages of each minibatch")
    clip_value: bool = _static(False, "clip the value's change to ± clip_eps too, as OpenAI's baselines do")

    normalize_obs: bool = _static(False, "standardise observations by their running moments")
    normalize_reward: bool = _static(False, "divide rewards by the running deviation of the discounted return")
    squash_actions: bool = _static(False, "squash continuous actions by tanh instead of clipping them")

    network: str = _static("mlp", "kind of network", NETWORKS)
    hidden_sizes: tuple[int, ...] = _static((64, 64), "width of each hidden layer")
    activation: str = _static("tanh", "nonlinearity of the hidden layers", ACTIVATIONS)
    shared_trunk: bool = _static(False, "policy and value share the hidden layers")
    debug: bool = _static(False, "print a line from inside the compiled program after every iteration")

    def __post_init__(self) -> None:
        """Hold static fields that are written as a mapping or a list in a form that can be hashed."""
        settings = plain_settings(self.env_settings)
        if settings is not None:
            object.__setattr__(self, "env_settings", settings)
        if isinstance(self.hidden_sizes, list):
            object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))

    # ------------------------------------------------------------------------------- derived numbers

    @property
    def batch_size(self) -> int:
        """N = num_envs · num_steps: the environment steps of one iteration."""
        return self.num_envs * self.num_steps

    @property
    def estimator(self) -> str:
        """The name in `ADVANTAGES` that ``advantage`` stands for."""
        return {"auto": "returns" if self.algorithm == "reinforce" else "gae"}.get(self.advantage, self.advantage)

    @property
    def whole_episodes(self) -> bool:
        """Every iteration plays one whole episode in each environment: returns that are cut off would be biased."""
        return self.episodic or self.estimator == "returns"

    @property
    def num_iterations(self) -> int:
        """K = ⌈total_timesteps / N⌉; with whole episodes the most there are, which one step of each episode takes."""
        return -(-self.total_timesteps // (self.num_envs if self.whole_episodes else self.batch_size))

    @property
    def actual_timesteps(self) -> int:
        """The environment steps that will run: ``total_timesteps`` rounded up to whole iterations.

        With whole episodes it is the most there can be: steps count up to the end of an episode, and the iteration in
        which ``total_timesteps`` are reached is the last.
        """
        if self.whole_episodes:
            return self.total_timesteps + self.batch_size - 1
        return self.num_iterations * self.batch_size

    # ---------------------------------------------------------------------------- making and changing

    def replace(self, **changes: Any) -> "Config":
        """A copy with these fields changed."""
        _require_known(changes)
        return dataclasses.replace(self, **changes)

    def axes(self, *names: str) -> "Config":
        """The ``in_axes`` of `jax.vmap` for a config batched in these fields: ``config.axes("lr", "gamma")``."""
        for name in names:
            if name not in LEAVES:
                raise ConfigError(f"{name!r} cannot be batched{nearest(name, LEAVES)}; what can: {', '.join(LEAVES)}")
        axes: dict[str, Any] = {name: 0 if name in names else None for name in LEAVES}
        return dataclasses.replace(self, **axes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], base: "Config | None" = None) -> "Config":
        """A validated config from a mapping of our keys, or of PureJaxRL's upper-case ones; ``base`` fills the rest.

        Without ``base`` the rest is the general settings of the algorithm. The mapping is not changed. Raises
        `ConfigError` for an unknown key, a wrong type and a value out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration is a Config or a mapping, not {type(values).__name__}")
        if any(isinstance(key, str) and key.isupper() for key in values):
            values = _from_purejaxrl(values)
            values = {"clip_value": values.get("algorithm", "ppo") == "ppo"} | values if base is None else values
        _require_known(values)
        base = base or dataclasses.replace(cls(), **general(values.get("algorithm")))
        return validate(dataclasses.replace(base, **values))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them; `from_dict` takes those of an unbatched config back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: np.asarray(x).tolist() if name in LEAVES else x for name, x in values.items()} | {
            "env_settings": None if self.env_settings is None else dict(self.env_settings),
            "hidden_sizes": list(self.hidden_sizes),
        }

    @classmethod
    def for_env(cls, name: str, **changes: Any) -> "Config":
        """The settings of an algorithm tuned for an environment (``purejaxppo/tuned.toml``), else its general ones."""
        known = tuned(changes.get("algorithm", cls.algorithm)).get(str(name).removeprefix("gymnax/"), {})
        settings = {key: value for key, value in known.items() if key != "result"}
        return cls.from_dict({"env": name} | settings | changes)


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
LEAVES = tuple(name for name, field in FIELDS.items() if not field.metadata.get("static"))


def tuned(algorithm: str = Config.algorithm) -> dict[str, dict[str, Any]]:
    """The settings tuned for an algorithm by environment name, each with the result it reached under ``result``."""
    return _settings().get(algorithm, {}) if isinstance(algorithm, str) else {}


def general(algorithm: Any) -> dict[str, Any]:
    """What an algorithm needs other than the defaults of `Config`, in any environment."""
    return _settings()["general"].get(algorithm, {}) if isinstance(algorithm, str) else {}


@functools.cache
def _settings() -> dict[str, Any]:
    return tomllib.loads(resources.files("purejaxppo").joinpath("tuned.toml").read_text())


# ----------------------------------------------------------------------------------------- checks


def validate(config: Config) -> Config:
    """The config with numbers in their right types, or `ConfigError` for the first thing that cannot be.

    Traced values are not looked at; batched ones are checked element by element.
    """
    if not isinstance(config, Config):
        raise ConfigError(f"a configuration is a Config or a mapping, not {type(config).__name__}")
    config = dataclasses.replace(config, **{name: _checked(name, getattr(config, name)) for name in FIELDS})
    if config.batch_size >= 2**31:
        raise ConfigError(f"num_envs * num_steps = {config.batch_size}: one iteration must have fewer than 2**31 steps")
    if config.num_envs % config.num_shards:
        raise ConfigError(
            f"num_shards = {config.num_shards} does not divide num_envs = {config.num_envs}: shards are equally large"
        )
    if config.batch_size % config.num_minibatches:
        around = (config.num_minibatches + sign * i for i in range(1, 10_000) for sign in (-1, 1))
        nearest = next((m for m in around if m >= 1 and config.batch_size % m == 0), 1)
        raise ConfigError(
            f"num_minibatches = {config.num_minibatches} does not divide num_envs * num_steps = "
            f"{config.batch_size}; the nearest number that does is {nearest}"
        )
    if config.batch_size % (config.num_minibatches * config.num_shards):
        raise ConfigError(
            f"num_minibatches = {config.num_minibatches} does not divide the {config.batch_size // config.num_shards} "
            f"samples of each of {config.num_shards} shards: every minibatch has an equal part of every shard"
        )
    if config.whole_episodes and config.actual_timesteps >= 2**31:
        raise ConfigError(f"total_timesteps = {config.total_timesteps}: whole episodes are counted up to 2**31 steps")
    _require_sense(config)
    if config.whole_episodes and config.anneal_lr:
        raise ConfigError(
            "anneal_lr needs a known number of iterations, and whole episodes have none: set anneal_lr=False"
        )
    return config


def _require_sense(config: Config) -> None:
    """Settings that contradict each other. What only another algorithm asks for may stand at any plain value.

    Of the leaves, which may be traced, those are looked at whose value would change what is computed.
    """
    algorithm = config.algorithm
    if config.objective == "adaptive_kl" and _is_somewhere(np.equal, config.kl_coef):
        raise ConfigError("kl_coef = 0: adaptive_kl halves and doubles it, so it must start above 0")
    if algorithm != "ppo" and (config.objective != "clip" or config.early_stop_kl is not None or config.clip_value):
        raise ConfigError("objective, early_stop_kl and clip_value are PPO's: leave them out, or set algorithm='ppo'")
    if algorithm != "reinforce" and config.baseline != "value":
        raise ConfigError(f"baseline = {config.baseline!r} is reinforce's: {algorithm} has the value function")
    if algorithm == "trpo" and config.shared_trunk:
        raise ConfigError(
            "trpo bounds the policy's change, a shared trunk's value fit does not: set shared_trunk=False"
        )
    if algorithm == "trpo" and _is_somewhere(np.not_equal, config.ent_coef):
        raise ConfigError("trpo has no entropy bonus: ent_coef=0, or algorithm='ppo'")
    if algorithm == "reinforce":
        _require_reinforce_fits(config)


def _require_reinforce_fits(config: Config) -> None:
    if (config.num_epochs, config.num_minibatches) != (1, 1):
        raise ConfigError(
            f"num_epochs = {config.num_epochs}, num_minibatches = {config.num_minibatches}: reinforce takes one step "
            "on each batch, because its gradient holds for the policy that played it: set num_epochs=1 and "
            "num_minibatches=1, or start from Config.for_env(env, algorithm='reinforce')"
        )
    if config.baseline == "leave_one_out" and config.num_envs < 2:
        raise ConfigError("baseline = 'leave_one_out' is the mean of the other episodes: set num_envs to at least 2")
    if config.estimator == "gae" and config.baseline != "value":
        raise ConfigError(
            f"advantage = 'gae' bootstraps from the value function, which baseline = {config.baseline!r} does not "
            "train: set baseline='value' or advantage='returns'"
        )


def _is_somewhere(compare: Callable[..., Any], value: Any) -> bool:
    """Whether a leaf equals 0, or does not, in any element; False of a traced one."""
    return not isinstance(value, jax.core.Tracer) and bool(np.any(compare(np.asarray(value), 0)))


def require_scalars(config: Config) -> None:
    """One call trains one agent: batched hyper-parameters come in through `jax.vmap`."""
    for name in LEAVES:
        if np.ndim(getattr(config, name)):
            raise ConfigError(
                f"{name} is an array of shape {np.shape(getattr(config, name))}: train one agent for each element by "
                f"jax.vmap(lambda config, key: make_train(config)(key), in_axes=(config.axes({name!r}), None))"
            )


def _checked(name: str, value: Any) -> Any:
    default, check = FIELDS[name].default, FIELDS[name].metadata["check"]
    if name in LEAVES:
        return None if value is None is default else checked_leaf(name, value, check)
    if name == "hidden_sizes":
        return checked_sizes(name, value)
    if name == "env_settings":
        return checked_settings(name, value)
    if isinstance(default, bool):
        if not isinstance(value, bool | np.bool_):
            raise wrong(name, value, "True or False")
        return bool(value)
    if isinstance(default, int):
        return checked_int(name, value, check)
    if not isinstance(value, str):
        raise wrong(name, value, "a string")
    if check and value not in check:
        raise wrong(name, value, f"one of {', '.join(check)}", nearest(value, check))
    return value


def _require_known(values: Mapping[str, Any]) -> None:
    for key in values:
        if key not in FIELDS:
            raise ConfigError(f"{key!r} is not a setting{nearest(key, FIELDS) or '; known: ' + ', '.join(FIELDS)}")


# ---------------------------------------------------------------------------- PureJaxRL's upper-case keys

_PUREJAXRL = {
    "ENV_NAME": "env",
    "UPDATE_EPOCHS": "num_epochs",
    "DEBUG": "debug",
} | {name.upper(): name for name in FIELDS}
_PUREJAXRL_DERIVED = ("NUM_UPDATES", "MINIBATCH_SIZE")  # its make_train writes these into the caller's dict


def _from_purejaxrl(values: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping in our names; ``NORMALIZE_ENV`` is observations and rewards both, as in its continuous script."""
    ours: dict[str, Any] = {}
    for key, value in values.items():
        if key in _PUREJAXRL_DERIVED:
            continue
        names = ("normalize_obs", "normalize_reward") if key == "NORMALIZE_ENV" else (_PUREJAXRL.get(key, key),)
        if names[0] not in FIELDS:
            known = [*_PUREJAXRL, "NORMALIZE_ENV"]
            raise ConfigError(f"{key!r} is not a setting{nearest(key, known) or '; known: ' + ', '.join(known)}")
        if repeated := [name for name in names if name in ours]:
            raise ConfigError(f"{repeated[0]!r} is given twice, once as {key!r}: leave one of them out")
        ours |= dict.fromkeys(names, value)
    return ours
