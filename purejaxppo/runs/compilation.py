"""Ahead-of-time compilation: devices, memory and errors of compiled programs."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from purejaxppo.shards import make_mesh, most_devices
from purejaxppo.validation import jit_is_disabled

AGENTS = PartitionSpec("agents")

T = TypeVar("T")


def compile_all(*programs: tuple[Any, tuple[Any, ...]]) -> list[Callable[..., Any]]:
    """Compile jitted functions in parallel, each for the shapes of its arguments.

    Under `jax.disable_jit` the functions are returned unchanged.
    """
    if jit_is_disabled():
        return [function for function, _ in programs]
    lowered = [function.lower(*shapes) for function, shapes in programs]
    with ThreadPoolExecutor() as pool:  # XLA releases Python's global lock
        return list(pool.map(lambda program: program.compile(), lowered))


def telling_nan(compiled: Callable[..., T]) -> Callable[..., T]:
    """``compiled`` with the `FloatingPointError` of ``jax_debug_nans`` that `jax.jit` raises."""

    def call(*inputs: Any) -> T:
        try:
            return compiled(*inputs)
        except Exception as error:
            # JAX has no public name for this error.
            if type(error).__name__ != "InternalFloatingPointError":
                raise
            message = (
                "jax_debug_nans or jax_debug_infs found a value that is not finite in the results "
                "of training; with jax.disable_jit too it names the operation"
            )
            raise FloatingPointError(message) from error

    return call


def memory_of(compiled: Any) -> int:
    """Bytes that a compiled program needs on each device; 0 if the compiler has no estimate."""
    analysis = None if jit_is_disabled() else compiled.memory_analysis()
    return int(analysis.argument_size_in_bytes + analysis.temp_size_in_bytes) if analysis else 0


def mesh_of(
    num_shards: int, agents: int | None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of the most devices that divide the agents evenly, or the shards of a single agent.

    It has one device under `jax.disable_jit`. Raises `ConfigError` if the processes cannot have
    equal portions.
    """
    if jit_is_disabled():
        devices = jax.devices()[:1]
    if agents is None:
        return make_mesh(num_shards, devices)
    devices = most_devices("seeds", agents, jax.devices() if devices is None else devices)
    return Mesh(np.array(devices), ("agents",))


def device_name(sharding: NamedSharding | None) -> str:
    """The kind and the number of the devices of a sharding; of the default device for None."""
    devices = jax.devices()[:1] if sharding is None else list(sharding.mesh.devices.flat)
    platform = devices[0].platform
    kind = devices[0].device_kind
    name = platform if kind == platform else f"{platform} ({kind})"
    suffix = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return name if len(devices) == 1 else f"{len(devices)} × {name}{suffix}"
