"""The field for prompts: several lines, sent by Enter, which no such field of ipywidgets tells of. Its page side is static/prompt.js."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fulltune_nb.errors import optional_import

with optional_import("A panel", "notebook"):
    import anywidget
    import traitlets

_STATIC = Path(__file__).parents[1] / "static"


class PromptField(anywidget.AnyWidget):
    """A text of several lines. Enter sends it together with the text, so that it does not matter what else is under way.

    Attributes:
        value: what stands in it, as of when the cursor last left it.
        description: its label.
        placeholder: what stands in it while it is empty.
    """

    _esm = (_STATIC / "prompt.js").read_text("utf-8")
    _css = (_STATIC / "prompt.css").read_text("utf-8")
    value = traitlets.Unicode().tag(sync=True)
    description = traitlets.Unicode().tag(sync=True)
    placeholder = traitlets.Unicode().tag(sync=True)

    def on_submit(self, call: Callable[[str], Any]) -> None:
        """Has `call(text)` called when Enter is pressed."""

        def heard(_: Any, content: Any, __: Any) -> None:
            text = content.get("submitted") if isinstance(content, dict) else None
            if isinstance(text, str):
                call(text)

        self.on_msg(heard)

    def take(self, text: str) -> None:
        """Empties the field of a text that was sent; what was typed meanwhile stays."""
        if self.value == text:
            self.value = ""
        self.send({"taken": text})
