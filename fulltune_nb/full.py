"""`python -m fulltune_nb.full`: trains every weight of a model, tests it, and writes what can be taken home.

Every flag is a field of `Options` or of `TrainConfig`; its help is the field's docstring. The same names stand in the YAML file.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune_nb import settings as checks
from fulltune_nb.command_line import Parser, add_fields, field_names, run, start, termination_exits
from fulltune_nb.errors import ConfigError, DataError
from fulltune_nb.html import human_bytes
from fulltune_nb.settings import SettingError
from fulltune_nb.training.config import TrainConfig, read_yaml

if TYPE_CHECKING:
    from fulltune_nb.data.dataset import DataSet
    from fulltune_nb.models.language_model import LanguageModel
    from fulltune_nb.training.trainer import Trainer

EPILOG = """\
examples:
  python -m fulltune_nb.full --model mistralai/Mistral-7B-v0.1 --train --data data --iters 600
  python -m fulltune_nb.full --config config.yaml --train --test --learning-rate 3e-5
  python -m fulltune_nb.full --model-file model.npz --data data --test
  python -m fulltune_nb.full --train --run-dir runs/a --resume

Flags win over the YAML file, which is described in docs/example_config.yaml.
"""


@dataclass(frozen=True)
class Options:
    """What the command does and where things are; how it trains is `TrainConfig`.

    Raises:
        ConfigError: a value of the wrong type.
    """

    model: str | None = None
    """Model folder or hub id. May be left out where the model file tells where it came from."""
    train: bool = False
    """Train, and write the model file and a model folder."""
    test: bool = False
    """Print loss and perplexity on the test split."""
    data: str = "data"
    """Folder with train.jsonl, valid.jsonl and test.jsonl, or a data set of the hub, hf:org/name."""
    model_file: str = "model.npz"
    """The weights, .npz or .safetensors: written by training; read first if it exists, so that training goes on from it."""
    export: bool = True
    """Write a complete Hugging Face model folder after training."""
    export_dir: str | None = None
    """Where to. Left out: beside the model file, model_hf for model.npz."""
    dtype: str | None = None
    """float32 or bfloat16, in memory. Left out: as stored (float16 becomes float32)."""
    run_dir: str | None = None
    """Folder for checkpoints and metrics. Left out: the weights alone are saved, to the model file, every save_every steps."""
    resume: bool = False
    """Go on with the run in run_dir exactly where it stopped, with its settings and model, and its data unless data is given."""
    force: bool = False
    """Train even where the memory that is predicted is more than there is."""

    def __post_init__(self):
        for name in field_names(Options):
            is_flag = isinstance(getattr(Options, name), bool)
            checks.run(checks.flag if is_flag else checks.optional(checks.text), name, getattr(self, name))


@dataclass(frozen=True)
class Settings:
    """Everything that was asked for."""

    options: Options
    config: TrainConfig
    given: frozenset[str]
    """Names that stood in a flag or in the YAML file."""

    @property
    def model_file(self) -> Path:
        """Path of the model file."""
        return Path(self.options.model_file).expanduser()


def read_settings(flags: Mapping[str, Any]) -> Settings:
    """Joins flags and the YAML file; a flag wins, whatever its value.

    Args:
        flags: what stood on the command line, and nothing else; `config` is the YAML file's path.

    Raises:
        ConfigError: unknown names, wrong types or values; with file and line where they stood in the file.
    """
    own, path = field_names(Options), flags.get("config")
    options = {name: value for name, value in flags.items() if name in own}
    training = {name: value for name, value in flags.items() if name not in own and name != "config"}
    if path is None:
        return Settings(Options(**options), TrainConfig.from_dict(training), frozenset(flags))
    stored = read_yaml(path)
    config = TrainConfig.from_yaml(path, ignore=own, **training)
    try:
        checked = Options(**{**{name: value for name, value in stored.items() if name in own}, **options})
    except SettingError as error:
        where = "" if error.setting in flags else f"{stored.where(error.setting)}: "
        raise ConfigError(f"{where}{error}") from None
    return Settings(checked, config, frozenset(stored) | set(flags))


def check_paths(settings: Settings) -> None:
    """Finds out what is missing before a model is loaded.

    Raises:
        ConfigError, DataError, WeightsError: nothing to do, or something that is needed is not there.
    """
    from fulltune_nb.data.read import ENDINGS, folder_names, hub_id
    from fulltune_nb.tensor_files import check_ending

    options = settings.options
    if not options.train and not options.test:
        raise ConfigError("Nothing to do: give --train, --test or both.")
    check_ending(settings.model_file)
    if "model_file" in settings.given and not options.train and not settings.model_file.is_file():
        raise ConfigError(f"No weights file at {settings.model_file}. Train first, correct --model-file, or leave it out to test --model.")
    if options.resume:
        if not options.train or options.run_dir is None:
            raise ConfigError("--resume goes on with a training run: give --train and --run-dir too.")
        return  # the run knows its data; where it has moved, data says where to
    if options.train and options.run_dir is not None and _holds_run(options.run_dir):
        raise ConfigError(f"{options.run_dir} already holds a run. Add --resume to go on with it, or give another --run-dir.")
    if hub_id(options.data) is not None:
        return  # loading it tells what is missing
    folder = Path(options.data).expanduser()
    if not folder.is_dir():
        try:
            folder_names(folder)
        except DataError as error:
            raise DataError(f"--data: {error}") from None
    for split in ("train", "test"):
        if getattr(options, split) and not any((folder / f"{split}{ending}").is_file() for ending in ENDINGS):
            there = ", ".join(sorted(path.name for path in folder.glob("*.json*"))[:8]) or "no .jsonl file"
            raise DataError(f"--{split} needs {folder / f'{split}.jsonl'}; found there: {there}.")


def _holds_run(run_dir: str) -> bool:
    from fulltune_nb.training.run import holds_run

    return holds_run(Path(run_dir).expanduser())


def load(settings: Settings) -> tuple[LanguageModel, DataSet]:
    """Model and data, with a line for each thing worth knowing."""
    from fulltune_nb.data.dataset import load_data
    from fulltune_nb.models.model_file import load_with_model_file

    options, path = settings.options, settings.model_file
    if not path.is_file():
        if not options.train:
            print(f"There is no {path}: the model is tested as it is.")
        lm = load_with_model_file(options.model, None, options.dtype)
    else:
        again = "For a fresh start, remove it or name another --model-file."
        print(f"Training goes on from the weights in {path}. {again}" if options.train else f"Weights: {path}")
        lm = load_with_model_file(options.model, path, options.dtype)
        show_other_mask(path, settings.config.mask_prompt)
    print(f"Model: {lm!r}")
    stored = lm.config.raw.get("dtype") or lm.config.raw.get("torch_dtype")
    if stored == "float16" and options.dtype is None and options.train:
        print("The checkpoint is float16, in which updates underflow: it is trained in float32. --dtype bfloat16 takes half the memory.")
    data = load_data(options.data, lm.tokenizer, config=settings.config)
    show_data(data)
    return lm, data


def show_other_mask(path: Path, mask_prompt: bool) -> None:
    """Says so where the weights were trained on other tokens than those that count now: the losses then differ by nature."""
    from fulltune_nb.models.model_file import read_metadata

    before = read_metadata(path).get("mask_prompt")
    if before == "true" and not mask_prompt:
        print(f"{path} was trained on the answers only, and here the prompts count too: --mask-prompt leaves them out.")
    elif before == "false" and mask_prompt:
        print(f"{path} was trained on the prompts too, and here only the answers count: --no-mask-prompt counts both.")


def show_data(data: DataSet) -> None:
    """The data's size and notes, a line each."""
    print(f"Data: {data!r}")
    for note in data.notes:
        print(note)


