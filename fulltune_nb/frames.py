"""Tables for pandas, where it is installed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fulltune_nb.errors import optional_import


def frame(rows: Iterable[Mapping[str, Any]] | Mapping[str, Sequence], columns: Sequence[str] | None = None) -> Any:
    """A `pandas.DataFrame` of rows, or of a list of values for each column.

    Args:
        rows: name -> value for each row; or name -> values.
        columns: their names and order, also where there are no rows; None: as they come.

    Raises:
        MissingDependencyError: pandas is not installed.
    """
    with optional_import("to_frame", "pandas"):
        import pandas
    return pandas.DataFrame(rows if isinstance(rows, Mapping) else list(rows), columns=columns)
