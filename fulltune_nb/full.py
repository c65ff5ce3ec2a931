"""`python -m fulltune_nb.full`: trains every weight of a model, tests it, and writes what can be taken home.

Every flag is a field of `Options` or of `TrainConfig`. The same names stand in the YAML file.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune_nb.command_line import Parser, add_fields, run, silent_unless_first, start, termination_exits
from fulltune_nb.errors import ConfigError, DataError
from fulltune_nb.html import human_bytes, printable
from fulltune_nb.settings import SettingError, check_fields, described, flag, names_of, optional, read_yaml, setting, text
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.rank_channel import rank_of_environment

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


@described
@dataclass(frozen=True)
class Options:
    """What the command does and where things are; how it trains is `TrainConfig`.

    Raises:
        ConfigError: a value of the wrong type.
    """

    model: str | None = setting(
        None, optional(text), "Model folder or hub id. May be left out where the model file tells where it came from."
    )
    train: bool = setting(False, flag, "Train, and write the model file and a model folder.")
    test: bool = setting(False, flag, "Print loss and perplexity on the test split.")
    data: str = setting("data", text, "Folder with train.jsonl, valid.jsonl and test.jsonl, or a data set of the hub, hf:org/name.")
    model_file: str = setting(
        "model.npz", text,
        "The weights, .npz or .safetensors: written by training; read first if it exists, so that training goes on from it.",
    )  # fmt: skip
    export: bool = setting(True, flag, "Write a complete Hugging Face model folder after training.")
    export_dir: str | None = setting(None, optional(text), "Where to. Left out: beside the model file, model_hf for model.npz.")
    dtype: str | None = setting(None, optional(text), "float32 or bfloat16, in memory. Left out: as stored (float16 becomes float32).")
    dequantize: bool = setting(False, flag, "Turn the weights of a model that MLX quantized, or of one in MXFP4, into bfloat16.")
    run_dir: str | None = setting(
        None, optional(text),
        "Folder for checkpoints and metrics. Left out: the weights alone are saved, to the model file, every save_every steps.",
    )  # fmt: skip
    resume: bool = setting(
        False, flag,
        "Go on with the run in run_dir exactly where it stopped, with its settings and model, and its data unless data is given.",
    )  # fmt: skip
    force: bool = setting(
        False, flag,
        "Train even where too much memory is predicted; with resume, go on even where data, model or settings are not the run's.",
    )  # fmt: skip

    def __post_init__(self):
        check_fields(self)


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

    @property
    def export_dir(self) -> Path:
        """Where the model folder will stand."""
        beside = self.model_file.with_name(f"{self.model_file.stem}_hf")
        return Path(self.options.export_dir or beside).expanduser()


@silent_unless_first()
def work(flags: Mapping[str, Any]) -> int:
    """What the command does; returns its exit code."""
    settings = read_settings(flags)
    leads = rank_of_environment() == 0
    if leads:
        check_paths(settings)  # the others would see what rank 0 has written by then
    elif not settings.options.train:
        return 0
    trainer = None
    if settings.options.train:
        with termination_exits():
            trainer = train(settings)
        if trainer.interrupted:
            return 130
    if settings.options.test:
        print(printable(test_line(test_loss(settings, trainer))))
    return 0


def read_settings(flags: Mapping[str, Any]) -> Settings:
    """Joins flags and the YAML file; a flag wins, whatever its value.

    Args:
        flags: what stood on the command line, and nothing else; `config` is the YAML file's path.

    Raises:
        ConfigError: unknown names, wrong types or values; with file and line where they stood in the file.
    """
    own, path = names_of(Options), flags.get("config")
    options = {name: value for name, value in flags.items() if name in own}
    training = {name: value for name, value in flags.items() if name not in own and name != "config"}
    if path is None:
        return Settings(Options(**options), TrainConfig.from_dict(training), frozenset(flags))
    stored = read_yaml(path)
    config = TrainConfig.from_yaml(path, ignore=own, **training)
    try:
        checked = Options(**{**{name: value for name, value in stored.items() if name in own}, **options})
    except SettingError as error:
        raise (error if error.setting in flags else stored.placed(error)) from None
    return Settings(checked, config, frozenset(stored) | set(flags))


def check_paths(settings: Settings) -> None:
    """Finds out what is missing before a model is loaded.

    Raises:
        ConfigError, DataError, WeightsError: nothing to do, or something that is needed is not there.
    """
    from fulltune_nb.data.hub import hub_id
    from fulltune_nb.data.read import folder_names, names_of
    from fulltune_nb.tensor_files import check_ending
    from fulltune_nb.training.run import holds_run

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
    if options.train and options.run_dir is not None and holds_run(Path(options.run_dir).expanduser()):
        raise ConfigError(f"{options.run_dir} already holds a run. Add --resume to go on with it, or give another --run-dir.")
    if hub_id(options.data) is not None or options.data.startswith("{"):
        return  # loading it tells what is missing
    folder = Path(options.data).expanduser()
    if not folder.is_dir():
        try:
            folder_names(folder)
        except DataError as error:
            raise DataError(f"--data: {error}") from None
    for split in ("train", "test"):
        if getattr(options, split) and not names_of(split, folder_names(folder)):
            there = ", ".join(sorted(path.name for path in folder.glob("*.json*"))[:8]) or "no .jsonl file"
            raise DataError(f"--{split} needs {folder / f'{split}.jsonl'}; found there: {there}.")


def load(settings: Settings) -> tuple[LanguageModel, DataSet]:
    """Model and data, with a line for each thing worth knowing."""
    from fulltune_nb.data.dataset import load_data
    from fulltune_nb.models.model_file import load_with_model_file, read_metadata

    options, path = settings.options, settings.model_file
    exists = path.is_file()
    if exists:
        again = "For a fresh start, remove it or name another --model-file."
        print(printable(f"Training goes on from the weights in {path}. {again}" if options.train else f"Weights: {path}"))
    elif not options.train:
        print(printable(f"There is no {path}: the model is tested as it is."))
    lm = load_with_model_file(options.model, path if exists else None, options.dtype, options.dequantize)
    print(printable(f"Model: {lm!r}"))
    if lm.dequantized:
        print(printable(f"The base is quantized ({lm.dequantized}). It is ordinary weights now, and is saved as such: --dequantize."))
    stored = lm.config.raw.get("dtype") or lm.config.raw.get("torch_dtype")
    if stored == "float16" and options.dtype is None and options.train:
        print("The checkpoint is float16, in which updates underflow: it is trained in float32. --dtype bfloat16 takes half the memory.")
    config = settings.config
    if exists and config.template_date is None:  # a test on another day is of the same rows
        config = config.replace(template_date=read_metadata(path).get("template_date"))
    data = load_data(options.data, lm.tokenizer, config=config)
    show_data(data)
    if exists:
        show_other_mask(path, data.settings.mask_prompt)
    return lm, data


def show_data(data: DataSet) -> None:
    """The data's size and notes, a line each."""
    print(printable(f"Data: {data!r}"))
    for note in data.notes:
        print(printable(note))
    data.notes_shown = True


