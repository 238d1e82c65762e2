"""Loggers: exact numbers, the same files after kill and resume, and no failure stops a run."""

import csv
import importlib.util
import json
import random
import struct
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from sentences import sentence_of

from purejaxppo.metrics import AGENT_METRICS
from purejaxppo.runs import tables
from purejaxppo.runs.loggers.base import Logger
from purejaxppo.runs.loggers.open import LOGGERS, open_loggers

MEMBERS = ("seed_0", "seed_1", "seed_2")
N = 12  # iterations


def make_table(seed=0, members=3, n=N):
    """Metrics of agents with 8, 9, 10, … steps per iteration.

    No episode of the first agent ends in odd iterations.
    """
    rng = np.random.default_rng(seed)
    iteration = np.tile(np.arange(1, n + 1), (members, 1))
    episodes = rng.integers(1, 5, size=(members, n))
    episodes[0, ::2] = 0
    numbers = rng.normal(size=(4, members, n)) * 10.0 ** rng.integers(-30, 30, size=(4, members, n))
    numbers = numbers.astype(np.float32)
    return {
        "iteration": iteration,
        "timesteps": (iteration * np.arange(8, 8 + members)[:, None]).astype(np.int32),
        "episode_return": np.where(episodes > 0, numbers[0], np.float32(np.nan)),
        "episodes": episodes,
        "policy_loss": numbers[1],
        "approx_kl": numbers[2],
        "bonus, mean": numbers[3],  # from a reward_fn
    }


def part(table, start, stop):
    return {name: x[:, start:stop] for name, x in table.items()}


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(directory, *written, names=(), before=None, members=MEMBERS, description=None):
    logger = open_loggers(names, directory, members, description or {}, AGENT_METRICS, before)
    for kind, table in written:
        logger.write(kind, table)
    logger.close()


# ---------------------------------------------------------------------------------------------- csv


def test_every_number_is_read_back_exactly(tmp_path):
    table = make_table() | {
        "exact": np.random.default_rng(1).normal(size=(3, N)),
        "done": np.arange(3 * N).reshape(3, N) % 2 == 0,
    }
    table["policy_loss"][1, 4:7] = np.inf, -np.inf, np.nan
    write(tmp_path, ("metrics", table))
    rows = rows_of(tmp_path / "metrics.csv")
    assert list(rows[0]) == ["seed", *table]
    assert [(int(row["iteration"]), int(row["seed"])) for row in rows] == [
        (k, s) for k in range(1, N + 1) for s in range(3)
    ]
    for name, x in table.items():
        written = (
            np.array([x.dtype.type(float(row[name] or "nan")) for row in rows]).reshape(N, 3).T
        )
        np.testing.assert_array_equal(written, x, err_msg=name)
    assert {row["episode_return"] for row in rows if row["episodes"] == "0"} == {""}
    assert not (tmp_path / "evaluations.csv").exists()


def test_any_float32_is_read_back_exactly():
    x = (
        np.random.default_rng(2)
        .integers(0, 2**32, size=4000, dtype=np.uint64)
        .astype(np.uint32)
        .view(np.float32)
    )
    x = np.concatenate(
        [x[np.isfinite(x)], np.float32([0, -0.0, 1e-45, 3.4028235e38, 0.1, 16777217])]
    )[None]
    row = np.arange(x.size)[None]
    text = "".join(tables.lines(AGENT_METRICS, {"iteration": row, "timesteps": row, "x": x}, [0]))
    back = (
        np.array([line.split(",")[-1] for line in text.splitlines()])
        .astype(float)
        .astype(np.float32)
    )
    np.testing.assert_array_equal(back.view(np.uint32), x[0].view(np.uint32))


def test_rows_that_are_not_valid_are_omitted(tmp_path):
    table = make_table()
    table["valid"] = np.arange(N) < np.array([[N], [5], [0]])
    write(tmp_path, ("metrics", table))
    rows = rows_of(tmp_path / "metrics.csv")
    expected = [(k, s) for k in range(1, N + 1) for s, end in enumerate((N, 5, 0)) if k <= end]
    assert [(int(row["iteration"]), int(row["seed"])) for row in rows] == expected
    assert "valid" not in rows[0]


