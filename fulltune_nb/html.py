"""What is shown, made safe: small HTML for `_repr_html_`, and text for terminals.

Everything that comes from outside (rows, model output, file names, exception texts) passes through `esc` on its way into HTML, and through
`printable` on its way to a terminal: printed lines, errors, warnings, `repr` and `str` of objects.
Colours are from Okabe and Ito's colour-blind safe palette; text takes the notebook theme's own colour, so light and
dark themes both read well.
"""

from __future__ import annotations

import html as _html
import re
from base64 import b64encode
from collections.abc import Iterable, Sequence

SHOWN_IN_MB = 1e8
"""Bytes; where less is shown of a run's memory, it is in MB, else in GB."""

NO_MATH = "mathjax_ignore tex2jax_ignore"
"""Class of elements whose text MathJax leaves alone."""

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")

# Control characters, those that reorder or hide the text around them (bidirectional controls and zero-width marks), and halves of
# surrogate pairs, as in names of files that are not UTF-8: no message with one in it could be sent to a page.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")

_CELL_CHARACTERS = 20_000  # of a text in a table; what is cut is counted
_LONG_CAPTION = 80  # characters; longer ones may be broken between words
_LONG_WORD = 40  # characters; longer ones may be broken anywhere
_PICTURE = "fulltune-picture"
_DARK_PAGES = ('[data-jp-theme-light="false"]', '[data-vscode-theme-kind*="dark"]', "body.dark")  # Jupyter's front ends, VS Code, marimo
_ON_DARK = "filter: invert(0.93) hue-rotate(180deg)"  # white becomes the page's near-black, dark text light, and blue stays blue


def esc(text: object, limit: int | None = None) -> str:
    """Text made safe to stand in HTML, as element content or as a quoted attribute.

    Markup, control characters (ANSI codes too), direction marks and lone surrogates are neutralised. `$` needs more: a browser decodes
    any entity before MathJax looks, so text is put into `<pre>` or under the class `NO_MATH`, as `table` does.

    Args:
        text: anything; `str()` is taken of it.
        limit: characters shown at most; what was cut is counted in the result.
    """
    text = str(text) if limit is None else cut(str(text), limit)
    return _html.escape(_UNSEEN.sub(_spelled, text), quote=True)


def printable(text: object) -> str:
    """Text made safe to stand on a terminal: what one acts on, and what reorders or hides text, is spelled, such as `\\x1b`.

    Line breaks (those of Windows as one character), tabs and letters of all languages stay.

    Args:
        text: anything; `str()` is taken of it.
    """
    return _UNSEEN.sub(_spelled, str(text).replace("\r\n", "\n"))


def cut(text: str, limit: int = 300) -> str:
    """At most `limit` characters, and how many more there are. The text itself: to be escaped where it is shown."""
    return text if len(text) <= limit else f"{text[:limit]} … (+{len(text) - limit:,} characters)"


def _spelled(match: re.Match) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", least_width: str = "0") -> str:
    """An HTML table; every cell and header is escaped, and cut after 20,000 characters. Numbers are set to the right.

    Args:
        headers: of the columns.
        rows: a value for each column.
        caption: above; "" for none.
        least_width: of a column, in CSS. A table that has one may be wider than its place, so it goes into `scrolling`.
    """
    style = f"text-align:left;padding:2px 10px;min-width:{least_width}"
    head = "".join(f'<th scope="col" style="{style}">{esc(h)}</th>' for h in headers)
    return _table(f"<thead><tr>{head}</tr></thead>", ("".join(_cell(value) for value in row) for row in rows), caption)


def _table(head: str, rows: Iterable[str], caption: str) -> str:
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    # A caption is as wide as its table: one over a narrow table would be broken after a word or two.
    wrap = "" if len(caption) > _LONG_CAPTION else ";white-space:nowrap"
    title = f'<caption style="text-align:left;font-weight:bold{wrap}">{esc(caption)}</caption>' if caption else ""
    return f'<table class="{NO_MATH}" style="border-collapse:collapse">{title}{head}<tbody>{body}</tbody></table>'


def _cell(value: object) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    align = "right" if is_number else "left"
    text = esc(value, _CELL_CHARACTERS)
    # Only there: allowed everywhere, a long text would take the room of the short words beside it, letter by letter.
    wrap = ";overflow-wrap:anywhere" if any(len(word) > _LONG_WORD for word in text.split()) else ""
    return f'<td style="text-align:{align};padding:2px 10px;vertical-align:top;white-space:pre-wrap{wrap}">{text}</td>'


def facts(title: str, pairs: Iterable[tuple[str, object]]) -> str:
    """A titled two-column table of names and values; the names are the headers of their rows."""
    head = '<th scope="row" style="text-align:left;font-weight:normal;padding:2px 10px;vertical-align:top">{}</th>'
    return _table("", (head.format(esc(name)) + _cell(value) for name, value in pairs), title)


def image(png: bytes, alt: str, width: float) -> str:
    """A picture on white as an element of a page, dark where the page is; so many pixels wide or as wide as its place.

    `alt` tells it to those who cannot see it.
    """
    data = b64encode(png).decode()
    img = f'<img class="{_PICTURE}" width="{width:.0f}" style="max-width:100%" alt="{esc(alt)}" src="data:image/png;base64,{data}"/>'
    return on_dark(f".{_PICTURE}") + img


def on_dark(pictures: str) -> str:
    """A style element that has pictures on white, which a CSS selector names, follow a dark page."""
    return f"<style>{', '.join(f'{page} {pictures}' for page in _DARK_PAGES)} {{ {_ON_DARK} }}</style>"


def scrolling(content: str, name: str) -> str:
    """HTML in a box with a bar to scroll it from side to side, which the keyboard reaches, where it is wider than its place."""
    return f'<div style="overflow-x:auto" role="region" aria-label="{esc(name)}" tabindex="0">{content}</div>'


def more(count: int, what: str) -> str:
    """A line below what was cut short, such as "… and 3 more rows"; `""` for none."""
    return f"<div>… and {count:,} more {esc(what)}</div>" if count > 0 else ""


def human_bytes(count: float) -> str:
    """Bytes as text in decimal units, such as `"4.29 GB"`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def one_unit(sizes: Iterable[float]) -> tuple[float, str]:
    """Bytes of a unit, and its name, for all sizes of a table: GB, or MB where the largest is less than one."""
    return (1e9, "GB") if max(sizes, default=0) >= 1e9 else (1e6, "MB")


def in_one_unit(sizes: Sequence[float]) -> list[str]:
    """Bytes as texts, all in one unit, such as `["4.29 GB", "0.02 GB"]`."""
    scale, unit = one_unit(sizes)
    return [f"{hundredths(size / scale)} {unit}" for size in sizes]


def hundredths(value: float) -> str:
    """A number that is not negative with two decimals, such as `"0.52"`; `"<0.01"` for one that is less than that, and not 0."""
    return "<0.01" if 0 < value < 0.005 else f"{value:,.2f}"


def counted(count: int, noun: str) -> str:
    """`"1 row"`, `"2,000 rows"`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
