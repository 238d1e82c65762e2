"""The pipeline: its stages, files, report, resumption, command line and wrong inputs."""

import json
import os
import signal

import jax
import numpy as np
import pandas as pd
import pytest
from sentences import sentence_of

from purejaxppo.cli import commands
from purejaxppo.rlhf.model_files import load_model
from purejaxppo.rlhf.pipeline import SILENT, run_pipeline
from purejaxppo.rlhf.settings import PipelineSettings
from purejaxppo.rlhf.tasks import Prompts, arithmetic_task
from purejaxppo.rlhf.text_tasks import _held_out, records_task
from purejaxppo.rlhf.tokenizer import load_tokenizer
from purejaxppo.runs import chunks
from purejaxppo.types import ConfigError

SMALL = {"width": 16, "num_layers": 1, "sft_epochs": 1, "num_iterations": 4, "num_episodes": 8}
SMALL |= {"num_epochs": 1, "num_minibatches": 2, "eval_every": 2}
SHOWN = ["The film was", "I think"]
GOOD = "a good film"
BAD = "a bad film"


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
    own = {"vocab_size": 300, "context": 40, "max_new_tokens": 6, "best_of": 2}
    return PipelineSettings.of("records", algorithm, **SMALL, **own, **changes)


def text_task(settings):
    shown, judged = records()
    judge = _judge()
    return records_task(settings, shown, judged, judges={"words": judge})


def _judge():
    from purejaxppo.rlhf.judges import Judge

    return Judge(lambda texts: np.array([float("good" in text) for text in texts]))


def small_arithmetic(num_held_out=50):
    task = arithmetic_task(num_held_out=num_held_out, repeats=1)
    demonstrations = jax.tree.map(lambda x: x[:512], task.demonstrations)
    return task._replace(
        demonstrations=demonstrations, prompts=Prompts(*(x[:64] for x in task.prompts))
    )


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
    anchor = {"ref_kl_target": 0.01, "ref_kl_coef": 0.1}
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--task", "arithmetik"],
            "task = 'arithmetik': it must be one of reviews, arithmetic, records; "
            "did you mean 'arithmetic'?",
        ),
        (
            ["--task", "arithmetic", "--algorithm", "dpo"],
            "dpo learns from pairs of completions, and the arithmetic task has none: "
            "choose another algorithm",
        ),
        (
            ["--task", "arithmetic", "--ref-kl-coef", "-1"],
            "ref_kl_coef = -1.0: it must be a finite number of at least 0",
        ),
        (
            ["--task", "arithmetic", "--resume"],
            "resume needs the directory of the pipeline to continue: --directory",
        ),
        (
            ["--demonstrations", "x.jsonl"],
            "--preferences is missing: give a file of JSON Lines",
        ),
        (
            ["--task", "arithmetic", "--demonstrations", "x.jsonl"],
            "the arithmetic task has data of its own: leave demonstrations out",
        ),
        (
            ["--task", "arithmetic", "--vocab-size", "300"],
            "the arithmetic task has vocab_size of its own: leave it out",
        ),
        (
            ["--task", "reviews", "--algorithm", "dpo", "--frontier"],
            "a frontier varies the anchor of reinforcement learning: not for dpo",
        ),
        (
            ["--task", "arithmetic", "--algorithm", "grpo", "--num-episodes", "12"],
            "group_size = 8 does not divide num_episodes = 12",
        ),
    ],
)
def test_a_wrong_input_is_one_sentence_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_code:
        commands.main(["rlhf", *arguments])
    assert exit_code.value.code == 2
    assert capsys.readouterr().err == f"purejaxppo: {message}\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PipelineSettings.of("records", widht=3),
            "there is no setting widht; did you mean 'width'?",
        ),
        (
            lambda: PipelineSettings(task="arithmetic"),
            "the arithmetic task has texts of its own: make its settings by "
            "PipelineSettings.of('arithmetic')",
        ),
        (
            lambda: _held_out(
                {"demonstrations": SHOWN, "preferences": ["I think", "Write a poem"]}
            ),
            "all 2 prompts of the preferences are held out: give more different prompts",
        ),
        (
            lambda: records_task(text_settings(), *records(), judges={"kl": _judge()}),
            "a judge has the name kl, which is that of a measurement",
        ),
    ],
)
def test_wrong_settings_are_one_sentence(make, message):
    assert sentence_of(make) == message


def test_what_is_held_out_is_not_learnt_from():
    settings = text_settings()
    shown, judged = records()
    others = [{"prompt": f"prompt {i}"} for i in range(30)]
    task = records_task(settings, shown, judged, others)

    def prompts_of(texts):
        rows = zip(np.asarray(texts.tokens), np.asarray(texts.prompt_length), strict=True)
        return {task.decode(tokens[:length]) for tokens, length in rows}

    assert not prompts_of(task.demonstrations) & prompts_of(task.held_out)
    assert not prompts_of(task.pairs.chosen) & prompts_of(task.held_out_pairs.chosen)
    kinds = (task.prompts, task.held_out_prompts)
    train, held_out = ({task.decode(x) for x in kind.tokens} for kind in kinds)
    assert not train & held_out and len(train | held_out) == 30
    assert not prompts_of(task.demonstrations) & prompts_of(task.held_out_pairs.chosen)


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


def test_records_with_mistakes_name_file_and_line(tmp_path, capsys):
    shown, judged = records(4)
    demonstrations = tmp_path / "d.jsonl"
    preferences = tmp_path / "p.jsonl"
    demonstrations.write_text("\n".join(map(json.dumps, shown)))
    judged[2] = {"prompt": "this is", "chosen": "a"}
    preferences.write_text("\n".join(map(json.dumps, judged)))
    arguments = ["--demonstrations", str(demonstrations), "--preferences", str(preferences)]
    with pytest.raises(SystemExit) as exit_code:
        commands.main(["rlhf", *arguments, "--directory", str(tmp_path / "run")])
    assert exit_code.value.code == 2 and not (tmp_path / "run").exists()
    assert (
        capsys.readouterr().err == f"purejaxppo: {preferences}:3: the key 'rejected' is missing\n"
    )


def test_prompts_that_leave_no_room_are_refused():
    shown, judged = records()
    settings = text_settings()
    long = [{"prompt": "word " * 20}, {"prompt": "x"}]
    message = sentence_of(lambda: records_task(settings, shown, judged, long))
    assert message == (
        "prompt 0 has 101 tokens with its start, and the context has 40: "
        "shorten it, or choose a longer context"
    )
