"""Several processes that train together, each with devices of its own, connected by `jax.distributed`.

All of them call the same functions with the same arguments. Decisions that depend on time, files or
signals are made by process 0 and broadcast, so that all processes run the same collectives. Process 0
also reads and writes the files. With one process these functions do nothing.
"""

import functools
import json
import os
import sys
import zlib
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from numpy.typing import NDArray

from purejaxppo.types import ConfigError, PyTree

HEARTBEAT_SECONDS = 20  # after which a process that is not heard of any more ends all of them

T = TypeVar("T")


def connect(
    coordinator: str = "auto", num_processes: int | None = None, process_index: int | None = None
) -> None:
    """Join the processes of a run; before anything else is asked of JAX, in each of them.

    ``coordinator`` is the address and port of the first process, of which each one's ``process_index`` in 0 …
    ``num_processes`` − 1 tells whether it is it; with ``auto`` all three are found where JAX finds them: Slurm, Open
    MPI, MPI with mpi4py, Kubernetes, TPU pods. When a process dies, the others end with an error within a minute: with
    a `ConnectionError`, mostly, or ended by JAX, as when the first one is gone.

    This is `jax.distributed.initialize`, which may be called instead, and three things more: who is dead is known
    sooner, a process that ends with an exception does not wait for the others, and SIGTERM stays what it is for `fit`
    and `sweep`, the end after the next checkpoint.
    """
    given: dict[str, Any] = {"num_processes": num_processes, "process_id": process_index}
    if coordinator == "auto":
        if any(x is not None for x in given.values()):
            raise ConfigError(
                "num_processes and process_index need the coordinator's address: coordinator=HOST:PORT"
            )
        given = {}
    else:
        if num_processes is None or process_index is None or not 0 <= process_index < num_processes:
            raise ConfigError(
                f"num_processes = {num_processes} and process_index = {process_index}: a coordinator needs how many "
                "there are, and which of them, 0, 1, …, this is"
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
    """What each process gives, which JSON can hold; all have to call it."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    longest = int(_from_each(np.array([len(text)], np.int32)).max())
    padded = text.ljust(-(-longest // 256) * 256)  # few sizes, each of which is compiled
    return [json.loads(x.tobytes()) for x in _from_each(np.frombuffer(padded, np.uint8))]


def _from_each(row: NDArray[Any]) -> NDArray[Any]:
    """[processes, n] of a row [n] of each."""
    one_of = {device.process_index: device for device in reversed(jax.devices())}  # its first
    mesh = Mesh(np.array([one_of[i] for i in range(jax.process_count())]), ("processes",))
    own = jax.device_put(row[None], one_of[jax.process_index()])
    where = NamedSharding(mesh, PartitionSpec("processes"))
    return np.asarray(
        gather_to_host(
            jax.make_array_from_single_device_arrays((mesh.size, *row.shape), where, [own])
        )
    )


def broadcast_from_main(value: T) -> T:
    """The value that the first process gives."""
    return all_gather_objects(value)[0]


def on_main_process(action: Callable[[], T]) -> T:
    """What the first process does for all of them, and what comes of it; where it fails, it fails for all."""
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
    """Raise `ConfigError` where a process was given something else than the first one."""
    pairs = (
        pair
        for name, x in given.items()
        for pair in (x.items() if isinstance(x, dict) else [(name, x)])
    )
    given = json.loads(json.dumps(dict(pairs)))
    all_given = all_gather_objects(given)
    names = dict.fromkeys(name for one in all_given for name in one)
    for name in names:
        values = [repr(one.get(name)) for one in all_given]
        if len(set(values)) > 1:
            raise ConfigError(
                f"all processes of a run need the same {name}, and they have {', '.join(values)}"
            )


def on_this_machine() -> int:
    """How many of the processes share this machine's memory."""
    names = all_gather_objects(
        zlib.crc32(os.uname().nodename.encode()) if jax.process_count() > 1 else 0
    )
    return names.count(names[jax.process_index()])


def device_put_global(tree: PyTree, where: Sharding | None) -> PyTree:
    """Arrays that every process has, on the devices of all."""
    if where is None or where.is_fully_addressable:
        return jax.device_put(tree, where)

    def one(x: Any) -> Any:
        x = x if hasattr(x, "dtype") else np.asarray(x)
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                one(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        x = np.asarray(jax.numpy.asarray(x))
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(one, tree)


def gather_to_host(tree: PyTree) -> PyTree:
    """Arrays that are divided among processes, whole in each of them; others as they are."""
    shardings = {x.sharding for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)}
    far = [x for x in shardings if not x.is_fully_addressable]
    if not far:
        return tree
    assert isinstance(far[0], NamedSharding)
    try:
        gathered = jax.block_until_ready(
            _replicate(NamedSharding(far[0].mesh, PartitionSpec()))(tree)
        )
    except (
        jax.errors.JaxRuntimeError,
        ValueError,
    ) as error:  # JAX raises either where another process is gone
        told = "the processes of this run do not work together any more, one may have ended"
        raise ConnectionError(f"{told}: {str(error).splitlines()[0]}") from error
    return jax.tree.map(lambda x: x.addressable_data(0), gathered)


@functools.cache
def _replicate(sharding: NamedSharding) -> Callable[[PyTree], PyTree]:
    """The identity, compiled once for each kind of tree."""
    return jax.jit(lambda x: x, out_shardings=sharding)


def exit_immediately(code: int) -> NoReturn:
    """End this process at once: at its normal end it would wait for the others, which may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
