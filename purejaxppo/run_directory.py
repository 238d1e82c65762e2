"""What a run leaves on disk, and reading it back.

config.json          the configuration, seeds, key and versions
metrics.csv          one row per seed and iteration
learning_curve.png   return against environment steps
policy/              the trained policy, or one in policy/seed_0, policy/seed_1, … for several seeds
"""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import purejaxppo
from purejaxppo.policy import Policy, load_policy, save_policy
from purejaxppo.types import ConfigError, Metrics

if TYPE_CHECKING:
    from purejaxppo.fitting import Run


def reserve(directory: str | os.PathLike, described: dict[str, Any], seeds: int, key: Any) -> Path:
    """Make the directory, which must be new, and write ``config.json``: a mistake shows before hours of training."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"{directory} exists already, and a run never overwrites: choose another directory") from None
    except OSError as error:
        raise ConfigError(f"cannot make the run directory {directory}: {error.strerror}") from None
    description = {
        **described,
        "seeds": seeds,
        "key": key if isinstance(key, int) else np.asarray(_key_data(key)).tolist(),
        "purejaxppo": purejaxppo.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    whole(directory / "config.json", lambda path: path.write_text(json.dumps(description, indent=2) + "\n"))
    return directory


def write(directory: str | os.PathLike, run: "Run") -> None:
    """The metrics, the picture and the policies of a run that has ended; each file appears whole or not at all."""
    from purejaxppo.plots import learning_curve

    directory = Path(directory)
    table = metrics_table(run.metrics)
    whole(directory / "metrics.csv", lambda path: table.to_csv(path, index=False))
    title = f"{run.config.algorithm.upper()} on {run.config.env}"
    whole(directory / "learning_curve.png", lambda path: learning_curve(run.metrics, title).savefig(path, format="png"))
    for seed in range(run.seeds):
        save_policy(directory / "policy" / f"seed_{seed}" if run.seeds > 1 else directory / "policy", run.policy(seed))


def load_policies(directory: str | os.PathLike) -> list[Policy]:
    """The policies of a run, by seed; also of a directory that is one policy."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a run: there is no such directory")
    home = directory / "policy" if (directory / "policy").is_dir() else directory
    number = {path: path.name.removeprefix("seed_") for path in home.glob("seed_*")}
    seeds = sorted((path for path in number if number[path].isdecimal()), key=lambda path: int(number[path]))
    return [load_policy(path) for path in seeds or [home]]


def metrics_table(metrics: Metrics) -> Any:
    """A data frame with one row per seed and iteration, from metrics [iterations] or [seeds, iterations]."""
    import pandas as pd

    columns = {name: x for name, x in metrics._asdict().items() if name != "extra"} | dict(metrics.extra)
    columns = {name: np.atleast_2d(np.asarray(x)) for name, x in columns.items()}
    seeds, iterations = columns["timesteps"].shape
    index = {
        "seed": np.repeat(np.arange(seeds), iterations),
        "iteration": np.tile(np.arange(1, iterations + 1), seeds),
    }
    table = pd.DataFrame(index | {name: x.ravel() for name, x in columns.items()})
    steps = np.diff(columns["timesteps"], axis=1, prepend=0)
    return table[((steps > 0) | (columns["episodes"] > 0)).ravel()]  # an agent that was done waited for the others


def whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    write(temporary)
    temporary.replace(path)


def _key_data(key: Any) -> Any:
    return jax.random.key_data(key) if jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key) else key
