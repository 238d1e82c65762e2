"""Parameters in any containers and floating-point types survive runs, resumption and sweeps.

Unsupported parameters are refused before a run starts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from killed import Killed
from sentences import sentence_of
from small_envs import counter, linear_model, mixed_model

from purejaxppo import Config, fit, load_policy, make_train, sweep
from purejaxppo.runs import chunks, evaluation, job, programs
from purejaxppo.runs.checkpoints import Checkpoints
from purejaxppo.runs.store import Store
from purejaxppo.sweeps import portions
from purejaxppo.types import Reward, Rewards

CONFIG = Config(
    num_envs=2, num_steps=4, num_minibatches=1, num_epochs=1, total_timesteps=32, normalize_obs=True
)
ENV = counter(limit=9, longest=12)
MODEL = mixed_model()


@pytest.fixture(autouse=True, scope="module")
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """Runs and sweeps of two agents share programs, compiled once; every chunk is one iteration."""
    cache = {}

    make_evaluate = evaluation.make_evaluate

    def compile_once(job_, agents, *rest, **options):
        (setup,) = job_.trainer_of.args
        if (setup.config, agents) not in cache:
            programs_ = programs.compile_programs(job_, agents, *rest, **options)
            cache[setup.config, agents] = programs_
        return cache[setup.config, agents]

    def make_once(*arguments):
        if "evaluate" not in cache:
            cache["evaluate"] = make_evaluate(*arguments)
        return cache["evaluate"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_SECONDS", 0)
        patch.setattr(job, "compile_programs", compile_once)
        patch.setattr(portions, "compile_programs", compile_once)
        patch.setattr(evaluation, "make_evaluate", make_once)
        yield


def assert_same(got, expected):
    """The same structure, types and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def train(directory, stop=None, resume=False):
    def watch(progress):
        if progress.iterations == stop:
            raise Killed

    options = {"eval_every": 2, "eval_episodes": 4, "checkpoint_seconds": 0.0, "resume": resume}
    return fit(
        CONFIG,
        seeds=2,
        key=5,
        env=ENV,
        model=MODEL,
        directory=directory,
        on_progress=watch,
        **options,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run without interruption, and its directory."""
    directory = tmp_path_factory.mktemp("through") / "run"
    return train(directory), directory


def test_a_run_keeps_structure_and_types_of_its_parameters(uninterrupted):
    run, directory = uninterrupted
    fresh = MODEL.init(jax.random.key(0), jnp.zeros((1, 3)))
    params = run.state.params
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    assert [x.dtype for x in jax.tree.leaves(params)] == [x.dtype for x in jax.tree.leaves(fresh)]
    obs = jnp.asarray(np.random.default_rng(0).normal(0, 5, (20, 3)), jnp.float32)
    for name, expected in (("policy", run.policy(1)), ("best_policy", run.best_policy(1))):
        loaded = load_policy(directory / name / "seed_1", env=ENV, model=MODEL)
        assert_same((loaded.params, loaded.obs_moments), (expected.params, expected.obs_moments))
        np.testing.assert_array_equal(loaded.act(obs), expected.act(obs))


def test_metrics_of_a_model_in_bfloat16_are_float32(uninterrupted):
    run, directory = uninterrupted
    numbers = [x for x in jax.tree.leaves(run.metrics) if x.dtype.kind not in "iu"]
    assert {x.dtype.name for x in numbers} == {"float32"}
    rows = np.genfromtxt(directory / "metrics.csv", delimiter=",", names=True)
    np.testing.assert_array_equal(np.float32(rows["grad_norm"]), run.metrics.grad_norm.T.ravel())


def test_a_killed_run_resumes_bit_for_bit(uninterrupted, tmp_path):
    with pytest.raises(Killed):
        train(tmp_path / "run", stop=3)
    run = train(tmp_path / "run", resume=True)
    expected, directory = uninterrupted
    assert run.resumed_at == 2
    assert_same(
        (run.state.params, run.state.update), (expected.state.params, expected.state.update)
    )
    assert_same((run.best.params, run.metrics), (expected.best.params, expected.metrics))
    for name in ("metrics.csv", "evaluations.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (directory / name).read_bytes()


def test_a_checkpoint_distinguishes_paths_that_read_the_same(tmp_path):
    tree = {
        "a": {"b": jnp.arange(2.0)},
        "a.b": jnp.arange(3),
        "a.b'": jnp.zeros((), jnp.bfloat16),
        "none": [{}, ()],
    }
    Checkpoints(Store(tmp_path / "checkpoints")).save(1, tree, {})
    assert_same(Checkpoints(Store(tmp_path / "checkpoints")).restore(tree).arrays, tree)


def test_a_sweep_keeps_structure_and_types_of_its_parameters(uninterrupted, tmp_path, monkeypatch):
    """Two portions of two members; after the interruption the first is read from its file."""
    saved = []
    save = portions.save_portion

    def save_one(path, part):
        if saved:
            raise Killed
        saved.append(part)
        save(path, part)

    options = {"env": ENV, "model": MODEL, "key": 5, "seeds": 4, "at_once": 2, "eval_episodes": 0}
    options["directory"] = tmp_path / "sweep"
    monkeypatch.setattr(portions, "save_portion", save_one)
    with pytest.raises(Killed):
        sweep(CONFIG, **options)
    monkeypatch.setattr(portions, "save_portion", save)
    result = sweep(CONFIG, resume=True, **options)
    assert len(result.parts) == 2
    assert_same(result.parts[0], saved[0])
    for member in range(2):
        policy = result.policy(member)
        assert_same(
            policy.params, jax.tree.map(lambda x, i=member: jnp.asarray(x[i]), saved[0].params)
        )
        assert policy.act(jnp.zeros((2, 3))).shape == (2,)


def test_a_network_without_hidden_layers_can_be_trained():
    for shared in (False, True):
        config = CONFIG.replace(hidden_sizes=(), shared_trunk=shared)
        params = jax.eval_shape(make_train(config, ENV), jax.random.key(0)).state.params
        assert (params["trunk"] if shared else params["value"]["trunk"]) == {}
        assert params["policy"]["head"]["params"]["Dense_0"]["kernel"].shape == (3, 3)


# --------------------------------------------------------------------------- refused before a run


def with_params(change):
    """The linear model with changed parameters; it never runs."""
    linear = linear_model()
    return linear._replace(init=lambda key, obs: change(linear.init(key, obs)))


def vector_metric(state, transitions, config, frozen):
    return Rewards(transitions.reward, state, {"parts": jnp.zeros(3)}, {})


FRESH = linear_model().init(jax.random.key(0), jnp.zeros((1, 3)))
REFUSED = {
    "integers": (
        {"model": with_params(lambda x: x | {"steps": jnp.int32(0)})},
        "the parameter 'steps' has the type int32: parameters must be floating-point arrays",
    ),
    "a random key": (
        {"model": with_params(lambda x: x | {"key": jax.random.key(0)})},
        "the parameter 'key' has the type key<fry>: parameters must be floating-point arrays",
    ),
    "no parameters": (
        {"model": with_params(lambda x: {"policy": {}, "value": ()})},
        "the model has no parameters: there is nothing to train",
    ),
    "a vector as a metric": (
        {"reward_fn": Reward(lambda config: (), vector_metric)},
        "the metric 'parts' has the shape (3,): it must be one number",
    ),
    "a list for trpo": (
        {"model": with_params(lambda x: list(x.values())), "algorithm": "trpo"},
        "trpo needs params with the keys 'policy' and 'value' only; this model has a list",
    ),
}
STARTS = {
    "integers": (
        FRESH | {"value": {"w": np.arange(3), "b": 0.0}},
        "the parameter 'value/w' has the type int32: parameters must be floating-point arrays",
    ),
    "another shape": (
        FRESH | {"value": {"w": np.zeros(4), "b": 0.0}},
        "params do not fit the model: 'value/w' has the shape (4,), and the model needs (3,)",
    ),
    "something missing": (
        FRESH | {"value": {"w": np.zeros(3)}},
        "params do not fit the model: they lack 'value/b'",
    ),
    "something more": (
        FRESH | {"more": np.zeros(3)},
        "params do not fit the model: it has no 'more'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("run", [fit, sweep])
def test_unsupported_models_and_metrics_are_refused_before_a_directory_exists(name, run, tmp_path):
    options, expected = REFUSED[name]
    options = {"algorithm": "ppo"} | options
    config = CONFIG.replace(algorithm=options.pop("algorithm"))
    assert (
        sentence_of(lambda: run(config, env=ENV, directory=tmp_path / "run", **options)) == expected
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", STARTS)
def test_initial_parameters_that_do_not_fit_are_refused_before_a_directory_exists(name, tmp_path):
    params, expected = STARTS[name]
    options = {"env": ENV, "model": linear_model(), "directory": tmp_path / "run"}
    assert sentence_of(lambda: fit(CONFIG, params=params, **options)) == expected
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_model_is_raised_before_a_directory_exists(tmp_path):
    def unroll(params, carry, obs, reset):
        raise RuntimeError("mine")

    model = linear_model()._replace(unroll=unroll)
    for run in (fit, sweep):
        with pytest.raises(RuntimeError, match="mine"):
            run(CONFIG, env=ENV, model=model, directory=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
