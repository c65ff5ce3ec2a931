"""The documentation says what is so: names, signatures, links, commands."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import fulltune_nb as ft

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")), *sorted(DOCS.rglob("*.md"))]
API = (DOCS / "api.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def doc_program(name: str) -> Any:
    """One of the programs in docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parameters(call: str) -> list[str]:
    """`f(a, *, b=1, ...)` -> ["a", "*", "b=1"]; what the dots stand for is not compared."""
    return [part.strip() for part in re.fullmatch(r"[\w.]+\((.*?)(?:, \.\.\.)?\)", call).group(1).split(", ") if part.strip()]


def documented() -> dict[str, str]:
    return {re.match(r"ft\.(\w+)", call).group(1): call for call in re.findall(r"^### `(ft\..*)`$", API, re.MULTILINE)}


@pytest.mark.parametrize("name", ft.__all__)
def test_every_public_name_is_in_the_api(name):
    assert f"`ft.{name}" in API


@pytest.mark.parametrize("name", sorted(documented()))
def test_signatures_in_the_api_are_the_real_ones(name):
    signature = inspect.signature(getattr(ft, name))
    bare = signature.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD],
        return_annotation=inspect.Signature.empty,
    )
    real = [part for part in str(bare)[1:-1].split(", ") if part != "/"]
    told = parameters(documented()[name])
    assert told == (real[: len(told)] if documented()[name].endswith("...)") else real)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_the_picture_of_the_house_is_what_the_imports_say():
    draw_house = doc_program("draw_house")
    assert draw_house.PICTURE.read_text("utf-8") == draw_house.draw(), "run python -m docs.draw_house"


def test_the_api_names_every_command():
    from fulltune_nb.__main__ import COMMANDS

    assert [name for name in COMMANDS if f"`{name}`" not in API.split("## Commands")[1]] == []


def links_of(page: Path) -> set[Path]:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8"))
    return {(page.parent / target).resolve() for target in targets if target.endswith(".md")}


def test_every_page_is_within_two_clicks_of_the_first():
    first = links_of(DOCS / "index.md")
    reached = first.union(*map(links_of, first))
    assert {page.resolve() for page in PAGES} - {DOCS / "index.md"} <= reached


def test_every_page_of_the_site_is_in_its_menu_but_those_about_the_past():
    settings = (DOCS / "mkdocs.yml").read_text("utf-8")
    menu, left_out = settings.split("\nnav:\n")[1], {"benchmarks.md", "log.md", "changelog.md"}
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md") if page.parent.name != "decisions"}
    assert {page for page in pages if page not in menu} == left_out
    assert all(f"/{page}" in settings for page in left_out)


def test_the_reference_has_every_setting_once_in_a_group_with_its_type():
    tables = doc_program("build").settings_reference("x")[1]
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", tables, re.MULTILINE)
    assert sorted(rows) == sorted((field.name, str(field.type).replace("|", "\\|")) for field in dataclasses.fields(ft.TrainConfig))
    assert tables.count("**Memory**") == 1


def test_llms_txt_names_every_page_with_what_it_is():
    pages = {"guide.md": "# Guide\n\nFrom [here](a.md) to there. More.\n", "howto/a.md": "# A\n\n| x |\n\nHow.\n"}
    text = doc_program("build").for_models(pages)
    assert text.endswith("## Pages\n\n- [Guide](guide.md): From here to there.\n\n## How to\n\n- [A](howto/a.md): How.\n")


def test_the_index_lists_every_decision_by_its_title():
    index = (DOCS / "index.md").read_text("utf-8")
    for page in sorted((DOCS / "decisions").glob("*.md")):
        title = page.read_text("utf-8").splitlines()[0].removeprefix("# ")
        assert f"[{title}](decisions/{page.name})" in index
        assert title.startswith(f"{page.name[:4]}: ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_are_python_and_use_names_that_exist(page):
    for block in code_blocks(page.read_text("utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ft":
                assert hasattr(ft, node.attr), node.attr


def test_the_readme_has_the_two_commands_first_and_once_each():
    blocks = [block.strip() for block in code_blocks(README, "bash")]
    assert blocks[:2] == ["pip install -e '.[cpu,notebook]' && python -m fulltune_nb.demo", "pip install -e '.[cpu,test]' && pytest"]
    assert all(len(re.findall(rf"^{re.escape(block)}$", README, re.MULTILINE)) == 1 for block in blocks[:2])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_use_flags_that_exist(page):
    from fulltune_nb.__main__ import COMMANDS

    modules = {name: module for name, (module, _, _) in COMMANDS.items()} | {"full": "full"}
    for name, rest in re.findall(r"^(?:fulltune |python -m fulltune_nb[. ])(\w+)(?![\w.])(.*)$", page.read_text("utf-8"), re.MULTILINE):
        parser = importlib.import_module(f"fulltune_nb.{modules[name]}").build_parser()
        flags = {flag for action in parser._actions for flag in action.option_strings}
        own = rest.partition(" -- ")[0]  # behind it stands another command
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", own)) <= flags
