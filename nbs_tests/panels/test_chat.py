"""The chat panel without a front end: conversations, streaming, stopping, comparing, and chatting while training."""

from __future__ import annotations

import asyncio
import gc
import re
import shutil
import signal
import subprocess
import sys
import threading
import weakref

import ipywidgets as widgets
import pytest
from ipywidgets.widgets.widget import _instances

import fulltune_nb as ft
from fulltune_nb.errors import ConfigError, GenerationError
from fulltune_nb.models import generation
from fulltune_nb.panels import chat as module
from fulltune_nb.panels.chat import ChatPanel
from fulltune_nb.panels.conversation import TURNS_SHOWN, Answer, Conversation, Turn
from fulltune_nb.panels.loop import loop_of
from fulltune_nb.panels.prompt import PromptField
from nbs_tests.data.test_lens import ATTACK, Page
from nbs_tests.panels.conftest import in_loop, until
from nbs_tests.panels.test_data import all_widgets


@pytest.fixture
def lm(make_lm):
    return make_lm()


def user(*prompts):
    return [{"role": "user", "content": prompt} for prompt in prompts]


# -- asking and answering ---------------------------------------------------------------------------------------------


def test_in_plain_python_the_answer_is_there_when_send_returns(lm, chat_of):
    panel = chat_of(lm)
    panel.send("the quick fox")
    assert panel.conversation.turns[0].answers[0].text == lm.chat(user("the quick fox"), max_tokens=12)
    assert panel.conversation.turns[0].answers[0].state == "done" and not panel.busy


def test_in_an_event_loop_it_is_written_piece_by_piece_while_other_code_runs(lm, chat_of):
    seen = []

    async def main():
        panel = chat_of(lm)
        panel.send("the quick fox")
        assert panel.busy and panel.conversation.turns[0].answers[0].text == ""
        while panel.busy:
            seen.append(panel.conversation.turns[0].answers[0].text)
            await asyncio.sleep(0)
        await panel.wait()
        return panel.conversation.turns[0].answers[0]

    answer = asyncio.run(main())
    assert answer.text == lm.chat(user("the quick fox"), max_tokens=12) and answer.state == "done"
    lengths = sorted({len(text) for text in seen})
    assert len(lengths) > 3 and all(answer.text.startswith(text) for text in seen)


