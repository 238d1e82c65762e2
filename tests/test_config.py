"""`Config`: derived numbers, round trips, pytree leaves, PureJaxRL's keys and error messages."""

import dataclasses
import json
import math
from decimal import Decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from purejaxrl import PPO, PPO_CONTINUOUS
from sentences import sentence_of

from purejaxppo import Config, ConfigError, envs, make_train
from purejaxppo.config import (
    ACTIVATIONS,
    ALGORITHMS,
    FIELDS,
    LEAVES,
    NETWORKS,
    OBJECTIVES,
    tuned,
    validate,
)

CONTINUOUS = {
    "lr",
    "adam_eps",
    "max_grad_norm",
    "gamma",
    "gae_lambda",
    "clip_eps",
    "vf_coef",
    "ent_coef",
}
CONTINUOUS |= {
    "kl_coef",
    "kl_target",
    "early_stop_kl",
    "max_kl",
    "cg_damping",
    "line_search_shrink",
    "baseline_decay",
    "temperature",
}
MAY_BE_NONE = {"early_stop_kl", "clip_eps_high", "ref_kl_target"}
CONTINUOUS |= {"ref_kl_coef", "ref_kl_horizon", *MAY_BE_NONE}
MAY_BE_0 = {
    "lr",
    "vf_coef",
    "ent_coef",
    "kl_coef",
    "ref_kl_coef",
    "cg_damping",
    "gamma",
    "gae_lambda",
    "baseline_decay",
}
BELOW_1 = float(np.nextafter(1, 0))
HIGHEST = {
    "gamma": 1,
    "gae_lambda": 1,
    "baseline_decay": 1,
    "clip_eps": BELOW_1,
    "line_search_shrink": BELOW_1,
}
SWITCHES = {name for name, field in FIELDS.items() if isinstance(field.default, bool)}
SIZES = {
    "total_timesteps",
    "total_episodes",
    "num_envs",
    "num_steps",
    "num_epochs",
    "num_minibatches",
    "num_shards",
}
SIZES |= {"cg_iterations", "fisher_subsample", "line_search_steps", "group_size"}


# ------------------------------------------------------------------------------- derived numbers


def test_the_defaults_are_valid_and_stay_as_they_are():
    assert validate(Config()) == Config()


@pytest.mark.parametrize(
    ("total", "iterations", "actual"),
    [(1, 1, 24), (24, 1, 24), (25, 2, 48), (48, 2, 48), (1000, 42, 1008)],
)
def test_timesteps_are_rounded_up_to_whole_iterations(total, iterations, actual):
    config = Config(num_envs=3, num_steps=8, total_timesteps=total)
    assert (config.batch_size, config.num_iterations, config.actual_timesteps) == (
        24,
        iterations,
        actual,
    )


# ----------------------------------------------------------------------------------- round trips


