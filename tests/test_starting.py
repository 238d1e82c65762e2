"""A run that starts from a trained policy plays like that policy, including its normaliser."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentences import sentence_of
from small_envs import MULTI, counter, linear_model

from purejaxppo import (
    Config,
    Policy,
    fit,
    load_policy,
    make_train,
    make_trainer,
    save_policy,
)
from purejaxppo.normalize import Moments, Normalizer, ReturnScale, no_moments
from purejaxppo.runs.evaluation import Best
from purejaxppo.types import Box, Discrete, Env, Step

TINY = Config(
    num_envs=2, num_steps=8, num_minibatches=1, num_epochs=1, total_timesteps=16, hidden_sizes=(4,)
)
NORMALISED = TINY.replace(normalize_obs=True)
MOMENTS = Moments(jnp.asarray(50.0), jnp.asarray([150.0]), jnp.asarray([5000.0]))  # 150 ± 10
KEY = jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def sides(low=-np.inf, name="sides") -> Env:
    """Observation 140 requires action 0, and 160 action 1: telling them apart needs the mean."""

    def observe(key):
        side = jax.random.bernoulli(key).astype(jnp.int32)
        return side, 140.0 + 20.0 * side[None]

    def reset(key):
        side, obs = observe(key)
        return (side, jnp.int32(0)), obs

    def step(key, state, action):
        side, obs = observe(key)
        t = state[1] + 1
        return Step(
            state=(side, t),
            obs=obs,
            reward=1.0 * (action == state[0]),
            terminated=jnp.asarray(False),
            truncated=t >= 4,
        )

    return Env(
        name=name,
        reset=reset,
        step=step,
        observation_space=Box((1,), low, np.inf),
        action_space=Discrete(2),
        max_episode_steps=4,
        truncates=True,
    )


ENV = sides()
MODEL = linear_model(actions=2)
RIGHT = {
    # The input of the policy is an observation in standard deviations.
    "policy": {"w": jnp.asarray([[-50.0, 50.0]]), "b": jnp.zeros(2)},
    "value": {"w": jnp.zeros(1), "b": jnp.zeros(())},
}


@pytest.fixture(scope="module")
def policy():
    """A policy that is always right, with the moments of its observations."""
    return Policy(
        config=NORMALISED,
        params=RIGHT,
        obs_moments=MOMENTS,
        model=MODEL,
        observation_space=ENV.observation_space,
        action_space=ENV.action_space,
    )


def state_of(config, policy, reward=None):
    """The parts of a training state that a run starts from."""
    state = jax.eval_shape(make_trainer(config, ENV, MODEL).init, KEY)
    normalizer = Normalizer(policy.obs_moments, reward)
    return state._replace(params=policy.params, normalizer=normalizer, iteration=jnp.int32(7))


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# ------------------------------------------------------------------------ parameters and normaliser


def test_the_first_rollout_is_that_of_the_policy(policy):
    """All seeds start from it."""
    run = fit(NORMALISED, seeds=2, env=ENV, model=MODEL, params=policy)
    np.testing.assert_array_equal(run.metrics.episode_return, [[4.0], [4.0]])
    assert run.state.normalizer.obs.samples.tolist() == [50 + 16] * 2


def test_a_saved_policy_can_be_trained_further(policy, tmp_path):
    """Without its moments every observation is clipped to 10, and the policy is right by chance."""
    loaded = load_policy(save_policy(tmp_path / "policy", policy), model=MODEL)
    train = jax.jit(make_train(NORMALISED, ENV, MODEL))
    assert train(KEY, loaded).metrics.episode_return.tolist() == [4.0]
    assert (
        train(
            KEY, dataclasses.replace(loaded, obs_moments=no_moments((1,)))
        ).metrics.episode_return[0]
        < 3.5
    )


def test_a_policy_a_state_and_the_best_so_far_supply_parameters_and_moments(policy):
    init = make_trainer(NORMALISED, ENV, MODEL).init
    best = Best(RIGHT, Normalizer(MOMENTS, None), jnp.int32(3), jnp.float32(4))
    for given in (policy, state_of(NORMALISED, policy), best):
        state = init(KEY, given)
        assert_equal((state.params, state.normalizer.obs), (RIGHT, MOMENTS))
        assert (state.iteration, state.timesteps) == (0, 0)
    state = init(KEY, RIGHT)
    assert_equal(state.params, RIGHT)
    assert state.normalizer.obs.samples == 0


def test_a_state_supplies_the_scale_of_its_returns_for_fresh_episodes(policy):
    """The value function has the units of the scaled returns."""
    config = NORMALISED.replace(normalize_reward=True)
    moments = Moments(jnp.asarray(9.0), jnp.asarray(2.0), jnp.asarray(36.0))
    init = make_trainer(config, ENV, MODEL).init
    state = init(KEY, state_of(config, policy, ReturnScale(jnp.full(2, 5.0), moments)))
    assert_equal(state.normalizer, Normalizer(MOMENTS, ReturnScale(jnp.zeros(2), moments)))
    for given in (policy, state_of(config, policy)):
        assert init(KEY, given).normalizer.reward.moments.samples == 0


def test_moments_are_converted_to_the_precision_of_the_run(policy):
    with jax.enable_x64(True):
        wide = jax.eval_shape(make_trainer(NORMALISED, ENV, MODEL).init, KEY, policy)
    assert wide.normalizer.obs.mean.dtype == np.float64


def test_starting_vmaps_over_seeds_from_one_policy_and_over_states(policy):
    train = make_train(NORMALISED, ENV, MODEL)
    keys = jax.random.split(KEY, 3)
    shapes = jax.eval_shape(jax.vmap(train, in_axes=(0, None)), keys, policy)
    again = jax.eval_shape(jax.vmap(train), keys, shapes.state)
    assert shapes.metrics.timesteps.shape == again.metrics.timesteps.shape == (3, 1)


# --------------------------------------------------------------------------------------- refusals


def test_a_normaliser_on_one_side_only_is_refused(policy):
    """After the first rollout at the latest, the policy would see observations of another scale."""
    without = dataclasses.replace(policy, config=TINY, obs_moments=None)
    for given, config, had, instead in (
        (policy, TINY, "with", True),
        (without, NORMALISED, "without", False),
    ):
        for source in (given, state_of(config, given)):
            init = make_trainer(config, ENV, MODEL).init
            assert sentence_of(
                lambda source=source, init=init: jax.eval_shape(lambda key: init(key, source), KEY)
            ) == (
                f"the policy to start from was trained {had} normalised observations: "
                f"set normalize_obs={instead}, or give its parameters alone, "
                "for which normalisation starts anew"
            )


@pytest.mark.parametrize(
    ("env", "change", "message"),
    [
        (
            sides(),
            {"activation": "relu"},
            "has activation = 'relu', and this configuration has 'tanh'",
        ),
        (
            sides(),
            {"hidden_sizes": (5,)},
            "has hidden_sizes = (5,), and this configuration has (4,)",
        ),
        (
            sides(),
            {"shared_trunk": True},
            "has shared_trunk = True, and this configuration has False",
        ),
        (
            sides(),
            {"squash_actions": True},
            "has squash_actions = True, and this configuration has False",
        ),
        (
            sides()._replace(action_space=Discrete(3)),
            {},
            "was trained in CartPole-v1, whose actions are Discrete(n=3), "
            "and those of sides are Discrete(n=2)",
        ),
        (
            sides()._replace(observation_space=Discrete(1)),
            {},
            "was trained in CartPole-v1, whose observations are Discrete(n=1), "
            "and those of sides are Box(shape=(1,), low=-inf, high=inf)",
        ),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(env, change, message):
    config = TINY.replace(**change)
    trainer = make_trainer(config, ENV)  # the config is valid
    shapes = jax.eval_shape(trainer.init, KEY)
    before = Policy.from_state(config, shapes._replace(iteration=np.zeros(())), env=sides())
    before = dataclasses.replace(
        before,
        config=config,
        observation_space=env.observation_space,
        action_space=env.action_space,
    )
    init = make_trainer(TINY, ENV).init
    error = sentence_of(lambda: jax.eval_shape(lambda key: init(key, before), KEY))
    assert error == f"the policy to start from {message}"


def test_other_bounds_and_another_name_are_accepted(policy):
    other = sides(low=0.0, name="other")
    state = jax.eval_shape(make_trainer(NORMALISED, other, MODEL).init, KEY, policy)
    assert state.params["policy"]["w"].shape == (1, 2)


@pytest.mark.parametrize(
    "given", [3, "policy", {"policy": jnp.ones(3)}, linear_model(), {}, jnp.ones(3)]
)
def test_anything_but_parameters_of_the_model_is_refused(given, tmp_path):
    error = sentence_of(
        lambda: fit(TINY, env=ENV, model=MODEL, params=given, directory=tmp_path / "run")
    )
    assert error.startswith("params do not fit the model: ")
    assert any(name in error for name in ("'policy/w'", "'policy/b'"))
    assert not (tmp_path / "run").exists()


def test_a_state_of_several_agents_is_refused(policy):
    agents = jax.tree.map(
        lambda x: jnp.stack([x, x, x]), Best(RIGHT, policy.normalizer, jnp.int32(3), jnp.float32(4))
    )
    assert sentence_of(lambda: fit(NORMALISED, env=ENV, model=MODEL, params=agents)) == (
        "this state holds 3 agents: start from one, Policy.from_state(config, state, index)"
    )


def test_a_policy_for_actions_of_another_kind_is_refused():
    before = Policy.from_state(
        TINY,
        jax.eval_shape(make_trainer(TINY, counter()).init, KEY)._replace(iteration=0),
        env=counter(),
    )
    error = sentence_of(lambda: fit(TINY, env=counter(MULTI), params=before))
    assert error.startswith(
        "the policy to start from was trained in counter, whose observations are Box(shape=(3,)"
    )
