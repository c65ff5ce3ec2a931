"""Brings records up to date in pages that came too late to know them.

A front end forgets the ids of a cell's outputs when its page is loaded anew (jupyter/jupyter#83), but it makes a living kernel's widgets
again. So one widget, which is shown nowhere, tells every page what the latest records say, and its page side (static/record_keeper.js)
writes that into the notebook's outputs: in JupyterLab and Notebook 7. Elsewhere a record stays as it was at the time it names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fulltune_nb.errors import optional_import

with optional_import("A record that pages loaded later are told of", "notebook"):
    import anywidget
    from IPython import get_ipython

_KEPT = 32  # records, the latest renewed; some 50 KB each

Bundles = list[tuple[dict[str, Any], dict[str, Any]]]
"""(data, metadata) of each of a record's outputs."""


class _Keeper(anywidget.AnyWidget):
    _esm = (Path(__file__).parent / "static/record_keeper.js").read_text("utf-8")

    def __init__(self) -> None:
        super().__init__()
        self._records: dict[str, tuple[str, Bundles]] = {}  # place -> id of its cell, what it says
        self.on_msg(self._page_loaded)
        get_ipython().events.register("pre_run_cell", self._cell_begins)

    def keep(self, place: str, cell: str, bundles: Bundles) -> None:
        cell, _ = self._records.pop(place, (cell, None))
        self._records[place] = cell, bundles
        while len(self._records) > _KEPT:
            del self._records[next(iter(self._records))]
        self.send({"place": place, "outputs": bundles})

    def _cell_begins(self, info: Any) -> None:
        """What a cell showed is gone when it is run again, and is not to be placed there anew."""
        again = getattr(info, "cell_id", None)
        for place, (cell, bundles) in self._records.items():
            self._records[place] = "" if cell == again else cell, bundles

    def _page_loaded(self, _: Any, content: dict[str, Any], __: Any) -> None:
        for place, (cell, bundles) in list(self._records.items()):
            self.send({"place": place, "outputs": bundles, "cell": cell, "page": content.get("page")})


_keeper: _Keeper | None = None


def keep(place: str, cell: str, bundles: Bundles) -> None:
    """Tells all pages, those that come later too, what the record in a place says.

    Args:
        place: class of the record's last output.
        cell: its cell's id, "" where that is not known.
        bundles: of its outputs.
    """
    global _keeper
    if _keeper is None or _keeper.comm is None:  # the first, or a notebook has closed all its widgets
        _keeper = _Keeper()
    _keeper.keep(place, cell, bundles)
