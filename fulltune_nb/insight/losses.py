"""The loss of every token: which ones a model finds hard, what it would rather have said, and what a fine-tuning has changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune_nb.data.encoding import Example
from fulltune_nb.data.lens import token_texts
from fulltune_nb.data.settings import whole
from fulltune_nb.errors import ConfigError
from fulltune_nb.frames import frame
from fulltune_nb.html import counted
from fulltune_nb.insight.examples import as_examples, check_same_tokens
from fulltune_nb.insight.token_statistics import TokenStatistics, token_statistics
from fulltune_nb.language_model import LanguageModel

if TYPE_CHECKING:
    from fulltune_nb.charts import Axes


@dataclass(frozen=True, eq=False)
class ExampleLosses:
    """One example, token by token; arrays as in `TokenStatistics`."""

    example: Example
    found: TokenStatistics
    base: TokenStatistics | None = None
    """The same of the base model."""

    @property
    def losses(self) -> np.ndarray:
        """(T,) float32, nats; NaN for the first token."""
        return self.found.losses

    @property
    def trained(self) -> np.ndarray:
        """(T,) bool: the tokens that the loss is taken over."""
        mask = np.array(self.example.loss_mask, dtype=bool)
        mask[:1] = False
        return mask

    @property
    def loss(self) -> float:
        """Mean over the trained tokens; NaN where there are none."""
        return _mean(self.losses[self.trained])

    @property
    def difference(self) -> np.ndarray | None:
        """(T,) float32: this model's loss minus the base's; below zero where it does better."""
        return None if self.base is None else self.losses - self.base.losses

    @property
    def shown(self) -> np.ndarray:
        """What is coloured and drawn: the difference where there is a base, else the loss."""
        return self.losses if self.base is None else self.difference


class TokenLosses:
    """What `token_losses` returns.

    Attributes:
        rows: an `ExampleLosses` for each example.
        compared: whether a base model was given.
    """

    def __init__(self, rows: Sequence[ExampleLosses], tokenizer: Any, compared: bool):
        self.rows, self.tokenizer, self.compared = list(rows), tokenizer, compared

    @property
    def tokens(self) -> int:
        """Trained tokens of all examples."""
        return sum(int(row.trained.sum()) for row in self.rows)

    @property
    def loss(self) -> float:
        """Mean over the trained tokens of all examples, every token counting the same, as `Trainer.evaluate` has it; in nats."""
        return _mean(np.concatenate([row.losses[row.trained] for row in self.rows] or [np.zeros(0)]))

    @property
    def difference(self) -> float | None:
        """This model's loss minus the base's; None without a base."""
        if not self.compared:
            return None
        return _mean(np.concatenate([row.difference[row.trained] for row in self.rows] or [np.zeros(0)]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> TokenLosses:
        """The example at an index, or some of them, as an object of their own."""
        return TokenLosses(self.rows[index] if isinstance(index, slice) else [self.rows[index]], self.tokenizer, self.compared)

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each token.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        columns = ["source", "position", "id", "token", "trained", "loss", "probability", "rank"]
        columns += ["base_loss", "difference"] if self.compared else []
        return frame((values for row in self.rows for values in self._values(row)), columns)

    def _values(self, row: ExampleLosses) -> list[dict[str, Any]]:
        ids = row.example.tokens.tolist()
        columns: dict[str, Any] = {
            "position": range(len(ids)), "id": ids, "token": token_texts(self.tokenizer, ids), "trained": row.trained.tolist(),
            "loss": row.losses.tolist(), "probability": row.found.probabilities.tolist(), "rank": row.found.ranks.tolist(),
        }
        if self.compared:
            columns |= {"base_loss": row.base.losses.tolist(), "difference": row.difference.tolist()}
        return [{"source": row.example.source, **dict(zip(columns, cells, strict=True))} for cells in zip(*columns.values(), strict=True)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Loss by position, a curve for each of the first four examples; with a base the difference to it.

        Args:
            ax: where to draw; a new figure where left out.
        """
        from fulltune_nb.charts import curves

        series = [(row.example.source, range(len(row.losses)), row.shown) for row in self.rows[:4]]
        label = "loss - loss of the base (nats)" if self.compared else "loss (nats)"
        more = f"; {len(self.rows) - 4:,} more examples not drawn" if len(self.rows) > 4 else ""
        return curves(series, "token", label, f"mean loss {self.loss:.3f} over {self.tokens:,} tokens{more}", ax=ax)

    def __repr__(self) -> str:
        against = f", {self.difference:+.4f} against the base" if self.compared else ""
        size = f"{counted(len(self.rows), 'example')}, {counted(self.tokens, 'trained token')}"
        return f"TokenLosses({size}, mean loss {self.loss:.4f}{against})"

    def _repr_html_(self) -> str:
        from fulltune_nb.insight.losses_view import token_losses_html

        return token_losses_html(self)


