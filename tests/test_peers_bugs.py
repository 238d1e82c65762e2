"""Bugs of other libraries, each as a test of this one.

Others are tested with their subject: time limits as terminations in test_time_limit; replayed
initial states and lost final observations in test_rollout; the reward normaliser in test_normalize;
element-wise gradient clipping and a value coefficient without effect in test_ppo; step counts,
metrics of every step, seeds in the log and memory in test_train; episode boundaries in
test_advantages.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_envs import counter, linear_model

from purejaxppo import Config, make_trainer
from purejaxppo.advantages import gae

CONFIG = Config(
    num_envs=4,
    num_steps=8,
    total_timesteps=6 * 32,
    num_epochs=1,
    num_minibatches=2,
    normalize_obs=True,
    normalize_reward=True,
    lr=0.01,
)
ENV = counter(limit=12, longest=0)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def pieces():
    """Compiled init and step, and the states and metrics after 1 … 6 uninterrupted iterations."""
    trainer = make_trainer(CONFIG, ENV, linear_model())
    init = jax.jit(trainer.init)
    step = jax.jit(trainer.step)
    state = init(KEY)
    history = []
    for _ in range(6):
        state, metrics = step(state)
        history.append((state, metrics))
    return init, step, history


def numbers(tree):
    return jax.tree.map(
        lambda x: np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ),
        tree,
    )


def test_lambda_is_in_the_first_term_of_the_advantage():
    """Brax omits λ there. Two steps: Â_0 = δ_0 + γ λ δ_1."""
    column = jnp.ones((2, 1))
    never = column < 0
    advantage, _ = gae(column, 0 * column, 0 * column, never, never, 0.5, 0.5)
    np.testing.assert_allclose(advantage[:, 0], [1.25, 1.0])


def test_the_state_is_complete_so_that_a_restored_run_continues_exactly(pieces):
    """In Brax (issue 655) and Stoix, restoring loses the optimiser or the normaliser.

    Here the state is stored as plain NumPy arrays.
    """
    _, step, history = pieces
    leaves, structure = jax.tree.flatten(history[2][0])
    is_key = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    stored = [
        np.array(jax.random.key_data(x) if key else x)
        for x, key in zip(leaves, is_key, strict=True)
    ]
    restored = [
        jax.random.wrap_key_data(x) if key else jnp.asarray(x)
        for x, key in zip(stored, is_key, strict=True)
    ]
    state = jax.tree.unflatten(structure, restored)
    for expected_state, expected_metrics in history[3:]:
        state, metrics = step(state)
        jax.tree.map(
            np.testing.assert_array_equal,
            numbers((state, metrics)),
            numbers((expected_state, expected_metrics)),
        )


@pytest.mark.parametrize("part", ["update", "normalizer", "env", "key", "iteration"])
def test_every_part_of_the_state_matters(pieces, part):
    """With one part of the state replaced by its initial value, the run continues differently."""
    init, step, history = pieces
    expected = numbers(step(history[2][0]))
    changed = numbers(step(history[2][0]._replace(**{part: getattr(init(KEY), part)})))
    differs = jax.tree.map(lambda a, b: bool((a != b).any()), changed, expected)
    assert any(jax.tree.leaves(differs))


def test_evaluation_does_not_consume_the_training_key(pieces):
    """In rejax, evaluating more often changes training. Here a policy acts between iterations."""
    from purejaxppo import Policy, evaluate

    init, step, history = pieces
    state = init(KEY)
    for expected_state, _ in history[:2]:
        state, _ = step(state)
        policy = Policy.from_state(CONFIG, state, env=ENV, model=linear_model())
        statistics = evaluate(policy, ENV, jax.random.key(8), 5)
        np.testing.assert_array_equal(statistics.lengths, np.full(5, 12))
        jax.tree.map(np.testing.assert_array_equal, numbers(state), numbers(expected_state))


def test_mean_return_is_nan_in_an_iteration_in_which_no_episode_ends(pieces):
    """In gymnax (issue 62) it is 0. Truncations are after 12, 24, 36 and 48 of the 48 steps."""
    _, _, history = pieces
    episodes = [
        (float(m.episode_return), float(m.episode_length), int(m.episodes)) for _, m in history
    ]
    none = (np.nan, np.nan, 0)
    some = (12 * 13 / 2, 12, 4)  # 1 + 2 + … + 12
    np.testing.assert_array_equal(episodes, [none, some, some, none, some, some])


def test_observations_are_normalised_by_the_same_moments_in_rollout_and_update(pieces):
    """Brax's default updates them in between, so the stored log-probabilities do not match."""
    _, _, history = pieces
    deviations = [float(metrics.first_ratio_deviation) for _, metrics in history]
    means = [np.asarray(state.normalizer.obs.mean) for state, _ in history]
    assert max(deviations) < 1e-5
    assert all(np.abs(a - b).max() > 1e-4 for a, b in itertools.pairwise(means))
