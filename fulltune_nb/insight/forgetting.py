"""What a fine-tuning takes away: fixed prompts answered again and again, perplexity on general text, and how far the weights have moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from fulltune_nb.data.example import Example
from fulltune_nb.errors import ConfigError
from fulltune_nb.frames import frame
from fulltune_nb.html import NO_MATH, counted, cut, scrolling, table
from fulltune_nb.insight.predictions import as_examples, token_statistics
from fulltune_nb.insight.updates import block_of, norm, rows_between
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.settings import whole_number
from fulltune_nb.training.callbacks import Attachable

if TYPE_CHECKING:
    from fulltune_nb.plots import Axes

_PIECE = 512  # tokens of the general text that are read at a time
_COLUMNS = 5  # of answers side by side
_CHARACTERS = 400


@dataclass(frozen=True)
class ForgettingSnapshot:
    """How a model stood at one step."""

    step: int
    """Optimizer steps before it; 0 or the step at which it was first looked at is the base."""
    answers: tuple[str, ...]
    """One for each prompt."""
    perplexity: float
    """On the general text; NaN without one."""
    drift: dict[str, float]
    """Module path -> norm of the change since the base over the norm at the base."""

    @property
    def mean_drift(self) -> float:
        """Over the tensors."""
        return float(np.mean(list(self.drift.values())))


class Forgetting(Attachable):
    """Watches what a model forgets, as a callback: `trainer.run(callbacks=[Forgetting(prompts, text)])`, or by `look(trainer)`.

    It looks when a run begins, at every evaluation on the validation split, at every checkpoint, and when a run ends. What it saw
    first is the base all others are compared with. `attach(trainer)` looks at once, and then at evaluations and checkpoints, whoever
    takes the steps: for panels and notebooks.

    Attributes:
        snapshots: what was seen, the oldest first.
    """

    def __init__(
        self, prompts: Sequence[str] = (), text: Any = (), max_tokens: int = 64, chat: bool | None = None, sample: int | None = 2**14
    ):
        """
        Args:
            prompts: asked each time, greedily.
            text: general text that is not trained on: a text, an example, or a list of them; a split.
            max_tokens: of an answer.
            chat: whether prompts go through the chat template; None: where the run's data are chats or completions.
            sample: elements of a tensor whose drift is measured, in rows spread evenly, at least one; they are kept in memory. None: all.

        Raises:
            ConfigError: prompts that are no texts, or a number out of range.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) and prompt for prompt in prompts):
            raise ConfigError(f"prompts: expected a list of texts, got {prompts!r:.80}.")
        self.prompts, self.text, self.chat = tuple(prompts), text, chat
        self.max_tokens = whole_number("max_tokens", max_tokens, low=1)
        self.sample = None if sample is None else whole_number("sample", sample, low=1)
        self.snapshots: list[ForgettingSnapshot] = []
        self._base: dict[str, mx.array] = {}

    def attach(self, trainer: Any) -> Forgetting:
        """Looks now, and at every evaluation and checkpoint of this trainer from now on; until `detach`."""
        self.look(trainer)
        return super().attach(trainer)

    def on_start(self, trainer: Any, target: int) -> None:
        """See `Trainer.run`."""
        self.look(trainer)

    def on_eval(self, trainer: Any, report: Any) -> None:
        """See `Trainer.run`."""
        if report.split == "valid":
            self.look(trainer)

    def on_save(self, trainer: Any, path: Any) -> None:
        """See `Trainer.run`."""
        self.look(trainer)

    def on_end(self, trainer: Any) -> None:
        """See `Trainer.run`."""
        self.look(trainer)

    def look(self, trainer: Any) -> ForgettingSnapshot:
        """How the trainer's model stands now; at most once a step."""
        if self.snapshots and self.snapshots[-1].step == trainer.step_count:
            return self.snapshots[-1]
        lm = trainer.lm
        if not self._base:
            self._base = {name: self._rows(array) + 0 for name, array in tree_flatten(lm.model.parameters())}
            mx.eval(self._base)
        chat = trainer.data.train.format != "text" if self.chat is None else self.chat
        snapshot = ForgettingSnapshot(trainer.step_count, tuple(self._answers(lm, chat)), self._perplexity(lm), self._drift(lm))
        self.snapshots.append(snapshot)
        return snapshot

    def _rows(self, array: mx.array) -> mx.array:
        return array[:: rows_between(self.sample, array.size, array.shape[0])]

    def _answers(self, lm: LanguageModel, chat: bool) -> list[str]:
        if not self.prompts:
            return []
        if chat:
            return lm.chat_many([[{"role": "user", "content": prompt}] for prompt in self.prompts], max_tokens=self.max_tokens)
        return lm.generate_many(self.prompts, max_tokens=self.max_tokens)

    def _perplexity(self, lm: LanguageModel) -> float:
        pieces = [piece for example in as_examples(lm, self.text) for piece in _pieces(example)]
        losses = [found.losses[1:] for found in token_statistics(lm.model, pieces, alternatives=0)]
        values = np.concatenate(losses).astype(np.float64) if losses else np.zeros(0)
        return float(np.exp(min(values.mean(), 700.0))) if len(values) else math.nan

    def _drift(self, lm: LanguageModel) -> dict[str, float]:
        found = {}
        for name, array in tree_flatten(lm.model.parameters()):
            base = self._base[name].astype(mx.float32)
            found[name] = norm(self._rows(array).astype(mx.float32) - base) / max(norm(base), 1e-30)
        return found

    @property
    def steps(self) -> list[int]:
        """Of the snapshots."""
        return [snapshot.step for snapshot in self.snapshots]

    def drift_by_block(self) -> tuple[list[str], np.ndarray]:
        """Blocks, and the mean drift of their tensors at each snapshot (blocks, snapshots)."""
        blocks = list(dict.fromkeys(block_of(name) for name in self.snapshots[0].drift)) if self.snapshots else []
        values = [[np.mean([d for n, d in s.drift.items() if block_of(n) == block]) for s in self.snapshots] for block in blocks]
        return blocks, np.array(values, dtype=np.float64).reshape(len(blocks), len(self.snapshots))

    def to_frame(self) -> Any:
        """A pandas DataFrame with a line for each snapshot and prompt, or for each snapshot where there are no prompts.

        Raises `MissingDependencyError` without pandas.
        """
        lines = []
        for snapshot in self.snapshots:
            common = {"step": snapshot.step, "perplexity": snapshot.perplexity, "mean_drift": snapshot.mean_drift}
            for prompt, answer in zip(self.prompts, snapshot.answers, strict=True) if self.prompts else [(None, None)]:
                lines.append({**common, "prompt": prompt, "answer": answer})
        return frame(lines, ["step", "perplexity", "mean_drift", "prompt", "answer"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Perplexity on the general text over the steps, against the base's, on `ax` or a new figure."""
        from fulltune_nb.plots import curves

        values = [snapshot.perplexity for snapshot in self.snapshots]
        base = [values[0]] * len(values) if values else []
        return curves([("now", self.steps, values), ("base", self.steps, base)], "optimizer step", "perplexity on general text", ax=ax)

    def plot_drift(self, ax: Axes | None = None) -> Axes:
        """How far each block's weights have moved, by step, on `ax` or a new figure."""
        from fulltune_nb.plots import heat_map

        blocks, values = self.drift_by_block()
        return heat_map(values, blocks, self.steps, ("block", "optimizer step", "change / weight"), ax=ax)

    def __repr__(self) -> str:
        last = f", perplexity {self.snapshots[0].perplexity:.3f} → {self.snapshots[-1].perplexity:.3f}" if self.snapshots else ""
        return f"Forgetting({counted(len(self.snapshots), 'snapshot')}, {counted(len(self.prompts), 'prompt')}{last})"

    def _repr_html_(self) -> str:
        if not self.snapshots:
            return f'<div class="{NO_MATH}">Forgetting: nothing looked at yet.</div>'
        places = np.unique(np.linspace(0, len(self.snapshots) - 1, _COLUMNS).round().astype(int))
        shown = [self.snapshots[i] for i in places]
        left = f"; {len(self.snapshots) - len(shown)} snapshots between are not shown" if len(shown) < len(self.snapshots) else ""
        base = self.snapshots[0].perplexity
        rows = [
            ("perplexity on general text", *(f"{s.perplexity:.3f}" for s in shown)),
            ("… against the base", *(f"{s.perplexity / base - 1:+.1%}" for s in shown)),
            ("mean drift of the weights", *(f"{s.mean_drift:.2e}" for s in shown)),
            *((cut(prompt, _CHARACTERS), *(cut(s.answers[i], _CHARACTERS) for s in shown)) for i, prompt in enumerate(self.prompts)),
        ]
        headers = ["", *(f"step {s.step:,}" for s in shown)]
        return f'<div class="{NO_MATH}">{scrolling(table(headers, rows, f"Forgetting{left}", "9em"), "Forgetting")}</div>'


def _pieces(example: Example) -> list[np.ndarray]:
    """The tokens, some hundred at a time; a last one alone is left to the piece before."""
    tokens = example.tokens
    starts = range(0, max(1, len(tokens) - 1), _PIECE)
    return [tokens[start : start + _PIECE + 1] for start in starts]
