"""Judges of texts that the reward model does not know, and how well people and judges agree.

The gold judge learnt from other texts than the reward model, the second judge from other people
and other texts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from purejaxppo.rlhf.corpora import RatedSplits, RatedTexts, Reviews
from purejaxppo.rlhf.extra import import_extra
from purejaxppo.rlhf.preferences import Preference, comparisons, draw_ratings
from purejaxppo.types import ConfigError

NUM_DRAWS = 400_000  # the standard error of an accuracy is then below 0.001
RAREST_TERM = 5


class Judge(NamedTuple):
    """A function that gives each text a score; a higher score is a better text."""

    score: Callable[[Sequence[str]], NDArray[np.float64]]  # n texts -> [n]


def fit_gold_judge(texts: Sequence[str], mean_ratings: Float[np.ndarray, "n"]) -> Judge:
    """Ridge regression of the mean ratings on TF-IDF of words and of pieces of words.

    The features are one and two successive words, and 2 to 5 successive characters of a word, with
    1 + log(count) for the counts. The penalty is 1. Cross-validation on G chose these features:
    their accuracy is 0.743 there, that of words alone 0.729 and that of characters alone 0.733.
    """
    words = _tfidf(ngram_range=(1, 2))
    characters = _tfidf(analyzer="char_wb", ngram_range=(2, 5))
    features = _sklearn("pipeline").make_union(words, characters)
    model = _sklearn("linear_model").Ridge(1.0)
    _fit(features, model, texts, mean_ratings)
    return Judge(lambda texts: model.predict(features.transform(texts)))


def fit_second_judge(texts: Sequence[str], labels: Int[np.ndarray, "n"]) -> Judge:
    """Logistic regression of the labels 0 and 1 on TF-IDF of one and two successive words.

    Terms in fewer than ``RAREST_TERM`` texts are left out. The score is the log-odds of label 1.
    """
    features = _tfidf(ngram_range=(1, 2), min_df=RAREST_TERM)
    model = _sklearn("linear_model").LogisticRegression(C=3.0, solver="liblinear", random_state=0)
    _fit(features, model, texts, labels)
    return Judge(lambda texts: model.decision_function(features.transform(texts)))


def pairwise_accuracy(judge: Judge, preferences: Sequence[Preference]) -> float:
    """The share of preferences whose chosen text has the higher score; equal scores count half.

    The judge scores whole texts, prompt and completion.
    """
    if not preferences:
        raise ConfigError("there are no preferences: an accuracy needs at least one")
    pairs = [(x.prompt + x.chosen, x.prompt + x.rejected) for x in preferences]
    unique = sorted({text for pair in pairs for text in pair})
    score = dict(zip(unique, judge.score(unique).tolist(), strict=True))
    margin = np.array([score[chosen] - score[rejected] for chosen, rejected in pairs])
    return _accuracy(margin, np.ones(len(margin)))


def human_accuracies(rated: RatedTexts, seed: int = 0, n: int = NUM_DRAWS) -> dict[str, float]:
    """How often people are right about the comparison of one person's ratings of two texts.

    ``another human``: the sign of the difference of two other ratings of the same texts, drawn at
    random, where equal ratings count half. ``crowd``: the sign of the difference of the means of
    all other ratings, a ceiling for every judge of texts. Each text needs at least two ratings.
    """
    size = np.array([len(ratings) for ratings in rated.ratings])
    if size.min(initial=2) < 2:
        raise ConfigError(f"text {size.argmin()} has fewer than two ratings: agreement needs two")
    ratings = np.zeros((len(size), size.max(initial=2)))
    for i, individual in enumerate(rated.ratings):
        ratings[i, : len(individual)] = individual
    rng = np.random.default_rng(seed)
    draws = draw_ratings(rated, rng, n)

    def sample(text: NDArray, person: NDArray) -> NDArray:
        """One rating, another one, and the mean without the first, of each text [3, n]."""
        another = (person + rng.integers(1, size[text])) % size[text]
        rating = ratings[text, person]
        mean = (ratings.sum(axis=1)[text] - rating) / (size[text] - 1)
        return np.stack([rating, ratings[text, another], mean])

    first = sample(draws.first, draws.first_person)
    second = sample(draws.second, draws.second_person)
    truth, other, mean = first - second
    return {"another human": _accuracy(other, truth), "crowd": _accuracy(mean, truth)}


def judge_report(
    splits: RatedSplits, reviews: Reviews, seed: int = 0, n: int = NUM_DRAWS
) -> dict[str, float]:
    """Accuracies on T of people, of the ridge regression on P, and of both judges."""
    test = comparisons(splits.test, seed, n)
    ridge = fit_gold_judge(splits.preferences.texts, splits.preferences.mean_ratings)
    gold = fit_gold_judge(splits.gold.texts, splits.gold.mean_ratings)
    second = fit_second_judge(reviews.texts, reviews.labels)
    return human_accuracies(splits.test, seed, n) | {
        "ridge on P": pairwise_accuracy(ridge, test),
        "gold judge": pairwise_accuracy(gold, test),
        "second judge": pairwise_accuracy(second, test),
    }


def _accuracy(margin: NDArray, truth: NDArray) -> float:
    """The share of equal signs where ``truth`` is not 0; a margin of 0 counts half."""
    is_decided = truth != 0
    if not is_decided.any():
        raise ConfigError("all ratings that were drawn are equal: no text is preferred to another")
    return float(((1 + np.sign(margin) * np.sign(truth)) / 2)[is_decided].mean())


def _sklearn(module: str) -> Any:
    return import_extra(f"sklearn.{module}")


def _tfidf(**settings: Any) -> Any:
    return _sklearn("feature_extraction.text").TfidfVectorizer(sublinear_tf=True, **settings)


def _fit(features: Any, model: Any, texts: Sequence[str], target: NDArray) -> None:
    if len(texts) != len(target):
        raise ConfigError(f"there are {len(texts)} texts and {len(target)} numbers to learn")
    model.fit(features.fit_transform(texts), target)
