"""Policies from a state, acting on any batch, saved and loaded bit for bit or refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentences import sentence_of
from small_envs import BOX, DISCRETE, MULTI, counter, linear_model, mixed_model

from purejaxppo import Config, Policy, load_policy, make_trainer, save_policy
from purejaxppo.normalize import Moments
from purejaxppo.trees import named_leaves
from purejaxppo.types import Box, Discrete, Env, Step

TINY = Config(
    num_envs=2, num_steps=8, num_minibatches=1, num_epochs=1, total_timesteps=64, hidden_sizes=(4,)
)
FAR = Box((2,), -0.1, 0.05)  # sampled actions are nearly always outside


@pytest.fixture(autouse=True, scope="module")
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def grid(action_space=DISCRETE) -> Env:
    """A minimal environment with observations [2, 3]."""

    def reset(key):
        return jnp.int32(0), jax.random.uniform(key, (2, 3))

    def step(key, t, action):
        return Step(
            state=t + 1,
            obs=jax.random.uniform(key, (2, 3)),
            reward=jnp.ones(()),
            terminated=t >= 3,
            truncated=jnp.asarray(False),
        )

    return Env(
        name="grid",
        reset=reset,
        step=step,
        observation_space=Box((2, 3), 0.0, 1.0),
        action_space=action_space,
        max_episode_steps=4,
        truncates=False,
    )


def state_of(config, env, model=None, agents=None):
    """The state before training, with observation moments as after some observations."""
    trainer = make_trainer(config, env, model)

    def init(key):
        unused = dict.fromkeys(("update", "env", "carry", "reward", "key"))  # less to compile
        return trainer.init(key)._replace(**unused)

    key = jax.random.key(0)
    state = jax.jit(jax.vmap(init) if agents else init)(
        jax.random.split(key, agents) if agents else key
    )
    if config.normalize_obs:
        moments = state.normalizer.obs
        mean = 0.3 * jnp.arange(moments.mean.size, dtype=float).reshape(moments.mean.shape)
        moments = Moments(moments.samples + 4, mean, jnp.full_like(moments.m2, 16.0))
        state = state._replace(normalizer=state.normalizer._replace(obs=moments))
    return state


@pytest.fixture(scope="module")
def policies():
    """{name: (policy, environment, custom model or None)}, one for each kind."""
    made = {}
    for name, config, env, model in [
        ("discrete", TINY, grid(), None),
        ("multi-discrete", TINY, grid(MULTI), None),
        ("continuous", TINY, grid(FAR), None),
        ("squashed", TINY.replace(squash_actions=True), grid(FAR), None),
        ("normalised", TINY.replace(normalize_obs=True), grid(BOX), None),
        ("custom model", TINY, counter(), linear_model()),
        ("custom containers", TINY.replace(normalize_obs=True), counter(), mixed_model()),
        ("no hidden layers", TINY.replace(hidden_sizes=()), grid(), None),
    ]:
        state = state_of(config, env, model)
        made[name] = Policy.from_state(config, state, env=env, model=model), env, model
    config = TINY.replace(normalize_obs=True, shared_trunk=True)
    env = grid()
    state = state_of(config, env, agents=3)
    made["one of three"] = Policy.from_state(config, state, 2, env), env, None
    made["three"] = config, env, state
    return made


KINDS = ["discrete", "multi-discrete", "continuous", "squashed", "normalised"]
KINDS += ["custom model", "custom containers", "no hidden layers", "one of three"]


def assert_same(got, expected):
    """The same structure, types and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def observations(policy, *batch):
    shape = (*batch, *policy.observation_space.shape)
    return jnp.asarray(np.random.default_rng(0).uniform(0, 3, shape), jnp.float32)


# ----------------------------------------------------------------------------------- from a state


