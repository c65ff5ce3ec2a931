"""What happens inside a model on one text: the residual stream, attention, the logit lens; and, for a trainer's example, the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from fulltune_nb import svg
from fulltune_nb.data.example import Example, pieces, said_text, token_texts, visible
from fulltune_nb.errors import IN_EVALUATION, ConfigError, DataError, tells_device_errors
from fulltune_nb.frames import frame
from fulltune_nb.html import NO_MATH, cut, esc, facts
from fulltune_nb.insight.predictions import as_examples, predictions, ranking, short, text_example, trained_tokens
from fulltune_nb.insight.updates import block_of
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.models.layers import attention_shares
from fulltune_nb.models.parameters import apart, backward_through
from fulltune_nb.settings import whole_number
from fulltune_nb.training.loss import cross_entropy
from fulltune_nb.training.trainer import Trainer

if TYPE_CHECKING:
    from fulltune_nb.plots import Axes, Figure

KEPT_BYTES = 2**28
"""Hidden states of a trace, and attention maps, are kept where they take no more than this; else computed again when asked for."""
_MAP = 128  # tokens a side of the pictures of attention; longer texts are pooled


class Trace:
    """What `trace` returns. Layer 0 is the embedding, layer l the output of block l, up to L; a token is a position in the text.

    Attributes:
        example: the text as tokens.
        residual_norms: (L + 1, T) float32, length of the residual stream.
        top_ids, top_probabilities: (L + 1, T, 5), the logit lens: the tokens that would be said next if this layer were the last
            (final norm and head applied to it), the likeliest first.
        next_probabilities, next_ranks: (L + 1, T - 1), the lens's probability and rank (from 1) of the token that really follows.
    """

    def __init__(self, lm: LanguageModel, example: Example):
        self._lm, self.example = lm, example
        layers, length = lm.config.num_layers, len(example.tokens)
        keeps_hidden = 4 * length * lm.config.hidden_size * (layers + 1) <= KEPT_BYTES
        keeps_maps = 4 * length**2 * lm.config.num_heads * layers <= KEPT_BYTES
        self._hidden: list[mx.array] = []  # by layer; none for a long text
        self._maps: dict[int, list[np.ndarray]] = {}  # block, from 1 -> (H / K, T, T) of each key/value head; none for a long text
        norms, said = [], []
        for layer, x in enumerate(residual_stream(lm.model, example.tokens)):
            norms.append(_lengths(x))
            said.append(predictions(lm.model, lm.model.norm(x)[0], example.tokens[1:])[1:])
            if keeps_hidden:
                self._hidden.append(x)
            if keeps_maps and layer < layers:
                self._maps[layer + 1] = list(attention_of_block(lm.model, layer, x))
        self.residual_norms = np.stack(norms)
        self.next_probabilities, self.next_ranks, self.top_ids, self.top_probabilities = map(np.stack, zip(*said, strict=True))

    @property
    def num_layers(self) -> int:
        """L, blocks."""
        return len(self.residual_norms) - 1

    @property
    def tokens(self) -> list[str]:
        """(T,) each token's own text."""
        return token_texts(self._lm.tokenizer, self.example.tokens.tolist())

    def hidden(self, layer: int) -> np.ndarray:
        """The residual stream (T, D) float32 after block `layer`, 0 being the embedding; before any final norm.

        Raises:
            ConfigError: no such layer; or, where a long text is computed again, weights that have changed since.
        """
        return np.array(self._stream(_index("layer", layer, 0, self.num_layers))[0].astype(mx.float32))

    def logits(self, layer: int) -> np.ndarray:
        """The logit lens's logits (T, V) float32 at a layer; at the last they are the model's own. Errors as `hidden`."""
        return np.array(lens_logits(self._lm.model, self._stream(_index("layer", layer, 0, self.num_layers)))[0])

    def attention(self, layer: int, head: int | None = None) -> np.ndarray:
        """How much each token of block `layer` (from 1) attends to each: (H, T, T) float32, or (T, T) of one head (from 0).

        Row t sums to 1 over the tokens that token t sees. Errors as `hidden`.
        """
        maps, config = self._attention(layer), self._lm.config
        if head is None:
            return np.concatenate(list(maps))
        group, place = divmod(_index("head", head, 0, config.num_heads - 1), config.num_heads // config.num_kv_heads)
        return next(islice(maps, group, None))[place]

    def pooled_attention(self, layer: int, size: int = _MAP) -> np.ndarray:
        """`attention`, (H, s, s) with s <= `size`: of each tile of a long text's map the largest value."""
        return np.concatenate([pooled(maps, size) for maps in self._attention(layer)])

    def _attention(self, layer: int) -> Iterator[np.ndarray]:
        """(H / K, T, T) for each key/value head of block `layer`."""
        layer = _index("layer", layer, 1, self.num_layers)
        return iter(self._maps[layer]) if layer in self._maps else attention_of_block(self._lm.model, layer - 1, self._stream(layer - 1))

    def _stream(self, layer: int) -> mx.array:
        if self._hidden:
            return self._hidden[layer]
        x = next(x for i, x in enumerate(residual_stream(self._lm.model, self.example.tokens)) if i == layer)
        if not np.allclose(_lengths(x), self.residual_norms[layer], rtol=1e-4, equal_nan=True):
            raise ConfigError(
                f"The weights have changed since this trace was made, and of so long a text ({len(self.example.tokens):,} tokens) the "
                "hidden states are not kept. Trace it again."
            )
        return x

    def to_frame(self) -> Any:
        """A pandas DataFrame with a line for each layer and token. Raises `MissingDependencyError` without pandas."""
        layers, length = self.top_ids.shape[:2]
        nothing_follows = ((0, 0), (0, 1))
        return frame({
            "layer": np.repeat(np.arange(layers), length).tolist(),
            "position": [*range(length)] * layers,
            "token": self.tokens * layers,
            "residual_norm": self.residual_norms.ravel().tolist(),
            "lens_token": [text for ids in self.top_ids[:, :, 0].tolist() for text in token_texts(self._lm.tokenizer, ids)],
            "lens_probability": self.top_probabilities[:, :, 0].ravel().tolist(),
            "next_probability": np.pad(self.next_probabilities, nothing_follows, constant_values=np.nan).ravel().tolist(),
            "next_rank": np.pad(self.next_ranks, nothing_follows).ravel().tolist(),
        })

    def plot(self, ax: Axes | None = None) -> Axes:
        """Length of the residual stream by layer and token, on `ax` or a new figure."""
        return self._heat_map(np.log10(np.maximum(self.residual_norms, 1e-12)), "log10 of the norm", "Residual stream", ax)

    def plot_lens(self, ax: Axes | None = None) -> Axes:
        """Probability of the token that really follows, by layer and token."""
        return self._heat_map(self.next_probabilities, "probability of the next token", "Logit lens", ax, (0.0, 1.0))

    def plot_attention(self, layer: int, head: int = 0, ax: Axes | None = None) -> Axes:
        """The attention map of a head (from 0) of block `layer` (from 1); lines look at columns. Long texts are pooled."""
        from fulltune_nb.plots import heat_map

        chosen = pooled(self.attention(layer, head)[None], _MAP)[0]
        tile = -(-len(self.example.tokens) // _MAP)
        names = self._labels()[::tile]
        note = f", the largest of each {tile} × {tile} tokens" if tile > 1 else ""
        labels = ("token", "attends to", "share")
        return heat_map(chosen, names, names, labels, f"Block {layer}, head {head}{note}", (0.0, None), ax)

    def plot_heads(self, layer: int) -> Figure:
        """The attention maps of all heads of block `layer` (from 1), small, side by side: a matplotlib figure."""
        from fulltune_nb.plots import small_maps

        maps = self.pooled_attention(layer)
        return small_maps(maps, [f"head {head}" for head in range(len(maps))], f"Attention of block {layer}")

    def _heat_map(self, values: np.ndarray, label: str, title: str, ax: Axes | None, limits: tuple = (None, None)) -> Axes:
        from fulltune_nb.plots import heat_map

        columns = self._labels()[: values.shape[1]]
        return heat_map(values, range(len(values)), columns, ("layer (0: embedding)", "token", label), title, limits, ax)

    def _labels(self) -> list[str]:
        """(T,) what stands at each token; a character of several tokens at the first of them."""
        shown = pieces(self._lm.tokenizer, self.example.tokens.tolist())
        return [text for piece in shown for text in (visible(piece.text), *[""] * (len(piece.ids) - 1))]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.example.tokens)} tokens through {self.num_layers} blocks)"

    def _repr_html_(self) -> str:
        lens, residual = _lens_html(self, self._lm.tokenizer), _residual_html(self.residual_norms)
        return f'<div class="{NO_MATH}">{self._head_html()}{lens}{residual}</div>'

    def _head_html(self, *more: tuple[str, object]) -> str:
        title = f"{len(self.example.tokens):,} tokens through {self.num_layers} blocks"
        return facts(title, [("text", cut(self.example.text, 400)), *more])


