"""Small pipelines for tests: settings, records of texts, and a part of arithmetic."""

import jax
import numpy as np

from purejaxppo.rlhf.judges import Judge
from purejaxppo.rlhf.setting_rules import USED_BY
from purejaxppo.rlhf.settings import PipelineSettings
from purejaxppo.rlhf.tasks import Prompts, arithmetic_task
from purejaxppo.rlhf.text_tasks import records_task

SMALL = {"width": 16, "num_layers": 1, "sft_epochs": 1, "num_iterations": 4, "num_episodes": 8}
SMALL |= {"num_epochs": 1, "num_minibatches": 2, "eval_every": 2}
GOOD = "a good film"
BAD = "a bad film"
JUDGE = Judge(lambda texts: np.array([float("good" in text) for text in texts]))


def records(n=40):
    """Demonstrations, preferences and prompts with simple words."""
    subjects = ["this is", "that was", "we saw", "they made"]
    prompts = [subjects[i % 4] for i in range(n)]
    shown = [
        {"prompt": prompt, "completion": f" {GOOD if i % 2 else BAD} {i % 5}"}
        for i, prompt in enumerate(prompts)
    ]
    judged = [
        {"prompt": prompt, "chosen": f" {GOOD} {i % 5}", "rejected": f" {BAD} {i % 3}"}
        for i, prompt in enumerate(prompts)
    ]
    return shown, judged


def text_settings(algorithm="ppo", **changes):
    """Settings of records; those that have no effect with the algorithm are left out."""
    own = {"vocab_size": 300, "context": 40, "max_new_tokens": 6, "best_of": 2}
    used = {name: x for name, x in SMALL.items() if algorithm in USED_BY.get(name, (algorithm,))}
    return PipelineSettings.of("records", algorithm, **used, **own, **changes)


def text_task(settings):
    return records_task(settings, *records(), judges={"words": JUDGE})


def small_arithmetic(num_held_out=50):
    task = arithmetic_task(num_held_out=num_held_out, repeats=1)
    demonstrations = jax.tree.map(lambda x: x[:512], task.demonstrations)
    return task._replace(
        demonstrations=demonstrations, prompts=Prompts(*(x[:64] for x in task.prompts))
    )
