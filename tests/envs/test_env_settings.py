"""Settings of an environment are kept with its name in runs, policies, sweeps and comparisons.

The environment here has episodes of exactly ``limit`` steps, with the return limit (limit + 1) / 2.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from sentences import sentence_of
from small_envs import counter

from purejaxppo import (
    Config,
    Policy,
    compare,
    envs,
    evaluate,
    fit,
    load_policy,
    make_trainer,
    sweep,
)
from purejaxppo.cli import commands
from purejaxppo.envs import gymnax as gymnax_adapter
from purejaxppo.normalize import Normalizer
from purejaxppo.policies import render as render_module
from purejaxppo.runs import fit as fit_module
from purejaxppo.runs import run_directory
from purejaxppo.runs.evaluation import Best
from purejaxppo.runs.fit import fingerprint
from purejaxppo.sweeps import compare as compare_module
from purejaxppo.sweeps import sweep as sweep_module
from purejaxppo.sweeps.grid import groups_of, settings_of

SMALL = {"num_envs": 2, "num_steps": 4, "num_minibatches": 1, "num_epochs": 1, "hidden_sizes": (4,)}
TINY = Config(total_timesteps=16, **SMALL)
KEY = jax.random.key(0)


class StopError(Exception):
    """Ends a call where the test needs nothing more."""


@pytest.fixture(autouse=True, scope="module")
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(envs._registered, "steps", lambda limit=8: counter(limit=limit, longest=0))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in an environment object; its config names another environment and settings."""
    config = TINY.replace(env="CartPole-v1", env_settings={"max_steps_in_episode": 50})
    directory = tmp_path_factory.mktemp("run") / "run"
    return fit(config, env=envs.make("steps", limit=3), directory=directory), directory


def call(*arguments):
    """(exit code, stdout) of a command."""
    with pytest.MonkeyPatch.context() as patch:
        console = Console(highlight=False, soft_wrap=True, width=200, record=True)
        patch.setattr(commands, "console", console)
        code = 0
        try:
            commands.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code or 0
        return code, console.export_text()


# ------------------------------------------------------------------------------ a run and its files


def test_a_run_in_an_environment_object_has_its_name_and_settings(run):
    trained, directory = run
    assert (trained.config.env, trained.config.env_settings) == ("steps", (("limit", 3),))
    assert trained.metrics.episode_length[0, -1] == 3
    description = json.loads((directory / "config.json").read_text())["config"]
    assert (description["env"], description["env_settings"]) == ("steps", {"limit": 3})
    assert Config.from_dict(description) == trained.config
    description = json.loads((directory / "policy" / "policy.json").read_text())
    assert description["config"]["env_settings"] == {"limit": 3}


def test_evaluation_without_an_environment_uses_the_training_environment(run):
    trained, directory = run
    for policy in (trained.policy(), load_policy(directory / "policy")):
        got = evaluate(policy, None, KEY, 2)
        assert got.lengths.tolist() == [3, 3] and got.returns.tolist() == [6.0, 6.0]
    assert evaluate(trained.policy(), envs.make("steps"), KEY, 2).lengths.tolist() == [8, 8]
    code, shown = call("evaluate", directory, "--episodes", 2)
    assert code == 0 and "steps (limit=3): return over 2 fresh episodes" in shown
    assert "policy │ 6.0 ± 0.0 │ 6.0 ± 0.0 │ 3 │" in " ".join(shown.split())


def test_a_policy_saved_before_env_settings_existed_can_be_loaded(run, tmp_path):
    _, directory = run
    description = json.loads((directory / "policy" / "policy.json").read_text())
    del description["config"]["env_settings"]
    (tmp_path / "policy.json").write_text(json.dumps(description))
    (tmp_path / "params.npz").write_bytes((directory / "policy" / "params.npz").read_bytes())
    policy = load_policy(tmp_path)
    assert policy.config.env_settings == ()
    assert evaluate(policy, None, KEY, 2).lengths.tolist() == [8, 8]


