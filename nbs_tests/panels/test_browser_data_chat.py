"""The data panel and the chat panel in a real JupyterLab in a real browser; see `nbs_tests/test_browser.py`."""

from __future__ import annotations

import re

import nbformat
import pytest

from nbs_tests.jupyterlab import Lab, axe_core, write_notebook
from nbs_tests.panels.kernels import SETUP
from nbs_tests.panels.test_browser_chart import shown
from nbs_tests.test_browser import FINDINGS, browser, folder, lab, look, on_page, server  # noqa: F401  fixtures

pytestmark = pytest.mark.long

HOSTILE = [
    "<img src=x onerror=\"alert('one')\"></pre><script>alert('two')</script>",
    "</details></div></pre><iframe srcdoc='<script>parent.alert(3)</script>'></iframe>",
    "\x1b[31mred\x1b[0m \u202eabc\u202c",
    "$5 and $10, $$x^2$$ \\(y\\)",
]
MODELS = """
lm, other = make_trainer().lm, make_trainer().lm
H = {hostile!r}
class Parrot:
    "Says what it is told to."
    def __init__(self):
        self.tokenizer, self.model = tokenizer, object()
    def stream_chat(self, messages, **settings):
        yield from (text + chr(10) for text in H)
        yield "x" * 1_000_000
        raise ValueError(H[0])
"""
DATA = """
rows = tiny.text_to_sql(train=40, valid=5, test=5)
rows["test"][0] = rows["train"][5]
rows["train"][1]["completion"] += tokenizer.eos_token
data = ft.load_data(rows, tokenizer, mask_prompt=True, max_seq_length=56)
panel = ft.DataPanel(data)
panel
"""
HOSTILE_DATA = """
rows = [{"prompt": h, "completion": h, h: h} for h in H] + [{"prompt": "fox " * 250_000, "completion": "b"}]
data = ft.load_data({"train": rows, "test": rows[:1]}, tokenizer, mask_prompt=True)
data.source = H[0]
panel = ft.DataPanel(data)
panel
"""
PANEL, CODE = 2, 3


@pytest.fixture
def open_panel(lab, folder, request):  # noqa: F811
    """Opens and runs a notebook that makes a panel in its third cell."""

    def run(panel: str) -> Lab:
        lab.path = folder / f"{request.node.name}.ipynb"
        write_notebook(lab.path, [SETUP, MODELS.format(hostile=HOSTILE), panel, "0", "0"])
        lab.open(lab.path.name)
        lab.run_all()
        lab.output(PANEL).locator(".jupyter-widgets").first.wait_for(timeout=30_000)
        return lab

    yield run
    lab.command("kernelmenu:shutdown")


def button(lab: Lab, name: str):  # noqa: F811
    return lab.output(PANEL).get_by_role("button", name=name)  # not exactly: the icon is part of the name


def tab(lab: Lab, name: str) -> None:  # noqa: F811
    lab.output(PANEL).get_by_role("tab", name=name).click()


def says(lab: Lab, text: str, seconds: float = 20) -> None:  # noqa: F811
    """Waits until the panel shows a text."""
    lab.output(PANEL).get_by_text(text).first.wait_for(timeout=seconds * 1000)


def ask(lab: Lab, prompt: str) -> None:  # noqa: F811
    field = lab.output(PANEL).get_by_label("prompt", exact=True).first
    field.fill(prompt)
    field.press("Enter")


def assert_nothing_broke_out(lab: Lab) -> None:  # noqa: F811
    foreign = lab.page.locator(".jp-OutputArea").locator("script, iframe, img[src='x'], mjx-container, .jupyter-widgets-error-widget")
    assert foreign.count() == 0


def reopen_without_kernel(lab: Lab, text: str) -> None:  # noqa: F811
    """Once the record, which is hidden behind the panel, says what it should."""
    lab.output(PANEL).locator("[class$='-record']").filter(has_text=text).first.wait_for(state="attached")
    lab.save()
    lab.page.wait_for_timeout(500)
    lab.command("kernelmenu:shutdown")
    lab.page.goto("about:blank")
    lab.open(lab.path.name, kernel=False)