def show_other_mask(path: Path, mask_prompt: bool | str) -> None:
    """Says so where the weights were trained on other tokens than those that count now: the losses then differ by nature."""
    from fulltune_nb.models.model_file import read_metadata

    before = read_metadata(path).get("mask_prompt")
    if before in ("true", "last") and not mask_prompt:
        print(printable(f"{path} was trained on the answers only, and here the prompts count too: --mask-prompt leaves them out."))
    elif before == "false" and mask_prompt:
        print(printable(f"{path} was trained on the prompts too, and here only the answers count: --no-mask-prompt counts both."))
    elif before not in (None, str(mask_prompt).lower()):
        print(printable(f"{path} was trained with mask_prompt {before}, and here it is {str(mask_prompt).lower()}: other answers count."))


def check_outputs(settings: Settings, lm: LanguageModel) -> None:
    """Refuses, before the training, to write its results over the source model.

    Raises:
        ModelError, WeightsError: they would be.
    """
    from fulltune_nb.models.folder import check_not_source
    from fulltune_nb.models.model_file import check_model_file

    check_model_file(settings.model_file, lm)
    if settings.options.export:
        check_not_source(settings.export_dir, lm.source, "The model folder to be written,")


def new_trainer(settings: Settings) -> Trainer:
    """A trainer that begins a run, with the memory it will need announced: too much is refused by the trainer, unless forced."""
    from fulltune_nb.training.parallel import size_of_environment
    from fulltune_nb.training.plan import preflight
    from fulltune_nb.training.trainer import Trainer

    lm, data = load(settings)
    check_outputs(settings, lm)
    plan = preflight(lm, data, settings.config, ranks=size_of_environment())
    print(printable(f"Memory: about {human_bytes(plan.peak)} at the peak, of {human_bytes(plan.limit)}."))
    return Trainer(lm, data, settings.config, settings.options.run_dir, settings.options.force)