def test_the_policy_of_a_vmapped_state_has_the_parameters_of_that_agent(policies):
    config, env, state = policies["three"]
    kernels = []
    for index in range(3):
        policy = Policy.from_state(config, state, index, env)
        jax.tree.map(
            lambda got, all_, i=index: np.testing.assert_array_equal(got, all_[i]),
            policy.params,
            state.params,
        )
        np.testing.assert_array_equal(policy.obs_moments.mean, state.normalizer.obs.mean[index])
        kernels.append(np.asarray(policy.params["trunk"]["params"]["Dense_0"]["kernel"]))
    assert (kernels[0] != kernels[1]).any() and (kernels[1] != kernels[2]).any()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "this state holds 3 agents: say which one by index=0 … 2"),
        (3, "index = 3: this state holds 3 agents, 0 … 2"),
        (-1, "index = -1: this state holds 3 agents, 0 … 2"),
    ],
)
def test_a_vmapped_state_needs_an_index_within_it(policies, index, message):
    config, env, state = policies["three"]
    assert sentence_of(lambda: Policy.from_state(config, state, index, env)) == message


def test_a_config_that_can_be_trained_has_a_policy():
    """`make_train` accepts a list of widths, so `Policy` must accept it too."""
    config = TINY.replace(hidden_sizes=[4])
    env = grid()
    policy = Policy.from_state(config, state_of(config, env), env=env)
    assert policy.act(observations(policy)).shape == ()


def test_a_state_of_one_agent_forbids_an_index(policies):
    config, env, state = policies["three"]
    one = jax.tree.map(lambda x: x[0], state)
    message = sentence_of(lambda: Policy.from_state(config, one, 0, env))
    assert message == "this state holds one agent: leave index out"


# ---------------------------------------------------------------------------------------- acting


@pytest.mark.parametrize("kind", KINDS)
def test_any_batch_of_observations_gives_that_batch_of_actions(policies, kind):
    policy, env, _ = policies[kind]
    obs = observations(policy, 2, 3)
    batched = policy.act(obs)
    assert batched.shape == (2, 3, *env.action_space.shape)
    for i in np.ndindex(2, 3):
        np.testing.assert_allclose(policy.act(obs[i]), batched[i], rtol=1e-6, atol=1e-7)
    assert policy.act(obs[0, 0]).shape == env.action_space.shape
    assert jnp.issubdtype(
        batched.dtype, jnp.floating if isinstance(env.action_space, Box) else jnp.integer
    )


@pytest.mark.parametrize("kind", KINDS)
def test_act_is_the_model_applied_to_the_normalised_observation(policies, kind):
    policy, env, _ = policies[kind]
    obs = observations(policy, 5)
    features = np.asarray(obs)
    moments = policy.obs_moments
    assert (moments is not None) == (kind in {"normalised", "custom containers", "one of three"})
    if moments is not None:
        deviation = np.sqrt(np.asarray(moments.m2) / float(moments.samples) + 1e-8)
        features = np.clip((features - np.asarray(moments.mean)[None]) / deviation[None], -10, 10)
    _, distribution, _ = policy.model.step(
        policy.params, (), jnp.asarray(features), jnp.zeros(5, bool)
    )
    if not isinstance(env.action_space, Box):
        expected = distribution.mode()
    elif kind == "squashed":
        expected = -0.1 + 0.15 * (np.tanh(distribution.mean) + 1) / 2
    else:
        expected = np.clip(distribution.mean, env.action_space.low, env.action_space.high)
    np.testing.assert_allclose(policy.act(obs), expected, rtol=1e-5, atol=1e-7)


def test_actions_are_the_mode_without_a_key_and_samples_with_one(policies):
    policy = policies["discrete"][0]
    obs = jnp.repeat(observations(policy, 1), 3000, axis=0)
    mode = np.asarray(policy.act(obs))
    assert (mode == mode[0]).all()
    sampled = np.asarray(policy.act(obs, jax.random.key(0)))
    np.testing.assert_array_equal(sampled, policy.act(obs, jax.random.key(0)))
    assert (sampled != np.asarray(policy.act(obs, jax.random.key(1)))).any()
    _, distribution, _ = policy.model.step(policy.params, (), obs[:1], jnp.zeros(1, bool))
    expected = np.asarray(jax.nn.softmax(distribution.logits[0]))
    np.testing.assert_allclose(np.bincount(sampled, minlength=3) / 3000, expected, atol=0.04)


