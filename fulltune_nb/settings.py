"""Settings: dataclass fields that carry default, check and help, and the YAML files they are read from and written to.

PyYAML follows YAML 1.1, where `1e-5` is a text, `0100` is 64 and a key given twice silently counts once. Here `1e-5` and
`1e3` are numbers, whole numbers are decimal, and a key given twice is an error. Only plain values are read: tags that would
build Python objects are refused.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import inspect
import math
import numbers
import os
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fulltune_nb.errors import ConfigError, nearest
from fulltune_nb.files import write_text

Check = Callable[[Any], Any]
"""Takes a value as it was given and returns it in its own type, or raises `Refused`."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlevel = 2


class Refused(Exception):
    """A value is not what was expected; the text is the phrase behind "expected"."""


class SettingError(ConfigError):
    """A `ConfigError` that knows which setting it is about, so that a reader of files can add the line.

    Attributes:
        setting: name of the setting.
    """

    def __init__(self, message: str, setting: str = ""):
        super().__init__(message)
        self.setting = setting


# -- fields: one dataclass field is one setting, one flag, one key of a YAML file


def setting(default: Any, check: Check, help: str) -> Any:
    """A dataclass field. `check_fields` applies the check, `described` and the command line show the help."""
    metadata = {"check": check, "help": help}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def names_of(cls: type) -> list[str]:
    """Names of a dataclass's fields, in their order."""
    return [field.name for field in dataclasses.fields(cls)]


def described(cls: type) -> type:
    """Decorator that adds every field's help to the docstring of a dataclass."""
    helps = [f"    {field.name}: {field.metadata['help']}" for field in dataclasses.fields(cls)]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__), "", "Attributes:", *helps])
    return cls


def check_names(values: Iterable[str], cls: type, also: Collection[str] = ()) -> None:
    """Refuses names that are no field of `cls`.

    Raises:
        SettingError: with the nearest of the valid names, `also` among them.
    """
    valid = names_of(cls)
    for name in values:
        if name not in valid:
            raise SettingError(f"unknown setting {name!r}. {nearest(name, [*valid, *also])}", name)


def check_fields(record: Any) -> None:
    """Replaces every field of a (frozen) dataclass by what its check makes of it.

    Raises:
        SettingError: a value is not what was expected.
    """
    for field in dataclasses.fields(record):
        object.__setattr__(record, field.name, checked(field.metadata["check"], field.name, getattr(record, field.name)))


def checked(check: Check, name: str, value: Any, part: str = "") -> Any:
    """`check(value)`; `part` names the part of the setting `name` that the value is.

    Raises:
        SettingError: the value is not what was expected.
    """
    try:
        return check(value)
    except Refused as refused:
        hint = ""
        if isinstance(value, str) and (_is_number(value) or value.strip().lower() in ("true", "false", "none")):
            hint = " That is a text: write it without quotes, or convert it first."
        where = f"{name}: {part}" if part else name
        raise SettingError(f"{where}: expected {refused}, got {show(value)}.{hint}", name) from None


# -- checks


