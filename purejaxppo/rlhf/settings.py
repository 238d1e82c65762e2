"""`PipelineSettings`: what the RLHF pipeline trains, with defaults for each task."""

import dataclasses
from typing import Any

from purejaxppo.config import Config, validate
from purejaxppo.rlhf.setting_rules import (
    ALGORITHMS,
    CHECKS,
    LAST_STAGE,
    OF_TEXTS,
    TASK_DEFAULTS,
    TASKS,
    UNUSED_BY_TASK,
    USED_BY,
)
from purejaxppo.rlhf.transformer import DecoderSizes
from purejaxppo.types import ConfigError
from purejaxppo.validation import (
    POSITIVE,
    POSITIVE_INT,
    checked_int,
    checked_number,
    nearest,
    one_of,
)


@dataclasses.dataclass(frozen=True)
class PipelineSettings:
    """The settings of `run_pipeline`; `PipelineSettings.of` has the defaults of a task.

    Raises `ConfigError` for a value out of range.
    """

    task: str = "reviews"
    algorithm: str = "ppo"
    key: int = 0

    # The decoder.
    width: int = 128
    num_layers: int = 2
    vocab_size: int = 2048
    context: int = 64  # tokens of the longest text
    max_new_tokens: int = 24

    # Stage 1, supervised fine-tuning, and stage 2, the reward model.
    sft_epochs: int = 4
    sft_batch_size: int = 32  # rows of packed texts
    sft_lr: float = 3e-3
    sft_weight_decay: float = 0.0
    num_comparisons: int = 20_000
    reward_epochs: int = 16
    reward_batch_size: int = 64  # pairs, or rated texts that are all compared
    reward_lr: float = 1e-3
    reward_weight_decay: float = 1.0
    reward_lm_coef: float = 0.5  # coefficient of the cross-entropy of the rated texts
    token_dropout: float = 0.2  # probability

    # Stage 3: reinforcement learning, or DPO on the comparisons (`LAST_STAGE`).
    num_iterations: int = 300
    num_episodes: int = 128  # in an iteration
    group_size: int = 8  # completions of a prompt, for grpo and rloo
    lr: float = 1.5e-4
    num_epochs: int = 2
    num_minibatches: int = 4
    ref_kl_coef: float = 0.15
    ref_kl_target: float | None = None  # nats per text
    ref_kl_horizon: float = 1000.0  # texts; Ziegler et al. took 10,000 in longer runs
    score_clip: float = 1.5
    missing_end_penalty: float = 1.0
    dpo_beta: float = 0.1

    # Evaluation.
    eval_every: int = 25  # iterations; 0: only at the end
    best_of: int = 16

    @classmethod
    def of(
        cls, task: str = "reviews", algorithm: str = "ppo", **changes: Any
    ) -> "PipelineSettings":
        """The defaults of a task and an algorithm, with ``changes``; None leaves a default.

        Raises `ConfigError` for a name that is no setting, and for a setting that has no effect
        with this task or algorithm.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in changes:
            if name not in names:
                raise ConfigError(f"there is no setting {name}{nearest(name, names)}")
        changes = {name: value for name, value in changes.items() if value is not None}
        for name in changes:
            if algorithm in ALGORITHMS and algorithm not in USED_BY.get(name, ALGORITHMS):
                raise ConfigError(
                    f"{name} is for {', '.join(USED_BY[name])} and has no effect with {algorithm}: "
                    "leave it out"
                )
            if name in UNUSED_BY_TASK.get(task, ()):
                raise ConfigError(f"{name} has no effect with the {task} task: leave it out")
        defaults = TASK_DEFAULTS.get(task, {})
        return cls(**{"task": task, "algorithm": algorithm, **defaults, **changes})

    def __post_init__(self) -> None:
        one_of("task", self.task, TASKS)
        one_of("algorithm", self.algorithm, ALGORITHMS)
        for field in dataclasses.fields(self):
            converted = _converted(field, getattr(self, field.name))
            object.__setattr__(self, field.name, converted)
        if self.task == "arithmetic" and self.algorithm == "dpo":
            raise ConfigError(
                "dpo learns from pairs of completions, and the arithmetic task has none: choose "
                "another algorithm"
            )
        fixed = TASK_DEFAULTS["arithmetic"]
        if self.task == "arithmetic" and any(
            name in fixed and getattr(self, name) != fixed[name] for name in OF_TEXTS
        ):
            raise ConfigError(
                "the arithmetic task has texts of its own: make its settings by "
                "PipelineSettings.of('arithmetic')"
            )
        if self.algorithm != "dpo":
            self._require_valid_config()

    def _require_valid_config(self) -> None:
        """Raise `ConfigError` with the names of these settings for what the config refuses."""
        config = self.config(self.context)
        if self.num_episodes % config.num_minibatches:
            raise ConfigError(
                f"num_minibatches = {config.num_minibatches} does not divide num_episodes = "
                f"{self.num_episodes}: minibatches have whole texts, equally many"
            )
        try:
            validate(config)
        except ConfigError as error:
            message = str(error).replace("num_envs", "num_episodes")
            message = message.replace("total_episodes", "num_iterations · num_episodes")
            raise ConfigError(message) from None

    def of_first_stages(self) -> dict[str, Any]:
        """The settings on which the stages before the last one depend."""
        values = dataclasses.asdict(self)
        return {name: x for name, x in values.items() if name not in LAST_STAGE}

    @property
    def compares_groups(self) -> bool:
        """Whether the algorithm compares the completions of a prompt and has no critic."""
        return self.algorithm in ("grpo", "rloo")

    @property
    def critic(self) -> str:
        """The critic of the policy that is trained by reinforcement learning."""
        return "none" if self.compares_groups else "own"

    def decoder_sizes(self, vocab_size: int, context: int) -> DecoderSizes:
        """The sizes of the decoder for a vocabulary and a context."""
        return DecoderSizes(
            vocab_size=vocab_size,
            context=context,
            width=self.width,
            num_layers=self.num_layers,
            mlp_width=-(-self.width * 11 // 4),
        )

    def config(self, num_steps: int) -> Config:
        """The configuration of reinforcement learning on texts of ``num_steps`` steps."""
        is_reinforce = self.algorithm == "reinforce"
        algorithm = "ppo" if self.compares_groups else self.algorithm
        return Config(
            env="tokens",
            algorithm=algorithm,
            advantage=self.algorithm if self.compares_groups else "auto",
            group_size=self.group_size if self.compares_groups else 1,
            normalize_group=False,
            episodic=True,
            total_episodes=self.num_iterations * self.num_episodes,
            num_envs=self.num_episodes,
            num_steps=num_steps,
            num_epochs=1 if is_reinforce else self.num_epochs,
            num_minibatches=1 if is_reinforce else self.num_minibatches,
            lr=self.lr,
            gamma=1.0,
            gae_lambda=1.0,
            normalize_advantage=False,
            max_grad_norm=1.0,
            ref_kl_coef=self.ref_kl_coef,
            ref_kl_target=self.ref_kl_target,
            ref_kl_horizon=self.ref_kl_horizon,
        )


def _converted(field: dataclasses.Field, value: Any) -> Any:
    """The value of a setting as a plain number. Raises `ConfigError` if it is invalid."""
    if (value is None and field.default is None) or isinstance(field.default, str):
        return value
    if isinstance(field.default, int):
        return checked_int(field.name, value, CHECKS.get(field.name, POSITIVE_INT))
    return checked_number(field.name, value, CHECKS.get(field.name, POSITIVE))
