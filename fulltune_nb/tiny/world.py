"""A small world to speak about: 22 tables, their columns, the values in them, and the words people use for them.

Everything the tiny model reads, in pretraining and in the text-to-SQL task, is said about this world. Two kinds of combination are
*held out* of the SQL that is trained on: they appear in its test and validation rows only (and in the base's English text).

    column-value     `("coat", "red")`: the word red is written in training, but under other columns (color, cover, paint)
    table-column     `("dogs", "age")`: the column age is used in training, but in other tables (horses, players, students)

Words themselves are never held out: a model that has never had to write a word cannot be asked to.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cache

POOLS: dict[str, tuple[str, ...]] = {
    "thing": tuple(
        "Falcon Aurora Comet Willow Harbor Ember Atlas Meadow Orion Coral Summit Lotus Raven Breeze Granite Maple Nova Pearl "
        "Phoenix River Saffron Thunder Velvet Zephyr".split()
    ),
    "person": tuple(
        "Anna Boris Clara David Elena Felix Grace Hugo Irene Jonas Karin Liam Maria Nils Olga Pablo Quinn Rosa Simon Tara Ursula "
        "Victor Wendy Yusuf".split()
    ),
    "city": tuple("Paris Rome Oslo Lima Cairo Delhi Tokyo Berlin Madrid Vienna Dublin Lisbon Boston Denver Seoul Athens".split()),
    "country": tuple("Spain Italy Norway Peru Egypt India Japan Germany Brazil Canada Kenya Poland".split()),
    "color": tuple("red blue green yellow black white gray brown orange purple silver pink".split()),
    "genre": tuple("classic modern comic romantic gothic rustic epic folk jazz mystic noble lyric".split()),
    "language": tuple("French Spanish English German Hindi Arabic Greek Swedish".split()),
    "material": tuple("steel wood cotton wool glass leather bronze linen carbon stone".split()),
    "food": tuple("apple lemon cherry honey cheese pepper mango walnut vanilla ginger tomato olive".split()),
    "day": tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
    "month": tuple("January February March April May June July August September October November December".split()),
}
"""The text values, by kind. Every kind is used by at least two columns of different names."""


@dataclass(frozen=True)
class Column:
    """One column name, wherever it appears, and how people speak about it."""

    name: str
    pool: str | None = None
    """The kind of its text values (a key of `POOLS`), or None for a number."""
    low: int = 0
    high: int = 0
    """Smallest and largest number, both possible."""
    nouns: tuple[str, ...] = ()
    """What it is called in a sentence. No two columns of one table share a noun."""
    equal: tuple[str, ...] = ()
    """Own phrases for "is this value", with `{v}`, to be put after the table's noun."""
    more: tuple[str, ...] = ()
    less: tuple[str, ...] = ()
    """Own phrases for > and <, numbers only."""
    additive: bool = False
    """Whether a sum over rows means something (a sum of years does not)."""

    @property
    def is_number(self) -> bool:
        return self.pool is None


@dataclass(frozen=True)
class Table:
    """A table, the singular and plural nouns for what its rows are, and the names of its columns in their usual order."""

    name: str
    nouns: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]


def _text(name: str, pool: str, nouns: str, *equal: str) -> Column:
    return Column(name, pool, nouns=tuple(nouns.split("/")), equal=equal)


def _number(name: str, low: int, high: int, nouns: str, more: str = "", less: str = "", additive: bool = False) -> Column:
    def phrases(text: str) -> tuple[str, ...]:
        return tuple(text.split("/")) if text else ()

    return Column(name, None, low, high, tuple(nouns.split("/")), (), phrases(more), phrases(less), additive)


