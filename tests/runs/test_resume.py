"""A killed run resumes from its newest valid checkpoint and ends with the same result."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_once import compiled_once
from killed import Killed
from small_envs import LINEAR, counter

from purejaxppo import Config, ConfigError, fit, load_policy, make_trainer, sweep
from purejaxppo.population import Population
from purejaxppo.runs.checkpoints import Checkpoints, _leaves
from purejaxppo.runs.disk import locked
from purejaxppo.runs.run_directory import reserve
from purejaxppo.runs.store import Store

CONFIG = Config(num_envs=2, num_steps=4, num_minibatches=1, num_epochs=1, total_timesteps=96)
CONFIG = CONFIG.replace(normalize_obs=True, normalize_reward=True)
K = 12
RUN = {"key": 5, "env": counter(limit=9, longest=12), "model": LINEAR}
RESUME = {"resume": True, "checkpoint_seconds": 1e9}  # no periodic checkpoints
OPTIONS = {"eval_every": 3, "eval_episodes": 4, "checkpoint_seconds": 0.0}


@pytest.fixture(autouse=True, scope="module")
def short_chunks_compiled_once():
    """Every chunk is one iteration; equal runs share their compiled programs."""
    with compiled_once():
        yield


def train(directory, stop=None, seeds=2, config=CONFIG, **options):
    """Train in the directory; after iteration ``stop`` the run is killed."""

    def watch(now):
        if now.iterations == stop:
            raise Killed

    try:
        return fit(
            config, seeds=seeds, directory=directory, on_progress=watch, **(RUN | OPTIONS | options)
        )
    except Killed:
        return None


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run without interruptions: (run, directory)."""
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    return train(directory), directory


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The directory of a run that was killed in iteration 8: checkpoints after 6 and 7."""
    directory = tmp_path_factory.mktemp("killed") / "run"
    assert train(directory, stop=8) is None
    assert sorted(path.name for path in (directory / "checkpoints").glob("*.json")) == [
        "iteration_00000006.json",
        "iteration_00000007.json",
    ]
    return directory


@pytest.fixture
def copy(killed, tmp_path):
    shutil.copytree(killed, tmp_path / "run")
    return tmp_path / "run"


def assert_same(run, directory, uninterrupted):
    """The whole state, every metric, every evaluation and every file, bit for bit."""
    expected, expected_directory = uninterrupted

    def equal(a, b):
        a, b = (
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in (a, b)
        )
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(
        equal, (run.state, run.metrics, run.best), (expected.state, expected.metrics, expected.best)
    )
    jax.tree.map(equal, dict(run.evaluations), dict(expected.evaluations))
    for name in ("metrics.csv", "evaluations.csv"):
        assert (directory / name).read_bytes() == (expected_directory / name).read_bytes()
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        path.name for path in expected_directory.iterdir()
    )


@pytest.mark.exact
def test_a_killed_run_resumes_from_its_checkpoint(copy, uninterrupted):
    run = train(copy, resume=True)
    assert run.resumed_at == 7
    assert_same(run, copy, uninterrupted)


@pytest.mark.exact
def test_a_run_killed_twice_and_before_its_first_checkpoint(tmp_path, uninterrupted):
    directory = tmp_path / "run"
    train(directory, stop=2, checkpoint_seconds=1e9)
    assert list((directory / "checkpoints").iterdir()) == []
    train(directory, stop=5, resume=True)
    run = train(directory, resume=True)
    assert run.resumed_at == 4
    assert_same(run, directory, uninterrupted)


@pytest.mark.exact
def test_a_run_of_one_agent_resumes_too(tmp_path):
    directory = tmp_path / "run"
    whole = train(None, seeds=1)
    train(directory, stop=7, seeds=1)
    run = train(directory, seeds=1, resume=True)
    assert run.resumed_at == 6
    jax.tree.map(np.testing.assert_array_equal, run.state.params, whole.state.params)
    jax.tree.map(np.testing.assert_array_equal, run.metrics, whole.metrics)
    jax.tree.map(np.testing.assert_array_equal, run.best.params, whole.best.params)


@pytest.mark.exact
@pytest.mark.parametrize(
    "damage", ["truncated", "deleted", "changed", "no_manifest", "manifest_cut", "rows"]
)
def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(damage, copy, uninterrupted):
    checkpoints = copy / "checkpoints"
    newest = checkpoints / "iteration_00000007"
    file = max(
        (path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    if damage == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "deleted":
        file.unlink()
    elif damage == "changed":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "no_manifest":
        newest.with_name("iteration_00000007.json").unlink()
    elif damage == "manifest_cut":
        manifest = newest.with_name("iteration_00000007.json")
        manifest.write_text(manifest.read_text()[:100])
    else:
        os.truncate(checkpoints / "rows_00000006_00000007.npz", 10)
    if damage == "no_manifest":  # as if killed while writing: no warning
        run = train(copy, **RESUME)
    else:
        with pytest.warns(UserWarning, match=r"checkpoint .*iteration_00000007 is damaged"):
            run = train(copy, **RESUME)
    assert run.resumed_at == 6
    assert_same(run, copy, uninterrupted)


@pytest.mark.exact
def test_if_all_checkpoints_are_damaged_it_starts_again_with_a_warning(copy, uninterrupted):
    for path in (copy / "checkpoints").glob("*.npz"):
        path.unlink()
    with pytest.warns(UserWarning, match="is damaged") as warned:
        run = train(copy, **RESUME)
    assert len(warned) == 2 and run.resumed_at == 0
    assert_same(run, copy, uninterrupted)


@pytest.mark.exact
def test_a_full_disk_neither_stops_the_run_nor_harms_earlier_checkpoints(
    tmp_path, uninterrupted, monkeypatch
):
    directory = tmp_path / "run"
    save = Checkpoints.save
    full = [3, 4, 8]

    def failing(self, iteration, *arguments):
        if iteration in full:
            raise OSError(28, "No space left on device")
        save(self, iteration, *arguments)

    monkeypatch.setattr(Checkpoints, "save", failing)
    with pytest.warns(
        UserWarning, match="no checkpoint was saved after iteration 3, training goes on"
    ) as warned:
        train(directory, stop=9)
    assert len(warned) == 3
    run = train(directory, **RESUME)
    assert run.resumed_at == 7
    assert_same(run, directory, uninterrupted)


def test_a_checkpoint_that_fails_half_way_does_not_harm_the_others(
    copy, monkeypatch, uninterrupted
):
    """The disk is full when the rows are written: after the arrays and before the manifest."""

    def full(*arguments, **fields):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.warns(UserWarning, match="No space left"):
            train(copy, stop=10, resume=True)
    run = train(copy, **RESUME)
    assert run.resumed_at == 7
    assert_same(run, copy, uninterrupted)


@pytest.mark.exact
def test_killed_between_any_two_file_operations(tmp_path, uninterrupted):
    """Each time it is resumed, it is killed a few file operations later than before."""
    directory = tmp_path / "run"
    left = [0]
    killed_in = set()

    def counted(name, operation):
        def operate(*arguments, **named):
            left[0] -= 1
            if left[0] == 0:
                killed_in.add(name)
                raise Killed
            return operation(*arguments, **named)

        return operate

    targets = [(Path, name) for name in ("replace", "rename", "mkdir", "unlink", "write_text")]
    targets += [(os, "fsync"), (os, "unlink"), (np, "savez"), (shutil, "rmtree")]
    for operations in (*range(1, 12), *range(12, 300, 12)):
        left[0] = operations
        with pytest.MonkeyPatch.context() as patch:
            for target, name in targets:
                patch.setattr(target, name, counted(name, getattr(target, name)))
            try:
                if train(directory, resume=True):
                    break
            except ConfigError:  # killed while it cleaned up: the run is complete
                assert not (directory / "checkpoints").exists()
                break
    else:
        pytest.fail("the run was never completed")
    assert len(killed_in) >= 5
    for name in ("metrics.csv", "evaluations.csv"):
        assert (directory / name).read_bytes() == (uninterrupted[1] / name).read_bytes()
    for name in ("policy/seed_1", "best_policy/seed_0"):
        a, b = (load_policy(path / name, model=LINEAR) for path in (directory, uninterrupted[1]))
        jax.tree.map(
            np.testing.assert_array_equal, (a.params, a.obs_moments), (b.params, b.obs_moments)
        )


def test_an_interrupted_run_saves_and_can_be_resumed(tmp_path, uninterrupted):
    directory = tmp_path / "run"

    def press(now):
        if now.iterations == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    options = OPTIONS | {"checkpoint_seconds": 1e9}
    run = fit(CONFIG, seeds=2, directory=directory, on_progress=press, **RUN, **options)
    assert run.interrupted and int(run.state.iteration[0]) == 5
    assert (directory / "policy").is_dir() and (directory / "checkpoints").is_dir()
    run = train(directory, resume=True)
    assert run.resumed_at == 5 and not run.interrupted
    assert_same(run, directory, uninterrupted)


# ----------------------------------------------------------------------------------------- refused


def sentence(directory, **options):
    with pytest.raises(ConfigError) as error:
        train(directory, resume=True, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(directory):
    return {
        str(path): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def test_another_configuration_is_refused_with_the_fields_that_differ(copy):
    before = contents(copy)
    message = sentence(copy, config=CONFIG.replace(lr=1e-3, num_epochs=2))
    assert "num_epochs = 1 there and 2 here" in message
    assert "lr = 0.002 there and 0.001 here" in message
    assert "gamma" not in message
    assert "seeds = 2 there and 3 here" in sentence(copy, seeds=3)
    assert "evaluation = " in sentence(copy, eval_every=4)
    assert contents(copy) == before


def test_resuming_a_complete_run_or_another_directory_is_refused(uninterrupted, tmp_path):
    assert "has ended" in sentence(uninterrupted[1])
    (tmp_path / "mine").mkdir()
    assert "is not a run that can be resumed" in sentence(tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []
    assert "needs the directory" in sentence(None)


def test_a_read_only_directory_is_refused(tmp_path):
    """Root may write anywhere, so it tries as another user."""
    tmp_path.chmod(0o500)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        with pytest.raises(
            ConfigError, match=r"cannot make the run directory .*: Permission denied"
        ):
            reserve(tmp_path / "run", {})
    finally:
        if is_root:
            os.seteuid(0)
        tmp_path.chmod(0o700)


def test_two_processes_cannot_train_in_one_directory(copy):
    with locked(copy):
        before = contents(copy)
        assert f"another process is training in {copy}" in sentence(copy)
    assert contents(copy) == before


def test_a_sweep_cannot_resume_a_run(copy, tmp_path):
    with pytest.raises(ConfigError, match="kind = 'fit' there and 'sweep' here"):
        sweep(CONFIG, seeds=2, directory=copy, resume=True, **RUN)


def test_whole_episodes_interrupted_after_the_last_one(tmp_path):
    """Nothing is left to train."""
    config = CONFIG.replace(algorithm="reinforce", num_steps=9, total_timesteps=60, anneal_lr=False)
    whole = train(None, config=config, eval_every=0)
    last = int(np.max(whole.state.iteration))

    def press(now):
        if now.iterations == last:
            signal.raise_signal(signal.SIGINT)

    options = RUN | {"seeds": 2, "directory": tmp_path / "run"}
    assert fit(config, on_progress=press, **options).interrupted
    run = fit(config, resume=True, **options)
    assert run.resumed_at == last
    jax.tree.map(np.testing.assert_array_equal, run.metrics, whole.metrics)
    jax.tree.map(np.testing.assert_array_equal, run.state.params, whole.state.params)


def test_a_state_with_an_empty_array_is_saved_too(tmp_path):
    """Environments of other suites may have an empty array in their state."""
    state = {"empty": jnp.zeros((0, 3)), "full": jnp.arange(3.0)}
    Checkpoints(Store(tmp_path / "checkpoints")).save(1, state, {})
    saved = Checkpoints(Store(tmp_path / "checkpoints")).restore(
        jax.tree.map(jnp.zeros_like, state)
    )
    assert saved.arrays["empty"].shape == (0, 3) and saved.arrays["full"].tolist() == [0, 1, 2]


def test_arrays_of_another_precision_are_refused(tmp_path):
    Checkpoints(Store(tmp_path / "checkpoints")).save(1, {"x": jnp.arange(3.0)}, {})
    with pytest.raises(ConfigError, match="was not written by this configuration"):
        Checkpoints(Store(tmp_path / "checkpoints")).restore({"x": np.arange(3.0)})


def test_renamed_fields_keep_their_names_on_disk():
    """Those that checkpoints of format 2 have: of REINFORCE's running mean and of a population."""
    config = Config.for_env("CartPole-v1", algorithm="reinforce", baseline="running_mean")
    state = jax.eval_shape(make_trainer(config).init, jax.random.key(0))
    names = set(_leaves((state, None)))
    assert {"0.update.past.total", "0.update.past.weight", "0.env.obs"} <= names
    assert not any("running_mean" in name for name in names)
    population = Population(*[jnp.zeros(2)] * len(Population._fields))
    assert "0.number" in _leaves((population, None))


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_other_formats_are_read_or_their_version_is_named(version, tmp_path):
    """Format 2 had the observations [B, 10, 10, 4] of images as features [B, 400]."""
    directory = tmp_path / "checkpoints"
    Checkpoints(Store(directory)).save(7, {"obs": jnp.zeros((2, 4))}, {})
    manifest = directory / "iteration_00000007.json"
    text = manifest.read_text()
    assert '"format_version": 3' in text
    manifest.write_text(text.replace('"format_version": 3', f'"format_version": {version}'))

    def restore(shape):
        return Checkpoints(Store(directory)).restore({"obs": jnp.zeros(shape)})

    if version in (1, 4):
        with pytest.raises(ConfigError, match=rf"has format version {version}, .* reads 2 and 3"):
            restore((2, 4))
        return
    assert restore((2, 4)).iteration == 7
    said = "has format version 2, in which observations" if version == 2 else "have other shapes"
    with pytest.raises(ConfigError, match=said):
        restore((2, 2, 2))


