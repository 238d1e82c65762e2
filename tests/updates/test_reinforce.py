"""REINFORCE against the exact gradient of a decision process with enumerated trajectories."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_envs import LINEAR, counter, linear_model, memory_model

from purejaxppo import Config, ConfigError, fit, make_train, make_trainer
from purejaxppo.advantages import estimate_returns, returns
from purejaxppo.config import BASELINES
from purejaxppo.envs.vector import vectorize
from purejaxppo.metrics import AGENT_METRICS, with_nan
from purejaxppo.rollout import make_rollout
from purejaxppo.runs import chunks
from purejaxppo.runs.tables import of_metrics
from purejaxppo.types import Batch, Box, Discrete, Env, Step
from purejaxppo.updates import reinforce

ONCE = Config(
    algorithm="reinforce", num_epochs=1, num_minibatches=1, anneal_lr=False, hidden_sizes=(4,)
)
STATES = 3
ACTIONS = 2
HORIZON = 4
EPISODES = 4
BATCHES = 20_000
RNG = np.random.default_rng(1)
START = np.asarray([0.6, 0.4, 0.0])
# Transition probabilities; the last column is the end of the episode.
NEXT = RNG.dirichlet(np.full(STATES + 1, 0.7), (STATES, ACTIONS))
REWARD = RNG.normal(1.0, 2.0, (STATES, ACTIONS))
POLICY = {"w": jnp.asarray(RNG.normal(0, 0.6, (STATES, ACTIONS))), "b": jnp.asarray([0.2, -0.1])}


def process():
    """Observed states 0 … 2; episodes terminate at random or are truncated after `HORIZON`."""

    def reset(key):
        state = jax.random.categorical(key, jnp.log(START)).astype(jnp.int32)
        return (state, jnp.int32(0)), jax.nn.one_hot(state, STATES)

    def step(key, state, action):
        now, t = state
        after = jax.random.categorical(key, jnp.log(jnp.asarray(NEXT)[now, action])).astype(
            jnp.int32
        )
        end = after == STATES
        after = jnp.minimum(after, STATES - 1)
        reward = jnp.asarray(REWARD)[now, action]
        return Step(
            state=(after, t + 1),
            obs=jax.nn.one_hot(after, STATES),
            reward=reward,
            terminated=end,
            truncated=t + 1 >= HORIZON,
        )

    return Env(
        name="process",
        reset=reset,
        step=step,
        observation_space=Box((STATES,), 0.0, 1.0),
        action_space=Discrete(ACTIONS),
        max_episode_steps=HORIZON,
        truncates=True,
    )


@functools.cache
def trajectories():
    """All trajectories: states, actions [n, H]; lengths, chance probabilities, returns [n]."""
    rows = []

    def extend(state, probability, states, actions, total):
        for action in range(ACTIONS):
            path = ([*states, state], [*actions, action], len(states) + 1)
            gained = total + REWARD[state, action]
            if path[2] == HORIZON:
                rows.append((*path, probability, gained))
                continue
            *successors, end = probability * NEXT[state, action]
            rows.append((*path, end, gained))
            for after, p in enumerate(successors):
                extend(after, p, *path[:2], gained)

    for state, p in enumerate(START):
        extend(state, p, [], [], 0.0)
    states, actions, *rest = zip(*rows, strict=True)
    padded = [
        np.asarray([path + [0] * (HORIZON - len(path)) for path in paths])
        for paths in (states, actions)
    ]
    return *padded, *map(np.asarray, rest)


def probabilities(policy):
    """Π p(s'|s, a) π(a|s) of each trajectory."""
    states, actions, length, chance, _ = trajectories()
    log_pi = jax.nn.log_softmax(policy["w"] + policy["b"][None])[states, actions]
    return chance * jnp.exp(jnp.where(np.arange(HORIZON) < length[:, None], log_pi, 0).sum(1))


def expected_return(policy):
    """J(θ), the mean return over all trajectories."""
    return (probabilities(policy) * trajectories()[-1]).sum()


def estimates(config, params, batches=BATCHES):
    """Gradient estimates [batches, P] of the policy, one for each of many independent batches.

    Each batch follows an update on another one.
    """
    env = process()
    model = linear_model(actions=ACTIONS)
    vector_env = vectorize(env, EPISODES)
    rollout = make_rollout(env, vector_env, model, HORIZON, whole_episodes=True)
    update = reinforce.make_update(config, model, optax.sgd(1.0))

    def one(key):
        key_env, *keys = jax.random.split(key, 3)
        state = update.init(params)
        for key_rollout in keys:
            x = rollout(key_rollout, params, None, vector_env.reset(key_env), ())[0]
            advantage, target = estimate_returns(config, x, x.reward)
            batch = Batch(
                obs=x.obs,
                action=x.action,
                log_prob=x.log_prob,
                value=x.value,
                advantage=advantage,
                target=target,
                reset=x.reset,
                mask=x.mask,
                valid=x.valid,
                carry=(),
            )
            new, state, _ = update.step(key_rollout, params, state, batch)
        return jax.flatten_util.ravel_pytree(
            jax.tree.map(jnp.subtract, new["policy"], params["policy"])
        )[0]

    return np.asarray(
        jax.lax.map(one, jax.random.split(jax.random.key(8), batches), batch_size=5000)
    )


@functools.cache
def learned_value():
    """V fitted to returns by REINFORCE's own steps, with the policy kept fixed."""
    model = linear_model(actions=ACTIONS)
    trainer = make_trainer(
        ONCE.replace(num_envs=256, num_steps=HORIZON, gamma=1.0, lr=0.1), process(), model
    )

    def iteration(state, _):
        after = trainer.step(state)[0]
        return after._replace(params=after.params | {"policy": POLICY}), None

    def fit(key):
        start = trainer.init(
            key, {"policy": POLICY, "value": {"w": jnp.zeros(STATES), "b": jnp.zeros(())}}
        )
        return jax.lax.scan(iteration, start, None, 200)[0].params["value"]

    return jax.jit(fit)(jax.random.key(3))


@functools.cache
def gradient_estimates(baseline):
    value = learned_value() if baseline == "value" else {"w": jnp.zeros(STATES), "b": jnp.zeros(())}
    config = ONCE.replace(baseline=baseline, gamma=1.0, normalize_advantage=False)
    return estimates(config, {"policy": POLICY, "value": value})


# ------------------------------------------------------------------------------- the exact gradient


def test_the_enumeration_is_complete():
    _, _, length, _, _ = trajectories()
    p = np.asarray(probabilities(POLICY))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-5)
    shares = [p[length == steps].sum() for steps in range(1, HORIZON + 1)]
    assert min(shares) > 0.05  # episodes of every length
    # J again, by backward induction: Q_t(s, a) = r + Σ p V_{t+1}, V_t = Σ π Q_t.
    pi = np.asarray(jax.nn.softmax(POLICY["w"] + POLICY["b"][None]))
    V = np.zeros(STATES + 1)
    for _ in range(HORIZON):
        V = np.append((pi * (REWARD + NEXT @ V)).sum(1), 0.0)
    np.testing.assert_allclose(expected_return(POLICY), START @ V[:STATES], rtol=1e-5)


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_mean_of_the_estimates_is_the_exact_gradient(baseline):
    exact = np.asarray(jax.flatten_util.ravel_pytree(jax.grad(expected_return)(POLICY))[0])
    x = gradient_estimates(baseline)
    error = x.std(axis=0) / np.sqrt(len(x))
    assert error.max() < 0.02 * np.linalg.norm(exact)
    np.testing.assert_array_less(np.abs(x.mean(axis=0) - exact), 4.5 * error)


