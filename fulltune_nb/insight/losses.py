"""The loss of every token: which ones a model finds hard, what it would rather have said, and what a fine-tuning has changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune_nb import svg
from fulltune_nb.data.example import Example, Piece, pieces, said_text, split_character, token_texts, visible
from fulltune_nb.errors import ConfigError
from fulltune_nb.frames import frame
from fulltune_nb.html import NO_MATH, counted, cut, esc, more, table
from fulltune_nb.insight.predictions import (
    ALTERNATIVES,
    TokenStatistics,
    as_examples,
    check_same_tokens,
    ranking,
    token_statistics,
    trained_tokens,
)
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.settings import whole_number

if TYPE_CHECKING:
    from fulltune_nb.plots import Axes

TOKENS_SHOWN = 6000
"""Boxes in one cell; what is beyond is counted. A browser lays out so many in a fraction of a second."""


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
        return trained_tokens(self.example)

    @property
    def loss(self) -> float:
        """Mean over the trained tokens; NaN where there are none."""
        return _mean([self.losses[self.trained]])

    @property
    def difference(self) -> np.ndarray | None:
        """(T,) float32: this model's loss minus the base's; below zero where it does better."""
        return None if self.base is None else self.losses - self.base.losses

    @property
    def shown(self) -> np.ndarray:
        """(T,) float32, what is coloured and drawn: the difference where there is a base, else the loss."""
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
        return _mean(row.losses[row.trained] for row in self.rows)

    @property
    def difference(self) -> float | None:
        """This model's loss minus the base's; None without a base."""
        return _mean(row.difference[row.trained] for row in self.rows) if self.compared else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> TokenLosses:
        """The example at an index, or some of them, as an object of their own."""
        return TokenLosses(self.rows[index] if isinstance(index, slice) else [self.rows[index]], self.tokenizer, self.compared)

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each token. Raises `MissingDependencyError` without pandas."""
        columns = ["source", "position", "id", "token", "trained", "loss", "probability", "rank"]
        columns += ["base_loss", "difference"] if self.compared else []
        parts = [self._columns(row) for row in self.rows]
        return frame({name: [value for part in parts for value in part[name]] for name in columns})

    def _columns(self, row: ExampleLosses) -> dict[str, Sequence]:
        ids = row.example.tokens.tolist()
        columns = {
            "source": [row.example.source] * len(ids), "position": range(len(ids)), "id": ids, "token": token_texts(self.tokenizer, ids),
            "trained": row.trained.tolist(), "loss": row.losses.tolist(), "probability": row.found.probabilities.tolist(),
            "rank": row.found.ranks.tolist(),
        }  # fmt: skip
        return columns | ({"base_loss": row.base.losses.tolist(), "difference": row.difference.tolist()} if self.compared else {})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Loss by position, with a base the difference to it; a curve for each of the first four examples, on `ax` or a new figure."""
        from fulltune_nb.plots import curves

        series = [(row.example.source, range(len(row.losses)), row.shown) for row in self.rows[:4]]
        label = "loss - loss of the base (nats)" if self.compared else "loss (nats)"
        hidden = f"; {len(self.rows) - 4:,} more examples not drawn" if len(self.rows) > 4 else ""
        return curves(series, "token", label, f"mean loss {self.loss:.3f} over {self.tokens:,} tokens{hidden}", ax=ax)

    def __repr__(self) -> str:
        against = f", {self.difference:+.4f} against the base" if self.compared else ""
        size = f"{counted(len(self.rows), 'example')}, {counted(self.tokens, 'trained token')}"
        return f"TokenLosses({size}, mean loss {self.loss:.4f}{against})"

    def _repr_html_(self) -> str:
        texts: dict[int, str] = {}
        left, parts, hidden = TOKENS_SHOWN, [], 0
        for row in self.rows:
            if left <= 0:
                hidden += 1
                continue
            parts.append(_example_html(row, self.tokenizer, texts, left))
            left -= len(row.losses)
        parts.append(more(hidden, f"examples not shown; take some of them, as in losses[{len(self) - hidden}:]"))
        against = f", {self.difference:+.4f} against the base" if self.compared else ""
        head = f"<div><b>Loss {self.loss:.4f}</b> nats over {self.tokens:,} trained tokens of {len(self):,} examples{against}</div>"
        return f'<div class="{NO_MATH}">{head}{_legend(self.compared)}{"".join(parts)}</div>'


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
    found, own, others = _statistics(lm, examples, base, ALTERNATIVES)
    rows = [ExampleLosses(*parts) for parts in zip(found, own, others, strict=True)]
    return TokenLosses(rows, lm.tokenizer, base is not None)


def _statistics(
    lm: LanguageModel, given: Any, base: LanguageModel | None, alternatives: int
) -> tuple[list[Example], list[TokenStatistics], list[TokenStatistics | None]]:
    """Examples, and the statistics of the model and of the base for each."""
    examples = as_examples(lm, given)
    tokens = [example.tokens for example in examples]
    if base is not None:
        check_same_tokens(lm, base, examples)
    own = token_statistics(lm.model, tokens, alternatives)
    return examples, own, [None] * len(own) if base is None else token_statistics(base.model, tokens, alternatives)


def _mean(parts: Iterable[np.ndarray]) -> float:
    values = np.concatenate([*parts, np.zeros(0, np.float32)])
    return float(values.astype(np.float64).mean()) if len(values) else float("nan")


# -- the worst rows ---------------------------------------------------------------------------------------------------

_ORDERS = {"mean": np.mean, "sum": np.sum, "max": np.max}


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
        number = whole_number("page", number, low=1)
        if number > max(1, self.pages):
            raise ConfigError(f"page: there are {self.pages}, got {number}.")
        rows = self.order[(number - 1) * self.page_size : number * self.page_size]
        return token_losses(self._lm, [self._split[int(row)] for row in rows], self._base)

    def to_frame(self) -> Any:
        """A pandas DataFrame with a line for each row of the split, the worst first. Raises `MissingDependencyError` without pandas."""
        return frame(self._lines(len(self.order)), ["index", "source", self._by, "text"])

    def _lines(self, count: int) -> list[dict[str, Any]]:
        worst = zip(self.order[:count].tolist(), self.scores[:count].tolist(), strict=True)
        return [{"index": i, "source": self._split[i].source, self._by: score, "text": self._split[i].text} for i, score in worst]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The scores of all rows, from the worst to the best, on `ax` or a new figure."""
        from fulltune_nb.plots import curves

        label = "loss - loss of the base" if self._base is not None else "loss"
        return curves([(label, range(1, len(self.scores) + 1), self.scores)], "rows, the worst first", f"{self._by} {label} (nats)", ax=ax)

    def __repr__(self) -> str:
        worst = f", the worst {self.scores[0]:.4f}" if len(self.scores) else ""
        return f"TopLosses({counted(len(self.order), 'row')} by {self._by}{worst}, {counted(self.pages, 'page')})"

    def _repr_html_(self) -> str:
        lines = self._lines(2 * self.page_size)
        rows = [(line["index"], line["source"], f"{line[self._by]:.4f}", cut(line["text"], 160)) for line in lines]
        caption = f"The worst {len(rows):,} of {len(self.order):,} rows; .page(1) to .page({self.pages}) show them token by token"
        first = self.page(1)._repr_html_() if rows else ""
        return f"<div>{table(('index', 'row', f'{self._by} (nats)', 'text'), rows, caption)}{first}</div>"


