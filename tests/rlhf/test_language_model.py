"""A decoder with a cache equals one teacher-forced pass, whatever the episodes in a rollout are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentences import sentence_of

from purejaxppo import Config, Policy, make_train
from purejaxppo.envs.tokens import tokens
from purejaxppo.networks.temperature import with_temperature
from purejaxppo.rlhf.language_model import language_model
from purejaxppo.rlhf.transformer import DecoderSizes, rotate

SIZES = DecoderSizes(vocab_size=7, context=12, width=16, num_heads=4, num_kv_heads=2, mlp_width=24)
T = 12
B = 5
CRITICS = ["own", "shared", "none"]


def perturbed(params, scale=0.3):
    """Parameters far from their initial values, so that attention is not uniform."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    noisy = [x + scale * jax.random.normal(key, x.shape, x.dtype) for x, key in pairs]
    return jax.tree.unflatten(structure, noisy)


def stepped(model, params, carry, obs, reset):
    def body(carry, inputs):
        carry, distribution, value = model.step(params, carry, *inputs)
        return carry, (distribution.logits, value)

    return jax.lax.scan(body, carry, (obs, reset))


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize(("x64", "tolerance"), [(False, 1e-4), (True, 1e-9)])
def test_steps_with_a_cache_equal_one_pass(critic, x64, tolerance):
    """Resets at any step, and a second rollout that continues the first."""
    with jax.enable_x64(x64):
        model = with_temperature(language_model(SIZES, critic), 0.7)
        key_obs, key_reset, key_params = jax.random.split(jax.random.key(0), 3)
        obs = jax.random.randint(key_obs, (T, B), 0, 7)
        reset = jax.random.bernoulli(key_reset, 0.2, (T, B)).at[0].set(True)
        reset = reset.at[:, 0].set(jnp.arange(T) == 0)  # one text fills the context
        params = perturbed(model.init(key_params, obs[0]))
        run = jax.jit(lambda *x: stepped(model, params, *x))
        unroll = jax.jit(lambda *x: model.unroll(params, *x))
        carry = model.initial_carry(B)
        end, (logits, value) = run(carry, obs, reset)
        distribution, values = unroll(carry, obs, reset)
        np.testing.assert_allclose(distribution.logits, logits, atol=tolerance)
        np.testing.assert_allclose(values, value, atol=tolerance)
        assert np.isfinite(logits).all() and np.ptp(logits) > 1
        assert (np.ptp(value) > 0.1) == (critic != "none")

        half, _ = run(carry, obs[:5], reset[:5])
        distribution, values = unroll(half, obs[5:], reset[5:])
        np.testing.assert_allclose(distribution.logits, logits[5:], atol=tolerance)
        np.testing.assert_allclose(values, value[5:], atol=tolerance)
        since_reset = T - np.where(reset, np.arange(T)[:, None], 0).max(axis=0)
        assert end["size"].tolist() == since_reset.tolist()


def test_a_text_depends_on_nothing_but_itself():
    """Other rows, earlier episodes and what is left in the cache change nothing."""
    model = language_model(SIZES)
    obs = jax.random.randint(jax.random.key(0), (T, B), 0, 7)
    params = perturbed(model.init(jax.random.key(1), obs[0]))
    reset = jnp.zeros((T, B), bool).at[4].set(True)
    carry = jax.tree.map(lambda x: x + 3, model.initial_carry(B))  # a stale text of 3 tokens
    _, (logits, value) = jax.jit(lambda *x: stepped(model, params, *x))(carry, obs, reset)
    alone, values = model.unroll(
        params, model.initial_carry(1), obs[4:, 2:3], reset[4:, 2:3].at[0].set(True)
    )
    np.testing.assert_allclose(alone.logits[:, 0], logits[4:, 2], atol=1e-5)
    np.testing.assert_allclose(values[:, 0], value[4:, 2], atol=1e-5)


def test_a_text_longer_than_the_context_gives_nan():
    model = language_model(DecoderSizes(vocab_size=7, context=3, width=16))
    params = model.init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    reset = (jnp.arange(4) == 0)[:, None]
    obs = jnp.ones((4, 1), jnp.int32)
    _, (logits, _) = stepped(model, params, model.initial_carry(1), obs, reset)
    assert np.isfinite(logits[:3]).all() and np.isnan(logits[3]).all()


def test_a_new_model_is_nearly_uniform_and_its_value_is_0():
    model = language_model(SIZES)
    obs = jnp.arange(B, dtype=jnp.int32)
    params = model.init(jax.random.key(0), obs)
    _, distribution, value = model.step(params, model.initial_carry(B), obs, jnp.ones(B, bool))
    assert distribution.entropy().min() > np.log(7) - 0.05 and not np.any(value)


def test_rotations_depend_on_the_difference_of_positions():
    key_q, key_k = jax.random.split(jax.random.key(0))
    q = jax.random.normal(key_q, (1, 1, 1, 4))
    k = jax.random.normal(key_k, (1, 1, 1, 4))

    def product(i, j):
        at = [rotate(x, jnp.array([[p]]), SIZES) for x, p in ((q, i), (k, j))]
        return float((at[0] * at[1]).sum())

    assert product(2, 5) == pytest.approx(product(7, 10), abs=1e-5)
    assert product(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-6)
    assert abs(product(0, 3) - product(0, 4)) > 1e-3


