"""Looking inside a model while it learns: every function returns an object with a plot, a table and a view for a cell.

    from fulltune_nb import insight

    ft.token_losses(lm, data.valid[:3])          # which tokens are hard, and what the model would rather have said
    insight.top_losses(lm, data.valid).page(1)   # the rows with the largest loss

The most used ones stand at the package's top too.
"""

from fulltune_nb.insight.token_losses import TokenLosses, TopLosses, token_losses, top_losses

__all__ = ["TokenLosses", "TopLosses", "token_losses", "top_losses"]
