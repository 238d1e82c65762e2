"""The stages of the pipeline: fine-tuning, the reward model, DPO, and reinforcement learning."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.envs.tokens import tokens
from purejaxppo.rlhf import dpo, reward_model, reward_network, sft
from purejaxppo.rlhf.language_model import language_model, with_critic
from purejaxppo.rlhf.measurer import make_text_evaluator
from purejaxppo.rlhf.model_files import REWARD, StoredModel
from purejaxppo.rlhf.sampling import generate
from purejaxppo.rlhf.setting_rules import KEYS_PER_PIPELINE
from purejaxppo.rlhf.settings import PipelineSettings
from purejaxppo.rlhf.shaping import kl_shaped
from purejaxppo.rlhf.stages import Stage
from purejaxppo.rlhf.supervised import num_examples_of
from purejaxppo.rlhf.supervised_settings import SupervisedSettings
from purejaxppo.rlhf.tasks import Task
from purejaxppo.rlhf.texts import Score
from purejaxppo.runs.agents import job_of
from purejaxppo.runs.programs import first_metrics
from purejaxppo.setup import Setup, set_up
from purejaxppo.train import build_trainer
from purejaxppo.types import PRNGKey, PyTree

NUM_STANDARDIZED = 512  # samples that give the scores their mean and deviation


def stage_key(settings: PipelineSettings, stage: int) -> int:
    """A key of its own for each stage and each key of the settings."""
    return KEYS_PER_PIPELINE * settings.key + stage


def score_of(settings: PipelineSettings, task: Task) -> Score:
    """The score of the task, or that of its reward model, whose parameters are an argument."""
    if task.score is not None:
        return task.score
    sizes = settings.decoder_sizes(task.vocab_size, task.context)
    model = reward_network.reward_model(sizes)
    return lambda tokens, lengths, params: model.score(params, tokens, lengths)


def sft_stage(settings: PipelineSettings, task: Task, data_sha256: str) -> Stage:
    """Supervised fine-tuning on the demonstrations; short ones share a row."""
    sizes = settings.decoder_sizes(task.vocab_size, task.context)
    data: Any = task.demonstrations
    if task.tokenizer is not None:
        data = sft.pack(task.demonstrations, task.context)
    num_rows = len(data.tokens)
    supervised = SupervisedSettings(
        num_epochs=settings.sft_epochs,
        batch_size=min(settings.sft_batch_size, num_rows),
        lr=settings.sft_lr,
        weight_decay=settings.sft_weight_decay,
    )
    num_tokens = int(np.sum(task.demonstrations.length))
    return Stage(
        name="sft",
        job=sft.sft_job(supervised, language_model(sizes, "none"), num_rows),
        params=None,
        frozen={"data": data},
        key=stage_key(settings, 0),
        identity={"settings": settings.of_first_stages(), "data_sha256": data_sha256},
        unit="tokens",
        units_per_iteration=num_tokens / num_rows * supervised.batch_size,
        result=partial(StoredModel, "none", sizes),
    )


def reward_stage(
    settings: PipelineSettings, task: Task, data_sha256: str, reference: PyTree
) -> Stage:
    """A reward model on the comparisons, from the decoder of the fine-tuned policy.

    In the end its scores get mean 0 and deviation 1 on completions of the fine-tuned policy.
    """
    assert task.pairs is not None, "a task without a score has pairs"
    sizes = settings.decoder_sizes(task.vocab_size, task.context)
    model = reward_network.reward_model(sizes)
    data: Any = task.pairs if task.ranked is None else task.ranked
    num_examples = num_examples_of(data)
    supervised = SupervisedSettings(
        num_epochs=settings.reward_epochs,
        batch_size=min(settings.reward_batch_size, num_examples),
        lr=settings.reward_lr,
        weight_decay=settings.reward_weight_decay,
    )
    job = reward_model.reward_model_job(
        supervised,
        model,
        num_examples,
        token_dropout=settings.token_dropout,
        lm_coef=settings.reward_lm_coef,
    )

    def standardized(params: PyTree) -> StoredModel:
        policy = language_model(sizes, "none")
        rows = np.arange(NUM_STANDARDIZED) % len(task.prompts.length)
        texts = jax.jit(
            partial(generate, policy, max_new_tokens=task.max_new_tokens, eos=task.eos)
        )(
            params=reference,
            key=jax.random.key(stage_key(settings, 3)),
            prompts=jnp.asarray(task.prompts.tokens[rows]),
            lengths=jnp.asarray(task.prompts.length[rows]),
        )
        return StoredModel(REWARD, sizes, reward_network.standardize(model, params, texts))

    fresh = model.init(jax.random.key(stage_key(settings, 4)))
    return Stage(
        name="reward",
        job=job,
        params=reward_network.from_policy(fresh, reference),
        frozen={"data": data},
        key=stage_key(settings, 1),
        identity={"settings": settings.of_first_stages(), "data_sha256": data_sha256},
        unit="pairs" if task.ranked is None else "texts",
        units_per_iteration=supervised.batch_size,
        result=standardized,
    )


def dpo_stage(settings: PipelineSettings, task: Task, data_sha256: str, reference: PyTree) -> Stage:
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
        key=stage_key(settings, 2),
        identity={"settings": dataclasses.asdict(settings), "data_sha256": data_sha256},
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
    setup = set_up(settings.config(num_steps), env, model, reward)
    _require_valid_score(settings, task, setup)
    return setup


def _require_valid_score(settings: PipelineSettings, task: Task, setup: Setup) -> None:
    """Raise the errors of the first iteration, such as a score of a wrong shape."""
    sizes = settings.decoder_sizes(task.vocab_size, task.context)

    def metrics(key: PRNGKey) -> PyTree:
        reference = language_model(sizes, "none").init(key, jnp.zeros(1, jnp.int32))
        score = None if task.score is not None else reward_network.reward_model(sizes).init(key)
        frozen = {"reference": reference, "score": score}
        return first_metrics(build_trainer(setup), key, None, frozen)

    jax.eval_shape(metrics, jax.eval_shape(lambda: jax.random.key(0)))


def policy_stage(
    settings: PipelineSettings,
    task: Task,
    data_sha256: str,
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
            "reference": with_critic(reference, sizes, "none"),
            "score": score_params,
        },
        key=stage_key(settings, 2),
        identity={"settings": dataclasses.asdict(settings), "data_sha256": data_sha256},
        unit="texts",
        units_per_iteration=settings.num_episodes,
        result=partial(StoredModel, settings.critic, sizes),
        evaluator_of=evaluator_of,
    )
