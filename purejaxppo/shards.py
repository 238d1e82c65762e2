"""Shards: blocks of environments that are independent until the update, and their devices.

The results of a run depend on ``num_shards`` = S, because each shard has its own random keys and
fresh starts, and contributes equally to every minibatch. They do not depend on the devices: one
device, or any number that divides S, runs the same program, and the compiler inserts the reductions
over devices (`jax.sharding`).
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
    """A mesh of these devices, each with the same number of shards.

    By default it has as many devices as possible.
    """
    if devices is None:
        devices = most_devices("num_shards", num_shards, jax.devices())
    if num_shards % len(devices):
        raise ConfigError(
            f"num_shards = {num_shards} cannot be divided among {len(devices)} devices"
        )
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def most_devices(name: str, parts: int, devices: Sequence[jax.Device]) -> list[jax.Device]:
    """The most devices that divide ``parts`` evenly, equally many of each process.

    Raises `ConfigError` if not even one device of each process does; ``name`` names the parts.
    """
    by_process: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    count = devices_per_process(name, parts, [len(own) for own in by_process.values()])
    return [device for own in by_process.values() for device in own[:count]]


def devices_per_process(name: str, parts: int, num_devices: Sequence[int]) -> int:
    """The largest number of devices that each process can use so that all get equal parts.

    ``num_devices`` has the number of devices of each process.
    """
    num_processes = len(num_devices)
    for count in range(min(num_devices), 0, -1):
        if parts % (count * num_processes) == 0:
            return count
    raise ConfigError(
        f"{name} = {parts} cannot be divided among {num_processes} processes: "
        f"take a multiple of {num_processes}"
    )


def state_sharding(mesh: Mesh | AbstractMesh, state: TrainState) -> TrainState:
    """A tree with the `NamedSharding` of every leaf of the state.

    Leaves with an axis of environments are divided among the devices: the states of the
    environments, the carry of the model and the discounted returns. All others are replicated.
    """
    on_all = jax.tree.map(lambda _: replicated(mesh), state)
    if mesh.size == 1:
        return on_all
    divided = NamedSharding(mesh, PartitionSpec(AXIS))
    env, carry = (jax.tree.map(lambda _: divided, x) for x in (state.env, state.carry))
    normalizer = on_all.normalizer
    if normalizer.reward is not None:
        normalizer = normalizer._replace(
            reward=normalizer.reward._replace(discounted_return=divided)
        )
    return on_all._replace(env=env, carry=carry, normalizer=normalizer)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A copy on every device, as for keys, hyper-parameters and metrics."""
    return NamedSharding(mesh, PartitionSpec())