def token_losses(lm: LanguageModel, examples: Any, base: LanguageModel | None = None) -> TokenLosses:
    """The loss of every token of some examples, with its probability, its rank and the likeliest tokens at its place.

    In a cell, each token is coloured and underlined by its loss; hovering over it tells the rest.

    Args:
        lm: the model.
        examples: an `Example`, a text, or a sequence of them, such as `data.valid[:5]` or `trainer.batch_at(step)`.
        base: another model with the same tokenizer, such as the one before the fine-tuning; the difference of the losses is then
            what is shown.

    Raises:
        ConfigError: something else than examples, or a base whose token ids mean other tokens.
        DataError: token ids that the model has not.
    """
    found = as_examples(lm, examples)
    tokens = [example.tokens for example in found]
    if base is not None:
        check_same_tokens(lm, base, found)
    own = token_statistics(lm.model, tokens)
    others = [None] * len(own) if base is None else token_statistics(base.model, tokens)
    rows = [ExampleLosses(*parts) for parts in zip(found, own, others, strict=True)]
    return TokenLosses(rows, lm.tokenizer, base is not None)


_ORDERS = {
    "mean": lambda values: values.mean(),
    "sum": lambda values: values.sum(),
    "max": lambda values: values.max(),
}


class TopLosses:
    """What `top_losses` returns: the rows of a split from the worst on, a page at a time.

    Attributes:
        order: (rows,) int64, indices into the split, the worst first. Rows without a trained token are not among them.
        scores: (rows,) float64, what they were sorted by, in that order; NaN comes first.
        page_size: examples of a page.
    """

    def __init__(self, lm: LanguageModel, split: Sequence[Example], base: LanguageModel | None, by: str, scores: Any, page_size: int):
        self._lm, self._split, self._base, self._by = lm, split, base, by
        rows = np.flatnonzero(scores != -np.inf)
        worst = np.where(np.isnan(scores[rows]), np.inf, scores[rows])
        self.order = rows[np.argsort(-worst, kind="stable")]
        self.scores = scores[self.order]
        self.page_size = page_size

    @property
    def pages(self) -> int:
        """How many there are."""
        return -(-len(self.order) // self.page_size)

    def page(self, number: int = 1) -> TokenLosses:
        """The examples of a page, from 1, token by token; by the models' weights as they are now.

        Raises:
            ConfigError: there is no such page.
        """
        number = whole("page", number, low=1)
        if number > max(1, self.pages):
            raise ConfigError(f"page: there are {self.pages}, got {number}.")
        rows = self.order[(number - 1) * self.page_size : number * self.page_size]
        return token_losses(self._lm, [self._split[int(row)] for row in rows], self._base)

    def to_frame(self) -> Any:
        """A pandas DataFrame with a line for each row of the split, the worst first.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        return frame(self._lines(len(self.order)), ["index", "source", self._by, "text"])

    def _lines(self, count: int) -> list[dict[str, Any]]:
        lines = []
        for row, score in zip(self.order[:count].tolist(), self.scores.tolist(), strict=False):
            lines.append({"index": row, "source": self._split[row].source, self._by: score, "text": self._split[row].text})
        return lines

    def plot(self, ax: Axes | None = None) -> Axes:
        """The scores of all rows, from the worst to the best.

        Args:
            ax: where to draw; a new figure where left out.
        """
        from fulltune_nb.charts import curves

        label = "loss - loss of the base" if self._base is not None else "loss"
        return curves([(label, range(1, len(self.scores) + 1), self.scores)], "rows, the worst first", f"{self._by} {label} (nats)", ax=ax)

    def __repr__(self) -> str:
        worst = f", the worst {self.scores[0]:.4f}" if len(self.scores) else ""
        return f"TopLosses({counted(len(self.order), 'row')} by {self._by}{worst}, {counted(self.pages, 'page')})"

    def _repr_html_(self) -> str:
        from fulltune_nb.insight.losses_view import top_losses_html

        return top_losses_html(self, self._lines(2 * self.page_size), self._by)


def top_losses(
    lm: LanguageModel, examples: Any, base: LanguageModel | None = None, by: str = "mean", page_size: int = 5
) -> TopLosses:
    """A split sorted by loss, the worst first, to page through: `top_losses(lm, data.valid).page(2)`.

    Args:
        lm: the model.
        examples: a split, or a list of examples or texts.
        base: sort by the difference to this model's loss instead: what has become worse comes first.
        by: `"mean"`, `"sum"` or `"max"` over the trained tokens of an example.
        page_size: examples of a page.

    Raises:
        ConfigError, DataError: as `token_losses`, or another `by` or `page_size`.
    """
    if by not in _ORDERS:
        raise ConfigError(f"by: expected {', '.join(map(repr, _ORDERS))}, got {by!r}.")
    page_size = whole("page_size", page_size, low=1)
    found = as_examples(lm, examples)
    tokens = [example.tokens for example in found]
    losses = [statistics.losses for statistics in token_statistics(lm.model, tokens, alternatives=0)]
    if base is not None:
        check_same_tokens(lm, base, found)
        others = token_statistics(base.model, tokens, alternatives=0)
        losses = [own - other.losses for own, other in zip(losses, others, strict=True)]
    scores = np.full(len(found), -np.inf)
    for row, (example, values) in enumerate(zip(found, losses, strict=True)):
        mask = np.array(example.loss_mask, dtype=bool)
        mask[:1] = False
        if mask.any():
            scores[row] = _ORDERS[by](values[mask].astype(np.float64))
    return TopLosses(lm, found, base, by, scores, page_size)


def _mean(values: np.ndarray) -> float:
    return float(values.astype(np.float64).mean()) if len(values) else float("nan")
