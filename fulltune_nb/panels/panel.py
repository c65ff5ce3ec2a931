"""What all panels share: widgets in a cell, controls that call the panel's methods, and a record for when the widgets are gone.

A notebook keeps no widgets when it is closed, but it keeps outputs. So beside its widgets a panel puts a record into outputs of its
own, hidden by a style rule while the widgets are on the page. Without them, after closing and reopening or as a web page, it is seen.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from fulltune_nb.errors import IN_TRAINING, FulltuneError, device_error, optional_import
from fulltune_nb.html import NO_MATH, esc
from fulltune_nb.record import Record, close_earlier, new_mark

with optional_import("A panel", "notebook"):
    import ipywidgets as widgets

_CLASS = "fulltune-styled"
_PLACE = f".{_CLASS}" * 4  # so often that it outweighs the rules of ipywidgets, which forbid some fields an outline
_FOCUS = "outline: 2px solid var(--jp-ui-font-color0, currentColor) !important; outline-offset: 1px"
_GONE = "⚠ The kernel that this panel belonged to is gone; what stands here is what it showed last. Run the cell again."
_ARROW = "%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 18 18'%3E%3Cpath fill='white' d='M5 6l4 4 4-4 1 1-5 5-5-5z'/%3E%3C/svg%3E"
_RULES = f"""<style>
{_PLACE} :focus-visible {{ {_FOCUS} }}
{_PLACE} .widget-html-content {{ min-width: 0 }} /* a wide table scrolls; the words above it do not */
{_PLACE} .widget-inline-hbox {{ max-width: 100% }}
{_PLACE} .lm-TabBar-content {{ flex-wrap: wrap }}
{_PLACE} .lm-TabBar-tab {{ flex: 0 0 auto; color: var(--jp-ui-font-color1, inherit) }}
[data-jp-theme-light="false"] {_PLACE} {{ --jp-widgets-dropdown-arrow: url("data:image/svg+xml,{_ARROW}") }} /* else black */
{_PLACE}.jupyter-widgets-disconnected::before {{ content: "{_GONE}"; padding: 4px 0; font: bold 13px var(--jp-ui-font-family, sans-serif) }}
</style>"""

_UNEXPECTED = (
    "panel.error holds the error with its traceback. If the model's state is in doubt, go back to the last checkpoint with Trainer.resume."
)


# -- the base -------------------------------------------------------------------------------------------------------------


class Panel:
    """Base of `TrainPanel`, `DataPanel` and `ChatPanel`.

    A control's callback may come on another thread than the cells', and during a step. So it only posts: `_post` says how an action
    reaches the thread that may do it, `_act` does it there and keeps its error for the panel to show.

    Attributes:
        widget: all the panel's widgets in a box.
        closed: whether the panel was taken away.
    """

    MADE_BY: ClassVar[str]
    """How a user makes such a panel, for messages."""
    ERROR: ClassVar[type[FulltuneError]]
    """What a closed panel raises."""
    PICTURE: ClassVar[bool] = False
    """Whether the record has a picture."""
    MISSING: ClassVar[str] = ""
    """What the record may lack that came after it was written; "" where nothing can."""

    def __init__(self, widget: widgets.Box):
        self.widget = widget
        self.closed = False
        mark = new_mark()
        self._record = Record(mark, self.PICTURE)
        self._control_error: BaseException | None = None
        self._entries: set[widgets.Widget] = set()  # fields whose entry has not been taken in yet
        self._putting: tuple[int, widgets.Widget] | None = None  # the thread that puts a value into a field, and the field
        widget.add_class(_CLASS).add_class(mark)
        rules = widgets.HTML(_RULES, tooltip="Rules for the look", layout=widgets.Layout(display="none"))
        widget.children = (*widget.children, rules)

    def close(self) -> None:
        """Takes the panel away; what it does comes to an end: an answer, or the run if this was the trainer's last panel."""
        if not self.closed:
            self.closed = True
            self._end()
            close_all(self.widget)

    def _end(self) -> None:
        """Ends what the panel does, when it is closed."""

    def _let_go(self) -> None:
        """Drops what is large: the notebook's list of outputs holds the panels of cells that were run again for ever."""

    def _check_open(self) -> None:
        if self.closed:
            raise self.ERROR(f"This panel is closed. Make a new one: {self.MADE_BY}.")

    # -- controls -------------------------------------------------------------------------------------------------------

    def connect(self, control: widgets.Widget, method: Callable[..., Any], *args: Any, at_once: bool = False) -> None:
        """Has a press of a button call `method(*args)`, or what is entered into a field `method(*args, value)`.

        The control does not hold the method's object: widgets live until they are closed. With `at_once` a button's method is called on
        the thread that the press comes on, also in the middle of a step.
        """
        if at_once:
            _hear_where_sent(control)
        here, bound = weakref.ref(self), weakref.WeakMethod(method)

        def heard(change: Any) -> None:
            panel, call = here(), bound()
            if panel is None or call is None or panel.closed or panel._putting == (threading.get_ident(), control):
                return
            if at_once:
                call(*args)
            elif isinstance(control, widgets.Button):
                panel._post(partial(call, *args))
            else:
                panel._entries.add(control)
                panel._post(partial(panel._enter, control, partial(call, *args, change.new)))

        if isinstance(control, widgets.Button):
            control.on_click(heard)
        else:
            control.observe(heard, "value")

    def _enter(self, control: widgets.Widget, action: Callable[[], Any]) -> None:
        self._entries.discard(control)
        action()

    def put(self, control: widgets.ValueWidget, value: Any) -> None:
        """Shows a value in a field, which is no entry. What was entered a moment ago stays until it has been taken in."""
        if control not in self._entries:
            self._putting = threading.get_ident(), control
            try:
                control.value = value
            finally:
                self._putting = None

    def _post(self, action: Callable[[], Any]) -> None:
        """Has a control's action done on the thread where it may be."""
        self._act(action)

    def _act(self, action: Callable[[], Any]) -> None:
        """Does what a control asks for; an error is shown in the panel, where it would else be lost."""
        if self.closed:
            return
        self._control_error = None
        try:
            action()
        except Exception as error:
            self._control_error = error
        self.refresh()

    def refresh(self) -> None:
        """Shows how things stand now, and `_control_error`."""

    # -- in a cell --------------------------------------------------------------------------------------------------------

    def _ipython_display_(self) -> None:
        from IPython.display import display

        self._check_open()
        close_earlier(self)
        says = f"{type(self).__name__}: widgets, which live while their kernel does"  # nothing of now: it stays in the file
        display({**self.widget._repr_mimebundle_(), "text/plain": says}, raw=True)
        self._place_record()

    def _place_record(self) -> None:
        """Puts the panel's record into the cell being executed."""
        self._record.place(self._repr_html_(), repr(self), self.MISSING)

    def _repr_html_(self) -> str:
        """All that the panel says, for where its widgets are not."""
        raise NotImplementedError


