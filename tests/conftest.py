"""What every test runs under: annotated shapes are checked, and no array is broadcast to another rank by accident."""

import hypothesis
import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Imported before the hook, and so not checked: Config's continuous fields are annotated as the floats that a person
# writes, while inside of jit and vmap they are tracers. (`types`, which it imports, has no function on arrays.)
from purejaxppo import config, types  # noqa: E402, F401

jaxtyping.install_import_hook(["purejaxppo"], "beartype.beartype")

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("tests")


@pytest.fixture
def x64():
    """float64, for comparisons with exact references."""
    with jax.enable_x64(True):
        yield