def test_rows_can_be_browsed_searched_and_filtered(open_panel):
    lab = open_panel(DATA)  # noqa: F811
    look(lab, "data-panel")
    button(lab, "Next").click()
    says(lab, "train:2 · 40 rows in train")
    says(lab, "EOS stands twice in a row")
    assert lab.result(CODE, "print(panel.index)") == "1"
    search = lab.output(PANEL).get_by_label("search")
    search.fill("select max")
    search.press("Enter")
    says(lab, "hit 1 of")
    found = int(lab.result(CODE, "print(len(panel.rows))"))
    assert found == int(lab.result(CODE, "print(sum('select max' in e.text.lower() for e in data.train))")) > 0
    lab.output(PANEL).get_by_label("split").select_option("test")
    says(lab, "rows in test")
    search.fill("")
    search.press("Enter")
    lab.output(PANEL).get_by_label("rows").select_option("also in another split")
    says(lab, "The same text stands in train:6")
    tab(lab, "Lengths")
    image = lab.output(PANEL).locator(".fulltune-styled img")
    image.wait_for(timeout=10_000)
    lab.page.wait_for_timeout(1500)
    assert image.evaluate("image => image.naturalWidth") == 1280
    look(lab, "data-panel-lengths")
    assert on_page(image) == "none"
    lab.theme("JupyterLab Dark")
    assert on_page(image).startswith("invert(0.93)")
    lab.theme("JupyterLab Light")
    tab(lab, "Checks")
    says(lab, "train:6 = test:1")
    look(lab, "data-panel-checks")
    assert_nothing_broke_out(lab)


def test_a_chat_streams_answers_to_what_is_typed(open_panel):
    from playwright.sync_api import expect

    lab = open_panel("panel = ft.ChatPanel(lm, max_tokens=150)\npanel")  # noqa: F811
    lab.result(CODE, "seen = set(); panel.controls.live.observe(lambda change: seen.add(change.new), 'value')")
    ask(lab, "$5 and $10 for ships")
    says(lab, "Answering")
    lab.page.wait_for_function("() => !document.body.innerText.includes('Answering')", timeout=60_000)
    says(lab, "$5 and $10 for ships")
    assert int(lab.result(CODE, "print(len(seen))")) > 3
    assert lab.result(CODE, "print(panel.conversation.turns[0].answers[0].state)") == "done"
    field = lab.output(PANEL).get_by_label("prompt", exact=True)
    expect(field).to_have_value("")
    field.fill("pasted\nlines")
    field.press("Shift+Enter")
    field.press_sequentially("and more")
    button(lab, "Send").click()
    expect(field).to_have_value("")
    lab.page.wait_for_function("() => !document.body.innerText.includes('Answering')", timeout=60_000)
    assert lab.result(CODE, "print(repr(panel.conversation.turns[1].prompt))") == repr("pasted\nlines\nand more")
    assert lab.result(CODE, "print(len(panel.conversation.turns))") == "2"  # Shift+Enter ran no cell and sent nothing
    lab.result(CODE, "panel.controls.max_tokens.value = 100_000")
    ask(lab, "again")
    says(lab, "Answering")
    field.fill("typed meanwhile")
    field.press("Enter")
    says(lab, "An answer is being written")
    expect(field).to_have_value("typed meanwhile")
    button(lab, "Stop").click()
    says(lab, "stopped before its end")
    button(lab, "Transcript").click()
    transcript = lab.output(PANEL).get_by_label("transcript")
    begin = re.compile(re.escape("You (asked alone):\n$5 and $10 for ships"))
    expect(transcript).to_have_value(begin)  # once the kernel has answered the click
    button(lab, "Transcript").click()
    assert_nothing_broke_out(lab)
    look(lab, "chat-panel")
    reopen_without_kernel(lab, "again")
    lab.output(PANEL).locator("table").get_by_text("$5 and $10 for ships").wait_for(timeout=20_000)


