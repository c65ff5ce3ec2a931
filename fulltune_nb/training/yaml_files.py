"""YAML settings files: read strictly, with the line of every key, and written so that they read back the same.

PyYAML follows YAML 1.1, where `1e-5` is a text, `0100` is 64 and a key given twice silently counts once. Here `1e-5` and
`1e3` are numbers, whole numbers are decimal, and a key given twice is an error. Only plain values are read: tags that would
build Python objects are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fulltune_nb.errors import ConfigError
from fulltune_nb.files import write_text

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

    def __init__(self, values: Mapping[str, Any], path: str, lines: Mapping[str, int]):
        super().__init__(values)
        self.path = path
        self.lines = dict(lines)

    def where(self, key: str | None) -> str:
        """`"file:line"` of a key, or the file alone."""
        return f"{self.path}:{self.lines[key]}" if key in self.lines else self.path


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
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _float(loader.construct_scalar(node)))


def _float(text: str) -> float:
    return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))


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
    if values is None:
        return YamlSettings({}, name, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{name}:1: expected settings, one `name: value` a line, got a {type(values).__name__}.")
    lines = {key.value: key.start_mark.line + 1 for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
    return _with_underscores(values, name, lines)


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


def _with_underscores(values: dict, name: str, lines: dict[str, int]) -> YamlSettings:
    result: dict[str, Any] = {}
    at: dict[str, int] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"{name}: expected names of settings as keys, got {key!r} ({type(key).__name__}).")
        plain = key.replace("-", "_")
        line = lines.get(key, 1)
        if plain in result:
            raise ConfigError(f"{name}:{line}: {key!r} and the key on line {at[plain]} are the same setting; keep one.")
        result[plain], at[plain] = value, line
    return YamlSettings(result, name, at)


def write_yaml(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
    """Write settings so that `read_yaml` gives them back. The file is replaced in one move.

    Raises:
        ConfigError: the file cannot be written.
    """
    target = Path(path)
    text = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    if not target.parent.is_dir():
        raise ConfigError(f"{os.fspath(path)}: cannot be written: there is no folder {target.parent}. Make it first.")
    try:
        write_text(target, text)
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)}: cannot be written: {error.strerror}. Check the folder.") from None
