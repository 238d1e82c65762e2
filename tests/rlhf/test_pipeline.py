"""The pipeline: its stages, files, report and resumption."""

import dataclasses
import json
import os
import signal

import chex
import jax
import numpy as np
import pandas as pd
import pytest
from sentences import sentence_of
from small_pipelines import SMALL, small_arithmetic, text_settings, text_task

from purejaxppo.cli import commands
from purejaxppo.rlhf.model_files import load_model
from purejaxppo.rlhf.pipeline import SILENT, run_pipeline
from purejaxppo.rlhf.pipeline_stages import policy_setup, policy_stage, score_of
from purejaxppo.rlhf.settings import PipelineSettings
from purejaxppo.rlhf.stages import FIRST_STAGES
from purejaxppo.rlhf.tokenizer import load_tokenizer
from purejaxppo.runs import chunks
from purejaxppo.types import ConfigError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished pipeline on records of texts."""
    directory = tmp_path_factory.mktemp("pipeline") / "run"
    settings = text_settings()
    return directory, run_pipeline(settings, directory, text_task(settings)), settings


def test_every_stage_leaves_its_files(finished):
    directory, *_ = finished
    for stage in ("sft", "reward", "ppo"):
        names = {path.name for path in (directory / stage).iterdir()}
        assert {
            "config.json",
            "metrics.csv",
            "learning_curve.png",
            "seconds.json",
            "model",
        } <= names
        assert "checkpoints" not in names
    metrics = pd.read_csv(directory / "ppo" / "metrics.csv")
    assert metrics["iteration"].tolist() == [1, 2, 3, 4]
    assert metrics["ref_kl"][0] == pytest.approx(0, abs=1e-5)
    assert pd.read_csv(directory / "ppo" / "evaluations.csv")["iteration"].tolist() == [2, 4]
    assert load_model(directory / "ppo" / "model").kind == "own"
    assert load_model(directory / "reward" / "model").kind == "reward"
    assert load_tokenizer(directory / "tokenizer.json").vocab_size == 289
    assert json.loads((directory / "config.json").read_text())["settings"]["width"] == 16


def test_the_report_shows_what_was_measured(finished):
    directory, measured, _ = finished
    assert json.loads((directory / "evaluation.json").read_text()) == measured
    text = (directory / "report.md").read_text()
    for policy, values in measured["policies"].items():
        (row,) = (
            line
            for line in text.splitlines()
            if line.startswith(f"| {policy} | {values['ended']:.3f}")
        )
        assert f"{values['score']:.3f}" in row
    share, low, high = measured["win_rates"]["words"]["ppo"]
    assert f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]" in text
    for name in ("training.png", "judges.png"):
        assert f"({name})" in text and (directory / name).stat().st_size > 10_000
    samples = [json.loads(line) for line in (directory / "samples.jsonl").open()]
    assert all(set(row) == {"prompt", "sft", "ppo", "best of 2"} for row in samples)
    assert all(row["ppo"].startswith(row["prompt"]) for row in samples)


def test_scores_are_standardized_on_samples_of_the_fine_tuned_policy(finished):
    directory, measured, _ = finished
    assert abs(measured["policies"]["sft"]["score"]) < 1.5
    assert load_model(directory / "reward" / "model").params["scale"] != 1


def test_the_critic_starts_from_the_reward_model(finished):
    directory, _, settings = finished
    task = text_task(settings)
    reference, reward = (load_model(directory / name / "model").params for name in FIRST_STAGES)
    score = score_of(settings, task)
    setup = policy_setup(settings, task, score)
    stage = policy_stage(settings, task, "", setup, reference, score, reward)
    chex.assert_trees_all_equal(stage.params["value"]["decoder"], reward["decoder"])
    chex.assert_trees_all_equal(stage.params["policy"], reference["policy"])
    assert not np.any(jax.tree.leaves(stage.params["value"]["head"])[0])


def test_a_finished_pipeline_trains_nothing_again(finished):
    directory, measured, settings = finished
    notes = []
    events = SILENT._replace(on_start=lambda *_: pytest.fail("trained"), on_note=notes.append)
    again = run_pipeline(settings, directory, text_task(settings), resume=True, events=events)
    assert again == measured
    assert sum("finished before" in note for note in notes) == 3
    report = (directory / "report.md").read_text()
    (directory / "report.md").unlink()  # as after an interruption before the report
    run_pipeline(settings, directory, text_task(settings), resume=True, events=events)
    assert (directory / "report.md").read_text() == report


def test_a_new_pipeline_never_overwrites(finished):
    directory, _, settings = finished
    with pytest.raises(ConfigError, match="exists already"):
        run_pipeline(settings, directory, text_task(settings))
    other = text_settings(lr=0.5)
    message = sentence_of(lambda: run_pipeline(other, directory, text_task(other), resume=True))
    assert message == (
        f"the pipeline in {directory} has other settings: lr = 0.00015 there and 0.5 here"
    )
    other_task = text_task(settings)
    other_task.demonstrations.tokens[0, 1] += 1
    message = sentence_of(lambda: run_pipeline(settings, directory, other_task, resume=True))
    assert message == f"the pipeline in {directory} was started with other data"


@pytest.mark.learning
@pytest.mark.parametrize(("algorithm", "at"), [("ppo", "first"), ("dpo", "last")])
def test_an_interrupted_pipeline_continues_bit_for_bit(tmp_path, monkeypatch, algorithm, at):
    """Ctrl-C after the first or the last iteration of each stage; the coefficient adapts."""
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 0)  # every chunk is one iteration
    stages = ["sft", "reward", algorithm]
    anchor = {"ref_kl_target": 0.01, "ref_kl_coef": 0.1} if algorithm == "ppo" else {}
    settings = text_settings(algorithm, **anchor, sft_batch_size=4, reward_batch_size=12)
    task = text_task(settings)
    run_pipeline(settings, tmp_path / "whole", task)
    stopped = []

    def stop_once(stage, chunk):
        is_here = chunk.done == (1 if at == "first" else stage.job.num_iterations)
        if is_here and stage.name not in stopped:
            stopped.append(stage.name)
            os.kill(os.getpid(), signal.SIGINT)

    events = SILENT._replace(on_chunk=stop_once)
    for _ in stages:
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(settings, tmp_path / "parts", task, resume=True, events=events)
    run_pipeline(settings, tmp_path / "parts", task, resume=True, events=events)
    assert stopped == stages
    for stage in stopped:
        whole = load_model(tmp_path / "whole" / stage / "model").params
        parts = load_model(tmp_path / "parts" / stage / "model").params
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, parts)))
        csv = [
            (tmp_path / name / stage / "metrics.csv").read_bytes() for name in ("whole", "parts")
        ]
        assert csv[0] == csv[1]


@pytest.mark.learning
@pytest.mark.parametrize("algorithm", ["trpo", "reinforce", "rloo", "dpo"])
def test_every_algorithm_runs_by_one_word(tmp_path, algorithm):
    settings = text_settings(algorithm)
    measured = run_pipeline(settings, tmp_path / "run", text_task(settings))
    assert set(measured["policies"]) == {"sft", algorithm, "best of 2"}
    assert np.isfinite(measured["policies"][algorithm]["score"])
    assert measured["policies"][algorithm]["kl"] > 0


@pytest.mark.learning
def test_a_score_that_is_not_finite_is_named_with_its_iteration(tmp_path):
    settings = PipelineSettings.of("arithmetic", **SMALL | {"eval_every": 4})
    task = small_arithmetic()._replace(
        score=lambda tokens, lengths, params: np.nan * lengths.astype(np.float32)
    )
    message = sentence_of(lambda: run_pipeline(settings, tmp_path / "run", task))
    assert message.startswith("ppo diverged in iteration 1: a loss, a gradient or a score is not")
    assert not (tmp_path / "run" / "ppo" / "model").exists()


def test_a_stage_of_other_settings_is_never_loaded(finished, tmp_path):
    """Stages can be shared by pipelines that differ in the last stage only."""
    directory, _, settings = finished
    other = text_settings(sft_lr=0.5)
    message = sentence_of(
        lambda: run_pipeline(other, tmp_path / "a", text_task(other), stages_from=directory)
    )
    assert message == f"the stages in {directory} were trained with other settings: sft_lr"
    missing = tmp_path / "missing"
    message = sentence_of(
        lambda: run_pipeline(settings, tmp_path / "a", text_task(settings), stages_from=missing)
    )
    assert message == f"{missing} is not a pipeline: it has no valid config.json of one"
    assert not (tmp_path / "a").exists()


def test_a_task_that_was_made_with_other_settings_is_refused(tmp_path):
    settings = text_settings()
    other = dataclasses.replace(settings, max_new_tokens=5)
    message = sentence_of(lambda: run_pipeline(other, tmp_path / "run", text_task(settings)))
    assert message == (
        "the task was made with max_new_tokens = 6 and the settings have 5: use the same"
    )
    assert not (tmp_path / "run").exists()


def test_a_score_of_a_wrong_shape_is_refused_before_any_training(tmp_path):
    settings = PipelineSettings.of("arithmetic", **SMALL)
    task = small_arithmetic()._replace(score=lambda tokens, lengths, params: tokens)
    message = sentence_of(lambda: run_pipeline(settings, tmp_path / "run", task))
    assert message.startswith("the score of 8 texts has the shape (8, 10): it must be (8,)")
    assert not (tmp_path / "run").exists()


@pytest.mark.learning
def test_the_command_runs_to_its_end(tmp_path, capsys):
    """Arithmetic, and then another algorithm and a frontier from the same first stage."""
    small = [
        "--width",
        "16",
        "--num-layers",
        "1",
        "--sft-epochs",
        "1",
        "--num-iterations",
        "2",
        "--num-episodes",
        "8",
    ]
    first = ["--directory", str(tmp_path / "first")]
    commands.main(["rlhf", "--task", "arithmetic", *first, *small])
    assert "report.md" in capsys.readouterr().out
    second = ["--directory", str(tmp_path / "second"), "--stages-from", str(tmp_path / "first")]
    anchor = ["--algorithm", "grpo", "--ref-kl-coef", "0.3", "--frontier"]
    commands.main(["rlhf", "--task", "arithmetic", *second, *anchor, *small])
    report = (tmp_path / "second" / "report.md").read_text()
    assert "(frontier.png)" in report and "optimal objective" in report
    points = json.loads((tmp_path / "second" / "frontier.json").read_text())
    assert len(points) == 5 and len({x["kl"] for x in points.values()}) == 5
