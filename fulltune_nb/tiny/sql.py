"""The text-to-SQL task: seeded rows in the completions format, a database to run them on, and two scores."""

from __future__ import annotations

import itertools
import random
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fulltune_nb.tiny.world import COLUMNS, TABLES, is_held_out_column, is_held_out_value, rows

# ---- what one can ask about a table, and the many ways to say it in English

OPERATORS = ("=", ">", "<", ">=", "<=")
AGGREGATES = ("max", "min", "avg", "sum")

# Bounds on a query that a model wrote
_READING = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
_STEPS_BETWEEN_LOOKS, _MOST_STEPS = 10_000, 500  # of sqlite's machine: 5,000,000, some tenths of a second
_MOST_BYTES, _MOST_COLUMNS, _MOST_ROWS = 1_000, 20, 1_000  # of a value; of a row; of what is fetched


@dataclass(frozen=True)
class Condition:
    column: str
    operator: str
    """One of `OPERATORS`; text columns only ever have "="."""
    value: str | int


@dataclass(frozen=True)
class Query:
    """What is asked, independent of any wording.

    Attributes:
        table: the table's name.
        columns: what is wanted: one or two columns; one column with `aggregate`; none when rows are counted.
        aggregate: "max", "min", "avg", "sum", "count", or None for plain columns.
        conditions: none, one or two, joined by "and", in the order in which the question says them.
    """

    table: str
    columns: tuple[str, ...]
    aggregate: str | None
    conditions: tuple[Condition, ...]

    def used_columns(self) -> tuple[str, ...]:
        """Columns that are wanted or stand in a condition."""
        return self.columns + tuple(condition.column for condition in self.conditions)


def is_for_training(query: Query) -> bool:
    """No held-out combination at all."""
    columns, values = _held_out(query)
    return not any(columns) and not any(values)


def is_for_test(query: Query) -> bool:
    """At least one held-out table-column, and held-out values only."""
    columns, values = _held_out(query)
    return any(columns) and all(values)


def _held_out(query: Query) -> tuple[list[bool], list[bool]]:
    """Which of its columns, and which of its conditions' values, are held out."""
    columns = [is_held_out_column(query.table, column) for column in query.used_columns()]
    return columns, [is_held_out_value(condition.column, condition.value) for condition in query.conditions]


# -- choosing a query