def test_replace_changes_a_copy():
    config = Config()
    changed = config.replace(lr=1e-2, num_envs=7)
    assert (changed.lr, changed.num_envs) == (1e-2, 7)
    assert changed.replace(lr=config.lr, num_envs=config.num_envs) == config == Config()
    assert (
        sentence_of(lambda: config.replace(num_env=3))
        == "'num_env' is not a setting; did you mean 'num_envs'?"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0


def test_to_dict_goes_through_json_and_from_dict():
    config = Config(
        env="Pendulum-v1",
        lr=np.float32(1e-3),
        hidden_sizes=(32, 16, 8),
        normalize_obs=True,
        gamma=1,
    )
    config = validate(config)
    values = json.loads(json.dumps(config.to_dict()))
    assert set(values) == set(FIELDS) and values["hidden_sizes"] == [32, 16, 8]
    assert Config.from_dict(values) == config


def test_settings_of_the_environment_are_a_mapping_held_as_sorted_pairs():
    config = Config(
        env_settings={"tau": 0.01, "goal": [1, [2, "x"]], "ramping": True, "seed": None}
    )
    pairs = (("goal", (1, (2, "x"))), ("ramping", True), ("seed", None), ("tau", 0.01))
    assert config.env_settings == pairs and config == Config(env_settings=pairs)
    values = json.loads(json.dumps(config.to_dict()))
    assert values["env_settings"] == {
        "goal": [1, [2, "x"]],
        "ramping": True,
        "seed": None,
        "tau": 0.01,
    }
    assert Config.from_dict(values) == validate(config) == config
    assert config.replace(env_settings={}).env_settings == Config().env_settings == ()
    assert Config.from_dict({"ENV_SETTINGS": {"tau": np.float32(0.5)}}).env_settings == (
        ("tau", 0.5),
    )
    old = {name: x for name, x in Config().to_dict().items() if name != "env_settings"}
    assert Config.from_dict(old) == Config()
    assert Config.from_dict(Config(env_settings=None).to_dict()).env_settings is None


def test_a_config_with_settings_or_a_list_of_sizes_can_be_an_argument_of_jit():
    """Static fields are hashed before anything checks them."""
    config = Config(env_settings={"a": [1, 2]}, hidden_sizes=[4])
    assert jax.jit(lambda config: config.replace(lr=2 * config.lr))(config).env_settings == (
        ("a", (1, 2)),
    )
    assert hash(jax.tree.structure(config)) == hash(
        jax.tree.structure(Config(env_settings={"a": (1, 2)}, hidden_sizes=(4,)))
    )
    assert jax.tree.structure(Config(env_settings={"a": 1})) != jax.tree.structure(
        Config(env_settings={"a": 2})
    )


def test_from_dict_fills_the_rest_from_base():
    base = Config(num_envs=8, lr=0.1)
    assert Config.from_dict({"lr": 0.2}, base) == Config(num_envs=8, lr=0.2)
    assert Config.from_dict({}) == Config()


def test_axes_are_0_for_the_named_fields_and_none_for_the_others():
    axes = Config().axes("lr", "gamma")
    assert {name: getattr(axes, name) for name in LEAVES} == dict.fromkeys(LEAVES) | {
        "lr": 0,
        "gamma": 0,
    }
    batched = Config(lr=jnp.arange(3.0), gamma=jnp.array([0.1, 0.2, 0.3]))
    got = jax.vmap(lambda c: c.lr + c.gamma + c.gae_lambda, (axes,))(batched)
    np.testing.assert_allclose(got, [0.1 + 0.95, 1.2 + 0.95, 2.3 + 0.95], rtol=1e-6)


def test_axes_of_a_static_field_are_an_error():
    message = sentence_of(lambda: Config().axes("num_envs"))
    assert message.startswith("'num_envs' cannot be batched") and "lr" in message
    assert "did you mean 'gamma'?" in sentence_of(lambda: Config().axes("gama"))


# ----------------------------------------------------------------------------------------- pytree


def test_the_leaves_are_exactly_the_continuous_fields():
    assert set(LEAVES) == CONTINUOUS
    marked = Config(**{name: float(i) for i, name in enumerate(LEAVES)})
    assert jax.tree.leaves(marked) == [float(i) for i in range(len(CONTINUOUS))]


def test_sizes_names_and_switches_are_part_of_the_tree_structure():
    structure = jax.tree.structure(Config())
    assert jax.tree.structure(Config(lr=1.0, gamma=0.5)) == structure
    for change in (
        {"num_envs": 3},
        {"env": "Pendulum-v1"},
        {"anneal_lr": False},
        {"hidden_sizes": (8,)},
    ):
        assert jax.tree.structure(Config(**change)) != structure


def test_rebuilding_with_tracers_and_other_objects_is_not_checked():
    marks = jax.tree.map(lambda _: object(), Config())
    assert isinstance(marks, Config) and type(marks.lr) is object and marks.num_envs == 16
    assert jax.jit(lambda config: config.replace(lr=2 * config.lr).lr)(Config(lr=-3.0)) == -6.0


def test_traced_values_are_not_checked_and_static_ones_are():
    assert jax.eval_shape(lambda config: validate(config).lr, Config(lr=-1.0)).shape == ()
    jax.eval_shape(
        jax.vmap(lambda config: validate(config).gamma, (Config().axes("gamma"),)),
        Config(gamma=np.ones(4)),
    )
    message = sentence_of(
        lambda: jax.eval_shape(lambda config: validate(config).lr, Config(num_envs=0))
    )
    assert message == "num_envs = 0: it must be an integer of at least 1"


def test_batched_values_are_checked_element_by_element():
    good = validate(Config(lr=np.array([1e-4, 1e-3]), gamma=jnp.array([0.0, 1.0])))
    np.testing.assert_array_equal(good.lr, [1e-4, 1e-3])
    wrong = {
        "lr": (
            np.array([1e-3, -1e-3, 1.0]),
            "lr = -0.001: it must be a finite number of at least 0",
        ),
        "gamma": (
            np.array([[0.5, 0.9], [1.0, 1.5]]),
            "gamma = 1.5: it must be a number between 0 and 1",
        ),
        "clip_eps": (
            jnp.array([0.5, 1.0]),
            "clip_eps = 1.0: it must be a number between 0 and 1, both excluded",
        ),
        "ent_coef": (
            np.array([0.1, np.nan]),
            "ent_coef = nan: it must be a finite number of at least 0",
        ),
    }
    for name, (values, message) in wrong.items():
        assert (
            sentence_of(lambda values=values, name=name: validate(Config(**{name: values})))
            == message
        )


# ----------------------------------------------------------------------------- accepted spellings


def test_integers_for_continuous_fields_become_floats():
    config = Config.from_dict(
        {"gamma": 1, "lr": np.int32(0), "vf_coef": np.float32(0.5), "max_grad_norm": np.array(10)}
    )
    assert (config.gamma, config.lr, config.vf_coef, config.max_grad_norm) == (1.0, 0.0, 0.5, 10.0)
    assert {type(getattr(config, name)) for name in set(LEAVES) - MAY_BE_NONE} == {float}
    assert (
        config.early_stop_kl is None and type(config.replace(early_stop_kl=1).early_stop_kl) is int
    )
    assert type(validate(config.replace(early_stop_kl=1)).early_stop_kl) is float


@pytest.mark.parametrize(
    "count", [5e7, 50_000_000, np.int64(50_000_000), np.float32(5e7), np.float64(5e7)]
)
def test_integral_floats_count_as_integers(count):
    config = Config.from_dict({"total_timesteps": count})
    assert config.total_timesteps == 50_000_000 and type(config.total_timesteps) is int


def test_hidden_sizes_may_be_a_list_and_switches_numpy_booleans():
    config = Config.from_dict({"hidden_sizes": [32.0, np.int64(16)], "normalize_obs": np.True_})
    assert config.hidden_sizes == (32, 16) and config.normalize_obs is True
    assert Config.from_dict({"hidden_sizes": []}).hidden_sizes == ()


def test_the_dictionary_of_purejaxrl_ppo_runs_unchanged():
    before = dict(PPO)
    config = Config.from_dict(PPO)
    expected = Config(
        env="CartPole-v1",
        lr=2.5e-4,
        num_envs=4,
        num_steps=128,
        total_timesteps=500_000,
        num_epochs=4,
        num_minibatches=4,
        gamma=0.99,
        gae_lambda=0.95,
        clip_eps=0.2,
        ent_coef=0.01,
        vf_coef=0.5,
        max_grad_norm=0.5,
        activation="tanh",
        anneal_lr=True,
        debug=True,
        clip_value=True,  # PureJaxRL always does
    )
    assert config == expected
    assert before == PPO


def test_normalize_env_of_purejaxrl_is_observations_and_rewards():
    before = dict(PPO_CONTINUOUS)
    config = Config.from_dict(PPO_CONTINUOUS)
    assert (config.normalize_obs, config.normalize_reward, config.anneal_lr) == (True, True, False)
    assert (config.env, config.total_timesteps, config.num_envs) == (
        "Pendulum-v1",
        50_000_000,
        2048,
    )
    assert before == PPO_CONTINUOUS
    off = Config.from_dict(PPO_CONTINUOUS | {"NORMALIZE_ENV": False})
    assert (off.normalize_obs, off.normalize_reward) == (False, False)


def test_keys_that_purejaxrl_adds_to_its_dictionary_are_ignored():
    assert Config.from_dict(
        PPO | {"NUM_UPDATES": 976.0, "MINIBATCH_SIZE": 128}
    ) == Config.from_dict(PPO)


@pytest.mark.parametrize("values", [PPO, PPO_CONTINUOUS, {"num_envs": 4.0, "hidden_sizes": [8]}])
def test_make_train_takes_mappings_and_does_not_change_them(values):
    before = json.dumps(values)
    make_train(values)
    assert json.dumps(values) == before


# ------------------------------------------------------------------------------- error messages


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rte": 1.0}, "'learning_rte' is not a setting"),
        ({"num_minibatch": 4}, "'num_minibatch' is not a setting; did you mean 'num_minibatches'?"),
        ({"Gamma": 0.9}, "'Gamma' is not a setting; did you mean 'gamma'?"),
        (PPO | {"NUM_ENV": 4}, "'NUM_ENV' is not a setting; did you mean 'NUM_ENVS'?"),
        (
            PPO | {"UPDATE_EPOCH": 4},
            "'UPDATE_EPOCH' is not a setting; did you mean 'UPDATE_EPOCHS'?",
        ),
        ({"num_envs": "64"}, "num_envs = '64': it must be an integer of at least 1"),
        ({"num_envs": 2.5}, "num_envs = 2.5: it must be an integer of at least 1"),
        ({"num_envs": True}, "num_envs = True: it must be an integer of at least 1"),
        ({"num_steps": 0}, "num_steps = 0: it must be an integer of at least 1"),
        ({"num_epochs": -3}, "num_epochs = -3: it must be an integer of at least 1"),
        (
            {"total_timesteps": math.inf},
            "total_timesteps = inf: it must be an integer of at least 1",
        ),
        (
            {"total_timesteps": math.nan},
            "total_timesteps = nan: it must be an integer of at least 1",
        ),
        (
            {"num_envs": 2**63},
            "num_envs = 9223372036854775808: it must be an integer of at least 1",
        ),
        ({"lr": True}, "lr = True: it must be a finite number of at least 0"),
        ({"lr": "3e-4"}, "lr = '3e-4': it must be a finite number of at least 0"),
        ({"lr": None}, "lr = None: it must be a finite number of at least 0"),
        ({"lr": -1e-3}, "lr = -0.001: it must be a finite number of at least 0"),
        ({"lr": math.nan}, "lr = nan: it must be a finite number of at least 0"),
        ({"lr": math.inf}, "lr = inf: it must be a finite number of at least 0"),
        ({"lr": 1j}, "lr = 1j: it must be a finite number of at least 0"),
        ({"gamma": 1.01}, "gamma = 1.01: it must be a number between 0 and 1"),
        ({"gae_lambda": -0.1}, "gae_lambda = -0.1: it must be a number between 0 and 1"),
        ({"clip_eps": 0}, "clip_eps = 0.0: it must be a number between 0 and 1, both excluded"),
        ({"max_grad_norm": 0.0}, "max_grad_norm = 0.0: it must be a finite number above 0"),
        ({"adam_eps": 0.0}, "adam_eps = 0.0: it must be a finite number above 0"),
        ({"anneal_lr": 1}, "anneal_lr = 1: it must be True or False"),
        ({"debug": "yes"}, "debug = 'yes': it must be True or False"),
        ({"env": 3}, "env = 3: it must be a string"),
        (
            {"algorithm": "pppo"},
            "algorithm = 'pppo': it must be one of ppo, trpo, reinforce; did you mean 'ppo'?",
        ),
        ({"network": "transformer"}, "network = 'transformer': it must be one of mlp"),
        (
            {"activation": "rellu"},
            "activation = 'rellu': it must be one of tanh, relu, elu, gelu, silu; "
            "did you mean 'relu'?",
        ),
        (
            {"hidden_sizes": 64},
            "hidden_sizes = 64: it must be a sequence of positive integers, such as (64, 64)",
        ),
        (
            {"hidden_sizes": "64"},
            "hidden_sizes = '64': it must be a sequence of positive integers, such as (64, 64)",
        ),
        ({"hidden_sizes": [64, 0]}, "hidden_sizes[1] = 0: it must be an integer of at least 1"),
        *[
            (
                {"env_settings": x},
                f"env_settings = {x!r}: it must be a mapping of names to values, such as "
                "{'max_steps_in_episode': 50}",
            )
            for x in (3, "limit=3", ["limit"], ("limit", 3))
        ],
        ({"env_settings": {3: "x"}}, "a name in env_settings = 3: it must be a string"),
        *[
            (
                {"env_settings": {"limit": x}},
                f"env_settings['limit'] = {x!r}: it must be a finite number, a string, "
                "True, False, None or a tuple of these",
            )
            for x in (
                math.nan,
                -math.inf,
                {"a": 1},
                {1},
                1j,
                (1, (2, len)),
                np.arange(2),
                Decimal("0.5"),
                b"x",
            )
        ],
        (
            {"num_envs": 4, "num_steps": 8, "num_minibatches": 5},
            "num_minibatches = 5 does not divide num_envs * num_steps = 32; "
            "the nearest number that does is 4",
        ),
        (
            {"num_envs": 5, "num_steps": 7, "num_minibatches": 33},
            "num_minibatches = 33 does not divide num_envs * num_steps = 35; "
            "the nearest number that does is 35",
        ),
    ],
    ids=lambda x: next(reversed(x)) if isinstance(x, dict) else "",
)
def test_an_error_is_one_sentence_with_field_value_and_allowed_values(values, message):
    got = sentence_of(lambda: Config.from_dict(values))
    assert got == message if "not a setting" not in message else got.startswith(message)
    unknown_keys = [key for key in values if key not in FIELDS]
    if not unknown_keys:
        assert sentence_of(lambda: validate(Config(**values))) == got
        assert sentence_of(lambda: make_train(Config(**values))) == got


