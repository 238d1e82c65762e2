"""Terminal output: nothing is cut off in 80 columns, and an ASCII terminal gets ASCII only."""

import contextlib
import io

import numpy as np
import pytest
from rich.console import Console
from small_envs import linear_model

from purejaxppo import Config, Policy
from purejaxppo.analysis.curves import Curve
from purejaxppo.cli import console as console_module
from purejaxppo.cli import terminal
from purejaxppo.cli.commands import main
from purejaxppo.policies.evaluate import EpisodeStatistics
from purejaxppo.runs.agents import Progress
from purejaxppo.runs.fit import RunPlan
from purejaxppo.sweeps.results import SweepPortion, SweepResult
from purejaxppo.types import Discrete

ENTRIES = [
    ("CartPole-v1", "ppo", "500.0 [499.1, 500.0]", "0.4 (498.0 … 500.0)", "12.1"),
    (
        "CartPole-v1",
        "reinforce/leave_one_out (2 of 8 seeds diverged)",
        "-150.3 [-160.1, -140.2]",
        "9.0 (-160.1 … -140.2)",
        "–",
    ),
    ("MountainCarContinuous-v0", "ppo/adaptive_kl (interrupted)", "–", "–", "–"),
]


class Shown:
    """A console with this width and encoding, and the lines printed to it."""

    def __init__(self, width, encoding="utf-8", is_terminal=True):
        terminal.allow_any_character()
        self.bytes = io.BytesIO()
        file = io.TextIOWrapper(self.bytes, encoding, errors=terminal.HANDLER)
        options = {"highlight": False, "soft_wrap": True, "color_system": None}
        self.console = Console(file=file, width=width, force_terminal=is_terminal, **options)

    @property
    def lines(self):
        self.console.file.flush()
        return self.bytes.getvalue().decode(self.console.encoding).splitlines()

    @property
    def words(self):
        return " ".join(self.lines).replace("│", " ").replace("|", " ").split()


def comparison():
    names = [
        "environment",
        "algorithm",
        "final return [95 %]",
        "spread (worst … best)",
        "largest fall",
    ]
    return [
        dict(zip(names, x, strict=True)) | {"steps": "10,000,000", "steps/s": "1,234,567"}
        for x in ENTRIES
    ]


