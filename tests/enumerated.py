"""A task on texts of up to three new tokens, whose 15 responses to each prompt can be enumerated.

The optimum of E[r] − β KL(π ‖ π_ref) over all policies, π* ∝ π_ref exp(r / β), and the value
β log Z of it are computed by enumeration (Ziegler et al. 2019, section 2).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.envs.tokens import tokens
from purejaxppo.networks.distributions import Categorical
from purejaxppo.types import Model, Transition

A, B, END = 0, 1, 2
V = 3
PROMPTS = [[A], [B, END]]  # the end token in a prompt ends nothing
NEW = 3
LONGEST = max(map(len, PROMPTS))
T = LONGEST - 1 + NEW
BETA = 0.3
PADDED = [prompt + [99] * (LONGEST - len(prompt)) for prompt in PROMPTS]
ENV = tokens(PADDED, [len(prompt) for prompt in PROMPTS], NEW, END, V)


def responses():
    """All responses: those that end with `END`, and those of `NEW` tokens without it."""
    ended = []
    open_ = [[]]
    for _ in range(NEW):
        longer = [[*text, token] for text in open_ for token in range(V)]
        ended += [text for text in longer if text[-1] == END]
        open_ = [text for text in longer if text[-1] != END]
    return ended + open_


RESPONSES = responses()
N = len(RESPONSES)
# [P · N] texts, prompt by prompt, padded with 0 to T + 1 tokens
TEXTS = [prompt + response for prompt in PROMPTS for response in RESPONSES]
TEXT_LENGTHS = np.array([len(text) for text in TEXTS], np.int32)
PROMPT_LENGTHS = np.repeat([len(prompt) for prompt in PROMPTS], N).astype(np.int32)
TOKENS = np.array([text + [0] * (T + 1 - len(text)) for text in TEXTS], np.int32)
# [T, P · N] whether step t appends a token of the response
CHOSEN = np.array(
    [[p <= t + 1 < n for p, n in zip(PROMPT_LENGTHS, TEXT_LENGTHS, strict=True)] for t in range(T)]
)

# The tree of prefixes that a policy is asked about; node 0 stands for all other texts.
PREFIXES = [(), *sorted({tuple(text[:n]) for text in TEXTS for n in range(1, len(text))})]
NODE = {prefix: i for i, prefix in enumerate(PREFIXES)}
FIRST = np.array([NODE.get((token,), 0) for token in range(V)], np.int32)
CHILD = np.array(
    [[NODE.get((*prefix, token), 0) if prefix else 0 for token in range(V)] for prefix in PREFIXES],
    np.int32,
)


def tabular():
    """The `Model` with three logits and a value for each prefix; its carry is the prefix."""
    num_nodes = len(PREFIXES)

    def init(key, obs):
        dtype = jnp.result_type(float)
        return {"policy": jnp.zeros((num_nodes, V), dtype), "value": jnp.zeros(num_nodes, dtype)}

    def initial_carry(batch_size):
        return jnp.zeros(batch_size, jnp.int32)

    def advance(node, obs, reset):
        return jnp.where(reset, jnp.asarray(FIRST)[obs], jnp.asarray(CHILD)[node, obs])

    def at(params, node):
        logits, values = (jnp.asarray(params[name]) for name in ("policy", "value"))
        return Categorical(logits[node]), values[node]

    def step(params, carry, obs, reset):
        node = advance(carry, obs, reset)
        return node, *at(params, node)

    def unroll(params, carry, obs, reset):
        def body(node, inputs):
            node = advance(node, *inputs)
            return node, node

        return at(params, jax.lax.scan(body, carry, (obs, reset))[1])

    return Model(init, initial_carry, step, unroll)


def random_params(seed, scale=1.0):
    """A random policy of the tabular model, not uniform, in NumPy; its values are 0."""
    logits = scale * np.random.default_rng(seed).normal(size=(len(PREFIXES), V))
    return {"policy": logits, "value": np.zeros(len(PREFIXES))}


def random_scores(seed):
    """A score for each text of `TEXTS`."""
    return np.random.default_rng(seed).normal(size=len(TEXTS))


def score(tokens, lengths, scores):
    """The score of each text in a table; NaN for a text that is not in `TEXTS`."""
    is_text = (tokens[:, None] == jnp.asarray(TOKENS)[None]).all(axis=-1)
    is_text &= lengths[:, None] == jnp.asarray(TEXT_LENGTHS)[None]
    found = jnp.where(is_text, scores[None], 0).sum(axis=1)
    return jnp.where(is_text.sum(axis=1) == 1, found, jnp.nan)


@functools.partial(jax.jit, static_argnums=0)
def text_log_probs(model, params):
    """log π(response | prompt) [P, N] of all responses to all prompts."""
    obs = jnp.asarray(TOKENS[:, :-1].T)
    reset = jnp.broadcast_to((jnp.arange(T) == 0)[:, None], obs.shape)
    distribution, _ = model.unroll(params, model.initial_carry(len(TEXTS)), obs, reset)
    log_prob = distribution.log_prob(jnp.asarray(TOKENS[:, 1:].T))
    return jnp.where(jnp.asarray(CHOSEN), log_prob, 0).sum(axis=0).reshape(-1, N)


def objective(log_prob, ref_log_prob, scores, beta):
    """J(π) = E[r] − β KL(π ‖ π_ref), exactly; prompts are equally probable."""
    shaped = scores.reshape(-1, N) - beta * (log_prob - ref_log_prob)
    return (jnp.exp(log_prob) * shaped).sum(axis=1).mean()


def optimum(ref_log_prob, scores, beta):
    """log π* [P, N] and J(π*) = E[β log Z], where π* = π_ref exp(r / β) / Z."""
    unnormalized = np.asarray(ref_log_prob) + scores.reshape(-1, N) / beta
    log_z = np.log(np.exp(unnormalized).sum(axis=1, keepdims=True))
    return unnormalized - log_z, beta * log_z.mean()


def policy_of(log_prob):
    """Parameters of the tabular model whose responses have the probabilities exp(log_prob) [P, N].

    A logit is the logarithm of the probability of all responses that contain its prefix and token.
    """
    total = np.zeros((len(PREFIXES), V))
    for text, probability in zip(TEXTS, np.exp(np.ravel(log_prob)), strict=True):
        for n in range(1, len(text)):
            total[NODE[tuple(text[:n])], text[n]] += probability
    with np.errstate(divide="ignore"):
        logits = np.where(total > 0, np.log(total), -30.0)
    return {"policy": logits, "value": np.zeros(len(PREFIXES))}


def values_of(params, reference, scores, beta):
    """V(s) [num_nodes] of the shaped reward from a prefix on, in the state after the prompt."""
    log_probs = [np.asarray(jax.nn.log_softmax(x["policy"])) for x in (params, reference)]
    values = np.zeros(len(PREFIXES))
    for prefix in sorted(PREFIXES[1:], key=len, reverse=True):
        if not any(prefix[: len(prompt)] == tuple(prompt) for prompt in PROMPTS):
            continue
        for token in range(V):
            log_prob, ref_log_prob = (x[NODE[prefix], token] for x in log_probs)
            text = [*prefix, token]
            after = scores[TEXTS.index(text)] if text in TEXTS else values[NODE[tuple(text)]]
            values[NODE[prefix]] += np.exp(log_prob) * (after - beta * (log_prob - ref_log_prob))
    return values


def transitions_of(model, params, columns=None):
    """The rollout [T, n] in which the episodes are these texts, by default all of `TEXTS`.

    Forced steps and steps after the end have other actions than the text.
    """
    columns = np.arange(len(TEXTS)) if columns is None else np.asarray(columns)
    lengths = TEXT_LENGTHS[columns][None]
    t = np.arange(T)[:, None]
    chosen = CHOSEN[:, columns]
    following = TOKENS[columns, 1:].T
    obs = jnp.asarray(TOKENS[columns, :-1].T)
    action = jnp.asarray(np.where(chosen, following, (following + 1) % V))
    valid = jnp.asarray(t + 1 < lengths)
    terminated = jnp.asarray(t + 2 == lengths)
    reset = jnp.concatenate([jnp.ones_like(valid[:1]), ~valid[1:]])
    distribution, value = _unrolled(model, params, obs, reset)
    return Transition(
        obs=obs,
        action=action,
        log_prob=distribution.log_prob(action),
        value=value,
        next_value=jnp.concatenate([value[1:], jnp.zeros_like(value[:1])]),
        reward=jnp.zeros_like(value),
        terminated=terminated,
        truncated=jnp.zeros_like(terminated),
        reset=reset,
        mask=jnp.asarray(chosen),
        valid=valid,
    )


@functools.partial(jax.jit, static_argnums=0)
def _unrolled(model, params, obs, reset):
    return model.unroll(params, model.initial_carry(obs.shape[1]), obs, reset)


def share_closed(model, params, reference, scores, beta=BETA):
    """(J(π) − J(π_ref)) / (J(π*) − J(π_ref)): 0 for the reference, 1 for the optimum."""
    ref_log_prob = text_log_probs(model, reference)
    start = objective(ref_log_prob, ref_log_prob, scores, beta)
    _, best = optimum(ref_log_prob, scores, beta)
    reached = objective(text_log_probs(model, params), ref_log_prob, scores, beta)
    return (reached - start) / (best - start)
