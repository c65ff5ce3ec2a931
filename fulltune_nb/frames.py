"""Tables for pandas, where it is installed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fulltune_nb.errors import MissingDependencyError


def frame(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> Any:
    """A `pandas.DataFrame`, with these columns also where there are no rows; None: those of the rows.

    Raises:
        MissingDependencyError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingDependencyError("to_frame needs pandas. Install it with: pip install pandas") from error
    return pandas.DataFrame(list(rows), columns=columns if columns is None else list(columns))
