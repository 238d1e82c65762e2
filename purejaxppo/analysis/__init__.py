"""Statistics over seeds, learning curves and figures."""