def test_the_file_does_not_depend_on_the_chunks_that_were_appended(tmp_path, monkeypatch):
    table = make_table()
    for name in ("whole", "chunks", "blocks"):
        (tmp_path / name).mkdir()
    write(tmp_path / "whole", ("metrics", table), ("evaluation", part(table, 0, 2)))
    chunks = [part(table, *ends) for ends in ((0, 1), (1, 1), (1, 7), (7, N))]
    write(
        tmp_path / "chunks",
        ("metrics", chunks[0]),
        ("evaluation", part(table, 0, 2)),
        *(("metrics", c) for c in chunks[1:]),
    )
    monkeypatch.setattr(tables, "BLOCK_ROWS", 7)
    write(tmp_path / "blocks", ("metrics", table), ("evaluation", part(table, 0, 2)))
    for name in ("metrics.csv", "evaluations.csv"):
        texts = {(tmp_path / run / name).read_bytes() for run in ("whole", "chunks", "blocks")}
        assert len(texts) == 1
        assert texts.pop().count(b"\n") == (1 + 3 * N if name == "metrics.csv" else 7)


def test_written_rows_can_be_read_immediately(tmp_path):
    logger = open_loggers((), tmp_path, MEMBERS, {}, AGENT_METRICS)
    for stop in (1, 2):
        logger.write("metrics", part(make_table(), stop - 1, stop))
        assert len(rows_of(tmp_path / "metrics.csv")) == 3 * stop
    logger.close()


@pytest.mark.parametrize("seed", range(8))
def test_a_killed_and_resumed_run_has_the_file_of_an_uninterrupted_run(seed, tmp_path):
    """The file is truncated at a random byte, and the run resumes from an earlier iteration."""
    rng = random.Random(seed)
    table = make_table(seed)
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole", ("metrics", table), ("evaluation", part(table, 0, 1)))
    whole = tmp_path / "whole" / "metrics.csv"
    killed = tmp_path / "metrics.csv"
    write(tmp_path, ("metrics", part(table, 0, 9)), ("evaluation", part(table, 0, 3)))
    kept = rng.randint(0, 9)
    killed.write_bytes(killed.read_bytes()[: rng.randint(0, killed.stat().st_size)])
    before = {"metrics": part(table, 0, kept), "evaluation": part(table, 0, min(kept, 1))}
    after = [("metrics", part(table, kept, N))] + [("evaluation", part(table, 0, 1))] * (kept == 0)
    write(tmp_path, *after, before=before)
    assert killed.read_bytes() == whole.read_bytes()
    assert (tmp_path / "evaluations.csv").read_bytes() == (
        tmp_path / "whole" / "evaluations.csv"
    ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evaluations.csv",
        "metrics.csv",
        "whole",
    ]


def test_resuming_from_nothing_deletes_all_rows(tmp_path):
    write(tmp_path, ("metrics", make_table()), ("evaluation", make_table()))
    write(tmp_path, before={})
    assert list(tmp_path.iterdir()) == []


def test_a_run_never_overwrites(tmp_path):
    write(tmp_path, ("metrics", make_table()))
    text = (tmp_path / "metrics.csv").read_bytes()
    with pytest.warns(UserWarning, match="logger 'csv' failed .* FileExistsError"):
        write(tmp_path, ("metrics", make_table(1)))
    assert (tmp_path / "metrics.csv").read_bytes() == text


def test_other_columns_are_not_written_under_the_wrong_names(tmp_path):
    with pytest.warns(UserWarning, match=r"metrics\.csv has the columns .* but now .* came"):
        write(
            tmp_path,
            ("metrics", make_table()),
            ("metrics", make_table() | {"new": np.zeros((3, N))}),
        )
    assert len(rows_of(tmp_path / "metrics.csv")) == 3 * N


# ------------------------------------------------------------------------------------- tensorboard

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboardX") is None, reason="tensorboardX is an extra"
)


