"""The loss of every token: which ones a model finds hard, what it would rather have said, and what a fine-tuning has changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from fulltune_nb.chat_template import prompt_ids
from fulltune_nb.cpu import softmax_statistics
from fulltune_nb.data.encode import Example
from fulltune_nb.data.look import token_texts, visible
from fulltune_nb.errors import ConfigError, DataError
from fulltune_nb.frames import frame
from fulltune_nb.html import NO_MATH, PALETTE, counted, cut, esc, table
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.settings import whole_number
from fulltune_nb.training.loss import chunks

if TYPE_CHECKING:
        from fulltune_nb.plots import Axes

# -- examples: What the insight functions accept as examples, and what they read from them

def as_examples(lm: LanguageModel, given: Any) -> list[Example]:
    """One example or text, or many; a text is tokenized with the special tokens its tokenizer adds, and all of it counts as trained on.

    Raises:
        ConfigError: something else.
        DataError: token ids that the model has not.
    """
    if isinstance(given, (str, Example)):
        given = [given]
    if not isinstance(given, Sequence) or not all(isinstance(one, (str, Example)) for one in given):
        hint = " Pass one of its splits, such as data.valid." if hasattr(given, "splits") else ""
        raise ConfigError(f"Expected an example, a text, or a list of them, got {type(given).__name__}.{hint}")
    examples = [text_example(lm, one, number) if isinstance(one, str) else one for number, one in enumerate(given)]
    for example in examples:
        if len(example.tokens) and not 0 <= example.tokens.min() <= example.tokens.max() < lm.config.vocab_size:
            raise DataError(
                f"{example.source}: token ids from {example.tokens.min()} to {example.tokens.max()}, but the model has 0 to "
                f"{lm.config.vocab_size - 1}. Load the data with this model's tokenizer."
            )
    return examples


def text_example(lm: LanguageModel, text: str, number: int = 0) -> Example:
    """A text as an example of its own."""
    tokens = np.array(prompt_ids(lm.tokenizer, text, lm.config.vocab_size), dtype=np.int32)
    mask = np.arange(len(tokens)) > 0
    return Example(tokens, mask, text, f"text:{number + 1}", 0, {"text": text}, lm.tokenizer)


def check_same_tokens(lm: LanguageModel, other: LanguageModel, examples: Sequence[Example]) -> None:
    """That a token id means the same to two models.

    Raises:
        ConfigError: it does not.
    """
    used = np.unique(np.concatenate([example.tokens for example in examples] or [np.zeros(0, np.int32)])).tolist()
    if used and used[-1] >= other.config.vocab_size:
        there = other.config.vocab_size
        raise ConfigError(f"base: it has {there} token ids, the examples use id {used[-1]}. Compare models of one tokenizer.")
    for token, here, there in zip(used, *(m.tokenizer.convert_ids_to_tokens(used) for m in (lm, other)), strict=True):
        if here != there:
            raise ConfigError(f"base: token id {token} is {there!r} there and {here!r} here. Compare models of one tokenizer.")


# -- token_statistics: Loss, probability, rank and the likeliest tokens at every position of some rows, a chunk of logits a

ALTERNATIVES = 5
_POSITIONS = 4096  # B * T of a forward pass


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """How well each token of a row was predicted from those before it; the first, which nothing predicts, has NaN and rank 0."""

    losses: np.ndarray
    """(T,) float32, nats: -log p(token)."""
    ranks: np.ndarray
    """(T,) int32; 1 is the likeliest token. Ties count for the token."""
    top_ids: np.ndarray
    """(T, K) int32, the likeliest tokens at each place, best first; empty where none were asked for."""
    top_probabilities: np.ndarray
    """(T, K) float32."""

    @property
    def probabilities(self) -> np.ndarray:
        """(T,) float32."""
        return np.exp(-self.losses)


def token_statistics(model: Decoder, rows: Sequence[np.ndarray], alternatives: int = ALTERNATIVES) -> list[TokenStatistics]:
    """One for each row of token ids, in their order. `alternatives=0` leaves out ranks and alternatives, and takes less time."""
    found: list[TokenStatistics | None] = [None] * len(rows)
    alternatives = min(alternatives, model.config.vocab_size)
    for numbers in _batches([len(row) for row in rows]):
        inputs = np.zeros((len(numbers), max(1, *(len(rows[i]) - 1 for i in numbers))), dtype=np.int32)
        for b, i in enumerate(numbers):
            inputs[b, : max(0, len(rows[i]) - 1)] = rows[i][:-1]
        # (B, T - 1, D); padding stands to the right, where nothing looks from
        hidden = model.hidden_states(mx.array(inputs), dtype=model.compute_dtype)
        mx.eval(hidden)
        for b, i in enumerate(numbers):
            found[i] = _of_row(model, hidden[b, : max(0, len(rows[i]) - 1)], rows[i], alternatives)
    return found


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of about one length together, at most `_POSITIONS` positions (or one row) at a time."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > _POSITIONS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _of_row(model: Decoder, hidden: mx.array, tokens: np.ndarray, alternatives: int) -> TokenStatistics:
    size = len(tokens)
    losses, ranks = np.full(size, np.nan, np.float32), np.zeros(size, np.int32)
    ids, probabilities = np.zeros((size, alternatives), np.int32), np.zeros((size, alternatives), np.float32)
    for begin, end in ((part.start, part.stop) for part in chunks(size - 1, model.config.vocab_size)):
        logits = model.head(hidden[begin:end]).astype(mx.float32)  # (n, V)
        targets = mx.array(tokens[begin + 1 : end + 1].astype(np.int32))[:, None]
        at_target = mx.take_along_axis(logits, targets, axis=1)  # (n, 1)
        log_sum, shares = softmax_statistics(logits)
        places = slice(begin + 1, end + 1)
        losses[places] = np.array(log_sum - at_target[:, 0])
        if alternatives:
            ranks[places] = np.array((logits > at_target).sum(axis=1) + 1)
            ids[places], probabilities[places] = top_tokens(logits, shares, alternatives)
    return TokenStatistics(losses, ranks, ids, probabilities)


def top_tokens(logits: mx.array, shares: mx.array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and probabilities (n, K) of the likeliest tokens of logits and their softmax (n, V), best first."""
    ids = mx.argpartition(-logits, kth=count - 1, axis=-1)[:, :count]
    ids = mx.take_along_axis(ids, mx.argsort(-mx.take_along_axis(logits, ids, axis=-1), axis=-1), axis=-1)
    return np.array(ids), np.array(mx.take_along_axis(shares, ids, axis=-1))


