"""An inconsistent environment is refused with one sentence, before anything is compiled."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from sentences import sentence_of
from small_envs import BOX, MULTI, clock, counter, linear_model

from purejaxppo import Config, Policy, evaluate, fit, make_train, sweep
from purejaxppo.envs.consistency import require_consistent
from purejaxppo.envs.vector import fresh_starts
from purejaxppo.types import Box, Discrete, MultiDiscrete

CONFIG = Config(
    num_envs=2, num_steps=4, num_minibatches=1, num_epochs=1, total_timesteps=16, hidden_sizes=(4,)
)


def same(x):
    return x


def changed(reset_obs=same, step_obs=None, reset_state=same, step_state=None, space=None, **fields):
    """The counter with its observations, states or fields of `Step` changed by functions."""
    env = counter()
    step_obs = step_obs or reset_obs
    step_state = step_state or reset_state

    def reset(key):
        state, obs = env.reset(key)
        return reset_state({"inner": state, "extra": jnp.int32(0)}), reset_obs(obs)

    def step(key, state, action):
        timestep = env.step(key, state["inner"], action)
        timestep = timestep._replace(
            state=step_state({"inner": timestep.state, "extra": state["extra"]}),
            obs=step_obs(timestep.obs),
        )
        return timestep._replace(
            **{name: change(getattr(timestep, name)) for name, change in fields.items()}
        )

    return env._replace(reset=reset, step=step, observation_space=space or env.observation_space)


def with_extra(change):
    return lambda state: state | {"extra": change(state["extra"])}


class Pair(NamedTuple):
    first: object
    second: object


def integers(x):
    return jnp.asarray(x, jnp.int32)


RULE = "reset and step of counter must return the same structure, shapes and types: "
LATER = "one step and the next of counter must return the same structure, shapes and types: "
OBS = "it must have that of its observation_space, (3,)"
INCONSISTENT = {
    "a dict": (
        changed(lambda x: {"a": x}),
        "reset of counter returns a dict as obs: it must be one array",
    ),
    "a tuple": (
        changed(lambda x: (x, x)),
        "reset of counter returns a tuple as obs: it must be one array",
    ),
    "a named tuple": (
        changed(lambda x: Pair(x, x)),
        "reset of counter returns a Pair as obs: it must be one array",
    ),
    "nothing": (
        changed(lambda x: None),
        "reset of counter returns a NoneType as obs: it must be one array",
    ),
    "a dict from step": (
        changed(same, lambda x: {"a": x}),
        "step of counter returns a dict as obs: it must be one array",
    ),
    "swapped": (
        counter()._replace(reset=lambda key: counter().reset(key)[::-1]),
        "reset of counter returns a CounterState as obs: it must be one array",
    ),
    "obs alone": (
        counter()._replace(reset=lambda key: counter().reset(key)[1]),
        "reset of counter returns a ShapeDtypeStruct: it must return (state, obs)",
    ),
    "shape of both": (
        changed(lambda x: x[:2]),
        f"reset of counter returns an obs of the shape (2,): {OBS}",
    ),
    "shape of reset": (
        changed(lambda x: x[None], same),
        f"reset of counter returns an obs of the shape (1, 3): {OBS}",
    ),
    "shape of step": (
        changed(same, lambda x: x[:2]),
        f"step of counter returns an obs of the shape (2,): {OBS}",
    ),
    "scalar": (changed(lambda x: x[0]), f"reset of counter returns an obs of the shape (): {OBS}"),
    "floats in a finite space": (
        changed(space=MultiDiscrete((9, 9, 9))),
        "obs of counter has the type float32: "
        "in the observation_space MultiDiscrete it must hold integers",
    ),
    "bools in a finite space": (
        changed(lambda x: x[0] > 0, space=Discrete(2)),
        "obs of counter has the type bool: in the observation_space Discrete it must hold integers",
    ),
    "complex numbers": (
        changed(lambda x: 1j * x),
        "obs of counter has the type complex64: "
        "in the observation_space Box it must hold real numbers",
    ),
    "keys": (
        changed(lambda x: jax.random.key(0), space=Box((), 0, 1)),
        "obs of counter has the type key<fry>: "
        "in the observation_space Box it must hold real numbers",
    ),
    "an unknown space": (
        changed(space={"a": Box((3,), 0, 1)}),
        "the observation_space of counter is a dict: "
        "it must be a Discrete, a MultiDiscrete or a Box, or a Dict of these",
    ),
    "an unknown action space": (
        counter()._replace(action_space=3),
        "the action_space of counter is a int: it must be a Discrete, a MultiDiscrete or a Box",
    ),
    "a plain tuple": (
        counter()._replace(step=lambda *inputs: tuple(counter().step(*inputs))),
        "step of counter returns a tuple: it must return a Step",
    ),
    "reward": (
        changed(reward=lambda x: x[None]),
        "step of counter returns a reward of the shape (1,) and type float32: "
        "it must be one real number",
    ),
    "complex reward": (
        changed(reward=lambda x: 1j * x),
        "step of counter returns a reward of the shape () and type complex64: "
        "it must be one real number",
    ),
    "rewards": (
        changed(reward=lambda x: {"a": x}),
        "step of counter returns a dict as reward: it must be one number",
    ),
    "terminated": (
        changed(terminated=integers),
        "step of counter returns a terminated of the shape () and type int32: it must be one bool",
    ),
    "truncated": (
        changed(truncated=lambda x: x[None]),
        "step of counter returns a truncated of the shape (1,) and type bool: it must be one bool",
    ),
    "mask": (
        changed(mask=lambda x: 1.0),
        "step of counter returns a mask of the shape () and type float32: it must be one bool",
    ),
    "state of step": (
        changed(step_state=lambda x: x | {"more": jnp.zeros(())}),
        f"{RULE}state.more comes from step only",
    ),
    "state of reset": (
        changed(reset_state=lambda x: x | {"more": jnp.zeros(())}, step_state=same),
        f"{RULE}state.more comes from reset only",
    ),
    "containers": (
        changed(reset_state=with_extra(lambda x: [x]), step_state=with_extra(lambda x: (x[0],))),
        f"{RULE}their states are made of different containers, such as a list and a tuple",
    ),
    "shape in the state": (
        changed(step_state=with_extra(lambda x: x[None] if x.ndim == 0 else x)),
        f"{RULE}state.extra is int32 of the shape () and int32 of the shape (1,)",
    ),
    "a key in the state": (
        changed(
            reset_state=with_extra(lambda x: jax.random.key(0)), step_state=with_extra(lambda x: 1)
        ),
        f"{RULE}state.extra is key<fry> of the shape () and int32 of the shape ()",
    ),
    "types that change at every step": (
        changed(
            step_state=with_extra(
                lambda x: jnp.asarray(x, "float32" if x.dtype == "int32" else "int32")
            )
        ),
        f"{LATER}state.extra is float32 of the shape () and int32 of the shape ()",
    ),
}


@pytest.mark.parametrize("name", INCONSISTENT)
def test_an_inconsistent_environment_is_refused_with_one_sentence(name):
    env, expected = INCONSISTENT[name]
    assert sentence_of(lambda: require_consistent(env)) == expected


@pytest.mark.parametrize("name", ["a dict", "shape of step", "reward", "state of step"])
def test_trainers_runs_sweeps_and_evaluations_check_the_environment_first(name, tmp_path):
    env, expected = INCONSISTENT[name]
    assert sentence_of(lambda: make_train(CONFIG, env)) == expected
    assert sentence_of(lambda: make_train(CONFIG, env, linear_model())) == expected
    assert sentence_of(lambda: fit(CONFIG, env=env, directory=tmp_path / "run")) == expected
    assert sentence_of(lambda: sweep(CONFIG, env=env, directory=tmp_path / "sweep")) == expected
    consistent = counter()
    policy = Policy(
        config=CONFIG,
        params={},
        obs_moments=None,
        model=linear_model(),
        observation_space=consistent.observation_space,
        action_space=consistent.action_space,
    )
    assert sentence_of(lambda: evaluate(policy, env, jax.random.key(0), 2)) == expected
    assert list(tmp_path.iterdir()) == []


CONSISTENT = {
    "counter": counter(),
    "other actions": counter(MULTI),
    "continuous actions": counter(BOX),
    "a pair as the state": clock(),
    "integers in a box": changed(integers),
    "bools in a box": changed(lambda x: x > 0),
    "bfloat16 in a box": changed(lambda x: x.astype(jnp.bfloat16)),
    "integers in a finite space": changed(lambda x: jnp.uint8(x[1]), space=Discrete(9)),
    "integer reset": changed(integers, same),
    "float reset of integers": changed(same, integers, space=MultiDiscrete((9, 9, 9))),
    "integer state of reset": changed(step_state=with_extra(lambda x: x + 0.5)),
    "float state of reset": changed(
        reset_state=with_extra(lambda x: 0.0), step_state=with_extra(integers)
    ),
    "weak types": changed(
        reset_state=with_extra(lambda x: 0), step_state=with_extra(lambda x: x + 1)
    ),
    "a key in the state": changed(
        reset_state=with_extra(lambda x: jax.random.key(0)), step_state=same
    ),
    "integer reward": changed(reward=integers),
    "a bool as the reward": changed(reward=lambda x: x > 3),
    "Python's own numbers": changed(
        reward=lambda x: 1, truncated=lambda x: False, mask=lambda x: True
    ),
    "a list": counter()._replace(reset=lambda key: list(counter().reset(key))),
}


@pytest.mark.parametrize("name", CONSISTENT)
def test_a_consistent_environment_can_be_stepped_in_a_loop(name):
    """The loops of rollout and evaluation begin with fresh starts in the dtypes of a step."""
    env = CONSISTENT[name]
    require_consistent(env)
    dtype = float if isinstance(env.action_space, Box) else jnp.int32
    action = jnp.zeros((2, *env.action_space.shape), dtype)

    def loop(key):
        def step(now, _):
            timestep = jax.vmap(env.step)(jax.random.split(key, 2), now[0], action)
            return (timestep.state, timestep.obs), (
                timestep.reward,
                timestep.terminated | timestep.truncated,
            )

        return jax.lax.scan(step, fresh_starts(env, key, 2), None, 3)

    (_, obs), (reward, done) = jax.eval_shape(loop, jax.random.key(0))
    assert obs.shape == (2, *env.observation_space.shape)
    assert reward.shape == done.shape == (3, 2) and done.dtype == bool


def test_an_environment_with_a_traced_part_is_checked_too():
    """`clock` takes a traced flag, which must not leak from one trace to the next."""

    def one(terminates):
        require_consistent(clock(terminates=terminates))
        return terminates

    with jax.checking_leaks():
        jax.eval_shape(jax.vmap(one), jnp.array([True, False]))
