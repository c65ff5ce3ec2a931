"""The tabs of the training panel that look inside the model while it learns.

A look computes nothing unless its tab is open. What it computes is computed on the main thread between two steps, from a timer of
the event loop, which a step never lets in; no more than once a second and, while training, in no more than 2% of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import ipywidgets as widgets

from fulltune_nb.panels.live_plot import MAX_SHARE, MIN_SECONDS
from fulltune_nb.panels.loop import TrainLoop

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
