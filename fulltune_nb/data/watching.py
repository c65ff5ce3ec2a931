"""Who watches long loading: the package's top registers here what shows it. Nothing is shown by this module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

watchers: list[Callable[[str, int], Any]] = []
"""Makers of what shows it, called with what is done and how much of it there is. They give an object with `update(done)` and `end()`."""


@contextmanager
def watched(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Within the block, the function it gives tells how much of `total` is done."""
    shown = [make(what, total) for make in watchers]

    def update(done: int) -> None:
        for watcher in shown:
            watcher.update(done)

    try:
        yield update
    finally:
        for watcher in shown:
            watcher.end()
