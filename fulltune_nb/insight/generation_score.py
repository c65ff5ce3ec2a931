"""Scoring what a model writes: answers to the rows of a split, each judged by a metric, with the wrong ones to look at."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import regex

from fulltune_nb.data.example import Example
from fulltune_nb.data.rows import content_text
from fulltune_nb.errors import ConfigError, DataError, listed
from fulltune_nb.frames import frame
from fulltune_nb.html import NO_MATH, counted, cut, table
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.settings import whole_number
from fulltune_nb.training.callbacks import Attachable

if TYPE_CHECKING:
    from fulltune_nb.plots import Axes

Metric = str | Callable[..., Any]
_SHOWN = 20  # wrong answers in a cell
_CHARACTERS = 600  # of a text there
_KEYS = {"prompt": "prompt", "completion": "completion", "chat": "messages"}


@dataclass(frozen=True)
class ScoredAnswer:
    """One row, the model's answer, and what it is worth."""

    source: str
    prompt: str
    expected: str
    answer: str
    score: float
    """0 to 1 with the metrics that have a name; with an own function what it gave."""
    note: str = ""
    """Why it could not be judged; such an answer counts 0."""


class GenerationReport:
    """What `evaluate_generation` returns.

    Attributes:
        answers: a `ScoredAnswer` for each row, in their order.
        metric: its name.
        seconds: wall-clock time, judging included.
        step: optimizer steps before it, where a callback took it; else None.
    """

    def __init__(self, answers: Sequence[ScoredAnswer], metric: str, seconds: float, step: int | None = None):
        self.answers, self.metric, self.seconds, self.step = list(answers), metric, seconds, step

    @property
    def score(self) -> float:
        """Mean over the answers."""
        return sum(answer.score for answer in self.answers) / len(self.answers)

    @property
    def wrong(self) -> list[ScoredAnswer]:
        """Answers that got less than 1."""
        return [answer for answer in self.answers if not answer.score >= 1]

    def to_frame(self) -> Any:
        """A pandas DataFrame with a line for each row. Raises `MissingDependencyError` without pandas."""
        return frame((vars(answer) for answer in self.answers), list(ScoredAnswer.__dataclass_fields__))

    def plot(self, ax: Axes | None = None) -> Axes:
        """The scores, from the best to the worst, on `ax` or a new figure."""
        from fulltune_nb.plots import curves

        scores = sorted((answer.score for answer in self.answers), reverse=True)
        title = f"mean {self.score:.3f} of {len(scores):,} answers"
        return curves([(self.metric, range(1, len(scores) + 1), scores)], "answers, the best first", self.metric, title, ax=ax)

    def __repr__(self) -> str:
        at = "" if self.step is None else f"step {self.step}, "
        return f"GenerationReport({at}{self.metric} {self.score:.4f}, {len(self.wrong):,} of {len(self.answers):,} below 1)"

    def _repr_html_(self) -> str:
        short = partial(cut, limit=_CHARACTERS)
        rows = [
            (a.source, short(a.prompt), short(a.expected), short(a.answer), f"{a.score:.3g}", short(a.note)) for a in self.wrong[:_SHOWN]
        ]
        more = f"; the first {_SHOWN} of them" if len(self.wrong) > _SHOWN else ""
        caption = f"{self.metric}: {self.score:.1%} over {len(self.answers):,} answers; {len(self.wrong):,} below 1{more}"
        return f'<div class="{NO_MATH}">{table(("row", "prompt", "expected", "answer", "score", "note"), rows, caption)}</div>'


