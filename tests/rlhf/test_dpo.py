"""Direct preference optimisation: its losses, the reference, and the exact optimum."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sentences import sentence_of

from purejaxppo.networks.distributions import Categorical
from purejaxppo.rlhf import dpo as module
from purejaxppo.rlhf.dpo import dpo_job, make_dpo, pair_log_probs, with_reference
from purejaxppo.rlhf.preference_losses import dpo_loss, ipo_loss
from purejaxppo.rlhf.supervised_settings import SupervisedSettings
from purejaxppo.rlhf.texts import Pairs, Texts, completion_log_prob
from purejaxppo.runs.job import run_job
from purejaxppo.types import Model

A, B, END = range(3)
MAX_NEW_TOKENS = 3
PROMPTS = ((A,), (B, A))
RESPONSES = tuple(
    response
    for size in range(1, MAX_NEW_TOKENS + 1)
    for response in itertools.product((A, B, END), repeat=size)
    if END not in response[:-1] and (size == MAX_NEW_TOKENS or response[-1] == END)
)
NUM_PREFIXES = 4**5  # of up to 5 tokens
SETTINGS = SupervisedSettings(num_epochs=20, batch_size=5, lr=0.05)


def tabular_model():
    """A logit for every token after every prefix; a prefix is a number in base 4."""

    def init(key, obs):
        return {"policy": 0.5 * jax.random.normal(key, (NUM_PREFIXES, 3)), "value": {}}

    def initial_carry(batch_size):
        return jnp.zeros(batch_size, jnp.int32)

    def step(params, carry, obs, reset):
        prefix = 4 * jnp.where(reset, 0, carry) + obs + 1
        return prefix, Categorical(params["policy"][prefix]), jnp.zeros(obs.shape)

    def unroll(params, carry, obs, reset):
        def body(carry, inputs):
            carry, distribution, value = step(params, carry, *inputs)
            return carry, (distribution, value)

        return jax.lax.scan(body, carry, (obs, reset))[1]

    return Model(init, initial_carry, step, unroll)


MODEL = tabular_model()


def texts_of(prompts_and_responses):
    rows = [(*prompt, *response) for prompt, response in prompts_and_responses]
    tokens = [row + (END,) * (5 - len(row)) for row in rows]
    lengths = [len(row) for row in rows]
    prompt_lengths = [len(prompt) for prompt, _ in prompts_and_responses]
    return Texts(*(jnp.asarray(x, jnp.int32) for x in (tokens, lengths, prompt_lengths)))


def params_of(seed):
    return MODEL.init(jax.random.key(seed), jnp.zeros(1, jnp.int32))


def log_prob_by_hand(table, prompt, response):
    """log π(response | prompt) from the table of logits, one token at a time."""
    text = (*prompt, *response)
    total = 0.0
    for t in range(len(prompt), len(text)):
        prefix = sum((x + 1) * 4 ** (t - 1 - i) for i, x in enumerate(text[:t]))
        logits = np.asarray(table[prefix], np.float64)
        total += logits[text[t]] - np.log(np.exp(logits).sum())
    return total


def all_pairs():
    """Both prompts with every two of their responses, in one order, and the responses' indices."""
    chosen = []
    rejected = []
    index = []
    for p, prompt in enumerate(PROMPTS):
        for i, j in itertools.combinations(range(len(RESPONSES)), 2):
            chosen.append((prompt, RESPONSES[i]))
            rejected.append((prompt, RESPONSES[j]))
            index.append((p, i, j))
    pairs = Pairs(texts_of(chosen), texts_of(rejected), jnp.zeros(len(chosen)))
    return pairs, np.array(index)


def some_pairs(n=10):
    return jax.tree.map(lambda x: x[7 : 7 + 19 * n : 19], all_pairs()[0])