def test_an_environment_that_is_not_registered_must_be_given(run):
    own = counter(limit=3, longest=0)._replace(name="my own")
    policy = Policy.from_state(TINY, run[0].state, env=own)
    message = sentence_of(lambda: evaluate(policy, None, KEY, 2))
    assert message.startswith("'my own' is not an environment") and "or given as an Env" in message
    assert evaluate(policy, own, KEY, 2).lengths.tolist() == [3, 3]
    unrecorded = own._replace(name="steps", settings=None)
    policy = Policy.from_state(TINY, run[0].state, env=unrecorded)
    assert sentence_of(lambda: evaluate(policy, None, KEY, 2)) == (
        "the settings that steps was made with were not recorded, because they were arrays or "
        "traced values: give the environment itself, or set env_settings"
    )
    assert evaluate(policy, unrecorded, KEY, 2).lengths.tolist() == [3, 3]


# ------------------------------------------------------------------------------------------ resume


def begin_run(directory, config):
    """A run that was interrupted before its first checkpoint."""
    return run_directory.reserve(directory, fingerprint(config, 1) | {"key": 0}, "checkpoints")


def test_a_run_resumes_only_with_its_own_settings(tmp_path):
    config = TINY.replace(env="steps", env_settings={"limit": 3})
    directory = begin_run(tmp_path / "run", config)
    for other, there in (
        ({"env_settings": {"limit": 4}}, {"limit": 4}),
        ({"env_settings": {}}, {}),
    ):
        message = sentence_of(
            lambda other=other: fit(config.replace(**other), directory=directory, resume=True)
        )
        differ = f"env_settings = {{'limit': 3}} there and {there} here"
        assert message == f"the run in {directory} was started with other settings: {differ}"
    with run_directory.open_run_directory(directory, fingerprint(config, 1), 0, True) as store:
        assert store.directory == directory
    assert run_directory.unfinished(tmp_path, "*", fingerprint(config, 1), 0) == directory
    assert run_directory.unfinished(tmp_path, "*", fingerprint(TINY, 1), 0) is None


def test_a_run_begun_before_env_settings_existed_can_be_resumed(tmp_path):
    config = TINY.replace(env="steps")
    directory = begin_run(tmp_path / "run", config)
    description = json.loads((directory / "config.json").read_text())
    del description["config"]["env_settings"]
    (directory / "config.json").write_text(json.dumps(description))
    with run_directory.open_run_directory(directory, fingerprint(config, 1), 0, True) as store:
        assert store.directory == directory
    assert run_directory.unfinished(tmp_path, "*", fingerprint(config, 1), 0) == directory
    message = sentence_of(
        lambda: fit(config.replace(env_settings={"limit": 4}), directory=directory, resume=True)
    )
    assert message.endswith("env_settings = {} there and {'limit': 4} here")


# ------------------------------------------------------------------------------- sweep and compare


def test_a_sweep_trains_and_scores_in_the_settings_and_can_sweep_over_them():
    config = TINY.replace(env="steps", env_settings={"limit": 7})
    result = sweep(config, seeds=1, grid={"env_settings": [{"limit": 3}]}, eval_episodes=2)
    assert result.scores["score"].tolist() == [6.0]
    assert result.scores["env_settings"].tolist() == [(("limit", 3),)]
    assert result.best.env_settings == (("limit", 3),)
    assert evaluate(result.policy(0), None, KEY, 2).lengths.tolist() == [3, 3]


def test_each_env_settings_value_of_a_grid_is_a_separate_group():
    grid = {"env_settings": [{"limit": 3}, {"limit": 2}], "lr": [0.1, 0.2]}
    settings = settings_of(TINY.replace(env="steps"), grid, 0, np.random.default_rng(0))
    groups = groups_of(TINY.replace(env="steps"), settings)
    assert [(group.config.env_settings, group.settings) for group in groups] == [
        ((("limit", 3),), (0, 1)),
        ((("limit", 2),), (2, 3)),
    ]
    message = sentence_of(lambda: sweep(TINY, 1, grid, env=envs.make("steps")))
    assert message == "env_settings is swept over: leave the environment object out"


