"""The rewards of `kl_shaped`, its metrics and its controller, against NumPy and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerated import (
    BETA,
    END,
    ENV,
    NODE,
    TEXTS,
    A,
    B,
    T,
    objective,
    random_params,
    random_scores,
    score,
    tabular,
    text_log_probs,
    transitions_of,
)
from killed import Killed
from sentences import sentence_of
from small_envs import LINEAR, counter

import purejaxppo.train as train_module
from purejaxppo import Config, fit, make_train, make_trainer
from purejaxppo.rlhf.language_model import language_model
from purejaxppo.rlhf.shaping import adapt_ref_kl_coef, kl_shaped
from purejaxppo.rlhf.transformer import DecoderSizes
from purejaxppo.runs import chunks

MODEL = tabular()
POLICY = random_params(5)
REFERENCE = random_params(0)
SCORES = random_scores(1)
CONFIG = Config(
    num_envs=16,
    num_steps=T,
    episodic=True,
    total_episodes=16 * 6,
    num_epochs=2,
    num_minibatches=2,
    lr=0.05,
    gamma=1.0,
    ref_kl_coef=BETA,
)
REINFORCE = {"algorithm": "reinforce", "num_epochs": 1, "num_minibatches": 1}
# End at once, end later, cut at the bound with and without END as the last token, both prompts.
COLUMNS = [
    TEXTS.index(text)
    for text in (
        [A, END],
        [A, B, A, END],
        [A, A, B, A],
        [B, END, END],
        [B, END, A, END],
        [B, END, B, B, B],
        [B, END, B, A, END],
    )
]
LAST = [0, 2, 2, 1, 2, 3, 3]  # the step that appends the last token
ENDED = [True, True, False, True, True, False, True]
CHOSEN_LENGTHS = [1, 3, 3, 1, 2, 3, 3]


def in_numpy(x):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), x)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def by_hand(score_of, beta, policy=POLICY, reference=REFERENCE):
    """The rewards [T, n] of the texts in `COLUMNS`, token by token, and log π − log π_ref."""
    rewards = np.zeros((T, len(COLUMNS)))
    k1 = np.zeros((T, len(COLUMNS)))
    tables = [log_softmax(np.asarray(x["policy"])) for x in (policy, reference)]
    for i, column in enumerate(COLUMNS):
        text = TEXTS[column]
        for t in range(len(text) - CHOSEN_LENGTHS[i] - 1, len(text) - 1):
            node = NODE[tuple(text[: t + 1])]
            k1[t, i] = tables[0][node, text[t + 1]] - tables[1][node, text[t + 1]]
        rewards[LAST[i], i] = score_of(i)
    return rewards - beta * k1, k1


def shaped(config=CONFIG, scores=SCORES, state=(), transitions=None, frozen=None, **options):
    reward = kl_shaped(score, MODEL, END, **options)
    transitions = transitions_of(MODEL, POLICY, COLUMNS) if transitions is None else transitions
    frozen = {"reference": REFERENCE, "score": jnp.asarray(scores)} if frozen is None else frozen
    return jax.jit(reward.step)(state, transitions, config, frozen)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("beta", [0.0, 0.3, 7.0])
def test_the_reward_of_every_token(beta):
    result = shaped(CONFIG.replace(ref_kl_coef=beta))
    expected, k1 = by_hand(lambda i: SCORES[COLUMNS[i]], beta)
    np.testing.assert_allclose(result.reward, expected, atol=1e-12)
    k3 = np.where(k1 != 0, np.exp(-k1) - 1 + k1, 0)
    metrics = {
        "episode_return": SCORES[COLUMNS].mean(),
        "ref_kl": k1.sum(axis=0).mean(),
        "ref_kl_k3": k3.sum(axis=0).mean(),
        "ref_kl_coef": beta,
        "shaped_return": expected.sum(axis=0).mean(),
        "completion_length": np.mean(CHOSEN_LENGTHS),
        "share_ended": np.mean(ENDED),
    }
    assert set(result.metrics) == set(metrics)
    for name, value in metrics.items():
        assert result.metrics[name] == pytest.approx(value, abs=1e-12), name
    # Only chosen tokens are penalised: the steps before the last token of the prompt have none.
    assert not np.any(np.asarray(result.reward)[0, 3:])


@pytest.mark.usefixtures("x64")
def test_the_score_is_clipped_and_a_missing_end_costs():
    scores = np.arange(30) - 14.25
    result = shaped(
        CONFIG.replace(ref_kl_coef=0.0), scores, score_clip=5.0, missing_end_penalty=2.0
    )
    bounded = np.clip(scores[COLUMNS], -5, 5) - 2 * ~np.array(ENDED)
    expected, _ = by_hand(lambda i: bounded[i], 0.0)
    np.testing.assert_array_equal(result.reward, expected)
    assert (np.abs(scores[COLUMNS]) > 5).any() and (np.abs(scores[COLUMNS]) < 5).any()
    # The score is reported as it is.
    assert result.metrics["episode_return"] == pytest.approx(scores[COLUMNS].mean())


def test_integer_scores_and_float32():
    result = shaped(CONFIG.replace(ref_kl_coef=0.0), np.arange(30, dtype=np.int32))
    expected, _ = by_hand(lambda i: COLUMNS[i], 0.0)
    np.testing.assert_array_equal(result.reward, expected)
    assert result.reward.dtype == jnp.float32
    fractions = shaped(CONFIG.replace(ref_kl_coef=0.0), np.arange(30, dtype=np.float32) / 4)
    np.testing.assert_array_equal(fractions.reward, expected / 4)


@pytest.mark.usefixtures("x64")
def test_a_token_that_the_reference_excludes():
    """Without a penalty it has its score; the KL divergence is infinite."""
    excluded = random_params(0)
    excluded["policy"][NODE[(A,)], END] = -np.inf
    frozen = {"reference": excluded, "score": jnp.asarray(SCORES)}
    result = shaped(CONFIG.replace(ref_kl_coef=0.0), frozen=frozen)
    assert result.reward[0, 0] == SCORES[COLUMNS[0]]
    assert result.metrics["ref_kl"] == np.inf
    assert shaped(frozen=frozen).reward[0, 0] == -np.inf


@pytest.mark.usefixtures("x64")
def test_the_mean_penalty_is_the_exact_divergence():
    """The KL per text, not per token, of a fixed policy over 4,096 texts, at a temperature."""
    temperature = 2.0
    config = CONFIG.replace(num_envs=4096, total_episodes=4096, lr=0.0, temperature=temperature)
    config = config.replace(**REINFORCE)
    frozen = {"reference": REFERENCE, "score": jnp.asarray(SCORES)}
    train = jax.jit(make_train(config, ENV, MODEL, kl_shaped(score, MODEL, END)))
    extra = train(jax.random.key(0), POLICY, frozen).metrics.extra
    tempered = [x | {"policy": x["policy"] / temperature} for x in (POLICY, REFERENCE)]
    log_prob, ref_log_prob = (text_log_probs(MODEL, x) for x in tempered)
    k1 = log_prob - ref_log_prob
    p = jnp.exp(log_prob)
    kl = (p * k1).sum(axis=1).mean()
    deviation = jnp.sqrt((p * k1**2).sum(axis=1).mean() - kl**2)
    assert abs(extra["ref_kl"][0] - kl) < 5 * deviation / 64
    assert kl > 0.2 and deviation / 64 < 0.05
    expected = objective(log_prob, ref_log_prob, SCORES, BETA)
    assert abs(extra["shaped_return"][0] - expected) < 0.1
    assert extra["ref_kl_k3"][0] > 0


# ------------------------------------------------------------------- what comes after the end


def corrupted(make_rollout, is_corrupted):
    """Rollouts whose steps after the end hold other tokens, other ends and NaN.

    ``is_corrupted()`` says whether they do; it may be traced.
    """

    def make(*arguments):
        rollout = make_rollout(*arguments)

        def changed(*inputs):
            transitions, *rest = rollout(*inputs)
            keep = transitions.valid | ~is_corrupted()
            is_last = transitions.terminated & transitions.valid & is_corrupted()
            others = {
                "obs": (transitions.obs + 1) % 3,
                "action": jnp.full_like(transitions.action, END),
                "log_prob": jnp.nan,
                "value": jnp.nan,
                "next_value": jnp.nan,
                "reward": jnp.nan,
                "terminated": ~transitions.terminated,
            }
            fields = {
                name: jnp.where(keep, getattr(transitions, name), other)
                for name, other in others.items()
            }
            # No estimator may look at the value of what follows a termination.
            fields["next_value"] = jnp.where(is_last, jnp.nan, fields["next_value"])
            return transitions._replace(**fields), *rest

        return changed

    return make


GROUP = {"group_size": 4, "num_epochs": 2}
AFTER_END = {
    "ppo": {"normalize_advantage": False},
    "normalized": {"normalize_reward": True, "clip_value": True, "ent_coef": 0.1},
    "sequence": {"loss_reduction": "sequence", "clip_eps_high": 0.3, "ent_coef": 0.1},
    "constant": {"loss_reduction": "constant", "objective": "adaptive_kl"},
    "grpo": GROUP | {"advantage": "grpo"},
    "rloo": GROUP | {"advantage": "rloo", "algorithm": "trpo", "num_minibatches": 1},
    "trpo": {"algorithm": "trpo"},
    **{f"reinforce-{name}": REINFORCE | {"baseline": name} for name in ("value", "running_mean")},
    "reinforce-leave_one_out": REINFORCE | {"baseline": "leave_one_out"},
}
SLOW = ("ppo", "constant", "rloo", "reinforce-value", "reinforce-running_mean")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case",
    [pytest.param(x, marks=[pytest.mark.learning] if x in SLOW else []) for x in AFTER_END],
)
def test_nothing_after_the_end_changes_anything(case, monkeypatch):
    """The state after two iterations and all metrics are the same, bit for bit."""
    config = CONFIG.replace(**AFTER_END[case], ref_kl_target=0.1)
    frozen = {"reference": REFERENCE, "score": jnp.asarray(SCORES)}

    flag = []
    make_rollout = corrupted(train_module.make_rollout, lambda: flag[-1])
    monkeypatch.setattr(train_module, "make_rollout", make_rollout)
    trainer = make_trainer(config, ENV, MODEL, kl_shaped(score, MODEL, END))

    @jax.jit
    def step(state, is_corrupted):
        flag.append(is_corrupted)
        return trainer.step(state, frozen)

    def run(is_corrupted):
        state, first = step(start, is_corrupted)
        state, second = step(state, is_corrupted)
        state = state._replace(key=jax.random.key_data(state.key), carry=None, env=None)
        return state, first, second

    start = jax.jit(trainer.init)(jax.random.key(0), POLICY)
    expected = run(False)
    changed = run(True)
    jax.tree.map(np.testing.assert_array_equal, changed, expected)
    assert np.isfinite(np.asarray(expected[0].params["policy"])).all()
    assert (expected[0].params["policy"] != POLICY["policy"]).any()


@pytest.mark.usefixtures("x64")
def test_an_end_inside_a_prompt_is_no_end():
    """The second prompt is [B, END]; the texts of it that are cut did not end."""
    columns = [i for i, text in enumerate(TEXTS) if text[:2] == [B, END] and text[-1] != END]
    transitions = transitions_of(MODEL, POLICY, columns)
    forced_end = transitions._replace(action=transitions.action.at[0].set(END))
    for rollout in (transitions, forced_end):
        result = shaped(transitions=rollout, missing_end_penalty=10.0)
        assert result.metrics["share_ended"] == 0
        assert result.metrics["completion_length"] == 3
        unpunished = shaped(transitions=rollout)
        np.testing.assert_allclose(result.reward - unpunished.reward, [[0.0] * 8] * 3 + [[-10] * 8])


# -------------------------------------------------------------------------------------------- β


@pytest.mark.exact
def test_beta_0_is_a_reward_without_reference():
    def plain(transitions, config, frozen):
        """The score at the last step of each text of the task."""
        t = np.arange(T)[:, None]
        length = transitions.valid.sum(axis=0)
        following = jnp.concatenate([transitions.obs[1:], transitions.action[-1:]])
        following = jnp.where(transitions.mask, transitions.action, following)
        text = jnp.concatenate([transitions.obs[:1], jnp.where(transitions.valid, following, 0)])
        scores = score(text.T, length + 1, frozen["score"])
        return jnp.where(t == length[None] - 1, scores[None], 0)

    config = CONFIG.replace(ref_kl_coef=0.0)
    params, reference = (
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), x) for x in (POLICY, REFERENCE)
    )
    without = {"score": jnp.asarray(SCORES, jnp.float32)}
    key = jax.random.key(0)
    expected = jax.jit(make_train(config, ENV, MODEL, plain))(key, params, without)
    assert (expected.state.params["policy"] != params["policy"]).any()
    train = jax.jit(make_train(config, ENV, MODEL, kl_shaped(score, MODEL, END)))
    for frozen in (without, without | {"reference": reference}):
        result = train(key, params, frozen)
        jax.tree.map(np.testing.assert_array_equal, result.state.params, expected.state.params)
        # The KL term is exactly 0: the return is the score.
        extra = result.metrics.extra
        np.testing.assert_allclose(extra["shaped_return"], result.metrics.episode_return, rtol=1e-6)
        assert ("ref_kl" in extra) == ("reference" in frozen)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "algorithm", [pytest.param("ppo", marks=pytest.mark.learning), "reinforce"]
)
def test_a_large_beta_keeps_the_policy_at_the_reference(algorithm):
    """From another policy than the reference, training leads to the reference."""
    config = CONFIG.replace(algorithm=algorithm, num_envs=128, total_episodes=128 * 150)
    config = config.replace(ref_kl_coef=100.0, max_grad_norm=1e9, gae_lambda=1.0)
    if algorithm == "reinforce":
        config = config.replace(num_epochs=1, num_minibatches=1)
    frozen = {"reference": REFERENCE, "score": jnp.asarray(SCORES)}
    train = jax.jit(make_train(config, ENV, MODEL, kl_shaped(score, MODEL, END)))
    for start in (REFERENCE, POLICY):
        params = train(jax.random.key(0), start, frozen).state.params
        log_prob, ref_log_prob = (text_log_probs(MODEL, x) for x in (params, REFERENCE))
        kl = (jnp.exp(log_prob) * (log_prob - ref_log_prob)).sum(axis=1).mean()
        assert abs(kl) < 0.01


def ziegler(beta, kls, target, horizon, num_episodes):
    """The coefficient before each iteration (Ziegler et al. 2019, section 2.2)."""
    betas = []
    for kl in kls:
        betas.append(beta)
        error = min(max((kl - target) / target, -0.2), 0.2)
        beta *= 1 + error * num_episodes / horizon
    return np.array(betas), beta


@pytest.mark.usefixtures("x64")
def test_the_controller_is_zieglers_on_the_logged_kl():
    """For several targets and initial coefficients in one compiled program."""
    config = CONFIG.replace(ref_kl_horizon=100.0, total_episodes=16 * 40)
    frozen = {"reference": REFERENCE, "score": jnp.asarray(SCORES)}

    def train(target, start):
        adaptive = config.replace(ref_kl_target=target, ref_kl_coef=start)
        train = make_train(adaptive, ENV, MODEL, kl_shaped(score, MODEL, END))
        return train(jax.random.key(0), POLICY, frozen)

    targets = np.array([1.0, 1e-3, 50.0])
    starts = np.array([0.1, 1.0, 1.0])
    results = jax.jit(jax.vmap(train))(targets, starts)
    for i, target in enumerate(targets):
        kls = np.asarray(results.metrics.extra["ref_kl"][i])
        betas, last = ziegler(starts[i], kls, target, 100.0, config.num_envs)
        np.testing.assert_allclose(results.metrics.extra["ref_kl_coef"][i], betas, rtol=1e-12)
        np.testing.assert_allclose(results.state.reward[i], last, rtol=1e-12)
        errors = np.abs(kls / target - 1)
        assert (errors > 0.2).any() and (errors < 0.2).any() == (i == 0)
        if i > 0:  # at the bound: ± 0.2 · 16 / 100 in each iteration
            factors = np.unique((betas[1:] / betas[:-1]).round(9))
            assert factors.tolist() == ([0.968, 1.032] if i == 1 else [0.968])


def test_one_step_of_the_controller():
    beta = functools.partial(adapt_ref_kl_coef, jnp.asarray(2.0), num_episodes=50)
    for kl, expected in ((6.0, 2.0), (6.6, 2.01), (9.0, 2.02), (-5.0, 1.98), (5.4, 1.99)):
        np.testing.assert_allclose(
            beta(kl=jnp.asarray(kl), target=6.0, horizon=1000.0), expected, rtol=1e-6
        )


@pytest.mark.learning
@pytest.mark.usefixtures("x64")
def test_the_controller_reaches_its_target():
    """The mean KL of the last quarter is within a tenth of the target."""
    config = CONFIG.replace(num_envs=128, total_episodes=128 * 200, anneal_lr=False, lr=0.02)
    config = config.replace(ref_kl_target=0.2, ref_kl_horizon=500.0, ref_kl_coef=0.05)
    frozen = {"reference": REFERENCE, "score": jnp.asarray(SCORES)}
    train = jax.jit(make_train(config, ENV, MODEL, kl_shaped(score, MODEL, END)))
    extra = train(jax.random.key(0), REFERENCE, frozen).metrics.extra
    assert extra["ref_kl"][-50:].mean() == pytest.approx(0.2, rel=0.1)
    assert extra["ref_kl_coef"][-1] > 0.1


@pytest.mark.usefixtures("x64")
def test_a_vmap_over_beta_equals_separate_runs():
    frozen = {"reference": REFERENCE, "score": jnp.asarray(SCORES)}
    betas = jnp.asarray([0.0, 0.2, 3.0])

    def train(beta):
        reward = kl_shaped(score, MODEL, END)
        train = make_train(CONFIG.replace(ref_kl_coef=beta), ENV, MODEL, reward)
        return train(jax.random.key(0), POLICY, frozen)

    together = jax.jit(jax.vmap(train))(betas)
    alone = jax.jit(train)
    for i, beta in enumerate(betas):
        result = alone(beta)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-9, atol=1e-9),
            (together.state.params, together.metrics.extra),
            (result.state.params, result.metrics.extra),
        )
    policies = together.state.params["policy"]
    assert jnp.abs(policies[0] - policies[1]).max() > 1e-3


@pytest.mark.learning
def test_a_language_model_is_vmapped_over_seeds_and_beta():
    sizes = DecoderSizes(
        vocab_size=3, context=T + 1, width=8, num_layers=1, num_heads=2, mlp_width=8
    )
    model = language_model(sizes, "none")
    reference = model.init(jax.random.key(1), jnp.zeros(1, jnp.int32))
    config = CONFIG.replace(total_episodes=32, lr=0.01, advantage="rloo", group_size=4)
    config = config.replace(num_epochs=1, num_minibatches=1)

    def train(key, beta):
        reward = kl_shaped(score, model, END)
        train = make_train(config.replace(ref_kl_coef=beta), ENV, model, reward)
        frozen = {"reference": reference, "score": jnp.asarray(SCORES, jnp.float32)}
        result = train(key, reference, frozen)
        return result.state.params, result.metrics

    keys = jax.random.split(jax.random.key(0), 2)
    betas = jnp.asarray([0.0, 0.5, 50.0])
    over_betas = jax.vmap(train, (None, 0))
    params, metrics = jax.jit(jax.vmap(over_betas, (0, None)))(keys, betas)
    assert metrics.extra["ref_kl"].shape == (2, 3, 2)
    assert (jnp.abs(metrics.extra["ref_kl"][:, :, 0]) < 1e-6).all()  # starts at the reference
    np.testing.assert_array_equal(metrics.extra["ref_kl_coef"][:, :, 1], [betas] * 2)
    one, one_metrics = jax.jit(train)(keys[1], betas[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1, 1], b, atol=1e-4), params, one)
    np.testing.assert_allclose(metrics.episode_return[1, 1], one_metrics.episode_return, atol=1e-4)
    assert np.ptp(metrics.episode_return[:, 0, 0]) > 0


# --------------------------------------------------------------------------------------- errors


def test_errors_are_one_sentence():
    frozen = {"reference": REFERENCE, "score": jnp.asarray(SCORES, jnp.float32)}
    key = jax.random.key(0)

    def run(config=CONFIG, frozen=frozen, score=score, env=ENV, model=MODEL):
        reward = kl_shaped(score, MODEL, END)
        return lambda: jax.eval_shape(make_train(config, env, model, reward), key, None, frozen)

    for missing in (None, {}, {"reference": None}, {"score": SCORES}, REFERENCE):
        sentence = sentence_of(run(frozen=missing, score=lambda x, n, p: 1.0 * n))
        assert "needs a reference policy" in sentence and "ref_kl_coef=0" in sentence
    adaptive = CONFIG.replace(ref_kl_coef=0.1, ref_kl_target=1.0)
    assert "needs a reference" in sentence_of(run(adaptive, frozen={"score": jnp.asarray(SCORES)}))
    assert "needs a reference" in sentence_of(run(frozen=(1, 2), score=lambda x, n, p: 1.0 * n))
    for wrong, shape in (
        (lambda x, n, p: jnp.float32(1), "()"),
        (lambda x, n, p: x[:, :1] * 1.0, "(16, 1)"),
        (lambda x, n, p: x[:3, 0] * 1.0, "(3,)"),
    ):
        sentence = sentence_of(run(score=wrong))
        assert f"the score of 16 texts has the shape {shape}: it must be (16,)" in sentence
    sentence = sentence_of(
        run(Config(num_envs=16, num_steps=8, total_timesteps=128), env=counter(), model=LINEAR)
    )
    assert "episodic=True" in sentence
    small = language_model(DecoderSizes(vocab_size=3, context=2, width=16), "none")
    reward = kl_shaped(score, small, END)
    sentence = sentence_of(
        lambda: jax.eval_shape(make_train(CONFIG, ENV, MODEL, reward), key, None, frozen)
    )
    assert sentence == (
        f"the episodes of the environment have up to {ENV.max_episode_steps} steps, a token each, "
        "and the context of the model has 2"
    )


def test_an_adaptive_coefficient_cannot_start_at_0():
    """β is multiplied in each iteration, so that it would stay at 0 for ever."""
    config = CONFIG.replace(ref_kl_coef=0.0, ref_kl_target=1.0)
    sentence = sentence_of(lambda: make_train(config, ENV, MODEL, kl_shaped(score, MODEL, END)))
    assert "ref_kl_coef = 0" in sentence and "above 0" in sentence


# --------------------------------------------------------------------------------------- resume


@pytest.mark.exact
def test_a_killed_run_resumes_with_its_coefficient(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 0)  # every chunk is one iteration
    config = CONFIG.replace(ref_kl_target=0.05, ref_kl_horizon=100.0, ref_kl_coef=0.2)
    config = config.replace(**REINFORCE)
    reward = kl_shaped(score, MODEL, END)
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), POLICY)
    frozen = {"reference": start, "score": jnp.asarray(SCORES, jnp.float32)}

    def train(directory, stop=None, **options):
        def watch(now):
            if now.iterations == stop:
                raise Killed

        try:
            return fit(
                config,
                key=3,
                env=ENV,
                model=MODEL,
                reward_fn=reward,
                params=start,
                frozen=frozen,
                directory=directory,
                checkpoint_seconds=0.0,
                on_progress=watch,
                **options,
            )
        except Killed:
            return None

    whole = train(None)
    assert train(tmp_path / "run", stop=4) is None
    run = train(tmp_path / "run", resume=True)
    assert run.resumed_at == 3
    for got, expected in ((run.state, whole.state), (run.metrics, whole.metrics)):
        got, expected = (
            jax.tree.map(
                lambda x: (
                    jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
                ),
                tree,
            )
            for tree in (got, expected)
        )
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    betas = whole.metrics.extra["ref_kl_coef"]
    assert len(set(np.ravel(betas).tolist())) == 6
    table = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert {"ref_kl", "ref_kl_coef", "share_ended"} <= set(table[0].split(",")) and len(table) == 7
