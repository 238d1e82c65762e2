"""Results of a sweep: tables, statistics over seeds, the best setting, policies and figures."""

import dataclasses
import zipfile
import zlib
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import traverse_util
from numpy.typing import ArrayLike, NDArray

from purejaxppo.analysis import statistics, sweep_plots, tidy
from purejaxppo.analysis.curves import Curve
from purejaxppo.analysis.statistics import Estimate
from purejaxppo.config import Config
from purejaxppo.normalize import Moments, Normalizer
from purejaxppo.policies.policy import Policy
from purejaxppo.runs.disk import atomic_write
from purejaxppo.runs.evaluation import Best
from purejaxppo.sweeps.grid import Setting
from purejaxppo.sweeps.schedules import Schedule
from purejaxppo.trees import as_stored, from_named, named_leaves
from purejaxppo.types import ConfigError, Env, Model, PyTree

MAX_HEAT_MAPS = 10


class SweepPortion(NamedTuple):
    """Members that were trained together."""

    members: NDArray[np.integer]  # [m] their indices
    curve: Curve  # returns during training [m, windows]
    # [m] mean return of the final policy; NaN for a member that diverged
    scores: NDArray[np.floating]
    timesteps: NDArray[np.integer]  # [m] environment steps of each member
    # [m] iteration from which on the loss or the gradient was not finite; 0 for a member that did
    # not diverge
    diverged_at: NDArray[np.integer]
    params: PyTree  # [m, ...] of the final policies
    obs_moments: Moments | None  # [m, ...] of the final policies
    schedule: Schedule | None = None  # of a population


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """Results of a sweep. Member i has setting i // seeds and seed i % seeds."""

    config: Config  # the base configuration, which the settings change
    settings: Sequence[Setting]
    seeds: int
    parts: Sequence[SweepPortion]  # the finished portions: all, unless the sweep was interrupted
    interrupted: bool
    seconds: float  # of training, without compilation and evaluation
    env: Env | None = None  # a custom environment
    model: Model | None = None  # a custom model

    @property
    def fields(self) -> list[str]:
        """The swept fields of `Config`."""
        return list(self.settings[0])

    @cached_property
    def scores(self) -> pd.DataFrame:
        """A row for each member: its setting, ``seed``, ``score``, ``timesteps``, ``diverged_at``.

        ``diverged_at`` is missing (NA) for a member that did not diverge.
        """
        rows = []
        for part in self.parts:
            columns = zip(
                part.members.tolist(), part.scores, part.timesteps, part.diverged_at, strict=True
            )
            for member, score, timesteps, diverged in columns:
                outcome = {
                    "score": score,
                    "timesteps": timesteps,
                    "diverged_at": diverged if diverged else pd.NA,
                }
                rows.append(self._labels(member) | outcome)
        table = pd.DataFrame(
            rows, columns=["member", *self.fields, "seed", "score", "timesteps", "diverged_at"]
        )
        return table.astype({"diverged_at": "Int64"}).sort_values("member", ignore_index=True)

    @cached_property
    def curves(self) -> pd.DataFrame:
        """A row for each member and window of environment steps: the mean ``episode_return``."""
        rows = [
            self._labels(member) | {"timesteps": int(steps), "episode_return": mean}
            for part in self.parts
            for member, returns in zip(part.members.tolist(), part.curve.returns, strict=True)
            for steps, mean in zip(part.curve.timesteps, returns, strict=True)
        ]
        table = pd.DataFrame(
            rows, columns=["member", *self.fields, "seed", "timesteps", "episode_return"]
        )
        return table.sort_values(["member", "timesteps"], ignore_index=True)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """A row for each setting, the best first.

        It has the interquartile mean of the scores with its 95 % bootstrap interval, the median,
        the mean, and the numbers of seeds and of diverged seeds. A diverged seed is left out of the
        statistics, but counts as −∞ in the ranking.
        """
        rows = []
        fields = self._compared_columns
        for setting, table in tidy.best(self.scores, fields, len(self.settings)).items():
            finite = table["score"].dropna().to_numpy(float)
            point, low, high = statistics.estimate(finite) if len(finite) else (np.nan,) * 3
            rows.append(
                dict(zip(fields, setting, strict=True))
                | {"interquartile_mean": point, "low": low, "high": high}
                | {
                    "median": np.median(finite) if len(finite) else np.nan,
                    "mean": table["score"].mean(),
                }
                | {"seeds": len(table), "diverged": int(table["diverged_at"].notna().sum())}
            )
        return pd.DataFrame(rows)

    @property
    def best(self) -> Config:
        """The configuration with the highest interquartile mean of the scores.

        A seed that diverged counts as −∞.
        """
        if not self.parts:
            raise ConfigError("no member was trained to the end, because the sweep was interrupted")
        (rows,) = tidy.best(self.scores, self._compared_columns, 1).values()
        return self.config_of(int(rows["member"].iloc[0]))

    def config_of(self, member: int) -> Config:
        """The configuration of one member."""
        return self.config.replace(**self.settings[self._check_member(member) // self.seeds])

    def policy(self, member: int) -> Policy:
        """The final policy of one member, by its index in the tables."""
        self._check_member(member)
        for part in self.parts:
            for row in np.flatnonzero(part.members == member):
                params, moments = jax.tree.map(
                    lambda x, i=row: jnp.asarray(x[i]), (part.params, part.obs_moments)
                )
                state = Best(
                    params, Normalizer(moments, None), jnp.ones((), jnp.int32), jnp.zeros(())
                )
                return Policy.from_state(self.config_of(member), state, None, self.env, self.model)
        raise ConfigError(f"member {member} was not trained, because the sweep was interrupted")

    def probability_of_improvement(self, better: Setting, worse: Setting) -> Estimate:
        """The probability that a seed of ``better`` scores higher than a seed of ``worse``.

        A seed that diverged scores −∞.
        """
        return statistics.probability_of_improvement(
            self._scores_of(better), self._scores_of(worse)
        )

    @cached_property
    def schedules(self) -> pd.DataFrame:
        """The hyper-parameter schedules that led to the final states of a population.

        A row for each member and interval between exchanges: ``timesteps`` at its end, ``held_by``,
        the member that held the state in it, and the swept fields.
        """
        found = [part.schedule for part in self.parts if part.schedule is not None]
        if not found:
            raise ConfigError(
                "only a population that was trained to the end has schedules: "
                "sweep(..., exchange=Exchange(every=…))"
            )
        swept = {name: x.astype(float) for name, x in found[0].swept.items()}
        timesteps = found[0].timesteps.astype(int)
        lineages = [
            found[0]._replace(swept=swept, timesteps=timesteps).of(member)
            for member in range(len(self.settings))
        ]
        rows = [
            {
                "member": member,
                "timesteps": lineage.timesteps,
                "held_by": lineage.parent,
                **lineage.swept,
            }
            for member, lineage in enumerate(lineages)
        ]
        return pd.concat([pd.DataFrame(row) for row in rows], ignore_index=True)

    def performance_profile(self, setting: Setting, thresholds: ArrayLike) -> Estimate:
        """The share of the seeds of a setting that score above each threshold.

        A seed that diverged scores −∞.
        """
        return statistics.performance_profile(self._scores_of(setting), thresholds)

    def figures(self) -> dict[str, Any]:
        """The figures by file name: curves, profiles, a sensitivity for each field, heat maps."""
        figures = {"curves": sweep_plots.plot_curves(self.curves, self.scores)}
        if self.scores["score"].notna().any():
            figures["profiles"] = sweep_plots.plot_profile(self.scores, self.fields)
            figures |= {
                f"sensitivity_{name}": sweep_plots.plot_sensitivity(self.scores, name)
                for name in self.fields
            }
        if self.parts[0].schedule is not None:
            figures["schedules"] = sweep_plots.plot_schedules(self.schedules, self.scores)
        varied = [name for name in self.fields if self.scores[name].map(str).nunique() > 1]
        pairs = [(x, y) for i, x in enumerate(varied) for y in varied[i + 1 :]]
        for x, y in pairs[:MAX_HEAT_MAPS]:
            if (
                len(self.settings)
                >= self.scores[x].map(str).nunique() * self.scores[y].map(str).nunique()
            ):
                figures[f"heat_map_{x}_{y}"] = sweep_plots.plot_heat_map(self.scores, x, y)
        return figures

    @property
    def _compared_columns(self) -> list[str]:
        """The columns that identify a setting. In a population each member is compared alone."""
        population = bool(self.parts) and self.parts[0].schedule is not None
        return ["member", *self.fields] if population else self.fields

    def _labels(self, member: int) -> dict[str, Any]:
        return {
            "member": int(member),
            **self.settings[member // self.seeds],
            "seed": int(member % self.seeds),
        }

    def _check_member(self, member: int) -> int:
        if not 0 <= member < len(self.settings) * self.seeds:
            raise ConfigError(
                f"member = {member}: this sweep has the members "
                f"0 … {len(self.settings) * self.seeds - 1}"
            )
        return member

    def _scores_of(self, setting: Setting) -> NDArray[np.floating]:
        indices = [index for index, x in enumerate(self.settings) if x == dict(setting)]
        if indices:
            rows = (self.scores["member"] // self.seeds).isin(indices)
            return self.scores.loc[rows, "score"].fillna(-np.inf).to_numpy(float)
        raise ConfigError(
            f"{setting!r} is not a setting of this sweep; one is {self.settings[0]!r}"
        )


# -------------------------------------------------------------------------------------------- files


def write_tables(directory: Path, result: SweepResult) -> None:
    """Write the scores, curves and summary, and the schedules of a population, as CSV."""
    tables = {name: getattr(result, name) for name in ("scores", "curves", "summary")}
    if result.parts[0].schedule is not None:
        tables["schedules"] = result.schedules
    for name, table in tables.items():
        atomic_write(directory / f"{name}.csv", partial(table.to_csv, index=False))


def write_figures(directory: Path, result: SweepResult) -> None:
    """Write the figures as PNG."""
    for name, figure in result.figures().items():
        atomic_write(directory / f"{name}.png", partial(figure.savefig, format="png"))


def save_portion(path: Path, portion: SweepPortion) -> None:
    """Write a portion as arrays, named by their paths in the tree."""
    arrays = {name: as_stored(x) for name, x in named_leaves(portion).items()}

    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    atomic_write(path, save)


def load_portion(path: Path, params: PyTree, obs_moments: Moments | None) -> SweepPortion:
    """Read the portion that `save_portion` wrote. The file holds only arrays, no pickled objects.

    ``params`` and ``obs_moments`` are the shapes of one agent: they give the structure and the
    dtypes. Raises `ConfigError` if the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        like = {"params": params, "obs_moments": obs_moments}
        agents = jax.tree.map(
            lambda x, shape: x.astype(shape.dtype), from_named(arrays, like), like
        )
        other_arrays = {name: x for name, x in arrays.items() if name not in named_leaves(like)}
        tree = traverse_util.unflatten_dict(other_arrays, sep="/")
        schedule = Schedule(**tree.pop("schedule")) if "schedule" in tree else None
        return SweepPortion(
            **tree | agents | {"curve": Curve(**tree["curve"]), "schedule": schedule}
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ConfigError(
            f"{path} is damaged: delete it to train its members again ({error})"
        ) from None