def events_of(path):
    """The events of a file; its format is length, checksum of the length, data, checksum."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def masked(data):
        crc = crc32c(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32

    assert crc32c(b"123456789") == 0xE3069283
    data = path.read_bytes()
    events = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        (length_checksum,) = struct.unpack("<I", data[8:12])
        body = data[12 : 12 + length]
        (body_checksum,) = struct.unpack("<I", data[12 + length : 16 + length])
        assert (length_checksum, body_checksum) == (masked(data[:8]), masked(body))
        events.append(Event.FromString(body))
        data = data[16 + length :]
    return events


def streams_of(directory):
    """The curves that TensorBoard shows, {member: {tag: {step: value}}}.

    A restart deletes the values from its step onwards.
    """
    streams = {}
    for folder in sorted((directory / "tensorboard").iterdir()):
        curves = streams[folder.name] = {}
        for path in sorted(folder.iterdir()):
            start, *events = events_of(path)
            assert start.file_version == "brain.Event:2" and "tfevents" in path.name
            for event in events:
                if event.HasField("session_log"):
                    assert event.session_log.status == event.session_log.START
                    for tag, curve in curves.items():
                        curves[tag] = {step: x for step, x in curve.items() if step < event.step}
                for value in event.summary.value:
                    curve = curves.setdefault(value.tag, {})
                    assert event.step not in curve and abs(event.wall_time - time.time()) < 600
                    curve[event.step] = value.simple_value
    return streams


TAGS = {
    "train/episode_return": "episode_return",
    "train/episodes": "episodes",
    "loss/policy_loss": "policy_loss",
    "update/approx_kl": "approx_kl",
    "extra/bonus, mean": "bonus, mean",
}


def expected_stream(table, member):
    """Steps and values of a member, by hand, without NaN."""
    steps = (8 + member) * np.arange(1, N + 1)
    return {
        tag: {
            int(step): float(x)
            for step, x in zip(steps, table[name][member], strict=True)
            if not np.isnan(x)
        }
        for tag, name in TAGS.items()
    }


@needs_tensorboard
def test_tensorboard_has_a_stream_per_member(tmp_path):
    table = make_table()
    evaluation = {name: table[name][:, 3:4] for name in ("iteration", "timesteps")} | {
        "return_mean": np.float32([[1], [2], [3]])
    }
    written = (
        ("metrics", part(table, 0, 4)),
        ("evaluation", evaluation),
        ("metrics", part(table, 4, N)),
    )
    write(tmp_path, *written, names=["tensorboard"])
    streams = streams_of(tmp_path)
    assert list(streams) == list(MEMBERS)
    for i, member in enumerate(MEMBERS):
        assert streams[member] == expected_stream(table, i) | {
            "evaluation/return_mean": {4 * (8 + i): i + 1}
        }
    assert len(streams["seed_0"]["train/episode_return"]) == N / 2
    assert len(rows_of(tmp_path / "metrics.csv")) == 3 * N


@needs_tensorboard
@pytest.mark.parametrize("kept", [0, 3])
def test_tensorboard_deletes_the_values_that_a_resumed_run_repeats(kept, tmp_path):
    table = make_table(0)
    lost = make_table(1)
    write(
        tmp_path,
        ("metrics", part(table, 0, 3)),
        ("metrics", part(lost, 3, 7)),
        names=["tensorboard"],
    )
    old = sorted((tmp_path / "tensorboard" / "seed_1").iterdir())[0]
    size = old.stat().st_size
    before = {"metrics": part(table, 0, kept)}
    write(tmp_path, ("metrics", part(table, kept, N)), names=["tensorboard"], before=before)
    assert old.stat().st_size == size and len(list(old.parent.iterdir())) == 2
    streams = streams_of(tmp_path)
    for i, member in enumerate(MEMBERS):
        assert {tag: curve for tag, curve in streams[member].items()} == expected_stream(table, i)


@needs_tensorboard
def test_tensorboard_takes_at_most_a_hundred_agents(tmp_path):
    """Each agent keeps a file open until the end; afterwards all files are closed."""
    members = [f"seed_{i}" for i in range(100)]
    before = len(list(Path("/proc/self/fd").iterdir()))
    write(
        tmp_path, ("metrics", make_table(members=100, n=1)), names=["tensorboard"], members=members
    )
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    streams = streams_of(tmp_path)
    assert len(streams) == 100 and list(streams["seed_99"]["loss/policy_loss"]) == [107]
    message = sentence_of(
        lambda: open_loggers(["tensorboard"], tmp_path, [*members, "one more"], {}, AGENT_METRICS)
    )
    assert message.startswith(
        "logger 'tensorboard' opens a stream for each member, 100 at most, and there are 101: use"
    )


@needs_tensorboard
def test_a_full_disk_stops_tensorboard_and_not_the_run(tmp_path, monkeypatch):
    from tensorboardX.record_writer import RecordWriter

    def full(writer, data):
        raise OSError(28, "No space left on device")

    logger = open_loggers(["tensorboard"], tmp_path, MEMBERS, {}, AGENT_METRICS)
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.warns(UserWarning, match="logger 'tensorboard' failed .* No space left on device"):
        logger.write("metrics", part(make_table(), 0, 1))
    for k in range(1, N):
        logger.write("metrics", part(make_table(), k, k + 1))
    logger.close()
    assert len(rows_of(tmp_path / "metrics.csv")) == 3 * N


# -------------------------------------------------------------------------------------------- wandb


class FakeWandb(types.ModuleType):
    """The part of W&B that is used: runs by id, each with its steps from earlier sessions."""

    def __init__(self):
        super().__init__("wandb")
        self.opened = []
        self.finished = []
        self.logged = {}

    def init(self, **settings):
        self.opened.append(settings)
        history = self.logged.setdefault(settings["id"], {})

        def log(values, step):
            assert step >= max(history, default=0), "W&B drops steps that go back"
            history.setdefault(step, {}).update(values)

        return types.SimpleNamespace(
            log=log,
            finish=lambda: self.finished.append(settings["id"]),
            starting_step=max(history, default=-1) + 1,
        )


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb_has_a_run_per_member_in_one_group(wandb, tmp_path, monkeypatch):
    write(tmp_path, names=["wandb"], description={"config": {"lr": 1e-3}, "seeds": 3})
    ids = [run["id"] for run in wandb.opened]
    names = [run["name"] for run in wandb.opened]
    assert len(set(ids)) == 3 and names == [f"{tmp_path.name}-{member}" for member in MEMBERS]
    assert len({run["group"] for run in wandb.opened}) == 1
    assert sorted(wandb.finished) == ids
    for run in wandb.opened:
        assert run["config"] == {"config": {"lr": 1e-3}, "seeds": 3} and run["dir"] == tmp_path
        assert (run["project"], run["resume"], run["reinit"]) == (
            "purejaxppo",
            "allow",
            "create_new",
        )
        assert "mode" not in run  # a mode would override WANDB_MODE
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    write(tmp_path, names=["wandb"], before={})
    assert [run["id"] for run in wandb.opened[3:]] == ids and wandb.opened[3]["project"] == "mine"
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", names=["wandb"])
    assert not {run["id"] for run in wandb.opened[6:]} & set(ids)


def test_wandb_gets_the_means_over_each_write(wandb, tmp_path):
    table = {
        "iteration": np.array([[1, 2, 3]] * 2),
        "timesteps": np.array([[10, 20, 30], [7, 14, 21]]),
        "episode_return": np.array([[1, 4, np.nan], [np.nan, np.nan, np.nan]]),
        "episodes": np.array([[3, 1, 0], [0, 0, 0]]),
        "value_loss": np.array([[1, 2, 6], [np.inf, 1, np.inf]]),
        "valid": np.array([[True, True, True], [True, True, False]]),
    }
    evaluation = {
        "iteration": np.array([[3], [2]]),
        "timesteps": np.array([[30], [14]]),
        "return_mean": np.array([[5], [6]]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(
            tmp_path,
            ("metrics", table),
            ("evaluation", evaluation),
            names=["wandb"],
            members=MEMBERS[:2],
        )
    first, second = (wandb.logged[run["id"]] for run in wandb.opened)
    assert first == {
        30: {
            "train/episode_return": 7 / 4,
            "train/episodes": 4 / 3,
            "loss/value_loss": 3,
            "evaluation/return_mean": 5,
        }
    }
    assert second == {
        14: {"train/episodes": 0, "loss/value_loss": np.inf, "evaluation/return_mean": 6}
    }


def test_a_resumed_wandb_run_continues_without_duplicates(wandb, tmp_path):
    """W&B has 5 iterations of the killed run already; the resumed run repeats the last two."""
    table = make_table()
    for k in range(5):
        write(
            tmp_path,
            ("metrics", part(table, k, k + 1)),
            names=["wandb"],
            before={"metrics": part(table, 0, k)},
        )
    write(
        tmp_path,
        *(("metrics", part(table, k, k + 1)) for k in range(3, N)),
        names=["wandb"],
        before={"metrics": part(table, 0, 3)},
    )
    assert [list(history) for history in wandb.logged.values()] == [
        [(8 + i) * k for k in range(1, N + 1)] for i in range(3)
    ]
    for i, history in enumerate(wandb.logged.values()):
        written = {
            tag: {step: row[tag] for step, row in history.items() if tag in row} for tag in TAGS
        }
        assert written == expected_stream(table, i)


def test_open_wandb_runs_are_finished_when_another_cannot_be_opened(wandb, tmp_path, monkeypatch):
    def init(**settings):
        if len(wandb.opened) == 2:
            raise OSError("no network")
        return FakeWandb.init(wandb, **settings)

    monkeypatch.setattr(wandb, "init", init)
    with pytest.warns(
        UserWarning, match="logger 'wandb' failed and is left out from now on: OSError: no network"
    ):
        write(tmp_path, ("metrics", make_table()), names=["wandb"])
    assert len(wandb.finished) == 2 and not any(wandb.logged.values())
    assert len(rows_of(tmp_path / "metrics.csv")) == 3 * N


@pytest.mark.usefixtures("wandb")
def test_wandb_refuses_thousands_of_agents(tmp_path):
    message = sentence_of(
        lambda: open_loggers(["wandb"], tmp_path, [str(i) for i in range(2048)], {}, AGENT_METRICS)
    )
    assert message.startswith(
        "logger 'wandb' opens a stream for each member, 100 at most, and there are 2048: use"
    )
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- failures and mistakes


def test_a_failing_logger_gives_one_warning_and_the_others_continue(wandb, tmp_path, monkeypatch):
    attempts = []

    def fail(directory, *arguments, numbered):
        return Logger(
            lambda kind, table: attempts.append(kind) or 1 / 0,
            lambda: attempts.append("close") or 1 / 0,
        )

    monkeypatch.setitem(LOGGERS, "csv", fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write(
            tmp_path,
            *[("metrics", part(make_table(), k, k + 1)) for k in range(N)],
            names=["wandb"],
        )
    expected = (
        "logger 'csv' failed and is left out from now on: ZeroDivisionError: division by zero"
    )
    assert [str(warning.message) for warning in caught] == [expected]
    assert attempts == ["metrics", "close"]
    assert [len(history) for history in wandb.logged.values()] == [N, N, N]
    assert len(wandb.finished) == 3


def test_a_full_disk_does_not_stop_a_run(wandb, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    write(tmp_path, ("metrics", part(make_table(), 0, 2)))
    text = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / ".metrics.csv.part").symlink_to("/dev/full")
    before = {"metrics": part(make_table(), 0, 1)}
    with pytest.warns(UserWarning, match="logger 'csv' failed .* No space left on device"):
        write(tmp_path, ("metrics", part(make_table(), 1, N)), names=["wandb"], before=before)
    assert (
        tmp_path / "metrics.csv"
    ).read_bytes() == text  # it is rewritten completely or not at all
    assert [len(history) for history in wandb.logged.values()] == [1, 1, 1]


def test_ctrl_c_is_not_swallowed(tmp_path, monkeypatch):
    def interrupt(kind, table):
        raise KeyboardInterrupt

    monkeypatch.setitem(
        LOGGERS, "csv", lambda *arguments, numbered: Logger(interrupt, lambda: None)
    )
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, ("metrics", make_table()))


def test_wrong_names_give_one_sentence(tmp_path):
    for directory in (tmp_path, None):
        message = sentence_of(
            lambda directory=directory: open_loggers(
                ["tensorbord"], directory, MEMBERS, {}, AGENT_METRICS
            )
        )
        assert message == "logger 'tensorbord' is not known; did you mean 'tensorboard'?"
    message = sentence_of(lambda: open_loggers(["xyzzy"], tmp_path, MEMBERS, {}, AGENT_METRICS))
    assert message == "logger 'xyzzy' is not known; there are csv, tensorboard, wandb"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_gives_one_sentence(name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = sentence_of(lambda: open_loggers([name], tmp_path, MEMBERS, {}, AGENT_METRICS))
    expected = f"logger {name!r} needs the package {package}: pip install 'purejaxppo[{name}]'"
    assert message == expected
    assert list(tmp_path.iterdir()) == []


def test_the_error_for_a_broken_package_has_its_cause(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("import purejaxppo_has_no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    message = sentence_of(lambda: open_loggers(["wandb"], tmp_path, MEMBERS, {}, AGENT_METRICS))
    assert message.startswith(
        "logger 'wandb' cannot import the package wandb: "
        "ModuleNotFoundError: No module named 'purej"
    )


def test_without_a_directory_nothing_is_written_and_loggers_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(None, ("metrics", make_table()))
    assert list(tmp_path.iterdir()) == []
    for name in LOGGERS:
        message = sentence_of(
            lambda name=name: open_loggers([name], None, MEMBERS, {}, AGENT_METRICS)
        )
        assert message == f"logger {name!r} needs a place to write to: give the run a directory"


def test_importing_the_loggers_imports_none_of_their_packages():
    code = (
        "import sys, purejaxppo.runs.loggers.open as _; "
        "print({'pandas', 'wandb', 'tensorboardX'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_id_of_a_wandb_run_is_kept_in_its_directory(wandb, tmp_path):
    write(tmp_path, names=["wandb"])
    shared = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert [run["id"] for run in wandb.opened] == [f"{shared}-{i}" for i in range(3)]
    assert len(shared) == 8