def test_an_unknown_key_without_a_near_one_lists_all():
    message = sentence_of(lambda: Config.from_dict({"zzz": 1}))
    assert message == f"'zzz' is not a setting; known: {', '.join(FIELDS)}"


@pytest.mark.parametrize("value", [None, 3, "lr", [("lr", 1.0)], {"lr"}])
def test_a_configuration_is_a_config_or_a_mapping(value):
    expected = f"a configuration is a Config or a mapping, not {type(value).__name__}"
    assert sentence_of(lambda: Config.from_dict(value)) == expected


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("CartPole-v0", "; did you mean 'CartPole-v1'?"),
        ("cartpole", ""),
        ("gymnax/Pendulum", "; did you mean 'Pendulum-v1'?"),
        ("brix/ant", ": there is no suite 'brix', only gymnax"),
    ],
)
def test_an_unknown_environment_is_named_with_the_nearest_one(name, hint):
    assert sentence_of(lambda: make_train(Config(env=name))).startswith(
        f"{name!r} is not an environment{hint}"
    )
    assert sentence_of(lambda: make_train({"ENV_NAME": name})).startswith(
        f"{name!r} is not an environment{hint}"
    )


def test_an_environment_that_needs_a_download_is_refused():
    message = sentence_of(lambda: make_train(Config(env="MNISTBandit-bsuite")))
    assert (
        message
        == "MNISTBandit-bsuite fetches a data set when it is made, which this library does not do"
    )


