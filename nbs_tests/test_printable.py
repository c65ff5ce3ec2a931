"""What comes from rows, models and files never acts on a terminal: printed lines, errors, warnings, objects as text."""

from __future__ import annotations

import errno
import io
import json
import re
import sys
import traceback
import warnings

import jinja2
import pytest
import yaml

import fulltune_nb as ft
from fulltune_nb.errors import DataError, FulltuneError, MissingDependencyError
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


class Named(Exception):
    """One that makes its text of something else than `args`."""

    def __str__(self):
        return f"{self.args[0]['name']} is bad"


def with_note(error: Exception, note: str) -> Exception:
    error.add_note(note)
    return error


def raised_by(call) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


LED_THERE = {
    "args": lambda: RuntimeError(EVIL),
    "a key": lambda: KeyError(EVIL),
    "a file's name": lambda: OSError(2, "No such file", EVIL),
    "a system's message": lambda: OSError(errno.EINVAL, EVIL),
    "a codec's reason": lambda: UnicodeDecodeError("utf-8", b"a", 0, 1, EVIL),
    "a line of code": lambda: SyntaxError("bad", ("file", 1, 1, EVIL)),
    "a module": lambda: ImportError(EVIL, name=EVIL),
    "a note": lambda: with_note(ValueError("x"), EVIL),
    "a group": lambda: ExceptionGroup("several", [ValueError("x"), OSError(5, EVIL)]),
    "a group's name": lambda: ExceptionGroup(EVIL, [ValueError("x")]),
    "a text that its class makes": lambda: Named({"name": EVIL}),
    "a template": lambda: jinja2.TemplateSyntaxError(EVIL, 1),
    "YAML": lambda: raised_by(lambda: yaml.safe_load("a: [\u202eevil\u2066")),
}


@pytest.mark.parametrize("kind", [FulltuneError, DataError, MissingDependencyError])
@pytest.mark.parametrize("first", LED_THERE.values(), ids=LED_THERE)
def test_an_error_and_those_that_led_to_it_are_safe(first, kind):
    def fail():
        try:
            try:
                raise first()
            except Exception:
                raise ValueError(f"while reading {EVIL}")  # noqa: B904  the implicit chain
        except ValueError as error:
            raise kind(f"cannot read {EVIL}") from error

    with pytest.raises(kind) as caught:
        fail()
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
