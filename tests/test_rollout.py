"""Rollouts against hand calculations: true successors, resets, clipped actions, statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_envs import BOX, DISCRETE, counter, linear_model, memory_model

from purejaxppo.envs.vector import vectorize
from purejaxppo.envs.wrappers import bound_actions
from purejaxppo.metrics import iteration_metrics
from purejaxppo.normalize import Moments, normalize_obs
from purejaxppo.rollout import make_rollout
from purejaxppo.types import Batch, EpisodeSums

T = 8
B = 4
COUNTERS = {  # limit, longest
    "at most one truncation": (10, 16),
    "many truncations": (3, 6),
    "only truncations": (2, 0),
    "truncations at the end": (T, 0),
}
MOMENTS = Moments(
    jnp.asarray(100.0), jnp.asarray([0.5, 2.0, 1.0]), jnp.asarray([40.0, 400.0, 100.0])
)


@functools.cache
def two_rollouts(name, memory=False, space=DISCRETE):
    """Two consecutive rollouts, the second of which starts inside episodes, and their inputs."""
    limit, longest = COUNTERS[name]
    env = bound_actions(counter(space, limit, longest))
    model = (
        memory_model(3)
        if memory
        else linear_model(gaussian=space == BOX, actions=2 if space == BOX else 3)
    )
    moments = MOMENTS if space == DISCRETE else None
    vector_env = vectorize(env, B)
    rollout = make_rollout(env, vector_env, model, T)

    def begin(key):
        key_env, key_params = jax.random.split(key)
        start = vector_env.reset(key_env)
        return start, model.init(key_params, start.obs)

    def run(key, params, env_state, carry):
        return rollout(key, params, moments, env_state, carry)

    begin, run = (
        jax.jit(f, compiler_options={"xla_backend_optimization_level": 0}) for f in (begin, run)
    )
    start, params = begin(jax.random.key(5))
    first, middle, carry, _ = run(jax.random.key(6), params, start, model.initial_carry(B))
    second, end, _, _ = run(jax.random.key(7), params, middle, carry)
    everything = params, start, first, middle, second, end
    params, *rest = jax.tree.map(np.asarray, everything)
    return (model, params), moments, (limit, longest), *rest


def raw(obs, moments):
    """Undoes the normalisation of an observation."""
    if moments is None:
        return obs
    return obs * np.sqrt(np.asarray(moments.variance) + 1e-8) + np.asarray(moments.mean)


def joined(first, second):
    """Both rollouts as one of 2 T steps."""
    return jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second)


# ---------------------------------------------------------------------- value of the true successor


@pytest.mark.parametrize("name", COUNTERS)
def test_next_value_is_the_value_of_the_true_successor(name):
    """At a truncation that is the final observation (start, t + 1, action), in no `Transition`."""
    (model, params), moments, _, _, first, _, second, _ = two_rollouts(name)
    num_truncated = 0
    for rollout in (first, second):
        obs = raw(rollout.obs, moments)
        successor = np.stack([obs[..., 0], np.round(obs[..., 1]) + 1, rollout.action], axis=-1)
        normalized = normalize_obs(moments, jnp.asarray(successor.reshape(-1, 3), jnp.float32))
        _, _, value = model.step(params, (), normalized, jnp.zeros(T * B, bool))
        not_terminated = ~rollout.terminated
        np.testing.assert_allclose(
            rollout.next_value[not_terminated],
            np.reshape(value, (T, B))[not_terminated],
            rtol=2e-4,
            atol=2e-4,
        )
        truncated = rollout.truncated[:-1]
        num_truncated += truncated.sum()
        if truncated.any():  # the value of the next episode's first observation differs
            assert np.abs(rollout.next_value[:-1] - rollout.value[1:])[truncated].max() > 0.05
    assert num_truncated > 0 or name == "truncations at the end"


@pytest.mark.parametrize("name", ["at most one truncation", "many truncations"])
def test_next_value_with_memory_is_that_of_the_carry_after_the_step(name):
    """V = h with h ← ½ h + Σ obs, by hand across resets, truncations and both rollouts."""
    (_, params), moments, _, _, first, _, second, _ = two_rollouts(name, memory=True)
    h = np.zeros(B)
    for rollout in (first, second):
        obs = raw(rollout.obs, moments)
        for t in range(T):
            h = 0.5 * np.where(rollout.reset[t], 0, h) + rollout.obs[t].sum(-1)
            np.testing.assert_allclose(rollout.value[t], params["value"] * h, rtol=1e-4, atol=1e-5)
            successor = np.stack([obs[t, :, 0], obs[t, :, 1] + 1, rollout.action[t]], axis=-1)
            successor = np.asarray(normalize_obs(moments, jnp.asarray(successor)))
            not_terminated = ~rollout.terminated[t]
            expected = params["value"] * (0.5 * h + successor.sum(-1))
            np.testing.assert_allclose(
                rollout.next_value[t][not_terminated],
                expected[not_terminated],
                rtol=1e-3,
                atol=1e-3,
            )
    assert first.truncated.any() or second.truncated.any()


# ---------------------------------------------------------------------------------- ends and resets


@pytest.mark.parametrize("name", COUNTERS)
def test_terminations_truncations_and_resets_are_where_the_episodes_end(name):
    _, moments, (limit, longest), _, first, _, second, _ = two_rollouts(name)
    both = joined(first, second)
    obs = raw(both.obs, moments)
    t = np.round(obs[..., 1])
    assert not (both.terminated & both.truncated).any()
    np.testing.assert_array_equal(both.truncated, (t + 1 == limit) & ~both.terminated)
    done = both.terminated | both.truncated
    np.testing.assert_array_equal(both.reset[0], np.ones(B, bool))
    np.testing.assert_array_equal(both.reset[1:], done[:-1])
    # The first observation of an episode is that of a reset.
    np.testing.assert_allclose(t, np.where(both.reset, 0, t))
    same_episode = np.isclose(obs[1:, :, 0], obs[:-1, :, 0], atol=1e-6)
    np.testing.assert_array_equal(same_episode, ~done[:-1])
    np.testing.assert_allclose(both.reward, t + 1)
    assert both.terminated.any() == (longest > 0)
    assert both.mask.all() and both.valid.all()


def test_initial_states_differ_over_time_and_across_environments():
    """In Brax (issue 167) and Playground (issue 179) every reset repeated the first one."""
    _, moments, _, start, first, _, second, _ = two_rollouts("only truncations")
    starts = [np.where(x.reset, raw(x.obs, moments)[..., 0], np.nan) for x in (first, second)]
    for rows in starts:
        rows = rows[::2]  # all environments restart together, every two steps
        assert not np.isnan(rows).any()
        assert len(np.unique(np.round(rows, 5))) == rows.size
    later = np.concatenate(starts)[1:]
    assert not np.isin(np.round(later, 5), np.round(start.obs[:, 0], 5)).any()


def test_the_final_observation_is_not_lost():
    """Playground issue 305. The step returned is the one before the reset, the state after it."""
    env = counter(DISCRETE, 1, 0)  # every step ends an episode
    vector_env = vectorize(env, B)
    state = vector_env.reset(jax.random.key(0))
    after, timestep = jax.jit(vector_env.step)(jax.random.key(1), state, jnp.full(B, 2))
    np.testing.assert_array_equal(
        timestep.obs, np.stack([state.obs[:, 0], np.full(B, 1.0), np.full(B, 2.0)], -1)
    )
    assert timestep.truncated.all() and after.reset.all()
    np.testing.assert_array_equal(after.obs[:, 1:], np.zeros((B, 2)))
    assert (after.obs[:, 0] != state.obs[:, 0]).all()
    np.testing.assert_array_equal(after.env.start, after.obs[:, 0])


# --------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("name", COUNTERS)
def test_episode_statistics_equal_a_loop(name):
    _, _, _, _, first, middle, second, end = two_rollouts(name)
    current_return = np.zeros(B)
    current_length = np.zeros(B, int)
    for rollout, state in ((first, middle), (second, end)):
        returns = 0.0
        lengths = 0
        episodes = 0
        for t in range(T):
            for b in range(B):
                current_return[b] += rollout.reward[t, b]
                current_length[b] += 1
                if rollout.terminated[t, b] or rollout.truncated[t, b]:
                    returns = returns + current_return[b]
                    lengths = lengths + current_length[b]
                    episodes = episodes + 1
                    current_return[b] = 0.0
                    current_length[b] = 0
        np.testing.assert_allclose(state.finished.returns, returns, rtol=1e-6)
        assert (state.finished.lengths, state.finished.episodes) == (lengths, episodes)
        np.testing.assert_allclose(state.episode_return, current_return, rtol=1e-6)
        np.testing.assert_array_equal(state.episode_length, current_length)
    assert episodes > 0


# ----------------------------------------------------------------------------------- whole episodes


@pytest.mark.parametrize(
    ("limit", "longest"), [(5, 8), (5, 0), (T, 5)], ids=["both ends", "truncations", "terminations"]
)
def test_with_whole_episodes_only_the_first_episode_of_every_environment_counts(limit, longest):
    env = counter(DISCRETE, limit, longest)
    model = linear_model()
    num_envs = 16
    vector_env = vectorize(env, num_envs)
    rollout = make_rollout(env, vector_env, model, T, whole_episodes=True)
    state = vector_env.reset(jax.random.key(0))
    params = model.init(jax.random.key(1), state.obs)
    run = jax.jit(lambda key, state: rollout(key, params, MOMENTS, state, ()))
    first_starts = None
    for seed in (2, 3):
        transitions, state, _, rollout_moments = run(jax.random.key(seed), state)
        transitions = jax.tree.map(np.asarray, transitions)
        obs = raw(transitions.obs, MOMENTS)
        done = transitions.terminated | transitions.truncated
        assert transitions.reset[0].all()
        np.testing.assert_allclose(obs[0, :, 1], 0, atol=1e-5)  # all start a new episode
        if first_starts is not None:
            assert not np.isin(np.round(obs[0, :, 0], 5), first_starts).any()
        first_starts = np.round(obs[0, :, 0], 5)
        lengths = done.argmax(axis=0) + 1
        played = np.arange(T)[:, None] < lengths
        np.testing.assert_array_equal(transitions.valid, played)
        np.testing.assert_array_equal(transitions.mask, played)
        assert len(np.unique(lengths)) > 1 or longest == 0
        finished = state.finished
        assert (finished.episodes, finished.lengths) == (num_envs, lengths.sum())
        np.testing.assert_allclose(finished.returns, (lengths * (lengths + 1) / 2).sum())
        np.testing.assert_allclose(rollout_moments.samples, lengths.sum())
        np.testing.assert_allclose(
            rollout_moments.mean, obs[played].mean(axis=0), rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(
            rollout_moments.variance, obs[played].var(axis=0), rtol=1e-3, atol=1e-3
        )
        truncated = transitions.truncated & played
        final = np.stack([obs[..., 0], np.round(obs[..., 1]) + 1, transitions.action], axis=-1)[
            truncated
        ]
        final = normalize_obs(MOMENTS, jnp.asarray(final, jnp.float32))
        _, _, value = model.step(params, (), final, jnp.zeros(len(final), bool))
        np.testing.assert_allclose(transitions.next_value[truncated], value, rtol=2e-4, atol=2e-4)


def test_with_whole_episodes_memory_starts_empty():
    env = counter(DISCRETE, 5, 8)
    model = memory_model(3)

    def never_reset(params, carry, obs, reset):
        return model.step(params, carry, obs, jnp.zeros_like(reset))

    vector_env = vectorize(env, B)
    rollout = make_rollout(
        env, vector_env, model._replace(step=never_reset), T, whole_episodes=True
    )
    state = vector_env.reset(jax.random.key(0))
    params = model.init(jax.random.key(1), state.obs)
    transitions, _, _, _ = rollout(jax.random.key(2), params, None, state, (jnp.full(B, 100.0),))
    np.testing.assert_allclose(
        transitions.value[0], params["value"] * transitions.obs[0].sum(-1), rtol=1e-5
    )


# ------------------------------------------------------------------------------------------ actions


def test_log_prob_is_of_the_sampled_action_and_the_environment_gets_the_clipped_one():
    (_, params), _, _, _, first, _, _, _ = two_rollouts("at most one truncation", space=BOX)
    low, high = BOX.limits
    action = first.action
    policy = params["policy"]
    assert (action < low).any() and (action > high).any()
    mean = first.obs @ policy["w"] + policy["b"]
    log_std = policy["log_std"]
    z = (action - mean) / np.exp(log_std)
    expected = (-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)
    np.testing.assert_allclose(first.log_prob, expected, rtol=1e-4, atol=1e-4)
    received = first.obs[1:, :, 2:]  # the next observation shows the action of the step before
    continues = ~first.reset[1:]
    np.testing.assert_allclose(
        received[continues], np.clip(action, low, high)[:-1][continues], rtol=1e-6
    )


def test_a_squashed_action_fills_the_box():
    env = bound_actions(counter(BOX, 5, 0), squash=True)
    state, _ = env.reset(jax.random.key(0))
    for u, fraction in ((-50.0, 0.0), (0.0, 0.5), (50.0, 1.0), (0.7, (1 + np.tanh(0.7)) / 2)):
        timestep = env.step(jax.random.key(1), state, jnp.full(2, u))
        np.testing.assert_allclose(
            timestep.obs[2:], BOX.low + (BOX.high - BOX.low) * fraction, rtol=1e-6, atol=1e-7
        )


def test_unroll_gives_the_log_probabilities_and_values_of_the_rollout():
    for memory in (False, True):
        variant = {"memory": True} if memory else {}  # the same call as above, for the cache
        (model, params), _, _, start, first, *_ = two_rollouts("many truncations", **variant)
        carry = model.initial_carry(B)
        distribution, value = model.unroll(
            params, carry, jnp.asarray(first.obs), jnp.asarray(first.reset)
        )
        np.testing.assert_allclose(
            distribution.log_prob(jnp.asarray(first.action)), first.log_prob, atol=1e-5
        )
        np.testing.assert_allclose(value, first.value, rtol=1e-5, atol=1e-5)
        assert start.reset.all()


def test_a_mean_over_no_finished_episode_is_nan():
    """It is 0 in gymnax (issue 62). Here the metrics are computed from empty sums."""
    zeros = jnp.zeros((T, B))
    batch = Batch(
        obs=zeros,
        action=zeros,
        log_prob=zeros,
        value=zeros,
        advantage=zeros,
        target=zeros,
        reset=zeros > 0,
        mask=zeros == 0,
        valid=zeros == 0,
        carry=(),
    )
    empty_sums = EpisodeSums(jnp.zeros(()), jnp.zeros(()), jnp.int32(0))
    metrics = iteration_metrics(jnp.int32(7), empty_sums, batch, {})
    assert np.isnan(metrics.episode_return) and np.isnan(metrics.episode_length)
    assert (metrics.episodes, metrics.timesteps) == (0, 7)