_COLUMNS = (
    _text("name", "thing", "name", "called {v}", "named {v}"),
    _text("title", "thing", "title", "titled {v}", "under the title {v}"),
    _text("model", "thing", "model/model name", "of the model {v}"),
    _text("brand", "thing", "brand/make", "made by {v}", "branded {v}"),
    _text("team", "thing", "team/side/club", "of the team {v}"),
    _text("owner", "person", "owner/keeper", "owned by {v}", "belonging to {v}"),
    _text("author", "person", "author/writer", "written by {v}"),
    _text("captain", "person", "captain/commander", "commanded by {v}", "under captain {v}"),
    _text("manager", "person", "manager/head", "managed by {v}", "run by {v}"),
    _text("director", "person", "director", "directed by {v}"),
    _text("artist", "person", "artist/creator", "created by {v}", "by the artist {v}"),
    _text("coach", "person", "coach/trainer", "coached by {v}", "trained by {v}"),
    _text("teacher", "person", "teacher/instructor", "taught by {v}"),
    _text("driver", "person", "driver", "driven by {v}"),
    _text("chef", "person", "chef/cook", "cooked by {v}", "with {v} as chef"),
    _text("person", "person", "person/full name", "known as {v}"),
    _text("city", "city", "city/town", "in {v}", "located in {v}"),
    _text("port", "city", "port/home port", "anchored in {v}"),
    _text("hometown", "city", "hometown/birthplace", "born in {v}", "at home in {v}"),
    _text("origin", "city", "origin/starting point", "leaving {v}", "starting in {v}"),
    _text("destination", "city", "destination/goal", "going to {v}", "bound for {v}"),
    _text("venue", "city", "venue/location", "held in {v}", "taking place in {v}"),
    _text("country", "country", "country/nation", "from {v}"),
    _text("homeland", "country", "homeland", "bred in {v}"),
    _text("market", "country", "market", "sold in {v}", "on the market in {v}"),
    _text("color", "color", "color/shade", "colored {v}"),
    _text("coat", "color", "coat/coat color", "with a {v} coat"),
    _text("paint", "color", "paint/wall color", "painted {v}"),
    _text("cover", "color", "cover/cover color", "with a {v} cover"),
    _text("genre", "genre", "genre/type", "of the {v} genre"),
    _text("style", "genre", "style/manner", "in {v} style"),
    _text("theme", "genre", "theme/topic", "about the {v} theme"),
    _text("language", "language", "language/tongue", "in the {v} language"),
    _text("subtitles", "language", "subtitles/subtitle language", "subtitled in {v}"),
    _text("guide", "language", "guide/guide language", "with a guide in {v}"),
    _text("material", "material", "material/substance", "made of {v}"),
    _text("frame", "material", "frame/frame material", "with a {v} frame"),
    _text("fabric", "material", "fabric/cloth", "sewn out of {v}"),
    _text("flavor", "food", "flavor/taste", "tasting of {v}"),
    _text("topping", "food", "topping", "topped with {v}"),
    _text("filling", "food", "filling", "filled with {v}"),
    _text("specialty", "food", "specialty/best dish", "famous for {v}"),
    _text("day", "day", "day/weekday", "on {v}"),
    _text("closing", "day", "closing day/rest day", "closed on {v}"),
    _text("month", "month", "month", "during {v}"),
    _text("opening", "month", "opening month/start month", "opened in {v}"),
    _number("price", 5, 950, "price/cost", "costing more than {v}/dearer than {v}", "costing less than {v}/cheaper than {v}", True),
    _number("fee", 2, 90, "fee/charge", "charging more than {v}", "charging less than {v}", True),
    _number("year", 1950, 2024, "year/date", "after {v}/newer than {v}", "before {v}/prior to {v}"),
    _number("age", 1, 40, "age", "older than {v}", "younger than {v}"),
    _number("weight", 1, 400, "weight/mass", "heavier than {v}", "lighter than {v}", True),
    _number("height", 20, 220, "height", "taller than {v}", "shorter than {v}"),
    _number("length", 10, 300, "length", "longer than {v}", "not as long as {v}"),
    _number("speed", 20, 340, "speed/top speed", "faster than {v}", "slower than {v}"),
    _number("duration", 3, 240, "duration/running time", "lasting more than {v}", "lasting less than {v}", True),
    _number("distance", 80, 990, "distance/range", "going farther than {v}", "going less far than {v}", True),
    _number("seats", 10, 500, "seat count/seats", "seating more than {v}", "seating fewer than {v}", True),
    _number("rooms", 2, 80, "room count/rooms", "with more than {v} rooms", "with fewer than {v} rooms", True),
    _number("pages", 40, 900, "page count/pages", "with more than {v} pages", "with fewer than {v} pages", True),
    _number("stock", 1, 600, "stock/supply", "with more than {v} left", "with fewer than {v} left", True),
    _number("wins", 1, 60, "wins/victories", "winning more than {v} times", "winning fewer than {v} times", True),
    _number("points", 5, 120, "points/tally", "with more than {v} points", "with fewer than {v} points", True),
    _number("score", 10, 100, "score/mark", "scoring above {v}", "scoring below {v}"),
    _number("rating", 1, 50, "rating/stars", "rated above {v}", "rated below {v}"),
    _number("salary", 20, 900, "salary/pay", "earning more than {v}", "earning less than {v}", True),
    _number("budget", 10, 800, "budget/funds", "spending more than {v}", "spending less than {v}", True),
)
COLUMNS: dict[str, Column] = {column.name: column for column in _COLUMNS}


def _table(name: str, nouns: str, columns: str) -> Table:
    pairs = tuple((pair.split("|")[0], pair.split("|")[1]) for pair in nouns.split("/"))
    return Table(name, pairs, tuple(columns.split()))


