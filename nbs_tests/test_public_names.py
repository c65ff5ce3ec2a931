"""What `import fulltune_nb` offers, and what it costs."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fulltune_nb as ft

NAMES = """
ChatPanel CheckpointError ConfigError DataError DataPanel EvalReport Event Example FulltuneError History LanguageModel LossChart
ModelError StepReport TrainConfig TrainPanel Trainer TrainingError compare evaluate_generation find_lr inspect launch load_data
load_model plot_loss plot_memory preflight search sweep system_info token_losses trace
""".split()
HEAVY = ("mlx", "numpy", "transformers", "tokenizers", "huggingface_hub", "matplotlib", "IPython", "ipywidgets", "anywidget")
HEAVY += ("pandas", "tqdm", "torch")


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_public_names_are_these():
    assert list(ft.__all__) == NAMES  # a name added or taken away here is a change for every user: note it in the changelog
    assert len(NAMES) <= 36


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_says_what_it_is(name):
    value = getattr(ft, name)
    assert value.__name__ == name and value.__module__.startswith("fulltune_nb.")
    assert inspect.getdoc(value)


def test_public_modules_are_there_without_an_import_of_their_own():
    assert python("import fulltune_nb as ft; assert ft.tiny.BASE_MODEL.is_dir() and ft.insight.Forgetting").returncode == 0


def test_dir_lists_the_public_names_and_nothing_else():
    assert [name for name in dir(ft) if not name.startswith("_")] == NAMES


def test_star_import_gives_the_public_names():
    found: dict = {}
    exec("from fulltune_nb import *", found)
    assert set(NAMES) == {name for name in found if not name.startswith("__")}


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="load_modle"):
        _ = ft.load_modle


def test_type_checkers_are_told_the_same_names_and_places():
    tree = ast.parse(Path(ft.__file__).read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert told == {name: f"fulltune_nb.{home}" for name, home in ft._HOMES.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_public_signature_has_types(name):
    value = getattr(ft, name)
    public = [member for key, member in vars(value).items() if not key.startswith("_") or key in ("__init__", "__getitem__", "__iter__")]
    own = public if inspect.isclass(value) else [value]
    own = [getattr(member, "fget", None) or getattr(member, "func", None) or getattr(member, "__func__", member) for member in own]
    for function in filter(inspect.isfunction, own):
        signature = inspect.signature(function)
        untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")]
        if function.__name__ != "__init__" and signature.return_annotation is signature.empty:
            untyped.append("return")
        assert not untyped, f"{name}.{function.__name__}: {untyped}"


def test_the_file_that_mypy_reads_uses_every_name():
    used = (Path(__file__).parent / "typed_use.py").read_text("utf-8")
    assert [name for name in NAMES if f"ft.{name}" not in used] == []


def test_every_error_class_is_a_fulltune_error_and_stands_in_errors():
    classes = [c for c in vars(ft.errors).values() if inspect.isclass(c) and c.__module__ == "fulltune_nb.errors"]
    assert len(classes) == 14 and all(issubclass(c, ft.FulltuneError) for c in classes)


def test_importing_is_quiet_and_leaves_the_heavy_packages_alone():
    code = f"import sys, fulltune_nb; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = python(code)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "[]", "")


def test_what_a_command_needs_for_its_help_leaves_numpy_and_mlx_alone():
    commands = ", ".join(f"fulltune_nb.{name}" for name in ("full", "generate", "chat", "serve", "export", "demo", "sweep"))
    result = python(f"import sys, {commands}; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "[]", "")


def test_loading_a_model_is_quiet_where_pytorch_is_not_installed(monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)  # mlx-lm sets it for the whole process
    code = """
import importlib.util, os
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "torch" else find(name, *rest)
import fulltune_nb as ft
from fulltune_nb import tiny
print(ft.load_model(tiny.BASE_MODEL).tokenizer.decode([300]) != "", "TRANSFORMERS_NO_ADVISORY_WARNINGS" in os.environ)
"""
    result = python(code)
    assert (result.stdout.strip(), result.stderr) == ("True False", "")


def test_system_info_stays_a_function_after_its_module_is_imported():
    result = python("import fulltune_nb as ft, fulltune_nb.system_info, importlib; importlib.import_module('fulltune_nb.system_info'); "
                    "assert callable(ft.system_info)")
    assert result.returncode == 0, result.stderr


def test_the_version_is_that_of_the_installed_package():
    assert ft.__version__ == importlib.metadata.version("fulltune_nb")


def test_progress_is_registered_once_however_often_the_package_is_run():
    from fulltune_nb.training.callbacks import default_callbacks

    importlib.reload(ft)
    assert [make.__name__ for make in default_callbacks].count("_show_progress") == 1
