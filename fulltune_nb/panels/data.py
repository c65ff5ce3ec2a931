"""The data panel: browse and search the examples of a data set, token by token, and see what is wrong with them."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterable
from functools import cached_property

import numpy as np

from fulltune_nb.data.dataset import DataSet, Split
from fulltune_nb.data.example import ADVICE, Example, Lens, SpecialTokenCheck
from fulltune_nb.data.look import Duplicates, Hits, counts_table, find_duplicates, search, surroundings
from fulltune_nb.errors import ConfigError, DataError, listed, optional_import
from fulltune_nb.html import NO_MATH, PALETTE, counted, esc, facts, image, table
from fulltune_nb.panels.controls import DataControls
from fulltune_nb.panels.panel import Panel

with optional_import("A panel", "notebook"):
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

FILTERS = ("all", "cut off", "not trained on", "BOS or EOS warning", "also in another split")
"""Which rows of a split there are to choose from."""

_ROW_CHARACTERS = 4000  # of a row as it was read
_SEARCH_CHARACTERS = 200  # of what is searched for, where it is repeated
_PRE = "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;line-height:1.5;margin:4px 0"


class DataPanel(Panel):
    """Browses the examples of a data set. Every control has a method here that does the same, with or without a notebook.

    The row shown is always one of `rows`, which filter and search leave together. Where they leave none, none is shown, and the panel says
    why; to go to another row by its index ends both.

    Nothing is computed with the model, so the panel may be used while training goes on.

    Attributes:
        data: the data set.
        checks: what was found in it: `.duplicates`, `.special_tokens`.
        split: name of the split looked at.
        index: of the example looked at, as in `data.train[index]`; where `rows` is empty, of the one before.
        filter: which rows of the split are gone through.
        rows: indices that `next` and `previous` go through: those left by filter and search.
        query: the text searched for; "" for none.
        hits: what the search found, or None.
        controls: the widgets by name.
        widget: all of them in a box.
        closed: whether the panel was taken away.
    """

    MADE_BY, ERROR = "DataPanel(data)", DataError

    def __init__(self, data: DataSet):
        self.data = data
        self.checks = DataChecks(data)
        self.split = next(iter(data.splits))
        self.index = 0
        self.filter = FILTERS[0]
        self.query = ""
        self.hits: Hits | None = None
        self.rows = np.arange(len(data.splits[self.split]))
        self._found_elsewhere = 0  # rows that have the text and are not left by the filter, where none is both
        self._note = ""
        self.controls = DataControls(list(data.splits), FILTERS)
        super().__init__(self.controls.box)
        self.widget.panel = self  # shown without a name of its own, the panel lives as long as its widgets
        self._lock = threading.RLock()  # callbacks may come on another thread than the cells
        self._plot = LengthPlot()
        self._connect()
        self._show_rows()

    # -- what can be done -----------------------------------------------------------------------------------------

    @property
    def example(self) -> Example | None:
        """The example looked at; None where filter and search leave no row of the split."""
        return self.data.splits[self.split][self.index] if len(self.rows) else None

    def show(self, index: int | None = None, split: str | None = None, filter: str | None = None) -> None:
        """Goes to an example, of another split where one is named.

        Args:
            index: of the example, as in `data.train[index]`; where left out, the first that filter and search leave, unless the present one
                is left. Of an example that is not left, it ends both.
            split: "train", "valid" or "test".
            filter: one of "all", "cut off", "not trained on", "BOS or EOS warning", "also in another split".

        Raises:
            DataError: no such split or no such index, or the filter asked for does not leave it.
            ConfigError: no such filter.
        """
        with self._lock:
            asked, split, filter = filter, split or self.split, filter or self.filter
            if split not in self.data.splits:
                raise DataError(f"There is no split {split!r} in this data set; it has {', '.join(self.data.splits)}.")
            if filter not in FILTERS:
                raise ConfigError(f"filter: expected one of {', '.join(map(repr, FILTERS))}, got {filter!r}.")
            count = len(self.data.splits[split])
            if index is not None and not (isinstance(index, int) and 0 <= index < count):
                raise DataError(f"{split} has the indices 0 to {count - 1:,}, got {index!r}.")
            if asked is not None and index is not None and index not in self.checks.rows(split, filter):
                raise DataError(f"{split}[{index}] is not among the rows {filter!r}. Leave out index or filter.")
            self._note = ""
            if (split, filter) != (self.split, self.filter):
                self._choose(split, filter, self.query)
            if index is not None and index not in self.rows:
                self._choose(split, FILTERS[0], "")
                self._note = "filter and search are ended: this row is not among theirs"
            self._show_rows(index)

    def all_rows(self) -> None:
        """Ends filter and search; the row looked at stays."""
        with self._lock:
            self._choose(self.split, FILTERS[0], "")
            self._show_rows()

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
            self._choose(self.split, self.filter, text)
            self._show_rows()
            return self.hits.rows if self.hits else []

    def _go(self, index: int) -> None:
        self.index, self._note = int(index), ""
        self._show_example()

    def _choose(self, split: str, filter: str, query: str) -> None:
        """What filter and search leave of a split."""
        self.split, self.filter, self.query, self._note = split, filter, query, ""
        rows, examples = self.checks.rows(split, filter), self.data.splits[split].examples
        self.hits = search(examples, rows, query) if query else None
        self._filtered = len(rows)
        self.rows = rows if self.hits is None else np.array(self.hits.rows, dtype=np.int64)
        both = query and filter != FILTERS[0] and not len(self.rows)
        self._found_elsewhere = len(search(examples, range(len(examples)), query).rows) if both else 0

    # -- controls ---------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        controls = self.controls
        self.connect(controls.previous, self.previous)
        self.connect(controls.next, self.next)
        self.connect(controls.split, self._split_chosen)
        self.connect(controls.filter, self._filter_chosen)
        self.connect(controls.index, self.show)
        self.connect(controls.search, self.search)
        self.connect(controls.all_rows, self.all_rows)
        controls.tabs.observe(lambda _: self._act(self._show_rows), "selected_index")

    def _split_chosen(self, split: str) -> None:
        self.show(split=split)

    def _filter_chosen(self, filter: str) -> None:
        self.show(filter=filter)

    def refresh(self) -> None:
        """Shows where the row stands, or the error of a control."""
        error = self._control_error
        text = self.status if error is None else f"⚠ {type(error).__name__}: {error}"
        role = 'role="status" aria-live="polite"' if error is None else 'role="alert"'
        self.controls.status.value = f'<div class="{NO_MATH}" {role}>{esc(text, 1000)}</div>'

    # -- what is shown --------------------------------------------------------------------------------------------

    def _show_rows(self, index: int | None = None) -> None:
        """After a change of split, filter, search or tab. Goes to a row, or to the first where the present one is not left."""
        if index is not None or (len(self.rows) and self.index not in self.rows):
            self.index = int(self.rows[0]) if index is None else index
        controls, split = self.controls, self.data.splits[self.split]
        self.index = min(self.index, max(0, len(split) - 1))  # where no row is left, it may be another split's
        self.put(controls.split, self.split)
        self.put(controls.filter, self.filter)
        self.put(controls.search, self.query)
        controls.all_rows.disabled = not self.query and self.filter == FILTERS[0]
        last = max(0, len(split) - 1)
        controls.index.max = max(controls.index.max, last)
        self.put(controls.index, self.index)  # before the bound comes down: a value above it would be changed, as if by the user
        controls.index.max = last
        if controls.tabs.selected_index == 1:  # drawn when looked at
            controls.lengths.value = self._lengths_html()
        if controls.tabs.selected_index == 2:
            controls.checks.value = self.checks.to_html()
        self._show_example()

    def _show_example(self) -> None:
        self.put(self.controls.index, self.index)
        self.controls.lens.value = self.example_html() if self.example is not None else ""  # the status says why
        self.controls.previous.disabled = not np.any(self.rows < self.index)
        self.controls.next.disabled = not np.any(self.rows > self.index)
        self._control_error = None  # of an earlier control
        self.refresh()

    @property
    def status(self) -> str:
        """Which row this is, and how many there are to go through; or why there are none."""
        total, filtered = len(self.data.splits[self.split]), self.filter != FILTERS[0]
        where = f"{counted(total, 'row')} in {self.split}"
        if self.example is None:
            return self._why_none(where)
        parts, place = [self.example.source, where], int(np.searchsorted(self.rows, self.index)) + 1
        if self.hits is not None:
            parts.append(f"hit {place:,} of {len(self.rows):,}{self._searched()}")
        elif filtered:
            parts.append(f"{place:,} of {len(self.rows):,} {self.filter}")
        return " · ".join([*parts, self._note] if self._note else parts)

    def _why_none(self, where: str) -> str:
        if not len(self.data.splits[self.split]):
            return f"{self.split} has no rows"
        if self.hits is None or not self._filtered:
            return f"none of {where}: {self.filter}. Choose other rows, or press All rows."
        elsewhere = f", {self._found_elsewhere:,} among all {where}" if self._found_elsewhere else f", of {where}"
        return f"0 hits{self._searched()}{elsewhere}. Search for something else, or press All rows."

    def _searched(self) -> str:
        """What was searched for, and among which rows."""
        short = self.query if len(self.query) <= _SEARCH_CHARACTERS else f"{self.query[:_SEARCH_CHARACTERS]}…"
        among = f" among {counted(self._filtered, 'row')} ({self.filter})" if self.filter != FILTERS[0] else ""
        if self.hits.looked_at < self._filtered:
            among += f" in the first {self.hits.looked_at:,} of these rows (the others were not looked at)"
        return f" for {short!r}{among}"

    def example_html(self) -> str:
        """The example looked at: what was found, its tokens, and the row as it was read."""
        example = self.example
        if example is None:
            return f'<div class="{NO_MATH}">{esc(self.status, 1000)}</div>'
        parts = []
        if self.query and (found := surroundings(example.text, self.query)):
            before, hit, after, count = found
            times = f"<div>first of {count:,} in this row:</div>" if count > 1 else ""
            hit_html = f"<mark><b>{esc(hit, _SEARCH_CHARACTERS)}</b></mark>"
            parts.append(f'{times}<pre style="{_PRE}">{esc(before)}{hit_html}{esc(after)}</pre>')
        if twins := self.checks.twins(self.split, self.index):
            parts.append(f'<div class="{NO_MATH}">⚠ The same text stands in {esc(", ".join(twins), 300)}</div>')
        parts.append(Lens([example], self.data.tokenizer)._repr_html_())
        row = esc(_row_text(example), _ROW_CHARACTERS)
        parts.append(f'<details><summary>Row as read</summary><pre style="{_PRE}">{row}</pre></details>')
        return '<div style="line-height:1.5">' + "".join(parts) + "</div>"

    def __repr__(self) -> str:
        return f"DataPanel({self.split}[{self.index}], {self.data!r})"

    def _repr_html_(self) -> str:
        return f"{self.checks.to_html()}{self._lengths_html()}{self.example_html()}"

    def _lengths_html(self) -> str:
        split = self.data.splits[self.split]
        png, words = self._plot.draw(split, self.data.settings.max_seq_length), lengths_text(split)
        return f'<div style="line-height:1.5">{image(png, words, _FIGURE[0] * _DPI)}<div>{esc(words)}</div></div>'


def _row_text(example: Example) -> str:
    try:
        return json.dumps(example.row, ensure_ascii=False, indent=1, default=str)
    except (TypeError, ValueError):  # rows given in memory can hold what JSON cannot
        return repr(dict(example.row))


# -- checks ---------------------------------------------------------------------------------------------------------------

_LISTED = 8  # rows named of each finding


class DataChecks:
    """The findings about a data set; each is worked out when it is first asked for."""

    def __init__(self, data: DataSet):
        self._data = data

    @cached_property
    def duplicates(self) -> Duplicates:
        """Rows that become the same text."""
        return find_duplicates(self._data.splits)

    @property
    def special_tokens(self) -> dict[str, SpecialTokenCheck]:
        """BOS, EOS and other special tokens of each split."""
        return self._data.special_tokens

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
        others = [note for note in data.notes if note not in data.special_token_notes]  # those are a table of their own
        notes = "".join(f"<li>{esc(note)}</li>" for note in others)
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
                where = _named(self._data.splits[name][row].source for row in found)
                rows.append((name, f"{len(found):,} of {len(check.bos):,}", f"⚠ {problem}", where, ADVICE[problem]))
        counts = "; ".join(f"{name} {c.bos.sum():,} BOS, {c.eos.sum():,} EOS" for name, c in self.special_tokens.items())
        if not rows:
            cut = sum(split.truncated for split in self._data.splits.values())
            missing = f"missing are the ends of {counted(cut, 'row')} that were cut" if cut else "nothing missing"
            return f"<b>Special tokens</b><div>{'⚠' if cut else '✓'} nothing doubled, {missing} ({esc(counts)})</div>"
        return table(("split", "rows", "warning", "which", "what to do"), rows, "Special tokens") + f"<div>{esc(counts)}</div>"

    def _duplicates_html(self) -> str:
        rows, splits = [], self._data.splits
        for (name, other), pairs in self.duplicates.across.items():
            if pairs and list(splits).index(name) < list(splits).index(other):
                named = _named(f"{splits[name][a].source} = {splits[other][b].source}" for a, b in pairs)
                back = len(self.duplicates.across[other, name])
                rows.append((f"{name} in {other}", f"⚠ {counted(len(pairs), 'row')}, {back:,} there", named))
        shown = bool(rows)
        for name, count in self.duplicates.within.items():
            if count:
                rows.append((f"{name} in itself", f"{counted(count, 'row')} stood there before", ""))
        if not rows:
            return "<b>Duplicates</b><div>✓ no row stands in the data twice</div>"
        advice = "Held-out rows that are trained on say little about what was learned: take them out of one of the two."
        return table(("rows", "how many", "which"), rows, "Duplicates") + (f"<div>{advice}</div>" if shown else "")


def _named(names: Iterable[str]) -> str:
    return listed([name if len(name) <= 80 else f"{name[:77]}…" for name in names], _LISTED)


# -- lengths --------------------------------------------------------------------------------------------------------------

_BINS = 40
_FIGURE, _DPI = (6.4, 2.6), 100  # inches, and pixels of the page in one; the picture has twice as many, for screens that show them
_WIDE = 30  # a longest row so many times the median gets a logarithmic axis
_BLUE, _VERMILLION, _INK = PALETTE[0], PALETTE[5], "#222222"


def whole_lengths(split: Split) -> np.ndarray:
    """(rows,) int64, tokens of each row before anything was cut."""
    return split.lengths + np.array([example.cut for example in split.examples], dtype=np.int64)


def lengths_text(split: Split) -> str:
    """What the picture of a split's lengths shows in a sentence or two, for those who cannot see it."""
    lengths = whole_lengths(split)
    if not len(lengths):
        return f"{split.name} has no rows."
    text = f"{split.name}: rows of {lengths.min():,} to {lengths.max():,} tokens, half of them up to {int(np.median(lengths)):,}."
    if not split.truncated:
        return f"{text} None is cut."
    lost = 100 * split.tokens_cut / int(lengths.sum())
    are = "is" if split.truncated == 1 else "are"
    return f"{text} {split.truncated:,} of {len(split):,} rows {are} cut: {counted(split.tokens_cut, 'token')} lost, {lost:.1f} % of all."