@pytest.mark.parametrize("kind", ["continuous", "squashed", "normalised"])
def test_sampled_actions_are_within_the_box(policies, kind):
    policy, env, _ = policies[kind]
    actions = np.asarray(policy.act(observations(policy, 200), jax.random.key(0)))
    low = np.float32(env.action_space.low)
    high = np.float32(env.action_space.high)
    assert (actions >= low).all() and (actions <= high).all()
    inside = ((actions > low) & (actions < high)).mean()
    assert inside > 0.9 if kind == "squashed" else 0 < inside < 0.9


@pytest.mark.parametrize("squash", [False, True])
def test_actions_for_pendulum_are_torques_within_its_limits(squash):
    config = TINY.replace(env="Pendulum-v1", squash_actions=squash)
    policy = Policy.from_state(config, state_of(config, None))
    assert policy.action_space == Box((1,), -2.0, 2.0)
    actions = np.asarray(policy.act(observations(policy, 500), jax.random.key(0)))
    assert actions.shape == (500, 1) and np.abs(actions).max() <= 2 and np.abs(actions).max() > 1.5
    assert (np.abs(actions) == 2).any() != squash


def test_act_works_inside_jit_and_vmap(policies):
    policy = policies["normalised"][0]
    obs = observations(policy, 4)
    np.testing.assert_allclose(jax.jit(policy.act)(obs), policy.act(obs), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(policy.act)(obs), policy.act(obs), rtol=1e-6)


def test_an_empty_batch_gives_an_empty_batch(policies):
    policy = policies["discrete"][0]
    assert policy.act(observations(policy, 2, 0)).shape == (2, 0)


def test_observations_may_be_numpy_arrays(policies):
    policy = policies["discrete"][0]
    obs = observations(policy, 4)
    np.testing.assert_array_equal(policy.act(np.asarray(obs)), policy.act(obs))
    np.testing.assert_array_equal(policy.act(np.asarray(obs, np.float64)), policy.act(obs))


def test_an_observation_of_another_shape_is_refused(policies):
    policy = policies["discrete"][0]
    expected = "an observation has shape (2, 3) after any batch axes; this one has (4, 2)"
    assert sentence_of(lambda: policy.act(jnp.zeros((4, 2)))) == expected
    assert sentence_of(lambda: policy.act(jnp.zeros(3))).endswith("this one has (3,)")


# ------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_policy_comes_back_bit_for_bit(policies, kind, tmp_path):
    policy, env, model = policies[kind]
    directory = save_policy(tmp_path / "a" / "policy", policy)
    assert sorted(path.name for path in directory.iterdir()) == ["params.npz", "policy.json"]
    back = load_policy(directory, env, model)
    assert (back.config, back.observation_space, back.action_space, back.has_own_model) == (
        policy.config,
        policy.observation_space,
        policy.action_space,
        model is not None,
    )
    assert_same((back.params, back.obs_moments), (policy.params, policy.obs_moments))
    obs = observations(policy, 7)
    np.testing.assert_array_equal(back.act(obs), policy.act(obs))
    np.testing.assert_array_equal(
        back.act(obs, jax.random.key(3)), policy.act(obs, jax.random.key(3))
    )


@pytest.fixture
def saved(policies, tmp_path):
    return save_policy(tmp_path / "policy", policies["discrete"][0])


def rewrite(directory, **changes):
    """Change these entries of ``policy.json``; None removes one."""
    path = directory / "policy.json"
    description = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: x for key, x in description.items() if x is not None}))


def repack(directory, **arrays):
    """Write other contents to ``params.npz``, with a matching checksum."""
    import hashlib

    np.savez(directory / "params.npz", **arrays)
    rewrite(
        directory, params_sha256=hashlib.sha256((directory / "params.npz").read_bytes()).hexdigest()
    )


