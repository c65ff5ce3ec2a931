"""What happens inside a model on one text: the residual stream, attention, the logit lens; and, for a trainer, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from fulltune_nb.data.encoding import Example
from fulltune_nb.data.lens import token_texts, visible
from fulltune_nb.data.settings import whole
from fulltune_nb.errors import ConfigError, DataError
from fulltune_nb.frames import frame
from fulltune_nb.insight import walk
from fulltune_nb.insight.examples import as_examples, text_example
from fulltune_nb.insight.survival import block_of
from fulltune_nb.insight.token_statistics import ALTERNATIVES, top_tokens
from fulltune_nb.language_model import LanguageModel
from fulltune_nb.models.cpu_math import softmax_statistics
from fulltune_nb.training.loss import chunks
from fulltune_nb.training.trainer import Trainer

if TYPE_CHECKING:
    from fulltune_nb.charts import Axes

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
        length, layers, width = len(example.tokens), lm.config.num_layers, min(ALTERNATIVES, lm.config.vocab_size)
        self.residual_norms = np.zeros((layers + 1, length), np.float32)
        self.top_ids = np.zeros((layers + 1, length, width), np.int32)
        self.top_probabilities = np.zeros((layers + 1, length, width), np.float32)
        self.next_probabilities = np.zeros((layers + 1, max(length - 1, 0)), np.float32)
        self.next_ranks = np.zeros((layers + 1, max(length - 1, 0)), np.int32)
        self._maps: dict[int, np.ndarray] = {}
        size = lm.config.hidden_size * length * 4 * (layers + 1)
        self._hidden: list[mx.array] | None = [] if size <= KEPT_BYTES else None
        keeps_maps = 4 * length**2 * lm.config.num_heads * layers <= KEPT_BYTES
        for layer, x in enumerate(walk.residual_stream(lm.model, example.tokens)):
            self._read(layer, x)
            if self._hidden is not None:
                self._hidden.append(x)
            if keeps_maps and layer < layers:
                self._maps[layer + 1] = np.concatenate(list(walk.attention_of_block(lm.model, layer, x)))

    def _read(self, layer: int, x: mx.array) -> None:
        """Takes down what is small of a layer's output (1, T, D)."""
        self.residual_norms[layer] = _lengths(x)
        tokens = self.example.tokens
        for places in chunks(len(tokens), self._lm.config.vocab_size):
            begin, logits = places.start, walk.lens_logits(self._lm.model, x[0, places])  # (n, V)
            _, shares = softmax_statistics(logits)
            self.top_ids[layer, places], self.top_probabilities[layer, places] = top_tokens(logits, shares, self.top_ids.shape[-1])
            targets = tokens[begin + 1 : begin + 1 + len(logits)].astype(np.int32)
            if not len(targets):
                continue
            wanted = mx.array(targets)[:, None]
            at_target = mx.take_along_axis(logits[: len(targets)], wanted, axis=1)
            places = slice(begin, begin + len(targets))
            self.next_probabilities[layer, places] = np.array(mx.take_along_axis(shares[: len(targets)], wanted, axis=1)[:, 0])
            self.next_ranks[layer, places] = np.array((logits[: len(targets)] > at_target).sum(axis=1) + 1)

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
        return np.array(walk.lens_logits(self._lm.model, self._stream(_index("layer", layer, 0, self.num_layers)))[0])

    def attention(self, layer: int, head: int | None = None) -> np.ndarray:
        """How much each token of block `layer` (from 1) attends to each: (H, T, T) float32, or (T, T) of one head (from 0).

        Row t sums to 1 over the tokens that token t sees. Errors as `hidden`.
        """
        layer = _index("layer", layer, 1, self.num_layers)
        heads = self._lm.config.num_heads
        chosen = None if head is None else _index("head", head, 0, heads - 1)
        if layer in self._maps:
            return self._maps[layer] if chosen is None else self._maps[layer][chosen]
        x, groups, maps = self._stream(layer - 1), heads // self._lm.config.num_kv_heads, []
        for number, found in enumerate(walk.attention_of_block(self._lm.model, layer - 1, x)):
            if chosen is None:
                maps.append(found)
            elif number == chosen // groups:
                return found[chosen % groups]
        return np.concatenate(maps)

    def pooled_attention(self, layer: int, size: int = _MAP) -> np.ndarray:
        """`attention`, (H, s, s) with s <= `size`: of each tile of a long text's map the largest value."""
        layer = _index("layer", layer, 1, self.num_layers)
        if layer in self._maps:
            return walk.pooled(self._maps[layer], size)
        return np.concatenate([walk.pooled(m, size) for m in walk.attention_of_block(self._lm.model, layer - 1, self._stream(layer - 1))])

    def _stream(self, layer: int) -> mx.array:
        if self._hidden is not None:
            return self._hidden[layer]
        x = next(x for i, x in enumerate(walk.residual_stream(self._lm.model, self.example.tokens)) if i == layer)
        if not np.allclose(_lengths(x), self.residual_norms[layer], rtol=1e-4, equal_nan=True):
            raise ConfigError(
                f"The weights have changed since this trace was made, and of so long a text ({len(self.example.tokens):,} tokens) the "
                "hidden states are not kept. Trace it again."
            )
        return x

    def to_frame(self) -> Any:
        """A pandas DataFrame with a line for each layer and token.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        columns = ["layer", "position", "token", "residual_norm", "lens_token", "lens_probability", "next_probability", "next_rank"]
        return frame((line for layer in range(self.num_layers + 1) for line in self._lines(layer)), columns)

    def _lines(self, layer: int) -> list[dict[str, Any]]:
        said = token_texts(self._lm.tokenizer, self.top_ids[layer, :, 0].tolist())
        pairs = list(zip(self.next_probabilities[layer].tolist(), self.next_ranks[layer].tolist(), strict=True))
        lines = []
        for i, token in enumerate(self.tokens):
            probability, rank = pairs[i] if i < len(pairs) else (float("nan"), 0)
            lines.append({
                "layer": layer, "position": i, "token": token, "residual_norm": float(self.residual_norms[layer, i]), "lens_token": said[i],
                "lens_probability": float(self.top_probabilities[layer, i, 0]), "next_probability": probability, "next_rank": rank,
            })
        return lines

    def plot(self, ax: Axes | None = None) -> Axes:
        """Length of the residual stream by layer and token.

        Args:
            ax: where to draw; a new figure where left out.
        """
        return self._heat_map(np.log10(np.maximum(self.residual_norms, 1e-12)), "log10 of the norm", "Residual stream", ax)

    def plot_lens(self, ax: Axes | None = None) -> Axes:
        """Probability of the token that really follows, by layer and token."""
        return self._heat_map(self.next_probabilities, "probability of the next token", "Logit lens", ax, (0.0, 1.0))

    def plot_attention(self, layer: int, head: int = 0, ax: Axes | None = None) -> Axes:
        """The attention map of a head (from 0) of block `layer` (from 1); lines look at columns. Long texts are pooled."""
        from fulltune_nb.charts import heat_map

        chosen = walk.pooled(self.attention(layer, head)[None], _MAP)[0]
        tile = -(-len(self.example.tokens) // _MAP)
        names = [visible(text) for text in self.tokens[::tile]]
        pooled = f", the largest of each {tile} × {tile} tokens" if tile > 1 else ""
        labels = ("token", "attends to", "share")
        return heat_map(chosen, names, names, labels, f"Block {layer}, head {head}{pooled}", (0.0, None), ax)

    def plot_heads(self, layer: int) -> Any:
        """The attention maps of all heads of block `layer` (from 1), small, side by side: a matplotlib figure."""
        from fulltune_nb.charts import small_maps

        maps = self.pooled_attention(layer)
        return small_maps(maps, [f"head {head}" for head in range(len(maps))], f"Attention of block {layer}")

    def _heat_map(self, values: np.ndarray, label: str, title: str, ax: Axes | None, limits: tuple = (None, None)) -> Axes:
        from fulltune_nb.charts import heat_map

        columns = [visible(text) for text in self.tokens[: values.shape[1]]]
        return heat_map(values, range(len(values)), columns, ("layer (0: embedding)", "token", label), title, limits, ax)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.example.tokens)} tokens through {self.num_layers} blocks)"

    def _repr_html_(self) -> str:
        from fulltune_nb.insight.tracing_view import trace_html

        return trace_html(self, self._lm.tokenizer)


class Inspection(Trace):
    """What `inspect` returns: a `Trace`, and the gradient of the example's loss.

    Attributes:
        loss: mean over the trained tokens, in nats.
        gradient_norms: module path -> L2 norm of the gradient of each trainable tensor.
        residual_gradient_norms: (L + 1, T) float32, of the gradient of the residual stream at each layer and token.
    """

    def __init__(self, lm: LanguageModel, example: Example):
        trained = np.array(example.loss_mask, dtype=bool)
        trained[:1] = False
        if not trained.any():
            raise DataError(f"{example.source}: no token of it is trained on, so it has no gradient. ft.trace shows it without.")
        super().__init__(lm, example)
        stream = self._hidden if self._hidden is not None else list(walk.residual_stream(lm.model, example.tokens))
        self.loss, self.gradient_norms, self.residual_gradient_norms = walk.gradients(lm.model, example.tokens, trained, stream)

    @property
    def block_gradient_norms(self) -> dict[str, float]:
        """The same taken together: `"embed_tokens"`, `"layers.0"` and so on, `"norm"`, `"lm_head"`; in the model's order."""
        squares: dict[str, float] = {}
        for name, norm in self.gradient_norms.items():
            squares[block_of(name)] = squares.get(block_of(name), 0.0) + norm**2
        order = ["embed_tokens", *(f"layers.{i}" for i in range(self.num_layers)), "norm", "lm_head"]
        return {name: squares[name] ** 0.5 for name in order if name in squares}

    def plot_gradients(self, ax: Axes | None = None) -> Axes:
        """Norm of each block's gradient, from the embedding to the head.

        Args:
            ax: where to draw; a new figure where left out.
        """
        from fulltune_nb.charts import curves

        norms = self.block_gradient_norms
        ax = curves([("gradient", range(len(norms)), list(norms.values()))], "", "norm of the gradient", f"loss {self.loss:.4f}", ax=ax)
        every = -(-len(norms) // 32)
        ax.set_xticks(range(0, len(norms), every), list(norms)[::every], rotation=90, fontsize="x-small")
        return ax


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
    number = whole(name, value, low=low)
    if number > high:
        raise ConfigError(f"{name}: expected {low} to {high}, got {value}.")
    return number
