"""What comes from rows, models and files never acts on a terminal: printed lines, errors, warnings, objects as text."""

from __future__ import annotations

import io
import json
import re
import sys
import traceback
import warnings

import pytest

import fulltune_nb as ft
from fulltune_nb.errors import DataError, FulltuneError, MissingDependencyError, ModelError
from fulltune_nb.generate import main
from fulltune_nb.html import printable
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.training.history import Event
from nbs_tests.models.parity import RAW

EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\x7f\b\r\u202eevil\u2066\x00"
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def safe(text: object) -> bool:
    return ACTS.search(str(text)) is None and ACTS.search(repr(text)) is None


def test_what_a_terminal_acts_on_is_spelled_and_all_else_stays():
    assert printable(EVIL) == r"\x1b]0;title\x07\x1b[2J\x9b31m\x7f\x08\x0d\u202eevil\u2066\x00"
    assert all(safe(printable(chr(code))) for code in range(0x3000) if chr(code) not in "\n\t")
    assert printable("a\r\nb\rc") == "a\nb\\x0dc"
    kept = "a\n\tb naïve 東京 русский עברית العربية हिन्दी\u200d 👩\u200d🚀 \\x1b"
    assert printable(kept) == kept and printable(printable(EVIL)) == printable(EVIL)


@pytest.mark.parametrize("kind", [FulltuneError, ModelError, DataError, MissingDependencyError])
def test_an_error_and_those_that_led_to_it_are_safe(kind):
    class Named(Exception):
        def __init__(self, name):
            super().__init__("x")
            self.name = name

        def __str__(self):
            return f"{self.name} is bad"

    def fail(first):
        try:
            try:
                raise first
            except type(first):
                raise ValueError(f"while reading {EVIL}")  # noqa: B904  the implicit chain
        except ValueError as error:
            raise kind(f"cannot read {EVIL}") from error

    for first in (RuntimeError(EVIL), Named(EVIL), KeyError(EVIL), OSError(2, "No such file", EVIL)):
        with pytest.raises(kind) as caught:
            fail(first)
        shown = "".join(traceback.format_exception(caught.value))
        assert shown.count("evil") >= 3 and safe(shown)


def test_the_lines_of_a_data_error_are_safe(tmp_path, tokenizer):
    path = tmp_path / "train\u202e.jsonl"
    rows = [{"messages": [{"role": EVIL}]}, {"messages": [{"role": "user", "content": [{"type": EVIL}]}]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as caught:
        ft.load_data({"train": str(path)}, tokenizer)
    assert caught.value.problems and all(map(safe, [caught.value, *caught.value.problems]))


def test_a_chat_templates_own_message_is_safe(make_tokenizer):
    template = "{{ raise_exception(messages[0]['content']) }}"
    conversation = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError) as caught:
        ft.load_data({"train": [{"messages": conversation}]}, make_tokenizer(template))
    assert "evil" in str(caught.value) and safe("".join(traceback.format_exception(caught.value)))


def test_data_as_text_is_safe_and_keeps_what_it_holds(tokenizer):
    data = ft.load_data({"train": [{"text": f"one\n\ttwo {EVIL}"}, {"text": 3}]}, tokenizer, bad_rows="skip")
    example = data.train[0]
    shown = [data, data.train, example, data.show(1), *data.notes, *data.train.skipped]
    assert all(map(safe, shown)) and "ne\n\ttwo \\x1b]0;" in str(data.show(1))
    assert EVIL in example.text


def test_what_a_run_tells_is_safe():
    event = Event(3, EVIL, f"saved as {EVIL}", 0.0)
    assert safe(event) and safe(event.message) and Event.from_dict(event.to_dict()) == event


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_answer_is_printable_on_a_terminal_and_as_it_is_in_a_file(is_terminal, monkeypatch):
    class Output(io.StringIO):
        def isatty(self):
            return is_terminal

    output = Output()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr("fulltune_nb.generate.answer", lambda arguments: iter(["one\n\t東京 ", EVIL]))
    assert main(["--model", "x", "--prompt", "y"]) == 0
    assert output.getvalue() == f"one\n\t東京 {printable(EVIL) if is_terminal else EVIL}\n"


def test_a_key_of_a_config_in_a_warning_is_safe(tokenizer):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LanguageModel.from_config({**RAW, f"logit_{EVIL}": EVIL, "resid_dropout": 0.1}, tokenizer)
    assert len(caught) == 2 and all(safe(one.message) for one in caught)
