"""What a training panel leaves in the notebook's file."""

from __future__ import annotations

from fulltune_nb.html import NO_MATH, cut, facts, table
from fulltune_nb.panels.samples import Samples
from fulltune_nb.training.trainer import Trainer

_ROWS = 12  # evaluations, events and samples that are listed


def record_html(trainer: Trainer, title: str, samples: Samples) -> str:
    """What there is to say about a run, as tables of bounded length."""
    history, steps = trainer.history, trainer.history.steps
    figures = [("epoch", f"{steps[-1].epoch:.2f}"), *history.summary.facts()] if steps else [("steps", "none taken yet")]
    settings = [("next learning rate", f"{trainer.learning_rate:.3g} (peak {trainer.peak_learning_rate:.3g})")]
    settings += [("optimizer", trainer.config.optimizer), ("run_dir", cut(str(trainer.run_dir or "none")))]
    parts = [facts(title, [*figures, *settings])]
    if evals := history.evals[-_ROWS:]:
        rows = [(f"{r.step:,}", r.split, f"{r.loss:.4f}", f"{r.perplexity:.3f}", f"{r.tokens:,}") for r in evals]
        caption = _caption("Evaluations", len(history.evals), len(evals))
        parts.append(table(("step", "split", "loss", "perplexity", "tokens"), rows, caption))
    if events := history.events[-_ROWS:]:
        rows = [(f"{r.step:,}", r.kind.replace("_", " "), cut(r.message)) for r in events]
        parts.append(table(("step", "event", ""), rows, _caption("Events", len(history.events), len(events))))
    if samples.rows:
        parts.append(samples.to_html(_ROWS))
    return f'<div class="{NO_MATH}">{"".join(parts)}</div>'


def _caption(what: str, there: int, shown: int) -> str:
    return what if there == shown else f"{what}: the last {shown} of {there:,}"