def show(value: Any) -> str:
    """`value` and its type, cut to one short line, for messages. Safe for values that refer to themselves."""
    return f"{_short.repr(value)} ({type(value).__name__})"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def is_finite(value: Any) -> bool:
    """Whether `value` is a number that a float can hold: no text, no True or False, not infinite, not NaN."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond 1e308
        return False


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return "" if high is None else f" of at most {high}"
    return f" of at least {low}" if high is None else f" from {low} to {high}"


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def whole_number(name: str, value: Any, low: int = 0, error: type[Exception] = ConfigError) -> int:
    """An argument as an int of at least `low`; whole floats such as 1e3 count, True and texts do not.

    Raises:
        ConfigError: it is something else; or the `error` asked for.
    """
    try:
        return whole(low)(value)
    except Refused as refused:
        raise error(f"{name}: expected {refused}, got {show(value)}.") from None


def whole(low: int | None = None, high: int | None = None, also: tuple[int, ...] = ()) -> Check:
    """A whole number within [low, high], or one of `also`."""
    phrase = f"a whole number{_range(low, high)}" + "".join(f" or {a}" for a in also)

    def check(value: Any) -> int:
        if not is_finite(value) or value != int(value) or (value not in also and not _within(value, low, high)):
            raise Refused(phrase)
        return int(value)

    return check


def number(low: float | None = None, high: float | None = None, above: float | None = None, below: float | None = None) -> Check:
    """A finite number within [low, high], larger than `above` and smaller than `below`."""
    phrase = f"a finite number{_range(low, high)}" + (f" larger than {above}" if above is not None else "")
    phrase += f"{' and' if above is not None or low is not None else ''} smaller than {below}" if below is not None else ""

    def check(value: Any) -> float:
        if not is_finite(value) or not _within(value, low, high):
            raise Refused(phrase)
        if (above is not None and value <= above) or (below is not None and value >= below):
            raise Refused(phrase)
        return float(value)

    return check


def flag(value: Any) -> bool:
    """True or False; nothing else counts as either."""
    if not isinstance(value, bool):
        raise Refused("True or False")
    return value


def text(value: Any) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise Refused("a text that is not empty")
    return value


def day(value: Any) -> str:
    """A date as ISO 8601 writes it, such as "2026-11-29"."""
    try:
        return datetime.date.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        raise Refused('a date such as "2026-11-29"') from None


def choice(*allowed: str) -> Check:
    """One of a few texts."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise Refused(f"{', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}")
        return value

    return check


def flag_or(*words: str) -> Check:
    """True, False, or one of a few texts."""
    phrase = f"True, False or {' or '.join(map(repr, words))}"

    def check(value: Any) -> bool | str:
        if not isinstance(value, bool) and not (isinstance(value, str) and value in words):
            raise Refused(phrase)
        return value

    return check


def optional(check: Check) -> Check:
    """None, or what `check` takes."""

    def check_or_none(value: Any) -> Any:
        try:
            return None if value is None else check(value)
        except Refused as refused:
            raise Refused(f"{refused} (or None)") from None

    return check_or_none


def only(allowed: Any, reason: str) -> Check:
    """Exactly `allowed`; `reason` says why nothing else can be."""

    def check(value: Any) -> Any:
        if value is not allowed:
            raise Refused(f"{allowed} ({reason})")
        return value

    return check


def pair(first: Check, second: Check) -> Check:
    """Two values, each with a check of its own."""

    def check(value: Any) -> tuple:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable) or len(value := list(value)) != 2:
            raise Refused("two values, such as [0.9, 0.999]")
        return first(value[0]), second(value[1])

    return check


def patterns(value: Any) -> tuple[str, ...]:
    """Name patterns as a tuple; a single text counts as one pattern."""
    value = (value,) if isinstance(value, str) else value
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise Refused('a list of name patterns, such as ["*.mlp.*"]')
    value = tuple(value)
    if not all(isinstance(v, str) and v for v in value):
        raise Refused('a list of name patterns, such as ["*.mlp.*"], each a text that is not empty')
    return value


def factors(value: Any) -> dict[str, float]:
    """Name pattern -> factor, in the order given."""
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and k for k in value):
        raise Refused('name patterns with a factor each, such as {"*embed*": 0.1}')
    factor = number(low=0.0)
    try:
        return {k: factor(v) for k, v in value.items()}
    except Refused as refused:
        raise Refused(f"name patterns with a factor each, every factor {refused}") from None


def anything(value: Any) -> Any:
    """Whatever it is: it is checked where more is known."""
    return value


# -- YAML files

_MAX_BYTES = 1_000_000  # a settings file is a few kB; a model or data file given by mistake is not read
_MAX_VALUES = 100_000
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
    r"""^(?: [-+]?(?:[0-9][0-9_]*)?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
          | [-+]?[0-9][0-9_]*\.(?:[eE][-+]?[0-9]+)?
          | [-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
          | [-+]?\.(?:inf|Inf|INF) | \.(?:nan|NaN|NAN))$""",
    re.X,
)


class YamlSettings(dict):
    """Settings from a file, with where they stand.

    Attributes:
        path: the file, as given.
        lines: key -> line, counted from 1.
    """

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.lines: dict[str, int] = {}

    def where(self, key: str | None) -> str:
        """`"file:line"` of a key, or the file alone."""
        return f"{self.path}:{self.lines[key]}" if key in self.lines else self.path

    def placed(self, error: SettingError) -> SettingError:
        """The error with the file and line of its setting in front."""
        return SettingError(f"{self.where(error.setting)}: {error}", error.setting)


def _numbers_of_yaml_1_2(resolvers: dict) -> dict:
    """YAML 1.1's table of plain values (first character -> (tag, pattern)) with other numbers, and with no dates."""
    replaced = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}
    table = {first: [r for r in rules if r[0] not in replaced] for first, rules in resolvers.items()}
    for first in "-+0123456789.":
        table[first] = [*table.get(first, []), ("tag:yaml.org,2002:int", _INT), ("tag:yaml.org,2002:float", _FLOAT)]
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _numbers_of_yaml_1_2(yaml.SafeLoader.yaml_implicit_resolvers)

    def construct_mapping(self, node, deep=False):
        seen: dict[Any, int] = {}
        for key_node, _ in getattr(node, "value", ()):
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                problem = f"the key {key_node.value!r} is given twice, here and on line {seen[key_node.value]}; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen[key_node.value] = line
        return super().construct_mapping(node, deep=deep)


