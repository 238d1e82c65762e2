"""`make_train`: a whole training run as one pure function of a key."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import purejaxppo.envs as envs
from purejaxppo.advantages import ADVANTAGES
from purejaxppo.config import Config, require_scalars, validate
from purejaxppo.envs.consistency import require_allowed_actions, require_consistent
from purejaxppo.envs.vector import vectorize
from purejaxppo.envs.wrappers import bound_actions, warn_of_unreachable_actions
from purejaxppo.iterations import metrics_buffer, run_iterations, timesteps_after, zero_timesteps
from purejaxppo.keys import is_typed, select
from purejaxppo.metrics import iteration_metrics
from purejaxppo.networks.actor_critic import make_model
from purejaxppo.normalize import Normalizer, init_normalizer, merge_obs, normalize_reward
from purejaxppo.rollout import Rollout, in_shards, make_rollout, reset_shards
from purejaxppo.starting import Start, start_from
from purejaxppo.types import (
    Batch,
    ConfigError,
    Dict,
    Env,
    EpisodeSums,
    Metrics,
    Model,
    PRNGKey,
    PyTree,
    Result,
    Reward,
    Rewards,
    Trainer,
    TrainState,
    Transition,
    VectorEnv,
    VectorState,
)
from purejaxppo.updates import UPDATES


def make_train(
    config: Config | Mapping[str, Any],
    env: Env | None = None,
    model: Model | None = None,
    reward_fn: Callable | Reward | None = None,
) -> Callable[..., Result]:
    """``train(key, params=None, frozen=None) -> Result(state, metrics)``: pure, for jit and vmap.

    ``config`` is a `Config` or a mapping, whose keys may be PureJaxRL's upper-case ones. ``env`` and
    ``model`` replace those that the config names. ``reward_fn`` computes the rewards (see
    `make_trainer`) and receives ``frozen``, such as a reference model. Raises `ConfigError` for an
    invalid or unsupported configuration.

    ``params`` is the starting point of the run: a `Policy` or a `TrainState` with its normaliser, or
    parameters alone, for which normalisation starts empty.

    The run is a scan over ``num_iterations`` iterations, which can be differentiated in both modes.
    With whole episodes and without ``total_episodes`` it stops after ``total_timesteps`` valid
    steps instead. Metrics are then padded to ⌈total_timesteps / num_envs⌉ iterations, padding rows
    report zero episodes, and there is no reverse-mode derivative. TRPO has none either, because its
    line search is a loop of unknown length.
    """
    trainer = make_trainer(config, env, model, reward_fn)
    config = _checked_config(config)

    def train(key: PRNGKey, params: PyTree = None, frozen: PyTree = None) -> Result:
        def step(state: TrainState, _: None = None) -> tuple[TrainState, Metrics]:
            return trainer.step(state, frozen)

        state = trainer.init(key, params)
        if config.has_fixed_length:
            return Result(*jax.lax.scan(step, state, None, config.num_iterations))
        buffer = metrics_buffer(jax.eval_shape(step, state)[1], config.num_iterations)
        return Result(*run_iterations(config, step, state, buffer, config.num_iterations))

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
    episode returns stay those of the environment. Jit ``init`` too, or no state can be donated.
    """
    config = _checked_config(config)
    given_env = envs.of_config(config) if env is None else env
    own_model = model is not None
    env, model = resolve(config, given_env, model)
    config = _limit_num_steps_to_episode(config, env)
    _require_enough_sequences(config, model)
    vector_env = _vectorize(env, config)
    rollout = _rollout_in_shards(config, env, vector_env, model)
    estimate_advantages = ADVANTAGES[config.estimator]
    update = UPDATES[config.algorithm](config, model, make_optimizer(config))
    reward = _reward(reward_fn)

    def init(key: PRNGKey, params: PyTree = None) -> TrainState:
        key_params, key_env, key_run = jax.random.split(key, 3)
        env_state, obs = reset_shards(vector_env, key_env, config.num_shards)
        if params is None:
            start = Start(model.init(key_params, obs), _normalizer(config, env, obs))
        else:
            shapes = jax.eval_shape(model.init, key_params, obs)
            fresh = Start(shapes, _normalizer(config, env, obs))
            start = start_from(params, fresh, config, given_env, own_model)
        state = TrainState(
            params=start.params,
            update=update.init(start.params),
            normalizer=start.normalizer,
            env=env_state,
            carry=model.initial_carry(config.num_envs),
            reward=reward.init(config),
            key=key_run,
            iteration=jnp.zeros((), jnp.int32),
            timesteps=zero_timesteps(config),
        )
        return _with_batch_axes_of(state, (key, config))

    def step(state: TrainState, frozen: PyTree = None) -> tuple[TrainState, Metrics]:
        key_rollout, key_update, key_next = jax.random.split(state.key, 3)

        # Run policy π_old in the environments for T steps.
        transitions, env_state, carry, rollout_moments = rollout(
            key_rollout, state.params, state.normalizer.obs, state.env, state.carry
        )
        rewards = reward.step(state.reward, transitions, config, frozen)
        scaled_reward, reward_scale = _normalized(config, state, transitions, rewards.reward)

        # Compute advantage estimates Â_1, …, Â_T.
        advantage, target = estimate_advantages(config, transitions, scaled_reward)

        # Optimise the surrogate with respect to θ, for K epochs of minibatches.
        batch = _batch(transitions, advantage, target, rewards.extras, state.carry)
        update_state = _with_learning_rate(config, state.update, state.timesteps)
        params, update_state, measured = update.step(key_update, state.params, update_state, batch)

        state = TrainState(
            params=params,
            update=update_state,
            normalizer=Normalizer(_merged(state.normalizer.obs, rollout_moments), reward_scale),
            env=env_state,
            carry=carry,
            reward=rewards.state,
            key=key_next,
            iteration=state.iteration + 1,
            timesteps=timesteps_after(config, state.iteration + 1, state.timesteps, batch.mask),
        )
        finished = finished_in_all_shards(env_state)
        metrics = iteration_metrics(state.timesteps, finished, batch, measured | rewards.metrics)
        return state, _printed(config, metrics)

    return Trainer(init, step)


