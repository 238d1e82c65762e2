"""Our side of `benchmarks.rlhf_speed`: ``python -m benchmarks.rlhf_ppo DIRECTORY``.

It reads the settings and the prompts from the directory, and writes result.json.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from purejaxppo import Config, make_trainer
from purejaxppo.envs.tokens import tokens
from purejaxppo.envs.vector import vectorize
from purejaxppo.rlhf.language_model import language_model, policy_decoder, with_critic
from purejaxppo.rlhf.llama_layout import hugging_face_arrays
from purejaxppo.rlhf.reward_network import reward_model
from purejaxppo.rlhf.sampling import generate
from purejaxppo.rlhf.shaping import kl_shaped
from purejaxppo.rlhf.texts import Texts, completion_log_prob
from purejaxppo.rlhf.transformer import DecoderSizes
from purejaxppo.rollout import make_rollout
from purejaxppo.types import Discrete, Env, PyTree, Trainer
from purejaxppo.version import __version__

Settings = dict[str, Any]
Times = list[list[float]]  # pairs (seconds, CPU seconds)
Call = Callable[[jax.Array], Any]  # of a key


class Weights(NamedTuple):
    """The parameters from which both sides start."""

    policy: PyTree  # and reference
    reward: PyTree  # the value function starts from its decoder


def main(directory: Path) -> None:
    settings = json.loads((directory / "settings.json").read_text())
    weights = make_weights(settings)
    repeats = settings["repeats"]
    result: dict[str, Any] = {
        "times": {
            "generation": timed(generation(settings, weights), repeats),
            "rollout": timed(rollout(settings, weights), repeats),
        },
        "software": f"purejaxppo {__version__}, JAX {jax.__version__}, {os.cpu_count()} threads",
    }
    trained = train(settings, weights)
    result["times"]["iteration"] = trained.pop("iteration")
    result |= trained | same_model_checks(settings, weights)
    (directory / "result.json").write_text(json.dumps(result))


def make_weights(settings: Settings) -> Weights:
    """Random weights of a policy and of a reward model."""
    key_policy, key_reward, key_head = jax.random.split(jax.random.key(0), 3)
    sizes = decoder_sizes(settings)
    policy = language_model(sizes, "none").init(key_policy, jnp.zeros(1, jnp.int32))
    reward = reward_model(sizes).init(key_reward)
    kernel = jax.random.normal(key_head, (sizes.width, 1)) / sizes.width**0.5
    return Weights(policy, reward | {"head": {"params": {"kernel": kernel}}})


def decoder_sizes(settings: Settings) -> DecoderSizes:
    names = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "mlp_width")
    # The last token of a text is scored, so it counts.
    context = settings["longest"] + settings["new_tokens"]
    return DecoderSizes(context=context, **{name: settings[name] for name in names})


def padded(prompts: list[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Prompts [n, L] and their lengths [n]."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    rows = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return rows, lengths


# --------------------------------------------------------------------------------------- measures


def generation(settings: Settings, weights: Weights) -> Call:
    """`generate` for the first prompts. A text that has ended takes as long as one that has not."""
    prompts, lengths = padded(settings["prompts"][: settings["num_texts"]])
    model = language_model(decoder_sizes(settings), "none")
    sizes = {"max_new_tokens": settings["new_tokens"], "eos": 0}
    compiled = jax.jit(partial(generate, model, **sizes))
    arguments = {"prompts": jnp.asarray(prompts), "lengths": jnp.asarray(lengths)}
    return lambda key: compiled(params=weights.policy, key=key, **arguments)


def rollout(settings: Settings, weights: Weights) -> Call:
    """Texts, their log-probabilities and their values, as the trainer collects them."""
    env = endless_texts(settings)
    sizes = decoder_sizes(settings)
    model = language_model(sizes, "own")
    params = with_critic(weights.policy, sizes, "own", weights.reward["decoder"])
    vector_env = vectorize(env, settings["num_texts"])
    assert env.max_episode_steps is not None, "a text has a bound"
    collect = make_rollout(env, vector_env, model, env.max_episode_steps, whole_episodes=True)
    state = jax.jit(vector_env.reset)(jax.random.key(0))

    @jax.jit
    def compiled(key: jax.Array, params: PyTree) -> PyTree:
        carry = model.initial_carry(settings["num_texts"])
        return collect(key, params, None, state, carry)[0]

    return lambda key: compiled(key, params)


def train(settings: Settings, weights: Weights) -> dict[str, Any]:
    """The times of iterations after the first, and how much they did."""
    sizes = decoder_sizes(settings)
    params = with_critic(weights.policy, sizes, "own", weights.reward["decoder"])
    frozen = {"reference": weights.policy, "score": weights.reward}
    trainer = make_ppo(settings)
    state = jax.jit(trainer.init)(jax.random.key(1), params)
    started = time.perf_counter()
    step = jax.jit(trainer.step, donate_argnums=0).lower(state, frozen).compile()
    compile_seconds = time.perf_counter() - started
    stamps = []
    new_tokens = 0.0
    for _ in range(settings["iterations"] + 1):
        state, metrics = jax.block_until_ready(step(state, frozen))
        stamps.append((time.perf_counter(), time.process_time()))
        new_tokens += float(metrics.extra["completion_length"]) * settings["num_texts"]
    counts = [int(count) for _, count in optax.tree.get_all_with_path(state.update, "count")]
    assert len(set(counts)) == 1, "Adam and the learning rate count the same steps"
    return {
        "iteration": np.diff(np.asarray(stamps), axis=0).tolist(),
        "compile_seconds": compile_seconds,
        "new_tokens": new_tokens / len(stamps),  # in an iteration
        "gradient_steps": counts[0] / len(stamps),
    }


def make_ppo(settings: Settings) -> Trainer:
    """PPO with the options of the peer; here the norm of the gradient is clipped too."""
    sizes = decoder_sizes(settings)
    config = Config(
        env="tokens",
        episodic=True,
        total_episodes=settings["num_texts"] * (settings["iterations"] + 1),
        num_envs=settings["num_texts"],
        num_epochs=settings["epochs"],
        num_minibatches=settings["minibatches"],
        lr=settings["lr"],
        adam_eps=settings["adam_eps"],
        max_grad_norm=1.0,
        gamma=1.0,
        gae_lambda=settings["gae_lambda"],
        clip_eps=settings["clip_eps"],
        clip_value=True,
        vf_coef=settings["vf_coef"],
        ref_kl_coef=settings["ref_kl_coef"],
    )
    scorer = reward_model(sizes)
    reward = kl_shaped(
        lambda tokens, lengths, params: scorer.score(params, tokens, lengths),
        language_model(sizes, "none"),
        eos=settings["vocab_size"],
    )
    return make_trainer(config, endless_texts(settings), language_model(sizes, "own"), reward)


def endless_texts(settings: Settings) -> Env:
    """Texts of full length: the end of text is a token that the model does not have."""
    prompts, lengths = padded(settings["prompts"])
    vocab_size = settings["vocab_size"]
    env = tokens(prompts, lengths, settings["new_tokens"], vocab_size, vocab_size + 1)
    return env._replace(observation_space=Discrete(vocab_size), action_space=Discrete(vocab_size))


def timed(call: Call, repeats: int) -> Times:
    """(seconds, CPU seconds) of ``repeats`` calls after a first one."""
    stamps = []
    for key in jax.random.split(jax.random.key(2), repeats + 1):
        jax.block_until_ready(call(key))
        stamps.append((time.perf_counter(), time.process_time()))
    return np.diff(np.asarray(stamps), axis=0).tolist()


# ------------------------------------------------------------------------------- equality of models


def same_model_checks(settings: Settings, weights: Weights) -> dict[str, list[float]]:
    """The log-probabilities and scores of the first prompts, which must equal the peer's."""
    prompts, lengths = padded(settings["prompts"][: settings["checked_texts"]])
    texts = Texts(jnp.asarray(prompts), jnp.asarray(lengths), jnp.ones_like(lengths))
    sizes = decoder_sizes(settings)
    log_prob = completion_log_prob(language_model(sizes, "none"), weights.policy, texts)
    score = reward_model(sizes).score(weights.reward, texts.tokens, texts.length)
    return {"log_prob": log_prob.tolist(), "score": score.tolist()}


def llama_weights(weights: Weights) -> dict[str, NDArray[np.float32]]:
    """The weights under the names of the peer's models."""
    policy = hugging_face_arrays(policy_decoder(weights.policy))
    reward = hugging_face_arrays(weights.reward["decoder"])
    reward["score.weight"] = np.asarray(weights.reward["head"]["params"]["kernel"]).T
    named = {f"policy.{name}": x for name, x in policy.items()}
    return named | {f"reward.{name}": x for name, x in reward.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