def not_a_policy(directory):
    return (
        f"{directory} is not a policy of purejaxppo: "
        "it needs a policy.json and a params.npz of its own"
    )


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_loading_never_unpickles(saved, tmp_path):
    repack(saved, **{"params/policy": np.array([Trap(tmp_path / "sprung")], object)})
    assert str(saved) in sentence_of(lambda: load_policy(saved))
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_in_place_of_the_arrays_is_refused(saved, tmp_path):
    import hashlib
    import pickle

    packed = pickle.dumps(Trap(tmp_path / "sprung"))
    (saved / "params.npz").write_bytes(packed)
    rewrite(saved, params_sha256=hashlib.sha256(packed).hexdigest())
    assert str(saved) in sentence_of(lambda: load_policy(saved))
    assert not (tmp_path / "sprung").exists()


def test_truncated_parameters_are_refused(saved):
    packed = (saved / "params.npz").read_bytes()
    expected = f"{saved / 'params.npz'} is damaged: its checksum is not the one that was saved"
    for size in (0, 1, len(packed) // 2, len(packed) - 1):
        (saved / "params.npz").write_bytes(packed[:size])
        assert sentence_of(lambda: load_policy(saved)) == expected


@pytest.mark.parametrize("size", [0, 10, 200])
def test_a_truncated_description_is_refused(saved, size):
    text = (saved / "policy.json").read_text()
    (saved / "policy.json").write_text(text[:size])
    assert sentence_of(lambda: load_policy(saved)) == not_a_policy(saved)


@pytest.mark.parametrize("name", ["policy.json", "params.npz"])
def test_a_missing_file_is_refused(saved, name):
    (saved / name).unlink()
    assert sentence_of(lambda: load_policy(saved)) == not_a_policy(saved)


def test_a_missing_or_foreign_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("text")
    for directory in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        message = sentence_of(lambda directory=directory: load_policy(directory))
        assert message == not_a_policy(directory)


@pytest.mark.parametrize(
    "content",
    ["[]", "3", '"policy"', "null", "{}", '{"format": "another"}', "\udcff", "[" * 10**5],
    ids=lambda text: text[:10].encode("ascii", "replace").decode(),
)
def test_a_description_with_other_contents_is_refused(saved, content):
    (saved / "policy.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert sentence_of(lambda: load_policy(saved)) == not_a_policy(saved)


def test_the_error_for_a_newer_format_names_its_version(saved):
    rewrite(saved, format_version=4)
    message = sentence_of(lambda: load_policy(saved))
    assert message.startswith(
        f"{saved} has format version 4, and this version of purejaxppo reads 1 and 2 and 3"
    )


@pytest.mark.parametrize(
    "dtypes",
    [
        {"params/nothing": "bfloat16"},
        {"params/policy/head/params/log_std": "bfloat17"},
        {"params/policy/trunk/params/Dense_0/bias": "bfloat17"},
        {"params/policy/trunk/params/Dense_0/bias": "O"},
        {"params/policy/trunk/params/Dense_0/bias": ["f4"]},
        {"params/policy/trunk/params/Dense_0/bias": "int32"},
        ["bfloat16"],
        3,
    ],
)
def test_wrong_dtypes_of_the_arrays_are_refused(saved, dtypes):
    rewrite(saved, dtypes=dtypes)
    assert str(saved) in sentence_of(lambda: load_policy(saved))


def write_format_1(directory, config, space, arrays, own_model=False):
    """A policy in the format of the first versions."""
    directory.mkdir()
    (directory / "policy.json").write_text("{}")
    rewrite(
        directory, format="purejaxppo policy", format_version=1, config=config, own_model=own_model
    )
    rewrite(directory, observation_space=space, action_space={"kind": "discrete", "n": 2})
    repack(directory, **arrays)
    return directory


def test_format_1_is_read(tmp_path):
    """Its bounds may be a list of equal numbers, and it does not record dtypes."""
    layer = {
        "policy/trunk/params/Dense_0/kernel": [[1, -2, 0.5], [3, 0, -1]],
        "policy/trunk/params/Dense_0/bias": [0.5, 0, -0.5],
        "policy/head/params/Dense_0/kernel": [[1, -1], [0.5, 1], [2, -3]],
        "policy/head/params/Dense_0/bias": [0.25, -0.25],
        "value/trunk/params/Dense_0/kernel": np.zeros((2, 3)),
        "value/trunk/params/Dense_0/bias": np.zeros(3),
        "value/head/params/Dense_0/kernel": np.zeros((3, 1)),
        "value/head/params/Dense_0/bias": np.zeros(1),
    }
    arrays = {f"params/{name}": np.asarray(x, np.float32) for name, x in layer.items()}
    moments = {"samples": 4, "mean": [1, 2], "m2": [4, 16]}
    arrays |= {f"obs_moments/{name}": np.asarray(x, np.float32) for name, x in moments.items()}
    space = {"kind": "box", "shape": [2], "low": [0.0, 0.0], "high": 9.0}
    config = {"env": "grid", "hidden_sizes": [3], "activation": "relu", "normalize_obs": True}
    policy = load_policy(write_format_1(tmp_path / "policy", config, space, arrays))
    assert policy.observation_space == Box((2,), 0, 9) and policy.action_space == Discrete(2)
    obs = np.random.default_rng(0).uniform(0, 9, (20, 2)).astype(np.float32)
    hidden = (obs - [[1, 2]]) / np.sqrt(np.array([[1, 4]]) + 1e-8)
    weights = [np.asarray(x) for x in layer.values()]
    hidden = np.maximum(hidden @ weights[0] + weights[1][None], 0)
    logits = hidden @ weights[2] + weights[3][None]
    assert len(set(logits.argmax(-1))) == 2
    np.testing.assert_array_equal(policy.act(obs), logits.argmax(-1))


def test_bfloat16_in_format_1_is_read_with_the_dtypes_of_the_model(tmp_path):
    """Format 1 wrote such arrays without the name of the dtype, and could not read them."""
    model = mixed_model()
    params = model.init(jax.random.key(3), jnp.zeros((1, 3)))
    arrays = {f"params/{name}": np.asarray(x) for name, x in named_leaves(params).items()}
    assert {x.dtype.name for x in arrays.values()} == {"bfloat16", "float16", "float32"}
    space = {"kind": "box", "shape": [3], "low": 0.0, "high": 1.0}
    directory = write_format_1(tmp_path / "policy", {}, space, arrays, own_model=True)
    assert_same(load_policy(directory, model=model).params, params)


def test_a_config_with_numpy_numbers_is_saved(policies, tmp_path):
    """`fit` converts them, but a policy can be made with any config that trains."""
    policy, env, _ = policies["discrete"]
    config = TINY.replace(
        num_envs=np.int64(2), hidden_sizes=[np.int64(4)], lr=np.float32(0.5), env="grid"
    )
    policy = Policy(
        config=config,
        params=policy.params,
        obs_moments=None,
        model=policy.model,
        observation_space=env.observation_space,
        action_space=env.action_space,
    )
    back = load_policy(save_policy(tmp_path / "policy", policy))
    assert back.config == TINY.replace(lr=0.5, env="grid")


def test_parameters_that_cannot_be_loaded_are_not_saved(policies, tmp_path):
    policy, env, model = policies["custom model"]
    params = policy.params | {"steps": jnp.int32(3)}
    policy = Policy(
        config=TINY,
        params=params,
        obs_moments=None,
        model=model,
        observation_space=env.observation_space,
        action_space=env.action_space,
    )
    message = sentence_of(lambda: save_policy(tmp_path / "policy", policy))
    expected = "the parameter 'steps' has the type int32: parameters must be floating-point arrays"
    assert message == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["config", "observation_space", "action_space", "own_model", "params_sha256"]
)
def test_the_error_for_a_missing_entry_names_it(saved, name):
    rewrite(saved, **{name: None})
    message = sentence_of(lambda: load_policy(saved))
    assert message == f"{saved / 'policy.json'} is damaged: it lacks {name}"


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("config", {"activation": "rellu"}, "did you mean 'relu'?"),
        ("config", {"new_field": 1}, "'new_field' is not a setting"),
        ("config", 3, "a configuration is a Config or a mapping, not int"),
        ("action_space", {"kind": "graph"}, "is not a space that this version knows"),
        ("action_space", {"kind": "discrete"}, "is not a space that this version knows"),
        (
            "action_space",
            {"kind": "discrete", "n": 3, "m": 4},
            "is not a space that this version knows",
        ),
        ("action_space", {"kind": "discrete", "n": "three"}, ""),
        ("action_space", {"kind": ["discrete"], "n": 3}, "is not a space that this version knows"),
        ("observation_space", {"kind": "box", "shape": 6, "low": 0, "high": 1}, ""),
        (
            "observation_space",
            {"kind": "box", "shape": [2, 4], "low": 0.0, "high": 1.0},
            "do not fit the model",
        ),
        ("action_space", {"kind": "discrete", "n": 4}, "do not fit the model"),
    ],
)
def test_a_description_with_a_wrong_entry_is_refused(saved, name, value, part):
    rewrite(saved, **{name: value})
    assert part in sentence_of(lambda: load_policy(saved))