def test_a_prompt_of_12000_tokens_can_be_stopped_while_it_is_read(open_panel):
    lab = open_panel("panel = ft.ChatPanel(ft.load_model(tiny.BASE_MODEL), max_tokens=20)\npanel")  # noqa: F811
    ask(lab, "the quick fox has seen " * 1090)
    says(lab, "reading the prompt", seconds=60)
    look(lab, "chat-panel-reading")
    button(lab, "Stop").click()
    says(lab, "stopped before its end", seconds=10)
    says(lab, "but the model was made for 1,024")


def test_two_models_are_compared_and_the_record_is_there_without_a_kernel(open_panel):
    lab = open_panel(  # noqa: F811
        "base = ft.load_model(tiny.BASE_MODEL)\npanel = ft.ChatPanel(lm, base, names=['random weights', 'tiny base'], max_tokens=24)\npanel"
    )
    assert lab.output(PANEL).locator("table").count() == 1 or not lab.output(PANEL).get_by_text("nothing said yet").is_visible()
    lab.result(CODE, "panel.send('the quick fox'); await panel.wait()")
    for name in ("random weights", "tiny base"):
        says(lab, name)
    record = lab.output(PANEL).get_by_text("Conversation", exact=True)
    assert record.count() == 1 and not record.is_visible()  # while the panel itself is there
    look(lab, "chat-panel-compare")
    answers = lab.result(CODE, "print(*(a.text.strip()[:8] for a in panel.conversation.turns[0].answers), sep='|')").split("|")
    reopen_without_kernel(lab, "the quick fox")
    lab.output(PANEL).get_by_text("Conversation", exact=True).wait_for(timeout=20_000)
    text = lab.output(PANEL).inner_text()
    assert "the quick fox" in text and all(answer in text for answer in answers)
    saved = nbformat.read(lab.path, as_version=4)
    assert any("the quick fox" in output.get("data", {}).get("text/html", "") for output in saved.cells[PANEL].outputs)


def test_a_chat_while_training_says_so_and_training_goes_on(open_panel):
    lab = open_panel("trainer = make_trainer(); panel = ft.ChatPanel(trainer.lm, max_tokens=40)\npanel")  # noqa: F811
    lab.result(CODE, "training = TrainPanel(trainer); training.start()")
    ask(lab, "the quick fox")
    says(lab, "is being trained")
    says(lab, "training waited for the answer", seconds=60)
    first = int(lab.result(CODE, "print(trainer.step_count)"))
    lab.page.wait_for_timeout(1000)
    assert int(lab.result(CODE, "print(trainer.step_count)")) > first
    lab.result(CODE, "training.pause(); await training.wait()")


def test_hostile_rows_stay_text(open_panel):
    lab = open_panel(HOSTILE_DATA)  # noqa: F811
    for row in range(5):
        says(lab, f"train:{row + 1} · 5 rows")
        lab.output(PANEL).locator("summary").first.click()
        lab.page.wait_for_timeout(300)
        assert_nothing_broke_out(lab)
        if row < 4:
            button(lab, "Next").click()
    search = lab.output(PANEL).get_by_label("search")
    search.fill(HOSTILE[0])
    search.press("Enter")
    says(lab, "hit 1 of 1")
    for name in ("Checks", "Lengths", "Rows"):
        tab(lab, name)
        lab.page.wait_for_timeout(700)
        assert_nothing_broke_out(lab)
    assert "<img src=x onerror=" in lab.output(PANEL).inner_text()
    reopen_without_kernel(lab, "Duplicates")
    lab.output(PANEL).get_by_text("Duplicates").wait_for(timeout=20_000)
    assert_nothing_broke_out(lab)


