"""Statistics over seeds, learning curves, and the figures made of them."""