def check_places(settings: Settings, lm: LanguageModel) -> None:
    """Finds out, before the training, whether what comes out of it would be written over the source model.

    Raises:
        ModelError, WeightsError: it would.
    """
    from fulltune_nb.models.folder import check_not_source
    from fulltune_nb.models.model_file import check_model_file

    check_model_file(settings.model_file, lm)
    if settings.options.export:
        check_not_source(export_place(settings), lm.source, "The model folder to be written,")


def show_memory(lm: LanguageModel, data: DataSet, config: TrainConfig) -> None:
    """The memory that training is predicted to need; too much of it is refused by the trainer, unless forced, with what to change."""
    from fulltune_nb.training.memory import preflight

    plan = preflight(lm, data, config)
    print(f"Memory: about {human_bytes(plan.peak)} at the peak, of {human_bytes(plan.limit)}.")


def make_trainer(settings: Settings) -> Trainer:
    """A new trainer, or the one of the run that is to be resumed."""
    from fulltune_nb.training.trainer import Trainer

    options = settings.options
    if not options.resume:
        lm, data = load(settings)
        check_places(settings, lm)
        show_memory(lm, data, settings.config)
        return Trainer(lm, data, settings.config, options.run_dir, options.force)
    trainer = Trainer.resume(options.run_dir, data=options.data if "data" in settings.given else None)
    check_places(settings, trainer.lm)
    print(f"Model: {trainer.lm!r}")
    show_data(trainer.data)
    for name in sorted(settings.given & field_names(TrainConfig)):
        now, then = getattr(settings.config, name), getattr(trainer.config, name)
        if now != then:
            raise ConfigError(f"{name} is {now!r} here and {then!r} in the run. A resumed run keeps its settings: leave this one out.")
    return trainer