@pytest.mark.parametrize("values", [np.array([1e-3, 1e-4]), jnp.ones(1), np.ones((2, 3))])
def test_a_batched_value_without_vmap_is_refused(values):
    message = sentence_of(lambda: make_train(Config(lr=values)))
    assert message.startswith(f"lr is an array of shape {values.shape}: ") and "jax.vmap" in message


# ---------------------------------------------------------------------------------- tuned settings

BUDGETS = {
    ("ppo", "CartPole-v1"): 100_000,
    ("ppo", "Acrobot-v1"): 1_000_000,
    ("ppo", "MountainCar-v0"): 1_000_000,
    ("ppo", "MountainCarContinuous-v0"): 100_000,
    ("ppo", "Pendulum-v1"): 1_000_000,
    ("ppo", "Breakout-MinAtar"): 10_000_000,
    ("ppo", "Freeway-MinAtar"): 10_000_000,
    ("ppo", "SpaceInvaders-MinAtar"): 10_000_000,
    ("trpo", "CartPole-v1"): 100_000,
    ("trpo", "Acrobot-v1"): 100_000,
    ("trpo", "MountainCarContinuous-v0"): 100_000,
    ("trpo", "Pendulum-v1"): 300_000,
    ("reinforce", "CartPole-v1"): 200_000,
}
TUNED = [(algorithm, name) for algorithm in ALGORITHMS for name in tuned(algorithm)]


