"""The text the base model is pretrained on: the small world described, asked about and reworded in English. Never in SQL.

Documents are of two sorts, both plain strings: running text, and exchanges in the base's chat format (`chat_document`). The base
reads here, in English, about everything in the world; what is held out (see `world`) is held out of the SQL it is trained on later.
"""

from __future__ import annotations

import random

from fulltune_nb.tiny.sql import AGGREGATES, Condition, Query, random_query, random_row, random_shape, say, say_condition, schema
from fulltune_nb.tiny.world import COLUMNS, POOLS, TABLES

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


def _invented_row(rng: random.Random) -> dict[str, str | int]:
    """Five to seven columns from anywhere in the world, with values: a row of a table that does not exist."""
    columns = [COLUMNS[name] for name in rng.sample(list(COLUMNS), rng.randint(5, 7))]
    return {c.name: rng.choice(POOLS[c.pool]) if c.pool else rng.randint(c.low, c.high) for c in columns}


def _table_row(rng: random.Random) -> tuple[str, dict[str, str | int]]:
    """A table's name and a row: half of the time its own, half of the time an invented one.

    Invented columns teach to read a schema: what stands in it cannot be known from the table's name.
    """
    table = rng.choice(list(TABLES))
    return table, random_row(rng, table) if rng.random() < 0.5 else _invented_row(rng)


def _query(rng: random.Random) -> tuple[str, Query]:
    """A query and a schema that it can be asked of."""
    table, row = _table_row(rng)
    query = random_query(rng, table, row, random_shape(rng))
    return schema(rng, table, row, query.used_columns()), query


# -- running text


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
    values = rng.sample(POOLS[column.pool], 6)
    return f"The column {column.name} holds a {_POOL_WORDS[column.pool]}. People also call it {noun}. It can be {', '.join(values)}."


def _describe_row(rng: random.Random) -> str:
    table, row = _table_row(rng)
    singular, _ = rng.choice(TABLES[table].nouns)
    facts = rng.sample(list(row.items()), rng.randint(2, 4))
    said = " and ".join(say_condition(rng, Condition(column, "=", value)) for column, value in facts)
    return f"There is a {singular} {said}. " + " ".join(f"Its {column} is {quoted(value)}." for column, value in facts)


def _describe_value(rng: random.Random) -> str:
    pool = rng.choice(list(POOLS))
    value = rng.choice(POOLS[pool])
    return f"{value} is a {_POOL_WORDS[pool]}. In quotes: {quoted(value)}."


def _just_questions(rng: random.Random) -> str:
    return " ".join(say(rng, _query(rng)[1]) for _ in range(2))


# -- exchanges


def _reword(rng: random.Random) -> str:
    text, query = _query(rng)
    return chat_document(f"{text}\n{say(rng, query)}", rewording(query))


def _say_again(rng: random.Random) -> str:
    _, query = _query(rng)
    return chat_document(f"Say it in other words: {say(rng, query)}", say(rng, query))


def _explain(rng: random.Random) -> str:
    _, query = _query(rng)
    return chat_document(f"Ask for the {rewording(query)}", say(rng, query))


def _copy_schema(rng: random.Random) -> str:
    table, row = _table_row(rng)
    text = schema(rng, table, row)
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
    table, row = _table_row(rng)
    name = rng.choice(list(row))
    return chat_document(f"{schema(rng, table, row, (name,))}\nWhich column is the {rng.choice(COLUMNS[name].nouns)}?", name)


def _read_phrase(rng: random.Random) -> str:
    text, query = _query(rng)
    if not query.conditions:
        return _read_phrase(rng)
    condition = rng.choice(query.conditions)
    answer = f"{condition.column} {_OPERATOR_WORDS[condition.operator]} {quoted(condition.value)}"
    return chat_document(f"{text}\n{say_condition(rng, condition)}", answer)


_KINDS = {
    _describe_table: 2,
    _describe_column: 3,
    _describe_row: 5,
    _describe_value: 2,
    _just_questions: 3,
    _reword: 20,
    _say_again: 3,
    _explain: 3,
    _copy_schema: 3,
    _find_column: 3,
    _read_phrase: 8,
}
"""How often each sort of document is written. Rewording is what questions need most, so it has the largest share."""


def documents(seed: int = 0, number: int = 20000) -> list[str]:
    """`number` documents, the same for the same seed."""
    rng = random.Random(f"text {seed}")
    kinds = rng.choices(list(_KINDS), weights=list(_KINDS.values()), k=number)
    return [kind(rng) for kind in kinds]
