"""The text-to-SQL task: right answers, real hold-outs, the same rows for the same seed."""

import random
import re

import pytest

from fulltune_nb.tiny import database, exact_match, execution_match, sql, text_to_sql, write_text_to_sql
from fulltune_nb.tiny.sql import Condition, Query
from fulltune_nb.tiny.world import COLUMNS, TABLES

PATTERN = re.compile(r"SELECT (?P<wanted>.+?) FROM (?P<table>\w+)(?: WHERE (?P<conditions>.+))?")
CONDITION = re.compile(r"(\w+) (=|>=|<=|>|<) ('\w+'|\d+)")


@pytest.fixture(scope="module")
def splits():
    return text_to_sql()


def parse(completion):
    """Table, all columns used, and (column, value) pairs, read from the SQL alone."""
    match = PATTERN.fullmatch(completion)
    assert match, completion
    conditions = match["conditions"].split(" AND ") if match["conditions"] else []
    pairs = [CONDITION.fullmatch(condition).group(1, 3) for condition in conditions]
    wanted = [name for name in re.findall(r"\w+", match["wanted"]) if name in COLUMNS]
    return match["table"], wanted + [column for column, _ in pairs], pairs


def combinations(rows):
    table_columns, column_values = set(), set()
    for row in rows:
        table, columns, pairs = parse(row["completion"])
        table_columns.update((table, column) for column in columns)
        column_values.update(pairs)
    return table_columns, column_values


def test_sizes_are_at_least_4000_200_200(splits):
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 4000, "valid": 200, "test": 200}


def test_rows_are_completions(splits):
    for rows in splits.values():
        for row in rows:
            assert set(row) == {"prompt", "completion"}
            assert all(isinstance(value, str) and value for value in row.values())


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(splits):
    assert text_to_sql() == splits
    other = text_to_sql(seed=1, train=100, valid=10, test=10)
    assert not {row["prompt"] for row in other["train"]} <= {row["prompt"] for row in splits["train"]}


def test_more_training_rows_leave_the_test_rows_as_they_are():
    small, large = text_to_sql(train=50), text_to_sql(train=100)
    assert small["test"] == large["test"] and small["valid"] == large["valid"]


def test_no_prompt_appears_twice(splits):
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(prompts) == len(set(prompts))


@pytest.mark.parametrize("name", ["valid", "test"])
def test_every_held_out_row_uses_a_table_column_pair_never_seen_in_training(splits, name):
    seen, _ = combinations(splits["train"])
    for row in splits[name]:
        table, columns, _ = parse(row["completion"])
        assert any((table, column) not in seen for column in columns), row


@pytest.mark.parametrize("name", ["valid", "test"])
def test_no_value_of_a_held_out_row_stood_under_its_column_in_training(splits, name):
    _, seen = combinations(splits["train"])
    for row in splits[name]:
        assert not seen & set(parse(row["completion"])[2]), row


@pytest.mark.parametrize("seed", [1, 2])
def test_hold_outs_are_the_same_for_every_seed(splits, seed):
    train_columns, train_values = combinations(splits["train"])
    for row in text_to_sql(seed=seed, train=10)["test"]:
        table, columns, pairs = parse(row["completion"])
        assert any((table, column) not in train_columns for column in columns)
        assert not train_values & set(pairs)


def test_every_word_of_a_held_out_answer_is_written_in_training(splits):
    def words(rows):
        return {word for row in rows for word in re.findall(r"[A-Za-z]+|\d", row["completion"])}

    assert words(splits["valid"] + splits["test"]) <= words(splits["train"])


def test_every_answer_can_be_read_off_its_prompt(splits):
    for rows in splits.values():
        for row in rows:
            schema, question = row["prompt"].split("\n")
            table, columns, pairs = parse(row["completion"])
            assert schema.startswith(f"{table}(") and set(columns) <= set(re.findall(r"\w+", schema[len(table) :]))
            assert all(value.strip("'") in re.findall(r"\w+", question) for _, value in pairs)


