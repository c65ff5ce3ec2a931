"""What a cell shows and keeps: outputs that stay in the notebook's file when the widgets above them are gone."""

from __future__ import annotations

import sys
import time
import uuid
import weakref
from base64 import b64encode
from typing import Any

from fulltune_nb.errors import MissingDependencyError, optional_import
from fulltune_nb.html import esc, on_dark


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


def new_mark() -> str:
    """A class that nothing else on any page has."""
    return f"fulltune-{uuid.uuid4().hex[:12]}"


# -- the record -----------------------------------------------------------------------------------------------------------

_EMPTY = {"text/html": "", "text/plain": ""}


class Record:
    """Outputs of a cell that stay in the notebook's file: a table, and a picture above it where wanted.

    A front end may stop taking in what the record says: its page was loaded anew, or is closed, or the kernel is gone. So what is not the
    last word says when it was written and what may be missing; and pages that come later are told by `record_keeper`.

    Args:
        mark: class of a box; while that is there the record is hidden, in the same cell; where there is no picture, anywhere on the page.
            "" for a record that stands alone.
        with_picture: whether there is ever one.
    """

    def __init__(self, mark: str, with_picture: bool):
        self._name = f"{mark or new_mark()}-record"
        child = ".jp-OutputArea-child"
        picture = f"{child}:has(+ {child} .{self._name})"  # it stands before the table
        beside = f".jp-OutputArea:has(.{mark})"
        hidden = f"{beside} {child}:has(.{self._name}), {beside} {picture}" if with_picture else f"body:has(.{mark}) .{self._name}"
        self._rule = f"<style>{hidden} {{ display: none; }}</style>" if mark else ""
        self._rule += on_dark(f"{picture} img") if with_picture else ""
        self._with_picture = with_picture
        self._outputs: list[Any] = []  # handles of what was displayed: the picture, where there is one, and the table
        self._place = ""  # a class that only the table has
        self._cell: tuple[str, str] | None = None

    @property
    def placed(self) -> bool:
        """Whether there is a cell that holds the record."""
        return bool(self._outputs)

    def place(self, page: str, line: str, missing: str = "", always: bool = False) -> None:
        """Moves the record into the cell being executed, with this content until it is renewed. Without a kernel only if `always`."""
        cell = current_cell()
        if (cell is None and not always) or (self.placed and cell == self._cell):
            return
        with optional_import("Progress in a notebook", "notebook"):
            from IPython.display import display

        if self.placed:
            moved = "A later cell has taken this record over."
            self.renew(f"<div>{moved}</div>", moved, missing=" ")
        self._cell, self._place = cell, new_mark()
        bundles = self._bundles(page, line, b"", None, missing)
        self._outputs = [display(data, metadata=metadata, raw=True, display_id=True) for data, metadata in bundles]
        self._keep(bundles)

    def renew(self, page: str, line: str, png: bytes = b"", width: int | None = None, missing: str = "") -> None:
        """Changes what the record says.

        Args:
            page: HTML, escaped.
            line: the same in a line of plain text.
            png: the picture; empty for none.
            width: pixels of the page that the picture is as wide as; it may have more of its own, for screens that show them.
            missing: what may have come since, in a sentence; "" where this is the last word.
        """
        if not self.placed:
            return
        bundles = self._bundles(page, line, png, width, missing)
        for output, (data, metadata) in zip(self._outputs, bundles, strict=True):
            output.update(data, raw=True, metadata=metadata)
        self._keep(bundles)

    def _keep(self, bundles: list[tuple[dict, dict]]) -> None:
        if self._cell is not None and in_kernel():
            try:
                from fulltune_nb.record_keeper import keep
            except MissingDependencyError:  # without widgets a record stays as it was at the time it names
                return
            keep(self._place, self._cell[0], bundles)

    def _bundles(self, page: str, line: str, png: bytes, width: int | None, missing: str) -> list[tuple[dict, dict]]:
        """(data, metadata) of each output."""
        if missing:
            written = f"Written at {time.strftime('%Y-%m-%d %H:%M:%S %Z')}. {missing}".strip()
            page, line = f"{page}<div>{esc(written)}</div>", f"{line.rstrip('.')}. {written}"
        marked = f'{self._rule}<div class="{self._place} {self._name}">{page}</div>'
        table: tuple[dict, dict] = ({"text/html": marked, "text/plain": line}, {})
        if not self._with_picture:
            return [table]
        if not png:
            return [(_EMPTY, {}), table]
        look = {"alt": line, **({"width": width} if width else {})}
        return [({"image/png": b64encode(png).decode(), "text/plain": line}, {"image/png": look}), table]
