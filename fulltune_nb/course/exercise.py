"""What an exercise is: what it asks for, inputs, a reference, and typical mistakes with what helps against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulltune_nb import html


@dataclass(frozen=True)
class Mistake:
    """A typical wrong solution: where a student's results are its results, the hint is what helps.

    Attributes:
        solution: it gives what the mistake gives.
        hint: a question or a fact that leads on, and not the solution.
    """

    solution: Callable
    hint: str


@dataclass(frozen=True)
class Exercise:
    """What a student is to code.

    Attributes:
        name: such as "01.loss".
        asks: for what, in a sentence or two.
        arguments: their names, as a solution is called with them, and what each is.
        results: names of what it returns; with one name it returns that, else a tuple.
        cases: the arguments of each call, and what is particular about it ("" where nothing is).
        solution: the reference.
        mistakes: typical ones.
        hint: where nothing more is known.
    """

    name: str
    asks: str
    arguments: Mapping[str, str]
    results: Sequence[str]
    cases: Sequence[tuple[str, Mapping[str, Any]]]
    solution: Callable
    mistakes: Sequence[Mistake]
    hint: str

    def _repr_html_(self) -> str:
        return html.facts(self.name, [("asks for", self.asks), *self.arguments.items(), ("returns", ", ".join(self.results))])
