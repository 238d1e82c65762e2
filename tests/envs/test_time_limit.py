"""A time limit is no termination: learned values are those of the problem without the limit.

The reward is 1 at every step and episodes are truncated every 10 steps, so with γ = 0.9 every state
has the value 10. If the truncation were a termination, a state k steps before it would have the
value (1 − γ^k) / (1 − γ): between 1 and 6.5, and 4.1 on average.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_envs import clock

from purejaxppo import Config, make_train
from purejaxppo.networks.actor_critic import mlp_actor_critic
from purejaxppo.types import Discrete

GAMMA = 0.9
LIMIT = 10


@pytest.mark.parametrize("num_steps", [8, pytest.param(25, marks=pytest.mark.learning)])
def test_learned_values_are_those_of_the_problem_without_the_limit(num_steps):
    """Rollouts with at most one truncation and with several.

    The control is the same environment with terminations instead of truncations.
    """
    config = Config(
        num_envs=8,
        num_steps=num_steps,
        total_timesteps=150 * 8 * num_steps,
        num_minibatches=2,
        num_epochs=4,
        hidden_sizes=(16,),
        lr=0.02,
        gamma=GAMMA,
        vf_coef=1.0,
        max_grad_norm=10.0,
    )
    model = mlp_actor_critic(
        clock(LIMIT).observation_space, Discrete(2), hidden_sizes=config.hidden_sizes
    )
    states = jnp.eye(5)

    def learned_values(terminates):
        state = make_train(config, env=clock(LIMIT, terminates))(jax.random.key(0)).state
        return model.step(state.params, (), states, jnp.zeros(5, bool))[2]

    truncated, terminated = jax.jit(
        jax.vmap(learned_values), compiler_options={"xla_backend_optimization_level": 0}
    )(jnp.asarray([False, True]))

    np.testing.assert_allclose(truncated, np.full(5, 1 / (1 - GAMMA)), atol=0.5)
    assert (terminated < 6.6).all() and (terminated > 2.5).all()
