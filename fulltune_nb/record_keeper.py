"""Brings records up to date in pages that came too late to know them.

A front end forgets the ids of a cell's outputs when its page is loaded anew (jupyter/jupyter#83), but it makes a living kernel's widgets
again. So one widget, which is shown nowhere, tells every page what the latest records say, and its page side (static/record_keeper.js)
writes that into the notebook's outputs: in JupyterLab and Notebook 7. Elsewhere a record stays as it was at the time it names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget

_KEPT = 32  # records, the latest renewed; some 50 KB each

Bundles = list[tuple[dict[str, Any], dict[str, Any]]]
"""(data, metadata) of each of a record's outputs."""


class _Keeper(anywidget.AnyWidget):
    _esm = (Path(__file__).parent / "static/record_keeper.js").read_text("utf-8")

    def __init__(self) -> None:
        super().__init__()
        self._records: dict[str, Bundles] = {}
        self.on_msg(self._page_loaded)

    def keep(self, place: str, bundles: Bundles) -> None:
        self._records.pop(place, None)
        self._records[place] = bundles
        while len(self._records) > _KEPT:
            del self._records[next(iter(self._records))]
        self._tell(place, bundles)

    def _page_loaded(self, *_: Any) -> None:
        for place, bundles in list(self._records.items()):
            self._tell(place, bundles)

    def _tell(self, place: str, bundles: Bundles) -> None:
        self.send({"place": place, "outputs": bundles})


_keeper: _Keeper | None = None


def keep(place: str, bundles: Bundles) -> None:
    """Tells all pages, those that come later too, what the record in a place says."""
    global _keeper
    if _keeper is None or _keeper.comm is None:  # the first, or a notebook has closed all its widgets
        _keeper = _Keeper()
    _keeper.keep(place, bundles)
