"""Every error this package raises on purpose.

    FulltuneError
    ├── ConfigError            a setting has the wrong name, type or value
    ├── DataError              rows or files that cannot be read; `.problems` lists them by file and line
    ├── ModelError             a model folder that cannot be loaded or saved
    │   └── WeightsError       tensors missing, unexpected or of another shape; listed in the message
    ├── TrainingError          a step or a run that cannot go on
    │   ├── NonFiniteError     loss or gradient is NaN or inf; nothing was updated
    │   ├── TornStepError      a step failed when a part of the weights had been updated
    │   └── MemoryLimitError   a run that would need more memory than the machine has
    ├── CheckpointError        a checkpoint that cannot be written, read or resumed from
    ├── GenerationError        a prompt or a sampling setting that cannot be used
    └── MissingDependencyError an optional package is not installed; the message names the install command

Each message says what was expected, what was found and where, and what to do.
"""

from __future__ import annotations


class FulltuneError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(FulltuneError, ValueError):
    """A setting has the wrong name, type or value."""


class DataError(FulltuneError, ValueError):
    """Rows or files that cannot be read.

    Attributes:
        problems: one line for each bad row, `"train.jsonl:12: ..."`; all of them, while the message shows the first 20.
    """

    def __init__(self, message: str, problems: list[str] | None = None):
        super().__init__(message)
        self.problems = list(problems or [])


class ModelError(FulltuneError, ValueError):
    """A model folder that cannot be loaded or saved."""


class WeightsError(ModelError):
    """Tensors are missing, unexpected or of another shape than the model's."""


class TrainingError(FulltuneError, RuntimeError):
    """A step or a run that cannot go on."""


class NonFiniteError(TrainingError):
    """Loss or gradient is NaN or inf. Weights, optimizer and data position are as before the step."""


class TornStepError(TrainingError):
    """A step failed when a part of the weights had been updated: some are new, some old. Go back to a snapshot or checkpoint."""


class MemoryLimitError(TrainingError):
    """A run would need more memory than this machine has. The message says what would make it fit."""


class CheckpointError(FulltuneError, RuntimeError):
    """A checkpoint that cannot be written, read or resumed from."""


class GenerationError(FulltuneError, ValueError):
    """A prompt or a sampling setting that cannot be used."""


class MissingDependencyError(FulltuneError, ImportError):
    """An optional package is not installed; the message names the install command."""
