"""Several processes that train together: the same numbers as one, and an end when one of them dies."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from quick import FAST_FLAGS

from purejaxppo import ConfigError
from purejaxppo.runs import processes
from purejaxppo.shards import evenly

SCRIPT = Path(__file__).with_name("runs_on_processes.py")


def start(directory, count, *runs):
    """So many processes of `runs_on_processes.py`."""
    directory.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST_FLAGS}
    command, started = [sys.executable, SCRIPT, directory], []
    for index in range(count):
        with (directory / f"told_{index}").open("w") as told:
            numbers = map(str, (index, count, port))
            started.append(
                subprocess.Popen(
                    [*command, *numbers, *runs], env=environment, stdout=told, stderr=told
                )
            )
    return started


def ends(directory, started):
    """The exit code of each, and what it wrote."""
    try:
        codes = [process.wait(timeout=400) for process in started]
    finally:
        for process in started:
            process.kill()
    return codes, [(directory / f"told_{index}").read_text() for index in range(len(started))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{(processes, run): what each process got}, the directory of two, and how the one that was left alone ended."""
    root = tmp_path_factory.mktemp("runs")
    two = start(
        root / "two", 2, "whole", "sweep", "population", "refused", "full", "stopped", "killed"
    )
    two[1].wait(timeout=400)
    died = time.monotonic()
    (survivor, killed), told = ends(root / "two", two)
    left = {"codes": (survivor, killed), "told": told[0], "seconds": time.monotonic() - died}
    again, one = (
        start(root / "two", 2, "resumed"),
        start(root / "one", 1, "whole", "sweep", "population"),
    )
    for directory, started in ((root / "two", again), (root / "one", one)):
        codes, told = ends(directory, started)
        assert not any(codes), told[0][-3000:]
    found = {}
    for path in root.glob("*/*.pkl"):
        name, index = path.stem.split("_")
        found[path.parent.name, name, int(index)] = pickle.loads(path.read_bytes())
    return found, root / "two", left


@pytest.mark.learning
@pytest.mark.parametrize("name", ["whole", "sweep", "population"])
def test_two_processes_have_the_numbers_of_one(runs, name):
    found, _, _ = runs
    one = found["one", name, 0]
    for index in range(2):
        two = found["two", name, index]
        for kind in ("arrays", "tables"):
            assert len(two[kind]) == len(one[kind]) > 0
            for a, b in zip(two[kind], one[kind], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    assert any(np.nanmax(np.abs(x)) > 0 for x in one["tables"])


@pytest.mark.learning
def test_they_use_the_devices_of_both(runs):
    found, _, _ = runs
    assert found["two", "whole", 1]["device"] == "4 × cpu in 2 processes"
    assert found["one", "whole", 0]["device"] == "2 × cpu"
    assert found["two", "sweep", 0]["parts"] == found["one", "sweep", 0]["parts"] == 2


@pytest.mark.learning
def test_a_signal_to_one_stops_both_after_a_checkpoint(runs):
    found, _, _ = runs
    assert [found["two", "stopped", index]["interrupted"] for index in range(2)] == [True, True]
    assert len({len(found["two", "stopped", index]["tables"][0][0]) for index in range(2)}) == 1


@pytest.mark.learning
def test_when_one_dies_the_other_ends_with_an_error(runs):
    _, _, left = runs
    assert left["codes"][1] == -signal.SIGKILL and left["codes"][0] not in (0, -signal.SIGKILL)
    assert left["seconds"] < 60
    assert (
        "ConnectionError: the processes of this run do not work together any more" in left["told"]
    )


@pytest.mark.learning
def test_what_was_stopped_and_killed_goes_on_to_the_same_bits(runs):
    found, directory, _ = runs
    for index in range(2):
        whole, resumed = found["two", "whole", index], found["two", "resumed", index]
        assert resumed["resumed_at"] == 5 and not resumed["interrupted"]
        for kind in ("arrays", "tables"):
            for a, b in zip(resumed[kind], whole[kind], strict=True):
                np.testing.assert_array_equal(a, b)
    for name in ("metrics.csv", "evaluations.csv"):
        assert (directory / "run" / name).read_bytes() == (directory / "whole" / name).read_bytes()


@pytest.mark.learning
def test_what_is_refused_is_refused_by_both(runs):
    found, directory, _ = runs
    for index in range(2):
        refused = found["two", "refused", index]
        exists, shards, seeds, at_once, different = refused["said"]
        assert "exists already" in exists and str(directory / "whole") in exists
        assert shards == "num_shards = 1 cannot be divided among 2 processes: take a multiple of 2"
        assert seeds == "seeds = 3 cannot be divided among 2 processes: take a multiple of 2"
        assert at_once == "at_once = 1: each of the 2 processes needs a member"
        assert different == "all processes of a run need the same lr, and they have 0.001, 0.002"
        assert not refused["taken"]


@pytest.mark.learning
def test_a_full_disk_is_told_by_both_and_they_go_on(runs):
    found, _, _ = runs
    for index in range(2):
        full, whole = found["two", "full", index], found["two", "whole", index]
        assert len(full["told"]) == 2 and all("no space left" in text for text in full["told"])
        assert full["calls"] == (9 if index == 0 else 0)  # the first process writes
        for a, b in zip(full["tables"], whole["tables"], strict=True):
            np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    ("own", "parts", "used"),
    [
        ([4], 8, 4),
        ([4], 6, 3),
        ([4], 5, 1),
        ([2, 2], 8, 2),
        ([2, 2], 6, 1),
        ([4, 2], 8, 2),
        ([3, 3], 12, 3),
        ([3, 3], 8, 2),
    ],
)
def test_every_process_gives_equally_many_devices(own, parts, used):
    assert evenly("agents", parts, own) == used


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"coordinator": "here:1"}, "a coordinator needs how many there are"),
        ({"coordinator": "here:1", "num_processes": 2, "process_index": 2}, "process_index = 2"),
        (
            {"coordinator": "here", "num_processes": 2, "process_index": 0},
            "must be HOST:PORT, or auto",
        ),
        (
            {"coordinator": ":80", "num_processes": 2, "process_index": 0},
            "must be HOST:PORT, or auto",
        ),
        ({"num_processes": 2}, "need the coordinator's address"),
        ({}, "the processes were not connected"),
    ],
)
def test_wrong_ways_to_connect_are_one_sentence(given, said):
    with pytest.raises(ConfigError, match=said) as error:
        processes.connect(**given)
    assert "\n" not in str(error.value)
