"""Settings of every test: annotated shapes are checked, and implicit rank promotion is an error."""

import gc
import os
import shutil
import tempfile
from functools import partial

import hypothesis
import jax
import jaxtyping
import pytest
from quick import FAST_FLAGS

jax.config.update("jax_numpy_rank_promotion", "raise")

# Imported before the hook, so that it is not checked: Config's continuous fields are annotated as
# floats, but are tracers inside jit and vmap. (`types`, which it imports, has no array functions.)
import purejaxppo.config  # noqa: E402
import purejaxppo.types  # noqa: E402, F401

jaxtyping.install_import_hook(["purejaxppo"], "beartype.beartype")

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("tests")


def pytest_configure(config):
    """Compiles the fast tests quickly, and all others as users do, but each program only once.

    ``exact`` tests that run together with slow ones are compiled as users do, too. Slow tests
    compile the same programs several times, in several processes, as in every resume; a directory
    that is deleted in the end keeps what was compiled.
    """
    if "not learning" in config.option.markexpr:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS") or FAST_FLAGS
    elif "PYTEST_XDIST_WORKER" not in os.environ:  # the workers inherit the environment
        directory = tempfile.mkdtemp(prefix="purejaxppo-tests-")
        config.add_cleanup(partial(shutil.rmtree, directory, ignore_errors=True))
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": directory,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        }
        jax.config.update("jax_compilation_cache_dir", directory)  # without workers


def pytest_collection_finish():
    """Collects garbage less often.

    Tracing creates many long-lived objects. With the default thresholds, scanning them would take
    an eighth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture
def x64():
    """float64, for comparisons with exact references."""
    with jax.enable_x64(True):
        yield
