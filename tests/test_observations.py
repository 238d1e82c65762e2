"""Observations with named parts: action masks, critic-only parts, and dicts in every function."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentences import sentence_of
from small_envs import masked_corridor

from purejaxppo import (
    Config,
    Policy,
    evaluate,
    fit,
    load_policy,
    make_train,
    save_policy,
    sweep,
)
from purejaxppo.networks.actor_critic import make_model
from purejaxppo.networks.distributions import Categorical, MultiCategorical
from purejaxppo.networks.heads import mask_logits
from purejaxppo.policies.render import play
from purejaxppo.types import Box, Dict, Discrete, MultiDiscrete

ENV = masked_corridor()
TINY = Config(
    num_envs=4,
    num_steps=8,
    num_minibatches=2,
    num_epochs=2,
    total_timesteps=96,
    hidden_sizes=(8,),
    normalize_obs=True,
)


# ---------------------------------------------------------------------------------------- masks


def masks(n, seed=0):
    """Masks of every kind: all actions allowed, one, or some."""
    random = np.random.default_rng(seed).random((6, n)) < 0.5
    random[:, 0] |= ~random.any(axis=1)
    one = np.eye(n, dtype=bool)
    return np.concatenate([np.ones((1, n), bool), one, random])


def test_a_forbidden_action_is_never_sampled_in_a_million_draws():
    mask = masks(5)
    logits = jnp.asarray(np.random.default_rng(1).normal(size=mask.shape) * 3, jnp.float32)
    distribution = Categorical(mask_logits(logits, jnp.asarray(mask)))
    draws = 1_000_000 // len(mask) + 1

    @jax.jit
    def counts(key):
        actions = jax.vmap(distribution.sample)(jax.random.split(key, draws))
        return jax.nn.one_hot(actions, 5, dtype=jnp.int32).sum(0)

    count = np.asarray(counts(jax.random.key(0)))
    assert count.sum() >= 1_000_000 and (count[~mask] == 0).all()
    expected = np.where(mask, np.exp(logits), 0)
    expected /= expected.sum(-1, keepdims=True)
    error = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(count / draws - expected) <= 5 * error).all()
    assert mask[np.arange(len(mask)), distribution.mode()].all()
    np.testing.assert_array_equal(np.exp(distribution.logits)[~mask], 0)


def reference(logits, mask):
    """NumPy's probabilities, over the allowed actions only."""
    p = np.where(mask, np.exp(logits - np.where(mask, logits, -np.inf).max()), 0)
    return p / p.sum()


