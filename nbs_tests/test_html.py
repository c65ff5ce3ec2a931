"""Text from outside never becomes markup."""

import pytest

from fulltune_nb import html

HOSTILE = ["<img src=x onerror=alert(1)>", "</pre><script>alert(1)</script>"]
HOSTILE += ["\" onmouseover='x'", "\x1b[31mred", "\u202eevil\u202c", "a\x00b", "\x9b31mred", "a\rb", "\u061cevil\u2028", "data\udcff.jsonl"]


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_has_no_markup_controls_or_direction_marks(text):
    escaped = html.esc(text)
    assert not set(escaped) & set("<>\"'\x1b\x00\u202e\u202c\x9b\r\u061c\u2028")
    escaped.encode("utf-8")  # or it could not be sent


@pytest.mark.parametrize("text", HOSTILE)
def test_tables_and_facts_escape_names_and_values(text):
    shown = html.table([text], [[text]], caption=text) + html.facts(text, [(text, text)])
    assert text not in shown and "<script" not in shown and "<img" not in shown


def test_only_cells_with_a_word_too_long_for_the_page_may_break_it():
    assert html.table(["a", "b"], [["short words only", "x" * 500]]).count("overflow-wrap:anywhere") == 1


def test_a_cell_of_a_megabyte_is_cut_and_says_so():
    shown = html.table(["a"], [["x" * 1_000_000]])
    assert len(shown) < 21_000 and "(+980,000 characters)" in shown


def test_facts_are_rows_with_headers_and_have_no_head():
    shown = html.facts("title", [("<thead><tr>", "a"), ("n", 3)])
    assert "<thead" not in shown and shown.count('<th scope="row"') == 2 and "&lt;thead&gt;&lt;tr&gt;</th>" in shown
    assert html.table(["<thead><tr>"], [["a"]]).count("<thead>") == 1


def test_line_breaks_and_tabs_stay_and_what_is_cut_is_counted():
    assert html.esc("a\n\tb") == "a\n\tb"
    assert html.esc("x" * 1500, limit=10) == "x" * 10 + " … (+1,490 characters)"


def test_dollar_signs_stand_where_mathjax_does_not_look():
    assert 'class="mathjax_ignore' in html.table(["price"], [["$5 and $10"]])


def test_numbers_are_set_to_the_right():
    assert "text-align:right" in html.table(["n"], [[3]]) and "text-align:right" not in html.table(["n"], [["3"]])


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (4_290_000_000, "4.29 GB"), (2e12, "2.00 TB")])
def test_bytes_are_written_in_decimal_units(count, text):
    assert html.human_bytes(count) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 rows"), (1, "1 row"), (2000, "2,000 rows")])
def test_counted_things_are_one_or_many(count, text):
    assert html.counted(count, "row") == text


def test_caption_over_a_narrow_table_stays_on_one_line_unless_it_is_long():
    assert "white-space:nowrap" in html.facts("5 tokens through 3 blocks", []) and "nowrap" not in html.facts("long " * 20, [])