def test_a_baseline_lowers_the_variance():
    spread = {baseline: gradient_estimates(baseline).var(axis=0).sum() for baseline in BASELINES}
    assert spread["value"] < 0.8 * spread["none"]
    assert spread["leave_one_out"] < spread["none"] and spread["running_mean"] < spread["none"]


def test_the_gradient_of_another_policy_is_rejected():
    """The bounds above are narrow enough to reject a change of 0.1 in one parameter."""
    x = gradient_estimates("value")
    other = POLICY | {"b": POLICY["b"] + jnp.asarray([0.1, -0.1])}
    wrong = np.asarray(jax.flatten_util.ravel_pytree(jax.grad(expected_return)(other))[0])
    assert (np.abs(x.mean(axis=0) - wrong) > 4.5 * x.std(axis=0) / np.sqrt(len(x))).any()


# --------------------------------------------------------------------------------------- the pieces


def test_returns_in_a_literal_example():
    """Two steps and a truncation, which ends the return; then one step.

    With γ = ½: G = 1 + ½ · 2, 2, 3. No successor's value is used.
    """
    reward, value, successor = (
        jnp.asarray(x)[:, None] for x in ([1.0, 2.0, 3.0], [0.5, 1.0, 2.0], [7.0, 8.0, 9.0])
    )
    terminated, truncated = (
        jnp.asarray(x)[:, None] for x in ([False, False, True], [False, True, False])
    )
    advantage, G = returns(reward, value, successor, terminated, truncated, 0.5, 0.9)
    np.testing.assert_allclose(G[:, 0], [2.0, 2.0, 3.0], rtol=1e-6)
    np.testing.assert_allclose(advantage[:, 0], [1.5, 1.0, 1.0], rtol=1e-6)


