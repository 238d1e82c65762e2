"""Several processes give the numbers of one process, and all end when one of them dies."""

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
from purejaxppo.shards import devices_per_process

SCRIPT = Path(__file__).with_name("runs_on_processes.py")


def start(directory, count, *runs):
    """Start ``count`` processes of `runs_on_processes.py`."""
    directory.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST_FLAGS}
    command = [sys.executable, SCRIPT, directory]
    started = []
    for index in range(count):
        with (directory / f"output_{index}").open("w") as output:
            numbers = map(str, (index, count, port))
            started.append(
                subprocess.Popen(
                    [*command, *numbers, *runs], env=environment, stdout=output, stderr=output
                )
            )
    return started


def wait_for(directory, started):
    """The exit codes and the outputs of the processes."""
    try:
        codes = [process.wait(timeout=400) for process in started]
    finally:
        for process in started:
            process.kill()
    return codes, [(directory / f"output_{index}").read_text() for index in range(len(started))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The results {(directory, run, process): …}, the directory of two processes, the survivor."""
    root = tmp_path_factory.mktemp("runs")
    same = ("whole", "sweep", "population", "episodes")
    two = start(root / "two", 2, *same, "refused", "full", "stopped", "killed")
    two[1].wait(timeout=400)
    died = time.monotonic()
    codes, outputs = wait_for(root / "two", two)
    seconds = time.monotonic() - died
    survivor = {"codes": codes, "output": outputs[0], "seconds": seconds}
    again = start(root / "two", 2, "resumed")
    one = start(root / "one", 1, *same)
    for directory, started in ((root / "two", again), (root / "one", one)):
        codes, outputs = wait_for(directory, started)
        assert not any(codes), outputs[0][-3000:]
    results = {}
    for path in root.glob("*/*.pkl"):
        name, index = path.stem.split("_")
        results[path.parent.name, name, int(index)] = pickle.loads(path.read_bytes())
    return results, root / "two", survivor


@pytest.mark.learning
@pytest.mark.parametrize("name", ["whole", "sweep", "population", "episodes"])
def test_two_processes_have_the_numbers_of_one(runs, name):
    results, _, _ = runs
    one = results["one", name, 0]
    for index in range(2):
        two = results["two", name, index]
        for kind in ("arrays", "tables"):
            assert len(two[kind]) == len(one[kind]) > 0
            for a, b in zip(two[kind], one[kind], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    assert any(np.nanmax(np.abs(x)) > 0 for x in one["tables"])


@pytest.mark.learning
def test_two_processes_use_the_devices_of_both(runs):
    results, _, _ = runs
    assert results["two", "whole", 1]["device"] == "4 × cpu in 2 processes"
    assert results["one", "whole", 0]["device"] == "2 × cpu"
    assert results["two", "sweep", 0]["parts"] == results["one", "sweep", 0]["parts"] == 2


@pytest.mark.learning
def test_a_signal_to_one_process_stops_both_after_a_checkpoint(runs):
    results, _, _ = runs
    assert [results["two", "stopped", index]["interrupted"] for index in range(2)] == [True, True]
    assert len({len(results["two", "stopped", index]["tables"][0][0]) for index in range(2)}) == 1


@pytest.mark.learning
def test_when_one_process_dies_the_other_ends_with_an_error(runs):
    _, _, survivor = runs
    code, killed_code = survivor["codes"]
    assert killed_code == -signal.SIGKILL and code not in (0, -signal.SIGKILL)
    assert survivor["seconds"] < 60
    message = "ConnectionError: the processes of this run are no longer connected"
    assert message in survivor["output"]


@pytest.mark.learning
def test_a_stopped_and_killed_run_resumes_to_the_same_bits(runs):
    results, directory, _ = runs
    for index in range(2):
        whole = results["two", "whole", index]
        resumed = results["two", "resumed", index]
        assert resumed["resumed_at"] == 5 and not resumed["interrupted"]
        for kind in ("arrays", "tables"):
            for a, b in zip(resumed[kind], whole[kind], strict=True):
                np.testing.assert_array_equal(a, b)
    for name in ("metrics.csv", "evaluations.csv"):
        assert (directory / "run" / name).read_bytes() == (directory / "whole" / name).read_bytes()


@pytest.mark.learning
def test_wrong_input_is_refused_by_both_processes(runs):
    results, directory, _ = runs
    for index in range(2):
        refused = results["two", "refused", index]
        exists, shards, seeds, at_once, different = refused["messages"]
        assert "exists already" in exists and str(directory / "whole") in exists
        assert shards == "num_shards = 1 cannot be divided among 2 processes: take a multiple of 2"
        assert seeds == "seeds = 3 cannot be divided among 2 processes: take a multiple of 2"
        assert at_once == "at_once = 1: each of the 2 processes needs a member"
        assert different == "all processes of a run need the same lr, and they have 0.001, 0.002"
        assert not refused["taken"]


@pytest.mark.learning
def test_both_processes_warn_of_a_full_disk_and_continue(runs):
    results, _, _ = runs
    for index in range(2):
        full = results["two", "full", index]
        whole = results["two", "whole", index]
        assert len(full["warnings"]) == 2
        assert all("no space left" in text for text in full["warnings"])
        assert full["calls"] == (9 if index == 0 else 0)  # process 0 writes
        for a, b in zip(full["tables"], whole["tables"], strict=True):
            np.testing.assert_array_equal(a, b)


# ----------------------------------------------------------------------- devices and connections


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
def test_every_process_contributes_the_same_number_of_devices(own, parts, used):
    assert devices_per_process("agents", parts, own) == used


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "here:1"}, "needs the number of processes"),
        ({"coordinator": "here:1", "num_processes": 2, "process_index": 2}, "process_index = 2"),
        (
            {"coordinator": "here", "num_processes": 2, "process_index": 0},
            "must be HOST:PORT, or auto",
        ),
        (
            {"coordinator": ":80", "num_processes": 2, "process_index": 0},
            "must be HOST:PORT, or auto",
        ),
        ({"num_processes": 2}, "need the address of the first process"),
        ({}, "the processes were not connected"),
    ],
)
def test_wrong_arguments_of_connect_give_one_sentence(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        processes.connect(**arguments)
    assert "\n" not in str(error.value)