_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node).replace("_", "")))


class _Dumper(yaml.SafeDumper):
    # The same table as the reader's decides which texts need quotes, so "1e-5" as a text stays one.
    yaml_implicit_resolvers = _numbers_of_yaml_1_2(yaml.SafeDumper.yaml_implicit_resolvers)

    def ignore_aliases(self, data):
        return True


def read_value(text: str) -> Any:
    """What a text means in a YAML file: "1e-4" is a number, "true" a truth value, "[a, b]" a list.

    Raises:
        ConfigError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{text[:80]!r}: not a YAML value: {' '.join(str(error).split())[:200]}.") from None


_READ_AS = {"bool": bool, "int": (int, float), "float": (int, float), "dict": dict, "tuple": list}  # in an annotation -> in YAML


def as_typed(value: Any, kind: str) -> Any:
    """A text given for a setting that is no text, as the value it stands for: a flag's, or one that papermill passes.

    Anything else stays as it is, and the check says what was expected. `kind` is the field's annotation, such as "int | None".
    """
    kinds = {part.split("[")[0].strip() for part in kind.split("|")}
    types = tuple(_READ_AS[kind] for kind in sorted(kinds & _READ_AS.keys()))
    if not isinstance(value, str) or not types:
        return value
    text = value.strip()
    if text.lower() in ("none", "null") and "None" in kinds:
        return None
    if "str" in kinds and "bool" not in kinds and not text.startswith("{"):
        return value
    try:
        meant = read_value(text)
    except ConfigError:
        return value
    return meant if isinstance(meant, types) and isinstance(meant, bool) == ("bool" in kinds) else value


def read_yaml(path: str | os.PathLike) -> YamlSettings:
    """The settings in a YAML file. Hyphens in the names of the outermost keys become underscores. An empty file gives none.

    Raises:
        ConfigError: the file cannot be read, is not YAML, is not a mapping, or gives a key twice; with file and line.
    """
    name = os.fspath(path)
    text = _read_text(Path(path), name)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _check_size(node, {})
        values = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{at}: {error.problem or error.context or 'not valid YAML'}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise ConfigError(f"{name}: expected YAML settings, one `name: value` a line; {problem}.") from None
    if not isinstance(values, (dict, type(None))):
        raise ConfigError(f"{name}:1: expected settings, one `name: value` a line, got a {type(values).__name__}.")
    places = {key.value: key.start_mark.line + 1 for key, _ in node.value if isinstance(key, yaml.ScalarNode)} if values else {}
    settings = YamlSettings(name)
    for key, value in (values or {}).items():
        if not isinstance(key, str):
            raise ConfigError(f"{name}: expected names of settings as keys, got {key!r} ({type(key).__name__}).")
        plain, line = key.replace("-", "_"), places.get(key, 1)
        if plain in settings:
            raise ConfigError(f"{name}:{line}: {key!r} and the key on line {settings.lines[plain]} are the same setting; keep one.")
        settings[plain], settings.lines[plain] = value, line
    return settings


def _check_size(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """How many values a node stands for when each alias is written out; a few lines of aliases of aliases can be billions.

    Raises:
        MarkedYAMLError: too many, or a value that contains itself.
    """
    if id(node) in sizes:
        if sizes[id(node)] == 0:  # still being counted
            raise yaml.MarkedYAMLError(problem="a value contains itself; write it out", problem_mark=node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0
    inner = node.value if isinstance(node, (yaml.SequenceNode, yaml.MappingNode)) else ()
    size = 1 + sum(_check_size(part, sizes) for item in inner for part in (item if isinstance(item, tuple) else (item,)))
    if size > _MAX_VALUES:
        problem = f"aliases (*name) make more than {_MAX_VALUES:,} values of it; settings are a few dozen. Write them out"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    sizes[id(node)] = size
    return size


def _read_text(path: Path, name: str) -> str:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ConfigError(f"{name}: expected a YAML settings file, found something that is no file.")
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{name}: expected a YAML settings file, got one of {path.stat().st_size:,} bytes (at most {_MAX_BYTES:,}).")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: expected UTF-8 text; byte {error.start} is not. Save the file as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}. Check the path.") from None


def write_yaml(path: str | os.PathLike, values: Mapping[str, Any], heading: str = "") -> None:
    """Write settings so that `read_yaml` gives them back, below a comment where one is given. The file is replaced in one move.

    Raises:
        ConfigError: the file cannot be written.
    """
    target = Path(path)
    text = f"{heading}\n" if heading else ""
    text += yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    if not target.parent.is_dir():
        raise ConfigError(f"{os.fspath(path)}: cannot be written: there is no folder {target.parent}. Make it first.")
    try:
        write_text(target, text)
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)}: cannot be written: {error.strerror}. Check the folder.") from None
