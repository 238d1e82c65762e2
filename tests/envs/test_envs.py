"""Environments by name: all of gymnax train, except those that raise an error that says why."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import FAST_COMPILE
from small_envs import counter

from purejaxppo import Config, ConfigError, envs, make_train, make_trainer
from purejaxppo.envs import gymnax as gymnax_adapter
from purejaxppo.envs import wrappers
from purejaxppo.envs.wrappers import into_box
from purejaxppo.networks.encoders import features_of
from purejaxppo.types import Box, Discrete, MultiDiscrete

REPRESENTATIVE = (
    "Pendulum-v1",
    "MemoryChain-bsuite",
    "FourRooms-misc",
    "Breakout-MinAtar",
    "UmbrellaChain-bsuite",
)


@pytest.fixture
def no_registered_environments(monkeypatch):
    monkeypatch.setattr(envs, "_registered", {})


@pytest.fixture
def nothing_made_yet(monkeypatch):
    monkeypatch.setattr(envs, "_made", {})


def every_environment():
    """All names; the representative ones run in the fast part of the suite."""
    names = envs.list_envs()
    assert set(REPRESENTATIVE) <= set(names)
    return [
        pytest.param(name, marks=() if name in REPRESENTATIVE else pytest.mark.learning)
        for name in names
    ]


@pytest.mark.parametrize("name", every_environment())
def test_every_environment_trains_under_jit_and_vmap(name):
    config = Config(
        env=name,
        num_envs=2,
        num_steps=8,
        total_timesteps=32,
        num_epochs=1,
        num_minibatches=2,
        hidden_sizes=(4,),
    )
    # gymnax's code of Swimmer relies on rank promotion.
    with jax.numpy_rank_promotion("allow" if name == "Swimmer-misc" else "raise"):
        train = jax.jit(jax.vmap(make_train(config)), compiler_options=FAST_COMPILE)
        state, metrics = train(jax.random.split(jax.random.key(0), 2))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.params))
    np.testing.assert_array_equal(metrics.timesteps, [[16, 32], [16, 32]])
    assert metrics.first_ratio_deviation.max() < 1e-4
    first, second = (jax.tree.map(lambda x, i=i: x[i], state.params) for i in range(2))
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def test_integer_observations_can_be_normalised():
    config = Config(
        env="FourRooms-misc", num_envs=2, num_steps=8, num_minibatches=2, normalize_obs=True
    )
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
    timestep = env.step(jax.random.key(1), at_the_end, jnp.int32(0))
    assert timestep.truncated and not timestep.terminated
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
def test_the_error_for_an_unknown_name_suggests_the_nearest_one(name, near):
    with pytest.raises(ConfigError, match=near) as error:
        make_train(Config(env=name))
    assert name in str(error.value)
    with pytest.raises(ConfigError, match="gymnax"):
        envs.list_envs("atari")


def test_an_environment_that_needs_a_download_is_refused_and_not_listed():
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


@pytest.mark.usefixtures("nothing_made_yet")
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


# ----------------------------------------------------------------------------------- settings


@pytest.mark.usefixtures("no_registered_environments")
def test_an_environment_has_the_name_and_the_settings_it_was_made_with():
    envs.register("mine", counter)
    for made, expected in (
        (envs.make("CartPole-v1"), ()),
        (envs.make("gymnax/CartPole-v1", tau=0.01, gravity=9), (("gravity", 9), ("tau", 0.01))),
        (
            envs.make("CartPole-v1", max_steps_in_episode=np.int64(50)),
            (("max_steps_in_episode", 50),),
        ),
        (envs.make("CartPole-v1", gravity=jnp.float32(0.5)), (("gravity", 0.5),)),
        (envs.make("FourRooms-misc", goal_fixed=[3, 4]), (("goal_fixed", (3, 4)),)),
        (envs.make("mine", limit=7, longest=2), (("limit", 7), ("longest", 2))),
    ):
        assert made.settings == expected and hash(made) == hash(made)
    assert (
        envs.make("mine").name == "mine" and envs.make("gymnax/CartPole-v1").name == "CartPole-v1"
    )
    assert [
        type(x)
        for _, x in envs.make("CartPole-v1", tau=np.float64(0.5), gravity=np.int8(1)).settings
    ] == [
        int,
        float,
    ]


def test_traced_settings_are_used_but_not_recorded():
    """A setting may be traced: one program for many values of gravity."""

    def fall(gravity):
        env = envs.make("CartPole-v1", gravity=gravity)
        assert env.settings is None
        state, _ = env.reset(jax.random.key(0))
        return env.step(jax.random.key(1), state.replace(theta=0.1), jnp.int32(0)).state.theta_dot

    by_gravity = jax.vmap(fall)(jnp.array([0.0, 10.0, 20.0]))
    np.testing.assert_allclose(np.diff(by_gravity), np.diff(by_gravity)[:1].repeat(2), rtol=1e-4)
    assert np.diff(by_gravity)[0] > 0.01


@pytest.mark.usefixtures("no_registered_environments")
def test_the_same_name_and_settings_are_the_same_object():
    made = []

    def factory(limit=5):
        made.append(limit)
        return counter(limit=limit)

    envs.register("mine", factory)
    assert envs.make("mine") is envs.make("mine") and envs.make("mine", limit=6) is envs.make(
        "mine", limit=6
    )
    assert made == [5, 6]
    kinds = [envs.make("mine", limit=limit) for limit in (1, 1.0, True)]
    assert [type(env.max_episode_steps) for env in kinds] == [int, float, bool]
    before = envs.make("mine")
    envs.register("mine", lambda limit=3: counter(limit=limit))
    assert envs.make("mine").max_episode_steps == 3 and envs.make("mine") is not before
    assert envs.make("CartPole-v1") is envs.make("gymnax/CartPole-v1")
    short = envs.make("CartPole-v1", max_steps_in_episode=50)
    assert (
        short
        is envs.make("CartPole-v1", max_steps_in_episode=np.int32(50))
        is not envs.make("CartPole-v1")
    )


@pytest.mark.usefixtures("no_registered_environments")
def test_the_number_of_cached_environments_is_bounded(monkeypatch):
    monkeypatch.setattr(envs, "_made", {})
    monkeypatch.setattr(envs, "MOST_KEPT", 3)
    envs.register("mine", counter)
    for limit in range(1, 9):
        envs.make("mine", limit=limit)
    assert [env.max_episode_steps for _, env in envs._made.values()] == [6, 7, 8]


@pytest.mark.usefixtures("nothing_made_yet")
@pytest.mark.parametrize("name", ["Acrobot-v1", "FourRooms-misc", "MetaMaze-misc"])
def test_an_environment_made_inside_jit_can_be_used_outside(name):
    """These environments have array constants, which would be tracers if made inside jit."""

    def inside(x):
        envs.make(name)
        return x

    jax.eval_shape(inside, 1.0)
    assert len(envs._made) == 1
    _, obs = envs.make(name).reset(jax.random.key(0))
    assert np.isfinite(obs).all()


def test_each_precision_has_separate_environments():
    single = envs.make("Acrobot-v1")
    with jax.enable_x64(True):
        double = envs.make("Acrobot-v1")
        assert double is not single and double is envs.make("Acrobot-v1")
    assert envs.make("Acrobot-v1") is single


@pytest.mark.usefixtures("no_registered_environments")
@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "MountainCar-v0",
            {"maxspeed": 1, "pace": 2},
            "MountainCar-v0 has no setting maxspeed, pace; it has force, ",
        ),
        (
            "Catch-bsuite",
            {"row": 3},
            "Catch-bsuite has no setting row; it has columns, max_steps_in_episode, rows",
        ),
        ("Catch-bsuite", {"name": 3}, "Catch-bsuite has no setting name; it has columns"),
        (
            "Catch-bsuite",
            {"rows": "x"},
            "Catch-bsuite cannot be made with {'rows': 'x'}: Box.shape = ('x', 5)",
        ),
        ("CartPole-v1", {"gravity": "x"}, "CartPole-v1: gravity = 'x': it must be a number"),
        ("CartPole-v1", {"gravity": None}, "CartPole-v1: gravity = None: it must be a number"),
        (
            "Asterix-MinAtar",
            {"ramping": 3},
            "Asterix-MinAtar: ramping = 3: it must be True or False",
        ),
        (
            "Acrobot-v1",
            {"available_torque": (1, 2)},
            "available_torque = (1, 2): it must be numbers of shape (3,)",
        ),
        *[
            (
                "CartPole-v1",
                {"max_steps_in_episode": x},
                f"max_steps_in_episode = {x!r}: it must be an integer of at",
            )
            for x in (0, -1, 2.5, "50", None, True)
        ],
        (
            "mine",
            {"limt": 3},
            "'mine' cannot be made with these settings: "
            "got an unexpected keyword argument 'limt'; it",
        ),
        (
            "needy",
            {},
            "'needy' cannot be made with these settings: "
            "missing a required argument: 'size'; it has size",
        ),
        ("seven", {}, "what was registered as 'seven' returned int, and must return an Env"),
    ],
)
def test_wrong_settings_are_refused_with_one_sentence(name, settings, message):
    envs.register("mine", counter)
    envs.register("needy", lambda size: counter(limit=size))
    envs.register("seven", lambda: 7)
    with pytest.raises(ConfigError) as error:
        make_train({"env": name, "env_settings": settings})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_in_an_array_are_written_as_a_tuple():
    env = envs.make("Acrobot-v1", available_torque=(-2, 0, 2))
    assert env.settings == (("available_torque", (-2, 0, 2)),)
    state, _ = env.reset(jax.random.key(0))
    weak, strong = (
        made.step(jax.random.key(1), state, jnp.int32(2)) for made in (envs.make("Acrobot-v1"), env)
    )
    assert strong.state.velocity_2 != weak.state.velocity_2


# -------------------------------------------------------------------- corrections by the adapter


def test_memory_chain_observes_the_new_state():
    """gymnax's step_env returns the observation of the previous state."""
    env = envs.make("MemoryChain-bsuite")
    original, params = gymnax_adapter.original("MemoryChain-bsuite")
    state, obs = env.reset(jax.random.key(0))
    times = [float(obs.ravel()[0])]
    for _ in range(3):
        timestep = env.step(jax.random.key(1), state, jnp.int32(0))
        state = timestep.state
        expected = original.observe(jax.random.key(2), state, jnp.int32(0), params)
        np.testing.assert_array_equal(timestep.obs, expected)
        times.append(float(timestep.obs.ravel()[0]))
    assert len(set(times)) == 4  # the observation holds the time, so all four differ


