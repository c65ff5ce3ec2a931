"""The text the base model is pretrained on: the small world described, asked about and reworded in English. Never in SQL.

Documents are of two sorts, both plain strings: running text, and exchanges in the chat format of `tokenizer` (`chat_document`). Nothing
here uses a held-out combination (see `world`), but for the columns named in a schema or in the list of a table's columns.
"""

from __future__ import annotations

import random

from .questions import AGGREGATES, Condition, Query, allowed_query, is_for_training, say, say_condition, schema
from .world import COLUMNS, POOLS, TABLES, Column, is_held_out_column, is_held_out_value, rows

_POOL_WORDS = {
    "thing": "name of a thing",
    "person": "person",
    "city": "city",
    "country": "country",
    "color": "color",
    "genre": "kind of art",
    "language": "language",
    "material": "material",
    "food": "food",
    "day": "day of the week",
    "month": "month of the year",
}
_OPERATOR_WORDS = {"=": "is", ">": "above", "<": "below", ">=": "at least", "<=": "at most"}
_AGGREGATE_WORDS = dict(zip(AGGREGATES, ("highest", "lowest", "average", "total"), strict=True))


def chat_document(user: str, assistant: str) -> str:
    """One exchange as the chat template renders it, without its last `<|end|>`: the tokenizer of a text data set adds that."""
    return f"<|user|>{user}<|assistant|>{assistant}"


def quoted(value: str | int) -> str:
    """Words stand in quotes, numbers do not."""
    return f"'{value}'" if isinstance(value, str) else str(value)


def rewording(query: Query) -> str:
    """The question in plain fixed words: "highest price of cars with color is 'red' and with year above 1990"."""
    if query.aggregate == "count":
        wanted = "number"
    elif query.aggregate:
        wanted = f"{_AGGREGATE_WORDS[query.aggregate]} {query.columns[0]}"
    else:
        wanted = " and ".join(query.columns)
    conditions = [f"with {c.column} {_OPERATOR_WORDS[c.operator]} {quoted(c.value)}" for c in query.conditions]
    return " ".join([wanted, "of", query.table, " and ".join(conditions)]).strip()


def _query(rng: random.Random) -> Query:
    return allowed_query(rng, rng.choice(list(TABLES)), is_for_training)


def _facts(rng: random.Random, table_name: str, number: int) -> list[tuple[Column, str | int]]:
    """Up to `number` columns of a row of the table, with their values."""
    table = TABLES[table_name]
    row = zip(table.columns, rng.choice(rows(table_name)), strict=True)
    known = [(n, v) for n, v in row if not is_held_out_column(table_name, n) and not is_held_out_value(n, v)]
    return [(COLUMNS[name], value) for name, value in rng.sample(known, min(number, len(known)))]


# ---- running text ----


def _describe_table(rng: random.Random) -> str:
    table = TABLES[rng.choice(list(TABLES))]
    _, plural = rng.choice(table.nouns)
    columns = ", ".join(rng.sample(table.columns, len(table.columns)))
    return rng.choice(
        (
            f"The table {table.name} is about {plural}. Its columns are {columns}.",
            f"All {plural} are kept in the table {table.name}, with the columns {columns}.",
            f"For every one of the {plural} we write down {columns}. The table is called {table.name}.",
        )
    )


def _describe_column(rng: random.Random) -> str:
    column = COLUMNS[rng.choice(list(COLUMNS))]
    noun = rng.choice(column.nouns)
    if column.is_number:
        return f"The column {column.name} holds a number. People also call it {noun}. It lies between {column.low} and {column.high}."
    values = [value for value in rng.sample(POOLS[column.pool], 6) if not is_held_out_value(column.name, value)]
    return f"The column {column.name} holds a {_POOL_WORDS[column.pool]}. People also call it {noun}. It can be {', '.join(values)}."


def _describe_row(rng: random.Random) -> str:
    table = TABLES[rng.choice(list(TABLES))]
    singular, _ = rng.choice(table.nouns)
    facts = _facts(rng, table.name, rng.randint(2, 4))
    said = " and ".join(say_condition(rng, Condition(column.name, "=", value)) for column, value in facts)
    return f"There is a {singular} {said}. " + " ".join(f"Its {column.name} is {quoted(value)}." for column, value in facts)


def _describe_value(rng: random.Random) -> str:
    pool = rng.choice(list(POOLS))
    value = rng.choice(POOLS[pool])
    return f"{value} is a {_POOL_WORDS[pool]}. In quotes: {quoted(value)}."


def _just_questions(rng: random.Random) -> str:
    return " ".join(say(rng, _query(rng)) for _ in range(2))


# ---- exchanges ----


def _reword(rng: random.Random) -> str:
    query = _query(rng)
    return chat_document(f"{schema(rng, query.table, query.used_columns())}\n{say(rng, query)}", rewording(query))


def _say_again(rng: random.Random) -> str:
    query = _query(rng)
    return chat_document(f"Say it in other words: {say(rng, query)}", say(rng, query))


def _explain(rng: random.Random) -> str:
    query = _query(rng)
    return chat_document(f"Ask for the {rewording(query)}", say(rng, query))


def _copy_schema(rng: random.Random) -> str:
    table = rng.choice(list(TABLES))
    text = schema(rng, table)
    columns = text[text.index("(") + 1 : -1]
    question, answer = rng.choice(
        (
            ("Which columns are there?", columns),
            ("What is the table called?", table),
            ("Say it again.", text),
            ("How many columns are there?", str(columns.count(",") + 1)),
        )
    )
    return chat_document(f"{text}\n{question}", answer)


def _find_column(rng: random.Random) -> str:
    table = rng.choice(list(TABLES))
    text = schema(rng, table)
    names = [name for name in text[text.index("(") + 1 : -1].split(", ") if not is_held_out_column(table, name)]
    if not names:
        return _find_column(rng)
    noun = (name := rng.choice(names)) and rng.choice(COLUMNS[name].nouns)
    return chat_document(f"{text}\nWhich column is the {noun}?", name)


def _read_phrase(rng: random.Random) -> str:
    query = _query(rng)
    if not query.conditions:
        return _read_phrase(rng)
    condition = query.conditions[0]
    answer = f"{condition.column} {_OPERATOR_WORDS[condition.operator]} {quoted(condition.value)}"
    return chat_document(f"{schema(rng, query.table, query.used_columns())}\n{say_condition(rng, condition)}", answer)


_KINDS = {
    _describe_table: 3,
    _describe_column: 3,
    _describe_row: 6,
    _describe_value: 2,
    _just_questions: 5,
    _reword: 14,
    _say_again: 4,
    _explain: 4,
    _copy_schema: 4,
    _find_column: 4,
    _read_phrase: 6,
}


def documents(seed: int = 0, number: int = 20000) -> list[str]:
    """`number` documents, the same for the same seed."""
    rng = random.Random(f"text {seed}")
    kinds = rng.choices(list(_KINDS), weights=list(_KINDS.values()), k=number)
    return [kind(rng) for kind in kinds]
