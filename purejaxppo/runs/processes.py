"""Several processes that train together, each with its own devices, connected by `jax.distributed`.

All of them call the same functions with the same arguments. Decisions that depend on time, files or
signals are made by process 0, the main process, and broadcast, so that all processes run the same
collectives. The main process also writes the files (see `Store`). With one process these functions
do nothing.
"""

import contextlib
import functools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from purejaxppo.types import ConfigError, PyTree

HEARTBEAT_SECONDS = 20  # without a sign of life from a process, after which all of them end

T = TypeVar("T")


def connect(
    coordinator: str = "auto", num_processes: int | None = None, process_index: int | None = None
) -> None:
    """Join the processes of a run. Call this in each of them, before any other use of JAX.

    This is `jax.distributed.initialize`, which may be called instead, with three changes: the death
    of a process is noticed sooner, a process that ends with an exception does not wait for the
    others, and SIGTERM keeps its meaning in `fit` and `sweep`, to stop after the next checkpoint.
    When a process dies, the others end with an error within a minute: usually a `ConnectionError`;
    if it was the first process, JAX ends them.

    Args:
        coordinator: address and port of the first process; ``auto`` detects all three arguments
            where JAX can: Slurm, Open MPI, MPI with mpi4py, Kubernetes, TPU pods.
        num_processes: the number of processes.
        process_index: the index of this process, 0 … ``num_processes`` − 1.

    Raises `ConfigError` for arguments that are invalid or do not fit together, and if the processes
    cannot be connected.
    """
    given: dict[str, Any] = {"num_processes": num_processes, "process_id": process_index}
    if coordinator == "auto":
        if any(x is not None for x in given.values()):
            raise ConfigError(
                "num_processes and process_index need the address of the first process: "
                "coordinator=HOST:PORT"
            )
        given = {}
    else:
        if num_processes is None or process_index is None or not 0 <= process_index < num_processes:
            raise ConfigError(
                f"num_processes = {num_processes} and process_index = {process_index}: "
                "a coordinator needs the number of processes and the index of this one, 0, 1, …"
            )
        if not coordinator.rpartition(":")[2].isdecimal() or coordinator.startswith(":"):
            raise ConfigError(f"coordinator = {coordinator!r}: it must be HOST:PORT, or auto")
        given["coordinator_address"] = coordinator
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the processes were not connected: {str(error).splitlines()[0]}"
        ) from None
    show = sys.excepthook

    def end(*error: Any) -> None:
        show(*error)
        exit_immediately(130 if issubclass(error[0], KeyboardInterrupt) else 1)

    sys.excepthook = end


def connected() -> bool:
    """Whether this is one of several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main_process() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def all_gather_objects(value: Any) -> list[Any]:
    """The values that the processes pass, which JSON must be able to represent."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    with _connection_errors():
        longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
        # Each size is compiled, so there should be few.
        padded = text.ljust(-(-longest // 256) * 256)
        rows = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
    return [json.loads(row.tobytes()) for row in rows]


def broadcast_from_main(value: T) -> T:
    """The value that the main process passes."""
    return all_gather_objects(value)[0]


def on_main_process(action: Callable[[], T]) -> T:
    """The result of ``action``, which only the main process calls. Its error is raised in all."""
    if jax.process_count() == 1:
        return action()
    value: Any = None
    failed: Exception | None = None
    if is_main_process():
        try:
            value = action()
        except Exception as error:
            failed = error
    wrong = None if failed is None else (isinstance(failed, ConfigError), str(failed))
    value, wrong = broadcast_from_main((value, wrong))
    if failed is not None:
        raise failed
    if wrong is not None:
        raise ConfigError(wrong[1]) if wrong[0] else OSError(f"in the first process: {wrong[1]}")
    return value


def require_same(given: dict[str, Any]) -> None:
    """Raise `ConfigError` if the processes were given different arguments."""
    pairs = (
        pair
        for name, x in given.items()
        for pair in (x.items() if isinstance(x, dict) else [(name, x)])
    )
    arguments = all_gather_objects(dict(pairs))
    for name in dict.fromkeys(name for of_process in arguments for name in of_process):
        values = [repr(of_process.get(name)) for of_process in arguments]
        if len(set(values)) > 1:
            raise ConfigError(
                f"all processes of a run need the same {name}, and they have {', '.join(values)}"
            )


def on_this_machine() -> int:
    """The number of processes that share the memory of this machine."""
    names = all_gather_objects(
        zlib.crc32(os.uname().nodename.encode()) if jax.process_count() > 1 else 0
    )
    return names.count(names[jax.process_index()])


def device_put_global(tree: PyTree, sharding: Sharding | None) -> PyTree:
    """`jax.device_put` of arrays that every process has, on the devices of all processes."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(x: Any) -> Any:
        x = x if hasattr(x, "dtype") else np.asarray(x)
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                put(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        x = np.asarray(jax.numpy.asarray(x))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def gather_to_host(tree: PyTree) -> PyTree:
    """The tree with a copy in every process of arrays that are divided among the processes.

    `multihost_utils.process_allgather` would need one collective for each leaf, and does not accept
    random keys.
    """
    shardings = {x.sharding for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)}
    divided = [x for x in shardings if not x.is_fully_addressable]
    if not divided:
        return tree
    assert isinstance(divided[0], NamedSharding)
    replicate = _replicate(NamedSharding(divided[0].mesh, PartitionSpec()))
    with _connection_errors():
        gathered = jax.block_until_ready(replicate(tree))
    return jax.tree.map(lambda x: x.addressable_data(0), gathered)


@functools.cache
def _replicate(sharding: NamedSharding) -> Callable[[PyTree], PyTree]:
    """The identity, compiled once for each structure of a tree."""
    return jax.jit(lambda x: x, out_shardings=sharding)


@contextlib.contextmanager
def _connection_errors() -> Iterator[None]:
    """Raise `ConnectionError` if a collective fails because another process has ended."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        message = "the processes of this run are no longer connected, one may have ended"
        raise ConnectionError(f"{message}: {str(error).splitlines()[0]}") from error


def exit_immediately(code: int) -> NoReturn:
    """End this process without waiting for the others, which may have ended."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