def test_tuned_settings_exist_for_existing_environments_only():
    assert set(BUDGETS) <= set(TUNED)
    assert {name for _, name in TUNED} <= set(envs.list_envs())


@pytest.mark.parametrize(("algorithm", "name"), TUNED)
def test_tuned_settings_are_valid_and_stay_within_the_budget(algorithm, name):
    config = Config.for_env(name, algorithm=algorithm)
    assert validate(config) == config and (config.env, config.algorithm) == (name, algorithm)
    assert config.actual_timesteps <= BUDGETS[algorithm, name]
    for key, value in tuned(algorithm)[name].items():
        assert key == "result" or getattr(config, key) == value


def test_every_tuned_environment_reports_a_result():
    assert [pair for pair in TUNED if "result" not in tuned(pair[0])[pair[1]]] == []


def test_for_env_accepts_changes_and_uses_general_settings_elsewhere():
    assert Config.for_env("CartPole-v1", lr=1).lr == 1.0
    assert Config.for_env("CartPole-v1", lr=1) == Config.for_env("CartPole-v1").replace(lr=1.0)
    assert Config.for_env("Catch-bsuite", num_envs=8) == Config(env="Catch-bsuite", num_envs=8)
    assert sentence_of(lambda: Config.for_env("CartPole-v1", num_env=1)).startswith(
        "'num_env' is not a setting"
    )
    assert "num_minibatches = 7 does not divide" in sentence_of(
        lambda: Config.for_env("CartPole-v1", num_minibatches=7)
    )


