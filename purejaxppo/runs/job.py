"""`run_job`: any training loop with checkpoints, logs, progress and a directory."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from purejaxppo.keys import random_key
from purejaxppo.runs import processes, run_directory
from purejaxppo.runs.checkpoints import Checkpoints
from purejaxppo.runs.chunks import Chunk
from purejaxppo.runs.compilation import mesh_of
from purejaxppo.runs.disk import atomic_write
from purejaxppo.runs.loggers.open import checked_names, open_loggers
from purejaxppo.runs.programs import Job, Programs, compile_programs, shapes_of
from purejaxppo.runs.session import CheckpointPolicy, Evaluator, SessionResult, run_session
from purejaxppo.types import ConfigError, PRNGKey, PyTree
from purejaxppo.validation import integer, seconds_of


def run_job(
    job: Job,
    *,
    seeds: int = 1,
    key: Any = 0,
    params: PyTree = None,
    frozen: PyTree = None,
    directory: str | os.PathLike | None = None,
    identity: dict[str, Any] | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    loggers: Sequence[str] = (),
    evaluator_of: Callable[[Programs, PRNGKey], Evaluator] | None = None,
    on_start: Callable[[Programs], None] | None = None,
    on_chunk: Callable[[Chunk], None] | None = None,
    on_end: Callable[[Path, SessionResult], None] | None = None,
) -> SessionResult:
    """Compile and run a job; `fit` is the job that trains agents.

    Training runs in chunks. Ctrl-C and SIGTERM stop it after a chunk. The metrics of the result are
    [seeds, iterations]; its state has an axis of seeds if there are several.

    Main arguments:
        job: the training loop.
        seeds: the number of members, which train in parallel.
        key: an integer or a random key.
        params, frozen: arrays passed to ``Trainer.init`` and ``Trainer.step``. They are not stored:
            pass the same ones again to resume.
        directory: a new directory, for ``metrics.csv``, checkpoints and other logs.
        identity: a description of the job, stored in ``config.json``, that JSON can represent. A
            run is resumed only by a job with the same identity and, unless the identity has a
            ``kind``, the same numbers of seeds and iterations and the same total.
        resume: continue the killed or interrupted run in ``directory`` from its newest checkpoint.

    Other arguments:
        checkpoint_seconds: time between two checkpoints.
        loggers: ``tensorboard`` and ``wandb``.
        evaluator_of: makes the evaluator from the programs and the keys of the members.
        on_start: called with the `Programs` after compilation.
        on_chunk: called with each `Chunk`.
        on_end: writes results to the directory; called by the main process. By default it writes
            ``learning_curve.png``, the plotted metric against the progress.

    Raises `ConfigError` for arguments that are invalid or do not fit together.
    """
    agents = None if integer("seeds", seeds, 1) == 1 else seeds
    checkpoint_seconds = seconds_of("checkpoint_seconds", checkpoint_seconds)
    key, named_key = random_key(key)
    if identity is None and directory is not None:
        raise ConfigError("a run with a directory needs an identity, which a resume compares")
    identity = identity or {}
    if "kind" not in identity:
        length = {"num_iterations": job.num_iterations, "total": job.total}
        identity = {"kind": "job", "seeds": seeds, **length, **identity}
    # All errors in the arguments are raised before the directory is made.
    mesh_of(job.num_shards, agents)
    shapes = shapes_of(job, agents, params=params, frozen=frozen)
    checked_names(loggers, None if directory is None else Path(directory), seeds)
    with run_directory.open_run_directory(directory, identity, named_key, resume) as store:
        checkpointing = None
        if store.directory is not None:
            names = [f"seed_{seed}" for seed in range(seeds)]
            checkpointing = CheckpointPolicy(
                Checkpoints(store.subdirectory("checkpoints")),
                checkpoint_seconds,
                resume,
                partial(open_loggers, loggers, store.directory, names, identity, job.metrics),
            )
        programs = compile_programs(job, agents, params=params, frozen=frozen, shapes=shapes)
        if on_start:
            on_start(programs)
        keys = programs.keys(key)
        result = run_session(
            programs,
            keys,
            {},
            evaluator=evaluator_of(programs, keys) if evaluator_of else None,
            checkpointing=checkpointing,
            on_chunk=on_chunk,
        )
        result = result._replace(
            state=processes.gather_to_host(result.state),
            best=processes.gather_to_host(result.best),
        )
        store.write(on_end or _write_curve, result)
        if not result.interrupted:
            store.write(run_directory.end)
    return result


def _write_curve(directory: Path, result: SessionResult) -> None:
    from purejaxppo.analysis.plots import metric_curve

    figure = metric_curve(result.programs.job.metrics, result.metrics)
    atomic_write(directory / "learning_curve.png", lambda path: figure.savefig(path, format="png"))