@pytest.mark.learning
@pytest.mark.parametrize("algorithm", ["ppo", "trpo", "reinforce"])
def test_the_first_minibatch_has_ratio_1_and_a_text_is_learnt(algorithm):
    """The answer to a prompt is its first token, which the model has to remember."""
    env = tokens([[1, 0], [2, 0], [3, 0]], [2, 2, 2], 1, 6, 7)

    def score(transitions, config, frozen):
        return 1.0 * (transitions.mask & (transitions.action == transitions.obs[:1]))

    config = Config(
        algorithm=algorithm,
        episodic=True,
        num_envs=64,
        num_steps=2,
        total_episodes=64 * 60,
        num_epochs=1 if algorithm == "reinforce" else 4,
        num_minibatches=1 if algorithm == "reinforce" else 2,
        lr=0.005,
        gamma=1.0,
        normalize_advantage=False,
    )
    sizes = DecoderSizes(vocab_size=7, context=3, width=32)
    train = make_train(config, env, language_model(sizes), score)
    result = jax.jit(train)(jax.random.key(0))
    assert result.metrics.first_ratio_deviation.max() < 1e-4
    # Steps in the mask have one right token each: the score is the probability of that token.
    policy = Policy.from_state(config, result.state, None, env, language_model(sizes))
    carry = policy.initial_carry(3)
    for t in range(2):
        obs = jnp.array([[1, 2, 3], [0, 0, 0]])[t]
        carry, action = policy.step(carry, obs, jnp.full(3, t == 0))
    assert action.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("precision", "bound"), [pytest.param("x32", 1e-4, marks=pytest.mark.learning), ("x64", 1e-9)]
)
def test_without_learning_the_ratio_stays_1_in_all_epochs(precision, bound, request):
    """k3 of a log-ratio x is about x² / 2; its mean is over all minibatches of all epochs."""
    if precision == "x64":
        request.getfixturevalue("x64")
    env = tokens([[1, 0, 4], [2, 3, 0], [3, 2, 5]], [3, 1, 2], 4, 6, 7)
    settings = {"num_envs": 32, "num_steps": 6, "num_epochs": 4, "num_minibatches": 2}
    config = Config(episodic=True, total_episodes=64, lr=0.0, temperature=1.7, **settings)
    model = language_model(DecoderSizes(vocab_size=7, context=6, width=16))

    def score(transitions, config, frozen):
        return 1.0 * transitions.mask

    metrics = jax.jit(make_train(config, env, model, score))(jax.random.key(0)).metrics
    assert metrics.first_ratio_deviation.max() < bound
    assert metrics.approx_kl.max() < bound**2 / 2
    assert metrics.clip_fraction.max() == 0


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: DecoderSizes(7, 3, width=20),
            "width = 20: it must be a multiple of 2 · num_heads",
        ),
        (lambda: DecoderSizes(7, 3, num_kv_heads=3), "num_kv_heads = 3 does not divide"),
        (lambda: DecoderSizes(0, 3), "vocab_size = 0: it must be an integer of at least 1"),
        (
            lambda: language_model(SIZES, "two"),
            "critic = 'two': it must be one of own",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, sentence):
    assert sentence in sentence_of(make)


def test_a_vocabulary_of_another_size_is_refused():
    env = tokens([[1, 0]], [2], 2, 6, 7)
    model = language_model(DecoderSizes(vocab_size=9, context=3, width=16))
    config = Config(episodic=True, num_steps=3, num_envs=8, num_minibatches=2)
    train = make_train(config, env, model)
    assert sentence_of(lambda: jax.eval_shape(train, jax.random.key(0))) == (
        "the model has 9 actions, and tokens has 7: make a model for as many"
    )


def test_an_algorithm_with_a_value_function_refuses_a_model_without_a_critic():
    env = tokens([[1, 0]], [2], 2, 6, 7)
    model = language_model(DecoderSizes(vocab_size=7, context=3, width=16), "none")
    config = Config(episodic=True, num_steps=3, num_envs=8, num_minibatches=2)
    train = make_train(config, env, model)
    assert sentence_of(lambda: jax.eval_shape(train, jax.random.key(0))) == (
        "ppo with advantage = 'gae' fits a value function, and the model has none: "
        "give it a critic, or set advantage to grpo or rloo"
    )


def test_trpo_refuses_a_shared_decoder():
    env = tokens([[1, 0]], [2], 2, 6, 7)
    model = language_model(DecoderSizes(vocab_size=7, context=3, width=16), "shared")
    config = Config(algorithm="trpo", episodic=True, num_steps=3, num_envs=8, num_minibatches=2)
    train = make_train(config, env, model)
    message = sentence_of(lambda: jax.eval_shape(train, jax.random.key(0)))
    assert message.startswith("trpo needs params with the keys 'policy' and 'value' only")