# ------------------------------------------------------------------------------------------ parts


def resolve(
    config: Config, env: Env | None = None, model: Model | None = None
) -> tuple[Env, Model]:
    """The environment with bounded actions, and the model; those of the config where none is given."""
    env = envs.of_config(config) if env is None else env
    require_consistent(env)
    require_allowed_actions(env)
    parts = dict(env.observation_space.spaces) if isinstance(env.observation_space, Dict) else {}
    if config.critic_obs and config.critic_obs not in parts:
        known = f"one of {', '.join(parts)}" if parts else "empty: they have no named parts"
        raise ConfigError(
            f"critic_obs = {config.critic_obs!r}: for the observations of {env.name} it must be {known}"
        )
    if model is None:
        warn_of_unreachable_actions(env, config.squash_actions)
    env = bound_actions(env, config.squash_actions)
    if model is None:
        model = make_model(config, env.observation_space, env.action_space)
    return env, model


def _rollout_in_shards(config: Config, env: Env, vector_env: VectorEnv, model: Model) -> Rollout:
    rollout = make_rollout(env, vector_env, model, config.num_steps, config.whole_episodes)
    return in_shards(rollout, config.num_shards)


def _normalizer(config: Config, env: Env, obs: PyTree) -> Normalizer:
    space = env.observation_space
    return init_normalizer(obs, space, config.normalize_obs, config.normalize_reward)


def _vectorize(env: Env, config: Config) -> VectorEnv:
    """The environments of one shard.

    Several shards restart without a loop, because they would have to agree on its end.
    """
    num_envs = config.num_envs // config.num_shards
    at_once = None if config.num_shards == 1 else num_envs
    return vectorize(env, num_envs, at_once, config.group_size)


def _normalized(
    config: Config, state: TrainState, transitions: Transition, reward: Array
) -> tuple[Array, Any]:
    """The rewards as the config has them normalised, and the new scale."""
    valid = transitions.valid if config.whole_episodes else None
    scale = state.normalizer.reward
    return normalize_reward(
        scale, reward, transitions.reset, config.gamma, valid, config.num_shards
    )


def _merged(moments: Any, rollout_moments: Any) -> Any:
    """The moments with which the next rollout normalises.

    This rollout's are merged after its update only, or the ratios of the update would not begin at 1.
    """
    return None if rollout_moments is None else merge_obs(moments, rollout_moments)


