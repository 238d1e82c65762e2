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
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.envs.tokens import tokens
from purejaxppo.rlhf import dpo, reward_model, sft
from purejaxppo.rlhf.judging import make_text_evaluator, measure_policies
from purejaxppo.rlhf.language_model import language_model, policy_decoder, with_critic
from purejaxppo.rlhf.model_files import REWARD, StoredModel
from purejaxppo.rlhf.report import write_report
from purejaxppo.rlhf.sampling import generate
from purejaxppo.rlhf.settings import PipelineSettings
from purejaxppo.rlhf.shaping import kl_shaped
from purejaxppo.rlhf.stages import Stage, StageEvents, run_stage
from purejaxppo.rlhf.supervised_settings import SupervisedSettings
from purejaxppo.rlhf.tasks import Task, arithmetic_task, reviews_task
from purejaxppo.rlhf.texts import Score, require_pairs, require_texts
from purejaxppo.rlhf.tokenizer import save_tokenizer
from purejaxppo.runs import run_directory
from purejaxppo.runs.agents import job_of
from purejaxppo.runs.disk import locked
from purejaxppo.setup import Setup, set_up
from purejaxppo.types import ConfigError, PyTree

NUM_STANDARDIZED = 512  # samples that give the scores their mean and deviation
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
        loggers: ``tensorboard`` and ``wandb``, for each stage.
        events: callbacks of the progress.

    Raises `ConfigError` for arguments that do not fit together and for a stage that diverges, and
    `Interrupted` after Ctrl-C.
    """
    directory = Path(directory)
    identity = {"kind": "rlhf", "settings": dataclasses.asdict(settings)}
    with _opened(directory, identity, resume):
        task = make_task(settings) if task is None else task
        require_fits(task, settings)
        score = score_of(settings, task)
        # Everything is checked before the first stage is trained.
        setup = None if settings.algorithm == "dpo" else policy_setup(settings, task, score)
        if task.tokenizer is not None and not (directory / "tokenizer.json").exists():
            save_tokenizer(directory / "tokenizer.json", task.tokenizer)
        run = partial(run_stage, directory=directory, events=events, loggers=loggers)
        reference = run(sft_stage(settings, task)).params
        reward = None if task.pairs is None else run(reward_stage(settings, task, reference))
        score_params = None if reward is None else reward.params
        if setup is None:
            final = run(dpo_stage(settings, task, reference))
        else:
            final = run(policy_stage(settings, task, setup, reference, score, score_params))
        events.on_note("evaluation of the policies on held-out prompts")
        measured = measure_policies(
            settings, task, directory, reference, final.params, score, score_params, reward
        )
        write_report(directory, settings)
    return measured


def make_task(settings: PipelineSettings) -> Task:
    """The task that the settings name."""
    if settings.task == "arithmetic":
        return arithmetic_task(settings.key)
    if settings.task == "reviews":
        return reviews_task(settings)
    raise ConfigError("task = 'records' needs records: give demonstrations and preferences")


def require_fits(task: Task, settings: PipelineSettings) -> None:
    """Raise `ConfigError` unless the data of the task fit the vocabulary and the context."""
    require_texts(task.demonstrations, task.vocab_size, task.context, "demonstration")
    if settings.algorithm == "dpo" and task.pairs is None:
        raise ConfigError("dpo learns from pairs of completions, and this task has none")
    if task.pairs is not None:
        require_pairs(task.pairs, task.vocab_size, task.context)


def score_of(settings: PipelineSettings, task: Task) -> Score:
    """The score of the task, or that of its reward model, whose parameters are an argument."""
    if task.score is not None:
        return task.score
    sizes = settings.decoder_sizes(task.vocab_size, task.context)
    model = reward_model.reward_model(sizes)
    return lambda tokens, lengths, params: model.score(params, tokens, lengths)


# ----------------------------------------------------------------------------------------- stages


def sft_stage(settings: PipelineSettings, task: Task) -> Stage:
    """Supervised fine-tuning on the demonstrations, several of which share a row."""
    sizes = settings.decoder_sizes(task.vocab_size, task.context)
    data: Any = task.demonstrations
    if task.tokenizer is not None:
        data = sft.pack(task.demonstrations, task.context)
    num_rows = len(data.tokens)
    supervised = SupervisedSettings(
        num_epochs=settings.sft_epochs,
        batch_size=min(settings.sft_batch_size, num_rows),
        lr=settings.sft_lr,
    )
    num_tokens = int(np.sum(task.demonstrations.length))
    return Stage(
        name="sft",
        job=sft.sft_job(supervised, language_model(sizes, "none"), num_rows),
        params=None,
        frozen={"data": data},
        key=settings.key,
        identity={"settings": dataclasses.asdict(settings)},
        unit="tokens",
        units_per_iteration=num_tokens / num_rows * supervised.batch_size,
        result=partial(StoredModel, "none", sizes),
    )


def reward_stage(settings: PipelineSettings, task: Task, reference: PyTree) -> Stage:
    """A reward model on the comparisons, from the decoder of the fine-tuned policy.

    In the end its scores get mean 0 and deviation 1 on completions of the fine-tuned policy.
    """
    assert task.pairs is not None, "a task without a score has pairs"
    sizes = settings.decoder_sizes(task.vocab_size, task.context)
    model = reward_model.reward_model(sizes)
    num_pairs = len(task.pairs.margin)
    supervised = SupervisedSettings(
        batch_size=min(settings.reward_batch_size, num_pairs), lr=settings.reward_lr
    )

    def standardized(params: PyTree) -> StoredModel:
        policy = language_model(sizes, "none")
        rows = np.arange(NUM_STANDARDIZED) % len(task.prompts.length)
        texts = jax.jit(
            partial(generate, policy, max_new_tokens=task.max_new_tokens, eos=task.eos)
        )(
            params=reference,
            key=jax.random.key(settings.key),
            prompts=jnp.asarray(task.prompts.tokens[rows]),
            lengths=jnp.asarray(task.prompts.length[rows]),
        )
        return StoredModel(REWARD, sizes, reward_model.standardize(model, params, texts))

    fresh = model.init(jax.random.key(settings.key))
    return Stage(
        name="reward",
        job=reward_model.reward_model_job(supervised, model, num_pairs),
        params=reward_model.from_policy(fresh, reference),
        frozen={"data": task.pairs},
        key=settings.key + 1,
        identity={"settings": dataclasses.asdict(settings)},
        unit="pairs",
        units_per_iteration=supervised.batch_size,
        result=standardized,
    )


def dpo_stage(settings: PipelineSettings, task: Task, reference: PyTree) -> Stage:
    """DPO on the comparisons, from the fine-tuned policy, which is the reference."""
    assert task.pairs is not None, "checked before"
    sizes = settings.decoder_sizes(task.vocab_size, task.context)
    model = language_model(sizes, "none")
    num_pairs = len(task.pairs.margin)
    supervised = SupervisedSettings(
        batch_size=min(settings.reward_batch_size, num_pairs), lr=settings.lr
    )
    with_reference = jax.jit(lambda params, pairs: dpo.with_reference(model, params, pairs))
    return Stage(
        name="dpo",
        job=dpo.dpo_job(supervised, model, num_pairs, beta=settings.dpo_beta),
        params=reference,
        frozen={"data": with_reference(reference, task.pairs)},
        key=settings.key + 2,
        identity={"settings": dataclasses.asdict(settings)},
        unit="pairs",
        units_per_iteration=supervised.batch_size,
        result=partial(StoredModel, "none", sizes),
    )


def policy_setup(settings: PipelineSettings, task: Task, score: Score) -> Setup:
    """Environment, model and rewards of reinforcement learning on the prompts of the task.

    Raises `ConfigError` for settings that do not fit together.
    """
    env = tokens(
        task.prompts.tokens,
        task.prompts.length,
        task.max_new_tokens,
        task.eos,
        task.vocab_size,
    )
    num_steps = env.max_episode_steps
    assert num_steps is not None, "a text has a bound"
    sizes = settings.decoder_sizes(task.vocab_size, num_steps)
    reward = kl_shaped(
        score,
        language_model(sizes, "none"),
        task.eos,
        score_clip=settings.score_clip,
        missing_end_penalty=settings.missing_end_penalty,
    )
    model = language_model(sizes, settings.critic)
    return set_up(settings.config(num_steps), env, model, reward)


def policy_stage(
    settings: PipelineSettings,
    task: Task,
    setup: Setup,
    reference: PyTree,
    score: Score,
    score_params: PyTree,
) -> Stage:
    """Reinforcement learning on the score, with a KL anchor to the fine-tuned policy.

    The critic starts from the reward model, if there is one, otherwise from the policy.
    """
    sizes = settings.decoder_sizes(task.vocab_size, task.context)
    value_decoder = None if score_params is None else score_params["decoder"]
    evaluator_of = None
    if settings.eval_every:
        evaluator_of = partial(make_text_evaluator, settings, task, reference, score, score_params)
    return Stage(
        name=settings.algorithm,
        job=job_of(setup),
        params=with_critic(reference, sizes, settings.critic, value_decoder),
        frozen={
            "reference": {"policy": policy_decoder(reference), "value": {}},
            "score": score_params,
        },
        key=settings.key + 2,
        identity={"settings": dataclasses.asdict(settings)},
        unit="texts",
        units_per_iteration=settings.num_episodes,
        result=partial(StoredModel, settings.critic, sizes),
        evaluator_of=evaluator_of,
    )


# -------------------------------------------------------------------------------------- directory


@contextlib.contextmanager
def _opened(directory: Path, identity: dict[str, Any], resume: bool) -> Iterator[None]:
    """Make the directory, or check that of the pipeline to resume, and lock it."""
    if not (resume and directory.exists()):
        run_directory.reserve(directory, identity)
    with locked(directory):
        try:
            before = json.loads((directory / "config.json").read_text())
        except (OSError, ValueError):
            raise ConfigError(
                f"{directory} is not a pipeline that can be resumed: it has no valid config.json"
            ) from None
        then = before.get("settings", {})
        now = json.loads(json.dumps(identity["settings"]))
        differing = [name for name in now if then.get(name, now) != now[name]]
        if before.get("kind") != "rlhf" or differing:
            words = ", ".join(
                f"{name} = {then.get(name)!r} there and {now[name]!r} here" for name in differing
            )
            raise ConfigError(f"the pipeline in {directory} has other settings: {words}")
        yield
