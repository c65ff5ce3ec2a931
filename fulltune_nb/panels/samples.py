"""Answers to some prompts, taken again and again while a model learns."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fulltune_nb.errors import ConfigError, FulltuneError
from fulltune_nb.html import NO_MATH, cut, more, scrolling, table
from fulltune_nb.panels.loop import TrainLoop, let_go
from fulltune_nb.settings import whole_number

KEPT = 2000
_PROMPTS, _STEPS = 30, 8  # rows and columns of the table
_ANSWER_CHARACTERS = 600  # of an answer that are shown
_FIELD_CHARACTERS = 20_000
LINE_BREAK = "⏎"
"""Stands for a line break within a prompt, where a field has one prompt a line."""


@dataclass(frozen=True)
class Sample:
    """One answer."""

    step: int
    """Optimizer steps taken before it."""
    prompt: str
    answer: str
    """As far as it went: to its end, to `max_tokens`, or to where a pause cut it off."""


class Samples:
    """The prompts of one trainer and what the model has answered so far; all its panels share them: `loop.shared(Samples)`.

    Attributes:
        prompts: texts. Where the data are chats or completions, each is asked as a user's message; with plain text it is continued.
        every: steps from one taking to the next, beginning before the first step; 0 for never.
        max_tokens: tokens of an answer at most.
        rows: the answers, oldest first; the latest 2,000.
        dropped: answers before these, which are no longer kept.
        wanted: whether they are to be answered at the next opportunity.
        version: grows with every change of what is above.
    """

    def __init__(self, loop: TrainLoop):
        self._loop = loop
        self.prompts: tuple[str, ...] = ()
        self.every = 0
        self.max_tokens = 64
        self.rows: deque[Sample] = deque(maxlen=KEPT)
        self.dropped = 0
        self.wanted = False
        self.version = 0
        self._last_step = -1
        loop.between_steps.append(self.take_when_due)

    def set(self, prompts: Sequence[str] | None = None, every: int | None = None, max_tokens: int | None = None) -> None:
        """Changes what is given.

        Raises:
            ConfigError: prompts that are no texts, or numbers out of range.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts or ()):
            raise ConfigError(f"prompts: expected a list of texts, got {prompts!r:.80}.")
        every = self.every if every is None else whole_number("sample_every", every)
        max_tokens = self.max_tokens if max_tokens is None else whole_number("max_tokens", max_tokens, 1)
        self.prompts = self.prompts if prompts is None else tuple(prompt for prompt in prompts if prompt.strip())
        self.every, self.max_tokens, self.version = every, max_tokens, self.version + 1

    def go_on_from(self, other: Samples) -> None:
        """Takes over prompts, settings and answers, of a trainer that this one's goes on from."""
        self.set(other.prompts, other.every, other.max_tokens)
        self.rows.extend(other.rows)
        self.dropped, self._last_step = other.dropped, other._last_step

    @property
    def prompts_text(self) -> str | None:
        """The prompts one a line, as a text field holds them, `LINE_BREAK` for a line break within one.

        None where it cannot: that sign itself in a prompt, or 20,000 characters.
        """
        text = "\n".join(prompt.replace("\n", LINE_BREAK) for prompt in self.prompts)
        return text if len(text) < _FIELD_CHARACTERS and not any(LINE_BREAK in prompt for prompt in self.prompts) else None

    async def take_when_due(self, loop: TrainLoop) -> None:
        """Answers all prompts if it is time, letting go of the event loop after every piece. A pause cuts it off."""
        step = loop.trainer.step_count
        due = self.wanted or (self.every > 0 and step % self.every == 0 and step != self._last_step)
        if not due or not self.prompts:
            return
        for _ in self._answer_all():
            await let_go()
            if loop.pausing:
                return

    def take(self) -> list[Sample]:
        """Answers all prompts here and now."""
        for _ in self._answer_all():
            pass
        return list(self.rows)[-len(self.prompts) :] if self.prompts else []

    def _answer_all(self) -> Iterator[None]:
        """Yields after every piece of text; the answer is in `rows` from its first piece on."""
        self.wanted, self._last_step = False, self._loop.trainer.step_count
        with self._loop.trainer.now_doing("answering samples"):
            yield from self._answers()

    def _answers(self) -> Iterator[None]:
        for prompt in self.prompts:
            step, answer = self._loop.trainer.step_count, ""
            self.dropped += len(self.rows) == KEPT
            self.rows.append(Sample(step, prompt, answer))
            try:
                stream = self._stream(prompt)
                for piece in getattr(stream, "steps", stream):  # which let go while a long prompt is read
                    answer += piece
                    self._replace_last(Sample(step, prompt, answer))
                    yield
            except FulltuneError as error:  # a prompt that cannot be used must not end the run
                self._replace_last(Sample(step, prompt, f"{answer}[{type(error).__name__}: {error}]"))
                yield

    def _replace_last(self, sample: Sample) -> None:
        self.rows[-1] = sample
        self.version += 1

    def _stream(self, prompt: str) -> Iterator[str]:
        trainer, settings = self._loop.trainer, {"max_tokens": self.max_tokens, "temperature": 0.0}
        if trainer.data.train.format == "text":
            return trainer.lm.stream(prompt, **settings)
        return trainer.lm.stream_chat([{"role": "user", "content": prompt}], **settings)

    def to_html(self, most_prompts: int = _PROMPTS, most_steps: int = _STEPS) -> str:
        """A table with a row for each prompt, those of now first, and a column for each step, the newest first."""
        if not self.rows:
            return f'<div class="{NO_MATH}">no samples yet</div>'
        answers = {(sample.prompt, sample.step): sample.answer for sample in self.rows}
        prompts = list(dict.fromkeys([*self.prompts, *(prompt for prompt, _ in reversed(answers))]))
        steps = sorted({step for _, step in answers}, reverse=True)
        rows = [
            (cut(prompt), *(cut(answers.get((prompt, step), ""), _ANSWER_CHARACTERS) for step in steps[:most_steps]))
            for prompt in prompts[:most_prompts]
        ]
        headers = ("prompt", *(f"step {step:,}" for step in steps[:most_steps]))
        shown = scrolling(table(headers, rows, "Samples, newest first", least_width="9em"), "samples")
        hidden = more(len(prompts) - most_prompts, "prompts") + more(len(steps) - most_steps, "steps before these")
        return f"{shown}{hidden}{more(self.dropped, 'answers, no longer kept')}"


def prompts_of(text: str) -> list[str]:
    """The prompts of a text that has one a line, `LINE_BREAK` for a line break within one."""
    return [line.replace(LINE_BREAK, "\n") for line in text.split("\n")]
