"""Answers are judged as said, wrong ones can be seen, and no pattern from the data can hold the kernel up."""

from __future__ import annotations

import time

import pytest

import fulltune_nb as ft
from fulltune_nb.insight import GenerationScore
from fulltune_nb.insight.generation_score import full_match
from nbs_tests.insight.conftest import HOSTILE, assert_harmless


class Parrot:
    """Answers with what stands in the last message, in place of a model."""

    def __init__(self):
        self.asked, self.tools = [], []

    def chat_many(self, conversations, batch_size=32, tools=None, **settings):
        self.asked += conversations
        self.tools += tools
        return [conversation[-1]["content"] for conversation in conversations]


def rows(*pairs):
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


METRICS = [
    ("exact_match", ("a b", "a b"), 1), ("exact_match", (" a\n", "a"), 1), ("exact_match", ("A", "a"), 0),
    ("contains", ("so: 42.", "42"), 1), ("contains", ("41", "42"), 0),
    ("regex", ("42 rows", r"\d+ rows?"), 1), ("regex", ("42 rows!", r"\d+ rows?"), 0), ("regex", ("a\nb", "a.b"), 1),
    (lambda answer, expected: len(answer) / len(expected), ("ab", "abcd"), 0.5),
    (lambda answer, expected, row: row["prompt"] == answer, ("ab", "x"), 1),
]


@pytest.mark.parametrize("metric, pair, score", METRICS)
def test_metrics_judge_as_they_say(metric, pair, score):
    assert ft.evaluate_generation(Parrot(), rows(pair), metric).score == score


def test_conversations_are_asked_up_to_the_last_answer_with_their_tools():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "q"}]
    parrot = Parrot()
    report = ft.evaluate_generation(parrot, [{"messages": messages, "tools": ["t"]}, {"q": "x", "a": "y"}],
                                    features={"prompt": "q", "completion": "a"})
    assert parrot.asked == [messages[:-1], [{"role": "user", "content": "x"}]] and parrot.tools == [["t"], None]
    assert [answer.score for answer in report.answers] == [1, 0] and [answer.answer for answer in report.wrong] == ["x"]


def test_an_answer_in_parts_is_its_texts():
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    report = ft.evaluate_generation(Parrot(), [{"messages": [{"role": "user", "content": "ab"}, answer]}])
    assert report.answers[0].expected == "ab" and report.answers[0].score == 1


def test_a_real_model_answers_as_chat_does(make_trainer):
    trainer = make_trainer()
    report = ft.evaluate_generation(trainer.lm, trainer.data.test, max_tokens=4)
    assert [answer.answer for answer in report.answers] == [
        trainer.lm.chat([{"role": "user", "content": e.row["prompt"]}], max_tokens=4) for e in trainer.data.test
    ]
    assert [answer.source for answer in report.answers] == [example.source for example in trainer.data.test]


def test_tools_reach_the_template_of_each_conversation(make_lm, make_tokenizer):
    lm = make_lm()
    lm.tokenizer = make_tokenizer("{% if tools %}tools {% endif %}{{ messages[0]['content'] }}")
    user = [{"role": "user", "content": "rows"}]
    with_tools = lm.chat(user, tools=[{"name": "add"}], max_tokens=4)
    assert lm.chat_many([user, user], tools=[[{"name": "add"}], None], max_tokens=4) == [with_tools, lm.chat(user, max_tokens=4)]


HOSTILE_PATTERNS = [
    ("(((((a{1,99}){1,99}){1,99}){1,99}){1,99})", "a" * 300 + "b"), (r"(\w+\s?)*(\w+\s?)*(\w+\s?)*\1x", "word " * 400),
    ("(" * 1500 + ")" * 1500, "x"), ("[", "x"), ("a" * 10_000, "a"), ("(x+x+)+y", "x" * 9000),
]


@pytest.mark.parametrize("pattern, text", HOSTILE_PATTERNS)
def test_no_pattern_takes_long(pattern, text):
    started = time.process_time()
    score, note = full_match(pattern, text, seconds=0.3)
    assert time.process_time() - started < 2 and score == 0


def test_a_pattern_that_cannot_be_judged_says_why():
    report = ft.evaluate_generation(Parrot(), rows(("x", "["), ("x", "x")), "regex")
    assert report.score == 0.5 and "cannot be used" in report.wrong[0].note and "cannot be used" in report._repr_html_()


def test_what_cannot_be_scored_is_refused(make_data):
    for wrong, match in (([{"text": "a"}], "text"), ([], "at least one"), ([{"prompt": "a", "completion": None}], "completion"),
                         ([{"messages": [{"role": "user", "content": "a"}] * 2}], "assistant"), ([3], "int")):
        with pytest.raises(ft.DataError, match=match):
            ft.evaluate_generation(Parrot(), wrong)
    for arguments, match in (((make_data(3),), r"data\.test"), ((rows(("a", "a")), "bleu"), "bleu"),
                             ((rows(("a", "a")), lambda a, e: "yes"), "number")):
        with pytest.raises(ft.ConfigError, match=match):
            ft.evaluate_generation(Parrot(), *arguments)


def test_as_a_callback_it_scores_at_every_evaluation_and_says_so_in_the_history(make_trainer):
    trainer = make_trainer(iters=4, steps_per_eval=2)
    score = GenerationScore(trainer.data.test[:2], "contains", max_tokens=3)
    trainer.run(callbacks=[score])
    assert [report.step for report in score.reports] == [0, 2, 4]
    assert [event.step for event in trainer.history.events if event.kind == "generation"] == [0, 2, 4]
    assert len(score.to_frame()) == 6 and "3 reports" in repr(score)
    every = GenerationScore(trainer.data.test[:1], every=3, max_tokens=2)
    other = make_trainer(iters=6)
    other.run(callbacks=[every])
    assert [report.step for report in every.reports] == [3, 6]
    with pytest.raises(ft.DataError):
        GenerationScore([{"text": "a"}])


def test_before_the_first_evaluation_it_says_when_it_will_ask():
    score = GenerationScore([{"prompt": "a", "completion": "b"}])
    assert repr(score) == "GenerationScore(0 reports)" and "steps_per_eval" in score._repr_html_()


def test_scoring_does_not_change_the_run(make_trainer):
    scored, quiet = make_trainer(steps_per_eval=1, iters=3), make_trainer(steps_per_eval=1, iters=3)
    scored.run(callbacks=[GenerationScore(scored.data.test[:2], max_tokens=3, temperature=1.0)])
    quiet.run()
    assert [r.loss for r in scored.history.steps] == [r.loss for r in quiet.history.steps]


def test_wrong_answers_stand_beside_the_expected_ones_harmlessly():
    report = ft.evaluate_generation(Parrot(), rows((HOSTILE, "right"), *[("a", "b")] * 30))
    html = report._repr_html_()
    assert_harmless(html)
    assert "right" in html and "31 below 1; the first 20 of them" in html and len(report.to_frame()) == 31
    report.plot().figure.canvas.draw()