def _condition(rng: random.Random, column_name: str, value: str | int) -> Condition:
    """A condition on this column that the row holding `value` fulfils, so that no question is asked about nothing."""
    column = COLUMNS[column_name]
    if not column.is_number:
        return Condition(column_name, "=", value)
    operator = rng.choices(OPERATORS, weights=(2, 3, 3, 2, 2))[0]
    span = max(2, (column.high - column.low) // 6)
    if operator == ">":
        value -= rng.randint(1, span)
    elif operator == "<":
        value += rng.randint(1, span)
    return Condition(column_name, operator, max(value, 0))


def random_shape(rng: random.Random) -> tuple[str, int]:
    """What is asked for ("column", "columns", "count" or "aggregate") and under how many conditions."""
    kind = rng.choices(("column", "columns", "count", "aggregate"), weights=(8, 3, 4, 5))[0]
    return kind, rng.choices((0, 1, 2), weights=(2, 6, 4))[0] if kind == "aggregate" else rng.choices((1, 2), weights=(6, 4))[0]


def random_query(rng: random.Random, table: str, row: Mapping[str, str | int], shape: tuple[str, int]) -> Query:
    """A query of this shape about a table whose columns are the keys of `row`; its conditions hold for the row."""
    kind, number = shape
    names = rng.sample(list(row), len(row))
    if kind == "aggregate":
        column = next((name for name in names if COLUMNS[name].is_number), None)
        if column is None:
            return random_query(rng, table, row, ("count", max(number, 1)))
        choices = AGGREGATES if COLUMNS[column].additive else AGGREGATES[:2] if column == "year" else AGGREGATES[:3]
        wanted, aggregate = (column,), rng.choice(choices)
    else:
        wanted, aggregate = tuple(names[: ("count", "column", "columns").index(kind)]), ("count" if kind == "count" else None)
    free = [name for name in names if name not in wanted]
    return Query(table, wanted, aggregate, tuple(_condition(rng, name, row[name]) for name in free[:number]))


def random_row(rng: random.Random, table: str) -> dict[str, str | int]:
    """One of the table's rows."""
    return dict(zip(TABLES[table].columns, rng.choice(rows(table)), strict=True))


def allowed_query(rng: random.Random, table: str, allowed: Callable[[Query], bool]) -> Query:
    """A query about this table that `allowed` lets through: mostly of the shape drawn first, so that held-out questions, which are
    rarer for some shapes, are of the same kinds as the others."""
    while True:
        shape = random_shape(rng)
        for _ in range(200):
            query = random_query(rng, table, random_row(rng, table), shape)
            if allowed(query):
                return query


# -- saying it

_MORE = ("with {n} over {v}", "with {n} above {v}", "whose {n} is more than {v}", "with a {n} greater than {v}")
_LESS = ("with {n} under {v}", "with {n} below {v}", "whose {n} is less than {v}", "with a {n} smaller than {v}")
_AT_LEAST = ("with {n} of at least {v}", "whose {n} is at least {v}", "with a {n} of {v} or more")
_AT_MOST = ("with {n} of at most {v}", "whose {n} is at most {v}", "with a {n} of {v} or less")
_EQUAL = ("with {n} {v}", "whose {n} is {v}", "with a {n} of {v}", "having {v} as {n}")
_AGGREGATE_WORDS = {
    "max": ("highest {n}", "maximum {n}", "largest {n}", "top value of the {n}"),
    "min": ("lowest {n}", "minimum {n}", "smallest {n}", "least value of the {n}"),
    "avg": ("average {n}", "mean {n}", "typical {n}"),
    "sum": ("total {n}", "sum of the {n}", "combined {n}"),
}
_ASK = (
    "What is the {w} of the {s} {c}?",
    "What is the {w} of {p} {c}?",
    "Give me the {w} of the {p} {c}.",
    "Show the {w} for all {p} {c}.",
    "List the {w} of every {s} {c}.",
    "Find the {w} of {p} {c}.",
    "Tell me the {w} for {p} {c}.",
    "For {p} {c}, what is the {w}?",
    "I want to know the {w} of each {s} {c}.",
    "Which {w} do {p} {c} have?",
)
_COUNT = (
    "How many {p} {c} are there?",
    "Count the {p} {c}.",
    "What is the number of {p} {c}?",
    "Tell me how many {p} {c} there are.",
    "How many {p} do we have {c}?",
    "Give the number of all {p} {c}.",
)
_AGGREGATE = (
    "What is the {w} of {p} {c}?",
    "Give me the {w} of all {p} {c}.",
    "Find the {w} among {p} {c}.",
    "Show the {w} over the {p} {c}.",
    "For {p} {c}, what is the {w}?",
    "I want to know the {w} for {p} {c}.",
    "Tell me the {w} of the {p} {c}.",
)


def say_condition(rng: random.Random, condition: Condition) -> str:
    """A phrase to be put after the noun: "whose color is red", "cheaper than 40"."""
    column = COLUMNS[condition.column]
    own, common = {
        "=": (column.equal, _EQUAL),
        ">": (column.more, _MORE),
        "<": (column.less, _LESS),
        ">=": ((), _AT_LEAST),
        "<=": ((), _AT_MOST),
    }[condition.operator]
    # Half the time the column's own way, half the time a common one, however many of each there are.
    phrase = rng.choice(own if own and rng.random() < 0.5 else common)
    return phrase.format(n=rng.choice(column.nouns), v=condition.value)


def say(rng: random.Random, query: Query) -> str:
    """The question, in one of its many wordings."""
    singular, plural = rng.choice(TABLES[query.table].nouns)
    condition = " and ".join(say_condition(rng, c) for c in query.conditions)
    nouns = [rng.choice(COLUMNS[name].nouns) for name in query.columns]
    if query.aggregate == "count":
        template, wanted = rng.choice(_COUNT), ""
    elif query.aggregate:
        template, wanted = rng.choice(_AGGREGATE), rng.choice(_AGGREGATE_WORDS[query.aggregate]).format(n=nouns[0])
    else:
        template, wanted = rng.choice(_ASK), " and ".join(nouns)
    text = template.format(w=wanted, s=singular, p=plural, c=condition)
    # Without a condition its blank is left before the mark that follows.
    return text.replace("  ", " ").replace(" ?", "?").replace(" .", ".").replace(" ,", ",")


def schema(rng: random.Random, table: str, columns: Iterable[str], needed: tuple[str, ...] = ()) -> str:
    """The table as `name(column, column, ...)`: all of the needed columns and two to four of its others, in any order.

    The order and the choice differ from question to question, so that the columns have to be read, not remembered.
    """
    others = [name for name in columns if name not in needed]
    chosen = list(dict.fromkeys(needed)) + rng.sample(others, rng.randint(min(2, len(others)), min(4, len(others))))
    rng.shuffle(chosen)
    return f"{table}({', '.join(chosen)})"


# ---- the one way to write it in SQL, the rows, a database to run them on, and the score

def to_sql(query: Query) -> str:
    """The one way we write this query: `SELECT price FROM cars WHERE color = 'red' AND year > 1990`."""
    if query.aggregate == "count":
        wanted = "COUNT(*)"
    elif query.aggregate:
        wanted = f"{query.aggregate.upper()}({query.columns[0]})"
    else:
        wanted = ", ".join(query.columns)
    conditions = [
        f"{c.column} {c.operator} {c.value}" if COLUMNS[c.column].is_number else f"{c.column} {c.operator} '{c.value}'"
        for c in query.conditions
    ]
    return f"SELECT {wanted} FROM {query.table}" + (" WHERE " + " AND ".join(conditions) if conditions else "")


def text_to_sql(seed: int = 0, train: int = 4000, valid: int = 200, test: int = 200) -> dict[str, list[dict]]:
    """Rows `{"prompt": schema and question, "completion": SQL}` by split; the same seed gives the same rows.

    Every row of `valid` and `test` uses a table-column combination that no training row uses, and every value in it stands under a
    column where it never stands in training (see `world`).
    """
    seen: set[str] = set()
    sizes = {"train": (train, is_for_training), "valid": (valid, is_for_test), "test": (test, is_for_test)}
    # A generator of its own for every split: the test rows do not change when more training rows are asked for.
    return {name: _generate(random.Random(f"{seed} {name}"), size, allowed, seen) for name, (size, allowed) in sizes.items()}


def _generate(rng: random.Random, number: int, allowed: Callable[[Query], bool], seen: set[str]) -> list[dict]:
    """`number` rows, prompts all different from each other and from `seen` (which grows)."""
    found: list[dict] = []
    tables = list(TABLES)
    while len(found) < number:
        # The tables take turns: every one is asked about equally often.
        query = allowed_query(rng, tables[len(found) % len(tables)], allowed)
        prompt = f"{schema(rng, query.table, TABLES[query.table].columns, query.used_columns())}\n{say(rng, query)}"
        if prompt not in seen:
            seen.add(prompt)
            found.append({"prompt": prompt, "completion": to_sql(query)})
    rng.shuffle(found)
    return found


def database() -> sqlite3.Connection:
    """The world as an sqlite database in memory, to run completions on."""
    connection = sqlite3.connect(":memory:")
    for table in TABLES.values():
        columns = ", ".join(f"{name} {'INTEGER' if COLUMNS[name].is_number else 'TEXT'}" for name in table.columns)
        connection.execute(f"CREATE TABLE {table.name} ({columns})")
        connection.executemany(f"INSERT INTO {table.name} VALUES ({', '.join('?' * len(table.columns))})", rows(table.name))
    return connection


def exact_match(answers: Iterable[str], expected: Iterable[str]) -> float:
    """The share (0 to 1) of answers equal to what was expected, blanks at both ends aside."""
    pairs = [(answer.strip(), right.strip()) for answer, right in zip(answers, expected, strict=True)]
    if not pairs:
        raise ValueError("exact_match expected at least one answer, got none")
    return sum(answer == right for answer, right in pairs) / len(pairs)


def rows_of(query: str) -> list[tuple] | None:
    """What a query gives on the world's database, in a fixed order; None where it is no query, or takes too long.

    It may be a model's: it is let read the tables and nothing else, so many steps long.
    """
    connection = database()
    steps = itertools.count()
    connection.set_progress_handler(lambda: next(steps) >= _MOST_STEPS, _STEPS_BETWEEN_LOOKS)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_BYTES)
    connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, _MOST_COLUMNS)
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY)
    try:
        return sorted(connection.execute(query).fetchmany(_MOST_ROWS), key=repr)
    except (sqlite3.Error, sqlite3.Warning, ValueError, UnicodeError):
        return None
    finally:
        connection.close()


def execution_match(answers: Iterable[str], expected: Iterable[str]) -> float:
    """The share (0 to 1) of answers that give the rows that the expected queries give, however they are written.

    Raises:
        ValueError: no answer.
    """
    pairs = [(rows_of(answer), rows_of(right)) for answer, right in zip(answers, expected, strict=True)]
    if not pairs:
        raise ValueError("execution_match expected at least one answer, got none")
    return sum(found is not None and found == right for found, right in pairs) / len(pairs)
