"""The verifiable task: right answers, their reward, and the exact optimum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentences import sentence_of

from purejaxppo.rlhf import arithmetic

PROMPTS = arithmetic.make_prompts()


def text(row):
    return "".join(arithmetic.CHARACTERS[token] for token in row)


def test_every_prompt_has_its_sum_as_the_answer():
    right = np.asarray(arithmetic.answers(jnp.asarray(PROMPTS)))
    for prompt, answer in zip(PROMPTS, right, strict=True):
        a, b = text(prompt).rstrip("=").split("+")
        assert text(answer).rstrip(".") == str(int(a) + int(b))
    assert len({text(prompt) for prompt in PROMPTS}) == 10_000
    assert (right[:, -1] == arithmetic.END).all()


def test_a_share_of_the_demonstrations_has_another_digit():
    prompts = jnp.asarray(PROMPTS)
    right = np.asarray(arithmetic.answers(prompts))
    shown = np.asarray(arithmetic.demonstrations(jax.random.key(0), prompts))
    changed = (shown != right).sum(axis=1)
    assert set(changed) == {0, 1}
    share = 0.6 * 0.9  # a redrawn digit is the same in one of ten cases
    assert abs(changed.mean() - share) < 5 * np.sqrt(share * (1 - share) / 10_000)
    np.testing.assert_array_equal(shown == arithmetic.END, right == arithmetic.END)


@pytest.mark.parametrize(
    ("prompt", "answer", "reward"),
    [
        ("12+34=", "46.", 1),
        ("12+34=", "46", 0),  # two more tokens follow, none of them an end
        ("12+34=", "47.", 0),
        ("12+34=", "4.", 0),
        ("12+34=", ".", 0),
        ("99+99=", "198.", 1),
        ("99+99=", "1980", 0),
        ("03+04=", "7.", 1),
        ("03+04=", "07.", 0),
        ("00+00=", "0.", 1),
    ],
)
def test_the_score_is_1_for_a_right_answer_with_its_end(prompt, answer, reward):
    """Whatever follows the text; the tokens may be more than the longest text has."""
    given = [arithmetic.CHARACTERS.index(x) for x in prompt + answer]
    for filler in (0, arithmetic.END, 10**6):
        tokens = jnp.array([given + [filler] * (12 - len(given))])
        scores = arithmetic.score(tokens, jnp.array([len(given)]), None)
        assert scores.tolist() == [reward]
    assert arithmetic.decode(given) == (prompt + answer).split(".")[0]


def test_texts_end_with_their_first_end():
    prompts = jnp.asarray(PROMPTS[[0, 1234, 9999]])
    texts = arithmetic.as_texts(prompts, arithmetic.answers(prompts))
    assert texts.length.tolist() == [8, 9, 10] and texts.prompt_length.tolist() == [6, 6, 6]
    assert arithmetic.score(texts.tokens, texts.length, None).tolist() == [1, 1, 1]
    endless = arithmetic.as_texts(prompts, jnp.ones((3, 4), jnp.int32))
    assert endless.length.tolist() == [10, 10, 10]


@pytest.mark.usefixtures("x64")
def test_the_optimum_is_that_of_all_policies():
    """Of policies on three answers, one of them right, by brute force over a grid."""
    reference = np.array([0.2, 0.5, 0.3])
    grid = np.linspace(1e-6, 1 - 1e-6, 401)
    q, share = np.meshgrid(grid, grid, indexing="ij")
    policies = np.stack([q, (1 - q) * share, (1 - q) * (1 - share)])
    for beta in (0.1, 0.3, 2.0):
        kl = (policies * np.log(policies / reference[:, None, None])).sum(axis=0)
        objective = q - beta * kl
        best = np.unravel_index(objective.argmax(), objective.shape)
        expected_q, expected = arithmetic.optimum(jnp.asarray(0.2), beta)
        assert objective[best] == pytest.approx(float(expected), abs=1e-4)
        assert q[best] == pytest.approx(float(expected_q), abs=5e-3)
        assert objective.max() <= expected + 1e-12
    assert "beta = 0" in sentence_of(lambda: arithmetic.optimum(jnp.asarray(0.2), 0.0))