# -- losses: The loss of every token: which ones a model finds hard, what it would rather have said, and what a f

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
        from fulltune_nb.plots import curves

        series = [(row.example.source, range(len(row.losses)), row.shown) for row in self.rows[:4]]
        label = "loss - loss of the base (nats)" if self.compared else "loss (nats)"
        more = f"; {len(self.rows) - 4:,} more examples not drawn" if len(self.rows) > 4 else ""
        return curves(series, "token", label, f"mean loss {self.loss:.3f} over {self.tokens:,} tokens{more}", ax=ax)

    def __repr__(self) -> str:
        against = f", {self.difference:+.4f} against the base" if self.compared else ""
        size = f"{counted(len(self.rows), 'example')}, {counted(self.tokens, 'trained token')}"
        return f"TokenLosses({size}, mean loss {self.loss:.4f}{against})"

    def _repr_html_(self) -> str:

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
        number = whole_number("page", number, low=1)
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
        from fulltune_nb.plots import curves

        label = "loss - loss of the base" if self._base is not None else "loss"
        return curves([(label, range(1, len(self.scores) + 1), self.scores)], "rows, the worst first", f"{self._by} {label} (nats)", ax=ax)

    def __repr__(self) -> str:
        worst = f", the worst {self.scores[0]:.4f}" if len(self.scores) else ""
        return f"TopLosses({counted(len(self.order), 'row')} by {self._by}{worst}, {counted(self.pages, 'page')})"

    def _repr_html_(self) -> str:

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
    page_size = whole_number("page_size", page_size, low=1)
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


# -- losses_view: How token losses show themselves in a cell

TOKENS_SHOWN = 6000
"""Boxes in one cell; what is beyond is counted. A browser lays out so many in a fraction of a second."""
_STRIP_FROM = 200  # tokens; a longer example gets an overview of its losses
_STRIP_BARS = 120
_TOKEN = 40  # characters of a token's text
_LOSS_LEVELS = (0.1, 0.5, 1.0, 2.0, 4.0)  # nats
_DIFFERENCE_LEVELS = (0.05, 0.2, 0.5, 1.0, 2.0)
_ALPHAS = ("00", "18", "2a", "40", "58", "70")
_WIDTHS = (0, 1, 2, 3, 4, 5)  # pixels of the line
_PRE = "white-space:pre-wrap;overflow-wrap:anywhere;margin:2px 0 10px 0;line-height:2.1;max-height:420px;overflow:auto"


def token_losses_html(shown: TokenLosses) -> str:
    """Legend, and each example: its losses as a strip where it is long, then token by token."""
    texts: dict[int, str] = {}
    left, parts, hidden = TOKENS_SHOWN, [], 0
    for row in shown.rows:
        if left <= 0:
            hidden += 1
            continue
        parts.append(_example(row, shown.tokenizer, texts, left))
        left -= len(row.losses)
    if hidden:
        parts.append(f"<div>… {hidden:,} more examples not shown; take some of them, as in losses[{len(shown) - hidden}:]</div>")
    against = f", {shown.difference:+.4f} against the base" if shown.compared else ""
    head = f"<div><b>Loss {shown.loss:.4f}</b> nats over {shown.tokens:,} trained tokens of {len(shown):,} examples{against}</div>"
    return f'<div class="{NO_MATH}">{head}{_legend(shown.compared)}{"".join(parts)}</div>'


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
    if not np.isfinite(value):
        return "outline:2px dashed" if np.isposinf(value) else ""
    level = int(np.searchsorted(_DIFFERENCE_LEVELS if compared else _LOSS_LEVELS, abs(value), side="right"))
    if level == 0:
        return "margin-right:1px"
    better = value < 0
    colour, side = (PALETTE[0], "top") if better else (PALETTE[5], "bottom")
    line = f"{_WIDTHS[level]}px {'solid' if trained else 'dotted'} {colour}"
    return f"margin-right:1px;background:{colour}{_ALPHAS[level]};border-{side}:{line}"