@pytest.mark.parametrize("key", [np.int64(5), jax.random.key(5), jax.random.PRNGKey(5)])
def test_every_kind_of_key_gives_the_same_run(key, uninterrupted):
    run = fit(CONFIG, seeds=2, **(RUN | {"key": key}))
    jax.tree.map(np.testing.assert_array_equal, run.state.params, uninterrupted[0].state.params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "0"}, "key = '0': it must be an integer of at least 0, or one random key"),
        ({"key": jax.random.key(0, impl="rbg")}, "or one random key of JAX's default kind"),
        (
            {"checkpoint_seconds": float("nan")},
            "checkpoint_seconds = nan: it must be a number of seconds",
        ),
        ({"eval_every": -1}, "eval_every = -1"),
    ],
)
def test_wrong_arguments_give_one_sentence(options, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        fit(CONFIG, **(RUN | {"directory": tmp_path / "run"} | options))
    assert message in str(error.value) and not (tmp_path / "run").exists()


def test_resume_without_a_run_starts_one(tmp_path, uninterrupted):
    run = train(tmp_path / "run", resume=True)
    assert run.resumed_at == 0
    assert_same(run, tmp_path / "run", uninterrupted)


def test_only_arrays_are_loaded(copy):
    """A pickle among the rows, with a correct checksum."""
    checkpoints = copy / "checkpoints"
    part = checkpoints / "rows_00000006_00000007.npz"
    np.savez(part, **{"metrics/x": np.array([[print]], dtype=object)})
    for path in checkpoints.glob("*.json"):
        manifest = json.loads(path.read_text())
        if part.name in manifest["rows"]:
            manifest["rows"][part.name] = hashlib.sha256(part.read_bytes()).hexdigest()
            path.write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="is damaged"):
        assert train(copy, **RESUME).resumed_at == 6