def top_losses(lm: LanguageModel, examples: Any, base: LanguageModel | None = None, by: str = "mean", page_size: int = 5) -> TopLosses:
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
    page_size = whole_number("page_size", page_size, low=1)
    found = [ExampleLosses(*parts) for parts in zip(*_statistics(lm, examples, base, 0), strict=True)]
    scores = np.full(len(found), -np.inf)
    for i, row in enumerate(found):
        if row.trained.any():
            scores[i] = _ORDERS[by](row.shown[row.trained].astype(np.float64))
    return TopLosses(lm, [row.example for row in found], base, by, scores, page_size)


# -- in a cell --------------------------------------------------------------------------------------------------------

_STRIP_FROM = 200  # tokens; a longer example gets an overview of its losses
_STRIP_BARS = 120
_LOSS_LEVELS = (0.1, 0.5, 1.0, 2.0, 4.0)  # nats
_DIFFERENCE_LEVELS = (0.05, 0.2, 0.5, 1.0, 2.0)
_ALPHAS = ("00", "18", "2a", "40", "58", "70")
_PRE = "white-space:pre-wrap;overflow-wrap:anywhere;margin:2px 0 10px 0;line-height:2.1;max-height:420px;overflow:auto"


def _legend(compared: bool) -> str:
    def sample(text: str, value: float) -> str:
        return f'<span style="{_style(value, True, compared)}">{text}</span>'

    read = f'<span style="{_style(1.5, False, compared)}">only read</span> (dotted line)'
    if compared:
        words = f"{sample('much worse', 9)} {sample('worse', 0.6)} than the base (line below) &nbsp; "
        words += f"{sample('much better', -9)} {sample('better', -0.6)} (line above)"
    else:
        names = ("below 0.1", "0.1 to 0.5", "0.5 to 1", "1 to 2", "2 to 4", "4 nats and more")
        words = " ".join(sample(name, value) for name, value in zip(names, (0.0, 0.3, 0.7, 1.5, 3.0, 5.0), strict=True))
    return f'<div style="margin:4px 0;line-height:2">{words} &nbsp; {read} &nbsp; hover over a token for its numbers</div>'


