"""The hyper-parameters of a population between its exchanges, as schedules."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from purejaxppo.metrics import PARENT, SWEPT
from purejaxppo.types import Metrics


class Schedule(NamedTuple):
    """The hyper-parameters of m agents in k intervals, separated by k − 1 exchanges."""

    timesteps: NDArray[Any]  # [k] steps of each agent at the end of each interval
    swept: dict[str, NDArray[Any]]  # [m, k] hyper-parameters in each interval
    # [m, k] index of the agent whose state an agent continues with after the interval; usually its
    # own.
    parent: NDArray[np.integer]

    def of(self, agent: int) -> "Schedule":
        """The schedule [k] that led to the final state of one agent.

        Its ``parent`` is the lineage of that state: the index of the agent that held it in each
        interval.
        """
        lineage = [agent]
        for parents in self.parent[:, -2::-1].T:
            lineage.append(int(parents[lineage[-1]]))
        held_by = np.array(lineage[::-1])
        interval = np.arange(len(held_by))
        swept = {name: x[held_by, interval] for name, x in self.swept.items()}
        return Schedule(self.timesteps, swept, held_by)


def schedule_of(metrics: Metrics, every: int) -> Schedule:
    """The schedule in the metrics [m, iterations] of a population.

    ``every`` is the number of iterations between two exchanges.
    """
    timesteps = np.asarray(metrics.timesteps)
    extra = {name: np.asarray(x) for name, x in metrics.extra.items()}
    count = timesteps.shape[1]
    ends = np.unique([*range(every - 1, count, every), count - 1])
    swept = {
        name.removeprefix(SWEPT): x[:, ends] for name, x in extra.items() if name.startswith(SWEPT)
    }
    del swept[PARENT.removeprefix(SWEPT)]
    return Schedule(timesteps[0, ends], swept, extra[PARENT][:, ends])
