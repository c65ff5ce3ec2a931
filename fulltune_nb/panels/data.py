"""The data panel: browse and search the examples of a data set, token by token, and see what is wrong with them."""

from __future__ import annotations

import io
import json
import threading
from base64 import b64encode
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import ipywidgets as widgets
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fulltune_nb.data.dataset import DataSet, Split
from fulltune_nb.data.encode import Example
from fulltune_nb.data.look import (
    ADVICE,
    Duplicates,
    Hits,
    Lens,
    SpecialTokenCheck,
    check_special_tokens,
    counts_table,
    find_duplicates,
    search,
    surroundings,
)
from fulltune_nb.errors import ConfigError, DataError
from fulltune_nb.html import NO_MATH, PALETTE, esc, facts, table
from fulltune_nb.panels.panel import Showing, close_all, styled

# -- length_plot: The lengths of a split's rows as a picture, with the cut at `max_seq_length`

WIDTH, HEIGHT = 640, 260  # pixels
_BINS = 40
_WIDE = 30  # a longest row so many times the median gets a logarithmic axis
_BLUE, _VERMILLION, _INK = PALETTE[0], PALETTE[5], "#222222"


def whole_lengths(split: Split) -> np.ndarray:
    """(rows,) int64, tokens of each row before anything was cut."""
    return split.lengths + np.array([example.cut for example in split.examples], dtype=np.int64)


class LengthPlot:
    """Draws histograms on one figure, which is cleared and used again. May be called from any thread."""

    def __init__(self) -> None:
        self._figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor="white")
        FigureCanvasAgg(self._figure)
        self._lock = threading.Lock()

    def draw(self, split: Split, max_seq_length: int) -> bytes:
        """The histogram of a split as PNG. What was cut off is hatched."""
        with self._lock:
            self._figure.clear()
            axes = self._figure.add_axes((0.105, 0.2, 0.845, 0.64))  # room for the last label
            self._fill(axes, split, max_seq_length)
            file = io.BytesIO()
            self._figure.savefig(file, format="png", dpi=100)
            return file.getvalue()

    def _fill(self, axes, split: Split, limit: int) -> None:
        lengths = whole_lengths(split)
        longest = int(lengths.max(initial=1))
        wide = longest > _WIDE * max(float(np.median(lengths)) if len(lengths) else 1.0, 1.0)
        edges = _edges(max(int(lengths.min(initial=longest)), 1), longest, wide)
        counts, _ = np.histogram(lengths, edges)
        cut_counts, _ = np.histogram(lengths[lengths > limit], edges)
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=_BLUE, edgecolor="white", linewidth=0.5, label="rows")
        if split.truncated:
            look = {"color": "white", "edgecolor": _VERMILLION, "hatch": "////", "linewidth": 0.8}
            label = f"rows cut ({split.truncated:,})"
            axes.bar(edges[:-1], cut_counts, np.diff(edges), align="edge", label=label, **look)
            axes.axvline(limit + 0.5, color=_VERMILLION, linestyle="--", linewidth=1.8, label=f"max_seq_length = {limit:,}")
        if wide:
            axes.set_xscale("log")
        self._style(axes, split, wide)

    def _style(self, axes, split: Split, wide: bool) -> None:
        # Every setting by hand: matplotlib's global ones belong to the notebook, and to other threads.
        axes.set_facecolor("white")
        axes.set_xlabel("tokens in a row" + (" (logarithmic)" if wide else ""), color=_INK, fontsize=9)
        axes.set_ylabel("rows", color=_INK, fontsize=9)
        axes.tick_params(colors=_INK, labelsize=8.5, which="both")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        whole = FuncFormatter(lambda value, _: f"{value:,.0f}")
        if not wide:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.xaxis.set_major_formatter(whole)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(whole)
        if split.truncated:
            legend = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 3, "frameon": False, "fontsize": 8.5}
            axes.legend(labelcolor=_INK, **legend)


