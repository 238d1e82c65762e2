"""The command line: its output, the files it writes, and one sentence for a wrong input."""

import json
import os
import re
import signal
import subprocess
import sys

import jax
import pytest
from compiled_once import compiled_once
from rich.console import Console

from purejaxppo import Config, Policy, envs, make_trainer, save_policy
from purejaxppo.cli import commands
from purejaxppo.cli import console as console_module
from purejaxppo.cli.options import split_cpu
from purejaxppo.config import FIELDS, tuned
from purejaxppo.runs.fit import fingerprint
from purejaxppo.runs.run import load_policies
from purejaxppo.runs.run_directory import unfinished

SMALL = [
    *("--num-envs", "2", "--num-steps", "8", "--num-minibatches", "1"),
    *("--num-epochs", "1", "--hidden-sizes", "4"),
]


@pytest.fixture(autouse=True, scope="module")
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def call(*arguments):
    """(exit code, stdout) of a command; errors go to stderr, which capsys captures."""
    with pytest.MonkeyPatch.context() as patch:
        console = Console(highlight=False, soft_wrap=True, width=200, record=True, quiet=False)
        patch.setattr(commands, "console", console)
        code = 0
        try:
            commands.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code or 0
        return code, console.export_text()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one agent: (directory, stdout)."""
    directory = tmp_path_factory.mktemp("one") / "run"
    code, output = call(
        "train", *SMALL, "--total-timesteps", "1e3", "--eval-episodes", 2, "--directory", directory
    )
    assert code == 0
    return directory, output


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """An unevaluated run of two agents in an environment that cannot be drawn."""
    directory = tmp_path_factory.mktemp("two") / "run"
    arguments = ["--env", "SimpleBandit-bsuite", "--seeds", 2]
    arguments += ["--total-timesteps", 32, "--eval-episodes", 0]
    code, output = call("train", *arguments, *SMALL, "--directory", directory)
    assert code == 0
    return directory, output


@pytest.fixture
def refused(capsys):
    """``refused(*arguments) -> stderr``: asserts exit code 2, no traceback and an empty stdout."""

    def refused(*arguments):
        code, output = call(*arguments)
        captured = capsys.readouterr()
        assert code == 2
        assert "Traceback" not in captured.err + captured.out and output == ""
        return captured.err

    return refused


def one_sentence(error):
    """The message in ``purejaxppo: message``, which must be the only line."""
    (line,) = error.splitlines()
    assert line.startswith("purejaxppo: ")
    return line.removeprefix("purejaxppo: ")


# -------------------------------------------------------------------------------------------- train


def test_train_prints_its_plan_before_it_runs(one):
    _, output = one
    plan, _, _ = output.partition("1,008 steps in")
    for words in (
        "environment  CartPole-v1, 2 copies per agent",
        "algorithm    PPO, 1 epochs of 1 minibatches on 8 × 2 steps",
        "steps        1,008 per agent in 63 iterations (1,000 rounded up)",
        "agents       1",
        f"device       {jax.devices()[0].platform}",
    ):
        assert words in plan
    assert re.search(r"memory +[1-9][\d,.]* [kMG]B", plan)
    assert re.search(r"start-up +imports \d+\.\d s, compilation \d+\.\d s", plan)


def test_train_shows_progress_and_ends_with_a_result(one):
    directory, output = one
    assert re.search(r"1,008 steps in \d+\.\d s: [\d,]+ steps/s", output)
    progress = re.findall(
        r"^ +([\d,]+) steps  return (\d+\.\d|–)  [\d,]+ steps/s$", output, re.MULTILINE
    )
    assert progress and progress[-1][0] == "1,008"
    assert "CartPole-v1: return over 2 fresh episodes of the final policy" in output
    assert re.search(r"policy +│ +\d+\.\d ± \d+\.\d │ +\d+\.\d ± \d+\.\d │ +\d+ ", output)
    assert (
        f"The run is in {directory}: config.json, metrics.csv, learning_curve.png, policy/"
        in output
    )


def test_train_writes_a_complete_run_directory(one):
    directory, _ = one
    names = ["config.json", "learning_curve.png", "metrics.csv", "policy"]
    assert sorted(path.name for path in directory.iterdir() if path.suffix != ".gif") == names
    config = Config.from_dict(json.loads((directory / "config.json").read_text())["config"])
    assert (config.env, config.total_timesteps, config.hidden_sizes) == ("CartPole-v1", 1000, (4,))
    assert config.lr == Config.for_env("CartPole-v1").lr  # the tuned value where none was given
    assert len((directory / "metrics.csv").read_text().splitlines()) == 1 + 63
    assert load_policies(directory)[0].config == config


def test_seeds_are_trained_in_parallel(two):
    directory, output = two
    assert "agents       2 at once" in output and "64 steps in" in output
    assert "steps        32 per agent in 2 iterations\n" in re.sub(r" +\n", "\n", output)
    assert len(load_policies(directory)) == 2
    assert len((directory / "metrics.csv").read_text().splitlines()) == 1 + 2 * 2


def test_a_diverged_run_exits_with_1_and_prints_the_iteration_and_advice(tmp_path):
    arguments = ["--env", "SimpleBandit-bsuite", "--lr", "1e38", "--no-anneal-lr"]
    arguments += ["--total-timesteps", 160, "--directory", tmp_path / "run"]
    code, output = call("train", *SMALL, *arguments)
    assert code == 1
    assert re.search(
        r"Seed 0 diverged: loss or gradient became NaN or infinite in iteration \d+\.", output
    )
    assert "Try a smaller --lr" in output
    # A diverged policy is not evaluated.
    assert "fresh episodes" not in output and "± " not in output
    assert (tmp_path / "run" / "learning_curve.png").exists()


# ------------------------------------------------------------------------------ evaluate and render


@pytest.mark.parametrize(
    ("options", "output", "column"),
    [
        (["--env", "SimpleBandit-bsuite", "--algorithm", "trpo"], "TRPO", "step_fraction"),
        (["--objective", "adaptive_kl", "--early-stop-kl", "0.02"], "PPO (adaptive_kl)", "kl_coef"),
    ],
)
def test_another_algorithm_is_one_option(tmp_path, options, output, column):
    arguments = ["--total-timesteps", 32, "--eval-episodes", 0, "--directory", tmp_path / "run"]
    code, text = call("train", *options, *SMALL, *arguments)
    assert code == 0
    assert f"algorithm    {output}, 1 epochs" in text
    assert column in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")


def test_evaluate_prints_a_table_of_the_policies_of_a_run(two):
    code, output = call("evaluate", two[0], "--episodes", 3)
    assert code == 0
    assert "SimpleBandit-bsuite: return over 3 fresh episodes of the final policy" in output
    for name in ("seed 0", "seed 1", "interquartile mean"):
        assert name in output
    assert "seed 2" not in output


def test_render_makes_a_gif_of_one_episode(one, tmp_path):
    code, output = call("render", one[0], "--out", tmp_path / "episode.gif", "--max-steps", 4)
    assert code == 0
    assert (tmp_path / "episode.gif").read_bytes()[:6] in (b"GIF87a", b"GIF89a")
    assert f"{tmp_path / 'episode.gif'}: one episode, return 4.0" in output
    assert [path.name for path in tmp_path.iterdir()] == ["episode.gif"]


def test_rendering_an_environment_without_pictures_is_refused(refused, two):
    before = sorted(two[0].rglob("*"))
    message = one_sentence(refused("render", two[0]))
    assert (
        message == "SimpleBandit-bsuite cannot be drawn: gymnax's visualiser has no picture of it"
    )
    assert sorted(two[0].rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--seed", 2], "seed = 2: this run has the seeds 0 … 1"),
        (["--seed", -1], "seed = -1: this run has the seeds 0 … 1"),
        (["--out", "x.png"], "x.png: the picture is a GIF, so its name must end in .gif"),
    ],
)
def test_wrong_options_of_render_are_refused(refused, two, options, part):
    assert one_sentence(refused("render", two[0], *options)) == part


@pytest.mark.parametrize("steps", [0, -1])
def test_an_episode_to_render_has_at_least_one_step(refused, one, tmp_path, steps):
    message = one_sentence(
        refused("render", one[0], "--out", tmp_path / "x.gif", "--max-steps", steps)
    )
    assert f"max_steps = {steps}" in message
    assert list(tmp_path.iterdir()) == []


def test_evaluating_no_episodes_is_refused(refused, two):
    message = one_sentence(refused("evaluate", two[0], "--episodes", 0))
    assert message == "num_episodes = 0: it must be an integer of at least 1"


@pytest.mark.parametrize("command", ["evaluate", "render"])
def test_a_missing_or_foreign_directory_is_refused(refused, tmp_path, command):
    missing = tmp_path / "nothing"
    expected = f"{missing} is not a run: there is no such directory"
    assert one_sentence(refused(command, missing)) == expected
    expected = (
        f"{tmp_path} is not a policy of purejaxppo: "
        "it needs a policy.json and a params.npz of its own"
    )
    assert one_sentence(refused(command, tmp_path)) == expected
    (tmp_path / "seed_notes").mkdir()
    assert str(tmp_path) in one_sentence(refused(command, tmp_path))


def test_a_policy_directory_alone_can_be_evaluated(tmp_path):
    config = Config(env="SimpleBandit-bsuite", num_envs=2, hidden_sizes=(4,))
    state = jax.jit(make_trainer(config).init)(jax.random.key(0))
    save_policy(tmp_path / "policy", Policy.from_state(config, state))
    code, output = call("evaluate", tmp_path / "policy", "--episodes", 2)
    assert code == 0 and "SimpleBandit-bsuite: return over 2 fresh episodes" in output


# ---------------------------------------------------------------------------------------- compare


def test_compare_trains_scores_and_prints_its_directory(tmp_path):
    arguments = ["--envs", "SimpleBandit-bsuite", "--algorithms", "trpo"]
    arguments += ["--seeds", 2, "--eval-episodes", 2]
    code, output = call(
        "compare", *arguments, "--total-timesteps", 2048, "--directory", tmp_path / "here"
    )
    assert code == 0
    assert output.index("TRPO, 20 epochs") < output.index("final return")
    assert re.search(
        r"SimpleBandit-bsuite │ trpo +│ +2,048 │ +-?\d\.\d \[-?\d\.\d, -?\d\.\d\]", output
    )
    assert f"The comparison is in {tmp_path / 'here'}" in output
    assert (tmp_path / "here" / "comparison.png").exists()


def test_a_wrong_comparison_gives_one_sentence(refused, tmp_path):
    assert "not a variant" in one_sentence(refused("compare", "--algorithms", "ppo/none"))
    (tmp_path / "here").mkdir()
    assert "exists already" in one_sentence(refused("compare", "--directory", tmp_path / "here"))


# -------------------------------------------------------------------------------------- the options


def test_every_setting_has_an_option(capsys):
    code, _ = call("train", "--help")
    output = capsys.readouterr().out
    assert code == 0
    for name in [*FIELDS, "seeds", "key", "directory", "eval_episodes", "tuned"]:
        assert f"--{name.replace('_', '-')}" in output, name


def test_the_defaults_are_those_tuned_for_the_environment(capsys):
    for options, config in (
        (["--env", "Pendulum-v1"], Config.for_env("Pendulum-v1")),
        (["--env=Pendulum-v1", "--no-tuned"], Config(env="Pendulum-v1")),
        ([], Config.for_env("CartPole-v1")),
    ):
        call("train", *options, "--help")
        output = " ".join(capsys.readouterr().out.replace("│", " ").split())
        for name in ("gamma", "num_steps", "total_timesteps"):
            described = output.split(f"--{name.replace('_', '-')} ")[1].split(" --")[0]
            assert f"(default: {getattr(config, name)})" in described, (options, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--env", "CartPole-v2"],
            "'CartPole-v2' is not an environment; did you mean 'CartPole-v1'?",
        ),
        (
            ["--algorithm", "ppq"],
            "algorithm = 'ppq': it must be one of ppo, trpo, reinforce; did you mean 'ppo'?",
        ),
        (["--activation", "rellu"], "did you mean 'relu'?"),
        (
            ["--num-envs", "4", "--num-steps", "8", "--num-minibatches", "5"],
            "num_minibatches = 5 does not divide num_envs * num_steps = 32; "
            "the nearest number that does is 4",
        ),
        (["--lr", "nan"], "lr = nan: it must be a finite number of at least 0"),
        (["--lr", "inf"], "lr = inf: it must be a finite number of at least 0"),
        (["--gamma", "1.5"], "gamma = 1.5: it must be a number between 0 and 1"),
        (["--num-envs", "0"], "num_envs = 0: it must be an integer of at least 1"),
        (["--num-envs", "2.5"], "num_envs = 2.5: it must be an integer of at least 1"),
        (
            ["--total-timesteps", "-1e3"],
            "total_timesteps = -1000: it must be an integer of at least 1",
        ),
        (["--seeds", "0"], "seeds = 0: it must be an integer of at least 1 and below 2**32"),
        (
            ["--eval-episodes", "-1"],
            "eval_episodes = -1: it must be an integer of at least 0 and below 2**32",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_wrong_value_gives_one_sentence_and_writes_nothing(refused, tmp_path, options, message):
    # --total-timesteps, unless the options have it already.
    last = "--total-timesteps" if "1e3" not in options[1] else "--key"
    error = refused("train", *SMALL, *options, last, "32", "--directory", tmp_path / "run")
    assert message in one_sentence(error)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_never_overwritten(refused, two):
    before = {path: path.read_bytes() for path in two[0].rglob("*") if path.is_file()}
    message = one_sentence(
        refused("train", "--env", "SimpleBandit-bsuite", *SMALL, "--directory", two[0])
    )
    assert (
        message == f"{two[0]} exists already, and a run never overwrites: choose another directory"
    )
    assert {path: path.read_bytes() for path in two[0].rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "--num-minibatchs", "2"], "--num-minibatches"),
        (["train", "--nsteps", "2"], "--nsteps"),
        (["train", "--num-envs", "many"], "num_envs = 'many': it must be an integer of at least 1"),
        (["train", "--lr"], "--lr"),
        (["train", "--env"], "--env"),
        (["trian"], "train"),
        ([], "train"),
        (["evaluate"], "directory written by train"),
        (["envs", "--suite", "gymnex"], "'gymnex' is not a suite; there is gymnax"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_the_error_for_a_misspelt_command_or_option_names_the_right_one(capsys, arguments, part):
    code, _ = call(*arguments)
    captured = capsys.readouterr()
    assert code == 2
    assert part in captured.err and captured.out == "" and "Traceback" not in captured.err


def test_an_error_in_the_options_names_purejaxppo_not_main(capsys):
    call("train", "--env")
    assert "__main__" not in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- envs


def test_envs_lists_the_environments_that_can_be_trained():
    code, output = call("envs")
    lines = output.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines] == envs.list_envs()
    assert {line.split()[0] for line in lines if line.endswith("(tuned settings)")} == set(tuned())
    assert "MNISTBandit-bsuite" not in output


def test_envs_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "purejaxppo", "envs"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "CartPole-v1  (tuned settings)" in done.stdout.splitlines()
    assert "Catch-bsuite" in done.stdout.splitlines()


def test_a_wrong_input_in_a_process_of_its_own_has_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "purejaxppo", "evaluate", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == f"purejaxppo: {tmp_path / 'nothing'} is not a run: there is no such directory\n"
    )


# -------------------------------------------------------------------------------------------- sweep


def test_sweep_trains_a_grid_and_prints_the_best_settings(tmp_path, monkeypatch):
    # JAX has already started, so the CPU cannot be split any more.
    monkeypatch.setattr(commands, "split_cpu", lambda num_devices: None)
    grid = ["--grid", "lr=1e-3,1e-2", "hidden-sizes=4,4x4", "--seeds", 2, "--at-once", 2]
    settings = [*SMALL, "--total-timesteps", 64, "--eval-episodes", 2]
    settings += ["--directory", tmp_path / "sweep"]
    code, output = call("sweep", *grid, *settings)
    assert code == 0
    assert "8 members: 4 settings × 2 seeds, 512 steps in all, 2 compilations" in output
    assert output.count("CartPole-v1, PPO, 2 environments: 4 members, 2 at once on ") == 2
    assert re.search(r"^ +512 steps  return (\d+\.\d|–)  [\d,]+ steps/s$", output, re.MULTILINE)
    rows = re.findall(
        r"│ (0\.01|0\.001) +│ \((4,|4, 4)\) +│ +\d+\.\d \[\d+\.\d, \d+\.\d\] │", output
    )
    assert len(set(rows)) == 4
    names = {path.name for path in (tmp_path / "sweep").iterdir()}
    assert {
        "config.json",
        "scores.csv",
        "curves.csv",
        "summary.csv",
        "curves.png",
        "heat_map_lr_hidden_sizes.png",
    } <= names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--grid", "lr"],
            "grid: 'lr' must be a field and its values, once each, such as lr=1e-4,3e-4",
        ),
        (
            ["--grid", "lr=1e-3", "lr=1e-4"],
            "grid: 'lr=1e-4' must be a field and its values, once each",
        ),
        (["--grid", "lrr=1"], "'lrr' is not a setting; did you mean 'lr'?"),
        (["--grid", "hidden_sizes=4xa"], "hidden_sizes[1] = 'a'"),
        (
            ["--grid", "lr=loguniform(1e-4,1e-2)"],
            "lr has a distribution: set samples to the number of draws",
        ),
        (["--grid", "lr=1e-3", "--checkpoint-seconds", "soon"], "checkpoint_seconds = 'soon'"),
        (["--grid", "lr=1e-3", "--memory-limit", "much"], "memory_limit = 'much'"),
        (["--grid", "lr=1e-3", "--log", "tensorbord"], "did you mean 'tensorboard'?"),
        (["--grid", "lr=1e-3", "--exchange-every", 2], "nothing to explore"),
        (["--grid", "lr=1e-3,1e-2", "--exchange-every", -1], "exchange_every = -1"),
        (["--grid", "lr=1e-3", "--num-processes", 2], "need the address of the first process"),
        (
            ["--grid", "lr=1e-3", "--coordinator", "here:1"],
            "the number of processes and the index of this one",
        ),
        (
            [
                "--grid",
                "lr=1e-3",
                "--coordinator",
                "here",
                "--num-processes",
                2,
                "--process-index",
                0,
            ],
            "coordinator = 'here': it must be HOST:PORT, or auto",
        ),
    ],
)
def test_a_wrong_sweep_gives_one_sentence(arguments, message, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "split_cpu", lambda num_devices: None)
    assert message in one_sentence(refused("sweep", *arguments, "--directory", tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()


# ------------------------------------------------------------------------------------------- resume


def test_the_same_command_with_resume_continues_an_interrupted_run(tmp_path, monkeypatch):
    """Ctrl-C, then the same command with --resume and no directory: it finds the run."""
    monkeypatch.chdir(tmp_path)
    arguments = ["train", *SMALL, "--total-timesteps", 320, "--eval-episodes", 0]
    on_progress = console_module.Screen.on_progress

    def press(self, now):
        on_progress(self, now)
        if now.iterations == 10:
            signal.raise_signal(signal.SIGINT)

    with compiled_once():
        with monkeypatch.context() as patch:
            patch.setattr(console_module.Screen, "on_progress", press)
            code, output = call(*arguments)
        assert code == 130 and "The same command with --resume continues from here." in output
        (directory,) = (tmp_path / "runs").iterdir()
        code, output = call(*arguments, "--resume")
    assert code == 0 and "160 steps in" in output
    assert "after the 160 of the run that was resumed at iteration 10" in output
    assert list((tmp_path / "runs").iterdir()) == [directory]
    rows = (directory / "metrics.csv").read_text().splitlines()
    assert [int(row.split(",")[1]) for row in rows[1:]] == list(range(1, 21))
    config = Config.from_dict(json.loads((directory / "config.json").read_text())["config"])
    assert unfinished(tmp_path / "runs", "*", fingerprint(config, 1), 0) is None
    (directory / "checkpoints").mkdir()
    assert unfinished(tmp_path / "runs", "*", fingerprint(config, 1), 0) == directory
    for other, seeds, key in ((config.replace(lr=1.0), 1, 0), (config, 2, 0), (config, 1, 1)):
        assert unfinished(tmp_path / "runs", "*", fingerprint(other, seeds), key) is None


def test_the_cpu_is_split_unless_xla_flags_says_otherwise(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    split_cpu(3)
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=x --xla_force_host_platform_device_count=3"
    split_cpu(5)
    assert os.environ["XLA_FLAGS"].endswith("=3")
