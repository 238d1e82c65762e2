"""Small environments with known dynamics, and a model whose memory can be computed by hand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.networks.actor_critic import feed_forward
from purejaxppo.networks.distributions import Categorical, DiagonalGaussian
from purejaxppo.types import Box, Dict, Discrete, Env, Model, MultiDiscrete, Step

DISCRETE = Discrete(3)
MULTI = MultiDiscrete((2, 3, 4))
BOX = Box((2,), -1.0, 0.5)


class Layer(NamedTuple):
    """Parameters of one linear layer."""

    w: Any
    b: Any


class CounterState(NamedTuple):
    start: Any  # a number in [0, 1), different in every episode
    length: Any  # the episode terminates after this many steps
    t: Any  # steps taken


def counter(action_space=DISCRETE, limit=5, longest=8) -> Env:
    """The observation [start, t, received action ...] identifies every state of every episode.

    The reward is t. An episode terminates after 1 … ``longest`` steps and is truncated after
    ``limit``: with ``longest`` above ``limit`` there are both, and ``longest=0`` never terminates.
    """
    width = int(np.prod(action_space.shape))

    def observe(state, action):
        return jnp.concatenate(
            [jnp.stack([state.start, 1.0 * state.t]), 1.0 * jnp.reshape(action, width)]
        )

    def reset(key):
        key_start, key_length = jax.random.split(key)
        length = (
            jax.random.randint(key_length, (), 1, longest + 1, jnp.int32)
            if longest
            else jnp.int32(2**30)
        )
        state = CounterState(jax.random.uniform(key_start), length, jnp.int32(0))
        return state, observe(state, jnp.zeros(width))

    def step(key, state, action):
        state = state._replace(t=state.t + 1)
        terminated = state.t >= state.length
        return Step(
            state=state,
            obs=observe(state, action),
            reward=1.0 * state.t,
            terminated=terminated,
            truncated=state.t >= limit,
        )

    space = Box((2 + width,), -np.inf, np.inf)
    return Env(
        name="counter",
        reset=reset,
        step=step,
        observation_space=space,
        action_space=action_space,
        max_episode_steps=limit,
        truncates=True,
    )


def clock(limit=10, terminates=False, phases=5) -> Env:
    """Reward 1 at every step; after ``limit`` steps the episode is truncated.

    With ``terminates``, which may be traced, it terminates instead. The observation is the one-hot
    phase of a cycle that starts at random: it does not reveal when the episode ends, and every
    final observation also occurs inside other episodes. With truncation every state has the value
    1 / (1 − γ).
    """

    def observe(state):
        return jax.nn.one_hot(state[1] % phases, phases)

    def reset(key):
        state = jnp.int32(0), jax.random.randint(key, (), 0, phases, jnp.int32)
        return state, observe(state)

    def step(key, state, action):
        state = state[0] + 1, state[1] + 1
        end = state[0] >= limit
        return Step(
            state=state,
            obs=observe(state),
            reward=jnp.ones(()),
            terminated=end & terminates,
            truncated=end & ~jnp.asarray(terminates),
        )

    return Env(
        name="clock",
        reset=reset,
        step=step,
        observation_space=Box((phases,), 0.0, 1.0),
        action_space=Discrete(2),
        max_episode_steps=limit,
        truncates=True,
    )


def masked_corridor(length=4, limit=12) -> Env:
    """Walk from the left end to the right end: the actions are left, right and a trap.

    The mask always forbids the trap, and forbids left at the left end. A forbidden action ends the
    episode with reward −10. The right end terminates it with reward 1; each step before costs 0.01.
    The observation has parts of every kind.
    """

    def observe(state, key):
        position, _ = state
        return {
            "position": 1.0 * position[None],
            "goal": jnp.int32(length - 1),
            "noise": jax.random.uniform(key, (2, 1)),
            "action_mask": jnp.stack([position > 0, jnp.bool_(True), jnp.bool_(False)]),
        }

    def reset(key):
        state = jnp.int32(0), jnp.int32(0)
        return state, observe(state, key)

    def step(key, state, action):
        position, t = state
        is_forbidden = (action == 2) | ((action == 0) & (position == 0))
        position = position + jnp.where(action == 1, 1, -1)
        state = jnp.clip(position, 0, length - 1), t + 1
        arrived = position == length - 1
        reward = jnp.where(is_forbidden, -10.0, jnp.where(arrived, 1.0, -0.01))
        return Step(
            state=state,
            obs=observe(state, key),
            reward=reward,
            terminated=arrived | is_forbidden,
            truncated=t + 1 >= limit,
        )

    space = Dict(
        {
            "position": Box((1,), 0, length - 1),
            "goal": Discrete(length),
            "noise": Box((2, 1), 0, 1),
            "action_mask": Box((3,), 0, 1),
        }
    )
    return Env(
        name="corridor",
        reset=reset,
        step=step,
        observation_space=space,
        action_space=Discrete(3),
        max_episode_steps=limit,
        truncates=True,
    )


def memory_model(features: int, decay: float = 0.5) -> Model:
    """Memory h ← decay · h + Σ obs, cleared at a reset; V = h; the logits are h · params."""

    def init(key, obs):
        return {"policy": jax.random.normal(key, (3,)), "value": jnp.ones(())}

    def initial_carry(batch_size):
        return (jnp.zeros(batch_size),)

    def step(params, carry, obs, reset):
        h = decay * jnp.where(reset, 0, carry[0]) + obs.sum(-1)
        return (h,), Categorical(0.1 * jnp.multiply.outer(h, params["policy"])), params["value"] * h

    def unroll(params, carry, obs, reset):
        def body(carry, inputs):
            carry, distribution, value = step(params, carry, *inputs)
            return carry, (distribution, value)

        return jax.lax.scan(body, carry, (obs, reset))[1]

    return Model(init, initial_carry, step, unroll)


def linear_model(gaussian: bool = False, actions: int = 3) -> Model:
    """Policy and value are linear in the observation, so that a NumPy version takes two lines."""

    def init(key, obs):
        key_policy, key_value = jax.random.split(key)
        policy = {
            "w": jax.random.normal(key_policy, (obs.shape[-1], actions)),
            "b": 0.1 * jnp.arange(actions),
        }
        value = {"w": jax.random.normal(key_value, (obs.shape[-1],)), "b": jnp.asarray(0.3)}
        return {
            "policy": policy | ({"log_std": jnp.full(actions, 0.2)} if gaussian else {}),
            "value": value,
        }

    def forward(params, obs):
        policy = params["policy"]
        value = params["value"]
        out = obs @ policy["w"]
        out = out + jnp.broadcast_to(policy["b"], out.shape)
        if gaussian:
            distribution = DiagonalGaussian(out, jnp.broadcast_to(policy["log_std"], out.shape))
        else:
            distribution = Categorical(out)
        return distribution, obs @ value["w"] + value["b"]

    def step(params, carry, obs, reset):
        return carry, *forward(params, obs)

    def unroll(params, carry, obs, reset):
        return forward(params, obs)

    return Model(init, lambda batch_size: (), step, unroll)


def mixed_model(actions: int = 3) -> Model:
    """`linear_model` in three precisions, with a tuple, a NamedTuple and empty containers.

    The key "1/w" reads like the path of another leaf.
    """
    linear = linear_model(actions=actions)

    def init(key, obs):
        params = linear.init(key, obs)
        policy = params["policy"]
        value = params["value"]
        b = jnp.asarray(policy["b"], jnp.float16)
        return {
            "policy": ([], Layer(jnp.asarray(policy["w"], jnp.bfloat16), b), {}),
            "value": {
                "1/w": value["w"],
                "1": {"w": jnp.asarray(value["b"], jnp.bfloat16)},
                "none": None,
            },
        }

    def plain(params):
        policy = params["policy"][1]
        value = params["value"]
        return {"policy": policy._asdict(), "value": {"w": value["1/w"], "b": value["1"]["w"]}}

    def step(params, carry, obs, reset):
        return linear.step(plain(params), carry, obs.astype(jnp.bfloat16), reset)

    def unroll(params, carry, obs, reset):
        return linear.unroll(plain(params), carry, obs.astype(jnp.bfloat16), reset)

    return Model(init, linear.initial_carry, step, unroll)


_init, _, _, _unroll = linear_model()
# Handles batches as the MLP does; whole runs with it compile in two thirds of the MLP's time.
LINEAR = feed_forward(_init, lambda params, obs: _unroll(params, (), obs, None))
