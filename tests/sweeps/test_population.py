"""Population-based training: who copies whom, what is copied, and that nothing else changes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from compiled_once import compiled_once
from hypothesis import given
from hypothesis import strategies as st
from killed import Killed
from small_envs import LINEAR, counter

from purejaxppo import Config, ConfigError, Exchange, LogUniform, Uniform, sweep
from purejaxppo.population import choose_parents, make_population
from purejaxppo.setup import set_up
from purejaxppo.sweeps.schedules import Schedule
from purejaxppo.train import build_trainer

ENV = counter(limit=9, longest=12)
CONFIG = Config(num_envs=2, num_steps=16, num_minibatches=1, num_epochs=2, total_timesteps=32 * 8)
CONFIG = CONFIG.replace(normalize_obs=True, normalize_reward=True)
BOUNDS = {"lr": (1e-4, 1e-1), "ent_coef": (0.0, 0.1)}
GRID = {"lr": LogUniform(1e-4, 1e-1), "ent_coef": [0.0, 0.1]}


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Programs are compiled once, without optimisation, and run one iteration per chunk."""
    with compiled_once():
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


# ---------------------------------------------------------------------------------- who copies whom


@given(
    st.lists(
        st.tuples(st.sampled_from([float("nan"), 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), st.booleans()),
        min_size=8,
        max_size=8,
    ),
    st.sampled_from([0.01, 0.2, 0.5]),
    st.integers(0, 2**31 - 1),
)
def test_the_worst_copy_the_best(agents, share, seed):
    score = np.array([x for x, _ in agents])
    is_finite = np.array([y for _, y in agents])
    parent = np.asarray(
        choose_parents(jax.random.key(seed), jnp.asarray(score), jnp.asarray(is_finite), share)
    )
    count = len(agents)
    num_best = max(1, int(share * len(agents)))
    known = sorted(
        (i for i in range(count) if is_finite[i] and score[i] == score[i]), key=lambda i: -score[i]
    )
    best = known[:num_best]
    slots = max(0, num_best - int((~is_finite).sum()))
    worst = known[len(known) - slots :]
    for i in range(count):
        if not is_finite[i]:
            assert (parent[i] in best) if known else parent[i] == i
        elif i in worst and parent[i] != i:
            assert parent[i] in best and score[parent[i]] > score[i]
        else:
            assert parent[i] == i
            assert i not in worst or score[i] >= score[best[-1]]  # the best are not better


def test_each_of_the_best_is_copied_sometimes():
    score = jnp.arange(10.0)
    is_finite = jnp.ones(10, bool)
    parents = np.array(
        [choose_parents(jax.random.key(i), score, is_finite, 0.3) for i in range(40)]
    )
    np.testing.assert_array_equal(parents[:, 3:], np.tile(np.arange(3, 10), (40, 1)))
    assert set(parents[:, 0]) == set(parents[:, 1]) == set(parents[:, 2]) == {7, 8, 9}


# ---------------------------------------------------------------------------------- what is copied


@pytest.fixture(scope="module")
def steps():
    """A population before an exchange, and after a step with the exchange and without."""

    def functions_of(every):
        exchange = Exchange(every, share=0.5, factors=(0.5, 3.0))
        trainer_of = partial(build_trainer, set_up(CONFIG, ENV, LINEAR))
        functions = make_population(trainer_of, CONFIG.num_iterations, exchange, BOUNDS)
        return functions[0], jax.jit(functions[1])

    begin, with_exchange = functions_of(2)
    _, without = functions_of(1000)
    swept = {"lr": jnp.geomspace(1e-4, 1e-1, 6), "ent_coef": jnp.linspace(0, 0.1, 6)}
    state, first = with_exchange(jax.jit(begin)(jax.random.split(jax.random.key(1), 6), swept))
    return state, first, with_exchange(state), without(state)


def test_before_an_exchange_nothing_is_copied(steps):
    state, metrics, _, _ = steps
    assert metrics.extra["swept/parent"].tolist() == list(range(6))
    assert state.episodes.sum() == metrics.episodes.sum() > 0
    expected = np.where(metrics.episodes > 0, metrics.episode_return * metrics.episodes, 0)
    np.testing.assert_allclose(state.returns, expected)


def test_a_copy_has_everything_of_its_parent_except_the_key(steps):
    _, _, (after, metrics), (before, _) = steps
    parent = np.asarray(metrics.extra["swept/parent"])
    copied = parent != np.arange(6)
    score = before.returns / before.episodes
    assert 1 <= copied.sum() <= 3 and (score[parent][copied] > score[copied]).all()
    same = after.agents._replace(key=()), before.agents._replace(key=())
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, np.asarray(y)[parent]), *same)
    keys = [np.asarray(jax.random.key_data(x.agents.key)) for x in (after, before)]
    np.testing.assert_array_equal(keys[0][~copied], keys[1][~copied])
    assert len(np.unique(np.concatenate([keys[0], keys[1][copied]]), axis=0)) == 6 + copied.sum()
    assert not after.episodes.any() and not after.returns.any()
    for name, (low, high) in BOUNDS.items():
        old = np.asarray(before.swept[name])
        new = np.asarray(after.swept[name])
        np.testing.assert_array_equal(new[~copied], old[~copied])
        possible = np.clip(
            old[parent][copied][:, None] * np.float32([0.5, 3.0]), np.float32(low), np.float32(high)
        )
        assert np.isclose(new[copied][:, None], possible, rtol=1e-6).any(axis=1).all()
        np.testing.assert_array_equal(metrics.extra[f"swept/{name}"], old)  # before the exchange


