"""Which callbacks every `Trainer.run` gets besides its own. Apart from the trainer, so that naming them does not import MLX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

default_callbacks: list[Callable[[], Any]] = []
"""Makers of callbacks, called once for each `run`; the package's top registers the progress display here."""