class LengthPlot:
    """Draws histograms of row lengths, with the cut at `max_seq_length`, on one figure that is used again. From any thread."""

    def __init__(self) -> None:
        self._figure = Figure(figsize=_FIGURE, dpi=2 * _DPI, facecolor="white")
        FigureCanvasAgg(self._figure)
        self._lock = threading.Lock()

    def draw(self, split: Split, max_seq_length: int) -> bytes:
        """The histogram of a split as PNG. What was cut off is hatched."""
        with self._lock:
            self._figure.clear()
            axes = self._figure.add_axes((0.105, 0.2, 0.845, 0.64))  # room for the last label
            lengths = whole_lengths(split)
            wide = lengths.max(initial=1) > _WIDE * max(float(np.median(lengths)) if len(lengths) else 1.0, 1.0)
            _draw_bars(axes, lengths, split, max_seq_length, wide)
            _style(axes, wide)
            file = io.BytesIO()
            self._figure.savefig(file, format="png", dpi="figure")
            return file.getvalue()


def _draw_bars(axes: Axes, lengths: np.ndarray, split: Split, limit: int, wide: bool) -> None:
    edges = _edges(lengths, wide)
    place = {"x": edges[:-1], "width": np.diff(edges), "align": "edge"}
    axes.bar(height=np.histogram(lengths, edges)[0], **place, color=_BLUE, edgecolor="white", linewidth=0.5, label="rows")
    if split.truncated:
        cut_counts = np.histogram(lengths[lengths > limit], edges)[0]
        look = {"color": "white", "edgecolor": _VERMILLION, "hatch": "////", "linewidth": 0.8}
        axes.bar(height=cut_counts, **place, label=f"rows cut ({split.truncated:,})", **look)
        axes.axvline(limit + 0.5, color=_VERMILLION, linestyle="--", linewidth=1.8, label=f"max_seq_length = {limit:,}")
        legend = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 3, "frameon": False, "fontsize": 8.5}
        axes.legend(labelcolor=_INK, **legend)


def _edges(lengths: np.ndarray, wide: bool) -> np.ndarray:
    """Ascending borders of the bars; within them every length once."""
    longest = int(lengths.max(initial=1))
    least = max(int(lengths.min(initial=longest)), 1)
    if wide:
        return np.unique(np.geomspace(least, longest + 1, _BINS + 1).round())
    step = -(-(longest + 1 - least) // _BINS)
    return np.arange(least, longest + 1 + step, step) - 0.5  # lengths are whole numbers: each in the middle of its own


def _style(axes: Axes, wide: bool) -> None:
    # Every setting by hand: matplotlib's global ones belong to the notebook, and to other threads.
    axes.set_facecolor("white")
    axes.set_xlabel("tokens in a row" + (" (logarithmic)" if wide else ""), color=_INK, fontsize=9)
    axes.set_ylabel("rows", color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, labelsize=8.5, which="both")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if wide:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
