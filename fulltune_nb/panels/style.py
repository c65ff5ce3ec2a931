"""Seeing where the keyboard is: what is focused in a panel has a thick outline in the text's colour, in any theme."""

from __future__ import annotations

import ipywidgets as widgets

_CLASS = "fulltune-focus"
_PLACE = f".{_CLASS}" * 4  # so often that it outweighs the rules of ipywidgets, which forbid some fields an outline
_LOOK = "outline: 2px solid var(--jp-ui-font-color0, currentColor) !important; outline-offset: 1px"
_RULE = f"<style>{_PLACE} :focus-visible {{{_LOOK}}}</style>"


def with_visible_focus(box: widgets.Box) -> widgets.Box:
    """The same box; a rule for what is in it has been added, which takes no room."""
    box.add_class(_CLASS)
    box.children = (*box.children, widgets.HTML(_RULE, tooltip="Shows the focus", layout=widgets.Layout(display="none")))
    return box
