"""Actor-critic networks: encoders, heads, and the distributions over actions that they make."""