def evaluate_generation(
    lm: LanguageModel,
    rows: Any,
    metric: Metric = "exact_match",
    max_tokens: int = 256,
    batch_size: int = 32,
    features: Mapping[str, str] | None = None,
    **settings: Any,
) -> GenerationReport:
    """Has a model answer rows, and judges each answer.

    Args:
        lm: the model.
        rows: a split of chats or completions, such as `data.test`; examples of one; or dicts with a prompt and a completion, or
            with messages. The last turn, which must be the assistant's, is what is expected; all before it is asked.
        metric: `"exact_match"` (blanks at both ends aside), `"contains"` (the answer holds what is expected), `"regex"` (what is
            expected is a pattern that must match the whole answer; a pattern that takes longer than a second counts 0 and is noted),
            or a function of (answer, expected), or of (answer, expected, row), that gives a number or True or False.
        max_tokens: of an answer.
        batch_size: answers written side by side.
        features: other keys than `{"prompt": "prompt", "completion": "completion", "chat": "messages"}`, as `load_data` was given.
        settings: further ones of `lm.generate`, by name.

    Raises:
        DataError: rows that hold no answer, such as plain text, or none at all.
        ConfigError: an unknown metric, or a function that gives something else than a number.
        GenerationError: a setting that cannot be used.
    """
    judge = _judge(metric)
    questions = [_question(row, number, features or {}) for number, row in enumerate(_listed(rows))]
    if not questions:
        raise DataError("evaluate_generation: expected at least one row, got none.")
    started = time.perf_counter()
    tools = [question.row.get("tools") for question in questions]
    texts = lm.chat_many([question.messages for question in questions], batch_size, tools, max_tokens=max_tokens, **settings)
    answers = [
        ScoredAnswer(question.source, question.prompt, question.expected, text, *judge(text, question.expected, question.row))
        for question, text in zip(questions, texts, strict=True)
    ]
    return GenerationReport(answers, metric if isinstance(metric, str) else _name(metric), time.perf_counter() - started)


class GenerationScore(Attachable):
    """`evaluate_generation` at every evaluation of a run, as a callback: `trainer.run(callbacks=[GenerationScore(data.valid[:50])])`.

    `attach(trainer)` does so whoever takes the steps: for panels and notebooks.

    Attributes:
        reports: a `GenerationReport` for each, the oldest first.
    """

    def __init__(self, rows: Any, metric: Metric = "exact_match", every: int | None = None, **settings: Any):
        """
        Args:
            rows, metric: as in `evaluate_generation`.
            every: steps from one to the next, in place of the run's own evaluations on the validation split.
            settings: further ones of `evaluate_generation`.

        Raises:
            ConfigError, DataError: as there, at once.
        """
        _judge(metric)
        self.rows, self.metric, self.settings = _listed(rows), metric, settings
        for number, row in enumerate(self.rows):
            _question(row, number, settings.get("features") or {})
        self.every = None if every is None else whole_number("every", every, low=1)
        self.reports: list[GenerationReport] = []

    def on_step(self, trainer: Any, report: Any) -> None:
        """See `Trainer.run`."""
        if self.every is not None and report.step % self.every == 0 and self._is_new(report.step):
            self._take(trainer)

    def on_eval(self, trainer: Any, report: Any) -> None:
        """See `Trainer.run`."""
        if self.every is None and report.split == "valid" and self._is_new(report.step):
            self._take(trainer)

    def _is_new(self, step: int) -> bool:
        return not self.reports or self.reports[-1].step != step

    def _take(self, trainer: Any) -> None:
        report = evaluate_generation(trainer.lm, self.rows, self.metric, **self.settings)
        report.step = trainer.step_count
        self.reports.append(report)
        trainer.event("generation", f"{report.metric} {report.score:.4f} over {len(report.answers):,} answers")

    def to_frame(self) -> Any:
        """A pandas DataFrame with a line for each row and step. Raises `MissingDependencyError` without pandas."""
        lines = ({"step": report.step, **vars(answer)} for report in self.reports for answer in report.answers)
        return frame(lines, ["step", *ScoredAnswer.__dataclass_fields__])

    def plot(self, ax: Axes | None = None) -> Axes:
        """The score over the steps, on `ax` or a new figure."""
        from fulltune_nb.plots import curves

        name = self.metric if isinstance(self.metric, str) else _name(self.metric)
        return curves([(name, [r.step for r in self.reports], [r.score for r in self.reports])], "optimizer step", name, ax=ax)

    def __repr__(self) -> str:
        last = f", the last {self.reports[-1].score:.4f}" if self.reports else ""
        return f"GenerationScore({counted(len(self.reports), 'report')}{last})"

    def _repr_html_(self) -> str:
        rows = [(report.step, f"{report.score:.4f}", len(report.wrong), f"{report.seconds:.1f}") for report in self.reports]
        if not self.reports:
            return "<div>No answers yet: they are asked for whenever validation is due (steps_per_eval), and at the end.</div>"
        last = self.reports[-1]._repr_html_()
        return f'<div class="{NO_MATH}">{table(("step", "score", "below 1", "seconds"), rows, "Answers while training")}{last}</div>'


