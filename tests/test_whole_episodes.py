"""Runs of whole episodes: their length, annealing, derivatives and evaluations of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_envs import BOX, clock, counter, linear_model

from purejaxppo import Config, ConfigError, fit, make_train, make_trainer
from purejaxppo.types import Batch
from purejaxppo.updates import reinforce

LINEAR = linear_model()
GAUSSIAN = linear_model(gaussian=True, actions=2)
KEY = jax.random.key(3)
REINFORCE = Config(
    algorithm="reinforce",
    num_envs=4,
    num_steps=8,
    num_epochs=1,
    num_minibatches=1,
    anneal_lr=False,
    lr=0.01,
)
PPO = REINFORCE.replace(algorithm="ppo", episodic=True, num_epochs=2, num_minibatches=2)


@pytest.mark.parametrize("config", [REINFORCE, PPO], ids=["reinforce", "ppo"])
def test_total_episodes_is_rounded_up_to_iterations(config):
    fixed = config.replace(total_episodes=17)
    assert fixed.num_iterations == 5
    result = jax.jit(make_train(fixed, counter(), LINEAR))(KEY)
    assert result.metrics.episodes.tolist() == [4] * 5
    lengths = np.asarray(result.metrics.episode_length * result.metrics.episodes)
    np.testing.assert_array_equal(result.metrics.timesteps, np.cumsum(lengths.round()))

    # The iterations are those of a run that counts steps.
    steps = int(result.metrics.timesteps[-1])
    counted = jax.jit(make_train(config.replace(total_timesteps=steps), counter(), LINEAR))(KEY)
    jax.tree.map(np.testing.assert_array_equal, result.state.params, counted.state.params)
    assert counted.metrics.episodes[:6].tolist() == [4] * 5 + [0]


def test_a_run_of_known_length_is_one_scan():
    def primitives(config):
        jaxpr = jax.make_jaxpr(make_train(config, counter(), LINEAR))(KEY)
        return {equation.primitive.name: equation.params for equation in jaxpr.eqns}

    known = primitives(REINFORCE.replace(total_episodes=20))
    assert known["scan"]["length"] == 5 and "while" not in known
    assert "while" in primitives(REINFORCE.replace(total_timesteps=100))


@pytest.mark.parametrize(
    ("config", "discrete"),
    [
        (REINFORCE.replace(total_episodes=8), True),
        (REINFORCE.replace(total_episodes=8, anneal_lr=True), False),
        (PPO.replace(total_episodes=8), True),
        (PPO.replace(episodic=False, total_timesteps=64, early_stop_kl=1.0), False),
    ],
)
def test_the_derivative_of_a_run_in_both_modes(config, discrete):
    with jax.enable_x64(True):
        env, model = (counter(), LINEAR) if discrete else (counter(BOX), GAUSSIAN)

        def norm(lr):
            trained = make_train(config.replace(lr=lr), env, model)(KEY).state.params
            return optax.tree.norm(trained["policy"], squared=True)

        reverse = jax.jit(jax.grad(norm))(0.01)
        _, forward = jax.jit(lambda lr: jax.jvp(norm, (lr,), (1.0,)))(0.01)
        np.testing.assert_allclose(reverse, forward, rtol=1e-9)
        if discrete:  # with continuous actions the counter's observation is clipped
            compiled = jax.jit(norm)
            difference = (compiled(0.01 + 1e-6) - compiled(0.01 - 1e-6)) / 2e-6
            np.testing.assert_allclose(reverse, difference, rtol=1e-6)
        assert abs(reverse) > 1e-3


def test_annealing_by_iterations_of_whole_episodes():
    config = REINFORCE.replace(total_episodes=16, anneal_lr=True)
    assert _learning_rates(config) == pytest.approx([0.01, 0.0075, 0.005, 0.0025], rel=1e-3)


@pytest.mark.parametrize("algorithm", [REINFORCE, PPO], ids=["reinforce", "ppo"])
def test_annealing_by_the_share_of_steps(algorithm):
    config = algorithm.replace(total_timesteps=100, anneal_lr=True)
    trainer = make_trainer(config, counter(), LINEAR)
    state = jax.jit(trainer.init)(KEY)
    step = jax.jit(trainer.step)
    for _ in range(5):
        before = int(state.timesteps)
        state, _ = step(state)
        rate = optax.tree.get(state.update, "learning_rate")
        assert rate == pytest.approx(0.01 * (1 - before / 100), rel=1e-6)
    if algorithm is REINFORCE:
        counted = jax.jit(make_train(config, counter(), LINEAR))(KEY).metrics.timesteps
        steps = np.array([0, *counted[:4]])
        np.testing.assert_allclose(_learning_rates(config), 0.01 * (1 - steps / 100), rtol=1e-3)


def _learning_rates(config):
    """The learning rate of each iteration, from the changes of the parameters.

    Adam's change is lr · m / (√v + ε) of the gradients so far, and the trainer is stepped from
    states of the constant learning rate, so the changes differ by the learning rates alone.
    """
    constant = make_trainer(config.replace(anneal_lr=False), counter(), LINEAR)
    annealed = make_trainer(config, counter(), LINEAR)
    state = jax.jit(annealed.init)(KEY)
    rates = []
    for _ in range(config.num_iterations if config.has_fixed_length else 5):
        other = jax.jit(constant.init)(KEY)
        moments = optax.tree.get(state.update, "mu"), optax.tree.get(state.update, "nu")
        count = optax.tree.get_all_with_path(state.update, "count")[0][1]
        update = optax.tree.set(other.update, mu=moments[0], nu=moments[1], count=count)
        before = state
        state, _ = jax.jit(annealed.step)(before)
        other, _ = jax.jit(constant.step)(before._replace(update=update))
        change, full = (
            optax.tree.norm(optax.tree.sub(after.params["policy"], before.params["policy"]))
            for after in (state, other)
        )
        rates.append(float(0.01 * change / full))
    return rates


@pytest.mark.parametrize("truncates", [False, True])
def test_evaluations_of_the_model_after_the_last_step(truncates):
    """A model with a cache for an episode has no room for another step."""
    calls = []
    model = linear_model(actions=2)

    def step(params, carry, obs, reset):
        calls.append(None)
        return model.step(params, carry, obs, reset)

    env = clock(limit=8, terminates=not truncates)._replace(truncates=truncates)
    config = REINFORCE.replace(total_episodes=8)
    trainer = make_trainer(config, env, model._replace(step=step))
    state = jax.eval_shape(trainer.init, KEY)
    calls.clear()
    jax.make_jaxpr(trainer.step)(state)
    in_the_loop = 1
    assert len(calls) == in_the_loop + truncates
    trainer = make_trainer(PPO.replace(episodic=False), env, model._replace(step=step))
    calls.clear()
    jax.make_jaxpr(trainer.step)(state._replace(update=jax.eval_shape(trainer.init, KEY).update))
    assert len(calls) == in_the_loop + 1 + truncates


def test_reinforce_measures_its_step_on_a_sample_of_a_large_batch():
    passes = []

    def unroll(params, carry, obs, reset):
        passes.append(reset.shape)
        return LINEAR.unroll(params, carry, obs, reset)

    def metrics(model, num_envs):
        config = REINFORCE.replace(num_envs=num_envs, total_timesteps=10**6)
        trainer = make_trainer(config, counter(), model)
        return jax.jit(trainer.step)(jax.jit(trainer.init)(KEY))[1]

    sampled = metrics(LINEAR._replace(unroll=unroll), 4096)
    # One pass over all 4096 · 5 steps, and two over every fifth sequence.
    assert passes == [(5, 4096), (5, 820), (5, 820)]
    passes.clear()
    metrics(LINEAR._replace(unroll=unroll), 64)
    assert passes == [(5, 64), (5, 64)]

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(reinforce, "MOST_SKIPPED", 1)
        exact = metrics(LINEAR, 4096)
    assert sampled.approx_kl == pytest.approx(float(exact.approx_kl), rel=0.1)
    assert sampled.approx_kl != exact.approx_kl
    assert sampled.policy_loss == exact.policy_loss


def test_the_sample_has_every_kth_sequence_of_each_shard():
    steps = jnp.arange(16 * 2048.0).reshape(16, 2048)
    batch = Batch(*[steps] * 9, carry=jnp.arange(2048), extras={})
    sample = reinforce.sample_of_batch(batch, num_episodes=2048, num_shards=4)
    expected = np.asarray(steps).reshape(16, 4, 512)[:, :, ::8].reshape(16, -1)
    np.testing.assert_array_equal(sample.obs, expected)
    np.testing.assert_array_equal(sample.carry, expected[0])


def test_a_run_of_total_episodes_in_chunks():
    config = REINFORCE.replace(total_episodes=30, anneal_lr=True)
    run = fit(config, env=counter(), model=LINEAR, seeds=2, key=3)
    train = jax.jit(jax.vmap(make_train(config, counter(), LINEAR)))
    expected = train(jax.random.split(KEY, 2))
    jax.tree.map(np.testing.assert_array_equal, run.state.params, expected.state.params)
    assert run.metrics.timesteps.shape == (2, 8)


@pytest.mark.parametrize(
    ("config", "changes", "sentence"),
    [
        (REINFORCE, {"total_episodes": 0}, "None or an integer of at least 1"),
        (REINFORCE, {"total_episodes": 2.5}, "None or an integer of at least 1"),
        (REINFORCE, {"total_episodes": 2**40}, "total_episodes = 1099511627776: whole episodes"),
        (PPO, {"episodic": False, "total_episodes": 9}, "set episodic=True, or total_timesteps"),
    ],
)
def test_invalid_numbers_of_episodes(config, changes, sentence):
    with pytest.raises(ConfigError) as caught:
        make_train(config.replace(**changes), counter())
    assert sentence in str(caught.value)