# ------------------------------------------------------------------- any malformed configuration

ARRAY_VALUES = [
    np.float32(0.5),
    np.float64("nan"),
    np.float16(2),
    np.longdouble(0.25),
    np.int8(-1),
    np.int64(2**62),
    np.uint64(2**64 - 1),
    np.bool_(True),
    np.str_("tanh"),
    np.bytes_(b"tanh"),
    np.complex64(1j),
    np.datetime64("2020-01-01"),
    np.timedelta64(3, "s"),
    np.array(0.5),
    np.array(4),
    np.array([0.5, 0.25]),
    np.array([1, 2]),
    np.array([]),
    np.zeros((2, 0)),
    np.array([0.5, np.inf]),
    np.array([True]),
    np.array(["a"]),
    np.array([None, 1.0], object),
    np.array([10**400], object),
    np.array([1j]),
    jnp.float32(0.5),
    jnp.int32(4),
    jnp.array([0.1, 0.2]),
    jnp.array([True]),
    jax.random.key(0),
    jax.random.split(jax.random.key(0)),
]
PLAIN_VALUES = [
    None, "", (), [], {}, set(), object(), Config, Config(), math, len, Decimal("0.5"),
    Fraction(1, 2), range(3), 10**400, -(10**400), 1e308, -0.0, 5e-324, NotImplemented, ...,
    jax.ShapeDtypeStruct((), np.float32),
]  # fmt: skip
GOOD_NAMES = ["tanh", "ppo", "mlp", "CartPole-v1", "NoSuch-v0", "relu "]