# ---------------------------------------------------------------------------------- evaluations


def test_evaluating_changes_nothing_else(uninterrupted):
    plain = train(None, eval_every=0)
    often = train(None, eval_every=1)
    for run in (plain, often):
        jax.tree.map(np.testing.assert_array_equal, run.state.params, uninterrupted[0].state.params)
        jax.tree.map(np.testing.assert_array_equal, run.metrics, uninterrupted[0].metrics)
    assert plain.best is None and plain.evaluations is None
    expected = uninterrupted[0].evaluations
    assert expected["iteration"].tolist() == [[3, 6, 9, 12]] * 2
    for name, x in often.evaluations.items():
        np.testing.assert_array_equal(x[:, 2::3], expected[name], err_msg=name)


def test_the_best_policy_is_the_one_that_was_evaluated_highest(uninterrupted):
    run, directory = uninterrupted
    table = run.evaluations
    for seed in range(2):
        row = table["return_mean"][seed].argmax()
        assert run.best.iteration[seed] == table["iteration"][seed, row]
        assert run.best.score[seed] == table["return_mean"][seed, row]
        steps = CONFIG.batch_size * int(run.best.iteration[seed])
        assert table["timesteps"][seed, row] == steps
        saved = load_policy(directory / "best_policy" / f"seed_{seed}", model=LINEAR)
        jax.tree.map(np.testing.assert_array_equal, saved.params, run.best_policy(seed).params)


