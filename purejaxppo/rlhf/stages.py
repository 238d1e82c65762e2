"""A stage of the pipeline: a training loop whose model is stored, and is trained only once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from purejaxppo.analysis.plots import metric_curve
from purejaxppo.rlhf.json_files import write_json
from purejaxppo.rlhf.model_files import StoredModel, load_model, save_model
from purejaxppo.runs.chunks import Chunk
from purejaxppo.runs.disk import atomic_write
from purejaxppo.runs.job import run_job
from purejaxppo.runs.programs import Job, Programs
from purejaxppo.runs.session import Evaluator, SessionResult
from purejaxppo.types import ConfigError, PRNGKey, PyTree

FIRST_STAGES = ("sft", "reward")  # the directories of the stages before the last one


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

    ``model/`` holds the result; ``seconds.json`` the seconds of the compiled iterations and their
    throughput, of the last part if the stage was interrupted. It is missing if the interruption
    came after the last iteration. Raises `KeyboardInterrupt`, and
    `ConfigError` if training diverges, with the iteration, and if the stage in the directory has
    other settings.
    """
    home = directory / stage.name
    if (home / "model").exists():
        _require_same_stage(stage, home)
        events.on_note(f"{stage.name}: finished before, loaded from {home / 'model'}")
        return load_model(home / "model")
    if home.exists() and not (home / "checkpoints").exists():
        raise ConfigError(
            f"the stage in {home} ended without a model, because it diverged: start a new pipeline "
            "with other settings; it can use the earlier stages of this one (stages_from)"
        )
    seconds = 0.0

    def on_chunk(chunk: Chunk) -> None:
        nonlocal seconds
        seconds += chunk.seconds
        events.on_chunk(stage, chunk)

    def write(home: Path, result: SessionResult) -> None:
        figure = metric_curve(stage.job.metrics, result.metrics, stage.name)
        atomic_write(home / "learning_curve.png", lambda path: figure.savefig(path, format="png"))
        if result.interrupted or first_divergence(stage.job, result.metrics) is not None:
            return
        iterations = stage.job.num_iterations - result.resumed_at
        if iterations > 0:  # else it was interrupted after the last one
            measured = {
                "seconds": seconds,
                "per_second": iterations * stage.units_per_iteration / seconds,
                "unit": stage.unit,
                "resumed_at": result.resumed_at,
            }
            write_json(home / "seconds.json", measured)
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
        on_chunk=on_chunk,
        on_end=write,
    )
    if result.interrupted:
        raise KeyboardInterrupt
    diverged_at = first_divergence(stage.job, result.metrics)
    if diverged_at is not None:
        raise ConfigError(
            f"{stage.name} diverged in iteration {diverged_at}: a loss, a gradient or a score is "
            f"not finite; see {home / 'metrics.csv'}"
        )
    return load_model(home / "model")


def _require_same_stage(stage: Stage, home: Path) -> None:
    """Raise `ConfigError` unless the finished stage was trained with the same identity."""
    before = json.loads((home / "config.json").read_text())
    now = json.loads(json.dumps(stage.identity))
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        raise ConfigError(
            f"the stage in {home} was trained with other {' and '.join(differing)}: "
            "choose another directory"
        )


def first_divergence(job: Job, metrics: PyTree) -> int | None:
    """The first iteration, counted from 1, that is not finite; None if all are."""
    finite = np.atleast_2d(np.asarray(job.metrics.is_finite(metrics)))[0]
    return None if finite.all() else int(finite.argmin()) + 1
