"""purejaxppo: reinforcement learning as one pure JAX function.

    from purejaxppo import Config, make_train
    result = jax.jit(make_train(Config(env="CartPole-v1")))(jax.random.key(0))

Public names are imported on first use, so that ``import purejaxppo`` itself is cheap. No module may
have the name of a public function: importing ``purejaxppo.x`` would replace the function by the
module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from purejaxppo.version import __version__ as __version__

if TYPE_CHECKING:
    import purejaxppo.envs as envs
    from purejaxppo.analysis.plots import learning_curve as learning_curve
    from purejaxppo.config import Config as Config
    from purejaxppo.policies.evaluate import EpisodeStatistics as EpisodeStatistics
    from purejaxppo.policies.evaluate import evaluate as evaluate
    from purejaxppo.policies.files import load_policy as load_policy
    from purejaxppo.policies.files import save_policy as save_policy
    from purejaxppo.policies.policy import Policy as Policy
    from purejaxppo.policies.render import animate as animate
    from purejaxppo.population import Exchange as Exchange
    from purejaxppo.runs.fit import fit as fit
    from purejaxppo.runs.processes import connect as connect
    from purejaxppo.runs.run import Run as Run
    from purejaxppo.sweeps.compare import compare as compare
    from purejaxppo.sweeps.grid import LogUniform as LogUniform
    from purejaxppo.sweeps.grid import Uniform as Uniform
    from purejaxppo.sweeps.results import SweepResult as SweepResult
    from purejaxppo.sweeps.sweep import sweep as sweep
    from purejaxppo.train import make_train as make_train
    from purejaxppo.train import make_trainer as make_trainer
    from purejaxppo.types import ConfigError as ConfigError
    from purejaxppo.types import Metrics as Metrics
    from purejaxppo.types import Result as Result
    from purejaxppo.types import Trainer as Trainer
    from purejaxppo.types import TrainState as TrainState
    from purejaxppo.updates import UPDATES as UPDATES

_MODULES = {
    "Config": "config",
    "ConfigError": "types",
    "EpisodeStatistics": "policies.evaluate",
    "Exchange": "population",
    "Metrics": "types",
    "Policy": "policies.policy",
    "LogUniform": "sweeps.grid",
    "Result": "types",
    "Run": "runs.run",
    "SweepResult": "sweeps.results",
    "Trainer": "types",
    "TrainState": "types",
    "UPDATES": "updates",
    "Uniform": "sweeps.grid",
    "animate": "policies.render",
    "compare": "sweeps.compare",
    "connect": "runs.processes",
    "evaluate": "policies.evaluate",
    "fit": "runs.fit",
    "learning_curve": "analysis.plots",
    "load_policy": "policies.files",
    "make_train": "train",
    "make_trainer": "train",
    "save_policy": "policies.files",
    "sweep": "sweeps.sweep",
}
__all__ = ["envs", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name == "envs":
        return import_module("purejaxppo.envs")
    if name not in _MODULES:
        raise AttributeError(f"module 'purejaxppo' has no attribute {name!r}")
    value = getattr(import_module(f"purejaxppo.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
