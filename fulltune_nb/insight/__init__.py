"""Looking inside a model while it learns: every function returns an object with a plot, a table and a view for a cell.

    from fulltune_nb import insight

    ft.token_losses(lm, data.valid[:3])          # which tokens are hard, and what the model would rather have said
    insight.top_losses(lm, data.valid).page(1)   # the rows with the largest loss
    ft.trace(lm, "some text")                    # residual stream, attention, what each layer would say
    ft.inspect(trainer, data.train[0])           # the same, and the gradient by block
    trainer.run(callbacks=[insight.UpdateMeter()])  # which updates survive rounding
    ft.find_lr(trainer).plot()                   # which learning rate
    insight.fast_dev_run(trainer)                # does all that a run does work here? a step of each, taken back
    insight.overfit_batch(trainer)               # can it learn at all? the same rows again and again, taken back
    ft.evaluate_generation(lm, data.test)        # what the model writes, judged
    trainer.run(callbacks=[insight.Forgetting(prompts, text)])  # what it forgets
    ft.compare(["runs/a", "runs/b"])             # runs side by side

The most used ones stand at the package's top too.
"""

from fulltune_nb.insight.comparison import Comparison, compare
from fulltune_nb.insight.forgetting import Forgetting
from fulltune_nb.insight.generation_score import GenerationReport, GenerationScore, evaluate_generation
from fulltune_nb.insight.learning_rate import LearningRateSearch, find_lr
from fulltune_nb.insight.losses import TokenLosses, TopLosses, token_losses, top_losses
from fulltune_nb.insight.rehearsals import DevRun, OverfitRun, fast_dev_run, overfit_batch
from fulltune_nb.insight.tracing import Inspection, Trace, inspect, trace
from fulltune_nb.insight.updates import UpdateMeter

__all__ = [
    "Comparison",
    "DevRun",
    "Forgetting",
    "GenerationReport",
    "GenerationScore",
    "Inspection",
    "LearningRateSearch",
    "OverfitRun",
    "TokenLosses",
    "TopLosses",
    "Trace",
    "UpdateMeter",
    "compare",
    "evaluate_generation",
    "fast_dev_run",
    "find_lr",
    "inspect",
    "overfit_batch",
    "token_losses",
    "top_losses",
    "trace",
]
