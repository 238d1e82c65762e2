"""`make_train`: a whole training run as one pure function of a key."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from purejaxppo.advantages import ADVANTAGES
from purejaxppo.config import Config
from purejaxppo.envs.vector import vectorize
from purejaxppo.envs.wrappers import bound_actions
from purejaxppo.iterations import (
    mark_padding,
    metrics_buffer,
    run_iterations,
    timesteps_after,
    zero_timesteps,
)
from purejaxppo.keys import is_typed, select
from purejaxppo.metrics import AGENT_METRICS, iteration_metrics
from purejaxppo.networks.temperature import with_temperature
from purejaxppo.normalize import Normalizer, init_normalizer, merge_obs, normalize_reward
from purejaxppo.optimizer import make_optimizer, with_learning_rate
from purejaxppo.rollout import Rollout, in_shards, make_rollout, reset_shards
from purejaxppo.setup import Setup, limit_num_steps_to_episode, set_up
from purejaxppo.starting import Start, start_from
from purejaxppo.types import (
    Batch,
    ConfigError,
    Env,
    EpisodeSums,
    Metrics,
    Model,
    PRNGKey,
    PyTree,
    Result,
    Reward,
    Trainer,
    TrainState,
    Transition,
    VectorEnv,
)
from purejaxppo.updates import UPDATES


def make_train(
    config: Config | Mapping[str, Any],
    env: Env | None = None,
    model: Model | None = None,
    reward_fn: Callable | Reward | None = None,
) -> Callable[..., Result]:
    """``train(key, params=None, frozen=None) -> Result(state, metrics)``: pure, for jit and vmap.

    ``config`` is a `Config` or a mapping, whose keys may be PureJaxRL's upper-case ones. ``env``
    and ``model`` replace those that the config names. ``reward_fn`` computes the rewards (see
    `make_trainer`) and receives ``frozen``, such as a reference model. Raises `ConfigError` for an
    invalid or unsupported configuration.

    ``params`` is the starting point of the run: a `Policy` or a `TrainState` with its normaliser,
    or parameters alone, and then normalisation starts without samples.

    The run is a scan over ``num_iterations`` iterations, which can be differentiated in both modes.
    With whole episodes and without ``total_episodes`` it stops once ``total_timesteps`` steps in
    the mask (chosen actions of first episodes) are counted. Metrics are then padded to
    ⌈total_timesteps / num_envs⌉ iterations, padding rows report zero episodes, and there is no
    reverse-mode derivative. TRPO has none either, because its line search is a loop of unknown
    length.
    """
    setup = set_up(config, env, model, reward_fn)
    trainer = build_trainer(setup)
    config = setup.config

    def train(key: PRNGKey, params: PyTree = None, frozen: PyTree = None) -> Result:
        def step(state: TrainState, _: None = None) -> tuple[TrainState, Metrics]:
            return trainer.step(state, frozen)

        state = trainer.init(key, params)
        if config.has_fixed_length:
            return Result(*jax.lax.scan(step, state, None, config.num_iterations))
        buffer = metrics_buffer(jax.eval_shape(step, state)[1], config.num_iterations)
        state, metrics, completed = run_iterations(
            step, state, buffer, config.num_iterations, AGENT_METRICS, config.total_timesteps
        )
        return Result(state, mark_padding(AGENT_METRICS, metrics, completed))

    return train


def make_trainer(
    config: Config | Mapping[str, Any],
    env: Env | None = None,
    model: Model | None = None,
    reward_fn: Callable | Reward | None = None,
) -> Trainer:
    """Training in pieces: ``init(key, params=None) -> state``, ``step(state, frozen=None)``.

    ``step`` returns ``(state, metrics)`` of one iteration of Algorithm 1 of the PPO paper. A
    ``reward_fn`` is a function ``(transitions, config, frozen) -> rewards [T, B]`` or a `Reward`;
    episode returns stay those of the environment, unless it measures ``episode_return``. To donate
    the state to a jitted ``step``, jit ``init`` too: outside jit, several leaves may share one
    buffer.
    """
    return build_trainer(set_up(config, env, model, reward_fn))


def build_trainer(setup: Setup, **hyperparameters: Any) -> Trainer:
    """The trainer of `make_trainer`; ``hyperparameters``, which may be traced, replace fields."""
    env = bound_actions(setup.env, setup.config.squash_actions)  # accepts any real vector
    reward_fn = setup.reward
    config = limit_num_steps_to_episode(setup.config.replace(**hyperparameters), env)
    model = with_temperature(setup.model, config.temperature)
    vector_env = _vectorize(env, config)
    rollout = _rollout_in_shards(config, env, vector_env, model)
    estimate_advantages = ADVANTAGES[config.estimator]
    update = UPDATES[config.algorithm](config, model, make_optimizer(config))

    def init(key: PRNGKey, params: PyTree = None) -> TrainState:
        key_params, key_env, key_run = jax.random.split(key, 3)
        env_state, obs = reset_shards(vector_env, key_env, config.num_shards)
        if params is None:
            start = Start(model.init(key_params, obs), _normalizer(config, env, obs))
        else:
            shapes = jax.eval_shape(model.init, key_params, obs)
            fresh = Start(shapes, _normalizer(config, env, obs))
            start = start_from(params, fresh, config, setup.env, setup.has_own_model)
        _require_value(config, start.params)
        state = TrainState(
            params=start.params,
            update=update.init(start.params),
            normalizer=start.normalizer,
            env=env_state,
            carry=model.initial_carry(config.num_envs),
            reward=reward_fn.init(config),
            key=key_run,
            iteration=jnp.zeros((), jnp.int32),
            timesteps=zero_timesteps(config),
        )
        return _with_batch_axes_of(state, (key, config))

    def step(state: TrainState, frozen: PyTree = None) -> tuple[TrainState, Metrics]:
        key_rollout, key_update, key_next = jax.random.split(state.key, 3)

        # Run policy π_old in B environments for T steps.
        transitions, env_state, carry, rollout_moments = rollout(
            key_rollout, state.params, state.normalizer.obs, state.env, state.carry
        )
        shaped = reward_fn.step(state.reward, transitions, config, frozen)
        reward, return_scale = _normalized_reward(config, state, transitions, shaped.reward)

        # Compute advantage estimates Â_1, …, Â_T.
        advantage, target = estimate_advantages(config, transitions, reward)

        # Optimise the surrogate with respect to θ (PPO: for K epochs of minibatches).
        batch = _batch(transitions, advantage, target, shaped.extras, state.carry)
        update_state = with_learning_rate(config, state.update, state.timesteps)
        params, update_state, measured = update.step(key_update, state.params, update_state, batch)

        iteration = state.iteration + 1
        next_state = TrainState(
            params=params,  # θ_old ← θ
            update=update_state,
            normalizer=Normalizer(
                _merged_moments(state.normalizer.obs, rollout_moments), return_scale
            ),
            env=env_state,
            carry=carry,
            reward=shaped.state,
            key=key_next,
            iteration=iteration,
            timesteps=timesteps_after(config, iteration, state.timesteps, batch.mask),
        )
        finished = _sum_over_shards(env_state.finished)
        metrics = iteration_metrics(
            next_state.timesteps, finished, batch, measured | shaped.metrics
        )
        return next_state, _printed(config, metrics)

    return Trainer(init, step)


# ------------------------------------------------------------------------------------------ parts


def _rollout_in_shards(config: Config, env: Env, vector_env: VectorEnv, model: Model) -> Rollout:
    rollout = make_rollout(env, vector_env, model, config.num_steps, config.whole_episodes)
    return in_shards(rollout, config.num_shards)


def _require_value(config: Config, params: PyTree) -> None:
    """Raise `ConfigError` if a value function is to be fitted and the model says it has none."""
    has_none = isinstance(params, dict) and not jax.tree.leaves(params.get("value", True))
    if config.fits_value and has_none and jax.tree.leaves(params):
        raise ConfigError(
            f"{config.algorithm} with advantage = {config.estimator!r} fits a value function, and "
            "the model has none: give it a critic, or set advantage to grpo or rloo"
        )


def _normalizer(config: Config, env: Env, obs: PyTree) -> Normalizer:
    space = env.observation_space
    return init_normalizer(obs, space, config.normalize_obs, config.normalize_reward)


def _vectorize(env: Env, config: Config) -> VectorEnv:
    """The environments of one shard.

    With several shards, an initial state is drawn for every environment at every step. Drawing only
    the needed ones takes a while loop, whose exit condition would synchronise the shards.
    """
    num_envs = config.num_envs // config.num_shards
    resets_per_pass = None if config.num_shards == 1 else num_envs
    return vectorize(env, num_envs, resets_per_pass, config.group_size)


def _normalized_reward(
    config: Config, state: TrainState, transitions: Transition, reward: Array
) -> tuple[Array, Any]:
    """The rewards, normalised if the config says so, and the new scale."""
    valid = transitions.valid if config.whole_episodes else None
    scale = state.normalizer.reward
    return normalize_reward(scale, reward, transitions.reset, config.gamma, valid)


def _merged_moments(moments: Any, rollout_moments: Any) -> Any:
    """The moments for the next rollout.

    They are merged only after the update, so that rollout and update see the same normalised
    observations and the probability ratios start at 1.
    """
    return None if rollout_moments is None else merge_obs(moments, rollout_moments)


def _sum_over_shards(finished: EpisodeSums) -> EpisodeSums:
    """The sums over the episodes that finished in any shard."""
    return jax.tree.map(lambda x: x.sum(dtype=x.dtype), finished)


def _printed(config: Config, metrics: Metrics) -> Metrics:
    """The metrics. With ``debug``, the compiled program prints a line of them."""
    if config.debug:
        jax.debug.callback(_print_line, metrics)
    return metrics


def _print_line(metrics: Metrics) -> None:
    metrics = jax.tree.map(np.asarray, metrics)  # a callback must not call JAX
    print(f"timesteps {metrics.timesteps}: episode return {metrics.episode_return}", flush=True)


def _batch(
    transitions: Transition,
    advantage: Array,
    target: Array,
    extras: dict[str, PyTree],
    carry: PyTree,
) -> Batch:
    # ``carry`` is that before step 0; with whole episodes ``reset[0]`` clears it.
    names = set(Batch._fields) & set(Transition._fields)
    shared = {name: getattr(transitions, name) for name in names}
    return Batch(**shared, advantage=advantage, target=target, carry=carry, extras=extras)


def _with_batch_axes_of(state: TrainState, sources: PyTree) -> TrainState:
    """The state, unchanged, but under `vmap` every leaf has the batch axes of ``sources``.

    Otherwise constants such as Adam's step count would have no batch axis if `init` and all steps
    are traced together (`make_train`), and would have one if the state passes from one jitted call
    to the next (`fit`). XLA would compile the two differently, with other bits.
    """
    condition = jnp.asarray(True)  # its value does not matter: both branches are the same
    for leaf in jax.tree.leaves(sources):
        leaf = jax.random.key_data(leaf) if isinstance(leaf, jax.Array) and is_typed(leaf) else leaf
        first = jnp.ravel(leaf)[0]
        condition &= first == first
    return jax.tree.map(lambda x: select(condition, x, x), jax.tree.map(jnp.asarray, state))
