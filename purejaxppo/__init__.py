"""purejaxppo: reinforcement learning as one pure JAX function.

    from purejaxppo import Config, make_train
    result = jax.jit(make_train(Config(env="CartPole-v1")))(jax.random.key(0))

The public names are imported when they are first used, so that ``import purejaxppo`` itself costs nothing. (For
that no module may have the name of a function in it: importing ``purejaxppo.x`` puts the module into ``purejaxppo.x``.)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from purejaxppo import envs as envs
    from purejaxppo.comparison import compare as compare
    from purejaxppo.config import Config as Config
    from purejaxppo.evaluation import EpisodeStatistics as EpisodeStatistics
    from purejaxppo.evaluation import evaluate as evaluate
    from purejaxppo.fitting import Run as Run
    from purejaxppo.fitting import fit as fit
    from purejaxppo.grids import LogUniform as LogUniform
    from purejaxppo.grids import Uniform as Uniform
    from purejaxppo.policy import Policy as Policy
    from purejaxppo.policy import load_policy as load_policy
    from purejaxppo.policy import save_policy as save_policy
    from purejaxppo.population import Exchange as Exchange
    from purejaxppo.processes import connect as connect
    from purejaxppo.sweep_results import SweepResult as SweepResult
    from purejaxppo.sweeping import sweep as sweep
    from purejaxppo.train import make_train as make_train
    from purejaxppo.train import make_trainer as make_trainer
    from purejaxppo.types import ConfigError as ConfigError
    from purejaxppo.types import Metrics as Metrics
    from purejaxppo.types import Result as Result
    from purejaxppo.types import Trainer as Trainer
    from purejaxppo.types import TrainState as TrainState
    from purejaxppo.updates import UPDATES as UPDATES

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "ConfigError": "types",
    "EpisodeStatistics": "evaluation",
    "Exchange": "population",
    "Metrics": "types",
    "Policy": "policy",
    "LogUniform": "grids",
    "Result": "types",
    "Run": "fitting",
    "SweepResult": "sweep_results",
    "Trainer": "types",
    "TrainState": "types",
    "UPDATES": "updates",
    "Uniform": "grids",
    "compare": "comparison",
    "connect": "processes",
    "evaluate": "evaluation",
    "fit": "fitting",
    "load_policy": "policy",
    "make_train": "train",
    "make_trainer": "train",
    "save_policy": "policy",
    "sweep": "sweeping",
}
__all__ = ["envs", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name == "envs":
        return import_module("purejaxppo.envs")
    if name not in _HOME:
        raise AttributeError(f"module 'purejaxppo' has no attribute {name!r}")
    value = getattr(import_module(f"purejaxppo.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
