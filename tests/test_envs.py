"""Environments by name: every one of gymnax trains, and one that cannot says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import FAST_COMPILE
from small_envs import counter

from purejaxppo import Config, ConfigError, envs, make_train
from purejaxppo.envs import gymnax as gymnax_adapter
from purejaxppo.envs.wrappers import flatten_observations
from purejaxppo.types import Box, Discrete, MultiDiscrete

REPRESENTATIVE = ("Pendulum-v1", "MemoryChain-bsuite", "FourRooms-misc", "Breakout-MinAtar", "UmbrellaChain-bsuite")


@pytest.fixture
def no_registered_environments(monkeypatch):
    monkeypatch.setattr(envs, "_registered", {})


def every_environment():
    """All names; those that stand for the others run in the fast part."""
    names = envs.list_envs()
    assert set(REPRESENTATIVE) <= set(names)
    return [pytest.param(n, marks=() if n in REPRESENTATIVE else pytest.mark.learning) for n in names]


@pytest.mark.parametrize("name", every_environment())
def test_every_environment_trains_under_jit_and_vmap(name):
    config = Config(
        env=name, num_envs=2, num_steps=8, total_timesteps=32, num_epochs=1, num_minibatches=2, hidden_sizes=(4,)
    )
    # Swimmer's own code relies on rank promotion.
    with jax.numpy_rank_promotion("allow" if name == "Swimmer-misc" else "raise"):
        train = jax.jit(jax.vmap(make_train(config)), compiler_options=FAST_COMPILE)
        state, metrics = train(jax.random.split(jax.random.key(0), 2))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.params))
    np.testing.assert_array_equal(metrics.timesteps, [[16, 32], [16, 32]])
    assert metrics.first_ratio_deviation.max() < 1e-4
    first, second = (jax.tree.map(lambda x, i=i: x[i], state.params) for i in range(2))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def test_integer_observations_can_be_normalised():
    config = Config(env="FourRooms-misc", num_envs=2, num_steps=8, num_minibatches=2, normalize_obs=True)
    shapes = jax.eval_shape(make_train(config), jax.random.key(0))
    assert shapes.state.normalizer.obs.mean.dtype == np.float32


# ---------------------------------------------------------------------------------------- by name


def test_names_with_and_without_the_suite_are_the_same_environment():
    for name in ("CartPole-v1", "gymnax/CartPole-v1"):
        env = envs.make(name)
        assert (env.max_episode_steps, env.truncates) == (500, True)
        assert env.action_space == Discrete(2) and env.observation_space.shape == (4,)
    assert len(envs.list_envs("gymnax")) == len(set(envs.list_envs("gymnax"))) > 20
    assert set(envs.list_envs("gymnax")) <= set(envs.list_envs())


def test_settings_reach_the_environment():
    env = envs.make("CartPole-v1", max_steps_in_episode=50)
    assert env.max_episode_steps == 50
    state, _ = env.reset(jax.random.key(0))
    at_the_end = state.replace(time=49, x=0.0, theta=0.0, x_dot=0.0, theta_dot=0.0)
    out = env.step(jax.random.key(1), at_the_end, jnp.int32(0))
    assert out.truncated and not out.terminated
    assert not env.step(jax.random.key(1), at_the_end.replace(time=48), jnp.int32(0)).truncated
    with pytest.raises(ConfigError, match="max_steps_in_episode"):
        envs.make("CartPole-v1", max_steps=50)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Cartpole-v1", "CartPole-v1"),
        ("gymnax/Pendulum", "Pendulum-v1"),
        ("BreakoutMinAtar", "Breakout-MinAtar"),
        ("gymnas/CartPole-v1", "gymnax"),
    ],
)
def test_an_unknown_name_gives_the_nearest_one(name, near):
    with pytest.raises(ConfigError, match=near) as error:
        make_train(Config(env=name))
    assert name in str(error.value)
    with pytest.raises(ConfigError, match="gymnax"):
        envs.list_envs("atari")


def test_an_environment_that_needs_a_download_says_so():
    with pytest.raises(ConfigError, match=r"MNISTBandit-bsuite.*data set"):
        envs.make("MNISTBandit-bsuite")
    assert "MNISTBandit-bsuite" not in envs.list_envs()


@pytest.mark.usefixtures("no_registered_environments")
def test_registered_environments_are_listed_made_and_trained():
    envs.register("counter", counter)
    assert "counter" in envs.list_envs() and "counter" not in envs.list_envs("gymnax")
    assert envs.make("counter", limit=7).max_episode_steps == 7
    shapes = jax.eval_shape(make_train(Config(env="counter", total_timesteps=1)), jax.random.key(0))
    assert shapes.metrics.timesteps.shape == (1,)
    with pytest.raises(ConfigError, match="counter"):
        envs.make("counte")
    with pytest.raises(ConfigError):
        envs.register("", counter)


@pytest.mark.parametrize("which", ["observation_space", "action_space"])
@pytest.mark.parametrize("kind", ["Dict", "Tuple"])
def test_spaces_that_are_neither_discrete_nor_boxes_are_refused(monkeypatch, which, kind):
    import gymnax
    from gymnax.environments import spaces

    discrete = spaces.Discrete(2)
    space = spaces.Dict({"a": discrete}) if kind == "Dict" else spaces.Tuple((discrete,))
    cartpole = type(gymnax.make("CartPole-v1")[0])
    monkeypatch.setattr(cartpole, which, lambda self, params=None: space)
    with pytest.raises(ConfigError, match=f"CartPole-v1.*{kind}"):
        make_train(Config(env="CartPole-v1"))


# ------------------------------------------------------------------------- what the adapter corrects


def test_memory_chain_observes_the_state_that_was_reached():
    """gymnax's own step_env returns the observation of the state that was left."""
    env = envs.make("MemoryChain-bsuite")
    original, params = gymnax_adapter.original("MemoryChain-bsuite")
    state, obs = env.reset(jax.random.key(0))
    times = [float(obs.ravel()[0])]
    for _ in range(3):
        out = env.step(jax.random.key(1), state, jnp.int32(0))
        state = out.state
        expected = original.observe(jax.random.key(2), state, jnp.int32(0), params)
        np.testing.assert_array_equal(out.obs, expected)
        times.append(float(out.obs.ravel()[0]))
    assert len(set(times)) == 4  # the time is a part of it, so no observation comes twice


