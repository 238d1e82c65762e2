"""TRPO against exact results: Fisher matrix, solver, the whole step and the constraint."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ppo_reference import A, B, F, T, arrays, numpy_kl, numpy_policy, parameters, random_batch
from small_envs import BOX, DISCRETE, MULTI, counter, linear_model

from purejaxppo import Config, ConfigError, make_train
from purejaxppo.networks.actor_critic import mlp_actor_critic
from purejaxppo.types import Box
from purejaxppo.updates import UPDATES
from purejaxppo.updates.minibatches import as_sequences
from purejaxppo.updates.natural_gradient import (
    cg_residual,
    conjugate_gradient,
    fisher_vector_product,
)
from purejaxppo.updates.trpo import subsample_sequences

FEATURES = Box((2,), -np.inf, np.inf)

CONFIG = Config(
    algorithm="trpo", num_envs=B, num_steps=T, num_epochs=2, num_minibatches=3, cg_damping=0.02
)
flat = jax.flatten_util.ravel_pytree
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)


def on_policy(raw, gaussian=False):
    """The batch with the log-probabilities of the policy that takes the step."""
    policy = jax.tree.map(np.asarray, parameters(gaussian)["policy"])
    for i in np.ndindex(T, B):
        raw["log_prob"][i] = numpy_policy(policy, raw["obs"][i], raw["action"][i], gaussian)[0]
    return raw


@functools.cache
def compiled(gaussian=False):
    def step(config, params, batch):
        update = UPDATES["trpo"](config, linear_model(gaussian, A), optax.sgd(0.1))
        return update.step(jax.random.key(0), params, update.init(params), batch)

    return jax.jit(step)


# ------------------------------------------------------------------------- Fisher matrix and solver


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "space", [DISCRETE, MULTI, BOX], ids=["categorical", "multi-categorical", "gaussian"]
)
def test_fisher_products_are_those_of_the_hessian_and_of_the_outer_products_of_scores(space):
    model = mlp_actor_critic(FEATURES, space, hidden_sizes=(3,))
    obs = jax.random.normal(jax.random.key(0), (6, 2))
    params = jax.jit(model.init)(jax.random.key(1), obs)
    theta, rebuild = flat(jax.tree.map(lambda x: x + 0.3, params["policy"]))

    def policy(theta):
        return model.step(params | {"policy": rebuild(theta)}, (), obs, jnp.zeros(len(obs), bool))[
            1
        ]

    @jax.jit
    def matrices(theta):
        """Products with all unit vectors; Hessian; mean outer product of scores, standard error."""
        old = policy(theta)

        def mean_kl(theta):
            return old.kl(policy(theta)).mean()

        draws = jax.vmap(old.sample)(jax.random.split(jax.random.key(2), 20_000))
        score = jax.vmap(
            lambda action: jax.jacrev(lambda theta: policy(theta).log_prob(action))(theta)
        )(draws)
        outer = jnp.einsum("dni,dnj->dij", score, score) / len(obs)
        formed = jax.vmap(fisher_vector_product(mean_kl, theta))(jnp.eye(theta.size))
        return (
            formed,
            jax.hessian(mean_kl)(theta),
            outer.mean(0),
            outer.std(0) / np.sqrt(len(draws)),
        )

    formed, hessian, mean, error = map(np.asarray, matrices(theta))
    close(formed, hessian, atol=1e-9)
    assert np.linalg.eigvalsh(formed)[-1] > 1e-3
    assert (np.abs(mean - formed) / (error + 1e-12)).max() < 5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [1, 4, 12])
def test_conjugate_gradient_with_a_step_per_parameter_is_a_dense_solve(n):
    rng = np.random.default_rng(n)
    root = rng.normal(size=(n, n))
    matrix = root @ root.T + 0.5 * np.eye(n)
    b = rng.normal(size=n)
    for iterations in (n, n + 5):  # steps after the solution change nothing
        x = conjugate_gradient(lambda v: matrix @ v, jnp.asarray(b), iterations)
        close(x, np.linalg.solve(matrix, b), rtol=1e-8)
    assert (conjugate_gradient(lambda v: matrix @ v, jnp.zeros(n), 3) == 0).all()
    close(
        cg_residual(jnp.asarray(matrix @ b), jnp.asarray(b)),
        np.linalg.norm(matrix @ b - b) / np.linalg.norm(b),
    )


# ----------------------------------------------------------------------------------- the whole step


def numpy_gradient_and_fisher(theta, batch, gaussian):
    """g = E[Â ∇log π] and F = E[F(s)], both over the mask and in the order of `ravel_pytree`."""
    kept = batch["advantage"][batch["mask"]]
    gradient = []
    fisher = []
    for i in np.ndindex(T, B):
        if not batch["mask"][i]:
            continue
        x = batch["obs"][i]
        advantage = (batch["advantage"][i] - kept.mean()) / (kept.std() + 1e-8)
        out = x @ theta["w"] + theta["b"]
        if gaussian:  # ravel_pytree sorts the names: b, log_std, w
            z = (batch["action"][i] - out) / np.exp(theta["log_std"])
            score = np.concatenate(
                [
                    z / np.exp(theta["log_std"]),
                    z**2 - 1,
                    np.outer(x, z / np.exp(theta["log_std"])).ravel(),
                ]
            )
            fisher_of_output = np.diag(np.exp(-2 * theta["log_std"]))
        else:
            p = np.exp(out) / np.exp(out).sum()
            score_of_output = np.eye(A)[batch["action"][i]] - p
            score = np.concatenate([score_of_output, np.outer(x, score_of_output).ravel()])
            fisher_of_output = np.diag(p) - np.outer(p, p)
        jacobian = np.concatenate(
            [
                np.eye(A),
                *([np.zeros((A, A))] if gaussian else []),
                *(x[k] * np.eye(A) for k in range(F)),
            ]
        )
        fisher_of_state = jacobian @ fisher_of_output @ jacobian.T
        if gaussian:
            fisher_of_state[A : 2 * A, A : 2 * A] += 2 * np.eye(A)
        gradient.append(advantage * score)
        fisher.append(fisher_of_state)
    return np.mean(gradient, 0), np.mean(fisher, 0)


def numpy_step(theta, batch, config, gaussian):
    """Appendix C with dense matrices: parameter vector, number of backtracking steps, and KL."""
    gradient, fisher = numpy_gradient_and_fisher(theta, batch, gaussian)
    matrix = fisher + config.cg_damping * np.eye(len(gradient))
    x = np.zeros_like(gradient)
    r = gradient.copy()
    d = r.copy()
    for _ in range(config.cg_iterations):
        fisher_direction = matrix @ d
        step_size = (r @ r) / (d @ fisher_direction)
        x = x + step_size * d
        residual_norm_sq = r @ r
        r = r - step_size * fisher_direction
        d = r + (r @ r) / residual_norm_sq * d
    full_step = np.sqrt(2 * config.max_kl / (x @ matrix @ x))
    start, rebuild = flat(jax.tree.map(jnp.asarray, theta))
    start = np.asarray(start)
    kept = batch["advantage"][batch["mask"]]

    def surrogate_and_kl(vector):
        new = jax.tree.map(np.asarray, rebuild(jnp.asarray(vector)))
        values = []
        for i in np.ndindex(T, B):
            if batch["mask"][i]:
                log_prob = numpy_policy(new, batch["obs"][i], batch["action"][i], gaussian)[0]
                advantage = (batch["advantage"][i] - kept.mean()) / (kept.std() + 1e-8)
                values.append(
                    (
                        np.exp(log_prob - batch["log_prob"][i]) * advantage,
                        numpy_kl(theta, new, batch["obs"][i], gaussian),
                    )
                )
        return np.mean(values, 0)

    before = surrogate_and_kl(start)[0]
    for num_backtracks in range(config.line_search_steps):
        vector = start + full_step * config.line_search_shrink**num_backtracks * x
        after, kl = surrogate_and_kl(vector)
        if kl <= config.max_kl and after > before:
            return vector, num_backtracks, kl
    return start, config.line_search_steps, 0.0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize(("max_kl", "iterations", "damping"), [(0.01, 10, 0.02), (0.1, 6, 1e-5)])
def test_a_step_equals_an_independent_calculation(gaussian, max_kl, iterations, damping):
    config = CONFIG.replace(max_kl=max_kl, cg_iterations=iterations, cg_damping=damping)
    params = parameters(gaussian)
    theta = jax.tree.map(np.asarray, params["policy"])
    backtracks = set()
    for seed in range(12):
        batch = on_policy(random_batch(seed, gaussian), gaussian)
        expected, num_backtracks, kl = numpy_step(theta, batch, config, gaussian)
        new, _, metrics = compiled(gaussian)(config, params, arrays(batch))
        np.testing.assert_allclose(flat(new["policy"])[0], expected, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(metrics["approx_kl"], kl, rtol=1e-6)
        np.testing.assert_allclose(
            metrics["step_fraction"], 0.8**num_backtracks if num_backtracks < 10 else 0, rtol=1e-9
        )
        backtracks.add(num_backtracks)
    assert max_kl == 0.01 or max(backtracks) > 0  # otherwise the line search would not be tested


def test_the_constraint_holds_on_a_thousand_random_batches():
    """Random combinations of bounds and advantage scales, in one vmapped call."""
    params = parameters()
    rng = np.random.default_rng(0)
    policy = jax.tree.map(np.asarray, params["policy"])
    max_kl = rng.choice([1e-4, 0.01, 0.3], 1000).astype(np.float32)
    scale = rng.choice([1e-3, 1.0, 1e4], 1000)
    batches = [on_policy(random_batch(seed)) for seed in range(1000)]
    for batch, factor in zip(batches, scale, strict=True):
        batch["advantage"] *= factor
    config = CONFIG.replace(max_kl=max_kl, normalize_advantage=False)
    step = jax.jit(jax.vmap(compiled(), in_axes=(config.axes("max_kl"), None, 0)))
    new, _, metrics = step(
        config, params, jax.tree.map(lambda *x: np.stack(x), *map(arrays, batches))
    )
    policies, failed = jax.tree.map(np.asarray, (new["policy"], metrics["line_search_failed"]))
    for i, batch in enumerate(batches):
        theta = jax.tree.map(lambda x, i=i: x[i], policies)
        if failed[i]:
            jax.tree.map(np.testing.assert_array_equal, theta, policy)
        else:
            kl = np.mean([numpy_kl(policy, theta, x, False) for x in batch["obs"][batch["mask"]]])
            assert 0 < kl <= max_kl[i] * (1 + 1e-3) + 1e-6
    assert failed.mean() < 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"advantage": np.zeros((T, B))},
        {"advantage": np.full((T, B), np.nan)},
        {"mask": np.zeros((T, B), bool)},
    ],
)
def test_without_an_admissible_step_the_policy_stays_and_the_metrics_report_it(change):
    params = parameters()
    new, _, metrics = compiled()(CONFIG, params, arrays(on_policy(random_batch(1)) | change))
    jax.tree.map(np.testing.assert_array_equal, new["policy"], params["policy"])
    assert (metrics["line_search_failed"], metrics["step_fraction"], metrics["approx_kl"]) == (
        1,
        0,
        0,
    )
    _, _, metrics = compiled()(CONFIG, params, arrays(on_policy(random_batch(1))))
    assert metrics["line_search_failed"] == 0 and metrics["step_fraction"] > 0


def test_policy_and_value_are_fitted_separately():
    params = parameters()
    batch = arrays(on_policy(random_batch(2)))
    new = compiled()(CONFIG, params, batch)[0]
    other_targets = compiled()(CONFIG, params, batch._replace(target=batch.target + 5))[0]
    jax.tree.map(np.testing.assert_array_equal, new["policy"], other_targets["policy"])
    other_advantages = compiled()(CONFIG, params, batch._replace(advantage=-batch.advantage))[0]
    jax.tree.map(np.testing.assert_array_equal, new["value"], other_advantages["value"])
    assert (new["policy"]["w"] != other_advantages["policy"]["w"]).any()
    assert (new["value"]["w"] != other_targets["value"]["w"]).any()


@pytest.mark.usefixtures("x64")
def test_a_subsampled_fisher_matrix_is_that_of_one_sample_in_k():
    config = CONFIG.replace(fisher_subsample=2, max_kl=1e-6, cg_iterations=40, cg_damping=0.1)
    params = parameters()
    batch = on_policy(random_batch(3, masked=False))
    theta = jax.tree.map(np.asarray, params["policy"])
    numbered_batch = as_sequences(arrays(batch | {"value": np.arange(T * B).reshape(T, B)}))
    key_policy, _ = jax.random.split(jax.random.key(0))  # as the update splits its key
    rows = np.asarray(
        jax.jit(subsample_sequences, static_argnums=0)(2, key_policy, numbered_batch).value
    ).ravel()
    assert len(set(rows.tolist())) == (T * B + 1) // 2
    gradient, full_fisher = numpy_gradient_and_fisher(theta, batch, False)
    subsample = batch | {"mask": np.isin(np.arange(T * B), rows).reshape(T, B)}
    _, subsampled_fisher = numpy_gradient_and_fisher(theta, subsample, False)
    new = compiled()(config, params, arrays(batch))[0]
    change = np.asarray(flat(new["policy"])[0] - flat(params["policy"])[0])
    expected, other = (
        np.linalg.solve(matrix + 0.1 * np.eye(len(gradient)), gradient)
        for matrix in (subsampled_fisher, full_fisher)
    )
    np.testing.assert_allclose(
        change / np.linalg.norm(change), expected / np.linalg.norm(expected), atol=1e-6
    )
    assert np.abs(expected / np.linalg.norm(expected) - other / np.linalg.norm(other)).max() > 1e-3


@pytest.mark.usefixtures("x64")
def test_the_value_function_takes_gradient_steps_on_its_own_loss():
    config = CONFIG.replace(num_epochs=1, num_minibatches=1)
    params = parameters()
    batch = random_batch(4)
    new, _, metrics = compiled()(config, params, arrays(batch))
    theta = jax.tree.map(np.asarray, params["value"])
    x = batch["obs"][batch["valid"]]
    error = x @ theta["w"] + theta["b"] - batch["target"][batch["valid"]]
    close(metrics["value_loss"], 0.5 * np.mean(error**2))
    # Plain gradient descent with rate 0.1.
    close(new["value"]["w"], theta["w"] - 0.1 * np.mean(error[:, None] * x, 0))
    close(new["value"]["b"], theta["b"] - 0.1 * np.mean(error))


@pytest.mark.usefixtures("x64")
def test_the_surrogate_has_the_policy_gradient_at_the_old_policy():
    """As for PPO (test_objectives.py): one iteration of conjugate gradient moves along it."""
    config = CONFIG.replace(cg_iterations=1, normalize_advantage=False)
    raw = on_policy(random_batch(5))
    params = parameters()
    batch = arrays(raw)

    def actor_critic(policy):
        distribution, _ = linear_model(False, A).unroll(
            params | {"policy": policy}, (), batch.obs, batch.reset
        )
        return (
            jnp.where(batch.mask, distribution.log_prob(batch.action) * batch.advantage, 0).sum()
            / batch.mask.sum()
        )

    gradient = np.asarray(flat(jax.grad(actor_critic)(params["policy"]))[0])
    new, _, metrics = compiled()(config, params, batch)
    change = np.asarray(flat(new["policy"])[0] - flat(params["policy"])[0])
    close(metrics["grad_norm"], np.linalg.norm(gradient))
    close(change / np.linalg.norm(change), gradient / np.linalg.norm(gradient), rtol=1e-7)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shared_trunk": True}, "set shared_trunk=False"),
        ({"ent_coef": 0.01}, "ent_coef=0"),
        ({"objective": "fixed_kl"}, "algorithm='ppo'"),
        ({"early_stop_kl": 0.1}, "algorithm='ppo'"),
        ({"clip_value": True}, "algorithm='ppo'"),
    ],
)
def test_settings_that_trpo_does_not_support_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        make_train(CONFIG.replace(**changes), counter())


def test_a_model_with_a_shared_trunk_is_refused():
    model = mlp_actor_critic(
        counter().observation_space, DISCRETE, hidden_sizes=(3,), shared_trunk=True
    )
    with pytest.raises(ConfigError, match="'policy' and 'value' only"):
        jax.eval_shape(make_train(CONFIG, counter(), model), jax.random.key(0))