def test_rewards_are_floats_and_the_two_kinds_of_ends_are_bools():
    for name in ("UmbrellaChain-bsuite", "BernoulliBandit-misc", "CartPole-v1"):
        env = envs.make(name)
        state, _ = env.reset(jax.random.key(0))
        timestep = jax.eval_shape(env.step, jax.random.key(1), state, jnp.int32(0))
        assert timestep.reward.dtype == np.float32 and timestep.reward.shape == ()
        assert timestep.terminated.dtype == timestep.truncated.dtype == bool


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
    x = jnp.asarray(obs, dtype)
    np.testing.assert_array_equal(features_of(x, space), expected)
    batch = jnp.broadcast_to(x, (4, 5, *x.shape))
    np.testing.assert_array_equal(features_of(batch, space)[3, 4], expected)


def test_actions_in_bfloat16_are_within_the_bounds_of_float32():
    """0.3 in bfloat16 is 0.30078, which is out of bounds."""
    box = Box((2,), -0.3, 0.3)
    action = jnp.asarray([[9, -9], [0.25, 0]], jnp.bfloat16)
    np.testing.assert_array_equal(
        into_box(action, box, False), np.float32([[0.3, -0.3], [0.25, 0]])
    )
    squashed = into_box(action, box, True)
    assert squashed.dtype == np.float32
    np.testing.assert_allclose(squashed[1], 0.3 * np.tanh([0.25, 0]), rtol=1e-6)


