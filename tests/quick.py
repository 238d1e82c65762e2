"""XLA flags that compile quickly, for programs that run once.

Compilation is up to 4 times faster than with the default flags, and the programs run more slowly.
"""

import jax

# Splitting code generation among threads gains nothing while every core runs a test worker.
FAST_COMPILE: dict[str, object] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}
_FLAGS = FAST_COMPILE | {"xla_backend_extra_options": "xla_cpu_disable_new_fusion_emitters"}
FAST_FLAGS = " ".join(f"--{name}={value}" for name, value in _FLAGS.items())  # for XLA_FLAGS
# Before JAX 0.10 there is a separate option for this, which a single program can set too.
if jax.__version_info__ < (0, 10):
    FAST_COMPILE = FAST_COMPILE | {"xla_cpu_use_fusion_emitters": False}
