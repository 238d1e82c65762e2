"""The speed of PPO on a language model beside TRL's experimental PPOTrainer.

Both sides run in processes of their own, in turn, with the same weights, prompts and options
(`SETTINGS`): ours is `benchmarks.rlhf_ppo`, the peer's ``benchmarks/trl_ppo.py``, which needs an
interpreter that has trl. A comparison is refused unless both models give the same probabilities and
scores, and both sides generate the same number of tokens and take as many gradient steps.

The machine must be idle. PyTorch's threads wait for one another by spinning, so that with other
processes on their cores the time and the CPU time of the peer can grow tenfold. One thread
(``peer_threads``) suffers less.

It compares

    generation    128 texts; ours by `generate`, the peer's by ``generate`` of transformers
    rollout       the same, with log-probabilities and values, as PPO collects them
    iteration     all of PPO, without compilation and without the first iteration
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.rlhf_ppo import llama_weights, make_weights

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "rlhf" / "speed.csv"
SETTINGS: dict[str, Any] = {
    "vocab_size": 2048,
    "width": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_width": 352,
    "num_texts": 128,  # in an iteration
    "shortest": 3,  # prompt
    "longest": 10,
    "new_tokens": 24,
    "epochs": 4,
    "minibatches": 4,
    "lr": 3e-4,
    "adam_eps": 1e-5,
    "clip_eps": 0.2,  # of ratios and of values
    "vf_coef": 0.1,
    "gae_lambda": 0.95,
    "ref_kl_coef": 0.05,
    "checked_texts": 16,
}
NUM_PROMPTS = 1024
MEASURES = ("generation", "rollout", "iteration")
OURS = "purejaxppo"
PEER = "TRL"
Row = dict[str, Any]


def run(
    peer_python: str,
    peer_threads: int | None,
    pairs: int,
    repeats: int,
    iterations: int,
    store: bool,
) -> None:
    """Run both sides in turn ``pairs`` times, print a comparison after each pair, and store it."""
    load = os.getloadavg()[0]
    print(f"load of the machine before the start: {load:.1f}")
    if load > 0.5:
        print("the machine is not idle: the times of the peer are too long")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        lengths = {"repeats": repeats, "iterations": iterations}
        prepare(home, lengths | {"peer_threads": peer_threads})
        commands = {
            OURS: [sys.executable, "-m", "benchmarks.rlhf_ppo", directory],
            PEER: [peer_python, str(Path(__file__).parent / "trl_ppo.py"), directory],
        }
        for pair in range(1, pairs + 1):
            results = {side: run_side(command, home) for side, command in commands.items()}
            require_same_work(results[OURS], results[PEER])
            for side, result in results.items():
                rows += rows_of(pair, side, result)
            if pair == 1:
                for result in results.values():
                    print(result["software"])
            print(f"{pair} of {pairs} pairs:\n{comparison(rows)}", flush=True)
    if store:
        write(rows)


def prepare(home: Path, options: dict[str, Any]) -> None:
    """Write the settings with random prompts, and the weights for the peer."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(SETTINGS["shortest"], SETTINGS["longest"] + 1, NUM_PROMPTS)
    prompts = [rng.integers(0, SETTINGS["vocab_size"], size).tolist() for size in sizes]
    settings = SETTINGS | options | {"prompts": prompts}
    (home / "settings.json").write_text(json.dumps(settings))
    np.savez(home / "weights.npz", **llama_weights(make_weights(settings)))  # type: ignore[arg-type]


def run_side(command: list[str], home: Path) -> dict[str, Any]:
    """The result of one process."""
    path = home / "result.json"
    path.unlink(missing_ok=True)
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"{command[0]} cannot be started: {error.strerror}") from None
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr[-3000:]}")
    return json.loads(path.read_text())


def require_same_work(ours: dict[str, Any], peer: dict[str, Any]) -> None:
    """End with an error unless both sides have the same model and do the same work."""
    for name in ("log_prob", "score"):
        difference = np.abs(np.subtract(ours[name], peer[name])).max()
        if not difference < 1e-3:
            raise SystemExit(f"the models differ: {name} by {difference}")
    for name in ("new_tokens", "gradient_steps"):
        if ours[name] != peer[name]:
            raise SystemExit(f"{name} in an iteration differ: {ours[name]} and {peer[name]}")


def rows_of(pair: int, side: str, result: dict[str, Any]) -> list[Row]:
    """For each measure the medians over the repeats in one process."""
    rows = []
    for measure in MEASURES:
        seconds, cpu_seconds = np.median(result["times"][measure], axis=0)
        row = {"pair": pair, "side": side, "measure": measure}
        row |= {"seconds": round(seconds, 4), "cpu_seconds": round(cpu_seconds, 4)}
        row |= {"repeats": len(result["times"][measure]), "software": result["software"]}
        rows.append(row)
    if "compile_seconds" in result:
        row = {"pair": pair, "side": side, "measure": "compilation"}
        row |= {"seconds": round(result["compile_seconds"], 2), "cpu_seconds": "", "repeats": 1}
        rows.append(row | {"software": result["software"]})
    return rows


def comparison(rows: list[Row]) -> str:
    """A table: medians over the pairs, and the median ratio with its range."""
    lines = [
        "| measure | purejaxppo | TRL | ratio (range) | CPU: purejaxppo | TRL | ratio (range) |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for measure in MEASURES:
        cells = []
        for unit in ("seconds", "cpu_seconds"):
            ours, peer = (values(rows, side, measure, unit) for side in (OURS, PEER))
            ratios = peer / ours
            cells.append(f"{np.median(ours):.3f} s | {np.median(peer):.3f} s")
            low, high = ratios.min(), ratios.max()
            cells.append(f"{np.median(ratios):.1f} ({low:.1f} to {high:.1f})")
        lines.append(f"| {measure} | " + " | ".join(cells) + " |")
    compilation = np.median(values(rows, OURS, "compilation", "seconds"))
    lines.append(f"compilation of an iteration: {compilation:.1f} s")
    return "\n".join(lines)


def values(rows: list[Row], side: str, measure: str, unit: str) -> NDArray[np.floating]:
    """The numbers of one side, pair by pair."""
    chosen = [row for row in rows if row["side"] == side and row["measure"] == measure]
    return np.array([float(row[unit]) for row in chosen])


def write(rows: list[Row]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
