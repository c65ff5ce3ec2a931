"""A panel in its cell: the widgets, and what stands in for them in a notebook that was closed.

A notebook keeps no widgets when it is closed, but it keeps outputs. So beside its widgets a panel puts HTML into an output of its
own, hidden by a style rule for as long as the widgets are on the page: without them, after closing and reopening or as a web
page, it is seen. Nothing but CSS does this.
"""

from __future__ import annotations

import uuid
from typing import Any, Protocol

import ipywidgets as widgets

from fulltune_nb.panels.progress import current_cell

# -- style: Rules for the look of all panels, in any theme: where the keyboard is can be seen, and so can that t

_CLASS = "fulltune-styled"
_PLACE = f".{_CLASS}" * 4  # so often that it outweighs the rules of ipywidgets, which forbid some fields an outline
_FOCUS = "outline: 2px solid var(--jp-ui-font-color0, currentColor) !important; outline-offset: 1px"
_GONE = "⚠ The kernel that this panel belonged to is gone; what stands here is what it showed last. Run the cell again."
_RULES = f"""<style>
{_PLACE} :focus-visible {{ {_FOCUS} }}
{_PLACE}.jupyter-widgets-disconnected::after {{ content: "{_GONE}"; padding: 4px 0 }}
</style>"""


def styled(box: widgets.Box) -> widgets.Box:
    """The same box of a whole panel; the rules have been added, which take no room."""
    box.add_class(_CLASS)
    box.children = (*box.children, widgets.HTML(_RULES, tooltip="Rules for the look", layout=widgets.Layout(display="none")))
    return box


# -- showing: A panel in its cell: the widgets, and what stands in for them in a notebook that was closed

class Closable(Protocol):
    """A panel."""

    def close(self) -> None:
        """Takes the panel away."""


_shown: dict[str, tuple[str, list[Closable]]] = {}  # cell id -> its execution, the panels shown in it


class Showing:
    """Where one panel is shown.

    Attributes:
        widget: what is shown.
    """

    def __init__(self, widget: widgets.DOMWidget):
        self.widget = widget
        self._mark = f"fulltune-{uuid.uuid4().hex[:12]}"
        self._handle: Any = None
        widget.add_class(self._mark)

    def show(self, panel: Closable, page: str, line: str) -> None:
        """Displays the widgets and their stand-in. A panel that the same cell showed when it was run before is closed.

        Args:
            panel: whose widgets these are.
            page: HTML that says what the panel says, escaped.
            line: the same in a line of plain text.
        """
        from IPython.display import display

        _close_earlier(panel)
        display(self.widget)
        bundle = self._bundle(page, line)
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:  # shown in a second cell too: both outputs are renewed together
            display(bundle, raw=True, display_id=self._handle.display_id)

    def renew(self, page: str, line: str) -> None:
        """Changes the stand-in, wherever the panel is shown."""
        if self._handle is not None:
            self._handle.update(self._bundle(page, line), raw=True)

    def _bundle(self, page: str, line: str) -> dict[str, str]:
        rule = f"<style>body:has(.{self._mark}) .{self._mark}-record {{ display: none; }}</style>"
        return {"text/html": f'{rule}<div class="{self._mark}-record">{page}</div>', "text/plain": line}


def _close_earlier(panel: Closable) -> None:
    cell, execution = current_cell() or ("", "")
    if not cell:
        return
    earlier, panels = _shown.get(cell, ("", []))
    if earlier != execution:
        for old in panels:
            if old is not panel:
                old.close()
        panels = []
    _shown[cell] = (execution, [*panels, panel])


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