def _style(value: float, trained: bool, compared: bool) -> str:
    """A colour, and a line of 1 to 5 pixels, so that none is told by its colour alone."""
    if not np.isfinite(value):
        return "outline:2px dashed" if np.isposinf(value) else ""
    level = int(np.searchsorted(_DIFFERENCE_LEVELS if compared else _LOSS_LEVELS, abs(value), side="right"))
    if level == 0:
        return "margin-right:1px"
    colour, side = (svg.BLUE, "top") if value < 0 else (svg.VERMILLION, "bottom")
    return f"margin-right:1px;background:{colour}{_ALPHAS[level]};border-{side}:{level}px {'solid' if trained else 'dotted'} {colour}"


def _example_html(row: ExampleLosses, tokenizer, texts: dict[int, str], left: int) -> str:
    """An example token by token, `left` tokens at most, below its losses as a strip where it is long; `texts` are tokens known so far."""
    left = split_character(tokenizer, row.example.tokens, left)[1]
    tokens, trained, values = row.example.tokens[:left], row.trained, row.shown
    new = [token for token in np.unique(np.append(tokens, row.found.top_ids[:left])).tolist() if token not in texts]
    texts.update(zip(new, token_texts(tokenizer, new), strict=True))
    boxes = []
    for piece in pieces(tokenizer, tokens.tolist()):
        own = slice(piece.start, piece.stop)
        style = _style(_sum(values[own]), bool(trained[own].any()), row.base is not None)
        boxes.append(f'<span style="{style}" title="{esc(_title(row, piece, texts, tokenizer))}">{esc(visible(piece.text))}</span>')
    hidden = f"<b> … {len(row.losses) - len(tokens):,} tokens not shown</b>" if len(row.losses) > len(tokens) else ""
    difference = f", {np.mean(row.difference[trained]):+.4f} against the base" if row.base is not None and trained.any() else ""
    counts = f"loss {row.loss:.4f}{difference}, {len(row.losses):,} tokens, {int(trained.sum()):,} trained on"
    strip = _strip(values, row.base is not None) if len(values) > _STRIP_FROM else ""
    # The browser drops a line break that comes first in <pre>; the span before it prevents that.
    return f'<div><b>{esc(row.example.source)}</b> &nbsp; {counts}</div>{strip}<pre style="{_PRE}">{"".join(boxes)}{hidden}</pre>'


def _sum(values: np.ndarray) -> float:
    """Of what is known; NaN where nothing is. The losses of a character's tokens are together the loss of the character."""
    known = values[~np.isnan(values)]
    return float(known.sum()) if len(known) else float("nan")


def _title(row: ExampleLosses, piece: Piece, texts: dict[int, str], tokenizer) -> str:
    if len(piece.ids) == 1:
        return _title_of_token(row, piece.start, texts)
    parts = [f"{len(piece.ids)} tokens, together {_sum(row.shown[piece.start : piece.stop]):.3f}"]
    for i in range(piece.start, piece.stop):
        begun, said = piece.ids[: i - piece.start], row.found.top_ids[i].tolist()
        parts.append(_title_of_token(row, i, {token: said_text(tokenizer, begun, token) for token in said}))
    return "\n\n".join(parts)


def _title_of_token(row: ExampleLosses, i: int, texts: dict[int, str]) -> str:
    if i == 0:
        return f"token 0, id {row.example.tokens[0]}: nothing stands before it"
    lines = [
        f"token {i}, id {row.example.tokens[i]}{'' if row.trained[i] else ', not trained on'}",
        f"loss {row.losses[i]:.3f}, probability {row.found.probabilities[i]:.2%}, rank {row.found.ranks[i]}",
    ]
    if row.base is not None:
        lines.append(f"base: loss {row.base.losses[i]:.3f}, rank {row.base.ranks[i]}; difference {row.difference[i]:+.3f}")
    said = [texts[token] for token in row.found.top_ids[i].tolist()]
    return "\n".join([*lines, ranking(said, row.found.top_probabilities[i])])


def _strip(values: np.ndarray, compared: bool) -> str:
    """Means of equally long stretches of an example, as bars from left to right; below the middle where it became better."""
    parts = np.array_split(values[1:], min(_STRIP_BARS, len(values) - 1))
    means = [float(part[np.isfinite(part)].mean()) if np.isfinite(part).any() else 0.0 for part in parts]
    starts = np.cumsum([1, *map(len, parts)]).tolist()
    what = "difference" if compared else "loss"
    stretches = zip(starts, starts[1:], means, strict=False)
    titles = [f"tokens {start} to {end - 1}: {what} {mean:.3f}" for start, end, mean in stretches]
    of = "difference to the base" if compared else "loss"
    label = f"mean {of} of {len(parts)} stretches from the first token to the last; the largest {max(map(abs, means)):.3f}"
    return svg.bars(means, titles, label, signed=compared, colours=(svg.VERMILLION, svg.BLUE), width=720, height=40)