def finished_in_all_shards(env_state: VectorState) -> EpisodeSums:
    """The sums over the episodes that finished in the rollout."""
    return jax.tree.map(lambda x: x.sum(dtype=x.dtype), env_state.finished)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam after clipping the global norm of the gradient.

    With ``anneal_lr`` the learning rate in iteration k = 0, 1, … is `annealed_lr` of k / K, where K
    is the number of iterations. Without a fixed length it is `annealed_lr` of the share of
    ``total_timesteps`` that came before, which `make_trainer` writes into the optimiser's state.
    """
    steps_per_iteration = config.num_epochs * config.num_minibatches

    def schedule(count: Array) -> Array:
        return annealed_lr(config, count // steps_per_iteration, config.num_iterations)

    if not config.anneal_lr:
        adam = optax.adam(config.lr, eps=config.adam_eps)
    elif config.has_fixed_length:
        adam = optax.adam(schedule, eps=config.adam_eps)
    else:
        others = ("b1", "b2", "eps", "eps_root")
        adam = optax.inject_hyperparams(optax.adam, others)(config.lr, eps=config.adam_eps)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adam)


def annealed_lr(config: Config, done: Array, total: int) -> Float[Array, ""]:
    """lr · max(0, 1 − done / total), in the working precision."""
    progress = done.astype(jnp.result_type(float)) / total
    return config.lr * jnp.maximum(0.0, 1 - progress)


def _with_learning_rate(config: Config, update_state: PyTree, timesteps: Array) -> PyTree:
    """The state of the update with the annealed learning rate, if the optimiser cannot know it."""
    if config.has_fixed_length or not config.anneal_lr:
        return update_state
    if not optax.tree.get_all_with_path(update_state, "learning_rate"):
        return update_state  # of an algorithm without the optimiser
    lr = annealed_lr(config, timesteps, config.total_timesteps)
    return optax.tree.set(update_state, learning_rate=lr)


def _checked_config(config: Config | Mapping[str, Any]) -> Config:
    config = validate(config) if isinstance(config, Config) else Config.from_dict(config)
    require_scalars(config)
    return config


def _require_enough_sequences(config: Config, model: Model) -> None:
    """A model with memory learns from whole sequences, of which there are ``num_envs``; one without from steps."""
    has_memory = jax.tree.leaves(jax.eval_shape(lambda: model.initial_carry(config.num_envs)))
    sequences = (config.num_envs if has_memory else config.batch_size) // config.num_shards
    if sequences % config.num_minibatches:
        raise ConfigError(
            f"num_minibatches = {config.num_minibatches} does not divide num_envs = {config.num_envs}"
            f"{_each_shard(config)}: a model with memory learns from whole sequences"
        )
    if config.fisher_subsample > sequences:
        of_each = " in each shard" if config.num_shards > 1 else ""
        raise ConfigError(
            f"fisher_subsample = {config.fisher_subsample}: there are only {sequences} samples{of_each}"
        )


def _limit_num_steps_to_episode(config: Config, env: Env) -> Config:
    """With whole episodes no more steps than an episode can have, none of which would be valid."""
    if not config.whole_episodes:
        return config
    bound = env.max_episode_steps
    if bound is None:
        raise ConfigError(
            f"{env.name} has no bound on the length of an episode, so no rollout holds whole ones"
        )
    if config.num_steps < bound:
        instead = (
            "advantage='gae', which bootstraps from the value function and is no longer unbiased"
            if config.estimator == "returns"
            else "episodic=False"
        )
        raise ConfigError(
            f"num_steps = {config.num_steps}: {config.algorithm} plays whole episodes, and those of {env.name} take up "
            f"to {bound} steps: set num_steps={bound}, or {instead}"
        )
    if (config.num_envs * bound) % (config.num_minibatches * config.num_shards):
        raise ConfigError(
            f"num_minibatches = {config.num_minibatches} does not divide num_envs * {bound}{_each_shard(config)}: "
            f"of whole episodes of {env.name} no more than {bound} steps are played"
        )
    return config.replace(num_steps=bound)


def _each_shard(config: Config) -> str:
    return f" / num_shards = {config.num_shards}" if config.num_shards > 1 else ""


def _printed(config: Config, metrics: Metrics) -> Metrics:
    """The metrics; with ``debug`` a line of them is printed from inside the compiled program."""
    if config.debug:
        jax.debug.callback(_print_line, metrics)
    return metrics


def _print_line(metrics: Metrics) -> None:
    metrics = jax.tree.map(np.asarray, metrics)  # no operation of JAX within a callback
    print(f"timesteps {metrics.timesteps}: episode return {metrics.episode_return}", flush=True)


def _batch(
    transitions: Transition,
    advantage: Array,
    target: Array,
    extras: dict[str, PyTree],
    carry: PyTree,
) -> Batch:
    names = set(Batch._fields) & set(Transition._fields)
    shared = {name: getattr(transitions, name) for name in names}
    return Batch(**shared, advantage=advantage, target=target, carry=carry, extras=extras)


def _reward(reward_fn: Callable | Reward | None) -> Reward:
    """A plain function, or none, as a `Reward` without memory."""
    if isinstance(reward_fn, Reward):
        return reward_fn

    def step(state: PyTree, transitions: Transition, config: Config, frozen: PyTree) -> Rewards:
        own = transitions.reward if reward_fn is None else reward_fn(transitions, config, frozen)
        return Rewards(own, state, metrics={}, extras={})

    return Reward(lambda config: (), step)


def _with_batch_axes_of(state: TrainState, sources: PyTree) -> TrainState:
    """The same state, each leaf of which depends on every source, so that `vmap` batches them all.

    Otherwise a leaf such as Adam's count is unbatched in the one-shot program and batched between chunks, XLA makes
    two different programs of one step, and chunks no longer equal the one-shot run bit for bit.
    """
    always = jnp.asarray(True)
    for leaf in jax.tree.leaves(sources):
        leaf = jax.random.key_data(leaf) if isinstance(leaf, jax.Array) and is_typed(leaf) else leaf
        first = jnp.ravel(leaf)[0]
        always &= first == first
    return jax.tree.map(lambda x: select(always, x, x), jax.tree.map(jnp.asarray, state))