def test_the_conversation_goes_on_with_its_system_prompt(lm, chat_of, monkeypatch):
    panel, asked = chat_of(lm, system="Be brief."), []
    stream = lm.stream_chat
    monkeypatch.setattr(lm, "stream_chat", lambda messages, **settings: asked.append((messages, settings)) or stream(messages, **settings))
    panel.send("one")
    panel.send("two")
    first = panel.conversation.turns[0].answers[0].text
    messages, settings = asked[1]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in messages] == ["Be brief.", "one", first, "two"]
    assert settings == {"max_tokens": 12, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
    panel.controls.system.value, panel.controls.temperature.value, panel.controls.top_p.value = "", 0.7, 0.9
    panel.regenerate()
    messages, settings = asked[2]
    assert [m["content"] for m in messages] == ["one", first, "two"] and settings["temperature"] == 0.7 and settings["top_p"] == 0.9


def test_prompts_sent_meanwhile_are_answered_in_order(lm, chat_of):
    async def main():
        panel = chat_of(lm)
        for prompt in ("one", "two", "three"):
            panel.send(prompt)
        await panel.wait()
        return panel.conversation.turns

    turns = asyncio.run(main())
    assert [turn.prompt for turn in turns] == ["one", "two", "three"]
    messages = user("one") + [{"role": "assistant", "content": turns[0].answers[0].text}] + user("two")
    assert turns[1].answers[0].text == lm.chat(messages, max_tokens=12)


def test_stop_keeps_what_is_there_and_leaves_the_rest_unasked(lm, chat_of):
    async def main():
        panel = chat_of(lm, max_tokens=400)
        panel.send("one")
        panel.send("two")
        await until(lambda: panel.conversation.turns[0].answers[0].text)
        panel.stop()
        await panel.wait()
        return panel

    panel = asyncio.run(main())
    first, second = (turn.answers[0] for turn in panel.conversation.turns)
    assert first.state == second.state == "stopped" and first.text and not second.text
    assert len(first.text) < len(lm.chat(user("one"), max_tokens=400))
    assert "stopped before its end" in panel.controls.log.value and not panel.controls.live.value


def test_regenerate_answers_the_last_prompt_anew(lm, chat_of):
    panel = chat_of(lm)
    with pytest.raises(GenerationError, match="Send a prompt first"):
        panel.regenerate()
    panel.send("one")
    before = panel.conversation.turns[0].answers[0]
    panel.regenerate()
    after = panel.conversation.turns[0].answers[0]
    assert after is not before and after.text == before.text and len(panel.conversation.turns) == 1


@in_loop
async def test_clear_forgets_and_ends_what_is_being_written(lm, chat_of):
    panel = chat_of(lm, max_tokens=2000)
    panel.send("one")
    await until(lambda: panel.conversation.turns[0].answers[0].text)
    panel.clear()
    await asyncio.wait_for(panel.wait(), 10)
    assert panel.conversation.turns == [] and panel.controls.log.value == panel.controls.live.value == ""
    panel.send("two")
    panel.stop()
    await panel.wait()
    assert [turn.prompt for turn in panel.conversation.turns] == ["two"]


def test_prompts_without_a_word_are_refused(lm, chat_of):
    for prompt in ("", "  \n", None, 3):
        with pytest.raises(GenerationError, match="at least one word"):
            chat_of(lm).send(prompt)


# -- two models -------------------------------------------------------------------------------------------------------


def test_two_models_answer_one_prompt_side_by_side(make_lm, chat_of):
    base, tuned = make_lm(), make_lm(hidden_size=16)
    seen = []

    async def main():
        panel = chat_of(base, tuned)
        panel.send("the quick fox")
        while panel.busy:
            seen.append(tuple(len(answer.text) for answer in panel.conversation.turns[0].answers))
            await asyncio.sleep(0)
        return panel

    panel = asyncio.run(main())
    answers = panel.conversation.turns[0].answers
    for lm, answer in zip((base, tuned), answers, strict=True):
        assert answer.text == lm.chat(user("the quick fox"), max_tokens=12) and answer.state == "done"
    assert any(0 < a < len(answers[0].text) and 0 < b < len(answers[1].text) for a, b in seen)  # both were under way at a time
    html = panel.controls.log.value
    assert html.index("<b>Base</b>") < html.index("<b>Tuned</b>")


def test_each_model_reads_its_own_answers(make_lm, chat_of):
    panel = chat_of(make_lm(), make_lm(hidden_size=16))
    panel.send("one")
    turn = Turn("two", [Answer(), Answer()])
    panel.conversation.turns.append(turn)
    for which in (0, 1):
        assert panel.conversation.messages(which, turn)[1]["content"] == panel.conversation.turns[0].answers[which].text


def test_one_models_error_leaves_the_other_its_answer(make_lm, chat_of, monkeypatch):
    base, tuned = make_lm(), make_lm(hidden_size=16)

    def broken(messages, **settings):
        yield "It is"
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(tuned, "stream_chat", broken)

    async def main():
        panel = chat_of(base, tuned)
        panel.send("one")
        with pytest.raises(ZeroDivisionError):
            await panel.wait()
        return panel

    panel = asyncio.run(main())
    first, second = panel.conversation.turns[0].answers
    assert first.state == "done" and first.text
    assert second.state == "failed" and second.text == "It is" and "ZeroDivisionError: oh" in second.problem
    assert "role=\"alert\"" in panel.controls.log.value


def test_the_same_model_twice_and_things_that_are_no_models_are_refused(lm, make_trainer):
    with pytest.raises(ConfigError, match="same model.*load the base anew"):
        ChatPanel(lm, lm)
    with pytest.raises(ConfigError, match="Pass its .lm"):
        ChatPanel(make_trainer())
    with pytest.raises(ConfigError, match="2 names"):
        ChatPanel(lm, make_trainer().lm, names=["one"])
    with pytest.raises(GenerationError, match="temperature"):
        ChatPanel(lm, temperature=-1)


# -- while training ---------------------------------------------------------------------------------------------------


def test_an_answer_during_training_comes_from_the_weights_of_one_step(make_trainer, chat_of):
    trainer = make_trainer(iters=400, steps_per_eval=1000)
    steps = set()

    async def main():
        panel, loop = chat_of(trainer.lm), loop_of(trainer)
        loop.start()
        await until(lambda: trainer.step_count >= 3)
        panel.send("the quick fox")
        answer = panel.conversation.turns[0].answers[0]
        await until(lambda: answer.state == "writing")
        assert "is being trained" in panel.controls.status.value
        while answer.open:
            steps.add(trainer.step_count)
            await asyncio.sleep(0)
        await panel.wait()
        assert loop.running
        (step,) = steps
        await until(lambda: trainer.step_count > step + 1)  # it goes on
        loop.pause()
        await loop.wait()
        return panel

    panel = asyncio.run(main())
    (step,) = steps
    turn = panel.conversation.turns[0]
    assert f"weights of step {step}" in turn.note
    twin = make_trainer(iters=400, steps_per_eval=1000)
    list(twin.steps(step))
    assert turn.answers[0].text == twin.lm.chat(user("the quick fox"), max_tokens=12)


def test_training_ends_with_the_same_losses_as_without_a_chat(make_trainer, chat_of):
    plain, chatted = make_trainer(iters=12), make_trainer(iters=12)
    plain.run()

    async def main():
        panel = chat_of(chatted.lm)
        loop_of(chatted).start()
        for prompt in ("one", "two"):
            panel.send(prompt)
        await loop_of(chatted).wait()
        await panel.wait()

    asyncio.run(main())
    assert [r.loss for r in chatted.history.steps] == [r.loss for r in plain.history.steps]


@in_loop
async def test_a_pause_during_an_answer_ends_the_run_at_once_and_the_answer_goes_on(make_trainer, chat_of):
    trainer = make_trainer(iters=400)
    panel, loop = chat_of(trainer.lm, max_tokens=200), loop_of(trainer)
    loop.start()
    panel.send("one")
    answer = panel.conversation.turns[0].answers[0]
    await until(lambda: answer.text)
    loop.pause()
    await asyncio.wait_for(loop.wait(), 10)
    at = trainer.step_count
    assert answer.open
    loop.start()  # waits for the answer before its first step
    await asyncio.sleep(0.02)
    assert answer.open and trainer.step_count == at
    panel.stop()
    await panel.wait()
    await until(lambda: trainer.step_count > at)
    loop.pause()
    await loop.wait()
    assert loop.between_steps == []


@in_loop
async def test_two_panels_on_a_model_in_training_take_turns(make_trainer, chat_of):
    trainer = make_trainer(iters=400)
    one, two = chat_of(trainer.lm), chat_of(trainer.lm)
    loop_of(trainer).start()
    one.send("one")
    two.send("two")
    await asyncio.wait_for(asyncio.gather(one.wait(), two.wait()), 30)
    loop_of(trainer).pause()
    await loop_of(trainer).wait()
    assert all(panel.conversation.turns[0].answers[0].state == "done" for panel in (one, two))


# -- errors -----------------------------------------------------------------------------------------------------------


@in_loop
async def test_an_error_is_shown_with_what_to_do_and_raised_by_wait(lm, chat_of, monkeypatch):
    refused = "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = f"{{% for m in messages %}}{refused}{{{{ m['content'] }}}}{{% endfor %}}"
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    panel = chat_of(lm, system="Be brief.")
    panel.send("one")
    with pytest.raises(GenerationError, match="no system"):
        await panel.wait()
    assert "leave that empty" in panel.controls.log.value and isinstance(panel.error, GenerationError)
    panel.controls.system.value = ""
    panel.regenerate()
    await panel.wait()
    assert panel.conversation.turns[0].answers[0].state == "done" and panel.error is None


def test_a_base_models_borrowed_template_is_told(make_lm, make_tokenizer, chat_of):
    lm = make_lm()
    lm.tokenizer = make_tokenizer()
    assert "has no chat template" in chat_of(lm).controls.status.value


def test_an_interrupt_stops_the_answer_and_wait_returns(lm, chat_of):
    async def main():
        panel = chat_of(lm, max_tokens=2000)
        panel.send("one")
        answer = panel.conversation.turns[0].answers[0]
        await until(lambda: answer.text)
        signal.raise_signal(signal.SIGINT)
        await asyncio.wait_for(panel.wait(), 10)
        assert answer.state == "stopped"

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a kernel does between its cells
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(main())
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        loop.close()
        signal.signal(signal.SIGINT, before)


# -- controls ---------------------------------------------------------------------------------------------------------


def press_enter(panel, text):
    """What the page sends."""
    panel.controls.prompt._handle_custom_msg({"submitted": text}, [])


@in_loop
async def test_enter_sends_and_empties_the_field(lm, chat_of):
    panel, told = chat_of(lm), []
    panel.controls.prompt.send = told.append
    panel.controls.prompt.value = "one\ntwo"  # the cursor left the field before: sent to the kernel, not to the model
    await asyncio.sleep(0.02)
    assert panel.conversation.turns == []
    press_enter(panel, "one\ntwo")
    assert panel.controls.prompt.value == "" and told == [{"taken": "one\ntwo"}]
    await panel.wait()
    for nothing in ("", " \n", None, 3):
        press_enter(panel, nothing)
    await asyncio.sleep(0.02)
    assert [turn.prompt for turn in panel.conversation.turns] == ["one\ntwo"]


def test_the_fields_script_is_a_module_and_writes_texts_as_texts(tmp_path):
    script = str(PromptField._esm)
    assert not any(word in script for word in ("http", "innerHTML", "insertAdjacent", "eval(", "import "))
    (tmp_path / "prompt.mjs").write_text(script, "utf-8")
    if node := shutil.which("node"):
        assert subprocess.run([node, "--check", tmp_path / "prompt.mjs"], capture_output=True).returncode == 0


def off(panel):
    return [getattr(panel.controls, name).disabled for name in ("send", "stop", "regenerate", "clear")]


@in_loop
async def test_buttons_do_what_the_methods_do_and_are_off_when_they_would_do_nothing(lm, chat_of):
    panel = chat_of(lm, max_tokens=500)
    controls = panel.controls
    assert off(panel) == [False, True, True, True]
    controls.prompt.value = "one"
    controls.send.click()
    assert off(panel) == [True, False, True, False]
    press_enter(panel, "two")
    assert "An answer is being written" in controls.status.value and len(panel.conversation.turns) == 1
    await until(lambda: panel.conversation.turns[0].answers[0].text)
    controls.stop.click()
    await panel.wait()
    await asyncio.sleep(0.01)
    assert off(panel) == [False, True, False, False]
    controls.regenerate.click()
    controls.stop.click()
    await panel.wait()
    controls.clear.click()
    assert panel.conversation.turns == []


# -- alone or as a conversation -----------------------------------------------------------------------------------------


def asked_in(panel):
    """What each turn's model read, turn after turn."""
    messages = [panel.conversation.messages(0, turn, panel.controls.system.value) for turn in panel.conversation.turns]
    return [[message["content"] for message in one] for one in messages]


def test_a_prompt_asked_alone_is_answered_as_the_first_and_every_turn_says_how_it_was_asked(lm, chat_of):
    panel = chat_of(lm, alone=True, system="Be brief.")
    panel.send("one")
    panel.send("two")
    assert asked_in(panel) == [["Be brief.", "one"], ["Be brief.", "two"]]
    alone = lm.chat([{"role": "system", "content": "Be brief."}, *user("two")], max_tokens=12)
    assert panel.conversation.turns[1].answers[0].text == alone
    panel.controls.alone.value = False
    panel.send("three")
    assert len(asked_in(panel)[2]) == 6
    for html in (panel.controls.log.value, panel._repr_html_()):
        assert html.count("asked alone") == 2 and html.count("asked as a conversation") == 1
    assert panel.transcript.count("You (asked alone):") == 2 and panel.transcript.count("You:") == 1
    panel.controls.alone.value = True
    panel.regenerate()
    assert asked_in(panel)[2] == ["Be brief.", "three"] and panel.controls.log.value.count("asked alone") == 3


def test_without_a_word_it_is_as_the_training_rows_were(make_lm, make_data, chat_of, tmp_path):
    assert not chat_of(make_lm()).controls.alone.value  # nothing is known

    def turns(count):
        return {"messages": [{"role": role, "content": "the quick fox"} for _ in range(count) for role in ("user", "assistant")]}

    text = [{"text": "the quick fox"}] * 4
    for rows, alone in (([turns(1)] * 4, True), ([turns(1)] * 3 + [turns(2)], False), (text, False)):
        lm = make_lm()
        data = ft.load_data({"train": rows}, lm.tokenizer)
        trainer = ft.Trainer(lm, data, ft.TrainConfig(iters=1, batch_size=2))
        assert chat_of(lm).controls.alone.value is alone
        assert chat_of(make_lm(), lm).controls.alone.value is alone and not chat_of(lm, alone=False).controls.alone.value
        trainer.run()
        again = ft.load_model(lm.save(tmp_path / f"{alone}{rows[0].keys()}"))
        panel = chat_of(again)
        panel.send("one")
        assert panel.controls.alone.value is alone and "(step 1, cut off" in panel.transcript
    with pytest.raises(ConfigError, match="alone: expected True, False or None"):
        ChatPanel(lm, alone="yes")


@pytest.mark.parametrize("text", ["single_turn: true\n", "---\na: b\n---\nsingle_turn: true\n", "---\nsingle_turn: 'true'\n---\n", "\xff"])
def test_a_card_of_others_says_nothing_of_it(make_lm, chat_of, tmp_path, text):
    folder = make_lm().save(tmp_path / "model")
    (folder / "README.md").write_text(text, "utf-8")
    assert not chat_of(ft.load_model(folder)).controls.alone.value


def test_the_step_of_a_trained_model_stands_with_each_answer(make_trainer, chat_of):
    trainer = make_trainer(iters=4)
    panel = chat_of(trainer.lm)
    panel.send("one")
    trainer.run(3)
    panel.send("two")
    assert [turn.answers[0].step for turn in panel.conversation.turns] == [0, 3]
    for text in (panel.controls.log.value, panel.transcript, panel._repr_html_()):
        assert text.count("(step 3, cut off") == 1


# -- long prompts -------------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_read_between_cells_and_says_how_far_and_that_it_is_too_long(lm, chat_of, monkeypatch):
    monkeypatch.setattr(module, "REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(generation, "_FUSED_PREFILL_TOKENS", 512)
    seen = []

    async def main():
        panel = chat_of(lm)
        panel.controls.live.observe(lambda change: seen.append(change.new), "value")
        panel.send("the quick fox " * 600)
        answer = panel.conversation.turns[0].answers[0]
        await until(lambda: answer.reading)
        panel.stop()
        await panel.wait()
        assert answer.state == "stopped" and not answer.text
        panel.send("the quick fox " * 600)
        await panel.wait()
        return panel

    panel = asyncio.run(main())
    assert any(re.search(r"reading the prompt, 512 of [\d,]+ tokens", html) for html in seen)
    assert panel.conversation.turns[1].answers[0].text and "reading the prompt" not in panel.controls.log.value
    for html in (panel.controls.log.value, panel._repr_html_()):
        assert html.count("but the model was made for") == 2


def test_an_answer_that_outgrows_the_context_says_so_while_it_is_written(lm, chat_of, monkeypatch):
    monkeypatch.setattr(module, "REDRAW_SECONDS", 0.0)
    prompt = len(lm.chat_tokens([{"role": "user", "content": "the quick fox"}]))
    monkeypatch.setattr(type(lm), "context_length", prompt + 3)
    monkeypatch.setattr(type(lm), "stop_ids", ())  # else random weights might end it before
    seen = []

    async def main():
        panel = chat_of(lm, max_tokens=6)
        panel.controls.live.observe(lambda change: seen.append(change.new), "value")
        panel.send("the quick fox")
        await panel.wait()
        return panel

    panel = asyncio.run(main())
    answer, words = panel.conversation.turns[0].answers[0], "more tokens together than the model was made for"
    assert sum(words in note for note in answer.notes) == 1
    assert any(words in html and "writing" in html for html in seen) and any(words not in html and "writing" in html for html in seen)
    assert words in panel.controls.log.value and words in panel._repr_html_()


def test_an_answer_that_was_cut_off_says_so(lm, chat_of, monkeypatch):
    monkeypatch.setattr(type(lm), "stop_ids", ())
    panel = chat_of(lm, max_tokens=3)
    panel.send("the quick fox")
    for text in (panel.controls.log.value, panel._repr_html_(), panel.transcript):
        assert "cut off at max tokens: 3" in text
    first = next(lm.stream_chat([{"role": "user", "content": "the quick fox"}], max_tokens=3).steps)
    panel = chat_of(lm, max_tokens=200)
    monkeypatch.setattr(type(lm), "stop_strings", (first,))
    panel.send("the quick fox")
    assert panel.conversation.turns[0].answers[0].told == ""  # it ended by itself


# -- sampling -----------------------------------------------------------------------------------------------------------


def test_a_preset_fills_in_the_numbers_and_is_left_when_they_change(lm, chat_of, monkeypatch):
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    monkeypatch.setattr(lm, "generation_config", own)
    panel = chat_of(lm)
    controls = panel.controls
    assert controls.preset.value == "exact" and "repetition_penalty too" in controls.status.value
    for name, numbers in (("creative", (1.0, 0.95, 0)), ("Model's own", (0.6, 0.9, 20)), ("exact", (0.0, 1.0, 0))):
        controls.preset.value = name
        assert (controls.temperature.value, controls.top_p.value, controls.top_k.value) == numbers and controls.preset.value == name
    controls.top_k.value = 3
    assert controls.preset.value == "the numbers beside"
    monkeypatch.setattr(lm, "generation_config", {**own, "top_p": "high"})
    other = chat_of(lm)
    assert "Model's own" not in other.controls.preset.options and "top_p: expected" in other.controls.status.value


def test_callbacks_on_another_thread_leave_mlx_to_the_own_one(lm, chat_of, monkeypatch):
    threads, stream = [], lm.stream_chat

    def watched(messages, **settings):
        threads.append(threading.get_ident())
        return stream(messages, **settings)

    monkeypatch.setattr(lm, "stream_chat", watched)

    async def main():
        panel = chat_of(lm)
        panel.controls.prompt.value = "one"
        thread = threading.Thread(target=panel.controls.send.click)
        thread.start()
        thread.join()
        await until(lambda: panel.conversation.turns)
        await panel.wait()
        return panel.conversation.turns[0].answers[0]

    answer = asyncio.run(main())
    monkeypatch.undo()
    assert answer.text == lm.chat(user("one"), max_tokens=12) and threads == [threading.get_ident()]


def test_the_transcript_is_there_to_copy(lm, chat_of):
    panel = chat_of(lm)
    panel.send("one")
    answer = panel.conversation.turns[0].answers[0].text
    assert panel.transcript == f"You:\none\n\nModel (cut off at max tokens: 12):\n{answer}"
    assert panel.controls.transcript.layout.display == "none"
    panel.controls.show_transcript.value = True
    assert panel.controls.transcript.value == panel.transcript and panel.controls.transcript.layout.display is None


def test_every_control_has_a_description_or_a_tooltip(lm, chat_of):
    for widget in all_widgets(chat_of(lm).widget):
        if not isinstance(widget, widgets.Box):
            assert widget.tooltip
            assert getattr(widget, "description", "none") or isinstance(widget, (widgets.HTML, widgets.Textarea))


# -- what is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [ATTACK, "\x1b[31mred\x1b[0m", "$5 and $10 $$x$$", "</pre></div><b>out"])
def test_prompts_and_answers_cannot_bring_markup_into_the_page(lm, chat_of, text, monkeypatch):
    def answer(messages, **settings):
        yield text
        raise GenerationError(text)

    monkeypatch.setattr(lm, "stream_chat", answer)
    panel = chat_of(lm, names=[text])
    panel.send(text)
    panel.notes.append(text)
    panel.refresh()
    for html in (panel.controls.log.value, panel.controls.status.value, panel._repr_html_()):
        page = Page(html.replace("<br>", ""))
        assert not page.tags & {"img", "script"} and "\x1b" not in html and "\u202e" not in html
        assert "mathjax_ignore" in html


def test_long_answers_and_long_conversations_are_shown_within_bounds():
    turns = [Turn("p" * 10**6, [Answer("a" * 10**6, "done")])] + [Turn("q", [Answer("b", "done")]) for _ in range(500)]
    conversation = Conversation(("Model",), turns)
    assert len(conversation.bubbles(turns[:1])) < 50_000
    assert len(conversation.to_html()) < 60_000 and f"the last {TURNS_SHOWN} of 501 turns" in conversation.to_html()


def test_the_page_is_redrawn_no_more_often_than_it_should(lm, chat_of, monkeypatch):
    monkeypatch.setattr(module, "REDRAW_SECONDS", 1000.0)
    drawn = []

    async def main():
        panel = chat_of(lm, max_tokens=100)
        panel.controls.live.observe(lambda change: drawn.append(change.new), "value")
        panel.send("one")
        await panel.wait()
        await asyncio.sleep(0.01)
        assert panel.conversation.turns[0].answers[0].text and "one" in panel.controls.log.value

    asyncio.run(main())
    assert len(drawn) <= 4


# -- closing ----------------------------------------------------------------------------------------------------------


def test_closing_ends_the_answer_and_leaves_nothing(lm):
    before = set(_instances)

    async def main():
        panel = ChatPanel(lm, max_tokens=5000)
        panel.send("one")
        await until(lambda: panel.conversation.turns[0].answers[0].text)
        panel.close()
        panel.close()
        await until(lambda: not panel.busy)
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
        with pytest.raises(GenerationError, match="closed"):
            panel.send("two")
        return panel

    panel = asyncio.run(main())
    assert set(_instances) <= before and panel.conversation.turns[0].answers[0].state == "stopped"


def test_a_closed_panel_holds_no_model(make_lm, monkeypatch):
    lm = make_lm()
    panel, gone = ChatPanel(lm, max_tokens=2), weakref.ref(lm)
    panel.send("one")
    panel.controls.max_tokens.value = 1
    monkeypatch.setattr(lm.model.__class__, "head", lambda *_: 1 / 0)
    panel.send("two")
    assert isinstance(panel.error, ZeroDivisionError)
    monkeypatch.undo()
    panel.close()
    del lm
    gc.collect()
    assert gone() is None and panel.conversation.turns


def test_repr_is_one_line_and_importing_needs_no_kernel(lm, chat_of):
    assert repr(chat_of(lm)) == "ChatPanel(Model, 0 turns)" and "nothing said yet" in chat_of(lm)._repr_html_()
    code = "import sys, fulltune_nb.panels.chat; print('IPython.display' in sys.modules and sys.modules['IPython'].get_ipython())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() in ("None", "False")