def test_parameters_of_other_sizes_or_other_networks_are_refused(policies, saved):
    expected = (
        f"the parameters in {saved} do not fit the model: other sizes or another network made them"
    )
    config = json.loads((saved / "policy.json").read_text())["config"]
    rewrite(saved, config=config | {"hidden_sizes": [5]})
    assert sentence_of(lambda: load_policy(saved)) == expected
    rewrite(saved, config=config)
    repack(saved, other=np.zeros(3))
    assert sentence_of(lambda: load_policy(saved)) == expected


def test_parameters_that_are_not_numbers_are_refused(saved):
    arrays = dict(np.load(saved / "params.npz"))
    repack(saved, **{name: np.full(x.shape, "x") for name, x in arrays.items()})
    assert str(saved) in sentence_of(lambda: load_policy(saved))


def test_moments_that_are_incomplete_or_missing_are_refused(policies, tmp_path):
    saved = save_policy(tmp_path / "policy", policies["normalised"][0])
    arrays = dict(np.load(saved / "params.npz"))
    del arrays["obs_moments/m2"]
    repack(saved, **arrays)
    assert str(saved) in sentence_of(lambda: load_policy(saved))
    repack(saved, **{name: x for name, x in arrays.items() if not name.startswith("obs_moments")})
    assert str(saved) in sentence_of(lambda: load_policy(saved))


