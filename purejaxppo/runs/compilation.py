"""Ahead-of-time compilation: on which devices, for how many bytes, and what a compiled program says when it fails."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from purejaxppo.config import Config
from purejaxppo.shards import make_mesh, most_devices
from purejaxppo.validation import jit_is_disabled

AGENTS = PartitionSpec("agents")

T = TypeVar("T")


def compile_all(*programs: tuple[Any, tuple[Any, ...]]) -> list[Callable[..., Any]]:
    """Jitted functions, each with the shapes of its arguments, compiled at the same time.

    Under `jax.disable_jit` nothing is compiled: they come back as they are.
    """
    if jit_is_disabled():
        return [function for function, _ in programs]
    lowered = [function.lower(*shapes) for function, shapes in programs]
    with ThreadPoolExecutor() as pool:  # XLA compiles without Python's lock
        return list(pool.map(lambda program: program.compile(), lowered))


def telling_nan(compiled: Callable[..., T]) -> Callable[..., T]:
    """A compiled program that says what ``jax_debug_nans`` found, as JAX says it of what `jax.jit` calls."""

    def call(*inputs: Any) -> T:
        try:
            return compiled(*inputs)
        except Exception as error:
            if (
                type(error).__name__ != "InternalFloatingPointError"
            ):  # JAX has no public name for it
                raise
            found = "jax_debug_nans or jax_debug_infs found a value that is not finite in the results of training"
            raise FloatingPointError(
                f"{found}; with jax.disable_jit too it names the operation"
            ) from error

    return call


def memory_of(compiled: Any) -> int:
    """The bytes that a compiled program needs on each device, by the compiler's own analysis; 0 where it has none."""
    analysis = None if jit_is_disabled() else compiled.memory_analysis()
    return int(analysis.argument_size_in_bytes + analysis.temp_size_in_bytes) if analysis else 0


def mesh_of(
    config: Config, agents: int | None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """As many devices as divide the agents evenly, or the shards of one; a single one under `jax.disable_jit`.

    Raises `ConfigError` where there is not as much for each process.
    """
    if jit_is_disabled():
        devices = jax.devices()[:1]
    if agents is None:
        return make_mesh(config.num_shards, devices)
    devices = most_devices("seeds", agents, jax.devices() if devices is None else devices)
    return Mesh(np.array(devices), ("agents",))


def device_name(placed: NamedSharding | None) -> str:
    """The kind of the devices that are used, and how many."""
    devices = jax.devices()[:1] if placed is None else list(placed.mesh.devices.flat)
    first = devices[0]
    name = (
        first.platform
        if first.device_kind == first.platform
        else f"{first.platform} ({first.device_kind})"
    )
    several = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return name if len(devices) == 1 else f"{len(devices)} × {name}{several}"