@pytest.mark.usefixtures("x64")
def test_log_probabilities_are_those_of_the_completion_alone():
    pairs, index = all_pairs()
    params = params_of(0)
    chosen, rejected = jax.jit(lambda x: pair_log_probs(MODEL, params, x))(pairs)
    by_hand = np.array(
        [[log_prob_by_hand(params["policy"], p, y) for y in RESPONSES] for p in PROMPTS]
    )
    np.testing.assert_allclose(np.exp(by_hand).sum(axis=1), 1)  # 15 responses are all
    np.testing.assert_allclose(chosen, by_hand[index[:, 0], index[:, 1]], rtol=1e-12)
    np.testing.assert_allclose(rejected, by_hand[index[:, 0], index[:, 2]], rtol=1e-12)
    referenced = with_reference(MODEL, params, pairs, 16)
    np.testing.assert_allclose(referenced.chosen, chosen, rtol=1e-12)
    np.testing.assert_allclose(referenced.rejected, rejected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_losses_are_those_of_the_papers():
    rng = np.random.default_rng(0)
    w, l, ref_w, ref_l = rng.normal(size=(4, 20)) * 3  # noqa: E741
    beta = 0.4
    h = np.log(np.exp(w) / np.exp(ref_w)) - np.log(np.exp(l) / np.exp(ref_l))
    sigmoid = 1 / (1 + np.exp(-beta * h))
    arrays = [jnp.asarray(x) for x in (w, l, ref_w, ref_l)]
    np.testing.assert_allclose(dpo_loss(*arrays, beta), -np.log(sigmoid), rtol=1e-12)
    smoothed = -(1 - 0.2) * np.log(sigmoid) - 0.2 * np.log(1 - sigmoid)
    np.testing.assert_allclose(dpo_loss(*arrays, beta, 0.2), smoothed, rtol=1e-12)
    np.testing.assert_allclose(ipo_loss(*arrays, beta), (h - 1 / 0.8) ** 2, rtol=1e-12)

    # Rafailov et al. 2023, after eq. 7: the gradient is −β σ(−βh) ∇h.
    by_w, by_l = jax.grad(lambda *x: dpo_loss(*x, *arrays[2:], beta).sum(), (0, 1))(*arrays[:2])
    np.testing.assert_allclose(by_w, -beta * (1 - sigmoid), rtol=1e-12)
    np.testing.assert_allclose(by_l, beta * (1 - sigmoid), rtol=1e-12)
    by_w = jax.grad(lambda w: ipo_loss(w, *arrays[1:], beta).sum())(arrays[0])
    np.testing.assert_array_equal(np.sign(by_w), np.sign(h - 1 / 0.8))
    # Large differences do not overflow.
    far = [jnp.array([x]) for x in (-1e4, 0.0, 0.0, 0.0)]
    np.testing.assert_allclose(dpo_loss(*far, 1.0), [1e4])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("kind", "smoothing", "reference_free"),
    [("dpo", 0.0, False), ("dpo", 0.1, False), ("ipo", 0.0, False), ("dpo", 0.0, True)],
)
def test_the_loss_of_a_minibatch_and_its_metrics(kind, smoothing, reference_free):
    pairs, index = all_pairs()
    params = params_of(0)
    reference = params_of(1)
    tables = params["policy"], reference["policy"]
    log_p, log_ref = (
        np.array([[log_prob_by_hand(table, p, y) for y in RESPONSES] for p in PROMPTS])
        for table in tables
    )
    if reference_free:
        log_ref = np.zeros_like(log_ref)
    ratio = log_p - log_ref
    w = ratio[index[:, 0], index[:, 1]]
    l = ratio[index[:, 0], index[:, 2]]  # noqa: E741
    sigmoid = 1 / (1 + np.exp(-0.3 * (w - l)))
    expected = {
        "dpo": -(1 - smoothing) * np.log(sigmoid) - smoothing * np.log(1 - sigmoid),
        "ipo": (w - l - 1 / 0.6) ** 2,
    }[kind].mean()
    loss = module._loss(MODEL, kind, 0.3, smoothing, reference_free)
    loss = jax.jit(jax.value_and_grad(loss, has_aux=True))
    inputs = [(pairs, {})]
    if not reference_free:
        inputs = [(pairs, {"reference": reference}), (with_reference(MODEL, reference, pairs), {})]
    gradients = []
    for examples, frozen in inputs:
        (value, metrics), gradient = loss(params, examples, frozen, jax.random.key(0))
        gradients.append(gradient["policy"])
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        np.testing.assert_allclose(metrics["accuracy"], (w > l).mean(), rtol=1e-12)
        np.testing.assert_allclose(metrics["reward_margin"], 0.3 * (w - l).mean(), rtol=1e-10)
        np.testing.assert_allclose(metrics["chosen_log_ratio"], w.mean(), rtol=1e-10)
        np.testing.assert_allclose(metrics["rejected_log_ratio"], l.mean(), rtol=1e-10)
    np.testing.assert_allclose(gradients[0], gradients[-1], atol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_the_optimum_of_exact_preferences_is_the_optimum_of_the_reward_with_a_kl_penalty(beta):
    """π* ∝ π_ref · exp(r / β), by enumeration (Rafailov et al. 2023, eq. 4)."""
    pairs, index = all_pairs()
    reward = np.random.default_rng(3).normal(size=(2, len(RESPONSES))) * 0.5
    assert len(RESPONSES) == 15
    reference = params_of(1)
    log_ref = np.array(
        [[log_prob_by_hand(reference["policy"], p, y) for y in RESPONSES] for p in PROMPTS]
    )
    optimum = np.exp(log_ref + reward / beta)
    optimum /= optimum.sum(axis=1, keepdims=True)
    difference = reward[index[:, 0], index[:, 1]] - reward[index[:, 0], index[:, 2]]
    is_wrong = jnp.asarray(1 / (1 + np.exp(difference)))  # P(rejected preferred to chosen)
    data = with_reference(MODEL, reference, pairs)

    def loss(params):
        policy = pair_log_probs(MODEL, params, pairs)
        return dpo_loss(*policy, data.chosen, data.rejected, beta, is_wrong).mean()

    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 1500))

    def step(carry, _):
        params, state = carry
        change, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, change), state), None

    start = (reference, optimizer.init(reference))
    (params, _), _ = jax.jit(lambda start: jax.lax.scan(step, start, None, 1500))(start)
    texts = texts_of([(prompt, response) for prompt in PROMPTS for response in RESPONSES])
    reached = np.exp(completion_log_prob(MODEL, params, texts)).reshape(2, 15)
    np.testing.assert_allclose(reached, optimum, atol=1e-3)
    assert abs(np.exp(log_ref) - optimum).max() > 0.05


