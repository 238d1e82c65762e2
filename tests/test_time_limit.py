"""A time limit is no termination: the values that training finds are those of the problem that goes on.

Reward 1 at every step and a cut every 10 steps: with γ = 0.9 every state is worth 10. Were the cut a termination, the
state at time t would be worth (1 − γ^(10 − t)) / (1 − γ), which is 6.5 at the start and 1 before the end.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_envs import clock

from purejaxppo import Config, make_train
from purejaxppo.networks import mlp_actor_critic
from purejaxppo.types import Discrete

GAMMA, LIMIT = 0.9, 10


@pytest.mark.parametrize("num_steps", [8, 25])
def test_learned_values_are_those_of_the_problem_that_goes_on(num_steps):
    """Rollouts with at most one cut and with several; and the control: the same ends as terminations."""
    config = Config(
        num_envs=8,
        num_steps=num_steps,
        total_timesteps=120 * 8 * num_steps,
        num_minibatches=2,
        num_epochs=4,
        hidden_sizes=(16,),
        lr=0.02,
        gamma=GAMMA,
        vf_coef=1.0,
        max_grad_norm=10.0,
    )
    model = mlp_actor_critic(Discrete(2), config.hidden_sizes)
    times = jax.nn.one_hot(jnp.arange(LIMIT), LIMIT + 1)

    def learned_values(terminates):
        state = make_train(config, env=clock(LIMIT, terminates))(jax.random.key(0)).state
        return model.step(state.params, (), times, jnp.zeros(LIMIT, bool))[2]

    cut, terminated = jax.jit(jax.vmap(learned_values))(jnp.asarray([False, True]))

    true = np.full(LIMIT, 1 / (1 - GAMMA))
    true_of_terminated = (1 - GAMMA ** (LIMIT - np.arange(LIMIT))) / (1 - GAMMA)
    np.testing.assert_allclose(cut, true, atol=0.5)
    np.testing.assert_allclose(terminated, true_of_terminated, atol=0.5)
    assert np.abs(true - true_of_terminated).min() > 3.4
