"""purejaxppo: reinforcement learning as one pure JAX function, `make_train(config)`."""
