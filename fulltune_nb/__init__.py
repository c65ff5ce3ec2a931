"""Full fine-tuning of language models in a notebook, with MLX.

    import fulltune_nb as ft

    lm = ft.load_model("path/or/hub-id")
    data = ft.load_data("folder", lm.tokenizer)
    trainer = ft.Trainer(lm, data, ft.TrainConfig(iters=600), run_dir="runs/a")
    trainer.run()
    ft.plot_loss(trainer.history)
    lm.save("my-model")

The names below load when they are first used: importing the package takes a moment and shows nothing. All error classes
stand in `fulltune_nb.errors`; those that programs catch are here too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fulltune_nb.cpu import ensure_fast_blas, ensure_kernel_folder

ensure_fast_blas()  # both before anything imports mlx.core: afterwards is too late
ensure_kernel_folder()

from fulltune_nb.data.watching import watchers  # noqa: E402
from fulltune_nb.errors import (  # noqa: E402
    CheckpointError,
    ConfigError,
    DataError,
    FulltuneError,
    ModelError,
    TrainingError,
    tells_missing_backend,
)
from fulltune_nb.sweep import sweep  # noqa: E402  at once: loaded later, the module would take the function's name
from fulltune_nb.system_info import package_versions, system_info  # noqa: E402  at once, for the same reason
from fulltune_nb.training.callbacks import default_callbacks  # noqa: E402

if TYPE_CHECKING:  # what `__getattr__` finds, told to type checkers and editors
    from fulltune_nb.chart import LossChart
    from fulltune_nb.data.dataset import load_data
    from fulltune_nb.data.example import Example
    from fulltune_nb.experiments.search import search
    from fulltune_nb.insight.comparison import compare
    from fulltune_nb.insight.generation_score import evaluate_generation
    from fulltune_nb.insight.learning_rate import find_lr
    from fulltune_nb.insight.losses import token_losses
    from fulltune_nb.insight.tracing import inspect, trace
    from fulltune_nb.models.language_model import LanguageModel, load_model
    from fulltune_nb.panels.chat import ChatPanel
    from fulltune_nb.panels.data import DataPanel
    from fulltune_nb.panels.train import TrainPanel
    from fulltune_nb.plots import plot_loss, plot_memory
    from fulltune_nb.training.config import TrainConfig
    from fulltune_nb.training.history import EvalReport, Event, History, StepReport
    from fulltune_nb.training.plan import preflight
    from fulltune_nb.training.start_ranks import launch
    from fulltune_nb.training.trainer import Trainer

__all__ = [
    "ChatPanel",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DataPanel",
    "EvalReport",
    "Event",
    "Example",
    "FulltuneError",
    "History",
    "LanguageModel",
    "LossChart",
    "ModelError",
    "StepReport",
    "TrainConfig",
    "TrainPanel",
    "Trainer",
    "TrainingError",
    "compare",
    "evaluate_generation",
    "find_lr",
    "inspect",
    "launch",
    "load_data",
    "load_model",
    "plot_loss",
    "plot_memory",
    "preflight",
    "search",
    "sweep",
    "system_info",
    "token_losses",
    "trace",
]

_HOMES = {
    "ChatPanel": "panels.chat",
    "DataPanel": "panels.data",
    "EvalReport": "training.history",
    "Event": "training.history",
    "Example": "data.example",
    "History": "training.history",
    "LanguageModel": "models.language_model",
    "LossChart": "chart",
    "StepReport": "training.history",
    "TrainConfig": "training.config",
    "TrainPanel": "panels.train",
    "Trainer": "training.trainer",
    "compare": "insight.comparison",
    "evaluate_generation": "insight.generation_score",
    "find_lr": "insight.learning_rate",
    "launch": "training.start_ranks",
    "inspect": "insight.tracing",
    "load_data": "data.dataset",
    "load_model": "models.language_model",
    "plot_loss": "plots",
    "plot_memory": "plots",
    "preflight": "training.plan",
    "search": "experiments.search",
    "token_losses": "insight.losses",
    "trace": "insight.tracing",
}

_MODULES = ("course", "insight", "tiny")
"""Modules that are public as a whole, such as `ft.tiny`."""


def __getattr__(name: str) -> Any:
    """Imports the module that a public name lives in, or is, the first time it is asked for."""
    if name == "__version__":
        return package_versions(["fulltune_nb"])["fulltune_nb"]
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")  # which becomes an attribute by itself
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with tells_missing_backend():
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


def _show_progress() -> Any:
    """What `Trainer.run` shows by default."""
    from fulltune_nb.panels.progress import progress

    return progress()


def _show_loading(what: str, total: int) -> Any:
    """What `load_data` shows where it takes long."""
    from fulltune_nb.panels.progress import LoadingProgress

    return LoadingProgress(what, total)


if not any(make.__name__ == _show_progress.__name__ for make in default_callbacks):  # the module may be run again (autoreload)
    default_callbacks.append(_show_progress)
    watchers.append(_show_loading)
