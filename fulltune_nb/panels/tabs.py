"""The training panel's tab of callbacks: what those attached to the trainer have seen so far, such as what is forgotten."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import ipywidgets as widgets
import numpy as np

from fulltune_nb.data.encode import Example
from fulltune_nb.data.look import Lens
from fulltune_nb.errors import ConfigError, FulltuneError
from fulltune_nb.html import NO_MATH, PALETTE, cut, esc, table
from fulltune_nb.insight.losses import TokenLosses, token_losses
from fulltune_nb.insight.updates import UpdateMeter, rounding_warning, survival_html
from fulltune_nb.panels.live_plot import MAX_SHARE, MIN_SECONDS
from fulltune_nb.panels.loop import TrainLoop
from fulltune_nb.plots import moving_mean
from fulltune_nb.training.history import StepReport

# -- looks: The tabs of the training panel that look inside the model while it learns

Post = Callable[[Callable[[], Any]], None]
"""Has something done on the main thread, between two steps; from any thread. Errors are shown in the panel."""


class Look(Protocol):
    """One tab.

    Attributes:
        title: what the tab is called.
        box: its widgets.
    """

    title: str
    box: widgets.Widget

    def connect(self, post: Post) -> None:
        """Has its controls do what they are for. Their callbacks must not hold the look: widgets live until they are closed."""

    def open(self) -> None:
        """Its tab was opened."""

    def close(self) -> None:
        """Another tab was opened, or the panel is about to be closed."""

    def leave(self) -> None:
        """The panel is closed."""

    def renew(self) -> None:
        """Shows what there is now. Called only while the tab is open."""


class Looks:
    """The looks of one panel, of which at most one is open.

    Attributes:
        seconds: what the last renewal took.
    """

    def __init__(self, loop: TrainLoop, looks: Sequence[Look], first: int, failed: Callable[[Exception], Any]):
        """
        Args:
            loop: of the trainer that is looked at.
            looks: in the order of their tabs.
            first: number of the first one's tab.
            failed: told of an error that nobody else would hear of.
        """
        self._loop, self._looks, self._first, self._failed = loop, tuple(looks), first, failed
        self._open: Look | None = None
        self._timer: Any = None
        self._closed = False
        self._started = -float("inf")
        self.seconds = 0.0

    def connect(self, post: Post) -> None:
        """Has the controls in the tabs do what they are for."""
        for look in self._looks:
            look.connect(post)

    def choose(self, tab: int | None) -> None:
        """A tab has been opened, ours or another one."""
        number = -1 if tab is None else tab - self._first
        chosen = self._looks[number] if 0 <= number < len(self._looks) and not self._closed else None
        if chosen is self._open:
            return
        self._stop_timer()
        if self._open is not None:
            self._open.close()
        self._open = chosen
        if chosen is not None:
            chosen.open()
            self._renew()

    def tell(self, stands: bool = False) -> None:
        """Something has happened to the run: what is open is renewed as soon as may be.

        Args:
            stands: the run is at rest for now, so that without an event loop there will be no better moment.
        """
        if self._open is None or self._timer is not None:
            return
        interval = max(MIN_SECONDS, self.seconds / MAX_SHARE) if self._loop.running else MIN_SECONDS
        self._timer = self._loop.later(max(0.0, self._started + interval - time.monotonic()), self._renew)
        if self._timer is None and stands:
            self._renew()

    def close(self) -> None:
        """The panel is closed."""
        self._closed = True
        self.choose(None)
        for look in self._looks:
            look.leave()

    def _renew(self) -> None:
        self._stop_timer()
        self._started = time.monotonic()
        try:
            self._open.renew()
        except Exception as error:  # nobody has asked for this, so nobody else would hear of it
            self._failed(error)
        self.seconds = time.monotonic() - self._started

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None


def scrolled(child: widgets.Widget, height: str = "420px") -> widgets.Box:
    """A box with a scroll bar where it is needed; browsers let the keyboard reach what scrolls."""
    # No tooltip here: with one, ipywidgets 8.1.9 fails to show a box at all. What is in it has one.
    return widgets.Box([child], layout=widgets.Layout(max_height=height, overflow="auto", display="block"))


def on_press(button: widgets.Button, post: Post, look: Any, action: Callable[[Any], Any]) -> None:
    """`action(look)` for a press; `look` is a weak reference."""
    button.on_click(lambda _: _do(post, look, action))


def on_entry(field: widgets.ValueWidget, post: Post, look: Any, action: Callable[[Any, Any], Any]) -> None:
    """`action(look, value)` for what is entered; `look` is a weak reference."""
    field.observe(lambda change: _do(post, look, lambda there: action(there, change.new)), "value")


def _do(post: Post, look: Any, action: Callable[[Any], Any]) -> None:
    if (there := look()) is not None:
        post(partial(action, there))


# -- samples: Answers to some prompts, taken again and again while a model learns

_LABELS = {"description_width": "initial"}
KEPT_SAMPLES = 2000
SHOWN = 60
_ANSWER_CHARACTERS = 1500  # of an answer that are shown

_samples: weakref.WeakKeyDictionary[TrainLoop, Samples] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Sample:
    """One answer."""

    step: int
    """Optimizer steps taken before it."""
    prompt: str
    answer: str
    """As far as it went: to its end, to `max_tokens`, or to where a pause cut it off."""


class Samples:
    """The prompts of one trainer and what the model has answered so far. Use `samples_of`.

    Attributes:
        prompts: texts. Where the data are chats or completions, each is asked as a user's message; with plain text it is continued.
        every: steps from one taking to the next, beginning before the first step; 0 for never.
        max_tokens: tokens of an answer at most.
        rows: the answers, oldest first; the latest 2,000.
        wanted: whether they are to be answered at the next opportunity.
        version: grows with every change of `rows`.
    """

    def __init__(self, loop: TrainLoop):
        self._loop = weakref.ref(loop)
        self.prompts: tuple[str, ...] = ()
        self.every = 0
        self.max_tokens = 64
        self.rows: deque[Sample] = deque(maxlen=KEPT_SAMPLES)
        self.wanted = False
        self.version = 0
        self._last_step = -1

    def set(self, prompts: Sequence[str] | None = None, every: int | None = None, max_tokens: int | None = None) -> None:
        """Changes what is given.

        Raises:
            ConfigError: prompts that are no texts, or numbers out of range.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts or ()):
            raise ConfigError(f"prompts must be a list of texts, found {prompts!r:.80}.")
        for name, value, least in (("sample_every", every, 0), ("max_tokens", max_tokens, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{name} must be a whole number of at least {least}, found {value!r}.")
        self.prompts = self.prompts if prompts is None else tuple(prompt for prompt in prompts if prompt.strip())
        self.every = self.every if every is None else every
        self.max_tokens = self.max_tokens if max_tokens is None else max_tokens

    @property
    def due(self) -> bool:
        """Whether it is time."""
        step = self._loop().trainer.step_count
        return bool(self.prompts) and (self.wanted or (self.every > 0 and step % self.every == 0 and step != self._last_step))

    async def take_when_due(self) -> None:
        """Answers all prompts if it is time, letting go of the event loop after every piece. A pause cuts it off."""
        if not self.due:
            return
        for _ in self._take():
            await asyncio.sleep(0)
            if self._loop().pause_asked:
                return

    def take(self) -> list[Sample]:
        """Answers all prompts here and now."""
        for _ in self._take():
            pass
        return list(self.rows)[-len(self.prompts) :] if self.prompts else []

    def _take(self) -> Iterator[None]:
        """Yields after every piece of text; the answer is in `rows` from its first piece on."""
        trainer = self._loop().trainer
        self.wanted, self._last_step = False, trainer.step_count
        for prompt in self.prompts:
            step, answer = trainer.step_count, ""
            self.rows.append(Sample(step, prompt, answer))
            try:
                for piece in self._stream(prompt):
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
        trainer = self._loop().trainer
        if trainer.data.train.format == "text":
            return trainer.lm.stream(prompt, max_tokens=self.max_tokens, temperature=0.0)
        return trainer.lm.stream_chat([{"role": "user", "content": prompt}], max_tokens=self.max_tokens, temperature=0.0)

    def to_html(self, shown: int = SHOWN) -> str:
        """The latest answers as a table, newest first."""
        if not self.rows:
            return f'<div class="{NO_MATH}">no samples yet</div>'
        latest = list(self.rows)[-shown:][::-1]
        rows = [(f"{sample.step:,}", cut(sample.prompt), cut(sample.answer, _ANSWER_CHARACTERS)) for sample in latest]
        more = f"<div>… and {len(self.rows) - len(latest):,} before them</div>" if len(self.rows) > len(latest) else ""
        return table(("step", "prompt", "answer"), rows, "Samples, newest first") + more


def prompts_text(prompts: Sequence[str]) -> str | None:
    """Prompts one a line, as a text field holds them; None where it cannot: line breaks within a prompt, or 20,000 characters."""
    text = "\n".join(prompts)
    return text if len(text) < 20_000 and text.count("\n") == max(0, len(prompts) - 1) else None


def samples_of(loop: TrainLoop) -> Samples:
    """The samples of a loop's trainer, which all its panels share."""
    if loop not in _samples:
        _samples[loop] = Samples(loop)
        loop.between_steps.append(_samples[loop].take_when_due)
    return _samples[loop]


# -- measuring: The update meter of the panels of one trainer: it measures while somebody looks, and is put away wit

KEPT = 120
"""Measured steps that are kept at least: twice what the picture shows."""


def measuring_of(loop: TrainLoop) -> Measuring:
    """That of a trainer, which all its panels share; it lives and goes with the trainer's loop."""
    if Measuring not in loop.shared:
        loop.shared[Measuring] = Measuring(loop)
    return loop.shared[Measuring]


class Measuring:
    """Whether and how the updates of one trainer are measured. Use `measuring_of`.

    Attributes:
        always: measure while no tab is open too, as long as there is a panel.
    """

    def __init__(self, loop: TrainLoop):
        self._trainer = loop.trainer
        self._own = UpdateMeter(keep=KEPT)
        self._panels: dict[object, bool] = {}  # each panel's look -> whether its tab is open
        self.always = False

    @property
    def meter(self) -> UpdateMeter:
        """What measures: one attached in code where there is one, else the panels' own."""
        listeners = self._trainer.listeners
        given = [listener for listener in listeners if isinstance(listener, UpdateMeter) and listener is not self._own]
        return given[0] if given else self._own

    @property
    def is_own(self) -> bool:
        """Whether it is the panels' own."""
        return self.meter is self._own

    @property
    def on(self) -> bool:
        """Whether steps are measured now."""
        return not self.is_own or self._own in self._trainer.listeners

    @property
    def next_step(self) -> int:
        """The step that is measured next, as in its report."""
        return self._trainer.step_count + 1 + -self._trainer.optimizers.step % self.meter.every

    def look(self, panel: object, is_open: bool) -> None:
        """A panel's tab was opened or closed."""
        self._panels[panel] = is_open
        self.settle()

    def leave(self, panel: object) -> None:
        """A panel was closed."""
        self._panels.pop(panel, None)
        self.settle()

    def set(self, every: int | None = None, always: bool | None = None) -> None:
        """Changes what is given."""
        self._own.every = self._own.every if every is None else every
        self.always = self.always if always is None else always
        self.settle()

    def settle(self) -> None:
        """Attaches the panels' own meter or puts it away, as is wanted."""
        wanted = self.is_own and (any(self._panels.values()) or (self.always and bool(self._panels)))
        if wanted:
            self._own.attach(self._trainer)
        else:
            self._own.detach()


# -- batch_tab: The training panel's tab of batches: from a step of the loss curve to the rows behind it, token by t

_CHOOSE = ("choose one …", 0)
_SPIKES = 10
_WINDOW = 11  # steps whose mean a step's loss is compared with, its own among them
_LISTED = 200  # rows of a batch
_TOKENS = 3000  # drawn token by token
_CHARACTERS = 120  # of a row's text in the list


class BatchTab:
    """See `Look`. Losses are computed when the button is pressed, by the weights as they are then."""

    title = "Batch"

    def __init__(self, loop: TrainLoop):
        self._loop, self._trainer = loop, loop.trainer
        self._just_opened = False
        self.spikes = widgets.Dropdown(
            options=[_CHOOSE], description="steps that stand out", style=_LABELS, layout=widgets.Layout(width="360px"),
            tooltip="Steps whose loss lies highest above that of the steps around them",
        )  # fmt: skip
        self.step = widgets.BoundedIntText(
            value=max(1, self._trainer.step_count), min=1, max=max(1, self._trainer.total_steps), description="step", style=_LABELS,
            tooltip="The step whose rows are shown, as in its report; steps to come too", layout=widgets.Layout(width="130px"),
        )  # fmt: skip
        look = {"layout": widgets.Layout(width="auto")}
        self.rows = widgets.Button(description="Rows", tooltip="Show this step's rows, and which of their tokens are trained on", **look)
        self.losses = widgets.Button(
            description="Token losses", icon="search", **look,
            tooltip="Compute the loss of every token of these rows, by the weights as they are now",
        )  # fmt: skip
        self.page = widgets.HTML(tooltip="The rows of a step")
        row = widgets.Layout(flex_flow="row wrap", align_items="center", overflow="visible")
        fields = widgets.HBox([self.spikes, self.step, self.rows, self.losses], layout=row)
        self.box = widgets.VBox([fields, scrolled(self.page)])

    def connect(self, post: Post) -> None:
        """See `Look`."""
        here = weakref.ref(self)
        on_press(self.rows, post, here, lambda tab: tab.show_rows(tab.step.value))
        on_press(self.losses, post, here, lambda tab: tab.show_losses(tab.step.value))
        on_entry(self.spikes, post, here, BatchTab._chosen)

    def _chosen(self, step: int | None) -> None:
        if step:
            self.step.value = step
            self.show_rows(step)

    def open(self) -> None:
        """See `Look`."""
        self._just_opened = True

    def close(self) -> None:
        """See `Look`."""

    def leave(self) -> None:
        """See `Look`."""

    def renew(self) -> None:
        """See `Look`."""
        if self._just_opened or not self._loop.running:  # a list that changes while one chooses from it is of no use
            self._offer()
        if self._just_opened and not self.page.value:
            self.step.value = max(1, self._trainer.step_count)
            self.show_rows(self.step.value)
        self._just_opened = False

    def _offer(self) -> None:
        """The steps that can be chosen from."""
        found = [(f"step {step:,}: loss {loss:.3f} ({above:+.3f})", step) for step, loss, above in spikes(self._trainer.history.steps)]
        if tuple(self.spikes.options) != (options := (_CHOOSE, *found)):
            self.spikes.options = options

    # -- showing ----------------------------------------------------------------------------------------------------

    def show_rows(self, step: int) -> None:
        """The rows of a step, with their loss masks."""
        rows = self._trainer.batch_at(step)
        lines = [(row.source, len(row.tokens), int(row.loss_mask.sum()), cut(row.text, _CHARACTERS)) for row in rows[:_LISTED]]
        drawn = _first(rows, [min(len(row.tokens), 400) for row in rows])
        lens = Lens(drawn, self._trainer.lm.tokenizer)._repr_html_()
        listed = f"<b>{self._about(step)}: {len(rows):,} rows</b>" + table(("row", "tokens", "trained on", "text"), lines)
        self._put(listed, _hidden(len(rows), len(lines), "listed"), lens, _hidden(len(rows), len(drawn), "drawn token by token"))

    def show_losses(self, step: int) -> None:
        """The same rows by loss, the largest first, token by token."""
        trainer = self._trainer
        found = token_losses(trainer.lm, trainer.batch_at(step))
        worst = sorted(found.rows, key=lambda row: -np.nan_to_num(row.loss, nan=-np.inf))
        lines = [
            (row.example.source, f"{row.loss:.4f}", int(row.trained.sum()), cut(row.example.text, _CHARACTERS)) for row in worst[:_LISTED]
        ]
        about = f"{self._about(step)}; losses by the weights after step {trainer.step_count:,}: {found.loss:.4f}, the largest first"
        listed = f"<b>{about}</b>" + table(("row", "loss (nats)", "trained on", "text"), lines)
        drawn = _first(worst, [len(row.losses) for row in worst])
        boxes = TokenLosses(drawn, trainer.lm.tokenizer, compared=False)._repr_html_()
        self._put(listed, _hidden(len(worst), len(lines), "listed"), boxes, _hidden(len(worst), len(drawn), "drawn token by token"))

    def _about(self, step: int) -> str:
        report = next((report for report in reversed(self._trainer.history.steps) if report.step == step), None)
        return f"Step {step:,}" + (f" (its loss was {report.loss:.4f})" if report else " (to come)")

    def _put(self, *parts: str) -> None:
        self.page.value = f'<div class="{NO_MATH}" style="line-height:1.35">{"".join(parts)}</div>'


def spikes(reports: Sequence[StepReport]) -> list[tuple[int, float, float]]:
    """The steps whose loss lies highest above the mean of the steps around them: step, loss, and how far above; the highest first."""
    loss = np.array([report.loss for report in reports], dtype=np.float64)
    above = loss - moving_mean(loss, _WINDOW)
    order = [i for i in np.argsort(-above, kind="stable")[:_SPIKES] if above[i] > 0]  # NaN comes last, and is not above
    return [(reports[i].step, float(loss[i]), float(above[i])) for i in order]


def _first(rows: Sequence, tokens: Sequence[int]) -> list[Example]:
    """So many of the rows as there is room for, one at least."""
    room = int(np.searchsorted(np.cumsum(tokens), _TOKENS, side="right"))
    return list(rows[: max(1, room)])


def _hidden(there: int, shown: int, how: str) -> str:
    return f"<div>… {there - shown:,} more rows, not {how}</div>" if there > shown else ""


# -- updates_tab: The training panel's tab of updates: which of them survive rounding, block by block, while the run g

_PICTURES = (
    ("updates that survive", "survival"),
    ("update / weight", "update_ratio"),
    ("gradient norm", "gradient_norm"),
    ("weight norm", "weight_norm"),
)


class UpdatesTab:
    """See `Look`. The meter measures only while a tab like this is open, unless it is told to go on."""

    title = "Updates"

    def __init__(self, loop: TrainLoop):
        self._loop, self._trainer = loop, loop.trainer
        self._measuring = measuring_of(loop)
        self._measuring.look(self, False)
        self.every = widgets.BoundedIntText(
            value=self._measuring.meter.every, min=1, max=10**6, description="every", style=_LABELS, continuous_update=False,
            tooltip="Steps from one measurement to the next; a measured step takes longer", layout=widgets.Layout(width="120px"),
        )  # fmt: skip
        self.always = widgets.Checkbox(
            value=self._measuring.always, description="measure while other tabs are open too", indent=False,
            tooltip="Else steps are measured only while this tab is open", layout=widgets.Layout(width="auto"),
        )  # fmt: skip
        self.picture = widgets.Dropdown(
            options=_PICTURES, value="survival", description="picture", tooltip="What the picture of blocks and steps shows", style=_LABELS,
            layout=widgets.Layout(width="230px"),
        )  # fmt: skip
        self.page = widgets.HTML(tooltip="What the measured steps did to the weights")
        row = widgets.Layout(flex_flow="row wrap", align_items="center", overflow="visible")
        fields = widgets.HBox([self.every, self.picture, self.always], layout=row)
        self.box = widgets.VBox([fields, scrolled(self.page)])

    def connect(self, post: Post) -> None:
        """See `Look`."""
        here = weakref.ref(self)
        on_entry(self.every, post, here, UpdatesTab._every_entered)
        on_entry(self.always, post, here, lambda tab, value: tab._measuring.set(always=value))
        on_entry(self.picture, post, here, lambda tab, value: tab.renew())

    def _every_entered(self, every: int) -> None:
        if every != self._measuring.meter.every:
            self._measuring.set(every=every)
            self.renew()

    def open(self) -> None:
        """See `Look`."""
        self._measuring.look(self, True)

    def close(self) -> None:
        """See `Look`."""
        self._measuring.look(self, False)

    def leave(self) -> None:
        """See `Look`."""
        self._measuring.leave(self)

    def renew(self) -> None:
        """See `Look`."""
        measuring = self._measuring
        measuring.settle()  # a meter may have been attached in code meanwhile
        self.every.value, self.always.value = measuring.meter.every, measuring.always
        self.every.disabled = self.always.disabled = not measuring.is_own
        self.page.value = f'<div style="line-height:1.35">{self._warning()}{self._state()}{self._measured()}</div>'

    def _warning(self) -> str:
        message = rounding_warning(self._trainer, self._measuring.meter.latest())
        style = f"border:1px solid {PALETTE[1]};border-left-width:6px;padding:6px 10px;margin:4px 0"
        return f'<div role="alert" class="{NO_MATH}" style="{style}">⚠ {esc(message[:1].upper() + message[1:])}</div>' if message else ""

    def _state(self) -> str:
        measuring = self._measuring
        whose = "" if measuring.is_own else ", by a meter that was attached in code"
        every = f"every {measuring.meter.every:,} steps" if measuring.meter.every > 1 else "every step"
        text = f"Measured {every}{whose}; the next one is step {measuring.next_step:,}"
        return f"<div>{text} of {self._trainer.total_steps:,}.</div>" if measuring.next_step <= self._trainer.total_steps else ""

    def _measured(self) -> str:
        return survival_html(self._measuring.meter, self.picture.value)


# -- callbacks_tab: The training panel's tab of callbacks: what those attached to the trainer have seen so far, such as 

_NOTHING = """<div style="line-height:1.5">Nothing is attached to this trainer. What can be:<ul>
<li><code>insight.Forgetting(prompts, text).attach(trainer)</code>: the same questions at every evaluation and checkpoint, perplexity
on a text that is not trained on, and how far the weights have moved</li>
<li><code>insight.GenerationScore(data.valid[:20]).attach(trainer)</code>: answers written at every evaluation, beside those
expected</li>
</ul></div>"""


class CallbacksTab:
    """See `Look`. Shows whatever stands among the trainer's listeners and has a view for a cell."""

    title = "Callbacks"

    def __init__(self, loop: TrainLoop):
        self._trainer = loop.trainer
        self.page = widgets.HTML(tooltip="What attached callbacks have seen")
        self.box = scrolled(self.page)

    def connect(self, post: Post) -> None:
        """See `Look`."""

    def open(self) -> None:
        """See `Look`."""

    def close(self) -> None:
        """See `Look`."""

    def leave(self) -> None:
        """See `Look`."""

    def renew(self) -> None:
        """See `Look`."""
        shown = [one for one in self._trainer.listeners if hasattr(one, "_repr_html_") and not isinstance(one, UpdateMeter)]
        self.page.value = "".join(f'<div style="line-height:1.35;margin-bottom:10px">{_view(one)}</div>' for one in shown) or _NOTHING


def _view(callback: Any) -> str:
    try:
        return callback._repr_html_() or esc(repr(callback), 1000)
    except FulltuneError as error:
        text = str(error)
    except Exception as error:  # of somebody's own class
        text = f"{type(error).__name__}: {error}"
    return f'<div class="{NO_MATH}">⚠ {esc(type(callback).__name__)} cannot be shown: {esc(text, 1000)}</div>'