def _example(row: ExampleLosses, tokenizer, texts: dict[int, str], left: int) -> str:
    tokens, trained, values = row.example.tokens[:left], row.trained, row.shown
    top = row.found.top_ids[:left]
    _learn(texts, tokenizer, np.concatenate([tokens, top.ravel()]))
    boxes = []
    for i, token in enumerate(tokens.tolist()):
        style = _style(float(values[i]), bool(trained[i]), row.base is not None)
        boxes.append(f'<span style="{style}" title="{esc(_title(row, i, texts))}">{esc(visible(texts[token]))}</span>')
    more = f"<b> … {len(row.losses) - len(tokens):,} tokens not shown</b>" if len(row.losses) > len(tokens) else ""
    difference = f", {np.mean(row.difference[trained]):+.4f} against the base" if row.base is not None and trained.any() else ""
    counts = f"loss {row.loss:.4f}{difference}, {len(row.losses):,} tokens, {int(trained.sum()):,} trained on"
    strip = _strip(values, row.base is not None) if len(values) > _STRIP_FROM else ""
    # The browser drops a line break that comes first in <pre>; the span before it prevents that.
    return f'<div><b>{esc(row.example.source)}</b> &nbsp; {counts}</div>{strip}<pre style="{_PRE}">{"".join(boxes)}{more}</pre>'


def _learn(texts: dict[int, str], tokenizer, ids: np.ndarray) -> None:
    new = [token for token in np.unique(ids).tolist() if token not in texts]
    texts.update((token, text) for token, text in zip(new, token_texts(tokenizer, new), strict=True))


def _title(row: ExampleLosses, i: int, texts: dict[int, str]) -> str:
    if i == 0:
        return f"token 0, id {row.example.tokens[0]}: nothing stands before it"
    lines = [
        f"token {i}, id {row.example.tokens[i]}{'' if row.trained[i] else ', not trained on'}",
        f"loss {row.losses[i]:.3f}, probability {row.found.probabilities[i]:.2%}, rank {row.found.ranks[i]}",
    ]
    if row.base is not None:
        lines.append(f"base: loss {row.base.losses[i]:.3f}, rank {row.base.ranks[i]}; difference {row.difference[i]:+.3f}")
    pairs = zip(row.found.top_ids[i].tolist(), row.found.top_probabilities[i].tolist(), strict=True)
    lines += [f"{place}. {share:.2%} {_short(visible(texts[token]))}" for place, (token, share) in enumerate(pairs, 1)]
    return "\n".join(lines)


def _short(text: str) -> str:
    text = text.replace("\n", "")
    return text if len(text) <= _TOKEN else f"{text[:_TOKEN]}…"


def _strip(values: np.ndarray, compared: bool, width: int = 720, height: int = 40) -> str:
    """Means of equally long stretches of an example, as bars from left to right; below the middle where it became better."""
    parts = np.array_split(values[1:], min(_STRIP_BARS, len(values) - 1))
    means = np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else 0.0 for part in parts])
    largest = max(float(np.abs(means).max()), 1e-9)
    zero = height / 2 if compared else height
    step, bars, place = width / len(parts), [], 1
    for i, (mean, part) in enumerate(zip(means, parts, strict=True)):
        size = abs(mean) / largest * zero
        colour, y = (PALETTE[5], zero - size) if mean >= 0 else (PALETTE[0], zero)
        title = f"tokens {place} to {place + len(part) - 1}: {'difference' if compared else 'loss'} {mean:.3f}"
        place_and_size = f'x="{i * step:.1f}" y="{y:.1f}" width="{step - 0.8:.1f}" height="{size:.1f}"'
        bars.append(f'<rect {place_and_size} fill="{colour}"><title>{title}</title></rect>')
        place += len(part)
    what = "difference to the base" if compared else "loss"
    label = f"mean {what} of {len(parts)} stretches from the first token to the last; the largest {largest:.3f}"
    return f'<svg width="{width}" height="{height}" role="img" aria-label="{label}">{"".join(bars)}</svg><div>{label}</div>'


def top_losses_html(top: TopLosses, lines: list[dict], by: str) -> str:
    """The worst rows as a table, and the first page token by token."""
    rows = [(line["index"], line["source"], f"{line[by]:.4f}", cut(line["text"], 160)) for line in lines]
    caption = f"The worst {len(rows):,} of {len(top.order):,} rows; .page(1) to .page({top.pages}) show them token by token"
    return f"<div>{table(('index', 'row', f'{by} (nats)', 'text'), rows, caption)}{top.page(1)._repr_html_() if rows else ''}</div>"
