"""Rules for the look of all panels, in any theme: where the keyboard is can be seen, and so can that the kernel is gone."""

from __future__ import annotations

import ipywidgets as widgets

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