class Inspection(Trace):
    """What `inspect` returns: a `Trace`, and the gradient of the example's loss.

    Attributes:
        loss: mean over the trained tokens, in nats.
        gradient_norms: module path -> L2 norm of the gradient of each trainable tensor.
        residual_gradient_norms: (L + 1, T) float32, of the gradient of the residual stream at each layer and token.
    """

    def __init__(self, lm: LanguageModel, example: Example):
        trained = trained_tokens(example)
        if not trained.any():
            raise DataError(f"{example.source}: no token of it is trained on, so it has no gradient. ft.trace shows it without.")
        super().__init__(lm, example)
        stream = self._hidden or list(residual_stream(lm.model, example.tokens))
        self.loss, self.gradient_norms, self.residual_gradient_norms = gradients(lm.model, example.tokens, trained, stream)

    @property
    def block_gradient_norms(self) -> dict[str, float]:
        """The same taken together: `"embed_tokens"`, `"layers.0"` and so on, `"norm"`, `"lm_head"`; in the model's order."""
        squares: dict[str, float] = {}
        for name, norm in self.gradient_norms.items():
            squares[block_of(name)] = squares.get(block_of(name), 0.0) + norm**2
        order = ["embed_tokens", *(f"layers.{i}" for i in range(self.num_layers)), "norm", "lm_head"]
        return {name: squares[name] ** 0.5 for name in order if name in squares}

    def plot_gradients(self, ax: Axes | None = None) -> Axes:
        """Norm of each block's gradient, from the embedding to the head, on `ax` or a new figure."""
        from fulltune_nb.plots import curves

        norms = self.block_gradient_norms
        ax = curves([("gradient", range(len(norms)), list(norms.values()))], "", "norm of the gradient", f"loss {self.loss:.4f}", ax=ax)
        every = -(-len(norms) // 32)
        ax.set_xticks(range(0, len(norms), every), list(norms)[::every], rotation=90, fontsize="x-small")
        return ax

    def _head_html(self) -> str:
        bars = svg.named_bars(self.block_gradient_norms, "Norm of the gradient, by block")
        return super()._head_html(("loss", f"{self.loss:.4f} nats")) + bars


def trace(lm: LanguageModel, text: str | Sequence[int] | Example) -> Trace:
    """What happens inside a model as it reads a text: residual stream, attention maps, and what each layer would say next.

    Computed block by block; of long texts, hidden states and attention maps are computed again when they are asked for.

    Args:
        lm: the model.
        text: a text, which gets the special tokens its tokenizer adds; token ids; or an `Example`.

    Raises:
        ConfigError, DataError, GenerationError: something else, or token ids that the model has not.
    """
    return Trace(lm, _one(lm, text))


def inspect(trainer: Trainer, example: Example | str) -> Inspection:
    """`trace` of an example, and the gradient it would give, by tensor, block and token. The trainer stays as it is.

    Args:
        trainer: its model as it is now.
        example: such as `trainer.data.train[0]`; of a text, all tokens count as trained on.

    Raises:
        DataError: no token is trained on; otherwise as `trace`.
    """
    return Inspection(trainer.lm, _one(trainer.lm, example))


def _one(lm: LanguageModel, given: Any) -> Example:
    if not isinstance(given, (str, Example)):
        if isinstance(given, Sequence) and given and isinstance(given[0], (str, Example)) or not hasattr(given, "__len__"):
            raise ConfigError(f"Expected one example, a text or token ids, got {type(given).__name__}.")
        return text_example(lm, given)
    (example,) = as_examples(lm, given)
    if not len(example.tokens):
        raise DataError(f"{example.source}: it has no tokens.")
    return example


def _lengths(x: mx.array) -> np.ndarray:
    return np.array(mx.linalg.norm(x[0].astype(mx.float32), axis=-1))


def _index(name: str, value: int, low: int, high: int) -> int:
    number = whole_number(name, value, low=low)
    if number > high:
        raise ConfigError(f"{name}: expected {low} to {high}, got {value}.")
    return number


# -- a text's way through the decoder, a block at a time ---------------------------------------------------------------


@tells_device_errors(IN_EVALUATION)
def residual_stream(model: Decoder, tokens: np.ndarray) -> Iterator[mx.array]:
    """The embedding, then the output of each block before any final norm: L + 1 arrays (1, T, D), evaluated."""
    x = model.embed(mx.array(tokens.astype(np.int32))[None], model.compute_dtype)
    mx.eval(x)
    yield x
    for block, context in zip(model.layers, model.context(len(tokens)), strict=True):
        x = block(x, *context)
        mx.eval(x)
        yield x


@tells_device_errors(IN_EVALUATION)
def attention_of_block(model: Decoder, layer: int, x: mx.array) -> Iterator[np.ndarray]:
    """The attention maps of block `layer` (from 0) for its input x (1, T, D): those of one key/value head at a time, (H / K, T, T)."""
    block = model.layers[layer]
    rotation, mask = model.context(x.shape[1])[layer]
    queries, keys, _ = block.attention.heads(block.attention_input(x), rotation)
    groups = queries.shape[1] // keys.shape[1]
    for head in range(keys.shape[1]):
        scoring = block.attention.scoring_of(slice(head * groups, (head + 1) * groups))
        yield np.array(attention_shares(queries[:, head * groups : (head + 1) * groups], keys[:, head : head + 1], mask, scoring)[0])


def pooled(maps: np.ndarray, size: int) -> np.ndarray:
    """Maps (heads, T, T) as (heads, s, s), s <= size: of each tile the largest value, so that no bright spot gets lost."""
    length = maps.shape[-1]
    tile = -(-length // size)
    if tile == 1:
        return maps
    starts = np.arange(0, length, tile)
    return np.maximum.reduceat(np.maximum.reduceat(maps, starts, axis=1), starts, axis=2)


def lens_logits(model: Decoder, x: mx.array) -> mx.array:
    """What the model would say if a block's output were the last: (..., D) -> (..., V) float32."""
    return model.head(model.norm(x)).astype(mx.float32)


@tells_device_errors(IN_EVALUATION)
def gradients(
    model: Decoder, tokens: np.ndarray, trained: np.ndarray, stream: Sequence[mx.array]
) -> tuple[float, dict[str, float], np.ndarray]:
    """Loss over the trained tokens and its gradient, block by block from the last.

    Args:
        model: the decoder.
        tokens: (T,) ids.
        trained: (T,) bool, the tokens to be predicted; at least one, never the first.
        stream: what `residual_stream` gave, all of it.

    Returns:
        The mean loss in nats; the L2 norm of the gradient of every trainable tensor, by module path; and that of the residual
        stream (L + 1, T), by block and position.
    """
    contexts = model.context(len(tokens))
    ids = mx.array(tokens.astype(np.int32))[None]
    places, targets = mx.array(np.flatnonzero(trained).astype(np.int32) - 1), ids[0, mx.array(np.flatnonzero(trained))]
    weights = mx.full(targets.shape, 1.0 / targets.size)

    def loss_of(x: mx.array) -> mx.array:
        return cross_entropy(model.norm(x)[0][places], model.head_weights(), targets, weights, model.config.logit_cap)

    ends = {name: model[name] for name in ("norm", "lm_head", "embed_tokens") if name in model}
    loss, (slope,), head = backward_through(ends, loss_of, [stream[-1]], mx.array(1.0))
    mx.eval(loss, slope, head)
    norms, slopes = {name: _norm(array) for name, array in head.items() if not name.startswith("embed_tokens")}, [slope]
    for layer in reversed(range(len(model.layers))):
        block, (rotation, mask) = model.layers[layer], contexts[layer]
        through = partial(block, rotation=rotation, mask=mask)
        (slope,), own = backward_through({f"layers.{layer}": block}, through, [stream[layer]], slope)[1:]
        mx.eval(slope, own)
        norms |= {name: _norm(array) for name, array in apart(own).items()}
        slopes.append(slope)
    own = backward_through({"embed_tokens": model.embed_tokens}, lambda: model.embed(ids, model.compute_dtype), [], slope)[2]
    for name, array in own.items():  # a tied embedding has a second gradient, from the head
        norms[name] = _norm(array + head[name] if name in head else array)
    by_position = np.stack([np.linalg.norm(np.array(one[0].astype(mx.float32)), axis=-1) for one in reversed(slopes)])
    return loss.item(), norms, by_position


def _norm(array: mx.array) -> float:
    return mx.sqrt(mx.square(array.astype(mx.float32)).sum()).item()


# -- in a cell --------------------------------------------------------------------------------------------------------

_POSITIONS = 16  # columns of the lens
_LAYERS = 34  # lines of the lens; of deeper models some, evenly spread
_COLUMNS = 64  # of the heat map
_TOKEN = 13  # characters


def _lens_html(trace: Trace, tokenizer) -> str:
    """The logit lens as a table, the last layer on top."""
    length, layers = len(trace.example.tokens), trace.num_layers + 1
    first = max(0, length - _POSITIONS)
    lines = np.unique(np.linspace(0, layers - 1, min(layers, _LAYERS)).round().astype(int))
    columns = range(first, length)
    head = '<th colspan="{}" style="text-align:left;padding:1px 6px">{}</th>'
    shown = [piece for piece in pieces(tokenizer, trace.example.tokens.tolist()) if piece.stop > first]
    # Token -> the first tokens of the character that the token behind it goes on with.
    begun = {i - 1: piece.ids[: i - piece.start] for piece in shown for i in range(piece.start, piece.stop)}
    cells = [head.format(piece.stop - max(first, piece.start), esc(short(piece.text, _TOKEN))) for piece in shown]
    rows = [f'<tr><th style="padding:1px 6px">after</th>{"".join(cells)}</tr>']
    for layer in lines[::-1].tolist():
        cells = [_lens_cell(trace, tokenizer, layer, i, begun.get(i, [])) for i in columns]
        name = f"block {layer}" if layer else "embedding"
        rows.append(f'<tr><th style="text-align:left;padding:1px 6px">{name}</th>{"".join(cells)}</tr>')
    hidden = f"; {first:,} tokens before these are not shown" if first else ""
    skipped = f"; {layers - len(lines)} of {layers} layers are not shown" if len(lines) < layers else ""
    caption = f"Logit lens: what each layer would say next, ✓ where that is what follows{hidden}{skipped}"
    head = f'<caption style="text-align:left;font-weight:bold">{caption}</caption>'
    return f'<div style="overflow:auto"><table style="border-collapse:collapse">{head}{"".join(rows)}</table></div>'


def _lens_cell(trace: Trace, tokenizer, layer: int, i: int, begun: list[int]) -> str:
    tokens, ids, shares = trace.example.tokens, trace.top_ids[layer, i], trace.top_probabilities[layer, i]
    texts, share = [said_text(tokenizer, begun, token) for token in ids.tolist()], float(shares[0])
    right = " ✓" if i + 1 < len(tokens) and ids[0] == tokens[i + 1] else ""
    alpha = f"{round(110 * min(1.0, share)) if np.isfinite(share) else 0:02x}"
    style = f"padding:1px 6px;white-space:pre;background:{svg.BLUE}{alpha};text-align:left"
    percent = f"{share:.0%}" if np.isfinite(share) else "nan"
    title = esc(ranking(texts, shares))
    return f'<td style="{style}" title="{title}"><bdi>{esc(short(texts[0], _TOKEN))}</bdi>{right} <small>{percent}</small></td>'


def _residual_html(norms: np.ndarray) -> str:
    """Norms (L + 1, T) as a heat map, means of some tokens where there are many."""
    starts = np.arange(0, norms.shape[1], -(-norms.shape[1] // _COLUMNS))
    means = np.add.reduceat(norms, starts, axis=1) / np.diff([*starts, norms.shape[1]])
    return svg.heat_map(means[::-1], "Norm of the residual stream, embedding at the bottom, first token at the left")
