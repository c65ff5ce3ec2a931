"""The world is consistent, the same everywhere, and keeps combinations out without keeping any word out."""

import re

import pytest

from fulltune_nb.tiny import text, world
from fulltune_nb.tiny.world import COLUMNS, POOLS, TABLES


def test_there_are_at_least_16_tables_of_known_columns():
    assert len(TABLES) >= 16
    for table in TABLES.values():
        assert len(table.columns) == len(set(table.columns)) >= 6
        assert set(table.columns) <= set(COLUMNS)


def test_every_column_stands_in_some_table():
    assert {name for table in TABLES.values() for name in table.columns} == set(COLUMNS)


def test_no_two_columns_share_a_word_or_a_phrase():
    for kind in ("nouns", "equal", "more", "less"):
        words = [word for column in COLUMNS.values() for word in getattr(column, kind)]
        assert len(words) == len(set(words)), kind


def test_no_value_is_of_two_kinds_and_none_is_a_column_or_a_table():
    values = [value for pool in POOLS.values() for value in pool]
    assert len(values) == len(set(values))
    assert not set(values) & (set(COLUMNS) | set(TABLES))


@pytest.mark.parametrize("name", TABLES)
def test_rows_fit_their_columns_and_are_always_the_same(name):
    rows = world.rows(name)
    world.rows.cache_clear()
    assert world.rows(name) == rows
    assert len(rows) == world.ROWS_PER_TABLE
    for row in rows:
        for column, value in zip(TABLES[name].columns, row, strict=True):
            spec = COLUMNS[column]
            assert spec.low <= value <= spec.high if spec.is_number else value in POOLS[spec.pool]


def test_each_held_out_text_value_stays_in_use_under_another_column():
    held_out = world.held_out_values()
    for pool, values in POOLS.items():
        columns = [column.name for column in COLUMNS.values() if column.pool == pool]
        for value in values:
            kept = [name for name in columns if (name, value) in held_out]
            assert 0 < len(kept) < len(columns), value


def test_each_held_out_column_stays_in_use_in_another_table():
    held_out = world.held_out_columns()
    for name in COLUMNS:
        tables = [table.name for table in TABLES.values() if name in table.columns]
        kept = [table for table in tables if (table, name) in held_out]
        assert len(kept) < len(tables), name
        assert kept or len(tables) == 1, name


def test_every_table_has_held_out_and_other_columns():
    for table in TABLES.values():
        kept = [name for name in table.columns if world.is_held_out_column(table.name, name)]
        assert 1 <= len(kept) < len(table.columns) - 1, table.name


def test_about_a_quarter_of_the_numbers_of_a_column_is_held_out():
    for column in COLUMNS.values():
        if column.is_number and column.high - column.low > 100:
            numbers = range(column.low, column.high)
            share = sum(world.is_held_out_value(column.name, number) for number in numbers) / len(numbers)
            assert 0.1 < share < 0.4, column.name


# ---- the text about it ----


@pytest.fixture(scope="module")
def documents():
    return text.documents(seed=3, number=6000)


def test_documents_are_the_same_for_the_same_seed_and_others_for_another(documents):
    assert text.documents(seed=3, number=200) == text.documents(seed=3, number=200)
    assert text.documents(seed=4, number=200) != text.documents(seed=3, number=200)


def test_no_document_holds_sql(documents):
    # The keywords in capitals, comparison signs, COUNT(*) and the words `select` and `where` in any form.
    sql = re.compile(r"\b(SELECT|FROM|WHERE|AND|COUNT|MAX|MIN|AVG|SUM)\b|[<>]=? |\(\*\)|\b(select|where)\b", re.IGNORECASE)
    allowed = re.compile(r"\b(from|and|count|sum)\b")
    for document in documents:
        marks_out = re.sub(r"<\|\w+\|>", "", document)
        found = [match.group() for match in sql.finditer(marks_out) if not allowed.fullmatch(match.group().lower())]
        assert not found, document
        assert not re.search(r"\b(FROM|AND|COUNT|SUM)\b|=", marks_out), document


def test_the_text_names_every_table_column_and_value(documents):
    words = set(re.findall(r"\w+", " ".join(documents)))
    assert set(TABLES) | set(COLUMNS) | {value for pool in POOLS.values() for value in pool} <= words
