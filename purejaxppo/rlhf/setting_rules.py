"""The rules of `PipelineSettings`: allowed values, and the settings of each task and algorithm."""

from typing import Any

from purejaxppo.validation import NONE_OR_POSITIVE, NOT_NEGATIVE, NOT_NEGATIVE_INT, UNIT, Check

TASKS = ("reviews", "arithmetic", "records")
RL_ALGORITHMS = ("ppo", "trpo", "reinforce", "grpo", "rloo")
ALGORITHMS = (*RL_ALGORITHMS, "dpo")

# Each pipeline has this many integers for the keys of its stages.
KEYS_PER_PIPELINE = 100
NUM_KEYS = 2**32 // KEYS_PER_PIPELINE

# Allowed numbers; all others are positive.
CHECKS = {
    "key": Check(lambda x: 0 <= x < NUM_KEYS, f"an integer of at least 0 and below {NUM_KEYS}"),
    "eval_every": NOT_NEGATIVE_INT,
    "token_dropout": UNIT,
    "ref_kl_target": NONE_OR_POSITIVE,
    **dict.fromkeys(("ref_kl_coef", "missing_end_penalty"), NOT_NEGATIVE),
    **dict.fromkeys(("sft_weight_decay", "reward_weight_decay", "reward_lm_coef"), NOT_NEGATIVE),
}

# Settings that have an effect with some algorithms only.
OF_RL = (
    *("num_iterations", "num_episodes", "eval_every"),
    *("ref_kl_coef", "ref_kl_target", "ref_kl_horizon"),
)
USED_BY = {
    **dict.fromkeys(OF_RL, RL_ALGORITHMS),
    **dict.fromkeys(("num_epochs", "num_minibatches"), ("ppo", "trpo", "grpo", "rloo")),
    "group_size": ("grpo", "rloo"),
    "dpo_beta": ("dpo",),
}
# Settings on which the stages before the last one do not depend.
OF_SCORES = ("score_clip", "missing_end_penalty", "best_of")  # also for the best of n
LAST_STAGE = frozenset({"algorithm", "lr", *OF_SCORES, *USED_BY})

# Settings that have no effect with a task.
OF_TEXTS = ("vocab_size", "context", "max_new_tokens", "num_comparisons")
OF_REWARD_MODEL = (
    *("reward_epochs", "reward_batch_size", "reward_lr", "reward_weight_decay", "reward_lm_coef"),
    "token_dropout",
)
UNUSED_BY_TASK = {
    "arithmetic": (*OF_TEXTS, *OF_REWARD_MODEL),
    "records": ("num_comparisons",),
}

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