def _edges(least: int, longest: int, wide: bool) -> np.ndarray:
    """Ascending borders of the bars; within them every length once."""
    if wide:
        return np.unique(np.geomspace(least, longest + 1, _BINS + 1).round())
    step = -(-(longest + 1 - least) // _BINS)
    return np.arange(least, longest + 1 + step, step) - 0.5  # lengths are whole numbers: each in the middle of its own


def lengths_text(split: Split) -> str:
    """The same in a sentence or two, for those who cannot see the picture."""
    lengths = whole_lengths(split)
    if not len(lengths):
        return f"{split.name} has no rows."
    text = f"{split.name}: rows of {lengths.min():,} to {lengths.max():,} tokens, half of them up to {int(np.median(lengths)):,}."
    if not split.truncated:
        return f"{text} None is cut."
    lost = 100 * split.tokens_cut / int(lengths.sum())
    are, tokens = "is" if split.truncated == 1 else "are", "token" if split.tokens_cut == 1 else "tokens"
    return f"{text} {split.truncated:,} of {len(split):,} rows {are} cut: {split.tokens_cut:,} {tokens} lost, {lost:.1f} % of all."


# -- data_checks: What a look over a whole data set brings to light, in HTML: counts, begin and end tokens, rows in se

_LISTED = 8  # rows named of each finding

FILTERS = ("all", "cut off", "not trained on", "BOS or EOS warning", "also in another split")
"""Which rows of a split there are to choose from."""


class DataChecks:
    """The findings about a data set; each is worked out when it is first asked for."""

    def __init__(self, data: DataSet):
        self._data = data

    @cached_property
    def duplicates(self) -> Duplicates:
        """Rows that become the same text."""
        return find_duplicates(self._data.splits)

    @cached_property
    def special_tokens(self) -> dict[str, SpecialTokenCheck]:
        """BOS and EOS of each split."""
        return {name: check_special_tokens(split.examples, self._data.tokenizer) for name, split in self._data.splits.items()}

    def rows(self, split: str, which: str) -> np.ndarray:
        """Ascending indices of the rows that one of `FILTERS` leaves."""
        examples = self._data.splits[split]
        if which == "cut off":
            return np.flatnonzero([example.cut > 0 for example in examples])
        if which == "not trained on":
            return examples.untrainable
        if which == "BOS or EOS warning":
            return self.special_tokens[split].rows
        if which == "also in another split":
            return np.array(self.duplicates.rows(split), dtype=np.int64)
        return np.arange(len(examples))

    def twins(self, split: str, row: int) -> list[str]:
        """Where else a row stands: its first occurrence in each other split."""
        found = []
        for (name, other), pairs in self.duplicates.across.items():
            if name == split:
                found += [self._data.splits[other][there].source for here, there in pairs if here == row]
        return found

    def to_html(self) -> str:
        """All findings, with what to do."""
        data = self._data
        notes = "".join(f"<li>{esc(note)}</li>" for note in data.notes)
        parts = [
            counts_table(list(data.splits.values())),
            f'<div class="{NO_MATH}"><b>Notes</b><ul style="margin:2px 0">{notes}</ul></div>' if notes else "",
            self._special_html(),
            self._duplicates_html(),
            facts("Settings", [("source", data.source or "rows in memory"), *((k, str(v)) for k, v in vars(data.settings).items())]),
        ]
        spaced = (f'<div style="margin-bottom:12px">{part}</div>' for part in parts if part)
        return f'<div style="line-height:1.5">{"".join(spaced)}</div>'

    def _special_html(self) -> str:
        rows = []
        for name, check in self.special_tokens.items():
            for problem, found in check.problems.items():
                where = _listed([self._data.splits[name][row].source for row in found[:_LISTED]], len(found))
                rows.append((name, f"{len(found):,} of {len(check.bos):,}", f"⚠ {problem}", where, ADVICE[problem]))
        counts = "; ".join(f"{name} {c.bos.sum():,} BOS, {c.eos.sum():,} EOS" for name, c in self.special_tokens.items())
        if not rows:
            return f"<b>Begin and end tokens</b><div>✓ nothing doubled, nothing missing ({esc(counts)})</div>"
        return table(("split", "rows", "warning", "which", "what to do"), rows, "Begin and end tokens") + f"<div>{esc(counts)}</div>"

    def _duplicates_html(self) -> str:
        rows, splits = [], self._data.splits
        for (name, other), pairs in self.duplicates.across.items():
            if pairs and list(splits).index(name) < list(splits).index(other):
                pairs_named = [f"{splits[name][a].source} = {splits[other][b].source}" for a, b in pairs[:_LISTED]]
                back = len(self.duplicates.across[other, name])
                rows.append((f"{name} in {other}", f"⚠ {_rows(len(pairs))}, {back:,} there", _listed(pairs_named, len(pairs))))
        for name, count in self.duplicates.within.items():
            if count:
                rows.append((f"{name} in itself", f"{_rows(count)} stood there before", ""))
        if not rows:
            return "<b>Duplicates</b><div>✓ no row stands in the data twice</div>"
        advice = "Held-out rows that are trained on say little about what was learned: take them out of one of the two."
        shown = any("⚠" in row[1] for row in rows)
        return table(("rows", "how many", "which"), rows, "Duplicates") + (f"<div>{advice}</div>" if shown else "")


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _listed(names: Sequence[str], count: int) -> str:
    names = [name if len(name) <= 80 else f"{name[:77]}…" for name in names]
    return ", ".join(names) + (f" and {count - len(names):,} more" if count > len(names) else "")


# -- data: The data panel: browse and search the examples of a data set, token by token, and see what is wrong 

_ROW_CHARACTERS = 4000  # of a row as it was read
_SEARCH_CHARACTERS = 200  # of what is searched for, where it is repeated
_LABELS = {"description_width": "initial"}
_PRE = "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;line-height:1.5;margin:4px 0"


class DataPanel:
    """Browses the examples of a data set. Every control has a method here that does the same, with or without a notebook.

    Nothing is computed with the model, so the panel may be used while training goes on.

    Attributes:
        data: the data set.
        checks: what was found in it: `.duplicates`, `.special_tokens`.
        split: name of the split looked at.
        index: of the example looked at, as in `data.train[index]`.
        rows: indices that `next` and `previous` go through: those left by filter and search.
        query: the text searched for; "" for none.
        hits: what the search found, or None.
        widget: the panel's widgets in a box.
    """

    def __init__(self, data: DataSet):
        self.data = data
        self.checks = DataChecks(data)
        self.split = next(iter(data.splits))
        self.index = 0
        self.filter = FILTERS[0]
        self.query = ""
        self.hits: Hits | None = None
        self.rows = np.arange(len(data.splits[self.split]))
        self.closed = False
        self._lock = threading.RLock()  # callbacks may come on another thread than the cells
        self._plot = LengthPlot()
        self._make_widgets()
        self._showing = Showing(self.widget)
        self._connect()
        self._refresh_rows()

    # -- what can be done -----------------------------------------------------------------------------------------

    @property
    def example(self) -> Example | None:
        """The example looked at; None in a split without rows."""
        examples = self.data.splits[self.split]
        return examples[self.index] if len(examples) else None

    def show(self, index: int | None = None, split: str | None = None, filter: str | None = None) -> None:
        """Goes to an example, of another split where one is named.

        Args:
            index: of the example, as in `data.train[index]`; where left out, the first that the filter leaves.
            split: "train", "valid" or "test".
            filter: one of "all", "cut off", "not trained on", "BOS or EOS warning", "also in another split".

        Raises:
            DataError: no such split or no such index.
            ConfigError: no such filter.
        """
        with self._lock:
            split, filter = split or self.split, filter or self.filter
            if split not in self.data.splits:
                raise DataError(f"There is no split {split!r} in this data set; it has {', '.join(self.data.splits)}.")
            if filter not in FILTERS:
                raise ConfigError(f"filter: expected one of {', '.join(map(repr, FILTERS))}, got {filter!r}.")
            count = len(self.data.splits[split])
            if index is not None and not (isinstance(index, int) and 0 <= index < count):
                raise DataError(f"{split} has the indices 0 to {count - 1:,}, got {index!r}.")
            if (split, filter) != (self.split, self.filter):
                self.split, self.filter = split, filter
                self._find_rows()
            if index is not None:
                self.index = index
            elif self.index >= count or (len(self.rows) and self.index not in self.rows):
                self.index = int(self.rows[0]) if len(self.rows) else 0
            self._refresh_rows()

    def next(self) -> None:
        """Goes to the next of `rows`; stays at the last."""
        with self._lock:
            later = self.rows[self.rows > self.index]
            self._go(later[0] if len(later) else self.index)

    def previous(self) -> None:
        """Goes to the one before in `rows`; stays at the first."""
        with self._lock:
            earlier = self.rows[self.rows < self.index]
            self._go(earlier[-1] if len(earlier) else self.index)

    def search(self, text: str) -> list[int]:
        """Looks for a text in the rendered texts of the split, upper and lower case being the same, and goes to the first hit.

        The filter applies. Of very large splits only the first part is looked at: `hits.looked_at` says how many rows.

        Args:
            text: "" ends the search.

        Returns:
            The indices of the examples that have it.
        """
        with self._lock:
            self.query = text
            self._find_rows()
            if len(self.rows) and self.index not in self.rows:
                self.index = int(self.rows[0])
            self._refresh_rows()
            return self.hits.rows if self.hits else []

    def close(self) -> None:
        """Takes the panel away."""
        if not self.closed:
            self.closed = True
            close_all(self.widget)

    def _go(self, index: int) -> None:
        self.index = int(index)
        self._refresh_example()

    def _find_rows(self) -> None:
        """What filter and search leave of the split."""
        rows = self.checks.rows(self.split, self.filter)
        self.hits = search(self.data.splits[self.split].examples, rows, self.query) if self.query else None
        self._filtered = len(rows)
        self.rows = rows if self.hits is None else np.array(self.hits.rows, dtype=np.int64)

    # -- widgets --------------------------------------------------------------------------------------------------

    def _make_widgets(self) -> None:
        def wide(width: str) -> widgets.Layout:
            return widgets.Layout(width=width)

        def button(text: str, tooltip: str, icon: str) -> widgets.Button:
            return widgets.Button(description=text, tooltip=tooltip, icon=icon, layout=wide("auto"))

        self._split = widgets.Dropdown(
            options=list(self.data.splits), description="split", tooltip="Which split to look at", style=_LABELS, layout=wide("130px")
        )
        self._filter = widgets.Dropdown(
            options=FILTERS, description="rows", tooltip="Which of its rows to go through", style=_LABELS, layout=wide("210px")
        )
        self._search = widgets.Text(
            description="search", placeholder="text, then Enter", continuous_update=False, style=_LABELS, layout=wide("280px"),
            tooltip="Rows whose text has this in it, upper and lower case being the same; Enter searches, empty ends the search",
        )  # fmt: skip
        self._previous = button("Previous", "The row before, of those chosen", "chevron-left")
        self._next = button("Next", "The next row, of those chosen", "chevron-right")
        self._index = widgets.BoundedIntText(
            min=0, max=0, description="index", tooltip="Go to this row, as in data.train[index]", style=_LABELS, layout=wide("130px")
        )
        self._status = widgets.HTML(tooltip="Where this row stands")
        self._lens = widgets.HTML(tooltip="The row, token by token")
        self._lengths = widgets.HTML(tooltip="Lengths in words")
        # Without a tooltip, which ipywidgets 8.1 cannot show on pictures: it shows an error instead. The words below say the same.
        size = {"width": f"{WIDTH}px", "height": f"{HEIGHT}px", "max_width": "100%", "object_fit": "contain"}
        self._image = widgets.Image(format="png", layout=widgets.Layout(**size))
        self._checks = widgets.HTML(tooltip="What was found in the data set")
        self.widget = self._laid_out()

    def _laid_out(self) -> widgets.VBox:
        row = widgets.Layout(flex_flow="row wrap", align_items="center", overflow="visible")

        def scrolled(child: widgets.Widget) -> widgets.Box:
            return widgets.Box([child], layout=widgets.Layout(max_height="420px", overflow="auto", display="block"))

        browse = widgets.VBox([widgets.HBox([self._previous, self._next, self._index, self._status], layout=row), scrolled(self._lens)])
        self._tabs = widgets.Tab([browse, widgets.VBox([self._image, self._lengths]), scrolled(self._checks)])
        self._tabs.titles = ("Rows", "Lengths", "Checks")
        choose = widgets.HBox([self._split, self._filter, self._search], layout=row)
        layout = widgets.Layout(width="100%", max_width="900px", overflow="visible")
        return styled(widgets.VBox([choose, self._tabs], layout=layout))

    def _connect(self) -> None:
        self._previous.on_click(lambda _: self._act(self.previous))
        self._next.on_click(lambda _: self._act(self.next))
        # A value that the panel itself has put there is what it already shows.
        self._split.observe(lambda c: c.new == self.split or self._act(lambda: self.show(split=c.new)), "value")
        self._filter.observe(lambda c: c.new == self.filter or self._act(lambda: self.show(filter=c.new)), "value")
        self._index.observe(lambda c: c.new == self.index or self._act(lambda: self.show(c.new)), "value")
        self._search.observe(lambda c: c.new == self.query or self._act(lambda: self.search(c.new)), "value")
        self._tabs.observe(lambda c: self._act(self._refresh_rows), "selected_index")

    def _act(self, action: Callable[[], Any]) -> None:
        """Does what a control asks for; an error is shown in the panel, where it would else be lost."""
        if self.closed:
            return
        try:
            action()
        except Exception as error:
            self._status.value = f'<span class="{NO_MATH}" role="alert">⚠ {esc(f"{type(error).__name__}: {error}", 1000)}</span>'

    # -- what is shown --------------------------------------------------------------------------------------------

    def _refresh_rows(self) -> None:
        """After a change of split, filter, search or tab."""
        self._split.value, self._filter.value, self._search.value = self.split, self.filter, self.query
        split = self.data.splits[self.split]
        last = max(0, len(split) - 1)
        self._index.max = max(self._index.max, last)
        self._index.value = self.index  # before the bound comes down: a value above it would be changed, as if by the user
        self._index.max = last
        if self._tabs.selected_index == 1:  # drawn when looked at
            self._image.value = self._plot.draw(split, self.data.settings.max_seq_length)
            self._lengths.value = f"<div style='line-height:1.5'>{esc(lengths_text(split))}</div>"
        if self._tabs.selected_index == 2:
            self._checks.value = self.checks.to_html()
        self._refresh_example()

    def _refresh_example(self) -> None:
        self._index.value = self.index
        self._status.value = f'<div class="{NO_MATH}" role="status" aria-live="polite">{esc(self.status)}</div>'
        self._lens.value = self.example_html()
        self._previous.disabled = not np.any(self.rows < self.index)
        self._next.disabled = not np.any(self.rows > self.index)

    @property
    def status(self) -> str:
        """Which row this is, and how many there are to go through."""
        example, total = self.example, len(self.data.splits[self.split])
        if example is None:
            return f"{self.split} has no rows"
        place = int(np.searchsorted(self.rows, self.index)) + 1 if self.index in self.rows else 0
        parts = [f"{example.source}", f"{total:,} rows in {self.split}"]
        if self.hits is not None:
            found = "1 hit" if len(self.rows) == 1 else f"{len(self.rows):,} hits"
            if place:
                found = f"hit {place:,} of {len(self.rows):,}"
            if self.hits.looked_at < self._filtered:
                found += f" in the first {self.hits.looked_at:,} rows (the others were not looked at)"
            parts.append(f"{found} for {self._short_query}")
        elif self.filter != FILTERS[0]:
            parts.append(f"{place:,} of {len(self.rows):,} {self.filter}" if place else f"{len(self.rows):,} {self.filter}; not this one")
        return " · ".join(parts)

    @property
    def _short_query(self) -> str:
        return repr(self.query if len(self.query) <= _SEARCH_CHARACTERS else f"{self.query[:_SEARCH_CHARACTERS]}…")

    def example_html(self) -> str:
        """The example looked at: what was found, its tokens, and the row as it was read."""
        example = self.example
        if example is None:
            return "<div>no rows</div>"
        found = surroundings(example.text, self.query) if self.query else None
        parts = []
        if found:
            before, hit, after, count = found
            times = f"<div>first of {count:,} in this row:</div>" if count > 1 else ""
            hit_html = f"<mark><b>{esc(hit, _SEARCH_CHARACTERS)}</b></mark>"
            parts.append(f'{times}<pre style="{_PRE}">{esc(before)}{hit_html}{esc(after)}</pre>')
        twins = self.checks.twins(self.split, self.index)
        if twins:
            parts.append(f'<div class="{NO_MATH}">⚠ The same text stands in {esc(", ".join(twins), 300)}</div>')
        parts.append(Lens([example], self.data.tokenizer)._repr_html_())
        row = esc(_row_text(example), _ROW_CHARACTERS)
        parts.append(f'<details><summary>Row as read</summary><pre style="{_PRE}">{row}</pre></details>')
        return '<div style="line-height:1.5">' + "".join(parts) + "</div>"

    def __repr__(self) -> str:
        return f"DataPanel({self.split}[{self.index}], {self.data!r})"

    def _repr_html_(self) -> str:
        split = self.data.splits[self.split]
        png, words = b64encode(self._plot.draw(split, self.data.settings.max_seq_length)).decode(), esc(lengths_text(split))
        image = f'<img src="data:image/png;base64,{png}" alt="{words}" width="{WIDTH}" height="{HEIGHT}">'
        return f"{self.checks.to_html()}{image}<div>{words}</div>{self.example_html()}"

    def _ipython_display_(self) -> None:
        self._showing.show(self, self._repr_html_(), repr(self))


def _row_text(example: Example) -> str:
    try:
        return json.dumps(example.row, ensure_ascii=False, indent=1, default=str)
    except (TypeError, ValueError):  # rows given in memory can hold what JSON cannot
        return repr(dict(example.row))
