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
from collections.abc import Mapping
from pathlib import Path

import nbformat
import yaml

import fulltune_nb as ft
from fulltune_nb.experiments.execution import execute

ROOT = Path(__file__).parents[1]
DOCS, NOTEBOOKS = ROOT / "docs", ROOT / "notebooks"
FROM_THE_TOP = ("README", "CONTRIBUTING", "SECURITY")
"""Pages of the site that stand at the top of the repository."""
FOLDERS = {".": "Pages", "howto": "How to", "decisions": "Optional"}


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
        code = subprocess.run([*command, "-d", str(arguments.site.resolve())], check=False).returncode
        if code == 0:
            write_for_models(pages, arguments.site)
        return code


def write_for_models(pages: Path, site: Path) -> None:
    """`llms.txt`, by which language models find their way (llmstxt.org), and the pages as they were written, to which it leads."""
    written = sorted(pages.rglob("*.md"), key=lambda page: (list(FOLDERS).index(page.relative_to(pages).parent.as_posix()), page))
    for page in written:
        shutil.copy(page, site / page.relative_to(pages))
    (site / "llms.txt").write_text(for_models({page.relative_to(pages).as_posix(): page.read_text("utf-8") for page in written}), "utf-8")


def for_models(pages: Mapping[str, str]) -> str:
    """What `llms.txt` says of pages, path -> text: the title and the first sentence of each, those of a folder under its name."""
    lines = ["# fulltune_nb", "", "> Full fine-tuning of language models in a notebook, with MLX: Python API, commands, notebooks."]
    folder = None
    for path, text in pages.items():
        if (own := Path(path).parent.as_posix()) != folder:
            folder = own
            lines += ["", f"## {FOLDERS[folder]}", ""]
        title, _, rest = text.partition("\n")
        paragraph = next((part for part in rest.split("\n\n") if part.strip() and part.lstrip()[0] not in "#|<!`-["), "")
        sentence = re.split(r"(?<=\.)\s", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split())), maxsplit=1)[0]
        lines.append(f"- [{title.lstrip('# ')}]({path}): {sentence}".removesuffix(": "))
    return "\n".join([*lines, ""])


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
    for name in FROM_THE_TOP:
        shutil.copy(ROOT / f"{name}.md", pages / f"{name.lower()}.md")
    shutil.copytree(executed, pages / "notebooks", ignore=lambda _, names: [name for name in names if not name.endswith(".ipynb")])
    for page in pages.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        if page.name in {f"{name.lower()}.md" for name in FROM_THE_TOP}:
            text = re.sub(rf"\]\(({'|'.join(FROM_THE_TOP)})\.md", lambda found: f"]({found[1].lower()}.md", text.replace("](docs/", "]("))
        up = "../" * (len(page.relative_to(pages).parts) - 1)
        text = re.sub(r"\]\((\.\./)*notebooks/", f"]({up}notebooks/", text)
        text = re.sub(rf"\]\(((?:\.\./)*)\.\./({'|'.join(FROM_THE_TOP)})\.md", lambda found: f"]({found[1]}{found[2].lower()}.md", text)
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
    """`TrainConfig`, with tables of its fields, whose help is no docstring, in place of its signature."""
    fields = {field.name: field for field in dataclasses.fields(ft.TrainConfig)}
    tables = []
    for title, names in setting_groups((DOCS / "example_config.yaml").read_text("utf-8")).items():
        if own := [fields[name] for name in names if name in fields]:
            tables += [f"**{title}**", "", "| setting | type | default | |", "|---|---|---|---|"]
            for field in own:
                kind, default = str(field.type).replace("|", "\\|"), getattr(ft.TrainConfig, field.name, {})
                tables.append(f"| `{field.name}` | `{kind}` | `{default!r}` | {field.metadata['help']} |")
            tables.append("")
    methods = [name for name in vars(ft.TrainConfig) if not name.startswith("_") and name not in fields]
    return [
        f"::: {path}\n    options: {{show_signature: false, members: []}}\n",
        "\n".join(tables),
        *(f"::: {path}.{name}\n    options: {{heading_level: 3}}\n" for name in methods),
    ]


def setting_groups(example: str) -> dict[str, list[str]]:
    """Title -> names of settings, as the example of a settings file groups them: by a comment behind an empty line."""
    groups: dict[str, list[str]] = {}
    for part in example.split("\n\n")[1:]:
        title, *lines = part.splitlines()
        found = [name[1] for line in lines if (name := re.match(r"(?:# )?(\w+):", line))]
        groups[title.removeprefix("# ")] = list(dict.fromkeys(found))
    return groups


def write_config(path: Path, pages: Path) -> None:
    """mkdocs's settings with the notebooks and the decisions that there are."""
    settings = yaml.safe_load((DOCS / "mkdocs.yml").read_text(encoding="utf-8"))
    settings["docs_dir"] = str(pages)
    lists = {"NOTEBOOKS": pages / "notebooks", "DECISIONS": pages / "decisions"}
    entries = [entry for entry in settings["nav"] if isinstance(entry, dict)]
    for entry in entries:
        for title, value in entry.items():
            if isinstance(value, list):
                entries += [inner for inner in value if isinstance(inner, dict)]
            elif value in lists:
                entry[title] = [p.relative_to(pages).as_posix() for p in sorted(lists[value].iterdir())]
    (docstrings,) = [plugin["mkdocstrings"] for plugin in settings["plugins"] if "mkdocstrings" in plugin and isinstance(plugin, dict)]
    docstrings["handlers"]["python"]["paths"] = [str(ROOT)]
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