scalars = st.one_of(
    st.sampled_from(PLAIN_VALUES + ARRAY_VALUES + GOOD_NAMES),
    st.integers(-3, 80),
    st.integers(),
    st.floats(),
    st.floats(0, 1),
    st.booleans(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.complex_numbers(),
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=2),
        st.frozensets(st.integers(), max_size=2),
    ),
    max_leaves=4,
)
known = st.sampled_from(sorted(FIELDS))
upper_case = st.sampled_from(
    sorted({*PPO_CONTINUOUS, *(name.upper() for name in FIELDS), "NUM_UPDATES"})
)
strange = st.one_of(
    st.text(max_size=12),
    st.integers(),
    st.none(),
    st.binary(max_size=3),
    known.map(lambda name: name[:-1]),
)


def assert_valid(config):
    """Every field has its documented type and range."""
    for name in FIELDS:
        value = getattr(config, name)
        if name in MAY_BE_NONE and value is None:
            continue
        if name in CONTINUOUS:
            array = np.asarray(value, np.float64)
            assert type(value) is float or isinstance(value, np.ndarray | jax.Array)
            assert (
                np.asarray(value).dtype.kind in "iuf"
                and array.size > 0
                and np.isfinite(array).all()
            )
            lowest = 0 if name in MAY_BE_0 else np.nextafter(0, 1)
            highest = HIGHEST.get(name, np.inf)
            assert (array >= lowest).all() and (array <= highest).all()
        elif name in SWITCHES:
            assert type(value) is bool
        elif name == "total_episodes" and value is None:
            continue
        elif name in SIZES:
            assert type(value) is int and 1 <= value <= 2**62
        elif name == "env_settings":
            assert value is None or (
                type(value) is tuple and all(type(key) is str for key, _ in value)
            )
            hash(value)
        elif name == "hidden_sizes":
            assert type(value) is tuple and all(type(size) is int and size >= 1 for size in value)
        else:
            assert isinstance(value, str)
    assert config.objective in OBJECTIVES
    assert (
        config.algorithm in ALGORITHMS
        and config.network in NETWORKS
        and config.activation in ACTIVATIONS
    )
    assert config.batch_size % config.num_minibatches == 0
    json.dumps(config.to_dict())


def refused_or_valid(make):
    """Whether ``make()`` raised `ConfigError`; other errors and invalid configs fail the test."""
    message = None
    try:
        config = make()
    except ConfigError as error:
        message = str(error)
    if message is None:
        assert_valid(config)
        return False
    assert 0 < len(message) < 1500
    return True


@settings(max_examples=1000, deadline=None)
@given(st.dictionaries(st.one_of(known, known, upper_case, strange), anything, max_size=4))
def test_from_dict_of_anything_is_a_config_error_or_a_valid_config(values):
    refused = refused_or_valid(lambda: Config.from_dict(values))
    derived = {
        "NUM_UPDATES",
        "MINIBATCH_SIZE",
        "NORMALIZE_ENV",
        *PPO,
        *(name.upper() for name in FIELDS),
        *FIELDS,
    }
    assert refused or values.keys() <= derived


@settings(max_examples=1000, deadline=None)
@given(st.dictionaries(known, anything, min_size=1, max_size=4))
def test_validate_of_any_fields_is_a_config_error_or_a_valid_config(fields):
    refused_or_valid(lambda: validate(Config(**fields)))


def test_each_strange_value_in_each_field_is_a_config_error_or_a_valid_config():
    failures = []
    for name in FIELDS:
        for value in PLAIN_VALUES + ARRAY_VALUES:
            try:
                refused_or_valid(lambda name=name, value=value: Config.from_dict({name: value}))
            except Exception as error:
                failures.append(f"{name} = {value!r}: {type(error).__name__}")
    assert failures == []


@settings(max_examples=200, deadline=None)
@given(anything)
def test_anything_but_a_mapping_is_refused(value):
    if not isinstance(value, dict):
        assert refused_or_valid(lambda: Config.from_dict(value))
