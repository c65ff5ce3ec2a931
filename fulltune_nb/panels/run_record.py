"""What a training panel leaves in the notebook's file."""

from __future__ import annotations

from bisect import bisect_right

from fulltune_nb.html import NO_MATH, cut, facts
from fulltune_nb.panels.progress import Pace, curve_of, evaluations_table, events_table
from fulltune_nb.panels.samples import Samples
from fulltune_nb.training.trainer import Trainer

_ROWS = 12  # evaluations, events and samples that are listed


def record_html(trainer: Trainer, title: str, samples: Samples, with_curve: bool) -> str:
    """What there is to say about a run, as tables of bounded length; with a small curve where no picture stands above."""
    history, steps = trainer.history, trainer.history.steps
    figures = [("epoch", f"{steps[-1].epoch:.2f}"), *history.summary.facts()] if steps else [("steps", "none taken yet")]
    settings = [("next learning rate", f"{trainer.learning_rate:.3g} (peak {trainer.peak_learning_rate:.3g})")]
    settings += [("optimizer", trainer.config.optimizer), ("run_dir", cut(str(trainer.run_dir or "none")))]
    parts = [facts(title, [*figures, *settings])]
    evals, events, many = history.evals, history.events, trainer.config.steps_per_report
    ends = [bisect_right(steps, report.step, key=lambda step: step.step) for report in evals[-_ROWS:]]
    losses = [Pace(many, steps[max(0, end - many) : end]).loss for end in ends]
    parts.append(evaluations_table(list(zip(losses, evals[-_ROWS:], strict=True)), len(evals)))
    parts.append(events_table([(report.step, report.kind, report.message) for report in events[-_ROWS:]], len(events)))
    if samples.rows:
        parts.append(samples.to_html(_ROWS))
    if with_curve:
        parts.append(curve_of(history))
    return f'<div class="{NO_MATH}">{"".join(parts)}</div>'
