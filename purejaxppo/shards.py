"""Shards: blocks of environments that need nothing from one another until the update, and where they live.

``num_shards`` = S decides the numbers of a run, because each shard has its own random keys and fresh starts and gives
an equal part of every minibatch. The devices do not: S shards on one device or on any number that divides S are the
same program, in which the compiler places the reductions over the devices (`jax.sharding`).
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from purejaxppo.types import ConfigError, PyTree, TrainState

AXIS = "shards"  # of the mesh


def split_shards(arrays: PyTree, num_shards: int, axis: int = 0) -> PyTree:
    """[..., B, ...] with B at ``axis`` becomes [..., S, B / S, ...]."""
    return jax.tree.map(
        lambda x: x.reshape((*x.shape[:axis], num_shards, -1, *x.shape[axis + 1 :])), arrays
    )


def join_shards(arrays: PyTree, axis: int = 0) -> PyTree:
    """[..., S, B / S, ...] with S at ``axis`` becomes [..., B, ...], shard after shard."""
    return jax.tree.map(lambda x: x.reshape((*x.shape[:axis], -1, *x.shape[axis + 2 :])), arrays)


def make_mesh(num_shards: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of these devices, each of which gets equally many shards; by default of as many as can be used."""
    if devices is None:
        devices = most_devices("num_shards", num_shards, jax.devices())
    if num_shards % len(devices):
        raise ConfigError(
            f"num_shards = {num_shards} cannot be divided among {len(devices)} devices"
        )
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def most_devices(name: str, parts: int, devices: Sequence[jax.Device]) -> list[jax.Device]:
    """As many of these devices as divide so many parts evenly; of each process equally many, and one at least."""
    own: dict[int, list[jax.Device]] = {}
    for device in devices:
        own.setdefault(device.process_index, []).append(device)
    count = evenly(name, parts, [len(of_process) for of_process in own.values()])
    return [device for of_process in own.values() for device in of_process[:count]]


def evenly(name: str, parts: int, devices: Sequence[int]) -> int:
    """How many devices of each process share the parts evenly, of so many that the processes have."""
    for count in range(min(devices), 0, -1):
        if parts % (count * len(devices)) == 0:
            return count
    many = len(devices)
    raise ConfigError(
        f"{name} = {parts} cannot be divided among {many} processes: take a multiple of {many}"
    )


def state_sharding(mesh: Mesh | AbstractMesh, state: TrainState) -> TrainState:
    """The state, or its shapes, with a `NamedSharding` in the place of every leaf.

    What belongs to single environments is divided among the devices: their states, the model's memory and the running
    discounted returns. Every device has all the rest: parameters, optimiser, statistics, keys and counts.
    """
    everywhere = replicated(mesh)
    divided = NamedSharding(mesh, PartitionSpec(AXIS))
    if mesh.size == 1:
        return jax.tree.map(lambda _: everywhere, state)
    where = jax.tree.map(lambda _: everywhere, state)
    env, carry = (jax.tree.map(lambda _: divided, x) for x in (state.env, state.carry))
    normalizer = where.normalizer
    if normalizer.reward is not None:
        normalizer = normalizer._replace(
            reward=normalizer.reward._replace(discounted_return=divided)
        )
    return where._replace(env=env, carry=carry, normalizer=normalizer)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Where keys, hyper-parameters and metrics are: on every device."""
    return NamedSharding(mesh, PartitionSpec())
