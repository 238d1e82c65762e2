"""What a compiled program holds: its arguments are no constants in it."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from small_envs import counter, linear_model

from purejaxppo import Config
from purejaxppo.networks.actor_critic import feed_forward
from purejaxppo.runs import programs
from purejaxppo.runs.agents import job_of
from purejaxppo.setup import set_up

CONFIG = Config(num_envs=2, num_steps=4, num_minibatches=1, num_epochs=1, total_timesteps=16)
LARGE = 50 * 2**20 // 4  # float32 elements in 50 MiB


def large_model():
    """A linear policy beside 50 MiB of parameters that take no part."""
    linear = linear_model()

    def init(key, obs):
        params = linear.init(key, obs)
        return params | {"value": params["value"] | {"table": jnp.ones(LARGE)}}

    return feed_forward(init, lambda params, obs: linear.unroll(params, (), obs, None))


def test_params_and_frozen_of_50_megabytes_are_arguments_of_the_programs(monkeypatch):
    model = large_model()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 3)))
    lowered = []

    def compile_all(*functions):
        for function, shapes in functions:
            lowered.append(function.lower(*shapes).as_text())
        return [function for function, _ in functions]

    monkeypatch.setattr(programs, "compile_all", compile_all)
    monkeypatch.setattr(programs, "memory_of", lambda compiled: 0)

    def reward_fn(transitions, config, frozen):
        return transitions.reward + frozen["value"]["table"][0]

    started = time.perf_counter()
    for agents in (None, 2):
        job = job_of(set_up(CONFIG, counter(), model, reward_fn))
        compiled = programs.compile_programs(job, agents, params=params, frozen=params)
        state = compiled.init(compiled.keys(jax.random.key(1)), {})
        table = np.asarray(state.params["value"]["table"])
        np.testing.assert_array_equal(table, np.ones(table.shape))
    assert len(lowered) == 4 and max(map(len, lowered)) < 2**20
    assert all(f"tensor<{LARGE}xf32>" in text for text in lowered)
    assert time.perf_counter() - started < 60
