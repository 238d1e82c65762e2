"""The command ``purejaxppo rlhf``."""

import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from purejaxppo.types import ConfigError
from purejaxppo.validation import one_of

INTERRUPTED = 130  # exit code


def rlhf(
    task: str = "reviews",
    algorithm: str = "ppo",
    directory: Path | None = None,
    resume: bool = False,
    frontier: bool = False,
    stages_from: Path | None = None,
    demonstrations: Path | None = None,
    preferences: Path | None = None,
    prompts: Path | None = None,
    ref_kl_coef: float | None = None,
    ref_kl_target: float | None = None,
    dpo_beta: float | None = None,
    num_iterations: int | None = None,
    num_episodes: int | None = None,
    lr: float | None = None,
    max_new_tokens: int | None = None,
    context: int | None = None,
    vocab_size: int | None = None,
    width: int | None = None,
    num_layers: int | None = None,
    sft_epochs: int | None = None,
    num_comparisons: int | None = None,
    key: int = 0,
    log: tuple[str, ...] = (),
) -> None:
    """Train a language model: supervised fine-tuning, a reward model, and RL with a KL anchor.

    Options without a value have the defaults of the task.

    Args:
        task: reviews (sentences and ratings of film reviews; needs the extra rlhf) or arithmetic
            (two-digit addition with a verifiable reward)
        algorithm: ppo, trpo, reinforce, grpo, rloo or dpo
        directory: directory for the results; must be new, unless resume is given; by default one
            in runs/ with the time in its name
        resume: continue the pipeline in the directory; finished stages are kept
        frontier: also train with five coefficients of the anchor
        stages_from: directory of another run with the same data, whose fine-tuned policy and
            reward model are used
        demonstrations: JSON Lines with prompt and completion, instead of a task
        preferences: JSON Lines with prompt, chosen and rejected
        prompts: JSON Lines with prompt; by default those of the demonstrations
        ref_kl_coef: coefficient (beta) of the KL divergence from the fine-tuned policy
        ref_kl_target: KL divergence per text, in nats, to which ref_kl_coef is adapted
        dpo_beta: coefficient of the KL divergence that dpo assumes
        num_iterations: iterations of reinforcement learning
        num_episodes: texts in an iteration
        lr: learning rate of the last stage
        max_new_tokens: tokens of a completion at most
        context: tokens of a text at most
        vocab_size: tokens of the vocabulary
        width: width of the decoder
        num_layers: layers of the decoder
        sft_epochs: passes over the demonstrations
        num_comparisons: comparisons that dpo learns from, in the task reviews
        key: integer from which the random keys are made
        log: loggers in addition to metrics.csv: tensorboard, wandb
    """
    console = Console(highlight=False, soft_wrap=True)
    try:
        run(
            console,
            directory,
            resume,
            frontier,
            stages_from,
            {"demonstrations": demonstrations, "preferences": preferences, "prompts": prompts},
            log,
            task,
            algorithm,
            ref_kl_coef=ref_kl_coef,
            ref_kl_target=ref_kl_target,
            dpo_beta=dpo_beta,
            num_iterations=num_iterations,
            num_episodes=num_episodes,
            lr=lr,
            max_new_tokens=max_new_tokens,
            context=context,
            vocab_size=vocab_size,
            width=width,
            num_layers=num_layers,
            sft_epochs=sft_epochs,
            num_comparisons=num_comparisons,
            key=key,
        )
    except KeyboardInterrupt:
        console.print("The same command with --resume and the directory continues from here.")
        raise SystemExit(INTERRUPTED) from None


def run(
    console: Console,
    directory: Path | None,
    resume: bool,
    frontier: bool,
    stages_from: Path | None,
    records: dict[str, Path | None],
    loggers: tuple[str, ...],
    task: str,
    algorithm: str,
    **changes: Any,
) -> None:
    """Run the pipeline with these settings and show where its report is.

    ``records`` are the paths of demonstrations, preferences and prompts, or None.
    """
    from purejaxppo.cli.console import say
    from purejaxppo.cli.stage_screen import StageScreen
    from purejaxppo.rlhf.frontier import run_frontier
    from purejaxppo.rlhf.pipeline import make_task, run_pipeline
    from purejaxppo.rlhf.setting_rules import TASKS
    from purejaxppo.rlhf.settings import PipelineSettings

    one_of("task", task, TASKS)
    given = {name: path for name, path in records.items() if path is not None}
    if given and task == "arithmetic":
        raise ConfigError(f"the arithmetic task has data of its own: leave {', '.join(given)} out")
    if given:
        task = "records"
    if frontier and algorithm == "dpo":
        raise ConfigError("a frontier varies the anchor of reinforcement learning: not for dpo")
    settings = PipelineSettings.of(task, algorithm, **changes)
    data = make_records_task(settings, given) if task == "records" else None
    if directory is None:
        if resume:
            raise ConfigError("resume needs the directory of the pipeline to continue: --directory")
        stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
        directory = Path("runs") / f"rlhf-{task}-{algorithm}-{stamp}"
    say(console, f"The results will be in {directory}.")
    screen = StageScreen(console)
    with screen.live():
        if data is None:
            data = make_task(settings)
        arguments: dict[str, Any] = {"loggers": loggers, "events": screen.events}
        run_pipeline(settings, directory, data, resume=resume, stages_from=stages_from, **arguments)
        if frontier:
            run_frontier(settings, directory, data, **arguments)
    say(console, f"The report is {directory / 'report.md'}; the models are in {directory}/*/model.")


def make_records_task(settings: Any, given: dict[str, Path]) -> Any:
    """The task of one's own files. Raises `ConfigError` if one is missing."""
    from purejaxppo.rlhf.text_tasks import records_task

    for name in ("demonstrations", "preferences"):
        if name not in given:
            raise ConfigError(f"--{name} is missing: give a file of JSON Lines")
    return records_task(
        settings, given["demonstrations"], given["preferences"], given.get("prompts")
    )
