"""Tasks of texts: records of the user, and film reviews from small corpora."""

import json
from functools import partial

import numpy as np
import pytest
from imported import as_imported
from sentences import sentence_of
from small_pipelines import JUDGE, records, text_settings

from purejaxppo.cli import commands
from purejaxppo.rlhf import corpora, tasks
from purejaxppo.rlhf.settings import PipelineSettings
from purejaxppo.rlhf.text_tasks import _held_out, records_task, reviews_task

SHOWN = ["The film was", "I think"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: _held_out(
                {"demonstrations": SHOWN, "preferences": ["I think", "Write a poem"]}
            ),
            "all 2 prompts of the preferences are held out: give more different prompts",
        ),
        *(
            (
                lambda name=name: records_task(text_settings(), *records(), judges={name: JUDGE}),
                f"a judge has the name {name}, which the report uses: rename it",
            )
            for name in ("kl", "iteration", "timesteps", "reward model")
        ),
        (
            lambda: as_imported(tasks).require_judges({"mine": len}),
            "the judge mine is a builtin_function_or_method: give Judge(score), with a function "
            "from texts to an array of scores",
        ),
        (
            lambda: records_task(PipelineSettings(), *records()),
            "task = 'reviews': the settings of records are PipelineSettings.of('records')",
        ),
        (
            lambda: records_task(text_settings(), *with_demonstration("this is", " so" * 40)),
            "the text 'this is so so so so so so so so so so so so so so so so so …' has 44 tokens "
            "with its start, and the context has 40: shorten it, or choose a longer context",
        ),
    ],
)
def test_what_makes_no_task_is_one_sentence(make, message):
    assert sentence_of(make) == message


def with_demonstration(prompt, completion):
    shown, judged = records()
    return [*shown, {"prompt": prompt, "completion": completion}], judged


def test_what_is_held_out_is_not_learnt_from():
    settings = text_settings()
    shown, judged = records()
    others = [{"prompt": f"prompt {i}"} for i in range(30)]
    task = records_task(settings, shown, judged, others)

    def prompts_of(texts):
        rows = zip(np.asarray(texts.tokens), np.asarray(texts.prompt_length), strict=True)
        return {task.decode(tokens[:length]) for tokens, length in rows}

    assert not prompts_of(task.demonstrations) & prompts_of(task.held_out)
    assert not prompts_of(task.pairs.chosen) & prompts_of(task.held_out_pairs.chosen)
    kinds = (task.prompts, task.held_out_prompts)
    train, held_out = ({task.decode(x) for x in kind.tokens} for kind in kinds)
    assert not train & held_out and len(train | held_out) == 30
    assert not prompts_of(task.demonstrations) & prompts_of(task.held_out_pairs.chosen)


def test_records_with_mistakes_name_file_and_line(tmp_path, capsys):
    shown, judged = records(4)
    demonstrations = tmp_path / "d.jsonl"
    preferences = tmp_path / "p.jsonl"
    demonstrations.write_text("\n".join(map(json.dumps, shown)))
    judged[2] = {"prompt": "this is", "chosen": "a"}
    preferences.write_text("\n".join(map(json.dumps, judged)))
    arguments = ["--demonstrations", str(demonstrations), "--preferences", str(preferences)]
    with pytest.raises(SystemExit) as exit_code:
        commands.main(["rlhf", *arguments, "--directory", str(tmp_path / "run")])
    assert exit_code.value.code == 2 and not (tmp_path / "run").exists()
    assert (
        capsys.readouterr().err == f"purejaxppo: {preferences}:3: the key 'rejected' is missing\n"
    )


def test_prompts_that_leave_no_room_are_refused():
    shown, judged = records()
    settings = text_settings()
    long = [{"prompt": "word " * 20}, {"prompt": "x"}]
    message = sentence_of(lambda: records_task(settings, shown, judged, long))
    assert message == (
        "the prompt 'word word word word word word word word word word word word…' has 101 tokens "
        "with its start, and the context has 40: "
        "shorten it, or choose a longer context"
    )


def small_corpora(monkeypatch):
    """Reviews and rated snippets about films, instead of the published ones."""
    rng = np.random.default_rng(0)
    subjects = ["the film", "this plot", "that cast", "our evening", "every scene", "the end"]
    opinions = {"good": 3, "lovely": 2, "fine": 1, "dull": -1, "poor": -2, "bad": -3}

    def sentences(n):
        chosen = [(rng.choice(subjects), rng.choice(list(opinions)), i) for i in range(n)]
        return [(f"{a} was {b} on day {i}.", opinions[b]) for a, b, i in chosen]

    rated = sentences(60)
    reviewed = sentences(80)
    ratings = [np.clip(quality + rng.integers(-1, 2, 6), -4, 4) for _, quality in rated]
    snippets = corpora.RatedTexts([text for text, _ in rated], ratings)
    labels = np.array([int(quality > 0) for _, quality in reviewed])
    reviews = corpora.Reviews([text for text, _ in reviewed], labels)
    monkeypatch.setattr(corpora, "load_ratings", lambda: snippets)
    monkeypatch.setattr(corpora, "load_reviews", lambda: reviews)
    sizes = partial(corpora.split_ratings, sizes=(30, 20, 10))
    monkeypatch.setattr(corpora, "split_ratings", sizes)
    held_out = partial(corpora.split_sentences, num_held_out=30)
    monkeypatch.setattr(corpora, "split_sentences", held_out)
    return corpora.split_ratings(snippets)


def test_film_reviews_give_sentences_ratings_comparisons_and_judges(monkeypatch):
    splits = small_corpora(monkeypatch)
    settings = PipelineSettings(vocab_size=300, context=24, max_new_tokens=6, num_comparisons=50)
    task = reviews_task(settings, num_held_out_prompts=5)

    def strings(texts):
        rows = zip(np.asarray(texts.tokens), np.asarray(texts.length), strict=True)
        return [task.decode(tokens[:length]) for tokens, length in rows]

    # Sentences: 50 to learn from, 30 held out, whose first words are the prompts.
    assert len(task.demonstrations.length) == 50 and len(task.held_out.length) == 30
    assert len(task.held_out_prompts.length) == 5
    starts = [text[:6] for text in strings(task.held_out)]
    for tokens, length in zip(*task.prompts, strict=True):
        assert task.decode(tokens[:length])[:6] in starts
    # P: every snippet once with all its ratings, cut at the context.
    assert len(task.ranked.rating) == 30 and task.ranked.rating.shape[1] == 6
    order = [splits.preferences.texts.index(text) for text in _whole(task, splits)]
    for i, snippet in enumerate(order):
        assert sorted(task.ranked.rating[i]) == sorted(splits.preferences.ratings[snippet])
    # Comparisons of P to learn from, of T to test with.
    assert len(task.pairs.margin) <= 50
    for text in strings(task.pairs.chosen):
        assert any(whole.startswith(text) for whole in splits.preferences.texts)
    for pair in task.held_out_preferences:
        assert {pair.chosen, pair.rejected} <= set(splits.test.texts)
    assert list(task.judges()) == ["gold", "second"]
    for judge in task.judges().values():
        assert np.subtract(*judge.score(["a lovely day.", "a bad day."])) > 0
    assert "nobody compared two snippets" in task.notes[0] and "cut there" in task.notes[1]


def _whole(task, splits):
    """The snippet of each rated text, which may be cut."""
    for tokens, length in zip(*task.ranked.texts[:2], strict=True):
        text = task.decode(tokens[:length])
        (whole,) = (x for x in splits.preferences.texts if x.startswith(text))
        yield whole
