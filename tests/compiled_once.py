"""`fit` and `sweep` whose programs are compiled once for all tests of a file, and run an iteration at a time."""

import contextlib
import types

import jax
import pytest

from purejaxppo.runs import chunks, programs, session
from purejaxppo.runs import fit as fitting
from purejaxppo.sweeps import portions as sweep_parts


class CompiledOnce:
    """In the place of `compile_programs` and `make_evaluate`: what was compiled, and which programs were asked for."""

    def __init__(self):
        self.programs = {}
        self.evaluations = {}
        self.asked = []
        self._compile = programs.compile_programs
        self._evaluate = programs.make_evaluate

    def compile_programs(
        self, config, env, agents, swept=(), *, model=None, exchange=None, devices=None, **rest
    ):
        assert not any(x is not None for x in rest.values())
        key = (
            str(config.to_dict()),
            env.name,
            agents,
            tuple(swept),
            id(model),
            str(exchange),
            str(devices),
        )
        key += (jax.config.jax_enable_x64,)
        self.asked.append(key)
        if key not in self.programs:
            more = {"model": model, "exchange": exchange, "devices": devices}
            self.programs[key] = self._compile(config, env, agents, swept, **more)
        return self.programs[key]

    def make_evaluate(self, programs_, *ways):
        key = (id(programs_), *ways)
        if key not in self.evaluations:
            self.evaluations[key] = Evaluation(self._evaluate(programs_, *ways))
        return self.evaluations[key]


class Evaluation:
    """A jitted function that is lowered and compiled once, whoever asks for it."""

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
    """Yields the `CompiledOnce` that stands in everywhere."""
    once = CompiledOnce()
    with pytest.MonkeyPatch.context() as patch:
        for module in (fitting, sweep_parts):
            patch.setattr(module, "compile_programs", once.compile_programs)
        for module in (session, sweep_parts):
            patch.setattr(module, "make_evaluate", once.make_evaluate)
        patch.setattr(chunks, "CHUNK_SECONDS", 0)
        yield once
