"""The data panel without a front end: its methods, its controls, and what it shows."""

from __future__ import annotations

import gc
import html
import io
import re
import threading
from base64 import b64decode

import ipywidgets as widgets
import numpy as np
import pytest
from ipywidgets.widgets.widget import _instances
from PIL import Image

from fulltune_nb.data import load_data
from fulltune_nb.data import look as search
from fulltune_nb.errors import ConfigError, DataError
from fulltune_nb.html import on_dark
from fulltune_nb.panels.data import FILTERS, DataPanel, LengthPlot, lengths_text, whole_lengths
from nbs_tests.data.test_lens import ATTACK, Page

PAIRS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(6)]
LONG = {"prompt": "What is it?", "completion": "fox " * 60}


@pytest.fixture
def data(tokenizer):
    rows = {"train": [*PAIRS, LONG, PAIRS[0]], "valid": [LONG], "test": [PAIRS[5], {"prompt": "And?", "completion": "Nothing."}]}
    return load_data(rows, tokenizer, mask_prompt=True, max_seq_length=40)


@pytest.fixture
def panel(data):
    panel = DataPanel(data)
    yield panel
    panel.close()


def all_widgets(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from all_widgets(child)


def test_the_examples_can_be_gone_through(panel, data):
    assert panel.example is data.train[0]
    panel.previous()
    assert panel.index == 0
    for expected in [*range(1, 8), 7]:
        panel.next()
        assert panel.index == panel.controls.index.value == expected
    panel.show(3)
    assert panel.example is data.train[3] and data.train[3].source in panel.controls.status.value
    panel.show(split="test")
    assert panel.example is data.test[0] and panel.controls.split.value == "test"  # index 3 is not there


def test_controls_do_what_the_methods_do(panel, data):
    panel.controls.next.click()
    panel.controls.next.click()
    panel.controls.previous.click()
    assert panel.index == panel.controls.index.value == 1
    panel.controls.index.value = 4
    assert panel.example is data.train[4]
    panel.controls.search.value = "IT IS 2"
    assert panel.index == 2 and panel.rows.tolist() == [2] and "hit 1 of 1" in panel.controls.status.value
    panel.controls.search.value = ""
    panel.controls.filter.value = "cut off"
    assert panel.index == 6 and panel.rows.tolist() == [6]
    panel.controls.split.value = "valid"
    assert panel.example is data.valid[0]


def test_buttons_stand_still_at_the_ends(panel):
    assert panel.controls.previous.disabled and not panel.controls.next.disabled
    panel.show(7)
    assert panel.controls.next.disabled and not panel.controls.previous.disabled


def test_search_counts_hits_and_shows_the_first(panel):
    assert panel.search("fox") == [6]
    shown = panel.controls.lens.value
    assert panel.index == 6 and "first of 60 in this row" in shown and "<mark><b>fox</b></mark>" in shown
    assert panel.search("no such text") == [] and "0 hits" in panel.status
    assert panel.example is None and "fox" not in panel.controls.lens.value  # a row that has not the text is not shown
    assert panel.search("") == [] and panel.hits is None and len(panel.rows) == 8


def test_a_search_goes_on_in_another_split_and_heeds_the_filter(panel):
    assert panel.search("what is 5") == [5]
    panel.show(split="test")
    assert panel.rows.tolist() == [0]
    panel.show(filter="cut off")
    assert panel.rows.tolist() == []


def test_filter_and_search_that_leave_nothing_say_why_and_how_to_go_on(panel):
    panel.show(filter="cut off")
    panel.search("it is")
    assert panel.example is None and "0 hits for 'it is' among 1 row (cut off), 7 among all 8 rows in train" in panel.status
    assert panel.status in html.unescape(panel.controls.status.value) and not panel.controls.lens.value and panel.controls.next.disabled
    assert html.unescape(panel._repr_html_()).count(panel.status) == 1, "without the widgets too"
    panel.controls.all_rows.click()
    assert (panel.filter, panel.query, panel.rows.tolist()) == ("all", "", list(range(8))) and panel.controls.all_rows.disabled
    assert panel.controls.filter.value == "all" and panel.controls.search.value == ""


def test_a_row_shown_is_one_of_those_gone_through(panel, data):
    panel.show(filter="cut off")
    panel.controls.index.value = 3  # not cut off
    assert panel.example is data.train[3] and panel.filter == "all" and "ended" in panel.status
    panel.next()
    assert panel.index == 4 and "ended" not in panel.status
    panel.show(filter="cut off", split="test")
    assert panel.example is None and "none of 2 rows in test: cut off" in panel.status
    with pytest.raises(DataError, match="not among the rows 'cut off'"):
        panel.show(0, filter="cut off")


def test_a_search_that_had_to_stop_says_so(panel, monkeypatch):
    monkeypatch.setattr(search.search, "__defaults__", (30,))
    panel.search("what")
    assert "others were not looked at" in panel.status


FOUND = dict(zip(FILTERS, [list(range(8)), [6], [], [], [5, 6]], strict=True))


@pytest.mark.parametrize("which, rows", list(FOUND.items()), ids=list(FOUND))
def test_filters_leave_their_rows(panel, which, rows):
    panel.show(filter=which)
    assert panel.rows.tolist() == rows


def test_filter_of_rows_not_trained_on_and_of_warnings(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    panel = DataPanel(load_data({"train": [{"text": "a fox"}, {"text": "<s>a fox"}, {"text": "a dog"}]}, tokenizer, max_seq_length=2))
    panel.show(filter="BOS or EOS warning")
    assert panel.rows.tolist() == [1]
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}")
    panel = DataPanel(load_data({"train": [{"messages": talk}, {"messages": talk[:1]}]}, tokenizer, mask_prompt=True))
    panel.show(filter="not trained on")
    assert panel.rows.tolist() == [1]


def test_rows_in_several_splits_are_told_at_the_row_and_in_the_checks(panel):
    panel.show(5)
    assert "The same text stands in test:1" in panel.controls.lens.value
    panel.show(0)
    assert "The same text" not in panel.controls.lens.value  # within its own split only
    html = panel.checks.to_html()
    for part in ("train in test", "train:6 = test:1", "train in valid", "train:7 = valid:1"):
        assert part in html
    assert "train in itself" in html and "1 row stood there before" in html


def test_wrong_requests_are_refused_and_say_what_there_is(panel):
    with pytest.raises(DataError, match="no split 'tset'.*train, valid, test"):
        panel.show(split="tset")
    with pytest.raises(DataError, match="0 to 7"):
        panel.show(8)
    with pytest.raises(ConfigError, match="cut off"):
        panel.show(filter="long")
    assert (panel.split, panel.index, panel.filter) == ("train", 0, "all")


def test_an_error_of_a_control_is_shown_in_the_panel(panel, monkeypatch):
    monkeypatch.setattr(panel, "example_html", lambda: 1 / 0)
    panel.controls.next.click()
    assert "ZeroDivisionError" in panel.controls.status.value and 'role="alert"' in panel.controls.status.value


def test_controls_may_be_used_from_another_thread(panel):
    threads = [threading.Thread(target=panel.controls.next.click) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert panel.index == 4


def test_every_control_has_a_description_or_a_tooltip(panel):
    for widget in all_widgets(panel.widget):
        if isinstance(widget, (widgets.Button, widgets.Text, widgets.Dropdown, widgets.BoundedIntText)):
            assert widget.description and widget.tooltip
        elif isinstance(widget, widgets.Image):
            assert not widget.tooltip  # ipywidgets 8.1 shows an error in place of a picture that has one
        elif not isinstance(widget, widgets.Box):
            assert widget.tooltip


HOSTILE = [ATTACK, "\x1b[31mred\x1b[0m", "$5 and $10 $$x$$", "</details></div><b>out"]


@pytest.mark.parametrize("text", HOSTILE)
def test_rows_sources_and_queries_cannot_bring_markup_into_the_page(tokenizer, text, tmp_path):
    (tmp_path / "<img src=x onerror=alert(3)>").mkdir()
    data = load_data({"train": [{"prompt": text, "completion": text, text: text}]}, tokenizer)
    data.source = str(tmp_path / "<img src=x onerror=alert(3)>")
    data.notes.append(text)
    panel = DataPanel(data)
    panel.search(text)
    panel.controls.tabs.selected_index = 2
    html = panel._repr_html_()
    for page in (html, panel.controls.lens.value, panel.controls.status.value, panel.controls.checks.value, panel.controls.lengths.value):
        tags = Page(page.replace("<br>", "").replace(on_dark(".fulltune-picture"), "")).tags
        assert tags <= {"div", "b", "u", "s", "span", "pre", "mark", "details", "summary", "img", *TABLE}
        assert "onerror=alert(1)>" not in page and "\x1b" not in page and "\u202e" not in page
    assert html.count("<img") == 1  # the picture of the lengths


TABLE = {"table", "caption", "thead", "tbody", "tr", "th", "td", "ul", "li"}


def test_a_row_of_a_megabyte_is_shown_within_bounds(tokenizer):
    panel = DataPanel(load_data({"train": [{"text": "fox " * 250_000}]}, tokenizer))
    panel.search("fox")
    assert len(panel.controls.lens.value) < 200_000 and len(panel._repr_html_()) < 400_000
    assert "first of 250,000 in this row" in panel.controls.lens.value


def test_rows_in_memory_may_hold_what_json_cannot(tokenizer):
    panel = DataPanel(load_data({"train": [{"text": "a fox", ("key",): {1, 2}}]}, tokenizer))
    assert "Row as read" in panel.controls.lens.value and "(&#x27;key&#x27;,)" in panel.controls.lens.value


def test_closing_leaves_no_widgets_and_no_callbacks(data):
    before = set(_instances)
    panel = DataPanel(data)
    button = panel.controls.next
    panel.close()
    panel.close()
    assert set(_instances) <= before
    button.click()
    assert panel.index == 0


def test_a_panel_without_a_name_of_its_own_lives_as_long_as_its_widgets(data):
    controls = DataPanel(data).controls
    gc.collect()
    controls.next.click()
    assert "train:2" in controls.status.value


def test_repr_is_one_line(panel):
    assert repr(panel).startswith("DataPanel(train[0], DataSet(") and "\n" not in repr(panel)


# -- lengths ----------------------------------------------------------------------------------------------------------


def test_lengths_say_what_the_cut_costs(data):
    lost = data.train.tokens_cut
    assert whole_lengths(data.train).sum() == data.train.tokens + lost
    assert f"1 of 8 rows is cut: {lost:,} tokens lost, {100 * lost / (lost + data.train.tokens):.1f} % of all." in lengths_text(data.train)
    assert "None is cut." in lengths_text(data.test)


def test_the_picture_is_drawn_when_looked_at_and_follows_the_split(panel):
    assert panel.controls.lengths.value == ""
    panel.controls.tabs.selected_index = 1
    first = panel.controls.lengths.value
    assert Image.open(io.BytesIO(b64decode(re.search("base64,([^\"]+)", first)[1]))).size == (1280, 520)
    panel.show(split="test")
    words = lengths_text(panel.data.test)
    assert panel.controls.lengths.value.split("base64,")[1] != first.split("base64,")[1]
    assert f'alt="{words}"' in panel.controls.lengths.value and f"<div>{words}</div>" in panel.controls.lengths.value


def test_lengths_from_one_token_to_many_thousands_can_be_drawn(tokenizer):
    plot = LengthPlot()
    for texts in (["a"], ["a", "a fox"], ["a"] * 50 + ["fox " * 5000], ["fox " * n for n in range(1, 90)]):
        split = load_data({"train": [{"text": text} for text in texts]}, tokenizer, max_seq_length=64).train
        png = plot.draw(split, 64)
        assert np.asarray(Image.open(io.BytesIO(png)).convert("L")).std() > 5  # something is there


def test_nothing_missing_is_not_said_of_rows_whose_ends_were_cut(tokenizer):
    whole = DataPanel(load_data({"train": [*PAIRS, LONG]}, tokenizer, mask_prompt=True))
    cut = DataPanel(load_data({"train": [*PAIRS, LONG]}, tokenizer, mask_prompt=True, max_seq_length=40))
    assert "nothing doubled, nothing missing" in whole.checks.to_html()
    assert "nothing doubled, missing are the ends of 1 row that were cut" in cut.checks.to_html()