def test_the_leave_one_out_mean_in_a_literal_example():
    x = jnp.asarray([[1.0, 2.0, 6.0], [4.0, 8.0, jnp.nan], [5.0, jnp.nan, jnp.nan]])
    valid = jnp.asarray([[True, True, True], [True, True, False], [True, False, False]])
    others = np.asarray(reinforce.leave_one_out_baseline(x, valid))
    np.testing.assert_allclose(others[0], [4.0, 3.5, 1.5])
    np.testing.assert_allclose(others[1, :2], [8.0, 4.0])
    assert others[2, 0] == 0  # no other episode is running


def test_the_running_mean_weighs_batches_by_age():
    config = ONCE.replace(baseline="running_mean", baseline_decay=0.5, normalize_advantage=False)
    running_mean = reinforce.RunningMean(jnp.zeros(()), jnp.zeros(()))
    zero = jnp.zeros((1, 1))
    true = jnp.ones((1, 1), bool)
    advantages = []
    for G in (8.0, 2.0, 5.0):
        target = jnp.full((1, 1), G)
        batch = Batch(
            obs=zero,
            action=zero,
            log_prob=zero,
            value=zero,
            advantage=zero,
            target=target,
            reset=true,
            mask=true,
            valid=true,
            carry=(),
        )
        advantage, running_mean = reinforce.subtract_baseline(config, running_mean, batch)
        advantages.append(float(advantage[0, 0]))
    np.testing.assert_allclose(advantages, [8.0, 2.0 - 8.0, 5.0 - (0.5 * 8 + 2) / 1.5], rtol=1e-6)


# --------------------------------------------------------------------------------------- whole runs


