"""The algorithms, each a ``make_update(config, model, optimizer) -> Update`` of one signature."""

from purejaxppo.updates import ppo, reinforce, trpo

UPDATES = {"ppo": ppo.make_update, "trpo": trpo.make_update, "reinforce": reinforce.make_update}
