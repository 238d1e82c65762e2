"""The RLHF pipeline over several seeds: its results, stored with the command that made them."""

import dataclasses
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax

from purejaxppo.analysis.statistics import estimate
from purejaxppo.rlhf import corpora
from purejaxppo.rlhf.judges import judge_report
from purejaxppo.rlhf.pipeline import run_pipeline
from purejaxppo.rlhf.settings import PipelineSettings

RESULTS = Path(__file__).parent / "results" / "rlhf"
# Algorithms and coefficients β of the anchor, by task.
CASES = {
    "arithmetic": (("ppo", 0.0), ("ppo", 0.3), ("grpo", 0.3), ("rloo", 0.3)),
    "reviews": (("ppo", None),),
}


def run(task: str, seeds: int, workers: int = 1) -> None:
    """Run every case with each seed and store the measurements after each seed.

    With several ``workers``, that many seeds run at once, each on one core; their times are then
    longer than that of a run alone.
    """
    runs: list[dict[str, Any]] = []
    if workers > 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"  # of the new processes
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for seed, runs_of_seed in enumerate(pool.map(partial(_run_seed, task), range(seeds))):
            runs.extend(runs_of_seed)
            _store(task, seed + 1, workers, runs)
            print(f"seed {seed}: {[run['seconds'] for run in runs_of_seed]} s", flush=True)
    show(task)


def _run_seed(task: str, seed: int) -> list[dict[str, Any]]:
    """The settings, times and measurements of every case with this seed."""
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        first: Path | None = None  # its first stages are used by the other cases
        for algorithm, beta in CASES[task]:
            settings = PipelineSettings.of(task, algorithm, key=seed, ref_kl_coef=beta)
            directory = Path(scratch) / f"{algorithm}-{beta}"
            started = time.perf_counter()
            measured = run_pipeline(settings, directory, stages_from=first)
            first = first or directory
            runs.append(
                {
                    "settings": dataclasses.asdict(settings),
                    "seconds": round(time.perf_counter() - started, 1),
                    "stages": _stages(directory, algorithm),
                    "measured": measured,
                }
            )
    return runs


def _stages(directory: Path, algorithm: str) -> dict[str, Any]:
    """The time and the throughput of every stage."""
    return {
        stage: json.loads((directory / stage / "seconds.json").read_text())
        for stage in ("sft", "reward", algorithm)
        if (directory / stage / "seconds.json").exists()
    }


def _store(task: str, seeds: int, workers: int, runs: list[dict[str, Any]]) -> None:
    result = {
        "command": f"python -m benchmarks rlhf --task {task} --seeds {seeds} --workers {workers}",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "runs": runs,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{task}.json").write_text(json.dumps(result, indent=2) + "\n")


def show(task: str) -> None:
    """Print the stored results: interquartile means over the seeds with 95 % intervals."""
    path = RESULTS / f"{task}.json"
    if not path.exists():
        raise SystemExit(f"there are no results: run python -m benchmarks rlhf --task {task} first")
    runs = json.loads(path.read_text())["runs"]
    for algorithm, beta in CASES[task]:
        chosen = [run for run in runs if _is_case(run["settings"], algorithm, beta)]
        if not chosen:
            continue
        columns: dict[str, list[float]] = {}
        for run in chosen:
            for name, x in numbers(run).items():
                columns.setdefault(name, []).append(x)
        print(f"{algorithm}, beta {beta}, {len(chosen)} seeds")
        for name, values in columns.items():
            point, low, high = estimate(values)
            print(f"  {name:<28} {point:8.3f} [{low:.3f}, {high:.3f}]")


def _is_case(settings: dict[str, Any], algorithm: str, beta: float | None) -> bool:
    return settings["algorithm"] == algorithm and beta in (None, settings["ref_kl_coef"])


def numbers(run: dict[str, Any]) -> dict[str, float]:
    """The numbers of one run that the table shows."""
    algorithm = run["settings"]["algorithm"]
    measured = run["measured"]
    policy = measured["policies"][algorithm]
    result = {name: policy[name] for name in ("score", "kl", "length", "ended")}
    result["distinct_2, share of sft"] = (
        policy["distinct_2"] / measured["policies"]["sft"]["distinct_2"]
    )
    if "optimum" in measured:
        optimum = measured["optimum"]
        result |= {"right before": optimum["right_before"], "right after": optimum["right_after"]}
        result["J* - J"] = optimum["optimal_objective"] - optimum["objective"]
    result |= {f"accuracy: {name}": x for name, x in measured["accuracies"].items()}
    for judge, rates in measured["win_rates"].items():
        result |= {f"wins: {judge}, {name}": share for name, (share, _, _) in rates.items()}
    first = CASES[run["settings"]["task"]][0]
    includes_fine_tuning = _is_case(run["settings"], *first)  # the other cases copied it
    result["seconds" if includes_fine_tuning else "seconds, without fine-tuning"] = run["seconds"]
    return result


def judges() -> None:
    """Print and store how often people and judges agree with one person's comparison of T."""
    splits = corpora.split_ratings(corpora.load_ratings())
    accuracies = judge_report(splits, corpora.load_reviews())
    for name, accuracy in accuracies.items():
        print(f"{name:<14} {accuracy:.3f}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = {"command": "python -m benchmarks rlhf_judges", "accuracies": accuracies}
    (RESULTS / "judges.json").write_text(json.dumps(result, indent=2) + "\n")