def test_a_sweep_in_an_environment_object_has_its_settings(monkeypatch):
    plans = []

    def stop(plan):
        plans.append(plan)
        raise StopError

    configs = []
    monkeypatch.setattr(
        sweep_module, "fingerprint", lambda config, *rest: configs.append(config) or {}
    )
    with pytest.raises(StopError):
        sweep(TINY, 1, env=envs.make("steps", limit=3), on_plan=stop)
    assert len(plans) == 1 and (configs[0].env, configs[0].env_settings) == (
        "steps",
        (("limit", 3),),
    )


def test_a_sweep_over_an_unknown_setting_is_refused_before_it_trains():
    grid = {"env_settings": [{"limit": 3}, {"limt": 2}]}
    assert "unexpected keyword argument 'limt'" in sentence_of(
        lambda: sweep(TINY.replace(env="steps"), 1, grid)
    )


def test_a_comparison_trains_in_the_settings(tmp_path, monkeypatch):
    found = []

    def stop(setup, **options):
        found.append(setup.config.env_settings)
        raise StopError

    monkeypatch.setattr(compare_module, "fit", stop)
    changes = SMALL | {"total_timesteps": 16, "env_settings": {"limit": 3}}
    with pytest.raises(StopError):
        compare(["steps"], ["ppo"], changes=changes, directory=tmp_path / "here")
    assert found == [(("limit", 3),)]
    description = json.loads((tmp_path / "here" / "config.json").read_text())
    assert description["configs"][0]["env_settings"] == {"limit": 3}
    message = sentence_of(
        lambda: compare(["steps"], ["ppo"], changes={"env_settings": {"limt": 3}})
    )
    assert "unexpected keyword argument 'limt'" in message


# --------------------------------------------------------------------------------------- rendering


def test_an_episode_is_played_and_drawn_in_the_settings(tmp_path, monkeypatch):
    drawn = []

    def drawing(name, **settings):
        def draw(states, returns, path):
            drawn.append((name, settings, len(states)))
            path.write_bytes(b"GIF89a")

        return draw

    monkeypatch.setattr(gymnax_adapter, "drawing", drawing)
    config = TINY.replace(env="CartPole-v1", env_settings={"max_steps_in_episode": 3})
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape), jax.eval_shape(make_trainer(config).init, KEY).params
    )
    policy = Policy.from_state(
        config, Best(zeros, Normalizer(None, None), jnp.int32(1), jnp.zeros(()))
    )
    _, episode_return = render_module.animate(policy, tmp_path / "x.gif")
    assert drawn == [("CartPole-v1", {"max_steps_in_episode": 3}, 4)] and episode_return == 3.0


def test_pictures_are_drawn_with_the_sizes_of_the_settings(monkeypatch):
    """gymnax draws with the parameters passed to it."""
    from gymnax import visualize

    radii = []

    class Visualizer:
        def __init__(self, env, params, states, returns):
            radii.append(params.circle_radius)

        def animate(self, path):
            pass

    monkeypatch.setattr(visualize, "Visualizer", Visualizer)
    gymnax_adapter.drawing("PointRobot-misc", circle_radius=3.0)([], [], "x.gif")
    assert radii == [3.0]


