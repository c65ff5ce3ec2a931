"""The house rules: imports point left only, the core shows nothing, files and functions stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

import fulltune_nb

PACKAGE = "fulltune_nb"
ROOT = Path(fulltune_nb.__file__).parent
# From left to right. A module may import what stands left of it, and its own group. A new one needs a place here.
LAYERS = [
    ["errors", "html", "frames", "svg"],
    ["files", "cpu", "device", "chat_template", "model_json", "settings", "system_info", "template_process", "tensor_files", "tokenizer"],
    ["models"],
    ["data"],
    ["training"],
    ["plots", "record", "record_keeper", "chart"],
    ["insight"],
    ["panels"],
    ["experiments", "course"],
    ["tiny", "command_line", "full", "generate", "chat", "serve", "convert", "export", "demo", "doctor", "ranks", "sweep", "__main__"],
]
PLACE = {name: place for place, names in enumerate(LAYERS) for name in names}
SHOWS = ("plots", "record", "record_keeper", "chart", "panels", "experiments", *LAYERS[-1])  # what may draw, print and import front ends
FRONT_ENDS = ("anywidget", "ipywidgets", "IPython", "matplotlib")
DATA_NEEDS = ("data", "errors", "html", "svg", "files", "settings", "chat_template", "tokenizer")
LINES_IN_FILE, LINES_IN_FUNCTION = 500, 60
LONGER = {"training/trainer.py"}  # the whole loop stands in one file

FILES = sorted(path for path in ROOT.rglob("*.py"))
CORE = [path for path in FILES if path.relative_to(ROOT).parts[0].removesuffix(".py") not in SHOWS]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(module: str) -> str:
    """`fulltune_nb.models.rope` -> `models`."""
    return module.split(".")[1]


@pytest.fixture(scope="module")
def imports() -> list[tuple[str, str]]:
    """Every import within the package, as (importer, imported), those inside functions too."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    return [(module, other) for module in sorted(graph.modules) for other in sorted(graph.find_modules_directly_imported_by(module))]


def test_every_module_has_a_place():
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert parts <= set(PLACE), "give new modules their place in LAYERS"


def test_imports_point_left(imports):
    wrong = [
        f"{importer} imports {imported}"
        for importer, imported in imports
        if importer != PACKAGE and imported != PACKAGE and PLACE[part_of(importer)] < PLACE[part_of(imported)]
    ]
    assert not wrong


def test_imports_go_in_no_circle(imports):
    """Those for type checkers only count too: who reads a module must be able to read what it builds on first."""
    needs = {importer: {imported for other, imported in imports if other == importer} for importer, _ in imports if importer != PACKAGE}
    while free := [module for module, others in needs.items() if not others & needs.keys() - {module}]:
        for module in free:
            del needs[module]
    assert not needs


def test_only_what_stands_on_the_right_uses_the_public_names(imports):
    wrong = [importer for importer, imported in imports if imported == PACKAGE and PLACE[part_of(importer)] < PLACE["panels"]]
    assert not wrong, "import the module itself"


def test_data_needs_nothing_of_the_models(imports):
    wrong = [
        f"{importer} imports {imported}"
        for importer, imported in imports
        if importer.startswith(f"{PACKAGE}.data") and part_of(imported) not in DATA_NEEDS
    ]
    assert not wrong


def imported_packages(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_imports_no_front_end(path):
    assert not set(imported_packages(ast.parse(path.read_text("utf-8")))) & set(FRONT_ENDS)


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_never_prints(path):
    wrong = [node.lineno for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.expr) and writes(node)]
    assert not wrong, f"{name_of(path)} writes at lines {wrong}: return it, and let panels and commands show it"


def writes(node: ast.expr) -> bool:
    text = ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""
    return text in ("print", "sys.stdout", "sys.stderr")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_is_printed_or_warned_of_is_made_printable(path):
    shows = ("print", "warnings.warn", "self._bar.write")
    calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func) in shows]
    wrong = [call.lineno for call in calls if not all(map(spelled, call.args[:1]))]
    assert not wrong, f"{name_of(path)}, lines {wrong}: what comes from rows and files goes through html.printable"


def spelled(text: ast.expr) -> bool:
    if isinstance(text, ast.BinOp):
        return spelled(text.left) and spelled(text.right)
    if isinstance(text, ast.Constant) or isinstance(text, ast.Name) and text.id.isupper():  # a constant of the module
        return True
    return isinstance(text, ast.Call) and ast.unparse(text.func) in ("printable", "html.printable", "_one_line", "_for_output")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short(path):
    assert len(path.read_text("utf-8").splitlines()) <= LINES_IN_FILE or name_of(path) in LONGER


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_are_short(path):
    functions = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    wrong = {f.name: lines for f in functions if (lines := lines_of(f)) > LINES_IN_FUNCTION}
    assert not wrong


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the function without its docstring."""
    total = function.end_lineno - function.lineno + 1
    first = function.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return total - (first.end_lineno - first.lineno + 1 if has_docstring else 0)


def test_nothing_is_patched_in_by_star_imports():
    stars = [
        name_of(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert not stars
