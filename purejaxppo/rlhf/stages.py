"""A stage of the pipeline: a training loop whose model is stored, and is trained only once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from purejaxppo.analysis.plots import metric_curve
from purejaxppo.rlhf.model_files import StoredModel, load_model, save_model
from purejaxppo.runs.chunks import Chunk
from purejaxppo.runs.disk import atomic_write
from purejaxppo.runs.job import run_job
from purejaxppo.runs.programs import Job, Programs
from purejaxppo.runs.session import Evaluator, SessionResult
from purejaxppo.types import ConfigError, PRNGKey, PyTree


class Interrupted(Exception):
    """Ctrl-C or SIGTERM stopped a stage, which has saved a checkpoint."""


class Stage(NamedTuple):
    """A training loop and its place in the directory of the pipeline."""

    name: str  # of the directory
    job: Job
    params: PyTree  # where training starts; None: at new parameters
    frozen: PyTree  # data and reference models
    key: int
    identity: dict[str, Any]  # a description that a resume compares
    unit: str  # what an iteration consumes, such as tokens
    units_per_iteration: float
    # final parameters -> the model that is stored
    result: Callable[[PyTree], StoredModel]
    evaluator_of: Callable[[Programs, PRNGKey], Evaluator] | None = None


class StageEvents(NamedTuple):
    """Callbacks of the progress of a pipeline."""

    on_start: Callable[[Stage, Programs], None]
    on_chunk: Callable[[Stage, Chunk], None]
    on_note: Callable[[str], None]  # a sentence about what happens


def run_stage(
    stage: Stage, directory: Path, events: StageEvents, loggers: tuple[str, ...] = ()
) -> StoredModel:
    """Train a stage in ``directory/name``, continue it if it was interrupted, or load its model.

    ``model/`` holds the result; ``seconds.json`` the duration of training and its throughput, which
    is that of the last part if the stage was interrupted. Raises `Interrupted`, and `ConfigError`
    if training diverges, with the iteration.
    """
    home = directory / stage.name
    if (home / "model").exists():
        events.on_note(f"{stage.name}: finished before, loaded from {home / 'model'}")
        return load_model(home / "model")

    def write(home: Path, result: SessionResult) -> None:
        figure = metric_curve(stage.job.metrics, result.metrics, stage.name)
        atomic_write(home / "learning_curve.png", lambda path: figure.savefig(path, format="png"))
        if result.interrupted or first_divergence(stage.job, result.metrics) is not None:
            return
        iterations = stage.job.num_iterations - result.resumed_at
        rate = iterations * stage.units_per_iteration / result.seconds
        measured = {"seconds": result.seconds, "per_second": rate, "unit": stage.unit}
        measured["resumed_at"] = result.resumed_at
        text = json.dumps(measured, indent=2) + "\n"
        atomic_write(home / "seconds.json", lambda path: path.write_text(text))
        save_model(home / "model", stage.result(result.state.params))

    result = run_job(
        stage.job,
        key=stage.key,
        params=stage.params,
        frozen=stage.frozen,
        directory=home,
        identity=stage.identity | {"stage": stage.name},
        resume=home.exists(),
        loggers=loggers,
        evaluator_of=stage.evaluator_of,
        on_start=lambda programs: events.on_start(stage, programs),
        on_chunk=lambda chunk: events.on_chunk(stage, chunk),
        on_end=write,
    )
    if result.interrupted:
        raise Interrupted(stage.name)
    diverged_at = first_divergence(stage.job, result.metrics)
    if diverged_at is not None:
        raise ConfigError(
            f"{stage.name} diverged in iteration {diverged_at}: a loss, a gradient or a score is "
            f"not finite; see {home / 'metrics.csv'}"
        )
    return load_model(home / "model")


def first_divergence(job: Job, metrics: PyTree) -> int | None:
    """The first iteration, counted from 1, that is not finite; None if all are."""
    finite = np.atleast_2d(np.asarray(job.metrics.is_finite(metrics)))[0]
    return None if finite.all() else int(finite.argmin()) + 1
