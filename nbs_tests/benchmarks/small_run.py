"""A small run in forked processes, and what it should come to: for the scripts that kill and interrupt it.

Children are forked from a process that has imported everything and computed nothing, so that each begins within milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import fulltune_nb as ft  # before mlx: it gives it its BLAS
from fulltune_nb.models.language_model import LanguageModel, load_model
from fulltune_nb.tokenizer import load_tokenizer
from fulltune_nb.training.trainer import Trainer

STEPS = 12
CONFIG = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
SETTINGS = {
    "iters": STEPS, "batch_size": 2, "grad_accumulation_steps": 2, "learning_rate": 1e-3, "lr_schedule": "cosine", "save_every": 1,
    "steps_per_eval": 1, "val_batches": 1,
}  # fmt: skip
WORDS = "the quick brown fox jumps over lazy dog rows table city most people answer fine thank you".split()


def prepare(folder: Path) -> None:
    """A model and data in a folder. To be called in a child: it computes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"vocab_size": 400, "show_progress": False, "initial_alphabet": alphabet, "special_tokens": ["</s>"]}
    backend.train_from_iterator(WORDS, trainers.BpeTrainer(**options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    LanguageModel.from_config(CONFIG, tokenizer, seed=1).save(folder / "base")
    (folder / "data").mkdir()
    for split, size in (("train", 23), ("valid", 4)):
        rows = [{"text": " ".join(WORDS[(i * 7 + j) % len(WORDS)] for j in range(3 + i % 9))} for i in range(size)]
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def begin(folder: Path, run_dir: Path | None) -> Trainer:
    """A new trainer, or the one of the run that is there."""
    from fulltune_nb.training.run import holds_run

    if run_dir is not None and holds_run(run_dir):
        return Trainer.resume(run_dir)
    lm = load_model(folder / "base")
    config = ft.TrainConfig(**SETTINGS)
    return Trainer(lm, ft.load_data(folder / "data", lm.tokenizer, config=config), config, run_dir)


def digest(trainer: Trainer) -> str:
    """Checksum of weights and optimizer state."""
    from fulltune_nb.models.folder import hf_tensors
    from fulltune_nb.tensor_files import tensors_of

    sha = hashlib.sha256()
    arrays = {**hf_tensors(trainer.lm.model), **trainer.optimizers.state_arrays()}
    for tensor in tensors_of(dict(sorted(arrays.items()))):
        sha.update(tensor.name.encode())
        sha.update(b"".join(tensor.chunks()))
    return sha.hexdigest()


def reference(folder: Path) -> None:
    """Writes the losses, and the checksum after each step, of a run that nobody disturbs."""
    trainer = begin(folder, None)
    digests = [digest(trainer)]
    for _ in trainer.steps():
        digests.append(digest(trainer))
    (folder / "reference.json").write_text(json.dumps({"digests": digests, "losses": losses(trainer)}))


def losses(trainer: Trainer) -> list:
    """Of all steps and evaluations."""
    return [[report.kind_of_report, report.step, report.loss] for report in trainer.history if report.kind_of_report != "event"]


def fork(work: Callable[[], None], output: Path | None = None) -> int:
    """Starts `work` in a child; its exit code is 0 where it returns."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if output is not None:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        while True:
            try:
                sys.stdout.flush()
                os._exit(code)
            except KeyboardInterrupt:  # the work is over: it is no matter of the package
                pass


def run_to_end(work: Callable[[], None], output: Path | None = None) -> int:
    """`work` in a child; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work, output), 0)[1])


def send(child: int, number: int) -> None:
    """A signal to a child that may be gone."""
    try:
        os.kill(child, number)
    except ProcessLookupError:
        pass


def workplace() -> Path:
    """A temporary folder with model, data and reference."""
    folder = Path(tempfile.mkdtemp(prefix="fulltune-runs-"))
    os.environ.update(TOKENIZERS_PARALLELISM="false", FULLTUNE_PROGRESS="off")
    assert run_to_end(lambda: prepare(folder)) == 0
    load_tokenizer(folder / "base")  # so that what it imports is there in all children
    assert run_to_end(lambda: reference(folder)) == 0
    return folder


def remove(folder: Path) -> None:
    """Removes the workplace."""
    shutil.rmtree(folder, ignore_errors=True)


def rng(seed: int) -> random.Random:
    """The random instants."""
    return random.Random(seed)


SIGKILL, SIGINT, SIGTERM = signal.SIGKILL, signal.SIGINT, signal.SIGTERM