def test_rewards_are_floats_and_ends_are_apart():
    for name in ("UmbrellaChain-bsuite", "BernoulliBandit-misc", "CartPole-v1"):
        env = envs.make(name)
        state, _ = env.reset(jax.random.key(0))
        out = jax.eval_shape(env.step, jax.random.key(1), state, jnp.int32(0))
        assert out.reward.dtype == np.float32 and out.reward.shape == ()
        assert out.terminated.dtype == out.truncated.dtype == bool


@pytest.mark.parametrize(
    ("space", "obs", "expected"),
    [
        (Discrete(3), 2, [0, 0, 1]),
        (MultiDiscrete((2, 3)), [1, 0], [0, 1, 1, 0, 0]),
        (Box((2, 2), 0.0, 9.0), [[1.0, 2.0], [3.0, 4.0]], [1, 2, 3, 4]),
    ],
)
def test_observations_become_one_vector(space, obs, expected):
    dtype = jnp.float32 if isinstance(space, Box) else jnp.int32
    env = counter()._replace(
        observation_space=space, reset=lambda key: (counter().reset(key)[0], jnp.asarray(obs, dtype))
    )
    flat = flatten_observations(env)
    assert flat.observation_space.shape == (len(expected),)
    np.testing.assert_array_equal(flat.reset(jax.random.key(0))[1], expected)


def test_an_environment_can_be_made_inside_of_jit():
    """As in jax.jit(lambda config, key: make_train(config)(key)): gymnax computes the bounds of a space with JAX."""
    config = Config(env="CartPole-v1", num_envs=2, num_steps=8, num_minibatches=2, total_timesteps=16)
    shapes = jax.eval_shape(jax.jit(lambda config, key: make_train(config)(key)), config, jax.random.key(0))
    assert shapes.metrics.timesteps.shape == (1,)
