"""Results of a sweep: tidy tables, statistics over seeds, the best setting, policies and figures."""

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
from purejaxppo.runs.session import Best
from purejaxppo.sweeps.grid import Setting
from purejaxppo.sweeps.schedules import Schedule
from purejaxppo.trees import as_stored, from_named, named_leaves
from purejaxppo.types import ConfigError, Env, Model, PyTree

MOST_HEAT_MAPS = 10


class SweepPortion(NamedTuple):
    """Members that were trained together."""

    members: NDArray[np.integer]  # [m] their numbers
    curve: Curve  # returns during training [m, windows]
    scores: NDArray[
        np.floating
    ]  # [m] mean return of the final policy; NaN of a member that diverged
    timesteps: NDArray[np.integer]  # [m] that each took
    diverged_at: NDArray[
        np.integer
    ]  # [m] iteration in which loss or gradient were no longer finite; 0: in none
    params: PyTree  # [m, ...] of the final policies
    obs_moments: Moments | None  # likewise
    schedule: Schedule | None = None  # of a population


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The members of a sweep, numbered setting by setting: member i has setting i // seeds and seed i % seeds."""

    config: Config  # of which the settings are changes
    settings: Sequence[Setting]
    seeds: int
    parts: Sequence[SweepPortion]  # all of them, unless it was interrupted
    interrupted: bool
    seconds: float  # of training, without compilation and evaluation
    env: Env | None = None  # of the caller's own, likewise the model
    model: Model | None = None

    @property
    def fields(self) -> list[str]:
        """What was swept."""
        return list(self.settings[0])

    @cached_property
    def scores(self) -> pd.DataFrame:
        """A row for each member: its setting, ``seed``, ``score``, ``timesteps``, and ``diverged_at`` where it did."""
        rows = []
        for part in self.parts:
            columns = zip(
                part.members.tolist(), part.scores, part.timesteps, part.diverged_at, strict=True
            )
            for member, score, timesteps, diverged in columns:
                end = {
                    "score": score,
                    "timesteps": timesteps,
                    "diverged_at": diverged if diverged else pd.NA,
                }
                rows.append(self._named(member) | end)
        table = pd.DataFrame(
            rows, columns=["member", *self.fields, "seed", "score", "timesteps", "diverged_at"]
        )
        return table.astype({"diverged_at": "Int64"}).sort_values("member", ignore_index=True)

    @cached_property
    def curves(self) -> pd.DataFrame:
        """A row for each member and window of environment steps, with the mean ``episode_return`` in it."""
        rows = [
            self._named(member) | {"timesteps": int(steps), "episode_return": mean}
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
        """A row for each setting, the best first: interquartile mean of the scores with its 95 % bootstrap interval,
        median, mean, and how many seeds diverged. A seed that diverged is left out of these, but ranks last."""
        rows = []
        fields = self._compared
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
        """The configuration with the highest interquartile mean of the scores; a seed that diverged counts as −∞."""
        if not self.parts:
            raise ConfigError("no member was trained to its end: the sweep was interrupted before")
        (rows,) = tidy.best(self.scores, self._compared, 1).values()
        return self.config_of(int(rows["member"].iloc[0]))

    def config_of(self, member: int) -> Config:
        """The configuration of one member."""
        return self.config.replace(**self.settings[self._checked(member) // self.seeds])

    def policy(self, member: int) -> Policy:
        """The final policy of one member, by its number in the tables."""
        self._checked(member)
        for part in self.parts:
            for row in np.flatnonzero(part.members == member):
                params, moments = jax.tree.map(
                    lambda x, i=row: jnp.asarray(x[i]), (part.params, part.obs_moments)
                )
                end = Best(
                    params, Normalizer(moments, None), jnp.ones((), jnp.int32), jnp.zeros(())
                )
                return Policy.from_state(self.config_of(member), end, None, self.env, self.model)
        raise ConfigError(f"member {member} was not trained: the sweep was interrupted before")

    def probability_of_improvement(self, better: Setting, worse: Setting) -> Estimate:
        """How probable it is that a seed of the one setting scores higher than one of the other; diverged is lowest."""
        return statistics.probability_of_improvement(
            self._scores_of(better), self._scores_of(worse)
        )

    @cached_property
    def schedules(self) -> pd.DataFrame:
        """Of a population how the hyper-parameters behind each member's final state changed while it was trained.

        A row for each member and part between exchanges: ``timesteps`` at its end, ``held_by``, the member that had the
        state then, and the fields.
        """
        found = [part.schedule for part in self.parts if part.schedule is not None]
        if not found:
            raise ConfigError(
                "this is no population that was trained to its end: sweep(..., exchange=Exchange(every=…))"
            )
        fields = {name: x.astype(float) for name, x in found[0].swept.items()}
        timesteps = found[0].timesteps.astype(int)
        ways = [
            found[0]._replace(swept=fields, timesteps=timesteps).of(member)
            for member in range(len(self.settings))
        ]
        rows = [
            {"member": i, "timesteps": way.timesteps, "held_by": way.parent, **way.swept}
            for i, way in enumerate(ways)
        ]
        return pd.concat([pd.DataFrame(row) for row in rows], ignore_index=True)

    def performance_profile(self, setting: Setting, thresholds: ArrayLike) -> Estimate:
        """For each threshold the share of the setting's seeds that score above it; one that diverged does not."""
        return statistics.performance_profile(self._scores_of(setting), thresholds)

    def figures(self) -> dict[str, Any]:
        """The pictures by the names of their files: curves, profiles, a sensitivity for each field, heat maps."""
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
        for x, y in pairs[:MOST_HEAT_MAPS]:
            if (
                len(self.settings)
                >= self.scores[x].map(str).nunique() * self.scores[y].map(str).nunique()
            ):
                figures[f"heat_map_{x}_{y}"] = sweep_plots.plot_heat_map(self.scores, x, y)
        return figures

    @property
    def _compared(self) -> list[str]:
        """What tells apart what is compared: settings, or the members of a population."""
        population = bool(self.parts) and self.parts[0].schedule is not None
        return ["member", *self.fields] if population else self.fields

    def _named(self, member: int) -> dict[str, Any]:
        return {
            "member": int(member),
            **self.settings[member // self.seeds],
            "seed": int(member % self.seeds),
        }

    def _checked(self, member: int) -> int:
        if not 0 <= member < len(self.settings) * self.seeds:
            raise ConfigError(
                f"member = {member}: this sweep has 0 … {len(self.settings) * self.seeds - 1}"
            )
        return member

    def _scores_of(self, setting: Setting) -> NDArray[np.floating]:
        found = [index for index, known in enumerate(self.settings) if known == dict(setting)]
        if found:
            rows = (self.scores["member"] // self.seeds).isin(found)
            return self.scores.loc[rows, "score"].fillna(-np.inf).to_numpy(float)
        raise ConfigError(
            f"{setting!r} is not a setting of this sweep; one is {self.settings[0]!r}"
        )


# ---------------------------------------------------------------------------------------------- files


def write_tables(directory: Path, result: SweepResult) -> None:
    """``scores.csv``, ``curves.csv``, ``summary.csv``, of a population ``schedules.csv``: each whole or not at all."""
    written = {name: getattr(result, name) for name in ("scores", "curves", "summary")}
    if result.parts[0].schedule is not None:
        written["schedules"] = result.schedules
    for name, table in written.items():
        atomic_write(directory / f"{name}.csv", partial(table.to_csv, index=False))


def write_figures(directory: Path, result: SweepResult) -> None:
    """The pictures, as PNG."""
    for name, figure in result.figures().items():
        atomic_write(directory / f"{name}.png", partial(figure.savefig, format="png"))


def save_portion(path: Path, part: SweepPortion) -> None:
    """Write a part as plain arrays, named by their paths in it."""
    arrays = {name: as_stored(x) for name, x in named_leaves(part).items()}

    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    atomic_write(path, save)


def load_portion(path: Path, params: PyTree, obs_moments: Moments | None) -> SweepPortion:
    """The part that `save_portion` wrote; nothing in the file is run.

    ``params`` and ``obs_moments`` are shapes of the structure and types that the part's own have.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        like = {"params": params, "obs_moments": obs_moments}
        agents = jax.tree.map(
            lambda x, known: x.astype(known.dtype), from_named(arrays, like), like
        )
        others = {name: x for name, x in arrays.items() if name not in named_leaves(like)}
        tree = traverse_util.unflatten_dict(others, sep="/")
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
            f"{path} is damaged: delete it, and these members are trained again ({error})"
        ) from None
