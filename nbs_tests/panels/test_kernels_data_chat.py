"""The data panel and the chat panel in real kernels, without a browser; see `test_kernels`."""

from __future__ import annotations

import json
import time

import pytest

from nbs_tests.panels.kernels import until

pytestmark = pytest.mark.long


def ids(kernel, names):
    """Names of `panel`'s controls to the widgets' ids."""
    return kernel.value(f"{{name: getattr({names[0]}, name).model_id for name in {names[1]!r}}}")


@pytest.fixture
def data_panel(kernel):
    kernel.run("trainer = make_trainer(); panel = ft.DataPanel(trainer.data); panel", cell_id="the data panel's")
    yield ids(kernel, ("panel.controls", ("next", "previous", "search", "split", "filter", "index")))
    kernel.run("panel.close()")


@pytest.fixture
def chat(kernel):
    kernel.run("trainer = make_trainer(); panel = ft.ChatPanel(trainer.lm, max_tokens=24); panel", cell_id="the chat's")
    yield ids(kernel, ("panel.controls", ("prompt", "send", "stop", "regenerate", "clear", "max_tokens")))
    kernel.run("panel.close(); await asyncio.sleep(0.05)")


def ask(kernel, chat, text):
    kernel.enter(chat["prompt"], value=text)
    kernel.press(chat["send"])


def answers(kernel):
    return kernel.value("[[a.state, a.text] for turn in panel.conversation.turns for a in turn.answers]")


def test_rows_are_browsed_and_searched_while_training_goes_on(kernel, data_panel, way):
    kernel.run("training = TrainPanel(trainer); training.start()")
    kernel.press(data_panel["next"])
    until(lambda: kernel.value("panel.index") == 1)
    kernel.enter(data_panel["index"], value=7)
    until(lambda: kernel.value("panel.index") == 7)
    kernel.enter(data_panel["search"], value="the quick")
    until(lambda: kernel.value("panel.query") == "the quick")
    found = kernel.value("[i for i, example in enumerate(trainer.data.train) if 'the quick' in example.text]")
    assert kernel.value("list(map(int, panel.rows))") == found
    kernel.enter(data_panel["split"], index=1)
    until(lambda: kernel.value("panel.split") == "valid")
    taken = kernel.value("trainer.step_count")
    until(lambda: kernel.value("trainer.step_count") > taken)
    kernel.run("training.pause(); await training.wait(); training.close()")
    kernel.run("trainer.step()")  # MLX works on the main thread as before


def test_what_is_typed_is_answered_and_streamed(kernel, chat, way):
    kernel.run("seen = set(); panel.controls.live.observe(lambda change: seen.add(change.new), 'value')")
    kernel.enter(chat["max_tokens"], value=60)
    ask(kernel, chat, "the quick")
    until(lambda: kernel.value("len(panel.conversation.turns) == 1 and not panel.busy"))
    [[state, text]] = answers(kernel)
    assert state == "done" and text and kernel.value("len(seen)") > 2
    assert kernel.value("panel.controls.prompt.value") == ""
    kernel.run("seen.clear()")
    kernel.press(chat["regenerate"])
    until(lambda: kernel.value("len(seen) > 2 and not panel.busy"))
    assert answers(kernel) == [["done", text]]  # temperature 0
    kernel.press(chat["clear"])
    until(lambda: kernel.value("len(panel.conversation.turns)") == 0)
    kernel.run("trainer.step()")


def test_stop_ends_an_answer_and_keeps_its_text(kernel, chat, way):
    kernel.enter(chat["max_tokens"], value=100_000)
    kernel.run("trainer.lm.stream_chat = lambda *_, **__: ('word ' for _ in iter(int, 1))")  # no end
    ask(kernel, chat, "go on")
    until(lambda: kernel.value("panel.busy and len(panel.conversation.turns[0].answers[0].text)") > 10)
    kernel.press(chat["stop"])
    until(lambda: not kernel.value("panel.busy"))
    [[state, text]] = answers(kernel)
    assert state == "stopped" and text.startswith("word ")


def test_an_interrupt_ends_the_answer_and_is_no_error(kernel, chat):
    kernel.run("trainer.lm.stream_chat = lambda *_, **__: ('word ' for _ in iter(int, 1))")
    waiting = kernel.send("panel.send('go on'); await panel.wait(); print('over')")
    time.sleep(0.5)
    kernel.interrupt()
    cell = kernel.outcome(waiting)
    assert cell.status == "ok" and "over" in cell.text, cell.error
    assert answers(kernel)[0][0] == "stopped"


def test_an_answer_while_training_holds_it_and_the_losses_stay_the_same(kernel, chat, way):
    kernel.run("training = TrainPanel(trainer); training.start()")
    until(lambda: kernel.value("trainer.step_count") > 3)
    ask(kernel, chat, "the quick")
    until(lambda: kernel.value("len(panel.conversation.turns) == 1 and not panel.busy"))
    assert "training waited for the answer" in kernel.value("panel.conversation.turns[0].note")
    taken = kernel.value("trainer.step_count")
    until(lambda: kernel.value("trainer.step_count") > taken)
    kernel.run("training.pause(); await training.wait(); training.close()")
    kernel.run("straight = make_trainer(); straight.run(trainer.step_count)")
    assert kernel.value("[r.loss for r in straight.history.steps] == [r.loss for r in trainer.history.steps]")


def test_two_models_answer_and_an_error_is_shown_and_raised(kernel, chat):
    kernel.run("other = make_trainer().lm; two = ft.ChatPanel(trainer.lm, other, max_tokens=8); two.send('the quick'); await two.wait()")
    assert kernel.value("[a.state for a in two.conversation.turns[0].answers]") == ["done", "done"]
    kernel.run("def fail(*_, **__): raise ValueError('no such <b>answer</b>')\nother.stream_chat = fail")
    cell = kernel.outcome(kernel.send("two.send('again'); await two.wait()"))
    assert cell.status == "error" and "no such <b>answer</b>" in cell.error
    assert kernel.value("[a.state for a in two.conversation.turns[1].answers]") == ["done", "failed"]
    assert "no such &lt;b&gt;answer" in json.dumps(kernel.value("two.controls.log.value"))
    kernel.run("two.close()")
    assert kernel.value("[task.get_name() for task in asyncio.all_tasks() if 'fulltune' in task.get_name()]") == []