def test_an_environment_can_be_made_inside_jit():
    """gymnax computes the bounds of a space with JAX, so they would be tracers under jit."""
    config = Config(
        env="CartPole-v1", num_envs=2, num_steps=8, num_minibatches=2, total_timesteps=16
    )
    shapes = jax.eval_shape(
        jax.jit(lambda config, key: make_train(config)(key)), config, jax.random.key(0)
    )
    assert shapes.metrics.timesteps.shape == (1,)


# -------------------------------------------------------------------------- unreachable actions


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (100.0, 200.0, "between 100 and 200"),
        (0.0, 1000.0, "between 0 and 1000"),
        (-300.0, -200.0, "between -300 and -200"),
        (0.0, 0.01, "between 0 and 0.01"),
        ((-1.0, 50.0), (1.0, 60.0), "between 50 and 60"),
        ((-1.0, 50.0), (1.0, np.inf), "between 50 and inf"),
        (-1.0, 1.0, None),
        (0.0, 1.0, None),
        (-8.0, 8.0, None),
        (-0.1, 0.1, None),
        (-np.inf, np.inf, None),
        (0.0, np.inf, None),
    ],
)
def test_bounds_that_a_new_policy_hardly_reaches_give_a_warning(low, high, expected):
    """In [100, 200] with the best action 150, an agent without squashing always plays 100."""
    env = counter(Box((2,), low, high))
    config = Config(num_envs=2, num_steps=8, num_minibatches=2)
    wrappers._told.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(config, env)
        make_trainer(config, env)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (expected is not None)
    if expected is not None:
        assert expected in messages[0] and messages[0].startswith("counter takes actions between")
        assert ("squash_actions=True" in messages[0]) == bool(np.isfinite(high).all())
    if expected and np.isfinite(high).all():
        wrappers._told.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_trainer(config.replace(squash_actions=True), env)