def test_training_raises_the_chosen_completions_and_vmaps_over_keys():
    pairs = some_pairs()
    reference = params_of(1)
    train = make_dpo(SETTINGS, MODEL, beta=0.5)
    keys = jax.random.split(jax.random.key(0), 2)
    result = jax.jit(jax.vmap(train, in_axes=(0, None, None, None)))(
        keys, reference, pairs, reference
    )
    metrics = result.metrics
    assert metrics["loss"].shape == (2, 40)
    np.testing.assert_allclose(metrics["loss"][:, 0], np.log(2), rtol=1e-6)
    assert (metrics["accuracy"][:, 0] == 0.5).all() and (metrics["accuracy"][:, -1] == 1).all()
    assert (metrics["loss"][:, -1] < 0.4).all() and (metrics["reward_margin"][:, -1] > 0.5).all()

    referenced = with_reference(MODEL, reference, pairs)
    ran = run_job(
        dpo_job(SETTINGS, MODEL, 10, beta=0.5),
        seeds=2,
        key=0,
        params=reference,
        frozen={"data": referenced},
    )
    np.testing.assert_allclose(ran.metrics["loss"], metrics["loss"], rtol=1e-3)


def train_with(data=None, params=True, reference=None, **options):
    data = some_pairs() if data is None else data
    start = params_of(0) if params else None
    return make_dpo(SETTINGS, MODEL, **options)(jax.random.key(0), start, data, reference)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (train_with, "DPO needs a reference"),
        (
            lambda: train_with(reference=params_of(1), reference_free=True),
            "there is a reference, and reference_free=True",
        ),
        (
            lambda: train_with(with_reference(MODEL, params_of(1), some_pairs()),
                               reference=params_of(1)),
            "the data already have log-probabilities of a reference",
        ),
        (
            lambda: train_with(with_reference(MODEL, params_of(1), some_pairs()),
                               reference_free=True),
            "there is a reference, and reference_free=True",
        ),
        (
            lambda: train_with(jax.tree.map(lambda x: x[:0], some_pairs()),
                               reference=params_of(1)),
            "the data are empty",
        ),
        (lambda: train_with(some_pairs(3), reference=params_of(1)), "batch_size = 5 exceeds"),
        (lambda: train_with(params=False, reference=params_of(1)), "there are no params"),
        (lambda: train_with(kind="kto"), "kind = 'kto': it must be one of dpo, ipo"),
        (lambda: train_with(beta=0.0), "beta = 0.0: it must be a finite number above 0"),
        (lambda: train_with(label_smoothing=0.5), "label_smoothing = 0.5: it must be a number"),
        (lambda: train_with(kind="ipo", label_smoothing=0.1), "ipo has no label smoothing"),
        (
            lambda: run_job(
                dpo_job(SETTINGS, MODEL, 10), params=params_of(0), frozen={"data": some_pairs()}
            ),
            "DPO needs a reference",
        ),
    ],
)  # fmt: skip
def test_data_and_options_that_do_not_fit_are_refused(make, sentence):
    assert sentence in sentence_of(make)