# -- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Question:
    source: str
    messages: list[Mapping[str, Any]]
    expected: str
    row: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        """For the table: the last turn before the answer."""
        return content_text(self.messages[-1].get("content")) or ""


def _listed(rows: Any) -> list[Any]:
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        hint = " Pass one of its splits, such as data.test." if hasattr(rows, "splits") else ""
        raise ConfigError(f"rows: expected a split or a list of rows, got {type(rows).__name__}.{hint}")
    return list(rows)


def _question(row: Any, number: int, features: Mapping[str, str]) -> _Question:
    prompt, completion, chat = (features.get(name, key) for name, key in _KEYS.items())
    source, values = (row.source, row.row) if isinstance(row, Example) else (f"rows:{number + 1}", row)
    if not isinstance(values, Mapping):
        raise DataError(f"{source}: expected an example or a dict, got {type(values).__name__}.")
    messages = values.get(chat)
    if messages is None and isinstance(values.get(prompt), str) and isinstance(values.get(completion), str):
        messages = [{"role": "user", "content": values[prompt]}, {"role": "assistant", "content": values[completion]}]
    if not isinstance(messages, Sequence) or len(messages) < 2 or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(
            f"{source}: expected a prompt and a completion, or messages that end with the assistant's; the row has "
            f"{listed([repr(key) for key in values], 8) or 'nothing'}. Plain text has no answer to compare with."
        )
    last = messages[-1]
    answer = content_text(last.get("content"))
    if last.get("role") != "assistant" or answer is None:
        raise DataError(f"{source}: the last message must be the assistant's, with a text; it is {last.get('role')!r}'s.")
    return _Question(source, list(messages[:-1]), answer, values)


# -- judging ----------------------------------------------------------------------------------------------------------

SECONDS = 1.0
"""Patterns come from data, and one can be written, by mistake or on purpose, that takes for ever."""
_LONGEST = 4000  # characters of a pattern: reading one takes time too, which nothing bounds


def full_match(pattern: str, text: str, seconds: float = SECONDS) -> tuple[float, str]:
    """1.0 where the pattern matches the whole text, blanks at its ends aside, else 0.0; and why it could not be tried, or "".

    Patterns are those of Python's `re` (of the `regex` package, which takes these); `.` matches line breaks too.
    """
    if len(pattern) > _LONGEST:
        return 0.0, f"the pattern has {len(pattern):,} characters, more than the {_LONGEST:,} that are tried"
    try:
        return float(regex.fullmatch(pattern, text.strip(), flags=regex.DOTALL, timeout=seconds) is not None), ""
    except TimeoutError:
        return 0.0, f"the pattern took longer than {seconds:g} s"
    except (regex.error, RecursionError, MemoryError, OverflowError) as error:
        return 0.0, f"the pattern cannot be used: {error}"


_Judge = Callable[[str, str, Mapping[str, Any]], tuple[float, str]]  # of answer, expected and row: the score, and why there is none
_METRICS: dict[str, _Judge] = {
    "exact_match": lambda answer, expected, row: (float(answer.strip() == expected.strip()), ""),
    "contains": lambda answer, expected, row: (float(expected.strip() in answer), ""),
    "regex": lambda answer, expected, row: full_match(expected, answer),
}


def _judge(metric: Metric) -> _Judge:
    if callable(metric):
        return _own(metric)
    if not isinstance(metric, str) or metric not in _METRICS:
        raise ConfigError(f"metric: expected {', '.join(map(repr, _METRICS))} or a function, got {metric!r}.")
    return _METRICS[metric]


def _own(metric: Callable[..., Any]) -> _Judge:
    try:
        places = [p for p in signature(metric).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        takes_row = len([p for p in places if p.default is p.empty]) >= 3
    except (TypeError, ValueError):  # a built-in function that does not tell
        takes_row = False

    def judge(answer: str, expected: str, row: Mapping[str, Any]) -> tuple[float, str]:
        score = metric(answer, expected, row) if takes_row else metric(answer, expected)
        try:
            return float(score), ""
        except (TypeError, ValueError):
            raise ConfigError(f"metric {_name(metric)}: expected a number, True or False, got {score!r:.80}.") from None

    return judge


def _name(metric: Callable[..., Any]) -> str:
    return getattr(metric, "__name__", type(metric).__name__)
