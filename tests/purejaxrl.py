"""The configuration dictionaries of PureJaxRL's scripts, which must run here unchanged."""

# From PureJaxRL's ppo.py and ppo_continuous_action.py; the latter with another environment name.
PPO = {
    "LR": 2.5e-4,
    "NUM_ENVS": 4,
    "NUM_STEPS": 128,
    "TOTAL_TIMESTEPS": 5e5,
    "UPDATE_EPOCHS": 4,
    "NUM_MINIBATCHES": 4,
    "GAMMA": 0.99,
    "GAE_LAMBDA": 0.95,
    "CLIP_EPS": 0.2,
    "ENT_COEF": 0.01,
    "VF_COEF": 0.5,
    "MAX_GRAD_NORM": 0.5,
    "ACTIVATION": "tanh",
    "ENV_NAME": "CartPole-v1",
    "ANNEAL_LR": True,
    "DEBUG": True,
}
PPO_CONTINUOUS = PPO | {
    "LR": 3e-4,
    "NUM_ENVS": 2048,
    "NUM_STEPS": 10,
    "TOTAL_TIMESTEPS": 5e7,
    "NUM_MINIBATCHES": 32,
    "ENT_COEF": 0.0,
    "ENV_NAME": "Pendulum-v1",
    "ANNEAL_LR": False,
    "NORMALIZE_ENV": True,
}
