"""`PipelineSettings` and the options of the command line."""

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from imported import as_imported
from sentences import sentence_of

from purejaxppo.cli import commands
from purejaxppo.rlhf import settings, supervised_settings
from purejaxppo.rlhf.pipeline_stages import stage_key
from purejaxppo.rlhf.settings import PipelineSettings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--task", "arithmetik"],
            "task = 'arithmetik': it must be one of reviews, arithmetic, records; "
            "did you mean 'arithmetic'?",
        ),
        (
            ["--task", "arithmetic", "--algorithm", "dpo"],
            "dpo learns from pairs of completions, and the arithmetic task has none: "
            "choose another algorithm",
        ),
        (
            ["--task", "arithmetic", "--ref-kl-coef", "-1"],
            "ref_kl_coef = -1.0: it must be a finite number of at least 0",
        ),
        (
            ["--task", "arithmetic", "--resume"],
            "resume needs the directory of the pipeline to continue: --directory",
        ),
        (
            ["--demonstrations", "x.jsonl"],
            "--preferences is missing: give a file of JSON Lines",
        ),
        (
            ["--task", "arithmetic", "--demonstrations", "x.jsonl"],
            "the arithmetic task has data of its own: leave demonstrations out",
        ),
        (
            ["--task", "record", "--demonstrations", "x.jsonl"],
            "task = 'record': it must be one of reviews, arithmetic, records; "
            "did you mean 'records'?",
        ),
        (
            ["--algorithm", "dpo", "--num-iterations", "3"],
            "num_iterations is for ppo, trpo, reinforce, grpo, rloo and has no effect with dpo: "
            "leave it out",
        ),
        (
            ["--algorithm", "ppo", "--dpo-beta", "0.3"],
            "dpo_beta is for dpo and has no effect with ppo: leave it out",
        ),
        (
            ["--task", "arithmetic", "--vocab-size", "300"],
            "vocab_size has no effect with the arithmetic task: leave it out",
        ),
        (
            ["--task", "reviews", "--algorithm", "dpo", "--frontier"],
            "a frontier varies the anchor of reinforcement learning: not for dpo",
        ),
        (
            ["--task", "arithmetic", "--algorithm", "grpo", "--num-episodes", "12"],
            "group_size = 8 does not divide num_episodes = 12",
        ),
    ],
)
def test_a_wrong_input_is_one_sentence_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_code:
        commands.main(["rlhf", *arguments])
    assert exit_code.value.code == 2
    assert capsys.readouterr().err == f"purejaxppo: {message}\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PipelineSettings.of("records", widht=3),
            "there is no setting widht; did you mean 'width'?",
        ),
        (
            lambda: PipelineSettings(task="arithmetic"),
            "the arithmetic task has texts of its own: make its settings by "
            "PipelineSettings.of('arithmetic')",
        ),
        (
            lambda: PipelineSettings(key=-1),
            "key = -1: it must be an integer of at least 0 and below 42949672",
        ),
        (
            lambda: PipelineSettings(key=42_949_672),
            "key = 42949672: it must be an integer of at least 0 and below 42949672",
        ),
        (
            lambda: as_imported(settings).PipelineSettings(lr=np.ones(2)),
            "lr = array([1., 1.]): it must be a finite number above 0",
        ),
        (
            lambda: as_imported(settings).PipelineSettings(num_iterations=2.5),
            "num_iterations = 2.5: it must be an integer of at least 1",
        ),
        (
            lambda: PipelineSettings(num_minibatches=3),
            "num_minibatches = 3 does not divide num_episodes = 128: "
            "minibatches have whole texts, equally many",
        ),
        (
            lambda: PipelineSettings.of("records", "dpo", ref_kl_coef=0.1),
            "ref_kl_coef is for ppo, trpo, reinforce, grpo, rloo and has no effect with dpo: "
            "leave it out",
        ),
        (
            lambda: PipelineSettings.of("arithmetic", reward_lr=0.5),
            "reward_lr has no effect with the arithmetic task: leave it out",
        ),
        (
            lambda: PipelineSettings(num_iterations=10**6),
            "num_iterations · num_episodes = 128000000: "
            "whole episodes are counted up to 2**31 steps",
        ),
        (
            lambda: PipelineSettings.of("records", num_comparisons=100),
            "num_comparisons has no effect with the records task: leave it out",
        ),
    ],
)
def test_wrong_settings_are_one_sentence(make, message):
    assert sentence_of(make) == message


def test_numbers_of_other_libraries_become_plain_ones():
    """3.0, NumPy and JAX numbers would otherwise fail later, or make other JSON."""
    given = as_imported(settings).PipelineSettings(
        key=np.int64(3), num_iterations=3.0, num_layers=np.int32(1), lr=np.float32(0.5), best_of=2.0
    )
    given = dataclasses.replace(given, ref_kl_target=np.float64(6), reward_lr=jnp.array(0.5))
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        kind = float if field.name == "ref_kl_target" else type(field.default)
        assert type(value) is kind, field.name
    assert (given.key, given.num_iterations, given.best_of) == (3, 3, 2)
    assert (given.lr, given.ref_kl_target, given.reward_lr) == (0.5, 6.0, 0.5)
    supervised = as_imported(supervised_settings).SupervisedSettings(
        num_epochs=2.0, batch_size=np.int64(4), lr=np.float32(0.5)
    )
    assert type(supervised.num_epochs) is type(supervised.batch_size) is int
    assert type(supervised.lr) is float


def test_every_stage_of_every_key_has_a_key_of_its_own():
    of_key = [PipelineSettings(key=key) for key in (0, 1, 42_949_670, 42_949_671)]
    keys = [stage_key(given, stage) for given in of_key for stage in range(5)]
    assert len(set(keys)) == 20
    assert max(keys) < 2**32  # the largest integer of a random key


@pytest.mark.parametrize(
    ("algorithm", "unused"),
    [
        ("ppo", {"group_size", "dpo_beta"}),
        ("trpo", {"group_size", "dpo_beta"}),
        ("reinforce", {"group_size", "dpo_beta", "num_epochs", "num_minibatches"}),
        ("grpo", {"dpo_beta"}),
        ("rloo", {"dpo_beta"}),
        (
            "dpo",
            {"group_size", "num_epochs", "num_minibatches", "num_iterations", "num_episodes"}
            | {"ref_kl_coef", "ref_kl_target", "ref_kl_horizon", "eval_every"},
        ),
    ],
)
def test_settings_without_effect_are_refused(algorithm, unused):
    """All others are accepted, but for those that another task has."""
    for field in dataclasses.fields(PipelineSettings):
        if field.name in ("task", "algorithm", "num_comparisons"):
            continue
        value = 6.0 if field.default is None else field.default
        change = {field.name: value}
        if field.name in unused:
            message = sentence_of(partial(PipelineSettings.of, "records", algorithm, **change))
            assert message.startswith(f"{field.name} is for ")
        else:
            given = PipelineSettings.of("records", algorithm, **change)
            assert getattr(given, field.name) == value
