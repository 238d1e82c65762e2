"""Schedules of hyper-parameters: what the agents of a population had between its exchanges."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from purejaxppo.metrics import PARENT, SWEPT
from purejaxppo.types import Metrics


class Schedule(NamedTuple):
    """What the m agents of a population had between its k − 1 exchanges."""

    timesteps: NDArray[Any]  # [k] steps of each at the end of every part
    swept: dict[str, NDArray[Any]]  # [m, k] hyper-parameters in it
    parent: NDArray[
        np.integer
    ]  # [m, k] whose state an agent went on with after it; its own number, mostly

    def of(self, agent: int) -> "Schedule":
        """The way to the last state of one agent, [k]: through those whose state it has, and their numbers."""
        lineage = [agent]
        for parents in self.parent[:, -2::-1].T:
            lineage.append(int(parents[lineage[-1]]))
        lineage_array = np.array(lineage[::-1])
        part = np.arange(len(lineage_array))
        return Schedule(
            self.timesteps,
            {name: x[lineage_array, part] for name, x in self.swept.items()},
            lineage_array,
        )


def schedule_of(metrics: Metrics, every: int) -> Schedule:
    """The schedules in the metrics [m, iterations] of a population."""
    timesteps = np.asarray(metrics.timesteps)
    extra = {name: np.asarray(x) for name, x in metrics.extra.items()}
    count = timesteps.shape[1]
    ends = np.unique([*range(every - 1, count, every), count - 1])
    swept = {
        name.removeprefix(SWEPT): x[:, ends] for name, x in extra.items() if name.startswith(SWEPT)
    }
    del swept[PARENT.removeprefix(SWEPT)]
    return Schedule(timesteps[0, ends], swept, extra[PARENT][:, ends])