@pytest.mark.usefixtures("x64")
def test_log_probability_entropy_and_divergence_are_those_of_the_allowed_actions():
    rng = np.random.default_rng(2)
    for mask in masks(4):
        x, y = rng.normal(size=(2, 4))
        p, q = reference(x, mask), reference(y, mask)
        allowed = np.flatnonzero(mask)
        one, other = (Categorical(mask_logits(jnp.asarray(z), jnp.asarray(mask))) for z in (x, y))
        for action in allowed:
            np.testing.assert_allclose(
                one.log_prob(jnp.asarray(action)), np.log(p[action]), rtol=1e-12
            )
        entropy = -(p[allowed] * np.log(p[allowed])).sum()
        kl = (p[allowed] * np.log(p[allowed] / q[allowed])).sum()
        np.testing.assert_allclose(one.entropy(), entropy, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(one.kl(other), kl, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("debug_nans", [False, True])
def test_the_gradient_of_a_forbidden_logit_is_0_and_nothing_is_nan(debug_nans):
    with jax.debug_nans(debug_nans):
        for mask in masks(4):
            allowed = int(np.flatnonzero(mask)[0])
            mask = jnp.asarray(mask)
            old = Categorical(mask_logits(jnp.asarray([0.3, -0.2, 0.1, 0.5]), mask))

            def total(logits, mask=mask, old=old, allowed=allowed):
                new = Categorical(mask_logits(logits, mask))
                return new.log_prob(jnp.asarray(allowed)) + 0.7 * new.entropy() - old.kl(new)

            for logits in (jnp.zeros(4), jnp.asarray([9.0, -30.0, 80.0, 0.0])):
                value, gradient = jax.value_and_grad(total)(logits)
                assert np.isfinite(value) and np.isfinite(gradient).all()
                np.testing.assert_array_equal(gradient[~mask], 0)
            if mask.sum() == 1:
                assert old.entropy() == 0 and old.log_prob(jnp.asarray(allowed)) == 0
                np.testing.assert_array_equal(gradient, 0)


def test_the_mask_of_several_integers_is_the_concatenation_of_their_masks():
    space = Dict({"x": Box((2,), -1, 1), "action_mask": Box((5,), 0, 1)})
    model = make_model(TINY, space, MultiDiscrete((2, 3)))
    obs = {"x": jnp.ones((1, 2)), "action_mask": jnp.asarray([[True, False, False, True, True]])}
    params = model.init(jax.random.key(0), obs)
    _, distribution, _ = model.step(params, (), obs, jnp.zeros(1, bool))
    assert isinstance(distribution, MultiCategorical)
    sampled = jax.vmap(distribution.sample)(jax.random.split(jax.random.key(1), 2000))[:, 0]
    assert set(map(tuple, np.asarray(sampled).tolist())) == {(0, 1), (0, 2)}


# --------------------------------------------------------------------- learning with a mask

LEARNERS = {
    "ppo": {},
    "trpo": {"num_minibatches": 4, "num_epochs": 5},
    "reinforce": {"num_minibatches": 1, "num_epochs": 1, "anneal_lr": False},
}


@pytest.mark.learning
@pytest.mark.parametrize("algorithm", LEARNERS)
def test_a_masked_environment_is_solved_and_no_forbidden_action_is_played(algorithm):
    """A forbidden action would end the episode with −10; the best return of the corridor is 1."""
    config = Config(
        algorithm=algorithm,
        num_envs=16,
        num_steps=12,
        total_timesteps=16 * 12 * 60,
        lr=0.01,
        hidden_sizes=(16,),
        **({"num_minibatches": 4, "num_epochs": 4} | LEARNERS[algorithm]),
    )
    train = jax.jit(jax.vmap(make_train(config, ENV)))
    result = train(jax.random.split(jax.random.key(3), 4))
    for seed in range(4):
        policy = Policy.from_state(config, result.state, seed, ENV)
        for deterministic in (True, False):
            played = evaluate(policy, ENV, jax.random.key(9), 64, deterministic)
            assert (played.returns > -1).all()
        assert played.returns.mean() > 0.9


# ------------------------------------------------------------------------ dicts in every function


@functools.cache
def trained():
    return fit(TINY, key=1, env=ENV, seeds=2)


def test_the_parts_of_an_observation_are_normalised_where_they_are_real_numbers():
    run = trained()
    moments = run.state.normalizer.obs
    assert set(moments) == {"position", "noise"}  # neither the mask nor the finite part
    steps = run.config.actual_timesteps
    np.testing.assert_array_equal(moments["position"].samples, [steps, steps])


def test_a_policy_with_named_parts_acts_saves_and_loads(tmp_path):
    policy = trained().policy(1)
    back = load_policy(save_policy(tmp_path / "policy", policy), ENV)
    assert back.observation_space == ENV.observation_space == policy.observation_space
    keys = jax.random.split(jax.random.key(4), 6)
    _, obs = jax.vmap(ENV.reset)(keys)
    np.testing.assert_array_equal(back.act(obs), policy.act(obs))
    reshaped = jax.tree.map(lambda x: x.reshape((2, 3, *x.shape[1:])), obs)
    np.testing.assert_array_equal(back.act(reshaped).ravel(), policy.act(obs))
    one = jax.tree.map(lambda x: x[0], obs)
    assert back.act(one) == policy.act(obs)[0]
    description = json.loads((tmp_path / "policy" / "policy.json").read_text())
    assert description["observation_space"]["kind"] == "dict"
    message = sentence_of(lambda: policy.act({"position": 1}))
    assert message.startswith("an observation is a dict of action_mask, goal, noise, position")
    message = sentence_of(lambda: policy.act(obs | {"position": obs["position"][:3]}))
    assert message.startswith("the parts of the observation have other batch axes")


def test_a_run_with_named_parts_is_resumed_bit_for_bit(tmp_path):
    def stop(now):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(TINY, key=1, env=ENV, seeds=2, directory=tmp_path / "run", on_progress=stop)
    run = fit(TINY, key=1, env=ENV, seeds=2, directory=tmp_path / "run", resume=True)
    leaves = zip(*(jax.tree.leaves(x.state.params) for x in (run, trained())), strict=True)
    for got, expected in leaves:
        np.testing.assert_array_equal(got, expected)


def test_a_sweep_with_named_parts_has_its_policies():
    result = sweep(TINY, 2, {"lr": [1e-3, 1e-2]}, key=1, env=ENV, eval_episodes=4)
    _, obs = ENV.reset(jax.random.key(0))
    assert bool(obs["action_mask"][result.policy(3).act(obs)])


def test_an_episode_with_named_parts_is_played_step_by_step_for_an_animation():
    states, rewards = play(trained().policy(0), ENV, 0, 12)
    assert 2 <= len(states) == len(rewards) <= 13 and min(rewards) > -1


def test_only_the_values_depend_on_critic_obs():
    config = TINY.replace(critic_obs="noise")
    model = make_model(config, ENV.observation_space, ENV.action_space)
    _, obs = jax.vmap(ENV.reset)(jax.random.split(jax.random.key(0), 3))
    params = model.init(jax.random.key(1), obs)
    other = obs | {"noise": obs["noise"] + 1}
    none = jnp.zeros(3, bool)
    (_, policy, value), (_, changed, other_value) = (
        model.step(params, (), x, none) for x in (obs, other)
    )
    np.testing.assert_array_equal(policy.logits, changed.logits)
    assert (value != other_value).all()
    assert np.isfinite(
        jax.jit(make_train(config, ENV))(jax.random.key(0)).metrics.policy_loss
    ).all()


# ------------------------------------------------------------------------------------- bad input


def test_spaces_of_parts_are_named_spaces():
    for wrong in ({}, {"a": 3}, {1: Discrete(2)}, 7, [Discrete(2)]):
        assert "it must map at least one name to" in sentence_of(lambda wrong=wrong: Dict(wrong))
    one = Dict({"b": Discrete(2), "a": Box((2,), 0, 1)})
    assert one == Dict({"a": Box((2,), [0, 0], 1), "b": Discrete(2)}) and hash(one)


def with_space(**parts):
    return ENV._replace(observation_space=Dict(dict(ENV.observation_space.spaces) | parts))


def without(name):
    parts = {part: x for part, x in ENV.observation_space.spaces if part != name}
    return ENV._replace(observation_space=Dict(parts))


def all_forbidden():
    def reset(key):
        state, obs = ENV.reset(key)
        return state, obs | {"action_mask": jnp.zeros(3, bool)}

    return ENV._replace(reset=reset)


BAD = {
    "a mask that allows nothing": (
        TINY,
        all_forbidden,
        "the action_mask of corridor allows no action at the start of an episode",
    ),
    "a mask of another shape": (
        TINY,
        lambda: with_space(action_mask=Box((4,), 0, 1)),
        "the action_mask of corridor has the shape (4,), and its actions are Discrete(n=3), "
        "which need the shape (3,)",
    ),
    "a mask for continuous actions": (
        TINY,
        lambda: ENV._replace(action_space=Box((3,), -1, 1)),
        "the action_mask of corridor has the shape (3,), and its actions are Box(shape=(3,), "
        "low=-1.0, high=1.0), which have no mask",
    ),
    "an unknown part": (
        TINY,
        lambda: without("goal"),
        "reset of corridor returns a dict of action_mask, goal, noise, position as obs: it must be "
        "a dict of action_mask, noise, position",
    ),
    "a part of another shape": (
        TINY,
        lambda: with_space(position=Box((2,), 0, 9)),
        "reset of corridor returns an obs['position'] of the shape (1,): it must have that of its "
        "observation_space, (2,)",
    ),
    "critic_obs that is no part": (
        TINY.replace(critic_obs="nois"),
        lambda: ENV,
        "critic_obs = 'nois': for the observations of corridor it must be one of action_mask, "
        "goal, noise, position",
    ),
    "critic_obs with a shared trunk": (
        TINY.replace(critic_obs="noise", shared_trunk=True),
        lambda: ENV,
        "critic_obs is for the value function only, and with a shared trunk the policy would see "
        "it: set shared_trunk=False",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_observations_and_settings_are_refused_in_one_sentence(case):
    config, make, message = BAD[case]
    assert sentence_of(lambda: make_train(config, make())) == message