class SaveModelFile:
    """Writes the weights every `save_every` steps, in runs that have no checkpoints."""

    def __init__(self, path: Path):
        self.path = path

    def on_step(self, trainer: Trainer, report: Any) -> None:
        """After a step."""
        if trainer.run_dir is None and report.step % trainer.config.save_every == 0 and report.step < trainer.total_steps:
            save_weights(trainer, self.path)


def save_weights(trainer: Trainer, path: Path) -> None:
    """The weights as they are now into the model file."""
    from fulltune_nb.models.model_file import save_model_file

    save_model_file(path, trainer.lm, trainer.data.train.format, trainer.config.mask_prompt)


def train(settings: Settings) -> Trainer:
    """Trains to the end or to an interrupt, and writes the model file and, at the end, the model folder."""
    from fulltune_nb.models.model_file import export_folder

    trainer, path = make_trainer(settings), settings.model_file
    try:
        trainer.run(callbacks=[SaveModelFile(path)])
    except SystemExit:  # SIGTERM: the run has paused at a whole step, like at an interrupt
        save_and_tell(settings, trainer)
        raise
    save_and_tell(settings, trainer)
    if not trainer.interrupted and settings.options.export:
        note = {"data_format": trainer.data.train.format, "base_model": trainer.lm.source, "steps": trainer.step_count}
        print(f"Model folder: {export_folder(trainer.lm, export_place(settings), note)}")
    return trainer


def save_and_tell(settings: Settings, trainer: Trainer) -> None:
    """Writes the model file, and says how to go on where the run is not done."""
    save_weights(trainer, settings.model_file)
    print(f"Weights after step {trainer.step_count}: {settings.model_file}")
    if not trainer.done:
        exactly = " --resume" if settings.options.run_dir else ""
        print(f"Interrupted after step {trainer.step_count} of {trainer.total_steps}. The same command{exactly} goes on from here.")


def export_place(settings: Settings) -> Path:
    """Where the model folder will stand."""
    path = settings.model_file
    return Path(settings.options.export_dir or path.with_name(f"{path.stem}_hf")).expanduser()


def test_line(loss: float) -> str:
    """The line that a test ends with. Loss in nats a token; its exponential is the perplexity."""
    return f"Test loss {loss:.3f}, Test ppl {math.exp(loss) if loss < 700 else math.inf:.3f}."


def work(flags: Mapping[str, Any]) -> int:
    """What the command does; returns its exit code."""
    settings = read_settings(flags)
    check_paths(settings)
    with termination_exits():
        trainer = train(settings) if settings.options.train else None
    if trainer is not None and trainer.interrupted:
        return 130
    if not settings.options.test:
        return 0
    batches = None if settings.config.test_batches < 0 else settings.config.test_batches
    if trainer is not None:
        print(test_line(trainer.evaluate("test", batches).loss))
        return 0
    from fulltune_nb.cpu.allocator import cap_cache
    from fulltune_nb.training.loss import evaluate_loss

    cap_cache()
    lm, data = load(settings)
    print(test_line(evaluate_loss(lm.model, data.test, settings.config.batch_size, batches)[0]))
    return 0


def build_parser() -> Parser:
    """The command's arguments; none has a default, so that what was given can be told from what was not."""
    name, usage = "python -m fulltune_nb.full", "python -m fulltune_nb.full [--model MODEL] [--data DIR] [--train] [--test] [settings]"
    parser = Parser(prog=name, usage=usage, description="Full fine-tuning: every weight is trained.", epilog=EPILOG)
    add_fields(parser.add_argument_group("what to do"), Options)
    parser.add_argument("--config", "-c", metavar="YAML", help="file with any of these settings", default=argparse.SUPPRESS)
    add_fields(parser.add_argument_group("how to train and test"), TrainConfig)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = vars(build_parser().parse_args(argv))
    return run(lambda: work(flags))


if __name__ == "__main__":
    start(main)
