"""Judges learn what their texts say; accuracies equal hand-computed and enumerated values."""

import itertools

import numpy as np
import pytest
from sentences import sentence_of

from purejaxppo.rlhf import corpora
from purejaxppo.rlhf.corpora import RatedSplits, RatedTexts, Reviews
from purejaxppo.rlhf.judges import (
    RAREST_TERM,
    Judge,
    fit_gold_judge,
    fit_second_judge,
    human_accuracies,
    judge_report,
    pairwise_accuracy,
)
from purejaxppo.rlhf.preferences import Preference, comparisons

GOOD = ["good", "great", "lovely", "fine"]
BAD = ["bad", "awful", "dull", "poor"]
FILLERS = ["film", "plot", "cast", "score", "end"]


def rated_texts(seed, n=200):
    """Texts of two opinions and two fillers, rated +2 for each good and −2 for each bad word."""
    rng = np.random.default_rng(seed)
    texts = []
    ratings = []
    for _ in range(n):
        words = [*rng.choice(GOOD + BAD, 2), *rng.choice(FILLERS, 2)]
        quality = sum(2 if word in GOOD else -2 for word in words if word not in FILLERS)
        texts.append(" ".join(rng.permutation(words)))
        ratings.append(np.clip(quality + rng.integers(-1, 2, size=10), -4, 4))
    return RatedTexts(texts, ratings)


def test_the_gold_judge_learns_ratings():
    rated = rated_texts(0)
    judge = fit_gold_judge(rated.texts, rated.mean_ratings)
    test = rated_texts(1)
    scores = judge.score(test.texts)
    assert scores.shape == (200,) and scores.dtype == np.float64
    assert np.corrcoef(scores, test.mean_ratings)[0, 1] > 0.97
    better, worse = judge.score(["a goodish film", "a dullish film"])  # pieces of words
    assert better > worse
    again = fit_gold_judge(rated.texts, rated.mean_ratings)
    np.testing.assert_array_equal(again.score(test.texts), scores)


def test_the_gold_judge_is_a_ridge_regression():
    """In closed form: w = (XᵀX + I)⁻¹ Xᵀ(y − ȳ) on centred TF-IDF features of two texts.

    The texts have no word and no piece of a word in common, so X has orthonormal halves: each text
    is √2 long, and on the centred rows ±(x₁ − x₂)/2 the prediction is ȳ ± (y₁ − y₂)/2 · s/(1 + s)
    with s = |x₁ − x₂|²/2 = 2.
    """
    judge = fit_gold_judge(["aa bb", "cc dd"], np.array([3.0, -1.0]))
    np.testing.assert_allclose(judge.score(["aa bb", "cc dd"]), [1 + 4 / 3, 1 - 4 / 3], rtol=1e-3)


def test_the_second_judge_learns_labels():
    rated = rated_texts(2)
    is_clear = np.abs(rated.mean_ratings) > 1
    texts = list(itertools.compress(rated.texts, is_clear))
    labels = (rated.mean_ratings[is_clear] > 0).astype(int)
    judge = fit_second_judge(texts, labels)
    liked, disliked = judge.score(["good great film", "awful dull plot"])
    assert liked > 1 and disliked < -1
    assert np.mean((judge.score(texts) > 0) == labels) > 0.95


def test_the_second_judge_leaves_out_rare_terms():
    texts = ["good film"] * 6 + ["bad film"] * 6 + ["zzz film"] * (RAREST_TERM - 1)
    labels = np.array([1] * 6 + [0] * 6 + [1] * (RAREST_TERM - 1))
    judge = fit_second_judge(texts, labels)
    rare, unknown, good = judge.score(["zzz", "unseen", "good"])
    assert rare == unknown < good


def test_an_accuracy_counts_equal_scores_as_half():
    judge = Judge(lambda texts: np.array([float(len(text)) for text in texts]))
    pairs = [("aaa", "a"), ("a", "bb"), ("aa", "bb"), ("aaa", "bb")]
    preferences = [Preference("", chosen, rejected) for chosen, rejected in pairs]
    assert pairwise_accuracy(judge, preferences) == 2.5 / 4
    assert "there are no preferences" in sentence_of(lambda: pairwise_accuracy(judge, []))


def test_the_accuracies_of_people_equal_an_enumeration():
    ratings = [[0, 3, 1], [1, 2], [-1, 2, 2, -4]]
    rated = RatedTexts(["a", "b", "c"], [np.array(x) for x in ratings])
    total = {"another human": 0.0, "crowd": 0.0}
    decided = 0.0
    for first, second in itertools.permutations(ratings, 2):
        chance = 1 / (len(first) * len(second))
        for i, j in itertools.product(range(len(first)), range(len(second))):
            truth = np.sign(first[i] - second[j])
            rest = [np.delete(first, i), np.delete(second, j)]
            if truth:
                decided += chance
                signs = np.sign(np.subtract.outer(*rest)) * truth
                total["another human"] += chance * (1 + signs.mean()) / 2
                mean = np.sign(rest[0].mean() - rest[1].mean())
                total["crowd"] += chance * (1 + truth * mean) / 2
    accuracies = human_accuracies(rated, n=200_000)
    for name, value in total.items():
        assert accuracies[name] == pytest.approx(value / decided, abs=0.005)
    assert accuracies == human_accuracies(rated, n=200_000) != human_accuracies(rated, 1, 200_000)


def test_a_report_has_people_and_judges():
    splits = RatedSplits(rated_texts(0), rated_texts(1), rated_texts(2))
    liked = splits.gold.mean_ratings > 0
    reviews = Reviews(splits.gold.texts, liked.astype(int))
    report = judge_report(splits, reviews, n=20_000)
    assert list(report) == ["another human", "crowd", "ridge on P", "gold judge", "second judge"]
    judge = fit_gold_judge(splits.gold.texts, splits.gold.mean_ratings)
    expected = pairwise_accuracy(judge, comparisons(splits.test, 5, 20_000))
    assert report["gold judge"] == pytest.approx(expected, abs=0.01)
    assert report["crowd"] > report["gold judge"] - 0.01 > 0.85
    assert report["crowd"] > report["another human"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: fit_gold_judge(["a b"], np.array([1.0, 2.0])),
            "there are 1 texts and 2 numbers to learn",
        ),
        (
            lambda: human_accuracies(RatedTexts(["a", "b"], [np.array([1, 2]), np.array([1])])),
            "text 1 has fewer than two ratings",
        ),
        (
            lambda: human_accuracies(RatedTexts(["a", "b"], [np.array([1, 1])] * 2)),
            "all ratings that were drawn are equal",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(make, sentence):
    assert sentence in sentence_of(make)


@pytest.mark.learning
def test_people_and_judges_on_the_published_ratings(tmp_path, monkeypatch):
    """The seed is fixed; standard errors of the draws are below 0.001."""
    monkeypatch.setenv("PUREJAXPPO_CACHE", str(tmp_path))
    splits = corpora.split_ratings(corpora.load_ratings())
    report = judge_report(splits, corpora.load_reviews())
    assert report["another human"] == pytest.approx(0.825, abs=0.01)
    assert report["crowd"] == pytest.approx(0.885, abs=0.01)
    assert report["ridge on P"] > 0.74
    assert report["gold judge"] > 0.74
    assert report["second judge"] > 0.72