def test_the_lineage_of_a_state_goes_through_its_parents():
    swept = {"lr": np.array([[1, 1, 4, 4], [2, 2, 2, 5], [3, 3, 3, 3]])}
    # No exchange follows the last column.
    parent = np.array([[0, 1, 0, 0], [1, 1, 0, 1], [1, 2, 2, 2]])
    schedule = Schedule(np.array([10, 20, 30, 40]), swept, parent)
    # Agent 1 copied agent 0 before the last part, and agent 0 had copied agent 1 one part earlier.
    lineage = schedule.of(1)
    assert lineage.parent.tolist() == [1, 1, 0, 1] and lineage.swept["lr"].tolist() == [2, 2, 4, 5]
    lineage = schedule.of(2)
    assert lineage.parent.tolist() == [1, 2, 2, 2] and lineage.swept["lr"].tolist() == [2, 3, 3, 3]


# --------------------------------------------------------------------------------------- in a sweep


def run(**options):
    defaults = {
        "seeds": 2,
        "grid": GRID,
        "key": 7,
        "samples": 2,
        "env": ENV,
        "model": LINEAR,
        "eval_episodes": 4,
    }
    return sweep(CONFIG, **(defaults | {"exchange": Exchange(2, share=0.3)} | options))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "sweep"
    return run(directory=directory), directory


def test_before_its_first_exchange_it_is_the_sweep(monkeypatch):
    plain = run(exchange=None)
    monkeypatch.setattr(Exchange, "is_due_after", lambda *_: jnp.asarray(False))
    population = run(exchange=Exchange(7))
    pd.testing.assert_frame_equal(
        population.scores.drop(columns="seed"),
        plain.scores.drop(columns="seed"),
        rtol=1e-4,
        check_exact=False,
    )
    columns = ["member", "timesteps", "episode_return"]
    pd.testing.assert_frame_equal(population.curves[columns], plain.curves[columns], rtol=1e-4)


def test_the_result_has_the_schedules_of_all_members(whole):
    result, directory = whole
    assert len(result.settings) == 8 and result.seeds == 1
    table = result.schedules
    # 8 iterations with three exchanges between them.
    assert table.groupby("member").size().tolist() == [4] * 8
    assert table["timesteps"].tolist() == [64, 128, 192, 256] * 8
    ends = table[table["timesteps"] == 256].set_index("member")
    pd.testing.assert_frame_equal(
        ends[["lr", "ent_coef"]], result.scores.set_index("member")[["lr", "ent_coef"]]
    )
    assert (ends["held_by"] == ends.index).all() and (table["held_by"] != table["member"]).any()
    assert table["lr"].between(0.99e-4, 1.01e-1).all() and table["ent_coef"].between(0, 0.101).all()
    assert result.summary["member"].nunique() == len(result.summary) == 8
    best = result.scores[result.scores["score"] == result.scores["score"].max()]
    assert result.best in [result.policy(member).config for member in best["member"]]
    np.testing.assert_allclose(
        [result.config_of(member).lr for member in best["member"]], best["lr"]
    )
    for name in ("schedules.csv", "schedules.png", "summary.csv", "sensitivity_lr.png"):
        assert (directory / name).stat().st_size > 0
    rows = pd.read_csv(next(directory.glob("parts/*/metrics.csv")))
    last = rows[rows["iteration"] == 8].set_index("member")
    np.testing.assert_allclose(last["swept/lr"], result.scores["lr"], rtol=1e-6)


