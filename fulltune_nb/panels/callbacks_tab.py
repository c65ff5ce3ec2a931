"""The training panel's tab of callbacks: what those attached to the trainer have seen so far, such as what is forgotten."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets

from fulltune_nb.errors import FulltuneError
from fulltune_nb.html import NO_MATH, esc
from fulltune_nb.insight.survival import UpdateMeter
from fulltune_nb.panels.looks import Post, scrolled
from fulltune_nb.panels.loop import TrainLoop

_NOTHING = """<div style="line-height:1.5">Nothing is attached to this trainer. What can be:<ul>
<li><code>insight.Forgetting(prompts, text).attach(trainer)</code>: the same questions at every evaluation and checkpoint, perplexity
on a text that is not trained on, and how far the weights have moved</li>
<li><code>insight.GenerationScore(data.valid[:20]).attach(trainer)</code>: answers written at every evaluation, beside those
expected</li>
</ul></div>"""


class CallbacksTab:
    """See `Look`. Shows whatever stands among the trainer's listeners and has a view for a cell."""

    title = "Callbacks"

    def __init__(self, loop: TrainLoop):
        self._journal = loop.trainer.journal
        self.page = widgets.HTML(tooltip="What attached callbacks have seen")
        self.box = scrolled(self.page)

    def connect(self, post: Post) -> None:
        """See `Look`."""

    def open(self) -> None:
        """See `Look`."""

    def close(self) -> None:
        """See `Look`."""

    def leave(self) -> None:
        """See `Look`."""

    def renew(self) -> None:
        """See `Look`."""
        shown = [one for one in self._journal.listeners if hasattr(one, "_repr_html_") and not isinstance(one, UpdateMeter)]
        self.page.value = "".join(f'<div style="line-height:1.35;margin-bottom:10px">{_view(one)}</div>' for one in shown) or _NOTHING


def _view(callback: Any) -> str:
    try:
        return callback._repr_html_() or esc(repr(callback), 1000)
    except FulltuneError as error:
        text = str(error)
    except Exception as error:  # of somebody's own class
        text = f"{type(error).__name__}: {error}"
    return f'<div class="{NO_MATH}">⚠ {esc(type(callback).__name__)} cannot be shown: {esc(text, 1000)}</div>'
