"""`run_pipeline`: supervised fine-tuning, a reward model, reinforcement learning, and a report.

directory/
  config.json        the settings, the key and versions
  tokenizer.json     for tasks of texts
  sft/ reward/ ppo/  one directory for each stage: its config.json, metrics.csv and other logs,
                     learning_curve.png, seconds.json and the model
  evaluation.json    measurements of the policies before and after, and of the best of n
  samples.jsonl      their continuations of the same prompts
  report.md          the report, with figures
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from purejaxppo.rlhf.judging import measure_policies
from purejaxppo.rlhf.pipeline_stages import (
    dpo_stage,
    policy_setup,
    policy_stage,
    reward_stage,
    score_of,
    sft_stage,
)
from purejaxppo.rlhf.report import write_report
from purejaxppo.rlhf.settings import PipelineSettings
from purejaxppo.rlhf.stages import FIRST_STAGES, StageEvents, run_stage
from purejaxppo.rlhf.tasks import Task, arithmetic_task
from purejaxppo.rlhf.text_tasks import reviews_task
from purejaxppo.rlhf.texts import require_pairs, require_texts
from purejaxppo.rlhf.tokenizer import save_tokenizer
from purejaxppo.runs import run_directory
from purejaxppo.runs.disk import locked
from purejaxppo.runs.loggers.open import checked_names
from purejaxppo.types import ConfigError

SILENT = StageEvents(
    on_start=lambda stage, programs: None,
    on_chunk=lambda stage, chunk: None,
    on_note=lambda sentence: None,
)


def run_pipeline(
    settings: PipelineSettings,
    directory: str | os.PathLike,
    task: Task | None = None,
    *,
    resume: bool = False,
    stages_from: str | os.PathLike | None = None,
    loggers: tuple[str, ...] = (),
    events: StageEvents = SILENT,
) -> dict[str, Any]:
    """Train all stages into ``directory``, and return the measurements of ``evaluation.json``.

    The stages are those of Ouyang et al. 2022: supervised fine-tuning; a reward model from
    preferences, unless the task has a score; and reinforcement learning with a KL anchor to the
    fine-tuned policy, or DPO on the preferences. With ``resume`` finished stages are kept and the
    one that was interrupted goes on from its last checkpoint.

    Main arguments:
        settings: see `PipelineSettings.of`.
        directory: a new directory, or with ``resume`` that of the pipeline to continue.
        task: the data; by default those that the settings name.

    Other arguments:
        stages_from: the directory of another pipeline with the same data and settings of the first
            stages, whose fine-tuned policy and reward model are copied instead of trained.
        loggers: ``tensorboard`` and ``wandb``, for each stage.
        events: callbacks of the progress.

    Raises `ConfigError` for arguments that do not fit together and for a stage that diverges, and
    `KeyboardInterrupt` after Ctrl-C or SIGTERM, when a checkpoint is saved.
    """
    directory = Path(directory)
    task = make_task(settings) if task is None else task
    # Everything is checked before the directory is made.
    require_fits(task, settings)
    score = score_of(settings, task)
    setup = None if settings.algorithm == "dpo" else policy_setup(settings, task, score)
    checked_names(loggers, directory, 1)
    data_sha256 = fingerprint(task)
    if stages_from is not None:
        require_stages(Path(stages_from), settings, task, data_sha256)
    with opened(directory, settings, data_sha256, resume):
        if task.tokenizer is not None and not (directory / "tokenizer.json").exists():
            save_tokenizer(directory / "tokenizer.json", task.tokenizer)
        if stages_from is not None:
            _copy_stages(Path(stages_from), directory)
        run = partial(run_stage, directory=directory, events=events, loggers=loggers)
        reference = run(sft_stage(settings, task, data_sha256)).params
        reward = None
        if task.pairs is not None:
            reward = run(reward_stage(settings, task, data_sha256, reference))
        score_params = None if reward is None else reward.params
        if setup is None:
            final = run(dpo_stage(settings, task, data_sha256, reference))
        else:
            final = run(
                policy_stage(settings, task, data_sha256, setup, reference, score, score_params)
            )
        if (directory / "evaluation.json").exists():
            measured = json.loads((directory / "evaluation.json").read_text())
        else:
            events.on_note("evaluation of the policies on held-out prompts")
            measured = measure_policies(
                settings, task, directory, reference, final.params, score, score_params, reward
            )
        if not (directory / "report.md").exists():
            write_report(directory, settings)
    return measured


def make_task(settings: PipelineSettings) -> Task:
    """The task that the settings name."""
    if settings.task == "arithmetic":
        return arithmetic_task(settings.key)
    if settings.task == "reviews":
        return reviews_task(settings)
    raise ConfigError("task = 'records' has no data: make them by records_task")


def require_fits(task: Task, settings: PipelineSettings) -> None:
    """Raise `ConfigError` unless the data of the task fit the settings and the vocabulary."""
    if (task.score is None) == (task.pairs is None):
        raise ConfigError("a task must have either a score or pairs")
    if settings.algorithm == "dpo" and task.pairs is None:
        raise ConfigError("dpo learns from pairs of completions, and this task has none")
    for name in ("context", "max_new_tokens"):
        of_task, of_settings = getattr(task, name), getattr(settings, name)
        if of_task != of_settings:
            raise ConfigError(
                f"the task was made with {name} = {of_task} and the settings have {of_settings}: "
                "use the same"
            )
    sizes = (task.vocab_size, task.context)
    require_texts(task.demonstrations, *sizes, "demonstration")
    require_texts(task.held_out, *sizes, "held-out text")
    for name, prompts in (("prompt", task.prompts), ("held-out prompt", task.held_out_prompts)):
        longest = int(np.max(prompts.length))
        if longest + task.max_new_tokens > task.context:
            raise ConfigError(
                f"a {name} has {longest} tokens: {task.max_new_tokens} more exceed the context of "
                f"{task.context}"
            )
    if task.ranked is not None:
        require_texts(task.ranked.texts, *sizes, "rated text")
    for pairs in (task.pairs, task.held_out_pairs):
        if pairs is not None:
            require_pairs(pairs, *sizes)


def fingerprint(task: Task) -> str:
    """The SHA-256 of the arrays and sizes of a task, which a resume compares."""
    arrays = (task.demonstrations, task.held_out, task.prompts, task.held_out_prompts)
    digest = hashlib.sha256(repr((task.vocab_size, task.eos, task.max_new_tokens)).encode())
    for x in jax.tree.leaves((arrays, task.pairs, task.ranked, task.held_out_pairs)):
        array = np.ascontiguousarray(x)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------- directory


@contextlib.contextmanager
def opened(
    directory: Path, settings: PipelineSettings, data_sha256: str, resume: bool
) -> Iterator[None]:
    """Make the directory, or check that of the pipeline to resume, and lock it."""
    identity = {
        "kind": "rlhf",
        "settings": dataclasses.asdict(settings),
        "data_sha256": data_sha256,
    }
    if not (resume and directory.exists()):
        run_directory.reserve(directory, identity)
    with locked(directory):
        before = _read_config(directory)
        then = before.get("settings", {})
        now = json.loads(json.dumps(identity["settings"]))
        differing = [name for name, x in now.items() if then.get(name) != x]
        if differing:
            words = ", ".join(
                f"{name} = {then.get(name)!r} there and {now[name]!r} here" for name in differing
            )
            raise ConfigError(f"the pipeline in {directory} has other settings: {words}")
        if before.get("data_sha256") != data_sha256:
            raise ConfigError(f"the pipeline in {directory} was started with other data")
        yield


def require_stages(source: Path, settings: PipelineSettings, task: Task, data_sha256: str) -> None:
    """Raise `ConfigError` unless another pipeline has the first stages for these settings."""
    config = _read_config(source)
    then = config.get("settings", {})
    now = settings.of_first_stages()
    differing = [name for name, x in now.items() if then.get(name) != x]
    if config.get("data_sha256") != data_sha256:
        raise ConfigError(f"the stages in {source} were trained on other data")
    if differing:
        raise ConfigError(
            f"the stages in {source} were trained with other settings: {', '.join(differing)}"
        )
    for stage in FIRST_STAGES[: 1 if task.pairs is None else 2]:
        if not (source / stage / "model").exists():
            raise ConfigError(f"the stage {stage} in {source} is not finished: resume it first")


def _copy_stages(source: Path, directory: Path) -> None:
    """Copy the first stages of another pipeline, as far as they are not there."""
    for stage in FIRST_STAGES:
        if (source / stage).exists() and not (directory / stage).exists():
            shutil.copytree(source / stage, directory / f".{stage}", dirs_exist_ok=True)
            (directory / f".{stage}").rename(directory / stage)


def _read_config(directory: Path) -> dict[str, Any]:
    """The ``config.json`` of a pipeline."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or config.get("kind") != "rlhf":
        raise ConfigError(f"{directory} is not a pipeline: it has no valid config.json of one")
    return config
