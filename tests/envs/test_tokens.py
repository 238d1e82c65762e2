"""Text as an environment: forced prompts, ends, masks and draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentences import sentence_of

from purejaxppo import Config, make_train, make_trainer
from purejaxppo.envs.consistency import require_consistent
from purejaxppo.envs.tokens import tokens
from purejaxppo.envs.vector import vectorize
from purejaxppo.rollout import make_rollout
from purejaxppo.setup import set_up

EOS = 0
V = 5
PROMPTS = [
    [1, 2, 3, -7],
    [4, EOS, 99, 99],
    [2, -1, -1, -1],
]  # padded with numbers that are no tokens
LENGTHS = [3, 2, 1]
NEW = 4
ENV = tokens(PROMPTS, LENGTHS, NEW, EOS, V)
CONFIG = Config(
    algorithm="reinforce",
    num_envs=64,
    num_steps=ENV.max_episode_steps,
    total_episodes=64,
    num_epochs=1,
    num_minibatches=1,
    hidden_sizes=(8,),
)


def played(prompt, actions):
    """The text of an episode, and which of its tokens were chosen, written from the docstring."""
    text = PROMPTS[prompt][: LENGTHS[prompt]]
    chosen = [False] * len(text)
    for action in actions[len(text) - 1 :]:
        text = [*text, action]
        chosen.append(True)
        if action == EOS or sum(chosen) == NEW:
            break
    return text, chosen


def episode(key, actions):
    state, obs = ENV.reset(key)
    text = [int(obs)]
    chosen = [False]
    for action in actions:
        timestep = ENV.step(key, state, jnp.int32(action))
        state = timestep.state
        text.append(int(timestep.obs))
        chosen.append(bool(timestep.mask))
        assert not timestep.truncated and timestep.reward == 0
        if timestep.terminated:
            break
    else:
        raise AssertionError("the episode did not end within its bound")
    return int(state.prompt), text, chosen


@pytest.mark.parametrize("seed", range(12))
def test_an_episode_is_its_prompt_and_the_actions_up_to_its_end(seed):
    actions = np.random.default_rng(seed).integers(0, V, ENV.max_episode_steps).tolist()
    prompt, text, chosen = episode(jax.random.key(seed), actions)
    assert (text, chosen) == played(prompt, actions)


def test_the_bound_is_reached_by_the_longest_prompt_without_an_end():
    assert ENV.max_episode_steps == 3 - 1 + NEW and not ENV.truncates
    lengths = {}
    for seed in range(12):
        prompt, text, _ = episode(jax.random.key(seed), [1] * ENV.max_episode_steps)
        lengths[prompt] = len(text) - 1
    assert lengths == {0: 6, 1: 5, 2: 4}  # prompt 1 contains the end token, which does not end it


def test_the_environment_is_consistent_and_prompts_are_drawn_uniformly():
    require_consistent(ENV)
    state, _ = jax.jit(jax.vmap(ENV.reset))(jax.random.split(jax.random.key(0), 30_000))
    counts = np.bincount(state.prompt, minlength=3)
    assert (np.abs(counts - 10_000) < 5 * np.sqrt(30_000 * 2 / 9)).all()


def test_a_rollout_masks_prompts_and_what_follows_the_end():
    setup = set_up(CONFIG, ENV)
    vector_env = vectorize(ENV, 64, group_size=4)
    rollout = make_rollout(ENV, vector_env, setup.model, ENV.max_episode_steps, whole_episodes=True)
    state = vector_env.reset(jax.random.key(1))
    params = setup.model.init(jax.random.key(2), state.obs)
    transitions, state, _, _ = jax.jit(rollout)(jax.random.key(3), params, None, state, ())
    first = np.asarray(transitions.obs[0])
    assert (first.reshape(16, 4) == first.reshape(16, 4)[:, :1]).all()  # groups share the prompt
    for row in range(64):
        prompt = [1, 4, 2].index(first[row])
        text, chosen = played(prompt, transitions.action[:, row].tolist())
        steps = len(text) - 1
        assert transitions.obs[:steps, row].tolist() == text[:-1]
        assert transitions.mask[:, row].tolist() == chosen[1:] + [False] * (6 - steps)
        assert transitions.valid[:, row].tolist() == [True] * steps + [False] * (6 - steps)


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
def test_a_reward_of_text_is_learnt(algorithm):
    """The score is the number of chosen tokens 3, at most `NEW`; it starts at about 0.7."""

    def score(transitions, config, frozen):
        return 1.0 * (transitions.mask & (transitions.action == 3))

    config = CONFIG.replace(
        algorithm=algorithm, episodic=True, total_episodes=64 * 60, lr=0.03, gamma=1.0
    )
    train = jax.jit(make_train(config, ENV, reward_fn=score))
    state = train(jax.random.key(0)).state
    trainer = make_trainer(config, ENV, reward_fn=score)
    timesteps = state.timesteps
    state, metrics = jax.jit(trainer.step)(state)
    assert (state.timesteps - timesteps) / 64 > NEW - 0.3  # episodes rarely end early
    assert metrics.entropy < 0.4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompts": [1, 2]}, "prompts must be an array [n, L]"),
        ({"prompts": [[1.0, 2.0]], "lengths": [1]}, "the type float64"),
        ({"prompts": np.zeros((0, 3), int), "lengths": []}, "at least one prompt"),
        ({"lengths": [3, 2]}, "one integer for each of 3 prompts"),
        ({"lengths": [3, 0, 1]}, "prompt 1 has the length 0: it must be 1 … 4"),
        ({"lengths": [3, 2, 5]}, "prompt 2 has the length 5: it must be 1 … 4"),
        ({"lengths": [3, 3, 1]}, "prompt 1 has the token 99, which is not in the vocabulary of 5"),
        ({"eos": 5}, "eos = 5: it must be a token, an integer of 0 … 4"),
        ({"eos": True}, "eos = True"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: it must be an integer of at least 1"),
        ({"vocab_size": 0}, "vocab_size = 0: it must be an integer of at least 1"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(changes, sentence):
    arguments = {
        "prompts": PROMPTS,
        "lengths": LENGTHS,
        "max_new_tokens": NEW,
        "eos": EOS,
        "vocab_size": V,
    }
    assert sentence in sentence_of(lambda: tokens(**arguments | changes))