def test_hostile_prompts_answers_names_and_errors_stay_text(open_panel):
    lab = open_panel("panel = ft.ChatPanel(Parrot(), names=[H[0]])\npanel")  # noqa: F811
    ask(lab, HOSTILE[0] + HOSTILE[3])
    says(lab, "ValueError", seconds=60)  # after a million characters
    text = lab.output(PANEL).inner_text()
    for said in ("<img src=x onerror=", "$5 and $10, $$x^2$$", "\\x1b[31mred", "\\u202eabc", "<iframe srcdoc"):
        assert said in text
    assert len(text) < 60_000  # of the million characters
    assert_nothing_broke_out(lab)
    look(lab, "chat-panel-hostile")
    reopen_without_kernel(lab, "ValueError")
    lab.output(PANEL).get_by_text("ValueError").first.wait_for(timeout=20_000)
    assert_nothing_broke_out(lab)


ELSEWHERE = [
    SETUP,
    DATA,
    "chat = ft.ChatPanel(ft.load_model(tiny.BASE_MODEL), max_tokens=20)\nchat",
]


@pytest.mark.ci
@pytest.mark.parametrize("front_end", ["notebook", "voila"])
def test_data_and_chat_in_other_front_ends(front_end, browser, tmp_path):  # noqa: F811
    with shown(front_end, browser, tmp_path, ELSEWHERE) as (page, make_dark):
        panels = page.locator(".fulltune-styled")
        panels.nth(1).wait_for()
        rows_are_browsed(panels.nth(0))
        prompts_are_answered(panels.nth(1))
        records = page.locator("[class^='fulltune-'][class$='-record']")
        assert records.count() == 2 and not any(record.is_visible() for record in records.all())
        for dark in (False, True):
            if dark:
                make_dark()
                panels.nth(1).wait_for()
            page.evaluate(axe_core())
            assert page.evaluate(FINDINGS) == []
        for panel in panels.all():
            for width in (360, 250):  # the latter is what JupyterLab leaves of a window of the former
                panel.evaluate("(panel, width) => { panel.style.width = `${width}px`; }", width)
                page.wait_for_timeout(300)
                assert panel.evaluate("panel => panel.scrollWidth") <= width


def rows_are_browsed(panel) -> None:
    """Buttons, search, filter and tabs of a data panel of `DATA` do what they say."""
    panel.get_by_role("button", name="Next").click()
    panel.get_by_text("train:2 · 40 rows in train").wait_for()
    search = panel.get_by_label("search")
    search.fill("select max")
    search.press("Enter")
    panel.get_by_text("hit 1 of").first.wait_for()
    panel.get_by_role("button", name="All rows").click()
    panel.get_by_label("rows").select_option("also in another split")
    panel.get_by_text("The same text stands in test:1").wait_for()
    panel.get_by_role("tab", name="Lengths").click()
    image = panel.locator("img")
    image.wait_for()
    assert image.evaluate("image => image.naturalWidth") == 1280
    panel.get_by_role("tab", name="Checks").click()
    panel.get_by_text("train:6 = test:1").wait_for()
    panel.get_by_role("tab", name="Rows").click()


def prompts_are_answered(panel) -> None:
    """Enter sends, an answer comes, and a long prompt can be stopped while it is read."""
    field = panel.get_by_label("prompt", exact=True).first
    field.fill("the quick fox")
    field.press("Enter")
    panel.get_by_text("(asked as a conversation)").first.wait_for()
    panel.get_by_role("button", name="Regenerate").and_(panel.page.locator(":enabled")).wait_for()  # when the answer is whole
    assert len(panel.locator("pre").nth(1).inner_text().split()) > 3 and "⚠" not in panel.inner_text()
    field.fill("the quick fox has seen " * 1090)
    field.press("Enter")
    panel.get_by_text("reading the prompt").first.wait_for()
    panel.get_by_role("button", name="Stop").click()
    panel.get_by_text("stopped before its end").first.wait_for()
