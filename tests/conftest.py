"""What every test runs under: annotated shapes are checked, and no array is broadcast to another rank by accident."""

import gc
import os

import hypothesis
import jax
import jaxtyping
import pytest
from quick import FAST_FLAGS

jax.config.update("jax_numpy_rank_promotion", "raise")

# Imported before the hook, and so not checked: Config's continuous fields are annotated as the floats that a person
# writes, while inside of jit and vmap they are tracers. (`types`, which it imports, has no function on arrays.)
import purejaxppo.config  # noqa: E402
import purejaxppo.types  # noqa: E402, F401

jaxtyping.install_import_hook(["purejaxppo"], "beartype.beartype")

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("tests")


def pytest_configure(config):
    """The fast tests are compiled quickly; the slow ones, and ``exact`` ones run with them, as users compile them."""
    if "not learning" in config.option.markexpr and not os.environ.get("XLA_FLAGS"):
        os.environ["XLA_FLAGS"] = FAST_FLAGS


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
