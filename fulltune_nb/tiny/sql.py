"""The text-to-SQL task: seeded rows in the completions format, a database to run them on, and the exact-match score."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterable

from fulltune_nb.tiny.questions import Query, allowed_query, is_for_test, is_for_training, say, schema
from fulltune_nb.tiny.world import COLUMNS, TABLES, rows


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
