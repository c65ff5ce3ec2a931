"""The static record of a run in its notebook: a PNG and a table that need neither a kernel nor widgets to be seen.

A notebook keeps no widgets when it is closed, but it keeps outputs. The record is two outputs with a `display_id`, renewed
whenever the run pauses or ends: below the panel, or, when a cell waits for the run, there. Below a panel that is alive, which
shows the same, the record is hidden.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from fulltune_nb.html import NO_MATH, cut, facts, human_bytes, table
from fulltune_nb.panels.progress import in_kernel
from fulltune_nb.panels.samples import Samples
from fulltune_nb.training.history import History
from fulltune_nb.training.trainer import Trainer

PANEL_CLASS = "fulltune-panel"  # of a panel's box
_CLASS = "fulltune-record"
_HIDDEN = (  # the picture is the output before the table
    f"<style>.jp-OutputArea:has(.{PANEL_CLASS}) .jp-OutputArea-child:has(+ .jp-OutputArea-child .{_CLASS}),"
    f" .jp-OutputArea:has(.{PANEL_CLASS}) .jp-OutputArea-child:has(.{_CLASS}) {{ display: none; }}</style>"
)
_ROWS = 12  # evaluations, events and samples that are listed


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


class Record:
    """Two outputs in one cell, and in which cell they are."""

    def __init__(self) -> None:
        self._handles: tuple[Any, Any] | None = None
        self._cell: tuple[str, str] | None = None

    @property
    def placed(self) -> bool:
        """Whether there is a cell that holds the record."""
        return self._handles is not None

    def place_here(self, note: str) -> None:
        """From now on, the record stands in the cell being executed; until it is renewed with `note` in its place."""
        cell = current_cell()
        if cell is None or (self.placed and cell == self._cell):
            return
        from IPython.display import display

        if self._handles:
            self._handles[0].update({"text/html": "", "text/plain": ""}, raw=True)
            self._handles[1].update(_text("The record of this run stands further down, where a cell waited for it."), raw=True)
        self._cell = cell
        self._handles = tuple(display(bundle, raw=True, display_id=True) for bundle in ({"text/html": "", "text/plain": ""}, _text(note)))

    def renew(self, png: bytes, page: str, line: str) -> None:
        """Puts the picture and the table in.

        Args:
            png: the picture.
            page: HTML of the table, escaped.
            line: the same in a line of plain text.
        """
        if self._handles:
            picture, alternative = {"image/png": b64encode(png).decode(), "text/plain": line}, {"image/png": {"alt": line}}
            self._handles[0].update(picture, raw=True, metadata=alternative)
            self._handles[1].update({"text/html": f'<div class="{_CLASS}">{_HIDDEN}{page}</div>', "text/plain": line}, raw=True)


def _text(text: str) -> dict[str, str]:
    return {"text/html": f'<div class="{_CLASS}">{_HIDDEN}{text}</div>', "text/plain": text}


def record_html(trainer: Trainer, state: str, samples: Samples) -> str:
    """What there is to say about a run, as tables of bounded length."""
    history = trainer.history
    parts = [facts(f"{state.capitalize()} at step {trainer.step_count:,} of {trainer.total_steps:,}", _summary(trainer, history))]
    evals = history.evals[-_ROWS:]
    if evals:
        rows = [(f"{r.step:,}", r.split, f"{r.loss:.4f}", f"{r.perplexity:.3f}", f"{r.tokens:,}") for r in evals]
        caption = _caption("Evaluations", len(history.evals), len(evals))
        parts.append(table(("step", "split", "loss", "perplexity", "tokens"), rows, caption))
    events = history.events[-_ROWS:]
    if events:
        rows = [(f"{r.step:,}", r.kind.replace("_", " "), cut(r.message)) for r in events]
        parts.append(table(("step", "event", ""), rows, _caption("Events", len(history.events), len(events))))
    if samples.rows:
        parts.append(samples.to_html(_ROWS))
    return f'<div class="{NO_MATH}">{"".join(parts)}</div>'


def _summary(trainer: Trainer, history: History) -> list[tuple[str, object]]:
    steps = history.steps
    rows: list[tuple[str, object]] = [("optimizer", trainer.config.optimizer), ("run_dir", cut(str(trainer.run_dir or "none")))]
    if not steps:
        return [("steps", "none taken yet"), *rows]
    seconds = sum(report.seconds for report in steps)
    tokens = sum(report.tokens for report in steps)
    return [
        ("epoch", f"{steps[-1].epoch:.2f}"),
        ("loss, first and last", f"{steps[0].loss:.4f} → {steps[-1].loss:.4f}"),
        ("next learning rate", f"{trainer.learning_rate:.3g}"),
        ("trained tokens", f"{tokens:,} in {seconds:.1f} s ({tokens / max(seconds, 1e-9):,.0f} tokens/s)"),
        ("peak memory", human_bytes(max(report.peak_memory for report in steps))),
        *rows,
    ]


def _caption(what: str, there: int, shown: int) -> str:
    return what if there == shown else f"{what}: the last {shown} of {there:,}"

