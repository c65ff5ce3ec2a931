"""`ft.sweep`, and the command `python -m fulltune_nb.sweep`.

A package and not a module: the function is imported with `fulltune_nb` itself, so that its name stays the function's, and
running a module that is imported already would warn.
"""

from fulltune_nb.experiments.sweep import sweep

__all__ = ["sweep"]