def _hear_where_sent(control: widgets.Widget) -> None:
    """Has the presses of a control come on the subshell that the page sends them to.

    ipykernel 7.4 takes them to the shell that last sent the control's state, which is the main one: there they wait for the step's end.
    """
    if hasattr(control.comm, "_reply_subshell_for"):
        control.comm._reply_subshell_for = lambda data, sent_to: sent_to


def close_all(widget: widgets.Widget) -> None:
    """Closes a widget and all below it, layouts and styles too, and lets go of their callbacks."""
    below = [*getattr(widget, "children", ()), *(getattr(widget, name) for name in ("layout", "style") if hasattr(widget, name))]
    for other in below:
        close_all(other)
    widget.unobserve_all()
    if isinstance(widget, widgets.Button):
        widget._click_handlers.callbacks.clear()
    widget._msg_callbacks.callbacks.clear()
    widget.close()


def error_html(error: BaseException) -> str:
    """An error and what to do about it."""
    error = device_error(error, IN_TRAINING) or error
    text = f"{type(error).__name__}: {error}"
    advice = "" if isinstance(error, FulltuneError) else _UNEXPECTED  # those say so themselves
    style = "border:1px solid #D55E00;border-left-width:6px;padding:6px 10px;margin:4px 0;white-space:pre-wrap;"
    style += "word-break:normal;overflow-wrap:anywhere;line-height:1.4"
    return f'<pre role="alert" class="{NO_MATH}" style="{style}">⚠ {esc(text, limit=4000)}{chr(10) if advice else ""}{esc(advice)}</pre>'