def test_every_completion_runs_and_finds_something(splits):
    connection = database()
    for rows in splits.values():
        for row in rows:
            answer = connection.execute(row["completion"]).fetchall()
            assert answer and all(cell is not None for line in answer for cell in line), row
            if "COUNT" in row["completion"]:
                assert answer[0][0] > 0, row


def test_answers_mean_what_the_question_means():
    connection = database()
    query = Query("cars", ("price",), "max", (Condition("color", "=", "red"), Condition("year", ">", 1980)))
    columns = TABLES["cars"].columns
    rows = [dict(zip(columns, row, strict=True)) for row in connection.execute("SELECT * FROM cars")]
    expected = max(row["price"] for row in rows if row["color"] == "red" and row["year"] > 1980)
    assert sql.to_sql(query) == "SELECT MAX(price) FROM cars WHERE color = 'red' AND year > 1980"
    assert connection.execute(sql.to_sql(query)).fetchall() == [(expected,)]


def test_all_kinds_of_question_are_asked_in_every_split(splits):
    for rows in splits.values():
        completions = [row["completion"] for row in rows]
        for part in ("COUNT(*)", "MAX(", "MIN(", "AVG(", "SUM(", " WHERE ", " AND ", " > ", " < ", " >= ", " <= ", "= '", ", "):
            assert any(part in completion for completion in completions), part
        assert any("WHERE" not in completion for completion in completions)


def test_all_tables_are_asked_about_in_every_split(splits):
    for rows in splits.values():
        assert {parse(row["completion"])[0] for row in rows} == set(TABLES)


def test_one_query_is_worded_in_many_ways():
    query = Query("cars", ("price",), None, (Condition("color", "=", "red"),))
    rng = random.Random(0)
    wordings = {sql.say(rng, query) for _ in range(200)}
    assert len(wordings) > 50
    assert all("red" in wording and "{" not in wording and "  " not in wording for wording in wordings)


def test_exact_match_forgives_blanks_at_the_ends_only():
    assert exact_match(["SELECT a FROM b ", "select a FROM b"], ["SELECT a FROM b", "SELECT a FROM b"]) == 0.5
    with pytest.raises(ValueError, match="at least one"):
        exact_match([], [])


def test_execution_match_asks_what_a_query_gives_and_not_how_it_is_written():
    right = ["SELECT COUNT(*) FROM ships", "SELECT port FROM ships WHERE length > 5"]
    wrong = ["SELECT MAX(length) FROM ships", "no query"]
    assert execution_match([right[0].lower(), "SELECT port FROM ships WHERE NOT length <= 5 ORDER BY port DESC"], right) == 1.0
    assert execution_match(wrong, right) == 0.0
    assert execution_match(["no query"], ["no query"]) == 0.0  # two queries that give nothing are not the same
    with pytest.raises(ValueError, match="at least one"):
        execution_match([], [])


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE ships",
        "ATTACH DATABASE '{}' AS other",
        "PRAGMA query_only = 0",
        "SELECT load_extension('{}')",
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT COUNT(*) FROM t",
        "SELECT COUNT(*) FROM ships a, ships b, ships c, ships d, ships e, ships f",
        "SELECT randomblob(1000000000)",
        "SELECT hex(zeroblob(20000)) FROM ships a, ships b, ships c",
        f"SELECT {', '.join(['port'] * 100)} FROM ships",
        "SELECT 1; SELECT 2",
        "SELECT 1\0",
        "",
    ],
)
def test_a_query_of_a_model_can_only_read_and_not_for_long(tmp_path, query):
    assert not sql.rows_of(query.format(tmp_path / "file"))
    assert not list(tmp_path.iterdir())


def test_written_files_are_read_back_as_the_same_rows(tmp_path):
    import json

    folder = write_text_to_sql(tmp_path / "new" / "data", train=20, valid=5, test=5)
    expected = text_to_sql(train=20, valid=5, test=5)
    assert sorted(path.name for path in folder.iterdir()) == ["test.jsonl", "train.jsonl", "valid.jsonl"]
    for name, rows in expected.items():
        assert [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()] == rows