def sweep_result(*fields):
    """Two settings with four seeds each; the first seed of each setting diverged."""
    values = {
        "lr": 0.000123,
        "hidden_sizes": (256, 256),
        "num_minibatches": 32,
        "normalize_advantage": True,
    }
    settings = [{name: values[name] for name in fields} | {"gae_lambda": x} for x in (0.95, 0.9)]
    scores = np.array([np.nan, -1300.1, -1234.5, -1200.3] * 2)
    diverged = np.array([3, 0, 0, 0] * 2)
    curve = Curve(np.array([8.0]), scores[:, None])
    portion = SweepPortion(
        members=np.arange(8),
        curve=curve,
        scores=scores,
        timesteps=np.full(8, 8),
        diverged_at=diverged,
        params={},
        obs_moments=None,
    )
    return SweepResult(
        config=Config(),
        settings=settings,
        seeds=4,
        parts=[portion],
        interrupted=False,
        seconds=1.0,
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_comparison_fits_into_80_columns_with_every_name_and_number_uncut(encoding):
    shown = Shown(80, encoding)
    console_module.show_comparison(shown.console, comparison())
    assert max(map(len, shown.lines)) <= 80
    joined = " ".join(shown.words)
    for name in (
        "CartPole-v1",
        "MountainCarContinuous-v0",
        "algorithm",
        "reinforce/",
        "leave_one_out",
        "per second",
    ):
        assert name in joined, name
    dots = "…" if encoding == "utf-8" else "..."
    for text in (
        "[499.1, 500.0]",
        "[-160.1, -140.2]",
        f"(498.0 {dots} 500.0)",
        f"(-160.1 {dots} -140.2)",
    ):
        assert text in joined, text
    for word in (
        "500.0",
        "12.1",
        "10,000,000",
        "1,234,567",
        "ppo",
        "adaptive_kl",
        "(interrupted)",
        "diverged)",
    ):
        assert word in shown.words, word


def test_a_comparison_is_one_table_where_there_is_room():
    shown = Shown(200)
    console_module.show_comparison(shown.console, comparison())
    rows = [line for line in shown.lines if line.startswith("│")]
    assert len(rows) == len(ENTRIES) and "environment" in shown.lines[1]
    for row, entry in zip(rows, ENTRIES, strict=True):
        assert all(cell in row for cell in entry)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_sweep_over_many_fields_fits_into_80_columns(encoding):
    shown = Shown(80, encoding)
    console_module.show_sweep(
        shown.console, sweep_result("lr", "hidden_sizes", "num_minibatches", "normalize_advantage")
    )
    assert max(map(len, shown.lines)) <= 80
    for text in (
        "lr=0.000123",
        "hidden_sizes=(256, 256)",
        "num_minibatches=32",
        "normalize_advantage=True",
    ):
        assert sum(text in line for line in shown.lines) == 2, text
    for word in ("gae_lambda=0.95", "gae_lambda=0.9", "diverged"):
        assert word in shown.words, word
    assert sum("[-1300.1, -1200.3]" in line for line in shown.lines) == 2
    shown = Shown(80)
    console_module.show_sweep(shown.console, sweep_result("lr"))
    rows = [line for line in shown.lines if line.startswith("│")]
    assert len(rows) == 2 and all("0.000123" in row and "[-1300.1, -1200.3]" in row for row in rows)


def test_an_evaluation_fits_into_80_columns(monkeypatch):
    """Two agents whose returns are long numbers."""
    statistics = EpisodeStatistics(np.array([-12345.5, -23456.5]), np.array([1000, 1000]))
    monkeypatch.setattr(console_module, "evaluate", lambda *_, **__: statistics)
    monkeypatch.setattr(console_module.envs, "of_config", lambda config: None)
    config = Config(env="MountainCarContinuous-v0")
    policy = Policy(
        config=config,
        params={"w": np.ones(1)},
        obs_moments=None,
        model=linear_model(),
        observation_space=Discrete(2),
        action_space=Discrete(2),
    )
    for encoding, sign in (("utf-8", "±"), ("ascii", "+/-"), ("latin-1", "±")):
        shown = Shown(80, encoding)
        console_module.show_evaluation(shown.console, [policy, policy], 128)
        table = [line for line in shown.lines if line.startswith(("│", "|", "+"))]
        assert len({len(line) for line in table}) == 1 and len(table[0]) <= 80
        joined = " ".join(shown.words)
        assert joined.count(f"-17901.0 {sign} 5555.5") == 4
        assert joined.count("[-17901.0, -17901.0]") == 2


def test_the_plan_and_the_progress_of_a_run_fit_into_80_columns():
    shown = Shown(80)
    episodic = {
        "algorithm": "reinforce",
        "baseline": "leave_one_out",
        "num_envs": 2048,
        "anneal_lr": False,
    }
    plan = RunPlan(
        config=Config(
            env="MountainCarContinuous-v0", num_steps=1000, total_timesteps=50_000_000, **episodic
        ),
        seeds=8,
        memory_bytes=10**9,
        compile_seconds=12.3,
        device="8 × gpu (NVIDIA H100 80GB HBM3) in 2 processes",
    )
    screen = console_module.Screen(shown.console, 2.0)
    screen.on_run_start(plan)
    assert max(map(len, shown.lines)) <= 80
    assert "REINFORCE (leave_one_out)," in " ".join(shown.words)
    with screen.live():
        progress = Progress(
            iterations=12,
            timesteps=25_000_000,
            timesteps_of_all=200_000_000,
            episode_return=-12345.6,
            steps_per_second=123456789.0,
        )
        screen.on_progress(progress)
    assert "50% return -12345.6 123,456,789 steps/s" in " ".join(shown.words)


def test_sentences_are_wrapped_between_words_in_a_terminal_and_not_wrapped_in_a_file():
    text = (
        "The run is in "
        + "/".join(["a-directory"] * 9)
        + ": config.json, metrics.csv, learning_curve.png, policy/"
    )
    shown = Shown(80)
    written = Shown(80, is_terminal=False)
    console_module.say(shown.console, text)
    console_module.say(written.console, text)
    assert written.lines == [text] and len(shown.lines) > 1
    assert [word for line in shown.lines for word in line.split()] == text.split()


# ------------------------------------------------------------------------------------ characters


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "3 x 4 +/- 0.5 (1 ... 2) - lambda -> gamma ? ?"),
        ("latin-1", "3 × 4 ± 0.5 (1 ... 2) - lambda -> gamma ? ?"),
        ("cp437", "3 x 4 ± 0.5 (1 ... 2) - lambda -> gamma ? ?"),
        ("utf-8", "3 × 4 ± 0.5 (1 … 2) – λ → γ ? 語"),
    ],
)
def test_a_character_that_cannot_be_shown_has_a_substitute(encoding, expected):
    """The character before the last is a byte of a file name that is not UTF-8."""
    assert terminal.shown("3 × 4 ± 0.5 (1 … 2) – λ → γ \udcff 語", encoding) == expected


def run(encoding, *arguments):
    """(exit code, stdout, stderr) of a command with streams as PYTHONIOENCODING makes them."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main(arguments)
    return end.value.code, *(stream.buffer.getvalue().decode(encoding) for stream in (out, err))


@pytest.mark.parametrize(
    "command", [[], ["train"], ["sweep"], ["compare"], ["evaluate"], ["render"], ["envs"]]
)
def test_help_is_complete_and_fits_into_80_columns(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, text, _ = run("ascii", *command, "--help")
    assert code == 0 and "usage: purejaxppo" in text
    lines = [line.rstrip() for line in text.splitlines() if not line.startswith("usage:")]
    assert max(map(len, lines)) <= 80
    assert "0, 1, ..." in text or command not in (["train"], ["sweep"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_wrong_input_gives_one_sentence_and_exit_code_2(encoding):
    code, _, text = run(encoding, "evaluate", "no such λ … run")
    message = "no such lambda ... run is not a run: there is no such directory"
    assert code == 2 and text == f"purejaxppo: {message}\n"