def resumed_trainer(settings: Settings) -> Trainer:
    """The trainer of the run in `run_dir`.

    Raises:
        ConfigError: a setting was given that the run does not have.
    """
    from fulltune_nb.training.trainer import Trainer

    options = settings.options
    trainer = Trainer.resume(options.run_dir, data=options.data if "data" in settings.given else None, force=options.force)
    check_outputs(settings, trainer.lm)
    print(printable(f"Model: {trainer.lm!r}"))
    show_data(trainer.data)
    asked = settings.config.fill_from(trainer.config)
    for name in sorted(settings.given.intersection(names_of(TrainConfig))):
        now, then = getattr(asked, name), getattr(trainer.config, name)
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

    save_model_file(path, trainer.lm, trainer.data.train.format, trainer.config.mask_prompt, trainer.config.template_date)


def train(settings: Settings) -> Trainer:
    """Trains to the end or to an interrupt, and writes the model file and, at the end, the model folder."""
    from fulltune_nb.models.model_file import export_folder

    trainer = resumed_trainer(settings) if settings.options.resume else new_trainer(settings)
    if rank_of_environment():
        trainer.run()
        return trainer  # rank 0 writes
    try:
        trainer.run(callbacks=[SaveModelFile(settings.model_file)])
    except SystemExit:  # SIGTERM or SIGHUP: the run has paused at a whole step, like at an interrupt
        save_and_tell(settings, trainer)
        raise
    save_and_tell(settings, trainer)
    if not trainer.interrupted and settings.options.export:
        note = {"data_format": trainer.data.train.format, "base_model": trainer.lm.source, "steps": trainer.step_count}
        print(printable(f"Model folder: {export_folder(trainer.lm, settings.export_dir, note)}"))
    return trainer


def save_and_tell(settings: Settings, trainer: Trainer) -> None:
    """Writes the model file, and says how to go on where the run is not done."""
    save_weights(trainer, settings.model_file)
    print(printable(f"Weights after step {trainer.step_count}: {settings.model_file}"))
    if not trainer.done:
        exactly = " --resume" if settings.options.run_dir else ""
        again = f"The same command{exactly} goes on from here."
        print(printable(f"Interrupted after step {trainer.step_count} of {trainer.total_steps}. {again}"))


def test_loss(settings: Settings, trainer: Trainer | None) -> float:
    """Loss on the test split in nats a token, of the trained model or, where nothing was trained, of the loaded one."""
    from fulltune_nb.cpu import cap_cache
    from fulltune_nb.training.loss import evaluate_loss

    batches = None if settings.config.test_batches < 0 else settings.config.test_batches
    if trainer is not None:
        return trainer.evaluate("test", batches).loss
    cap_cache()
    lm, data = load(settings)
    return evaluate_loss(lm.model, data.test, settings.config.batch_size, batches).loss


def test_line(loss: float) -> str:
    """The line that a test ends with. Loss in nats a token; its exponential is the perplexity."""
    return f"Test loss {loss:.3f}, Test ppl {math.exp(loss) if loss < 700 else math.inf:.3f}."


def build_parser() -> Parser:
    """The command's arguments; none has a default, so that what was given can be told from what was not."""
    usage = "%(prog)s [--model MODEL] [--data DIR] [--train] [--test] [settings]"
    parser = Parser(prog="python -m fulltune_nb.full", usage=usage, description="Full fine-tuning: every weight is trained.", epilog=EPILOG)
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
