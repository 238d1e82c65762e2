"""Many runs at once: grids of hyper-parameters, populations, comparisons, and their results."""
