"""`set_up`: a validated configuration with the environment, model and rewards of its run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

import purejaxppo.envs as envs
from purejaxppo.config import Config, require_scalars, validate
from purejaxppo.envs.consistency import require_allowed_actions, require_consistent
from purejaxppo.envs.wrappers import bound_actions, warn_of_unreachable_actions
from purejaxppo.networks.actor_critic import make_model
from purejaxppo.types import (
    Box,
    ConfigError,
    Dict,
    Env,
    Model,
    PyTree,
    Reward,
    Rewards,
    Transition,
)


class Setup(NamedTuple):
    """A validated configuration with the environment, the model and the rewards of its run."""

    config: Config  # validated; ``env`` and ``env_settings`` are those of the environment
    env: Env
    model: Model
    reward: Reward
    has_own_model: bool  # the model was given by the caller, not made from the config
    has_own_reward: bool

    @property
    def own_model(self) -> Model | None:
        """The given model; None if the config names it."""
        return self.model if self.has_own_model else None


def set_up(
    config: Config | Mapping[str, Any] | Setup,
    env: Env | None = None,
    model: Model | None = None,
    reward_fn: Callable | Reward | None = None,
) -> Setup:
    """Validate a configuration, and make or check the parts of its run.

    The arguments and errors are those of `make_trainer`. A `Setup` is returned unchanged, and
    contains the other arguments already. Later steps of a run use the result, so that nothing is
    validated or looked up twice.
    """
    if isinstance(config, Setup):
        if not (env is model is reward_fn is None):
            raise ConfigError("env, model and reward_fn are arguments of set_up: pass them there")
        return config
    config = validate(config) if isinstance(config, Config) else Config.from_dict(config)
    require_scalars(config)
    env = envs.of_config(config) if env is None else env
    config = dataclasses.replace(config, env=env.name, env_settings=env.settings)
    _require_supported_env(config, env)
    action_space = bound_actions(env, config.squash_actions).action_space
    has_own_model = model is not None
    if model is None:
        warn_of_unreachable_actions(env, config.squash_actions)
        model = make_model(config, env.observation_space, action_space)
    _require_enough_sequences(config, env, model)
    return Setup(
        config=config,
        env=env,
        model=model,
        reward=_reward(reward_fn),
        has_own_model=has_own_model,
        has_own_reward=reward_fn is not None,
    )


def _reward(reward_fn: Callable | Reward | None) -> Reward:
    """The `Reward` of a plain function, or of None: the rewards of the environment."""
    if isinstance(reward_fn, Reward):
        return reward_fn

    def step(state: PyTree, transitions: Transition, config: Config, frozen: PyTree) -> Rewards:
        own = transitions.reward if reward_fn is None else reward_fn(transitions, config, frozen)
        return Rewards(own, state, metrics={}, extras={})

    return Reward(lambda config: (), step)


def _require_supported_env(config: Config, env: Env) -> None:
    """Raise `ConfigError` for an inconsistent environment, or one that the config does not fit."""
    require_consistent(env)
    require_allowed_actions(env)
    parts = dict(env.observation_space.spaces) if isinstance(env.observation_space, Dict) else {}
    if config.critic_obs and config.critic_obs not in parts:
        known = f"one of {', '.join(parts)}" if parts else "empty: they have no named parts"
        raise ConfigError(
            f"critic_obs = {config.critic_obs!r}: "
            f"for the observations of {env.name} it must be {known}"
        )
    if config.whole_episodes:
        _require_whole_episodes(config, env)
    temperature = config.temperature
    is_traced = isinstance(temperature, jax.core.Tracer)
    if isinstance(env.action_space, Box) and not is_traced and temperature != 1:
        raise ConfigError(
            f"temperature = {temperature} divides the logits of discrete actions, and those of "
            f"{env.name} are continuous: leave it out"
        )


def _require_enough_sequences(config: Config, env: Env, model: Model) -> None:
    """Raise `ConfigError` if the sequences of a batch cannot be divided into the minibatches.

    A model with memory learns from ``num_envs`` sequences, one without memory from single steps.
    """
    config = limit_num_steps_to_episode(config, env)
    has_memory = bool(jax.tree.leaves(jax.eval_shape(lambda: model.initial_carry(config.num_envs))))
    sequences = (config.num_envs if has_memory else config.batch_size) // config.num_shards
    if config.loss_reduction != "token" and not has_memory:
        raise ConfigError(
            f"loss_reduction = {config.loss_reduction!r} needs minibatches of whole sequences, and "
            "a model without memory learns from single steps: set loss_reduction='token'"
        )
    if sequences % config.num_minibatches:  # without memory this was checked before
        raise ConfigError(
            f"num_minibatches = {config.num_minibatches} does not divide "
            f"num_envs = {config.num_envs}{_each_shard(config)}: "
            "a model with memory learns from whole sequences"
        )
    if config.fisher_subsample > sequences:
        in_each = " in each shard" if config.num_shards > 1 else ""
        raise ConfigError(
            f"fisher_subsample = {config.fisher_subsample}: "
            f"there are only {sequences} samples{in_each}"
        )


def limit_num_steps_to_episode(config: Config, env: Env) -> Config:
    """With whole episodes ``num_steps`` becomes ``env.max_episode_steps``; no episode is longer."""
    return config.replace(num_steps=env.max_episode_steps) if config.whole_episodes else config


def _require_whole_episodes(config: Config, env: Env) -> None:
    """Raise `ConfigError` if a rollout cannot hold whole episodes of the environment."""
    bound = env.max_episode_steps
    if bound is None:
        raise ConfigError(
            f"{env.name} has no bound on the length of an episode, "
            "so a rollout may not contain whole episodes"
        )
    if config.num_steps < bound:
        instead = (
            "advantage='gae', which bootstraps from the value function and is no longer unbiased"
            if config.estimator == "returns"
            else "episodic=False"
        )
        raise ConfigError(
            f"num_steps = {config.num_steps}: {config.algorithm} plays whole episodes, "
            f"and those of {env.name} take up to {bound} steps: "
            f"set num_steps={bound}, or {instead}"
        )
    if (config.num_envs * bound) % (config.num_minibatches * config.num_shards):
        raise ConfigError(
            f"num_minibatches = {config.num_minibatches} does not divide "
            f"num_envs * {bound}{_each_shard(config)}: "
            f"with whole episodes, num_steps is the maximum length of an episode of {env.name}"
        )


def _each_shard(config: Config) -> str:
    return f" / num_shards = {config.num_shards}" if config.num_shards > 1 else ""
