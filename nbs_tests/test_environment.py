"""`environment.yml` and `pyproject.toml` say the same, and the same things can be installed everywhere."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
EXTRAS = PROJECT["optional-dependencies"]
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64", "extra": ""}
MACOS = {"sys_platform": "darwin", "platform_machine": "arm64", "extra": ""}


def conda_packages() -> dict[str, SpecifierSet]:
    specs = [Requirement(line) for line in ENVIRONMENT["dependencies"] if isinstance(line, str)]
    return {spec.name: spec.specifier for spec in specs}


def pip_lines() -> list[str]:
    return next(entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))


def needed(extra: str, platform: dict[str, str]) -> set[str]:
    """Names of the packages that an extra adds on a platform."""
    found = [Requirement(line) for line in EXTRAS[extra]]
    return {entry.name for entry in found if entry.marker is None or entry.marker.evaluate(platform)}


def test_the_environment_installs_this_project_with_an_extra_that_exists():
    (line,) = pip_lines()
    extra = re.fullmatch(r"-e \.\[(\w+)\]", line).group(1)
    assert extra in EXTRAS
    assert "pip" in conda_packages()  # else conda warns, and takes a pip from elsewhere


def test_every_extra_is_told_where_people_install():
    page = (ROOT / "docs" / "howto" / "install.md").read_text("utf-8")
    assert [extra for extra in EXTRAS if f"`{extra}`" not in page] == []


def test_extras_that_others_include_exist():
    own = [Requirement(line) for extra in EXTRAS.values() for line in extra if Requirement(line).name == PROJECT["name"]]
    assert own and all(included in EXTRAS for line in own for included in line.extras)


def test_both_ask_for_the_same_python():
    assert conda_packages()["python"] == SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(">=3.11")


def test_what_conda_installs_is_not_asked_for_in_another_version_by_pip():
    by_pip = {Requirement(line).name: Requirement(line).specifier for line in PROJECT["dependencies"]}
    for name, specifier in conda_packages().items():
        assert by_pip.get(name, specifier) == specifier


def test_the_environment_brings_the_blas_that_mlx_needs_on_linux():
    assert "libopenblas" in conda_packages()
    assert ENVIRONMENT["channels"] == ["conda-forge"]  # where libopenblas exists for Linux and macOS


def test_on_macos_the_cpu_extra_adds_nothing():
    assert needed("cpu", MACOS) == needed("cuda12", MACOS) == needed("cuda13", MACOS) == set()


def test_the_cpu_and_cuda_backends_of_mlx_are_never_asked_for_together():
    assert needed("cpu", LINUX) == {"mlx-cpu", "scipy-openblas32"}
    for extra in ("cuda12", "cuda13"):
        assert needed(extra, LINUX) == {"mlx"}
        assert Requirement(EXTRAS[extra][0]).extras == {extra}
    assert not [line for line in PROJECT["dependencies"] if re.match(r"mlx[-\[]", line)]


FLOORS = {"mlx": "0.32", "transformers": "5", "ipywidgets": "8.1", "anywidget": "0.9.13", "jupyterlab": "4.4", "ipykernel": "6.31"}


@pytest.mark.parametrize("name", FLOORS)
def test_floors_are_those_of_the_documentation(name):
    (line,) = [line for line in [*PROJECT["dependencies"], *EXTRAS["notebook"]] if Requirement(line).name == name]
    assert Requirement(line).specifier == SpecifierSet(f">={FLOORS[name]}")
    assert f"{name} {FLOORS[name]}" in (ROOT / "docs" / "guide.md").read_text("utf-8")


def test_everything_the_package_imports_is_declared():
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    declared = {Requirement(line).name.lower().replace("-", "_") for line in lines}
    optional = {"sentencepiece"}  # asked for with a message that names it
    aliases = {"yaml": "pyyaml", "PIL": "pillow"}
    aliases |= {"IPython": "ipykernel", "traitlets": "ipykernel", "nbformat": "nbconvert", "tokenizers": "transformers"}
    aliases |= {"nbclient": "papermill", "sqlalchemy": "optuna"}
    imported = set()
    for path in (ROOT / "fulltune_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "optional_import":
                assert node.args[1].value in EXTRAS if isinstance(node.args[1], ast.Constant) else True, ast.unparse(node)
    third_party = {aliases.get(name, name) for name in imported if name not in sys.stdlib_module_names} - {"fulltune_nb"} - optional
    assert third_party <= declared | {"scipy_openblas32"}, third_party - declared
