"""What every test runs under: annotated shapes are checked, and no array is broadcast to another rank by accident."""

import os

import hypothesis
import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Imported before the hook, and so not checked: Config's continuous fields are annotated as the floats that a person
# writes, while inside of jit and vmap they are tracers. (`types`, which it imports, has no function on arrays.)
import purejaxppo.config  # noqa: E402
import purejaxppo.types  # noqa: E402, F401

jaxtyping.install_import_hook(["purejaxppo"], "beartype.beartype")

FAST_COMPILE = {"xla_backend_optimization_level": 0}
# Later versions have one emitter only, and die of a flag that they do not know.
if jax.__version_info__ < (0, 10):
    FAST_COMPILE["xla_cpu_use_fusion_emitters"] = False

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("tests")


def pytest_configure(config):
    """The fast tests run hundreds of programs once each: code that is not optimised compiles up to 4 times faster.

    The slow ones, and those marked ``exact`` when run with them, are compiled as users compile them.
    """
    if "not learning" in config.option.markexpr and not os.environ.get("XLA_FLAGS"):
        os.environ["XLA_FLAGS"] = " ".join(f"--{name}={value}" for name, value in FAST_COMPILE.items())


@pytest.fixture
def x64():
    """float64, for comparisons with exact references."""
    with jax.enable_x64(True):
        yield
