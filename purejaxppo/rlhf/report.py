"""The report of a pipeline: Markdown and figures, made from the files in its directory."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from purejaxppo.rlhf.report_figures import judges_figure, training_figure
from purejaxppo.rlhf.settings import PipelineSettings
from purejaxppo.rlhf.stages import FIRST_STAGES
from purejaxppo.runs.disk import atomic_write

SHOWN_SAMPLES = 12


def write_report(directory: Path, settings: PipelineSettings) -> Path:
    """Write ``report.md`` and its figures, and return its path.

    It shows score, KL divergence, lengths and entropy over training; the judges' scores against the
    KL divergence beside the best of n; accuracies, win rates and distinct bigrams; the throughput
    of every stage; and continuations before and after training.
    """
    measured = json.loads((directory / "evaluation.json").read_text())
    training = pd.read_csv(directory / settings.algorithm / "metrics.csv")
    figures = {}
    if settings.algorithm != "dpo":
        figures["training.png"] = training_figure(training)
    evaluations = directory / settings.algorithm / "evaluations.csv"
    judges = [name for name in measured["win_rates"] if name != "score"]
    if judges and evaluations.exists():
        along = pd.read_csv(evaluations)
        figures["judges.png"] = judges_figure(along, measured["policies"], judges)
    for name, figure in figures.items():
        atomic_write(directory / name, partial(figure.savefig, format="png"))
    samples = [json.loads(line) for line in (directory / "samples.jsonl").open(encoding="utf-8")]
    parts = [
        f"# {settings.algorithm} on {settings.task}",
        _summary(settings, measured),
        *measured["notes"],
        "## Policies on held-out prompts",
        _policies(measured),
        *_optimum(measured),
        *_win_rates(measured),
        *_accuracies(measured),
        "## Training",
        _stages(directory, settings),
        *(f"![{name.removesuffix('.png')}]({name})" for name in figures),
        *_frontier(directory),
        "## Continuations",
        _continuations(samples, settings.algorithm),
    ]
    path = directory / "report.md"
    text = "\n\n".join(parts) + "\n"
    atomic_write(path, lambda path: path.write_text(text, encoding="utf-8"))
    return path


# ----------------------------------------------------------------------------------------- tables


def _summary(settings: PipelineSettings, measured: Mapping[str, Any]) -> str:
    anchor = f"β = {settings.ref_kl_coef:g}"
    if settings.ref_kl_target is not None:
        anchor += f" at first, adapted to a KL divergence of {settings.ref_kl_target:g} nats"
    if settings.algorithm == "dpo":
        anchor = f"β = {settings.dpo_beta:g} of DPO"
    held_out = measured["sft_held_out"]
    return (
        f"Key {settings.key}, {anchor}. All policies continue the same {measured['prompts']} "
        "held-out prompts. The fine-tuned policy has a loss of "
        f"{held_out['loss']:.3f} nats per token on held-out texts."
    )


def _policies(measured: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for x in measured["policies"].values() for name in x))
    rows = [
        [policy, *(_number(values.get(name)) for name in names)]
        for policy, values in measured["policies"].items()
    ]
    note = "KL in nats per text, lengths in tokens, entropy in nats per token."
    if any(name.startswith("best of") for name in measured["policies"]):
        note += " The KL of the best of n is an upper bound, log n − (n − 1) / n."
    return f"{_table(['policy', *names], rows)}\n\n{note}"


def _win_rates(measured: Mapping[str, Any]) -> list[str]:
    if not measured["win_rates"]:
        return []
    judges = list(measured["win_rates"])
    policies = list(measured["win_rates"][judges[0]])
    rows = []
    for policy in policies:
        estimates = (measured["win_rates"][judge][policy] for judge in judges)
        cells = [f"{100 * x:.1f} % [{100 * a:.1f}, {100 * b:.1f}]" for x, a, b in estimates]
        rows.append([policy, *cells])
    title = "## How often a continuation is preferred to that of sft, with a 95 % interval"
    return [title, _table(["policy", *judges], rows)]


def _accuracies(measured: Mapping[str, Any]) -> list[str]:
    if not measured["accuracies"]:
        return []
    rows = [[name, f"{100 * x:.1f} %"] for name, x in measured["accuracies"].items()]
    title = "## Accuracies on held-out preferences"
    return [title, _table(["judge", "accuracy"], rows)]


def _optimum(measured: Mapping[str, Any]) -> list[str]:
    if "optimum" not in measured:
        return []
    rows = [[name.replace("_", " "), _number(x)] for name, x in measured["optimum"].items()]
    return ["## Beside the exact optimum", _table(["quantity", "value"], rows)]


def _frontier(directory: Path) -> list[str]:
    if not (directory / "frontier.png").exists():
        return []
    return ["## Other coefficients of the anchor", "![frontier](frontier.png)"]


def _stages(directory: Path, settings: PipelineSettings) -> str:
    rows = []
    for stage in (*FIRST_STAGES, settings.algorithm):
        path = directory / stage / "seconds.json"
        if path.exists():
            x = json.loads(path.read_text())
            rate = f"{x['per_second']:,.0f} {x['unit']} per second"
            note = f", from iteration {x['resumed_at']}" if x["resumed_at"] else ""
            rows.append([stage, f"{x['seconds']:.0f} s{note}", rate])
    return _table(["stage", "time", "throughput"], rows)


def _continuations(samples: Sequence[Mapping[str, str]], algorithm: str) -> str:
    rows = [
        [x["prompt"], x["sft"].removeprefix(x["prompt"]), x[algorithm].removeprefix(x["prompt"])]
        for x in samples[:SHOWN_SAMPLES]
    ]
    return _table(["prompt", "sft", algorithm], [[_escaped(cell) for cell in row] for row in rows])


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.3f}"


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
