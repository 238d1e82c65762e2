"""`run_frontier`: score and gold score against the KL divergence for several coefficients β."""

import dataclasses
import os
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from purejaxppo.analysis.plots import COLOURS, style_axes
from purejaxppo.rlhf.json_files import write_json
from purejaxppo.rlhf.measurer import Measurer, evaluation_key
from purejaxppo.rlhf.model_files import load_model
from purejaxppo.rlhf.pipeline import SILENT, fingerprint, opened
from purejaxppo.rlhf.pipeline_stages import policy_setup, policy_stage, score_of
from purejaxppo.rlhf.report import write_report
from purejaxppo.rlhf.settings import PipelineSettings
from purejaxppo.rlhf.stages import StageEvents, run_stage
from purejaxppo.rlhf.tasks import Task
from purejaxppo.runs.disk import atomic_write
from purejaxppo.types import ConfigError

BETAS = (0.01, 0.03, 0.1, 0.3, 1.0)


def run_frontier(
    settings: PipelineSettings,
    directory: str | os.PathLike,
    task: Task,
    betas: tuple[float, ...] = BETAS,
    *,
    loggers: tuple[str, ...] = (),
    events: StageEvents = SILENT,
) -> dict[str, dict[str, float]]:
    """Train the last stage of a finished pipeline once for each fixed β, and compare the results.

    Writes ``frontier.json`` and ``frontier.png``, and adds them to the report. An interrupted
    frontier continues where it stopped. Raises `ConfigError` for DPO.
    """
    if settings.algorithm == "dpo":
        raise ConfigError("a frontier varies the anchor of reinforcement learning: not for dpo")
    directory = Path(directory)
    data_sha256 = fingerprint(task)
    with opened(directory, settings, data_sha256, resume=True):
        reference = load_model(directory / "sft" / "model").params
        score = score_of(settings, task)
        score_params = None
        if task.pairs is not None:
            score_params = load_model(directory / "reward" / "model").params
        measurer = Measurer(settings, task, reference, score, score_params)
        points: dict[str, dict[str, float]] = {}
        for beta in betas:
            changed = dataclasses.replace(
                settings, ref_kl_coef=beta, ref_kl_target=None, eval_every=0
            )
            setup = policy_setup(changed, task, score)
            stage = policy_stage(changed, task, data_sha256, setup, reference, score, score_params)
            stage = stage._replace(name=f"frontier_{beta:g}")
            params = run_stage(stage, directory, events, loggers).params
            key = evaluation_key(settings)
            texts = measurer.completions(params, task.held_out_prompts, key)
            points[f"{beta:g}"] = measurer.numbers(params, texts)
            write_json(directory / "frontier.json", points)
        figure = frontier_figure(points, ["score", *task.judges()])
        atomic_write(directory / "frontier.png", partial(figure.savefig, format="png"))
        write_report(directory, settings)
    return points


def frontier_figure(points: dict[str, dict[str, float]], names: list[str]) -> Figure:
    """The scores ``names`` against the KL divergence; a point for each β."""
    figure = Figure(figsize=(4.8 * len(names), 4.0), dpi=150, layout="constrained")
    for axes, name, colour in zip(
        figure.subplots(1, len(names), squeeze=False).flat, names, COLOURS, strict=False
    ):
        ordered = sorted((x["kl"], x[name], beta) for beta, x in points.items())
        axes.plot([x for x, _, _ in ordered], [y for _, y, _ in ordered], "o-", color=colour)
        for x, y, beta in ordered:
            axes.annotate(f"β = {beta}", (x, y), textcoords="offset points", xytext=(4, -10))
        style_axes(axes, "KL from the reference, nats per text", name, "")
    return figure
