"""What a cell shows and keeps: outputs that stay in the notebook's file when the widgets above them are gone."""

from __future__ import annotations

import sys
import weakref
from base64 import b64encode
from typing import Any


def in_kernel() -> bool:
    """Whether this is a Jupyter kernel. IPython is not imported for the question: without it there is no kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


_shown: dict[str, tuple[str, list[weakref.ref[Any]]]] = {}  # id of a cell -> its execution, what that showed


def close_earlier(panel: Any) -> None:
    """A cell that is run again has replaced what it showed: the panels and charts shown by its last execution are closed."""
    cell, execution = current_cell() or ("", "")
    if not cell:
        return
    earlier, panels = _shown.get(cell, ("", []))
    if earlier != execution:
        for reference in panels:
            if (old := reference()) is not None and old is not panel:
                old.close()
                old._let_go()
        panels = []
    _shown[cell] = (execution, [*panels, weakref.ref(panel)])


def current_cell() -> tuple[str, str] | None:
    """The cell being executed as (its id, the id of this execution), "" where the front end does not tell; None without kernel."""
    if not in_kernel():
        return None
    from IPython import get_ipython

    try:
        parent = get_ipython().get_parent()
    except AttributeError:  # kernels of others
        return "", ""
    return str(parent.get("metadata", {}).get("cellId") or ""), str(parent.get("header", {}).get("msg_id") or "")


# -- the record -----------------------------------------------------------------------------------------------------------

_MOVED = "The record of this panel stands further down, where a later cell put it."
_EMPTY = {"text/html": "", "text/plain": ""}


class Record:
    """Outputs of a cell that stay in the notebook's file: a table, and a picture above it where wanted.

    Hidden while the panel's box, which has the class `mark`, stands in the same cell; where there is no picture, anywhere on the page.
    """

    def __init__(self, mark: str, with_picture: bool):
        self._name = f"{mark}-record"
        beside = f".jp-OutputArea:has(.{mark}) .jp-OutputArea-child"
        both = f"{beside}:has(.{self._name}), {beside}:has(+ .jp-OutputArea-child .{self._name})"  # the picture stands before the table
        self._rule = f"<style>{both if with_picture else f'body:has(.{mark}) .{self._name}'} {{ display: none; }}</style>"
        self._with_picture = with_picture
        self._picture: Any = None
        self._table: Any = None
        self._cell: tuple[str, str] | None = None

    @property
    def placed(self) -> bool:
        """Whether there is a cell that holds the record."""
        return self._table is not None

    def place(self, page: str, line: str) -> None:
        """Moves the record into the cell being executed, with this content until it is renewed. Without a kernel nothing happens."""
        cell = current_cell()
        if cell is None or (self.placed and cell == self._cell):
            return
        from IPython.display import display

        if self.placed:
            self.renew(_MOVED, _MOVED)
        self._cell = cell
        if self._with_picture:
            self._picture = display(_EMPTY, raw=True, display_id=True)
        self._table = display(self._bundle(page, line), raw=True, display_id=True)

    def renew(self, page: str, line: str, png: bytes = b"", width: int | None = None) -> None:
        """Changes what the record says.

        Args:
            page: HTML, escaped.
            line: the same in a line of plain text.
            png: the picture; empty for none.
            width: pixels of the page that the picture is as wide as; it may have more of its own, for screens that show them.
        """
        if self._picture is not None:
            picture = {"image/png": b64encode(png).decode(), "text/plain": line} if png else _EMPTY
            look = {"alt": line, **({"width": width} if width else {})}
            self._picture.update(picture, raw=True, metadata={"image/png": look} if png else {})
        if self._table is not None:
            self._table.update(self._bundle(page, line), raw=True)

    def _bundle(self, page: str, line: str) -> dict[str, str]:
        return {"text/html": f'{self._rule}<div class="{self._name}">{page}</div>', "text/plain": line}
