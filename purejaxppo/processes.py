"""Several processes that train together, each with devices of its own, connected by `jax.distributed`.

All of them call the same functions with the same arguments. Whatever goes by a clock, a disk or a keyboard is agreed
here, so that all take the same way; files are written, and found, by the first one. With one process nothing of this
does anything.
"""

import contextlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from purejaxppo.types import ConfigError, PyTree

HEARTBEAT_SECONDS = 20  # after which a process that is not heard of any more ends all of them
SHUTDOWN_SECONDS = 30  # that a process waits for the others when it ends

T = TypeVar("T")


def connect(coordinator: str = "auto", num_processes: int | None = None, process_index: int | None = None) -> None:
    """Join the processes of a run; before anything else is asked of JAX, in each of them.

    ``coordinator`` is the address and port of the first process, of which each one's ``process_index`` in 0 …
    ``num_processes`` − 1 tells whether it is it; with ``auto`` all three are found where JAX finds them: Slurm, Open
    MPI, MPI with mpi4py, Kubernetes, TPU pods. When a process dies, the others end with an error within a minute: a
    `ConnectionError`, or by JAX, which ends those that wait for the first process.

    This is `jax.distributed.initialize`, which may be called instead, with shorter limits; and SIGTERM stays what it is
    for `fit` and `sweep`: the end after the next checkpoint.
    """
    given: dict[str, Any] = {"num_processes": num_processes, "process_id": process_index}
    if coordinator == "auto":
        if any(x is not None for x in given.values()):
            raise ConfigError("num_processes and process_index need the coordinator's address: coordinator=HOST:PORT")
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
        jax.distributed.initialize(
            **given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes were not connected: {str(error).splitlines()[0]}") from None


def connected() -> bool:
    """Whether this is one of several processes."""
    return jax.distributed.is_initialized()


def first() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def everyones(value: Any) -> list[Any]:
    """What each process gives, which JSON can hold; all have to call it."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    text = json.dumps(value).encode()
    with _reaching_others():
        longest = process_allgather(np.int32(len(text))).max()
        padded = np.full(-(-longest // 256) * 256, ord(" "), np.uint8)
        padded[: len(text)] = np.frombuffer(text, np.uint8)
        return [json.loads(x.tobytes()) for x in process_allgather(padded)]


def agreed(value: T) -> T:
    """The value that the first process gives."""
    return everyones(value)[0]


def by_first(action: Callable[[], T]) -> T:
    """What the first process does for all of them, and what comes of it; where it fails, it fails for all."""
    if jax.process_count() == 1:
        return action()
    value: Any = None
    failed: Exception | None = None
    if first():
        try:
            value = action()
        except Exception as error:
            failed = error
    value, told = agreed((value, None if failed is None else str(failed)))
    if failed is not None:
        raise failed
    if told is not None:
        raise ConfigError(told)
    return value


def on_this_machine() -> int:
    """How many of the processes share this machine's memory."""
    names = everyones(zlib.crc32(os.uname().nodename.encode()) if jax.process_count() > 1 else 0)
    return names.count(names[jax.process_index()])


def put(tree: PyTree, where: Sharding | None) -> PyTree:
    """Arrays that every process has, on the devices of all."""
    if where is None or where.is_fully_addressable:
        return jax.device_put(tree, where)

    def one(x: Any) -> Any:
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        x = np.asarray(jax.numpy.asarray(x))
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(one, tree)


def whole(tree: PyTree) -> PyTree:
    """Arrays that are divided among processes, whole in each of them; others as they are."""
    shardings = {x.sharding for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)}
    far = [x for x in shardings if not x.is_fully_addressable]
    if not far:
        return tree
    assert isinstance(far[0], NamedSharding)
    everywhere = NamedSharding(far[0].mesh, PartitionSpec())
    with _reaching_others():
        gathered = jax.block_until_ready(jax.jit(lambda x: x, out_shardings=everywhere)(tree))
    return jax.tree.map(lambda x: x.addressable_data(0), gathered)


@contextlib.contextmanager
def _reaching_others() -> Iterator[None]:
    """What JAX raises where another process has ended, whatever its type is, is a `ConnectionError`."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        told = "the processes of this run do not work together any more, one may have ended"
        raise ConnectionError(f"{told}: {str(error).splitlines()[0]}") from error


def abandon(code: int) -> NoReturn:
    """End this process at once: at its normal end it would wait for the others, which may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
