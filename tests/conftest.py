"""What every test runs under: annotated shapes are checked, and no array is broadcast to another rank by accident."""

import gc
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

# Code that is not optimised compiles up to 4 times faster, and most programs of the tests run once. Splitting the code
# generation among threads gains nothing while a worker runs on each core.
FAST_COMPILE: dict[str, object] = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
FAST_FLAGS = FAST_COMPILE | {"xla_backend_extra_options": "xla_cpu_disable_new_fusion_emitters"}
if jax.__version_info__ < (0, 10):  # where the flag has a name of its own, one program can ask for it too
    FAST_COMPILE = FAST_COMPILE | {"xla_cpu_use_fusion_emitters": False}

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("tests")


def pytest_configure(config):
    """The fast tests are compiled quickly; the slow ones, and ``exact`` ones run with them, as users compile them."""
    if "not learning" in config.option.markexpr and not os.environ.get("XLA_FLAGS"):
        os.environ["XLA_FLAGS"] = " ".join(f"--{name}={value}" for name, value in FAST_FLAGS.items())


def pytest_collection_finish():
    """Tracing makes many objects that stay: looking through them at the usual pace takes an eighth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture
def x64():
    """float64, for comparisons with exact references."""
    with jax.enable_x64(True):
        yield