# ------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["limit=3"], {"limit": 3}),
        (["b=2.5e-1", "a=-1"], {"a": -1, "b": 0.25}),
        (
            ["a=true", "b=False", "c=None", "d=hard", "e=1.5.2", "f="],
            {"a": True, "b": False, "c": None, "d": "hard", "e": "1.5.2", "f": ""},
        ),
        (
            ["a=(1,2.5)", "b=[1,[2]]", "c='7'", "d=x=y"],
            {"a": (1, 2.5), "b": (1, (2,)), "c": "7", "d": "x=y"},
        ),
        ([], {}),
    ],
)
def test_the_options_of_train_sweep_and_compare(monkeypatch, words, expected):
    found = []

    def stop(*arguments, **named):
        found.append((arguments, named))
        raise StopError

    monkeypatch.setattr(fit_module, "fit", stop)
    monkeypatch.setattr(sweep_module, "sweep", stop)
    monkeypatch.setattr(compare_module, "compare", stop)
    monkeypatch.setattr(commands, "split_cpu", lambda num_devices: None)
    monkeypatch.setitem(envs._registered, "any", lambda **settings: counter())
    for command in (["train", "--env", "any"], ["sweep", "--env", "any"], ["compare"]):
        with pytest.raises(StopError):
            commands.main([*command, *(["--env-settings", *words] if words else [])])
    (train, _), (swept, _), (_, compared) = found
    pairs = Config(env_settings=expected).env_settings
    assert train[0].config.env_settings == pairs and swept[0].env_settings == pairs
    assert Config(env_settings=compared["changes"].get("env_settings", {})).env_settings == pairs


def test_the_settings_of_the_grid_of_a_sweep(monkeypatch):
    found = []

    def stop(*arguments, **named):
        found.append(named["grid"])
        raise StopError

    monkeypatch.setattr(sweep_module, "sweep", stop)
    monkeypatch.setattr(commands, "split_cpu", lambda num_devices: None)
    with pytest.raises(StopError):
        commands.main(
            ["sweep", "--env", "steps", "--grid", "env_settings=limit=3,limit=4+longest=2"]
        )
    assert found == [{"env_settings": [{"limit": 3}, {"limit": 4, "longest": 2}]}]


ONCE_EACH = "must be a name and its value, once each, such as max_steps_in_episode=50"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["limit"], f"env_settings: 'limit' {ONCE_EACH}"),
        (["=3"], f"env_settings: '=3' {ONCE_EACH}"),
        (["a=1", "a=2"], f"env_settings: 'a=2' {ONCE_EACH}"),
        (
            ["limt=3"],
            "'steps' cannot be made with these settings: "
            "got an unexpected keyword argument 'limt'; it has limit",
        ),
        (
            ["limit={1:2}"],
            "env_settings['limit'] = {1: 2}: "
            "it must be a finite number, a string, True, False, None or a tuple of these",
        ),
    ],
)
def test_a_wrong_setting_gives_one_sentence_and_writes_nothing(words, message, capsys, tmp_path):
    directory = tmp_path / "run"
    code, shown = call(
        "train", "--env", "steps", "--env-settings", *words, "--directory", directory
    )
    assert (code, shown, capsys.readouterr().err) == (2, "", f"purejaxppo: {message}\n")
    assert not directory.exists()


def test_an_environment_without_a_bound_is_refused_before_training(
    capsys, monkeypatch, tmp_path, run
):
    """And `evaluate` takes a bound by --max-steps."""
    monkeypatch.setitem(
        envs._registered,
        "steps",
        lambda limit=8: counter(limit=limit, longest=0)._replace(max_episode_steps=None),
    )
    directory = tmp_path / "run"
    assert call("train", "--env", "steps", "--directory", directory)[0] == 2
    message = (
        "steps has no bound on the length of an episode, "
        "so its policies cannot be evaluated at the end"
    )
    assert message in capsys.readouterr().err
    assert not directory.exists()
    assert call("evaluate", run[1], "--episodes", 2)[0] == 2
    assert "say by max_steps" in capsys.readouterr().err
    code, shown = call("evaluate", run[1], "--episodes", 2, "--max-steps", 2)
    assert code == 0 and np.char.count(shown, "3.0 ± 0.0") == 2  # 1 + 2
