"""Builds the site: `python docs/build.py SITE`. Every notebook is executed once, and its executed copy is a page. Warnings are errors.

    python docs/build.py site                          executes the notebooks, builds the site
    python docs/build.py site --executed FOLDER        takes executed copies from there; what is missing is executed into it

Needs `pip install -e '.[docs]'`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import yaml

import fulltune_nb as ft
from fulltune_nb.experiments.execution import execute

ROOT = Path(__file__).parents[1]
DOCS, NOTEBOOKS = ROOT / "docs", ROOT / "notebooks"


def main() -> int:
    """Builds; returns mkdocs's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="a new folder for the site")
    parser.add_argument("--executed", type=Path, help="folder of executed notebooks")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fulltune_nb-docs-") as temporary:
        work = Path(temporary)
        executed = (arguments.executed or work / "executed").resolve()
        execute_all(executed, work)
        pages = work / "docs"
        copy_pages(pages, executed)
        write_config(work / "mkdocs.yml", pages)
        # Not --quiet: what it does not print, --strict does not count.
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(work / "mkdocs.yml")]
        os.environ["NO_MKDOCS_2_WARNING"] = "1"  # about the theme's future, not about these pages
        return subprocess.run([*command, "-d", str(arguments.site.resolve())], check=False).returncode


def execute_all(executed: Path, work: Path) -> None:
    """Executes every notebook that has no executed copy yet, each in a folder of its own, and refuses warnings in its outputs."""
    executed.mkdir(parents=True, exist_ok=True)
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        copy = executed / notebook.name
        if not copy.exists():
            started = time.monotonic()
            place = work / notebook.stem
            place.mkdir()
            parameters = {"out": str(place / "out")} if notebook.name.startswith("00") else {}
            execute(notebook, copy, parameters)
            print(f"{notebook.name}: {time.monotonic() - started:.0f} s", flush=True)
        cells = nbformat.read(copy, as_version=4).cells
        warned = [o.text for cell in cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]
        if warned:
            raise SystemExit(f"{notebook.name} writes to standard error:\n{''.join(warned)}")


def copy_pages(pages: Path, executed: Path) -> None:
    """Pages, pictures and notebooks, with the links between them as they are on the site."""
    shutil.copytree(DOCS, pages, ignore=shutil.ignore_patterns("*.py", "mkdocs.yml", "__pycache__"))
    shutil.copy(ROOT / "README.md", pages / "readme.md")
    shutil.copytree(executed, pages / "notebooks", ignore=lambda _, names: [name for name in names if not name.endswith(".ipynb")])
    for page in pages.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        if page.name == "readme.md":
            text = text.replace("](docs/", "](")
        up = "../" * (len(page.relative_to(pages).parts) - 1)
        text = re.sub(r"\]\((\.\./)*notebooks/", f"]({up}notebooks/", text)
        text = re.sub(r"\]\(((?:\.\./)*)\.\./README\.md", r"](\1readme.md", text)
        page.write_text(text, encoding="utf-8")
    (pages / "reference.md").write_text(reference(), encoding="utf-8")


def reference() -> str:
    """A page with the docstring of every public name."""
    parts = ["# Reference\n\nFrom the docstrings, by name. [API](api.md) is the short form.\n"]
    for name in ft.__all__:
        path = f"{getattr(ft, name).__module__}.{name}"
        parts += settings_reference(path) if name == "TrainConfig" else [f"::: {path}\n"]
    return "\n".join(parts)


def settings_reference(path: str) -> list[str]:
    """`TrainConfig`, with a table of its fields, whose help is no docstring, in place of its signature."""
    fields = dataclasses.fields(ft.TrainConfig)
    rows = [f"| `{field.name}` | `{getattr(ft.TrainConfig, field.name, '{}')!r}` | {field.metadata['help']} |" for field in fields]
    methods = [name for name in vars(ft.TrainConfig) if not name.startswith("_") and name not in {field.name for field in fields}]
    table = "\n".join(["| setting | default | |", "|---|---|---|", *rows, ""])
    return [
        f"::: {path}\n    options: {{show_signature: false, members: []}}\n",
        table,
        *(f"::: {path}.{name}\n    options: {{heading_level: 3}}\n" for name in methods),
    ]


def write_config(path: Path, pages: Path) -> None:
    """mkdocs's settings with the notebooks and the decisions that there are."""
    settings = yaml.safe_load((DOCS / "mkdocs.yml").read_text(encoding="utf-8"))
    settings["docs_dir"] = str(pages)
    lists = {"NOTEBOOKS": pages / "notebooks", "DECISIONS": pages / "decisions"}
    for entry in settings["nav"]:
        for title, value in entry.items() if isinstance(entry, dict) else ():
            if isinstance(value, str) and value in lists:
                entry[title] = [p.relative_to(pages).as_posix() for p in sorted(lists[value].iterdir())]
    settings["plugins"][2]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(ROOT)]
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
