"""`python -m fulltune_nb.chat` and `python -m fulltune_nb.serve`: a conversation in the terminal, and a server by mlx-lm."""

from __future__ import annotations

import builtins
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

import fulltune_nb as ft
from fulltune_nb import chat, serve, tiny
from fulltune_nb.errors import GenerationError, MissingDependencyError, ModelError
from nbs_tests.models.parity import need

SHORT = ["--max-tokens", "8"]


@pytest.fixture
def typed(monkeypatch):
    """`typed(lines)`: what is typed into the conversation; an exception is what the keyboard raises. Ctrl-D at the end."""

    def type_in(*lines):
        waiting = iter([*lines, EOFError()])

        def next_line(prompt):
            line = next(waiting)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", next_line)

    return type_in


def conversation(answers, **options):
    """A conversation in which each question gets the next of some answers; what was asked is kept."""
    asked, waiting = [], iter(answers)

    def answer(messages):
        asked.append([f"{m['role']}: {m['content']}" for m in messages])
        for piece in next(waiting):
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    return chat.Conversation(answer, **options), asked


def test_answers_are_those_of_chat_and_the_next_question_knows_them(typed, capsys):
    lm = ft.load_model(tiny.BASE_MODEL)
    first = [{"role": "user", "content": "How many cities are there?"}]
    answer = lm.chat(first, max_tokens=8)
    second = lm.chat([*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "And trains?"}], max_tokens=8)
    typed("How many cities are there?", "And trains?", "/new", "And trains?")
    assert chat.main([str(tiny.BASE_MODEL), *SHORT]) == 0
    alone = lm.chat([{"role": "user", "content": "And trains?"}], max_tokens=8)
    assert capsys.readouterr().out == f"{answer}\n{second}\n{alone}\n\n" and second != alone


def test_commands_change_what_is_asked(capsys):
    talk, asked = conversation([["a"], ["b"], ["c"], ["d"]], system="Be kind.")
    for line in ("one", "/system Be brief.", "two", "/system", "three", "//path", "  ", "/help", "/nwe"):
        assert talk.take(line)
    assert asked == [
        ["system: Be kind.", "user: one"],
        ["system: Be brief.", "user: two"],
        ["user: three"],
        ["user: three", "assistant: c", "user: /path"],
    ]
    told = capsys.readouterr().err
    assert told.count("begins a new conversation") == 4 and "no command /nwe" in told
    assert not talk.take("/quit")


def test_an_interrupt_ends_the_answer_and_its_beginning_is_kept(capsys):
    talk, asked = conversation([["The ", "answer", KeyboardInterrupt()], [KeyboardInterrupt()], ["c"]])
    assert all(talk.take(line) for line in ("one", "two", "three"))
    assert asked[-1] == ["user: one", "assistant: The answer", "user: three"]
    assert capsys.readouterr().out == "The answer\n(ended)\n\n(ended)\nc\n"


def test_a_question_that_is_refused_is_told_and_forgotten(capsys):
    talk, asked = conversation([[GenerationError("no \x1b[31msystem")], ["b"]])
    assert talk.take("one") and talk.take("two") and asked[-1] == ["user: two"]
    assert "error: no \\x1b[31msystem" in capsys.readouterr().err


def test_asked_alone_nothing_of_before_is_known():
    talk, asked = conversation([["a"], ["b"]], system="Be kind.", alone=True)
    assert talk.take("one") and talk.take("two")
    assert asked == [["system: Be kind.", "user: one"], ["system: Be kind.", "user: two"]]


def test_what_a_terminal_would_act_on_is_spelled(capsys):
    talk, _ = conversation([["a\x1b]0;title\x07b", "\u202e"]])
    talk.take("one")
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07b\\u202e\n"


def test_an_interrupt_at_the_prompt_says_how_to_end(typed, capsys):
    typed(KeyboardInterrupt(), "/quit")
    assert chat.main([str(tiny.BASE_MODEL)]) == 0 and "Ctrl-D" in capsys.readouterr().err


def test_bad_settings_are_told_before_a_model_is_loaded(capsys):
    assert chat.main(["no/such/model", "--top-p", "2"]) == 2 and "top_p" in capsys.readouterr().err


ENDLESS = """
import itertools, time
from fulltune_nb import chat
def answer(messages):
    for number in itertools.count():
        time.sleep(0.01)
        yield f"word{number} "
chat._loaded = lambda arguments: chat.Conversation(answer)
raise SystemExit(chat.main(["no model"]))
"""


def test_in_a_real_terminal_ctrl_c_ends_the_answer_and_ctrl_d_the_program():
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", ENDLESS], stdin=follower, stdout=follower, stderr=follower, start_new_session=True)
    os.close(follower)
    seen = ""

    def until(text):
        nonlocal seen
        while text not in seen:
            assert select.select([leader], [], [], 60)[0], f"waiting for {text!r}, seen: {seen}"
            seen += os.read(leader, 4096).decode("utf-8", "replace")
        seen = seen.partition(text)[2]

    try:
        until("> ")
        os.write(leader, b"Go on.\n")
        until("word3")
        process.send_signal(signal.SIGINT)
        until("(ended)")
        until("> ")
        os.write(leader, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)


# ---- serve


def test_the_server_is_mlx_lms_and_that_is_said(monkeypatch, capsys):
    need("mlx_lm", "pip install mlx-lm==0.32.2")
    started = []
    monkeypatch.setattr(os, "execv", lambda path, command: started.append(command))
    serve.main([str(tiny.BASE_MODEL), "--port", "9000", "--", "--max-tokens", "7"])
    expected = ["-m", "mlx_lm", "server", f"--model={tiny.BASE_MODEL}", "--host=127.0.0.1", "--port=9000", "--max-tokens", "7"]
    assert started == [[sys.executable, *expected]] and "mlx-lm's server" in capsys.readouterr().err


def test_what_cannot_be_served_is_told(tmp_path, monkeypatch):
    need("mlx_lm", "pip install mlx-lm==0.32.2")
    (tmp_path / "model.npz").write_bytes(b"")
    for path, message in ((tmp_path, "no config.json"), (tmp_path / "model.npz", "is a file")):
        with pytest.raises(ModelError, match=message):
            serve.server_command(str(path), "127.0.0.1", 1, [])
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(MissingDependencyError, match=r"fulltune_nb\[mlx-lm\]"):
        serve.server_command(str(tiny.BASE_MODEL), "127.0.0.1", 1, [])


@pytest.mark.long
def test_a_served_model_answers_as_in_memory(tmp_path):
    need("mlx_lm", "pip install mlx-lm==0.32.2")
    messages = [{"role": "user", "content": "How many cities are there?"}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fulltune_nb.serve", str(tiny.BASE_MODEL), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        body = json.dumps({"messages": messages, "max_tokens": 12, "temperature": 0.0}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"})
        for _ in range(120):
            try:
                answer = json.load(urllib.request.urlopen(request, timeout=60))
                break
            except OSError:
                time.sleep(0.5)
        assert answer["choices"][0]["message"]["content"] == ft.load_model(tiny.BASE_MODEL).chat(messages, max_tokens=12)
    finally:
        process.terminate()
        process.wait()
