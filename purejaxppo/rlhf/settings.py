"""`PipelineSettings`: what the RLHF pipeline trains, with defaults for each task."""

import dataclasses
from typing import Any

from purejaxppo.config import Config, validate
from purejaxppo.rlhf.transformer import DecoderSizes
from purejaxppo.types import ConfigError
from purejaxppo.validation import (
    NONE_OR_POSITIVE,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_INT,
    UNIT,
    checked_int,
    checked_leaf,
    integer,
    nearest,
)

# Fields that only the last stage and the evaluation use.
LAST_STAGE = frozenset(
    {
        *("algorithm", "num_iterations", "num_episodes", "group_size", "lr", "num_epochs"),
        *("num_minibatches", "ref_kl_coef", "ref_kl_target", "score_clip"),
        *("missing_end_penalty", "dpo_beta", "eval_every", "best_of", "ref_kl_horizon"),
    }
)
CAN_BE_ZERO = frozenset(
    {
        *("ref_kl_coef", "missing_end_penalty"),
        *("sft_weight_decay", "reward_weight_decay", "reward_lm_coef"),
    }
)
OF_TEXTS = ("vocab_size", "context", "max_new_tokens", "num_comparisons")
TASKS = ("reviews", "arithmetic", "records")
ALGORITHMS = ("ppo", "trpo", "reinforce", "grpo", "rloo", "dpo")


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
    sft_epochs: int = 3
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
    ref_kl_coef: float = 0.27
    ref_kl_target: float | None = None  # nats per text
    ref_kl_horizon: float = 1000.0  # texts; Ziegler et al. took 10,000 in longer runs
    score_clip: float = 5.0
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

        Raises `ConfigError` for a name that is no setting.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in changes:
            if name not in names:
                raise ConfigError(f"there is no setting {name}{nearest(name, names)}")
        changes = {name: value for name, value in changes.items() if value is not None}
        defaults = TASK_DEFAULTS.get(task, {})
        fixed = [name for name in changes if task == "arithmetic" and name in OF_TEXTS]
        if fixed:
            raise ConfigError(
                f"the arithmetic task has {', '.join(fixed)} of its own: leave it out"
            )
        return cls(**{"task": task, "algorithm": algorithm, **defaults, **changes})

    def __post_init__(self) -> None:
        for name, choices in (("task", TASKS), ("algorithm", ALGORITHMS)):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(
                    f"{name} = {value!r}: it must be one of {', '.join(choices)}"
                    f"{nearest(value, choices)}"
                )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("key", "eval_every"):
                integer(field.name, value, 0)
            elif field.name == "token_dropout":
                checked_leaf(field.name, value, UNIT)
            elif field.name in CAN_BE_ZERO:
                checked_leaf(field.name, value, NOT_NEGATIVE)
            elif field.name == "ref_kl_target":
                if value is not None:
                    checked_leaf(field.name, value, NONE_OR_POSITIVE)
            elif isinstance(field.default, float):
                checked_leaf(field.name, value, POSITIVE)
            elif isinstance(field.default, int):
                checked_int(field.name, value, POSITIVE_INT)
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
        try:
            validate(self.config(self.context))
        except ConfigError as error:
            raise ConfigError(str(error).replace("num_envs", "num_episodes")) from None

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


TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "records": {"reward_epochs": 1},
    "arithmetic": {
        "vocab_size": 13,
        "context": 10,
        "max_new_tokens": 4,
        "width": 64,
        "sft_epochs": 16,
        "sft_batch_size": 64,
        "sft_weight_decay": 0.3,
        "lr": 3e-4,
        "num_minibatches": 2,
        "ref_kl_coef": 0.0,
        "missing_end_penalty": 0.0,
        "best_of": 1,
    },
}
