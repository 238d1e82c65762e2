"""`fit` and `sweep` compile each program once per test file and run one iteration per chunk."""

import contextlib
import types

import jax
import pytest

from purejaxppo.runs import chunks, evaluation, job, programs
from purejaxppo.sweeps import portions


class CompiledOnce:
    """Replaces `compile_programs` and `make_evaluate`; caches results and records requests."""

    def __init__(self):
        self.programs = {}
        self.evaluations = {}
        self.asked = []
        self._compile = programs.compile_programs
        self._evaluate = evaluation.make_evaluate

    def compile_programs(self, job, agents, swept=(), *, devices=None, shapes=None, **rest):
        assert not any(x is not None for x in rest.values())
        (setup,) = job.trainer_of.args
        exchange = job.population.args[2:] if job.population else None
        key = (
            str(setup.config.to_dict()),
            setup.env.name,
            agents,
            tuple(swept),
            id(setup.own_model),
            str(exchange),
            str(devices),
        )
        key += (jax.config.jax_enable_x64,)
        self.asked.append(key)
        if key not in self.programs:
            self.programs[key] = self._compile(job, agents, swept, devices=devices)
        return self.programs[key]

    def make_evaluate(self, setup, programs_, *arguments):
        key = (id(programs_), *arguments)
        if key not in self.evaluations:
            self.evaluations[key] = Evaluation(self._evaluate(setup, programs_, *arguments))
        return self.evaluations[key]


class Evaluation:
    """A jitted function that is lowered and compiled only once."""

    def __init__(self, jitted):
        self.jitted = jitted
        self.compiled = None

    def __call__(self, *arguments):
        return self.jitted(*arguments)

    def lower(self, *arguments):
        self.compiled = self.compiled or self.jitted.lower(*arguments).compile()
        return types.SimpleNamespace(compile=lambda: self.compiled)


@contextlib.contextmanager
def compiled_once():
    """Yields the `CompiledOnce` that replaces both functions in every module."""
    once = CompiledOnce()
    with pytest.MonkeyPatch.context() as patch:
        for module in (job, portions):
            patch.setattr(module, "compile_programs", once.compile_programs)
        for module in (evaluation, portions):
            patch.setattr(module, "make_evaluate", once.make_evaluate)
        patch.setattr(chunks, "CHUNK_SECONDS", 0)
        yield once