# ---------------------------------------------------------------------------------- a real SIGKILL


def script(directory, resume, kills, checkpoint_seconds=0.0):
    return textwrap.dedent(f"""
        import sys
        sys.path[:0] = {[str(x) for x in Path(__file__).parents[:2]]!r}
        from test_resume import *
        from purejaxppo.runs import chunks
        chunks.CHUNK_SECONDS = 0
        slow = CONFIG.replace(total_timesteps=8 * 20 * (2 + {kills}))
        options = RUN | OPTIONS | {{"checkpoint_seconds": {checkpoint_seconds}}}
        fit(slow, seeds=2, directory={str(directory)!r}, resume={resume}, **options)
    """)


@pytest.mark.learning
@pytest.mark.exact
@pytest.mark.parametrize("kills", [int(os.environ.get("PUREJAXPPO_KILLS", 3))])
def test_sigkill_at_random_moments(kills, tmp_path):
    """A run killed repeatedly during training ends with the bits of an uninterrupted run."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment = os.environ | cache  # all processes use the programs that the first one compiles
    subprocess.run(
        [sys.executable, "-c", script(tmp_path / "whole", False, kills, 1e9)],
        env=environment,
        check=True,
    )
    rng = np.random.default_rng(0)
    directory = tmp_path / "run"

    def newest():
        return max((path.name for path in directory.glob("checkpoints/*.json")), default="")

    for kill in range(kills):
        before = newest()
        process = subprocess.Popen(
            [sys.executable, "-c", script(directory, True, kills)], env=environment
        )
        while newest() == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 1))
        assert process.poll() is None, (
            f"the run ended before it could be killed for the {kill + 1}th time"
        )
        process.kill()
        process.wait()
    subprocess.run(
        [sys.executable, "-c", script(directory, True, kills)], env=environment, check=True
    )
    for name in ("metrics.csv", "evaluations.csv"):
        assert (directory / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for seed in range(2):
        for kind in ("policy", "best_policy"):
            name = f"{kind}/seed_{seed}"
            a, b = (
                load_policy(path / name, model=LINEAR) for path in (directory, tmp_path / "whole")
            )
            jax.tree.map(
                np.testing.assert_array_equal, (a.params, a.obs_moments), (b.params, b.obs_moments)
            )