def test_an_environment_with_other_spaces_is_refused(saved):
    other = grid(Discrete(4))
    expected = f"the policy in {saved} was not trained for the spaces of grid"
    assert sentence_of(lambda: load_policy(saved, env=other)) == expected
    assert load_policy(saved, env=grid()).action_space == DISCRETE


def test_a_custom_model_is_needed_again(policies, tmp_path):
    directory = save_policy(tmp_path / "policy", policies["custom model"][0])
    message = sentence_of(lambda: load_policy(directory))
    expected = (
        f"the policy in {directory} has a model of its own: load_policy(directory, model=...)"
    )
    assert message == expected
    assert "do not fit the model" in sentence_of(
        lambda: load_policy(directory, model=linear_model(actions=4))
    )


def contents(directory):
    """{path: bytes} of all files below a directory, {path: None} of all directories."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def test_an_existing_directory_is_refused_and_left_alone(policies, tmp_path):
    policy = policies["discrete"][0]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine too")
    before = contents(tmp_path)
    for name in ("mine", "empty", "file"):
        expected = f"{tmp_path / name} exists already; choose another directory for the policy"
        assert sentence_of(lambda name=name: save_policy(tmp_path / name, policy)) == expected
    assert contents(tmp_path) == before


def test_a_directory_that_cannot_be_made_gives_one_sentence(policies, tmp_path):
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    message = sentence_of(
        lambda: save_policy(tmp_path / "file" / "below" / "policy", policies["discrete"][0])
    )
    assert message.startswith(f"cannot write to {tmp_path / 'file' / 'below'}: ")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failed_save_leaves_no_files(policies, tmp_path, monkeypatch, error):
    def fail(path, **arrays):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(type(error)):
        save_policy(tmp_path / "policy", policies["discrete"][0])
    assert list(tmp_path.iterdir()) == []