def test_a_run_ends_with_the_iteration_that_completes_its_timesteps(monkeypatch):
    """Episodes of 1 to 5 steps, 8 at a time: agents need different numbers of iterations."""
    B = 8
    total = 600
    seeds = 3
    config = ONCE.replace(num_envs=B, num_steps=8, total_timesteps=total)
    keys = jax.random.split(jax.random.key(0), seeds)
    state, metrics = jax.jit(jax.vmap(make_train(config, counter(), LINEAR)))(keys)
    metrics = with_nan(jax.tree.map(np.asarray, metrics))
    assert metrics.timesteps.shape == (seeds, config.num_iterations) == (seeds, -(-total // B))
    assert config.actual_timesteps == total + 8 * B - 1
    for i, done in enumerate(state.iteration.tolist()):
        steps = metrics.timesteps[i]
        episodes = metrics.episodes[i]
        lengths = metrics.episode_length[i]
        assert (
            steps[done - 2]
            < total
            <= steps[done - 1]
            == state.timesteps[i]
            <= config.actual_timesteps
        )
        np.testing.assert_allclose(np.diff(steps[:done], prepend=0), lengths[:done] * B, rtol=1e-5)
        # Episodes terminate after 1 … 8 steps, and are truncated after 5.
        mean = np.mean([min(length, 5) for length in range(1, 9)])
        assert abs(lengths[:done].mean() - mean) < 0.5
        np.testing.assert_array_equal(episodes, np.where(np.arange(len(steps)) < done, B, 0))
        for row in (metrics.timesteps[i], metrics.policy_loss[i]):  # the last value is repeated
            np.testing.assert_array_equal(
                row[done:], np.broadcast_to(row[done - 1], row[done:].shape)
            )
        assert np.isnan(metrics.episode_return[i, done:]).all() and np.isnan(lengths[done:]).all()
    # In chunks of one iteration the run is the same; it ends when the last agent is done.
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 0)
    reports = []
    run = fit(
        config,
        seeds=seeds,
        key=jax.random.key(0),
        env=counter(),
        model=LINEAR,
        on_progress=reports.append,
    )
    iterations = state.iteration.tolist()
    assert (
        len(reports) == max(iterations) > min(iterations)
        and reports[-1].timesteps == state.timesteps.min()
    )
    # A mean may be summed in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: close(a, b[:, : max(iterations)]), run.metrics, metrics)
    jax.tree.map(close, run.state.params, state.params)
    table = of_metrics(AGENT_METRICS, run.metrics, max(iterations), np.array(iterations))
    assert table["valid"].sum(axis=1).tolist() == iterations  # a row for each iteration run


@pytest.mark.parametrize("x64", [False, True])
def test_a_step_uses_returns_to_go_and_counts_only_steps_in_the_mask(x64):
    """Uniform policy; rewards 1 … 5, the first action forced: −J = log 3 · (14 + 12 + 9 + 5)."""

    def forced_first(key, state, action):
        return env.step(key, state, action)._replace(mask=state.t > 0)

    env = counter(longest=0)
    config = ONCE.replace(
        num_envs=4, num_steps=30, baseline="none", normalize_advantage=False, gamma=1.0
    )
    with jax.enable_x64(x64):
        trainer = make_trainer(config, env._replace(step=forced_first), linear_model())
        params = jax.tree.map(
            jnp.zeros_like, linear_model().init(jax.random.key(0), jnp.zeros((1, 3)))
        )
        step = jax.jit(trainer.step)
        state = jax.jit(trainer.init)(jax.random.key(0), params)
        after, metrics = step(state)
        np.testing.assert_allclose(metrics.policy_loss, np.log(3) * (14 + 12 + 9 + 5), rtol=1e-6)
        assert (metrics.timesteps, metrics.episodes, metrics.episode_return) == (4 * 4, 4, 15)
        assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


def test_with_gae_windows_may_cut_episodes_and_memory_persists():
    config = ONCE.replace(advantage="gae", num_envs=4, num_steps=3, total_timesteps=60)
    state, metrics = jax.jit(make_train(config, counter(), memory_model(3)))(jax.random.key(0))
    assert (
        metrics.timesteps.tolist() == [12, 24, 36, 48, 60] and np.isfinite(metrics.value_loss).all()
    )
    assert (np.asarray(state.carry[0]) != 0).any()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_epochs": 4}, "set num_epochs=1 and num_minibatches=1"),
        ({"num_minibatches": 2}, "set num_epochs=1 and num_minibatches=1"),
        ({"num_steps": 4}, "set num_steps=5, or advantage='gae'"),
        ({"num_envs": 1, "baseline": "leave_one_out"}, "set num_envs to at least 2"),
        ({"advantage": "gae", "baseline": "none"}, "set baseline='value' or advantage='returns'"),
        ({"objective": "unclipped"}, "leave it out, or set algorithm='ppo'"),
        ({"early_stop_kl": 0.1}, "leave it out, or set algorithm='ppo'"),
        ({"algorithm": "ppo", "baseline": "none"}, "baseline = 'none' is for reinforce only"),
        (
            {"algorithm": "ppo", "episodic": True, "num_steps": 4},
            "set num_steps=5, or episodic=False",
        ),
        ({"total_timesteps": 2**31}, "counted up to 2"),
        ({"baseline": "leave_one_uot"}, "did you mean 'leave_one_out'"),
    ],
)
def test_invalid_settings_are_refused_with_a_remedy(changes, sentence):
    config = ONCE.replace(num_envs=4, num_steps=8)
    with pytest.raises(ConfigError) as caught:
        make_train(config.replace(**changes), counter())
    assert sentence in str(caught.value)


def test_an_environment_without_a_bound_has_no_whole_episodes():
    with pytest.raises(ConfigError, match="no bound on the length"):
        make_train(ONCE, counter()._replace(max_episode_steps=None))


def test_the_algorithm_alone_selects_the_settings_of_reinforce():
    assert Config.from_dict({"algorithm": "reinforce"}).num_epochs == 1
    assert not Config.from_dict({"ALGORITHM": "reinforce"}).normalize_advantage
    config = Config.for_env("Catch-bsuite", algorithm="reinforce")
    assert (config.num_minibatches, config.estimator, config.whole_episodes) == (1, "returns", True)
    assert Config().estimator == "gae" and not Config().whole_episodes