@pytest.mark.exact
def test_killed_between_two_exchanges_it_resumes_to_the_same_results(whole, tmp_path):
    result, directory = whole
    calls = []

    def watch(now):
        calls.append(now.timesteps)
        if len(calls) == 6:  # the newest checkpoint is after iteration 5, between two exchanges
            raise Killed

    with pytest.raises(Killed):
        run(directory=tmp_path / "sweep", checkpoint_seconds=0.0, on_progress=watch)
    with pytest.raises(ConfigError, match="exchange = "):
        run(directory=tmp_path / "sweep", resume=True, exchange=Exchange(3))
    resumed = run(directory=tmp_path / "sweep", resume=True)
    for name in ("scores", "curves", "schedules"):
        pd.testing.assert_frame_equal(
            getattr(resumed, name), getattr(result, name), check_exact=True
        )
    for path in directory.glob("parts/*/metrics.csv"):
        assert (tmp_path / "sweep" / path.relative_to(directory)).read_bytes() == path.read_bytes()


def test_copies_do_not_repeat_their_parents():
    """Three members have one key and three have another one, and nothing is perturbed.

    The members with the worse key copy the others.
    """
    grid = {"lr": [1e-3, 1e-2, 1e-1]}
    result = run(grid=grid, samples=0, exchange=Exchange(4, share=0.5, factors=(1.0,)))
    parents = result.schedules.query("timesteps == 128")["held_by"].tolist()
    assert max(map(parents.count, parents)) >= 3  # two members have copied the same member
    policies = [
        np.concatenate([x.ravel() for x in jax.tree.leaves(result.policy(i).params)])
        for i in range(6)
    ]
    assert all((policies[i] != policies[j]).any() for i in range(6) for j in range(i))


def test_a_diverged_agent_is_replaced_by_a_copy_of_another(tmp_path):
    result = run(seeds=1, grid={"lr": [1e-3, 1e-2, 1e25]}, samples=0, directory=tmp_path / "sweep")
    assert result.scores["diverged_at"].isna().all() and result.scores["score"].notna().all()
    rows = pd.read_csv(next((tmp_path / "sweep").glob("parts/*/metrics.csv"))).query("member == 2")
    assert np.isinf(rows["value_loss"]).tolist() == [True] * 2 + [False] * 6
    assert rows["swept/parent"].tolist()[1] in (0, 1) and rows["swept/lr"].max() > 9e24


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": {}}, "continuous hyper-parameters, and the grid has none"),
        ({"grid": {"lr": [1e-3], "num_envs": [2, 4]}}, "and 'num_envs' is not one"),
        ({"grid": {"lr": [1e-3]}, "seeds": 1}, "a population of 1"),
        ({"at_once": 3}, "a population of 8 with at_once = 3"),
        ({"exchange": Exchange(8)}, "every = 8: it must be less than the number of iterations, 8"),
        ({"eval_episodes": 0}, "eval_episodes must be at least 1"),
        ({"grid": {"lr": [1e-3]}}, "nothing to explore"),
        ({"grid": {"gamma": Uniform(0.0, 1.0001)}}, "gamma = 1.0001"),
        (
            {"grid": {"lr": [1e-3, 1e-2], "early_stop_kl": [None, 0.1]}},
            "'early_stop_kl' is not one",
        ),
    ],
)
def test_an_impossible_population_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        run(**options)


def test_an_adaptive_coefficient_is_refused():
    config = CONFIG.replace(objective="adaptive_kl")
    with pytest.raises(ConfigError, match="'kl_coef' is not one"):
        sweep(config, 4, {"kl_coef": [0.1, 1.0]}, env=ENV, model=LINEAR, exchange=Exchange(2))


@pytest.mark.parametrize("total", [{}, {"total_episodes": 12}])
def test_whole_episodes_are_refused(total):
    config = CONFIG.replace(algorithm="reinforce", num_steps=9, num_epochs=1, anneal_lr=False)
    grid = {"lr": [1e-3, 1e-2]}
    with pytest.raises(ConfigError, match="trains on whole episodes"):
        sweep(config.replace(**total), 4, grid, env=ENV, model=LINEAR, exchange=Exchange(2))


@pytest.mark.parametrize(
    "changes",
    [{"every": 0}, {"share": 0}, {"share": 0.6}, {"factors": ()}, {"factors": (0.8, -1.0)}],
)
def test_wrong_exchanges_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        dataclasses.replace(Exchange(2), **changes)
