"""A sweep gives the single runs of its members, for any portions, and the best setting."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from compiled_once import compiled_once
from killed import Killed
from quick import FAST_FLAGS
from small_envs import LINEAR, counter

from purejaxppo import Config, ConfigError, Exchange, LogUniform, Uniform, fit, load_policy, sweep
from purejaxppo.analysis import statistics
from purejaxppo.runs.agents import job_of
from purejaxppo.setup import set_up
from purejaxppo.sweeps.grid import groups_of, settings_of
from purejaxppo.sweeps.portions import portion_size

CONFIG = Config(
    num_envs=2, num_steps=4, num_minibatches=1, num_epochs=2, total_timesteps=40, hidden_sizes=(4,)
)
CONFIG = CONFIG.replace(normalize_obs=True)
K = 5  # iterations
ENV = counter(limit=9, longest=12)
GRID = {"lr": [1e-2, 1e-3], "num_envs": [2, 4], "gamma": [0.9]}
SEEDS = 3


@pytest.fixture(autouse=True, scope="module")
def compiled():
    with compiled_once() as once:
        yield once


def run(grid=GRID, config=CONFIG, **options):
    defaults = {
        "seeds": SEEDS,
        "grid": grid,
        "key": 7,
        "env": ENV,
        "model": LINEAR,
        "eval_episodes": 4,
    }
    return sweep(config, **(defaults | options))


def run_one(config=CONFIG, **options):
    return fit(config, **({"key": 7, "env": ENV, "model": LINEAR} | options))


def run_population(directory):
    """Six members that copy one another; with two devices, three on each."""
    return run({"lr": [1e-3, 1e-2]}, directory=directory, exchange=Exchange(2, share=0.5))


@pytest.fixture(scope="module")
def announced():
    return {"plans": [], "groups": [], "progress": []}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, announced, compiled):
    """The sweep that the tests share: 4 settings × 3 seeds in two compilations."""
    directory = tmp_path_factory.mktemp("whole") / "sweep"
    callbacks = {
        "on_plan": announced["plans"].append,
        "on_start": announced["groups"].append,
        "on_progress": announced["progress"].append,
    }
    return run(directory=directory, **callbacks), directory


def assert_close(a, b, tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


# ------------------------------------------------------------------------- equal to the single runs


def test_every_member_is_its_single_run(whole):
    """The first five iterations, in float32."""
    result, _ = whole
    for member in (1, 11):
        setting = result.settings[member // SEEDS]
        seed = member % SEEDS
        alone = run_one(CONFIG.replace(**setting), seeds=SEEDS)
        policy = result.policy(member)
        assert_close(
            (policy.params, policy.obs_moments),
            (alone.policy(seed).params, alone.policy(seed).obs_moments),
            1e-4,
        )
        assert result.config_of(member) == alone.config == policy.config
        row = result.scores.loc[member]
        assert (row.lr, row.num_envs, row.gamma, row.seed) == (*setting.values(), seed)
        assert row.timesteps == alone.metrics.timesteps[seed, -1]
        curve = result.curves[result.curves.member == member]
        np.testing.assert_array_equal(curve.timesteps, alone.metrics.timesteps[seed])
        np.testing.assert_allclose(
            curve.episode_return, alone.metrics.episode_return[seed], rtol=1e-4
        )


def test_every_member_is_its_single_run_in_float64_for_the_full_run(x64):
    config = CONFIG.replace(total_timesteps=200)
    result = run({"lr": [1e-2, 1e-3], "clip_eps": [0.1, 0.3]}, config, eval_episodes=0, seeds=2)
    alone = run_one(config.replace(**result.settings[3]), seeds=2)
    for setting, seed in ((3, 0), (3, 1)):
        policy = result.policy(2 * setting + seed)
        assert policy.params["policy"]["b"].dtype == np.float64
        assert_close(policy.params, alone.policy(seed).params, 1e-6)


def test_neither_portions_nor_order_change_a_member(whole):
    result, _ = whole
    portions = run(at_once=2)
    assert [len(part.members) for part in portions.parts] == [2, 2, 2] * 2
    pd.testing.assert_frame_equal(portions.scores, result.scores, rtol=1e-4)
    reversed_sweep = run({name: values[::-1] for name, values in GRID.items()})
    for member, row in reversed_sweep.scores.iterrows():
        same = result.scores[
            (result.scores.lr == row.lr) & (result.scores.num_envs == row.num_envs)
        ]
        same = same[same.seed == row.seed].iloc[0]
        np.testing.assert_allclose(row.score, same.score, rtol=1e-4)
        assert_close(
            reversed_sweep.policy(member).params, result.policy(int(same.member)).params, 1e-4
        )


def test_portions_do_not_change_the_windows_of_whole_episodes():
    """Iterations of different agents have different numbers of steps."""
    config = CONFIG.replace(
        algorithm="reinforce", num_steps=9, num_epochs=1, anneal_lr=False, total_timesteps=100
    )
    parallel, sequential = (
        run({"lr": [1e-2]}, config, eval_episodes=0, at_once=at_once) for at_once in (3, 1)
    )
    pd.testing.assert_frame_equal(sequential.scores, parallel.scores, rtol=1e-4)
    pd.testing.assert_frame_equal(sequential.curves, parallel.curves, rtol=1e-4)


@pytest.mark.devices
def test_devices_do_not_change_a_member(whole, tmp_path):
    """The same sweep in a process with two devices, three members of a portion on each."""
    script = textwrap.dedent(f"""
        import signal, sys, jax
        sys.path[:0] = {[str(x) for x in Path(__file__).parents[:2]]!r}
        from test_sweep import *
        assert len(jax.devices()) == 2
        groups = []
        patches = compiled_once()
        patches.__enter__()
        run(GRID | {{"num_envs": [4]}}, directory=sys.argv[1], on_start=groups.append)
        print([(group.parallel, group.device) for group in groups])
        one = run_one(CONFIG.replace(num_shards=2), directory=sys.argv[1] + "/one", eval_every=2)
        print(one.plan.device, *one.state.env.obs.sharding.spec)
        both = {{"seeds": 2, "directory": sys.argv[1] + "/both", "eval_every": 1}}
        stop = lambda now: now.iterations == 3 and signal.raise_signal(signal.SIGINT)
        run_one(on_progress=stop, **both)
        resumed = run_one(resume=True, **both)
        print(resumed.plan.device, resumed.resumed_at)
        run_population(sys.argv[1] + "/population")
    """)
    flags = {"XLA_FLAGS": FAST_FLAGS + " --xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", script, str(tmp_path / "sweep")]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    shown = ["[(6, '2 × cpu')]", "2 × cpu shards", "2 × cpu 3"]
    assert done.stdout.splitlines() == shown, done.stderr
    for name in ("scores", "curves"):
        two, one = (
            pd.read_csv(directory / f"{name}.csv") for directory in (tmp_path / "sweep", whole[1])
        )
        one = (
            one[one.num_envs == 4]
            .assign(member=lambda table: pd.factorize(table.member)[0])
            .reset_index(drop=True)
        )
        pd.testing.assert_frame_equal(two, one, rtol=1e-4)
    result = run_population(None)
    # One agent, with its environments on two devices there and on one here. Then two agents, one on
    # each of the two devices.
    one = run_one(CONFIG.replace(num_shards=2), eval_every=2)
    for name, policy in (("policy", one.policy()), ("best_policy", one.best_policy())):
        saved = load_policy(tmp_path / "sweep" / "one" / name, model=LINEAR)
        assert_close((saved.params, saved.obs_moments), (policy.params, policy.obs_moments), 1e-4)
    tables = (result.schedules, pd.read_csv(tmp_path / "sweep" / "population" / "schedules.csv"))
    pd.testing.assert_frame_equal(*tables, rtol=1e-4)
    assert (result.schedules["held_by"] != result.schedules["member"]).any()
    both = run_one(seeds=2)
    saved = load_policy(tmp_path / "sweep" / "both" / "policy" / "seed_1", model=LINEAR)
    assert_close(saved.params, both.policy(1).params, 1e-4)


# --------------------------------------------------------------------------- compilations, memory


def test_exactly_the_announced_compilations_happen(whole, announced, compiled):
    (plan,) = announced["plans"]
    assert (plan.members, len(plan.settings), plan.seeds, plan.compilations) == (12, 4, SEEDS, 2)
    assert plan.timesteps == 6 * 40 + 6 * 48  # three iterations of 16 steps
    assert [(group.members, group.parallel) for group in announced["groups"]] == [(6, 6)] * 2
    assert [group.config.num_envs for group in announced["groups"]] == [2, 4]
    steps = [now.timesteps for now in announced["progress"]]
    assert steps == sorted(steps) and steps[-1] == plan.timesteps
    before = len(compiled.asked)
    run(eval_episodes=0)
    assert len(compiled.asked) - before == plan.compilations


def test_memory_grows_with_the_parallel_members_only(compiled):
    job = job_of(set_up(CONFIG, ENV, LINEAR))
    options = {"swept": ("lr", "gamma"), "devices": jax.devices()}
    needed = [
        compiled.compile_programs(job, agents, **options).memory_bytes for agents in (20, 60, 140)
    ]
    of_40_agents = needed[1] - needed[0]
    of_80_agents = needed[2] - needed[1]
    assert of_40_agents > 0 and abs(of_80_agents / of_40_agents - 2) < 0.2
    plans = []
    for seeds in (6, 18):
        run(
            {"lr": [1e-2], "gamma": [0.9]},
            seeds=seeds,
            at_once=6,
            eval_episodes=0,
            on_start=plans.append,
        )
    assert [plan.parallel for plan in plans] == [6, 6]
    assert plans[0].memory_bytes == plans[1].memory_bytes


def test_a_memory_limit_splits_the_members(whole, announced):
    whole_group = announced["groups"][0]
    plans = []
    grid = {"lr": [1e-2, 1e-3], "gamma": [0.9]}
    limited = run(
        grid,
        memory_limit=int(0.75 * whole_group.memory_bytes),
        eval_episodes=0,
        on_start=plans.append,
    )
    (plan,) = plans
    assert plan.parallel < 6 and plan.memory_bytes <= 0.75 * whole_group.memory_bytes
    assert sorted(np.concatenate([part.members for part in limited.parts])) == list(range(6))
    with pytest.raises(
        ConfigError, match=r"1 members of .* need [\d,]+ bytes on each device, and 1,000 are free"
    ):
        run({"lr": [1e-2]}, seeds=1, memory_limit=1000, eval_episodes=0)


# ----------------------------------------------------------------------------------------- results


def test_the_files_have_the_tables_of_the_result(whole):
    result, directory = whole
    for name in ("scores", "curves", "summary"):
        table = getattr(result, name)
        written = pd.read_csv(directory / f"{name}.csv")
        assert list(written) == list(table) and len(written) == len(table)
    assert len(result.scores) == 12 and result.scores.diverged_at.isna().all()
    summary = result.summary
    assert (summary.interquartile_mean.diff().dropna() <= 0).all()
    for _, row in summary.iterrows():
        of_setting = result.scores[
            (result.scores.lr == row.lr) & (result.scores.num_envs == row.num_envs)
        ]
        expected = statistics.estimate(of_setting.score.to_numpy())
        np.testing.assert_allclose([row.interquartile_mean, row.low, row.high], expected)
        np.testing.assert_allclose(
            [row["median"], row["mean"]], [of_setting.score.median(), of_setting.score.mean()]
        )
    best = summary.iloc[0]
    assert (result.best.lr, result.best.num_envs) == (best.lr, best.num_envs)


def test_statistics_by_setting(whole):
    result, _ = whole
    a, b = (result.scores.score.to_numpy()[i * SEEDS : (i + 1) * SEEDS] for i in (0, 1))
    got = result.probability_of_improvement(result.settings[0], result.settings[1])
    assert got == statistics.probability_of_improvement(a, b)
    thresholds = np.linspace(0, 10, 5)
    profile = result.performance_profile(result.settings[1], thresholds)
    np.testing.assert_allclose(profile.point, [(b > x).mean() for x in thresholds])
    with pytest.raises(ConfigError, match="is not a setting of this sweep"):
        result.performance_profile({"lr": 5}, thresholds)


def test_a_sweep_writes_figures_and_a_curve_for_each_member(whole):
    _, directory = whole
    names = {path.name for path in directory.glob("*.png")}
    fields = {f"sensitivity_{name}.png" for name in GRID}
    assert names == {"curves.png", "profiles.png", "heat_map_lr_num_envs.png", *fields}
    rows = pd.concat(pd.read_csv(path) for path in directory.glob("parts/*/metrics.csv"))
    assert sorted(rows.groupby("member").size().items()) == [
        (member, K if member < 3 or 6 <= member < 9 else 3) for member in range(12)
    ]
    assert not (directory / "checkpoints").exists()


def test_a_diverged_member_is_marked_and_the_others_continue(whole, tmp_path):
    result = run({"lr": [1e-2, 1e38], "gamma": [0.9]}, directory=tmp_path / "sweep")
    scores = result.scores
    assert scores.score[:SEEDS].notna().all() and scores.score[SEEDS:].isna().all()
    assert scores.diverged_at[:SEEDS].isna().all() and (scores.diverged_at[SEEDS:] >= 1).all()
    assert result.best.lr == 1e-2
    assert result.summary.diverged.tolist() == [0, SEEDS]
    assert np.isnan(result.summary.interquartile_mean[1])
    assert whole[0].settings[0] == {"lr": 1e-2, "num_envs": 2, "gamma": 0.9}
    assert_close(whole[0].policy(1).params, result.policy(1).params, 1e-4)


@pytest.mark.parametrize(
    ("count", "max_parallel", "devices", "size"),
    [
        (7, None, 2, 8),
        (5, None, 4, 8),
        (1, None, 4, 1),
        (12, 5, 1, 4),
        (12, 5, 2, 4),
        (9, 4, 4, 3),
        (16, 16, 2, 16),
        (3, 2, 8, 2),
    ],
)
def test_portions_are_even_and_use_every_device(count, max_parallel, devices, size):
    assert portion_size(count, max_parallel, devices) == size


def test_values_drawn_at_random():
    grid = {"lr": LogUniform(1e-5, 1e-1), "gamma": Uniform(0.5, 1.0), "num_envs": [2, 4]}
    settings = settings_of(CONFIG, grid, 400, np.random.default_rng(0))
    assert len(settings) == 800 and list(settings[0]) == list(grid)
    rates, gammas = (
        np.array([setting[name] for setting in settings[:400]]) for name in ("lr", "gamma")
    )
    assert rates.min() > 1e-5 and rates.max() < 1e-1 and gammas.min() > 0.5 and gammas.max() < 1
    # A uniform number has the mean ½ and the standard deviation 1/√12: five standard errors of 400
    # numbers are 0.072.
    for share in (np.log10(rates) / 4 + 5 / 4, 2 * gammas - 1):
        assert abs(share.mean() - 0.5) < 0.072 and abs(np.median(share) - 0.5) < 0.13
    assert [setting["lr"] for setting in settings[:400]] == [
        setting["lr"] for setting in settings[400:]
    ]
    assert len(groups_of(CONFIG, settings)) == 2
    drawn = run({"lr": LogUniform(1e-4, 1e-2), "gamma": [0.9]}, samples=2, eval_episodes=0)
    assert drawn.scores.lr.nunique() == 2 and len(drawn.scores) == 2 * SEEDS


def test_values_that_cannot_be_traced_have_a_separate_group():
    settings = settings_of(
        CONFIG, {"early_stop_kl": [None, 0.1, 0.2], "lr": [1e-3, 1e-2]}, 0, np.random.default_rng(0)
    )
    first, second = groups_of(CONFIG, settings)
    assert first.config.early_stop_kl is None
    assert first.traced == ("lr",) and first.settings == (0, 1)
    assert second.traced == ("early_stop_kl", "lr") and second.settings == (2, 3, 4, 5)


# ------------------------------------------------------------------------------------------- resume


@pytest.mark.exact
def test_a_killed_sweep_resumes_to_the_same_results(whole, tmp_path):
    result, directory = whole
    calls = []

    def watch(now):
        calls.append(now.timesteps)
        if len(calls) == 7:  # two iterations into the second portion
            raise Killed

    with pytest.raises(Killed):
        run(directory=tmp_path / "sweep", checkpoint_seconds=0.0, on_progress=watch)
    assert len(list((tmp_path / "sweep" / "parts").glob("*.npz"))) == 1
    calls.extend([0] * 10)
    # Members are numbered in the order of the fields.
    with pytest.raises(ConfigError, match="grid = "):
        run(dict(reversed(GRID.items())), directory=tmp_path / "sweep", resume=True)
    again = []
    resumed = run(
        directory=tmp_path / "sweep",
        checkpoint_seconds=0.0,
        resume=True,
        on_progress=lambda now: again.append(now.timesteps),
    )
    # The first iteration of the second portion was in a checkpoint.
    assert again[0] == 240 + 2 * 96 and again[-1] == 240 + 3 * 96
    pd.testing.assert_frame_equal(resumed.scores, result.scores, check_exact=True)
    pd.testing.assert_frame_equal(resumed.curves, result.curves, check_exact=True)
    for member in range(12):
        jax.tree.map(
            np.testing.assert_array_equal,
            resumed.policy(member).params,
            result.policy(member).params,
        )
    for path in directory.glob("parts/*/metrics.csv"):
        assert (tmp_path / "sweep" / path.relative_to(directory)).read_bytes() == path.read_bytes()


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": {"lrr": [1]}}, "'lrr' is not a setting; did you mean 'lr'?"),
        ({"grid": {"lr": 1e-3}}, "lr is swept over a list of values"),
        ({"grid": {"lr": []}}, "lr is swept over a list of values"),
        ({"grid": {"lr": [1e-3, -1]}}, "lr = -1.0: it must be a finite number of at least 0"),
        ({"grid": {"lr": [1e-3, 1e-3]}}, "the grid contains a setting twice"),
        ({"grid": {"num_minibatches": [3]}}, "num_minibatches = 3 does not divide"),
        (
            {"grid": {"lr": LogUniform(1e-3, 1e-2)}},
            "lr has a distribution: set samples to the number of draws",
        ),
        ({"grid": {"lr": LogUniform(0, 1)}, "samples": 2}, "it must have 0 < low < high"),
        (
            {"grid": {"num_envs": Uniform(1, 2)}, "samples": 2},
            "'num_envs' cannot be drawn from a distribution",
        ),
        ({"grid": {"env": ["CartPole-v1"]}}, "env is swept over: leave the environment object out"),
        ({"seeds": 0}, "seeds = 0"),
        ({"at_once": 0}, "at_once = 0"),
        ({"memory_limit": -1}, "memory_limit = -1"),
        ({"resume": True}, "resume needs the directory of the run to continue"),
    ],
)
def test_wrong_input_gives_one_sentence_before_anything_is_compiled(
    options, message, compiled, tmp_path
):
    before = len(compiled.asked)
    with pytest.raises(ConfigError) as error:
        run(**options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert len(compiled.asked) == before


def test_the_policy_of_an_unknown_member_is_refused(whole):
    with pytest.raises(ConfigError, match="member = 12: this sweep has the members 0 … 11"):
        whole[0].policy(12)