_TABLES = (
    _table("cars", "car|cars/vehicle|vehicles", "model brand color owner country price year speed"),
    _table("ships", "ship|ships/vessel|vessels", "name captain port country material length speed year"),
    _table("hotels", "hotel|hotels/guesthouse|guesthouses", "name city manager style rooms price rating"),
    _table("books", "book|books/volume|volumes", "title author genre language cover pages price year"),
    _table("films", "film|films/movie|movies", "title director genre subtitles country duration budget year"),
    _table("songs", "song|songs/tune|tunes", "title artist genre language duration score year"),
    _table("players", "player|players/athlete|athletes", "person team country hometown age height salary points"),
    _table("teams", "squad|squads/crew|crews", "team coach city color wins points budget"),
    _table("students", "student|students/pupil|pupils", "person teacher hometown language age height score"),
    _table("courses", "course|courses/class|classes", "title teacher theme day language seats fee"),
    _table("flights", "flight|flights/plane trip|plane trips", "origin destination captain day distance price seats"),
    _table("trains", "train|trains/railway|railways", "name origin destination driver day speed length seats"),
    _table("horses", "horse|horses/racehorse|racehorses", "name owner coach coat homeland age weight wins"),
    _table("dogs", "dog|dogs/hound|hounds", "name owner coat homeland age weight height"),
    _table("bikes", "bike|bikes/bicycle|bicycles", "model brand frame color market weight price"),
    _table("chairs", "chair|chairs/stool|stools", "model material style color height weight stock"),
    _table("shirts", "shirt|shirts/blouse|blouses", "brand fabric color market length price stock"),
    _table("restaurants", "restaurant|restaurants/diner|diners", "name chef city specialty closing seats rating"),
    _table("cakes", "cake|cakes/tart|tarts", "name chef flavor topping filling weight price"),
    _table("museums", "museum|museums/gallery|galleries", "name manager city theme guide closing opening rooms fee"),
    _table("concerts", "concert|concerts/show|shows", "artist venue month day style duration seats fee"),
    _table("houses", "house|houses/home|homes", "owner city paint material opening rooms price year"),
)
TABLES: dict[str, Table] = {table.name: table for table in _TABLES}

ROWS_PER_TABLE = 48


def _draw(*parts: object) -> int:
    """A number that depends on `parts` only: the same on every machine and in every Python (unlike `hash`)."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


@cache
def held_out_values() -> frozenset[tuple[str, str]]:
    """The (column, text value) pairs kept for test: of the k columns a value can stand in, about a third, never all."""
    pairs = set()
    for pool, values in POOLS.items():
        columns = sorted(column.name for column in _COLUMNS if column.pool == pool)
        for value in values:
            ranked = sorted(columns, key=lambda name: _draw("value", value, name))
            pairs.update((name, value) for name in ranked[: max(1, len(columns) // 3)])
    return frozenset(pairs)


@cache
def held_out_columns() -> frozenset[tuple[str, str]]:
    """The (table, column) pairs kept for test: a column of n >= 2 tables is kept from about a third of them, so it is used in others.

    Tables with the fewest kept columns go first, so that every table has some to be asked about.
    """
    pairs: set[tuple[str, str]] = set()
    load = dict.fromkeys(TABLES, 0)
    for name in sorted(COLUMNS, key=lambda name: _draw("order", name)):
        tables = [table.name for table in _TABLES if name in table.columns]
        if len(tables) < 2:
            continue
        tables.sort(key=lambda table: (load[table], _draw("column", table, name)))
        for table in tables[: max(1, len(tables) // 3)]:
            pairs.add((table, name))
            load[table] += 1
    return frozenset(pairs)


def is_held_out_value(column: str, value: str | int) -> bool:
    """Whether training may not put this value under this column. A quarter of all numbers, column by column."""
    if COLUMNS[column].is_number:
        return _draw("number", column, value) % 4 == 0
    return (column, str(value)) in held_out_values()


def is_held_out_column(table: str, column: str) -> bool:
    """Whether training may not use this column of this table (it is still read, in the schema)."""
    return (table, column) in held_out_columns()


@cache
def rows(table: str) -> tuple[tuple[str | int, ...], ...]:
    """The contents of a table, in the order of its columns: always the same `ROWS_PER_TABLE` rows."""
    rng = random.Random(_draw("rows", table))
    columns = [COLUMNS[name] for name in TABLES[table].columns]
    return tuple(
        tuple(rng.choice(POOLS[column.pool]) if column.pool else rng.randint(column.low, column.high) for column in columns)
        for _ in range(ROWS_PER_TABLE)
    )
